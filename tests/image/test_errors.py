"""Input that can't be: an ImageError that names the entry; never a guess, a hang, or another exception."""

import bz2
import contextlib
import gzip
import io
import lzma
import re
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from effort import EFFORT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from synthetic import Geometry, Tables

from hwdbm.errors import ImageError
from hwdbm.granule import Granule
from hwdbm.image import Image, Slot, open_image
from hwdbm.image.raw import RawTables
from hwdbm.image.slots import check_page_size, check_slots
from hwdbm.stage2 import Stage2

CAPTURES = Path(__file__).parents[1] / "data" / "captures"
CAPTURE = CAPTURES / "4k_ipa40" / "round1.npz"
IPA = 0x8060_3000
G = Geometry(12, 1, 40, 40)


@pytest.fixture
def tables() -> Tables:
    tables = Tables(G)
    tables.leaf(IPA, 3, 1 << 51 | 1 << 7)
    tables.leaf(0x1_0000_0000, 2, 1 << 51)
    return tables


def opened(tables: Tables, path: Path, slots: list[tuple[int, int, int]] | None = None) -> Image:
    np.savez(path / "image.npz", **tables.arrays(slots or [(0, 0x80600, 64)]))
    return open_image(path / "image.npz")


def fails(tables: Tables, path: Path, level: int, at: int, ipa: int, why: str) -> None:
    """Reading fails with the entry's level, address, IPA, descriptor, and the reason. So it does as a raw image."""
    text = f"level-{level} entry at {at:#018x}, for IPA {ipa:#018x}, is {tables.get(at):#018x}"
    with pytest.raises(ImageError, match=re.escape(text) + ".*" + why):
        opened(tables, path).dirty(0)
    ram_base, raw = tables.raw()
    (path / "ram.img").write_bytes(raw)
    how = {"ram_base": ram_base, "vttbr": G.vttbr(tables.root), "vtcr": G.vtcr}
    image = open_image(path / "ram.img", **how, slots=[Slot(0, 0x8060_0000, 1 << 18)])
    with pytest.raises(ImageError, match=re.escape(text)):
        image.stage2(0)


def table_entry(tables: Tables, level: int, ipa: int = IPA) -> int:
    at = tables.entry(ipa, level, make=False)
    assert at is not None
    return at


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("pa", [0x3FFF_F000, 0x7000_0000, 0xFF_FFFF_F000])
def test_table_outside_of_the_image(tables: Tables, tmp_path: Path, level: int, pa: int) -> None:
    at = table_entry(tables, level)
    tables.put(at, pa | 3)
    fails(tables, tmp_path, level, at, IPA >> 39 - 9 * level << 39 - 9 * level, f"no table at {pa:#018x}")


@pytest.mark.parametrize("level", [1, 2])
def test_table_beyond_ps(tables: Tables, tmp_path: Path, level: int) -> None:
    at = table_entry(tables, level)
    tables.put(at, tables.get(at) | 1 << 44)
    fails(tables, tmp_path, level, at, IPA >> 39 - 9 * level << 39 - 9 * level, "beyond the 40 bits of PS")


def test_leaf_beyond_ps(tables: Tables, tmp_path: Path) -> None:
    at = table_entry(tables, 3)
    tables.put(at, tables.get(at) | 1 << 40)
    fails(tables, tmp_path, 3, at, IPA, "beyond the 40 bits of PS")


def test_block_beyond_ps(tables: Tables, tmp_path: Path) -> None:
    at = table_entry(tables, 2, 0x1_0000_0000)
    tables.put(at, tables.get(at) | 1 << 47)
    fails(tables, tmp_path, 2, at, 0x1_0000_0000, "beyond the 40 bits of PS")


def test_invalid_entries_may_have_any_address(tables: Tables, tmp_path: Path) -> None:
    at = table_entry(tables, 3, IPA + 0x1000)
    tables.put(at, (1 << 64) - 2)
    assert opened(tables, tmp_path).dirty(0).pages().tolist() == [3]


def test_reserved_at_level_3(tables: Tables, tmp_path: Path) -> None:
    at = table_entry(tables, 3)
    tables.put(at, tables.get(at) & ~2)
    fails(tables, tmp_path, 3, at, IPA, "reserved")


@pytest.mark.parametrize(
    ("g", "level"),
    [
        (Geometry(12, 0, 48), 0),
        (Geometry(12, -1, 52, 52, ds=True), -1),
        (Geometry(14, 1, 44), 1),
        (Geometry(14, 0, 52, 52, ds=True), 0),
    ],
    ids=str,
)
def test_block_where_there_are_none(tmp_path: Path, g: Geometry, level: int) -> None:
    tables = Tables(g, junk=False)
    tables.leaf(0, 3, 0)
    at = tables.root + 8
    tables.put(at, 0x4000_0001)
    with pytest.raises(ImageError, match=f"level-{level} entry at {at:#018x}.*has no blocks"):
        opened(tables, tmp_path, [(0, 0, 1 << g.page - 12)]).dirty(0)


