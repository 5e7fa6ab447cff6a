"""Replays against a migration that is simulated page by page, and against what can be reckoned by hand."""

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwdbm.forecast import (
    OWN,
    QEMU,
    MemoryWrites,
    Terms,
    compare_rules,
    geometric,
    predict,
    remaining_over_bandwidth,
    replay,
    simulate,
)
from hwdbm.forecast.predict import course
from hwdbm.forecast.simulate import Course, run
from hwdbm.forecast.sweep import passes
from hwdbm.forecast.writes import Dirty, TraceWrites, count

PAGE = 4096
FREE = Terms("own")  # nothing costs anything, but the bytes


def bits(pages, npages: int) -> np.ndarray:
    """Return words with the bits of some pages."""
    flags = np.zeros(-(-npages // 64) * 64, dtype=np.uint8)
    flags[list(pages)] = 1
    return np.packbits(flags, bitorder="little").view(np.uint64)


def trace(intervals, npages: int, interval: float = 1.0, **more) -> MemoryWrites:
    return MemoryWrites(np.stack([bits(each, npages) for each in intervals]), interval, npages, PAGE, **more)


def expected(intervals, npages: int, begin: float, end: float) -> float:
    """Return how many pages are written in a window of whole intervals of 1 s, page by page."""
    assert begin == int(begin)
    assert end == int(end)
    return len({page for i in range(int(begin), int(end)) for page in intervals[i % len(intervals)]})


PAGES = st.integers(1, 200)


@st.composite
def traces(draw):
    npages = draw(st.sampled_from([1, 63, 64, 65, 130, 200]))
    some = st.sets(st.integers(0, npages - 1), max_size=20)
    return draw(st.lists(some, min_size=1, max_size=9)), npages


@given(traces(), st.data())
def test_a_window_of_whole_intervals_is_their_union(made, data) -> None:
    intervals, npages = made
    guest = TraceWrites(trace(intervals, npages))
    begin = data.draw(st.integers(0, len(intervals)))
    end = data.draw(st.integers(begin, len(intervals)))
    assert guest.written(begin, end).pages == pytest.approx(expected(intervals, npages, begin, end))


@given(traces(), st.floats(0, 40), st.floats(0, 40))
def test_a_window_has_no_more_than_the_intervals_it_touches_and_grows(made, begin, length) -> None:
    intervals, npages = made
    guest = TraceWrites(trace(intervals, npages))
    part = guest.written(begin, begin + length)
    assert -1e-9 <= part.pages <= count(part.words) + 1e-9
    assert part.pages <= npages
    more = guest.written(begin, begin + length + 3)
    assert more.pages >= part.pages - 1e-6
    assert not (part.words & ~more.words).any()


@given(traces(), st.integers(0, 60), st.integers(0, 30))
def test_after_its_end_the_steady_part_comes_again(made, begin, length) -> None:
    intervals, npages = made
    guest = TraceWrites(trace(intervals, npages))
    period = len(intervals) - guest.again

    def real(i: int) -> int:
        return i if i < len(intervals) else guest.again + (i - guest.again) % period

    union = {page for i in range(begin, begin + length) for page in intervals[real(i)]}
    assert guest.written(begin, begin + length).pages == pytest.approx(len(union))


def without(dirty: Dirty, share: float, first: int) -> tuple[Dirty, int]:
    """Return what is left when so many words were sent that a share of the pages is gone."""
    pages, zeros = dirty.by_word(first)
    words = int(np.searchsorted(pages.cumsum(), share * dirty.pages, side="right"))
    return dirty.beyond(float(pages[words:].sum()), float(zeros[words:].sum()), first, words)


@given(traces(), st.floats(0, 1), st.integers(0, 3))
def test_what_is_left_after_sending_is_the_rest_in_order(made, share, first) -> None:
    intervals, npages = made
    words = bits(set().union(*intervals), npages)
    first %= words.size
    zeros = words & np.uint64(0x5555_5555_5555_5555)
    dirty = Dirty(float(count(words)), float(count(zeros)), words, zeros)
    left, after = without(dirty, share, first)
    assert (left.pages, left.zeros) == (count(left.words), count(left.zero_words))
    assert not (left.words & ~words).any()
    assert (left.zero_words == zeros & left.words).all()
    gone = words & ~left.words
    order = [(first + i) % words.size for i in range(words.size)]
    sent = [i for i in order if gone[i]]
    kept = [i for i in order if left.words[i]]
    assert not sent or not kept or order.index(sent[-1]) < order.index(kept[0])  # whole words, the first ones
    assert 0 <= after < words.size
    assert 0 <= left.pages - dirty.pages * (1 - share) + 1e-9 <= 64


@given(traces(), st.floats(0, 20), st.floats(0, 0.01), st.floats(0, 1))
def test_what_was_left_over_is_not_lost(made, begin, length, share) -> None:
    intervals, npages = made
    guest = TraceWrites(trace(intervals, npages))
    left, _ = without(guest.written(begin, begin + 2), share, 0)
    both, alone = guest.written(begin, begin + length, left), guest.written(begin, begin + length)
    assert max(left.pages, alone.pages) - 1e-9 <= both.pages <= left.pages + alone.pages + 1e-9


def test_pages_of_zeros_go_in_their_place() -> None:
    """QEMU sends memory in order: what is left at the end of a pass is what lies there."""
    words, zeros = np.zeros((40, 4), dtype=np.uint64), bits(set(range(64, 256)), 256)
    behind = MemoryWrites(words, 0.1, initial_zeros=zeros)
    before = MemoryWrites(words, 0.1, initial_zeros=zeros[::-1].copy())
    terms = Terms("qemu", tick=0.1, zero_page=1e-6)
    course = Course(terms, 100 * PAGE, 0.3)
    ahead, after = (run(TraceWrites(each), course) for each in (before, behind))
    assert ahead.total_time == pytest.approx(after.total_time, abs=0.01)
    assert after.downtime < 0.001  # nothing but zeros was left
    assert ahead.downtime > 0.1


def test_a_long_trace_is_the_union_of_its_intervals_too() -> None:
    """Unions are kept of 16 intervals each: windows that begin and end within them, at them, and around them."""
    rng = np.random.default_rng(8)
    intervals = [set(rng.integers(0, 5000, 9).tolist()) for _ in range(70)]
    guest = TraceWrites(trace(intervals, 5000))
    for begin in (0, 1, 15, 16, 17, 40):
        for end in {begin, begin + 1, 15, 16, 17, 31, 32, 33, 47, 48, 64, 65, 70}:
            if end >= begin:
                assert guest.written(begin, end).pages == pytest.approx(expected(intervals, 5000, begin, end))


def test_a_page_counts_once() -> None:
    guest = TraceWrites(trace([{1, 2}, {2, 3}, {9}], 64))
    assert guest.written(0, 2).pages == 3
    # A quarter of the first interval: of its pages, one isn't in the next one.
    assert guest.written(0, 0.25).pages == pytest.approx(2 * (1 - 0.5**0.25) / 0.5)
    # Half of the last: none of it comes again, and the pages lie anywhere in it.
    assert guest.written(1, 2.5).pages == pytest.approx(2.5)


def test_what_is_written_at_random_times_is_interpolated_rightly() -> None:
    """Pages written at random, at a rate of one an interval: a tenth of an interval has 1 - exp(-0.1) of them."""
    rng = np.random.default_rng(1)
    npages = 64_000
    guest = TraceWrites(trace([np.flatnonzero(rng.random(npages) < 1 - np.exp(-1)) for _ in range(4)], npages))
    for part in (0.1, 0.5, 0.9):
        assert guest.written(0, part).pages == pytest.approx(npages * (1 - np.exp(-part)), rel=0.01)


@settings(max_examples=30)
@given(traces(), st.floats(0.5, 100), st.sampled_from(["own", "qemu"]))
def test_a_replay_ends_and_its_numbers_go_together(made, speed, structure) -> None:
    intervals, npages = made
    terms = Terms(structure, pass_time=0.001, tick=0.1 if structure == "qemu" else 0.0, handover=0.01)
    forecast = replay(trace(intervals, npages), bandwidth=speed * PAGE, max_downtime=0.5, terms=terms, needs=False)
    # A page that was left may be one that is written anew, and is sent once, then.
    assert forecast.transferred.value >= (npages - len(set().union(*intervals))) * PAGE * 0.999
    assert forecast.total_time.value >= npages / speed * 0.999
    assert forecast.passes.value >= 2
    assert forecast.downtime.low <= forecast.downtime.value <= forecast.downtime.high
    assert forecast.why


def test_passes_by_hand() -> None:
    """100 pages at 10 a second; in each second the guest writes 2 new pages, in turn."""
    intervals = [{(2 * i) % 100, (2 * i + 1) % 100} for i in range(50)]
    forecast = replay(
        trace(intervals, 128, initial_zeros=bits(range(100, 128), 128)),
        bandwidth=10 * PAGE, max_downtime=0.1, terms=FREE, starts=1,
    )  # fmt: skip
    # 10 s, 20 pages; 2 s, 4; 0.4 s, 0.8; 0.08 s in the pause: 0.16 pages.
    assert forecast.converges
    assert forecast.flat_from is None
    assert forecast.passes.value == 4
    assert forecast.total_time.value == pytest.approx(10 + 2 + 0.4 + 0.08)
    assert forecast.downtime.value == pytest.approx(0.08)
    assert forecast.transferred.value == pytest.approx(PAGE * (100 + 20 + 4 + 0.8))


def test_a_hot_set_that_does_not_fit() -> None:
    """20 pages a second are sent, and 30 are hot: each pass leaves them all."""
    forecast = replay(trace([set(range(30))] * 20, 1000, 0.1), bandwidth=20 * PAGE, max_downtime=0.3, terms=FREE)
    assert not forecast.converges
    assert forecast.flat_from == 2
    assert forecast.passes.value == 32
    assert forecast.downtime.value == pytest.approx(1.5)
    assert forecast.needs.max_downtime == pytest.approx(1.5, rel=0.03)
    assert forecast.needs.bandwidth == pytest.approx(100 * PAGE, rel=0.03)
    assert "from pass 2 on" in forecast.why
    assert "It would converge with" in forecast.why
    needs = forecast.needs
    for better in ({"bandwidth": needs.bandwidth}, {"max_downtime": needs.max_downtime}):
        settings_ = {"bandwidth": 20 * PAGE, "max_downtime": 0.3} | better
        assert replay(trace([set(range(30))] * 20, 1000, 0.1), terms=FREE, needs=False, **settings_).converges


def test_what_is_needed_is_the_least() -> None:
    writes = trace([set(range(30))] * 20, 1000, 0.1)
    needs = replay(writes, bandwidth=20 * PAGE, terms=FREE).needs
    for worse in (
        {"bandwidth": needs.bandwidth * 0.95},
        {"bandwidth": 20 * PAGE, "max_downtime": needs.max_downtime * 0.95},
    ):
        assert not replay(writes, terms=FREE, needs=False, **({"max_downtime": 0.3} | worse)).converges


def test_a_throttle_helps_one_that_writes_new_pages() -> None:
    intervals = [set(range(i * 80 % 4000, i * 80 % 4000 + 80)) for i in range(50)]
    forecast = replay(trace(intervals, 4000), bandwidth=40 * PAGE, max_downtime=0.2, terms=FREE)
    assert not forecast.converges
    throttle = forecast.needs.throttle
    assert 0 < throttle < 99
    again = {"bandwidth": 40 * PAGE, "max_downtime": 0.2, "terms": FREE, "needs": False}
    assert replay(trace(intervals, 4000), throttle=throttle, **again).converges
    assert not replay(trace(intervals, 4000), throttle=throttle - 5, **again).converges


def test_qemu_goes_on_with_what_is_left_over() -> None:
    """QEMU looks each 100 ms, and harvests when less than the bandwidth times the limit is left."""
    guest = TraceWrites(trace([set(range(10))] * 10, 100, 0.1))
    done = run(guest, Course(Terms("qemu", tick=0.1), 100 * PAGE, 0.35))
    # 100 pages, 10 in each 0.1 s: after 0.7 s 30 are left, fewer than 35. They and the hot ten, sent long ago, are 40.
    assert done.samples[0].time == pytest.approx(0.7)
    assert done.samples[0].remaining == pytest.approx(40 * PAGE)


def test_qemu_lifts_its_limit_for_the_last_pass() -> None:
    guest = TraceWrites(trace([{1}] * 10, 100))
    slow = run(guest, Course(Terms("qemu", tick=0.1), 100 * PAGE, 0.35))
    fast = run(guest, Course(Terms("qemu", tick=0.1, last_bandwidth=1000 * PAGE), 100 * PAGE, 0.35))
    assert slow.converges
    assert fast.downtime == pytest.approx(slow.downtime / 10)


@pytest.mark.parametrize(
    ("limit", "burst", "held", "seconds", "downtime"),
    [
        (0.36, 0.0, 1.0, 0.65, 0.35),  # it looks in the middle of its share of 10 pages
        (0.34, 0.0, 1.0, 0.7, 0.30),  # and at its end
        # In the middle the sockets had taken 2 pages more, for which the guest waits later, if they are there yet.
        (0.34, 0.02, 1.0, 0.65, 0.35),
        (0.34, 0.02, 0.5, 0.65, 0.34),
        (0.34, 0.02, 0.0, 0.65, 0.33),
        (0.305, 0.02, 1.0, 0.7, 0.30),  # and at the end they have none any more
    ],
)
def test_what_the_sockets_hold_is_waited_for_at_the_end(
    limit: float, burst: float, held: float, seconds: float, downtime: float
) -> None:
    terms = Terms("qemu", tick=0.1, look=0.05, burst=burst)
    done = run(TraceWrites(trace([set()] * 10, 100, 0.1)), Course(terms, 100 * PAGE, limit, held=held))
    assert done.total_time == pytest.approx(seconds + downtime)
    assert done.downtime == pytest.approx(downtime)


def test_pages_of_zeros_alone_are_gone_through() -> None:
    """Nothing of them is sent, and no turn ends by its share."""
    writes = trace([set()] * 4, 128, initial_zeros=bits(range(128), 128))
    done = replay(writes, bandwidth=PAGE, terms=Terms("qemu", zero_page=0.01), starts=1, needs=False)
    assert done.total_time.value == pytest.approx(1.28, abs=0.01)


def test_zero_pages_cost_little() -> None:
    zero = bits(range(64), 128)
    writes = trace([set()] * 4, 128, initial_zeros=zero)
    forecast = replay(writes, bandwidth=10 * PAGE, terms=Terms("own", zero_bytes=9, zero_page=0.01), starts=1)
    assert forecast.transferred.value == pytest.approx(64 * PAGE + 64 * 9)
    assert forecast.total_time.value == pytest.approx(6.4 + 64 * 9 / PAGE / 10 + 0.64)


def test_a_page_that_becomes_zero_is_one() -> None:
    pages = [bits(range(10), 64)] * 4
    zeros = np.stack([bits(range(5), 64)] * 4)
    guest = TraceWrites(MemoryWrites(np.stack(pages), 1.0, zeros=zeros))
    assert guest.written(0, 2).zeros == pytest.approx(5)


@given(st.data())
def test_which_pages_are_zero_is_known_of_many_intervals(data: st.DataObject) -> None:
    """A page is what it was when it was last written, be that in a block of intervals or before or behind them."""
    intervals, npages = data.draw(st.integers(1, 70)), 64
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    written = rng.random((intervals, npages)) < rng.choice([0.01, 0.1, 0.5])
    zero = written & (rng.random((intervals, npages)) < 0.5)
    initial = rng.random(npages) < 0.5
    packed = [np.packbits(each, axis=-1, bitorder="little").view(np.uint64) for each in (written, zero, initial)]
    guest = TraceWrites(MemoryWrites(packed[0], 1.0, zeros=packed[1], initial_zeros=packed[2]))
    begin = data.draw(st.integers(0, intervals))
    end = data.draw(st.integers(begin, 3 * intervals))
    last: dict[int, bool] = {}
    for number in range(begin, end):
        real = number if number < intervals else guest.again + (number - guest.again) % (intervals - guest.again)
        last.update((int(page), bool(zero[real, page])) for page in np.flatnonzero(written[real]))
    found = guest.written(begin, end)
    assert (found.pages, found.zeros) == (len(last), sum(last.values()))
    assert (found.zero_words == bits([page for page in last if last[page]], npages)).all()
    before = {page: bool(initial[page]) for page in range(npages)}
    for number in range(min(end, intervals)):
        before.update((int(page), bool(zero[number, page])) for page in np.flatnonzero(written[number]))
    assert guest.everything(end, end).zeros == sum(before.values())


@pytest.mark.parametrize("intervals", [5, 40])
def test_what_was_written_is_no_page_of_zeros_where_nothing_says_so(intervals: int) -> None:
    written = [{page} for page in range(intervals)]
    guest = TraceWrites(trace(written, 64, initial_zeros=bits(range(64), 64)))
    for at in range(intervals):
        assert guest.everything(at, at).zeros == 64 - at


@given(traces(), st.data())
def test_a_guest_at_another_rate_is_that_of_a_trace_made_so_much_faster(made, data) -> None:
    intervals, npages = made
    zeros = np.stack([bits({page for page in each if page % 3}, npages) for each in intervals])
    initial = bits({page for page in range(npages) if page % 2}, npages)
    rate, more = data.draw(st.sampled_from([0.25, 1.0, 2.0, 8.0])), data.draw(st.integers(0, 300))
    one = TraceWrites(trace(intervals, npages, zeros=zeros, initial_zeros=initial))
    made_so = TraceWrites(trace(intervals, npages, 1 / rate, zeros=zeros, initial_zeros=initial))
    for _ in range(2):  # they share what they find
        scaled = one.like(rate, npages + more)
        assert (scaled.npages, scaled.ends, scaled.period) == (npages + more, made_so.ends, made_so.period)
        begin = data.draw(st.floats(0, 30))
        end = begin + data.draw(st.floats(0, 30))
        found, same = scaled.written(begin, end), made_so.written(begin, end)
        assert (found.pages, found.zeros) == (same.pages, same.zeros)
        assert (found.words == same.words).all()
        assert scaled.everything(begin, end).pages == npages + more
        assert scaled.everything(begin, end).zeros == made_so.everything(begin, end).zeros
    assert (one.npages, one.ends) == (npages, len(intervals))


def test_a_trace_takes_no_longer_than_2_to_the_62_ns():
    guest = TraceWrites(trace([{1}] * 9, 64))
    guest._times = guest._times * 1000  # by a thousandth of the rate of which a trace may be written
    total = float(guest._times[-1])
    assert guest.like(total / (1 << 62) * 1.001, 64).npages == 64
    with pytest.raises(ValueError, match="more than 2\\^62"):
        guest.like(total / (1 << 62), 64)


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), 1e18, 1e-12])
def test_a_rate_at_which_a_trace_has_no_times_is_refused(rate: float) -> None:
    guest = TraceWrites(trace([{1}] * 9, 64))
    with pytest.raises(ValueError, match=r"rate|interval"):
        guest.like(rate, 64)
    with pytest.raises(ValueError, match="not 63"):
        guest.like(1.0, 63)


