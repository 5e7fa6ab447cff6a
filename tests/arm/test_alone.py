"""What the host's side of an Arm machine lays out, checks and says, to the byte, without QEMU."""

import ctypes
import hashlib
import io
import struct
from contextlib import ExitStack
from errno import EIO, ETIMEDOUT
from threading import RLock
from types import SimpleNamespace

import numpy as np
import pytest

from hwdbm import Granule
from hwdbm.arm import ArmVm, GuestMemoryError, TablePlan, board, vm
from hwdbm.arm.abi import GuestKind, GuestTask, Mailbox, Mapping, Shared, Vcpu, VcpuState
from hwdbm.arm.board import Board, GuestCrashError
from hwdbm.arm.guest import Guests, Work, private_each, private_size, system_mappings
from hwdbm.memslot import Memslot
from hwdbm.vm.memory import GuestMemory
from hwdbm.vtcr import Vtcr

RAM, MIB = 0x4000_0000, 1 << 20
VTCR = Vtcr.for_vm(Granule.K16, 40, mmfr1=0x22, pa_bits=40)
LINE = Mapping(0x8000_0000, 0x9000_0000, 0x10_0000, 3, 0x7FF)


class Process:
    """A machine that lives until it has been looked at so many times."""

    def __init__(self, looks=None):
        self.looks, self.returncode = looks, None

    def poll(self):
        if self.looks is not None:
            self.looks -= 1
            self.returncode = 3 if self.looks < 0 else None
        return self.returncode


@pytest.fixture
def bare():
    """A board without a machine: its RAM, and what lies in it."""
    made = object.__new__(Board)
    made.vcpus, made._lock, made._files, made._process = 3, RLock(), ExitStack(), Process()
    made.ram = GuestMemory(0x4C0_0000, "test")
    made.mailbox, made.shared = made.at(0x4040_0000, Mailbox), made.at(0x4041_0000, Shared)
    made.plan = TablePlan(VTCR, (LINE, LINE), vmid=0xABC, root=0x4081_0000, junk=6, table_bits=1 << 59)
    made._log = io.BytesIO()
    yield made
    made.close()


# --- the board ---------------------------------------------------------------------------------------------


