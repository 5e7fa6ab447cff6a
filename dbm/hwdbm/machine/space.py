"""AddressSpace: which memslot a guest physical address is in."""

from collections.abc import Iterator
from dataclasses import dataclass
from errno import EFAULT, ENOENT

import numpy as np
from numpy.typing import NDArray

from hwdbm.granule import Granule
from hwdbm.machine.frames import Frames
from hwdbm.memslot import slot_name
from hwdbm.vm.memory import GuestMemory

__all__ = ["AddressSpace", "Region"]

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
        self.regions: tuple[Region, ...] = ()
        self._set(())

    def _set(self, regions: tuple[Region, ...]) -> None:
        self.regions = regions
        self._bases = np.array([region.gpa for region in regions], dtype=np.int64)
        self._ends = np.array([region.end for region in regions], dtype=np.int64)
        self._readonly = np.array([region.readonly for region in regions], dtype=np.bool_)
        self.writable = tuple(region for region in regions if not region.readonly)
        self._linear = np.cumsum([0, *(region.size for region in self.writable)])

    def add(self, region: Region) -> None:
        """Add a region that overlaps no other."""
        self._set(tuple(sorted((*self.regions, region), key=lambda each: each.gpa)))

    def remove(self, slot: int) -> None:
        """Remove a region by its slot's id."""
        self._set(tuple(region for region in self.regions if region.id != slot))

    def find(self, slot: int) -> Region:
        """Return a region by its slot's id, or raise ENOENT."""
        for region in self.regions:
            if region.id == slot:
                return region
        raise OSError(ENOENT, f"there is no {slot_name(slot)}")

    def fault(self, gpa: int, *, write: bool) -> OSError:
        """Return the error for an access that no handler resolves: EFAULT, with the address."""
        readonly = any(region.gpa <= gpa < region.end for region in self.regions)
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
        index = np.searchsorted(self._bases, gpas, side="right") - 1
        good = index >= 0
        if self.regions:
            good &= gpas < self._ends[index]
            if write:
                good &= ~self._readonly[index]
        (wrong,) = (~good).nonzero()
        stop = int(wrong[0]) if wrong.size else gpas.size
        for number in np.unique(index[:stop]).tolist():
            yield self.regions[number], (index[:stop] == number).nonzero()[0]
        if wrong.size:
            yield None, wrong[:1]

    def runs(self, gpa: int, length: int) -> Iterator[tuple[Region, int, int, int]]:
        """Yield (region, offset in it, offset in the run, bytes) for a run of bytes, slot after slot.

        Raises
        ------
        OSError
            EFAULT where a byte is in no slot, before anything is yielded.
        """
        pieces, done = [], 0
        while done < length:
            here = gpa + done
            region = next((region for region in self.regions if region.gpa <= here < region.end), None)
            if region is None:
                raise OSError(EFAULT, f"{length} bytes at gpa {gpa:#x} can't be reached: no slot is at {here:#x}")
            count = min(length - done, region.end - here)
            pieces.append((region, here - region.gpa, done, count))
            done += count
        yield from pieces

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
