"""Running the command in this process."""

import pytest
from clitools import run

from hwdbm.forecast import sweep

__all__ = ["few_forecasts", "run"]


@pytest.fixture
def few_forecasts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have reports look at 9 places in place of 119."""
    monkeypatch.setattr(sweep, "_EACH_WAY", 1)
    monkeypatch.setattr(sweep, "_LIMITS", 1)
