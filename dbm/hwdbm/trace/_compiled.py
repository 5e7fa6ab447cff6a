"""The comparison of `hwdbm.trace.content`, compiled by numba for one signature when this module is imported."""

import numpy as np
from numba import types

from hwdbm.kernels._cache import compiled

_PAGES = types.Array(types.uint64, 2, "C")
_READ = types.Array(types.uint64, 2, "C", readonly=True)
_WORDS = types.Array(types.uint64, 1, "C")


@compiled(_READ, _PAGES, _WORDS, _WORDS)
def compare_pages(memory, copy, changed, zero):
    """Bring the copy up to date, and set the bits of the pages that weren't what they were, and of those of zeros."""
    words = memory.shape[1]
    for page in range(memory.shape[0]):
        now, then = memory[page], copy[page]
        differs = np.uint64(0)
        for i in range(words):
            differs |= now[i] ^ then[i]
        if differs:
            filled = np.uint64(0)
            for i in range(words):
                value = now[i]  # once: others may write it meanwhile
                filled |= value
                then[i] = value
            bit = np.uint64(1) << np.uint64(page & 63)
            changed[page >> 6] |= bit
            if not filled:
                zero[page >> 6] |= bit
