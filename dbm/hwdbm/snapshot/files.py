"""Snapshots: guest memory in files, whole or only what was dirtied since the last one.

The form is Firecracker's. A file has the size of all memory, slot after slot. A full one holds every byte; a
differential one only the dirty pages, each at its offset, and holes elsewhere. Laid over its base (`rebase`), oldest
first, it gives the memory of its moment. A page that is dirty and zero is data, since a hole means "as it was".
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from errno import EEXIST, EINVAL, EIO, ENOENT, ENXIO
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hwdbm import check
from hwdbm.bitmap import DirtyBitmap
from hwdbm.check import instance
from hwdbm.errors import StaleLeaseError
from hwdbm.files import NewFile, naming, open_regular
from hwdbm.snapshot.pages import put
from hwdbm.vm.source import Pages, Source

_CHUNK = 1 << 20  # bytes, a multiple of every page


@dataclass(frozen=True, slots=True)
class Written:
    """The contents of a snapshot.

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
        The contents of the file.

    Raises
    ------
    OSError
        If it can't be written. The file is what it was, and so is the dirty log.
    """
    instance(source, Source, "source")
    path = check.path(path, "path")
    if not all(slot.logging for slot in source.slots):
        source.start_log()
    return _write(source, path, _put_all)


def write_diff(source: Source, path: Path) -> Written:
    """Write what was dirtied since the last snapshot to a sparse file.

    Parameters, result and errors are those of `write_full`. The source must be logging. After a failure the next
    differential snapshot has what this one would have had: every bit is put back. A file that is there already may be
    the base, or another link of the chain: it isn't replaced, and the error is EEXIST. Without a log it is ENOENT.
    """
    instance(source, Source, "source")
    path = check.path(path, "path")
    if path.is_symlink() or path.exists():
        raise OSError(EEXIST, "a diff replaces no file, which could be what it is a diff of", str(path))
    if not all(slot.logging for slot in source.slots):
        raise OSError(ENOENT, "the log isn't on: begin with a full snapshot", str(path))
    return _write(source, path, _put_dirty)


def rebase(base: Path, diff: Path) -> int:
    """Lay a differential snapshot over its base, as Firecracker's ``snapshot-editor edit-memory rebase`` does.

    Several are laid in the order in which they were made. The base is written anew and renamed: should it fail
    half-way, or be killed, the base is what it was. It then has the time of the diff.

    Parameters
    ----------
    base : Path
        The file that is replaced.
    diff : Path
        The sparse file.

    Returns
    -------
    int
        Bytes copied.

    Raises
    ------
    OSError
        EINVAL for what can't be trusted, and nothing is changed then: files of different sizes, the same file twice, a
        symbolic link, a diff that is older than the base that it would change, and one without holes, where nothing
        tells what was dirty from what a copy filled with zeros.
    """
    (copied,) = rebase_all(base, [diff])
    return copied


def rebase_all(base: Path, diffs: Sequence[Path]) -> list[int]:
    """Lay several differential snapshots over their base, the oldest first; all of them, or none.

    Parameters, result and errors are those of `rebase`, with a number of bytes for each diff.
    """
    base, diffs = check.path(base, "base"), [check.path(diff, "diff") for diff in diffs]
    with ExitStack() as stack:
        files = [stack.enter_context(open_regular(_no_link(path))) for path in (base, *diffs)]
        size = _check_chain((base, *diffs), [os.fstat(file.fileno()) for file in files])
        for path, file in zip(diffs, files[1:], strict=True):
            if list(extents(file.fileno())) == [(0, size)]:
                raise _untrusted(path, "it has no holes: was it copied by something that fills them with zeros?")
        new = stack.enter_context(NewFile(base))
        copied = []
        with naming(base):
            os.truncate(new.fd, size)
            for path, file in zip((base, *diffs), files, strict=True):
                with naming(path):
                    found = list(extents(file.fileno()))
                for start, stop in found:
                    _copy(file.fileno(), path, new.fd, start, stop)
                copied.append(sum(stop - start for start, stop in found))
            # Its place in the order, for the next one.
            os.utime(new.fd, ns=(os.fstat(new.fd).st_atime_ns, os.fstat(files[-1].fileno()).st_mtime_ns))
    return copied[1:]


def _no_link(path: Path) -> Path:
    if path.is_symlink():
        raise _untrusted(path, "it is a symbolic link: name the file itself")
    return path


def _check_chain(paths: Sequence[Path], stats: Sequence[os.stat_result]) -> int:
    """Return the size of a base and of the diffs that were made after it, or raise if they can't be that."""
    size = stats[0].st_size
    seen: dict[tuple[int, int], Path] = {}
    for path, found in zip(paths, stats, strict=True):
        if found.st_size != size:
            raise _untrusted(path, f"a diff of {found.st_size} bytes is not of a base of {size}")
        key = found.st_dev, found.st_ino
        if key in seen:
            raise _untrusted(path, f"it is the same file as {seen[key]}")
        seen[key] = path
    for (earlier, before), (later, after) in pairwise(zip(paths, stats, strict=True)):
        if after.st_mtime_ns < before.st_mtime_ns:
            raise _untrusted(later, f"it is older than {earlier}, and would undo what came after it")
    return size


