"""Files: whole or not at all, with and without a file system that has unnamed files."""

import os
import signal
import subprocess
import sys
from errno import EINVAL, EISDIR, ENOENT, EOPNOTSUPP
from pathlib import Path

import pytest
from leaks import descriptors

from hwdbm import files
from hwdbm.files import NewFile


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


def test_it_is_its_owners_alone_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the umask lets others have, there is no moment before the mode is set."""
    modes, real, old = [], os.fchmod, os.umask(0)

    def fchmod(fd: int, mode: int) -> None:
        modes.append(os.fstat(fd).st_mode & 0o777)
        real(fd, mode)

    monkeypatch.setattr(os, "fchmod", fchmod)
    try:
        with NewFile(tmp_path / "a"):
            pass
    finally:
        os.umask(old)
    assert modes == [0o600]


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
    code = "import os, sys; from hwdbm.files import NewFile; file = NewFile(sys.argv[1]); os.kill(os.getpid(), 9)"
    done = subprocess.run([sys.executable, "-P", "-c", code, str(tmp_path / "a")], check=False)
    assert done.returncode == -signal.SIGKILL
    assert held(tmp_path) == {}


@pytest.mark.parametrize("before", [None, b"old"])
def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path, before: bytes | None) -> None:
    """And what a living one has isn't."""
    if before is not None:
        (tmp_path / "a").write_bytes(before)
    code = """
import os, sys
from hwdbm.files import NewFile
real = os.open
def named(path, flags, *args, **options):
    if flags & os.O_TMPFILE == os.O_TMPFILE:
        raise OSError(95, "no unnamed files here")
    return real(path, flags, *args, **options)
os.open = named
file = NewFile(sys.argv[1])
print("ready", flush=True)
sys.stdin.read()
os.kill(os.getpid(), 9)
"""
    command = [sys.executable, "-P", "-c", code, str(tmp_path / "a")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as other, subprocess.Popen(command, **pipes) as living:
        assert other.stdout.readline() == living.stdout.readline() == b"ready\n"
        other.communicate()
        assert len([name for name in held(tmp_path) if name.startswith(".hwdbm-")]) == 2
        files.write(tmp_path / "b", b"new")
        assert len([name for name in held(tmp_path) if name.startswith(".hwdbm-")]) == 1
        living.communicate()
    files.write(tmp_path / "b", b"newer")
    assert held(tmp_path) == {"b": b"newer"} | ({} if before is None else {"a": before})


def test_abandon(tmp_path: Path) -> None:
    file, closed = NewFile(tmp_path / "a"), NewFile(tmp_path / "b")
    closed.close()
    with files.scratch() as folder:
        assert folder.stat().st_mode & 0o777 == 0o700
        (folder / "c").write_bytes(b"")
        files.abandon()
        assert not folder.exists()
        folder.mkdir()  # so that there is something to remove
    assert held(tmp_path) == {}
    file.close()


def test_a_temporary_folder_is_removed_where_another_removes_some_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a worker does that ends at the same time."""
    real, left = os.unlink, [2]

    def unlink(name: str, **options: int) -> None:
        real(name, **options)
        if left[0]:
            left[0] -= 1
            raise FileNotFoundError(ENOENT, os.strerror(ENOENT), name)

    with files.scratch() as folder:
        for name in "abcde":
            (folder / name).write_bytes(b"")
        monkeypatch.setattr(os, "unlink", unlink)
    assert not folder.exists()
    assert not left[0]


def test_a_temporary_folder_that_cannot_be_made_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    with pytest.raises(FileNotFoundError, match="gone"), files.scratch():
        pass
    assert not files._scratch


@pytest.mark.parametrize("size", [0, 1, 1 << 20])
def test_write(tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[: 1 << 18]))  # a system may take less
    files.write(tmp_path / "a", bytes(range(1, 2)) * size)
    assert held(tmp_path) == {"a": b"\x01" * size}
    with pytest.raises(OSError, match="No such file") as raised:
        files.write(tmp_path / "no" / "a", b"")
    assert raised.value.filename == str(tmp_path / "no" / "a")


def test_only_what_can_be_read_to_its_end_is_opened(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    os.mkfifo(tmp_path / "pipe")
    with files.open_regular(tmp_path / "a") as file:
        assert file.read() == b"1"
    wrong = {tmp_path: EISDIR, tmp_path / "pipe": EINVAL, Path("/dev/zero"): EINVAL, tmp_path / "b": ENOENT}
    for path, errno in wrong.items():
        with pytest.raises(OSError, match=str(path)) as raised:
            files.open_regular(path)
        assert raised.value.errno == errno


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_files_that_are_one_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """The last one can't be written, or synced: none of them is new."""
    places = [tmp_path / name for name in "abc"]
    places[0].write_bytes(b"old")
    calls, real = [], getattr(os, call)

    def full(*args: object) -> object:
        calls.append(args)
        if len(calls) == len(places):
            raise OSError(28, "no space")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(OSError, match="no space") as error:
            files.write_together(dict.fromkeys(places, b"new"))
    assert error.value.filename == str(places[2])
    assert held(tmp_path) == {"a": b"old"}
    files.write_together(dict.fromkeys(places, b"new"))
    assert held(tmp_path) == dict.fromkeys("abc", b"new")


@pytest.mark.parametrize("old", [None, b"old"])
def test_a_folder_that_cannot_be_synced_is_told_and_the_file_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: bytes | None
) -> None:
    place, real = tmp_path / "a", os.fsync
    if old is not None:
        place.write_bytes(old)

    def fsync(fd: int) -> None:
        if Path(f"/proc/self/fd/{fd}").is_dir():
            raise OSError(5, "Input/output error")
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output error: its folder can't be synced") as error:
        files.write(place, b"new")
    assert (error.value.errno, error.value.filename) == (5, str(place))
    assert held(tmp_path) == {"a": b"new"}


