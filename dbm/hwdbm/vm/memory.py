"""Memory that is there before it is needed: fresh pages are slow to touch."""

import ctypes
import errno
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
from numpy.typing import NDArray

__all__ = ["populate"]

_MADV_HUGEPAGE = 14
_MADV_POPULATE_WRITE = 23  # Linux 5.14
_STEP = 1 << 26  # bytes populated by one call, so that a signal is served in between


def populate(memory: NDArray[np.uint8]) -> None:
    """Have the system back memory with pages now, huge ones where it has them; no byte changes.

    Parameters
    ----------
    memory : (n,) uint8 array
        C-contiguous and writable. No other thread writes to it meanwhile.

    Raises
    ------
    OSError
        ENOMEM, EFAULT or ENOSPC, if there isn't that much memory, or room in the file behind it.
    """
    start = -memory.ctypes.data % mmap.PAGESIZE
    stop = memory.size - (memory.ctypes.data + memory.size) % mmap.PAGESIZE
    if start >= stop:
        return
    address = memory.ctypes.data
    _madvise(address + start, stop - start, _MADV_HUGEPAGE)  # advice: that it can't be had is no failure

    def step(first: int) -> None:
        size = min(_STEP, stop - first)
        code = _madvise(address + first, size, _MADV_POPULATE_WRITE)
        if code == errno.EINVAL:  # an older kernel
            part = memory[first : first + size : mmap.PAGESIZE]
            np.bitwise_or(part, np.uint8(0), out=part)
        elif code:
            raise OSError(code, f"no room for {size} bytes of guest memory: {os.strerror(code)}")

    # Two threads clear pages in little more than half the time of one.
    with ThreadPoolExecutor(2) as pool:
        for _ in pool.map(step, range(start, stop, _STEP)):
            pass


def _madvise(address: int, size: int, advice: int) -> int:
    """Return the errno, 0 where all is well."""
    if _libc().madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), advice) == 0:
        return 0
    return ctypes.get_errno()


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
