"""Every bulk verb against the walker, on tables in any state; then literals, errors, and what arrays get wrong."""

import copy
import threading
from itertools import pairwise

import numpy as np
import pytest
from effort import EFFORT
from hypothesis import given, settings
from hypothesis import strategies as st

import hwdbm
from hwdbm import DirtyBitmap, Granule, Stage2, pte, walker
from hwdbm.errors import BitmapError, GfnError, InvariantError
from hwdbm.testing import bitmaps, differences, stage2s

MOST = {Granule.K4: 1600, Granule.K16: 5000, Granule.K64: 17000}
GRANULES = pytest.mark.parametrize("granule", Granule, ids=str)
FEW = {Granule.K4: 10 * EFFORT, Granule.K16: 3 * EFFORT, Granule.K64: 2 * EFFORT}


def compare(s2, verb, *args, **kwargs):
    """Run a verb on `s2` and the walker's on a copy; all must agree, and the result must be sound."""
    twin = s2.copy()
    got, want = getattr(s2, verb)(*args, **kwargs), getattr(walker, verb)(twin, *args, **kwargs)
    assert got == want
    assert differences(s2, twin) == []
    s2.verify()
    return got


def a_range(draw, s2):
    first = draw(st.integers(0, s2.npages))
    npages = draw(st.integers(0, s2.npages - first) | st.just(s2.npages - first))
    return s2.base_gfn + first, npages


