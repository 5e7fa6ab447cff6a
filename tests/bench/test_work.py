"""The benchmarks do the work that their rows name; how long it takes is no matter of a test."""

import hashlib
import inspect
import socket
import threading

import numpy as np
import pytest
from seen import as_seen

from hwdbm import kernels, pte
from hwdbm.bench import Setup, stream, suite
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
