"""Stop rules: when to pause the guest for the last pass, and when to give up, as functions of the same samples."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from math import inf
from typing import Literal

from hwdbm import check
from hwdbm.forecast.samples import Sample

_PROGRESS = 0.95  # of what remained: less is progress, to our own rule
_GIB = float(1 << 30)

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

    def __post_init__(self) -> None:
        check.one_of(self.action, ("continue", "switch", "abort"), "action")
        check.instance(self.why, str, "why")
        if self.limit is not None:
            object.__setattr__(self, "limit", check.real(self.limit, "limit", 0))
        if self.throttle is not None:
            object.__setattr__(self, "throttle", check.integer(self.throttle, "throttle", 0, 100))


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


def passes(samples: Sequence[Sample]) -> list[Sample]:
    """Return the first sample of each pass."""
    return [next(group) for _, group in groupby(samples, lambda sample: sample.iteration)]


def _checked(samples: Sequence[Sample]) -> Sample:
    check.instance(samples, Sequence, "samples")
    last = next(reversed(samples), None)
    check.instance(last, Sample, "the last of samples")
    assert last is not None  # noqa: S101 - it is a Sample
    return last


def _implied(sample: Sample, bandwidth: float | None) -> float:
    """Return the seconds that what remains takes; for ever where no bandwidth is known."""
    if not sample.remaining:
        return 0.0
    return sample.remaining / bandwidth if bandwidth else inf


def ours(
    samples: Sequence[Sample], *, max_downtime: float = 0.3, max_iterations: int = 30, on_limit: str = "abort"
) -> Verdict:
    """Decide as `hwdbm.migration` does: pause if the rest fits, and give up after passes without progress.

    Parameters
    ----------
    samples : sequence of Sample
        From the beginning until now; the same for all rules.
    max_downtime : float
        Seconds.
    max_iterations : int
        Passes in a row without progress.
    on_limit : {"abort", "wait", "pause"}
        What happens after them.

    Examples
    --------
    >>> from hwdbm.forecast import Sample
    >>> ours([Sample(1, 1, 1000, bandwidth=10), Sample(2, 2, 20, bandwidth=100)]).action
    'switch'
    """
    last, limit = _checked(samples), check.real(max_downtime, "max_downtime", 0)
    most = check.integer(max_iterations, "max_iterations", 1)
    check.one_of(on_limit, ("abort", "wait", "pause"), "on_limit")
    if last.iteration < 2:
        return Verdict("continue", "the first pass sends everything")
    implied = _implied(last, last.bandwidth)
    if implied <= limit:
        return Verdict("switch", f"the rest takes {_ms(implied)}, and {_ms(limit)} are allowed")
    best, *others = (each for each in passes(samples) if each.iteration > 1)
    flat = 0
    for each in others:
        best, flat = (each, 0) if each.remaining < best.remaining * _PROGRESS else (best, flat + 1)
    if flat < most or on_limit == "wait":
        return Verdict("continue", f"the rest takes {_ms(implied)}")
    return Verdict(
        "abort" if on_limit == "abort" else "switch", f"no pass after pass {best.iteration} left notably less"
    )


def qemu(samples: Sequence[Sample], *, max_downtime: float = 0.3, auto_converge: bool = False) -> Verdict:
    """Decide as QEMU does: pause when less than bandwidth times downtime limit is left of what was just harvested.

    With `auto_converge`, of the passes in which the guest dirtied more than half of what was sent, each second one
    raises the throttle: see `Throttle`. QEMU never gives up.

    Parameters
    ----------
    samples : sequence of Sample
        From the beginning until now.
    max_downtime : float
        Seconds: ``downtime-limit``.
    auto_converge : bool
        Whether the capability is on.

    Examples
    --------
    >>> from hwdbm.forecast import Sample
    >>> qemu([Sample(1, 2, 29, bandwidth=100)]).action, qemu([Sample(1, 2, 30, bandwidth=100)]).action
    ('switch', 'continue')
    """
    last, limit = _checked(samples), check.real(max_downtime, "max_downtime", 0)
    throttle = _auto_converged(samples) if check.flag(auto_converge, "auto_converge") else None
    if last.iteration > 1 and last.remaining < (last.bandwidth or 0.0) * limit:
        why = f"less than {_ms(limit)} at the bandwidth are left"
        return Verdict("switch", why, throttle=throttle)
    return Verdict("continue", f"{_ms(limit)} at the bandwidth are exceeded", throttle=throttle)


def _auto_converged(samples: Sequence[Sample]) -> int:
    throttle = Throttle()
    for before, each in pairwise(passes(samples)):
        period = each.time - before.time
        dirtied = each.remaining if each.dirty_rate is None else each.dirty_rate * period
        sent = (each.transferred or 0.0) - (before.transferred or 0.0) or (each.bandwidth or 0.0) * period
        throttle.next(dirtied, sent)
    return throttle.percent


def kubevirt(
    samples: Sequence[Sample],
    *,
    max_downtime: float = 0.9,
    progress_timeout: float = 60.0,
    timeout_per_gib: float = 150.0,
    stall_margin: float = 0.04,
    ewma_alpha: float = 0.4,
    possible_factor: float = 1.5,
    decay: float = 0.5,
    search_local_minima: bool = True,
) -> Verdict:
    """Decide as KubeVirt's VEP 248 does for migrations by pre-copy alone, with its defaults.

    At the end of each pass the migration is stalled if no less remains than `stall_margin` below the least that
    remained `progress_timeout` ago or before. From then on it waits for a pass that leaves about as little as the best
    one since the stall began; after `progress_timeout` without one it takes the next best, and then after shorter and
    shorter times. Then what remains, over the smoothed bandwidth, is the implied downtime: up to `max_downtime`, QEMU's
    limit is raised to that, and QEMU has `progress_timeout` to switch; from `possible_factor` times as much on the
    migration is aborted; between them it waits. Until the stall QEMU's own limit of 300 ms holds.

    Parameters
    ----------
    samples : sequence of Sample
        From the beginning until now; KubeVirt has one each 400 ms, and at each pass.
    max_downtime : float
        Seconds: ``maxDowntimeMs``.
    progress_timeout : float
        Seconds: ``progressTimeout``, which later drafts call ``stallProgressTimeout``, with 40 s.
    timeout_per_gib : float
        Seconds: ``completionTimeoutPerGiB``.
    stall_margin : float
        ``stallMargin``, as a part.
    ewma_alpha : float
        ``ewmaAlpha``: the weight of a new sample of the bandwidth.
    possible_factor : float
        ``precopyPossibleFactor``.
    decay : float
        ``patienceWindowDecayFactor``.
    search_local_minima : bool
        ``searchLocalMinima``: whether to wait for a good pass.

    Examples
    --------
    >>> from hwdbm.forecast import Sample
    >>> flat = [Sample(5 * i, i + 1, 8e7, 1e9, bandwidth=1e8) for i in range(20)]
    >>> kubevirt(flat[:12]).action, kubevirt(flat[:14]).action
    ('continue', 'switch')
    """
    last, most = _checked(samples), check.real(max_downtime, "max_downtime", 0)
    window, margin = check.real(progress_timeout, "progress_timeout", 0), check.real(stall_margin, "stall_margin", 0, 1)
    per_gib, alpha = check.real(timeout_per_gib, "timeout_per_gib", 0), check.real(ewma_alpha, "ewma_alpha", 0, 1)
    factor, decay = check.real(possible_factor, "possible_factor", 1), check.real(decay, "decay", 0, 1)
    search = check.flag(search_local_minima, "search_local_minima")
    stalled = _Stalled(window, margin, decay, search)
    limit, deadline, speed, iteration = min(most, 0.3), inf, 0.0, 1
    verdict = Verdict("continue", "not stalled", limit)
    for each in samples:
        if each.bandwidth:
            speed = alpha * each.bandwidth + (1 - alpha) * speed if speed else each.bandwidth
        if each.total and each.time > per_gib * each.total / _GIB and deadline == inf:
            return Verdict("abort", f"the migration takes longer than {per_gib:g} s a GiB", limit)
        if each.time > deadline:
            return Verdict("abort", f"QEMU didn't switch within {window:g} s", limit)
        if each.iteration == iteration:
            continue
        iteration = each.iteration
        if deadline < inf or not stalled.ended(each.time, each.remaining):
            continue
        implied = _implied(each, speed)
        verdict = Verdict("continue", f"stalled, and the rest takes {_ms(implied)}", limit)
        if implied <= most:
            limit, deadline = most, each.time + window
            why = f"stalled, and the rest takes {_ms(implied)} of {_ms(most)}"
            verdict = Verdict("continue", why, limit)
        elif implied >= most * factor:
            return Verdict("abort", f"stalled, and the rest takes {_ms(implied)}, far from {_ms(most)}", limit)
    if last.iteration > 1 and last.remaining < (last.bandwidth or speed) * limit:
        return Verdict("switch", verdict.why if deadline < inf else f"QEMU's own limit of {_ms(limit)}", limit)
    return verdict


class _Stalled:
    """VEP 248's stall detector: whether a pass that ended is a good moment to act, because none will be much better."""

    def __init__(self, window: float, margin: float, decay: float, search: bool) -> None:
        self._window, self._margin, self._decay, self._search = window, margin, decay, search
        self._seen: list[tuple[float, float]] = []  # when passes ended, and what remained
        self._since: list[float] = []  # what remained after passes since the stall
        self._best: float | None = None
        self._patience, self._until = window, inf

    def ended(self, now: float, remaining: float) -> bool:
        """Take note of what remains after a pass, and return whether to act."""
        self._seen.append((now, remaining))
        if self._best is None:
            old = [each for each in self._seen if each[0] <= now - self._window]
            if not old or remaining < min(left for _, left in old) * (1 - self._margin):
                return False
            self._best = min(left for _, left in self._seen)
            self._until = now + self._patience
        else:
            self._since.append(remaining)
        if self._near(remaining):
            return True
        if now >= self._until and self._since:
            self._best = min(self._since)
            self._since.remove(self._best)
            self._patience *= self._decay
            self._until = now + self._patience
        return self._near(remaining)

    def _near(self, remaining: float) -> bool:
        assert self._best is not None  # noqa: S101 - it is stalled
        return not self._search or remaining <= self._best * (1 + self._margin)


