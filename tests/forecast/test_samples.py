"""Reading samples, and forecasts from them."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from fieldtools import changed
from hypothesis import given
from hypothesis import strategies as st
from seen import as_seen

from hwdbm.errors import SampleError
from hwdbm.forecast import (
    OWN,
    QEMU,
    MemoryWrites,
    Sample,
    Terms,
    from_samples,
    predict,
    read_samples,
    replay,
    simulate,
)
from hwdbm.forecast.model import Model, ModelWrites, fit, measured
from hwdbm.forecast.simulate import Begun, Course, run
from hwdbm.forecast.writes import Dirty, TraceWrites
from hwdbm.migration.report import Pass, Report

MIB = 1 << 20


def qmp(time: float, sync: int, remaining: float, **more) -> str:
    ram = {"total": 1 << 30, "remaining": remaining, "transferred": 5, "mbps": 800.0, "duplicate": 7}
    ram |= {"dirty-sync-count": sync, "dirty-pages-rate": 100, "page-size": 4096, "normal": 1}
    return json.dumps({"status": "active", "total-time": time, "expected-downtime": 300, "ram": ram | more})


VIRSH = """Job type:         Unbounded
Operation:        Outgoing migration
Time elapsed:     1520         ms
Data processed:   412.500 MiB
Data remaining:   100.000 MiB
Data total:       1.016 GiB
Memory processed: 412.500 MiB
Memory remaining: 100.000 MiB
Memory total:     1.016 GiB
Memory bandwidth: 108.250 MiB/s
Dirty rate:       2560         pages/s
Page size:        4096         bytes
Iteration:        3
Postcopy requests: 0
Constant pages:   130000
Normal pages:     105000
Normal data:      410.156 MiB
Expected downtime: 300         ms
Setup time:       5            ms
"""

CLOUD = {
    "transportation_mode": "Local",
    "timestamp_begin_ms": 1_700_000_000_000,
    "timestamp_snapshot_ms": 1_700_000_002_500,
    "downtime_configured_ms": 300,
    "downtime_estimated_ms": 700,
    "vcpu_throttle_percent": 20,
    "memory_transmission_info": {
        "memory_iteration": 2,
        "memory_transmission_bps": 100_000_000,
        "memory_bytes_total": 1 << 30,
        "memory_bytes_transmitted": 1 << 31,
        "memory_bytes_remaining_iteration": 70_000_000,
        "memory_pages_4k_transmitted": 1 << 19,
        "memory_pages_4k_remaining_iteration": 17090,
        "memory_pages_constant_count": 5,
        "memory_dirty_rate_pps": 1000,
    },
}
LOG = (
    "cloud-hypervisor: 12.5s: <vmm> INFO: iter=0 curr=1024MiB total=1024MiB bw=100.00MiB/s transfer=10.24s "
    "overhead=1ms est_downtime=0ms elapsed=10.25s avg_bw=99.90MiB/s\n"
    "cloud-hypervisor: 14s: <vmm> INFO: iter=1 curr=128MiB total=1152MiB bw=64.00MiB/s transfer=2.00s "
    "overhead=1ms est_downtime=1280ms elapsed=12.25s avg_bw=94.00MiB/s"
).splitlines()


def test_query_migrate() -> None:
    (sample,) = read_samples([qmp(2500, 3, 4096 * 50)])
    assert sample == Sample(
        2.5, 3, 204800, 1 << 30, 5, 1e8, 409600, 7, 4096, source="qemu"
    )  # fmt: skip
    assert read_samples(['{"return": ' + qmp(2500, 3, 204800) + "}"]) == [sample]
    others = ['{"QMP": {"version": {}, "capabilities": []}}', '{"return": {}}', '{"event": "MIGRATION", "data": {}}']
    assert read_samples([*others, qmp(2500, 3, 204800), others[2]]) == [sample]
    assert read_samples(['{"status": "setup"}', "", '{"status": "none"}', qmp(2500, 3, 204800)]) == [sample]


@pytest.mark.parametrize("mbps", [0, 1e-300, 7e-6])
def test_a_bandwidth_of_0_is_none_yet(mbps: float) -> None:
    (sample,) = read_samples([qmp(5, 1, 1 << 30, mbps=mbps)])
    assert sample.bandwidth is None


def test_libvirt_s_job_stats() -> None:
    stats = {"time_elapsed": 1520, "memory_total": 1 << 30, "memory_remaining": 1 << 20, "memory_bps": 1 << 26}
    stats |= {"memory_iteration": 3, "memory_dirty_rate": 2560, "memory_page_size": 4096, "memory_constant": 13}
    (sample,) = read_samples([json.dumps(stats)])
    assert sample == Sample(
        1.52, 3, 1 << 20, 1 << 30, None, 1 << 26, 2560 * 4096, 13, source="libvirt"
    )  # fmt: skip


def test_domjobinfo() -> None:
    later = VIRSH.replace("1520 ", "1920 ").replace("remaining: 100", "remaining: 50")
    first, second = read_samples((VIRSH + "\n" + later).splitlines(keepends=True))
    assert (first.time, first.iteration, first.remaining) == (1.52, 3, 100 * MIB)
    assert first.bandwidth == 108.25 * MIB
    assert first.dirty_rate == 2560 * 4096
    assert first.total == pytest.approx(1.016 * 1024 * MIB)
    assert (second.time, second.remaining) == (1.92, 50 * MIB)
    assert read_samples(("Job type: None\n\n" + VIRSH).splitlines()) == [first]


@pytest.mark.parametrize(
    ("unit", "size"), [("B", 1), ("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30), ("TiB", 1 << 40)]
)
def test_virsh_s_units(unit: str, size: int) -> None:
    text = f"Job type: Unbounded\nTime elapsed: 2500 ms\nMemory remaining: 1.5 {unit}\nMemory total: 3 {unit}\n"
    (sample,) = read_samples((text + f"Memory bandwidth: 2 {unit}/s\n").splitlines())
    assert (sample.time, sample.remaining, sample.total, sample.bandwidth) == (2.5, 1.5 * size, 3 * size, 2 * size)


def test_what_cloud_hypervisor_measured_of_a_pass_without_bytes_is_not_known() -> None:
    idle = LOG[0].replace("bw=100.00", "bw=0.00"), LOG[1]
    assert [each.bandwidth for each in read_samples(idle)] == [0, 64 * MIB]


def test_cloud_hypervisor_s_progress_and_log() -> None:
    (sample,) = read_samples([json.dumps(CLOUD)])
    assert (sample.time, sample.iteration, sample.remaining, sample.bandwidth) == (2.5, 3, 7e7, 1e8)
    assert (sample.throttle, sample.downtime_limit, sample.dirty_rate) == (20, 0.3, 4096000)
    first, second = read_samples(LOG)
    assert (first.iteration, first.remaining, first.total) == (1, 1024 * MIB, 1024 * MIB)
    assert (second.iteration, second.remaining, second.time) == (2, 128 * MIB, pytest.approx(10.25))
    assert second.bandwidth == 100 * MIB  # that of the pass before, which is what was known


def test_our_own_report_and_its_passes() -> None:
    report = Report(4096, 1 << 20, 0.3, setup_time=0.5)
    report.passes = [
        Pass(1, 256, 1 << 20, normal=256, transferred=1 << 20, time=1.0),
        Pass(2, 64, 1 << 18, dirty_rate=1 << 18, collect_time=0.25, transferred=1 << 18, time=0.5),
        Pass(3, 8, 1 << 15, dirty_rate=1 << 16),
    ]
    first, second, third = read_samples(json.dumps(report.to_dict(), indent=2).splitlines())
    assert (first.time, first.iteration, first.remaining, first.bandwidth) == (0.5, 1, 1 << 20, None)
    assert (second.time, second.remaining, second.bandwidth) == (1.75, 1 << 18, 1 << 20)
    assert (third.time, third.remaining, third.transferred, third.bandwidth) == (2.25, 1 << 15, 5 << 18, 1 << 19)
    assert (second.total, second.downtime_limit, second.source) == (1 << 20, 0.3, "hwdbm")
    lines = [json.dumps(each.to_dict()) for each in report.passes]
    assert [each.remaining for each in read_samples(lines)] == [1 << 20, 1 << 18, 1 << 15]
    assert read_samples([json.dumps(report.to_dict())]) == [first, second, third]


GOOD = qmp(1000, 1, 1 << 29)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "there are no samples of a migration in that"),
        (["", "{}"], "there are no samples"),
        ([GOOD, GOOD[: len(GOOD) // 2]], "line 2: the JSON object is cut short"),
        ([GOOD, "{", '"ram": {'], "line 2: the JSON object is cut short at line 3"),
        ([GOOD, "{", GOOD], "line 2: the JSON object is cut short at line 3"),
        ([GOOD, "", '{"a" 5}'], "line 3: no JSON object"),
        ([GOOD, qmp(999, 1, 5)], "line 2: time goes backwards, from 1000 to 999 ms"),
        ([qmp(5, 3, 5), qmp(6, 2, 5)], "line 2: the iteration goes backwards, from 3 to 2"),
        ([GOOD, qmp(1001, 1, 2e9)], "line 2: 2000000000 bytes are said to remain of 1073741824 bytes of memory"),
        ([GOOD, qmp(1001, 1, 5, total=5)], "line 2: the memory changes, from 1073741824 to 5 bytes"),
        ([qmp(float("nan"), 1, 5)], "line 1: total-time is a number of 0 or more, not nan"),
        ([qmp(5, 1, float("inf"))], "line 1: remaining is a number of 0 or more, not inf"),
        ([qmp(5, 1, -4096)], "line 1: remaining is a number of 0 or more, not -4096"),
        ([qmp(5, 1, 5, mbps=-1)], "line 1: mbps is a number of 0 or more, not -1"),
        ([qmp(5, 1, 5, mbps="8")], 'line 1: mbps is a number, not "8"'),
        ([qmp(5, 1, 5, mbps=True)], "line 1: mbps is a number, not true"),
        (['{"ram": 5, "total-time": 1}'], "line 1: ram is an object, not 5"),
        (['{"ram": {"total": 5}, "total-time": 1}'], "line 1: there is no remaining"),
        (['{"ram": {"remaining": 5}}'], "line 1: there is no total-time"),
        (["[1, 2]"], "line 1: a sample is a JSON object, not \\[1, 2\\]"),
        (['{"cpu": 5}'], "line 1: an object with the keys cpu is no sample"),
        (["hello"], "line 1: 'hello' is no JSON object"),
        ([GOOD, json.dumps(CLOUD)], "line 2: a sample of another kind than those before it"),
        ([json.dumps(CLOUD | {"timestamp_begin_ms": 1 << 60})], "line 1: the snapshot's time"),
        (VIRSH.splitlines()[:5], "line 1: there is no Memory remaining in the job's text, or it is cut short"),
        (["Job type: Unbounded", "Memory remaining: x MiB", "Time elapsed: 5 ms"], "line 1: Memory remaining is"),
        ([LOG[0][:100]], "line 1: the line of a log is cut short"),
        (['{"pass": 2, "remaining": 5}', '{"pass": 2, "remaining": 5}'], "line 2: pass 2 comes after pass 2"),
        (['{"a": ' + "[" * 100_000], "line 1"),
        (["{" + "x" * (1 << 20)], "line 1: it has 1048577 characters"),
        (['{"ram": {"remaining": 5, "page-size": 0.5}, "total-time": 5}'], "line 1: page-size is a whole number"),
    ],
)  # fmt: skip
def test_bad_input_is_named_with_its_line(lines, said: str) -> None:
    with pytest.raises(SampleError, match=said):
        read_samples(lines)


@given(
    st.lists(st.one_of(st.text(max_size=40), st.sampled_from([GOOD, *LOG, *VIRSH.splitlines(), "{", "}"])), max_size=9)
)
def test_nothing_else_is_raised(lines: list[str]) -> None:
    with contextlib.suppress(SampleError):
        assert read_samples(lines)


@pytest.mark.parametrize("number", [10**400, -(10**400), 1e300, -1e300])
def test_a_number_that_is_too_long_is_not_written_out(number: float) -> None:
    with pytest.raises(SampleError, match=r"line 1: remaining is a number of 0 or more") as raised:
        read_samples([json.dumps({"total-time": 5, "ram": {"remaining": number}})])
    assert len(str(raised.value)) < 100


def test_numbers_of_numpy_are_taken_as_python_s() -> None:
    """What is a float or an int stays what it is; all else becomes one."""
    odd = Sample(np.float32(1), np.int64(2), 3, np.uint64(4), zero_pages=np.int8(5), throttle=np.int16(6))
    assert odd == Sample(1.0, 2, 3.0, 4.0, zero_pages=5, throttle=6)
    for name in ("time", "remaining", "total"):
        assert type(getattr(odd, name)) is float
    for name in ("iteration", "zero_pages", "throttle", "page_size"):
        assert type(getattr(odd, name)) is int
    for wrong in ({"time": None}, {"remaining": None}, {"iteration": None}, {"page_size": None}, {"throttle": None}):
        with pytest.raises(TypeError):
            Sample(**{"time": 1, "iteration": 1, "remaining": 1} | wrong)


def test_lines_are_lines() -> None:
    for wrong in ("{}", 5, [5], None):
        with pytest.raises(TypeError):
            read_samples(wrong)


# --- the model ---------------------------------------------------------------------------------------------------


TRUE = Model(hot=60 * MIB, tau=0.8, cold=9 * MIB)


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_a_model_is_found_again(noise: float) -> None:
    rng = np.random.default_rng(5)
    periods = np.geomspace(0.2, 12, 12)
    sizes = np.array([TRUE.dirtied(each) for each in periods]) * (1 + noise * rng.standard_normal(12))
    best = fit(periods, sizes, 1 << 30)[0]
    for period in (0.1, 0.5, 3, 20):
        assert best.dirtied(period) == pytest.approx(TRUE.dirtied(period), rel=0.1 + 4 * noise)


def test_an_outlier_says_little() -> None:
    periods = np.geomspace(0.2, 12, 12)
    sizes = np.array([TRUE.dirtied(each) for each in periods])
    sizes[5] *= 6
    best = fit(periods, sizes, 1 << 30)[0]
    assert best.dirtied(2) == pytest.approx(TRUE.dirtied(2), rel=0.15)


def test_one_period_leaves_it_open_how_it_grows() -> None:
    models = fit(np.array([4.0]), np.array([8e6]), 1e9)
    assert len(models) == 3
    for model in models:
        assert model.dirtied(4) == pytest.approx(8e6, rel=0.01)
    halves = [model.dirtied(2) for model in models]
    assert min(halves) == pytest.approx(4e6)
    assert max(halves) == pytest.approx(8e6, rel=0.01)


@given(
    st.lists(st.tuples(st.floats(0.001, 1000), st.floats(1, 1e12)), min_size=1, max_size=30),
    st.floats(1e6, 1e12),
)
def test_a_fit_is_never_negative(made, total: float) -> None:
    periods, sizes = (np.array(each) for each in zip(*made, strict=True))
    for model in fit(periods, sizes, total):
        assert model.hot >= 0
        assert model.cold >= 0
        assert model.tau > 0
        assert model.error >= 0.05


def test_polled_samples_are_put_back_to_their_harvest() -> None:
    """A pass that began between two polls: what it had sent by then is counted in."""
    samples = [Sample(0, 1, 1e9, 1e9, bandwidth=1e8), Sample(9.9, 1, 1e7, 1e9, bandwidth=1e8)]
    samples += [Sample(10.3, 2, 1.7e8, 1e9, bandwidth=1e8)]  # it began at 10.0 s, with 200 MB
    periods, sizes = measured(samples)
    assert periods.tolist() == [pytest.approx(10.0)]
    assert sizes.tolist() == [pytest.approx(2e8)]


# --- forecasts from samples -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["own", "qemu"])
@pytest.mark.parametrize("known", [3, 4])
def test_a_forecast_of_what_a_model_does(structure: str, known: int) -> None:
    """A migration of a guest that is as the model has it, forecast from its first passes."""
    terms = Terms(structure, tick=0.05 if structure == "qemu" else 0.0)
    guest = ModelWrites(TRUE, 1 << 30, 4096)
    done = run(guest, Course(terms, 120e6, 0.4))
    assert done.converges
    first = Sample(0, 1, 1 << 30, 1 << 30, 0, 120e6)
    samples = [first, *(each for each in done.samples if each.iteration <= known)]
    found = from_samples(samples, max_downtime=0.4, terms=terms)
    assert found.converges
    assert found.total_time.value == pytest.approx(done.total_time, rel=0.1)
    if known > 3:  # two passes leave it open how little the last one has
        assert found.downtime.value == pytest.approx(done.downtime, rel=0.2)
    assert found.total_time.low <= done.total_time * 1.01
    assert found.total_time.high >= done.total_time * 0.99


def test_one_that_does_not_converge() -> None:
    guest = ModelWrites(TRUE, 1 << 30, 4096)
    done = run(guest, Course(OWN, 30e6, 0.3))
    assert not done.converges
    found = from_samples([Sample(0, 1, 1 << 30, 1 << 30, 0, 30e6), *done.samples[:4]], max_downtime=0.3, terms=OWN)
    assert not found.converges
    assert found.needs.bandwidth > 30e6
    again = from_samples(
        [Sample(0, 1, 1 << 30, 1 << 30, 0, 30e6), *done.samples[:4]],
        bandwidth=found.needs.bandwidth, max_downtime=0.3, terms=OWN,
    )  # fmt: skip
    assert again.converges
    assert "hot set of" in found.why


def test_a_guest_without_a_hot_set_is_said_to_have_none() -> None:
    done = run(ModelWrites(Model(hot=0.0, tau=1.0, cold=5e6), 1 << 30, 4096), Course(OWN, 30e6, 0.1))
    found = from_samples(done.samples[:6], max_downtime=0.1, terms=OWN)
    assert "has no hot set, and dirties" in found.why
    assert "0.0 MiB" not in found.why


def test_a_bandwidth_that_varies_widens_the_interval() -> None:
    def samples(rates) -> list[Sample]:
        return [Sample(10 * i, i + 1, 1e9 * 0.3**i, 1e9, bandwidth=rate, source="qemu") for i, rate in enumerate(rates)]

    still, wild = from_samples(samples([1e8] * 4)), from_samples(samples([1e8, 5e7, 1.6e8, 1e8]))
    assert wild.total_time.high - wild.total_time.low > still.total_time.high - still.total_time.low


@pytest.mark.parametrize("number", ["9" * 5000, "[" * 100_000])
def test_json_that_python_takes_for_too_much_is_refused(number: str) -> None:
    with pytest.raises(SampleError, match="line 1: the JSON can't be read"):
        read_samples(['{"status": ' + number + "}"])


def test_bandwidths_of_what_was_transferred() -> None:
    """Where samples have no bandwidth it is what they sent, however slow; what sent nothing says nothing."""
    sent = [0.0, 0.5, 0.5, 1.25, 1.75]
    samples = [Sample(i, i + 1, 1e3, 1e3, transferred=each) for i, each in enumerate(sent)]
    speed, spread = predict._speed(samples)
    assert speed == 0.5
    assert spread == 0.0
    speed, spread = predict._speed([*samples, Sample(5, 6, 1e3, 1e3, transferred=3.0)])  # 0.5, 0.75, 0.5 and 1.25
    assert speed == 0.625
    assert spread == pytest.approx(1.48 * 0.125 / 0.625)
    assert predict._speed([replace(samples[0], bandwidth=each) for each in (1.0, 100.0, 1e4)])[1] == 0.5


def test_what_samples_do_not_say() -> None:
    one = Sample(1, 1, 1e8, 1e9, bandwidth=1e8)
    with pytest.raises(SampleError, match="no sample is of a second pass"):
        from_samples([one])
    with pytest.raises(SampleError, match="no sample says what the bandwidth is"):
        from_samples([Sample(1, 1, 1e8), Sample(2, 2, 1e7)])
    with pytest.raises(SampleError, match="there are no samples"):
        from_samples([])
    assert from_samples([Sample(1, 1, 1e8), Sample(2, 2, 1e7)], bandwidth=1e8).converges


def test_samples_of_a_replay_say_what_the_replay_says() -> None:
    """The same guest by its trace and by the samples of its passes."""
    rng = np.random.default_rng(2)
    words = np.zeros((300, 1024), dtype=np.uint64)
    for row in words:
        pages = rng.integers(0, 1024 * 64, 40)
        np.bitwise_or.at(row, pages >> 6, np.uint64(1) << (pages & 63).astype(np.uint64))
    words[:, :20] |= rng.integers(0, 1 << 63, (300, 20), dtype=np.uint64)
    writes = MemoryWrites(words, 0.1)
    for terms in (OWN, QEMU):
        whole = replay(writes, bandwidth=40e6, max_downtime=0.3, terms=terms, needs=False, starts=1)
        done = run(TraceWrites(writes), Course(terms, 40e6, 0.3, horizon=30))
        samples = [Sample(0, 1, 1 << 28, 1 << 28, 0, 40e6), *done.samples[:2]]
        found = from_samples(samples, bandwidth=40e6, max_downtime=0.3, terms=terms, needs=False)
        assert found.converges == whole.converges
        assert found.total_time.value == pytest.approx(whole.total_time.value, rel=0.15)


def test_a_guest_of_a_model_has_whole_pages_and_one_at_least() -> None:
    """And no more of them are dirty than it has."""
    model = Model(hot=0.0, tau=1.0, cold=4096.0)
    for total, pages in ((1.0, 1), (4096.0, 1), (6143.0, 1), (6145.0, 2), (40960.0, 10)):
        guest = ModelWrites(model, total, 4096)
        assert (guest.npages, guest.everything(0, 9)) == (pages, Dirty(pages, 0.0))
        assert [guest.written(5, 5 + each).pages for each in (0.0, 0.5, 99.0)] == [0.0, 0.5, pages]
    none = ModelWrites(Model(hot=0.0, tau=1.0, cold=0.0), 40960.0, 4096)
    assert none.written(0, 9, Dirty(3.0, 1.0)) == Dirty(3.0, 0.0)


def test_of_what_is_left_over_the_hot_part_is_written_again() -> None:
    """Half of what it writes within `tau` is hot; of that, half is written again by then."""
    guest = ModelWrites(Model(hot=8 * 4096.0, tau=2.0, cold=4 * 4096.0), 1e9, 4096)
    fresh = 8 * (1 - np.exp(-0.5)) + 4
    assert guest.written(3, 4, Dirty(10.0, 0.0)).pages == pytest.approx(fresh + 10 * (1 - (1 - np.exp(-0.5)) / 2))


@pytest.mark.parametrize("scale", [1e-200, 1e-170, 1e-100])
def test_periods_of_nothing_are_fitted_too(scale: float) -> None:
    """Their squares are no numbers any more, or hardly."""
    for model in fit(np.array([1.0, 2.0, 4.0]) * scale, np.array([1e3, 2e3, 3e3]), 1e9):
        assert 0 <= model.hot <= 1e9
        assert 0 <= model.cold < float("inf")


def test_what_is_left_over_counts_once() -> None:
    guest = ModelWrites(Model(hot=40960, tau=0.001, cold=0.0), 1 << 20, 4096)
    assert guest.written(0, 1, Dirty(10.0, 0.0)).pages == pytest.approx(10)
    cold = ModelWrites(Model(hot=0.0, tau=1, cold=4096), 1 << 20, 4096)
    assert cold.written(0, 1, Dirty(10.0, 0.0)).pages == pytest.approx(11)


@pytest.mark.parametrize("limit", [1e6, 1e200, 1e308])
def test_a_limit_that_is_never_reached(limit: float) -> None:
    """Bandwidth times limit is more than a float holds, and so less than nothing is left to be sent."""
    each = {"total": 1 << 30, "remaining": 1 << 24, "mbps": 100.0, "page-size": 4096}
    lines = [json.dumps({"total-time": 1000 * i, "ram": each | {"dirty-sync-count": i}}) for i in range(1, 6)]
    found = from_samples(read_samples(lines), max_downtime=limit)
    assert found.converges
    with pytest.raises(ValueError, match="start_ns is 0 to 0x7fffffffffffffff"):
        replay(
            MemoryWrites(np.zeros((2, 1), dtype=np.uint64), interval=1), bandwidth=1, max_downtime=1, start_ns=10**400
        )


@pytest.fixture
def few_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a simulation pauses the guest without end, and not hang with it."""
    real, left = simulate._Migration._last, iter(range(30_000))

    def last(*given, **more):
        if next(left, None) is None:
            pytest.fail("the guest is paused again and again")
        return real(*given, **more)

    monkeypatch.setattr(simulate._Migration, "_last", last)


