"""Chains: what was saved comes back, whatever is copied, merged, removed, damaged or cut short."""

import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from clocks import Clock
from effort import EFFORT
from hypothesis import given, settings
from hypothesis import strategies as st
from migrationvm import LAYOUT, FakeVm
from seen import as_seen

from hwdbm.bitmap import DirtyBitmap
from hwdbm.errors import HwdbmError, LayoutError, SnapshotError
from hwdbm.memslot import Memslot
from hwdbm.snapshot import Chain, Recorder, Snapshot
from hwdbm.snapshot import chain as chains
from hwdbm.snapshot import pages as moving
from hwdbm.snapshot.manifest import parse
from hwdbm.vm import MemoryMap, PlainGuest

# Slots that don't lie in the order of their ids, and end within a word of the bitmap.
SMALL = MemoryMap(4096, (Memslot(2, 0, 0x200, 65, 0), Memslot(0, 0, 0x10, 7, 0), Memslot(5, 2, 0x100, 128, 0)))


def memory_of(vm) -> bytes:
    """Return all memory by address, as a file has it."""
    return b"".join(vm.memory(slot.id).tobytes() for slot in sorted(vm.slots, key=lambda slot: slot.base_gfn))


def sha(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


def kinds(chain: Chain, **how: bool) -> list[str]:
    return [each.kind for each in chain.check(**how)]


class Story:
    """A guest, its chain, and the memory of each snapshot's moment."""

    def __init__(self, folder: Path, *, steps: int = 3, seed: int = 7, layout: MemoryMap = SMALL, digest: bool = True):
        self.rng = np.random.default_rng(seed)
        self.guest = PlainGuest(layout)
        for slot in layout.slots:
            self.guest.memory(slot.id)[:] = self.rng.integers(0, 256, slot.npages * 4096, dtype=np.uint8)
        self.recorder = Recorder(self.guest, folder, digest=digest)
        self.chain, self.moments = self.recorder.chain, dict[str, tuple[bytes, bytes]]()
        self.keep(self.recorder.save())
        for _ in range(steps):
            self.step()

    def keep(self, snapshot: Snapshot) -> Snapshot:
        self.moments[snapshot.id] = memory_of(self.guest), self.guest.state()
        return snapshot

    def step(self, writes: int = 9) -> Snapshot:
        for _ in range(writes):
            slot = self.rng.choice(self.guest.slots)
            page = int(self.rng.integers(slot.npages))
            data = bytes(4096) if self.rng.random() < 0.3 else self.rng.bytes(int(self.rng.integers(1, 4096)))
            self.guest.write((slot.base_gfn + page) * 4096, data)
        self.guest.set_state(self.rng.bytes(8))
        return self.keep(self.recorder.diff())

    def right(self, chain: Chain | None = None) -> int:
        """Return how many snapshots there are, each of which gives the memory of its moment."""
        chain = chain or self.chain
        for snapshot in chain.snapshots():
            memory, state = self.moments[snapshot.id]
            target = chain.folder.parent / "restored"
            assert chain.restore(target, snapshot.id) == snapshot
            assert target.read_bytes() == memory
            assert chain.state(snapshot) == state
            assert snapshot.digest in (None, sha(memory))
        return len(chain.snapshots())


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    """Have no test wait for the disk; where a call fails, these are calls, too."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def story(tmp_path):
    made = Story(tmp_path / "chain")
    yield made
    made.recorder.close()


def test_each_snapshot_is_the_memory_of_its_moment(story):
    assert story.right() == 4
    assert story.chain.check(whole=True) == []
    first, *rest = story.chain.snapshots()
    assert first.full
    assert [each.parent for each in rest] == [each.id for each in story.chain.snapshots()[:-1]]
    assert [each.epoch for each in story.chain.snapshots()] == [0, 1, 2, 3]
    assert all(a.time <= b.time for a, b in pairwise(story.chain.snapshots()))
    now = time.time_ns() // 1_000_000
    assert all(now - 600_000 < each.time <= now for each in story.chain.snapshots())


@pytest.mark.parametrize("batch", [4096, 3 * 4096, 5 * 4096 + 512])
def test_memory_larger_than_what_is_moved_together(story, batch, monkeypatch):
    """Restored, checked, and laid together in each of the two ways; pages of zeros among it."""
    monkeypatch.setattr(moving, "_BATCH", batch)
    assert story.right() == 4
    assert story.chain.check(whole=True) == []
    story.chain.rebase(story.chain.snapshots()[1].id)
    assert story.right() == 3
    story.chain.rebase(in_place=True)
    assert story.right() == 1
    assert story.chain.check(whole=True) == []


def test_the_files_are_firecrackers(story):
    """A full one is all memory by address; a diff has the dirty pages at their places, and holes elsewhere."""
    first, second, *_ = story.chain.snapshots()
    folder = story.chain.folder
    assert (folder / first.memory).read_bytes() == story.moments[first.id][0]
    want = bytearray(SMALL.total)
    for slot, offset in zip(second.layout.slots, second.offsets, strict=True):
        for page in story.chain.pages(second)[slot.id].pages().tolist():
            at = offset + page * 4096
            want[at : at + 4096] = story.moments[second.id][0][at : at + 4096]
    assert (folder / second.memory).read_bytes() == bytes(want)
    assert (folder / second.memory).stat().st_blocks * 512 < SMALL.total
    held = b"".join(pages.to_bytes() for pages in story.chain.pages(second).values())
    assert (folder / second.bitmap).read_bytes() == held


def test_what_cannot_be_discarded_is_whole(story, monkeypatch):
    """The manifest is there, the answer isn't, and the folder lets nobody remove it."""
    real = Path.unlink

    def unlink(path, missing_ok=False):
        if path.suffix == ".json":
            raise PermissionError(errno.EPERM, "no", str(path))
        real(path, missing_ok)

    def late(*_arguments, **_options):
        finish(*_arguments, **_options)
        raise KeyboardInterrupt

    finish = chains.Draft.finish
    with monkeypatch.context() as patch:
        patch.setattr(chains.Draft, "finish", late)
        patch.setattr(Path, "unlink", unlink)
        story.guest.write(story.guest.slots[0].base_gfn * 4096, b"late")
        with pytest.raises(KeyboardInterrupt):
            story.recorder.diff()
    assert story.chain.check() == []


def test_zeros_of_a_full_one_take_no_room(tmp_path):
    layout = MemoryMap(4096, (Memslot(0, 0, 0, 2048, 0),))
    guest = PlainGuest(layout)
    guest.write(5 << 20, b"a")  # one mebibyte of eight isn't zeros
    with Recorder(guest, tmp_path) as recorder:
        taken = recorder.save()
    file = tmp_path / taken.memory
    assert file.read_bytes() == memory_of(guest)
    assert file.stat().st_blocks * 512 <= 2 << 20


@pytest.mark.parametrize(
    "copy",
    [
        "cp -r {0} {1}",
        "cp -r --sparse=never {0} {1}",
        "cp -r --sparse=always {0} {1}",
        "mkdir {1}; for f in {0}/*; do dd if=$f of={1}/${{f##*/}} bs=64K status=none; done",
        "mkdir {1}; for f in {0}/*; do dd if=$f of={1}/${{f##*/}} bs=4K conv=sparse status=none; done",
        "mkdir {1}; tar -C {0} -c . | tar -C {1} -x",
        "mkdir {1}; tar -C {0} -c --sparse . | tar -C {1} -x",
        *(["rsync -r {0}/ {1}", "rsync -r --sparse {0}/ {1}"] if shutil.which("rsync") else []),
    ],
)
def test_a_copy_is_as_good(story, copy, tmp_path):
    subprocess.run(["bash", "-euc", copy.format(story.chain.folder, tmp_path / "copy")], check=True)
    copied = Chain(tmp_path / "copy")
    assert copied.check(whole=True) == []
    assert story.right(copied) == 4
    copied.rebase()
    assert story.right(copied) == 1


@pytest.mark.parametrize("in_place", [False, True])
def test_a_rebase_is_the_snapshot_and_its_children_stay(story, in_place):
    ids = [each.id for each in story.chain.snapshots()]
    whole = story.chain.rebase(ids[2], in_place=in_place)
    assert (whole.id, whole.parent, whole.full) == (ids[2], None, True)
    assert [each.id for each in story.chain.snapshots()] == ids[2:]
    assert story.right() == 2
    assert story.chain.check(whole=True) == []
    assert len(list(story.chain.folder.iterdir())) == 8
    story.step()
    assert story.right() == 3
    again = story.chain.rebase(ids[2], in_place=in_place)
    assert again == whole


def test_groupings_of_a_long_chain_give_the_same_bytes(tmp_path):
    story = Story(tmp_path / "chain", steps=12, digest=False)
    ids = [each.id for each in story.chain.snapshots()]
    for name, groups in (("one", [12]), ("fours", [4, 8, 12]), ("all", range(1, 13))):
        shutil.copytree(story.chain.folder, tmp_path / name)
        for number, stop in enumerate(groups):
            Chain(tmp_path / name).rebase(ids[stop], in_place=bool(number % 2))
        (last,) = Chain(tmp_path / name).snapshots()
        assert (tmp_path / name / last.memory).read_bytes() == story.moments[ids[-1]][0]
    story.recorder.close()


def test_slots_may_lie_in_any_order_in_a_memory_file(story, tmp_path):
    """As another program may have laid them: what is made of it has the same bytes, and the base in place its order."""
    first, *_, last = story.chain.snapshots()
    places = {2: 128 << 12, 0: 193 << 12, 5: 0}
    memory, raw = story.chain.folder / first.memory, b""
    old = dict(zip((slot.id for slot in SMALL.slots), first.offsets, strict=True))
    for slot in sorted(SMALL.slots, key=lambda slot: places[slot.id]):
        raw += memory.read_bytes()[old[slot.id] : old[slot.id] + slot.npages * 4096]
    memory.write_bytes(raw)
    file = story.chain.folder / f"{first.name}.json"
    found = json.loads(file.read_bytes())
    for slot in found["slots"]:
        slot["offset"] = places[slot["id"]]
    found["memory"]["pages-sha256"] = sha(raw)
    file.write_text(json.dumps(found))
    story.recorder._client = None
    assert story.chain.check(whole=True) == []
    wanted = story.moments[last.id][0]
    story.chain.restore(tmp_path / "before", last.id)
    whole = story.chain.rebase(in_place=True)
    story.chain.restore(tmp_path / "after")
    assert (tmp_path / "before").read_bytes() == (tmp_path / "after").read_bytes() == wanted
    assert (whole.memory, whole.offsets) == (first.memory, tuple(places.values()))
    assert whole.digest == sha(wanted) != whole.pages_digest
    assert story.chain.check(whole=True) == []


def test_names_are_numbers_that_grow_and_the_beginning_of_the_id(story):
    every = story.chain.snapshots()
    assert [each.name for each in every] == [f"{number:06d}-{each.id[:8]}" for number, each in enumerate(every)]
    assert story.step().name.startswith("000004-")
    story.chain.prune(1)
    assert story.chain.find().memory.startswith("000005-")


def test_a_snapshot_takes_what_its_files_take_on_disk(story):
    for each in story.chain.snapshots():
        du = subprocess.run(["du", "-B1", *each.files], cwd=story.chain.folder, capture_output=True, check=True)
        assert story.chain.size(each) == sum(int(line.split()[0]) for line in du.stdout.splitlines())


def test_prune_keeps_the_newest(story):
    ids = [each.id for each in story.chain.snapshots()]
    assert story.chain.prune(9) == []
    assert [each.id for each in story.chain.prune(2)] == ids[:2]
    assert [each.id for each in story.chain.snapshots()] == ids[2:]
    assert story.right() == 2
    assert story.chain.check() == []
    assert len(list(story.chain.folder.iterdir())) == 8
    story.step()
    assert [each.id for each in story.chain.prune(1)] == ids[2:]
    assert story.right() == 1
    for keep in (0, -1):
        with pytest.raises(ValueError, match="keep is 1 or more"):
            story.chain.prune(keep)


def test_two_branches(story, tmp_path):
    """A difference to something other than the newest: both go on, and neither harms the other."""
    ids = [each.id for each in story.chain.snapshots()]
    other = PlainGuest(SMALL)
    recorder = Recorder(other, story.chain.folder)
    recorder.save()
    recorder.chain.restore(other, ids[1])
    story.moments[recorder.tip.id] = bytes(SMALL.total), b""
    assert kinds(story.chain) == []
    with pytest.raises(SnapshotError, match="no snapshots are called"):
        story.chain.find("x")
    story.chain.rebase(ids[3])
    assert {each.id for each in story.chain.snapshots()} == {ids[3], recorder.tip.id}
    recorder.close()
    assert story.right() == 2


def test_a_fork_stays_and_is_not_rebased_in_place(story):
    ids = [each.id for each in story.chain.snapshots()]
    story.recorder.tip = story.chain.find(ids[1])  # what was lent since is dirty again, all of it
    story.guest.mark_imported(0, 0, 7)
    story.guest.mark_imported(2, 0, 65)
    story.guest.mark_imported(5, 0, 128)
    story.step()
    with pytest.raises(SnapshotError, match="is a difference to what a rebase in place would change"):
        story.chain.rebase(ids[3], in_place=True)
    assert story.right() == 5
    story.chain.rebase(ids[3])
    assert [each.id for each in story.chain.snapshots()][:3] == [ids[0], ids[1], ids[3]]
    assert story.right() == 4
    assert story.chain.check() == []


def test_restore_to_a_vm(story):
    for snapshot in story.chain.snapshots():
        with PlainGuest(SMALL) as target:
            story.chain.restore(target, snapshot.id)
            assert (memory_of(target), target.state()) == story.moments[snapshot.id]
            target.resume()
            with pytest.raises(RuntimeError, match="paused"):
                story.chain.restore(target)
    with PlainGuest(LAYOUT) as other, pytest.raises(LayoutError):
        story.chain.restore(other)


def test_what_a_guest_says_is_told_as_its_own(story, tmp_path):
    """No file of the chain is named for an error of a guest's: KVM's errors name no file either."""

    class Broken(PlainGuest):
        def set_state(self, raw: bytes) -> None:
            raise OSError(errno.EINVAL, "these registers are of another processor")

        def state(self) -> bytes:
            raise OSError(errno.EINVAL, "the vCPU is gone")

    with Broken(SMALL) as guest:
        with pytest.raises(OSError, match="another processor") as told:
            story.chain.restore(guest)
        assert (told.value.errno, told.value.filename) == (errno.EINVAL, None)
        with Recorder(guest, tmp_path / "other") as recorder, pytest.raises(OSError, match="the vCPU is gone") as told:
            recorder.save()
        assert (told.value.errno, told.value.filename) == (errno.EINVAL, None)
    assert story.right()


def test_a_guest_that_runs(tmp_path):
    vm = FakeVm()
    with Recorder(vm, tmp_path / "chain", digest=True) as recorder:
        vm.resume()
        recorder.save()
        for _ in range(4):
            before = vm.writes
            while vm.writes < before + 30:
                threading.Event().wait(1e-3)
            snapshot = recorder.diff()
            assert vm.running
            assert recorder.paused < 5
            assert 0 < sum(pages.weight() for pages in recorder.chain.pages(snapshot).values()) < 2825
        vm.pause()
        last = recorder.diff()
        assert recorder.chain.check(whole=True) == []
        recorder.chain.restore(tmp_path / "ram")
        assert (tmp_path / "ram").read_bytes() == memory_of(vm)
        assert last.digest == vm.digest()
    vm.close()


# --- failures ----------------------------------------------------------------------------------------------


@contextmanager
def failing(monkeypatch, after: int, error: BaseException):
    """Have one of the calls that write raise: after so many of them."""
    left = [after]

    def counted(real):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] == -1:
                raise error
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in ("pwrite", "write", "fsync", "truncate", "link", "rename", "unlink"):
            patch.setattr(os, name, counted(getattr(os, name)))
        yield left


