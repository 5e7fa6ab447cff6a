"""What a terminal shows while a migration goes on: the report's numbers under their heads."""

import pytest
from rich.console import Console

from hwdbm.cli import migrate
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
