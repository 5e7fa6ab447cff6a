"""What a difference and a check cost: ``python tests/snapshot/speed.py --memory 4096 --folder /dev/shm``.

A difference of 1 % of memory, pages at random, against its floor: the same pages written by pwritev, a call a run, into
a new file that is put in its place alike. Wall time is what counts on a machine that has a core for the hashing; the
CPU time of the calling thread is what is left where others use the machine. A check is of all that a chain holds.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np

from hwdbm.bitmap import DirtyBitmap
from hwdbm.files import NewFile
from hwdbm.memslot import Memslot
from hwdbm.snapshot import Chain, Recorder
from hwdbm.vm import MemoryMap, PlainGuest


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
    asked = parser.parse_args()
    npages = asked.memory << 8
    guest = PlainGuest(MemoryMap(4096, (Memslot(0, 0, 0x40000, npages, 0),)))
    memory, rng = guest.memory(0), np.random.default_rng(0)
    memory.reshape(-1, 4096)[:, :8] = 1
    with tempfile.TemporaryDirectory(dir=asked.folder) as name, Recorder(guest, Path(name) / "chain") as recorder:
        recorder.save()
        found = np.zeros((asked.rounds, 4))
        for row in found:
            pages = np.sort(rng.choice(npages, npages // 100, replace=False))
            memory.reshape(-1, 4096)[pages, 1] += 1
            dirty = DirtyBitmap.from_pages(pages, npages)
            for first, count in dirty.ranges().tolist():
                guest.mark_imported(0, first, count)
            runs = dirty.ranges(unit=4096).tolist()
            for column, call in ((0, lambda runs=runs: floor(Path(name) / "floor", memory, runs)), (2, recorder.diff)):
                wall, own = time.perf_counter(), time.thread_time()
                call()
                row[column], row[column + 1] = time.perf_counter() - wall, time.thread_time() - own
            (Path(name) / "floor").unlink()
        plain, cpu, diff, own = found.min(axis=0) * 1e3
        print(f"difference of 1 % of {asked.memory} MiB: {diff:.1f} ms, floor {plain:.1f} ms, {diff / plain:.2f} times")
        print(f"CPU time of the calling thread: {own:.1f} ms, floor {cpu:.1f} ms, {own / cpu:.2f} times")
        begun = time.perf_counter()
        assert not Chain(recorder.chain.folder).check()
        size = memory.size + asked.rounds * (npages // 100) * 4096
        print(f"check: {size / (time.perf_counter() - begun) / 1e9:.2f} GB/s")


if __name__ == "__main__":
    main()
