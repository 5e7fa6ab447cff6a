"""Forecasts of a fleet's VMs: where in its trace a migration begins, and how fast the guest writes."""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from hwdbm.errors import PlanError
from hwdbm.fleet import FleetVm
from hwdbm.fleet.forecasts import Forecasts
from hwdbm.forecast import OWN
from hwdbm.forecast.model import fit, measured
from hwdbm.forecast.samples import read_sample_file
from hwdbm.memslot import Memslot

PAGES = 4096
SIZE = PAGES * 4096


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[float], Path]:
    """Return what writes a trace of 8 intervals of some seconds: in the latter half all of memory is written."""
    trace = pytest.importorskip("hwdbm.trace")

    @cache
    def write(step: float) -> Path:
        path = tmp_path_factory.mktemp("traces") / "trace"
        with trace.Writer(path, [Memslot(0, 0, 0, PAGES, 0)], 4096) as writer:
            for at in range(8):
                words = np.full(PAGES // 64, ~np.uint64(0) if at >= 4 else np.uint64(0))
                writer.append(round((at + 1) * step * 1e9), words)
        return path

    return write


def guest(trace: Path, **more) -> FleetVm:
    return FleetVm("vm", "h0", SIZE, 0.3, trace=trace, **more)


@pytest.mark.parametrize("engine", ["qemu", "hwdbm"])
@pytest.mark.parametrize("rate", [0.25, 1.0, 3.0, 4.0])
@pytest.mark.parametrize("start", [0.0, 0.5, 4.0, 4.5, 7.9])
@pytest.mark.alike(2)
def test_a_start_is_a_time_of_the_trace(written, engine, rate: float, start: float) -> None:
    """A rate is as good as a trace that was made so much faster, of which the same moment comes earlier."""
    slow, quick = written(1.0), written(1.0 / rate)
    model = Forecasts(engine)
    for bandwidth in (SIZE / 2, SIZE * 2, SIZE * 20):
        found = model(guest(slow, rate=rate, start=start))(bandwidth)
        same = model(guest(quick, start=start / rate))(bandwidth)
        assert found.converges == same.converges
        assert (found.total, found.downtime) == pytest.approx((same.total, same.downtime), rel=1e-6)


def test_a_start_in_the_busy_half_takes_longer(written) -> None:
    trace, model = written(1.0), Forecasts("qemu")
    for rate in (0.5, 2.0):
        idle, busy = (model(guest(trace, rate=rate, start=start))(SIZE * 2) for start in (0.0, 4.5))
        assert idle.total < busy.total


@pytest.mark.parametrize("rate", [0.25, 1.0, 4.0])
@pytest.mark.parametrize("start", [8.0, 9.0, 1e9, 2.0**53])
def test_a_start_beyond_the_trace_is_refused(written, rate: float, start: float) -> None:
    trace = written(1.0)
    with pytest.raises(PlanError, match=r"'vm' starts after .* ms, and its trace .* ends at 8000 ms"):
        Forecasts()(guest(trace, rate=rate, start=start))


@pytest.mark.parametrize("rate", [1e-6, 1e12])
def test_a_rate_at_which_a_trace_has_no_times_is_refused(written, rate: float) -> None:
    """The slowest of a trace of two months, whose times no int64 has; and the quickest."""
    trace = written(1e6 if rate < 1 else 1.0)
    with pytest.raises(PlanError, match=re.escape(f"'vm' writes at a rate of {rate:g}, at which its trace ")):
        Forecasts()(guest(trace, rate=rate))


def test_more_memory_than_its_trace_is_all_right_and_less_is_refused(written) -> None:
    """More is sent once, and never written."""
    trace, model = written(1.0), Forecasts("hwdbm")
    one, more = (model(replace(guest(trace, start=0.0), memory=memory))(1e9) for memory in (SIZE, SIZE + 10**9))
    assert more.total - one.total == pytest.approx(1 + OWN.verify(10**9) + OWN.prepare(10**9) - OWN.setup, rel=0.01)
    assert more.downtime == pytest.approx(one.downtime, abs=0.01)
    with pytest.raises(PlanError, match=f"has {SIZE - 1} bytes of memory, and its trace .* is of {SIZE}"):
        model(replace(guest(trace), memory=SIZE - 1))


@pytest.mark.parametrize("engine", ["qemu", "hwdbm"])
def test_without_a_start_the_worst_of_three_moments_counts(written, engine) -> None:
    """At a rate of 2 they lie at 0, 8/3 and 16/3 s of the trace, of which the last is busy."""
    trace, model = written(1.0), Forecasts(engine)
    for bandwidth in (SIZE * 2, SIZE * 20):
        each = [model(guest(trace, rate=2.0, start=start))(bandwidth) for start in (0.0, 8 / 3, 16 / 3)]
        found = model(guest(trace, rate=2.0))(bandwidth)
        assert found.converges == all(one.converges for one in each)
        assert found.total == pytest.approx(max(one.total for one in each), rel=1e-9)
        assert found.downtime == pytest.approx(max(one.downtime for one in each), rel=1e-9)


@pytest.mark.parametrize(("engine", "costs"), [("qemu", 0.003 + 0.01), ("hwdbm", 0.001 + 0.001 + 0.003)])
def test_an_engine_s_limit_leaves_time_for_the_rest_of_the_pause(engine, costs: float) -> None:
    """It has to stand still, to harvest 4 GiB once more, 2 ms a GiB, and to hand over."""
    vm = FleetVm("vm", "h0", 4 << 30, 0.3, trace=Path("t"))
    assert Forecasts(engine).limit(vm) == pytest.approx(0.3 - costs - 0.008)
    assert Forecasts(engine).limit(replace(vm, max_downtime=costs + 0.0085)) == pytest.approx(0.0005)
    assert Forecasts(engine).limit(replace(vm, max_downtime=costs)) == 0.0


def test_a_vm_without_a_trace_or_samples_is_refused() -> None:
    with pytest.raises(PlanError, match=r"^the VM 'vm' has neither a trace nor samples$"):
        Forecasts()(FleetVm("vm", "h0", SIZE, 0.3))


def test_samples_are_fitted_to_all_of_the_memory(tmp_path: Path) -> None:
    """Of three passes that leave less and less, in pages of 512 bytes."""
    lines = [
        f'{{"total-time": {at * 1000}, "ram": {{"remaining": {left}, "dirty-sync-count": {at}, "page-size": 512, '
        f'"mbps": 80}}}}'
        for at, left in ((1, SIZE), (3, SIZE // 4), (4, SIZE // 9))
    ]
    (tmp_path / "samples").write_text("\n".join(lines))
    curve = Forecasts("hwdbm")(FleetVm("vm", "h0", SIZE, 0.3, samples=tmp_path / "samples"))
    writes, moments = Forecasts("hwdbm")._writes(FleetVm("vm", "h0", SIZE, 0.3, samples=tmp_path / "samples"))
    assert (writes.page_size, writes.npages, moments) == (512, SIZE // 512, [0.0])
    best = fit(*measured(read_sample_file(tmp_path / "samples")), SIZE)[0]
    assert writes.written(0, 2).pages * 512 == pytest.approx(best.dirtied(2)) != 0
    slow, quick = curve(SIZE / 2), curve(SIZE * 9.0)
    assert slow.total > quick.total
    assert quick.converges
