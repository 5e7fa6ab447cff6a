"""How the two sides meet: a Unix socket in a private directory, or TCP with TLS and certificates on both sides."""

import contextlib
import ipaddress
import os
import socket
import ssl
import stat
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EACCES
from pathlib import Path

from hwdbm.migration.channel import TIMEOUT, Channel
from hwdbm.migration.errors import StreamError

__all__ = [
    "TlsDir",
    "accept",
    "accept_tcp",
    "connect_tcp",
    "connect_unix",
    "listen_tcp",
    "listen_unix",
    "private_socket",
]

_CREDENTIALS = struct.Struct("3i")  # struct ucred


class TlsDir:
    """A folder of certificates, laid out as QEMU's ``tls-creds-x509``.

    ``ca-cert.pem``, and ``client-cert.pem`` with ``client-key.pem`` for who connects, ``server-cert.pem`` with
    ``server-key.pem`` for who listens. Both sides must have a certificate of that authority; who connects checks the
    host's name, too.

    Parameters
    ----------
    path : Path
        The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def client(self) -> ssl.SSLContext:
        """Return the context of who connects."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        return self._load(context, "client")

    def server(self) -> ssl.SSLContext:
        """Return the context of who listens: no client goes without a certificate."""
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


# --- Unix --------------------------------------------------------------------------------------------------


@contextmanager
def private_socket() -> Iterator[Path]:
    """Yield the path of a socket to be, in a new folder that only its owner can enter, and remove both after."""
    with tempfile.TemporaryDirectory(prefix="hwdbm-") as folder:  # mode 0700
        yield Path(folder) / "migrate.sock"


def listen_unix(path: Path) -> socket.socket:
    """Listen on a Unix socket, which is only its owner's.

    Raises
    ------
    OSError
        If something is there already, or it can't be made.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        listener.bind(str(path))
        path.chmod(stat.S_IRUSR | stat.S_IWUSR)  # nobody can connect before listen()
        listener.listen(1)
    except OSError as error:
        listener.close()
        raise OSError(error.errno, error.strerror, str(path)) from error
    return listener


def connect_unix(path: Path, timeout: float = TIMEOUT) -> Channel:
    """Connect to a Unix socket of this user's."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.settimeout(timeout)
        sock.connect(str(path))
        _check_owner(sock)
    except OSError as error:
        sock.close()
        raise OSError(error.errno, error.strerror, str(path)) from error
    return Channel(sock, timeout)


def accept(listener: socket.socket, timeout: float | None = None) -> Channel:
    """Accept one connection on a Unix socket, from this user."""
    listener.settimeout(timeout)
    sock, _ = listener.accept()
    try:
        _check_owner(sock)
    except OSError:
        sock.close()
        raise
    return Channel(sock)


def _check_owner(sock: socket.socket) -> None:
    option = getattr(socket, "SO_PEERCRED", None)
    if option is None:  # no Linux: the folder's and the socket's modes must do
        return
    _, uid, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, option, _CREDENTIALS.size))
    if uid != os.geteuid():
        raise OSError(EACCES, f"the other side is user {uid}, and not this one, {os.geteuid()}")


# --- TCP ---------------------------------------------------------------------------------------------------


def listen_tcp(host: str, port: int, tls: TlsDir | None, *, insecure: bool = False) -> socket.socket:
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
    address = _resolve(host, port, secure=tls is not None, insecure=insecure)
    listener = socket.socket(address[0], socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address[1])
        listener.listen(1)
    except OSError as error:
        listener.close()
        raise OSError(error.errno, error.strerror, f"{host}:{port}") from error
    return listener


def accept_tcp(listener: socket.socket, tls: TlsDir | None, timeout: float | None = None) -> Channel:
    """Accept one connection on TCP; with `tls`, of a client that shows a certificate of the authority.

    Raises
    ------
    StreamError
        If the client has none.
    """
    context = tls.server() if tls else None
    listener.settimeout(timeout)
    sock, _ = listener.accept()
    return _secured(sock, context, server=True, host=None, timeout=TIMEOUT)


def connect_tcp(
    host: str, port: int, tls: TlsDir | None, *, insecure: bool = False, timeout: float = TIMEOUT
) -> Channel:
    """Connect over TCP. Parameters and errors are `listen_tcp`'s; a server without a certificate is no server."""
    context = tls.client() if tls else None
    family, address = _resolve(host, port, secure=tls is not None, insecure=insecure)
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
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
        reason = getattr(error, "verify_message", None) or getattr(error, "reason", None) or error.strerror or error
        raise StreamError(f"no TLS with the other side: {reason}") from error


def _resolve(
    host: str, port: int, *, secure: bool, insecure: bool
) -> tuple[socket.AddressFamily, tuple[str, int] | tuple[str, int, int, int]]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise OSError(error.errno, error.strerror, f"{host}:{port}") from error
    family, _, _, _, address = found[0]
    if not secure:
        if not insecure:
            raise ValueError(f"{host}:{port}: TCP needs certificates (--tls-dir), or --insecure on a loopback address")
        if not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
            raise ValueError(f"{host}:{port}: --insecure is for loopback addresses, and {address[0]} is none")
    return family, address  # type: ignore[return-value]  # str and int, for the families of TCP