def test_the_plan_lies_where_the_mailbox_says(bare):
    bare._lay()
    box = bare.mailbox
    assert (box.vcpus, box.vtcr, box.vttbr) == (3, VTCR.encode(), 0xABC << 48 | 0x4081_0000)
    assert (box.root, box.root_tables, box.page_shift) == (0x4081_0000, VTCR.root_tables, 14)
    assert (box.start_level, box.junk, box.table_bits) == (VTCR.start_level, 6, 1 << 59)
    assert (box.mappings, box.mappings_pa) == (2, 0x4042_0000)
    assert bytes(bare.ram.view[0x42_0000:][:80]) == bytes(LINE) * 2
    first = 0x4081_0000 + VTCR.root_tables * 16384
    assert (box.tables, box.tables_pa) == ((0x4480_0000 - first) // 16384, 0x4042_0000 + 80)
    assert bare.ram.view[0x42_0050:][: 8 * box.tables].view(np.uint64).tolist() == [*range(first, 0x4480_0000, 16384)]
    assert not bare.ram.view[0x42_0050 + 8 * box.tables :][:64].any()
    assert bare.shared.stop == 1
    box.used = 5
    assert bare.spare_tables.tolist() == [*range(first + 5 * 16384, 0x4480_0000, 16384)]


def test_a_start_level_below_0_is_one_of_64_bits(bare):
    shape = SimpleNamespace(encode=lambda: 1, root_tables=1, granule=Granule.K4, start_level=-1)
    bare.plan = TablePlan(shape, (LINE,))
    bare._lay()
    assert bare.mailbox.start_level == (1 << 64) - 1


def test_a_plan_that_is_too_long_is_refused(bare):
    """It ends where the pool begins, 0x3e0000 bytes further."""
    most = (0x3E_0000 - 40) // 8
    bare.plan = TablePlan(VTCR, (LINE,), tables=np.arange(most, dtype=np.uint64))
    bare._lay()
    assert bare.ram.view[0x80_0000 - 8 : 0x80_0000].view(np.uint64)[0] == most - 1
    bare.plan = TablePlan(VTCR, (LINE,), tables=np.zeros(most + 1, dtype=np.uint64))
    with pytest.raises(ValueError, match=f"1 mappings and {most + 1} tables are too many"):
        bare._lay()
    bare.plan = TablePlan(VTCR, ())
    with pytest.raises(ValueError, match="a plan maps something"):
        bare._lay()


def test_a_machine_that_does_not_answer_or_ends_is_given_up(bare, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(board.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(board.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + 0.5))
    looks = iter([False, True])
    bare._wait("answer", lambda: next(looks, None) or now.__setitem__(0, now[0] + 0.001), 2.0)
    said = []
    with pytest.raises(OSError, match="didn't do this in 2 s: sing; QEMU said nothing") as raised:
        bare._wait("sing", lambda: said.append(now[0]) or now.__setitem__(0, now[0] + 0.25), 2.0)
    assert raised.value.errno == ETIMEDOUT
    assert now[0] == said[0] + 2.5  # the first look later than two seconds
    bare._log = io.BytesIO(b"x" * 600 + b"y" * 499 + b"z\n")
    bare._log.seek(0, 2)
    bare._process = Process(1)
    with pytest.raises(OSError, match=r"the Arm machine ended \(status 3\): y+z$") as raised:
        bare._wait("sing", lambda: now.__setitem__(0, now[0] + 0.25), 2.0)
    assert raised.value.errno == EIO
    assert raised.value.strerror.endswith(": " + "y" * 499 + "z")
    with pytest.raises(OSError, match=r"the Arm machine ended \(status 3\): y+z$"):
        bare.check()


def test_crashes_and_faults_are_told_with_where_they_were(bare):
    assert bare.faults() == ""
    bare.check()
    for number, faults in ((0, 2), (2, 1)):
        vcpu = bare.vcpu(number)
        vcpu.faults, vcpu.fault_ipa, vcpu.fault_esr = faults, 0x8000_0000 + number, 0x9200_0000 + number
    assert bare.faults() == (
        "; vCPU 0 faulted 2 times, last at ipa 0x80000000 (ESR_EL2 0x92000000)"
        "; vCPU 2 faulted 1 times, last at ipa 0x80000002 (ESR_EL2 0x92000002)"
    )
    vcpu.state, vcpu.pc, vcpu.elr = VcpuState.CRASHED, 0x4020_0010, 0x77
    with pytest.raises(
        GuestCrashError, match=r"vCPU 2 crashed at 0x40200010 \(ESR_EL2 0x92000002, ELR_EL1 0x77\)"
    ) as raised:
        bare.check()
    assert raised.value.errno == EIO


def test_a_pipe_is_closed_once(bare, monkeypatch):
    closed = []
    monkeypatch.setattr(board.os, "close", closed.append)
    bare._pipe = [0, 7]
    bare._unplug()
    bare._unplug()
    assert sorted(closed) == [0, 7]


# --- its guests --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("npages", "each"), [(0, 0x10000), (1, 0x20000), (0x4000, 0x20000), (0x4001, 0x30000), (0x8001, 0x40000)]
)
def test_each_guest_has_a_stack_and_four_bytes_a_page(npages, each):
    assert private_each(npages) == each
    assert private_size(npages, 3) == 3 * each


@pytest.mark.parametrize(("granule", "size"), [(Granule.K4, 0x10000), (Granule.K16, 0x10000), (Granule.K64, 0x10000)])
def test_what_every_plan_has(granule, size):
    found = [(each.ipa, each.pa, each.size, each.level) for each in system_mappings(granule)]
    assert found == [(0x4020_0000, 0x4020_0000, size, 3), (0x4041_0000, 0x4041_0000, size, 3)]


def test_guests_begin_with_what_they_are_given(bare):
    bare.mailbox.guest, bare.mailbox.vectors = 0x4020_0400, 0x4020_0800
    guests = Guests(bare, 0x9000_0000, 5, 14)
    work = (
        Work(GuestKind.WINDOW, 0x9000_0000, 0x4000, window=3, seed=0, limit=7),
        Work(GuestKind.STAGE1, 0x9000_4000, 0x8000, seed=0x1_0000_0000_0000_0002, skip=True),
        Work(GuestKind.IDLE, 0x9000_4000, 0x8000, seed=5),
    )
    with pytest.raises(ValueError, match="3 vCPUs do as many kinds of work, not 2"):
        guests.give(work[:2])
    guests.give(work)
    # The seed and the number, multiplied by the golden ratio of 2**64, and 1.
    ratio, wide = 0x9E37_79B9_7F4A_7C15, 1 << 64
    randoms = [1, ((2 * 256 + 1) * ratio + 1) % wide, ((5 * 256 + 2) * ratio + 1) % wide]
    for number, (one, task) in enumerate(zip(work, guests.tasks, strict=True)):
        at, vcpu = 0x4800_0000 + number * 0x20000, bare.vcpu(number)
        assert bytes(task) == bytes(bare.ram.view[0x480_0000 + number * 0x20000 :][: ctypes.sizeof(GuestTask)])
        assert (task.kind, task.vcpu, task.base, task.size) == (one.kind, number, one.base, one.size)
        assert (task.page_shift, task.counts, task.origin) == (14, at + 0x10000, 0x9000_0000)
        assert (task.window, task.limit, task.number) == (one.window, one.limit, 1)
        assert task.random == randoms[number]
        assert (vcpu.x[0], vcpu.sp, vcpu.pc, vcpu.pstate) == (at, at + 0x10000, 0x4020_0400, 0x3C5)
        assert (vcpu.sctlr, vcpu.vbar, vcpu.skip) == (0x30D0_0800, 0x4020_0800, int(one.skip))
        assert vcpu.hcr == 0x8000_0039 | (0 if one.kind is GuestKind.STAGE1 else 0x1000)
    for number in range(3):
        guests.counts_of(number)[:] = [number, 1, 2, 3, 10 * number]
        guests.tasks[number].stores = 100 << number
    assert bare.ram.view[0x481_0000 + 0x20000 :][:20].view(np.uint32).tolist() == [1, 1, 2, 3, 10]
    assert guests.counts().tolist() == [3, 3, 6, 9, 30]
    assert guests.stores == 700


@pytest.mark.parametrize(
    ("hcr", "pstate", "skip", "allowed"),
    [
        (0x8000_0039, 0x3C5, 0, True), (0x8000_1039, 0x3C5, 1, True), (0x8000_1039, 0x6000_0005, 0, True),
        (0x8000_1039, 0x3C5, 2, False), (0x8000_1039, 0x3C4, 0, False), (0x8000_1039, 0x3C9, 0, False),
        (0x8000_1039, 0x3D5, 0, False), (0x8000_1038, 0x3C5, 0, False), (0x39, 0x3C5, 0, False),
        (0x8000_103B, 0x3C5, 0, False),
    ],
)  # fmt: skip
def test_registers_of_a_guest_are_at_el1_under_stage_2(hcr, pstate, skip, allowed):
    assert Guests.allowed(Vcpu(hcr=hcr, pstate=pstate, skip=skip)) is allowed


# --- the VM ------------------------------------------------------------------------------------------------


@pytest.fixture
def made(bare, monkeypatch):
    """An ArmVm of three guests with 6 pages of 16 KiB, without a machine."""
    monkeypatch.setattr(vm, "firmware", lambda: b"firmware")
    found = object.__new__(ArmVm)
    found._closed, found._running, found.page_size, found.board = False, False, 16384, bare
    memory = np.zeros(6 * 16384, dtype=np.uint8)
    monkeypatch.setattr(found, "_check_open", lambda: None)
    monkeypatch.setattr(found, "memory", lambda slot: memory if slot == 0 else None)
    found.guests = Guests(bare, 0x9000_0000, 6, 14)
    found._memory = {0: np.empty(3 << 20, np.uint8), 1: np.empty(5 << 19, np.uint8)}
    yield found
    found._closed = True


def test_a_state_is_read_as_it_was_written(made):
    """The magic, which firmware, how many vCPUs, the rates of seven, and each vCPU's registers."""
    box = made.board
    for number in range(3):
        box.vcpu(number).x[30], box.vcpu(number).state = 1000 + number, VcpuState.PAUSED
        box.shared.rate[number] = (1 << 63) + number
    box.shared.rate[6] = 66
    state = made.state()
    size = ctypes.sizeof(Vcpu)
    assert len(state) == 8 + 32 + 8 + 56 + 3 * size
    assert state[:8] == b"hwdbmarm"
    assert state[8:40] == hashlib.sha256(b"firmware").digest()
    assert struct.unpack_from("<Q7Q", state, 40) == (3, *((1 << 63) + number for number in range(3)), 0, 0, 0, 66)
    assert [struct.unpack_from("<31Q", state, 104 + size * number)[30] for number in range(3)] == [1000, 1001, 1002]
    for number in range(3):
        ctypes.memset(ctypes.byref(box.mailbox.vcpu[number]), 0, size)
        box.vcpu(number).state = number
    ctypes.memset(ctypes.byref(box.shared.rate), 0, 56)
    made.set_state(state)
    assert [box.vcpu(number).state for number in range(3)] == [0, 1, 2]  # what it does here stays
    for number in range(3):
        box.vcpu(number).state = VcpuState.PAUSED
    assert made.state() == state


def test_a_state_of_others_changes_nothing(made):
    box, state = made.board, made.state()
    wrong = bytearray(state)
    at = 104 + 2 * ctypes.sizeof(Vcpu) + Vcpu.hcr.offset
    wrong[at : at + 8] = bytes(8)
    altered = [bytes([state[at] ^ 1]) for at in (0, 7, 8, 39)]
    box.vcpu(0).x[3] = 5
    before = made.state()
    for bad, said in (
        (state[:-1], "are no state of an Arm machine with 3 vCPUs"),
        (state + b"\0", "are no state of an Arm machine with 3 vCPUs"),
        (altered[0] + state[1:], "are no state"),
        (state[:7] + altered[1] + state[8:], "are no state"),
        (state[:8] + altered[2] + state[9:], "another firmware"),
        (state[:39] + altered[3] + state[40:], "another firmware"),
        (bytes(wrong), r"vCPU 2 of a state has HCR_EL2 = 0x0, PSTATE = 0x3c5"),
    ):
        with pytest.raises(ValueError, match=said):
            made.set_state(bad)
        assert made.state() == before


@pytest.mark.parametrize(
    ("rate", "each"), [(None, 0), (1e-9, 1), (1, 1), (4, 1), (5, 2), (3000, 1000), (999_999_999, 333_333_333)]
)
def test_a_rate_is_shared_by_all_vcpus(made, rate, each):
    made.board.shared.rate[:] = [9] * 7
    made.set_rate(rate)
    assert list(made.board.shared.rate) == [each] * 3 + [9] * 4
    for wrong in (0, -1, 1e9, float("nan")):
        with pytest.raises(ValueError, match="a rate is a number of stores a second"):
            made.set_rate(wrong)


def test_what_a_guest_cannot_have_written_is_found(made):
    """Each word is the number of its guest, and of a store before its next; of pages that it has counted."""
    kinds = (GuestKind.IDLE, GuestKind.RANDOM, GuestKind.SEQUENTIAL)
    words = made.memory(0).view(np.uint64).reshape(6, 2048)
    for number, kind in enumerate(kinds):
        made.guests.tasks[number].kind, made.guests.tasks[number].number = kind, 20 + number
        made.guests.counts_of(number)[[0, 2, 5]] = 1
    words[[0, 2, 5], 16] = [1 | 1 << 3, 1 | 7 << 3, 1 | 20 << 3]  # vCPU 1's, up to the last that it can have made
    words[[0, 2, 5], 24] = [2, 2 | 1 << 3, 2 | 21 << 3]
    words[1, :] = 0xBAD  # nobody's
    made.check()
    for page, word, value in ((5, 16, 1 | 21 << 3), (2, 16, 2 | 7 << 3), (0, 24, 0), (5, 24, 3 | 1 << 3)):
        right, words[page, word] = int(words[page, word]), value
        number = word // 8 - 1
        said = (
            f"page {page}: vCPU {number} wrote it, and can't have written {value:#x}: it is at its store {20 + number}$"
        )
        with pytest.raises(GuestMemoryError, match=said):
            made.check()
        words[page, word] = right
    made.check()
    made.guests.counts_of(0)[:] = 0
    words[[2, 5], 16] = 7  # the first is named
    with pytest.raises(GuestMemoryError, match="page 2: vCPU 1 "):
        made.check()


def test_a_machine_is_shown_with_all_of_its_memory(made):
    assert repr(made) == "<ArmVm: 3 vCPUs, 5 MiB>"


@pytest.fixture
def opened(monkeypatch):
    """Return a function that opens a machine by its slots, and tells what it would be: RAM, plan and vCPUs."""

    def open_(granule, base, npages, vcpus=1, *, blocks=False):
        found = []

        def made(ram, plan, *, vcpus):
            found.append((ram, plan, vcpus))
            raise ConnectionError

        monkeypatch.setattr(vm, "Board", made)
        page = granule.page_size
        private = Memslot(1, 0, 0x4800_0000 // page, private_size(npages, vcpus) // page, 0)
        with pytest.raises(ConnectionError):
            ArmVm.from_slots(page, [Memslot(0, 0, base // page, npages, 0), private], blocks=blocks)
        return found[0]

    return open_


@pytest.mark.parametrize("granule", Granule)
@pytest.mark.parametrize("base", [0x4A00_0000, 0x8000_0000, 0xC000_0000, (1 << 40) - 0x10_0000])
@pytest.mark.parametrize("vcpus", [1, 7])
def test_ram_is_as_large_as_what_lies_in_it(opened, granule, base, vcpus):
    """Whole MiB; the memory lies from 2 GiB on, as far into a block as it does in the guest's space."""
    page = granule.page_size
    block, npages = page * page // 8, 0x10_0000 // page
    ram, plan, found = opened(granule, base, npages, vcpus)
    pa = 0x8000_0000 + base % block
    assert ram % MIB == 0
    assert 0 <= RAM + ram - (pa + npages * page) < MIB
    assert found == vcpus
    lines = [(each.ipa, each.pa, each.size, each.level) for each in plan.mappings[2:]]
    assert lines == [
        (0x4800_0000, 0x4480_0000, private_size(npages, vcpus), 3),
        (base, pa, npages * page, 3),
    ]
    assert plan.vtcr == Vtcr.for_vm(granule, 40, mmfr1=0x22, pa_bits=40)


def test_memory_that_just_fits(opened):
    """Four guests count it in all that there is for that."""
    _, plan, vcpus = opened(Granule.K4, 0x8000_0000, 127 * 0x4000, 4)
    assert (plan.mappings[2].size, vcpus) == (0x200_0000, 4)


def test_memory_that_does_not_fit_is_refused():
    def slots(base, npages, private=None, at=0x4800_0000):
        private = private_size(npages, 1) // 4096 if private is None else private
        return [Memslot(0, 0, base >> 12, npages, 0), Memslot(1, 0, at >> 12, private, 0)]

    lies = (
        r"memory of {:#x} bytes at gpa {:#x}: it lies in 0x4a000000..0xffffffffff, and {} vCPUs count it in "
        r"0x2000000 bytes"
    )
    for given, said in (
        (slots(0x49FF_F000, 1), lies.format(4096, 0x49FF_F000, 1)),
        (slots((1 << 40) - 0x1000, 2), lies.format(0x2000, (1 << 40) - 0x1000, 1)),
        (slots(0x8000_0000, 0x20_0000, 7 * (private_each(0x20_0000) >> 12)), lies.format(1 << 33, 0x8000_0000, 7)),
        (slots(0x8000_0000, 1, 31), "0x20000 bytes for each of 1 to 7 vCPUs, at gpa 0x48000000"),
        (slots(0x8000_0000, 1, 33), "0x20000 bytes for each of 1 to 7 vCPUs, at gpa 0x48000000"),
        (slots(0x8000_0000, 1, 8 * 32), "0x20000 bytes for each of 1 to 7 vCPUs, at gpa 0x48000000"),
        (slots(0x8000_0000, 1, at=0x4800_1000), "0x20000 bytes for each of 1 to 7 vCPUs, at gpa 0x48000000"),
        (slots(0x8000_0000, 1)[:1], r"slots 0 and 1, not \[0\], of 4096-byte pages"),
        (slots(0x8000_0000, 1)[:1] * 2, r"slots 0 and 1, not \[0\], of"),
        ([*slots(0x8000_0000, 1), Memslot(1, 0, 9, 9, 0)], r"slots 0 and 1, not \[0, 1\], of"),
        ([*slots(0x8000_0000, 1), Memslot(2, 0, 9, 9, 0)], r"slots 0 and 1, not \[0, 1, 2\], of"),
    ):
        with pytest.raises(ValueError, match=said):
            ArmVm.from_slots(4096, given)
    with pytest.raises(ValueError, match="of 8192-byte pages"):
        ArmVm.from_slots(8192, slots(0x8000_0000, 1))


def test_slots_of_so_much_memory():
    found = vm.memory_slots(5 << 16, vcpus=3, granule=Granule.K64, base=0x9001_0000)
    assert found == (Memslot(0, 0, 0x9001, 5, 0), Memslot(1, 0, 0x4800, 6, 0))
    assert vm.memory_slots(4096) == (Memslot(0, 0, 0x80000, 1, 0), Memslot(1, 0, 0x48000, 64, 0))
