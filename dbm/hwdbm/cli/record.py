"""``hwdbm record``: a trace of which pages a VM writes."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from hwdbm import kernels
from hwdbm.cli import guest, options, parse
from hwdbm.cli.guest import KvmLogOption, MemoryOption, ModeOption, RateOption, SeedOption, Thp, Vm, WorkloadOption
from hwdbm.cli.interrupt import as_event
from hwdbm.cli.output import busy, leave
from hwdbm.cli.streams import json_text, result
from hwdbm.memslot import Memslot
from hwdbm.migration.report import mebibytes
from hwdbm.trace import Trace, analyse, content, from_bitmaps, record_file
from hwdbm.trace import record as record_vm

_DURATION = 20.0  # seconds that are recorded

EPILOG = """Examples:

  A real guest on /dev/kvm for two seconds, and what the trace says:

\b
    hwdbm record --output guest.trace --source kvm --memory 64M
        --duration 2s
    hwdbm trace show guest.trace

  A modelled machine that writes a small part of its memory again and again:

\b
    hwdbm record --output hot.trace --memory 64M --workload hot,share=0.05
        --interval 50ms --duration 2s

  A VM of any kind that shares a RAM file, for one QEMU's with
  -object memory-backend-file,id=ram,size=1G,mem-path=/dev/shm/ram,share=on:

\b
    truncate -s 1M ram
    hwdbm record --output file.trace --ram-file ram --duration 1s
"""


def record(
    output: Annotated[
        Path,
        typer.Option("--output", parser=options.parser(parse.path), metavar="TRACE", help="The folder of the trace."),
    ],
    source: Annotated[
        Vm | None,
        typer.Option(
            parser=options.parser(parse.choice(Vm)),
            metavar="machine|kvm|arm",
            help="A guest that is started here: a modelled machine (the default), a real one on /dev/kvm, or an "
            "emulated Arm machine.",
        ),
    ] = None,
    ram_file: Annotated[
        Path | None,
        typer.Option(
            parser=options.parser(parse.path),
            metavar="FILE",
            help="In place of a guest, the RAM file of a VM that runs and shares it: its content is compared between "
            "intervals. A write that leaves a page as it was isn't seen.",
        ),
    ] = None,
    bitmaps: Annotated[
        Path | None,
        typer.Option(
            parser=options.parser(parse.path),
            metavar="DIR",
            help="In place of a guest, dirty bitmaps that were kept, in KVM's layout: a file an interval, all slots in "
            "turn. Names that each have a time, as in 000200ms, say when it ended; else they are taken in "
            "order, --interval each.",
        ),
    ] = None,
    interval: Annotated[
        float,
        typer.Option(
            parser=options.parser(parse.seconds), metavar="TIME", help="How long an interval is: 100ms, 1s, 2min."
        ),
    ] = "100ms",  # type: ignore[assignment]  # typer parses it
    duration: Annotated[
        float | None,
        typer.Option(
            parser=options.parser(parse.seconds),
            metavar="TIME",
            help="How long to record; 20s by default. Ctrl-C ends it before, with a whole trace.",
        ),
    ] = None,
    zeros: Annotated[
        bool,
        typer.Option(
            "--zeros/--no-zeros",
            help="Look for pages of zeros: in all memory at the start, and in what is written in each interval.",
        ),
    ] = True,
    memory: MemoryOption = None,
    workload: WorkloadOption = None,
    rate: RateOption = None,
    mode: ModeOption = None,
    thp: Thp = None,
    kvm_log: KvmLogOption = None,
    seed: SeedOption = 0,
    slot: options.Slots = None,
    page_size: Annotated[
        int | None,
        typer.Option(
            parser=options.parser(parse.page_size),
            metavar="SIZE",
            help="The page that a bit of --bitmaps or of the trace of --ram-file stands for; 4K by default.",
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Record which pages a VM writes in each interval, into a trace.

    The trace is whole at each moment: what ends this, be it a full disk, leaves the intervals that there are.
    'hwdbm trace show' says what is in it.
    """
    given = {"--source": source is not None, "--ram-file": ram_file is not None, "--bitmaps": bitmaps is not None}
    if sum(given.values()) > 1:
        raise typer.BadParameter(f"give one of {', '.join(name for name, is_given in given.items() if is_given)}")
    if bitmaps is None:
        guest.refuse("without --bitmaps", {"--slot": bool(slot) and ram_file is None})
    if bitmaps is not None or ram_file is not None:
        guest.refuse("with --bitmaps" if bitmaps is not None else "with --ram-file", {
            "--memory": memory is not None, "--workload": workload is not None, "--rate": rate is not None,
            "--mode": mode is not None, "--thp": thp is not None, "--kvm-log": kvm_log is not None,
            "--no-zeros": not zeros, "--duration": duration is not None and bitmaps is not None,
        })  # fmt: skip
    else:
        guest.refuse("without --bitmaps or --ram-file", {"--page-size": page_size is not None})
    options.check_slots(slot)
    page = guest.PAGE if page_size is None else page_size
    seconds = _DURATION if duration is None else duration
    if bitmaps is not None:
        with busy(f"reading {bitmaps}"):
            trace, named = from_bitmaps(bitmaps, output, _slots(slot, page), page_size=page, interval=interval)
        _say(trace, "names" if named else "interval", as_json=as_json)
        return
    if ram_file is not None:
        (where,) = slot if slot and len(slot) == 1 else (None,)
        if slot and (where is None or where.size != ram_file.stat().st_size):
            raise typer.BadParameter("--slot: a RAM file is one slot, of its size")
        content.warm_up()
        with as_event() as cancel, busy(f"recording {ram_file}") as tell:
            trace = record_file(ram_file, output, page_size=page, gpa=where.gpa if where else 0, interval=interval,
                                duration=seconds, cancel=cancel, on_interval=_telling(tell, seconds))  # fmt: skip
    else:
        size = guest.MEMORY if memory is None else memory
        guest.check_room(size)
        with busy("the guest is made ready"), ExitStack() as made:
            vm = guest.paused(source or Vm.MACHINE, size, workload, rate, seed, log=kvm_log, mode=mode, thp=thp)
            made.enter_context(vm)
            kernels.warm_up()
            made.pop_all()
        with vm, guest.switching_often(), as_event() as cancel, busy("recording") as tell:
            vm.resume()
            trace = record_vm(vm, output, interval=interval, duration=seconds, zeros=zeros, cancel=cancel,
                              on_interval=_telling(tell, seconds))  # fmt: skip
    _say(trace, "clock", as_json=as_json)
    if cancel.is_set():
        leave()


