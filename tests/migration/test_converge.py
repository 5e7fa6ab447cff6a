"""What a migration that doesn't converge says would have helped."""

import re
import socket
from types import SimpleNamespace

import pytest
from migrationvm import LAYOUT, FakeVm

from hwdbm.bitmap import DirtyBitmap
from hwdbm.forecast import RULES, Sample, Verdict
from hwdbm.forecast.rules import passes
from hwdbm.memslot import Memslot
from hwdbm.migration import Channel, ConvergenceError, Pass, Precopy, Settings, StreamError, migrate
from hwdbm.migration import precopy as precopy_module
from hwdbm.migration.converge import Progress
from hwdbm.migration.report import Report
from hwdbm.vm import MemoryMap, PlainGuest

MIB = 1 << 20


@pytest.mark.parametrize(
    ("limit", "shortest", "said"),
    [
        (0.3, 0.5, "500 ms, and 300 ms are allowed; a downtime of 550 ms would have done, or a bandwidth of 20 MiB/s"),
        (0.0, 0.5, "500 ms, and 0 ms are allowed; a downtime of 550 ms would have done"),
        (
            0.001,
            12.345,
            "12,345 ms, and 1 ms are allowed; a downtime of 13,580 ms would have done, or a bandwidth of 6,000 MiB/s",
        ),
    ],
)
def test_what_would_have_done(limit, shortest, said):
    """A tenth more than the shortest pass takes, in tens of ms; and what the least of them fits into the limit by."""
    progress = Progress(Settings(limit))
    for number, (mib, more) in enumerate([(100, None), (8, 0.1), (6, 0.0), (7, 0.05)], start=1):
        progress.add(number, mib * MIB, None if more is None else shortest + more)
    assert progress.why() == (
        "the guest dirties memory as fast as it is sent: no pass after pass 3 left notably less than 6.0 MiB, "
        f"which takes {said}"
    )
    assert (progress.best, progress.flat) == (3, 1)


@pytest.mark.parametrize(("remaining", "flat"), [(950, 1), (949, 0), (1000, 1), (2000, 1), (0, 0)])
def test_a_twentieth_less_is_progress(remaining, flat):
    progress = Progress(Settings())
    progress.add(2, 1000, None)
    assert (progress.best, progress.flat) == (2, 0)
    progress.add(3, remaining, None)
    assert (progress.best, progress.flat) == (2 if flat else 3, flat)
    progress.add(4, 5000, None)
    assert progress.flat == flat + 1


@pytest.fixture
def channel():
    """Return a channel to nobody."""
    here, there = socket.socketpair()
    with Channel(here) as made, there:
        yield made


def test_a_guest_that_never_converges_is_told_after_how_many_passes(channel):
    with PlainGuest(MemoryMap(4096, (Memslot(0, 0, 16, 1, 0),))) as vm:
        precopy = Precopy(vm, channel, Settings(0, 2))
        for number in range(1, 5):
            precopy.report.passes.append(Pass(number, 1, 4096, expected_downtime=0.5))
            precopy._progress.add(number, 4096, 0.5)
        assert precopy._progress.flat == 3
        with pytest.raises(ConvergenceError, match=r" would have done \(in 3 passes\)$"):
            precopy._enough(precopy.report.passes[-1])


def test_what_is_known_when_a_pass_begins(channel, monkeypatch) -> None:
    """The rate at which memory was dirtied since the pass before began, and what it takes to send it now."""
    monkeypatch.setattr(precopy_module, "time", SimpleNamespace(perf_counter=lambda: 30.0))
    layout = MemoryMap(4096, (Memslot(0, 0, 16, 130, 0), Memslot(1, 0, 1000, 65, 0)))
    with PlainGuest(layout) as guest:
        precopy = Precopy(guest, channel, Settings(0.25))
        precopy._start, precopy._collected, precopy._collect_time = 10.0, 8.0, 0.125
        first = precopy._new({0: ~DirtyBitmap(130), 1: ~DirtyBitmap(65)})
        precopy._sample(first)
        assert (first.number, first.dirty, first.remaining, first.throttle) == (1, 195, 195 * 4096, 0)
        first.time, first.zero_time, first.transferred, first.duplicate = 3.0, 1.0, 8 * MIB, 11
        precopy._throttle.percent, channel.sent = 30, 8 * MIB + 77
        pages = {0: DirtyBitmap.from_pages([3, 64], 130), 1: DirtyBitmap.from_pages([64], 65)}
        second = precopy._begin(pages, 6.0)
        assert second.cells.tolist() == [1 / 64, 1 / 64, 0, 0, 1]
        assert precopy.report.passes == [first, second]
        known = {name: getattr(second, name) for name in ("number", "dirty", "remaining", "throttle", "collect_time")}
        assert known == {"number": 2, "dirty": 3, "remaining": 3 * 4096, "throttle": 30, "collect_time": 0.125}
        assert (second.dirty_rate, second.expected_downtime) == (3 * 2048.0, 3 * 4096 / (4 * MIB))
        assert precopy.report.remaining == 3 * 4096
        assert precopy._samples == [
            Sample(20.0, 1, 195 * 4096, layout.total, 0, None, None, 0, 4096, 0.25, 0, source="hwdbm"),
            Sample(
                20.0, 2, 3 * 4096, layout.total, 8 * MIB + 77, 4.0 * MIB, 6144.0, 11, 4096, 0.25, 30, source="hwdbm"
            ),
        ]
        assert precopy._begin(pages, 8.0).dirty_rate == pytest.approx(3 * 4096e9)  # it took no time to see


