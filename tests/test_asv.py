"""The asv benchmarks, as far as that is quick: `make asv` runs each."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "asv_bench"


@pytest.mark.slow
def test_asv_finds_the_benchmarks_and_nothing_else() -> None:
    """Whatever class is imported there, and has a method named as theirs are, would be taken for one."""
    command = [sys.executable, "-P", "-m", "asv", "check", "--python=same"]
    environment = os.environ | {"PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        command, check=False, cwd=BENCHMARKS, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No problems found" in done.stdout


class Counted:
    """Results as asv has them, of one benchmark with one parameter."""

    def __init__(self, name: str, *values: float | None) -> None:
        self.name, self.values = name, values

    def get_all_result_keys(self) -> list[str]:
        return [self.name]

    def get_result_params(self, name: str) -> list[list[str]]:
        return [[str(number) for number in range(len(self.values))]]

    def get_result_value(self, name: str, params: list[list[str]]) -> tuple[float | None, ...]:
        return self.values


def test_a_count_that_rose_is_told_and_a_time_is_not() -> None:
    spec = importlib.util.spec_from_file_location("history", BENCHMARKS / "history.py")
    assert spec is not None
    assert spec.loader is not None
    history = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(history)
    flushes = "log.Get.track_flushes"
    before, after = Counted(flushes, 1, 2, None, 4), Counted(flushes, 1, 3, 5, 3)
    assert list(history.worse(before, after, {flushes: "flushes"})) == [(f"{flushes}(1)", 2, 3)]
    assert not list(history.worse(before, after, {flushes: "times the floor"}))
    assert all(len(commit) == 40 for commit, _ in history.landmarks())
