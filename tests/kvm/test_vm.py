"""KvmVm: the log in each of its modes, starts and stops, and what is left of it."""

import threading
import time
from collections.abc import Callable
from errno import EINVAL, EIO, ENOENT, EOVERFLOW
from pathlib import Path

import numpy as np
import pytest

from hwdbm.errors import StaleLeaseError
from hwdbm.kvm import GuestExitError, Kvm, KvmVm, PatternError, abi
from hwdbm.kvm.ring import GFN, DirtyRing
from hwdbm.vm import MemoryMap, Source, memory_digest

MODES = {
    "get": {},
    "clear": {"manual_protect": "on"},
    "initially-set": {"manual_protect": "initially-set"},
    "ring": {"ring": 4096},
    "tiny-ring": {"ring": 256},
}
BASE, PAGE, SIZE = 0x4000_0000, 4096, (1 << 20) + 13 * 4096  # a ragged number of pages
NPAGES = SIZE // PAGE
Make = Callable[..., KvmVm]


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> dict[str, object]:
    return MODES[request.param]


@pytest.fixture
def idle(make: Make, mode: dict[str, object]) -> KvmVm:
    """Return an idle VM that logs, and has nothing dirty."""
    vm = make(SIZE, guest="idle", **mode)
    vm.start_log()
    first = len(dirty(vm))
    assert first == (NPAGES if mode.get("manual_protect") == "initially-set" else 0)
    return vm


def wall_clock(vm: KvmVm, page: int) -> None:
    vm.vcpus[0].set_msr(abi.MSR_KVM_WALL_CLOCK_NEW, BASE + page * PAGE)


def dirty(vm: KvmVm) -> list[int]:
    with vm.dirty(0) as lease:
        return lease.bitmap.pages().tolist()


# --- the log -----------------------------------------------------------------------------------------------


def test_the_log_is_what_was_written(idle: KvmVm) -> None:
    rng = np.random.default_rng(4)
    for _ in range(5):
        pages = sorted({*rng.integers(0, NPAGES, 40).tolist(), NPAGES - 1})
        for page in pages:
            wall_clock(idle, page)
        assert dirty(idle) == pages
        assert dirty(idle) == []


