"""The typer application that the commands are put together in."""

import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

import hwdbm
from hwdbm.cli import bench, harvest, inspect, migrate, races, receive, snapshot

_USAGE = 2  # the exit status
# typer brings a click of its own since 0.16, without public names for what it raises.
_UsageError: type[Any] = next(each for each in typer.BadParameter.__mro__ if each.__name__ == "ClickException")

_WIDEST, _NARROW = 100, 60  # columns of help; with less, a definition stands below its term
_HELP = {"help_option_names": ["-h", "--help"], "max_content_width": _WIDEST}


def _help(command: Any, context: Any) -> str:
    """Return a command's help, which fits the terminal whatever its width, and names no type of Python."""
    formatter = context.make_formatter()
    formatter.width = max(min(shutil.get_terminal_size().columns, _WIDEST) - 2, 20)
    write_dl = formatter.write_dl

    def write(rows: Sequence[tuple[str, str]]) -> None:
        named = [(re.sub(r" <[^>]*>$", "", term), text) for term, text in rows]
        write_dl(named, 30 if formatter.width >= _NARROW else 4)

    formatter.write_dl = write
    command.format_help(context, formatter)
    return str(formatter.getvalue()).rstrip("\n")


class _Command(TyperCommand):
    def get_help(self, ctx: Any) -> str:
        return _help(self, ctx)

    def get_short_help_str(self, limit: int = 0) -> str:
        return super().get_short_help_str(max(limit, _WIDEST))  # it is wrapped, and not cut


class _Group(TyperGroup):
    def get_help(self, ctx: Any) -> str:
        return _help(self, ctx)

    def get_short_help_str(self, limit: int = 0) -> str:
        return super().get_short_help_str(max(limit, _WIDEST))


# No rich markup: help and errors stay plain text, in pipes as on a terminal.
app = typer.Typer(
    cls=_Group,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings=_HELP,
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"hwdbm {hwdbm.__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[  # what it does is done by its callback
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Which pages a virtual machine dirtied, read from its Arm stage-2 tables.

    Results go to stdout, everything else to stderr. Exit status: 0 all is well, 1 failure,
    2 wrong usage, 3 a check found a mismatch, 130 interrupted.
    """
    del version


# One module a command, with its function and its examples.
app.command(cls=_Command, epilog=harvest.EPILOG, context_settings=_HELP)(harvest.harvest)
app.command(cls=_Command, epilog=inspect.EPILOG, context_settings=_HELP)(inspect.inspect)
app.command(cls=_Command, epilog=bench.EPILOG, context_settings=_HELP)(bench.bench)
app.command(cls=_Command, epilog=migrate.EPILOG, context_settings=_HELP)(migrate.migrate)
app.command(cls=_Command, epilog=receive.EPILOG, context_settings=_HELP)(receive.receive)
app.command(cls=_Command, epilog=races.EPILOG, context_settings=_HELP)(races.races)

snapshots = typer.Typer(cls=_Group, no_args_is_help=True, rich_markup_mode=None, context_settings=_HELP)
snapshots.command(cls=_Command, epilog=snapshot.EPILOG, context_settings=_HELP)(snapshot.rebase)
app.add_typer(snapshots, name="snapshot", help="Files of guest memory, and differences between them.")


def run() -> int:
    """Run the command that this process was called with, and return its exit status; wrong usage is 2."""
    try:
        status = app(prog_name="hwdbm", standalone_mode=False)
    except _UsageError as error:
        with suppress(OSError):
            error.show()
        return _USAGE
    return status if isinstance(status, int) else 0
