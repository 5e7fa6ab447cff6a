"""What a migration that doesn't converge says would have helped."""

import re
from types import SimpleNamespace

import pytest
from migrationvm import FakeVm

from hwdbm.forecast import RULES, Verdict
from hwdbm.forecast.rules import passes
from hwdbm.migration import ConvergenceError, Pass, Precopy, Settings, StreamError, migrate
from hwdbm.migration import precopy as precopy_module
from hwdbm.migration.converge import Progress
from hwdbm.migration.report import Report
from hwdbm.vm import PlainGuest

MIB = 1 << 20


@pytest.mark.parametrize(
    ("limit", "said"),
    [
        (0.3, "300 ms are allowed; a downtime of 550 ms would have done, or a bandwidth of 20 MiB/s"),
        (0.0, "0 ms are allowed; a downtime of 550 ms would have done"),
    ],
)
def test_what_would_have_done(limit, said):
    """A tenth more than the shortest pass takes, in tens of ms; and what the least of them fits into the limit by."""
    progress = Progress(Settings(limit))
    for number, (mib, expected) in enumerate([(100, None), (8, 0.6), (6, 0.5), (7, 0.55)], start=1):
        progress.add(number, mib * MIB, expected)
    assert progress.why() == (
        "the guest dirties memory as fast as it is sent: no pass after pass 3 left notably less than 6.0 MiB, "
        f"which takes 500 ms, and {said}"
    )
    assert (progress.best, progress.flat) == (3, 1)


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
    ],
)
def test_which_pass_says_what_the_bandwidth_is(passes, expected) -> None:
    made = SimpleNamespace(report=Report(4096, 1 << 30, 0.3))
    for number, (seconds, zeros, sent) in enumerate(passes, 1):
        made.report.passes.append(Pass(number, 1, 4096, time=seconds, zero_time=zeros, transferred=sent))
        made.report.transferred += sent
    assert Precopy._bandwidth(made) == pytest.approx(expected)
