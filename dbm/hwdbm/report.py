"""Reports of migrations, forecasts, harvests and snapshots: one HTML file each, pictures and the numbers behind them.

A file links to nothing, and can be printed. It is made of few parts: facts, `Chart`, `Dial`, `DirtyMap` and `Table`. A
chart or a map is drawn as SVG, and its numbers are given as a table below it, so that the two can't differ. Nothing
runs in it but the few lines that move a `Dial`, which is legible without them.
"""

import html
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log10
from pathlib import Path
from string import Template

import numpy as np
from numpy.typing import NDArray

from hwdbm import files
from hwdbm.bitmap import DirtyBitmap
from hwdbm.forecast import Estimate, Forecast, Sample
from hwdbm.forecast.sweep import Sweep
from hwdbm.granule import size_name
from hwdbm.image.harvest import Found
from hwdbm.migration.report import Report, folded, mib
from hwdbm.trace import Analysis

__all__ = [
    "Chart",
    "Dial",
    "DialPlace",
    "DirtyMap",
    "Document",
    "SnapshotFile",
    "Table",
    "of_forecast",
    "of_harvest",
    "of_migration",
    "of_snapshots",
    "write",
]

_TEMPLATE = Path(__file__).with_suffix(".html")
_MIB = 1 << 20
_CELLS = 180  # cells of a map's row
_SHADES = 5  # of a map, besides that of a cell that is clean
_CROSS = " \N{MULTIPLICATION SIGN}"  # behind a number of the other kind
_PASSES = 30  # of a forecast, at most
_LENGTHS = 12  # classes of a histogram of ranges, at most


