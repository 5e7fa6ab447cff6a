"""The parts of a KvmVm without KVM: the test is the kernel, and the clock, and does what a real one seldom does."""

import ctypes
import mmap
import os
import signal
import struct
from collections.abc import Callable, Iterable, Iterator
from errno import E2BIG, EACCES, EINTR, EINVAL, EIO, ENODEV, ENOENT, ENOTSUP, ENXIO, EPERM
from threading import RLock
from typing import Any

import numpy as np
import pytest
from seen import as_seen

from hwdbm.kvm import GuestExitError, Kvm, KvmUnavailableError, VcpuFd, VmFd, abi, guest_x86, ioctl, ring, state, thread
from hwdbm.kvm.abi import Cap, Exit, Ioctl
from hwdbm.kvm.ioctl import KvmFile
from hwdbm.kvm.log import KernelPages, Rings
from hwdbm.kvm.task import Task
from hwdbm.memslot import Memslot

ZERO = "/dev/zero"  # a file that can be mapped
Patch = pytest.MonkeyPatch


# --- files -------------------------------------------------------------------------------------------------


def test_a_file_is_closed_once_whatever_its_number(monkeypatch: Patch) -> None:
    closed: list[int] = []
    monkeypatch.setattr(os, "close", closed.append)
    for fd in (0, 1, 700):
        file = KvmFile(fd)
        file.close()
        file.close()
        assert file.fd == -1
        del file
    KvmFile(2).__del__()
    with pytest.raises(ValueError, match="fd is 0 to 0x7fffffff"):
        KvmFile(-1)
    assert closed == [0, 1, 700, 2]


@pytest.mark.parametrize(
    ("errno", "said"),
    [
        (ENOENT, "this kernel has no KVM"),
        (EACCES, "no permission"),
        (EPERM, "no permission"),
        (ENODEV, "nothing behind the file"),
        (ENXIO, "nothing behind the file"),
        (EINVAL, "/dev/kvm: so it is$"),
    ],
)
def test_each_reason_why_there_is_none(errno: int, said: str, monkeypatch: Patch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno, "so it is")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(KvmUnavailableError, match=said) as raised:
        Kvm()
    assert raised.value.errno == errno


class Kernel:
    """A kernel's registers and lists. What it is given must be of the right size to the byte."""

    def __init__(self, monkeypatch: Patch) -> None:
        self.msrs: dict[int, int] = {}
        self.one_regs: dict[int, bytes] = {}
        self.asked: list[tuple[str, object]] = []
        self.fails: int | None = None
        kernel = self

        def called(_file: KvmFile, request: Ioctl, arg: int | bytearray = 0, about: str = "") -> int:
            kernel.asked.append((request.name, bytes(arg) if isinstance(arg, bytearray) else arg))
            if kernel.fails is not None:
                raise OSError(kernel.fails, "refused")
            answer: int = getattr(kernel, request.name.removeprefix("KVM_").lower())(arg)
            return answer

        monkeypatch.setattr(KvmFile, "_call", called)

    def _list(self, code: str, numbers: Iterable[int], arg: bytearray) -> int:
        found, head = list(numbers), struct.calcsize(f"<{code}")
        (room,) = struct.unpack_from(f"<{code}", arg)
        assert len(arg) == head * (1 + room)
        struct.pack_into(f"<{code}", arg, 0, len(found))
        if room < len(found):
            raise OSError(E2BIG, "too small")
        struct.pack_into(f"<{len(found)}{code}", arg, head, *found)
        return 0

    def get_msr_index_list(self, arg: bytearray) -> int:
        return self._list("I", self.msrs, arg)

    def get_reg_list(self, arg: bytearray) -> int:
        return self._list("Q", self.one_regs, arg)

    def get_msrs(self, arg: bytearray) -> int:
        """Read up to the first that there isn't."""
        (count,) = struct.unpack_from("<I", arg)
        assert len(arg) == 8 + 16 * count
        assert count <= 256
        for number in range(count):
            index, _ = struct.unpack_from("<I4xQ", arg, 8 + 16 * number)
            if index not in self.msrs:
                return number
            struct.pack_into("<Q", arg, 16 + 16 * number, self.msrs[index])
        return count

    def set_msrs(self, arg: bytearray) -> int:
        count, index, value = struct.unpack("<I4xI4xQ", arg)
        assert count == 1
        if index not in self.msrs:
            return 0
        self.msrs[index] = value
        return 1

    def get_one_reg(self, arg: bytearray) -> int:
        register, address = struct.unpack("<QQ", arg)
        ctypes.memmove(address, self.one_regs[register], len(self.one_regs[register]))
        return 0

    def set_one_reg(self, arg: bytearray) -> int:
        register, address = struct.unpack("<QQ", arg)
        self.one_regs[register] = ctypes.string_at(address, len(self.one_regs[register]))
        return 0

    def set_signal_mask(self, arg: bytearray) -> int:
        return 0

    def create_vcpu(self, arg: int) -> int:
        return os.open(ZERO, os.O_RDWR)

    def arm_preferred_target(self, arg: bytearray) -> int:
        assert not any(arg)
        arg[:] = bytes(range(32))
        return 0

    def arm_vcpu_init(self, arg: bytearray) -> int:
        return 0