@pytest.mark.parametrize(("parange", "allowed"), [(5, False), (6, True), (7, True), (None, False)])
def test_64k_level_1_blocks_need_a_cpu_with_52_bits(tmp_path: Path, parange: int | None, allowed: bool) -> None:
    g = Geometry(16, 1, 46, 48)
    tables = Tables(g, junk=False)
    tables.put(tables.root, 1 << 51 | 1 << 7 | 1)
    arrays = tables.arrays([(0, 0, 32)])
    if parange is None:
        (tmp_path / "ram.img").write_bytes(tables.raw()[1])
        image = open_image(
            tmp_path / "ram.img",
            ram_base=tables.raw()[0],
            vttbr=g.vttbr(tables.root),
            vtcr=g.vtcr,
            slots=[Slot(0, 0, 1 << 17)],
        )
    else:
        arrays["regs"][3] = 0x1120 | parange
        np.savez(tmp_path / "image.npz", **arrays)
        image = open_image(tmp_path / "image.npz")
    if allowed:
        assert image.dirty(0).weight() == 2
    else:
        with pytest.raises(ImageError, match=r"level-1 entry.*no blocks without 52-bit addresses"):
            image.dirty(0)


def test_loop_to_itself(tables: Tables, tmp_path: Path) -> None:
    at = table_entry(tables, 2)
    tables.put(at, at & ~0xFFF | 3)
    fails(tables, tmp_path, 2, at, IPA >> 21 << 21, f"a loop: the table at {at & ~0xFFF:#018x}")


def test_loop_to_a_root(tables: Tables, tmp_path: Path) -> None:
    at = table_entry(tables, 2)
    tables.put(at, tables.root + 0x1000 | 3)
    fails(tables, tmp_path, 2, at, IPA >> 21 << 21, "a loop")


def test_table_at_two_levels(tables: Tables, tmp_path: Path) -> None:
    """No loop in the strict sense, but a table can't be of level 2 for one IPA and of level 3 for another."""
    at = table_entry(tables, 2)
    other = tables.entry(0x3_0000_0000, 2)  # a level-2 table of its own
    assert other is not None
    tables.put(at, other & ~0xFFF | 3)
    fails(tables, tmp_path, 2, at, IPA >> 21 << 21, "a loop")


def test_corruption_outside_of_the_slots(tables: Tables, tmp_path: Path) -> None:
    tables.leaf(0xF0_0000_0000, 3, 0)
    at = table_entry(tables, 3, 0xF0_0000_0000)
    tables.put(at, 1)
    fails(tables, tmp_path, 3, at, 0xF0_0000_0000, "reserved")


def test_the_same_tables_over_and_over(tmp_path: Path) -> None:
    """1023 + 512 * 512 aliases of a few tables end in an error, and soon."""
    tables = Tables(Geometry(12, 0, 48), junk=False)
    tables.leaf(0, 3, 0)
    for level in (0, 1, 2):
        at = table_entry(tables, level, 0)
        for i in range(512):
            tables.put(at + 8 * i, tables.get(at))
    image = opened(tables, tmp_path)
    start = time.perf_counter()
    # By the last entry of the first batch of a MiB, of 256 times the same table of level 1.
    at, ipa = table_entry(tables, 1, 0) + 8 * 511, 255 << 39 | 511 << 30
    planned = 1 + 512 + 256 * 512
    where = (
        f"level-1 entry at {at:#018x}, for IPA {ipa:#018x}, .*: by here the tables lead to {planned} others, and to "
    )
    with pytest.raises(
        ImageError, match=f"{where}the same ones again and again: there is room for 4 in the .* 4 tables"
    ):
        image.dirty(0)
    assert time.perf_counter() - start < 5


# --- registers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vtcr", "why"),
    [
        (0x806A_3518, "T0SZ = 24 .* is inconsistent with SL0 = 0b00"),
        (0x806A_F558, "TG0 = 0b11 is reserved"),
        (0x806A_354B, "T0SZ = 11"),
        (0x806F_3558, "PS = 0b111"),
        (0x10_806A_3558, "S2PIE"),
        (0x40_806A_3558, "D128"),
    ],
)
def test_vtcr(vtcr: int, why: str) -> None:
    with pytest.raises(ImageError, match=f"VTCR_EL2 = {vtcr:#018x}.*{why}"):
        open_image(CAPTURE, vtcr=vtcr)


@pytest.mark.parametrize(
    ("vttbr", "why"),
    [
        (0x4100_1000, "isn't aligned to the 0x2000 bytes of its 2"),
        (0x100_4100_0000, "beyond the 40 bits of PS"),
    ],
)
def test_vttbr(vttbr: int, why: str) -> None:
    with pytest.raises(ImageError, match=f"VTTBR_EL2 = {vttbr:#018x}.*{why}"):
        open_image(CAPTURE, vttbr=vttbr)


