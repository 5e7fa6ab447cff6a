"""Runner: a thread that works while it is wanted; callers can wait for its pause and its end.

A signal's handler may raise in the main thread between any two steps of Python code, those of `threading.Condition`
and `threading.Event` among them, which leaves their lock held for ever. So everything here that the main thread does is
one call of C, or may be cut in two: plain locks, deques, and a `queue.SimpleQueue`.
"""

from _thread import start_new_thread
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Lock, RLock, Thread, get_ident, main_thread
from threading import enumerate as enumerate_threads
from time import monotonic, sleep
from typing import Any

_INTERRUPTS = 1000  # while a thread is waited for: one that can't be ended must not hold its caller for ever
_LOOK = 1e-4  # seconds from when a thread's work has ended until it is looked whether the thread has


class Gate:
    """A gate at which threads wait until something changes."""

    def __init__(self) -> None:
        self._waiting: deque[Any] = deque()

    def wait(self, closed: Callable[[], bool]) -> None:
        """Wait until `closed` returns False; the thread that makes it so calls `open` afterwards."""
        while closed():
            waiter = Lock()
            waiter.acquire()
            self._waiting.append(waiter)
            if closed():  # asked again: it may have opened before this thread was waiting
                waiter.acquire()

    def open(self) -> None:
        """Wake all that wait."""
        for waiter in tuple(self._waiting):
            with suppress(RuntimeError):  # another thread has woken it
                waiter.release()
            with suppress(ValueError):  # last: where a handler cuts this in two, the next one wakes it
                self._waiting.remove(waiter)


