"""A pytest plugin for run.py: the seconds that each test took, -1 where it failed, in the file HWDBM_MUTANTS_TIMES."""

import json
import os
from collections import defaultdict
from pathlib import Path

import pytest

_seconds: defaultdict[str, float] = defaultdict(float)
_failed: set[str] = set()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _seconds[report.nodeid] += report.duration
    if report.failed:
        _failed.add(report.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not hasattr(session.config, "workerinput"):  # pytest-xdist's workers report to the one that started them
        times = {test: -1.0 if test in _failed else seconds for test, seconds in _seconds.items()}
        Path(os.environ["HWDBM_MUTANTS_TIMES"]).write_text(json.dumps(times))