def test_how_long_each_answer_is_waited_for(vm, inside) -> None:
    """Twice the timeout and what it takes to get memory ready, at 128 MiB a second; and else once the timeout.

    For the digest there is as long beside it as four here take, and for the last pass twice what that is expected to
    take.
    """
    vm.resume()
    channel, asked = inside(PlainGuest).channel, []
    channel.timeout, within = 5.0, channel.within
    channel.within = lambda seconds, what: asked.append((what, seconds)) or within(seconds, what)
    report = migrate(vm, channel, Settings(max_downtime=0.02))
    digest = asked[-2][1]
    assert 5.0 < digest <= 5.0 + 4 * report.verify_time
    assert asked == [
        ("getting ready there", 10.0 + LAYOUT.total / (128 * MIB)),
        *[("the last pass", float("inf"))] * (len(report.passes) - 1),
        ("the last pass", 5.0 + 2 * report.passes[-1].expected_downtime),
        ("taking the state", 5.0),
        ("the digest there", digest),
        ("starting the guest there", 5.0),
    ]


def test_the_first_report_is_told_at_once(vm, inside, monkeypatch) -> None:
    """While all of the memory is to be sent; and then no more until the first pass is over, where that isn't due."""
    monkeypatch.setattr(precopy_module, "_TELL", 1e9)
    told = []
    migrate(vm, inside(PlainGuest).channel, Settings(), on_progress=lambda report: told.append(report.remaining))
    assert told[:2] == [LAYOUT.total, 0]


