"""The typer application that the commands are put together in. A command's module is imported when it is called."""

import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from io import StringIO
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

import hwdbm
from hwdbm.cli.streams import Verbatim, error_line, result

_USAGE = 2  # the exit status
# typer brings a click of its own since 0.16, without public names for what it raises.
_UsageError: type[Any] = next(each for each in typer.BadParameter.__mro__ if each.__name__ == "ClickException")

_WIDEST, _NARROW = 100, 60  # columns of help; with less, a definition stands below its term
_HELP = {"help_option_names": ["-h", "--help"], "max_content_width": _WIDEST}


def _help(command: Any, context: Any) -> str:
    """Return a command's help, which fits the terminal whatever its width, and names no type of Python."""
    formatter = context.make_formatter()
    formatter.width = max(min(shutil.get_terminal_size().columns, _WIDEST) - 2, 20)
    write_dl, write_text = formatter.write_dl, formatter.write_text

    def write(rows: Sequence[tuple[str, str]]) -> None:
        named = [(re.sub(r" <[^>]*>$", "", term), text) for term, text in rows]
        write_dl(named, 30 if formatter.width >= _NARROW else 4)

    def write_even(text: str) -> None:  # click keeps the spaces that a paragraph's further lines begin with
        paragraphs = text.split("\n\n")
        write_text("\n\n".join(p if "\b" in p else re.sub(r"(?<=\S)\n +", "\n", p) for p in paragraphs))

    formatter.write_dl, formatter.write_text = write, write_even
    command.format_help(context, formatter)
    return str(formatter.getvalue()).rstrip("\n")


class _Command(TyperCommand):
    def get_help(self, ctx: Any) -> str:
        return _help(self, ctx)

    def get_short_help_str(self, limit: int = _WIDEST) -> str:
        return super().get_short_help_str(max(limit, _WIDEST))  # it is wrapped, and not cut


class _Group(TyperGroup):
    def summary(self, ctx: Any, name: str) -> str:
        command: Any = self.get_command(ctx, name)
        return str(command.get_short_help_str())

    def get_help(self, ctx: Any) -> str:
        return _help(self, ctx)

    def get_short_help_str(self, limit: int = _WIDEST) -> str:
        return super().get_short_help_str(max(limit, _WIDEST))


# --- the commands ------------------------------------------------------------------------------------------


def _command(name: str) -> Any:
    """Return the command whose module, function and examples have its name."""
    module = import_module(f"hwdbm.cli.{name}")
    alone = _typer()
    alone.command(name, cls=_Command, epilog=module.EPILOG, context_settings=_HELP)(getattr(module, name))
    return typer.main.get_command(alone)


def _group(name: str) -> Any:
    """Return the group of commands whose module has its name."""
    group = _typer(name=name, help=_TASK[name].summary, no_args_is_help=True)
    group.callback()(lambda: None)
    for verb, (function, epilog) in import_module(f"hwdbm.cli.{name}").COMMANDS.items():
        group.command(verb, cls=_Command, epilog=epilog, context_settings=_HELP)(function)
    return typer.main.get_command(group)


def _typer(**options: Any) -> typer.Typer:
    # No rich markup: help and errors stay plain text, in pipes as on a terminal.
    return typer.Typer(
        cls=_Group,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings=_HELP,
        **options,
    )


@dataclass(frozen=True, slots=True)
class Entry:
    """A command, or a group of commands, in the list of `hwdbm` alone.

    Parameters
    ----------
    summary : str
        What it does: the first sentence of its help.
    load : callable
        Called with the name, returns the click command; imports what it needs.
    """

    summary: str
    load: Callable[[str], Any] = _command


TASKS: dict[str, dict[str, Entry]] = {
    "See which pages were dirtied": {
        "harvest": Entry("Find the dirty pages of each memslot of an image."),
        "inspect": Entry("Show an image's registers, tables, leaves and slots."),
        "bitmap": Entry("Show, compare, combine, rescale and convert dirty bitmaps.", _group),
    },
    "Move a VM that runs": {
        "migrate": Entry("Migrate a VM that keeps writing, live, to another process."),
        "receive": Entry("Wait for one migration, take the VM over, and let it run."),
    },
    "Foresee a migration": {
        "record": Entry("Record which pages a VM writes in each interval, into a trace."),
        "trace": Entry("Show what write traces say.", _group),
        "plan": Entry("Forecast whether a migration will converge, what it will take, and what it would need."),
        "watch": Entry("Watch a QEMU that migrates, and renew the forecast at each pass."),
        "fleet": Entry("Drain a host or a rack: order, concurrency and shares of the links, by forecast."),
    },
    "Keep a VM in files": {
        "snapshot": Entry("Keep, check, merge and restore chains of snapshots of guest memory.", _group),
    },
    "Be sure of it": {
        "races": Entry("Explore every order in which vCPUs, harvests and failures can interleave."),
        "bench": Entry("Measure the engine, and the stream of a migration, here and now."),
    },
    "Set it up": {
        "doctor": Entry("Say what this machine can do, and what to install for what is missing."),
        "completion": Entry("Print a script that completes commands, options and values in a shell."),
    },
}
"""The commands by task, in the order of the help."""

_TASK = {name: entry for entries in TASKS.values() for name, entry in entries.items()}

_EPILOG = """The help of each command ends with examples: 'hwdbm harvest -h'. An error that
ends with '(docs: PAGE)' means docs/PAGE.md in hwdbm's sources.

Examples:

  The dirty pages of a capture that hwdbm brings, and whether they are right:

\b
    hwdbm harvest example:4k_ipa40 --check

  A VM of 64 MiB that keeps writing, moved to another process:

\b
    hwdbm migrate --memory 64M
"""


class _Tasks(_Group):
    """The commands by task. None is imported to list them."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.commands: dict[str, Any] = dict.fromkeys(_TASK)  # for typer's "did you mean"

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        del ctx
        return _TASK[cmd_name].load(cmd_name) if cmd_name in _TASK else None

    def summary(self, ctx: Any, name: str) -> str:
        del ctx
        return _TASK[name].summary

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        del ctx
        for task, entries in TASKS.items():
            with formatter.section(task):
                formatter.write_dl([(name, entry.summary) for name, entry in entries.items()])


app = _typer(epilog=_EPILOG, invoke_without_command=True)
app.info.cls = _Tasks


def _version(value: bool) -> None:
    if value:
        typer.echo(f"hwdbm {hwdbm.__version__}")
        raise typer.Exit


@app.callback()
def common(
    context: typer.Context,
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
    if context.invoked_subcommand is None:
        result(Verbatim(context.get_help()))


def run() -> int:
    """Run the command that this process was called with, and return its exit status; wrong usage is 2."""
    try:
        status = app(prog_name="hwdbm", standalone_mode=False)
    except _UsageError as error:
        said = StringIO()
        error.show(said)
        for line in said.getvalue().splitlines():
            error_line(line)
        return _USAGE
    except SystemExit:
        if "_HWDBM_COMPLETE" not in os.environ:  # by which a shell asks typer
            raise
        return _USAGE  # typer has said what is wrong with what it was asked
    return status if isinstance(status, int) else 0
