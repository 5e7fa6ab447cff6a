"""The pictures of migrations show the report's numbers, where and in the units that they say."""

import dataclasses

import figures
import numpy as np
import pytest
from seen import as_seen

from hwdbm.migration import Pass, Report
from hwdbm.migration.picture import draw

MIB = 1 << 20


def of_passes(*passes: Pass) -> Report:
    return Report(4096, 512 * MIB, 0.3, "completed", total_time=4.5, downtime=0.4321, passes=list(passes))


def cells(*shares: float) -> np.ndarray:
    return np.array(shares, dtype=np.float32)


FIRST = Pass(
    1, 131072, 512 * MIB, normal=100000, duplicate=31072, transferred=400 * MIB, time=2.0, zero_time=0.4,
    cells=cells(1, 1, 1, 1),
)  # fmt: skip
SECOND = Pass(
    2, 2048, 8 * MIB, dirty_rate=4.25 * MIB, expected_downtime=0.75, normal=2048, transferred=9 * MIB, time=0.05,
    throttle=20, cells=cells(0, 0.25, 0, 0.5),
)  # fmt: skip
LAST = Pass(
    3, 256, 1 * MIB, dirty_rate=2.0 * MIB, expected_downtime=0.02, normal=200, duplicate=56, transferred=MIB,
    time=0.01, throttle=30, cells=cells(0, 0, 0.125, 0),
)  # fmt: skip
CASES = {
    "one-pass": of_passes(dataclasses.replace(FIRST, duplicate=0)),
    "throttled": of_passes(FIRST, SECOND, LAST),
    "nothing": of_passes(Pass(1, 0, 0, cells=cells(0))),
    "failed": dataclasses.replace(of_passes(FIRST, SECOND), status="failed", downtime=None, error="a <link> went"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_picture_shows_what_the_one_that_was_looked_at_shows(case, monkeypatch, tmp_path):
    picture = figures.drawn(monkeypatch)
    draw(tmp_path / "a.png", CASES[case])
    as_seen(f"pictures/{case}.txt", *picture)


def test_it_looks_like_the_one_that_was_looked_at(monkeypatch, tmp_path):
    found = figures.looks(monkeypatch)
    draw(tmp_path / "a.png", CASES["throttled"])
    as_seen("pictures/looks-migration.txt", *found)


@pytest.mark.parametrize(("ratio", "scale"), [(1, "linear"), (50, "linear"), (50.5, "symlog")])
def test_amounts_that_differ_much_are_drawn_on_a_scale_that_shows_both(ratio, scale, monkeypatch, tmp_path):
    first = dataclasses.replace(FIRST, remaining=int(1000 * ratio))
    found = figures.drawn(monkeypatch)
    draw(tmp_path / "a.png", of_passes(first, dataclasses.replace(SECOND, remaining=1000)))
    amounts = found[0].partition("memory of each pass")[2]
    assert amounts.splitlines()[2].split()[0].startswith(scale)
