"""AddressSpace: which memslot a guest physical address is in."""

from collections.abc import Iterator
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
        Where the guest sees it, in bytes.
    hva : int
        Where the VMM sees it, in bytes: an opaque number, of which the alignment matters.
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


class AddressSpace:
    """The regions of a machine, by address.

    Parameters
    ----------
    granule : Granule
        The size of a page.
    """

    def __init__(self, granule: Granule) -> None:
        self.page_shift = granule.page_shift
        self.word_shift = granule.page_shift - 3
        self._set(())

    def _set(self, regions: tuple[Region, ...]) -> None:
        self.regions = regions  # by address, as in the map
        shift = self.page_shift
        slots = (Memslot(each.id, 0, each.gpa >> shift, each.size >> shift, each.hva) for each in regions)
        self._map = MemoryMap(1 << shift, tuple(slots)) if regions else None
        self._readonly = np.array([region.readonly for region in regions], dtype=np.bool_)
        self.writable = tuple(region for region in regions if not region.readonly)
        self._linear = np.cumsum([0, *(region.size for region in self.writable)])

    def add(self, region: Region) -> None:
        """Add a region that overlaps no other."""
        self._set(tuple(sorted((*self.regions, region), key=lambda each: each.gpa)))

    def remove(self, slot: int) -> None:
        """Remove a region, if it is there."""
        self._set(tuple(region for region in self.regions if region.id != slot))

    def clear(self) -> None:
        """Remove all regions."""
        self._set(())

    def find(self, slot: int) -> Region:
        """Return a region by its slot's id, or raise ENOENT."""
        for region in self.regions:
            if region.id == slot:
                return region
        raise OSError(ENOENT, f"there is no {slot_name(slot)}")

    def _locate(self, gpas: Addresses) -> NDArray[np.intp]:
        """Return for each address which of `regions` it is in, -1 where it is in none."""
        return np.full(gpas.size, -1) if self._map is None else self._map.locate(gpas)

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
            good &= ~self._readonly[index]
        (wrong,) = (~good).nonzero()
        stop = int(wrong[0]) if wrong.size else gpas.size
        for number in np.unique(index[:stop]).tolist():
            yield self.regions[number], (index[:stop] == number).nonzero()[0]
        if wrong.size:
            yield None, wrong[:1]

    @property
    def writable_size(self) -> int:
        """Bytes in all regions that the guest may write."""
        return int(self._linear[-1])

    def gpas(self, offsets: Addresses) -> Addresses:
        """Return the addresses of offsets into the writable regions, laid end to end."""
        if len(self.writable) == 1:
            return offsets + self.writable[0].gpa
        index = np.searchsorted(self._linear, offsets, side="right") - 1
        bases = np.array([region.gpa for region in self.writable], dtype=np.int64)
        gpas: Addresses = bases[index] + offsets - self._linear[index]
        return gpas
