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
from threading import Condition, Thread
from time import monotonic

from hwdbm.kvm import guest
from hwdbm.kvm.abi import Exit
from hwdbm.kvm.vcpu import VcpuFd

__all__ = ["GuestExitError", "VcpuThread"]

_KICK = signal.SIGUSR1
_TURN = 0.005  # seconds between two exits of a guest with a rate
_CHUNK = 4096  # pages between two exits of one without
# With a ring they are few: the kernel looks whether it is full before it enters the guest, and keeps 64 entries for
# what happens until it looks again. One that emulates a guest's instructions does many of them in between.
_RING_CHUNK = 32
_PATIENCE = 100  # times that a ring may be full and yet have nothing in it: somebody else emptied it meanwhile


class GuestExitError(OSError):
    """A vCPU stopped for good: its guest did something that nobody here answers, or KVM gave up. The errno is EIO."""


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
        Pages a second that the guest may write; None for as many as go.
    chunk : int
        Pages that it writes between two exits.
    percent : int
        Of the time, what it is kept from running.
    pages : int
        How many it has written, in whole chunks.
    failure : OSError or None
        Why it doesn't run any more.
    """

    def __init__(self, number: int, vcpu: VcpuFd, when_full: Callable[[], int] | None) -> None:
        self.number, self.vcpu = number, vcpu
        self.rate: float | None = None
        self.chunk, self.percent, self.pages = 1, 0, 0
        self._idle_exits = 0
        self.failure: BaseException | None = None
        self._when_full = when_full
        self._changed = Condition()
        self._wanted = False  # whether it is to run
        self._busy = False  # whether it may run; the thread alone says so
        self._inside = False  # whether it may be in the guest; the thread alone says so
        self._exits = 0
        self._closing = False
        self._thread: Thread | None = None

    def pace(self, kind: str, rate: float | None) -> None:
        """Have a paused guest write so many pages a second, and exit as often as that needs."""
        most = _CHUNK if self._when_full is None else _RING_CHUNK
        self.rate, self.chunk = rate, most if rate is None else max(1, min(most, int(rate * _TURN)))
        guest.set_chunk(self.vcpu, kind, self.chunk)

    # --- what other threads ask for ------------------------------------------------------------------------

    def resume(self) -> None:
        """Let it run."""
        with self._changed:
            self.check()
            self._wanted = True
            self.vcpu.immediate_exit = False
            if self._thread is None:
                self._thread = Thread(target=self._live, name=f"kvm-vcpu{self.number}", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def pause(self) -> None:
        """Have it leave the guest, and return when it has: its registers are complete then, and it writes no more."""
        with self._changed:
            self._stop()
            self._changed.wait_for(lambda: not self._busy)

    def flush(self) -> None:
        """Return when it has left the guest once: KVM has logged then what a buffer of the processor held."""
        with self._changed:
            if not self._inside:
                return
            seen = self._exits
            self._kick()
            self._changed.wait_for(lambda: self._exits != seen)

    def check(self) -> None:
        """Raise what it failed with."""
        if self.failure is not None:
            raise self.failure

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._closing = True
            self._stop()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _stop(self) -> None:
        self._wanted = False
        self._changed.notify_all()
        if self._busy:
            self.vcpu.immediate_exit = True
            self._kick()

    def _kick(self) -> None:
        # It is alive, as it is busy, and can't cease to be while this lock is held.
        if self._thread is not None and self._thread.ident is not None:
            signal.pthread_kill(self._thread.ident, _KICK)

    # --- the thread ----------------------------------------------------------------------------------------

    def _live(self) -> None:
        own = signal.pthread_sigmask(signal.SIG_BLOCK, {_KICK})
        try:
            self.vcpu.set_signal_mask(own - {_KICK})
        except OSError as error:
            self._fail(error)
        while self._wait_for_work():
            try:
                self._run()
                self._complete()
            except BaseException as error:  # noqa: BLE001 - it is raised in the thread that asks
                self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self.failure, self._wanted = error, False

    def _wait_for_work(self) -> bool:
        with self._changed:
            self._busy = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._wanted or self._closing)
            self._busy = not self._closing
            return self._busy

    def _run(self) -> None:
        start, written = monotonic(), 0
        while self._wanted:
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
            self._sleep(pause)

    def _enter(self) -> int:
        self._inside = True
        try:
            reason = self.vcpu.run()
        finally:
            with self._changed:
                self._inside = False
                self._exits += 1
                self._changed.notify_all()
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
        reason = self._enter()
        self.vcpu.immediate_exit = False
        if reason not in (Exit.INTR, Exit.DIRTY_RING_FULL):
            raise self._unexpected(reason)

    def _sleep(self, seconds: float) -> None:
        if seconds > 0:
            with self._changed:
                self._changed.wait_for(lambda: not self._wanted, timeout=seconds)

    def _unexpected(self, reason: int) -> GuestExitError:
        name = reason.name if isinstance(reason, Exit) else str(reason)
        if reason == Exit.FAIL_ENTRY:
            name += " (reason {:#x} on processor {})".format(*self.vcpu.field("fail_entry"))
        elif reason == Exit.INTERNAL_ERROR:
            name += " (suberror {}, of {} numbers)".format(*self.vcpu.field("internal"))
        return GuestExitError(EIO, f"vCPU {self.number} stopped at {guest.at(self.vcpu):#x} with KVM_EXIT_{name}")
