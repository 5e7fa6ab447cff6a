"""The base of every VM: memory by slot and by address, one process, an end; and the log of VMs without a `DirtyLog`."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from errno import ENOENT, ETIMEDOUT
from threading import RLock
from time import monotonic, sleep
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from hwdbm import check
from hwdbm.bitmap import DirtyBitmap
from hwdbm.dirtylog import ClientLease, Lease, Loans, LogClient
from hwdbm.dirtylog.client import Clients, Epoch, Feed, Feeds
from hwdbm.errors import BitmapError, ClosedError
from hwdbm.memslot import Memslot, slot_name
from hwdbm.vm.memory import digest
from hwdbm.vm.memorymap import MemoryMap
from hwdbm.vm.runner import uninterrupted

_PROOF = 10.0  # seconds that a guest has to write something
_LOOK = 0.02  # seconds between two looks at whether it has


class SlotPages:
    """A slot's dirty pages as this side of a VM knows them, and where its leases are given back.

    Those that a kernel knows beside them are brought by `_collect`: once, for all clients of the slot.

    Parameters
    ----------
    slot : Memslot
        The slot.
    lock : RLock
        One for all of a VM's.

    Attributes
    ----------
    slot : Memslot
        The slot as it is.
    generation : int
        Another one when the log was switched off since.
    feeds : Feeds
        The clients beside the default one.
    """

    def __init__(self, slot: Memslot, lock: AbstractContextManager[Any]) -> None:
        self.slot, self.name, self.generation = slot, slot_name(slot.id), 0
        self.loans, self.feeds = Loans(), Feeds()
        self._lock = lock
        self._known = DirtyBitmap(slot.npages)  # the default client's
        self._any = False  # whether any page is known: to look at them takes as long as a kernel's log does
        self._taking = False  # whether bits may be on their way from a log into a lease or the clients' bitmaps

    def mark(self, first_page: int, npages: int) -> None:
        """Mark pages dirty."""
        with self._lock:
            self._sink().set_range(first_page, npages)

    def _sink(self) -> DirtyBitmap:
        """Return where pages are to be marked; the lock is held."""
        self._any = True  # first: what is marked must be looked at, also where an interrupt comes in between
        return self.feeds.sink(self._known)

    def put_back(self, pages: DirtyBitmap, first_page: int, generation: int) -> bool:
        """Mark a lease's pages dirty, unless the log was switched off since."""
        with self._lock:
            if generation != self.generation:
                return False
            if pages.npages:
                self._any = True
                self._known.words[first_page >> 6 :] |= pages.words
            return True

    def give_back(self, epoch: Epoch, pages: DirtyBitmap, first_page: int, generation: int) -> bool:
        """Mark a client's lease's pages dirty for it, unless its epoch was broken off since."""
        with self._lock:
            return epoch.feed.give_back(epoch, pages, first_page, generation)

    def forget(self) -> None:
        """Mark no page dirty: the log was switched off."""
        with self._lock:
            self.feeds.break_off("the slot's log was switched off")
            self.generation += 1
            self._known.clear()
            self._any = self._taking = False

    def join(self, client: LogClient, broken: str = "") -> Feed:
        """Feed a client from now on: what was written before is dirty for the others, and not for it.

        Raises
        ------
        OSError
            ENOENT if the slot doesn't log.
        """
        with self._lock:
            self._harvest()
            feed = Feed(self, client.name, self.slot.npages, broken)
            self.feeds.join(feed)
            return feed

    def lend(self, feed: Feed | None = None) -> Lease:
        """Lend the dirty pages of a client: they are clean now, and are recorded when they are written again.

        Raises
        ------
        OSError
            ENOENT if the slot doesn't log.
        """
        with self._lock:
            pages = self._harvest(feed is None and not self.feeds)
            loans = self.loans if feed is None else feed.loans
            loans.take_back()
            if feed is not None:
                lease: Lease = ClientLease(Epoch(feed), pages)
                np.copyto(pages.words, feed.bitmap.words)
                feed.bitmap.clear()
                feed.broken = ""  # it has all pages now; a rollback restores it
                return lease
            lease = Lease(self, pages, generation=self.generation)
            if self._any:
                np.bitwise_or(pages.words, self._known.words, out=pages.words)
                self._known.clear()
                self._any = False
            self._taking = False
            return lease

    def _harvest(self, alone: bool = False) -> DirtyBitmap:
        """Collect what is dirty, and pour it into the bitmaps of all clients, unless the default one is alone.

        The lock is held. Alone, it is returned what was collected, and the lease is made while `_taking` says so.
        """
        if not self.slot.logging:
            raise OSError(ENOENT, f"{self.name} doesn't log")
        if self._taking:  # an interrupt came when bits were in no log: any page may be dirty
            self._sink().set_range(0, self.slot.npages)
        self._taking = True
        pages = DirtyBitmap(self.slot.npages)
        try:
            self._collect(pages.words)
        except OSError:
            self._taking = False
            raise
        if not alone:
            sink = self._sink().words
            np.bitwise_or(sink, pages.words, out=sink)
            self._taking = False
            pages = DirtyBitmap(self.slot.npages)
        self.feeds.pour(self._known, 0, self.slot.npages)
        return pages

    def _collect(self, words: NDArray[np.uint64]) -> None:
        """Move what a kernel's log has to `words`, which are zero. An error means that nothing was moved."""


