"""Clients of every VM: each has all writes of its own; and a migration beside snapshots and statistics."""

import linecache
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import numpy as np
import pytest
from migrationvm import LAYOUT, FakeVm

from hwdbm.arm import ArmUnavailableError, ArmVm
from hwdbm.errors import StaleLeaseError
from hwdbm.granule import Granule
from hwdbm.kvm import Kvm, KvmUnavailableError, KvmVm
from hwdbm.machine import Machine, parse
from hwdbm.memslot import Memslot
from hwdbm.migration import Settings, migrate
from hwdbm.snapshot import Recorder
from hwdbm.vm import MemoryMap, PlainGuest, Source

SOON = Settings(max_downtime=0.01, max_iterations=4, on_limit="pause")
SIZE, BASE = 4 << 20, 0x4000_0000


def machine(layout: MemoryMap | None = None, **options: object) -> Machine:
    made = Machine(**options)
    made.add_memslot(SIZE, BASE)
    if layout is None:
        made.run(parse("uniform,rate=20k", 3))
    return made


def kvm(layout: MemoryMap | None = None, **options: object) -> KvmVm:
    try:
        Kvm().close()
    except KvmUnavailableError as error:
        pytest.skip(str(error))
    if layout is not None:
        return KvmVm.from_slots(layout.page_size, layout.slots)
    return KvmVm(SIZE, guest="random", rate=20_000, **options)


def plain(layout: MemoryMap | None = None) -> PlainGuest:
    return FakeVm() if layout is None else PlainGuest(layout)


def arm(layout: MemoryMap | None = None, **options: object) -> ArmVm:
    try:
        if layout is not None:
            return ArmVm.from_slots(layout.page_size, layout.slots)
        return ArmVm(SIZE, guest="mixed", vcpus=3, rate=20_000, **options)
    except ArmUnavailableError as error:
        pytest.skip(str(error))


SOURCES: dict[str, tuple[Callable[..., Source], dict[str, object]]] = {
    "plain": (plain, {}),
    "machine": (machine, {}),
    "machine, write-protected": (machine, {"hw_dbm": False}),
    "machine, manual": (machine, {"manual_protect": True}),
    "machine, full": (machine, {"manual_protect": True, "initially_set": True}),
    "kvm bitmap": (kvm, {}),
    "kvm clear": (kvm, {"manual_protect": "on"}),
    "kvm full": (kvm, {"manual_protect": "initially-set"}),
    "kvm ring": (kvm, {"ring": 4096}),
    "arm": (arm, {}),
    "arm, 16K": (arm, {"granule": Granule.K16}),
    "arm, blocks": (arm, {"blocks": True}),
}


def memories(vm: Source) -> dict[int, np.ndarray]:
    return {slot.id: vm.memory(slot.id).reshape(-1, vm.page_size) for slot in vm.slots}


class Copier:
    """A client with a copy of its own: what it takes it copies, or fails to."""

    def __init__(self, vm: Source, name: str) -> None:
        self.vm, self.client, self.takes, self.seen = vm, vm.client(name), 0, 0
        self.copy = {slot_id: memory.copy() for slot_id, memory in memories(vm).items()}  # after it has come

    def take(self, fails: bool = False) -> None:
        self.takes += 1
        for slot_id, memory in memories(self.vm).items():
            lease = self.client.take(slot_id)
            assert not lease.broken
            pages = lease.bitmap.pages()
            self.seen += pages.size
            if fails:
                lease.rollback()
                continue
            self.copy[slot_id][pages] = memory[pages]
            lease.commit()

    def right(self) -> bool:
        return all((self.copy[slot_id] == memory).all() for slot_id, memory in memories(self.vm).items())


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.alike(2)
def test_three_clients_of_a_guest_that_runs(name: str) -> None:
    make, options = SOURCES[name]
    vm = make(**options)
    try:
        vm.start_log()
        vm.resume()
        copiers = [Copier(vm, each) for each in ("backup", "statistics", "snapshot")]
        for turn in range(10_000):
            copiers[0].take()
            if turn >= 24 and copiers[0].seen:  # a guest that was kept waiting has written, too
                break
            if turn % 3 == 0:
                copiers[1].take(fails=turn % 2 == 0)
            if turn % 8 == 0:
                copiers[2].take()
            if turn == 12:
                for slot in vm.slots:  # and KVM's own
                    vm.dirty(slot.id).commit()
            threading.Event().wait(0.005)
        vm.pause()
        for copier in copiers:
            copier.take(fails=True)
            copier.take()
            assert copier.right()
            assert copier.seen > 0
            seen = copier.seen
            copier.take()
            assert copier.seen == seen
            copier.client.close()
    finally:
        vm.close()


