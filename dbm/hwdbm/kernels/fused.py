"""Kernels in one pass over the descriptors, compiled by numba and cached on disk.

The inner loops take slices, never an index range: with indices numba checks for wrap-around, and LLVM no longer
vectorises (six times slower, measured). A group of 64 descriptors makes one bitmap word; descriptors are read once
to make words and, only where a word isn't zero, gone over again while they are still in the first-level cache.
"""

from functools import cache

import numpy as np
from numba import njit
from numpy.typing import NDArray

from hwdbm.kernels import Tally
from hwdbm.pte import Match, Update

__all__ = ["fill", "rewrite", "rewrite_runs", "rewrite_within", "scan"]

Array = NDArray[np.uint64]
Runs = NDArray[np.int64]

_ALL = (1 << 64) - 1
_SOME = 256  # words of a mask that are looked at together


def scan(pte: Array, runs: Runs, match: Match, out: Array) -> None:
    """Set in `out` the bit of each descriptor that matches."""
    _scan(pte, runs, np.uint64(match.mask), np.uint64(match.value), out)


def rewrite(pte: Array, runs: Runs, update: Update, out: Array, also: Array) -> Tally:
    """Apply `update`, and set in `out` and `also` the bit of each descriptor that it changed."""
    return Tally(*_rewrite(pte, runs, *_masks(update), out, also))


def rewrite_within(pte: Array, runs: Runs, update: Update, within: Array, out: Array, also: Array) -> Tally:
    """Apply `update` where the bit in `within` is set; otherwise as `rewrite`."""
    return Tally(*_rewrite_within(pte, runs, *_masks(update), within, out, also))


def fill(words: Array, ranges: Runs) -> None:
    """Set the bits of each row [start, stop) of `ranges`."""
    _fill(words, ranges)


def rewrite_runs(entries: Array, update: Update) -> Runs:
    """Apply `update` to any entries, and return the runs [start, stop) of those that it was applied to."""
    runs: Runs = _rewrite_runs(entries, *_masks(update))
    return runs


@cache
def _masks(update: Update) -> tuple[np.uint64, np.uint64, np.uint64, np.uint64]:
    where = update.where
    return (
        np.uint64(where.mask),
        np.uint64(where.value),
        np.uint64(~update.clears & _ALL),
        np.uint64(update.sets),
    )


@njit(inline="always")
def _hit(d, mask, value):  # type: ignore[no-untyped-def]
    return (d & mask) == value


@njit(inline="always")
def _changed(d, mask, value, keep, sets):  # type: ignore[no-untyped-def]
    return (d & keep) | sets if (d & mask) == value else d


