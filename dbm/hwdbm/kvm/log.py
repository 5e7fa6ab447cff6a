"""A slot's dirty pages: what the kernel's log has of them, and what only this side knows."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from errno import ENOENT

import numpy as np
from numpy.typing import NDArray

from hwdbm.bitmap import DirtyBitmap, word_count
from hwdbm.dirtylog import Lease, Loans
from hwdbm.kvm.device import VmFd
from hwdbm.kvm.ring import DirtyRing, harvest
from hwdbm.memslot import Memslot, slot_name

__all__ = ["BitmapLog", "RingLog", "Rings"]

Lock = AbstractContextManager[bool]


class BitmapLog:
    """A slot's log, collected by GET, and under manual protection by GET and CLEAR.

    Beside the kernel's there are pages that are dirty and that it doesn't know: leases that were rolled back, what
    a migration wrote, and what the host wrote for a device. They are in the next lease.

    Parameters
    ----------
    vm : VmFd
        The VM.
    slot : Memslot
        The slot, as it was created.
    lock : RLock
        One for all of a VM's logs: they are fed from the same rings.
    manual : bool
        Whether the VM has manual protection.

    Attributes
    ----------
    slot : Memslot
        The slot as it is.
    generation : int
        Another one when the log was switched off since.
    """

    def __init__(self, vm: VmFd, slot: Memslot, lock: Lock, *, manual: bool = False) -> None:
        self.slot, self.name, self.generation = slot, slot_name(slot.id), 0
        self.loans = Loans()
        self._vm, self._lock, self._manual = vm, lock, manual
        self._known = DirtyBitmap(slot.npages)  # here only
        self._any = False  # whether any page is: to look at them would take as long as the kernel does

    def mark(self, first_page: int, npages: int) -> None:
        """Mark pages dirty here."""
        with self._lock:
            self._known.set_range(first_page, npages)
            self._any = True

    def put_back(self, pages: DirtyBitmap, first_page: int, generation: int) -> bool:
        """Mark a lease's pages dirty here, unless the log was switched off since."""
        with self._lock:
            if generation != self.generation:
                return False
            if pages.npages:
                self._known.words[first_page >> 6 :] |= pages.words
                self._any = True
            return True

    def forget(self) -> None:
        """Mark no page dirty: the log was switched off."""
        with self._lock:
            self._known.clear()
            self._any = False
            self.generation += 1

    def lend(self) -> Lease:
        """Lend the dirty pages: they are clean now, and whoever writes one is logged.

        Raises
        ------
        OSError
            ENOENT if the slot doesn't log.
        """
        self.loans.take_back(self.put_back)
        with self._lock:
            # KVM flushes the TLBs before GET and CLEAR return, and before RESET does: what is taken here may be copied.
            lease = Lease(self, DirtyBitmap(self.slot.npages), generation=self.generation)
            try:
                words = self._collect()
                if self._any:
                    words |= self._known.words
                    self._known.clear()
                    self._any = False
                lease.bitmap = DirtyBitmap.from_words(words, self.slot.npages)
            except OSError:  # nothing was taken
                raise
            except BaseException:  # an interrupt may have come when bits were in no log: all are dirty, then
                self.mark(0, self.slot.npages)
                raise
            return lease

    def _collect(self) -> NDArray[np.uint64]:
        """Take the bits from the kernel's log."""
        words = np.empty(word_count(self.slot.npages), dtype=np.uint64)
        self._vm.get_dirty_log(self.slot.id, words)
        if self._manual:
            self._vm.clear_dirty_log(self.slot.id, 0, self.slot.npages, words)
        return words


class RingLog(BitmapLog):
    """A slot's log, fed from rings.

    Parameters
    ----------
    vm : VmFd
        The VM.
    slot : Memslot
        The slot, as it was created.
    lock : RLock
        One for all of a VM's logs.
    with_bitmap : bool
        Whether the kernel has a bitmap beside the rings.
    gather : callable
        Brings what is in the VM's rings to the logs, by `note`.
    """

    def __init__(self, vm: VmFd, slot: Memslot, lock: Lock, *, with_bitmap: bool, gather: Callable[[], object]) -> None:
        super().__init__(vm, slot, lock)
        self._with_bitmap, self._gather = with_bitmap, gather

    def note(self, pages: NDArray[np.uint64]) -> None:
        """Mark pages dirty, (n,) in any order, some of them twice."""
        with self._lock:
            octets = self._known.words.view(np.uint8)
            bits = np.left_shift(1, pages & np.uint64(7), dtype=np.uint64).astype(np.uint8)
            np.bitwise_or.at(octets, pages >> np.uint64(3), bits)
            self._any = True

    def _collect(self) -> NDArray[np.uint64]:
        if not self.slot.logging:
            raise OSError(ENOENT, f"{self.name} doesn't log")
        self._gather()
        if self._with_bitmap:
            return super()._collect()
        return np.zeros(word_count(self.slot.npages), dtype=np.uint64)


class Rings:
    """The rings of a VM, and the logs that they feed.

    Parameters
    ----------
    vm : VmFd
        The VM.
    lock : RLock
        The logs'.

    Attributes
    ----------
    rings : list of DirtyRing
        One a vCPU.
    logs : sequence of RingLog
        One a slot.
    """

    def __init__(self, vm: VmFd, lock: Lock) -> None:
        self._vm, self._lock = vm, lock
        self.rings: list[DirtyRing] = []
        self.logs: Sequence[RingLog] = ()
        self._failure: OSError | None = None

    def gather(self) -> int:
        """Bring what is in the rings to the logs. Any thread may call it, that of a vCPU whose ring is full too.

        Returns
        -------
        int
            How many entries there were.

        Raises
        ------
        OSError
            EOVERFLOW or EIO if a ring can't be trusted any more: then, and each time after.
        """
        with self._lock:
            if self._failure is not None:
                raise self._failure
            total, logs = 0, {log.slot.id: log for log in self.logs}
            try:
                for slot, pages in harvest(self._vm, self.rings):
                    total += pages.size
                    if slot in logs:  # one may have gone since
                        logs[slot].note(pages)
            except BaseException as error:  # what was in a ring may be nowhere now
                self._failure = error if isinstance(error, OSError) else None
                for log in self.logs:
                    log.mark(0, log.slot.npages)
                raise
            return total
