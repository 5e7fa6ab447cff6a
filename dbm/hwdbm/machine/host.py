"""Host: what the VMM has of a machine, its memory and memslots, and what it does with them besides the vCPUs."""

import os
from collections.abc import Sequence
from errno import EINVAL

import numpy as np
from numpy.typing import NDArray

from hwdbm.dirtylog import DirtyLog
from hwdbm.layout import Layout
from hwdbm.machine.clock import Clock
from hwdbm.machine.faults import FaultHandler
from hwdbm.machine.frames import FramePool, Frames
from hwdbm.machine.region import Region
from hwdbm.machine.space import AddressSpace
from hwdbm.machine.vcpu import VCpu
from hwdbm.memslot import KVM_MEM_READONLY, Memslot
from hwdbm.stage2 import Stage2
from hwdbm.vm.memory import GuestMemory, digest

__all__ = ["Host"]

_HVA = 1 << 46  # where backings get their numbers from, if the caller has none: no byte is ever there


class Host:
    """The memory of a machine.

    Parameters
    ----------
    log : DirtyLog
        The dirty log.
    clock : Clock
        Where flushes are counted.
    space : AddressSpace
        The guest's physical memory, empty.
    faults : FaultHandler
        Who has the ``mmu_lock``.
    vcpus : sequence of VCpu
        Who caches leaves.
    """

    def __init__(
        self, log: DirtyLog, clock: Clock, space: AddressSpace, faults: FaultHandler, vcpus: Sequence[VCpu]
    ) -> None:
        self.log, self.clock, self.space, self.faults = log, clock, space, faults
        self.vcpus = tuple(vcpus)
        self._pool = FramePool()

    # --- memory --------------------------------------------------------------------------------------------

    def add_memslot(
        self,
        size: int,
        gpa: int | None = None,
        *,
        slot: int | None = None,
        readonly: bool = False,
        hva: int | None = None,
        memory_image: str | os.PathLike[str] | None = None,
        shared: bool = False,
    ) -> Memslot:
        """Add a memslot with memory of its own behind it.

        Parameters
        ----------
        size : int
            In bytes, a multiple of the page.
        gpa : int, optional
            Where the guest sees it; by default after the last slot, aligned to a block.
        slot : int, optional
            Its id; by default the next.
        readonly : bool
            Whether the guest may only read.
        hva : int, optional
            Where the VMM has the backing, a multiple of the page: an opaque number. Blocks are mapped only if it is
            the same as `gpa` modulo their size, as it is by default.
        memory_image : path-like, optional
            A file to load the memory from.
        shared : bool
            Whether each page is shared with others until it is written (copy on write).

        Returns
        -------
        Memslot
            The slot.

        Raises
        ------
        OSError
            By the rules of `hwdbm.DirtyLog.set_memory_region`; EINVAL for an image that is larger, and whatever
            reading it raises.
        """
        granule = self.log.granule
        block = granule.page_size * granule.pages_per_entry(2)
        if gpa is None:
            gpa = max((-(-region.end // block) * block for region in self.space.regions), default=0)
        slot = max((known.id + 1 for known in self.log.memslots), default=0) if slot is None else slot
        if any(region.id == slot for region in self.space.regions):
            raise OSError(EINVAL, f"slot {slot} is there already")
        if hva is None:
            hva = _HVA + (slot << 36) + gpa % block
        if size <= 0:
            raise OSError(EINVAL, f"slot {slot}: memory_size {size} is not positive")
        flags = KVM_MEM_READONLY if readonly else 0
        self.log.set_memory_region(slot, flags, gpa, size, hva)
        try:
            memory = GuestMemory(size, f"hwdbm-slot{slot}")
            if memory_image is not None:
                memory.load(memory_image)
        except BaseException:
            self.log.set_memory_region(slot, 0, gpa, 0, hva)
            raise
        layout = Layout(size >> granule.page_shift, gpa >> granule.page_shift, granule)
        frames = Frames(layout, self._pool, hva >> granule.page_shift)
        if shared:
            frames.share(0, layout.npages)
        for vcpu in self.vcpus:
            vcpu.attach(slot, layout)
        self.space.add(Region(slot, gpa, size, hva, readonly, memory, frames))
        return self.log.slot(slot)

    @property
    def page_size(self) -> int:
        """Bytes in a page."""
        return self.log.granule.page_size

    @property
    def slots(self) -> tuple[Memslot, ...]:
        """The memslots in the order of their ids."""
        return self.log.memslots

    def memory(self, slot: int) -> NDArray[np.uint8]:
        """Return the bytes of a slot, a writable view. Who writes there says so: `mark_imported`, or uses `write`."""
        return self.space.find(slot).memory.view

    def read(self, gpa: int, length: int) -> bytes:
        """Return bytes, as a device or the VMM reads them: no leaf is looked at.

        Raises
        ------
        OSError
            EFAULT where a byte is in no slot.
        """
        parts = self.space.runs(gpa, length)
        return b"".join(region.memory.view[at : at + count].tobytes() for region, at, _, count in parts)

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Write bytes, as a device or the VMM does, and mark the pages in the log. It may write read-only slots.

        A shared page becomes a private one first, and the guest's leaf of the old frame goes.

        Raises
        ------
        OSError
            EFAULT where a byte is in no slot. Nothing is written then.
        """
        raw = np.frombuffer(data, dtype=np.uint8)
        for region, at, done, count in self.space.runs(gpa, raw.size):
            first, stop = at // self.page_size, (at + count - 1) // self.page_size + 1
            if region.frames.shared[first:stop].any():
                self._unshare(region, first + np.flatnonzero(region.frames.shared[first:stop]))
            region.memory.view[at : at + count] = raw[done : done + count]
            self.log.mark_dirty(region.id, first, stop - first)  # after the bytes: a copy made before would lack them

    def digest(self) -> str:
        """Return the SHA-256 of all memory, the slots in the order of their addresses, in hex."""
        return digest(region.memory.view for region in self.space.regions)

    # --- the host ------------------------------------------------------------------------------------------

    def share(self, slot: int, first_page: int, npages: int) -> None:
        """Let others have some pages too (KSM, a fork): the guest's leaves become read-only, and a write copies.

        What the leaves had recorded is saved first.
        """
        region = self.space.find(slot)
        with self.faults.mmu_lock:
            region.frames.share(first_page, npages)
            self.log.change(slot, first_page, npages, _wrprotect)

    def reclaim(self, slot: int, first_page: int, npages: int) -> None:
        """Take frames away (migration of pages, swap): the leaves go, and the next touch finds other frames.

        What the leaves had recorded is saved first.
        """
        region = self.space.find(slot)
        with self.faults.mmu_lock:
            self.log.unmap(slot, self.log.slot(slot).base_gfn + first_page, npages)
            region.frames.renew(np.arange(first_page, first_page + npages))

    def _unshare(self, region: Region, pages: NDArray[np.int64]) -> None:
        with self.faults.mmu_lock:
            pages = pages[region.frames.shared[pages]]
            base = self.log.slot(region.id).base_gfn
            for page in pages.tolist():
                self.log.unmap(region.id, base + page, 1)
            region.frames.renew(pages)

    def flush(self, slot: Memslot, first_page: int, npages: int) -> None:
        """Invalidate what any vCPU has cached of some pages. No access through it is under way when this returns."""
        for vcpu in self.vcpus:
            vcpu.flush(slot.id, first_page, npages)
        self.clock.add(flushes=1)


def _wrprotect(s2: Stage2, first: int, count: int) -> int:
    return s2.wrprotect(s2.base_gfn + first, count)
