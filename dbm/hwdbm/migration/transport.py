"""How the two sides meet: a Unix socket in a private directory, or TCP with TLS and certificates on both sides."""

import contextlib
import fcntl
import ipaddress
import os
import select
import socket
import ssl
import stat
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from errno import EACCES, EBADF, EEXIST, ENAMETOOLONG, ETIMEDOUT
from pathlib import Path
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Self

from hwdbm import files
from hwdbm.errors import StreamError, in_words, printable
from hwdbm.migration.channel import TIMEOUT, Channel, why
from hwdbm.migration.wire import Hello

_CREDENTIALS = struct.Struct("3i")  # struct ucred
_LONGEST = 107  # bytes of a path in struct sockaddr_un
_SOCKET = "migrate.sock"
_BACKLOG = 16
_MOST_WAITING = 16  # connections that haven't said HELLO; the oldest gives way to the next


class TlsDir:
    """A folder of certificates, laid out as QEMU's ``tls-creds-x509``.

    ``ca-cert.pem``, and ``client-cert.pem`` with ``client-key.pem`` for the source, ``server-cert.pem`` with
    ``server-key.pem`` for the destination. Both sides must have a certificate of that authority; the source checks the
    host's name, too.

    Parameters
    ----------
    path : Path
        The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def client(self) -> ssl.SSLContext:
        """Return the context of the source, which connects."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        return self._load(context, "client")

    def server(self) -> ssl.SSLContext:
        """Return the context of the destination: no source goes without a certificate."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.verify_mode = ssl.CERT_REQUIRED
        context.num_tickets = 0  # no session comes back
        return self._load(context, "server")

    def _load(self, context: ssl.SSLContext, side: str) -> ssl.SSLContext:
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        files = [self.path / name for name in ("ca-cert.pem", f"{side}-cert.pem", f"{side}-key.pem")]
        for file in files:
            with file.open("rb"):  # ssl's own errors don't name the file
                pass
        try:
            context.load_verify_locations(files[0])
            context.load_cert_chain(files[1], files[2])
        except ssl.SSLError as error:
            raise OSError(
                error.errno, f"no certificates of {side} and authority: {error.reason}", str(self.path)
            ) from error
        return context


# --- listening ---------------------------------------------------------------------------------------------


class Listener:
    """A socket that listens, on Unix or TCP, until a source has come; see `listen_unix` and `listen_tcp`.

    Parameters
    ----------
    sock : socket
        It listens.
    tls : TlsDir, optional
        The certificates.
    path : Path, optional
        The socket's file, which is removed with it.

    Attributes
    ----------
    address : str
        The address: ``HOST:PORT`` or ``unix:PATH``.
    """

    def __init__(self, sock: socket.socket, tls: TlsDir | None = None, path: Path | None = None) -> None:
        self.sock, self._path = sock, path
        self._context = tls.server() if tls else None
        if path is not None:
            self.address, self._made = f"unix:{path}", path.lstat()
        else:
            host, port, *_ = sock.getsockname()
            self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def accept(
        self,
        timeout: float | None = None,
        *,
        patience: float = TIMEOUT / 3,
        on_refused: Callable[[str], object] | None = None,
    ) -> Channel:
        """Return the channel of the first source that says HELLO, and may.

        Other connections don't end or hold this: those of other users, clients without a certificate, other protocols,
        the silent. The channel has its HELLO already, so that only `receive` can go on with it.

        Parameters
        ----------
        timeout : float, optional
            Seconds to wait for one; without limit by default.
        patience : float
            Seconds that each has to say HELLO.
        on_refused : callable, optional
            Called with a text for each that was refused.

        Raises
        ------
        TimeoutError
            If none came.
        OSError
            If the listener is closed meanwhile.
        """
        until = None if timeout is None else time.monotonic() + timeout
        came: SimpleQueue[Channel | str] = SimpleQueue()
        # Second descriptors of the connections that haven't said HELLO: TLS takes the first ones for its own.
        waiting: dict[socket.socket, None] = {}
        lock, over = Lock(), False
        wake, woken = socket.socketpair()
        self.sock.settimeout(0)
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        poll.register(woken, select.POLLIN)

        def meet(sock: socket.socket, handle: socket.socket) -> None:
            found: Channel | str
            try:
                found = self._greet(sock, patience)
            except Exception as error:  # noqa: BLE001  # whatever a stranger did, the next one may be the source
                sock.close()
                found = printable(getattr(error, "strerror", None) or str(error))
            with lock:
                waiting.pop(handle, None)
                handle.close()
                if not over:
                    came.put(found)
                    wake.send(b"x")
                    return
            refuse(found)

        def refuse(late: Channel | str) -> None:
            if isinstance(late, Channel):
                late.fail("another source came before")
                late.close()

        try:
            while True:
                left = None if until is None else max(until - time.monotonic(), 0) * 1e3
                ready = [fd for fd, _ in poll.poll(left)]
                if self.sock.fileno() < 0:
                    raise OSError(EBADF, "the listener was closed while a source was waited for")
                if not ready:
                    raise TimeoutError(ETIMEDOUT, f"no source came in {timeout:g} s")
                if self.sock.fileno() in ready:
                    with contextlib.suppress(OSError), lock:  # it went again
                        sock, _ = self.sock.accept()
                        if len(waiting) >= _MOST_WAITING:
                            with contextlib.suppress(OSError):
                                next(iter(waiting)).shutdown(socket.SHUT_RDWR)
                        waiting[handle := sock.dup()] = None
                        Thread(target=meet, args=(sock, handle), name="hwdbm-meet", daemon=True).start()
                while not came.empty():
                    woken.recv(1)
                    found = came.get()
                    if isinstance(found, Channel):
                        return found
                    if on_refused is not None:
                        on_refused(found)
        finally:
            with lock:
                over = True
                wake.close()
                woken.close()
            while not came.empty():
                refuse(came.get())

    def _greet(self, sock: socket.socket, patience: float) -> Channel:
        """Return a channel that has a HELLO."""
        sock.settimeout(patience)
        if self._path is not None:
            _check_owner(sock)
        channel = _secured(sock, self._context, server=True, host=None, timeout=patience)
        try:
            with channel.within(patience, "saying HELLO"):
                Hello.from_bytes(channel.greet())
        except BaseException as error:
            channel.fail(in_words(error))
            channel.close()
            raise
        channel.timeout = TIMEOUT
        return channel

    def close(self) -> None:
        """Listen no more, and remove the socket's file."""
        self.sock.close()
        if self._path is not None:
            with contextlib.suppress(OSError):
                if os.path.samestat(self._path.lstat(), self._made):
                    self._path.unlink()


