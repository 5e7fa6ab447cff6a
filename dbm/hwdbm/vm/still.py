"""A VM that stands still for a moment: pauses of several who don't know of each other."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from threading import Lock, RLock
from typing import Any
from weakref import WeakKeyDictionary

from hwdbm.vm.source import Source

_turns: "WeakKeyDictionary[Source, Any]" = WeakKeyDictionary()
_lock = Lock()
_others = RLock()  # of those that can't be in a weak dictionary


def turn_of(source: Source) -> AbstractContextManager[Any]:
    """Return the reentrant lock under which a VM is paused and resumed: a migration and a snapshot take turns."""
    try:
        with _lock:
            turn: AbstractContextManager[Any] = _turns.setdefault(source, RLock())
            return turn
    except TypeError:
        return _others


@contextmanager
def still(source: Source) -> Iterator[None]:
    """Have a VM stand still, and go on at the end of the block if it ran; who else has its turn waits meanwhile.

    Without that, a snapshot that found the guest running could resume it while a migration sends its last pass.
    """
    with turn_of(source):
        ran = source.running
        source.pause()
        try:
            yield
        finally:
            if ran:
                source.resume()
