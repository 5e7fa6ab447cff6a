"""A QEMU that a migration leaves or arrives at, asked over QMP; none outlives the harness that started it."""

import contextlib
import ctypes
import json
import mmap
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

PAGE = 4096
_PDEATHSIG = 1  # of prctl: the signal that a process gets when its parent ends
_libc = ctypes.CDLL(None, use_errno=True)


class QmpError(Exception):
    """QEMU refused a command, or is gone."""


class Qmp:
    """The monitor of one QEMU, over a Unix socket. Events are kept, each with the moment that it bears."""

    def __init__(self, path: Path, process: subprocess.Popen[bytes], timeout: float = 20) -> None:
        until = time.monotonic() + timeout
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(timeout)
        while True:
            try:
                self._socket.connect(str(path))
                break
            except (FileNotFoundError, ConnectionRefusedError):
                if process.poll() is not None or time.monotonic() > until:
                    self._socket.close()
                    raise QmpError(f"QEMU doesn't answer at {path} (status {process.poll()})") from None
                time.sleep(0.01)
        self._lines = self._socket.makefile("rb")
        self.events: list[dict[str, Any]] = []
        self._read()
        self.ask("qmp_capabilities")

    def _read(self) -> dict[str, Any]:
        line = self._lines.readline()
        if not line:
            raise QmpError("QEMU is gone")
        found: dict[str, Any] = json.loads(line)
        return found

    def ask(self, command: str, **arguments: object) -> Any:
        what = {"execute": command, "arguments": {key.replace("_", "-"): value for key, value in arguments.items()}}
        try:
            self._socket.sendall(json.dumps(what).encode() + b"\n")
        except OSError as error:
            raise QmpError(f"QEMU is gone: {error}") from None
        while True:
            answer = self._read()
            if "event" in answer:
                self.events.append(answer)
            elif "error" in answer:
                raise QmpError(f"{command}: {answer['error']['desc']}")
            else:
                return answer["return"]

    def moment(self, event: str) -> float | None:
        """Return the last moment of an event in seconds, once a command was asked since."""
        for one in reversed(self.events):
            if one["event"] == event:
                return one["timestamp"]["seconds"] + one["timestamp"]["microseconds"] / 1e6
        return None

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


@dataclass(frozen=True)
class Machine:
    """What both sides have in common."""

    memory: int
    kernel: Path
    append: str
    initrd: Path | None = None
    accel: str = "tcg"
    prealloc: bool = True
    """Whether all memory is there before the guest runs, so that nothing waits for it later."""

    prefix: tuple[str, ...] = ()
    """Before the command, so that it runs somewhere: ``ip netns exec NAME``."""

    def command(self, ram: Path, monitor: Path, serial: Path, incoming: bool) -> list[str]:
        onoff = "on" if self.prealloc else "off"
        backing = f"memory-backend-file,id=ram,size={self.memory},mem-path={ram},share=on,prealloc={onoff}"
        return [
            *(
                *self.prefix,
                "qemu-system-x86_64",
                "-accel",
                self.accel,
                "-cpu",
                "max" if self.accel == "tcg" else "host",
            ),
            *("-machine", "pc,memory-backend=ram", "-m", f"{self.memory >> 20}M", "-object", backing),
            *(
                "-nodefaults",
                "-vga",
                "none",
                "-display",
                "none",
                "-serial",
                f"file:{serial}",
                "-no-user-config",
                "-no-reboot",
            ),
            *("-qmp", f"unix:{monitor},server=on,wait=off"),
            *("-kernel", str(self.kernel), "-append", self.append),
            *(() if self.initrd is None else ("-initrd", str(self.initrd))),
            *(("-incoming", "defer") if incoming else ()),
        ]


