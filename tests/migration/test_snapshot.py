"""Snapshots, whole and differential, and what they give when laid over each other."""

import errno
import os
import subprocess

import pytest
from migrationvm import LAYOUT, FakeVm

from hwdbm.memslot import Memslot
from hwdbm.migration import snapshot
from hwdbm.vm import MemoryMap, PlainGuest


def content(vm: PlainGuest) -> bytes:
    return b"".join(vm.memory(slot.id).tobytes() for slot in vm.slots)


def test_a_chain_gives_the_memory(vm, tmp_path):
    vm.resume()
    full = snapshot.write_full(vm, tmp_path / "full")
    assert (full.size, full.dirty) == (LAYOUT.total, 2825)
    diffs = []
    for turn in range(3):
        before = vm.writes
        while vm.writes < before + 50:
            pass
        if turn == 2:
            vm.pause()
        diffs.append(snapshot.write_diff(vm, tmp_path / f"diff{turn}"))
        assert vm.running == (turn < 2)
    for diff in diffs:
        assert 0 < diff.dirty * 4096 <= diff.data < diff.size == LAYOUT.total
        assert (tmp_path / diff.path.name).stat().st_blocks * 512 < diff.size // 2
        assert snapshot.rebase(full.path, diff.path) == diff.data
    assert full.path.read_bytes() == content(vm)


def test_the_first_diff_equals_a_full_one(tmp_path):
    """Firecracker's own test: all is dirty, so both are the same."""
    guest = PlainGuest(LAYOUT)
    guest.memory(3)[:] = 9
    guest.start_log()
    for slot in guest.slots:
        guest.mark_imported(slot.id, 0, slot.npages)
    snapshot.write_diff(guest, tmp_path / "diff")
    snapshot.write_full(guest, tmp_path / "full")
    assert (tmp_path / "diff").read_bytes() == (tmp_path / "full").read_bytes() == content(guest)


def test_a_dirty_page_of_zeros_is_data(tmp_path):
    guest = PlainGuest(LAYOUT)
    guest.memory(0)[:] = 7
    snapshot.write_full(guest, tmp_path / "full")
    guest.write(0x4000_3000, bytes(4096))
    diff = snapshot.write_diff(guest, tmp_path / "diff")
    assert (diff.dirty, diff.data) == (1, 4096)
    with diff.path.open("rb") as file:
        assert list(snapshot.extents(file.fileno())) == [(0x3000, 0x4000)]
    snapshot.rebase(tmp_path / "full", diff.path)
    assert (tmp_path / "full").read_bytes() == content(guest)
    assert not guest.memory(0)[0x3000:0x4000].any()


def test_an_empty_diff_is_one_hole(tmp_path):
    guest = PlainGuest(LAYOUT)
    snapshot.write_full(guest, tmp_path / "full")
    diff = snapshot.write_diff(guest, tmp_path / "diff")
    assert (diff.dirty, diff.data, diff.size) == (0, 0, LAYOUT.total)
    assert snapshot.rebase(tmp_path / "full", diff.path) == 0


def test_zeros_of_a_full_one_are_holes(tmp_path):
    guest = PlainGuest(MemoryMap(4096, (Memslot(0, 0, 0, 4096, 0),)))
    guest.memory(0)[5 << 20] = 1
    full = snapshot.write_full(guest, tmp_path / "full")
    assert full.data == 1 << 20
    assert full.path.read_bytes() == content(guest)


@pytest.mark.parametrize("write", [snapshot.write_full, snapshot.write_diff])
def test_a_write_that_fails_puts_the_bits_back(vm, tmp_path, monkeypatch, write):
    vm.resume()
    snapshot.write_full(vm, tmp_path / "full")
    old = (tmp_path / "full").read_bytes()
    while vm.writes < 100:
        pass
    real, calls = os.pwrite, []

    def pwrite(fd, data, at):
        calls.append(at)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data, at)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(OSError, match="No space left on device") as raised:
        write(vm, tmp_path / "full")
    assert raised.value.filename == str(tmp_path / "full")
    monkeypatch.undo()
    assert vm.running
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    assert (tmp_path / "full").read_bytes() == old
    vm.pause()
    assert snapshot.write_diff(vm, tmp_path / "diff").dirty > 0
    snapshot.rebase(tmp_path / "full", tmp_path / "diff")
    assert (tmp_path / "full").read_bytes() == content(vm)