@pytest.fixture
def kernel(monkeypatch: Patch) -> Kernel:
    return Kernel(monkeypatch)


@pytest.fixture
def vcpu(kernel: Kernel) -> Iterator[VcpuFd]:
    with VcpuFd(os.open(ZERO, os.O_RDWR), mmap.PAGESIZE) as vcpu:
        yield vcpu


@pytest.mark.parametrize("count", [0, 1, 3])
def test_lists_are_asked_for_with_as_much_room_as_they_take(kernel: Kernel, vcpu: VcpuFd, count: int) -> None:
    kernel.msrs = {7 + number: 0 for number in range(count)}
    kernel.one_regs = {(1 << 60) + number: b"" for number in range(count)}
    kvm = object.__new__(Kvm)
    assert kvm.msr_indices() == list(kernel.msrs)
    assert vcpu.reg_list() == list(kernel.one_regs)
    kernel.fails = EIO
    for call in (kvm.msr_indices, vcpu.reg_list):
        with pytest.raises(OSError, match="refused") as raised:
            call()
        assert raised.value.errno == EIO


@pytest.mark.parametrize("missing", [{0}, {1, 2, 3}, {255}, {256}, {254, 255, 256, 257}, {599}, set()])
def test_msrs_that_cannot_be_read_are_left_out_and_no_other(kernel: Kernel, vcpu: VcpuFd, missing: set[int]) -> None:
    kernel.msrs = {index: (index << 40) + 5 for index in range(600) if index not in missing}
    assert vcpu.get_msrs(range(600)) == kernel.msrs
    assert vcpu.get_msrs([]) == {}


def test_msrs_are_set_to_the_edges_of_their_fields(kernel: Kernel, vcpu: VcpuFd) -> None:
    kernel.msrs = {0: 1, (1 << 32) - 1: 1}
    vcpu.set_msr(0, (1 << 64) - 1)
    vcpu.set_msr((1 << 32) - 1, 0)
    assert kernel.msrs == {0: (1 << 64) - 1, (1 << 32) - 1: 0}
    for index, value in ((-1, 0), (1 << 32, 0), (0, -1), (0, 1 << 64)):
        with pytest.raises(ValueError, match="is 0 to 0x"):
            vcpu.set_msr(index, value)
    with pytest.raises(OSError, match="MSR 0x5 can't be set to 0x6") as raised:
        vcpu.set_msr(5, 6)
    assert raised.value.errno == EINVAL


