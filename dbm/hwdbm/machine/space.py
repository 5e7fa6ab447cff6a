"""The guest's physical address space: the memslot that an address is in."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from errno import EFAULT, ENOENT

import numpy as np
from numpy.typing import NDArray

from hwdbm.granule import Granule
from hwdbm.machine.frames import Frames
from hwdbm.memslot import Memslot, slot_name
from hwdbm.vm import MemoryMap
from hwdbm.vm.memory import GuestMemory

Addresses = NDArray[np.int64]
Part = tuple["Region | None", NDArray[np.intp] | None]


@dataclass(frozen=True, slots=True)
class Region:
    """A memslot, its bytes and its frames.

    Parameters
    ----------
    id : int
        The slot's id.
    gpa, size : int
        The guest physical address and the size, in bytes.
    hva : int
        The VMM's address of the backing: an opaque number, of which the alignment matters.
    readonly : bool
        Whether the guest may only read.
    memory : GuestMemory
        The bytes.
    frames : Frames
        The host's page table.
    """

    id: int
    gpa: int
    size: int
    hva: int
    readonly: bool
    memory: GuestMemory
    frames: Frames

    @property
    def end(self) -> int:
        """The guest physical address after the last byte."""
        return self.gpa + self.size


@dataclass(frozen=True, slots=True)
class _View:
    """The index of the regions by address."""

    regions: tuple[Region, ...]  # by address, as in the map
    slots: MemoryMap | None
    readonly: NDArray[np.bool_]
    writable: tuple[Region, ...]
    linear: NDArray[np.int64]

    @classmethod
    def of(cls, regions: Iterable[Region], shift: int) -> "_View":
        """Return the view of regions in any order."""
        regions = tuple(sorted(regions, key=lambda each: each.gpa))
        slots = (Memslot(each.id, 0, each.gpa >> shift, each.size >> shift, each.hva) for each in regions)
        writable = tuple(region for region in regions if not region.readonly)
        return cls(
            regions,
            MemoryMap(1 << shift, tuple(slots)) if regions else None,
            np.array([region.readonly for region in regions], dtype=np.bool_),
            writable,
            np.cumsum([0, *(region.size for region in writable)]),
        )


class AddressSpace:
    """The regions of a machine, by address.

    Parameters
    ----------
    granule : Granule
        The size of a page.

    Attributes
    ----------
    end : int
        The guest physical address after the last byte of all regions.
    next_id : int
        The id after the largest.
    """

    def __init__(self, granule: Granule) -> None:
        self.page_shift = granule.page_shift
        self.word_shift = granule.page_shift - 3
        self._by_id: dict[int, Region] = {}
        self.end = self.next_id = 0
        self._seen: _View | None = None

    def add(self, region: Region) -> None:
        """Add a region that overlaps no other."""
        self._by_id[region.id] = region
        self.end, self.next_id = max(self.end, region.end), max(self.next_id, region.id + 1)
        self._seen = None

    def remove(self, slot: int) -> None:
        """Remove a region, if it is there."""
        if self._by_id.pop(slot, None) is not None:
            self.end = max((region.end for region in self._by_id.values()), default=0)
            self.next_id = max(self._by_id, default=-1) + 1
            self._seen = None

    def clear(self) -> None:
        """Remove all regions."""
        self._by_id.clear()
        self.end, self.next_id, self._seen = 0, 0, None

    def __contains__(self, slot: int) -> bool:
        return slot in self._by_id

    def find(self, slot: int) -> Region:
        """Return a region by its slot's id, or raise ENOENT."""
        region = self._by_id.get(slot)
        if region is None:
            raise OSError(ENOENT, f"there is no {slot_name(slot)}")
        return region

    @property
    def _view(self) -> _View:
        """The regions as they are: made once for all of them that are added one after the other."""
        view = self._seen
        if view is None:
            view = self._seen = _View.of(self._by_id.values(), self.page_shift)
        return view

    @property
    def regions(self) -> tuple[Region, ...]:
        """The regions, by address."""
        return self._view.regions

    @property
    def writable(self) -> tuple[Region, ...]:
        """The regions that the guest may write, by address."""
        return self._view.writable

    def _locate(self, gpas: Addresses) -> NDArray[np.intp]:
        """Return for each address which of `regions` it is in, -1 where it is in none."""
        slots = self._view.slots
        return np.full(gpas.size, -1) if slots is None else slots.locate(gpas)

    def fault(self, gpa: int, *, write: bool) -> OSError:
        """Return the error for an access that no handler resolves: EFAULT, with the address."""
        readonly = int(self._locate(np.array([gpa]))[0]) >= 0
        access = "write" if write else "read"
        why = "its slot is read-only" if readonly else "no slot is there"
        return OSError(EFAULT, f"a {access} of gpa {gpa:#x} can't be handled: {why}")

    def split(self, gpas: Addresses, *, write: bool) -> Iterator[Part]:
        """Yield each region with the indices of the accesses to it, None for all.

        The accesses from the first one on that can't be handled are left out; at the end they come with None for the
        region.
        """
        if not gpas.size:
            return
        low, high = int(gpas.min()), int(gpas.max())
        for region in self.regions:
            if region.gpa <= low and high < region.end and not (write and region.readonly):
                yield region, None
                return
        index = self._locate(gpas)
        good = index >= 0
        if write and self.regions:
            good &= ~self._view.readonly[index]
        (wrong,) = (~good).nonzero()
        stop = int(wrong[0]) if wrong.size else gpas.size
        for number in np.unique(index[:stop]).tolist():
            yield self.regions[number], (index[:stop] == number).nonzero()[0]
        if wrong.size:
            yield None, wrong[:1]

    @property
    def writable_size(self) -> int:
        """Bytes in all regions that the guest may write."""
        return int(self._view.linear[-1])

    def gpas(self, offsets: Addresses) -> Addresses:
        """Return the addresses of offsets into the writable regions, laid end to end."""
        writable, linear = self._view.writable, self._view.linear
        if len(writable) == 1:
            return offsets + writable[0].gpa
        index = np.searchsorted(linear, offsets, side="right") - 1
        bases = np.array([region.gpa for region in writable], dtype=np.int64)
        gpas: Addresses = bases[index] + offsets - linear[index]
        return gpas