def points(calls: int):
    """Return after how many calls to fail: the first, the last, and some in between."""
    return sorted({*range(min(calls, 5)), *range(0, calls, 29), *range(max(calls - 16, 0), calls)})


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt()], ids=["full", "interrupt"])
@pytest.mark.alike(2)
def test_a_diff_that_fails_leaves_epoch_and_parent(story, monkeypatch, error):
    """At each of its calls. The next one has all that this one would have had."""
    for after in range(1000):
        tip, before = story.recorder.tip, len(story.chain.snapshots())
        story.guest.write(0x10_000 + after % 7 * 4096, bytes([after % 251]) * 100)
        with failing(monkeypatch, after, error) as left:
            try:
                story.recorder.diff()
            except type(error):
                pass
            else:
                story.keep(story.recorder.tip)
        if left[0] >= 0:
            break
        if story.recorder.tip is tip:
            assert len(story.chain.snapshots()) == before
        else:
            story.keep(story.recorder.tip)
        assert kinds(story.chain) in ([], ["leftover"], ["leftover"] * 2)
        story.step(1)
    assert after > 12
    assert story.right() > 12
    assert story.chain.check(whole=True) == []


@pytest.mark.parametrize(("error", "in_place"), [(FULL, False), (FULL, True), (KeyboardInterrupt(), True)])
@pytest.mark.alike(3)
def test_a_rebase_that_fails_is_old_or_new_or_finished(story, monkeypatch, tmp_path, error, in_place):
    shutil.copytree(story.chain.folder, tmp_path / "before")
    with failing(monkeypatch, 1 << 30, error) as left:
        story.chain.rebase(in_place=in_place)
    calls = (1 << 30) - left[0]
    assert calls > 8
    for after in points(calls):
        shutil.rmtree(story.chain.folder)
        shutil.copytree(tmp_path / "before", story.chain.folder)
        with failing(monkeypatch, after, error) as left, suppress(type(error)):
            story.chain.rebase(in_place=in_place)
        assert left[0] < 0
        found = kinds(story.chain)
        if "unfinished" in found:
            with pytest.raises(SnapshotError, match="cut short"):
                story.chain.restore(tmp_path / "no")
            story.chain.prune(9) if after % 2 else story.chain.rebase()  # any call that changes the chain
        else:
            assert set(found) <= {"leftover"}
        assert story.right() in (1, 2, 3, 4)
        assert "unfinished" not in kinds(story.chain)
        story.chain.rebase()
        assert story.right() == 1
        assert story.chain.check(whole=True) == []