def test_a_full_disk(vm, tmp_path):
    """A file system of 1 MiB, where this user may mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("mount is not allowed")
    try:
        snapshot.write_full(vm, tmp_path / "full")
        vm.write(0x4000_0000, b"a" * (1 << 21))
        with pytest.raises(OSError, match="No space left on device"):
            snapshot.write_diff(vm, folder / "diff")
        assert not any(folder.iterdir())
    finally:
        subprocess.run(["umount", folder], check=True)
    assert snapshot.write_diff(vm, tmp_path / "diff").dirty == 512
    snapshot.rebase(tmp_path / "full", tmp_path / "diff")
    assert (tmp_path / "full").read_bytes() == content(vm)


def test_blocks_larger_than_a_page(tmp_path, monkeypatch):
    """Where a file system's blocks are of 64 KiB, what of them isn't dirty is data too, and must be right."""
    guest = PlainGuest(LAYOUT)
    guest.memory(0)[:] = 7
    guest.memory(3)[:] = 8
    snapshot.write_full(guest, tmp_path / "full")
    guest.write(0x4000_3000, bytes(4096))
    real = snapshot.extents

    def coarse(fd):
        for start, stop in real(fd):
            yield start & ~0xFFFF, min(-(-stop // 0x10000) << 16, LAYOUT.total)

    monkeypatch.setattr(snapshot, "extents", coarse)
    diff = snapshot.write_diff(guest, tmp_path / "diff")
    assert diff.data == 0x10000
    assert snapshot.rebase(tmp_path / "full", diff.path) == 0x10000
    assert (tmp_path / "full").read_bytes() == content(guest)


def test_rebase_checks_the_size(tmp_path):
    (tmp_path / "base").write_bytes(bytes(8192))
    (tmp_path / "diff").write_bytes(bytes(4096))
    with pytest.raises(OSError, match="a diff of 4096 bytes is not of a base of 8192"):
        snapshot.rebase(tmp_path / "base", tmp_path / "diff")
    with pytest.raises(FileNotFoundError):
        snapshot.rebase(tmp_path / "none", tmp_path / "diff")


def test_without_a_log_there_is_no_diff(tmp_path):
    from hwdbm.machine import Machine

    with Machine() as machine:
        machine.add_memslot(1 << 20)
        with pytest.raises(FileNotFoundError):
            snapshot.write_diff(machine, tmp_path / "diff")
        assert not any(tmp_path.iterdir())


def test_the_machine(tmp_path):
    from hwdbm.machine import Machine, parse

    with Machine() as machine:
        machine.add_memslot(4 << 20)
        machine.run(parse("uniform", 5))
        machine.step(300)
        snapshot.write_full(machine, tmp_path / "full")
        machine.step(40)
        diff = snapshot.write_diff(machine, tmp_path / "diff")
        assert 1 <= diff.dirty <= 40
        snapshot.rebase(tmp_path / "full", tmp_path / "diff")
        assert (tmp_path / "full").read_bytes() == machine.memory(machine.slots[0].id).tobytes()


def test_a_vm_that_runs_is_paused_meanwhile(tmp_path):
    vm = FakeVm()
    vm.resume()
    snapshot.write_full(vm, tmp_path / "full")
    vm.pause()
    snapshot.write_diff(vm, tmp_path / "diff")
    snapshot.rebase(tmp_path / "full", tmp_path / "diff")
    assert (tmp_path / "full").read_bytes() == content(vm)
    vm.close()
