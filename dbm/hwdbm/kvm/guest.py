"""The guests: a few dozen bytes of code that write memory in patterns which the host can check.

``counting`` increments the first byte of every page in order, for ever, as QEMU's migration-test does. ``random``
writes the number of an iteration, which the host sets, to pages at random, as the kernel's dirty_log_test does.
``idle`` does nothing.
"""

import platform
from itertools import pairwise
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from hwdbm.errors import PatternError
from hwdbm.kvm import guest_arm64, guest_x86
from hwdbm.kvm.task import Task
from hwdbm.kvm.vcpu import VcpuFd

_BY_MACHINE: dict[str, ModuleType] = {"x86_64": guest_x86, "aarch64": guest_arm64}


def _here() -> ModuleType:
    return _BY_MACHINE[platform.machine()]


def code(kind: str) -> bytes:
    """Return the machine code of a guest on this architecture."""
    found: bytes = _here().CODE[kind]
    return found


def top() -> int:
    """Return the end of the addresses that a guest can write to."""
    found: int = _here().TOP
    return found


def boot(vcpu: VcpuFd, task: Task) -> None:
    """Set a new vCPU's registers so that it begins with a task.

    Raises
    ------
    ValueError
        If the guest can't reach the memory.
    NotImplementedError
        On arm64, whose guests lack page tables.
    """
    _here().boot(vcpu, task)


def set_chunk(vcpu: VcpuFd, kind: str, chunk: int) -> None:
    """Have a paused guest exit after every `chunk` pages from now on."""
    _here().set_chunk(vcpu, kind, chunk)


def at(vcpu: VcpuFd) -> int:
    """Return the address of the instruction that a vCPU is at."""
    where: int = _here().at(vcpu)
    return where


def shares(npages: int, vcpus: int) -> list[tuple[int, int]]:
    """Return the pages that each vCPU of a counting guest counts in, as (first, how many).

    Examples
    --------
    >>> shares(10, 3)
    [(0, 3), (3, 3), (6, 4)]
    """
    edges = [npages * vcpu // vcpus for vcpu in range(vcpus + 1)]
    return [(first, last - first) for first, last in pairwise(edges)]


def first_break(counts: NDArray[np.uint8]) -> int | None:
    """Return the first page whose count can't follow the ones before it, or None.

    One vCPU that adds 1 to each page in turn leaves, at any moment, pages that it was at already in this round, and
    after them pages one count behind. So the counts never rise from a page to the next, fall once at most, and by 1;
    all modulo 256.

    Parameters
    ----------
    counts : (npages,) uint8 array
        The first byte of each page, in order.

    Examples
    --------
    >>> first_break(np.array([0, 0, 255, 255], dtype=np.uint8)) is None
    True
    >>> first_break(np.array([7, 6, 6, 5], dtype=np.uint8)), first_break(np.array([7, 8], dtype=np.uint8))
    (3, 1)
    """
    falls = counts[:-1] - counts[1:]  # modulo 256, as uint8 is
    (steps,) = falls.nonzero()
    if steps.size == 0 or (steps.size == 1 and falls[steps[0]] == 1):
        return None
    return int(steps[0 if falls[steps[0]] != 1 else 1]) + 1


def check_counting(memory: NDArray[np.uint8], page_size: int, *, vcpus: int = 1) -> None:
    """Check the memory of a paused counting guest.

    Parameters
    ----------
    memory : (npages * page_size,) uint8 array
        All that the guest writes.
    page_size : int
        Bytes of a page.
    vcpus : int
        How many count, each in its own of the `shares`.

    Raises
    ------
    PatternError
        If a page isn't as it must be. The first such page is named, counted from the memory's first.
    """
    counts = memory[::page_size].copy()
    for first, npages in shares(counts.size, vcpus):
        bad = first_break(counts[first : first + npages])
        if bad is not None:
            page = first + bad
            raise PatternError(
                f"page {page} counts {counts[page]} after page {page - 1}'s {counts[page - 1]}: "
                "going up the pages, the count falls once, by 1"
            )


def check_random(memory: NDArray[np.uint8], page_size: int, iteration: int) -> None:
    """Check the memory of a paused random guest: no page has the number of an iteration that is still to come.

    Parameters
    ----------
    memory : (npages * page_size,) uint8 array
        All that the guest writes.
    page_size : int
        Bytes of a page.
    iteration : int
        The highest number that was set.

    Raises
    ------
    PatternError
        If a page has another number. The first such page is named.
    """
    numbers = memory.view(np.uint32)[:: page_size // 4]
    (bad,) = (numbers > iteration).nonzero()
    if bad.size:
        raise PatternError(f"page {bad[0]} is of iteration {numbers[bad[0]]}, and this is iteration {iteration}")
