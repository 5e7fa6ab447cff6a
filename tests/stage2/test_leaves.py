"""Leaves against one page at a time: what they find, what they say they read and changed, at any border.

The slot begins in the middle of a stripe, 1100 pages before a 1 GiB border, and ends in the middle of one: seven
entries of level 2, of which the first stands for 76 pages and the last for 77, under two of level 1.
"""

from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np
import pytest

from hwdbm import DirtyBitmap, Granule, Stage2, pte
from hwdbm.errors import InvariantError
from hwdbm.kernels import Tally
from hwdbm.stage2.layout import Layout
from hwdbm.stage2.leaves import LeafAt, Leaves, Record, _unbacked

BASE, NPAGES = 0x40000 - 1100, 1100 + 3 * 512 + 77
LAYOUT = Layout(NPAGES, BASE, Granule.K4)
CUTS = (0, 1, 75, 76, 77, 588, 1100, 1356, 1612, 2124, NPAGES - 77, NPAGES - 1, NPAGES)
RANGES = [(lo, hi) for lo, hi in product(CUTS, repeat=2) if lo <= hi]


def random_leaves(seed: int) -> Leaves:
    """Return leaves with holes, blocks of both levels, and tables with one page of a hundred or more mapped."""
    rng, leaves = np.random.default_rng(seed), Leaves(LAYOUT)
    kinds = rng.choice(["table", "block", "hole"], 2, p=[0.8, 0.1, 0.1])
    leaves.level[1][:] = [some_of(kind, 1, rng) for kind in kinds]
    share = rng.choice([0.01, 0.5, 1.0])
    for index in range(LAYOUT.count(2)):
        start, stop = LAYOUT.span(2, index)
        if kinds[LAYOUT.index(1, max(start, 0))] == "table":
            kind = rng.choice(["table", "block", "hole"], p=[0.5, 0.2, 0.3])
            leaves.level[2][index] = some_of(kind, 2, rng)
            if kind == "table":
                pages = np.arange(max(start, 0), min(stop, NPAGES))
                pages = pages[rng.random(pages.size) < share]
                leaves.level[3][pages] = [some_of("block", 3, rng) for _ in pages]
    return leaves


def some_of(kind: str, level: int, rng: np.random.Generator) -> int:
    if kind == "block":
        writable, dbm = rng.integers(0, 2, 2).tolist()
        return int(pte.make_leaf(0, level)) & ~(pte.S2AP_W | pte.DBM) | pte.S2AP_W * writable | pte.DBM * dbm
    return pte.TABLE if kind == "table" else 0


CASES = [random_leaves(seed) for seed in range(24)]


def entries_of(leaves: Leaves, level: int, lo: int, hi: int) -> list[tuple[int, int, range]]:
    """Return (index, descriptor, its pages in [lo, hi)) of the entries of a level that touch the range."""
    found = []
    for index, desc in enumerate(leaves.level[level].tolist() if lo < hi else ()):
        start, stop = LAYOUT.span(level, index)
        if start < hi and lo < stop:
            found.append((index, desc, range(max(start, lo), min(stop, hi))))
    return found


def runs_below(leaves: Leaves, lo: int, hi: int) -> list[list[int]]:
    """Return the pages of [lo, hi) under tables of level 2, those of one or two stripes between them too."""
    runs: list[list[int]] = []
    last = -9
    for index, desc, pages in entries_of(leaves, 2, lo, hi):
        if desc == pte.TABLE:
            if index - last <= 3:
                runs[-1][1] = pages.stop
            else:
                runs.append([pages.start, pages.stop, pages.start])
            last = index
    return runs


def matching(leaves: Leaves, level: int, match: pte.Match, lo: int, hi: int) -> list[tuple[int, range]]:
    if level == 3:
        pages = (lo + np.flatnonzero(match(leaves.level[3][lo:hi]))).tolist()
        return [(page, range(page, page + 1)) for page in pages]
    return [(index, pages) for index, desc, pages in entries_of(leaves, level, lo, hi) if match(desc)]


def each(cases: list[Leaves] = CASES) -> Iterator[tuple[Leaves, int, int]]:
    for number, leaves in enumerate(cases):
        for lo, hi in RANGES[number % 11 :: 11]:
            yield leaves, lo, hi


def bitmap(pages: set[int]) -> DirtyBitmap:
    return DirtyBitmap.from_pages(sorted(pages), NPAGES)


# --- reading ------------------------------------------------------------------------------------------------


