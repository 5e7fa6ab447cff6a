"""VCpu: loads and stores in bulk, through a TLB.

A batch is done in two parts. What the TLB lets through needs the vCPU's own lock alone, so it goes on while a harvest
holds the pages, as hardware does until the flush. The rest is walked with the pages held. Locks are taken in one order:
the machine's ``mmu_lock``, pages, vCPU. A flush comes with pages held, and takes the vCPU's lock: it returns when no
access through an old entry is under way.
"""

from collections.abc import Callable
from errno import EFAULT
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from hwdbm import check
from hwdbm.dirtylog import DirtyLog
from hwdbm.machine.clock import Clock
from hwdbm.machine.faults import FaultHandler
from hwdbm.machine.mmu import DONE, Walk, walk
from hwdbm.machine.space import AddressSpace, Region
from hwdbm.machine.tlb import CLEAN, NONE, READ_ONLY, Tlb
from hwdbm.stage2 import Layout
from hwdbm.walker import Access

BATCH = 1 << 16
"""Accesses that are done together at most, and so the longest that a flush waits for a vCPU: some milliseconds."""

_TRIES = 16  # a fault is resolved at the first, one that others undo at some later one

Addresses = NDArray[np.int64]
Pages = NDArray[np.int64]
Values = NDArray[np.uint64]
Kinds = NDArray[np.uint8]
Chosen = NDArray[np.intp] | None
"""Which accesses of a batch; None for all."""


class _Scratch:
    """Room for what is worked out about a batch: what is allocated for each is backed anew for each, page by page.

    Parameters
    ----------
    size : int
        Accesses of a batch at most.
    """

    def __init__(self, size: int) -> None:
        self.words = np.empty(size, dtype=np.int64)
        self.pages = np.empty(size, dtype=np.int64)
        self.kinds = np.empty(size, dtype=np.uint8)
        self.hits = np.empty(size, dtype=np.bool_)
        self.descs = np.empty(size, dtype=np.uint64)
        self.some_words, self.some_pages = np.empty(size, dtype=np.int64), np.empty(size, dtype=np.int64)
        self.some_data = np.empty(size, dtype=np.uint64)


