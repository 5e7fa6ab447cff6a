"""Migrations of tiny guests in round numbers: every number of what is simulated, under each cost, limit and rule.

A few are reckoned by hand here. The others were looked at: each course differs from a plain one in one thing, so that
what that thing does shows.
"""

from collections.abc import Iterator
from dataclasses import replace
from math import inf
from typing import Any

import numpy as np
import pytest
from seen import as_seen

from hwdbm.forecast import MemoryWrites, Sample, Terms, Verdict
from hwdbm.forecast.model import Model, ModelWrites
from hwdbm.forecast.simulate import Begun, Course, Decide, Outcome, run
from hwdbm.forecast.writes import Dirty, GuestWrites, TraceWrites

PAGE = 4096
GIB = 1 << 30
FREE = {name: Terms(name, tick=0.25 if name == "qemu" else 0.0) for name in ("own", "qemu")}  # type: ignore[arg-type]


class Even:
    """A guest of 64 pages that writes so many a second, none twice before it is harvested."""

    page_size, npages, period = PAGE, 64, 0.0

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def everything(self, begin: float, end: float) -> Dirty:
        del begin, end
        return Dirty(float(self.npages), 0.0)

    def written(self, begin: float, end: float, left: Dirty | None = None) -> Dirty:
        pages = (end - begin) * self.rate + (left.pages if left else 0.0)
        return Dirty(min(pages, float(self.npages)), 0.0)


class Burst(Even):
    """A guest that has so many pages dirty at some times, and none at others."""

    def __init__(self, at: dict[float, float]) -> None:
        self._at = at

    def written(self, begin: float, end: float, left: Dirty | None = None) -> Dirty:
        del begin, left
        return Dirty(self._at.get(end, 0.0), 0.0)


# --- by hand ----------------------------------------------------------------------------------------------------


def test_what_each_cost_adds() -> None:
    """64 pages at 32 a second; the guest writes 8 a second. A harvest takes 1/4 s, the preparations half a second."""
    size = 64 * PAGE
    terms = Terms("own", setup=0.5, sync_gib=0.25 * GIB / size, pass_time=0.125, pause=1.0, handover=2.0,
                  verify_gib=4 * GIB / size)  # fmt: skip
    done = run(Even(8), Course(terms, 32 * PAGE, 2.0))
    # The log is empty at 0.5 s, and harvested when the pass is over, 0.25 + 2 + 0.125 s later.
    (sample,) = done.samples
    assert (sample.time, sample.iteration, sample.remaining) == (3.125, 2, 19 * PAGE)
    assert (sample.dirty_rate, sample.transferred) == (8 * PAGE, 64 * PAGE)
    # What was written in the harvest, and in the second until the guest stands still, goes in the pause, too.
    pages = 19 + 1.25 * 8
    assert done.downtime == 1.0 + 0.25 + pages / 32 + 0.125 + 2.0
    assert done.total_time == 3.125 + done.downtime + 4.0
    assert done.transferred == (64 + pages) * PAGE
    assert done.guest == 3.125 + 1.0
    assert (done.converges, done.passes, done.least, done.flat_from) == (True, 2, 19 * PAGE, None)


def test_a_pause_that_takes_too_long_is_over_after_the_limit_and_half_a_second() -> None:
    """4 pages of 64 are left after 2 s: 1/8 s, as the limit is. Until the guest stands still it writes 32 more.

    They would take another second; 0.125 + 0.5 s after the pause was decided on, it goes on, and so does the pass.
    """
    terms = Terms("own", pause=0.25)
    done = run(Burst({2.0: 4.0, 2.25: 36.0}), Course(terms, 32 * PAGE, 0.125))
    assert [(each.time, each.remaining) for each in done.samples] == [(2.0, 4 * PAGE), (3.375, 0)]
    # 36 pages take 1.125 s. Of the pause of 1.375 s the guest stood still from 0.25 to 0.625 s.
    assert done.guest == 2.0 + 1.375 - 0.375 + 0.25
    assert done.transferred == (64 + 36) * PAGE
    assert done.downtime == 0.25
    assert done.total_time == 3.375 + 0.25


