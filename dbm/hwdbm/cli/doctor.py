"""``hwdbm doctor``: what this machine can do, and what to install for what is missing."""

import os
import platform
import resource
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from errno import EACCES, EPERM
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

import hwdbm
from hwdbm import files
from hwdbm.cli import options
from hwdbm.cli.streams import json_text, result, wrapped
from hwdbm.process import python

_MISMATCH = 3  # the exit status
_SECONDS = 5.0  # that a program has to say its version
_CAPS = (
    "MANUAL_DIRTY_LOG_PROTECT2",
    "DIRTY_LOG_RING",
    "DIRTY_LOG_RING_ACQ_REL",
    "NR_MEMSLOTS",
)
_FILES = 256  # open files that a migration with rings and an Arm machine get by with

EPILOG = """Nothing is compiled, downloaded or changed. Without NAME the exit status is 0, whatever is missing.

Examples:

  All of it:

\b
    hwdbm doctor

  Whether the compiled kernels can be had: exit status 3 if not.

\b
    hwdbm doctor kernels

  For a program:

\b
    hwdbm doctor --json
"""


@dataclass(frozen=True, slots=True)
class _Found:
    """A part of the machine, and whether hwdbm can use it.

    Parameters
    ----------
    usable : bool
        Whether what it is for works.
    found : str
        What is there, or why it can't be used.
    advice : str
        What to do for it; empty where it is usable.
    """

    usable: bool
    found: str
    advice: str = ""


def _distribution(name: str, module: str, extra: str) -> _Found:
    """Look for a library, without importing it."""
    advice = f"pip install 'hwdbm[{extra}]'"
    if find_spec(module) is None:
        return _Found(False, f"{name} isn't installed", advice)
    try:
        return _Found(True, f"{name} {version(name)}")
    except PackageNotFoundError:
        return _Found(True, f"{name}, of unknown version")


def _kernels() -> _Found:
    numba = _distribution("numba", "numba", "jit")
    if not numba.usable:
        return _Found(False, f"{numba.found}: harvests use NumPy, and RAM can't be cleaned in place", numba.advice)
    if os.environ.get("NUMBA_DISABLE_JIT", "0") not in {"", "0"}:
        return _Found(False, f"{numba.found}, but NUMBA_DISABLE_JIT switches it off", "unset NUMBA_DISABLE_JIT")
    cache = _numba_cache()
    if cache is None:
        return _Found(
            True,
            f"{numba.found}, whose code can't be kept: each start compiles for seconds",
            "set NUMBA_CACHE_DIR to a folder that can be written",
        )
    compiled = sum(1 for _ in cache.rglob("*.nbi")) if cache.is_dir() else 0
    return _Found(True, f"{numba.found}; {compiled} functions compiled, in {cache}")


def _numba_cache() -> Path | None:
    """Return the folder that numba keeps compiled code in; None if it has none."""
    named = os.environ.get("NUMBA_CACHE_DIR")
    folders = [Path(named) if named else Path(hwdbm.__file__).parent / "kernels" / "__pycache__"]
    caches = files.caches()
    if not named and caches is not None:
        folders.append(caches / "numba")
    for folder in folders:
        there = next(each for each in (folder, *folder.parents) if each.exists())
        if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
            return folder
    return None


def _kvm() -> _Found:
    from hwdbm.kvm import Kvm, KvmUnavailableError  # noqa: PLC0415  # what only this needs
    from hwdbm.kvm.abi import Cap  # noqa: PLC0415

    try:
        with Kvm() as kvm:
            caps = {name: kvm.check_extension(Cap[name]) for name in _CAPS}
    except KvmUnavailableError as error:
        denied = error.errno in {EACCES, EPERM}
        advice = (
            "let this user open /dev/kvm: the group kvm may"
            if denied
            else "run it on an x86_64 host, or in a VM with nested virtualisation, with KVM loaded (modprobe kvm_intel)"
        )
        return _Found(False, str(error.strerror), advice)
    has = [name for name, value in caps.items() if value]
    lacks = [name for name, value in caps.items() if not value]
    return _Found(True, f"has {', '.join(has) or 'none'}" + (f"; lacks {', '.join(lacks)}" if lacks else ""))


def _program(names: tuple[str, ...], package: str) -> _Found:
    """Look for a program, and have it say its version."""
    for name in names:
        path = shutil.which(name)
        if path is not None:
            try:
                said = subprocess.run(  # noqa: S603  # a program of the user's own path
                    [path, "--version"], check=False, capture_output=True, text=True, errors="replace",
                    stdin=subprocess.DEVNULL, timeout=_SECONDS,
                )  # fmt: skip
            except (OSError, subprocess.TimeoutExpired) as error:
                return _Found(False, f"{path} doesn't say its version: {error}", f"apt-get install {package}")
            if said.returncode:
                return _Found(False, f"{path} fails with status {said.returncode}", f"apt-get install {package}")
            first = (said.stdout or said.stderr).partition("\n")[0].strip()
            return _Found(True, f"{path}: {first}")
    return _Found(False, f"there is no {' or '.join(names)}", f"apt-get install {package} (the name is Debian's)")


