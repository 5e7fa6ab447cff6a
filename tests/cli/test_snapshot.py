"""``hwdbm snapshot``: chains by command, and what is printed."""

import hashlib
import json
import os
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from hwdbm import DirtyBitmap
from hwdbm.memslot import Memslot
from hwdbm.snapshot import write_diff, write_full
from hwdbm.vm import MemoryMap, PlainGuest

SCHEMAS = Path(__file__).parents[2] / "docs" / "schemas"
KVM = pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="no /dev/kvm")


@pytest.fixture
def said(run):
    """Return a function that runs a command with --json, holds what it prints against its schema, and returns it."""

    def call(verb: str, *args: object, status: int = 0) -> dict:
        done = run("snapshot", verb, *args, "--json")
        assert done.status == status, done.err
        found = json.loads(done.out)
        jsonschema.validate(found, json.loads((SCHEMAS / f"snapshot-{verb}.json").read_text()))
        return found

    return call


@pytest.fixture
def ram(tmp_path) -> Path:
    path = tmp_path / "guest.ram"
    path.write_bytes(np.random.default_rng(3).integers(0, 256, 64 * 4096, dtype=np.uint8).tobytes())
    return path


def change(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


BASE = ["--ram-base", "0x40000000"]


def test_a_file_from_the_first_to_the_last(said, run, ram, tmp_path):
    chain, moments = tmp_path / "chain", []
    saved = said("save", chain, ram, *BASE)["snapshots"]
    moments.append(ram.read_bytes())
    assert [(each["full"], each["pages"], each["sha256"]) for each in saved] == [
        (True, 64, hashlib.sha256(ram.read_bytes()).hexdigest())
    ]
    assert saved[0]["slots"] == [{"id": 0, "gpa": "0x0000000040000000", "size": 64 * 4096}]
    change(ram, 5 * 4096, b"five")
    moments.append(ram.read_bytes())
    (found,) = said("diff", chain, ram, *BASE)["snapshots"]
    assert (found["pages"], found["mechanism"], found["parent"]) == (1, "compared", saved[0]["id"])
    change(ram, 7 * 4096, b"seven")
    moments.append(ram.read_bytes())
    DirtyBitmap.from_pages([7, 8], 64).save(tmp_path / "slot0.bitmap")
    (found,) = said("diff", chain, ram, *BASE, "--bitmap", f"0:{tmp_path / 'slot0.bitmap'}")["snapshots"]
    assert (found["pages"], found["mechanism"]) == (2, "bitmap")
    listed = said("list", chain, "--plot", tmp_path / "chain.svg")["snapshots"]
    assert [each["pages"] for each in listed] == [64, 1, 2]
    assert [each["overlap"] for each in listed] == [1, 0, 0]
    assert b"<svg" in (tmp_path / "chain.svg").read_bytes()
    assert said("check", chain, "--whole") == {"folder": str(chain), "sound": True, "flaws": []}
    (tmp_path / "empty").mkdir()
    nothing = run("snapshot", "check", tmp_path / "empty")
    assert (nothing.status, nothing.out) == (1, "")
    assert nothing.err.startswith(f"hwdbm: {tmp_path / 'empty'}: there is no snapshot in it")
    for each, memory in zip(listed, moments, strict=True):
        restored = said("restore", chain, "--snapshot", each["name"][:6], "--output", tmp_path / "out")
        assert (tmp_path / "out").read_bytes() == memory
        assert restored["sha256"] == hashlib.sha256(memory).hexdigest()
    merged = said("rebase", chain, "--snapshot", listed[1]["id"][:12], "--in-place")
    assert (merged["snapshot"]["id"], merged["removed"]) == (listed[1]["id"], [listed[0]["id"]])
    assert said("prune", chain, "--keep", 1)["kept"] == [listed[2]["id"]]
    said("restore", chain, "--output", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == moments[2]
    done = run("snapshot", "restore", chain, "--output", tmp_path / "out", "--state", tmp_path / "state")
    assert (done.status, done.out) == (1, "")
    assert "has no state" in done.err
    for command in (["list", chain], ["check", chain], ["rebase", chain], ["prune", chain, "--keep", "1"]):
        done = run("snapshot", *command)
        assert (done.status, done.err) == (0, "")


def test_firecrackers_slots_lie_one_after_another(said, ram, tmp_path):
    slots = ["--slot", f"1:0x40000000:{48 * 4096}", "--slot", f"0:0x10000:{16 * 4096}"]
    (found,) = said("save", tmp_path / "chain", ram, *slots)["snapshots"]
    assert [slot["id"] for slot in found["slots"]] == [0, 1]
    said("restore", tmp_path / "chain", "--output", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == ram.read_bytes()


def test_what_is_damaged_and_not_needed_is_one_flaw(said, run, ram, tmp_path):
    """All pages are in the next snapshot again."""
    chain = tmp_path / "chain"
    said("save", chain, ram, *BASE)
    ram.write_bytes(bytes(byte ^ 1 for byte in ram.read_bytes()))
    said("diff", chain, ram, *BASE)
    assert run("snapshot", "check", chain).out.split()[-1] == "sound"
    (memory,) = chain.glob("000000-*.mem")
    change(memory, 4, b"bad")
    done = run("snapshot", "check", chain)
    assert (done.status, done.out.split()[-2:]) == (3, ["1", "flaw"])


def test_what_is_wrong_is_said(said, run, ram, tmp_path):
    chain = tmp_path / "chain"
    said("save", chain, ram, *BASE)
    change(ram, 0, b"new")
    said("diff", chain, ram, *BASE)
    (memory,) = chain.glob("000001-*.mem")
    change(memory, 4, b"bad")
    found = said("check", chain, status=3)
    assert [flaw["kind"] for flaw in found["flaws"]] == ["damaged", "missing"]
    assert found["flaws"][1]["pages"] == 1
    assert not found["sound"]
    done = run("snapshot", "check", chain)
    assert (done.status, done.err) == (3, "")
    assert "1 of 64 pages of slot 0 are missing since 000001" in done.out
    assert done.out.split()[-2:] == ["2", "flaws"]
    done = run("snapshot", "rebase", chain)
    assert (done.status, done.out) == (1, "")
    assert "damaged" in done.err
    (chain / "000009-00000000.bitmap").write_bytes(b"")
    memory.unlink()
    assert "leftover" in [flaw["kind"] for flaw in said("check", chain, status=3)["flaws"]]


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["save", "c"], "give either FILE or --source"),
        (["save", "c", "f", "--source", "kvm"], "give either FILE or --source"),
        (["save", "c", "f", "--every", "5"], "--every has no effect without --source"),
        (["save", "c", "--source", "kvm", "--slot", "0:0:4K"], "--slot has no effect with --source"),
        (["save", "c", "--source", "machine", "--kvm-log", "ring"], "--kvm-log has no effect"),
        (["restore", "c"], "give --output FILE, or --source"),
        (["restore", "c", "--output", "x", "--seconds", "1"], "--seconds has no effect"),
        (["prune", "c"], "--keep"),
        (["prune", "c", "--keep", "0"], "'0' is no whole number of 1 or more"),
        (["rebase", "f"], "give the folder of a chain, or a base and its differences"),
        (["rebase", "f", "g", "--in-place"], "--in-place has no effect"),
        (["list", "c", "--plot", "x.jpg"], ".png or .svg"),
        (["diff", "c", "f", "--bitmap", "x"], "is not ID:FILE"),
    ],
)
def test_wrong_usage(run, args, why):
    done = run("snapshot", *args)
    assert (done.status, done.out) == (2, "")
    assert why in " ".join(done.err.split())


