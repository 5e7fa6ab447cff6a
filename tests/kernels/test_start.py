"""Before the first kernel runs: what numba is told, what LLVM says of it, and what is called to be warm."""

import logging
import os
from types import SimpleNamespace
from typing import Any

import numba
import numpy as np
import pytest
from seen import as_seen

from hwdbm import kernels
from hwdbm.kernels import _numba

NAME = "'nope' is not a recognized processor for this target"
FEATURE = "'+nope' is not a recognized feature for this target"


def test_what_llvm_says_is_read_and_stderr_is_as_it_was(capfd: pytest.CaptureFixture[str]) -> None:
    assert _numba._said("nope", "").startswith(NAME)
    assert _numba._said("", "+nope").startswith(FEATURE)
    assert _numba._said("generic", "") == ""
    os.write(1, b"out")
    os.write(2, b"err")
    assert capfd.readouterr() == ("out", "err")


@pytest.mark.parametrize(
    ("name", "features", "left", "said"),
    [
        (None, None, (None, None), None),
        ("generic", None, ("generic", None), None),
        ("generic", "", ("generic", ""), None),
        ("nope", None, (None, None), NAME),
        (None, "+nope", (None, None), FEATURE),
        ("nope", "+nope", (None, None), NAME),
    ],
)
def test_what_llvm_does_not_know_is_dropped_once(
    name: str | None,
    features: str | None,
    left: tuple[str | None, str | None],
    said: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(_numba, "_ready", [])
    monkeypatch.setattr(numba.config, "CPU_NAME", name)
    monkeypatch.setattr(numba.config, "CPU_FEATURES", features)
    with caplog.at_level(logging.WARNING, "hwdbm"):
        _numba.ready()
        assert (numba.config.CPU_NAME, numba.config.CPU_FEATURES) == left
        monkeypatch.setattr(numba.config, "CPU_NAME", "nope")
        _numba.ready()
    start = "hwdbm: NUMBA_CPU_NAME and NUMBA_CPU_FEATURES are ignored: "
    assert [line.startswith(start + str(said)) for line in caplog.messages] == [True] * (said is not None)
    assert not any("\n" in line for line in caplog.messages)


def test_what_is_called_to_be_warm_was_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each function once or more, with something to do, and with a mask that can't be written."""
    lines: list[str] = []

    def shown(value: Any) -> str:
        if isinstance(value, np.ndarray) and value.dtype == np.uint64:
            return f"{value.size} {'words' if value.flags.writeable else 'constants'}: {value.any()}"
        return repr(value.tolist() if isinstance(value, np.ndarray) else value)

    class Recorder(SimpleNamespace):
        def __getattr__(self, name: str) -> Any:
            return lambda *arguments: lines.append(f"{name}({', '.join(map(shown, arguments))})")

    monkeypatch.setattr(kernels, "active", Recorder)
    kernels.warm_up()
    assert {line.partition("(")[0] for line in lines} == {n for n in vars(kernels.Kernels) if not n.startswith("_")}
    as_seen("kernels/warm_up.txt", "\n".join(lines) + "\n")
