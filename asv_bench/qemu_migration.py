"""How long our live migration takes beside QEMU's: both in turn, several times, and the ratio of the medians.

    python asv_bench/qemu_migration.py

Both sides migrate a running, idle VM with the same random memory, with no limit on the bandwidth and a downtime limit
of 300 ms, from one process to another on this machine: QEMU over TCP on the loopback interface, ours so, too, and as it
does by default, over a Unix socket with the pages in shared memory. Memory is there on all sides before the clock runs.

QEMU is a machine ``pc`` under TCG. Its RAM is a private, preallocated mapping of the file that ours loads, and at the
destination anonymous and preallocated. In place of a BIOS it has four bytes, ``cli; hlt; jmp``: the vCPU runs and never
writes, as our workload ``idle``. Its migration is the plain one, in one stream, without a return path: the time ends
when the source has handed the last byte to the kernel, and ours when the destination has answered that it runs.

Ours compares the SHA-256 of all memory on both sides while the guest is paused, and QEMU has nothing like that. So what
is compared is our time without those digests; with them it is printed too.
"""

import argparse
import json
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Self

import numpy as np

from hwdbm.cli import parse
from hwdbm.cli.output import columns
from hwdbm.granule import size_name

LIMIT = 2 / 3
"""Of QEMU's total time, at most."""

_QEMU = "qemu-system-x86_64"
_HWDBM = (sys.executable, "-P", "-c", "from hwdbm.cli import main; main()")
_TMPFS = Path("/dev/shm")
_PATIENCE = 600.0  # seconds for a migration, or for an answer
_POLL = 0.1
_GRACE = 10.0  # seconds that a process has to end when asked to
_PAGE = 4096
_BLOCK = 2 << 20


class ComparisonError(RuntimeError):
    """A side didn't do its part, so there is nothing to compare."""


@dataclass(frozen=True, slots=True)
class Migration:
    """What a migration took; times are in seconds.

    Parameters
    ----------
    total_time : float
        Of all of it.
    verify_time : float
        What of it were digests of memory; 0 for QEMU.
    setup_time : float
        What of it went by before the first page was sent.
    downtime : float
        From the pause at the source to the end, without the digests.
    transferred : int
        Bytes sent.
    normal : int
        Pages sent with their bytes.
    mbps : float
        Megabit a second, as the side itself reckons it.
    """

    total_time: float
    verify_time: float
    setup_time: float
    downtime: float
    transferred: int
    normal: int
    mbps: float

    @classmethod
    def from_record(cls, record: dict[str, Any], memory: int) -> Self:
        """Return what a record of ``query-migrate``, or of ``hwdbm migrate --json``, says: its names are QEMU's.

        Raises
        ------
        ComparisonError
            If it wasn't completed, or sent fewer pages with their bytes than `memory` has.
        """
        if record.get("status") != "completed":
            raise ComparisonError(
                f"a migration ended as {record.get('status')!r}: {record.get('error-desc', 'no word')}"
            )
        keys = ("total-time", "verify-time", "setup-time", "downtime")
        total, verify, setup, downtime = (record.get(key, 0) / 1e3 for key in keys)
        ram = record["ram"]
        if ram["normal"] < memory // _PAGE:
            raise ComparisonError(f"{ram['normal']} pages were sent with their bytes, and not {memory // _PAGE}")
        return cls(total, verify, setup, downtime, ram["transferred"], ram["normal"], ram["mbps"])

    @property
    def compared(self) -> float:
        """Seconds of `total_time` without `verify_time`."""
        return self.total_time - self.verify_time

    def to_dict(self) -> dict[str, Any]:
        """Return it in QEMU's names and units."""
        record: dict[str, Any] = {"total-time": _ms(self.total_time)}
        if self.verify_time:
            record |= {"verify-time": _ms(self.verify_time), "total-time-without-verify": _ms(self.compared)}
        return record | {
            "setup-time": _ms(self.setup_time),
            "downtime": _ms(self.downtime),
            "ram": {"transferred": self.transferred, "normal": self.normal, "mbps": round(self.mbps, 3)},
        }


