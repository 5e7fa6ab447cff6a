"""Counts of the work that a dirty log has done: unlike times, they repeat exactly."""

from dataclasses import dataclass
from threading import Lock

from hwdbm.kernels import Tally


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
        Bitmap words, of 64 pages each, that passes wrote.
    write_faults : int
        Faults that were resolved.
    """

    flushes: int = 0
    leaves_read: int = 0
    leaves_changed: int = 0
    words_written: int = 0
    write_faults: int = 0


class Meter:
    """Counts for several threads."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._flushes = self._read = self._changed = self._words = self._faults = 0

    @property
    def stats(self) -> Stats:
        """The counts up to now."""
        with self._lock:
            return Stats(self._flushes, self._read, self._changed, self._words, self._faults)

    def add(self, tally: Tally) -> Tally:
        """Count what a pass did, and return it."""
        with self._lock:
            self._read += tally.read
            self._changed += tally.changed
            self._words += tally.words
        return tally

    def flush(self) -> None:
        """Count a flush."""
        with self._lock:
            self._flushes += 1

    def fault(self, count: int) -> None:
        """Count write faults."""
        with self._lock:
            self._faults += count
