"""stdout and stderr, which may be closed, full, or a pipe without a reader.

A result that stdout can't take is a failure of the command, unless the command did something: that stays done, and is
not called failed. What stderr can't take is lost.
"""

import json
import os
import sys
from contextlib import suppress
from io import TextIOWrapper
from typing import Any

from hwdbm.errors import printable


class StdoutError(Exception):
    """stdout can't be written."""


class _Stdout(TextIOWrapper):
    """A stdout whose errors can't be taken for those of a file, nor be silenced on their way."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            raise StdoutError(f"stdout can't be written: {error.strerror}") from error

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            raise StdoutError(f"stdout can't be written: {error.strerror}") from error


def prepare() -> None:
    """Make both streams usable: a closed one must not become the number of the next file that is opened."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            # Reading from stdin and writing to stdout stay errors; what goes to stderr is dropped.
            os.open(os.devnull, os.O_RDONLY if fd == 1 else os.O_WRONLY)
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    if type(sys.stdout) is TextIOWrapper:  # and not what a test put there
        encoding, lines = sys.stdout.encoding, sys.stdout.line_buffering
        # A file's name may be any bytes, and any locale must do.
        sys.stdout = _Stdout(sys.stdout.detach(), encoding, "backslashreplace", line_buffering=lines)


def tame() -> None:
    """Have warnings, logs, and what fails in a finalizer or a thread be one line each, the libraries' too.

    And keep the libraries to what this is for.
    """
    import logging  # noqa: PLC0415  # an interrupt is answered first
    import threading  # noqa: PLC0415
    import warnings  # noqa: PLC0415

    class Notes(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            note(record.getMessage().removeprefix("hwdbm: "))

    def show(message: Warning | str, *_: object, **__: object) -> None:
        note(f"warning: {str(message).strip().partition(chr(10))[0]}")

    def show_error(args: Any) -> None:
        if args.exc_type is not SystemExit:  # by which a thread ends
            note(f"warning: {args.exc_type.__name__}: {args.exc_value}")

    if not sys.flags.dev_mode:
        sys.unraisablehook = threading.excepthook = show_error
    logging.lastResort = Notes(logging.WARNING)
    warnings.showwarning = show
    # Pictures go into files: what matplotlib would have in windows, or keep from one run to the next, is no matter.
    os.environ.pop("MPLBACKEND", None)
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    for name in ("COLUMNS", "LINES"):  # which the libraries believe, whatever they hold
        value = os.environ.get(name, "")
        if not (value.isascii() and value.isdigit() and 0 < int(value[:5]) < 10_000):
            os.environ.pop(name, None)


def width(descriptor: int = 1) -> int:
    """Return the columns of stdout, or of stderr (2), 20 or more: COLUMNS says it first, and 80 is what a file has."""
    with suppress(KeyError, ValueError):
        return max(int(os.environ["COLUMNS"]), 20)
    try:
        return max(os.get_terminal_size(descriptor).columns or 80, 20)
    except OSError:
        return 80


def wrapped(line: str, indent: int = 0, columns: int = 0) -> list[str]:
    """Return a line as several that fit `columns`, or those of stdout; a word that doesn't stays whole.

    All but the first are indented by `indent` spaces, or by 2 where a word wouldn't fit after them.
    """
    columns = columns or width()
    if len(line) <= columns:
        return [line]
    from textwrap import wrap  # noqa: PLC0415  # an interrupt is answered first

    after = " " * (indent if indent + max(map(len, line.split()), default=0) <= columns else 2)
    return wrap(line, columns, subsequent_indent=after, break_long_words=False, break_on_hyphens=False) or [line]


class Verbatim(str):
    """Text for programs or to copy, whose lines are never wrapped."""

    __slots__ = ()


def json_text(value: Any, indent: int | None = 2) -> Verbatim:
    """Return a value as the JSON that commands print; in one line without an `indent`."""
    return Verbatim(json.dumps(value, indent=indent))


def result(text: str, done: str = "") -> None:
    """Print a command's result.

    Parameters
    ----------
    text : str
        One line or several. What is too wide for the columns of stdout is wrapped, unless it is `Verbatim`.
    done : str
        What the command did, be it told or not: "the migration completed".

    Raises
    ------
    StdoutError
        If stdout can't take it, and nothing was done.
    """
    lines = [printable(line) for line in text.split("\n")]
    if not isinstance(text, Verbatim):
        lines = [part for line in lines for part in wrapped(line, len(line) - len(line.lstrip()) + 2)]
    try:
        sys.stdout.write("".join(f"{line}\n" for line in lines))
        sys.stdout.flush()
    except StdoutError as error:
        if not done:
            raise
        note(f"{done}, but {error}")


def note(message: str) -> None:
    """Print one line on stderr, with the command's name."""
    error_line(f"hwdbm: {printable(' '.join(message.split()))}")


def error_line(line: str) -> None:
    """Print a line on stderr: on a terminal as several that fit it, elsewhere whole, for who looks for it in a log."""
    with suppress(OSError):
        lines = wrapped(line, 2, width(2)) if sys.stderr.isatty() else [line]
        sys.stderr.write("".join(f"{each}\n" for each in lines))
        sys.stderr.flush()


def finish() -> None:
    """Drop what a stream couldn't take: Python would try again at its end, and exit with 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, StdoutError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
