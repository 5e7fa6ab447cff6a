"""Host: a VM's memory, its memslots, and their dirty log; what it has beside vCPUs."""

import hashlib
import mmap
from contextlib import ExitStack
from dataclasses import replace
from errno import EINVAL, ENOENT
from threading import RLock

import numpy as np
from numpy.typing import NDArray

from hwdbm.dirtylog import Lease
from hwdbm.kvm.abi import DIRTY_LOG_INITIALLY_SET, DIRTY_LOG_MANUAL_PROTECT_ENABLE, Cap
from hwdbm.kvm.device import Kvm
from hwdbm.kvm.log import BitmapLog, RingLog, Rings
from hwdbm.kvm.ring import DirtyRing, enable_ring
from hwdbm.kvm.thread import VcpuThread
from hwdbm.memslot import KVM_MEM_LOG_DIRTY_PAGES, Memslot, slot_name

__all__ = ["Host"]

_PROTECT2 = {
    "off": 0,
    "on": DIRTY_LOG_MANUAL_PROTECT_ENABLE,
    "initially-set": DIRTY_LOG_MANUAL_PROTECT_ENABLE | DIRTY_LOG_INITIALLY_SET,
}
_MAP_NORESERVE = 0x4000  # of both architectures; the module mmap has it from Python 3.13 on


