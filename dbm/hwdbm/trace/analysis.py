"""What a trace says: numbers of pages by period, by page size, over time and over memory.

All is counted in words, a part of memory at a time through all intervals. What is held meanwhile is some 32 MiB of
words, a bitmap of the part for each doubling of the period, and a few numbers of each interval.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hwdbm import check
from hwdbm.bitmap import word_count
from hwdbm.memslot import Memslot
from hwdbm.trace.group import Words
from hwdbm.trace.metadata import SECOND

_PART = 1 << 17  # words of a part: those of a chunk, and whole pages of each size
_BAND = 1 << 22  # words that are looked at together: 32 MiB
_SHOWN = (4 << 10, 64 << 10, 2 << 20)
_WORKING = 1.0  # seconds of the windows of a working set, about
_SEVERAL = 4  # windows that show how it changes

Counts = NDArray[np.int64]


class Traced(Protocol):
    """What is analysed: a `Trace`, or arrays in its place."""

    page_size: int
    slots: tuple[Memslot, ...]
    times: Counts

    def words(self, lo: int, hi: int, first: int = 0, stop: int | None = None) -> Words:
        """Return the pages that were written in the intervals [lo, hi)."""

    def zeros(self, lo: int, hi: int, first: int = 0, stop: int | None = None) -> Words | None:
        """Return those of them that were zero."""

    @property
    def initial_zeros(self) -> Words | None:
        """The pages that were zero at the start."""


@dataclass(frozen=True, slots=True)
class Period:
    """How many pages were written in windows of so many intervals, which follow each other.

    Parameters
    ----------
    intervals : int
        Intervals of a window.
    seconds : float
        How long one takes, in the mean.
    pages : float
        Distinct pages that were written in one, in the mean.
    low, high : int
        The fewest and the most.
    windows : (n,) int64 array
        Those of each window; intervals at the end that fill none aren't in it.
    """

    intervals: int
    seconds: float
    pages: float
    low: int
    high: int
    windows: Counts

    @property
    def rate(self) -> float:
        """Distinct pages a second."""
        return self.pages / self.seconds


@dataclass(frozen=True, slots=True)
class Amount:
    """What sending all that was written in each interval would take, by pages of a size.

    Parameters
    ----------
    page_size : int
        Bytes of a page.
    pages : int
        Pages in all intervals together, each counted once in an interval.
    nbytes : int
        Bytes of them; the last page of a slot may be a part of one.
    """

    page_size: int
    pages: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Analysis:
    """What a trace says.

    Parameters
    ----------
    npages, page_size : int
        Pages of the guest, and bytes of one.
    seconds : float
        How long the trace is.
    pages : (intervals,) int64 array
        Distinct pages of each interval.
    touched : (intervals,) int64 array
        Distinct pages from the start to the end of each interval.
    periods : tuple of Period
        By 1, 2, 4, ... intervals.
    working : Period or None
        That whose windows take about a second, and are four or more: the working set over time. None if it is empty.
    amounts : tuple of Amount
        By pages of 4 KiB, 64 KiB and 2 MiB, as far as they aren't smaller than the guest's.
    map : (rows, cells) float64 array
        How much of each part of memory was written in an interval, in the mean over some intervals: 0 to 1.
    map_times : (rows + 1,) float64 array
        Seconds at which the rows of the map begin and end.
    zeros : int or None
        Pages of zeros among all that were written; None if nobody looked.
    initial_zeros : int or None
        Pages of zeros at the start; None if nobody looked.
    """

    npages: int
    page_size: int
    seconds: float
    pages: Counts
    touched: Counts
    periods: tuple[Period, ...]
    working: Period | None
    amounts: tuple[Amount, ...]
    map: NDArray[np.float64]
    map_times: NDArray[np.float64]
    zeros: int | None
    initial_zeros: int | None

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON has it: times in ms, sizes in bytes, rates a second."""
        intervals = int(self.pages.size)
        found: dict[str, Any] = {
            "page-size": self.page_size,
            "pages": self.npages,
            "intervals": intervals,
            "duration": round(self.seconds * 1e3, 3),
            "written": int(self.pages.sum()),
            "touched": int(self.touched[-1]) if intervals else 0,
            "periods": [
                {
                    "intervals": each.intervals,
                    "period": round(each.seconds * 1e3, 3),
                    "pages": round(each.pages, 3),
                    "low": each.low,
                    "high": each.high,
                    "rate": round(each.rate, 3),
                }
                for each in self.periods
            ],
            "page-sizes": [
                {
                    "page-size": each.page_size,
                    "pages": each.pages,
                    "bytes": each.nbytes,
                    "rate": round(each.nbytes / self.seconds, 3) if self.seconds else 0,
                }
                for each in self.amounts
            ],
            "map": {
                "times": [round(each * 1e3, 3) for each in self.map_times.tolist()],
                "cells": np.round(self.map, 6).tolist(),
            },
        }
        if self.working is not None:
            found["working-set"] = {
                "period": round(self.working.seconds * 1e3, 3),
                "pages": self.working.windows.tolist(),
            }
        if self.zeros is not None:
            found["zeros"] = self.zeros
        if self.initial_zeros is not None:
            found["initial-zeros"] = self.initial_zeros
        return found


