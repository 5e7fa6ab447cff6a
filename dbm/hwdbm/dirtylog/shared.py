"""SharedStage2: a Stage2 that threads work on in parallel, each on a part of its own.

A part is a range of whole words of the slot's bitmaps, or ends with the slot. Who owns which part is for the owner's
locks to say (`hwdbm.DirtyLog` has them). What remains to be settled here is what parts have in common: a block that
reaches into several, and `saved`. A block is changed under one lock, and whatever it recorded for pages outside of the
part goes to `saved`, never into words that another thread may be writing.
"""

from collections.abc import Callable

import numpy as np

from hwdbm import kernels, pte
from hwdbm.bitmap import DirtyBitmap
from hwdbm.kernels import Tally
from hwdbm.stage2 import Stage2

__all__ = ["SharedStage2"]

ByLevel = Callable[[int], pte.Update]


class SharedStage2(Stage2):
    """A Stage2 with the verbs that a dirty log needs, on parts of the slot.

    Parameters are `Stage2`'s. Calls of `harvest_into` and of the verbs defined here may run in parallel threads on
    disjoint parts. So may `map`, `unmap` and `split`, on parts that also end where leaves do.

    Examples
    --------
    >>> s2 = SharedStage2(130)
    >>> s2.map(0, 130, pfn=0, dbm=True)
    >>> s2.relax(129, dbm=True)  # the guest wrote the page, and took a fault
    True
    >>> out = DirtyBitmap(130)
    >>> s2.peek_into(out, 128, 2).read, out.pages(), s2.dirty().pages()
    (4, array([129]), array([129]))
    >>> s2.track_part(DirtyBitmap.from_pages([1], 2), 128).changed, s2.dirty().any()
    (1, False)
    """

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
            What was read; its `words` are those that came from `saved`.

        Raises
        ------
        GfnError
            If the part isn't inside of the slot.
        BitmapError
            If `out` has another size.
        """
        lo, hi = self._pages(first, npages)
        self._check(out)
        read = self._tables_alone(lo, hi)
        if read is None:
            read = self._leaves.scan(pte.dirty, lo, hi, out)
        else:
            runs = self._leaves.table_runs(lo, hi)
            kernels.active().scan(self.level(3), runs, pte.dirty(3), out.words)
            read += int((runs[:, 1] - runs[:, 0]).sum())
        return self.take_saved_into(out, lo, hi - lo) + Tally(read=read)

    def take_saved_into(self, out: DirtyBitmap, first: int = 0, npages: int | None = None) -> Tally:
        """Move what is in `saved` to `out` and `host_dirty`, and look at no leaf. As `peek_into` otherwise."""
        lo, hi = self._pages(first, npages)
        self._check(out)
        with self._lock:
            return Tally(words=self.saved.take(lo, hi, out, self.host_dirty))

    def track_part(self, mask: DirtyBitmap, first: int = 0) -> Tally:
        """Have writes to the pages in a mask recorded anew: untracked and writable-dirty become writable-clean.

        `enable_dbm` and `clean` of the mask in one pass. What the pages in the mask recorded is dropped from the
        log's side, and reaches `host_dirty`; what a block recorded for others is kept in `saved`.

        Parameters
        ----------
        mask : DirtyBitmap
            The pages; bit 0 is page `first`.
        first : int
            A multiple of 64. The mask's size is one too, or it ends with the slot.

        Returns
        -------
        Tally
            What was read and changed.

        Raises
        ------
        GfnError
            If the part isn't inside of the slot.
        """
        self._pages(first, mask.npages)
        tally = self._rewrite_part(pte.track, mask, first)
        with self._lock:
            self.saved.drop(mask, first, self.host_dirty)
        return tally

    def wrprotect_part(self, mask: DirtyBitmap, first: int = 0) -> Tally:
        """Make the leaves of the pages in a mask read-only, and no other leaf.

        A block is a leaf: with any of its pages in the mask it becomes read-only as a whole, and what it recorded
        for others is kept in `saved`. Parameters, return and errors are `track_part`'s.
        """
        self._pages(first, mask.npages)
        # DBM goes first: from then on hardware marks nothing, and S2AP[1] alone says what may have been written.
        tally = self._rewrite_part(pte.clear_dbm, mask, first, written=False)
        tally += self._rewrite_part(pte.wrprotect, mask, first)
        with self._lock:
            self.saved.drop(mask, first, self.host_dirty)
        return tally

    def relax(self, gfn: int, *, dbm: bool = False) -> bool:
        """Let the guest write a page, as the handler of a write fault does once the host has agreed.

        The page counts as dirty from here on, and the caller marks it. (KVM: ``kvm_pgtable_stage2_relax_perms``.)

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
        level = self.leaf_level(page)
        if level is None:
            return False
        entries, index = self.level(level), self.layout.index(level, page)
        update = pte.relax_dirty if dbm else pte.relax
        entries[index] = update(level)(int(entries[index]))
        return True

    def leaf_level(self, page: int) -> int | None:
        """Return the level of the leaf that maps a page, counted from the slot's first, or None."""
        for level in (3, 2, 1):
            if pte.leaf(level)(int(self.level(level)[self.layout.index(level, page)])):
                return level
        return None

    def mapped(self, first: int, npages: int) -> bool:
        """Return whether any page of a part has a leaf, or a level-3 entry that isn't zero."""
        lo, hi = self._pages(first, npages)
        runs = self._leaves.table_runs(lo & ~63, min(hi + 63 & ~63, self.npages))
        return any(self._leaves.blocks(level, lo, hi).size for level in (1, 2)) or any(
            self.level(3)[max(start, lo) : min(stop, hi)].any() for start, stop in runs.tolist()
        )

    def _rewrite_part(self, update: ByLevel, mask: DirtyBitmap, first: int, *, written: bool = True) -> Tally:
        """Apply `update` to the leaves of at least one page in `mask`.

        With `written` those that change may have been: the host is told, and blocks are saved whole.
        """
        lo, hi = first, first + mask.npages
        host = self.host_dirty if written else DirtyBitmap(self.npages)
        tally = Tally()
        with self._lock:
            read = self._tables_alone(lo, hi)
            if read is not None:
                tally = Tally(read=read)
            for level in (1, 2) if read is None else ():
                counts, spans = self._leaves.rewrite_blocks(level, update(level), lo, hi, mask)
                tally += counts
                if len(spans):
                    kernels.active().fill(host.words, np.clip(spans, lo, hi))
                if len(spans) and written:
                    self.saved.mark(np.clip(spans, 0, self.npages))
        return tally + self._leaves.rewrite_masked(update(3), mask, host, first)

    def _harvest_blocks(self, lo: int, hi: int, out: DirtyBitmap) -> Tally:
        read = self._tables_alone(lo, hi)
        return super()._harvest_blocks(lo, hi, out) if read is None else Tally(read=read)

    def _tables_alone(self, lo: int, hi: int) -> int | None:
        """Return how many entries above level 3 touch a part, or None if any is a block.

        While a slot logs, most often none is, and a short step has better things to do than to ask each entry twice.
        """
        read = 0
        for level in (1, 2):
            entries = self.level(level)[self.layout.entries(level, lo, hi)]
            tables = int(np.bitwise_and.reduce(entries)) & pte.TABLE == pte.TABLE  # faster than to ask what is a block
            if not tables and pte.leaf(level)(entries).any():
                return None
            read += entries.size
        return read

    def _save(self, lo: int, hi: int, *, untracked: bool = False) -> None:
        # Stage2 has one owner, and notes what it saved without a lock.
        with self._lock:
            super()._save(lo, hi, untracked=untracked)
