"""The live display of a migration, on stderr, if that is a terminal."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from hwdbm.migration import Report

__all__ = ["display", "megabytes"]

_PASSES = 12  # that are shown, the last ones


@contextmanager
def display() -> Iterator[Callable[[Report], None]]:
    """Yield what to call with the report now and then."""
    console = Console(file=sys.stderr, stderr=True)
    if not console.is_terminal:
        yield lambda _: None
        return
    with Live(console=console, refresh_per_second=8, transient=True) as live:

        def tell(report: Report) -> None:
            live.update(_picture(report))

        yield tell


def megabytes(size: float) -> str:
    """Return bytes as a number of MiB, or GiB where there are many.

    Examples
    --------
    >>> megabytes(3 << 20), megabytes(5 << 30)
    ('3.0 MiB', '5.00 GiB')
    """
    return f"{size / (1 << 30):.2f} GiB" if size >= 1 << 30 else f"{size / (1 << 20):.1f} MiB"


def _picture(report: Report) -> Table:
    table = Table(title=f"{report.status}, {report.total_time:.1f} s", title_justify="left", box=None)
    for head in ("pass", "dirty", "remaining", "dirty rate", "bandwidth", "expected downtime", ""):
        table.add_column(head, justify="right")
    for one in report.passes[-_PASSES:]:
        current = one is report.passes[-1] and report.status in {"active", "device"}
        remaining = report.remaining if current else 0
        table.add_row(
            str(one.number),
            megabytes(one.remaining),
            megabytes(remaining) if current else "",
            f"{one.dirty_rate / (1 << 20):,.1f} MiB/s" if one.dirty_rate else "",
            f"{one.bandwidth / (1 << 20):,.1f} MiB/s" if one.time else "",
            f"{one.expected_downtime * 1e3:,.0f} ms" if one.expected_downtime is not None else "",
            ProgressBar(total=one.remaining or 1, completed=one.remaining - remaining, width=24),
        )
    return table
