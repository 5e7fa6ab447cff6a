"""How many columns there are, and where a line ends that is too long for them."""

import fcntl
import os
import struct
import sys
import termios
from io import StringIO
from itertools import pairwise

import pytest

from hwdbm.cli import inspect, migrate, plan, streams
from hwdbm.forecast import Estimate, Forecast, Needs
from hwdbm.migration import Report

# Words of one letter, after one of two: lines of odd lengths, and one of an even length, so that a column shows.
WORDS = f"ab {'x ' * 200}".strip()


def fills(lines: list[str], columns: int, indent: int = 0) -> None:
    """Check that lines of WORDS are as long as `columns` allow, but for the last one, and no longer."""
    assert [len(line) for line in lines[:-1]] == [
        columns - (columns - (0 if at else 1) - (indent if at else 0) + 1) % 2 for at in range(len(lines) - 1)
    ]
    assert " ".join(map(str.strip, lines)) == WORDS


@pytest.mark.parametrize(
    ("said", "columns"), [("19", 20), ("20", 20), ("21", 21), ("80", 80), ("1000", 1000), ("x", 80), (None, 80)]
)
def test_the_columns_that_are_said(said: str | None, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """There are 20 or more, and where nothing says how many, and nothing is a terminal, 80."""
    monkeypatch.delenv("COLUMNS", raising=False)
    if said is not None:
        monkeypatch.setenv("COLUMNS", said)

    def none(_: int) -> os.terminal_size:
        raise OSError(25, "Inappropriate ioctl for device")

    monkeypatch.setattr(os, "get_terminal_size", none)
    assert streams.width() == streams.width(2) == columns


@pytest.mark.parametrize(("there", "columns"), [(0, 80), (1, 20), (19, 20), (20, 20), (21, 21), (79, 79), (80, 80)])
def test_the_columns_of_a_terminal(there: int, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may not know how many it has."""
    monkeypatch.delenv("COLUMNS", raising=False)
    ours, theirs = os.openpty()
    try:
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("<4H", 24, there, 0, 0))
        assert streams.width(theirs) == columns
    finally:
        os.close(ours)
        os.close(theirs)


def test_each_stream_has_columns_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A result is as wide as stdout, and a message as stderr."""
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(os, "get_terminal_size", lambda which: os.terminal_size(({1: 40, 2: 60}[which], 24)))
    monkeypatch.setattr(sys, "stdout", StringIO())
    monkeypatch.setattr(sys, "stderr", StringIO())
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    streams.result(WORDS)
    streams.error_line(WORDS)
    fills(sys.stdout.getvalue().splitlines(), 40, 2)
    fills(sys.stderr.getvalue().splitlines(), 60, 2)


@pytest.mark.parametrize(
    ("said", "kept"),
    [("1", True), ("80", True), ("9999", True), ("0", False), ("00000", False), ("10000", False), ("100000", False)],
)
def test_columns_that_libraries_may_believe(said: str, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COLUMNS", "LINES"):
        monkeypatch.setenv(name, said)
    # What else it sets is of the whole process.
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setattr("threading.excepthook", None)
    monkeypatch.setattr("logging.lastResort", None)
    monkeypatch.setattr("warnings.showwarning", None)
    streams.tame()
    assert [os.environ.get(name) for name in ("COLUMNS", "LINES")] == ([said] * 2 if kept else [None] * 2)


def test_what_a_library_warns_of_is_its_first_line(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    for name in ("threading.excepthook", "logging.lastResort", "warnings.showwarning"):
        monkeypatch.setattr(name, None)
    streams.tame()
    import warnings

    warnings.showwarning("\nfirst\nsecond\nthird", UserWarning, "a.py", 1)
    assert capsys.readouterr().err == "hwdbm: warning: first\n"


@pytest.mark.parametrize("columns", [20, 39, 40, 79, 80])
def test_a_line_is_as_long_as_it_may_be(columns: int) -> None:
    for indent in (0, 3):
        fills(streams.wrapped(WORDS, indent, columns), columns, indent)
    for size in (columns - 1, columns):
        assert streams.wrapped("y " + "x" * (size - 2), 4, columns) == ["y " + "x" * (size - 2)]
    spaced = "a   b".ljust(columns)
    assert streams.wrapped(spaced, 4, columns) == [spaced]
    # The indent is 2 where a word doesn't fit after more.
    for size, indent in ((columns - 4, 4), (columns - 3, 2), (columns, 2)):
        lines = streams.wrapped(f"first {'x' * size}", 4, columns)
        assert lines == ["first", f"{' ' * indent}{'x' * size}"]


@pytest.mark.parametrize("columns", [40, 41, 80, 81, 100, 101, 102, 140])
def test_a_reason_is_wrapped_a_column_before_the_edge(columns: int, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """But at 100 columns on a wider screen."""
    monkeypatch.setenv("COLUMNS", str(columns))
    one = Estimate(1, 1, 1)
    plan._say(Forecast(False, None, one, one, one, one, Needs(4e7, 0.2), WORDS), [], as_json=False)
    fills(capsys.readouterr().out.partition("\n\n")[2].splitlines(), min(columns - 1, 100))


@pytest.mark.parametrize("columns", range(20, 90))
def test_what_a_migration_says_fits_a_column_before_the_edge(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    done = Report(
        4096, 1 << 29, 0.3, status="completed", total_time=12.5, downtime=0.0215, verify_time=0.0625, converged=False,
        source_sha256="ab" * 32, destination_sha256="ab" * 32,
    )  # fmt: skip
    *told, name, digest = migrate._text(done).split("\nsha256")[0].splitlines() + [""] * 2
    assert (name, digest) == ("", "")
    for line, after in pairwise(told):
        assert len(line) <= columns - 1
        assert after.startswith("the guest was paused") or len(line) + 1 + len(after.split()[0]) > columns - 1
    lines = migrate._digest("sha256", "ab" * 32, columns)
    if columns > 6 + 1 + 64:
        assert lines == [f"sha256 {'ab' * 32}"]
    else:  # in parts of 16, as many as fit, but for a screen that has no room for one
        assert "".join(map(str.strip, lines)) == f"sha256{'ab' * 32}"
        assert all(line.startswith("  ") for line in lines[1:])
        assert len(lines[1]) == 2 + max(size for size in (16, 32, 48, 64) if size == 16 or 2 + size < columns)


@pytest.mark.parametrize(("columns", "indent"), [(59, 2), (60, 17), (61, 17)])
def test_fields_of_registers_stand_below_the_value_where_there_is_room(columns, indent, run, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = run(*["inspect", "example:4k_ipa40"]).out.splitlines()
    fields = [line for line in lines if "=" in line]
    assert {len(line) - len(line.lstrip()) for line in fields} == {indent}
    assert any(line.startswith("VTCR_EL2         0x") for line in lines)


@pytest.mark.parametrize("bits", range(6))
def test_fields_of_registers_are_their_bits(bits: int) -> None:
    """VM is bit 0 of HCR_EL2, and PARange the lowest four bits of ID_AA64MMFR0_EL1."""
    from dataclasses import replace
    from types import SimpleNamespace
    from typing import Any

    from hwdbm.cli.example import find
    from hwdbm.image import open_image

    image = open_image(find("example:4k_ipa40"))
    one = 1 << bits
    registers = replace(image.registers, hcr=one, mmfr0=one)
    shown: Any = SimpleNamespace(registers=registers, vtcr=image.vtcr, vttbr=image.vttbr)
    found = inspect._registers(shown)
    assert found["HCR_EL2"]["VM"] == (bits == 0)
    assert found["ID_AA64MMFR0_EL1"]["PARange"] == (one if bits < 4 else 0)
