"""The stream against everything that could come instead: cut, damaged, reordered, too large, made up."""

import socket
import struct
import sys
import threading
import tracemalloc
import zlib
from contextlib import suppress

import pytest
from effort import EFFORT
from hypothesis import example, given, settings
from hypothesis import strategies as st
from streamtools import SMALL, frame, hello, pages, zeros

from hwdbm.memslot import Memslot
from hwdbm.migration import Channel, LayoutError, PeerError, Precopy, Settings, StreamError, migrate, receive, wire
from hwdbm.migration.wire import ACK, HEAD_SIZE, LIMITS, PASS, Head, Kind, crc32
from hwdbm.vm import MemoryMap, PlainGuest

ALL = [
    hello(),
    pages(1, (16 << 12, 2 << 12), (19 << 12, 4096)),
    zeros(2, (18 << 12, 4096), (20 << 12, 4 << 12)),
    pages(3, (64 << 12, 3 << 12)),
    frame(Kind.PASS, 4, PASS.pack(1, 0, 6, 5)),
    pages(5, *((page << 12, 4096) for page in (16, 18, 19, 21, 23))),
    frame(Kind.PASS, 6, PASS.pack(2, 1, 5, 0)),
    frame(Kind.STATE, 7, b"state"),
    frame(Kind.GO, 8),
]
"""A migration without digests, a frame each."""


def feed(raw: bytes, build=PlainGuest):
    """Return what a receiver makes of bytes, and what it answered."""
    here, there = socket.socketpair()
    for sock in (here, there):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 21)
    answer = bytearray()

    def send():
        with suppress(OSError):
            here.sendall(raw)
        with suppress(OSError):
            here.shutdown(socket.SHUT_WR)
            while part := here.recv(1 << 16):
                answer.extend(part)

    feeder = threading.Thread(target=send)
    feeder.start()
    try:
        with Channel(there, timeout=5) as channel:
            return receive(channel, build, most_memory=1 << 24), answer
    except BaseException as error:
        error.answer = answer  # whole once the feeder is done
        raise
    finally:
        feeder.join()
        here.close()


def said(error: BaseException) -> str:
    """Return the text of the error frame that the receiver sent last."""
    at, text = 0, ""
    while at < len(error.answer):
        head = Head.from_bytes(error.answer[at : at + HEAD_SIZE], struct.unpack_from("<I", error.answer, at + 8)[0])
        if head.kind is Kind.ERROR:
            text = error.answer[at + HEAD_SIZE : at + HEAD_SIZE + head.length].decode()
        at += HEAD_SIZE + head.length
    return text


def test_the_literal_stream_arrives():
    received, answer = feed(b"".join(ALL))
    vm = received.destination
    assert (received.passes, received.normal, received.duplicate) == (2, 11, 5)
    assert vm.state() == b"state"
    page = bytes(range(256)) * 16
    rows = vm.memory(0).reshape(-1, 4096)
    assert [bytes(row) == page for row in rows] == [True, True, True, True, False, True, False, True]
    assert not rows[4].any()
    kinds = [answer[at + 4] for at in range(len(answer)) if answer[at : at + 4] == b"hDBM"]
    assert kinds == [Kind.READY, Kind.ACK, Kind.ACK, Kind.RESUMED]


def test_memory_that_was_offered_and_never_came():
    """The descriptors got lost on the way: it goes without them."""
    _, answer = feed(hello(flags=wire.SHARING) + b"".join(ALL[1:]))
    assert answer[4] == Kind.READY
    assert struct.unpack_from("<I", answer, HEAD_SIZE) == (0,)


def test_the_checksum_is_zlibs():
    assert crc32(b"123456789") == zlib.crc32(b"123456789") == 0xCBF43926
    assert crc32(b"6789", crc32(b"12345")) == 0xCBF43926


def test_without_zlib_ng(monkeypatch):
    monkeypatch.setitem(sys.modules, "zlib_ng", None)
    monkeypatch.delitem(sys.modules, "zlib_ng.zlib_ng", raising=False)
    assert wire._crc32() is zlib.crc32