@pytest.mark.usefixtures("few_pauses")
@pytest.mark.parametrize("limit", [0.001, 0.3])
def test_what_is_left_and_never_fits_ends(limit: float) -> None:
    """The rest seems to fit, the pause takes too long, and the guest goes on."""
    begun = Sample(1.0, 1, 1e6, 1e9, transferred=1e8, bandwidth=1e8)
    found = from_samples([begun, Sample(2.0, 2, 1.5, 1e9, transferred=2e8, bandwidth=1e8)], max_downtime=limit)
    assert found.converges
    assert found.total_time.value < 10


@pytest.mark.usefixtures("few_pauses")
def test_a_pause_that_always_takes_too_long_is_given_up() -> None:
    class Lurking(ModelWrites):
        """Has a page dirty at each harvest, and many more when the guest has been paused."""

        begun = -1.0

        def written(self, begin: float, end: float, left: Dirty | None = None) -> Dirty:
            again, self.begun = begin == self.begun, begin
            return Dirty(1e6 if again else 1.0, 0.0)

    guest = Lurking(Model(hot=1.0, tau=1.0, cold=1.0), 64 * MIB, 4096)
    course = Course(Terms("own", pause=0.01, pass_time=0.01), bandwidth=MIB, max_downtime=0.1, max_iterations=5)
    done = run(guest, course)
    assert not done.converges
    assert done.passes > 5