@pytest.mark.parametrize("size", range(7))  # as powers of two, which the id has in bits 52 to 55
def test_a_single_register_has_the_size_that_its_id_says(kernel: Kernel, vcpu: VcpuFd, size: int) -> None:
    register = 0x6F00_0000_0000_0013 | size << 52
    kernel.one_regs[register] = bytes(range(1 << size))
    assert vcpu.get_one_reg(register) == bytes(range(1 << size))
    vcpu.set_one_reg(register, bytes(range(1, 1 + (1 << size))))
    assert kernel.one_regs[register] == bytes(range(1, 1 + (1 << size)))
    for wrong in ((1 << size) - 1, (1 << size) + 1):
        with pytest.raises(ValueError, match=f"has {1 << size} bytes, got {wrong}"):
            vcpu.set_one_reg(register, bytes(wrong))
    for outside in (-1, 1 << 64):
        with pytest.raises(ValueError, match="register is 0 to 0x"):
            vcpu.get_one_reg(outside)
        with pytest.raises(ValueError, match="register is 0 to 0x"):
            vcpu.set_one_reg(outside, b"")


def test_signals_are_bits_from_1_on(kernel: Kernel, vcpu: VcpuFd) -> None:
    vcpu.set_signal_mask([1, 10, 64, 10])
    assert kernel.asked == [("KVM_SET_SIGNAL_MASK", struct.pack("<IQ", 8, 1 | 1 << 9 | 1 << 63))]
    for wrong in (0, 65):
        with pytest.raises(ValueError, match="signals"):
            vcpu.set_signal_mask([wrong])


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_a_vcpu_is_the_host_s_own_kind(kernel: Kernel, machine: str, monkeypatch: Patch) -> None:
    """On arm64 it is what the kernel prefers, byte for byte."""
    monkeypatch.setattr(abi, "arch", lambda: abi.ARCHES[machine])
    with VmFd(os.open(ZERO, os.O_RDWR), mmap.PAGESIZE) as vm, vm.create_vcpu(3):
        wanted: list[tuple[str, object]] = [("KVM_CREATE_VCPU", 3)]
        if machine == "aarch64":
            wanted += [("KVM_ARM_PREFERRED_TARGET", bytes(32)), ("KVM_ARM_VCPU_INIT", bytes(range(32)))]
        assert kernel.asked == wanted


def test_the_bitmap_of_a_slot_that_there_is_not_needs_no_words() -> None:
    with VmFd(os.open(ZERO, os.O_RDWR), mmap.PAGESIZE) as vm:
        for call in (
            lambda: vm.clear_dirty_log(0, 0, 64, np.zeros(0, dtype=np.uint64)),
            lambda: vm.clear_dirty_log(0, 64, 64, np.zeros(0, dtype=np.uint64)),
            lambda: vm.get_dirty_log(0, np.zeros(0, dtype=np.uint64)),
        ):
            with pytest.raises(OSError, match="of slot 0"):  # the kernel's
                call()


# --- the guest's registers ---------------------------------------------------------------------------------


class Registers:
    """A vCPU that is its structures."""

    def __init__(self) -> None:
        size = abi.STRUCTS["kvm_sregs"].size
        self.parts = {"sregs": bytes(number * 7 % 251 for number in range(size)), "regs": bytes(144)}

    def get(self, what: str) -> bytes:
        return self.parts[what]

    def set(self, what: str, data: bytes) -> None:
        self.parts[what] = data


