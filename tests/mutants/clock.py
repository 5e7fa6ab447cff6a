"""A pytest plugin for run.py: the seconds that each test took, -1 where it failed, in the file HWDBM_MUTANTS_TIMES.

Hypothesis's tests try a few examples only, which reach nearly all lines, and their seconds are scaled to all of them.
"""

import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.stateful
import pytest

FEW = 5

_seconds: defaultdict[str, float] = defaultdict(float)
_failed: set[str] = set()
_now: list[pytest.Item] = []
_run_machine = hypothesis.stateful.run_state_machine_as_test


def _run_few(machine: Any, *, settings: Any = None, **how: Any) -> None:
    settings = settings or machine.TestCase.settings
    _now[-1].user_properties.append(("scale", max(settings.max_examples / FEW, 1.0)))
    few = hypothesis.settings(settings, max_examples=min(FEW, settings.max_examples))
    _run_machine(machine, settings=few, **how)


# Who collects doctests imports this once more, by a longer name: that one is told of no test.
if "HWDBM_MUTANTS_TIMES" in os.environ and __name__ == "clock":
    hypothesis.stateful.run_state_machine_as_test = _run_few  # before any test imports it


def pytest_runtest_setup(item: pytest.Item) -> None:
    _now[:] = [item]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    examples: dict[object, int] = {}  # of each function: the parameters of one share it
    for item in items:
        function = getattr(item, "obj", None)
        function = getattr(function, "__func__", function)
        if getattr(function, "is_hypothesis_test", False):
            settings = function._hypothesis_internal_use_settings or hypothesis.settings.default
            many = examples.setdefault(function, settings.max_examples)
            function._hypothesis_internal_use_settings = hypothesis.settings(settings, max_examples=min(FEW, many))
            item.user_properties.append(("scale", max(many / FEW, 1.0)))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _seconds[report.nodeid] += report.duration * dict(report.user_properties).get("scale", 1.0)
    if report.failed:
        _failed.add(report.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not hasattr(session.config, "workerinput"):  # pytest-xdist's workers report to the one that started them
        times = {test: -1.0 if test in _failed else seconds for test, seconds in _seconds.items()}
        Path(os.environ["HWDBM_MUTANTS_TIMES"]).write_text(json.dumps(times))
