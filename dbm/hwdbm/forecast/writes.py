"""What a guest writes, as a replay asks for it: from a trace, interval by interval, without a loop over pages."""

from bisect import bisect_right
from copy import copy
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from hwdbm import check
from hwdbm.errors import shown

Words = NDArray[np.uint64]

_KEPT = 64 << 20  # bytes of a trace that are kept in memory; of a larger one, a sample of its words
_BLOCK = 16  # intervals whose union is kept
_LEAST = 1024  # words of a sample
_WORDS = 1 << 18  # of an interval that are kept at most: each pass that is simulated goes over all of them
_BATCH = 32 << 20  # bytes of a trace that are read together
_STEADY = 1.25  # quarters of a trace whose means differ by less than that are of one kind
_RECENT = 16  # what part of a trace its last intervals are that tell what the guest is at
_ALIKE = 0.5  # moments that are like the end by so much of what the one is that is most like it
_SLOWEST = 1e-6  # rate at which a trace is written again
_OFTEN = 0.05  # part of an interval's pages that count as written once, at least


@runtime_checkable
class Writes(Protocol):
    """A record of which pages a guest wrote, interval by interval; `hwdbm.trace.open_trace` returns one.

    Attributes
    ----------
    page_size : int
        Bytes.
    npages : int
        Pages of the guest, in all slots.
    times : (n + 1,) int64 array
        Nanoseconds: where each of the n intervals begins, and where the last one ends. The first is 0.
    initial_zeros : (nwords,) uint64 array or None
        The pages that were zero at the start.
    """

    @property
    def page_size(self) -> int: ...  # noqa: D102
    @property
    def npages(self) -> int: ...  # noqa: D102
    @property
    def times(self) -> NDArray[np.int64]: ...  # noqa: D102
    @property
    def initial_zeros(self) -> Words | None: ...  # noqa: D102

    def words(self, lo: int, hi: int) -> Words:
        """Return the pages written in the intervals from `lo` to before `hi`: a row of words for each."""
        ...

    def zeros(self, lo: int, hi: int) -> Words | None:
        """Return which of the pages of `words` were zero when they were looked at; None where that is unknown."""
        ...


class MemoryWrites:
    """Writes that are held in arrays.

    Parameters
    ----------
    words : (n, nwords) uint64 array
        The pages written in each of n intervals, 64 to a word.
    interval : float
        Seconds of an interval.
    npages : int, optional
        Pages of the guest; by default as many as the words have bits.
    page_size : int
        Bytes.
    zeros : (n, nwords) uint64 array, optional
        Which of them were zero when they were looked at.
    initial_zeros : (nwords,) uint64 array, optional
        The pages that were zero at the start.

    Examples
    --------
    >>> import numpy as np
    >>> MemoryWrites(np.zeros((3, 2), dtype=np.uint64), interval=0.5).times.tolist()
    [0, 500000000, 1000000000, 1500000000]
    """

    def __init__(
        self,
        words: Words,
        interval: float,
        npages: int | None = None,
        page_size: int = 4096,
        zeros: Words | None = None,
        initial_zeros: Words | None = None,
    ) -> None:
        self._words = _rows(words, "words", None)
        n, nwords = self._words.shape
        step = check.real(interval, "interval", 1e-9, 1e9)
        self.npages = nwords * 64 if npages is None else check.integer(npages, "npages", 1, nwords * 64)
        self.page_size = check.integer(page_size, "page_size", 1)
        self.times = np.round(np.arange(n + 1) * (step * 1e9)).astype(np.int64)
        self._zeros = None if zeros is None else _rows(zeros, "zeros", self._words.shape)
        self.initial_zeros = None if initial_zeros is None else _rows(initial_zeros, "initial_zeros", (nwords,))

    def words(self, lo: int, hi: int) -> Words:
        """Return the pages written in the intervals from `lo` to before `hi`."""
        lo, hi = self._span(lo, hi)
        return self._words[lo:hi]

    def zeros(self, lo: int, hi: int) -> Words | None:
        """Return which of them were zero."""
        lo, hi = self._span(lo, hi)
        return None if self._zeros is None else self._zeros[lo:hi]

    def _span(self, lo: int, hi: int) -> tuple[int, int]:
        lo = check.integer(lo, "lo", 0, len(self._words))
        return lo, check.integer(hi, "hi", lo, len(self._words))


