"""A guest of few parameters, fitted to samples of a migration that goes on."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, pairwise
from math import exp
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwdbm.errors import SampleError
from hwdbm.forecast.samples import Sample
from hwdbm.forecast.writes import Dirty

Floats = NDArray[np.floating[Any]]

_RECENT = 16  # passes that are looked at: what the guest did long ago says little
_OLD = 0.85  # weight of a pass against that of the one after it
_FLOOR = 0.05  # of what was dirtied: no fit is better than that
_PERIODS = 40  # values of the hot set's period that are tried
_TIE = 0.002  # errors that differ by less don't differ
_ALIKE = 1.5  # times the best fit's error: what may be true as well


@dataclass(frozen=True, slots=True)
class Model:
    """How much a guest dirties in a period: ``hot * (1 - exp(-t / tau)) + cold * t`` bytes.

    Parameters
    ----------
    hot : float
        Bytes of the hot set, which is written over and over.
    tau : float
        Seconds after which 63 % of it were written.
    cold : float
        Bytes a second that are written beside it, each once.
    error : float
        Standard deviation of what was measured, as a part of what the model says.
    """

    hot: float
    tau: float
    cold: float
    error: float = 0.0

    def dirtied(self, seconds: float) -> float:
        """Return the bytes that are dirtied in a period."""
        return self.hot * (1 - exp(-seconds / self.tau)) + self.cold * seconds


def measured(samples: Sequence[Sample]) -> tuple[Floats, Floats]:
    """Return the periods between harvests, in seconds, and the bytes that were dirtied in each.

    Raises
    ------
    SampleError
        If no sample is of a second pass: nothing is known of what the guest writes, then.
    """
    groups = [list(group) for _, group in groupby(samples, lambda sample: sample.iteration)]
    polled = any(len(group) > 1 for group in groups)
    synced = [groups[0][0].time]
    periods, sizes = [], []
    for before, group in pairwise(groups):
        last, first = before[-1], group[0]
        bandwidth = first.bandwidth or last.bandwidth
        at = first.time
        if polled and bandwidth:  # the pass ended between two samples: when what had been left was sent
            at = min(max(last.time + last.remaining / bandwidth, last.time), first.time)
        missed = first.iteration - last.iteration
        period = (at - synced[-1]) / missed
        synced.append(at)
        size = first.remaining + (bandwidth or 0.0) * (first.time - at)
        if first.dirty_rate:  # what was left over from the pass before is none of it
            size = min(size, first.dirty_rate * period) or size
        if period > 0:
            periods.append(period)
            sizes.append(size)
    if not periods:
        raise SampleError("no sample is of a second pass: nothing is known yet of what the guest writes")
    return np.array(periods), np.array(sizes)


def fit(periods: Floats, sizes: Floats, total: float) -> list[Model]:
    """Return the models that fit, the best one first, then the others that may be true as well.

    Parameters
    ----------
    periods : (n,) float64 array
        Seconds.
    sizes : (n,) float64 array
        Bytes dirtied in each.
    total : float
        Bytes of memory.
    """
    return list(_fitting(tuple(periods[-_RECENT:].tolist()), tuple(sizes[-_RECENT:].tolist()), total))


# A report asks a hundred times what the same samples say, with bandwidths and limits of its own.
@lru_cache(1)
def _fitting(seconds: tuple[float, ...], dirtied: tuple[float, ...], total: float) -> tuple[Model, ...]:
    periods, sizes = np.array(seconds), np.maximum(dirtied, 1.0)
    weight = _OLD ** np.arange(len(sizes))[::-1]
    if len(sizes) == 1 or np.ptp(periods) < 0.02 * periods.mean():
        # One period says how much, and not how it grows: between all of it at once, and steadily.
        size, period = float(np.average(sizes, weights=weight)), float(periods.mean())
        error = max(float(np.std(sizes)) / size, 2 * _FLOOR)
        middle = size / (1 - exp(-2.0))
        return (
            Model(min(middle, total), period / 2, 0.0, error),
            Model(min(size, total), period / 50, 0.0, error),
            Model(0.0, period, size / period, error),
        )
    tried = []
    for tau in np.geomspace(periods.min() / 10, periods.max() * 3, _PERIODS):
        hot, cold = _two(1 - np.exp(-periods / tau), periods, sizes, weight, total)
        model = Model(hot, float(tau), cold)
        off = np.array([model.dirtied(period) for period in periods]) / sizes - 1
        tried.append((float(np.average(np.abs(off), weights=weight)), model, off))
    least = min(error for error, *_ in tried)
    fitting = [each for each in tried if each[0] <= max(least, _FLOOR / 2) * _ALIKE]
    equal = [each for each in tried if each[0] <= least + _TIE]  # of two passes, many periods say the same
    tried = [equal[len(equal) // 2]]
    # Of those that fit, the ends: the quickest and the slowest hot set.
    ends = [min(fitting, key=lambda each: each[1].tau), max(fitting, key=lambda each: each[1].tau)]
    chosen = [tried[0], *(each for each in ends if each is not tried[0])]
    return tuple(Model(model.hot, model.tau, model.cold, max(1.25 * error, _FLOOR)) for error, model, _ in chosen)


def _two(
    hot: Floats, cold: Floats, sizes: Floats, weight: Floats,
    total: float,
) -> tuple[float, float]:  # fmt: skip
    """Return the two coefficients of 0 or more with the least relative error, of which single outliers say little."""
    x, y = hot / sizes, cold / sizes
    robust: Floats = weight
    for _ in range(6):
        # The normal equations of two unknowns; where one of them were negative, it is 0.
        xx, xy, yy = float(robust @ (x * x)), float(robust @ (x * y)), float(robust @ (y * y))
        gx, gy = float(robust @ x), float(robust @ y)
        det, one, two = xx * yy - xy * xy, gx * yy - gy * xy, gy * xx - gx * xy
        if det > 1e-12 * xx * yy and one >= 0 and two >= 0:
            one, two = one / det, two / det
        else:
            alone = (gx / xx if xx else 0.0, 0.0), (0.0, gy / yy if yy else 0.0)
            one, two = min(alone, key=lambda c: float(robust @ (c[0] * x + c[1] * y - 1) ** 2))
        robust = weight / np.maximum(np.abs(one * x + two * y - 1), 0.02)
    return min(one, total), two


class ModelWrites:
    """A guest that writes as a model says.

    Parameters
    ----------
    model : Model
        The model.
    total : float
        Bytes of memory.
    page_size : int
        Bytes.
    """

    period = 0.0

    def __init__(self, model: Model, total: float, page_size: int) -> None:
        self._model, self.page_size = model, page_size
        self.npages = max(round(total / page_size), 1)

    def everything(self, begin: float, end: float) -> Dirty:
        """Return all pages."""
        del begin, end
        return Dirty(float(self.npages), 0.0)

    def written(self, begin: float, end: float, left: Dirty | None = None) -> Dirty:
        """Return how many pages are dirtied between two times, with what was left over."""
        model, seconds = self._model, end - begin
        pages = model.dirtied(seconds) / self.page_size
        if left is not None:
            # Of what was left over, the hot pages are written again.
            hot = model.hot / (model.hot + model.cold * model.tau) if model.hot else 0.0
            again = hot * (1 - exp(-seconds / model.tau))
            pages += left.pages * (1 - again)
        return Dirty(min(pages, float(self.npages)), 0.0)
