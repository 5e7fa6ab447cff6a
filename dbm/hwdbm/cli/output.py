"""Writing: tables of text and numbers for people, progress on a terminal."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Never

import typer
from rich.console import Console
from rich.markup import escape

from hwdbm.cli import interrupt
from hwdbm.cli.streams import note, width, wrapped
from hwdbm.image.reader import Visitor
from hwdbm.image.walk import Batch

_EVERY = 10.0  # seconds between two lines of a log


def hexadecimal(value: int) -> str:
    """Return an address or a register as ``0x%016x``."""
    return f"{value:#018x}"


def milliseconds(seconds: float) -> str:
    """Return a limit as it was given, in ms: without a fraction where it has none."""
    return f"{round(seconds * 1e3, 3):,}".removesuffix(".0")


def columns(rows: Sequence[Sequence[object]], left: Sequence[int] = (0,), units: Sequence[str] = ()) -> str:
    """Return rows as text in columns, the first row being the heads.

    Parameters
    ----------
    rows : sequence of sequences
        All of the same length; their elements are printed with `str`.
    left : sequence of int
        The columns that are aligned to the left; the others, of numbers, are to the right.
    units : sequence of str
        The unit of each column, or nothing. They stand below the heads, and behind them where the table is turned.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    upright = [cells[0], list(units), *cells[1:]] if units else cells
    widths = [max(map(len, column)) for column in zip(*upright, strict=True)]
    if sum(widths) + 2 * (len(widths) - 1) > width():
        heads = [f"{head} {unit}".rstrip() for head, unit in zip(cells[0], units or [""] * len(widths), strict=True)]
        return _turned([heads, *cells[1:]])
    lines = (
        "  ".join(
            cell.ljust(size) if i in left else cell.rjust(size)
            for i, (cell, size) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in upright
    )
    return "\n".join(lines)


def _turned(cells: list[list[str]]) -> str:
    """Return a table that is too wide for the screen with a column for each row, if that fits."""
    columns = [list(column) for column in zip(*cells, strict=True)]
    widths = [max(map(len, row)) for row in cells]
    if sum(widths) + 2 * (len(widths) - 1) > width():
        return _records(cells)
    return "\n".join(
        "  ".join(
            cell.rjust(size) if i else cell.ljust(size) for i, (cell, size) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in columns
    )


def _records(cells: list[list[str]]) -> str:
    """Return a table that is too wide for the screen as a line for each cell that isn't empty."""
    heads, *rows = cells
    longest = max(map(len, heads))
    return "\n\n".join(
        "\n".join(
            line
            for head, cell in zip(heads, row, strict=True)
            if cell
            for line in wrapped(f"{head:<{longest}}  {cell}", longest + 2)
        )
        for row in rows
    )


def warn(message: str) -> None:
    """Print a warning on stderr."""
    note(f"warning: {message}")


def leave() -> Never:
    """End a command that an interrupt ended early, and which has cleaned up and said what it did."""
    note("interrupted")
    raise typer.Exit(interrupt.INTERRUPTED) from None


@contextmanager
def busy(what: str) -> Iterator[Callable[[str], object]]:
    """Show on stderr what takes a while: on a terminal all the time, elsewhere in a line now and then.

    Yields
    ------
    callable
        Shows another text.
    """
    console = Console(file=sys.stderr, stderr=True)
    if not console.is_terminal:
        told = time.monotonic()

        def tell(text: str) -> None:
            nonlocal told
            if time.monotonic() - told >= _EVERY:
                told = time.monotonic()
                note(text)

        yield tell
        return
    with interrupt.shown(), console.status(escape(what)) as status:
        yield lambda text: status.update(escape(text))


@contextmanager
def progress(what: str) -> Iterator[list[Visitor]]:
    """Show on stderr how many bytes of tables have been read.

    Yields
    ------
    list
        The visitors to pass to `hwdbm.image.Image.read` for it.
    """
    done = 0
    with busy(f"reading {what}") as update:

        def count(batch: Batch) -> None:
            nonlocal done
            done += batch.entries.nbytes
            update(f"reading {what}: {done / (1 << 20):,.0f} MiB of tables")

        yield [count]