def test_root_outside_of_the_image() -> None:
    image = open_image(CAPTURE, vttbr=0x9000_0000)
    with pytest.raises(ImageError, match=r"BADDR = 0x0000000090000000: table 1 of the 2 of level 1"):
        image.dirty(0)


def test_which_table_of_the_start_level_is_outside_of_the_image(tmp_path: Path) -> None:
    g = Geometry(12, 1, 41)
    (tmp_path / "ram.img").write_bytes(bytes(3 * 4096))
    how = {"ram_base": 0x4000_0000, "vttbr": g.vttbr(0x4000_0000), "vtcr": g.vtcr}
    with pytest.raises(ImageError) as caught:
        open_image(tmp_path / "ram.img", **how).read()
    assert str(caught.value) == (
        "VTTBR_EL2.BADDR = 0x0000000040000000: table 4 of the 4 of level 1, at 0x0000000040003000, is not in the "
        "image's 0x0000000040000000..0x0000000040002fff"
    )


# --- slots ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slots", "why"),
    [
        ([(0, 0, 4096), (0, 8192, 4096)], "two slots have the id 0"),
        ([(0, 0, 8192), (1, 4096, 4096)], "slot 0 .* and slot 1 .* overlap"),
        ([(0, (1 << 40) - 4096, 8192)], "beyond the 40 bits"),
    ],
)
def test_slots_against_each_other(slots: list[tuple[int, int, int]], why: str) -> None:
    with pytest.raises(ImageError, match=why):
        open_image(CAPTURE, slots=[Slot(*slot) for slot in slots])


@pytest.mark.parametrize(
    ("slot", "why"),
    [
        ((-1, 0, 4096), "id is 0 to"),
        ((0, 2048, 4096), "slot 0: gpa 0x800"),
        ((0, -4096, 4096), "gpa is 0 to"),
        ((0, 0, 0), "slot 0: size 0x0"),
        ((0, 0, 4097), "slot 0: size 0x1001"),
    ],
)
def test_slot(slot: tuple[int, int, int], why: str) -> None:
    with pytest.raises(ImageError, match=why):
        Slot(*slot)


def test_slots_that_just_fit() -> None:
    """One after the other, to the end of the addresses that there are."""
    top = (1 << 64) - 4096
    slots = check_slots([Slot(9, 4096, 4096), Slot(3, 0, 4096), Slot((1 << 64) - 1, top, 4096)], 64)
    assert [slot.id for slot in slots] == [3, 9, (1 << 64) - 1]
    assert slots[2].end == 1 << 64
    for number, gpa, size, why in (
        (1 << 64, 0, 4096, "a slot's id is 0 to 0xffffffffffffffff, not 0x10000000000000000"),
        (0, top, 8192, "slot 0: gpa 0xfffffffffffff000 and size 0x2000 reach beyond 64 bits"),
        (5, 0, 0, "slot 5: size 0x0 isn't a multiple of 4 KiB, or isn't more than 0"),
    ):
        with pytest.raises(ImageError, match=f"^{why}$"):
            Slot(number, gpa, size)
    assert check_slots([Slot(0, (1 << 40) - 4096, 4096)], 40)
    for bad, why in (
        (
            [Slot(4, 0x2000, 0x3000), Slot(6, 0, 0x2000), Slot(5, 0x4000, 0x1000)],
            (
                "slot 4 (0x0000000000002000..0x0000000000004fff) and "
                "slot 5 (0x0000000000004000..0x0000000000004fff) overlap"
            ),
        ),
        (
            [Slot(0, 0x2000, 0x1000), Slot(1, 0x3000, 1 << 40)],
            "slot 1 (0x0000000000003000..0x0000010000002fff) reaches beyond the 40 bits of the IPA space",
        ),
    ):
        with pytest.raises(ImageError, match=f"^{re.escape(why)}$"):
            check_slots(bad, 40)


@pytest.mark.parametrize(
    ("gpa", "size", "asked", "best"),
    [(0x3000, 0x2000, 8192, "4K"), (0x4000, 0x6000, 16384, "8K"), (1 << 21, 3 << 20, 1 << 21, "1024K")],
)
def test_the_largest_page_that_a_slot_is_made_of(gpa: int, size: int, asked: int, best: str) -> None:
    slot = Slot(2, gpa, size)
    why = f"slot 2 ({gpa:#018x}, {size:#x} bytes) isn't made of whole pages of {asked >> 10}K: "
    why += f"choose a page size of {best}"
    with pytest.raises(ImageError, match=f"^{re.escape(why)} or less$"):
        check_page_size(slot, Granule.K4, asked)
    assert check_page_size(slot, Granule.K64, int(best[:-1]) << 10) == int(best[:-1]) << 10
    assert check_page_size(slot, Granule.K4, None) == 4096
    for wrong in (2048, 4097, 12288):
        with pytest.raises(ImageError, match=f"a page is a power of two of 4 KiB or more, not {wrong:#x} bytes"):
            check_page_size(slot, Granule.K4, wrong)


