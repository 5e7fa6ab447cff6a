"""Kernels in numpy and numexpr: the portable ones.

The masks are numexpr's, evaluated over blocks small enough that the temporaries stay in the cache. numexpr knows no
unsigned type, so descriptors and masks pass as int64 views: right bit for bit for ``& | ^ ~ ==``, and nothing else
is used.
"""

from collections.abc import Iterator

import numexpr as ne
import numpy as np
from numpy.typing import NDArray

from hwdbm.kernels import Tally
from hwdbm.pte import Match, Update

__all__ = ["HIT", "NEW", "fill", "rewrite", "rewrite_runs", "rewrite_within", "scan"]

Array = NDArray[np.uint64]
Runs = NDArray[np.int64]

HIT = "(pte & mask) == value"
NEW = "where(hit, (pte & keep) | sets, pte)"

_BLOCK = 1 << 17  # descriptors: 1 MiB of them, and 128 KiB of booleans
_GAP = 1 << 13  # descriptors: a shorter gap between two runs is bridged
_ALL = (1 << 64) - 1


def scan(pte: Array, runs: Runs, match: Match, out: Array) -> None:
    """Set in `out` the bit of each descriptor that matches."""
    for block, words in _blocks(runs):
        if _possible(pte[block], match):
            out[words] |= _packed(_hit(pte[block], match))


def rewrite(pte: Array, runs: Runs, update: Update, out: Array, also: Array) -> Tally:
    """Apply `update`, and set in `out` and `also` the bit of each descriptor that it changed."""
    tally = Tally()
    for block, words in _blocks(runs):
        entries = pte[block]
        tally += Tally(read=entries.size)
        if _possible(entries, update.where):
            hit = _hit(entries, update.where)
            tally += _publish(_packed(hit), out[words], also[words])
            _update(entries, hit, update)
    return tally


def rewrite_within(pte: Array, runs: Runs, update: Update, within: Array, out: Array, also: Array) -> Tally:
    """Apply `update` where the bit in `within` is set; otherwise as `rewrite`."""
    tally = Tally()
    for block, words in _blocks(runs):
        entries = pte[block]
        (wanted,) = within[words].nonzero()
        if wanted.size:
            tally += Tally(read=int(np.minimum(64, entries.size - 64 * wanted).sum()))  # the last may be a part
            hits = _packed(_hit(entries, update.where)) & within[words]
            tally += _publish(hits, out[words], also[words])
            chosen = np.unpackbits(hits.view(np.uint8), count=entries.size, bitorder="little")
            _update(entries, chosen.view(np.bool_), update)
    return tally


def fill(words: Array, ranges: Runs) -> None:
    """Set the bits of each row [start, stop) of `ranges`."""
    ranges = ranges[ranges[:, 0] < ranges[:, 1]]
    for start in range(0, len(ranges), _BLOCK // 8):
        _fill(words, ranges[start : start + _BLOCK // 8])


def rewrite_runs(entries: Array, update: Update) -> Runs:
    """Apply `update` to any entries, and return the runs [start, stop) of those that it was applied to."""
    hit = update.where(entries)
    if update.sets | update.clears:
        entries[hit] = update(entries[hit])
    edges = np.flatnonzero(np.diff(hit, prepend=False, append=False))
    return edges.astype(np.int64).reshape(-1, 2)


def _blocks(runs: Runs) -> Iterator[tuple[slice, slice]]:
    """Yield the blocks of the runs as slices of descriptors and of words.

    Short gaps are read too: nothing matches there, and a block costs less than two calls do.
    """
    far = np.flatnonzero(runs[1:, 0] - runs[:-1, 1] > _GAP)
    starts = runs[np.concatenate(([0], far + 1)), 0] if len(runs) else runs[:, 0]
    stops = runs[np.concatenate((far, [-1])), 1] if len(runs) else runs[:, 1]
    for lo, hi in zip(starts.tolist(), stops.tolist(), strict=True):
        for start in range(lo, hi, _BLOCK):
            stop = min(start + _BLOCK, hi)
            yield slice(start, stop), slice(start >> 6, (stop + 63) >> 6)


def _possible(pte: Array, match: Match) -> bool:
    """Return whether a match can't be ruled out by what all descriptors of the block have in common.

    Two reductions at the speed of memory spare most of the work where nothing was written.
    """
    ones, zeros = match.value, match.mask & ~match.value
    if int(np.bitwise_or.reduce(pte)) & ones != ones:
        return False
    return not zeros or not int(np.bitwise_and.reduce(pte)) & zeros


def _hit(pte: Array, match: Match) -> NDArray[np.bool_]:
    masks = _signed(mask=match.mask, value=match.value)
    hit: NDArray[np.bool_] = ne.evaluate(HIT, {"pte": pte.view(np.int64), **masks}, {})
    return hit


def _packed(hit: NDArray[np.bool_]) -> Array:
    octets = np.packbits(hit, bitorder="little")
    if octets.size % 8:
        octets = np.pad(octets, (0, -octets.size % 8))
    return octets.view(np.uint64)


def _update(pte: Array, hit: NDArray[np.bool_], update: Update) -> None:
    """Rewrite the descriptors where `hit`: one by one where they are few, the whole block where they are many."""
    if np.count_nonzero(hit) * 16 < hit.size:
        (index,) = hit.nonzero()
        pte[index] = update(pte[index])
    else:
        signed = pte.view(np.int64)
        masks = _signed(keep=~update.clears & _ALL, sets=update.sets)
        ne.evaluate(NEW, {"pte": signed, "hit": hit, **masks}, {}, out=signed)


def _signed(**masks: int) -> dict[str, np.int64]:
    return {name: np.uint64(mask).astype(np.int64) for name, mask in masks.items()}


def _publish(hits: Array, out: Array, also: Array) -> Tally:
    np.bitwise_or(out, hits, out=out)
    np.bitwise_or(also, hits, out=also)
    return Tally(0, int(np.bitwise_count(hits).sum(dtype=np.int64)), int(np.count_nonzero(hits)))


def _fill(words: Array, ranges: Runs) -> None:
    full = np.uint64(_ALL)
    head, last = ranges[:, 0] >> 6, ranges[:, 1] - 1 >> 6
    head_mask = full << (ranges[:, 0] & 63).astype(np.uint64)
    last_mask = full >> (63 - (ranges[:, 1] - 1 & 63)).astype(np.uint64)
    one = head == last
    np.bitwise_or.at(words, head[one], head_mask[one] & last_mask[one])
    np.bitwise_or.at(words, head[~one], head_mask[~one])
    np.bitwise_or.at(words, last[~one], last_mask[~one])
    for first, stop in zip((head + 1).tolist(), last.tolist(), strict=True):
        if first < stop:
            words[first:stop] = full
