"""Ctrl-C, SIGTERM, SIGHUP: the command says "interrupted" in one line, leaves nothing behind, and exits with 130.

An exception that is raised wherever Python happens to be gets lost in a finalizer, turns an import into an
``ImportError``, and unwinds compiled code that can't be unwound. So the handler cleans up itself and ends the process.
A command that has more to do first, such as telling a peer, asks for an event instead.
"""

from __future__ import annotations

import _thread  # nothing that takes a while is imported before an interrupt is answered: no `threading`
import os
import signal
import time
from contextlib import contextmanager, suppress

TYPE_CHECKING = False
if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterator
    from types import FrameType
    from typing import Protocol, TypeVar

    class _Closable(Protocol):
        def close(self) -> object: ...

    T = TypeVar("T", bound=_Closable)


INTERRUPTED = 130
"""The exit status."""

_NUDGE = signal.SIGURG  # ends a wait, and nothing else: without a handler it is ignored
_NUDGES = (0.05, 0.5, 2.0)  # seconds before each

_LOOK = 0.05  # seconds until it is looked whether there was an interrupt

_CLEAR = b"\r\x1b[2K\x1b[?25h"  # the line, and the cursor is back

_cleanups: list[Callable[[], object]] = []
_shown: list[bytes] = []  # what puts stderr right, where it is a terminal that shows what goes on, and no cursor
_leaving: list[int] = []  # the interrupt that is being answered


def install(*cleanups: Callable[[], object]) -> None:
    """Answer interrupts from here on, and call `cleanups` then."""
    _cleanups[:] = cleanups
    for number in _heeded():
        signal.signal(number, _leave)


def ignore() -> None:
    """Ignore interrupts from here on: the work is done, and its answer is on its way."""
    for number in _heeded():
        signal.signal(number, signal.SIG_IGN)


def _heeded() -> list[signal.Signals]:
    """Return the signals that interrupt: Ctrl-C, and those that weren't ignored when the process began (nohup)."""
    others = (signal.SIGTERM, signal.SIGHUP)
    return [signal.SIGINT, *(number for number in others if signal.getsignal(number) is not signal.SIG_IGN)]


def nudge() -> None:
    """See to it that no signal waits: one that comes just before a system call that waits doesn't end that call."""
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(_NUDGE, lambda *_: None)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    main = _thread.get_ident()

    def watch() -> None:
        while True:
            if os.read(woken, 1) != bytes([_NUDGE]):
                for delay in _NUDGES:
                    time.sleep(delay)
                    signal.pthread_kill(main, _NUDGE)

    _thread.start_new_thread(watch, ())


@contextmanager
def on_interrupt(cleanup: Callable[[], object]) -> Iterator[None]:
    """Have `cleanup` called if an interrupt ends the process meanwhile: to kill a child, to remove a file."""
    _cleanups.append(cleanup)
    try:
        yield
    finally:
        _cleanups.remove(cleanup)


@contextmanager
def shown() -> Iterator[None]:
    """Have the terminal put right if an interrupt ends the process meanwhile."""
    _shown.append(_CLEAR)
    try:
        yield
    finally:
        _shown.pop()


@contextmanager
def as_event() -> Iterator[threading.Event]:
    """Yield an event that the first interrupt sets; the second ends the process.

    A command that sees the event set exits with `INTERRUPTED` when it has cleaned up. What takes long and doesn't look
    at the event comes before: kernels are loaded by then, since a guest's thread that compiles them can't be paused.
    """
    import threading  # noqa: PLC0415

    event = threading.Event()

    def handle(_signal: int, _frame: FrameType | None) -> None:
        for number in before:
            signal.signal(number, _leave)
        _thread.start_new_thread(event.set, ())  # this thread may be inside of the event, with its lock

    before = {number: signal.signal(number, handle) for number in _heeded()}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def elsewhere(what: Callable[[], T], cancel: threading.Event | None = None) -> T:
    """Return what a call returns, which waits in another thread: no signal ends the search for a host's name.

    Parameters
    ----------
    what : callable
        The call. What it returns when nobody wants it any more is closed.
    cancel : Event, optional
        As `as_event` yields it: ends the wait.

    Raises
    ------
    InterruptedError
        If `cancel` was set first.
    """
    from queue import Empty, SimpleQueue  # noqa: PLC0415
    from threading import Lock, Thread  # noqa: PLC0415

    answers: SimpleQueue[T | BaseException] = SimpleQueue()
    lock, wanted = Lock(), True

    def call() -> None:
        answer: T | BaseException
        try:
            answer = what()
        except BaseException as error:  # noqa: BLE001  # it is raised where it is waited for
            answer = error
        with lock:
            if wanted:
                answers.put(answer)
                return
        if not isinstance(answer, BaseException):
            answer.close()

    Thread(target=call, name="hwdbm-elsewhere", daemon=True).start()
    while True:
        with suppress(Empty):
            answer = answers.get(timeout=_LOOK)
            if isinstance(answer, BaseException):
                raise answer
            return answer
        if cancel is not None and cancel.is_set():
            with lock:
                wanted = False
            if answers.empty():
                raise InterruptedError


def _leave(number: int, _frame: FrameType | None) -> None:
    if _leaving:
        os._exit(INTERRUPTED)  # a cleanup that hangs can be interrupted too
    _leaving.append(number)
    with suppress(OSError):
        os.write(2, b"".join(_shown) + b"hwdbm: interrupted\n")
    with suppress(OSError):  # that is all: other threads miss what is cleaned up, and would say so
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    for cleanup in reversed(_cleanups):
        with suppress(Exception):
            cleanup()
    os._exit(INTERRUPTED)
