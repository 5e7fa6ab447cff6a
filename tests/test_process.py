"""Processes of our own end with the block that started them, or with the command: none is left, nor what it started."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from hwdbm import process


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(("script", "grace", "status"), [("exit 3", 20.0, 3), ("sleep 60", 0.0, -signal.SIGKILL)])
def test_a_child_ends_by_itself_or_is_killed(script: str, grace: float, status: int) -> None:
    with process.child(["sh", "-c", script], grace) as child:
        assert child in process._children
        assert os.getpgid(child.pid) == child.pid
    assert (child.returncode, process._children) == (status, set())


def test_a_block_that_raises_leaves_no_child() -> None:
    with pytest.raises(ZeroDivisionError), process.child(["sleep", "60"], 0.0) as child:
        _ = 1 // 0
    assert child.returncode == -signal.SIGKILL
    assert not process._children


def test_a_command_that_ends_kills_its_children_and_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    """But no process that has ended, whose number may be another's by now."""
    killed, kill = list[int](), os.killpg
    monkeypatch.setattr(os, "killpg", lambda pid, number: killed.append(pid) or kill(pid, number))  # type: ignore[func-returns-value]
    with (
        process.child(["sh", "-c", "sleep 60 & echo $!; wait"], stdout=subprocess.PIPE, text=True) as one,
        process.child(["true"]) as two,
    ):
        assert one.stdout is not None
        grandchild = int(one.stdout.readline())
        two.wait(20)
        process.kill_children()
        assert (one.returncode, two.returncode, killed) == (-signal.SIGKILL, 0, [one.pid])
    until = time.monotonic() + 20
    while lives(grandchild):
        assert time.monotonic() < until
        time.sleep(0.01)
