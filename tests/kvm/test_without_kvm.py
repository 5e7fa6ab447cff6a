"""Rings, vCPU threads and registers, to their edges, with the test as the kernel: no KVM is needed."""

import os
import re
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from errno import E2BIG, EINTR, EINVAL, EIO, ENODEV, ENOENT, ENOTSUP, ENXIO, EOVERFLOW, EPERM
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hwdbm.errors import GuestExitError
from hwdbm.kvm import abi, device, guest, ioctl, ring, thread
from hwdbm.kvm.abi import Cap, Exit, Ioctl
from hwdbm.kvm.ioctl import KvmFile
from hwdbm.kvm.log import Rings
from hwdbm.kvm.ring import GFN, DirtyRing
from hwdbm.kvm.state import Guest, VmState, capture, restore
from hwdbm.kvm.thread import VcpuThread
from hwdbm.kvm.vcpu import VcpuFd

U64 = (1 << 64) - 1


# --- rings -------------------------------------------------------------------------------------------------


class Capable:
    """A VM whose kernel has some capabilities, and which notes those that are enabled."""

    def __init__(self, *caps: Cap) -> None:
        self.caps, self.enabled = caps, list[tuple[object, ...]]()

    def check_extension(self, cap: Cap) -> int:
        return 4096 if cap in self.caps else 0

    def enable_cap(self, *asked: object) -> None:
        self.enabled.append(asked)


ORDERED, PLAIN, BESIDE = Cap.DIRTY_LOG_RING_ACQ_REL, Cap.DIRTY_LOG_RING, Cap.DIRTY_LOG_RING_WITH_BITMAP


@pytest.mark.parametrize(
    ("caps", "enabled", "bitmap"),
    [
        ((ORDERED, PLAIN, BESIDE), [(ORDERED, 8192), (BESIDE,)], True),
        ((ORDERED, PLAIN), [(ORDERED, 8192)], False),
        ((PLAIN,), [(PLAIN, 8192)], False),
    ],
)
def test_one_kind_of_ring_is_enabled_by_its_bytes(caps, enabled, bitmap, monkeypatch) -> None:
    monkeypatch.setattr(abi, "arch", lambda: abi.ARCHES["x86_64"])
    vm = Capable(*caps)
    assert ring.enable_ring(vm, 512) is bitmap  # type: ignore[arg-type]
    assert vm.enabled == enabled


def test_a_kernel_without_rings_and_odd_sizes_are_refused(monkeypatch) -> None:
    monkeypatch.setattr(abi, "arch", lambda: abi.ARCHES["x86_64"])
    vm: Any = Capable(BESIDE)
    with pytest.raises(OSError, match="no dirty ring") as error:
        ring.enable_ring(vm, 256)
    assert (error.value.errno, vm.enabled) == (ENOTSUP, [])
    for entries in (-256, 0, 1, 128, 255, 257, 300, 384):
        with pytest.raises(OSError, match=f"256 or more, not {entries}") as error:
            ring.enable_ring(Capable(ORDERED), entries)  # type: ignore[arg-type]
        assert error.value.errno == EINVAL


def ring_of(flags: list[int], begin: int) -> DirtyRing:
    """Return a ring with entries of these flags from `begin` on, around the end; their pages are 0, 1, 2 and so on."""
    made = object.__new__(DirtyRing)
    made._entries, made._next = np.zeros(len(flags), dtype=GFN), begin
    for page, flag in enumerate(flags):
        made._entries[(begin + page) % len(flags)] = (flag, 0, page)
    return made


@pytest.mark.parametrize("begin", range(5))
def test_what_is_dirty_comes_at_once_from_wherever_it_begins(begin: int) -> None:
    """All entries up to the first that isn't dirty; those that were read and aren't reset yet come no second time."""
    for dirty in range(5):
        for after in (0, 2):
            made = ring_of([1] * dirty + [after] * (5 - dirty), begin)
            assert made.take()["offset"].tolist() == list(range(dirty))
            assert made._next == (begin + dirty) % 5
            assert sorted(made._entries["flags"].tolist()) == sorted([2] * dirty + [after] * (5 - dirty))
            made._next = begin
            made.find()
            assert made._next == (begin + dirty * (after == 0)) % 5
    with pytest.raises(OSError, match="all 5 entries") as error:
        ring_of([1] * 5, begin).take()
    assert error.value.errno == EOVERFLOW


