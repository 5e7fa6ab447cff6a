"""One memslot under a dirty log: its leaves, its bitmap, and the protocol between them.

The protocol's steps are generators. Each yields the `Point` that it comes to next, with the pages of its step held, and
production runs it to the end (`SlotLog.run`). Two rules make the order safe, whatever interrupts it:

* A bit leaves the live bitmap, and a flag the host's, only after a flush that began when its leaf was clean. So it
  doesn't matter which thread cleaned the leaf, and a flush that fails has nothing to undo.
* Before leaves are changed it is noted that a flush is due for their pages, and the note goes after a flush that
  succeeded. So a flush that failed, or never began, is made up for by the next step that touches these pages.
"""

from _thread import LockType, start_new_thread
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from errno import ENOENT
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from hwdbm import pte
from hwdbm.bitmap import DirtyBitmap
from hwdbm.dirtylog.client import ClientLease, Epoch, Feed, Feeds, LogClient
from hwdbm.dirtylog.lease import Lease, Loans
from hwdbm.dirtylog.mechanism import UNLOGGED, Mechanism, NewLeaf
from hwdbm.dirtylog.rangelock import Claim, RangeLock
from hwdbm.dirtylog.stats import Meter
from hwdbm.errors import GfnError, InvariantError, StaleLeaseError
from hwdbm.granule import Granule
from hwdbm.memslot import Memslot, slot_name
from hwdbm.stage2 import LeafAt, Stage2

FlushHook = Callable[[Memslot, int, int], object]
"""Called with (slot, first page, pages): no vCPU may use a translation of them from before when it returns."""

Span = tuple[int, int]
"""Pages [lo, hi) of a slot."""
Steps = Iterator["Point"]
Place = Callable[[], Span]
_LARGE = pte.leaf(1)


class Point(Enum):
    """The next act of a step of the protocol."""

    CLEAN = "clean"
    """Change leaves; what they had recorded is published, or saved, in the same pass."""
    PUBLISH = "publish"
    """Set bits in the live bitmap."""
    FLUSH = "flush"
    """Flush the TLBs, if that is due."""
    TAKE = "take"
    """Move bits from the live bitmap to the lease."""
    COPY = "copy"
    """Hand the pages to their consumer."""


@dataclass(eq=False, slots=True)
class LogParts:
    """The parts that all slots of a log share.

    Parameters
    ----------
    flush : callable or None
        The flush hook; None where there is no TLB.
    workers : int
        Threads that the steps of one call run in.
    meter : Meter
        The counts.
    """

    flush: FlushHook | None
    workers: int = 1
    meter: Meter = field(default_factory=Meter)


@dataclass(eq=False, slots=True)
class _Due:
    """A flush that is due for the pages [lo, hi); with `missed` also for changes of theirs before.

    `wider` are earlier notes that reach beyond these pages.
    """

    lo: int
    hi: int
    wider: "tuple[_Due, ...]"
    missed: bool


