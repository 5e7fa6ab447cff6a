"""Guest memory without a CPU: what a migration can arrive in and leave from, where nothing needs to run."""

import contextlib
import mmap
import os
import threading
from errno import EINVAL
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hwdbm.bitmap import DirtyBitmap
from hwdbm.dirtylog import Lease, Loans
from hwdbm.memslot import Memslot, slot_name
from hwdbm.vm.memorymap import MemoryMap
from hwdbm.vm.source import memory_digest

__all__ = ["PlainGuest"]

_MADV_HUGEPAGE = 14


class PlainGuest:
    r"""Slots of memory with a dirty log of their own, in which `write` marks what it writes.

    It is a `Source`: a migration can arrive in it, in memory or in a file, and leave from it.

    Parameters
    ----------
    layout : MemoryMap
        The slots.
    file : Path, optional
        The file that is the memory, slot after slot. It is made, or must have the size. Its room is allocated at once.

    Raises
    ------
    OSError
        ENOSPC if there is no room for the file, EINVAL if it is there and has another size.

    Examples
    --------
    >>> guest = PlainGuest(MemoryMap(4096, (Memslot(0, 0, 0x40000, 16, 0),)))
    >>> guest.start_log()
    >>> guest.write(0x4000_1FFE, b"\x01\x02\x03")
    >>> guest.dirty(0).bitmap.pages().tolist(), guest.memory(0)[0x1FFF:0x2002].tolist()
    ([1, 2], [2, 3, 0])
    """

    def __init__(self, layout: MemoryMap, file: Path | None = None) -> None:
        self.page_size, self.slots = layout.page_size, layout.slots
        self.layout = layout
        self.kind = "memory"
        self.running, self.throttled, self.logging = False, 0, False
        self._state = b""
        self._lock = threading.Lock()
        self._map = _mapped(layout.total, file)
        memory = np.frombuffer(self._map, dtype=np.uint8)
        self._memory, self._logs, at = {}, {}, 0
        for slot in layout.slots:
            size = slot.npages * layout.page_size
            self._memory[slot.id] = memory[at : at + size]
            self._logs[slot.id] = _Log(slot, self._lock)
            at += size

    def memory(self, slot_id: int) -> NDArray[np.uint8]:
        """Return the bytes of a slot."""
        return self._memory[slot_id]

    def write(self, gpa: int, data: bytes) -> None:
        """Write to memory inside of one slot, and mark the pages dirty.

        Raises
        ------
        OSError
            EFAULT's like: EINVAL, if it isn't inside of one slot.
        """
        for slot in self.slots:
            start = gpa - slot.base_gfn * self.page_size
            if 0 <= start and start + len(data) <= slot.npages * self.page_size:
                first, last = start // self.page_size, (start + max(len(data), 1) - 1) // self.page_size
                with self._lock:  # the write and its mark are one, seen from `dirty`
                    self._memory[slot.id][start : start + len(data)] = np.frombuffer(data, dtype=np.uint8)
                    if self.logging:
                        self._logs[slot.id].live.set_range(first, last - first + 1)
                return
        raise OSError(EINVAL, f"gpa {gpa:#x}..{gpa + len(data) - 1:#x} is not inside of one slot")

    def start_log(self) -> None:
        """Have writes recorded from now on."""
        self.logging = True

    def stop_log(self) -> None:
        """Stop recording; what was recorded is forgotten."""
        with self._lock:
            self.logging = False
            for log in self._logs.values():
                log.live.clear()
                log.generation += 1

    def dirty(self, slot_id: int) -> Lease:
        """Collect the dirty pages and clean them."""
        log = self._logs[slot_id]
        log.loans.take_back(log.put_back)
        with self._lock:
            lease = Lease(log, log.live.copy(), generation=log.generation)
            log.live.clear()
            return lease

    def pause(self) -> None:
        """Say that nothing runs."""
        self.running = False

    def resume(self) -> None:
        """Say that it would run."""
        self.running = True

    def throttle(self, percent: int) -> None:
        """Keep the number."""
        self.throttled = percent

    def mark_imported(self, slot_id: int, first_page: int, npages: int) -> None:
        """Mark pages dirty that a migration wrote, also while nothing logs."""
        with self._lock:
            self._logs[slot_id].live.set_range(first_page, npages)

    def state(self) -> bytes:
        """Return what `set_state` was given, empty at first."""
        return self._state

    def set_state(self, state: bytes) -> None:
        """Keep a state."""
        self._state = state

    def digest(self) -> str:
        """Return the SHA-256 of all memory."""
        return memory_digest(self)

    def close(self) -> None:
        """Give the memory back; views that others hold keep theirs."""
        self._memory.clear()


class _Log:
    """The bitmap of one slot, and where its leases are given back."""

    def __init__(self, slot: Memslot, lock: threading.Lock) -> None:
        self.name, self.generation = slot_name(slot.id), 0
        self.live, self.loans = DirtyBitmap(slot.npages), Loans()
        self._lock = lock

    def put_back(self, pages: DirtyBitmap, first_page: int, generation: int) -> bool:
        with self._lock:
            if generation != self.generation:
                return False
            if pages.npages:
                self.live.words[first_page >> 6 :] |= pages.words
            return True


def _mapped(size: int, file: Path | None) -> mmap.mmap:
    if file is None:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(_MADV_HUGEPAGE)
        return memory
    fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        _check_size(fd, size)
        os.posix_fallocate(fd, 0, size)
        return mmap.mmap(fd, size)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from error
    finally:
        os.close(fd)


def _check_size(fd: int, size: int) -> None:
    old = os.fstat(fd).st_size
    if old not in (0, size):
        raise OSError(EINVAL, f"the file has {old} bytes, and the guest {size}")
