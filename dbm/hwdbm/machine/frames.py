"""The host's page table for a memslot: which frame is behind a page, and whether the host lets the guest write it."""

import numpy as np
from numpy.typing import NDArray

from hwdbm.stage2 import Layout

Pages = NDArray[np.int64]


class FramePool:
    """Numbers of physical frames, handed out once each.

    Parameters
    ----------
    first, limit : int
        The first number, and the one after the last.

    Examples
    --------
    >>> pool = FramePool(1, 1 << 20)
    >>> pool.take(100), pool.take(4, at=5, of=8)
    (1, 101)
    """

    def __init__(self, first: int = 1 << 18, limit: int = 1 << 36) -> None:
        self._next, self._limit = first, limit

    def take(self, count: int, at: int = 0, of: int = 1) -> int:
        """Return the first of `count` frames in a row, the first being `at` modulo `of`.

        Raises
        ------
        MemoryError
            If there are no more.
        """
        first = self._next + (at - self._next) % of
        if first + count > self._limit:
            raise MemoryError(f"{count} frames from {first:#x} on: the last is {self._limit - 1:#x}")
        self._next = first + count
        return first


class Frames:
    """The frames behind one memslot.

    Parameters
    ----------
    layout : Layout
        The slot's shape.
    pool : FramePool
        The pool that frames are taken from.
    hva_page : int
        The page number of the slot's backing in the VMM. The frames have its alignment, as a host's huge pages do.

    Attributes
    ----------
    shared : (npages,) bool array
        Whether a page's frame is shared (copy on write), by page: the guest may only read it.

    Notes
    -----
    Changes are made under the machine's ``mmu_lock``. Frames are identities: the bytes of a page are in the slot's
    memory, whatever its frame.
    """

    def __init__(self, layout: Layout, pool: FramePool, hva_page: int) -> None:
        self._layout, self._pool = layout, pool
        stripe = layout.sizes[2]
        self._first = pool.take(layout.npages, hva_page % stripe, stripe)
        self._moved = np.zeros(layout.npages, dtype=np.int64)  # 0: where it was from the first
        self.shared = np.zeros(layout.npages, dtype=np.bool_)
        # A block needs the guest's address, the host's and so the frame's to agree modulo its size (KVM:
        # ``fault_supports_stage2_huge_mapping``).
        self.congruent = layout.base_gfn % stripe == hva_page % stripe
        self._broken = np.zeros(layout.count(2), dtype=np.bool_)  # stripes of which a page was shared or moved

    def of(self, pages: Pages) -> Pages:
        """Return the frame of each page."""
        moved = self._moved[pages]
        return np.where(moved != 0, moved, self._first + pages)

    def blockable(self, stripes: NDArray[np.intp]) -> NDArray[np.bool_]:
        """Return for each level-2 entry whether one block may map it: whole, congruent, one run of private frames."""
        spans = self._layout.span(2, stripes)
        whole = (spans[:, 0] >= 0) & (spans[:, 1] <= self._layout.npages)
        return whole & ~self._broken[stripes] & self.congruent

    def share(self, first: int, npages: int) -> None:
        """Let others have the frames of some pages too."""
        self.shared[first : first + npages] = True
        self._broken[self._layout.entries(2, first, first + npages)] = True

    def renew(self, pages: Pages) -> Pages:
        """Give each page a private frame of its own, and return the frames: the end of a copy on write."""
        first = self._pool.take(pages.size)
        fresh = np.arange(first, first + pages.size, dtype=np.int64)
        self._moved[pages] = fresh
        self.shared[pages] = False
        size = self._layout.sizes[2]
        self._broken[(pages + self._layout.base_gfn % size) // size] = True
        return fresh

    def one(self, page: int) -> int:
        """Return the frame of a page. Equal to ``of([page])[0]``."""
        return int(self._moved[page]) or self._first + page

    def renew_one(self, page: int) -> int:
        """Give a page a private frame of its own, and return it: `renew` of one."""
        return int(self.renew(np.array([page]))[0])
