"""Snapshots: guest memory in files, whole or only what was dirtied since the last one.

The form is Firecracker's. A file has the size of all memory, slot after slot. A full one holds every byte; a
differential one only the dirty pages, each at its offset, and holes elsewhere. Laid over its base (`rebase`), oldest
first, it gives the memory of its moment. A page that is dirty and zero is data, since a hole means "as it was".
"""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from errno import EINVAL, EIO, ENXIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hwdbm.bitmap import DirtyBitmap
from hwdbm.errors import StaleLeaseError
from hwdbm.vm.source import Pages, Source

__all__ = ["Written", "extents", "rebase", "write_diff", "write_full"]

_CHUNK = 1 << 20  # bytes, a multiple of every page


@dataclass(frozen=True, slots=True)
class Written:
    """What a snapshot holds.

    Parameters
    ----------
    path : Path
        The file.
    size : int
        Its size: all memory, in bytes.
    data : int
        Bytes of it that are data, and no hole.
    dirty : int
        Pages that were dirty; all of them for a full one.
    """

    path: Path
    size: int
    data: int
    dirty: int


def write_full(source: Source, path: Path) -> Written:
    """Write all memory to a file, and begin to log what differs from it.

    The guest is paused meanwhile. A mebibyte of zeros becomes a hole.

    Parameters
    ----------
    source : Source
        The VM. It logs afterwards.
    path : Path
        The file; it is replaced when the new one is whole.

    Returns
    -------
    Written
        What was written.

    Raises
    ------
    OSError
        If it can't be written. The file is what it was, and so is the dirty log.
    """
    if not all(slot.logging for slot in source.slots):
        source.start_log()
    return _write(source, path, _put_all)


def write_diff(source: Source, path: Path) -> Written:
    """Write what was dirtied since the last snapshot to a sparse file.

    Parameters, result and errors are those of `write_full`. The source must be logging. After a failure the next
    differential snapshot has what this one would have had: every bit is put back.
    """
    return _write(source, path, _put_dirty)


def rebase(base: Path, diff: Path) -> int:
    """Lay a differential snapshot over its base, as Firecracker's ``snapshot-editor edit-memory rebase`` does.

    Several are laid in the order in which they were made. Should it fail half-way, it can be done again.

    Parameters
    ----------
    base : Path
        The file that is changed.
    diff : Path
        The sparse file.

    Returns
    -------
    int
        Bytes copied.

    Raises
    ------
    OSError
        EINVAL if the sizes differ; nothing is changed then.
    """
    with diff.open("rb") as source, base.open("r+b") as target:
        sizes = [os.fstat(file.fileno()).st_size for file in (target, source)]
        if sizes[0] != sizes[1]:
            raise OSError(EINVAL, f"a diff of {sizes[1]} bytes is not of a base of {sizes[0]}", str(diff))
        copied = 0
        for start, stop in extents(source.fileno()):
            _copy(source.fileno(), target.fileno(), start, stop)
            copied += stop - start
        os.fsync(target.fileno())
    return copied


def extents(fd: int) -> Iterator[tuple[int, int]]:
    """Find a file's data, by ``SEEK_DATA`` and ``SEEK_HOLE``; a file system without holes says that all is.

    Yields
    ------
    start, stop : int
        Offsets in bytes; between them is data, and the rest are holes.
    """
    size, at = os.fstat(fd).st_size, 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == ENXIO:  # no more data
                return
            raise
        at = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, at


# --- writing -----------------------------------------------------------------------------------------------

Put = Callable[[int, Source, dict[int, DirtyBitmap]], None]


def _write(source: Source, path: Path, put: Put) -> Written:
    ran, lent = source.running, dict[int, Pages]()
    source.pause()
    try:
        for slot in source.slots:
            lent[slot.id] = source.dirty(slot.id)
        pages = {slot_id: lease.bitmap for slot_id, lease in lent.items()}
        size = sum(slot.npages for slot in source.slots) * source.page_size
        with _replaced(path) as fd:
            os.truncate(fd, size)
            put(fd, source, pages)
            data = sum(stop - start for start, stop in extents(fd))
    except BaseException:
        for lease in lent.values():
            with contextlib.suppress(StaleLeaseError):
                lease.rollback()
        raise
    else:
        for lease in lent.values():
            lease.commit()
    finally:
        if ran:
            source.resume()
    whole = put is _put_all
    dirty = sum(slot.npages if whole else pages[slot.id].weight() for slot in source.slots)
    return Written(path, size, data, dirty)


def _put_all(fd: int, source: Source, _: dict[int, DirtyBitmap]) -> None:
    for at, memory in _placed(source):
        for start in range(0, memory.size, _CHUNK):
            part = memory[start : start + _CHUNK]
            if part.any():
                _put(fd, part, at + start)


def _put_dirty(fd: int, source: Source, pages: dict[int, DirtyBitmap]) -> None:
    dirty: list[tuple[int, int]] = []
    placed = list(_placed(source))
    for slot, (at, memory) in zip(source.slots, placed, strict=True):
        for start, length in pages[slot.id].ranges(unit=source.page_size).tolist():
            _put(fd, memory[start : start + length], at + start)
            dirty.append((at + start, at + start + length))
    # Holes come in whole blocks of the file system, which may be larger than a page. What else of such a block became
    # data would read as zeros, and would be laid over the base as such.
    for start, stop in _beyond(list(extents(fd)), dirty):
        for at, memory in placed:
            lo, hi = max(start, at), min(stop, at + memory.size)
            if lo < hi:
                _put(fd, memory[lo - at : hi - at], lo)


def _placed(source: Source) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Yield each slot's offset in the file with its bytes."""
    at = 0
    for slot in source.slots:
        memory = source.memory(slot.id)
        yield at, memory
        at += memory.size


def _beyond(data: list[tuple[int, int]], dirty: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield what is in `data` and not in `dirty`, both ascending ranges.

    Examples
    --------
    >>> list(_beyond([(0, 8), (16, 24)], [(2, 4), (4, 6), (16, 24)]))
    [(0, 2), (6, 8)]
    """
    i = 0
    for start, stop in data:
        at = start
        while i < len(dirty) and dirty[i][1] <= at:
            i += 1
        j = i
        while j < len(dirty) and dirty[j][0] < stop:
            if dirty[j][0] > at:
                yield at, dirty[j][0]
            at = max(at, dirty[j][1])
            j += 1
        if at < stop:
            yield at, stop


def _put(fd: int, part: NDArray[np.uint8], at: int) -> None:
    view, done = part.data, 0
    while done < view.nbytes:
        count = os.pwrite(fd, view[done : done + (_CHUNK << 6)], at + done)
        if not count:
            raise OSError(EIO, "nothing could be written")
        done += count


def _copy(source: int, target: int, start: int, stop: int) -> None:
    at = start
    while at < stop:
        chunk = os.pread(source, min(_CHUNK, stop - at), at)
        if not chunk:
            raise OSError(EIO, f"the diff ends at {at}, inside of its data")
        _put(target, np.frombuffer(chunk, dtype=np.uint8), at)
        at += len(chunk)


@contextmanager
def _replaced(path: Path) -> Iterator[int]:
    """Yield a new file, which takes the place of `path` when the block ends well."""
    name = ""
    try:
        fd, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # 0600: memory is its owner's
        try:
            yield fd
            os.fsync(fd)
        finally:
            os.close(fd)
        Path(name).replace(path)
    except BaseException as error:
        if name:
            Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename != str(path):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