@dataclass(frozen=True, slots=True)
class Comparison:
    """Migrations of both sides, as many of each.

    Parameters
    ----------
    memory : int
        Bytes of guest memory.
    version : str
        QEMU's.
    qemu : tuple of Migration
        In the order in which they ran.
    ours : dict of str to tuple of Migration
        So, by what carried them.
    """

    memory: int
    version: str
    qemu: tuple[Migration, ...]
    ours: dict[str, tuple[Migration, ...]]

    def ratio(self, way: str, *, verified: bool = False) -> float:
        """Return the median of our total times, without the digests or with them, times the median of QEMU's."""
        ours = (one.total_time if verified else one.compared for one in self.ours[way])
        return statistics.median(ours) / statistics.median(one.total_time for one in self.qemu)

    def to_dict(self) -> dict[str, Any]:
        """Return it with a record a migration; times are in milliseconds."""
        return {
            "memory": self.memory,
            "qemu-version": self.version,
            "limit": round(LIMIT, 3),
            "qemu": [one.to_dict() for one in self.qemu],
            "hwdbm": {
                way: {
                    "ratio": round(self.ratio(way), 3),
                    "ratio-with-verify": round(self.ratio(way, verified=True), 3),
                    "met": self.ratio(way) <= LIMIT,
                    "runs": [one.to_dict() for one in ours],
                }
                for way, ours in self.ours.items()
            },
        }

    def to_text(self) -> str:
        """Return a table, and the ratios."""
        rows: list[tuple[object, ...]] = [
            ("run", "", "total", "of that digests", "without them", "setup", "downtime", "sent", "bandwidth")
        ]
        for number, one in enumerate(self.qemu, 1):
            rows.append((number, "QEMU, TCP", *_cells(one)))
            rows += [(number, f"hwdbm, {way}", *_cells(ours[number - 1])) for way, ours in self.ours.items()]
        lines = [f"{size_name(self.memory)} of random memory, beside {self.version}, TCG, over loopback TCP", ""]
        lines += [columns(rows, left=(1,)), "", "Medians of total time, times QEMU's:"]
        for way in self.ours:
            met = "yes" if self.ratio(way) <= LIMIT else "NO"
            lines.append(
                f"hwdbm, {way}: {self.ratio(way):.3f} without the digests, which QEMU doesn't have "
                f"(at most {LIMIT:.3f}: {met}); {self.ratio(way, verified=True):.3f} with them"
            )
        return "\n".join(lines)


def _cells(one: Migration) -> tuple[str, ...]:
    return (
        f"{one.total_time:.2f} s",
        f"{one.verify_time:.2f} s" if one.verify_time else "",
        f"{one.compared:.2f} s",
        f"{one.setup_time * 1e3:,.0f} ms",
        f"{one.downtime * 1e3:,.1f} ms",
        f"{one.transferred / (1 << 20):,.0f} MiB",
        f"{one.mbps:,.0f} Mbit/s",
    )


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)


# --- processes ---------------------------------------------------------------------------------------------


@contextmanager
def _started(command: Sequence[str], fds: Sequence[int] = ()) -> Iterator[subprocess.Popen[str]]:
    """Start a process that is gone afterwards, whatever happens; what it says on stderr can be read."""
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, pass_fds=fds
    ) as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(_GRACE)
            except subprocess.TimeoutExpired:
                process.kill()


def _last_words(process: subprocess.Popen[str]) -> str:
    """Wait for a process that ends, or hung up, and return what it said."""
    try:
        _, said = process.communicate(timeout=_GRACE)
    except subprocess.TimeoutExpired:
        return "it doesn't say why"
    return said.strip() or f"exit status {process.returncode}"


# --- QEMU --------------------------------------------------------------------------------------------------


