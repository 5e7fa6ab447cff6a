"""The benchmarks do the work that their rows name; how long it takes is no matter of a test."""

import hashlib
import inspect
import socket
import threading
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
from seen import as_seen

from hwdbm import kernels, pte
from hwdbm.bench import Row, Setup, smallest, stream, suite
from hwdbm.bitmap import DirtyBitmap
from hwdbm.stage2 import Stage2


@pytest.mark.parametrize("label", suite._DENSITIES)
def test_as_much_is_dirty_as_the_label_says(label):
    share, together = suite._DENSITIES[label]
    clean = suite.mapped((1 << 20) + 512).level(3)  # more than a chunk
    dirty = DirtyBitmap.from_pages(np.flatnonzero(suite.dirtied(clean, share, together) != clean), clean.size)
    assert label == "clean" or float(label.split()[0]) == pytest.approx(share * 100)
    assert dirty.weight() / clean.size == pytest.approx(share, rel=0.25, abs=1e-9)
    assert not (dirty.ranges() % together).any()
    assert together == (512 if "stripes" in label else 1)


@pytest.mark.parametrize("npages", [512, 512 * 64 * 3 + 511, 512 * 64 * 3 + 512])
def test_sparse_compares_as_many_stripes(npages, monkeypatch):
    found = {}

    def once(work, *_):
        for name, act in work.items():
            slots = inspect.getclosurevars(act).nonlocals
            found[name] = next(slot for slot in slots.values() if isinstance(slot, Stage2)).scan(pte.tracked).weight()
            act()
        return dict.fromkeys(work, 1.0)

    monkeypatch.setattr(suite, "smallest", once)
    (row,) = suite.sparse(Setup(npages, 1))
    assert row.ratio == 1.0
    assert found["sparse"] == found["full"] == 512 * -(-(npages - 511) // (512 * 64))


def held(act) -> dict[str, str]:
    """Return digests of the slots, bitmaps and arrays that a piece of work has, by its own names for them."""
    if not inspect.isfunction(act):
        owned = {"self": act.__self__}
    else:
        names = inspect.signature(act).parameters
        owned = {**inspect.getclosurevars(act).nonlocals, **{name: each.default for name, each in names.items()}}
    found = {}
    for name, value in sorted(owned.items()):
        parts = [value.level(level) for level in (1, 2, 3)] if isinstance(value, Stage2) else []
        parts += [each.words for each in (getattr(value, "host_dirty", value),) if isinstance(each, DirtyBitmap)]
        parts += [value] if isinstance(value, np.ndarray) else []
        if parts:
            found[name] = hashlib.sha256(b"".join(each.tobytes() for each in parts)).hexdigest()[:12]
    return found


OTHERS = {"stream", "unmapped", "workers", "clients"}  # they measure in other ways, or leave more than arrays behind


@pytest.mark.skipif("fused" not in kernels.available(), reason="what was looked at has both kernels")
@pytest.mark.parametrize("name", sorted({*suite.BENCHMARKS} - OTHERS))
def test_what_a_benchmark_times_was_looked_at(name, monkeypatch):
    """Each piece of work, what it works on before and after it, and what it is compared with."""
    lines = []

    def once(work, before=None, repeat=9, **how):
        for label, act in work.items():
            if label != "C loop":  # there is one where there is a compiler
                if before is not None:
                    before()
                lines.append(f"  {label}: {held(act)}")
                act()
                lines.append(f"    then {held(act)}")
        lines.append(f"  {repeat} times, {sorted(how)}")
        return {label: float(number) for number, label in enumerate(work, 1)}

    monkeypatch.setattr(suite, "smallest", once)
    rows = [row for row in suite.BENCHMARKS[name](Setup(3 << 12, 2)) if "C loop" not in row.what]
    lines += [f"{row.what} {row.cost} over {row.floor} {row.floor_cost}, limit {row.limit}" for row in rows]
    as_seen(f"bench/{name}.txt", "\n".join(lines) + "\n")


def test_memory_to_migrate_is_random_and_has_no_zeros(monkeypatch):
    monkeypatch.setattr(stream, "_STEP", 1000)
    guest = stream._Scattered(stream.StreamSetup(memory=1 << 20, fraction=0.25))
    words = guest.memory(0).view(np.uint64)
    assert words.all()
    assert np.unique(words).size == words.size == 1 << 17
    assert guest.pages.weight() == 64


@pytest.mark.parametrize("transport", ["unix", "tcp"])
@pytest.mark.alike(2)
def test_scattered_pages_are_sent(transport):
    setup = stream.StreamSetup(memory=1 << 20, fraction=0.25, passes=3, rounds=1, transport=transport)
    guest = stream._Scattered(setup)
    with stream._receiver(setup) as channel:
        for _ in range(2):
            report = stream._migrate(channel, guest, setup)
            assert [one.dirty for one in report.passes if one.dirty] == [256, 64, 64, 64]
        channel.sock.sendall(stream._COMMAND.pack(b"Q", 0))
    assert [row.ratio > 0 for row in stream.rows(setup)] == [True, True]


@pytest.mark.parametrize("orders", [[b"Q"], [b"F", b"Q"], []])
def test_the_receiver_ends_when_it_is_told_to_or_alone(orders):
    here, there = socket.socketpair()
    receiver = threading.Thread(target=stream.serve, args=(there.detach(), 4096), daemon=True)
    receiver.start()
    with here:
        here.settimeout(10)
        for order in orders:
            here.sendall(stream._COMMAND.pack(order, 5 if order == b"F" else 0))
            if order == b"F":
                assert here.recv(1) == b"r"
                here.sendall(b"12345")
                assert here.recv(1) == b"k"
        if not orders:
            here.shutdown(socket.SHUT_WR)
        receiver.join(10)
        assert not receiver.is_alive()


# --- how it is measured ------------------------------------------------------------------------------------


def test_the_smallest_time_of_each_counts_and_the_first_is_a_warm_up():
    """All in turn, each after what comes before it, which isn't timed."""
    now, calls = [0.0], []
    times = {"a": [0.5, 4.0, 2.0, 3.0], "b": [9.0, 6.0, 7.0, 8.0]}

    def work(name):
        calls.append(name)
        now[0] += times[name][calls.count(name) - 1]

    def before():
        calls.append("before")
        now[0] += 100.0

    how = {name: lambda name=name: work(name) for name in times}
    assert smallest(how, before, 3, clock=lambda: now[0]) == {"a": 2.0, "b": 6.0}
    assert calls == 4 * ["before", "a", "before", "b"]
    calls.clear()
    assert smallest(how, repeat=1, clock=lambda: now[0]) == {"a": 4.0, "b": 6.0}
    assert calls == 2 * ["a", "b"]
    for wrong in (0, -1):
        with pytest.raises(ValueError, match="repeat"):
            smallest(how, repeat=wrong)


@pytest.mark.parametrize(("limit", "met"), [(None, None), (1.49, False), (1.5, True), (1.51, True)])
def test_a_limit_is_kept_up_to_itself(limit, met):
    row = Row("x", 3.0, "y", 2.0, limit)
    assert (row.ratio, row.met) == (1.5, met)


@pytest.mark.parametrize(
    ("rounds", "chosen"), [([(4, 1)], 0), ([(4, 1), (9, 3), (8, 4)], 1), ([(9, 3), (8, 4), (4, 1), (5, 5)], 0)]
)
def test_the_median_round_of_a_stream_counts(rounds, chosen, monkeypatch):
    """By its ratio, the first pass by itself; of scattered passes the fastest, beside as many floors."""
    floors, told = iter([time for _, floor in rounds for time in (10.0 * floor, floor)]), []
    ends = iter(rounds)

    def migrate(*_):
        time, _ = next(ends)
        times = (10.0 * time, time + 5.0, float(time), time + 7.0, 0.001)
        return SimpleNamespace(passes=[SimpleNamespace(time=each, dirty=at < 4) for at, each in enumerate(times)])

    def floor(_sock, _guest, size, repeat):
        told.append((size, repeat))
        return next(floors)

    sent = []
    monkeypatch.setattr(stream, "_migrate", migrate)
    monkeypatch.setattr(stream, "_floor", floor)
    channel = SimpleNamespace(sock=SimpleNamespace(sendall=sent.append))
    monkeypatch.setattr(stream, "_receiver", lambda _: nullcontext(channel))
    setup = stream.StreamSetup(memory=1 << 20, fraction=0.25, rounds=len(rounds), passes=3)
    first, scattered = stream.rows(setup)
    assert told == len(rounds) * [(1 << 20, 1), (1 << 18, 3)]
    assert sent == [stream._COMMAND.pack(b"Q", 0)]
    time, floor_ = rounds[chosen]
    assert (first.cost, first.floor_cost) == (10.0 * time, 10.0 * floor_)
    assert (scattered.cost, scattered.floor_cost, scattered.floor, scattered.limit) == (
        time,
        floor_,
        "plain sendall",
        1.25,
    )
    assert scattered.what == f"unix stream, scattered, {(1 << 18) / time / 1e9:.2f} GB/s"


@pytest.mark.parametrize(("npages", "memory"), [(512, 512 << 12), (1 << 17, 1 << 29), ((1 << 17) + 512, 1 << 29)])
def test_a_stream_is_measured_over_both_sockets(npages, memory, monkeypatch):
    asked = []
    monkeypatch.setattr(suite, "rows", lambda setup: asked.append(setup) or [setup.transport])
    assert list(suite.stream(Setup(npages, 7))) == ["unix", "tcp"]
    assert asked == [stream.StreamSetup(memory, rounds=7, transport=each) for each in ("unix", "tcp")]
    assert (asked[0].fraction, asked[0].passes) == (0.25, 3)


def test_the_fastest_of_plain_sends_is_the_floor(monkeypatch):
    """A byte says that the other side is ready, and another that all is there."""
    now, sizes, answers = [0.0], [], []

    class Socket:
        def gettimeout(self):
            return 7.0

        def settimeout(self, limit):
            answers.append(limit)

        def sendall(self, data):
            sizes.append(len(data))

        def recv(self, size):
            now[0] += [100.0, 5.0, 100.0, 3.0, 100.0, 4.0][len([each for each in answers if each == 1])]
            answers.append(size)

    monkeypatch.setattr(stream.time, "perf_counter", lambda: now[0])
    guest = SimpleNamespace(memory=lambda slot: np.zeros(5000, dtype=np.uint8) if slot == 0 else None)
    assert stream._floor(Socket(), guest, 4097, 3) == 3.0
    assert sizes == 3 * [stream._COMMAND.size, 4097]
    assert answers == [None, *6 * [1], 7.0]


@pytest.mark.parametrize("name", ["workers", "clients", "unmapped"])
def test_the_rows_of_what_is_measured_in_other_ways_were_looked_at(name, monkeypatch):
    """With times by the names of the work, and a process that says how much it has."""

    def once(work, before=None, repeat=9, **how):
        for act in work.values():
            if before is not None:
                before()
            act()
        asked.append(f"  {list(work)} {repeat} times, {sorted(how)}")
        return {label: float(number) for number, label in enumerate(work, 1)}

    @contextmanager
    def child(command, **_):
        asked.append(f"  {command[-1].splitlines()[1]}")
        yield SimpleNamespace(communicate=lambda: ("1234\n", None))

    asked = []
    monkeypatch.setattr(suite, "smallest", once)
    monkeypatch.setattr(suite, "child", child)
    rows = list(suite.BENCHMARKS[name](Setup(3 << 12, 2)))
    lines = [f"{row.what} {row.cost} over {row.floor} {row.floor_cost} {row.unit}, limit {row.limit}" for row in rows]
    as_seen(f"bench/{name}.txt", "\n".join([*asked, *lines]) + "\n")
