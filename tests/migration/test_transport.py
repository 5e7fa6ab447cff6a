"""Who may connect, and who not."""

import os
import socket
import ssl
import stat
import tempfile
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from streamtools import SMALL

from hwdbm.migration import Channel, PeerError, Settings, StreamError, migrate, receive, transport
from hwdbm.migration.transport import TlsDir
from hwdbm.migration.wire import Hello, Kind
from hwdbm.vm import PlainGuest

TLS = Path(__file__).parents[1] / "data" / "tls"


class Server:
    """A receiver behind TCP, in a thread."""

    def __init__(
        self, tls: TlsDir | None, *, insecure: bool = False, host: str = "127.0.0.1", timeout: float = 20
    ) -> None:
        self.listener = transport.listen_tcp(host, 0, tls, insecure=insecure)
        self.host, self.port = self.listener.sock.getsockname()[:2]
        self.result = self.error = None
        self.refused: list[str] = []
        self._timeout = timeout
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            with self.listener.accept(self._timeout, on_refused=self.refused.append) as channel:
                self.result = receive(channel, PlainGuest)
        except Exception as error:  # noqa: BLE001  # for the test to look at
            self.error = error

    def join(self) -> "Server":
        self._thread.join(20)
        self.listener.close()
        return self


def greet(server: Server, context: ssl.SSLContext) -> None:
    """Connect, and wait until the server hangs up."""
    with suppress(OSError):
        sock = socket.create_connection(("127.0.0.1", server.port))
        with sock, context.wrap_socket(sock, server_hostname="localhost") as tls:
            tls.recv(1)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_tls(vm, host):
    vm.resume()
    server = Server(TlsDir(TLS))
    with transport.connect_tcp(host, server.port, TlsDir(TLS)) as channel:
        assert channel.sock.version() == "TLSv1.3"
        report = migrate(vm, channel, Settings(max_downtime=0.02, on_limit="pause"))
    received = server.join().result
    assert server.error is None
    assert received.destination.digest() == report.source_sha256 == report.destination_sha256


def anonymous(server: Server) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(TLS / "ca-cert.pem")
    greet(server, context)


def of_another_authority(server: Server) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(TLS / "ca-cert.pem")
    context.load_cert_chain(TLS / "other" / "client-cert.pem", TLS / "other" / "client-key.pem")
    greet(server, context)


def says(*parts: bytes):
    def say(server: Server) -> None:
        with socket.create_connection(("127.0.0.1", server.port), 5) as sock:
            for part in parts:
                sock.sendall(part)
            with suppress(OSError):
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(1 << 12):
                    pass

    return say


