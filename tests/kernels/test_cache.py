"""What importing the package doesn't do, and what compiled code leaves on disk: each in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import hwdbm

SOURCE = Path(hwdbm.__file__).parents[1]

IMPORT = """
import os, sys, threading
import bitarray, numpy  # numpy's own libraries may start threads

class Unread(dict):
    def __getattribute__(self, name):
        raise AssertionError(f"the environment was read: {name}")

    __getitem__ = __contains__ = __iter__ = __getattribute__

threads = os.listdir("/proc/self/task")
os.environ = Unread()
import hwdbm
assert os.listdir("/proc/self/task") == threads and threading.active_count() == 1, "a thread was started"
print(sorted({name.partition(".")[0] for name in sys.modules} & {"llvmlite", "numba", "numexpr"}))
"""

COMPILE = """
import numpy as np
from hwdbm import pte
from hwdbm.kernels import fused

pages, words, runs = np.zeros(65, np.uint64), np.zeros(2, np.uint64), np.array([[0, 65]])
fused.scan(pages, runs, pte.dirty(3), words)
fused.rewrite(pages, runs, pte.clean(3), words, words)
fused.rewrite_within(pages, runs, pte.clean(3), words, words, words)
fused.rewrite_runs(pages, pte.clean(3))
fused.fill(words, runs)
for name in ("_scan", "_rewrite", "_rewrite_within", "_rewrite_runs", "_fill"):
    stats = getattr(fused, name).stats
    print(name, sum(stats.cache_hits.values()), sum(stats.cache_misses.values()))
"""
NAMES = ("_scan", "_rewrite", "_rewrite_within", "_rewrite_runs", "_fill")


def run(program: str, **environment: str) -> list[str]:
    """Run a program with warnings as errors, and return the lines that it printed."""
    done = subprocess.run(
        [sys.executable, "-P", "-W", "error", "-c", program],
        env=os.environ | {"PYTHONPATH": str(SOURCE)} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_importing_starts_nothing() -> None:
    assert run(IMPORT) == ["[]"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("os.getenv('OMP_NUM_THREADS'); import hwdbm", "the environment was read: get"),
        ("import hwdbm; threading.Thread(target=threading.Event().wait, daemon=True).start()", "a thread was started"),
        ("import hwdbm; sys.modules['numba.core'] = None", "numba"),
    ],
)
def test_check_of_imports_catches(change: str, text: str) -> None:
    with pytest.raises(AssertionError, match=text):
        assert run(IMPORT.replace("import hwdbm", change)) == ["[]"]


def test_compiled_code_is_cached(tmp_path: Path) -> None:
    first = run(COMPILE, NUMBA_CACHE_DIR=str(tmp_path))
    assert first == [f"{name} 0 1" for name in NAMES]
    indices = {path.name.split("-")[0] for path in tmp_path.rglob("*.nbi")}
    assert {f"fused.{name}" for name in NAMES} <= indices
    assert len(list(tmp_path.rglob("*.nbc"))) >= len(NAMES)
    second = run(COMPILE, NUMBA_CACHE_DIR=str(tmp_path))
    assert second == [f"{name} 1 0" for name in NAMES]
