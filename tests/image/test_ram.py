"""Guest memory in files of other programs: raw, ELF cores as QEMU dumps them, and QEMU's mapped-ram.

The writer of mapped-ram below follows QEMU's documentation, and shares no code with the reader: Debian's QEMU has none.
"""

import json
import shutil
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from synthetic import Geometry, Tables

from hwdbm.bitmap import DirtyBitmap
from hwdbm.errors import ImageError
from hwdbm.granule import Granule
from hwdbm.image import Slot, open_image
from hwdbm.image.ram import RamTables, _placed, extents_of, kind_of_ram, open_ram
from hwdbm.pte import DBM, S2AP_W

MIB = 1 << 20
RNG = np.random.default_rng(11)


def noise(size: int) -> bytes:
    return RNG.integers(1, 256, size, dtype=np.uint8).tobytes()


# --- mapped-ram --------------------------------------------------------------------------------------------


def pascal(text: bytes) -> bytes:
    return bytes([len(text)]) + text


def mapped_ram(
    blocks, *, page=4096, dirt=b"", capabilities=(b"mapped-ram",), version=1, tail=b"\x10", uuid=b""
) -> bytes:
    """Return a migration file: blocks of (name, memory), pages of zeros left out, what lies there `dirt`."""
    out = bytearray(b"QEVM" + struct.pack(">I", 3))
    out += b"\x07" + struct.pack(">I", 4) + b"virt"
    out += b"\x05" + pascal(b"configuration/capabilities") + struct.pack(">II", 1, len(capabilities))
    for each in capabilities:
        out += pascal(each)
    out += b"\x05" + pascal(b"configuration/target-page-bits") + struct.pack(">II", 1, 12)
    if uuid:
        out += b"\x05" + pascal(b"configuration/uuid") + struct.pack(">I", 1) + uuid
    out += b"\x01" + struct.pack(">I", 2) + pascal(b"ram") + struct.pack(">II", 0, 4)
    out += struct.pack(">Q", sum(len(memory) for _, memory in blocks) | 4)
    for name, memory in blocks:
        out += pascal(name) + struct.pack(">Q", len(memory))
        npages = len(memory) // page
        bitmap_at = len(out) + 28
        longs = (npages + 63) // 64
        pages_at = -(-(bitmap_at + 8 * longs) // MIB) * MIB
        out += struct.pack(">IQQQ", version, page, bitmap_at, pages_at)
        bits = bytearray(8 * longs)
        out += bytes(8 * longs)
        out += bytes(pages_at - len(out))
        for number in range(npages):
            part = memory[number * page : (number + 1) * page]
            if any(part):
                bits[number // 8] |= 1 << number % 8
                out += part
            else:
                out += (dirt * page)[:page] if dirt else bytes(page)
        out[bitmap_at : bitmap_at + len(bits)] = bits
    return bytes(out) + tail


def guest_of(npages: int) -> bytes:
    return b"".join(noise(4096) if RNG.random() < 0.5 else bytes(4096) for _ in range(npages))


@pytest.mark.parametrize("npages", [1, 63, 64, 65, 300])
def test_mapped_ram_is_read(tmp_path, npages):
    memory, rom = guest_of(npages), noise(8192)
    path = tmp_path / "vm"
    path.write_bytes(mapped_ram([(b"mach-virt.ram", memory), (b"virt.flash0", rom)], dirt=b"stale"))
    assert kind_of_ram(path) == "mapped-ram"
    found = open_ram(path, ram_base=0x4000_0000, block="mach-virt.ram")
    assert {slot: part.tobytes() for slot, part in found.items()} == {Slot(0, 0x4000_0000, npages * 4096): memory}
    assert open_ram(path, ram_base=0, block="virt.flash0")[Slot(0, 0, 8192)].tobytes() == rom
    (part,) = found.values()
    with pytest.raises(ValueError, match="read-only"):
        part[0] = 1
    assert path.read_bytes() == mapped_ram([(b"mach-virt.ram", memory), (b"virt.flash0", rom)], dirt=b"stale")


@pytest.mark.parametrize("page", [512, 1024, 2048, 3 << 10, 65536, 1 << 20, 1 << 21])
def test_mapped_ram_of_other_page_sizes(page, tmp_path):
    """Those that targets of QEMU have; of a VM with an identity."""
    memory = (noise(page) + bytes(page) + noise(page)) * max(4096 // page, 1)
    size = len(memory)
    path = tmp_path / "vm"
    path.write_bytes(mapped_ram([(b"pc.ram", memory)], page=page, uuid=bytes(range(16)), dirt=b"old"))
    if page in (1024, 2048, 65536, 1 << 20):
        (extent,) = extents_of(path)
        assert (extent.name, extent.gpa, extent.page_size, extent.size) == ("pc.ram", None, page, size)
        assert extent.data.tobytes() == memory
        (placed,) = _placed(path, [extent], 0x5000, None)
        assert (placed.name, placed.gpa, placed.page_size) == ("pc.ram", 0x5000, page)
    else:
        with pytest.raises(ImageError, match=f"its block 'pc.ram' has {size:#x} bytes in pages of {page:#x}"):
            extents_of(path)


def test_a_golden_file(tmp_path):
    """Two blocks of 3 and 65 pages, byte by byte: written by hand from the documentation."""
    golden = Path(__file__).parents[1] / "data" / "mapped-ram.bin.gz"
    import gzip

    path = tmp_path / "vm"
    path.write_bytes(gzip.decompress(golden.read_bytes()))
    ram = open_ram(path, ram_base=0, block="pc.ram")[Slot(0, 0, 65 * 4096)]
    pages = ram.reshape(65, 4096)
    assert [page for page in range(65) if pages[page].any()] == [0, 7, 64]
    assert [bytes(pages[page][:4]) for page in (0, 7, 64)] == [b"zero", b"svn\0", b"last"]
    assert open_ram(path, ram_base=0, block="pc.bios")[Slot(0, 0, 3 * 4096)].tobytes() == b"BIOS" * 1024 * 3


def with_pages_at(raw: bytes, where: int) -> bytes:
    at = raw.index(struct.pack(">IQ", 1, 4096)) + 20
    return raw[:at] + struct.pack(">Q", where) + raw[at + 8 :]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda raw: raw[:100], "cut short at byte"),
        (lambda raw: raw[: MIB + 4096], "has its pages at 0x100000"),
        (lambda raw: raw[:7] + b"\x02" + raw[8:], "of version 2"),
        (lambda raw: raw.replace(b"\x03ram", b"\x03rum", 1), "first section is 'rum'"),
        (
            lambda raw: raw.replace(b"configuration/target-page-bits", b"configuration/target-page-bats"),
            "isn't known here",
        ),
        (lambda raw: raw.replace(struct.pack(">IQ", 1, 4096), struct.pack(">IQ", 2, 4096)), "capability mapped-ram"),
        (lambda raw: raw.replace(struct.pack(">IQ", 1, 4096), struct.pack(">IQ", 1, 4095)), "pages of 0xfff"),
        (
            lambda raw: raw.replace(struct.pack(">Q", 5 * 4096 | 4), struct.pack(">Q", 5 * 4096)),
            "doesn't begin with a size",
        ),
        (lambda raw: raw.replace(struct.pack(">Q", 5 * 4096 | 4), struct.pack(">Q", 4096 | 4)), "aren't as large"),
        (lambda raw: with_pages_at(raw, 1 << 63), "where they can't be"),
        (lambda raw: with_pages_at(raw, MIB + 4096), "where they can't be"),
        (lambda raw: with_pages_at(raw, 0), "where they can't be"),
        (
            lambda raw: raw.replace(b"\x06pc.ram" + struct.pack(">Q", 5 * 4096), b"\x06pc.ram" + bytes(8)),
            "has 0x0 bytes",
        ),
        (lambda raw: raw.replace(b"\x0amapped-ram", b"\x0fx-ignore-shared"), "leaves shared memory out"),
        (lambda raw: raw.replace(b"\x1f\0\0\0\0\0\0\0", b"\xff\0\0\0\0\0\0\0"), "has a bitmap that can't be"),
    ],
)
def test_a_migration_file_that_is_none(tmp_path, change, why):
    raw = mapped_ram([(b"pc.ram", noise(5 * 4096))])
    assert change(raw) != raw
    (tmp_path / "vm").write_bytes(change(raw))
    with pytest.raises(ImageError, match=why) as raised:
        open_ram(tmp_path / "vm", ram_base=0)
    assert "\n" not in str(raised.value)


