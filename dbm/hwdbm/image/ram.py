"""Guest memory in files of other programs: raw RAM, ELF cores, and QEMU's migration files with mapped-ram.

Each is a set of extents: bytes that lie somewhere in the guest. What a file says of itself is checked before it is
used.
"""

import mmap
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, Never

import numpy as np
from numpy.typing import NDArray

from hwdbm import check
from hwdbm.bitmap import DirtyBitmap, word_count
from hwdbm.errors import BitmapError, ImageError, printable
from hwdbm.files import open_regular
from hwdbm.granule import Granule
from hwdbm.image.memory import NOWHERE, Array
from hwdbm.image.raw import HEAD, check_raw
from hwdbm.image.slots import SLOT_UNIT, Slot, check_slots

Bytes = NDArray[np.uint8]

_MOST_SEGMENTS = 1 << 16
_MOST_CAPABILITIES = 256
_GPA_BITS, _SLOT_BITS = 52, 64
_SMALLEST_PAGE, _LARGEST_PAGE = 1 << 10, 1 << 20


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
    slots = check_slots(slots, _SLOT_BITS)
    extents = _placed(path, extents_of(path), ram_base, block)
    first, *_ = extents
    if first.gpa is None:  # then there is no other
        return _one_after_another(path, first.data, slots)
    if not slots:
        found = (Slot(i, extent.gpa or 0, extent.size) for i, extent in enumerate(extents))
        slots = check_slots(found, _SLOT_BITS)
    return {slot: _inside(path, extents, slot) for slot in slots}


def kind_of_ram(path: str | os.PathLike[str]) -> str:
    """Return what a file of guest memory is: ``elf``, ``mapped-ram``, or ``raw`` for anything else."""
    with open_regular(path) as file:
        head = file.read(4)
    return {b"\x7fELF": "elf", b"QEVM": "mapped-ram"}.get(head, "raw")


def extents_of(path: Path) -> tuple[Extent, ...]:
    """Return the extents of a file: one without an address where it is raw.

    Raises
    ------
    ImageError, OSError
        As `open_ram` has them.
    """
    with open_regular(path) as file:
        head = file.read(HEAD)
        if not head:
            raise ImageError(f"{path} is empty")
        # A copy on write: what a bitmap says is zero is made zero here, and not in the file.
        mapping = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), dtype=np.uint8)
        if head.startswith(b"\x7fELF"):
            extents = _core(path, file, mapping)
        elif head.startswith(b"QEVM"):
            extents = _mapped_ram(path, mapping)
        else:
            check_raw(path, head)
            extents = (Extent("ram", None, mapping),)
    for extent in extents:
        extent.data.flags.writeable = False
    return extents


# --- ELF cores ---------------------------------------------------------------------------------------------


def _core(path: Path, file: BinaryIO, mapping: Bytes) -> tuple[Extent, ...]:
    """Return the segments of an ELF core, as QEMU's dump-guest-memory writes it: p_paddr is where each is."""
    from elftools.common.exceptions import ELFError  # noqa: PLC0415  # an extra
    from elftools.elf.elffile import ELFFile  # noqa: PLC0415

    found = []
    no = f"{path} is an ELF file, and no raw image of RAM:"
    try:
        elf = ELFFile(file)
        kind, count = elf["e_type"], elf.num_segments()
        for number in range(count if kind == "ET_CORE" and count <= _MOST_SEGMENTS else 0):
            head = elf.get_segment(number).header
            if head["p_type"] == "PT_LOAD" and head["p_memsz"]:
                found.append((head["p_paddr"], head["p_offset"], head["p_filesz"], head["p_memsz"]))
    except (ELFError, ValueError, KeyError, TypeError, AttributeError, OverflowError, OSError) as error:
        raise ImageError(f"{no} it can't be read: {str(error) or type(error).__name__}") from None
    if kind != "ET_CORE":
        raise ImageError(f"{no} it is of type {kind}, and no core of a guest")
    if count > _MOST_SEGMENTS:
        raise ImageError(f"{no} it has {count} segments, more than {_MOST_SEGMENTS}")
    if not found:
        raise ImageError(f"{no} it is a core without memory")
    found.sort()
    extents, end = [], 0
    for gpa, offset, size, whole in found:
        where = f"{path}: the segment at {gpa:#018x}"
        if gpa < end:
            raise ImageError(f"{where} holds memory that another one has: dump the guest without paging")
        if (gpa | whole) % SLOT_UNIT or gpa + whole > 1 << _GPA_BITS:
            raise ImageError(f"{where} is no whole pages of 4 KiB below 2^{_GPA_BITS}: it has {whole:#x} bytes")
        if size > whole or offset + size > mapping.size:
            raise ImageError(
                f"{where} is cut short: {size:#x} bytes from {offset:#x} on, of a file of {mapping.size:#x}"
            )
        data = mapping[offset : offset + size]
        if size < whole:  # what the file leaves out is zero
            try:
                filled = np.zeros(whole, dtype=np.uint8)
            except (MemoryError, ValueError):
                raise ImageError(f"{where} has {whole:#x} bytes, more than there is memory") from None
            filled[:size] = data
            data = filled
        extents.append(Extent(f"{gpa:#x}", gpa, data))
        end = gpa + whole
    return tuple(extents)