@pytest.mark.parametrize(
    ("args", "why"),
    [
        ([], "doesn't say where its memory is"),
        (["--slot", "0:0:4K"], "and its slots 4096"),
        (["--ram-base", "0x40000000", "--slot", "0:0x40000000:1M"], "has no memory at"),
        (["--ram-base", "0x40000000", "--page-size", "2M"], "isn't whole pages"),
        (["--ram-base", "0x40000000", "--block", "pc.ram"], "has no block 'pc.ram'"),
    ],
)
def test_memory_that_is_not_where_it_was_said(run, ram, tmp_path, args, why):
    done = run("snapshot", "save", tmp_path / "chain", ram, *args)
    assert (done.status, done.out) == (1, "")
    assert why in done.err
    assert not list(tmp_path.glob("chain/*"))


def test_files_without_manifests(said, run, tmp_path):
    guest = PlainGuest(MemoryMap(4096, (Memslot(0, 0, 0, 64, 0),)))
    guest.memory(0)[:] = 1
    write_full(guest, tmp_path / "base")
    guest.write(0, bytes(4096))
    write_diff(guest, tmp_path / "diff")
    done = run("snapshot", "rebase", tmp_path / "base", tmp_path / "diff")
    assert "a hole means 'unchanged', whatever made it" in done.err
    assert (tmp_path / "base").read_bytes() == guest.memory(0).tobytes()
    assert said("rebase", "--holes", tmp_path / "base", tmp_path / "diff")["copied"] == {str(tmp_path / "diff"): 4096}
    (tmp_path / "diff.json").write_text("{}")
    done = run("snapshot", "rebase", "--holes", tmp_path / "base", tmp_path / "diff")
    assert (done.status, done.out) == (1, "")
    assert "has a manifest" in done.err


