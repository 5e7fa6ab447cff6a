"""Bitmaps in the forms of Cloud Hypervisor and CRIU: golden bytes, round trips, and what isn't one."""

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwdbm import DirtyBitmap
from hwdbm.errors import BitmapError, ImageError
from hwdbm.image import compare, exchange
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


@pytest.mark.parametrize("most", [1, 3, 64])
def test_entries_of_no_more_pages_than_crius_can_have(most, monkeypatch):
    """A longer run is several of them, and the same when it is read."""
    bitmap = DirtyBitmap.from_ranges([[5, most], [100, 65]], 170)
    long = to_pagemap(bitmap, BASE, 4096)
    monkeypatch.setattr(exchange, "_MOST_PAGES", most)
    raw = to_pagemap(bitmap, BASE, 4096)
    assert from_pagemap(raw, 170, BASE, 4096) == bitmap == from_pagemap(long, 170, BASE, 4096)
    found = [fields for _, fields in exchange._messages(raw, 8)][1:]
    at = 0
    for fields in found:  # one after the other, from the first page to the last
        assert fields[1] == BASE + at * 4096
        assert 0 < fields[2] <= most
        assert fields.keys() == ({1, 2, 4} if fields[4] == 4 else {1, 2, 3, 4})
        at += fields[2]
    assert at == 170


def test_memory_that_ends_where_addresses_do():
    """The last byte of 2^64 may be written; what begins or ends beyond is in no form."""
    last, page = (1 << 64) - 3 * 4096, 4096
    bitmap = DirtyBitmap.from_pages([0, 2], 3)
    assert from_ranges(to_ranges(bitmap, last, page), 3, last, page) == bitmap
    assert from_pagemap(to_pagemap(bitmap, last, page), 3, last, page) == bitmap
    assert from_ranges(struct.pack("<QQ", (1 << 64) - 1, 1), 3, last, page).pages().tolist() == [2]
    assert not from_ranges(struct.pack("<QQ", last, 0), 3, last, page).any()
    with pytest.raises(BitmapError, match=f"4 pages of 4096 from {last:#x} don't fit into 64 bits"):
        from_ranges(b"", 4, last, page)
    with pytest.raises(BitmapError, match="64 bits"):
        to_pagemap(DirtyBitmap.from_pages([3], 4), last, page)
    raw = to_pagemap(bitmap, last, page)
    with pytest.raises(BitmapError, match=f"the entry at byte {len(raw) - 19} of a pagemap image ends beyond 64 bits"):
        from_pagemap(raw, 3, last, page, pages_of=4097)


def test_which_range_is_not_inside():
    """The first of those that aren't, in full."""
    rows = struct.pack("<QQQQQQ", BASE, 4096, BASE + 0x2001, 0x1000, BASE - 1, 1)
    with pytest.raises(BitmapError) as caught:
        from_ranges(rows, 3, BASE, 4096)
    assert str(caught.value) == (
        "the range of 0x1000 bytes at 0x0000000040002001 isn't inside of 0x0000000040000000..0x0000000040002fff"
    )


def test_a_number_of_more_than_ten_bytes_does_not_end():
    """Ten are enough for 64 bits; 2^64 and more is none."""
    for number, why in ((b"\x80" * 9 + b"\x01", "no address"), (b"\x80" * 10 + b"\0", "doesn't end"),
                        (b"\x80" * 9 + b"\x02", "doesn't end"), (b"\xff" * 9 + b"\x01", "no address")):  # fmt: skip
        body = b"\x08" + number
        with pytest.raises(BitmapError, match=rf"at byte {len(GOLDEN)} of a pagemap image has .*{why}"):
            from_pagemap(GOLDEN + struct.pack("<I", len(body)) + body, 8, BASE, 4096)


@pytest.mark.parametrize("step", [1, 4096, 3 * 4096, 32 << 20])
@pytest.mark.parametrize("shift", [0, 1, 4])
def test_memories_that_differ(shift, step, monkeypatch):
    monkeypatch.setattr(compare, "_STEP", step)
    rng = np.random.default_rng(2)
    raw = rng.integers(0, 256, 70 * 4096 + 8, dtype=np.uint8)
    one, two = raw[shift : shift + 70 * 4096], raw[shift : shift + 70 * 4096].copy()
    pages = [0, 1, 63, 64, 69]
    for page in pages:
        two[page * 4096 + int(rng.integers(4096))] ^= 1
    assert differing(one, two, 4096).pages().tolist() == pages
    with pytest.raises(ImageError, match="aren't the same pages"):
        differing(one, two[:-1], 4096)