def test_a_pause_that_takes_too_long_is_given_up() -> None:
    """Ours lets the guest go on when its last pass takes more than the limit and half a second."""
    late = Terms("own", pause=0.5)  # in which the guest writes a lot
    guest = TraceWrites(trace([set()] * 2 + [set(range(100))] * 18, 100))
    done = run(guest, Course(late, 50 * PAGE, 0.1))
    assert not done.converges


@pytest.mark.parametrize(
    ("interval", "passes", "seconds"), [(60.0, (30, 900), (3600, 18_000)), (1.0, (1000, 1500), (60, 1800))]
)
def test_a_flat_migration_is_not_followed_for_years(
    interval: float, passes: tuple[int, int], seconds: tuple[int, int]
) -> None:
    """Long passes are followed for an hour of the guest's, short ones for a thousand without progress."""
    guest = TraceWrites(trace([set(range(i, i + 100)) for i in range(0, 600, 100)], 640, interval))
    plan = Course(Terms("qemu"), 100 * PAGE / interval, interval / 10, on_limit="wait", horizon=3e8)
    done = run(guest, plan)
    assert not done.converges
    assert passes[0] <= done.passes <= passes[1]
    assert seconds[0] <= done.guest <= seconds[1]


def test_a_timeout_is_no_convergence() -> None:
    forecast = replay(trace([{1}] * 4, 100), bandwidth=10 * PAGE, terms=FREE, timeout=5)
    assert not forecast.converges
    assert "in 5 s" in forecast.why


