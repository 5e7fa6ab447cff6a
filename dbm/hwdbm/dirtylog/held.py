"""HeldSlot: a memslot and its leaves, of which a thread holds a range while it works on it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from errno import ENOENT

from hwdbm import pte
from hwdbm.dirtylog.rangelock import RangeLock
from hwdbm.errors import GfnError
from hwdbm.granule import Granule
from hwdbm.memslot import Memslot, slot_name
from hwdbm.stage2 import Stage2

__all__ = ["HeldSlot", "Step"]

Step = tuple[int, int]
"""Pages [lo, hi) of a slot."""


class HeldSlot:
    """A memslot whose pages are held in ranges.

    Parameters
    ----------
    memslot : Memslot
        The slot.
    granule : Granule
        The size of a page.

    Attributes
    ----------
    memslot : Memslot
        The slot as it is now; a move or a change of flags puts another there.
    stage2 : Stage2
        Its leaves; a move puts another there.
    """

    def __init__(self, memslot: Memslot, granule: Granule) -> None:
        self.memslot = memslot
        self.stage2 = Stage2(memslot.npages, memslot.base_gfn, granule)
        self._deleted = False
        self._lock = RangeLock()

    @property
    def name(self) -> str:
        """What the slot is called in an error's text."""
        return slot_name(self.memslot.id)

    @property
    def npages(self) -> int:
        """Pages of the slot, which never change."""
        return self.memslot.npages

    @contextmanager
    def hold(self, lo: int = 0, hi: int | None = None) -> Iterator[None]:
        """Hold the pages [lo, hi), out to whole words; by default the slot.

        Raises
        ------
        OSError
            ENOENT if the slot was deleted.
        """
        hi = self.npages if hi is None else hi
        with self._lock.hold(lo & ~63, min(hi + 63 & ~63, self.npages)):
            if self._deleted:
                raise OSError(ENOENT, f"{self.name} was deleted")
            yield

    @contextmanager
    def hold_leaves(self, place: Callable[[], Step]) -> Iterator[Step]:
        """Hold pages out to where leaves end, so that leaves can be put there, split and removed.

        Parameters
        ----------
        place : callable
            Returns the pages [lo, hi). It is asked again where the slot has moved before they were held.
        """
        while True:
            lo, hi = place()
            span = self._leaf_span(lo, hi)
            with self.hold(*span):
                if place() == (lo, hi) and self._leaf_span(lo, hi) == span:
                    yield lo, hi
                    return

    def _leaf_span(self, lo: int, hi: int) -> Step:
        if lo == hi:
            return lo, hi
        s2 = self.stage2
        start, stop = lo, hi
        for page in (lo, hi - 1):
            large = pte.leaf(1)(int(s2.level(1)[s2.layout.index(1, page)]))
            level = 1 if large else 2
            first, after = s2.layout.span(level, s2.layout.index(level, page))
            start, stop = min(start, first), max(stop, after)
        return max(start, 0), min(stop, self.npages)

    def pages(self, first: int, npages: int) -> Step:
        """Return pages as [lo, hi).

        Raises
        ------
        GfnError
            If they aren't inside of the slot.
        """
        if first < 0 or npages < 0 or first + npages > self.npages:
            raise GfnError(f"{self.name}: pages {first}..{first + npages - 1} are not inside of its {self.npages}")
        return first, first + npages

    def pages_at(self, gfn: int, npages: int) -> Step:
        """Return guest frames as pages [lo, hi), where the slot is now. Errors are those of `pages`."""
        slot = self.memslot
        if gfn < slot.base_gfn or npages < 0 or gfn + npages > slot.end_gfn:
            raise GfnError(
                f"{self.name}: gfn {gfn:#x}..{gfn + npages - 1:#x} is not inside of its "
                f"{slot.base_gfn:#x}..{slot.end_gfn - 1:#x}"
            )
        return gfn - slot.base_gfn, gfn - slot.base_gfn + npages
