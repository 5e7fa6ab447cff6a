"""Forecasts of a few guests, as they were looked at: what is said of each, the passes, and what other rules do.

How good forecasts are is judged elsewhere; here a change of the model shows, whatever it changes.
"""

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from seen import as_seen

from hwdbm.forecast import QEMU, Forecast, MemoryWrites, Sample, Terms, compare_rules, from_samples, replay
from hwdbm.forecast.sweep import passes

INTERVALS, WORDS = 80, 128
COSTLY = Terms("own", page_overhead=31.0, zero_bytes=9.0, pause=0.05, verify_gib=0.5)


def guest(hot: int, cold: int, seed: int, *, every: int = 1, zeros: bool = False, width: int = WORDS) -> MemoryWrites:
    """Return a guest, by default of 32 MiB, that writes pages of a hot set, and others, in intervals of 0.1 s."""
    random, words = np.random.default_rng(seed), np.zeros((INTERVALS, width), dtype=np.uint64)
    for number in range(0, INTERVALS, every):
        pages = np.concatenate((random.integers(0, hot, hot), random.integers(0, width * 64, cold)))
        np.bitwise_or.at(words[number], pages >> 6, np.uint64(1) << (pages & 63).astype(np.uint64))
    empty = words & words << np.uint64(1) if zeros else None
    return MemoryWrites(words, 0.1, width * 64 - 7, zeros=empty, initial_zeros=None if empty is None else empty[0])


GUESTS = {
    "hot": guest(300, 2, 1),
    "spread": guest(20, 90, 2, zeros=True),
    "bursts": guest(900, 10, 3, every=25),
    "small": guest(20, 2, 4, width=3, zeros=True),  # less than says what the bandwidth is
}
PLANS: dict[str, dict[str, Any]] = {
    "fast": {"bandwidth": 60e6},
    "slow": {"bandwidth": 9e6, "terms": COSTLY},
    "qemu": {"bandwidth": 12e6, "terms": QEMU, "max_downtime": 0.2, "start_ns": 1_230_000_000, "starts": 3},
    "throttled": {"bandwidth": 5e6, "terms": QEMU, "auto_converge": True, "max_downtime": 0.05},
    "half": {"bandwidth": 15e6, "throttle": 50.0, "max_downtime": 0.03, "timeout": 4.0},
    "pausing": {"bandwidth": 4e6, "on_limit": "pause", "max_iterations": 3, "max_downtime": 0.01},
}


def plain(value: Any) -> str:
    """Return a value as text, its floats in six digits."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        return " ".join(f"{name}={plain(each)}" for name, each in value.items() if each not in (None, ""))
    return "(" + " ".join(map(plain, value)) + ")" if isinstance(value, list | tuple) else str(value)


def said(found: Forecast) -> Iterator[str]:
    yield f"  {plain(asdict(replace(found, why='')))}"
    yield f"  {found.why}"


def noisy(samples: tuple[Sample, ...], rate: float) -> list[Sample]:
    """Return samples as they are polled: with a bandwidth each, which isn't the same."""
    factors = 1 + 0.1 * np.sin(np.arange(len(samples)))
    return [replace(each, bandwidth=rate * factor) for each, factor in zip(samples, factors.tolist(), strict=True)]


@pytest.mark.parametrize("name", GUESTS)
@pytest.mark.alike(2)
def test_forecasts_are_the_ones_that_were_looked_at(name):
    lines = []
    for plan, how in PLANS.items():
        lines += [f"{plan}, by its trace", *said(replay(GUESTS[name], **how))]
        done = passes(GUESTS[name], **{key: value for key, value in how.items() if key not in {"starts", "start_ns"}})
        lines += [f"  {plain(asdict(each))}" for each in done[:6]]
        more = {key: value for key, value in how.items() if key in {"terms", "timeout", "on_limit", "auto_converge"}}
        for count in (3, 5):
            if len(done) > count:
                some = noisy(done[:count], how["bandwidth"])
                lines += [f"{plan}, by {count} samples", *said(from_samples(some, **more))]
    for bandwidth in (8e6, 30e6):
        lines += [f"rules at {bandwidth:g}"]
        lines += [f"  {plain(asdict(each))}" for each in compare_rules(GUESTS[name], bandwidth=bandwidth, timeout=60.0)]
    as_seen(f"forecasts/{name}.txt", "\n".join(lines) + "\n")
