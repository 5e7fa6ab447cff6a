"""Guests of the Arm machine: what each vCPU does, in its own memory, and what it says that it wrote."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hwdbm.arm.abi import FIRMWARE, RAM, SHARED, Kind, Mapping, Task
from hwdbm.arm.board import Board
from hwdbm.granule import Granule
from hwdbm.pte import AddressBits, make_leaf

__all__ = ["PRIVATE", "PRIVATE_PA", "Guests", "Work", "private_size", "system_mappings"]

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
    kind : Kind
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

    kind: Kind
    base: int
    size: int
    window: int = 64
    seed: int = 0
    limit: int = 0
    skip: bool = False


def private_size(npages: int, vcpus: int) -> int:
    """Return the bytes that guests have for themselves, if each counts `npages` pages."""
    return vcpus * _each(npages)


def _each(npages: int) -> int:
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
        The machine, not started yet.
    work : sequence of Work
        One for each vCPU.
    origin, npages : int
        The pages that are counted: the guest physical address of the first, and how many.
    page_shift : int
        Of such a page.
    """

    def __init__(self, board: Board, work: tuple[Work, ...], origin: int, npages: int, page_shift: int) -> None:
        if len(work) != board.vcpus:
            raise ValueError(f"{board.vcpus} vCPUs do the work of {board.vcpus}, not of {len(work)}")
        self.board, self.npages, self._each = board, npages, _each(npages)
        self.tasks = [self._task(number) for number in range(board.vcpus)]
        for number, one in enumerate(work):
            at = PRIVATE + number * self._each
            task, vcpu = self.tasks[number], board.vcpu(number)
            task.kind, task.vcpu, task.base, task.size, task.page_shift = (
                one.kind,
                number,
                one.base,
                one.size,
                page_shift,
            )
            task.counts, task.origin, task.window, task.limit = at + _UNIT, origin, one.window, one.limit
            task.random = (one.seed << 8 | number) * 0x9E37_79B9_7F4A_7C15 + 1 & (1 << 64) - 1 or 1
            task.number = 1
            vcpu.x[0], vcpu.sp, vcpu.pc, vcpu.pstate = at, at + _STACK, board.mailbox.guest, _PSTATE
            vcpu.sctlr, vcpu.vbar, vcpu.skip = _SCTLR, board.mailbox.vectors, one.skip
            vcpu.hcr = _HCR if one.kind is Kind.STAGE1 else _HCR | _HCR_DC

    def _task(self, number: int) -> Task:
        return self.board.at(PRIVATE_PA + number * self._each, Task)

    def counts(self) -> NDArray[np.uint64]:
        """Return how often each page was written so far, by all vCPUs. They must be paused."""
        total = np.zeros(self.npages, dtype=np.uint64)
        for number in range(self.board.vcpus):
            start = PRIVATE_PA - RAM + number * self._each + _UNIT
            total += self.board.ram.view[start : start + 4 * self.npages].view(np.uint32)
        return total

    @property
    def stores(self) -> int:
        """Stores so far."""
        return sum(task.stores for task in self.tasks)
