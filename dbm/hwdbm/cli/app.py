"""The typer application that the commands are put together in."""

from contextlib import suppress
from typing import Annotated, Any

import typer

import hwdbm
from hwdbm.cli import bench, harvest, inspect, migrate, receive, snapshot

__all__ = ["app", "run"]

_USAGE = 2  # the exit status
# typer brings a click of its own since 0.16, without public names for what it raises.
_UsageError: type[Any] = next(each for each in typer.BadParameter.__mro__ if each.__name__ == "ClickException")

_HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 100}

# No rich markup: help and errors stay plain text, in pipes as on a terminal.
app = typer.Typer(
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
app.command(epilog=harvest.EPILOG, context_settings=_HELP)(harvest.harvest)
app.command(epilog=inspect.EPILOG, context_settings=_HELP)(inspect.inspect)
app.command(epilog=bench.EPILOG, context_settings=_HELP)(bench.bench)
app.command(epilog=migrate.EPILOG, context_settings=_HELP)(migrate.migrate)
app.command(epilog=receive.EPILOG, context_settings=_HELP)(receive.receive)

snapshots = typer.Typer(no_args_is_help=True, rich_markup_mode=None, context_settings=_HELP)
snapshots.command(epilog=snapshot.EPILOG, context_settings=_HELP)(snapshot.rebase)
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