@pytest.mark.parametrize("structure", FREE)
def test_one_that_is_given_up_in_its_first_pass_was_never_flat(structure: str) -> None:
    """Asked after a second, a rule gives up when 32 of 64 pages are sent; 8 were written since."""
    course = Course(FREE[structure], 32 * PAGE, 0.0, decide=lambda _: Verdict("abort", "enough"))
    done = run(Even(8), course)
    assert (done.flat_from, done.least, done.passes) == (None, inf, 1)
    assert (done.total_time, done.downtime, done.transferred) == (1.0, 40 / 32, 32 * PAGE)


class Sizes(Even):
    """A guest that has so many pages dirty at one harvest after the other."""

    npages = 512

    def __init__(self, *sizes: int) -> None:
        self._sizes = iter(sizes)

    def written(self, begin: float, end: float, left: Dirty | None = None) -> Dirty:
        del begin, end, left
        return Dirty(float(next(self._sizes)), 0.0)


@pytest.mark.parametrize(
    ("sizes", "speed", "each", "expected"),
    [
        # A pass of 1 MiB and 50 ms says what the bandwidth is, its own time counted in, until the next such pass.
        ((256, 255, 256, 1), 1024, 0.25, (512 / 0.75, 512, 512, 512)),
        ((256, 255, 256, 1), 1024**6, 0.05, (512 / 0.05, 256 / 0.05, 256 / 0.05, 256 / 0.05)),
        # Shorter ones do together.
        ((256, 255, 1), 1024**6, 0.03125, (512 / 0.03125, 768 / 0.0625, 1023 / 0.09375)),
    ],
)
def test_the_bandwidth_is_what_long_passes_had(sizes, speed, each: float, expected) -> None:
    course = Course(Terms("own", pass_time=each), float(speed * PAGE), 0.0, max_iterations=len(sizes) - 1)
    done = run(Sizes(*sizes), replace(course, decide=decide(**{f"pass{len(sizes) + 1}": Verdict("abort")})))
    bandwidths = [sample.bandwidth for sample in done.samples]
    assert bandwidths == pytest.approx([rate * PAGE for rate in expected], rel=1e-9)


def test_little_is_known_of_the_bandwidth_before_a_mib_was_sent() -> None:
    """What all passes went through, over all of the time, is at least that."""
    for first, expected in ((255, 255 / 1.03125), (256, 256 / 0.03125)):
        guest = Sizes(9)
        guest.npages = first  # type: ignore[misc]
        course = Course(Terms("own", setup=1.0, pass_time=0.03125), 2.0**60, 0.0, decide=decide(pass2=Verdict("abort")))
        sample = run(guest, course).samples[-1]
        assert sample.bandwidth == pytest.approx(expected * PAGE)


@pytest.mark.parametrize(("timeout", "converges"), [(3.125, True), (3.0, True), (2.9, False)])
def test_what_ends_with_the_time_is_in_time(timeout: float, converges: bool) -> None:
    """64 pages at 32 a second, and 2 s after which one page is left for ever, which takes 1/32 s of the pause."""
    course = Course(Terms("own", setup=1.0), 32.0 * PAGE, 0.5, timeout=timeout - 1)
    done = run(Burst({2.0: 0.0}), replace(course, terms=FREE["own"]))
    assert (done.converges, done.total_time) == (converges, 2.0)


def test_a_late_pause_ends_what_has_no_time_left() -> None:
    """As in the one by hand above: it goes on at 3.375 s, which is in time, or isn't."""
    for timeout, passes, end in ((3.375, 3, 3.625), (3.25, 2, 3.375)):
        course = Course(Terms("own", pause=0.25), 32 * PAGE, 0.125, timeout=timeout)
        done = run(Burst({2.0: 4.0, 2.25: 36.0}), course)
        assert (done.converges, done.passes, done.total_time) == (False, passes, end)


