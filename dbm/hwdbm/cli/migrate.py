"""``hwdbm migrate``: a running VM to another process, proved by digest."""

import os
import select
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from errno import ENOENT
from functools import partial
from math import inf
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from hwdbm import kernels
from hwdbm import report as reports
from hwdbm.arm import ArmVm
from hwdbm.cli import guest, options, pages, parse
from hwdbm.cli.guest import (
    Endpoint,
    Insecure,
    KvmLog,
    KvmLogOption,
    Mode,
    ModeOption,
    OnLimit,
    SeedOption,
    Thp,
    TlsFolder,
    Vm,
)
from hwdbm.cli.interrupt import INTERRUPTED, as_event, elsewhere, shown
from hwdbm.cli.output import busy, columns, leave, milliseconds, warn
from hwdbm.cli.streams import json_text, note, result, width
from hwdbm.files import NewFile, open_regular
from hwdbm.forecast import RULES, Estimate
from hwdbm.image.raw import HEAD, check_raw
from hwdbm.kvm import KvmVm
from hwdbm.machine import Machine
from hwdbm.migration import Channel, DigestError, HandoverError, Pass, Precopy, Report, Settings, StreamError, transport
from hwdbm.migration.report import mebibytes, mib
from hwdbm.process import child, python
from hwdbm.trace import record as record_vm
from hwdbm.trace.group import check_free

_MISMATCH = 3  # the exit status
_START = 300.0  # seconds that the receiver has to come up: it may compile kernels, on a machine that is busy
_PASSES = 12  # that are shown, the last ones
_NOW_AND_THEN = 10.0  # seconds between two lines where there is no terminal
_INTERVAL = 0.1  # seconds of an interval of the trace
_REPLAYED = 0.1  # and of the bitmaps that a guest writes by
_HOLD = 30.0  # seconds that a guest is held where there is no terminal

EPILOG = """Sizes are in MiB (1024 * 1024 bytes), rates in MiB/s, times in ms; in JSON bytes, bytes a second and ms.

Examples:

  A guest of 1 GiB that keeps writing, to another process on this machine:

\b
    hwdbm migrate

  Slow enough to watch, and a report with pictures of it:

\b
    hwdbm migrate --memory 256M --rate 5000 --bandwidth 100M
        --report migration.html

  A real guest on /dev/kvm, which counts in its memory, and is checked where it arrives:

\b
    hwdbm migrate --source kvm --memory 256M

  An emulated Arm machine, whose stage-2 tables are tracked in its RAM while it runs:

\b
    hwdbm migrate --source arm --memory 128M

  A trace of what the guest writes meanwhile, and what it says:

\b
    hwdbm migrate --memory 64M --record guest.trace
    hwdbm trace show guest.trace

  Over TLS; here the receiver is in another terminal (docs: howto/migrate-tls):

\b
    sh docs/examples/make_certificates.sh localhost
    hwdbm receive --listen localhost:4444 --tls-dir certificates
    hwdbm migrate --to localhost:4444 --tls-dir certificates --memory 64M
"""


def _bandwidth(text: str) -> int:
    value = parse.size(text)
    if not value:
        raise ValueError("a bandwidth is more than 0 bytes a second")
    return value


def _rule(text: str) -> str:
    if text not in RULES:
        raise ValueError(f"{text!r} is no rule: there are {', '.join(RULES)}")
    return text


