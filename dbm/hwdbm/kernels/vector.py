"""Kernels in numpy: the portable ones.

They go over the descriptors in blocks small enough that the temporaries stay in the cache. What a block's descriptors
were is in the bitmaps before one call of numpy's changes them, so a signal handler that raises in between marks a page
too many, and never one too few.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from hwdbm.kernels import BOTH, Notes, Place, Tally, check_at, check_ranges, check_runs, check_words
from hwdbm.pte import ANY, Match, Update

Array = NDArray[np.uint64]
Runs = NDArray[np.int64]
Bools = NDArray[np.bool_]

_BLOCK = 1 << 15  # descriptors: 256 KiB of them, and 32 KiB of booleans
_FEW = 24  # where one descriptor in so many changes, or fewer, they are changed by their index
_GAP = 1 << 12  # descriptors: a shorter gap between two runs is bridged
_SHORT = 24  # words: where ranges are shorter, on average, they are filled together, and otherwise one by one
_ALL = (1 << 64) - 1


def scan(pte: Array, runs: Runs, match: Match, out: Array) -> None:
    """Set in `out` the bit of each descriptor that matches."""
    runs = check_runs(pte, runs, out)
    room, some = _Room(pte.size), False
    for block, words, shift in _blocks(runs):
        entries = pte[block]
        if not some and _none(entries, match):
            continue
        hit = room.hit(entries, match)
        some = bool(hit.any())
        if some:
            _set(out[words], _packed(hit, shift))


def rewrite(pte: Array, runs: Runs, update: Update, out: Array, also: Array, notes: Notes = BOTH) -> Tally:
    """Apply `update`, and set in `out` and `also` the bits of the descriptors that it changed."""
    runs = check_runs(pte, runs, out, also, change=True)
    room, read, changed, found, count = _Room(pte.size), 0, 0, 0, 0
    for block, words, shift in _blocks(runs):
        entries = pte[block]
        read += entries.size
        if not count and _none(entries, update.where):
            continue
        hit = room.hit(entries, update.where)
        count = int(np.count_nonzero(hit))
        if count:
            hits = _packed(hit, shift)
            changed, found = changed + count, found + int(np.count_nonzero(hits))
            _publish(entries, hit, hits, notes, shift, out[words], also[words])
            room.change(entries, hit, count, update)
    return Tally(read, changed, found)


def rewrite_within(
    pte: Array, runs: Runs, update: Update, within: Array, out: Array, also: Array, notes: Notes = BOTH
) -> Tally:
    """Apply `update` where the bit in `within` is set; otherwise as `rewrite`."""
    runs = check_runs(pte, runs, out, also, within=within, change=True)
    room, read, changed, found = _Room(pte.size), 0, 0, 0
    for block, words, shift in _blocks(runs):
        entries = pte[block]
        (wanted,) = within[words].nonzero()
        if not wanted.size:
            continue
        read += int(np.minimum(64, entries.size - 64 * wanted).sum())  # the last group may be a part
        hits = _packed(room.hit(entries, update.where), shift) & within[words]
        count = int(np.bitwise_count(hits).sum(dtype=np.int64))
        if count:
            changed, found = changed + count, found + int(np.count_nonzero(hits))
            hit = np.unpackbits(hits.view(np.uint8), count=shift + entries.size, bitorder="little").view(np.bool_)
            hit = hit[shift:]
            _publish(entries, hit, hits, notes, shift, out[words], also[words])
            room.change(entries, hit, count, update)
    return Tally(read, changed, found)


def exchange(pte: Array, runs: Runs, values: Array, out: Array, also: Array, notes: Notes = BOTH) -> None:
    """Swap descriptors with `values`, and set in `out` and `also` the bits that `notes` asks of what was there."""
    runs = check_runs(pte, runs, out, also, values=values, change=True)
    at = 0
    for block, words, shift in _blocks(runs, gap=0):
        entries = pte[block]
        new = values[at : at + entries.size].copy()
        for match, target in zip(notes, (out, also), strict=True):
            if match is not None:
                _set(target[words], _packed(match(entries), shift))
        values[at : at + entries.size] = entries
        entries[:] = new
        at += entries.size


def rewrite_all(
    entries: Array, update: Update, place: Place, out: Array, also: Array, kept: Array, notes: Notes = BOTH
) -> Tally:
    """Apply `update` to the entries that match, and set the bits of their pages."""
    check_at(entries, None, place, out, also, kept)
    room, changed, found = _Room(entries.size), 0, 0
    for start in range(0, entries.size, _BLOCK):
        block = entries[start : start + _BLOCK]
        hit = room.hit(block, update.where)
        count = int(np.count_nonzero(hit))
        if count:
            changed, found = changed + count, found + _covered(hit, start, place)
            for match, words in zip(notes, (out, also), strict=True):
                if match is not None:
                    noted = hit if match == ANY else match(block) & hit
                    _mark(_edges(noted) + start, place, words, kept if words is out else None)
            room.change(block, hit, count, update)
    return Tally(entries.size, changed, found)


def rewrite_at(
    entries: Array, index: Runs, update: Update, place: Place, out: Array, also: Array, kept: Array, notes: Notes = BOTH
) -> int:
    """Apply `update` to the entries `index`, set the bits of their pages, and return how many it changed."""
    index = check_at(entries, index, place, out, also, kept)
    index = index[update.where(entries[index])]
    if index.size:
        _note_at(entries[index], index, notes, place, out, also, kept)
        _change_at(entries, index, update)
    return int(index.size)


def exchange_at(
    entries: Array, index: Runs, values: Array, place: Place, out: Array, also: Array, kept: Array, notes: Notes = BOTH
) -> None:
    """Swap the entries `index` with `values`, and set the bits of their pages that `notes` asks of what was there."""
    index = check_at(entries, index, place, out, also, kept, values=values)
    old, new = entries[index], values.copy()
    _note_at(old, index, notes, place, out, also, kept)
    values[:] = old
    entries[index] = new


def change_at(entries: Array, index: Runs, update: Update) -> int:
    """Apply `update` to the entries `index`, and return how many it changed."""
    index = check_at(entries, index)
    index = index[update.where(entries[index])]
    _change_at(entries, index, update)
    return int(index.size)


def set_at(entries: Array, index: Runs, bits: Array) -> None:
    """Set `bits` in the entries `index`, which may repeat."""
    index = check_at(entries, index, values=bits)
    np.bitwise_or.at(entries, index, bits)


def fill(words: Array, ranges: Runs) -> None:
    """Set the bits of each row [start, stop) of `ranges`."""
    ranges = check_ranges(words, ranges)
    ranges = ranges[ranges[:, 0] < ranges[:, 1]]
    step = _BLOCK // 8
    for start in range(0, len(ranges), step):
        _fill(words, ranges[start : start + step])


def merge(words: Array, bits: Array) -> None:
    """Set in `words` the bits that are set in `bits`."""
    check_words(words, bits)
    np.bitwise_or(words, bits, out=words)


def remove(words: Array, bits: Array) -> None:
    """Clear in `words` the bits that are set in `bits`."""
    check_words(words, bits)
    np.bitwise_and(words, ~bits, out=words)


def find(entries: Array, match: Match) -> Runs:
    """Return the runs [start, stop) of entries that match."""
    check_at(entries)
    return _edges(match(entries))


class _Room:
    """Temporaries of a pass, which every block uses again."""

    def __init__(self, size: int) -> None:
        size = min(size, _BLOCK)
        self._entries, self._hit = np.empty(size, dtype=np.uint64), np.empty(size, dtype=np.bool_)

    def hit(self, entries: Array, match: Match) -> Bools:
        """Return whether each of `entries` matches; the next call takes the array back."""
        some, hit = self._entries[: entries.size], self._hit[: entries.size]
        np.bitwise_and(entries, np.uint64(match.mask), out=some)
        return np.equal(some, np.uint64(match.value), out=hit)

    def change(self, entries: Array, hit: Bools, count: int, update: Update) -> None:
        """Apply `update` where `hit`, which is true `count` times, with one call that writes to `entries`."""
        flips, keep, sets = _flips(update), np.uint64(~update.clears & _ALL), np.uint64(update.sets)
        if count * _FEW < entries.size:
            _change_at(entries, np.flatnonzero(hit), update)
            return
        some = self._entries[: entries.size]
        if flips is None:
            np.bitwise_and(entries, keep, out=some)
            np.bitwise_or(some, sets, out=some)
            np.bitwise_xor(some, entries, out=some)
            np.multiply(some, hit, out=some)
        elif count < entries.size:
            np.copyto(some, hit)  # a conversion and a product take a third of the time of a choice
            np.multiply(some, flips, out=some)
        np.bitwise_xor(entries, flips if flips is not None and count == entries.size else some, out=entries)


def _blocks(runs: Runs, gap: int | None = None) -> Iterator[tuple[slice, slice, int]]:
    """Yield the blocks of the runs: slices of descriptors and of words, and the first descriptor's bit in its word.

    Short gaps are read too: nothing matches there, and a block costs less than two calls do.
    """
    gap = _GAP if gap is None else gap
    if len(runs) > 1 and gap:
        apart = runs[1:, 0] - runs[:-1, 1] > gap
        apart |= runs[1:, 2] - runs[:-1, 2] != runs[1:, 0] - runs[:-1, 0]  # elsewhere in the bitmap
        starts, stops = np.append(True, apart), np.append(apart, True)
        runs = np.stack([runs[starts, 0], runs[stops, 1], runs[starts, 2]], axis=1)
    for lo, hi, bit in runs.tolist():
        start, at = lo, bit
        while start < hi:
            stop = min(start + (64 - at % 64 if at % 64 else _BLOCK), hi)
            yield slice(start, stop), slice(at >> 6, (at + stop - start + 63) >> 6), at & 63
            start, at = stop, at + stop - start


def _none(entries: Array, match: Match) -> bool:
    """Return whether no entry can match, as a bit that is asked for is set in none: one pass, in place of three.

    It is worth that pass where there was nothing in the block before.
    """
    return bool(match.value and ~int(np.bitwise_or.reduce(entries)) & match.value)


def _edges(hit: Bools) -> Runs:
    """Return the runs [start, stop) of true elements."""
    framed = np.zeros(hit.size + 2, dtype=np.bool_)
    framed[1:-1] = hit
    edges: Runs = np.flatnonzero(framed[1:] != framed[:-1]).reshape(-1, 2)
    return edges


def _flips(update: Update) -> np.uint64 | None:
    """Return the bits in which what matches differs from what it becomes, or None if that isn't the same for all."""
    where, bits = update.where, update.sets | update.clears
    return None if bits & ~where.mask else np.uint64((where.value ^ update.sets) & bits)


