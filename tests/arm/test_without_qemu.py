"""The Arm machine's numbers, to their edges, without QEMU: its layout, its mailbox, what its guests are given."""

import ctypes
import io
import os
from collections.abc import Callable
from dataclasses import replace
from errno import EIO, ENODEV, ENOMEM, ETIMEDOUT
from threading import RLock
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from clocks import Clock

from hwdbm import Granule, pte
from hwdbm.arm import ArmUnavailableError, Board, GuestMemoryError, TablePlan, board, build, vm
from hwdbm.arm.abi import (
    FIRMWARE,
    MAGIC,
    MAILBOX,
    RAM,
    SHARED,
    VCPUS,
    GuestKind,
    GuestTask,
    Mailbox,
    Mapping,
    Shared,
    Vcpu,
    VcpuState,
)
from hwdbm.arm.board import POOL, POOL_END, GuestCrashError
from hwdbm.arm.guest import PRIVATE, PRIVATE_PA, Guests, Work, private_size, system_mappings
from hwdbm.memslot import Memslot
from hwdbm.vtcr import Vtcr

G = 1 << 30
BLOCK = {Granule.K4: 2 << 20, Granule.K16: 32 << 20, Granule.K64: 512 << 20}


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


@pytest.mark.parametrize(
    ("memory", "options"),
    [
        (4096, {}), (4096, {"vcpus": 1}), (3 << 12, {"vcpus": 7}), (65536, {"granule": Granule.K64}),
        (4096, {"base": LOWEST}), (4096, {"base": TOP - 4096}), (3 << 20, {"base": 0x8000_1000}),
        ((1 << 20) + 4096, {"blocks": True, "base": 0x8020_0000 - 4096}),
    ],
)  # fmt: skip
def test_a_machine_has_ram_for_its_memory_and_no_more(boards, memory, options) -> None:
    """In whole MiB, from 2 GiB on or as far behind it as the memory begins within a block."""
    with pytest.raises(MadeError):
        vm.ArmVm(memory, **options)
    ((ram, plan, vcpus),) = boards
    granule, base = options.get("granule", Granule.K4), options.get("base", 2 * G)
    end = max(each.pa + each.size for each in plan.mappings)
    assert end == 2 * G + base % BLOCK[granule] + memory
    assert ram % (1 << 20) == 0 <= RAM + ram - end < 1 << 20
    assert vcpus == options.get("vcpus", 2)
    private = plan.mappings[2]
    assert (private.ipa, private.pa, private.size) == (
        PRIVATE, PRIVATE_PA, private_size(memory // granule.page_size, vcpus)
    )  # fmt: skip
    assert plan.vtcr.hw_dbm
    assert plan.vtcr.ipa_bits == 40


@pytest.mark.parametrize(
    ("memory", "options", "said"),
    [
        (0, {}, "whole pages of 4096"), (-4096, {}, "whole pages"), (4095, {}, "whole"), (4097, {}, "whole pages"),
        (4096, {"granule": Granule.K16}, "whole pages of 16384"), (4096, {"base": 2 * G + 1}, "whole pages"),
        (4096, {"base": LOWEST - 4096}, "it lies in 0x4a000000..0xffffffffff, and 2 vCPUs count it in 0x2000000 bytes"),
        (8192, {"base": TOP - 4096}, "it lies in"), (4096, {"vcpus": 0}, "vcpus is 1 to 7"),
        (4096, {"vcpus": 8}, "vcpus is 1 to 7"), (4096, {"base": -4096}, "gpa -0x1000|base|base_gfn"),
    ],
)  # fmt: skip
def test_memory_that_no_machine_has_is_refused(boards, memory, options, said) -> None:
    with pytest.raises(ValueError, match=said):
        vm.ArmVm(memory, **options)
    assert not boards


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


def test_a_plan_is_laid_where_the_firmware_looks(made: Board) -> None:
    vtcr = Vtcr.for_vm(Granule.K16, 40, mmfr1=0x22, pa_bits=40)
    tables = np.array([POOL + 0x1_0000, POOL + 0x4_0000, POOL + 0x2_0000], dtype=np.uint64)
    mappings = (Mapping(1, 2, 3, 4, 5), Mapping(6, 7, 8, 9, 10))
    made.plan = TablePlan(vtcr, mappings, vmid=5, root=POOL + 0x8000, tables=tables, junk=6, table_bits=7 << 59)
    made._lay()
    box = made.mailbox
    assert (box.vcpus, box.vtcr, box.vttbr) == (2, vtcr.encode(), 5 << 48 | POOL + 0x8000)
    assert (box.root, box.root_tables, box.page_shift) == (POOL + 0x8000, vtcr.root_tables, 14)
    assert (box.start_level, box.junk, box.table_bits) == (vtcr.start_level, 6, 7 << 59)
    assert (box.mappings, box.tables, made.shared.stop) == (2, 3, 1)
    assert bytes(made.at(box.mappings_pa, Mapping * 2)) == b"".join(map(bytes, mappings))
    assert made.ram.view[box.tables_pa - RAM :][:24].tobytes() == tables.tobytes()
    assert box.tables_pa >= box.mappings_pa + 80
    box.used = 1
    assert made.spare_tables.tolist() == tables[1:].tolist()
    assert made.plan.root_end == POOL + 0x8000 + vtcr.root_tables * 16384


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


def test_how_long_a_board_has_to_answer(made: Board) -> None:
    """Its end is seen at once; what it said last is told, and no more than that."""
    said: Any = made._log
    for seconds in (0.5, 2.0):
        began = board.time.monotonic()
        answers = iter([False, False, True])

        def done(answers: Any = answers) -> bool:
            board.time.sleep(seconds / 4)  # noqa: B023
            return next(answers)

        made._wait("do it", done, seconds)
        with pytest.raises(OSError, match=rf"didn't do this in {seconds:g} s: do it; QEMU said nothing") as error:
            made._wait("do it", lambda: False, seconds)
        assert error.value.errno == ETIMEDOUT
        assert board.time.monotonic() - began == pytest.approx(1.75 * seconds, abs=0.1)
    said.write(b" " + b"a" + b"b" * 499 + b"c\n")
    made._process.returncode = 4
    for call in (lambda: made._wait("do it", lambda: False, 1.0), made.check):
        with pytest.raises(OSError, match=r"the Arm machine ended \(status 4\): b{499}c$") as error:
            call()
        assert error.value.errno == EIO
    made._wait("do it", lambda: True, 1.0)  # what is done is done


def test_what_is_wrong_with_a_board_that_comes_up(made: Board, monkeypatch) -> None:
    rung: list[str] = []
    monkeypatch.setattr(made, "_ring", lambda command: rung.append(command.name))
    box = made.mailbox
    box.magic, box.mmfr1 = MAGIC, 2
    with pytest.raises(OSError, match=r"the firmware's structures have \(0, 0\) bytes") as error:
        made._boot()
    assert error.value.errno == EIO
    box.sizes[:] = ctypes.sizeof(Mailbox), ctypes.sizeof(GuestTask)
    made._boot()
    box.mmfr1 = 1
    with pytest.raises(ArmUnavailableError, match=r"has no hardware DBM: QEMU 7\.2") as error:
        made._boot()
    assert (error.value.errno, rung) == (ENODEV, ["BUILD"])
    box.mmfr1, box.failed, box.tables = 3, 0x4000_0001, 9
    with pytest.raises(OSError, match="there are 9 tables, too few for ipa 0x40000000") as error:
        made._boot()
    assert error.value.errno == ENOMEM
    box.magic = 0
    with pytest.raises(OSError, match="didn't do this in 60 s: come up"):
        made._boot()


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


def test_the_pipe_of_a_board_is_closed_once_whatever_its_numbers(made: Board, monkeypatch) -> None:
    closed: list[int] = []
    monkeypatch.setattr(os, "close", closed.append)
    made._pipe = 0, 7
    made._unplug()
    made._unplug()
    assert closed == [0, 7]


# --- guests ------------------------------------------------------------------------------------------------


NPAGES = (1 << 14) + 1


def test_guests_have_their_own_places_and_numbers(made: Board) -> None:
    made.mailbox.guest, made.mailbox.vectors = 0x40_1000, 0x40_2000
    guests = Guests(made, 3 * G, NPAGES, 14)
    work = (Work(GuestKind.STAGE1, 1, 2, 3, 4, 5, skip=True), Work(GuestKind.RANDOM, 6, 7))
    guests.give(work)
    each, random = 3 << 16, set()
    for number, one in enumerate(work):
        task, cpu = made.at(PRIVATE_PA + number * each, GuestTask), made.vcpu(number)
        assert (task.kind, task.vcpu, task.base, task.size) == (one.kind, number, one.base, one.size)
        assert (task.page_shift, task.origin, task.counts) == (14, 3 * G, PRIVATE + number * each + 65536)
        assert (task.window, task.limit, task.number) == (one.window, one.limit, 1)
        assert (cpu.x[0], cpu.sp) == (PRIVATE + number * each, PRIVATE + number * each + 65536)
        assert (cpu.pc, cpu.vbar, cpu.pstate, cpu.skip) == (0x40_1000, 0x40_2000, 0x3C5, one.skip)
        assert bool(cpu.hcr & 1 << 12) == (one.kind is not GuestKind.STAGE1)  # DC: it has no stage 1
        assert Guests.allowed(cpu)
        random.add(task.random)
        counts = guests.counts_of(number)
        counts[:] = np.arange(NPAGES) % 7 + number
        assert made.ram.view[PRIVATE_PA - RAM + number * each + 65536 :][:8].tolist() == [
            number,
            0,
            0,
            0,
            1 + number,
            0,
            0,
            0,
        ]
        task.stores = 10 + number
    assert guests.counts().tolist() == (np.arange(NPAGES) % 7 * 2 + 1).tolist()
    assert guests.stores == 21
    for seed in (0, 5, 1 << 56, (1 << 64) - 1):
        guests.give((Work(GuestKind.RANDOM, 0, 0, seed=seed),) * 2)
        random |= {task.random for task in guests.tasks}
    assert len(random) == 7  # seeds are of 56 bits, and one of them came before
    assert 0 not in random
    guests.give((Work(GuestKind.RANDOM, 0, 0, seed=5),) * 2)
    assert [task.random for task in guests.tasks] == [0x1560_9F7C_746C_6901, 0xB398_1935_F3B6_E516]  # as ever
    with pytest.raises(ValueError, match="2 vCPUs do as many kinds of work, not 1"):
        guests.give(work[:1])


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


def test_a_rate_is_shared_by_the_vcpus(machine) -> None:
    one = machine(GuestKind.IDLE, GuestKind.IDLE)
    for rate, each in ((500, 250), (0.001, 1), (1, 1), (2, 1), (3.2, 2), (999_999_999, 500_000_000), (None, 0)):
        one.set_rate(rate)
        assert list(one.board.shared.rate) == [each, each, *(VCPUS - 2) * [0]]
    for rate in (0, -1, 1e9, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="more than 0 and less than 1e9"):
            one.set_rate(rate)
    one.throttle(99)
    assert one.board.shared.percent == 99


@pytest.mark.parametrize("kinds", [(GuestKind.WINDOW, GuestKind.RANDOM), (GuestKind.ZERO, GuestKind.SEQUENTIAL)])
def test_each_guest_that_numbers_its_stores_is_looked_at(machine, kinds) -> None:
    """A page that vCPU 1 counted has the number of a store that it has made, and its own number, in its own word."""
    one = machine(*kinds)
    words = one.memory(0).view(np.uint64).reshape(4, 512)
    one.guests.counts_of(1)[[1, 3]] = 5
    one.guests.tasks[1].number = 100
    words[1, 16], words[3, 16] = 1 << 3 | 1, 99 << 3 | 1
    words[:, :16], words[2] = 7, 7  # what no vCPU 1 wrote
    one.check()
    for page, found in ((3, 100 << 3 | 1), (3, 0), (1, 5 << 3 | 2), (1, 5 << 3)):
        kept, words[page, 16] = words[page, 16].copy(), found
        with pytest.raises(GuestMemoryError, match=f"page {page}: vCPU 1 .* written {found:#x}: .* its store 100"):
            one.check()
        words[page, 16] = kept
    one.check()


def test_what_a_compiler_says_last_is_told(monkeypatch, tmp_path) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\nprintf ' a'; printf 'b%.0s' $(seq 499); echo c\nexit 3\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(build, "tool", lambda *_: str(compiler))
    with pytest.raises(ArmUnavailableError, match=r"can't compile the firmware \(status 3\): b{499}c$"):
        build.build()