def test_the_registers_that_a_guest_begins_with_were_looked_at() -> None:
    lines: list[str] = []
    for kind in ("counting", "random"):
        vcpu: Any = Registers()
        guest_x86.boot(vcpu, Task(kind, 0x4000_3000, guest_x86.TOP, 4096, 0xFEED_5EED))
        segments, *rest = abi.STRUCTS["kvm_sregs"].unpack(vcpu.parts["sregs"])
        lines += [kind, *(f"  segment {each}" for each in abi.STRUCTS["kvm_segment"].iter_unpack(segments))]
        lines += [f"  {each if isinstance(each, int) else each.hex()}" for each in rest]
        for chunk in (None, 70, 1000, 9):
            if chunk is not None:
                guest_x86.set_chunk(vcpu, kind, chunk)
            names = zip(guest_x86._REGS, abi.STRUCTS["kvm_regs"].unpack(vcpu.parts["regs"]), strict=True)
            lines.append(f"  {chunk}: " + ", ".join(f"{name} {value:#x}" for name, value in names if value))
    as_seen("asked/guest.txt", "\n".join(lines) + "\n")
    with pytest.raises(ValueError, match="ends at 0xfee01000, and not beyond 0xfee00000"):
        guest_x86.boot(vcpu, Task("counting", 0, guest_x86.TOP + 4096, 4096, 0))


def test_what_is_left_of_a_chunk_is_never_more_than_the_next() -> None:
    vcpu: Any = Registers()
    for kind, whole, left in (("counting", 3, 2), ("random", 5, 4)):  # rdx and rcx, rdi and rsi
        for before, chunk, after in ((9, 8, 8), (8, 8, 8), (7, 8, 7)):
            regs = [100 + number for number in range(18)]
            regs[left] = before
            vcpu.set("regs", struct.pack("<18Q", *regs))
            guest_x86.set_chunk(vcpu, kind, chunk)
            regs[left], regs[whole] = after, chunk
            assert vcpu.get("regs") == struct.pack("<18Q", *regs)
    assert guest_x86.at(vcpu) == 116


# --- the state ---------------------------------------------------------------------------------------------