def test_no_such_slot() -> None:
    with pytest.raises(ImageError, match=r"no slot 9 \(there are: 0, 1, 2\)"):
        open_image(CAPTURE).dirty(9)


@pytest.mark.parametrize(("size", "best"), [(16384, "4K"), (1 << 21, "4K")])
def test_page_size_that_the_slot_is_not_made_of(size: int, best: str) -> None:
    with pytest.raises(ImageError, match=f"slot 1 .* choose a page size of {best} or less"):
        open_image(CAPTURE).dirty(1, page_size=size)


@pytest.mark.parametrize("size", [0, 1, 2048, 12288, -4096])
def test_page_size_that_is_none(size: int) -> None:
    with pytest.raises(ImageError, match=r"power of two of 4 KiB or more|0 or more"):
        open_image(CAPTURE).dirty(0, page_size=size)


def test_granule_of_an_odd_slot() -> None:
    image = open_image(CAPTURES / "16k_ipa40" / "round1.npz", slots=[Slot(0, 0x8000_1000, 0x8000)])
    with pytest.raises(ImageError, match="choose a page size of 4K"):
        image.dirty(0)
    assert image.dirty(0, page_size=4096).npages == 8


# --- files ------------------------------------------------------------------------------------------------


def change(tmp_path: Path, edit: Callable[[dict[str, np.ndarray]], object]) -> Path:
    with np.load(CAPTURE) as loaded:
        arrays = dict(loaded)
    edit(arrays)
    np.savez(tmp_path / "changed.npz", **arrays)
    return tmp_path / "changed.npz"


@pytest.mark.parametrize("name", ["table_pa", "table_data", "regs", "memslots"])
def test_missing_array(tmp_path: Path, name: str) -> None:
    path = change(tmp_path, lambda arrays: arrays.pop(name))
    with pytest.raises(ImageError, match=f"no array '{name}'"):
        open_image(path)


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("table_pa", np.zeros((31, 1), np.uint64), "1-dimensional array of integers, not uint64"),
        ("table_pa", np.zeros(31), "not float64"),
        ("table_pa", np.full(31, -1), "negative"),
        ("table_pa", np.arange(31) * 4096 + 8, "isn't aligned"),
        ("table_pa", np.zeros(31, np.uint64), "there twice"),
        ("table_pa", np.zeros(30, np.uint64), r"has the shape \(30, 512\), not \(31, 512\)"),
        ("table_data", np.zeros((31, 511), np.uint64), r"has the shape \(31, 512\)"),
        ("regs", np.zeros(4, np.uint64), "5 registers, not 4"),
        ("memslots", np.zeros((1, 2), np.uint64), "2 columns"),
        ("memslots", np.array(["x"]), "not <U1"),
    ],
)
def test_ill_shaped_array(tmp_path: Path, name: str, value: np.ndarray, why: str) -> None:
    path = change(tmp_path, lambda arrays: arrays.__setitem__(name, value))
    with pytest.raises(ImageError, match=why):
        open_image(path)


def test_other_integers_do_as_well(tmp_path: Path) -> None:
    def edit(arrays: dict[str, np.ndarray]) -> None:
        arrays["memslots"] = arrays["memslots"].astype(np.int32)
        order = np.random.default_rng(0).permutation(len(arrays["table_pa"]))
        arrays["table_pa"] = arrays["table_pa"][order].astype(">i8")
        arrays["table_level"] = arrays["table_level"][order]
        arrays["table_data"] = np.asfortranarray(arrays["table_data"][order])

    assert open_image(change(tmp_path, edit)).dirty(1) == open_image(CAPTURE).dirty(1)


def test_pickles_are_not_opened(tmp_path: Path) -> None:
    """One that isn't needed isn't looked at, and of one that is, the header is enough."""
    path = change(tmp_path, lambda arrays: arrays.__setitem__("extra", np.array([object()])))
    open_image(path)
    path = change(tmp_path, lambda arrays: arrays.__setitem__("regs", np.array([object()])))
    with pytest.raises(ImageError, match="1-dimensional array of integers, not object"):
        open_image(path)


def bomb(path: Path, name: str, header: bytes, zeros: int) -> None:
    """Put into a capture a member that claims and holds what it wants."""
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive, archive.open(f"{name}.npy", "w") as member:
        member.write(header)
        for _ in range(zeros >> 20):
            member.write(bytes(1 << 20))


def header(shape: tuple[int, ...], dtype: str = "<u8") -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": dtype, "fortran_order": False, "shape": shape})
    return out.getvalue()


