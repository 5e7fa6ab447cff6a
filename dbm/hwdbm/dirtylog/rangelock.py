"""RangeLock: disjoint ranges in parallel, overlapping ones in the order in which they came."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock, get_ident


class Claim:
    """A range of one thread, from when it asks for it to when it lets go.

    Parameters
    ----------
    lo, hi : int
        The range [lo, hi).

    Attributes
    ----------
    held, mine : Lock
        The claim lasts as long as both are locked, `held` first: ``with claim.held, claim.mine:``. Leaving that block
        is no line of Python, so a signal's handler that raises can't keep a claim from ending. Others wait by taking
        `held`, for a moment; `mine` is the owner's alone, so that such a moment is not taken for a claim.
    """

    __slots__ = ("held", "hi", "lo", "mine", "owner")

    def __init__(self, lo: int, hi: int) -> None:
        self.lo, self.hi, self.owner = lo, hi, get_ident()
        self.held, self.mine = Lock(), Lock()

    def overlaps(self, other: "Claim") -> bool:
        """Return whether the ranges have a number in common."""
        return max(self.lo, other.lo) < min(self.hi, other.hi)


class RangeLock:
    """A lock of ranges of integers.

    A claim waits for all overlapping ones that came before it, whether these are held yet or wait too, and for no
    other. So an operation on everything gets its turn between two steps of a harvest, the next step waits for it, and
    no thread starves.

    Examples
    --------
    >>> lock = RangeLock()
    >>> with lock.hold(0, 64), lock.hold(64, 128):
    ...     len(lock)
    2
    >>> with lock.hold(0, 64), lock.hold(63, 65):
    ...     pass
    Traceback (most recent call last):
    RuntimeError: 63..64 overlaps 0..63, which this thread holds already
    """

    def __init__(self) -> None:
        self._claims: list[Claim] = []  # in the order of arrival; those that have ended go when the next one comes
        self._changed = Lock()

    def __len__(self) -> int:
        return sum(claim.mine.locked() for claim in self._claims)

    def wait(self, claim: Claim) -> None:
        """Return when all overlapping claims that came before have ended. The caller holds the claim's two locks.

        Raises
        ------
        RuntimeError
            If this thread has an overlapping claim already: it would wait for itself.
        """
        with self._changed:
            claims = [each for each in self._claims if each.mine.locked()]
            before = [each for each in claims if each.overlaps(claim)]
            for each in before:
                if each.owner == claim.owner:
                    raise RuntimeError(
                        f"{claim.lo}..{claim.hi - 1} overlaps {each.lo}..{each.hi - 1}, which this thread holds already"
                    )
            self._claims = [*claims, claim]
        for each in before:
            with each.held:
                pass

    @contextmanager
    def hold(self, lo: int, hi: int) -> Iterator[None]:
        """Hold [lo, hi) for the length of a ``with`` block. An empty range is held at once. Errors are `wait`'s.

        A signal's handler that raises as the block ends may keep the range held for as long as its exception lives.
        """
        claim = Claim(lo, hi)
        with claim.held, claim.mine:
            self.wait(claim)
            yield
