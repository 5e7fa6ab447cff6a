"""Runner: a thread in which a vCPU runs its workload, at its rate, until it is told to pause."""

from threading import Condition, Thread
from time import monotonic

from hwdbm.machine.space import AddressSpace
from hwdbm.machine.vcpu import BATCH, VCpu
from hwdbm.machine.workload import Idle, Workload

__all__ = ["Runner"]

_TICK = 0.001  # seconds to wait where nothing is due


class Runner:
    """What a vCPU runs, and whether it does.

    Parameters
    ----------
    vcpu : VCpu
        The vCPU.
    space : AddressSpace
        The memory that the workload's places are in.

    Attributes
    ----------
    workload : Workload
        What it runs.
    position : int
        The number of the next store.
    seconds : float
        For how long the guest has run, by its own time: throttled, it goes slower.
    percent : int
        Of the time, what it is kept from running.
    """

    def __init__(self, vcpu: VCpu, space: AddressSpace) -> None:
        self.vcpu, self._space = vcpu, space
        self.workload: Workload = Idle()
        self.position, self.seconds, self.percent = 0, 0.0, 0
        self._changed = Condition()
        self._wanted = False  # whether it is to run
        self._busy = False  # whether it may be in a batch; the thread alone says so
        self._closing = False
        self._error: BaseException | None = None
        self._thread: Thread | None = None

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
        with self._changed:
            self._raise()
            self._wanted = True
            if self._thread is None:
                self._thread = Thread(target=self._loop, name=f"vcpu{self.vcpu.number}", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def pause(self) -> None:
        """Have the thread stop after the batch that it is in, and wait until it has. What it failed with is raised."""
        with self._changed:
            self._wanted = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._busy)
            self._raise()

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._wanted, self._closing = False, True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _raise(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _loop(self) -> None:
        while self._wait_for_work():
            try:
                self._run()
            except BaseException as error:  # noqa: BLE001 - it is raised in the thread that asks
                with self._changed:
                    self._error, self._wanted = error, False

    def _wait_for_work(self) -> bool:
        with self._changed:
            self._busy = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._wanted or self._closing)
            self._busy = not self._closing
            return self._busy

    def _run(self) -> None:
        last = monotonic()
        while self._wanted:
            begin = monotonic()
            self.seconds += (begin - last) * (100 - self.percent) / 100
            last = begin
            due = self.workload.quota(self.seconds)
            count = BATCH if due is None else min(BATCH, due - self.position)
            if count > 0 and self._space.writable_size:
                self.step(count)
                self._sleep((monotonic() - begin) * self.percent / (100 - self.percent))
            else:
                self._sleep(_TICK)

    def _sleep(self, seconds: float) -> None:
        if seconds > 0:
            with self._changed:
                self._changed.wait_for(lambda: not self._wanted, timeout=seconds)

    # --- state ---------------------------------------------------------------------------------------------

    def state(self) -> dict[str, object]:
        """Return what the vCPU would go on with; JSON can hold it."""
        return {"workload": self.workload.to_dict(), "position": self.position, "seconds": self.seconds}
