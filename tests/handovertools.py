"""For the tests of the handover: guests that notice a second one, a link that loses what it is told to, and a source
that is a process of its own."""

import fcntl
import os
import select
import socket
import struct
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from migrationvm import FakeVm

from hwdbm.migration import Channel, Settings, migrate, transport
from hwdbm.migration.wire import Kind
from hwdbm.vm import MemoryMap, PlainGuest

TLS = Path(__file__).parent / "data" / "tls"
TRANSPORTS = ("unix", "tcp", "tls")
SETTINGS = Settings(max_downtime=10.0, max_iterations=3)


class Disk:
    """What two running copies of a guest would ruin: each that runs holds it, and a second one is written down.

    The system lets go of it for a process that is killed.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._fd = path, -1

    def take(self) -> None:
        self._fd = os.open(self._path, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.write(self._fd, b"two run\n")

    def release(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    @property
    def ruined(self) -> bool:
        return self._path.exists() and self._path.stat().st_size > 0

    @property
    def taken(self) -> bool:
        """Whether a guest runs, here or in another process."""
        with self._path.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False


class SourceVm(FakeVm):
    """A guest that writes, with a disk."""

    def __init__(self, disk: Path) -> None:
        self.disk = Disk(disk)
        super().__init__()

    def resume(self) -> None:
        self.disk.take()
        super().resume()

    def pause(self) -> None:
        super().pause()
        self.disk.release()


class DestinationVm(PlainGuest):
    """Where it arrives; with `broken`, it can't run."""

    def __init__(self, layout: MemoryMap, disk: Path, *, broken: bool = False) -> None:
        super().__init__(layout)
        self.disk, self._broken = Disk(disk), broken

    def resume(self) -> None:
        if self._broken:
            raise OSError(5, "the vCPU doesn't start")
        self.disk.take()
        super().resume()

    def pause(self) -> None:
        super().pause()
        self.disk.release()

    def close(self) -> None:
        if not self._closed:  # the receiver closes what must not run, and the test everything
            self.pause()
        super().close()


def listen(name: str, folder: Path) -> transport.Listener:
    if name == "unix":
        return transport.listen_unix(folder / "receiver")
    tls = transport.TlsDir(TLS) if name == "tls" else None
    return transport.listen_tcp("127.0.0.1", 0, tls, insecure=tls is None)


def connect(name: str, address: str, timeout: float) -> Channel:
    if name == "unix":
        return transport.connect_unix(Path(address.removeprefix("unix:")), timeout)
    tls, port = transport.TlsDir(TLS) if name == "tls" else None, int(address.rpartition(":")[2])
    return transport.connect_tcp("127.0.0.1", port, tls, insecure=tls is None, timeout=timeout)


class Link:
    """Passes bytes on between a source and a destination, until it is told to end: by FIN, by RST, or in silence.

    One thread has both sockets: only so does a close with SO_LINGER send RST at once. On a Unix socket there is no
    RST; a reader that leaves bytes unread makes an error of it there.
    """

    def __init__(self, to: transport.Listener | Path, folder: Path) -> None:
        if isinstance(to, Path):
            self._to, self._family = str(to), socket.AF_UNIX
        else:
            self._to, self._family = to.sock.getsockname(), to.sock.family
        self._listener = socket.socket(self._family)
        self._listener.bind(str(folder / "link") if self._family == socket.AF_UNIX else ("127.0.0.1", 0))
        self._listener.listen(1)
        name = self._listener.getsockname()
        self.address = f"unix:{name}" if self._family == socket.AF_UNIX else f"127.0.0.1:{name[1]}"
        self._order = self._swallow = ""
        self._closing = False
        self.ended, self.swallowed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self._listener.settimeout(20)
        with suppress(OSError):
            here, _ = self._listener.accept()
            there = socket.socket(self._family)
            with here, there:
                there.connect(self._to)
                self._pass_on(here, there)
                while self._order == "silence" and not self._closing:
                    time.sleep(0.01)

    def _pass_on(self, here: socket.socket, there: socket.socket) -> None:
        poll = select.poll()
        for sock in (here, there):
            poll.register(sock, select.POLLIN)
        while not self._closing:
            if self._order:
                if self._order == "rst":
                    for sock in (here, there):
                        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                        sock.close()
                elif self._order == "fin":
                    for sock in (here, there):
                        sock.shutdown(socket.SHUT_RDWR)
                self.ended.set()
                return
            for fd, _ in poll.poll(5):
                origin, target = (here, there) if fd == here.fileno() else (there, here)
                part = origin.recv(1 << 16)
                if origin is here:
                    self.seen(part)
                if origin is there and self._swallow:
                    self._order = self._swallow
                    self.swallowed.set()
                    break
                if not part:
                    target.shutdown(socket.SHUT_WR)
                    poll.unregister(origin)
                target.sendall(part)

    def seen(self, part: bytes) -> None:
        """Look at what comes from the source."""

    def cut(self, how: str) -> None:
        """End the link now, for both sides."""
        self._order = how
        assert self.ended.wait(5)

    def swallow(self, how: str) -> None:
        """Let everything pass until something comes back; that is lost, and the link ends."""
        self._swallow = how

    def close(self) -> None:
        self._closing = True
        self._listener.close()
        self._thread.join(5)


def trap(channel: Channel, kind: Kind, action, turn: int = 1, *, after: bool = False) -> Channel:
    """Have something done before, or after, a channel sends the frame of a kind for the so manieth time."""
    left = turn

    class Trapped(type(channel)):
        def send(self, sent, *args, **options):
            nonlocal left
            left -= sent is kind
            now = sent is kind and not left
            if now and not after:
                action()
            super().send(sent, *args, **options)
            if now and after:
                action()

    channel.__class__ = Trapped
    return channel


def main() -> None:
    """Be a source that kills itself: name of the transport, address, disk, kind of frame, its turn, before or after."""
    name, address, disk, kind, turn, when = sys.argv[1:]
    vm = SourceVm(Path(disk))
    vm.resume()
    with connect(name, address, 30) as channel:
        trap(channel, Kind[kind], lambda: os.kill(os.getpid(), 9), int(turn), after=when == "after")
        migrate(vm, channel, SETTINGS)


if __name__ == "__main__":
    main()