def _slots(given: list[Any] | None, page: int) -> list[Memslot] | None:
    """Return the memslots that options name."""
    for each in given or ():
        if each.gpa % page or each.size % page:
            raise typer.BadParameter(f"--slot {each.id}:{each.gpa:#x}:{each.size}: not whole pages of {page} bytes")
    return [Memslot(each.id, 0, each.gpa // page, each.size // page, 0) for each in given] if given else None


def _telling(tell: Callable[[str], object], seconds: float) -> Callable[[int, float, int], None]:
    def told(intervals: int, passed: float, pages: int) -> None:
        tell(f"recording: {passed:.1f} of {seconds:g} s, {intervals} intervals, {pages:,} pages in the last")

    return told


def _say(trace: Trace, times: str, *, as_json: bool) -> None:
    found = analyse(trace, rows=1, cells=1)
    done = f"{trace.path} was written"
    if as_json:
        report = {
            "trace": str(trace.path),
            "source": trace.source,
            "mechanism": trace.mechanism,
            "page-size": trace.page_size,
            "pages": trace.npages,
            "intervals": trace.intervals,
            "duration": round(found.seconds * 1e3, 3),
            "times": times,
            "written": int(found.pages.sum()),
            "touched": int(found.touched[-1]) if trace.intervals else 0,
        }
        result(json_text(report), done)
        return
    how = {"clock": "", "names": ", which the names say", "interval": ", one for each file"}[times]
    touched = int(found.touched[-1]) * trace.page_size if trace.intervals else 0
    text = (
        f"{trace.path}: {trace.intervals} intervals in {found.seconds:.3g} s{how}; {mebibytes(touched)} of "
        f"{mebibytes(trace.npages * trace.page_size)} were written"
    )
    result(text, done)