def _qemu() -> _Found:
    return _program(("qemu-system-aarch64",), "qemu-system-arm")


def _compiler() -> _Found:
    from hwdbm.arm.build import COMPILERS  # noqa: PLC0415  # what only this needs

    return _program(COMPILERS, "gcc-aarch64-linux-gnu")


def _huge_pages() -> _Found:
    folder, says = Path("/sys/kernel/mm/transparent_hugepage"), []
    for name in ("enabled", "shmem_enabled"):
        try:
            words = (folder / name).read_text(encoding="ascii").split()
        except OSError:
            continue
        says += [f"{name}: {word.strip('[]')}" for word in words if word.startswith("[")]
    usable = any(each in says for each in ("enabled: always", "enabled: madvise"))
    advice = "" if usable else f"echo madvise > {folder}/enabled: large arrays are read faster by huge pages"
    return _Found(usable, ", ".join(says) or "this kernel has no transparent huge pages", advice)


def _memory() -> _Found:
    facts = {}
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        facts[name] = int(value.split()[0])  # KiB, or a number of pages
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    free, limit = facts["MemAvailable"] >> 10, "" if soft == resource.RLIM_INFINITY else f", {soft >> 20} MiB a process"
    usable = free >= 1 << 10 and (soft == resource.RLIM_INFINITY or soft >= 4 << 30)
    return _Found(
        usable,
        f"{free} MiB available of {facts['MemTotal'] >> 10} MiB{limit}",
        "" if usable else "give migrations a smaller --memory: a guest of 1G is there twice; ulimit -v unlimited",
    )


def _limits() -> _Found:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    usable = files == resource.RLIM_INFINITY or files >= _FILES
    most = "unlimited" if files == resource.RLIM_INFINITY else f"{files}"
    amount = "unlimited" if locked == resource.RLIM_INFINITY else f"{locked >> 10} KiB of"
    said = f"{most} open files, {amount} locked memory, {len(os.sched_getaffinity(0))} processors"
    return _Found(usable, said, "" if usable else f"ulimit -n {_FILES} or more")


CHECKS: dict[str, tuple[str, Callable[[], _Found]]] = {
    "kernels": ("harvests at the speed of memory", _kernels),
    "plot": ("pictures: --plot FILE, --report FILE.png", lambda: _distribution("matplotlib", "matplotlib", "plot")),
    "checksum": ("a fast checksum of migrations", lambda: _distribution("zlib-ng", "zlib_ng", "migrate")),
    "cores": ("ELF cores of guests, as QEMU dumps them", lambda: _distribution("pyelftools", "elftools", "qemu")),
    "traces": ("write traces: hwdbm record", lambda: _distribution("zarr", "zarr", "trace")),
    "fleet": (
        "forecasts of thousands of VMs: hwdbm fleet",
        lambda: _distribution("distributed", "distributed", "fleet"),
    ),
    "testing": ("hwdbm.testing", lambda: _distribution("hypothesis", "hypothesis", "testing")),
    "kvm": ("real guests: --source kvm", _kvm),
    "qemu": ("emulated Arm machines: --source arm", _qemu),
    "compiler": ("the firmware of Arm machines", _compiler),
    "huge-pages": ("large arrays", _huge_pages),
    "memory": ("guests", _memory),
    "limits": ("many guests, vCPUs and rings", _limits),
}
"""What each check is for, and the check."""


def doctor(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME",
            autocompletion=options.words(CHECKS),
            help=f"What is asked for: {', '.join(CHECKS)}; all by default.",
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Say what this machine can do, and what to install for what is missing.

    Exit status 3 says that something that was named can't be used.
    """
    unknown = sorted(set(names or ()) - set(CHECKS))
    if unknown:
        raise typer.BadParameter(f"there is no check {', '.join(map(repr, unknown))}: there are {', '.join(CHECKS)}")
    findings = {name: check() for name, (_, check) in CHECKS.items() if not names or name in names}
    about = {
        "hwdbm": hwdbm.__version__,
        "python": platform.python_version(),
        "executable": python()[0],
        "kernel": platform.release(),
        "architecture": platform.machine(),
    }
    result(json_text(about | {"checks": _records(findings)}) if as_json else _text(about, findings))
    if names and not all(finding.usable for finding in findings.values()):
        raise typer.Exit(_MISMATCH)


def _records(findings: dict[str, _Found]) -> list[dict[str, Any]]:
    records = []
    for name, finding in findings.items():
        record = {"name": name, "for": CHECKS[name][0], "usable": finding.usable, "found": finding.found}
        records.append(record | ({"advice": finding.advice} if finding.advice else {}))
    return records


def _text(about: dict[str, str], findings: dict[str, _Found]) -> str:
    lines = [f"hwdbm {about['hwdbm']}, Python {about['python']}, Linux {about['kernel']}, {about['architecture']}"]
    size = max(map(len, findings))
    for name, each in findings.items():
        head = f"{'yes' if each.usable else 'NO':<3}  {name:<{size}}  "
        lines += wrapped(head + each.found, len(head))
        if each.advice:
            lines += wrapped(f"{'':<{len(head)}}for {CHECKS[name][0]}: {each.advice}", len(head))
    return "\n".join(lines)
