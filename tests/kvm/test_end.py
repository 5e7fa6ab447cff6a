"""The end of a KvmVm: closed, forked, interrupted, forgotten; and arguments that are refused."""

import base64
import gc
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from errno import EBUSY, ENOENT

import numpy as np
import pytest
from effort import EFFORT
from leaks import descriptors, vcpu_threads

from hwdbm.errors import BitmapError, ClosedError
from hwdbm.kvm import KvmVm
from hwdbm.memslot import Memslot
from hwdbm.vm import Shareable

BASE, PAGE, SIZE = 0x4000_0000, 4096, (1 << 20) + 13 * 4096
NPAGES = SIZE // PAGE
Make = Callable[..., KvmVm]
MODES = {"bitmap": {}, "clear": {"manual_protect": "on"}, "ring": {"ring": 256}}

VERBS: dict[str, Callable[[KvmVm], object]] = {
    "slots": lambda vm: vm.slots,
    "vcpus": lambda vm: vm.vcpus,
    "pages": lambda vm: vm.pages,
    "iteration": lambda vm: vm.iteration,
    "memory": lambda vm: vm.memory(0),
    "read": lambda vm: vm.read(BASE, 1),
    "write": lambda vm: vm.write(BASE, b"a"),
    "digest": KvmVm.digest,
    "start_log": KvmVm.start_log,
    "stop_log": KvmVm.stop_log,
    "dirty": lambda vm: vm.dirty(0),
    "client": lambda vm: vm.client("a"),
    "mark_imported": lambda vm: vm.mark_imported(0, 0, 1),
    "resume": KvmVm.resume,
    "pause": KvmVm.pause,
    "throttle": lambda vm: vm.throttle(1),
    "check": KvmVm.check,
    "prove": KvmVm.prove,
    "state": KvmVm.state,
    "set_state": lambda vm: vm.set_state(b""),
}


class InterruptError(Exception):
    pass


def test_every_verb_is_in_the_table() -> None:
    public = {name for name in dir(KvmVm) if not name.startswith("_")}
    assert public - VERBS.keys() == {"close", "from_slots", "kind", "running"}


def test_a_closed_vm_says_so(make: Make) -> None:
    vm = make(SIZE)
    vm.start_log()
    client = vm.client("backup")
    vm.close()
    vm.close()
    for verb in VERBS.values():
        with pytest.raises(ClosedError, match="the KvmVm is closed"):
            verb(vm)
    with pytest.raises(ClosedError):
        client.take(0)
    client.close()
    assert not vm.running


@pytest.mark.parametrize("mode", MODES)
def test_a_child_touches_nothing_of_its_parents(make: Make, mode: str) -> None:
    vm = make(SIZE, vcpus=2, **MODES[mode])
    vm.start_log()
    vm.resume()
    child = os.fork()
    if child == 0:
        refused = 0
        for verb in VERBS.values():
            try:
                verb(vm)
            except ClosedError:
                refused += 1
        vm.close()
        os._exit(0 if refused == len(VERBS) else 1)
    assert os.waitpid(child, 0)[1] == 0
    vm.prove()  # it goes on
    vm.pause()
    assert vm.read(BASE, 1) != b"\0"
    with vm.dirty(0) as lease:
        assert lease.bitmap.any()


def test_one_that_is_forgotten_is_closed(make: Make) -> None:
    threads, before = vcpu_threads(), descriptors()

    def forget() -> None:
        vm = KvmVm(SIZE, vcpus=2)
        vm.resume()
        del vm
        gc.collect()

    make(PAGE, guest="idle").close()
    with pytest.warns(ResourceWarning, match="was never closed"):
        forget()
    assert (vcpu_threads(), descriptors()) == (threads, before)


def test_one_that_could_not_be_made_leaves_nothing(make: Make) -> None:
    make(PAGE, guest="idle").close()
    before = descriptors()
    for options in ({"ring": 100}, {"vcpus": 0}, {"base": 0x1_0000}, {"vcpus": 100_000}):
        with pytest.raises((OSError, ValueError)):
            KvmVm(1 << 20, **options)
    gc.collect()
    assert descriptors() == before