def test_pages_of_zeros_may_be_no_bytes_at_all() -> None:
    """64 of them take 2 s; a rule gives up within them."""
    zeros = np.full(1, ~np.uint64(0))
    guest = TraceWrites(MemoryWrites(zeros[None] * np.uint64(0), 1.0, initial_zeros=zeros))
    for free in FREE.values():
        terms = replace(free, zero_page=1 / 32)
        done = run(guest, Course(terms, 32 * PAGE, 0.0, decide=lambda _: Verdict("abort")))
        assert (done.total_time, done.passes, done.transferred) == (1.0, 1, 0.0)


# --- looked at --------------------------------------------------------------------------------------------------


def words(*rows: int) -> np.ndarray:
    """Return rows of three words: of numbers of 192 bits."""
    return np.array([[row >> at & (1 << 64) - 1 for at in (0, 64, 128)] for row in rows], dtype=np.uint64)


def traced() -> TraceWrites:
    """Return a guest of 130 pages with a hot set and others in turn, some of which become zero."""
    rows = words(*(0b1011 << 62 | 0b111 << (at * 17 % 127) | (at % 5 == 0) << 129 for at in range(20)))
    initial = words(0b11111 << 60 | 0b11 << 100)[0]
    return TraceWrites(MemoryWrites(rows, 0.25, 130, PAGE, rows & words(0b11 << 63 | 0xFF << 20), initial))


GUESTS: dict[str, GuestWrites] = {
    "even": Even(8),
    "model": ModelWrites(Model(hot=20.0 * PAGE, tau=0.5, cold=2.0 * PAGE), 64.0 * PAGE, PAGE),
    "trace": traced(),
}
COSTS: dict[str, dict[str, Any]] = {
    "own": {"setup": 0.5, "setup_gib": 100.0, "sync_gib": 64.0, "zero_page": 0.001, "pass_time": 0.0625, "pause": 0.125,
            "handover": 0.25, "verify_gib": 512.0, "page_overhead": 8.0, "zero_bytes": 2.0, "burst": 0.1875},
    "qemu": {"setup": 0.25, "sync_gib": 32.0, "zero_page": 0.002, "pause": 0.0625, "handover": 0.125,
             "page_overhead": 16.0, "zero_bytes": 9.0, "tick": 0.125, "look": 0.03125, "burst": 0.09375},
}  # fmt: skip


def decide(**verdicts: Verdict) -> Decide:
    """Return a rule: what it says at the first sample of a pass, or "within" one, or from a time on; else to go on."""

    def rule(samples: list[Sample]) -> Verdict:
        last = samples[-1]
        within = len(samples) > 1 and samples[-2].iteration == last.iteration and "within"
        return verdicts.get(within or f"pass{last.iteration}", Verdict("continue"))

    return rule


def begun(number: int, since: float, *left: float) -> Begun:
    """Return a migration in a pass after others, that leaves some pages by now."""
    return Begun(
        7.5, number, 8.5 * PAGE, since, 96.0 * PAGE, tuple((at, each * PAGE) for at, each in enumerate(left, 2))
    )


