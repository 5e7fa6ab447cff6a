"""A trace of a guest's writes by the content of its memory, at intervals of a tenth of a second.

`hwdbm.trace.record_file` does the same from a file, at a pace that is easier on the machine. The judge wants short
intervals of a guest of some hundred MiB, so it compares in compiled code.
"""

import time
from dataclasses import dataclass

import numpy as np
from numba import njit


@dataclass(frozen=True)
class Content:
    """What was recorded, as `hwdbm.forecast.replay` asks for it."""

    times: np.ndarray
    changed: np.ndarray
    zero: np.ndarray
    initial_zeros: np.ndarray
    npages: int
    page_size: int = 4096

    def words(self, lo: int, hi: int) -> np.ndarray:
        return self.changed[lo:hi]

    def zeros(self, lo: int, hi: int) -> np.ndarray:
        return self.zero[lo:hi]


@njit(nogil=True)
def _compare(memory, copy, changed, zero):
    """Bring the copy up to date, and set the bits of the pages that weren't what they were, and of those of zeros."""
    words = memory.shape[1]
    for page in range(memory.shape[0]):
        now, then = memory[page], copy[page]
        differs = np.uint64(0)
        filled = np.uint64(0)
        for i in range(words):
            differs |= now[i] ^ then[i]
            filled |= now[i]
        bit = np.uint64(1) << np.uint64(page & 63)
        if differs:
            changed[page >> 6] |= bit
            then[:] = now
        if not filled:
            zero[page >> 6] |= bit


def record(memory: np.ndarray, duration: float, interval: float = 0.1) -> Content:
    """Return which pages changed in each interval, and which of these were zero then.

    Parameters
    ----------
    memory : (npages, words) uint64 array
        What the guest shares.
    duration, interval : float
        Seconds.
    """
    copy, nwords = np.zeros_like(memory), -(-len(memory) // 64)

    def compare() -> tuple[np.ndarray, np.ndarray]:
        changed, zero = np.zeros(nwords, dtype=np.uint64), np.zeros(nwords, dtype=np.uint64)
        _compare(memory, copy, changed, zero)
        return changed, zero

    compare()
    _, initial = compare()  # the first one also makes the copy
    began, times, words, zeros = time.monotonic_ns(), [0], [], []
    while times[-1] < duration * 1e9:
        time.sleep(max(len(times) * interval - (time.monotonic_ns() - began) / 1e9 - 0.3 * interval, 0))
        changed, zero = compare()
        times.append(time.monotonic_ns() - began)
        words.append(changed)
        zeros.append(changed & zero)
    return Content(np.array(times), np.array(words), np.array(zeros), initial, len(memory))
