"""The forecasts of a fleet's VMs: a trace replayed, or a model fitted to samples."""

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hwdbm.errors import PlanError
from hwdbm.fleet.curves import Curve, Taken
from hwdbm.fleet.plan import Engine, FleetVm
from hwdbm.forecast import OWN, QEMU, Terms
from hwdbm.forecast.model import ModelWrites, fit, measured
from hwdbm.forecast.samples import read_sample_file
from hwdbm.forecast.simulate import Course, run
from hwdbm.forecast.writes import GuestWrites, TraceWrites, Writes

Words = NDArray[np.uint64]

_MOMENTS = 3  # of a trace at which a migration may begin, where the plan doesn't say when
_FLAT = 5  # passes without progress, after which it is hopeless: a plan that needs a lull is none
_KEPT = 64 << 20  # bytes of a trace that a process keeps; a larger one is read as it is needed


@dataclass(frozen=True, slots=True)
class Forecasts:
    """Called with a VM, returns its forecast.

    Parameters
    ----------
    engine : {"qemu", "hwdbm"}
        Whose passes and costs they are.
    """

    engine: Engine = "qemu"

    def __call__(self, vm: FleetVm) -> Curve:
        """Return what a VM's migration takes as a function of the bandwidth: the worst of some moments.

        Raises
        ------
        PlanError
            If the trace has more memory than the VM, no times at the VM's rate, or ends before the migration starts.
        TraceError, SampleError, OSError
            If the trace or the samples can't be read.
        """
        writes, moments = self._writes(vm)
        on_limit = "wait" if self.engine == "qemu" else "abort"
        course = Course(self._terms, 1.0, self.limit(vm), max_iterations=_FLAT, on_limit=on_limit)

        def curve(bandwidth: float) -> Taken:
            total = downtime = 0.0
            for moment in moments:
                found = run(writes, replace(course, start=moment, bandwidth=bandwidth))
                total, downtime = max(total, found.total_time), max(downtime, found.downtime)
                if not found.converges:
                    return Taken(total, downtime, converges=False)
            return Taken(total, downtime, converges=downtime <= vm.max_downtime)

        return curve

    @property
    def _terms(self) -> Terms:
        return QEMU if self.engine == "qemu" else OWN

    def limit(self, vm: FleetVm) -> float:
        """Return the limit in seconds to be set for a VM's migration: engines count what is to be sent alone.

        The rest of the pause, from the last harvest to the hand-over, has its part of what the plan allows.
        """
        terms = self._terms
        return max(vm.max_downtime - terms.pause - terms.sync(vm.memory) - terms.pass_time - terms.handover, 0.0)

    def _writes(self, vm: FleetVm) -> tuple[GuestWrites, list[float]]:
        """Return what a VM writes, and when its migration begins."""
        if vm.samples is not None:
            samples = read_sample_file(vm.samples)
            model = fit(*measured(samples), vm.memory)[0]
            return ModelWrites(model, vm.memory, samples[-1].page_size), [0.0]
        if vm.trace is None:
            raise PlanError(f"the VM {vm.name!r} has neither a trace nor samples")
        trace = _opened(vm.trace)
        scaled = TraceWrites(_Scaled(trace, vm))
        if vm.start is None:
            return scaled, [i * scaled.ends / _MOMENTS for i in range(_MOMENTS)]
        ends = float(trace.times[-1]) / 1e9
        if vm.start >= ends:
            raise PlanError(
                f"the VM {vm.name!r} starts after {vm.start * 1e3:g} ms, and its trace {vm.trace} ends at "
                f"{ends * 1e3:g} ms"
            )
        return scaled, [vm.start / vm.rate]


class _Scaled:
    """A trace whose guest writes at another rate, and has more memory, which it never writes."""

    def __init__(self, trace: Writes, vm: FleetVm) -> None:
        self._trace, self.page_size = trace, trace.page_size
        self.npages, self.initial_zeros = vm.memory // trace.page_size, trace.initial_zeros
        if self.npages < trace.npages:
            raise PlanError(
                f"the VM {vm.name!r} has {vm.memory} bytes of memory, and its trace {vm.trace} is of "
                f"{trace.npages * trace.page_size}"
            )
        times = trace.times / vm.rate
        if times[-1] >= 1 << 62 or (np.diff(times.astype(np.int64)) <= 0).any():
            raise PlanError(
                f"the VM {vm.name!r} writes at a rate of {vm.rate:g}, at which its trace {vm.trace} has intervals "
                "of no time, or more than 2^62 ns"
            )
        self.times = times.astype(np.int64)

    def words(self, lo: int, hi: int) -> Words:
        return self._trace.words(lo, hi)

    def zeros(self, lo: int, hi: int) -> Words | None:
        return self._trace.zeros(lo, hi)


class _Kept:
    """A trace that is small enough to be kept in memory."""

    def __init__(self, trace: Writes) -> None:
        self.page_size, self.npages, self.times = trace.page_size, trace.npages, trace.times
        self.initial_zeros = trace.initial_zeros
        self._words = trace.words(0, self.times.size - 1)
        self._zeros = trace.zeros(0, self.times.size - 1)

    def words(self, lo: int, hi: int) -> Words:
        return self._words[lo:hi]

    def zeros(self, lo: int, hi: int) -> Words | None:
        return None if self._zeros is None else self._zeros[lo:hi]


@lru_cache(maxsize=4)
def _opened(path: Path) -> Writes:
    """Return a trace; VMs that share one are forecast one after the other."""
    from hwdbm.trace import open_trace  # noqa: PLC0415  # it needs an extra

    trace = open_trace(path)
    size = trace.npages // 8 * (trace.times.size - 1) * 2
    return _Kept(trace) if size <= _KEPT else trace
