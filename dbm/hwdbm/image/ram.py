"""Guest memory in files of other programs: raw RAM, ELF cores, and QEMU's migration files with mapped-ram.

Each is a set of extents: bytes that lie somewhere in the guest. What a file says of itself is checked before it is
used.
"""

import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hwdbm import check
from hwdbm.errors import ImageError
from hwdbm.files import open_regular
from hwdbm.image.raw import check_raw
from hwdbm.image.slots import SLOT_UNIT, Slot, check_slots

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True, eq=False)
class Extent:
    """A run of guest memory in a file.

    Parameters
    ----------
    name : str
        What the file calls it.
    gpa : int or None
        The physical address of its first byte, where the file says so.
    data : (size,) uint8 array
        Its bytes; not to be written.
    page_size : int
        Bytes of a page, where the file says so, else 4096.
    """

    name: str
    gpa: int | None
    data: Bytes = field(repr=False)
    page_size: int = SLOT_UNIT

    @property
    def size(self) -> int:
        """Bytes of it."""
        return int(self.data.size)


def open_ram(
    path: str | os.PathLike[str], *, ram_base: int | None = None, slots: Iterable[Slot] = (), block: str | None = None
) -> dict[Slot, Bytes]:
    """Open a file of guest memory, and return the bytes of each slot.

    Parameters
    ----------
    path : path-like
        The file.
    ram_base : int, optional
        Where in the guest its first byte is, or that of `block`. An ELF core says that itself.
    slots : iterable of Slot, optional
        The slots. Without `ram_base` a raw file holds them one after another by address, and nothing else, as a
        snapshot of Firecracker does. By default there is a slot for each extent.
    block : str, optional
        Which block of a migration file.

    Returns
    -------
    dict of Slot to (size,) uint8 array
        Not to be written. The file must not get shorter meanwhile.

    Raises
    ------
    ImageError
        If the file can't be what it seems, a slot isn't in it, or it isn't said where the memory is.
    OSError
        If it can't be read.
    """
    path = check.path(path, "path")
    slots = check_slots(slots, 64)
    extents = _placed(path, _extents_of(path), ram_base, block)
    if len(extents) == 1 and extents[0].gpa is None:
        return _one_after_another(path, extents[0].data, slots)
    if not slots:
        slots = check_slots((Slot(i, extent.gpa or 0, extent.size) for i, extent in enumerate(extents)), 64)
    return {slot: _inside(path, extents, slot) for slot in slots}


def _extents_of(path: Path) -> tuple[Extent, ...]:
    """Return the extents of a file: one without an address where it is raw.

    Raises
    ------
    ImageError, OSError
        As `open_ram` has them.
    """
    with open_regular(path) as file:
        head = file.read(512)
        if not head:
            raise ImageError(f"{path} is empty")
        mapping = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8)
    check_raw(path, head)
    return (Extent("ram", None, mapping),)


def _placed(path: Path, extents: Sequence[Extent], ram_base: int | None, block: str | None) -> list[Extent]:
    """Return the extents that are asked for, with their addresses."""
    if block is not None:
        chosen = [extent for extent in extents if extent.name == block]
        if not chosen:
            have = ", ".join(extent.name for extent in extents)
            raise ImageError(f"{path} has no block {block!r:.80}; it has {have:.400}")
        extents = chosen
    if ram_base is None:
        return list(extents)
    if len(extents) > 1 or extents[0].gpa is not None:
        raise ImageError(f"{path} says itself where its memory is, or has several blocks: a RAM base is for one alone")
    ram_base = check.integer(ram_base, "the RAM's base", high=(1 << 52) - 1, error=ImageError)
    if ram_base % SLOT_UNIT:
        raise ImageError(f"the RAM's base {ram_base:#x} isn't a multiple of 4 KiB")
    return [Extent(extents[0].name, ram_base, extents[0].data, extents[0].page_size)]


def _one_after_another(path: Path, data: Bytes, slots: Sequence[Slot]) -> dict[Slot, Bytes]:
    if not slots:
        raise ImageError(f"{path} doesn't say where its memory is: give the RAM's base, or slots")
    total = sum(slot.size for slot in slots)
    if total != data.size:
        raise ImageError(f"{path} has {data.size} bytes, and its slots {total}: they lie in it one after another")
    found, at = {}, 0
    for slot in sorted(slots, key=lambda slot: slot.gpa):
        found[slot] = data[at : at + slot.size]
        at += slot.size
    return found


def _inside(path: Path, extents: Sequence[Extent], slot: Slot) -> Bytes:
    """Return the bytes of a slot, which extents that follow each other hold."""
    parts = list(_cut(path, sorted(extents, key=lambda extent: extent.gpa or 0), slot))
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _cut(path: Path, extents: Sequence[Extent], slot: Slot) -> Iterator[Bytes]:
    at = slot.gpa
    for extent in extents:
        if extent.gpa is not None and extent.gpa <= at < extent.gpa + extent.size:
            stop = min(extent.gpa + extent.size, slot.end)
            yield extent.data[at - extent.gpa : stop - extent.gpa]
            at = stop
            if at == slot.end:
                return
    raise ImageError(f"{path} has no memory at {at:#018x}, which is in slot {slot.id}")