@pytest.mark.parametrize("size", [1, -1, 1 << 20])
def test_what_cannot_be_read_is_named(size: int) -> None:
    """The first page of a process's memory: the file opens, and can't be read there."""
    with files.open_regular("/proc/self/mem") as file, pytest.raises(OSError, match="Input/output error") as error:
        file.read(size)
    assert error.value.filename == "/proc/self/mem"


def test_a_link_that_is_called_as_a_stale_file_is_left(tmp_path: Path) -> None:
    """Nobody who writes files beside places makes links: what it names isn't opened, be it another's pipe."""
    (tmp_path / "other").write_bytes(b"other")
    link = tmp_path / f"{files._PREFIX}1{files._SUFFIX}"
    link.symlink_to("other")
    files.write(tmp_path / "a", b"a")
    assert link.is_symlink()
    assert (tmp_path / "other").read_bytes() == b"other"


def test_a_file_that_another_writer_took_for_a_stale_one_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has a name for a moment before it has its lock; one that lost its name by then isn't the one."""
    real, lost, open_before = files.fcntl.flock, [], descriptors()

    def flock(fd: int, how: int) -> None:
        if len(lost) < 2:
            lost.extend(path.name for path in tmp_path.iterdir())
            for path in tmp_path.iterdir():
                path.unlink()
        real(fd, how)

    monkeypatch.setattr(files.fcntl, "flock", flock)
    files.write(tmp_path / "a", b"new")
    named = len(set(lost))
    assert named == len(lost)
    assert named in (0, 2)  # none where the file has no name until it is complete
    assert held(tmp_path) == {"a": b"new"}
    assert descriptors() == open_before


def test_a_file_says_whether_it_is_open(tmp_path: Path) -> None:
    file = NewFile(tmp_path / "a")
    assert repr(file) == f"<NewFile: {str(tmp_path / 'a')!r}, open>"
    file.close()
    assert (repr(file), file.fd) == (f"<NewFile: {str(tmp_path / 'a')!r}, closed>", -1)


def test_a_temporary_folder_is_where_its_name_has_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the usual place if its path is then as long as it may be, and no longer; otherwise in memory."""
    (tmp_path / "é").mkdir()  # a path's length is in bytes
    (tmp_path / "memory").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "é"))
    monkeypatch.setattr(files, "_IN_MEMORY", str(tmp_path / "memory"))
    with files.scratch() as folder:
        size = len(os.fsencode(folder))
    for longest, where in ((size + 1, "é"), (size, "é"), (size - 1, "memory"), (1, "memory")):
        with files.scratch(longest) as folder:
            assert folder.parent == tmp_path / where
            assert folder.stat().st_mode & 0o777 == 0o700