class Side:
    """One QEMU, and the file that its guest's memory is in."""

    def __init__(self, machine: Machine, folder: Path, name: str, *, incoming: bool) -> None:
        self.machine, self.ram = machine, folder / f"{name}.ram"
        self.serial, self._log = folder / f"{name}.serial", folder / f"{name}.log"
        parent = os.getpid()

        def with_parent() -> None:
            _libc.prctl(_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)
            with contextlib.suppress(OSError):  # so that what else runs here disturbs less; root alone may
                os.setpriority(os.PRIO_PROCESS, 0, -15)

        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                machine.command(self.ram, folder / f"{name}.qmp", self.serial, incoming),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=with_parent,  # noqa: PLW1509 - this program has one thread
            )
        try:
            self.qmp = Qmp(folder / f"{name}.qmp", self.process)
        except BaseException as error:
            self._end()
            text = self._log.read_text(errors="replace").strip()
            raise QmpError(f"{error}: {text[-500:]}") from error

    def memory(self) -> np.ndarray:
        """Return a view of the guest's memory, words of 64 bits by page, read-only."""
        with self.ram.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        return np.frombuffer(mapped, dtype=np.uint64).reshape(-1, PAGE // 8)

    def _end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.ram.unlink(missing_ok=True)

    def close(self) -> None:
        self.qmp.close()
        self._end()


@dataclass
class Run:
    """What happened. Times are in ms, sizes in bytes."""

    status: str = "active"
    total_time: float | None = None
    downtime: float | None = None
    stopped: float | None = None
    """From the source's STOP to the destination's RESUME, by the events' own clocks."""

    setup_time: float | None = None
    transferred: int = 0
    syncs: int = 0
    normal: int = 0
    duplicate: int = 0
    samples: list[dict[str, Any]] = field(default_factory=list)


def _sample(qmp: Qmp, begun: float) -> dict[str, Any]:
    found: dict[str, Any] = qmp.ask("query-migrate")
    return {"time": round((time.monotonic() - begun) * 1e3, 1), **found}


def migrate(
    source: Side,
    destination: Side,
    *,
    bandwidth: int,
    downtime_limit: int,
    timeout: float,
    flat: int = 25,
    interval: float = 0.1,
) -> Run:
    """Migrate, and say what happened: status `completed`, or `flat` or `timeout`, and then the source runs on.

    Parameters
    ----------
    bandwidth : int
        Bytes a second, QEMU's ``max-bandwidth``.
    downtime_limit : int
        In ms.
    timeout : float
        Seconds after which it is cancelled.
    flat : int
        Syncs after which it is cancelled.
    interval : float
        Seconds between two samples.
    """
    destination.qmp.ask("migrate-incoming", uri="tcp:127.0.0.1:0")
    (address,) = destination.qmp.ask("query-migrate")["socket-address"]
    source.qmp.ask("migrate-set-parameters", max_bandwidth=bandwidth, downtime_limit=downtime_limit)
    source.qmp.events.clear()
    destination.qmp.events.clear()
    run, begun = Run(), time.monotonic()
    source.qmp.ask("migrate", uri=f"tcp:127.0.0.1:{address['port']}")
    while True:
        sample = _sample(source.qmp, begun)
        run.samples.append(sample)
        run.status = sample.get("status", "none")
        if run.status in ("completed", "failed"):
            break
        over = "timeout" if time.monotonic() - begun > timeout else ""
        if sample.get("ram", {}).get("dirty-sync-count", 0) > flat:
            over = "flat"
        if over:
            source.qmp.ask("migrate_cancel")
            while (status := source.qmp.ask("query-migrate")["status"]) in ("cancelling", "active", "device"):
                time.sleep(0.01)
            # It may have come through at the last moment.
            run.status = status if status in ("completed", "failed") else over
            if run.status == "completed":
                run.samples.append(_sample(source.qmp, begun))
            break
        time.sleep(max(begun + len(run.samples) * interval - time.monotonic(), 0.005))
    while run.status == "completed" and not run.samples[-1].get("total-time"):  # it is completed, and not yet counted
        time.sleep(0.01)
        run.samples[-1] = _sample(source.qmp, begun)
    last = run.samples[-1]
    if run.status == "failed":
        raise QmpError(f"the migration failed: {last.get('error-desc', 'QEMU does not say why')}")
    ram = last.get("ram", {})
    run.transferred, run.syncs = ram.get("transferred", 0), ram.get("dirty-sync-count", 0)
    run.normal, run.duplicate = ram.get("normal", 0), ram.get("duplicate", 0)
    run.total_time, run.setup_time = last.get("total-time"), last.get("setup-time")
    if run.status == "completed":
        run.downtime = last["downtime"]
        until = time.monotonic() + 10
        while not destination.qmp.ask("query-status")["running"] and time.monotonic() < until:
            time.sleep(0.005)
        stop, resume = source.qmp.moment("STOP"), destination.qmp.moment("RESUME")
        run.stopped = None if stop is None or resume is None else round((resume - stop) * 1e3, 3)
    return run


class Pair:
    """A guest that moves from one QEMU to the next, each time that it is asked to."""

    def __init__(self, machine: Machine, folder: Path) -> None:
        self.machine, self._folder, self._count = machine, folder, 0
        self._stack = ExitStack()
        self.side = self._new(incoming=False)

    def _new(self, *, incoming: bool) -> Side:
        self._count += 1
        return Side(self.machine, self._folder, f"vm{self._count}", incoming=incoming)

    def migrate(self, **asked: Any) -> Run:
        other = self._new(incoming=True)
        try:
            run = migrate(self.side, other, **asked)
        except BaseException:
            other.close()
            raise
        if run.status == "completed":
            self.side, other = other, self.side
        other.close()
        return run

    def close(self) -> None:
        self.side.close()


@contextmanager
def guest(machine: Machine, folder: Path) -> Iterator[Pair]:
    pair = Pair(machine, folder)
    with contextlib.closing(pair):
        yield pair
