"""Kernels in one pass over the descriptors, compiled by numba and cached on disk.

A group of 64 descriptors makes one bitmap word; descriptors are read once to make words and, only where a word isn't
zero, gone over again while they are still in the first-level cache. Groups are vectors of LLVM's: what it makes of a
loop over 64 descriptors, here, takes twice the time.

Every function here is one call of compiled code that changes descriptors and sets their bits: no signal handler of
Python's runs between the two. Each is compiled for one signature, when this module is imported; an array that is only
read may be read-only.
"""

from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from hwdbm.kernels import BOTH, Notes, Place, Tally, check_at, check_ranges, check_runs
from hwdbm.kernels._cache import compiled
from hwdbm.kernels.vector import merge as merge
from hwdbm.kernels.vector import remove as remove
from hwdbm.pte import Match, Update

Array = NDArray[np.uint64]
Runs = NDArray[np.int64]

_ALL = (1 << 64) - 1
_SOME = 256  # words of a mask that are looked at together
_FEW = 1024  # set bits of so many words: where there are fewer, each descriptor is looked at by itself

# Types of arguments: arrays that are written, arrays that are only read, words and indices.
_W = types.Array(types.uint64, 1, "C")
_R = types.Array(types.uint64, 1, "C", readonly=True)
_INDEX = types.Array(types.int64, 1, "C", readonly=True)
_RUNS = types.Array(types.int64, 2, "C", readonly=True)
_U, _I = types.uint64, types.int64
_MATCH, _CHANGE, _NOTES, _PLACE = (_U,) * 2, (_U,) * 4, (_U,) * 4, (_I,) * 5


def scan(pte: Array, runs: Runs, match: Match, out: Array) -> None:
    """Set in `out` the bit of each descriptor that matches."""
    runs = check_runs(pte, runs, out)
    _scan(pte, runs, np.uint64(match.mask), np.uint64(match.value), out)


def rewrite(pte: Array, runs: Runs, update: Update, out: Array, also: Array, notes: Notes = BOTH) -> Tally:
    """Apply `update`, and set in `out` and `also` the bits of the descriptors that it changed."""
    runs = check_runs(pte, runs, out, also, change=True)
    return Tally(*_rewrite(pte, runs, *_masks(update), *_noted(notes), out, also))


def rewrite_within(
    pte: Array, runs: Runs, update: Update, within: Array, out: Array, also: Array, notes: Notes = BOTH
) -> Tally:
    """Apply `update` where the bit in `within` is set; otherwise as `rewrite`."""
    runs = check_runs(pte, runs, out, also, within=within, change=True)
    return Tally(*_rewrite_within(pte, runs, *_masks(update), *_noted(notes), within, out, also))


def exchange(pte: Array, runs: Runs, values: Array, out: Array, also: Array, notes: Notes = BOTH) -> None:
    """Swap descriptors with `values`, and set in `out` and `also` the bits that `notes` asks of what was there."""
    runs = check_runs(pte, runs, out, also, values=values, change=True)
    _exchange(pte, runs, values, *_noted(notes), out, also)


def rewrite_all(
    entries: Array, update: Update, place: Place, out: Array, also: Array, kept: Array, notes: Notes = BOTH
) -> Tally:
    """Apply `update` to the entries that match, and set the bits of their pages."""
    check_at(entries, None, place, out, also, kept)
    return Tally(entries.size, *_rewrite_all(entries, *_masks(update), *_noted(notes), *place, out, also, kept))


def rewrite_at(
    entries: Array, index: Runs, update: Update, place: Place, out: Array, also: Array, kept: Array, notes: Notes = BOTH
) -> int:
    """Apply `update` to the entries `index`, set the bits of their pages, and return how many it changed."""
    index = check_at(entries, index, place, out, also, kept)
    return int(_rewrite_at(entries, index, *_masks(update), *_noted(notes), *place, out, also, kept))