class VCpu:
    """A virtual CPU.

    Parameters
    ----------
    number : int
        Its number in the machine.
    space : AddressSpace
        The guest's physical memory.
    log : DirtyLog
        The log of the leaves that are walked.
    faults : FaultHandler
        The fault handler.
    clock : Clock
        The clock that counts accesses.
    tlb_entries : int, optional
        Leaves of a slot that are cached at most. Unlimited by default.
    seed : int
        Seed for choosing which entries a full TLB evicts.
    ha, hd : bool
        VTCR_EL2.HA and HD: whether the MMU updates AF and the dirty state.

    Attributes
    ----------
    tlb : dict of int to Tlb
        The TLB of each slot.
    lock : Lock
        Held for the length of accesses through the TLB.
    """

    def __init__(
        self,
        number: int,
        space: AddressSpace,
        log: DirtyLog,
        faults: FaultHandler,
        clock: Clock,
        *,
        tlb_entries: int | None = None,
        seed: int = 0,
        ha: bool = True,
        hd: bool = True,
    ) -> None:
        self.number, self.ha, self.hd = number, ha, hd
        self._space, self._log, self._faults, self._clock = space, log, faults, clock
        self._entries, self._seed = tlb_entries, seed
        self.tlb: dict[int, Tlb] = {}
        self.lock = Lock()
        self._scratch: list[_Scratch] = []  # one for each thread that used this vCPU at the same time: mostly one

    def attach(self, slot: int, layout: Layout) -> None:
        """Begin to cache leaves of a slot."""
        with self.lock:
            self.tlb[slot] = Tlb(layout, self._entries, self._seed + slot)

    def detach(self, slot: int) -> None:
        """Forget a slot, if it is attached."""
        with self.lock:
            self.tlb.pop(slot, None)

    def flush(self, slot: int, first_page: int, npages: int) -> None:
        """Forget the translations of some pages; return when no access through one is under way."""
        slot, first_page = check.integer(slot, "slot", None), check.integer(first_page, "first_page")
        npages = check.integer(npages, "npages")
        with self.lock:
            if slot in self.tlb:
                self.tlb[slot].flush(first_page, npages)

    # --- accesses ------------------------------------------------------------------------------------------

    def store(self, gpas: Addresses, values: Values) -> None:
        """Store words.

        Parameters
        ----------
        gpas : (n,) int64 array
            Guest physical addresses, multiples of 8. Where one repeats, the last value stays.
        values : (n,) uint64 array
            The values to store.

        Raises
        ------
        OSError
            EFAULT for an address in no slot, or in a read-only one; those before it are stored.
        ValueError
            For an address that is no multiple of 8.
        """
        gpas, values = _checked(gpas), check.uint64s(values, "values")
        if values.size != gpas.size:
            raise ValueError(f"{gpas.size} addresses need {gpas.size} values, got {values.size}")
        for start in range(0, gpas.size, BATCH):
            part = slice(start, start + BATCH)
            self._batch(gpas[part], values[part], write=True)

    def load(self, gpas: Addresses) -> Values:
        """Load words, and return them. Parameters and errors are `store`'s; a read-only slot is as good as any.

        Returns
        -------
        (n,) uint64 array
        """
        gpas = _checked(gpas)
        out = np.zeros(gpas.size, dtype=np.uint64)
        for start in range(0, gpas.size, BATCH):
            part = slice(start, start + BATCH)
            self._batch(gpas[part], out[part], write=False)
        return out

    def _batch(self, gpas: Addresses, data: Values, *, write: bool) -> None:
        if int(np.bitwise_or.reduce(gpas)) & 7:
            raise ValueError(f"address {int(gpas[gpas & 7 != 0][0]):#x} is not a multiple of 8")
        bad = None
        for region, where in self._space.split(gpas, write=write):
            if region is None:
                bad = int(gpas[where][0])
            elif where is None:
                self._access(region, gpas, data, write=write)
            else:
                part = data[where]
                self._access(region, gpas[where], part, write=write)
                if not write:
                    data[where] = part
        if bad is not None:
            raise self._space.fault(bad, write=write)

    def _access(self, region: Region, gpas: Addresses, data: Values, *, write: bool) -> None:
        try:
            scratch = self._scratch.pop()
        except IndexError:
            scratch = _Scratch(BATCH)
        try:
            self._access_in(scratch, region, gpas, data, write=write)
        finally:
            self._scratch.append(scratch)

    def _access_in(self, scratch: _Scratch, region: Region, gpas: Addresses, data: Values, *, write: bool) -> None:
        tlb, memory, size = self.tlb[region.id], region.memory.words, gpas.size
        words, pages = scratch.words[:size], scratch.pages[:size]
        np.subtract(gpas, region.gpa, out=words)
        np.right_shift(words, self._space.page_shift, out=pages)
        np.right_shift(words, 3, out=words)

        def move(chosen: Chosen) -> None:
            if chosen is None and write:
                memory[words] = data
            elif chosen is None:
                memory.take(words, out=data, mode="clip")
            else:
                some = words.take(chosen, out=scratch.some_words[: chosen.size], mode="clip")
                if write:
                    memory[some] = data.take(chosen, out=scratch.some_data[: chosen.size], mode="clip")
                else:
                    data[chosen] = memory.take(some, out=scratch.some_data[: chosen.size], mode="clip")

        with self.lock:
            kinds = tlb.lookup(pages, scratch.kinds[:size])
            hits = np.greater_equal(kinds, tlb.writes if write else READ_ONLY, out=scratch.hits[:size])
            count = int(np.count_nonzero(hits))
            if count == size:
                move(None)
            elif count:
                move(hits.nonzero()[0])
        self._clock.add(**{"stores" if write else "loads": size})
        if count < size:
            waiting = np.logical_not(hits, out=hits).nonzero()[0] if count else None
            self._miss(scratch, region, tlb, pages, kinds, waiting, move, write=write)

    def _miss(
        self,
        scratch: _Scratch,
        region: Region,
        tlb: Tlb,
        pages: Pages,
        kinds: Kinds,
        waiting: Chosen,
        move: Callable[[Chosen], None],
        *,
        write: bool,
    ) -> None:
        """Walk for the accesses that the TLB does not let through, resolving their faults, until all are done."""
        # Each walk holds the pages, so that no harvest cleans a leaf between the update and the access that it stands
        # for, and the vCPU's lock, so that a flush waits until the access is over. The fault handler is called with
        # neither: it takes the machine's mmu_lock, which comes before both. So another thread may undo what a fault
        # was resolved with before the access is tried again. That is rare, and several tries are enough; a fault that
        # still comes after all of them is the handler's mistake, and raised.
        misses = rechecks = updates = spurious = 0
        where = pages
        if waiting is not None:
            where = pages.take(waiting, out=scratch.some_pages[: waiting.size], mode="clip")
            kinds = kinds.take(waiting)
        for attempt in range(_TRIES):
            first = int(where.min())
            with self._log.locked(region.id, first, int(where.max()) - first + 1) as s2, self.lock:
                if attempt:
                    kinds = tlb.lookup(where, scratch.kinds[: where.size])
                known = bool(kinds.max() != NONE)  # most often nothing is, and there is nothing to tell apart
                stale = where[kinds == READ_ONLY] if write and known else where[:0]
                tlb.drop(stale)  # a permission fault takes the entry with it, as its handler would
                found = walk(
                    s2,
                    where,
                    write=write,
                    ha=self.ha,
                    hd=self.hd,
                    distinct=tlb.distinct,
                    out=scratch.descs[: where.size],
                )
                done = found.access == DONE
                if done.all():
                    tlb.fill(where, found.kind, found.level)
                    move(waiting)
                else:
                    tlb.fill(where[done], found.kind[done], found.level[done])
                    move(done.nonzero()[0] if waiting is None else waiting[done])
            if not attempt:
                rechecks = int(np.count_nonzero(kinds == CLEAN)) if known else 0
                misses = int(np.count_nonzero(kinds == NONE)) if known else where.size
            spurious += _distinct(where[(kinds == READ_ONLY) & done]) if stale.size else 0
            updates += found.updated
            if done.all():
                break
            waiting = (~done).nonzero()[0] if waiting is None else waiting[~done]
            where = where[~done]
            self._faults.handle(region, where, found.access[~done], write=write)
        else:
            raise OSError(EFAULT, self._forever(region, int(where[0]), found, write=write))
        with self.lock:
            tlb.trim()
        self._clock.add(tlb_misses=misses, rechecks=rechecks, hardware_updates=updates, spurious_faults=spurious)

    def _forever(self, region: Region, page: int, found: Walk, *, write: bool) -> str:
        gpa = region.gpa + (page << self._space.page_shift)
        access = "write" if write else "read"
        fault = tuple(Access)[int(found.access.max())].value
        return f"a {access} of gpa {gpa:#x} can't be handled: after {_TRIES} times it still takes a {fault}"


def _checked(gpas: Addresses) -> Addresses:
    """Return addresses as a workload has them."""
    return check.integers(gpas, "addresses", 0, (1 << 63) - 1)


def _distinct(pages: Pages) -> int:
    return int(np.unique(pages).size)
