"""NewFile: whole or not at all, with and without a file system that has unnamed files."""

import os
import signal
import subprocess
import sys
from errno import EINVAL, EISDIR, ENOENT, EOPNOTSUPP
from pathlib import Path

import pytest

from hwdbm.newfile import NewFile


@pytest.fixture(params=["unnamed", "named"])
def _kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "named":
        real = os.open

        def open_(path: str, flags: int, *args: int, **options: int) -> int:
            if flags & os.O_TMPFILE == os.O_TMPFILE:
                raise OSError(EOPNOTSUPP, "no unnamed files here")
            return real(path, flags, *args, **options)

        monkeypatch.setattr(os, "open", open_)


pytestmark = pytest.mark.usefixtures("_kind")


def held(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def descriptors() -> int:
    return len([*Path("/proc/self/fd").iterdir()])


@pytest.mark.parametrize("before", [None, b"what was there, and is longer"])
def test_it_appears_whole(tmp_path: Path, before: bytes | None) -> None:
    place = tmp_path / "a"
    if before is not None:
        place.write_bytes(before)
        place.chmod(0o666)
    open_before, old = descriptors(), os.umask(0o777)
    try:
        with NewFile(place) as file:
            os.write(file.fd, b"new")
            assert {name: data for name, data in held(tmp_path).items() if not name.startswith(".")} == (
                {} if before is None else {"a": before}
            )
    finally:
        os.umask(old)
    assert held(tmp_path) == {"a": b"new"}
    assert place.stat().st_mode & 0o777 == 0o600
    assert file.fd == -1
    assert descriptors() == open_before
    with pytest.raises(ValueError, match="before"):
        file.commit()


@pytest.mark.parametrize("before", [{}, {"a": b"old"}])
def test_or_not_at_all(tmp_path: Path, before: dict[str, bytes]) -> None:
    for name, data in before.items():
        (tmp_path / name).write_bytes(data)
    open_before = descriptors()
    with pytest.raises(ZeroDivisionError), NewFile(tmp_path / "a") as file:
        os.write(file.fd, bytes([1 // 0]))
    file = NewFile(tmp_path / "a")
    file.close()
    file.close()
    del file
    NewFile(tmp_path / "a")  # forgotten
    assert held(tmp_path) == before
    assert descriptors() == open_before


def test_a_commit_that_fails_leaves_what_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"old")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "no space")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", full)
        with pytest.raises(OSError, match="no space"), NewFile(tmp_path / "a"):
            pass
    assert held(tmp_path) == {"a": b"old"}


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"precious")
    (tmp_path / "a").symlink_to("target")
    with NewFile(tmp_path / "a") as file:
        os.write(file.fd, b"new")
    assert not (tmp_path / "a").is_symlink()
    assert held(tmp_path) == {"a": b"new", "target": b"precious"}


def test_it_goes_where_its_folder_goes(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with NewFile(tmp_path / "x" / "a"):
        (tmp_path / "x").rename(tmp_path / "y")
    assert (tmp_path / "y" / "a").exists()


@pytest.mark.parametrize("what", ["folder", "pipe", "missing", "dot"])
def test_what_can_be_no_file_is_refused(tmp_path: Path, what: str) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    place, errno = {
        "folder": (tmp_path / "folder", EISDIR),
        "pipe": (tmp_path / "pipe", EINVAL),
        "missing": (tmp_path / "no" / "a", ENOENT),
        "dot": (Path(), EISDIR),
    }[what]
    open_before = descriptors()
    with pytest.raises(OSError, match=r".") as raised:
        NewFile(place)
    assert raised.value.errno == errno
    assert descriptors() == open_before


def test_a_child_removes_nothing(tmp_path: Path) -> None:
    file = NewFile(tmp_path / "a")
    os.write(file.fd, b"new")
    child = os.fork()
    if child == 0:
        file.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    file.commit()
    assert held(tmp_path) == {"a": b"new"}


def test_nothing_is_left_of_one_that_was_killed(tmp_path: Path) -> None:
    code = "import os, sys; from hwdbm.newfile import NewFile; file = NewFile(sys.argv[1]); os.kill(os.getpid(), 9)"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], check=False)
    assert done.returncode == -signal.SIGKILL
    assert held(tmp_path) == {}
