"""The Arm machine's numbers, to their edges, without QEMU: its layout, its mailbox, what its guests are given."""

import io
from collections.abc import Callable
from dataclasses import replace
from threading import RLock
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from clocks import Clock

from hwdbm import Granule, pte
from hwdbm.arm import ArmUnavailableError, Board, TablePlan, board, build, vm
from hwdbm.arm.abi import (
    FIRMWARE,
    MAILBOX,
    RAM,
    SHARED,
    GuestKind,
    Mailbox,
    Mapping,
    Shared,
    Vcpu,
    VcpuState,
)
from hwdbm.arm.board import POOL, POOL_END, GuestCrashError
from hwdbm.arm.guest import PRIVATE, Guests, Work, system_mappings
from hwdbm.memslot import Memslot
from hwdbm.vtcr import Vtcr

G = 1 << 30


# --- which memory there can be -----------------------------------------------------------------------------


class MadeError(Exception):
    """A board was asked for."""


@pytest.fixture
def boards(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, TablePlan, int]]:
    """Return what boards are asked for; none is made."""
    asked: list[tuple[int, TablePlan, int]] = []

    def make(ram: int, plan: TablePlan, *, vcpus: int) -> None:
        asked.append((ram, plan, vcpus))
        raise MadeError

    monkeypatch.setattr(vm, "Board", make)
    return asked


LOWEST, TOP = 0x4A00_0000, 1 << 40


def slots(npages: int, private: int, at: int = PRIVATE) -> list[Memslot]:
    return [Memslot(0, 0, 2 * G >> 12, npages, 0), Memslot(1, 0, at >> 12, private >> 12, 0)]


