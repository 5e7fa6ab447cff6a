"""What commands print, wide, narrow and as JSON, is what was looked at: the numbers, their units and their places."""

import dataclasses
import json
import re
import time
from math import inf
from pathlib import Path

import numpy as np
import pytest
from clocks import Clock
from rich.console import Console
from seen import as_seen

from hwdbm.bench import Row
from hwdbm.cli import bench, fleet, migrate, plan, receive, snapshot, trace
from hwdbm.cli.example import find_trace
from hwdbm.fleet import Drained, Ending, Left, Move, Shift
from hwdbm.forecast import Estimate, Forecast, Needs, RuleOutcome
from hwdbm.migration import Pass, Report
from hwdbm.migration.receiver import Received
from hwdbm.trace import Amount, Period, analyse, open_trace

MIB = 1 << 20
COMMANDS = {
    "inspect": "inspect example:4k_ipa40",
    "inspect-kvm": "inspect example:kvm-6.1",
    "harvest": "harvest example:16k_ipa40 --check",
    "harvest-writable": "harvest example:kvm-6.1 --policy writable",
    "harvest-written": "harvest example:16k_ipa40 --output dirty",
    "trace": "trace show example:machine-bursty",
    "trace-idle": "trace show example:machine-idle",
    "races": "races no-flush",
    "bitmap": "bitmap show {bitmap} --pages 500 --base 0x40000000 --page-size 16K",
    "bitmap-diff": "bitmap diff {bitmap} {other}",
    "bitmap-or": "bitmap or {bitmap} {other} --output both",
    "memory-diff": "bitmap diff --memory {ram} {written}",
}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Return two bitmaps of some runs, more of them than are shown, and memory before and after writes, by name."""
    bits, memory = np.arange(512) % 37 < np.arange(512) // 37, np.zeros((100, 4096), dtype=np.uint8)
    bits[500:] = False
    written = memory.copy()
    written[[3, 4, 5, 70], 77] = 1
    found = {
        "bitmap": np.packbits(bits, bitorder="little"), "other": np.packbits(bits & (np.arange(512) % 3 > 0)),
        "ram": memory, "written": written,
    }  # fmt: skip
    for name, content in found.items():
        (tmp_path / name).write_bytes(content.tobytes())
    return {name: tmp_path / name for name in found}


@pytest.mark.parametrize("how", ["80", "40", "json"])
@pytest.mark.parametrize("name", COMMANDS)
def test_what_a_command_prints_was_looked_at(run, files, name, how, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", how if how != "json" else "80")
    arguments = COMMANDS[name].format(**files).split()
    result = run(*arguments, *(["--json"] if how == "json" else []))
    text = "\n".join([f"status {result.status}", result.err + result.out])
    for each in files.values():
        text = text.replace(str(each), each.name)
    text = re.sub(r"(?<=read in )[\d.]+|(?<=\"time\": )[\d.]+", "TIME", text)
    as_seen(f"texts/{name}-{how}.txt", text)


def forecast(*, converges: bool) -> Forecast:
    return Forecast(
        converges, None, Estimate(3, 2, 4), Estimate(12.34, 10, 1500.5), Estimate(0.0215, 0.011, 1.5),
        Estimate(5e9, 4e9, 6e9), Needs(4e7, 0.2), "Because.",
    )  # fmt: skip


OUTCOMES = [
    RuleOutcome("ours", "switch", 2.825, 3, 0.2934, 159.0 * MIB, "the rest fits into the limit"),
    RuleOutcome("kubevirt", "abort", 27.5, 1234, None, 1234.56 * MIB, "it is tired " * 12),
]
PASSES = [
    Pass(1, 131072, 512 * MIB, normal=130000, duplicate=1072, transferred=500 * MIB, time=2.0),
    Pass(2, 2048, 8 * MIB, dirty_rate=4.0 * MIB, expected_downtime=0.75, transferred=6 * MIB, time=0.0625,
         forecast=forecast(converges=True)),
    Pass(3, 1024, 4 * MIB, dirty_rate=1.0 * MIB, expected_downtime=1.25),
]  # fmt: skip
REPORTS = {
    "completed": {"downtime": 0.0215, "total_time": 4.512, "status": "completed"},
    "digests": {"downtime": 0.5, "total_time": 4.5, "status": "completed", "verify_time": 0.0625, "converged": False,
                "source_sha256": "ab" * 32, "destination_sha256": "ab" * 32, "guest_resumed": True},
    "other": {"status": "failed", "source_sha256": "12" * 32, "destination_sha256": "34" * 32, "guest_resumed": False},
    "here": {"status": "active", "source_sha256": "12" * 32},
}  # fmt: skip


@pytest.mark.parametrize("columns_", [80, 70, 69, 40])
def test_the_text_of_a_migration_was_looked_at(columns_, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns_))
    texts = [migrate._text(Report(4096, 512 * MIB, 0.3, passes=PASSES, **more)) for more in REPORTS.values()]
    texts += [migrate._text(Report(4096, 512 * MIB, 0.3, status="cancelled"))]
    as_seen(f"texts/migrated-{columns_}.txt", "\n\n".join(texts) + "\n")


def test_the_lines_of_a_log_were_looked_at(monkeypatch, capsys):
    """Without a terminal there is one now and then."""
    clock = Clock()
    monkeypatch.setattr(migrate, "time", clock)
    tell = migrate._lines()
    tell(Report(4096, 512 * MIB, 0.3, passes=PASSES))  # too soon
    for status, passes in (("active", []), ("active", PASSES[:1]), ("device", PASSES[:2]), ("active", PASSES)):
        clock.sleep(migrate._NOW_AND_THEN)
        tell(Report(4096, 512 * MIB, 0.3, status=status, total_time=12.5, remaining=3 * MIB, passes=passes))
    clock.sleep(migrate._NOW_AND_THEN)
    tell(Report(4096, 512 * MIB, 0.3, passes=[Pass(1, 1, 4096, forecast=forecast(converges=False))]))
    clock.sleep(migrate._NOW_AND_THEN - 0.1)
    tell(Report(4096, 512 * MIB, 0.3, passes=PASSES))
    as_seen("texts/log.txt", capsys.readouterr().err)


@pytest.mark.parametrize("columns_", [80, 40])
def test_the_text_of_a_forecast_was_looked_at(columns_, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns_))
    plan._say(forecast(converges=True), [], as_json=False)
    plan._say(forecast(converges=False), OUTCOMES, as_json=False, rules=True)
    plan._say(forecast(converges=False), OUTCOMES, as_json=True)
    plan._say(forecast(converges=True), OUTCOMES, as_json=True, rules=True)
    as_seen(f"texts/planned-{columns_}.txt", capsys.readouterr().out)


def test_the_text_of_what_came_was_looked_at():
    one = Received(None, 500 * MIB, 3, 123456, 789, "ab" * 32)  # type: ignore[arg-type]
    as_seen("texts/received.txt", receive._text(one) + "\n" + receive._text(dataclasses.replace(one, sha256="")) + "\n")


DRAINED = Drained(
    ("h0",),
    (Move("a", "h0", "h1", 0.04, 12.34, 0.0215, 5 * MIB, 1234.56 * MIB, 6.25 * MIB),
     Move("longer", "h0", "h22", 12.34, 61.5, 1.25, 5 * MIB, 7 * MIB, 8 * MIB)),
    2, (Left("c", "h0", "no host has room"),), (), Ending("spread", 61.5, 73.84, 2),
    (Ending("one by one", 1234.5, 2345.6, 2), Ending("all at once", inf, 12.34, 1, ("longer",))), 60.04, 321,
)  # fmt: skip


@pytest.mark.parametrize("columns_", [80, 40])
def test_the_text_of_a_drain_was_looked_at(columns_, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns_))
    limits = {"a": (0.3, 0.3), "longer": (1.0, 1.5)}
    nothing = dataclasses.replace(DRAINED, moves=(), left=(), ending=Ending("spread", 0.0, 0.0, 0))
    texts = [fleet._text(each, limits) for each in (DRAINED, nothing)]
    as_seen(f"texts/drained-{columns_}.txt", "\n\n".join(texts) + "\n")


def test_the_json_of_a_drain_was_looked_at():
    """It has limits of the plan and of the engine, and no time of what never ends."""
    left = (dataclasses.replace(DRAINED.left[0], max_downtime=0.43215678), *DRAINED.left)
    steps = (Shift(0.0417, (("a", 5 * MIB + 0.4), ("longer", 6.0))), Shift(12.34, ()))
    drained = dataclasses.replace(DRAINED, left=left, steps=steps)
    found = [fleet._as_json("plan", each, {"a": (0.3, 0.25), "longer": (1.0, 1.5)}) for each in (DRAINED, drained)]
    as_seen("texts/drained-json.txt", json.dumps(found, indent=2) + "\n")


ROWS = [
    Row("enable", 0.0123456, "copy", 0.0061728, 1.25, "s"), Row("all of it", 0.9999, "copy", 0.5, None, "s"),
    Row("as long", 1.0, "copy", 2.0, 0.25, "s"), Row("longer", 12.3456, "other", 0.1, 1.5, "s"),
    Row("memory", 96 * MIB + (MIB >> 1) + 1, "bytes", 400 * MIB, 0.5, "byte"),
]  # fmt: skip


@pytest.mark.parametrize("how", ["80", "40", "json"])
def test_the_table_of_a_bench_was_looked_at(how, monkeypatch):
    """Below a second a time has microseconds, and then none."""
    monkeypatch.setenv("COLUMNS", how if how != "json" else "80")
    text = bench._table(ROWS) if how != "json" else json.dumps([bench._record(each) for each in ROWS], indent=2)
    as_seen(f"texts/bench-{how}.txt", text + "\n")


def test_a_trace_of_many_periods_was_looked_at():
    """Some of the periods are shown, the first and the last among them, and the page's size in the unit that it has."""
    opened = open_trace(find_trace("example:machine-hot"))
    found = analyse(opened)
    texts = []
    for many, nbytes in ((12, MIB), (13, MIB), (40, 0)):
        periods = tuple(
            Period(at, at / 16, 100.0 * at, 10 * at, 20 * at, np.array([10 * at, 20 * at])) for at in range(1, many + 1)
        )
        amounts = tuple(Amount(4096 << shift, 1, nbytes * (shift + 2)) for shift in (0, 7, 8, 9, 10))
        texts.append(trace._text(Path("a"), opened, dataclasses.replace(found, periods=periods, amounts=amounts)))
    as_seen("texts/trace-many.txt", "\n\n".join(texts) + "\n")


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.0009989, "999 us"), (0.0009996, "1 ms"), (0.9989, "999 ms"), (0.9996, "1 s"), (12.345, "12.3 s")],
)
def test_a_time_has_the_unit_of_its_size(seconds, said):
    """When it is rounded there are no thousand milliseconds."""
    assert trace._time(seconds) == said


