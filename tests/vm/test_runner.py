"""Runner: what it is asked for is done when the call returns, and can be asked again after an interrupt."""

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest
from effort import EFFORT

from hwdbm.vm.runner import Runner, uninterrupted


class InterruptError(Exception):
    pass


class Worker:
    """Counts as long as it is wanted; a pause that came too early would see it count on."""

    def __init__(self) -> None:
        self.count, self.inside, self.interrupts = 0, False, 0
        self.runner = Runner("worker", self.work, interrupt=self.interrupted)

    def work(self) -> None:
        self.inside = True
        while self.runner.wanted:
            self.count += 1
            self.runner.sleep(1e-5 if self.count % 7 else 0)
        self.inside = False

    def interrupted(self, ident: int) -> None:
        assert ident == next(thread.ident for thread in threading.enumerate() if thread.name == "worker")
        self.interrupts += 1

    def check_still(self) -> None:
        before = self.count
        time.sleep(1e-4)
        assert not self.inside
        assert self.count == before


@pytest.fixture
def worker() -> Iterator[Worker]:
    made = Worker()
    yield made
    made.runner.close()
    assert "worker" not in {thread.name for thread in threading.enumerate()}


def until(worker: Worker, count: int) -> None:
    deadline = time.monotonic() + 30
    while worker.count < count:
        assert time.monotonic() < deadline
        time.sleep(1e-4)


def test_it_works_when_it_is_wanted(worker: Worker) -> None:
    worker.runner.pause()  # nothing to pause
    for _ in range(200):
        seen = worker.count
        worker.runner.resume()
        worker.runner.resume()
        until(worker, seen + 1)
        worker.runner.pause()
        worker.check_still()
    assert worker.interrupts > 0


def test_many_may_pause_it(worker: Worker) -> None:
    def pause() -> None:
        for _ in range(200):
            worker.runner.pause()
            worker.runner.resume()

    threads = [threading.Thread(target=pause) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    worker.runner.pause()
    worker.check_still()


def test_a_sleep_ends_when_it_is_not_wanted() -> None:
    runner = Runner("sleeper", lambda: runner.sleep(1e6))
    runner.resume()
    runner.pause()
    runner.close()


def test_what_the_work_raises_is_kept(worker: Worker) -> None:
    def begin() -> None:
        raise ZeroDivisionError

    runner = Runner("failing", worker.work, begin=begin)
    runner.resume()
    deadline = time.monotonic() + 30
    while runner.wanted and time.monotonic() < deadline:
        time.sleep(1e-4)
    runner.pause()
    assert isinstance(runner.failure, ZeroDivisionError)
    assert not runner.wanted
    runner.close()
    with pytest.raises(RuntimeError, match="failing has ended"):
        runner.resume()


def test_no_more_threads(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        with pytest.raises(RuntimeError, match="can't start"):
            worker.runner.resume()
    assert not worker.runner.wanted
    worker.runner.resume()
    until(worker, 1)


def test_the_thread_itself_may_close_it(worker: Worker) -> None:
    runner = Runner("own", lambda: runner.close())  # noqa: PLW0108 - it is not there yet
    runner.resume()
    runner.pause()
    runner.close()
    assert runner.failure is None


@pytest.mark.parametrize("verb", ["resume", "close"])
def test_what_is_closed_has_no_thread(verb: str) -> None:
    """However often a handler raised in its start, or in its end: nor does one come later, or begin anything."""
    begun: list[int] = []

    def handler(*_: object) -> None:
        raise InterruptError

    rng = random.Random(2)
    before = signal.signal(signal.SIGALRM, handler)
    try:
        for turn in range(200 * EFFORT):
            runner = Runner(f"turn {turn}", lambda: time.sleep(1e-4), begin=lambda turn=turn: begun.append(turn))  # type: ignore[misc]
            if verb == "close":
                runner.resume()
            with suppress(InterruptError):
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-6, 3e-4))
                getattr(runner, verb)()
                signal.setitimer(signal.ITIMER_REAL, 0)
            if verb == "resume" or not runner._closing:  # it was cut off before it had begun
                runner.close()
            there, started = {thread.name for thread in threading.enumerate()}, len(begun)
            assert f"turn {turn}" not in there
            time.sleep(1e-4)
            assert len(begun) == started
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_thread_that_is_not_wanted_yet_begins_nothing() -> None:
    """Such is one whose `resume` was cut in two; and one that was closed before isn't started."""
    begun = list[int]()
    runner = Runner("early", lambda: time.sleep(1e-4), begin=lambda: begun.append(1))
    runner._start()
    runner._start()
    time.sleep(0.05)
    assert [thread.name for thread in threading.enumerate()].count("early") == 1
    assert not begun
    runner.resume()
    while not begun:
        time.sleep(1e-4)
    runner.close()
    late = Runner("late", lambda: None)
    late.close()
    late._start()
    assert late._thread is None
    assert "late" not in {thread.name for thread in threading.enumerate()}


