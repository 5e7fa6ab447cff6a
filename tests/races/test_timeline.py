"""A counterexample's two pictures: the text fits its width, and the diagram is laid out as one that was looked at."""

import pytest
from seen import as_seen

from hwdbm.races import MISTAKES, check, diagram, timeline


@pytest.fixture(scope="module")
def report():
    return check(MISTAKES["device-marks-first"].make(True))


def test_the_diagram_is_the_one_that_was_looked_at(report):
    as_seen("device-marks-first.svg", diagram(report) + "\n")


LOST = "the page is lost here: whatever comes next, no end is right"


@pytest.mark.parametrize("width", [60, 79, 80, 81, 120])
def test_the_text_fits(report, width):
    lines = timeline(report, width).splitlines()
    rule = [line for line in lines if line.strip("- ") and line.strip("- ") in LOST]
    assert " ".join(line.strip("- ") for line in rule) == LOST
    assert rule[0] == f"     {f' {LOST} ':-^{width - 5}}" or width == 60
    wide = (width - 5) // 3 - 2
    assert lines[0].index("S") == 5 + wide + 2
    assert lines[0].index("what") == 5 + 2 * (wide + 2)
    rows = [line for line in lines[1 : lines.index("")] if line not in rule]
    assert all(len(line) <= 5 + 3 * wide + 4 for line in rows)
    assert max(map(len, rule)) <= width


@pytest.mark.parametrize("width", [20, 40, 46])
def test_what_is_too_narrow_for_columns_has_a_line_for_each_step(report, width):
    lines = timeline(report, width).splitlines()
    assert max(map(len, lines)) <= width
    said = " ".join(line.strip("- ") for line in lines if line)
    for at, step in enumerate(report.steps):
        assert f"{at + 1}  {step.actor}: {step.text}" in said
        assert all(each in said for each in step.changed)
    assert f"{LOST} {report.lost_at + 2}  " in said
    assert said.endswith(report.wrong)


def test_the_text_is_80_columns_wide_by_default(report):
    assert timeline(report) == timeline(report, 80)
    assert timeline(report) != timeline(report, 81)
