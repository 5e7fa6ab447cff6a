"""Timing in turn, and the table's row."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from hwdbm.check import instance, integer


@dataclass(frozen=True, slots=True)
class Row:
    """One measured figure beside its floor.

    Parameters
    ----------
    what : str
        The operation that was measured.
    cost : float
        The smallest of its times, in seconds; or bytes of memory.
    floor : str
        The floor that it is compared with.
    floor_cost : float
        The smallest of the floor's times, in the same run; or bytes.
    limit : float, optional
        The ratio that the project holds itself to, at most.
    unit : {"s", "byte"}
        The unit of both costs.
    """

    what: str
    cost: float
    floor: str
    floor_cost: float
    limit: float | None = None
    unit: Literal["s", "byte"] = "s"

    @property
    def ratio(self) -> float:
        """How many times the floor it takes."""
        return self.cost / self.floor_cost

    @property
    def met(self) -> bool | None:
        """Whether the limit is kept; None where there is none."""
        return None if self.limit is None else self.ratio <= self.limit


def smallest(
    work: Mapping[str, Callable[[], object]],
    before: Callable[[], object] | None = None,
    repeat: int = 9,
    *,
    clock: Callable[[], float] = time.thread_time,
) -> dict[str, float]:
    """Return the smallest time of each of `work`, in seconds, all measured in turn `repeat` times.

    Parameters
    ----------
    work : mapping of str to callable
        The work to time.
    before : callable, optional
        Called before each, not timed.
    repeat : int
        How often; the first time warms up and isn't counted.
    clock : callable
        What tells the time in seconds. By default the processor time of this thread, so that what a busy machine gives
        to others isn't counted; for what works in several threads, or waits, it must be another.
    """
    instance(work, Mapping, "work")
    for call in (*work.values(), *([] if before is None else [before]), clock):
        instance(call, Callable, "what is timed")
    repeat = integer(repeat, "repeat", 1)
    times: dict[str, float] = {}
    for turn in range(repeat + 1):
        for name, call in work.items():
            if before is not None:
                before()
            start = clock()
            call()
            taken = clock() - start
            if turn:
                times[name] = min(taken, times.get(name, taken))
    return times