class Host:
    """A VM of the kernel's with memory that is logged. `KvmVm` is one, with a guest.

    Parameters
    ----------
    files : ExitStack
        What closes the kernel's files.
    ring, manual_protect, path
        As for `KvmVm`.

    Attributes
    ----------
    kernel : VmFd
        The VM's file, for requests of one's own.
    page_size : int
        Bytes of a page.

    Raises
    ------
    KvmUnavailableError
        If there is no usable KVM.
    OSError
        The kernel's.
    ValueError
        If a parameter is none that there is, or there are both rings and manual protection.
    """

    def __init__(self, files: ExitStack, *, ring: int | None, manual_protect: str, path: str) -> None:
        if manual_protect not in _PROTECT2:
            raise ValueError(f"manual_protect is one of {', '.join(_PROTECT2)}, not {manual_protect!r}")
        if ring is not None and manual_protect != "off":
            raise ValueError(f"manual_protect={manual_protect!r} is of bitmaps, and the log is of rings")
        self.page_size = mmap.PAGESIZE
        self._files, self._ring, self._manual = files, ring, manual_protect != "off"
        self._lock = RLock()  # of the logs
        self._memory: dict[int, NDArray[np.uint8]] = {}
        self._logs: dict[int, BitmapLog] = {}
        self._threads: list[VcpuThread] = []
        kvm = files.enter_context(Kvm(path))
        self.kernel = files.enter_context(kvm.create_vm())
        self._msrs = kvm.msr_indices() if kvm.arch.msrs else []
        self._rings = Rings(self.kernel, self._lock)
        self._with_bitmap = ring is not None and enable_ring(self.kernel, ring)
        if self._manual:
            self.kernel.enable_cap(Cap.MANUAL_DIRTY_LOG_PROTECT2, _PROTECT2[manual_protect])

    def _add_slot(self, given: Memslot) -> None:
        size = given.npages * self.page_size
        flags = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        memory = np.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=np.uint8)
        slot = replace(given, flags=given.flags & ~KVM_MEM_LOG_DIRTY_PAGES, userspace_addr=memory.ctypes.data)
        self._set_region(slot)
        self._memory[slot.id] = memory
        if self._ring is None:
            self._logs[slot.id] = BitmapLog(self.kernel, slot, self._lock, manual=self._manual)
        else:
            log = RingLog(self.kernel, slot, self._lock, with_bitmap=self._with_bitmap, gather=self._gather)
            self._logs[slot.id] = log
            self._rings.logs = (*self._rings.logs, log)

    def _set_region(self, slot: Memslot) -> None:
        self.kernel.set_memory_region(
            slot=slot.id,
            flags=slot.flags,
            guest_phys_addr=slot.base_gfn * self.page_size,
            memory_size=slot.npages * self.page_size,
            userspace_addr=slot.userspace_addr,
        )

    def _add_vcpu(self) -> None:
        number = len(self._threads)
        vcpu = self._files.enter_context(self.kernel.create_vcpu(number))
        if self._ring is not None:
            self._rings.rings.append(self._files.enter_context(DirtyRing(vcpu, self._ring)))
        self._threads.append(VcpuThread(number, vcpu, None if self._ring is None else self._rings.gather))

    # --- memory --------------------------------------------------------------------------------------------

    @property
    def slots(self) -> tuple[Memslot, ...]:
        """The memslots."""
        return tuple(log.slot for log in self._logs.values())

    def memory(self, slot_id: int) -> NDArray[np.uint8]:
        """Return the bytes of a slot, ``(npages * page_size,)``: a writable view.

        What is written through it isn't logged: `write` is.
        """
        self._log(slot_id)
        return self._memory[slot_id]

    def read(self, gpa: int, length: int) -> bytes:
        """Return bytes of memory, all inside of one slot. Errors are `write`'s."""
        slot, start = self._at(gpa, length)
        return self._memory[slot.id][start : start + length].tobytes()

    def write(self, gpa: int, data: bytes) -> None:
        """Write to memory as a device does, and mark the pages dirty: the kernel doesn't see such a write.

        Raises
        ------
        OSError
            EINVAL if it isn't inside of one slot.
        """
        slot, start = self._at(gpa, len(data))
        first, last = start // self.page_size, (start + max(len(data), 1) - 1) // self.page_size
        with self._lock:  # the write and its mark are one, seen from `dirty`
            self._memory[slot.id][start : start + len(data)] = np.frombuffer(data, dtype=np.uint8)
            if self._logs[slot.id].slot.logging:
                self._logs[slot.id].mark(first, last - first + 1)

    def _at(self, gpa: int, length: int) -> tuple[Memslot, int]:
        for slot in self.slots:
            start = gpa - slot.base_gfn * self.page_size
            if 0 <= start and start + length <= slot.npages * self.page_size:
                return slot, start
        raise OSError(EINVAL, f"gpa {gpa:#x}..{gpa + length - 1:#x} is not inside of one slot")

    def _log(self, slot_id: int) -> BitmapLog:
        if slot_id not in self._logs:
            raise OSError(ENOENT, f"there is no {slot_name(slot_id)}")
        return self._logs[slot_id]

    def digest(self) -> str:
        """Return the SHA-256 of the bytes of all slots, in the order of their addresses, in hexadecimal."""
        digest = hashlib.sha256()
        for slot in sorted(self.slots, key=lambda slot: slot.base_gfn):
            digest.update(self._memory[slot.id].data)
        return digest.hexdigest()

    # --- the log -------------------------------------------------------------------------------------------

    def start_log(self) -> None:
        """Have writes to all slots recorded from now on. What was marked before is dirty still."""
        with self._lock:
            for log in self._logs.values():
                if not log.slot.logging:
                    self._set_flags(log, log.slot.flags | KVM_MEM_LOG_DIRTY_PAGES)

    def stop_log(self) -> None:
        """Stop recording; what was recorded is forgotten, and leases of it are stale."""
        with self._lock:
            logging = [log for log in self._logs.values() if log.slot.logging]
            for log in logging:
                self._set_flags(log, log.slot.flags & ~KVM_MEM_LOG_DIRTY_PAGES)
            if self._ring is not None:
                self._gather()
            for log in logging:
                log.forget()

    def _set_flags(self, log: BitmapLog, flags: int) -> None:
        slot = replace(log.slot, flags=flags)
        self._set_region(slot)
        log.slot = slot

    def dirty(self, slot_id: int) -> Lease:
        """Lend a slot's dirty pages: they are clean then, and whoever writes one is recorded again.

        Returns
        -------
        Lease
            ``commit()`` when its ``bitmap`` was copied, ``rollback()`` when that failed.

        Raises
        ------
        OSError
            ENOENT if there is no such slot or it doesn't log; what a vCPU failed with.
        """
        self._check_vcpus()
        return self._log(slot_id).lend()

    def mark_imported(self, slot_id: int, first_page: int, npages: int) -> None:
        """Mark pages, counted from the slot's first, that a migration wrote: they are dirty, in a log to come too."""
        self._log(slot_id).mark(first_page, npages)

    def _gather(self) -> None:
        """Bring what the vCPUs wrote to the logs of rings."""
        for thread in self._threads:
            thread.flush()
        self._rings.gather()

    def _check_vcpus(self) -> None:
        for thread in self._threads:
            thread.check()