class Resetting:
    """A VM that resets so many entries each time, or is interrupted."""

    def __init__(self, *answers: int | OSError) -> None:
        self.answers = list(answers)

    def reset_dirty_rings(self) -> int:
        answer = self.answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer


def entries(*of: tuple[int, int]) -> Any:
    return SimpleNamespace(take=lambda: np.array([(1, *each) for each in of], dtype=GFN), find=lambda: None)


def test_a_harvest_has_the_pages_of_each_slot_and_waits_for_all_to_be_reset() -> None:
    """Also for more than were taken, which an interrupted one left; a signal ends no request for good."""
    for answers in ((2, 2), (OSError(EINTR, "x"), 1, OSError(EINTR, "x"), 3), (9,)):
        vm: Any = Resetting(*answers)
        found = list(ring.harvest(vm, [entries((1, 5), (0, 7), (1, 6)), entries((0, 8))]))
        assert sorted((slot, pages.tolist()) for slot, pages in found) == [(0, [7]), (0, [8]), (1, [5, 6])]
        assert not vm.answers
    with pytest.raises(OSError, match="1 entries were taken") as error:
        list(ring.harvest(Resetting(1, 0), [entries((0, 1), (0, 2))]))  # type: ignore[arg-type]
    assert error.value.errno == EIO
    with pytest.raises(OSError, match="broken"):
        list(ring.harvest(Resetting(OSError(EIO, "broken")), [entries((0, 1))]))  # type: ignore[arg-type]


def test_rings_are_recovered_until_nothing_is_left_to_reset() -> None:
    found = []
    rings: Any = [SimpleNamespace(find=lambda number=number: found.append(number)) for number in (1, 2)]
    vm: Any = Resetting(3, OSError(EINTR, "x"), 1, 0)
    ring.recover(vm, rings)
    assert (found, vm.answers) == ([1, 2], [])


class Log:
    """A slot's log, which notes what it is told."""

    def __init__(self, slot: int, npages: int) -> None:
        self.slot = SimpleNamespace(id=slot, npages=npages)
        self.told: list[object] = []

    def note(self, pages: Any) -> None:
        self.told.append(pages.tolist())

    def mark(self, first: int, npages: int) -> None:
        self.told.append((first, npages))


def gathering(vm: object, *rings: object) -> tuple[Rings, Log, Log]:
    logs = Log(0, 10), Log(1, 2)
    made = Rings(vm, nullcontext(True))  # type: ignore[arg-type]
    made.logs[:], made.rings[:] = logs, rings  # type: ignore[assignment]
    return made, *logs


def test_what_is_gathered_is_counted_and_noted_by_its_slot() -> None:
    """Entries of a slot that has gone since count, too."""
    made, first, second = gathering(Resetting(4), entries((1, 1), (0, 7), (9, 3), (0, 8)))
    assert made.gather() == 4
    assert (first.told, second.told) == ([[7, 8]], [[1]])
    made.rings.clear()
    assert made.gather() == 0


def test_rings_that_were_interrupted_are_recovered_and_all_is_dirty_once() -> None:
    made, first, second = gathering(Resetting(5, 0, 1), entries((0, 3)))
    taken, made.rings[0].take = made.rings[0].take, lambda: (_ for _ in ()).throw(KeyboardInterrupt)  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        made.gather()
    assert first.told == second.told == []
    made.rings[0].take = taken  # type: ignore[method-assign]
    assert made.gather() == 1
    assert (first.told, second.told) == ([(0, 10), [3]], [(0, 2)])
    made.rings.clear()
    assert made.gather() == 0
    assert len(second.told) == 1


