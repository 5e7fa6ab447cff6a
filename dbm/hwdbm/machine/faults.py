"""The fault handler of the vCPUs, as KVM's arm64 ``user_mem_abort``."""

from threading import Lock

import numpy as np
from numpy.typing import NDArray

from hwdbm.dirtylog import DirtyLog
from hwdbm.machine.clock import Clock
from hwdbm.machine.mmu import ACCESS_FLAG, PERMISSION, TRANSLATION
from hwdbm.machine.space import Region

Pages = NDArray[np.int64]
Codes = NDArray[np.uint8]


class FaultHandler:
    """Maps, ages, grants, and copies on write.

    Parameters
    ----------
    log : DirtyLog
        The log of the leaves.
    clock : Clock
        The clock that counts faults.
    thp : bool
        Whether the host has huge pages to map blocks with.
    split_blocks : bool
        Whether a block is split while its slot logs, so that each page is logged for itself. Otherwise a write to a
        block makes all of its pages dirty.

    Attributes
    ----------
    mmu_lock : Lock
        Held while faults are resolved, and while frames change. It is taken before pages are held, and those
        before a vCPU's own lock.

    Notes
    -----
    A fault that a block resolves is one fault: of the pages under it the first in the guest's order takes it, and the
    others, when they try again, find it resolved.
    """

    def __init__(self, log: DirtyLog, clock: Clock, *, thp: bool, split_blocks: bool) -> None:
        self._log, self._clock, self._thp, self._split = log, clock, thp, split_blocks
        self.mmu_lock = Lock()

    def handle(self, region: Region, pages: Pages, access: Codes, *, write: bool) -> None:
        """Resolve faults, or some of them: the guest tries each access again.

        Parameters
        ----------
        region : Region
            The slot, which allows the access.
        pages : (n,) int64 array
            The pages in the guest's order; they may repeat.
        access : (n,) uint8 array
            The fault that each took; the same for the same page.
        write : bool
            Whether they were written or read.
        """
        unique, first = np.unique(pages, return_index=True)
        codes = access[first]
        with self.mmu_lock:
            absent = codes == TRANSLATION
            if absent.any():
                self._translation(region, unique[absent], write=write)
            old = codes == ACCESS_FLAG
            if old.any():
                self._access_flag(region, unique[old])
            denied = codes == PERMISSION
            if denied.any():
                self._permission(region, unique[denied], first[denied])

    def _translation(self, region: Region, pages: Pages, *, write: bool) -> None:
        frames, s2 = region.frames, self._log.stage2(region.id)
        if write:
            copies = pages[frames.shared[pages]]
            frames.renew(copies)
            self._clock.add(copies=copies.size)
        blocks = self._thp and not self._log.slot(region.id).logging
        stripes = s2.layout.sizes[2]
        index = (pages + s2.base_gfn % stripes) // stripes
        fits = frames.blockable(index) & (s2.level(2)[index] == 0) & blocks
        self._clock.add(translation_faults=int(np.count_nonzero(~fits)) + int(np.unique(index[fits]).size))
        self._log.populate(region.id, pages, frames, write=write, blocks=blocks)

    def _access_flag(self, region: Region, pages: Pages) -> None:
        with self._log.locked(region.id, int(pages[0]), int(pages[-1] - pages[0]) + 1) as s2:
            count = s2.mkyoung_at(pages)
        self._clock.add(access_flag_faults=count)

    def _permission(self, region: Region, pages: Pages, order: Pages) -> None:
        frames, s2 = region.frames, self._log.stage2(region.id)
        shared = frames.shared[pages]
        copied = pages[shared]
        if copied.size:
            self._log.write_faults(region.id, copied, frames.renew(copied))
        pages, order = pages[~shared], order[~shared]
        pages = pages[_leaders(pages, order, s2.level(3)[pages] == 0, s2.layout.sizes[2], s2.base_gfn)]
        splits = self._log.write_faults(region.id, pages, split=self._split, whole=True)
        self._clock.add(copies=copied.size, permission_faults=copied.size + pages.size, splits=splits)


def _leaders(pages: Pages, order: Pages, large: NDArray[np.bool_], size: int, base: int) -> NDArray[np.bool_]:
    """Return which pages take a fault: all that are mapped as pages, and of a block's the first in `order`."""
    chosen = ~large
    (blocks,) = large.nonzero()
    blocks = blocks[np.argsort(order[blocks], kind="stable")]
    _, first = np.unique((pages[blocks] + base % size) // size, return_index=True)
    chosen[blocks[first]] = True
    return chosen
