"""KvmVm: a VM of the kernel's, with real memory, the kernel's dirty log, and vCPUs that run in threads."""

import mmap
import os
import platform
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from threading import RLock
from typing import Self

import numpy as np

from hwdbm import check
from hwdbm.kvm import guest as guests
from hwdbm.kvm.abi import DIRTY_LOG_INITIALLY_SET, DIRTY_LOG_MANUAL_PROTECT_ENABLE, Cap
from hwdbm.kvm.device import Kvm, VmFd
from hwdbm.kvm.log import KernelPages, Rings
from hwdbm.kvm.ring import DirtyRing, enable_ring
from hwdbm.kvm.state import MOST_VCPUS, Guest, VmState, capture, restore
from hwdbm.kvm.task import CODE_GPA, CODE_SLOT, DATA_SLOT, Task, iteration_offset
from hwdbm.kvm.thread import VcpuThread
from hwdbm.kvm.vcpu import VcpuFd
from hwdbm.memslot import KVM_MEM_LOG_DIRTY_PAGES, Memslot
from hwdbm.vm.base import LoggedVm, SlotPages, percentage, prove
from hwdbm.vm.memory import GuestMemory

_PROTECT2 = {
    "off": 0,
    "on": DIRTY_LOG_MANUAL_PROTECT_ENABLE,
    "initially-set": DIRTY_LOG_MANUAL_PROTECT_ENABLE | DIRTY_LOG_INITIALLY_SET,
}


