"""Bitmaps in the forms of Cloud Hypervisor and CRIU: golden bytes, round trips, and what isn't one."""

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwdbm import DirtyBitmap
from hwdbm.errors import BitmapError, ImageError
from hwdbm.image.compare import differing
from hwdbm.image.exchange import from_pagemap, from_ranges, to_pagemap, to_ranges

BASE = 0x4000_0000

# By hand, from pagemap.proto: pages_id 1; then 2 pages at 0x40000000 in the parent, one present, one in the parent.
GOLDEN = bytes.fromhex(
    "19435654 25400856 02000000 0801"
    "0c000000 088080808004 1002 1801 2001"
    "0a000000 0880c0808004 1001 2004"
    "0c000000 0880e0808004 1001 1801 2001".replace(" ", "")
)


def bitmaps():
    return st.integers(0, 300).flatmap(
        lambda n: st.sets(st.integers(0, max(n - 1, 0)), max_size=n).map(lambda pages: (pages if n else set(), n))
    )


def test_crius_bytes():
    bitmap = DirtyBitmap.from_pages([2], 4)
    assert to_pagemap(bitmap, BASE, 4096) == GOLDEN
    assert from_pagemap(GOLDEN, 4, BASE, 4096) == bitmap


@given(bitmaps(), st.sampled_from([4096, 16384, 65536]))
def test_there_and_back(case, page):
    pages, npages = case
    bitmap = DirtyBitmap.from_pages(sorted(pages), npages)
    assert from_ranges(to_ranges(bitmap, BASE, page), npages, BASE, page) == bitmap
    assert from_pagemap(to_pagemap(bitmap, BASE, page), npages, BASE, page, pages_of=page) == bitmap


@given(st.lists(st.tuples(st.integers(0, 99_999), st.integers(0, 5000)), max_size=8))
def test_what_is_no_whole_page_marks_each_that_it_touches(found):
    rows = [(start, min(size, 100_000 - start)) for start, size in found]
    raw = b"".join(struct.pack("<QQ", BASE + start, size) for start, size in rows)
    npages = -(-100_000 // 4096)
    want = {at // 4096 for start, size in rows for at in range(start, start + size)}
    assert set(from_ranges(raw, npages, BASE, 4096).pages().tolist()) == want


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"1" * 15, "rows of 16 bytes"),
        (struct.pack("<QQ", BASE - 1, 2), "isn't inside of"),
        (struct.pack("<QQ", BASE, 8 * 4096 + 1), "isn't inside of"),
        (struct.pack("<QQ", BASE + 8 * 4096, 1), "isn't inside of"),
        (struct.pack("<QQ", (1 << 64) - 1, 2), "isn't inside of"),
        (struct.pack("<QQ", BASE, (1 << 64) - 1), "isn't inside of"),
    ],
)
def test_no_table(raw, why):
    with pytest.raises(BitmapError, match=why):
        from_ranges(raw, 8, BASE, 4096)


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"", "first 8 bytes"),
        (b"1" * 40, "first 8 bytes"),
        (GOLDEN[:-1], "which aren't there"),
        (GOLDEN + b"\1", "cut short at byte"),
        (GOLDEN + b"\xff\xff\xff\xff", "which aren't there"),
        (GOLDEN + b"\2\0\0\0\x08\xff", "doesn't end"),
        (GOLDEN + b"\2\0\0\0\x0a\x01", "no number"),
        (GOLDEN + b"\2\0\0\0\x08\x01", "no address or no pages"),
        (GOLDEN + struct.pack("<I", 13) + b"\x08" + b"\xff" * 9 + b"\x01\x10\x01", "beyond 64 bits"),
        (GOLDEN + struct.pack("<I", 12) + b"\x08" + b"\xff" * 9 + b"\x7f\x10", "doesn't end"),
    ],
)
def test_no_pagemap(raw, why):
    with pytest.raises(BitmapError, match=why):
        from_pagemap(raw, 8, BASE, 4096)


def test_other_memory_of_the_process_is_passed_over():
    bitmap = DirtyBitmap(300)
    bitmap.fill()
    raw = to_pagemap(bitmap, BASE, 4096)
    assert from_pagemap(raw, 3, BASE + 4096, 4096).weight() == 3
    assert from_pagemap(raw, 10, BASE + 295 * 4096, 4096).pages().tolist() == [0, 1, 2, 3, 4]
    assert not from_pagemap(raw, 10, 0, 4096).any()
    assert from_pagemap(raw, 2, BASE, 1 << 20, 4096).pages().tolist() == [0, 1]  # larger pages than the image's


@pytest.mark.parametrize("shift", [0, 1, 4])
def test_memories_that_differ(shift):
    rng = np.random.default_rng(2)
    raw = rng.integers(0, 256, 70 * 4096 + 8, dtype=np.uint8)
    one, two = raw[shift : shift + 70 * 4096], raw[shift : shift + 70 * 4096].copy()
    pages = [0, 1, 63, 64, 69]
    for page in pages:
        two[page * 4096 + int(rng.integers(4096))] ^= 1
    assert differing(one, two, 4096).pages().tolist() == pages
    with pytest.raises(ImageError, match="aren't the same pages"):
        differing(one, two[:-1], 4096)