class Qemu:
    """A QEMU, and its monitor (QMP) on a Unix socket.

    Parameters
    ----------
    process : Popen
        The process; of its stderr errors cite.
    sock : socket
        Connected with the monitor.
    """

    def __init__(self, process: subprocess.Popen[str], sock: socket.socket) -> None:
        self._process, self._sock = process, sock
        sock.settimeout(_PATIENCE)
        self._lines = sock.makefile("r", encoding="utf-8")
        self._answer()  # the greeting, once its memory is there
        self.execute("qmp_capabilities")

    def execute(self, command: str, **arguments: object) -> Any:  # JSON
        """Return what a command of the monitor answers. Of an argument's name, underscores are hyphens.

        Raises
        ------
        ComparisonError
            If it answers an error, or QEMU is gone.
        """
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        try:
            self._sock.sendall(json.dumps({"execute": command, "arguments": named}).encode() + b"\n")
        except OSError as error:
            raise ComparisonError(f"{_QEMU} is gone: {_last_words(self._process)}") from error
        answer = self._answer()
        if "error" in answer:
            raise ComparisonError(f"{_QEMU}: {command}: {answer['error'].get('desc')}")
        return answer["return"]

    def _answer(self) -> dict[str, Any]:
        """Return the next message that is no event."""
        try:
            for line in self._lines:
                message: dict[str, Any] = json.loads(line)
                if "event" not in message:
                    return message
        except TimeoutError as error:
            raise ComparisonError(f"{_QEMU} said nothing for {_PATIENCE:g} s") from error
        except OSError as error:
            raise ComparisonError(f"{_QEMU} hung up: {_last_words(self._process)}") from error
        raise ComparisonError(f"{_QEMU} ended: {_last_words(self._process)}")

    def wait(self, command: str, *status: str) -> dict[str, Any]:
        """Ask until the status that a command answers is one of these; return the answer.

        Raises
        ------
        ComparisonError
            If it takes too long.
        """
        until = time.monotonic() + _PATIENCE
        while True:
            answer: dict[str, Any] = self.execute(command)
            if answer.get("status") in status:
                return answer
            if time.monotonic() > until:
                raise ComparisonError(f"{_QEMU}: {command}: after {_PATIENCE:g} s still {answer.get('status')!r}")
            time.sleep(_POLL)

    def close(self) -> None:
        """Hang up."""
        self._lines.close()
        self._sock.close()


@contextmanager
def _qemu(memory: int, rom: Path, backend: str, *options: str) -> Iterator[Qemu]:
    """Start a QEMU with this memory; it is ready to be talked to, its memory allocated."""
    here, there = socket.socketpair()
    command = [
        *(_QEMU, "-no-user-config", "-nodefaults", "-display", "none", "-accel", "tcg"),
        *("-machine", "pc,memory-backend=ram", "-m", f"size={memory}B", "-bios", str(rom)),
        *("-object", f"{backend},id=ram,size={memory},prealloc=on"),
        *("-chardev", f"socket,id=qmp,fd={there.fileno()}", "-mon", "chardev=qmp,mode=control"),
        *options,
    ]
    with here, there, _started(command, [there.fileno()]) as process:
        there.close()  # or its end would never be the end
        qemu = Qemu(process, here)
        try:
            yield qemu
        finally:
            qemu.close()


def migrate_qemu(memory: int, image: Path, rom: Path) -> Migration:
    """Migrate a QEMU with the memory of a file to another.

    Raises
    ------
    ComparisonError
        If it fails, or less than the memory was sent.
    """
    file = f"memory-backend-file,mem-path={str(image).replace(',', ',,')},share=off"
    with (
        _qemu(memory, rom, "memory-backend-ram", "-incoming", "tcp:127.0.0.1:0") as destination,
        _qemu(memory, rom, file) as source,
    ):
        (address,) = destination.execute("query-migrate")["socket-address"]
        source.wait("query-status", "running")
        source.execute("migrate-set-parameters", max_bandwidth=0)  # 0: no limit
        source.execute("migrate", uri=f"tcp:127.0.0.1:{address['port']}")
        record = source.wait("query-migrate", "completed", "failed", "cancelled")
        if record["status"] == "completed":
            destination.wait("query-status", "running")
        return Migration.from_record(record, memory)


def _version() -> str:
    if shutil.which(_QEMU) is None:
        raise ComparisonError(f"there is no {_QEMU}: Debian has it in the package qemu-system-x86")
    done = subprocess.run([_QEMU, "--version"], capture_output=True, text=True, check=True)
    return done.stdout.partition("\n")[0]


# --- ours --------------------------------------------------------------------------------------------------


def migrate_over_tcp(memory: int, image: Path) -> Migration:
    """Migrate a machine with the memory of a file to ``hwdbm receive`` on the loopback interface.

    Raises
    ------
    ComparisonError
        If it fails, or less than the memory was sent.
    """
    with _started([*_HWDBM, "receive", "--listen", "127.0.0.1:0", "--insecure", "--memory", str(memory)]) as receiver:
        done = migrate_by_default(memory, image, "--to", _listening(receiver), "--insecure")
        said = _last_words(receiver)
        if receiver.returncode:
            raise ComparisonError(f"hwdbm receive: {said}")
        return done


