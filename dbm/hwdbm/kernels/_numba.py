"""Having numba start wherever the process is: it is imported here first, before any kernel is compiled."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_log = logging.getLogger("hwdbm")
_ready: list[bool] = []


def ready() -> None:
    """Import numba; what the environment asks of LLVM and LLVM doesn't know is dropped, with one line in the log.

    LLVM would ignore it too, but say so on stderr for each module that is compiled.
    """
    if _ready:
        return
    with _no_coverage_without_folder():
        import numba  # noqa: PLC0415
    config: Any = numba.config
    if config.CPU_NAME or config.CPU_FEATURES:
        said = _said(config.CPU_NAME or "", config.CPU_FEATURES or "")
        if said:
            config.CPU_NAME = config.CPU_FEATURES = None
            _log.warning("hwdbm: NUMBA_CPU_NAME and NUMBA_CPU_FEATURES are ignored: %s", said.partition("\n")[0])
    _ready.append(True)


@contextmanager
def _no_coverage_without_folder() -> Iterator[None]:
    """Hide coverage, which numba imports where it is, if the current folder was deleted: it can't be imported then."""
    try:
        Path.cwd()
    except FileNotFoundError:
        if "coverage" not in sys.modules:
            sys.modules["coverage"] = None  # type: ignore[assignment]
            try:
                yield
            finally:
                del sys.modules["coverage"]
            return
    yield


def _said(name: str, features: str) -> str:
    """Return what LLVM says on stderr of a processor and features."""
    from llvmlite import binding  # noqa: PLC0415

    binding.initialize_native_target()
    target = binding.Target.from_default_triple()
    sys.stderr.flush()
    stderr, pipe = os.dup(2), os.memfd_create("stderr")
    try:
        os.dup2(pipe, 2)
        target.create_target_machine(cpu=name, features=features)
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        said = os.pread(pipe, os.fstat(pipe).st_size, 0).decode(errors="replace")
        os.close(pipe)
    return said
