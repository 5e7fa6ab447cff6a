"""The picture of a forecast shows those at its bandwidths, where and in the units that it says."""

from types import SimpleNamespace

import figures
import pytest
from seen import as_seen

from hwdbm.forecast import Estimate, Forecast, Needs, picture

WRITES = SimpleNamespace()


def forecast(bandwidth: float, limit: float) -> Forecast:
    pause, total = 1e7 / bandwidth, 1e9 / bandwidth
    return Forecast(
        pause <= limit, None, Estimate(3, 2, 4), Estimate(total, total / 2, total * 3), Estimate(pause, 0, pause * 2),
        Estimate(1e9, 1e9, 2e9), Needs(), "",
    )  # fmt: skip


@pytest.mark.parametrize(("name", "bandwidth"), [("some", 5e7), ("all", 1e9), ("none", 2.0)])
def test_a_picture_shows_what_the_one_that_was_looked_at_shows(name, bandwidth, monkeypatch, tmp_path):
    def replay(writes, *, bandwidth, max_downtime, **how):
        assert writes is WRITES
        assert how == {"needs": False, "starts": 3, "timeout": 60.0}
        return forecast(bandwidth, max_downtime)

    monkeypatch.setattr(picture, "replay", replay)
    found = figures.drawn(monkeypatch)
    at = forecast(bandwidth, 0.25)
    picture.draw(tmp_path / "a.png", WRITES, bandwidth=bandwidth, found=at, max_downtime=0.25, timeout=60.0)
    as_seen(f"pictures/forecast-{name}.txt", *found)
