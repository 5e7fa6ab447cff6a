"""Pages into frames, at a bandwidth."""

import time
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from hwdbm.bitmap import DirtyBitmap
from hwdbm.memslot import Memslot
from hwdbm.migration.channel import Channel
from hwdbm.migration.staging import Staging
from hwdbm.migration.wire import HEAD_SIZE, PAYLOAD, ZERO_RUNS, Kind
from hwdbm.vm import Source

_WINDOW = 1 << 18  # pages of a slot looked at together where a listing costs 8 bytes a page: 2 MiB
_NAP, _SLICE = 0.001, 0.05  # seconds of sleep between two looks at whether to go on, at least and at most
_BURST = 0.02  # seconds of the bandwidth that may be made up for at once
_FRAME = 0.25  # seconds of the bandwidth that a frame takes, if that is a page or more


class Limiter:
    """Lets so many bytes through in a second.

    Parameters
    ----------
    bandwidth : float, optional
        Bytes a second; None for no limit.
    """

    def __init__(self, bandwidth: float | None = None) -> None:
        self.bandwidth, self._due = bandwidth, 0.0

    def pages(self, page_size: int) -> int:
        """Return the pages of a frame, at most: so few that a cancel, or what the guest does, is seen in time."""
        most = PAYLOAD if self.bandwidth is None else min(PAYLOAD, self.bandwidth * _FRAME)
        return max(int(most) // page_size, 1)

    def wait(self, nbytes: int, check: Callable[[], object]) -> None:
        """Return when `nbytes` may be sent; `check` is called while waiting, and ends it by raising."""
        if self.bandwidth is None:
            return
        now = time.monotonic()
        self._due = max(self._due, now - _BURST) + nbytes / self.bandwidth
        while (left := self._due - time.monotonic()) > _BURST:
            time.sleep(min(max(left - _BURST, _NAP), _SLICE))  # no longer: the guest may be paused meanwhile
            check()


class PageSender:
    """Sends pages of a source, and counts them.

    A batch of pages is copied once, while it is small enough to stay in the cache; the copy is what is checked for
    zeros, summed and sent. A guest that writes meanwhile can't come between the checksum and what is sent, then.

    Parameters
    ----------
    source : Source
        The slot of the pages.
    channel : Channel
        The channel to the destination.
    staging : Staging
        The staging area that they are copied to.
    limiter : Limiter
        The bandwidth.
    check : callable
        Called between frames; it raises to end the sending.

    Attributes
    ----------
    normal, duplicate : int
        Pages sent with their bytes, and pages of zeros sent as such.
    zero_time : float
        Seconds that the pages of zeros took here: time that the link wasn't used for.
    """

    def __init__(
        self, source: Source, channel: Channel, staging: Staging, limiter: Limiter, check: Callable[[], object]
    ) -> None:
        self._source, self._channel, self._staging = source, channel, staging
        self._limiter, self._check = limiter, check
        self._size = source.page_size
        self._zero_runs: list[NDArray[np.uint64]] = []
        self._zero_count = 0
        self.restart()

    def restart(self) -> None:
        """Count from 0 again."""
        self.normal = self.duplicate = 0
        self.zero_time = 0.0

    def send(self, slot: Memslot, pages: DirtyBitmap | None = None) -> None:
        """Send pages of a slot, all of them by default."""
        rows = self._source.memory(slot.id).reshape(-1, self._size)
        base = slot.base_gfn * self._size
        for batch in _batches(slot.npages, pages, self._limiter.pages(self._size)):
            self._check()
            self._began = time.perf_counter()
            if isinstance(batch, slice):
                stage = self._stage(batch.stop - batch.start)
                np.copyto(stage, rows[batch])
            else:
                stage = self._stage(batch.size)
                np.take(rows, batch, axis=0, out=stage, mode="clip")  # clip: unlike raise it needs no second buffer
            self._send_copy(base, batch, stage)
        self._flush_zeros()

    def _stage(self, npages: int) -> NDArray[np.uint8]:
        return self._staging.buffer()[: npages * self._size].reshape(npages, self._size)

    def _send_copy(self, base: int, batch: slice | NDArray[np.int64], stage: NDArray[np.uint8]) -> None:
        words = stage.view(np.uint64)
        zero = words[:, 0] == 0
        if zero.any():
            (maybe,) = zero.nonzero()
            part = words if maybe.size == len(words) else words[maybe]
            zero[maybe] = np.bitwise_or.reduce(part, axis=1) == 0
            if zero.any():
                index = np.arange(batch.start, batch.stop) if isinstance(batch, slice) else batch
                self._add_zeros(base, index[zero])
                left, rest = index[~zero], stage[~zero]
                self.zero_time += (time.perf_counter() - self._began) * (index.size - left.size) / index.size
                if not left.size:
                    return
                batch, stage = left, stage[: left.size]
                stage[:] = rest
        self._emit(base, _one_run(batch) if isinstance(batch, slice) else runs_of(batch), stage)

    def _emit(self, base: int, runs: NDArray[np.int64], payload: NDArray[np.uint8]) -> None:
        table = self._addresses(base, runs).tobytes()
        if self._limiter.bandwidth is not None:  # the next one may be long in coming
            self._channel.flush()
        self._limiter.wait(HEAD_SIZE + len(table) + payload.nbytes, self._check)
        self._staging.send(table, len(runs), payload)
        self.normal += payload.size // self._size

    def _add_zeros(self, base: int, index: NDArray[np.int64]) -> None:
        runs = self._addresses(base, runs_of(index))
        if self._zero_runs and self._zero_runs[-1][-1].sum() == runs[0, 0]:  # it goes on where the last one ended
            self._zero_runs[-1][-1, 1] += runs[0, 1]
            runs = runs[1:]
        if self._zero_count + len(runs) > ZERO_RUNS:
            self._flush_zeros()
        if len(runs):
            self._zero_runs.append(runs)
            self._zero_count += len(runs)
        self.duplicate += index.size

    def _flush_zeros(self) -> None:
        if self._zero_runs:
            table = np.concatenate(self._zero_runs).tobytes()
            self._limiter.wait(HEAD_SIZE + len(table), self._check)
            self._channel.send(Kind.ZERO, table, runs=self._zero_count)
            self._zero_runs, self._zero_count = [], 0

    def _addresses(self, base: int, runs: NDArray[np.int64]) -> NDArray[np.uint64]:
        table = runs.astype("<u8") * np.uint64(self._size)
        table[:, 0] += np.uint64(base)
        return table


def runs_of(index: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return ascending page numbers, one or more, as rows of a first page and a number of pages.

    Examples
    --------
    >>> runs_of(np.array([3, 4, 5, 9])).tolist()
    [[3, 3], [9, 1]]
    """
    (breaks,) = (index[1:] - index[:-1] != 1).nonzero()
    runs = np.empty((breaks.size + 1, 2), dtype=np.int64)
    runs[0, 0] = index[0]
    runs[1:, 0] = index[breaks + 1]
    # How many there are: from where one ends back to where the one before ended.
    runs[:-1, 1] = breaks
    runs[-1, 1] = index.size - 1
    runs[1:, 1] -= breaks
    runs[0, 1] += 1
    return runs


def _one_run(batch: slice) -> NDArray[np.int64]:
    return np.array([[batch.start, batch.stop - batch.start]], dtype=np.int64)


def _batches(npages: int, pages: DirtyBitmap | None, most: int) -> Iterator[slice | NDArray[np.int64]]:
    """Yield pages in order, `most` at a time: as a slice where they lie together, else as their numbers."""
    if pages is None:
        yield from (slice(first, min(first + most, npages)) for first in range(0, npages, most))
        return
    rest = np.zeros(0, dtype=np.int64)
    for first in range(0, npages, _WINDOW):
        if not pages.words[first >> 6 : first + _WINDOW >> 6].any():
            continue
        found = pages.part(first, min(_WINDOW, npages - first)).pages() + first
        rest = np.concatenate((rest, found)) if rest.size else found
        whole = rest.size // most * most
        for start in range(0, whole, most):
            yield _compact(rest[start : start + most])
        rest = rest[whole:]
    if rest.size:
        yield _compact(rest)


def _compact(index: NDArray[np.int64]) -> slice | NDArray[np.int64]:
    first, last = int(index[0]), int(index[-1])
    return slice(first, last + 1) if last - first + 1 == index.size else index
