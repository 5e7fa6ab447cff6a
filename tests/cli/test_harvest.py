"""``hwdbm harvest``: the files, the summary, the exit status."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from synthetic import Geometry, Tables

from hwdbm import DirtyBitmap, Stage2
from hwdbm.image import open_live

CAPTURES = Path(__file__).parents[1] / "data" / "captures"
ALL = sorted(CAPTURES.glob("*/round*.npz"))
ODD = CAPTURES / "4k_ipa40" / "round1.npz"
KVM = CAPTURES / "kvm-6.1" / "manual-4-get.npz"


@pytest.fixture
def raw(tmp_path: Path) -> list[object]:
    """Write a raw image, and return the arguments that name it; page 3 of 64 from 0x80600000 is dirty."""
    g = Geometry(12, 1, 40, 40)
    tables = Tables(g)
    tables.leaf(0x8060_3000, 3, 1 << 51 | 1 << 7)
    ram_base, image = tables.raw()
    path = tmp_path / "ram.img"
    path.write_bytes(image)
    return [path, "--ram-base", hex(ram_base), "--vttbr", g.vttbr(tables.root), "--vtcr", hex(g.vtcr)]


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.parent.name)
def test_files_are_kvms_words(run, path: Path, tmp_path: Path) -> None:
    result = run("harvest", path, "--output", tmp_path / "a" / "b", "--page-size", "4K", "--json")
    assert (result.status, result.err) == (0, "")
    (report,) = json.loads(result.out)["images"]
    inspected = {slot["id"]: slot for slot in json.loads(run("inspect", path, "--json").out)["slots"]}
    with np.load(path) as arrays:
        slots = arrays["memslots"].tolist()
        for (number, gfn, npages), found in zip(slots, report["slots"], strict=True):
            expected = arrays[f"expected_dirty_slot{number}"].tobytes()
            file = tmp_path / "a" / "b" / f"slot{number}.bitmap"
            assert file.read_bytes() == expected
            truth = DirtyBitmap.from_bytes(expected, npages)
            assert found["id"] == number
            assert found["gpa"] == f"{gfn << 12:#018x}"
            assert (found["size"], found["page-size"]) == (npages << 12, 4096)
            assert (found["pages"], found["dirty"]) == (npages, truth.weight())
            absent = inspected[number]["absent"]
            assert found["mapped"] == npages - absent * (inspected[number]["page-size"] >> 12)
            assert found["ranges"] == len(truth.ranges())
            assert found["file"] == str(file)
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == sorted(
        f"slot{number}.bitmap" for number, _, _ in slots
    )
    total = report["total"]
    assert total["dirty"] == sum(slot["dirty"] for slot in report["slots"])
    assert total["dirty-bytes"] == 4096 * total["dirty"]
    assert total["time"] > 0


def test_a_slot_of_which_nothing_is_mapped(run) -> None:
    """Others are: so the root isn't wrong, but this slot may be."""
    slots = ["--slot", "0:0x80000000:2M", "--slot", "7:0:2M", "--slot", "8:0x80200000:2M"]
    result = run("harvest", CAPTURES / "4k_blocks" / "round1.npz", *slots, "--json")
    assert result.status == 0
    assert [slot["mapped"] for slot in json.loads(result.out)["images"][0]["slots"]] == [512, 0, 512]
    assert "no page of slot 7 is mapped" in result.err
    assert result.err.count("\n") == 1