class KvmVm(LoggedVm):
    """A VM in the kernel: memory, a dirty log, vCPUs, and a guest in them. It is a source of migrations, too.

    Slot 0 is the memory that the guest writes. Slot 1, at gpa 0x10000, is the guest: a page of code, and a page with
    the iteration's number. At first it is paused.

    Parameters
    ----------
    memory : int
        Bytes of slot 0, whole pages. Nothing is backed until it is touched.
    vcpus : int
        How many there are. Those of `counting` count each in its share of the pages.
    guest : str
        ``counting``, ``random`` or ``idle``; see `hwdbm.kvm.guest`.
    ring : int, optional
        Entries of each vCPU's dirty ring. By default the log is of bitmaps.
    manual_protect : str
        How bitmaps are collected. ``off``: GET clears. ``on``: GET shows, CLEAR clears. ``initially-set``: so, and all
        pages are dirty when a log starts.
    rate : float, optional
        Pages a second that all vCPUs write together. Unlimited by default.
    seed : int
        Seed for choosing the random guest's pages.
    base : int
        The guest physical address at which slot 0 begins, a multiple of the page.
    path : str
        The device.

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
        If a parameter is out of range, or the guest can't reach the memory.

    Notes
    -----
    A VM can be made and used in any thread. What a vCPU failed with, `GuestExitError` as a rule, is raised by `resume`,
    `pause`, `dirty`, `state` and `check`, each time. Registers and rates are part of the state; the log's mode is not.

    Examples
    --------
    On a machine with ``/dev/kvm``::

        with KvmVm(1 << 30, guest="counting", rate=100_000) as vm:
            vm.start_log()
            vm.resume()
            time.sleep(0.1)
            with vm.dirty(0) as lease:  # what raises in here gives the pages back
                print(lease.bitmap.ranges(base=0x4000_0000, unit=vm.page_size))
            vm.pause()
            vm.check()
    """

    kind = f"kvm {platform.machine()}"
    """What a migration asks whether two VMs fit."""

    def __init__(
        self,
        memory: int,
        *,
        vcpus: int = 1,
        guest: str = "counting",
        ring: int | None = None,
        manual_protect: str = "off",
        rate: float | None = None,
        seed: int = 0,
        base: int = 0x4000_0000,
        path: str = "/dev/kvm",
    ) -> None:
        page, what = mmap.PAGESIZE, Guest(guest, rate)
        memory, base = check.integer(memory, "memory", None), check.integer(base, "base", None)
        seed = check.integer(seed, "seed")
        if memory < page or memory % page or base < 0 or base % page:
            raise ValueError(f"memory is whole pages of {page} bytes: not {memory:#x} bytes at gpa {base:#x}")
        if what.kind != "idle" and base + memory > guests.top():
            raise ValueError(f"the guest reaches gpa {guests.top():#x}, and the memory ends at {base + memory:#x}")
        slots = (
            Memslot(DATA_SLOT, 0, base // page, memory // page, 0),
            Memslot(CODE_SLOT, 0, CODE_GPA // page, 2, 0),
        )
        self._open(slots, vcpus=vcpus, ring=ring, manual_protect=manual_protect, path=path)
        try:
            self._boot(what, seed)
        except BaseException:
            self.close()
            raise

    @classmethod
    def from_slots(
        cls,
        page_size: int,
        slots: Sequence[Memslot],
        *,
        vcpus: int = 1,
        ring: int | None = None,
        manual_protect: str = "off",
        path: str = "/dev/kvm",
    ) -> Self:
        """Return a paused VM with the memory of another: where a migration arrives.

        It has an idle guest until `set_state`, which also makes the vCPUs that the state has more.

        Parameters
        ----------
        page_size : int
            Bytes of a page: this machine's.
        slots : sequence of Memslot
            The memory; backings and logs of theirs don't matter.
        vcpus, ring, manual_protect, path
            As for `KvmVm`.

        Raises
        ------
        ValueError
            If this machine has other pages.
        OSError
            The kernel's: EEXIST if slots overlap, EINVAL if it can't have one of them.
        """
        if check.integer(page_size, "page_size") != mmap.PAGESIZE:
            raise ValueError(f"pages of {page_size} bytes, and this machine's have {mmap.PAGESIZE}")
        self = cls.__new__(cls)
        self._open(slots, vcpus=vcpus, ring=ring, manual_protect=manual_protect, path=path)
        return self

    def _open(self, slots: Sequence[Memslot], *, vcpus: int, ring: int | None, manual_protect: str, path: str) -> None:
        vcpus = check.integer(vcpus, "vcpus", 1, MOST_VCPUS)
        slots = check.instances(slots, Memslot, "slots")
        check.one_of(manual_protect, _PROTECT2, "manual_protect")
        if ring is not None and manual_protect != "off":
            raise ValueError(f"manual_protect={manual_protect!r} is of bitmaps, and the log is of rings")
        LoggedVm.__init__(self, mmap.PAGESIZE)
        self._closed = True  # until all of it is there
        self._ring = None if ring is None else check.integer(ring, "ring", None)
        self._guest, self._running, self._manual = Guest(), False, manual_protect != "off"
        self._control = RLock()  # of the vCPUs' starts and stops
        self._threads: list[VcpuThread] = []
        with ExitStack() as files:
            kvm = files.enter_context(Kvm(path))
            self.kernel: VmFd = files.enter_context(kvm.create_vm())
            self._msrs = kvm.msr_indices() if kvm.arch.msrs else []
            self._rings = Rings(self.kernel, self._lock)
            self._with_bitmap = self._ring is None or enable_ring(self.kernel, self._ring)
            if self._manual:
                self.kernel.enable_cap(Cap.MANUAL_DIRTY_LOG_PROTECT2, _PROTECT2[manual_protect])
            for slot in slots:
                self._create_slot(slot)
            for _ in range(vcpus):
                self._add_vcpu(files)
            self._files, self._closed = files.pop_all(), False

    def _create_slot(self, given: Memslot) -> None:
        memory = GuestMemory(given.npages * self.page_size, f"hwdbm-slot{given.id}")
        view = memory.view
        memory.close()  # the view keeps the mapping
        flags = given.flags & ~KVM_MEM_LOG_DIRTY_PAGES
        slot = replace(given, flags=flags, userspace_addr=view.ctypes.data)
        self._set_region(slot)
        gather = None if self._ring is None else self._gather
        pages = KernelPages(self.kernel, slot, self._lock, bitmap=self._with_bitmap, manual=self._manual, gather=gather)
        self._add_slot(pages, view)
        self._rings.logs.append(pages)

    def _set_region(self, slot: Memslot) -> None:
        self.kernel.set_memory_region(
            slot=slot.id,
            flags=slot.flags,
            guest_phys_addr=slot.base_gfn * self.page_size,
            memory_size=slot.npages * self.page_size,
            userspace_addr=slot.userspace_addr,
        )

    def _add_vcpu(self, files: ExitStack) -> None:
        number = len(self._threads)
        vcpu = files.enter_context(self.kernel.create_vcpu(number))
        if self._ring is not None:
            self._rings.rings.append(files.enter_context(DirtyRing(vcpu, self._ring)))
        self._threads.append(VcpuThread(number, vcpu, None if self._ring is None else self._rings.gather))

    def _boot(self, what: Guest, seed: int) -> None:
        if what.kind == "idle":
            return
        code = guests.code(what.kind)
        self._memory[CODE_SLOT][: len(code)] = np.frombuffer(code, dtype=np.uint8)
        data, page = self._pages[DATA_SLOT].slot, self.page_size
        parts = [(0, data.npages)] * len(self._threads)
        if what.kind == "counting":
            parts = guests.shares(data.npages, len(self._threads))
        for thread, (first, npages) in zip(self._threads, parts, strict=True):
            start = (data.base_gfn + first) * page
            number = np.random.SeedSequence([seed, thread.number]).generate_state(1).item()
            guests.boot(thread.vcpu, Task(what.kind, start, start + npages * page, page, number))
        self._become(what)

    def _become(self, what: Guest) -> None:
        self._guest = what
        if what.kind != "idle":
            for thread in self._threads:
                thread.pace(what.kind, None if what.rate is None else what.rate / len(self._threads))

    def __repr__(self) -> str:
        size = sum(memory.size for memory in self._memory.values())
        return f"<KvmVm: {self._guest.kind} on {len(self._threads)} vCPUs, {size >> 20} MiB>"

    # --- running -------------------------------------------------------------------------------------------

    @property
    def vcpus(self) -> tuple[VcpuFd, ...]:
        """The vCPUs. Requests of one that runs wait until it leaves the guest: pause before."""
        self._check_open()
        return tuple(thread.vcpu for thread in self._threads)

    @property
    def running(self) -> bool:
        """Whether vCPUs may write."""
        return self._running

    @property
    def pages(self) -> int:
        """How many pages the guest wrote here so far, in whole chunks."""
        self._check_open()
        return sum(thread.pages for thread in self._threads)

    @property
    def iteration(self) -> int:
        """The number that the random guest writes. Setting it is a `write`."""
        raw = self.read(CODE_GPA + iteration_offset(self.page_size), 4)
        return int.from_bytes(raw, "little")

    @iteration.setter
    def iteration(self, number: int) -> None:
        number = check.integer(number, "iteration", 0, 0xFFFF_FFFF)
        self.write(CODE_GPA + iteration_offset(self.page_size), number.to_bytes(4, "little"))

    def resume(self) -> None:
        """Let the vCPUs run: all of them, or none."""
        self._check_open()
        with self._control:
            self._check_vcpus()
            self._running = True
            if self._guest.kind == "idle":
                return
            try:
                for thread in self._threads:
                    thread.resume()
            except BaseException:
                for thread in self._threads:
                    thread.stop()
                self.pause()
                raise

    def pause(self) -> None:
        """Stop the vCPUs. When this returns they have left the guest, and everything they wrote is in memory.

        If an interrupt comes meanwhile they stop all the same, and `running` says so when `pause` was called again.
        """
        self._check_open()
        with self._control:
            for thread in self._threads:
                thread.stop()
            for thread in self._threads:
                thread.pause()
            self._running = False
            self._check_vcpus()

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
        for thread in self._threads:
            thread.percent = percent

    def check(self) -> None:
        """Check that the memory of slot 0 is what the guest can have written.

        Raises
        ------
        PatternError
            If it isn't; the text names the first page that is wrong.
        RuntimeError
            If the VM is running.
        """
        self._check_open()
        self._check_paused()
        self._check_vcpus()
        if self._guest.kind == "counting":
            guests.check_counting(self.memory(DATA_SLOT), self.page_size, vcpus=len(self._threads))
        elif self._guest.kind == "random":
            guests.check_random(self.memory(DATA_SLOT), self.page_size, self.iteration)

    def prove(self) -> None:
        """Let the guest, which runs, write some pages more, and check what it has written; it runs on.

        Raises
        ------
        PatternError
            If the memory isn't what the guest can have written.
        OSError
            ETIMEDOUT if it writes nothing, or what a vCPU failed with.
        """
        self._check_open()
        prove(self, self._look, idle=self._guest.kind == "idle")

    def _look(self) -> str:
        self._check_vcpus()
        return ""

    # --- state ---------------------------------------------------------------------------------------------

    def state(self) -> bytes:
        """Return which guest it is, and the registers of the vCPUs.

        Raises
        ------
        RuntimeError
            If the VM is running.
        """
        self._check_open()
        with self._control:
            self._check_paused()
            self._check_vcpus()
            vcpus = tuple(capture(thread.vcpu, self._msrs) for thread in self._threads)
            return VmState(self._guest, vcpus).to_bytes()

    def set_state(self, state: bytes) -> None:
        """Go on where another VM was, with its memory.

        Raises
        ------
        RuntimeError
            If the VM is running.
        ValueError
            If it is no state, or one of fewer vCPUs, or the kernel refuses some of it. The vCPUs are what they were
            then; but those that the state has more are there, and idle.
        """
        self._check_open()
        with self._control:
            self._check_paused()
            found = VmState.from_bytes(state)
            if len(found.vcpus) < len(self._threads):
                raise ValueError(f"a state of {len(found.vcpus)} vCPUs, and here are {len(self._threads)}")
            while len(self._threads) < len(found.vcpus):
                self._add_vcpu(self._files)
            before = [capture(thread.vcpu, self._msrs) for thread in self._threads]
            try:
                for thread, registers in zip(self._threads, found.vcpus, strict=True):
                    restore(thread.vcpu, registers)
                self._become(found.guest)
            except BaseException:
                for thread, registers in zip(self._threads, before, strict=True):
                    restore(thread.vcpu, registers)
                raise
            for thread in self._threads:
                thread.forget_failure()

    # --- the log -------------------------------------------------------------------------------------------

    def _switch(self, *, on: bool) -> None:
        changed = [pages for pages in self._pages.values() if pages.slot.logging != on]
        if on:
            try:
                for pages in changed:
                    self._set_logging(pages, on=True)
            except BaseException:  # all, or none
                for pages in changed:
                    self._set_logging(pages, on=False)
                raise
            return
        for pages in changed:
            self._set_logging(pages, on=False)
        if self._ring is not None:
            self._gather()
        for pages in changed:
            pages.forget()

    def _set_logging(self, pages: SlotPages, *, on: bool) -> None:
        flags = pages.slot.flags & ~KVM_MEM_LOG_DIRTY_PAGES | (KVM_MEM_LOG_DIRTY_PAGES if on else 0)
        slot = replace(pages.slot, flags=flags)
        self._set_region(slot)
        pages.slot = slot

    def _gather(self) -> None:
        """Bring what the vCPUs wrote to the logs of rings."""
        for thread in self._threads:
            thread.flush()
        self._rings.gather()

    def _check_log(self) -> None:
        self._check_vcpus()

    def _check_vcpus(self) -> None:
        for thread in self._threads:
            thread.check()

    # --- the end -------------------------------------------------------------------------------------------

    def _release(self) -> None:
        with self._control:
            for thread in self._threads:
                thread.close()
            self._running = False
            self._threads.clear()
            self._files.close()
            super()._release()

    def _let_go(self) -> None:
        self._files.close()

    def __del__(self) -> None:
        if not self._closed and os.getpid() == self._owner:
            warnings.warn(f"{self!r} was never closed", ResourceWarning, stacklevel=2)
            self.close()
