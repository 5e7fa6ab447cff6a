"""Distinct: how many numbers of many differ, without sorting them."""

from typing import Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["Distinct"]

_SPARSE: Final = 256  # bytes that are read for a number at most; sorting it takes as long
_CHUNK: Final = 1 << 18  # bytes that are compared together: what comes of it stays in the cache
_TURNS: Final = 255  # what a byte can tell apart, besides 0


class Distinct:
    """Counts the distinct ones of numbers below a limit, in a byte for each.

    Parameters
    ----------
    limit : int
        Numbers are below it.

    Notes
    -----
    One thread at a time.

    Examples
    --------
    >>> distinct = Distinct(1000)
    >>> distinct.count(np.array([7, 999, 7])), distinct.count(np.array([7]))
    (2, 1)
    """

    def __init__(self, limit: int) -> None:
        self._seen = np.zeros(limit, dtype=np.uint8)  # the count at which each number was seen last
        self._turn = 0

    def count(self, numbers: NDArray[np.int64]) -> int:
        """Return how many numbers there are, however often each comes. Equal to ``len(set(numbers.tolist()))``."""
        if not numbers.size:
            return 0
        lo, hi = int(numbers.min()), int(numbers.max()) + 1
        if hi - lo > _SPARSE * numbers.size:
            return int(np.unique(numbers).size)
        if self._turn == _TURNS:
            self._seen.fill(0)
            self._turn = 0
        self._turn += 1
        self._seen[numbers] = self._turn
        parts = (self._seen[start : min(start + _CHUNK, hi)] for start in range(lo, hi, _CHUNK))
        return sum(int(np.count_nonzero(part == self._turn)) for part in parts)
