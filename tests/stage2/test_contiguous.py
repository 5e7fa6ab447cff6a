"""Contiguous runs as one leaf: every verb against the walker, and literals."""

from itertools import pairwise

import numpy as np
import pytest
from effort import EFFORT
from hypothesis import given, settings
from hypothesis import strategies as st

from hwdbm import DirtyBitmap, Granule, Stage2, pte, walker
from hwdbm.testing import bitmaps, differences, stage2s

CONT = np.uint64(pte.CONTIGUOUS)
DIRTY = np.uint64(pte.S2AP_W)
RANGE_VERBS = ("unmap", "split", "collapse", "wrprotect", "set_dbm", "clear_dbm", "mkold", "test_clear_young")
WHOLE_VERBS = ("dirty", "enable_dbm", "disable_dbm", "harvest")


def compare(s2, verb, *args):
    twin = s2.copy()
    assert twin.contiguous
    got, want = getattr(s2, verb)(*args), getattr(walker, verb)(twin, *args)
    assert got == want
    assert differences(s2, twin) == []
    s2.verify()
    return got


@st.composite
def runs(draw, granule=Granule.K4, most=1600):
    """Draw tables in any state, with fewer dirty leaves, so that a run is dirty for one of them."""
    s2 = draw(stage2s(granule, most))
    s2.contiguous = True
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    for level in (1, 2, 3):
        entries = s2.level(level)
        clean = pte.dirty(level)(entries) & (rng.random(entries.size) < draw(st.sampled_from([0, 0.9])))
        entries[clean] &= ~DIRTY
    return s2


@pytest.mark.parametrize("verb", [*RANGE_VERBS, *WHOLE_VERBS, "clean", "enable_dbm in a mask", "parts"])
def test_verb_equals_the_walkers(kernels, verb):
    @settings(max_examples=10 * EFFORT)
    @given(runs(), st.data())
    def check(s2, data):
        if verb in WHOLE_VERBS:
            compare(s2, verb)
        elif verb == "clean":
            compare(s2, "clean", data.draw(bitmaps(s2.npages)))
            compare(s2, "harvest")
        elif verb == "enable_dbm in a mask":
            compare(s2, "enable_dbm", data.draw(bitmaps(s2.npages)))
        elif verb == "parts":
            cuts = [0, *sorted(data.draw(st.lists(st.integers(0, s2.npages), max_size=3))), s2.npages]
            whole, parts = s2.copy().harvest(), DirtyBitmap(s2.npages)
            for first, stop in pairwise(cuts):
                parts |= compare(s2, "harvest", None, first, stop - first)
            parts |= s2.harvest()  # what a part kept for one before it
            assert parts == whole
            assert not s2.harvest().any()
        else:
            first = data.draw(st.integers(0, s2.npages))
            compare(s2, verb, s2.base_gfn + first, data.draw(st.integers(0, s2.npages - first)))

    check()


@pytest.mark.parametrize("granule", [Granule.K16, Granule.K64], ids=str)
@pytest.mark.parametrize("verb", ["harvest", "dirty", "unmap"])
def test_other_granules(granule, verb):
    @settings(max_examples=3 * EFFORT)
    @given(runs(granule, 9000), st.integers(0, 9000))
    def check(s2, first):
        first = min(first, s2.npages)
        compare(s2, verb, *([s2.base_gfn + first, s2.npages - first] if verb == "unmap" else []))

    check()


def slot(level=3, **options):
    size = Granule.K4.pages_per_entry(level)
    s2 = Stage2(64 * size, contiguous=True, **options)
    s2.map(0, 64 * size, pfn=0, level=level, dbm=True)
    s2.level(level)[16:48] |= CONT
    return s2, size


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("level", [2, 3])
def test_a_write_marks_any_one_of_a_run(level, shared):
    s2, size = slot(level, shared=shared)
    s2.level(level)[20] |= DIRTY
    s2.level(level)[5] |= DIRTY
    wide = [[5 * size, size], [16 * size, 16 * size]]
    assert s2.dirty().ranges().tolist() == wide
    out = DirtyBitmap(s2.npages)
    s2.peek_into(out)
    assert out.ranges().tolist() == wide
    assert s2.harvest().ranges().tolist() == wide
    assert s2.host_dirty.ranges().tolist() == wide
    assert not s2.harvest().any()


@pytest.mark.parametrize("level", [2, 3])
def test_a_part_of_a_run(level):
    """A harvest of a part reports its pages of the run, and keeps the others: the run is clean as a whole."""
    s2, size = slot(level)
    s2.level(level)[20] |= DIRTY
    out = DirtyBitmap(s2.npages)
    assert s2.peek_into(out, 24 * size, size).changed == 0
    assert out.ranges().tolist() == [[24 * size, size]]
    assert s2.harvest(None, 24 * size, size).ranges().tolist() == [[24 * size, size]]
    assert not pte.dirty(level)(s2.level(level)).any()
    assert s2.harvest().ranges().tolist() == [[16 * size, 8 * size], [25 * size, 7 * size]]


def test_clean_of_a_page_cleans_its_run():
    s2, _ = slot()
    s2.level(3)[[20, 33]] |= DIRTY
    assert s2.clean(DirtyBitmap.from_pages([17], 64)) == 1
    assert s2.harvest().ranges().tolist() == [[16, 1], [18, 30]]


def test_a_replacement_takes_the_run_apart():
    s2, _ = slot()
    s2.level(3)[20] |= DIRTY
    s2.unmap(30, 1)
    assert (s2.level(3) & CONT != 0).nonzero()[0].tolist() == list(range(32, 48))
    assert s2.harvest().ranges().tolist() == [[16, 16]]
    s2.level(3)[20] |= DIRTY
    assert s2.harvest().ranges().tolist() == [[20, 1]]


@pytest.mark.parametrize("verb", ["track_part", "wrprotect_part"])
def test_a_part_takes_apart_the_runs_that_it_touches_and_no_others(verb):
    """A part that doesn't begin with the slot: what a run recorded by one leaf is saved for all of its pages."""
    s2 = Stage2(192, contiguous=True)
    s2.map(0, 192, pfn=0, dbm=True)
    for start in (16, 80, 144):
        s2.level(3)[start : start + 16] |= np.uint64(pte.CONTIGUOUS)
    s2.level(3)[84] |= np.uint64(pte.S2AP_W)
    out = DirtyBitmap(192)
    getattr(s2, verb)(DirtyBitmap.from_pages([21], 64), first=64, out=out)
    kept = np.flatnonzero(s2.level(3) & np.uint64(pte.CONTIGUOUS))
    assert kept.tolist() == [*range(16, 32), *range(144, 160)]
    assert (s2.dirty() | s2.host_dirty | out).pages().tolist() == list(range(80, 96))