def migrate(
    source: Annotated[
        Vm,
        typer.Option(
            parser=options.parser(parse.choice(Vm)),
            metavar="machine|kvm|arm",
            help="A modelled machine, a real guest on /dev/kvm, or an emulated Arm machine, tracked in its own tables.",
        ),
    ] = Vm.MACHINE,
    to: Annotated[
        Endpoint | None,
        typer.Option(
            "--to",
            parser=options.parser(guest.place),
            metavar="HOST:PORT|unix:PATH",
            help="Where 'hwdbm receive' listens. By default one is started, on a Unix socket of its own.",
        ),
    ] = None,
    memory: Annotated[
        int, typer.Option(parser=options.parser(guest.memory_size), metavar="SIZE", help="The guest's memory.")
    ] = "1G",  # type: ignore[assignment]  # typer parses it
    memory_image: Annotated[
        Path | None,
        typer.Option(
            parser=options.parser(parse.path),
            metavar="FILE",
            help="Load the memory from FILE. By default it is filled with random data (--filled).",
        ),
    ] = None,
    filled: Annotated[
        int | None,
        typer.Option(
            parser=options.parser(parse.whole(0, 100)),
            metavar="PERCENT",
            help="How much of the memory holds random data at first; 75 by default.",
        ),
    ] = None,
    thp: Thp = None,
    mode: ModeOption = None,
    workload: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[,OPTION=NUMBER]...",
            autocompletion=options.words(guest.WORKLOADS),
            help="What the guest does meanwhile: sequential, uniform, hot, zipf, bursty, idle; by default "
            "hot,share=0.02. With KVM: counting (the default), random, idle. With Arm, for each vCPU: sequential, "
            "random, window (the default), atomics, pairs, zero, stage1, idle; or mixed.",
        ),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(
            parser=options.parser(parse.number),
            metavar="NUMBER",
            help="Stores a second; by default 200000. With KVM pages a second, by default 50000, "
            "with Arm stores, by default 20000; 0: no limit.",
        ),
    ] = None,
    replay: Annotated[
        Path | None,
        typer.Option(
            parser=options.parser(parse.path),
            metavar="DIR",
            help="Read dirty bitmaps that were recorded, in KVM's layout, from a folder, in the order of their names: "
            "in each interval the guest writes the pages of one, in place of a workload.",
        ),
    ] = None,
    interval: Annotated[
        float | None,
        typer.Option(
            parser=options.parser(parse.number),
            metavar="SECONDS",
            help="How long each bitmap of --replay stands for; 0.1 by default.",
        ),
    ] = None,
    kvm_log: KvmLogOption = None,
    seed: SeedOption = 0,
    bandwidth: Annotated[
        int | None,
        typer.Option(
            parser=options.parser(_bandwidth),
            metavar="SIZE",
            help="Bytes a second at most, as in 200M. No limit by default.",
        ),
    ] = None,
    max_downtime: Annotated[
        float,
        typer.Option(parser=options.parser(parse.number), metavar="MS", help="How long the guest may stand still."),
    ] = 300,
    max_iterations: Annotated[
        int | None,
        typer.Option(
            parser=options.parser(parse.whole(1)),
            metavar="NUMBER",
            help="Passes in a row without progress, after which --on-limit decides; 30 by default.",
        ),
    ] = None,
    on_limit: Annotated[
        OnLimit,
        typer.Option(
            parser=options.parser(parse.choice(OnLimit)),
            metavar="abort|wait|pause",
            help="If the rest doesn't fit into --max-downtime: give up, go on until it does, or pause the guest for as "
            "long as it takes.",
        ),
    ] = OnLimit.ABORT,
    rule: Annotated[
        str | None,
        typer.Option(
            "--rule",
            parser=options.parser(_rule),
            autocompletion=options.words(RULES),
            metavar="NAME",
            help=f"The rule that says when to pause the guest and when to give up: {', '.join(RULES)}; see 'hwdbm plan "
            "--rules'.",
        ),
    ] = None,
    auto_converge: Annotated[
        bool, typer.Option("--auto-converge", help="Slow the guest down where it writes more than is sent.")
    ] = False,
    verify: Annotated[
        bool,
        typer.Option("--verify/--no-verify", help="Compare the SHA-256 of all memory before the destination runs."),
    ] = True,
    tls_dir: TlsFolder = None,
    insecure: Insecure = False,
    attempts: Annotated[
        int,
        typer.Option(
            parser=options.parser(parse.whole(1)),
            metavar="NUMBER",
            help="How many times to try. After a failure the guest goes on here.",
        ),
    ] = 1,
    hold: Annotated[
        float | None,
        typer.Option(
            parser=options.parser(parse.number),
            metavar="SECONDS",
            help="How long to keep the guest paused when nobody knows whether it runs at the destination. By default "
            "until a signal decides, or 30 s where stdin is no terminal.",
        ),
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option(
            parser=options.parser(parse.path),
            metavar="TRACE",
            help="Record which pages the guest writes meanwhile, each 100 ms, into a trace, as 'hwdbm record' does. It "
            "has a client of the log for it, so that the migration misses nothing.",
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            parser=options.parser(parse.path),
            metavar="FILE.html|.png",
            help="Report what happened: pictures, and the numbers behind them, in one HTML file without links that one "
            "can print; or the pictures alone as a PNG, which needs the extra 'plot'.",
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Migrate a VM that keeps writing, live, to another process.

    Both sides compare the SHA-256 of all memory before the destination runs. Exit status 3 if it differs; then,
    as after nearly any failure, the source goes on, with every dirty bit put back. Where the destination was told to
    run and nobody knows whether it does, the source stays paused, and the command says how to resume it. A real guest
    is checked once more when it has run on at the destination.
    """
    draw = None if report is None else _painter(report)
    if to is None:
        guest.refuse("without --to HOST:PORT", {"--tls-dir": tls_dir is not None, "--insecure": insecure})
    tls = guest.tls_of(to, tls_dir, insecure=insecure)
    guest.refuse("with --on-limit wait", {"--max-iterations": max_iterations is not None and on_limit is OnLimit.WAIT})
    guest.refuse("with --memory-image", {"--filled": filled is not None and memory_image is not None})
    guest.refuse("without --replay", {"--interval": interval is not None and replay is None})
    if rule not in {None, "ours"}:
        guest.refuse(f"with --rule {rule}", {
            "--max-iterations": max_iterations is not None, "--auto-converge": auto_converge,
            "--on-limit": on_limit is not OnLimit.ABORT,
        })  # fmt: skip
    settings = Settings(
        max_downtime / 1e3, max_iterations or 30, bandwidth, auto_converge, verify, on_limit.value, rule or "ours"
    )
    if record is not None:
        check_free(record)  # before a destination hears of it
    content = _Content(memory, memory_image, guest.FILLED if filled is None else filled, seed)
    guest.check_room(memory)
    if memory_image is not None:
        with open_regular(memory_image) as file:
            check_raw(memory_image, file.read(HEAD))
    vm: Machine | KvmVm | ArmVm
    with busy("the guest is made ready"):
        if source is Vm.ARM:
            guest.refuse("with --source arm", {"--mode": mode is not None, "--kvm-log": kvm_log is not None})
            guest.refuse("with --source arm", {"--replay": replay is not None})
            receiver = ["--memory", str(memory), "--vm", "arm", "--thp" if thp else "--no-thp"]
            vm = _emulated(content, workload, rate, blocks=bool(thp))
        elif source is Vm.KVM:
            guest.refuse("with --source kvm", {"--mode": mode is not None, "--thp": thp is not None})
            guest.refuse("with --source kvm", {"--replay": replay is not None})
            log = kvm_log or KvmLog.BITMAP
            receiver = ["--memory", str(memory), "--vm", "kvm", "--kvm-log", log.value]
            vm = _real(content, log, workload, rate)
        else:
            guest.refuse("without --source kvm", {"--kvm-log": kvm_log is not None})
            receiver = ["--memory", str(memory), "--mode", (mode or Mode.HW_DBM).value, "--thp" if thp else "--no-thp"]
            vm = _modelled(content, mode or Mode.HW_DBM, workload, rate, replay, interval, thp=bool(thp))
        kernels.warm_up()
    with vm, guest.switching_often(), as_event() as cancel:
        vm.resume()

        def attempt(tell: Callable[[Report], None]) -> Precopy:
            with _connected(to, tls, receiver, insecure=insecure, cancel=cancel) as channel:
                begin()  # not for a destination that isn't there
                precopy = Precopy(vm, channel, settings, cancel=cancel, on_progress=tell)
                _run(precopy)
                return precopy

        try:
            with _recording(vm, record) as begin:
                done = _attempts(vm, attempts, attempt, cancel, hold)
        except StreamError:
            if cancel.is_set():
                leave()
            raise
        _say(done, draw, as_json=as_json)
        if done.failure is not None:
            status = _MISMATCH if isinstance(done.failure, DigestError) else 1
            raise typer.Exit(INTERRUPTED if cancel.is_set() else status)


@dataclass(frozen=True, slots=True)
class _Content:
    """The first contents of a guest's memory."""

    memory: int
    image: Path | None
    percent: int
    seed: int


def _modelled(
    content: _Content,
    mode: Mode,
    workload: str | None,
    rate: float | None,
    replay: Path | None,
    interval: float | None,
    *,
    thp: bool,
) -> Machine:
    """Return a modelled machine that is about to run."""
    if replay is None:
        work = guest.workload_of(workload, seed=content.seed, rate=rate)
    else:
        guest.refuse("with --replay", {"--workload": workload is not None, "--rate": rate is not None})
        if interval == 0:
            raise typer.BadParameter("--interval is more than 0 s")
        npages = content.memory // guest.PAGE
        work = guest.recorded(replay, npages, _REPLAYED if interval is None else interval)
    vm = guest.build(
        content.memory, mode=mode, thp=thp, seed=content.seed, image=content.image, percent=content.percent
    )
    vm.run(work)
    return vm


def _real(content: _Content, log: KvmLog, workload: str | None, rate: float | None) -> KvmVm:
    """Return a real VM that is about to run."""
    with guest.usage():
        return guest.build_kvm(
            content.memory, log=log, workload=workload, rate=rate, seed=content.seed, image=content.image,
            percent=content.percent,
        )  # fmt: skip


def _emulated(content: _Content, workload: str | None, rate: float | None, *, blocks: bool) -> ArmVm:
    """Return an emulated Arm machine that is about to run."""
    with guest.usage():
        return guest.build_arm(
            content.memory, workload=workload, rate=rate, seed=content.seed, blocks=blocks, image=content.image,
            percent=content.percent,
        )  # fmt: skip


@contextmanager
def _recording(vm: Machine | KvmVm | ArmVm, path: Path | None) -> Iterator[Callable[[], None]]:
    """Yield what begins to record a trace of a VM in a thread, the first time that it is called.

    That it can't begin is an error, and a warning that it ends.
    """
    if path is None:
        yield lambda: None
        return
    begun, cancel, errors = threading.Event(), threading.Event(), list[BaseException]()

    def work() -> None:
        try:
            record_vm(vm, path, interval=_INTERVAL, cancel=cancel, on_interval=lambda *_: begun.set())
        except Exception as error:  # noqa: BLE001 - it is said by the thread that waits
            errors.append(error)
        finally:
            begun.set()

    thread = threading.Thread(target=work, name="hwdbm-record")

    def begin() -> None:
        if begun.is_set():
            return
        thread.start()
        begun.wait()
        if errors:
            raise errors[0]

    try:
        yield begin
    finally:
        if thread.ident is not None:
            cancel.set()
            thread.join()
    if errors:
        warn(f"the trace in {path} ends early: {errors[0]}")


def _run(precopy: Precopy) -> None:
    """Run an attempt; that it failed, its report says."""
    try:
        precopy.run()
    except OSError as error:
        precopy.failure = error


def _attempts(
    vm: Machine | KvmVm | ArmVm,
    attempts: int,
    attempt: Callable[[Callable[[Report], None]], Precopy],
    cancel: threading.Event,
    hold: float | None,
) -> Precopy:
    for left in reversed(range(attempts)):
        with _display() as tell:
            done = attempt(tell)
        # A guest that may run elsewhere is never sent a second time.
        if isinstance(done.failure, HandoverError) and not _decided(vm, done.failure, cancel, hold):
            return done
        if done.failure is None or cancel.is_set() or not left:
            return done
        note(f"{done.failure}; trying again")
    raise AssertionError("there is one attempt or more")


def _decided(vm: Machine | KvmVm | ArmVm, failure: HandoverError, cancel: threading.Event, hold: float | None) -> bool:
    """Hold a guest that may run elsewhere; return whether the user resumed it here."""
    seconds = hold if hold is not None else inf if sys.stdin is not None and sys.stdin.isatty() else _HOLD
    note(f"{failure}{pages.see(failure)}")
    note(
        f"look at the destination: only if its receiver has ended and no guest runs there, 'kill -USR1 {os.getpid()}' "
        "resumes it here (two that run ruin their disks); Ctrl-C gives it up"
        + ("" if seconds == inf else f", and so do {seconds:g} s")
    )
    decided = threading.Event()
    before = signal.signal(signal.SIGUSR1, lambda *_: decided.set())
    try:
        until = time.monotonic() + seconds
        while not decided.is_set() and not cancel.is_set() and time.monotonic() < until:
            select.select([], [], [], 0.1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    if not decided.is_set():
        return False
    vm.resume()
    note("the guest runs here again, and all that it had dirtied is dirty")
    return True


# --- what is said ------------------------------------------------------------------------------------------


def _painter(picture: Path) -> Callable[[Report], None]:
    """Return what draws a report; that it can't is found out before there is one."""
    if picture.suffix == ".html":
        NewFile(picture).close()
        return lambda done: reports.write(picture, reports.of_migration(done))
    if picture.suffix != ".png":
        raise typer.BadParameter(f"--report {picture}: .html or .png")
    from hwdbm.migration.picture import draw  # noqa: PLC0415  # matplotlib is an extra of its own

    NewFile(picture).close()
    return lambda done: draw(picture, done)


def _say(done: Precopy, draw: Callable[[Report], None] | None, *, as_json: bool) -> None:
    report = done.report
    text = json_text(report.to_dict()) if as_json else _text(report)
    status = "the migration completed" if done.failure is None else "the migration failed"
    result(text, status)
    if draw is not None and report.passes:
        try:
            draw(report)
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}; but {status}", error.filename) from error
    if report.downtime is not None and report.downtime > report.limit:
        warn(f"the guest stood still for {report.downtime * 1e3:,.0f} ms, longer than {milliseconds(report.limit)} ms")
    if report.guest_resumed is False:
        note(report.error)
        raise typer.Exit(1)
    if done.failure is not None:
        note(" ".join((str(done.failure), *getattr(done.failure, "__notes__", ()))) + pages.see(done.failure))


def _text(report: Report) -> str:
    columns_ = width()
    wide = columns_ >= 70
    heads = [
        ("pass", "dirty", "sent", "zero", "time", "bandwidth", "expected"),
        ("", "MiB", "MiB", "pages", "ms", "MiB/s", "downtime ms"),
    ]
    chosen = range(7) if wide else (0, 1, 5, 6)
    rows = [[row[i] for i in chosen] for row in (*heads, *map(_row, report.passes))]
    lines = [columns(rows), ""] if report.passes else []
    told = [f"{report.status} in {report.total_time:.2f} s"]
    if report.downtime is not None:
        told[0] += f", downtime {report.downtime * 1e3:,.1f} ms of {milliseconds(report.limit)} ms"
    if report.verify_time is not None:
        told[0] += f" (and {report.verify_time * 1e3:,.0f} ms for the digests)"
    if report.downtime is not None and not report.converged:
        told.append("the guest was paused though the rest didn't fit into that")
    if report.guest_resumed:
        told.append("the guest runs at the destination, and its memory is right there")
    for each in told:
        lines += textwrap.wrap(each, columns_ - 1)
    here, there = report.source_sha256, report.destination_sha256
    if here and here == there:
        lines += _digest("sha256", here, columns_)
    else:
        lines += [
            *(_digest("sha256 here ", here, columns_) if here else []),
            *(_digest("sha256 there", there, columns_) if there else []),
        ]
    return "\n".join(lines)


def _row(one: Pass) -> tuple[object, ...]:
    return (
        one.number,
        mib(one.remaining),
        *(
            (
                mib(one.transferred),
                f"{one.duplicate:,}",
                f"{one.time * 1e3:,.1f}",
                mib(one.bandwidth),
            )
            if one.time
            else ("", "", "", "")  # it was never sent
        ),
        "" if one.expected_downtime is None else f"{one.expected_downtime * 1e3:,.1f}",
    )


def _digest(name: str, digest: str, width: int) -> list[str]:
    if len(name) + 1 + len(digest) < width:
        return [f"{name} {digest}"]
    step = max(width - 3 - (width - 3) % 16, 16)
    return [name, *(f"  {digest[at : at + step]}" for at in range(0, len(digest), step))]


@contextmanager
def _display() -> Iterator[Callable[[Report], None]]:
    """Yield what to call with the report now and then: it shows on stderr how the migration goes."""
    console = Console(file=sys.stderr, stderr=True)
    if not console.is_terminal:
        yield _lines()
        return
    first = "waiting for the other side"
    with shown(), Live(first, console=console, refresh_per_second=8, transient=True, redirect_stdout=False) as live:
        yield lambda report: live.update(_picture(report, console.width))


def _lines() -> Callable[[Report], None]:
    """Return what prints a line now and then, where there is no terminal."""
    said = time.monotonic()

    def tell(report: Report) -> None:
        nonlocal said
        if time.monotonic() - said < _NOW_AND_THEN or not report.passes:
            return
        said, one = time.monotonic(), report.passes[-1]
        expected = "" if one.expected_downtime is None else f", expected downtime {one.expected_downtime * 1e3:,.0f} ms"
        note(
            f"{_state(report)} for {report.total_time:.0f} s: pass {one.number}, {mebibytes(one.remaining)} dirty, "
            f"{mebibytes(report.remaining)} to go{expected}; {_foreseen(report) or 'no forecast yet'}"
        )

    return tell


def _foreseen(report: Report) -> str:
    """Return the last forecast in a line; an empty one before there is any."""
    found = next((one.forecast for one in reversed(report.passes) if one.forecast is not None), None)
    if found is None:
        return ""

    def span(each: Estimate, scale: float, digits: int) -> str:
        return f"{each.value * scale:,.{digits}f} ({each.low * scale:,.{digits}f} to {each.high * scale:,.{digits}f})"

    total, down = span(found.total_time, 1, 1), span(found.downtime, 1e3, 0)
    if not found.converges:
        return f"forecast: no convergence; given up after {total} s"
    return f"forecast: {total} s in all, downtime {down} ms"


def _state(report: Report) -> str:
    """Return the status for people, who don't know what QEMU calls a guest that is paused for its last pass."""
    return "paused" if report.status == "device" else report.status


def _picture(report: Report, width: int) -> Table:
    wide = width >= 76
    table = Table(
        title=f"{_state(report)}, {report.total_time:.1f} s",
        title_justify="left",
        caption=_foreseen(report) or None,
        caption_justify="left",
        box=None,
        padding=(0, 1),
    )
    for head in ("pass", "dirty\nMiB", "to go\nMiB", "dirtied\nMiB/s", "sent\nMiB/s", "downtime\nms", ""):
        if wide or head not in {"dirtied\nMiB/s", ""}:
            table.add_column(head, justify="right", no_wrap=True)
    for one in report.passes[-_PASSES:]:
        current = one is report.passes[-1] and report.status in {"active", "device"}
        remaining = report.remaining if current else 0
        cells = [
            str(one.number),
            mib(one.remaining),
            mib(remaining) if current else "",
            mib(one.bandwidth) if one.time else "",
            f"{one.expected_downtime * 1e3:,.0f}" if one.expected_downtime is not None else "",
        ]
        if wide:
            cells.insert(3, mib(one.dirty_rate) if one.dirty_rate else "")
            bar = ProgressBar(total=one.remaining or 1, completed=one.remaining - remaining, width=min(24, width - 56))
            table.add_row(*cells, bar)
        else:
            table.add_row(*cells)
    return table


# --- the other side ----------------------------------------------------------------------------------------


@contextmanager
def _connected(
    to: Endpoint | None, tls: transport.TlsDir | None, options_: list[str], *, insecure: bool, cancel: threading.Event
) -> Iterator[Channel]:
    with ExitStack() as stack:
        if to is not None and to.path is not None:
            try:
                channel = _reached(partial(transport.connect_unix, to.path), cancel)
            except FileNotFoundError as error:
                raise ConnectionRefusedError(ENOENT, "No such socket: nobody listens there", str(to.path)) from error
            yield stack.enter_context(channel)
            return
        if to is not None:
            with guest.usage():
                connect = partial(transport.connect_tcp, to.host, to.port, tls, insecure=insecure)
                channel = _reached(connect, cancel)
            yield stack.enter_context(channel)
            return
        path = stack.enter_context(transport.private_socket())
        command = python("-m", "hwdbm", "receive", "--unix", str(path), "--json", "--until-eof", *options_)
        receiver = stack.enter_context(
            child(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        )
        # Its stdin ends with this process, however that ends, or with this block.
        stack.callback(receiver.stdin.close if receiver.stdin else lambda: None)
        yield stack.enter_context(_connect(receiver, path, cancel))


def _reached(connect: Callable[[], Channel], cancel: threading.Event) -> Channel:
    try:
        return elsewhere(connect, cancel)
    except InterruptedError:
        leave()


def _connect(receiver: subprocess.Popen[bytes], path: Path, cancel: threading.Event) -> Channel:
    until = time.monotonic() + _START
    while True:
        try:
            return transport.connect_unix(path)
        except (FileNotFoundError, ConnectionRefusedError) as error:
            if receiver.poll() is not None:
                said = receiver.stderr.read().decode(errors="replace") if receiver.stderr else ""
                raise StreamError(f"the receiver didn't come up: {said.strip().removeprefix('hwdbm: ')}") from error
            if cancel.wait(0.02):
                leave()
            if time.monotonic() > until:
                raise StreamError(f"the receiver didn't come up in {_START:g} s") from error


@contextmanager
def beside(
    vm: Machine | KvmVm | ArmVm,
    options_: list[str],
    cancel: threading.Event,
    done: Callable[[dict[str, object]], None],
) -> Iterator[None]:
    """Migrate a VM that runs to another process, in a thread, while the block does something else with it.

    `done` is told what became of it, by the thread, and the block's end waits for that.
    """
    with guest.switching_often(), _connected(None, None, options_, insecure=False, cancel=cancel) as channel:
        precopy = Precopy(vm, channel, Settings(), cancel=cancel)

        def move() -> None:
            try:
                _run(precopy)
            finally:
                report = precopy.report
                told: dict[str, object] = {"status": report.status, "total-time": round(report.total_time * 1e3, 3)}
                if report.downtime is not None:
                    told["downtime"] = round(report.downtime * 1e3, 3)
                if report.source_sha256:
                    told["sha256"] = report.source_sha256
                if precopy.failure is not None:
                    told["error"] = str(precopy.failure)
                done(told)

        thread = threading.Thread(target=move, name="hwdbm-migration")
        thread.start()
        try:
            yield
        finally:
            thread.join()