def test_cut_at_any_byte_of_its_head(tmp_path):
    raw = mapped_ram([(b"pc.ram", noise(4096))])
    for size in [*range(1, 200), MIB - 1, MIB, len(raw) - 2]:
        (tmp_path / "vm").write_bytes(raw[:size])
        with pytest.raises(ImageError):
            open_ram(tmp_path / "vm", ram_base=0)


def test_which_block(tmp_path):
    (tmp_path / "vm").write_bytes(mapped_ram([(b"a", noise(4096)), (b"b", noise(4096))]))
    for how, why in (({}, "several blocks: say which"), ({"block": "c"}, "no block 'c'; it has a, b"),
                     ({"block": "a"}, "doesn't say where its memory is")):  # fmt: skip
        with pytest.raises(ImageError, match=why):
            open_ram(tmp_path / "vm", **how)


def test_two_of_one_vm_give_what_differs(tmp_path, run):
    memory = bytearray(guest_of(200))
    (tmp_path / "one").write_bytes(mapped_ram([(b"rom", noise(4096)), (b"pc.ram", bytes(memory))]))
    was = [bytes(memory[page * 4096 : (page + 1) * 4096]) for page in range(200)]
    memory[3 * 4096 : 4 * 4096] = noise(4096)
    memory[64 * 4096 : 65 * 4096] = bytes(4096)
    memory[199 * 4096] ^= 1
    want = [page for page in range(200) if was[page] != bytes(memory[page * 4096 : (page + 1) * 4096])]
    # What a migration left in the place of a page that is zero now doesn't count.
    (tmp_path / "two").write_bytes(mapped_ram([(b"rom", noise(4096)), (b"pc.ram", bytes(memory))], dirt=b"old"))
    done = run(
        "bitmap",
        "diff",
        "--memory",
        tmp_path / "one",
        tmp_path / "two",
        "--block",
        "pc.ram",
        "--output",
        tmp_path / "o",
    )
    assert done.status == 0, done.err
    assert DirtyBitmap.load(tmp_path / "o", 200).pages().tolist() == want
    assert len(want) in (2, 3)