@pytest.mark.parametrize(
    ("name", "shape", "why"),
    [
        ("extra", (1 << 28,), ""),  # which isn't needed, and so isn't unpacked
        ("memslots", (1 << 28, 3), "may have 98301 at most"),
        ("regs", (1 << 28,), "5 registers, not 268435456"),
        ("table_pa", (1 << 50,), "has the shape"),
        ("table_data", (1 << 28, 512), "has the shape"),
        ("table_level", (1 << 28,), "one level for each"),
        ("expected_dirty_slot0", (1 << 28,), "and a bitmap of 8192 pages has 1024"),
    ],
)
def test_unpacking_is_bounded_before_it_happens(tmp_path: Path, name: str, shape: tuple[int, ...], why: str) -> None:
    """A few kilobytes that would become many megabytes aren't unpacked."""
    path = change(tmp_path, lambda arrays: arrays.pop(name, None))
    bomb(path, name, header(shape), 16 << 20)
    tracemalloc.start()
    try:
        with pytest.raises(ImageError, match=why) if why else contextlib.nullcontext():
            image = open_image(path)
            image.truth(image.slots[0])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20


def test_more_tables_than_there_can_be(tmp_path: Path) -> None:
    """Also where both arrays agree on it."""
    path = change(tmp_path, lambda arrays: [arrays.pop(name) for name in ("table_pa", "table_data")])
    bomb(path, "table_pa", header((1 << 40,)), 0)
    bomb(path, "table_data", header((1 << 40, 512)), 0)
    with pytest.raises(ImageError, match="more than half of this machine's memory"):
        open_image(path)


@pytest.mark.parametrize(
    ("name", "member"),
    [
        ("regs.npy", b"\x93NUMPY"),
        ("regs.npy", header((5,)) + bytes(39)),
        ("regs.npy", header((5,)) + bytes(41)),
        ("regs.npy", b"\x93NUMPY\x01\x00\x10\x00{'descr': 1, 'x' "),
        ("regs.npy", b"\x93NUMPY\x09\x00" + header((5,))[8:] + bytes(40)),
        ("regs", bytes(40)),
    ],
)
def test_a_member_that_is_no_array(tmp_path: Path, name: str, member: bytes) -> None:
    path = change(tmp_path, lambda arrays: arrays.pop("regs"))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, member)
    with pytest.raises(ImageError, match=r"'regs'.*is not a capture, or is damaged|'regs' is damaged") as raised:
        open_image(path)
    assert "pickle" not in str(raised.value)


def test_a_member_whose_checksum_is_wrong(tmp_path: Path) -> None:
    path = change(tmp_path, lambda _: None)
    raw = path.read_bytes()
    with np.load(path) as arrays:
        data = arrays["table_data"].tobytes()
    at = raw.index(data[:4096])
    path.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
    with pytest.raises(ImageError, match="'table_data' is not a capture, or is damaged"):
        open_image(path)


@pytest.mark.parametrize("level", [0, 9, 255])
def test_levels_that_the_walk_does_not_find(tmp_path: Path, level: int) -> None:
    path = change(tmp_path, lambda arrays: arrays["table_level"].__setitem__(slice(None), level))
    with pytest.raises(ImageError, match=f"is found at level 1, and 'table_level' says {level}"):
        open_image(path).dirty(0)


def test_truth_that_is_no_bitmap(tmp_path: Path) -> None:
    for value, why in ((256, "made of bytes, and has the element 0x100"), (1, "")):
        path = change(tmp_path, lambda arrays, value=value: arrays.__setitem__(
            "expected_dirty_slot1", np.full(160, value, np.uint16)))  # fmt: skip
        image = open_image(path)
        with pytest.raises(ImageError, match=why or "expected_dirty_slot1.*beyond page"):
            image.truth(image.slot(1))


MAGICS = {
    "ELF": b"\x7fELF\x02\x01\x01",
    "migration stream of QEMU": b"QEVM\0\0\0\3",
    "libvirt": b"LibvirtQemudSave",
    "kdump": b"KDUMP   \6\0\0\0",
    "diskdump": b"DISKDUMP",
    "flattened": b"makedumpfile\0\0\0\0",
    "LiME": b"EMiL\1\0\0\0",
    "AVML": b"AVML\2\0\0\0",
    "crash dump of Windows": b"PAGEDU64",
    "gzip": gzip.compress(b"x"),
    "xz": lzma.compress(b"x"),
    "bzip2": bz2.compress(b"x"),
    "zstd": bytes.fromhex("28b52ffd"),
    "lz4": bytes.fromhex("04224d18"),
    "qcow2": b"QFI\xfb",
    "tar archive": bytes(257) + b"ustar\x0000",
    "NumPy array": b"\x93NUMPY\1\0",
    "VDI": bytes(64) + bytes.fromhex("7f10dabe"),
    "VHDX": b"vhdxfile",
    "VMware": bytes.fromhex("d2bed2be"),
    "VirtualBox": b"\x7fVirtualBox SavedState V2.0\n",
    "Xen": b"Xen saved domain, xl format\n",
    "QED": b"QED\0",
    "Parallels": b"WithoutFreeSpace\2",
    "squashfs": b"hsqs",
    "HDF5": b"\x89HDF\r\n\x1a\n",
    "7-Zip": bytes.fromhex("377abcaf271c"),
}


