"""Snapshots, whole and differential, and what they give when laid over each other."""

import errno
import os
import subprocess

import numpy as np
import pytest
from migrationvm import LAYOUT, FakeVm

from hwdbm.memslot import Memslot
from hwdbm.snapshot import files as snapshot
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
        write(vm, tmp_path / ("full" if write is snapshot.write_full else "diff"))
    assert raised.value.filename in {str(tmp_path / "full"), str(tmp_path / "diff")}
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


def test_what_is_data_and_was_not_dirty():
    """Against one byte after the other, for all ranges in a few."""

    def ranges(chosen: int) -> list[tuple[int, int]]:
        edges = np.flatnonzero(np.diff([0, *(chosen >> at & 1 for at in range(7)), 0]))
        return list(map(tuple, edges.reshape(-1, 2).tolist()))

    for data in range(1 << 7):
        for dirty in range(0, 1 << 7, 3):
            assert list(snapshot._beyond(ranges(data), ranges(dirty))) == ranges(data & ~dirty)


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


class TestRebaseRefusesWhatItCannotBeSureOf:
    @pytest.fixture
    def chain(self, tmp_path):
        """Return a base and two diffs, in their order."""
        guest = PlainGuest(LAYOUT)
        guest.memory(0)[:] = 7
        paths = [tmp_path / name for name in ("base", "diff0", "diff1")]
        snapshot.write_full(guest, paths[0])
        for turn, path in enumerate(paths[1:]):
            guest.write(0x4000_0000 + turn * 4096, bytes([turn + 1]) * 4096)
            snapshot.write_diff(guest, path)
        return paths

    def refused(self, why, base, *diffs):
        before = base.read_bytes(), sorted(path.name for path in base.parent.iterdir())
        with pytest.raises(OSError, match=why) as raised:
            snapshot.rebase_all(base, diffs)
        assert raised.value.errno == errno.EINVAL
        assert (base.read_bytes(), sorted(path.name for path in base.parent.iterdir())) == before

    def test_itself(self, chain):
        base, diff, _ = chain
        os.link(base, base.parent / "hard")
        self.refused("the same file as", base, base)
        self.refused("the same file as", base, base.parent / "hard")
        self.refused("the same file as", base, diff, diff)

    def test_links(self, chain):
        base, diff, _ = chain
        (base.parent / "link").symlink_to(diff)
        self.refused("is a symbolic link", base, base.parent / "link")
        (base.parent / "to-base").symlink_to(base)
        self.refused("is a symbolic link", base.parent / "to-base", diff)

    def test_holes_that_a_copy_filled(self, chain):
        base, diff, _ = chain
        when = diff.stat().st_mtime_ns
        diff.write_bytes(diff.read_bytes())
        os.utime(diff, ns=(when, when))
        self.refused("it has no holes", base, diff)

    def test_another_order(self, chain):
        base, first, second = chain
        self.refused("it is older than", base, second, first)
        snapshot.rebase(base, first)
        snapshot.rebase(base, second)
        self.refused("it is older than", base, first)

    def test_one_that_is_missing_changes_nothing(self, chain):
        base, first, _ = chain
        before = base.read_bytes()
        with pytest.raises(FileNotFoundError):
            snapshot.rebase_all(base, [first, base.parent / "no"])
        assert base.read_bytes() == before

    @pytest.mark.parametrize("calls", range(4))
    def test_a_base_is_old_or_new(self, chain, monkeypatch, calls):
        """Wherever copying stops."""
        base, *diffs = chain
        before, real, left = base.read_bytes(), os.pwrite, [calls]

        def full(fd, data, at):
            if not left[0]:
                raise OSError(errno.ENOSPC, "No space left on device")
            left[0] -= 1
            return real(fd, data, at)

        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match="No space left") as raised:
            snapshot.rebase_all(base, diffs)
        assert raised.value.filename == str(base)
        assert base.read_bytes() == before
        assert len(list(base.parent.iterdir())) == 3

    def test_what_is_written(self, chain):
        base, *diffs = chain
        base.chmod(0o644)
        want = bytearray(base.read_bytes())
        want[:8192] = b"\1" * 4096 + b"\2" * 4096
        assert snapshot.rebase_all(base, diffs) == [4096, 4096]
        assert base.read_bytes() == want
        assert base.stat().st_mode & 0o777 == 0o600


def test_a_diff_replaces_no_file(tmp_path):
    guest = PlainGuest(LAYOUT)
    snapshot.write_full(guest, tmp_path / "base")
    guest.write(0x4000_0000, b"1")
    for name in ("base", "link"):
        if name == "link":
            (tmp_path / name).symlink_to("nowhere")
        with pytest.raises(FileExistsError, match="replaces no file"):
            snapshot.write_diff(guest, tmp_path / name)
    assert (tmp_path / "base").stat().st_size == LAYOUT.total
    assert snapshot.write_diff(guest, tmp_path / "diff").dirty == 1


def test_a_plain_guest_without_a_log_has_no_diff(tmp_path):
    with pytest.raises(FileNotFoundError, match="begin with a full snapshot"):
        snapshot.write_diff(PlainGuest(LAYOUT), tmp_path / "diff")
    assert not any(tmp_path.iterdir())


def test_a_diff_takes_nothing_from_a_migration(tmp_path):
    guest = PlainGuest(LAYOUT)
    snapshot.write_full(guest, tmp_path / "base")
    with guest.client("migration") as client:
        guest.write(0x4000_0000, b"1")
        assert snapshot.write_diff(guest, tmp_path / "diff").dirty == 1
        with client.take(0) as lease:
            assert lease.bitmap.weight() == 1


@pytest.mark.parametrize("block", [0x2000, 0x10000, 0x40000])
def test_large_blocks_at_a_slots_ends(tmp_path, monkeypatch, block):
    """A block that reaches over the end of a slot takes in the next slot's first pages; they are written right, too."""
    layout = MemoryMap(4096, (Memslot(0, 0, 0, 3, 0), Memslot(1, 0, 16, 5, 0), Memslot(2, 0, 64, 77, 0)))
    guest = PlainGuest(layout)
    for slot in layout.slots:
        guest.memory(slot.id)[:] = np.arange(slot.npages * 4096) // 4096 + 40 * slot.id + 1
    snapshot.write_full(guest, tmp_path / "full")
    for gpa in (2 << 12, 16 << 12, 64 << 12, 140 << 12):
        guest.write(gpa, bytes([200]) * 4096)
    real = snapshot.extents

    def coarse(fd):
        end = 0
        for start, stop in real(fd):
            lo, hi = max(start // block * block, end), min(-(-stop // block) * block, layout.total)
            if lo < hi:
                yield lo, hi
            end = hi

    with monkeypatch.context() as patch:
        patch.setattr(snapshot, "extents", coarse)
        snapshot.write_diff(guest, tmp_path / "diff")
    with (tmp_path / "diff").open("rb") as file:
        for start, stop in coarse(file.fileno()):
            assert file.seek(start) == start
            assert file.read(stop - start) == content(guest)[start:stop]