def test_a_prune_that_fails(story, monkeypatch, tmp_path):
    shutil.copytree(story.chain.folder, tmp_path / "before")
    with failing(monkeypatch, 1 << 30, FULL) as left:
        story.chain.prune(2)
    for after in points((1 << 30) - left[0]):
        shutil.rmtree(story.chain.folder)
        shutil.copytree(tmp_path / "before", story.chain.folder)
        with failing(monkeypatch, after, FULL), suppress(OSError):
            story.chain.prune(2)
        assert story.right() in (2, 3, 4)
        story.chain.prune(2)
        assert story.right() == 2
        assert story.chain.check() == []


def test_without_a_parent_there_is_no_diff(tmp_path):
    guest = PlainGuest(SMALL)
    with Recorder(guest, tmp_path / "chain") as recorder:
        with pytest.raises(FileNotFoundError, match="take a full one first"):
            recorder.diff()
        recorder.save()
        for path in recorder.chain.folder.glob("*.json"):
            path.rename(tmp_path / "away.json")
        guest.write(0x10_000, b"a")
        with pytest.raises(FileNotFoundError, match="isn't there any more"):
            recorder.diff()
        (tmp_path / "away.json").rename(recorder.chain.folder / "back.json")
    guest.close()


def test_another_call_has_the_folder(story, monkeypatch):
    monkeypatch.setattr(chains, "_PATIENCE", 0.05)
    with story.chain._locked(), pytest.raises(OSError, match="another call works on this chain") as raised:
        story.chain.snapshots()
    assert raised.value.errno == errno.EBUSY
    with story.chain._locked(shared=True):
        assert len(Chain(story.chain.folder).snapshots()) == 4
        with pytest.raises(OSError, match="another call"):
            story.chain.prune(1)


