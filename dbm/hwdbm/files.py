"""Files that appear whole or not at all, for their owner alone; and what a process that ends at once must not leave."""

import contextlib
import fcntl
import io
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from errno import EEXIST, EINVAL, EISDIR, EOPNOTSUPP
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self
from weakref import WeakSet

from hwdbm.errors import HwdbmError

__all__ = ["NewFile", "abandon", "naming", "open_regular", "scratch", "write", "write_together"]

_NO_UNNAMED = (EINVAL, EISDIR, EOPNOTSUPP)  # what a file system or kernel without O_TMPFILE says
_CLOSED = -1  # no file's number
_PREFIX, _SUFFIX = ".hwdbm-", ".tmp"  # of a file that has a name before it has its place

_IN_MEMORY, _NAME = "/dev/shm", len("/hwdbm-0123456789abcdef")  # noqa: S108  # the folder in it is private

_named: "WeakSet[NewFile]" = WeakSet()
_scratch: set[Path] = set()


class NewFile:
    r"""A file that takes its place only when it is complete.

    Until `commit` it has no name where the file system can do that, so that nothing is left of it if the process is
    killed. Elsewhere, and for a moment where something is in the place, it is ``.hwdbm-<random>.tmp`` beside it, and
    locked: what a killed process left of that kind, the next `NewFile` in the folder removes. What was in the place
    stays until then. Its mode is 0600, whatever was there before. As a context manager it commits at the end of the
    block, and not where the block raises.

    Parameters
    ----------
    path : path-like
        The place. A symbolic link there is replaced, and not followed.

    Attributes
    ----------
    path : Path
        The place.
    fd : int
        The file, empty at first, for reading and writing; -1 when it is closed.

    Raises
    ------
    OSError
        The system's; EISDIR or EINVAL if something that is no file is in the place.

    Examples
    --------
    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> with NewFile(f"{folder.name}/guest.ram") as file:
    ...     os.write(file.fd, b"\x01\x02"), os.listdir(folder.name)
    (2, [])
    >>> os.listdir(folder.name)
    ['guest.ram']
    >>> folder.cleanup()
    """

    fd = _CLOSED

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path, self._owner = Path(path), os.getpid()
        self._name: str | None = None  # beside the place, as long as it has one
        self._folder = _CLOSED
        try:
            self._folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            self._check_place()
            self._remove_stale()
            self._create()
            os.fchmod(self.fd, 0o600)  # where the umask took some of it
        except OSError as error:
            self.close()
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"<NewFile: {str(self.path)!r}, {'closed' if self.fd == _CLOSED else 'open'}>"

    def _check_place(self) -> None:
        if self.path.name in ("", ".."):
            raise OSError(EISDIR, os.strerror(EISDIR))
        try:
            mode = os.stat(self.path.name, dir_fd=self._folder, follow_symlinks=False).st_mode
        except FileNotFoundError:
            return
        if stat.S_ISDIR(mode):
            raise OSError(EISDIR, os.strerror(EISDIR))
        if not stat.S_ISREG(mode) and not stat.S_ISLNK(mode):
            raise OSError(EINVAL, "what is there is no regular file")

    def _remove_stale(self) -> None:
        """Remove the files of writers that were killed: files without a lock."""
        with os.scandir(self._folder) as entries:
            names = [entry.name for entry in entries]
        for name in names:
            if name.startswith(_PREFIX) and name.endswith(_SUFFIX):
                with contextlib.suppress(OSError):  # it is locked, or gone, or another user's
                    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._folder)
                    try:
                        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        os.unlink(name, dir_fd=self._folder)
                    finally:
                        os.close(fd)

    def _create(self) -> None:
        try:
            self.fd = os.open(".", os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600, dir_fd=self._folder)
        except OSError as error:
            if error.errno not in _NO_UNNAMED:
                raise
        else:
            self._lock()
            return
        while self.fd == _CLOSED:
            self._take_name()
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            self.fd = os.open(str(self._name), flags, 0o600, dir_fd=self._folder)
            self._lock()
            if not os.fstat(self.fd).st_nlink:  # before the lock it looked stale to another writer
                fd, self.fd = self.fd, _CLOSED
                os.close(fd)

    def _lock(self) -> None:
        with contextlib.suppress(OSError):  # a file system without locks, where nothing is stale either
            fcntl.flock(self.fd, fcntl.LOCK_EX)

    def _take_name(self) -> None:
        self._name = f"{_PREFIX}{_word()}{_SUFFIX}"
        _named.add(self)

    def put(self, data: bytes) -> None:
        """Write bytes at its end.

        Raises
        ------
        OSError
            The system's, with the name of the place.
        """
        view = memoryview(data)
        with naming(self.path):
            while view:
                view = view[os.write(self.fd, view) :]

    def commit(self) -> None:
        """Put the file in its place, for good: when this returns, it is there after a loss of power too; and close it.

        Raises
        ------
        OSError
            The system's, with the name of the place. What was in the place is there still; where it is the folder that
            can't be synced, which the text says, the file is in its place, and a loss of power may undo that.
        ValueError
            If it is closed.
        """
        if self.fd == _CLOSED:
            raise ValueError(f"{self!r}: it was committed or given up before")
        try:
            os.fsync(self.fd)
            if self._name is None:
                self._link()
            if self._name is not None:
                os.rename(self._name, self.path.name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
                self._drop_name()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        try:
            _sync(self._folder)
        except OSError as error:
            why = f"{error.strerror}: its folder can't be synced, so a loss of power may undo that the file is there"
            raise OSError(error.errno, why, str(self.path)) from error
        self.close()

    def _link(self) -> None:
        """Give the file a name: its own if that is free, since a link replaces nothing, otherwise one beside it."""
        source = f"/proc/self/fd/{self.fd}"
        try:
            os.link(source, self.path.name, dst_dir_fd=self._folder)
        except OSError as error:
            if error.errno != EEXIST:
                raise
            self._take_name()
            os.link(source, str(self._name), dst_dir_fd=self._folder)

    def _drop_name(self) -> None:
        self._name = None
        _named.discard(self)

    def close(self) -> None:
        """Give the file up, unless it was committed. In a process forked off since, nothing is removed."""
        fd, self.fd = self.fd, _CLOSED
        if fd != _CLOSED:
            os.close(fd)
        folder, self._folder = self._folder, _CLOSED
        if folder != _CLOSED:
            if self._name is not None and os.getpid() == self._owner:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self._name, dir_fd=folder)
            self._drop_name()
            os.close(folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None and self.fd != _CLOSED:
                self.commit()
        finally:
            self.close()

    def __del__(self) -> None:
        if self.fd != _CLOSED:
            self.close()


def write(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a whole file, as a `NewFile`.

    Raises
    ------
    OSError
        If it can't be written, with its name. What was in its place is there still, but as `NewFile.commit` says.
    """
    with NewFile(path) as file:
        file.put(data)


def write_together(contents: Mapping[Path, bytes]) -> None:
    """Write files that are one answer, as `write`: none takes its place before all of them are written and synced.

    Raises
    ------
    OSError
        If one can't be written, with its name. What was in the places is there still, but as `NewFile.commit` says.
    """
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(NewFile(path)) for path in contents]
        for file, data in zip(files, contents.values(), strict=True):
            file.put(data)
            with naming(file.path):
                os.fsync(file.fd)
        for file in files:
            file.commit()


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Have errors of the system that name no file name the one that was meant.

    Yields
    ------
    None
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None or isinstance(error, HwdbmError):
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file to read it; but no pipe, which would keep the caller waiting, no terminal and no other device.

    Raises
    ------
    OSError
        If it can't be opened; EINVAL if it is neither a regular file nor a block device. What can't be read of it
        later is an error that names it, too.
    """
    kind = Path(path).stat().st_mode
    if stat.S_ISDIR(kind):
        raise OSError(EISDIR, os.strerror(EISDIR), os.fspath(path))
    if not stat.S_ISREG(kind) and not stat.S_ISBLK(kind):
        raise OSError(EINVAL, "is no regular file", os.fspath(path))
    return io.BufferedReader(_Raw(path))


class _Raw(io.FileIO):
    """A file whose errors of reading name it; the system's and Python's own don't."""

    def readinto(self, buffer: Any, /) -> int | None:
        with naming(self.name):
            return super().readinto(buffer)

    def readall(self) -> bytes:
        with naming(self.name):
            return super().readall()


def caches() -> Path | None:
    """Return the folder for what can be made again, ``$XDG_CACHE_HOME`` or ``~/.cache``; None for a user without.

    Nor is it one where that is no whole path: what is found in the current folder is anybody's.
    """
    named = os.environ.get("XDG_CACHE_HOME")
    try:
        folder = Path(named) if named else Path.home() / ".cache"
    except RuntimeError:  # there is no HOME, and the system doesn't know the user
        return None
    return folder if folder.is_absolute() else None


@contextlib.contextmanager
def scratch(longest: int | None = None) -> Iterator[Path]:
    """Yield a temporary folder, its owner's alone, that is removed when the block ends.

    Parameters
    ----------
    longest : int, optional
        Bytes that its path may have. Where the usual place is deeper, or there is none that can be written, it is
        made in memory.

    Yields
    ------
    Path
        The folder.
    """
    folder = Path(_place(longest), f"hwdbm-{_word()}")
    _scratch.add(folder)  # before it is there: an interrupt may come as soon as it is
    try:
        folder.mkdir(mode=0o700)
        yield folder
    finally:
        while os.path.lexists(folder):
            with contextlib.suppress(FileNotFoundError):  # somebody else, such as a child that ends, removes some of it
                shutil.rmtree(folder)
        _scratch.discard(folder)


def _word() -> str:
    """Return the part of a name that nobody else has."""
    return secrets.token_hex(8)


def _place(longest: int | None) -> str:
    """Return where `scratch` makes its folder."""
    try:
        usual = tempfile.gettempdir()
    except FileNotFoundError:  # its text says where it looked
        if os.access(_IN_MEMORY, os.W_OK | os.X_OK):
            return _IN_MEMORY
        raise
    deep = longest is not None and len(os.fsencode(usual)) + _NAME > longest
    return _IN_MEMORY if deep and os.access(_IN_MEMORY, os.W_OK | os.X_OK) else usual


def abandon() -> None:
    """Remove what this process has in folders and isn't complete: for a command that ends at once."""
    for file in list(_named):
        with contextlib.suppress(OSError):
            file.close()
    for folder in list(_scratch):
        shutil.rmtree(folder, ignore_errors=True)


def _sync(folder: int) -> None:
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno != EINVAL:  # a file system whose folders can't be synced
            raise
