"""Machine: a modelled VM, with memory, memslots under a dirty log, and vCPUs that write."""

from types import TracebackType
from typing import Self

from hwdbm.dirtylog import DirtyLog, Lease
from hwdbm.granule import Granule
from hwdbm.machine.blocks import BlockKeeper, Blocks
from hwdbm.machine.clock import Clock, Costs
from hwdbm.machine.faults import FaultHandler
from hwdbm.machine.host import Host
from hwdbm.machine.runner import VCpuRunner
from hwdbm.machine.running import Running
from hwdbm.machine.space import AddressSpace
from hwdbm.machine.vcpu import VCpu
from hwdbm.memslot import KVM_MEM_LOG_DIRTY_PAGES, Memslot

__all__ = ["Machine"]

_NEEDS_HA = "hardware DBM needs the hardware's access flag (VTCR_EL2.HD without HA is ignored)"


class Machine(Host, Running):
    """A VM whose stage-2 tables, TLBs and faults are modelled, and whose memory is real.

    It is a source of migrations, too.

    Parameters
    ----------
    granule : Granule
        The size of a page.
    hw_dbm : bool
        Whether the MMU records writes. Otherwise they are write-protected, and fault.
    manual_protect, initially_set, step_pages
        As for `hwdbm.DirtyLog`.
    thp : bool
        Whether what the guest touches is mapped by blocks where they fit.
    blocks : Blocks or str
        How blocks are logged: ``write`` splits one at the first write to it, ``eager`` all when the log starts,
        ``track`` none.
    chunk_pages : int, optional
        Pages that are split or collapsed together, a multiple of a block's; by default 64 blocks.
    vcpus : int
        How many there are.
    tlb_entries : int, optional
        Leaves of a slot that a vCPU caches at most; by default all that it uses.
    ha : bool
        Whether the MMU sets AF. Hardware DBM needs it.
    seed : int
        Of what a full TLB forgets.
    costs : Costs
        What the clock counts with.

    Attributes
    ----------
    log : DirtyLog
        The dirty log, a `hwdbm.DirtyLog`. Its flush is the machine's.
    vcpus : tuple of VCpu
        The vCPUs.
    clock : Clock
        What was done so far.

    Raises
    ------
    ValueError
        If an option is out of range.

    Examples
    --------
    >>> import numpy as np
    >>> machine = Machine()
    >>> slot = machine.add_memslot(1 << 20, gpa=0x4000_0000)
    >>> machine.start_log()
    >>> machine.vcpus[0].store(np.array([0x4000_3000, 0x4000_5008]), np.array([1, 2], dtype=np.uint64))
    >>> machine.write(0x4000_7FFF, b"ab")
    >>> with machine.dirty(slot.id) as lease:
    ...     lease.bitmap.pages()
    array([3, 5, 7, 8])
    >>> machine.read(0x4000_7FFF, 2), machine.clock.read().counts["translation_faults"]
    (b'ab', 2)
    >>> machine.write(0x4010_0000, b"!")
    Traceback (most recent call last):
    OSError: [Errno 14] 1 bytes at gpa 0x40100000 can't be reached: no slot is at 0x40100000
    >>> machine.close()
    """

    kind = "machine"
    """What a migration asks whether two VMs fit."""

    def __init__(
        self,
        *,
        granule: Granule = Granule.K4,
        hw_dbm: bool = True,
        manual_protect: bool = False,
        initially_set: bool = False,
        step_pages: int | None = None,
        thp: bool = True,
        blocks: Blocks | str = Blocks.WRITE,
        chunk_pages: int | None = None,
        vcpus: int = 1,
        tlb_entries: int | None = None,
        ha: bool = True,
        seed: int = 0,
        costs: Costs | None = None,
    ) -> None:
        block = granule.pages_per_entry(2)
        chunk = 64 * block if chunk_pages is None else chunk_pages
        if chunk < block or chunk % block:
            raise ValueError(f"a chunk is a positive multiple of a block's {block} pages, not {chunk}")
        if vcpus < 1:
            raise ValueError(f"a machine has 1 vCPU or more, not {vcpus}")
        if hw_dbm and not ha:
            raise ValueError(_NEEDS_HA)
        policy = Blocks(blocks)
        log = DirtyLog(
            granule=granule,
            hw_dbm=hw_dbm,
            manual_protect=manual_protect,
            initially_set=initially_set,
            step_pages=step_pages,
            flush=self.flush,
        )
        clock = Clock(Costs() if costs is None else costs, lambda: log.stats)
        space = AddressSpace(granule)
        faults = FaultHandler(log, clock, thp=thp, split_blocks=policy is not Blocks.TRACK)
        made = [
            VCpu(
                number,
                space,
                log,
                faults,
                clock,
                tlb_entries=tlb_entries,
                seed=seed + (number << 16),
                ha=ha,
                hd=hw_dbm,
            )
            for number in range(vcpus)
        ]
        Host.__init__(self, log, clock, space, faults, made)
        Running.__init__(self, [VCpuRunner(vcpu, space) for vcpu in made])
        self._keeper = BlockKeeper(log, policy, chunk, clock.add)

    def __repr__(self) -> str:
        size = sum(region.size for region in self.space.regions)
        return f"<Machine: {len(self.vcpus)} vCPUs, {size >> 20} MiB in {len(self.slots)} slots, {self.log!r}>"

    # --- the log -------------------------------------------------------------------------------------------

    def start_log(self) -> None:
        """Begin to log all slots; what becomes of blocks, `blocks` says. A slot that logs goes on."""
        for slot in self.slots:
            if not slot.logging:
                self._set_flags(slot, slot.flags | KVM_MEM_LOG_DIRTY_PAGES)
                with self.faults.mmu_lock:
                    self._keeper.started(slot.id)

    def stop_log(self, *, collapse: bool = True) -> None:
        """End the log of all slots.

        Parameters
        ----------
        collapse : bool
            Whether leaves become what they would be without a log, blocks where they fit. Otherwise they stay as they
            are, as on KVM's arm64.
        """
        for slot in self.slots:
            if slot.logging:
                self._set_flags(slot, slot.flags & ~KVM_MEM_LOG_DIRTY_PAGES)
                if collapse:
                    with self.faults.mmu_lock:
                        self._keeper.stopped(slot.id, self.space.find(slot.id).frames)

    def _set_flags(self, slot: Memslot, flags: int) -> None:
        region = self.space.find(slot.id)
        self.log.set_memory_region(slot.id, flags, region.gpa, region.size, region.hva)

    def split(self, slot: int, first_page: int = 0, npages: int | None = None) -> int:
        """Split the blocks that touch some pages, and return how many there were."""
        npages = self.log.slot(slot).npages - first_page if npages is None else npages
        with self.faults.mmu_lock:
            return self._keeper.split(slot, first_page, npages)

    def dirty(self, slot: int) -> Lease:
        """Lend a slot's dirty pages: they were collected, are clean now, and no vCPU can write them unrecorded.

        Returns
        -------
        Lease
            ``commit()`` when its ``bitmap`` was copied, ``rollback()`` when that failed.

        Raises
        ------
        OSError
            ENOENT if the slot doesn't log.
        """
        self._split_for(slot)
        return self.log.lend(slot)

    def _split_for(self, slot: int) -> None:
        """Split what a CLEAR would otherwise arm as blocks: where a log begins with all bits set, nobody has yet."""
        if self.log.initially_set and self._keeper.policy is not Blocks.TRACK:
            self.split(slot)

    def mark_imported(self, slot: int, first_page: int, npages: int) -> None:
        """Mark pages that an import has written: they are dirty here."""
        self.log.mark_dirty(slot, first_page, npages)

    def set_hw_dirty_log(self, enable: bool) -> None:
        """Switch between hardware DBM and write-protection while the VM runs.

        Raises
        ------
        ValueError
            If it is to be enabled, and the MMU doesn't set AF.
        """
        if enable and not all(vcpu.ha for vcpu in self.vcpus):
            raise ValueError(_NEEDS_HA)
        if enable:
            self._set_hd(enable)
        self.log.set_hw_dirty_log(enable)
        if not enable:
            self._set_hd(enable)

    def _set_hd(self, enable: bool) -> None:
        for vcpu in self.vcpus:
            with vcpu.lock:
                vcpu.hd = enable
        for slot in self.slots:
            self.flush(slot, 0, slot.npages)

    def verify(self) -> None:
        """Raise `InvariantError` if leaves, bitmaps and shared frames contradict each other."""
        self.log.verify()

    def close(self) -> None:
        """Stop the vCPUs for good, and let go of the memory."""
        self.stop()
        for region in self.space.regions:
            region.memory.close()
            self.space.remove(region.id)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
