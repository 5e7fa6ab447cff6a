"""Images of every geometry, built entry by entry, against a walker that translates one page at a time."""

import functools
import random
from pathlib import Path

import numpy as np
import pytest
from effort import EFFORT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from synthetic import Geometry, Tables, flags_of, geometries, populate

from hwdbm import DirtyBitmap
from hwdbm.image import Image, Slot, open_image

SLOT_PAGES = 400  # of 4 KiB


def some_slots(g: Geometry, rng: random.Random, count: int = 2) -> list[tuple[int, int, int]]:
    """Return slots, most of them across a boundary of some level, and at odd addresses."""
    slots: list[tuple[int, int, int]] = []
    top = 1 << g.ipa - 12
    for number in range(count):
        npages = rng.choice([1, 63, 64, 65, SLOT_PAGES, rng.randrange(1, SLOT_PAGES)])
        boundary = 1 << max(0, g.shift(rng.randrange(max(g.start, 0), 4)) - 12)
        at = rng.randrange(top) // boundary * boundary - rng.choice([0, 0, 1, npages // 2, npages])
        at = min(max(at, 0), max(top - npages, 0))
        npages = min(npages, top)
        if all(at + npages <= gfn or gfn + n <= at for _, gfn, n in slots):
            slots.append((number * 7, at, npages))
    return slots


def expected(tables: Tables, gfn: int, npages: int, **how: bool) -> DirtyBitmap:
    granule = functools.cache(lambda at: tables.dirty(at << tables.g.page, **how))
    pages = [i for i in range(npages) if granule(gfn + i << 12 >> tables.g.page)]
    return DirtyBitmap.from_pages(pages, npages)


def compare(image: Image, tables: Tables, slots: list[tuple[int, int, int]]) -> None:
    for number, gfn, npages in slots:
        for policy, writable in (("dbm", False), ("writable", True)):
            for contiguous in (False, True):
                truth = expected(tables, gfn, npages, writable=writable, contiguous=contiguous)
                found = image.dirty(number, policy, 4096, contiguous=contiguous)
                assert found == truth, (number, policy, contiguous)
        image.stage2(number).verify()


def built(g: Geometry, seed: int, **how: object) -> tuple[Tables, list[tuple[int, int, int]]]:
    rng = random.Random(seed)
    base = rng.choice([0x4000_0000, 0x8000_0000, (1 << g.pa) - (1 << 32)])
    tables = Tables(g, base=base, seed=seed, **how)  # type: ignore[arg-type]
    slots = some_slots(g, rng)
    populate(tables, slots)
    # A root with nothing above the slots is refused, so that something is mapped.
    tables.leaf(slots[0][1] << 12 >> g.page << g.page, 3, flags_of(tables.random))
    return tables, slots


@pytest.mark.parametrize("g", geometries(), ids=str)
@pytest.mark.alike(4)
def test_every_geometry(g: Geometry, tmp_path: Path) -> None:
    tables, slots = built(g, seed=g.vtcr)
    if g.ipa % 3:
        path = tmp_path / "capture.npz"
        np.savez(path, **tables.arrays(slots))
        image = open_image(path)
    else:
        path = tmp_path / "ram.img"
        ram_base, raw = tables.raw()
        path.write_bytes(raw)
        image = open_image(
            path,
            ram_base=ram_base,
            vttbr=g.vttbr(tables.root),
            vtcr=g.vtcr,
            slots=[Slot(number, gfn << 12, n << 12) for number, gfn, n in slots],
        )
    assert (image.vtcr.start_level, image.vtcr.ipa_bits) == (g.start, g.ipa)
    assert image.vtcr.root_tables == g.roots
    assert image.vttbr.baddr == tables.root
    compare(image, tables, slots)


