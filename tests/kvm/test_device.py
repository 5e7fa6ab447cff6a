"""The thin layer: what the kernel answers, and what is refused before it is asked."""

import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator
from errno import EBADF, EINVAL, EIO, ENOENT, ENOTTY
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from leaks import descriptors

from hwdbm.kvm import Kvm, KvmUnavailableError, VcpuFd, VmFd, abi, ioctl
from hwdbm.kvm.abi import Cap, Exit
from hwdbm.kvm.ring import harvest

PAGE, BASE, NPAGES = 4096, 0x10_0000, 130


class Small(NamedTuple):
    """A VM of 130 pages that logs."""

    vm: VmFd
    vcpu: VcpuFd
    memory: np.ndarray


@pytest.fixture
def small(kvm: Kvm) -> Iterator[Small]:
    memory = np.frombuffer(mmap.mmap(-1, NPAGES * PAGE), dtype=np.uint8)
    with kvm.create_vm() as vm, vm.create_vcpu(0) as vcpu:
        region = {"guest_phys_addr": BASE, "memory_size": NPAGES * PAGE, "userspace_addr": memory.ctypes.data}
        vm.set_memory_region(slot=0, flags=1, **region)
        yield Small(vm, vcpu, memory)


def pages(vm: VmFd) -> list[int]:
    out = np.zeros(3, dtype=np.uint64)
    vm.get_dirty_log(0, out)
    return np.unpackbits(out.view(np.uint8), bitorder="little").nonzero()[0].tolist()


def wall_clock(small: Small, gpa: int) -> None:
    small.vcpu.set_msr(abi.MSR_KVM_WALL_CLOCK_NEW, gpa)


def test_the_kernel_logs_its_own_writes(small: Small) -> None:
    assert pages(small.vm) == []
    wall_clock(small, BASE + 5 * PAGE)
    wall_clock(small, BASE + 64 * PAGE - 4)  # 12 bytes, over two pages
    wall_clock(small, BASE + 129 * PAGE + 100)
    assert small.memory[5 * PAGE : 5 * PAGE + 12].any()
    assert pages(small.vm) == [5, 63, 64, 129]
    assert pages(small.vm) == []


def test_get_under_manual_protection_only_shows(kvm: Kvm, small: Small) -> None:
    small.vm.enable_cap(Cap.MANUAL_DIRTY_LOG_PROTECT2, abi.DIRTY_LOG_MANUAL_PROTECT_ENABLE)
    for page in (1, 65):
        wall_clock(small, BASE + page * PAGE)
    assert pages(small.vm) == pages(small.vm) == [1, 65]
    mask = np.array([2], dtype=np.uint64)
    small.vm.clear_dirty_log(0, 64, 64, mask)
    assert pages(small.vm) == [1]
    small.vm.clear_dirty_log(0, 0, NPAGES, np.full(3, -1 & (1 << 64) - 1, dtype=np.uint64))
    assert pages(small.vm) == []


def test_errors_have_the_kernels_errno_and_name_the_request(small: Small) -> None:
    out = np.zeros(3, dtype=np.uint64)
    with pytest.raises(OSError, match="KVM_GET_DIRTY_LOG of slot 7") as raised:
        small.vm.get_dirty_log(7, out)
    assert raised.value.errno == ENOENT
    with pytest.raises(OSError, match=r"KVM_CLEAR_DIRTY_LOG of slot 0, pages 1\+64") as raised:
        small.vm.clear_dirty_log(0, 1, 64, out)
    assert raised.value.errno == EINVAL
    with pytest.raises(OSError, match="KVM_ENABLE_CAP of capability 9999") as raised:
        small.vm.enable_cap(9999)
    assert raised.value.errno == EINVAL
    with pytest.raises(OSError, match="MSR 0x9999 can't be set to 0x3"):
        small.vcpu.set_msr(0x9999, 3)


def test_the_kernel_never_gets_an_array_that_is_too_small(small: Small) -> None:
    with pytest.raises(ValueError, match="its bitmap has 3 words, got an array of 2"):
        small.vm.get_dirty_log(0, np.zeros(2, dtype=np.uint64))
    with pytest.raises(TypeError, match="an array of uint64 is needed, not of int64"):
        small.vm.get_dirty_log(0, np.zeros(3, dtype=np.int64))
    with pytest.raises(ValueError, match="contiguous"):
        small.vm.get_dirty_log(0, np.zeros(6, dtype=np.uint64)[::2])
    frozen = np.zeros(3, dtype=np.uint64)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        small.vm.get_dirty_log(0, frozen)
    with pytest.raises(ValueError, match="its bitmap has 2 words, got an array of 1"):
        small.vm.clear_dirty_log(0, 0, 128, np.zeros(1, dtype=np.uint64))
    with pytest.raises(ValueError, match="slot is 0 to 0xffffffff, not -1"):
        small.vm.set_memory_region(slot=-1, flags=0, guest_phys_addr=0, memory_size=PAGE, userspace_addr=0)
    wall_clock(small, BASE)
    small.vm.clear_dirty_log(0, 0, 0, np.zeros(0, dtype=np.uint64))  # nothing, and nothing of it


