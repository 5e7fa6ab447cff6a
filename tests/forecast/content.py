"""A trace of a guest's writes by the content of its memory, at intervals of a tenth of a second.

`hwdbm.trace.record_file` does the same from a file, a part at a time. The judge wants short intervals of a guest of
some hundred MiB, so it compares all of the memory, where it lies.
"""

import time
from dataclasses import dataclass

import numpy as np

from hwdbm.bitmap import DirtyBitmap
from hwdbm.trace.content import compare


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


def record(memory: np.ndarray, duration: float, interval: float = 0.1) -> Content:
    """Return which pages changed in each interval, and which of these were zero then.

    Parameters
    ----------
    memory : (npages, words) uint64 array
        What the guest shares.
    duration, interval : float
        Seconds.
    """
    copy = np.zeros_like(memory)
    filled, _ = compare(memory, copy)
    changed, zero = compare(memory, copy)  # the first one takes longer, and what was written in it is in no interval
    initial = ~(filled | changed) & (~DirtyBitmap(len(memory))).words | zero
    began, times, words, zeros = time.monotonic_ns(), [0], [], []
    while times[-1] < duration * 1e9:
        time.sleep(max(len(times) * interval - (time.monotonic_ns() - began) / 1e9 - 0.3 * interval, 0))
        changed, zero = compare(memory, copy)
        times.append(time.monotonic_ns() - began)
        words.append(changed)
        zeros.append(zero)
    return Content(np.array(times), np.array(words), np.array(zeros), initial, len(memory))
