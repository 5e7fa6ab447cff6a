"""Memory that both sides map, beside the socket: offered, refused, damaged, and waited for."""

import fcntl
import os
import socket
import struct
import threading
import zlib

import numpy as np
import pytest
from leaks import descriptors
from migrationvm import FakeVm
from streamtools import SMALL, frame, hello

from hwdbm.memslot import Memslot
from hwdbm.migration import Channel, PeerError, Settings, StreamError, migrate, receive
from hwdbm.migration.sender import Limiter
from hwdbm.migration.staging import BUFFERS, SharedMemory, SharedStaging, SocketStaging, staging
from hwdbm.migration.wire import PASS, PAYLOAD, SHARING, Kind
from hwdbm.vm import MemoryMap, PlainGuest

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="this system has no memfd")


@pytest.fixture
def pair():
    """Return two ends of a Unix socket."""
    here, there = socket.socketpair()
    with Channel(here, timeout=2) as source, Channel(there, timeout=2) as destination:
        yield source, destination


def tcp() -> tuple[Channel, Channel]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        here = socket.create_connection(listener.getsockname())
        there, _ = listener.accept()
    return Channel(here), Channel(there)


def kinds(channel: Channel) -> list[Kind]:
    """Return a list that the kinds of what the channel sends will stand in."""
    sent, send = [], channel.send

    def spy(kind, *args, **kwargs):
        sent.append(kind)
        send(kind, *args, **kwargs)

    channel.send = spy
    return sent


@pytest.mark.parametrize("local", [True, False])
def test_who_shares(local, pair):
    source, destination = pair if local else tcp()
    vm, error = FakeVm(), []

    def take():
        try:
            receive(destination, PlainGuest)
        except OSError as raised:
            error.append(raised)

    taker = threading.Thread(target=take)
    taker.start()
    sent = kinds(source)
    vm.resume()
    report = migrate(vm, source, Settings())
    taker.join()
    assert not error
    assert report.source_sha256 == report.destination_sha256
    assert (Kind.SHARED in sent, Kind.PAGES in sent) == (local, not local)
    assert report.transferred >= sum(one.normal for one in report.passes) * 4096  # with what went beside the socket
    assert destination.received == source.sent
    for each in (source, destination, vm):
        each.close()


def test_descriptors_are_closed():
    before = descriptors()
    for _ in range(3):
        here, there = socket.socketpair()
        with Channel(here) as source, Channel(there) as destination:
            vm = PlainGuest(SMALL)
            vm.memory(0)[:] = 1
            taker = threading.Thread(target=receive, args=(destination, PlainGuest))
            taker.start()
            migrate(vm, source, Settings())
            taker.join()
    assert descriptors() == before