@pytest.mark.parametrize("what", MAGICS)
def test_what_is_known_to_be_no_ram(tables: Tables, tmp_path: Path, what: str) -> None:
    """It is refused by name, with what to do, though RAM follows in which the tables would be found."""
    ram_base, raw = tables.raw()
    path = tmp_path / "ram.img"
    path.write_bytes(MAGICS[what].ljust(4096, b"\0") + raw)
    how = {"vttbr": G.vttbr(tables.root), "vtcr": G.vtcr, "slots": [Slot(0, 0x8060_0000, 1 << 18)]}
    with pytest.raises(ImageError, match=f"{what}.*no raw image of RAM: .+"):
        open_image(path, ram_base=ram_base - 4096, **how)
    with pytest.raises(ImageError, match=what):  # also before it is asked for the rest
        open_image(path)
    path.write_bytes(bytes(4096) + raw)
    assert open_image(path, ram_base=ram_base - 4096, **how).dirty(0).weight() == 1


def test_a_root_with_nothing_above_the_slots(tables: Tables, tmp_path: Path) -> None:
    slots = [(0, 0x80600, 64), (1, 0x200000, 64)]
    assert opened(tables, tmp_path, slots).dirty(1).weight() == 0  # the other slot is mapped
    with pytest.raises(ImageError, match=r"no valid descriptor for slot 1: is VTTBR_EL2 = .* right \(--vttbr\)"):
        opened(tables, tmp_path, slots[1:]).dirty(1)
    empty = Tables(G)
    with pytest.raises(ImageError, match=r"no valid descriptor for any of the slots: .*--vttbr"):
        opened(empty, tmp_path, slots).dirty(0)
    ram_base, raw = empty.raw()
    (tmp_path / "ram.img").write_bytes(raw)
    image = open_image(tmp_path / "ram.img", ram_base=ram_base, vttbr=G.vttbr(empty.root), vtcr=G.vtcr)
    with pytest.raises(ImageError, match="no valid descriptor at all"):
        image.read()


def test_a_root_is_looked_at_where_the_slots_are(tmp_path: Path) -> None:
    """From the GiB of a slot's first page to that of its last."""
    tables = Tables(Geometry(12, 1, 40, 40), junk=False)
    tables.leaf(5 << 30, 3, 1 << 51)
    for gfn, npages, there in (
        (5 << 18, 1, True), (6 << 18, 1, False), ((5 << 18) - 1, 1, False), ((5 << 18) - 1, 2, True),
        ((6 << 18) - 1, 1, True), ((4 << 18), 1 << 18, False), ((4 << 18), (1 << 18) + 1, True),
    ):  # fmt: skip
        image = opened(tables, tmp_path, [(3, gfn, npages)])
        with contextlib.nullcontext() if there else pytest.raises(ImageError, match="no valid descriptor for slot 3"):
            image.read()


def test_a_bitmap_is_of_the_slots_pages(tables: Tables, tmp_path: Path) -> None:
    image = opened(tables, tmp_path)
    with pytest.raises(ImageError, match=r"^the slot has 64 pages, and the leaves 65$"):
        image.bitmap(image.slots[0], Stage2(65), "dbm", 4096)


def test_levels_that_a_capture_says_are_those_of_the_walk(tmp_path: Path) -> None:
    """As bytes, of which that before level 0 is 255; of tables in any order."""
    g = Geometry(12, -1, 52, 52, ds=True)
    tables = Tables(g)
    tables.leaf(IPA, 3, 1 << 51 | 1 << 7)
    arrays = tables.arrays([(0, 0x80600, 64)])
    at = {tables.root >> 12 << 12: 255}
    for level in range(4):
        at[tables.entry(IPA, level) >> 12 << 12] = level
    arrays["table_level"] = np.array([at[int(pa)] for pa in arrays["table_pa"]], dtype=np.uint8)
    np.savez(tmp_path / "image.npz", **arrays)
    assert open_image(tmp_path / "image.npz").dirty(0).pages().tolist() == [3]
    arrays["table_level"][-1] ^= 1
    last, level = int(arrays["table_pa"][-1]), at[int(arrays["table_pa"][-1])]
    np.savez(tmp_path / "image.npz", **arrays)
    with pytest.raises(
        ImageError, match=f"table {last:#018x} is found at level {level}, and 'table_level' says {level ^ 1}"
    ):
        open_image(tmp_path / "image.npz").dirty(0)


def test_an_array_with_a_header_of_another_version(tmp_path: Path) -> None:
    path = change(tmp_path, lambda arrays: arrays.pop("regs"))
    out = io.BytesIO()
    with np.load(CAPTURE) as arrays:
        np.lib.format.write_array(out, arrays["regs"], version=(2, 0))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("regs.npy", out.getvalue())
    assert open_image(path).registers == open_image(CAPTURE).registers


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="no regular file"):
        open_image(tmp_path / "pipe", ram_base=0, vttbr=0, vtcr=G.vtcr)


