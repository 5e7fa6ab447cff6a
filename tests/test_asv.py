"""The asv benchmarks, as far as that is quick: `make asv` runs each."""

import os
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "asv_bench"


def test_asv_finds_the_benchmarks_and_nothing_else() -> None:
    """Whatever class is imported there, and has a method named as theirs are, would be taken for one."""
    command = [sys.executable, "-P", "-m", "asv", "check", "--python=same"]
    environment = os.environ | {"PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        command, check=False, cwd=BENCHMARKS, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No problems found" in done.stdout
