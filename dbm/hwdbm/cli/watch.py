"""``hwdbm watch``: a QEMU that migrates, watched by its monitor, and where that will end."""

import json
import select
import socket
import textwrap
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from errno import EIO, ENOENT
from pathlib import Path
from typing import Annotated, Any, Self

import typer

from hwdbm import forecast as forecasts
from hwdbm.cli import options, parse
from hwdbm.cli.interrupt import as_event
from hwdbm.cli.output import leave
from hwdbm.cli.streams import json_text, note, result, width
from hwdbm.errors import shown
from hwdbm.forecast import Estimate, Forecast, Sample
from hwdbm.migration.report import mib

_LINE = 1 << 20  # bytes of a line of QMP
_PATIENCE = 10.0  # seconds for an answer
_TURN = 0.1  # seconds after which a wait looks for an interrupt
_SHOWN = 200  # letters of what a monitor says, in a message
_PASSES = 512  # whose samples are kept
_END = 1e15  # no time or limit of QEMU reaches it, in ms
_ENDED = {"completed", "failed", "cancelled"}
_READS = ("qmp_capabilities", "query-migrate", "query-migrate-parameters")  # all that is ever asked

EPILOG = """Sizes are in MiB (1024 * 1024 bytes), rates in MiB/s, times in ms; in JSON bytes, bytes a second and ms.

Examples:

  A QEMU with a monitor of its own for this; no migration of it begins:

\b
    qemu-system-x86_64 -S -m 64 -display none -daemonize -pidfile qemu.pid
        -qmp unix:qmp.sock,server=on,wait=off
    hwdbm watch --qmp qmp.sock --wait 1   # exit status 1
    kill $(cat qemu.pid)
"""


def watch(
    qmp: Annotated[
        Path,
        typer.Option(
            "--qmp",
            parser=options.parser(parse.path),
            metavar="SOCKET",
            help="The Unix socket of a QMP monitor. It has one client at a time: give QEMU one more with -qmp.",
        ),
    ],
    max_downtime: Annotated[
        float | None,
        typer.Option(
            parser=options.parser(parse.number),
            metavar="MS",
            help="How long the guest may stand still; by default QEMU's downtime-limit.",
        ),
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(
            parser=options.parser(parse.number),
            metavar="SECONDS",
            help="How long the migration may take, for the forecast. No limit by default.",
        ),
    ] = None,
    last_bandwidth: Annotated[
        int | None,
        typer.Option(
            parser=options.parser(parse.size),
            metavar="SIZE",
            help="Bytes a second while the guest stands still: QEMU lifts its max-bandwidth then.",
        ),
    ] = None,
    interval: Annotated[
        float,
        typer.Option(parser=options.parser(parse.number), metavar="SECONDS", help="Time between two looks."),
    ] = 0.2,
    wait: Annotated[
        float,
        typer.Option(
            parser=options.parser(parse.number), metavar="SECONDS", help="How long to wait for a migration to begin."
        ),
    ] = 60.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON object a line, and nothing else on stdout.")
    ] = False,
) -> None:
    """Watch a QEMU that migrates, and renew the forecast at each pass.

    It only reads what QEMU knows anyway ('query-migrate', and the limit). It never measures, and never starts QEMU's
    calc-dirty-rate, which costs the guest and fails beside a migration. Exit status 0 when the migration completed.
    """
    if interval == 0 or last_bandwidth == 0:
        raise typer.BadParameter("--interval and --last-bandwidth are more than 0")
    terms = forecasts.QEMU
    if last_bandwidth is not None:
        terms = replace(terms, last_bandwidth=float(last_bandwidth))
    with as_event() as cancel, _Monitor(qmp, cancel) as monitor:
        limit = monitor.limit() if max_downtime is None else max_downtime / 1e3
        watched = _Watched(limit, {"max_downtime": limit, "timeout": timeout, "terms": terms}, as_json=as_json)
        until = time.monotonic() + wait
        while not cancel.is_set():
            answer = monitor.ask("query-migrate")
            try:
                ended = watched.see(answer)
            except forecasts.SampleError as error:
                raise forecasts.SampleError(f"{qmp}: query-migrate: {error}") from None
            if ended:
                if answer["status"] != "completed":
                    why = str(answer.get("error-desc", "no reason is given"))[:_SHOWN]
                    note(f"the migration {answer['status']}: {why}")
                    raise typer.Exit(1)
                return
            if not watched.samples and time.monotonic() > until:
                raise OSError(EIO, f"no migration began within {wait:g} s", str(qmp))
            cancel.wait(interval)
    leave()