def test_page_size_is_the_granule_by_default(run, tmp_path: Path) -> None:
    path = CAPTURES / "16k_ipa40" / "round1.npz"
    assert run("harvest", path, "--output", tmp_path).status == 0
    assert [(tmp_path / f"slot{i}.bitmap").stat().st_size for i in (0, 1)] == [8192 // 8, 1024 // 8]
    assert run("harvest", path, "--output", tmp_path, "--page-size", "2m").status == 0
    assert [(tmp_path / f"slot{i}.bitmap").stat().st_size for i in (0, 1)] == [8, 8]


def test_leaves_by_size(run) -> None:
    (report,) = json.loads(run("harvest", CAPTURES / "4k_blocks" / "round1.npz", "--json").out)["images"]
    assert report["slots"][0]["dirty-leaves"] == {"1G": 0, "2M": 47, "4K": 0}
    assert report["slots"][0]["dirty"] == 47 * 512
    assert (report["granule"], report["ipa-bits"], report["hw-dbm"]) == ("4K", 40, True)
    assert (report["total"]["tables"], report["total"]["table-bytes"]) == (8, 8 * 4096)


def test_text_for_people(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")  # a table with the files' names is wide
    result = run("harvest", ODD, "--output", tmp_path, "--check")
    assert result.status == 0
    lines = result.out.splitlines()
    assert lines[0] == f"{ODD}: 4K granule, 40-bit IPA, hardware DBM on"
    assert lines[1].split() == [
        *("slot", "gpa", "page", "pages", "dirty", "ranges", "dirty", "leaves", "check", "file")
    ]
    assert lines[3].split()[:5] == ["1", "0x0000000100123000", "4K", "1237", "286"]
    assert lines[3].endswith(f"286 of 4K     as expected  {tmp_path / 'slot1.bitmap'}")
    assert lines[5] == "2422 of 11477 pages dirty (9920512 bytes)"
    assert lines[6].startswith("31 tables (126976 bytes) read in ")
    assert "\x1b" not in result.out + result.err


class TestPolicy:
    def test_writable(self, run, tmp_path: Path) -> None:
        result = run("harvest", KVM, "--policy", "writable", "--output", tmp_path, "--check")
        assert (result.status, result.err) == (0, "")
        with np.load(KVM) as arrays:
            for slot in (0, 4):
                assert (tmp_path / f"slot{slot}.bitmap").read_bytes() == arrays[f"kvm_bitmap_slot{slot}"].tobytes()

    def test_dbm_is_not_on(self, run) -> None:
        result = run("harvest", KVM, "--json")
        assert result.status == 0
        assert json.loads(result.out)["images"][0]["total"]["dirty"] == 0
        assert result.err.count("\n") == 1
        assert "VTCR_EL2 = 0x00000000802d3558 has hardware DBM off" in result.err

    def test_another(self, run) -> None:
        result = run("harvest", ODD, "--policy", "all")
        assert result.status == 2
        assert "'all' is none of dbm, writable" in result.err


class TestCheck:
    @pytest.mark.parametrize(
        "how", [[], ["--contiguous"], ["--no-contiguous"], ["--policy", "writable"], ["--page-size", "4K"]]
    )
    @pytest.mark.parametrize("path", ALL, ids=lambda path: path.parent.name)
    def test_matches(self, run, path: Path, how: list[str]) -> None:
        result = run("harvest", path, "--check", "--json", *how)
        assert (result.status, result.err) == (0, "")
        assert [slot["differs"] for slot in json.loads(result.out)["images"][0]["slots"]] == [
            0 for _ in json.loads(result.out)["images"][0]["slots"]
        ]

    @pytest.mark.parametrize("now", ["dirty", "clean"])
    @pytest.mark.parametrize("page_size", ["4K", "2M"])
    def test_mismatch(self, run, tmp_path: Path, page_size: str, now: str) -> None:
        """The truth says otherwise of one page; of a page of 2M it still says the same where others are dirty."""
        with np.load(CAPTURES / "4k_blocks" / "round1.npz") as loaded:
            arrays = dict(loaded)
        truth = arrays["expected_dirty_slot0"]
        octet = int(np.flatnonzero(truth == (255 if now == "dirty" else 0))[0])
        truth[octet] ^= 1
        np.savez(tmp_path / "wrong.npz", **arrays)
        result = run("harvest", tmp_path / "wrong.npz", "--check", "--page-size", page_size, "--output", tmp_path)
        assert (tmp_path / "slot0.bitmap").exists()
        if (page_size, now) == ("2M", "dirty"):
            assert (result.status, result.err) == (0, "")
            return
        assert result.status == 3
        wrong = 512 if page_size == "2M" else 1
        then = "clean" if now == "dirty" else "dirty"
        assert f"slot 0 differs from the truth in {wrong} pages of 4K, " in result.err
        assert f"the first is gfn {0x80000 + 8 * octet:#x}: found {now}, in truth {then}\n" in result.err
        assert f"{wrong} wrong" in result.out

    def test_nothing_to_compare_with(self, run, tmp_path: Path) -> None:
        with np.load(KVM) as loaded:
            np.savez(tmp_path / "mute.npz", **{name: loaded[name] for name in loaded if not name.startswith("s2w")})
        result = run("harvest", tmp_path / "mute.npz", "--policy", "writable", "--check")
        assert result.status == 1
        assert "doesn't say what is dirty in slot 0 (policy writable)" in result.err


class TestSlots:
    def test_of_a_raw_image(self, run, raw: list[object], tmp_path: Path) -> None:
        slots = ["--slot", "7:0x80600000:256K", "--slot", "2:2G:4K"]
        result = run("harvest", *raw, *slots, "--output", tmp_path, "--json")
        assert result.status == 0
        assert [slot["id"] for slot in json.loads(result.out)["images"][0]["slots"]] == [2, 7]
        assert (tmp_path / "slot7.bitmap").read_bytes() == bytes([8, 0, 0, 0, 0, 0, 0, 0])
        assert (tmp_path / "slot2.bitmap").read_bytes() == bytes(8)

    def test_in_place_of_the_captures(self, run) -> None:
        report = json.loads(run("harvest", ODD, "--slot", "5:0x100123000:1M", "--json").out)["images"][0]
        assert [slot["id"] for slot in report["slots"]] == [5]
        assert report["slots"][0]["pages"] == 256

    @pytest.mark.parametrize("text", ["", "0", "0:0", "0:0:0", "0:1:4K", "x:0:4K", "0:0:4Q", "0:0:1.1K", "-1:0:4K"])
    def test_that_are_none(self, run, text: str) -> None:
        result = run("harvest", ODD, "--slot", text)
        assert result.status == 2
        assert "--slot" in result.err

    def test_none(self, run, raw: list[object]) -> None:
        result = run("harvest", *raw)
        assert result.status == 2
        assert "give --slot" in result.err

    def test_overlap(self, run) -> None:
        result = run("harvest", ODD, "--slot", "0:0:8K", "--slot", "1:4K:8K")
        assert (result.status, result.out) == (2, "")
        assert "slot 0" in result.err


class TestSeveralImages:
    def test_folders(self, run, tmp_path: Path) -> None:
        result = run("harvest", *ALL, "--output", tmp_path, "--page-size", "4K", "--json")
        assert result.status == 0
        assert [report["image"] for report in json.loads(result.out)["images"]] == [str(path) for path in ALL]
        for path in ALL:
            with np.load(path) as arrays:
                file = tmp_path / path.parent.name / path.stem / "slot0.bitmap"
                assert file.read_bytes() == arrays["expected_dirty_slot0"].tobytes()

    def test_of_one_folder(self, run, tmp_path: Path) -> None:
        phases = sorted(KVM.parent.glob("*.npz"))
        assert run("harvest", *phases, "--policy", "writable", "--output", tmp_path).status == 0
        assert sorted(p.name for p in tmp_path.iterdir()) == [path.stem for path in phases]

    def test_twice_the_same(self, run, tmp_path: Path) -> None:
        result = run("harvest", ODD, ODD, "--output", tmp_path)
        assert result.status == 2
        assert "same folder" in result.err


class TestFailures:
    """One clear line on stderr, nothing on stdout, and status 1."""

    @staticmethod
    def is_one_line(result, *texts: str) -> None:
        assert (result.status, result.out) == (1, "")
        assert result.err.startswith("hwdbm: ")
        assert result.err.count("\n") == 1
        for text in texts:
            assert text in result.err

    def test_no_such_file(self, run, tmp_path: Path) -> None:
        self.is_one_line(run("harvest", tmp_path / "none.npz"), f"{tmp_path / 'none.npz'}: No such file")

    def test_a_folder(self, run, tmp_path: Path) -> None:
        self.is_one_line(run("harvest", tmp_path), f"{tmp_path}: Is a directory")

    def test_damaged(self, run, tmp_path: Path) -> None:
        path = tmp_path / "damaged.npz"
        path.write_bytes(ODD.read_bytes()[:5000])
        self.is_one_line(run("harvest", path), "is not a capture, or is damaged")

    def test_corrupt_tables(self, run, tmp_path: Path) -> None:
        with np.load(ODD) as loaded:
            arrays = dict(loaded)
        arrays["table_data"][:, 7] = 1
        np.savez(tmp_path / "corrupt.npz", **arrays)
        result = run("harvest", tmp_path / "corrupt.npz", "--output", tmp_path / "out")
        self.is_one_line(result, "level-3 entry at", "for IPA", "reserved")
        assert not (tmp_path / "out").exists()

    def test_page_size_of_an_odd_slot(self, run) -> None:
        self.is_one_line(run("harvest", ODD, "--page-size", "2M"), "slot 1", "choose a page size of 4K")

    def test_output_is_a_file(self, run, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        result = run("harvest", ODD, "--output", tmp_path / "file")
        assert result.status == 1
        assert str(tmp_path / "file") in result.err

    def test_a_full_disk(self, run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The file that was there stays, and no other is left behind."""
        (tmp_path / "slot0.bitmap").write_text("before")

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        result = run("harvest", ODD, "--output", tmp_path)
        self.is_one_line(result, f"{tmp_path / 'slot0.bitmap'}: No space left on device")
        assert [p.name for p in tmp_path.iterdir()] == ["slot0.bitmap"]
        assert (tmp_path / "slot0.bitmap").read_text() == "before"

    def test_a_folder_that_is_closed(self, run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        real = os.open

        def closed(path: str, flags: int, *args: int, **options: int) -> int:
            if flags & os.O_RDWR:
                raise PermissionError(errno.EACCES, "Permission denied", path)
            return real(path, flags, *args, **options)

        monkeypatch.setattr(os, "open", closed)
        self.is_one_line(run("harvest", ODD, "--output", tmp_path), f"{tmp_path / 'slot0.bitmap'}: Permission denied")

    def test_out_of_memory(self, run, monkeypatch: pytest.MonkeyPatch) -> None:
        def greedy(*_: object) -> None:
            raise MemoryError("Unable to allocate 8 PiB")

        monkeypatch.setattr("hwdbm.image.reader.Image.read", greedy)
        self.is_one_line(run("harvest", ODD), "out of memory: Unable to allocate")


class TestUsage:
    @pytest.mark.parametrize("option", ["--ram-base", "--vttbr", "--vtcr"])
    def test_raw_image_without_its_registers(self, run, raw: list[object], option: str) -> None:
        at = raw.index(option)
        result = run("harvest", *raw[:at], *raw[at + 2 :], "--slot", "0:0:4K")
        assert (result.status, result.out) == (2, "")
        assert f"a raw image needs {option}" in result.err

    @pytest.mark.parametrize(
        "args",
        [[], ["--bogus"], [ODD, "--page-size", "big"], [ODD, "--vtcr", "0xg"], [ODD, "--vtcr", 1 << 64]],
    )
    def test_wrong(self, run, args: list[object]) -> None:
        result = run("harvest", *args)
        assert (result.status, result.out) == (2, "")
        assert result.err
        assert "Traceback" not in result.err


def test_progress_is_for_terminals(run, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    import rich.console

    from hwdbm.cli import output

    terminal = io.StringIO()
    console = rich.console.Console(file=terminal, force_terminal=True)
    monkeypatch.setattr(output, "Console", lambda **_: console)
    result = run("harvest", ODD, "--json")
    json.loads(result.out)
    assert result.err == ""
    assert "reading" in terminal.getvalue()


class TestOneShape:
    """Of one image or several, of good ones or bad: an object for each, with what was found or an error."""

    def test_a_bad_one_among_good_ones(self, run, tmp_path: Path) -> None:
        bad = tmp_path / "bad.npz"
        bad.write_bytes(ODD.read_bytes()[:1000])
        result = run("harvest", ODD, bad, ALL[0], "--output", tmp_path / "out", "--json")
        assert result.status == 1
        one, two, three = json.loads(result.out)["images"]
        assert (one["image"], two["image"], three["image"]) == (str(ODD), str(bad), str(ALL[0]))
        assert one["slots"]
        assert three["slots"]
        assert set(two) == {"image", "error"}
        assert all(Path(slot["file"]).exists() for report in (one, three) for slot in report["slots"])
        assert result.err == f"hwdbm: {two['error']} (docs: formats#memory-images)\n"
        text = run("harvest", bad, ODD)
        assert (text.status, text.err) == (1, result.err)
        assert str(ODD) in text.out

    def test_one_that_is_missing(self, run, tmp_path: Path) -> None:
        result = run("harvest", tmp_path / "none", "--json")
        assert (result.status, result.err) == (1, f"hwdbm: {tmp_path}/none: No such file or directory\n")
        assert json.loads(result.out)["images"] == [
            {"image": f"{tmp_path}/none", "error": f"{tmp_path}/none: No such file or directory"}
        ]


class TestTwoSlots:
    """Of a raw image, with old bitmaps in the folder: what is written, and when."""

    SLOTS = ("--slot", "0:0x80600000:128K", "--slot", "1:0x80620000:128K")

    @pytest.fixture
    def both(self, raw: list[object], tmp_path: Path) -> list[object]:
        old = DirtyBitmap.from_pages([9], 32)
        (tmp_path / "out").mkdir()
        for number in (0, 1):
            old.save(tmp_path / "out" / f"slot{number}.bitmap")
        return [*raw, *self.SLOTS, "--output", tmp_path / "out"]

    @staticmethod
    def held(tmp_path: Path) -> list[list[int]]:
        files = [tmp_path / "out" / f"slot{number}.bitmap" for number in (0, 1)]
        return [DirtyBitmap.load(file, 32).pages().tolist() for file in files]

    @pytest.mark.parametrize("number", [1, 2])
    def test_both_bitmaps_or_none(self, run, both, number, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Slot 0's new bitmap beside slot 1's old one would be an answer that was never right."""
        left, real = [number], os.write

        def write(fd: int, data: bytes) -> int:
            left[0] -= len(data) == 8
            if not left[0]:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(fd, data)

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", write)
            done = run("harvest", *both)
        assert done.status == 1
        assert f"slot{number - 1}.bitmap: No space left on device" in done.err
        assert self.held(tmp_path) == [[9], [9]]
        assert run("harvest", *both).status == 0
        assert self.held(tmp_path) == [[3], []]

    def test_cleaned_when_the_bitmaps_are_there(self, run, both, tmp_path: Path, monkeypatch) -> None:
        """Whatever ends the process, at any moment, a page that was dirty is in a bitmap or in the tables."""
        pytest.importorskip("numba")
        live, registers = Path(both[0]), dict(zip(both[1:7:2], both[2:8:2], strict=True))
        names = {name.removeprefix("--").replace("-", "_"): int(str(value), 0) for name, value in registers.items()}
        seen = []

        def look() -> None:
            dirty = open_live(live, **names, readonly=True).dirty(0x80600, 64).pages().tolist()
            seen.append((dirty, self.held(tmp_path)[0]))

        def looking(real):
            def call(*args, **options):
                look()
                result = real(*args, **options)
                look()
                return result

            return call

        for owner, name in ((os, "fsync"), (os, "link"), (os, "rename"), (Stage2, "clean")):
            monkeypatch.setattr(owner, name, looking(getattr(owner, name)))
        done = run("harvest", *both, "--live", "--clean")
        assert done.status == 0, done.err
        assert seen[0] == ([3], [9])
        assert seen[-1] == ([], [3])
        assert all(3 in dirty or 3 in held for dirty, held in seen)


def test_the_files_of_an_earlier_run_are_removed(run, tmp_path: Path) -> None:
    for name in ("slot9.bitmap", "slot0.bitmap", "slotted.bitmap", "notes"):
        (tmp_path / name).write_text("old")
    assert run("harvest", ODD, "--output", tmp_path).status == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "notes", "slot0.bitmap", "slot1.bitmap", "slot2.bitmap", "slotted.bitmap",
    ]  # fmt: skip
    assert (tmp_path / "slot0.bitmap").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["--page-size", "3K"], "power of two of 4K or more"),
        (["--page-size", "2K"], "power of two of 4K or more"),
        (["--slot", "0:0:4K", "--slot", "0:1M:4K"], "two slots have the id 0"),
        (["--slot", "0:0:8K", "--slot", "1:4K:4K"], "overlap"),
        (["--slot", "0:1:4K"], "isn't a multiple of 4 KiB"),
        (["--slot", "-1:0:4K"], "doesn't fit into 64 bits"),
        (["--ram-base", "0"], "--ram-base is for raw images"),
        (["--vttbr", "0x1000", "--vtcr", "0x806a3558"], "VTTBR_EL2 = "),
        (["--vtcr", "0"], "--vtcr 0x0: VTCR_EL2 has bit 31 clear"),
        (["--output", ""], "'--output': the path is empty"),
        (["--page-size", "\u0664K"], "is not a size"),
        (["--page-size", 400 * "9" + ".5K"], "is not a size"),
        (["--page-size", 5000 * "9"], "is not a size"),
        (["--vttbr", 5000 * "9"], "is not a number like"),
        ([""], "'IMAGE': the path is empty"),
    ],
)
def test_what_the_command_line_alone_has_wrong_is_usage(run, args: list[str], why: str) -> None:
    result = run("harvest", ODD, *args)
    assert (result.status, result.out) == (2, "")
    assert why in " ".join(result.err.split())


@pytest.mark.parametrize("columns", [40, 60, 80, 200])
def test_tables_fit(run, columns: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.npz").write_bytes(ODD.read_bytes())
    monkeypatch.setenv("COLUMNS", str(columns))
    for args in (["harvest", "a.npz", "--check"], ["inspect", "a.npz"]):
        out = run(*args).out
        assert "writable-dirty" in out or "wrong" in out or "as expected" in out
        if columns >= 80 or args[0] == "inspect":
            assert max(map(len, out.splitlines())) <= columns, args
