"""Saved dirty state against a Python set: whatever is marked is taken once, by the first range that holds it."""

from collections.abc import Callable
from itertools import combinations_with_replacement, product
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwdbm.bitmap import DirtyBitmap
from hwdbm.errors import BitmapError, InvariantError
from hwdbm.stage2.saved import Saved

NPAGES = 201
BORDERS = (0, 1, 64, 128, 201)
RANGES = list(combinations_with_replacement(BORDERS, 2))

Pages = set[int]
Range = tuple[int, int]


def spans(*ranges: Range) -> np.ndarray:
    return np.array(ranges, dtype=np.int64).reshape(-1, 2)


def pages_of(bitmap: DirtyBitmap) -> Pages:
    return set(np.flatnonzero(np.unpackbits(bitmap.words.view(np.uint8), bitorder="little")).tolist())


def mark(saved: Saved, ranges: np.ndarray) -> None:
    """Set the pages of each row [start, stop) of `ranges`, empty ones among them."""
    for lo, hi in ranges.tolist():
        saved.widen(lo, max(lo, hi))
        saved.bitmap.set_range(lo, max(0, hi - lo))


def check_take(saved: Saved, model: Pages, lo: int, hi: int) -> None:
    """Check that taking [lo, hi) moves what `model` has of it, and adds it to what the sinks held."""
    sinks = DirtyBitmap.from_pages([3], NPAGES), DirtyBitmap.from_pages([200], NPAGES)
    moved = model & set(range(lo, hi))
    assert saved.take(lo, hi, *sinks) == len({page // 64 for page in moved})
    model -= moved
    assert [pages_of(sink) for sink in sinks] == [moved | {3}, moved | {200}]
    check_state(saved, model)


def check_state(saved: Saved, model: Pages) -> None:
    saved.verify()
    assert pages_of(saved.bitmap) == model
    assert saved or not model, "a harvest would pass over what is saved"


def check_two_takes(make: Callable[[int], Saved]) -> None:
    """Check a range marked, then two ranges taken, then the rest."""
    for marked, first, second in product(RANGES, RANGES, RANGES[::4]):
        saved, model = make(NPAGES), set(range(*marked))
        mark(saved, spans(marked))
        check_state(saved, model)
        check_take(saved, model, *first)
        check_take(saved, model, *second)
        check_take(saved, model, 0, NPAGES)
        assert not saved, "what is empty costs a harvest nothing"


def check_marks_add_up(make: Callable[[int], Saved]) -> None:
    """Check that a second mark adds to the first, and that one after a take does too."""
    for first, second in product(RANGES, repeat=2):
        saved, model = make(NPAGES), set(range(*first)) | set(range(*second))
        mark(saved, spans(first))
        mark(saved, spans(second))
        check_take(saved, model, 64, 130)
        mark(saved, spans((70, 71)))
        check_take(saved, model | {70}, 0, NPAGES)


def check_drop(make: Callable[[int], Saved]) -> None:
    """Check that dropping forgets the mask's pages and no others, in a part of the slot as well."""
    for marked, first in product(RANGES, (0, 64, 128)):
        saved, model = make(NPAGES), set(range(*marked))
        mark(saved, spans(marked))
        mask = DirtyBitmap.from_pages([0, 5, 63, 64, 72], min(130, NPAGES - first))
        saved.drop(mask, first)
        check_state(saved, model - {first + page for page in pages_of(mask)})


CHECKS = [check_two_takes, check_marks_add_up, check_drop]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_small_domain(check: Callable[[Callable[[int], Saved]], None], kernels: ModuleType) -> None:
    check(Saved)


def test_many_spans_at_once(kernels: ModuleType) -> None:
    saved = Saved(NPAGES)
    mark(saved, spans((5, 5), (7, 9), (60, 130), (150, 140), (199, 201)))
    check_take(saved, {7, 8, *range(60, 130), 199, 200}, 0, NPAGES)
    mark(saved, spans())
    mark(saved, spans((5, 5)))
    assert not saved


def test_pages_set_by_a_kernel_are_taken_once_they_are_noted() -> None:
    saved = Saved(NPAGES)
    saved.bitmap.set_range(70, 3)
    with pytest.raises(InvariantError, match=r"saved pages \[70, 3\] aren't in 0\.\.-1"):
        saved.verify()
    saved.widen(64, 128)
    check_take(saved, {70, 71, 72}, 71, 100)
    check_take(saved, {70}, 0, NPAGES)


def test_verify_sees_the_tail() -> None:
    saved = Saved(NPAGES)
    saved.bitmap.words[-1] = 1 << 63
    with pytest.raises(BitmapError, match="beyond page 201"):
        saved.verify()


borders = st.tuples(st.integers(0, NPAGES), st.integers(0, NPAGES)).map(sorted).map(tuple)
steps = st.lists(
    st.tuples(st.just("mark"), borders)
    | st.tuples(st.just("take"), borders)
    | st.tuples(st.just("drop"), st.integers(0, (1 << NPAGES) - 1)),
    max_size=12,
)


@given(steps)
def test_any_sequence(kernels: ModuleType, steps: list[tuple[str, Any]]) -> None:
    saved, model = Saved(NPAGES), set()
    for verb, value in steps:
        if verb == "mark":
            mark(saved, spans(value))
            model |= set(range(*value))
        elif verb == "take":
            check_take(saved, model, *value)
        else:
            pages = {page for page in range(NPAGES) if value >> page & 1}
            saved.drop(DirtyBitmap.from_pages(pages, NPAGES))
            model -= pages
        check_state(saved, model)
    check_take(saved, model, 0, NPAGES)


# --- what the checks catch ----------------------------------------------------------------------------------


class Unnoted(Saved):
    def widen(self, lo: int, hi: int) -> None:
        if not self:
            super().widen(lo, hi)


class Forgetful(Saved):
    def take(self, lo: int, hi: int, *sinks: DirtyBitmap) -> int:
        moved = super().take(lo, hi, *sinks)
        self.span = max(self.span[0], hi), self.span[1]  # as if all below were taken too
        return moved


class Kept(Saved):
    def take(self, lo: int, hi: int, *sinks: DirtyBitmap) -> int:
        before = self.bitmap.copy()
        moved = super().take(lo, hi, *sinks)
        self.bitmap |= before
        return moved


class OneSink(Saved):
    def take(self, lo: int, hi: int, *sinks: DirtyBitmap) -> int:
        return super().take(lo, hi, *sinks[:1])


class DroppedFromZero(Saved):
    def drop(self, mask: DirtyBitmap, first: int = 0) -> None:
        super().drop(mask)


@pytest.mark.parametrize(
    ("check", "mutant"),
    [
        (check_marks_add_up, Unnoted),
        (check_two_takes, Forgetful),
        (check_two_takes, Kept),
        (check_two_takes, OneSink),
        (check_drop, DroppedFromZero),
    ],
    ids=lambda value: value.__name__,
)
def test_check_catches(check: Callable[[Callable[[int], Saved]], None], mutant: type[Saved]) -> None:
    with pytest.raises((AssertionError, InvariantError)):
        check(mutant)
