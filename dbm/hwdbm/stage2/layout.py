"""The layout of a memslot's levels: which entry maps which pages of the slot.

Pages are counted from the slot's first, as a bitmap's bits are. An entry is aligned in the guest's address space and
not in the slot's, so where the base isn't aligned the first entry of a level begins before page 0.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from hwdbm.check import array, instance, integer
from hwdbm.errors import GfnError
from hwdbm.granule import Granule

Ranges = NDArray[np.int64]

_LEVELS = frozenset(range(4))


@dataclass(frozen=True, slots=True)
class Layout:
    """The shape of a memslot's leaf arrays.

    Parameters
    ----------
    npages : int
        Pages of one granule; 1 or more.
    base_gfn : int
        The guest frame of page 0, in granules.
    granule : Granule
        The size of a page.

    Examples
    --------
    >>> Layout(1000, 0x1F0, Granule.K4).count(2), Layout(1000, 0x1F0, Granule.K4).span(2, 0)
    (3, (-496, 16))
    """

    npages: int
    base_gfn: int
    granule: Granule
    sizes: tuple[int, int, int, int] = field(init=False, repr=False)
    """Pages under an entry of each level, from 0: every operation on a slot asks for them."""

    def __post_init__(self) -> None:
        instance(self.granule, Granule, "granule")
        for name in ("npages", "base_gfn"):
            object.__setattr__(self, name, integer(getattr(self, name), name, None))
        if self.npages < 1:
            raise GfnError(f"a slot has 1 page or more, not {self.npages}")
        object.__setattr__(self, "sizes", tuple(self.granule.pages_per_entry(level) for level in range(4)))
        top = 1 << (52 - self.granule.page_shift)
        if self.base_gfn < 0 or self.base_gfn + self.npages > top:
            raise GfnError(
                f"gfn {self.base_gfn:#x} and {self.npages} pages of {self.granule} don't fit into 52 address bits"
            )

    @overload
    def index(self, level: int, page: int) -> int: ...
    @overload
    def index(self, level: int, page: Ranges) -> Ranges: ...
    def index(self, level: int, page: int | Ranges) -> int | Ranges:
        """Return the entry of `level` that maps a page, or each page of an array."""
        size = self._size(level)
        if type(page) is not int:
            page = _pages(page, "page")
        return (self.base_gfn + page) // size - self.base_gfn // size

    def count(self, level: int) -> int:
        """Return the entries of `level`, parts of one at either end among them."""
        return self.index(level, self.npages - 1) + 1

    def entries(self, level: int, lo: int, hi: int) -> slice:
        """Return the entries of `level` that map any of the pages [lo, hi)."""
        size = self._size(level)
        if type(lo) is not int or type(hi) is not int:
            lo, hi = integer(lo, "lo", None), integer(hi, "hi", None)
        if lo >= hi:
            return slice(0, 0)
        base, before = self.base_gfn, self.base_gfn // size
        return slice((base + lo) // size - before, (base + hi - 1) // size + 1 - before)

    @overload
    def span(self, level: int, index: int) -> tuple[int, int]: ...
    @overload
    def span(self, level: int, index: Ranges) -> Ranges: ...
    def span(self, level: int, index: int | Ranges) -> tuple[int, int] | Ranges:
        """Return the pages [start, stop) of an entry, which may begin before the slot and end after it.

        For an array of entries they are the rows of an (n, 2) int64 array.
        """
        size = self._size(level)
        if type(index) is not int:
            index = _pages(index, "index")
        start = index * size - self.base_gfn % size
        if isinstance(start, np.ndarray):
            return np.stack([start, start + size], axis=1)
        return start, start + size

    def bounds(self, level: int, runs: Ranges) -> Ranges:
        """Return the pages [start, stop) of runs of entries, as `span` does of one."""
        size = self._size(level)
        array(runs, np.int64, "runs")
        found: Ranges = _pages(runs, "runs") * size - self.base_gfn % size
        return found

    def whole(self, level: int, lo: int, hi: int) -> slice:
        """Return the entries of `level` of which all pages are in [lo, hi)."""
        size, lo, hi = self._size(level), integer(lo, "lo", None), integer(hi, "hi", None)
        offset = self.base_gfn % size
        first, stop = -(-(lo + offset) // size), (hi + offset) // size
        return slice(first, max(first, stop))

    @overload
    def first_child(self, level: int, index: int) -> int: ...
    @overload
    def first_child(self, level: int, index: NDArray[np.intp]) -> NDArray[np.intp]: ...
    def first_child(self, level: int, index: int | NDArray[np.intp]) -> int | NDArray[np.intp]:
        """Return the first entry of ``level + 1`` under an entry; negative if it lies before the slot."""
        level, index = integer(level, "level", 0, 2), _pages(index, "index")
        size, child = self.sizes[level], self.sizes[level + 1]
        return (self.base_gfn // size + index) * self.granule.entries - self.base_gfn // child

    def _size(self, level: int) -> int:
        """Return the pages of an entry of a level."""
        if type(level) is not int or level not in _LEVELS:
            level = integer(level, "level", 0, 3)
        return self.sizes[level]


def _pages(value: Any, name: str) -> Any:
    """Return an integer as an `int`, or an array of int64 as it is."""
    if type(value) is int:
        return value
    if isinstance(value, np.ndarray) and value.ndim:
        array(value, np.int64, name)
        return value
    return integer(value, name, None)


def merged(ranges: Ranges) -> Ranges:
    """Return sorted `ranges` with those that touch joined.

    Examples
    --------
    >>> merged(np.array([[0, 4], [4, 8], [9, 10]])).tolist()
    [[0, 8], [9, 10]]
    """
    if not len(ranges):
        return ranges
    apart = ranges[1:, 0] != ranges[:-1, 1]
    starts, stops = ranges[np.append(True, apart), 0], ranges[np.append(apart, True), 1]
    return np.stack([starts, stops], axis=1)


def any_in(words: NDArray[np.uint64], ranges: Ranges) -> NDArray[np.bool_]:
    """Return for each row [start, stop) of `ranges`, none empty, whether any of its bits is set in `words`.

    Examples
    --------
    >>> any_in(np.array([0b100, 0], dtype=np.uint64), np.array([[0, 2], [2, 3], [3, 128]])).tolist()
    [False, True, False]
    """
    # No loop over words, and no array of bits: a row is the masked bits of its first and last word, and whole words
    # between. Whether some of those aren't zero is seen by two running counts, whatever the row's length.
    full = np.uint64((1 << 64) - 1)
    head, last = ranges[:, 0] >> 6, ranges[:, 1] - 1 >> 6
    head_mask = full << (ranges[:, 0] & 63).astype(np.uint64)
    last_mask = full >> (-ranges[:, 1] & 63).astype(np.uint64)
    # In one word both masks hold; in two, each holds for its own, and the words between are counted.
    inner, outer = np.where(head == last, last_mask, full), np.where(head == last, head_mask, full)
    ends = words[head] & head_mask & inner | words[last] & last_mask & outer
    upto, before = np.cumsum(words != 0), last - 1  # where the last word is word 0 too, a count is compared with itself
    found: NDArray[np.bool_] = (ends != 0) | (upto[before] > upto[np.minimum(head, before)])
    return found


def distinct(numbers: Ranges) -> Ranges:
    """Return numbers in order, each once: `np.unique`, which takes microseconds, where there is more than one."""
    return np.unique(numbers) if numbers.size > 1 else numbers


def runs_of(flags: NDArray[np.bool_]) -> Ranges:
    """Return the runs of true elements as rows [start, stop).

    Examples
    --------
    >>> runs_of(np.array([True, True, False, True])).tolist()
    [[0, 2], [3, 4]]
    """
    framed = np.zeros(flags.size + 2, dtype=np.bool_)
    framed[1:-1] = flags
    edges: Ranges = np.flatnonzero(framed[1:] != framed[:-1]).reshape(-1, 2)
    return edges


def pieces(lo: int, hi: int, npages: int) -> Iterator[tuple[int, int, int | None]]:
    """Cut the pages [lo, hi) where whole words begin and end.

    Yields
    ------
    start, stop : int
        Pages, `start` the first of a word; `stop` too, or the slot's end.
    mask : int or None
        The bits that are meant of a word; None for whole words.

    Examples
    --------
    >>> [(start, stop, mask) for start, stop, mask in pieces(1, 131, 200)]
    [(0, 64, 18446744073709551614), (64, 128, None), (128, 192, 7)]
    """
    if lo >= hi:
        return
    start, stop = lo + 63 & ~63, hi if hi == npages else hi & ~63
    if lo & 63:
        last = min(hi, start)
        mask = (1 << (last - (start - 64))) - (1 << (lo & 63))
        yield start - 64, min(start, npages), mask
    if start < stop:
        yield start, stop, None
    if start <= stop < hi:
        yield stop, min(stop + 64, npages), (1 << (hi - stop)) - 1
