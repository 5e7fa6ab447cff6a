"""Guest memory without a CPU: what a migration can arrive in and leave from, where nothing needs to run."""

import os
from dataclasses import replace

from hwdbm.files import NewFile
from hwdbm.memslot import KVM_MEM_LOG_DIRTY_PAGES
from hwdbm.vm.base import LoggedVm, SlotPages, percentage
from hwdbm.vm.memory import GuestMemory
from hwdbm.vm.memorymap import MemoryMap


class PlainGuest(LoggedVm):
    r"""Slots of memory with a dirty log of their own, in which `write` marks what it writes.

    It is a `Source`: a migration can arrive in it, in memory or in a file, and leave from it.

    Parameters
    ----------
    memory_map : MemoryMap
        The slots.
    file : path-like, optional
        Where the memory is to be a file: the slots' bytes in the order of their addresses, so that its SHA-256 is
        `digest`. It is a new one, of mode 0600, that takes its place by `commit`; what is there stays until then, and
        nothing is left if the guest is closed before. Its room is allocated at once.

    Attributes
    ----------
    kind : str
        The kind of VM, which must match in a migration; that of the source once a migration has arrived.
    running : bool
        Whether `resume` was called after the last `pause`.
    throttled : int
        The percentage that `throttle` was given.

    Raises
    ------
    OSError
        ENOSPC if there is no room for the file, EISDIR or EINVAL if what is in its place is no file.

    Examples
    --------
    >>> from hwdbm.memslot import Memslot
    >>> guest = PlainGuest(MemoryMap(4096, (Memslot(0, 0, 0x40000, 16, 0),)))
    >>> guest.start_log()
    >>> guest.write(0x4000_1FFE, b"\x01\x02\x03")
    >>> with guest.dirty(0) as lease:
    ...     lease.bitmap.pages().tolist(), guest.memory(0)[0x1FFF:0x2002].tolist()
    ([1, 2], [2, 3, 0])
    """

    def __init__(self, memory_map: MemoryMap, file: str | os.PathLike[str] | None = None) -> None:
        if not isinstance(memory_map, MemoryMap):
            raise TypeError(f"a PlainGuest is made of a MemoryMap, not of {type(memory_map).__name__}")
        super().__init__(memory_map.page_size)
        self.kind = "memory"
        self.running, self.throttled = False, 0
        self._state = b""
        self._file = None if file is None else NewFile(file)
        try:
            self._whole = _memory(memory_map.total, self._file)
        except BaseException:
            self.close()
            raise
        at, parts = 0, {}
        for slot in memory_map.by_address:
            size = slot.npages * memory_map.page_size
            parts[slot.id] = self._whole.view[at : at + size]
            at += size
        for slot in memory_map.slots:
            plain = replace(slot, flags=slot.flags & ~KVM_MEM_LOG_DIRTY_PAGES)
            self._add_slot(SlotPages(plain, self._lock), parts[slot.id])

    def __repr__(self) -> str:
        size = sum(memory.size for memory in self._memory.values())
        return f"<PlainGuest: {len(self._pages)} slots, {size} bytes>"

    @property
    def logging(self) -> bool:
        """Whether writes are recorded."""
        return any(pages.slot.logging for pages in self._pages.values())

    def commit(self) -> None:
        """Put the file in its place: the memory is complete. Later writes go to the file, too.

        Raises
        ------
        OSError
            The system's. What was in the place is there still.
        ValueError
            If it was committed before.
        """
        self._check_open()
        if self._file is not None:
            self._whole.sync()
            self._file.commit()

    def pause(self) -> None:
        """Say that nothing runs."""
        self._check_open()
        self.running = False

    def resume(self) -> None:
        """Say that it would run."""
        self._check_open()
        self.running = True

    def throttle(self, percent: int) -> None:
        """Keep the number, 0 to 99."""
        self._check_open()
        self.throttled = percentage(percent)

    def state(self) -> bytes:
        """Return what `set_state` was given, empty at first."""
        self._check_open()
        return self._state

    def set_state(self, state: bytes) -> None:
        """Keep a state."""
        self._check_open()
        if not isinstance(state, bytes | bytearray | memoryview):
            raise TypeError(f"a state is bytes, not {type(state).__name__}")
        self._state = bytes(state)

    def _switch(self, *, on: bool) -> None:
        for pages in self._pages.values():
            if pages.slot.logging != on:
                pages.slot = replace(pages.slot, flags=pages.slot.flags ^ KVM_MEM_LOG_DIRTY_PAGES)
                if not on:
                    pages.forget()

    def _release(self) -> None:
        self.running = False
        super()._release()
        if hasattr(self, "_whole"):
            self._whole.close()
        if self._file is not None:
            self._file.close()


def _memory(size: int, file: NewFile | None) -> GuestMemory:
    if file is None:
        return GuestMemory(size, private=True)
    try:
        os.posix_fallocate(file.fd, 0, size)
        return GuestMemory(size, fd=file.fd)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file.path)) from error