def test_rings_that_cannot_be_trusted_say_so_each_time() -> None:
    made, first, second = gathering(Resetting(0), entries((0, 3)))
    for _ in range(2):
        with pytest.raises(OSError, match="1 entries were taken"):
            made.gather()
        assert (first.told, second.told) == ([[3], (0, 10)], [(0, 2)])


# --- the thread of a vCPU ----------------------------------------------------------------------------------


class Scripted:
    """A vCPU that leaves the guest for one reason after another, and of which a page may be known."""

    def __init__(self, *reasons: int) -> None:
        self.reasons, self.asked = list(reasons), list[bool]()
        self.immediate_exit = False

    def run(self) -> int:
        self.asked.append(self.immediate_exit)
        return self.reasons.pop(0)

    def field(self, name: str) -> tuple[int, ...]:
        return {"fail_entry": (0x8000_0021, 3), "internal": (1, 2)}[name]


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the chunks that guests are given; each guest is at 0x10005."""
    given: list[int] = []
    monkeypatch.setattr(guest, "set_chunk", lambda _vcpu, _kind, chunk: given.append(chunk))
    monkeypatch.setattr(guest, "at", lambda _vcpu: 0x1_0005)
    return given


def threaded(*reasons: int, when_full: Callable[[], int] | None = None) -> VcpuThread:
    return VcpuThread(3, Scripted(*reasons), when_full)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rate", "chunk", "with_ring"),
    [(None, 4096, 32), (1.0, 1, 1), (399.0, 1, 1), (400.0, 2, 2), (6400.0, 32, 32), (6600.0, 33, 32), (1e9, 4096, 32)],
)
def test_a_guest_exits_every_five_milliseconds(chunks, rate, chunk, with_ring) -> None:
    """But after a page or more, and no more than there is room for in a ring."""
    for when_full in (None, lambda: 1):
        made = threaded(when_full=when_full)
        made.pace("counting", rate)
        assert made.rate == rate
        assert chunks.pop() == made.chunk == (chunk if when_full is None else with_ring)


def running(
    made: VcpuThread, stay: float, turns: int, monkeypatch: pytest.MonkeyPatch, lost: float = 0.0
) -> list[float]:
    """Return how long a thread sleeps after each stay in the guest; `lost` are seconds that its first sleep is late."""
    now, slept = [100.0], list[float]()

    def enter() -> int:
        now[0] += stay
        return Exit.IO

    def sleep(seconds: float) -> None:
        slept.append(round(seconds, 9))
        now[0] += max(seconds, 0.0) + (lost if len(slept) == 1 else 0.0)
        runner.wanted = len(slept) < turns

    runner: Any = SimpleNamespace(wanted=True, sleep=sleep)
    monkeypatch.setattr(thread, "monotonic", lambda: now[0])
    monkeypatch.setattr(made, "_runner", runner)
    monkeypatch.setattr(made, "_enter", enter)
    made._run()
    return slept


def test_how_long_a_guest_waits_between_its_chunks(chunks, monkeypatch) -> None:
    """As its rate says, or its throttle if that is longer; what it missed for more than a second it never makes up."""
    made = threaded()
    assert made.pages == 0
    made.pace("counting", None)
    assert running(made, 0.5, 3, monkeypatch) == [0.0] * 3
    assert made.pages == 3 * 4096
    made.percent = 75
    assert running(made, 0.5, 2, monkeypatch) == [1.5] * 2
    made.pace("counting", 400.0)
    made.chunk = 100  # a quarter of a second
    assert running(made, 0.5, 2, monkeypatch) == [1.5] * 2
    made.percent = 0
    assert running(made, 0.0625, 3, monkeypatch) == [0.1875] * 3
    assert running(made, 0.0, 7, monkeypatch, lost=1.25) == [0.25, *5 * [0.0], 0.25]
    assert running(made, 0.0, 4, monkeypatch, lost=1.5) == [0.25, 0.0, 0.25, 0.25]


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        (Exit.HLT, "HLT"),
        (Exit.FAIL_ENTRY, r"FAIL_ENTRY \(reason 0x80000021 on processor 3\)"),
        (Exit.INTERNAL_ERROR, r"INTERNAL_ERROR \(suberror 1, of 2 numbers\)"),
        (99, "99"),
    ],
)
def test_what_a_vcpu_stops_with_is_named(chunks, reason, said) -> None:
    for work in (VcpuThread._run, VcpuThread._complete):
        made = threaded(reason)
        made._runner.wanted = True
        with pytest.raises(GuestExitError, match=f"vCPU 3 stopped at 0x10005 with KVM_EXIT_{said}$") as error:
            work(made)
        assert error.value.errno == EIO


def test_an_instruction_is_finished_without_another(chunks) -> None:
    for reason in (Exit.INTR, Exit.DIRTY_RING_FULL):
        made = threaded(reason)
        made._complete()
        assert (made.vcpu.asked, made.vcpu.immediate_exit) == ([True], False)  # type: ignore[attr-defined]


def test_a_ring_may_be_found_empty_a_hundred_times_in_a_row(chunks) -> None:
    taken = [0] * 100 + [1] + [0] * 101
    made = threaded(when_full=lambda: taken.pop(0))
    for _ in range(201):
        made._make_room()
    with pytest.raises(GuestExitError, match=r"KVM_EXIT_DIRTY_RING_FULL$"):
        made._make_room()
    assert not taken
    made = threaded()  # one without a ring has none to be full
    for _ in range(100):
        made._make_room()
    with pytest.raises(GuestExitError):
        made._make_room()


# --- a vCPU's registers ------------------------------------------------------------------------------------


@pytest.fixture
def vcpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[VcpuFd]:
    """Return a vCPU whose requests nobody answers yet, with a page for its ``struct kvm_run``."""
    fd = os.memfd_create("run")
    os.ftruncate(fd, 4096)
    with VcpuFd(fd, 4096) as made:
        yield made


def answered(monkeypatch: pytest.MonkeyPatch, answer: Callable[[Ioctl, bytearray], int]) -> None:
    monkeypatch.setattr(KvmFile, "_call", lambda _self, request, arg=0, about="": answer(request, arg))


@pytest.mark.parametrize("count", [0, 1, 255, 256, 257, 600])
def test_msrs_that_cannot_be_read_are_left_out(vcpu, monkeypatch, count) -> None:
    """The kernel takes 256 at a time, and reads up to the first that can't be."""
    refused, asked = {3, 4, 254, 255, 256, 511, 599}, list[int]()

    def answer(request: Ioctl, arg: bytearray) -> int:
        assert request == Ioctl.KVM_GET_MSRS
        (number,) = struct.unpack_from("<I", arg)
        assert len(arg) == 8 + 16 * number
        asked.append(number)
        for at in range(number):
            (index,) = struct.unpack_from("<I", arg, 8 + 16 * at)
            if index in refused:
                return at
            struct.pack_into("<Q", arg, 16 + 16 * at, 7 * index)
        return number

    answered(monkeypatch, answer)
    assert vcpu.get_msrs(range(count)) == {index: 7 * index for index in range(count) if index not in refused}
    assert max(asked, default=0) == min(count, 256)
    assert 0 not in asked
    assert vcpu.get_msrs([0xFFFF_FFFF]) == {0xFFFF_FFFF: 7 * 0xFFFF_FFFF}
    with pytest.raises(ValueError, match="indices"):
        vcpu.get_msrs([1 << 32])


