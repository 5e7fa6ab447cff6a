"""What becomes of blocks when a log starts and stops.

While a slot logs, a block is split at the first write to it, or all are at the start, by chunks; or it is kept, and
logged as a whole. When the log is off, pages that make up a block become one again: KVM's arm64 leaves them alone.
"""

from collections.abc import Iterator
from enum import Enum
from typing import Protocol

import numpy as np

from hwdbm import pte
from hwdbm.dirtylog import FlushHook
from hwdbm.machine.frames import Frames
from hwdbm.machine.guestlog import GuestLog, block_runs
from hwdbm.stage2 import Stage2

__all__ = ["BlockKeeper", "Blocks"]


class Count(Protocol):
    """`Clock.add`."""

    def __call__(self, **counts: int) -> None:
        """Count what was done."""


class Blocks(Enum):
    """How blocks are logged.

    ``WRITE`` splits a block at the first write to it, which faults once, also with hardware DBM. ``EAGER`` splits all
    when the log starts. ``TRACK`` splits none: a write makes all pages of the block dirty.
    """

    WRITE = "write"
    EAGER = "eager"
    TRACK = "track"


class BlockKeeper:
    """Splits and collapses, a chunk at a time, each flushed before its pages are let go.

    Parameters
    ----------
    log : GuestLog
        The log.
    policy : Blocks
        How blocks are logged.
    chunk_pages : int
        Pages of a chunk (KVM: ``KVM_CAP_ARM_EAGER_SPLIT_CHUNK_SIZE``).
    flush : callable
        The machine's flush, as `hwdbm.dirtylog.FlushHook`.
    count : callable
        Takes what was done, as `Clock.add`.
    """

    def __init__(self, log: GuestLog, policy: Blocks, chunk_pages: int, flush: FlushHook, count: Count) -> None:
        self._log, self.policy, self._flush, self._count = log, policy, flush, count
        self._chunk = chunk_pages

    def _chunks(self, slot: int, first: int, stop: int) -> Iterator[tuple[int, int]]:
        # Aligned to stripes of the guest's address space, so that no block is in two chunks.
        offset = self._log.slot(slot).base_gfn % self._chunk
        start = first
        while start < stop:
            end = min((start + offset) // self._chunk * self._chunk + self._chunk - offset, stop)
            yield start, end
            start = end

    def started(self, slot: int) -> None:
        """Do to the blocks of a slot whose log has just started what the policy says."""
        npages = self._log.slot(slot).npages
        if self._log.initially_set or self.policy is Blocks.TRACK:
            return  # all pages are dirty in the log, and blocks are split by the CLEARs
        if self.policy is Blocks.EAGER:
            self.split(slot, 0, npages)
        elif self._log.hw_dbm:
            self._deny(slot, npages)

    def split(self, slot: int, first: int, npages: int) -> int:
        """Split the blocks that touch some pages, and return how many there were."""
        total = 0
        for lo, hi in self._chunks(slot, first, first + npages):
            with self._log.locked(slot, lo, hi - lo) as s2:
                runs = block_runs(s2, lo, hi)
                split = s2.split(s2.base_gfn + lo, hi - lo)
                if split:
                    self._flush(self._log.slot(slot), runs[0][0], runs[-1][1] - runs[0][0])
                total += split
        self._count(splits=total)
        return total

    def _deny(self, slot: int, npages: int) -> None:
        """Take DBM from blocks, so that the first write to each faults: nothing else would split it."""
        for lo, hi in self._chunks(slot, 0, npages):
            with self._log.locked(slot, lo, hi - lo) as s2:
                for start, stop in block_runs(s2, lo, hi):
                    s2.clear_dbm(s2.base_gfn + start, stop - start)
                    self._flush(self._log.slot(slot), start, stop - start)

    def stopped(self, slot: int, frames: Frames) -> int:
        """Make pages blocks again where they can be; every leaf that the host allows may be written then.

        Returns
        -------
        int
            Tables that became blocks.
        """
        memslot = self._log.slot(slot)
        with self._log.locked(slot) as s2:
            s2.disable_dbm()
        total = 0
        for lo, hi in self._chunks(slot, 0, memslot.npages):
            with self._log.locked(slot, lo, hi - lo) as s2:
                if not memslot.readonly:
                    _allow(s2, frames, lo, hi)
                collapsed = s2.collapse(s2.base_gfn + lo, hi - lo)
                if collapsed:
                    self._flush(memslot, lo, hi - lo)
                total += collapsed
        self._count(collapses=total)
        return total


def _allow(s2: Stage2, frames: Frames, lo: int, hi: int) -> None:
    """Make read-only leaves untracked where no page of theirs is shared: write-protection was the log's."""
    for start, stop in block_runs(s2, lo, hi):  # a block has no shared page
        for level in (1, 2):
            where = s2.layout.entries(level, start, stop)
            entries = s2.level(level)[where]
            entries[:] = pte.Update(pte.read_only(level), sets=pte.S2AP_W)(entries)
    leaves = s2.level(3)[lo:hi]
    if leaves.any():
        private = ~frames.shared[lo:hi]
        allow = pte.read_only(3)(leaves) & private
        np.bitwise_or(leaves, np.uint64(pte.S2AP_W), out=leaves, where=allow)
