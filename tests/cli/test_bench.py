"""The bench: its table, its JSON, and its compiler. What it finds is no matter of a test."""

import json
from pathlib import Path

import pytest

from hwdbm.bench import Row, Setup
from hwdbm.bench import run as run_all
from hwdbm.cli import bench

SMALL = ["--memory", "2M", "--repeat", "1"]


def test_json_is_in_ms_and_bytes(run) -> None:
    result = run("bench", "enable", "unmapped", *SMALL, "--json")
    assert (result.status, result.err) == (0, "")
    enable, unmapped = json.loads(result.out)
    assert set(enable) == {"what", "time", "floor", "floor-time", "ratio", "limit", "met"}
    assert set(unmapped) == {"what", "bytes", "floor", "floor-bytes", "ratio", "limit", "met"}
    assert enable["ratio"] == pytest.approx(enable["time"] / enable["floor-time"])
    assert 1e-4 < enable["time"] < 1e4
    assert 1 << 26 < unmapped["bytes"] < unmapped["floor-bytes"] == 400 << 20


@pytest.mark.parametrize(
    ("memory", "pages", "why"),
    [
        ("2M", 512, ""), ("6M", 1536, ""), ("4096T", 1 << 40, ""), ("0", 0, "--memory is a multiple of 2M, not 0"),
        ("1M", 0, "--memory is a multiple of 2M, not 1048576"), ("3M", 0, "--memory is a multiple of 2M, not 3145728"),
        ("2049K", 0, "--memory is a multiple of 2M, not 2098176"),
        (str((1 << 52) + (2 << 20)), 0, f"4096T at most, what 52 bits of address have, not {(1 << 52) + (2 << 20)}"),
    ],
)  # fmt: skip
def test_memory_is_of_whole_blocks(run, memory: str, pages: int, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(bench, "run", lambda setup, names: asked.append((setup, names)) or [])
    result = run("bench", "enable", "--memory", memory, "--repeat", "7", "--json")
    assert asked == ([] if why else [(Setup(pages, 7), ["enable"])])
    assert result.status == (2 if why else 0)
    assert why in " ".join(result.err.split())


@pytest.mark.slow
def test_the_whole_table_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """On 80 columns with figures as of large memory; on fewer it is a line for each cell."""
    measured = list(run_all(Setup(3 * 512, 1)))  # of such a size no level's array is like another's
    rows = [Row(row.what, 12.3456, row.floor, 0.6, 1.25, row.unit) if row.unit == "s" else row for row in measured]
    for columns in (80, 40):
        monkeypatch.setenv("COLUMNS", str(columns))
        lines = bench._table(rows).splitlines()
        assert max(map(len, lines)) <= columns
        assert (len(lines) == 1 + len(rows)) == (columns == 80)
        assert all(line == line.rstrip() for line in lines)


@pytest.mark.parametrize("compiler", ["#!/bin/sh\nexit 1\n", None])
def test_without_a_compiler_that_works(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler) -> None:
    if compiler is not None:
        (tmp_path / "cc").write_text(compiler)
        (tmp_path / "cc").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    result = run("bench", "harvest", *SMALL)
    assert (result.status, result.err) == (0, "")
    assert "vector" in result.out
    assert "C loop" not in result.out
