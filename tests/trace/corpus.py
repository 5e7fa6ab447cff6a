"""The corpus of write traces: the small one that hwdbm brings, and the larger one of `make traces`.

`python -P tests/trace/corpus.py FOLDER` records the larger one, and `--small` the other, anew; each needs /dev/kvm.
What the guests write is random or a matter of time, so that no two recordings are the same; what they are like is.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import hwdbm.cli.example

ROOT = Path(hwdbm.cli.example.__file__).parent / "examples" / "traces"

SMALL = {
    "kvm-counting": ["--source", "kvm", "--workload", "counting", "--rate", "6000"],
    "kvm-random": ["--source", "kvm", "--workload", "random", "--rate", "4000"],
    "machine-hot": ["--workload", "hot,share=0.04", "--rate", "40000"],
    "machine-zipf": ["--workload", "zipf", "--rate", "20000"],
    "machine-bursty": ["--workload", "bursty", "--rate", "20000"],
    "machine-idle": ["--workload", "idle"],
}
SIZE = ["--memory", "128M", "--interval", "100ms", "--duration", "8s"]

LARGE = {
    **{f"kvm-counting-{rate}": ["--source", "kvm", "--workload", "counting", "--rate", str(rate)]
       for rate in (2_000, 10_000, 50_000, 200_000)},
    **{f"kvm-random-{rate}": ["--source", "kvm", "--workload", "random", "--rate", str(rate)]
       for rate in (2_000, 10_000, 50_000, 200_000)},
    "kvm-idle": ["--source", "kvm", "--workload", "idle"],
    **{f"machine-hot-{share}": ["--workload", f"hot,share={share}", "--rate", "50000"] for share in (0.01, 0.05, 0.2)},
    **{f"machine-{kind}": ["--workload", kind, "--rate", "50000"]
       for kind in ("sequential", "uniform", "zipf", "bursty")},
    **{f"arm-{kind}": ["--source", "arm", "--workload", kind, "--memory", "256M"]
       for kind in ("window", "random", "zero", "mixed")},
}  # fmt: skip
LARGE_SIZE = ["--memory", "1G", "--interval", "100ms", "--duration", "30s"]


def record(folder: Path, traces: dict[str, list[str]], size: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, how in traces.items():
        place = folder / name
        if place.exists():
            shutil.rmtree(place)
        command = [sys.executable, "-P", "-m", "hwdbm", "record", "--output", str(place), *size, *how, "--seed", "1"]
        print(" ".join(command[4:]), flush=True)
        subprocess.run(command, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--small", action="store_true", help="record what hwdbm brings, in its place")
    given = parser.parse_args()
    if given.small == (given.folder is not None):
        parser.error("give a folder, or --small")
    if given.small:
        record(ROOT, SMALL, SIZE)
    else:
        record(given.folder, LARGE, LARGE_SIZE)


if __name__ == "__main__":
    main()