def test_another_call_is_waited_for(story, monkeypatch):
    holder = ExitStack()
    holder.enter_context(story.chain._locked())
    clock = Clock(after=chains._PATIENCE - 1, done=holder.close)
    monkeypatch.setattr(chains, "time", clock)
    assert len(story.chain.snapshots()) == 4
    assert clock.passed == pytest.approx(chains._PATIENCE - 1, abs=0.01)
    clock = Clock()
    monkeypatch.setattr(chains, "time", clock)
    with story.chain._locked(), pytest.raises(OSError, match="another call"):
        story.chain.prune(1)
    assert clock.passed == pytest.approx(chains._PATIENCE, abs=0.01)


# --- damage ------------------------------------------------------------------------------------------------


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("layer", range(4))
def test_damage_is_found_and_nothing_wrong_restored(story, tmp_path, layer):
    snapshot = story.chain.snapshots()[layer]
    slot = max(story.chain.pages(snapshot).items(), key=lambda item: item[1].weight())
    offset = dict(zip([each.id for each in SMALL.slots], snapshot.offsets, strict=True))[slot[0]]
    flip(story.chain.folder / snapshot.memory, offset + int(slot[1].pages()[0]) * 4096 + 5)
    found = story.chain.check()
    assert [each.kind for each in found][:1] == ["damaged"]
    assert found[0].snapshot == snapshot.id
    for number, each in enumerate(story.chain.snapshots()):
        if number < layer:
            story.chain.restore(tmp_path / "ram", each.id)
            assert (tmp_path / "ram").read_bytes() == story.moments[each.id][0]
        else:
            with pytest.raises(SnapshotError, match="damaged"):
                story.chain.restore(tmp_path / "bad", each.id)
    assert not (tmp_path / "bad").exists()
    before = sorted(story.chain.folder.iterdir())
    for in_place in (False, True):
        with pytest.raises(SnapshotError, match="damaged"):
            story.chain.rebase(in_place=in_place)
    assert sorted(story.chain.folder.iterdir()) == before


def test_a_byte_that_is_held_by_no_page_is_no_damage(story):
    """What lies where a diff holds nothing doesn't matter: a copy may have anything there."""
    snapshot = story.chain.snapshots()[1]
    slot, pages = next(iter(story.chain.pages(snapshot).items()))
    page = int((~pages).pages()[0])
    offset = dict(zip([each.id for each in SMALL.slots], snapshot.offsets, strict=True))[slot]
    flip(story.chain.folder / snapshot.memory, offset + page * 4096)
    assert story.chain.check(whole=True) == []
    assert story.right() == 4


@pytest.mark.parametrize("what", ["bitmap", "state", "memory"])
@pytest.mark.parametrize("how", ["flip", "cut", "gone", "link", "pipe"])
def test_each_file(story, tmp_path, what, how):
    path = story.chain.folder / getattr(story.chain.snapshots()[2], what)
    if how == "flip" and what != "memory":
        flip(path, 1)
    elif how in ("cut", "flip"):
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.rename(tmp_path / "away")
        if how == "link":
            path.symlink_to(tmp_path / "away")
        elif how == "pipe":
            os.mkfifo(path)
    assert "damaged" in kinds(story.chain)
    with pytest.raises((HwdbmError, OSError)) as raised:
        story.chain.restore(tmp_path / "no", story.chain.snapshots()[2].id)
    assert path.name in str(raised.value)
    assert not (tmp_path / "no").exists()


def test_what_is_missing_since_when(story):
    chain, (first, second, third, last) = story.chain, story.chain.snapshots()
    pages = {each.id: chain.pages(each) for each in (second, third, last)}
    (chain.folder / f"{second.name}.json").unlink()
    found = {each.kind: each for each in chain.check()}
    assert set(found) == {"parent", "missing", "leftover"}
    assert (found["parent"].snapshot, second.id in found["parent"].text) == (third.id, True)
    slot = SMALL.slots[0]
    want = slot.npages - (pages[third.id][slot.id] | pages[last.id][slot.id]).weight()
    said = next(each for each in chain.check() if each.kind == "missing" and f"slot {slot.id}" in each.text)
    assert (said.pages, said.snapshot) == (want, last.id)
    missing = ~(pages[third.id][slot.id] | pages[last.id][slot.id])
    assert said.text.endswith(f"; the first is at gpa {(slot.base_gfn + missing.pages()[0]) * 4096:#018x}")
    assert f"since before {third.name}.json, whose parent isn't there" in said.text
    with pytest.raises(SnapshotError, match=rf"/{third.name}\.json: its parent {second.id} isn't there$"):
        chain.rebase()
    assert (chain.folder / second.memory).exists()  # a manifest was moved away: nothing of it is swept
    chain.find(first.id)


