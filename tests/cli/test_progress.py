"""What a terminal shows while something goes on: a migration's numbers under their heads, how much was read."""

import io
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
from clocks import Clock
from rich.console import Console

from hwdbm.cli import migrate, output
from hwdbm.migration import Pass, Report

MIB = 1 << 20
PASSES = [
    Pass(1, 131072, 512 * MIB, normal=131072, transferred=500 * MIB, time=2.0),
    Pass(2, 2048, 8 * MIB, dirty_rate=4.0 * MIB, expected_downtime=0.75, transferred=6 * MIB),
]


def shown(width: int, **how: object) -> list[list[str]]:
    report = Report(4096, 512 * MIB, 0.3, total_time=2.5, remaining=2 * MIB, passes=PASSES, **how)
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(migrate._picture(report, width))
    return [line.split() for line in capture.get().splitlines()]


@pytest.mark.parametrize("status", ["active", "device", "completed"])
def test_each_number_is_under_its_head(status):
    title, heads, units, first, second = shown(76, status=status)
    assert title == ["paused," if status == "device" else f"{status},", "2.5", "s"]
    assert heads == ["dirty", "to", "go", "dirtied", "sent", "downtime"]
    assert units == ["pass", "MiB", "MiB", "MiB/s", "MiB/s", "ms"]
    assert first[:3] == ["1", "512.0", "250.0"]
    if status == "completed":
        assert second[:4] == ["2", "8.0", "4.0", "750"]
    else:
        assert second[:5] == ["2", "8.0", "2.0", "4.0", "750"]
    # The bars are as long as what was sent of the pass.
    assert first[-1].count("━") > 15
    if status != "completed":
        assert 12 <= second[-1].count("━") <= 20


def test_on_few_columns_there_are_fewer():
    _, heads, *_, second = shown(75, status="active")
    assert heads == ["dirty", "to", "go", "sent", "downtime"]
    assert second == ["2", "8.0", "2.0", "750"]


def test_the_last_passes_are_shown():
    many = [Pass(number, 1, 4096) for number in range(1, migrate._PASSES + 5)]
    report = Report(4096, 512 * MIB, 0.3, "completed", passes=many)
    assert migrate._picture(report, 80).row_count == migrate._PASSES


def test_where_there_is_no_terminal_a_line_comes_now_and_then(monkeypatch, capsys):
    clock = Clock()
    monkeypatch.setattr(output, "time", clock)
    with output.progress("the image") as (count,):
        for seconds in (output._EVERY - 1, 1, 1, output._EVERY - 1, output._EVERY - 1):
            clock.sleep(seconds)
            count(SimpleNamespace(entries=np.zeros(25 << 16)))
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"hwdbm: reading the image: {done} MiB of tables" for done in (25, 50)]


def test_on_a_terminal_it_is_shown_all_the_time(monkeypatch):
    console = Console(file=io.StringIO(), force_terminal=True, width=60)
    told = []
    monkeypatch.setattr(output, "Console", lambda **_: console)
    monkeypatch.setattr(console, "status", lambda text: nullcontext(SimpleNamespace(update=told.append)))
    with output.progress("[red]") as (count,):
        for _ in range(2):
            count(SimpleNamespace(entries=np.zeros(1 << 18)))
    assert told == [rf"reading \[red]: {done} MiB of tables" for done in (2, 4)]


def test_a_migration_is_shown_on_stderr_and_leaves_nothing_there(monkeypatch):
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    made, told = [], []

    def live(*first, **how):
        made.append((first, how))
        return nullcontext(SimpleNamespace(update=told.append))

    monkeypatch.setattr(migrate, "Console", lambda **how: made.append(how) or console)
    monkeypatch.setattr(migrate, "Live", live)
    with migrate._display() as tell:
        tell(Report(4096, 512 * MIB, 0.3, total_time=2.5, passes=PASSES))
    how = {"console": console, "refresh_per_second": 8, "transient": True, "redirect_stdout": False}
    assert made == [{"file": sys.stderr, "stderr": True}, (("waiting for the other side",), how)]
    assert [each.row_count for each in told] == [2]