def test_what_was_sent_before_says_nothing_of_the_bandwidth() -> None:
    """A pass of 8 ms doesn't fit into 1 ms, however much had been sent before it."""
    guest = ModelWrites(Model(hot=8e5, tau=1e-4, cold=0.0), 64 * MIB, 4096)
    begun = Begun(time=2.0, number=2, remaining=8e5, since=0.0, transferred=2e8, history=((2, 8e5),))
    course = Course(Terms("own", pass_time=1e-3), bandwidth=1e8, max_downtime=1e-3, max_iterations=5, begun=begun)
    done = run(guest, course)
    assert not done.converges
    assert all(sample.bandwidth <= 1e8 for sample in done.samples)


# --- each field of each form, and the models that small samples allow ------------------------------------------


def small_report() -> dict[str, Any]:
    made = Report(4096, 1 << 20, 0.3, setup_time=0.5)
    made.passes = [
        Pass(1, 256, 1 << 20, normal=256, transferred=1 << 20, time=1.0),
        Pass(2, 64, 1 << 18, dirty_rate=1 << 18, collect_time=0.25, transferred=1 << 18, time=0.5),
    ]
    return made.to_dict()


FORMS = {"query-migrate": json.loads(qmp(1500, 2, 1 << 26)), "cloud-hypervisor": CLOUD, "hwdbm": small_report()}