def test_an_epoch_that_advances_without_its_parent_is_found(story, tmp_path):
    """The worst (R33): each layer is sound, and a page is in none of them. The log's count of epochs tells."""
    slot = story.guest.slots[-1]
    story.guest.write(slot.base_gfn * 4096, b"lost")
    story.recorder._client.take(slot.id).commit()
    story.step(0)
    story.step(0)  # what comes after it has a parent that is right, and is found by its parents
    flawed, _ = story.chain.snapshots()[-2:]
    (found,) = story.chain.check(data=False)
    assert (found.kind, found.snapshot) == ("parent", flawed.id)
    assert "is of epoch 5, and its parent" in found.text
    for call in (lambda: story.chain.restore(tmp_path / "no"), story.chain.rebase):
        with pytest.raises(SnapshotError, match="is in neither"):
            call()
    story.keep(story.recorder.save())
    story.step()
    assert [each.epoch for each in story.chain.snapshots()] == [0, 1, 2, 3, 5, 6, 0, 1]
    assert story.chain.restore(tmp_path / "yes").digest == story.guest.digest()


def test_a_parent_that_wasn_t_advanced_is_found(story):
    """A difference to the parent of its parent (R33 the other way): what the one between holds is missed."""
    *_, second, _, last = story.chain.snapshots()
    path = story.chain.folder / f"{last.name}.json"
    path.write_text(path.read_text().replace(last.parent, second.id))
    assert [(each.kind, each.snapshot) for each in story.chain.check(data=False)] == [("parent", last.id)]


def test_what_is_in_no_layer_is_found_by_the_digest_of_all_memory(story, tmp_path):
    """The epochs are right, and a page is in none of them: whoever gives the bits has lost one."""
    story.guest.write(0x10_000, b"lost")
    (feed,) = (feed for slot, feed in story.recorder._client.feeds.items() if slot == 0)
    story.guest.dirty(0).commit()  # pours, for all
    feed.bitmap.words[:] = 0
    story.step(0)
    assert story.chain.check() == []
    (found,) = story.chain.check(whole=True)
    assert (found.kind, found.snapshot) == ("digest", story.recorder.tip.id)
    with pytest.raises(SnapshotError, match="SHA-256"):
        story.chain.restore(tmp_path / "no")


# --- manifests ---------------------------------------------------------------------------------------------


def change(found, path, value):
    *keys, last = path
    for key in keys:
        found = found[key]
    if value is KeyError:
        del found[last]
    else:
        found[last] = value


BAD = [
    (["version"], 2, "version 2"), (["version"], True, "version True"), (["version"], "1", "version '1'"),
    (["format"], "x", "its format is 'x'"), (["id"], "../../etc", "id is 32"), (["id"], 5, "id is 32"),
    (["parent"], "", "parent is 32"), (["time"], -1, "time is a whole number"), (["time"], 1.5, "time is"),
    (["time"], 1 << 63, "time is"), (["epoch"], None, "epoch is"), (["page-size"], 0, "whole pages"),
    (["page-size"], 3000, "whole pages"), (["page-size"], 8192, "whole pages"),
    (["page-size"], True, "page-size is"),
    (["slots"], {}, "slots is a list"), (["slots"], [], "1 to 32767 slots"), (["slots", 0], 7, "a slot is an object"),
    (["slots", 0, "size"], 1 << 63, "a slot's size"), (["slots", 0, "size"], (1 << 52), "beyond the memory file"),
    (["slots", 0, "size"], 4097, "whole pages"), (["slots", 0, "size"], 0, "whole pages"),
    (["slots", 0, "gpa"], 4096, "a slot's gpa"), (["slots", 0, "gpa"], "0x1fffffffffffff000", "a slot's gpa"),
    (["slots", 0, "gpa"], "0xfffffffffffff000", "beyond 52 bits"),
    (["slots", 0, "gpa"], "0x0000000000010000", "overlaps"),
    (["slots", 0, "offset"], 0, "overlap in the memory file"), (["slots", 0, "id"], 0, "id comes twice"),
    (["slots", 0, "offset"], 1 << 62, "a slot's offset"), (["slots", 0, "more"], 0, "'more', which version 1"),
    (["memory"], None, "memory is an object"), (["memory", "file"], "../x", "name of a file beside"),
    (["memory", "file"], "/etc/passwd", "name of a file beside"), (["memory", "file"], "..", "name of a file"),
    (["memory", "file"], "a\nb", "name of a file"), (["memory", "file"], "x" * 256, "name of a file"),
    (["memory", "file"], 7, "name of a file"), (["memory", "size"], 1 << 63, "memory's size"),
    (["memory", "size"], 4096, "beyond the memory file"), (["memory", "pages-sha256"], "0", "64 hexadecimal"),
    (["memory", "sha256"], None, "64 hexadecimal"), (["bitmap", "file"], "SELF", "names one file twice"),
    (["bitmap", "sha256"], KeyError, "bitmap has no sha256"), (["state", "file"], "a/b", "name of a file"),
    (["source"], "\x1b[2J", "printable text"), (["source"], "x" * 201, "printable text"),
    (["mechanism"], [], "printable"),
    (["merged"], "abc", "merged is a list"), (["merged"], [3], "32 hexadecimal"), (["extra"], 1, "'extra'"),
    (["slots"], KeyError, "has no slots"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "value", "why"), BAD, ids=lambda each: None if isinstance(each, list) else str(each)[:30]
)
@pytest.mark.alike(2)
def test_a_hostile_manifest_is_refused_by_one_line(story, tmp_path, path, value, why):
    snapshot = story.chain.snapshots()[-1]
    file = story.chain.folder / f"{snapshot.name}.json"
    found = json.loads(file.read_bytes())
    change(found, path, snapshot.memory if value == "SELF" else value)
    file.write_text(json.dumps(found))
    with pytest.raises(SnapshotError, match=why) as raised:
        story.chain.snapshots()
    text = str(raised.value)
    assert text.startswith(f"{file}: ")
    assert "\n" not in text
    assert len(text) < 400
    assert "unreadable" in kinds(story.chain)
    for call in (story.chain.rebase, lambda: story.chain.prune(1), lambda: story.chain.restore(tmp_path / "no")):
        before = sorted(story.chain.folder.iterdir())
        with pytest.raises(SnapshotError):
            call()
        assert sorted(story.chain.folder.iterdir()) == before


