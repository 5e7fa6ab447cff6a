"""The cost of a migration's stream, beside plain ``sendall`` and ``recv_into`` on the same socket.

A receiver in a process of its own takes, over one socket and in turn, plain bytes, and a migration: its first pass over
all memory, and passes over scattered pages, as many bytes each. Both sides' memory is there before any clock runs.
"""

import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np

from hwdbm.bench.measure import Row
from hwdbm.bitmap import DirtyBitmap
from hwdbm.dirtylog import ClientLease, LogClient
from hwdbm.memslot import Memslot
from hwdbm.migration import Channel, Report, Settings, migrate, receive
from hwdbm.process import child, python
from hwdbm.vm import MemoryMap, PlainGuest
from hwdbm.vm.memory import populate

_COMMAND = struct.Struct("<cQ")
_LIMIT = 1 / 0.8  # times the floor, at most
_STEP = 1 << 22  # words filled together


@dataclass(frozen=True, slots=True)
class StreamSetup:
    """The sizes of the measurement.

    Parameters
    ----------
    memory : int
        Bytes of guest memory, of random content.
    fraction : float
        The share of pages that a scattered pass sends.
    rounds : int
        Migrations, each after its own floor; the one with the median ratio counts.
    passes : int
        Scattered passes of each; the fastest counts, and the fastest of as many floors.
    transport : {"unix", "tcp"}
        The socket.
    """

    memory: int = 1 << 29
    fraction: float = 0.25
    rounds: int = 5
    passes: int = 3
    transport: Literal["unix", "tcp"] = "unix"


class _Scattered(PlainGuest):
    """A guest that claims to run, with the same random pages dirty in as many passes as are measured."""

    def __init__(self, setup: StreamSetup) -> None:
        super().__init__(MemoryMap(4096, (Memslot(0, 0, 0x40000, setup.memory // 4096, 0),)))
        rng = np.random.default_rng(1)
        words = self.memory(0).view(np.uint64)
        for start in range(0, words.size, _STEP):
            part = words[start : start + _STEP]
            part[:] = rng.integers(1, 1 << 64, part.size, np.uint64)
        npages = setup.memory // 4096
        self.pages = DirtyBitmap.from_pages(rng.permutation(npages)[: int(npages * setup.fraction)], npages)
        self._passes = self._left = setup.passes + 1  # what the first pass takes, it sends as part of everything
        self.running = True

    def rewind(self) -> None:
        self._left, self.running = self._passes, True

    def _take(self, client: LogClient, slot_id: int) -> ClientLease:
        if self._left:
            self._left -= 1
            with self._lock:
                marked = self._pages[slot_id]._sink().words
                np.bitwise_or(marked, self.pages.words, out=marked)
        return super()._take(client, slot_id)


def rows(setup: StreamSetup | None = None) -> Iterator[Row]:
    """Measure, and yield a row for the first pass and one for scattered pages; each has its ratio to the floor."""
    setup = setup or StreamSetup()
    guest = _Scattered(setup)
    scattered = guest.pages.weight() * 4096
    rounds = []
    with _receiver(setup) as channel:
        for _ in range(setup.rounds):
            whole = _floor(channel.sock, guest, setup.memory, 1)
            part = _floor(channel.sock, guest, scattered, setup.passes)
            first, *passes = [one.time for one in _migrate(channel, guest, setup).passes if one.dirty]
            rounds.append(((first, whole), (min(passes), part)))
        channel.sock.sendall(_COMMAND.pack(b"Q", 0))
    for what, size, found in zip(
        ("first", "scattered"), (setup.memory, scattered), zip(*rounds, strict=True), strict=True
    ):
        # Other work of the machine comes in bursts: times of one round compare, and the median leaves out the odd one.
        seconds, floor = sorted(found, key=lambda times: times[0] / times[1])[len(found) // 2]
        name = f"{setup.transport} stream, {what}, {size / seconds / 1e9:.2f} GB/s"
        yield Row(name, seconds, "plain sendall", floor, _LIMIT)


def _floor(sock: socket.socket, guest: PlainGuest, size: int, repeat: int) -> float:
    """Return the seconds that `size` bytes take, plain."""
    data, best = guest.memory(0)[:size].data, float("inf")
    with _plain(sock):
        for _ in range(repeat):
            sock.sendall(_COMMAND.pack(b"F", size))
            sock.recv(1)
            start = time.perf_counter()
            sock.sendall(data)
            sock.recv(1)
            best = min(best, time.perf_counter() - start)
    return best


@contextmanager
def _plain(sock: socket.socket) -> Iterator[None]:
    """Have the socket wait without the time limit of a channel."""
    limit = sock.gettimeout()
    sock.settimeout(None)
    try:
        yield
    finally:
        sock.settimeout(limit)


def _migrate(channel: Channel, guest: _Scattered, setup: StreamSetup) -> Report:
    guest.rewind()
    channel.sock.sendall(_COMMAND.pack(b"M", 0))
    settings = Settings(max_downtime=0, max_iterations=setup.passes + 1, verify=False)
    return migrate(guest, channel, settings)


@contextmanager
def _receiver(setup: StreamSetup) -> Iterator[Channel]:
    here, there = socket.socketpair() if setup.transport == "unix" else _tcp_pair()
    code = f"from hwdbm.bench.stream import serve; serve({there.fileno()}, {setup.memory})"
    with child(python("-c", code), pass_fds=[there.fileno()]):
        there.close()
        with Channel(here) as channel:
            yield channel


def _tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        here = socket.create_connection(listener.getsockname())
        there, _ = listener.accept()
    return here, there


def serve(fd: int, memory: int) -> None:
    """Be the receiver, on a socket of this number, until the other side has had enough."""
    with Channel(socket.socket(fileno=fd)) as channel:
        sock = channel.sock
        plain = np.zeros(memory, dtype=np.uint8)
        populate(plain)
        while True:
            with _plain(sock):
                order = sock.recv(_COMMAND.size, socket.MSG_WAITALL)
                if len(order) < _COMMAND.size:  # the other side is gone
                    return
                command, size = _COMMAND.unpack(order)
                if command == b"F":
                    sock.sendall(b"r")
                    left = plain[:size].data
                    while left:
                        left = left[sock.recv_into(left[: 1 << 20]) :]
                    sock.sendall(b"k")
            if command == b"M":
                receive(channel, PlainGuest).destination.close()
            elif command == b"Q":
                return
