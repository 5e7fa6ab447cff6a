"""The verbs that change the leaves of a slot under a log, in bulk: map, unmap, populate, write faults.

Each is steps for `SlotLog.run_leaves`, with the pages held out to where leaves end. A single page is the bulk of one.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from hwdbm import check
from hwdbm.bitmap import DirtyBitmap
from hwdbm.dirtylog.slot import Point, SlotLog, Steps
from hwdbm.errors import GfnError
from hwdbm.granule import Granule
from hwdbm.stage2 import LeafAt, Stage2

Pages = NDArray[np.int64]
Verb = Callable[[Stage2, int, int], int]
"""Changes leaves of a Stage2, given the first page and their number, and returns how many it changed."""


@runtime_checkable
class Backing(Protocol):
    """The host's page table behind a slot, as the fault handler asks it."""

    shared: NDArray[np.bool_]
    """Whether others have a page's frame too, by page: the guest may only read it."""

    def of(self, pages: Pages) -> Pages:
        """Return the frame of each page."""

    def blockable(self, stripes: NDArray[np.intp]) -> NDArray[np.bool_]:
        """Return for each level-2 entry whether one block may map it."""


@dataclass(slots=True)
class Granted:
    """The outcome of write faults.

    Parameters
    ----------
    splits : int
        Blocks that were split.
    absent : (n,) int64 array
        Pages that had no leaf, and got none.
    """

    splits: int = 0
    absent: Pages = field(default_factory=lambda: np.empty(0, dtype=np.int64))


def map_steps(slot: SlotLog, lo: int, hi: int, frames: int | NDArray[np.int64], level: int, *, writable: bool) -> Steps:
    """Map pages as the state of the log wants it, and flush if that replaced a leaf."""
    s2, granule, leaf = slot.stage2, slot.stage2.granule, slot.leaf(write=False)
    logs, gfn = slot.live is not None, slot.memslot.base_gfn + lo
    if logs:
        if isinstance(frames, np.ndarray):
            frames = (frames[:, None] + np.arange(granule.pages_per_entry(level))).ravel()
        level = 3
    writable = writable and not slot.memslot.readonly
    yield Point.CLEAN
    replaces = s2.mapped(lo, hi - lo)
    due = slot.changing(*_reach(s2, lo, hi))
    s2.map(gfn, hi - lo, frames, level, writable and leaf.writable, dbm=writable and leaf.dbm)
    yield Point.FLUSH
    slot.flush(due, needed=replaces)


def checked_frames(
    granule: Granule, gfn: int, npages: int, pfn: int | NDArray[np.integer], level: int
) -> int | NDArray[np.int64]:
    """Return the frames of a map, checked. Blocks are checked as blocks, even where pages will be mapped.

    Raises
    ------
    GfnError
        If there are no leaves of `level`, or the range or a frame is misaligned or beyond 48 address bits.
    """
    if level not in (1, 2, 3):
        raise GfnError(f"level {level} of a {granule} granule has no leaves")
    size, limit = granule.pages_per_entry(level), 1 << (48 - granule.page_shift)
    if gfn % size or npages % size:
        raise GfnError(f"gfn {gfn:#x} and {npages} pages aren't multiples of a level-{level} leaf's {size:#x}")
    if isinstance(pfn, np.ndarray) and pfn.ndim:
        frames = check.integers(pfn, "pfn", 0, limit - size, GfnError)
        if frames.size != npages // size:
            raise GfnError(f"{npages // size} leaves need {npages // size} frames, got {frames.size}")
        if (frames % size).any():
            raise GfnError(f"pfn {int(frames[frames % size != 0][0]):#x} isn't a multiple of a leaf's {size:#x} pages")
        return frames
    frame = check.integer(pfn, "pfn", None)
    if not 0 <= frame <= limit - max(npages, 1):
        raise GfnError(f"pfn {frame:#x} and the {npages} pages from there aren't inside of 48 address bits")
    if frame % size:
        raise GfnError(f"pfn {frame:#x} isn't a multiple of a leaf's {size:#x} pages")
    return frame


def unmap_steps(slot: SlotLog, lo: int, hi: int) -> Steps:
    """Unmap pages; what their leaves recorded is saved for both consumers, and the TLB flushed."""
    yield Point.CLEAN
    replaces = slot.stage2.mapped(lo, hi - lo)
    due = slot.changing(*_reach(slot.stage2, lo, hi))
    slot.stage2.unmap(slot.memslot.base_gfn + lo, hi - lo)
    yield Point.FLUSH
    slot.flush(due, needed=replaces)


def populate_steps(slot: SlotLog, pages: Pages, backing: Backing, *, write: bool, blocks: bool) -> Steps:
    """Map those of some pages that have no leaf: nothing is replaced, and no flush needed."""
    s2, leaf, readonly = slot.stage2, slot.leaf(write=write), slot.memslot.readonly
    yield Point.CLEAN
    if blocks and slot.live is None:
        _map_blocks(s2, pages, backing, writable=not readonly)
    pages = pages[s2.leaf_at(pages).level == 0]
    allowed = ~backing.shared[pages] & (not readonly)
    # Marked first, as nothing here can be refused any more: what is writable and unmarked is a lost write.
    yield Point.PUBLISH
    if slot.live is not None and leaf.marked:
        mark(slot.feeds.sink(slot.live), pages[allowed])
        slot.spread(pages[allowed])
    for some, writable in ((pages[allowed], True), (pages[~allowed], False)):
        if some.size:
            s2.map_at(some, backing.of(some), writable=writable and leaf.writable, dbm=writable and leaf.dbm)