class Runner:
    """A thread that works as long as it is wanted.

    Parameters
    ----------
    name : str
        The thread's name.
    work : callable
        Works until `wanted` is False, then returns. What it raises is kept as `failure`.
    begin : callable, optional
        Called by the thread once, before it works the first time.
    interrupt : callable, optional
        Called with the thread's identifier while that lives: has a `work` that blocks look at `wanted`.

    Attributes
    ----------
    wanted : bool
        Whether the thread is to work.
    failure : BaseException or None
        The exception that `work` raised; `wanted` is False then.

    Examples
    --------
    >>> count = 0
    >>> def work():
    ...     global count
    ...     while runner.wanted:
    ...         count += 1
    ...         runner.sleep(0.001)
    >>> runner = Runner("counter", work)
    >>> runner.resume(); runner.pause()
    >>> before = count
    >>> runner.close()
    >>> count == before
    True
    """

    def __init__(
        self,
        name: str,
        work: Callable[[], object],
        *,
        begin: Callable[[], object] = lambda: None,
        interrupt: Callable[[int], object] = lambda _: None,
    ) -> None:
        self.name, self.wanted = name, False
        self.failure: BaseException | None = None
        self._work, self._begin, self._interrupt = work, begin, interrupt
        self._busy = False  # whether it may work; the thread alone says so
        self._closing = self._ended = False
        self._alive = False  # whether the thread has an identifier: changed under the lock
        self._lock = RLock()
        self._wake: SimpleQueue[None] = SimpleQueue()
        self._idle = Gate()
        self._thread: Thread | None = None

    def resume(self) -> None:
        """Let it work, and start the thread the first time."""
        if self._thread is None:
            self._start()
        with self._lock:
            if self._closing:
                raise RuntimeError(f"{self.name} has ended")
            self.wanted = True
            self._wake.put(None)
            self._idle.open()

    def _start(self) -> None:
        """Start the thread from another one, where no handler can raise inside of `Thread.start`.

        Where a handler cuts this in two, that one starts it later, unless it was started or closed meanwhile.
        """
        done, errors = Lock(), list[RuntimeError]()
        done.acquire()

        def start() -> None:
            try:
                with self._lock:
                    if self._thread is None and not self._closing:
                        thread = Thread(target=self._live, name=self.name, daemon=True)
                        thread.start()
                        self._thread = thread
            except RuntimeError as error:  # there can be no more threads
                errors.append(error)
            finally:
                done.release()

        start_new_thread(start, ())
        done.acquire()
        if errors:
            raise errors[0]

    def stop(self) -> None:
        """Have it stop, and don't wait for that."""
        self.wanted = False
        self._wake.put(None)
        if self._busy:
            self.kick()

    def pause(self) -> None:
        """Have it stop, and wait until it has stopped or another thread resumes it."""
        self.stop()
        self._idle.wait(lambda: self._busy and not self.wanted)

    def kick(self) -> None:
        """Interrupt what it does."""
        with self._lock:
            if self._alive and self._thread is not None and self._thread.ident is not None:
                self._interrupt(self._thread.ident)

    def close(self) -> None:
        """End the thread, and wait until it has ended; an interrupt meanwhile is raised after that.

        In a process forked off since there is no such thread, and nothing is waited for.
        """
        raised: list[BaseException] = []
        self._closing, self.wanted = True, False
        try:
            self._end(raised)
        except BaseException as error:  # noqa: BLE001 - it came between two turns of the loop
            raised.append(error)
            self._end(raised)
        if raised:
            raise raised[0]

    def _end(self, raised: list[BaseException]) -> None:
        while len(raised) < _INTERRUPTS:
            try:
                if self._is_gone():
                    return
            except BaseException as error:  # noqa: BLE001 - a thread of a guest must not outlive it
                raised.append(error)

    def _is_gone(self) -> bool:
        """Return whether the thread has ended, or there is none; wait a while for what still lives."""
        thread = self._thread
        if thread is None:
            with self._lock:  # one that is about to be started has been, or won't be
                thread = self._thread
        # Not join: that asks for the current thread, and for one that `uninterrupted` started that makes an object
        # which `threading` never forgets. Nor is_alive, which takes a thread for dead after a handler raised in it.
        if thread is None or thread.ident == get_ident() or thread not in enumerate_threads():
            return True
        self.stop()
        self._idle.wait(lambda: not self._ended)
        sleep(_LOOK)
        return False

    def sleep(self, seconds: float) -> None:
        """Wait in the thread, no longer than it is wanted."""
        until = monotonic() + seconds
        while self.wanted and (left := until - monotonic()) > 0:
            with suppress(Empty):
                self._wake.get(timeout=left)

    def _live(self) -> None:
        with self._lock:
            self._alive = True
        try:
            if self._wait_for_work():
                self._attempt(self._begin)
            while self._wait_for_work():
                self._attempt(self._work)
        finally:
            with self._lock:
                self._alive = False
            self._ended = True
            self._rest()

    def _attempt(self, what: Callable[[], object]) -> None:
        try:
            what()
        except BaseException as error:  # noqa: BLE001 - it is raised in the thread that asks
            self.failure, self.wanted = error, False

    def _wait_for_work(self) -> bool:
        while True:
            self._busy = True  # set before it looks: a thread that stops it sees it busy, or it sees the stop
            if self._closing:
                return False
            if self.wanted:
                return True
            self._rest()
            self._wake.get()

    def _rest(self) -> None:
        self._busy = False
        self._idle.open()


def uninterrupted(what: Callable[[], object]) -> None:
    """Call something that must not be cut in two: in a thread, where no handler raises. One that did is raised after.

    The call must not need a lock that the caller holds.
    """
    if get_ident() != main_thread().ident:
        what()
        return
    ended, errors, done = list[bool](), list[BaseException](), Lock()
    done.acquire()

    def call() -> None:
        try:
            what()
        except BaseException as error:  # noqa: BLE001 - it is raised where it was asked for
            errors.append(error)
        finally:
            ended.append(True)
            done.release()

    try:
        start_new_thread(call, ())
    except RuntimeError:  # there can be no more threads
        what()
        return
    while not ended:
        try:
            done.acquire()
        except BaseException as error:  # noqa: BLE001 - a handler's
            errors.append(error)
    if errors:
        raise errors[0]
