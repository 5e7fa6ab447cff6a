"""Write traces of Linux that does real work, by its RAM file: ``python -P tests/forecast/traces.py FOLDER``.

`make linux-traces` records them into build/traces; ``--small`` those that hwdbm brings, anew. Each guest runs in QEMU's
TCG, and `hwdbm record --ram-file` compares the content of the memory that it shares.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import guests
import judge
import qemu

import hwdbm.cli.example

ROOT = Path(hwdbm.cli.example.__file__).parent / "examples" / "traces"
SMALL = ("build", "redis", "sqlite", "zstd")


def record(folder: Path, works: tuple[str, ...], memory: int, interval: str, duration: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    kernel, initrd = guests.linux()
    for work in works:
        place = folder / f"linux-{work}"
        if place.exists():
            shutil.rmtree(place)
        case = judge.Case("linux", work, work, (), memory=memory)
        append = f"console=ttyS0 quiet panic=-1 work={work}"
        # What was never touched is a hole of the file, which needs no comparison.
        machine = qemu.Machine(memory << 20, kernel, append, initrd, prealloc=False)
        with (
            tempfile.TemporaryDirectory(prefix="hwdbm-", dir="/dev/shm") as name,
            qemu.guest(machine, Path(name)) as pair,
        ):
            judge.wait_ready(case, pair.side)
            size = ["--interval", interval, "--duration", duration]
            command = ["record", "--ram-file", str(pair.side.ram), "--output", str(place), *size]
            print("hwdbm", *command, flush=True)
            subprocess.run([sys.executable, "-P", "-m", "hwdbm", *command], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--small", action="store_true", help="record what hwdbm brings, in its place")
    given = parser.parse_args()
    if given.small == (given.folder is not None):
        parser.error("give a folder, or --small")
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, -15)  # as QEMU's, which would leave it little to run
    if given.small:
        record(ROOT, SMALL, 256, "250ms", "8s")
    else:
        record(given.folder, guests.WORKS, 512, "250ms", "30s")


if __name__ == "__main__":
    main()
