"""A slot's dirty pages: what the kernel's log has of them, in its bitmap or in the vCPUs' rings."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
from numpy.typing import NDArray

from hwdbm.kvm.device import VmFd
from hwdbm.kvm.ring import DirtyRing, harvest, recover
from hwdbm.memslot import Memslot
from hwdbm.vm.base import SlotPages

Lock = AbstractContextManager[bool]


class KernelPages(SlotPages):
    """A slot's dirty pages: those of the kernel's log, and those that only this side knows.

    The latter are leases that were rolled back, what a migration wrote, what the host wrote for a device, and what came
    in a ring. KVM flushes the TLBs before GET and CLEAR return, and before RESET does: what is taken may be copied.

    Parameters
    ----------
    vm : VmFd
        The VM.
    slot : Memslot
        The slot, as it was created.
    lock : RLock
        One for all of a VM's logs: they are fed from the same rings.
    bitmap : bool
        Whether the kernel has a bitmap of the slot.
    manual : bool
        Whether that is cleared by CLEAR, and not by GET.
    gather : callable, optional
        Brings what is in the VM's rings to the logs, by `note`; None without rings.
    """

    def __init__(
        self,
        vm: VmFd,
        slot: Memslot,
        lock: Lock,
        *,
        bitmap: bool = True,
        manual: bool = False,
        gather: Callable[[], object] | None = None,
    ) -> None:
        super().__init__(slot, lock)
        self._vm, self._bitmap, self._manual, self._gather = vm, bitmap, manual, gather

    def note(self, pages: NDArray[np.uint64]) -> None:
        """Mark pages dirty, (n,) in any order, some of them twice."""
        with self._lock:
            octets = self._sink().words.view(np.uint8)
            bits = np.left_shift(1, pages & np.uint64(7), dtype=np.uint64).astype(np.uint8)
            np.bitwise_or.at(octets, pages >> np.uint64(3), bits)

    def _collect(self, words: NDArray[np.uint64]) -> None:
        if self._gather is not None:
            self._gather()
        if self._bitmap:
            self._vm.get_dirty_log(self.slot.id, words)
            if self._manual:
                self._vm.clear_dirty_log(self.slot.id, 0, self.slot.npages, words)


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
    logs : list of KernelPages
        One a slot.
    """

    def __init__(self, vm: VmFd, lock: Lock) -> None:
        self._vm, self._lock = vm, lock
        self.rings: list[DirtyRing] = []
        self.logs: list[KernelPages] = []
        self._failure: OSError | None = None
        self._taking = False  # whether pages may be on their way from a ring to a log

    def gather(self) -> int:
        """Move the entries of the rings to the logs. Any thread may call it, also that of a vCPU whose ring is full.

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
            if self._taking:  # an interrupt came: what was read may be in no log, and not be protected anew
                recover(self._vm, self.rings)
                self._mark_all()
            self._taking = True
            total, logs = 0, {log.slot.id: log for log in self.logs}
            try:
                for slot, pages in harvest(self._vm, self.rings):
                    total += pages.size
                    if slot in logs:  # one may have gone since
                        logs[slot].note(pages)
            except OSError as error:  # what was in a ring may be nowhere now
                self._failure = error
                self._mark_all()
                raise
            self._taking = False
            return total

    def _mark_all(self) -> None:
        for log in self.logs:
            log.mark(0, log.slot.npages)
