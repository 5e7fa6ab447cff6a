"""``hwdbm migrate``: a running machine to another process, proved by digest."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated

import typer

from hwdbm import kernels
from hwdbm.cli import options, parse
from hwdbm.cli.guest import Endpoint, Insecure, Mode, Thp, TlsFolder, build, endpoint, workload_for
from hwdbm.cli.interrupt import INTERRUPTED, as_event
from hwdbm.cli.kvm import KvmLog, KvmLogOption, Vm, build_kvm
from hwdbm.cli.live import display, megabytes
from hwdbm.cli.output import columns
from hwdbm.cli.streams import note, result
from hwdbm.kvm import KvmVm
from hwdbm.machine import Machine
from hwdbm.migration import Channel, DigestError, Precopy, Report, Settings, StreamError, transport
from hwdbm.process import child, python

__all__ = ["EPILOG", "migrate"]

_MISMATCH = 3  # the exit status
_START = 30.0  # seconds that the receiver has to come up
_SWITCH = 2e-4  # seconds: the vCPUs and the sender are threads of one interpreter, and each waits for the other

EPILOG = """Examples:

\b
  A guest of 1 GiB that keeps writing, to another process on this machine:
    hwdbm migrate

\b
  The same with 2M blocks, slow enough to watch, and a picture of it:
    hwdbm migrate --thp --bandwidth 200M --report migration.png

\b
  A real guest on /dev/kvm, which counts in its memory, and is checked where it arrives:
    hwdbm migrate --source kvm

\b
  To a receiver that is elsewhere, with certificates on both sides:
    hwdbm migrate --to destination.example:4444 --tls-dir certificates
"""


def migrate(
    source: Annotated[Vm, typer.Option(help="A modelled machine, or a real guest on /dev/kvm.")] = Vm.MACHINE,
    to: Annotated[
        Endpoint | None,
        typer.Option(
            "--to",
            parser=options.parser(endpoint),
            metavar="HOST:PORT",
            help="Where 'hwdbm receive' listens. By default one is started, on a Unix socket of its own.",
        ),
    ] = None,
    memory: Annotated[
        int, typer.Option(parser=options.parser(parse.size), metavar="SIZE", help="The guest's memory; 1G by default.")
    ] = "1G",  # type: ignore[assignment]  # typer parses it
    memory_image: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What the memory holds at first. By default it is filled.")
    ] = None,
    filled: Annotated[
        int, typer.Option(min=0, max=100, help="Percent of the memory that hold random data at first.")
    ] = 75,
    thp: Thp = False,
    mode: Annotated[Mode, typer.Option(help="How the log learns of writes.")] = Mode.HW_DBM,
    workload: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[,OPTION=NUMBER]...",
            help="What the guest does meanwhile: sequential, uniform, hot, zipf, bursty, idle; by default "
            "hot,share=0.02. With KVM: counting (the default), random, idle.",
        ),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(min=0, help="Stores a second; by default 200000. With KVM pages, by default 50000; 0: no limit."),
    ] = None,
    replay: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Write what was recorded: the dirty bitmaps (KVM's layout) in a folder, by name, one an interval.",
        ),
    ] = None,
    interval: Annotated[
        float, typer.Option(min=1e-3, metavar="SECONDS", help="Between two bitmaps of --replay.")
    ] = 0.1,
    kvm_log: KvmLogOption = KvmLog.BITMAP,
    seed: Annotated[int, typer.Option(help="Of the memory and the workload.")] = 0,
    bandwidth: Annotated[
        int | None,
        typer.Option(parser=options.parser(parse.size), metavar="SIZE", help="Bytes a second at most."),
    ] = None,
    max_downtime: Annotated[
        float, typer.Option(min=0, metavar="MS", help="How long the last pass may take, in milliseconds.")
    ] = 300,
    max_iterations: Annotated[int, typer.Option(min=1, help="Passes before the guest is paused anyway.")] = 30,
    auto_converge: Annotated[
        bool, typer.Option("--auto-converge", help="Slow the guest down where it writes more than is sent.")
    ] = False,
    verify: Annotated[
        bool,
        typer.Option("--verify/--no-verify", help="Compare the SHA-256 of all memory before the destination runs."),
    ] = True,
    tls_dir: TlsFolder = None,
    insecure: Insecure = False,
    attempts: Annotated[int, typer.Option(min=1, help="Try so often; a failure leaves the guest running.")] = 1,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE.png|.html", help="Draw what happened. Needs the extra 'plot'.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Migrate a VM that keeps writing, live, to another process.

    Both sides compare the SHA-256 of all memory before the destination runs. Exit status 3 if it differs; then,
    as after any failure, the source goes on, with every dirty bit put back. A real guest is checked once more when
    it has run on at the destination.
    """
    _check(report, to, tls_dir, insecure=insecure)
    if replay is not None and (workload is not None or source is Vm.KVM):
        raise typer.BadParameter("--replay is what the modelled machine writes, in place of a --workload")
    settings = Settings(max_downtime / 1e3, max_iterations, bandwidth, auto_converge, verify)
    vm: Machine | KvmVm
    if source is Vm.KVM:
        receiver = ["--memory", str(memory), "--vm", "kvm", "--kvm-log", kvm_log.value]
        vm = build_kvm(memory, log=kvm_log, workload=workload, rate=rate, seed=seed, image=memory_image, percent=filled)
    else:
        receiver = ["--memory", str(memory), "--mode", mode.value, "--thp" if thp else "--no-thp"]
        vm = build(memory, mode=mode, thp=thp, seed=seed, image=memory_image, percent=filled)
        workload_for(vm, workload, seed=seed, rate=rate, replay=replay, interval=interval)
    kernels.warm_up()
    with vm, _switching_often(), as_event() as cancel:
        vm.resume()

        def attempt(tell: Callable[[Report], None]) -> Precopy:
            with _connected(to, tls_dir, receiver, insecure=insecure) as channel:
                precopy = Precopy(vm, channel, settings, cancel=cancel, on_progress=tell)
                _run(precopy)
                return precopy

        done = _attempts(attempts, attempt, cancel)
        _say(done, report, as_json=as_json)
        if done.failure is not None:
            status = _MISMATCH if isinstance(done.failure, DigestError) else 1
            raise typer.Exit(INTERRUPTED if cancel.is_set() else status)