def test_entries_that_are_found(kernels: object) -> None:
    for leaves, lo, hi in each():
        for level, match in product((1, 2), (pte.leaf, pte.table, pte.dirty)):
            found = leaves.find(level, match(level), lo, hi)
            assert found.dtype == np.int64
            assert found.tolist() == [index for index, _ in matching(leaves, level, match(level), lo, hi)]


@pytest.mark.parametrize("flags", range(128))
def test_entries_in_any_runs_are_found(flags: int) -> None:
    """So many runs, so long, so far apart; and what is read under tables is what is asked for, in few runs."""
    leaves = Leaves(LAYOUT)
    leaves.level[2][:] = [pte.TABLE if flags >> i & 1 else 0 for i in range(7)]
    for lo, hi in ((0, NPAGES), (0, 77), (76, 1101), (588, 2124)):
        expected = [index for index, _ in matching(leaves, 2, pte.table(2), lo, hi)]
        assert leaves.find(2, pte.table(2), lo, hi).tolist() == expected
        assert leaves.table_runs(lo, hi).tolist() == runs_below(leaves, lo, hi)


def test_runs_under_tables(kernels: object) -> None:
    for leaves, lo, hi in each():
        runs = leaves.table_runs(lo, hi)
        assert runs.tolist() == runs_below(leaves, lo, hi)
        assert (runs.shape[1], runs.dtype) == (3, np.int64)


def test_entries_without_a_block_are_counted(kernels: object) -> None:
    """An entry that maps nothing is counted as a table is; where one is a block there is no count."""
    for leaves, lo, hi in each():
        above = [entries_of(leaves, level, lo, hi) for level in (1, 2)]
        blocks = any(desc not in (0, pte.TABLE) for entries in above for _, desc, _ in entries)
        assert leaves.tables_alone(lo, hi) == (None if blocks else sum(map(len, above)))


def test_scan_reads_each_entry_once(kernels: object) -> None:
    for leaves, lo, hi in each():
        out = DirtyBitmap(NPAGES)
        read = leaves.scan(pte.dirty, lo, hi, out)
        dirty = {
            page
            for level in (1, 2, 3)
            for _, each in matching(leaves, level, pte.dirty(level), lo, hi)
            for page in each
        }
        assert out == bitmap(dirty)
        above = sum(len(entries_of(leaves, level, lo, hi)) for level in (1, 2))
        assert read == above + sum(stop - start for start, stop, _ in runs_below(leaves, lo, hi))


def test_leaves_of_pages(kernels: object) -> None:
    pages = np.random.default_rng(1).permutation(NPAGES)[:400]
    for leaves in CASES:
        for part in (pages, pages[:1], pages[:0], np.flatnonzero(leaves.level[3])):
            check_leaf_at(leaves, part, leaves.leaf_at(part))


def check_leaf_at(leaves: Leaves, pages: np.ndarray, found: LeafAt) -> None:
    levels = found.level.tolist()
    for page, level, index, desc in zip(pages.tolist(), levels, found.index, found.desc, strict=True):
        at = {above: int(leaves.level[above][LAYOUT.index(above, page)]) for above in (1, 2, 3)}
        assert [above for above in at if pte.leaf(above)(at[above])] == [level] * (level > 0)
        assert (index, desc) == (LAYOUT.index(level or 3, page), at[level or 3])
    assert (found.mapped, found.small) == (len(levels) - levels.count(0), levels.count(3))


def test_extents_end_with_the_slot() -> None:
    spans = [[0, 76], [76, 588], [588, 1100], [1100, 1612], [1612, 2124], [2124, 2636], [2636, NPAGES]]
    assert CASES[0].extent(2, np.arange(7)).tolist() == spans
    assert CASES[0].extent(1, np.arange(2)).tolist() == [[0, 1100], [1100, NPAGES]]


def test_blocks_straddle_a_page_in_the_slot_only() -> None:
    """A block reaches beyond the slot at either end, and nobody splits it for that."""
    leaves = Leaves(LAYOUT)
    leaves.level[2][:] = pte.make_leaf(0, 2)
    leaves.level[2][1] = pte.TABLE
    starts = {0, *range(76, 589), 1100, 1612, 2124, 2636, NPAGES}
    assert [page for page in range(NPAGES + 1) if not leaves.straddles(2, page)] == sorted(starts)
    leaves.level[1][:] = pte.make_leaf(0, 1), pte.TABLE
    assert [page for page in range(NPAGES + 1) if leaves.straddles(1, page)] == list(range(1, 1100))


