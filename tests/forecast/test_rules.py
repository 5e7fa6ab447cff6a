"""Stop rules. VEP 248's are what its text and its pseudocode say (kubevirt/enhancements, sig-compute/248)."""

import inspect
import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from seen import as_seen

from hwdbm.forecast import (
    QEMU,
    RULES,
    MemoryWrites,
    Sample,
    Terms,
    Verdict,
    cloud_hypervisor,
    compare_rules,
    kubevirt,
    ours,
    qemu,
)
from hwdbm.forecast.model import Model, ModelWrites
from hwdbm.forecast.rules import passes
from hwdbm.forecast.simulate import Course, run
from hwdbm.forecast.writes import TraceWrites

GIB = 1 << 30
MB = 1_000_000


def iterations(*left, every: float = 10.0, bandwidth: float = 100 * MB, total: float = 4 * GIB) -> list[Sample]:
    """Return a sample at the end of each pass, in MB left."""
    return [Sample(every * i, i + 1, size * MB, total, bandwidth=bandwidth) for i, size in enumerate(left)]


def actions(samples: list[Sample], **options) -> list[str]:
    return [kubevirt(samples[: i + 1], **options).action for i in range(len(samples))]


# --- VEP 248 ---------------------------------------------------------------------------------------------------------


def test_falling_bytes_are_no_stall() -> None:
    """Each pass leaves 10 % less than the last: whatever the time, it is progress."""
    assert set(actions(iterations(*(4000 * 0.9**i for i in range(30))))) == {"continue"}


def test_a_rise_within_the_window_is_no_stall() -> None:
    """A temporary rise resets nothing, and is none: what counts is the least of 60 s ago or before."""
    left = [4000, 2000, 1500, 1900, 2200, 1800, 1400, 1300, 1100, 1000, 950, 900, 850]
    assert set(actions(iterations(*left))) == {"continue"}


def test_bytes_that_oscillate_are_a_stall() -> None:
    """The legacy rule was reset each time that less remained than before: this one isn't."""
    left = [4000, 80] + [85, 80] * 6
    verdicts = actions(iterations(*left))
    # Pass 2 ended at 10 s: at 70 s it is 60 s old, and 80 MB is no less than 96 % of it.
    assert verdicts.index("switch") == 7


def test_the_margin_is_four_percent() -> None:
    """A pass that leaves 95 % of the least of before is progress, one that leaves 96 % is none."""
    flat = [4000] + [1000] * 6
    assert kubevirt(iterations(*flat, 960), search_local_minima=False).why.startswith("stalled")
    assert kubevirt(iterations(*flat, 950), search_local_minima=False).why == "not stalled"


def test_it_switches_at_a_local_minimum() -> None:
    """Stalled at 70 s, where 89 MB remain: it waits for one of 4 % over the best, 60 MB, or less."""
    left = [4000, 80, 85, 60, 88, 86, 87, 89, 90, 63, 62.4]
    verdicts = actions(iterations(*left))
    assert verdicts == ["continue"] * 10 + ["switch"]
    first = actions(iterations(*left), search_local_minima=False)
    assert first.index("switch") == 7


def test_a_target_that_does_not_come_back_is_relaxed() -> None:
    """After 60 s it takes the next smallest value since the stall, then after 30 s, 15 s."""
    left = [4000, 40, 85, 86, 87, 88, 89, 86] + [84, 83, 88, 86, 87, 88] + [82.9] * 2
    verdicts = actions(iterations(*left))
    # Stalled at 70 s, for 40 MB. At 130 s the best since is 83: 88 MB is no more than 4 % over it? 86.3 is the most.
    assert "switch" not in verdicts[:14]
    assert verdicts[14] == "switch"