def test_a_manifest_is_what_was_looked_at():
    digests = (digit * 64 for digit in "abcdef")
    snapshot = Snapshot(
        "1" * 32, "2" * 32, 1_700_000_000_123, 7, SMALL, (7 << 12, 0, 72 << 12), 200 << 12, "a.mem", "a.bitmap",
        next(digests), next(digests), next(digests), "a.state", next(digests), "tést", "compared",
        ("3" * 32, "4" * 32), "a",
    )  # fmt: skip
    as_seen("manifest.json", snapshot.to_bytes().decode())
    assert parse(snapshot.to_bytes(), Path("a.json")) == snapshot


def manifest(**change: object) -> bytes:
    digest = "0" * 64
    found = {
        "format": "hwdbm-snapshot", "version": 1, "id": "1" * 32, "parent": None, "time": 0, "epoch": 0, "source": "a",
        "mechanism": "b", "page-size": 4096, "slots": [{"id": 0, "flags": 0, "gpa": "0x0", "size": 4096, "offset": 0}],
        "memory": {"file": "m", "size": 4096, "pages-sha256": digest}, "bitmap": {"file": "b", "sha256": digest},
    }  # fmt: skip
    return json.dumps(found | change).encode()


LENGTHS = [("time", (1 << 53) - 1), ("source", "x" * 200), ("bitmap", {"file": "é" * 127 + "b", "sha256": "0" * 64})]


@pytest.mark.parametrize(("key", "most"), LENGTHS)
def test_the_most_that_a_manifest_says(key, most):
    assert parse(manifest(**{key: most}), Path("a.json"))
    more = most + 1 if isinstance(most, int) else most + "x" if isinstance(most, str) else most | {"file": "é" * 128}
    with pytest.raises(SnapshotError):
        parse(manifest(**{key: more}), Path("a.json"))


def test_a_manifest_that_is_too_long(tmp_path):
    chain, file = Chain(tmp_path), tmp_path / "a.json"
    file.write_bytes(manifest().ljust(4 << 20))
    assert len(chain.snapshots()) == 1
    file.write_bytes(manifest().ljust((4 << 20) + 1))
    with pytest.raises(SnapshotError, match=f"it has more than {4 << 20} bytes"):
        chain.snapshots()


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ((1 << 64) - 1, "18446744073709551615"), (1 << 64, "a number beyond 64 bits"), (1 - (1 << 64), "-184467440737"),
        (-1 << 64, "a number beyond 64 bits"), ("x" * 58, "'" + "x" * 58 + "', not"),
        ("x" * 59, "'" + "x" * 56 + "..., not"), ([1, "é"], "[1, 'é'], not"),
    ],
)  # fmt: skip
def test_how_a_value_that_is_refused_is_shown(value, shown):
    with pytest.raises(SnapshotError, match=re.escape(f"a.json: its format is {shown}")):
        parse(manifest(format=value), Path("a.json"))


@pytest.mark.parametrize(
    "raw",
    [b"", b"[]", b"7", b"{", b"\xff\xfe", b"[" * 100_000, b'{"format": NaN}', b'{"id": 1, "id": 1}', b"9" * 5000],
)
def test_no_json(story, raw):
    (story.chain.folder / "x.json").write_bytes(raw)
    with pytest.raises(SnapshotError, match=r"x\.json: "):
        story.chain.snapshots()


def test_cycles_and_wrong_parents(story):
    names = [each.name for each in story.chain.snapshots()]
    ids = [each.id for each in story.chain.snapshots()]
    folder = story.chain.folder

    def edit(number: int, **change: object) -> None:
        file = folder / f"{names[number]}.json"
        file.write_text(json.dumps(json.loads(file.read_bytes()) | change))

    edit(0, parent=ids[3], time=json.loads((folder / f"{names[3]}.json").read_bytes())["time"])
    for number in (1, 2):
        edit(number, time=json.loads((folder / f"{names[3]}.json").read_bytes())["time"])
    with pytest.raises(SnapshotError, match="among its own parents"):
        story.chain.rebase(ids[3])
    assert "parent" in kinds(story.chain)
    edit(0, parent=None)
    edit(1, time=0)
    assert "parent" in kinds(story.chain)
    with pytest.raises(SnapshotError, match="is younger"):
        story.chain.rebase(ids[3])
    edit(0, id=ids[1])
    with pytest.raises(SnapshotError, match="has the id of"):
        story.chain.snapshots()


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"{}", b'{"path": 3}', b'{"format":"hwdbm-rebase","version":1,"path":[1,2],"sha256":""}',
        b'{"format":"hwdbm-rebase","version":1,"path":["1"],"sha256":""}',
        b'{"format":"hwdbm-rebase","version":2,"path":["1","2"],"sha256":""}',
        b'{"format":"hwdbm-rebass","version":1,"path":["1","2"],"sha256":""}',
        b'{"format":"hwdbm-rebase","version":1,"path":["1","2"],"sha256":7}',
    ],
)  # fmt: skip
def test_a_journal_that_is_none(story, tmp_path, raw):
    (story.chain.folder / "rebase.journal").write_bytes(raw)
    assert kinds(story.chain) == ["unfinished"]
    for call in (story.chain.rebase, lambda: story.chain.restore(tmp_path / "no")):
        with pytest.raises(SnapshotError, match="no journal of a rebase"):
            call()


@pytest.mark.parametrize(("numbers", "says"), [((0, 2), "aren't those of"), ((0, 1, -1), "isn't there")])
def test_a_journal_of_other_snapshots(story, numbers, says):
    ids = [*(each.id for each in story.chain.snapshots()), "no such id"]
    journal = {"format": "hwdbm-rebase", "version": 1, "path": [ids[at] for at in numbers], "sha256": ""}
    (story.chain.folder / "rebase.journal").write_text(json.dumps(journal))
    with pytest.raises(SnapshotError, match=f"rebase.journal: its snapshot.*{says}"):
        story.chain.rebase()
    assert kinds(story.chain) == ["unfinished"]


