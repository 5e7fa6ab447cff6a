"""A counterexample's two pictures: the text fits its width, and the diagram is laid out as one that was looked at."""

import pytest
from seen import as_seen

from hwdbm.races import MISTAKES, check, diagram, timeline


@pytest.fixture(scope="module")
def report():
    return check(MISTAKES["device-marks-first"].make(True))


def test_the_diagram_is_the_one_that_was_looked_at(report):
    as_seen("device-marks-first.svg", diagram(report) + "\n")


@pytest.mark.parametrize("width", [40, 60, 79, 80, 81, 120])
def test_the_text_fits(report, width):
    lines = timeline(report, width).splitlines()
    (rule,) = [line for line in lines if "page is lost here" in line]
    assert len(rule) == max(width, 5 + len(rule.strip(" -")) + 2)
    wide = max(12, (width - 5) // 3 - 2)
    assert lines[0].index("S") == 5 + wide + 2
    assert lines[0].index("what") == 5 + 2 * (wide + 2)
    rows = [line for line in lines[1 : lines.index("")] if line != rule]
    assert all(len(line) <= 5 + 3 * wide + 4 for line in rows)


def test_the_text_is_80_columns_wide_by_default(report):
    assert timeline(report) == timeline(report, 80)
    assert timeline(report) != timeline(report, 81)