# --- QEMU's mapped-ram -------------------------------------------------------------------------------------

# The stream is big-endian, the bitmap of the host's longs (little-endian here). Names and numbers are those of
# migration/savevm.c and migration/ram.c (since QEMU 9.0), docs/devel/migration/mapped-ram.rst.
_VERSION = 3  # QEMU_VM_FILE_VERSION
_START, _SUBSECTION, _CONFIGURATION = 0x01, 0x05, 0x07
_MEM_SIZE = 0x04  # RAM_SAVE_FLAG_MEM_SIZE
_FLAGS = 0xFFF
_HEADER = struct.Struct(">IQQQ")  # version, page size, offsets of the bitmap and of the pages
_ALIGNMENT = 0x100000


class _Stream:
    """The head of a migration file, read from front to back."""

    def __init__(self, path: Path, data: Bytes) -> None:
        self.path, self.data, self.at = path, data, 0

    def refuse(self, why: str) -> Never:
        raise ImageError(f"{self.path} is a migration stream of QEMU, and no raw image of RAM: {why}")

    def take(self, size: int) -> bytes:
        if not 0 <= size <= self.data.size - self.at:
            self.refuse(f"it is cut short at byte {self.at}")
        self.at += size
        return self.data[self.at - size : self.at].tobytes()

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def text(self, size: int = 1) -> str:
        return printable(self.take(self.number(size)).decode("ascii", "replace"))


def _mapped_ram(path: Path, mapping: Bytes) -> tuple[Extent, ...]:
    """Return the blocks of a migration file with mapped-ram."""
    stream = _Stream(path, mapping)
    stream.take(4)
    version = stream.number(4)
    if version != _VERSION:
        stream.refuse(f"it is of version {version}, and this reads version {_VERSION}")
    kind = stream.number(1)
    if kind == _CONFIGURATION:
        stream.text(4)
        kind = stream.number(1)
        while kind == _SUBSECTION:
            _subsection(stream)
            kind = stream.number(1)
    stream.number(4)  # the section's id
    name = stream.text()
    if kind != _START or name != "ram":
        stream.refuse(f"its first section is {name!r:.40}, and not the RAM; use pmemsave")
    stream.take(8)  # the instance, and the section's version
    left = stream.number(8)
    if not left & _MEM_SIZE:
        stream.refuse("its RAM doesn't begin with a size")
    left &= ~_FLAGS
    blocks: list[Extent] = []
    while left > 0:
        blocks.append(_block(stream))
        left -= blocks[-1].size
        if len(blocks) > _MOST_SEGMENTS:
            stream.refuse(f"it has more than {_MOST_SEGMENTS} blocks")
    if left or not blocks:
        stream.refuse("its blocks aren't as large as it says")
    if len({block.name for block in blocks}) < len(blocks):
        stream.refuse("a block's name comes twice in it")
    return tuple(blocks)


def _subsection(stream: _Stream) -> None:
    name = stream.text()
    stream.take(4)  # its version
    if name == "configuration/capabilities":
        capabilities = [stream.text() for _ in range(min(stream.number(4), _MOST_CAPABILITIES))]
        if "x-ignore-shared" in capabilities:
            stream.refuse("it leaves shared memory out (x-ignore-shared)")
    elif name == "configuration/target-page-bits":
        stream.take(4)
    elif name == "configuration/uuid":
        stream.take(16)
    else:
        stream.refuse(f"it has {name!r:.60}, which isn't known here")


def _block(stream: _Stream) -> Extent:
    name, used = stream.text(), stream.number(8)
    version, page_size, bitmap_at, pages_at = _HEADER.unpack(stream.take(_HEADER.size))
    where = f"its block {name!r:.60}"
    # A stream without mapped-ram has the next block's name here, or pages.
    if version != 1 or bitmap_at != stream.at:
        stream.refuse(
            "migrate to a file with the capability mapped-ram, or write the guest's RAM as it is, as pmemsave does"
        )
    whole = _SMALLEST_PAGE <= page_size <= _LARGEST_PAGE and not page_size & page_size - 1
    if not whole or not used or used % page_size:
        stream.refuse(f"{where} has {used:#x} bytes in pages of {page_size:#x}")
    npages = used // page_size
    words = word_count(npages)
    if pages_at % _ALIGNMENT or pages_at < bitmap_at + 8 * words or pages_at + used > stream.data.size:
        stream.refuse(
            f"{where} has its pages at {pages_at:#x}, where they can't be: the file has {stream.data.size:#x}"
        )
    raw = stream.take(8 * words)
    try:
        held = DirtyBitmap.from_bytes(raw, npages)
    except BitmapError as error:
        stream.refuse(f"{where} has a bitmap that can't be: {error}")
    data = stream.data[pages_at : pages_at + used]
    for first, count in (~held).ranges(unit=page_size).tolist():
        for start in range(first, first + count, _ALIGNMENT):
            part = data[start : min(start + _ALIGNMENT, first + count)]
            if part.any():  # whatever lies there, the page is zero
                part[:] = 0
    stream.at = pages_at + used
    return Extent(name, None, data, page_size)


