"""The dirty pages of all slots of an image, from one walk over its tables."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hwdbm import pte
from hwdbm.bitmap import DirtyBitmap
from hwdbm.errors import ImageError
from hwdbm.granule import LEAF_LEVELS
from hwdbm.image.fill import Filler
from hwdbm.image.live import Live
from hwdbm.image.reader import Image, Policy, Visitor
from hwdbm.image.runs import RunMarker, widen
from hwdbm.image.slots import SLOT_UNIT, Slot, check_page_size, cut
from hwdbm.kernels import Name
from hwdbm.stage2 import Stage2
from hwdbm.stage2.layout import runs_of

_COMPILED = 1 << 36  # bytes of a slot from which compiled kernels are worth loading
_CHUNK = 1 << 17  # leaves, or words, looked at together: 1 MiB


@dataclass(frozen=True, slots=True)
class Ask:
    """The options of a harvest.

    Parameters
    ----------
    policy : {"dbm", "writable"}
        Which leaves are dirty.
    page_size : int or None
        Bytes that a bit stands for; the granule by default.
    contiguous : bool
        Whether a contiguous run is one leaf: dirty as a whole if one entry is.
    check : bool
        Whether to compare with the truth in the file.
    """

    policy: Policy
    page_size: int | None = None
    contiguous: bool = True
    check: bool = False


@dataclass(slots=True)
class FoundSlot:
    """The result for one slot.

    Parameters
    ----------
    slot : Slot
        Which it is.
    page_size : int
        Bytes that a bit stands for.
    bitmap : DirtyBitmap
        Its dirty pages.
    mapped, dirty, ranges : int
        Mapped pages, dirty pages, and the runs that these form.
    leaves : dict of int to int
        Dirty leaves by their size in bytes, also those that are only partly in the slot.
    wrong : DirtyBitmap or None
        The pages on which the truth differs, 4 KiB a bit; None without a comparison.
    file : Path or None
        The file that the bitmap was written to.
    """

    slot: Slot
    page_size: int
    bitmap: DirtyBitmap
    mapped: int
    dirty: int
    ranges: int
    leaves: dict[int, int]
    wrong: DirtyBitmap | None = None
    file: Path | None = None

    def found_dirty(self, page: int) -> bool:
        """Return whether a page of 4 KiB, counted from the slot's first, was found dirty."""
        return page * SLOT_UNIT // self.page_size in self.bitmap


@dataclass(frozen=True, slots=True)
class Found:
    """The result for an image.

    Parameters
    ----------
    ask : Ask
        The options.
    slots : list of FoundSlot
        In the order of their ids.
    tables : int
        Tables read.
    seconds : float
        How long that took, with filling the slots' arrays.
    """

    ask: Ask
    slots: list[FoundSlot]
    tables: int
    seconds: float


def _kernels(slot: Slot) -> Name | None:
    """Return the kernels for one harvest of a slot: what compiled ones save of a small slot is less than they load."""
    return "vector" if slot.size < _COMPILED else None


def harvest_slots(image: Image, ask: Ask, visitors: Iterable[Visitor] = ()) -> Found:
    """Return the dirty pages of all slots of an image.

    Parameters
    ----------
    image : Image
        The image, which is read once.
    ask : Ask
        How.
    visitors : iterable of callables
        Further visitors of the tables.

    Raises
    ------
    ImageError
        If the tables are corrupt, a slot isn't made of whole pages of the size that was asked
        for, or the image doesn't carry the truth to compare with.
    """
    page_sizes = [check_page_size(slot, image.granule, ask.page_size) for slot in image.slots]
    stage2s = [image.empty_stage2(slot, _kernels(slot)) for slot in image.slots]
    writable = ask.policy == "writable"
    runs = [RunMarker(slot, image.granule, writable=writable) if ask.contiguous else None for slot in image.slots]
    start = time.perf_counter()
    tables = image.read(
        *visitors,
        *(Filler(stage2, image.vtcr) for stage2 in stage2s),
        *(marker for marker in runs if marker is not None),
    )
    seconds = time.perf_counter() - start
    bitmaps = [
        image.bitmap(slot, stage2, ask.policy, page_size, marker)
        for slot, stage2, page_size, marker in zip(image.slots, stage2s, page_sizes, runs, strict=True)
    ]
    found = [
        FoundSlot(
            slot,
            page_size,
            bitmap,
            cut(stage2.scan(pte.leaf), slot, image.granule, page_size).weight(),
            bitmap.weight(),
            _range_count(bitmap),
            _dirty_leaves(stage2, ask.policy),
            _compare(image, slot, ask, page_size, bitmap, wide=bool(marker)) if ask.check else None,
        )
        for slot, stage2, page_size, bitmap, marker in zip(image.slots, stage2s, page_sizes, bitmaps, runs, strict=True)
    ]
    return Found(ask, found, sum(tables.values()), seconds)


