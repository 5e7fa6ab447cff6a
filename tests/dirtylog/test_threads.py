"""Threads: disjoint ranges in parallel, bounded steps, and vCPUs that write while everything else goes on.

Every thread is joined with a limit: one that waits for ever is a failure, not a hang.
"""

import random
from contextlib import suppress
from itertools import product
from threading import Event, Lock, Thread

import numpy as np
import pytest
from logtools import live, make, pages_of, take, write

from hwdbm import DirtyBitmap, pte, walker
from hwdbm.errors import GfnError
from hwdbm.walker import Access

LIMIT = 30.0


def run(*calls):
    """Run each call in a thread of its own, and raise what any of them raised."""
    errors = []

    def guarded(call):
        try:
            call()
        except Exception as error:  # noqa: BLE001 - raised again where it is seen
            errors.append(error)

    threads = [Thread(target=guarded, args=(call,), daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
        assert not thread.is_alive(), "a thread waits for ever"
    if errors:
        raise errors[0]


# --- disjoint ranges ------------------------------------------------------------------------------------------


def filled(npages, base, seed, **kwargs):
    """A log whose stripes are holes, tables and blocks, many of them dirty."""
    log = make(npages, base=base, flags=0, ipa_bits=48, **kwargs)
    rng = np.random.default_rng(seed)
    for stripe in range(-(-base // 512), (base + npages) // 512):
        kind = rng.integers(4)
        if kind:
            log.map(0, stripe * 512, 512, stripe * 512, level=2 if kind == 1 else 3)
    log.set_memory_region(0, 1, base << 12, npages << 12, 0)
    s2 = log.stage2(0)
    for level in (2, 3):
        entries = s2.level(level)
        some = pte.writable_clean(level)(entries) & (rng.random(entries.size) < 0.2)
        entries[some] |= np.uint64(pte.S2AP_W)
    return log


@pytest.mark.parametrize("base", [0x200, 0x211])
def test_disjoint_syncs_in_parallel_are_one_sync(kernels, base):
    npages = 40_000 + 17
    serial, parallel = filled(npages, base, 1), filled(npages, base, 1)
    want = serial.stage2(0).dirty()
    serial.sync(0)
    assert live(serial) == want
    edges = [0, 64, 512, 1088, 10_048, 20_032, 20_096, 33_024, npages]  # not where blocks end
    ranges = list(zip(edges, np.diff(edges).tolist(), strict=False))
    run(*(lambda part=part: parallel.sync(0, *part) for part in ranges))
    # What one range saw of a block that reaches into another may have come after that one was done.
    assert live(parallel) | parallel.stage2(0).saved.bitmap == want
    for level in (1, 2, 3):
        assert np.array_equal(parallel.stage2(0).level(level), serial.stage2(0).level(level))
    parallel.verify()
    assert parallel.get_dirty_log(0) == want
    assert parallel.take_host_dirty(0) == serial.take_host_dirty(0)


def test_many_small_parts_in_several_threads(kernels):
    npages = 20_000
    log, parts = filled(npages, 0x233, 2), list(range(0, npages, 64))
    want = log.stage2(0).dirty()
    random.Random(3).shuffle(parts)

    def work(mine):
        for first in mine:
            log.sync(0, first, min(64, npages - first))

    run(*(lambda mine=parts[i::4]: work(mine) for i in range(4)))
    assert live(log) | log.stage2(0).saved.bitmap == want
    assert not log.stage2(0).scan(pte.dirty).any()


def test_gets_in_parallel_share_the_pages_out(kernels):
    """Each page goes to one of them: none to nobody."""
    log, got = filled(20_000, 0x233, 4, step_pages=64), []
    want = log.stage2(0).dirty()
    run(*([lambda: got.append(log.get_dirty_log(0))] * 3))
    union = got[0] | got[1] | got[2] | log.get_dirty_log(0)
    assert union == want


def test_clears_in_parallel():
    npages = 20_000
    log = filled(npages, 0x233, 5, manual_protect=True)
    shown = log.get_dirty_log(0)
    cleared = []

    def work(first):
        for start in range(first, npages, 4 * 64):
            count = min(64, npages - start)
            mask = b"\xff" * 8
            cleared.append((start, take(log.clear_dirty_log(0, start, count, mask, lease=True))))

    run(*(lambda first=first: work(first) for first in range(0, 256, 64)))
    union = DirtyBitmap(npages)
    for first, part in cleared:
        union.words[first >> 6 : (first >> 6) + 1] |= part.words
    assert union == shown
    assert not log.get_dirty_log(0).any()
    log.verify()


# --- bounded steps --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["get_dirty_log", "sync"])
def test_nobody_is_held_for_longer_than_a_step(verb):
    """A fault on the pages of a step waits for that step, and not for the others."""
    steps, go = [], {0: Event(), 64: Event(), 128: Event()}
    entered = {first: Event() for first in go}

    def hook(_slot, first, _npages):
        steps.append(first)
        entered[first].set()
        assert go[first].wait(LIMIT)

    log = make(192, base=0x40, step_pages=64)
    log.map(0, 0x40, 192, 0)
    write(log, 0, 64, 128)
    log._shared.flush = hook
    faults = []

    def fault(page):
        log.mark_dirty(0, page)
        faults.append(page)

    main = Thread(target=getattr(log, verb), args=(0,), daemon=True)
    main.start()
    assert entered[0].wait(LIMIT)
    run(lambda: fault(70))  # of a step to come: at once
    waiter = Thread(target=fault, args=(5,), daemon=True)
    waiter.start()
    waiter.join(0.05)
    assert faults == [70]
    go[0].set()
    waiter.join(LIMIT)  # while the second step is under way
    assert entered[64].wait(LIMIT)
    assert main.is_alive()
    assert faults == [70, 5]
    run(lambda: fault(6))
    go[64].set()
    go[128].set()
    main.join(LIMIT)
    assert not main.is_alive()
    assert steps == [0, 64, 128]
    assert {5, 6} <= set(pages_of(live(log)))


def test_a_whole_slot_operation_gets_its_turn_between_two_steps():
    order, inside, go = [], Event(), Event()

    def hook(_slot, first, npages):
        order.append((first, npages))
        inside.set()
        assert go.wait(LIMIT)

    log = make(192, base=0x40, step_pages=64)
    log.map(0, 0x40, 192, 0)
    write(log, 0, 64, 128)
    log._shared.flush = hook
    result = []
    main = Thread(target=lambda: result.append(log.get_dirty_log(0)), daemon=True)
    main.start()
    assert inside.wait(LIMIT)
    mover = Thread(target=log.set_memory_region, args=(0, 1, 0x4000 << 12, 192 << 12, 0), daemon=True)
    mover.start()
    while len(log._slots[0]._lock) < 2:
        mover.join(0.001)
    go.set()
    for thread in (main, mover):
        thread.join(LIMIT)
        assert not thread.is_alive()
    assert order[:2] == [(0, 64), (0, 192)]  # one step, then the move
    assert pages_of(result[0]) == [0, 64, 128]  # and what it found in the leaves was not lost


def test_a_slot_that_is_deleted_meanwhile():
    inside, go = Event(), Event()

    def hook(*_):
        inside.set()
        assert go.wait(LIMIT)

    log = make(192, base=0x40, step_pages=64)
    log.map(0, 0x40, 192, 0)
    write(log, 0, 64, 128)
    log._shared.flush = hook
    errors = []

    def get():
        try:
            log.get_dirty_log(0)
        except OSError as error:
            errors.append(str(error))

    main = Thread(target=get, daemon=True)
    main.start()
    assert inside.wait(LIMIT)
    killer = Thread(target=log.set_memory_region, args=(0, 0, 0, 0, 0), daemon=True)
    killer.start()
    while len(log._slots[0]._lock) < 2:
        killer.join(0.001)
    go.set()
    for thread in (main, killer):
        thread.join(LIMIT)
        assert not thread.is_alive()
    assert errors == ["[Errno 2] slot 0 was deleted"]


# --- vCPUs ----------------------------------------------------------------------------------------------------


class VCPU:
    """A thread that writes pages: through its TLB if it can, else by a walk with the pages' leaves held."""

    def __init__(self, machine, seed):
        self.machine, self.tlb, self.lock = machine, set(), Lock()
        self.choose = random.Random(seed)

    def run(self):
        while not self.machine.stop.is_set():
            hot = self.choose.random() < 0.7
            self.store(self.choose.randrange(40 if hot else self.machine.npages))

    def store(self, page):
        while not self.cached(page):
            log, fault = self.machine.log, None
            with log.locked(0, page, 1) as s2:
                gfn = s2.base_gfn + page
                access = walker.guest_write(s2, gfn, hd=log.hw_dbm)
                if access is Access.DONE:
                    with self.lock:
                        self.tlb.add(page)
                else:
                    fault = gfn
            if fault is not None:
                with suppress(OSError, GfnError):  # unmapped or moved since: walk again
                    log.write_fault(0, fault, page if access is Access.TRANSLATION else None)

    def cached(self, page):
        with self.lock:
            if page in self.tlb:
                self.machine.memory[page] += 1
                return True
            return False


class Machine:
    """vCPUs, a migration that copies and at times fails, a host, and whatever else is given, until it is stopped."""

    def __init__(self, npages=1500, vcpus=3, **kwargs):
        self.npages, self.stop = npages, Event()
        self.memory, self.copied = np.zeros(npages, np.int64), np.zeros(npages, np.int64)
        self.log = make(npages, base=0x40, flush=self.flush, **kwargs)
        self.vcpus = [VCPU(self, seed) for seed in range(vcpus)]
        self.rounds = 0

    def flush(self, _slot, first, npages):
        for vcpu in self.vcpus:
            with vcpu.lock:
                vcpu.tlb -= {page for page in vcpu.tlb if first <= page < first + npages}

    def copy(self, pages):
        index = pages.pages()
        self.copied[index] = self.memory[index]

    def migrate(self):
        choose = random.Random(7)
        while self.rounds < 40 or self.memory.sum() < 1000:
            self.stop.wait(0.002)
            if self.log.manual_protect:
                self.log.get_dirty_log(0)
                first = choose.randrange(0, self.npages, 64)
                first, count = (0, self.npages) if choose.random() < 0.5 else (first, min(64, self.npages - first))
                lease = self.log.clear_dirty_log(0, first, count, b"\xff" * (8 * -(-count // 64)), lease=True)
            else:
                lease = self.log.get_dirty_log(0, lease=True)
            if choose.random() < 0.3:
                lease.rollback()
            else:
                index = lease.bitmap.pages() + lease.first_page
                self.copied[index] = self.memory[index]
                lease.commit()
            self.rounds += 1
        self.stop.set()

    def until_stopped(self, call):
        def loop():
            count = 0
            while not self.stop.is_set():
                call(count)
                count += 1
                self.stop.wait(0.005)

        return loop

    def finish(self):
        """Stop, take what is left, and compare the guest's memory with the copy."""
        self.log.verify()
        self.log.sync(0)
        self.copy(take(self.log.clear_dirty_log(0, 0, self.npages, ~DirtyBitmap(self.npages), lease=True)))
        lost = np.flatnonzero(self.memory != self.copied)
        assert not lost.size, f"lost writes to pages {lost[:9].tolist()}"
        assert self.memory.any()


# Half of them here: those have every two that go together. `make slow` has the others.
STEPS = ((None, 1), (64, 1), (64, 3))
WAYS = [
    pytest.param(hw, manual, *STEPS[how], marks=[pytest.mark.slow] if (hw + manual + how) % 2 else [])
    for hw, manual, how in product((True, False), (False, True), range(3))
]


@pytest.mark.parametrize(("hw", "manual", "step", "workers"), WAYS)
@pytest.mark.alike(2)
def test_vcpus_and_a_migration(hw, manual, step, workers):
    machine = Machine(hw_dbm=hw, manual_protect=manual, step_pages=step, workers=workers)
    machine.log.map(0, 0x40, machine.npages, 0)
    run(machine.migrate, *(vcpu.run for vcpu in machine.vcpus))
    machine.finish()


@pytest.mark.parametrize("hw", [True, False])
@pytest.mark.alike(2)
def test_vcpus_and_everything_at_once(hw):
    machine = Machine(hw_dbm=hw, step_pages=128)
    log = machine.log
    log.map(0, 0x40, machine.npages, 0)
    places = [0x40, 0x41, 0x1000]

    def move(count):
        log.set_memory_region(0, 1, places[count % 3] << 12, machine.npages << 12, 0)

    def unmap(count):
        with suppress(GfnError):  # it moved meanwhile
            log.unmap(0, log.slot(0).base_gfn + count * 7 % 1400, 100)

    run(
        machine.migrate,
        *(vcpu.run for vcpu in machine.vcpus),
        machine.until_stopped(lambda count: log.set_hw_dirty_log(bool(count & 1))),
        machine.until_stopped(move),
        machine.until_stopped(unmap),
        machine.until_stopped(lambda count: log.sync(0, count * 64 % 1024, 64)),
        machine.until_stopped(lambda _: log.take_host_dirty(0)),
        machine.until_stopped(lambda _: log.verify()),
    )
    machine.finish()


def test_the_vcpus_catch_a_flush_that_is_left_out():
    """What the threads are there for: without its flush a GET hands out pages that vCPUs go on writing."""
    machine = Machine(vcpus=2)
    machine.log.map(0, 0x40, machine.npages, 0)
    machine.log._shared.flush = None
    run(machine.migrate, *(vcpu.run for vcpu in machine.vcpus))
    with pytest.raises(AssertionError, match="lost writes"):
        machine.finish()
