"""What all tests share: the implementations of the kernels, and how Hypothesis runs."""

import gc
import os
import signal
from collections import Counter
from collections.abc import Iterator
from types import ModuleType

import hypothesis
import onewriter
import pytest

import hwdbm

# A first call compiles, so no single example has a deadline. `kernels` stays the same for all examples of a test.
hypothesis.settings.register_profile(
    "dev", deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
hypothesis.settings.register_profile(
    "ci", hypothesis.settings.get_profile("dev"), derandomize=True, print_blob=True, database=None
)
# Where CI is set pytest works out whole differences, and in mutants asserts are expected to fail, thousands of times:
# minutes of difflib. So it goes once it has served; pytest's workers read the other name.
if os.environ.pop("CI", None):
    os.environ["HYPOTHESIS_PROFILE"] = "ci"
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))

# A shell gives what it starts in the background, and nohup whatever it starts, these to be ignored; so would all
# commands that tests start and interrupt.
for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, default)


@pytest.fixture(autouse=True, scope="session")
def one_writer() -> Iterator[onewriter.Level]:
    """Hold that nobody but `Leaves` writes descriptors, in everything that the tests do."""
    gc.freeze()  # what the tests' imports made stays: each of the collections that tests ask for looked at all of it
    with onewriter.enforced() as found:
        yield found


@pytest.fixture(scope="module")
def few_objects() -> None:
    """Leave out of a module's many collections all that there is before it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _own_garbage(request: pytest.FixtureRequest) -> Iterator[None]:
    """Collect what a test that may leave leases open left, while its warnings are ignored: not in another test."""
    yield
    ignored = [text for mark in request.node.iter_markers("filterwarnings") for text in mark.args]
    if (
        any("ResourceWarning" in text for text in ignored) and request.node.path.name != "test_doors.py"
    ):  # it does itself
        gc.collect()


GOLDEN = 0.618034
"""Its multiples lie evenly in the unit interval, and fall into no step with the parameters that points are made of."""


@pytest.hookimpl(tryfirst=True)  # before those that are slow are left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the points of a test that are alike slow, but for one of so many: the first, and others of any kind."""
    points = Counter[str]()
    for item in items:
        if (mark := item.get_closest_marker("alike")) and not item.get_closest_marker("slow"):
            test = item.nodeid.partition("[")[0]
            if points[test] * GOLDEN % 1 >= 1 / mark.args[0]:
                item.add_marker("slow")
            points[test] += 1


SHARED_TOO = {
    "test_anywhere",
    "test_contiguous",
    "test_kernels",
    "test_runs",
    "test_stage2",
    "test_stage2_at",
    "test_stage2_parts",
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "kernels" in metafunc.fixturenames:
        names = [
            *hwdbm.kernels.available(),
            *(["atomic"] if metafunc.module.__name__.rpartition(".")[2] in SHARED_TOO else []),
        ]
        metafunc.parametrize("kernels", names, indirect=True)


@pytest.fixture
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Run the test once with each implementation in use; the one that was in use comes back after it.

    Where nobody else writes, the kernels for shared arrays do what the others do: so here private ones have them too.
    """
    monkeypatch.setattr(hwdbm.kernels, "_active", [])
    if request.param == "atomic":
        hwdbm.kernels._active.append(hwdbm.kernels.shared())
    else:
        hwdbm.kernels.use(request.param)
    return hwdbm.kernels.active()