@pytest.mark.parametrize("structure", ["own", "qemu"])
def test_the_downtime_there_would_have_been_is_of_what_was_written_meanwhile(structure: str) -> None:
    """The time is over when a pass is: all that was sent, and what the guest wrote since is still to be sent."""
    writes = trace([set(range(10))] * 100, 100, 0.1)
    done = replay(writes, bandwidth=50 * PAGE, max_downtime=0.05, terms=Terms(structure), timeout=1.9, needs=False)  # type: ignore[arg-type]
    assert not done.converges
    assert 0.2 <= done.downtime.value < 0.26  # ten pages, and what was left of the first pass


@pytest.mark.parametrize("terms", [OWN, QEMU])
def test_more_bandwidth_is_no_slower(terms: Terms) -> None:
    rng = np.random.default_rng(0)
    writes = trace([set(rng.integers(0, 5000, 100).tolist()) for _ in range(40)], 5000, 0.1)
    times = [replay(writes, bandwidth=b * 1e6, terms=terms, needs=False).total_time.value for b in (8, 20, 80, 200)]
    assert times == sorted(times, reverse=True)


def test_the_trace_s_end_is_said() -> None:
    said = replay(trace([{1}] * 4, 1000), bandwidth=100 * PAGE, terms=FREE, starts=1).why
    assert "The trace is 4 s long: after that its last 4 s are taken to come again and again." in said


