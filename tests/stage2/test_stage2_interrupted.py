"""What steps in while a verb works: hardware between any two descriptors, and signal handlers that raise."""

import contextlib
import dis
import functools
import gc
import inspect
import itertools
import signal
import sys
import time

import numpy as np
import pytest
from effort import EFFORT
from hypothesis import given, settings
from hypothesis import strategies as st
from steppedkernel import SteppedKernel

from hwdbm import DirtyBitmap, Stage2, pte
from hwdbm.stage2.leaves import Leaves
from hwdbm.stage2.saved import Saved
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
    "relax": lambda s: relax(s),  # noqa: PLW0108
    "relax_at": lambda s: s.relax_at(np.arange(0, s.npages, 5), dbm=True),
    "allow_at": lambda s: s.allow_at(np.arange(0, s.npages, 5), dbm=True),
    "mkyoung_at": lambda s: s.mkyoung_at(np.arange(0, s.npages, 5)),
    "mmu_update": lambda s: mmu_update(s),  # noqa: PLW0108
    "take_host_dirty": lambda s: s.take_host_dirty(),
    "dirty": lambda s: s.dirty(),
}
HARVESTS = {
    "harvest": lambda s, out: s.harvest(),
    "harvest into": lambda s, out: s.harvest(out),
    "harvest of parts": lambda s, out: [s.harvest(out, a, min(100, s.npages - a)) for a in range(0, s.npages, 100)],
    "harvest_into": lambda s, out: s.harvest_into(out),
    "peek": lambda s, out: s.peek_into(out),
    "take_saved": lambda s, out: s.take_saved_into(out),
}  # fmt: skip
MASKED = {
    "clean": lambda s, mask: s.clean(mask),
    "track_part": lambda s, mask: s.track_part(mask),
    "wrprotect_part": lambda s, mask: s.wrprotect_part(mask),
}


def map_blocks(s2):
    first = -s2.base_gfn % 512
    if s2.npages - first >= 512:
        s2.map(s2.base_gfn + first, (s2.npages - first) // 512 * 512, pfn=0, level=2)


def relax(s2):
    (pages,) = (s2.leaf_at(range(s2.npages)).level > 0).nonzero()
    for page in pages[:3].tolist():
        s2.relax(s2.base_gfn + page, dbm=True)


def mmu_update(s2):
    (index,) = pte.leaf(3)(s2.level(3)).nonzero()
    s2.mmu_update(3, index, np.full(index.size, pte.AF, np.uint64))


def calls():
    """Yield each verb with its kind."""
    for name, call in VERBS.items():
        yield name, lambda s, out, mask, call=call: call(s)
    for name, call in HARVESTS.items():
        yield name, lambda s, out, mask, call=call: call(s, out)
    for name, call in MASKED.items():
        yield name, lambda s, out, mask, call=call: call(s, mask)


CALLS = dict(calls())


# What changes no leaf, and what fills a Stage2 that is empty still.
NO_VERBS = {
    "block_spans",
    "copy",
    "leaf_at",
    "leaf_level",
    "level",
    "load",
    "mapped",
    "scan",
    "verify",
    "writable",
    "young",
}


def test_every_verb_is_stepped():
    verbs = {name for name, item in vars(Stage2).items() if inspect.isfunction(item) and not name.startswith("_")}
    stepped = {name for call in CALLS.values() for name in names_of(call)}
    assert verbs - NO_VERBS <= stepped


def names_of(call):
    """Return what a function takes from its arguments, and what those that it calls here do."""
    found, seen, waiting = set(), set(), [call]
    while waiting:
        here = waiting.pop()
        if here not in seen:
            seen.add(here)
            found |= set(here.__code__.co_names)
            helpers = (globals().get(name) for name in here.__code__.co_names)
            waiting += [each for each in (*helpers, *(here.__defaults__ or ())) if inspect.isfunction(each)]
    return found


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
@pytest.mark.alike(2)
def test_what_hardware_sets_between_two_descriptors_is_kept(name):
    @settings(max_examples=10 * EFFORT)
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
    got = CALLS[name](s2, out, mask)
    hardware.busy = True  # what it does from here on is for the next verb
    s2.verify()
    wrote = before if name == "take_saved" else before | hardware.written
    check_nothing_is_lost(s2, name, [got], wrote, host | hardware.written, out, mask)


def check_nothing_is_lost(s2, name, got, wrote, host, out, mask):
    """Check that the log and the host know of each write, wherever a verb, which returned `got` or raised, left it."""
    if name in MASKED:
        out |= mask
    if name == "harvest" and got:
        out |= got[0]
    lost = wrote - (out | s2.dirty())
    assert not lost.any(), f"lost {lost.ranges().tolist()[:3]}"
    told = s2.host_dirty | s2.dirty() | s2.writable()
    if name == "take_host_dirty" and got:
        told |= got[0]
    missed = host - told
    assert not missed.any(), f"the host doesn't know of {missed.ranges().tolist()[:3]}"


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
def interrupted(delay):
    """Raise once, after `delay` seconds, wherever the main thread is then."""

    def handler(number, frame):
        raise InterruptedHereError

    old = signal.signal(signal.SIGALRM, handler)
    gc.disable()  # what is raised in a callback of the collector's, such as Hypothesis', goes nowhere
    try:
        signal.setitimer(signal.ITIMER_REAL, delay)
        yield
    finally:
        try:
            signal.setitimer(signal.ITIMER_REAL, 0)
        finally:  # it came at the last moment, and doesn't come twice
            gc.enable()
            signal.signal(signal.SIGALRM, old)


class Strike:
    """Raises where CPython may run a signal handler: in the package, as a function begins, after a call, in a loop.

    At the `at`-th such place; with None it counts them.
    """

    def __init__(self, at=None):
        self.at, self.seen = at, 0

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self._frame)
        return self

    def __exit__(self, *_):
        sys.settrace(self.before)

    def _frame(self, frame, _event, _argument):
        if not frame.f_globals.get("__name__", "").startswith("hwdbm."):
            return None
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        places, last = places_of(frame.f_code), None

        def step(frame, event, _argument):
            nonlocal last
            if event == "opcode":
                if (last, frame.f_lasti) in places or last is None:
                    self.seen += 1
                    if self.seen == self.at:
                        raise InterruptedHereError
                last = frame.f_lasti
            return step

        return step


