"""VCpuRunner: a vCPU that runs its workload in a thread, at its rate, until it is told to pause."""

from time import monotonic

from hwdbm.machine.space import AddressSpace
from hwdbm.machine.vcpu import BATCH, VCpu
from hwdbm.machine.workload import Idle, Workload
from hwdbm.vm.runner import Runner

_TICK = 0.001  # seconds to wait where nothing is due


class VCpuRunner:
    """A vCPU with its workload, in a thread.

    Parameters
    ----------
    vcpu : VCpu
        The vCPU.
    space : AddressSpace
        The memory that the workload's places are in.

    Attributes
    ----------
    workload : Workload
        The workload.
    position : int
        The number of the next store.
    seconds : float
        For how long the guest has run, by its own time: throttled, it goes slower.
    percent : int
        Percentage of the time that it is kept from running.
    """

    def __init__(self, vcpu: VCpu, space: AddressSpace) -> None:
        self.vcpu, self._space = vcpu, space
        self.workload: Workload = Idle()
        self.position, self.seconds, self.percent = 0, 0.0, 0
        self._runner = Runner(f"vcpu{vcpu.number}", self._run)
        self.stop, self.close = self._runner.stop, self._runner.close

    def step(self, count: int) -> None:
        """Do the next `count` stores in the caller's thread."""
        for start in range(0, count, BATCH):
            n = min(BATCH, count - start)
            size, page = self._space.writable_size, 1 << self._space.page_shift
            offsets = self.workload.offsets(self.position, n, size, page)
            self.vcpu.store(self._space.gpas(offsets), self.workload.values(self.position, n))
            self.position += n

    def resume(self) -> None:
        """Let the thread run, starting it the first time. What it failed with is raised."""
        self._raise()
        self._runner.resume()

    def pause(self) -> None:
        """Have the thread stop after the batch that it is in, and wait until it has. What it failed with is raised."""
        self._runner.pause()
        self._raise()

    def _raise(self) -> None:
        error, self._runner.failure = self._runner.failure, None
        if error is not None:
            raise error

    def _run(self) -> None:
        last = monotonic()
        while self._runner.wanted:
            begin = monotonic()
            self.seconds += (begin - last) * (100 - self.percent) / 100
            last = begin
            due = self.workload.quota(self.seconds)
            count = BATCH if due is None else min(BATCH, due - self.position)
            if count > 0 and self._space.writable_size:
                self.step(count)
                self._runner.sleep((monotonic() - begin) * self.percent / (100 - self.percent))
            else:
                self._runner.sleep(_TICK)

    # --- state ---------------------------------------------------------------------------------------------

    def state(self) -> dict[str, object]:
        """Return what the vCPU would go on with; JSON can hold it."""
        return {"workload": self.workload.to_dict(), "position": self.position, "seconds": self.seconds}
