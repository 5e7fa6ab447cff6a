"""Writing: tables of text and numbers for people, progress on a terminal, files that are whole."""

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console

from hwdbm.image.reader import Visitor
from hwdbm.image.walk import Batch

__all__ = ["columns", "hexadecimal", "progress", "size_name", "warn", "write_whole"]


def hexadecimal(value: int) -> str:
    """Return an address or a register as ``0x%016x``."""
    return f"{value:#018x}"


def size_name(size: int) -> str:
    """Return bytes as people write them, where that is exact: ``4K``, ``2M``.

    Examples
    --------
    >>> size_name(4096), size_name(1 << 30), size_name(0x1800), size_name(100)
    ('4K', '1G', '6K', '100')
    """
    for shift, suffix in ((40, "T"), (30, "G"), (20, "M"), (10, "K")):
        if size and size % (1 << shift) == 0:
            return f"{size >> shift}{suffix}"
    return str(size)


def columns(rows: Sequence[Sequence[object]], left: Sequence[int] = (0,)) -> str:
    """Return rows as text in columns, the first row being the heads.

    Parameters
    ----------
    rows : sequence of sequences
        All of the same length; their elements are printed with `str`.
    left : sequence of int
        The columns that are aligned to the left; the others, of numbers, are to the right.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = (
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )
    return "\n".join(lines)


def warn(message: str) -> None:
    """Print a warning on stderr."""
    typer.echo(f"hwdbm: warning: {message}", err=True)


@contextmanager
def progress(what: str) -> Iterator[list[Visitor]]:
    """Show on stderr, if that is a terminal, how many bytes of tables have been read.

    Yields
    ------
    list
        The visitors to pass to `hwdbm.image.Image.read` for it: none where nobody looks.
    """
    console = Console(file=sys.stderr, stderr=True)
    if not console.is_terminal:
        yield []
        return
    done = 0
    with console.status(f"reading {what}") as status:

        def count(batch: Batch) -> None:
            nonlocal done
            done += batch.entries.nbytes
            status.update(f"reading {what}: {done / (1 << 20):,.0f} MiB of tables")

        yield [count]


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all; folders are made as needed.

    Raises
    ------
    OSError
        If it can't be written, with the name of the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        temporary = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _umask() -> int:
    """Return the process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