# --- ELF ---------------------------------------------------------------------------------------------------


def core(segments, *, kind=4, whole=None) -> bytes:
    """Return a core of (address, bytes), each at an odd place of the file."""
    pytest.importorskip("elftools")
    head, at = bytearray(), 64 + 56 * (1 + len(segments)) + 20
    head += struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", kind, 183, 1, 0, 64, 0, 0, 64, 56, 1 + len(segments), 0, 0, 0
    )
    head += struct.pack("<IIQQQQQQ", 4, 0, at - 20, 0, 0, 20, 20, 0)
    body = bytearray(b"n" * 20)
    for gpa, data in segments:
        head += struct.pack("<IIQQQQQQ", 1, 7, at, 0, gpa, len(data), whole or len(data), 0)
        body += data + b"x"
        at += len(data) + 1
    return bytes(head + body)


def test_a_core_is_read(tmp_path):
    low, high = noise(3 * 4096), noise(2 * 4096)
    (tmp_path / "core").write_bytes(core([(0x8000_0000, high), (0x4000_0000, low)]))
    found = open_ram(tmp_path / "core")
    assert {slot: part.tobytes() for slot, part in found.items()} == {
        Slot(0, 0x4000_0000, 3 * 4096): low, Slot(1, 0x8000_0000, 2 * 4096): high,
    }  # fmt: skip
    some = open_ram(tmp_path / "core", slots=[Slot(7, 0x4000_1000, 4096)])
    assert some[Slot(7, 0x4000_1000, 4096)].tobytes() == low[4096:8192]
    (tmp_path / "core").write_bytes(core([(0x1000, low), (0x4000, high)]))
    joined = open_ram(tmp_path / "core", slots=[Slot(0, 0x1000, 5 * 4096)])
    assert joined[Slot(0, 0x1000, 5 * 4096)].tobytes() == low + high
    (tmp_path / "core").write_bytes(core([(0x1000, low)], whole=4 * 4096))
    assert open_ram(tmp_path / "core")[Slot(0, 0x1000, 4 * 4096)].tobytes() == low + bytes(4096)


