"""What `hwdbm doctor` says of machines that lack something."""

import json
import os
import time
from pathlib import Path

import pytest

from hwdbm.cli import doctor


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")


HERE = {name: doctor.CHECKS[name][1] for name in doctor.CHECKS}


def test_it_changes_nothing_and_is_quick(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    result = run("doctor")
    assert (result.status, result.err) == (0, "")
    assert [line.split()[1] for line in result.out.splitlines() if line.startswith(("yes", "NO "))] == [*HERE]
    assert not list(tmp_path.iterdir())


def test_programs_that_are_missing(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    result = run("doctor", "qemu", "compiler")
    assert result.status == 3
    assert "NO   qemu      there is no qemu-system-aarch64\n" in result.out
    assert "for emulated Arm machines: --source arm: apt-get install qemu-system-arm" in result.out
    assert "apt-get install gcc-aarch64-linux-gnu" in result.out
    assert run("doctor").status == 0  # nothing was asked for


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("exit 1", "qemu-system-aarch64 fails with status 1"),
        ("sleep 60", "doesn't say its version"),
        ("echo 'version 9'", "version 9"),
    ],
)
def test_programs_that_are_odd(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, said: str) -> None:
    program = tmp_path / "qemu-system-aarch64"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(doctor, "_SECONDS", 0.3)
    began = time.monotonic()
    assert said in run("doctor", "qemu").out
    assert time.monotonic() - began < 30  # it is not waited for


def test_numba(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "new"))
    assert f"0 functions compiled, in {tmp_path}/new" in run("doctor", "kernels").out
    (tmp_path / "file").touch()
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "file"))
    assert "whose code can't be kept" in run("doctor", "kernels").out
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    result = run("doctor", "kernels")
    assert (result.status, "unset NUMBA_DISABLE_JIT" in result.out) == (3, True)
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    result = run("doctor", "kernels", "plot", "--json")
    assert result.status == 3
    assert [each["advice"] for each in json.loads(result.out)["checks"]] == [
        "pip install 'hwdbm[jit]'",
        "pip install 'hwdbm[plot]'",
    ]


def test_no_kvm(run, monkeypatch: pytest.MonkeyPatch) -> None:
    from hwdbm import kvm
    from hwdbm.errors import KvmUnavailableError

    def kernel(code: int, text: str) -> None:
        def opened() -> None:
            raise KvmUnavailableError(code, text)

        monkeypatch.setattr(kvm, "Kvm", opened)

    kernel(13, "/dev/kvm: not allowed")
    denied = run("doctor", "kvm")
    assert denied.status == 3
    assert "NO   kvm  /dev/kvm: not allowed\n" in denied.out
    assert "the group kvm may" in denied.out
    kernel(2, "/dev/kvm: none")
    lacking = run("doctor", "kvm")
    assert lacking.status == 3
    assert "nested virtualisation" in lacking.out


def test_there_is_no_such_check(run) -> None:
    result = run("doctor", "kvm", "luck")
    assert (result.status, result.out) == (2, "")
    assert "there is no check 'luck'" in " ".join(result.err.split())