# --- Unix --------------------------------------------------------------------------------------------------


@contextmanager
def private_socket() -> Iterator[Path]:
    """Make the path of a socket to be, in a new folder that only its owner can enter, and remove both after.

    Yields
    ------
    Path
        The path of the socket.
    """
    with files.scratch(_LONGEST - len(f"/{_SOCKET}")) as folder:
        yield folder / _SOCKET


def listen_unix(path: Path) -> Listener:
    """Listen on a Unix socket, which is only its owner's. A socket without a listener is replaced.

    Raises
    ------
    OSError
        If something else is there, or it can't be made.
    """
    check_socket(path)
    listener = socket.socket(socket.AF_UNIX)
    try:
        folder = os.open(path.parent, os.O_DIRECTORY)
        try:
            # Between another's bind and its listen, its socket would look dead.
            fcntl.flock(folder, fcntl.LOCK_EX)
            if _is_dead(path):
                path.unlink()
            listener.bind(str(path))
            path.chmod(stat.S_IRUSR | stat.S_IWUSR)  # no client can connect before listen()
            listener.listen(_BACKLOG)
        finally:
            os.close(folder)
    except OSError as error:
        listener.close()
        raise OSError(error.errno, error.strerror, str(path)) from error
    return Listener(listener, path=path)