def test_the_forecast_is_renewed_at_each_pass(inside, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest that writes all of its memory, over a link that needs longer for it than is allowed.

    However long a forecast takes: beside others' work it may be longer than a fifth of a pass.
    """
    monkeypatch.setattr("hwdbm.migration.precopy._WORTH", 0)
    with FakeVm(pause_every=0) as vm:
        vm.resume()
        other = inside(PlainGuest)
        told = []
        settings = Settings(max_downtime=0.05, bandwidth=20e6, max_iterations=2, on_limit="pause", verify=False)
        report = migrate(
            vm, other.channel, settings, on_progress=lambda r: told.append(r.passes[-1].forecast if r.passes else None)
        )
        other.join()
    first, *later, _ = report.passes
    assert len(later) > 1
    assert all(one.forecast is not None for one in later)
    assert first.forecast is None
    assert "forecast" in later[0].to_dict()
    assert any(each is not None for each in told)


@pytest.mark.parametrize("rule", [name for name in RULES if name != "ours"])
def test_rules_of_others_pause_a_guest_that_fits(inside, rule: str) -> None:
    with FakeVm(pause_every=0.01) as vm:
        vm.resume()
        other = inside(PlainGuest)
        report = migrate(vm, other.channel, Settings(max_downtime=2, rule=rule))
        other.join()
    assert report.status == "completed"
    assert report.converged


def test_a_rule_gives_up(inside, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(samples, *, max_downtime):
        assert [each.iteration for each in passes(samples)] == list(range(1, samples[-1].iteration + 1))
        assert max_downtime == 0.3
        return Verdict("abort" if samples[-1].iteration > 3 else "continue", "so it is", throttle=20)

    monkeypatch.setitem(RULES, "qemu", never)
    with FakeVm(pause_every=0.01) as vm:
        vm.resume()
        precopy = Precopy(vm, inside(PlainGuest).channel, Settings(rule="qemu"))
        with pytest.raises(ConvergenceError, match=re.escape("by the rule qemu: so it is (in 3 passes)")):
            precopy.run()
        assert vm.running
    assert [one.throttle for one in precopy.report.passes] == [0, 20, 20, 20]


@pytest.mark.parametrize("at", [1, 2])
def test_a_rule_gives_up_within_a_pass(inside, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """It is asked again while a pass goes on, with what is left of it by then; to switch it has to wait for its end."""
    asked = []

    def impatient(samples, *, max_downtime):
        last, before = samples[-1], samples[-2] if len(samples) > 1 else None
        within = before is not None and before.iteration == last.iteration
        asked.append((last.iteration, within))
        if within:
            assert (last.time, last.transferred) > (before.time, before.transferred)
            assert last.remaining <= before.remaining
        return Verdict("abort" if within and last.iteration == at else "switch" if within else "continue", "enough")

    monkeypatch.setitem(RULES, "qemu", impatient)
    monkeypatch.setattr(precopy_module, "pace", lambda elapsed: 0.0)
    with FakeVm(pause_every=0) as vm:
        vm.resume()
        precopy = Precopy(vm, inside(PlainGuest).channel, Settings(rule="qemu", verify=False))
        with pytest.raises(ConvergenceError, match=re.escape(f"by the rule qemu: enough (within pass {at})")):
            precopy.run()
        assert vm.running
    assert asked[-1] == (at, True)
    assert (1, True) in asked
    assert len(precopy.report.passes) == at


@pytest.mark.parametrize("limit", [0.25, 2.0])
@pytest.mark.parametrize("on_limit", ["abort", "wait", "pause"])
@pytest.mark.parametrize("ran", [True, False])
def test_how_long_a_last_pass_may_take(limit: float, on_limit: str, ran: bool) -> None:
    """Over the limit by as much again, or half a second, the guest goes on; later the migration ends."""
    vm, goes_on_at = FakeVm(), limit + max(limit, 0.5)

    def said(paused: float) -> tuple[bool, str, float]:
        vm.pause()
        one = Pass(2, 1, 4096, expected_downtime=0.5)
        report = SimpleNamespace(status="device", converged=True)
        precopy = SimpleNamespace(
            _settings=Settings(limit, on_limit=on_limit), _channel=SimpleNamespace(timeout=4.0), _ran=ran, _source=vm,
            report=report, _paused=1.0,
        )  # fmt: skip
        Precopy._limit_pause(precopy, one, paused)
        assert (precopy._paused is None, report.converged) == (vm.running, not vm.running)
        return vm.running, report.status, one.paused

    goes_on = ran and on_limit != "pause"
    assert said(goes_on_at) == (False, "device", 0.0)
    after = goes_on_at + 0.125
    assert said(after) == ((True, "active", after) if goes_on else (False, "device", 0.0))
    said(limit + 5.0)
    with pytest.raises(StreamError, match=f"the last pass isn't over after {limit + 5.125:.1f} s"):
        said(limit + 5.125)


@pytest.mark.parametrize(
    ("expected", "cost", "renewed"),
    [(None, 0.0, True), (None, 0.1, False), (0.49, 0.1, False), (0.5, 0.1, True), (2.0, 0.1, True), (0.0, 0.0, True)],
)
def test_a_forecast_is_renewed_where_it_takes_a_small_part_of_a_pass(expected, cost, renewed, monkeypatch) -> None:
    made = SimpleNamespace(_forecast_cost=cost, _settings=Settings(), _samples=[])
    asked = []
    monkeypatch.setattr(precopy_module, "from_samples", lambda *given, **how: asked.append((given, how)) or "forecast")
    one = Pass(2, 1, 4096, expected_downtime=expected)
    Precopy._foresee(made, one)
    assert one.forecast == ("forecast" if renewed else None)
    how = {"max_downtime": 0.3, "max_iterations": 30, "on_limit": "abort", "auto_converge": False, "needs": False}
    assert asked == ([(([],), how)] if renewed else [])


@pytest.mark.parametrize(
    ("passes", "expected"),
    [
        ([(0.5, 0.0, 10 << 20)], 20 << 20),
        ([(0.5, 0.0, 10 << 20), (0.049, 0.0, 5 << 20)], 20 << 20),
        ([(0.5, 0.0, 10 << 20), (0.0625, 0.0, 5 << 20)], 80 << 20),
        ([(0.5, 0.0, 10 << 20), (0.5, 0.46, 5 << 20)], 20 << 20),
        ([(0.5, 0.0, 10 << 20), (0.5, 0.0, (1 << 20) - 1)], 20 << 20),
        ([(0.5, 0.0, 10 << 20), (0.5, 0.0, 1 << 20)], 2 << 20),
        ([(0.5, 0.0, 10 << 20), (0.05, 0.0, 2 << 20)], 40 << 20),
        ([(0.03125, 0.0, 1 << 19), (0.03125, 0.0, 1 << 19)], 16 << 20),
    ],
)
def test_which_pass_says_what_the_bandwidth_is(passes, expected) -> None:
    made = SimpleNamespace(report=Report(4096, 1 << 30, 0.3))
    for number, (seconds, zeros, sent) in enumerate(passes, 1):
        made.report.passes.append(Pass(number, 1, 4096, time=seconds, zero_time=zeros, transferred=sent))
        made.report.transferred += sent
    assert Precopy._bandwidth(made) == pytest.approx(expected)
