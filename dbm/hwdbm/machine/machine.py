"""Machine: a modelled VM, with memory, memslots under a dirty log, and vCPUs that write."""

import json
import os
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from errno import EINVAL
from threading import RLock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwdbm import check
from hwdbm.dirtylog import DirtyLog, Lease, LogClient
from hwdbm.granule import Granule
from hwdbm.machine.blocks import BlockKeeper, Blocks
from hwdbm.machine.clock import Clock, Costs
from hwdbm.machine.faults import FaultHandler
from hwdbm.machine.frames import FramePool, Frames
from hwdbm.machine.runner import VCpuRunner
from hwdbm.machine.space import AddressSpace, Region
from hwdbm.machine.vcpu import VCpu
from hwdbm.machine.workload import Workload, from_dict
from hwdbm.memslot import KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, Memslot, slot_name
from hwdbm.stage2 import Layout, Stage2
from hwdbm.vm.base import BaseVm, percentage
from hwdbm.vm.memory import GuestMemory

_HVA = 1 << 46  # where backings get their numbers from, if the caller has none: no byte is ever there
_STATE = 1
_MOST_VCPUS = 512  # KVM_MAX_VCPUS of arm64
_NEEDS_HA = "hardware DBM needs the hardware's access flag (VTCR_EL2.HD without HA is ignored)"


