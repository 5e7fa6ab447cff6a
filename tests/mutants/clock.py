"""A pytest plugin for run.py: how long each test took, in a JSON file that HWDBM_MUTANTS_TIMES names."""

import json
import os
from collections import defaultdict
from pathlib import Path

import pytest

_seconds: defaultdict[str, float] = defaultdict(float)
_failed: set[str] = set()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _seconds[report.nodeid] += report.duration
    if not report.passed:
        _failed.add(report.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not hasattr(session.config, "workerinput"):  # pytest-xdist's workers report to the one that started them
        good = {test: seconds for test, seconds in _seconds.items() if test not in _failed}
        Path(os.environ["HWDBM_MUTANTS_TIMES"]).write_text(json.dumps(good))
