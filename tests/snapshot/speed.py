"""What a difference and a check cost: ``python tests/snapshot/speed.py --memory 4096 --folder /dev/shm``.

A difference of 1 % of memory, pages at random, against its floor: the same pages written by pwritev, a call a run, into
a new file that is put in its place alike, fsync included. Both get file pages that were in use before, since a machine
that is virtual itself may have to be given those that weren't. Then where the time goes, and a check of all that the
chain holds. The hash has a thread of its own, so that it matters whether a second core is free: ``--cores 1`` says what
is left without. On a machine that is busy, ``chrt -f 1`` before it all.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from hwdbm.bitmap import DirtyBitmap
from hwdbm.dirtylog import LogClient
from hwdbm.files import NewFile
from hwdbm.memslot import Memslot
from hwdbm.snapshot import Chain, Recorder, chain, pages
from hwdbm.vm import MemoryMap, PlainGuest

PARTS = (
    ("the log's harvest", LogClient, "take"),
    ("the runs of its bitmap", chain, "runs_of"),
    ("pages written, and waiting for their hash", chain, "put_pages"),
    ("beside that: pages gathered and hashed", pages, "_hashed"),
    ("names, bitmap, manifest, with their fsync", chain.Draft, "finish"),
)


@contextmanager
def clocked() -> Iterator[dict[str, np.ndarray]]:
    """Yield the seconds that each part takes, and its thread's processor time."""
    spent = {what: np.zeros(2) for what, _, _ in PARTS}

    def timed(what: str, call: Callable[..., object]) -> Callable[..., object]:
        def run(*args: object, **more: object) -> object:
            wall, own = time.perf_counter(), time.thread_time()
            try:
                return call(*args, **more)
            finally:
                spent[what] += time.perf_counter() - wall, time.thread_time() - own

        return run

    before = [(where, name, getattr(where, name)) for _, where, name in PARTS]
    for (what, where, name), (*_, call) in zip(PARTS, before, strict=True):
        setattr(where, name, timed(what, call))
    try:
        yield spent
    finally:
        for where, name, call in before:
            setattr(where, name, call)


class Ballast:
    """A file that gives its pages back, so that the next file takes them."""

    def __init__(self, path: Path, size: int) -> None:
        self.fd, self.size = os.open(path, os.O_RDWR | os.O_CREAT), size
        for at in range(0, size, 1 << 20):
            os.pwrite(self.fd, bytes(min(size - at, 1 << 20)), at)

    def give(self, size: int) -> None:
        self.size -= size
        os.truncate(self.fd, self.size)


def floor(path: Path, memory: np.ndarray, runs: list[list[int]]) -> None:
    with NewFile(path) as file:
        os.truncate(file.fd, memory.size)
        for start, length in runs:
            os.pwritev(file.fd, [memory[start : start + length]], start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory", type=int, default=1024, help="MiB")
    parser.add_argument("--folder", default="/dev/shm")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--cores", type=int, help="how many this process may use; all by default")
    asked = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: asked.cores])
    npages = asked.memory << 8
    guest = PlainGuest(MemoryMap(4096, (Memslot(0, 0, 0x40000, npages, 0),)))
    memory, rng = guest.memory(0), np.random.default_rng(0)
    memory.reshape(-1, 4096)[:, :8] = 1
    with tempfile.TemporaryDirectory(dir=asked.folder) as name, Recorder(guest, Path(name) / "chain") as recorder:
        recorder.save()
        each = (npages // 100 << 12) + (1 << 20)  # and what the smaller files take
        ballast = Ballast(Path(name) / "ballast", 2 * asked.rounds * each)
        rounds, parts = np.zeros((asked.rounds, 2, 2)), []
        for row in rounds:
            dirtied = np.sort(rng.choice(npages, npages // 100, replace=False))
            memory.reshape(-1, 4096)[dirtied, 1] += 1
            dirty = DirtyBitmap.from_pages(dirtied, npages)
            for first, count in dirty.ranges().tolist():
                guest.mark_imported(0, first, count)
            runs = dirty.ranges(unit=4096).tolist()
            with clocked() as spent:
                calls = (lambda runs=runs: floor(Path(name) / "floor", memory, runs), recorder.diff)
                for column, call in zip(row, calls, strict=True):
                    ballast.give(each)
                    wall, own = time.perf_counter(), time.process_time()
                    call()
                    column[:] = time.perf_counter() - wall, time.process_time() - own
            parts.append(spent)
            (Path(name) / "floor").unlink()
        (plain, plain_cpu), (diff, cpu) = rounds.min(axis=0) * 1e3
        print(f"difference of 1 % of {asked.memory} MiB: {diff:.1f} ms, floor {plain:.1f} ms, {diff / plain:.2f} times")
        print(f"processor time of all threads: {cpu:.1f} ms, floor {plain_cpu:.1f} ms, {cpu / plain_cpu:.2f} times")
        best = parts[int(rounds[:, 1, 0].argmin())]
        for what, (wall, own) in best.items():
            print(f"  {what + ':':45}{wall * 1e3:7.1f} ms, processor {own * 1e3:.1f} ms")
        other = diff / 1e3 - sum(wall for what, (wall, _) in best.items() if not what.startswith("beside"))
        print(f"  {'the folder, and what others left in it:':45}{other * 1e3:7.1f} ms")
        begun = time.perf_counter()
        assert not Chain(recorder.chain.folder).check()
        size = memory.size + asked.rounds * (npages // 100) * 4096
        print(f"check: {size / (time.perf_counter() - begun) / 1e9:.2f} GB/s")


if __name__ == "__main__":
    main()