def migrate_by_default(memory: int, image: Path, *options: str) -> Migration:
    """Migrate a machine with the memory of a file as ``hwdbm migrate`` does it: to a process that it starts.

    Raises
    ------
    ComparisonError
        If it fails, or less than the memory was sent.
    """
    command = [*_HWDBM, "migrate", "--memory", str(memory), "--memory-image", str(image), "--workload", "idle"]
    try:
        done = subprocess.run(
            [*command, "--json", *options], capture_output=True, text=True, check=False, timeout=_PATIENCE
        )
    except subprocess.TimeoutExpired as error:
        raise ComparisonError(f"hwdbm migrate took more than {_PATIENCE:g} s") from error
    if done.returncode:
        raise ComparisonError(f"hwdbm migrate, exit status {done.returncode}: {done.stderr.strip()}")
    return Migration.from_record(json.loads(done.stdout), memory)


WAYS = {"TCP": migrate_over_tcp, "Unix socket": migrate_by_default}


def _listening(receiver: subprocess.Popen[str]) -> str:
    """Wait until the receiver says where it listens, and return that."""
    assert receiver.stderr is not None
    said = receiver.stderr.readline()
    before, _, address = said.strip().partition("listening on ")
    if not address:
        raise ComparisonError(f"hwdbm receive: {before or _last_words(receiver)}")
    return address


# --- both --------------------------------------------------------------------------------------------------


def compare(memory: int, runs: int) -> Comparison:
    """Migrate QEMU and ours in turn, and return what they took.

    Parameters
    ----------
    memory : int
        Bytes of guest memory.
    runs : int
        Migrations of each.

    Raises
    ------
    ComparisonError
        If there is no QEMU, or a migration failed.
    OSError
        If there is no room for the file with the memory.
    """
    version = _version()
    qemu: list[Migration] = []
    ours: dict[str, list[Migration]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory(prefix="hwdbm-qemu-", dir=_folder(memory)) as folder:
        image, rom = Path(folder, "memory"), Path(folder, "rom")
        _say(f"writing {size_name(memory)} of random bytes to {image}")
        _write_random(image, memory)
        rom.write_bytes(halting_rom())
        for number in range(1, runs + 1):
            qemu.append(migrate_qemu(memory, image, rom))
            _say(f"run {number} of {runs}: QEMU {qemu[-1].total_time:.2f} s")
            for way, migrate in WAYS.items():
                one = migrate(memory, image)
                ours[way].append(one)
                _say(f"run {number} of {runs}: hwdbm, {way}, {one.compared:.2f} s, and {one.verify_time:.2f} s digests")
    return Comparison(memory, version, tuple(qemu), {way: tuple(them) for way, them in ours.items()})


def halting_rom() -> bytes:
    """Return a BIOS of 64 KiB that halts the vCPU at its reset vector, for good."""
    rom = bytearray(1 << 16)
    rom[-16:-12] = b"\xfa\xf4\xeb\xfd"  # cli; hlt; and back to hlt, if an NMI came
    return bytes(rom)


def _folder(memory: int) -> Path | None:
    """Return where the file goes: to memory if it has room there, so that no disk takes part."""
    if _TMPFS.is_dir() and shutil.disk_usage(_TMPFS).free > memory:
        return _TMPFS
    return None


def _write_random(path: Path, size: int) -> None:
    rng = np.random.default_rng(1)
    with path.open("wb") as file:
        for start in range(0, size, 64 << 20):
            file.write(rng.bytes(min(64 << 20, size - start)))


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


# --- the command -------------------------------------------------------------------------------------------


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line's `memory`, in bytes, `runs` and `json`; wrong usage is SystemExit, status 2."""
    parser = argparse.ArgumentParser(
        description="Migrate 2 GiB with QEMU and with hwdbm, in turn, and print how long ours takes beside QEMU's."
    )
    parser.add_argument("--memory", type=_memory, default="2G", metavar="SIZE", help="of the guest; by default 2G")
    parser.add_argument("--runs", type=_runs, default=3, metavar="N", help="migrations of each; by default 3")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args(given)


def _memory(text: str) -> int:
    try:
        size = parse.size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if not size or size % _BLOCK:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of blocks of 2M, one or more")
    return size


def _runs(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of runs, one or more")
    return int(text)


def main(given: Sequence[str] | None = None) -> int:
    """Compare, print, and return the exit status: 0, or 1 where there is nothing to compare."""
    options = arguments(given)
    try:
        done = compare(options.memory, options.runs)
    except (ComparisonError, OSError) as error:
        _say(f"qemu_migration: {error}")
        return 1
    sys.stdout.write((json.dumps(done.to_dict(), indent=2) if options.json else done.to_text()) + "\n")
    return 0


def _exit(number: int, _frame: FrameType | None) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _exit)  # as an exception: what was started, and the files, go with it
    sys.exit(main())
