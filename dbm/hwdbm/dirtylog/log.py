"""DirtyLog: a VM's memslots and their dirty pages, with KVM's rules and errno.

GET and CLEAR are ``kvm_get_dirty_log_protect`` and ``kvm_clear_dirty_log_protect`` (Linux 6.x, virt/kvm/kvm_main.c),
their checks in the same order. Every error of theirs is an `OSError` with KVM's errno and the number that was wrong,
and a call that failed has changed nothing.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from errno import EFAULT, EINVAL, ENOENT
from threading import Lock
from typing import Literal, overload

import numpy as np
from numpy.typing import NDArray

from hwdbm import check
from hwdbm.bitmap import DirtyBitmap, word_count
from hwdbm.dirtylog import faults
from hwdbm.dirtylog.client import ClientLease, Clients, LogClient
from hwdbm.dirtylog.faults import Backing, Granted, Verb
from hwdbm.dirtylog.lease import Lease, kept
from hwdbm.dirtylog.mechanism import MECHANISMS, Mechanism, named
from hwdbm.dirtylog.slot import FlushHook, LogParts, SlotLog, Span, Steps
from hwdbm.dirtylog.stats import Stats
from hwdbm.errors import BitmapError, GfnError
from hwdbm.granule import Granule
from hwdbm.memslot import KVM_PHYS_SHIFT, KVM_USER_MEM_SLOTS, Change, Memslot, Memslots, Plan, slot_name
from hwdbm.stage2 import Stage2

Mask = DirtyBitmap | NDArray[np.uint64] | bytes | bytearray | memoryview
Pages = Iterable[int] | NDArray[np.integer]

_SHARE = 1 << 17  # pages that a worker is worth to be woken for at least: 1 MiB of leaves, some 60 us of work


class DirtyLog:
    """The dirty log of a VM: its memslots, each with its leaves and its bitmap.

    Parameters
    ----------
    granule : Granule
        The size of a page; sizes and addresses are multiples of it.
    hw_dbm : bool
        Whether the MMU records writes (hardware DBM). Otherwise leaves are write-protected, and `write_fault`
        records.
    manual_protect, initially_set : bool
        As if `enable_manual_protect` had been called.
    ipa_bits : int
        The guest's physical address bits. KVM's default is 40, 1 TiB.
    flush : callable, optional
        ``flush(slot, first_page, npages)``, with the `Memslot`: invalidates every TLB entry of every vCPU that
        translates any of these pages, those of larger leaves that reach into them too, and returns when that is
        done. It is called with the pages held: it must neither use this log nor wait for a thread that does. If it
        raises, so does the call that needed the flush, nothing is lost, and the flush stays due: the next call that
        touches these pages makes up for it. With `workers` it is called from several threads at once.
    step_pages : int, optional
        GET, CLEAR and sync work in steps of at most so many pages, a multiple of 64, each complete with its flush and
        holding its own range only. By default a slot is one step for each worker. (v2 of the series: 1 << 17, 512 MiB.)
    address_spaces, slot_limit : int
        KVM's ``kvm_arch_nr_memslot_as_ids`` and ``KVM_CAP_NR_MEMSLOTS``.
    workers : int
        Threads that the steps of a GET, CLEAR or sync run in, the caller's among them.
    mechanism : str, optional
        How the log learns of writes: a name in `hwdbm.dirtylog.MECHANISMS`. `hw_dbm` decides by default.

    Raises
    ------
    OSError
        EINVAL for `initially_set` without `manual_protect`.
    ValueError
        If `step_pages` is no positive multiple of 64, there is no such mechanism, or another parameter is out of range.
    TypeError
        If a parameter has another type.

    Notes
    -----
    All methods may be called from any thread. Operations on disjoint ranges of whole words of a slot run in parallel,
    those on overlapping ones in the order in which they came. A signal's handler may raise at any time: no bit is lost,
    and no page stays held. A change of the memslots that was interrupted either was made or wasn't.

    While a slot logs, a page whose bit is clear has no leaf that lets the guest write unrecorded. Whoever changes
    leaves directly (`locked`) keeps to that: with hardware DBM by mapping writable pages with ``dbm=True``, without by
    mapping them read-only.

    Examples
    --------
    >>> from hwdbm import Stage2, pte
    >>> log = DirtyLog()
    >>> log.set_memory_region(slot=0, flags=1, guest_phys_addr=0x4000_0000, memory_size=1 << 20, userspace_addr=1 << 30)
    <Change.CREATE: 'create'>
    >>> log.map(0, gfn=0x40000, npages=256, pfn=0x8_0000)
    >>> log.stage2(0).level(3)[7] |= pte.S2AP_W  # what the MMU does when the guest writes
    >>> log.get_dirty_log(0).ranges().tolist(), log.get_dirty_log(0).any()
    ([[7, 1]], False)
    >>> log.clear_dirty_log(0, first_page=32, num_pages=64, bitmap=DirtyBitmap(64))
    Traceback (most recent call last):
    OSError: [Errno 22] slot 0: first_page 32 is not a multiple of 64
    """

    def __init__(
        self,
        *,
        granule: Granule = Granule.K4,
        hw_dbm: bool = True,
        manual_protect: bool = False,
        initially_set: bool = False,
        ipa_bits: int = KVM_PHYS_SHIFT,
        flush: FlushHook | None = None,
        step_pages: int | None = None,
        address_spaces: int = 1,
        slot_limit: int = KVM_USER_MEM_SLOTS,
        workers: int = 1,
        mechanism: str | None = None,
    ) -> None:
        self._manual = check.flag(manual_protect, "manual_protect")
        self._initially_set = check.flag(initially_set, "initially_set")
        if initially_set and not manual_protect:
            raise OSError(EINVAL, "INITIALLY_SET is valid with MANUAL_PROTECT_ENABLE only")
        if step_pages is not None:
            step_pages = check.integer(step_pages, "step_pages", None)
            if step_pages < 64 or step_pages & 63:
                raise ValueError(f"a step is a positive multiple of 64 pages, not {step_pages}")
        if flush is not None and not callable(flush):
            raise TypeError(f"flush is a callable or None, not {flush!r}")
        self._step = step_pages
        self._table = Memslots(granule, address_spaces=address_spaces, slot_limit=slot_limit, ipa_bits=ipa_bits)
        self._slots: dict[int, SlotLog] = {}
        self._slots_lock = Lock()  # KVM's: for what changes the set of slots, or what holds for all of them
        self._plan: Plan | None = None  # a change of the memslots that is under way
        self._clients = Clients()
        self._shared = LogParts(flush, check.integer(workers, "workers", 1, 1 << 10))
        self._mechanisms = {name: make() for name, make in MECHANISMS.items()}
        usual = named(check.flag(hw_dbm, "hw_dbm"))
        self._mechanism = self._by_name(usual if mechanism is None else mechanism)

    def __repr__(self) -> str:
        return f"<DirtyLog: {len(self._slots)} slots, {self.mechanism}{', manual' if self._manual else ''}>"

    # --- reading -------------------------------------------------------------------------------------------

    @property
    def granule(self) -> Granule:
        """The size of a page."""
        return self._table.granule

    @property
    def mechanism(self) -> str:
        """How the log learns of writes: a name in `hwdbm.dirtylog.MECHANISMS`."""
        return self._mechanism.name

    @property
    def hw_dbm(self) -> bool:
        """Whether the MMU records writes, so that VTCR_EL2.HD must be on."""
        return self._mechanism.hd

    @property
    def manual_protect(self) -> bool:
        """Whether GET only shows, and CLEAR alone clears."""
        return self._manual

    @property
    def initially_set(self) -> bool:
        """Whether a log begins with all bits set."""
        return self._initially_set

    @property
    def stats(self) -> Stats:
        """The counts so far: flushes, leaves read, words written."""
        return self._shared.meter.stats

    @property
    def memslots(self) -> tuple[Memslot, ...]:
        """The slots in the order of their ids."""
        with self._slots_lock:
            self._settle()
            return self._table.all()

    def slot(self, slot: int) -> Memslot:
        """Return a slot by its id, ``as_id << 16 | id``.

        Raises
        ------
        OSError
            EINVAL if the id is out of range, ENOENT if there is no such slot. So does every method with a slot.
        """
        return self._find(slot).memslot

    def stage2(self, slot: int) -> Stage2:
        """Return a slot's leaves. A move puts others there, and after a delete they are the caller's.

        Raises
        ------
        OSError
            As `slot`.
        """
        return self._find(slot).stage2

    def slot_log(self, slot: int) -> SlotLog:
        """Return one slot's log, for what steps through the protocol. Errors are those of `slot`."""
        return self._find(slot)

    def _find(self, slot: int) -> SlotLog:
        slot = check.integer(slot, "slot", None)
        found = self._slots.get(slot)
        if found is not None and not found.deleted:
            return found
        self._table.check_id(slot)
        raise OSError(ENOENT, f"there is no {slot_name(slot)}")

    # --- memslots and capabilities -------------------------------------------------------------------------

    def set_memory_region(
        self, slot: int, flags: int, guest_phys_addr: int, memory_size: int, userspace_addr: int
    ) -> Change:
        """Create, delete, move or change a slot (``KVM_SET_USER_MEMORY_REGION``).

        A log that begins finds all pages clean, whatever was written before, or with `initially_set` all dirty. One
        that ends loses its bitmap; so does a slot that is deleted. A slot that moves keeps it, and loses its leaves,
        after what they had recorded was put there. In each case the epochs of the slot's clients are broken.

        Parameters
        ----------
        slot : int
            ``as_id << 16 | id``.
        flags : int
            1 (``KVM_MEM_LOG_DIRTY_PAGES``) and 2 (``KVM_MEM_READONLY``).
        guest_phys_addr, memory_size : int
            Bytes, multiples of the page. A size of 0 deletes the slot.
        userspace_addr : int
            An address in the VMM, a multiple of the page: the identity of the backing. It is not followed.

        Returns
        -------
        Change
            The change that was made.

        Raises
        ------
        OSError
            EINVAL, EEXIST or EFAULT, by the rules of `Memslots.plan`.
        """
        with self._slots_lock:
            self._settle()
            plan = self._table.plan(slot, flags, guest_phys_addr, memory_size, userspace_addr)
            old, new = plan.old, plan.new
            self._plan = plan
            if old is None and new is not None:
                made = SlotLog(new, self.granule, self._mechanism, self._shared)
                if new.logging:
                    made.run(made.start_steps(new, full=self._initially_set))
                self._slots[new.id] = made
            elif old is not None and plan.change is not Change.NOTHING:
                found = self._slots[old.id]
                found.run(self._changed(found, plan.change, new))
            self._settle()
            return plan.change

    def _changed(self, found: SlotLog, change: Change, new: Memslot | None) -> Steps:
        if new is None:
            return found.delete_steps()
        if change is Change.MOVE:
            return found.move_steps(new, full=self._initially_set)
        return found.start_steps(new, full=self._initially_set) if new.logging else found.stop_steps(new)

    def _settle(self) -> None:
        """Bring the table in line with the slots, also after an interrupt in between; the lock is held.

        A slot's own step makes a change in one assignment, so that its log says whether the change was made.
        """
        plan = self._plan
        if plan is None:
            return
        found = self._slots.get(plan.id)
        if found is not None and (found.deleted if plan.new is None else found.memslot is plan.new):
            self._table.commit(plan)
            if found.deleted:
                self._slots.pop(plan.id, None)
        self._plan = None

    def enable_manual_protect(self, initially_set: bool = False) -> None:
        """Let CLEAR alone clear, and GET only show (``KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2``).

        Parameters
        ----------
        initially_set : bool
            Whether the logs that begin from now on do so with all bits set (``KVM_DIRTY_LOG_INITIALLY_SET``). Their
            leaves are then armed or write-protected by the CLEARs, and not all at once.
        """
        initially_set = check.flag(initially_set, "initially_set")
        with self._slots_lock:
            self._manual, self._initially_set = True, initially_set

    def set_hw_dirty_log(self, enable: bool) -> None:
        """Switch between hardware DBM and write-protection while the VM runs (v2's ``KVM_CAP_ARM_HW_DIRTY_LOG``).

        Parameters
        ----------
        enable : bool
            Whether the MMU is to record. The VM's VTCR_EL2.HD is the caller's: on before this enables, and off
            after it disabled.
        """
        self.set_mechanism(named(check.flag(enable, "enable")))

    def set_mechanism(self, name: str) -> None:
        """Change how the log learns of writes while the VM runs.

        Slots are switched one after the other, each under a lock of the whole of it. If a flush fails, those before are
        switched, and a further call does the rest.

        Parameters
        ----------
        name : str
            A name in `hwdbm.dirtylog.MECHANISMS`.

        Raises
        ------
        ValueError
            If there is no such mechanism.
        """
        mechanism = self._by_name(name)
        with self._slots_lock:
            self._settle()
            for slot in sorted(self._slots):
                found = self._slots[slot]
                found.run(found.switch_steps(mechanism))
            self._mechanism = mechanism

    def _by_name(self, name: str) -> Mechanism:
        check.one_of(name, self._mechanisms, "mechanism")
        return self._mechanisms[name]

    # --- GET, CLEAR, sync ----------------------------------------------------------------------------------

    @overload
    def get_dirty_log(self, slot: int, *, lease: Literal[False] = False) -> DirtyBitmap: ...
    @overload
    def get_dirty_log(self, slot: int, *, lease: Literal[True]) -> Lease: ...
    def get_dirty_log(self, slot: int, *, lease: bool = False) -> DirtyBitmap | Lease:
        """Return a slot's dirty pages (``KVM_GET_DIRTY_LOG``).

        They are clean then, and writes to them recorded anew; under manual protection they stay as they are.

        Parameters
        ----------
        slot : int
            The slot's id.
        lease : bool
            Whether the pages are lent: what the consumer fails to copy it can give back.

        Returns
        -------
        DirtyBitmap or Lease
            Bit i is page i of the slot.

        Raises
        ------
        OSError
            EINVAL if the id is out of range, ENOENT if there is no such slot or it doesn't log.
        """
        lease, found = check.flag(lease, "lease"), self._find(slot)
        lent = self._get(found)
        return lent if lease else kept(lent)

    def _get(self, found: SlotLog) -> Lease:
        found.logging()
        return found.get(self._parts(0, found.npages), take=not self._manual)

    @overload
    def clear_dirty_log(
        self, slot: int, first_page: int, num_pages: int, bitmap: Mask, *, lease: Literal[False] = False
    ) -> None: ...
    @overload
    def clear_dirty_log(
        self, slot: int, first_page: int, num_pages: int, bitmap: Mask, *, lease: Literal[True]
    ) -> Lease: ...
    def clear_dirty_log(
        self, slot: int, first_page: int, num_pages: int, bitmap: Mask, *, lease: bool = False
    ) -> Lease | None:
        """Clear the pages of a mask, and have writes to them recorded anew (``KVM_CLEAR_DIRTY_LOG``).

        Only pages that are dirty in the log already are cleared: one that was written and not yet shown by a GET or
        a sync keeps that. It works with and without manual protection.

        Parameters
        ----------
        slot : int
            The slot's id.
        first_page : int
            The page of bit 0, a multiple of 64.
        num_pages : int
            A multiple of 64, unless the range ends with the slot. May be 0.
        bitmap : DirtyBitmap or bytes-like
            The mask: a bitmap, its words, or bytes in KVM's layout, of ``ceil(num_pages / 64)`` words or more. As
            in the kernel, what lies beyond those words isn't looked at, and bits beyond the slot's end don't matter.
        lease : bool
            Whether the pages that were cleared are lent.

        Returns
        -------
        Lease or None
            The pages that were cleared, bit 0 being `first_page`.

        Raises
        ------
        OSError
            EINVAL if the id is out of range, or `first_page` no multiple of 64; ENOENT if there is no such slot or
            it doesn't log; EINVAL for a range that isn't inside of the slot, or ragged elsewhere than at its end;
            EFAULT if the mask is shorter. They are checked in this order.
        TypeError
            If the mask is none of these, an array of another type among them.
        """
        lease = check.flag(lease, "lease")
        num_pages = check.integer(num_pages, "num_pages", None)
        found, first_page, stop = self._range(slot, first_page, num_pages)
        count = stop - first_page
        words = _words(bitmap, count) if count else np.zeros(0, dtype=np.uint64)
        lent = found.clear(self._parts(first_page, stop), first_page, count, words)
        if lease:
            return lent
        kept(lent)
        return None

    def sync(self, slot: int, first_page: int = 0, num_pages: int | None = None) -> None:
        """Bring what the leaves recorded into the log: they are clean then, and the pages dirty in the log.

        Calls on disjoint ranges run in parallel threads. Without hardware DBM there is nothing that leaves record.
        Nothing is taken: all clients find it in their bitmaps.

        Parameters
        ----------
        slot : int
            The slot's id.
        first_page, num_pages : int
            The range, by the rules of `clear_dirty_log`; by default all from `first_page` on.

        Raises
        ------
        OSError
            As `clear_dirty_log`.
        """
        found, lo, hi = self._range(slot, first_page, num_pages)
        found.sync_all(self._parts(lo, hi))

    def harvest_steps(self, slot: int, first_page: int = 0, num_pages: int | None = None) -> Iterator[tuple[int, int]]:
        """Do as `sync` a step at a time, and yield (first page, pages) after each: nothing is held in between.

        Parameters and errors are those of `sync`.
        """
        found, lo, hi = self._range(slot, first_page, num_pages)
        return _stepwise(found, self._parts(lo, hi))

    def lend(self, slot: int) -> Lease:
        """Lend a slot's dirty pages in one call: GET, and under manual protection CLEAR of what that showed.

        Raises
        ------
        OSError
            As `get_dirty_log`.
        """
        found = self._find(slot)
        lent = self._get(found)
        if not self._manual:
            return lent
        return found.clear(self._parts(0, found.npages), 0, found.npages, lent.bitmap.words)

    def client(self, name: str) -> LogClient:
        """Return a new consumer of the log, with a bitmap and an epoch a slot of its own, until it is closed.

        GET, CLEAR and `lend` are the default client, and answer as they would without others. What was written before
        is dirty for the clients that there were, and not for the new one.

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
            EBUSY if there is a client of this name, ENOENT if no slot logs.
        TypeError, ValueError
            If the name is no text, or empty.

        Notes
        -----
        A harvest is made once for all. A page is re-protected when a harvest publishes it (hardware DBM), or when the
        first of those that have its bit takes it (write-protection, as only a fault publishes there), and not again
        for the others. A client re-protects what it takes also under manual protection: there, a page that GET has
        shown stays writable until CLEAR, so that others can't leave it as it is. Where a log begins with all bits set
        while it has clients, and where the first one comes, all leaves are seen to at once. `hwdbm.dirtylog.client` has
        the protocol.

        Examples
        --------
        >>> log = DirtyLog()
        >>> log.set_memory_region(0, 1, 0, 0x10000, 0)
        <Change.CREATE: 'create'>
        >>> with log.client("backup") as backup:
        ...     log.mark_dirty(0, 3)
        ...     with backup.take(0) as lease:
        ...         lease.bitmap.pages()
        ...     log.get_dirty_log(0).pages(), backup.take(0).bitmap.any()
        array([3])
        (array([3]), False)
        """
        return self._client(name, lambda _: None)

    def _client(self, name: str, prepare: Callable[[int], object]) -> LogClient:
        """Return a client that calls `prepare` for the slot before it takes pages."""

        def take(client: LogClient, slot: int) -> ClientLease:
            prepare(slot)
            found = self._find(slot)
            found.logging()
            feed = client.feeds.get(slot)
            if feed is None or feed.slot is not found:
                late = "began to log after the client" if feed is None else "was deleted and made again"
                feed = client.feeds[slot] = found.join(client, f"the slot {late}")
            return found.take(feed, self._parts(0, found.npages))

        if not any(slot.logging for slot in self.memslots):
            raise OSError(ENOENT, f"a client {name!r}: no slot logs")
        client = self._clients.add(name, take)
        try:
            with self._slots_lock:
                self._settle()
                for slot, found in self._slots.items():
                    if found.live is not None:
                        client.feeds[slot] = found.join(client)
        except BaseException:
            client.close()
            raise
        return client

    def _range(self, slot: int, first_page: int, num_pages: int | None) -> tuple[SlotLog, int, int]:
        """Return a range that CLEAR takes as pages [lo, hi) of a slot, or raise what KVM does, in its order."""
        slot, first = check.integer(slot, "slot", None), check.integer(first_page, "first_page", None)
        count = None if num_pages is None else check.integer(num_pages, "num_pages", None)
        if first & 63:
            self._table.check_id(slot)
            raise OSError(EINVAL, f"{slot_name(slot)}: first_page {first} is not a multiple of 64")
        found = self._find(slot)
        found.logging()
        return found, first, _check_range(found, first, found.npages - first if count is None else count)

    def _parts(self, lo: int, hi: int) -> list[Span]:
        """Return the pages [lo, hi) in steps."""
        step = self._step
        if step is None:
            workers = self._shared.workers
            step = hi - lo if workers == 1 else max(-(-(hi - lo) // workers // _SHARE) * _SHARE, _SHARE)
        return [(start, min(start + step, hi)) for start in range(lo, hi, max(step, 1))]

    # --- writers -------------------------------------------------------------------------------------------

    def map(
        self,
        slot: int,
        gfn: int,
        npages: int,
        pfn: int | NDArray[np.integer],
        level: int = 3,
        writable: bool = True,
    ) -> None:
        """Map guest frames, in place of whatever was there, in the way that the slot's log needs.

        While the slot logs, what would be blocks is mapped as pages, as KVM does; writable leaves are writable-clean
        with hardware DBM, and read-only without, so that the first write faults. While it doesn't, they are
        untracked. In a read-only slot none is writable.

        Parameters
        ----------
        slot : int
            The slot's id.
        gfn, npages, pfn, level, writable
            As for `hwdbm.Stage2.map`.

        Raises
        ------
        OSError
            As `slot`.
        GfnError
            If the range or a frame is outside of its space or misaligned, for a leaf of `level`. Nothing is changed
            then.
        """
        found, gfn, npages = self._find(slot), check.integer(gfn, "gfn", None), check.integer(npages, "npages", None)
        level, writable = check.integer(level, "level", None), check.flag(writable, "writable")
        found.pages_at(gfn, npages)
        frames = faults.checked_frames(self.granule, gfn, npages, pfn, level)
        found.run_leaves(
            lambda: found.pages_at(gfn, npages),
            lambda lo, hi: faults.map_steps(found, lo, hi, frames, level, writable=writable),
        )

    def unmap(self, slot: int, gfn: int, npages: int) -> None:
        """Remove the leaves of a range. What they recorded is kept for the log and the host, and the TLB flushed.

        Raises
        ------
        OSError
            As `slot`.
        GfnError
            If the range isn't inside of the slot.
        """
        found, gfn, npages = self._find(slot), check.integer(gfn, "gfn", None), check.integer(npages, "npages", None)
        found.run_leaves(lambda: found.pages_at(gfn, npages), lambda lo, hi: faults.unmap_steps(found, lo, hi))

    def change(self, slot: int, first_page: int, npages: int, verb: Verb) -> int:
        """Change leaves by a verb of `hwdbm.Stage2`, and flush the TLB if it changed any.

        Leaves that a verb replaces are saved for the log, so that nothing is lost. The caller sees to it that a page
        whose bit is clear has no leaf that lets the guest write unrecorded, as for `locked`.

        Parameters
        ----------
        slot : int
            The slot's id.
        first_page, npages : int
            The pages, counted from the slot's first.
        verb : callable
            ``verb(stage2, first_page, npages)`` returns how many leaves it changed.

        Returns
        -------
        int
            The number that `verb` returned.

        Raises
        ------
        OSError
            As `slot`.
        GfnError
            If the pages aren't inside of the slot.

        Examples
        --------
        >>> log = DirtyLog()
        >>> log.set_memory_region(0, 1, 0, 0x10000, 0)
        <Change.CREATE: 'create'>
        >>> log.map(0, gfn=0, npages=16, pfn=0)
        >>> log.change(0, 4, 8, lambda s2, first, npages: s2.wrprotect(s2.base_gfn + first, npages))
        8
        """
        found, first = self._find(slot), check.integer(first_page, "first_page", None)
        if not callable(verb):
            raise TypeError(f"verb is a callable, not {verb!r}")
        count, changed = check.integer(npages, "npages", None), list[int]()
        found.run_leaves(
            lambda: found.pages(first, count), lambda lo, hi: faults.change_steps(found, lo, hi, verb, changed)
        )
        (number,) = changed
        return number

    def deny_blocks(self, slot: int, first_page: int, npages: int) -> int:
        """Have the first write to each block that touches some pages fault, so that it can be split.

        Returns
        -------
        int
            How many blocks changed: none where their first write faults as it is.

        Raises
        ------
        OSError
            As `slot`.
        GfnError
            If the pages aren't inside of the slot.
        """
        deny = self._find(slot).mechanism.deny_blocks

        def verb(s2: Stage2, first: int, count: int) -> int:
            spans = s2.block_spans(first, count).tolist()
            return sum(deny(s2, s2.base_gfn + start, stop - start) for start, stop in spans)

        return self.change(slot, first_page, npages, verb)

    def populate(self, slot: int, pages: Pages, backing: Backing, *, write: bool, blocks: bool = False) -> None:
        """Map those of some pages that have no leaf, as a translation fault's handler does.

        Leaves are mapped as by `map`. But a write under write-protection is granted and marked at once, as
        KVM does, and takes no second fault. A page whose frame is shared is mapped read-only.

        Parameters
        ----------
        slot : int
            The slot's id.
        pages : (n,) int64 array
            Counted from the slot's first.
        backing : Backing
            The host's page table.
        write : bool
            Whether they are being written, rather than read.
        blocks : bool
            Whether to map a block where one fits, nothing is mapped and the slot doesn't log.

        Raises
        ------
        OSError
            As `slot`.
        GfnError
            If a page isn't inside of the slot.
        """
        found, write, blocks = self._find(slot), check.flag(write, "write"), check.flag(blocks, "blocks")
        check.instance(backing, Backing, "backing")
        pages = _pages(found, pages)
        if pages.size:
            lo, hi = int(pages[0]), int(pages[-1]) + 1
            found.run_leaves(
                lambda: (lo, hi),
                lambda *_: faults.populate_steps(found, pages, backing, write=write, blocks=blocks),
            )

    def write_fault(self, slot: int, gfn: int, pfn: int | None = None) -> None:
        """Resolve a guest's write fault on a page that the host lets it write, and log the write.

        The leaf becomes writable: untracked, or while the slot logs with hardware DBM writable-dirty. While it logs a
        block is split first. The page is marked only when that has been done. Equal to `write_faults` of one page.

        Parameters
        ----------
        slot : int
            The slot's id.
        gfn : int
            The guest frame that was written.
        pfn : int, optional
            The physical frame to map there: where there is no leaf, or after a copy on write. By default the leaf
            that is there is relaxed.

        Raises
        ------
        OSError
            As `slot`; EFAULT if the slot is read-only, or there is neither a leaf nor a `pfn`.
        GfnError
            If `gfn` isn't inside of the slot, or `pfn` not of 48 address bits.
        """
        found, gfn = self._find(slot), check.integer(gfn, "gfn", None)
        frames = None if pfn is None else np.array([self._frame(pfn)])
        granted = self._grant(found, lambda: found.pages_at(gfn, 1), None, frames, f"gfn {gfn:#x}")
        if granted.absent.size:
            raise OSError(EFAULT, f"{found.name}: gfn {gfn:#x} has no leaf, and no pfn was given")

    def write_faults(
        self,
        slot: int,
        pages: Pages,
        pfn: NDArray[np.integer] | None = None,
        *,
        split: bool = True,
        whole: bool = False,
    ) -> int:
        """Resolve write faults on pages that the host lets the guest write, and log the writes: `write_fault` of each.

        Pages that have no leaf, and get none, are left alone: others have unmapped them since.

        Parameters
        ----------
        slot : int
            The slot's id.
        pages : (n,) int64 array
            Each once, counted from the slot's first.
        pfn : (n,) integer array, optional
            The frame of each, after a copy on write.
        split : bool
            Whether a block is split, while its slot logs. Otherwise a write to it makes all of its pages dirty.
        whole : bool
            Whether the host lets the guest write all pages of a block, and not only those that faulted: where hardware
            logs them they take no further fault, then.

        Returns
        -------
        int
            How many blocks were split.

        Raises
        ------
        OSError
            As `slot`; EFAULT if the slot is read-only.
        GfnError
            If a page isn't inside of the slot or comes twice, or a frame isn't of 48 address bits.
        """
        found, split, whole = self._find(slot), check.flag(split, "split"), check.flag(whole, "whole")
        given = _listed(found, pages)
        if pfn is not None:
            check.instance(pfn, (np.ndarray, Sequence), "pfn")
        frames = None if pfn is None else check.integers(pfn, "pfn", 0, self._last_pfn, GfnError)
        if frames is not None and frames.shape != given.shape:
            raise GfnError(f"{given.size} pages need {given.size} frames, got {frames.size}")
        order = np.argsort(given, kind="stable")
        given = given[order]
        if given.size and not np.diff(given).all():
            raise GfnError("a page that faulted is named twice")
        if not given.size:
            return 0
        lo, hi = int(given[0]), int(given[-1]) + 1
        frames = None if frames is None else frames[order]
        return self._grant(found, lambda: (lo, hi), given, frames, f"pages {lo}..", split=split, whole=whole).splits

    def _grant(
        self,
        found: SlotLog,
        place: Callable[[], Span],
        pages: NDArray[np.int64] | None,
        frames: NDArray[np.int64] | None,
        what: str,
        *,
        split: bool = True,
        whole: bool = False,
    ) -> Granted:
        if found.memslot.readonly:
            raise OSError(EFAULT, f"{found.name} is read-only: no write to {what} is granted")
        result = Granted()
        found.run_leaves(
            place,
            lambda lo, hi: faults.write_fault_steps(
                found, np.arange(lo, hi) if pages is None else pages, frames, result, split=split, whole=whole
            ),
        )
        return result

    @property
    def _last_pfn(self) -> int:
        return (1 << (48 - self.granule.page_shift)) - 1

    def _frame(self, pfn: int | NDArray[np.integer]) -> int:
        last = self._last_pfn
        frame = check.integer(pfn, "pfn", None)
        if not 0 <= frame <= last:
            raise GfnError(f"pfn {frame:#x} isn't inside of 48 address bits")
        return frame

    def mark_dirty(self, slot: int, first_page: int, npages: int = 1) -> None:
        """Mark pages that something other than a vCPU wrote: the VMM, a device, an import.

        The log hears of it while the slot logs, the host always.

        Raises
        ------
        OSError
            As `slot`.
        GfnError
            If the pages, counted from the slot's first, aren't inside of it.
        """
        found = self._find(slot)
        first, count = check.integer(first_page, "first_page", None), check.integer(npages, "npages", None)
        lo, hi = found.pages(first, count)
        found.run(found.mark_steps(lo, hi), lo, hi)

    def mark_dirty_range(self, slot: int, gpa: int, length: int) -> None:
        """Mark each page that any of `length` bytes at a guest physical address touches. As `mark_dirty` otherwise.

        Examples
        --------
        >>> from hwdbm import DirtyLog
        >>> log = DirtyLog()
        >>> log.set_memory_region(0, 1, 0x10000, 0x10000, 0)
        <Change.CREATE: 'create'>
        >>> log.mark_dirty_range(0, 0x10FFF, 2)
        >>> log.get_dirty_log(0).pages()
        array([0, 1])
        """
        found, shift = self._find(slot), self.granule.page_shift
        gpa, length = check.integer(gpa, "gpa", None), check.integer(length, "length", None)
        first = gpa >> shift
        stop = gpa + length + self.granule.page_size - 1 >> shift if length > 0 else first
        try:
            lo, hi = found.pages_at(first, stop - first if length >= 0 else length)
        except GfnError as error:
            raise GfnError(f"{error} (gpa {gpa:#x}, {length} bytes)") from None
        found.run(found.mark_steps(lo, hi), lo, hi)

    @contextmanager
    def locked(self, slot: int, first_page: int = 0, num_pages: int | None = None) -> Iterator[Stage2]:
        """Hold pages of a slot for the length of a ``with`` block, to change their leaves directly.

        They are held out to where leaves end, so that blocks can be split. Within the block no method of this log may
        be called for them. The TLB is the caller's to flush.

        Parameters
        ----------
        slot : int
            The slot's id.
        first_page, num_pages : int
            The pages, counted from the slot's first; by default all from there on.

        Yields
        ------
        Stage2
            The slot's leaves.

        Raises
        ------
        OSError
            As `slot`.
        GfnError
            If the pages aren't inside of the slot.
        """
        found, first = self._find(slot), check.integer(first_page, "first_page", None)
        count = found.npages - first if num_pages is None else check.integer(num_pages, "num_pages", None)
        with found.hold_leaves(lambda: found.pages(first, count)):
            yield found.stage2

    def take_host_dirty(self, slot: int) -> DirtyBitmap:
        """Return the host pages' dirty flags and clear them, after a flush: what they say may be written back.

        Raises
        ------
        OSError
            As `slot`.
        """
        return self._find(slot).take_host_dirty()

    # --- checking ------------------------------------------------------------------------------------------

    def verify(self) -> None:
        """Raise `InvariantError` if a slot's leaves and bitmap contradict each other.

        Besides `Stage2.verify` and clean tails: while a slot logs, every page that the guest may write unrecorded is
        dirty in the log, and a read-only slot has no writable leaf.
        """
        with self._slots_lock:
            self._settle()
            for slot in sorted(self._slots):
                self._slots[slot].run(self._slots[slot].verify_steps())


def _check_range(found: SlotLog, first_page: int, num_pages: int) -> int:
    """Return where a range ends that CLEAR takes, or raise EINVAL."""
    rest = found.npages - first_page
    if first_page < 0 or rest < 0:
        raise OSError(EINVAL, f"{found.name}: first_page {first_page} is beyond its {found.npages} pages")
    if not 0 <= num_pages <= rest:
        raise OSError(EINVAL, f"{found.name}: num_pages {num_pages} from {first_page} is beyond its {found.npages}")
    if num_pages < rest and num_pages & 63:
        raise OSError(
            EINVAL,
            f"{found.name}: num_pages {num_pages} is neither a multiple of 64 nor the {rest} to the slot's end",
        )
    return first_page + num_pages


def _stepwise(found: SlotLog, parts: list[Span]) -> Iterator[tuple[int, int]]:
    for lo, hi in parts:
        found.sync(lo, hi)
        yield lo, hi - lo


def _pages(found: SlotLog, pages: Pages) -> NDArray[np.int64]:
    """Return pages of a slot in order, each once."""
    listed = _listed(found, pages)
    return np.unique(listed) if listed.size > 1 else listed


def _listed(found: SlotLog, pages: Pages) -> NDArray[np.int64]:
    """Return pages of a slot as an array."""
    check.instance(pages, (np.ndarray, Sequence, AbstractSet), "pages")
    if isinstance(pages, np.ndarray) and pages.ndim != 1:
        raise TypeError(f"pages are an array of one dimension, not of shape {pages.shape}")
    return check.integers(pages, "pages", 0, found.npages - 1, GfnError)


def _words(bitmap: Mask, num_pages: int) -> NDArray[np.uint64]:
    """Return what KVM would copy of a mask as words, or raise EFAULT if it is shorter.

    They are the mask's own where that is possible: each is read once, under the lock of its step.
    """
    mask = bitmap.words if isinstance(bitmap, DirtyBitmap) else bitmap
    if isinstance(mask, np.ndarray):
        if mask.dtype != np.uint64 or not mask.dtype.isnative:
            raise TypeError(f"a mask's words are uint64, a bit a page, not {mask.dtype}")
        if mask.ndim != 1:
            raise BitmapError(f"a mask's words are of one dimension, not of shape {mask.shape}")
        words = np.ascontiguousarray(mask)
        size = 8 * words.size
    else:
        try:
            view = memoryview(mask)
        except TypeError:
            raise TypeError(f"a mask is a bitmap or bytes-like, not {type(mask).__name__}") from None
        if view.format not in ("B", "b", "c", "Q", "L") or (view.itemsize not in (1, 8)):
            raise TypeError(f"a mask is bytes, or words of 64 bits, not a buffer of format {view.format!r}")
        raw = view.cast("B") if view.c_contiguous and view.nbytes else view.tobytes()
        size, words = len(raw), np.frombuffer(raw[: len(raw) & ~7], dtype="<u8")
    if size < 8 * word_count(num_pages):
        raise OSError(EFAULT, f"a mask of {num_pages} pages has {8 * word_count(num_pages)} bytes, got {size}")
    return words[: word_count(num_pages)]
