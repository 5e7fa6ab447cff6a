"""When a migration converges, and what to do if it doesn't."""

from dataclasses import dataclass
from math import ceil
from typing import Literal, get_args

from hwdbm import check
from hwdbm.forecast import RULES

OnLimit = Literal["abort", "wait", "pause"]
_PROGRESS = 0.95  # of what remained: less is progress
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Settings:
    """How a migration goes.

    Parameters
    ----------
    max_downtime : float
        Seconds that the guest may stand still. QEMU's default, too.
    max_iterations : int
        Passes in a row without progress, after which `on_limit` says what happens.
    bandwidth : float, optional
        Bytes a second at most; 1 or more.
    auto_converge : bool
        Whether the vCPUs are slowed down where they dirty more than is sent.
    verify : bool
        Whether both sides compare the SHA-256 of all memory before the destination runs.
    on_limit : {"abort", "wait", "pause"}
        The action if the rest doesn't fit into `max_downtime`: end the migration with `ConvergenceError`, go on until
        it does or is cancelled, or pause the guest for as long as it takes.
    rule : str
        The name of one of `hwdbm.forecast.RULES`, which says when the guest is paused and when the migration is given
        up. With another one than "ours", `max_iterations`, `on_limit` and `auto_converge` have no effect.

    Raises
    ------
    TypeError
        If a number or a flag is of another type.
    ValueError
        If a number is out of range.
    """

    max_downtime: float = 0.3
    max_iterations: int = 30
    bandwidth: float | None = None
    auto_converge: bool = False
    verify: bool = True
    on_limit: OnLimit = "abort"
    rule: str = "ours"

    def __post_init__(self) -> None:
        self._set("max_downtime", check.real(self.max_downtime, "max_downtime", 0))
        self._set("max_iterations", check.integer(self.max_iterations, "max_iterations", 1))
        if self.bandwidth is not None:
            self._set("bandwidth", check.real(self.bandwidth, "bandwidth", 1))
        self._set("auto_converge", check.flag(self.auto_converge, "auto_converge"))
        self._set("verify", check.flag(self.verify, "verify"))
        check.one_of(self.on_limit, get_args(OnLimit), "on_limit")
        check.one_of(self.rule, RULES, "rule")

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)


class Progress:
    """Whether passes leave less and less.

    Parameters
    ----------
    settings : Settings
        The limits.

    Attributes
    ----------
    best : int
        The number of the pass after which no later one left notably less.
    flat : int
        Passes since.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._least, self._shortest = float("inf"), float("inf")

    def add(self, number: int, remaining: int, expected: float | None) -> None:
        """Take note of the bytes that a pass is about to send, and of the downtime that would take, in seconds."""
        self._shortest = min(self._shortest, float("inf") if expected is None else expected)
        if remaining < self._least * _PROGRESS:
            self._least, self.best, self.flat = remaining, number, 0
        else:
            self.flat += 1

    def why(self) -> str:
        """Return why the migration can't go on like that, and what would have helped."""
        limit = self._settings.max_downtime
        text = (
            f"the guest dirties memory as fast as it is sent: no pass after pass {self.best} left notably less than "
            f"{self._least / _MIB:.1f} MiB, which takes {self._shortest * 1e3:,.0f} ms, and {limit * 1e3:g} ms are "
            f"allowed; a downtime of {ceil(self._shortest * 110) * 10:,} ms would have done"
        )
        if limit:
            text += f", or a bandwidth of {ceil(self._least / limit / _MIB):,} MiB/s"
        return text
