"""GuestLog: a DirtyLog with the verbs of a fault handler in bulk, and with a say in what becomes of blocks.

The rules are those of `DirtyLog.map` and `DirtyLog.write_fault`, for many pages under one hold.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwdbm import pte
from hwdbm.bitmap import DirtyBitmap
from hwdbm.dirtylog import DirtyLog
from hwdbm.machine.frames import Frames
from hwdbm.stage2 import Stage2

__all__ = ["GuestLog", "block_runs"]

Pages = NDArray[np.int64]


class GuestLog(DirtyLog):
    """The dirty log of a machine.

    Parameters
    ----------
    split_blocks : bool
        Whether a block is split while its slot logs, so that each page is logged for itself. Otherwise a write to a
        block makes all of its pages dirty.
    **options
        `hwdbm.DirtyLog`'s.
    """

    def __init__(self, *, split_blocks: bool = True, **options: Any) -> None:
        super().__init__(**options)
        self.split_blocks = split_blocks

    def populate(self, slot: int, pages: Pages, frames: Frames, *, write: bool, blocks: bool) -> None:
        """Map those of some pages that have no leaf, as a translation fault's handler does.

        What the slot's log needs is `DirtyLog.map`'s. But a write under write-protection is granted and marked at
        once, as KVM does, and takes no second fault. A page with a shared frame is mapped read-only.

        Parameters
        ----------
        slot : int
            The slot's id.
        pages : (n,) int64 array
            Sorted, each once, counted from the slot's first.
        frames : Frames
            What is behind them.
        write : bool
            Whether they are being written, rather than read.
        blocks : bool
            Whether to map a block where one fits, nothing is mapped and the slot doesn't log.
        """
        found = self.slot_log(slot)
        lo, hi = int(pages[0]), int(pages[-1]) + 1
        with found.hold_leaves(lambda: (lo, hi)):
            s2, logs, readonly = found.stage2, found.live is not None, found.memslot.readonly
            if blocks and not logs:
                _map_blocks(s2, pages, frames, writable=not readonly)
            pages = _absent(s2, pages)
            may = ~frames.shared[pages] & (not readonly)
            hardware = logs and found.mode.hardware
            grants = may if write or not logs or hardware else np.zeros_like(may)
            for writable in (True, False):
                chosen = pages[grants == writable]
                address = frames.of(chosen).astype(np.uint64) << np.uint64(s2.granule.page_shift)
                leaves = pte.make_leaf(address, 3, writable=writable, dbm=writable and hardware)
                _put(s2, chosen, leaves)
            if found.live is not None and write and not hardware:
                _mark(found.live, pages[grants])

    def write_faults(self, slot: int, pages: Pages) -> int:
        """Resolve write faults on pages that the host lets the guest write. Return how many blocks were split.

        `DirtyLog.write_fault` for each. Pages without a leaf, or whose leaf allows the write, are left as they are. The
        pages of a block that is split can all be written without a further fault, where hardware logs it.

        Parameters
        ----------
        slot : int
            The slot's id.
        pages : (n,) int64 array
            Sorted, each once, counted from the slot's first.
        """
        found = self.slot_log(slot)
        lo, hi = int(pages[0]), int(pages[-1]) + 1
        with found.hold_leaves(lambda: (lo, hi)):
            s2, live, hardware = found.stage2, found.live, found.mode.hardware
            dbm = live is not None and hardware
            split, opened = 0, np.zeros(pages.size, dtype=np.bool_)
            for page in pages[s2.level(3)[pages] == 0].tolist():
                leaf, start, stop = _block(s2, page)
                if leaf is None or leaf & pte.S2AP_W or (hardware and leaf & pte.DBM):
                    continue
                gfn = s2.base_gfn + page
                if live is None or not self.split_blocks:
                    s2.relax(gfn, dbm=dbm)
                    if live is not None:
                        live.set_range(start, stop - start)
                    continue
                split += s2.split(gfn, 1)
                if hardware:  # the host let the guest write the block, so its pages too
                    first, last = np.clip(s2.layout.span(2, s2.layout.index(2, page)), 0, s2.npages).tolist()
                    opened |= (first <= pages) & (pages < last)
                    children = s2.level(3)[first:last]
                    children[:] = pte.Update(pte.read_only(3), sets=pte.DBM)(children)
            leaves = s2.level(3)[pages]
            wanted = pte.leaf(3)(leaves) & ~pte.writable(3)(leaves)
            if hardware:
                wanted &= ~pte.tracked(3)(leaves) | opened
            pages = pages[wanted]
            s2.level(3)[pages] = (pte.relax_dirty if dbm else pte.relax)(3)(leaves[wanted])
            if live is not None:
                _mark(live, pages)
            found.meter.fault(pages.size)
            if split:
                found.meter.flush(found.memslot, lo, hi - lo)
        return split


def block_runs(s2: Stage2, lo: int, hi: int) -> list[tuple[int, int]]:
    """Return the runs of pages [start, stop) of [lo, hi) that blocks map, out to the ends of blocks in the slot."""
    runs: list[tuple[int, int]] = []
    for level in (1, 2):
        where = s2.layout.entries(level, lo, hi)
        (index,) = pte.leaf(level)(s2.level(level)[where]).nonzero()
        spans = np.clip(s2.layout.spans(level, where.start + index), 0, s2.npages)
        for start, stop in spans.tolist():
            if runs and runs[-1][1] == start:
                runs[-1] = (runs[-1][0], stop)
            else:
                runs.append((start, stop))
    return runs


def _block(s2: Stage2, page: int) -> tuple[int | None, int, int]:
    """Return the block that maps a page, or None, and its pages [start, stop) in the slot."""
    for level in (2, 1):
        index = s2.layout.index(level, page)
        desc = int(s2.level(level)[index])
        if pte.leaf(level)(desc):
            start, stop = s2.layout.span(level, index)
            return desc, max(start, 0), min(stop, s2.npages)
    return None, page, page


def _absent(s2: Stage2, pages: Pages) -> Pages:
    """Return those of `pages` that no leaf maps."""
    pages = pages[s2.level(3)[pages] & np.uint64(pte.TABLE) != np.uint64(pte.TABLE)]
    for level in (2, 1):
        size = s2.layout.sizes[level]
        pages = pages[~pte.leaf(level)(s2.level(level)[(pages + s2.base_gfn % size) // size])]
    return pages


def _put(s2: Stage2, pages: Pages, leaves: NDArray[np.uint64]) -> None:
    """Write leaves of pages that have none, and the tables above them."""
    for level in (1, 2):
        size = s2.layout.sizes[level]
        above = np.unique((pages + s2.base_gfn % size) // size)
        s2.level(level)[above[s2.level(level)[above] == 0]] = pte.TABLE
    s2.level(3)[pages] = leaves


def _map_blocks(s2: Stage2, pages: Pages, frames: Frames, *, writable: bool) -> None:
    size, base = s2.layout.sizes[2], s2.base_gfn
    stripes = np.unique((pages + base % size) // size)
    stripes = stripes[(s2.level(2)[stripes] == 0) & frames.blockable(stripes)]
    first = s2.layout.spans(2, stripes)[:, 0]
    large = s2.layout.sizes[1]
    above = (first + base % large) // large
    free = ~pte.leaf(1)(s2.level(1)[above])
    stripes, first, above = stripes[free], first[free], above[free]
    s2.level(1)[above] = pte.TABLE
    address = frames.of(first).astype(np.uint64) << np.uint64(s2.granule.page_shift)
    s2.level(2)[stripes] = pte.make_leaf(address, 2, writable=writable)


def _mark(live: DirtyBitmap, pages: Pages) -> None:
    """Set bits; only words that the pages are in are touched, as others may be another thread's."""
    bits = np.uint64(1) << (pages & 63).astype(np.uint64)
    np.bitwise_or.at(live.words, pages >> 6, bits)
