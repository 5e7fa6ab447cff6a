"""Analyses against sets of pages; and what one of a large guest holds in memory."""

import json
import subprocess
import sys

import numpy as np
import pytest
from effort import EFFORT
from hypothesis import given, settings
from hypothesis import strategies as st
from seen import as_seen

from hwdbm.bitmap import word_count
from hwdbm.memslot import Memslot
from hwdbm.trace import analyse, analysis


class Arrays:
    """A trace in arrays."""

    def __init__(self, slots, page_size, times, words, zeros=None, initial_zeros=None):
        self.slots, self.page_size, self.times = tuple(slots), page_size, np.array(times, dtype=np.int64)
        self._words, self._zeros, self.initial_zeros = words, zeros, initial_zeros

    def words(self, lo, hi, first=0, stop=None):
        return self._words[lo:hi, first:stop].copy()

    def zeros(self, lo, hi, first=0, stop=None):
        return None if self._zeros is None else self._zeros[lo:hi, first:stop].copy()


def packed(bits: list[np.ndarray]) -> np.ndarray:
    """Return the words of the bits of each slot, ``(intervals, npages)``."""
    parts = []
    for each in bits:
        padded = np.zeros((len(each), 64 * word_count(each.shape[1])), dtype=bool)
        padded[:, : each.shape[1]] = each
        parts.append(np.packbits(padded, axis=1, bitorder="little").view(np.uint64))
    return np.concatenate(parts, axis=1)


@settings(max_examples=60 * EFFORT)
@given(
    sizes=st.lists(st.sampled_from([1, 63, 64, 65, 511, 512, 513, 1600]), min_size=1, max_size=3),
    page_size=st.sampled_from([4096, 16384, 65536]),
    intervals=st.integers(0, 37),
    density=st.sampled_from([0.002, 0.1, 0.9]),
    part=st.sampled_from([8, 16, 1 << 17]),
    band=st.sampled_from([1, 64, 1 << 22]),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    seed=st.integers(0, 999),
)
def test_it_counts_what_sets_of_pages_say(sizes, page_size, intervals, density, part, band, shape, seed):
    rng, base, slots = np.random.default_rng(seed), 0, []
    for number, npages in enumerate(sizes):
        slots.append(Memslot(number, 0, base, npages, 0))
        base += npages + 5
    bits = [rng.random((intervals, npages)) < density for npages in sizes]
    zero = [each & (rng.random(each.shape) < 0.5) for each in bits]
    times = np.concatenate(([0], np.cumsum(rng.integers(1, 10**9, intervals))))
    writes = Arrays(slots, page_size, times, packed(bits), packed(zero), packed([each[:1] for each in zero])[0]
                    if intervals else None)  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(analysis, "_PART", part)
        patch.setattr(analysis, "_BAND", band)
        found = analyse(writes, rows=shape[0], cells=shape[1])
    flat = np.concatenate(bits, axis=1)
    assert found.pages.tolist() == flat.sum(axis=1).tolist()
    assert found.touched.tolist() == [flat[: row + 1].any(axis=0).sum() for row in range(intervals)]
    assert [each.intervals for each in found.periods] == [1 << k for k in range(intervals.bit_length())]
    for each in found.periods:
        n, count = each.intervals, intervals // each.intervals
        truth = [int(flat[i * n : (i + 1) * n].any(axis=0).sum()) for i in range(count)]
        assert each.windows.tolist() == truth
        assert (each.low, each.high) == (min(truth), max(truth))
        assert each.pages == pytest.approx(np.mean(truth))
        assert each.seconds == pytest.approx(times[count * n] / count / 1e9)
    wanted = [size for size in (4096, 65536, 2 << 20) if size >= page_size]
    assert [each.page_size for each in found.amounts] == wanted
    for each in found.amounts:
        factor, pages, parts = each.page_size // page_size, 0, 0
        for slot_bits in bits:
            for at in range(0, slot_bits.shape[1], factor):
                run = slot_bits[:, at : at + factor]
                pages += run.any(axis=1).sum()
                parts += run.any(axis=1).sum() * run.shape[1]
        assert (each.pages, each.nbytes) == (pages, parts * page_size)
    assert found.zeros == (sum(each.sum() for each in zero) if intervals else None)
    check_map(found, bits, shape)
    assert found.to_dict()["written"] == flat.sum()