def test_registers_go_back_as_they_came(kvm: Kvm, small: Small) -> None:
    for name in kvm.arch.registers:
        found = small.vcpu.get(name)
        small.vcpu.set(name, found)
        assert small.vcpu.get(name) == found
    with pytest.raises(ValueError, match="struct kvm_regs has 144 bytes, got 3"):
        small.vcpu.set("regs", b"abc")
    indices = kvm.msr_indices()
    assert {0x10, 0x174} <= set(indices)
    assert set(small.vcpu.get_msrs([*indices, 0x9999])) <= {*indices, 0x9999}


def test_immediate_exit_and_kicks_are_results_and_no_errors(small: Small) -> None:
    small.vcpu.immediate_exit = True
    assert small.vcpu.immediate_exit
    assert small.vcpu.run() == Exit.INTR
    small.vcpu.immediate_exit = False
    assert not small.vcpu.immediate_exit


def test_the_lock_of_the_interpreter_is_free_while_the_guest_runs(small: Small) -> None:
    small.memory[:2] = (0xEB, 0xFE)  # 1: jmp 1b, in real mode
    sregs = bytearray(small.vcpu.get("sregs"))
    sregs[:8] = BASE.to_bytes(8, "little")  # the base of CS
    small.vcpu.set("sregs", bytes(sregs))
    regs = np.zeros(18, dtype=np.uint64)
    regs[17] = 2
    small.vcpu.set("regs", regs.tobytes())
    stopped: list[int] = []

    def run() -> None:
        while not stopped:
            stopped.append(small.vcpu.run())

    thread = threading.Thread(target=run)
    thread.start()
    start = time.monotonic()
    time.sleep(0.02)  # would never end
    assert time.monotonic() - start < 5
    assert thread.is_alive()
    small.vcpu.immediate_exit = True
    import signal

    previous = signal.signal(signal.SIGUSR2, lambda *_: None)
    assert thread.ident is not None
    signal.pthread_kill(thread.ident, signal.SIGUSR2)
    thread.join(5)
    signal.signal(signal.SIGUSR2, previous)
    assert stopped == [Exit.INTR]


def test_closed_files_are_ebadf(kvm: Kvm) -> None:
    vm = kvm.create_vm()
    vm.close()
    vm.close()
    with pytest.raises(OSError, match="KVM_CREATE_VCPU") as raised:
        vm.create_vcpu(0)
    assert raised.value.errno == EBADF


def test_why_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KvmUnavailableError, match="there is no such file") as raised:
        Kvm(str(tmp_path / "kvm"))
    assert raised.value.errno == ENOENT
    with pytest.raises(KvmUnavailableError, match="it is not KVM") as raised:
        Kvm(os.devnull)
    assert raised.value.errno == ENOTTY
    with monkeypatch.context() as patch:
        patch.setattr("platform.machine", lambda: "vax")
        with pytest.raises(KvmUnavailableError, match="this machine is vax"):
            Kvm()

    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(KvmUnavailableError, match="no permission"):
        Kvm()


def test_another_version_is_refused(kvm: Kvm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(abi, "API_VERSION", 13)
    with pytest.raises(KvmUnavailableError, match="API version 12, not 13"):
        Kvm()


def test_fence_is_nothing_here_and_membarrier_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    ioctl.fence()
    calls: list[int] = []
    answers = iter([-1, 0, 0, 0])

    def membarrier(command: int) -> int:
        calls.append(command)
        return next(answers)

    monkeypatch.setattr(abi, "arch", lambda: abi.ARCHES["aarch64"])
    monkeypatch.setattr(ioctl, "_membarrier", membarrier)
    ioctl.fence()
    ioctl.fence()
    assert calls == [8, 16, 8, 8]  # registered once


def test_no_file_is_left_open(kvm: Kvm, make: Callable[..., object]) -> None:
    before = descriptors()
    for _ in range(3):
        vm = make(1 << 20, vcpus=2, ring=256)
        vm.resume()
        vm.close()
    with pytest.raises(OSError, match="power of two"):
        make(1 << 20, ring=1000)
    with pytest.raises(ValueError, match="manual_protect is off or on"):
        make(1 << 20, manual_protect="sometimes")
    assert descriptors() == before


@pytest.mark.parametrize(("resets", "taken"), [((0,), 3), ((2, 0), 3), ((2, 1), 3), ((), 0)])
def test_entries_that_the_kernel_does_not_reset_are_an_error(resets: tuple[int, ...], taken: int) -> None:
    """It resets some at a time; one that says that there were none would be asked for ever."""
    left = list(resets)

    class Vm:
        def reset_dirty_rings(self) -> int:
            return left.pop(0)

    class Ring:
        def take(self) -> np.ndarray:
            return np.array([(1, page) for page in range(taken)], dtype=[("slot", "u4"), ("offset", "u8")])

    found = harvest(Vm(), [Ring()])  # type: ignore[arg-type,list-item]
    if sum(resets) == taken:
        assert [(slot, pages.tolist()) for slot, pages in found] == ([(1, [0, 1, 2])] if taken else [])
    else:
        with pytest.raises(OSError, match=r"[31] entries were taken") as error:
            list(found)
        assert error.value.errno == EIO
    assert not left