def analyse(writes: Traced, *, rows: int = 64, cells: int = 64) -> Analysis:
    """Return what a trace says.

    Parameters
    ----------
    writes : Trace
        The trace, or what has its attributes.
    rows, cells : int
        Rows and columns of the map, at most: a row is some intervals, a cell some words of 64 pages.

    Returns
    -------
    Analysis
        Its numbers. A page that is written often in an interval is seen once: **the rate depends on the period**, and
        `Analysis.periods` says how.

    Raises
    ------
    OSError, TraceError
        If the trace can't be read.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from hwdbm.memslot import Memslot
    >>> from hwdbm.trace import Writer, analyse, open_trace
    >>> folder = tempfile.TemporaryDirectory()
    >>> with Writer(f"{folder.name}/trace", [Memslot(0, 0, 0, 64, 0)], 4096) as writer:
    ...     for i, word in enumerate((0b11, 0b10, 0b110, 0b1)):
    ...         writer.append((i + 1) * 10**8, np.array([word], dtype=np.uint64))
    >>> found = analyse(open_trace(f"{folder.name}/trace"))
    >>> [(period.intervals, period.pages) for period in found.periods]
    [(1, 1.5), (2, 2.5), (4, 3.0)]
    >>> found.touched.tolist(), [(each.page_size, each.pages) for each in found.amounts]
    ([2, 2, 3, 3], [(4096, 6), (65536, 4), (2097152, 4)])
    >>> folder.cleanup()
    """
    rows, cells = check.integer(rows, "rows", 1), check.integer(cells, "cells", 1)
    tally = _Tally(writes, rows, cells)
    for slot, start, lo, hi in _parts(writes.slots):
        tally.part(slot, start, lo, hi)
    return tally.result()


def _parts(slots: tuple[Memslot, ...]) -> Iterator[tuple[Memslot, int, int, int]]:
    """Yield each slot with its first word, and the words [lo, hi) of it, a part at a time."""
    start = 0
    for slot in slots:
        count = word_count(slot.npages)
        for lo in range(0, count, _PART):
            yield slot, start, lo, min(lo + _PART, count)
        start += count