def _packed(hit: Bools, shift: int) -> Array:
    """Return words of bits, of which `hit` begins at bit `shift`."""
    if shift:  # then they are few, and of one word
        hit = np.concatenate((np.zeros(shift, dtype=np.bool_), hit))
    octets = np.packbits(hit, bitorder="little")
    if octets.size % 8:
        whole = np.zeros(octets.size + -octets.size % 8, dtype=np.uint8)
        whole[: octets.size] = octets
        octets = whole
    return octets.view(np.uint64)


def _set(words: Array, hits: Array) -> None:
    np.bitwise_or(words, hits, out=words)


def _publish(entries: Array, hit: Bools, hits: Array, notes: Notes, shift: int, out: Array, also: Array) -> None:
    for match, words in zip(notes, (out, also), strict=True):
        if match is not None:
            _set(words, hits if match == ANY else _packed(match(entries) & hit, shift))


def _change_at(entries: Array, index: Runs, update: Update) -> None:
    """Apply `update` to the entries `index`, all of which match, with one call that writes to `entries`."""
    entries[index] = entries[index] & np.uint64(~update.clears & _ALL) | np.uint64(update.sets)


def _note_at(old: Array, index: Runs, notes: Notes, place: Place, out: Array, also: Array, kept: Array) -> None:
    """Set the bits of the pages of the entries `index`, which were `old`."""
    for match, words in zip(notes, (out, also), strict=True):
        if match is not None:
            chosen = index if match == ANY else index[match(old)]
            _mark(np.stack([chosen, chosen + 1], axis=1), place, words, kept if words is out else None)