@pytest.mark.parametrize("gpa", [0, 1 << 40, (1 << 52) - 8192])
def test_a_core_at_either_end_of_memory(gpa, tmp_path):
    """From address 0, and to the last byte below 2^52; with tables in it."""
    memory = noise(8192)
    (tmp_path / "core").write_bytes(core([(gpa, memory[:4096]), (gpa + 4096, memory[4096:])]))
    assert list(open_ram(tmp_path / "core")) == [Slot(0, gpa, 4096), Slot(1, gpa + 4096, 4096)]
    slot = Slot(3, gpa, 8192)
    assert open_ram(tmp_path / "core", slots=[slot])[slot].tobytes() == memory
    top = Slot(1 << 40, (1 << 64) - 4096, 4096)
    with pytest.raises(ImageError, match=f"no memory at {(1 << 64) - 4096:#018x}, which is in slot {1 << 40}"):
        open_ram(tmp_path / "core", slots=[top])


@pytest.mark.parametrize("granule", Granule)
def test_which_tables_are_in_the_parts_of_a_core(granule, tmp_path):
    """Those wholly in one part, numbered one part after the other."""
    size = granule.page_size
    parts = [(0, 1, 0), (4 * size + 4096, 3 * size - 4096, 0), (9 * size - 4096, size, 0), (16 * size, 2 * size, 0)]
    parts = [(gpa, max(-(-nbytes // 4096) * 4096, 4096)) for gpa, nbytes, _ in parts]
    data = [noise(nbytes) for _, nbytes in parts]
    (tmp_path / "core").write_bytes(core([(gpa, each) for (gpa, _), each in zip(parts, data, strict=True)]))
    tables = RamTables(tmp_path / "core", granule)
    whole = [
        (at, each[at - gpa : at - gpa + size])
        for (gpa, nbytes), each in zip(parts, data, strict=True)
        for at in range(-(-gpa // size) * size, gpa + nbytes - size + 1, size)
    ]
    assert tables.capacity == len(whole)
    asked = np.array([*(at for at, _ in whole), *(at + size for at, _ in whole), 1 << 51], dtype=np.uint64)
    there = {at: number for number, (at, _) in enumerate(whole)}
    assert tables.find(asked).tolist() == [there.get(int(at), -1) for at in asked]
    order = np.random.default_rng(1).permutation(len(whole))
    rows = tables.read(order, np.empty((len(whole) + 2, granule.entries), dtype=np.uint64))
    assert [row.tobytes() for row in rows] == [whole[number][1] for number in order]
    first, last = whole[0][0], whole[-1][0] + size - 1
    of = {at // size // 4 for at, _ in whole}
    assert tables.extent == f"the image's {first:#018x}..{last:#018x} (in {len(of)} parts)"


def test_a_core_of_no_table(tmp_path):
    (tmp_path / "core").write_bytes(core([(4096, noise(8192))]))
    with pytest.raises(ImageError, match="not one 16K table fits in"):
        RamTables(tmp_path / "core", Granule.K16)
    assert RamTables(tmp_path / "core", Granule.K4).extent == "the image's 0x0000000000001000..0x0000000000002fff"


@pytest.mark.parametrize(("first", "second"), [(0, 0x9000), (0x8000_0000, 0x4000_0000)])
def test_slots_lie_in_raw_ram_one_after_another(first, second, tmp_path):
    """By their addresses, whatever their ids; and fill it."""
    memory = noise(5 * 4096)
    (tmp_path / "ram").write_bytes(memory)
    low, high = Slot(7, min(first, second), 2 * 4096), Slot(2, max(first, second), 3 * 4096)
    found = open_ram(tmp_path / "ram", slots=[high, low])
    assert {slot: part.tobytes() for slot, part in found.items()} == {low: memory[:8192], high: memory[8192:]}
    for size in (4 * 4096, 6 * 4096):
        with pytest.raises(ImageError, match=f"has {5 * 4096} bytes, and its slots {size}: they lie in it"):
            open_ram(tmp_path / "ram", slots=[Slot(0, 0, size)])


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (lambda: core([(0, noise(4096))])[:60], "ELF file, and no raw image"),
        (lambda: core([(0, noise(4096))])[:100], "ELF file, and no raw image"),
        (lambda: core([(0, noise(4096))])[:1000], "is cut short"),
        (lambda: core([(0, noise(4096))], kind=2), "of type ET_EXEC"),
        (lambda: core([]), "a core without memory"),
        (lambda: core([(0, noise(8192)), (4096, noise(4096))]), "memory that another one has"),
        (lambda: core([(5, noise(4096))]), "no whole pages"),
        (lambda: core([(1 << 52, noise(4096))]), "below 2"),
        (lambda: core([(0, noise(4096))], whole=1 << 50), "more than there is memory"),
        (lambda: core([(0, noise(4096))], whole=1 << 63), "no whole pages"),
        (lambda: b"\x7fELF" + bytes(60), "ELF file, and no raw image"),
        (lambda: b"\x7fELF" + noise(4096), "ELF file, and no raw image"),
    ],
)
def test_a_core_that_is_none(tmp_path, raw, why):
    (tmp_path / "core").write_bytes(raw())
    with pytest.raises(ImageError, match=why) as raised:
        open_ram(tmp_path / "core")
    assert "\n" not in str(raised.value)


def test_a_core_says_where_it_is(tmp_path):
    (tmp_path / "core").write_bytes(core([(0x1000, noise(4096))]))
    with pytest.raises(ImageError, match="says itself where its memory is"):
        open_ram(tmp_path / "core", ram_base=0)
    with pytest.raises(ImageError, match="no memory at 0x0000000000002000, which is in slot 3"):
        open_ram(tmp_path / "core", slots=[Slot(3, 0x1000, 8192)])


# --- the tables in them ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["core", "parts", "mapped-ram"])
def test_harvest_finds_what_it_finds_in_raw_ram(tmp_path, run, form):
    tables = Tables(Geometry(12, 1, 36))
    for page in (3, 64, 511):
        tables.leaf(page << 12, 3, DBM | S2AP_W)
    tables.leaf(5 << 12, 3, DBM)
    base, ram = tables.raw()
    registers = {"vttbr": tables.g.vttbr(tables.root), "vtcr": tables.g.vtcr}
    slots = [Slot(0, 0, 2 << 20)]
    (tmp_path / "ram").write_bytes(ram)
    want = open_image(tmp_path / "ram", ram_base=base, slots=slots, **registers).dirty(0)
    assert want.pages().tolist() == [3, 64, 511]
    path, how = tmp_path / "file", {}
    if form == "core":
        path.write_bytes(core([(base, ram)]))
    elif form == "parts":
        path.write_bytes(core([(base + at, ram[at : at + 4096]) for at in range(0, len(ram), 4096)]))
    else:
        path.write_bytes(mapped_ram([(b"rom", noise(4096)), (b"mach-virt.ram", ram)]))
        how = {"ram_base": base, "block": "mach-virt.ram"}
    assert open_image(path, slots=slots, **registers, **how).dirty(0) == want
    options = ["--vttbr", hex(registers["vttbr"]), "--vtcr", hex(registers["vtcr"]), "--slot", "0:0:2M"]
    if how:
        options += ["--ram-base", hex(base), "--block", "mach-virt.ram"]
    done = run("harvest", path, *options, "--json")
    assert done.status == 0, done.err
    assert json.loads(done.out)["images"][0]["slots"][0]["dirty"] == 3
    assert run("inspect", path, *options).status == 0
    if form == "core":
        done = run("harvest", path, *options, "--ram-base", hex(base))
        assert done.status == 2
        assert "which says where its memory is" in " ".join(done.err.split())


# --- QEMU itself -------------------------------------------------------------------------------------------


class Qmp:
    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        until = time.monotonic() + 20
        while True:
            try:
                self.socket.connect(str(path))
                break
            except OSError:
                assert time.monotonic() < until
                time.sleep(0.02)
        self.socket.settimeout(30)
        self.lines = self.socket.makefile("rw")
        self.lines.readline()
        self.call("qmp_capabilities")

    def call(self, name, **arguments):
        self.lines.write(json.dumps({"execute": name, "arguments": arguments}) + "\n")
        self.lines.flush()
        while "event" in (answer := json.loads(self.lines.readline())):
            pass
        assert "return" in answer, answer
        return answer["return"]


MACHINES = {
    "qemu-system-aarch64": (["-M", "virt", "-cpu", "cortex-a57"], 0x4000_0000, "mach-virt.ram"),
    "qemu-system-x86_64": (["-M", "pc"], 0, "pc.ram"),
}


@pytest.mark.parametrize("program", [program for program in MACHINES if shutil.which(program)])
def test_what_qemu_dumps(tmp_path, run, program):
    """A guest of 16 MiB that stands still: its core, pmemsave's raw RAM, and the head of its migration stream."""
    machine, base, _ = MACHINES[program]
    command = [program, *machine, "-accel", "tcg", "-m", "16M", "-display", "none", "-nodefaults", "-S",
               "-qmp", f"unix:{tmp_path}/qmp,server=on,wait=off"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        qmp = Qmp(tmp_path / "qmp")
        low, size = base, 16 * MIB if base else 640 << 10
        qmp.call("dump-guest-memory", paging=False, protocol=f"file:{tmp_path}/core")
        qmp.call("pmemsave", val=low, size=size, filename=f"{tmp_path}/raw")
        qmp.call("migrate", uri=f"exec:cat > {tmp_path}/stream")
        until = time.monotonic() + 30
        while qmp.call("query-migrate").get("status") not in {"completed", "failed"}:
            assert time.monotonic() < until
            time.sleep(0.02)
        qmp.socket.close()
    finally:
        process.kill()
        process.communicate()
    slot = Slot(0, low, size)
    assert open_ram(tmp_path / "core", slots=[slot])[slot].tobytes() == (tmp_path / "raw").read_bytes()
    assert sum(part.size for part in open_ram(tmp_path / "core").values()) >= 16 * MIB - (384 << 10)
    # Debian's QEMU has no mapped-ram: the head of its stream is read up to the first block, and refused by name there.
    with pytest.raises(ImageError, match="capability mapped-ram"):
        open_ram(tmp_path / "stream", ram_base=base)
    done = run("snapshot", "save", tmp_path / "chain", tmp_path / "core", "--json")
    assert done.status == 0, done.err
    (saved,) = json.loads(done.out)["snapshots"]
    assert saved["slots"][0]["gpa"] in {"0x0000000040000000", "0x0000000000000000"}


def test_without_pyelftools(tmp_path):
    (tmp_path / "core").write_bytes(b"\x7fELF" + bytes(100))
    code = "import sys; sys.modules['elftools'] = None; from hwdbm.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, "snapshot", "save", str(tmp_path / "c"), str(tmp_path / "core")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert "hwdbm[qemu]" in done.stderr
