"""Counterexamples on the real engine: its own threads, stepped by the generators' points; and shared leaves."""

import threading

import numpy as np
import pytest

from hwdbm import Stage2, pte, walker
from hwdbm.bitmap import DirtyBitmap
from hwdbm.dirtylog import Point
from hwdbm.dirtylog.log import DirtyLog
from hwdbm.races.mistakes import MISTAKES
from hwdbm.races.protocol import check
from hwdbm.races.protocols import PRODUCTION


class Guest:
    """A vCPU with a TLB of one entry, on the slot's real leaves, and memory of one page."""

    def __init__(self, log: DirtyLog) -> None:
        self.log, self.tlb, self.memory = log, None, 0

    def translate(self) -> None:
        self.tlb = int(self.log.stage2(0).level(3)[0])

    def store(self, value: int) -> None:
        """Write by the TLB's entry if that is dirty; otherwise look at memory again, and mark (D8.5)."""
        if self.tlb is None or not self.tlb & pte.S2AP_W:
            assert walker.guest_write(self.log.stage2(0), 0) is walker.Access.DONE
            self.translate()
        self.memory = value

    def flush(self, *_: object) -> None:
        self.tlb = None


class Turns:
    """Two threads that take turns in a given order."""

    def __init__(self, order: list[str]) -> None:
        self.order, self.at, self.changed = order, 0, threading.Condition()

    def take(self, name: str, step) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.at < len(self.order) and self.order[self.at] == name, 10)
            step()
            self.at += 1
            self.changed.notify_all()


