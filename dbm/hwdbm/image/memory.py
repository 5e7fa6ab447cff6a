"""The memory that a walk reads tables from, one granule each."""

from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.uint64]

NOWHERE = -1
"""The number of a table that isn't in a memory."""


@runtime_checkable
class TableMemory(Protocol):
    """Physical memory that tables are read from.

    A new kind of image is a class with these three members.
    """

    @property
    def capacity(self) -> int:
        """Tables that the memory can hold: what bounds a walk."""

    @property
    def extent(self) -> str:
        """Which memory it is, to end the sentence "there is no table at this address in ..."."""

    def find(self, pa: Array) -> NDArray[np.intp]:
        """Return where each table is, for `read`; -1 where it isn't wholly inside.

        Parameters
        ----------
        pa : (n,) uint64 array
            Physical addresses in bytes, aligned to the granule.
        """

    def read(self, where: NDArray[np.intp], out: Array) -> Array:
        """Return the tables that `find` found at `where`.

        Parameters
        ----------
        where : (n,) intp array
            None of them negative.
        out : (m, entries) uint64 array
            Scratch of n rows or more, which the result may lie in.

        Returns
        -------
        (n, entries) uint64 array
            Not to be written: it may be the image itself.
        """


def gather(rows: Array, where: NDArray[np.intp], out: Array) -> Array:
    """Return ``rows[where]``: a view where the rows lie one after the other, else a copy in `out`.

    Examples
    --------
    >>> rows, out = np.arange(8, dtype=np.uint64).reshape(4, 2), np.empty((4, 2), dtype=np.uint64)
    >>> gather(rows, np.array([3, 0]), out).tolist()
    [[6, 7], [0, 1]]
    >>> np.shares_memory(gather(rows, np.array([1, 2]), out), rows)
    True
    """
    n = where.size
    first = int(where[0]) if n else 0
    if n and int(where[-1]) - first == n - 1 and bool((where[1:] - where[:-1] == 1).all()):
        return rows[first : first + n]
    # Without mode="clip" numpy would gather into a temporary of its own first.
    return np.take(rows, where, axis=0, out=out[:n], mode="clip")
