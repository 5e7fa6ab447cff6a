"""Running: the vCPUs' side of a machine, what they run, whether they do, and the state that a migration carries."""

import json
from collections.abc import Sequence
from typing import Any

from hwdbm.machine.runner import VCpuRunner
from hwdbm.machine.workload import Workload, from_dict

__all__ = ["Running"]

_STATE = 1


class Running:
    """What the vCPUs of a machine do.

    Parameters
    ----------
    runners : sequence of VCpuRunner
        One a vCPU.
    """

    def __init__(self, runners: Sequence[VCpuRunner]) -> None:
        self._runners = tuple(runners)
        self._running = False

    def run(self, *workloads: Workload) -> None:
        """Give the vCPUs something to do, one each, from its first store on; those left are idle. See `resume`.

        Raises
        ------
        RuntimeError
            If they are running.
        ValueError
            If there are more workloads than vCPUs.
        """
        self._check_paused()
        if len(workloads) > len(self._runners):
            raise ValueError(f"{len(workloads)} workloads, and {len(self._runners)} vCPUs")
        for runner, workload in zip(self._runners, workloads, strict=False):
            runner.workload, runner.position, runner.seconds = workload, 0, 0.0

    def step(self, stores: int, vcpu: int = 0) -> None:
        """Do the next stores of a vCPU's workload in this thread, whatever its rate.

        Raises
        ------
        RuntimeError
            If the vCPUs are running.
        """
        self._check_paused()
        self._runners[vcpu].step(stores)

    def resume(self) -> None:
        """Let the vCPUs run, each in a thread of its own. What one failed with is raised here, or by `pause`."""
        try:
            for runner in self._runners:
                runner.resume()
        except BaseException:
            self.pause()  # all run, or none
            raise
        self._running = True

    def pause(self) -> None:
        """Stop the vCPUs. When this returns, everything that they wrote is in memory and recorded."""
        self._running = False
        errors = []
        for runner in self._runners:
            runner.stop()
        for runner in self._runners:
            try:
                runner.pause()
            except Exception as error:  # noqa: BLE001 - the others are to stop too
                errors.append(error)
        if errors:
            raise errors[0]

    @property
    def running(self) -> bool:
        """Whether the vCPUs run."""
        return self._running

    def throttle(self, percent: int) -> None:
        """Keep the vCPUs from running for some part of the time.

        Parameters
        ----------
        percent : int
            0 to 99.

        Raises
        ------
        ValueError
            For another one.
        """
        if not 0 <= percent <= 99:
            raise ValueError(f"vCPUs are throttled by 0 to 99 percent, not {percent}")
        for runner in self._runners:
            runner.percent = percent

    def _check_paused(self) -> None:
        if self._running:
            raise RuntimeError("the vCPUs are running")

    # --- state ---------------------------------------------------------------------------------------------

    def state(self) -> bytes:
        """Return what the vCPUs would go on with, for a machine with the same memory.

        Raises
        ------
        RuntimeError
            If they are running.
        """
        self._check_paused()
        state = {"format": _STATE, "vcpus": [runner.state() for runner in self._runners]}
        return json.dumps(state, separators=(",", ":")).encode()

    def set_state(self, state: bytes) -> None:
        """Have the vCPUs go on where those of another machine were.

        Raises
        ------
        RuntimeError
            If they are running.
        ValueError
            If it isn't what `state` returns, or of another number of vCPUs. Nothing is changed then.
        """
        self._check_paused()
        found = _parsed(state)
        if len(found) != len(self._runners):
            raise ValueError(f"a state of {len(found)} vCPUs, and here are {len(self._runners)}")
        for runner, (workload, position, seconds) in zip(self._runners, found, strict=True):
            runner.workload, runner.position, runner.seconds = workload, position, seconds

    def stop(self) -> None:
        """Stop the vCPUs for good."""
        self._running = False
        for runner in self._runners:
            runner.close()


def _parsed(state: bytes) -> Sequence[tuple[Workload, int, float]]:
    """Return what a state says of each vCPU, checked: it may come from anywhere."""
    try:
        found: dict[str, Any] = json.loads(state)
        vcpus = [
            (from_dict(each["workload"]), int(each["position"]), float(each["seconds"])) for each in found["vcpus"]
        ]
        form = found["format"]
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"not a state of vCPUs: {error}") from None
    if form != _STATE:
        raise ValueError(f"a state of format {form!r}, not {_STATE}")
    if any(position < 0 or not 0 <= seconds < 1e12 for _, position, seconds in vcpus):
        raise ValueError("not a state of vCPUs: a position or a time is out of range")
    return vcpus
