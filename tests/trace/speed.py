"""What a trace of a large guest costs: `python -P tests/trace/speed.py --gib 1024 --intervals 100`.

In each interval one word of a hundred has random bits. Writing and reading are processes of their own, so that the
memory of each is known.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from hwdbm.memslot import Memslot
from hwdbm.trace import Writer, analyse, open_trace


def write(path: Path, gib: int, intervals: int) -> None:
    npages, rng = gib << 18, np.random.default_rng(1)
    words = np.zeros(npages // 64, dtype=np.uint64)
    with Writer(path, [Memslot(0, 0, 0, npages, 0)], 4096) as writer:
        began = time.perf_counter()
        for row in range(intervals):
            words[:] = 0
            at = rng.integers(0, words.size, words.size // 100)
            words[at] = rng.integers(0, 1 << 63, at.size, dtype=np.uint64)
            writer.append((row + 1) * 10**8, words)
        said("writing an interval", (time.perf_counter() - began) / intervals)


def read(path: Path) -> None:
    began = time.perf_counter()
    trace = open_trace(path)
    said("opening it", time.perf_counter() - began)
    began = time.perf_counter()
    trace.words(0, 1)
    said("reading an interval", time.perf_counter() - began)
    began = time.perf_counter()
    trace.words(0, trace.intervals, 0, 1 << 14)
    said("reading 16,384 words of all intervals", time.perf_counter() - began)
    began = time.perf_counter()
    analyse(trace)
    said("analysing it", time.perf_counter() - began)


def said(what: str, seconds: float) -> None:
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{what:<40} {seconds * 1e3:10,.0f} ms, {most:,.0f} MiB of memory at most until here", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=int, default=64)
    parser.add_argument("--intervals", type=int, default=100)
    parser.add_argument("--step", choices=("write", "read"))
    parser.add_argument("--path", type=Path)
    given = parser.parse_args()
    if given.step == "write":
        write(given.path, given.gib, given.intervals)
    elif given.step == "read":
        read(given.path)
    else:
        with tempfile.TemporaryDirectory() as folder:
            for step in ("write", "read"):
                command = [sys.executable, "-P", __file__, "--step", step, "--path", f"{folder}/trace"]
                size = ["--gib", str(given.gib), "--intervals", str(given.intervals)]
                subprocess.run([*command, *size], check=True)


if __name__ == "__main__":
    main()
