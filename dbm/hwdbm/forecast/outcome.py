"""What a forecast says, and the two simple estimates that it is compared with."""

from dataclasses import dataclass
from typing import Any

from hwdbm import check


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with an interval.

    Parameters
    ----------
    value : float
        The most likely number.
    low, high : float
        The least and the greatest that were found likely; ``low <= value <= high``.
    """

    value: float
    low: float
    high: float

    def __post_init__(self) -> None:
        for name in ("value", "low", "high"):
            object.__setattr__(self, name, check.real(getattr(self, name), name))
        if not self.low <= self.value <= self.high:
            raise ValueError(f"an estimate of {self.value:g} is not between {self.low:g} and {self.high:g}")

    def to_dict(self, scale: float = 1.0, digits: int | None = 3) -> dict[str, float]:
        """Return it as ``{"value", "low", "high"}``, each multiplied by `scale` and rounded to `digits`."""
        scale = check.real(scale, "scale", 0)
        if digits is not None:
            digits = check.integer(digits, "digits")
        return {name: round(getattr(self, name) * scale, digits) for name in ("value", "low", "high")}


@dataclass(frozen=True, slots=True)
class Needs:
    """The least of each, with all else unchanged, at which a migration would converge; None where nothing would do.

    Parameters
    ----------
    bandwidth : float, optional
        Bytes a second.
    max_downtime : float, optional
        Seconds.
    throttle : int, optional
        Percent of their time that the vCPUs would be without, all the time; 0 if the guest can run freely.
    """

    bandwidth: float | None = None
    max_downtime: float | None = None
    throttle: int | None = None

    def __post_init__(self) -> None:
        for name in ("bandwidth", "max_downtime"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, check.real(getattr(self, name), name, 0))
        if self.throttle is not None:
            object.__setattr__(self, "throttle", check.integer(self.throttle, "throttle", 0, 100))


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a migration would take. Times are in seconds here, and in milliseconds in `to_dict`.

    Parameters
    ----------
    converges : bool
        Whether the rest will fit into the downtime that is allowed, in time.
    flat_from : int, optional
        The pass from which on no later one leaves notably less (5 %); None if it converged before that.
    passes : Estimate
        Passes, the one with the guest paused among them.
    total_time : Estimate
        Seconds from the beginning until the guest runs at the destination, or until the migration is given up.
    downtime : Estimate
        Seconds that the guest stands still. Where it doesn't converge: what it would be if the guest was paused then.
    transferred : Estimate
        Bytes sent.
    needs : Needs
        What it would take.
    why : str
        One paragraph for people.
    """

    converges: bool
    flat_from: int | None
    passes: Estimate
    total_time: Estimate
    downtime: Estimate
    transferred: Estimate
    needs: Needs = Needs()
    why: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "converges", check.flag(self.converges, "converges"))
        if self.flat_from is not None:
            object.__setattr__(self, "flat_from", check.integer(self.flat_from, "flat_from"))
        for name in ("passes", "total_time", "downtime", "transferred"):
            check.instance(getattr(self, name), Estimate, name)
        check.instance(self.needs, Needs, "needs")
        check.instance(self.why, str, "why")

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON: times in ms, sizes in bytes, rates in bytes a second; what isn't there is None."""
        bandwidth, downtime = self.needs.bandwidth, self.needs.max_downtime
        return {
            "converges": self.converges,
            "flat-from": self.flat_from,
            "passes": self.passes.to_dict(),
            "total-time": self.total_time.to_dict(1e3),
            "downtime": self.downtime.to_dict(1e3),
            "transferred": self.transferred.to_dict(digits=None),
            "needs": {
                "bandwidth": None if bandwidth is None else round(bandwidth),
                "max-downtime": None if downtime is None else round(downtime * 1e3, 3),
            },
        }


def remaining_over_bandwidth(remaining: float, bandwidth: float) -> float:
    """Return the seconds that tools commonly forecast: what remains, divided by the bandwidth.

    Parameters
    ----------
    remaining : float
        Bytes.
    bandwidth : float
        Bytes a second, 1 or more.

    Examples
    --------
    >>> remaining_over_bandwidth(1 << 30, 1 << 28)
    4.0
    """
    remaining, bandwidth = check.real(remaining, "remaining", 0), check.real(bandwidth, "bandwidth", 1)
    return remaining / bandwidth


def geometric(total: float, dirty_rate: float, bandwidth: float, max_downtime: float) -> Forecast:
    """Return what a geometric series says: each pass leaves ``dirty_rate / bandwidth`` of the one before it.

    It takes the guest for one that writes new pages at one rate, for ever (Clark et al., NSDI 2005; Liu et al., 2011).

    Parameters
    ----------
    total : float
        Bytes of memory.
    dirty_rate : float
        Bytes a second.
    bandwidth : float
        Bytes a second, 1 or more.
    max_downtime : float
        Seconds.

    Examples
    --------
    >>> series = geometric(1000, dirty_rate=50, bandwidth=100, max_downtime=2)
    >>> series.converges, series.passes.value, series.total_time.value, series.downtime.value
    (True, 4.0, 18.75, 1.25)
    """
    total, dirty_rate = check.real(total, "total", 0), check.real(dirty_rate, "dirty_rate", 0)
    bandwidth, limit = check.real(bandwidth, "bandwidth", 1), check.real(max_downtime, "max_downtime", 0)
    ratio = dirty_rate / bandwidth
    rest, seconds, sent, passes, converges = total, 0.0, 0.0, 1, True
    while passes == 1 or rest / bandwidth > limit:
        if (passes > 1 and ratio >= 1) or passes >= 1000:
            converges = False
            break
        seconds, sent = seconds + rest / bandwidth, sent + rest
        rest, passes = min(rest * ratio, total), passes + 1
    down = rest / bandwidth
    seconds, sent = seconds + down, sent + rest
    return Forecast(converges, None, exact(passes), exact(seconds), exact(down), exact(sent))


def exact(value: float) -> Estimate:
    """Return a number as an estimate of no width."""
    return Estimate(value, value, value)