def clean_slot(live: Live, found: FoundSlot, *, contiguous: bool = True) -> Callable[[], None]:
    """Look once more at a slot of a machine that runs, to clean there what is dirty now when it was reported.

    Parameters
    ----------
    live : Live
        The machine's RAM.
    found : FoundSlot
        The slot, as `harvest_slots` found it: its bitmap is made anew.
    contiguous : bool
        Whether a contiguous run is one leaf.

    Returns
    -------
    callable
        Cleans these pages, and no others, in the machine's tables. Whatever ends the process before it is called, no
        page is forgotten. Pages that were written meanwhile are in the bitmap, or stay dirty.

    Raises
    ------
    ImageError
        If the tables are corrupt, or a block reaches beyond the slot.
    """
    first, npages = found.slot.frames(live.granule)
    stage2 = live.stage2(first, npages)
    stage2.clean(DirtyBitmap(npages))  # of no page: what can't be cleaned is to be known before it is reported
    dirty = stage2.dirty()
    report = dirty.copy()
    if contiguous:
        widen(report, stage2)
    found.bitmap = cut(report, found.slot, live.granule, found.page_size)
    found.dirty, found.ranges = found.bitmap.weight(), _range_count(found.bitmap)
    found.leaves = _leaves_of(stage2, dirty)

    def clean() -> None:
        stage2.clean(dirty)
        # Of a block that came since, for pages that weren't reported.
        others = DirtyBitmap(npages)
        stage2.take_saved_into(others)
        leaves = stage2.leaf_at(others.pages())
        for level in LEAF_LEVELS:
            # Only what is tracked still: on another leaf the bit would grant the write.
            index = np.unique(leaves.index[(leaves.level == level) & pte.tracked(level)(leaves.desc)])
            stage2.mmu_update(level, index, np.full(index.size, pte.S2AP_W, dtype=np.uint64))

    return clean


def _range_count(bitmap: DirtyBitmap) -> int:
    """Return how many runs of dirty pages there are. Equal to ``len(bitmap.ranges())``.

    Examples
    --------
    >>> _range_count(DirtyBitmap.from_pages([0, 1, 63, 64, 66], 70))
    3
    """
    count, carry = 0, 0
    for start in range(0, bitmap.words.size, _CHUNK):
        words = bitmap.words[start : start + _CHUNK]
        below = words << np.uint64(1)
        below[1:] |= words[:-1] >> np.uint64(63)
        below[0] |= np.uint64(carry)
        carry = int(words[-1]) >> 63
        count += int(np.bitwise_count(words & ~below).sum(dtype=np.int64))
    return count


def _dirty_leaves(stage2: Stage2, policy: Policy) -> dict[int, int]:
    rule = pte.writable if policy == "writable" else pte.dirty
    leaves = {}
    for level in LEAF_LEVELS:
        entries = stage2.level(level)
        spans = [(0, entries.size)]
        if level == 3:  # what isn't under a table is left untouched
            runs = runs_of(pte.table(2)(stage2.level(2))) * stage2.granule.entries
            runs += stage2.layout.span(2, 0)[0]
            spans = runs.clip(0, entries.size).tolist()
        elif level not in stage2.granule.block_levels(large=True):
            continue
        leaves[1 << stage2.granule.shift(level)] = sum(
            int(np.count_nonzero(rule(level)(entries[at : min(at + _CHUNK, stop)])))
            for start, stop in spans
            for at in range(start, stop, _CHUNK)
        )
    return leaves


def _leaves_of(stage2: Stage2, dirty: DirtyBitmap) -> dict[int, int]:
    """Return how many leaves map the pages that were cleaned, by size."""
    leaves = stage2.leaf_at(dirty.pages())
    levels = [level for level in LEAF_LEVELS if level == 3 or level in stage2.granule.block_levels(large=True)]
    return {
        1 << stage2.granule.shift(level): int(np.unique(leaves.index[leaves.level == level]).size) for level in levels
    }


def _compare(image: Image, slot: Slot, ask: Ask, page_size: int, bitmap: DirtyBitmap, *, wide: bool) -> DirtyBitmap:
    truth = image.truth(slot, ask.policy, contiguous=wide)
    if truth is None:
        raise ImageError(
            f"the image doesn't say what is dirty in slot {slot.id} (policy {ask.policy}"
            f"{', contiguous' if wide else ''}): there is nothing to compare with"
        )
    # In pages of 4 KiB, all of a larger page are dirty if one is: the truth is rounded likewise.
    parts = page_size // SLOT_UNIT
    rounded = truth.coarsen(parts).refine(parts)
    return bitmap.refine(parts) ^ rounded