def test_an_msr_that_cannot_be_set_is_an_error(vcpu, monkeypatch) -> None:
    sent: list[bytes] = []
    answered(monkeypatch, lambda _request, arg: sent.append(bytes(arg)) or len(sent) % 2)  # type: ignore[func-returns-value]
    vcpu.set_msr(0xFFFF_FFFF, U64)
    assert sent == [struct.pack("<IIIIQ", 1, 0, 0xFFFF_FFFF, 0, U64)]
    with pytest.raises(OSError, match="MSR 0x10 can't be set to 0x5") as error:
        vcpu.set_msr(0x10, 5)
    assert error.value.errno == EINVAL
    for index, value in ((1 << 32, 0), (-1, 0), (0, 1 << 64), (0, -1)):
        with pytest.raises(ValueError, match="is 0 to"):
            vcpu.set_msr(index, value)
    assert len(sent) == 2


def test_signals_are_bits_of_a_mask_that_counts_from_one(vcpu, monkeypatch) -> None:
    sent: list[bytes] = []
    answered(monkeypatch, lambda _request, arg: len(sent.append(bytes(arg)) or ()))  # type: ignore[func-returns-value]
    vcpu.set_signal_mask({1, 10, 64})
    vcpu.set_signal_mask(())
    assert sent == [struct.pack("<IQ", 8, 1 | 1 << 9 | 1 << 63), struct.pack("<IQ", 8, 0)]
    for wrong in (0, 65):
        with pytest.raises(ValueError, match="signals"):
            vcpu.set_signal_mask({wrong})


