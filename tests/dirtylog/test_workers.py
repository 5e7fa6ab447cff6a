"""Steps in threads: what several workers do is what one does, and a step that fails gives everything back."""

import threading
from itertools import product

import numpy as np
import pytest
from logtools import make, pages_of, take

from hwdbm import DirtyBitmap, pte
from hwdbm.dirtylog.slot import in_threads

NPAGES = 200_000 + 513


def dirtied(workers, **kwargs):
    """A log of many pages and some blocks, of which a part is dirty."""
    log = make(NPAGES, base=0x211, flags=0, workers=workers, ipa_bits=48, **kwargs)
    for first in range(0x400, 0x211 + NPAGES - 4096, 4096):
        log.map(0, first, 512, first, level=2)
        log.map(0, first + 512, 3000, first)
    log.set_memory_region(0, 1, 0x211 << 12, NPAGES << 12, 0)
    rng, s2 = np.random.default_rng(1), log.stage2(0)
    for level in (2, 3):
        entries = s2.level(level)
        some = pte.writable_clean(level)(entries) & (rng.random(entries.size) < 0.1)
        entries[some] |= np.uint64(pte.S2AP_W)
    return log


STEPS, WORKERS = (None, 64 * 37, 1 << 17), (2, 3, 16)
EACH_ONCE = [*zip(WORKERS, STEPS, strict=True)]
OTHERS = [pair for pair in product(WORKERS, STEPS) if pair not in EACH_ONCE]


@pytest.mark.parametrize(
    ("workers", "step"), [*EACH_ONCE, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in OTHERS)]
)
@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.alike(2)
def test_several_do_what_one_does(kernels, workers, step, manual):
    one, several = dirtied(1, manual_protect=manual), dirtied(workers, manual_protect=manual, step_pages=step)
    for _ in range(2):
        want, got = take(one.lend(0)), take(several.lend(0))
        # A block that reaches into two steps may have been seen after one of them was done: its pages come next.
        assert got | several.stage2(0).saved.bitmap == want
        several.verify()
    assert several.take_host_dirty(0) == one.take_host_dirty(0)
    for level in (1, 2, 3):
        assert np.array_equal(several.stage2(0).level(level), one.stage2(0).level(level))


def test_they_are_threads():
    """Two are in the flush hook at once, or the barrier breaks."""
    barrier = threading.Barrier(2)
    log = dirtied(2)
    log._shared.flush = lambda *_: barrier.wait(30)
    log.get_dirty_log(0)
    log._shared.flush = None
    log.sync(0)
    log.clear_dirty_log(0, 0, NPAGES, ~DirtyBitmap(NPAGES))


@pytest.mark.parametrize("verb", ["get", "clear", "sync"])
def test_a_step_that_fails_gives_everything_back(verb):
    log, lock = dirtied(2, step_pages=1 << 14), threading.Lock()
    want, calls = log.stage2(0).dirty(), []
    log.mark_dirty(0, 0, NPAGES)

    def fails(*_):
        with lock:
            calls.append(1)
            if len(calls) > 3:
                raise ConnectionError

    log._shared.flush = fails
    with pytest.raises(ConnectionError):
        {
            "get": lambda: log.get_dirty_log(0),
            "clear": lambda: log.clear_dirty_log(0, 0, NPAGES, ~DirtyBitmap(NPAGES)),
            "sync": lambda: log.sync(0),
        }[verb]()
    log._shared.flush = None
    assert log.get_dirty_log(0).weight() == NPAGES
    assert want.issubset(log.take_host_dirty(0))
    log.verify()


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 63])
def test_each_part_is_worked_on_once(workers, count):
    done, lock = [], threading.Lock()

    def step(lo, hi):
        with lock:
            done.append((lo, hi))

    parts = [(each, each + 1) for each in range(count)]
    in_threads(parts, step, workers, lambda: pytest.fail("nothing failed"))
    assert sorted(done) == parts


def test_what_the_first_raised_is_raised_after_all_are_out():
    undone, inside = [], []

    def step(lo, hi):
        inside.append(1)
        try:
            if lo == 3:
                raise ZeroDivisionError
        finally:
            inside.pop()

    with pytest.raises(ZeroDivisionError):
        in_threads([(each, each + 1) for each in range(50)], step, 4, lambda: undone.append(len(inside)))
    assert undone == [0]


@pytest.mark.parametrize("workers", [0, -1, 1.0, "2", True, 1 << 20])
def test_a_number_of_workers(workers):
    with pytest.raises((ValueError, TypeError), match="workers"):
        make(64, workers=workers)


def test_one_page_needs_no_thread():
    log = make(1, workers=8)
    log.mark_dirty(0, 0)
    assert pages_of(log.get_dirty_log(0)) == [0]
