"""vCPUs in threads of their own, while another thread harvests, splits and copies."""

import os
import signal
from itertools import count
from threading import Thread, active_count
from time import monotonic, sleep

import numpy as np
import pytest

from hwdbm.machine import HotSet, Idle, Machine, Sequential, Uniform, Zipf
from hwdbm.machine import runner as running
from hwdbm.machine.vcpu import BATCH

PAGE = 4096
SIZE = 8 << 20


@pytest.fixture
def make():
    made = []

    def one(**options):
        machine = Machine(**options)
        made.append(machine)
        machine.add_memslot(SIZE, 0x4000_0000)
        machine.add_memslot(SIZE // 2 + 5 * PAGE, 0x8000_0000)
        return machine

    yield one
    for machine in made:
        machine.close()


def copy_out(machine, copies, slot):
    with machine.dirty(slot) as lease:
        pages = lease.bitmap.pages()
        copies[slot].reshape(-1, PAGE)[pages] = machine.memory(slot).reshape(-1, PAGE)[pages]
        return pages.size


@pytest.mark.parametrize("hw", [True, False], ids=["hw-dbm", "write-protect"])
@pytest.mark.parametrize("manual", [False, True], ids=["get", "clear"])
@pytest.mark.parametrize("blocks", ["write", "eager", "track"])
@pytest.mark.alike(2)
def test_a_copy_made_while_vcpus_write_ends_equal(make, hw, manual, blocks):
    machine = make(hw_dbm=hw, manual_protect=manual, blocks=blocks, vcpus=2, step_pages=512, tlb_entries=3000)
    machine.run(Uniform(seed=1), Zipf(seed=2))
    machine.resume()
    sleep(0.02)
    machine.start_log()
    copies = {slot.id: machine.memory(slot.id).copy() for slot in machine.slots}
    for turn in range(6):
        for slot in copies:
            copy_out(machine, copies, slot)
        machine.share(0, turn * 100, 50)
        machine.reclaim(1, turn * 100, 50)
        machine.split(0, turn * 300, 300)
        machine.write(0x4000_0000 + turn * 777, b"device")
    machine.pause()
    for slot, copy in copies.items():
        copy_out(machine, copies, slot)
        assert (copy == machine.memory(slot)).all()
    machine.verify()


@pytest.mark.parametrize("hw", [True, False], ids=["hw-dbm", "write-protect"])
def test_logs_start_and_stop_and_modes_switch_while_vcpus_write(make, hw):
    machine = make(hw_dbm=hw, vcpus=2)
    machine.run(Uniform(seed=1), HotSet(seed=2))
    machine.resume()
    for turn in range(3):
        machine.start_log()
        copies = {slot.id: machine.memory(slot.id).copy() for slot in machine.slots}
        for slot in copies:
            copy_out(machine, copies, slot)
        machine.set_hw_dirty_log(not machine.log.hw_dbm)
        for slot in copies:
            copy_out(machine, copies, slot)
        machine.pause()
        for slot, copy in copies.items():
            copy_out(machine, copies, slot)
            assert (copy == machine.memory(slot)).all(), turn
        machine.resume()
        machine.stop_log(collapse=turn != 1)
    machine.pause()
    machine.verify()


def test_one_machine_in_threads_and_one_by_steps_are_the_same(make):
    one, two = make(), make()
    one.run(Uniform(seed=5))
    one.resume()
    sleep(0.05)
    one.pause()
    stores = one.clock.read().counts["stores"]
    assert stores > 0
    two.run(Uniform(seed=5))
    two.step(stores)
    assert one.digest() == two.digest()


def test_pause_means_that_nothing_is_written(make):
    machine = make()
    machine.run(Sequential())
    assert not machine.running
    machine.resume()
    assert machine.running
    sleep(0.02)
    machine.pause()
    assert not machine.running
    before = machine.digest()
    sleep(0.02)
    assert machine.digest() == before
    last = monotonic() + 60
    while machine.digest() == before and monotonic() < last:  # a busy machine may give the vCPU no turn in that time
        machine.resume()
        sleep(0.02)
        machine.pause()
    assert machine.digest() != before


def test_a_rate_is_kept_and_throttled(make):
    def stores(seconds):
        before, start = machine.clock.read().counts["stores"], monotonic()
        machine.resume()
        sleep(seconds)
        machine.pause()
        return (machine.clock.read().counts["stores"] - before) / (monotonic() - start)

    machine = make()
    machine.run(Uniform(rate=100_000))
    stores(0.05)  # what is touched the first time is slow
    assert stores(0.2) == pytest.approx(100_000, rel=0.3)
    machine.throttle(90)
    assert stores(0.2) == pytest.approx(10_000, rel=0.5)
    with pytest.raises(ValueError, match="percent is 0 to 99, not 100"):
        machine.throttle(100)


@pytest.mark.parametrize(("percent", "factor"), [(0, 0), (80, 4), (95, 19)])
def test_an_unlimited_vcpu_is_throttled_too(make, monkeypatch, percent, factor):
    """After every batch it waits a multiple of the time that the batch took: here one second by the test's clock."""
    machine, ticks, waits = make(), count(), []
    machine.run(Uniform(seed=1))
    machine.throttle(percent)
    (runner,) = machine._runners
    monkeypatch.setattr(running, "monotonic", lambda: float(next(ticks)))

    def sleep(seconds):
        waits.append(seconds)
        runner._runner.wanted = len(waits) < 3

    runner._runner.sleep, runner._runner.wanted = sleep, True
    runner._run()
    assert waits == [factor] * 3
    assert runner.position == 3 * BATCH


def test_what_a_vcpu_fails_with_is_raised(make):
    machine = make()
    machine.run(Sequential())

    def fail(*_):
        raise OSError(14, "gpa 0x1 can't be handled")

    machine.vcpus[0].store = fail
    machine.resume()
    sleep(0.1)
    with pytest.raises(OSError, match="gpa 0x1 can't be handled"):
        machine.pause()
    machine.pause()


def test_what_needs_a_pause_says_so(make):
    machine = make()
    machine.run(Idle())
    machine.resume()
    for call in (machine.state, lambda: machine.step(1), lambda: machine.run(Idle()), lambda: machine.set_state(b"")):
        with pytest.raises(RuntimeError, match="the vCPUs are running"):
            call()
    machine.pause()
    with pytest.raises(ValueError, match="2 workloads, and 1 vCPUs"):
        machine.run(Idle(), Idle())


def test_a_flush_waits_for_a_batch_and_no_longer(make):
    """Flushes come with pages held, and vCPUs wait for pages: neither may wait for the other for ever."""
    machine = make(vcpus=2)
    machine.start_log()
    machine.run(Uniform(seed=1), Uniform(seed=2))
    machine.resume()
    harvesters = [Thread(target=lambda: [machine.dirty(slot).commit() for slot in (0, 1) * 20]) for _ in range(2)]
    start = monotonic()
    for thread in harvesters:
        thread.start()
    for thread in harvesters:
        thread.join(timeout=20)
        assert not thread.is_alive()
    machine.pause()
    assert monotonic() - start < 20


def test_values_land_in_order(make):
    machine = make()
    gpas = np.full(100_000, 0x4000_0000, dtype=np.int64)
    machine.vcpus[0].store(gpas, np.arange(100_000, dtype=np.uint64))
    assert machine.vcpus[0].load(gpas[:1]).tolist() == [99_999]


def test_pause_and_resume_in_quick_succession(make):
    """A thread that hasn't woken for the one mustn't miss the other."""
    machine = make(vcpus=2)
    machine.run(Uniform(seed=1), Idle())

    def toggle():
        for _ in range(2000):
            machine.resume()
            machine.pause()

    thread = Thread(target=toggle, daemon=True)
    thread.start()
    thread.join(timeout=60)
    assert not thread.is_alive()
    assert not machine.running


class Interrupt(BaseException):
    pass


def test_an_interrupt_of_a_close_leaves_no_thread(make, monkeypatch):
    """It comes while the first of three vCPUs is stopped, and is raised when all is given back."""
    machine, threads = make(vcpus=3), active_count()
    machine.run(Idle())
    machine.resume()
    close = machine._runners[0].close

    def interrupted():
        os.kill(os.getpid(), signal.SIGUSR1)
        close()

    def handler(number, frame):
        raise Interrupt

    monkeypatch.setattr(machine._runners[0], "close", interrupted)
    before = signal.signal(signal.SIGUSR1, handler)
    try:
        with pytest.raises(Interrupt):
            machine.close()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert active_count() == threads
    assert not machine.space.regions
    assert not machine.running