def test_what_the_kernel_says_in_the_shared_page(vcpu, monkeypatch) -> None:
    """Why it left the guest, by its name where it has one; and whether it is to leave at once."""
    answered(monkeypatch, lambda *_: 0)
    for reason in (Exit.HLT, Exit.INTR, 99):
        vcpu._run[8:12] = struct.pack("<I", reason)
        found = vcpu.run()
        assert (found, type(found)) == (reason, int if reason == 99 else Exit)
    assert vcpu.immediate_exit is False
    vcpu.immediate_exit = True
    assert (vcpu.immediate_exit, vcpu._run[:12]) == (True, b"\0\1" + bytes(6) + b"\x63\0\0\0")
    errors = [OSError(EINTR, "x"), OSError(EIO, "broken")]

    def fails(*_: object) -> int:
        raise errors.pop(0)

    answered(monkeypatch, fails)
    assert vcpu.run() is Exit.INTR
    with pytest.raises(OSError, match="broken"):
        vcpu.run()


REGISTERS = {0x6030_0000_0010_0002: U64, 0x6040_0000_0010_0004: 1 << 127 | 5, 0x6020_0000_0010_0006: 0xFFFF_FFFF}
"""An arm64's, by their ids, which have the size in them: 8, 16 and 4 bytes."""


def test_registers_of_arm64_go_back_as_they_came(vcpu, monkeypatch) -> None:
    """Through the kernel's own structures: their list, whose length is asked for first, then each by its address."""
    there = {name: value.to_bytes(1 << (name >> 52 & 15), "little") for name, value in REGISTERS.items()}
    monkeypatch.setattr(abi, "arch", lambda: abi.ARCHES["aarch64"])

    def answer(request: Ioctl, arg: bytearray) -> int:
        if request == Ioctl.KVM_GET_REG_LIST:
            room, arg[:8] = struct.unpack_from("<Q", arg)[0], struct.pack("<Q", len(there))
            if room < len(there):
                raise OSError(E2BIG, "more than that")
            assert len(arg) == 8 + 8 * len(there)
            arg[8:] = struct.pack(f"<{len(there)}Q", *there)
        elif request in (Ioctl.KVM_GET_ONE_REG, Ioctl.KVM_SET_ONE_REG):
            name, address = struct.unpack("<QQ", arg)
            memory = np.ctypeslib.as_array((np.ctypeslib.ctypes.c_uint8 * len(there[name])).from_address(address))
            if request == Ioctl.KVM_GET_ONE_REG:
                memory[:] = np.frombuffer(there[name], dtype=np.uint8)
            else:
                there[name] = memory.tobytes()
        return 0

    answered(monkeypatch, answer)
    assert vcpu.reg_list() == list(REGISTERS)
    state = capture(vcpu, [])
    assert state["one_regs"] == list(REGISTERS.items())
    there = {name: bytes(len(value)) for name, value in there.items()}
    restore(vcpu, state)
    assert {name: int.from_bytes(value, "little") for name, value in there.items()} == REGISTERS
    with pytest.raises(ValueError, match="register 0x6020000000100006 has 4 bytes, got 8"):
        vcpu.set_one_reg(0x6020_0000_0010_0006, bytes(8))
    state["one_regs"][2] = (0x6020_0000_0010_0006, 1 << 32)
    with pytest.raises(ValueError, match="the kernel refuses the state's register 0x6020000000100006"):
        restore(vcpu, state)


