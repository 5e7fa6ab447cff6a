"""What steps in while a verb works: hardware between any two descriptors, and signal handlers that raise."""

import contextlib
import signal
import time

import numpy as np
import pytest
from effort import EFFORT
from hypothesis import given, settings
from hypothesis import strategies as st
from steppedkernel import SteppedKernel

from hwdbm import DirtyBitmap, Stage2, pte
from hwdbm.leaves import Leaves
from hwdbm.testing import differences, stage2s

VERBS = {
    "map": lambda s: s.map(s.base_gfn, s.npages, pfn=0),
    "map blocks": lambda s: map_blocks(s),  # noqa: PLW0108 - it is defined below
    "unmap": lambda s: s.unmap(s.base_gfn + s.npages // 3, s.npages // 3),
    "unmap all": lambda s: s.unmap(s.base_gfn, s.npages),
    "split": lambda s: s.split(s.base_gfn, s.npages),
    "collapse": lambda s: s.collapse(s.base_gfn, s.npages),
    "wrprotect": lambda s: s.wrprotect(),
    "wrprotect a part": lambda s: s.wrprotect(s.base_gfn + s.npages // 2, s.npages // 4),
    "set_dbm": lambda s: s.set_dbm(),
    "clear_dbm": lambda s: s.clear_dbm(),
    "enable_dbm": lambda s: s.enable_dbm(),
    "disable_dbm": lambda s: s.disable_dbm(),
    "mkold": lambda s: s.mkold(),
    "mkyoung": lambda s: s.mkyoung(),
    "test_clear_young": lambda s: s.test_clear_young(),
    "map_at": lambda s: s.map_at(np.arange(0, s.npages, 3), np.arange(0, s.npages, 3)),
    "take_host_dirty": lambda s: s.take_host_dirty(),
    "dirty": lambda s: s.dirty(),
}
HARVESTS = {
    "harvest": lambda s, out: out.__ior__(s.harvest()),
    "harvest into": lambda s, out: s.harvest(out),
    "harvest of parts": lambda s, out: [s.harvest(out, a, min(100, s.npages - a)) for a in range(0, s.npages, 100)],
    "peek": lambda s, out: s.peek_into(out),
    "take_saved": lambda s, out: s.take_saved_into(out),
}  # fmt: skip
MASKED = {
    "clean": lambda s, mask: s.clean(mask),
    "track_part": lambda s, mask: s.track_part(mask),
    "wrprotect_part": lambda s, mask: s.wrprotect_part(mask),
}
RETURNS = {"harvest": Stage2.harvest, "take_host_dirty": Stage2.take_host_dirty}  # bits leave with their result


def map_blocks(s2):
    first = -s2.base_gfn % 512
    if s2.npages - first >= 512:
        s2.map(s2.base_gfn + first, (s2.npages - first) // 512 * 512, pfn=0, level=2)


def calls():
    """Yield each verb with its kind."""
    for name, call in VERBS.items():
        yield name, lambda s, out, mask, call=call: call(s)
    for name, call in HARVESTS.items():
        yield name, lambda s, out, mask, call=call: call(s, out)
    for name, call in MASKED.items():
        yield name, lambda s, out, mask, call=call: call(s, mask)


CALLS = dict(calls())


class Hardware:
    """Sets dirty bits of what is writable-clean, as the MMU does, and keeps what was written."""

    def __init__(self, s2, seed):
        self.s2, self.rng, self.busy = s2, np.random.default_rng(seed), False
        self.written = DirtyBitmap(s2.npages)

    def __call__(self):
        if self.rng.random() < 0.9 or self.busy:
            return
        page = int(self.rng.integers(self.s2.npages))
        found = self.s2._leaves.leaf_at(np.array([page]))
        level, index = int(found.level[0]), int(found.index[0])
        if level and pte.tracked(level)(int(found.desc[0])):
            entries = self.s2.level(level)
            entries[index] |= np.uint64(pte.S2AP_W)
            self.written.set_range(page, 1)


@pytest.mark.parametrize("name", CALLS)
def test_what_hardware_sets_between_two_descriptors_is_kept(name):
    @settings(max_examples=25 * EFFORT)
    @given(s2=stage2s(most=1300), seed=st.integers(0, 999))
    def check(s2, seed):
        check_verb(s2, name, seed)

    check()


def check_verb(s2, name, seed):
    hardware = Hardware(s2, seed)
    s2._leaves._kernels = SteppedKernel(hardware)
    before, out = s2.dirty(), DirtyBitmap(s2.npages)
    host = s2.host_dirty.copy()
    mask = DirtyBitmap.from_pages(np.flatnonzero(hardware.rng.random(s2.npages) < 0.3), s2.npages)
    CALLS[name](s2, out, mask)
    hardware.busy = True  # what it does from here on is for the next verb
    s2.verify()
    wrote = before | hardware.written
    if name in MASKED:
        out |= mask
    if name == "take_saved":
        wrote = before
    lost = wrote - (out | s2.dirty())
    assert not lost.any(), f"lost {lost.ranges().tolist()[:3]}"
    told = s2.host_dirty | s2.dirty() | s2.writable() | host
    missed = hardware.written - told
    assert name == "take_host_dirty" or not missed.any(), f"the host doesn't know of {missed.ranges().tolist()[:3]}"


@pytest.mark.parametrize("name", ["unmap", "wrprotect", "collapse", "clear_dbm", "disable_dbm"])
def test_a_save_before_the_replacement_is_caught(name, monkeypatch):
    """Saved on replace, in two passes: what was saved is what was read before."""
    swap, update = Leaves._swap, Leaves.update

    def saved_first(self, record, lo, hi):
        update(self, pte.clean, lo, hi, record)
        return type(record)(record.out, record.also, record.kept, None, None)

    def two_passes(self, rule, lo, hi, record):
        return update(self, rule, lo, hi, saved_first(self, record, lo, hi))

    def swapped(self, level, index, values, record):
        swap(self, level, index, values, saved_first(self, record, 0, self.layout.npages))

    def pages(self, rule, lo, hi, record, inner=Leaves.update_pages):
        return inner(self, rule, lo, hi, saved_first(self, record, lo, hi) if rule.clears == (1 << 64) - 1 else record)

    monkeypatch.setattr(Leaves, "_swap", swapped)
    monkeypatch.setattr(Leaves, "update", two_passes)
    monkeypatch.setattr(Leaves, "update_pages", pages)

    def hunt():
        for seed in range(60):
            s2 = Stage2(600, base_gfn=500)
            s2.map(500, 600, pfn=500, dbm=True)
            check_verb(s2, name, seed)

    with pytest.raises(AssertionError, match=r"lost|know"):
        hunt()


# --- signals ------------------------------------------------------------------------------------------------


class InterruptedHereError(Exception):
    """What the handler raises."""


@contextlib.contextmanager
def interrupted(delay, stack):
    """Raise once, after `delay` seconds, wherever the main thread is then: the code that runs is put into `stack`."""

    def handler(number, frame):
        while frame:
            stack.append(frame.f_code)
            frame = frame.f_back
        raise InterruptedHereError

    old = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, delay)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def a_slot(rng):
    """Return a slot with pages and blocks, dirty here and there, and something saved already."""
    s2 = Stage2(4 * 512 + 100, base_gfn=512 - 40)
    s2.map(s2.base_gfn, s2.npages, pfn=s2.base_gfn, dbm=True)
    s2.map(1024, 1024, pfn=1024, level=2, dbm=True)
    s2.level(2)[[2, 3]] |= np.uint64(pte.S2AP_W)
    s2.level(3)[rng.integers(0, 500, 60)] |= np.uint64(pte.S2AP_W)
    s2.level(3)[-90:-20] |= np.uint64(pte.S2AP_W)
    s2.unmap(s2.base_gfn + s2.npages - 60, 10)
    return s2


@pytest.mark.parametrize("name", CALLS)
def test_a_signal_handler_that_raises_loses_nothing(kernels, name):
    rng = np.random.default_rng(len(name))
    s2, struck, rounds = a_slot(rng), 0, 0
    CALLS[name](s2, DirtyBitmap(s2.npages), DirtyBitmap(s2.npages))
    start = time.perf_counter()
    CALLS[name](a_slot(rng), DirtyBitmap(s2.npages), DirtyBitmap(s2.npages))
    takes = time.perf_counter() - start
    while rounds < 40 * EFFORT or (not struck and rounds < 4000):  # a short verb is seldom struck
        rounds += 1
        s2 = a_slot(rng)
        before, out, host = s2.dirty(), DirtyBitmap(s2.npages), s2.host_dirty.copy()
        mask = DirtyBitmap.from_pages(np.flatnonzero(rng.random(s2.npages) < 0.3), s2.npages)
        taken, stack = [False], []
        with contextlib.suppress(InterruptedHereError), interrupted(max(1e-6, rng.random() * takes), stack):
            CALLS[name](s2, out, mask)
            taken[0] = True
        # What a verb returned is its caller's, to keep or to lose.
        returned = name in RETURNS and not taken[0] and RETURNS[name].__code__ not in stack
        struck += not taken[0] and not returned
        if name in MASKED:
            out |= mask
        lost = before - (out | s2.dirty())
        assert returned or not lost.any(), f"lost {lost.ranges().tolist()[:3]}"
        if not (name == "take_host_dirty" and (taken[0] or returned)):
            missed = (host | before) - (s2.host_dirty | s2.dirty())
            assert not missed.any(), f"the host doesn't know of {missed.ranges().tolist()[:3]}"
        assert not s2._lock.locked()
        s2.verify()
        s2.harvest()
    assert struck


def test_equal_to_the_walkers_in_steps():
    """The stepped kernel, where nothing steps in, does what the others do."""

    @settings(max_examples=20)
    @given(s2=stage2s(most=900), name=st.sampled_from(list(CALLS)))
    def check(s2, name):
        twin = s2.copy()
        twin._leaves._kernels = SteppedKernel(lambda: None)
        mask = DirtyBitmap.from_pages(np.arange(0, s2.npages, 7), s2.npages)
        outs = DirtyBitmap(s2.npages), DirtyBitmap(s2.npages)
        CALLS[name](s2, outs[0], mask)
        CALLS[name](twin, outs[1], mask)
        assert outs[0] == outs[1]
        assert differences(s2, twin) == []

    check()
