"""What reading costs in memory: batches, whatever the size of the image; and nothing for what isn't mapped."""

import tracemalloc
from pathlib import Path

import numpy as np

from hwdbm import Granule, pte
from hwdbm.image import Slot, open_image
from hwdbm.vtcr import Vtcr

MIB = 1 << 20
BASE = 0x4000_0000


def image_of(path: Path, tables: int) -> dict[str, int]:
    """Write an image of two roots, level-2 tables, and `tables` level-3 tables in an order of no order."""
    above = -(-tables // 512)
    rows = np.zeros((2 + above + tables, 512), dtype=np.uint64)
    order = np.random.default_rng(0).permutation(tables)
    at = BASE + ((2 + above + order) << 12).astype(np.uint64)
    rows[2 : 2 + above].reshape(-1)[:tables] = pte.make_table(at)
    rows[0, :above] = pte.make_table(BASE + (np.arange(2, 2 + above, dtype=np.uint64) << np.uint64(12)))
    pages = np.arange(tables * 512, dtype=np.uint64) << np.uint64(12)
    rows[2 + above + order] = pte.make_leaf(pages, 3, dbm=True, dirty=True).reshape(-1, 512)
    rows.tofile(path)
    return {"ram_base": BASE, "vttbr": BASE, "vtcr": Vtcr.for_vm(Granule.K4, 40, mmfr1=2).encode()}


def test_temporaries_are_batches(tmp_path: Path) -> None:
    """32 MiB of tables are read, and 32 MiB of leaves filled, with less than 8 MiB on top."""
    path = tmp_path / "ram.img"
    image = open_image(path, **image_of(path, 8192), slots=[Slot(0, 0, 8192 << 21)])
    image.stage2(0)  # whatever is imported and compiled at first
    tracemalloc.start()
    try:
        stage2 = image.stage2(0)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 32 * MIB + 2 * stage2.npages // 8 + 8 * MIB
    assert stage2.dirty().weight() == stage2.npages


def test_order_of_tables_is_of_no_matter(tmp_path: Path) -> None:
    path = tmp_path / "ram.img"
    image = open_image(path, **image_of(path, 700), slots=[Slot(0, 5 << 12, (700 << 21) - (9 << 12))])
    entries = image.stage2(0).level(3)
    pages = np.arange(5, 700 * 512 - 4, dtype=np.uint64) << np.uint64(12)
    assert np.array_equal(entries, pte.make_leaf(pages, 3, dbm=True, dirty=True))
