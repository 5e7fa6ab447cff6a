"""The state beside the memory: another VM goes on where the first was."""

import json
import time
from collections.abc import Callable

import numpy as np
import pytest

from hwdbm.kvm import KvmVm, abi
from hwdbm.kvm.state import VmState

SIZE = (1 << 20) + 13 * 4096
Make = Callable[..., KvmVm]


def copied(vm: KvmVm, **options: object) -> KvmVm:
    """Return another VM with the same memory, slots and state."""
    other = KvmVm.from_slots(vm.page_size, vm.slots, **options)
    for slot in vm.slots:
        other.memory(slot.id)[:] = vm.memory(slot.id)
    other.set_state(vm.state())
    return other


def ran(vm: KvmVm, seconds: float = 0.03) -> None:
    """Let a guest run so long, and on a busy machine until it has written something."""
    before, until = vm.pages, time.monotonic() + 10
    vm.resume()
    time.sleep(seconds)
    while vm.pages == before and time.monotonic() < until:
        time.sleep(0.001)
    vm.pause()


@pytest.mark.parametrize("kind", ["counting", "random"])
@pytest.mark.parametrize("vcpus", [1, 3])
@pytest.mark.parametrize("options", [{}, {"ring": 256}, {"manual_protect": "on"}], ids=["get", "ring", "clear"])
@pytest.mark.alike(3)
def test_the_guest_goes_on_elsewhere(make: Make, kind: str, vcpus: int, options: dict[str, object]) -> None:
    vm = make(SIZE, guest=kind, vcpus=vcpus, rate=None)
    for number in range(1, 5):  # there and further, each from another moment
        vm.iteration = number
        ran(vm, 0.01)
        vm.check()
        with copied(vm, **options) as other:
            assert other.digest() == vm.digest()
            other.start_log()
            before = other.memory(0).copy()
            ran(other)
            other.check()
            changed = (other.memory(0) != before).reshape(-1, 4096).any(axis=1).nonzero()[0]
            if kind == "counting":
                assert changed.size
            with other.dirty(0) as lease:
                assert set(changed.tolist()) <= set(lease.bitmap.pages().tolist())
            assert other.iteration == number


def test_registers_travel(make: Make) -> None:
    vm = make(SIZE, guest="random", seed=7)
    ran(vm)
    with copied(vm) as other:
        for name in abi.arch().registers:
            if name != "regs":  # the one with the chunk may differ
                assert other.vcpus[0].get(name) == vm.vcpus[0].get(name), name
        regs = [np.frombuffer(each.vcpus[0].get("regs"), dtype=np.uint64) for each in (vm, other)]
        assert np.array_equal(*regs)
        mine, theirs = VmState.from_bytes(vm.state()), VmState.from_bytes(other.state())
        assert mine.guest == theirs.guest
        ours = [dict(state.vcpus[0]["msrs"]) for state in (mine, theirs)]
        assert {index for index in ours[0] if ours[0][index] != ours[1].get(index)} <= {0x10}  # the TSC runs
        assert 0 <= ours[1][0x10] - ours[0][0x10] < 1 << 36


def test_a_vector_register_travels(make: Make) -> None:
    vm = make(SIZE)
    xsave = bytearray(vm.vcpus[0].get("xsave"))
    xsave[160:176] = bytes(range(16))  # XMM0
    xsave[512] |= 2  # it is in use
    vm.vcpus[0].set("xsave", bytes(xsave))
    with copied(vm) as other:
        assert other.vcpus[0].get("xsave")[160:176] == bytes(range(16))
        assert other.vcpus[0].get("fpu")[152:168] == bytes(range(16))


def test_a_clock_that_was_asked_for_is_not_written_again(make: Make) -> None:
    """Setting that MSR has KVM write memory, which has arrived: its digest would differ."""
    vm = make(SIZE, guest="idle")
    vm.vcpus[0].set_msr(abi.MSR_KVM_WALL_CLOCK_NEW, 0x4000_0000)
    vm.memory(0)[:12] = 0
    with copied(vm) as other:
        assert other.digest() == vm.digest()


def test_bad_states_are_refused_with_a_reason(make: Make) -> None:
    vm = make(SIZE, vcpus=2)
    good = vm.state()
    state = json.loads(good)

    def changed(**changes: object) -> bytes:
        return json.dumps(state | changes).encode()

    def vcpu(**changes: object) -> bytes:
        return changed(vcpus=[state["vcpus"][0] | changes, state["vcpus"][1]])

    short = {name: value for name, value in state["vcpus"][0].items() if name != "fpu"}
    for raw, words in (
        (b"", "not a state of a KVM guest"),
        (b"\xff\xfe", "not a state of a KVM guest"),
        (b"[1]", "not a state of a KVM guest"),
        (b"{}", "not a state of a KVM guest"),
        (b"[" * 100_000, "not a state of a KVM guest"),
        (changed(format=2), "format 2, not 1"),
        (changed(machine="vax"), "a state of 'vax', and this machine is"),
        (changed(vcpus=[]), "a state has 1 to 4096 vCPUs"),
        (changed(vcpus={}), "a state has 1 to 4096 vCPUs"),
        (changed(vcpus=[7] * 4097), "a state has 1 to 4096 vCPUs"),
        (changed(vcpus=[7] * 4096), "vCPU 0 of a state has"),
        (changed(vcpus=state["vcpus"][:1]), "a state of 1 vCPUs, and here are 2"),
        (changed(vcpus=[7, 8]), "vCPU 0 of a state has"),
        (changed(vcpus=[short, short]), "vCPU 0 of a state has"),
        (changed(guest={"kind": "walking", "rate": None}), "counting or random or idle, not 'walking'"),
        (changed(guest={"kind": "counting"}), "a state's guest has kind and rate"),
        (changed(guest={"kind": "counting", "rate": "fast"}), "a state's guest can't be"),
        (changed(guest={"kind": [], "rate": None}), "a state's guest can't be"),
        (changed(guest={"kind": "counting", "rate": -3}), "a rate in pages a second is a number"),
        (vcpu(regs="?"), "regs is no base64"),
        (vcpu(regs=5), "regs is no base64"),
        (vcpu(regs="AAAA"), "regs has 144 bytes, got 3"),
        (vcpu(msrs=5), "msrs are no pairs of numbers"),
        (vcpu(msrs=[[1]]), "msrs are no pairs of numbers"),
        (vcpu(msrs=[[1, -1]]), "msrs are no pairs of numbers: -1 is none"),
        (vcpu(msrs=[[0x9999, 3]]), "the kernel refuses the state's MSR 0x9999 = 0x3"),
        (vcpu(msrs=[[1 << 40, 3]]), "the kernel refuses the state's MSR"),
        (vcpu(mp_state="/////w=="), "the kernel refuses the state's mp_state"),
    ):
        with pytest.raises(ValueError, match=words):
            vm.set_state(raw)
    vm.set_state(good)
    ran(vm)
    vm.check()


def test_a_receiver_has_this_machines_pages(make: Make) -> None:
    vm = make(SIZE)
    with pytest.raises(ValueError, match="pages of 16384 bytes, and this machine's have 4096"):
        KvmVm.from_slots(16384, vm.slots)
    with KvmVm.from_slots(4096, vm.slots) as other:
        other.resume()  # idle, and so nothing
        other.pause()
        other.check()
        assert not other.memory(0).any()
