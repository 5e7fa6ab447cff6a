"""Leaves: the flat arrays of one memslot's descriptors by level, and the only writer of them.

Each descriptor is changed by one operation of a kernel, which decides on what it read once and sets the bits that what
was there asks for. Nothing here knows what a dirty bit is for: `hwdbm.Stage2` puts the consumers and the verbs on top.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from hwdbm import kernels, pte
from hwdbm.bitmap import DirtyBitmap
from hwdbm.check import instance, uint64s, zeros
from hwdbm.errors import InvariantError
from hwdbm.granule import LEAF_LEVELS
from hwdbm.kernels import Kernels, Notes, Place, Tally
from hwdbm.stage2.layout import Layout, any_in, distinct, runs_of

Array = NDArray[np.uint64]
Index = NDArray[np.int64]
Spans = NDArray[np.int64]
ByLevel = Callable[[int], pte.Update]
Asks = Callable[[int], pte.Match]

_ALL = (1 << 64) - 1
_BRIDGE = 2  # stripes
_CHUNK = 1 << 15  # descriptors built or compared together: 256 KiB
_LINE = 8  # descriptors in a line of the cache
_EMPTY = np.array([], dtype=np.uint64)
_NO_INDEX = np.array([], dtype=np.int64)
_NO_RUNS = _NO_INDEX.reshape(-1, 3)
_GONE = pte.Update(pte.ANY, clears=_ALL)


def _all_tables(entries: Array) -> bool:
    """Return whether entries are all tables, as most often they are: faster than to ask of each."""
    common = entries.item() if entries.size == 1 else int(np.bitwise_and.reduce(entries))
    return common & pte.TABLE == pte.TABLE


def _unbacked(level: int, count: int) -> Array:
    """Return entries that are all zero, the first at the start of a cache line: vectors across two lines are slower."""
    words = zeros(count + _LINE, f"level {level}")
    first = -words.ctypes.data // 8 % _LINE
    return words[first : first + count]


def every(_level: int) -> pte.Match:
    """Return the predicate that asks nothing."""
    return pte.ANY


@dataclass(slots=True)
class Record:
    """The bitmaps that a change of leaves sets bits in, and predicates on the old leaves that decide which.

    Parameters
    ----------
    out, also : DirtyBitmap
        Bitmaps of the slot's pages; only bits in the range of the call are set.
    kept : DirtyBitmap or None
        Where the other pages of a block go, if it counts for `out`.
    out_of, also_of : callable or None
        From a level to a predicate; None for no leaf.
    """

    out: DirtyBitmap
    also: DirtyBitmap
    kept: DirtyBitmap | None = None
    out_of: Asks | None = every
    also_of: Asks | None = every

    def notes(self, level: int) -> Notes:
        """Return what a kernel is to note of leaves of `level`."""
        out_of, also_of = self.out_of, self.also_of
        return Notes(None if out_of is None else out_of(level), None if also_of is None else also_of(level))


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
    mapped : int
        How many of the pages have a leaf.
    small : int
        How many have one at level 3.
    """

    level: NDArray[np.uint8]
    index: Index
    desc: Array
    mapped: int
    small: int