# --- slots -------------------------------------------------------------------------------------------------


def _placed(path: Path, extents: Sequence[Extent], ram_base: int | None, block: str | None) -> list[Extent]:
    """Return the extents that are asked for, with their addresses."""
    if block is not None:
        chosen = [extent for extent in extents if extent.name == block]
        if not chosen:
            have = ", ".join(extent.name for extent in extents)
            raise ImageError(f"{path} has no block {block!r:.80}; it has {have:.400}")
        extents = chosen
    if len(extents) > 1 and any(extent.gpa is None for extent in extents):
        have = ", ".join(extent.name for extent in extents)
        raise ImageError(f"{path} has several blocks: say which (--block): {have:.400}")
    if ram_base is None:
        return list(extents)
    first, *_ = extents
    if first.gpa is not None:
        raise ImageError(f"{path} says itself where its memory is: a RAM base is for files that don't")
    ram_base = check.integer(ram_base, "the RAM's base", high=(1 << 52) - 1, error=ImageError)
    if ram_base % SLOT_UNIT:
        raise ImageError(f"the RAM's base {ram_base:#x} isn't a multiple of 4 KiB")
    return [replace(first, gpa=ram_base)]


def _one_after_another(path: Path, data: Bytes, slots: Sequence[Slot]) -> dict[Slot, Bytes]:
    if not slots:
        raise ImageError(f"{path} doesn't say where its memory is: give --ram-base, or --slot")
    total = sum(slot.size for slot in slots)
    if total != data.size:
        raise ImageError(f"{path} has {data.size} bytes, and its slots {total}: they lie in it one after another")
    found, at = {}, 0
    for slot in sorted(slots, key=lambda slot: slot.gpa):
        found[slot] = data[at : at + slot.size]
        at += slot.size
    return found


def _inside(path: Path, extents: Sequence[Extent], slot: Slot) -> Bytes:
    """Return the bytes of a slot, which extents in the order of their addresses hold, one after another."""
    first, *more = _cut(path, extents, slot)
    return np.concatenate([first, *more]) if more else first


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


class RamTables:
    """The tables in the extents of a file of guest memory.

    Parameters
    ----------
    path : Path
        The file.
    granule : Granule
        The size of a table.
    ram_base : int, optional
        As for `open_ram`.
    block : str, optional
        As for `open_ram`.

    Raises
    ------
    ImageError, OSError
        As for `open_ram`; or if not one table fits in.
    """

    def __init__(self, path: Path, granule: Granule, *, ram_base: int | None = None, block: str | None = None) -> None:
        extents = _placed(path, extents_of(path), ram_base, block)
        first, *_ = extents
        if first.gpa is None:
            raise ImageError(f"{path} doesn't say where its memory is: give --ram-base")
        self._granule = granule
        self._rows: list[Array] = []
        self._firsts: list[int] = []
        for extent in extents:
            skipped = -(extent.gpa or 0) % granule.page_size
            count = (extent.size - skipped) // granule.page_size
            if count > 0:
                part = extent.data[skipped : skipped + count * granule.page_size]
                # The bytes of a file may lie anywhere: a copy where the words don't lie by themselves.
                words = part if part.ctypes.data % 8 == 0 else part.copy()
                self._rows.append(words.view("<u8").reshape(count, granule.entries))
                self._firsts.append((extent.gpa or 0) + skipped)
        if not self._rows:
            raise ImageError(f"{path}: not one {granule} table fits in")
        self._starts = np.cumsum([0, *(len(rows) for rows in self._rows)])

    @property
    def capacity(self) -> int:
        """Tables that fit into the extents."""
        return int(self._starts[-1])

    @property
    def extent(self) -> str:
        """Which memory it is."""
        last = self._firsts[-1] + self._rows[-1].nbytes - 1
        several = f" (in {len(self._rows)} parts)" if len(self._rows) > 1 else ""
        return f"the image's {self._firsts[0]:#018x}..{last:#018x}{several}"

    def find(self, pa: Array) -> NDArray[np.intp]:
        """Return the number of each table, -1 where it isn't wholly inside."""
        found = np.full(pa.shape, NOWHERE, dtype=np.intp)
        for first, rows, start in zip(self._firsts, self._rows, self._starts.tolist(), strict=False):
            row = (pa - np.uint64(first)) >> np.uint64(self._granule.page_shift)
            inside = row < len(rows)
            found[inside] = row[inside].astype(np.intp) + start
        return found

    def read(self, where: NDArray[np.intp], out: Array) -> Array:
        """Return the tables `where`."""
        result = out[: where.size]
        part = np.searchsorted(self._starts, where, side="right") - 1
        for number in np.unique(part).tolist():
            chosen = part == number
            result[chosen] = self._rows[number][where[chosen] - self._starts[number]]
        return result
