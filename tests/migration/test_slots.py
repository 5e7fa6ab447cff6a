"""How the work grows with the number of slots: with it, and no faster."""

import sys
import threading
from collections.abc import Callable

import pytest

from hwdbm.machine import Machine
from hwdbm.memslot import Memslot
from hwdbm.migration import Settings, migrate
from hwdbm.migration.report import Report
from hwdbm.vm import MemoryMap, PlainGuest, Source

FEW, MANY = 64, 256


def layout(count: int) -> MemoryMap:
    return MemoryMap(4096, tuple(Memslot(number, 0, 2 * number, 1, 0) for number in range(count)))


def machine(memory: MemoryMap) -> Machine:
    vm = Machine()
    for slot in memory.slots:
        vm.add_memslot(slot.npages << 12, slot.base_gfn << 12, slot=slot.id)
    return vm


def placed_by_themselves(count: int) -> Machine:
    vm = Machine()
    for _ in range(count):
        vm.add_memslot(4096)
    return vm


def calls(work: Callable[[], object]) -> int:
    """Return how many functions, generators and builtins are entered, in this thread and in those that begin."""
    entered = [0]

    def profile(_frame: object, event: str, _: object) -> None:
        entered[0] += event in {"call", "c_call"}

    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return entered[0]


def logged(vm: Source) -> None:
    vm.start_log()
    for slot in vm.slots:
        vm.memory(slot.id)
        with vm.dirty(slot.id):
            pass
    vm.digest()
    vm.stop_log()


WORK = {
    "layout": layout,
    "layout on the wire": lambda count: MemoryMap.from_bytes(layout(count).to_bytes()),
    "layouts compared": lambda count: layout(count).require(layout(count)),
    "memory": lambda count: PlainGuest(layout(count)).close(),
    "machine": lambda count: machine(layout(count)).close(),
    "machine that places its slots": lambda count: placed_by_themselves(count).close(),
    "log of memory": lambda count: logged(PlainGuest(layout(count))),
    "log of a machine": lambda count: logged(machine(layout(count))),
}


@pytest.mark.parametrize("what", WORK)
def test_the_work_grows_no_faster_than_the_slots(what: str) -> None:
    work = WORK[what]
    work(FEW)
    few, many = (calls(lambda count=count: work(count)) for count in (FEW, MANY))
    assert many <= 1.2 * few * MANY / FEW, (few, many)


@pytest.mark.parametrize("make", [PlainGuest, machine])
@pytest.mark.alike(2)
def test_a_migration_does_too(inside, make: Callable[[MemoryMap], Source]) -> None:
    def work(count: int) -> Report:
        receiver = inside(make)
        vm = make(layout(count))
        with receiver.channel:
            report = migrate(vm, receiver.channel, Settings(max_downtime=60))
        receiver.join().received.destination.close()
        vm.close()
        return report

    assert work(FEW).status == "completed"
    few, many = (calls(lambda count=count: work(count)) for count in (FEW, MANY))
    assert many <= 1.3 * few * MANY / FEW, (few, many)