def test_what_arrives_tells_how_many_vcpus_there_are(boards) -> None:
    """By what they have for themselves: 64 KiB, and four bytes for each page, in whole 64 KiB."""
    for npages, each in ((1, 2 << 16), (1 << 14, 2 << 16), ((1 << 14) + 1, 3 << 16)):
        for vcpus in (1, 7):
            with pytest.raises(MadeError):
                vm.ArmVm.from_slots(4096, slots(npages, vcpus * each))
            assert boards.pop()[2] == vcpus
        for private in (each // 2, each + 4096, 8 * each):
            with pytest.raises(ValueError, match="for each of 1 to 7 vCPUs, at gpa 0x48000000"):
                vm.ArmVm.from_slots(4096, slots(npages, private))
        with pytest.raises(ValueError, match="at gpa 0x48000000"):
            vm.ArmVm.from_slots(4096, slots(npages, each, PRIVATE + 65536))
    data, private = slots(1, 2 << 16)
    for page, wrong in ((4096, [data]), (4096, [data, private, private]), (8192, [data, private])):
        with pytest.raises(ValueError, match=f"has slots 0 and 1, not .*, of {page}-byte pages"):
            vm.ArmVm.from_slots(page, wrong)
    most = ((LOWEST - PRIVATE) - 65536) // 4  # pages that one vCPU can count
    with pytest.raises(MadeError):
        vm.ArmVm.from_slots(4096, slots(most, LOWEST - PRIVATE))
    with pytest.raises(ValueError, match="1 vCPUs count it in 0x2000000 bytes"):
        vm.ArmVm.from_slots(4096, slots(most + 1, LOWEST - PRIVATE + 65536))


# --- a board without QEMU ----------------------------------------------------------------------------------


class Looked(Clock):
    """A clock that goes on by a little at each look, too."""

    def monotonic(self) -> float:
        self.passed += 0.01
        return super().monotonic()


class Running:
    """A process that runs, or has ended with a status."""

    returncode: int | None = None

    def poll(self) -> int | None:
        return self.returncode


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Board:
    """Return a board of two vCPUs with RAM, and nobody who answers."""
    monkeypatch.setattr(board, "time", Looked())
    one = object.__new__(Board)
    one.vcpus, one._lock = 2, RLock()
    one.ram = SimpleNamespace(view=np.zeros(POOL_END - RAM + (1 << 20), dtype=np.uint8))  # type: ignore[assignment]
    one.mailbox, one.shared = one.at(MAILBOX, Mailbox), one.at(SHARED, Shared)
    one._process, one._log = Running(), io.BytesIO()  # type: ignore[assignment]
    return one


def test_tables_lie_behind_the_root_unless_a_plan_says_where(made: Board) -> None:
    """A start level below 0 is a negative number of 64 bits."""
    vtcr = replace(Vtcr.for_vm(Granule.K4, 52, mmfr1=0x22, pa_bits=52, ds=True), sl2=True, sl0=0)
    assert (vtcr.start_level, vtcr.root_tables) == (-1, 1)
    made.plan = TablePlan(vtcr, (Mapping(1, 2, 3, 4, 5),), root=POOL_END - 5 * 4096)
    assert made.plan.places().tolist() == [POOL_END - 4 * 4096 + 4096 * at for at in range(4)]
    made._lay()
    assert made.mailbox.start_level == (1 << 64) - 1
    assert made.mailbox.vttbr == 1 << 48 | POOL_END - 5 * 4096


def test_a_plan_has_room_up_to_the_tables(made: Board) -> None:
    vtcr = Vtcr.for_vm(Granule.K4, 40, mmfr1=0x22, pa_bits=40)
    room = (POOL - board._PLAN - 40) // 8
    for tables, fits in ((room, True), (room + 1, False)):
        places = np.full(tables, 9, dtype=np.uint64)
        made.plan = TablePlan(vtcr, (Mapping(1, 2, 3, 4, 5),), tables=places)
        if fits:
            made._lay()
            assert made.ram.view[POOL - RAM - 8 : POOL - RAM + 8].tolist() == [9, *15 * [0]]
        else:
            with pytest.raises(ValueError, match=f"1 mappings and {tables} tables are too many"):
                made._lay()
    made.plan = TablePlan(vtcr, ())
    with pytest.raises(ValueError, match="a plan maps something"):
        made._lay()


def test_the_states_and_faults_of_each_vcpu_are_looked_at(made: Board) -> None:
    for number in range(2):
        made.vcpu(number).state = VcpuState.PAUSED
    made.stop()
    assert (made.shared.stop, made.faults()) == (1, "")
    with pytest.raises(OSError, match="didn't do this in 30 s: run its vCPUs"):
        made.run()
    assert made.shared.stop == 0
    made.vcpu(0).state = VcpuState.RUNNING
    one = made.vcpu(1)
    one.state, one.pc, one.fault_esr, one.elr = VcpuState.CRASHED, 0x1234, 0x96, 0x77
    for call in (made.check, made.run):
        with pytest.raises(GuestCrashError, match=r"vCPU 1 crashed at 0x1234 \(ESR_EL2 0x96, ELR_EL1 0x77\)"):
            call()
    with pytest.raises(OSError, match="didn't do this in 30 s: stop its vCPUs"):
        made.stop()
    made.vcpu(0).state = VcpuState.PAUSED
    with pytest.raises(GuestCrashError):
        made.stop()
    one.faults, one.fault_ipa = 3, 0x5000
    assert made.faults() == "; vCPU 1 faulted 3 times, last at ipa 0x5000 (ESR_EL2 0x96)"


# --- guests ------------------------------------------------------------------------------------------------


def test_registers_that_are_no_guests_are_refused() -> None:
    hcr = 1 << 31 | 0b111 << 3 | 1
    for change, allowed in (
        ({}, True), ({"hcr": hcr | 1 << 12}, True), ({"hcr": hcr ^ 1}, False), ({"hcr": hcr | 1 << 13}, False),
        ({"pstate": 0xF000_03C5 & ~0x3C0}, True), ({"pstate": 0x3C4}, False), ({"pstate": 0x3C9}, False),
        ({"pstate": 0x3D5}, False), ({"skip": 0}, True), ({"skip": 2}, False),
    ):  # fmt: skip
        one = Vcpu()
        one.hcr, one.pstate, one.skip = hcr, 0x3C5, 1
        for name, value in change.items():
            setattr(one, name, value)
        assert Guests.allowed(one) is allowed, change


def test_the_firmware_is_mapped_in_whole_pages() -> None:
    for granule, size in ((Granule.K4, 1 << 16), (Granule.K16, 1 << 16), (Granule.K64, 1 << 16)):
        found = system_mappings(granule)
        leaf = pte.make_leaf(0, 3, writable=False)
        assert [(m.ipa, m.pa, m.size, m.level, m.bits) for m in found] == [
            (at, at, size, 3, leaf) for at in (FIRMWARE, SHARED)
        ]


@pytest.fixture
def machine(made: Board, monkeypatch) -> Callable[..., Any]:
    """Return a function that makes a machine of two vCPUs without QEMU, paused, of some kinds of guests."""
    monkeypatch.setattr(vm.ArmVm, "_check_open", lambda _self: None)
    monkeypatch.setattr(vm.ArmVm, "_check_paused", lambda _self: None)
    monkeypatch.setattr(vm.ArmVm, "page_size", 4096, raising=False)

    def make(*kinds: GuestKind) -> Any:
        one = object.__new__(vm.ArmVm)
        one._closed, one.board = True, made
        one.guests = Guests(made, 2 * G, 4, 12)
        one.guests.give(tuple(Work(kind, 2 * G, 4 << 12) for kind in kinds))
        memory = np.zeros(4 << 12, dtype=np.uint8)
        one.memory = lambda slot: memory if slot == 0 else None
        return one

    return make


def test_what_a_compiler_says_last_is_told(monkeypatch, tmp_path) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\nprintf ' a'; printf 'b%.0s' $(seq 499); echo c\nexit 3\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(build, "tool", lambda *_: str(compiler))
    with pytest.raises(ArmUnavailableError, match=r"can't compile the firmware \(status 3\): b{499}c$"):
        build.build()