@pytest.mark.parametrize("mode", MODES)
def test_clients_take_nothing_from_each_other(make: Make, mode: str) -> None:
    vm = make(SIZE, guest="idle", **MODES[mode])
    assert isinstance(vm, Shareable)
    with pytest.raises(OSError, match="start_log comes first") as raised:
        vm.client("early")
    assert raised.value.errno == ENOENT
    vm.start_log()
    with vm.client("migration") as one, vm.client("snapshot") as two, vm.client("statistics") as three:
        with pytest.raises(OSError, match="has a client 'snapshot' already") as raised:
            vm.client("snapshot")
        assert raised.value.errno == EBUSY
        vm.write(BASE + 64 * PAGE, b"a")
        one.take(0).rollback()
        for take in (one.take, two.take, one.take, vm.dirty, three.take):
            with take(0) as lease:
                again = take == one.take and one.feeds[0].epoch == 1
                assert lease.bitmap.pages().tolist() == ([] if again else [64])
        vm.stop_log()
        vm.start_log()
        with two.take(0) as lease:
            assert (lease.broken, lease.bitmap.weight()) == ("the slot's log was switched off", SIZE // PAGE)
    vm.stop_log()


@pytest.mark.parametrize("wrong", [1.0, "1", True, np.float64(1), np.zeros(1, dtype=np.int64)])
def test_other_types_are_refused_and_nothing_changes(make: Make, wrong: object) -> None:
    vm = make(SIZE, guest="idle")
    vm.start_log()
    vm.write(BASE + 70 * PAGE, b"abc")
    digest = vm.digest()
    for call in (
        lambda: vm.memory(wrong),
        lambda: vm.dirty(wrong),
        lambda: vm.read(wrong, 1),
        lambda: vm.read(BASE, wrong),
        lambda: vm.write(wrong, b"a"),
        lambda: vm.mark_imported(wrong, 0, 1),
        lambda: vm.mark_imported(0, wrong, 1),
        lambda: vm.mark_imported(0, 0, wrong),
        lambda: vm.throttle(wrong),
        lambda: setattr(vm, "iteration", wrong),
        lambda: KvmVm(wrong),
        lambda: KvmVm(SIZE, vcpus=wrong),
        lambda: KvmVm(SIZE, ring=wrong),
        lambda: KvmVm(SIZE, seed=wrong),
        lambda: KvmVm(SIZE, base=wrong),
    ):
        with pytest.raises(TypeError, match="is an integer, not"):
            call()
    for call in (lambda: vm.write(BASE, "text"), lambda: vm.set_state("text"), lambda: KvmVm(SIZE, rate="1")):
        with pytest.raises(TypeError):
            call()
    with pytest.raises(BitmapError):
        vm.mark_imported(0, NPAGES, 1)
    assert vm.digest() == digest
    with vm.dirty(0) as lease:
        assert lease.bitmap.pages().tolist() == [70]


def test_numpy_integers_are_as_good(make: Make) -> None:
    vm = make(np.uint32(SIZE), vcpus=np.int8(2), rate=np.float32(1000), seed=np.uint64(3), base=np.uint64(BASE))
    vm.start_log()
    vm.mark_imported(np.uint8(0), np.int16(5), np.uint64(2))
    with vm.dirty(np.int64(0)) as lease:
        assert {5, 6} <= set(lease.bitmap.pages().tolist())
    vm.throttle(np.uint8(10))


def test_a_state_that_is_refused_changes_nothing(make: Make) -> None:
    vm = make(SIZE)
    vm.resume()
    time.sleep(0.01)
    vm.pause()

    def registers() -> list[bytes]:
        return [vm.vcpus[0].get(name) for name in ("regs", "sregs", "fpu", "mp_state")]

    before, known = vm.state(), registers()
    for broken in (before.replace(b'"format":1', b'"format":2'), before[:-1], b"[" * 100_000, b"{}", b""):
        with pytest.raises(ValueError, match="state"):
            vm.set_state(broken)
    assert registers() == known
    huge = json.loads(before)
    huge["vcpus"][0]["msrs"][-1][1] = 1 << 64
    with pytest.raises(ValueError, match="no pairs of numbers"):
        vm.set_state(json.dumps(huge).encode())
    # The kernel refuses CR0.PG without CR0.PE, after other registers were set.
    sregs = bytearray(base64.b64decode(json.loads(before)["vcpus"][0]["sregs"]))
    sregs[224:232] = (1 << 31).to_bytes(8, "little")
    refused = json.loads(before)
    refused["vcpus"][0]["sregs"] = base64.b64encode(sregs).decode()
    with pytest.raises(ValueError, match="the kernel refuses the state's sregs"):
        vm.set_state(json.dumps(refused).encode())
    assert registers() == known
    vm.resume()
    vm.prove()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # one that came in a finalizer
@pytest.mark.parametrize("mode", MODES)
def test_interrupts_lose_nothing_and_leave_nothing(make: Make, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A handler raises at any moment of any verb; the copy that follows the log is right, and the VM can be closed."""
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)  # pytest's own allocates, where the next one may come
    vm = make(SIZE, rate=50_000, **MODES[mode])
    threads, rng, fired, turns = vcpu_threads(), random.Random(1), 0, 150 * EFFORT

    def handler(*_: object) -> None:
        nonlocal fired
        fired += 1
        raise InterruptError

    memory, copy = vm.memory(0).reshape(-1, PAGE), np.zeros((NPAGES, PAGE), dtype=np.uint8)

    def follow() -> None:
        with vm.dirty(0) as lease:
            pages = lease.bitmap.pages()
            copy[pages] = memory[pages]

    verbs = [vm.resume, vm.pause, vm.start_log, follow, follow, follow, lambda: vm.throttle(10)]
    vm.start_log()
    before = signal.signal(signal.SIGALRM, handler)
    try:
        for turn in range(turns):
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-6, 1e-3))
                rng.choice(verbs)()
                while fired == turn:
                    pass
            except InterruptError:
                pass
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert fired == turns
    gc.collect()
    vm.pause()
    follow()
    assert np.array_equal(copy, memory)
    vm.check()
    vm.close()
    assert vcpu_threads() == threads


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_an_interrupt_of_a_close_closes(make: Make) -> None:
    make(PAGE, guest="idle").close()
    before, rng = descriptors(), random.Random(2)

    def handler(*_: object) -> None:
        raise InterruptError

    old = signal.signal(signal.SIGALRM, handler)
    try:
        for _ in range(20 * EFFORT):
            vm = KvmVm(SIZE)
            vm.resume()
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-6, 2e-3))
                vm.close()
                time.sleep(1)
            except InterruptError:
                pass
            vm.close()
            assert vcpu_threads() == 0
            del vm
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    gc.collect()
    assert descriptors() == before


def test_slots_of_another_type(make: Make) -> None:
    make(PAGE, guest="idle")
    with pytest.raises(OSError, match="slot 1") as raised:
        KvmVm.from_slots(PAGE, [Memslot(0, 0, 16, 8, 0), Memslot(1, 0, 17, 8, 0)])
    assert raised.value.errno == 17
