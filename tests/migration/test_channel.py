"""A channel to the edges of its patience, to the last byte of what it sends, and to the last word of the other side."""

import socket
import threading
from contextlib import suppress

import pytest
from clocks import Clock
from streamtools import frame

from hwdbm.migration import Channel, PeerError, StreamError, channel
from hwdbm.migration.wire import ACK, Kind


@pytest.fixture
def pair():
    """Return a channel, and the socket at its other end."""
    here, there = socket.socketpair()
    with Channel(here, timeout=4.0) as made, there:
        yield made, there


@pytest.mark.parametrize(
    ("ago", "nbytes", "within", "ends", "said"),
    [
        (0.0, 1 << 20, 60.0, 4.0, "nothing came for 4.0 s"),
        (10.0, 20 << 10, 60.0, 4.0, "nothing came for 4.0 s"),  # 1 KiB a second came
        (10.0, 8 << 10, 60.0, 2.0, "nothing came for 2.0 s"),
        (10.0, 15 << 9, 60.0, 1.5, "7680 bytes of a frame took longer than 11.5 s"),
        (10.0, 7 << 10, 60.0, 1.0, "7168 bytes of a frame took longer than 11.0 s"),
        (0.0, 1 << 20, 3.0, 3.0, "the answer took longer than 3.0 s"),
    ],
)
def test_how_long_it_waits(pair, monkeypatch, ago, nbytes, within, ends, said):
    """A frame has its timeout, a second more for each KiB of it, and no more than what is done by it has in all."""
    waiter, _ = pair
    monkeypatch.setattr(channel, "time", clock := Clock())
    checked = []
    waiter.check = lambda: checked.append(clock.passed)

    def half_a_second() -> None:
        clock.sleep(0.5)
        raise TimeoutError

    now = clock.monotonic()
    with pytest.raises(StreamError, match=f"^{said}$"), waiter.within(within, "the answer"):
        waiter._patiently(half_a_second, now - ago, nbytes, "nothing came", now + 1.0)
    assert clock.passed == ends
    assert checked == [time for time in (1.5, 2.0, 2.5, 3.0, 3.5, 4.0) if time <= ends]


def test_a_side_that_is_busy_says_so_six_times_before_it_counts_as_gone(pair, monkeypatch):
    monkeypatch.setattr(channel, "time", clock := Clock())
    busy, _ = pair
    busy.timeout = 6.0
    busy.flush()
    for passed, signs in ((0.5, 0), (1.0, 0), (1.25, 1), (2.25, 1), (2.5, 2)):
        clock.passed = passed
        busy.keep_alive()
        assert busy.sent == signs * 32


def test_parts_go_in_their_order_however_few_bytes_the_socket_takes(pair):
    sender, there = pair
    sender.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # a few KiB is the least
    sizes = (3, 65_535, 65_536, 1, 90_000, 40_000)
    short, below, whole, *parts = (bytes([number]) * size for number, size in enumerate(sizes, 1))
    wanted = b""
    for number, body in enumerate((short, below, whole + b"".join(parts))):
        wanted += frame(Kind.STATE, number, body)
    got = bytearray()

    def take() -> None:
        while len(got) < len(wanted) and (some := there.recv(10_000)):
            got.extend(some)

    taker = threading.Thread(target=take)
    taker.start()
    sender.send(Kind.STATE, short, hold=True)
    sender.send(Kind.STATE, below, hold=True)
    sender.send(Kind.STATE, whole, [memoryview(part) for part in parts])
    taker.join(10)
    assert got == wanted
    assert sender.sent == len(wanted)


@pytest.mark.parametrize("before", [0, 1, 9])
def test_what_was_said_before_it_hung_up_is_heard(pair, before):
    sender, there = pair
    for number in range(before):
        there.sendall(frame(Kind.ACK, number, ACK.pack(number)))
    there.sendall(frame(Kind.ERROR, before, b"the disk is full"))
    there.close()
    with pytest.raises(PeerError, match=r"^the other side gave up: the disk is full$"):
        sender.send(Kind.STATE, bytes(100))
    with pytest.raises(StreamError, match=r"^the link broke before$"):
        sender.send(Kind.STATE, bytes(100))


def test_a_socket_is_set_up_for_large_frames_and_short_ones_at_once(pair):
    usual, other = socket.socketpair()
    with usual, other, socket.create_server(("127.0.0.1", 0)) as listener:
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            assert pair[0].sock.getsockopt(socket.SOL_SOCKET, option) > usual.getsockopt(socket.SOL_SOCKET, option)
        with Channel(socket.create_connection(listener.getsockname())) as tcp:
            assert tcp.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert tcp.sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert (pair[0].local, tcp.local) == (True, False)


def test_reasons_are_told_as_far_as_they_fit(pair):
    teller, there = pair
    there.settimeout(5)
    there.shutdown(socket.SHUT_WR)  # nothing more comes that would have to be taken
    teller.fail("why " * 2000)
    with Channel(there) as other, pytest.raises(PeerError) as heard:
        other.expect(Kind.READY)
    assert str(heard.value) == "the other side gave up: " + ("why " * 2000)[:4096]
    with suppress(OSError):
        teller.close()
