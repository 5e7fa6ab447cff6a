"""What the tests of `test_alone` leave: entries of rings, the shared page, and states, with the test as the kernel."""

import os
import signal
import struct
from collections.abc import Callable, Iterator
from errno import E2BIG, EINTR, EINVAL, EIO, EOVERFLOW
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hwdbm.kvm import abi, device, guest, ring, thread
from hwdbm.kvm.abi import Exit, Ioctl
from hwdbm.kvm.ioctl import KvmFile
from hwdbm.kvm.ring import GFN, DirtyRing
from hwdbm.kvm.state import Guest, VmState
from hwdbm.kvm.vcpu import VcpuFd

U64 = (1 << 64) - 1


# --- rings -------------------------------------------------------------------------------------------------


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


# --- the thread of a vCPU ----------------------------------------------------------------------------------


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the chunks that guests are given; each guest is at 0x10005."""
    given: list[int] = []
    monkeypatch.setattr(guest, "set_chunk", lambda _vcpu, _kind, chunk: given.append(chunk))
    monkeypatch.setattr(guest, "at", lambda _vcpu: 0x1_0005)
    return given


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


def test_a_kick_is_one_signal_to_one_thread(monkeypatch) -> None:
    kicked: list[object] = []
    monkeypatch.setattr(signal, "pthread_kill", lambda *what: kicked.append(what))
    thread._kick(7)
    assert kicked == [(7, signal.SIGUSR1)]
