"""Contiguous runs: of those, hardware may mark any one entry for a write to any page (I_NFFSV)."""

import numpy as np

from hwdbm import pte
from hwdbm.bitmap import DirtyBitmap, word_count
from hwdbm.granule import LEAF_LEVELS, Granule
from hwdbm.image.slots import Slot
from hwdbm.image.walk import Batch
from hwdbm.stage2 import Stage2


class RunMarker:
    """A visitor that finds the contiguous runs with a dirty entry that touch a slot.

    A run is the aligned group of `hwdbm.Granule.contiguous_entries` entries, and it is dirty if one
    of them is dirty and has the contiguous bit, be it outside of the slot.

    Parameters
    ----------
    slot : Slot
        The slot.
    granule : Granule
        The size of a page.
    writable : bool
        Whether every writable leaf counts as dirty, and not only those with DBM.
    """

    def __init__(self, slot: Slot, granule: Granule, *, writable: bool = False) -> None:
        self.granule, self.rule = granule, pte.writable if writable else pte.dirty
        self.first, self.npages = slot.frames(granule)
        self.run = granule.contiguous_entries(3)
        self.lead = self.first % self.run  # pages of the first run that are before the slot
        self.page_runs = np.zeros(-(-(self.lead + self.npages) // self.run), dtype=np.bool_)
        self.block_runs: list[tuple[int, int]] = []  # pages [start, stop), counted from the slot

    def __bool__(self) -> bool:
        """Whether there is a dirty run."""
        return bool(self.block_runs) or bool(self.page_runs.any())

    def __call__(self, batch: Batch) -> None:
        """Take the dirty runs of the batch."""
        level = batch.level
        run = self.granule.contiguous_entries(level) if level in LEAF_LEVELS else 1
        if run == 1 or not int(np.bitwise_or.reduce(batch.entries, axis=None)) & pte.CONTIGUOUS:
            return
        hits = self.rule(level).also(ones=pte.CONTIGUOUS)(batch.entries)
        row, column = np.nonzero(hits.reshape(len(hits), -1, run).any(axis=2))
        pages = run * self.granule.pages_per_entry(level)
        table = (batch.ipa >> np.uint64(self.granule.page_shift)).astype(np.int64) - self.first
        start = table[row] + column * pages
        start = start[(start + pages > 0) & (start < self.npages)]
        if level == 3:
            self.page_runs[(start + self.lead) // run] = True
        else:
            self.block_runs += [(max(at, 0), min(at + pages, self.npages)) for at in start.tolist()]

    def bitmap(self) -> DirtyBitmap:
        """Return the pages of the runs, a bit for each granule that `Slot.frames` counts."""
        octets = np.packbits(self.page_runs, bitorder="little")
        words = np.zeros(word_count(self.page_runs.size), dtype=np.uint64)
        words.view(np.uint8)[: octets.size] = octets
        runs = DirtyBitmap.from_words(words, self.page_runs.size)
        pages = runs.refine(self.run).part(self.lead, self.npages)
        for start, stop in self.block_runs:
            pages.set_range(start, stop - start)
        return pages


def widen(bitmap: DirtyBitmap, stage2: Stage2) -> None:
    """Set the bits of all contiguous runs of which a leaf's is set; a run's pages outside of the slot are left out."""
    leaves, pages = stage2.leaf_at(bitmap.pages()), bitmap.pages()
    for level in LEAF_LEVELS:
        size = stage2.granule.contiguous_entries(level) * stage2.granule.pages_per_entry(level)
        of = (leaves.level == level) & (leaves.desc & np.uint64(pte.CONTIGUOUS) != 0)
        for start in (np.unique((pages[of] + stage2.base_gfn) // size) * size - stage2.base_gfn).tolist():
            first, stop = max(start, 0), min(start + size, stage2.npages)
            bitmap.set_range(first, stop - first)
