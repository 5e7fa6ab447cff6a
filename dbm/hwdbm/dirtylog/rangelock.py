"""RangeLock: disjoint ranges in parallel, overlapping ones in the order in which they came."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Condition, get_ident

__all__ = ["RangeLock"]


@dataclass(slots=True, eq=False)
class _Claim:
    lo: int
    hi: int
    owner: int

    def overlaps(self, other: "_Claim") -> bool:
        return max(self.lo, other.lo) < min(self.hi, other.hi)


class RangeLock:
    """A lock of ranges of integers.

    Who asks for a range waits for everyone who asked for an overlapping one before, whether they hold it yet or not,
    and for nobody else. So a whole-slot operation gets its turn between two steps of a harvest, and the next step
    waits for it: nobody starves, and nobody waits longer than for those before.

    Examples
    --------
    >>> lock = RangeLock()
    >>> with lock.hold(0, 64), lock.hold(64, 128):
    ...     pass
    >>> with lock.hold(0, 64), lock.hold(63, 65):
    ...     pass
    Traceback (most recent call last):
    RuntimeError: 63..64 overlaps 0..63, which this thread holds already
    """

    def __init__(self) -> None:
        self._claims: list[_Claim] = []  # in the order of arrival, held and waiting
        self._changed = Condition()

    @contextmanager
    def hold(self, lo: int, hi: int) -> Iterator[None]:
        """Hold [lo, hi) for the length of a ``with`` block. An empty range is held at once.

        Yields
        ------
        None
            Once nobody else holds a part of it.

        Raises
        ------
        RuntimeError
            If this thread holds a part of it already: it would wait for itself.
        """
        claim = _Claim(lo, hi, get_ident())
        with self._changed:
            for other in self._claims:
                if other.owner == claim.owner and claim.overlaps(other):
                    raise RuntimeError(
                        f"{lo}..{hi - 1} overlaps {other.lo}..{other.hi - 1}, which this thread holds already"
                    )
            self._claims.append(claim)
            try:
                self._changed.wait_for(lambda: self._first(claim))
            except BaseException:  # an interrupt while it waited must not leave the claim behind
                self._drop(claim)
                raise
        try:
            yield
        finally:
            with self._changed:
                self._drop(claim)

    def _first(self, claim: _Claim) -> bool:
        return not any(claim.overlaps(other) for other in self._claims[: self._claims.index(claim)])

    def _drop(self, claim: _Claim) -> None:
        self._claims.remove(claim)
        self._changed.notify_all()
