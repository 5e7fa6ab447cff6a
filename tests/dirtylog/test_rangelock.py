"""RangeLock: who waits for whom, in which order; with threads that are joined, never waited for without a limit."""

import random
import signal
import time
from threading import Event, Thread

import pytest

from hwdbm.dirtylog.rangelock import RangeLock

LIMIT = 10.0


def join(*threads):
    for thread in threads:
        thread.join(LIMIT)
        assert not thread.is_alive(), "it waits for ever"


def start(target, *args):
    thread = Thread(target=target, args=args, daemon=True)
    thread.start()
    return thread


def waiting(lock, count):
    """Wait until so many claims are there, held or not."""
    end = time.monotonic() + LIMIT
    while len(lock) < count:
        assert time.monotonic() < end
        time.sleep(0.001)


def holder(lock, lo, hi, log, release):
    with lock.hold(lo, hi):
        log.append((lo, hi))
        assert release.wait(LIMIT)


def test_disjoint_ranges_are_held_together():
    lock, log, release = RangeLock(), [], Event()
    threads = [start(holder, lock, lo, lo + 64, log, release) for lo in (0, 64, 128)]
    waiting(lock, 3)
    end = time.monotonic() + LIMIT
    while len(log) < 3:
        assert time.monotonic() < end
        time.sleep(0.001)
    release.set()
    join(*threads)
    assert len(lock) == 0


def test_overlapping_ranges_come_in_order():
    """The whole waits for a part, and a later part for the whole: nobody overtakes it."""
    lock, log, releases = RangeLock(), [], [Event() for _ in range(4)]
    threads = []
    for count, (lo, hi) in enumerate([(0, 64), (0, 256), (0, 64), (128, 192)]):
        threads.append(start(holder, lock, lo, hi, log, releases[count]))
        waiting(lock, count + 1)
    time.sleep(0.02)
    assert log == [(0, 64)]  # (128, 192) is free, and yet the whole comes first
    releases[0].set()
    releases[2].set()
    releases[3].set()
    time.sleep(0.02)
    assert log == [(0, 64), (0, 256)]
    releases[1].set()
    join(*threads)
    assert sorted(log[2:]) == [(0, 64), (128, 192)]


def test_an_empty_range_waits_for_nobody():
    lock = RangeLock()
    with lock.hold(0, 64), lock.hold(5, 5), lock.hold(64, 64), lock.hold(7, 3):
        pass


def test_a_thread_that_would_wait_for_itself_is_told():
    lock = RangeLock()
    with lock.hold(0, 64):
        for lo, hi in ((0, 64), (63, 64), (0, 1), (60, 100)):
            with pytest.raises(RuntimeError, match="this thread holds already"), lock.hold(lo, hi):
                pass
    with lock.hold(0, 64):
        pass


def test_it_is_free_after_an_error():
    lock = RangeLock()
    with pytest.raises(ZeroDivisionError), lock.hold(0, 64):
        raise ZeroDivisionError
    with lock.hold(0, 64):
        pass


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no interval timer")
def test_an_interrupted_wait_leaves_nothing_behind(monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    lock, log, release = RangeLock(), [], Event()
    thread = start(holder, lock, 0, 64, log, release)
    waiting(lock, 1)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(KeyboardInterrupt), lock.hold(0, 64):
            pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(lock) == 1
    release.set()
    join(thread)
    with lock.hold(0, 64):
        assert len(lock) == 1


def test_no_two_hold_the_same_place():
    lock, owner, wrong = RangeLock(), [None] * 32, []

    def work(name):
        choose = random.Random(name)
        for _ in range(150):
            lo = choose.randrange(32)
            hi = choose.randrange(lo, 32) + 1
            with lock.hold(lo, hi):
                wrong.extend(place for place in range(lo, hi) if owner[place] is not None)
                owner[lo:hi] = [name] * (hi - lo)
                if choose.random() < 0.1:
                    time.sleep(0.0005)
                wrong.extend(place for place in range(lo, hi) if owner[place] != name)
                owner[lo:hi] = [None] * (hi - lo)

    join(*[start(work, name) for name in range(6)])
    assert not wrong
    assert len(lock) == 0