class Stateful(Registers):
    """A vCPU with single registers too; it notes what is set, in its order."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = {name: name.encode() for name in abi.REGISTERS}
        self.numbers = {0x6030_0000_0000_0001: 0x1234_5678_9ABC_DEF0, 0x6020_0000_0000_0002: 0xFFFF_FFFF}
        self.given: list[tuple[object, object]] = []

    def set(self, what: str, data: bytes) -> None:
        self.given.append((what, data))

    def reg_list(self) -> list[int]:
        return list(self.numbers)

    def get_one_reg(self, register: int) -> bytes:
        return self.numbers[register].to_bytes(8 if register >> 52 & 1 else 4, "little")

    def set_one_reg(self, register: int, data: bytes) -> None:
        self.given.append((register, data))

    def get_msrs(self, indices: list[int]) -> dict[int, int]:
        return {index: index + 1 for index in indices}

    def set_msr(self, index: int, value: int) -> None:
        self.given.append((index, value))
        if index in {5, 6}:
            raise OSError(EINVAL, "refused")


def test_a_state_of_arm64_is_its_single_registers_and_then_the_rest(monkeypatch: Patch) -> None:
    monkeypatch.setattr(abi, "arch", lambda: abi.ARCHES["aarch64"])
    vcpu: Any = Stateful()
    found = state.capture(vcpu, [7])
    assert found == {
        "mp_state": b"mp_state",
        "vcpu_events": b"vcpu_events",
        "one_regs": list(vcpu.numbers.items()),
    }
    state.restore(vcpu, found)
    assert vcpu.given == [
        (0x6030_0000_0000_0001, bytes.fromhex("f0debc9a78563412")),
        (0x6020_0000_0000_0002, b"\xff\xff\xff\xff"),
        ("mp_state", b"mp_state"),
        ("vcpu_events", b"vcpu_events"),
    ]
    with pytest.raises(ValueError, match=r"refuses the state's register 0x6020000000000002: .*too big"):
        state.restore(vcpu, found | {"one_regs": [(0x6020_0000_0000_0002, 1 << 32)]})


def test_clocks_that_write_memory_are_in_no_state_and_are_not_set(monkeypatch: Patch) -> None:
    monkeypatch.setattr(abi, "arch", lambda: abi.ARCHES["x86_64"])
    vcpu: Any = Stateful()
    found = state.capture(vcpu, [0x10, 0x11, 0x12, abi.MSR_KVM_WALL_CLOCK_NEW, 0x4B56_4D01])
    assert found["msrs"] == [(0x10, 0x11), (0x12, 0x13), (0x4B56_4D01, 0x4B56_4D02)]
    names = [*abi.ARCHES["x86_64"].registers]
    state.restore(vcpu, found | {"msrs": [(0x11, 1), (0x12, 2), (abi.MSR_KVM_WALL_CLOCK_NEW, 3), (0x13, 4)]})
    assert vcpu.given == [*((name, name.encode()) for name in names), (0x12, 2), (0x13, 4)]
    state.restore(vcpu, found | {"msrs": [(5, 6)]})  # refused, and it is that already
    with pytest.raises(ValueError, match="refuses the state's MSR 0x6 = 0x6: "):
        state.restore(vcpu, found | {"msrs": [(6, 6)]})


def test_numbers_of_a_state_are_of_64_bits() -> None:
    for fits in (0, 1, (1 << 64) - 1):
        assert state._number(fits) == fits
    for wrong in (-1, 1 << 64, True, 1.0, "1", None):
        with pytest.raises(ValueError, match="is none"):
            state._number(wrong)


def test_rates_to_their_edges() -> None:
    assert [state.Guest("counting", rate).rate for rate in (1e-9, 1, 1e12, None)] == [1e-9, 1.0, 1e12, None]
    for wrong in (0, 0.9e-9, 1.1e12, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="a rate in pages a second"):
            state.Guest("counting", wrong)


# --- rings -------------------------------------------------------------------------------------------------


class Vm:
    """A VM that has some capabilities, and resets as it is told to."""

    def __init__(self, caps: Iterable[Cap] = (), resets: Iterable[int | OSError] = ()) -> None:
        self.caps, self.resets, self.enabled = set(caps), list(resets), list[tuple[int, ...]]()

    def check_extension(self, cap: Cap) -> int:
        return 65536 * (cap in self.caps)

    def enable_cap(self, *given: int) -> None:
        self.enabled.append(given)

    def reset_dirty_rings(self) -> int:
        answer = self.resets.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer


@pytest.mark.parametrize("entries", [256, 512, 4096])
@pytest.mark.parametrize("bitmap", [False, True])
@pytest.mark.parametrize("caps", [(Cap.DIRTY_LOG_RING,), (Cap.DIRTY_LOG_RING, Cap.DIRTY_LOG_RING_ACQ_REL)])
def test_a_ring_is_enabled_once_by_the_best_that_there_is(
    caps: tuple[Cap, ...], bitmap: bool, entries: int, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(abi, "arch", lambda: abi.ARCHES["x86_64"])
    vm: Any = Vm([*caps, *[Cap.DIRTY_LOG_RING_WITH_BITMAP] * bitmap])
    assert ring.enable_ring(vm, entries) is bitmap
    assert vm.enabled == [(caps[-1], 16 * entries), *[(Cap.DIRTY_LOG_RING_WITH_BITMAP,)] * bitmap]


@pytest.mark.parametrize("entries", [-4096, -256, -1, 0, 1, 128, 255, 257, 384])
def test_a_ring_is_a_power_of_two_and_a_page(entries: int) -> None:
    vm: Any = Vm([Cap.DIRTY_LOG_RING, Cap.DIRTY_LOG_RING_ACQ_REL])
    with pytest.raises(OSError, match=f"a power of two of entries, 256 or more, not {entries}$") as raised:
        ring.enable_ring(vm, entries)
    assert raised.value.errno == EINVAL
    assert not vm.enabled


def test_a_kernel_without_rings_says_so() -> None:
    vm: Any = Vm([Cap.DIRTY_LOG_RING_WITH_BITMAP])
    with pytest.raises(OSError, match="no dirty ring") as raised:
        ring.enable_ring(vm, 256)
    assert raised.value.errno == ENOTSUP
    assert not vm.enabled


class Queue(ring.DirtyRing):
    """A ring without a vCPU: what is written to it is read once."""

    def __init__(self, *entries: tuple[int, int]) -> None:
        self._entries = np.zeros(8, dtype=ring.GFN)
        self._next = 0
        self.push(*entries)

    def push(self, *entries: tuple[int, int]) -> None:
        for number, (slot, page) in enumerate(entries, self._next):
            self._entries[number % 8] = (1, slot, page)


def test_a_signal_that_ends_a_reset_is_no_error() -> None:
    again = OSError(EINTR, "again")
    vm: Any = Vm(resets=[again, again, 2, again, 1])
    assert [each.tolist() for _, each in ring.harvest(vm, [Queue((0, 3), (0, 4)), Queue((0, 9))])] == [[3, 4], [9]]
    assert not vm.resets
    vm = Vm(resets=[OSError(EIO, "broken"), 1])
    with pytest.raises(OSError, match="broken"):
        list(ring.harvest(vm, [Queue((0, 3))]))
    assert vm.resets == [1]


def test_more_resets_than_entries_are_fine() -> None:
    """Some of an earlier harvest, which was interrupted, may have been due still."""
    vm: Any = Vm(resets=[5])
    assert [each.tolist() for _, each in ring.harvest(vm, [Queue((0, 3))])] == [[3]]


def test_rings_are_recovered_one_and_all() -> None:
    rings = [Queue((0, 1)), Queue((0, 2), (0, 3))]
    for each in rings:
        each.take()
        each._next = 0
    vm: Any = Vm(resets=[1, 2, 0])
    ring.recover(vm, rings)
    assert [each._next for each in rings] == [1, 2]
    assert not vm.resets


def logs_of(vm: Any, lock: Any) -> list[KernelPages]:
    slots = [Memslot(3, 1, 0, 70, 0), Memslot(4, 1, 100, 5, 0)]
    return [KernelPages(vm, slot, lock, bitmap=False) for slot in slots]


def marked(log: KernelPages) -> list[int]:
    with log.lend() as lease:
        return lease.bitmap.pages().tolist()


def test_pages_go_to_the_logs_of_their_slots() -> None:
    lock = RLock()
    vm: Any = Vm(resets=[6])
    rings = Rings(vm, lock)
    rings.logs, rings.rings = logs_of(vm, lock), [Queue((3, 69), (4, 0), (3, 0), (3, 69)), Queue((4, 4), (9, 1))]
    assert rings.gather() == 6  # and one of a slot that has gone since
    assert [marked(log) for log in rings.logs] == [[0, 69], [0, 4]]
    assert rings.gather() == 0
    assert [marked(log) for log in rings.logs] == [[], []]


def test_all_pages_are_dirty_after_an_interrupt_once(monkeypatch: Patch) -> None:
    lock = RLock()
    vm: Any = Vm(resets=[1, 0, 1])
    rings = Rings(vm, lock)
    rings.logs, rings.rings = logs_of(vm, lock), [Queue((3, 7))]
    with monkeypatch.context() as patch:
        patch.setattr(KernelPages, "note", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            rings.gather()
    rings.rings[0].push((3, 8))  # type: ignore[attr-defined]
    assert rings.gather() == 1
    assert [marked(log) for log in rings.logs] == [list(range(70)), list(range(5))]
    assert rings.gather() == 0
    assert [marked(log) for log in rings.logs] == [[], []]


def test_all_pages_are_dirty_after_a_failure_which_stays() -> None:
    lock = RLock()
    vm: Any = Vm(resets=[OSError(EIO, "broken")])
    rings = Rings(vm, lock)
    rings.logs, rings.rings = logs_of(vm, lock), [Queue((3, 7))]
    for _ in range(2):
        with pytest.raises(OSError, match="broken"):
            rings.gather()
    assert [marked(log) for log in rings.logs] == [list(range(70)), list(range(5))]


# --- the thread --------------------------------------------------------------------------------------------


class Scripted:
    """A vCPU whose stays in the guest are a list: how long each takes, and why it ends."""

    def __init__(self, stays: Iterable[tuple[float, int]]) -> None:
        self.stays, self.immediate_exit = list(stays), False
        self.now, self.slept, self.chunk = 0.25, list[float](), 0
        self.on_run: Callable[[], object] = lambda: None

    def run(self) -> int:
        self.on_run()
        if self.immediate_exit:
            return Exit.INTR
        seconds, reason = self.stays.pop(0)
        self.now += seconds
        return reason

    def field(self, name: str) -> tuple[int, ...]:
        return {"fail_entry": (0x8000_0021, 5), "internal": (3, 2)}[name]


@pytest.fixture
def made(monkeypatch: Patch) -> Callable[..., tuple[thread.VcpuThread, Scripted]]:
    """Return a function that makes a thread which isn't started: it works in the test's, by a clock of the test's."""

    def made_(
        *stays: tuple[float, int], when_full: Callable[[], int] | None = None
    ) -> tuple[thread.VcpuThread, Scripted]:
        script = Scripted(stays)
        vcpu: Any = script
        found = thread.VcpuThread(4, vcpu, when_full)

        def sleep(seconds: float) -> None:
            script.slept.append(round(seconds, 9))
            script.now += max(seconds, 0)
            found._runner.wanted = bool(script.stays)

        monkeypatch.setattr(thread, "monotonic", lambda: script.now)
        monkeypatch.setattr(thread.guest, "set_chunk", lambda _vcpu, _kind, chunk: setattr(script, "chunk", chunk))
        monkeypatch.setattr(thread.guest, "at", lambda _vcpu: 0x1_0004)
        monkeypatch.setattr(found._runner, "sleep", sleep)
        found._runner.wanted = True
        return found, script

    return made_


