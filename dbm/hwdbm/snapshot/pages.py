"""Pages between memory and files, in runs, with their SHA-256: bytes are hashed while the next ones are moved."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from errno import EIO
from itertools import cycle
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from hwdbm.bitmap import DirtyBitmap
from hwdbm.files import naming
from hwdbm.vm import MemoryMap

Bytes = NDArray[np.uint8]

_BATCH = 8 << 20  # bytes that are hashed together
_LONG = 256 << 10  # bytes of a run on average, from which hashing it where it lies costs least
_ZEROS = 1 << 20  # bytes that are looked at together, so that zeros become a hole


class Hash:
    """SHA-256 of what is added, in the order in which it is added, by a thread of its own.

    What was added must stay as it is until the next `add`, or `digest`, has returned.
    """

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._pool = ThreadPoolExecutor(1, "hwdbm-sha256")
        self._last: Future[None] | None = None

    def add(self, parts: Sequence[Bytes]) -> None:
        """Add some bytes. It waits for those that were added before."""
        self._wait()
        self._last = self._pool.submit(self._update, parts)

    def digest(self) -> str:
        """Return the SHA-256 of all that was added, in hexadecimal."""
        self._wait()
        return self._hash.hexdigest()

    def _update(self, parts: Sequence[Bytes]) -> None:
        for part in parts:
            self._hash.update(part.data)

    def _wait(self) -> None:
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)


def runs_of(
    layout: MemoryMap, offsets: Sequence[int], pages: Sequence[DirtyBitmap], layer: int = 0
) -> NDArray[np.int64]:
    """Return the runs of pages in a memory file, in the order in which they lie there.

    Parameters
    ----------
    layout : MemoryMap
        The slots.
    offsets : sequence of int
        Where each slot begins in the file.
    pages : sequence of DirtyBitmap
        The pages of each slot.
    layer : int
        Which file of several it is.

    Returns
    -------
    (n, 5) int64 array
        Of each run: where it begins in the file, its length, which slot it is in, counted from 0, and where in that, in
        bytes but for the slot; and `layer`.
    """
    found = []
    for index in np.argsort(offsets).tolist():
        ranges = pages[index].ranges(unit=layout.page_size).view(np.int64)
        runs = np.empty((len(ranges), 5), dtype=np.int64)
        runs[:, 0] = ranges[:, 0] + offsets[index]
        runs[:, 1], runs[:, 2], runs[:, 3], runs[:, 4] = ranges[:, 1], index, ranges[:, 0], layer
        found.append(runs)
    return np.concatenate(found)


def put_pages(fd: int, runs: NDArray[np.int64], memory: Sequence[Bytes], page_size: int, *, holes: bool) -> str:
    """Write runs of memory to a file, and return the SHA-256 of them all, one after another.

    Parameters
    ----------
    fd : int
        The file.
    runs : (n, 5) int64 array
        As `runs_of` has them: whole pages.
    memory : sequence of (size,) uint8 arrays
        The bytes of each slot, which nobody writes meanwhile.
    page_size : int
        Bytes of a page.
    holes : bool
        Whether a mebibyte of zeros is left out: the file has none of these bytes yet.
    """
    stop: list[bool] = []
    with ThreadPoolExecutor(1, "hwdbm-sha256") as pool:
        # It reads the memory itself: this thread does no more than to write, and Python's lock is hardly asked for.
        hashed = pool.submit(_hashed, runs, memory, page_size, stop)
        try:
            views = [part.data for part in memory]
            for at, length, slot, start, _ in runs.tolist():
                if holes:
                    put_sparse(fd, memory[slot][start : start + length], at)
                else:
                    put(fd, views[slot][start : start + length], at)
        except BaseException:
            stop.append(True)
            raise
        return hashed.result()


def _hashed(runs: NDArray[np.int64], memory: Sequence[Bytes], page_size: int, stop: list[bool]) -> str:
    """Return the SHA-256 of runs of memory; of few bytes each are gathered, since a call for each would cost more."""
    digest, lengths = hashlib.sha256(), runs[:, 1]
    if lengths.sum() >= _LONG * len(runs):
        for _, length, slot, start, _ in runs.tolist():
            for at in range(start, start + length, _BATCH):
                if stop:
                    return ""
                digest.update(memory[slot][at : min(at + _BATCH, start + length)].data)
        return digest.hexdigest()
    step = _BATCH // page_size
    buffer = np.empty((step, page_size), dtype=np.uint8)
    for part in np.split(runs, np.flatnonzero(np.diff(runs[:, 2])) + 1):
        counts = part[:, 1] // page_size
        before = np.cumsum(counts) - counts
        pages = np.repeat(part[:, 3] // page_size - before, counts) + np.arange(counts.sum())
        rows = memory[int(part[0, 2])].reshape(-1, page_size)
        for first in range(0, pages.size, step):
            if stop:
                return ""
            chosen = pages[first : first + step]
            # Without mode="clip" numpy would gather into a temporary of its own first.
            digest.update(np.take(rows, chosen, axis=0, out=buffer[: chosen.size], mode="clip").data)
    return digest.hexdigest()


def put_sparse(fd: int, part: Bytes, at: int) -> None:
    """Write some bytes to a place in a file that has none there yet: a mebibyte of zeros stays a hole."""
    for start in range(0, part.size, _ZEROS):
        some = part[start : start + _ZEROS]
        if some.any():
            put(fd, some.data, at + start)


def put(fd: int, part: memoryview, at: int) -> None:
    """Write all of some bytes to a place in a file."""
    while part:  # a long one takes several calls
        count = os.pwrite(fd, part, at)
        if not count:
            raise OSError(EIO, "nothing could be written")
        part, at = part[count:], at + count


def get_pages(
    files: Sequence[tuple[int, Path]], runs: NDArray[np.int64], use: Callable[[int, int, Bytes], object] | None = None
) -> str:
    """Read runs of files, and return the SHA-256 of them all, one after another.

    Parameters
    ----------
    files : sequence of (int, Path)
        The file of each layer, and its name for errors.
    runs : (n, 5) int64 array
        As `runs_of` has them.
    use : callable, optional
        Called with which slot, where in it, and the bytes there, which are the callee's until it returns. Runs that
        follow each other in a slot come together.

    Raises
    ------
    OSError
        If a file can't be read, with its name; and whatever `use` raises.
    """
    # Two buffers in turn: one is hashed while the other is filled.
    buffers = cycle((np.empty(_BATCH, dtype=np.uint8), np.empty(_BATCH, dtype=np.uint8)))
    with Hash() as digest:
        for buffer, batch in zip(buffers, _read_batches(runs), strict=False):
            filled, due = 0, None
            joined: list[tuple[int, int, int]] = []  # slot, where in it, where in the buffer
            for at, length, slot, start, layer in batch:
                fd, path = files[layer]
                try:
                    get(fd, buffer[filled : filled + length], at)
                except OSError:
                    with naming(path):
                        raise
                if (slot, start) != due:
                    joined.append((slot, start, filled))
                filled, due = filled + length, (slot, start + length)
            if use is not None:
                for (slot, start, first), stop in zip(joined, [*(at for _, _, at in joined[1:]), filled], strict=True):
                    use(slot, start, buffer[first:stop])
            digest.add([buffer[:filled]])
        return digest.digest()


def _read_batches(runs: NDArray[np.int64]) -> Iterator[list[tuple[int, int, int, int, int]]]:
    batch: list[tuple[int, int, int, int, int]] = []
    room = _BATCH
    for at, length, slot, start, layer in runs.tolist():
        done = 0
        while done < length:
            count = min(length - done, room)
            batch.append((at + done, count, slot, start + done, layer))
            done, room = done + count, room - count
            if not room:
                yield batch
                batch, room = [], _BATCH
    if batch:
        yield batch


def get(fd: int, part: Bytes, at: int) -> None:
    """Read bytes from a place in a file, all of them.

    Raises
    ------
    OSError
        EIO if the file ends before.
    """
    view = part.data
    while view:
        count = os.preadv(fd, [view], at)
        if not count:
            raise OSError(EIO, f"it ends at byte {at}")
        view, at = view[count:], at + count