# --- changing -----------------------------------------------------------------------------------------------


def cleaned(
    leaves: Leaves, lo: int, hi: int, mask: set[int] | None = None
) -> tuple[dict[int, Tally], set[int], set[int]]:
    """Return what cleaning [lo, hi) counts by level, the pages in it, and those of its blocks that lie outside."""
    tallies, out, kept = {}, set[int](), set[int]()
    for level in (1, 2):
        found = matching(leaves, level, pte.dirty(level), lo, hi)
        found = [(index, pages) for index, pages in found if mask is None or mask & set(pages)]
        words = sum(-(-len(pages) // 64) for _, pages in found)
        tallies[level] = Tally(len(entries_of(leaves, level, lo, hi)), len(found), words)
        for index, pages in found:
            start, stop = LAYOUT.span(level, index)
            out |= set(pages)
            kept |= set(range(max(start, 0), min(stop, NPAGES))) - set(pages)
    pages = {page for page, _ in matching(leaves, 3, pte.dirty(3), lo, hi)}
    read = sum(stop - start for start, stop, _ in runs_below(leaves, lo, hi))
    tallies[3] = Tally(read, len(pages), len({page // 64 for page in pages}))
    return tallies, out | pages, kept


def clean_of(leaves: Leaves, lo: int, hi: int) -> list[list[int]]:
    """Return the entries after a cleaning of [lo, hi)."""
    after = [leaves.level[level].tolist() for level in (1, 2, 3)]
    for level in (1, 2, 3):
        for index, _ in matching(leaves, level, pte.dirty(level), lo, hi):
            after[level - 1][index] &= ~pte.S2AP_W
    return after


def test_an_update_counts_what_it_read_changed_and_wrote(kernels: object) -> None:
    for before, lo, hi in each():
        leaves, (tallies, out, kept) = before.copy(), cleaned(before, lo, hi)
        record = Record(DirtyBitmap(NPAGES), DirtyBitmap(NPAGES), DirtyBitmap(NPAGES))
        tally = leaves.update(pte.clean, lo, hi, record)
        assert (tally.read, tally.changed) == tuple(sum(each[i] for each in tallies.values()) for i in (0, 1))
        assert tally.words == sum(each.words for each in tallies.values())
        assert (record.out, record.also, record.kept) == (bitmap(out), bitmap(out), bitmap(kept))
        assert [leaves.level[level].tolist() for level in (1, 2, 3)] == clean_of(before, lo, hi)
        assert leaves.update(pte.clean, lo, hi, record) == Tally(tally.read)
        assert leaves.update_all(2, pte.clean(2), lo, hi, record) == Tally(tallies[2].read)


def test_an_update_of_the_blocks_of_a_mask_counts_as_one_of_all(kernels: object) -> None:
    for before, lo, hi in each():
        first = lo & ~63
        pages = {page for page in range(first, hi) if page % 601 < 3}
        leaves, (tallies, _, _) = before.copy(), cleaned(before, first, hi, pages)
        mask = DirtyBitmap.from_pages([page - first for page in sorted(pages)], hi - first)
        record = Record(DirtyBitmap(NPAGES), DirtyBitmap(NPAGES), DirtyBitmap(NPAGES))
        assert leaves.update_blocks(pte.clean, first, hi, record, mask) == tallies[1] + tallies[2]
        leaves = before.copy()
        everywhere = cleaned(before, first, hi)[0]
        for level in (1, 2):
            assert leaves.update_found(level, pte.clean(level), first, hi, record) == everywhere[level]
            assert leaves.update_found(level, pte.clean(level), first, hi, record) == Tally(everywhere[level].read)


def test_bits_of_a_block_at_the_edge_are_those_of_its_pages_in_the_slot(kernels: object) -> None:
    """Its first page isn't the slot's, and its last is beyond it: no other word may have a bit of it."""
    dirty = int(pte.make_leaf(0, 2, dbm=True, dirty=True)) | pte.CONTIGUOUS
    for index, pages in ((0, range(76)), (6, range(2636, NPAGES))):
        for change in ("exchange", "take_apart", "update_at"):
            leaves = Leaves(LAYOUT)
            leaves.level[2][index] = dirty
            record, at = Record(DirtyBitmap(NPAGES), DirtyBitmap(NPAGES)), np.array([index])
            if change == "exchange":
                assert leaves.exchange(2, at, 0, record).tolist() == [dirty]
            elif change == "take_apart":
                leaves.take_apart(2, at, record)
            else:
                assert leaves.update_at(2, at, pte.clean(2), record, 0, NPAGES) == 1
                assert leaves.update_at(2, at[:0], pte.clean(2), record, 0, NPAGES) == 0
            assert record.out == record.also == bitmap(set(pages)), change


@pytest.mark.parametrize("asked", ["out", "also"])
def test_a_change_at_an_index_tells_whoever_asks(kernels: object, asked: str) -> None:
    leaves = Leaves(LAYOUT)
    leaves.level[3][3] = pte.make_leaf(0, 3, dbm=True, dirty=True)
    record = Record(DirtyBitmap(NPAGES), DirtyBitmap(NPAGES), out_of=None, also_of=None)
    setattr(record, f"{asked}_of", pte.dirty)
    assert leaves.update_at(3, np.array([3]), pte.clean(3), record, 0, NPAGES) == 1
    told = bitmap({3}), bitmap(set())
    assert (record.out, record.also) == (told if asked == "out" else told[::-1])


def test_a_harvest_counts_pages_blocks_and_what_was_saved(kernels: object) -> None:
    """Each of its three parts changes or writes more than one."""
    s2 = Stage2(3 * 512 + 3)
    s2.map(0, 512, pfn=0, level=2, dbm=True)
    s2.map(512, 512, pfn=512, dbm=True)
    s2.map(1024, 512, pfn=1024, dbm=True)
    s2.map(1536, 3, pfn=1536, dbm=True)
    s2.level(2)[0] |= pte.S2AP_W
    s2.level(3)[[512, 577, 600, 640, 1030, 1100, 1200, 1300, 1537]] |= pte.S2AP_W
    s2.unmap(1024, 512)
    out = DirtyBitmap(s2.npages)
    read = 1 + 4 + 2 * 512 + 3  # the stripe between two tables too
    assert s2.harvest_into(out) == Tally(read, 1 + 5, 8 + 4 + 4)
    assert out.ranges().tolist() == [[0, 513], *([page, 1] for page in (577, 600, 640, 1030, 1100, 1200, 1300, 1537))]
    assert s2.harvest_into(out) == Tally(read)


@pytest.mark.parametrize("blocks", [range(7), (0, 3, 6), (1, 2), (6,), (0,)], ids=str)
def test_what_blocks_recorded_is_saved_up_to_the_ends_of_the_slot(kernels: object, blocks: Sequence[int]) -> None:
    """Where they are split, and where a harvest takes a part of one: pages that it doesn't take wait for the next."""
    s2 = Stage2(NPAGES, BASE)
    s2.level(1)[:], spans = pte.TABLE, [s2.layout.span(2, block) for block in blocks]
    s2.level(2)[list(blocks)] = pte.make_leaf(0, 2, dbm=True, dirty=True)
    every = bitmap({page for start, stop in spans for page in range(max(start, 0), min(stop, NPAGES))})
    for lo, hi in RANGES[::4]:
        twin, out = s2.copy(), DirtyBitmap(NPAGES)
        twin.harvest_into(out, lo, hi - lo)
        twin.verify()
        part = DirtyBitmap(NPAGES)
        part.set_range(lo, hi - lo)
        assert out == every & part
        assert twin.harvest() == every - part
    assert s2.split(BASE, NPAGES) == len(blocks)
    s2.verify()
    assert s2.saved.bitmap == every
    assert s2.harvest() == every


@pytest.mark.parametrize("at", [0, 48])
def test_what_a_run_recorded_is_saved_up_to_the_ends_of_the_slot(kernels: object, at: int) -> None:
    s2 = Stage2(64, contiguous=True)
    s2.map(0, 64, pfn=0, dbm=True)
    s2.level(3)[at : at + 16] |= np.uint64(pte.CONTIGUOUS)
    s2.level(3)[at + 8] |= np.uint64(pte.S2AP_W)
    twin, run = s2.copy(), set(range(at, at + 16))
    assert twin.harvest(None, at + 5, 6).pages().tolist() == list(range(at + 5, at + 11))
    twin.verify()
    assert set(twin.harvest().pages().tolist()) == run - set(range(at + 5, at + 11))
    assert s2.clean(DirtyBitmap.from_pages([at + 8], 64)) == 1
    s2.verify()
    assert set(s2.harvest().pages().tolist()) == run - {at + 8}


# --- structure ----------------------------------------------------------------------------------------------


def test_leaves_beyond_what_is_worked_on_together(kernels: object) -> None:
    """Leaves are put, made of blocks, and made into blocks, in parts: each has its own address."""
    first, size = 5, Granule.K64.pages_per_entry(2)
    s2 = Stage2(9 * size + 5 + 3, base_gfn=size - 5, granule=Granule.K64)
    frames = np.arange(9 * size, dtype=np.int64) + 3 * size
    s2.map(size, 9 * size, pfn=frames, dbm=True)
    expected = pte.make_leaf(frames.astype(np.uint64) << np.uint64(16), 3, dbm=True)
    assert np.array_equal(s2.level(3)[first:-3], expected)
    assert not s2.level(3)[:first].any()
    assert not s2.level(3)[-3:].any()
    assert s2.collapse(size, 9 * size) == 9
    blocks = pte.make_leaf((np.arange(3, 12, dtype=np.uint64)) << np.uint64(29), 2, dbm=True) & ~np.uint64(pte.S2AP_W)
    assert s2.level(2).tolist() == [0, *blocks.tolist(), 0]
    assert not s2.level(3).any()
    assert s2.split(size, 9 * size) == 9
    assert np.array_equal(s2.level(3)[first:-3], expected & ~np.uint64(pte.S2AP_W))
    s2.verify()


def test_blocks_at_the_edges_become_the_pages_that_the_slot_has(kernels: object) -> None:
    leaves, memory = Leaves(LAYOUT), np.zeros(NPAGES + 2, dtype=np.uint64)
    leaves.level[3] = memory[1:-1]
    leaves.level[1][:], leaves.level[2][:] = pte.TABLE, pte.make_leaf(np.arange(7, dtype=np.uint64) << np.uint64(21), 2)
    record = Record(DirtyBitmap(NPAGES), DirtyBitmap(NPAGES), out_of=None, also_of=None)
    leaves.split(2, np.arange(7), record)
    frames = np.arange(NPAGES, dtype=np.uint64) + np.uint64(512 - 76)
    assert np.array_equal(memory[1:-1], pte.clean(3)(pte.make_leaf(frames << np.uint64(12), 3)))
    assert not memory[[0, -1]].any()
    assert leaves.level[2].tolist() == [pte.TABLE] * 7


# --- memory -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 64, 513, 100_000])
def test_entries_begin_with_a_line_of_the_cache(count: int) -> None:
    made = [_unbacked(3, count) for _ in range(5)]
    assert [(each.ctypes.data % 64, each.size, each.any()) for each in made] == [(0, count, False)] * 5


# --- checking -----------------------------------------------------------------------------------------------


PAGE, BLOCK = int(pte.make_leaf(0, 3)), int(pte.make_leaf(0, 2))
RESERVED = PAGE & ~pte.TABLE | 1


@pytest.mark.parametrize(
    ("level", "wrong", "desc", "page", "why"),
    [
        (2, (0,), BLOCK, 0, "not zero, and not under a level-1 table"),
        (2, (3, 4, 9), BLOCK, 1100, "not zero, and not under a level-1 table"),
        (3, (0,), PAGE, 0, "not zero, and not under a level-2 table"),
        (3, (75, 76, 700), PAGE, 75, "not zero, and not under a level-2 table"),
        (3, (50_763,), PAGE, 50_763, "not zero, and not under a level-2 table"),
        (3, (60_000, 60_001, 65_535, 69_999), RESERVED, 60_000, "the reserved encoding"),
        (3, (65_536, 65_537), RESERVED, 65_536, "the reserved encoding"),
        (3, (69_999,), RESERVED, 69_999, "the reserved encoding"),
    ],
)
def test_the_first_entry_that_is_wrong_is_named(
    level: int, wrong: tuple[int, ...], desc: int, page: int, why: str
) -> None:
    """One between others too, and in any of the parts that are looked at together."""
    s2 = Stage2(70_000, base_gfn=BASE)
    if level == 3:
        s2.level(1)[:] = s2.level(2)[100:] = pte.TABLE
    s2.verify()
    s2.level(level)[list(wrong)] = desc
    with pytest.raises(InvariantError) as error:
        s2.verify()
    assert str(error.value) == f"gfn {BASE + page:#x}: {pte.describe(desc, level)}: {why}"


def test_a_page_of_the_reserved_encoding_at_the_start() -> None:
    s2 = Stage2(3)
    s2.level(1)[:] = s2.level(2)[:] = pte.TABLE
    s2.level(3)[0] = RESERVED
    with pytest.raises(InvariantError, match=r"^gfn 0x0: .*reserved"):
        s2.verify()