def read(lines: list[str], usual: list[Sample]) -> list[str]:
    """Return in which fields the samples of some lines aren't the usual ones, the same on each machine."""
    try:
        found = read_samples(lines)
    except SampleError as error:
        return [f"  {error}"]
    if len(found) != len(usual):
        return [f"  {len(found)} samples"]
    values = [(each.name, getattr(a, each.name), getattr(b, each.name)) for a, b in zip(found, usual, strict=True)
              for each in fields(Sample)]  # fmt: skip
    told = [
        f"{name}={is_:.9g}" if isinstance(is_, float) else f"{name}={is_!r}" for name, is_, was in values if is_ != was
    ]
    return [f"  {', '.join(told)}"] if told else []


def answers() -> Iterator[str]:
    for form, record in FORMS.items():
        usual = list(read_samples([json.dumps(record)]))
        yield from (form, *(f"  {each}" for each in usual))
        for where, what, each in changed(record):
            if found := read([json.dumps(each)], usual):  # most fields say nothing here
                yield from (f"{form} {where} {what}", *found)
    for at, line in enumerate(VIRSH.splitlines()):
        name, _, value = line.partition(":")
        for new in ("", f"{name}: 0 {value.split()[-1]}", f"{name}: 7 GiB", f"{name}: x", f"{name}: -1 ms"):
            lines = VIRSH.splitlines()
            lines[at] = new
            if found := read(lines, list(read_samples(VIRSH.splitlines()))):
                yield from (f"domjobinfo {name!r} {new!r}", *found)
    for word in " ".join(LOG).split():
        if "=" in word:
            name = word.partition("=")[0]
            lines = [" ".join(each for each in line.split() if not each.startswith(name)) for line in LOG]
            yield from (f"log without {name}", *read(lines, list(read_samples(LOG))))