def replayed(order: list[str], *, flushes: bool) -> bool:
    """Run GET and two stores in two threads in an order; return whether the second store is lost.

    The orders are those of the search's counterexamples, with a turn of the harvest from one point to the next.
    """
    log = DirtyLog(flush=lambda *at: guest.flush(*at) if flushes else None)
    guest = Guest(log)
    log.set_memory_region(slot=0, flags=1, guest_phys_addr=0, memory_size=4096, userspace_addr=0)
    log.map(0, gfn=0, npages=1, pfn=8)
    slot, copied = log.slot_log(0), []
    lease = slot._lease(0, 1)
    turns = Turns(order)

    def harvest() -> None:
        steps = slot.get_steps(lease, 0, 1)
        point = next(steps)
        while point is not Point.COPY:

            def to_next() -> None:
                nonlocal point
                point = next(steps)

            turns.take("S", to_next)
        turns.take("S", lambda: copied.append(guest.memory))
        list(steps)

    def vcpu() -> None:
        turns.take("vCPU", lambda: guest.store(1))
        turns.take("vCPU", lambda: guest.store(2))

    threads = [threading.Thread(target=each) for each in (harvest, vcpu)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(30)
    lease.commit()
    return copied != [2] and 0 not in log.get_dirty_log(0)


def test_the_order_that_loses_a_page_without_a_flush_loses_none_with_it():
    found = check(MISTAKES["no-flush"].make(True))
    visible = [at for at, step in enumerate(found.steps) if step.text.endswith("is visible")]
    copies = next(at for at, step in enumerate(found.steps) if step.text == "copies x")
    assert visible[0] < copies < visible[1]  # a store, the harvest, a store by the old translation
    order = ["vCPU", "S", "S", "S", "S", "vCPU"]
    assert replayed(order, flushes=False)
    assert not replayed(order, flushes=True)


@pytest.mark.parametrize("late", range(5))
def test_no_turn_of_the_second_store_loses_it(late):
    order = ["vCPU", *["S"] * late, "vCPU", *["S"] * (4 - late)]
    assert not replayed(order, flushes=True)


def pages() -> Stage2:
    s2 = Stage2(512, shared=True)
    s2.map(0, 512, pfn=0, dbm=True)
    return s2


def block(*, writable: bool = True) -> Stage2:
    s2 = Stage2(512, shared=True)
    s2.map(0, 512, pfn=0, level=2, writable=writable, dbm=writable)
    return s2


def is_dirty(s2: Stage2, *numbers: int) -> bool:
    """Return whether a harvest would find exactly these pages."""
    return s2.dirty().pages().tolist() == [*numbers]


def restricted(s2: Stage2) -> bool:
    """Return whether no leaf lets the guest write, and none has DBM."""
    return not s2.writable().any() and not s2.scan(pte.tracked).any()


# For a mistake: the leaves, what is done to them after the MMU's mark (the mistake has it come in between, where an
# atomic verb has no between), and what must hold then.
REPLAYED = {
    "young-by-plain-store": (pages, lambda s2: s2.mkyoung(), lambda s2: is_dirty(s2, 0)),
    "age-clears-dirty": (pages, lambda s2: s2.mkold(), lambda s2: is_dirty(s2, 0)),
    "protect-by-plain-store": (pages, lambda s2: s2.wrprotect(), lambda s2: is_dirty(s2, 0) and restricted(s2)),
    "protect-forgets": (pages, lambda s2: s2.clear_dbm(), lambda s2: is_dirty(s2, 0)),
    "dbm-stays": (pages, lambda s2: s2.wrprotect(), restricted),
    "replace-by-plain-store": (pages, lambda s2: s2.map(0, 8, pfn=999), lambda s2: is_dirty(s2, 0)),
    "replace-ignores": (pages, lambda s2: s2.unmap(0, 512), lambda s2: 0 in s2.host_dirty),
    "unmap-untold": (pages, lambda s2: s2.unmap(0, 512), lambda s2: 0 in s2.host_dirty and is_dirty(s2, 0)),
    "range-protect": (
        pages,
        lambda s2: s2.clean(DirtyBitmap.from_pages(np.array([1, 7]), 512)),
        lambda s2: is_dirty(s2, 0),
    ),
    "split-forgets": (block, lambda s2: s2.split(0, 512), lambda s2: is_dirty(s2, *range(512))),
    "split-grants": (
        block,
        lambda s2: (s2.wrprotect(), s2.split(0, 512)),
        lambda s2: restricted(s2) and is_dirty(s2, *range(512)),
    ),
    "collapse-forgets": (pages, lambda s2: s2.collapse(0, 512), lambda s2: 0 in s2.dirty()),
    "dbm-on-read-only": (
        lambda: block(writable=False),
        lambda s2: (s2.enable_dbm(), s2.set_dbm()),
        restricted,
    ),
}


@pytest.mark.parametrize("name", REPLAYED)
def test_verbs_of_shared_leaves_keep_what_the_mistake_loses(name):
    make, verb, holds = REPLAYED[name]
    assert not check(MISTAKES[name].make(True)).proved
    s2 = make()
    marked = walker.guest_write(s2, 0)
    assert marked is (walker.Access.PERMISSION if name == "dbm-on-read-only" else walker.Access.DONE)
    verb(s2)
    assert holds(s2)


@pytest.mark.parametrize("name", ["unmap-give", "age", "start", "device"])
def test_production_is_proved_on_shared_leaves(name):
    protocol = PRODUCTION[name](shared=True)
    assert protocol.slot.log.stage2.shared
    report = check(protocol)
    assert report.proved, report
    assert report.states == check(PRODUCTION[name]()).states


def test_a_harvest_of_shared_leaves_in_a_thread_loses_nothing():
    """The atomic kernel against a vCPU in another thread, on every page of a stripe."""
    s2, seen = Stage2(512, shared=True), DirtyBitmap(512)
    s2.map(0, 512, pfn=0, dbm=True)
    level3 = s2.level(3)

    def vcpu() -> None:
        for page in range(512):
            s2.mmu_update(3, np.array([page]), np.array([pte.S2AP_W], dtype=np.uint64))

    thread = threading.Thread(target=vcpu)
    thread.start()
    while thread.is_alive():
        s2.harvest_into(seen)
    thread.join()
    s2.harvest_into(seen)
    assert seen.weight() == 512
    assert not (level3 & pte.S2AP_W).any()
