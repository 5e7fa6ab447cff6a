"""Processes of this Python that begin at once: one that has imported everything is forked for each.

To import a command's libraries and to load its kernels costs more than all that a small migration does. Tests of how a
process begins, of what it imports or of its interpreter start one by `subprocess` itself. A process that was forked
forks for those that it starts.
"""

import atexit
import gc
import inspect
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Collection, Sequence
from ctypes import CDLL
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hwdbm import files, process
from hwdbm.cli import interrupt

_PR_SET_CHILD_SUBREAPER = 36
_LONGEST = 1 << 18  # bytes of a request
_PIPES = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
_OTHERS = (signal.SIGTERM, signal.SIGHUP)
_STREAMS: dict[str, Any] = {
    "stdin": {},
    "stdout": {"mode": "w"},
    "stderr": {"mode": "w", "buffering": 1, "errors": "backslashreplace"},
}
_ARGUMENTS = inspect.signature(subprocess.Popen._execute_child)


class Popen(subprocess.Popen):
    """`subprocess.Popen`, which forks where the command is this Python's, for a module or for code.

    There, warnings are errors. The process is a child of this one all the same.

    Parameters
    ----------
    closed : collection of int
        The standard streams that are closed when the process begins.
    compiled : bool
        Whether it has numba and the kernels too, or only what all commands import.
    """

    def __init__(self, *args: Any, closed: Collection[int] = (), compiled: bool = True, **options: Any) -> None:
        self._closed, self._compiled = list(closed), compiled
        super().__init__(*args, **options)

    def _execute_child(self, *args: Any) -> None:
        given = _ARGUMENTS.bind(self, *args).arguments
        python, *command = map(os.fspath, given["args"])
        while command[:1] in (["-P"], ["-W"], ["error"]):
            del command[0]
        if python != sys.executable or command[0] not in {"-c", "-m"} or given["pass_fds"] or given["preexec_fn"]:
            assert not self._closed
            super()._execute_child(*args)
            return
        environment = dict(os.environ if given["env"] is None else given["env"])
        where = str(given["cwd"] or os.curdir)
        ends = (given["p2cread"], given["c2pwrite"], given["errwrite"])
        streams = [number if end < 0 else end for number, end in enumerate(ends)]
        self.pid = self._fork(streams, command, where, environment, given["start_new_session"], self._closed)
        self._child_created = True
        self._close_pipe_fds(*(given[name] for name in _PIPES))

    def _fork(self, streams: list[int], command: list[str], where: str, *rest: Any) -> int:
        return _server(self._compiled).start(streams, command, str(Path(where).absolute()), *rest)


class _Nested(Popen):
    """The same in a process that was forked."""

    def _fork(self, *what: Any) -> int:
        reader, writer = os.pipe()
        with warnings.catch_warnings(action="ignore"):  # of its threads, which hold nothing that the other needs
            pid = os.fork()
        if not pid:
            forget()
            run_as(*what)
        os.close(writer)
        os.read(reader, 1)  # it is in its session: whoever kills it kills what it starts, too
        os.close(reader)
        return pid


MODULE = SimpleNamespace(**vars(subprocess) | {"Popen": Popen})
NESTED = SimpleNamespace(**vars(subprocess) | {"Popen": _Nested})
"""What a module that starts processes may have in place of `subprocess`, here and in a process that was forked."""


