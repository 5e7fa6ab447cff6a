"""A real guest that goes back and forth between two processes: ``python tests/kvm/soak.py --migrations 100``.

It runs throughout; each migration is a stream over a Unix socket, and each goes to the next of the logs. There must
be no mismatch: not of the digests, nor in the pattern that the guest leaves, and it must have written in each place.
After some migrations to warm up, no process may grow: in the descriptors and threads that it has with a guest or
without one, not by one; in its memory beside the guest's, not by more than --growth.

The table goes to stdout, and its last line says whether all was well, as the exit status does; progress to stderr.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hwdbm.cli.guest import KvmLog, build_kvm, kvm_for
from hwdbm.kvm import Kvm, KvmUnavailableError, KvmVm
from hwdbm.migration import Precopy, Settings, receive, transport
from hwdbm.vm import MemoryMap

LOGS = [KvmLog.BITMAP, KvmLog.CLEAR, KvmLog.RING]  # three, so that each process gets each of them
SETTINGS = Settings(max_downtime=0.05)
ROWS = 10  # of the table
ENOUGH = 6  # migrations: in each process, a third of those with a guest, and of those without


# --- a process that the guest is in, or not ----------------------------------------------------------------


class Peer:
    """Does what it is asked, a line of JSON each, and answers with one."""

    def __init__(self) -> None:
        self.vm: KvmVm | None = None

    def start(self, memory: int, rate: float) -> dict[str, Any]:
        """Begin with the guest."""
        self.vm = build_kvm(memory, log=LOGS[0], workload=None, rate=rate, seed=1, image=None, percent=100)
        self.vm.resume()
        return {}

    def receive(self, path: str, log: str) -> dict[str, Any]:
        with transport.listen_unix(Path(path)) as listener:
            say({"listening": path})
            channel = listener.accept(30)
        with channel:
            received = receive(channel, lambda layout: kvm_for(layout, log=KvmLog(log)))
        assert isinstance(received.destination, KvmVm)
        self.vm = received.destination
        return {"sha256": received.sha256, "proved": received.proved}

    def migrate(self, path: str) -> dict[str, Any]:
        """Send the guest away. What fails stays here, and is told."""
        assert self.vm is not None
        with transport.connect_unix(Path(path), 30) as channel:
            precopy = Precopy(self.vm, channel, SETTINGS)
            try:
                report = precopy.run()
            except OSError as error:
                return {"failed": str(error)}
        answer = {
            "pages": self.vm.pages,
            "digest": self.vm.digest(),  # once more: it stands still
            "sha256": [report.source_sha256, report.destination_sha256],
            "resumed": report.guest_resumed,
            "error": report.error,
            "passes": len(report.passes),
            "transferred": report.transferred,
            "total": report.total_time,
            "downtime": report.downtime,
        }
        self.vm.close()
        self.vm = None
        return answer

    def look(self) -> dict[str, Any]:
        """Return what this process has: kibibytes beside the guest's memory, descriptors, threads."""
        guest = 0 if self.vm is None else MemoryMap.of(self.vm).total
        (rss,) = (line for line in Path("/proc/self/smaps_rollup").read_text().splitlines() if line.startswith("Rss:"))
        return {
            "guest": guest,
            "rss": int(rss.split()[1]) - guest // 1024,
            "fds": len(list(Path("/proc/self/fd").iterdir())),
            "threads": settled(),
        }

    def end(self) -> dict[str, Any]:
        """Check the guest a last time, and close it."""
        if self.vm is None:
            return {}
        with self.vm as vm:
            vm.prove()
            vm.pause()
            return {"pages": vm.pages, "digest": vm.digest()}


def settled() -> int:
    """Return how many threads there are, once those that have ended are gone: the system takes a moment for that."""
    least = len(list(Path("/proc/self/task").iterdir()))
    for _ in range(20):
        time.sleep(0.005)
        least = min(least, len(list(Path("/proc/self/task").iterdir())))
    return least


def say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


def serve() -> None:
    peer = Peer()
    for line in sys.stdin:
        what, *rest = json.loads(line)
        say(getattr(peer, what)(*rest))


# --- the one that asks them --------------------------------------------------------------------------------


# What the allocator keeps of freed buffers depends on which threads met: some MiB at any time, which are no growth.
# With one arena, and large buffers in mappings of their own, what is seen is in use.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_ARENA_MAX": "1"}