STRANGERS = {
    "connects": says(),
    "http": says(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"),
    "no tls": says(b"hDBM" + bytes(60)),
    "no certificate": anonymous,
    "another authority": of_another_authority,
}


@pytest.mark.parametrize("who", STRANGERS)
@pytest.mark.parametrize("tls", [None, TlsDir(TLS)], ids=["tcp", "tls"])
def test_strangers_end_nothing(vm, who, tls):
    """A silent one holds it no more than others do: the source that comes after them arrives."""
    server = Server(tls, insecure=tls is None)
    with socket.create_connection(("127.0.0.1", server.port)):  # it never says a word
        STRANGERS[who](server)
        until = time.monotonic() + 10
        while not server.refused and time.monotonic() < until:
            time.sleep(0.01)
        vm.resume()
        with transport.connect_tcp("localhost", server.port, tls, insecure=tls is None) as channel:
            report = migrate(vm, channel, Settings(max_downtime=0.02, on_limit="pause"))
        assert server.join().result.destination.digest() == report.source_sha256
    assert len(server.refused) == 1
    if tls and who in {"no certificate", "another authority"}:
        assert "no TLS with the other side" in server.refused[0]


def test_a_hello_that_is_none_is_told_why():
    server = Server(None, insecure=True, timeout=1)
    with transport.connect_tcp("127.0.0.1", server.port, None, insecure=True) as channel:
        channel.send(Kind.HELLO, b"\7\0\0\0")
        with pytest.raises(PeerError, match="of version 7, and this side knows 2"):
            channel.expect(Kind.READY)
    assert isinstance(server.join().error, TimeoutError)
    assert server.refused == ["the stream is of version 7, and this side knows 2"]


def test_one_source_at_a_time():
    """The first that says HELLO has it; one whose HELLO comes a moment later is told so."""
    hello = Hello(0, "", SMALL).to_bytes()
    with transport.listen_tcp("127.0.0.1", 0, None, insecure=True) as listener:
        address = listener.sock.getsockname()
        channels = [Channel(socket.create_connection(address)) for _ in range(3)]
        channels[1].send(Kind.HELLO, hello)
        with listener.accept(5) as accepted:
            channels[0].send(Kind.HELLO, hello)
            with pytest.raises(PeerError, match="another source came before"):
                channels[0].expect(Kind.READY)
            accepted.expect(Kind.HELLO)
            accepted.send(Kind.READY)
            channels[1].expect(Kind.READY)
        for channel in channels:
            channel.close()


def test_a_listener_that_is_closed_waits_no_more():
    listener = transport.listen_tcp("127.0.0.1", 0, None, insecure=True)
    with listener, socket.create_connection(listener.sock.getsockname()) as stranger:
        stranger.sendall(bytes(64))
        with pytest.raises(OSError, match="closed while a source was waited for"):
            listener.accept(20, on_refused=lambda _: listener.close())


def test_a_source_that_does_not_come():
    """Who is refused meanwhile changes nothing: each is told of once, and then there is nobody."""
    refused = []
    with transport.listen_tcp("127.0.0.1", 0, None, insecure=True) as listener:
        with pytest.raises(TimeoutError, match=r"no source came in 0 s$"):
            listener.accept(0)
        for _ in range(2):
            with socket.create_connection(listener.sock.getsockname()) as stranger:
                stranger.sendall(bytes(64))
        with pytest.raises(TimeoutError, match=r"no source came in 0.2 s$"):
            listener.accept(0.2, on_refused=refused.append)
    assert [text[:34] for text in refused] == ["frame 0 begins with 00000000, and "] * 2


def test_no_session_comes_back_and_no_source_goes_without_a_certificate():
    context = TlsDir(TLS).server()
    assert (context.num_tickets, context.verify_mode) == (0, ssl.CERT_REQUIRED)
    assert context.minimum_version == TlsDir(TLS).client().minimum_version == ssl.TLSVersion.TLSv1_3


def test_more_strangers_than_may_wait(vm):
    """The oldest gives way, also with TLS."""
    server = Server(TlsDir(TLS))
    with ExitStack() as stack:
        for _ in range(40):
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
        vm.resume()
        with transport.connect_tcp("localhost", server.port, TlsDir(TLS)) as channel:
            migrate(vm, channel, Settings(max_downtime=0.02, on_limit="pause"))
        assert server.join().result is not None


def test_a_server_of_another_authority():
    server = Server(TlsDir(TLS / "other"), timeout=1)
    with pytest.raises(StreamError, match=r"self.signed|unable to get local issuer"):
        transport.connect_tcp("localhost", server.port, TlsDir(TLS))
    server.join()


def test_a_server_of_another_name(monkeypatch):
    server = Server(TlsDir(TLS), host="127.0.0.2", timeout=1)
    with pytest.raises(StreamError, match=r"IP address mismatch|doesn't match|not valid for '127.0.0.2'"):
        transport.connect_tcp("127.0.0.2", server.port, TlsDir(TLS))
    server.join()


def test_a_server_without_tls():
    server = Server(None, insecure=True, timeout=1)
    with pytest.raises(StreamError, match="no TLS with the other side"):
        transport.connect_tcp("localhost", server.port, TlsDir(TLS), timeout=5)
    server.join()
    assert len(server.refused) == 1


def test_insecure_is_for_loopback():
    with pytest.raises(ValueError, match="needs certificates"):
        transport.connect_tcp("127.0.0.1", 1, None)
    with pytest.raises(ValueError, match="needs certificates"):
        transport.listen_tcp("127.0.0.1", 0, None)
    for host in ("0.0.0.0", "192.0.2.1"):
        with pytest.raises(ValueError, match=f"loopback addresses, and {host} is none"):
            transport.listen_tcp(host, 0, None, insecure=True)
        with pytest.raises(ValueError, match="loopback addresses"):
            transport.connect_tcp(host, 1, None, insecure=True)


def test_insecure(vm):
    vm.resume()
    server = Server(None, insecure=True)
    with transport.connect_tcp("127.0.0.1", server.port, None, insecure=True) as channel:
        report = migrate(vm, channel, Settings(max_downtime=0.02, on_limit="pause"))
    assert server.join().result.destination.digest() == report.source_sha256


def test_nobody_listens():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
        with pytest.raises(ConnectionRefusedError):
            transport.connect_tcp("127.0.0.1", port, None, insecure=True)
    with pytest.raises(OSError, match=r"nowhere\.invalid:1"):
        transport.connect_tcp("nowhere.invalid", 1, None, insecure=True)


def test_missing_certificates(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"ca-cert\.pem"):
        TlsDir(tmp_path).server()
    for name in ("ca-cert.pem", "client-cert.pem", "client-key.pem"):
        (tmp_path / name).write_text("no certificate")
    with pytest.raises(OSError, match="no certificates of client"):
        TlsDir(tmp_path).client()


def test_the_socket_is_its_owners():
    with transport.private_socket() as path:
        with transport.listen_unix(path) as listener:
            assert listener.address == f"unix:{path}"
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
            assert path.parent.stat().st_uid == os.geteuid()
            with pytest.raises(OSError, match="in use"):
                transport.listen_unix(path)
            with transport.connect_unix(path):
                pass
        assert not path.exists()
    assert not path.parent.exists()


def test_a_dead_socket_is_taken_over(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path("s")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with transport.listen_unix(path) as first, transport.connect_unix(path):
        pass
    first.close()
    assert not path.exists()
    with transport.listen_unix(path) as old:
        path.unlink()
        with transport.listen_unix(path):
            old.close()
            assert path.exists()  # it isn't the old one's


def test_a_socket_whose_listener_is_busy_is_not_taken_over(tmp_path, monkeypatch):
    """As many wait for it as may: who asks whether it is there gets no answer."""
    monkeypatch.chdir(tmp_path)
    path = Path("s")
    with socket.socket(socket.AF_UNIX) as busy, ExitStack() as waiting:
        busy.bind(str(path))
        busy.listen(0)
        with suppress(BlockingIOError):
            while True:
                one = waiting.enter_context(socket.socket(socket.AF_UNIX))
                one.setblocking(False)
                one.connect(str(path))
        with pytest.raises(OSError, match="in use: 's'"):
            transport.listen_unix(path)
        assert path.is_socket()


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_what_is_no_socket_stays(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    path = Path("s")
    {"file": path.touch, "folder": path.mkdir, "link": lambda: path.symlink_to("nowhere")}[kind]()
    with pytest.raises(OSError, match="no socket: 's'"):
        transport.listen_unix(path)
    assert path.lstat()


def test_a_path_that_is_too_long():
    for verb in (transport.listen_unix, transport.connect_unix):
        with pytest.raises(OSError, match="107 bytes at most: '/x"):
            verb(Path("/" + "x" * 107))


@pytest.mark.parametrize("place", ["too deep", "none"])
def test_a_private_socket_wherever_temporary_files_are(place, tmp_path, monkeypatch):
    """The usual place may be too deep for a socket's path, and there may be none that can be written."""
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep) if place == "too deep" else None)
    if place == "none":
        monkeypatch.setattr(tempfile, "_get_default_tempdir", missing)
    with transport.private_socket() as path:
        with transport.listen_unix(path) as listener, transport.connect_unix(path):
            assert listener.address == f"unix:{path}"
        assert path.parent.stat().st_mode & 0o777 == 0o700
    assert not path.parent.exists()
    monkeypatch.setattr(os, "access", lambda *_: False)
    why = "No usable" if place == "none" else "107 bytes"
    with pytest.raises(OSError, match=why), transport.private_socket() as path:
        transport.listen_unix(path)


def missing(*_):
    raise FileNotFoundError(2, "No usable temporary directory found")


def test_another_user(monkeypatch):
    refused = []
    with transport.private_socket() as path, transport.listen_unix(path) as listener:
        real = os.geteuid()
        here = socket.socket(socket.AF_UNIX)
        here.connect(str(path))
        monkeypatch.setattr(os, "geteuid", lambda: real + 1)
        with pytest.raises(PermissionError, match=f"is user {real}, and not this one"):
            transport.connect_unix(path)
        with here, pytest.raises(TimeoutError):
            listener.accept(0.5, on_refused=refused.append)
    assert refused == [f"the other side is user {real}, and not this one, {real + 1}"] * 2


def test_a_socket_that_is_not_there_is_named(tmp_path):
    """In the system's words, with the path beside them."""
    with pytest.raises(FileNotFoundError) as raised:
        transport.connect_unix(tmp_path / "none")
    assert (raised.value.strerror, raised.value.filename) == ("No such file or directory", str(tmp_path / "none"))


@pytest.mark.parametrize("end", ["silent", "damaged"])
def test_what_tls_says(end):
    """A peer that goes no further, in the handshake and after it: no place in Python's own code is named."""
    with socket.create_server(("127.0.0.1", 0)) as listener, ExitStack() as stack:
        said = []

        def serve():
            sock = stack.enter_context(listener.accept()[0])
            if end == "silent":
                sock.recv(1 << 16)
                return
            with TlsDir(TLS).server().wrap_socket(sock, server_side=True, suppress_ragged_eofs=False) as secured:
                os.write(secured.fileno(), b"\x17\x03\x03\x00\x20" + bytes(32))  # a record that nobody encrypted
                secured.settimeout(10)
                with suppress(OSError):
                    secured.recv(1)

        thread = threading.Thread(target=serve)
        thread.start()
        port = listener.getsockname()[1]
        with pytest.raises(StreamError) as error:  # noqa: SIM117
            with transport.connect_tcp(
                "localhost", port, TlsDir(TLS), timeout=0.2 if end == "silent" else 10
            ) as channel:
                channel.expect(Kind.READY)
        said.append(str(error.value))
        thread.join()
    (text,) = said
    assert text.startswith("no TLS with the other side: it took too long" if end == "silent" else "the link broke: ")
    assert "_ssl.c" not in text


def test_a_source_is_told_in_words():
    """What the system refuses at the destination has its file and the reason, and no number."""

    def full(_):
        raise OSError(28, "No space left on device", "guest.ram")

    here, there = socket.socketpair()
    with Channel(here) as source, Channel(there) as destination:
        source.send(Kind.HELLO, Hello(0, "", SMALL).to_bytes())

        def fail():
            with suppress(OSError):
                receive(destination, full)

        thread = threading.Thread(target=fail)
        thread.start()
        with pytest.raises(PeerError, match=r"^the other side gave up: guest\.ram: No space left on device$"):
            source.expect(Kind.READY)
        source.close()
        thread.join()
