"""What a trace says was written, between any two times, page by page; a few numbers are reckoned by hand."""

import numpy as np
import pytest

from hwdbm.forecast import MemoryWrites, writes
from hwdbm.forecast.writes import Dirty, TraceWrites, _sample

STEP = 0.25  # seconds of an interval
PAGES = 192


def packed(flags: np.ndarray) -> np.ndarray:
    return np.packbits(flags, axis=-1, bitorder="little").view(np.uint64)


def pages_of(words: np.ndarray) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist())


class Slow:
    """What `TraceWrites` says, with a loop over pages."""

    def __init__(self, written: np.ndarray, zero: np.ndarray, again: int) -> None:
        self.written, self.zero, self.again = written, zero, again

    def real(self, number: int) -> int:
        n = len(self.written)
        return number if number < n else self.again + (number - self.again) % (n - self.again)

    def row(self, number: int) -> set[int]:
        return set(np.flatnonzero(self.written[self.real(number)]).tolist())

    def share(self, number: int, part: float) -> float:
        """Return the share of an interval's pages that a part writes: few are written again in the next one."""
        row = self.row(number)
        once = max(1 - len(row & self.row(number + 1)) / max(len(row), 1), 0.05)
        return part if once == 1 else (1 - once**part) / (1 - once)

    def chances(self, begin: float, end: float) -> dict[int, float]:
        """Return the chance with which each page was written; those with none are left out."""
        first, last = int(begin // STEP), int(end // STEP)
        a, b = 1 - begin / STEP % 1, end / STEP % 1
        whole: set[int] = set().union(*(self.row(each) for each in range(first + 1, last)))
        if first == last:
            part = self.share(first, (end - begin) / STEP)
            return dict.fromkeys(self.row(first), part) if part else {}
        if last - first == 1:
            a, b = self.share(first, a), self.share(last, b)
        found = dict.fromkeys(whole, 1.0)
        for page in (self.row(first) | (self.row(last) if b else set())) - whole:
            none = (1 - a * (page in self.row(first))) * (1 - b * (page in self.row(last)))
            found[page] = 1 - none
        return found

    def zeros(self, begin: float, end: float) -> set[int]:
        """Return the pages that were zero when they were last written, in the intervals that the times touch."""
        zero: set[int] = set()
        for number in range(int(begin // STEP), int(-(-end // STEP))):
            zero = zero - self.row(number) | set(np.flatnonzero(self.zero[self.real(number)]).tolist())
        return zero


def guests(seed: int) -> tuple[TraceWrites, Slow]:
    """Return a guest of some intervals, in which pages come again, or don't."""
    random = np.random.default_rng(seed)
    n = int(random.choice([1, 2, 5, 18, 40]))
    often = random.choice([0.0, 0.02, 0.5, 1.0], PAGES, p=[0.5, 0.3, 0.1, 0.1])
    written = random.random((n, PAGES)) < often
    written[: n // 4] |= random.random((n // 4, PAGES)) < 0.5 * (seed % 2)  # of some, the steady part begins later
    zero = written & (random.random((n, PAGES)) < 0.4)
    guest = TraceWrites(MemoryWrites(packed(written), STEP, PAGES, 4096, packed(zero)))
    return guest, Slow(written, zero, guest.again)


@pytest.mark.parametrize("seed", range(12))
def test_what_is_written_between_two_times(seed: int) -> None:
    """With or without what was left over: each page counts as often as it is likely to be one of them."""
    guest, slow = guests(seed)
    random = np.random.default_rng(seed)
    for number in range(30):
        begin = float(random.integers(0, int(guest.ends * 32) + 1)) / 16  # twice the trace's length, and exact
        end = begin + (0.0, 1 / 64, 0.0625, 0.25, 0.375, 0.5, 2.0, 12.0)[number % 8]
        chances, zero = slow.chances(begin, end), slow.zeros(begin, end)
        found = guest.written(begin, end)
        assert found.words is not None
        assert found.zero_words is not None
        assert pages_of(found.words) == set(chances)
        fresh = sum(chances.values())
        assert found.pages == pytest.approx(fresh)
        its_zeros = zero & set(chances)
        assert found.zeros == pytest.approx(fresh * len(its_zeros) / max(len(chances), 1))
        assert pages_of(found.zero_words) == its_zeros

        flags = random.random((2, PAGES)) < 0.1
        rest, rest_zeros = packed(flags[0]), packed(flags[0] & flags[1])
        left = Dirty(float(flags[0].sum()) * 0.75, float((flags[0] & flags[1]).sum()) * 0.5, rest, rest_zeros)
        both = guest.written(begin, end, left)
        chance = fresh / max(len(chances), 1)  # of a page that was written between them, on average
        again = sum(0.75 * (1 - chance * (page in chances)) for page in pages_of(rest))
        assert both.pages == pytest.approx(fresh + again)
        assert both.words is not None
        assert both.zero_words is not None
        assert pages_of(both.words) == set(chances) | pages_of(rest)
        stays = pages_of(rest_zeros) - set(chances)
        assert both.zeros == pytest.approx(min(found.zeros + len(stays) * 0.5, both.pages))
        assert pages_of(both.zero_words) == its_zeros | stays


@pytest.mark.parametrize(
    ("counts", "again"),
    [
        ((8, 8, 8, 10), 0),  # a quarter more is alike
        ((10, 10, 10, 8), 0),
        ((8, 10, 8, 9), 0),
        ((7, 8, 8, 10), 3),  # and this is more than a quarter
        ((11, 10, 10, 8), 3),
        ((8, 8, 7, 10), 6),
        ((8, 7, 8, 10), 6),
        ((8, 8, 1, 8), 6),
        ((8, 8, 8, 1), 6),
    ],
)
@pytest.mark.parametrize("more", [0, 3])
def test_the_steady_part_begins_with_a_quarter(counts: tuple[int, ...], again: int, more: int) -> None:
    """From it on all of them write about as much a second as the last one, however long the intervals are."""
    lengths = [1, 3, 2] * 4 + [1] * more
    written = np.zeros((len(lengths), PAGES), dtype=np.bool_)
    for number, length in enumerate(lengths[:12]):
        written[number, : counts[number // 3] * length] = True
    writes = MemoryWrites(packed(written), STEP)
    writes.times = np.cumsum([0, *lengths]) * 10**9
    guest = TraceWrites(writes)
    assert guest.again == again
    assert guest.ends == sum(lengths)
    assert guest.period == sum(lengths[again:])
    assert guest.moments(1.5, 3) == [1.5, 1.5 + guest.period / 3, 1.5 + guest.period * 2 / 3]
    assert [guest.repeats(guest.ends + more) for more in (-0.5, 0.0, 0.5)] == [False, False, True]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_short_trace_is_steady_from_its_beginning(count: int) -> None:
    written = np.arange(PAGES) < np.arange(count)[:, None] * 9
    assert TraceWrites(MemoryWrites(packed(written), STEP)).again == 0


def test_all_pages_are_what_they_are_half_way() -> None:
    """All are zero at first, and one after the other isn't any more; after the trace none is zero again."""
    written = np.arange(PAGES) == np.arange(20)[:, None] * 7
    guest = TraceWrites(
        MemoryWrites(packed(written), STEP, PAGES - 5, 4096, packed(written & False), packed(~written[0] | True))
    )
    for begin, end, over in ((0.0, 0.0, 0), (0.0, 0.5, 1), (0.25, 2.0, 4), (1.0, 8.875, 19), (3.0, 99.0, 20)):
        for _ in range(2):
            found = guest.everything(begin, end)
            assert (found.pages, found.zeros) == (PAGES - 5, PAGES - over)
            assert found.words is not None
            assert found.zero_words is not None
            assert pages_of(found.words) == set(range(PAGES))
            assert pages_of(found.zero_words) == set(range(PAGES)) - set(range(0, over * 7, 7))


def test_words_in_the_order_in_which_they_are_sent() -> None:
    """From a word on and around: how many pages each is expected to have, of which some are zero."""
    words, zeros = packed(np.arange(PAGES) % 4 < np.arange(PAGES) // 64 + 1), packed(np.arange(PAGES) % 8 == 0)
    for first, order in enumerate(([16, 32, 48], [32, 48, 16], [48, 16, 32])):
        pages, its_zeros = Dirty(48.0, 6.0, words, zeros).by_word(first)
        assert pages.tolist() == [each / 2 for each in order]
        assert its_zeros.tolist() == [2.0] * 3
        pages, its_zeros = Dirty(12.0, 24.0, words, zeros).by_word(first)
        assert its_zeros.tolist() == [min(each / 8, 8.0) for each in order]  # no more than there are pages
        left, after = Dirty(96.0, 24.0, words, zeros).beyond(32.0, 8.0, first, 2)
        assert (left.pages, left.zeros, after) == (32.0, 8.0, (first + 2) % 3)
        assert left.words is not None
        assert left.zero_words is not None
        gone = {first, (first + 1) % 3}
        for now, before in ((left.words, words), (left.zero_words, zeros)):
            assert now.tolist() == [0 if at in gone else int(each) for at, each in enumerate(before)]
    one = Dirty(0.5, 0.25, packed(np.arange(PAGES) == 70), packed(np.arange(PAGES) == 70))
    assert [each.tolist() for each in one.by_word(1)] == [[0.5, 0, 0], [0.25, 0, 0]]
    assert [each.tolist() for each in Dirty(2.0, 0.0, words * np.uint64(0)).by_word(0)] == [[0, 0, 0], [0, 0, 0]]
    half = one.part(0.5)
    assert (half.pages, half.zeros, half.words, half.zero_words) == (0.25, 0.125, one.words, one.zero_words)


@pytest.mark.parametrize(("most", "rows"), [(1, 1), (47, 1), (48, 2), (100, 4), (1 << 20, 10)])
def test_no_more_than_so_many_bytes_of_a_trace_are_read_together(most: int, rows: int, monkeypatch) -> None:
    """But an interval, of 24 bytes here, is."""
    seen = []

    class Seen(MemoryWrites):
        def words(self, lo: int, hi: int) -> np.ndarray:
            seen.append(hi - lo)
            return super().words(lo, hi)

    monkeypatch.setattr(writes, "_BATCH", most)
    whole = np.arange(30, dtype=np.uint64).reshape(10, 3)
    guest = TraceWrites(Seen(whole, STEP, zeros=whole >> np.uint64(1)))
    assert max(seen) == rows
    assert guest.written(0, 10 * STEP).pages == np.bitwise_count(np.bitwise_or.reduce(whole, axis=0)).sum()
    assert guest.written(9 * STEP, 10 * STEP).zeros == np.bitwise_count((whole[-1] >> np.uint64(1)) & whole[-1]).sum()


@pytest.mark.parametrize(("intervals", "most"), [(1, 1 << 18), (64, 1 << 17), (1 << 20, 1024)])
def test_a_sample_has_a_word_of_each_part_of_memory(intervals: int, most: int) -> None:
    assert _sample(most, intervals) == (most, 1.0, slice(None))
    kept, scale, picked = _sample(most * 5, intervals)
    assert (kept, scale) == (most, 5.0)
    assert isinstance(picked, np.ndarray)
    assert (picked // 5 == np.arange(most)).all()
    assert 0.1 < (picked % 5 == 0).mean() < 0.3  # any of it
    kept, scale, _ = _sample(most + 1, intervals)
    assert kept * scale == most + 1