def test_a_machine_that_runs(run, said, tmp_path):
    chain = tmp_path / "chain"
    how = ["--source", "machine", "--memory", "2M", "--every", "10", "--count", "3", "--digest"]
    taken = said("save", chain, *how)["snapshots"]
    assert [each["full"] for each in taken] == [True, False, False, False]
    assert all(each["paused"] >= 0 and each["sha256"] for each in taken)
    assert said("check", chain, "--whole")["sound"]
    found = said("restore", chain, "--source", "machine", "--seconds", "0.05", "--state", tmp_path / "state")
    assert found["ran"] >= 50
    assert found["sha256"] == taken[-1]["sha256"]
    (tmp_path / "folder").mkdir()
    done = run("snapshot", "restore", chain, "--output", tmp_path / "out", "--state", tmp_path / "folder")
    assert (done.status, "folder: Is a directory" in done.err) == (1, True)
    assert not (tmp_path / "out").exists()  # no memory whose registers aren't there


@pytest.mark.parametrize("source", ["machine", pytest.param("kvm", marks=KVM)])
def test_beside_a_migration(said, tmp_path, source):
    """Both use the guest's log, and both are right."""
    chain = tmp_path / "chain"
    done = said("save", chain, "--source", source, "--memory", "4M", "--every", "20", "--migrate", "--digest")
    assert done["migration"]["status"] == "completed"
    assert len(done["snapshots"]) >= 2
    assert said("check", chain, "--whole")["sound"]


@KVM
def test_a_real_guest(said, run, tmp_path):
    chain = tmp_path / "chain"
    how = ["--source", "kvm", "--memory", "4M", "--every", "10", "--count", "4", "--digest", "--rate", "20000"]
    taken = said("save", chain, *how)["snapshots"]
    assert len(taken) == 5
    assert any(0 < each["pages"] < 1026 for each in taken[1:])
    assert said("check", chain, "--whole")["sound"]
    for each in (taken[0], taken[-1]):
        found = said("restore", chain, "--snapshot", each["id"], "--source", "kvm", "--seconds", "0")
        assert found["sha256"] == each["sha256"]
    done = run("snapshot", "restore", chain, "--source", "machine")
    assert (done.status, done.out) == (1, "")
    assert "not of --source machine" in done.err


def test_a_folder_in_the_place_of_a_state(run, tmp_path):
    """What couldn't be removed in the end is found before anything is changed."""
    chain = tmp_path / "chain"
    made = run("snapshot", "save", chain, "--source", "machine", "--memory", "1M", "--every", "0.01", "--count", "2")
    assert made.status == 0
    state = min(chain.glob("*.state"))
    state.unlink()
    state.mkdir()
    before = {path: path.read_bytes() for path in chain.iterdir() if path != state}
    for how in (["rebase", chain, "--in-place"], ["rebase", chain], ["prune", chain, "--keep", "1"]):
        result = run("snapshot", *how)
        assert (result.status, result.out) == (1, "")
        assert f"{state}: it is no regular file" in result.err
        assert {path: path.read_bytes() for path in chain.iterdir() if path != state} == before
