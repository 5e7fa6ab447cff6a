"""Saved: the dirty state of leaves that were replaced, kept until a harvest takes it."""

import numpy as np
from numpy.typing import NDArray

from hwdbm.bitmap import DirtyBitmap
from hwdbm.errors import InvariantError, some
from hwdbm.kernels import Kernels, vector
from hwdbm.stage2.layout import pieces

Array = NDArray[np.uint64]

_ALL = (1 << 64) - 1


class Saved:
    """A bitmap with the span of pages that may be set in it, so that an empty one costs a harvest nothing.

    Parameters
    ----------
    npages : int
        Pages of the slot.
    implementation : Kernels, optional
        The kernels of the leaves, if others set bits too: by default the bitmaps have one owner.

    Attributes
    ----------
    bitmap : DirtyBitmap
        The pages. To be written after a `widen` that covers them.
    span : tuple of int
        The pages [lo, hi) of which some may be set: more than are, never fewer.
    """

    def __init__(self, npages: int, implementation: Kernels = vector) -> None:
        self.bitmap = DirtyBitmap(npages)
        self.span = 0, 0
        self._kernels = implementation

    def __bool__(self) -> bool:
        return self.span[0] < self.span[1]

    def widen(self, lo: int, hi: int) -> None:
        """Take note that pages of [lo, hi) may be set in the bitmap from now on: before any is."""
        if lo < hi:
            self.span = (min(lo, self.span[0]), max(hi, self.span[1])) if self else (lo, hi)

    def take(self, lo: int, hi: int, *sinks: DirtyBitmap) -> int:
        """Move what is saved of the pages [lo, hi) to each of `sinks`, and return how many words it was in."""
        first, stop = self.span
        lo, hi = max(lo, first), min(hi, stop)
        if lo >= hi:
            return 0
        moved = 0
        for start, end, part in pieces(lo, hi, self.bitmap.npages):
            words = slice(start >> 6, (end + 63) >> 6)
            moved += self._move(words, self.bitmap.words[words] & np.uint64(_ALL if part is None else part), sinks)
        # The span shrinks last, after an interrupt can lose nothing, and only from its ends: a part out of the middle
        # leaves it as it is. Too wide, it costs a look at words that are zero; too narrow, it would lose pages.
        self.span = hi if lo == first else first, lo if hi == stop else stop
        return moved

    def drop(self, mask: DirtyBitmap, first: int = 0, *sinks: DirtyBitmap) -> None:
        """Move the pages in `mask` to each of `sinks`. Bit 0 of the mask is page `first`, a multiple of 64."""
        if self:
            words = slice(first >> 6, (first >> 6) + mask.words.size)
            self._move(words, self.bitmap.words[words] & mask.words, sinks)

    def _move(self, words: slice, taken: Array, sinks: tuple[DirtyBitmap, ...]) -> int:
        # The sinks get them before they leave here: an interrupt in between finds them in both, and not in neither.
        for sink in sinks:
            self._kernels.merge(sink.words[words], taken)
        self._kernels.remove(self.bitmap.words[words], taken)
        return int(np.count_nonzero(taken))

    def verify(self) -> None:
        """Raise `InvariantError` if a page outside of the span is set, or `BitmapError` for a tail bit."""
        self.bitmap.verify()
        outside = self.bitmap.copy()
        lo, hi = self.span
        outside.set_range(lo, max(0, hi - lo), False)
        if outside.any():
            raise InvariantError(f"saved pages {some(outside.ranges().tolist())} aren't in {lo}..{hi - 1}")