BROKEN = {
    "nothing": (b"", "ends before it began: the other side hung up without a word"),
    "half a head": (ALL[0][:20], "12 bytes are missing"),
    "half a body": (ALL[0][:60], "are missing"),
    "another protocol": (b"QEVM\0\0\0\3" + bytes(32), "begins with 5145564d"),
    "http": (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", "begins with 47455420"),
    "an unknown kind": (frame(99, 0), "unknown kind 99"),
    "a flag": (frame(Kind.HELLO, 0, flags=1), "flags 0x1"),
    "no hello": (frame(Kind.STATE, 0, b""), "frame 0 is STATE, and HELLO was due"),
    "a short hello": (frame(Kind.HELLO, 0, b"\1\0"), "has no version"),
    "a hello that is shorter than a version": (frame(Kind.HELLO, 0, bytes(3)), "a HELLO of 3 bytes has no version"),
    "a version alone": (frame(Kind.HELLO, 0, b"\1\0\0\0"), "of version 1, and this side knows 2"),
    "a hello cut short": (
        frame(Kind.HELLO, 0, struct.pack("<II15s", 2, 0, b"")),
        "a HELLO of 23 bytes is cut short",
    ),
    "version 1": (hello(version=1), "of version 1, and this side knows 2"),
    "a hello too large": (frame(Kind.HELLO, 0, b"", length=1 << 40), "1099511627776 bytes are more than"),
    "a layout cut short": (
        frame(Kind.HELLO, 0, struct.pack("<II16sIIQ", 2, 0, b"", 4096, 3, 0)),
        "3 slots has 80 bytes, got",
    ),
    "no layout": (frame(Kind.HELLO, 0, struct.pack("<II16s", 2, 0, b"")), "has no head"),
    "a slot without pages": (
        frame(Kind.HELLO, 0, struct.pack("<II16sIIIIQQ", 2, 0, b"", 4096, 1, 0, 0, 16, 0)),
        "no pages",
    ),
    "too much memory": (hello(MemoryMap(4096, (Memslot(0, 0, 0, 1 << 30, 0),))), "more than the 16777216 allowed"),
    "2**64 pages": (
        frame(Kind.HELLO, 0, struct.pack("<II16sIIIIQQ", 2, 0, b"", 4096, 1, 0, 0, 0, (1 << 64) - 1)),
        "beyond 52 bits",
    ),
    "out of order": (ALL[0] + ALL[2], "out of order, it says that it is number 2"),
    "one comes twice": (ALL[0] + ALL[1] + ALL[1], "out of order, it says that it is number 1"),
    "a damaged body": (ALL[0] + ALL[1][:-1] + b"x", "frame 1, PAGES: its body is damaged"),
    "a damaged table": (ALL[0] + ALL[1][:34] + b"x" + ALL[1][35:], "overlap or descend"),
    "a damaged head": (ALL[0] + ALL[1][:10] + b"x" + ALL[1][11:], "frame 1: its head is damaged"),
    "a damaged scatter": (b"".join(ALL[:5]) + ALL[5][:-1] + b"x", "frame 5, PAGES: its body is damaged"),
    "runs beyond the body": (ALL[0] + frame(Kind.PAGES, 1, b"", runs=3), "3 runs in 0 bytes are too many"),
    "too many runs": (ALL[0] + frame(Kind.PAGES, 1, bytes(16 * 600), runs=600), "600 runs"),
    "shared, and nothing is": (
        ALL[0] + frame(Kind.SHARED, 1, bytes(16), runs=1),
        "frame 1 is SHARED, and no memory is",
    ),
    "runs in a pass": (ALL[0] + frame(Kind.PASS, 1, bytes(24), runs=1), "1 runs in 24 bytes are too many"),
    "pages too large": (ALL[0] + frame(Kind.PAGES, 1, b"", length=1 << 31, runs=1), "bytes are more than"),
    "no runs": (ALL[0] + frame(Kind.PAGES, 1), "has no runs"),
    "zeros without runs": (ALL[0] + frame(Kind.ZERO, 1), "has no runs"),
    "zeros with a payload": (ALL[0] + frame(Kind.ZERO, 1, struct.pack("<QQ", 65536, 4096) + b"x", runs=1), "are not 1"),
    "less than its runs": (ALL[0] + pages(1, (16 << 12, 8192), payload=bytes(4096)), "4096 bytes are not the runs' 2"),
    "outside of the slots": (ALL[0] + pages(1, (24 << 12, 4096)), "gpa 0x18000..0x18fff is not inside"),
    "across a slot's end": (ALL[0] + zeros(1, (23 << 12, 8192)), "0x17000..0x18fff is not inside"),
    "two slots": (ALL[0] + zeros(1, (16 << 12, 4096), (64 << 12, 4096)), "is not inside of one slot"),
    "half a page": (ALL[0] + zeros(1, (16 << 12, 2048)), "no whole number of pages"),
    "an empty run": (ALL[0] + zeros(1, (16 << 12, 0)), "no whole number of pages"),
    "descending": (ALL[0] + zeros(1, (17 << 12, 4096), (16 << 12, 4096)), "overlap or descend"),
    "overlapping": (ALL[0] + zeros(1, (16 << 12, 8192), (17 << 12, 4096)), "overlap or descend"),
    "an address that wraps": (ALL[0] + zeros(1, ((1 << 64) - 4096, 8192)), "beyond 52 bits of address"),
    "a length that wraps": (ALL[0] + zeros(1, (16 << 12, (1 << 64) - 4096)), "beyond 52 bits of address"),
    "go inside of a pass": (ALL[0] + frame(Kind.GO, 1), "frame 1 is GO, inside of a pass"),
    "pass 2 first": (ALL[0] + frame(Kind.PASS, 1, PASS.pack(2, 0, 0, 0)), "pass 2 ends, and pass 1 was due"),
    "a short pass": (ALL[0] + frame(Kind.PASS, 1, b"\1\0\0\0"), "frame 1: a body of 4 bytes, and not 24"),
    "a pass that lost pages": (ALL[0] + frame(Kind.PASS, 1, PASS.pack(1, 0, 1, 0)), "had 1 pages"),
    "pages that never came": (ALL[0] + frame(Kind.PASS, 1, PASS.pack(1, 1, 0, 0)), "8 of the 8 pages of slot 0 never"),
    "no go": (b"".join(ALL[:-1]), "ends inside of frame 8"),
    "a digest nobody asked for": (b"".join(ALL[:-1]) + frame(Kind.GO, 8, bytes(32)), "not asked for here"),
    "verify nobody asked for": (b"".join(ALL[:-1]) + frame(Kind.VERIFY, 8), "frame 8 is VERIFY, and GO was due"),
    "a state too large": (b"".join(ALL[:7]) + frame(Kind.STATE, 7, b"", length=1 << 25), "are more than 16777216"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken(name):
    raw, match = BROKEN[name]
    with pytest.raises(StreamError, match=match) as raised:
        feed(raw)
    assert said(raised.value) == str(raised.value)  # the other side hears the same


def test_an_error_ends_it():
    with pytest.raises(PeerError, match="the other side gave up: no more"):
        feed(ALL[0] + frame(Kind.ERROR, 1, b"no more"))
    with pytest.raises(PeerError, match="gave up: \ufffd"):
        feed(ALL[0] + frame(Kind.ERROR, 1, b"\xff"))


def test_a_layout_that_does_not_match():
    mine = MemoryMap(4096, (Memslot(0, 0, 16, 8, 0), Memslot(1, 0, 65, 3, 0)))
    with pytest.raises(LayoutError, match=r"slot 1 \(gfn 0x40, 3 pages.* doesn't fit into slot 1 \(gfn 0x41") as raised:
        feed(b"".join(ALL), lambda _: PlainGuest(mine))
    assert "doesn't fit" in said(raised.value)


def test_a_state_that_does_not_fit():
    def build(layout):
        guest = PlainGuest(layout)
        guest.set_state = int
        return guest

    with pytest.raises(StreamError, match="the state doesn't fit: invalid literal"):
        feed(b"".join(ALL), build)


def test_what_it_built_is_closed():
    closed = []

    def build(layout):
        guest = PlainGuest(layout)
        guest.close = lambda: closed.append(True)
        return guest

    with pytest.raises(StreamError):
        feed(ALL[0], build)
    assert closed == [True]


def test_memory_is_bounded():
    """Whatever a head claims, no more than the limits is allocated."""
    tracemalloc.start()
    try:
        for raw in (hello(), frame(Kind.HELLO, 0, b"", length=LIMITS[Kind.HELLO])):
            with suppress(StreamError):
                feed(
                    raw + b"".join(frame(Kind.PAGES, 1, b"", length=LIMITS[Kind.PAGES], runs=1)[:32] for _ in range(99))
                )
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


# --- fuzzing -----------------------------------------------------------------------------------------------

FUZZ = settings(max_examples=150 * EFFORT, deadline=None)


def survives(raw: bytes) -> None:
    """Assert that the receiver takes it or says what is wrong, and does nothing else."""
    with suppress(StreamError):
        feed(raw)


@FUZZ
@given(st.binary(max_size=200))
@example(b"hDBM")
def test_any_bytes(raw):
    with pytest.raises(StreamError):
        feed(raw)


@FUZZ
@given(st.data())
def test_a_damaged_byte_is_found(data):
    """One byte that differs, anywhere, ends it: every byte is under a checksum."""
    raw = bytearray(b"".join(ALL))
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(StreamError):
        feed(bytes(raw))


@FUZZ
@given(st.integers(0, sum(map(len, ALL)) - 1))
def test_a_cut_is_found(size):
    with pytest.raises(StreamError, match="without a word" if size == 0 else "are missing"):
        feed(b"".join(ALL)[:size])


@FUZZ
@given(st.lists(st.integers(0, len(ALL) - 1), max_size=12))
@example([0, 2, 1, 3, 4, 5, 6, 7, 8])
@example([0, 1, 2, 3, 4, 6, 7, 8])
def test_reordered_frames_are_found(order):
    if order[: len(ALL)] != list(range(len(ALL))):
        with pytest.raises(StreamError):
            feed(b"".join(ALL[i] for i in order))


RUN = st.tuples(
    st.one_of(st.integers(14, 70).map(lambda page: page << 12), st.integers(0, (1 << 64) - 1)),
    st.one_of(st.integers(0, 10).map(lambda page: page << 12), st.integers(0, (1 << 64) - 1)),
)
BODY = st.one_of(
    st.binary(max_size=64),
    st.lists(RUN, max_size=6).map(lambda runs: b"".join(struct.pack("<QQ", *run) for run in runs)),
    st.builds(PASS.pack, *(st.integers(0, 3) for _ in range(4))),
    st.builds(ACK.pack, st.integers(0, 3)),
)


@settings(FUZZ, max_examples=300 * EFFORT)
@given(st.lists(st.tuples(st.integers(0, 15), st.integers(0, 6), BODY, st.integers(0, 3)), max_size=5))
@example([(Kind.PAGES, 0, struct.pack("<QQ", 1 << 63, 1 << 63), 1)])
@example([(Kind.ZERO, 0, struct.pack("<QQ", 16 << 12, 1 << 63), 1)])
@example([(Kind.ZERO, 0, struct.pack("<QQ", 0, 4096), 1)])
@example([(Kind.PASS, 0, PASS.pack(1, 1, 0, 0), 0), (Kind.STATE, 0, b"", 0)])
def test_made_up_frames(frames):
    """Frames whose checksums and numbers are right, and nothing else has to be."""
    raw, count = hello(), 1
    for kind, npages, body, runs in frames:
        payload = bytes(npages << 12) if kind == Kind.PAGES else b""
        raw += frame(kind, count, body + payload, runs=runs)
        count += 1
    survives(raw)


@FUZZ
@given(st.binary(max_size=80))
def test_any_layout(raw):
    try:
        layout = MemoryMap.from_bytes(raw)
    except LayoutError:
        return
    assert MemoryMap.from_bytes(layout.to_bytes()) == layout


# --- the source --------------------------------------------------------------------------------------------

ANSWERS = {
    "nothing": (b"", "hung up without a word"),
    "garbage": (bytes(64), "begins with 00000000"),
    "an acknowledgement too early": (frame(Kind.ACK, 0, ACK.pack(1)), "frame 0 is ACK, and READY was due"),
    "ready twice": (frame(Kind.READY, 0, bytes(4)) + frame(Kind.READY, 1, bytes(4)), "READY came, and nothing was due"),
    "another pass": (
        frame(Kind.READY, 0, bytes(4)) + frame(Kind.ACK, 1, ACK.pack(7)),
        "ACK came|pass 7 was acknowledged",
    ),
    "a version it doesn't know": (frame(Kind.ERROR, 0, b"version 9"), "the other side gave up: version 9"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_a_receiver_that_is_none(name):
    raw, match = ANSWERS[name]
    here, there = socket.socketpair()
    guest = PlainGuest(SMALL)
    guest.memory(0)[:] = 1
    guest.start_log()
    guest.write(16 << 12, b"dirty")
    guest.resume()
    there.sendall(raw)
    there.shutdown(socket.SHUT_WR)
    with Channel(here, timeout=3) as channel, there:
        with pytest.raises(StreamError, match=match):
            migrate(guest, channel, Settings())
        assert guest.running
        with guest.dirty(0) as lease:
            assert 0 in lease.bitmap


READY = frame(Kind.READY, 0, bytes(4))


@settings(FUZZ, max_examples=60 * EFFORT)
@given(st.lists(st.tuples(st.integers(0, 16), BODY), max_size=5), st.integers(0, 2))
@example([(Kind.ALIVE, b"")] * 5, 1)
@example([(Kind.ACK, ACK.pack(1)), (Kind.ACK, ACK.pack(2)), (Kind.RESUMED, b"")], 1)
@example([(Kind.ERROR, b"\x1b[2J\xff")], 1)
def test_a_receiver_that_lies(frames, ready):
    """Whatever it says, out of order or made up: the source ends soon, and its guest runs unless it was told to go."""
    raw = READY if ready else b""
    raw += b"".join(frame(kind, bool(ready) + number, body) for number, (kind, body) in enumerate(frames))
    here, there = socket.socketpair()
    guest = PlainGuest(SMALL)
    guest.memory(0)[:] = 1
    guest.resume()
    there.sendall(raw)
    there.shutdown(socket.SHUT_WR)
    with Channel(here, timeout=3) as channel, there:
        attempt = Precopy(guest, channel, Settings(verify=False))
        with suppress(StreamError):
            attempt.run()
    # By chance it may have said all that a receiver says.
    assert guest.running is (attempt.report.status != "completed" and not attempt.report.handover_unknown)
    assert attempt.report.error.isprintable()
    guest.close()
