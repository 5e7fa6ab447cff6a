"""When a migration converges, and what to do if it doesn't."""

from dataclasses import dataclass

__all__ = ["Settings", "Throttle"]


@dataclass(frozen=True, slots=True)
class Settings:
    """How a migration goes.

    Parameters
    ----------
    max_downtime : float
        Seconds that the last pass may take. QEMU's default, too.
    max_iterations : int
        Passes while the guest runs, at most; then it is paused, whatever remains.
    bandwidth : float, optional
        Bytes a second at most.
    auto_converge : bool
        Whether the vCPUs are slowed down where they dirty more than is sent.
    verify : bool
        Whether both sides compare the SHA-256 of all memory before the destination runs.

    Raises
    ------
    ValueError
        If a number is out of range.
    """

    max_downtime: float = 0.3
    max_iterations: int = 30
    bandwidth: float | None = None
    auto_converge: bool = False
    verify: bool = True

    def __post_init__(self) -> None:
        if not self.max_downtime >= 0:
            raise ValueError(f"a downtime is 0 s or more, not {self.max_downtime}")
        if self.max_iterations < 1:
            raise ValueError(f"a migration has 1 pass or more, not {self.max_iterations}")
        if self.bandwidth is not None and not self.bandwidth > 0:
            raise ValueError(f"a bandwidth is more than 0 bytes a second, not {self.bandwidth}")


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

    def next(self, dirtied: int, sent: int) -> int:
        """Return the percent for the period that begins, after one in which so many bytes were dirtied and sent."""
        if dirtied * 100 <= sent * self._threshold:
            return self.percent
        self._high += 1
        if self._high >= 2:
            self._high = 0
            self.percent = min(self.percent + self._increment if self.percent else self._initial, self._most)
        return self.percent
