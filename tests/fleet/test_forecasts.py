"""Forecasts of a fleet's VMs: where in its trace a migration begins, and how fast the guest writes."""

from pathlib import Path

import numpy as np
import pytest

from hwdbm.errors import PlanError
from hwdbm.fleet import FleetVm
from hwdbm.fleet.forecasts import Forecasts
from hwdbm.memslot import Memslot

PAGES = 4096
SIZE = PAGES * 4096


def written(path: Path, step: float) -> Path:
    """Write a trace of 8 intervals of `step` seconds, in the latter half of which all of memory is written."""
    trace = pytest.importorskip("hwdbm.trace")
    with trace.Writer(path, [Memslot(0, 0, 0, PAGES, 0)], 4096) as writer:
        for at in range(8):
            words = np.full(PAGES // 64, ~np.uint64(0) if at >= 4 else np.uint64(0))
            writer.append(round((at + 1) * step * 1e9), words)
    return path


def guest(trace: Path, **more) -> FleetVm:
    return FleetVm("vm", "h0", SIZE, 0.3, trace=trace, **more)


@pytest.mark.parametrize("engine", ["qemu", "hwdbm"])
@pytest.mark.parametrize("rate", [0.25, 1.0, 3.0, 4.0])
@pytest.mark.parametrize("start", [0.0, 0.5, 4.0, 4.5, 7.9])
def test_a_start_is_a_time_of_the_trace(tmp_path: Path, engine, rate: float, start: float) -> None:
    """A rate is as good as a trace that was made so much faster, of which the same moment comes earlier."""
    slow, quick = written(tmp_path / "slow", 1.0), written(tmp_path / "quick", 1.0 / rate)
    model = Forecasts(engine)
    for bandwidth in (SIZE / 2, SIZE * 2, SIZE * 20):
        found = model(guest(slow, rate=rate, start=start))(bandwidth)
        same = model(guest(quick, start=start / rate))(bandwidth)
        assert found.converges == same.converges
        assert (found.total, found.downtime) == pytest.approx((same.total, same.downtime), rel=1e-6)


def test_a_start_in_the_busy_half_takes_longer(tmp_path: Path) -> None:
    trace, model = written(tmp_path / "trace", 1.0), Forecasts("qemu")
    for rate in (0.5, 2.0):
        idle, busy = (model(guest(trace, rate=rate, start=start))(SIZE * 2) for start in (0.0, 4.5))
        assert idle.total < busy.total


@pytest.mark.parametrize("rate", [0.25, 1.0, 4.0])
@pytest.mark.parametrize("start", [8.0, 9.0, 1e9, 2.0**53])
def test_a_start_beyond_the_trace_is_refused(tmp_path: Path, rate: float, start: float) -> None:
    trace = written(tmp_path / "trace", 1.0)
    with pytest.raises(PlanError, match=r"'vm' starts after .* ms, and its trace .* ends at 8000 ms"):
        Forecasts()(guest(trace, rate=rate, start=start))
