"""Blocks while a log runs: split, tracked, and collapsed when it stops.

While a slot logs, a block is split at the first write to it, or all are at the start, by chunks; or it is kept, and
logged as a whole. When the log is off, pages that make up a block become one again: KVM's arm64 leaves them alone.
"""

from collections.abc import Iterator
from enum import Enum
from typing import Protocol

import numpy as np

from hwdbm.dirtylog import DirtyLog
from hwdbm.machine.frames import Frames
from hwdbm.stage2 import Stage2


class _Count(Protocol):
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
    log : DirtyLog
        The log.
    policy : Blocks
        How blocks are logged.
    chunk_pages : int
        Pages of a chunk (KVM: ``KVM_CAP_ARM_EAGER_SPLIT_CHUNK_SIZE``).
    count : callable
        Takes what was done, as `Clock.add`.
    """

    def __init__(self, log: DirtyLog, policy: Blocks, chunk_pages: int, count: _Count) -> None:
        self._log, self.policy, self._count = log, policy, count
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
        """Apply the policy to the blocks of a slot whose log has just started."""
        npages = self._log.slot(slot).npages
        if self._log.initially_set or self.policy is Blocks.TRACK:
            return  # all pages are dirty in the log, and blocks are split by the CLEARs
        if self.policy is Blocks.EAGER:
            self.split(slot, 0, npages)
        else:
            for lo, hi in self._chunks(slot, 0, npages):
                self._log.deny_blocks(slot, lo, hi - lo)

    def split(self, slot: int, first: int, npages: int) -> int:
        """Split the blocks that touch some pages, and return how many there were."""
        chunks = self._chunks(slot, first, first + npages)
        total = sum(self._log.change(slot, lo, hi - lo, _split) for lo, hi in chunks)
        self._count(splits=total)
        return total

    def stopped(self, slot: int, frames: Frames) -> int:
        """Make pages blocks again where they can be; every leaf that the host allows may be written then.

        Returns
        -------
        int
            Tables that became blocks.
        """
        memslot = self._log.slot(slot)

        def collapse(s2: Stage2, first: int, count: int) -> int:
            if not memslot.readonly and s2.mapped(first, count):
                # Write-protection was the log's where no page of a leaf is shared; a block has no shared page.
                s2.allow_at(first + np.flatnonzero(~frames.shared[first : first + count]))
            return s2.collapse(s2.base_gfn + first, count)

        with self._log.locked(slot) as s2:
            s2.disable_dbm()
        chunks = self._chunks(slot, 0, memslot.npages)
        total = sum(self._log.change(slot, lo, hi - lo, collapse) for lo, hi in chunks)
        self._count(collapses=total)
        return total


def _split(s2: Stage2, first: int, count: int) -> int:
    return s2.split(s2.base_gfn + first, count)
