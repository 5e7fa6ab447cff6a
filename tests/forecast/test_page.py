"""docs/forecast.md is what the runs say, and the runs are what was asked for."""

import numpy as np
import pytest
from forecast import page

RUNS = page.read()


def run(total: float, down: float, was: tuple[float, float] | None, converges: bool = True) -> page.Run:
    happened = {"status": "timeout", "total-time": 0, "downtime": None}
    if was is not None:
        happened = {"status": "completed", "total-time": was[0], "downtime": was[1]}
    said = {"converges": converges, "total-time": {"value": total}, "downtime": {"value": down}}
    return {"kind": "own", "guest": "a", "bandwidth": 1, "max-downtime": 1, "link": False} | {
        "forecast": said,
        "happened": happened,
    }


def test_the_page_is_what_the_runs_say() -> None:
    assert page.PAGE.read_text(encoding="utf-8") == page.page(RUNS), "make it again: tests/forecast/page.py"


def test_an_error_is_relative_to_what_was() -> None:
    assert page.error(run(150, 30, (100, 40)), "forecast", "total-time") == 0.5
    assert page.error(run(150, 30, (100, 40)), "forecast", "downtime") == 0.25
    assert page.error(run(150, 3, (100, 0)), "forecast", "downtime") == 3  # of a clock of whole milliseconds


@pytest.mark.parametrize(("was", "converges", "right"), [(None, False, 1), (None, True, 0), ((1, 1), False, 0)])
def test_what_did_not_end_has_no_error_of_time(was, converges, right) -> None:
    one = run(100, 10, was, converges)
    assert page.error(one, "forecast", "total-time") is None
    assert page.right([one], "forecast") == right


def test_what_was_done_twice_says_what_luck_is() -> None:
    said = page.luck([run(1, 1, (100, 10)), run(1, 1, (120, 15)), run(1, 1, None)])
    assert said.startswith("1 migrations were done more than once")
    assert "total time 17 %" in said
    assert "downtime 33 %" in said


def test_the_runs_are_what_was_asked_for() -> None:
    """At least 60 migrations from 8 to 800 MB/s, of each kind of guest; some of them don't converge."""
    assert len(RUNS) >= 60
    assert {one["kind"] for one in RUNS} == set(page.KINDS)
    rates = [one["bandwidth"] for one in RUNS]
    assert (min(rates), max(rates)) == (8e6, 800e6)
    assert np.mean([page.completed(one) for one in RUNS]) < 0.95