def test_a_forked_process_waits_for_no_thread_of_its_parents(worker: Worker) -> None:
    worker.runner.resume()
    until(worker, 1)
    child = os.fork()
    if not child:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(10)
        worker.runner.close()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    until(worker, worker.count + 1)


def test_a_handler_that_raises_keeps_no_other_thread_waiting() -> None:
    """One waits for a pause, and the main thread resumes what it waits for, cut in two anywhere."""

    def handler(*_: object) -> None:
        raise InterruptError

    def work() -> None:
        while not ended.is_set():
            time.sleep(1e-5)

    rng = random.Random(3)
    before = signal.signal(signal.SIGALRM, handler)
    try:
        for _ in range(300 * EFFORT):
            ended, runner = threading.Event(), Runner("busy", work)
            runner.resume()
            while not runner._busy:
                time.sleep(1e-5)
            waits = threading.Thread(target=runner.pause, daemon=True)
            waits.start()
            while not runner._idle._waiting:
                time.sleep(1e-5)
            with suppress(InterruptError):
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-6, 3e-5))
                runner.resume()
                while True:
                    time.sleep(1e-4)
            runner.resume()
            waits.join(10)
            assert not waits.is_alive()
            ended.set()
            runner.close()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # one that came in a finalizer
def test_interrupts_leave_nothing_held(worker: Worker) -> None:
    """A handler raises at any moment of a verb; the verb asked again does what it should, and nothing hangs."""

    fired = interrupted = 0

    def handler(*_: object) -> None:
        nonlocal fired
        fired += 1
        raise InterruptError

    rng = random.Random(1)
    before = signal.signal(signal.SIGALRM, handler)
    try:
        for turn in range(1000 * EFFORT):
            verb = worker.runner.close if turn % 50 == 49 else rng.choice([worker.runner.resume, worker.runner.pause])
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-6, 1e-4))
                verb()
                while fired == turn:  # until it comes: in the verb, or after it
                    pass
            except InterruptError:
                interrupted += 1
            if verb == worker.runner.close:
                worker.runner.close()
                worker.check_still()
                worker = Worker()
            elif turn % 10 == 0:
                worker.runner.pause()
                worker.check_still()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        worker.runner.close()
    assert fired == 1000 * EFFORT
    assert interrupted > 900 * EFFORT


@pytest.mark.parametrize("why", [None, ValueError("broken")])
def test_what_must_not_be_cut_in_two_is_done_where_there_are_no_threads(
    monkeypatch: pytest.MonkeyPatch, why: Exception | None
) -> None:
    def no_thread(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    def work() -> None:
        done.append(threading.get_ident())
        if why is not None:
            raise why

    done: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr("hwdbm.vm.runner.start_new_thread", no_thread)
        if why is None:
            uninterrupted(work)
        else:
            with pytest.raises(ValueError, match="broken"):
                uninterrupted(work)
    assert done == [threading.get_ident()]


def test_an_interrupt_waits_until_what_must_not_be_cut_in_two_is_done() -> None:
    def handler(*_: object) -> None:
        raise InterruptError

    def work() -> None:
        os.kill(os.getpid(), signal.SIGUSR2)
        time.sleep(0.05)
        done.append(True)

    done: list[bool] = []
    before = signal.signal(signal.SIGUSR2, handler)
    try:
        with pytest.raises(InterruptError):
            uninterrupted(work)
        assert done == [True]
    finally:
        signal.signal(signal.SIGUSR2, before)