@pytest.mark.parametrize("rate", [1e-9, 1e12, None])
def test_a_state_is_what_it_was_when_it_comes_back(rate, monkeypatch) -> None:
    monkeypatch.setattr(abi, "arch", lambda: abi.ARCHES["aarch64"])
    sizes = {name: abi.STRUCTS[abi.REGISTERS[name][2]].size for name in ("mp_state", "vcpu_events")}
    one = {name: b"\5" * size for name, size in sizes.items()} | {"one_regs": [(0, U64)]}
    for vcpus in (1, 4096) if rate is None else (1,):
        state = VmState(Guest("random", rate), (one,) * vcpus)
        assert VmState.from_bytes(state.to_bytes()) == state
    with pytest.raises(ValueError, match="a state has 1 to 4096 vCPUs"):
        VmState.from_bytes(VmState(state.guest, (one,) * 4097).to_bytes())
    with pytest.raises(ValueError, match="18446744073709551616 is none"):
        VmState.from_bytes(VmState(state.guest, (one | {"one_regs": [(0, U64 + 1)]},)).to_bytes())
    for wrong in (0.0, 0.99e-9, 1.01e12):
        with pytest.raises(ValueError, match="a rate in pages a second is a number"):
            Guest("random", wrong)


# --- files -------------------------------------------------------------------------------------------------


def test_any_descriptor_is_closed_once(monkeypatch) -> None:
    """0 among them, and the largest there is."""
    closed: list[int] = []
    monkeypatch.setattr(os, "close", closed.append)
    for fd in (0, (1 << 31) - 1):
        made = KvmFile(fd)
        made.close()
        made.close()
        forgotten = KvmFile(fd)
        del forgotten
        assert closed == [fd, fd]
        closed.clear()
    for fd in (-1, 1 << 31):
        with pytest.raises(ValueError, match="fd is 0 to"):
            KvmFile(fd)
    assert not closed


@pytest.mark.parametrize(
    ("errno", "said"),
    [
        (ENOENT, "no such file: this kernel has no KVM"), (13, "no permission"), (EPERM, "no permission"),
        (ENODEV, "nothing behind the file"), (ENXIO, "nothing behind the file"), (EIO, "^as the system says$"),
    ],
)  # fmt: skip
def test_why_kvm_cannot_be_had(errno, said) -> None:
    assert re.search(said, device._why(OSError(errno, "as the system says")))


def test_msrs_of_a_state_are_those_that_the_kernel_lists(monkeypatch) -> None:
    listed = [0x11, 0xFFFF_FFFF, 5]

    def answer(_request: Ioctl, arg: bytearray) -> int:
        room, arg[:4] = struct.unpack_from("<I", arg)[0], struct.pack("<I", len(listed))
        if room < len(listed):
            raise OSError(E2BIG, "more than that")
        arg[4:] = struct.pack(f"<{len(listed)}I", *listed)
        return 0

    answered(monkeypatch, answer)
    made = object.__new__(device.Kvm)
    assert made.msr_indices() == listed


def test_the_kernel_takes_a_barrier_as_it_is_asked_for(monkeypatch) -> None:
    """By the number that x86 has for it: what it offers, among it both that are asked for; flags aren't set."""
    if os.uname().machine == "x86_64":
        monkeypatch.setattr(ioctl, "_SYS_MEMBARRIER", 324)
    assert ioctl._membarrier(0) & 0b11000 == 0b11000
    monkeypatch.setattr(abi, "arch", lambda: abi.ARCHES["aarch64"])
    ioctl.fence()
    ioctl.fence()


def test_a_kick_is_one_signal_to_one_thread(monkeypatch) -> None:
    kicked: list[object] = []
    monkeypatch.setattr(signal, "pthread_kill", lambda *what: kicked.append(what))
    thread._kick(7)
    assert kicked == [(7, signal.SIGUSR1)]
