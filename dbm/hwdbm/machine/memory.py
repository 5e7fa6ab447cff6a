"""Guest memory: real bytes in a shared mapping, backed when they are first touched."""

import mmap
import os
from contextlib import suppress
from errno import EINVAL
from hashlib import sha256
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["GuestMemory"]

_CHUNK = 64 << 20  # bytes that are read, hashed or populated at once
_MADV_POPULATE_WRITE = 23  # Linux 5.14; the module mmap has no name for it


class _Hash(Protocol):
    def update(self, data: memoryview, /) -> None: ...


class GuestMemory:
    """The bytes behind a memslot.

    Parameters
    ----------
    size : int
        In bytes.
    name : str
        What the kernel shows the mapping as.

    Attributes
    ----------
    view : (size,) uint8 array
        The bytes themselves, writable.
    words : (size / 8,) uint64 array
        The same, as words.
    fd : int
        The memfd, for whoever maps the memory in another process. -1 where the system has none.

    Examples
    --------
    >>> memory = GuestMemory(1 << 40)  # nothing is backed until it is touched
    >>> memory.view[12345] = 7
    >>> int(memory.words[12345 // 8]) >> 8 * (12345 % 8)
    7
    >>> memory.close()
    """

    def __init__(self, size: int, name: str = "hwdbm") -> None:
        self.size = size
        self.fd = os.memfd_create(name) if hasattr(os, "memfd_create") else -1
        try:
            if self.fd >= 0:
                os.truncate(self.fd, size)
            self._map = mmap.mmap(self.fd, size)  # MAP_SHARED, and anonymous for -1
        except BaseException:
            self.close()
            raise
        self.view: NDArray[np.uint8] = np.frombuffer(self._map, dtype=np.uint8)
        self.words: NDArray[np.uint64] = self.view[: size // 8 * 8].view(np.uint64)

    def load(self, path: str | os.PathLike[str], offset: int = 0) -> int:
        """Read a file into the memory from its first byte on, holes left as they are. Return the file's bytes read.

        Parameters
        ----------
        path : path-like
            The file: a raw memory image.
        offset : int
            Where in the file to begin, in bytes.

        Raises
        ------
        OSError
            EINVAL if what there is doesn't fit, and whatever reading raises.
        """
        with Path(path).open("rb", buffering=0) as file:
            length = os.fstat(file.fileno()).st_size - offset
            if not 0 <= length <= self.size:
                raise OSError(EINVAL, f"{os.fspath(path)}: {length} bytes from {offset} on don't fit into {self.size}")
            raw, done = self.view.data, 0
            while done < length:
                done = _next_data(file.fileno(), offset + done, offset + length) - offset
                file.seek(offset + done)
                got = file.readinto(raw[done : min(done + _CHUNK, length)])
                if not got:
                    break
                done += got
        return length

    def populate(self) -> None:
        """Back all of it now, with huge pages where the system has them, rather than at each first touch."""
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a kernel without them
                self._map.madvise(mmap.MADV_HUGEPAGE)
        for start in range(0, self.size, _CHUNK):
            stop = min(start + _CHUNK, self.size)
            try:
                self._map.madvise(_MADV_POPULATE_WRITE, start, stop - start)
            except (OSError, ValueError):  # an older kernel: touching a byte of each page does the same
                self.view[start : stop : mmap.PAGESIZE] |= 0

    def hash_into(self, digest: _Hash) -> None:
        """Feed all bytes to a hash of `hashlib`."""
        raw = self.view.data
        for start in range(0, self.size, _CHUNK):
            digest.update(raw[start : start + _CHUNK])

    def digest(self) -> str:
        """Return the SHA-256 of all bytes, in hex."""
        digest = sha256()
        self.hash_into(digest)
        return digest.hexdigest()

    def close(self) -> None:
        """Let go of the memory. Views that others hold stay valid, and keep it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        self.__dict__.pop("view", None)
        self.__dict__.pop("words", None)
        self.__dict__.pop("_map", None)


def _next_data(fd: int, start: int, stop: int) -> int:
    """Return where the next bytes that are no hole begin, `stop` if there are none."""
    try:
        return min(os.lseek(fd, start, os.SEEK_DATA), stop)
    except OSError:  # ENXIO: a hole to the end; EINVAL: a file system that can't tell
        return start if start >= stop or not _is_hole(fd, start) else stop


def _is_hole(fd: int, start: int) -> bool:
    try:
        return os.lseek(fd, start, os.SEEK_HOLE) == start
    except OSError:
        return False
