"""Leaves: the flat arrays of one memslot's descriptors by level, and passes over them.

Nothing here knows what a dirty bit is for: `hwdbm.Stage2` puts the consumers and the verbs on top.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hwdbm import kernels, pte
from hwdbm.bitmap import DirtyBitmap
from hwdbm.errors import InvariantError
from hwdbm.granule import LEAF_LEVELS
from hwdbm.kernels import Tally
from hwdbm.layout import Layout, any_in, pieces, runs_of

__all__ = ["LeafAt", "Leaves"]

Array = NDArray[np.uint64]
Index = NDArray[np.intp]
Spans = NDArray[np.int64]
ByLevel = Callable[[int], pte.Update]

_ALL = (1 << 64) - 1
_BRIDGE = 2  # stripes
_CHUNK = 1 << 17  # descriptors built or compared together in split and collapse: 1 MiB


@dataclass(frozen=True, slots=True, eq=False)
class LeafAt:
    """The leaves of some pages.

    Parameters
    ----------
    level : (n,) uint8 array
        1 to 3; 0 where there is none.
    index : (n,) int64 array
        The leaf's entry of its level; where there is none, the level-3 entry.
    desc : (n,) uint64 array
        The descriptors, each read once; where there is none, the level-3 entry.
    """

    level: NDArray[np.uint8]
    index: Spans
    desc: Array


class Leaves:
    """Descriptor arrays of levels 1 to 3 over a layout.

    Parameters
    ----------
    layout : Layout
        The slot's shape.

    Attributes
    ----------
    level : dict of int to (n,) uint64 array
        The entries by level, all zero at first.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        # np.zeros leaves the memory to be backed when it is first written: what was never mapped costs nothing.
        self.level = {level: np.zeros(layout.count(level), dtype=np.uint64) for level in LEAF_LEVELS}

    # --- passes --------------------------------------------------------------------------------------------

    def scan(self, match: Callable[[int], pte.Match], lo: int, hi: int, out: DirtyBitmap) -> int:
        """Set in `out` the bits of the pages of [lo, hi) whose leaf matches; return how many entries were read.

        The range is of whole words, or ends with the slot.
        """
        read = 0
        for level in (1, 2):
            tally, spans = self.rewrite_blocks(level, pte.Update(match(level)), lo, hi)
            kernels.active().fill(out.words, np.clip(spans, lo, hi))
            read += tally.read
        runs = self.table_runs(lo, hi)
        kernels.active().scan(self.level[3], runs, match(3), out.words)
        return read + int((runs[:, 1] - runs[:, 0]).sum())

    def rewrite(self, update: ByLevel, lo: int, hi: int, out: DirtyBitmap, also: DirtyBitmap) -> Tally:
        """Apply `update` to the leaves of pages [lo, hi), setting their bits in `out` and `also`.

        A block that is only partly in the range is changed too; the bits are the range's.
        """
        tally = Tally()
        for level in (1, 2):
            counts, spans = self.rewrite_blocks(level, update(level), lo, hi)
            tally += counts
            spans = np.clip(spans, lo, hi)
            kernels.active().fill(out.words, spans)
            kernels.active().fill(also.words, spans)
        return tally + self.rewrite_pages(update(3), lo, hi, out, also)

    def rewrite_blocks(
        self, level: int, update: pte.Update, lo: int, hi: int, mask: DirtyBitmap | None = None
    ) -> tuple[Tally, Spans]:
        """Apply `update` to the entries of `level` that touch [lo, hi), and a page of `mask`, whose bit 0 is `lo`.

        Returns
        -------
        tally : Tally
            Entries read and changed.
        spans : (n, 2) int64 array
            The runs of pages [start, stop) of those that were changed, as they are: maybe beyond the range and the
            slot.
        """
        where = self.layout.entries(level, lo, hi)
        entries = self.level[level][where]
        if mask is None:
            runs = kernels.active().rewrite_runs(entries, update)
        else:
            index = np.flatnonzero(update.where(entries))
            spans = np.clip(self.layout.spans(level, where.start + index), lo, hi)
            index = index[any_in(mask.words, spans - lo)] if index.size else index
            entries[index] = update(entries[index])
            runs = np.stack([index, index + 1], axis=1)
        tally = Tally(entries.size, int((runs[:, 1] - runs[:, 0]).sum()))
        return tally, self.layout.bounds(level, where.start + runs)

    def rewrite_pages(self, update: pte.Update, lo: int, hi: int, out: DirtyBitmap, also: DirtyBitmap) -> Tally:
        """Apply `update` to the level-3 entries of [lo, hi), setting their bits in `out` and `also`."""
        tally, kernel = Tally(), kernels.active()
        for start, stop, part in pieces(lo, hi, self.layout.npages):
            if part is None:
                runs = self.table_runs(start, stop)
                tally += kernel.rewrite(self.level[3], runs, update, out.words, also.words)
            else:
                word = slice(start >> 6, (start >> 6) + 1)
                entries, run = self.level[3][start:stop], np.array([[0, stop - start]])
                within = np.array([part], dtype=np.uint64)
                tally += kernel.rewrite_within(entries, run, update, within, out.words[word], also.words[word])
        return tally

    def rewrite_masked(self, update: pte.Update, mask: DirtyBitmap, out: DirtyBitmap, first: int = 0) -> Tally:
        """Apply `update` to the level-3 entries of the pages in `mask`, setting their bits in `out`.

        Bit 0 of the mask is page `first`, a multiple of 64; it covers whole words, or ends with the slot.
        """
        lo, hi = first, first + mask.npages
        runs, words = self.table_runs(lo, hi) - lo, out.words[lo >> 6 : (hi + 63) >> 6]
        return kernels.active().rewrite_within(self.level[3][lo:hi], runs, update, mask.words, words, words)

    def table_runs(self, lo: int, hi: int) -> Spans:
        """Return the runs of pages of [lo, hi) under level-2 tables, widened to whole words inside of it."""
        where = self.layout.entries(2, lo, hi)
        entries = self.level[2][where]
        if entries.size and int(np.bitwise_and.reduce(entries)) & pte.TABLE == pte.TABLE:  # most often: tables alone
            return np.array([[lo, hi]], dtype=np.int64)
        runs = kernels.active().rewrite_runs(entries, pte.Update(pte.table(2)))
        if len(runs) > 1:  # a short gap costs less to read, all zeros, than the memory's next stride costs to begin
            apart = runs[1:, 0] - runs[:-1, 1] > _BRIDGE
            runs = np.stack([runs[np.append(True, apart), 0], runs[np.append(apart, True), 1]], axis=1)
        pages = np.clip(self.layout.bounds(2, where.start + runs), lo, hi)
        pages[:, 0] &= ~63
        pages[:, 1] = pages[:, 1] + 63 & ~63
        widened: Spans = np.clip(pages, lo, hi)
        return widened

    def leaf_at(self, pages: Spans) -> LeafAt:
        """Return the leaf that maps each of `pages`."""
        desc = self.level[3][pages]
        level, index = np.where(pte.leaf(3)(desc), np.uint8(3), np.uint8(0)), pages.copy()
        for above in (2, 1):
            (rest,) = (level == 0).nonzero()
            if not rest.size:
                break
            entry = self.layout.index(above, pages[rest])
            found = self.level[above][entry]
            leaf = pte.leaf(above)(found)
            rest = rest[leaf]
            level[rest], index[rest], desc[rest] = above, entry[leaf], found[leaf]
        return LeafAt(level, index, desc)

    # --- structure -----------------------------------------------------------------------------------------

    def put(self, level: int, lo: int, hi: int, leaves: Array) -> None:
        """Write `leaves` over [lo, hi), which holds none, with tables above them."""
        for above in range(1, level):
            entries = self.level[above][self.layout.entries(above, lo, hi)]
            entries[entries == 0] = pte.TABLE
        self.level[level][self.layout.entries(level, lo, hi)] = leaves

    def remove(self, lo: int, hi: int) -> None:
        """Zero the leaves of [lo, hi), and the tables of which no page of the slot is left; no block may straddle."""
        where = self.layout.entries(2, lo, hi)
        tables = where.start + runs_of(pte.table(2)(self.level[2][where]))
        for start, stop in self.layout.bounds(2, tables).tolist():
            self.level[3][max(start, lo) : min(stop, hi)] = 0  # and no entry that nothing backs yet
        for level in (2, 1):
            touched = self.layout.entries(level, lo, hi)
            begins = max(self.layout.span(level, touched.start)[0], 0) >= lo
            ends = min(self.layout.span(level, touched.stop - 1)[1], self.layout.npages) <= hi
            first, stop = touched.start + (not begins), touched.stop - (not ends)
            self.level[level][first : max(first, stop)] = 0

    def blocks(self, level: int, lo: int, hi: int) -> Index:
        """Return the entries of `level` that touch [lo, hi) and are blocks."""
        where = self.layout.entries(level, lo, hi)
        index: Index = where.start + np.flatnonzero(pte.leaf(level)(self.level[level][where]))
        return index

    def straddles(self, level: int, page: int) -> bool:
        """Return whether a block of `level` maps both `page` and the page of the slot before it."""
        if not 0 < page < self.layout.npages:
            return False
        index = self.layout.index(level, page)
        return self.layout.span(level, index)[0] < page and pte.leaf(level)(int(self.level[level][index]))

    def split(self, level: int, index: Index) -> None:
        """Replace the clean blocks `index` of `level` by tables of leaves of the next level."""
        granule, children = self.layout.granule, self.level[level + 1]
        drop = pte.TABLE | pte.CONTIGUOUS | ((1 << granule.shift(level)) - granule.page_size) & pte.ADDRESS
        kind = np.uint64(pte.leaf(level + 1).value)
        number = np.arange(granule.entries, dtype=np.int64)
        address = number.astype(np.uint64) << np.uint64(granule.shift(level + 1))
        step = max(1, _CHUNK // granule.entries)
        for chunk in (index[i : i + step] for i in range(0, index.size, step)):
            parent = self.level[level][chunk] & np.uint64(~drop & _ALL) | kind
            where = self.layout.first_child(level, chunk)[:, None] + number
            inside = (where >= 0) & (where < children.size)  # a block at the slot's edge may reach beyond it
            children[where[inside]] = (parent[:, None] | address)[inside]
        self.level[level][index] = pte.TABLE

    def collapsible(self, level: int, lo: int, hi: int) -> Index:
        """Return the tables of `level`, wholly in [lo, hi), whose leaves make up a block."""
        whole = self.layout.whole(level, lo, hi)
        index = whole.start + np.flatnonzero(pte.table(level)(self.level[level][whole]))
        step = max(1, _CHUNK // self.layout.granule.entries)
        chunks = (index[i : i + step] for i in range(0, index.size, step))
        return np.concatenate([index[:0], *(chunk[self._alike(level, chunk)] for chunk in chunks)])

    def _alike(self, level: int, index: Index) -> NDArray[np.bool_]:
        """Return for each table whether its leaves differ in nothing but AF, dirty, contiguous, and their place."""
        granule, below = self.layout.granule, level + 1
        leaves = self.level[below][self._rows(level, index)]
        leaves = pte.clean(below)(leaves & np.uint64(~(pte.AF | pte.CONTIGUOUS) & _ALL))
        first, child_size = leaves[:, 0], 1 << granule.shift(below)
        place = np.arange(granule.entries, dtype=np.uint64) * np.uint64(child_size)
        unaligned = first & np.uint64((1 << granule.shift(level)) - child_size & pte.ADDRESS)
        same: NDArray[np.bool_] = (leaves == first[:, None] | place).all(axis=1) & (unaligned == 0)
        return same & pte.leaf(below)(first)

    def collapse(self, level: int, index: Index) -> None:
        """Replace the tables `index`, collapsible and with no dirty leaf, by blocks."""
        step = max(1, _CHUNK // self.layout.granule.entries)
        for chunk in (index[i : i + step] for i in range(0, index.size, step)):
            rows = self._rows(level, chunk)
            leaves = self.level[level + 1][rows]
            young = np.bitwise_or.reduce(leaves, axis=1) & np.uint64(pte.AF)
            first = leaves[:, 0] & np.uint64(~(pte.TABLE | pte.CONTIGUOUS) & _ALL)
            self.level[level][chunk] = first | np.uint64(pte.leaf(level).value) | young
            self.level[level + 1][rows] = 0

    def _rows(self, level: int, index: Index) -> Index:
        """Return as rows the entries of the next level under each of `index`, all inside of the slot."""
        return self.layout.first_child(level, index)[:, None] + np.arange(self.layout.granule.entries)

    # --- checking ------------------------------------------------------------------------------------------

    def verify(self) -> None:
        """Raise `InvariantError` if a leaf isn't at exactly one level, or an encoding is reserved."""
        for level in (1, 2):
            entries, below = self.level[level], self.level[level + 1]
            if level not in self.layout.granule.block_levels(large=True):
                for index in np.flatnonzero(pte.leaf(level)(entries)).tolist():
                    self._broken(level, index, "the granule has no blocks at this level")
            for lo, hi in runs_of(~pte.table(level)(entries)).tolist():
                first = max(0, self.layout.first_child(level, lo))
                (wrong,) = below[first : self.layout.first_child(level, hi)].nonzero()
                if wrong.size:
                    self._broken(level + 1, first + int(wrong[0]), f"not zero, and not under a level-{level} table")
        for start in range(0, self.level[3].size, _CHUNK):
            entries = self.level[3][start : start + _CHUNK]
            (wrong,) = (entries & np.uint64(pte.TABLE) == 1).nonzero()
            if wrong.size:
                self._broken(3, start + int(wrong[0]), "the reserved encoding")

    def _broken(self, level: int, index: int, why: str) -> None:
        gfn = self.layout.base_gfn + max(self.layout.span(level, index)[0], 0)
        raise InvariantError(f"gfn {gfn:#x}: {pte.describe(int(self.level[level][index]), level)}: {why}")