def test_what_each_field_says_was_looked_at() -> None:
    as_seen("forecasts/fields.txt", "\n".join(answers()) + "\n")


SERIES = {  # none that several models fit equally well
    "two": ([0.5], [1e6]), "alike": ([1.0, 1.019], [1e6, 1.1e6]), "apart": ([1.0, 1.03], [1e6, 1.1e6]),
    "growing": ([0.1, 0.5, 2.0], [1e6, 4e6, 1.2e7]), "steady": ([0.1, 0.2, 0.4], [1e6, 2.1e6, 3.9e6]),
}  # fmt: skip


@pytest.mark.parametrize(("size", "least"), [(0.0, 1.0), (0.5, 1.0), (1.0, 1.0), (1.5, 1.5), (100.0, 100.0)])
def test_a_guest_that_writes_nothing_writes_a_byte(size: float, least: float) -> None:
    best = fit(np.array([0.5, 0.25]), np.array([size, size]), float(1 << 30))[0]
    assert best.dirtied(0.5) == pytest.approx(least, rel=0.05)


def test_models_of_small_samples_were_looked_at() -> None:
    lines = []
    for name, (periods, sizes) in SERIES.items():
        for total in (1 << 20, 1 << 30):
            lines.append(f"{name} of {total}")
            for model in fit(np.array(periods), np.array(sizes), float(total)):
                parts = (f"{each.name}={getattr(model, each.name):.7g}" for each in fields(model))
                lines.append(f"  {', '.join(parts)}; {model.dirtied(0.3):.7g}, {model.dirtied(1e4):.7g}")
    polls = [(1.0, 2, 9e6), (1.2, 2, 5e6), (1.5, 3, 4e6), (1.5, 4, 4e6), (2.0, 7, 1e6)]
    for bandwidth in (None, 2e7, 0.0, 1e9):
        samples = [Sample(time, number, left, float(1 << 30), bandwidth=bandwidth) for time, number, left in polls]
        periods, sizes = measured(samples)
        lines.append(f"{bandwidth}: {np.round(periods, 9).tolist()}, {np.round(sizes, 3).tolist()}")
    as_seen("forecasts/models.txt", "\n".join(lines) + "\n")


