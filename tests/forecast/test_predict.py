"""Forecasts of tiny guests: what would do, how it is looked for, and what is said of it."""

from collections.abc import Iterator
from dataclasses import asdict, replace
from math import inf
from typing import Any

import numpy as np
import pytest
from seen import as_seen

from hwdbm.forecast import MemoryWrites, Sample, Terms, from_samples, geometric, predict, replay, simulate
from hwdbm.forecast.predict import course
from hwdbm.forecast.simulate import Begun, Course, run
from hwdbm.forecast.sweep import passes
from hwdbm.forecast.writes import TraceWrites

PAGE = 4096
FREE = Terms("own")


def guest(hot: int, new: int = 0, count: int = 24) -> MemoryWrites:
    """Return a guest of 192 pages that writes some in each quarter of a second, and new ones in turn beside them."""
    flags = np.zeros((count, 192), dtype=np.uint8)
    flags[:, :hot] = 1
    for at, row in enumerate(flags):
        row[[(hot + at * new + each) % 192 for each in range(new)]] = 1
    return MemoryWrites(np.packbits(flags, axis=1, bitorder="little").view(np.uint64), 0.25, 192, PAGE)


HOT, NEW = guest(40), guest(3, 9)
CASES: dict[str, tuple[MemoryWrites, dict[str, Any]]] = {
    "hot, quick": (HOT, {"bandwidth": 400.0 * PAGE}),
    "hot, slow": (HOT, {"bandwidth": 50.0 * PAGE}),
    "hot, and no pause": (HOT, {"bandwidth": 50.0 * PAGE, "max_downtime": 0.0, "starts": 4}),
    "hot, quick, and no pause": (HOT, {"bandwidth": 1e9, "max_downtime": 0.0}),
    "new, quick": (NEW, {"bandwidth": 200.0 * PAGE, "starts": 1}),
    "new, slow": (NEW, {"bandwidth": 40.0 * PAGE, "starts": 2, "start_ns": 300_000_000}),
    "new, slow, and slowed down": (NEW, {"bandwidth": 30.0 * PAGE, "throttle": 20.5, "starts": 2}),
    "new, and little time": (NEW, {"bandwidth": 40.0 * PAGE, "timeout": 6.0, "starts": 1}),
    "new, and too little time": (NEW, {"bandwidth": 100.0 * PAGE, "timeout": 1.0, "starts": 1}),
    "new, and more pause than any": (NEW, {"bandwidth": 100.0 * PAGE, "max_downtime": 1e3, "starts": 1}),
    "a page a second": (guest(0, 1), {"bandwidth": 1.0, "starts": 1}),
    "nothing": (guest(0), {"bandwidth": 100.0 * PAGE, "max_downtime": 0.0, "starts": 3}),
}


def shown(found: predict.Forecast) -> Iterator[str]:
    for name, value in asdict(found).items():
        parts = value.values() if isinstance(value, dict) else [value]
        yield f"  {name}: {', '.join(f'{each:.9g}' if isinstance(each, float) else str(each) for each in parts)}"


def test_forecasts_of_tiny_guests_were_looked_at() -> None:
    lines = []
    for name, (writes, how) in CASES.items():
        lines += [name, *shown(replay(writes, **{"terms": FREE, "starts": 2} | how))]
    for name, bandwidth in (("as quick as it was", None), ("twice as quick", 160.0 * PAGE)):
        lines += [f"of samples, {name}", *shown(from_samples(SAMPLES, bandwidth=bandwidth, terms=FREE))]
    as_seen("forecasts/tiny.txt", "\n".join(lines) + "\n")


SAMPLES = [
    Sample(0.5, 1, 192.0 * PAGE, 192.0 * PAGE, bandwidth=80.0 * PAGE),
    Sample(3.0, 2, 60.0 * PAGE, bandwidth=72.0 * PAGE),
    Sample(4.0, 3, 40.0 * PAGE, bandwidth=80.0 * PAGE, transferred=9e5),
    Sample(4.25, 3, 20.0 * PAGE, bandwidth=85.0 * PAGE),
]


def test_what_samples_leave_out_has_its_default() -> None:
    usual = from_samples(SAMPLES)
    assert usual == from_samples(SAMPLES, max_downtime=0.3, max_iterations=30, on_limit="abort", terms=predict.OWN)
    limited = [replace(SAMPLES[0], downtime_limit=5.0), *SAMPLES[1:]]
    assert from_samples(limited) == from_samples(SAMPLES, max_downtime=5.0) != usual
    assert from_samples(limited, max_downtime=0.3) == usual
    of_qemu = [*SAMPLES[:-1], replace(SAMPLES[-1], source="libvirt")]
    assert from_samples(of_qemu) == from_samples(SAMPLES, terms=predict.QEMU, on_limit="wait") != usual
    every = [replace(each, total=192.0 * PAGE) for each in SAMPLES]
    assert from_samples(every) == usual == from_samples([replace(each, total=None) for each in SAMPLES])


