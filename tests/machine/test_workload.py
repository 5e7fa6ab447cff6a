"""Workloads: the same on every run, whatever the batches; and of the shape that their names promise."""

import base64
import json
import tracemalloc
import zlib
from math import nextafter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwdbm import DirtyBitmap
from hwdbm.machine import WORKLOADS, Bursty, HotSet, Idle, Replay, Sequential, Uniform, Zipf, parse
from hwdbm.machine.workload import from_dict

PAGE = 4096
BITMAPS = (DirtyBitmap.from_pages([0, 2], 3), DirtyBitmap(3), DirtyBitmap.from_pages([1], 3))
ALL = [Sequential(), Uniform(), HotSet(), Zipf(), Zipf(exponent=1.0), Bursty(), Idle(), Replay(bitmaps=BITMAPS)]


def test_each_has_a_name():
    assert set(WORKLOADS) == {"sequential", "uniform", "hot", "zipf", "bursty", "idle", "replay"}


@pytest.mark.parametrize("workload", ALL, ids=lambda each: each.name)
@given(position=st.integers(0, 2**40), cut=st.integers(0, 200), npages=st.integers(3, 5000))
@pytest.mark.alike(2)
def test_batches_dont_matter(workload, position, cut, npages):
    whole = workload.offsets(position, 200, npages * PAGE)
    parts = [workload.offsets(position, cut, npages * PAGE), workload.offsets(position + cut, 200 - cut, npages * PAGE)]
    assert (whole == np.concatenate(parts)).all()
    assert (whole >= 0).all()
    assert (whole < npages * PAGE).all()
    assert not (whole & 7).any()


@pytest.mark.parametrize("workload", ALL, ids=lambda each: each.name)
def test_it_comes_back_from_json(workload):
    again = from_dict(json.loads(json.dumps(workload.to_dict())))
    assert again == workload
    assert (again.offsets(7, 100, 64 * PAGE) == workload.offsets(7, 100, 64 * PAGE)).all()


def test_values_never_repeat():
    values = Uniform(seed=9).values(0, 1 << 18)
    assert np.unique(values).size == values.size
    assert (Uniform(seed=9).values(100, 5) == values[100:105]).all()


def test_seeds_differ():
    one, two = (Uniform(seed=seed).offsets(0, 1000, 1 << 30) for seed in (1, 2))
    assert np.count_nonzero(one == two) < 10


def shares(workload, npages=1000, stores=200_000):
    return np.bincount(workload.offsets(0, stores, npages * PAGE) // PAGE, minlength=npages) / stores


def test_sequential_takes_every_page_in_turn():
    pages = Sequential(stores_per_page=2).offsets(0, 12, 5 * PAGE) // PAGE
    assert pages.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 0, 0]


def test_uniform_is():
    found = shares(Uniform(seed=3))
    assert found.min() > 0.0005
    assert found.max() < 0.0015


def test_hot_pages_get_their_weight():
    found = np.sort(shares(HotSet(seed=3, share=0.05, weight=0.8)))[::-1]
    assert found[:50].sum() == pytest.approx(0.81, abs=0.01)  # and their part of what goes anywhere


@pytest.mark.parametrize(("share", "hot"), [(0.0, 1), (0.009, 1), (0.019, 1), (0.02, 2), (0.999, 99), (1.0, 100)])
def test_a_share_is_of_whole_pages_of_which_one_is_always_hot(share, hot):
    found = shares(HotSet(seed=3, share=share, weight=1.0), npages=100, stores=5000)
    assert np.count_nonzero(found) == hot


def test_zipf_falls_by_rank():
    found = np.sort(shares(Zipf(seed=3, exponent=0.99)))[::-1]
    assert found[0] > 0.08
    assert found[0] / found[9] == pytest.approx(7, rel=0.4)
    assert np.count_nonzero(found) > 990


@pytest.mark.parametrize(("npages", "exponent"), [(64, 0.0), (64, 0.99), (3, 1.5), (1 << 20, 1.01)])
def test_zipf_has_no_rank_beyond_the_last(npages, exponent, monkeypatch):
    """Where the greatest number under 1 would round to a rank that there isn't."""
    monkeypatch.setattr(Zipf, "_uniform", lambda *_: np.array([1 - 1e-10, nextafter(1, 0)]))
    before, last = Zipf(exponent=exponent).offsets(0, 2, npages * PAGE)
    assert last // PAGE == before // PAGE


def test_rates():
    assert Uniform().quota(3.0) is None
    assert Uniform(rate=1000).quota(1.5) == 1500
    assert Idle().quota(1e6) == 0
    bursty = Bursty(rate=100, on=1.0, off=3.0)
    assert [bursty.quota(t) for t in (0.5, 1.0, 2.0, 4.0, 4.5)] == [50, 100, 100, 100, 150]


