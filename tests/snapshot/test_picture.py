"""The picture of a chain shows what its snapshots hold, where and in the units that it says."""

import figures
import pytest
from seen import as_seen

from hwdbm.bitmap import DirtyBitmap
from hwdbm.memslot import Memslot
from hwdbm.snapshot import Snapshot
from hwdbm.snapshot.picture import draw
from hwdbm.vm import MemoryMap

LAYOUT = MemoryMap(4096, (Memslot(0, 0, 0x40000, 1200, 0), Memslot(1, 0, 0x10, 100, 0)))
ALL = [(0, 1200)], [(0, 100)]


def snapshot(number: int, parent: int | None, layout: MemoryMap = LAYOUT) -> Snapshot:
    digest = "0" * 64
    return Snapshot(
        f"{number:032x}", None if parent is None else f"{parent:032x}", number, 0, layout, (0, 1200 << 12),
        1300 << 12, "m", "b", digest, digest, None, None, None, "machine", "hardware DBM", (), f"{number:04}-a-name",
    )  # fmt: skip


def pages(ranges) -> dict[int, DirtyBitmap]:
    each = zip(LAYOUT.slots, ranges, strict=True)
    return {slot.id: DirtyBitmap.from_ranges(some, slot.npages) for slot, some in each}


CHAIN = [
    (snapshot(1, None), pages(ALL), 5_000_000),
    (snapshot(2, 1), pages(([(7, 1), (100, 300)], [(50, 50)])), 1_600_000),
    (snapshot(3, 1), pages(([(300, 200), (1199, 1)], [])), 900_000),
    (snapshot(4, 2), pages(([(250, 100)], [(0, 100)])), 12_345_678),
    (snapshot(5, 99), pages(([], [])), 0),
]
LONG = [(snapshot(number, number - 1 or None), pages(([(number, 3)], [])), number << 20) for number in range(1, 62)]


@pytest.mark.parametrize(("name", "chain"), [("tree", CHAIN), ("long", LONG), ("none", [])])
def test_a_picture_shows_what_the_one_that_was_looked_at_shows(name, chain, monkeypatch, tmp_path):
    found = figures.drawn(monkeypatch)
    draw(tmp_path / "a.png", *(zip(*chain, strict=True) if chain else ([], [], [])))
    as_seen(f"pictures/chain-{name}.txt", *found)


def test_it_looks_like_the_one_that_was_looked_at(monkeypatch, tmp_path):
    found = figures.looks(monkeypatch)
    draw(tmp_path / "a.png", *zip(*CHAIN, strict=True))
    as_seen("pictures/looks-chain.txt", *found)
