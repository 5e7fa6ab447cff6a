"""A VM's memory map: the size of a page, and the slots, by id and by address."""

import struct
from bisect import bisect_right
from dataclasses import dataclass, field
from errno import EFAULT, EINVAL
from typing import Self

import numpy as np
from numpy.typing import NDArray

from hwdbm import check
from hwdbm.errors import LayoutError
from hwdbm.granule import Granule
from hwdbm.memslot import KVM_MEM_LOG_DIRTY_PAGES, Memslot, slot_name
from hwdbm.vm.source import Source

_HEAD = struct.Struct("<II")  # page size, slots
_SLOT = struct.Struct("<IIQQ")  # id, flags, first gfn, pages
_MOST_SLOTS = 32767  # KVM_USER_MEM_SLOTS
_GPA_BITS = 52  # FEAT_LPA: no guest has more


@dataclass(frozen=True, slots=True)
class MemoryMap:
    """The memory of a VM.

    Parameters
    ----------
    page_size : int
        Bytes of a page of the dirty log: 4096, 16384 or 65536.
    slots : tuple of Memslot
        One or more, in the order in which they are sent. None overlaps another.

    Raises
    ------
    LayoutError
        If that isn't so.

    Examples
    --------
    >>> memory = MemoryMap(4096, (Memslot(0, 0, 0x40000, 16, 0), Memslot(1, 0, 0x10, 2, 0)))
    >>> memory.total, [slot.id for slot in memory.by_address], memory.at(0x1_1000, 4096)[1]
    (73728, [1, 0], 4096)
    """

    page_size: int
    slots: tuple[Memslot, ...]
    by_address: tuple[Memslot, ...] = field(init=False, repr=False, compare=False)
    _starts: tuple[int, ...] = field(init=False, repr=False, compare=False)  # of `by_address`, in frames

    def __post_init__(self) -> None:
        object.__setattr__(self, "page_size", check.integer(self.page_size, "page_size", None, error=LayoutError))
        object.__setattr__(self, "slots", check.instances(self.slots, Memslot, "slots"))
        object.__setattr__(self, "by_address", tuple(sorted(self.slots, key=lambda slot: slot.base_gfn)))
        object.__setattr__(self, "_starts", tuple(slot.base_gfn for slot in self.by_address))
        sizes = [granule.page_size for granule in Granule]
        if self.page_size not in sizes:
            raise LayoutError(
                f"a page has {', '.join(map(str, sizes[:-1]))} or {sizes[-1]} bytes, not {self.page_size}"
            )
        if not 1 <= len(self.slots) <= _MOST_SLOTS:
            raise LayoutError(f"a VM has 1 to {_MOST_SLOTS} slots, not {len(self.slots)}")
        if len({slot.id for slot in self.slots}) < len(self.slots):
            raise LayoutError("a slot's id comes twice")
        end, before = 0, None
        for slot in self.by_address:
            if before is not None and slot.base_gfn < end:
                # Runs are sent by address, which must mean one page.
                raise LayoutError(f"{slot_name(slot.id)} overlaps {slot_name(before.id)}")
            end, before = slot.end_gfn, slot
            if end * self.page_size > 1 << _GPA_BITS:
                raise LayoutError(f"{slot_name(slot.id)} ends beyond {_GPA_BITS} bits, at {end * self.page_size:#x}")

    @classmethod
    def of(cls, source: Source) -> Self:
        """Return the layout of a VM. Whether a slot logs is no part of it."""
        check.instance(source, Source, "source")
        return cls(source.page_size, tuple(_plain(slot) for slot in source.slots))

    def at(self, gpa: int, length: int) -> tuple[Memslot, int]:
        """Return the slot that a run of bytes lies in, and where in the slot it begins, in bytes.

        Raises
        ------
        OSError
            EINVAL if it isn't inside of one slot.
        """
        gpa, length = check.integer(gpa, "gpa", None), check.integer(length, "length")
        slot = self._slot_at(gpa // self.page_size)
        if slot is not None:
            start = gpa - slot.base_gfn * self.page_size
            if start + length <= slot.npages * self.page_size:
                return slot, start
        raise OSError(EINVAL, f"gpa {gpa:#x}..{gpa + length - 1:#x} is not inside of one slot")

    def parts(self, gpa: int, length: int) -> list[tuple[Memslot, int, int]]:
        """Return a run of bytes slot by slot: the slot, where in it a part begins, and how long it is, in bytes.

        Raises
        ------
        OSError
            EFAULT where a byte is in no slot.
        """
        gpa, length = check.integer(gpa, "gpa", None), check.integer(length, "length")
        found, here, end = [], gpa, gpa + length
        while here < end:
            slot = self._slot_at(here // self.page_size)
            if slot is None:
                raise OSError(EFAULT, f"{length} bytes at gpa {gpa:#x} can't be reached: no slot is at {here:#x}")
            count = min(end, slot.end_gfn * self.page_size) - here
            found.append((slot, here - slot.base_gfn * self.page_size, count))
            here += count
        return found

    def locate(self, gpas: NDArray[np.int64]) -> NDArray[np.intp]:
        """Return for each address which of `by_address` it is in, -1 where it is in none."""
        check.array(gpas, np.int64, "addresses")
        frames = gpas >> (self.page_size.bit_length() - 1)
        index = np.searchsorted(self._starts, frames, side="right") - 1
        ends = np.array([slot.end_gfn for slot in self.by_address])
        return np.where((index >= 0) & (frames < ends[index]), index, -1)

    def _slot_at(self, gfn: int) -> Memslot | None:
        """Return the slot that a frame is in."""
        index = bisect_right(self._starts, gfn) - 1
        slot = self.by_address[index]
        return slot if index >= 0 and gfn < slot.end_gfn else None

    @property
    def total(self) -> int:
        """Bytes of all slots."""
        return sum(slot.npages for slot in self.slots) * self.page_size

    def to_bytes(self) -> bytes:
        """Return it as the stream has it: little-endian numbers of fixed width."""
        rows = (_SLOT.pack(slot.id, slot.flags, slot.base_gfn, slot.npages) for slot in self.slots)
        return _HEAD.pack(self.page_size, len(self.slots)) + b"".join(rows)

    @classmethod
    def from_bytes(cls, raw: bytes) -> Self:
        """Return the layout that `to_bytes` wrote.

        Raises
        ------
        LayoutError
            If `raw` can't be one.
        """
        raw = bytes(check.octets(raw, "raw"))
        if len(raw) < _HEAD.size:
            raise LayoutError(f"a layout of {len(raw)} bytes has no head")
        page_size, count = _HEAD.unpack_from(raw)
        if len(raw) != _HEAD.size + count * _SLOT.size:
            raise LayoutError(f"a layout of {count} slots has {_HEAD.size + count * _SLOT.size} bytes, got {len(raw)}")
        slots = []
        for slot_id, flags, base_gfn, npages in _SLOT.iter_unpack(raw[_HEAD.size :]):
            if npages < 1:
                raise LayoutError(f"{slot_name(slot_id)} has no pages")
            slots.append(Memslot(slot_id, flags, base_gfn, npages, base_gfn * page_size))
        return cls(page_size, tuple(slots))

    def require(self, other: Self) -> None:
        """Raise `LayoutError`, naming the first difference, unless `other` is the same."""
        check.instance(other, MemoryMap, "other")
        if self.page_size != other.page_size:
            raise LayoutError(f"pages of {other.page_size} bytes don't fit into a VM with pages of {self.page_size}")
        if len(self.slots) != len(other.slots):
            raise LayoutError(f"{len(other.slots)} slots don't fit into a VM with {len(self.slots)}")
        for mine, theirs in zip(self.slots, other.slots, strict=True):
            if _shape(mine) != _shape(theirs):
                raise LayoutError(f"{_said(_plain(theirs))} doesn't fit into {_said(_plain(mine))}")

    def find(self, gpa: NDArray[np.uint64], length: NDArray[np.uint64]) -> tuple[Memslot, NDArray[np.int64]]:
        """Return the slot that runs lie in, and their page indices in it.

        Parameters
        ----------
        gpa, length : (n,) uint64 arrays
            One or more runs, in bytes: whole pages, ascending, without overlap, all inside of one slot.

        Returns
        -------
        Memslot, (n, 2) int64 array
            The slot, and each run's first page in it with its number of pages.

        Raises
        ------
        LayoutError
            If the runs aren't so.
        """
        for array, name in ((gpa, "addresses"), (length, "lengths")):
            check.array(array, np.uint64, name)
        if gpa.ndim != 1 or gpa.shape != length.shape or not gpa.size:
            raise LayoutError(f"runs are one or more, not {gpa.shape} addresses and {length.shape} lengths")
        either = int(np.bitwise_or.reduce(gpa)) | int(np.bitwise_or.reduce(length))
        if either & self._wrong or not length.all():
            raise LayoutError(self._why(either))
        end = gpa + length
        if gpa.size > 1 and (gpa[1:] < end[:-1]).any():
            raise LayoutError("the runs of a frame overlap or descend")
        shift = np.uint64(self.page_size.bit_length() - 1)
        first, last = int(gpa[0] >> shift), int(end[-1] >> shift)
        slot = self._slot_at(first)
        if slot is not None and last <= slot.end_gfn:
            runs = np.empty((gpa.size, 2), dtype=np.int64)
            np.right_shift(gpa, shift, out=runs[:, 0].view(np.uint64))
            np.right_shift(length, shift, out=runs[:, 1].view(np.uint64))
            runs[:, 0] -= slot.base_gfn
            return slot, runs
        raise LayoutError(f"gpa {int(gpa[0]):#x}..{int(end[-1]) - 1:#x} is not inside of one slot")

    @property
    def _wrong(self) -> int:
        """The bits that neither an address nor a length may have."""
        return (1 << 64) - (1 << _GPA_BITS) | self.page_size - 1

    def _why(self, either: int) -> str:
        if either & self.page_size - 1 or not either >> _GPA_BITS:
            return "a run is no whole number of pages"
        return f"a run lies beyond {_GPA_BITS} bits of address"


def _shape(slot: Memslot) -> tuple[int, int, int, int]:
    """Return what doesn't differ between the two sides: not a slot's log, its backing, its generation."""
    return slot.id, slot.flags & ~KVM_MEM_LOG_DIRTY_PAGES, slot.base_gfn, slot.npages


def _plain(slot: Memslot) -> Memslot:
    """Return a slot with its `_shape` alone."""
    return Memslot(*_shape(slot), 0)


def _said(slot: Memslot) -> str:
    return f"{slot_name(slot.id)} (gfn {slot.base_gfn:#x}, {slot.npages} pages, flags {slot.flags:#x})"