@functools.cache
def places_of(code):
    """Return the steps, from offset to offset, between which a handler may run.

    What it raises belongs to the instruction before, so where only that is in a ``try`` block there is no such place.
    """
    entries, found = dis.Bytecode(code).exception_entries, set()

    def handler(offset):
        return next((entry.target for entry in entries if entry.start <= offset < entry.end), None)

    instructions = list(dis.get_instructions(code))
    for one, after in itertools.pairwise(instructions):
        if one.opname.startswith("JUMP_BACKWARD") and handler(one.offset) == handler(one.argval):
            found.add((one.offset, one.argval))
        elif one.opname.startswith("CALL") and handler(one.offset) == handler(after.offset):
            found.add((one.offset, after.offset))
    return found


def a_slot(rng):
    """Return a slot with pages and blocks, dirty here and there, and something saved already."""
    s2 = Stage2(4 * 512 + 100, base_gfn=512 - 40)
    s2.map(s2.base_gfn, s2.npages, pfn=s2.base_gfn, dbm=True)
    s2.map(1024, 1024, pfn=1024, level=2, dbm=True)
    s2.level(2)[[2, 3]] |= np.uint64(pte.S2AP_W)
    s2.level(3)[rng.integers(0, 500, 60)] |= np.uint64(pte.S2AP_W)
    s2.level(3)[-90:-20] |= np.uint64(pte.S2AP_W)
    s2.unmap(s2.base_gfn + s2.npages - 60, 10)
    s2.host_dirty.set_range(440, 9)  # a consumer has had them, and the host has not
    return s2


def check_a_strike(rng, name, strike):
    """Check what a verb that is struck leaves behind; return whether it was."""
    s2 = a_slot(rng)
    before, out, host = s2.dirty(), DirtyBitmap(s2.npages), s2.host_dirty.copy()
    mask = DirtyBitmap.from_pages(np.flatnonzero(rng.random(s2.npages) < 0.3), s2.npages)
    got = []
    with contextlib.suppress(InterruptedHereError), strike:
        got.append(CALLS[name](s2, out, mask))  # one call of C: what was returned is kept
    check_nothing_is_lost(s2, name, got, before, host | before, out, mask)
    assert not s2._lock.locked()
    s2.verify()
    s2.harvest()
    return not got


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.alike(2)
def test_a_signal_handler_that_raises_loses_nothing(kernels, name):
    rng, takes = np.random.default_rng(len(name)), 0.0
    for _ in range(2):
        s2 = a_slot(rng)
        start = time.perf_counter()
        CALLS[name](s2, DirtyBitmap(s2.npages), DirtyBitmap(s2.npages))
        takes = time.perf_counter() - start
    struck = rounds = 0
    while rounds < 10 * EFFORT or (not struck and rounds < 4000):  # a short verb is seldom struck
        struck += check_a_strike(rng, name, interrupted(max(1e-6, rng.random() * takes)))
        rounds += 1
    assert struck


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.alike(2)
def test_an_exception_wherever_a_handler_may_run(kernels, name):
    rng, count = np.random.default_rng(len(name)), Strike()
    check_a_strike(rng, name, count)
    places = np.arange(1, count.seen + 1)
    for at in rng.permutation(places)[: 6 * EFFORT].tolist():
        assert check_a_strike(rng, name, Strike(at)) or at > count.seen * 0.8, "no longer the same way"


@pytest.mark.parametrize("verb", ["take", "drop"])
def test_saved_keeps_what_its_sinks_do_not_have(verb):
    def strike(at):
        saved, sinks = Saved(200), (DirtyBitmap(200), DirtyBitmap(200))
        saved.widen(10, 190)
        saved.bitmap.set_range(10, 180)
        before = saved.bitmap.copy()
        mask = DirtyBitmap(200)
        mask.set_range(5, 100)
        with contextlib.suppress(InterruptedHereError), Strike(at) as count:
            if verb == "take":
                saved.take(7, 150, *sinks)
            else:
                saved.drop(mask, 0, *sinks)
        saved.verify()
        for sink in sinks:
            assert before.issubset(sink | saved.bitmap)
        return count.seen

    for at in range(1, strike(None) + 1):
        strike(at)


def test_equal_to_the_walkers_in_steps():
    """The stepped kernel, where nothing steps in, does what the others do."""

    @settings(max_examples=10 * EFFORT)
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