def test_where_a_migration_is_by_its_last_sample() -> None:
    left = ((2, 60.0 * PAGE), (3, 40.0 * PAGE))
    assert predict._begun(SAMPLES) == Begun(4.25, 3, 20.0 * PAGE, 0.25, 0.0, left)
    assert predict._begun(SAMPLES[:-1]) == Begun(4.0, 3, 40.0 * PAGE, 0.0, 9e5, left)
    assert predict._begun(SAMPLES[:1]) == Begun(0.5, 1, 192.0 * PAGE, 0.0, 0.0, ())


def test_the_bandwidth_of_late() -> None:
    """The median of the last sixteen; without any nothing is known, nor how far off it is."""
    samples = [Sample(at, 1, 1.0, bandwidth=1.0 + at) for at in range(20)]
    assert predict._speed(samples) == (12.5, 1.48 * 4.0 / 12.5)
    assert predict._speed([Sample(1, 1, 1.0), Sample(2, 1, 1.0, transferred=5.0)]) == (None, 0.0)
    sent = [Sample(at, 1, 1.0, transferred=at * 10 + at * (at + 1) / 2) for at in range(20)]
    assert predict._speed(sent) == (21.5, 1.48 * 4.0 / 21.5)


@pytest.mark.parametrize("count", range(1, 12))
def test_needs_are_looked_for_at_the_first_moment_the_last_and_one_between(count: int) -> None:
    some = predict._some([float(at) for at in range(count)])
    assert some == sorted({0.0, float(count // 2), count - 1.0})


def test_draws_of_equal_parts_lie_in_no_order() -> None:
    assert predict._places(5, 0.25) == [0.1, 0.5, 0.7, 0.9, 0.3]
    assert predict._places(3, 0.75) == [1 / 6, 5 / 6, 0.5]
    assert predict._places(1, 0.5) == [0.5]
    assert [predict._factor(0.0, place) for place in (0.1, 0.9)] == [1.0, 1.0]
    assert predict._factor(0.5, 0.5) == 1.0
    assert predict._factor(1.0, 0.01) == 0.05
    middle = predict._draws(Course(Terms("qemu", last_bandwidth=70.0), 9.0, 0.3), [1.0, 2.5])
    assert [(each.start, each.bandwidth, each.terms.last_bandwidth, each.held) for each in middle] == [
        (1.0, 9.0, 70.0, 0.25), (2.5, 9.0, 70.0, 0.75)
    ]  # fmt: skip


def test_most_decide_and_the_others_say_that_it_depends() -> None:
    """A guest that is busy in one half of its trace, met in both."""
    words = np.zeros((16, 3), dtype=np.uint64)
    words[8:, 0] = ~np.uint64(0)
    for starts, converges in ((1, True), (3, True), (4, False)):
        writes = MemoryWrites(np.repeat(np.concatenate((words, words)), 16, axis=0), 0.25, 192, PAGE)
        found = replay(writes, bandwidth=50.0 * PAGE, terms=FREE, starts=starts, max_iterations=3, needs=False)
        assert found.converges == converges
        assert ("goes the other way" in found.why) == (starts > 1)


def test_passes_are_those_of_a_migration_that_begins_with_the_trace() -> None:
    how: dict[str, Any] = {"bandwidth": 90.0 * PAGE, "terms": FREE}
    whole = TraceWrites(NEW)
    assert passes(NEW, **how) == run(whole, replace(course(**how), horizon=whole.period)).samples
    assert passes(NEW, **how) != run(whole, replace(course(**how), start=1e-6, horizon=whole.period)).samples


@pytest.mark.parametrize("structure", ["own", "qemu"])
@pytest.mark.parametrize("late", [False, True])
def test_so_many_passes_are_followed(structure: str, late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long one would wait; be it that a pause always takes too long."""
    monkeypatch.setattr(simulate, "_MOST", 6)
    terms = Terms(structure, pause=9.0 if late else 0.0)  # type: ignore[arg-type]
    plan = Course(terms, 50.0 * PAGE, 1.0 if late else 0.3, on_limit="wait", horizon=inf, max_iterations=999)
    done = run(TraceWrites(HOT), plan)
    if structure == "own" or not late:  # QEMU pauses the guest for as long as it takes
        assert (done.converges, done.passes) == (False, 6)


def test_a_series_that_never_ends_is_followed_for_a_thousand_passes() -> None:
    same = geometric(1000, dirty_rate=100, bandwidth=100, max_downtime=2)
    assert (same.converges, same.passes.value, same.total_time.value) == (False, 2, 20)
    assert (same.downtime.value, same.transferred.value) == (10, 2000)
    more = geometric(1000, dirty_rate=300, bandwidth=100, max_downtime=2)
    assert (more.converges, more.passes.value, more.transferred.value) == (False, 2, 2000)
    slow = geometric(1e9, dirty_rate=99.9, bandwidth=100, max_downtime=0)
    assert (slow.converges, slow.passes.value) == (False, 1000)
    assert slow.downtime.value == pytest.approx(1e7 * 0.999**999)
    enough = geometric(1e9, dirty_rate=99.9, bandwidth=100, max_downtime=1e7 * 0.999**998.5)
    assert (enough.converges, enough.passes.value) == (True, 1000)
    exactly = geometric(1000, dirty_rate=50, bandwidth=100, max_downtime=2.5)
    assert (exactly.passes.value, exactly.downtime.value) == (3, 2.5)
