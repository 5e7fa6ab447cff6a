"""The thread that a vCPU runs in: it enters the guest over and over, and leaves it when it is told to.

A thread inside of KVM_RUN is stopped by a signal. No handler is installed, so that a VM can be made in any thread and
the process keeps its handlers: the thread blocks the signal, and has KVM unblock it while the guest runs
(``KVM_SET_SIGNAL_MASK``). So one that comes at any time, before KVM_RUN too, ends it or the next one, and stays
pending until the thread takes it from the queue. As it is blocked outside, it is neither delivered nor ignored,
whatever the process does with it elsewhere.
"""

import signal
from collections.abc import Callable
from errno import EIO
from time import monotonic

from hwdbm.errors import GuestExitError
from hwdbm.kvm import guest
from hwdbm.kvm.abi import Exit
from hwdbm.kvm.vcpu import VcpuFd
from hwdbm.vm.runner import Gate, Runner

_KICK = signal.SIGUSR1
_TURN = 0.005  # seconds between two exits of a guest with a rate
_CHUNK = 4096  # pages between two exits of one without
# With a ring they are few: the kernel looks whether it is full before it enters the guest, and keeps 64 entries for
# what happens until it looks again. One that emulates a guest's instructions does many of them in between.
_RING_CHUNK = 32
_PATIENCE = 100  # times that a ring may be full and yet have nothing in it: another thread emptied it meanwhile


class VcpuThread:
    """A vCPU that runs, or doesn't.

    Parameters
    ----------
    number : int
        Its number.
    vcpu : VcpuFd
        The vCPU.
    when_full : callable, optional
        Makes room in its ring, and returns how many entries it took; None without a ring.

    Attributes
    ----------
    rate : float or None
        Pages a second that the guest may write; None for no limit.
    chunk : int
        Pages that it writes between two exits, once it has a pace.
    percent : int
        How much of the time it is kept from running.
    pages : int
        How many it has written, in whole chunks.
    """

    def __init__(self, number: int, vcpu: VcpuFd, when_full: Callable[[], int] | None) -> None:
        self.number, self.vcpu = number, vcpu
        self.rate: float | None = None
        self.chunk: int
        self.percent = self.pages = self._idle_exits = 0
        self._when_full = when_full
        self._inside = False  # whether it may be in the guest; the thread alone says so
        self._stay = object()  # another one each time it has left the guest
        self._left = Gate()
        self._runner = Runner(f"kvm-vcpu{number}", self._work, begin=self._begin, interrupt=_kick)
        self.stop, self.pause, self.close = self._runner.stop, self._runner.pause, self._runner.close

    def pace(self, kind: str, rate: float | None) -> None:
        """Have a paused guest write so many pages a second, and exit as often as that needs."""
        most = _CHUNK if self._when_full is None else _RING_CHUNK
        self.rate, self.chunk = rate, most if rate is None else max(1, min(most, int(rate * _TURN)))
        guest.set_chunk(self.vcpu, kind, self.chunk)

    # --- what other threads ask for ------------------------------------------------------------------------

    @property
    def failure(self) -> BaseException | None:
        """Why it doesn't run any more. It may again once that is forgotten."""
        return self._runner.failure

    def forget_failure(self) -> None:
        """Let it run again: it has other registers."""
        self._runner.failure = None

    def check(self) -> None:
        """Raise the error that the vCPU failed with."""
        if self.failure is not None:
            raise self.failure

    def resume(self) -> None:
        """Let it run."""
        self.check()
        self._runner.resume()

    def flush(self) -> None:
        """Return when it has left the guest once: KVM has logged then what a buffer of the processor held."""
        seen = self._stay
        if self._inside:
            self._runner.kick()
            self._left.wait(lambda: self._stay is seen)

    # --- the thread ----------------------------------------------------------------------------------------

    def _begin(self) -> None:
        own = signal.pthread_sigmask(signal.SIG_BLOCK, {_KICK})
        self.vcpu.set_signal_mask(own - {_KICK})

    def _work(self) -> None:
        self._run()
        self._complete()

    def _run(self) -> None:
        start, written = monotonic(), 0
        while self._runner.wanted:
            begin = monotonic()
            reason = self._enter()
            if reason in (Exit.IO, Exit.MMIO):
                self.pages += self.chunk
                written += self.chunk
            elif reason == Exit.DIRTY_RING_FULL:
                self._make_room()
            elif reason != Exit.INTR:
                raise self._unexpected(reason)
            now = monotonic()
            pause = (now - begin) * self.percent / (100 - self.percent)
            if self.rate is not None:
                early = start + written / self.rate - now
                if early < -1:  # what was missed, throttled or slow, isn't made up for
                    start, written = now, 0
                pause = max(pause, early)
            self._runner.sleep(pause)

    def _enter(self) -> int:
        self._inside = True
        try:
            reason = self.vcpu.run()
        finally:
            self._inside = False
            self._stay = object()
            self._left.open()
        if reason == Exit.INTR:
            while signal.sigtimedwait({_KICK}, 0) is not None:
                pass
        return reason

    def _make_room(self) -> None:
        taken = 0 if self._when_full is None else self._when_full()
        self._idle_exits = 0 if taken else self._idle_exits + 1
        if self._idle_exits > _PATIENCE:
            raise self._unexpected(Exit.DIRTY_RING_FULL)

    def _complete(self) -> None:
        """Finish the instruction that the guest left with: only the next KVM_RUN does, and registers lag until then."""
        self.vcpu.immediate_exit = True
        try:
            reason = self._enter()
        finally:
            self.vcpu.immediate_exit = False
        if reason not in (Exit.INTR, Exit.DIRTY_RING_FULL):
            raise self._unexpected(reason)

    def _unexpected(self, reason: int) -> GuestExitError:
        name = reason.name if isinstance(reason, Exit) else str(reason)
        if reason == Exit.FAIL_ENTRY:
            name += " (reason {:#x} on processor {})".format(*self.vcpu.field("fail_entry"))
        elif reason == Exit.INTERNAL_ERROR:
            name += " (suberror {}, of {} numbers)".format(*self.vcpu.field("internal"))
        return GuestExitError(EIO, f"vCPU {self.number} stopped at {guest.at(self.vcpu):#x} with KVM_EXIT_{name}")


def _kick(ident: int) -> None:
    signal.pthread_kill(ident, _KICK)
