"""LoggedMemory: a VM's memslots, each under a log; what changes them, and who writes to them.

`hwdbm.DirtyLog` adds the verbs of the log itself.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from errno import EINVAL
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from hwdbm.bitmap import DirtyBitmap
from hwdbm.dirtylog.modes import HARDWARE, SOFTWARE
from hwdbm.dirtylog.slot import SlotLog
from hwdbm.dirtylog.stats import FlushHook, Meter, Stats
from hwdbm.granule import Granule
from hwdbm.memslot import Change, Memslot, Memslots
from hwdbm.stage2 import Stage2

__all__ = ["LoggedMemory"]


class LoggedMemory:
    """The memslots of a VM, each with its leaves and its bitmap.

    Parameters
    ----------
    table : Memslots
        The memslots, none yet.
    hw_dbm, manual_protect, initially_set, flush
        As for `hwdbm.DirtyLog`.

    Raises
    ------
    OSError
        EINVAL for `initially_set` without `manual_protect`.
    """

    def __init__(
        self, table: Memslots, *, hw_dbm: bool, manual_protect: bool, initially_set: bool, flush: FlushHook | None
    ) -> None:
        if initially_set and not manual_protect:
            raise OSError(EINVAL, "INITIALLY_SET is valid with MANUAL_PROTECT_ENABLE only")
        self._table = table
        self._slots: dict[int, SlotLog] = {}
        self._slots_lock = Lock()  # KVM's: whoever changes the set of slots, or what holds for all of them
        self._meter = Meter(flush)
        self._mode = HARDWARE if hw_dbm else SOFTWARE
        self._manual, self._initially_set = manual_protect, initially_set

    def __repr__(self) -> str:
        mode = "hardware DBM" if self.hw_dbm else "write-protection"
        return f"<DirtyLog: {len(self._slots)} slots, {mode}{', manual' if self._manual else ''}>"

    # --- what there is -------------------------------------------------------------------------------------

    @property
    def granule(self) -> Granule:
        """The size of a page."""
        return self._table.granule

    @property
    def hw_dbm(self) -> bool:
        """Whether the MMU records writes."""
        return self._mode.hardware

    @property
    def manual_protect(self) -> bool:
        """Whether GET only shows, and CLEAR alone clears."""
        return self._manual

    @property
    def initially_set(self) -> bool:
        """Whether a log begins with all bits set."""
        return self._initially_set

    @property
    def stats(self) -> Stats:
        """What was done so far: flushes, leaves read, words written."""
        return self._meter.stats

    @property
    def memslots(self) -> tuple[Memslot, ...]:
        """The slots in the order of their ids."""
        with self._slots_lock:
            return self._table.all()

    def slot(self, slot: int) -> Memslot:
        """Return a slot by its id, ``as_id << 16 | id``.

        Raises
        ------
        OSError
            EINVAL if the id is out of range, ENOENT if there is no such slot. So does every method with a slot.
        """
        return self._find(slot).memslot

    def stage2(self, slot: int) -> Stage2:
        """Return a slot's leaves. A move puts others there, and after a delete they are the caller's.

        Raises
        ------
        OSError
            As `slot`.
        """
        return self._find(slot).stage2

    def slot_log(self, slot: int) -> SlotLog:
        """Return what keeps a slot's log, for verbs that have to hold many pages once: leaves, bitmap, mode and meter.

        The rules are those of `locked`; bits are set and leaves changed under one hold.

        Raises
        ------
        OSError
            As `slot`.
        """
        return self._find(slot)

    def _find(self, slot: int) -> SlotLog:
        found = self._slots.get(slot)
        return self._slots[self._table.find(slot).id] if found is None else found

    # --- memslots and capabilities -------------------------------------------------------------------------

    def set_memory_region(
        self, slot: int, flags: int, guest_phys_addr: int, memory_size: int, userspace_addr: int
    ) -> Change:
        """Create, delete, move or change a slot (``KVM_SET_USER_MEMORY_REGION``).

        A log that begins finds all pages clean, whatever was written before, or with `initially_set` all dirty. One
        that ends loses its bitmap; so does a slot that is deleted. A slot that moves keeps it, and loses its leaves,
        after what they had recorded was put there.

        Parameters
        ----------
        slot : int
            ``as_id << 16 | id``.
        flags : int
            1 (``KVM_MEM_LOG_DIRTY_PAGES``) and 2 (``KVM_MEM_READONLY``).
        guest_phys_addr, memory_size : int
            Bytes, multiples of the page. A size of 0 deletes the slot.
        userspace_addr : int
            An address in the VMM, a multiple of the page: the identity of the backing. It is not followed.

        Returns
        -------
        Change
            What was done.

        Raises
        ------
        OSError
            EINVAL, EEXIST or EFAULT, by the rules of `Memslots.plan`.
        """
        with self._slots_lock:
            plan = self._table.plan(slot, flags, guest_phys_addr, memory_size, userspace_addr)
            old, new = plan.old, plan.new
            if old is None and new is not None:
                found = SlotLog(new, self.granule, self._mode, self._meter)
                if new.logging:
                    found.start(new, full=self._initially_set)
                self._slots[slot] = found
            elif new is None:
                self._slots[slot].delete()
                del self._slots[slot]
            elif plan.change is Change.MOVE:
                self._slots[slot].move(new, full=self._initially_set)
            elif plan.change is Change.FLAGS_ONLY and new.logging:
                self._slots[slot].start(new, full=self._initially_set)
            elif plan.change is Change.FLAGS_ONLY:
                self._slots[slot].stop(new)
            self._table.commit(plan)
            return plan.change

    def enable_manual_protect(self, initially_set: bool = False) -> None:
        """Let CLEAR alone clear, and GET only show (``KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2``).

        Parameters
        ----------
        initially_set : bool
            Whether the logs that begin from now on do so with all bits set (``KVM_DIRTY_LOG_INITIALLY_SET``). Their
            leaves are then armed or write-protected by the CLEARs, and not all at once.
        """
        with self._slots_lock:
            self._manual, self._initially_set = True, initially_set

    def set_hw_dirty_log(self, enable: bool) -> None:
        """Switch between hardware DBM and write-protection while the VM runs (v2's ``KVM_CAP_ARM_HW_DIRTY_LOG``).

        Slots are switched one after the other, each under a lock of the whole of it. If a flush fails, those before are
        switched, and a further call does the rest.

        Parameters
        ----------
        enable : bool
            Whether the MMU is to record. The VM's VTCR_EL2.HD is the caller's: on before this enables, and off
            after it disabled.
        """
        mode = HARDWARE if enable else SOFTWARE
        with self._slots_lock:
            for slot in sorted(self._slots):
                self._slots[slot].switch(mode)
            self._mode = mode

    # --- who writes ----------------------------------------------------------------------------------------

    def map(
        self,
        slot: int,
        gfn: int,
        npages: int,
        pfn: int | NDArray[np.integer],
        level: int = 3,
        writable: bool = True,
    ) -> None:
        """Map guest frames, in place of whatever was there, in the way that the slot's log needs.

        While the slot logs, what would be blocks is mapped as pages, as KVM does; writable leaves are writable-clean
        with hardware DBM, and read-only without, so that the first write faults. While it doesn't, they are
        untracked. In a read-only slot none is writable.

        Parameters
        ----------
        slot : int
            The slot's id.
        gfn, npages, pfn, level, writable
            As for `hwdbm.Stage2.map`.

        Raises
        ------
        OSError
            As `slot`.
        GfnError
            If the range or a frame is outside of its space or misaligned. Nothing is changed then.
        """
        self._find(slot).map(gfn, npages, pfn, level, writable=writable)

    def unmap(self, slot: int, gfn: int, npages: int) -> None:
        """Remove the leaves of a range. What they recorded is kept for the log and the host, and the TLB flushed.

        Raises
        ------
        OSError
            As `slot`.
        GfnError
            If the range isn't inside of the slot.
        """
        self._find(slot).unmap(gfn, npages)

    def write_fault(self, slot: int, gfn: int, pfn: int | None = None) -> None:
        """Resolve a guest's write fault on a page that the host lets it write, and log the write.

        The leaf becomes writable: untracked, or while the slot logs with hardware DBM writable-dirty. While it logs a
        block is split first. The page is marked only when that has been done.

        Parameters
        ----------
        slot : int
            The slot's id.
        gfn : int
            The guest frame that was written.
        pfn : int, optional
            The physical frame to map there: where there is no leaf, or after a copy on write. By default the leaf
            that is there is relaxed.

        Raises
        ------
        OSError
            As `slot`; EFAULT if the slot is read-only, or there is neither a leaf nor a `pfn`.
        GfnError
            If `gfn` isn't inside of the slot, or `pfn` not of 48 address bits.
        """
        self._find(slot).write_fault(gfn, pfn)

    def mark_dirty(self, slot: int, first_page: int, npages: int = 1) -> None:
        """Mark pages that something other than a vCPU wrote: the VMM, a device, an import.

        The log hears of it while the slot logs, the host always.

        Raises
        ------
        OSError
            As `slot`.
        GfnError
            If the pages, counted from the slot's first, aren't inside of it.
        """
        found = self._find(slot)
        found.mark(*found.pages(first_page, npages))

    def mark_dirty_range(self, slot: int, gpa: int, length: int) -> None:
        """Mark each page that any of `length` bytes at a guest physical address touches. As `mark_dirty` otherwise.

        Examples
        --------
        >>> from hwdbm import DirtyLog
        >>> log = DirtyLog()
        >>> log.set_memory_region(0, 1, 0x10000, 0x10000, 0)
        <Change.CREATE: 'create'>
        >>> log.mark_dirty_range(0, 0x10FFF, 2)
        >>> log.get_dirty_log(0).pages()
        array([0, 1])
        """
        found, shift = self._find(slot), self.granule.page_shift
        first = gpa >> shift
        stop = gpa + length + self.granule.page_size - 1 >> shift if length > 0 else first
        found.mark(*found.pages_at(first, stop - first if length >= 0 else length))

    @contextmanager
    def locked(self, slot: int, first_page: int = 0, num_pages: int | None = None) -> Iterator[Stage2]:
        """Hold pages of a slot for the length of a ``with`` block, to change their leaves directly.

        They are held out to where leaves end, so that blocks can be split. Within the block no method of this log may
        be called for them. The TLB is the caller's to flush.

        Parameters
        ----------
        slot : int
            The slot's id.
        first_page, num_pages : int
            The pages, counted from the slot's first; by default all from there on.

        Yields
        ------
        Stage2
            The slot's leaves.

        Raises
        ------
        OSError
            As `slot`.
        GfnError
            If the pages aren't inside of the slot.
        """
        found = self._find(slot)
        count = found.npages - first_page if num_pages is None else num_pages
        with found.hold_leaves(lambda: found.pages(first_page, count)):
            yield found.stage2

    def take_host_dirty(self, slot: int) -> DirtyBitmap:
        """Return the host pages' dirty flags and clear them, after a flush: what they say may be written back.

        Raises
        ------
        OSError
            As `slot`.
        """
        return self._find(slot).take_host_dirty()

    # --- checking ------------------------------------------------------------------------------------------

    def verify(self) -> None:
        """Raise `InvariantError` if a slot's leaves and bitmap contradict each other.

        Besides `Stage2.verify` and clean tails: while a slot logs, every page that the guest may write unrecorded is
        dirty in the log, and a read-only slot has no writable leaf.
        """
        with self._slots_lock:
            for slot in sorted(self._slots):
                self._slots[slot].verify()
