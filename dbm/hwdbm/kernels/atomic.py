"""Kernels for shared arrays: hardware, other threads and other processes write the same descriptors meanwhile.

A descriptor changes by one atomic read-modify-write, and what this found there is what decides: whether the descriptor
matched, what it becomes, and which bits are set for it. A pass reads the descriptors plainly first, as `fused` does,
and pays for the atomic operation only where that read says that there is something to do. What is written after it was
read is found by the next pass. Bits are set in bitmaps by atomic OR, so threads may share words too.

So the MMU's own update, a compare-and-swap, can come between any two instructions here, and no dirty bit is lost. When
the bitmap is read, and when the TLB is flushed, is for the caller to say.

The orders are the strongest that the hardware has: a pass of a few of them costs nothing beside its reads.

This file imports no compiled function of another: numba renews the code that it has cached when this file changes, and
knows of no other.
"""

from typing import Any

import numpy as np
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from hwdbm.kernels import BOTH, Notes, Place, Tally, check_at, check_ranges, check_runs, check_words
from hwdbm.kernels._cache import compiled
from hwdbm.kernels.fused import _masks, _noted
from hwdbm.kernels.fused import find as find
from hwdbm.pte import Match, Update

Array = NDArray[np.uint64]
Runs = NDArray[np.int64]

_FEW = 12  # of a group of 64: reading so many one by one takes less than reading the group

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


def merge(words: Array, bits: Array) -> None:
    """Set in `words` the bits that are set in `bits`."""
    check_words(words, bits)
    _merge(words, bits)


def remove(words: Array, bits: Array) -> None:
    """Clear in `words` the bits that are set in `bits`."""
    check_words(words, bits)
    _remove(words, bits)


# --- operations on one word ------------------------------------------------------------------------------------


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    """Return the pointer to an element: a multiple of 8, as all arrays here are aligned."""
    return builder.gep(context.make_array(array_type)(context, builder, array).data, [index])


_operation: Any = intrinsic  # in the types it is a class whose call has no arguments


@_operation
def _load(typingctx, array, index):
    """Read an element now: not once for two reads, and never in two halves."""

    def codegen(context, builder, signature, args):
        return builder.load_atomic(_pointer(context, builder, signature.args[0], *args), "monotonic", 8)

    return types.uint64(array, types.int64), codegen


@_operation
def _swap(typingctx, array, index, new):
    """Put `new` in place of an element, and return what was there."""

    def codegen(context, builder, signature, args):
        pointer = _pointer(context, builder, signature.args[0], *args[:2])
        return builder.atomic_rmw("xchg", pointer, args[2], "seq_cst")

    return types.uint64(array, types.int64, types.uint64), codegen


@_operation
def _or(typingctx, array, index, bits):
    """Set bits of an element, and return what was there."""

    def codegen(context, builder, signature, args):
        return builder.atomic_rmw("or", _pointer(context, builder, signature.args[0], *args[:2]), args[2], "seq_cst")

    return types.uint64(array, types.int64, types.uint64), codegen


@_operation
def _and(typingctx, array, index, bits):
    """Clear the bits of an element that `bits` lacks, and return what was there."""

    def codegen(context, builder, signature, args):
        return builder.atomic_rmw("and", _pointer(context, builder, signature.args[0], *args[:2]), args[2], "seq_cst")

    return types.uint64(array, types.int64, types.uint64), codegen


@_operation
def _cas(typingctx, array, index, old, new):
    """Put `new` in place of an element that is `old`, and return what was there."""

    def codegen(context, builder, signature, args):
        pointer = _pointer(context, builder, signature.args[0], *args[:2])
        return cgutils.unpack_tuple(builder, builder.cmpxchg(pointer, args[2], args[3], "seq_cst", "seq_cst"))[0]

    return types.uint64(array, types.int64, types.uint64, types.uint64), codegen


@njit(inline="always")
def _hit(d, mask, value):
    return (d & mask) == value