@pytest.mark.parametrize(
    ("name", "value"),
    [("ram_base", -1), ("ram_base", 1 << 52), ("vttbr", -1), ("vttbr", 1 << 64), ("vtcr", -1), ("vtcr", 1 << 64)],
)
def test_numbers_that_are_too_large(tmp_path: Path, name: str, value: int) -> None:
    (tmp_path / "ram.img").write_bytes(bytes(8192))
    how = {"ram_base": 0, "vttbr": 0, "vtcr": G.vtcr} | {name: value}
    most = (1 << (52 if name == "ram_base" else 64)) - 1
    with pytest.raises(ImageError, match=f" is 0 to {most:#x}, not {value if value < 0 else hex(value)}$"):
        open_image(tmp_path / "ram.img", **how)


def test_truth_of_another_size(tmp_path: Path) -> None:
    path = change(tmp_path, lambda arrays: arrays.__setitem__("expected_dirty_slot1", np.zeros(8, np.uint8)))
    image = open_image(path)
    with pytest.raises(ImageError, match="'expected_dirty_slot1' has 8 bytes"):
        image.truth(image.slot(1))


@pytest.mark.parametrize("page_size", [0, 2048, 12288, 1 << 30])
def test_truth_of_a_page_size_that_cannot_be(tmp_path: Path, page_size: int) -> None:
    path = change(tmp_path, lambda arrays: arrays.__setitem__("page_size", np.array(page_size)))
    image = open_image(path)
    with pytest.raises(ImageError, match=f"{page_size} bytes can't be the page size of slot 1"):
        image.truth(image.slot(1))


def test_capture_of_no_tables(tmp_path: Path) -> None:
    def edit(arrays: dict[str, np.ndarray]) -> None:
        for name in ("table_pa", "table_level", "table_data"):
            arrays[name] = arrays[name][:0]

    with pytest.raises(ImageError, match="is not in the capture's 0 tables"):
        open_image(change(tmp_path, edit)).read()


@pytest.mark.parametrize("keep", [0, 1, 2, 100, 0.5, 0.99])
def test_truncated_capture(tmp_path: Path, keep: float) -> None:
    raw = CAPTURE.read_bytes()
    path = tmp_path / "truncated.npz"
    path.write_bytes(raw[: int(keep * len(raw)) if isinstance(keep, float) else keep])
    with pytest.raises(ImageError, match=r"truncated\.npz is not a capture, or is damaged"):
        open_image(path)


@pytest.mark.parametrize("cut", [1, 8, 4095, 4096, 4 * 4096])
def test_truncated_raw_image(tables: Tables, tmp_path: Path, cut: int) -> None:
    ram_base, raw = tables.raw()
    path = tmp_path / "ram.img"
    path.write_bytes(raw[:-cut])
    image = open_image(path, ram_base=ram_base, vttbr=G.vttbr(tables.root), vtcr=G.vtcr)
    with pytest.raises(ImageError, match=f"in the image's {ram_base:#018x}"):
        image.read()


def test_raw_image_of_no_table(tmp_path: Path) -> None:
    path = tmp_path / "ram.img"
    for size in (0, 4095):
        path.write_bytes(bytes(size))
        with pytest.raises(ImageError, match=f"has {size} bytes: not one 4K table"):
            open_image(path, ram_base=0, vttbr=0, vtcr=G.vtcr)


def test_a_raw_image_may_end_where_addresses_do(tmp_path: Path) -> None:
    path, top = tmp_path / "ram.img", (1 << 64) - 8192
    path.write_bytes(bytes(4096) + b"\1" * 4096)
    tables = RawTables(path, top, Granule.K4)
    assert tables.extent == "the image's 0xffffffffffffe000..0xffffffffffffffff"
    assert tables.find(np.array([top - 4096, top, top + 4096, 0], np.uint64)).tolist() == [-1, 0, 1, -1]
    with pytest.raises(ImageError, match=f"has 8192 bytes, which reach beyond 2\\^64 from {top + 4096:#x} on"):
        RawTables(path, top + 4096, Granule.K4)
    with pytest.raises(ImageError, match=r"^the RAM's base is 0 to 0xffffffffffffffff, not 0x10000000000000000$"):
        RawTables(path, 1 << 64, Granule.K4)


def test_raw_image_that_ends_before_its_first_granule(tmp_path: Path) -> None:
    path = tmp_path / "ram.img"
    path.write_bytes(bytes(4096))
    with pytest.raises(ImageError, match="has 4096 bytes: not one 16K table"):
        RawTables(path, 4096, Granule.K16)


