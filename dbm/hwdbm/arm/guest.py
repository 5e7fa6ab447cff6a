"""Guests of the Arm machine: what each vCPU does, in its own memory, and what it says that it wrote."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hwdbm.arm.abi import FIRMWARE, RAM, SHARED, GuestKind, GuestTask, Mapping, Vcpu
from hwdbm.arm.board import Board
from hwdbm.granule import Granule
from hwdbm.pte import AddressBits, make_leaf

PRIVATE, PRIVATE_PA = 0x4800_0000, 0x4480_0000
"""Where guests have what is their own: as they see it, and in RAM."""

_UNIT = 0x1_0000  # the largest granule
_STACK = _UNIT
_PSTATE = 0x3C5  # EL1h, interrupts masked
_SCTLR = 0x30D0_0800  # RES1, and everything off
_HCR = 1 << 31 | 0b111 << 3 | 1 << 0  # RW: AArch64 below; AMO, IMO, FMO; VM: stage 2
_HCR_DC = 1 << 12  # memory is cacheable while stage 1 is off


@dataclass(frozen=True, slots=True)
class Work:
    """What one vCPU does.

    Parameters
    ----------
    kind : GuestKind
        The kind of guest.
    base, size : int
        Where it writes: guest physical addresses, in bytes.
    window : int
        Pages of a sliding window.
    seed : int
        Seed for choosing pages.
    limit : int
        Stores after which it stops; 0: never.
    skip : bool
        Whether a store that faults is skipped; otherwise it is tried again until it doesn't.
    """

    kind: GuestKind
    base: int
    size: int
    window: int = 64
    seed: int = 0
    limit: int = 0
    skip: bool = False


def private_size(npages: int, vcpus: int) -> int:
    """Return the bytes that guests have for themselves, if each counts `npages` pages."""
    return vcpus * private_each(npages)


def private_each(npages: int) -> int:
    """Return the bytes that one of them has."""
    return _UNIT + -(-4 * npages // _UNIT) * _UNIT


def system_mappings(granule: Granule, bits: AddressBits = AddressBits.PA48) -> tuple[Mapping, ...]:
    """Return what every plan has: the firmware, in which the guests' code is, and what it shares with them."""
    leaf = make_leaf(0, 3, writable=False, bits=bits)
    size = max(granule.page_size, _UNIT)
    return tuple(Mapping(at, at, size, 3, leaf) for at in (FIRMWARE, SHARED))


class Guests:
    """The guests of a board: they count, in memory of their own, how often they wrote each page.

    Parameters
    ----------
    board : Board
        The machine, not started yet. Its vCPUs are idle until `give`.
    origin, npages : int
        The pages that are counted: the guest physical address of the first, and how many.
    page_shift : int
        Of such a page.

    Attributes
    ----------
    tasks : list of GuestTask
        What each vCPU does, in the machine's RAM.
    """

    def __init__(self, board: Board, origin: int, npages: int, page_shift: int) -> None:
        self.board, self.origin, self.npages, self.page_shift = board, origin, npages, page_shift
        self._each = private_each(npages)
        self.tasks = [self._task(number) for number in range(board.vcpus)]
        for number in range(board.vcpus):
            at, vcpu = PRIVATE + number * self._each, board.vcpu(number)
            vcpu.x[0], vcpu.sp, vcpu.pc, vcpu.pstate = at, at + _STACK, board.mailbox.guest, _PSTATE
            vcpu.sctlr, vcpu.vbar, vcpu.hcr = _SCTLR, board.mailbox.vectors, _HCR | _HCR_DC

    def give(self, work: tuple[Work, ...]) -> None:
        """Give each vCPU, which hasn't run yet, its work.

        Raises
        ------
        ValueError
            If it isn't one for each.
        """
        if len(work) != self.board.vcpus:
            raise ValueError(f"{self.board.vcpus} vCPUs do as many kinds of work, not {len(work)}")
        for number, (one, task) in enumerate(zip(work, self.tasks, strict=True)):
            task.vcpu, task.base, task.size, task.page_shift = number, one.base, one.size, self.page_shift
            task.counts, task.origin = PRIVATE + number * self._each + _UNIT, self.origin
            task.window, task.limit, task.number = one.window, one.limit, 1
            # xorshift stays at 0, which only a vCPU 195 would begin with.
            task.random = ((one.seed << 8 | number) * 0x9E37_79B9_7F4A_7C15 + 1) % (1 << 64)
            vcpu = self.board.vcpu(number)
            vcpu.skip, vcpu.hcr = one.skip, _HCR if one.kind is GuestKind.STAGE1 else _HCR | _HCR_DC
            task.kind = one.kind

    @staticmethod
    def allowed(vcpu: Vcpu) -> bool:
        """Return whether registers are those of a guest: at EL1, under stage 2."""
        return vcpu.hcr in (_HCR, _HCR | _HCR_DC) and vcpu.pstate & 0x1F == _PSTATE & 0x1F and vcpu.skip <= 1

    def _task(self, number: int) -> GuestTask:
        return self.board.at(PRIVATE_PA + number * self._each, GuestTask)

    def counts_of(self, number: int) -> NDArray[np.uint32]:
        """Return how often a vCPU, which is paused, wrote each page so far."""
        start = PRIVATE_PA - RAM + number * self._each + _UNIT
        return self.board.ram.view[start : start + 4 * self.npages].view(np.uint32)

    def counts(self) -> NDArray[np.uint64]:
        """Return how often each page was written so far, by all vCPUs together, which are paused."""
        total = np.zeros(self.npages, dtype=np.uint64)
        for number in range(self.board.vcpus):
            total += self.counts_of(number)
        return total

    @property
    def stores(self) -> int:
        """Stores so far."""
        return sum(task.stores for task in self.tasks)
