"""Guest memory: real bytes in a mapping, backed when they are first touched, or all at once before they are needed."""

import ctypes
import hashlib
import mmap
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from errno import EINVAL, EIO, ENOMEM
from functools import cache
from typing import Never

import numpy as np
from numpy.typing import NDArray

from hwdbm import check
from hwdbm.errors import ClosedError, shown
from hwdbm.files import open_regular

_STEP = 64 << 20  # bytes that one call reads, hashes or populates, so that a signal is served in between
_MAPPED = ("view", "words", "_map")
_MOST_NAME = 200  # bytes: memfd_create takes 249
_MADV_HUGEPAGE = 14
_MADV_POPULATE_WRITE = 23  # Linux 5.14

Memory = NDArray[np.uint8]


class GuestMemory:
    """The bytes behind memslots.

    Parameters
    ----------
    size : int
        In bytes.
    name : str
        The name that the kernel shows the mapping by.
    fd : int, optional
        A file of that size, which becomes the memory; it stays the caller's. By default a memfd.
    private : bool
        Whether the memory is this process's alone: anonymous, with huge pages where the system has them.

    Attributes
    ----------
    view : (size,) uint8 array
        The bytes themselves, writable.
    words : (size / 8,) uint64 array
        The same, as words.
    fd : int
        The memfd, for mapping the memory in another process; -1 if there is none.

    Raises
    ------
    OSError
        ENOMEM or what else the system says where it can't be had, EINVAL for a file that is shorter.
    ValueError
        For a size below 1, or a name that the kernel doesn't take.

    Examples
    --------
    >>> memory = GuestMemory(1 << 40)  # nothing is backed until it is touched
    >>> memory.view[12345] = 7
    >>> int(memory.words[12345 // 8]) >> 8 * (12345 % 8)
    7
    >>> memory.close()
    """

    fd = -1

    def __init__(self, size: int, name: str = "hwdbm", *, fd: int | None = None, private: bool = False) -> None:
        self.size, self.fd = check.integer(size, "size", 1), -1
        check.instance(name, str, "name")
        if not name.isprintable() or len(name.encode()) > _MOST_NAME:
            raise ValueError(f"a name is printable, of {_MOST_NAME} bytes at most, unlike {shown(name)}")
        fd = None if fd is None else check.integer(fd, "fd", 0, (1 << 31) - 1)
        private = check.flag(private, "private")
        try:
            self._map = self._mapped(name, fd, private=private)
        except (OSError, OverflowError) as error:  # the latter beyond what addresses reach
            self.close()
            code = error.errno if isinstance(error, OSError) and error.errno else ENOMEM
            raise OSError(code, f"{self.size:#x} bytes of guest memory: {os.strerror(code)}") from None
        except BaseException:
            self.close()
            raise
        self.view: Memory = np.frombuffer(self._map, dtype=np.uint8)
        self.words: NDArray[np.uint64] = self.view[: self.size // 8 * 8].view(np.uint64)

    def _mapped(self, name: str, fd: int | None, *, private: bool) -> mmap.mmap:
        if private:
            made = mmap.mmap(-1, self.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            _madvise(np.frombuffer(made, dtype=np.uint8), _MADV_HUGEPAGE)
            return made
        if fd is None:
            self.fd = fd = os.memfd_create(name)
            os.truncate(fd, self.size)
        elif os.fstat(fd).st_size < self.size:
            raise OSError(EINVAL, "a file that is shorter")
        return mmap.mmap(fd, self.size)

    def load(self, path: str | os.PathLike[str], offset: int = 0) -> int:
        """Read a file into the memory; see `load`."""
        return load(self.view, path, offset)

    def populate(self) -> None:
        """Back all of it now, rather than at each first touch; see `populate`."""
        populate(self.view)

    def digest(self) -> str:
        """Return the SHA-256 of all bytes, in hexadecimal."""
        return digest([self.view])

    def sync(self) -> None:
        """Write what is in a file's pages to the file."""
        self._map.flush()

    def close(self) -> None:
        """Let go of the memory. Views that others hold stay valid, and keep it."""
        fd, self.fd = self.fd, -1  # first: after an interrupt in between the number may be another file's
        if fd >= 0:
            os.close(fd)
        for name in _MAPPED:
            self.__dict__.pop(name, None)

    def __del__(self) -> None:
        # An interrupt may come before anybody has it to close.
        if self.fd >= 0:
            self.close()

    def __getattr__(self, name: str) -> Never:
        if name in _MAPPED:
            raise ClosedError("the guest memory is closed")
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")


def load(memory: Memory, path: str | os.PathLike[str], offset: int = 0) -> int:
    """Read a raw memory image into memory from its first byte on, holes left as they are.

    Parameters
    ----------
    memory : (n,) uint8 array
        Contiguous and writable.
    path : path-like
        The file.
    offset : int
        Where in the file to begin, in bytes.

    Returns
    -------
    int
        Bytes of the file, holes among them, that are in the memory now.

    Raises
    ------
    OSError
        EINVAL if the file's bytes don't fit, or it is a pipe or a terminal; EIO if it gets shorter meanwhile; and what
        else reading raises.
    """
    offset, raw, done = check.integer(offset, "offset", high=(1 << 63) - 1), _bytes(memory).data, 0
    path = check.path(path, "path")
    with open_regular(path) as file:
        fd = file.fileno()
        length = os.lseek(fd, 0, os.SEEK_END) - offset
        if not 0 <= length <= memory.size:
            where = f" from {offset} on" if offset else ""
            raise OSError(EINVAL, f"{length} bytes{where} don't fit into {memory.size}", os.fspath(path))
        while (done := _next_data(fd, offset + done, offset + length) - offset) < length:
            got = os.preadv(fd, [raw[done : min(done + _STEP, length)]], offset + done)
            if not got:
                raise OSError(EIO, f"it ends at byte {offset + done}, and had {offset + length}", os.fspath(path))
            done += got
    return length


def _bytes(memory: Memory) -> Memory:
    check.array(memory, np.uint8, "memory")
    if memory.ndim != 1 or not memory.flags.c_contiguous or not memory.flags.writeable:
        raise ValueError(f"memory is contiguous and writable, unlike one of shape {memory.shape} and its flags")
    return memory


def populate(memory: Memory) -> None:
    """Have the system back memory with pages now, huge ones where it has them; no byte changes.

    Parameters
    ----------
    memory : (n,) uint8 array
        C-contiguous and writable. No other thread writes to it meanwhile.

    Raises
    ------
    OSError
        ENOMEM, EFAULT or ENOSPC, if there isn't that much memory, or room in the file behind it.
    """
    _bytes(memory)
    start = -memory.ctypes.data % mmap.PAGESIZE
    stop = memory.size - (memory.ctypes.data + memory.size) % mmap.PAGESIZE
    if start >= stop:
        return
    pages = memory[start:stop]
    _madvise(pages, _MADV_HUGEPAGE)  # advice: that it can't be had is no failure

    def back(part: Memory) -> None:
        code = _madvise(part, _MADV_POPULATE_WRITE)
        if code == EINVAL:  # an older kernel: touching a byte of each page does the same
            part[:: mmap.PAGESIZE] |= 0
        elif code:
            raise OSError(code, f"no room for {part.size} bytes of guest memory: {os.strerror(code)}")

    if pages.size <= _STEP:
        back(pages)
        return
    # Two threads clear pages in little more than half the time of one.
    with ThreadPoolExecutor(2) as pool:
        try:
            for _ in pool.map(back, _parts(pages)):
                pass
        except BaseException:  # one that failed, or an interrupt: the rest isn't waited for
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def digest(parts: Iterable[Memory]) -> str:
    """Return the SHA-256 of the bytes of some arrays, one after another, in hexadecimal."""
    found = hashlib.sha256()
    for part in parts:
        for step in _parts(part):
            found.update(step.data)
    return found.hexdigest()


def _parts(memory: Memory) -> Iterator[Memory]:
    return (memory[start : start + _STEP] for start in range(0, memory.size, _STEP))


def _madvise(memory: Memory, advice: int) -> int:
    """Return the errno, 0 where all is well."""
    if _libc().madvise(ctypes.c_void_p(memory.ctypes.data), ctypes.c_size_t(memory.size), advice) == 0:
        return 0
    return ctypes.get_errno()


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _next_data(fd: int, start: int, stop: int) -> int:
    """Return where the next bytes that are no hole begin, `stop` if there are none."""
    try:
        return min(os.lseek(fd, start, os.SEEK_DATA), stop)
    except OSError:  # ENXIO: a hole to the end; EINVAL: a file system that can't tell
        return stop if _is_hole(fd, start) else start


def _is_hole(fd: int, start: int) -> bool:
    with suppress(OSError):
        return os.lseek(fd, start, os.SEEK_HOLE) == start
    return False