@pytest.mark.parametrize("more", [0x1000, 0x3000, 0x8000, 0xD000, 0xF000])
def test_raw_image_whose_base_is_not_a_granule(tmp_path: Path, more: int) -> None:
    """RAM may begin where no 64K table can, a little before one or long."""
    g = Geometry(16, 2, 36)
    tables = Tables(g)
    tables.leaf(0x1_0000, 3, 1 << 51 | 1 << 7)
    ram_base, raw = tables.raw()
    (tmp_path / "ram.img").write_bytes(bytes(more) + raw)
    how = {"vttbr": g.vttbr(tables.root), "vtcr": g.vtcr, "slots": [Slot(0, 0, 1 << 20)]}
    image = open_image(tmp_path / "ram.img", ram_base=ram_base - more, **how)
    assert image.dirty(0).pages().tolist() == [1]
    assert image.memory.find(np.array([ram_base, ram_base - 0x1_0000], np.uint64)).tolist() == [0, -1]
    # The file's first bytes are no whole table: those of the next are.
    (tmp_path / "more.img").write_bytes(bytes(more) + raw + bytes(0xFFFF))
    longer = open_image(tmp_path / "more.img", ram_base=ram_base - more, **how)
    assert longer.memory.capacity == image.memory.capacity == len(raw) >> 16
    assert longer.dirty(0) == image.dirty(0)
    assert image.truth(image.slot(0)) is None
    with pytest.raises(ImageError, match="base 0x123 isn't a multiple of 4 KiB"):
        open_image(tmp_path / "ram.img", ram_base=0x123, **how)


def test_raw_image_without_registers(tmp_path: Path) -> None:
    (tmp_path / "ram.img").write_bytes(bytes(4096))
    with pytest.raises(ImageError, match="must be given"):
        open_image(tmp_path / "ram.img", ram_base=0)


def test_capture_with_a_ram_base() -> None:
    with pytest.raises(ImageError, match="for raw images only"):
        open_image(CAPTURE, ram_base=0)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_image(tmp_path / "none.npz")
    with pytest.raises(IsADirectoryError):
        open_image(tmp_path)


# --- fuzz ------------------------------------------------------------------------------------------------

FUZZED = [CAPTURE, CAPTURES / "4k_blocks" / "round1.npz", CAPTURES / "kvm-6.1" / "manual-3-ran.npz"]
FUZZ = settings(max_examples=50 * EFFORT, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read_all(path: Path) -> None:
    """Read all that can be read; only an ImageError may end that, with a text that a line can hold."""
    error = None
    try:
        image = open_image(path)
        for slot in image.slots:
            image.dirty(slot.id, page_size=4096, contiguous=True)
            image.truth(slot)
    except ImageError as caught:
        error = caught
    assert error is None or len(str(error)) < 500


@FUZZ
@given(data=st.data())
def test_flipped_bits_in_arrays(data: st.DataObject, tmp_path: Path) -> None:
    with np.load(data.draw(st.sampled_from(FUZZED))) as loaded:
        names = ("table_pa", "table_data", "regs", "memslots")
        arrays = {name: loaded[name] for name in names}
    for _ in range(data.draw(st.integers(1, 8))):
        flat = arrays[data.draw(st.sampled_from(names))].reshape(-1)
        valid = np.flatnonzero(flat & np.uint64(1)) if data.draw(st.booleans()) else np.arange(flat.size)
        where = valid[data.draw(st.integers(0, max(0, valid.size - 1)))] if valid.size else 0
        flat[where] ^= np.uint64(1 << data.draw(st.integers(0, 63)))
    np.savez(tmp_path / "fuzzed.npz", **arrays)
    read_all(tmp_path / "fuzzed.npz")


@FUZZ
@given(data=st.data())
def test_flipped_bytes_in_files(data: st.DataObject, tmp_path: Path) -> None:
    raw = bytearray(data.draw(st.sampled_from(FUZZED)).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    path = tmp_path / "fuzzed.npz"
    path.write_bytes(raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw)
    read_all(path)


@FUZZ
@given(raw=st.binary(max_size=3 * 4096), vttbr=st.integers(0, (1 << 64) - 1), vtcr=st.integers(0, (1 << 64) - 1))
def test_raw_images_of_anything(raw: bytes, vttbr: int, vtcr: int, tmp_path: Path) -> None:
    path = tmp_path / "ram.img"
    path.write_bytes(raw)
    for registers in ((vttbr, vtcr), (vttbr & 0x3000, 0x8021_3520), (0, 0x8021_3520)):
        with contextlib.suppress(ImageError):
            open_image(path, ram_base=0, vttbr=registers[0], vtcr=registers[1]).read()


def test_registers_that_are_given_in_place_of_a_captures(tmp_path: Path) -> None:
    """One, the other, both: the rest is the capture's, and where it has none, both are needed."""
    own = open_image(CAPTURE).registers
    for some in ({"vttbr": own.vttbr}, {"vtcr": own.vtcr}, {"vttbr": own.vttbr, "vtcr": own.vtcr}):
        assert open_image(CAPTURE, **some).registers == own
    path = change(tmp_path, lambda arrays: arrays.pop("regs"))
    both = open_image(path, vttbr=own.vttbr, vtcr=own.vtcr)
    assert (both.registers.vttbr, both.registers.vtcr, both.registers.hcr) == (own.vttbr, own.vtcr, None)
    for some in ({}, {"vttbr": own.vttbr}, {"vtcr": own.vtcr}):
        with pytest.raises(ImageError, match="regs"):
            open_image(path, **some)
