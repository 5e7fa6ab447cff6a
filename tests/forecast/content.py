"""A trace of a guest's writes by the content of its memory, at intervals of a tenth of a second.

`hwdbm.trace.record_file` does the same from a file, a part at a time. The judge wants short intervals of a guest of
some hundred MiB, so it compares all of the memory, where it lies.
"""

import time
from dataclasses import dataclass, replace

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


def beside(trace: Content, pages: int, filled: int) -> Content:
    """Return a trace with memory behind the guest's that nobody writes: so many pages, of which some aren't zero."""
    columns = -(-pages // 64)
    zero = DirtyBitmap(columns * 64)
    zero.set_range(0, pages)
    zero -= DirtyBitmap.from_pages(np.linspace(0, pages - 1, filled).astype(np.int64), columns * 64)
    still = np.zeros((len(trace.changed), columns), dtype=np.uint64)
    assert trace.npages % 64 == 0, trace.npages
    return replace(
        trace,
        changed=np.hstack((trace.changed, still)),
        zero=np.hstack((trace.zero, still)),
        initial_zeros=np.concatenate((trace.initial_zeros, zero.words)),
        npages=trace.npages + pages,
    )


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
