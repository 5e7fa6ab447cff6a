"""Stop rules: when to pause the guest for the last pass, and when to give up, as functions of the same samples."""

from dataclasses import dataclass
from typing import Literal

Action = Literal["continue", "switch", "abort"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a rule says after a sample.

    Parameters
    ----------
    action : {"continue", "switch", "abort"}
        To go on, to pause the guest for the last pass, or to give the migration up.
    why : str
        The reason, for people.
    limit : float, optional
        Seconds: the downtime limit from now on, where the rule changes it.
    throttle : int, optional
        Percent of their time that the vCPUs are to be without from now on, where the rule changes it.
    """

    action: Action
    why: str = ""
    limit: float | None = None
    throttle: int | None = None


class Throttle:
    """QEMU's auto-converge: its parameters are those of ``migrate-set-parameters``, with their defaults.

    Parameters
    ----------
    initial, increment, most : int
        Percent: ``cpu-throttle-initial``, ``cpu-throttle-increment``, ``max-cpu-throttle``.
    threshold : int
        ``throttle-trigger-threshold``: percent of the bytes sent in a period which, dirtied in it twice, raise the
        throttle.

    Examples
    --------
    >>> throttle = Throttle()
    >>> [throttle.next(dirtied=60, sent=100) for _ in range(6)]
    [0, 20, 20, 30, 30, 40]
    >>> throttle.next(dirtied=10, sent=100)
    40
    """

    def __init__(self, initial: int = 20, increment: int = 10, most: int = 99, threshold: int = 50) -> None:
        self._initial, self._increment, self._most, self._threshold = initial, increment, most, threshold
        self._high = 0
        self.percent = 0

    def next(self, dirtied: float, sent: float) -> int:
        """Return the percent for the period that begins, after one in which so many bytes were dirtied and sent."""
        if dirtied * 100 <= sent * self._threshold:
            return self.percent
        self._high += 1
        if self._high >= 2:
            self._high = 0
            self.percent = min(self.percent + self._increment if self.percent else self._initial, self._most)
        return self.percent
