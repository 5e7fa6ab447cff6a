"""What a dirty log has done so far, in counts that don't jitter."""

from collections.abc import Callable
from dataclasses import dataclass, replace
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
        self._hook, self._stats, self._lock = hook, Stats(), Lock()

    @property
    def stats(self) -> Stats:
        """The counts up to now."""
        return self._stats

    def flush(self, slot: Memslot, first_page: int, npages: int) -> None:
        """Flush the TLBs of all vCPUs for some pages of a slot, and count it. What the hook raises is raised."""
        if self._hook is not None:
            self._hook(slot, first_page, npages)
        with self._lock:
            self._stats = replace(self._stats, flushes=self._stats.flushes + 1)

    def add(self, tally: Tally) -> Tally:
        """Count what a pass did, and return it."""
        with self._lock:
            self._stats = replace(
                self._stats,
                leaves_read=self._stats.leaves_read + tally.read,
                leaves_changed=self._stats.leaves_changed + tally.changed,
                words_written=self._stats.words_written + tally.words,
            )
        return tally

    def fault(self) -> None:
        """Count a write fault."""
        with self._lock:
            self._stats = replace(self._stats, write_faults=self._stats.write_faults + 1)
