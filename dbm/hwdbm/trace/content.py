"""Comparing memory with a copy of what it was: which pages changed, and which of these hold nothing but zeros.

``compare`` is compiled by numba where that is installed (the extra ``jit``), and numpy otherwise. Both say the same.
"""

import logging
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from textwrap import shorten

import numpy as np
from numpy.typing import NDArray

from hwdbm import check
from hwdbm.bitmap import DirtyBitmap, word_count
from hwdbm.kernels._numba import ready

_log = logging.getLogger("hwdbm")

Words = NDArray[np.uint64]
Compare = Callable[[Words, Words, Words, Words], None]


def compare(memory: Words, copy: Words) -> tuple[Words, Words]:
    """Return which pages aren't what they were, and which of these are zero; and bring the copy up to date.

    Parameters
    ----------
    memory : (npages, n) uint64 array
        The pages as they are. Others may write them meanwhile: what is written is in this comparison or the next.
    copy : (npages, n) uint64 array
        The pages as they were; modified in place.

    Returns
    -------
    changed, zero : (ceil(npages / 64),) uint64 array
        Bit i stands for page i.

    Examples
    --------
    >>> memory, copy = np.zeros((70, 512), dtype=np.uint64), np.zeros((70, 512), dtype=np.uint64)
    >>> memory[[3, 69], 100] = 1
    >>> compare(memory, copy)
    (array([ 8, 32], dtype=uint64), array([0, 0], dtype=uint64))
    >>> memory[3] = 0
    >>> compare(memory, copy)
    (array([8, 0], dtype=uint64), array([8, 0], dtype=uint64))
    """
    for each, name in ((memory, "memory"), (copy, "copy")):
        check.instance(each, np.ndarray, name)
        if each.dtype != np.uint64 or each.ndim != 2 or each.shape != memory.shape or not each.flags.c_contiguous:
            raise ValueError(f"{name} is whole pages, rows of uint64, as many as there are")
    changed, zero = (np.zeros(word_count(len(memory)), dtype=np.uint64) for _ in range(2))
    _best()(memory, copy, changed, zero)
    return changed, zero


def warm_up() -> None:
    """Load the comparison, compiling it if it never was."""
    _best()


@cache
def _best() -> Compare:
    """Return the compiled comparison, or numpy's where numba is missing or can't compile."""
    if find_spec("numba") is not None:
        try:
            ready()
            from hwdbm.trace._compiled import compare_pages  # noqa: PLC0415  # numba takes a second to import
        except Exception as error:  # noqa: BLE001  # whatever numba or LLVM raises where they don't work
            why = shorten(str(error) or type(error).__name__, 200, placeholder=" ...")
            _log.warning("hwdbm: the comparison of pages can't be compiled here: %s; NumPy takes over", why)
            return by_numpy
        compiled: Compare = compare_pages
        return compiled
    return by_numpy


def by_numpy(memory: Words, copy: Words, changed: Words, zero: Words) -> None:
    """Do what `compare` does, in numpy; the words begin as zeros."""
    rows = np.flatnonzero((memory != copy).any(axis=1))
    if not rows.size:
        return
    now = memory[rows]  # once: others may write it meanwhile
    copy[rows] = now
    changed |= DirtyBitmap.from_pages(rows, len(memory)).words
    zero |= DirtyBitmap.from_pages(rows[~now.any(axis=1)], len(memory)).words
