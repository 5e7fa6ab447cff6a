"""The verbs on arrays of pages, each against the verb on one page, or one descriptor at a time."""

import numpy as np
import pytest
from effort import EFFORT
from hypothesis import given, settings
from hypothesis import strategies as st

from hwdbm import DirtyBitmap, Granule, Stage2, pte, walker
from hwdbm.errors import BitmapError, GfnError
from hwdbm.testing import differences, stage2s

FEW = settings(max_examples=25 * EFFORT)
PLACES = st.lists(st.integers(0, 1 << 16), max_size=30)


def one_by_one(s2, pages, update):
    """Return a twin on which `update` was applied to the leaf of each page, how many have one, and how many changed."""
    twin, found, leaves = s2.copy(), 0, set()
    for page in pages:
        for level in (1, 2, 3):
            index = s2.layout.index(level, page)
            if pte.leaf(level)(int(s2.level(level)[index])):
                found += 1
                leaves.add((level, index))
    changed = 0
    for level, index in leaves:
        desc = int(s2.level(level)[index])
        changed += update(level).where(desc)
        twin.level(level)[index] = update(level)(desc)
    return twin, found, changed


def save_of_blocks(before, after, pages):
    """Save what blocks of pages recorded: they are to become untracked, and the caller marks these pages only."""
    for page in pages:
        block = walker._walk(before, page)
        if block and block.level < 3 and pte.dirty(block.level)(block.desc):
            for each in block.pages:
                after.saved.widen(each, each + 1)
                after.saved.bitmap.set_range(each, 1)


@FEW
@given(s2=stage2s(most=1600), places=PLACES)
def test_leaf_at(kernels, s2, places):
    pages = [place % s2.npages for place in places]
    found = s2.leaf_at(np.array(pages, dtype=np.uint16))
    for i, page in enumerate(pages):
        want = walker._walk(s2, page)
        got = int(found.level[i]), int(found.index[i]), int(found.desc[i])
        assert got == ((want.level, want.entry, want.desc) if want else (0, page, int(s2.level(3)[page])))
    levels = found.level.tolist()
    assert (found.mapped, found.small) == (len(levels) - levels.count(0), levels.count(3))


@FEW
@given(s2=stage2s(most=1600), places=PLACES, dbm=st.booleans())
def test_relaxing_aging_and_allowing(kernels, s2, places, dbm):
    pages = np.array([place % s2.npages for place in places], dtype=np.int64)
    for verb, update in (
        (lambda s: s.relax_at(pages, dbm=dbm), pte.relax_dirty if dbm else pte.relax),
        (lambda s: s.allow_at(pages, dbm=dbm), pte.allow_dbm if dbm else pte.allow),
        (lambda s: s.mkyoung_at(pages), pte.mkyoung),
        (lambda s: s.relax_at(s.leaf_at(pages), dbm=dbm), pte.relax_dirty if dbm else pte.relax),
        (lambda s: s.allow_at(s.leaf_at(pages)), pte.allow),
        (lambda s: s.mkyoung_at(s.leaf_at(pages)), pte.mkyoung),
    ):
        work = s2.copy()
        want, found, changed = one_by_one(s2, pages.tolist(), update)
        if update is pte.relax:
            save_of_blocks(s2, want, pages.tolist())
        assert verb(work) == (found if update in (pte.relax, pte.relax_dirty) else changed)
        assert differences(work, want) == []
        work.verify()


@pytest.mark.parametrize("shared", [False, True])
def test_what_a_block_recorded_is_saved_when_it_is_relaxed(kernels, shared):
    s2 = Stage2(1536, base_gfn=0x400, shared=shared)
    s2.map(0x400, 1536, pfn=0, level=2, dbm=True)
    for page in (3, 1030):
        s2.mmu_update(2, [s2.layout.index(2, page)], np.array([pte.S2AP_W], dtype=np.uint64))
    assert s2.relax(0x400 + 7)
    assert s2.relax_at([1030, 600, 1031]) == 3
    assert s2.saved.bitmap.ranges().tolist() == [[0, 512], [1024, 512]]
    assert not s2.host_dirty.any()
    assert s2.harvest().ranges().tolist() == [[0, 512], [1024, 512]]
    assert s2.scan(pte.untracked).weight() == 1536


@FEW
@given(s2=stage2s(most=1600), places=PLACES, kind=st.sampled_from([(False, False), (True, False), (True, True)]))
def test_map_at(kernels, s2, places, kind):
    pages = list(dict.fromkeys(place % s2.npages for place in places))
    frames = np.arange(len(pages)) * 7
    for level in (1, 2):  # the walker makes a table anew where it is all of the page's
        s2.level(level)[pte.table(level)(s2.level(level))] = pte.TABLE
    want = s2.copy()
    for page, frame in zip(pages, frames.tolist(), strict=True):
        walker.map(want, s2.base_gfn + page, 1, frame, 3, kind[0], dbm=kind[1])
    s2.map_at(pages, frames, 3, kind[0], dbm=kind[1])
    assert differences(s2, want) == []
    s2.verify()