def _covered(hit: Bools, start: int, place: Place) -> int:
    """Return in how many words the pages in [lo, hi) are of entries that `hit`, counted by entry, the first `start`."""
    first, size, lo, hi, _ = place
    first += start * size
    # Of those that are neither wholly inside nor outside there are two at most: the one before and the one after.
    begin = min(max(-(-(lo - first) // size), 0), hit.size)
    end = min(max((hi - first) // size, begin), hit.size)
    words = int(np.count_nonzero(hit[begin:end])) * (size + 63 >> 6)
    for i in (begin - 1, end):
        if i in range(hit.size) and hit[i]:
            words += max(min(first + (i + 1) * size, hi) - max(first + i * size, lo) + 63 >> 6, 0)
    return words


def _mark(runs: Runs, place: Place, words: Array, kept: Array | None) -> None:
    """Set the bits of the pages of runs of entries [start, stop): of [lo, hi) in `words`, of others in `kept`."""
    first, size, lo, hi, end = place
    spans = first + runs * size
    fill(words, np.clip(spans, lo, hi))
    if kept is not None and kept.size:
        spans = spans[(spans[:, 0] < lo) | (spans[:, 1] > hi)]
        fill(kept, np.clip(spans, 0, lo))
        fill(kept, np.clip(spans, hi, max(end, hi)))


def _fill(words: Array, ranges: Runs) -> None:
    full = np.uint64(_ALL)
    head, last = ranges[:, 0] >> 6, ranges[:, 1] - 1 >> 6
    head_mask = full << (ranges[:, 0] & 63).astype(np.uint64)
    last_mask = full >> (-ranges[:, 1] & 63).astype(np.uint64)
    one = head == last
    np.bitwise_or.at(words, head[one], head_mask[one] & last_mask[one])
    np.bitwise_or.at(words, head[~one], head_mask[~one])
    np.bitwise_or.at(words, last[~one], last_mask[~one])
    inner, count = head + 1, np.maximum(last - head - 1, 0)
    total = int(count.sum())
    if total < _SHORT * count.size:
        where = np.repeat(inner - (np.cumsum(count) - count), count)
        where += np.arange(total)
        words[where] = full
        return
    for start, stop in zip(inner.tolist(), last.tolist(), strict=True):
        if start < stop:
            words[start:stop] = full