@pytest.mark.parametrize("size", [4096, 65536])
def test_more_batches_than_buffers(size, pair):
    """Each buffer comes round again and again; a guest that is paused is copied, too."""
    source, destination = pair
    guest = PlainGuest(MemoryMap(size, (Memslot(0, 0, 16, 5 * BUFFERS * PAYLOAD // 2 // size + 3, 0),)))
    rng = np.random.default_rng(1)
    guest.memory(0)[:] = rng.integers(0, 256, guest.memory(0).size, dtype=np.uint8)
    rows = guest.memory(0).reshape(-1, size)
    rows[rng.permutation(len(rows))[: len(rows) // 3]] = 0  # between others: those that are left move up
    got = []
    taker = threading.Thread(target=lambda: got.append(receive(destination, PlainGuest)))
    taker.start()
    report = migrate(guest, source, Settings())
    taker.join()
    assert np.array_equal(got[0].destination.memory(0), guest.memory(0))
    assert got[0].sha256 == report.source_sha256


def offered(source: Channel, flags: int, *fds: int, layout: MemoryMap = SMALL, then: bytes = b"") -> None:
    """Say HELLO, with descriptors, and what comes after it, and no more: the other side waits for nothing."""
    socket.send_fds(source.sock, [hello(layout, flags=flags)], fds)
    source.sock.sendall(then)
    source.sock.shutdown(socket.SHUT_WR)


def memory(size: int = BUFFERS * PAYLOAD, *, sealed: bool = True) -> int:
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    if sealed:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    return fd


OFFERS = {
    "one": (lambda: (memory(),), "1 descriptors, and not with 2"),
    "no memory": (os.pipe, "is none"),
    "too little": (lambda: (memory(PAYLOAD), os.eventfd(0)), "2097152 bytes"),
    "memory that can shrink": (lambda: (memory(sealed=False), os.eventfd(0)), "that can't shrink"),
}


@pytest.mark.parametrize("name", OFFERS)
def test_an_offer_that_is_none(name, pair):
    source, destination = pair
    make, match = OFFERS[name]
    fds = make()
    offered(source, SHARING, *fds)
    for fd in fds:
        os.close(fd)
    before = descriptors()
    with pytest.raises(StreamError, match=match):
        receive(destination, PlainGuest)
    assert descriptors() == before
    with pytest.raises(PeerError, match=match):
        source.expect(Kind.READY)


def test_descriptors_nobody_asked_for(pair):
    source, destination = pair
    fds = (memory(), os.eventfd(0))
    before = descriptors()
    offered(source, 0, *fds)
    with pytest.raises(StreamError, match="are missing"):
        receive(destination, PlainGuest)
    destination.close()
    assert descriptors() == before - 1  # and the channel
    for fd in fds:
        os.close(fd)


def shared(sequence: int, *runs: tuple[int, int], crc: int = 0) -> bytes:
    table = b"".join(struct.pack("<QQ", *run) for run in runs)
    size = sum(length for _, length in runs)
    crc = crc or zlib.crc32(bytes(size), zlib.crc32(table))
    return frame(Kind.SHARED, sequence, table, runs=len(runs), crc=crc)


BROKEN = {
    "no memory is": (0, shared(1, (16 << 12, 4096)), "frame 1 is SHARED, and no memory is"),
    "damaged": (SHARING, shared(1, (16 << 12, 4096), crc=7), "frame 1, SHARED: its body is damaged"),
    "no runs": (SHARING, frame(Kind.SHARED, 1), "has no runs"),
    "a body": (SHARING, frame(Kind.SHARED, 1, bytes(17), runs=1), "17 bytes are not 1 runs"),
    "outside": (SHARING, shared(1, (24 << 12, 4096)), "is not inside"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken(name, pair):
    source, destination = pair
    flags, raw, match = BROKEN[name]
    fds = (memory(), os.eventfd(0))
    offered(source, flags, *fds, then=raw)
    with pytest.raises(StreamError, match=match):
        receive(destination, PlainGuest)
    for fd in fds:
        os.close(fd)


def full() -> int:
    fd = os.eventfd(0)
    os.eventfd_write(fd, (1 << 64) - 2)
    return fd


def unread() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize(
    "count", [full, unread, lambda: os.open("/dev/null", os.O_RDONLY), lambda: os.open("/", os.O_RDONLY), memory],
    ids=["full", "unread", "read only", "a folder", "a file"],
)  # fmt: skip
def test_a_count_that_is_none(count, pair):
    """What can't be raised is the other side's fault; what can be, though it is no count, is its own loss."""
    source, destination = pair
    fds = (memory(), count())
    offered(source, SHARING, *fds, then=shared(1, (16 << 12, 4096)) + shared(2, (16 << 12, 4096)))
    match = (
        "the stream ends inside of frame 3" if count is memory else "the count that a HELLO shares can't be raised: "
    )
    with pytest.raises(StreamError, match=match):
        receive(destination, PlainGuest)
    for fd in fds:
        os.close(fd)


def test_a_count_that_the_other_side_reads_itself(pair, monkeypatch):
    """Then it says that it took something, and there is nothing: the source waits on, until it is too long."""
    source, _ = pair
    source.timeout = 0.2
    with SharedStaging(source) as shares:
        real = os.eventfd_read
        monkeypatch.setattr(os, "eventfd_read", lambda fd: (real(fd), real(fd))[1])
        with pytest.raises(StreamError, match="the other side took nothing for"):
            shares.buffer()


def test_a_batch_larger_than_its_buffer(pair):
    source, destination = pair
    fds = (memory(), os.eventfd(0))
    layout = MemoryMap(4096, (Memslot(0, 0, 0, 1024, 0),))
    offered(source, SHARING, *fds, layout=layout, then=shared(1, (0, PAYLOAD + 4096)))
    with pytest.raises(StreamError, match="the runs' 513 pages are more than 2097152 bytes"):
        receive(destination, PlainGuest)
    for fd in fds:
        os.close(fd)


def test_what_lies_there_is_checked(pair):
    source, destination = pair
    fds = (memory(), os.eventfd(0))
    os.pwrite(fds[0], b"x", 4095)
    offered(source, SHARING, *fds, then=shared(1, (16 << 12, 4096)))  # summed over zeros
    with pytest.raises(StreamError, match="frame 1, SHARED: its body is damaged"):
        receive(destination, PlainGuest)
    for fd in fds:
        os.close(fd)


class TestWaiting:
    """The source waits for a buffer."""

    def fill(self, staging: SharedStaging) -> None:
        for _ in range(BUFFERS):
            staging.buffer()
            staging.send(struct.pack("<QQ", 0, 4096), 1, staging.buffer()[:4096])

    def test_in_vain(self, pair):
        source, _ = pair
        source.timeout = 0.05
        staging = SharedStaging(source)
        self.fill(staging)
        with pytest.raises(StreamError, match=r"took nothing for 0.05 s"):
            staging.buffer()
        staging.close()

    def test_while_the_other_side_hangs_up(self, pair):
        source, destination = pair
        staging = SharedStaging(source)
        self.fill(staging)
        threading.Timer(0.05, destination.sock.shutdown, [socket.SHUT_RDWR]).start()
        with pytest.raises(StreamError, match="hung up without a word"):
            staging.buffer()
        staging.close()

    def test_while_the_other_side_says_why(self, pair):
        source, destination = pair
        staging = SharedStaging(source)
        self.fill(staging)
        destination.send(Kind.ERROR, b"the disk is full")
        with pytest.raises(PeerError, match="the disk is full"):
            staging.buffer()
        staging.close()

    def test_nothing_is_due(self, pair):
        source, destination = pair
        staging = SharedStaging(source)
        self.fill(staging)
        destination.send(Kind.ACK, PASS.pack(1, 0, 0, 0)[:4])
        with pytest.raises(StreamError, match="ACK came, and nothing was due"):
            staging.buffer()
        staging.close()

    def test_the_last_frames_are_not_held(self, pair):
        """Whoever waits for a buffer has sent what returns one."""
        source, destination = pair
        staging = SharedStaging(source)
        with SharedMemory([os.dup(fd) for fd in staging.descriptors]) as other:
            self.fill(staging)
            waiter = threading.Thread(target=staging.buffer)
            waiter.start()
            for _ in range(BUFFERS):
                destination.body(destination.head(), check=False)
                other.done()
            waiter.join(2)
            assert not waiter.is_alive()
        staging.close()


def test_where_there_is_no_memfd(monkeypatch, pair):
    monkeypatch.delattr(os, "memfd_create")
    assert isinstance(staging(pair[0]), SocketStaging)


def test_nothing_is_held_while_a_limit_has_the_source_wait(pair, monkeypatch):
    """The next frame may be long in coming, and the other side's patience ends."""
    source, destination = pair
    guest, waited = PlainGuest(MemoryMap(4096, (Memslot(0, 0, 16, 3 * PAYLOAD // 4096, 0),))), []
    guest.memory(0)[:] = 1
    monkeypatch.setattr(Limiter, "wait", lambda *_: waited.append(list(source._held)))
    taker = threading.Thread(target=receive, args=(destination, PlainGuest))
    taker.start()
    migrate(guest, source, Settings(bandwidth=1e9))
    taker.join()
    assert waited == [[]] * 3


@pytest.mark.parametrize("populated", [False, True])
def test_memory_is_populated_once(pair, monkeypatch, populated):
    source, destination = pair
    sizes = []
    monkeypatch.setattr("hwdbm.migration.receiver.populate", lambda memory: sizes.append(memory.size))
    taker = threading.Thread(target=lambda: receive(destination, PlainGuest, populated=populated))
    taker.start()
    migrate(PlainGuest(SMALL), source, Settings())
    taker.join()
    assert sizes == ([] if populated else [8 << 12, 3 << 12])