def write_fault_steps(
    slot: SlotLog, pages: Pages, pfns: Pages | None, result: Granted, *, split: bool, whole: bool
) -> Steps:
    """Grant pages to be written, and mark those that are.

    They are marked when it is known which have a leaf, and just before that is changed: at no time is a page writable
    and unmarked, and none is marked that isn't granted.
    """
    s2, live = slot.stage2, slot.live
    yield Point.CLEAN
    found = s2.leaf_at(pages)
    blocks, stale = _blocks(s2, found), list[tuple[int, int]]()
    lo, hi = int(pages[0]), int(pages[-1]) + 1
    for start, stop in blocks:
        lo, hi = min(lo, start), max(hi, stop)
    due = slot.changing(lo, hi)
    if pfns is not None:
        stale = [*_runs(pages[found.level > 0]), *blocks]
        leaf = slot.leaf(write=False)  # clean: it is granted below, like any other
        s2.map_at(pages, pfns, writable=leaf.writable, dbm=leaf.dbm)
        found, blocks = s2.leaf_at(pages), []
    dirty = pages
    if blocks or found.mapped < pages.size:
        result.absent, dirty = pages[found.level == 0], pages[found.level == 3]
    for start, stop in blocks:
        inside = pages[(start <= pages) & (pages < stop)]
        if live is None or not split:
            dirty = np.append(dirty, np.arange(start, stop))  # it stays one leaf: all of its pages may be written
            continue
        stale.append((start, stop))
        result.splits += _split(slot, inside, whole=whole)
        dirty = np.append(dirty, inside)
    if result.splits:
        found = s2.leaf_at(pages)
    yield Point.PUBLISH
    if live is not None:
        mark(slot.feeds.sink(live), dirty)
        slot.spread(dirty)
    slot.grant(found)
    slot.shared.meter.fault(found.mapped)
    yield Point.FLUSH
    slot.flush(due, needed=bool(stale), spans=stale)


def change_steps(slot: SlotLog, lo: int, hi: int, verb: Verb, changed: list[int]) -> Steps:
    """Change leaves by a verb that returns how many it changed, and flush if it did."""
    yield Point.CLEAN
    due = slot.changing(*_reach(slot.stage2, lo, hi))
    changed.append(verb(slot.stage2, lo, hi - lo))
    yield Point.FLUSH
    slot.flush(due, needed=changed[-1] > 0)


def mark(live: DirtyBitmap, pages: Pages) -> None:
    """Set bits; only words that the pages are in are touched, as others may be another thread's."""
    if pages.size == 1:
        (page,) = pages.tolist()
        live.set_range(page, 1)
        return
    bits = np.uint64(1) << (pages & 63).astype(np.uint64)
    np.bitwise_or.at(live.words, pages >> 6, bits)


def _reach(s2: Stage2, lo: int, hi: int) -> tuple[int, int]:
    """Return pages out to the ends of the blocks among their leaves: a TLB may have a block in pieces."""
    spans = s2.block_spans(lo, hi - lo)
    return (min(lo, int(spans[0, 0])), max(hi, int(spans[-1, 1]))) if len(spans) else (lo, hi)


def _split(slot: SlotLog, pages: Pages, *, whole: bool) -> int:
    """Split the block that maps some pages, for them alone; return how many blocks were split."""
    s2, splits = slot.stage2, 0
    for page in pages.tolist():
        if s2.leaf_level(page) == 3:
            continue  # with a page before it
        splits += s2.split(s2.base_gfn + page, 1)
        if whole:
            start, stop = s2.layout.span(2, s2.layout.index(2, page))
            slot.mechanism.open(s2, np.arange(max(start, 0), min(stop, s2.npages)))
    return splits


def _blocks(s2: Stage2, found: LeafAt) -> list[tuple[int, int]]:
    """Return the blocks among some leaves as pages [start, stop), what lies in the slot."""
    if found.small == found.mapped:  # most often
        return []
    rows = [s2.layout.span(level, np.unique(found.index[found.level == level])) for level in (1, 2)]
    return [(start, stop) for start, stop in np.clip(np.concatenate(rows), 0, s2.npages).tolist()]


def _runs(pages: Pages) -> list[tuple[int, int]]:
    """Return sorted pages as runs [start, stop)."""
    edges = np.flatnonzero(np.diff(pages) != 1) + 1
    return [(int(run[0]), int(run[-1]) + 1) for run in np.split(pages, edges) if run.size]


def _map_blocks(s2: Stage2, pages: Pages, backing: Backing, *, writable: bool) -> None:
    """Map blocks around pages where one fits and nothing is mapped."""
    stripes = np.unique(s2.layout.index(2, pages))
    stripes = stripes[(s2.level(2)[stripes] == 0) & backing.blockable(stripes)]
    first = s2.layout.span(2, stripes)[:, 0]
    first = first[s2.leaf_at(first).level == 0]
    if first.size:
        s2.map_at(first, backing.of(first), 2, writable)
