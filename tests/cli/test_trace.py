"""``hwdbm record`` and ``hwdbm trace``."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import forked
import numpy as np
import pytest

from hwdbm import DirtyBitmap
from hwdbm.memslot import Memslot
from hwdbm.trace import Writer, analyse, open_trace

NEEDS_KVM = pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="no /dev/kvm that may be opened")
MAIN = [sys.executable, "-P", "-c", "from hwdbm.cli import main; main()"]
QUICK = ["--memory", "2M", "--interval", "10ms", "--duration", "60ms"]


@pytest.mark.parametrize(
    "how",
    [
        [],
        ["--source", "machine", "--mode", "write-protect", "--workload", "sequential", "--no-zeros"],
        ["--thp", "--workload", "idle"],
        pytest.param(["--source", "kvm"], marks=NEEDS_KVM),
        pytest.param(["--source", "kvm", "--kvm-log", "ring", "--rate", "20000"], marks=NEEDS_KVM),
    ],
)
def test_a_guest_is_recorded(run, tmp_path, how):
    done = run("record", "--output", tmp_path / "trace", *QUICK, *how)
    assert (done.status, done.err) == (0, "")
    trace = open_trace(tmp_path / "trace")
    assert trace.complete
    assert " ".join(done.out.split()).startswith(f"{tmp_path / 'trace'}: {trace.intervals} intervals in ")
    assert trace.has_zeros == ("--no-zeros" not in how)
    assert trace.words(0, trace.intervals).any() == ("idle" not in how)
    assert 60e6 <= trace.times[-1] < 30e9
    shown = run("trace", "show", tmp_path / "trace")
    assert shown.status == 0
    assert max(len(line) for line in shown.out.splitlines() if str(tmp_path) not in line) <= 80


def test_bitmaps_and_ram_files_are_recorded(run, tmp_path):
    (tmp_path / "kept").mkdir()
    for number in (1, 2):
        DirtyBitmap.from_pages([number], 64).save(tmp_path / "kept" / f"{number}.bitmap")
    done = run("record", "--output", tmp_path / "a", "--bitmaps", tmp_path / "kept", "--interval", "1s", "--json")
    assert json.loads(done.out)["times"] == "interval"
    assert json.loads(done.out)["duration"] == 2000
    done = run("record", "--output", tmp_path / "b", "--bitmaps", tmp_path / "kept", "--slot", "3:0x1000:256K")
    assert "one for each file" in " ".join(done.out.split())
    assert open_trace(tmp_path / "b").slots == (Memslot(3, 0, 1, 64, 0),)
    for number in (1, 2):
        (tmp_path / "kept" / f"{number}.bitmap").rename(tmp_path / "kept" / f"{number}s")
    done = run("record", "--output", tmp_path / "c", "--bitmaps", tmp_path / "kept")
    assert "which the names say" in " ".join(done.out.split())
    (tmp_path / "ram").write_bytes(bytes(256 << 10))
    how = ["--ram-file", tmp_path / "ram", "--slot", "0:0x40000000:256K", "--page-size", "64K", "--duration", "20ms"]
    found = json.loads(run("record", "--output", tmp_path / "d", *how, "--json").out)
    assert (found["times"], found["pages"], found["page-size"]) == ("clock", 4, 65536)


def test_an_interrupt_leaves_a_whole_trace(tmp_path):
    command = [*MAIN, "record", "--output", tmp_path / "trace", "--memory", "2M", "--interval", "20ms"]
    with forked.Popen(
        [*command, "--duration", "1min", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        until = time.monotonic() + 60
        while not (tmp_path / "trace" / "words" / "c").exists() and time.monotonic() < until:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    *before, last = err.decode().splitlines()
    assert all(line.startswith("hwdbm: recording: ") for line in before)
    assert last == "hwdbm: interrupted"
    trace = open_trace(tmp_path / "trace")
    assert trace.complete
    assert json.loads(out)["intervals"] == trace.intervals
    assert trace.times[-1] < 60e9


@pytest.mark.parametrize(
    ("args", "why"),
    [
        ([], "Missing option '--output'"),
        (["--ram-file", "a", "--bitmaps", "b"], "give one of --ram-file, --bitmaps"),
        (["--source", "kvm", "--ram-file", "a"], "give one of --source, --ram-file"),
        (["--ram-file", "a", "--memory", "1M"], "--memory has no effect with --ram-file"),
        (["--bitmaps", "a", "--duration", "1s"], "--duration has no effect with --bitmaps"),
        (["--bitmaps", "a", "--slot", "0:4K:4K", "--page-size", "64K"], "not whole pages of 65536 bytes"),
        (["--slot", "0:0:4K"], "--slot has no effect without --bitmaps"),
        (["--page-size", "4K"], "--page-size has no effect without --bitmaps or --ram-file"),
        (["--source", "kvm", "--mode", "hw-dbm"], "--mode has no effect with --source kvm"),
        (["--kvm-log", "ring"], "--kvm-log has no effect without --source kvm"),
        (["--interval", "0"], "'0' is not a time above 0"),
        (["--interval", "nan"], "'nan' is not a time above 0"),
        (["--duration", "-1s"], "'-1s' is not a time above 0"),
        (["--duration", "1h"], "'1h' is not a time above 0"),
        (["--interval", "1" + "0" * 14], "is not a time above 0"),
        (["--memory", "1000"], "memory is whole pages"),
    ],
)
def test_wrong_usage(run, args, why, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run("record", *([] if not args else ["--output", "trace"]), *args)
    assert (done.status, done.out) == (2, "")
    assert why in " ".join(done.err.split())
    assert not (tmp_path / "trace").exists()


def test_what_is_wrong_is_said(run, tmp_path):
    for args, why in (
        (["--ram-file", tmp_path / "none"], "No such file"),
        (["--bitmaps", tmp_path], "there are no bitmaps"),
        (["--memory", "1000T"], "a memslot has"),
    ):
        done = run("record", "--output", tmp_path / "trace", *args)
        assert done.out == ""
        assert why in " ".join(done.err.split())
    (tmp_path / "there").write_text("")
    done = run("record", "--output", tmp_path / "there", *QUICK)
    said = f"hwdbm: {tmp_path / 'there'}: there is something already: remove it, or choose another name\n"
    assert (done.status, done.err) == (1, said)
    done = run("trace", "show", tmp_path / "none")
    assert (done.status, done.err) == (1, f"hwdbm: {tmp_path / 'none'}: no such trace\n")
    done = run("trace", "show", "example:none")
    assert done.status == 2
    assert "there is no trace 'none'; there is kvm-counting," in " ".join(done.err.split())
    done = run("trace", "show", "example:kvm-random", "--plot", tmp_path / "x.jpg")
    assert done.status == 2
    assert ".png or .svg" in done.err


def test_a_trace_that_was_cut_short_is_no_result(run, tmp_path):
    shutil.copytree(open_trace_of("kvm-random"), tmp_path / "trace")
    (tmp_path / "trace" / "words" / "c" / "0" / "0").unlink()
    done = run("trace", "show", tmp_path / "trace")
    assert (done.status, done.out) == (1, "")
    assert "the trace is cut short: this chunk is missing (docs: howto/traces#when-it-fails)" in done.err


def open_trace_of(name):
    from hwdbm.cli.example import find_trace

    return find_trace(f"example:{name}")


def test_the_examples_are_what_they_are_called():
    from hwdbm.cli.example import TRACES

    found, size = {}, 0
    for name in TRACES:
        trace = open_trace(open_trace_of(name))
        assert trace.complete
        kind = name.partition("-")[0]
        assert trace.source.startswith({"linux": "ram file"}.get(kind, kind))
        found[name] = analyse(trace)
        size += sum(each.stat().st_size for each in trace.path.rglob("*") if each.is_file())
    assert size < 1 << 20
    assert found["machine-idle"].pages.sum() == 0
    for name in set(found) - {"machine-idle"}:
        assert found[name].pages.sum() > 1000, name
    # Going up the pages, the second half of what 2 intervals write is new; of a hot set little is.
    counting, hot = found["kvm-counting"].periods, found["machine-hot"].periods
    assert counting[1].pages > 1.9 * counting[0].pages
    assert hot[1].pages < 1.9 * hot[0].pages
    assert 10 < np.count_nonzero(found["machine-bursty"].pages) < found["machine-bursty"].pages.size - 10


def test_show(run, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with Writer(tmp_path / "trace", [Memslot(0, 0, 0, 1024, 0)], 4096, source="a test", interval=100) as writer:
        for row in range(8):
            words = np.zeros(16, dtype=np.uint64)
            words[row % 2] = 0xFF
            writer.append((row + 1) * 10**8, words, words & np.uint64(1))
    shown = run("trace", "show", tmp_path / "trace", "--plot", tmp_path / "a.png")
    assert shown.err == ""
    assert shown.out.splitlines() == [
        f"{tmp_path / 'trace'}: 8 intervals in 0.8 s",
        "4.0 MiB in pages of 4 KiB: a test, a log",
        "",
        "period  distinct MiB    low   high  MiB/s  of all",
        "100 ms         0.031  0.031  0.031    0.3    0.8%",
        "200 ms           0.1    0.1    0.1    0.3    1.6%",
        "400 ms           0.1    0.1    0.1    0.2    1.6%",
        "800 ms           0.1    0.1    0.1    0.1    1.6%",
        "",
        "pages of  sent MiB/s  times",
        "4 KiB            0.3   1.00",
        "64 KiB           0.6   2.00",
        "2 MiB           20.0  64.00",
        "",
        "working set of 200 ms: 0.1 to 0.1 MiB",
        "written in all: 0.1 MiB, 1.6% of the memory",
        "pages of zeros: 12.5% of what was written",
    ]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads(run("trace", "show", tmp_path / "trace", "--plot", tmp_path / "a.svg", "--json").out)
    assert b"<svg" in (tmp_path / "a.svg").read_bytes()
    assert (found["written"], found["touched"], found["zeros"]) == (64, 16, 8)
    assert found["working-set"] == {"period": 200.0, "pages": [16, 16, 16, 16]}
    assert [each["pages"] for each in found["periods"]] == [8, 16, 16, 16]


def test_an_empty_trace_is_shown(run, tmp_path):
    Writer(tmp_path / "trace", [Memslot(0, 0, 0, 64, 0)], 4096).close()
    shown = run("trace", "show", tmp_path / "trace", "--plot", tmp_path / "a.png")
    assert shown.status == 0
    assert "There is no interval." in shown.out
    found = json.loads(run("trace", "show", tmp_path / "trace", "--json").out)
    assert (found["intervals"], found["periods"], "working-set" in found) == (0, [], False)


def test_a_migration_is_recorded(run, tmp_path):
    how = ["--memory", "8M", "--rate", "5000", "--bandwidth", "20M", "--max-downtime", "9000", "--json"]
    done = run("migrate", *how, "--record", tmp_path / "trace")
    assert (done.status, done.err) == (0, "")
    found = json.loads(done.out)
    assert (found["status"], found["source-sha256"]) == ("completed", found["destination-sha256"])
    trace = open_trace(tmp_path / "trace")
    assert trace.complete
    assert trace.words(0, trace.intervals).any()
    assert trace.times[-1] / 1e6 > found["total-time"] / 2


def test_a_migration_whose_trace_cant_begin_doesnt_either(run, tmp_path):
    (tmp_path / "trace").write_text("")
    done = run("migrate", "--memory", "1M", "--record", tmp_path / "trace")
    assert (done.status, done.out) == (1, "")
    assert done.err == f"hwdbm: {tmp_path / 'trace'}: there is something already: remove it, or choose another name\n"


def test_a_migration_to_nobody_leaves_no_trace(run, tmp_path):
    done = run("migrate", "--memory", "1M", "--record", tmp_path / "trace", "--to", f"unix:{tmp_path}/nobody")
    assert (done.status, done.out) == (1, "")
    assert done.err.startswith(f"hwdbm: {tmp_path}/nobody: ")
    assert not (tmp_path / "trace").exists()


def test_a_migration_goes_on_without_its_trace(run, tmp_path, monkeypatch):
    append = Writer.append

    def failing(self, *arguments):
        if self.intervals == 1:
            raise OSError(28, "No space left on device", str(self.path))
        append(self, *arguments)

    monkeypatch.setattr(Writer, "append", failing)
    how = ["--memory", "8M", "--rate", "5000", "--bandwidth", "20M", "--max-downtime", "9000", "--json"]
    done = run("migrate", *how, "--record", tmp_path / "trace")
    assert (done.status, json.loads(done.out)["status"]) == (0, "completed")
    assert "warning: the trace in" in done.err
    assert open_trace(tmp_path / "trace").intervals == 1


def test_a_plan_is_made_of_an_example(run):
    done = run("plan", "example:kvm-random", "--bandwidth", "200M", "--json")
    assert (done.status, json.loads(done.out)["converges"]) == (0, True)
