"""Dirty bitmaps in the forms of other programs: Cloud Hypervisor's tables of ranges, CRIU's run lengths.

What isn't whole pages of the bitmap marks each page that it touches: a page may be marked that wasn't dirty, and none
that was is missed.
"""

import struct
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from hwdbm import check
from hwdbm.bitmap import DirtyBitmap
from hwdbm.errors import BitmapError

# criu/include/magic.h, criu/include/pagemap.h
_COMMON_MAGIC, _PAGEMAP_MAGIC = 0x54564319, 0x56084025
_PARENT, _PRESENT = 1 << 0, 1 << 2
_MOST_PAGES = 0xFFFF_FFFF  # of an entry: nr_pages is of 32 bits
_MOST_MESSAGE = 1 << 16  # bytes of one entry; those that there are have some 30


def to_ranges(bitmap: DirtyBitmap, base: int, page_size: int) -> bytes:
    """Return Cloud Hypervisor's table: an address and a length for each run of dirty pages, as little-endian u64.

    Examples
    --------
    >>> to_ranges(DirtyBitmap.from_pages([0, 1], 8), 0x4000_0000, 4096).hex(" ", 8)
    '0000004000000000 0020000000000000'
    """
    return bitmap.ranges(base=base, unit=page_size).astype("<u8", copy=False).tobytes()


def from_ranges(raw: bytes, npages: int, base: int, page_size: int) -> DirtyBitmap:
    """Return the bitmap of a table of ranges.

    Raises
    ------
    BitmapError
        If it is no table, or a range isn't inside of the bitmap's memory.
    """
    if len(raw) % 16:
        raise BitmapError(f"a table of ranges has rows of 16 bytes, and this has {len(raw)} bytes")
    rows = np.frombuffer(raw, dtype="<u8").reshape(-1, 2).astype(np.uint64)
    return _marked(rows, npages, base, page_size)


def _marked(rows: NDArray[np.uint64], npages: int, base: int, page_size: int) -> DirtyBitmap:
    """Return the bitmap in which each page is dirty that one of some ranges of bytes touches."""
    base, page_size = check.integer(base, "base"), check.integer(page_size, "page_size", 1)
    end = base + npages * page_size
    if end > 1 << 64:
        raise BitmapError(f"{npages} pages of {page_size} from {base:#x} don't fit into 64 bits")
    start, length = rows[:, 0], rows[:, 1]
    # In this order nothing wraps around: what is below the base is found before it is subtracted.
    bad = (start < np.uint64(base)) | (length > np.uint64(end - base))
    offset = start - np.uint64(base)
    bad |= ~bad & (offset > np.uint64(end - base) - length)
    if bad.any():
        one = rows[int(np.flatnonzero(bad)[0])]
        raise BitmapError(
            f"the range of {int(one[1]):#x} bytes at {int(one[0]):#018x} isn't inside of {base:#018x}..{end - 1:#018x}"
        )
    some = length > 0
    first = offset[some] // np.uint64(page_size)
    last = (offset[some] + length[some] - np.uint64(1)) // np.uint64(page_size)
    return DirtyBitmap.from_ranges(np.stack([first, last - first + np.uint64(1)], axis=1).astype(np.int64), npages)


# --- CRIU --------------------------------------------------------------------------------------------------


def to_pagemap(bitmap: DirtyBitmap, base: int, page_size: int) -> bytes:
    """Return a pagemap image of CRIU's: runs of dirty pages are present, those between them are in the parent.

    Raises
    ------
    BitmapError
        If an address doesn't fit into 64 bits.
    """
    out = [struct.pack("<II", _COMMON_MAGIC, _PAGEMAP_MAGIC), _message(_field(1, 1))]
    at = 0
    bitmap.ranges(base=base, unit=page_size)  # that all fits
    for first, count in [*bitmap.ranges().tolist(), [bitmap.npages, 0]]:
        for begin, stop, flags in ((at, first, _PARENT), (first, first + count, _PRESENT)):
            for start in range(begin, stop, _MOST_PAGES):
                some = min(stop - start, _MOST_PAGES)
                parent = _field(3, 1) if flags == _PARENT else b""
                out.append(_message(_field(1, base + start * page_size) + _field(2, some) + parent + _field(4, flags)))
        at = first + count
    return b"".join(out)


def from_pagemap(raw: bytes, npages: int, base: int, page_size: int, pages_of: int = 4096) -> DirtyBitmap:
    """Return the bitmap of a pagemap image: the pages that are in it, and not in its parent.

    Parameters
    ----------
    raw : bytes
        The image.
    npages, base, page_size : int
        The bitmap's memory. Entries outside of it are of other memory of the process, and passed over.
    pages_of : int
        Bytes of a page of the image: the machine's that CRIU ran on.

    Raises
    ------
    BitmapError
        If it is no pagemap image.
    """
    if len(raw) < 8 or struct.unpack_from("<II", raw) != (_COMMON_MAGIC, _PAGEMAP_MAGIC):
        raise BitmapError("no pagemap image of CRIU: its first 8 bytes aren't those of one")
    base, end = check.integer(base, "base"), base + npages * page_size
    rows = []
    messages = _messages(raw, 8)
    next(messages, None)  # which file of pages it belongs to
    for at, fields in messages:
        if 1 not in fields or 2 not in fields:
            raise BitmapError(f"the entry at byte {at} of a pagemap image has no address or no pages")
        if fields.get(3) or fields.get(4, 0) & _PARENT:
            continue
        start, stop = fields[1], fields[1] + fields[2] * pages_of
        if stop > 1 << 64:
            raise BitmapError(f"the entry at byte {at} of a pagemap image ends beyond 64 bits")
        start, stop = max(start, base), min(stop, end)
        if start < stop:
            rows.append((start, stop - start))
    return _marked(np.array(rows, dtype=np.uint64).reshape(-1, 2), npages, base, page_size)


def _field(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _message(body: bytes) -> bytes:
    return struct.pack("<I", len(body)) + body


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _messages(raw: bytes, at: int) -> Iterator[tuple[int, dict[int, int]]]:
    """Yield where each message begins, and the numbers in it."""
    while at < len(raw):
        if len(raw) - at < 4:
            raise BitmapError(f"a pagemap image is cut short at byte {at}")
        (size,) = struct.unpack_from("<I", raw, at)
        if size > min(_MOST_MESSAGE, len(raw) - at - 4):
            raise BitmapError(f"the entry at byte {at} of a pagemap image has {size} bytes, which aren't there")
        yield at, _fields(raw[at + 4 : at + 4 + size], at)
        at += 4 + size


def _fields(body: bytes, where: int) -> dict[int, int]:
    found, at = dict[int, int](), 0
    while at < len(body):
        key, at = _number(body, at, where)
        if key & 7:
            raise BitmapError(f"the entry at byte {where} of a pagemap image has a field that is no number")
        found[key >> 3], at = _number(body, at, where)
    return found


def _number(body: bytes, at: int, where: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(body) and shift < 70:
        byte = body[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if not byte & 0x80:
            if value >> 64:
                break
            return value, at
    raise BitmapError(f"the entry at byte {where} of a pagemap image has a number that doesn't end")
