"""The forecasts of a fleet's VMs: a trace replayed, or a model fitted to samples."""

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from hwdbm.errors import PlanError
from hwdbm.fleet.curves import Curve, Taken
from hwdbm.fleet.plan import Engine, FleetVm
from hwdbm.forecast import OWN, QEMU, Terms
from hwdbm.forecast.model import ModelWrites, fit, measured
from hwdbm.forecast.samples import read_sample_file
from hwdbm.forecast.simulate import Course, run
from hwdbm.forecast.writes import GuestWrites, TraceWrites

_MOMENTS = 3  # of a trace at which a migration may begin, where the plan doesn't say when
_FLAT = 5  # passes without progress, after which it is hopeless: a plan that needs a lull is none


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
        trace = _read(vm.trace)
        if vm.memory // trace.page_size < trace.npages:
            raise PlanError(
                f"the VM {vm.name!r} has {vm.memory} bytes of memory, and its trace {vm.trace} is of "
                f"{trace.npages * trace.page_size}"
            )
        try:
            scaled = trace.like(vm.rate, vm.memory // trace.page_size)
        except ValueError:
            raise PlanError(
                f"the VM {vm.name!r} writes at a rate of {vm.rate:g}, at which its trace {vm.trace} has intervals "
                "of no time, or more than 2^62 ns"
            ) from None
        if vm.start is None:
            return scaled, [i * scaled.ends / _MOMENTS for i in range(_MOMENTS)]
        if vm.start >= trace.ends:
            raise PlanError(
                f"the VM {vm.name!r} starts after {vm.start * 1e3:g} ms, and its trace {vm.trace} ends at "
                f"{trace.ends * 1e3:g} ms"
            )
        return scaled, [vm.start / vm.rate]


@lru_cache(maxsize=2)
def _read(path: Path) -> TraceWrites:
    """Return what is kept of a trace; VMs that share one are forecast one after the other."""
    from hwdbm.trace import open_trace  # noqa: PLC0415  # it needs an extra

    return TraceWrites(open_trace(path))
