"""``hwdbm trace``: what a write trace says."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from hwdbm.cli import example, options, parse
from hwdbm.cli.output import busy, columns
from hwdbm.cli.streams import json_text, result
from hwdbm.files import NewFile
from hwdbm.migration.report import mebibytes, mib
from hwdbm.trace import Analysis, Trace, analyse, open_trace

_SHOW = """Sizes are in MiB (1024 * 1024 bytes), rates in MiB/s; in JSON bytes, pages or bytes a second, and ms.

Examples:

  Traces that hwdbm brings:

\b
    hwdbm trace show example:kvm-counting
    hwdbm trace show example:machine-hot --plot hot.png
"""

_ROWS = 12  # of the table of periods


def show(
    trace: Annotated[
        Path,
        typer.Argument(
            parser=options.parser(parse.trace),
            autocompletion=options.traces,
            metavar="TRACE",
            help="The folder of a trace, or example:NAME.",
        ),
    ],
    plot: Annotated[
        Path | None,
        typer.Option(
            parser=options.parser(parse.path),
            metavar="FILE.png|.svg",
            help="Draw it: the curve, the working set over time, and a map of what was written when.",
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Show what a trace says: rates by period, working set, page sizes, zero pages.

    A page counts once in a period, however often it is written: so there is no one rate, but a curve of distinct
    pages against period. What larger pages send is what a log of such pages would have had, interval by interval.
    """
    draw = None if plot is None else _painter(plot)
    opened = open_trace(trace)
    with busy(f"reading {example.label(trace)}"):
        found = analyse(opened) if draw is None else analyse(opened, rows=256, cells=512)
        if draw is not None:
            draw(found)
            found = analyse(opened)
    done = "" if plot is None else f"{plot} was written"
    result(json_text(_report(trace, opened, found)) if as_json else _text(trace, opened, found), done)


def _painter(path: Path) -> Callable[[Analysis], None]:
    """Return what draws; that it can't is found out before anything takes time."""
    if path.suffix not in {".png", ".svg"}:
        raise typer.BadParameter(f"--plot {path}: .png or .svg")
    module = import_module("hwdbm.trace.picture")  # matplotlib
    NewFile(path).close()
    return lambda found: module.draw(path, found)


def _report(path: Path, trace: Trace, found: Analysis) -> dict[str, Any]:
    about = {
        "trace": example.label(path),
        "source": trace.source,
        "mechanism": trace.mechanism,
        "started": trace.started,
        "complete": trace.complete,
        "slots": [
            {"id": slot.id, "gpa": slot.base_gfn * trace.page_size, "npages": slot.npages} for slot in trace.slots
        ],
    }
    if trace.interval is not None:
        about["interval"] = trace.interval
    return about | found.to_dict()


def _text(path: Path, trace: Trace, found: Analysis) -> str:
    page, total = found.page_size, found.npages * found.page_size
    cut = "" if trace.complete else ", whose writer didn't close it"
    lines = [f"{example.label(path)}: {trace.intervals} intervals in {found.seconds:.4g} s{cut}"]
    about = f"{mebibytes(total)} in pages of {page >> 10} KiB: {trace.source or 'a VM'}, {trace.mechanism or 'a log'}"
    lines.append(about)
    if not trace.intervals:
        return "\n".join([*lines, "", "There is no interval."])
    rows: list[list[object]] = [["period", "distinct MiB", "low", "high", "MiB/s", "of all"]]
    for each in _some(found.periods):
        size = each.pages * page
        rows.append([
            _time(each.seconds), mib(size), mib(each.low * page), mib(each.high * page), mib(each.rate * page),
            f"{size / total:.1%}",
        ])  # fmt: skip
    lines += ["", columns(rows)]
    rows = [["pages of", "sent MiB/s", "times"]]
    least = found.amounts[0].nbytes
    for amount in found.amounts:
        name = f"{amount.page_size >> 10} KiB" if amount.page_size < 1 << 20 else f"{amount.page_size >> 20} MiB"
        rows.append([name, mib(amount.nbytes / found.seconds), f"{amount.nbytes / least if least else 0.0:.2f}"])
    lines += ["", columns(rows), ""]
    return "\n".join([*lines, *_rest(found, total)])


def _rest(found: Analysis, total: int) -> list[str]:
    page, said = found.page_size, []
    if found.working is not None:
        sizes = found.working.windows * page
        said.append(f"working set of {_time(found.working.seconds)}: {mib(sizes.min())} to {mib(sizes.max())} MiB")
    touched = int(found.touched[-1]) * page
    said.append(f"written in all: {mebibytes(touched)}, {touched / total:.1%} of the memory")
    written = int(found.pages.sum())
    if found.zeros is not None and written:
        said.append(f"pages of zeros: {found.zeros / written:.1%} of what was written")
    if found.initial_zeros is not None:
        said.append(f"{found.initial_zeros * page / total:.1%} of the memory was zero at the start")
    return said


def _some(periods: tuple[Any, ...]) -> list[Any]:
    """Return a few periods, the first and the last among them; all where there are few."""
    return [periods[at] for at in sorted({round(i * (len(periods) - 1) / (_ROWS - 1)) for i in range(_ROWS)})]


def _time(seconds: float) -> str:
    for unit, size in (("us", 1e-6), ("ms", 1e-3)):
        if seconds < 1000 * size * 0.9995:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


COMMANDS: dict[str, tuple[Callable[..., None], str]] = {"show": (show, _SHOW)}
"""The commands of the group, with their examples."""
