"""Running the command in this process."""

import signal
import sys
import threading
from collections.abc import Callable
from math import inf
from typing import Any, NamedTuple

import forked
import pytest
import typer

from hwdbm import process
from hwdbm.cli import interrupt, main, migrate, output


class Result(NamedTuple):
    """What a command left behind."""

    status: int
    out: str
    err: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Return a function that runs ``hwdbm`` with arguments."""

    # The command leaves its own handlers behind, and a thread, as its process is about to end.
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.setattr(interrupt, "nudge", lambda: None)
    monkeypatch.setattr(process, "subprocess", forked.MODULE)
    # What a log is told now and then would be told here where a machine is slow.
    monkeypatch.setattr(output, "_EVERY", inf)
    monkeypatch.setattr(migrate, "_NOW_AND_THEN", inf)

    def run_(*args: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["hwdbm", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as raised:
            main()
        code = raised.value.code
        out, err = capsys.readouterr()
        return Result(0 if code is None else int(code), out, err)

    return run_


def examples() -> dict[str, list[list[str]]]:
    """Return the examples of each help, by the command's name: blocks of command lines that belong together."""
    from hwdbm.cli.app import app

    found: dict[str, list[list[str]]] = {}

    def collect(command: Any, name: str) -> None:
        text = (command.epilog or "").partition("Examples:")[2].replace("\n        ", " ")
        blocks = text.split("\b\n")[1:]
        found[name] = [[line.strip() for line in block.partition("\n\n")[0].splitlines()] for block in blocks]
        for each in command.list_commands(None) if hasattr(command, "list_commands") else ():
            collect(command.get_command(None, each), f"{name} {each}".removeprefix("hwdbm "))

    collect(typer.main.get_command(app), "hwdbm")
    return {name: blocks for name, blocks in found.items() if name not in {"snapshot", "bitmap", "trace"}}
