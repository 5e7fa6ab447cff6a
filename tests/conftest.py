"""What all tests share: the implementations of the kernels, and how Hypothesis runs."""

import os
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


@pytest.fixture(params=hwdbm.kernels.available())
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Run the test once with each implementation in use; the one that was in use comes back after it."""
    monkeypatch.setattr(hwdbm.kernels, "_active", [])
    hwdbm.kernels.use(request.param)
    return hwdbm.kernels.active()
