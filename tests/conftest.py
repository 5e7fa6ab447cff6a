"""What all tests share: the implementations of the kernels, and how Hypothesis runs."""

import os
import signal
from types import ModuleType

import hypothesis
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


@pytest.fixture(params=hwdbm.kernels.available())
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Run the test once with each implementation in use; the one that was in use comes back after it."""
    monkeypatch.setattr(hwdbm.kernels, "_active", [])
    hwdbm.kernels.use(request.param)
    return hwdbm.kernels.active()
