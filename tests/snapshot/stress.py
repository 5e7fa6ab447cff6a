"""Chains under duress: ``python tests/snapshot/stress.py --kills 100 --seconds 20`` (`make snapshots`).

Processes are killed at random moments of save, diff, rebase (both kinds) and prune; the disk is full at each; 200
differences are merged in two groupings; and a real guest is snapshotted every 50 ms while it migrates back and forth.
After each, every snapshot that is there must give the memory of its moment, by the digest that the VM itself had then.
A line for each; the exit status says whether all was well.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from hwdbm.errors import SnapshotError
from hwdbm.kvm import Kvm, KvmUnavailableError, KvmVm
from hwdbm.memslot import Memslot
from hwdbm.migration import Precopy, Settings, receive, transport
from hwdbm.snapshot import Chain, Recorder
from hwdbm.vm import MemoryMap, PlainGuest
from hwdbm.vm.still import turn_of

LAYOUT = MemoryMap(4096, (Memslot(0, 0, 0x40000, 1024, 0), Memslot(1, 0, 0x10, 77, 0)))
EVERY = 0.05  # seconds between two snapshots of a real guest
LEG = 24 << 20  # bytes of its memory


def guest_of(seed: int) -> PlainGuest:
    guest, rng = PlainGuest(LAYOUT), np.random.default_rng(seed)
    for slot in guest.slots:
        memory = guest.memory(slot.id)
        memory[:] = rng.integers(0, 256, memory.size, dtype=np.uint8)
    return guest


def scribble(guest: PlainGuest, rng: random.Random, writes: int = 40) -> None:
    for _ in range(writes):
        slot = rng.choice(guest.slots)
        gpa = (slot.base_gfn + rng.randrange(slot.npages)) * 4096
        guest.write(gpa, bytes(4096) if rng.random() < 0.2 else rng.randbytes(rng.randrange(1, 4096)))
    guest.set_state(rng.randbytes(30))


def filled(folder: Path, seed: int, diffs: int) -> None:
    rng = random.Random(seed)
    with guest_of(seed) as guest, Recorder(guest, folder, digest=True) as recorder:
        recorder.save()
        for _ in range(diffs):
            scribble(guest, rng)
            recorder.diff()


def sound(folder: Path) -> int:
    """Return how many snapshots there are; what is wrong with one is an error."""
    chain = Chain(folder)
    flaws = [flaw for flaw in chain.check(whole=True) if flaw.kind not in ("leftover", "unfinished")]
    assert not flaws, flaws
    return len(chain.snapshots())


# --- killed ------------------------------------------------------------------------------------------------


def saves(folder: Path, seed: int) -> None:
    with guest_of(seed) as guest, Recorder(guest, folder, digest=True) as recorder:
        while True:
            scribble(guest, random.Random(seed))
            recorder.save()


def diffs(folder: Path, seed: int) -> None:
    rng = random.Random(seed)
    with guest_of(seed) as guest, Recorder(guest, folder, digest=True) as recorder:
        recorder.save()
        while True:
            scribble(guest, rng)
            recorder.diff()


VERBS: dict[str, Callable[[Path, int], object]] = {
    "save": saves,
    "diff": diffs,
    "rebase": lambda folder, seed: Chain(folder).rebase(),
    "rebase in place": lambda folder, seed: Chain(folder).rebase(in_place=True),
    "prune": lambda folder, seed: Chain(folder).prune(1 + seed % 4),
}


def started(verb: Callable[[Path, int], object], folder: Path, seed: int) -> int:
    """Return the process that does it."""
    child = os.fork()
    if not child:
        with suppress(BaseException):
            verb(folder, seed)
        os._exit(0)
    return child


def took(folder: Path, verb: Callable[[Path, int], object], seed: int) -> float:
    """Return how long a process takes that does it; those that go on for ever are cut at a third of a second."""
    if verb in (saves, diffs):
        return 0.3
    begun = time.monotonic()
    os.waitpid(started(verb, folder, seed), 0)
    return time.monotonic() - begun


def kill(count: int, scratch: Path) -> str:
    told, begun = Counter[str](), time.monotonic()
    base = scratch / "base"
    filled(base, 1, 8)
    for name, verb in VERBS.items():
        for number in range(count):
            folder = scratch / "killed"
            if number % 10 == 0:  # on a machine that is busy it takes longer than it did
                shutil.copytree(base, folder)
                longest = took(folder, verb, 2)
                shutil.rmtree(folder)
            shutil.copytree(base, folder)
            child = started(verb, folder, number)
            while verb is diffs and len(Chain(folder).snapshots()) == 9:  # a full one of its own comes first
                assert os.waitpid(child, os.WNOHANG) == (0, 0)
                time.sleep(0.001)
            time.sleep(random.Random(number).uniform(0, 1.1 * longest))
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            unfinished = any(flaw.kind == "unfinished" for flaw in Chain(folder).check(data=False))
            told[
                f"{name}: {'in time' if not os.WIFSIGNALED(status) else 'unfinished' if unfinished else 'killed'}"
            ] += 1
            if unfinished:
                with suppress(SnapshotError):
                    Chain(folder).restore(scratch / "out")
                    raise AssertionError("a base that is half changed was restored")
            else:
                assert sound(folder) >= 1
            Chain(folder).rebase()  # any call that writes finishes and tidies
            assert sound(folder) >= 1
            assert not Chain(folder).check(), "something is left over"
            shutil.rmtree(folder)
    cases = ", ".join(f"{what} {times}" for what, times in sorted(told.items()))
    return f"{count} kills of each of {len(VERBS)} verbs in {time.monotonic() - begun:.0f} s ({cases})"


# --- a full disk -------------------------------------------------------------------------------------------


def full(scratch: Path) -> str:
    """A file system that ends within each call, at one place after the other."""
    place = scratch / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], check=False).returncode:
        return "a full disk: this user may not mount one, so it wasn't tried"
    failed = Counter[str]()
    try:
        for name, verb in VERBS.items():
            # In KiB: of one that needs no other file of the memory's size, every page counts.
            for room in range(0, 40, 4) if name == "rebase in place" else range(0, 4_750, 550):
                subprocess.run(["mount", "-o", "remount,size=64m", place], check=True)
                shutil.rmtree(place / "chain", ignore_errors=True)
                filled(place / "chain", 3, 6)
                used = shutil.disk_usage(place).used
                size = used // 1024 + room
                subprocess.run(["mount", "-o", f"remount,size={size}k", place], check=True)
                try:
                    verb(place / "chain", 2)
                except OSError:
                    failed[name] += 1
                subprocess.run(["mount", "-o", "remount,size=64m", place], check=True)
                unfinished = any(flaw.kind == "unfinished" for flaw in Chain(place / "chain").check(data=False))
                assert not unfinished or name == "rebase in place"
                if not unfinished:
                    sound(place / "chain")
                Chain(place / "chain").rebase()
                assert sound(place / "chain") >= 1
                assert not Chain(place / "chain").check()
    finally:
        subprocess.run(["umount", place], check=True)
    assert failed.keys() == VERBS.keys(), failed
    return f"a disk that was full: {', '.join(f'{name} {times}' for name, times in failed.items())} times"


# --- 200 differences ---------------------------------------------------------------------------------------


def groupings(scratch: Path) -> str:
    filled(scratch / "long", 5, 200)
    ids = [each.id for each in Chain(scratch / "long").snapshots()]
    found = set()
    for name, stops in (("at once", [200]), ("by sevens", [*range(7, 200, 7), 200])):
        shutil.copytree(scratch / "long", scratch / name)
        chain = Chain(scratch / name)
        for number, stop in enumerate(stops):
            chain.rebase(ids[stop], in_place=bool(number % 2))
        (last,) = chain.snapshots()
        assert last.id == ids[-1]
        found.add((scratch / name / last.memory).read_bytes())
        sound(scratch / name)
    assert len(found) == 1
    return "200 differences, merged at once and by sevens: the same bytes"


# --- a real guest ------------------------------------------------------------------------------------------


def migrated(vm: KvmVm, scratch: Path, took_over: list[KvmVm], errors: list[BaseException]) -> None:
    path = scratch / f"{time.monotonic_ns():x}"

    def arrive() -> None:
        try:
            with listener.accept(30) as channel:
                received = receive(channel, lambda layout: KvmVm.from_slots(layout.page_size, layout.slots))
            assert isinstance(received.destination, KvmVm)
            took_over.append(received.destination)
        except BaseException as error:  # noqa: BLE001 - it is raised where it is waited for
            errors.append(error)

    try:
        with transport.listen_unix(path) as listener:
            there = threading.Thread(target=arrive)
            there.start()
            with transport.connect_unix(path, 30) as channel:
                report = Precopy(vm, channel, Settings(max_downtime=0.1, on_limit="wait")).run()
                assert report.source_sha256 == report.destination_sha256
            there.join()
    except BaseException as error:  # noqa: BLE001 - as above
        errors.append(error)


def guest(seconds: float, scratch: Path) -> str:
    try:
        Kvm().close()
    except KvmUnavailableError as error:
        return f"a real guest: {error}, so it wasn't tried"
    vm = KvmVm(LEG, guest="random", rate=6_000, seed=4)
    vm.iteration = 1
    vm.resume()
    taken = legs = beside = restored = 0
    until, pauses = time.monotonic() + seconds, list[float]()
    try:
        while time.monotonic() < until:
            folder = scratch / f"leg{legs}"
            took_over, errors = list[KvmVm](), list[BaseException]()
            with Recorder(vm, folder, digest=True) as recorder:
                recorder.save()
                move = threading.Thread(target=migrated, args=(vm, scratch, took_over, errors))
                following, number = time.monotonic(), 0
                while not took_over and not errors:
                    if number == 5:
                        move.start()
                    following = max(following + EVERY, time.monotonic())
                    time.sleep(max(following - time.monotonic(), 0))
                    number += 1
                    if not took_over:
                        with turn_of(vm):  # a guest that is being handed over isn't written to
                            if vm.running:
                                vm.iteration = legs * 1000 + number + 1
                        recorder.diff()
                        beside += move.is_alive()
                        pauses.append(recorder.paused)
                move.join()
            assert not errors, errors
            vm.close()
            (vm,) = took_over
            taken += sound(folder)
            with KvmVm.from_slots(4096, MemoryMap.of(vm).slots) as again:
                Chain(folder).restore(again)
                again.check()
                again.resume()
                again.prove()
                restored += 1
            shutil.rmtree(folder)
            legs += 1
    finally:
        vm.close()
    assert beside >= legs, (beside, legs)
    return (
        f"{taken} snapshots of a real guest, {beside} beside {legs} migrations, paused for "
        f"{np.median(pauses) * 1e3:.0f} ms each (digests included); {restored} guests restored, and right"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="of each verb")
    parser.add_argument("--seconds", type=float, default=15, help="that a real guest runs")
    asked = parser.parse_args()
    # In memory: what is tried is the order of what is done, and no disk has to be waited for.
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        for step in (
            lambda: kill(asked.kills, Path(name)),
            lambda: full(Path(name)),
            lambda: groupings(Path(name)),
            lambda: guest(asked.seconds, Path(name)),
        ):
            print(step(), flush=True)
    print("nothing was lost, and nothing was wrong in silence")


if __name__ == "__main__":
    sys.exit(main())