def _rows(value: Any, name: str, shape: tuple[int, ...] | None) -> Words:
    if not isinstance(value, np.ndarray) or value.dtype != np.uint64:
        raise TypeError(f"{name} is an array of uint64, not {shown(value)}")
    if not value.size or (value.ndim != 2 if shape is None else value.shape != shape):
        raise ValueError(f"{name} has the shape {shape or '(intervals, words)'}, not {value.shape}")
    return value.copy()


@dataclass(frozen=True, slots=True)
class Dirty:
    """Pages to be sent.

    `pages` and `zeros` are how many they are expected to be: of an interval that was cut in two, a part is. `words`
    has each page that may be one of them, and `zero_words` those of zeros, if it is known which they are.
    """

    pages: float
    zeros: float
    words: Words | None = None
    zero_words: Words | None = None

    def by_word(self, first: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return how many pages each word is expected to have, and of zeros, in their order from a word on."""
        assert self.words is not None  # noqa: S101 - it was looked at
        pages = _counts(self.words, first)
        pages *= self.pages / max(pages.sum(), 1.0)
        zeros = np.zeros_like(pages) if self.zero_words is None else _counts(self.zero_words, first)
        zeros *= self.zeros / max(zeros.sum(), 1.0)
        return pages, np.minimum(zeros, pages)

    def beyond(self, pages: float, zeros: float, first: int, words: int) -> tuple["Dirty", int]:
        """Return what is left, `pages` and `zeros`, when so many words from one on were sent; and the next word."""
        assert self.words is not None  # noqa: S101 - as above
        end, size = first + words, self.words.size
        left = [None if each is None else each.copy() for each in (self.words, self.zero_words)]
        for each in left:
            if each is not None:
                each[first:end] = 0
                each[: max(end - size, 0)] = 0
        return Dirty(pages, zeros, left[0], left[1]), end % size

    def part(self, share: float) -> "Dirty":
        """Return a part of them, where it isn't known which of the pages they are."""
        return Dirty(self.pages * share, self.zeros * share, self.words, self.zero_words)


def _counts(words: Words, first: int) -> NDArray[np.float64]:
    return np.bitwise_count(np.concatenate((words[first:], words[:first]))).astype(np.float64)


class GuestWrites(Protocol):
    """What a simulated migration asks of the guest; times are in seconds of the guest's own running."""

    @property
    def page_size(self) -> int: ...  # noqa: D102
    @property
    def npages(self) -> int: ...  # noqa: D102
    @property
    def period(self) -> float:
        """Seconds after which what it writes is known to come again."""
        ...

    def everything(self, begin: float, end: float) -> Dirty:
        """Return all of its pages, as they are when they are sent between two times."""
        ...

    def written(self, begin: float, end: float, left: Dirty | None = None) -> Dirty:
        """Return the pages written between two times, and what was left over."""
        ...


class TraceWrites:
    """A guest that writes what a trace says, and its steady part again and again.

    A window of time begins and ends within intervals. Of an interval of which a part ``f`` lies in it, a page of the
    interval counts with the chance that it was written in that part: ``f``, if the page isn't written in the whole
    intervals that lie in the window too, where it counts once in any case. In a window without a whole interval, pages
    that the next interval has again come oftener: of the pages of an interval of which a share ``q`` isn't in the next
    one, ``(1 - q**f) / (1 - q)`` are written in a part ``f``, which is right for pages that are each written at random
    times.

    Of a trace of more than 64 MiB, or of a guest of more than 64 GiB in pages of 4 KiB, a sample of its words is kept.
    They are spread over all of memory, and stand for the others.

    Parameters
    ----------
    writes : Writes
        The trace.

    Attributes
    ----------
    again : int
        The interval that follows the last one: from there on the trace is steady.
    """

    def __init__(self, writes: Writes) -> None:
        self.page_size = check.integer(writes.page_size, "page_size", 1)
        self.npages = check.integer(writes.npages, "npages", 1)
        self._times = np.asarray(writes.times, dtype=np.int64)
        self._edges = _seconds(self._times)
        self._n = len(self._edges) - 1
        self._nwords, self._scale, self._picked = _sample(int(writes.words(0, 1).shape[1]), self._n)
        self._rows, self._zero_rows = self._load(writes)
        self._blocks = np.bitwise_or.reduceat(self._rows, np.arange(0, self._n, _BLOCK), axis=0)
        self._zero_blocks = None if self._zero_rows is None else self._blocks_of(self._zero_rows)
        initial = writes.initial_zeros
        self._initial = None if initial is None else np.array(initial[self._picked], dtype=np.uint64)
        self._counts = np.bitwise_count(self._rows).sum(axis=1, dtype=np.int64)
        self.again = self._steady()
        self._whole = self._or(self.again, self._n)
        self._zero_pages: dict[int, Words] = {}  # at the beginning of intervals that were asked for

    def like(self, rate: float, npages: int) -> "TraceWrites":
        """Return a guest that writes the same at another rate, and may have more pages, which it never writes.

        They share what was read of the trace.

        Raises
        ------
        ValueError
            If the trace has more pages, or an interval has no time at that rate, or one that no int64 has.
        """
        check.integer(npages, "npages", self.npages)
        times = self._times / check.real(rate, "rate", _SLOWEST)
        if times[-1] >= 1 << 62:
            raise ValueError(f"at a rate of {rate:g} the trace takes {times[-1]:g} ns, more than 2^62")
        other = copy(self)
        other._edges, other.npages = _seconds(times.astype(np.int64)), npages
        return other

    # --- reading ------------------------------------------------------------------------------------------------

    def _load(self, writes: Writes) -> tuple[Words, Words | None]:
        """Return the words that are kept, and which of their pages were zero; the trace is read once, in parts."""
        rows = np.empty((self._n, self._nwords), dtype=np.uint64)
        zero_rows: Words | None = None
        step = max(int(_BATCH / (self._nwords * self._scale * 8)), 1)
        for lo in range(0, self._n, step):
            hi = min(lo + step, self._n)
            rows[lo:hi] = writes.words(lo, hi)[:, self._picked]
            zeros = writes.zeros(lo, hi)
            if zeros is not None:
                zero_rows = np.empty_like(rows) if zero_rows is None else zero_rows
                zero_rows[lo:hi] = zeros[:, self._picked]
        return rows, zero_rows

    def _steady(self) -> int:
        """Return the first of the quarters from which on all of them write alike; the third one at the latest."""
        rates = self._counts / np.diff(self._edges)
        quarter = self._n // 4
        if not quarter:
            return 0
        means = [float(rates[i * quarter : (i + 1) * quarter].mean()) for i in range(4)]
        for first in (0, 1):
            if all(max(each, means[3]) <= _STEADY * min(each, means[3]) for each in means[first:]):
                return first * quarter
        return 2 * quarter

    def _blocks_of(self, zero_rows: Words) -> Words:
        """Return which pages of each block were zero when they were last written in it."""
        zero = np.zeros_like(self._blocks)
        for at in range(min(_BLOCK, self._n)):
            rows = self._rows[at::_BLOCK]
            _replace(zero[: len(rows)], rows, zero_rows[at::_BLOCK])
        return zero

    def _or(self, lo: int, hi: int) -> Words:
        """Return the union of some intervals."""
        union = np.zeros(self._nwords, dtype=np.uint64)
        for blocks, part in _parts(lo, hi):
            union |= np.bitwise_or.reduce((self._blocks if blocks else self._rows)[part], axis=0)
        return union

    # --- time ---------------------------------------------------------------------------------------------------

    @property
    def period(self) -> float:
        """Seconds of the steady part."""
        return self._edges[-1] - self._edges[self.again]

    @property
    def ends(self) -> float:
        """Seconds of the trace."""
        return self._edges[-1]

    def repeats(self, until: float) -> bool:
        """Return whether the trace ends before a time."""
        return until > self.ends

    def _locate(self, time: float) -> tuple[int, float]:
        """Return the interval of a time, counted on past the trace's end, and the part of it that is over."""
        laps = 0
        if time >= self._edges[-1]:
            over = time - self._edges[-1]
            laps = int(over // self.period) + 1
            time = self._edges[self.again] + over - (laps - 1) * self.period
        interval = min(bisect_right(self._edges, time) - 1, self._n - 1)
        part = (time - self._edges[interval]) / (self._edges[interval + 1] - self._edges[interval])
        return interval + laps * (self._n - self.again), min(part, 1.0)

    def _real(self, interval: int) -> int:
        if interval < self._n:
            return interval
        return self.again + (interval - self.again) % (self._n - self.again)

    def _union(self, lo: int, hi: int) -> Words:
        """Return the union of intervals that are counted on past the end."""
        if hi - lo >= self._n - self.again and lo >= self.again:
            return self._whole
        union = np.zeros(self._nwords, dtype=np.uint64)
        if lo < self._n:
            union |= self._or(lo, min(hi, self._n))
            lo = min(hi, self._n)
        if lo < hi:
            if hi - lo >= self._n - self.again:
                return union | self._whole
            first, last = self._real(lo), self._real(hi - 1)
            if first <= last:
                union |= self._or(first, last + 1)
            else:
                union |= self._or(first, self._n)
                union |= self._or(self.again, last + 1)
        return union

    def moments(self, start: float | None, number: int) -> list[float]:
        """Return times to begin at: `number` of them, equally far apart, from `start` on.

        Without `start` it begins where the trace ends, so the times are those before which the guest did as it did
        before that, `number` of them or fewer. What it wrote in the last intervals is compared with what it wrote in
        as many before each time: of the pages of either, the part that it wrote in both, zeros in both or in neither.
        Of the times at which that is half as much as it ever is, or more, some are chosen, as far apart as they are.
        So a guest that does one thing and then another is met where it is, and one that always does the same anywhere.
        """
        if start is not None:
            return [start + i * self.period / number for i in range(number)]
        span = max(self._n // _RECENT, 1)
        if self._n < 2 * span:
            return [self.ends]
        written, zero = _unions(self._rows, span), None if self._zero_rows is None else _unions(self._zero_rows, span)
        both, either = written[-1] & written, written[-1] | written
        if zero is not None:
            both &= ~(zero[-1] ^ zero)
        agreed, of = (np.bitwise_count(each).sum(axis=1, dtype=np.int64)[:-span] for each in (both, either))
        alike = np.where(of > 0, agreed / np.maximum(of, 1), 1.0)
        times = np.array(self._edges[span : self._n - span + 1])
        if number == 1:
            return [float(times[alike.argmax()])]
        times = times[alike >= _ALIKE * alike.max()]
        some = np.unique(np.linspace(0, times.size - 1, number).round().astype(int))
        return [float(each) for each in times[some]]

    # --- what is asked for ----------------------------------------------------------------------------------------

    def written(self, begin: float, end: float, left: Dirty | None = None) -> Dirty:
        """Return the pages written between two times, and what was left over."""
        words, pages = fresh, fresh_pages = self._window(begin, end)
        if left is not None and left.words is not None and left.pages:
            # A page of both is one: it is there unless neither of its chances came true.
            weight, chance = left.pages / max(count(left.words), 1), pages / self._scale / max(count(words), 1)
            common = count(left.words & words)
            pages += weight * (count(left.words) - common + (1 - chance) * common)
            words = words | left.words
        zero = self._zeros(begin, end) if fresh_pages else None
        zero_words = np.zeros_like(fresh) if zero is None else zero & fresh
        zeros = fresh_pages * count(zero_words) / max(count(fresh), 1)
        if left is not None and left.zero_words is not None and left.zeros:
            over = left.zero_words & ~fresh  # what wasn't written since is what it was
            zeros += left.zeros * count(over) / max(count(left.zero_words), 1)
            zero_words |= over
        return Dirty(pages, min(zeros, pages), words, zero_words)

    def _window(self, begin: float, end: float) -> tuple[Words, float]:
        if end <= begin:
            return np.zeros(self._nwords, dtype=np.uint64), 0.0
        (first, over), (last, part) = self._locate(begin), self._locate(end)
        if first == last:
            row = self._rows[self._real(first)]
            return row.copy(), self._of_part(first, part - over) * count(row) * self._scale
        head, tail = self._rows[self._real(first)], self._rows[self._real(last)]
        if last - first == 1:
            a, b = self._of_part(first, 1 - over), self._of_part(last, part)
            whole = np.zeros(self._nwords, dtype=np.uint64)
        else:
            a, b = 1 - over, part
            whole = self._union(first + 1, last)
        only_head, only_tail = head & ~whole, tail & ~whole
        both = count(only_head & only_tail)
        pages = count(whole) + a * count(only_head) + b * count(only_tail) - a * b * both
        words = whole | head | (tail if b else np.uint64(0))
        return words, float(pages) * self._scale

    def _of_part(self, interval: int, part: float) -> float:
        """Return the share of an interval's pages that a part of it writes."""
        real = self._real(interval)
        pages = int(self._counts[real])
        if part >= 1 or not pages:
            return part
        other = self._real(interval + 1)
        common = count(self._rows[real] & self._rows[other]) if other != real else pages
        once = max(1 - common / pages, _OFTEN)
        return part if once > 0.999 else float((1 - once**part) / (1 - once))

    def _zeros(self, begin: float, end: float) -> Words | None:
        """Return the pages that were zero when they were last written between two times."""
        (lo, _), (last, part) = self._locate(begin), self._locate(end)
        hi, zero = last + (part > 0), np.zeros(self._nwords, dtype=np.uint64)
        while lo < hi:
            if lo >= self._n:  # what comes again is as it was the last time
                lo = max(lo, hi - (self._n - self.again))
            first = self._real(lo)
            some = min(hi - lo, self._n - first)
            if self._fold_zeros(first, first + some, zero) is None:
                return None
            lo += some
        return zero

    def _fold_zeros(self, lo: int, hi: int, zero: Words) -> Words | None:
        if self._zero_rows is None or self._zero_blocks is None:
            return None
        for blocks, part in _parts(lo, hi):
            written, zeros = (self._blocks, self._zero_blocks) if blocks else (self._rows, self._zero_rows)
            for row, its_zeros in zip(written[part], zeros[part], strict=True):
                _replace(zero, row, its_zeros)
        return zero

    def everything(self, begin: float, end: float) -> Dirty:
        """Return all pages. A page of zeros is one that was so half-way."""
        # Slots begin at words of their own, so which bits are pages isn't known: any that is set is one.
        every = np.full(self._nwords, ~np.uint64(0))
        zero = None if self._initial is None else self._zeros_at(self._initial, (begin + end) / 2)
        return Dirty(float(self.npages), 0.0 if zero is None else count(zero) * self._scale, every, zero)

    def _zeros_at(self, initial: Words, time: float) -> Words:
        interval, _ = self._locate(time)
        interval = min(interval, self._n)
        if interval not in self._zero_pages:
            zero = np.array(initial, dtype=np.uint64)
            if self._fold_zeros(0, interval, zero) is None:
                zero &= ~self._or(0, interval)
            self._zero_pages[interval] = zero
        return self._zero_pages[interval]


def _seconds(edges: NDArray[np.int64]) -> list[float]:
    """Return where the intervals of a trace begin, and where the last one ends."""
    if edges.ndim != 1 or edges.size < 2:
        raise ValueError("a trace has an interval or more, and this one has none")
    (wrong,) = (np.diff(edges) <= 0).nonzero()
    if wrong.size:
        at = int(wrong[0])
        raise ValueError(f"interval {at} of the trace ends at {edges[at + 1]} ns, and begins at {edges[at]} ns")
    if edges[0] != 0:
        raise ValueError(f"the trace begins at {edges[0]} ns, and not at 0")
    seconds = edges / 1e9
    (short,) = (np.diff(seconds) <= 0).nonzero()
    if short.size:  # of more than 100 days a float doesn't tell single nanoseconds apart
        at = int(short[0])
        raise ValueError(
            f"interval {at} of the trace is too short for its time, from {edges[at]} to {edges[at + 1]} ns"
        )
    return list(seconds.tolist())


def _sample(nwords: int, intervals: int) -> tuple[int, float, NDArray[np.int64] | slice]:
    """Return how many words of each interval are kept, for how many each stands, and which they are."""
    most = min(max(_KEPT // (intervals * 8), _LEAST), _WORDS)
    if nwords <= most:
        return nwords, 1.0, slice(None)
    # One at random of each part of memory, so that no pattern of the guest's is in step with them.
    within = np.random.default_rng(0).random(most)
    picked = np.unique(((np.arange(most) + within) * (nwords / most)).astype(np.int64))
    return picked.size, nwords / picked.size, picked


def _parts(lo: int, hi: int) -> list[tuple[bool, slice]]:
    """Return what some intervals consist of, in order: rows and whole blocks of them, which of both, and where."""
    first, last = -(-lo // _BLOCK), hi // _BLOCK
    if first >= last:
        return [(False, slice(lo, hi))]
    return [(False, slice(lo, first * _BLOCK)), (True, slice(first, last)), (False, slice(last * _BLOCK, hi))]


def _replace(zero: Words, written: Words, zeros: Words) -> None:
    """Have the pages that were written be zero or not as they are now; in place."""
    zero |= written
    zero ^= written
    zero |= zeros


def start_of(start_ns: int, now: bool) -> float | None:
    """Return where in a trace a migration begins, in seconds; None where it ends."""
    start = check.integer(start_ns, "start_ns", 0, (1 << 63) - 1)
    if not check.flag(now, "now"):
        return start / 1e9
    if start:
        raise ValueError(f"start_ns {start}: a migration that begins now begins where the trace ends")
    return None


def _unions(rows: Words, width: int) -> Words:
    """Return the union of each `width` rows that follow each other: the first of rows 0 to `width` - 1."""
    done = 1
    while done < width:
        step = min(done, width - done)
        rows = rows[:-step] | rows[step:]
        done += step
    return rows


def count(words: Words) -> int:
    """Return how many bits are set."""
    return int(np.bitwise_count(words).sum(dtype=np.int64))