Made = Callable[..., tuple[thread.VcpuThread, Scripted]]


@pytest.mark.parametrize(
    ("rate", "chunk", "with_ring"),
    [
        (None, 4096, 32), (1e9, 4096, 32), (819_200, 4096, 32), (819_000, 4095, 32), (6_400, 32, 32),
        (6_399, 31, 31), (400, 2, 2), (399, 1, 1), (1, 1, 1),
    ],
)  # fmt: skip
def test_a_guest_exits_two_hundred_times_a_second(made: Made, rate: float | None, chunk: int, with_ring: int) -> None:
    """With a rate, and less often only where the pages between two exits are as many, or as few, as they may be."""
    for when_full, wanted in ((None, chunk), (lambda: 0, with_ring)):
        found, script = made(when_full=when_full)
        found.pace("counting", rate)
        assert (found.rate, found.chunk, script.chunk) == (rate, wanted, wanted)


def test_pages_are_counted_where_a_chunk_is_done(made: Made) -> None:
    full: list[int] = []
    stays = [(0.1, Exit.IO), (0.1, Exit.INTR), (0.1, Exit.MMIO), (0.1, Exit.DIRTY_RING_FULL), (0.1, Exit.IO)]
    found, script = made(*stays, when_full=lambda: full.append(1) or 1)
    assert (found.pages, found.percent) == (0, 0)
    found.pace("counting", None)
    found._work()
    assert found.pages == 3 * 32
    assert full == [1]
    assert script.slept == [0.0] * 5


