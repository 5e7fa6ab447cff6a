"""One memslot under a dirty log: its leaves, its bitmap, and the protocol between them.

Every operation holds a range of the slot, and does all of its work under it: clean, publish, flush, take. One rule
makes the order safe: a bit leaves the live bitmap, and a flag the host's, only after a flush that began when its leaf
was clean. So it doesn't matter who cleaned the leaf, and a flush that fails has nothing to undo.
"""

from collections.abc import Callable, Iterable
from errno import EFAULT, ENOENT

import numpy as np
from numpy.typing import NDArray

from hwdbm import pte
from hwdbm.bitmap import DirtyBitmap
from hwdbm.dirtylog.held import HeldSlot, Step
from hwdbm.dirtylog.lease import Flushed, Lease, Unflushed
from hwdbm.dirtylog.modes import LogMode
from hwdbm.dirtylog.stats import Meter
from hwdbm.errors import InvariantError
from hwdbm.granule import Granule
from hwdbm.memslot import Memslot
from hwdbm.stage2 import Stage2

__all__ = ["SlotLog"]


class SlotLog(HeldSlot):
    """The log of one memslot, from its creation to its deletion.

    Parameters
    ----------
    memslot : Memslot
        The slot.
    granule : Granule
        The size of a page.
    mode : LogMode
        How writes are learnt of.
    meter : Meter
        Where flushes and passes are counted; it has the flush hook.

    Attributes
    ----------
    live : DirtyBitmap or None
        The bitmap, while the slot logs. Its words belong to whoever holds their pages.
    generation : int
        Counts the bitmaps that are gone.
    """

    def __init__(self, memslot: Memslot, granule: Granule, mode: LogMode, meter: Meter) -> None:
        super().__init__(memslot, granule)
        self.mode, self.meter = mode, meter
        self.live: DirtyBitmap | None = None
        self.generation = 0

    def logging(self, generation: int | None = None) -> DirtyBitmap:
        """Return the live bitmap.

        Raises
        ------
        OSError
            ENOENT if the slot has none, or not that of `generation` any more.
        """
        if self.live is None or generation not in (None, self.generation):
            raise OSError(ENOENT, f"{self.name} has no dirty bitmap")
        return self.live

    def _flush(self, lo: int, hi: int) -> None:
        self.meter.flush(self.memslot, lo, hi - lo)

    # --- sync, get, clear ----------------------------------------------------------------------------------

    def sync(self, lo: int, hi: int) -> None:
        """Publish what was recorded in a part, clean it, and flush."""
        with self.hold(lo, hi):
            if self.meter.add(self.mode.sync(self.stage2, self.logging(), lo, hi - lo)).words:
                self._flush(lo, hi)

    def get(self, steps: Iterable[Step], *, take: bool) -> Lease:
        """Lend the slot's dirty pages, a step at a time; without `take` only show them (manual protection)."""

        def step(lo: int, hi: int, generation: int) -> Flushed:
            with self.hold(lo, hi):
                live = self.logging(generation)
                publish = self.mode.renew if take else self.mode.peek
                self.meter.add(publish(self.stage2, live, lo, hi - lo))
                # A step begins with a word, and the bits beyond the slot's end are zero: its words are its bitmap.
                pages = DirtyBitmap.from_words(live.words[lo >> 6 : hi + 63 >> 6].copy(), hi - lo)
                unflushed = Unflushed(live, lo, pages, take=take)
                return unflushed.flush(lambda: self._flush(lo, hi))

        return self._lend(steps, step, 0, self.npages)

    def clear(self, steps: Iterable[Step], first: int, npages: int, mask: NDArray[np.uint64]) -> Lease:
        """Lend those of `npages` pages that are dirty and in a mask, and re-protect them.

        Bit 0 of the words in `mask` is page `first`, a multiple of 64. Bits at or beyond the slot's end may be set:
        they never are in the live bitmap.
        """

        def step(lo: int, hi: int, generation: int) -> Flushed:
            with self.hold(lo, hi):
                live = self.logging(generation)
                # Only what was published may go: a leaf whose bit is clear keeps its dirty state for the next GET.
                asked = mask[lo - first >> 6 : hi - first + 63 >> 6]
                cleared = DirtyBitmap.from_words(asked & live.words[lo >> 6 : hi + 63 >> 6], hi - lo)
                if cleared.any():
                    self.meter.add(self.mode.protect(self.stage2, cleared, lo))
                return Unflushed(live, lo, cleared).flush(lambda: self._flush(lo, hi))

        return self._lend(steps, step, first, npages)

    def _lend(self, steps: Iterable[Step], step: Callable[[int, int, int], Flushed], first: int, npages: int) -> Lease:
        generation, receipts = self.generation, list[Flushed]()
        try:
            for lo, hi in steps:
                receipts.append(step(lo, hi, generation))
        except BaseException:
            # The steps before are complete, and their pages were lent: a failed call changes nothing.
            for receipt in receipts:
                if receipt.taken:
                    self.put_back(receipt.pages, receipt.first_page, generation)
            raise
        return Lease(self, receipts, first_page=first, npages=npages, generation=generation)

    def put_back(self, pages: DirtyBitmap, first_page: int, generation: int) -> bool:
        """Set bits in the live bitmap again, unless it isn't that of `generation`; return whether it is."""
        try:
            with self.hold(first_page, first_page + pages.npages):
                live = self.logging(generation)
                start = first_page >> 6
                live.words[start : start + pages.words.size] |= pages.words
        except FileNotFoundError:  # ENOENT: deleted, or its log switched off
            return False
        return True

    # --- leaves --------------------------------------------------------------------------------------------

    def map(self, gfn: int, npages: int, pfn: int | NDArray[np.integer], level: int, *, writable: bool) -> None:
        """Map guest frames as the state of the log wants it, and flush if that replaced a leaf."""
        with self.hold_leaves(lambda: self.pages_at(gfn, npages)) as (lo, hi):
            logs, writable = self.live is not None, writable and not self.memslot.readonly
            if logs and level != 3:
                size = self.stage2.granule.pages_per_entry(level)
                if isinstance(pfn, np.ndarray):
                    pfn = (pfn[:, None] + np.arange(size)).ravel()
                level = 3
            replaces = self.stage2.mapped(lo, hi - lo)
            dbm = logs and writable and self.mode.hardware
            if logs and not self.mode.hardware:
                writable = False  # the first write is to fault
            self.stage2.map(gfn, npages, pfn, level, writable, dbm=dbm)
            if replaces:
                self._flush(lo, hi)

    def unmap(self, gfn: int, npages: int) -> None:
        """Unmap guest frames; what their leaves recorded is saved for both consumers, and the TLB flushed."""
        with self.hold_leaves(lambda: self.pages_at(gfn, npages)) as (lo, hi):
            replaces = self.stage2.mapped(lo, hi - lo)
            self.stage2.unmap(gfn, npages)
            if replaces:
                self._flush(lo, hi)

    def write_fault(self, gfn: int, pfn: int | None) -> None:
        """Resolve a write fault: grant the page, and only then mark it."""
        if self.memslot.readonly:
            raise OSError(EFAULT, f"{self.name} is read-only: no write to gfn {gfn:#x} is granted")
        with self.hold_leaves(lambda: self.pages_at(gfn, 1)) as (page, _):
            s2, live = self.stage2, self.live
            replaces = False
            if pfn is not None:
                replaces = s2.mapped(page, 1)
                s2.map(gfn, 1, pfn)
            elif live is not None and s2.leaf_level(page) in (1, 2):
                replaces = s2.split(gfn, 1) > 0
            if not s2.relax(gfn, dbm=live is not None and self.mode.hardware):
                raise OSError(EFAULT, f"{self.name}: gfn {gfn:#x} has no leaf, and no pfn was given")
            if live is not None:
                live.set_range(page, 1)
            self.meter.fault()
            if replaces:
                self._flush(page, page + 1)

    def mark(self, lo: int, hi: int) -> None:
        """Mark pages that something other than a vCPU wrote, for both consumers."""
        with self.hold(lo, hi):
            self.stage2.host_dirty.set_range(lo, hi - lo)
            if self.live is not None:
                self.live.set_range(lo, hi - lo)

    def take_host_dirty(self) -> DirtyBitmap:
        """Flush, then take the host pages' dirty flags."""
        with self.hold():
            if self.stage2.saved or self.stage2.host_dirty.any():
                self._flush(0, self.npages)
            return self.stage2.take_host_dirty()

    # --- the slot's life -----------------------------------------------------------------------------------

    def start(self, memslot: Memslot, *, full: bool) -> None:
        """Begin to log; with `full` all bits are set, and leaves are left to the CLEARs (INITIALLY_SET)."""
        with self.hold():
            self._start(full=full)
            self.memslot = memslot

    def _start(self, *, full: bool) -> None:
        live = DirtyBitmap(self.npages)
        if full:
            live.fill()
        elif self._mapped():
            self.meter.add(self.mode.start(self.stage2))
            self._flush(0, self.npages)
        self.stage2.take_saved_into(DirtyBitmap(self.npages))  # from before the log: the host has it
        self.live = live

    def stop(self, memslot: Memslot) -> None:
        """End the log: the bitmap is freed, the leaves stay as they are."""
        with self.hold():
            self._stop()
            self.memslot = memslot

    def _stop(self) -> None:
        self.live = None
        self.generation += 1

    def move(self, memslot: Memslot, *, full: bool) -> None:
        """Move the slot: all leaves go, and what they had recorded stays with the bitmap, which stays too.

        `full` is `start`'s, where `memslot` begins to log.
        """
        with self.hold():
            self._unmap_all()
            old, self.stage2 = self.stage2, Stage2(self.npages, memslot.base_gfn, self.stage2.granule)
            self.stage2.host_dirty = old.host_dirty  # the pages behind are the same
            self.memslot = memslot
            if memslot.logging and self.live is None:
                self._start(full=full)
            elif not memslot.logging and self.live is not None:
                self._stop()

    def delete(self) -> None:
        """End the slot. What its leaves had recorded is in the `host_dirty` of the Stage2 that it had."""
        with self.hold():
            self._unmap_all()
            self._stop()
            self._deleted = True

    def _unmap_all(self) -> None:
        s2, mapped = self.stage2, self._mapped()
        s2.unmap(self.memslot.base_gfn, self.npages)
        s2.take_saved_into(DirtyBitmap(self.npages) if self.live is None else self.live)
        if mapped:
            self._flush(0, self.npages)

    def _mapped(self) -> bool:
        return bool(self.stage2.level(1).any())  # above whatever is mapped there is a table, or it is a block

    def switch(self, mode: LogMode) -> None:
        """Change the mode, while vCPUs run."""
        with self.hold():
            if mode is self.mode:
                return
            mapped = self._mapped()
            if mapped:
                self._flush(0, self.npages)  # until here writes went by the old mode's rules
            self.meter.add(self.mode.leave(self.stage2, self.live))
            self.mode = mode
            if mapped:
                self._flush(0, self.npages)

    def verify(self) -> None:
        """Raise `InvariantError` if the leaves and the bitmap can't be what the protocol leaves behind."""
        with self.hold():
            s2, slot = self.stage2, self.memslot
            s2.verify()
            if (s2.base_gfn, s2.npages) != (slot.base_gfn, slot.npages):
                raise InvariantError(f"{self.name}: {s2!r} isn't where the slot is, gfn {slot.base_gfn:#x}")
            if slot.logging != (self.live is not None):
                raise InvariantError(f"{self.name}: flags {slot.flags:#x}, and bitmap {self.live!r}")
            if slot.readonly:
                self._none(s2.scan(pte.writable) | s2.scan(pte.tracked), "may be written, in a read-only slot")
            if self.live is not None:
                self.live.verify()
                self._none(self.mode.unrecorded(s2) - self.live, "may be written unrecorded, and isn't dirty")

    def _none(self, pages: DirtyBitmap, what: str) -> None:
        if pages.any():
            page = int(pages.pages()[0])
            raise InvariantError(f"{self.name}: gfn {self.memslot.base_gfn + page:#x} {what}")
