"""ArmVm: an emulated Arm machine as a VM, whose log is what its MMU marks in its own tables."""

import ctypes
import hashlib
import os
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import cycle, islice
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from hwdbm import check, pte
from hwdbm.arm.abi import RAM, VCPUS, GuestKind, Mapping, Vcpu
from hwdbm.arm.board import Board, TablePlan
from hwdbm.arm.build import firmware
from hwdbm.arm.guest import PRIVATE, PRIVATE_PA, Guests, Work, private_each, private_size, system_mappings
from hwdbm.bitmap import DirtyBitmap
from hwdbm.errors import HwdbmError
from hwdbm.granule import Granule
from hwdbm.image import Live, Registers
from hwdbm.image.live import LiveStage2
from hwdbm.memslot import KVM_MEM_LOG_DIRTY_PAGES, Memslot
from hwdbm.vm.base import LoggedVm, SlotPages, percentage, prove
from hwdbm.vtcr import Vtcr

DATA_SLOT, PRIVATE_SLOT = 0, 1
_DATA_PA = 0x8000_0000  # blocks of any size are aligned there
_IPA_BITS = 40
_MMFR1 = 0x22  # ID_AA64MMFR1_EL1 of QEMU's cpu `max`, as far as it matters: 16-bit VMIDs, hardware DBM
_MAGIC = b"hwdbmarm"
_HEAD = len(_MAGIC) + 32 + 8
_LOWEST = 0x4A00_0000  # where guests' memory may begin: below it is what the machine has for itself


class GuestMemoryError(HwdbmError, AssertionError):
    """The memory of an Arm machine isn't what its guests can have written."""


class TablePages(SlotPages):
    """A slot's dirty pages: those marked in the machine's tables, and those that only this side knows.

    Parameters
    ----------
    slot : Memslot
        The slot.
    lock : RLock
        One for all of a VM's.
    stage2 : LiveStage2
        Its leaves, in the machine's RAM.
    board : Board
        The machine, whose TLB is flushed.
    """

    def __init__(self, slot: Memslot, lock: AbstractContextManager[Any], stage2: LiveStage2, board: Board) -> None:
        super().__init__(slot, lock)
        self._stage2, self._board = stage2, board

    def _collect(self, words: NDArray[np.uint64]) -> None:
        taken = DirtyBitmap.from_words(words, self.slot.npages)
        try:
            self._stage2.harvest_into(taken)
            # Always: what an earlier harvest cleaned may have failed to be flushed. Until it is, a vCPU writes without
            # a mark by what its TLB holds, so that nothing may be copied before.
            self._board.flush()
        except BaseException:
            sink = self._sink()
            sink |= taken
            raise