class _Tally:
    """The numbers, while parts are added to them."""

    def __init__(self, writes: Traced, rows: int, cells: int) -> None:
        self._writes = writes
        self._times = writes.times
        count = self._count = int(self._times.size) - 1
        self._nwords = sum(word_count(slot.npages) for slot in writes.slots)
        self._windows = [np.zeros(count >> level, dtype=np.int64) for level in range(max(count, 1).bit_length())]
        self._touched = np.zeros(count, dtype=np.int64)
        page = writes.page_size
        self._factors = [size // page for size in _SHOWN if size >= page] or [1]
        self._coarse = np.zeros((len(self._factors), 2), dtype=np.int64)  # pages of the size, and the guest's in them
        self._zeros: int | None = None
        self._tall = -(-max(count, 1) // rows)  # intervals of a row
        self._wide = -(-self._nwords // cells)  # words of a cell
        self._map = np.zeros((-(-count // self._tall), -(-self._nwords // self._wide)), dtype=np.int64)
        self._room = np.zeros(self._map.shape[1], dtype=np.int64)  # pages of a cell

    def part(self, slot: Memslot, start: int, lo: int, hi: int) -> None:
        """Add the words [lo, hi) of a slot whose first is `start`."""
        # Pages that there are in each word, for the map.
        whole = np.minimum(slot.npages - np.arange(lo, hi, dtype=np.int64) * 64, 64)
        edges, where = self._cells_of(start + lo, start + hi)
        self._room[where] += np.add.reduceat(whole, edges)
        band = _floor_of_two(max(_BAND // (hi - lo), 1))
        seen = np.zeros(hi - lo, dtype=np.uint64)
        pending: list[Words | None] = [None] * len(self._windows)
        for first in range(0, self._count, band):
            last = min(first + band, self._count)
            words = self._writes.words(first, last, start + lo, start + hi)
            bits = np.bitwise_count(words)
            self._windows[0][first:last] += bits.sum(axis=1, dtype=np.int64)
            self._add_cells(bits, first, edges, where)
            self._add_coarse(words, bits, slot, lo, hi)
            zeros = self._writes.zeros(first, last, start + lo, start + hi)
            if zeros is not None:
                self._zeros = (self._zeros or 0) + int(np.bitwise_count(zeros).sum(dtype=np.int64))
            self._add_periods(words, first, band, pending)
            words[0] |= seen
            np.bitwise_or.accumulate(words, axis=0, out=words)
            self._touched[first:last] += np.bitwise_count(words).sum(axis=1, dtype=np.int64)
            seen = words[-1].copy()

    def _cells_of(self, lo: int, hi: int) -> tuple[NDArray[np.intp], slice]:
        """Return where the cells begin in words [lo, hi), counted from `lo`, and which cells these are."""
        first, last = lo // self._wide, (hi - 1) // self._wide
        edges = np.maximum(np.arange(first, last + 1) * self._wide - lo, 0)
        return edges, slice(first, last + 1)

    def _add_cells(self, bits: NDArray[np.uint8], first: int, edges: NDArray[np.intp], where: slice) -> None:
        sums = np.add.reduceat(bits, edges, axis=1, dtype=np.int64)
        rows = np.arange(first, first + len(bits)) // self._tall
        starts = np.flatnonzero(np.diff(rows, prepend=-1))
        self._map[rows[starts], where] += np.add.reduceat(sums, starts, axis=0)

    def _add_coarse(self, words: Words, bits: NDArray[np.uint8], slot: Memslot, lo: int, hi: int) -> None:
        for number, factor in enumerate(self._factors):
            pages, last = _coarse(words, bits, factor)
            # A slot's last page of this size may have less.
            missing = -slot.npages % factor if hi == word_count(slot.npages) else 0
            late = last(-(-(slot.npages - lo * 64) // factor) - 1) if missing else 0
            self._coarse[number] += (pages, pages * factor - late * missing)

    def _add_periods(self, words: Words, first: int, band: int, pending: list[Words | None]) -> None:
        level = 0
        while (1 << level) < band and len(words) > 1:
            level += 1
            words = words[0 : len(words) // 2 * 2 : 2] | words[1::2]
            at = first >> level
            self._windows[level][at : at + len(words)] += np.bitwise_count(words).sum(axis=1, dtype=np.int64)
        if (1 << level) < band:  # it isn't whole, and so the last
            return
        row = words[0]
        at = first >> level
        # As a counter carries: two windows of a length make one of twice that.
        while level + 1 < len(self._windows):
            kept = pending[level]
            if kept is None:
                pending[level] = row.copy()
                return
            pending[level] = None
            row = kept | row
            level, at = level + 1, at >> 1
            self._windows[level][at] += int(np.bitwise_count(row).sum(dtype=np.int64))

    def result(self) -> Analysis:
        """Return what was counted."""
        seconds = self._times / SECOND
        periods = []
        for level, windows in enumerate(self._windows):
            if windows.size:
                took = (seconds[windows.size << level] - seconds[0]) / windows.size
                low, high = int(windows.min()), int(windows.max())
                periods.append(Period(1 << level, float(took), float(windows.mean()), low, high, windows))
        several = [each for each in periods if each.windows.size >= _SEVERAL] or periods[:1]
        working = min(several, key=lambda each: abs(np.log(each.seconds / _WORKING)), default=None)
        tall = np.minimum(np.arange(len(self._map) + 1) * self._tall, self._count)
        room = np.diff(tall)[:, None] * self._room[None, :]
        initial, page = self._writes.initial_zeros, self._writes.page_size
        return Analysis(
            npages=sum(slot.npages for slot in self._writes.slots),
            page_size=page,
            seconds=float(seconds[-1]),
            pages=self._windows[0],
            touched=self._touched,
            periods=tuple(periods),
            working=working,
            amounts=tuple(
                Amount(factor * page, int(pages), int(parts) * page)
                for factor, (pages, parts) in zip(self._factors, self._coarse, strict=True)
            ),
            map=self._map / room,
            map_times=seconds[tall],
            zeros=self._zeros,
            initial_zeros=None if initial is None else int(np.bitwise_count(initial).sum(dtype=np.int64)),
        )


def _coarse(words: Words, bits: NDArray[np.uint8], factor: int) -> tuple[int, Callable[[int], int]]:
    """Return how many runs of `factor` pages have a bit, in all rows, and what says in how many rows the n-th has.

    `bits` are the bits of each word: those of 2, 4 or 8 words make one number, too, which is zero if they all are.
    """
    if factor == 1:
        return int(bits.sum(dtype=np.int64)), lambda _: 0  # no page is a part of one
    if factor >= 64:
        rest = -bits.shape[1] % (factor >> 6)
        lanes = (np.pad(bits, ((0, 0), (0, rest))) if rest else bits).view(f"u{factor >> 6}")
    elif factor >= 8:
        lanes = words.view(f"u{factor >> 3}")
    else:  # the lowest bit of each run says whether it has one
        low, shift = words.copy(), 1
        while shift < factor:
            low |= low >> np.uint64(shift)
            shift *= 2
        low &= np.uint64(sum(1 << at for at in range(0, 64, factor)))
        octets = low.view(np.uint8)

        def of_run(number: int) -> int:
            place, bit = divmod(number * factor, 8)
            return int(np.count_nonzero(octets[:, place] >> np.uint8(bit) & np.uint8(1)))

        return int(np.bitwise_count(low).sum(dtype=np.int64)), of_run
    return int(np.count_nonzero(lanes)), lambda number: int(np.count_nonzero(lanes[:, number]))


def _floor_of_two(number: int) -> int:
    return 1 << number.bit_length() - 1