@pytest.mark.parametrize(
    "name", ["time", "remaining", "total", "transferred", "bandwidth", "dirty_rate", "downtime_limit"]
)
@pytest.mark.parametrize("number", [-5e-324, -0.5, -1.0, float("nan"), float("-inf")])
def test_what_is_less_than_nothing_is_no_sample(name: str, number: float) -> None:
    made = Sample(1, 2, 29, bandwidth=100)
    with pytest.raises(ValueError, match=f"{name} is a number of 0 or more"):
        replace(made, **{name: number})
    assert getattr(replace(made, **{name: 0.0}), name) == 0


# --- at the least, and at the edges -------------------------------------------------------------------------------

BARE: dict[str, tuple[list[str], list[Sample]]] = {
    "query-migrate": (
        [
            '{"total-time": 500, "ram": {"remaining": 9}}',
            qmp(1000, 3, 8),
            '{"total-time": 1500, "ram": {"remaining": 7}}',
        ],
        [
            Sample(0.5, 1, 9, source="qemu"),
            Sample(1, 3, 8, 1 << 30, 5, 1e8, 409600, 7, source="qemu"),
            Sample(1.5, 3, 7, source="qemu"),
        ],
    ),
    "libvirt": (
        [
            '{"time_elapsed": 500, "memory_remaining": 9}',
            ('{"time_elapsed": 1000, "memory_iteration": 3, "memory_remaining": 8, '
             '"memory_page_size": 512, "memory_dirty_rate": 2, "auto_converge_throttle": 30}'),
            '{"time_elapsed": 1500, "memory_remaining": 7, "memory_bps": 1}',
        ],
        [
            Sample(0.5, 1, 9, source="libvirt"),
            Sample(1, 3, 8, dirty_rate=1024, page_size=512, throttle=30, source="libvirt"),
            Sample(1.5, 3, 7, bandwidth=1, source="libvirt"),
        ],
    ),
    "domjobinfo": (
        [
            "Job type: Unbounded", "Time elapsed: 500 ms", "Memory remaining: 9", "",
            "Job type: Unbounded", "Time elapsed: 1000 ms", "Memory remaining: 8 B", "Iteration: 3",
            "Dirty rate: 2 pages/s", "Page size: 512 bytes", "Auto converge throttle: 30", "Constant pages: 0", "",
            "Job type: Unbounded", "Time elapsed: 1500 ms", "Memory remaining: 7 bytes", "Dirty rate: 0 pages/s",
        ],
        [
            Sample(0.5, 1, 9, source="libvirt"),
            Sample(1, 3, 8, dirty_rate=1024, zero_pages=0, page_size=512, throttle=30, source="libvirt"),
            Sample(1.5, 3, 7, dirty_rate=0, source="libvirt"),
        ],
    ),
    "cloud-hypervisor": (
        [
            '{"timestamp_begin_ms": 500, "timestamp_current_ms": 500}',
            ('{"timestamp_begin_ms": 500, "timestamp_current_ms": 500, '
             '"memory_transmission_info": {"memory_iteration": 0, "memory_bytes_remaining_iteration": 9}}'),
            ('{"timestamp_begin_ms": 500, "timestamp_snapshot_ms": 2000, "timestamp_current_ms": 9000, '
             '"memory_transmission_info": {"memory_iteration": 4, "memory_bytes_remaining_iteration": 8}}'),
        ],
        [Sample(0, 1, 9, source="cloud-hypervisor"), Sample(1.5, 5, 8, source="cloud-hypervisor")],
    ),
    "a log from its second iteration on": (
        [
            "iter=1 curr=4MiB total=64MiB bw=2.00MiB/s transfer=2.00s elapsed=1.50s",
            "iter=2 curr=2MiB total=66MiB bw=0.00MiB/s transfer=1.00s elapsed=4.00s",
            "iter=3 curr=1MiB total=67MiB bw=8.00MiB/s transfer=0.50s elapsed=5.00s",
            "iter=4 curr=3MiB total=70MiB bw=5.00MiB/s transfer=0.50s elapsed=6.00s",
        ],
        [
            Sample(0, 2, 4 * MIB, None, 60 * MIB, 2 * MIB, source="cloud-hypervisor"),
            Sample(3, 3, 2 * MIB, None, 64 * MIB, 2 * MIB, source="cloud-hypervisor"),
            Sample(4.5, 4, 1 * MIB, None, 66 * MIB, 2 * MIB, source="cloud-hypervisor"),
            Sample(5.5, 5, 3 * MIB, None, 67 * MIB, 8 * MIB, source="cloud-hypervisor"),
        ],
    ),
    "a log whose first iteration had no time": (
        [
            "iter=0 curr=4MiB total=4MiB bw=0.00MiB/s transfer=0.00s elapsed=0.00s",
            "iter=1 curr=2MiB total=6MiB bw=3.00MiB/s transfer=0.25s elapsed=0.50s",
        ],
        [
            Sample(0, 1, 4 * MIB, 4 * MIB, 0, 0, source="cloud-hypervisor"),
            Sample(0.25, 2, 2 * MIB, 4 * MIB, 4 * MIB, 3 * MIB, source="cloud-hypervisor"),
        ],
    ),
    "passes": (
        [
            '{"pass": 1, "remaining": 64}',
            '{"pass": 2, "remaining": 32, "time": 500, "bandwidth": 0.5, "duplicate": 3}',
            ('{"pass": 4, "remaining": 16, "dirty-rate": 8, "collect-time": 250, "transferred": 7, "bandwidth": 1, '
             '"cpu-throttle-percentage": 20, "duplicate": 2}'),
            '{"pass": 5, "remaining": 8}',
        ],
        [
            Sample(0, 1, 64, 64, 0, None, None, 0, source="hwdbm"),
            Sample(0, 2, 32, 64, 0, None, None, 0, source="hwdbm"),
            Sample(0.75, 4, 16, 64, 0, None, 8, 3, throttle=20, source="hwdbm"),
            Sample(0.75, 5, 8, 64, 7, 1, None, 5, source="hwdbm"),
        ],
    ),
    "passes without the first": (
        ['{"pass": 2, "remaining": 32, "dirty-rate": 4}'], [Sample(0, 2, 32, None, 0, None, 4, 0, source="hwdbm")]
    ),
    "a report": (
        ['{"setup-time": 250, "ram": {"total": 99, "page-size": 512}, "passes": [{"pass": 1, "remaining": 64}]}'],
        [Sample(0.25, 1, 64, 99, 0, None, None, 0, 512, source="hwdbm")],
    ),
    "a report of the least": (
        ['{"ram": {}, "passes": [{"pass": 1, "remaining": 64, "dirty-rate": 5}]}'],
        [Sample(0, 1, 64, 64, 0, None, None, 0, source="hwdbm")],
    ),
    "what is just a number": (
        [json.dumps({"total-time": 0, "ram": {"remaining": 0, "transferred": 10**30 - 1, "mbps": 8e-6}})],
        [Sample(0, 1, 0, transferred=1e30, bandwidth=1.0, source="qemu")],
    ),
    "what texts round": (
        [qmp(1, 1, 1.01 * (1 << 30)), qmp(1, 1, 5)],
        [
            Sample(0.001, 1, each, 1 << 30, 5, 1e8, 409600, 7, source="qemu")
            for each in (1.01 * (1 << 30), 5)
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", BARE)
def test_what_the_least_of_each_form_says(form: str) -> None:
    """What isn't there is taken from the sample before it, or isn't known."""
    lines, expected = BARE[form]
    assert read_samples(lines) == expected


LONG = "".join(chr(ord("a") + at % 26) for at in range(99))


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (LONG, f"lines is an iterable of lines, not '{LONG[:56]}..."),
        ([12345 << 70], "lines are of type str, not a number beyond 64 bits"),
        ([GOOD, LONG], f"line 2: '{LONG[:56]}... is no JSON object, and nothing else known"),
        ([f'["{LONG}"]'], f'line 1: a sample is a JSON object, not ["{LONG[:55]}...'),
        ([f'{{"ram": "{LONG}"}}'], f'line 1: ram is an object, not "{LONG[:56]}...'),
        (
            [f'{{"total-time": "{LONG}", "ram": {{"remaining": 5}}}}'],
            f'line 1: total-time is a number, not "{LONG[:56]}...',
        ),
        (
            ["Job type: x", "Time elapsed: 5 ms", f"Memory remaining: {LONG}"],
            f"line 1: Memory remaining is a number with a unit, not '{LONG[:56]}...",
        ),
        (
            [json.dumps(dict.fromkeys("abcdefg", 1))],
            "line 1: an object with the keys a, b, c, d, e, f, g is no sample of a migration that is known here",
        ),
        ([qmp(5, 1, 10**30)], "line 1: remaining is a number of 0 or more, not a number of 31 digits"),
        ([qmp(5, 1, -(10**30) + 1)], f"line 1: remaining is a number of 0 or more, not -{'9' * 30}"),
        ([qmp(5, 1, 1e30)], "line 1: remaining is a number of 0 or more, not 1e+30"),
        ([" " * (1 << 20)], "there are no samples of a migration in that"),
        ([" " * ((1 << 20) + 1)], "line 1: it has 1048577 characters, and 1048576 is the most"),
        (["", "{", '"a": 1,', '"b" 2', "}"], "line 4: no JSON object: Expecting ':' delimiter"),
        (["", '{"a": "b'], "line 2: the JSON object is cut short"),
        (["", '{"a": }'], "line 2: no JSON object: Expecting value"),
        ([GOOD, "[", "5,"], "line 2: the JSON object is cut short at line 3"),
        (['{"pass": null, "remaining": 5}'], "line 1: pass is a number, not null"),
        (
            ['{"pass": 3, "remaining": 5}', '{"pass": 4, "remaining": 5}', '{"pass": 4, "remaining": 5}'],
            "line 3: pass 4 comes after pass 4",
        ),
        (['{"ram": {}, "passes": [5]}'], "line 1: passes is a list of objects"),
        (
            [json.dumps(CLOUD | {"timestamp_snapshot_ms": 1_699_999_999_999})],
            "line 1: the snapshot's time 1699999999999 ms is before the begin, 1700000000000",
        ),
        (['{"timestamp_begin_ms": 5, "memory_transmission_info": {}}'], "line 1: there is no timestamp_snapshot_ms"),
        (
            [qmp(5, 1, 1.0101 * (1 << 30))],
            "line 1: 1084586616 bytes are said to remain of 1073741824 bytes of memory",
        ),
    ],
)  # fmt: skip
def test_what_is_refused_is_said_in_few_words(lines: Any, said: str) -> None:
    with pytest.raises((SampleError, TypeError)) as raised:
        read_samples(lines)
    assert str(raised.value) == said
