"""Counting: tables by level, leaves by state, and the states of a slot's pages."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hwdbm import pte
from hwdbm.image.slots import Slot
from hwdbm.image.walk import Batch
from hwdbm.pte import State
from hwdbm.stage2 import Stage2

_CHUNK = 1 << 18  # pages whose states are looked up together


@dataclass(slots=True)
class LevelCount:
    """The contents of one level of the tables.

    Parameters
    ----------
    tables : int
        Tables visited; one that two entries point to counts twice.
    states : (7,) int64 array
        Entries by `hwdbm.pte.State`.
    contiguous, old : int
        Leaves with the contiguous bit, and without the access flag.
    """

    tables: int = 0
    states: NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(State), dtype=np.int64))
    contiguous: int = 0
    old: int = 0


class Census:
    """A visitor that counts what all of the tables hold.

    Attributes
    ----------
    levels : dict of int to LevelCount
        By level, the start level first.
    """

    def __init__(self) -> None:
        self.levels: dict[int, LevelCount] = {}

    def __call__(self, batch: Batch) -> None:
        """Count the batch's entries."""
        level, entries = batch.level, batch.entries
        count = self.levels.setdefault(level, LevelCount())
        leaf = pte.leaf(level)
        count.tables += len(entries)
        count.states += np.bincount(pte.state(entries.ravel(), level), minlength=len(State))
        count.contiguous += int(np.count_nonzero(leaf.also(ones=pte.CONTIGUOUS)(entries)))
        count.old += int(np.count_nonzero(leaf.also(zeros=pte.AF)(entries)))


def page_states(stage2: Stage2, slot: Slot) -> Iterator[NDArray[np.uint8]]:
    """Yield the states of the slot's pages, in order, some at a time.

    Parameters
    ----------
    stage2 : Stage2
        The slot's leaves, in whole granules.
    slot : Slot
        The slot; a page is `Slot.finest` bytes.

    Yields
    ------
    (n,) uint8 array
        Values of `hwdbm.pte.State`: absent, read-only, untracked, writable-clean, writable-dirty.
        A page under a block has the block's.
    """
    granule, unit = stage2.granule, slot.finest(stage2.granule)
    skipped = (slot.gpa - (stage2.base_gfn << granule.page_shift)) // unit
    left = slot.size // unit
    for start in range(0, stage2.npages, _CHUNK):
        stop = min(start + _CHUNK, stage2.npages)
        states = np.repeat(_granule_states(stage2, start, stop), granule.page_size // unit)
        states = states[skipped : skipped + left]
        skipped, left = 0, left - states.size
        yield states


def _granule_states(stage2: Stage2, start: int, stop: int) -> NDArray[np.uint8]:
    """Return the states of pages [start, stop) of one granule."""
    states = np.zeros(stop - start, dtype=np.uint8)
    for level in (1, 2):
        size = stage2.granule.pages_per_entry(level)
        where = stage2.layout.entries(level, start, stop)
        entries = pte.state(stage2.level(level)[where], level)
        if level == 2 and (entries == State.TABLE).any():  # otherwise level 3 isn't even touched
            np.maximum(states, pte.state(stage2.level(3)[start:stop], 3), out=states)
        entries[entries == State.TABLE] = State.ABSENT
        if entries.any():  # a leaf is at one level only, so the maximum is its state
            skipped = start - stage2.layout.span(level, where.start)[0]
            blocks = np.repeat(entries, size)[skipped : skipped + states.size]
            np.maximum(states, blocks, out=states)
    return states
