"""Staging: where a batch of pages lies between the guest's memory and the other side.

A socket copies twice: into the kernel, and out of it. Between two processes of one machine, a few buffers that both
have mapped do without: the source copies pages into one, the destination out of it, and the socket carries where they
belong, with the checksum over all of it. The buffers are the destination's again and again, in turn; an eventfd counts
those that it is done with.
"""

import contextlib
import fcntl
import mmap
import os
import select
import time
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from hwdbm.errors import StreamError
from hwdbm.migration.channel import Channel
from hwdbm.migration.wire import PAYLOAD, Kind
from hwdbm.vm.memory import populate

BUFFERS = 8
"""Buffers that are shared. To wake the other side costs as much as to copy one, so that it is done for several."""

_TOGETHER = 2  # frames sent by one call, and so by one wake
_RETURNED = 2  # buffers returned by one
_SLICE = 0.1  # seconds between two looks at whether to go on
_SIZE = BUFFERS * PAYLOAD


class Staging(Protocol):
    """A buffer for the next batch, and how it is sent."""

    @property
    def descriptors(self) -> tuple[int, ...]:
        """File descriptors that the other side needs, sent with HELLO."""

    def buffer(self) -> NDArray[np.uint8]:
        """Return the buffer, ``(PAYLOAD,)``: the same until it is sent."""

    def send(self, table: bytes, runs: int, payload: NDArray[np.uint8]) -> None:
        """Send pages; `payload` begins where the buffer does."""

    def __enter__(self) -> Self:
        """Return itself."""

    def __exit__(self, *_: object) -> None:
        """Give everything back."""


def staging(channel: Channel) -> Staging:
    """Return buffers that both sides have mapped, where the other side is on this machine, or else one of our own."""
    if channel.local and hasattr(os, "memfd_create") and hasattr(os, "eventfd"):
        return SharedStaging(channel)
    return SocketStaging(channel)


class SocketStaging:
    """One buffer, sent through the socket."""

    descriptors = ()

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._buffer = np.zeros(PAYLOAD, dtype=np.uint8)

    def buffer(self) -> NDArray[np.uint8]:
        """Return the buffer."""
        return self._buffer

    def send(self, table: bytes, runs: int, payload: NDArray[np.uint8]) -> None:
        """Send the table with the pages behind it."""
        self._channel.send(Kind.PAGES, table, (payload.reshape(-1).data,), runs=runs)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class SharedStaging:
    """`BUFFERS` buffers of the source's, which the destination maps."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._open = [os.memfd_create("hwdbm-staging", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)]
        try:
            os.ftruncate(self._open[0], _SIZE)
            # The other side can rely on it then: memory that was cut off would kill it with SIGBUS.
            fcntl.fcntl(self._open[0], fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            self._open.append(os.eventfd(BUFFERS, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
            self._buffers = np.frombuffer(mmap.mmap(self._open[0], _SIZE), dtype=np.uint8).reshape(BUFFERS, PAYLOAD)
            populate(self._buffers.reshape(-1))
        except BaseException:
            self.close()
            raise
        self._next = self._free = 0
        self._poll = select.poll()
        self._poll.register(self._open[1], select.POLLIN)
        self._poll.register(channel.sock, select.POLLIN)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def descriptors(self) -> tuple[int, ...]:
        """The memory, and the count of what was taken."""
        return tuple(self._open)

    def buffer(self) -> NDArray[np.uint8]:
        """Return the next buffer, once the other side is done with it.

        Raises
        ------
        StreamError
            If the other side hung up, or is done with none for too long; or what it said before it hung up.
        """
        if not self._free:
            self._channel.flush()
        until = time.monotonic() + self._channel.timeout
        while not self._free:
            ready = dict(self._poll.poll(_SLICE * 1e3))
            if self._open[1] in ready:
                with contextlib.suppress(BlockingIOError):  # the other side read it itself: then it took nothing
                    self._free = os.eventfd_read(self._open[1])
                    break
            if ready:
                self._channel.heed()  # a sign of life, or it raises
                until = time.monotonic() + self._channel.timeout
            if time.monotonic() > until:
                raise StreamError(f"the other side took nothing for {self._channel.timeout:g} s")
            self._channel.check()
        buffer: NDArray[np.uint8] = self._buffers[self._next]
        return buffer

    def send(self, table: bytes, runs: int, payload: NDArray[np.uint8]) -> None:
        """Send the table; the pages are there already, and the calls of the kernel order one with the other."""
        self._channel.send(
            Kind.SHARED, table, beside=payload.reshape(-1).data, runs=runs, hold=bool(self._next % _TOGETHER)
        )
        self._next = (self._next + 1) % BUFFERS
        self._free -= 1

    def close(self) -> None:
        """Unmap the memory, and close the descriptors."""
        self._buffers = np.empty((0, 0), dtype=np.uint8)
        while self._open:
            os.close(self._open.pop())


class SharedMemory:
    """The destination's side of `SharedStaging`.

    Parameters
    ----------
    descriptors : list of int
        Descriptors that came with HELLO. They are closed, whatever happens.

    Raises
    ------
    StreamError
        If it isn't what a source sends.
    """

    def __init__(self, descriptors: list[int]) -> None:
        self._done_fd, self._next = -1, 0
        rest = list(descriptors)
        try:
            if len(rest) != 2:
                raise StreamError(f"a HELLO that shares memory came with {len(rest)} descriptors, and not with 2")
            self._buffers = _mapped(rest[0]).reshape(BUFFERS, PAYLOAD)
            os.set_blocking(rest[1], False)
            self._done_fd = rest.pop()
        except (OSError, ValueError) as error:
            raise StreamError(f"the memory that a HELLO shares is none: {error}") from error
        finally:
            for fd in rest:
                os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._buffers = np.empty((0, 0), dtype=np.uint8)
        done, self._done_fd = self._done_fd, -1
        if done >= 0:
            os.close(done)

    def payload(self, size: int) -> NDArray[np.uint8]:
        """Return the bytes of the batch that a frame announced."""
        return self._buffers[self._next, :size]

    def done(self) -> None:
        """Say that the batch was taken."""
        self._next = (self._next + 1) % BUFFERS
        if self._next % _RETURNED == 0:
            try:
                os.eventfd_write(self._done_fd, _RETURNED)
            except OSError as error:
                raise StreamError(f"the count that a HELLO shares can't be raised: {error.strerror}") from error


def _mapped(fd: int) -> NDArray[np.uint8]:
    size, seals = os.fstat(fd).st_size, fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    if size != _SIZE or not seals & fcntl.F_SEAL_SHRINK:
        raise ValueError(f"{size} bytes with seals {seals:#x}, and not {_SIZE} that can't shrink")
    flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
    return np.frombuffer(mmap.mmap(fd, _SIZE, flags=flags, prot=mmap.PROT_READ), dtype=np.uint8)