def test_a_replay_goes_by_the_interval():
    replay = Replay(bitmaps=BITMAPS, interval=2.0)
    assert [replay.quota(t) for t in (0, 1, 2, 3.9, 4, 6, 7, 12)] == [0, 1, 2, 2, 2, 3, 4, 6]
    assert (replay.offsets(0, 7, 3 * PAGE) // PAGE).tolist() == [0, 2, 1, 0, 2, 1, 0]
    with pytest.raises(ValueError, match="page 2 was recorded, and the guest has 2"):
        replay.offsets(0, 1, 2 * PAGE)
    with pytest.raises(ValueError, match="nothing to replay"):
        Replay(bitmaps=[DirtyBitmap(9)])
    with pytest.raises(ValueError, match=r"interval is a number of 1e-09 to 1e\+09, not 0"):
        Replay(bitmaps=BITMAPS, interval=0)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("uniform", Uniform(seed=5)),
        ("zipf,exponent=1,rate=2M", Zipf(seed=5, exponent=1, rate=2e6)),
        ("hot, share=0.5, seed=1, rate=10k", HotSet(seed=1, share=0.5, rate=1e4)),
    ],
)
def test_parse(text, want):
    assert parse(text, seed=5) == want


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("unform", "no workload 'unform': there are sequential"),
        ("uniform,rate", "'rate' is not of the form"),
        ("uniform,speed=3", "workload uniform has no option 'speed': it has seed, rate$"),
        ("hot,name=3", "says name twice"),
        ("hot,_set=3", "workload hot has no option '_set'"),
        ("replay,_ends=3", "has no option '_ends': it has seed, rate, bitmaps, interval"),
        ("hot,share=1,share=1", "says share twice"),
        ("hot,=1", "'=1' is not of the form"),
        ("hot,share=nan", "is like 5, 0.5 or 5M, not 'nan'"),
        ("hot,share=1e999", "is like 5, 0.5 or 5M, not '1e999'"),
        ("sequential,stores_per_page=inf", "is like 5, 0.5 or 5M, not 'inf'"),
        ("uniform,rate=-1", "rate is a number of 0 to 1e\\+15, not -1"),
        ("uniform,rate=x", "is like 5, 0.5 or 5M, not "),
    ],
)
def test_parse_says_what_is_wrong(text, why):
    with pytest.raises(ValueError, match=why):
        parse(text)


@pytest.mark.parametrize(
    ("npages", "raw"),
    [
        (1 << 40, b""),  # more than there may be
        (64, zlib.compress(bytes(1 << 20))[:-200] + b"x"),  # a bomb, if it were unpacked whole; cut, and damaged
        (64, b"no zlib"),
    ],
)
def test_a_recording_from_anywhere(npages, raw):
    packed = [[npages, base64.b64encode(raw).decode()]]
    with pytest.raises(ValueError, match=r"at most|recorded bitmap|nothing to replay"):
        from_dict({"name": "replay", "bitmaps": packed})


def test_a_recording_is_unpacked_no_further_than_its_pages():
    packed = [[64, base64.b64encode(zlib.compress(b"\1" + bytes(1 << 28))).decode()]]
    tracemalloc.start()
    try:
        assert from_dict({"name": "replay", "bitmaps": packed}).bitmaps[0].pages().tolist() == [0]
        assert tracemalloc.get_traced_memory()[1] < 1 << 22
    finally:
        tracemalloc.stop()


def test_memory_has_fewer_than_2_to_the_32_pages() -> None:
    """The hash that chooses a page has so many values."""
    chosen = Uniform().offsets(0, 4, (1 << 32) * 4096 - 1)
    assert (chosen < (1 << 32) * 4096).all()
    with pytest.raises(ValueError, match="size is 4096 to"):
        Uniform().offsets(0, 4, (1 << 32) * 4096)
    assert (Uniform().pages(np.arange(4, dtype=np.uint64), (1 << 32) - 1) < (1 << 32) - 1).all()
    with pytest.raises(ValueError, match="npages is 1 to"):
        Uniform().pages(np.arange(4, dtype=np.uint64), 1 << 32)


@pytest.mark.parametrize("npages", [1, 63, 64, 65, 511, 512, 513])
def test_a_recording_of_any_size_comes_back(npages: int) -> None:
    full = DirtyBitmap(npages)
    full.fill()
    replay = Replay(bitmaps=[full, DirtyBitmap.from_pages([npages - 1], npages)])
    assert from_dict(json.loads(json.dumps(replay.to_dict()))) == replay