def test_a_lease_that_was_rolled_back_is_in_the_next(idle: KvmVm) -> None:
    wall_clock(idle, 3)
    wall_clock(idle, 70)
    lease = idle.dirty(0)
    wall_clock(idle, 71)
    lease.rollback()
    assert dirty(idle) == [3, 70, 71]
    wall_clock(idle, 5)
    with pytest.raises(ZeroDivisionError), idle.dirty(0):
        idle.write(BASE + 9 * PAGE, bytes([1 // 0]))
    wall_clock(idle, 9)
    assert dirty(idle) == [5, 9]
    assert dirty(idle) == []


def test_what_the_host_writes_is_logged_by_the_host(idle: KvmVm) -> None:
    idle.write(BASE + 2 * PAGE - 1, b"ab")
    wall_clock(idle, 7)
    assert idle.read(BASE + 2 * PAGE - 1, 2) == b"ab"
    assert dirty(idle) == [1, 2, 7]
    idle.mark_imported(0, 63, 3)
    assert dirty(idle) == [63, 64, 65]


def test_a_log_that_ends_forgets(idle: KvmVm, mode: dict[str, object]) -> None:
    wall_clock(idle, 3)
    lease = idle.dirty(0)
    wall_clock(idle, 4)
    idle.stop_log()
    assert not any(slot.logging for slot in idle.slots)
    with pytest.raises(OSError, match="slot 0") as raised:
        idle.dirty(0)
    assert raised.value.errno == ENOENT
    with pytest.raises(StaleLeaseError):
        lease.rollback()
    idle.write(BASE, b"a")  # nobody logs
    wall_clock(idle, 5)
    idle.mark_imported(0, 8, 1)
    idle.start_log()
    if mode.get("manual_protect") == "initially-set":
        assert len(dirty(idle)) == NPAGES
    else:
        assert dirty(idle) == [8]


def test_an_interrupt_loses_nothing(idle: KvmVm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C may come when the bits have left the kernel and are in no lease yet: all pages are dirty then."""
    wall_clock(idle, 3)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("hwdbm.vm.base.Lease", interrupted)
        with pytest.raises(KeyboardInterrupt):
            idle.dirty(0)
    assert len(dirty(idle)) == NPAGES
    assert dirty(idle) == []


def test_slots_and_addresses_are_checked(idle: KvmVm) -> None:
    assert [(slot.id, slot.npages) for slot in idle.slots] == [(0, SIZE // PAGE), (1, 2)]
    with pytest.raises(OSError, match="there is no slot 9") as raised:
        idle.dirty(9)
    assert raised.value.errno == ENOENT
    with pytest.raises(OSError, match="there is no slot 9"):
        idle.memory(9)
    with pytest.raises(OSError, match="is not inside of one slot") as raised:
        idle.write(BASE + SIZE - 1, b"ab")
    assert raised.value.errno == EINVAL


def test_parameters_are_checked(make: Make) -> None:
    for options, words in (
        ({"memory": 5000}, "whole pages"),
        ({"memory": 0}, "whole pages"),
        ({"memory": PAGE, "base": 12}, "whole pages"),
        ({"memory": PAGE, "base": -PAGE, "guest": "idle"}, "whole pages"),
        ({"memory": PAGE, "vcpus": 0}, "vcpus is 1 to 4096"),
        ({"memory": PAGE, "guest": "walking"}, "counting or random or idle, not 'walking'"),
        ({"memory": PAGE, "rate": -1.0}, "a rate in pages a second is a number"),
        ({"memory": 2 * PAGE, "base": 0xFEE0_0000 - PAGE}, "the guest reaches gpa 0xfee00000.* at 0xfee01000"),
        ({"memory": PAGE, "ring": 256, "manual_protect": "on"}, "is of bitmaps"),
    ):
        with pytest.raises(ValueError, match=words):
            make(**options)
    with pytest.raises(OSError, match="slot 1") as raised:
        make(1 << 20, base=0x1_0000)  # where the code is
    assert raised.value.errno == 17
    make(PAGE, base=1 << 35, guest="idle").start_log()  # beyond what the code reaches
    make(PAGE, base=0, guest="idle")
    assert repr(make(3 << 20, base=0xFEE0_0000 - (3 << 20))) == "<KvmVm: counting on 1 vCPUs, 3 MiB>"


def test_the_number_of_an_iteration_has_32_bits(make: Make) -> None:
    vm = make(PAGE, guest="random", vcpus=2)
    assert (vm.iteration, vm.pages) == (0, 0)
    for number in (0xFFFF_FFFF, 1):
        vm.iteration = number
        assert vm.iteration == number
        assert vm.memory(1)[PAGE - 4 : PAGE + 8].tobytes() == bytes(4) + number.to_bytes(4, "little") + bytes(4)
    for number in (-1, 1 << 32):
        with pytest.raises(ValueError, match="iteration is 0 to"):
            vm.iteration = number


# --- the guest ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["counting", "random"])
@pytest.mark.parametrize("vcpus", [1, 2])
@pytest.mark.alike(2)
def test_every_page_that_changed_was_dirty(make: Make, mode: dict[str, object], kind: str, vcpus: int) -> None:
    """A copy that is brought up to date by the log alone, and is equal in the end."""
    vm = make(SIZE, guest=kind, vcpus=vcpus, seed=3, **mode)
    memory, copy = vm.memory(0).reshape(-1, PAGE), np.zeros((NPAGES, PAGE), dtype=np.uint8)
    vm.start_log()
    vm.resume()
    for number in range(1, 8):
        vm.iteration = number
        time.sleep(0.01)
        if number == 7:
            vm.pause()
        with vm.dirty(0) as lease:
            pages = lease.bitmap.pages()
            copy[pages] = memory[pages]
    assert np.array_equal(copy, memory)
    assert copy[:, 0].any()
    vm.check()
    assert dirty(vm) == []


def test_a_pause_is_short_and_final(make: Make, mode: dict[str, object]) -> None:
    vm = make(SIZE, **mode)
    vm.start_log()
    for _ in range(10):
        vm.resume()
        assert vm.running
        time.sleep(0.005)
        start = time.perf_counter()
        vm.pause()
        took = time.perf_counter() - start
        assert not vm.running
        before = vm.digest()
        time.sleep(0.002)
        assert vm.digest() == before
        assert took < 1  # some 200 us; the machine is shared
        vm.check()
    vm.pause()  # again, and in vain


def test_vms_live_in_any_thread(make: Make) -> None:
    vms: list[KvmVm] = []

    def live() -> None:
        vm = make(SIZE)
        vm.resume()
        time.sleep(0.01)
        vm.pause()
        vms.append(vm)

    thread = threading.Thread(target=live)
    thread.start()
    thread.join(10)
    assert vms
    assert vms[0].memory(0)[0] > 0
    vms[0].check()


def test_a_running_vm_is_asked_for_nothing_that_lags(make: Make) -> None:
    vm = make(SIZE)
    vm.resume()
    for call in (vm.state, vm.check, lambda: vm.set_state(b"")):
        with pytest.raises(RuntimeError, match="running"):
            call()


def test_an_interrupt_of_a_pause_stops_all_the_same(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every vCPU is told to stop before one is waited for."""
    vm = make(SIZE, vcpus=3)
    vm.resume()

    def interrupted() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(vm._threads[0], "pause", interrupted)
        with pytest.raises(KeyboardInterrupt):
            vm.pause()
    assert vm.running  # until it was paused
    before = -1
    while before != (before := vm.pages):  # none goes on
        time.sleep(0.2)
    vm.pause()
    assert (vm.running, vm.pages) == (False, before)


def test_a_rate_is_kept(make: Make) -> None:
    vm = make(SIZE, rate=20_000, vcpus=2)
    start = time.monotonic()
    vm.resume()
    time.sleep(0.3)
    vm.pause()
    seconds = time.monotonic() - start
    assert 0 < vm.pages < 20_000 * seconds * 1.2 + 200  # a busy machine may make it less


def test_a_throttle_slows(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """After every stay in the guest it waits four times as long, where it is throttled by 80 %."""
    vm = make(SIZE)
    runner, vcpu = vm._threads[0]._runner, vm._threads[0].vcpu
    slept, inside = list[float](), list[float]()

    def run() -> int:
        start = time.monotonic()
        try:
            return type(vcpu).run(vcpu)
        finally:
            inside.append(time.monotonic() - start)

    monkeypatch.setattr(runner, "sleep", slept.append)
    monkeypatch.setattr(vcpu, "run", run)
    for percent, factor in ((0, 0), (80, 4), (0, 0)):
        vm.throttle(percent)
        slept.clear()
        inside.clear()
        vm.resume()
        time.sleep(0.1)
        vm.pause()
        assert slept
        assert all(wait >= factor * stay for wait, stay in zip(slept, inside, strict=False))
        assert (sum(slept) > 0) == (percent > 0)
    with pytest.raises(ValueError, match="percent is 0 to 99, not 100"):
        vm.throttle(100)


def test_a_page_that_is_lost_is_found(make: Make) -> None:
    """Mutant: a page of the memory is put back to what it was two rounds before."""
    vm = make(SIZE)
    vm.resume()
    time.sleep(0.05)
    vm.pause()
    vm.check()
    page = NPAGES // 2
    vm.memory(0)[page * PAGE] = (int(vm.memory(0)[page * PAGE]) - 2) % 256
    with pytest.raises(PatternError, match=f"page {page} counts|page {page + 1} counts"):
        vm.check()


def test_what_a_vcpu_fails_with_is_told(make: Make) -> None:
    vm = make(SIZE)
    vm.write(0x1_0000, b"\x0f\x0b")  # ud2, without an IDT
    vm.start_log()
    vm.resume()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            vm.dirty(0).rollback()
        except GuestExitError:
            break
    for call in (lambda: vm.dirty(0), vm.pause, vm.check, vm.resume, vm.state, vm.pause):
        with pytest.raises(GuestExitError, match=r"vCPU 0 stopped at 0x1\w+ with KVM_EXIT_\w+") as raised:
            call()
        assert raised.value.errno == EIO
    assert not vm.running
    vm.close()


def test_exits_that_nobody_answers_are_named(make: Make) -> None:
    vm = make(SIZE)
    vm.write(0x1_0000, b"\xf4")  # hlt
    vm.resume()
    time.sleep(0.02)
    with pytest.raises(GuestExitError, match="vCPU 0 stopped at 0x10001 with KVM_EXIT_HLT"):
        vm.pause()


def test_closing_gives_everything_back(make: Make, mode: dict[str, object]) -> None:
    def maps() -> int:
        return Path("/proc/self/maps").read_text().count("kvm")

    before, threads = maps(), threading.enumerate()
    vm = make(SIZE, vcpus=2, **mode)
    vm.start_log()
    vm.resume()
    memory = vm.memory(0)
    vm.dirty(0).commit()
    assert maps() > before
    vm.close()
    vm.close()
    assert maps() == before
    assert threading.enumerate() == threads
    assert memory[0] >= 0  # a view that someone holds stays valid
    assert not vm.running


# --- rings -------------------------------------------------------------------------------------------------


def test_a_ring_that_is_full_stops_the_vcpu_until_it_was_emptied(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    vm = make(4 << 20, ring=256)
    full: list[int] = []
    thread = vm._threads[0]
    empty = thread._when_full
    assert empty is not None
    monkeypatch.setattr(thread, "_when_full", lambda: full.append(empty()) or full[-1])
    vm.start_log()
    vm.resume()
    deadline = time.monotonic() + 5
    while len(full) < 4 and time.monotonic() < deadline:
        time.sleep(0.005)
    vm.pause()
    assert len(full) >= 4
    assert max(full) < 256
    # 192 are the limit; in the first round, 1,024 pages long, each is written once.
    assert min(full[:4]) >= 192 - 32
    assert len(dirty(vm)) >= sum(full[:4])


class Queue(DirtyRing):
    """A ring without a vCPU, in which the test is the kernel."""

    def __init__(self, entries: int) -> None:
        self._entries = np.zeros(entries, dtype=GFN)
        self._next = 0
        self.pushed = self.reset = 0

    def push(self, page: int) -> None:
        self._entries[self.pushed % self._entries.size] = (1, 0, page)
        self.pushed += 1

    def recycle(self) -> None:
        while self.reset < self.pushed and self._entries[self.reset % self._entries.size]["flags"] == 2:
            self._entries[self.reset % self._entries.size]["flags"] = 0
            self.reset += 1


def test_entries_come_once_and_in_order_around_the_end() -> None:
    ring, rng = Queue(16), np.random.default_rng(1)
    wanted: list[int] = []
    got: list[int] = []
    for _ in range(200):
        for _ in range(rng.integers(0, 16 - (ring.pushed - ring.reset))):
            wanted.append(len(wanted))
            ring.push(wanted[-1])
        if rng.random() < 0.5:
            got += ring.take()["offset"].tolist()
        if rng.random() < 0.7:
            ring.recycle()
    got += ring.take()["offset"].tolist()
    assert got == wanted
    assert len(got) > 500


@pytest.mark.parametrize("pushed", [0, 1, 7, 15])
@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("begin", [0, 10])
def test_a_ring_is_found_again_after_an_interrupt(begin: int, pushed: int, moved: bool) -> None:
    """What a `take` that was cut in two had marked is behind the next entry, whether that was moved on or not."""
    ring = Queue(16)
    for page in range(begin):
        ring.push(page)
    ring.take()
    ring.recycle()
    for page in range(pushed):
        ring.push(page)
    before = ring._next
    ring.take()
    if not moved:
        ring._next = before
    ring.find()
    ring.recycle()
    assert ring.reset == ring.pushed
    ring.push(99)
    assert ring.take()["offset"].tolist() == [99]


def test_a_ring_that_overflowed_is_not_trusted(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    ring = Queue(16)
    for page in range(17):
        ring.push(page)
    with pytest.raises(OSError, match="all 16 entries") as raised:
        ring.take()
    assert raised.value.errno == EOVERFLOW

    vm = make(SIZE, guest="idle", ring=256)
    vm.start_log()
    for each in vm._rings.rings:
        monkeypatch.setattr(each, "take", Queue(0).take)
    for _ in range(2):  # once and for all
        with pytest.raises(OSError, match="all 0 entries"):
            vm.dirty(0)


def test_there_are_no_odd_rings(kvm: Kvm, make: Make) -> None:
    for entries in (0, 100, 128, 300):
        with pytest.raises(OSError, match=f"256 or more, not {entries}") as raised:
            make(SIZE, ring=entries)
        assert raised.value.errno == EINVAL
    with pytest.raises(OSError, match="KVM_CAP_DIRTY_LOG_RING"):
        make(SIZE, ring=1 << 20)


def test_it_is_a_source_of_migrations(make: Make) -> None:
    vm = make(SIZE, guest="idle")
    assert isinstance(vm, Source)
    vm.write(BASE + 5, b"abc")
    assert vm.digest() == memory_digest(vm)
    layout = MemoryMap.of(vm)
    with KvmVm.from_slots(layout.page_size, layout.slots) as other:
        layout.require(MemoryMap.of(other))