def test_the_steady_part_leaves_out_a_beginning() -> None:
    guest = TraceWrites(trace([set(range(500))] * 5 + [{1, 2}] * 15, 1000))
    assert (guest.again, guest.period) == (5, 15)
    assert TraceWrites(trace([{1}] * 20, 64)).again == 0


class Broken(MemoryWrites):
    def __init__(self, times) -> None:
        super().__init__(np.ones((3, 2), dtype=np.uint64), 1.0)
        self.times = np.array(times)


@pytest.mark.parametrize(
    ("times", "said"),
    [
        ([0, 5, 4, 9], "interval 1 of the trace ends at 4 ns, and begins at 5 ns"),
        ([0, 5, 5, 9], "interval 1 of the trace ends at 5 ns, and begins at 5 ns"),
        ([3, 5, 4, 9, 8], "interval 1 of the trace ends at 4 ns, and begins at 5 ns"),
        ([1, 5, 6, 9], "the trace begins at 1 ns, and not at 0"),
        ([-1, 5, 6, 9], "the trace begins at -1 ns, and not at 0"),
        ([0], "a trace has an interval or more, and this one has none"),
    ],
)
def test_times_that_cannot_be(times, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replay(Broken(times), bandwidth=1e6)


@pytest.mark.parametrize("bandwidth", [0, -1, float("nan"), float("inf")])
def test_a_bandwidth_that_cannot_be(bandwidth: float) -> None:
    with pytest.raises(ValueError, match="bandwidth is a number of 1 or more, not"):
        replay(trace([{1}], 64), bandwidth=bandwidth)


class Large(MemoryWrites):
    """A trace that says how much of it is asked for at once."""

    most = 0

    def words(self, lo: int, hi: int) -> np.ndarray:
        rows = super().words(lo, hi)
        Large.most = max(Large.most, rows.nbytes)
        return rows


def test_a_trace_that_does_not_fit_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of the words says what all of them say, and no more than a part of the trace is read at once."""
    rng = np.random.default_rng(3)
    words = np.zeros((40, 8192), dtype=np.uint64)
    for row in words:
        pages = rng.integers(0, words.shape[1] * 64, 6000)
        np.bitwise_or.at(row, pages >> 6, np.uint64(1) << (pages & 63).astype(np.uint64))
    words[:, 1000:1300] = ~np.uint64(0)
    zeros, initial = words & np.uint64(3), np.full(8192, np.uint64(0xFF))
    writes = Large(words, 0.1, zeros=zeros, initial_zeros=initial)
    for terms in (OWN, QEMU):
        whole = replay(writes, bandwidth=900e6, terms=terms, needs=False)
        monkeypatch.setattr("hwdbm.forecast.writes._KEPT", words.nbytes // 4)
        monkeypatch.setattr("hwdbm.forecast.writes._BATCH", 1 << 20)
        Large.most = 0
        found = replay(writes, bandwidth=900e6, terms=terms, needs=False)
        assert 0 < Large.most <= 1 << 20
        monkeypatch.undo()
        assert found.converges == whole.converges
        for name in ("total_time", "downtime", "transferred"):
            assert getattr(found, name).value == pytest.approx(getattr(whole, name).value, rel=0.05)


def test_the_json_is_what_the_issue_says() -> None:
    found = replay(trace([{1}], 64), bandwidth=100 * PAGE).to_dict()
    assert list(found) == ["converges", "flat-from", "passes", "total-time", "downtime", "transferred", "needs"]
    for key in ("passes", "total-time", "downtime", "transferred"):
        assert list(found[key]) == ["value", "low", "high"]
    assert list(found["needs"]) == ["bandwidth", "max-downtime"]


def test_baselines() -> None:
    assert remaining_over_bandwidth(100, 50) == 2
    assert not geometric(1000, dirty_rate=100, bandwidth=100, max_downtime=2).converges
    assert geometric(1000, dirty_rate=0, bandwidth=100, max_downtime=0).downtime.value == 0


def test_longer_turns_far_from_the_end_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    words = np.zeros((100, 256), dtype=np.uint64)  # 64 MiB, of which it writes some in 2 MiB
    words[:, ::32] = np.random.default_rng(3).integers(0, 1 << 63, (100, 8), dtype=np.uint64)
    writes = MemoryWrites(words, interval=0.1)

    def found() -> list[float]:
        each = [replay(writes, bandwidth=rate, max_downtime=0.7, terms=QEMU, needs=False) for rate in (7e5, 15e5, 4e6)]
        return [value for one in each for value in (one.total_time.value, one.downtime.value, one.transferred.value)]

    longer = found()
    monkeypatch.setattr(simulate, "_FEW_TURNS", 10**9)  # each as long as QEMU's
    assert longer == pytest.approx(found(), rel=1e-6)


def test_a_limit_beyond_all_need_costs_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    real = predict.run
    monkeypatch.setattr(predict, "run", lambda *given: runs.append(given) or real(*given))
    writes = MemoryWrites(np.ones((20, 64), dtype=np.uint64), interval=0.1)
    needs = replay(writes, bandwidth=1 << 20, max_downtime=1e300).needs
    assert needs.max_downtime is not None
    assert needs.max_downtime < 20
    assert len(runs) < 500


@pytest.mark.parametrize("terms", [OWN, QEMU, FREE])
@pytest.mark.parametrize("timeout", [0.0, 1.0, 3.0, 9.0, None])
@pytest.mark.alike(3)
def test_needs_that_nothing_fulfils_are_said_in_words(terms: Terms, timeout: float | None) -> None:
    """Whatever is null in JSON has its reason in the text, and what is there would do."""
    writes = trace([set(range(i * 300 % 2000, i * 300 % 2000 + 300)) for i in range(40)], 4000, 0.1)
    how = {"bandwidth": 2000 * PAGE, "max_downtime": 0.05, "terms": terms, "timeout": timeout}
    found = replay(writes, **how)
    assert not found.converges
    ways = {"bandwidth": found.needs.bandwidth, "limit of the downtime": found.needs.max_downtime,
            "throttling": found.needs.throttle}  # fmt: skip
    _, _, said = found.why.partition(": that isn't enough")
    assert {name for name in ways if f"no {name}" in said.lower()} == {name for name in ways if ways[name] is None}
    assert "no bandwidth" not in replay(writes, needs=False, **how).why.lower()
    if (at := re.search(r"as it is in ([0-9.]+) s", found.why)) is not None:
        assert float(at[1]) > timeout
        assert replay(writes, needs=False, starts=1, **how | {"timeout": float(at[1])}).converges


def test_a_time_that_is_enough_is_said() -> None:
    writes = trace([{1}] * 4, 100)
    found = replay(writes, bandwidth=10 * PAGE, terms=FREE, timeout=5)
    assert "It would converge as it is in 10.1 s." in found.why
    assert replay(writes, bandwidth=10 * PAGE, terms=FREE, timeout=10.1).converges
    assert "as it is" not in replay(trace([set(range(90))] * 9, 100), bandwidth=10 * PAGE, terms=FREE, timeout=5).why


def test_a_limit_that_is_needed_may_be_more_than_all_memory_takes() -> None:
    """A pass has a second of its own here, which the measured bandwidth has in it: the rest seems to take longer."""
    writes = trace([set(range(1000))] * 8, 1000)
    how = {"bandwidth": 10_000 * PAGE, "terms": Terms("own", pass_time=1.0)}
    found = replay(writes, max_downtime=5.0, **how)
    assert found.converges
    assert replay(writes, max_downtime=found.needs.max_downtime, needs=False, **how).converges
    assert not replay(writes, max_downtime=found.needs.max_downtime * 0.95, needs=False, **how).converges


def test_the_passes_of_a_report_are_those_that_were_asked_for() -> None:
    writes = trace([set(range(30))] * 20, 1000, 0.1)
    how = {"bandwidth": 20 * PAGE, "max_downtime": 0.3, "terms": FREE}
    for more in ({}, {"timeout": 60.0}, {"on_limit": "pause"}, {"on_limit": "wait"}, {"auto_converge": True}):
        sent = passes(writes, **how | more)
        done = run(TraceWrites(writes), replace(course(**how | more), horizon=TraceWrites(writes).period))
        assert sent == done.samples
        assert len(sent) == done.passes - 1
    assert len(passes(writes, timeout=60.0, **how)) < len(passes(writes, **how))


@pytest.mark.parametrize("terms", [OWN, QEMU, FREE])
@pytest.mark.parametrize("seconds", [2.0, 4.0, 20.0, 60.0])
def test_a_trace_that_is_shorter_than_the_first_pass_is_said_to_be(terms: Terms, seconds: float) -> None:
    """New pages are written all the time, of which a trace that is too short has less than the pass would leave."""
    count = round(seconds * 10)
    writes = trace([set(range(at * 10 % 4000, at * 10 % 4000 + 10)) for at in range(count)], 4000, 0.1)
    why = replay(writes, bandwidth=400 * PAGE, terms=terms, needs=False).why  # some 10 s
    assert ("The first pass takes " in why) == (seconds < 10)
    assert ("the rest may be more" in why) == (seconds < 10)


@pytest.mark.parametrize(
    ("times", "first"),
    [
        ([1, 10**18, 10**18 + 1], 2),
        ([10**18, 10**18 + 1, 10**18 + 2], 1),
        ([1 << 60, (1 << 60) + 5, 1 << 61], 1),
    ],
)
def test_an_interval_that_is_nothing_beside_the_trace(times: list[int], first: int) -> None:
    writes = MemoryWrites(np.ones((len(times), 2), dtype=np.uint64), interval=1.0)
    writes.times = np.array([0, *times])
    said = f"interval {first} of the trace is too short for its time, from {times[first - 1]} to {times[first]} ns"
    with pytest.raises(ValueError, match=said):
        replay(writes, bandwidth=1e6)


@pytest.mark.parametrize("intervals", [1, 3, 9])
def test_a_pass_of_a_huge_guest_goes_over_a_sample_of_it(intervals: int) -> None:
    """However few intervals there are; it stands for the whole."""
    nwords = 1 << 20
    words = np.zeros((intervals, nwords), dtype=np.uint64)
    words[:, ::4] = 0xFF
    guest = TraceWrites(MemoryWrites(words, interval=1.0))
    found = guest.written(0.0, float(intervals))
    assert found.words is not None
    assert found.words.size <= 1 << 18
    assert found.pages == pytest.approx(nwords / 4 * 8, rel=0.02)


def test_the_last_bandwidth_is_spread_apart_from_the_others() -> None:
    terms = Terms("qemu", spread=0.06, last_bandwidth=1e9, last_spread=0.35)
    drawn = predict._draws(Course(terms, 100.0, 0.3), [0.0, 1.0, 2.0])
    rates = np.array([each.terms.last_bandwidth for each in drawn])
    assert rates.mean() == pytest.approx(1e9, rel=0.01)
    assert rates.std() == pytest.approx(0.35e9, rel=0.1)
    for other in ([each.bandwidth for each in drawn], [each.held for each in drawn]):
        assert abs(np.corrcoef(rates, other)[0, 1]) < 0.3
    wild = predict._draws(Course(replace(terms, last_bandwidth=1.0, last_spread=1.0), 100.0, 0.3), [0.0])
    assert min(each.terms.last_bandwidth for each in wild) == 1.0  # the least that there is


@given(st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=20))
def test_a_forecast_is_the_value_that_is_off_least_as_a_part_of_what_it_may_be(values: list[float]) -> None:
    def off(value: float) -> float:
        return sum(abs(value - each) / each for each in values)

    assert off(predict._likeliest(values)) <= min(map(off, values)) * (1 + 1e-9)


def test_a_forecast_of_nothing_at_all_is_the_median() -> None:
    assert predict._likeliest([0.0, 3.0, 5.0]) == 3.0


@pytest.mark.parametrize("starts", [1, 2, 5, 15, 40])
def test_bandwidths_and_what_sockets_hold_are_spread_from_each_moment(starts: int) -> None:
    """From each moment some are tried, of which none is but one side; without a spread each once, at the bandwidth.

    How full the sockets are is as likely as anything else, and has nothing to do with the bandwidth.
    """
    begins = [float(i) for i in range(starts)]
    plan = Course(Terms("own", spread=0.06), 100.0, 0.3)
    drawn = predict._draws(plan, begins)
    assert len(drawn) == max(starts, 15)
    assert sorted({each.start for each in drawn}) == begins
    rates = np.array([each.bandwidth for each in drawn])
    assert rates.mean() == pytest.approx(100)
    assert rates.std() == pytest.approx(6, rel=0.1)
    if 15 // starts > 1:
        for begin in begins:
            mine = [each for each in drawn if each.start == begin]
            assert min(each.bandwidth for each in mine) <= 100 <= max(each.bandwidth for each in mine)
            assert min(each.held for each in mine) < 0.5 < max(each.held for each in mine)
    assert abs(np.corrcoef(rates, [each.held for each in drawn])[0, 1]) < 0.3
    assert {each.terms for each in drawn} == {plan.terms}
    still = predict._draws(replace(plan, terms=FREE), begins)
    assert [(each.start, each.bandwidth) for each in still] == [(begin, 100.0) for begin in begins]
    for each in drawn, still:
        count = len(each)
        assert sorted(one.held for one in each) == pytest.approx([(i + 0.5) / count for i in range(count)])


# --- now ----------------------------------------------------------------------------------------------------------


def likest(intervals, zeros, number: int) -> list[float]:
    """Return the moments at which a guest did what it did at the end, page by page."""
    span = max(len(intervals) // 16, 1)

    def before(end: int) -> set[tuple[int, bool]]:
        pages = {page for each in intervals[end - span : end] for page in each}
        return {(page, any(page in each for each in zeros[end - span : end])) for page in pages}

    def likeness(end: int) -> float:
        here, last = before(end), before(len(intervals))
        either = {page for page, _ in here | last}
        return len(here & last) / len(either) if either else 1.0

    scores = {end: likeness(end) for end in range(span, len(intervals) - span + 1)}
    if not scores:
        return [float(len(intervals))]
    if number == 1:
        return [float(max(scores, key=scores.__getitem__))]
    chosen = [float(end) for end, score in scores.items() if score >= max(scores.values()) / 2]
    places = np.linspace(0, len(chosen) - 1, number).round().astype(int)
    return [chosen[place] for place in sorted(set(places.tolist()))]


@settings(max_examples=30)
@given(st.data(), st.integers(1, 70), st.sampled_from([1, 2, 5]))
def test_moments_that_are_like_the_end(data: st.DataObject, length: int, number: int) -> None:
    page = st.integers(0, 9)
    intervals = data.draw(st.lists(st.sets(page, max_size=4), min_size=length, max_size=length))
    zeros = [{each for each in pages if data.draw(st.booleans())} for pages in intervals]
    made = trace(intervals, 64, zeros=np.stack([bits(each, 64) for each in zeros]))
    assert TraceWrites(made).moments(None, number) == likest(intervals, zeros, number)


def test_a_migration_that_begins_now_meets_the_guest_at_what_it_does() -> None:
    """It writes 40 pages over and over for ten seconds, then nothing for ten, and again; at the end it writes."""
    busy, idle = [set(range(40))] * 10, [set()] * 10
    everywhere = {"bandwidth": 100 * PAGE, "max_downtime": 1.0, "terms": FREE, "needs": False}
    for tail, pages in ((busy[:4], 40), ([*busy, *idle[:4]], 0)):
        guest = trace([*busy, *idle, *busy, *idle, *tail], 64)
        found = replay(guest, **everywhere, now=True)
        assert found.downtime.value == pytest.approx(pages / 100, rel=0.15)
        both = replay(guest, **everywhere)
        assert both.downtime.low < both.downtime.high  # which of them it meets isn't known


def test_a_guest_of_which_nothing_comes_again_is_met_anywhere() -> None:
    intervals = [{i} for i in range(100)]
    assert TraceWrites(trace(intervals, 128)).moments(None, 5) == [6.0, 28.0, 50.0, 72.0, 94.0]


def test_now_is_no_other_time() -> None:
    with pytest.raises(ValueError, match="start_ns 5: a migration that begins now begins where the trace ends"):
        replay(trace([{1}] * 4, 64), bandwidth=1e6, start_ns=5, now=True)
    with pytest.raises(ValueError, match="start_ns 5"):
        compare_rules(trace([{1}] * 4, 64), bandwidth=1e6, start_ns=5, now=True)


def test_rules_and_passes_begin_now() -> None:
    guest = trace([set(range(40))] * 10 + [set()] * 10 + [set(range(40))] * 10 + [set()] * 4, 64)
    (ours, *_) = compare_rules(guest, bandwidth=100 * PAGE, max_downtime=0.1, now=True)
    (other, *_) = compare_rules(guest, bandwidth=100 * PAGE, max_downtime=0.1)
    assert ours.passes == 2
    assert other.passes > 2
    how = {"bandwidth": 100 * PAGE, "max_downtime": 0.01, "terms": FREE}
    later, first = (passes(guest, **how, now=now) for now in (True, False))
    assert len(later) < len(first)