@pytest.mark.parametrize(("decay", "at"), [(0.5, 160), (1.0, 190)])
def test_patience_decays(decay: float, at: int) -> None:
    """The second relaxation comes after half the time of the first."""
    # Stalled at 70 s, for 40 MB; at 130 s for the best since then, 60 MB; at 160 s (or 190 s) for the next best, 85 MB.
    left = [4000, 40, *[86] * 6, 60, *[85, 88, 87] * 4]
    verdicts = actions(iterations(*left, bandwidth=100 * MB), decay=decay)
    assert verdicts.index("switch") == at // 10


@pytest.mark.parametrize(
    ("left", "action", "why"),
    [
        (80, "switch", "stalled, and the rest takes 800 ms of 900 ms"),
        (90, "continue", "stalled, and the rest takes 900 ms of 900 ms"),  # QEMU's is "less than"
        (91, "continue", "stalled, and the rest takes 910 ms"),
        (134, "continue", "stalled, and the rest takes 1,340 ms"),
        (135, "abort", "stalled, and the rest takes 1,350 ms, far from 900 ms"),
        (500, "abort", "stalled, and the rest takes 5,000 ms, far from 900 ms"),
    ],
)
def test_the_implied_downtime_decides(left: float, action: str, why: str) -> None:
    """Up to maxDowntimeMs QEMU's limit is raised; from 1.5 times as much on it is hopeless; between, wait."""
    verdict = kubevirt(iterations(4000, *[left] * 7))
    assert (verdict.action, verdict.why) == (action, why)
    assert verdict.limit == (0.9 if left <= 90 else 0.3)


def test_a_drop_of_the_bandwidth_is_smoothed() -> None:
    """A sample of a third of the bandwidth would imply 3 s; with a weight of 0.4 it is no reason to abort."""
    samples = iterations(4000, *[60] * 6)
    drop = Sample(70, 8, 60 * MB, 4 * GIB, bandwidth=33 * MB)
    assert kubevirt([*samples, drop]).action == "continue"
    assert kubevirt([*samples, drop]).limit == 0.9
    assert kubevirt([*samples, drop], ewma_alpha=1.0).action == "abort"


def test_polls_between_passes_count_for_the_bandwidth_alone() -> None:
    """What remains in the middle of a pass is no local minimum."""
    samples = []
    for each in iterations(4000, *[500] * 5):
        samples += [each, Sample(each.time + 5, each.iteration, 50 * MB, 4 * GIB, bandwidth=100 * MB)]
    assert set(actions(samples)) == {"continue"}


def test_qemu_switches_by_itself_below_300_ms() -> None:
    verdict = kubevirt(iterations(4000, 29))
    assert (verdict.action, verdict.why) == ("switch", "QEMU's own limit of 300 ms")
    assert kubevirt(iterations(4000, 29), max_downtime=0.2).action == "continue"  # min(maxDowntimeMs, 300 ms)


def test_a_switch_that_does_not_come_is_aborted() -> None:
    """QEMU has progressTimeout after its limit was raised."""
    left = [4000, *[80] * 7, *[200] * 8]
    verdicts = actions([*iterations(*left)])
    assert verdicts[7] == "switch"
    assert verdicts[14] == "abort"


def test_it_may_take_150_s_a_gib() -> None:
    samples = [Sample(0, 1, GIB, GIB, bandwidth=MB), Sample(149, 1, GIB / 2, GIB, bandwidth=MB)]
    assert kubevirt(samples).action == "continue"
    assert kubevirt([*samples, Sample(151, 1, GIB / 2, GIB, bandwidth=MB)]).action == "abort"


def test_the_defaults_are_the_ve_p_s() -> None:
    defaults = {name: each.default for name, each in inspect.signature(kubevirt).parameters.items()}
    del defaults["samples"]
    assert defaults == {
        "max_downtime": 0.9,
        "progress_timeout": 60.0,
        "timeout_per_gib": 150.0,
        "stall_margin": 0.04,
        "ewma_alpha": 0.4,
        "possible_factor": 1.5,
        "decay": 0.5,
        "search_local_minima": True,
    }


# --- the others ------------------------------------------------------------------------------------------------------


