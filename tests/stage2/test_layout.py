"""Where entries lie, against the plain arithmetic of guest frames: page by page, for odd bases and sizes."""

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
from effort import EFFORT
from hypothesis import given, settings
from hypothesis import strategies as st

from hwdbm.errors import GfnError
from hwdbm.granule import Granule
from hwdbm.stage2.layout import Layout, any_in, distinct, merged, pieces, runs_of

LEVELS = (0, 1, 2, 3)
# Around the borders of words, stripes and 1 GiB blocks of a 4 KiB granule.
BASES = (0, 1, 63, 64, 511, 512, 513, 0x3FFFF, 0x40000, 0x4_2A15)
SIZES = (1, 2, 63, 64, 65, 511, 512, 513, 1300)
PAGES = {
    Granule.K4: (1 << 27, 1 << 18, 512, 1),
    Granule.K16: (1 << 33, 1 << 22, 2048, 1),
    Granule.K64: (1 << 39, 1 << 26, 8192, 1),
}

granules = pytest.mark.parametrize("granule", Granule, ids=str)


def entry_of(layout: Layout, level: int) -> np.ndarray:
    """Return for each page of the slot the number of its entry, counted from guest frame 0."""
    gfns = np.arange(layout.base_gfn, layout.base_gfn + layout.npages)
    return gfns // PAGES[layout.granule][level]


def check_layout(layout: Layout, cuts: list[int]) -> None:
    """Check each method at each level, and at all ranges between two of `cuts`."""
    for level in LEVELS:
        numbers = entry_of(layout, level)
        first, entries = int(numbers[0]), np.unique(numbers)
        borders = np.flatnonzero(np.diff(numbers))[:100]
        pages = np.unique([0, *borders, *(borders + 1), layout.npages - 1])
        assert [layout.index(level, page) for page in pages.tolist()] == (numbers - first)[pages].tolist()
        assert layout.count(level) == entries.size
        check_spans(layout, level, entries - first)
        for lo, hi in product(cuts, repeat=2):
            check_range(layout, level, numbers - first, lo, hi)
    for level in (0, 1, 2):
        check_children(layout, level)


