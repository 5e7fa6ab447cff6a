"""The task of a guest, and where its code lies: the same on every architecture."""

from dataclasses import dataclass

KINDS = ("counting", "random", "idle")
"""The guests. `idle` has no code: its vCPUs exist, and never run."""

DATA_SLOT, CODE_SLOT = 0, 1
"""The slot that a guest writes, and the one that it is in: a page of code, and a page with the iteration's number."""

CODE_GPA = 0x1_0000
"""Where the slot of the code begins; a multiple of every page's size."""


def iteration_offset(page_size: int) -> int:
    """Return where in the code's slot the iteration's number is, 32 bits that the host sets and `random` writes."""
    return page_size


@dataclass(frozen=True, slots=True)
class Task:
    """The task of one vCPU.

    Parameters
    ----------
    kind : str
        ``counting`` or ``random``.
    start, end : int
        The memory that it writes: guest physical addresses, multiples of the page.
    page_size : int
        Bytes of a page.
    seed : int
        The seed of the random numbers, 32 bits.
    """

    kind: str
    start: int
    end: int
    page_size: int
    seed: int
