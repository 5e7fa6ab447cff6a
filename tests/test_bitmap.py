"""Bitmaps: KVM's layout in literal bytes, small domains whole against Python sets, and ragged sizes.

The checks take the class, so that each can be shown to catch a broken one.
"""

import copy
import pickle
import tracemalloc
from collections.abc import Callable
from itertools import product
from typing import Any, Self

import numpy as np
import pytest
from bitarray import bitarray
from effort import EFFORT
from hypothesis import given, settings
from hypothesis import strategies as st

from hwdbm import bitmap as module
from hwdbm.bitmap import DirtyBitmap, word_count
from hwdbm.errors import BitmapError

Bitmap = type[DirtyBitmap]
Pages = set[int]

SIZES = (0, 1, 63, 64, 65, 127, 128, 129, 511, 512, 513, (1 << 18) + 16)  # the last is 1 GiB and 16 pages
FACTORS = (1, 2, 3, 4, 7, 64, 65)


# --- sets of pages, which share nothing with the code under test --------------------------------------------


def make(cls: Bitmap, pages: Pages, npages: int) -> DirtyBitmap:
    raw = bytearray((npages + 63) // 64 * 8)
    for page in pages:
        raw[page // 8] |= 1 << page % 8
    return cls.from_bytes(raw, npages)


def pages_of(bitmap: DirtyBitmap) -> Pages:
    """Return the pages by KVM's layout, and check that there are none beyond the end."""
    raw = bitmap.to_bytes()
    assert len(raw) == (bitmap.npages + 63) // 64 * 8
    pages = {8 * i + bit for i, octet in enumerate(raw) if octet for bit in range(8) if octet >> bit & 1}
    assert max(pages, default=-1) < bitmap.npages, "the tail isn't clean"
    return pages


def subset(number: int, offset: int = 0) -> Pages:
    """Return the pages that the bits of `number` stand for, from `offset` on."""
    return {offset + bit for bit in range(number.bit_length()) if number >> bit & 1}


def runs(pages: Pages) -> list[list[int]]:
    """Return the merged runs [first, count]."""
    firsts = sorted(page for page in pages if page - 1 not in pages)
    lasts = sorted(page for page in pages if page + 1 not in pages)
    return [[first, last - first + 1] for first, last in zip(firsts, lasts, strict=True)]


def some(npages: int, share: float, seed: int = 0) -> Pages:
    return set(np.flatnonzero(np.random.default_rng([seed, npages]).random(npages) < share).tolist())


# --- the layout ---------------------------------------------------------------------------------------------


def check_layout(cls: Bitmap) -> None:
    """Check KVM's layout: little-endian 64-bit words, bit 0 the first page, a clean tail."""
    marked = cls.from_pages([0, 9, 63, 64, 100], 101)
    assert marked.to_bytes().hex() == "01020000000000800100000010000000"
    assert marked.words.tolist() == [0x8000_0000_0000_0201, 0x0000_0010_0000_0001]
    assert [page for page in range(128) if marked.bits[page]] == [0, 9, 63, 64, 100]
    full = cls(101)
    full.fill()
    assert full.to_bytes().hex() == "ffffffffffffffff" + "ffffffff1f000000"
    assert (~marked).words.tolist() == [0x7FFF_FFFF_FFFF_FDFE, 0x0000_000F_FFFF_FFFE]


def test_layout() -> None:
    check_layout(DirtyBitmap)


def test_word_count() -> None:
    assert [word_count(npages) for npages in SIZES] == [0, 1, 1, 1, 2, 2, 2, 3, 8, 8, 9, 4097]


def check_sharing(cls: Bitmap) -> None:
    """Check that the words and the bitarray are one memory, whoever writes and however."""
    bitmap = cls(130)
    words, bits = bitmap.words, bitmap.bits
    assert len(bits) == 192, "the tail is in it too"
    bits[64] = 1
    assert words.tolist() == [0, 1, 0]
    words[2] = 2
    assert bits.count() == 2
    assert bits[129] == 1
    bitmap.set_range(62, 3)
    bitmap |= cls.from_pages([0], 130)
    bitmap &= ~cls.from_pages([64], 130)
    bitmap ^= cls.from_pages([1], 130)
    bitmap -= cls.from_pages([129], 130)
    assert [page for page in range(192) if bits[page]] == [0, 1, 62, 63]
    assert bitmap.words is words
    bits.setall(0)
    assert not bitmap.any()
    bitmap.fill()
    assert bits.count() == 130
    bitmap.clear()
    assert not bits.any()


def test_words_and_bitarray_share_memory() -> None:
    check_sharing(DirtyBitmap)


def test_from_words_shares() -> None:
    words = np.array([1, 2], dtype=np.uint64)
    bitmap = DirtyBitmap.from_words(words, 66)
    words[0] = 4
    bitmap.set_range(64, 1)
    assert bitmap.pages().tolist() == [2, 64, 65]
    assert words.tolist() == [4, 3]


def test_copy_is_its_own() -> None:
    bitmap = DirtyBitmap.from_pages([1], 65)
    other = bitmap.copy()
    assert other == bitmap
    other.fill()
    assert bitmap.pages().tolist() == [1]


# --- small domains, whole -----------------------------------------------------------------------------------


def check_algebra(cls: Bitmap) -> None:
    """Check all pairs of bitmaps of up to 6 pages, which lie at the end of a slot of one word and of two."""
    for npages, offset in product(range(7), (0, 61)):
        total = offset + npages if npages else 0
        every = set(range(total))
        for left, right in product(range(1 << npages), repeat=2):
            a, b = subset(left, offset), subset(right, offset)
            x, y = make(cls, a, total), make(cls, b, total)
            assert pages_of(x | y) == a | b
            assert pages_of(x & y) == a & b
            assert pages_of(x ^ y) == a ^ b
            assert pages_of(x - y) == a - b
            assert x.issubset(y) is (a <= b)
            assert (x == y) is (a == b)
            assert (pages_of(x), pages_of(y)) == (a, b), "an operand changed"
        for number in range(1 << npages):
            pages = subset(number, offset)
            assert pages_of(~make(cls, pages, total)) == every - pages


def check_algebra_in_place(cls: Bitmap) -> None:
    for left, right in product(range(1 << 4), repeat=2):
        a, b = subset(left, 62), subset(right, 62)
        other = make(cls, b, 66)
        united, common, either, less = (make(cls, a, 66) for _ in range(4))
        united |= other
        common &= other
        either ^= other
        less -= other
        assert [pages_of(x) for x in (united, common, either, less)] == [a | b, a & b, a ^ b, a - b]
        assert pages_of(other) == b


def check_reading(cls: Bitmap) -> None:
    """Check all bitmaps of up to 10 pages, and of 10 pages across a word's end."""
    places = [(0, npages) for npages in range(11)] + [(59, 10)]
    for offset, npages in places:
        for number in range(1 << npages):
            check_views(make(cls, subset(number, offset), offset + npages), subset(number, offset))


def check_views(bitmap: DirtyBitmap, pages: Pages) -> None:
    """Check whatever tells which pages are dirty."""
    assert bitmap.weight() == len(pages) == bitmap.bits.count()
    assert bitmap.any() is bool(pages)
    assert bitmap.pages().tolist() == sorted(pages)
    ranges = bitmap.ranges()
    assert ranges.tolist() == runs(pages)
    assert ranges.shape == (len(ranges), 2)
    assert pages_of(bitmap) == pages


def check_sizes(cls: Bitmap) -> None:
    """Check refine and coarsen of all bitmaps of up to 8 pages, and of 8 pages across a word's end."""
    places = [(0, npages) for npages in range(9)] + [(60, 8)]
    for (offset, npages), factor in product(places, FACTORS):
        for number in range(1 << npages):
            check_resized(make(cls, subset(number, offset), offset + npages), subset(number, offset), factor)


def check_resized(bitmap: DirtyBitmap, pages: Pages, factor: int) -> None:
    fine, coarse = bitmap.refine(factor), bitmap.coarsen(factor)
    assert (fine.npages, coarse.npages) == (bitmap.npages * factor, -(-bitmap.npages // factor))
    assert pages_of(fine) == {page * factor + part for page in pages for part in range(factor)}
    assert pages_of(coarse) == {page // factor for page in pages}
    assert fine.coarsen(factor) == bitmap


def check_part(cls: Bitmap) -> None:
    """Check each range of a bitmap of 130 pages."""
    pages = some(130, 0.5)
    bitmap = make(cls, pages, 130)
    for first in range(131):
        for npages in range(131 - first):
            part = bitmap.part(first, npages)
            assert part.npages == npages
            assert pages_of(part) == {page - first for page in pages if first <= page < first + npages}
    part.fill()
    assert pages_of(bitmap) == pages, "a part has memory of its own"


def check_set_range(cls: Bitmap) -> None:
    """Check each range of a bitmap of 130 pages, over one that is half full."""
    pages = some(130, 0.5)
    for first in range(131):
        for npages in range(131 - first):
            marked, cleaned = make(cls, pages, 130), make(cls, pages, 130)
            marked.set_range(first, npages)
            cleaned.set_range(first, npages, False)
            assert pages_of(marked) == pages | set(range(first, first + npages))
            assert pages_of(cleaned) == pages - set(range(first, first + npages))


SMALL = [
    check_algebra,
    check_algebra_in_place,
    check_reading,
    check_sizes,
    check_part,
    check_set_range,
]


@pytest.mark.parametrize("check", SMALL, ids=lambda check: check.__name__)
@pytest.mark.alike(2)
def test_small_domain(check: Callable[[Bitmap], None]) -> None:
    check(DirtyBitmap)


# --- ragged and large sizes ---------------------------------------------------------------------------------


def check_everything(cls: Bitmap, a: Pages, b: Pages, npages: int) -> None:
    """Check each operation once on two sets of pages of one size."""
    x, y = make(cls, a, npages), make(cls, b, npages)
    check_views(x, a)
    for result, pages in ((x | y, a | b), (x & y, a & b), (x ^ y, a ^ b), (x - y, a - b)):
        assert pages_of(result) == pages
    assert pages_of(~x) == set(range(npages)) - a
    assert x.issubset(x | y)
    assert x.issubset(y) is (a <= b)
    assert cls.from_pages(list(a), npages) == x == cls.from_pages(x.pages()[::-1], npages)
    assert cls.from_ranges(x.ranges(), npages) == x == cls.from_bytes(x.to_bytes(), npages)
    first = npages // 3
    assert pages_of(x.part(first, npages - first)) == {page - first for page in a if page >= first}
    for factor in (2, 3, 512) if npages < 1000 else (4,):
        check_resized(x, a, factor)


@pytest.mark.parametrize("npages", SIZES)
@pytest.mark.parametrize("share", [0, 0.01, 0.5, 1])
@pytest.mark.alike(3)
def test_size(npages: int, share: float) -> None:
    check_everything(DirtyBitmap, some(npages, share), some(npages, 0.3, seed=1), npages)


@st.composite
def sets(draw: st.DrawFn) -> tuple[Pages, Pages, int]:
    npages = draw(st.sampled_from(SIZES[:-1]) | st.integers(0, 700))
    numbers = st.integers(0, (1 << npages) - 1) | st.sampled_from([0, (1 << npages) - 1])
    return subset(draw(numbers)), subset(draw(numbers)), npages


@settings(max_examples=40 * EFFORT)
@given(sets())
def test_any_two_sets(case: tuple[Pages, Pages, int]) -> None:
    check_everything(DirtyBitmap, *case)


@settings(max_examples=40 * EFFORT)
@given(sets(), st.integers(1, 5), st.sampled_from([0, module._FEW, 65]), st.sampled_from([0, 1 << 60]))
def test_any_two_sets_in_small_chunks(case: tuple[Pages, Pages, int], chunk: int, few: int, sparse: int) -> None:
    # Listings and sizes are made in chunks of words: more of them than words at hand come to meet. Each chunk is listed
    # in one of two ways, and so are runs.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK", chunk)
        patch.setattr(module, "_FEW", few)
        patch.setattr(module, "_SPARSE", sparse)
        check_everything(DirtyBitmap, *case)


@pytest.mark.parametrize("share", [0.001, 0.1, 0.3, 0.9, 1])
def test_pages_and_ranges_at_each_density(share: float) -> None:
    flags = np.random.default_rng(7).random(64 * 300 + 5) < share
    bitmap = DirtyBitmap.from_pages(np.flatnonzero(flags), flags.size)
    assert bitmap.pages().tolist() == np.flatnonzero(flags).tolist()
    assert bitmap.ranges().tolist() == runs(set(np.flatnonzero(flags).tolist()))


def test_listing_goes_on_after_a_chunk() -> None:
    border = 64 * module._CHUNK
    bitmap = DirtyBitmap.from_ranges([[5, 1], [border - 1, 2], [border + 20, 1]], border + 21)
    assert bitmap.pages().tolist() == [5, border - 1, border, border + 20]
    assert bitmap.ranges().tolist() == [[5, 1], [border - 1, 2], [border + 20, 1]]
    assert bitmap.weight() == 4
    assert [bitmap.count(first, border + 21 - first) for first in (5, 6, border, border + 1)] == [4, 3, 2, 1]
    assert [bitmap.count(0, stop) for stop in (border - 1, border, border + 1, border + 20)] == [1, 2, 3, 3]


@given(sets(), st.data())
def test_any_range(case: tuple[Pages, Pages, int], data: st.DataObject) -> None:
    pages, _, npages = case
    first = data.draw(st.integers(0, npages))
    count = data.draw(st.integers(0, npages - first))
    inside = set(range(first, first + count))
    bitmap = make(DirtyBitmap, pages, npages)
    assert pages_of(bitmap.part(first, count)) == {page - first for page in pages & inside}
    assert bitmap.count(first, count) == len(pages & inside)
    bitmap.set_range(first, count)
    assert pages_of(bitmap) == pages | inside
    bitmap.set_range(first, count, False)
    assert pages_of(bitmap) == pages - inside


@given(sets(), st.integers(12, 21), st.integers(12, 21))
def test_a_rescaled_bitmap_has_every_dirty_byte(case: tuple[Pages, Pages, int], shift: int, to: int) -> None:
    """And a page is dirty only if a byte of it was: but for the end of the last, which may reach beyond."""
    pages, _, npages = case
    size, other = 1 << shift, 1 << to
    found = make(DirtyBitmap, pages, npages).rescale(size, other)
    assert found.npages == -(-npages * size // other)
    want = {at // other for page in pages for at in range(page * size, (page + 1) * size, min(size, other))}
    assert pages_of(found) == want
    back = found.rescale(other, size)
    assert pages <= {page for page in pages_of(back) if page < npages}


@pytest.mark.parametrize("sizes", [(0, 4096), (4096, 0), (4096, 12288), (-4096, 4096), (4096, 1 << 63), (1, 1 << 64)])
def test_a_page_has_a_power_of_two(sizes: tuple[int, int]) -> None:
    with pytest.raises(BitmapError, match="a power of two below"):
        DirtyBitmap(8).rescale(*sizes)


def test_so_many_pages_no_bitmap_has() -> None:
    with pytest.raises(BitmapError, match="more than a bitmap has"):
        DirtyBitmap(1 << 20).rescale(1 << 62, 1)


@pytest.mark.parametrize("npages", SIZES[:-1])
def test_a_file(npages: int, tmp_path) -> None:
    bitmap = make(DirtyBitmap, some(npages, 0.3), npages)
    bitmap.save(tmp_path / "words")
    assert (tmp_path / "words").read_bytes() == bitmap.to_bytes()
    assert DirtyBitmap.load(tmp_path / "words", npages) == bitmap
    assert DirtyBitmap.load(tmp_path / "words").pages().tolist() == bitmap.pages().tolist()
    (tmp_path / "words").write_bytes(bitmap.to_bytes() + b"1")
    for wrong in (None, npages, npages + 64):
        with pytest.raises(BitmapError, match="words has"):
            DirtyBitmap.load(tmp_path / "words", wrong)
    if npages % 64:
        (tmp_path / "words").write_bytes(b"\xff" * len(bitmap.to_bytes()))
        with pytest.raises(BitmapError, match="words: bits at or beyond"):
            DirtyBitmap.load(tmp_path / "words", npages)


@pytest.mark.parametrize(("first", "count"), [(-1, 2), (0, 101), (100, 1), (50, -1)])
def test_a_count_is_inside(first: int, count: int) -> None:
    with pytest.raises(BitmapError, match="are not inside of the 100"):
        DirtyBitmap(100).count(first, count)


# --- what others make of it ---------------------------------------------------------------------------------


def check_memory_ranges(cls: Bitmap) -> None:
    """Check Cloud Hypervisor's table: guest address and length in bytes, each a little-endian u64."""
    bitmap = cls.from_pages([0, 1, 2, 63, 64, 129], 130)
    table = bitmap.ranges(base=0x4000_0000, unit=0x1000)
    assert table.dtype == np.uint64
    assert table.tobytes().hex(" ", 8) == (
        "0000004000000000 0030000000000000 "  # 0x4000_0000, 3 pages
        "00f0034000000000 0020000000000000 "  # 0x4003_f000, 2 pages in 2 words
        "0010084000000000 0010000000000000"  # 0x4008_1000, the last
    )


def test_memory_ranges() -> None:
    check_memory_ranges(DirtyBitmap)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([0], []),
        ([0b1], [[0, 1]]),
        ([0b1111_0000_1111], [[0, 4], [8, 4]]),
        ([1 << 63], [[63, 1]]),
        ([0, 0, 1], [[128, 1]]),
        ([1 << 63, 1], [[63, 2]]),
        ([1 << 63, 0, 1], [[63, 1], [128, 1]]),
        ([(1 << 64) - 1] * 3, [[0, 192]]),
        ([0, (1 << 64) - 1, 0], [[64, 64]]),
        ([0b101 << 61, (1 << 64) - 1], [[61, 1], [63, 65]]),
    ],
)
def test_ranges_of_words(words: list[int], expected: list[list[int]]) -> None:
    bitmap = DirtyBitmap.from_words(np.array(words, dtype=np.uint64), 64 * len(words))
    assert bitmap.ranges().tolist() == expected


def test_ranges_reach_the_top_of_the_address_space() -> None:
    bitmap = DirtyBitmap.from_pages([15], 16)
    assert bitmap.ranges(base=(1 << 64) - (16 << 12), unit=1 << 12).tolist() == [[(1 << 64) - 4096, 4096]]


def test_atomic_bitmap() -> None:
    # rust-vmm's vm-memory, backend/atomic_bitmap.rs: 1025 bytes in pages of 128.
    bitmap = DirtyBitmap(-(-1025 // 128))
    assert len(bitmap) == 9
    first, last = 128 // 128, (128 + 129 - 1) // 128  # 129 bytes at 128 cross into the next page
    bitmap.set_range(first, last - first + 1)
    assert bitmap.words.tolist() == [0b110]
    assert [page in bitmap for page in (0, 1, 2, 8)] == [False, True, True, False]
    taken = bitmap.copy()  # get_and_reset
    bitmap.clear()
    assert taken.words.tolist() == [0b110]
    assert not bitmap.any()
    with pytest.raises(BitmapError, match=r"pages 8\.\.9 are not inside of the"):  # rust-vmm clips what is past the end
        bitmap.set_range(8, 2)
    assert not bitmap.any()
    bitmap.set_range(8, 1)
    assert bitmap.part(7, 2).words.tolist() == [0b10]  # a slice at an offset


def test_membership() -> None:
    bitmap = DirtyBitmap.from_pages([0, 64], 65)
    assert [page for page in range(-70, 200) if page in bitmap] == [0, 64]
    assert np.int64(64) in bitmap


# --- bytes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, lambda raw: np.frombuffer(raw, dtype="<u8")])
def test_from_bytes_copies_anything_like_bytes(kind: Callable[[bytes], Any]) -> None:
    raw = bytes(range(16))
    bitmap = DirtyBitmap.from_bytes(kind(raw), 128)
    assert bitmap.to_bytes() == raw
    bitmap.clear()
    assert raw == bytes(range(16))


def check_tails(cls: Bitmap) -> None:
    """Check that each bit that stands for no page is rejected, alone."""
    for npages in (1, 63, 65, 101, 127, 129):
        for bit in range(npages, (npages + 63) // 64 * 64):
            raw = (1 << bit).to_bytes((npages + 63) // 64 * 8, "little")
            with pytest.raises(BitmapError, match=f"at or beyond page {npages} are set: last word 0x"):
                cls.from_bytes(raw, npages)
        last = (1 << npages - 1).to_bytes((npages + 63) // 64 * 8, "little")
        assert pages_of(cls.from_bytes(last, npages)) == {npages - 1}


def test_from_bytes_rejects_tails() -> None:
    check_tails(DirtyBitmap)


@pytest.mark.parametrize("npages", SIZES[:-1])
def test_from_bytes_rejects_sizes(npages: int) -> None:
    right = (npages + 63) // 64 * 8
    for size in {0, 1, right - 8, right - 1, right + 1, right + 8} - {right, -1, -8}:
        with pytest.raises(BitmapError, match=f"{npages} pages has {right} bytes, got {size}"):
            DirtyBitmap.from_bytes(bytes(size), npages)


# --- errors -------------------------------------------------------------------------------------------------


def words(*values: int) -> Any:
    return np.array(values, dtype=np.uint64)


ERRORS: list[tuple[Callable[[DirtyBitmap], Any], str]] = [
    (lambda b: DirtyBitmap(-1), "0 pages or more, not -1"),
    (lambda b: DirtyBitmap.from_words(words(), -3), "0 pages or more, not -3"),
    (lambda b: DirtyBitmap.from_bytes(b"", -3), "0 pages or more, not -3"),
    (lambda b: DirtyBitmap.from_words(words(0, 0), 64), "64 pages has 1 words, got 2"),
    (lambda b: DirtyBitmap.from_words(words(0, 4), 66), "page 66 are set: last word 0x0000000000000004"),
    (lambda b: DirtyBitmap.from_words(words(0, 0, 0, 0)[::2], 128), r"uint64 array, not uint64 of shape \(2,\)"),
    (lambda b: DirtyBitmap.from_words(words(0).view(np.int64), 64), "not int64 of shape"),
    (lambda b: DirtyBitmap.from_words(words(0).astype(">u8"), 64), "not >u8|not uint64"),
    (lambda b: DirtyBitmap.from_words(words(0, 0).reshape(1, 2), 128), r"shape \(1, 2\)"),
    (lambda b: DirtyBitmap.from_pages([3, 70], 70), "pages is 0 to 69, not 70"),
    (lambda b: DirtyBitmap.from_pages([3, -1], 70), "pages is 0 to 69, not -1"),
    (lambda b: DirtyBitmap.from_pages([1 << 70], 70), "pages is 0 to 69, not 0x400000000000000000"),
    (lambda b: b.ranges(base=(1 << 64) - 69), "70 pages of 1 from 0xffffffffffffffbb don't fit"),
    (lambda b: b.ranges(unit=1 << 60), "don't fit into 64 bits"),
    (lambda b: DirtyBitmap.from_ranges([[3, 4], [60, 11]], 70), "60..70 are not inside of the 70"),
    (lambda b: b.set_range(0, 71), "0..70 are not inside of the 70"),
    (lambda b: b.set_range(-1, 1), "-1..-1 are not inside of the 70"),
    (lambda b: b.set_range(71, 0), "71..70 are not inside of the 70"),
    (lambda b: b.set_range(5, -1, False), "5..3 are not inside of the 70"),
    (lambda b: b.part(64, 7), "64..70 are not inside of the 70"),
    (lambda b: b.part(-1, 1), "-1..-1 are not inside of the 70"),
    (lambda b: b.part(0, -1), "0..-2 are not inside of the 70"),
    (lambda b: b.refine(0), "1 part or more, not 0"),
    (lambda b: b.coarsen(-2), "1 part or more, not -2"),
    *(
        (lambda b, act=act: act(b, DirtyBitmap(71)), "70 and 71 pages don't combine")
        for act in (
            DirtyBitmap.__or__,
            DirtyBitmap.__and__,
            DirtyBitmap.__xor__,
            DirtyBitmap.__sub__,
            DirtyBitmap.__ior__,
            DirtyBitmap.__iand__,
            DirtyBitmap.__ixor__,
            DirtyBitmap.__isub__,
            DirtyBitmap.issubset,
        )
    ),
]


@pytest.mark.parametrize(("act", "text"), ERRORS)
def test_error_names_the_number_and_changes_nothing(act: Callable[[DirtyBitmap], Any], text: str) -> None:
    bitmap = DirtyBitmap.from_pages([0, 3, 69], 70)
    with pytest.raises(BitmapError, match=text):
        act(bitmap)
    assert pages_of(bitmap) == {0, 3, 69}


def test_only_bitmaps_combine() -> None:
    with pytest.raises(TypeError, match="not bitarray"):
        DirtyBitmap(64) | bitarray(64)
    assert DirtyBitmap(0) != b""


def test_truth_and_hash_are_not_defined() -> None:
    with pytest.raises(TypeError, match="any\\(\\), weight\\(\\) or len\\(\\)"):
        bool(DirtyBitmap(64))
    with pytest.raises(TypeError, match="unhashable"):
        hash(DirtyBitmap(64))


def test_verify() -> None:
    bitmap = DirtyBitmap(70)
    bitmap.words[1] = 0x3F
    bitmap.verify()
    bitmap.words[1] = 0x40
    with pytest.raises(BitmapError, match="beyond page 70 are set: last word 0x0000000000000040"):
        bitmap.verify()


def test_repr() -> None:
    assert repr(DirtyBitmap.from_pages([1, 69], 70)) == "<DirtyBitmap: 2 of 70 pages dirty>"


# --- what the checks catch ----------------------------------------------------------------------------------


class BigEndian(DirtyBitmap):
    __slots__ = ()

    @property
    def bits(self) -> bitarray:
        return bitarray(buffer=self.words, endian="big")


class Unshared(DirtyBitmap):
    __slots__ = ()

    @property
    def bits(self) -> bitarray:
        return bitarray(super().bits)


class Rebinding(DirtyBitmap):
    __slots__ = ()

    def __ior__(self, other: DirtyBitmap) -> Self:
        self._words = self.words | other.words
        return self


class DirtyTail(DirtyBitmap):
    __slots__ = ()

    def __invert__(self) -> "DirtyTail":
        inverted = type(self)(self.npages)
        inverted.words[:] = ~self.words
        return inverted


class SwappedDifference(DirtyBitmap):
    __slots__ = ()

    def __sub__(self, other: DirtyBitmap) -> DirtyBitmap:
        return other ^ (self & other)


class SymmetricDifference(DirtyBitmap):
    __slots__ = ()
    __isub__ = DirtyBitmap.__ixor__


class UnmergedRanges(DirtyBitmap):
    __slots__ = ()

    def ranges(self, base: int = 0, unit: int = 1) -> Any:
        cuts = [self.part(first, min(64, self.npages - first)) for first in range(0, self.npages, 64)]
        rows = [DirtyBitmap.ranges(cut, base + 64 * i * unit, unit) for i, cut in enumerate(cuts)]
        return np.concatenate([np.empty((0, 2), dtype=np.uint64), *rows])


class OneTooMany(DirtyBitmap):
    __slots__ = ()

    def set_range(self, first: int, npages: int, value: bool = True) -> None:
        super().set_range(first, min(npages + 1, self.npages - first), value)


class OverTheTail(DirtyBitmap):
    __slots__ = ()

    def part(self, first: int, npages: int) -> "OverTheTail":
        cut = super().part(first, npages)
        whole = super().part(first, min(self.npages - first, cut.words.size * 64))
        cut.words[:] = whole.words[: cut.words.size]
        return cut


class FirstPartOnly(DirtyBitmap):
    __slots__ = ()

    def refine(self, factor: int) -> DirtyBitmap:
        return self.from_pages(self.pages() * factor, self.npages * factor)


class RoundedDown(DirtyBitmap):
    __slots__ = ()

    def coarsen(self, factor: int) -> DirtyBitmap:
        size = self.npages // factor
        pages = self.pages() // factor
        return self.from_pages(pages[pages < size], size)


class AnyTail(DirtyBitmap):
    __slots__ = ()

    def verify(self) -> None:
        pass


class CountedWords(DirtyBitmap):
    __slots__ = ()

    def weight(self) -> int:
        return int(np.count_nonzero(self.words))


MUTANTS = [
    (check_layout, BigEndian),
    (check_layout, DirtyTail),
    (check_sharing, Unshared),
    (check_sharing, Rebinding),
    (check_algebra, DirtyTail),
    (check_algebra, SwappedDifference),
    (check_algebra_in_place, SymmetricDifference),
    (check_reading, CountedWords),
    (check_reading, UnmergedRanges),
    (check_sizes, FirstPartOnly),
    (check_sizes, RoundedDown),
    (check_part, OverTheTail),
    (check_set_range, OneTooMany),
    (check_memory_ranges, UnmergedRanges),
]


@pytest.mark.parametrize(("check", "mutant"), MUTANTS, ids=lambda value: value.__name__)
def test_check_catches(check: Callable[[Bitmap], None], mutant: Bitmap) -> None:
    with pytest.raises(AssertionError):
        check(mutant)


def test_check_of_tails_catches() -> None:
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        check_tails(AnyTail)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b)), DirtyBitmap.copy])
def test_a_copys_bits_share_its_own_words(copied: Callable[[DirtyBitmap], DirtyBitmap]) -> None:
    bitmap = DirtyBitmap.from_pages([3], 70)
    assert bitmap.bits[3] == 1
    twin = copied(bitmap)
    twin.bits[65] = 1
    assert twin.pages().tolist() == [3, 65]
    assert bitmap.pages().tolist() == [3]


@pytest.mark.parametrize("words", [np.zeros(1, np.uint64), np.zeros(64, np.uint64), None, [0]])
def test_words_stay_the_bitmaps_own(words):
    bitmap = DirtyBitmap.from_pages([3], 4096)
    with pytest.raises(AttributeError, match="words are its own"):
        bitmap.words = words
    with pytest.raises(AttributeError):
        bitmap.npages = 1 << 40
    bitmap.words |= np.uint64(0)
    assert bitmap.pages().tolist() == [3]


def test_ranges_come_back_from_rows_of_any_integer_type():
    rng = np.random.default_rng(3)
    for npages in (1, 63, 64, 65, 511, 512, 513, 4000):
        bitmap = DirtyBitmap.from_pages(np.flatnonzero(rng.random(npages) < 0.5), npages)
        for rows in (bitmap.ranges(), bitmap.ranges().astype(np.int16), bitmap.ranges().tolist()):
            assert DirtyBitmap.from_ranges(rows, npages) == bitmap
    for wrong in ([[0.9, 1.9]], np.array([[0, 1]], dtype=float), [["0", "1"]]):
        with pytest.raises(TypeError):
            DirtyBitmap.from_ranges(wrong, 64)
    for wrong in ([[0, 65]], [[64, 1]], [[-1, 2]], np.array([[2**64 - 1, 2]], dtype=np.uint64), [[1, 2, 3]]):
        with pytest.raises(BitmapError):
            DirtyBitmap.from_ranges(wrong, 64)


@pytest.mark.parametrize("factor", [64, 65, 100, 511, 4096, 40_000, 1 << 20])
@pytest.mark.parametrize("density", [0.0, 0.0003, 0.4, 1.0])
def test_many_pages_in_one(factor: int, density: float) -> None:
    npages = 100_003
    bitmap = DirtyBitmap.from_pages(np.flatnonzero(np.random.default_rng(factor).random(npages) < density), npages)
    expected = np.unique(bitmap.pages() // factor)
    assert bitmap.coarsen(factor).pages().tolist() == expected.tolist()
    assert len(bitmap.coarsen(factor)) == -(-npages // factor)


@pytest.mark.parametrize("factor", [(1 << 15) - 1, 1 << 15, (1 << 15) + 1, 1 << 17])
def test_one_page_of_many_parts(factor: int) -> None:
    fine = DirtyBitmap.from_pages([0, 2, 3], 5).refine(factor)
    assert fine.ranges().tolist() == [[0, factor], [2 * factor, 2 * factor]]
    assert len(fine) == 5 * factor
    fine.verify()


def test_a_large_factor_takes_no_memory_beside_the_result() -> None:
    big = DirtyBitmap.from_pages([5, (1 << 30) - 1], 1 << 30)
    tracemalloc.start()
    try:
        assert big.coarsen(1 << 29).pages().tolist() == [0, 1]
        assert DirtyBitmap.from_pages([0], 1).refine(1 << 26).weight() == 1 << 26
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("npages", [1, 63, 64, 65, 128])
def test_a_page_beyond_the_last_is_in_none(npages: int) -> None:
    full = ~DirtyBitmap(npages)
    assert [page in full for page in (-1, 0, npages - 1, npages, npages + 63, 1 << 64)] == [
        False,
        True,
        True,
        *[False] * 3,
    ]
