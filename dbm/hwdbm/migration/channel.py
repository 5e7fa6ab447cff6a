"""Frames over a connected socket, plain or TLS."""

import contextlib
import os
import select
import socket
import ssl
import struct
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import NoReturn, Self, TypeVar

from hwdbm.errors import PeerError, StreamError, printable
from hwdbm.migration.wire import HEAD_SIZE, LIMITS, Head, Kind, crc32

TIMEOUT = 30.0
"""Seconds without a frame after which the other side counts as gone."""

_BUFFER = 1 << 22
"""Bytes that the kernel may hold for a socket, in each direction, if its limits allow."""

_SLICE = 0.1  # seconds that one call of the system may wait, so that a cancel is heard
_SLOWEST = 1 << 10  # bytes a second, below which a link counts as silent
_ALIVE = 6  # signs of life in the time after which a side counts as gone
_DESCRIPTORS = 2  # that a frame can bring
_CLOEXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
_DRAIN_SECONDS = 2.0
_COPY = 1 << 16  # bytes in front of a body below which it is joined with its head, rather than sent after it

T = TypeVar("T")


class _BrokenError(StreamError):
    """The socket said that the link is gone."""


def why(error: OSError) -> str:
    """Return what an error of a socket or of OpenSSL says, without the place in Python's own code."""
    if isinstance(error, TimeoutError):
        return "it took too long"
    words = getattr(error, "verify_message", None) or getattr(error, "reason", None) or error.strerror or str(error)
    return printable(str(words))


