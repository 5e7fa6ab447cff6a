"""The command as a process: help, version, missing extras, what goes where."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import hwdbm
from hwdbm.cli import parse
from hwdbm.cli.output import columns

ODD = Path(__file__).parents[1] / "data" / "captures" / "4k_ipa40" / "round1.npz"
MAIN = "from hwdbm.cli import main; main()"


def process(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-W", "error", "-c", code, *map(str, args)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)


def test_version(run) -> None:
    result = run("--version")
    assert (result.status, result.out) == (0, f"hwdbm {hwdbm.__version__}\n")


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["bench", "--repeat", "x"], "'--repeat': 'x' is no whole number of 1 or more"),
        (["bench", ""], "there is no benchmark ''"),
        (["inspect", ""], "'IMAGE': the path is empty"),
        (["inspect", ODD, "--plot", ""], "'--plot': the path is empty"),
        (["snapshot", "rebase", "", "x"], "'BASE': the path is empty"),
        (["snapshot", "rebase", "x", ""], "'DIFF': the path is empty"),
    ],
)
def test_wrong_usage(run, args, why) -> None:
    result = run(*args)
    assert (result.status, result.out) == (2, "")
    assert why in " ".join(result.err.split())


COMMANDS = [[], ["harvest"], ["inspect"], ["bench"], ["migrate"], ["receive"], ["snapshot"], ["snapshot", "rebase"]]


@pytest.mark.parametrize("args", [["--help"], ["-h"], ["harvest", "--help"], ["inspect", "-h"]])
def test_help(run, args: list[str]) -> None:
    result = run(*args)
    assert (result.status, result.err) == (0, "")
    assert "Usage: hwdbm" in result.out
    assert "\x1b" not in result.out
    if len(args) == 2:
        assert f"    hwdbm {args[0]} " in result.out.partition("Examples:")[2]


def test_examples_of_the_help_run(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that need no more than a capture, as they stand there."""
    from hwdbm.cli import harvest, inspect

    monkeypatch.chdir(tmp_path)
    for name in ("round1.npz", "guest.npz"):
        (tmp_path / name).write_bytes(ODD.read_bytes())
    lines = (harvest.EPILOG + inspect.EPILOG).splitlines()
    commands = [line.split()[1:] for line in lines if line.strip().startswith("hwdbm") and ".npz" in line]
    assert len(commands) == 5
    for command in commands:
        assert run(*command).status == 0, command
    assert (tmp_path / "round1.png").exists()
    assert (tmp_path / "dirty" / "slot2.bitmap").exists()


@pytest.mark.parametrize("columns", [40, 59, 80, 200])
def test_help_fits(run, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is cut, nothing is a type of Python; only commands to copy are longer than a narrow screen."""
    monkeypatch.setenv("COLUMNS", str(columns))
    for args in COMMANDS:
        out = run(*args, "--help").out
        text, _, examples = out.partition("Examples:")
        for line in [*text.splitlines(), *(each for each in examples.splitlines() if each[:6].strip())]:
            assert len(line) <= columns, args
        assert columns < 80 or max(map(len, examples.splitlines()), default=0) <= columns, args
        assert "..." not in out.partition("Commands:")[2]
        assert not re.search(r"<(?!ID|IMAGE)", out), args


def test_no_command(run) -> None:
    result = run()
    assert result.status == 2
    assert "harvest" in result.out + result.err


def test_process() -> None:
    done = process(MAIN, "harvest", ODD, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    done = process(MAIN, "harvest", ODD.parent)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"hwdbm: {ODD.parent}: Is a directory\n"


@pytest.mark.parametrize(
    ("missing", "extra", "args"),
    [
        ("typer", "cli", ["--help"]),
        ("rich", "cli", ["--help"]),
        ("matplotlib", "plot", ["inspect", ODD, "--plot", "x.png"]),
    ],
)
def test_missing_extra(missing: str, extra: str, args: list[object], tmp_path: Path) -> None:
    hide = f"import os, sys; os.chdir({str(tmp_path)!r}); sys.modules[{missing!r}] = None; "
    done = process(hide + MAIN, *args)
    assert done.returncode == 1
    assert f"isn't installed: pip install 'hwdbm[{extra}]'" in done.stderr
    assert missing in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_module_of_our_own_is_no_missing_extra() -> None:
    done = process("import sys; sys.modules['hwdbm.cli.app'] = None; " + MAIN)
    assert "ModuleNotFoundError" in done.stderr


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4096", 4096),
        ("4k", 4096),
        ("4KiB", 4096),
        ("2MB", 2 << 20),
        ("0.5G", 1 << 29),
        ("1T", 1 << 40),
        (" 8K ", 8192),
        ("0x10", 16),
    ],
)
def test_size(text: str, size: int) -> None:
    assert parse.size(text) == size


@pytest.mark.parametrize("text", ["", "K", "4X", "4 K", "-4K", "1.0001K", "0x4K", "1e3"])
def test_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="is not a"):
        parse.size(text)


def test_columns() -> None:
    assert columns([["a", "n"], ["long", 1], ["b", 20]]) == "a      n\nlong   1\nb     20"