@njit(inline="always")
def _popcount(word):
    word = word - ((word >> np.uint64(1)) & np.uint64(0x5555555555555555))
    pairs = np.uint64(0x3333333333333333)
    word = (word & pairs) + ((word >> np.uint64(2)) & pairs)
    word = (word + (word >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return (word * np.uint64(0x0101010101010101)) >> np.uint64(56)


@njit(inline="always")
def _change(entries, i, mask, value, keep, sets):
    """Change an entry if it matches, and return it as it was then: whether that matches says whether it was changed."""
    d = _load(entries, i)
    while _hit(d, mask, value):
        new = (d & keep) | sets
        if new == d:
            return d
        found = _cas(entries, i, d, new)
        if found == d:  # returned from here, and not after a break: there numba would count references, atomically
            return d
        d = found  # another writer was faster, most likely the MMU: the new value decides
    return d


@njit(inline="always")
def _put(entries, i, new):
    """Put `new` in place of an entry, and return what was there."""
    d = _load(entries, i)
    return d if d == new else _swap(entries, i, new)


@njit(inline="always")
def _set(words, w, bits):
    """Set bits of a word."""
    if bits & ~_load(words, w):
        _or(words, w, bits)


# --- groups of 64 descriptors, and a word of each bitmap ---------------------------------------------------------


@njit
def _word(pte, mask, value):
    """Return the word of a group of up to 64 descriptors."""
    word = np.uint64(0)
    if pte.size == 64:  # a length that the compiler knows makes vector code
        for j in range(64):
            word |= np.uint64(_hit(pte[j], mask, value)) << np.uint64(j)
    else:
        for j in range(pte.size):
            word |= np.uint64(_hit(pte[j], mask, value)) << np.uint64(j)
    return word


@njit(inline="always")
def _any(pte, mask, value):
    """Return whether any of four groups matches."""
    some = np.uint64(0)
    for j in range(256):
        some |= np.uint64(_hit(pte[j], mask, value))
    return some != 0


@njit
def _rewrite_word(pte, word, mask, value, keep, sets, mask1, value1, mask2, value2, shift, out, also, w):
    """Rewrite the descriptors of `word` in a group of which the first is bit `shift`; return those that matched."""
    done = first = second = np.uint64(0)
    rest = word
    while rest:
        above = rest & (rest - np.uint64(1))
        bit = rest ^ above
        d = _change(pte, np.int64(_popcount(bit - np.uint64(1))), mask, value, keep, sets)
        if _hit(d, mask, value):
            done |= bit
            first |= bit if _hit(d, mask1, value1) else np.uint64(0)
            second |= bit if _hit(d, mask2, value2) else np.uint64(0)
        rest = above
    if first:
        _set(out, w, first << shift)
    if second:
        _set(also, w, second << shift)
    return done


@njit
def _scan_groups(pte, mask, value, out):
    for w in range(pte.size // 64):
        word = np.uint64(0)
        for j in range(64):
            word |= np.uint64(_hit(pte[w * 64 + j], mask, value)) << np.uint64(j)
        if word:
            _set(out, w, word)


@njit
def _rewrite_groups(pte, mask, value, keep, sets, mask1, value1, mask2, value2, out, also):
    changed, words, full, zero = np.uint64(0), 0, pte.size // 64, np.uint64(0)
    four = np.empty(4, np.uint64)  # as in `fused`: a branch on each word would be mispredicted too often
    for quad in range((full + 3) // 4):
        some, size = np.uint64(0), min(4, full - quad * 4)
        # Whether any matches takes less to find than the words, and LLVM makes vectors of it if it is given a slice.
        if size == 4 and not _any(pte[quad * 256 : quad * 256 + 256], mask, value):
            continue
        for k in range(size):
            word = np.uint64(0)
            for j in range(64):
                word |= np.uint64(_hit(pte[quad * 256 + k * 64 + j], mask, value)) << np.uint64(j)
            four[k] = word
            some |= word
        if some:
            for k in range(size):
                w = quad * 4 + k
                if four[k]:
                    done = _rewrite_word(
                        pte[w * 64 : w * 64 + 64], four[k], mask, value, keep, sets,
                        mask1, value1, mask2, value2, zero, out, also, w,
                    )  # fmt: skip
                    changed += _popcount(done)
                    words += done != 0
    return changed, words


@njit
def _asked(pte, asked, mask, value):
    """Return which of a group's descriptors that are asked for may match."""
    return asked if _popcount(asked) < np.uint64(_FEW) else asked & _word(pte, mask, value)


@njit
def _rewrite_groups_within(pte, mask, value, keep, sets, mask1, value1, mask2, value2, within, out, also):
    changed, words, read, zero = np.uint64(0), 0, 0, np.uint64(0)
    for w in range(within.size):
        if within[w]:
            read += 64
            group = pte[w * 64 : w * 64 + 64]
            word = _asked(group, within[w], mask, value)
            if word:
                done = _rewrite_word(
                    group, word, mask, value, keep, sets, mask1, value1, mask2, value2, zero, out, also, w
                )
                changed += _popcount(done)
                words += done != 0
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
            _set(out, bit // 64, _word(pte[lo:first], mask, value) << np.uint64(bit % 64))
        _scan_groups(pte[first:last], mask, value, out[w : w + (last - first) // 64])
        if last < hi:
            _set(out, w + (last - first) // 64, _word(pte[last:hi], mask, value))


@compiled(*(_W, _RUNS, *_CHANGE, *_NOTES, _W, _W))
def _rewrite(pte, runs, mask, value, keep, sets, mask1, value1, mask2, value2, out, also):
    read, changed, words = np.int64(0), np.uint64(0), 0
    for r in range(runs.shape[0]):
        lo, hi, bit = runs[r, 0], runs[r, 1], runs[r, 2]
        read += hi - lo
        first, last, w = _cut(lo, hi, bit)
        if lo < first:
            group = pte[lo:first]
            done = _rewrite_word(
                group, _word(group, mask, value), mask, value, keep, sets, mask1, value1, mask2, value2,
                np.uint64(bit % 64), out, also, bit // 64,
            )  # fmt: skip
            changed, words = changed + _popcount(done), words + (done != 0)
        v = w + (last - first) // 64
        c, n = _rewrite_groups(
            pte[first:last], mask, value, keep, sets, mask1, value1, mask2, value2, out[w:v], also[w:v]
        )
        changed, words = changed + c, words + n
        if last < hi:
            group = pte[last:hi]
            done = _rewrite_word(
                group, _word(group, mask, value), mask, value, keep, sets, mask1, value1, mask2, value2,
                np.uint64(0), out, also, v,
            )  # fmt: skip
            changed, words = changed + _popcount(done), words + (done != 0)
    return read, np.int64(changed), words


@compiled(*(_W, _RUNS, *_CHANGE, *_NOTES, _R, _W, _W))
def _rewrite_within(pte, runs, mask, value, keep, sets, mask1, value1, mask2, value2, within, out, also):
    read, changed, words = np.int64(0), np.uint64(0), 0
    for r in range(runs.shape[0]):
        lo, hi, bit = runs[r, 0], runs[r, 1], runs[r, 2]
        first, last, w = _cut(lo, hi, bit)
        if lo < first and within[bit // 64]:
            read += first - lo
            group = pte[lo:first]
            word = _word(group, mask, value) & within[bit // 64] >> np.uint64(bit % 64)
            done = _rewrite_word(
                group, word, mask, value, keep, sets, mask1, value1, mask2, value2,
                np.uint64(bit % 64), out, also, bit // 64,
            )  # fmt: skip
            changed, words = changed + _popcount(done), words + (done != 0)
        v = w + (last - first) // 64
        d, c, n = _rewrite_groups_within(
            pte[first:last], mask, value, keep, sets, mask1, value1, mask2, value2, within[w:v], out[w:v], also[w:v]
        )
        read, changed, words = read + d, changed + c, words + n
        if last < hi and within[v]:
            read += hi - last
            group = pte[last:hi]
            word = _word(group, mask, value) & within[v]
            done = _rewrite_word(
                group, word, mask, value, keep, sets, mask1, value1, mask2, value2, np.uint64(0), out, also, v
            )
            changed, words = changed + _popcount(done), words + (done != 0)
    return read, np.int64(changed), words


@njit
def _swap_group(pte, values, mask1, value1, mask2, value2, shift, out, also, w):
    """Swap a group of up to 64 descriptors of which the first is bit `shift`."""
    first = second = np.uint64(0)
    for j in range(pte.size):
        d = _put(pte, j, values[j])
        values[j] = d
        first |= np.uint64(_hit(d, mask1, value1)) << np.uint64(j)
        second |= np.uint64(_hit(d, mask2, value2)) << np.uint64(j)
    if first:
        _set(out, w, first << shift)
    if second:
        _set(also, w, second << shift)


@compiled(*(_W, _RUNS, _W, *_NOTES, _W, _W))
def _exchange(pte, runs, values, mask1, value1, mask2, value2, out, also):
    at = 0
    for r in range(runs.shape[0]):
        lo, hi, bit = runs[r, 0], runs[r, 1], runs[r, 2]
        first, _, w = _cut(lo, hi, bit)
        if lo < first:
            _swap_group(
                pte[lo:first], values[at : at + first - lo], mask1, value1, mask2, value2,
                np.uint64(bit % 64), out, also, bit // 64,
            )  # fmt: skip
        at += first - lo
        for start in range(first, hi, 64):
            stop = min(start + 64, hi)
            _swap_group(
                pte[start:stop], values[at : at + stop - start], mask1, value1, mask2, value2,
                np.uint64(0), out, also, w,
            )  # fmt: skip
            at, w = at + stop - start, w + 1


# --- entries of any level ----------------------------------------------------------------------------------------


@njit
def _fill_one(words, lo, hi):
    if lo >= hi:
        return
    full = ~np.uint64(0)
    head, last = lo // 64, (hi - 1) // 64
    head_mask, last_mask = full << np.uint64(lo % 64), full >> np.uint64(63 - (hi - 1) % 64)
    if head == last:
        _set(words, head, head_mask & last_mask)
    else:
        _set(words, head, head_mask)
        words[head + 1 : last] = full  # what an OR with all ones leaves, whatever was there
        _set(words, last, last_mask)


@njit
def _note_at(d, i, mask1, value1, mask2, value2, first, size, lo, hi, end, out, also, kept):
    """Set the bits of the pages of entry `i`, which was `d`."""
    start = first + i * size
    stop = start + size
    if _hit(d, mask1, value1):
        _fill_one(out, max(start, lo), min(stop, hi))
        if kept.size:
            _fill_one(kept, max(start, 0), min(stop, lo))
            _fill_one(kept, max(start, hi), min(stop, end))
    if _hit(d, mask2, value2):
        _fill_one(also, max(start, lo), min(stop, hi))


@compiled(*(_W, *_CHANGE, *_NOTES, *_PLACE, _W, _W, _W))
def _rewrite_all(
    entries, mask, value, keep, sets, mask1, value1, mask2, value2, first, size, lo, hi, end, out, also, kept
):
    changed, words = 0, 0
    for at in range(0, entries.size, 64):
        word = _word(entries[at : min(at + 64, entries.size)], mask, value)
        while word:
            above = word & (word - np.uint64(1))
            i = at + np.int64(_popcount((word ^ above) - np.uint64(1)))
            word = above
            d = _change(entries, i, mask, value, keep, sets)
            if _hit(d, mask, value):
                _note_at(d, i, mask1, value1, mask2, value2, first, size, lo, hi, end, out, also, kept)
                start = first + i * size
                words += max(min(start + size, hi) - max(start, lo) + 63, 0) // 64
                changed += 1
    return changed, words


@compiled(*(_W, _INDEX, *_CHANGE, *_NOTES, *_PLACE, _W, _W, _W))
def _rewrite_at(
    entries, index, mask, value, keep, sets, mask1, value1, mask2, value2, first, size, lo, hi, end, out, also, kept
):
    changed = 0
    for i in index:
        d = _change(entries, i, mask, value, keep, sets)
        if _hit(d, mask, value):
            changed += 1
            _note_at(d, i, mask1, value1, mask2, value2, first, size, lo, hi, end, out, also, kept)
    return changed


@compiled(*(_W, _INDEX, _W, *_NOTES, *_PLACE, _W, _W, _W))
def _exchange_at(entries, index, values, mask1, value1, mask2, value2, first, size, lo, hi, end, out, also, kept):
    for k in range(index.size):
        i = index[k]
        d = _put(entries, i, values[k])
        values[k] = d
        _note_at(d, i, mask1, value1, mask2, value2, first, size, lo, hi, end, out, also, kept)


@compiled(*(_W, _INDEX, *_CHANGE))
def _change_at(entries, index, mask, value, keep, sets):
    changed = 0
    for i in index:
        changed += _hit(_change(entries, i, mask, value, keep, sets), mask, value)
    return changed


@compiled(*(_W, _INDEX, _R))
def _set_at(entries, index, bits):
    for k in range(index.size):
        _set(entries, index[k], bits[k])


@compiled(*(_W, _RUNS))
def _fill(words, ranges):
    for r in range(ranges.shape[0]):
        _fill_one(words, ranges[r, 0], ranges[r, 1])


@compiled(*(_W, _R))
def _merge(words, bits):
    for w in range(words.size):
        if bits[w]:
            _set(words, w, bits[w])


@compiled(*(_W, _R))
def _remove(words, bits):
    for w in range(words.size):
        if bits[w]:
            _and(words, w, ~bits[w])