def run(command: Sequence[object], timeout: float = 60, **options: Any) -> "subprocess.CompletedProcess[str]":
    """Run a process to its end, and return its status and its output."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Popen(list(map(str, command)), **(pipes | options), text=True) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


class _Server:
    """The process that is forked; it ends with this one."""

    def __init__(self, compiled: bool) -> None:
        self._lock = threading.Lock()
        self._channel, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with there:  # threads and fork() don't go together
            command = [sys.executable, "-P", "-W", "error", __file__, str(there.fileno()), "compiled" * compiled]
            environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
            self._process = subprocess.Popen(command, pass_fds=[there.fileno()], env=environment)
        self._channel.recv(1)  # it has imported everything
        atexit.register(self._close)

    def _close(self) -> None:
        self._channel.close()
        self._process.wait()

    def start(self, streams: list[int], *what: Any) -> int:
        """Start a process, which is a child of this one, and return its id."""
        with self._lock:
            _take_orphans(yes=True)
            try:
                socket.send_fds(self._channel, [json.dumps(what).encode()], streams)
                answer = self._channel.recv(_LONGEST)
            finally:
                _take_orphans(yes=False)
        assert answer, "the process that is forked ended"
        return int(answer)


@cache
def _server(compiled: bool) -> _Server:
    return _Server(compiled)


def ready() -> None:
    """Return when processes begin at once; the first one waits for that too."""
    _server(compiled=True)


def _take_orphans(*, yes: bool) -> None:
    """Have processes below this one that lose their parent become this one's children, or else the system's first's."""
    CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(yes), 0, 0, 0)


# --- the process that is forked ------------------------------------------------------------------------------


def serve(channel: socket.socket) -> None:
    """Fork for each request, until nobody is left to ask."""
    while True:
        raw, streams, _, _ = socket.recv_fds(channel, _LONGEST, 3)
        if not raw:
            return
        reader, writer = os.pipe()
        between = os.fork()
        if not between:
            child = os.fork()
            if child:  # it loses its parent, and so is given to the process that asked
                os.write(writer, str(child).encode())
                os._exit(0)
            run_as(streams, *json.loads(raw))
        os.waitpid(between, 0)
        channel.send(os.read(reader, 64))
        for each in (reader, writer, *streams):
            os.close(each)


def run_as(
    streams: list[int], command: list[str], folder: str, environment: dict[str, str], session: bool, closed: list[int]
) -> None:
    """Be a process that was started with a command, in a folder, and with an environment."""
    if session:
        os.setsid()
    for number, stream in enumerate([os.dup(stream) for stream in streams]):
        os.dup2(stream, number)
    os.closerange(3, 1 << 20)
    for number in closed:
        os.close(number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # which was of another environment
    process.subprocess = NESTED
    # What they are depends on what is behind them: a terminal, a pipe, a file.
    for number, (name, mode) in enumerate(_STREAMS.items()):
        stream = None if number in closed else os.fdopen(number, closefd=False, **mode)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    how, what, *arguments = command
    sys.argv, status = ["-c" if how == "-c" else what, *arguments], 0
    try:
        if how == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:  # noqa: BLE001  # as the interpreter does
        traceback.print_exc()
        status = 1
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    os._exit(status)  # to take down an interpreter that was forked costs more than most tests


def forget() -> None:
    """Forget what belongs to the process that forked this one: what it answers signals with, and what it cleans up."""
    gc.freeze()  # nor may a file of its own be closed, whose number is another's here
    signal.set_wakeup_fd(-1)
    for number, default in ((signal.SIGINT, signal.default_int_handler), *((each, signal.SIG_DFL) for each in _OTHERS)):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, default)
    for kept in (process._children, files._named, files._scratch, interrupt._shown, interrupt._cleanups):
        kept.clear()


def import_everything(compiled: bool) -> None:
    """Import what all commands need, and load the kernels."""
    from hwdbm import kernels
    from hwdbm.cli import app

    commands = {name: entry.load(name) for name, entry in app._TASK.items()}
    commands["doctor"].make_context("doctor", [], resilient_parsing=True)  # imports what typer reads arguments with
    if compiled:
        kernels.warm_up()
    gc.collect()
    gc.freeze()


if __name__ == "__main__":
    import_everything(compiled=bool(sys.argv[2]))
    with socket.socket(fileno=int(sys.argv[1])) as channel_:
        channel_.send(b"x")
        serve(channel_)