@settings(max_examples=40 * EFFORT, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(g=st.sampled_from(geometries()), seed=st.integers(0, 1 << 32), junk=st.booleans())
def test_random_layouts(g: Geometry, seed: int, junk: bool, tmp_path: Path) -> None:
    tables, slots = built(g, seed, junk=junk)
    path = tmp_path / "capture.npz"
    np.savez(path, **tables.arrays(slots))
    compare(open_image(path), tables, slots)


@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("page", [12, 14, 16])
@pytest.mark.alike(2)
def test_slots_of_whole_tables(page: int, before: int, tmp_path: Path) -> None:
    """Whole tables are copied at once, also where the slot begins some pages before one."""
    g = Geometry(page, 1, 43)
    tables = Tables(g)
    parts = 1 << page - 12
    gfn = (5 * g.entries - before) * parts + parts // 2
    npages = (2 * g.entries + 7) * parts
    for i in tables.random.sample(range(npages // parts), 500):
        tables.leaf((gfn // parts + i) << page, 3, flags_of(tables.random))
    path = tmp_path / "capture.npz"
    np.savez(path, **tables.arrays([(0, gfn, npages)]))
    compare(open_image(path), tables, [(0, gfn, npages)])


@pytest.mark.parametrize("g", [Geometry(12, 0, 48, 48, ds=True), Geometry(14, 2, 40, 40, ds=True)])
def test_shareability_left_where_addresses_are_small(g: Geometry, tmp_path: Path) -> None:
    """With DS set, bits 9:8 are address bits 51:50, but nothing looks there if PS is smaller."""
    tables = Tables(g, junk=False)
    tables.leaf(0x20_0000, 3, 1 << 51 | 1 << 7 | 0b11 << 8)
    path = tmp_path / "capture.npz"
    np.savez(path, **tables.arrays([(0, 0x200, 16)]))
    assert open_image(path).dirty(0, page_size=4096).weight() == 1 << g.page - 12


@pytest.mark.parametrize("junk", [False, True])
def test_level_0_block(tmp_path: Path, junk: bool) -> None:
    """A block of 512 GiB is handed on as level-1 blocks, each with its own address."""
    g = Geometry(12, -1, 52, 52, ds=True)
    tables = Tables(g, junk=junk)
    tables.leaf(3 << 39, 0, 1 << 51 | 1 << 7, pa=5 << 39)
    path = tmp_path / "capture.npz"
    np.savez(path, **tables.arrays([(0, (3 << 27) - 5, (1 << 27) + 9)]))
    image = open_image(path)
    stage2 = image.stage2(0)
    stage2.verify()
    blocks = stage2.level(1)
    assert blocks.size == 514
    assert blocks[0] == blocks[-1] == 0
    address = blocks[1:-1] & np.uint64((1 << 50) - (1 << 30))
    assert address.tolist() == [(5 << 39) + (i << 30) for i in range(512)]
    assert image.dirty(0).ranges().tolist() == [[5, 1 << 27]]


@pytest.mark.parametrize("dirty", [0, 7, 15])
def test_a_run_of_blocks_around_a_slot(dirty: int, tmp_path: Path) -> None:
    """One of its blocks is dirty, perhaps outside of the slot: all pages of the slot are that are in the run."""
    tables = Tables(Geometry(12, 1, 40), junk=False)
    for at in range(32):
        tables.leaf((32 + at) << 21, 2, 1 << 52 | 1 << 51 | (1 << 7 if at == dirty else 0), pa=at << 21)
    slots = [(0, (32 + 3 << 9) + 5, 1024), (1, (32 + 14 << 9) + 9, 1024), (2, 32 + 17 << 9, 512), (3, 31 << 9, 512)]
    np.savez(tmp_path / "capture.npz", **tables.arrays(slots))
    image = open_image(tmp_path / "capture.npz")
    found = [image.dirty(number).ranges().tolist() for number, _, _ in slots]
    assert found == [[[0, 1024]], [[0, 1024 - 9]], [], []]


def test_tables_of_start_level_are_what_the_levels_above_point_to(tmp_path: Path) -> None:
    g = Geometry(14, 2, 40)
    tables = Tables(g, junk=False)
    tables.leaf(5 << 36, 3, 1 << 51)
    path = tmp_path / "capture.npz"
    np.savez(path, **tables.arrays([(0, 5 << 24, 4)]))
    stage2 = open_image(path).stage2(0)
    assert stage2.level(1).tolist() == [tables.root + (5 << 14) | 3]
    assert int(stage2.level(2)[0]) == tables.get(tables.root + (5 << 14))
    assert int(stage2.level(3)[0]) & 1 << 51


def test_aliases_of_a_table_are_read_twice(tmp_path: Path) -> None:
    tables = Tables(Geometry(12, 1, 40), junk=False)
    tables.leaf(0x20_0000, 3, 1 << 51 | 1 << 7)
    first, second = tables.entry(0x20_0000, 2), tables.entry(0x60_0000, 2)
    assert first is not None
    assert second is not None
    tables.put(second, tables.get(first))
    path = tmp_path / "capture.npz"
    np.savez(path, **tables.arrays([(0, 0x200, 0x600)]))
    assert open_image(path).dirty(0).pages().tolist() == [0, 0x400]
