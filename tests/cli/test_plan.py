"""``hwdbm plan``: traces, samples, guests that are watched, and what can't be."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import forked
import numpy as np
import pytest

from hwdbm.forecast import OWN, QEMU, MemoryWrites, compare_rules, replay
from hwdbm.memslot import Memslot
from hwdbm.migration.report import Pass, Report
from hwdbm.trace import Writer

NPAGES = 1000  # no multiple of 64
HOT = 30


@pytest.fixture
def rows() -> np.ndarray:
    """Return 20 intervals in which the first pages are written, and some others in turn."""
    words = np.zeros((20, 16), dtype=np.uint64)
    words[:, 0] = (1 << HOT) - 1
    for i in range(20):
        words[i, 1 + i % 15] = 3 if i % 15 < 14 else 1
    return words


@pytest.fixture
def trace(rows: np.ndarray, tmp_path: Path) -> Path:
    with Writer(tmp_path / "trace", [Memslot(0, 0, 0, NPAGES, 0)], 4096) as writer:
        for i, row in enumerate(rows):
            writer.append((i + 1) * 100_000_000, row)
    return tmp_path / "trace"


def test_a_trace(run, trace: Path, rows: np.ndarray) -> None:
    result = run("plan", trace, "--bandwidth", "200K", "--max-downtime", "100", "--json")
    assert (result.status, result.err) == (0, "")
    writes = MemoryWrites(rows, 0.1, NPAGES)
    assert json.loads(result.out) == replay(writes, bandwidth=200 << 10, max_downtime=0.1, terms=OWN).to_dict()
    text = run("plan", trace, "--bandwidth", "200K").out
    assert text.startswith("doesn't converge")
    assert "It would converge with a bandwidth of" in " ".join(text.split())


def test_qemu_s_stream(run, trace: Path, rows: np.ndarray) -> None:
    how = ["--stream", "qemu", "--last-bandwidth", "2M", "--timeout", "9", "--auto-converge", "--on-limit", "wait"]
    from dataclasses import replace

    found = json.loads(run("plan", trace, "--bandwidth", "500K", *how, "--json").out)
    terms = replace(QEMU, last_bandwidth=2 << 20)
    wanted = replay(
        MemoryWrites(rows, 0.1, NPAGES),
        bandwidth=500 << 10,
        terms=terms,
        timeout=9,
        auto_converge=True,
        on_limit="wait",
    )
    assert found == wanted.to_dict()


def test_rules(run, trace: Path, rows: np.ndarray) -> None:
    found = json.loads(run("plan", trace, "--bandwidth", "200K", "--rules", "--json").out)
    wanted = compare_rules(MemoryWrites(rows, 0.1, NPAGES), bandwidth=200 << 10, terms=OWN)
    assert found["rules"] == [each.to_dict() for each in wanted]
    text = run("plan", trace, "--bandwidth", "200K", "--rules").out
    for each in wanted:
        assert f"{each.rule}: {each.why}" in text


@pytest.mark.usefixtures("few_forecasts")
def test_now(run, tmp_path: Path) -> None:
    """The guest writes in two seconds of three, and does at the end: the forecast, the rules and the report say so."""
    rows = np.zeros((64, 4), dtype=np.uint64)
    rows[np.arange(64) % 30 >= 10, 0] = (1 << HOT) - 1
    with Writer(tmp_path / "trace", [Memslot(0, 0, 0, 256, 0)], 4096) as writer:
        for i, row in enumerate(rows):
            writer.append((i + 1) * 100_000_000, row)
    how = ["--bandwidth", "1M", "--max-downtime", "50", "--rules"]
    found = [json.loads(run("plan", tmp_path / "trace", *how, *more, "--json").out) for more in ([], ["--now"])]
    writes, asked = MemoryWrites(rows, 0.1, 256), {"bandwidth": 1 << 20, "max_downtime": 0.05}
    for answer, now in zip(found, (False, True), strict=True):
        rules = answer.pop("rules")
        assert answer == replay(writes, **asked, terms=OWN, now=now).to_dict()
        assert rules == [each.to_dict() for each in compare_rules(writes, **asked, terms=OWN, now=now)]
    assert found[0] != found[1]
    pages = []
    for more in ([], ["--now"]):
        assert run("plan", tmp_path / "trace", *how, *more, "--report", tmp_path / "a.html").status == 0
        pages.append((tmp_path / "a.html").read_text())
    assert pages[0] != pages[1]


def test_samples(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = Report(4096, 100_000_000, 0.3)
    report.passes = [
        Pass(1, 25000, 100_000_000, transferred=100_000_000, time=10.0),
        Pass(2, 5000, 20_000_000, dirty_rate=2e6, transferred=20_000_000, time=2.0),
        Pass(3, 1000, 4_000_000, dirty_rate=2e6),
    ]
    file = tmp_path / "samples"
    file.write_text(json.dumps(report.to_dict(), indent=2))
    found = json.loads(run("plan", "--samples", file, "--json").out)
    assert found["converges"]
    assert found["passes"]["value"] == 4
    assert 12_400 < found["total-time"]["value"] < 12_600
    with file.open() as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        assert json.loads(run("plan", "--samples", "-", "--json").out) == found


def test_a_guest_that_is_watched(run) -> None:
    how = ["--source", "machine", "--memory", "4M", "--workload", "idle", "--duration", "200ms"]
    result = run("plan", *how, "--bandwidth", "10M")
    assert result.status == 0
    assert result.out.startswith("converges")


def test_a_picture(run, trace: Path, tmp_path: Path) -> None:
    assert run("plan", trace, "--bandwidth", "1M", "--plot", tmp_path / "plan.png").status == 0
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("args", "why"),
    [
        ([], "give one of TRACE, --samples and --source"),
        (["x", "--samples", "y"], "give one of TRACE, --samples and --source"),
        (["x"], "a forecast needs --bandwidth, as in 200M"),
        (["x", "--bandwidth", "0"], "--bandwidth 0: a bandwidth is more than 0 bytes a second"),
        (["x", "--bandwidth", "-1"], "is not a size"),
        (["x", "--bandwidth", "nan"], "is not a size"),
        (["x", "--bandwidth", "1M", "--last-bandwidth", "0"], "--last-bandwidth 0: a bandwidth is more than 0"),
        (["x", "--bandwidth", "1M", "--max-downtime", "nan"], "'nan' is not a number of 0 or more"),
        (["x", "--bandwidth", "1M", "--memory", "4M"], "--memory has no effect without --source"),
        (["x", "--bandwidth", "1M", "--duration", "4"], "--duration has no effect without --source"),
        (["--samples", "y", "--now"], "--now has no effect with --samples"),
        (["--samples", "y", "--rules"], "--rules has no effect with --samples"),
        (["--samples", "y", "--plot", "z.png"], "--plot has no effect with --samples"),
        (["x", "--bandwidth", "1M", "--plot", "z.gif"], "--plot z.gif: .png"),
        (["--source", "machine", "--bandwidth", "1M", "--duration", "0"], "'0' is not a time above 0"),
        (["--source", "kvm", "--bandwidth", "1M", "--workload", "hot"], "hot"),
    ],
)
def test_wrong_usage(run, args: list[str], why: str) -> None:
    result = run("plan", *args)
    assert (result.status, result.out) == (2, "")
    assert why in " ".join(result.err.split())


def test_what_is_no_trace_and_no_samples(run, tmp_path: Path, trace: Path) -> None:
    result = run("plan", tmp_path / "nowhere", "--bandwidth", "1M")
    assert (result.status, result.out) == (1, "")
    assert "nowhere" in result.err
    bad = tmp_path / "bad"
    bad.write_text('{"total-time": 5, "ram": {"remaining": NaN}}\n')
    result = run("plan", "--samples", bad)
    assert (result.status, result.out) == (1, "")
    assert result.err == (
        f"hwdbm: {bad}: line 1: remaining is a number of 0 or more, not nan (docs: howto/will-it-converge#samples)\n"
    )


def test_an_interrupt_leaves_no_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "hwdbm", "plan", "--source", "machine", "--memory", "16M"]
    env = os.environ | {"TMPDIR": str(tmp_path)}
    with forked.Popen([*command, "--duration", "60s", "--bandwidth", "9M"], env=env) as process:
        try:
            while not any(tmp_path.glob("hwdbm-*")):
                assert process.poll() is None
                time.sleep(0.02)
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 130
        finally:
            process.kill()
    assert not list(tmp_path.iterdir())
