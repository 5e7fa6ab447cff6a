"""Who may connect, and who not."""

import os
import socket
import ssl
import stat
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from hwdbm.migration import Settings, StreamError, migrate, receive, transport
from hwdbm.migration.transport import TlsDir
from hwdbm.vm import PlainGuest

TLS = Path(__file__).parents[1] / "data" / "tls"


class Server:
    """A receiver behind TCP, in a thread."""

    def __init__(self, tls: TlsDir | None, *, insecure: bool = False, host: str = "127.0.0.1") -> None:
        self.listener = transport.listen_tcp(host, 0, tls, insecure=insecure)
        self.host, self.port = self.listener.getsockname()[:2]
        self.result = self.error = None
        self._tls = tls
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            with transport.accept_tcp(self.listener, self._tls, timeout=10) as channel:
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
        report = migrate(vm, channel, Settings(max_downtime=0.02))
    received = server.join().result
    assert server.error is None
    assert received.destination.digest() == report.source_sha256 == report.destination_sha256


def test_tls_receiver_fails(vm):
    vm.resume()
    server = Server(TlsDir(TLS))
    with transport.connect_tcp("localhost", server.port, TlsDir(TLS)) as channel:
        channel.sock.sendall(bytes(40))
        with pytest.raises(StreamError, match="begins with 00000000"):
            migrate(vm, channel, Settings())
    assert isinstance(server.join().error, StreamError)
    assert vm.running


def test_a_client_of_another_authority():
    server = Server(TlsDir(TLS))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(TLS / "ca-cert.pem")
    context.load_cert_chain(TLS / "other" / "client-cert.pem", TLS / "other" / "client-key.pem")
    greet(server, context)
    assert "no TLS with the other side" in str(server.join().error)


def test_a_client_without_a_certificate():
    server = Server(TlsDir(TLS))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(TLS / "ca-cert.pem")
    greet(server, context)
    assert "no TLS with the other side" in str(server.join().error)


def test_a_client_without_tls():
    server = Server(TlsDir(TLS))
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.sendall(b"hDBM" + bytes(60))
        with suppress(OSError):
            sock.recv(1)
    assert "no TLS with the other side" in str(server.join().error)


def test_a_server_of_another_authority():
    server = Server(TlsDir(TLS / "other"))
    with pytest.raises(StreamError, match=r"self.signed|unable to get local issuer"):
        transport.connect_tcp("localhost", server.port, TlsDir(TLS))
    server.join()


def test_a_server_of_another_name(monkeypatch):
    server = Server(TlsDir(TLS), host="127.0.0.2")
    with pytest.raises(StreamError, match=r"IP address mismatch|doesn't match|not valid for '127.0.0.2'"):
        transport.connect_tcp("127.0.0.2", server.port, TlsDir(TLS))
    server.join()


def test_a_server_without_tls():
    server = Server(None, insecure=True)
    with pytest.raises(StreamError, match="no TLS with the other side"):
        transport.connect_tcp("localhost", server.port, TlsDir(TLS), timeout=5)
    assert isinstance(server.join().error, StreamError)


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
        report = migrate(vm, channel, Settings(max_downtime=0.02))
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
    with transport.private_socket() as path, transport.listen_unix(path) as listener:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert path.parent.stat().st_uid == os.geteuid()
        with transport.connect_unix(path), transport.accept(listener, 5):
            pass
        with pytest.raises(OSError, match="in use"):
            transport.listen_unix(path)
    assert not path.parent.exists()


def test_another_user(monkeypatch):
    with transport.private_socket() as path, transport.listen_unix(path) as listener:
        real = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: real + 1)
        with pytest.raises(PermissionError, match=f"is user {real}, and not this one"):
            transport.connect_unix(path)
        with pytest.raises(PermissionError):
            transport.accept(listener, 5)
