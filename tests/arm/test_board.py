"""The machine itself: it comes up, its guests run and stop, its MMU marks what they write, and it ends with us."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from hwdbm import pte
from hwdbm.arm import ArmUnavailableError, Board, TablePlan, build
from hwdbm.arm.abi import RAM, GuestKind, Mapping
from hwdbm.arm.guest import PRIVATE, PRIVATE_PA, Guests, Work, private_size, system_mappings
from hwdbm.granule import Granule
from hwdbm.vtcr import Vtcr

DATA, PAGES = 0x8000_0000, 512


@pytest.fixture
def machine():
    vtcr = Vtcr.for_vm(Granule.K4, 40, mmfr1=0x22, pa_bits=40)
    leaf = pte.make_leaf(0, 3, dbm=True)
    mappings = (
        *system_mappings(Granule.K4),
        Mapping(PRIVATE, PRIVATE_PA, private_size(PAGES, 2), 3, leaf),
        Mapping(DATA, DATA, PAGES * 4096, 3, leaf),
    )
    with Board((1 << 30) + (1 << 21), TablePlan(vtcr, mappings), vcpus=2) as board:
        work = [Work(kind, DATA, PAGES * 4096, seed=3) for kind in (GuestKind.SEQUENTIAL, GuestKind.RANDOM)]
        guests = Guests(board, DATA, PAGES, 12)
        guests.give(tuple(work))
        yield board, guests


def data_entries(board):
    """The level-3 entries of the data, found by hand: root index 2, then the first entries."""
    table = board.plan.root
    for index in (DATA >> 30, 0):
        at = table - RAM + 8 * index
        table = int(board.ram.view[at : at + 8].view(np.uint64)[0]) & pte.ADDRESS
    return board.ram.view[table - RAM : table - RAM + 8 * PAGES].view(np.uint64)


def test_two_vcpus_write_and_the_mmu_marks_the_descriptors(machine):
    board, guests = machine
    entries = data_entries(board)
    assert (pte.state(entries, 3) == pte.State.WRITABLE_CLEAN).all()
    board.start()
    assert guests.stores == 0
    board.run()
    while guests.stores < 5000:
        time.sleep(0.001)
    board.stop()
    before = guests.counts()
    assert before.sum() == guests.stores
    assert (pte.dirty(3)(entries) == (before > 0)).all()
    assert guests.counts().tolist() == before.tolist(), "a paused guest wrote"
    # What is cleaned, and flushed, is marked anew.
    entries[:] &= ~np.uint64(pte.S2AP_W)
    board.flush()
    assert not pte.dirty(3)(entries).any()
    board.run()
    time.sleep(0.01)
    board.stop()
    assert (pte.dirty(3)(entries) == (guests.counts() > before)).all()
    assert all(board.vcpu(number).faults == 0 for number in range(2))


def test_what_is_not_flushed_is_written_without_a_mark(machine):
    """The test above can fail: here is how."""
    board, guests = machine
    entries = data_entries(board)
    for task in guests.tasks:
        task.size = 8 * 4096  # as many pages as any TLB can hold
    board.start()
    board.run()
    while guests.stores < 5000:
        time.sleep(0.001)
    board.stop()
    before = guests.counts()
    entries[:] &= ~np.uint64(pte.S2AP_W)
    board.run()
    while guests.stores < before.sum() + 5000:
        time.sleep(0.001)
    board.stop()
    assert (pte.dirty(3)(entries) != (guests.counts() > before)).any()


@pytest.mark.slow
def test_qemu_ends_with_the_process_that_started_it(tmp_path):
    """Also where that is killed, and has no say in it."""
    script = (
        "import sys, time\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_board import machine\n"
        "generator = machine.__wrapped__()\n"
        "board, guests = next(generator)\n"
        "print(board._process.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-P", "-c", script], stdout=subprocess.PIPE, text=True) as process:
        group = int(process.stdout.readline())
        os.killpg(group, 0)
        process.send_signal(signal.SIGKILL)
        until = time.monotonic() + 20
        while time.monotonic() < until:
            try:
                os.killpg(group, 0)
            except ProcessLookupError:
                break
            time.sleep(0.01)
        else:
            os.killpg(group, signal.SIGKILL)
            raise AssertionError("QEMU outlived the process that had started it")


def test_what_is_missing_is_said_with_what_brings_it(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ArmUnavailableError, match="apt-get install gcc-aarch64-linux-gnu"):
        build.build()
    with pytest.raises(ArmUnavailableError, match="apt-get install qemu-system-arm"):
        Board(1 << 30, TablePlan(Vtcr.for_vm(Granule.K4, 40, mmfr1=0x22), ()))
    assert not list(tmp_path.iterdir())


def test_firmware_that_is_compiled_twice_is_the_same():
    """Two hosts that compile it must take each other's guests: a state names the firmware that it is of."""
    assert build.build() == build.build()


@pytest.fixture
def compiled(monkeypatch, tmp_path) -> list[bytes]:
    """Have "firmware" compiled, and kept in a folder of the test's; return what was compiled so far."""
    made: list[bytes] = []

    def compile_it() -> bytes:
        made.append(b"firmware")
        return b"firmware"

    monkeypatch.setattr(build, "build", compile_it)
    monkeypatch.setattr(build, "firmware", build.firmware.__wrapped__)  # as in a process that is new
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return made


def test_firmware_is_compiled_once(compiled, tmp_path, caplog):
    assert [build.firmware() for _ in range(3)] == [b"firmware"] * 3
    assert len(compiled) == 1
    assert not caplog.text


@pytest.mark.parametrize("damage", [b"", b"firm", b"firmwarE", None])
def test_firmware_that_was_cut_or_altered_is_not_used(compiled, tmp_path, damage):
    build.firmware()
    (kept,) = (tmp_path / "hwdbm").iterdir()
    if damage is None:
        kept.unlink()
        kept.mkdir()
    else:
        kept.write_bytes(damage)
    assert build.firmware() == b"firmware"
    assert len(compiled) == 2
    assert build.firmware() == b"firmware"
    assert len(compiled) == (2 if damage is not None else 3)  # what is no file is left, and nothing is kept


def test_firmware_where_it_cannot_be_kept(compiled, monkeypatch, tmp_path, caplog):
    """A file in place of the folder, a folder that nothing can be made in, a user without a home."""
    (tmp_path / "file").write_bytes(b"")
    for place in (tmp_path / "file", "/proc/no", None):
        caplog.clear()
        if place is None:
            monkeypatch.delenv("XDG_CACHE_HOME")
            monkeypatch.setattr(build.files.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
        else:
            monkeypatch.setenv("XDG_CACHE_HOME", str(place))
        assert build.firmware() == b"firmware"
        (record,) = caplog.records
        assert "isn't kept, and is compiled at each start" in record.message
        assert str(place or "this user has no home") in record.message
    assert len(compiled) == 3