@pytest.mark.parametrize(("percent", "pause"), [(0, 0.0), (1, 0.01), (50, 0.99), (80, 3.96), (99, 98.01)])
def test_a_throttle_is_that_part_of_the_time(made: Made, percent: int, pause: float) -> None:
    found, script = made((0.99, Exit.IO), (0.99, Exit.INTR))
    found.pace("counting", None)
    found.percent = percent
    found._run()
    assert script.slept == [pause] * 2


def test_a_rate_is_kept_to_and_what_was_missed_is_made_up_for_up_to_a_second(made: Made) -> None:
    """Times are in 256ths of a second, in which the guest may write two pages: a stay, and the wait after it.

    It waits for what it was early. It is late by a second, and catches up; by more, and begins anew.
    """
    turns = [
        (0.5, Exit.IO, 0.5), (0.25, Exit.INTR, 0), (0, Exit.IO, 0.75), (257, Exit.IO, 0), (0, Exit.IO, 0),
        (2.5, Exit.IO, 0), (0.5, Exit.IO, 0.5), (0.25, Exit.IO, 0.75),
    ]  # fmt: skip
    found, script = made(*((stay / 256, reason) for stay, reason, _ in turns))
    found.pace("counting", 512)
    found._run()
    assert found.chunk == 2
    assert script.slept == [round(wait / 256, 9) for *_, wait in turns]


