"""Run pytest in forks of a process that has imported what all tests need, but not the package; run.py starts this.

A request is a line of JSON, pytest's arguments and the seconds that it may take. The answer is another: its status,
null where it took too long, and what it wrote.
"""

import contextlib
import importlib
import json
import os
import signal
import sys
import tempfile
import time

import pytest

# Third-party only, so that each fork imports the mutant. numexpr is left out: it starts threads, which a fork loses.
PRELOADED = ("numpy.testing", "numpy.random", "numba", "llvmlite.binding", "bitarray.util", "asyncio", "json", "ssl")
PRELOADED += ("typer.testing", "rich.console", "rich.table", "rich.progress", "rich.markdown", "unittest.mock")


def run(arguments: list[str], seconds: float) -> tuple[int | None, str]:
    """Run pytest in a fork, in a session of its own; whatever that leaves running is killed."""
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if child == 0:
            os.setsid()
            for stream, fd in ((os.open(os.devnull, os.O_RDONLY), 0), (output.fileno(), 1), (output.fileno(), 2)):
                os.dup2(stream, fd)
            sys.exit(pytest.main(arguments))
        end, status = time.monotonic() + seconds, None
        while time.monotonic() < end:
            done, code = os.waitpid(child, os.WNOHANG)
            if done:
                status = os.waitstatus_to_exitcode(code)
                break
            time.sleep(0.01)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        if status is None:
            os.waitpid(child, 0)
        output.seek(0)
        return status, output.read().decode(errors="replace")


def main() -> None:
    """Answer requests until their end."""
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    requests = os.fdopen(os.dup(0), "r")
    for request in requests:
        print(json.dumps(run(*json.loads(request))), file=answers)


if __name__ == "__main__":
    main()
