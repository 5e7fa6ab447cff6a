"""Granules against the Arm ARM's tables, written out (DDI0487, D8.2 and D8.3)."""

import pytest

from hwdbm.granule import LEAF_LEVELS, Granule, size_name

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40

# By granule: page, entries a table, bits a level, and what an entry maps at levels 0 to 3.
GEOMETRY = {
    Granule.K4: (4 * KIB, 512, 9, (512 * GIB, 1 * GIB, 2 * MIB, 4 * KIB)),
    Granule.K16: (16 * KIB, 2048, 11, (128 * TIB, 64 * GIB, 32 * MIB, 16 * KIB)),
    Granule.K64: (64 * KIB, 8192, 13, (32768 * TIB, 4 * TIB, 512 * MIB, 64 * KIB)),
}
# The bytes of a contiguous run at levels 1 to 3; None where there are no blocks without 52-bit descriptors.
CONTIGUOUS = {
    Granule.K4: (16 * GIB, 32 * MIB, 64 * KIB),
    Granule.K16: (None, 1 * GIB, 2 * MIB),
    Granule.K64: (None, 16 * GIB, 2 * MIB),
}
granules = pytest.mark.parametrize("granule", Granule, ids=str)


@granules
def test_geometry(granule: Granule) -> None:
    page, entries, bits, sizes = GEOMETRY[granule]
    assert granule.page_size == page == 1 << granule.page_shift
    assert (granule.entries, granule.bits_per_level) == (entries, bits)
    assert tuple(1 << granule.shift(level) for level in range(4)) == sizes
    assert tuple(granule.pages_per_entry(level) for level in range(4)) == tuple(size // page for size in sizes)


@granules
def test_an_entry_maps_what_its_table_does(granule: Granule) -> None:
    for level in range(-1, 3):
        assert granule.pages_per_entry(level) == granule.entries * granule.pages_per_entry(level + 1)


def test_shift_of_the_level_above_zero() -> None:
    assert Granule.K4.shift(-1) == 48  # what LPA2 adds


@pytest.mark.parametrize("level", [-2, 4])
def test_shift_rejects(level: int) -> None:
    with pytest.raises(ValueError, match=f"level is -1 to 3, not {level}"):
        Granule.K4.shift(level)


def test_block_levels() -> None:
    usual = {granule: granule.block_levels() for granule in Granule}
    large = {granule: granule.block_levels(large=True) for granule in Granule}
    assert usual == {Granule.K4: (1, 2), Granule.K16: (2,), Granule.K64: (2,)}
    assert large == {Granule.K4: (0, 1, 2), Granule.K16: (1, 2), Granule.K64: (1, 2)}


def test_leaf_levels_hold_blocks_and_pages() -> None:
    assert set(LEAF_LEVELS) == {level for granule in Granule for level in granule.block_levels()} | {3}


@granules
def test_contiguous_runs(granule: Granule) -> None:
    for level, size in zip((1, 2, 3), CONTIGUOUS[granule], strict=True):
        entries = granule.contiguous_entries(level)
        assert entries * (1 << granule.shift(level)) == size if size else entries == 1
    assert granule.contiguous_entries(0) == 1


@pytest.mark.parametrize(
    ("text", "granule"),
    [
        ("4K", Granule.K4),
        ("16k", Granule.K16),
        (" 64K ", Granule.K64),
        ("4KiB", Granule.K4),
        ("16KB", Granule.K16),
    ],
)
def test_parse(text: str, granule: Granule) -> None:
    assert Granule.parse(text) is granule
    assert Granule.parse(str(granule)) is granule


@pytest.mark.parametrize("text", ["", "K", "4", "8K", "4M", "4096", "4KK"])
def test_parse_rejects(text: str) -> None:
    with pytest.raises(ValueError, match=f"4K, 16K or 64K, not {text!r}"):
        Granule.parse(text)


def test_size_names() -> None:
    assert [size_name(1 << shift) for shift in (12, 14, 16, 21, 25, 29, 30, 36, 39, 42)] == (
        ["4K", "16K", "64K", "2M", "32M", "512M", "1G", "64G", "512G", "4T"]
    )
    assert size_name(0) == "0"
