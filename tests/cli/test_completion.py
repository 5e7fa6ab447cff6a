"""What a shell is offered for the last word of a line, and that the scripts are ones that their shells take."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from hwdbm.cli.app import app


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("hwdbm har", ["harvest"]),
        ("hwdbm --ver", ["--version"]),
        ("hwdbm snapshot reb", ["rebase"]),
        ("hwdbm -h snapshot reb", ["rebase"]),
        ("hwdbm snapshot --help reb", ["rebase"]),
        ("hwdbm harvest --pol", ["--policy"]),
        ("hwdbm harvest --policy ", ["dbm", "writable"]),
        ("hwdbm harvest --policy w", ["writable"]),
        ("hwdbm harvest --policy=w", ["--policy=writable"]),
        ("hwdbm harvest --policy dbm --polic", []),
        ("hwdbm harvest --slot 0:0:4K --slo", ["--slot"]),
        ("hwdbm harvest example:k", ["example:kvm-6.1"]),
        ("hwdbm harvest 'a b' example:k", ["example:kvm-6.1"]),
        ("hwdbm harvest 'example:k", ["example:kvm-6.1"]),
        ("hwdbm harvest --check example:k", ["example:kvm-6.1"]),
        ("hwdbm harvest ", []),
        ("hwdbm inspect example:16k_ipa40 example:", []),
        ("hwdbm inspect --plot map", []),
        ("hwdbm migrate --source ", ["machine", "kvm", "arm"]),
        ("hwdbm migrate --source kvm --on-limit p", ["pause"]),
        ("hwdbm migrate --kvm-log i", ["initially-set"]),
        ("hwdbm migrate --mode ", ["hw-dbm", "write-protect"]),
        ("hwdbm migrate --workload zi", ["zipf"]),
        ("hwdbm receive --vm a", ["arm"]),
        ("hwdbm receive --until", []),
        ("hwdbm bench bl", ["blocks"]),
        ("hwdbm bench harvest bl", ["blocks"]),
        ("hwdbm races no-dsb-b", ["no-dsb-before-tlbi"]),
        ("hwdbm doctor kvm qe", ["qemu"]),
        ("hwdbm completion z", ["zsh"]),
        ("hwdbm nothing ", []),
        ("hwdbm nothing of this ", []),
    ],
)
def test_offered(run, line: str, offered: list[str]) -> None:
    result = run("completion", "--line", line)
    assert (result.status, result.err) == (0, "")
    assert [each.partition("\t")[0] for each in result.out.splitlines()] == offered


@pytest.mark.parametrize("line", ["", "hwdbm", "hwdbm ", "hwdbm -", "hwdbm 'x", 'hwdbm "', "hwdbm \\", "=", "a --="])
def test_any_line(run, line: str) -> None:
    result = run("completion", "--line", line)
    assert (result.status, result.err) == (0, "")


def test_meanings(run) -> None:
    assert run("completion", "--line", "hwdbm insp").out == (
        "inspect\tShow an image's registers, tables, leaves and slots.\n"
    )


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script(run, shell: str, tmp_path: Path) -> None:
    result = run("completion", shell)
    assert result.status == 0
    if program := shutil.which(shell):
        script = tmp_path / "script"
        script.write_text(result.out)
        done = subprocess.run([program, "-n", script], check=False, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


def test_every_value_that_is_a_word_is_completed(run) -> None:
    """Of each option and argument whose help says which words it takes, all of these."""
    found = 0

    def look(command: Any, name: str) -> None:
        nonlocal found
        for each in command.list_commands(None) if hasattr(command, "list_commands") else ():
            look(command.get_command(None, each), f"{name} {each}")
        for parameter in command.params:
            words = (parameter.metavar or "").strip("[]").split("|")
            if len(words) > 1 and all(re.fullmatch("[a-z0-9-]+", word) for word in words):
                before = f"{parameter.opts[0]} " if parameter.param_type_name == "option" else ""
                assert run("completion", "--line", f"{name} {before}").out.split() == words, name
                found += 1

    look(typer.main.get_command(app), "hwdbm")
    assert found > 8


def test_no_shell(run) -> None:
    assert "name a shell: bash, zsh, fish" in run("completion").err
    assert run("completion", "csh").status == 2


@pytest.mark.slow
def test_bash_itself(run, tmp_path: Path) -> None:
    """bash ends words at ':' and '=', and completes files where nothing is offered."""
    (tmp_path / "script").write_text(run("completion", "bash").out)
    ask = (
        ". ./script; ask() { COMP_LINE=$1 COMP_POINT=${#1}; _hwdbm_completion; printf '%s|' \"${COMPREPLY[@]}\"; }\n"
        "ask 'hwdbm harvest example:4k_b'; ask 'hwdbm migrate --source=k'; ask 'hwdbm harvest scr'; complete -p hwdbm"
    )
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", ask], check=True, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PATH": path}
    )
    assert done.stdout == "4k_blocks|kvm||complete -o bashdefault -o default -F _hwdbm_completion hwdbm\n"


@pytest.mark.parametrize("instruction", ["nope", "bash_source"])
def test_a_wrong_instruction_for_typer_is_no_bug(instruction: str) -> None:
    """It says what is wrong with it on its own."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "hwdbm", "doctor"], env=os.environ | {"_HWDBM_COMPLETE": instruction},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "please report it" not in done.stderr
    assert len(done.stderr.splitlines()) == 1