def test_ours_gives_up_after_passes_without_progress() -> None:
    samples = iterations(4000, *[500] * 6)
    assert ours(samples, max_iterations=6).action == "continue"
    assert ours(samples, max_iterations=5).action == "abort"
    assert ours(samples, max_iterations=5, on_limit="pause").action == "switch"
    assert ours(samples, max_iterations=5, on_limit="wait").action == "continue"
    assert ours(iterations(4000, 500, 400, 300, 250, 200, 189), max_iterations=1).action == "continue"


def test_no_rule_switches_in_the_first_pass() -> None:
    for rule in RULES.values():
        assert rule([Sample(1, 1, 100, GIB, bandwidth=GIB)]).action == "continue"


@given(st.lists(st.tuples(st.floats(0, 30), st.floats(0, 1e10), st.one_of(st.none(), st.floats(0, 1e10))), min_size=1))
def test_each_rule_says_something_of_any_samples(made) -> None:
    now, samples = 0.0, []
    for i, (step, left, bandwidth) in enumerate(made):
        now += step
        samples.append(Sample(now, 1 + i // 2, left, 1e10, bandwidth=bandwidth))
    for rule in RULES.values():
        verdict = rule(samples)
        assert verdict.action in {"continue", "switch", "abort"}
        assert rule(samples) == verdict  # a function of the samples
    assert len(passes(samples)) == len({each.iteration for each in samples})


# What is left after passes of 16 s at 64 MB/s, in MB: numbers that are exact, so that ties are ties.
HISTORIES = {
    "falls to the limit": (4096, 1024, 256, 64, 32, 31),
    "stays": (4096, *[64] * 12),
    "stays from the first pass on": [64] * 10,
    "stays, not far": (4096, *[48] * 12),
    "waves": (4096, 80, 64, 96, 63, 100, 61.4375, 70, 66, 60, 61, 62, 59, 80, 80),
    "creeps": (4096, *(100 * 0.97**i for i in range(12))),
}
OPTIONS: dict[str, list[dict[str, object]]] = {
    "ours": [
        {}, {"max_downtime": 0.5}, *({"on_limit": how, "max_iterations": 3} for how in ("abort", "wait", "pause"))
    ],
    "qemu": [{}, {"max_downtime": 0.5}],
    "qemu-auto-converge": [{}, {"max_downtime": 0.5}],
    "kubevirt": [
        {}, {"max_downtime": 0.5}, {"max_downtime": 0.75, "progress_timeout": 32.0},
        {"max_downtime": 1.0, "decay": 0.25},
        {"max_downtime": 0.5, "possible_factor": 2.0, "search_local_minima": False},
        {"timeout_per_gib": 16.0}, {"stall_margin": 0.5, "ewma_alpha": 0.25, "progress_timeout": 16.0},
    ],
    "cloud-hypervisor": [{}, {"max_downtime": 0.5}, {"timeout": 64.0}, {"timeout": 64.0, "on_timeout": "ignore"}],
}  # fmt: skip


def told(rule: str, samples: list[Sample]) -> Iterator[str]:
    """Yield what a rule with each of its options decides after each sample, once where it stays the same."""
    for options in OPTIONS[rule]:
        verdicts = [RULES[rule](samples[: i + 1], **options) for i in range(len(samples))]
        yield f"  {rule} {options or ''}".rstrip()
        for number, each in enumerate(verdicts):
            if number == 0 or each != verdicts[number - 1]:
                yield f"    {number + 1}: {each.action}, {each.why}; limit {each.limit}, throttle {each.throttle}"


@pytest.mark.parametrize("rule", RULES)
def test_what_rules_decide_was_looked_at(rule: str) -> None:
    lines = []
    for name, left in HISTORIES.items():
        samples = iterations(*left, every=16.0, bandwidth=64 * MB)
        lines += [name, *told(rule, samples)]
        # As a monitor has it: twice a pass, with what was sent, and a bandwidth that isn't the same.
        often = [
            Sample(
                each.time + more, each.iteration, each.remaining * (1 - more / 32), each.total,
                bandwidth=(60 + 4 * (number % 3)) * MB, transferred=(each.time + more) * 64 * MB,
                dirty_rate=3 * number * MB,
            )
            for number, each in enumerate(samples)
            for more in (0, 8)
        ]  # fmt: skip
        lines += [f"{name}, asked often", *told(rule, often)]
    as_seen(f"rules/{rule}.txt", "\n".join(lines) + "\n")


@pytest.mark.parametrize("name", RULES)
def test_what_is_no_samples_is_refused(name: str) -> None:
    for wrong in ([], None, [1], "x"):
        with pytest.raises(TypeError):
            RULES[name](wrong)
    with pytest.raises(ValueError, match="max_downtime is a number of 0 or more"):
        RULES[name](iterations(1, 1), max_downtime=-1)


def test_qemu_and_cloud_hypervisor_differ_at_the_limit() -> None:
    assert qemu(iterations(4000, 30)).action == "continue"
    assert cloud_hypervisor(iterations(4000, 30)).action == "switch"


def test_rules_side_by_side() -> None:
    """1 GiB with a hot set of 50 MiB, over 100 MB/s: 524 ms that can't be avoided."""
    words = np.zeros((50, 4096), dtype=np.uint64)
    words[:, :200] = ~np.uint64(0)
    writes = MemoryWrites(words, 0.1)
    found = {each.rule: each for each in compare_rules(writes, bandwidth=100e6, terms=QEMU, timeout=200)}
    assert list(found) == list(RULES)
    assert {name: each.action for name, each in found.items()} == {
        "ours": "abort",
        "qemu": "goes on",
        "qemu-auto-converge": "switch",
        "kubevirt": "switch",
        "cloud-hypervisor": "goes on",
    }
    assert found["kubevirt"].downtime == pytest.approx(0.54, rel=0.05)
    assert found["kubevirt"].time == pytest.approx(70, rel=0.05)
    assert found["qemu-auto-converge"].downtime < 0.32
    assert found["ours"].to_dict()["downtime"] is None
    assert all(each.action == "switch" for each in compare_rules(writes, bandwidth=100e6, max_downtime=0.7))


@pytest.mark.parametrize("structure", ["own", "qemu"])
@pytest.mark.parametrize("known", [True, False])
def test_a_rule_is_asked_within_a_pass(structure: str, known: bool) -> None:
    """A first pass of 100 s isn't waited for, nor the second one: what is left and sent is as it is then."""
    guest = TraceWrites(MemoryWrites(np.full((10, 16), ~np.uint64(0)), 1.0))
    if not known:  # which pages they are
        guest = ModelWrites(Model(hot=1024 * 4096.0, cold=0.0, tau=1.0, error=0.0), 1024 * 4096.0, 4096)
    seen = []

    def at_150_s(samples) -> Verdict:
        seen.append(samples[-1])
        return Verdict("abort" if samples[-1].time >= 150 else "continue", "enough")

    terms = Terms(structure, tick=0.1)  # type: ignore[arg-type]
    done = run(guest, Course(terms, 1024 * 4096 / 100, 0.001, decide=at_150_s))
    assert (done.converges, done.passes) == (False, 2)
    assert done.total_time == pytest.approx(150, abs=2)
    assert done.transferred == pytest.approx(1.5 * 1024 * 4096, rel=0.02)
    assert done.downtime == pytest.approx(100, rel=0.02)  # all of it is dirty
    assert [each.iteration for each in passes(seen)] == [1, 2]
    assert len(seen) >= 140
    for before, each in itertools.pairwise(seen):
        assert each.transferred == pytest.approx(each.time / 100 * 1024 * 4096, rel=0.05)
        if each.iteration == before.iteration:
            assert before.remaining - each.remaining == pytest.approx(each.transferred - before.transferred, abs=4096)