class SlotLog:
    """The log of one memslot, from its creation to its deletion.

    Parameters
    ----------
    memslot : Memslot
        The slot.
    granule : Granule
        The size of a page.
    mechanism : Mechanism
        How the log learns of writes.
    shared : LogParts
        The parts that all slots share.

    Attributes
    ----------
    memslot : Memslot
        The slot as it is now; a move or a change of flags puts another there.
    stage2 : Stage2
        Its leaves; a move puts another there.
    live : DirtyBitmap or None
        The bitmap, while the slot logs. Its words belong to the thread that holds their pages.
    generation : int
        Counts the bitmaps that are gone.
    loans : Loans
        The leases that are open.
    feeds : Feeds
        The clients beside the default one, whose bitmap is `live`.
    """

    def __init__(self, memslot: Memslot, granule: Granule, mechanism: Mechanism, shared: LogParts) -> None:
        self.memslot, self.mechanism, self.shared = memslot, mechanism, shared
        self.stage2 = Stage2(memslot.npages, memslot.base_gfn, granule)
        self.live: DirtyBitmap | None = None
        self.generation = 0
        self.loans, self.feeds = Loans(), Feeds()
        self._deleted = False
        self._lock = RangeLock()
        self._due: set[_Due] = set()

    @property
    def name(self) -> str:
        """The slot's name in an error's text."""
        return slot_name(self.memslot.id)

    @property
    def npages(self) -> int:
        """Pages of the slot, which never change."""
        return self.memslot.npages

    @property
    def deleted(self) -> bool:
        """Whether the slot is gone."""
        return self._deleted

    def logging(self, generation: int | None = None) -> DirtyBitmap:
        """Return the live bitmap.

        Raises
        ------
        OSError
            ENOENT if the slot has none, or not that of `generation` any more.
        """
        if self.live is None or generation not in (None, self.generation):
            raise OSError(ENOENT, f"{self.name} has no dirty bitmap")
        return self.live

    # --- holding pages, and running steps with them held ---------------------------------------------------

    def run(self, steps: Steps, lo: int = 0, hi: int | None = None) -> None:
        """Run steps to their end, with the pages [lo, hi) held, out to whole words; by default the slot.

        Raises
        ------
        OSError
            ENOENT if the slot was deleted.
        """
        claim = self._claim(lo, self.npages if hi is None else hi)
        with claim.held, claim.mine:
            self._wait(claim)
            for _ in steps:
                pass

    def run_leaves(self, place: Place, steps: Callable[[int, int], Steps]) -> None:
        """Run steps with pages held out to where leaves end, so that leaves can be put there, split and removed.

        Parameters
        ----------
        place : callable
            Returns the pages [lo, hi). It is asked again where the slot has moved before they were held.
        steps : callable
            Given the pages.
        """
        while True:
            lo, hi = place()
            span = self.leaf_span(lo, hi)
            claim = self._claim(*span)
            with claim.held, claim.mine:
                self._wait(claim)
                if place() == (lo, hi) and self.leaf_span(lo, hi) == span:
                    for _ in steps(lo, hi):
                        pass
                    return

    @contextmanager
    def hold_leaves(self, place: Place) -> Iterator[Span]:
        """Hold pages as `run_leaves` does, for the length of a ``with`` block."""
        while True:
            lo, hi = place()
            span = self.leaf_span(lo, hi)
            claim = self._claim(*span)
            with claim.held, claim.mine:
                self._wait(claim)
                if place() == (lo, hi) and self.leaf_span(lo, hi) == span:
                    yield lo, hi
                    return

    def _claim(self, lo: int, hi: int) -> Claim:
        return Claim(lo & ~63, min(hi + 63 & ~63, self.npages))

    def _wait(self, claim: Claim) -> None:
        self._lock.wait(claim)
        if self._deleted:
            raise OSError(ENOENT, f"{self.name} was deleted")

    def leaf_span(self, lo: int, hi: int) -> Span:
        """Return pages out to where leaves end that could be there."""
        if lo == hi:
            return lo, hi
        layout, top = self.stage2.layout, self.stage2.level(1)
        start, stop = lo, hi
        for page in {lo, hi - 1}:
            size = layout.sizes[1 if _LARGE(int(top[layout.index(1, page)])) else 2]
            first = page - (layout.base_gfn + page) % size
            start, stop = min(start, first), max(stop, first + size)
        return max(start, 0), min(stop, self.npages)

    def pages(self, first: int, npages: int) -> Span:
        """Return pages as [lo, hi).

        Raises
        ------
        GfnError
            If they aren't inside of the slot.
        """
        if first < 0 or npages < 0 or first + npages > self.npages:
            raise GfnError(f"{self.name}: {npages:#x} pages from {first:#x} are not inside of its {self.npages}")
        return first, first + npages

    def pages_at(self, gfn: int, npages: int) -> Span:
        """Return guest frames as pages [lo, hi), where the slot is now. Errors are those of `pages`."""
        slot = self.memslot
        if gfn < slot.base_gfn or npages < 0 or gfn + npages > slot.end_gfn:
            raise GfnError(
                f"{self.name}: gfn {gfn:#x}..{gfn + npages - 1:#x} is not inside of its "
                f"{slot.base_gfn:#x}..{slot.end_gfn - 1:#x}"
            )
        return gfn - slot.base_gfn, gfn - slot.base_gfn + npages

    # --- flushes that are due ------------------------------------------------------------------------------

    def changing(self, lo: int, hi: int) -> _Due:
        """Note that a flush is due for pages whose leaves are about to be changed; these pages are held."""
        if not self._due:  # most often
            due = _Due(lo, hi, (), False)
            self._due.add(due)
            return due
        # Notes that overlap are of steps that ended without their flush: nothing else can hold these pages now.
        missed = [due for due in tuple(self._due) if due.lo < hi and lo < due.hi]
        wider = tuple(due for due in missed if due.lo < lo or hi < due.hi)
        due = _Due(lo, hi, wider, bool(missed))
        self._due.add(due)
        self._due.difference_update(set(missed).difference(wider))
        return due

    def flush(self, due: _Due, *, needed: bool, spans: Sequence[Span] | None = None) -> None:
        """Flush the TLBs for what was noted, or only take the note back where nothing was changed, now or before.

        With `spans` only these pages are flushed, if there was nothing before.
        """
        if needed or due.missed:
            if spans is None or due.missed:
                lo, hi = due.lo, due.hi
                for each in due.wider:
                    lo, hi = min(lo, each.lo), max(hi, each.hi)
                spans = [(lo, hi)]
            for lo, hi in spans:
                if self.shared.flush is not None:
                    self.shared.flush(self.memslot, lo, hi - lo)
                self.shared.meter.flush()
            if due.wider:
                self._due.difference_update(due.wider)
        self._due.discard(due)

    @property
    def flush_is_due(self) -> bool:
        """Whether a flush of any page is due."""
        return bool(self._due)

    # --- sync, get, clear ----------------------------------------------------------------------------------

    def sync(self, lo: int, hi: int) -> None:
        """Publish what was recorded in a part, clean it, and flush."""
        self.run(self.sync_steps(lo, hi), lo, hi)

    def sync_all(self, parts: Sequence[Span]) -> None:
        """Do as `sync` for each part, in as many threads as there are workers."""
        in_threads(parts, self.sync, self.shared.workers, lambda: None)

    def sync_steps(self, lo: int, hi: int) -> Steps:
        """Take the steps of a sync."""
        live = self.logging()
        yield Point.CLEAN
        due = self.changing(lo, hi)
        cleaned = self._publish(live, lo, hi)
        yield Point.FLUSH
        self.flush(due, needed=cleaned)

    def _publish(self, live: DirtyBitmap, lo: int, hi: int) -> bool:
        """Publish what was recorded in a part for all clients, and clean it; return whether there was anything."""
        tally = self.shared.meter.add(self.mechanism.sync(self.stage2, self.feeds.sink(live), lo, hi - lo))
        self.feeds.pour(live, lo, hi)
        return tally.words > 0

    def get(self, parts: Sequence[Span], *, take: bool) -> Lease:
        """Lend the slot's dirty pages, a part at a time; without `take` only show them (manual protection)."""
        lease = self._lease(0, self.npages, taken=take)
        steps = self.get_steps if take else self.peek_steps
        self._fill(lease, parts, lambda lo, hi: steps(lease, lo, hi))
        return lease

    def get_steps(self, lease: Lease, lo: int, hi: int) -> Steps:
        """Take the steps of a GET that clears."""
        live = self.logging(lease.generation)
        yield from self._take_steps(lease, live, live, lo, hi)

    def peek_steps(self, lease: Lease, lo: int, hi: int) -> Steps:
        """Take the steps of a GET that only shows: no leaf is changed."""
        live = self.logging(lease.generation)
        yield Point.PUBLISH
        self.shared.meter.add(self.mechanism.peek(self.stage2, self.feeds.sink(live), lo, hi - lo))
        self.feeds.pour(live, lo, hi)
        np.copyto(lease.words(lo, hi), live.words[lo >> 6 : hi + 63 >> 6])
        yield Point.COPY

    def clear(self, parts: Sequence[Span], first: int, npages: int, mask: NDArray[np.uint64]) -> Lease:
        """Lend those of `npages` pages that are dirty and in a mask, and re-protect them.

        Bit 0 of the words in `mask` is page `first`, a multiple of 64. Bits at or beyond the slot's end may be set:
        they never are in the live bitmap.
        """
        lease = self._lease(first, npages)
        self._fill(lease, parts, lambda lo, hi: self.clear_steps(lease, lo, hi, mask))
        return lease

    def clear_steps(self, lease: Lease, lo: int, hi: int, mask: NDArray[np.uint64]) -> Steps:
        """Take the steps of a CLEAR."""
        live = self.logging(lease.generation)
        yield Point.CLEAN
        due = self.changing(lo, hi)
        self.feeds.pour(live, lo, hi)
        words, taken = live.words[lo >> 6 : hi + 63 >> 6], lease.words(lo, hi)
        # Only what was published may go: a leaf whose bit is clear keeps its dirty state for the next GET.
        first = lease.first_page
        np.bitwise_and(mask[lo - first >> 6 : hi - first + 63 >> 6], words, out=taken)
        if np.count_nonzero(taken):  # faster than any()
            asked = DirtyBitmap.from_words(taken, hi - lo)
            self.shared.meter.add(self.mechanism.protect(self.stage2, asked, lo, self.feeds.dropped()))
            # Its caller copies these pages afterwards: what they had recorded is news for the other clients alone.
            self.feeds.pour(live, lo, hi, default=False)
        yield from self._take(due, words, taken)

    def take(self, feed: Feed, parts: Sequence[Span]) -> ClientLease:
        """Lend the pages that are dirty for one client, a part at a time."""
        feed.loans.take_back()
        lease = ClientLease(Epoch(feed), DirtyBitmap(self.npages))
        self._fill(lease, parts, lambda lo, hi: self.feed_steps(feed, lease, lo, hi))
        return lease

    def feed_steps(self, feed: Feed, lease: Lease, lo: int, hi: int) -> Steps:
        """Take the steps of a client's take: those of a GET, but that its own bitmap is what the bits leave."""
        live = self.logging()
        if feed.generation != lease.generation:
            raise StaleLeaseError(ENOENT, f"{feed.name} was changed, or the client closed, while its pages were taken")
        yield from self._take_steps(lease, live, feed.bitmap, lo, hi)
        if lo == 0:
            feed.broken = ""  # it has all pages now; a rollback restores it

    def _take_steps(self, lease: Lease, live: DirtyBitmap, bitmap: DirtyBitmap, lo: int, hi: int) -> Steps:
        """Publish what was recorded for all clients, re-protect what is dirty for one, and lend it."""
        yield Point.CLEAN
        due = self.changing(lo, hi)
        self._publish(live, lo, hi)
        # A step begins with a word, and the bits beyond the slot's end are zero: its words are its bitmap.
        words, taken = bitmap.words[lo >> 6 : hi + 63 >> 6], lease.words(lo, hi)
        np.copyto(taken, words)
        self._rearm(live, DirtyBitmap.from_words(taken, hi - lo), lo, hi)
        yield from self._take(due, words, taken)

    def _rearm(self, live: DirtyBitmap, mask: DirtyBitmap, lo: int, hi: int) -> None:
        """Re-protect the pages of a mask, after they were published; what the leaves had meanwhile is everyone's."""
        self.shared.meter.add(self.mechanism.rearm(self.stage2, mask, lo, self.feeds.dropped()))
        self.feeds.pour(live, lo, hi)

    def _take(self, due: _Due, words: NDArray[np.uint64], taken: NDArray[np.uint64]) -> Steps:
        """Flush, and let bits that are in the lease by now leave the live bitmap.

        The flush comes if there are any, also where no leaf of theirs was changed just now: another thread may have
        cleaned a block that reaches into this part, and not have flushed yet.
        """
        needed = bool(np.count_nonzero(taken))
        yield Point.FLUSH
        self.flush(due, needed=needed)
        yield Point.TAKE
        if needed:
            np.bitwise_and(words, ~taken, out=words)
        yield Point.COPY

    def _lease(self, first: int, npages: int, *, taken: bool = True) -> Lease:
        self.loans.take_back()
        return Lease(self, DirtyBitmap(npages), first, generation=self.generation, taken=taken)

    def _fill(self, lease: Lease, parts: Sequence[Span], steps: Callable[[int, int], Steps]) -> None:
        """Run the steps of each part; if one fails, what those before have taken is put back."""
        in_threads(parts, lambda lo, hi: self.run(steps(lo, hi), lo, hi), self.shared.workers, lease.abandon)

    def put_back(self, pages: DirtyBitmap, first_page: int, generation: int) -> bool:
        """Set bits in the live bitmap again, unless it isn't that of `generation`; return whether it is."""

        def steps() -> Steps:
            live = self.logging(generation)
            yield Point.PUBLISH
            words = live.words[first_page >> 6 : (first_page >> 6) + pages.words.size]
            np.bitwise_or(words, pages.words, out=words)

        try:
            self.run(steps(), first_page, first_page + pages.npages)
        except FileNotFoundError:  # ENOENT: deleted, or its log switched off
            return False
        return True

    # --- clients -------------------------------------------------------------------------------------------

    def join(self, client: LogClient, broken: str = "") -> Feed:
        """Feed a client from now on; with `broken`, why it has no epoch yet, all pages are dirty for it."""
        feed = Feed(self, client.name, self.npages, broken)
        self.run(self.join_steps(feed))
        return feed

    def join_steps(self, feed: Feed) -> Steps:
        """Take the steps of a client that joins: what was written before is dirty for the others, and not for it."""
        live = self.logging()
        yield Point.CLEAN
        due = self.changing(0, self.npages)
        self._publish(live, 0, self.npages)
        # Also what others have been shown and not cleared yet, or a log that began with all bits set left as it was.
        if live.any():
            tally = self.mechanism.protect(self.stage2, live, 0, self.feeds.dropped())
            self.shared.meter.add(tally)
            self.feeds.pour(live)
        yield Point.FLUSH
        self.flush(due, needed=live.any())
        yield Point.TAKE
        self.feeds.join(feed)

    def give_back(self, epoch: Epoch, pages: DirtyBitmap, first_page: int, generation: int) -> bool:
        """Set bits in a client's bitmap again, unless it was told since that its epoch is broken; return which."""
        done = list[bool]()

        def steps() -> Steps:
            yield Point.PUBLISH
            done.append(epoch.feed.give_back(epoch, pages, first_page, generation))

        try:
            self.run(steps(), first_page, first_page + pages.npages)
        except FileNotFoundError:  # ENOENT: deleted
            return False
        (given,) = done
        return given

    def spread(self, pages: NDArray[np.int64]) -> None:
        """Pour the bits of pages that were published just now, and are held."""
        if self.live is not None and self.feeds.fresh is not None and pages.size:
            self.feeds.pour(self.live, int(pages.min()), int(pages.max()) + 1)

    # --- other writers and the host ------------------------------------------------------------------------

    def leaf(self, *, write: bool) -> NewLeaf:
        """Return how a page that the host lets the guest write is to be mapped."""
        return UNLOGGED if self.live is None else self.mechanism.leaf(write=write)

    def grant(self, leaves: LeafAt) -> None:
        """Let the guest write pages that the host lets it write, as far as they have a leaf."""
        if self.live is None:
            self.stage2.relax_at(leaves)
        else:
            self.mechanism.grant(self.stage2, leaves)

    def mark_steps(self, lo: int, hi: int) -> Steps:
        """Mark pages that something other than a vCPU wrote, for the log and the host."""
        yield Point.PUBLISH
        if self.live is not None:
            self.feeds.sink(self.live).set_range(lo, hi - lo)
            self.feeds.pour(self.live, lo, hi)
        self.stage2.host_dirty.set_range(lo, hi - lo)

    def take_host_dirty(self) -> DirtyBitmap:
        """Flush, then take the host pages' dirty flags."""
        taken: list[DirtyBitmap] = []

        def steps() -> Steps:
            yield Point.FLUSH
            due = self.changing(0, self.npages)
            self.flush(due, needed=bool(self.stage2.saved) or self.stage2.host_dirty.any())
            yield Point.TAKE
            taken.append(self.stage2.host_dirty | self.stage2.saved.bitmap)
            self.stage2.host_dirty.clear()

        try:
            self.run(steps())
        except BaseException:
            words = self.stage2.host_dirty.words
            for pages in taken:
                np.bitwise_or(words, pages.words, out=words)
            raise
        (found,) = taken
        return found

    # --- the slot's life -----------------------------------------------------------------------------------

    def start_steps(self, memslot: Memslot, *, full: bool) -> Steps:
        """Begin to log; with `full` all bits are set, and leaves are left to the CLEARs (INITIALLY_SET).

        A client's takes leave no leaf to a CLEAR: where there is one, all leaves are seen to at once.
        """
        live = DirtyBitmap(self.npages)
        yield Point.CLEAN
        if full:
            live.fill()
        if not full or self.feeds:
            due, mapped = self.changing(0, self.npages), self._mapped()
            if mapped:
                self.shared.meter.add(self.mechanism.start(self.stage2))
            yield Point.FLUSH
            self.flush(due, needed=mapped)
        self.stage2.take_saved_into(DirtyBitmap(self.npages))  # from before the log: the host has it
        yield Point.TAKE
        self.live, self.memslot = live, memslot

    def stop_steps(self, memslot: Memslot) -> Steps:
        """End the log: the bitmap is freed, the leaves stay as they are."""
        yield Point.TAKE
        self.feeds.break_off("the slot's log was switched off")
        self.generation += 1
        self.live, self.memslot = None, memslot

    def move_steps(self, memslot: Memslot, *, full: bool) -> Steps:
        """Move the slot: all leaves go, and what they had recorded stays with the bitmap, which stays too.

        `full` is that of `start_steps`, where `memslot` begins to log.
        """
        before, after = self.memslot.base_gfn, memslot.base_gfn
        self.feeds.break_off(f"the slot was moved from gfn {before:#x} to gfn {after:#x}")
        yield from self._unmap_steps()
        live = self.live
        if memslot.logging and live is None:
            live = DirtyBitmap(self.npages)
            if full:
                live.fill()
        elif not memslot.logging and live is not None:
            live = None
            self.generation += 1
        stage2 = Stage2(self.npages, memslot.base_gfn, self.stage2.granule)
        stage2.host_dirty = self.stage2.host_dirty  # the pages behind are the same
        self.stage2, self.live, self.memslot = stage2, live, memslot

    def delete_steps(self) -> Steps:
        """End the slot. What its leaves had recorded is in the `host_dirty` of the Stage2 that it had."""
        yield from self._unmap_steps()
        self.feeds.break_off("the slot was deleted")
        self.generation += 1
        self.live, self._deleted = None, True

    def _unmap_steps(self) -> Steps:
        yield Point.CLEAN
        due, mapped = self.changing(0, self.npages), self._mapped()
        self.stage2.unmap(self.memslot.base_gfn, self.npages)
        if self.live is None:
            self.stage2.take_saved_into(DirtyBitmap(self.npages))
        else:
            self.stage2.take_saved_into(self.feeds.sink(self.live))
            self.feeds.pour(self.live)
        yield Point.FLUSH
        self.flush(due, needed=mapped)

    def _mapped(self) -> bool:
        return bool(self.stage2.level(1).any())  # above whatever is mapped there is a table, or it is a block

    def switch_steps(self, mechanism: Mechanism) -> Steps:
        """Change the mechanism, while vCPUs run.

        The leaves are safe under either one in between, so a switch that failed or was interrupted can be repeated.
        """
        if mechanism is self.mechanism:
            return
        mapped = self._mapped()
        yield Point.FLUSH
        self.flush(self.changing(0, self.npages), needed=mapped)  # until here writes went by the old one's rules
        yield Point.CLEAN
        due = self.changing(0, self.npages)
        sink = None if self.live is None else self.feeds.sink(self.live)
        self.shared.meter.add(self.mechanism.leave(self.stage2, sink))
        self.mechanism = mechanism
        if self.live is not None:
            self.shared.meter.add(mechanism.enter(self.stage2, self.feeds.sink(self.live)))
            self.feeds.pour(self.live)
        yield Point.FLUSH
        self.flush(due, needed=mapped)

    def verify_steps(self) -> Steps:
        """Raise `InvariantError` if the leaves and the bitmap can't be what the protocol leaves behind."""
        s2, slot = self.stage2, self.memslot
        s2.verify()
        if (s2.base_gfn, s2.npages) != (slot.base_gfn, slot.npages):
            raise InvariantError(f"{self.name}: {s2!r} isn't where the slot is, gfn {slot.base_gfn:#x}")
        if slot.logging != (self.live is not None):
            raise InvariantError(f"{self.name}: flags {slot.flags:#x}, and bitmap {self.live!r}")
        if slot.readonly:
            self._none(s2.scan(pte.writable) | s2.scan(pte.tracked), "may be written, in a read-only slot")
        if self.live is not None:
            self.live.verify()
            unrecorded, fresh = self.mechanism.unrecorded(s2), self.feeds.fresh
            for bitmap, whom in ((self.live, ""), *((feed.bitmap, f" for {feed.client!r}") for feed in self.feeds)):
                bitmap.verify()
                known = bitmap if fresh is None else bitmap | fresh
                self._none(unrecorded - known, f"may be written unrecorded, and isn't dirty{whom}")
        yield Point.COPY

    def _none(self, pages: DirtyBitmap, what: str) -> None:
        if pages.any():
            page = int(pages.pages()[0])
            raise InvariantError(f"{self.name}: gfn {self.memslot.base_gfn + page:#x} {what}")


