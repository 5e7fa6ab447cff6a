"""Forecasts: a migration replayed on a trace, at several moments and bandwidths."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate, groupby, pairwise
from math import ceil, inf, isinf
from statistics import NormalDist, median
from typing import Any

from hwdbm import check
from hwdbm.errors import SampleError
from hwdbm.forecast.model import Model, ModelWrites, fit, measured
from hwdbm.forecast.outcome import Estimate, Forecast, Needs
from hwdbm.forecast.samples import Sample
from hwdbm.forecast.simulate import Begun, Course, run
from hwdbm.forecast.terms import OWN, QEMU, Terms
from hwdbm.forecast.writes import GuestWrites, TraceWrites, Writes, start_of

_STARTS = 5
_DRAWS = 15  # migrations that are tried, at least, where the bandwidth isn't sure
_GOLDEN = (5**0.5 - 1) / 2
_SILVER = 2**0.5 - 1
_THIRD = 3**0.5 - 1
_RECENT = 16  # samples whose bandwidth counts
_LIKELY = 1.64  # standard deviations: nine times out of ten it is within that
_CLOSE = 1.02  # ratio at which a search ends
_FASTEST = 1e13  # bytes a second
_MIB = float(1 << 20)
_SEEN = 0.05  # MiB: a hot set that isn't printed as 0.0


def replay(
    writes: Writes,
    *,
    bandwidth: float,
    max_downtime: float = 0.3,
    terms: Terms = OWN,
    start_ns: int = 0,
    starts: int | None = None,
    now: bool = False,
    timeout: float | None = None,
    max_iterations: int = 30,
    on_limit: str | None = None,
    auto_converge: bool = False,
    throttle: float = 0.0,
    needs: bool = True,
) -> Forecast:
    """Forecast a migration by replaying its passes on a trace.

    The passes are those of the terms' structure. A pass takes the pages that the trace says were written while the
    pass before it was sent; see `hwdbm.forecast.writes.TraceWrites` for a pass that ends within an interval. After its
    last interval a trace goes on with its steady part, again and again.

    Parameters
    ----------
    writes : Writes
        The trace, as of `hwdbm.trace.open_trace`.
    bandwidth : float
        Bytes a second, 1 or more.
    max_downtime : float
        Seconds that the guest may stand still.
    terms : Terms
        What it costs, and whose passes they are.
    start_ns : int
        Where in the trace the migration begins, in nanoseconds.
    starts : int, optional
        Number of moments to begin at, equally far apart, the first at `start_ns`. By default 5. From each some
        migrations are tried, with bandwidths that are spread as `terms` says. The forecast is the value from which
        those of all differ least, as parts of themselves, and its interval reaches over all of them.
    now : bool
        Whether the migration begins where the trace ends. Then the moments are those of the trace at which the guest
        did what it did at the end, `starts` of them or fewer; see `hwdbm.forecast.writes.TraceWrites.moments`.
    timeout : float, optional
        Seconds after which the migration is given up.
    max_iterations : int
        Passes in a row without progress, after which `on_limit` says what happens.
    on_limit : {"abort", "wait", "pause"}, optional
        As in `hwdbm.migration.Settings`. By default "abort", and for QEMU "wait".
    auto_converge : bool
        Whether the vCPUs are slowed down as QEMU does.
    throttle : float
        Percent of their time that the vCPUs are without from the beginning.
    needs : bool
        Whether to look for the bandwidth, the downtime and the throttle that would do, which takes most of the time.

    Returns
    -------
    Forecast
        What it would take.

    Raises
    ------
    ValueError
        If a number is out of range, the trace has no interval, or intervals that go backwards, or both `now` and
        `start_ns` say when it begins.

    Examples
    --------
    >>> import numpy as np
    >>> from hwdbm.forecast import MemoryWrites, replay
    >>> words = np.zeros((50, 64), dtype=np.uint64)  # 16 MiB, of which the guest writes 1 MiB over and over
    >>> words[:, :4] = np.uint64(0xFFFF_FFFF_FFFF_FFFF)
    >>> writes = MemoryWrites(words, interval=0.1)
    >>> forecast = replay(writes, bandwidth=10 << 20, max_downtime=0.2)
    >>> forecast.converges, round(forecast.passes.value)
    (True, 2)
    """
    plan = course(bandwidth, max_downtime, terms, timeout, max_iterations, on_limit, auto_converge, throttle)
    start = start_of(start_ns, now)
    if starts is not None:
        starts = check.integer(starts, "starts", 1, 1000)
    needs = check.flag(needs, "needs")
    check.instance(writes, Writes, "writes")
    guest = TraceWrites(writes)
    plan = replace(plan, horizon=guest.period)
    return _forecast_of(guest, plan, guest.moments(start, starts or _STARTS), needs=needs, note=_repeated(guest))


def course(
    bandwidth: float,
    max_downtime: float = 0.3,
    terms: Terms = OWN,
    timeout: float | None = None,
    max_iterations: int = 30,
    on_limit: str | None = None,
    auto_converge: bool = False,
    throttle: float = 0.0,
) -> Course:
    """Return how a migration goes that is given what `replay` is given; `ValueError` if a number is out of range."""
    check.instance(terms, Terms, "terms")
    if on_limit is not None:
        check.one_of(on_limit, ("abort", "wait", "pause"), "on_limit")
    return Course(
        terms,
        check.real(bandwidth, "bandwidth", 1),
        check.real(max_downtime, "max_downtime", 0),
        timeout=inf if timeout is None else check.real(timeout, "timeout", 0),
        max_iterations=check.integer(max_iterations, "max_iterations", 1),
        on_limit=on_limit or ("wait" if terms.structure == "qemu" else "abort"),
        auto_converge=check.flag(auto_converge, "auto_converge"),
        throttle=check.real(throttle, "throttle", 0, 99),
    )


def _repeated(guest: TraceWrites) -> Callable[[float, float], str]:
    def note(until: float, first: float) -> str:
        if not guest.repeats(until):
            return ""
        whole = guest.ends
        return (
            f" The trace is {whole:.3g} s long: after that its last {guest.period:.3g} s are taken to come "
            "again and again."
        ) + (
            f" The first pass takes {first:.3g} s. What the guest writes in it that isn't in so short a trace is not "
            "counted, so the rest may be more."
            if first > guest.period
            else ""
        )

    return note


def _forecast_of(
    guest: GuestWrites,
    plan: Course,
    begins: Sequence[float],
    *,
    needs: bool,
    note: Callable[[float, float], str] = lambda _until, _first: "",
) -> Forecast:
    """Forecast a migration of a guest that begins at one of some times."""
    middle = [run(guest, each) for each in _draws(plan, begins)]
    converges = sum(each.converges for each in middle) * 2 > len(middle)
    alike = [each for each in middle if each.converges == converges]

    def estimate(name: str) -> Estimate:
        values = [float(getattr(each, name)) for each in alike]
        return Estimate(_likeliest(values), min(values), max(values))

    flat = [each.flat_from for each in alike if each.flat_from is not None]
    found, enough = (_needs(guest, plan, begins), _time_for(guest, plan, begins)) if needs else (Needs(), None)
    forecast = Forecast(
        converges,
        int(median(flat)) if len(flat) * 2 > len(alike) else None,
        estimate("passes"),
        estimate("total_time"),
        estimate("downtime"),
        estimate("transferred"),
        found,
    )
    until = max(each.guest for each in middle)
    least = float(median(each.least for each in alike))
    why = _why(forecast, plan, least, enough, differ=len(alike) < len(middle), sought=needs)
    first = max((each.samples[0].time for each in middle if each.samples), default=0.0)
    return replace(forecast, why=why + note(until, first))


def _draws(plan: Course, begins: Sequence[float]) -> list[Course]:
    """Return the migrations that are tried: from each start some, with what isn't known spread as it may be.

    That is the bandwidths, of which the terms say how sure they are, and how much is in the sockets at the end.
    """
    terms = plan.terms
    number = max(len(begins), _DRAWS) if terms.spread else len(begins)
    # Steps of irrational numbers: the values of each start, and of all of them, are spread as they should be, and one
    # doesn't go with another.
    bandwidths, held, lasts = (_places(number, step) for step in (_GOLDEN, _SILVER, _THIRD))
    return [
        replace(
            plan, start=begins[i * len(begins) // number], held=held[i],
            bandwidth=plan.bandwidth * _factor(terms.spread, bandwidths[i]),
            terms=replace(terms, last_bandwidth=max(terms.last_bandwidth * _factor(terms.last_spread, lasts[i]), 1.0))
            if terms.last_bandwidth else terms,
        )
        for i in range(number)
    ]  # fmt: skip


def _factor(spread: float, place: float) -> float:
    """Return what a part of all values is below, of those that are 1 on average, and spread so much."""
    return max(NormalDist(1.0, spread).inv_cdf(place), 0.05) if spread else 1.0


def _places(number: int, step: float) -> list[float]:
    """Return the middles of as many equal parts of 0 to 1, in the order of what steps of `step`, modulo 1, give."""
    order = sorted(range(number), key=lambda i: (i * step) % 1)
    places = {i: (place + 0.5) / number for place, i in enumerate(order)}
    return [places[i] for i in range(number)]


def _likeliest(values: Sequence[float]) -> float:
    """Return the value from which all of them, as parts of themselves, differ least: a median that leans to the small.

    How far a forecast is off is told as a part of what it was. So half a second too much counts more where it was one
    second than where it was two; which is a median with weights of 1 / value.
    """
    ordered = sorted(values)
    if not ordered[0]:
        return float(median(ordered))
    weights = list(accumulate(1 / each for each in ordered))
    return ordered[bisect_left(weights, weights[-1] / 2)]


def _time_for(guest: GuestWrites, plan: Course, begins: Sequence[float]) -> float | None:
    """Return the seconds in which it converges at each of some times, where the timeout is too short for that."""
    if isinf(plan.timeout):
        return None
    done = [run(guest, replace(plan, start=begin, timeout=inf)) for begin in _some(begins)]
    longest = max(each.total_time for each in done)
    return longest if all(each.converges for each in done) and longest > plan.timeout else None


def _some(begins: Sequence[float]) -> Sequence[float]:
    """Return a few of the times, the first and the last among them."""
    return [begins[at] for at in sorted({0, len(begins) // 2, len(begins) - 1})]


def _needs(guest: GuestWrites, plan: Course, begins: Sequence[float]) -> Needs:
    """Return what would do at each of the times, by bisection."""
    plan = replace(plan, decide=None)
    some = _some(begins)

    def would(**changed: Any) -> bool:
        return all(run(guest, replace(plan, start=begin, **changed)).converges for begin in some)

    at = would()
    return Needs(_bandwidth_for(plan, would, at), _downtime_for(guest, plan, would, at), _throttle_for(plan, would, at))


def _bandwidth_for(plan: Course, would: Callable[..., bool], at: bool) -> float | None:
    low = high = plan.bandwidth
    if at:
        while low > 1 and would(bandwidth=low):
            high, low = low, low / 4
    else:
        while high < _FASTEST and not would(bandwidth=high):
            low, high = high, high * 4
        if high >= _FASTEST:
            return None
    while high > low * _CLOSE:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if would(bandwidth=middle) else (middle, high)
    return high


def _downtime_for(guest: GuestWrites, plan: Course, would: Callable[..., bool], at: bool) -> float | None:
    # As long as all of memory takes is enough, if any limit is.
    low, high = 0.0, max(guest.npages * guest.page_size / plan.bandwidth, 1e-3) * 1.1
    if at and (plan.max_downtime <= high or not would(max_downtime=high)):
        high = plan.max_downtime
    if not at and not would(max_downtime=high):
        return None  # it is the time that is too short
    while high > low * _CLOSE and high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (low, middle) if would(max_downtime=middle) else (middle, high)
    return high


def _throttle_for(plan: Course, would: Callable[..., bool], at: bool) -> int | None:
    if at:
        return int(plan.throttle)
    low, high = int(plan.throttle), 99
    if not would(throttle=float(high)):
        return None
    while high > low + 1:
        middle = (low + high) // 2
        low, high = (low, middle) if would(throttle=float(middle)) else (middle, high)
    return high


# --- samples ----------------------------------------------------------------------------------------------------


def from_samples(
    samples: Sequence[Sample],
    *,
    bandwidth: float | None = None,
    max_downtime: float | None = None,
    terms: Terms | None = None,
    timeout: float | None = None,
    max_iterations: int = 30,
    on_limit: str | None = None,
    auto_converge: bool = False,
    needs: bool = True,
) -> Forecast:
    """Forecast the end of a migration that goes on, from samples of it.

    A model of few parameters is fitted to what was dirtied between harvests: a hot set that is written over and over,
    and pages beside it, at a rate. The passes from the last sample on are simulated with it. Where other values of the
    parameters fit nearly as well, the interval has what they say too.

    Parameters
    ----------
    samples : sequence of Sample
        In order; one or more of a second pass among them.
    bandwidth : float, optional
        Bytes a second from now on; by default as it was.
    max_downtime : float, optional
        Seconds; by default the limit in the samples, or QEMU's default of 0.3.
    terms : Terms, optional
        What it costs, and whose passes they are: by default QEMU's for samples of QEMU and libvirt, ours for others.
    timeout : float, optional
        Seconds since its beginning after which the migration is given up.
    max_iterations, on_limit, auto_converge, needs
        As for `replay`.

    Returns
    -------
    Forecast
        Of the whole migration: what is over is counted in.

    Raises
    ------
    SampleError
        If there is no sample, none is of a second pass, or none says what the bandwidth is.

    Examples
    --------
    >>> from hwdbm.forecast import Sample, from_samples
    >>> rest = [1e9, 2e8, 4e7, 8e6]
    >>> passes = [Sample(sum(rest[:i]) / 1e8, i + 1, size, 1e9, bandwidth=1e8) for i, size in enumerate(rest)]
    >>> forecast = from_samples(passes[:3], max_downtime=0.1)
    >>> forecast.converges, round(forecast.passes.value)
    (True, 4)
    """
    samples = list(check.instances(samples, Sample, "samples"))
    if not samples:
        raise SampleError("there are no samples")
    last = samples[-1]
    total = next((each.total for each in reversed(samples) if each.total), None)
    if total is None:
        total = max(each.remaining for each in samples)
    if terms is not None:
        check.instance(terms, Terms, "terms")
    else:
        terms = QEMU if last.source in {"qemu", "libvirt"} else OWN
    speed, spread = _speed(samples)
    if bandwidth is None and speed is None:
        raise SampleError("no sample says what the bandwidth is: give it")
    limit = next((each.downtime_limit for each in reversed(samples) if each.downtime_limit is not None), 0.3)
    plan = course(
        speed if bandwidth is None else bandwidth,  # type: ignore[arg-type]  # one of them is there
        limit if max_downtime is None else max_downtime,
        replace(terms, spread=max(terms.spread, spread)) if bandwidth is None else terms,
        timeout, max_iterations, on_limit, auto_converge,
    )  # fmt: skip
    periods, sizes = measured(samples)
    models = fit(periods, sizes, total)
    plan = replace(plan, begun=_begun(samples))
    needs = check.flag(needs, "needs")
    return _of_models(models, plan, total, last.page_size, needs=needs)


def _speed(samples: Sequence[Sample]) -> tuple[float | None, float]:
    """Return the bandwidth of late, and its standard deviation as a part of it, of which outliers say little."""
    rates = [each.bandwidth for each in samples if each.bandwidth][-_RECENT:]
    if not rates:
        pairs = [(a, b) for a, b in pairwise(samples) if a.transferred is not None and b.transferred is not None]
        rates = [(b.transferred - a.transferred) / (b.time - a.time) for a, b in pairs if b.time > a.time][-_RECENT:]  # type: ignore[operator]  # they are there
        rates = [each for each in rates if each > 0]
    if not rates:
        return None, 0.0
    middle = median(rates)
    return middle, min(1.48 * median(abs(each - middle) for each in rates) / middle, 0.5)


def _begun(samples: Sequence[Sample]) -> Begun:
    firsts = [next(group) for _, group in groupby(samples, lambda sample: sample.iteration)]
    last = samples[-1]
    history = tuple((each.iteration, each.remaining) for each in firsts if each.iteration > 1)
    since, sent = last.time - firsts[-1].time, last.transferred or 0.0
    return Begun(last.time, last.iteration, last.remaining, since, sent, history)


def _of_models(models: Sequence[Model], plan: Course, total: float, page_size: int, *, needs: bool) -> Forecast:
    def guest(model: Model, scale: float = 1.0) -> ModelWrites:
        return ModelWrites(replace(model, hot=model.hot * scale, cold=model.cold * scale), total, page_size)

    best = models[0]
    forecast = _forecast_of(guest(best), plan, [plan.start], needs=needs)
    others = [guest(model) for model in models[1:]]
    others += [guest(best, max(1 + side * _LIKELY * best.error, 0.05)) for side in (-1, 1)]
    still = replace(plan, terms=replace(plan.terms, spread=0.0))
    wide = [_forecast_of(other, still, [plan.start], needs=False) for other in others]
    alike = [forecast, *(each for each in wide if each.converges == forecast.converges)]

    def wider(name: str) -> Estimate:
        all_ = [getattr(each, name) for each in alike]
        return Estimate(all_[0].value, min(each.low for each in all_), max(each.high for each in all_))

    hot, cold = best.hot / _MIB, f"dirties {best.cold / _MIB:,.1f} MiB/s"
    told = f"has a hot set of {hot:,.1f} MiB, of which it writes most in {best.tau:.2g} s, and {cold} beside it"
    if hot < _SEEN:
        told = f"has no hot set, and {cold}"
    why = f"{forecast.why} The samples say that the guest {told}."
    if len(alike) <= len(wide):
        why += " Other values of these fit nearly as well, and some of them say otherwise."
    return replace(
        forecast, passes=wider("passes"), total_time=wider("total_time"), downtime=wider("downtime"),
        transferred=wider("transferred"), why=why,
    )  # fmt: skip


# --- why --------------------------------------------------------------------------------------------------------


def _why(forecast: Forecast, plan: Course, least: float, enough: float | None, *, differ: bool, sought: bool) -> str:
    limit, speed = _ms(plan.max_downtime), f"{plan.bandwidth / _MIB:,.3g} MiB/s"
    if forecast.converges:
        text = (
            f"It converges: after {_passes(forecast.passes.value - 1)} the rest fits into {limit} at {speed}, and the "
            f"guest stands still for about {_ms(forecast.downtime.value)}."
        )
        if forecast.downtime.value > plan.max_downtime:
            text += " That is more than the limit, which counts the pages alone, and not the handover."
    elif forecast.total_time.value > plan.timeout:
        text = f"It doesn't converge in {plan.timeout:g} s: that isn't enough for its passes at {speed}."
    else:
        text = (
            f"It doesn't converge: from pass {forecast.flat_from} on each pass takes as long as the guest needs to "
            f"dirty as much again, so none leaves notably less than {least / _MIB:,.1f} MiB, which takes "
            f"{_ms(least / plan.bandwidth)} at {speed}, and {limit} are allowed."
        )
    if not forecast.converges:
        text += _would(forecast.needs)
        if sought:
            text += _would_not(forecast.needs, plan.timeout)
        if enough is not None:
            text += f" It would converge as it is in {_longer(enough)} s."
    if differ:
        text += " It depends on the moment and on the bandwidth: at some that were tried it goes the other way."
    return text


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.0f} ms" if seconds < 1e6 else f"{seconds * 1e3:.3g} ms"


def _passes(number: float) -> str:
    return "1 pass" if round(number) == 1 else f"{number:.0f} passes"


def _would(needs: Needs) -> str:
    ways = []
    if needs.bandwidth is not None:
        ways.append(f"a bandwidth of {needs.bandwidth / _MIB:,.4g} MiB/s")
    if needs.max_downtime is not None:
        ways.append(f"a downtime limit of {_ms(needs.max_downtime)}")
    if needs.throttle:
        ways.append(f"vCPUs throttled by {needs.throttle} %")
    if not ways:
        return ""
    return f" It would converge with {', or '.join(ways)}."


def _would_not(needs: Needs, timeout: float) -> str:
    """Return what of it helps nothing, however much: then JSON has null for it."""
    ways = {"bandwidth": needs.bandwidth, "limit of the downtime": needs.max_downtime, "throttling": needs.throttle}
    missing = [f"no {name}" for name, value in ways.items() if value is None]
    if not missing:
        return ""
    within = "" if timeout == inf else f" within {timeout:g} s"
    return f" {' and '.join(missing).capitalize()} would do{within}."


def _longer(seconds: float) -> str:
    """Return seconds, rounded up to a hundredth: a timeout of so many is enough."""
    return f"{ceil(seconds * 100) / 100:g}"
