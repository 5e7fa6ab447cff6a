"""What commands print, wide, narrow and as JSON, is what was looked at: the numbers, their units and their places."""

import dataclasses
import re
from math import inf
from pathlib import Path

import numpy as np
import pytest
from clocks import Clock
from rich.console import Console
from seen import as_seen

from hwdbm.cli import fleet, migrate, plan, receive
from hwdbm.fleet import Drained, Ending, Left, Move
from hwdbm.forecast import Estimate, Forecast, Needs, RuleOutcome
from hwdbm.migration import Pass, Report
from hwdbm.migration.receiver import Received

MIB = 1 << 20
COMMANDS = {
    "inspect": "inspect example:4k_ipa40",
    "inspect-kvm": "inspect example:kvm-6.1",
    "harvest": "harvest example:16k_ipa40 --check",
    "harvest-writable": "harvest example:kvm-6.1 --policy writable",
    "trace": "trace show example:machine-bursty",
    "trace-idle": "trace show example:machine-idle",
    "races": "races no-flush",
    "bitmap": "bitmap show {bitmap} --pages 500 --base 0x40000000 --page-size 16K",
    "bitmap-diff": "bitmap diff {bitmap} {other}",
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
def test_what_a_command_prints_was_looked_at(run, files, name, how, monkeypatch):
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


@pytest.mark.parametrize("columns_", [80, 69, 40])
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
