"""Processes of our own: they run the installed package, whatever the current folder holds, and end with the command."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

__all__ = ["child", "kill_children", "python"]

_GRACE = 10.0  # seconds that a child has to end by itself
_DYING = 1.0  # seconds that one has that was killed

_children: set["subprocess.Popen[Any]"] = set()


def python(*args: str) -> list[str]:
    """Return the command that runs this Python with `args`, importing nothing from the current folder.

    Examples
    --------
    >>> python("-m", "hwdbm", "receive")[1:]
    ['-P', '-m', 'hwdbm', 'receive']
    """
    return [sys.executable, "-P", *args]


@contextmanager
def child(command: Sequence[str], grace: float = _GRACE, **options: Any) -> Iterator["subprocess.Popen[Any]"]:
    """Start a process in a session of its own, so that an interrupt from the keyboard is for its parent alone.

    When the block ends, the process has `grace` seconds to end too; then it is killed.

    Parameters
    ----------
    command : sequence of str
        The program and its arguments; `python` returns one for this Python.
    grace : float
        Seconds.
    **options
        Further arguments of `subprocess.Popen`.

    Yields
    ------
    subprocess.Popen
        The process.
    """
    with subprocess.Popen(command, start_new_session=True, **options) as process:  # noqa: S603  # ourselves
        _children.add(process)
        try:
            yield process
        finally:
            try:
                process.wait(grace)
            except subprocess.TimeoutExpired:
                process.kill()
            _children.discard(process)


def kill_children() -> None:
    """Kill what `child` started and hasn't ended, with all that it started: for a command that ends at once."""
    for process in list(_children):
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        # Without a limit it would wait for a lock, which this thread may have where a signal interrupted it.
        with suppress(subprocess.TimeoutExpired):
            process.wait(_DYING)