STOP = {"max_iterations": 3, "bandwidth": 6.0 * PAGE}  # too little for any of them
LATE = {"pause": 2.0, "pass_time": 0.5}
COURSES: dict[str, dict[str, Any]] = {
    "plain": {},
    "from 2.6 s on": {"start": 2.6},
    "as quick as can be": {"bandwidth": 64.0 * GIB},
    "no pause is allowed": {"max_downtime": 0.0, "max_iterations": 2},
    "gives up": STOP,
    "gives up late": STOP | {"max_iterations": 5},
    "pauses": STOP | {"on_limit": "pause"},
    "waits": STOP | {"on_limit": "wait", "horizon": 12.0},
    "no time": {"timeout": 0.0},
    "little time": STOP | {"timeout": 16.0},
    "throttled": STOP | {"throttle": 50.0},
    "slowed down": STOP | {"auto_converge": True, "max_iterations": 6},
    "slowed down from 25 % on": STOP | {"auto_converge": True, "max_iterations": 6, "throttle": 25.0},
    "a wide last pass": {"terms": {"last_bandwidth": 128.0 * PAGE}},
    "empty sockets": {"held": 0.0, "terms": {"burst": 0.5, "pause": 0.0}},
    "full sockets": {"held": 1.0, "terms": {"burst": 0.5, "pause": 0.0}},
    "nothing ahead": {"terms": {"burst": 0.0}},
    "far ahead": {"terms": {"burst": 3.0}},
    "no turns": {"terms": {"tick": 0.0, "look": 0.0}},
    "no looks": {"terms": {"look": 0.0}},
    "many turns": {"terms": {"tick": 0.001, "look": 0.0005}, "max_downtime": 0.01},
    "a late pause": {"terms": LATE, "max_iterations": 2},
    "a late pause that is allowed": {"terms": LATE, "max_downtime": 2.0},
    "a late pause that is wanted": {"terms": LATE, "on_limit": "pause"},
    "a late pause and little time": {"terms": LATE, "timeout": 9.0},
    "in its first pass": {"start": 2.0, "begun": begun(1, 1.5)},
    "in its first pass, just begun": {"start": 2.0, "begun": begun(1, 0.0)},
    "in its third pass": {"start": 2.0, "begun": begun(3, 0.25, 30, 8)},
    "in its third pass, just begun": {"start": 2.0, "begun": begun(3, 0.0, 30, 8)},
    "at its very beginning": {"begun": Begun(0.0, 2, 9.0 * PAGE, 0.0, 0.0, ()), "max_iterations": 1},
    "flat for long": {"start": 2.0, "begun": begun(4, 0.5, 8, 9, 9), "max_iterations": 3, "bandwidth": 6.0 * PAGE},
    "a rule that switches": {"decide": decide(pass3=Verdict("switch", "now")), "max_downtime": 0.0},
    "a rule that gives up": {"decide": decide(pass3=Verdict("abort", "no"))},
    "a rule that gives up within": STOP | {"decide": decide(within=Verdict("abort", "no"))},
    "a rule that changes its mind": {
        "bandwidth": 6.0 * PAGE, "throttle": 10.0, "max_downtime": 0.0,
        "decide": decide(pass2=Verdict("continue", "a", limit=0.25, throttle=5),
                         pass3=Verdict("continue", "b", limit=1.0),
                         pass4=Verdict("continue", "c", throttle=90), pass6=Verdict("switch", "d")),
    },
}  # fmt: skip


def shown(done: Outcome) -> Iterator[str]:
    """Yield a line for all of it, and one for some of the samples."""
    said = "" if done.verdict is None else f", {done.verdict.action} {done.verdict.why}"
    yield (
        f"  {'converges' if done.converges else 'gives up'}{said}: {done.passes} passes, flat from {done.flat_from}; "
        f"{done.total_time:.9g} s, {done.downtime:.9g} s; the guest's {done.guest:.9g} s; "
        f"{done.transferred / PAGE:.9g} pages, least {done.least / PAGE:.9g}"
    )
    known = [-1, *(each.iteration for each in done.samples), -1]
    for number, each in enumerate(done.samples):
        # The first of each pass, and the last.
        if known[number : number + 3] != [each.iteration] * 3 and (each.iteration < 6 or number == len(known) - 3):
            rates = (f"{rate / PAGE:.9g}" if rate is not None else "-" for rate in (each.bandwidth, each.dirty_rate))
            yield (
                f"    {each.time:.9g} s, {each.iteration}: {each.remaining / PAGE:.9g} left, "
                f"{(each.transferred or 0.0) / PAGE:.9g} sent, {' and '.join(rates)} a second; {each.zero_pages}, "
                f"{each.downtime_limit:.9g} s, {each.throttle} %"
            )


@pytest.mark.parametrize("structure", FREE)
def test_courses_were_looked_at(structure: str) -> None:
    lines = []
    for name, guest in GUESTS.items():
        lines += [f"{name}, free of costs", *shown(run(guest, Course(FREE[structure], 32.0 * PAGE, 0.25)))]
        for how, given in COURSES.items():
            terms = Terms(structure, **COSTS[structure] | given.get("terms", {}))  # type: ignore[arg-type]
            course = replace(Course(terms, 32.0 * PAGE, 0.25, max_iterations=4), **given | {"terms": terms})
            lines += [f"{name}: {how}", *shown(run(guest, course))]
    as_seen(f"forecasts/courses-{structure}.txt", "\n".join(lines) + "\n")
