"""What a dirty log has done so far, in counts that don't jitter."""

from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock

from hwdbm.kernels import Tally
from hwdbm.memslot import Memslot

__all__ = ["FlushHook", "Meter", "Stats"]

FlushHook = Callable[[Memslot, int, int], object]
"""Called with (slot, first page, pages): no vCPU may use a translation of them from before when it returns."""


@dataclass(frozen=True, slots=True)
class Stats:
    """A snapshot of the counts.

    Parameters
    ----------
    flushes : int
        TLB flushes that were asked for and came back.
    leaves_read : int
        Descriptors that passes read.
    leaves_changed : int
        Descriptors that passes changed.
    words_written : int
        Bitmap words, of 64 pages, that passes had something to write to.
    write_faults : int
        Faults that were resolved.
    """

    flushes: int = 0
    leaves_read: int = 0
    leaves_changed: int = 0
    words_written: int = 0
    write_faults: int = 0


class Meter:
    """Counts for several threads.

    Parameters
    ----------
    hook : callable or None
        What flushes TLBs; None where there is none.
    """

    def __init__(self, hook: FlushHook | None) -> None:
        self._hook, self._lock = hook, Lock()
        self._flushes = self._read = self._changed = self._words = self._faults = 0

    @property
    def stats(self) -> Stats:
        """The counts up to now."""
        with self._lock:
            return Stats(self._flushes, self._read, self._changed, self._words, self._faults)

    def flush(self, slot: Memslot, first_page: int, npages: int) -> None:
        """Flush the TLBs of all vCPUs for some pages of a slot, and count it. What the hook raises is raised."""
        if self._hook is not None:
            self._hook(slot, first_page, npages)
        with self._lock:
            self._flushes += 1

    def add(self, tally: Tally) -> Tally:
        """Count what a pass did, and return it."""
        with self._lock:
            self._read += tally.read
            self._changed += tally.changed
            self._words += tally.words
        return tally

    def fault(self, count: int = 1) -> None:
        """Count write faults."""
        with self._lock:
            self._faults += count