@st.composite
def leaves_to_map(draw, s2, granule):
    level = draw(st.sampled_from([2, 3]))
    size = granule.pages_per_entry(level)
    gfn, npages = a_range(draw, s2)
    gfn += -gfn % size
    npages = max(0, min(npages, s2.base_gfn + s2.npages - gfn)) // size * size
    gfn = gfn if npages else s2.base_gfn // size * size + size
    pfn = draw(st.integers(0, 1000)) * size
    most = min(1 << 20, (1 << (48 - granule.page_shift)) // size)  # of a frame's 48 bits
    frames = np.random.default_rng(draw(st.integers(0, 9))).integers(0, most, npages // size) * size
    return gfn, npages, draw(st.sampled_from([pfn, frames])), level


RANGE_VERBS = (
    "unmap",
    "split",
    "collapse",
    "wrprotect",
    "set_dbm",
    "clear_dbm",
    "mkold",
    "mkyoung",
    "test_clear_young",
)
WHOLE_VERBS = ("dirty", "writable", "young", "enable_dbm", "disable_dbm", "harvest")


@GRANULES
@pytest.mark.parametrize("verb", RANGE_VERBS)
@pytest.mark.alike(3)
def test_range_verb_equals_the_walkers(kernels, granule, verb):
    @settings(max_examples=FEW[granule])
    @given(st.data())
    def check(data):
        s2 = data.draw(stage2s(granule, MOST[granule]))
        compare(s2, verb, *a_range(data.draw, s2))

    check()


@GRANULES
@pytest.mark.parametrize("verb", WHOLE_VERBS)
@pytest.mark.alike(3)
def test_whole_verb_equals_the_walkers(kernels, granule, verb):
    @settings(max_examples=FEW[granule])
    @given(stage2s(granule, MOST[granule]))
    def check(s2):
        compare(s2, verb)

    check()


@GRANULES
@pytest.mark.parametrize("verb", ["clean", "enable_dbm"])
@pytest.mark.alike(3)
def test_masked_verb_equals_the_walkers(kernels, granule, verb):
    @settings(max_examples=FEW[granule])
    @given(st.data())
    def check(data):
        s2 = data.draw(stage2s(granule, MOST[granule]))
        compare(s2, "unmap", *a_range(data.draw, s2))  # leaves something in `saved`
        compare(s2, verb, data.draw(bitmaps(s2.npages)))
        compare(s2, "harvest")

    check()


@GRANULES
def test_map_equals_the_walkers(kernels, granule):
    @settings(max_examples=FEW[granule])
    @given(st.data(), st.sampled_from([(False, False), (True, False), (True, True)]))
    def check(data, kind):
        s2 = data.draw(stage2s(granule, MOST[granule]))
        gfn, npages, pfn, level = data.draw(leaves_to_map(s2, granule))
        if npages:
            compare(s2, "map", gfn, npages, pfn, level, kind[0], dbm=kind[1])

    check()


@GRANULES
def test_harvest_of_parts_equals_the_walkers(kernels, granule):
    @settings(max_examples=FEW[granule])
    @given(st.data())
    def check(data):
        s2 = data.draw(stage2s(granule, MOST[granule]))
        whole = s2.copy().harvest()
        cuts = [0, *sorted(data.draw(st.lists(st.integers(0, s2.npages), max_size=3))), s2.npages]
        parts = DirtyBitmap(s2.npages)
        for first, stop in pairwise(cuts):
            got = compare(s2, "harvest", None, first, stop - first)
            inside = DirtyBitmap(s2.npages)
            inside.set_range(first, stop - first)
            assert got.issubset(inside)
            parts |= got
        assert parts == whole
        assert not s2.harvest().any()

    check()


FEW_PAGES = (
    *((1, 0), (1, 511), (2, 511), (3, 511)),
    *(pytest.param(2, base, marks=pytest.mark.slow) for base in (0, 1)),  # both in one table
)
MORE_PAGES = ((3, 0), (3, 510))


@pytest.mark.parametrize(("npages", "base"), [*FEW_PAGES, *(MORE_PAGES if EFFORT > 1 else ())])
@pytest.mark.alike(3)
def test_every_state_of_a_few_pages(kernels, npages, base):
    """All states, young and old, of up to three pages: 10 ** npages slots, and every mask and range of each.

    Three pages have so many that each implementation has a ninth of its own, and all only in `make thorough`. Ten is 1
    modulo 9: in a ninth any two pages have every two states beside each other, and the third page one that follows.
    """
    kinds = [
        pte.make_leaf(0, 3, writable=w, dbm=d, dirty=x) & ~(0 if a else pte.AF)
        for w, d, x in ((False, False, False), (True, False, False), (True, True, False), (True, True, True))
        for a in (True, False)
    ] + [0, pte.DBM | pte.S2AP_W | pte.AF | 2]
    names = [*hwdbm.kernels.available(), "atomic"]
    first, step = (
        (names.index(kernels.__name__.rpartition(".")[2]), 3 * len(names)) if npages > 2 and EFFORT == 1 else (0, 1)
    )
    for number in range(first, len(kinds) ** npages, step):
        s2 = Stage2(npages, base)
        s2.level(1)[:] = s2.level(2)[:] = pte.TABLE
        for page in range(npages):
            s2.level(3)[page] = kinds[number // len(kinds) ** page % len(kinds)] | page << 12
        for verb in (
            ("harvest", "clean", "wrprotect") if npages == 3 else ("harvest", "clean", "enable_dbm", *RANGE_VERBS)
        ):
            if verb in ("clean", "enable_dbm"):
                for mask in range(1 << npages):
                    compare(
                        s2.copy(), verb, DirtyBitmap.from_pages([p for p in range(npages) if mask >> p & 1], npages)
                    )
                    if npages == 3 and mask == 5:
                        break
            elif verb == "harvest":
                compare(s2.copy(), verb)
            else:
                compare(s2.copy(), verb, base, npages)
                compare(s2.copy(), verb, base + npages - 1, 1)


def test_the_other_granules_have_blocks_of_level_1():
    """64 GiB of 16K pages, in 52-bit descriptors. Of 64K it is 4 TiB, whose pages' descriptors are half a GiB."""
    size = 2048 * 2048
    s2 = Stage2(size, base_gfn=size, granule=Granule.K16)
    s2.map(size, size, pfn=3 * size, level=1, dbm=True)
    assert [pte.state(int(d), 1).label for d in s2.level(1)] == ["writable-clean"]
    s2.level(1)[:] |= np.uint64(pte.S2AP_W)
    assert s2.dirty().ranges().tolist() == [[0, size]]
    assert s2.split(2 * size - 1, 1, level=2) == 1
    assert s2.level(2)[-1] == pte.make_leaf((4 * size - 2048) << 14, 2, dbm=True)
    assert s2.harvest().ranges().tolist() == [[0, size]]


def test_a_peek_counts_the_entries_that_it_read(kernels):
    """Those of the blocks above, and of pages in tables; what lies between two tables is read where it is little."""
    s2, out = Stage2(1536), DirtyBitmap(1536)
    s2.map(0, 512, pfn=512, dbm=True)
    s2.map(512, 512, pfn=1024, level=2, dbm=True)
    s2.map(1024, 512, pfn=2048, dbm=True)
    assert s2.peek_into(out).read == 1 + 3 + 3 * 512
    assert s2.peek_into(out, 0, 512).read == 1 + 1 + 512
    assert s2.peek_into(out, 512, 512).read == 1 + 1


def test_gibibyte_blocks(kernels):
    """Level-1 blocks: what holds for stripes holds for them, and they split into stripes and into pages."""
    stripe, giga = 512, 512 * 512
    s2 = Stage2(2 * giga, base_gfn=giga)
    s2.map(giga, 2 * giga, pfn=4 * giga, level=1, dbm=True)
    s2.level(1)[1] |= np.uint64(pte.S2AP_W)
    assert s2.dirty().ranges().tolist() == [[giga, giga]]
    assert s2.split(2 * giga, 1, level=2) == 1
    assert [pte.state(int(d), 1).label for d in s2.level(1)] == ["writable-clean", "table"]
    assert s2.level(2)[-1] == pte.make_leaf((6 * giga - stripe) << 12, 2, dbm=True)
    assert s2.split(2 * giga, 1) == 1
    assert s2.level(3)[giga] == pte.make_leaf((5 * giga) << 12, 3, dbm=True)
    s2.verify()
    assert s2.harvest().ranges().tolist() == [[giga, giga]]
    assert s2.collapse(2 * giga, giga) == 1
    assert s2.collapse(giga, 2 * giga, level=1) == 1
    assert s2.level(1).tolist() == [pte.make_leaf(n * giga << 12, 1, dbm=True) for n in (4, 5)]
    s2.verify()
    assert not s2.harvest().any()


def test_a_gibibyte_equals_the_walkers():
    rng = np.random.default_rng(5)
    s2 = Stage2(512 * 512 + 16, base_gfn=3)
    s2.map(3, s2.npages, pfn=3)
    s2.enable_dbm()
    s2.level(3)[rng.random(s2.npages) < 0.1] |= np.uint64(pte.S2AP_W)
    assert s2.collapse(3, s2.npages) == 511
    compare(s2, "harvest")


@pytest.mark.parametrize("level", [1, 2])
def test_a_block_may_reach_beyond_its_slot(kernels, level):
    """An image's block can lie across a slot's edge: the slot's pages are reported, and splitting is safe."""
    s2 = Stage2(100, base_gfn=500)
    s2.level(1)[:] = pte.TABLE
    s2.level(level)[:] = pte.make_leaf(0, level, dbm=True, dirty=True)
    assert compare(s2.copy(), "harvest").weight() == 100
    compare(s2, "unmap", 520, 3)
    assert s2.harvest().weight() == 100
    s2.verify()


def test_split_then_collapse_is_identity(kernels):
    s2 = Stage2(3 * 512, base_gfn=512)
    s2.map(512, 3 * 512, pfn=512 * 7, level=2, dbm=True)
    before = s2.level(2).copy()
    assert s2.split(512, 3 * 512) == 3
    assert s2.level(3)[700] == pte.make_leaf((512 * 7 + 700) << 12, 3, dbm=True)
    assert s2.collapse(512, 3 * 512) == 3
    assert (s2.level(2) == before).all()
    assert not s2.level(3).any()


def test_harvest_adds_to_out(kernels):
    s2 = Stage2(70)
    s2.map(0, 70, pfn=0, dbm=True)
    walker.guest_write(s2, 69)
    out = DirtyBitmap.from_pages([3], 70)
    assert s2.harvest(out) is out
    assert out.pages().tolist() == [3, 69]
    assert s2.host_dirty.pages().tolist() == [69]


def test_pages_and_their_block_give_the_same_bitmap(kernels):
    """Stripe = pages, for any alignment of the slot."""
    for base in (0, 1, 64, 511):
        blocks, pages = Stage2(2000, base), Stage2(2000, base)
        for s2, level in ((blocks, 2), (pages, 3)):
            s2.map(-(-base // 512) * 512, 1024, pfn=0, level=level, dbm=True)
        walker.guest_write(blocks, 700)
        for gfn in range(512, 1024):
            walker.guest_write(pages, gfn)
        assert blocks.harvest() == pages.harvest()


def test_parallel_harvests_give_what_one_gives(kernels):
    rng = np.random.default_rng(2)
    s2 = Stage2(100_000, base_gfn=77)
    s2.map(512, 512 * 64, pfn=0, level=2, dbm=True)
    s2.map(512 * 65, 60_000, pfn=512 * 100 + 3, dbm=True)
    s2.level(2)[rng.random(s2.level(2).size) < 0.5] |= np.uint64(pte.S2AP_W)
    s2.level(3)[rng.random(s2.npages) < 0.3] |= np.uint64(pte.S2AP_W)
    one, many = s2.copy(), s2.copy()
    want = one.harvest()
    for step in (64, 640, 4096 + 64):
        many, out = s2.copy(), DirtyBitmap(s2.npages)
        firsts = list(range(0, s2.npages, step))
        todo = iter(firsts)
        lock = threading.Lock()

        def work(many=many, out=out, todo=todo, step=step, lock=lock):
            while True:
                with lock:
                    first = next(todo, None)
                if first is None:
                    return
                many.harvest(out, first, min(step, many.npages - first))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert out == want
        assert differences(many, one) == []


@pytest.mark.parametrize("npages", [1, 63, 512, 513, (1 << 18) + 7, 1 << 20])
def test_entries_begin_at_a_cache_line(npages):
    for s2 in (Stage2(npages), Stage2(npages).copy()):
        assert [s2.level(level).ctypes.data % 64 for level in (1, 2, 3)] == [0, 0, 0]
        assert s2.level(3).size == npages


def test_a_slot_never_mapped_is_never_backed():
    """1 TiB of nothing: harvesting it touches no level-3 entry."""
    s2 = Stage2(1 << 28)
    assert not s2.harvest().any()
    s2.map(12345 << 9, 512, pfn=0, dbm=True)
    tally = s2.harvest_into(DirtyBitmap(s2.npages))
    assert tally.read == 512 + s2.level(2).size + s2.level(1).size


def test_copies_are_their_own(kernels):
    s2 = Stage2(1100, base_gfn=5)
    s2.map(512, 512, pfn=512, level=2, dbm=True)
    walker.guest_write(s2, 600)
    s2.unmap(700, 3)
    for twin in (s2.copy(), copy.deepcopy(s2)):
        assert differences(s2, twin) == []
        assert s2.copy().harvest() == twin.harvest()
    assert s2.dirty().weight() == 512


def test_dbm_only_where_writable():
    with pytest.raises(ValueError, match="would grant the write"):
        Stage2(1).map(0, 1, 0, writable=False, dbm=True)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda s: s.map(0xFF, 1, 0), "gfn 0xff..0xff is not inside the slot's 0x100..0x4ff"),
        (lambda s: s.map(0x100, 0x401, 0), "gfn 0x100..0x500 is not inside"),
        (lambda s: s.map(0x101, 512, 0, level=2), "gfn 0x101 and 512 pages aren't multiples of a level-2 leaf's 0x200"),
        (lambda s: s.map(0x200, 512, 1, level=2), "pfn 0x1 isn't a multiple"),
        (lambda s: s.map(0x200, 2, [1, 2, 3]), r"2 leaves need 2 frames, got an array of shape \(3,\)"),
        (lambda s: s.map(0x200, 1, 1 << 36), "pfn 0x1000000000..0x1000000000 isn't inside of 48 address bits"),
        (lambda s: s.map(0x200, 1, -1), "pfn -0x1..-0x1 isn't inside"),
        (lambda s: s.map(0x200, 1, 0, level=0), "level 0 of a 4K granule has no leaves"),
        (lambda s: s.split(0x200, 1, level=1), "level 2 or 3, not 1"),
        (lambda s: s.collapse(0x200, 1, level=3), "level 3 of a 4K granule has no blocks"),
        (lambda s: s.harvest(first=0x400, npages=1), "pages 1024..1024 are not inside of the slot's 1024"),
        (lambda s: s.unmap(0x100, -1), "is not inside"),
    ],
)
def test_bad_ranges(call, text):
    s2 = Stage2(0x400, base_gfn=0x100)
    s2.map(0x100, 0x400, pfn=0x100, dbm=True)
    walker.guest_write(s2, 0x123)
    before = s2.copy()
    with pytest.raises(GfnError, match=text):
        call(s2)
    assert differences(s2, before) == []


def test_bad_bitmaps():
    s2 = Stage2(65)
    for call in (s2.harvest, s2.clean, s2.enable_dbm):
        with pytest.raises(BitmapError, match="65 pages, the bitmap 64"):
            call(DirtyBitmap(64))


@pytest.mark.parametrize(("npages", "base"), [(0, 0), (-1, 0), (1, -1), (2, (1 << 40) - 1)])
def test_bad_slots(npages, base):
    with pytest.raises(GfnError):
        Stage2(npages, base)


@pytest.mark.parametrize(
    ("level", "index", "desc", "text"),
    [
        (3, 5, 3, "gfn 0x105: 0x0000000000000003 .*: not zero, and not under a level-2 table"),
        (2, 1, 1, "gfn 0x200: 0x0000000000000001 .*: not zero, and not under a level-1 table"),
    ],
)
def test_verify_names_a_leaf_at_two_levels(level, index, desc, text):
    s2 = Stage2(600, base_gfn=0x100)
    s2.level(level)[index] = desc
    with pytest.raises(InvariantError, match=text):
        s2.verify()


def test_verify_names_reserved_encodings():
    s2 = Stage2(10)
    s2.map(0, 10, pfn=0)
    s2.level(3)[4] = 1
    with pytest.raises(InvariantError, match=r"gfn 0x4: .*level 3 reserved.*the reserved encoding"):
        s2.verify()
    coarse = Stage2(10, granule=Granule.K4)
    coarse.saved.bitmap.set_range(3, 1)
    with pytest.raises(InvariantError, match="saved pages"):
        coarse.verify()


@pytest.mark.parametrize("gfn", [0xFF, 0x141, -1, 1 << 64])
def test_a_guest_accesses_its_slot_only(gfn):
    s2 = Stage2(0x41, base_gfn=0x100)
    s2.map(0x100, 0x41, pfn=0, dbm=True)
    before = s2.copy()
    for access in (walker.guest_write, walker.guest_read):
        with pytest.raises(GfnError, match="is not inside the slot's 0x100"):
            access(s2, gfn)
    assert differences(s2, before) == []


def test_a_mask_of_the_stage2s_own_is_refused(kernels):
    s2 = Stage2(200)
    s2.map(0, 200, pfn=0, dbm=True)
    walker.guest_write(s2, 7)
    before = s2.copy()
    read_only = DirtyBitmap(200)
    read_only.words.flags.writeable = False
    for call in (
        lambda: s2.clean(s2.host_dirty),
        lambda: s2.clean(s2.saved.bitmap),
        lambda: s2.harvest(s2.host_dirty),
        lambda: s2.harvest(read_only),
        lambda: s2.track_part(s2.host_dirty),
    ):
        with pytest.raises(BitmapError):
            call()
        assert differences(s2, before) == []
    assert s2.harvest().pages().tolist() == [7]


def test_host_flags_are_changed_in_place_too() -> None:
    s2, other = Stage2(100), DirtyBitmap.from_pages([3, 70], 100)
    flags = s2.host_dirty
    s2.host_dirty |= other
    assert s2.host_dirty is flags
    assert s2.take_host_dirty().pages().tolist() == [3, 70]
    s2.host_dirty = other  # another bitmap is as good
    assert s2.host_dirty is other