class Process:
    def __init__(self, name: str, arguments: Sequence[str]) -> None:
        self.name = name
        self._process = subprocess.Popen(
            arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | ALLOCATOR
        )

    def begin(self, what: str, *rest: object) -> None:
        assert self._process.stdin
        self._process.stdin.write(json.dumps([what, *rest]) + "\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"process {self.name} ended with status {self._process.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found

    def ask(self, what: str, *rest: object) -> dict[str, Any]:
        self.begin(what, *rest)
        return self.answer()

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout
        self._process.stdout.close()


@contextmanager
def processes() -> Iterator[tuple[Process, Process]]:
    command = [sys.executable, "-P", "-W", "error", __file__, "--peer"]
    with ExitStack() as stack:
        both = [Process(name, command) for name in "AB"]
        for each in both:
            stack.callback(each.close)
        yield both[0], both[1]


@dataclass(frozen=True)
class Hop:
    """One migration: who has what after it, and what went wrong."""

    number: int
    log: KvmLog
    done: dict[str, Any]
    looks: dict[str, dict[str, Any]]
    wrong: list[str]


def hop(number: int, here: Process, there: Process, path: Path, log: KvmLog) -> Hop:
    there.begin("receive", str(path), log.value)
    assert there.answer() == {"listening": str(path)}
    done = here.ask("migrate", str(path))
    if "failed" in done:
        raise SystemExit(f"migration {number}: {done['failed']}")
    arrived = there.answer()
    wrong = []
    if {done["digest"], *done["sha256"], arrived["sha256"]} != {done["digest"]}:
        wrong.append(f"digests {done['digest']} and {done['sha256']} here, {arrived['sha256']} there")
    if not (done["resumed"] and arrived["proved"]):
        wrong.append(f"the guest's pattern: {done['error'] or arrived}")
    if not done["pages"]:
        wrong.append("the guest wrote nothing here")
    return Hop(number, log, done, {each.name: each.ask("look") for each in (here, there)}, wrong)


def soak(migrations: int, memory: int, rate: float, stay: float) -> list[Hop]:
    hops: list[Hop] = []
    with processes() as both, tempfile.TemporaryDirectory(prefix="hwdbm-") as folder:
        here, there = both
        here.ask("start", memory, rate)
        for number in range(1, migrations + 1):
            time.sleep(stay)
            done = hop(number, here, there, Path(folder) / "socket", LOGS[number % len(LOGS)])
            hops.append(done)
            here, there = there, here
            for wrong in done.wrong:
                print(f"migration {number}: {wrong}", file=sys.stderr)
            print(f"\r{number} of {migrations}", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
        there.ask("end")
        if not here.ask("end")["pages"]:
            hops[-1].wrong.append("the guest doesn't run where it arrived")
    return hops


def judge(hops: list[Hop], warm_up: int, growth: float) -> list[str]:
    """Return what is wrong with them all."""
    wrong = [f"migration {one.number}: {what}" for one in hops for what in one.wrong]
    rest = hops[warm_up:]
    for name in "AB":
        for what in ("fds", "threads"):
            seen: dict[object, int] = {}
            for one in rest:
                look = one.looks[name]
                role = one.log if look["guest"] else None  # a ring has a descriptor of its own
                if look[what] > seen.setdefault(role, look[what]):
                    wrong.append(f"{name} has {look[what]} {what} after migration {one.number}, and had {seen[role]}")
        for holds in (True, False) if len(rest) >= ENOUGH else ():
            sizes = [one.looks[name]["rss"] for one in rest if bool(one.looks[name]["guest"]) is holds]
            first, last = sizes[: len(sizes) // 3], sizes[-(len(sizes) // 3) :]
            if max(last) - max(first) > growth * 1024:
                wrong.append(f"{name} grew from {max(first)} to {max(last)} KiB beside the guest's memory ({holds=})")
    return wrong


def slope(hops: list[Hop], name: str) -> float:
    """Return by how many kibibytes a process grew with each migration."""
    numbers = np.array([one.number for one in hops])
    sizes = np.array([one.looks[name]["rss"] for one in hops], dtype=float)
    held = np.array([bool(one.looks[name]["guest"]) for one in hops])
    for holds in (False, True):  # it has more with a guest, in each turn
        sizes[held == holds] -= sizes[held == holds].mean()
    return float(np.polyfit(numbers, sizes, 1)[0])


def table(hops: list[Hop]) -> str:
    head = f"{'after':>6} {'log':>7} {'passes':>6} {'MiB':>6} {'ms':>6} {'down ms':>7} {'pages':>7}"
    for name in "AB":
        head += f" | {name + ' MiB':>7} {'fds':>3} {'threads':>7}"
    lines, every = [head], max(1, len(hops) // ROWS)
    for one in hops:
        if one.number == 1 or one.number % every == 0 or one is hops[-1]:
            done = one.done
            line = f"{one.number:>6} {one.log:>7} {done['passes']:>6} {done['transferred'] / 2**20:>6.1f} "
            line += f"{done['total'] * 1e3:>6.0f} {done['downtime'] * 1e3:>7.1f} {done['pages']:>7}"
            for name in "AB":
                look = one.looks[name]
                mark = "*" if look["guest"] else " "
                line += f" | {look['rss'] / 1024:>6.1f}{mark} {look['fds']:>3} {look['threads']:>7}"
            lines.append(line)
    return "\n".join([*lines, "*: the guest is there; MiB are resident, beside its memory"])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--migrations", type=int, default=100)
    parser.add_argument("--memory", type=int, default=64, metavar="MIB")
    parser.add_argument("--rate", type=float, default=50_000, metavar="PAGES", help="that the guest writes a second")
    parser.add_argument("--stay", type=float, default=0.05, metavar="SECONDS", help="between two migrations")
    parser.add_argument("--warm-up", type=int, default=10, metavar="MIGRATIONS", help="after which nothing may grow")
    parser.add_argument("--growth", type=float, default=1, metavar="MIB", help="of memory, that is nothing")
    parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peer:
        serve()
        return 0
    with Kvm():  # or say now that there is none
        start = time.monotonic()
    hops = soak(given.migrations, given.memory << 20, given.rate, given.stay)
    wrong = judge(hops, given.warm_up, given.growth)
    print(table(hops))
    rest = hops[given.warm_up :]
    if len(rest) >= ENOUGH:
        slopes = " and ".join(f"{slope(rest, name):+.2f}" for name in "AB")
        print(f"since migration {rest[0].number}, A and B grew by {slopes} KiB with each")
    pages = sum(one.done["pages"] for one in hops)
    moved = sum(one.done["transferred"] for one in hops) / 2**30
    print(f"{len(hops)} migrations, {moved:.2f} GiB, {pages} pages written, {time.monotonic() - start:.1f} s")
    growth = "no growth" if len(rest) >= ENOUGH else "too few migrations to see growth"
    print("\n".join(wrong or [f"no mismatch, and {growth}"]))
    return bool(wrong)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KvmUnavailableError as error:
        sys.exit(str(error))