class BaseVm:
    """A VM with slots of memory, by id and by address, of one process, until it is closed.

    A subclass has `slots`, `_write` and `_release`, calls `_add_memory`, and `_check_open` first in its own verbs.

    Attributes
    ----------
    page_size : int
        Bytes of a page.
    """

    page_size: int
    _closed = True  # until it is made
    _running = False  # whether vCPUs may write

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self._owner, self._closed = os.getpid(), False
        self._memory: dict[int, NDArray[np.uint8]] = {}
        self._map: MemoryMap | None = None  # made when it is asked for, since slots are added one by one

    def _add_memory(self, slot_id: int, memory: NDArray[np.uint8]) -> None:
        self._memory[slot_id], self._map = memory, None

    # --- memory --------------------------------------------------------------------------------------------

    @property
    def slots(self) -> tuple[Memslot, ...]:
        """The memslots."""
        raise NotImplementedError

    def memory(self, slot_id: int) -> NDArray[np.uint8]:
        """Return the bytes of a slot, ``(npages * page_size,)``: a writable view.

        Writes through it are not logged; those of `write` are.

        Raises
        ------
        OSError
            ENOENT if there is no such slot.
        """
        self._check_open()
        memory = self._memory.get(check.integer(slot_id, "slot", None))
        if memory is None:
            raise OSError(ENOENT, f"there is no {slot_name(slot_id)}")
        return memory

    def read(self, gpa: int, length: int) -> bytes:
        """Return bytes of memory, as a device or the VMM reads them.

        Raises
        ------
        OSError
            EINVAL if they aren't inside of one slot; a VM may say that a run can go on in the next.
        """
        self._check_open()
        parts = self._parts(check.integer(gpa, "gpa", None), check.integer(length, "length"))
        return b"".join(self._memory[slot.id][start : start + count].tobytes() for slot, start, count in parts)

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Write to memory as a device or the VMM does, and mark the pages dirty where the slot logs.

        Raises
        ------
        OSError
            EINVAL if it isn't inside of one slot. Nothing is written then.
        TypeError
            If `data` isn't bytes.
        """
        self._check_open()
        raw, done = np.asarray(check.octets(data, "data")), 0
        parts = self._parts(check.integer(gpa, "gpa", None), raw.size)
        if len(parts) > 1 and any(np.may_share_memory(raw, self._memory[slot.id]) for slot, *_ in parts):
            raw = raw.copy()  # a part that is written might be the next one's data
        for slot, start, count in parts:
            if count:
                first, stop = start // self.page_size, (start + count - 1) // self.page_size + 1
                self._write(slot.id, start, raw[done : done + count], first, stop - first)
            done += count

    @property
    def _memory_map(self) -> MemoryMap:
        if self._map is None:
            self._map = MemoryMap(self.page_size, self.slots)
        return self._map

    def _parts(self, gpa: int, length: int) -> list[tuple[Memslot, int, int]]:
        """Return the parts of a run of bytes: the slot, where in it the part begins, and its length."""
        slot, start = self._memory_map.at(gpa, length)
        return [(slot, start, length)]

    def _write(self, slot_id: int, start: int, raw: NDArray[np.uint8], first_page: int, npages: int) -> None:
        """Write to a slot from a byte of it on, and mark the pages that this touches."""
        raise NotImplementedError

    def digest(self) -> str:
        """Return the SHA-256 of the bytes of all slots, in the order of their addresses, in hexadecimal."""
        self._check_open()
        return digest(self._memory[slot.id] for slot in sorted(self.slots, key=lambda slot: slot.base_gfn))

    # --- the end -------------------------------------------------------------------------------------------

    def _check_paused(self) -> None:
        self._check_open()
        if self._running:
            raise RuntimeError("the vCPUs are running")

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"the {type(self).__name__} is closed")
        if os.getpid() != self._owner:
            raise ClosedError(f"the {type(self).__name__} is of process {self._owner}, which this one was forked from")

    def close(self) -> None:
        """Give everything back; a second time does nothing. Views of the memory that others hold stay valid.

        An interrupt meanwhile is raised when that is done. In a process forked off since, only the copies are given
        back that the child has of files and mappings.
        """
        self._closed = True
        if os.getpid() == self._owner:
            uninterrupted(self._release)
        else:
            self._let_go()

    def _release(self) -> None:
        """Give back what there is, which may have been done in part before."""
        self._memory.clear()

    def _let_go(self) -> None:
        """Give back what a forked process has copies of."""
        self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class LoggedVm(BaseVm):
    """A VM of which `SlotPages` know the dirty pages; a subclass has `_switch`, too, and calls `_add_slot`."""

    def __init__(self, page_size: int) -> None:
        super().__init__(page_size)
        self._lock = RLock()  # of the log, and of writes with their marks
        self._clients = Clients()
        self._pages: dict[int, SlotPages] = {}

    def _add_slot(self, pages: SlotPages, memory: NDArray[np.uint8]) -> None:
        self._pages[pages.slot.id] = pages
        self._add_memory(pages.slot.id, memory)

    @property
    def slots(self) -> tuple[Memslot, ...]:
        """The memslots."""
        self._check_open()
        return tuple(pages.slot for pages in self._pages.values())

    def _slot(self, slot_id: int) -> SlotPages:
        self._check_open()
        pages = self._pages.get(check.integer(slot_id, "slot", None))
        if pages is None:
            raise OSError(ENOENT, f"there is no {slot_name(slot_id)}")
        return pages

    def _write(self, slot_id: int, start: int, raw: NDArray[np.uint8], first_page: int, npages: int) -> None:
        pages = self._pages[slot_id]
        with self._lock:  # the write and its mark are one, seen from `dirty`
            if pages.slot.logging:
                pages.mark(first_page, npages)
            self._memory[slot_id][start : start + raw.size] = raw

    # --- the log -------------------------------------------------------------------------------------------

    def start_log(self) -> None:
        """Have writes to all slots recorded from now on. What was marked before is dirty still."""
        self._check_open()
        with self._lock:
            self._switch(on=True)

    def stop_log(self) -> None:
        """Stop recording; what was recorded is forgotten, and leases of it are stale.

        The epochs of clients are broken: the next take of each, when the log is on again, says so.
        """
        self._check_open()
        with self._lock:
            self._switch(on=False)

    def dirty(self, slot_id: int) -> Lease:
        """Lend a slot's dirty pages: they are clean then, and are recorded when they are written again.

        This is the default client. Others (`client`) see what it takes all the same.

        Returns
        -------
        Lease
            ``commit()`` when its ``bitmap`` was copied, ``rollback()`` when that failed.

        Raises
        ------
        OSError
            ENOENT if there is no such slot or it doesn't log; what a vCPU failed with.
        """
        pages = self._slot(slot_id)
        self._check_log()
        return pages.lend()

    def client(self, name: str) -> LogClient:
        """Return a new consumer of the log, which has been started, with a bitmap and an epoch a slot of its own.

        What was written before is dirty for the clients that there were, `dirty` among them, and not for the new one.

        Parameters
        ----------
        name : str
            Its name.

        Returns
        -------
        LogClient
            Its ``take(slot)`` lends the pages written in its epoch, which the lease's ``commit()`` ends.

        Raises
        ------
        OSError
            EBUSY if there is a client of this name, ENOENT if the log isn't on; what a vCPU failed with.
        TypeError, ValueError
            If the name is no text, or empty.

        Examples
        --------
        >>> from hwdbm.vm import PlainGuest
        >>> guest = PlainGuest(MemoryMap(4096, (Memslot(0, 0, 0x40000, 16, 0),)))
        >>> guest.start_log()
        >>> with guest.client("backup") as backup, guest.client("statistics") as statistics:
        ...     guest.write(0x4000_3000, b"a")
        ...     for client in (backup, statistics):
        ...         with client.take(0) as lease:
        ...             print(lease.bitmap.pages())
        [3]
        [3]
        """
        self._check_open()
        self._check_log()
        off = [pages.name for pages in self._pages.values() if not pages.slot.logging]
        if off:
            raise OSError(ENOENT, f"a client {name!r}: {off[0]} doesn't log; start_log comes first")
        client = self._clients.add(name, self._take)
        try:
            with self._lock:
                for slot_id, pages in self._pages.items():
                    client.feeds[slot_id] = pages.join(client)
        except BaseException:
            client.close()
            raise
        return client

    def mark_imported(self, slot_id: int, first_page: int, npages: int) -> None:
        """Mark pages, counted from the slot's first, that a migration wrote: they are dirty, in a log to come too.

        Raises
        ------
        OSError
            ENOENT if there is no such slot.
        BitmapError
            If the slot hasn't these pages.
        """
        pages = self._slot(slot_id)
        first, count = check.integer(first_page, "first_page", None), check.integer(npages, "npages", None)
        if not 0 <= first <= first + count <= pages.slot.npages:
            raise BitmapError(f"pages {first}..{first + count - 1} are not inside {pages.name}'s {pages.slot.npages}")
        pages.mark(first, count)

    def _take(self, client: LogClient, slot_id: int) -> ClientLease:
        pages = self._slot(slot_id)
        self._check_log()
        with self._lock:
            feed = client.feeds.get(slot_id)
            if feed is None:
                feed = client.feeds[slot_id] = pages.join(client, "the slot was made after the client")
            lease = pages.lend(feed)
            assert isinstance(lease, ClientLease)  # noqa: S101 - a feed's is
            return lease

    def _check_log(self) -> None:
        """Raise what keeps the log from being taken."""

    def _switch(self, *, on: bool) -> None:
        """Switch all slots' logs."""
        raise NotImplementedError

    def _release(self) -> None:
        super()._release()
        self._pages.clear()


def percentage(percent: int) -> int:
    """Return what vCPUs are throttled by, checked.

    Raises
    ------
    ValueError
        If it isn't 0 to 99.
    """
    return check.integer(percent, "percent", 0, 99)


class _Provable(Protocol):
    """What `prove` asks of a VM."""

    @property
    def pages(self) -> int: ...

    def pause(self) -> None: ...
    def check(self) -> None: ...
    def resume(self) -> None: ...


def prove(vm: _Provable, look: Callable[[], str], *, idle: bool) -> None:
    """Let the guest of a VM, which runs, write some more, and check what it has written; it runs on.

    `look` raises what a vCPU failed with, and returns what else is to be said if nothing is written.
    """
    before, until = vm.pages, monotonic() + _PROOF
    while not idle and vm.pages == before:
        said = look()
        if monotonic() > until:
            raise OSError(ETIMEDOUT, f"the guest wrote no page in {_PROOF:g} s{said}")
        sleep(_LOOK)
    vm.pause()
    try:
        vm.check()
    finally:
        vm.resume()
