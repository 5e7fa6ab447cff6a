"""Which pages of two memories differ."""

import numpy as np
from numpy.typing import NDArray

from hwdbm import check
from hwdbm.bitmap import DirtyBitmap
from hwdbm.errors import ImageError

_STEP = 32 << 20  # bytes compared together


def differing(one: NDArray[np.uint8], two: NDArray[np.uint8], page_size: int) -> DirtyBitmap:
    """Return the bitmap of the pages in which two memories differ.

    Parameters
    ----------
    one, two : (size,) uint8 arrays
        Of the same size: whole pages.
    page_size : int
        Bytes of a page, a multiple of 8.

    Raises
    ------
    ImageError
        If they aren't.

    Examples
    --------
    >>> one, two = np.zeros(3 * 4096, dtype=np.uint8), np.zeros(3 * 4096, dtype=np.uint8)
    >>> two[5000] = 1
    >>> differing(one, two, 4096).pages()
    array([1])
    """
    page_size = check.integer(page_size, "page_size", 8)
    if one.size != two.size or one.size % page_size:
        raise ImageError(f"memories of {one.size} and {two.size} bytes aren't the same pages of {page_size}")
    flags = np.zeros(one.size // page_size, dtype=np.bool_)
    step = max(_STEP // page_size, 1)
    for first in range(0, flags.size, step):
        start, stop = first * page_size, min(first + step, flags.size) * page_size
        a, b = one[start:stop], two[start:stop]
        if a.ctypes.data % 8 == b.ctypes.data % 8 == 0:
            a, b = a.view(np.uint64), b.view(np.uint64)
        flags[first : first + step] = (a != b).reshape(-1, page_size // a.itemsize).any(axis=1)
    return DirtyBitmap.from_pages(np.flatnonzero(flags), flags.size)