def _is_dead(path: Path) -> bool:
    """Return whether a path is a socket of this user's without a listener."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    if not stat.S_ISSOCK(found.st_mode):
        raise OSError(EEXIST, "something is there that is no socket")
    if found.st_uid != os.geteuid():
        return False
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return True
        except OSError:  # a backlog that is full: there is a listener
            return False
    return False


def check_socket(path: Path) -> None:
    """Raise ENAMETOOLONG if a Unix socket can't have the path."""
    if len(os.fsencode(path)) > _LONGEST:
        raise OSError(ENAMETOOLONG, f"the path of a Unix socket has {_LONGEST} bytes at most", str(path))


def connect_unix(path: Path, timeout: float = TIMEOUT) -> Channel:
    """Connect to a Unix socket of this user's."""
    check_socket(path)
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.settimeout(timeout)
        sock.connect(str(path))
        _check_owner(sock)
    except OSError as error:
        sock.close()
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    return Channel(sock, timeout)


def _check_owner(sock: socket.socket) -> None:
    option = getattr(socket, "SO_PEERCRED", None)
    if option is None:  # no Linux: the folder's and the socket's modes must do
        return
    _, uid, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, option, _CREDENTIALS.size))
    if uid != os.geteuid():
        raise OSError(EACCES, f"the other side is user {uid}, and not this one, {os.geteuid()}")


# --- TCP ---------------------------------------------------------------------------------------------------


def listen_tcp(host: str, port: int, tls: TlsDir | None, *, insecure: bool = False) -> Listener:
    """Listen on TCP.

    Parameters
    ----------
    host, port : str, int
        Where; port 0 for any that is free.
    tls : TlsDir or None
        The certificates.
    insecure : bool
        Whether it may go without them, which a loopback address only may.

    Raises
    ------
    ValueError
        If there are neither certificates nor a loopback address with `insecure`.
    OSError
        If it can't be had.
    """
    family, address = _resolve(host, port, secure=tls is not None, insecure=insecure)
    listener = socket.socket(family)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, True)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise OSError(error.errno, error.strerror, f"{host}:{port}") from error
    return Listener(listener, tls)


def connect_tcp(
    host: str, port: int, tls: TlsDir | None, *, insecure: bool = False, timeout: float = TIMEOUT
) -> Channel:
    """Connect over TCP. Parameters and errors are `listen_tcp`'s. With `tls` the server must present a certificate."""
    context = tls.client() if tls else None
    family, address = _resolve(host, port, secure=tls is not None, insecure=insecure)
    sock = socket.socket(family)
    try:
        sock.settimeout(timeout)
        sock.connect(address)
    except OSError as error:
        sock.close()
        raise OSError(error.errno, error.strerror or str(error), f"{host}:{port}") from error
    return _secured(sock, context, server=False, host=host, timeout=timeout)


def _secured(
    sock: socket.socket, context: ssl.SSLContext | None, *, server: bool, host: str | None, timeout: float
) -> Channel:
    if context is None:
        return Channel(sock, timeout)
    sock.settimeout(timeout)
    try:
        return Channel(context.wrap_socket(sock, server_side=server, server_hostname=host), timeout)
    except OSError as error:
        with contextlib.suppress(OSError):
            sock.close()
        raise StreamError(f"no TLS with the other side: {why(error)}") from error


def _resolve(
    host: str, port: int, *, secure: bool, insecure: bool
) -> tuple[socket.AddressFamily, tuple[str, int] | tuple[str, int, int, int]]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise OSError(error.errno, error.strerror, f"{host}:{port}") from error
    (family, _, _, _, address), *_ = found
    if not secure:
        if not insecure:
            raise ValueError(f"{host}:{port}: TCP needs certificates (--tls-dir), or --insecure on a loopback address")
        number, *_ = address
        if not ipaddress.ip_address(str(number).partition("%")[0]).is_loopback:
            raise ValueError(f"{host}:{port}: --insecure is for loopback addresses, and {number} is none")
    return family, address  # type: ignore[return-value]  # str and int, for the families of TCP