def test_a_throttled_guest_with_a_rate_waits_for_the_longer_of_the_two(made: Made) -> None:
    found, script = made((0.001, Exit.IO), (0.004, Exit.IO))
    found.pace("counting", 400)
    found.percent = 50
    found._run()
    assert script.slept == [0.004, 0.004]


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        (Exit.HLT, "KVM_EXIT_HLT"),
        (Exit.FAIL_ENTRY, r"KVM_EXIT_FAIL_ENTRY \(reason 0x80000021 on processor 5\)"),
        (Exit.INTERNAL_ERROR, r"KVM_EXIT_INTERNAL_ERROR \(suberror 3, of 2 numbers\)"),
        (99, "KVM_EXIT_99"),
    ],
)
def test_an_exit_that_nobody_answers_is_said_whole(made: Made, reason: int, said: str) -> None:
    found, _ = made((0.1, reason))
    found.pace("counting", None)
    with pytest.raises(GuestExitError, match=f"^.*vCPU 4 stopped at 0x10004 with {said}$") as raised:
        found._run()
    assert raised.value.errno == EIO


def test_a_ring_that_is_full_and_empty_a_hundred_times_is_no_error_yet(made: Made) -> None:
    for when_full in (None, lambda: 0):
        found, _ = made(when_full=when_full)
        for _ in range(100):
            found._make_room()
        with pytest.raises(GuestExitError, match="KVM_EXIT_DIRTY_RING_FULL"):
            found._make_room()


def test_a_guest_that_is_resumed_while_it_stops_is_not_entered_to_finish(made: Made) -> None:
    """The last entry only finishes an instruction: it ends at once, whoever asks for what meanwhile."""
    found, script = made((0.1, Exit.IO))
    found.pace("counting", None)
    found.pause()
    script.on_run = lambda: script.immediate_exit and found.resume()
    found._complete()
    assert not script.immediate_exit
    assert script.stays == [(0.1, Exit.IO)]
    found.close()


def test_the_finishing_entry_that_fails_leaves_nothing_behind(made: Made) -> None:
    found, script = made()
    script.on_run = lambda: (_ for _ in ()).throw(OSError(EIO, "broken"))
    with pytest.raises(OSError, match="broken"):
        found._complete()
    assert not script.immediate_exit


def test_signals_that_stopped_a_guest_are_taken_from_the_queue(made: Made) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        found, _ = made((0.1, Exit.IO), (0.1, Exit.INTR))
        signal.raise_signal(signal.SIGUSR1)
        found._enter()
        assert signal.SIGUSR1 in signal.sigpending()
        found._enter()
        assert signal.SIGUSR1 not in signal.sigpending()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_the_barrier_is_asked_for_by_its_number(monkeypatch: Patch) -> None:
    asked: list[tuple[int, ...]] = []

    class Libc:
        def syscall(self, *given: int) -> int:
            asked.append(given)
            return -1

    monkeypatch.setattr(abi, "arch", lambda: abi.ARCHES["aarch64"])
    monkeypatch.setattr(ioctl, "_libc", Libc())
    with pytest.raises(OSError, match="membarrier: "):
        ioctl.fence()
    assert [given[:3] for given in asked] == [(283, 8, 0), (283, 16, 0), (283, 8, 0)]
