"""What `hwdbm doctor` says of machines that lack something."""

import json
import os
import resource
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from seen import as_seen

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


def test_what_numba_keeps_is_counted(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/one.nbi", "a/one.1.nbc", "a/two.nbi", "b/three.nbi"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    assert f"3 functions compiled, in {tmp_path}\n" in run("doctor", "kernels").out


@pytest.mark.parametrize("stream", ["", ">&2"])
def test_a_program_s_version_is_its_first_line(
    run, stream: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of stderr where stdout says nothing."""
    program = tmp_path / "qemu-system-aarch64"
    program.write_text(f"#!/bin/sh\necho ' version 9' {stream}\necho 'for all' {stream}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert run("doctor", "qemu").out.splitlines()[1:] == [f"yes  qemu  {program}: version 9"]


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


LIMITS = ((4096, 65536), (256, 1 << 20), (255, 1023), (257, -1), (-1, 0))  # open files, and bytes locked in memory
HUGE = ("always [madvise] never", "[always] madvise never", "always madvise [never]", None)
SHMEM = ("always within_size advise [never] deny force", "[advise] never", None, None)


def machines(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Yield what is found on machines with other memory, limits, huge pages and kernels, around each edge."""
    limits: dict[int, int] = {}
    monkeypatch.setattr(doctor, "Path", lambda name: folder / Path(name).name)
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda which: (limits[which], 0))
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda _: {1, 2, 3})
    for free, most in ((1 << 20, -1), ((1 << 20) - 1, -1), (1 << 22, 4 << 30), (1 << 22, (4 << 30) - 1), (5, 5 << 30)):
        (folder / "meminfo").write_text(f"MemTotal:  {5 << 20} kB\nMemAvailable: {free} kB\nHugePages_Total:  0\n")
        limits[resource.RLIMIT_AS] = most
        yield f"{free} KiB, {most}: {doctor._memory()}"
    for limits[resource.RLIMIT_NOFILE], limits[resource.RLIMIT_MEMLOCK] in LIMITS:
        yield f"{limits[resource.RLIMIT_NOFILE]}, {limits[resource.RLIMIT_MEMLOCK]}: {doctor._limits()}"
    (folder / "transparent_hugepage").mkdir()
    for texts in zip(HUGE, SHMEM, strict=True):
        for name, text in zip(("enabled", "shmem_enabled"), texts, strict=True):
            (folder / "transparent_hugepage" / name).unlink(missing_ok=True)
            if text is not None:
                (folder / "transparent_hugepage" / name).write_text(text)
        yield f"{texts}: {doctor._huge_pages()}"


def test_what_is_found_on_other_machines_was_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(f"{line}\n" for line in machines(tmp_path, monkeypatch))
    as_seen("asked/doctor.txt", text.replace(str(tmp_path), "FOLDER"))


@pytest.mark.parametrize("lacking", [[], ["NR_MEMSLOTS"], None])
def test_what_a_kernel_has(run, lacking: list[str] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    from hwdbm import kvm
    from hwdbm.kvm.abi import Cap

    has = [name for name in doctor._CAPS if lacking is not None and name not in lacking]
    asked = SimpleNamespace(check_extension=lambda cap: int(Cap(cap).name in has))
    monkeypatch.setattr(kvm, "Kvm", lambda: nullcontext(asked))
    lacks = [name for name in doctor._CAPS if name not in has]
    said = f"has {', '.join(has) or 'none'}" + (f"; lacks {', '.join(lacks)}" if lacks else "")
    result = run("doctor", "kvm")
    assert (result.status, result.out.splitlines()[1:]) == (0, [f"yes  kvm  {said}"])


def test_there_is_no_such_check(run) -> None:
    result = run("doctor", "kvm", "luck")
    assert (result.status, result.out) == (2, "")
    assert "there is no check 'luck'" in " ".join(result.err.split())