def cloud_hypervisor(
    samples: Sequence[Sample], *, max_downtime: float = 0.3, timeout: float = 3600.0, on_timeout: str = "cancel"
) -> Verdict:
    """Decide as Cloud Hypervisor does: pause if the rest fits at the last pass's bandwidth; in time, or as it is told.

    Parameters
    ----------
    samples : sequence of Sample
        From the beginning until now.
    max_downtime : float
        Seconds: ``downtime_ms``.
    timeout : float
        Seconds: ``timeout_s``.
    on_timeout : {"cancel", "ignore"}
        ``timeout_strategy``: to give the migration up, or to pause the guest for as long as it takes.

    Examples
    --------
    >>> from hwdbm.forecast import Sample
    >>> late = [Sample(3600, 9, 100, bandwidth=100)]
    >>> cloud_hypervisor(late).action, cloud_hypervisor(late, on_timeout="ignore").action
    ('abort', 'switch')
    """
    last, limit = _checked(samples), check.real(max_downtime, "max_downtime", 0)
    timeout = check.real(timeout, "timeout", 0)
    check.one_of(on_timeout, ("cancel", "ignore"), "on_timeout")
    implied = _implied(last, last.bandwidth) if last.iteration > 1 else inf
    if implied <= limit:
        return Verdict("switch", f"the rest takes {_ms(implied)}, and {_ms(limit)} are allowed")
    if last.time >= timeout:
        return Verdict("abort" if on_timeout == "cancel" else "switch", f"{timeout:g} s are over")
    return Verdict("continue", f"the rest takes {_ms(implied)}" if implied < inf else "the first pass")


def qemu_auto_converge(samples: Sequence[Sample], *, max_downtime: float = 0.3) -> Verdict:
    """Decide as `qemu` does with auto-converge.

    Examples
    --------
    >>> from hwdbm.forecast import Sample
    >>> busy = [Sample(i, i + 1, 80, bandwidth=100, dirty_rate=80) for i in range(4)]
    >>> [qemu_auto_converge(busy[: i + 1]).throttle for i in range(4)]
    [0, 0, 20, 20]
    """
    return qemu(samples, max_downtime=max_downtime, auto_converge=True)


RULES: dict[str, Callable[..., Verdict]] = {
    "ours": ours,
    "qemu": qemu,
    "qemu-auto-converge": qemu_auto_converge,
    "kubevirt": kubevirt,
    "cloud-hypervisor": cloud_hypervisor,
}
"""The rules by name. Each takes the samples so far, and ``max_downtime``, and returns a `Verdict`."""


def pace(elapsed: float) -> float:
    """Return the seconds after which a rule is asked again within a pass: more of them later on."""
    return max(1.0, 0.002 * elapsed)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.0f} ms" if seconds < inf else "for ever"
