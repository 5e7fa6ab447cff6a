"""A dirty tracker of one's own, tested with `hwdbm.testing`: against the walker, on leaf arrays in any state.

Run it: python -m pytest -q docs/examples/test_tracker.py
"""

import numpy as np
import pytest
from hypothesis import given, settings

from hwdbm import DirtyBitmap, Stage2, pte, walker
from hwdbm.testing import stage2s

DBM, S2AP_W, VALID = np.uint64(pte.DBM), np.uint64(pte.S2AP_W), np.uint64(1)


def is_dirty(descriptors: np.ndarray, kind: int) -> np.ndarray:
    """Return which descriptors are dirty leaves: `kind` is bit 1, set in a page and clear in a block."""
    wanted = VALID | np.uint64(kind << 1) | DBM | S2AP_W
    return descriptors & (wanted | np.uint64(2)) == wanted


def pages_only(s2: Stage2) -> DirtyBitmap:
    """A tracker that was written in a hurry: it looks at level 3 alone."""
    found = DirtyBitmap(s2.npages)
    for page in np.flatnonzero(is_dirty(s2.level(3), kind=1)).tolist():
        found.set_range(page, 1)
    return found


def tracker(s2: Stage2) -> DirtyBitmap:
    """The same with blocks: a dirty one makes each of its pages that the slot has dirty."""
    found = pages_only(s2)
    for level in (1, 2):
        for index in np.flatnonzero(is_dirty(s2.level(level), kind=0)).tolist():
            start, stop = s2.layout.span(level, index)
            start, stop = max(start, 0), min(stop, s2.npages)
            found.set_range(start, stop - start)
    return found


@settings(max_examples=30, deadline=None)
@given(stage2s())
def test_the_tracker_finds_what_the_walker_finds(s2: Stage2) -> None:
    assert tracker(s2) == walker.dirty(s2)


def test_that_this_would_notice() -> None:
    """Over-marking is legal, under-marking never: the hurried one under-marks, and an example of it is found."""

    @settings(max_examples=200, deadline=None, database=None)
    @given(stage2s())
    def hurried(s2: Stage2) -> None:
        missed = walker.dirty(s2) - pages_only(s2)
        assert not missed.any(), f"pages {missed.ranges().tolist()} were missed"

    with pytest.raises(AssertionError, match="were missed"):
        hurried()