def _untrusted(path: Path, why: str) -> OSError:
    return OSError(EINVAL, why, str(path))


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


def _write(source: Source, path: Path, put_memory: Put) -> Written:
    ran, lent = source.running, dict[int, Pages]()
    source.pause()
    try:
        with NewFile(path) as file:
            try:
                for slot in source.slots:
                    lent[slot.id] = source.dirty(slot.id)
                pages = {slot_id: lease.bitmap for slot_id, lease in lent.items()}
                size = sum(slot.npages for slot in source.slots) * source.page_size
                with naming(path):
                    os.truncate(file.fd, size)
                    put_memory(file.fd, source, pages)
                    data = sum(stop - start for start, stop in extents(file.fd))
                file.commit()
            except BaseException:
                for lease in lent.values():
                    with contextlib.suppress(StaleLeaseError):
                        lease.rollback()
                raise
            for lease in lent.values():
                lease.commit()
    finally:
        if ran:
            source.resume()
    whole = put_memory is _put_all
    dirty = sum(slot.npages if whole else pages[slot.id].weight() for slot in source.slots)
    return Written(path, size, data, dirty)


def _put_all(fd: int, source: Source, _: dict[int, DirtyBitmap]) -> None:
    for at, memory in _placed(source):
        for start in range(0, memory.size, _CHUNK):
            part = memory[start : start + _CHUNK]
            if part.any():
                put(fd, part.data, at + start)


def _put_dirty(fd: int, source: Source, pages: dict[int, DirtyBitmap]) -> None:
    dirty: list[tuple[int, int]] = []
    placed = list(_placed(source))
    for slot, (at, memory) in zip(source.slots, placed, strict=True):
        for start, length in pages[slot.id].ranges(unit=source.page_size).tolist():
            put(fd, memory[start : start + length].data, at + start)
            dirty.append((at + start, at + start + length))
    # Holes come in whole blocks of the file system, which may be larger than a page. What else of such a block became
    # data would read as zeros, and would be laid over the base as such.
    for start, stop in _beyond(list(extents(fd)), dirty):
        for at, memory in placed:
            lo, hi = max(start, at), min(stop, at + memory.size)
            if lo < hi:
                put(fd, memory[lo - at : hi - at].data, lo)


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


def _copy(source: int, path: Path, target: int, start: int, stop: int) -> None:
    at = start
    while at < stop:
        with naming(path):
            chunk = os.pread(source, min(_CHUNK, stop - at), at)
            if not chunk:
                raise OSError(EIO, f"it ends at {at}, inside of its data")
        put(target, memoryview(chunk), at)
        at += len(chunk)
