"""Tlb: what one vCPU has cached of a memslot's leaves, and what a cached leaf allows (Arm ARM, D8.5).

A leaf is cached as what it lets a vCPU do without looking at memory again. One that let it write is not checked
again, whatever happened to the descriptor since (it was writable-dirty, or untracked); one that was writable-clean is
checked at a write (R_SGJBL); one that was read-only faults. Entries stay until they are flushed, or evicted.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from hwdbm.stage2 import Layout

Pages = NDArray[np.int64]
Kinds = NDArray[np.uint8]

NONE, READ_ONLY, CLEAN, WRITABLE = 0, 1, 2, 3

_SPARSE: Final = 256  # bytes that are read for a number at most; sorting it takes as long
_CHUNK: Final = 1 << 18  # bytes that are compared together: what comes of it stays in the cache
_TURNS: Final = 255  # what a byte can tell apart, besides 0


class Tlb:
    """The cached leaves of one memslot.

    Parameters
    ----------
    layout : Layout
        The slot's shape.
    capacity : int, optional
        Entries that `trim` leaves at most; it evicts at random. Unlimited by default.
    seed : int
        Seed for choosing which entries are evicted.

    Attributes
    ----------
    page : (npages,) uint8 array
        The cached state of each page's leaf: 0 nothing, 1 read-only, 2 writable-clean, 3 writable.
    stripe : (stripes,) uint8 array
        The same for blocks. A level-1 block is cached in pieces, as hardware may.
    distinct : Distinct
        A counter of pages for the walk.

    Examples
    --------
    >>> from hwdbm import Granule
    >>> tlb = Tlb(Layout(1024, 0, Granule.K4))
    >>> tlb.fill(np.array([3, 600]), np.array([CLEAN, WRITABLE], np.uint8), np.array([3, 2], np.uint8))
    >>> tlb.lookup(np.array([3, 4, 512])).tolist()
    [2, 0, 3]
    >>> tlb.flush(1023, 1)
    >>> len(tlb)
    1
    """

    writes: int = WRITABLE
    """The least kind that lets a write go on without a look at memory."""

    def __init__(self, layout: Layout, capacity: int | None = None, seed: int = 0) -> None:
        if capacity is not None and capacity < 1:
            raise ValueError(f"a TLB has 1 entry or more, not {capacity}")
        self._layout, self._capacity = layout, capacity
        self._rng = np.random.default_rng(seed)
        size = layout.sizes[2]
        self._bits, self._offset = size.bit_length() - 1, layout.base_gfn % size
        self.page = np.zeros(layout.npages, dtype=np.uint8)
        self.stripe = np.zeros(layout.count(2), dtype=np.uint8)
        self.distinct = Distinct(layout.npages)
        self._large = False  # whether a block may be cached: most lookups need not ask
        self._recent: list[NDArray[np.int64]] = []  # entries filled since the last trim; a block's after the pages'
        self._noted = 0  # how many they are

    def __len__(self) -> int:
        return int(np.count_nonzero(self.page) + np.count_nonzero(self.stripe))

    def _stripes(self, pages: Pages) -> Pages:
        return pages + self._offset >> self._bits

    def lookup(self, pages: Pages, out: Kinds | None = None) -> Kinds:
        """Return what is cached for each page. Where a page and its block both are, the more permissive one counts.

        Parameters
        ----------
        pages : (n,) int64 array
            The pages, all in the slot.
        out : (n,) uint8 array, optional
            The array to return; a new one by default.
        """
        kinds: Kinds = self.page.take(pages, out=out, mode="clip")
        if self._large:
            np.maximum(kinds, self.stripe.take(self._stripes(pages)), out=kinds)
        return kinds

    def fill(self, pages: Pages, kinds: Kinds, levels: Kinds) -> None:
        """Cache the leaf of each page: what it allows, and its level; one of each, of level 3, is for all."""
        large = levels < 3
        if not large.any():
            self.page[pages] = kinds[0] if kinds.size == 1 else kinds
            self._note(pages)
            return
        small = ~large
        self.page[pages[small]] = kinds[small]
        stripes = self._stripes(pages[large])
        self.stripe[stripes] = kinds[large]
        self._large = True
        self._note(pages[small])
        self._note(self._layout.npages + stripes)

    def drop(self, pages: Pages) -> None:
        """Forget what is cached for some pages, their blocks too."""
        self.page[pages] = NONE
        if self._large:
            self.stripe[self._stripes(pages)] = NONE

    def flush(self, first: int, npages: int) -> None:
        """Forget every entry that translates any of some pages."""
        if npages > 0:
            self.page[first : first + npages] = NONE
            if self._large:
                self.stripe[self._layout.entries(2, first, first + npages)] = NONE
                self._large = bool(self.stripe.any())

    def _note(self, entries: NDArray[np.int64]) -> None:
        if self._capacity is not None:
            self._recent.append(entries.copy())  # the caller may use the array again
            self._noted += entries.size

    def trim(self) -> None:
        """Forget entries at random until there are no more than the capacity."""
        if self._capacity is None or self._noted <= self._capacity:
            return
        entries, npages = np.unique(np.concatenate(self._recent)), self._layout.npages
        small, large = entries[entries < npages], entries[entries >= npages]
        entries = np.append(small[self.page[small] != NONE], large[self.stripe[large - npages] != NONE])
        kept = entries
        if entries.size > self._capacity:
            # A sixteenth more goes than must, so that the next access doesn't have to look at all of them again.
            self._rng.shuffle(entries)
            stay = self._capacity - self._capacity // 16
            gone, kept = entries[stay:], entries[:stay]
            self.page[gone[gone < npages]] = NONE
            self.stripe[gone[gone >= npages] - npages] = NONE
        self._recent, self._noted = [kept], kept.size


class Distinct:
    """Counts the distinct ones of numbers below a limit, in a byte for each.

    Parameters
    ----------
    limit : int
        Numbers are below it.

    Notes
    -----
    One thread at a time.

    Examples
    --------
    >>> distinct = Distinct(1000)
    >>> distinct.count(np.array([7, 999, 7])), distinct.count(np.array([7]))
    (2, 1)
    """

    def __init__(self, limit: int) -> None:
        self._seen = np.zeros(limit, dtype=np.uint8)  # the count at which each number was seen last
        self._turn = 0

    def count(self, numbers: NDArray[np.int64]) -> int:
        """Return how many numbers there are, however often each comes. Equal to ``len(set(numbers.tolist()))``."""
        if not numbers.size:
            return 0
        lo, hi = int(numbers.min()), int(numbers.max()) + 1
        if hi - lo > _SPARSE * numbers.size:
            return int(np.unique(numbers).size)
        if self._turn == _TURNS:
            self._seen.fill(0)
            self._turn = 0
        self._turn += 1
        self._seen[numbers] = self._turn
        parts = (self._seen[start : min(start + _CHUNK, hi)] for start in range(lo, hi, _CHUNK))
        return sum(int(np.count_nonzero(part == self._turn)) for part in parts)
