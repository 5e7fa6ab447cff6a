"""What importing the package doesn't do, and what compiled code leaves on disk: each in a process of its own."""

import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import hwdbm
from hwdbm.kernels import _cache, atomic, fused

SOURCE = Path(hwdbm.__file__).parents[1]

IMPORT = """
import os, sys, threading
import bitarray, numpy  # numpy's own libraries may start threads

class Unread(dict):
    def __getattribute__(self, name):
        raise AssertionError(f"the environment was read: {name}")

    __getitem__ = __contains__ = __iter__ = __getattribute__

threads = os.listdir("/proc/self/task")
os.environ = Unread()
import hwdbm
assert os.listdir("/proc/self/task") == threads and threading.active_count() == 1, "a thread was started"
print(sorted({name.partition(".")[0] for name in sys.modules} & {"llvmlite", "numba"}))
"""

COMPILE = """
from hwdbm.kernels import fused, warm_up
warm_up()
for name in sorted(name for name in vars(fused) if hasattr(getattr(fused, name), "stats")):
    stats = getattr(fused, name).stats
    if stats.cache_path:
        print(name, sum(stats.cache_hits.values()), sum(stats.cache_misses.values()))
"""
NAMES = (
    "_change_at",
    "_exchange",
    "_exchange_at",
    "_fill",
    "_find",
    "_rewrite",
    "_rewrite_all",
    "_rewrite_at",
    "_rewrite_within",
    "_scan",
    "_set_at",
)
WORK = """
import hwdbm
hwdbm.kernels.warm_up()
s2 = hwdbm.Stage2(130)
s2.map(0, 130, 0, dbm=True)
s2.level(3)[128] |= hwdbm.pte.S2AP_W
print(hwdbm.kernels.current(), s2.harvest().pages())
"""


def run(program: str, source: Path = SOURCE) -> list[str]:
    """Run a program with warnings as errors, and return the lines that it printed."""
    done = start(program, source)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def start(program: str, source: Path = SOURCE, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-W", "error", "-c", program],
        env={name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
        | {"PYTHONPATH": str(source)}
        | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_importing_starts_nothing() -> None:
    assert run(IMPORT) == ["[]"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("os.getenv('OMP_NUM_THREADS'); import hwdbm", "the environment was read: get"),
        ("import hwdbm; threading.Thread(target=threading.Event().wait, daemon=True).start()", "a thread was started"),
        ("import hwdbm; sys.modules['numba.core'] = None", "numba"),
    ],
)
def test_check_of_imports_catches(change: str, text: str) -> None:
    with pytest.raises(AssertionError, match=text):
        assert run(IMPORT.replace("import hwdbm", change)) == ["[]"]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Return the folder of a copy of the package, with its compiled code, which this process has imported."""
    shutil.copytree(SOURCE / "hwdbm", tmp_path / "hwdbm")
    cache = tmp_path / "hwdbm" / "kernels" / "__pycache__"
    shutil.copytree(fused._scan.stats.cache_path, cache, dirs_exist_ok=True)
    return tmp_path


def test_compiled_code_is_cached(copy: Path) -> None:
    """A process that doesn't find some compiles that, and the next one finds all."""
    for path in copy.rglob("fused._fill-*"):
        path.unlink()
    assert run(COMPILE, copy) == [f"{name} 0 1" if name == "_fill" else f"{name} 1 0" for name in NAMES]
    assert run(COMPILE, copy) == [f"{name} 1 0" for name in NAMES]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def altered(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0x55
    path.write_bytes(raw)


def of_another_version(path: Path) -> None:
    path.write_bytes(pickle.dumps("0.1") + b"what is no pickle")


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("kind", "damage"),
    [
        ("nbi", cut),
        ("nbc", altered),
        *(
            pytest.param(kind, damage, marks=pytest.mark.slow)
            for kind, damage in (
                ("nbi", lambda path: path.write_bytes(b"")),
                ("nbi", lambda path: path.write_bytes(b"not a pickle")),
                ("nbi", of_another_version),
                ("nbi", a_folder),
                ("nbc", lambda path: path.write_bytes(b"")),
                ("nbc", cut),
                ("nbc", a_folder),
                ("nbc", Path.unlink),
            )
        ),
    ],
)
@pytest.mark.alike(2)
def test_a_damaged_cache(copy: Path, kind: str, damage: Callable[[Path], object]) -> None:
    for path in copy.rglob(f"fused._fill-*.{kind}"):
        damage(path)
    done = start(WORK, copy)
    assert (done.returncode, done.stdout) == (0, "fused [128]\n"), done.stderr
    assert len(done.stderr.splitlines()) <= 1


def test_a_cache_that_is_a_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    done = start(WORK, NUMBA_CACHE_DIR=str(file))
    assert (done.returncode, done.stdout) == (0, "fused [128]\n"), done.stderr
    assert len(done.stderr.splitlines()) <= 1, "another folder will do"


@pytest.mark.parametrize("name", ["XDG_CACHE_HOME", "HOME"])
def test_what_lies_in_the_current_folder_is_no_cache(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled code is unpickled and run; of a user without a home numba looked for it in a folder called ~ here."""
    for each in ("XDG_CACHE_HOME", "NUMBA_CACHE_DIR"):
        monkeypatch.delenv(each, raising=False)

    def places() -> list[str]:
        return [each.__name__.lstrip("_") for each in _cache._Places(_cache.compiled)._locator_classes]

    plain = places()
    assert "UserWideCacheLocator" in plain
    monkeypatch.setenv(name, "~")
    assert places() == [each for each in plain if each != "UserWideCacheLocator"]
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    monkeypatch.delenv(name)
    assert "UserWideCacheLocator" not in places()


BROKEN = """
import numba
numba.njit = lambda *args, **kwargs: 1 / 0
"""


def test_vector_takes_over_from_what_cannot_be_compiled() -> None:
    done = start(BROKEN + WORK)
    assert (done.returncode, done.stdout) == (0, "vector [128]\n"), done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "'vector' takes over" in done.stderr


def test_compiled_functions_let_other_threads_run() -> None:
    """Those that Python calls; what they call is compiled into them."""
    called = [
        each for module in (fused, atomic) for each in vars(module).values() if not getattr(each, "_can_compile", True)
    ]
    assert len(called) > 20
    assert all(each.targetoptions["nogil"] for each in called)
