"""DirtyLog: a VM's dirty pages, with KVM's rules and errno.

GET and CLEAR are ``kvm_get_dirty_log_protect`` and ``kvm_clear_dirty_log_protect`` (Linux 6.x, virt/kvm/kvm_main.c),
their checks in the same order. Every error of theirs is an `OSError` with KVM's errno and the number that was wrong,
and a call that failed has changed nothing.
"""

from collections.abc import Iterator
from errno import EFAULT, EINVAL
from typing import Literal, overload

import numpy as np
from numpy.typing import NDArray

from hwdbm.bitmap import DirtyBitmap, word_count
from hwdbm.dirtylog.lease import Lease
from hwdbm.dirtylog.memory import LoggedMemory
from hwdbm.dirtylog.slot import SlotLog
from hwdbm.dirtylog.stats import FlushHook
from hwdbm.granule import Granule
from hwdbm.memslot import KVM_PHYS_SHIFT, KVM_USER_MEM_SLOTS, Memslots, slot_name

__all__ = ["DirtyLog"]

Mask = DirtyBitmap | NDArray[np.uint64] | bytes | bytearray | memoryview


class DirtyLog(LoggedMemory):
    """The dirty log of a VM.

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
        raises, so does the call that needed the flush, and nothing is lost.
    step_pages : int, optional
        GET, CLEAR and sync work in steps of at most so many pages, a multiple of 64, each complete with its flush and
        holding its own range only. By default a slot is one step. (v2 of the series: 1 << 17, 512 MiB.)
    address_spaces, slot_limit : int
        KVM's ``kvm_arch_nr_memslot_as_ids`` and ``KVM_CAP_NR_MEMSLOTS``.

    Raises
    ------
    OSError
        EINVAL for `initially_set` without `manual_protect`.
    ValueError
        If `step_pages` is no positive multiple of 64, or another parameter is out of range.

    Notes
    -----
    All methods may be called from any thread. Operations on disjoint ranges of whole words of a slot run in parallel,
    those on overlapping ones in the order in which they came.

    While a slot logs, a page whose bit is clear has no leaf that lets the guest write unrecorded. Who changes leaves
    directly (`locked`) keeps to that: with hardware DBM by mapping writable pages with ``dbm=True``, without by
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
    ) -> None:
        if step_pages is not None and (step_pages < 64 or step_pages & 63):
            raise ValueError(f"a step is a positive multiple of 64 pages, not {step_pages}")
        table = Memslots(granule, address_spaces=address_spaces, slot_limit=slot_limit, ipa_bits=ipa_bits)
        super().__init__(table, hw_dbm=hw_dbm, manual_protect=manual_protect, initially_set=initially_set, flush=flush)
        self._step = step_pages

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
        found = self._find(slot)
        found.logging()
        lent = found.get(self._steps(0, found.npages), take=not self._manual)
        return lent if lease else lent.bitmap

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
        """
        self._table.check_id(slot)
        if first_page & 63:
            raise OSError(EINVAL, f"{slot_name(slot)}: first_page {first_page} is not a multiple of 64")
        found = self._find(slot)
        found.logging()
        stop = _check_range(found, first_page, num_pages)
        words = _words(bitmap, num_pages) if num_pages else np.zeros(0, dtype=np.uint64)
        lent = found.clear(self._steps(first_page, stop), first_page, num_pages, words)
        return lent if lease else None

    def sync(self, slot: int, first_page: int = 0, num_pages: int | None = None) -> None:
        """Bring what the leaves recorded into the log: they are clean then, and the pages dirty in the log.

        Calls on disjoint ranges run in parallel threads. Without hardware DBM there is nothing that leaves record.

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
        for _ in self.harvest_steps(slot, first_page, num_pages):
            pass

    def harvest_steps(self, slot: int, first_page: int = 0, num_pages: int | None = None) -> Iterator[tuple[int, int]]:
        """Do as `sync` a step at a time, and yield (first page, pages) after each: nothing is held in between.

        Parameters and errors are `sync`'s.
        """
        self._table.check_id(slot)
        if first_page & 63:
            raise OSError(EINVAL, f"{slot_name(slot)}: first_page {first_page} is not a multiple of 64")
        found = self._find(slot)
        found.logging()
        stop = _check_range(found, first_page, found.npages - first_page if num_pages is None else num_pages)
        return self._synced(found, first_page, stop)

    def _synced(self, found: SlotLog, lo: int, hi: int) -> Iterator[tuple[int, int]]:
        for start, stop in self._steps(lo, hi):
            found.sync(start, stop)
            yield start, stop - start

    def _steps(self, lo: int, hi: int) -> Iterator[tuple[int, int]]:
        step = self._step or max(hi - lo, 1)
        return ((start, min(start + step, hi)) for start in range(lo, hi, step))


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


def _words(bitmap: Mask, num_pages: int) -> NDArray[np.uint64]:
    """Return what KVM would copy of a mask as words, or raise EFAULT if it is shorter.

    They are the mask's own where that is possible: each is read once, under the lock of its step.
    """
    mask = bitmap.words if isinstance(bitmap, DirtyBitmap) else bitmap
    view = mask.data if isinstance(mask, np.ndarray) else memoryview(mask)
    raw = view.cast("B") if view.c_contiguous and view.nbytes else view.tobytes()
    size = 8 * word_count(num_pages)
    if len(raw) < size:
        raise OSError(EFAULT, f"a mask of {num_pages} pages has {size} bytes, got {len(raw)}")
    return np.frombuffer(raw[:size], dtype="<u8")