@pytest.mark.parametrize(
    "granule", [Granule.K4, Granule.K16, pytest.param(Granule.K64, marks=pytest.mark.slow)], ids=str
)
def test_mapping_blocks_anywhere(kernels, granule):
    size = granule.pages_per_entry(2)
    s2 = Stage2(4 * size + 5, base_gfn=size - 3, granule=granule)
    s2.map(s2.base_gfn, s2.npages, pfn=0, dbm=True)
    walker.guest_write(s2, 2 * size + 1)
    want = s2.copy()
    for page, frame in ((size + 3, 2 * size), (3 * size + 3, 9 * size)):
        walker.map(want, s2.base_gfn + page, size, frame, 2)
    s2.map_at([3 * size + 3, size + 3], np.array([9, 2]) * size, level=2)
    assert differences(s2, want) == []
    assert s2.dirty().pages().tolist() == [size + 4]
    assert s2.block_spans().tolist() == [[size + 3, 2 * size + 3], [3 * size + 3, 4 * size + 3]]
    assert s2.block_spans(2 * size + 3, size).tolist() == []


@FEW
@given(s2=stage2s(most=1600), data=st.data())
def test_block_spans(kernels, s2, data):
    first = data.draw(st.integers(0, s2.npages))
    npages = data.draw(st.integers(0, s2.npages - first))
    blocks = {leaf.pages for leaf in walker._leaves(s2, first, first + npages) if leaf.level < 3}
    pages = sorted(page for block in blocks for page in block)
    spans = s2.block_spans(first, npages)
    assert [page for start, stop in spans.tolist() for page in range(start, stop)] == pages
    assert (spans[1:, 0] > spans[:-1, 1]).all(), "those that touch are joined"


@FEW
@given(s2=stage2s(most=1600), places=PLACES)
def test_what_the_mmu_sets(kernels, s2, places):
    for level in (1, 2, 3):
        entries = s2.level(level)
        index = np.array([place % entries.size for place in places], dtype=np.int64)
        bits = np.where(index % 2, np.uint64(pte.AF), np.uint64(pte.AF | pte.S2AP_W))
        want = entries.copy()
        np.bitwise_or.at(want, index, bits)
        s2.mmu_update(level, index, bits)
        assert (entries == want).all()


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda s: s.leaf_at([1030]), GfnError, "0 to 1029, not 1030"),
        (lambda s: s.relax_at([-1]), GfnError, "-1"),
        (lambda s: s.allow_at([0.5]), TypeError, "0.5"),
        (lambda s: s.mkyoung_at(["1"]), TypeError, "'1'"),
        (lambda s: s.relax_at([1], dbm=1), TypeError, "dbm is True or False, not 1"),
        (lambda s: s.map_at([1, 1], [2, 3]), GfnError, "named twice"),
        (lambda s: s.map_at([1, 2], [2]), GfnError, "2 leaves need 2 frames"),
        (lambda s: s.map_at([512], [512], level=2), GfnError, "level-2 leaves"),
        (lambda s: s.map_at([507], [512], level=1), GfnError, "level-1 leaves"),
        (lambda s: s.map_at([0], [0], level=4), GfnError, "level 4"),
        (lambda s: s.mmu_update(3, [1], np.array([1], dtype=np.uint64)), ValueError, "AF and S2AP"),
        (lambda s: s.mmu_update(3, [1, 2], np.array([1 << 7], dtype=np.uint64)), ValueError, "2 words, not 1"),
        (lambda s: s.mmu_update(3, [1030], np.array([1 << 7], dtype=np.uint64)), GfnError, "0 to 1029, not 1030"),
        (lambda s: s.mmu_update(0, [0], np.array([1 << 7], dtype=np.uint64)), ValueError, "levels 1, 2 and 3"),
        (lambda s: s.block_spans(0, 1031), GfnError, "not inside"),
    ],
)
def test_bad_arguments(call, error, text):
    s2 = Stage2(1030, base_gfn=5)
    s2.map(5, 1030, pfn=5, dbm=True)
    before = s2.copy()
    with pytest.raises(error, match=text):
        call(s2)
    assert differences(s2, before) == []


def test_a_bitmap_that_was_apart_is_looked_at_again_where_it_need_not_be_any_more() -> None:
    s2, out = Stage2(100), DirtyBitmap(100)
    s2.harvest(out)
    s2.host_dirty = out
    with pytest.raises(BitmapError, match="share memory"):
        s2.harvest(out)
    with pytest.raises(BitmapError, match="share memory"):
        s2.clean(out)
    other = DirtyBitmap(100)
    s2.harvest(other)
    other.words.flags.writeable = False
    with pytest.raises(BitmapError, match="read-only"):
        s2.harvest(other)
    s2.clean(other)