@pytest.mark.parametrize("columns_", [80, 40])
def test_the_table_of_snapshots_was_looked_at(columns_, monkeypatch):
    """A parent is called by its number, or by some of its id where it isn't there."""
    monkeypatch.setenv("COLUMNS", str(columns_))
    monkeypatch.setattr(snapshot.time, "localtime", time.gmtime)
    one = {"id": "ab" * 16, "name": "000000-abababababab", "full": True, "time": 1_700_000_001_007, "pages": 1234}
    one |= {"page-size": 4096, "disk": 5 * MIB}
    two = one | {"id": "cd" * 16, "name": "000001-cdcdcdcdcdcd", "full": False, "time": 1_700_000_002_678}
    tables = [
        [one], [one | {"overlap": 0}, two | {"parent": one["id"], "overlap": 12}],
        [two | {"parent": "0123456789abcdef"}],
        [one | {"paused": 12.34}, two | {"parent": one["id"], "paused": 0.06}], [],
    ]  # fmt: skip
    as_seen(f"texts/snapshots-{columns_}.txt", "\n\n".join(map(snapshot._table, tables)) + "\n")


@pytest.mark.parametrize("columns_", [100, 76, 75])
def test_what_a_terminal_shows_of_a_migration_was_looked_at(columns_):
    console = Console(width=columns_, color_system=None)
    one = Pass(1, 131072, 512 * MIB, normal=130000, duplicate=1072, transferred=500 * MIB, time=2.0)
    with console.capture() as capture:
        for status, remaining, passes in (
            ("active", 384 * MIB, [one]), ("device", MIB, PASSES), ("completed", 0, PASSES), ("active", 0, []),
            ("active", 0, [dataclasses.replace(one, remaining=0)]),
        ):  # fmt: skip
            report = Report(4096, 512 * MIB, 0.3, status, total_time=2.5, remaining=remaining, passes=passes)
            console.print(migrate._picture(report, columns_))
    as_seen(f"texts/terminal-{columns_}.txt", capture.get())
