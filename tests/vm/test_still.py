"""A VM that several pause, each for its own reasons."""

import threading

import pytest

from hwdbm.memslot import Memslot
from hwdbm.vm import MemoryMap, PlainGuest
from hwdbm.vm import still as module
from hwdbm.vm.still import still, turn_of


@pytest.fixture
def vm():
    guest = PlainGuest(MemoryMap(4096, (Memslot(0, 0, 0, 4, 0),)))
    yield guest
    guest.close()


@pytest.mark.parametrize("ran", [True, False])
def test_it_goes_on_if_it_ran(vm, ran):
    if ran:
        vm.resume()
    with still(vm):
        assert not vm.running
        with still(vm):
            assert not vm.running
        assert not vm.running
    assert vm.running == ran
    with pytest.raises(KeyError), still(vm):
        raise KeyError
    assert vm.running == ran


def test_who_pauses_it_for_good_waits_and_it_stays_paused(vm):
    """A migration's last pass begins while a snapshot has the guest paused: nobody resumes it after that."""
    vm.resume()
    paused, asked = threading.Event(), threading.Event()

    def migrate() -> None:
        asked.set()
        with turn_of(vm):
            vm.pause()
            paused.set()

    with still(vm):
        thread = threading.Thread(target=migrate)
        thread.start()
        asked.wait(5)
        assert not paused.wait(0.05)
    thread.join(5)
    assert paused.is_set()
    assert not vm.running
    with still(vm):
        pass
    assert not vm.running


def test_each_vm_has_a_turn_of_its_own_and_it_goes_with_it(vm):
    other = PlainGuest(MemoryMap(4096, (Memslot(0, 0, 0, 4, 0),)))
    assert turn_of(vm) is turn_of(vm)
    assert turn_of(vm) is not turn_of(other)
    before = len(module._turns)
    other.close()
    del other
    assert len(module._turns) == before - 1


def test_a_vm_that_no_weak_dictionary_takes():
    class Slotted:
        __slots__ = ()

    assert turn_of(Slotted()) is turn_of(Slotted())
