"""The memslots of an image: which guest physical addresses are memory, and what a bitmap's bits are."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from hwdbm.bitmap import DirtyBitmap
from hwdbm.check import instance, instances, integer
from hwdbm.errors import ImageError
from hwdbm.granule import Granule

SLOT_UNIT = 4096
"""Bytes: what memslots are aligned to and captures count them in, whatever the granule."""


@dataclass(frozen=True, slots=True)
class Slot:
    """A memslot: a run of guest physical memory with a bitmap of its own.

    Parameters
    ----------
    id : int
        Its number, 0 or more.
    gpa : int
        The guest physical address that it begins at: bytes, a multiple of 4 KiB.
    size : int
        Bytes, a multiple of 4 KiB and not 0.

    Raises
    ------
    TypeError
        If one of them is no integer.
    ImageError
        If it can't be a memslot.
    """

    id: int
    gpa: int
    size: int

    def __post_init__(self) -> None:
        for name in ("id", "gpa", "size"):
            number = integer(getattr(self, name), f"a slot's {name}", high=(1 << 64) - 1, error=ImageError)
            object.__setattr__(self, name, number)
        if self.gpa % SLOT_UNIT:
            raise ImageError(f"slot {self.id}: gpa {self.gpa:#x} isn't a multiple of 4 KiB")
        if self.size == 0 or self.size % SLOT_UNIT:
            raise ImageError(f"slot {self.id}: size {self.size:#x} isn't a multiple of 4 KiB, or isn't more than 0")
        if self.end > 1 << 64:
            raise ImageError(f"slot {self.id}: gpa {self.gpa:#x} and size {self.size:#x} reach beyond 64 bits")

    @property
    def end(self) -> int:
        """The guest physical address after its last byte."""
        return self.gpa + self.size

    def frames(self, granule: Granule) -> tuple[int, int]:
        """Return the first guest frame and the count of the whole granules that the slot is in.

        Examples
        --------
        >>> Slot(0, 0x1000, 0x4000).frames(Granule.K16)
        (0, 2)
        """
        instance(granule, Granule, "granule")
        first = self.gpa >> granule.page_shift
        return first, (self.end - 1 >> granule.page_shift) - first + 1

    def finest(self, granule: Granule) -> int:
        """Return the page size that always works: the granule's, or 4 KiB if the slot is odd."""
        instance(granule, Granule, "granule")
        aligned = (self.gpa | self.size) % granule.page_size == 0
        return granule.page_size if aligned else SLOT_UNIT


def check_slots(slots: Iterable[Slot], ipa_bits: int) -> tuple[Slot, ...]:
    """Return the slots in the order of their ids.

    Raises
    ------
    ImageError
        If two have the same id or share memory, or one doesn't fit into the IPA space. KVM doesn't
        take such slots either.
    """
    by_id = sorted(instances(slots, Slot, "slots"), key=lambda slot: slot.id)
    for one, next_one in pairwise(by_id):
        if one.id == next_one.id:
            raise ImageError(f"two slots have the id {one.id}")
    by_gpa = sorted(by_id, key=lambda slot: slot.gpa)
    for one, next_one in pairwise(by_gpa):
        if one.end > next_one.gpa:
            raise ImageError(
                f"slot {one.id} ({one.gpa:#018x}..{one.end - 1:#018x}) and slot {next_one.id} "
                f"({next_one.gpa:#018x}..{next_one.end - 1:#018x}) overlap"
            )
    for slot in by_gpa:
        if slot.end > 1 << ipa_bits:
            raise ImageError(
                f"slot {slot.id} ({slot.gpa:#018x}..{slot.end - 1:#018x}) reaches beyond the "
                f"{ipa_bits} bits of the IPA space"
            )
    return tuple(by_id)


def check_page_size(slot: Slot, granule: Granule, page_size: int | None) -> int:
    """Return the page size in bytes that a bit of the slot's bitmap is to stand for.

    Parameters
    ----------
    slot : Slot
        The slot of the bitmap.
    granule : Granule
        The tables' page, and the default.
    page_size : int or None
        The page size that was asked for, in bytes.

    Raises
    ------
    ImageError
        If it isn't a power of two of 4 KiB or more, or the slot isn't made of whole such pages.
    """
    size = granule.page_size if page_size is None else integer(page_size, "page_size", low=None)
    if size < SLOT_UNIT or size & size - 1:
        raise ImageError(f"a page is a power of two of 4 KiB or more, not {size:#x} bytes")
    if (slot.gpa | slot.size) % size:
        # The lowest set bit is the largest power of two that divides both.
        best = (slot.gpa | slot.size) & -(slot.gpa | slot.size)
        raise ImageError(
            f"slot {slot.id} ({slot.gpa:#018x}, {slot.size:#x} bytes) isn't made of whole pages of "
            f"{size >> 10}K: choose a page size of {best >> 10}K or less"
        )
    return size


def cut(bitmap: DirtyBitmap, slot: Slot, granule: Granule, page_size: int) -> DirtyBitmap:
    """Return the slot's bitmap in pages of `page_size`.

    Parameters
    ----------
    bitmap : DirtyBitmap
        A bit for each granule that `Slot.frames` counts: the slot, rounded outward.
    slot : Slot
        The slot of the bitmap.
    granule : Granule
        Bytes that a bit stands for now.
    page_size : int
        Bytes that a bit is to stand for, as `check_page_size` allowed it. Of a smaller page
        each is dirty whose granule is; of a larger one each that has a dirty granule in it.

    Examples
    --------
    >>> cut(DirtyBitmap.from_pages([1], 2), Slot(0, 0x1000, 0x4000), Granule.K16, 0x1000)
    <DirtyBitmap: 1 of 4 pages dirty>
    """
    if page_size > granule.page_size:
        return bitmap.coarsen(page_size // granule.page_size)
    fine = bitmap.refine(granule.page_size // page_size)
    first, _ = slot.frames(granule)
    skipped = slot.gpa - (first << granule.page_shift)
    return fine.part(skipped // page_size, slot.size // page_size)
