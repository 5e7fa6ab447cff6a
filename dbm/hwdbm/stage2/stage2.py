"""Stage2: the leaf descriptors of one memslot in flat arrays, and the verbs over them.

One uint64 array a level. ``level(3)`` has an entry a page, indexed by ``gfn - base_gfn``; ``level(2)`` one a stripe
(the pages under one block-sized entry), ``level(1)`` one for each 1 GiB (4 KiB granule). A leaf lives at exactly one
level: a level-2 entry is invalid, a block, or a table, and only under a table does level 3 hold anything.

Whatever replaces a leaf (map, unmap, split, collapse, wrprotect, clear_dbm, disable_dbm) first saves its dirty state
for both consumers: in `Stage2.saved`, which the next harvest takes, and in `Stage2.host_dirty`, the host pages'
dirty flags. So at any time the pages dirtied since they were last cleaned are those of the dirty leaves and those in
`saved`, and no verb but `harvest` and `clean` changes that set.

Threads may work on disjoint parts in parallel, with `harvest_into`, `peek_into`, `take_saved_into`, `track_part` and
`wrprotect_part`; so may `map`, `unmap` and `split`, on parts that also end where leaves do. A part is a range of whole
words of the slot's bitmaps, or ends with the slot. The owner's locks say which thread has which part
(`hwdbm.DirtyLog` has them). What parts have in common is settled here: a block that reaches into several is changed
under one lock, and what it recorded for pages outside of the part goes to `saved`, never into words that another
thread may be writing. Every other verb has the Stage2 to itself.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from threading import Lock
from typing import Self
from weakref import ref

import numpy as np
from numpy.typing import NDArray

from hwdbm import pte
from hwdbm.bitmap import DirtyBitmap, word_count
from hwdbm.check import array, flag, instance, integer, integers, separate, uint64s
from hwdbm.errors import BitmapError, GfnError, some
from hwdbm.granule import LEAF_LEVELS, Granule
from hwdbm.kernels import Name, Tally, named
from hwdbm.kernels import shared as shared_kernels
from hwdbm.stage2.layout import Layout, distinct, merged
from hwdbm.stage2.leaves import Asks, LeafAt, Leaves, Record, every
from hwdbm.stage2.saved import Saved

Array = NDArray[np.uint64]
ByLevel = Callable[[int], pte.Update]
Limit = Callable[[ByLevel], ByLevel]
_RUN_LEVELS = (1, 2, 3)
_ROUNDS = 64  # of taking runs apart that others make meanwhile
Pages = Iterable[int] | NDArray[np.integer]


def _alone(rule: ByLevel) -> ByLevel:
    """Return `rule` for leaves without the contiguous bit."""

    def limited(level: int) -> pte.Update:
        update = rule(level)
        return replace(update, where=update.where.also(zeros=pte.CONTIGUOUS))

    return limited


class Stage2:
    """The stage-2 leaves of one memslot.

    Parameters
    ----------
    npages : int
        Pages of one granule; 1 or more.
    base_gfn : int
        The guest frame of the first page, in granules. Any alignment.
    granule : Granule
        The size of a page.
    kernels : {"vector", "fused"}, optional
        The implementation that works on private leaves; by default the one in use (`hwdbm.kernels.use`).
    shared : bool
        Whether others write the descriptors too, while verbs run: hardware, other threads, other processes. Needs the
        extra ``jit``.
    arrays : mapping of int to (n,) uint64 array, optional
        The entries of levels 1, 2 and 3 where they lie already, in memory that others map; as long as `layout` says.
        By default new ones, with nothing mapped.
    contiguous : bool
        Whether leaves may have the contiguous bit, which no verb here sets. Hardware may then mark any one of a run for
        a write to any of it, so a run is one leaf: see `contiguous` below.

    Attributes
    ----------
    layout : Layout
        Which entry of a level maps which pages.
    contiguous : bool
        Whether contiguous runs are looked for, at a cost by the dirty page. What a dirty leaf of a run recorded is then
        reported of the whole run: the aligned group of `Granule.contiguous_entries` leaves. A harvest or clean that
        touches a run cleans all of it, and a verb that replaces or protects a leaf of a run takes the run apart first:
        what it recorded is saved, and its leaves lose the bit. Each entry is decided on by what it is itself. Such a
        verb has the Stage2 to itself, unless that is shared: then others may set the bit at any moment, but for those
        of map, unmap, split and collapse. Where they never cease to, the verb raises `GfnError`, and nothing is lost.
    saved : Saved
        Dirty state of leaves that were replaced, until a harvest takes it.
    host_dirty : DirtyBitmap
        The dirty flags of the host's pages: every harvest, clean and replacement sets bits, the host clears them
        (`take_host_dirty`). A leaf that lets the guest write untracked counts as dirty here when it goes.

    Raises
    ------
    GfnError
        If the slot has no page, or doesn't fit into 52 address bits.
    MemoryError
        If there is no room for its descriptors: 8 bytes a page, which nothing backs before they are written.
    ValueError
        If there are no such kernels here: without numba none for shared leaves. If `arrays` aren't those of the slot.

    Examples
    --------
    >>> s2 = Stage2(1000, base_gfn=0x100)
    >>> s2.map(0x100, 1000, pfn=0x8_0000)
    >>> s2.enable_dbm()
    1000
    >>> s2.level(3)[7] |= pte.S2AP_W  # what the MMU does when the guest writes
    >>> s2.harvest().ranges().tolist()
    [[7, 1]]
    >>> s2.harvest().any()
    False
    """

    _apart: "ref[Array] | None" = None  # the words that were found last to share no memory with a Stage2's own

    def __init__(
        self,
        npages: int,
        base_gfn: int = 0,
        granule: Granule = Granule.K4,
        *,
        kernels: Name | None = None,
        shared: bool = False,
        arrays: Mapping[int, Array] | None = None,
        contiguous: bool = False,
    ) -> None:
        self.layout = Layout(npages, base_gfn, granule)
        self.shared, self.contiguous = flag(shared, "shared"), flag(contiguous, "contiguous")
        if self.shared and kernels is not None:
            raise ValueError(f"kernels {kernels!r} are for private leaves")
        implementation = shared_kernels() if self.shared else None if kernels is None else named(kernels)
        self._begin(Leaves(self.layout, implementation, arrays))

    def _begin(self, leaves: Leaves) -> None:
        """Take the slot's leaves, wherever they lie; all else begins empty."""
        self._leaves = leaves
        self.saved = Saved(self.npages, leaves.kernels) if self.shared else Saved(self.npages)
        self._host_dirty = DirtyBitmap(self.npages)
        self._lock = Lock()  # what parallel passes share: the entries above level 3, and `saved`
        self._splits = 0  # how often blocks were split; changed with the lock held

    @property
    def host_dirty(self) -> DirtyBitmap:
        """The dirty flags of the host's pages; a bitmap put in its place has as many."""
        return self._host_dirty

    @host_dirty.setter
    def host_dirty(self, bitmap: DirtyBitmap) -> None:
        if bitmap is self._host_dirty:  # what `s2.host_dirty |= other` puts back is the bitmap itself
            return
        self._check(bitmap, "host_dirty", written=True)
        self._apart, self._host_dirty = None, bitmap

    @property
    def npages(self) -> int:
        """Pages in the slot."""
        return self.layout.npages

    @property
    def base_gfn(self) -> int:
        """The guest frame of the slot's first page."""
        return self.layout.base_gfn

    @property
    def granule(self) -> Granule:
        """The size of a page."""
        return self.layout.granule

    def __repr__(self) -> str:
        last = self.base_gfn + self.npages - 1
        return f"<Stage2: gfn {self.base_gfn:#x}..{last:#x}, {self.npages} pages of {self.granule}>"

    def level(self, level: int) -> Array:
        """Return the entries of `level` (1, 2 or 3): the buffer itself, not a copy.

        Raises
        ------
        ValueError
            For another level.
        """
        level, entries = integer(level, "level", None), self._leaves.level
        if level not in entries:
            raise ValueError(f"leaves are at levels 1, 2 and 3, not {level}")
        return entries[level]

    def copy(self) -> Self:
        """Return a Stage2 of its own with the same leaves, saved pages and host flags, in memory of its own."""
        twin = type(self)(self.npages, self.base_gfn, self.granule)
        twin.shared, twin.contiguous = self.shared, self.contiguous
        twin.saved = Saved(self.npages, self._leaves.kernels)
        twin._leaves = self._leaves.copy()
        twin.saved.span = self.saved.span
        twin.saved.bitmap.words[:] = self.saved.bitmap.words
        twin.host_dirty.words[:] = self.host_dirty.words
        return twin

    def __deepcopy__(self, memo: object) -> Self:
        return self.copy()  # the lock is the twin's own

    # --- mapping -------------------------------------------------------------------------------------------

    def map(
        self,
        gfn: int,
        npages: int,
        pfn: int | NDArray[np.integer],
        level: int = 3,
        writable: bool = True,
        *,
        dbm: bool = False,
    ) -> None:
        """Map guest frames to physical ones, in place of whatever was there.

        Parameters
        ----------
        gfn, npages : int
            The range, inside of the slot; for blocks a multiple of the block's pages.
        pfn : int or (n,) integer array
            The first physical frame of a run, or the frame of each leaf: one a page, or one a block.
        level : int
            3 maps pages, 2 and 1 blocks.
        writable : bool
            Whether the guest may write.
        dbm : bool
            Whether hardware is to record the writes: the leaves are then writable-clean, otherwise untracked.

        Raises
        ------
        GfnError
            If the range or a frame is outside of its space or misaligned. Nothing is changed then.

        Notes
        -----
        The dirty state of the leaves that were there is saved first. No TLB is invalidated.
        """
        lo, hi = self._range(gfn, npages)
        level, size = self._leaf(level)
        if (self.base_gfn + lo) % size or (hi - lo) % size:
            raise GfnError(
                f"gfn {self.base_gfn + lo:#x} and {hi - lo} pages aren't multiples of a level-{level} leaf's {size:#x}"
            )
        leaves = self._new_leaves(pfn, (hi - lo) // size, level, writable, dbm)
        if lo < hi:
            with self._lock:
                record = self._saving(lo, hi)
                self._take_apart(lo, hi)
                self._isolate(lo, hi)
                self._leaves.put(level, lo, hi, leaves, record)

    def _leaf(self, level: int) -> tuple[int, int]:
        """Return a level as an `int`, and the pages of a leaf of it, if there are such."""
        level = integer(level, "level", None)
        if level != 3 and level not in self._block_levels:
            raise GfnError(f"level {level} of a {self.granule} granule has no leaves")
        return level, self.layout.sizes[level]

    @property
    def _block_levels(self) -> tuple[int, ...]:
        return tuple(level for level in self.granule.block_levels(large=True) if level in (1, 2))

    def _new_leaves(
        self, pfn: int | NDArray[np.integer], count: int, level: int, writable: bool, dbm: bool
    ) -> Callable[[int, int], Array]:
        """Return what makes the a-th to b-th of `count` leaves over frames that are checked here."""
        size, shift = self.layout.sizes[level], self.granule.page_shift
        frames: NDArray[np.int64] | None = None
        leaf = np.uint64(pte.make_leaf(0, level, writable=writable, dbm=dbm))
        if pfn.ndim if isinstance(pfn, np.ndarray) else isinstance(pfn, Iterable):
            frames = integers(pfn, "pfn", -(1 << 63), (1 << 63) - 1, GfnError)
            if frames.shape != (count,):
                raise GfnError(f"{count} leaves need {count} frames, got an array of shape {frames.shape}")
            low, high = (int(frames.min()), int(frames.max())) if count else (0, 0)
            wrong = next((int(frame) for frame in frames[frames % size != 0]), None) if size > 1 else None
        else:
            low = integer(pfn, "pfn", None)
            high, wrong = low + max(count - 1, 0) * size, low if low % size else None
        if low < 0 or high > (1 << (48 - shift)) - size:
            raise GfnError(f"pfn {low:#x}..{high:#x} isn't inside of 48 address bits")
        if wrong is not None:
            raise GfnError(f"pfn {wrong:#x} isn't a multiple of the leaf's {size:#x} pages")

        def leaves(a: int, b: int) -> Array:
            numbers = np.arange(a, b, dtype=np.int64) * size + low if frames is None else frames[a:b]
            made: Array = np.left_shift(numbers.view(np.uint64), np.uint64(shift))
            return np.bitwise_or(made, leaf, out=made)

        return leaves

    def unmap(self, gfn: int, npages: int) -> None:
        """Remove the leaves of a range, saving their dirty state. A block that is only partly in it is split.

        Raises
        ------
        GfnError
            If the range isn't inside of the slot.
        """
        lo, hi = self._range(gfn, npages)
        if lo < hi:
            with self._lock:
                record = self._saving(lo, hi)
                self._take_apart(lo, hi)
                self._isolate(lo, hi)
                self._leaves.remove(lo, hi, record)

    def split(self, gfn: int, npages: int, level: int = 3) -> int:
        """Replace the blocks that touch a range by tables of leaves of `level`, and return how many were split.

        A child keeps its block's attributes and is clean; what a dirty block recorded is saved for all of its
        pages. The contiguous bit, and bit 16 (nT), which means something else below, are dropped.

        Parameters
        ----------
        gfn, npages : int
            The range, inside of the slot.
        level : int
            3 splits everything into pages; 2 only 1 GiB blocks into 2 MiB blocks (4 KiB granule).

        Raises
        ------
        GfnError
            If the range isn't inside of the slot, or `level` isn't 2 or 3.
        """
        lo, hi = self._range(gfn, npages)
        level = integer(level, "level", None)
        if level not in (2, 3):
            raise GfnError(f"blocks are split into leaves of level 2 or 3, not {level}")
        with self._lock:
            self._take_apart(lo, hi, level - 1)
            return sum(
                self._split(above, self._leaves.find(above, pte.leaf(above), lo, hi)) for above in range(1, level)
            )

    def _split(self, level: int, index: NDArray[np.int64]) -> int:
        if index.size:  # blocks may reach beyond the pages that a verb is asked for
            self._splits += 1
            self.saved.widen(*self._leaves.extent(level, index[[0, -1]])[[0, 1], [0, 1]].tolist())
            self._leaves.split(level, index, self._save_record(told=pte.dirty))
        return int(index.size)

    def _isolate(self, lo: int, hi: int) -> None:
        """Split the blocks that are partly in [lo, hi) and partly not, so that a verb is exact."""
        for page in (lo, hi) if lo < hi else ():
            for level in (1, 2):  # the pieces of a level-1 block may straddle in turn
                if self._leaves.straddles(level, page):
                    self._split(level, np.array([self.layout.index(level, page)]))

    def collapse(self, gfn: int, npages: int, level: int = 2) -> int:
        """Replace tables whose leaves make up a block by that block, and return their number.

        They do where all are there, physically contiguous from an aligned frame, and alike in every bit but AF,
        the dirty state and the contiguous hint. The block is young if any of them was, and clean: what they
        recorded is saved page by page.

        Parameters
        ----------
        gfn, npages : int
            Only tables of which all pages are in the range, and so in the slot, are looked at.
        level : int
            The level of the block: 2 collapses pages, 1 collapses level-2 blocks.

        Raises
        ------
        GfnError
            If the range isn't inside of the slot, or the granule has no blocks at `level`.
        """
        lo, hi = self._range(gfn, npages)
        level = integer(level, "level", None)
        if level not in self._block_levels:
            raise GfnError(f"level {level} of a {self.granule} granule has no blocks")
        with self._lock:
            record = self._saving(lo, hi, told=pte.dirty)
            self._take_apart(lo, hi)
            index = self._leaves.collapsible(level, lo, hi)
            self._leaves.collapse(level, index, record)
            return int(index.size)

    # --- dirty state ---------------------------------------------------------------------------------------

    def harvest(self, out: DirtyBitmap | None = None, first: int = 0, npages: int | None = None) -> DirtyBitmap:
        """Collect the dirty pages and re-protect them: dirty leaves become writable-clean.

        Parameters
        ----------
        out : DirtyBitmap, optional
            A bitmap of the slot's pages; bits are set in it, none is cleared. By default a new one.
        first, npages : int
            The pages to look at, counted from the slot's first; by default all.

        Returns
        -------
        DirtyBitmap
            `out`. A dirty block sets the bits of all of its pages.

        Raises
        ------
        GfnError
            If the range isn't inside of the slot.
        BitmapError
            If `out` has another size.

        Notes
        -----
        No page may be copied before the TLB was flushed for what this re-protected (see `hwdbm.DirtyLog`).
        A block that is only partly in the range is re-protected too; its other pages are kept in `saved`, so that
        harvests of disjoint ranges give together what one of their union gives.

        Examples
        --------
        >>> s2 = Stage2(1024)
        >>> s2.map(0, 1024, pfn=0, level=2, dbm=True)
        >>> s2.level(2)[1] |= pte.S2AP_W
        >>> s2.harvest().ranges().tolist()
        [[512, 512]]
        """
        if out is not None:
            self.harvest_into(out, first, npages)
            return out
        lo, hi = self._pages(first, npages)
        taken = DirtyBitmap(self.npages)
        try:
            self.harvest_into(taken, lo, hi - lo)
        except BaseException:
            # What was taken goes back. No Python code runs between these two but on another exception.
            self.saved.span = 0, self.npages
            self._leaves.kernels.merge(self.saved.bitmap.words, taken.words)
            raise
        return taken

    def harvest_into(self, out: DirtyBitmap, first: int = 0, npages: int | None = None) -> Tally:
        """Do as `harvest`, and return what it read, changed and wrote."""
        lo, hi = self._pages(first, npages)
        self._check(out, "out", written=True)
        if self.contiguous:
            with self._lock:
                return self._harvest_runs(lo, hi, out)
        # Pages come first: what is split or unmapped meanwhile goes to `saved`, and is found there.
        pages = self._leaves.update_pages(pte.clean(3), lo, hi, Record(out, self._host_dirty))
        with self._lock:
            read = self._leaves.tables_alone(lo, hi)
            tally = self._harvest_blocks(lo, hi, out) if read is None else Tally(read)
            words = self.saved.take(lo, hi, out, self._host_dirty)
        return Tally(tally.read + pages.read, tally.changed + pages.changed, tally.words + words + pages.words)

    def _harvest_blocks(self, lo: int, hi: int, out: DirtyBitmap) -> Tally:
        # Words outside of the range may be another thread's: the harvest of those pages takes the bits from `saved`.
        for level in (1, 2):
            if self._leaves.straddles(level, lo):
                self.saved.widen(max(self.layout.span(level, self.layout.index(level, lo))[0], 0), lo)
            if self._leaves.straddles(level, hi):
                self.saved.widen(hi, min(self.layout.span(level, self.layout.index(level, hi))[1], self.npages))
        return self._leaves.update_blocks(pte.clean, lo, hi, Record(out, self._host_dirty, self.saved.bitmap))

    def peek_into(self, out: DirtyBitmap, first: int = 0, npages: int | None = None) -> Tally:
        """Do as `harvest_into`, but leave dirty leaves dirty. What is in `saved` is taken.

        Parameters
        ----------
        out : DirtyBitmap
            A bitmap of the slot's pages; bits are set in it, none is cleared.
        first, npages : int
            The part, in pages counted from the slot's first; by default the slot.

        Returns
        -------
        Tally
            The counts; `words` are those that came from `saved`.

        Raises
        ------
        GfnError
            If the part isn't inside of the slot.
        BitmapError
            If `out` has another size.
        """
        lo, hi = self._pages(first, npages)
        self._check(out, "out", written=True)
        if self.contiguous:
            return self._peek_runs(lo, hi, out)
        read = self._leaves.scan(pte.dirty, lo, hi, out)
        return Tally(read, words=self._take_saved(out, lo, hi))

    def take_saved_into(self, out: DirtyBitmap, first: int = 0, npages: int | None = None) -> Tally:
        """Move what is in `saved` to `out` and `host_dirty`, and look at no leaf. As `peek_into` otherwise."""
        lo, hi = self._pages(first, npages)
        self._check(out, "out", written=True)
        return Tally(words=self._take_saved(out, lo, hi))

    def _take_saved(self, out: DirtyBitmap, lo: int, hi: int) -> int:
        with self._lock:
            return self.saved.take(lo, hi, out, self._host_dirty)

    def dirty(self) -> DirtyBitmap:
        """Return what `harvest` would, and change nothing."""
        found = self.scan(pte.dirty)
        if self.contiguous:
            self._widen(found)
        with self._lock:  # a verb that replaces leaves saves what they recorded before it gives this back
            found |= self.saved.bitmap
        return found

    def writable(self) -> DirtyBitmap:
        """Return the pages whose leaf has S2AP[1] set: in a table kept without DBM, what was written."""
        return self.scan(pte.writable)

    def young(self) -> DirtyBitmap:
        """Return the pages whose leaf has AF set."""
        return self.scan(pte.young)

    def scan(self, match: Callable[[int], pte.Match]) -> DirtyBitmap:
        """Return the pages whose leaf matches, and change nothing.

        Parameters
        ----------
        match : callable
            From a level to the predicate for its leaves: `pte.dirty`, `pte.untracked` and the like.
        """
        instance(match, Callable, "match")
        masks = {level: match(level) for level in LEAF_LEVELS}
        for found in masks.values():
            instance(found, pte.Match, "what match returns")
        out = DirtyBitmap(self.npages)
        self._leaves.scan(masks.__getitem__, 0, self.npages, out)
        return out

    def clean(self, mask: DirtyBitmap) -> int:
        """Re-protect the dirty leaves of the pages in `mask`, exactly, and return how many they were.

        Dirty state of the pages in the mask leaves the log: the caller copies them after the TLB
        flush. `host_dirty` gets it.

        Parameters
        ----------
        mask : DirtyBitmap
            A bitmap of the slot's pages.

        Raises
        ------
        BitmapError
            If it has another size.

        Notes
        -----
        A dirty block of which only some pages are in the mask is re-protected, and the dirty state of the others
        is kept in `saved`: no page outside of the mask is forgotten (RFC patch 4).
        """
        self._check(mask, "mask")
        with self._lock:
            if self.contiguous:
                return self._clean_runs(mask)
            tally = self._update_part(pte.clean, mask, self._save_record(every, every))
            self.saved.drop(mask, 0, self.host_dirty)
            return tally.changed

    def take_host_dirty(self) -> DirtyBitmap:
        """Return the host pages' dirty flags and clear them, as the host does before it writes pages back."""
        taken = DirtyBitmap(self.npages)
        try:
            with self._lock:
                # A harvest of a part may have left some in `saved` alone.
                np.bitwise_or(self.host_dirty.words, self.saved.bitmap.words, out=taken.words)
                self._leaves.kernels.remove(self.host_dirty.words, taken.words)
        except BaseException:
            self._leaves.kernels.merge(self.host_dirty.words, taken.words)  # as in `harvest`
            raise
        return taken

    # --- contiguous runs -----------------------------------------------------------------------------------

    def _groups(self, level: int, pages: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the groups of leaves of `level` that could be runs and map `pages`, as rows of pages of the slot."""
        size = self.granule.contiguous_entries(level) * self.layout.sizes[level]
        start = np.unique((pages + self.base_gfn) // size) * size - self.base_gfn
        return np.clip(np.stack([start, start + size], axis=1), 0, self.npages)

    def _widen(self, bitmap: DirtyBitmap) -> None:
        """Set the bits of the whole run wherever that of a leaf with the contiguous bit is set."""
        pages = bitmap.pages()
        found = self._leaves.leaf_at(pages)
        for level in _RUN_LEVELS:
            of = (found.level == level) & (found.desc & np.uint64(pte.CONTIGUOUS) != 0)
            self._leaves.kernels.fill(bitmap.words, self._groups(level, pages[of]))

    def _around(self, lo: int, hi: int, match: Asks) -> list[tuple[int, NDArray[np.int64]]]:
        """Return, by level, the contiguous leaves that match, are outside of [lo, hi), and in a run that reaches in."""
        around = []
        for level in _RUN_LEVELS if lo < hi else ():
            index = [np.empty(0, dtype=np.int64)]
            for start, stop in self._groups(level, np.array([lo, hi - 1])).tolist():
                for a, b in ((start, min(stop, lo)), (max(start, hi), stop)):
                    if a < b:
                        index.append(self._leaves.find(level, match(level).also(ones=pte.CONTIGUOUS), a, b))
            found = np.unique(np.concatenate(index))
            pages = self._leaves.extent(level, found)
            around.append((level, found[(pages[:, 1] <= lo) | (pages[:, 0] >= hi)]))
        return around

    def _keep(self, found: DirtyBitmap) -> None:
        """Save what was found, for both consumers."""
        if found.any():
            self.saved.widen(0, self.npages)
            self._leaves.kernels.merge(self.saved.bitmap.words, found.words)
            self._leaves.kernels.merge(self._host_dirty.words, found.words)

    def _harvest_runs(self, lo: int, hi: int, out: DirtyBitmap) -> Tally:
        found = DirtyBitmap(self.npages)
        record = Record(found, found, found)
        try:
            tally = self._leaves.update_pages(pte.clean(3), lo, hi, record)
            tally += self._leaves.update_blocks(pte.clean, lo, hi, record)
            for level, index in self._around(lo, hi, pte.dirty):
                changed = self._leaves.update_at(level, index, pte.clean(level), record, 0, self.npages)
                tally += Tally(index.size, changed)
        finally:  # an exception in between loses nothing of what was cleaned
            self._widen(found)
            rest, words = found.copy(), slice(lo >> 6, hi + 63 >> 6)
            rest.set_range(lo, hi - lo, False)
            if rest.any():  # a later harvest takes it to both consumers
                self.saved.widen(0, self.npages)
                self._leaves.kernels.merge(self.saved.bitmap.words, rest.words)
            for bitmap in (out, self._host_dirty):
                self._leaves.kernels.merge(bitmap.words[words], found.words[words] & ~rest.words[words])
        return tally + Tally(words=self.saved.take(lo, hi, out, self._host_dirty))

    def _peek_runs(self, lo: int, hi: int, out: DirtyBitmap) -> Tally:
        found = DirtyBitmap(self.npages)
        read = self._leaves.scan(pte.dirty, lo, hi, found)
        for level, index in self._around(lo, hi, pte.dirty):
            self._leaves.kernels.fill(found.words, self._leaves.extent(level, index))
            read += index.size
        self._widen(found)
        part = DirtyBitmap(self.npages)
        part.set_range(lo, hi - lo)
        words = slice(lo >> 6, hi + 63 >> 6)
        self._leaves.kernels.merge(out.words[words], (found & part).words[words])
        return Tally(read, words=self._take_saved(out, lo, hi))

    def _clean_runs(self, mask: DirtyBitmap) -> int:
        found, wide = DirtyBitmap(self.npages), mask.copy()
        self._widen(wide)
        record = Record(found, self._host_dirty, found)
        try:
            changed = self._leaves.update_blocks(pte.clean, 0, self.npages, record, wide).changed
            changed += self._leaves.update_within(pte.clean(3), wide, 0, record).changed
        finally:
            self._widen(found)
            self._keep(found)
        self.saved.drop(mask, 0, self._host_dirty)
        return changed

    def _take_apart(self, lo: int, hi: int, lowest: int = 3) -> None:
        """Clear the contiguous bit of all leaves of the runs that touch [lo, hi), and save what the runs recorded.

        Only of leaves of the levels 1 to `lowest`. A leaf loses the bit in the same exchange in which it is cleaned:
        no page of the run is recorded by another's leaf after that, once the TLB was flushed.
        """
        for level in _RUN_LEVELS if self.contiguous and lo < hi else ():
            if level > lowest:
                continue
            groups = self._groups(level, np.array([lo, hi - 1]))
            start, stop = int(groups[0, 0]), int(groups[-1, 1])
            index = self._leaves.find(level, pte.leaf(level).also(ones=pte.CONTIGUOUS), start, stop)
            if not index.size:
                continue
            found = DirtyBitmap(self.npages)
            record = Record(found, self._host_dirty, found, pte.dirty, pte.dirty)
            try:
                self._leaves.take_apart(level, index, record)
            finally:
                self._leaves.kernels.fill(found.words, self._groups(level, found.pages()))
                self._keep(found)

    def _in_no_run(self, lo: int, hi: int, change: Callable[[Limit], Tally]) -> Tally:
        """Take apart the runs that touch [lo, hi), and have `change` apply rules to leaves there. The lock is held.

        What `change` is given limits a rule to leaves without the contiguous bit: in a shared Stage2, others may set it
        after the taking apart, and what such a leaf recorded is its whole run's. Then both are done once more.
        """
        if not self.contiguous:
            return change(lambda rule: rule)
        tally = Tally()
        for _ in range(_ROUNDS):
            self._take_apart(lo, hi)
            tally += change(_alone)
            if not self._in_runs(lo, hi):
                return tally
        raise GfnError(
            f"gfn {self.base_gfn + lo:#x}..{self.base_gfn + hi - 1:#x}: others make runs of it all the while"
        )

    def _in_runs(self, lo: int, hi: int) -> bool:
        """Return whether a leaf that touches [lo, hi) has the contiguous bit."""
        return any(
            self._leaves.find(level, pte.leaf(level).also(ones=pte.CONTIGUOUS), lo, hi).size for level in _RUN_LEVELS
        )

    # --- tracking and protection ---------------------------------------------------------------------------

    def enable_dbm(self, mask: DirtyBitmap | None = None) -> int:
        """Let hardware record writes: untracked leaves become writable-clean. Return how many they were.

        Only a leaf that was writable gets DBM: on a read-only one it would grant the write. What is tracked
        already stays as it is. Since an untracked leaf may have been written, its pages are dirty for the host.

        Parameters
        ----------
        mask : DirtyBitmap, optional
            Only leaves of at least one page in it.

        Examples
        --------
        >>> s2 = Stage2(3)
        >>> s2.map(0, 2, pfn=16)
        >>> s2.map(2, 1, pfn=99, writable=False)
        >>> s2.enable_dbm(), [pte.state(int(d), 3).label for d in s2.level(3)]
        (2, ['writable-clean', 'writable-clean', 'read-only'])
        """
        record = Record(self.host_dirty, self.host_dirty, out_of=None)
        if mask is not None:
            self._check(mask, "mask")
            with self._lock:
                return self._in_no_run(
                    0, self.npages, lambda limit: self._update_part(limit(pte.arm), mask, record)
                ).changed
        with self._lock:
            return self._leaves.update(pte.arm, 0, self.npages, record).changed

    def disable_dbm(self) -> int:
        """Stop recording: tracked leaves become untracked, their dirty state saved. Return how many they were."""
        with self._lock:
            record = self._saving(0, self.npages, told=every)
            return self._in_no_run(
                0, self.npages, lambda limit: self._leaves.update(limit(pte.disarm), 0, self.npages, record)
            ).changed

    def set_dbm(self, gfn: int | None = None, npages: int | None = None) -> int:
        """Set DBM alone on untracked leaves, which become writable-dirty. Return how many they were.

        Parameters
        ----------
        gfn, npages : int, optional
            The range; by default the whole slot. Blocks that are only partly in it are split.
        """
        return self._change(pte.set_dbm, gfn, npages, told=None)

    def clear_dbm(self, gfn: int | None = None, npages: int | None = None) -> int:
        """Stop recording, and deny the writes: tracked leaves become read-only. Return how many they were.

        The dirty state is saved. Parameters are `set_dbm`'s.
        """
        return self._change(pte.clear_dbm, gfn, npages)

    def wrprotect(self, gfn: int | None = None, npages: int | None = None) -> int:
        """Make leaves read-only: DBM and S2AP[1] go together. Return how many weren't.

        The dirty state is saved, and an untracked leaf is reported to the host. Parameters are `set_dbm`'s.
        """
        # A tracked leaf may be written until its DBM goes, an untracked one until S2AP[1] does: one change for each.
        return self._change(pte.clear_dbm, gfn, npages) + self._change(pte.wrprotect, gfn, npages)

    def track_part(self, mask: DirtyBitmap, first: int = 0, out: DirtyBitmap | None = None) -> Tally:
        """Have writes to the pages in a mask recorded anew: untracked and writable-dirty become writable-clean.

        `enable_dbm` and `clean` of the mask in one pass. What the pages in the mask recorded is dropped from the
        log's side, and reaches `host_dirty`; what a block recorded for others is kept in `saved`.

        Parameters
        ----------
        mask : DirtyBitmap
            The pages; bit 0 is page `first`.
        first : int
            A multiple of 64. The mask's size is one too, or it ends with the slot.
        out : DirtyBitmap, optional
            A bitmap of the slot's pages, which gets what is else dropped: for those to whom it is news.

        Returns
        -------
        Tally
            The counts of descriptors read and changed.

        Raises
        ------
        GfnError
            If the part isn't inside of the slot.
        """
        return self._protect_part(mask, first, out, (pte.track, every))

    def wrprotect_part(self, mask: DirtyBitmap, first: int = 0, out: DirtyBitmap | None = None) -> Tally:
        """Make the leaves of the pages in a mask read-only, and no other leaf.

        A block is a leaf: with any of its pages in the mask it becomes read-only as a whole, and what it recorded
        for others is kept in `saved`. Parameters, return and errors are `track_part`'s.
        """
        return self._protect_part(mask, first, out, (pte.clear_dbm, pte.dirty), (pte.wrprotect, every))

    def _protect_part(
        self, mask: DirtyBitmap, first: int, out: DirtyBitmap | None, *rules: tuple[ByLevel, Asks]
    ) -> Tally:
        """Apply rules to the leaves of the pages in a mask, each with the predicate on what it is to save."""
        sinks = self._sinks(out)
        lo, hi = self._part(mask, first)

        def pages(limit: Limit = lambda rule: rule) -> Tally:
            return sum((self._update_pages(limit(rule), mask, lo, out, told) for rule, told in rules), Tally())

        def rest(limit: Limit) -> Tally:
            tally = Tally()
            for rule, told in rules:
                tally += self._update_blocks(limit(rule), mask, lo, self._save_record(told, told))
            if self._splits != splits:
                tally += pages(limit)
            return tally

        # The pass over pages is the long one. It needs no lock: what it reads and writes is this part's alone, so that
        # nothing that other parts do comes between it and the blocks. Where others may change leaves of this part
        # too, in a shared Stage2, only what moves down from a block to pages could escape both passes, and that is a
        # split. (What moves up is found among the blocks.) So splits are counted, before each is made and with the lock
        # held, and where one has come since the pages were passed, they are passed again with the lock held.
        splits, tally = None, Tally()
        if not self.contiguous:  # a run may reach into other parts
            with self._lock:
                splits = self._splits
            tally = pages()
        with self._lock:
            tally += self._in_no_run(lo, hi, rest)
            self.saved.drop(mask, lo, *sinks)
        return tally

    def _sinks(self, out: DirtyBitmap | None) -> tuple[DirtyBitmap, ...]:
        """Return who gets what `saved` has of pages that are re-protected: the host, and `out`, which is checked."""
        if out is None:
            return (self._host_dirty,)
        self._check(out, "out", written=True, noted=False)
        return out, self._host_dirty

    def relax(self, gfn: int, *, dbm: bool = False) -> bool:
        """Let the guest write a page, as the handler of a write fault does once the host has agreed.

        The page counts as dirty from here on, and the caller marks it. What else a block recorded is saved where it
        becomes untracked. (KVM: ``kvm_pgtable_stage2_relax_perms``.)

        Parameters
        ----------
        gfn : int
            The guest frame. A block that maps it is relaxed as a whole.
        dbm : bool
            Whether the leaf becomes writable-dirty; otherwise untracked.

        Returns
        -------
        bool
            Whether there is a leaf.

        Raises
        ------
        GfnError
            If the frame isn't inside of the slot.
        """
        page, _ = self._range(gfn, 1)
        return self.relax_at([page], dbm=dbm) > 0

    def mkold(self, gfn: int | None = None, npages: int | None = None) -> int:
        """Clear the access flag of leaves, and nothing else. Return how many were young.

        A block that is only partly in the range is aged as a whole. Parameters are `set_dbm`'s.
        """
        return self._age(pte.mkold, gfn, npages, None)

    def mkyoung(self, gfn: int | None = None, npages: int | None = None) -> int:
        """Set the access flag of leaves, and nothing else. Return how many were old. As `mkold` otherwise."""
        return self._age(pte.mkyoung, gfn, npages, None)

    def test_clear_young(self, gfn: int | None = None, npages: int | None = None) -> DirtyBitmap:
        """Clear the access flag of leaves, and return the pages of the range that were young, as `mkold` counts."""
        out = DirtyBitmap(self.npages)
        self._age(pte.mkold, gfn, npages, out)
        return out

    def _age(self, rule: ByLevel, gfn: int | None, npages: int | None, out: DirtyBitmap | None) -> int:
        lo, hi = self._range_or_all(gfn, npages)
        with self._lock:
            record = self._silent if out is None else Record(out, out)
            return self._leaves.update(rule, lo, hi, record).changed

    def _change(self, rule: ByLevel, gfn: int | None, npages: int | None, *, told: Asks | None = pte.writable) -> int:
        lo, hi = self._range_or_all(gfn, npages)
        with self._lock:
            record = self._saving(lo, hi, told=told)
            return self._in_no_run(lo, hi, lambda limit: self._exactly(limit(rule), lo, hi, record)).changed

    def _exactly(self, rule: ByLevel, lo: int, hi: int, record: Record) -> Tally:
        """Apply `rule` to the leaves of [lo, hi), and to no other page."""
        self._isolate(lo, hi)
        return self._leaves.update(rule, lo, hi, record)

    def _update_part(self, rule: ByLevel, mask: DirtyBitmap, record: Record) -> Tally:
        """Apply `rule` to the leaves of at least one page in `mask`, of the slot."""
        tally = self._update_blocks(rule, mask, 0, record)
        return tally + self._update_pages(rule, mask, 0, None, record.also_of)

    def _update_blocks(self, rule: ByLevel, mask: DirtyBitmap, first: int, record: Record) -> Tally:
        """Apply `rule` to the blocks of at least one page in `mask`; what they recorded is saved, the mask's too."""
        lo, hi = first, first + mask.npages
        read = self._leaves.tables_alone(lo, hi)
        if read is not None:
            return Tally(read=read)
        if record.kept is not None:
            self.saved.widen(*self._touched(lo, hi))
        return self._leaves.update_blocks(rule, lo, hi, record, mask)

    def _update_pages(
        self, rule: ByLevel, mask: DirtyBitmap, first: int, out: DirtyBitmap | None, told: Asks | None
    ) -> Tally:
        """Apply `rule` to the level-3 leaves of the pages in `mask`: the host is told, and `out` of the dirty ones."""
        record = Record(self._host_dirty, self._host_dirty, out_of=None, also_of=told)
        if out is not None:
            record.out, record.out_of = out, pte.dirty
        return self._leaves.update_within(rule(3), mask, first, record)

    def _touched(self, lo: int, hi: int) -> tuple[int, int]:
        """Return the pages of the slot under the level-1 and level-2 entries that touch [lo, hi)."""
        if lo >= hi:
            return lo, lo
        first, stop = (
            self.layout.span(1, self.layout.index(1, lo))[0],
            self.layout.span(1, self.layout.index(1, hi - 1))[1],
        )
        return max(first, 0), min(stop, self.npages)

    def _save_record(self, saved: Asks = pte.dirty, told: Asks | None = pte.writable) -> Record:
        """Return where what a replaced leaf recorded goes: dirty state to `saved`, whatever was written to the host."""
        return Record(self.saved.bitmap, self.host_dirty, self.saved.bitmap, saved, told)

    @property
    def _silent(self) -> Record:
        return Record(self.host_dirty, self.host_dirty, out_of=None, also_of=None)

    def _saving(self, lo: int, hi: int, *, told: Asks | None = pte.writable) -> Record:
        """Have `saved` ready for what leaves of [lo, hi) recorded, and return where that goes. The lock is held."""
        self.saved.widen(lo, hi)
        return self._save_record(told=told)

    # --- arrays of pages -----------------------------------------------------------------------------------

    def leaf_at(self, pages: Pages) -> LeafAt:
        """Return the leaf that maps each page.

        Parameters
        ----------
        pages : (n,) int64 array
            Counted from the slot's first; in any order, and they may repeat.

        Returns
        -------
        LeafAt
            ``level`` is 0 where no leaf maps the page.

        Raises
        ------
        GfnError
            If a page isn't inside of the slot.

        Examples
        --------
        >>> s2 = Stage2(1024)
        >>> s2.map(512, 512, pfn=512, level=2)
        >>> s2.leaf_at([511, 512]).level
        array([0, 2], dtype=uint8)
        """
        return self._leaves.leaf_at(self._at(pages))

    def map_at(
        self,
        pages: Pages,
        pfn: NDArray[np.integer],
        level: int = 3,
        writable: bool = True,
        *,
        dbm: bool = False,
    ) -> None:
        """Map pages that lie anywhere, in place of whatever maps them. `map` otherwise.

        Parameters
        ----------
        pages : (n,) int64 array
            Each once, counted from the slot's first; for blocks the first page of each.
        pfn : (n,) integer array
            The physical frame of each leaf.
        level, writable, dbm
            As for `map`.

        Raises
        ------
        GfnError
            If a page or frame is outside of its space, misaligned, or named twice. Nothing is changed then.
        """
        found, (level, size) = self._at(pages), self._leaf(level)
        if ((found + self.base_gfn) % size).any() or (found.size and int(found.max()) + size > self.npages):
            raise GfnError(f"pages {some(found.tolist())} aren't the first of level-{level} leaves in the slot")
        if distinct(found).size != found.size:
            raise GfnError("a page to map is named twice")
        leaves = self._new_leaves(pfn, found.size, level, writable, dbm)(0, found.size)
        if not found.size:
            return
        with self._lock:
            record = self._saving(int(found.min()), int(found.max()) + size)
            self._take_apart(int(found.min()), int(found.max()) + size)
            self._make_room(found, level, record)
            self._leaves.put_at(level, self.layout.index(level, found), leaves, record)

    def _make_room(self, pages: NDArray[np.int64], level: int, record: Record) -> None:
        """Split the blocks above leaves to be, and unmap what is mapped below them."""
        for above in range(1, level):
            entries = distinct(self.layout.index(above, pages))
            self._split(above, entries[pte.leaf(above)(self.level(above)[entries])])
        size = self.layout.sizes[level]
        if level < 3:
            below = pte.table(level)(self.level(level)[self.layout.index(level, pages)])
            for page in pages[below].tolist():
                self._leaves.remove(page, page + size, record)

    def relax_at(self, pages: Pages | LeafAt, *, dbm: bool = False) -> int:
        """Let the guest write pages: `relax` for each of them.

        Parameters
        ----------
        pages : (n,) int64 array or LeafAt
            Counted from the slot's first; or their leaves, which nothing has replaced since `leaf_at`. A block that
            maps one is relaxed as a whole.
        dbm : bool
            Whether the leaves become writable-dirty; otherwise untracked.

        Returns
        -------
        int
            How many of the pages have a leaf.

        Raises
        ------
        GfnError
            If a page isn't inside of the slot.
        """
        return self._update_at(pages, pte.relax_dirty if flag(dbm, "dbm") else pte.relax)[0]

    def allow_at(self, pages: Pages | LeafAt, *, dbm: bool = False) -> int:
        """Make the read-only leaves of pages untracked, or with `dbm` writable-clean; leave all others alone.

        For pages that the host lets the guest write, and that only the log had write-protected.

        Parameters
        ----------
        pages : (n,) int64 array or LeafAt
            Counted from the slot's first; or their leaves, which nothing has replaced since `leaf_at`. A block that
            maps one is changed as a whole.
        dbm : bool
            Whether hardware is to record the writes.

        Returns
        -------
        int
            How many leaves were changed.

        Raises
        ------
        GfnError
            If a page isn't inside of the slot.
        """
        return self._update_at(pages, pte.allow_dbm if flag(dbm, "dbm") else pte.allow)[1]

    def mkyoung_at(self, pages: Pages | LeafAt) -> int:
        """Set the access flag of the leaves of pages, and return how many were old. `mkyoung` otherwise.

        Parameters
        ----------
        pages : (n,) int64 array or LeafAt
            Counted from the slot's first; or their leaves, which nothing has replaced since `leaf_at`.

        Raises
        ------
        GfnError
            If a page isn't inside of the slot.
        """
        return self._update_at(pages, pte.mkyoung)[1]

    def _update_at(self, pages: Pages | LeafAt, rule: ByLevel) -> tuple[int, int]:
        """Apply `rule` to the leaves of pages; return how many pages have one, and how many leaves changed."""
        found = pages if isinstance(pages, LeafAt) else self.leaf_at(pages)
        if self.contiguous and rule is not pte.mkyoung:
            for level in _RUN_LEVELS:
                of = (found.level == level) & (found.desc & np.uint64(pte.CONTIGUOUS) != 0)
                for lo, hi in self._groups(level, self._leaves.extent(level, found.index[of])[:, 0]).tolist():
                    with self._lock:
                        self._take_apart(lo, hi)
        record, end = self._silent, self.npages
        if found.small == found.index.size:  # most often
            return found.small, self._leaves.update_at(3, distinct(found.index), rule(3), record, 0, end)
        changed = 0
        for level in LEAF_LEVELS:
            here = found.level == level
            index = distinct(found.index[here])
            if rule is pte.relax and level < 3 and (found.desc[here] & np.uint64(pte.DBM)).any():
                changed += self._untrack(level, index)
            else:
                changed += self._leaves.update_at(level, index, rule(level), record, 0, end)
        return found.mapped, changed

    def _untrack(self, level: int, index: NDArray[np.int64]) -> int:
        """Relax blocks: what they recorded is saved, since the caller marks those pages only that were written now."""
        extents = self._leaves.extent(level, index)
        with self._lock:
            record = self._saving(int(extents[:, 0].min()), int(extents[:, 1].max()), told=None)
            return self._leaves.update_at(level, index, pte.relax(level), record, 0, self.npages)

    def mmu_update(self, level: int, index: NDArray[np.integer], bits: NDArray[np.uint64]) -> None:
        """Set bits of descriptors as the MMU does at an access: AF and S2AP[1], and no others.

        Parameters
        ----------
        level : int
            1 to 3.
        index : (n,) int64 array
            Entries of `level`; they may repeat, with the same bits.
        bits : (n,) uint64 array
            The bits to set in each.

        Raises
        ------
        ValueError
            For other bits, or another level.
        GfnError
            If there is no such entry.
        """
        entries = self.level(level)
        where = integers(index, "entries", 0, entries.size - 1, GfnError)
        bits = uint64s(bits, "bits", where.size)
        if bits.size and int(np.bitwise_or.reduce(bits)) & ~(pte.AF | pte.S2AP_W):
            raise ValueError("the MMU sets AF and S2AP[1] only")
        self._leaves.set_bits(integer(level, "level"), where, bits)

    def load(self, level: int, first: Pages, rows: NDArray[np.uint64]) -> None:
        """Take over descriptors as they lie in a table: what was in their place is gone, and nothing is saved.

        Parameters
        ----------
        level : int
            1 to 3.
        first : (n,) int64 array
            The entry of `level` that each row begins at, in ascending order. What lies outside of the slot is left out,
            so it may be negative, or beyond the last.
        rows : (n, width) uint64 array
            The descriptors. For several rows, the rows' entries begin at the same offset from a multiple of the width.

        Raises
        ------
        ValueError
            For another level, other shapes, or a Stage2 whose arrays others write too.

        Notes
        -----
        This fills a Stage2 that is empty; `verify` says whether what it was filled with makes sense.

        Examples
        --------
        >>> s2 = Stage2(4, base_gfn=0x100)
        >>> s2.load(3, [-1], np.array([[0x1111, 0x2222]], dtype=np.uint64))
        >>> [hex(d) for d in s2.level(3)]
        ['0x2222', '0x0', '0x0', '0x0']
        """
        if self.shared:
            raise ValueError("a Stage2 whose arrays others write too is not loaded")
        level, limit = integer(level, "level"), 1 << 52
        entries = self.level(level)
        starts = integers(first, "first entries", -limit, limit)
        array(rows, np.uint64, "rows")
        if rows.ndim != 2 or len(rows) != starts.size or not rows.shape[1]:
            raise ValueError(f"{starts.size} rows of descriptors are needed, not an array of shape {rows.shape}")
        if starts.size > 1 and ((np.diff(starts) < rows.shape[1]).any() or (np.diff(starts) % rows.shape[1]).any()):
            raise ValueError(f"rows of {rows.shape[1]} begin at ascending multiples of that apart, not at {starts}")
        reached = (starts > -rows.shape[1]) & (starts < entries.size)
        if not reached.all():
            starts, rows = starts[reached], rows[reached]
        self._leaves.load(level, starts, rows)

    def block_spans(self, first: int = 0, npages: int | None = None) -> NDArray[np.int64]:
        """Return the pages that blocks map, as rows [start, stop) of an (n, 2) array, sorted and merged.

        Parameters
        ----------
        first, npages : int
            Only blocks that map one of these pages; by default all. A row goes on to the block's end in the slot.

        Raises
        ------
        GfnError
            If the range isn't inside of the slot.
        """
        lo, hi = self._pages(first, npages)
        rows = [self.layout.span(level, self._leaves.find(level, pte.leaf(level), lo, hi)) for level in (1, 2)]
        spans = np.clip(np.concatenate(rows), 0, self.npages)
        return merged(spans[np.argsort(spans[:, 0], kind="stable")])

    def _at(self, pages: Pages) -> NDArray[np.int64]:
        return integers(pages, "pages", 0, self.npages - 1, GfnError)

    # --- reading ----------------------------------------------------------------------------------------------

    def leaf_level(self, page: int) -> int | None:
        """Return the level of the leaf that maps a page, counted from the slot's first, or None."""
        page = integer(page, "page", 0, self.npages - 1, GfnError)
        for level in (3, 2, 1):
            if pte.leaf(level)(int(self.level(level)[self.layout.index(level, page)])):
                return level
        return None

    def mapped(self, first: int, npages: int) -> bool:
        """Return whether any page of a part has a leaf, or a level-3 entry that isn't zero."""
        lo, hi = self._pages(first, integer(npages, "npages", None))
        runs = self._leaves.table_runs(lo, hi)
        return any(self._leaves.find(level, pte.leaf(level), lo, hi).size for level in (1, 2)) or any(
            self.level(3)[start:stop].any() for start, stop, _ in runs.tolist()
        )

    # --- checking ------------------------------------------------------------------------------------------

    def verify(self) -> None:
        """Raise `InvariantError` if the arrays can't be what a Stage2's verbs leave behind.

        A leaf lives at one level: under a level-1 or level-2 entry that isn't a table everything is zero. No entry
        has the reserved encoding, at level 3 or at a level without blocks. The tails of the bitmaps are clean.
        """
        self._leaves.verify()
        self.saved.verify()
        self.host_dirty.verify()

    # --- arguments -----------------------------------------------------------------------------------------

    def _range(self, gfn: int, npages: int) -> tuple[int, int]:
        """Return a range of guest frames as pages [lo, hi) of the slot."""
        start = integer(gfn, "gfn", None)
        lo, count = start - self.base_gfn, integer(npages, "npages", None)
        if lo < 0 or count < 0 or lo + count > self.npages:
            last = self.base_gfn + self.npages - 1
            raise GfnError(
                f"gfn {start:#x}..{start + count - 1:#x} is not inside the slot's {self.base_gfn:#x}..{last:#x}"
            )
        return lo, lo + count

    def _range_or_all(self, gfn: int | None, npages: int | None) -> tuple[int, int]:
        """Return `_range` of what is given; the slot's first page and its end are the defaults."""
        gfn = self.base_gfn if gfn is None else integer(gfn, "gfn", None)
        return self._range(gfn, self.base_gfn + self.npages - gfn if npages is None else npages)

    def _pages(self, first: int, npages: int | None) -> tuple[int, int]:
        lo = integer(first, "first", None)
        count = self.npages - lo if npages is None else integer(npages, "npages", None)
        if lo < 0 or count < 0 or lo + count > self.npages:
            raise GfnError(f"pages {lo}..{lo + count - 1} are not inside of the slot's {self.npages}")
        return lo, lo + count

    def _part(self, mask: DirtyBitmap, first: int) -> tuple[int, int]:
        """Return the pages [lo, hi) that a mask of a part stands for."""
        if not isinstance(mask, DirtyBitmap):
            raise TypeError(f"mask is a DirtyBitmap, not {type(mask).__name__}")
        lo, hi = self._pages(first, mask.npages)
        if lo % 64 or (hi % 64 and hi != self.npages):
            raise GfnError(f"pages {lo}..{hi - 1} aren't whole words, nor up to the slot's end")
        self._separate(mask, "mask")
        return lo, hi

    def _check(self, bitmap: DirtyBitmap, name: str, *, written: bool = False, noted: bool = True) -> None:
        """Raise if an argument isn't a bitmap of the slot's pages, or shares memory with what a verb changes."""
        if not isinstance(bitmap, DirtyBitmap):
            raise TypeError(f"{name} is a DirtyBitmap, not {type(bitmap).__name__}")
        if bitmap.npages != self.npages:
            raise BitmapError(f"the slot has {self.npages} pages, the bitmap {bitmap.npages}")
        uint64s(bitmap.words, name, word_count(self.npages), writable=written, error=BitmapError)
        self._separate(bitmap, name, noted=noted)

    def _separate(self, bitmap: DirtyBitmap, name: str, *, noted: bool = True) -> None:
        if self._apart is not None and self._apart() is bitmap.words:
            return  # a log's own bitmap comes again and again
        own = self._host_dirty.words, self.saved.bitmap.words, *self._leaves.level.values()
        for number, words in enumerate(own):
            if np.may_share_memory(words, bitmap.words):
                what = ("host_dirty", "saved", *(f"level {level}" for level in self._leaves.level))[number]
                separate(words, bitmap.words, f"{name} and the Stage2's {what}", BitmapError)
        if noted:
            self._apart = ref(bitmap.words)
