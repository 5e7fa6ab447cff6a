"""Timing in turn, and the table's row."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

__all__ = ["Row", "smallest"]


@dataclass(frozen=True, slots=True)
class Row:
    """One measured figure beside its floor.

    Parameters
    ----------
    what : str
        What was measured.
    seconds : float
        The smallest of its times.
    floor : str
        What it is compared with.
    floor_seconds : float
        The smallest of the floor's times, in the same run.
    limit : float, optional
        The ratio that the project holds itself to, at most.
    """

    what: str
    seconds: float
    floor: str
    floor_seconds: float
    limit: float | None = None

    @property
    def ratio(self) -> float:
        """How many times the floor it takes."""
        return self.seconds / self.floor_seconds

    @property
    def met(self) -> bool | None:
        """Whether the limit is kept; None where there is none."""
        return None if self.limit is None else self.ratio <= self.limit


def smallest(
    work: Mapping[str, Callable[[], object]], before: Callable[[], object] | None = None, repeat: int = 9
) -> dict[str, float]:
    """Return the smallest time of each of `work`, in seconds, all measured in turn `repeat` times.

    Parameters
    ----------
    work : mapping of str to callable
        What to time.
    before : callable, optional
        What to do before each, off the clock.
    repeat : int
        How often; the first time warms up and isn't counted.
    """
    times: dict[str, float] = {}
    for turn in range(repeat + 1):
        for name, call in work.items():
            if before is not None:
                before()
            start = time.perf_counter()
            call()
            taken = time.perf_counter() - start
            if turn:
                times[name] = min(taken, times.get(name, taken))
    return times