def _check(report: Path | None, to: Endpoint | None, tls_dir: Path | None, *, insecure: bool) -> None:
    if report is not None and report.suffix not in {".png", ".html"}:
        raise typer.BadParameter(f"--report {report}: .png or .html")
    if to is None and (tls_dir is not None or insecure):
        raise typer.BadParameter("--tls-dir and --insecure go with --to HOST:PORT")


def _run(precopy: Precopy) -> None:
    """Run an attempt; that it failed, its report says."""
    try:
        precopy.run()
    except OSError as error:
        precopy.failure = error


def _attempts(
    attempts: int, attempt: Callable[[Callable[[Report], None]], Precopy], cancel: threading.Event
) -> Precopy:
    for left in reversed(range(attempts)):
        with display() as tell:
            done = attempt(tell)
        if done.failure is None or cancel.is_set() or not left:
            return done
        note(f"{done.failure}; trying again")
    raise AssertionError("there is one attempt or more")


def _say(done: Precopy, picture: Path | None, *, as_json: bool) -> None:
    if picture is not None and done.report.passes:
        from hwdbm.cli.passes import draw  # noqa: PLC0415  # matplotlib is an extra of its own

        draw(picture, done.report)
    text = json.dumps(done.report.to_dict(), indent=2) if as_json else _text(done.report)
    result(text, done="the migration completed" if done.failure is None else "the migration failed")
    if done.report.guest_resumed is False:
        note(done.report.error)
        raise typer.Exit(1)
    if done.failure is not None:
        note(" ".join((str(done.failure), *getattr(done.failure, "__notes__", ()))))


def _text(report: Report) -> str:
    rows: list[tuple[object, ...]] = [("pass", "dirty", "sent", "zero pages", "time", "bandwidth", "expected downtime")]
    for one in report.passes:
        expected = "" if one.expected_downtime is None else f"{one.expected_downtime * 1e3:,.1f} ms"
        rows.append(
            (
                one.number,
                megabytes(one.remaining),
                megabytes(one.transferred),
                f"{one.duplicate:,}",
                f"{one.time * 1e3:,.1f} ms",
                f"{one.bandwidth / (1 << 20):,.1f} MiB/s",
                expected,
            )
        )
    lines = [columns(rows), "", f"{report.status} in {report.total_time:.2f} s"]
    if report.downtime is not None:
        lines[-1] += f", downtime {report.downtime * 1e3:.1f} ms of {report.limit * 1e3:g} ms"
    if report.verify_time is not None:
        lines[-1] += f" (and {report.verify_time * 1e3:.0f} ms for the digests)"
    if report.guest_resumed:
        lines += ["the guest runs at the destination, and its memory is right there"]
    if report.source_sha256:
        lines += [f"source       sha256 {report.source_sha256}"]
        lines += [f"destination  sha256 {report.destination_sha256}"]
    return "\n".join(lines)


# --- the other side ----------------------------------------------------------------------------------------


@contextmanager
def _connected(to: Endpoint | None, tls_dir: Path | None, options: list[str], *, insecure: bool) -> Iterator[Channel]:
    with ExitStack() as stack:
        if to is not None:
            tls = None if tls_dir is None else transport.TlsDir(tls_dir)
            yield stack.enter_context(transport.connect_tcp(to.host, to.port, tls, insecure=insecure))
            return
        path = stack.enter_context(transport.private_socket())
        command = python("-m", "hwdbm", "receive", "--unix", str(path), "--json", *options)
        receiver = stack.enter_context(
            child(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        )
        yield stack.enter_context(_connect(receiver, path))


def _connect(receiver: subprocess.Popen[bytes], path: Path) -> Channel:
    until = time.monotonic() + _START
    while True:
        try:
            return transport.connect_unix(path)
        except (FileNotFoundError, ConnectionRefusedError) as error:
            if receiver.poll() is not None:
                said = receiver.stderr.read().decode(errors="replace") if receiver.stderr else ""
                raise StreamError(f"the receiver didn't come up: {said.strip()}") from error
            if time.monotonic() > until:
                raise StreamError(f"the receiver didn't come up in {_START:g} s") from error
            time.sleep(0.02)


@contextmanager
def _switching_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
