"""``hwdbm bitmap`` on files."""

import struct

import pytest

from hwdbm import DirtyBitmap
from hwdbm.cli import bitmap
from hwdbm.errors import ImageError

DOCS = " (docs: formats#the-dirty-bitmap)"


@pytest.fixture
def two(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    DirtyBitmap.from_pages([1, 2, 64], 100).save(a)
    DirtyBitmap.from_pages([2, 99], 100).save(b)
    return a, b


def test_show(run, two):
    done = run("bitmap", "show", two[0], "--pages", "100", "--base", "0x40000000")
    assert done.out.splitlines() == [
        "3 of 100 pages dirty, in 2 runs", "  0x0000000040001000  8192 bytes", "  0x0000000040040000  4096 bytes",
    ]  # fmt: skip
    assert "3 of 128 pages" in run("bitmap", "show", two[0]).out


@pytest.mark.parametrize(
    ("verb", "pages"), [("diff", [1, 64, 99]), ("or", [1, 2, 64, 99]), ("and", [2]), ("minus", [1, 64])]
)
def test_two(run, two, tmp_path, verb, pages):
    out = tmp_path / "out"
    done = run("bitmap", verb, *two, "--pages", "100", "--output", out)
    assert (done.status, done.err) == (0, "")
    assert DirtyBitmap.load(out, 100).pages().tolist() == pages


def test_rescale(run, two, tmp_path):
    out = tmp_path / "out"
    assert (
        run("bitmap", "rescale", two[0], "--pages", "100", "--from", "64K", "--to", "4K", "--output", out).status == 0
    )
    assert DirtyBitmap.load(out, 1600).ranges().tolist() == [[16, 32], [1024, 16]]
    assert run("bitmap", "rescale", out, "--pages", "1600", "--from", "4K", "--to", "64K", "--output", out).status == 0
    assert DirtyBitmap.load(out, 100).pages().tolist() == [1, 2, 64]


@pytest.mark.parametrize("form", ["ranges", "criu"])
def test_convert(run, two, tmp_path, form):
    middle, out = tmp_path / "middle", tmp_path / "out"
    how = ["--base", "0x40000000", "--pages", "100"]
    assert run("bitmap", "convert", two[0], "--to", form, *how, "--output", middle).status == 0
    if form == "ranges":
        assert middle.read_bytes() == struct.pack("<4Q", 0x4000_1000, 8192, 0x4004_0000, 4096)
    assert run("bitmap", "convert", middle, "--from", form, *how, "--output", out).status == 0
    assert out.read_bytes() == two[0].read_bytes()
    done = run("bitmap", "convert", middle, "--from", form, "--output", out)
    assert done.status == 2
    assert "give --pages" in done.err
    middle.write_bytes(b"1" * 15)
    done = run("bitmap", "convert", middle, "--from", form, *how, "--output", out)
    assert (done.status, done.out) == (1, "")
    assert done.err.startswith(f"hwdbm: {middle}: ")


def test_memory(run, tmp_path):
    one, two, out = tmp_path / "one", tmp_path / "two", tmp_path / "out"
    raw = bytearray(range(256)) * 16 * 20
    one.write_bytes(raw)
    raw[3 * 4096] ^= 1
    raw[19 * 4096 + 4095] ^= 1
    two.write_bytes(raw)
    assert run("bitmap", "diff", "--memory", one, two, "--output", out).status == 0
    assert DirtyBitmap.load(out, 20).pages().tolist() == [3, 19]
    assert "2 of 5 pages dirty" in run("bitmap", "diff", "--memory", one, two, "--page-size", "16K").out
    two.write_bytes(raw[:-4096])
    done = run("bitmap", "diff", "--memory", one, two)
    assert (done.status, done.out) == (1, "")
    assert "aren't the same pages" in done.err
    assert "--pages has no effect" in run("bitmap", "diff", "--memory", one, two, "--pages", "3").err


def test_files_of_other_sizes(run, two, tmp_path):
    (tmp_path / "c").write_bytes(bytes(24))
    done = run("bitmap", "or", two[0], tmp_path / "c", "--output", tmp_path / "out")
    assert (done.status, done.out) == (1, "")
    assert "128 and 192 pages don't combine" in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "slot", "given"),
    [
        ("elf", None, {"block": None, "ram_base": None}),
        ("raw", None, {"block": None, "ram_base": 0}),
        ("qemu", None, {"block": None, "ram_base": 0}),
        ("elf", "a slot", {"block": None, "slots": ("a slot",)}),
    ],
)
def test_where_memory_is_said_to_be(kind, slot, given, monkeypatch, tmp_path):
    """Of a file that doesn't say it, from 0 on; an ELF core says it itself."""
    asked = []
    monkeypatch.setattr(bitmap, "kind_of_ram", lambda _: kind)
    monkeypatch.setattr(bitmap, "open_ram", lambda path, **how: asked.append((path, how)) or {slot: "memory"})
    assert bitmap._ram(tmp_path, None, slot) == "memory"
    assert asked == [(tmp_path, given)]
    monkeypatch.setattr(bitmap, "open_ram", lambda *_, **__: {0: "a", 1: "b"})
    with pytest.raises(ImageError, match=r"has memory in 2 pieces: say which part \(--slot ID:GPA:SIZE\)"):
        bitmap._ram(tmp_path, None, None)


@pytest.mark.parametrize("form", ["ranges", "criu"])
def test_a_file_that_is_too_large_is_not_read(run, two, tmp_path, form, monkeypatch):
    """Of the largest that is read all is."""
    middle, out = tmp_path / "middle", tmp_path / "out"
    assert run("bitmap", "convert", two[0], "--to", form, "--pages", "100", "--output", middle).status == 0
    size = middle.stat().st_size
    how = ["--from", form, "--pages", "100", "--output", out]
    monkeypatch.setattr(bitmap, "_MOST_FILE", size)
    assert run("bitmap", "convert", middle, *how).status == 0
    assert out.read_bytes() == two[0].read_bytes()
    monkeypatch.setattr(bitmap, "_MOST_FILE", size - 1)
    done = run("bitmap", "convert", middle, *how)
    assert (done.status, done.err) == (1, f"hwdbm: {middle} has more than {size - 1} bytes{DOCS}\n")


def test_there_may_be_no_pages(run, tmp_path):
    (tmp_path / "none").write_bytes(b"")
    done = run("bitmap", "convert", tmp_path / "none", "--from", "ranges", "--pages", "0", "--output", tmp_path / "out")
    assert (done.status, done.out, done.err) == (0, "0 of 0 pages dirty, in 0 runs\n", "")
    assert (tmp_path / "out").read_bytes() == b""
