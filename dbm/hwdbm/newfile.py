"""Files that appear whole or not at all: written without a name, or under another one, and put in place at the end."""

import contextlib
import os
import secrets
import stat
from errno import EEXIST, EINVAL, EISDIR, EOPNOTSUPP
from pathlib import Path
from types import TracebackType
from typing import Self

__all__ = ["NewFile"]

_NO_UNNAMED = (EINVAL, EISDIR, EOPNOTSUPP)  # what a file system or kernel without O_TMPFILE says


class NewFile:
    r"""A file that takes its place only when it is complete.

    Until `commit` it has no name where the file system can do that, so that nothing is left of it if the process is
    killed; elsewhere it has another name beside the place, and `close` removes it. What was in the place stays until
    then. Its mode is 0600, whatever was there before. As a context manager it commits at the end of the block, and
    not where the block raises.

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

    fd = -1

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path, self._owner = Path(path), os.getpid()
        self._name: str | None = None  # beside the place, as long as it has one
        self._folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._check_place()
            try:
                self.fd = os.open(".", os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600, dir_fd=self._folder)
            except OSError as error:
                if error.errno not in _NO_UNNAMED:
                    raise
                self._name = self._other_name()
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                self.fd = os.open(self._name, flags, 0o600, dir_fd=self._folder)
            os.fchmod(self.fd, 0o600)  # where the umask took some of it
        except OSError as error:
            self.close()
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"<NewFile: {str(self.path)!r}, {'closed' if self.fd < 0 else 'open'}>"

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

    def _other_name(self) -> str:
        return f".{self.path.name}.{secrets.token_hex(4)}"

    def commit(self) -> None:
        """Put the file in its place, for good: when this returns, it is there after a loss of power too; and close it.

        Raises
        ------
        OSError
            The system's. What was in the place is there still.
        ValueError
            If it is closed.
        """
        if self.fd < 0:
            raise ValueError(f"{self!r}: it was committed or given up before")
        os.fsync(self.fd)
        if self._name is None:
            self._link()
        if self._name is not None:
            os.rename(self._name, self.path.name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
            self._name = None
        os.fsync(self._folder)
        self.close()

    def _link(self) -> None:
        """Give the file a name: its own if that is free, since a link replaces nothing, otherwise one beside it."""
        source = f"/proc/self/fd/{self.fd}"
        try:
            os.link(source, self.path.name, dst_dir_fd=self._folder)
        except OSError as error:
            if error.errno != EEXIST:
                raise
            name = self._other_name()
            self._name = name
            os.link(source, name, dst_dir_fd=self._folder)

    def close(self) -> None:
        """Give the file up, unless it was committed. In a process forked off since, nothing is removed."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
        folder, self._folder = self._folder, -1
        if folder >= 0:
            if self._name is not None and os.getpid() == self._owner:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self._name, dir_fd=folder)
            os.close(folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None and self.fd >= 0:
                self.commit()
        finally:
            self.close()

    def __del__(self) -> None:
        if self.fd >= 0:
            self.close()
