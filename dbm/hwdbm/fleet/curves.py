"""What a VM's migration takes at each bandwidth: asked of a forecast at a few, and read off between them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

import numpy as np
from numpy.typing import NDArray

from hwdbm import check
from hwdbm.fleet.plan import FleetVm

_QUARTERS = 3  # of the highest bandwidth that are asked for, each a quarter of the one before
_SHORTEST, _LONGEST = 1e-9, 1e18  # seconds that anything takes
_HALVINGS = 4  # of the step in which a VM begins to converge: to 1/16 of it, 9 %
_WIDTH = _QUARTERS + 1 + _HALVINGS
"""Points of a curve."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Taken:
    """What a migration takes at a bandwidth.

    Parameters
    ----------
    total : float
        Seconds from its start to the guest's running at the destination.
    downtime : float
        Seconds of them that the guest stands still. If it doesn't converge, the least pause that would end it.
    converges : bool
        Whether it gets below the VM's limit of downtime.

    Raises
    ------
    ValueError
        If a time is less than nothing, or more than 1e18. Of a migration that doesn't converge it may be infinite.
    TypeError
        If a time is no number, or `converges` no bool.
    """

    total: float
    downtime: float
    converges: bool

    def __post_init__(self) -> None:
        converges = check.flag(self.converges, "converges")
        object.__setattr__(self, "converges", converges)
        for name in ("total", "downtime"):
            seconds = getattr(self, name)
            if converges or not (isinstance(seconds, float) and seconds == inf):
                object.__setattr__(self, name, check.real(seconds, name, 0, _LONGEST))


Found = tuple[list[tuple[float, float, float]], float, float]
"""A VM's points (bandwidth, total, downtime), ascending; its pause at the highest bandwidth; what it needs."""

Curve = Callable[[float], Taken]
Model = Callable[[FleetVm], Curve]
"""Returns the forecast of a VM: called with bytes a second. Dask sends it to workers, so it has to be picklable."""


@dataclass(frozen=True, slots=True)
class Curves:
    """The curves of some VMs.

    Parameters
    ----------
    bandwidth : (n, _WIDTH) float64 array
        Bytes a second, ascending, from the least at which it is known to converge; the first may be repeated.
    total, downtime : (n, _WIDTH) float64 array
        Seconds; infinite in a row that doesn't converge at its highest bandwidth.
    pause : (n,) float64 array
        Seconds that the guest stands still at the highest bandwidth, converging or not.
    least : (n,) float64 array
        The bandwidth that each needs to converge; infinite if none does. That of a curve that converges at each point
        lies below its first: the pause has the same bytes there, until they take longer than the limit.
    """

    bandwidth: Floats
    total: Floats
    downtime: Floats
    pause: Floats
    least: Floats

    def at(self, rows: NDArray[np.intp], bandwidth: Floats) -> tuple[Floats, Floats]:
        """Return the seconds in all and those of the pause of some VMs, each at its bandwidth: bytes a second.

        Between two points both are a part that is fixed and bytes over the bandwidth.
        """
        known = self.bandwidth[rows]
        right = np.minimum(np.maximum((known < bandwidth[:, None]).sum(axis=1), 1), _WIDTH - 1)
        each = np.arange(rows.size)
        low, high = known[each, right - 1], known[each, right]
        inside = np.minimum(np.maximum(bandwidth, low), high)
        wide = 1 / low - 1 / high
        part = np.divide(1 / low - 1 / inside, wide, out=np.ones_like(wide), where=wide > 0)
        slower = np.where(bandwidth < known[:, 0], np.maximum(bandwidth, 1e-300) / known[:, 0], 1.0)
        found = []
        for table in (self.total, self.downtime):
            ends = table[rows, right - 1], table[rows, right]
            with np.errstate(invalid="ignore"):  # inf - inf, of what doesn't converge
                found.append((ends[0] + part * (ends[1] - ends[0])) / slower)
        never = (bandwidth < self.least[rows]) | (bandwidth <= 0)
        return np.where(never, inf, found[0]), np.where(never, inf, found[1])


def asked(highest: float) -> Floats:
    """Return the bandwidths at which each VM is looked at first, from the highest down by quarters."""
    return np.asarray(highest / 4.0 ** np.arange(_QUARTERS + 1))


def points(curve: Curve, highest: float, limit: float) -> Found:
    """Return a VM's curve up to a bandwidth, at a limit of downtime in seconds.

    It is followed from the highest bandwidth down to the first that doesn't converge: what lies below that is of no
    use, and takes a forecast the longest.
    """
    found: list[tuple[float, float, float]] = []
    failed, pause = 0.0, 0.0
    for bandwidth in asked(highest).tolist():
        point = _taken(curve, bandwidth)
        if not found:
            pause = point.downtime
        if not point.converges:
            failed = bandwidth
            break
        found.append((bandwidth, point.total, point.downtime))
    for _ in range(_HALVINGS if failed and found else 0):
        middle = (failed * found[-1][0]) ** 0.5
        point = _taken(curve, middle)
        if point.converges:
            found.append((middle, point.total, point.downtime))
        else:
            failed = middle
    if failed or not found:
        return found[::-1], pause, found[-1][0] if found else inf
    lowest, _, last = found[-1]
    return found[::-1], pause, lowest * min(last / limit, 1.0) if limit else lowest


def _taken(curve: Curve, bandwidth: float) -> Taken:
    taken = curve(bandwidth)
    check.instance(taken, Taken, "a forecast")
    return taken


def stack(found: Sequence[Found]) -> Curves:
    """Return what `points` found of several VMs as one table."""
    table = np.full((3, len(found), _WIDTH), inf)
    table[0] = 1.0  # any will do where nothing converges
    for row, (curve, _, _) in enumerate(found):
        if curve:
            padded = [curve[0]] * (_WIDTH - len(curve)) + curve
            table[:, row] = np.array(padded).T
    pause, least = (np.array([each[at] for each in found], dtype=np.float64) for at in (1, 2))
    return Curves(table[0], np.maximum(table[1], _SHORTEST), table[2], pause, least)