def exchange_at(
    entries: Array, index: Runs, values: Array, place: Place, out: Array, also: Array, kept: Array, notes: Notes = BOTH
) -> None:
    """Swap the entries `index` with `values`, and set the bits of their pages that `notes` asks of what was there."""
    index = check_at(entries, index, place, out, also, kept, values=values)
    _exchange_at(entries, index, values, *_noted(notes), *place, out, also, kept)


def change_at(entries: Array, index: Runs, update: Update) -> int:
    """Apply `update` to the entries `index`, and return how many it changed."""
    index = check_at(entries, index)
    return int(_change_at(entries, index, *_masks(update)))


def set_at(entries: Array, index: Runs, bits: Array) -> None:
    """Set `bits` in the entries `index`, which may repeat."""
    index = check_at(entries, index, values=bits)
    _set_at(entries, index, bits)


def fill(words: Array, ranges: Runs) -> None:
    """Set the bits of each row [start, stop) of `ranges`."""
    ranges = check_ranges(words, ranges)
    _fill(words, ranges)


def find(entries: Array, match: Match) -> Runs:
    """Return the runs [start, stop) of entries that match."""
    check_at(entries)
    runs: Runs = _find(entries, np.uint64(match.mask), np.uint64(match.value))
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


@cache
def _noted(notes: Notes) -> tuple[np.uint64, np.uint64, np.uint64, np.uint64]:
    # A value outside of its mask is matched by nothing.
    pairs = [(0, 1) if match is None else (match.mask, match.value) for match in notes]
    return tuple(np.uint64(number) for pair in pairs for number in pair)  # type: ignore[return-value]


@njit(inline="always")
def _hit(d, mask, value):
    return (d & mask) == value


# --- groups of 64 descriptors ---------------------------------------------------------------------------------

_operation: Any = intrinsic  # in the types it is a class whose call has no arguments
_WIDTH = 8  # descriptors: a vector that LLVM compares and packs well, whatever registers there are
_VECTOR = ir.VectorType(ir.IntType(64), _WIDTH)


@_operation
def _popcount(_context, word):
    """Return how many bits of a word are set."""
    return types.uint64(word), lambda _context, builder, _signature, args: builder.ctpop(args[0])


@_operation
def _lowest(_context, word):
    """Return the number of the lowest bit that is set in a word that isn't zero."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.uint64(word), generate


@_operation
def _word64(_context, pte, at, mask, value):
    """Return the word of ``pte[at : at + 64]``."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        mask, value = _splat(builder, args[2]), _splat(builder, args[3])
        word = ir.Constant(ir.IntType(64), 0)
        for number, place in enumerate(_places(context, builder, signature, args)):
            hits = builder.icmp_unsigned("==", builder.and_(builder.load(place, align=8), mask), value)
            bits = builder.zext(builder.bitcast(hits, ir.IntType(_WIDTH)), ir.IntType(64))
            word = builder.or_(word, builder.shl(bits, ir.Constant(ir.IntType(64), number * _WIDTH)))
        return word

    return types.uint64(pte, at, mask, value), generate