# --- the parts ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text and numbers.

    Parameters
    ----------
    title : str
        What it shows; empty where a picture above it says that.
    heads : tuple of str
        The columns, with their units.
    rows : tuple of tuples of str
        The cells, as many as columns.
    """

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.heads):
                raise ValueError(f"a row of {len(row)} cells in a table of {len(self.heads)} columns: {row}")


@dataclass(frozen=True, slots=True)
class Chart:
    """A picture of numbers over some labels, and those numbers.

    Parameters
    ----------
    title : str
        What it shows.
    unit : str
        The unit of the numbers.
    over : str
        What the labels are: "pass".
    labels : tuple of str
        One for each place.
    series : mapping of str to tuple of float or None
        By name, a number of 0 or more for each label; None where there is none.
    limit : tuple of str and float, optional
        A line across, and its name.
    lines : bool
        Whether the numbers are points on lines, and not bars.
    log : bool
        Whether a step up is a factor.
    """

    title: str
    unit: str
    over: str
    labels: tuple[str, ...]
    series: Mapping[str, tuple[float | None, ...]]
    limit: tuple[str, float] | None = None
    lines: bool = False
    log: bool = False

    def __post_init__(self) -> None:
        for name, values in self.series.items():
            if len(values) != len(self.labels):
                raise ValueError(f"{name!r} has {len(values)} numbers for {len(self.labels)} labels")

    def table(self) -> Table:
        """Return the numbers."""
        rows = [
            (label, *("" if values[at] is None else _number(values[at]) for values in self.series.values()))
            for at, label in enumerate(self.labels)
        ]
        return Table("", (self.over, *(f"{name} ({self.unit})" for name in self.series)), tuple(rows))


@dataclass(frozen=True, slots=True)
class DialPlace:
    """What a `Dial` shows at one of its places.

    Parameters
    ----------
    label : str
        The place: "300 ms".
    says : str
        What it shows, in a sentence.
    limit : float
        A line across.
    values : tuple of float
        A number for each x.
    good : tuple of bool
        Whether that is one of the good ones.
    """

    label: str
    says: str
    limit: float
    values: tuple[float, ...]
    good: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Dial:
    """A curve over a number, one for each place of a dial that can be moved. Both scales are logarithmic.

    Parameters
    ----------
    title : str
        What it shows.
    unit, over, dial : str
        The unit of the numbers, what x is, and what the dial is.
    good, bad : str
        What the two kinds of points are.
    x : tuple of float
        Ascending, above 0.
    places : tuple of DialPlace
        At least one.
    chosen : int
        The place that is shown at first, on paper, and where nothing can be moved.
    """

    title: str
    unit: str
    over: str
    dial: str
    good: str
    bad: str
    x: tuple[float, ...]
    places: tuple[DialPlace, ...]
    chosen: int

    def __post_init__(self) -> None:
        if not 0 <= self.chosen < len(self.places):
            raise ValueError(f"place {self.chosen} of {len(self.places)}")
        for place in self.places:
            if not len(place.values) == len(place.good) == len(self.x):
                raise ValueError(f"{place.label!r} has {len(place.values)} numbers for {len(self.x)} of x")

    def table(self) -> Table:
        """Return the numbers of all places."""
        heads = (self.over, *(f"{place.label} allowed" for place in self.places))
        rows = [
            (_number(x), *(f"{_number(each.values[at])}{'' if each.good[at] else _CROSS}" for each in self.places))
            for at, x in enumerate(self.x)
        ]
        return Table("", heads, tuple(rows))


@dataclass(frozen=True, slots=True)
class DirtyMap:
    """A picture of which memory was dirty: a row of cells for each label, each as dark as its dirty part.

    Parameters
    ----------
    title : str
        What it shows.
    over : str
        What the labels are: "pass".
    rows : mapping of str to (n,) float array
        By label, the dirty part of each cell of memory, 0 to 1.
    extents : mapping of str to int
        By label, how many bytes the cells of the row stand for together.
    """

    title: str
    over: str
    rows: Mapping[str, NDArray[np.float32]]
    extents: Mapping[str, int]

    def table(self) -> Table:
        """Return how much of each row is dirty, and where that begins and ends."""
        rows = []
        for label, cells in self.rows.items():
            dirty, size = np.flatnonzero(cells), self.extents[label]
            cell = size / max(cells.size, 1)
            ends = (
                (f"{dirty[0] * cell / _MIB:,.1f}", f"{(dirty[-1] + 1) * cell / _MIB:,.1f}") if dirty.size else ("", "")
            )
            rows.append((label, f"{size / _MIB:,.1f}", f"{cell / 1024:,.0f}", f"{dirty.size} of {cells.size}", *ends))
        heads = (self.over, "memory (MiB)", "a cell (KiB)", "dirty cells", "from (MiB)", "to (MiB)")
        return Table("", heads, tuple(rows))


Part = Chart | Dial | DirtyMap | Table


@dataclass(frozen=True, slots=True)
class Document:
    """A report.

    Parameters
    ----------
    title : str
        Its heading.
    facts : mapping of str to str
        Names and values, in this order.
    parts : tuple of Chart, Dial, DirtyMap or Table
        In this order.
    failure : str
        What went wrong, if anything did.
    note : str
        The units, or what else is to be known.
    """

    title: str
    facts: Mapping[str, str]
    parts: tuple[Part, ...]
    failure: str = ""
    note: str = ""

    def html(self) -> str:
        """Return it as one HTML document.

        Examples
        --------
        >>> Document("None & nothing", {}, ()).html().count("None &amp; nothing")
        2
        """
        facts = "".join(f"<dt>{_e(name)}</dt><dd>{_e(value)}</dd>" for name, value in self.facts.items())
        return Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
            title=_e(self.title),
            failure=f'<p class="failure">{_e(self.failure)}</p>' if self.failure else "",
            facts=f"<dl>{facts}</dl>" if facts else "",
            note=f"<p>{_e(self.note)}</p>" if self.note else "",
            parts="\n".join(_part(part, number) for number, part in enumerate(self.parts)),
            script=_SCRIPT if any(isinstance(part, Dial) for part in self.parts) else "",
        )


def write(path: str | os.PathLike[str], document: Document) -> None:
    """Write a report to a file, which is replaced.

    Raises
    ------
    OSError
        If it can't be written. What was in its place is there still.
    """
    files.write(path, document.html().encode())


# --- the reports -------------------------------------------------------------------------------------------


def of_migration(report: Report) -> Document:
    """Return the report of a migration: its passes, their rates, the downtime, and which memory was dirty when.

    Parameters
    ----------
    report : Report
        The migration, ended or not.

    Examples
    --------
    >>> from hwdbm.migration import Pass
    >>> one = Pass(1, 256, 1 << 20, transferred=1 << 20, time=1)
    >>> of_migration(Report(4096, 1 << 20, 0.3, status="completed", passes=[one])).parts[0].table().rows
    (('1', '1', '1'),)
    """
    passes, page = report.passes, report.page_size
    labels = tuple(str(one.number) for one in passes)
    facts = {
        "status": report.status,
        "guest memory": f"{mib(report.total)} MiB",
        "time": f"{report.total_time:,.2f} s",
        "sent": f"{mib(report.transferred)} MiB, of it {mib(report.downtime_bytes)} MiB with the guest paused",
        "pages sent, pages of zeros": f"{report.normal:,}, {report.duplicate:,}",
        "bandwidth": f"{mib(report.bandwidth)} MiB/s",
    }
    if report.downtime is not None:
        facts["downtime"] = f"{report.downtime * 1e3:,.1f} ms of {report.limit * 1e3:,g} ms that are allowed"
    if report.verify_time is not None:
        facts["time for the digests"] = f"{report.verify_time * 1e3:,.0f} ms, with the guest paused"
    if report.source_sha256:
        facts["SHA-256 at the source"] = report.source_sha256
    if report.destination_sha256:
        facts["SHA-256 at the destination"] = report.destination_sha256
    if report.guest_resumed is not None:
        facts["the guest was found to run right at the destination"] = "yes" if report.guest_resumed else "no"
    amounts: dict[str, tuple[float | None, ...]] = {
        "dirty": tuple(one.remaining / _MIB for one in passes),
        "sent": tuple(one.transferred / _MIB for one in passes),
    }
    if report.duplicate:
        amounts["pages of zeros"] = tuple(one.duplicate * page / _MIB for one in passes)
    rates = {
        "dirtied": tuple(one.dirty_rate / _MIB if one.number > 1 else None for one in passes),
        "sent": tuple(one.bandwidth / _MIB if one.time else None for one in passes),
    }
    downtimes: dict[str, tuple[float | None, ...]] = {
        "expected": tuple(None if one.expected_downtime is None else one.expected_downtime * 1e3 for one in passes)
    }
    if any(one.forecast is not None for one in passes):
        downtimes["forecast"] = tuple(
            None if one.forecast is None else one.forecast.downtime.value * 1e3 for one in passes
        )
    if report.downtime is not None:
        downtimes["measured"] = (*(None for _ in passes[1:]), report.downtime * 1e3)
    limit = ("limit", report.limit * 1e3) if report.limit else None
    parts: list[Part] = []
    if passes:
        parts = [
            Chart("The memory of each pass", "MiB", "pass", labels, amounts),
            Chart("Rates", "MiB/s", "pass", labels, rates, lines=True),
            Chart(
                "Downtime, if paused for the pass",
                "ms",
                "pass",
                labels,
                downtimes,
                limit,
                lines=True,
                log=True,
            ),
            DirtyMap(
                "Which memory was dirty in which pass",
                "pass",
                {str(one.number): one.cells for one in passes if one.cells.size},
                {str(one.number): report.total for one in passes},
            ),
            _passes(report),
        ]
    return Document(
        f"Migration of {mib(report.total)} MiB: {report.status}",
        facts,
        tuple(part for part in parts if not isinstance(part, DirtyMap) or part.rows),
        report.error,
        "Sizes are in MiB (1024 * 1024 bytes), rates in MiB/s, times in ms. A pass sends what was dirtied during the "
        "one before.",
    )


def _passes(report: Report) -> Table:
    rows = []
    for one in report.passes:
        row = one.to_dict()
        found = row.pop("forecast", None)
        if found is not None:
            row |= {f"forecast {name}": found[name]["value"] for name in ("total-time", "downtime")}
        rows.append(row)
    keys = list(dict.fromkeys(key for row in rows for key in row))
    cells = tuple(tuple(str(row.get(key, "")) for key in keys) for row in rows)
    return Table("The passes as in JSON: bytes, bytes a second, ms, and numbers of pages", tuple(keys), cells)


def of_forecast(
    name: str,
    found: Forecast,
    sweep: Sweep,
    passes: Sequence[Sample],
    asked: Mapping[str, str],
    analysis: Analysis | None = None,
) -> Document:
    """Return the report of a forecast: downtime against bandwidth at several limits, the passes, and the write map.

    Parameters
    ----------
    name : str
        The trace's, or that of the samples.
    found : Forecast
        At the bandwidth and the limit that were asked for.
    sweep : Sweep
        At others.
    passes : sequence of Sample
        What was left at each harvest.
    asked : mapping of str to str
        What was asked for: names and values.
    analysis : Analysis, optional
        What the trace says, if there is one.
    """

    def wide(estimate: Estimate, scale: float, unit: str) -> str:
        value, low, high = (_number(each * scale) for each in (estimate.value, estimate.low, estimate.high))
        return f"{value} {unit}".strip() + f" ({low} to {high})"

    facts = {
        **asked,
        "converges": "yes" if found.converges else "no",
        "passes": wide(found.passes, 1, ""),
        "total time": wide(found.total_time, 1, "s"),
        "downtime": wide(found.downtime, 1e3, "ms"),
        "sent": wide(found.transferred, 1 / _MIB, "MiB"),
    }
    if found.needs.bandwidth is not None:
        facts["bandwidth that would do"] = f"{_number(found.needs.bandwidth / _MIB)} MiB/s"
    if found.needs.max_downtime is not None:
        facts["limit of downtime that would do"] = f"{_number(found.needs.max_downtime * 1e3)} ms"
    parts: list[Part] = [_downtimes(sweep)]
    labels = tuple(_number(each / _MIB) for each in sweep.bandwidths)
    row = sweep.forecasts[sweep.chosen]
    times = {"total time": tuple(each.total_time.value for each in row)}
    parts.append(Chart("Total time at the limit", "s", "bandwidth (MiB/s)", labels, times, lines=True, log=True))
    if passes:
        found_passes = list({each.iteration: each for each in reversed(passes)}.values())[::-1]
        first = found_passes[:_PASSES]
        some = "" if len(first) == len(found_passes) else f", the first {len(first)} of {len(found_passes)}"
        numbers = tuple(str(each.iteration) for each in first)
        amounts = {"left": tuple(each.remaining / _MIB for each in first)}
        parts.append(Chart(f"What is left at the beginning of each pass{some}", "MiB", "pass", numbers, amounts))
        rows = tuple(
            (
                str(each.iteration), f"{each.time * 1e3:,.0f}", f"{each.remaining / _MIB:,.2f}",
                "" if each.dirty_rate is None else f"{each.dirty_rate / _MIB:,.2f}",
            )
            for each in first
        )  # fmt: skip
    if analysis is not None and analysis.map.size:
        edges = analysis.map_times.tolist()
        spans = [f"{start:.3g} s" for start in edges[:-1]]
        cells = dict(zip(spans, analysis.map.astype(np.float32), strict=True))
        parts.append(
            DirtyMap("Which memory is written in an interval, from when on", "time", cells,
                     dict.fromkeys(spans, analysis.npages * analysis.page_size))
        )  # fmt: skip
        periods = tuple(f"{each.seconds:.3g}" for each in analysis.periods)
        distinct = {"written": tuple(each.pages * analysis.page_size / _MIB for each in analysis.periods)}
        parts.append(Chart("Distinct memory written in a period", "MiB", "period (s)", periods, distinct, lines=True))
    if passes:
        parts.append(Table(f"The passes{some}", ("pass", "begins after (ms)", "left (MiB)", "dirtied (MiB/s)"), rows))
    return Document(
        f"Forecast of {name}: it {'converges' if found.converges else 'does not converge'}",
        facts,
        tuple(parts),
        "" if found.converges else "It doesn't converge.",
        found.why,
    )


def _downtimes(sweep: Sweep) -> Dial:
    places = []
    for place, (limit, row) in enumerate(zip(sweep.limits, sweep.forecasts, strict=True)):
        needs = sweep.needs(place)
        label = f"{_number(limit * 1e3)} ms"
        if needs is None:
            says = f"With {label} allowed, it converges at none of these bandwidths."
        elif needs == sweep.bandwidths[0]:
            says = f"With {label} allowed, it converges at all of these bandwidths."
        else:
            says = f"With {label} allowed, it converges from {_number(needs / _MIB)} MiB/s on, of the bandwidths tried."
        values = tuple(each.downtime.value * 1e3 for each in row)
        places.append(DialPlace(label, says, limit * 1e3, values, tuple(each.converges for each in row)))
    return Dial(
        "Downtime against bandwidth", "ms", "bandwidth (MiB/s)", "limit of downtime", "converges", "doesn't converge",
        tuple(each / _MIB for each in sweep.bandwidths), tuple(places), sweep.chosen,
    )  # fmt: skip


def of_harvest(name: str, found: Found) -> Document:
    """Return the report of a harvest: its slots, which memory is dirty, and in what ranges.

    Parameters
    ----------
    name : str
        The image's.
    found : Found
        What `hwdbm.image.harvest.harvest_slots` returned.
    """
    slots, ask = found.slots, found.ask
    labels = tuple(str(one.slot.id) for one in slots)
    pages = sum(one.bitmap.npages for one in slots)
    dirty = sum(one.dirty for one in slots)
    size = sum(one.dirty * one.page_size for one in slots)
    facts = {
        "image": name,
        "policy": f"{ask.policy}{'' if ask.contiguous else ', each entry of a contiguous run by itself'}",
        "dirty": f"{dirty:,} of {pages:,} pages, {mib(size)} MiB",
        "tables read": f"{found.tables:,} in {found.seconds * 1e3:,.1f} ms",
    }
    wrong = [one.wrong.weight() for one in slots if one.wrong is not None]
    if wrong:
        facts["compared with the truth"] = f"{sum(wrong):,} pages of 4K are wrong" if any(wrong) else "as expected"
    heads = ("slot", "gpa", "page", "pages", "mapped", "dirty", "ranges", "dirty leaves")
    rows = [
        (
            str(one.slot.id), f"{one.slot.gpa:#018x}", size_name(one.page_size), f"{one.bitmap.npages:,}",
            f"{one.mapped:,}", f"{one.dirty:,}", f"{one.ranges:,}",
            ", ".join(f"{count:,} of {size_name(each)}" for each, count in one.leaves.items() if count) or "none",
        )
        for one in slots
    ]  # fmt: skip
    states: dict[str, tuple[float | None, ...]] = {
        "dirty": tuple(one.dirty * one.page_size / _MIB for one in slots),
        "mapped, clean": tuple(max(one.mapped - one.dirty, 0) * one.page_size / _MIB for one in slots),
        "not mapped": tuple((one.bitmap.npages - one.mapped) * one.page_size / _MIB for one in slots),
    }
    parts: list[Part] = [
        Table("The slots", heads, tuple(rows)),
        Chart("The memory of each slot", "MiB", "slot", labels, states),
        DirtyMap(
            "Which memory is dirty",
            "slot",
            {str(one.slot.id): folded([one.bitmap], _CELLS) for one in slots if one.bitmap.npages},
            {str(one.slot.id): one.slot.size for one in slots},
        ),
    ]
    if dirty:
        parts.append(_ranges([one.bitmap for one in slots]))
    return Document(
        f"Harvest of {name}: {dirty:,} of {pages:,} pages dirty",
        facts,
        tuple(parts),
        f"{sum(wrong):,} pages differ from the truth in the image" if any(wrong) else "",
        "A page is what a bit of the bitmap stands for, a range a run of neighbouring dirty pages. Sizes are in MiB.",
    )


def _ranges(bitmaps: Sequence[DirtyBitmap]) -> Chart:
    """Return how many ranges there are by length, in classes of powers of two."""
    lengths = np.concatenate([bitmap.ranges()[:, 1] for bitmap in bitmaps])
    classes = np.minimum(np.log2(lengths).astype(np.int64), _LENGTHS - 1)
    counts, pages = np.bincount(classes), np.bincount(classes, weights=lengths)
    labels = [str(1 << at) if not at else f"{1 << at} to {(2 << at) - 1}" for at in range(counts.size)]
    if counts.size == _LENGTHS:
        labels[-1] = f"{1 << _LENGTHS - 1} or more"
    series: dict[str, tuple[float | None, ...]] = {
        "ranges": tuple(counts.tolist()),
        "pages in them": tuple(pages.tolist()),
    }
    return Chart("Ranges by their length", "number", "pages of a range", tuple(labels), series)


@dataclass(frozen=True, slots=True)
class SnapshotFile:
    """A file of a chain of snapshots, for a report.

    Parameters
    ----------
    name : str
        The file's.
    kind : str
        "full" or "differential", or another word for it.
    size : int
        Bytes of guest memory that it is of.
    data : int
        Bytes of it that are data, and no hole.
    dirty : int
        Pages that it has.
    seconds : float, optional
        How long it took to write, if that is known.
    sha256 : str
        The digest of the memory of its moment, in hexadecimal, if that is known.
    """

    name: str
    kind: str
    size: int
    data: int
    dirty: int
    seconds: float | None = None
    sha256: str = ""


def of_snapshots(title: str, chain: Sequence[SnapshotFile], failure: str = "") -> Document:
    """Return the report of a chain of snapshots, the oldest first.

    Parameters
    ----------
    title : str
        What was done: "Snapshots of guest.ram".
    chain : sequence of SnapshotFile
        One or more.
    failure : str
        What went wrong, if anything did.

    Examples
    --------
    >>> chain = [SnapshotFile("a", "full", 8 << 20, 8 << 20, 2048), SnapshotFile("b", "differential", 8 << 20, 4096, 1)]
    >>> of_snapshots("Two", chain).parts[0].table().rows
    (('a', '8'), ('b', '0.00391'))
    """
    if not chain:
        raise ValueError("a chain of snapshots has one file or more")
    names = tuple(one.name for one in chain)
    data: dict[str, tuple[float | None, ...]] = {"data": tuple(one.data / _MIB for one in chain)}
    rows = [
        (one.name, one.kind, f"{one.size:,}", f"{one.data:,}", f"{one.dirty:,}", _ms(one.seconds), one.sha256)
        for one in chain
    ]
    heads = ("file", "kind", "memory (bytes)", "data (bytes)", "pages", "time (ms)", "SHA-256 of the memory")
    kept = [at for at in range(len(heads)) if any(row[at] for row in rows)]
    table = Table(
        "The files, the oldest first",
        tuple(heads[at] for at in kept),
        tuple(tuple(row[at] for at in kept) for row in rows),
    )
    facts = {
        "files": f"{len(chain)}",
        "guest memory": f"{mib(chain[-1].size)} MiB",
        "data in all files": f"{mib(sum(one.data for one in chain))} MiB",
    }
    parts: list[Part] = [Chart("What each file holds", "MiB", "file", names, data), table]
    if any(one.seconds is not None for one in chain):
        times = tuple(None if one.seconds is None else one.seconds * 1e3 for one in chain)
        parts.insert(1, Chart("How long each took", "ms", "file", names, {"time": times}))
    note = "A differential file has data where pages were dirty since the file before it, and holes elsewhere."
    return Document(title, facts, tuple(parts), failure, note)


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:,.1f}"


# --- drawing -----------------------------------------------------------------------------------------------

_WIDE, _LEFT, _RIGHT, _TOP, _BASE = 360, 52, 350, 10, 150  # pixels, and those of the field


def _e(text: str) -> str:
    """Return a text for HTML; what can't be printed is escaped."""
    return html.escape("".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _part(part: Part, number: int) -> str:
    if isinstance(part, Table):
        return f'<section class="wide"><h2>{_e(part.title)}</h2>{_table(part)}</section>'
    if isinstance(part, Dial):
        return _dial(part, number)
    draw = _chart(part) if isinstance(part, Chart) else _map(part)
    head = f'<h2 id="p{number}">{_e(part.title)}</h2>'
    svg = (
        f'<svg viewBox="0 0 {_WIDE} {draw.height}" role="img" aria-labelledby="p{number} d{number}">'
        f'<desc id="d{number}">{_e(draw.says)}</desc>{"".join(draw.shapes)}</svg>'
    )
    legend = "".join(f'<li><span class="k{kind}"></span>{_e(name)}</li>' for name, kind in draw.legend)
    return (
        f"<section>{head}<figure>{svg}<figcaption><ul>{legend}</ul></figcaption></figure>"
        f"<details open><summary>The numbers</summary>{_table(part.table())}</details></section>"
    )


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{_e(each)}</th>' for each in table.heads)
    body = "".join("<tr>" + "".join(f"<td>{_e(cell)}</td>" for cell in row) + "</tr>\n" for row in table.rows)
    return f'<div class="table" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


class _Drawn:
    """Shapes of an SVG that grows, its height, what it says to those who can't see it, and its names and colours."""

    def __init__(self, height: float, says: str) -> None:
        self.height, self.says = height, says
        self.shapes: list[str] = []
        self.legend: list[tuple[str, str]] = []

    def text(self, x: float, y: float, text: str, anchor: str = "middle") -> None:
        self.shapes.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{_e(text)}</text>')

    def box(self, x: float, y: float, wide: float, high: float, kind: str) -> None:
        self.shapes.append(f'<rect class="k{kind}" x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{high:.1f}"/>')

    def path(self, points: Sequence[tuple[float, float]], kind: str) -> None:
        way = " ".join(f"{'L' if at else 'M'}{x:.1f} {y:.1f}" for at, (x, y) in enumerate(points))
        self.shapes.append(f'<path class="l{kind}" d="{way}"/>')


def _chart(chart: Chart) -> _Drawn:
    values = [value for series in chart.series.values() for value in series if value is not None]
    values += [chart.limit[1]] if chart.limit else []
    positive = [value for value in values if value > 0]
    log = chart.log and bool(positive)
    low, high = (min(positive) / 1.5, max(positive) * 1.5) if log else (0.0, max(values, default=0) * 1.05 or 1.0)

    def up(value: float) -> float:
        part = log10(max(value, low) / low) / log10(high / low) if log else value / high
        return _BASE - part * (_BASE - _TOP)

    said = "; ".join(
        f"{name}: "
        + ", ".join(
            f"{label} {_number(value)}" for label, value in zip(chart.labels, series, strict=True) if value is not None
        )
        for name, series in chart.series.items()
    )
    drawn = _Drawn(_BASE + 40, f"{chart.unit} over {chart.over}. {said}.")
    for tick in _ticks(low, high, log=log):
        drawn.path([(_LEFT, up(tick)), (_RIGHT, up(tick))], "grid")
        drawn.text(_LEFT - 5, up(tick) + 4, _number(tick), "end")
    step = (_RIGHT - _LEFT) / max(len(chart.labels), 1)
    every = -(-len(chart.labels) * max(map(len, (" ", *chart.labels))) // 42)  # labels that have room
    for at, label in enumerate(chart.labels):
        if at % every == 0:
            drawn.text(_LEFT + (at + 0.5) * step, _BASE + 15, label if len(label) < 24 else f"{label[:22]}…")
    drawn.text((_LEFT + _RIGHT) / 2, _BASE + 33, f"{chart.over} (up: {chart.unit})")
    for place, (name, series) in enumerate(chart.series.items()):
        drawn.legend.append((name, str(place)))
        shown = [(at, value) for at, value in enumerate(series) if value is not None]
        if chart.lines:
            points = [(_LEFT + (at + 0.5) * step, up(value)) for at, value in shown]
            if len(points) > 1:
                drawn.path(points, str(place))
            for x, y in points:
                drawn.box(x - 2.5, y - 2.5, 5, 5, str(place))
        else:
            wide = 0.8 * step / len(chart.series)
            for at, value in shown:
                x = _LEFT + (at + 0.1) * step + place * wide
                drawn.box(x, up(value), max(wide - 1, 0.5), _BASE - up(value), str(place))
    if chart.limit is not None:
        name, value = chart.limit
        drawn.path([(_LEFT, up(value)), (_RIGHT, up(value))], "limit")
        drawn.legend.append((f"{name}: {_number(value)} {chart.unit}", "limit"))
    drawn.path([(_LEFT, _BASE), (_RIGHT, _BASE)], "axis")
    return drawn


_SCRIPT = """<script>
for (const dial of document.querySelectorAll('.dial')) {
  const input = dial.querySelector('input'), section = dial.closest('section');
  dial.hidden = false;
  input.addEventListener('input', () => {
    for (const each of section.querySelectorAll('[data-at]'))
      each.toggleAttribute('hidden', each.dataset.at !== input.value);
    input.setAttribute('aria-valuetext', section.querySelector(`output[data-at="${input.value}"]`).textContent);
  });
}
</script>"""
"""Shows the place of each dial that its slider is at; the keyboard moves a slider by itself."""


def _dial(dial: Dial, number: int) -> str:
    """Return a dial: the curves of all its places, of which one is shown, and a slider for the script to use."""

    def at(place: int) -> str:
        return f'data-at="{place}"{"" if place == dial.chosen else " hidden"}'

    values = [each for place in dial.places for each in (*place.values, place.limit)]
    positive = [each for each in values if 0 < each < float("inf")] or [1.0]
    low, high = min(positive) / 1.5, max(positive) * 1.5
    left, right = dial.x[0] / 1.1, dial.x[-1] * 1.1

    def up(value: float) -> float:
        return _BASE - log10(min(max(value, low), high) / low) / log10(high / low) * (_BASE - _TOP)

    def along(value: float) -> float:
        return _LEFT + log10(value / left) / log10(right / left) * (_RIGHT - _LEFT)

    drawn = _Drawn(_BASE + 40, f"{dial.unit} over {dial.over}. {dial.places[dial.chosen].says}")
    for tick in _ticks(low, high, log=True):
        drawn.path([(_LEFT, up(tick)), (_RIGHT, up(tick))], "grid")
        drawn.text(_LEFT - 5, up(tick) + 4, _number(tick), "end")
    for tick in _ticks(left, right, log=True):
        drawn.text(along(tick), _BASE + 15, _number(tick))
    drawn.text((_LEFT + _RIGHT) / 2, _BASE + 33, f"{dial.over} (up: {dial.unit})")
    drawn.path([(_LEFT, _BASE), (_RIGHT, _BASE)], "axis")
    for place, each in enumerate(dial.places):
        drawn.shapes.append(f"<g {at(place)}>")
        drawn.path([(_LEFT, up(each.limit)), (_RIGHT, up(each.limit))], "limit")
        points = [(along(x), up(value)) for x, value in zip(dial.x, each.values, strict=True)]
        drawn.path(points, "1")
        for (x, y), good in zip(points, each.good, strict=True):
            if good:
                drawn.box(x - 2.5, y - 2.5, 5, 5, "1")
            else:  # another shape, too, for those who don't see the colours
                drawn.path([(x - 3, y - 3), (x + 3, y + 3)], "0")
                drawn.path([(x - 3, y + 3), (x + 3, y - 3)], "0")
        drawn.shapes.append("</g>")
    legend = "".join(
        f'<li><span class="k{kind}"></span>{_e(name)}</li>'
        for name, kind in ((dial.good, "1"), (f"{dial.bad} ({_CROSS.strip()})", "0"), (dial.dial, "limit"))
    )
    outputs = "".join(f"<output {at(place)}>{_e(each.label)}</output>" for place, each in enumerate(dial.places))
    says = "".join(f"<p {at(place)}>{_e(each.says)}</p>" for place, each in enumerate(dial.places))
    return (
        f'<section class="whole"><h2 id="p{number}">{_e(dial.title)}</h2>'
        f'<div class="dial" hidden><label for="i{number}">{_e(dial.dial)}:</label> {outputs}'
        f'<input id="i{number}" type="range" min="0" max="{len(dial.places) - 1}" step="1" value="{dial.chosen}" '
        f'aria-valuetext="{_e(dial.places[dial.chosen].label)}"></div><div aria-live="polite">{says}</div>'
        f'<figure><svg viewBox="0 0 {_WIDE} {drawn.height}" role="img" aria-labelledby="p{number} d{number}">'
        f'<desc id="d{number}">{_e(drawn.says)}</desc>{"".join(drawn.shapes)}</svg>'
        f"<figcaption><ul>{legend}</ul></figcaption></figure>"
        f"<details open><summary>The numbers;{_CROSS}: {_e(dial.bad)}</summary>"
        f"{_table(dial.table())}</details></section>"
    )


def _ticks(low: float, high: float, *, log: bool) -> list[float]:
    """Return round numbers from `low` to `high`, some four of them."""
    if log:
        first, last = int(np.floor(log10(low))), int(np.ceil(log10(high)))
        found = [digit * 10.0**power for power in range(first, last + 1) for digit in (1, 2, 5)]
        found = [tick for tick in found if low <= tick <= high]
        return found if len(found) <= 7 else [tick for tick in found if log10(tick) % 1 < 1e-9]
    size = 10.0 ** np.floor(log10(high / 4))
    size *= next(each for each in (1, 2, 5, 10) if high / (size * each) <= 6)
    return [float(tick) for tick in np.arange(0, high + size / 100, size)]


def _map(drawing: DirtyMap) -> _Drawn:
    row, top = 16, 4
    rows = list(drawing.rows.items())
    said = [f"{label}: {np.count_nonzero(cells)} of {cells.size} cells have dirty pages" for label, cells in rows]
    drawn = _Drawn(top + row * len(rows) + 24, f"By {drawing.over}. {'; '.join(said)}.")
    for at, (label, cells) in enumerate(rows):
        y = top + at * row
        drawn.text(_LEFT - 5, y + 12, label, "end")
        drawn.box(_LEFT, y, _RIGHT - _LEFT, row - 3, "clean")
        shades = np.ceil(_fewer(cells) * _SHADES).astype(np.int64)
        wide = (_RIGHT - _LEFT) / shades.size
        edges = np.flatnonzero(np.diff(shades, prepend=-1, append=-1))
        for start, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            if shades[start]:
                drawn.box(_LEFT + start * wide, y, (stop - start) * wide, row - 3, f"shade{shades[start]}")
    drawn.text((_LEFT + _RIGHT) / 2, top + row * len(rows) + 14, "guest memory, from its first page to its last")
    drawn.legend = [("clean", "clean")]
    drawn.legend += [(f"dirty up to {100 * shade // _SHADES} %", f"shade{shade}") for shade in range(1, _SHADES + 1)]
    return drawn


def _fewer(cells: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return cells that are no more than a row shows: each the mean of several, and none of a dirty one is clean."""
    if cells.size <= _CELLS:
        return cells
    starts = np.arange(_CELLS) * cells.size // _CELLS
    return np.asarray(np.add.reduceat(cells, starts) / np.diff(starts, append=cells.size), dtype=np.float32)