class _Monitor:
    """A QMP monitor, asked for what it knows."""

    def __init__(self, path: Path, cancel: threading.Event) -> None:
        self._path, self._cancel, self._rest = path, cancel, b""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(_PATIENCE)

    def __enter__(self) -> Self:
        try:
            self._connect()
        except BaseException:
            self._socket.close()
            raise
        return self

    def _connect(self) -> None:
        try:
            self._socket.connect(str(self._path))
        except ConnectionRefusedError:
            raise self._wrong("nobody listens at it: it is no monitor of a QEMU that runs") from None
        except FileNotFoundError:
            made = "QEMU makes it if it is started with -qmp unix:PATH,server=on,wait=off"
            raise OSError(ENOENT, f"No such socket: {made}", str(self._path)) from None
        except OSError as error:
            raise OSError(error.errno or EIO, error.strerror or str(error), str(self._path)) from error
        if "QMP" not in self._next("it says nothing: has it another client?"):
            raise self._wrong("it doesn't greet as a QMP monitor does")
        self.ask("qmp_capabilities")

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def ask(self, command: str) -> dict[str, Any]:
        """Return the answer to a command that only reads."""
        assert command in _READS  # noqa: S101 - whoever watches changes nothing
        try:
            self._socket.sendall(json.dumps({"execute": command}).encode() + b"\r\n")
        except OSError:
            raise self._closed() from None
        until = time.monotonic() + _PATIENCE
        silent = f"no answer to {command} within {_PATIENCE:g} s"
        while time.monotonic() < until:  # events come in between
            said = self._next(silent, until)
            if isinstance(said.get("return"), dict):
                answer: dict[str, Any] = said["return"]
                return answer
            if "error" in said:
                raise self._wrong(f"{command}: {str(said['error'])[:_SHOWN]}")
        raise self._wrong(silent)

    def limit(self) -> float:
        """Return QEMU's limit of the downtime, in seconds."""
        limit = self.ask("query-migrate-parameters").get("downtime-limit", 300)
        if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 <= limit < _END:
            raise self._wrong(f"its downtime-limit is a number of 0 or more, not {str(limit)[:_SHOWN]}")
        return limit / 1e3

    def _next(self, silent: str, until: float | None = None) -> dict[str, Any]:
        """Return the next object; where there is none in time, raise an error that says `silent`."""
        until = time.monotonic() + _PATIENCE if until is None else until
        while b"\n" not in self._rest:
            if len(self._rest) > _LINE:
                raise self._wrong(f"a line of it has more than {_LINE} bytes")
            self._rest += self._receive(silent, until)
        line, _, self._rest = self._rest.partition(b"\n")
        try:
            said = json.loads(line)
        except (ValueError, RecursionError):
            said = None
        if not isinstance(said, dict):
            raise self._wrong(f"{shown(line)} is no JSON object")
        return said

    def _receive(self, silent: str, until: float) -> bytes:
        while time.monotonic() < until:
            if self._cancel.is_set():
                leave()
            if select.select([self._socket], [], [], _TURN)[0]:
                try:
                    part = self._socket.recv(1 << 16)
                except OSError:
                    part = b""
                if not part:
                    raise self._closed()
                return part
        raise self._wrong(silent)

    def _closed(self) -> OSError:
        return self._wrong("QEMU closed its monitor")

    def _wrong(self, what: str) -> OSError:
        return OSError(EIO, what, str(self._path))


class _Watched:
    """What was seen of a migration; two samples a pass are kept."""

    def __init__(self, limit: float, how: dict[str, Any], *, as_json: bool) -> None:
        self.samples: list[Sample] = []
        self._limit, self._how, self._as_json = limit, how, as_json
        self._told = 0  # the pass of the last forecast
        self._said: Forecast | None = None

    def see(self, answer: dict[str, Any]) -> bool:
        """Take note of an answer to query-migrate, and return whether the migration that was seen has ended."""
        status = answer.get("status", "none")
        if not isinstance(status, str):
            raise forecasts.SampleError(f"status is a text, not {str(status)[:_SHOWN]}")
        if status in _ENDED:
            if not self.samples and status != "completed":
                return False  # an older one
            self._end(answer)
            return True
        ram = answer.get("ram")
        if ram is None or "total-time" not in answer or (isinstance(ram, dict) and not ram.get("total")):
            return False
        (sample,) = forecasts.read_samples([json.dumps(answer)])
        if self.samples and (sample.time < self.samples[-1].time or sample.iteration < self.samples[-1].iteration):
            self.samples, self._told = [], 0  # another one began
        if len(self.samples) > 1 and self.samples[-2].iteration == sample.iteration:
            self.samples.pop()
        self.samples.append(sample)
        del self.samples[: -2 * _PASSES]
        if sample.iteration > 1 and sample.iteration != self._told:
            self._told = sample.iteration
            self._foresee(sample)
        return False

    def _foresee(self, sample: Sample) -> None:
        try:
            found = self._said = forecasts.from_samples(self.samples, **self._how)
        except forecasts.SampleError:
            return  # they say too little
        if self._as_json:
            result(json_text({
                "pass": sample.iteration, "time": round(sample.time * 1e3), "remaining": round(sample.remaining),
                "forecast": found.to_dict(),
            }, indent=None))  # fmt: skip
            return
        total, down = _span(found.total_time, 1, 1), _span(found.downtime, 1e3, 0)
        said = f"{total} s in all, downtime {down} ms" if found.converges else "it doesn't converge"
        result(f"pass {sample.iteration} after {sample.time:.1f} s, {mib(sample.remaining)} MiB left: {said}")

    def _end(self, answer: dict[str, Any]) -> None:
        known: Iterator[tuple[str, Any]] = ((key, answer.get(key)) for key in ("total-time", "downtime"))
        times = {key: at for key, at in known if type(at) in (int, float) and 0 <= at < _END}
        if self._as_json:
            result(json_text({"status": answer["status"]} | times, indent=None))
            return
        if self._said is not None and not self._said.converges:
            result("\n".join(textwrap.wrap(self._said.why, min(width() - 1, 100))))
        told = ", ".join(f"{key} {value:,} ms" for key, value in times.items())
        result(f"{answer['status']}{': ' if told else ''}{told}")


def _span(each: Estimate, scale: float, digits: int) -> str:
    return f"{each.value * scale:,.{digits}f} ({each.low * scale:,.{digits}f} to {each.high * scale:,.{digits}f})"
