"""A counterexample's two pictures: the text fits its width, and the diagram is laid out as one that was looked at."""

import pytest
from seen import as_seen

from hwdbm.races import MISTAKES, Finding, Step, check, diagram, timeline


@pytest.fixture(scope="module")
def report():
    return check(MISTAKES["device-marks-first"].make(True))


def test_the_diagram_is_the_one_that_was_looked_at(report):
    as_seen("device-marks-first.svg", diagram(report) + "\n")


def test_what_fills_its_lines_is_laid_out_as_it_was_looked_at():
    """Texts without spaces are cut at the last column; 61 is the least width that has room for four columns."""
    steps = (
        Step("S", "m" * 70, ("x 1",)),
        Step("T", "f" * 28, ("y 0x" + "1" * 60, "z 2")),
        Step("a third", "", ()),
        Step("S", "a few words", ("l" * 27,)),
    )
    for lost_at in (1, 3, None):
        report = Finding("full & wide", 9, proved=False, wrong="w" * 300, steps=steps, lost_at=lost_at)
        texts = [f"{width}:\n{timeline(report, width)}" for width in (60, 61, 62, 80)]
        as_seen(f"races/full-{lost_at}.txt", "\n".join([*texts, diagram(report, "A <title>")]) + "\n")


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
