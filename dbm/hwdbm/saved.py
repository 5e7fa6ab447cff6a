"""Saved: the dirty state of leaves that were replaced, kept until a harvest takes it."""

import numpy as np
from numpy.typing import NDArray

from hwdbm import kernels
from hwdbm.bitmap import DirtyBitmap
from hwdbm.errors import InvariantError
from hwdbm.layout import pieces

__all__ = ["Saved"]

_ALL = (1 << 64) - 1


class Saved:
    """A bitmap with the span of pages that may be set in it, so that an empty one costs a harvest nothing.

    Parameters
    ----------
    npages : int
        Pages of the slot.

    Attributes
    ----------
    bitmap : DirtyBitmap
        The pages. To be written through the methods only.
    """

    def __init__(self, npages: int) -> None:
        self.bitmap = DirtyBitmap(npages)
        self._lo, self._hi = 0, 0

    def __bool__(self) -> bool:
        return self._lo < self._hi

    def mark(self, spans: NDArray[np.int64]) -> None:
        """Add the pages [start, stop) of each row of `spans`, disjoint, empty ones among them."""
        spans = spans[spans[:, 0] < spans[:, 1]]
        if len(spans):
            kernels.active().fill(self.bitmap.words, spans)
            self.widen(int(spans[:, 0].min()), int(spans[:, 1].max()))

    def widen(self, lo: int, hi: int) -> None:
        """Take note that pages of [lo, hi) were set in the bitmap."""
        self._lo, self._hi = (min(lo, self._lo), max(hi, self._hi)) if self else (lo, hi)

    def take(self, lo: int, hi: int, *sinks: DirtyBitmap) -> int:
        """Move what is saved of the pages [lo, hi) to each of `sinks`, and return how many words it was in."""
        lo, hi = max(lo, self._lo), min(hi, self._hi)
        if lo >= hi:
            return 0
        moved = 0
        for start, stop, part in pieces(lo, hi, self.bitmap.npages):
            words = slice(start >> 6, (stop + 63) >> 6)
            taken = self.bitmap.words[words] & np.uint64(_ALL if part is None else part)
            self.bitmap.words[words] &= ~taken
            moved += int(np.count_nonzero(taken))
            for sink in sinks:
                sink.words[words] |= taken
        self._lo, self._hi = hi if lo == self._lo else self._lo, lo if hi == self._hi else self._hi
        return moved

    def drop(self, mask: DirtyBitmap, first: int = 0, *sinks: DirtyBitmap) -> None:
        """Move the pages in `mask` to each of `sinks`. Bit 0 of the mask is page `first`, a multiple of 64."""
        if self:
            words = slice(first >> 6, (first >> 6) + mask.words.size)
            dropped = self.bitmap.words[words] & mask.words
            self.bitmap.words[words] ^= dropped
            for sink in sinks:
                sink.words[words] |= dropped

    def verify(self) -> None:
        """Raise `InvariantError` if a page outside of the span is set, or `BitmapError` for a tail bit."""
        self.bitmap.verify()
        outside = self.bitmap.copy()
        outside.set_range(self._lo, max(0, self._hi - self._lo), False)
        if outside.any():
            raise InvariantError(f"saved pages {outside.ranges().tolist()[:3]} aren't in {self._lo}..{self._hi - 1}")