def in_threads(
    parts: Sequence[Span], step: Callable[[int, int], None], workers: int, undo: Callable[[], object]
) -> None:
    """Call `step` for each part, in this thread and as many more as make up `workers`.

    The first error is raised after `undo`, when no thread is in a step any more.
    """
    if workers == 1 or len(parts) < 2:
        try:
            for lo, hi in parts:
                step(lo, hi)
        except BaseException:
            undo()
            raise
        return
    left, errors = deque(parts), list[BaseException]()

    def work() -> None:
        while not errors:
            try:
                lo, hi = left.popleft()
            except IndexError:
                return
            try:
                step(lo, hi)
            except BaseException as error:  # noqa: BLE001 - it is raised in the thread that called
                errors.append(error)

    # Plain locks, which one call takes and lets go: a signal's handler that raises inside of `Thread.start` or `join`
    # may leave theirs held. A thread that has not begun when `left` is cleared finds nothing to do.
    busy = [Lock() for _ in range(min(workers, len(parts)) - 1)]

    def work_in_thread(lock: LockType) -> None:
        with lock:
            work()

    idle = deque(busy)
    while True:  # until no thread is in a step, whatever interrupts this one
        try:
            while idle and not errors:
                start_new_thread(work_in_thread, (idle.popleft(),))
            work()
            left.clear()
            for lock in busy:
                with lock:
                    pass
            break
        except BaseException as error:  # noqa: BLE001 - as above
            errors.append(error)
    if errors:
        undo()
        raise errors[0]
