"""Filling the flat arrays of a `hwdbm.Stage2` from the batches of a walk."""

import numpy as np

from hwdbm import pte
from hwdbm.granule import LEAF_LEVELS
from hwdbm.image.walk import Batch
from hwdbm.stage2 import Stage2
from hwdbm.vtcr import Vtcr


class Filler:
    """A visitor that copies the entries of one slot, a whole table at a time where it can.

    Parameters
    ----------
    stage2 : Stage2
        Empty. It covers the slot in whole granules.
    vtcr : Vtcr
        The shape of the tables.

    Notes
    -----
    Entries keep their true descriptors. Levels above the start level get a table descriptor for
    each table of the start level: what a walk that began there would have found. A level-0 block
    (4K granule with DS) becomes the level-1 blocks that map the same. A block that reaches beyond
    the slot is kept where it begins or ends in it.
    """

    def __init__(self, stage2: Stage2, vtcr: Vtcr) -> None:
        self.stage2, self.vtcr, self.granule = stage2, vtcr, stage2.granule
        self.contiguous = False  # whether an entry of the tables that were seen has the bit

    def __call__(self, batch: Batch) -> None:
        """Take what the batch has of the slot."""
        if batch.level == self.vtcr.start_level:
            self._above(batch)
        if batch.level in LEAF_LEVELS:
            self._tables(batch)
        elif batch.level == 0:
            self._blocks_of_level_0(batch)

    def _first(self, level: int) -> int:
        """Return the number, counted from IPA 0, of the slot's first entry of `level`."""
        return self.stage2.base_gfn // self.granule.pages_per_entry(level)

    def _above(self, batch: Batch) -> None:
        for level in LEAF_LEVELS:
            if level < batch.level:
                index = (batch.ipa >> np.uint64(self.granule.shift(level))).astype(np.int64) - self._first(level)
                index, rows = np.unique(index, return_index=True)
                pa = batch.pa[rows] & np.uint64(-self.granule.page_size & (1 << 64) - 1)
                self.stage2.load(level, index, pte.make_table(pa, self.vtcr.address_bits)[:, None])

    def _tables(self, batch: Batch) -> None:
        found = batch.entries
        self.contiguous |= bool(int(np.bitwise_or.reduce(found, axis=None)) & pte.CONTIGUOUS)
        if batch.level < 3:  # what isn't there is zero to the verbs that would put a table there
            found = np.where(found & pte.VALID, found, np.uint64(0))
        start = (batch.ipa >> np.uint64(self.granule.shift(batch.level))).astype(np.int64) - self._first(batch.level)
        self.stage2.load(batch.level, start, found)

    def _blocks_of_level_0(self, batch: Batch) -> None:
        row, column = np.nonzero(pte.leaf(0)(batch.entries))
        shift, below = self.granule.shift(0), self.granule.shift(1)
        low_bits = np.uint64((1 << shift) - (1 << below))
        steps = np.arange(self.granule.entries, dtype=np.uint64) << np.uint64(below)
        for i, j in zip(row.tolist(), column.tolist(), strict=True):
            start = (int(batch.ipa[i]) + (j << shift) >> below) - self._first(1)
            self.stage2.load(1, [start], (batch.entries[i, j] & ~low_bits | steps)[None])