def check_map(found, bits, shape):
    intervals, npages = len(bits[0]), [each.shape[1] for each in bits]
    nwords = sum(map(word_count, npages))
    assert found.map.shape[0] <= shape[0]
    assert found.map.shape[1] <= shape[1]
    tall, wide = -(-max(intervals, 1) // shape[0]), -(-nwords // shape[1])
    per_word, room = [], []
    for each in bits:
        for at in range(0, each.shape[1], 64):
            per_word.append(each[:, at : at + 64].sum(axis=1))
            room.append(min(64, each.shape[1] - at))
    for row in range(found.map.shape[0]):
        for cell in range(found.map.shape[1]):
            rows, words = slice(row * tall, (row + 1) * tall), slice(cell * wide, (cell + 1) * wide)
            count = sum(each[rows].sum() for each in per_word[words])
            whole = len(range(*rows.indices(intervals))) * sum(room[words])
            assert found.map[row, cell] == pytest.approx(count / whole)


def test_a_working_set_is_of_about_a_second():
    words = np.ones((64, 1), dtype=np.uint64)
    found = analyse(Arrays([Memslot(0, 0, 0, 64, 0)], 4096, np.arange(65) * 10**8, words))
    assert (found.working.intervals, found.working.seconds) == (8, pytest.approx(0.8))


@pytest.mark.parametrize(
    ("count", "milliseconds", "intervals"),
    [(3, 300, 1), (4, 300, 1), (7, 300, 1), (8, 300, 2), (16, 300, 4), (64, 300, 4), (5, 2000, 1), (1, 10, 1)],
)
def test_a_working_set_has_four_windows_where_there_are_so_many(count, milliseconds, intervals):
    times = np.arange(count + 1) * milliseconds * 10**6
    found = analyse(Arrays([Memslot(0, 0, 0, 64, 0)], 4096, times, np.ones((count, 1), dtype=np.uint64)))
    assert found.working.intervals == intervals
    assert found.working.seconds == intervals * milliseconds / 1000


def test_what_an_analysis_says_was_looked_at():
    """As JSON: of two slots, one of them of a page, by intervals of thirds of a second; and of nothing at all."""
    slots, rng = (Memslot(0, 0, 0x100, 130, 0), Memslot(1, 0, 0x800, 1, 0)), np.random.default_rng(3)
    bits = [rng.random((7, npages)) < 0.3 for npages in (130, 1)]
    bits[1][:3] = True
    times = np.arange(8) * 333_333_333
    some = Arrays(slots, 16384, times, packed(bits), packed([each & False for each in bits]), packed(bits)[0])
    none = Arrays(slots, 4096, [0], np.zeros((0, 4), dtype=np.uint64))
    found = [analyse(some, rows=4, cells=3), analyse(some, rows=1, cells=1), analyse(none)]
    as_seen("asked/analysis.json", "\n".join(json.dumps(each.to_dict(), indent=1) for each in found) + "\n")
    assert found[0].map_times.tolist() == (times[[0, 2, 4, 6, 7]] / 1e9).tolist()
    assert found[0].map[:2, 1].tolist() == [
        bits[0][:2, 128:].sum() / 6 + 2 / 6,
        bits[0][2:4, 128:].sum() / 6 + bits[1][2:4].sum() / 6,
    ]


@pytest.mark.slow
def test_nothing_grows_with_the_intervals():
    """A guest of 64 GiB by 64 and by 256 intervals, 128 and 512 MiB of words: a few chunks at a time."""
    script = (
        "import resource, numpy as np\n"
        "from hwdbm.memslot import Memslot\n"
        "from hwdbm.trace import analyse\n"
        "class Writes:\n"
        "    page_size, slots, initial_zeros = 4096, (Memslot(0, 0, 0, 1 << 24, 0),), None\n"
        "    times = np.arange(INTERVALS + 1)\n"
        "    def words(self, lo, hi, first=0, stop=None): return np.ones((hi - lo, stop - first), dtype=np.uint64)\n"
        "    def zeros(self, *_): return None\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "found = analyse(Writes())\n"
        "assert found.touched[-1] == 1 << 18\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    grown = []
    for intervals in (64, 256):
        done = subprocess.run([sys.executable, "-P", "-c", script.replace("INTERVALS", str(intervals))], check=True,
                              capture_output=True, timeout=120)  # fmt: skip
        grown.append(int(done.stdout) // 1024)
    assert grown[1] < grown[0] + 16, grown  # MiB
    assert grown[1] < 300, grown