def memory_slots(
    memory: int, *, vcpus: int = 2, granule: Granule = Granule.K4, base: int = _DATA_PA
) -> tuple[Memslot, Memslot]:
    """Return the slots of an Arm machine with so many bytes of memory."""
    page = granule.page_size
    return (
        Memslot(DATA_SLOT, 0, base // page, memory // page, 0),
        Memslot(PRIVATE_SLOT, 0, PRIVATE // page, private_size(memory // page, vcpus) // page, 0),
    )


class ArmVm(LoggedVm):
    """An emulated Arm machine: QEMU, our firmware at EL2, guests at EL1 that never stop writing. It is a source.

    Slot 0 is the memory that the guests write. Slot 1, at gpa 0x48000000, is the guests' own: stacks, and how often
    each wrote each page. Both are tracked in the machine's stage-2 tables, where they lie in its RAM, while it runs. At
    first it is paused.

    Parameters
    ----------
    memory : int
        Bytes of slot 0, whole pages. Nothing is backed until it is touched.
    vcpus : int
        How many there are, 1 to 7.
    guest : str or sequence of str
        What they do: ``sequential``, ``random``, ``window`` (random in a window that slides), ``atomics``, ``pairs``
        (across a page's end), ``zero`` (DC ZVA), ``stage1`` (with a stage 1 of its own, whose walker marks pages too),
        ``idle``; or ``mixed``, each something else.
    granule : Granule
        The size of a page.
    blocks : bool
        Whether the memory is mapped by blocks of level 2 while no log is on; a log splits them, as KVM does.
    window : int
        Pages of a sliding window.
    rate : float, optional
        Stores a second that all vCPUs make together. Unlimited by default.
    seed : int
        Seed for choosing pages.
    base : int
        Where slot 0 begins: a guest physical address.

    Attributes
    ----------
    board : Board
        The machine.
    live : Live
        Its RAM, with the tables.
    guests : Guests
        What they say that they wrote.

    Raises
    ------
    ArmUnavailableError
        If QEMU or the cross compiler isn't here.
    ValueError
        If a parameter is out of range; without numba, since others write the tables too.
    OSError
        If the machine doesn't come up.

    Examples
    --------
    Where QEMU and the cross compiler are::

        with ArmVm(64 << 20, vcpus=2, guest="window", rate=50_000) as vm:
            vm.start_log()
            vm.resume()
            time.sleep(0.1)
            with vm.dirty(0) as lease:  # the TLB has been flushed: the pages may be copied
                print(lease.bitmap)
            vm.pause()
            vm.check()
    """

    kind = "arm qemu-tcg"
    """What a migration asks whether two VMs fit."""

    def __init__(
        self,
        memory: int,
        *,
        vcpus: int = 2,
        guest: str | Sequence[str] = "window",
        granule: Granule = Granule.K4,
        blocks: bool = False,
        window: int = 256,
        rate: float | None = None,
        seed: int = 0,
        base: int = _DATA_PA,
    ) -> None:
        vcpus = check.integer(vcpus, "vcpus", 1, VCPUS)
        check.instance(granule, Granule, "granule")
        memory, base = check.integer(memory, "memory", None), check.integer(base, "base", None)
        page = granule.page_size
        if memory < page or memory % page or base % page:
            raise ValueError(f"memory is whole pages of {page} bytes: not {memory:#x} bytes at gpa {base:#x}")
        kinds = _kinds(guest, vcpus)
        npages = memory // page
        slots = memory_slots(memory, vcpus=vcpus, granule=granule, base=base)
        self._open(granule, slots, vcpus, blocks=check.flag(blocks, "blocks"))
        try:
            work = _work(kinds, base, npages, page, check.integer(window, "window", 1), check.integer(seed, "seed"))
            self.guests.give(work)
            if rate is not None:
                self.set_rate(rate)
        except BaseException:
            self.close()
            raise

    @classmethod
    def from_slots(cls, page_size: int, slots: Sequence[Memslot], *, blocks: bool = False) -> Self:
        """Return a paused machine with the memory of another: where a migration arrives. It is idle until `set_state`.

        Parameters
        ----------
        page_size : int
            Bytes of a page.
        slots : sequence of Memslot
            The memory: slots 0 and 1 of an Arm machine.
        blocks : bool
            As for `ArmVm`.

        Raises
        ------
        ValueError
            If no Arm machine has this memory.
        """
        granules = {granule.page_size: granule for granule in Granule}
        by_id = {slot.id: slot for slot in slots}
        granule = granules.get(page_size)
        if granule is None or by_id.keys() != {DATA_SLOT, PRIVATE_SLOT} or len(by_id) != len(slots):
            raise ValueError(f"an Arm machine has slots 0 and 1, not {sorted(by_id)}, of {page_size}-byte pages")
        each = private_each(by_id[DATA_SLOT].npages)
        vcpus, rest = divmod(by_id[PRIVATE_SLOT].npages * page_size, each)
        if rest or not 1 <= vcpus <= VCPUS or by_id[PRIVATE_SLOT].base_gfn * page_size != PRIVATE:
            raise ValueError(
                f"the guests' own memory is {each:#x} bytes for each of 1 to {VCPUS} vCPUs, at gpa {PRIVATE:#x}"
            )
        self = cls.__new__(cls)
        self._open(granule, (by_id[DATA_SLOT], by_id[PRIVATE_SLOT]), vcpus, blocks=blocks)
        return self

    def _open(self, granule: Granule, slots: tuple[Memslot, Memslot], vcpus: int, *, blocks: bool) -> None:
        page, (data, private) = granule.page_size, slots
        gpa, size = data.base_gfn * page, data.npages * page
        if gpa < _LOWEST or gpa + size > 1 << _IPA_BITS or private.npages * page > _LOWEST - PRIVATE:
            raise ValueError(
                f"memory of {size:#x} bytes at gpa {gpa:#x}: it lies in {_LOWEST:#x}..{(1 << _IPA_BITS) - 1:#x}, and "
                f"{vcpus} vCPUs count it in {_LOWEST - PRIVATE:#x} bytes"
            )
        vtcr = Vtcr.for_vm(granule, _IPA_BITS, mmfr1=_MMFR1, pa_bits=40)
        LoggedVm.__init__(self, page)
        self._closed = True  # until all of it is there
        self._blocks, self._running = blocks, False
        self._stage2s: dict[int, LiveStage2] = {}
        block = 1 << granule.shift(2)
        pa = _DATA_PA + gpa % block
        starts = {DATA_SLOT: pa, PRIVATE_SLOT: PRIVATE_PA}
        ram = (pa + size - RAM + (1 << 20) - 1) >> 20 << 20
        mappings = [*system_mappings(granule), _pages(PRIVATE, PRIVATE_PA, private.npages * page)]
        mappings += _mapped(gpa, pa, size, granule) if blocks else [_pages(gpa, pa, size)]
        self.board = Board(ram, TablePlan(vtcr, tuple(mappings)), vcpus=vcpus)
        try:
            registers = Registers(self.board.mailbox.vttbr, self.board.mailbox.vtcr)
            self.live = Live(self.board.ram.words, RAM, registers)
            self._pool = self.board.spare_tables.tolist()
            for slot in slots:
                plain = replace(slot, flags=slot.flags & ~KVM_MEM_LOG_DIRTY_PAGES)
                stage2 = self.live.stage2(
                    slot.base_gfn,
                    slot.npages,
                    tables=lambda: self._pool.pop() if self._pool else None,
                    free=self._pool.append,
                    flush=self.board.flush,
                )
                start = starts[slot.id] - RAM
                memory = self.board.ram.view[start : start + slot.npages * page]
                self._stage2s[slot.id] = stage2
                self._add_slot(TablePages(plain, self._lock, stage2, self.board), memory)
            self.guests = Guests(self.board, gpa, data.npages, granule.page_shift)
            self.board.start()
            self._closed = False
        except BaseException:
            self.board.close()
            raise

    def __repr__(self) -> str:
        size = sum(memory.size for memory in self._memory.values())
        return f"<ArmVm: {self.board.vcpus} vCPUs, {size >> 20} MiB>"

    def stage2(self, slot_id: int) -> LiveStage2:
        """Return the leaves of a slot, in the machine's own tables.

        Raises
        ------
        OSError
            ENOENT if there is no such slot.
        """
        return self._stage2s[self._slot(slot_id).slot.id]

    # --- running -------------------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        """Whether vCPUs may write."""
        return self._running

    @property
    def pages(self) -> int:
        """Stores of the guests so far."""
        self._check_open()
        return self.guests.stores

    def resume(self) -> None:
        """Let the vCPUs run.

        Raises
        ------
        GuestCrashError
            If one has crashed.
        """
        self._check_open()
        self._running = True
        self.board.run()

    def pause(self) -> None:
        """Stop the vCPUs: none is inside of a store when this returns, and all that they wrote is in memory.

        Raises
        ------
        GuestCrashError
            If one has crashed.
        """
        self._check_open()
        self.board.stop()
        self._running = False

    def throttle(self, percent: int) -> None:
        """Keep the vCPUs from running for some part of the time, 0 to 99 %.

        Raises
        ------
        ValueError
            For another one.
        """
        self._check_open()
        self.board.shared.percent = percentage(percent)

    def set_rate(self, rate: float | None) -> None:
        """Set the stores a second that all vCPUs make together; None for no limit.

        Raises
        ------
        ValueError
            If it isn't more than 0.
        """
        self._check_open()
        if rate is not None and not 0 < rate < 1e9:
            raise ValueError(f"a rate is a number of stores a second, more than 0 and less than 1e9, not {rate!r}")
        for number in range(self.board.vcpus):
            self.board.shared.rate[number] = 0 if rate is None else max(1, round(rate / self.board.vcpus))

    def check(self) -> None:
        """Check that the memory of slot 0 is what the guests can have written.

        Raises
        ------
        GuestMemoryError
            If it isn't; the text names the first page that is wrong.
        RuntimeError
            If the VM is running.
        """
        self._check_open()
        self._check_paused()
        self.board.check()
        words = self.memory(DATA_SLOT).view(np.uint64).reshape(-1, self.page_size // 8)
        for number, task in enumerate(self.guests.tasks):
            if task.kind not in (GuestKind.SEQUENTIAL, GuestKind.RANDOM, GuestKind.WINDOW):
                continue
            (page,) = self.guests.counts_of(number).nonzero()
            found = words[page, 8 * (number + 1)]
            wrong = (found & np.uint64(7) != number) | (found >> np.uint64(3) >= task.number) | (found == 0)
            if wrong.any():
                at = int(np.argmax(wrong))
                raise GuestMemoryError(
                    f"page {page[at]}: vCPU {number} wrote it, and can't have written {int(found[at]):#x}: it is at "
                    f"its store {task.number}"
                )

    def prove(self) -> None:
        """Let the guests, which run, write some more, and check what they have written; they run on.

        Raises
        ------
        GuestMemoryError
            If the memory isn't what they can have written.
        OSError
            ETIMEDOUT if they write nothing.
        """
        self._check_open()
        idle = all(task.kind == GuestKind.IDLE for task in self.guests.tasks)
        prove(self, self._look, idle=idle)

    def _look(self) -> str:
        self.board.check()
        return self.board.faults()

    # --- state ---------------------------------------------------------------------------------------------

    def state(self) -> bytes:
        """Return the registers of the vCPUs, and which firmware they are inside of.

        Raises
        ------
        RuntimeError
            If the VM is running.
        """
        self._check_open()
        self._check_paused()
        self.board.check()
        rates = bytes(self.board.shared.rate)
        vcpus = b"".join(bytes(self.board.vcpu(number)) for number in range(self.board.vcpus))
        return _MAGIC + _firmware_digest() + self.board.vcpus.to_bytes(8, "little") + rates + vcpus

    def set_state(self, state: bytes) -> None:
        """Go on where another machine was, with its memory.

        Raises
        ------
        RuntimeError
            If the VM is running.
        ValueError
            If it is no state, or one of another firmware or number of vCPUs. Nothing is changed then.
        """
        self._check_open()
        self._check_paused()
        state = bytes(state)
        rates, each = ctypes.sizeof(self.board.shared.rate), ctypes.sizeof(Vcpu)
        if state[: len(_MAGIC)] != _MAGIC or len(state) != _HEAD + rates + each * self.board.vcpus:
            raise ValueError(f"{len(state)} bytes are no state of an Arm machine with {self.board.vcpus} vCPUs")
        if state[len(_MAGIC) : len(_MAGIC) + 32] != _firmware_digest():
            raise ValueError("a state of another firmware: its guests' code isn't here")
        vcpus = [Vcpu.from_buffer_copy(state, _HEAD + rates + each * number) for number in range(self.board.vcpus)]
        for number, vcpu in enumerate(vcpus):
            if not self.guests.allowed(vcpu):
                raise ValueError(f"vCPU {number} of a state has HCR_EL2 = {vcpu.hcr:#x}, PSTATE = {vcpu.pstate:#x}")
        for number, vcpu in enumerate(vcpus):
            vcpu.state = self.board.vcpu(number).state
            self.board.mailbox.vcpu[number] = vcpu
        self.board.shared.rate = type(self.board.shared.rate).from_buffer_copy(state, _HEAD)

    # --- the log -------------------------------------------------------------------------------------------

    def _switch(self, *, on: bool) -> None:
        changed = [pages for pages in self._pages.values() if pages.slot.logging != on]
        try:
            for pages in changed:
                slot, stage2 = pages.slot, self._stage2s[pages.slot.id]
                if on:
                    if self._blocks:
                        stage2.split(slot.base_gfn, slot.npages)
                    stage2.enable_dbm()
                else:
                    stage2.disable_dbm()
                    stage2.take_saved_into(DirtyBitmap(slot.npages))
                    if self._blocks:
                        stage2.collapse(slot.base_gfn, slot.npages)
        finally:
            self.board.flush()
        for pages in changed:
            pages.slot = replace(pages.slot, flags=pages.slot.flags ^ KVM_MEM_LOG_DIRTY_PAGES)
            if not on:
                pages.forget()

    # --- the end -------------------------------------------------------------------------------------------

    def _release(self) -> None:
        self._running = False
        self.board.close()
        super()._release()

    def _let_go(self) -> None:
        """Leave the parent's machine alone."""

    def __del__(self) -> None:
        if not self._closed and os.getpid() == self._owner:
            warnings.warn(f"{self!r} was never closed", ResourceWarning, stacklevel=2)
            self.close()


def _firmware_digest() -> bytes:
    return hashlib.sha256(firmware()).digest()


def _kinds(guest: str | Sequence[str], vcpus: int) -> list[GuestKind]:
    names = {kind.name.lower(): kind for kind in GuestKind}
    asked = [guest] if isinstance(guest, str) else list(guest)
    if asked == ["mixed"]:
        asked = [name for name in names if name != "idle"]
    for name in asked:
        if name not in names:
            raise ValueError(f"a guest is one of {', '.join(names)} or mixed, not {name!r}")
    if not asked:
        raise ValueError("there is a guest or more")
    return [names[name] for name in islice(cycle(asked), vcpus)]


def _work(kinds: list[GuestKind], base: int, npages: int, page: int, window: int, seed: int) -> tuple[Work, ...]:
    """Return what each vCPU does: with all of the memory, or with a part of its own where one has tables in it."""
    parts = [(base, npages * page)] * len(kinds)
    if GuestKind.STAGE1 in kinds:
        share = npages // len(kinds)
        parts = [(base + number * share * page, share * page) for number in range(len(kinds))]
        for kind, (start, size) in zip(kinds, parts, strict=True):
            if kind is GuestKind.STAGE1 and (
                size < 1 << 18 or start < 2 << 30 or start + size - 1 >> 30 != start >> 30 or start >> 32
            ):
                raise ValueError(
                    f"a guest with a stage 1 of its own has 256K or more, in one GiB of the third or fourth: not "
                    f"{size:#x} bytes at gpa {start:#x}"
                )
    return tuple(Work(kind, *part, window=window, seed=seed) for kind, part in zip(kinds, parts, strict=True))


def _pages(ipa: int, pa: int, size: int, level: int = 3) -> Mapping:
    return Mapping(ipa, pa, size, level, pte.make_leaf(0, level))


def _mapped(ipa: int, pa: int, size: int, granule: Granule) -> list[Mapping]:
    """Return mappings by blocks of level 2 where they fit, and by pages before and after."""
    block = 1 << granule.shift(2)
    first = min(-(-ipa // block) * block, ipa + size)
    last = max((ipa + size) // block * block, first)
    parts = [(ipa, first, 3), (first, last, 2), (last, ipa + size, 3)]
    return [_pages(start, pa + start - ipa, stop - start, level) for start, stop, level in parts if start < stop]