def test_other_slots_need_a_full_one(story):
    story.recorder._source = PlainGuest(LAYOUT)
    with pytest.raises(SnapshotError, match="of other slots"):
        story.recorder.diff()


# --- at random ---------------------------------------------------------------------------------------------

STEPS = st.lists(st.sampled_from(["diff", "diff", "save", "rebase", "in-place", "prune", "again"]), max_size=10)


@settings(max_examples=15 * EFFORT, deadline=None)
@given(steps=STEPS, seed=st.integers(0, 1 << 30))
def test_whatever_the_order(tmp_path_factory, steps, seed):
    folder = tmp_path_factory.mktemp("story")
    story = Story(folder / "chain", steps=1, seed=seed)
    for step in steps:
        known = story.chain.snapshots()
        which = known[int(story.rng.integers(len(known)))]
        if step == "diff":
            story.step(int(story.rng.integers(0, 6)))
        elif step == "save":
            story.keep(story.recorder.save())
        elif step == "rebase":
            story.chain.rebase(which.id)
        elif step == "in-place":
            with suppress(SnapshotError):  # a fork
                story.chain.rebase(which.id, in_place=True)
        elif step == "prune":
            story.chain.prune(int(story.rng.integers(1, 5)))
        else:
            story.recorder.close()
            story.recorder = Recorder(story.guest, folder / "chain", digest=True)
            story.keep(story.recorder.save())
    assert story.right() >= 1
    assert story.chain.check(whole=True) == []
    story.recorder.close()
    story.guest.close()
    shutil.rmtree(folder)


@pytest.mark.parametrize("verb", ["prune", "in place", "restore"])
def test_errors_of_the_system_name_their_file(tmp_path, monkeypatch, verb):
    """The first call of each kind for each file fails: the error names that file, and no half of a snapshot stays."""
    story = Story(tmp_path / "chain", steps=1, layout=MemoryMap(4096, (Memslot(0, 0, 0, 3, 0),)))
    story.recorder.close()
    verbs = {
        "prune": lambda chain: chain.prune(1),
        "in place": lambda chain: chain.rebase(in_place=True),
        "restore": lambda chain: chain.restore(tmp_path / "out" / "ram"),
    }

    def fail_at(number: int, patch: pytest.MonkeyPatch) -> list[tuple[str, Path]]:
        """Have the first call of the kind and file that come as `number` fail, and return which they were."""
        seen = []

        def failing(name, real):
            def call(*args, **options):
                fd = options.get("dir_fd", options.get("dst_dir_fd", args[0]))
                file = Path(f"/proc/self/fd/{fd}").readlink() / (args[-1] if options else "")
                if len(seen) < number and (name, file) not in seen:
                    seen.append((name, file))
                    if len(seen) == number:
                        raise OSError(errno.EIO, "broken", *([args[0]] if options else []))
                return None if name == "fsync" else real(*args, **options)

            return call

        for name in ("preadv", "pwrite", "write", "truncate", "fsync", "link", "unlink"):
            patch.setattr(os, name, failing(name, getattr(os, name)))
        return seen

    met = set()
    for number in range(1, 100):
        for name in ("copy", "out"):
            shutil.rmtree(tmp_path / name, ignore_errors=True)
        shutil.copytree(story.chain.folder, tmp_path / "copy")
        (tmp_path / "out").mkdir()
        chain = Chain(tmp_path / "copy")
        with monkeypatch.context() as patch:
            seen = fail_at(number, patch)
            try:
                verbs[verb](chain)
            except OSError as error:
                found = Path(error.filename)
            else:
                break
        name, file = seen[-1]
        met.add(name)
        # A new file has no name yet; and where its folder can't be synced, it is named.
        assert found == file or (file.name[:1] in "#." and found.parent == file.parent) or found.parent == file
        if verb != "in place" and name != "unlink" and file != chain.folder:
            assert kinds(chain, whole=True) == []
        assert file.parent != tmp_path / "out" or not list(file.parent.iterdir())
    assert len(seen) < number
    assert {"preadv", "pwrite", "fsync"} <= met
    assert verb == "restore" or "unlink" in met


@settings(max_examples=20 * EFFORT, deadline=None)
@given(st.data())
def test_runs_are_written_and_read_as_they_are(tmp_path_factory, data):
    """Batches, their hash, and holes, against all in one piece."""
    counts = data.draw(st.lists(st.integers(1, 70), max_size=30))
    batch = data.draw(st.sampled_from([64, 64 * 7, 10_000 * 64]))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    parts, at = [], 0
    for count in counts:
        at += int(rng.integers(0, 3)) * 64
        parts.append((at, rng.integers(0, 2, count * 64, dtype=np.uint8) * (rng.random() < 0.7)))
        at += count * 64
    path = tmp_path_factory.mktemp("runs") / "file"
    before = moving._BATCH, moving._ZEROS, moving._LONG
    moving._BATCH, moving._ZEROS, moving._LONG = batch, 64, data.draw(st.sampled_from([1, 64 * 9, 1 << 20]))
    try:
        with path.open("w+b") as file:
            os.truncate(file.fileno(), at)
            want = bytearray(at)
            for start, part in parts:
                want[start : start + part.size] = part.tobytes()
            half = at // 128 * 64  # in two slots, of which the second one's runs begin within it
            memory = [np.frombuffer(bytes(want), dtype=np.uint8), np.frombuffer(bytes(want), dtype=np.uint8)]
            rows = [[start, part.size, int(start >= half), start, 0] for start, part in parts]
            runs = np.array(rows, dtype=np.int64).reshape(-1, 5)
            digest = moving.put_pages(file.fileno(), runs, memory, 64, holes=data.draw(st.booleans()))
            assert path.read_bytes() == bytes(want)
            assert digest == sha(b"".join(part.tobytes() for _, part in parts))
            read = bytearray(at)

            def use(slot, start, part):
                read[start : start + part.size] = part.tobytes()

            assert moving.get_pages([(file.fileno(), path)], runs, use) == digest
            assert read == want
    finally:
        moving._BATCH, moving._ZEROS, moving._LONG = before