class Leaves:
    """Descriptor arrays of levels 1 to 3 over a layout.

    Parameters
    ----------
    layout : Layout
        The slot's shape.
    implementation : Kernels, optional
        The kernels for these arrays; by default the private ones that are in use when the first is called.
    arrays : mapping of int to (n,) uint64 array, optional
        The entries by level, where they lie already: in memory that others map too. By default new ones, all zero.

    Attributes
    ----------
    level : dict of int to (n,) uint64 array
        The entries by level.

    Raises
    ------
    TypeError, ValueError
        If an array isn't of the layout's entries, or can't be written.
    """

    def __init__(
        self, layout: Layout, implementation: Kernels | None = None, arrays: Mapping[int, Array] | None = None
    ) -> None:
        self.layout = layout
        if arrays is None:
            # They leave the memory to be backed when it is first written: what was never mapped costs nothing.
            self.level = {level: _unbacked(level, layout.count(level)) for level in LEAF_LEVELS}
        else:
            instance(arrays, Mapping, "arrays")
            if set(arrays) != set(LEAF_LEVELS):
                raise ValueError(f"arrays are of levels 1, 2 and 3, not of {list(arrays)}")
            self.level = {
                level: uint64s(arrays[level], f"the entries of level {level}", layout.count(level), writable=True)
                for level in LEAF_LEVELS
            }
        self._kernels = implementation

    @property
    def kernels(self) -> Kernels:
        """The kernels of these arrays."""
        if self._kernels is None:
            self._kernels = kernels.active()
        return self._kernels

    def copy(self) -> "Leaves":
        """Return leaves with the same entries, in memory of their own, under the same kernels."""
        twin = Leaves(self.layout, self.kernels)
        for level, entries in self.level.items():
            np.copyto(twin.level[level], entries)
        return twin

    # --- reading -------------------------------------------------------------------------------------------

    def scan(self, match: Asks, lo: int, hi: int, out: DirtyBitmap) -> int:
        """Set in `out` the bits of the pages of [lo, hi) whose leaf matches; return how many entries were read."""
        read = self.tables_alone(lo, hi)
        if read is None:
            read = self._scan_blocks(match, lo, hi, out)
        runs = self.table_runs(lo, hi)
        self.kernels.scan(self.level[3], runs, match(3), out.words)
        under: int = sum(stop - start for start, stop, _ in runs.tolist())
        return read + under

    def _scan_blocks(self, match: Asks, lo: int, hi: int, out: DirtyBitmap) -> int:
        read = 0
        for level in (1, 2):
            where = self.layout.entries(level, lo, hi)
            runs = self.kernels.find(self.level[level][where], match(level))
            if len(runs):
                self.kernels.fill(out.words, np.clip(self.layout.bounds(level, where.start + runs), lo, hi))
            read += where.stop - where.start
        return read

    def find(self, level: int, match: pte.Match, lo: int, hi: int) -> Index:
        """Return the entries of `level` that touch the pages [lo, hi) and match."""
        where = self.layout.entries(level, lo, hi)
        runs = self.kernels.find(self.level[level][where], match)
        if not len(runs):
            return _NO_INDEX
        if len(runs) == 1:
            ((start, stop),) = runs.tolist()
            return np.arange(where.start + start, where.start + stop, dtype=np.int64)
        first = int(runs[0, 0])
        found: Index = np.flatnonzero(match(self.level[level][where][first : int(runs[-1, 1])])) + (where.start + first)
        return found

    def leaf_at(self, pages: Index) -> LeafAt:
        """Return the leaf that maps each of `pages`."""
        desc = self.level[3][pages]
        leaf = pte.leaf(3)(desc)
        level = leaf.view(np.uint8) * np.uint8(3)
        small = int(np.count_nonzero(leaf))
        if small == pages.size:  # most often
            return LeafAt(level, pages, desc, small, small)
        index = pages.copy()
        for above in (2, 1):
            (rest,) = (level == 0).nonzero()
            if rest.size:
                entry = self.layout.index(above, pages[rest])
                found = self.level[above][entry]
                leaf = pte.leaf(above)(found)
                rest = rest[leaf]
                level[rest], index[rest], desc[rest] = above, entry[leaf], found[leaf]
        return LeafAt(level, index, desc, int(np.count_nonzero(level)), small)

    def extent(self, level: int, index: Index) -> Spans:
        """Return the pages of the slot that each of some leaves stands for, as rows [start, stop)."""
        return np.clip(self.layout.span(level, index), 0, self.layout.npages)

    def tables_alone(self, lo: int, hi: int) -> int | None:
        """Return how many entries above level 3 touch [lo, hi), or None if any is a block.

        While a slot logs, most often none is, and a short step has better things to do than to ask each entry twice.
        """
        read = 0
        for level in (1, 2):
            entries = self.level[level][self.layout.entries(level, lo, hi)]
            if not _all_tables(entries) and len(self.kernels.find(entries, pte.leaf(level))):
                return None
            read += entries.size
        return read

    def table_runs(self, lo: int, hi: int) -> Spans:
        """Return the runs of pages of [lo, hi) under level-2 tables, as rows (start, stop, start)."""
        # Only they are read: under anything but a table the level-3 entries are all zero, and perhaps nothing backs
        # them. For the same reason it does no harm to read some of those too, where that makes one run of two.
        where = self.layout.entries(2, lo, hi)
        entries = self.level[2][where]
        if entries.size and _all_tables(entries):
            return np.array([[lo, hi, lo]], dtype=np.int64)
        runs = self.kernels.find(entries, pte.table(2))
        if not len(runs):
            return _NO_RUNS
        if len(runs) > 1:  # a short gap costs less to read, all zeros, than the memory's next stride costs to begin
            apart = runs[1:, 0] - runs[:-1, 1] > _BRIDGE
            runs = np.stack([runs[np.append(True, apart), 0], runs[np.append(apart, True), 1]], axis=1)
        pages = np.clip(self.layout.bounds(2, where.start + runs), lo, hi)
        return np.concatenate([pages, pages[:, :1]], axis=1)

    # --- changing ------------------------------------------------------------------------------------------

    def update(self, rule: ByLevel, lo: int, hi: int, record: Record) -> Tally:
        """Apply `rule` to the leaves of the pages [lo, hi).

        A block that is only partly in the range is changed too; its bits are the range's, and its other pages' go to
        the record's `kept`.
        """
        tally = self.tables_alone(lo, hi)
        counts = self.update_blocks(rule, lo, hi, record) if tally is None else Tally(read=tally)
        return counts + self.update_pages(rule(3), lo, hi, record)

    def update_blocks(self, rule: ByLevel, lo: int, hi: int, record: Record, mask: DirtyBitmap | None = None) -> Tally:
        """Apply `rule` to the blocks that touch [lo, hi), and a page of `mask`, whose bit 0 is `lo`."""
        change = self.update_all if mask is None else partial(self.update_found, mask=mask)
        return sum((change(level, rule(level), lo, hi, record) for level in (1, 2)), Tally())

    def update_all(self, level: int, update: pte.Update, lo: int, hi: int, record: Record) -> Tally:
        """Apply `update` to the entries of `level` that touch [lo, hi)."""
        where = self.layout.entries(level, lo, hi)
        entries = self.level[level][where]
        if _all_tables(entries):
            return Tally(entries.size)
        place = self._place(level, lo, hi, where.start)
        return self.kernels.rewrite_all(entries, update, place, *self._words(record), record.notes(level))

    def update_found(
        self, level: int, update: pte.Update, lo: int, hi: int, record: Record, mask: DirtyBitmap | None = None
    ) -> Tally:
        """Do as `update_all`, with a mask as `update_blocks` has it, by the index of the entries."""
        where, index = self.layout.entries(level, lo, hi), self.find(level, update.where, lo, hi)
        if mask is not None and index.size:
            index = index[any_in(mask.words, np.clip(self.layout.span(level, index), lo, hi) - lo)]
        read, changed = where.stop - where.start, self.update_at(level, index, update, record, lo, hi)
        if not changed:
            return Tally(read)
        inside = np.clip(self.layout.span(level, index), lo, hi)
        return Tally(read, changed, int((inside[:, 1] - inside[:, 0] + 63 >> 6).sum()))

    def update_pages(self, update: pte.Update, lo: int, hi: int, record: Record) -> Tally:
        """Apply `update` to the level-3 entries of [lo, hi)."""
        runs = self.table_runs(lo, hi)
        if not len(runs):
            return Tally()
        return self.kernels.rewrite(self.level[3], runs, update, record.out.words, record.also.words, record.notes(3))

    def update_within(self, update: pte.Update, mask: DirtyBitmap, first: int, record: Record) -> Tally:
        """Apply `update` to the level-3 entries of the pages in `mask`; bit 0 is page `first`, a multiple of 64."""
        runs, words = self.table_runs(first, first + mask.npages), slice(first >> 6, None)
        if first:
            runs[:, 2] -= first
        return self.kernels.rewrite_within(
            self.level[3], runs, update, mask.words, record.out.words[words], record.also.words[words], record.notes(3)
        )

    def update_at(self, level: int, index: Index, update: pte.Update, record: Record, lo: int, hi: int) -> int:
        """Apply `update` to the entries `index` of `level`, each once; return how many it changed."""
        if not index.size:
            return 0
        if record.out_of is None and record.also_of is None:
            return self.kernels.change_at(self.level[level], index, update)
        return self.kernels.rewrite_at(
            self.level[level], index, update, self._place(level, lo, hi), *self._words(record), record.notes(level)
        )

    def exchange(self, level: int, index: Index, new: Array | int, record: Record) -> Array:
        """Put `new` in place of the entries `index` of `level`, each once, and return what was there."""
        values = np.empty(index.size, dtype=np.uint64)
        values[:] = new
        if index.size:
            self._swap(level, index, values, record)
        return values

    def load(self, level: int, first: Index, rows: Array) -> None:
        """Put rows of descriptors in place of the entries from each of `first` on, where there are such."""
        entries, width = self.level[level], rows.shape[1]
        whole = (first >= 0) & (first + width <= entries.size)
        if whole.any():
            # Tables are aligned: in the array all begin at the same offset from a multiple of their width.
            lead = int(first[whole][0]) % width
            target = entries[lead : lead + (entries.size - lead) // width * width].reshape(-1, width)
            where, source = (first[whole] - lead) // width, rows if whole.all() else rows[whole]
            if where[-1] - where[0] == where.size - 1:  # mostly they are one run
                target[where[0] : where[-1] + 1] = source
            else:
                target[where] = source
        for i in (~whole).nonzero()[0].tolist():
            start = int(first[i])
            lo, hi = max(start, 0), min(start + width, entries.size)
            entries[lo:hi] = rows[i, lo - start : hi - start]

    def take_apart(self, level: int, index: Index, record: Record) -> None:
        """Clear the contiguous bit of the leaves `index` of `level`, and clean those that are tracked."""
        # What loses the bit while it is dirty goes to the record as such: it stands for its whole run.
        run = pte.leaf(level).also(ones=pte.CONTIGUOUS)
        tracked = pte.Update(run.also(ones=pte.DBM), clears=pte.CONTIGUOUS | pte.S2AP_W)
        for update in tracked, pte.Update(run, clears=pte.CONTIGUOUS):
            self.update_at(level, index, update, record, 0, self.layout.npages)

    def set_bits(self, level: int, index: Index, bits: Array) -> None:
        """Set `bits` in the entries `index` of `level`, which may repeat."""
        self.kernels.set_at(self.level[level], index, bits)

    def _swap(self, level: int, index: Index, values: Array, record: Record) -> None:
        place = self._place(level, 0, self.layout.npages)
        self.kernels.exchange_at(self.level[level], index, values, place, *self._words(record), record.notes(level))

    def _place(self, level: int, lo: int, hi: int, first: int = 0) -> Place:
        """Return which pages the entries of `level` from `first` on stand for."""
        size = self.layout.sizes[level]
        return Place(first * size - self.layout.base_gfn % size, size, lo, hi, self.layout.npages)

    @staticmethod
    def _words(record: Record) -> tuple[Array, Array, Array]:
        return record.out.words, record.also.words, _EMPTY if record.kept is None else record.kept.words

    # --- structure -----------------------------------------------------------------------------------------

    def put(self, level: int, lo: int, hi: int, leaves: Callable[[int, int], Array], record: Record) -> None:
        """Put leaves in place of whatever maps [lo, hi), with tables above them. No block may straddle its ends.

        Parameters
        ----------
        leaves : callable
            From two numbers a and b to the a-th to b-th leaf.
        """
        # From the top down, and what is below before what is above it: at any moment a leaf is at one level. Between
        # the break and the make nothing is mapped, and the guest faults, as it does where a kernel does the same.
        for above in range(1, level):
            self.make_tables(above, lo, hi, record)
        for below in range(3, level, -1):
            self._clear(below, lo, hi, record)
        where = self.layout.entries(level, lo, hi)
        for start in range(where.start, where.stop, _CHUNK):
            stop = min(start + _CHUNK, where.stop)
            values = leaves(start - where.start, stop - where.start)
            if level == 3:
                runs = np.array([[start, stop, start]], dtype=np.int64)
                self.kernels.exchange(self.level[3], runs, values, record.out.words, record.also.words, record.notes(3))
            else:
                self._swap(level, np.arange(start, stop, dtype=np.int64), values, record)

    def put_at(self, level: int, index: Index, leaves: Array, record: Record) -> None:
        """Put leaves in place of the entries `index` of `level`, under which nothing is, with tables above them."""
        pages = self.layout.span(level, index)[:, 0]
        for above in range(1, level):
            entries = distinct(self.layout.index(above, pages))
            entries = entries[~pte.table(above)(self.level[above][entries])]
            self.exchange(above, entries, pte.TABLE, record)
        self.exchange(level, index, leaves, record)

    def make_tables(self, level: int, lo: int, hi: int, record: Record) -> None:
        """Make the entries of `level` that touch [lo, hi) tables: those wholly in the range empty ones."""
        where, whole = self.layout.entries(level, lo, hi), self._inside(level, lo, hi)
        index = np.arange(where.start, where.stop, dtype=np.int64)
        stays = pte.table(level)(self.level[level][where])
        stays[whole.start - where.start : whole.stop - where.start] = False
        self.exchange(level, index[~stays], pte.TABLE, record)

    def remove(self, lo: int, hi: int, record: Record) -> None:
        """Zero the leaves of [lo, hi), and the tables of which no page of the slot is left; no block may straddle."""
        for level in (3, 2, 1):
            self._clear(level, lo, hi, record)

    def _clear(self, level: int, lo: int, hi: int, record: Record) -> None:
        """Zero the entries of `level` of which all pages are in [lo, hi), or outside of the slot."""
        if level == 3:  # and no entry that nothing backs yet
            self.update_pages(_GONE, lo, hi, record)
            return
        whole = self._inside(level, lo, hi)
        index = whole.start + np.flatnonzero(self.level[level][whole])
        self.exchange(level, index, 0, record)

    def _inside(self, level: int, lo: int, hi: int) -> slice:
        """Return the entries of `level` of which all pages in the slot are in [lo, hi), and at least one is."""
        touched = self.layout.entries(level, lo, hi)
        begins = max(self.layout.span(level, touched.start)[0], 0) >= lo
        ends = min(self.layout.span(level, touched.stop - 1)[1], self.layout.npages) <= hi
        first, stop = touched.start + (not begins), touched.stop - (not ends)
        return slice(first, max(first, stop))

    def straddles(self, level: int, page: int) -> bool:
        """Return whether a block of `level` maps both `page` and the page of the slot before it."""
        if not 0 < page < self.layout.npages:
            return False
        index = self.layout.index(level, page)
        return self.layout.span(level, index)[0] < page and pte.leaf(level)(int(self.level[level][index]))

    def split(self, level: int, index: Index, record: Record) -> None:
        """Replace the blocks `index` of `level` by tables of leaves of the next level, which are clean."""
        for chunk in self._chunks(index):
            values = np.full(chunk.size, pte.TABLE, dtype=np.uint64)
            try:
                self._swap(level, chunk, values, record)
            finally:
                # An exception between the two must not leave the guest without its pages.
                done = pte.table(level)(self.level[level][chunk]) & pte.leaf(level)(values)
                self._put_children(level, chunk[done], values[done], record)

    def _put_children(self, level: int, index: Index, blocks: Array, record: Record) -> None:
        """Put leaves of the next level, as clean `blocks` would have them, into the empty tables `index`."""
        granule, count = self.layout.granule, self.level[level + 1].size
        drop = pte.TABLE | pte.CONTIGUOUS | (1 << granule.shift(level)) - granule.page_size
        parent = pte.clean(level)(blocks) & ~np.uint64(drop) | np.uint64(pte.leaf(level + 1).value)
        number = np.arange(granule.entries, dtype=np.int64)
        address = number.astype(np.uint64) << np.uint64(granule.shift(level + 1))
        where = self.layout.first_child(level, index)[:, None] + number
        inside = (where >= 0) & (where < count)  # a block at the slot's edge may reach beyond it
        values = (parent[:, None] | address)[inside]
        self._swap(level + 1, where[inside], values, Record(record.out, record.also, out_of=None, also_of=None))

    def collapsible(self, level: int, lo: int, hi: int) -> Index:
        """Return the tables of `level`, wholly in [lo, hi), whose leaves make up a block."""
        whole = self.layout.whole(level, lo, hi)
        index = whole.start + np.flatnonzero(pte.table(level)(self.level[level][whole]))
        return np.concatenate([_NO_INDEX, *(chunk[self._alike(level, chunk)] for chunk in self._chunks(index))])

    def _alike(self, level: int, index: Index) -> NDArray[np.bool_]:
        """Return for each table whether its leaves differ in nothing but AF, dirty, contiguous, and their place."""
        granule, below = self.layout.granule, level + 1
        leaves = self.level[below][self._rows(level, index)]
        leaves = pte.clean(below)(leaves & ~np.uint64(pte.AF | pte.CONTIGUOUS))
        first, child_size = leaves[:, 0], 1 << granule.shift(below)
        place = np.arange(granule.entries, dtype=np.uint64) * np.uint64(child_size)
        unaligned = first & np.uint64((1 << granule.shift(level)) - child_size)
        same: NDArray[np.bool_] = (leaves == first[:, None] | place).all(axis=1) & (unaligned == 0)
        return same & pte.leaf(below)(first)

    def collapse(self, level: int, index: Index, record: Record) -> None:
        """Replace the tables `index`, which are collapsible, by clean blocks."""
        for chunk in self._chunks(index):
            rows = self._rows(level, chunk)
            values = np.zeros(rows.size, dtype=np.uint64)
            try:
                self._swap(level + 1, rows.ravel(), values, record)
            finally:
                leaves = values.reshape(rows.shape)
                done = leaves[:, 0] != 0  # an exception between the two must not leave the guest without its pages
                young = np.bitwise_or.reduce(leaves, axis=1) & np.uint64(pte.AF)
                first = pte.clean(level + 1)(leaves[:, 0]) & ~np.uint64(pte.TABLE | pte.CONTIGUOUS)
                self.exchange(level, chunk[done], (first | np.uint64(pte.leaf(level).value) | young)[done], record)

    def _chunks(self, index: Index) -> Iterator[Index]:
        """Yield parts of an index of tables, each with as many leaves as are built or compared together."""
        step = _CHUNK // self.layout.granule.entries
        return (index[i : i + step] for i in range(0, index.size, step))

    def _rows(self, level: int, index: Index) -> Index:
        """Return as rows the entries of the next level under each of `index`, all inside of the slot."""
        return self.layout.first_child(level, index)[:, None] + np.arange(self.layout.granule.entries)

    # --- checking ------------------------------------------------------------------------------------------

    def verify(self) -> None:
        """Raise `InvariantError` if a leaf isn't at exactly one level, or an encoding is reserved."""
        for level in (1, 2):
            entries, below = self.level[level], self.level[level + 1]
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