@_operation
def _change64(_context, pte, at, word, keep, sets):
    """Change those of ``pte[at : at + 64]`` whose bits are set in `word`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        keep, sets = _splat(builder, args[3]), _splat(builder, args[4])
        # An empty instruction hides where the word is from. Otherwise LLVM stores the result of each comparison for use
        # here, which every group pays for, also where nothing is to be changed.
        word = builder.asm(ir.FunctionType(args[2].type, [args[2].type]), "", "=r,0", [args[2]], False)
        for number, place in enumerate(_places(context, builder, signature, args)):
            bits = builder.lshr(word, ir.Constant(ir.IntType(64), number * _WIDTH))
            hits = builder.bitcast(builder.trunc(bits, ir.IntType(_WIDTH)), ir.VectorType(ir.IntType(1), _WIDTH))
            old = builder.load(place, align=8)
            builder.store(builder.select(hits, builder.or_(builder.and_(old, keep), sets), old), place, align=8)
        return context.get_dummy_value()

    return types.void(pte, at, word, keep, sets), generate


def _places(context: Any, builder: Any, signature: Any, args: Any) -> list[Any]:
    """Return pointers to the vectors of the 64 descriptors from the second argument on, of the array that is first."""
    data = context.make_array(signature.args[0])(context, builder, args[0]).data
    first = builder.bitcast(builder.gep(data, [args[1]]), _VECTOR.as_pointer())
    return [builder.gep(first, [ir.Constant(ir.IntType(64), number)]) for number in range(64 // _WIDTH)]


def _splat(builder: Any, number: Any) -> Any:
    """Return a vector of which each element is `number`."""
    some, index = ir.Constant(_VECTOR, ir.Undefined), ir.IntType(32)
    one = builder.insert_element(some, number, ir.Constant(index, 0))
    return builder.shuffle_vector(one, some, ir.Constant(ir.VectorType(index, _WIDTH), [0] * _WIDTH))


# --- runs of descriptors --------------------------------------------------------------------------------------


@njit
def _word(pte, mask, value):
    """Return the word of a group of up to 64 descriptors."""
    if pte.size == 64:
        return _word64(pte, 0, mask, value)
    word = np.uint64(0)
    for j in range(pte.size):
        word |= np.uint64(_hit(pte[j], mask, value)) << np.uint64(j)
    return word


@njit
def _publish(pte, word, mask1, value1, mask2, value2, shift, out, also):
    """Set the bits of a group in which the descriptors of `word` match, in the one word of `out` and of `also`."""
    first = second = word
    if mask1 | value1:
        first &= _word(pte, mask1, value1)
    if mask2 | value2:
        second &= _word(pte, mask2, value2)
    out[0] |= first << shift
    also[0] |= second << shift


@njit
def _rewrite_few(pte, mask, value, keep, sets, mask1, value1, mask2, value2, asked, shift, out, also):
    """Rewrite a group of up to 64 descriptors of which the first is bit `shift`; return the word of those it was."""
    word = _word(pte, mask, value) & asked
    if word:
        _publish(pte, word, mask1, value1, mask2, value2, shift, out, also)
        rest = word
        while rest:
            i = np.int64(_lowest(rest))
            pte[i] = (pte[i] & keep) | sets
            rest &= rest - np.uint64(1)
    return word


@njit
def _scan_groups(pte, mask, value, out):
    for four in range(pte.size // 256):  # as in `_rewrite_groups`
        w = four * 4
        a = _word64(pte, w * 64, mask, value)
        b = _word64(pte, w * 64 + 64, mask, value)
        c = _word64(pte, w * 64 + 128, mask, value)
        d = _word64(pte, w * 64 + 192, mask, value)
        if a | b | c | d:
            out[w] |= a
            out[w + 1] |= b
            out[w + 2] |= c
            out[w + 3] |= d
    for w in range(pte.size // 256 * 4, pte.size // 64):
        out[w] |= _word64(pte, w * 64, mask, value)


@njit
def _rewrite_groups(pte, mask, value, keep, sets, out, also):
    """Rewrite whole groups, and set the bits of all that change."""
    changed, words = np.uint64(0), np.int64(0)
    # Four words at a time: at a density of 1 % a branch on one word is mispredicted so often that it costs more than
    # the reading; a branch on four isn't.
    for four in range(pte.size // 256):
        w = four * 4
        a = _word64(pte, w * 64, mask, value)
        b = _word64(pte, w * 64 + 64, mask, value)
        c = _word64(pte, w * 64 + 128, mask, value)
        d = _word64(pte, w * 64 + 192, mask, value)
        if a | b | c | d:
            out[w] |= a
            out[w + 1] |= b
            out[w + 2] |= c
            out[w + 3] |= d
            also[w] |= a
            also[w + 1] |= b
            also[w + 2] |= c
            also[w + 3] |= d
            _change64(pte, w * 64, a, keep, sets)
            _change64(pte, w * 64 + 64, b, keep, sets)
            _change64(pte, w * 64 + 128, c, keep, sets)
            _change64(pte, w * 64 + 192, d, keep, sets)
            changed += _popcount(a) + _popcount(b) + _popcount(c) + _popcount(d)
            words += np.int64(a != 0) + np.int64(b != 0) + np.int64(c != 0) + np.int64(d != 0)
    for w in range(pte.size // 256 * 4, pte.size // 64):
        word = _word64(pte, w * 64, mask, value)
        out[w] |= word
        also[w] |= word
        _change64(pte, w * 64, word, keep, sets)
        changed += _popcount(word)
        words += word != 0
    return changed, words


@njit
def _rewrite_noted(pte, mask, value, keep, sets, mask1, value1, mask2, value2, out, also):
    """Rewrite whole groups, and set the bits that the notes ask for."""
    changed, words = np.uint64(0), 0
    for w in range(pte.size // 64):
        word = _word64(pte, w * 64, mask, value)
        if word:
            first = second = word
            if mask1 | value1:
                first &= _word64(pte, w * 64, mask1, value1)
            if mask2 | value2:
                second &= _word64(pte, w * 64, mask2, value2)
            out[w] |= first
            also[w] |= second
            _change64(pte, w * 64, word, keep, sets)
            changed += _popcount(word)
            words += 1
    return changed, words


@njit
def _rewrite_listed(pte, mask, value, keep, sets, mask1, value1, mask2, value2, within, out, also, at):
    """Rewrite the descriptors whose bits are set, one by one; `at` has room for their positions."""
    # Three passes where one would do: where few bits are set each descriptor is a cache miss. The loads of the second
    # pass depend on nothing but `at`, with no store and no branch on their results between them, so the processor has
    # many under way at once. The third finds its descriptors in the cache.
    words, read, n = 0, 0, 0
    for w in range(within.size):
        asked = within[w]
        if asked:
            read += 64
        while asked:
            at[n] = np.uint64(w * 64) + _lowest(asked)
            n += 1
            asked &= asked - np.uint64(1)
    hits = 0
    for i in range(n):  # the positions of those that match come to the front
        at[hits] = at[i]
        if _hit(pte[at[i]], mask, value):
            hits += 1
    before = ~np.uint64(0)
    for i in range(hits):
        j = at[i]
        d = pte[j]
        pte[j] = (d & keep) | sets
        w, bit = j >> np.uint64(6), np.uint64(1) << (j & np.uint64(63))
        if _hit(d, mask1, value1):
            out[w] |= bit
        if _hit(d, mask2, value2):
            also[w] |= bit
        words += w != before
        before = w
    return read, np.uint64(hits), words


@njit
def _rewrite_asked(pte, mask, value, keep, sets, mask1, value1, mask2, value2, within, out, also):
    """Rewrite the descriptors whose bits are set, by groups: all 64 of each are read."""
    changed, words, read, zero = np.uint64(0), 0, 0, np.uint64(0)
    for w in range(within.size):
        if within[w]:
            read += 64
            group, first, second = pte[w * 64 : w * 64 + 64], out[w : w + 1], also[w : w + 1]
            word = _rewrite_few(
                group, mask, value, keep, sets, mask1, value1, mask2, value2, within[w], zero, first, second
            )
            changed += _popcount(word)
            words += word != 0
    return read, changed, words


@njit
def _rewrite_groups_within(pte, mask, value, keep, sets, mask1, value1, mask2, value2, within, out, also):
    changed, words, read = np.uint64(0), 0, 0
    at = np.empty(_FEW, np.uint64)
    for first in range(0, within.size, _SOME):
        last = min(first + _SOME, within.size)
        asked = np.uint64(0)
        for w in range(first, last):
            asked += _popcount(within[w])
        if asked == 0:
            continue
        part, some, outs, alsos = pte[first * 64 : last * 64], within[first:last], out[first:last], also[first:last]
        if asked < np.uint64(_FEW):  # looking at each takes less than reading the groups that they are in
            r, c, n = _rewrite_listed(
                part, mask, value, keep, sets, mask1, value1, mask2, value2, some, outs, alsos, at
            )
        else:
            r, c, n = _rewrite_asked(part, mask, value, keep, sets, mask1, value1, mask2, value2, some, outs, alsos)
        read, changed, words = read + r, changed + c, words + n
    return read, changed, words


@njit(inline="always")
def _cut(lo, hi, bit):
    """Return where the whole words of a run begin and end, and the first of them."""
    head = min(-bit % 64, hi - lo)
    first = lo + head
    return first, first + (hi - first) // 64 * 64, (bit + head) // 64


@compiled(*(_R, _RUNS, *_MATCH, _W))
def _scan(pte, runs, mask, value, out):
    for r in range(runs.shape[0]):
        lo, hi, bit = runs[r, 0], runs[r, 1], runs[r, 2]
        first, last, w = _cut(lo, hi, bit)
        if lo < first:
            out[bit // 64] |= _word(pte[lo:first], mask, value) << np.uint64(bit % 64)
        _scan_groups(pte[first:last], mask, value, out[w : w + (last - first) // 64])
        if last < hi:
            out[w + (last - first) // 64] |= _word(pte[last:hi], mask, value)


@compiled(*(_W, _RUNS, *_CHANGE, *_NOTES, _W, _W))
def _rewrite(pte, runs, mask, value, keep, sets, mask1, value1, mask2, value2, out, also):
    read, changed, words, everything = np.int64(0), np.uint64(0), 0, ~np.uint64(0)
    for r in range(runs.shape[0]):
        lo, hi, bit = runs[r, 0], runs[r, 1], runs[r, 2]
        read += hi - lo
        first, last, w = _cut(lo, hi, bit)
        if lo < first:
            v = bit // 64
            word = _rewrite_few(
                pte[lo:first], mask, value, keep, sets, mask1, value1, mask2, value2,
                everything, np.uint64(bit % 64), out[v : v + 1], also[v : v + 1],
            )  # fmt: skip
            changed, words = changed + _popcount(word), words + (word != 0)
        v = w + (last - first) // 64
        if mask1 | value1 | mask2 | value2:
            c, n = _rewrite_noted(
                pte[first:last], mask, value, keep, sets, mask1, value1, mask2, value2, out[w:v], also[w:v]
            )
        else:
            c, n = _rewrite_groups(pte[first:last], mask, value, keep, sets, out[w:v], also[w:v])
        changed, words = changed + c, words + n
        if last < hi:
            word = _rewrite_few(
                pte[last:hi], mask, value, keep, sets, mask1, value1, mask2, value2,
                everything, np.uint64(0), out[v : v + 1], also[v : v + 1],
            )  # fmt: skip
            changed, words = changed + _popcount(word), words + (word != 0)
    return read, np.int64(changed), words


@compiled(*(_W, _RUNS, *_CHANGE, *_NOTES, _R, _W, _W))
def _rewrite_within(pte, runs, mask, value, keep, sets, mask1, value1, mask2, value2, within, out, also):
    read, changed, words = np.int64(0), np.uint64(0), 0
    for r in range(runs.shape[0]):
        lo, hi, bit = runs[r, 0], runs[r, 1], runs[r, 2]
        first, last, w = _cut(lo, hi, bit)
        if lo < first:
            v = bit // 64
            if within[v]:
                read += first - lo
                word = _rewrite_few(
                    pte[lo:first], mask, value, keep, sets, mask1, value1, mask2, value2,
                    within[v] >> np.uint64(bit % 64), np.uint64(bit % 64), out[v : v + 1], also[v : v + 1],
                )  # fmt: skip
                changed, words = changed + _popcount(word), words + (word != 0)
        v = w + (last - first) // 64
        d, c, n = _rewrite_groups_within(
            pte[first:last], mask, value, keep, sets, mask1, value1, mask2, value2, within[w:v], out[w:v], also[w:v]
        )
        read, changed, words = read + d, changed + c, words + n
        if last < hi and within[v]:
            read += hi - last
            word = _rewrite_few(
                pte[last:hi], mask, value, keep, sets, mask1, value1, mask2, value2,
                within[v], np.uint64(0), out[v : v + 1], also[v : v + 1],
            )  # fmt: skip
            changed, words = changed + _popcount(word), words + (word != 0)
    return read, np.int64(changed), words


@njit
def _swap(pte, values, mask1, value1, mask2, value2, shift, out, also):
    """Swap a group of up to 64 descriptors of which the first is bit `shift`."""
    out[0] |= _word(pte, mask1, value1) << shift
    also[0] |= _word(pte, mask2, value2) << shift
    for j in range(pte.size):
        old = pte[j]
        pte[j] = values[j]
        values[j] = old


@compiled(*(_W, _RUNS, _W, *_NOTES, _W, _W))
def _exchange(pte, runs, values, mask1, value1, mask2, value2, out, also):
    at = 0
    for r in range(runs.shape[0]):
        lo, hi, bit = runs[r, 0], runs[r, 1], runs[r, 2]
        first, _, w = _cut(lo, hi, bit)
        if lo < first:
            v = bit // 64
            _swap(
                pte[lo:first], values[at : at + first - lo], mask1, value1, mask2, value2,
                np.uint64(bit % 64), out[v : v + 1], also[v : v + 1],
            )  # fmt: skip
        at += first - lo
        for start in range(first, hi, 64):
            stop = min(start + 64, hi)
            _swap(
                pte[start:stop], values[at : at + stop - start], mask1, value1, mask2, value2,
                np.uint64(0), out[w : w + 1], also[w : w + 1],
            )  # fmt: skip
            at, w = at + stop - start, w + 1


@njit
def _fill_one(words, start, stop, lo, hi):
    """Set the bits of [start, stop) that are in [lo, hi)."""
    start, stop = max(start, lo), min(stop, hi)
    if start >= stop:
        return
    full = ~np.uint64(0)
    head, last = start // 64, (stop - 1) // 64
    head_mask, last_mask = full << np.uint64(start % 64), full >> np.uint64(63 - (stop - 1) % 64)
    if head == last:
        words[head] |= head_mask & last_mask
    else:
        words[head] |= head_mask
        words[head + 1 : last] = full  # a loop over indices takes three times as long: LLVM makes no vectors of it
        words[last] |= last_mask


@njit
def _fill_runs(words, bits, start, size, lo, hi):
    """Set the bits of the pages in [lo, hi) of entries whose bits are set: `size` pages each, the first at `start`."""
    while bits:
        skip = _lowest(bits)
        bits >>= skip
        run = _lowest(~bits) if ~bits else np.uint64(64)
        first = start + np.int64(skip) * size
        start = first + np.int64(run) * size
        _fill_one(words, first, start, lo, hi)
        bits = bits >> run if ~bits else np.uint64(0)


@njit
def _covered(bits, start, size, lo, hi):
    """Return in how many words the pages in [lo, hi) of the entries of `bits` are, counted by entry."""
    if lo <= start and start + 64 * size <= hi:
        return np.int64(_popcount(bits)) * ((size + 63) // 64)
    words = 0
    while bits:
        first = start + np.int64(_lowest(bits)) * size
        words += max(min(first + size, hi) - max(first, lo) + 63, 0) // 64
        bits &= bits - np.uint64(1)
    return words


@compiled(*(_W, *_CHANGE, *_NOTES, *_PLACE, _W, _W, _W))
def _rewrite_all(
    entries, mask, value, keep, sets, mask1, value1, mask2, value2, first, size, lo, hi, end, out, also, kept
):
    changed, words = np.uint64(0), 0
    for at in range(0, entries.size, 64):
        group = entries[at : min(at + 64, entries.size)]
        word = _word(group, mask, value)
        if word:
            noted, start, after = word, first + at * size, first + (at + group.size) * size
            if mask1 | value1:
                noted &= _word(group, mask1, value1)
            _fill_runs(out, noted, start, size, lo, hi)
            if kept.size and (start < lo or hi < after):
                _fill_runs(kept, noted, start, size, 0, lo)
                _fill_runs(kept, noted, start, size, hi, end)
            _fill_runs(also, word & _word(group, mask2, value2) if mask2 | value2 else word, start, size, lo, hi)
            changed += _popcount(word)
            words += _covered(word, start, size, lo, hi)
            if group.size == 64:
                _change64(entries, at, word, keep, sets)
                continue
            while word:
                i = np.int64(_lowest(word))
                group[i] = (group[i] & keep) | sets
                word &= word - np.uint64(1)
    return np.int64(changed), words


# The two that follow set bits in one array after the other: a function that is handed all three, for each entry, has
# numba count references to them, which takes several times as long as the work.


@compiled(*(_W, _INDEX, *_CHANGE, *_NOTES, *_PLACE, _W, _W, _W))
def _rewrite_at(
    entries, index, mask, value, keep, sets, mask1, value1, mask2, value2, first, size, lo, hi, end, out, also, kept
):
    changed = 0
    for i in index:
        d = entries[i]
        if _hit(d, mask, value):
            entries[i] = (d & keep) | sets
            changed += 1
            start = first + i * size
            stop = start + size
            if _hit(d, mask1, value1):
                _fill_one(out, start, stop, lo, hi)
                if kept.size:
                    _fill_one(kept, start, stop, 0, lo)
                    _fill_one(kept, start, stop, hi, end)
            if _hit(d, mask2, value2):
                _fill_one(also, start, stop, lo, hi)
    return changed


@compiled(*(_W, _INDEX, _W, *_NOTES, *_PLACE, _W, _W, _W))
def _exchange_at(entries, index, values, mask1, value1, mask2, value2, first, size, lo, hi, end, out, also, kept):
    for k in range(index.size):
        i = index[k]
        d = entries[i]
        entries[i] = values[k]
        values[k] = d
        start = first + i * size
        stop = start + size
        if _hit(d, mask1, value1):
            _fill_one(out, start, stop, lo, hi)
            if kept.size:
                _fill_one(kept, start, stop, 0, lo)
                _fill_one(kept, start, stop, hi, end)
        if _hit(d, mask2, value2):
            _fill_one(also, start, stop, lo, hi)


@compiled(*(_W, _INDEX, *_CHANGE))
def _change_at(entries, index, mask, value, keep, sets):
    changed = 0
    for i in index:
        d = entries[i]
        if _hit(d, mask, value):
            entries[i] = (d & keep) | sets
            changed += 1
    return changed


@compiled(*(_W, _INDEX, _R))
def _set_at(entries, index, bits):
    for k in range(index.size):
        entries[index[k]] |= bits[k]


@compiled(*(_W, _RUNS))
def _fill(words, ranges):
    for r in range(ranges.shape[0]):
        _fill_one(words, ranges[r, 0], ranges[r, 1], 0, words.size * 64)


@compiled(*(_R, *_MATCH))
def _find(entries, mask, value):
    runs = np.empty((entries.size // 2 + 1, 2), np.int64)
    found, inside, full = 0, False, entries.size // 64
    for w in range(full + 1):
        if w < full:  # a group without a match, or of matches in the middle of a run, is passed over whole
            word = _word64(entries, w * 64, mask, value)
            if (word == 0 and not inside) or (~word == 0 and inside):
                continue
        for i in range(w * 64, min(w * 64 + 64, entries.size)):
            hit = _hit(entries[i], mask, value)
            if hit != inside:
                runs[found, 1 if inside else 0] = i
                found += inside
                inside = hit
    if inside:
        runs[found, 1] = entries.size
        found += 1
    return runs[:found]