@njit(inline="always")
def _popcount(word):  # type: ignore[no-untyped-def]
    word = word - ((word >> np.uint64(1)) & np.uint64(0x5555555555555555))
    pairs = np.uint64(0x3333333333333333)
    word = (word & pairs) + ((word >> np.uint64(2)) & pairs)
    word = (word + (word >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return (word * np.uint64(0x0101010101010101)) >> np.uint64(56)


@njit(nogil=True, cache=True)
def _word_at(pte, start, stop, mask, value):  # type: ignore[no-untyped-def]
    """Return the word of a last group that has fewer than 64 descriptors."""
    word = np.uint64(0)
    for j in range(stop - start):
        word |= np.uint64(_hit(pte[start + j], mask, value)) << np.uint64(j)
    return word


@njit(nogil=True, cache=True)
def _scan_run(pte, mask, value, out):  # type: ignore[no-untyped-def]
    full = pte.size // 64
    for w in range(full):
        word = np.uint64(0)
        for j in range(64):
            word |= np.uint64(_hit(pte[w * 64 + j], mask, value)) << np.uint64(j)
        if word:
            out[w] |= word
    if full * 64 < pte.size:
        out[full] |= _word_at(pte, full * 64, pte.size, mask, value)


@njit(inline="always")
def _rewrite_bits(pte, start, word, keep, sets):  # type: ignore[no-untyped-def]
    """Rewrite the few descriptors from `start` on whose bit is set in `word`."""
    while word:
        rest = word & (word - np.uint64(1))
        i = start + np.int64(_popcount((word ^ rest) - np.uint64(1)))
        pte[i] = (pte[i] & keep) | sets
        word = rest


@njit(nogil=True, cache=True)
def _rewrite_run(pte, mask, value, keep, sets, out, also):  # type: ignore[no-untyped-def]
    changed, words, full = np.uint64(0), 0, pte.size // 64
    # Four words at a time: at a density of 1 % whether one word is zero is anybody's guess, and a branch on it costs
    # more than the reading; whether four are is predicted well.
    four = np.empty(4, np.uint64)
    for quad in range(full // 4):
        some = np.uint64(0)
        for k in range(4):
            word = np.uint64(0)
            for j in range(64):
                word |= np.uint64(_hit(pte[quad * 256 + k * 64 + j], mask, value)) << np.uint64(j)
            four[k] = word
            some |= word
        if some:
            for k in range(4):
                word, w = four[k], quad * 4 + k
                out[w] |= word
                also[w] |= word
                hits = _popcount(word)
                changed += hits
                words += word != 0
                if hits > 4:
                    for j in range(64):
                        pte[w * 64 + j] = _changed(pte[w * 64 + j], mask, value, keep, sets)
                else:
                    _rewrite_bits(pte, w * 64, word, keep, sets)
    for w in range(full // 4 * 4, (pte.size + 63) // 64):
        start, stop = w * 64, min(w * 64 + 64, pte.size)
        word = _word_at(pte, start, stop, mask, value)
        if word:
            out[w] |= word
            also[w] |= word
            changed += _popcount(word)
            words += 1
            _rewrite_bits(pte, start, word, keep, sets)
    return changed, words


@njit(nogil=True, cache=True)
def _rewrite_listed(pte, mask, value, keep, sets, within, out, also, at):  # type: ignore[no-untyped-def]
    """Rewrite the descriptors whose bits are set, one by one; `at` has room for their positions."""
    words, read, n = 0, 0, 0
    for w in range(within.size):
        asked, size = within[w], min(64, pte.size - w * 64)
        if size < 64:  # bits beyond the last descriptor may be set
            asked &= (np.uint64(1) << np.uint64(size)) - np.uint64(1)
        if within[w]:
            read += size
        while asked:
            rest = asked & (asked - np.uint64(1))
            at[n] = np.uint64(w * 64) + _popcount((asked ^ rest) - np.uint64(1))
            n += 1
            asked = rest
    hits = 0
    for i in range(n):  # of those that match the positions come to the front
        at[hits] = at[i]
        if _hit(pte[at[i]], mask, value):
            hits += 1
    before = np.uint64(1 << 62)
    for i in range(hits):
        j = at[i]
        pte[j] = (pte[j] & keep) | sets
        w, bit = j >> np.uint64(6), np.uint64(1) << (j & np.uint64(63))
        out[w] |= bit
        also[w] |= bit
        words += w != before
        before = w
    return read, hits, words


@njit(nogil=True, cache=True)
def _rewrite_asked(pte, mask, value, keep, sets, within, out, also):  # type: ignore[no-untyped-def]
    """Rewrite the descriptors whose bits are set, by groups: all 64 of one are read."""
    changed, words, read = np.uint64(0), 0, 0
    full = pte.size // 64
    for w in range(within.size):
        if not within[w]:
            continue
        start = w * 64
        stop = min(start + 64, pte.size)
        read += stop - start
        word = np.uint64(0)
        if w < full:
            for j in range(64):
                word |= np.uint64(_hit(pte[w * 64 + j], mask, value)) << np.uint64(j)
        else:
            word = _word_at(pte, start, stop, mask, value)
        word &= within[w]
        if word:
            out[w] |= word
            also[w] |= word
            changed += _popcount(word)
            words += 1
            _rewrite_bits(pte, start, word, keep, sets)
    return read, changed, words


@njit(nogil=True, cache=True)
def _rewrite_run_within(pte, mask, value, keep, sets, within, out, also):  # type: ignore[no-untyped-def]
    changed, words, read = np.uint64(0), 0, 0
    at = np.empty(_SOME * 8, np.uint64)
    for first in range(0, within.size, _SOME):
        last = min(first + _SOME, within.size)
        asked = np.uint64(0)
        for w in range(first, last):
            asked += _popcount(within[w])
        if asked == 0:
            continue
        part, some = pte[first * 64 : last * 64], within[first:last]
        if asked < np.uint64(_SOME * 4):  # few: to look at each takes less than to read the groups that they are in
            r, c, n = _rewrite_listed(part, mask, value, keep, sets, some, out[first:last], also[first:last], at)
        else:
            r, c, n = _rewrite_asked(part, mask, value, keep, sets, some, out[first:last], also[first:last])
        read, changed, words = read + r, changed + np.uint64(c), words + n
    return read, changed, words


@njit(nogil=True, cache=True)
def _scan(pte, runs, mask, value, out):  # type: ignore[no-untyped-def]
    for r in range(runs.shape[0]):
        lo, hi = runs[r, 0], runs[r, 1]
        _scan_run(pte[lo:hi], mask, value, out[lo // 64 : (hi + 63) // 64])


@njit(nogil=True, cache=True)
def _rewrite(pte, runs, mask, value, keep, sets, out, also):  # type: ignore[no-untyped-def]
    read, changed, words = np.int64(0), np.int64(0), 0
    for r in range(runs.shape[0]):
        lo, hi = runs[r, 0], runs[r, 1]
        first, last = lo // 64, (hi + 63) // 64
        n, w = _rewrite_run(pte[lo:hi], mask, value, keep, sets, out[first:last], also[first:last])
        read, changed, words = read + hi - lo, changed + np.int64(n), words + w
    return read, changed, words


@njit(nogil=True, cache=True)
def _rewrite_within(pte, runs, mask, value, keep, sets, within, out, also):  # type: ignore[no-untyped-def]
    read, changed, words = 0, np.int64(0), 0
    for r in range(runs.shape[0]):
        lo, hi = runs[r, 0], runs[r, 1]
        first, last = lo // 64, (hi + 63) // 64
        d, n, w = _rewrite_run_within(
            pte[lo:hi], mask, value, keep, sets, within[first:last], out[first:last], also[first:last]
        )
        read, changed, words = read + d, changed + np.int64(n), words + w
    return read, changed, words


@njit(nogil=True, cache=True)
def _fill(words, ranges):  # type: ignore[no-untyped-def]
    full = ~np.uint64(0)
    for r in range(ranges.shape[0]):
        lo, hi = ranges[r, 0], ranges[r, 1]
        if lo >= hi:
            continue
        head, last = lo // 64, (hi - 1) // 64
        head_mask, last_mask = full << np.uint64(lo % 64), full >> np.uint64(63 - (hi - 1) % 64)
        if head == last:
            words[head] |= head_mask & last_mask
        else:
            words[head] |= head_mask
            words[head + 1 : last] = full
            words[last] |= last_mask


@njit(nogil=True, cache=True)
def _rewrite_runs(entries, mask, value, keep, sets):  # type: ignore[no-untyped-def]
    runs = np.empty((entries.size // 2 + 1, 2), np.int64)
    found, inside, writes = 0, False, sets != 0 or ~keep != 0
    full = entries.size // 64
    for w in range((entries.size + 63) // 64):
        if w < full:  # a group without a hit, or of hits that aren't written, in a row of such, is passed over
            word = np.uint64(0)
            for j in range(64):
                word |= np.uint64(_hit(entries[w * 64 + j], mask, value)) << np.uint64(j)
            if (word == 0 and not inside) or (~word == 0 and inside and not writes):
                continue
        for i in range(w * 64, min(w * 64 + 64, entries.size)):
            d = entries[i]
            hit = _hit(d, mask, value)
            if hit and writes:
                entries[i] = (d & keep) | sets
            if hit != inside:
                runs[found, 1 if inside else 0] = i
                found += inside
                inside = hit
    if inside:
        runs[found, 1] = entries.size
        found += 1
    return runs[:found]
