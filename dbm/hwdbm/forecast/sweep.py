"""Forecasts at many bandwidths and limits of downtime, and the passes of one: what a report shows."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from hwdbm.forecast.outcome import Forecast
from hwdbm.forecast.predict import course
from hwdbm.forecast.samples import Sample
from hwdbm.forecast.simulate import run
from hwdbm.forecast.writes import TraceWrites, Writes, start_of

_EACH_WAY = 8  # steps of half an octave from the bandwidth, down and up
_LIMITS = 3  # steps of an octave from the limit, down and up
_USUAL = 0.3  # seconds, where the limit is none that can be doubled


@dataclass(frozen=True, slots=True)
class Sweep:
    """What a migration would take at other bandwidths and limits.

    Parameters
    ----------
    bandwidths : tuple of float
        Bytes a second, ascending.
    limits : tuple of float
        Seconds, ascending.
    chosen : int
        Which of the limits is the one that was asked for.
    forecasts : tuple of tuples of Forecast
        For each limit, one for each bandwidth.
    """

    bandwidths: tuple[float, ...]
    limits: tuple[float, ...]
    chosen: int
    forecasts: tuple[tuple[Forecast, ...], ...]

    def needs(self, place: int) -> float | None:
        """Return the least of the bandwidths from which on all converge at a limit, bytes a second; None if none do."""
        least = None
        for bandwidth, forecast in zip(reversed(self.bandwidths), reversed(self.forecasts[place]), strict=True):
            if not forecast.converges:
                break
            least = bandwidth
        return least


def sweep(forecast: Callable[[float, float], Forecast], bandwidth: float, limit: float) -> Sweep:
    """Return forecasts at bandwidths from a 16th to 16 times as much, and limits from an 8th to 8 times as much.

    Parameters
    ----------
    forecast : callable
        Called with bytes a second and seconds of downtime.
    bandwidth, limit : float
        Those that were asked for: both are among them.
    """
    bandwidths = [max(bandwidth * 2 ** (step / 2), 1.0) for step in range(-_EACH_WAY, _EACH_WAY + 1)]
    limits = sorted({limit, *((limit or _USUAL) * 2.0**step for step in range(-_LIMITS, _LIMITS + 1))})
    found = tuple(tuple(forecast(each, at_most) for each in bandwidths) for at_most in limits)
    return Sweep(tuple(bandwidths), tuple(limits), limits.index(limit), found)


def passes(writes: Writes, *, now: bool = False, **how: Any) -> tuple[Sample, ...]:
    """Return the passes of a migration that begins with a trace, or `now`: what is left at each harvest.

    Parameters
    ----------
    writes : Writes
        The trace.
    now : bool
        As for `replay`.
    how
        What `replay` is given: its bandwidth, limits and terms.
    """
    guest = TraceWrites(writes)
    (begin,) = guest.moments(start_of(0, now), 1)
    return run(guest, replace(course(**how), start=begin, horizon=guest.period)).samples
