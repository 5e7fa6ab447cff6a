"""The exclusive consumer of a dirty log. While there is one, no other takes pages or switches the log off."""

import os
import warnings
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from errno import EBUSY
from types import TracebackType
from typing import Any, Self

from hwdbm.dirtylog.lease import Lease


class Turn:
    """The right to take pages from a log: every consumer has it, or one client alone.

    Parameters
    ----------
    lock : reentrant lock
        The log's. What is asked of a `Turn` and what depends on the answer happen under it.
    """

    def __init__(self, lock: AbstractContextManager[Any]) -> None:
        self._lock = lock
        # Weak, so that a client that was forgotten holds the log no longer: no finalizer has to take the lock for it.
        self._holder: weakref.ref[LogClient] | None = None

    @property
    def holder(self) -> "LogClient | None":
        """The client that the log belongs to, if there is one."""
        return None if self._holder is None else self._holder()

    def check(self, what: str, client: "LogClient | None" = None) -> None:
        """Raise EBUSY with the holder's name if another client has the log; `what` names the refused call.

        The caller holds the lock, or what else keeps the answer true for as long as it matters.
        """
        holder = self.holder
        if holder is not None and holder is not client:
            raise OSError(EBUSY, f"{what}: the dirty log belongs to its client {holder.name!r} until that closes")

    def client(self, name: str, take: Callable[[int], Lease]) -> "LogClient":
        """Return a new exclusive consumer, which takes with `take`.

        Raises
        ------
        OSError
            EBUSY if there is one.
        TypeError, ValueError
            If the name is no text, or empty.
        """
        if not isinstance(name, str):
            raise TypeError(f"a client's name is a text, not {name!r}")
        if not name:
            raise ValueError("a client's name is empty")
        with self._lock:
            self.check(f"a client {name!r}")
            client = LogClient(self, name, take)
            self._holder = weakref.ref(client)
            return client

    def _end(self, client: "LogClient") -> None:
        with self._lock:
            if self.holder is client:
                self._holder = None


class LogClient:
    """A log's only consumer, from `client` of the log or VM until `close`.

    As a context manager it closes at the end of the block. If it is forgotten open the log is free again, with a
    `ResourceWarning`. Leases that it took stay what they are.

    Attributes
    ----------
    name : str
        The name that refused callers are told.
    closed : bool
        Whether it was closed.
    """

    def __init__(self, turn: Turn, name: str, take: Callable[[int], Lease]) -> None:
        self.name, self.closed = name, False
        self._turn, self._take, self._owner = turn, take, os.getpid()

    def __repr__(self) -> str:
        return f"<LogClient {self.name!r}, {'closed' if self.closed else 'open'}>"

    def take(self, slot: int) -> Lease:
        """Take the pages of a slot that were dirtied since the last time, and clean them.

        Raises
        ------
        ValueError
            If it is closed.
        OSError
            ENOENT if there is no such slot or it doesn't log, and what else the log has.
        """
        if self.closed:
            raise ValueError(f"{self!r} takes nothing any more")
        return self._take(slot)

    def close(self) -> None:
        """Let others take. A second time does nothing, and neither does it in a process forked off since."""
        if not self.closed and os.getpid() == self._owner:
            self.closed = True
            self._turn._end(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not self.closed and os.getpid() == self._owner:
            # Without `source`: a recorder of warnings would keep the client alive, and so the log.
            warnings.warn(f"{self!r} was never closed", ResourceWarning, stacklevel=2)