@pytest.mark.parametrize(
    "name",
    ["plain", "machine", "machine, write-protected", "kvm bitmap", "kvm clear", "kvm ring", "arm",
     pytest.param("arm, 16K", marks=pytest.mark.slow)],
)  # fmt: skip
@pytest.mark.alike(2)
def test_a_migration_beside_snapshots_and_statistics(name: str, inside, tmp_path) -> None:
    make, options = SOURCES[name]
    vm = make(**options)
    over, errors = threading.Event(), []
    try:
        vm.start_log()
        vm.resume()
        statistics = Copier(vm, "statistics")
        with Recorder(vm, tmp_path / "chain", digest=True) as recorder:
            recorder.save()

            def snapshots() -> None:
                try:
                    while not over.wait(0.01):
                        recorder.diff()
                        statistics.take()
                except BaseException as error:  # noqa: BLE001 - for the test to raise
                    errors.append(error)

            beside = threading.Thread(target=snapshots)
            beside.start()
            other = inside(make)
            report = migrate(vm, other.channel, SOON)
            there = other.join().received.destination
            there.pause()
            over.set()
            beside.join(20)
            assert not errors
            assert not vm.running
            assert report.source_sha256 == report.destination_sha256 == vm.digest()
            last = recorder.diff()
            statistics.take()
            assert statistics.right()
            assert last.digest == vm.digest()
            assert recorder.chain.check(whole=True) == []
            with PlainGuest(MemoryMap.of(vm)) as again:
                recorder.chain.restore(again)
                assert again.digest() == vm.digest()
        statistics.client.close()
        there.close()
    finally:
        over.set()
        vm.close()


# --- interrupts ----------------------------------------------------------------------------------------------


class InterruptError(BaseException):
    pass


@contextmanager
def interrupted_at(line: int) -> Iterator[list[bool]]:
    """Raise before the n-th line that runs of what clients are made of."""
    left, came = [line], list[bool]()

    def trace(frame, event, _):
        if not frame.f_code.co_filename.endswith(("vm/base.py", "dirtylog/client.py", "dirtylog/lease.py")):
            return None
        # The end of a with block counts as its first line, too: no signal comes between that and the lock's release.
        text = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
        if event == "line" and not came and not text.startswith("with "):
            left[0] -= 1
            if left[0] < 0:
                came.append(True)
                raise InterruptError
        return trace

    # pytest's own hook would keep what a finalizer raised, and with it the lease.
    before, hook, sys.unraisablehook = sys.gettrace(), sys.unraisablehook, lambda _: None
    sys.settrace(trace)
    try:
        yield came
    except InterruptError:
        pass
    finally:
        sys.settrace(before)
        sys.unraisablehook = hook


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("verb", ["take", "fail", "forget", "default", "join", "write", "off and on"])
def test_an_interrupt_at_every_line_loses_nothing(verb: str) -> None:
    layout = MemoryMap(4096, (Memslot(0, 0, 0x40000, 130, 0),))
    for line in range(1000):
        guest = PlainGuest(layout)
        guest.start_log()
        one, two = guest.client("one"), guest.client("two")
        copies = {each: memories(guest)[0].copy() for each in (one.name, two.name, "default")}
        takes = {one.name: one.take, two.name: two.take, "default": guest.dirty}

        def copy(name: str, guest=guest, copies=copies, takes=takes) -> None:
            with takes[name](0) as lease:
                pages = lease.bitmap.pages()
                copies[name][pages] = memories(guest)[0][pages]

        for page in (3, 64, 129):
            guest.write((0x40000 + page) * 4096, b"a")
        with interrupted_at(line) as came:
            if verb in ("take", "default"):
                copy("default" if verb == "default" else "one")
            elif verb == "fail":
                one.take(0).rollback()
            elif verb == "forget":
                one.take(0)
            elif verb == "join":
                guest.client("three")
            elif verb == "write":
                guest.write((0x40000 + 70) * 4096, b"b")
            else:
                guest.stop_log()
                guest.start_log()
        guest.start_log()
        if verb != "off and on":
            guest.client("three").close()  # its name is free, whatever became of it
        for name in takes:
            for _ in range(2):
                with suppress(StaleLeaseError):
                    copy(name)
            if verb != "off and on" or name != "default":  # whose bits go with the log
                assert (copies[name] == memories(guest)[0]).all(), f"{name} lost a write, interrupted at line {line}"
        for client in (one, two):
            client.close()
        guest.close()
        if not came:
            assert line > 5
            return
    pytest.fail("it never came to its end")


def test_the_layout_of_these_tests_is_ragged() -> None:
    assert any(slot.npages % 64 for slot in LAYOUT.slots)
