"""The commands with an Arm machine: migrate to another process, and harvest the tables of one that runs."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hwdbm import DirtyBitmap
from hwdbm.arm import ArmVm


@pytest.mark.parametrize("options", [(), pytest.param(("--thp", "--workload", "mixed"), marks=pytest.mark.slow)])
def test_migrate(options, run):
    done = run("migrate", "--source", "arm", "--memory", "8M", "--json", *options)
    assert done.status == 0, done.err
    report = json.loads(done.out)
    assert report["status"] == "completed"
    assert report["source-sha256"] == report["destination-sha256"]


def test_options_that_have_no_effect_are_refused(run):
    for option in (("--mode", "hw-dbm"), ("--kvm-log", "ring"), ("--workload", "nobody")):
        done = run("migrate", "--source", "arm", "--memory", "8M", *option)
        assert done.status == 2, done.err
        assert option[0] in done.err or "nobody" in done.err


@pytest.mark.slow  # `make docs` runs it too
def test_the_example_of_the_documentation():
    example = Path(__file__).parents[2] / "docs" / "examples" / "track_machine.py"
    done = subprocess.run(
        [sys.executable, "-P", "-W", "error", example], capture_output=True, text=True, timeout=100, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "the copy is equal" in done.stdout


@pytest.fixture
def running():
    with ArmVm(4 << 20, guest=["window", "atomics"]) as vm:
        vm.start_log()
        box = vm.board.mailbox
        vm.ram = [
            f"/proc/{os.getpid()}/fd/{vm.board.ram.fd}", "--live", "--ram-base", "0x40000000", "--vttbr",
            hex(box.vttbr), "--vtcr", hex(box.vtcr), "--slot", "0:0x80000000:4M",
        ]  # fmt: skip
        yield vm


def bitmap(folder):
    return DirtyBitmap.from_bytes((folder / "slot0.bitmap").read_bytes(), 1024)


@pytest.mark.slow
def test_harvest_reads_a_machine_that_runs_and_changes_nothing(running, run, tmp_path):
    running.resume()
    while running.guests.stores < 3000:
        time.sleep(0.001)
    running.pause()
    words = running.board.ram.words.copy()
    done = run("harvest", *running.ram, "--output", str(tmp_path), "--json")
    assert done.status == 0, done.err
    assert bitmap(tmp_path) == running.stage2(0).dirty()
    assert (running.board.ram.words == words).all()
    report = json.loads(done.out)["images"][0]
    assert report["hw-dbm"]
    assert not report["cleaned"]
    assert report["slots"][0]["dirty"] == bitmap(tmp_path).weight() > 0
    assert "flush" not in done.err


def test_harvest_cleans_a_machine_that_runs_and_misses_nothing(running, run, tmp_path):
    counts, found = running.guests.counts(), DirtyBitmap(1024)
    running.resume()
    for number in range(4):
        while running.guests.stores < 20_000 * (number + 1):
            time.sleep(0.001)
        if number == 3:
            running.pause()
        done = run("harvest", *running.ram, "--clean", "--output", str(tmp_path))
        assert done.status == 0, done.err
        assert "flush the guest's TLB before one of them is copied" in done.err
        running.board.flush()
        assert f"{bitmap(tmp_path).weight()} of 4K" in done.out
        found |= bitmap(tmp_path)
    written = DirtyBitmap.from_pages((running.guests.counts() != counts).nonzero()[0], 1024)
    assert not (written - found).any()
    assert not running.stage2(0).dirty().any()


def test_what_cannot_be_written_is_dirty_still(running, run, tmp_path):
    running.resume()
    while running.guests.stores < 3000:
        time.sleep(0.001)
    running.pause()
    before = running.stage2(0).dirty()
    (tmp_path / "slot0.bitmap").mkdir()
    done = run("harvest", *running.ram, "--clean", "--output", str(tmp_path))
    assert done.status == 1, done.err
    assert running.stage2(0).dirty() == before


def test_options_of_a_machine_that_runs(running, run, tmp_path):
    for options, why in (
        (["--live", "--clean"], "would forget"),
        (["--clean", "--output", str(tmp_path)], "without --live"),
        (["--live", "--check"], "no truth"),
        (["--live", "--clean", "--output", str(tmp_path), "--policy", "writable"], "with DBM"),
    ):
        without = [option for option in running.ram if option != "--live"]
        done = run("harvest", *without, *options)
        assert done.status == 2, done.err
        assert why in " ".join(done.err.replace("│", " ").split())
