"""Tables in place: every verb does to the tables in RAM what it does to a Stage2 that was filled from them."""

import random
from contextlib import suppress
from itertools import pairwise

import numpy as np
import pytest
from effort import EFFORT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from synthetic import Geometry, Tables, flags_of, geometries, populate

import hwdbm
from hwdbm import DirtyBitmap, Granule, pte
from hwdbm.errors import GfnError, ImageError
from hwdbm.image import NoTablesError, Registers, Slot, open_image, open_live
from hwdbm.image.live import Live, LiveTables

KERNELS = [None, *hwdbm.kernels.available()]
RULES = (pte.leaf, pte.dirty, pte.writable, pte.tracked, pte.young, pte.read_only)


class Both:
    """The same tables twice: in RAM, tracked in place, and read into a Stage2 of its own."""

    def __init__(self, made, gfn, npages, path, kernels=None, **room):
        self.g = made.g
        self.base, raw = made.raw()
        path.write_bytes(raw)
        registers = {"ram_base": self.base, "vttbr": made.g.vttbr(made.root), "vtcr": made.g.vtcr}
        shift = made.g.page
        image = open_image(path, slots=[Slot(0, gfn << shift, npages << shift)], **registers)
        self.flat = image.stage2(0)
        self.live = open_live(path, **registers)
        self.placed = self.live.stage2(gfn, npages, kernels=kernels, **room)
        self.path, self.before = path, np.frombuffer(raw, dtype=np.uint64)

    def check(self):
        for rule in RULES:
            assert self.placed.scan(rule) == self.flat.scan(rule), rule
        assert self.placed.dirty() == self.flat.dirty()
        assert self.placed.host_dirty == self.flat.host_dirty
        assert self.placed.saved.bitmap == self.flat.saved.bitmap
        for level in (1, 2):
            placed, flat = self.placed.level(level), self.flat.level(level)
            # Of tables the addresses differ; in place an empty one stays where it is.
            assert ((placed == flat) | pte.table(level)(placed)).all()
            assert not (pte.table(level)(placed) & pte.leaf(level)(flat)).any()
            for page in (0, self.flat.npages - 1):
                assert self.placed.mapped(page, 1) == (page in self.flat.scan(pte.leaf))
        self.placed.verify()
        pages, runs = self.placed.level(3), self.placed._live.table_runs(0, self.flat.npages).tolist()
        assert not len(self.placed._live.table_runs(1, 1))
        for word, end, page in runs:
            assert (self.live.words[word:end] == pages[page : page + end - word]).all()
        for (word, end, page), (next_word, _, next_page) in pairwise(runs):
            assert (next_word, next_page - page) != (end, next_word - word)  # else they are one

    def changed(self):
        """The words of RAM that are others now."""
        return np.flatnonzero(self.live.words != self.before)


def slot_of(g, rng):
    """A slot of whole granules, most often across a boundary of some level."""
    npages = min(rng.choice([1, 63, 64, 65, 400, rng.randrange(1, 400)]), 1 << g.ipa - g.page)
    boundary = 1 << g.shift(rng.randrange(max(g.start, 0), 4)) - g.page
    top = 1 << g.ipa - g.page
    at = rng.randrange(top) // boundary * boundary - rng.choice([0, 0, 1, npages // 2, npages])
    return min(max(at, 0), top - npages), npages