class Channel:
    """One end of a stream. It owns the socket.

    Parameters
    ----------
    sock : socket
        Connected; a stream. An `ssl.SSLSocket` too.
    timeout : float
        Seconds that a frame may take to come or go, and some more for a large one. A peer that is busy says so with
        ALIVE, and then has as long again.

    Attributes
    ----------
    sent, received : int
        Bytes, with the heads, and with those beside the socket.
    local : bool
        Whether the other side is a process of this machine, that memory can be shared with.
    check : callable
        Called ten times a second while an operation waits; it raises to end that.
    """

    check: Callable[[], object] = staticmethod(lambda: None)

    def __init__(self, sock: socket.socket, timeout: float = TIMEOUT) -> None:
        self.sock, self.sent, self.received = sock, 0, 0
        self.timeout = timeout
        self._until, self._until_what = float("inf"), ""
        self._next_out = self._next_in = 0
        self._spoke = time.monotonic()
        self._held: list[memoryview | bytes] = []
        self._whole = True  # whether what was sent ends with a frame
        self._said: PeerError | None = None
        self._greeting: bytes | None = None
        self._tls = isinstance(sock, ssl.SSLSocket)
        self._head = bytearray(HEAD_SIZE)
        sock.settimeout(_SLICE)
        self.local = sock.family == socket.AF_UNIX and not self._tls
        self._descriptors: list[int] = []
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, _BUFFER)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
            # A peer that vanished is noticed also while nothing is said.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, True)
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- time ----------------------------------------------------------------------------------------------

    @contextmanager
    def within(self, seconds: float, what: str) -> Iterator[None]:
        """Have all operations of a block end within `seconds` together: those that take longer raise `StreamError`.

        Yields
        ------
        None
            `what` is what the error says took too long.
        """
        before = self._until, self._until_what
        until = time.monotonic() + seconds
        if until < self._until:
            self._until, self._until_what = until, f"{what} took longer than {seconds:.1f} s"
        try:
            yield
        finally:
            self._until, self._until_what = before

    @contextmanager
    def alive(self) -> Iterator[None]:
        """Send signs of life during a block that uses the channel for nothing else.

        Yields
        ------
        None
        """
        done = threading.Event()

        def say() -> None:
            with contextlib.suppress(OSError):  # the next operation will say so, too
                while not done.wait(self.timeout / _ALIVE):
                    self.send(Kind.ALIVE)

        thread = threading.Thread(target=say, name="hwdbm-alive", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def keep_alive(self) -> None:
        """Send a sign of life if nothing was sent for some time."""
        if time.monotonic() - self._spoke > self.timeout / _ALIVE:
            self.send(Kind.ALIVE)

    def _patiently(self, operation: Callable[[], T], start: float, nbytes: int, silence: str, heed: float) -> T:
        """Return what a call of the socket returns; it is called again while there is time.

        A byte now and then, of the `nbytes` that began to go at `start`, isn't enough. `check` is asked from `heed` on.
        """
        began = time.monotonic()
        until = min(began, start + nbytes / _SLOWEST) + self.timeout
        while True:
            now = time.monotonic()
            if now >= self._until:
                raise StreamError(self._until_what)
            if now >= until:
                if now - began < self.timeout / 2:  # some of it came or went meanwhile
                    raise StreamError(f"{nbytes} bytes of a frame took longer than {now - start:.1f} s")
                raise StreamError(f"{silence} for {now - began:.1f} s")
            try:
                return operation()
            except TimeoutError:
                pass  # the slice is over; what `check` raises is not to be taken for an error of the socket
            except OSError as error:
                raise _BrokenError(f"the link broke: {why(error)}") from error
            if time.monotonic() > heed:
                self.check()

    # --- sending -------------------------------------------------------------------------------------------

    def send(
        self,
        kind: Kind,
        body: bytes = b"",
        payload: Sequence[memoryview] = (),
        *,
        runs: int = 0,
        beside: memoryview | None = None,
        hold: bool = False,
        descriptors: Sequence[int] = (),
    ) -> None:
        """Send a frame.

        Parameters
        ----------
        kind : Kind
            The kind of the frame.
        body : bytes
            The body, or what of it comes before the payload.
        payload : sequence of memoryview
            The rest of the body, of bytes that don't change meanwhile. None of it is copied.
        runs : int
            Runs at the start of `body`.
        beside : memoryview, optional
            Bytes that the other side has already, and which the checksum covers, too.
        hold : bool
            Whether it is sent with the next frame or `flush`.
        descriptors : sequence of int
            Descriptors for the other side, which must be `local`.

        Raises
        ------
        PeerError
            If the other side said why it hung up.
        StreamError
            If the link is gone, or silent for too long. The frame didn't go whole then, and no other ever will.
        """
        crc, length = crc32(body), len(body)
        for part in payload:
            crc, length = crc32(part, crc), length + part.nbytes
        if length > LIMITS[kind]:
            raise ValueError(f"a {kind.name} of {length} bytes exceeds {LIMITS[kind]}")
        if beside is not None:
            crc = crc32(beside, crc)
            self.sent += beside.nbytes
        head = Head(kind, self._next_out, runs, length, crc).to_bytes()
        self._next_out = self._next_out + 1 & 0xFFFFFFFF
        self.sent += HEAD_SIZE + length
        front = [head + body] if len(body) < _COPY else [head, body]
        self._held += [*front, *payload]
        if not hold:
            self.flush(descriptors)

    def flush(self, descriptors: Sequence[int] = ()) -> None:
        """Send the frames that are held. Parameters and errors are `send`'s."""
        if not self._whole:
            raise StreamError("the link broke before")
        self._whole = False
        try:
            parts, self._held = self._held, []
            self._write(parts, descriptors)
        except _BrokenError as error:
            self._raise_peer(error)
        self._whole = True
        self._spoke = time.monotonic()

    def _write(self, parts: list[memoryview | bytes], descriptors: Sequence[int]) -> None:
        beside = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", descriptors))] if descriptors else []
        start, nbytes = time.monotonic(), sum(len(part) for part in parts)

        def step() -> int:
            # TLS has no sendmsg.
            return self.sock.send(parts[0]) if self._tls else self.sock.sendmsg(parts, beside)

        while parts:
            # A cancel waits for a moment, so that the frame goes whole and the other side can be told.
            done = self._patiently(step, start, nbytes, "the other side took nothing", start + _DRAIN_SECONDS)
            beside = []
            while parts and done >= len(parts[0]):
                done -= len(parts.pop(0))
            if done:
                parts[0] = memoryview(parts[0])[done:]

    def _raise_peer(self, error: _BrokenError) -> NoReturn:
        """Raise what the other side said before it hung up, or else that it hung up."""
        with contextlib.suppress(StreamError, OSError), self.within(_DRAIN_SECONDS, "hanging up"):
            while True:  # an ACK may be on its way before it
                self.receive()
        # PeerError is a StreamError: `suppress` would have swallowed it, so head() keeps it.
        if self._said is not None:
            raise self._said from error
        raise error

    def fail(self, reason: str) -> None:
        """Tell the other side why this one gives up, if it can still be told; never raises.

        A destination only says so when its guest doesn't run and never will: the source goes on then.
        """
        self.check = lambda: None
        if self._whole:
            self._held.clear()
            text = reason.encode("utf-8", "replace")[: LIMITS[Kind.ERROR]]
            with contextlib.suppress(OSError), self.within(_DRAIN_SECONDS, "saying why"):
                self.send(Kind.ERROR, text)
        self._drain()

    def _drain(self) -> None:
        """Take what the other side is still sending, for a moment: closed over it, TCP would destroy our last frame."""
        until, scratch = time.monotonic() + _DRAIN_SECONDS, bytearray(_COPY)
        with contextlib.suppress(OSError, ValueError):
            self.sock.settimeout(_DRAIN_SECONDS)
            if not self._tls:
                self.sock.shutdown(socket.SHUT_WR)
            while time.monotonic() < until and self.sock.recv_into(scratch):
                pass

    # --- receiving -----------------------------------------------------------------------------------------

    def pending(self) -> bool:
        """Return whether the other side has said something, or hung up."""
        return bool(self._poll.poll(0))

    def heed(self) -> None:
        """Take what came, while nothing is due: a sign of life, or else the end.

        Raises
        ------
        StreamError
            If it is anything else.
        """
        if self.pending():
            kind = self._next(descriptors=False).kind
            if kind is not Kind.ALIVE:
                raise StreamError(f"{kind.name} came, and nothing was due")

    def head(self, *, descriptors: bool = False) -> Head:
        """Receive the head of the next frame; its body is to be read next, with `read` and `end`.

        Parameters
        ----------
        descriptors : bool
            Whether `descriptors` may come with it.

        Raises
        ------
        PeerError
            If it is an error from the other side.
        StreamError
            If it can't be, or the stream ends here, or nothing comes for too long.
        """
        while True:
            head = self._next(descriptors=descriptors)
            if head.kind is not Kind.ALIVE:
                return head
            self.check()

    def _next(self, *, descriptors: bool) -> Head:
        if descriptors and self.local:
            self._read_with_descriptors()
        else:
            self.read(memoryview(self._head))
        head = Head.from_bytes(self._head, self._next_in)
        self._next_in = self._next_in + 1 & 0xFFFFFFFF
        if head.kind is Kind.ERROR:
            text = printable(self.body(head).decode("utf-8", "replace"))
            self._said = PeerError(f"the other side gave up: {text}")
            raise self._said
        return head

    def read(self, into: memoryview) -> None:
        """Fill `into`.

        Raises
        ------
        StreamError
            If the stream ends before, or it takes too long.
        """
        got, size, start = 0, into.nbytes, time.monotonic()
        while got < size:
            done = self._patiently(partial(self.sock.recv_into, into[got:]), start, size, "nothing came", start)
            if not done and not got and not self.received:
                raise StreamError("the stream ends before it began: the other side hung up without a word")
            if not done:
                raise StreamError(f"the stream ends inside of frame {self._next_in}: {size - got} bytes are missing")
            got += done
        self.received += size

    def descriptors(self) -> list[int]:
        """Return the descriptors that came, once: the caller closes them."""
        taken, self._descriptors = self._descriptors, []
        return taken

    def _read_with_descriptors(self) -> None:
        """Fill the head; descriptors come with its first byte."""

        def step() -> tuple[bytes, list[int]]:
            raw, came, _, _ = socket.recv_fds(self.sock, HEAD_SIZE, _DESCRIPTORS, _CLOEXEC)
            return raw, came

        start = time.monotonic()
        raw, came = self._patiently(step, start, HEAD_SIZE, "nothing came", start)
        self._descriptors += came
        if len(self._descriptors) > _DESCRIPTORS:
            raise StreamError(f"{len(self._descriptors)} descriptors came, and {_DESCRIPTORS} at most were due")
        self._head[: len(raw)] = raw
        self.received += len(raw)
        self.read(memoryview(self._head)[len(raw) :])

    def end(self, head: Head, crc: int, *, beside: int = 0) -> None:
        """Raise `StreamError` unless `crc` is what `head` announced; `beside` bytes of it came beside the socket."""
        self.received += beside
        if crc != head.crc:
            raise StreamError(
                f"frame {head.sequence}, {head.kind.name}: its body is damaged (CRC {crc:#010x}, not {head.crc:#010x})"
            )

    def body(self, head: Head, *, check: bool = True) -> bytes:
        """Receive a whole body; without `check`, `end` is left to the caller."""
        raw = bytearray(head.length)
        self.read(memoryview(raw))
        if check:
            self.end(head, crc32(raw))
        return bytes(raw)

    def greet(self) -> bytes:
        """Receive HELLO, and keep it for the next `expect` of it."""
        self._greeting = self.expect(Kind.HELLO, descriptors=True)
        return self._greeting

    def receive(self, *, descriptors: bool = False) -> tuple[Kind, bytes]:
        """Receive a frame whole."""
        if self._greeting is not None:
            body, self._greeting = self._greeting, None
            return Kind.HELLO, body
        head = self.head(descriptors=descriptors)
        return head.kind, self.body(head)

    def expect(self, kind: Kind, *, descriptors: bool = False) -> bytes:
        """Receive a frame whole, which must be of a kind.

        Raises
        ------
        StreamError
            If it is of another, or as `head` says.
        """
        got, body = self.receive(descriptors=descriptors)
        if got is not kind:
            raise StreamError(f"frame {self._next_in - 1} is {got.name}, and {kind.name} was due")
        return body

    def unpack(self, form: struct.Struct, body: bytes) -> tuple[int, ...]:
        """Return the numbers of a body of fixed size."""
        if len(body) != form.size:
            raise StreamError(f"frame {self._next_in - 1}: a body of {len(body)} bytes, and not {form.size}")
        return form.unpack(body)

    def close(self) -> None:
        """Hang up."""
        self.sock.close()
        for fd in self.descriptors():
            os.close(fd)