def test_runs_that_follow_each_other_come_together(tmp_path, monkeypatch):
    """Of one slot, whatever file they are in, as far as they are read together."""
    monkeypatch.setattr(moving, "_BATCH", 1000)
    raw = np.random.default_rng(3).bytes(2000)
    files = []
    with ExitStack() as stack:
        for name in ("a", "b"):
            (tmp_path / name).write_bytes(raw)
            files.append((stack.enter_context((tmp_path / name).open("rb")).fileno(), tmp_path / name))
        runs = [[0, 100, 0, 0, 0], [900, 50, 0, 100, 1], [20, 30, 0, 200, 1], [0, 100, 1, 230, 0]]
        runs.append([500, 900, 1, 330, 1])
        used = []
        moving.get_pages(files, np.array(runs), lambda slot, start, part: used.append((slot, start, part.tobytes())))
        assert used == [
            (0, 0, raw[:100] + raw[900:950]), (0, 200, raw[20:50]), (1, 230, raw[:100] + raw[500:1220]),
            (1, 1050, raw[1220:1400]),
        ]  # fmt: skip
        with pytest.raises(OSError, match="it ends at byte 2000") as raised:
            moving.get_pages(files, np.array([[0, 64, 0, 0, 0], [1900, 101, 0, 64, 1]]))
    assert raised.value.filename == str(tmp_path / "b")


def test_memory_from_elsewhere(story, tmp_path):
    """What another program wrote: compared with the newest, or with a bitmap that says what was dirtied."""
    chain, guest = Chain(tmp_path), story.guest

    def memory():
        return {slot.id: guest.memory(slot.id) for slot in guest.slots}

    def keep(snapshot):
        story.moments[snapshot.id] = memory_of(guest), None
        return snapshot

    with pytest.raises(SnapshotError, match="there is no snapshot in it"):
        chain.add(SMALL, memory())
    before = time.time()
    first = keep(chain.add(SMALL, memory(), full=True))
    assert (first.full, first.epoch) == (True, 0)
    assert before * 1e3 - 1 <= first.time <= time.time() * 1e3
    guest.write(0x10_000, b"new")
    guest.write(0x200_000 + 64 * 4096, b"end")
    second = keep(chain.add(SMALL, memory(), source="another"))
    assert {slot: pages.pages().tolist() for slot, pages in chain.pages(second).items()} == {2: [64], 0: [0], 5: []}
    assert (second.mechanism, second.source, second.digest) == ("compared", "another", guest.digest())
    assert second.epoch == 1
    guest.write(0x11_000, b"more")
    marked = {slot.id: DirtyBitmap(slot.npages) for slot in SMALL.slots}
    marked[0].set_range(1, 2)
    keep(chain.add(SMALL, memory(), pages=marked))
    assert chain.check(whole=True) == []
    for snapshot in chain.snapshots():
        chain.restore(tmp_path.parent / "ram", snapshot.id)
        assert (tmp_path.parent / "ram").read_bytes() == story.moments[snapshot.id][0]
    before = sorted(tmp_path.iterdir())
    short = {slot: part[:-4096] for slot, part in memory().items()}
    square = {slot: part.reshape(-1, 4096) for slot, part in memory().items()}
    spread = {slot: np.repeat(part, 2)[::2] for slot, part in memory().items()}
    for wrong in (
        lambda: chain.add(SMALL, {}),
        lambda: chain.add(SMALL, short),
        lambda: chain.add(SMALL, square),
        lambda: chain.add(SMALL, spread),
        lambda: chain.add(SMALL, {slot: part[None, :1] for slot, part in memory().items()}),
        lambda: chain.add(SMALL, memory(), pages={0: marked[0]}),
        lambda: chain.add(SMALL, memory(), pages={0: marked[0], 2: marked[0], 5: marked[5]}),
        lambda: chain.add(SMALL, memory(), pages=marked, full=True),
        lambda: chain.add(LAYOUT, {slot.id: np.zeros(slot.npages * 4096, np.uint8) for slot in LAYOUT.slots}),
    ):
        with pytest.raises(ValueError):  # noqa: PT011  # SnapshotError is one
            wrong()
        assert sorted(tmp_path.iterdir()) == before


def test_a_log_that_was_off_loses_nothing(story):
    """The epoch is broken: the next difference has all pages of the slots, whatever was written meanwhile."""
    story.guest.write(0x10_000, b"before")
    story.guest.stop_log()
    story.guest.write(0x11_000, b"while nobody looked")
    story.guest.start_log()
    story.guest.write(0x12_000, b"after")
    snapshot = story.step(0)
    assert sum(pages.weight() for pages in story.chain.pages(snapshot).values()) == 200
    assert story.right() == 5
    assert story.chain.check(whole=True) == []


def test_other_clients_take_nothing_from_it(story):
    with story.guest.client("statistics") as other:
        story.guest.write(0x10_000, b"one")
        other.take(0).commit()
        story.step(2)
        story.guest.write(0x11_000, b"two")
        with other.take(0) as lease:
            assert 1 in lease.bitmap
        story.guest.dirty(0).commit()
        story.step(2)
    assert story.right() == 6
    assert story.chain.check(whole=True) == []


def test_a_clock_that_is_set_back_makes_nothing_older(story, monkeypatch):
    import time

    last = story.chain.find()
    monkeypatch.setattr(time, "time_ns", lambda: 1)
    newest = story.keep(story.recorder.save())
    assert (newest.time, story.chain.find().id) == (last.time, newest.id)
    part = story.step(3)
    assert story.chain.find().id == part.id
    story.chain.prune(2)
    assert [each.id for each in story.chain.snapshots()] == [newest.id, part.id]
    assert story.right() == 2


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("000012-0123abcd.mem", True), ("000012-0123abcd.bitmap", True), ("000012-0123abcd.state", True),
        ("000012-0123abcd.json", True), ("any.json", True), ("rebase.journal", True),
        ("000012-0123abcd.txt", False), ("12-0123abcd.mem", False), ("notes", False), ("other.journal", False),
    ],
)  # fmt: skip
def test_names_of_a_chains_files(name: str, ours: bool) -> None:
    assert chains._is_ours(name) is ours