def check_spans(layout: Layout, level: int, index: np.ndarray) -> None:
    size = PAGES[layout.granule][level]
    number = layout.base_gfn // size + index
    starts = (number * size - layout.base_gfn).tolist()
    spans = [(start, start + size) for start in starts]
    assert [layout.span(level, i) for i in index.tolist()] == spans
    assert [tuple(row) for row in layout.span(level, index).tolist()] == spans
    runs = [[0, 1], [len(spans) // 2, len(spans)]]
    assert layout.bounds(level, np.array(runs)).tolist() == [[spans[lo][0], spans[hi - 1][1]] for lo, hi in runs]


def check_range(layout: Layout, level: int, index: np.ndarray, lo: int, hi: int) -> None:
    inside = np.unique(index[lo:hi]).tolist() if lo < hi else []
    touched = layout.entries(level, lo, hi)
    assert list(range(touched.start, touched.stop)) == inside
    assert inside or touched == slice(0, 0), "its length is stop - start"
    if lo <= hi:
        whole = layout.whole(level, lo, hi)
        assert whole.start <= whole.stop, "its length is stop - start"
        spans = [layout.span(level, i) for i in inside]
        expected = [i for i, (start, stop) in zip(inside, spans, strict=True) if lo <= start and stop <= hi]
        assert list(range(whole.start, whole.stop)) == expected


def check_children(layout: Layout, level: int) -> None:
    """Check that an entry's first child begins where it does, in the slot or before it."""
    count = layout.count(level)
    children = [layout.first_child(level, i) for i in range(count)]
    assert [layout.span(level + 1, child)[0] for child in children] == [layout.span(level, i)[0] for i in range(count)]
    assert layout.first_child(level, np.arange(count)).tolist() == children


@pytest.mark.parametrize("base", BASES, ids=hex)
@granules
def test_layout(granule: Granule, base: int) -> None:
    for npages in SIZES:
        cuts = sorted({0, 1, npages // 2, npages - 1, npages})
        check_layout(Layout(npages, base, granule), cuts)


@granules
@settings(max_examples=40 * EFFORT)
@given(base=st.integers(0, 1 << 30), npages=st.integers(1, 20_000), data=st.data())
def test_any_layout(granule: Granule, base: int, npages: int, data: st.DataObject) -> None:
    cuts = data.draw(st.lists(st.integers(0, npages), min_size=2, max_size=4))
    check_layout(Layout(npages, base, granule), cuts)


def test_a_slot_in_the_middle_of_a_stripe() -> None:
    layout = Layout(1000, 0x1F0, Granule.K4)  # 16 pages, a whole stripe, 472 pages
    assert [layout.span(2, i) for i in range(layout.count(2))] == [(-496, 16), (16, 528), (528, 1040)]
    assert layout.span(1, 0) == (-0x1F0, 0x40000 - 0x1F0)
    assert layout.whole(2, 0, 1000) == slice(1, 2)
    assert layout.entries(2, 15, 17) == slice(0, 2)
    assert [layout.first_child(2, i) for i in range(3)] == [-496, 16, 528]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((0, 0, Granule.K4), "1 page or more, not 0"),
        ((-5, 0, Granule.K4), "1 page or more, not -5"),
        ((1, -1, Granule.K4), "gfn -0x1 and 1 pages of 4K"),
        ((1, 1 << 40, Granule.K4), "gfn 0x10000000000 and 1 pages of 4K don't fit into 52 address bits"),
        ((2, (1 << 36) - 1, Granule.K64), "gfn 0xfffffffff and 2 pages of 64K don't fit"),
    ],
)
def test_layout_rejects(arguments: tuple[int, int, Granule], text: str) -> None:
    with pytest.raises(GfnError, match=text):
        Layout(*arguments)


def test_the_last_frame_is_allowed() -> None:
    assert Layout(1, (1 << 40) - 1, Granule.K4).count(3) == 1
    assert Layout(2, (1 << 36) - 2, Granule.K64).count(2) == 1


# --- ranges -------------------------------------------------------------------------------------------------


def rows(ranges: list[tuple[int, int]]) -> np.ndarray:
    return np.array(ranges, dtype=np.int64).reshape(-1, 2)


def check_runs_of(function: Callable[[Any], Any]) -> None:
    """Check all flags of up to 8 elements."""
    for size in range(9):
        for number in range(1 << size):
            flags = [bool(number >> i & 1) for i in range(size)]
            found = function(np.array(flags, dtype=np.bool_))
            assert found.shape == (len(found), 2)
            assert found.dtype == np.int64
            assert [i for lo, hi in found.tolist() for i in range(lo, hi)] == [i for i in range(size) if flags[i]]
            assert all(hi < lo for hi, lo in zip(found[:-1, 1], found[1:, 0], strict=True)), "not merged"


def check_merged(function: Callable[[Any], Any]) -> None:
    """Check all ways to cut up to 7 pages into sorted ranges with and without gaps."""
    for size in range(8):
        for kinds in product("lmn", repeat=size):  # a lone page, one more of a range, none
            ranges: list[tuple[int, int]] = []
            for page, kind in enumerate(kinds):
                if kind == "l" or (kind == "m" and (not ranges or ranges[-1][1] != page)):
                    ranges.append((page, page + 1))
                elif kind == "m":
                    ranges[-1] = (ranges[-1][0], page + 1)
            flags = np.array([kind != "n" for kind in kinds], dtype=np.bool_)
            assert function(rows(ranges)).tolist() == runs_of(flags).tolist()


def check_any_in(function: Callable[[Any, Any], Any]) -> None:
    """Check each range of three words with one bit set, at and around each border."""
    ranges = [(lo, hi) for lo in range(192) for hi in range(lo + 1, 193)]
    for bit in (0, 1, 62, 63, 64, 65, 100, 127, 128, 191):
        words = np.array([(1 << bit) >> 64 * i & (1 << 64) - 1 for i in range(3)], dtype=np.uint64)
        assert function(words, rows(ranges)).tolist() == [lo <= bit < hi for lo, hi in ranges]
    assert not function(np.zeros(3, dtype=np.uint64), rows(ranges)).any()
    assert function(np.zeros(1, dtype=np.uint64), rows([])).tolist() == []


def check_pieces(function: Callable[[int, int, int], Any]) -> None:
    """Check each range of slots of up to three words, some of larger ones: whole words, and masks for parts of one."""
    for npages in (1, 2, 63, 64, 65, 100, 128, 129, 150, 321, 384):
        for lo, hi in product(range(0, npages + 1, 1 + 63 * (npages > 150)), range(npages, -1, -1)):
            check_cut(list(function(lo, hi, npages)), lo, hi, npages)


def check_cut(cut: list[tuple[int, int, int | None]], lo: int, hi: int, npages: int) -> None:
    pages = []
    for start, stop, mask in cut:
        assert start % 64 == 0
        assert stop % 64 == 0 or stop == npages
        inside = range(start, stop)
        if mask is not None:
            assert 0 < stop - start <= 64
            assert mask >> (stop - start) == 0, "a bit beyond the piece"
            assert mask != (1 << stop - start) - 1, "a whole piece needs no mask"
            inside = [page for page in inside if mask >> page - start & 1]
        assert inside, "an empty piece"
        pages.extend(inside)
    assert pages == list(range(lo, hi))


CHECKS = [(check_runs_of, runs_of), (check_merged, merged), (check_any_in, any_in), (check_pieces, pieces)]


@pytest.mark.parametrize(("check", "function"), CHECKS, ids=lambda value: value.__name__)
def test_ranges(check: Callable[..., None], function: Callable[..., Any]) -> None:
    check(function)


@given(st.lists(st.booleans(), max_size=300))
def test_runs_of_any_flags(flags: list[bool]) -> None:
    found = runs_of(np.array(flags, dtype=np.bool_)).tolist()
    assert [i for lo, hi in found for i in range(lo, hi)] == [i for i, flag in enumerate(flags) if flag]


@given(st.integers(0, (1 << 640) - 1), st.lists(st.tuples(st.integers(0, 639), st.integers(1, 640)), max_size=20))
def test_any_in_any_words(number: int, spans: list[tuple[int, int]]) -> None:
    words = np.frombuffer(number.to_bytes(80, "little"), dtype=np.uint64)
    ranges = [(lo, min(lo + size, 640)) for lo, size in spans]
    assert any_in(words, rows(ranges)).tolist() == [number >> lo & (1 << hi - lo) - 1 != 0 for lo, hi in ranges]


# --- what the checks catch ----------------------------------------------------------------------------------


class SlotRelative(Layout):
    """A layout that counts entries from the slot's first page, as if every base were aligned."""

    __slots__ = ()

    def index(self, level: int, page: int) -> int:
        return page // self.granule.pages_per_entry(level)


class RoundedOut(Layout):
    __slots__ = ()

    def whole(self, level: int, lo: int, hi: int) -> slice:
        return self.entries(level, lo, hi)


class ChildFromZero(Layout):
    __slots__ = ()

    def first_child(self, level: int, index: Any) -> Any:
        return index * self.granule.entries


@pytest.mark.parametrize("mutant", [SlotRelative, RoundedOut, ChildFromZero])
def test_check_of_layouts_catches(mutant: type[Layout]) -> None:
    with pytest.raises(AssertionError):
        check_layout(mutant(1300, 513, Granule.K4), [0, 1, 650, 1300])


def any_in_whole_words(words: Any, ranges: Any) -> Any:
    before = np.concatenate(([0], np.cumsum(words != 0)))
    return before[ranges[:, 1] + 63 >> 6] > before[ranges[:, 0] >> 6]


MUTANTS: list[tuple[Callable[..., None], Callable[..., Any]]] = [
    (check_runs_of, lambda flags: runs_of(flags[:-1])),
    (check_merged, lambda ranges: ranges),
    (check_any_in, any_in_whole_words),
    (check_pieces, lambda lo, hi, npages: [(lo & ~63, min(hi + 63 & ~63, npages), None)]),
    (check_pieces, lambda lo, hi, npages: [piece for piece in pieces(lo, hi, npages) if piece[2] is None]),
]


@pytest.mark.parametrize(("check", "mutant"), MUTANTS)
def test_check_of_ranges_catches(check: Callable[..., None], mutant: Callable[..., Any]) -> None:
    with pytest.raises(AssertionError):
        check(mutant)


@pytest.mark.parametrize("level", [-4, -1, 4, 5, np.int8(-1), np.uint8(4), 1 << 64])
def test_levels_that_there_are_not(level: Any) -> None:
    layout, run = Layout(1000, 0x1F0, Granule.K4), rows([(0, 64)])
    for ask in (
        lambda: layout.index(level, 5),
        lambda: layout.count(level),
        lambda: layout.entries(level, 0, 9),
        lambda: layout.span(level, 1),
        lambda: layout.bounds(level, run),
        lambda: layout.whole(level, 0, 1000),
        lambda: layout.first_child(level, 1),
        lambda: layout.first_child(3, 1),
    ):
        with pytest.raises(ValueError, match="level is 0 to"):
            ask()


@pytest.mark.parametrize("dtype", [np.float64, np.uint64, np.int32, np.bool_, ">i8"])
@pytest.mark.parametrize("method", ["index", "span", "bounds", "first_child"])
def test_arrays_of_another_type_are_refused(method: str, dtype: Any) -> None:
    """One without dimensions is a number, if it is a whole one."""
    layout = Layout(1000, 0x1F0, Granule.K4)
    ask = getattr(layout, method)
    with pytest.raises(TypeError, match=r"int64|native"):
        ask(2, np.zeros(3, dtype=dtype))
    assert len(ask(2, np.zeros((3, 2) if method == "bounds" else 3, dtype=np.int64))) == 3
    if method != "bounds":
        assert np.array_equal(ask(2, np.array(1, dtype=np.uint8)), ask(2, 1))
        with pytest.raises(TypeError):
            ask(2, 1.0)


@pytest.mark.parametrize("wrong", [1.0, "1", None, True, np.array([1])], ids=repr)
def test_ends_of_a_range_are_integers(wrong: Any) -> None:
    """Each of them, of any type: what comes back is a slice of `int`."""
    layout = Layout(1000, 0x1F0, Granule.K4)
    for lo, hi in ((wrong, 600), (3, wrong)):
        with pytest.raises(TypeError, match="is an integer, not"):
            layout.entries(2, lo, hi)
    for lo, hi in ((np.int32(3), 600), (3, np.uint64(600)), (np.array(3), np.int16(600))):
        found = layout.entries(2, lo, hi)
        assert (found, type(found.start), type(found.stop)) == (slice(0, 3), int, int)


def test_a_layout_is_shown_and_compared_by_what_made_it() -> None:
    layout = Layout(1000, 0x1F0, Granule.K4)
    assert repr(layout) == "Layout(npages=1000, base_gfn=496, granule=<Granule.K4: 12>)"
    assert layout == Layout(1000, 0x1F0, Granule.K4) != Layout(1000, 0x1F0, Granule.K16)


@pytest.mark.parametrize(
    ("given", "once"), [([], []), ([7], [7]), ([7, 7], [7]), ([9, 7], [7, 9]), ([3, 1, 3], [1, 3])]
)
def test_numbers_once(given: list[int], once: list[int]) -> None:
    assert distinct(np.array(given, dtype=np.int64)).tolist() == once