def built(g, seed, *, blocks=True, junk=True):
    """Tables with leaves of all kinds, and a slot of which no block reaches beyond."""
    rng = random.Random(seed)
    tables = Tables(g, seed=seed, junk=junk)
    gfn, npages = slot_of(g, rng)
    if blocks:
        populate(tables, [(0, gfn << g.page - 12, npages << g.page - 12)])
    for _ in range(npages // 2):
        tables.leaf(gfn + rng.randrange(npages) << g.page, 3, flags_of(rng))
    tables.leaf(gfn << g.page, 3, flags_of(rng))
    return tables, gfn, npages


def straddles(both):
    """Whether a leaf of the slot goes on beyond it."""
    for page in (0, both.flat.npages - 1):
        level = both.flat.leaf_level(page)
        if level is not None:
            lo, hi = both.flat.layout.span(level, both.flat.layout.index(level, page))
            if lo < 0 or hi > both.flat.npages:
                return True
    return False


VERBS = (
    lambda s2, mask, lo, n: s2.harvest(first=lo, npages=n).ranges().tolist(),
    lambda s2, mask, lo, n: s2.harvest().ranges().tolist(),
    lambda s2, mask, lo, n: s2.clean(mask),
    lambda s2, mask, lo, n: s2.enable_dbm(),
    lambda s2, mask, lo, n: s2.enable_dbm(mask),
    lambda s2, mask, lo, n: s2.disable_dbm(),
    lambda s2, mask, lo, n: s2.track_part(mask).changed,
    lambda s2, mask, lo, n: s2.wrprotect_part(mask).changed,
    lambda s2, mask, lo, n: s2.track_part(mask.part(lo & ~63, s2.npages - (lo & ~63)), lo & ~63).changed,
    lambda s2, mask, lo, n: s2.mkold(s2.base_gfn + lo, n),
    lambda s2, mask, lo, n: s2.mkyoung(s2.base_gfn + lo, n),
    lambda s2, mask, lo, n: s2.test_clear_young(s2.base_gfn + lo, n).ranges().tolist(),
    lambda s2, mask, lo, n: s2.allow_at(mask.pages(), dbm=True),
    lambda s2, mask, lo, n: s2.leaf_at(mask.pages()).level.tolist(),
    lambda s2, mask, lo, n: s2.block_spans().tolist(),
    lambda s2, mask, lo, n: s2.take_host_dirty().ranges().tolist(),
    lambda s2, mask, lo, n: [s2.copy().leaf_at(range(s2.npages)).desc.tolist(), s2.copy().dirty().ranges().tolist()],
)


@settings(max_examples=25 * EFFORT, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    g=st.sampled_from(geometries()), seed=st.integers(0, 1 << 32), junk=st.booleans(), kernels=st.sampled_from(KERNELS)
)
def test_verbs_do_the_same_in_place(g, seed, junk, kernels, tmp_path):
    rng = random.Random(seed)
    both = Both(*built(g, seed, junk=junk), tmp_path / "ram", kernels)
    npages = both.flat.npages
    both.check()
    if straddles(both):
        before = both.live.words.copy()
        everything = DirtyBitmap.from_pages(range(npages), npages)
        with suppress(ImageError):
            both.placed.clean(everything)
            both.flat.clean(everything)  # there was nothing to clean in it
            both.check()
            return
        assert (both.live.words == before).all()
        return
    for verb in rng.choices(VERBS, k=6):
        lo = rng.randrange(npages)
        count = rng.randrange(npages - lo + 1)
        mask = DirtyBitmap.from_pages(rng.sample(range(npages), rng.randrange(npages + 1)), npages)
        assert verb(both.placed, mask, lo, count) == verb(both.flat, mask, lo, count)
        both.check()
    # Nothing but bits 7, 10 and 51 of the slot's own descriptors has changed, and what was taken apart.
    flips = both.live.words[both.changed()] ^ both.before[both.changed()]
    assert not (flips & np.uint64(~(pte.MUTABLE | pte.CONTIGUOUS) & (1 << 64) - 1)).any()


@pytest.mark.parametrize(
    ("g", "seed"),
    [
        (Geometry(12, 1, 36), 5),
        (Geometry(14, 3, 27), 4),
        (Geometry(16, 2, 38), 1),
        (Geometry(12, 0, 48, 52, ds=True), 9),
    ],
    ids=str,
)
def test_every_verb_does_the_same_in_place(g, seed, tmp_path):
    """One after the other, in a slot that begins in a table."""
    rng, npages = random.Random(seed), 193
    tables = Tables(g, seed=seed)
    gfn = (1 << g.ipa - g.page - 1) - 65
    for page in rng.sample(range(-5, npages + 5), 150):
        tables.leaf(gfn + page << g.page, 3, flags_of(rng))
    tables.leaf(gfn << g.page, 3, flags_of(rng))
    both = Both(tables, gfn, npages, tmp_path / "ram")
    both.check()
    for number, verb in enumerate(VERBS):
        lo = rng.choice([0, 1, 64, 65, 128])
        mask = DirtyBitmap.from_pages(rng.sample(range(npages), 100), npages)
        count = npages - lo if number % 2 else 65
        assert verb(both.placed, mask, lo, count) == verb(both.flat, mask, lo, count)
        both.check()


@settings(max_examples=12 * EFFORT, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    g=st.sampled_from([g for g in geometries() if g.start < 3 and g.ipa > g.shift(2) + 3 and not g.ds]),
    seed=st.integers(0, 1 << 32),
)
def test_structure_changes_the_same_in_place(g, seed, tmp_path):
    """Splits, collapses, maps and unmaps; pages for tables come from a pool, and all of them are used or given back."""
    rng = random.Random(seed)
    stripe = g.entries
    blocks = 3
    tables = Tables(g, seed=seed)
    gfn = rng.randrange((1 << g.ipa - g.shift(2)) - blocks + 1) * stripe
    for i in range(blocks):
        tables.leaf(gfn + i * stripe << g.page, 2, flags_of(rng) & ~(1 << 52), pa=0x4000_0000 + (i << g.shift(2)))
    pool = [tables.new_table() for _ in range(12)]
    free, flushes = set(pool), []
    both = Both(
        tables, gfn, blocks * stripe, tmp_path / "ram",
        tables=lambda: free.pop() if free else None, free=free.add, flush=lambda: flushes.append(1),
    )  # fmt: skip
    for _ in range(6):
        lo = rng.randrange(blocks * stripe)
        count = min(rng.choice([1, stripe // 3, stripe, 2 * stripe]), blocks * stripe - lo)
        start = gfn + lo // stripe * stripe
        what = rng.choice(["unmap", "split", "collapse", "pages", "blocks", "wrprotect", "harvest", "arm", "at"])
        for s2 in (both.placed, both.flat):
            if what == "unmap":
                s2.unmap(gfn + lo, count)
            elif what == "split":
                s2.split(gfn + lo, count)
            elif what == "collapse":
                s2.collapse(gfn, blocks * stripe)
            elif what == "pages":
                s2.map(gfn + lo, count, 0x50000 + lo, dbm=True)
            elif what == "blocks":
                s2.map(start, stripe, 1 << 30 - g.page, level=2)
            elif what == "at":
                s2.map_at(np.arange(lo, lo + count, 3), 0x70000 + np.arange(lo, lo + count, 3), dbm=True)
            elif what == "wrprotect":
                s2.wrprotect(gfn + lo, count)
            elif what == "harvest":
                s2.harvest(first=lo, npages=count)
            else:
                s2.enable_dbm()
        both.check()
        both.live.refresh()  # what is known of the tables is what is there
        both.check()
    used = {int(pa) for pa in both.placed._live.tables[3].pa}
    assert free | used >= set(pool)
    assert not free & used


def dirty_blocks(g, level, count, *, flags=1 << 51 | 1 << 7):
    """Tables with blocks of a level one after another, dirty, and pages for tables; where they begin in the guest."""
    tables, gfn = Tables(g), 5 << g.shift(level) - g.page
    for at in range(count):
        tables.leaf((gfn << g.page) + (at << g.shift(level)), level, flags, pa=(at + 2) << g.shift(level))
    return tables, gfn, [tables.new_table() for _ in range(count + 1)]


@pytest.mark.parametrize(
    ("g", "level"),
    [(Geometry(12, 1, 36), 2), (Geometry(12, 1, 36), 1), (Geometry(14, 2, 36), 2), (Geometry(16, 2, 38, 52), 2)],
    ids=str,
)
def test_blocks_are_split_and_made_again_in_place(g, level, tmp_path):
    """The last two, in tables that held something else before; then as they were, with the pages for tables back."""
    size = 1 << g.shift(level) - g.page
    blocks = 1 + level  # of a GiB each fewer
    tables, gfn, pool = dirty_blocks(g, level, blocks)
    free, flushed = list(pool), []
    both = Both(
        tables, gfn, blocks * size, tmp_path / "ram",
        tables=free.pop, free=free.append, flush=lambda: flushed.append(len(free)),
    )  # fmt: skip
    for s2 in (both.placed, both.flat):
        assert s2.split(gfn + (blocks - 2) * size, 2 * size, level=level + 1) == 2
        assert s2.saved.bitmap.ranges().tolist() == [[(blocks - 2) * size, 2 * size]]
    both.check()
    assert [(both.placed.level(each) == both.flat.level(each)).all() for each in range(level + 1, 4)] == [True] * (
        3 - level
    )
    assert flushed == [blocks - 1]  # between the break and the make, with two pages taken
    both.live.refresh()
    both.check()
    for s2 in (both.placed, both.flat):
        assert s2.collapse(gfn, blocks * size, level=level) == 2
        assert s2.dirty().ranges().tolist() == [[0, blocks * size]]
        assert s2.saved.bitmap.ranges().tolist() == [[(blocks - 2) * size, 2 * size]]
    both.check()
    assert sorted(free) == sorted(pool)
    assert len(flushed) == 2


@pytest.mark.parametrize("verb", ["split", "collapse", "unmap"])
def test_a_flush_that_fails_leaves_what_there_was(verb, tmp_path):
    """Between a break and a make: blocks and tables are there again, and no page is forgotten.

    So are the leaves of a contiguous run that is taken apart, each for itself.
    """
    g, fail = Geometry(12, 1, 36), []
    tables, gfn, pool = dirty_blocks(g, 2, 2)
    for page in range(16):
        tables.leaf(gfn + 1024 + page << 12, 3, 1 << 52 | 1 << 51 | (1 << 7 if page == 3 else 0), pa=page << 12)
    free = list(pool)
    both = Both(
        tables, gfn, 2048, tmp_path / "ram",
        tables=free.pop, free=free.append, flush=lambda: 1 / 0 if fail else None,
    )  # fmt: skip
    if verb == "collapse":
        both.placed.split(gfn, 1024)
    before, left, dirty = both.live.words.copy(), sorted(free), both.placed.dirty()
    fail.append(True)
    first, npages = (gfn + 1024 + 5, 1) if verb == "unmap" else (gfn, 1024)
    with pytest.raises(ZeroDivisionError):
        getattr(both.placed, verb)(first, npages)
    assert sorted(free) == left
    assert dirty.issubset(both.placed.dirty())
    if verb == "unmap":
        assert both.placed.scan(pte.leaf) == both.flat.scan(pte.leaf)
        run, was = both.placed.level(3)[1024:1040], both.flat.level(3)[1024:1040]
        assert (run == was & np.uint64(~(pte.CONTIGUOUS | pte.S2AP_W) & (1 << 64) - 1)).all()
        assert both.placed.saved.bitmap.ranges().tolist() == [[1024, 16]]
    else:
        assert (both.live.words == before).all()


@pytest.mark.parametrize("ends", [None, ZeroDivisionError])
def test_pages_for_tables_that_are_too_few_are_given_back(ends, tmp_path):
    """There are none left after the second one, or to ask for the third raises: nothing is changed."""
    tables, gfn, pool = dirty_blocks(Geometry(12, 1, 36), 2, 3)
    left, back = pool[:2], []

    def take():
        if not left and ends:
            raise ends
        return left.pop() if left else None

    both = Both(tables, gfn, 3 * 512, tmp_path / "ram", tables=take, free=back.append, flush=lambda: None)
    with pytest.raises(ends or NoTablesError, match=None if ends else "3 tables are needed, and there are 2"):
        both.placed.split(gfn, 3 * 512)
    assert back == pool[1::-1]
    assert not both.changed().size


@pytest.mark.parametrize("verb", ["map", "map_at"])
def test_what_is_mapped_where_nothing_was_has_tables(tmp_path, verb):
    """At each level: in a GiB that has some, and in the next, which has none."""
    tables, gfn = Tables(Geometry(12, 1, 36), junk=False), (1 << 18) - 1024
    tables.leaf(gfn + 5 << 12, 3, 1 << 51 | 1 << 7)
    pool = [tables.new_table() for _ in range(4)]
    both = Both(tables, gfn, 2048, tmp_path / "ram", tables=pool.pop, free=pool.append, flush=lambda: None)
    for s2 in (both.placed, both.flat):
        for page in (700, 1030, 1031):
            if verb == "map":
                s2.map(gfn + page, 1, 0x50000 + page, dbm=True)
            else:
                s2.map_at(np.array([page]), np.array([0x50000 + page]), dbm=True)
    both.check()
    both.live.refresh()
    both.check()
    assert both.placed.scan(pte.leaf).pages().tolist() == [5, 700, 1030, 1031]


def test_a_block_of_the_largest_size_gives_all_tables_below_it_back(tmp_path):
    """In a slot that begins and ends inside of other such blocks, whose tables stay."""
    g = Geometry(12, 1, 36)
    tables, size = Tables(g, junk=False), 1 << 18
    around = [size - 1, 2 * size + 3]
    for page in around:
        tables.leaf(page << 12, 3, 1 << 51 | 1 << 7)
    before = set(tables.data)
    for page in (size, size + 513, 2 * size - 1):
        tables.leaf(page << 12, 3, 1 << 51 | 1 << 7)
    tables.leaf(size + 1024 << 12, 2, 1 << 51 | 1 << 7)
    below = set(tables.data) - before
    free = set()
    both = Both(
        tables, size - 512, size + 1024, tmp_path / "ram",
        tables=lambda: free.pop() if free else None, free=free.add, flush=lambda: None,
    )  # fmt: skip
    for s2 in (both.placed, both.flat):
        s2.map(size, size, 0, level=1, dbm=True)
        assert s2.saved.bitmap.weight() == 3 + 512
        assert s2.scan(pte.dirty).pages().tolist() == [page - (size - 512) for page in around]
    assert free == below
    assert len(below) == 4
    for s2 in (both.placed, both.flat):
        s2.map(size + 5, 1, 7, dbm=True)
    both.check()
    assert len(free) == 2


def test_a_machine_with_holes_between_its_tables(tmp_path):
    """What lies between two tables, as far apart in RAM as in the slot, may look like descriptors, and isn't."""
    for kernels in KERNELS:
        g = Geometry(12, 1, 36)
        tables = Tables(g, junk=False)
        for stripe in (0, 1, 2):
            tables.leaf(stripe << 21, 3, flags_of(random.Random(stripe)) | 1 << 51 | 1 << 7)
        middle = tables.output(tables.get(tables.entry(1 << 21, 2)), 12)
        tables.put(tables.entry(1 << 21, 2), 0)
        tables.data[middle][:] = 0x0008_0000_0000_04C3  # guest memory, as it happens
        both = Both(tables, 0, 3 * 512, tmp_path / "ram", kernels)
        assert both.placed.harvest().pages().tolist() == [0, 1024]
        words = both.live.words[middle - both.base >> 3 :][:512]
        assert (words == 0x0008_0000_0000_04C3).all()


def test_pages_without_a_table_are_passed_over(tmp_path):
    """Before the first table, between two, and after the last."""
    g = Geometry(12, 1, 36)
    tables = Tables(g, junk=False)
    for page in (512 + 7, 3 * 512):
        tables.leaf(page << 12, 3, 1 << 51 | 1 << 7)
    for kernels in KERNELS:
        both = Both(tables, 0, 5 * 512, tmp_path / "ram", kernels)
        pages = np.array([0, 511, 512, 519, 1024, 1535, 1536, 2047, 2048, 2559])
        for verb in ("mkyoung_at", "allow_at", "relax_at"):
            assert getattr(both.placed, verb)(pages) == getattr(both.flat, verb)(pages), verb
            both.check()
        mask = DirtyBitmap.from_pages(pages, 5 * 512)
        assert both.placed.clean(mask) == both.flat.clean(mask)
        both.check()


def test_a_level_0_block_beside_a_table_of_its_level(tmp_path):
    """Of the entries of level 1, as which such a block counts, some are in a table and some aren't."""
    g = Geometry(12, 0, 52, 52, True)
    tables = Tables(g, junk=False)
    boundary = 1 << 27
    assert tables.leaf(boundary << 12, 0, 1 << 51 | 1 << 7, pa=1 << 39)
    for page in (boundary - 1, 2 * boundary):
        tables.leaf(page << 12, 3, 1 << 51 | 1 << 7)
    both = Both(tables, boundary - 512, 1024, tmp_path / "ram")
    for s2 in (both.placed, both.flat):
        assert s2.mkyoung_at([510, 511, 512, 1023]) == 2
        assert s2.scan(pte.young).weight() == 513
    assert both.changed().size == 2


def test_a_table_that_others_share_beside_the_slot_is_none_of_its(tmp_path):
    """One that ends where the slot begins, and one that begins where it ends."""
    g = Geometry(12, 1, 36)
    tables = Tables(g, junk=False)
    for stripe in (1, 2, 3):
        tables.leaf(stripe << 21, 3, 1 << 51 | 1 << 7)
    for stripe, other in ((6, 1), (7, 3)):
        tables.leaf(stripe << 21, 3, 1 << 51)
        tables.put(tables.entry(stripe << 21, 2), tables.get(tables.entry(other << 21, 2)))
    both = Both(tables, 2 * 512, 512, tmp_path / "ram")
    assert both.placed.harvest().pages().tolist() == [0]
    with pytest.raises(ImageError, match="used in two places"):
        both.live.stage2(512, 512)


def test_tables_that_came_are_missed_by_no_verb_until_they_are_known(tmp_path):
    g = Geometry(12, 1, 36)
    tables = Tables(g, junk=False)
    tables.leaf(0, 3, 1 << 51 | 1 << 7)
    spare = tables.new_table()
    tables.data[spare][5] = 0x0008_0000_4000_04C3
    both = Both(tables, 0, 1024, tmp_path / "ram")
    assert both.placed.dirty().pages().tolist() == [0]
    entry = tables.entry(1 << 21, 2) - both.base >> 3
    both.live.words[entry] = spare | 3
    for verb in (both.placed.dirty, both.placed.harvest, both.placed.enable_dbm, both.placed.mkold, both.placed.young):
        with pytest.raises(ImageError, match=r"gfn 0x200: the table at .* wasn't there .* refresh\(\)"):
            verb()
    both.live.refresh()
    assert both.placed.harvest().pages().tolist() == [0, 517]
    word = spare - both.base + 40 >> 3
    both.live.words[word] |= np.uint64(pte.S2AP_W)
    assert both.placed.dirty().pages().tolist() == [517]
    both.live.words[entry] = 0  # and one that went maps nothing, and is nobody's to change
    assert not both.placed.dirty().any()
    assert not both.placed.harvest().any()
    assert both.placed.leaf_level(517) is None
    assert both.live.words[word] == 0x0008_0000_4000_04C3


@pytest.mark.parametrize("g", [Geometry(12, 1, 36), Geometry(12, 2, 33), Geometry(14, 2, 36)], ids=str)
def test_what_is_not_valid_is_nothing_above_level_3(g, tmp_path):
    """Whatever its bits are, and those of the entries beside it."""
    tables, size = Tables(g, seed=3), g.entries
    for stripe in (1, 3):
        tables.leaf((4 * size + stripe * size) << g.page, 3, 1 << 51 | 1 << 7)
    both = Both(tables, 4 * size - 1, 5 * size, tmp_path / "ram")
    both.check()
    entries = both.placed.level(2)
    assert entries.nonzero()[0].tolist() == [2, 4]
    assert all(int(entries[at]) & pte.TABLE == pte.TABLE for at in (2, 4))
    assert both.placed.level(3).nonzero()[0].size > 2 * size - 9  # in tables there is what there is


def test_the_first_table_that_is_not_known_is_named(tmp_path):
    """By the guest frame that it begins at, or the slot's first one where it begins before."""
    tables = Tables(Geometry(12, 1, 36), junk=False)
    for stripe in (1, 2, 4):
        tables.leaf(stripe << 21, 3, 1 << 51 | 1 << 7)
    found = [tables.output(tables.get(tables.entry(stripe << 21, 2)), 12) for stripe in (1, 2, 4)]
    spare = [tables.new_table() for _ in range(3)]
    both = Both(tables, 512 + 16, 4 * 512, tmp_path / "ram")
    entries = [tables.entry(stripe << 21, 2) - both.base >> 3 for stripe in (1, 2, 4)]
    for which, gfn in (([0, 1, 2], 0x210), ([1, 2], 0x400), ([2], 0x800)):
        for at in which:
            both.live.words[entries[at]] = spare[at] | 3
        with pytest.raises(ImageError, match=f"^gfn {gfn:#x}: the table at {spare[which[0]]:#018x} wasn't there"):
            both.placed.dirty()
        for at in which:
            both.live.words[entries[at]] = found[at] | 3
    assert both.placed.dirty().pages().tolist() == [512 - 16, 3 * 512 - 16]


def test_what_is_in_a_table_that_went_is_nobodys(tmp_path):
    """The first of a slot, which begins in it, and the last: no verb reads or writes them."""
    tables = Tables(Geometry(12, 1, 36), junk=False)
    for page in range(0x210, 0x210 + 1100):
        tables.leaf(page << 12, 3, 1 << 51 | 1 << 7)
    both = Both(tables, 0x210, 1100, tmp_path / "ram")
    for stripe in (1, 3):
        both.live.words[tables.entry(stripe << 21, 2) - both.base >> 3] = 0
    before = both.live.words.copy()
    everything = DirtyBitmap.from_pages(range(1100), 1100)
    assert both.placed.leaf_at([0, 495, 496, 1007, 1008, 1099]).level.tolist() == [0, 0, 3, 3, 0, 0]
    assert both.placed.track_part(everything).changed == 512
    assert both.placed.mkyoung_at([0, 1099]) == 0
    changed = np.flatnonzero(both.live.words != before)
    assert (changed[0], changed[-1], changed.size) == (changed[0], changed[0] + 511, 512)


@pytest.mark.parametrize("page", [0, 400, 799])
def test_one_leaf_with_the_contiguous_bit_is_enough(page, tmp_path):
    tables = Tables(Geometry(12, 1, 36), junk=False)
    for each in range(0, 800, 25):
        tables.leaf(0x230 + each << 12, 3, 1 << 51)
    assert not Both(tables, 0x230, 800, tmp_path / "ram").placed.contiguous
    tables.put(tables.entry(0x230 + page << 12, 3), 0x0018_0000_4000_04C3)
    assert Both(tables, 0x230, 800, tmp_path / "ram").placed.contiguous


def test_a_copy_has_all_that_there_is(tmp_path):
    """Leaves of each level, saved pages, and those of the host."""
    tables, gfn, pool = dirty_blocks(Geometry(12, 1, 36), 2, 2)
    both = Both(tables, gfn - 3, 1024 + 3, tmp_path / "ram", tables=pool.pop, flush=lambda: None)
    both.placed.split(gfn, 512)
    both.placed.map(gfn - 2, 1, 77, dbm=True)
    both.placed.host_dirty.set_range(1, 1)
    both.placed.host_dirty.set_range(1026, 1)
    twin = both.placed.copy()
    assert all((twin.level(level) == both.placed.level(level)).all() for level in (1, 2, 3))
    assert twin.saved.bitmap == both.placed.saved.bitmap
    assert twin.saved.span == both.placed.saved.span
    assert twin.host_dirty == both.placed.host_dirty
    assert {1, 1026} <= set(twin.host_dirty.pages().tolist())
    assert twin.harvest() == both.placed.harvest()
    assert not twin.contiguous


def test_a_table_in_two_places_is_refused(tmp_path):
    g = Geometry(12, 1, 36)
    tables = Tables(g, junk=False)
    tables.leaf(0, 3, 1 << 51 | 1 << 7)
    tables.put(tables.entry(1 << 21, 2), tables.get(tables.entry(0, 2)))
    for npages in (1024, 512):
        with pytest.raises(ImageError, match="is used in two places"):
            Both(tables, 0, npages, tmp_path / "ram")


def test_the_first_of_several_tables_that_are_used_twice_is_named(tmp_path):
    tables = Tables(Geometry(12, 1, 36), junk=False)
    for stripe in (0, 1, 2):
        tables.leaf(stripe << 21, 3, 1 << 51)
    for stripe, other in ((3, 2), (4, 1)):
        tables.put(tables.entry(stripe << 21, 2), tables.get(tables.entry(other << 21, 2)))
    first = tables.output(tables.get(tables.entry(1 << 21, 2)), 12)
    with pytest.raises(ImageError, match=f"^the level-3 table at {first:#018x} is used in two places"):
        Both(tables, 0, 5 * 512, tmp_path / "ram")


def test_a_block_that_reaches_beyond_the_slot_is_read_and_not_changed(tmp_path):
    g = Geometry(12, 1, 36)
    tables = Tables(g, junk=False)
    tables.leaf(0, 2, 1 << 51 | 1 << 7 | 1 << 10)
    both = Both(tables, 16, 100, tmp_path / "ram", tables=lambda: None, flush=lambda: None)
    assert both.placed.dirty().weight() == 100
    mask = DirtyBitmap.from_pages([50], 100)
    for verb in (
        both.placed.harvest,
        both.placed.mkold,
        lambda: both.placed.clean(mask),
        lambda: both.placed.unmap(20, 3),
    ):
        with pytest.raises(ImageError, match=r"gfn 0x0\.\.0x1ff is one block|tables are needed"):
            verb()
    assert not both.changed().size


def test_a_block_of_the_masks_pages_alone_is_looked_at(tmp_path):
    """One in which the range begins has no page of the mask, one in which it ends has: that one is named."""
    tables = Tables(Geometry(12, 1, 36), junk=False)
    for at in (1, 2, 3):
        tables.leaf(at << 21, 2, 1 << 51 | 1 << 7)
    both = Both(tables, 0x210, 1024, tmp_path / "ram", flush=lambda: None)
    desc = int(both.placed.level(2)[2])
    with pytest.raises(ImageError) as caught:
        both.placed.clean(DirtyBitmap.from_pages([500, 1010], 1024))
    assert str(caught.value) == (
        f"gfn 0x600..0x7ff is one block, {pte.describe(desc, 2)}, and the slot is gfn 0x210..0x60f: cleaning it would "
        "forget what it says of the others"
    )
    with pytest.raises(ImageError, match=r"^gfn 0x200\.\.0x3ff is one block"):
        both.placed.clean(DirtyBitmap.from_pages([495, 1010], 1024))
    assert not both.changed().size
    assert both.placed.clean(DirtyBitmap.from_pages([496, 1007], 1024)) == 1


@pytest.mark.parametrize(("gfn", "npages"), [(0, 1100), (100, 924), (100, 1000)])
def test_one_of_several_blocks_reaches_beyond_the_slot(tmp_path, gfn, npages):
    """The last, the first, or both: nothing is changed of any of them."""
    tables = Tables(Geometry(12, 1, 36), junk=False)
    for at in range(3):
        tables.leaf(at << 21, 2, 1 << 51 | 1 << 7 | 1 << 10)
    both = Both(tables, gfn, npages, tmp_path / "ram", tables=lambda: 1 << 30, flush=lambda: None)
    for verb in (
        both.placed.harvest,
        lambda: both.placed.split(gfn, npages),
        lambda: both.placed.unmap(gfn, npages),
    ):
        with pytest.raises(ImageError, match="is one block"):
            verb()
        assert not both.changed().size


def test_a_range_that_ends_where_such_a_block_begins_is_changed(tmp_path):
    tables = Tables(Geometry(12, 1, 36), junk=False)
    for at in range(3):
        tables.leaf(at << 21, 2, 1 << 51 | 1 << 7 | 1 << 10)
    both = Both(tables, 0, 1100, tmp_path / "ram", flush=lambda: None)
    inside = DirtyBitmap.from_ranges([[0, 1024]], 1100)
    for s2 in (both.placed, both.flat):
        s2.clean(inside)
        assert s2.dirty().ranges().tolist() == [[1024, 76]]
    both.check()
    before = both.changed().tolist()
    for page in (1024, 1099):
        with pytest.raises(ImageError, match=r"gfn 0x400\.\.0x5ff is one block"):
            both.placed.clean(DirtyBitmap.from_pages([page], 1100))
        with pytest.raises(ImageError, match=r"gfn 0x400\.\.0x5ff is one block"):
            both.placed.harvest(first=960, npages=page + 1 - 960)
    assert both.changed().tolist() == before
    assert both.placed.harvest(first=960, npages=64).ranges().tolist() == []


def test_a_block_of_level_0(tmp_path):
    """512 GiB with one dirty bit: read as the level-1 blocks that it is worth, cleaned where the slot is all of it."""
    g = Geometry(12, -1, 52, 52, ds=True)
    tables = Tables(g)
    tables.leaf(3 << 39, 0, 1 << 51 | 1 << 7 | 1 << 10, pa=5 << 39)
    inside = Both(tables, (3 << 27) + 5, 100, tmp_path / "ram")
    assert inside.placed.dirty().weight() == 100
    assert inside.placed.level(1).tolist() == inside.flat.level(1).tolist()
    with pytest.raises(ImageError, match="is one block"):
        inside.placed.harvest()
    assert not inside.changed().size
    with pytest.raises(ImageError, match=r"tables are needed|give stage2|level-0|is one block"):
        inside.placed.unmap((3 << 27) + 5, 1)
    if EFFORT == 1:  # a minute, and some GiB: in `make thorough`
        return
    whole = inside.live.stage2(3 << 27, 1 << 27)
    assert whole.harvest().weight() == 1 << 27
    assert not whole.dirty().any()
    assert inside.changed().size == 1


def test_arguments_of_other_types(tmp_path):
    g = Geometry(12, 1, 36)
    tables = Tables(g, junk=False)
    tables.leaf(0, 3, 1 << 51)
    live = Both(tables, 0, 512, tmp_path / "ram").live
    for wrong in ({"tables": 7}, {"flush": "now"}, {"free": []}):
        with pytest.raises(TypeError, match=next(iter(wrong))):
            live.stage2(0, 512, **wrong)
    with pytest.raises(ValueError, match="no kernels 'fast'"):
        live.stage2(0, 512, kernels="fast")
    with pytest.raises(TypeError, match="words"):
        Live(live.words.view(np.int64), 0, live.registers)
    with pytest.raises(TypeError, match="readonly"):
        open_live(tmp_path / "ram", ram_base=0, vttbr=0, vtcr=0, readonly=1)
    with pytest.raises(OSError, match="directory"):
        open_live(tmp_path, ram_base=0, vttbr=0, vtcr=0)


def test_without_pages_for_tables_nothing_is_split(tmp_path):
    g = Geometry(12, 1, 36)
    tables = Tables(g, junk=False)
    tables.leaf(0, 2, 1 << 51 | 1 << 7)
    both = Both(tables, 0, 512, tmp_path / "ram")
    with pytest.raises(NoTablesError, match="give stage2"):
        both.placed.split(0, 512)
    assert not both.changed().size
    given = iter([0x4010_0000])
    both = Both(tables, 0, 512, tmp_path / "ram", tables=lambda: next(given, None), flush=lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        both.placed.split(0, 512)
    assert not both.changed().size
    assert both.placed.dirty().weight() == 512


def test_what_is_mapped_to_be_read_is_not_changed(tmp_path):
    g = Geometry(12, 1, 36)
    tables = Tables(g, junk=False)
    tables.leaf(0, 3, 1 << 51 | 1 << 7)
    both = Both(tables, 0, 512, tmp_path / "ram")
    live = open_live(both.path, ram_base=both.base, vttbr=g.vttbr(tables.root), vtcr=g.vtcr, readonly=True)
    assert live.dirty(0, 512).pages().tolist() == [0]
    with pytest.raises(ValueError, match=r"read-only|written"):
        live.stage2(0, 512).harvest()
    with pytest.raises(ValueError, match="read-only"):
        both.placed.level(3)[0] = 0


def test_which_tables_fit_into_ram():
    """Those that are wholly inside of it, wherever it begins."""
    for granule in Granule:
        size = granule.page_size
        for base, nbytes, tables in (
            (0, size, 1), (size, 2 * size - 8, 1), (3 * size, 2 * size, 2), (size - 4096, size + size - 8, 1),
            (size - 4096, size + size, 1 + (size == 4096)), (4096, 2 * size - 4096, 1 + (size == 4096) * 0),
        ):  # fmt: skip
            words = np.arange(nbytes // 8, dtype=np.uint64)
            memory = LiveTables(words, base, granule)
            first = -(-base // size) * size
            at = np.array([first - size, first, first + (tables - 1) * size, first + tables * size]).astype(np.uint64)
            assert memory.capacity == tables
            assert memory.find(at).tolist() == [-1, 0, tables - 1, -1]
            assert memory.extent == f"the RAM's {base:#018x}..{base + nbytes - 1:#018x}"
            rows = memory.read(np.array([tables - 1, 0]), np.empty((3, size // 8), dtype=np.uint64))
            assert rows[:, 0].tolist() == [(at[2] - base) // 8, (first - base) // 8]
            assert not np.shares_memory(rows, words)
        for base, nbytes in ((0, size - 8), (0, 0), (4096, size - 8)):
            with pytest.raises(ImageError, match=f"^{nbytes} bytes of RAM: not one {granule} table fits in$"):
                LiveTables(np.zeros(nbytes // 8, dtype=np.uint64), base, granule)


def test_a_slot_may_end_where_the_ipa_space_ends(tmp_path):
    tables = Tables(Geometry(12, 1, 36), junk=False)
    top = 1 << 24
    tables.leaf(top - 1 << 12, 3, 1 << 51 | 1 << 7)
    both = Both(tables, top - 2, 2, tmp_path / "ram")
    assert both.placed.dirty().pages().tolist() == [1]
    for gfn, npages in ((top - 2, 3), (top - 1, 2), (top, 1)):
        with pytest.raises(
            GfnError, match=f"gfn {gfn:#x} and {npages} pages reach beyond the 36 bits of the IPA space"
        ):
            both.live.stage2(gfn, npages)


def test_bad_files_and_registers(tmp_path):
    path = tmp_path / "ram"
    path.write_bytes(b"")
    with pytest.raises(ImageError, match="can't be mapped"):
        open_live(path, ram_base=0, vttbr=0x1000, vtcr=0x8000_3558)
    path.write_bytes(bytes(1 << 16))
    with pytest.raises(ImageError, match="isn't a multiple of 4 KiB"):
        open_live(path, ram_base=1, vttbr=0x1000, vtcr=0x806A_3558)
    with pytest.raises(ImageError, match=r"is not in the RAM's 0x0000000040000000..0x000000004000ffff"):
        open_live(path, ram_base=0x4000_0000, vttbr=0x1000_0000, vtcr=0x806A_3558).stage2(0, 1)
    with pytest.raises(hwdbm.errors.GfnError, match="40 bits"):
        Live(np.zeros(1 << 13, dtype=np.uint64), 0, Registers(0x2000, 0x806A_3558)).stage2(1 << 28, 1)
    for base, shown in ((-4096, "-4096"), (1 << 52, "0x10000000000000")):
        with pytest.raises(ImageError, match=f"^the RAM's base is 0 to 0xfffffffffffff, not {shown}$"):
            open_live(path, ram_base=base, vttbr=0x1000_0000, vtcr=0x806A_3558)
    assert repr(open_live(path, ram_base=(1 << 52) - (1 << 16), vttbr=0x1000_0000, vtcr=0x806A_3558)) == (
        "<Live: the RAM's 0x000fffffffff0000..0x000fffffffffffff, 4K tables at 0x10000000>"
    )
    with pytest.raises(FileNotFoundError):
        open_live(tmp_path / "none", ram_base=0, vttbr=0x1000, vtcr=0x806A_3558)