class Machine(BaseVm):
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
        Leaves of a slot that a vCPU caches at most. Unlimited by default.
    ha : bool
        Whether the MMU sets AF. Hardware DBM needs it.
    seed : int
        Seed for choosing which entries a full TLB evicts.
    costs : Costs
        The cost of each event, for the clock.

    Attributes
    ----------
    log : DirtyLog
        The dirty log, a `hwdbm.DirtyLog`. Its flush is the machine's.
    vcpus : tuple of VCpu
        The vCPUs.
    clock : Clock
        The counts so far.

    Raises
    ------
    ValueError
        If an option is out of range.
    TypeError
        If one has another type.

    Notes
    -----
    A machine that was closed raises `ClosedError` from everything but `close`, `running` and `repr`.

    Ranges of `read` and `write` may go on from slot to slot; EFAULT says that a byte is in no slot. `write` also writes
    read-only slots. A shared page becomes private first, and the guest's leaf of the old frame goes.

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
        check.instance(granule, Granule, "granule")
        hw_dbm, thp, ha = check.flag(hw_dbm, "hw_dbm"), check.flag(thp, "thp"), check.flag(ha, "ha")
        vcpus, seed = check.integer(vcpus, "vcpus", None), check.integer(seed, "seed", None)
        if tlb_entries is not None:
            tlb_entries = check.integer(tlb_entries, "tlb_entries", 1)
        if costs is not None:
            check.instance(costs, Costs, "costs")
        block = granule.pages_per_entry(2)
        chunk = 64 * block if chunk_pages is None else check.integer(chunk_pages, "chunk_pages", None)
        if chunk < block or chunk % block:
            raise ValueError(f"a chunk is a positive multiple of a block's {block} pages, not {chunk}")
        if not 1 <= vcpus <= _MOST_VCPUS:
            raise ValueError(f"a machine has 1 vCPU or more, {_MOST_VCPUS} at most, not {vcpus}")
        if hw_dbm and not ha:
            raise ValueError(_NEEDS_HA)
        check.instance(blocks, (Blocks, str), "blocks")
        if not isinstance(blocks, Blocks):
            check.one_of(blocks, [each.value for each in Blocks], "blocks")
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
        super().__init__(granule.page_size)
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
        self.log, self.clock, self.space, self.faults, self.vcpus = log, clock, space, faults, tuple(made)
        self._pool = FramePool()
        self._runners = tuple(VCpuRunner(vcpu, space) for vcpu in made)
        self._running = False
        self._hd_lock = RLock()
        self._keeper = BlockKeeper(log, policy, chunk, clock.add)

    def __repr__(self) -> str:
        size = sum(region.size for region in self.space.regions)
        slots = len(self.log.memslots)
        return f"<Machine: {len(self.vcpus)} vCPUs, {size >> 20} MiB in {slots} slots, {self.log!r}>"

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
        self._check_open()
        size, readonly = check.integer(size, "size", None), check.flag(readonly, "readonly")
        shared = check.flag(shared, "shared")
        image = None if memory_image is None else check.path(memory_image, "memory_image")
        granule = self.log.granule
        block = granule.page_size * granule.pages_per_entry(2)
        if gpa is None:
            gpa = -(-self.space.end // block) * block
        if slot is None:
            slot = self.space.next_id
        gpa, slot = check.integer(gpa, "gpa", None), check.integer(slot, "slot", None)
        if slot in self.space:
            raise OSError(EINVAL, f"{slot_name(slot)} is there already")
        hva = _HVA + (slot << 36) + gpa % block if hva is None else check.integer(hva, "hva", None)
        if size <= 0:
            raise OSError(EINVAL, f"{slot_name(slot)}: memory_size {size} is not positive")
        region = slot, KVM_MEM_READONLY if readonly else 0, gpa, size, hva
        self.log._table.plan(*region)  # what the log would refuse is refused before there is any memory
        with ExitStack() as undo:
            memory = GuestMemory(size, f"hwdbm-slot{slot}")
            undo.callback(memory.close)
            if image is not None:
                memory.load(image)
            undo.callback(self._forget, slot)
            self.log.set_memory_region(*region)
            layout = Layout(size >> granule.page_shift, gpa >> granule.page_shift, granule)
            frames = Frames(layout, self._pool, hva >> granule.page_shift)
            if shared:
                frames.share(0, layout.npages)
            for vcpu in self.vcpus:
                vcpu.attach(slot, layout)
            self.space.add(Region(slot, gpa, size, hva, readonly, memory, frames))
            self._add_memory(slot, memory.view)
            undo.pop_all()
        return self.log.slot(slot)

    def _forget(self, slot: int) -> None:
        """Undo what there is of a slot that was being added."""
        self._memory.pop(slot, None)
        self._map = None
        self.space.remove(slot)
        for vcpu in self.vcpus:
            vcpu.detach(slot)
        with suppress(OSError):  # there is none yet
            self.log.set_memory_region(slot, 0, 0, 0, 0)

    @property
    def slots(self) -> tuple[Memslot, ...]:
        """The memslots in the order of their ids."""
        self._check_open()
        return self.log.memslots

    def _parts(self, gpa: int, length: int) -> list[tuple[Memslot, int, int]]:
        """Return the parts of a run of bytes, which may go on from slot to slot, or raise EFAULT."""
        return self._memory_map.parts(gpa, length)

    def _write(self, slot_id: int, start: int, raw: NDArray[np.uint8], first_page: int, npages: int) -> None:
        """Write to a slot, be it read-only. A shared page becomes private first: the guest's leaf of its frame goes."""
        region, stop = self.space.find(slot_id), first_page + npages
        if region.frames.shared[first_page:stop].any():
            self._unshare(region, first_page + np.flatnonzero(region.frames.shared[first_page:stop]))
        # After the bytes, as a copy made before would lack them; and before, should an interrupt come in between.
        self.log.mark_dirty(slot_id, first_page, npages)
        region.memory.view[start : start + raw.size] = raw
        self.log.mark_dirty(slot_id, first_page, npages)

    # --- the log -------------------------------------------------------------------------------------------

    def start_log(self) -> None:
        """Begin to log all slots; what becomes of blocks, `blocks` says. A slot that logs goes on."""
        self._check_open()
        for slot in self.slots:
            if not slot.logging:
                self._set_flags(slot, slot.flags | KVM_MEM_LOG_DIRTY_PAGES)
                with self.faults.mmu_lock:
                    self._keeper.started(slot.id)

    def stop_log(self, *, collapse: bool = True) -> None:
        """End the log of all slots. The epochs of clients are broken: the next take of each says so.

        Parameters
        ----------
        collapse : bool
            Whether leaves become what they would be without a log, blocks where they fit. Otherwise they stay as they
            are, as on KVM's arm64.
        """
        self._check_open()
        collapse = check.flag(collapse, "collapse")
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
        """Split the blocks that touch some pages, and return how many there were.

        Raises
        ------
        OSError
            ENOENT if there is no such slot.
        GfnError
            If the pages, counted from the slot's first, aren't inside of it.
        """
        slot, first, count = self._pages(slot, first_page, npages)
        with self.faults.mmu_lock:
            return self._keeper.split(slot, first, count)

    def _pages(self, slot: int, first_page: int, npages: int | None) -> tuple[int, int, int]:
        """Return pages of a slot, checked."""
        self._check_open()
        found, first = self.log.slot(slot), check.integer(first_page, "first_page", None)
        count = found.npages - first if npages is None else check.integer(npages, "npages", None)
        self.log.slot_log(slot).pages(first, count)
        return found.id, first, count

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

    def client(self, name: str) -> LogClient:
        """Return a new consumer of the log, which has been started, with a bitmap and an epoch a slot of its own.

        As `hwdbm.DirtyLog.client`; `dirty` is the default client.

        Returns
        -------
        LogClient
            Its ``take(slot)`` lends the pages written in its epoch, which the lease's ``commit()`` ends.

        Raises
        ------
        OSError
            EBUSY if there is a client of this name, ENOENT if no slot logs.
        """
        self._check_open()
        for slot in self.slots:
            if slot.logging:
                self._split_for(slot.id)
        return self.log._client(name, self._split_for)

    def _split_for(self, slot: int) -> None:
        """Split blocks that a CLEAR would arm whole: a log that begins with all bits set has split none yet."""
        self._check_open()
        if self.log.initially_set and self._keeper.policy is not Blocks.TRACK:
            self.split(slot)

    def mark_imported(self, slot: int, first_page: int, npages: int) -> None:
        """Mark pages that an import has written: they are dirty here.

        Raises
        ------
        OSError
            ENOENT if there is no such slot.
        GfnError
            If the pages, counted from the slot's first, aren't inside of it.
        """
        self._check_open()
        self.log.mark_dirty(slot, first_page, npages)

    def set_hw_dirty_log(self, enable: bool) -> None:
        """Switch between hardware DBM and write-protection while the VM runs.

        Raises
        ------
        ValueError
            If it is to be enabled, and the MMU doesn't set AF.
        """
        self._check_open()
        enable = check.flag(enable, "enable")
        if enable and not all(vcpu.ha for vcpu in self.vcpus):
            raise ValueError(_NEEDS_HA)
        if enable:
            with self._hd_lock:  # whole: HD must not go off between the two
                self._set_hd(enable)
                self.log.set_hw_dirty_log(enable)
        else:
            self.log.set_hw_dirty_log(enable)
            self._set_hd(enable)

    def _set_hd(self, enable: bool) -> None:
        """Set VTCR_EL2.HD; it stays on where another thread has switched the log back to hardware DBM meanwhile."""
        with self._hd_lock:
            for vcpu in self.vcpus:
                with vcpu.lock:
                    vcpu.hd = enable or self.log.hw_dbm
            for slot in self.slots:
                self.flush(slot, 0, slot.npages)

    # --- the vCPUs ------------------------------------------------------------------------------------------

    def run(self, *workloads: Workload) -> None:
        """Give the vCPUs something to do, one each, from its first store on; those left are idle. See `resume`.

        Raises
        ------
        RuntimeError
            If they are running.
        ValueError
            If there are more workloads than vCPUs.
        """
        self._check_paused()
        check.instances(workloads, Workload, "workloads")
        if len(workloads) > len(self._runners):
            raise ValueError(f"{len(workloads)} workloads, and {len(self._runners)} vCPUs")
        for runner, workload in zip(self._runners, workloads, strict=False):
            runner.workload, runner.position, runner.seconds = workload, 0, 0.0

    def step(self, stores: int, vcpu: int = 0) -> None:
        """Do the next stores of a vCPU's workload in this thread, whatever its rate.

        Raises
        ------
        RuntimeError
            If the vCPUs are running.
        """
        self._check_paused()
        stores, vcpu = check.integer(stores, "stores"), check.integer(vcpu, "vcpu", 0, len(self._runners) - 1)
        self._runners[vcpu].step(stores)

    def resume(self) -> None:
        """Let the vCPUs run, each in a thread of its own. What one failed with is raised here, or by `pause`."""
        self._check_open()
        try:
            for runner in self._runners:
                runner.resume()
        except BaseException:
            self._stop_running()  # all run, or none
            raise
        self._running = True

    def pause(self) -> None:
        """Stop the vCPUs. When this returns, everything that they wrote is in memory and recorded."""
        self._check_open()
        self._stop_running()

    def _stop_running(self) -> None:
        self._running = False
        errors = []
        for runner in self._runners:
            runner.stop()
        for runner in self._runners:
            try:
                runner.pause()
            except Exception as error:  # noqa: BLE001 - the others are to stop too
                errors.append(error)
        if errors:
            raise errors[0]

    @property
    def running(self) -> bool:
        """Whether the vCPUs run."""
        return self._running

    def throttle(self, percent: int) -> None:
        """Keep the vCPUs from running for some part of the time.

        Parameters
        ----------
        percent : int
            0 to 99.

        Raises
        ------
        ValueError
            If it is out of range.
        """
        self._check_open()
        percent = percentage(percent)
        for runner in self._runners:
            runner.percent = percent

    # --- state ---------------------------------------------------------------------------------------------

    def state(self) -> bytes:
        """Return what the vCPUs would go on with, for a machine with the same memory.

        Raises
        ------
        RuntimeError
            If they are running.
        """
        self._check_paused()
        state = {"format": _STATE, "vcpus": [runner.state() for runner in self._runners]}
        return json.dumps(state, separators=(",", ":")).encode()

    def set_state(self, state: bytes) -> None:
        """Have the vCPUs go on where those of another machine were.

        Raises
        ------
        RuntimeError
            If they are running.
        ValueError
            If it isn't what `state` returns, or of another number of vCPUs. Nothing is changed then.
        """
        self._check_paused()
        found = _parsed(state)
        if len(found) != len(self._runners):
            raise ValueError(f"a state of {len(found)} vCPUs, and here are {len(self._runners)}")
        for runner, (workload, position, seconds) in zip(self._runners, found, strict=True):
            runner.workload, runner.position, runner.seconds = workload, position, seconds

    # --- the host ------------------------------------------------------------------------------------------

    def share(self, slot: int, first_page: int, npages: int) -> None:
        """Let others have some pages too (KSM, a fork): the guest's leaves become read-only, and a write copies.

        Dirty state of the leaves is saved first.
        """
        slot, first, count = self._pages(slot, first_page, check.integer(npages, "npages", None))
        frames = self.space.find(slot).frames
        if count:
            with self.faults.mmu_lock:
                frames.share(first, count)
                self.log.change(slot, first, count, _wrprotect)

    def reclaim(self, slot: int, first_page: int, npages: int) -> None:
        """Take frames away (migration of pages, swap): the leaves go, and the next touch finds other frames.

        Dirty state of the leaves is saved first.
        """
        slot, first, count = self._pages(slot, first_page, check.integer(npages, "npages", None))
        frames = self.space.find(slot).frames
        with self.faults.mmu_lock:
            self.log.unmap(slot, self.log.slot(slot).base_gfn + first, count)
            frames.renew(np.arange(first, first + count))

    def _unshare(self, region: Region, pages: NDArray[np.int64]) -> None:
        with self.faults.mmu_lock:
            pages = pages[region.frames.shared[pages]]
            base = self.log.slot(region.id).base_gfn
            for page in pages.tolist():
                self.log.unmap(region.id, base + page, 1)
            region.frames.renew(pages)

    def flush(self, slot: Memslot, first_page: int, npages: int) -> None:
        """Invalidate what any vCPU has cached of some pages. No access through it is under way when this returns."""
        check.instance(slot, Memslot, "slot")
        for vcpu in self.vcpus:
            vcpu.flush(slot.id, first_page, npages)
        self.clock.add(flushes=1)

    # --- checking, and the end ------------------------------------------------------------------------------

    def verify(self) -> None:
        """Raise `InvariantError` if leaves, bitmaps and shared frames contradict each other."""
        self._check_open()
        self.log.verify()

    def _release(self) -> None:
        self._running = False
        for runner in self._runners:
            runner.close()
        for region in self.space.regions:
            region.memory.close()
        self.space.clear()
        super()._release()


def _parsed(state: bytes) -> Sequence[tuple[Workload, int, float]]:
    """Return what a state says of each vCPU, checked: it may come from anywhere."""
    check.instance(state, (bytes, bytearray, memoryview), "state")
    try:
        found: dict[str, Any] = json.loads(bytes(state))
        _check_format(found["format"])
        return [
            (
                from_dict(each["workload"]),
                check.integer(each["position"], "position", 0, (1 << 62) - 1),
                check.real(each["seconds"], "seconds", 0, 1e12),
            )
            for each in found["vcpus"]
        ]
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"not a state of vCPUs: {error}") from None


def _check_format(form: object) -> None:
    if form != _STATE:
        raise ValueError(f"its format is {_STATE}, not {form!r:.40}")


def _wrprotect(s2: Stage2, first: int, count: int) -> int:
    return s2.wrprotect(s2.base_gfn + first, count)
