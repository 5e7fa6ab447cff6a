"""Runs of descriptors whose bits begin anywhere in their words: each implementation against a loop."""

from itertools import product
from types import ModuleType

import numpy as np
import pytest

from hwdbm import pte
from hwdbm.kernels import Place

N, WORDS = 700, 80
MATCH, RULE = pte.dirty(3), pte.clean(3)
BITS = (0, 1, 2, 62, 63, 64, 65, 126, 127, 128, 191, 1023, 4031, 4032, 4033, 4095)
LENGTHS = (0, 1, 2, 63, 64, 65, 127, 128, 129, 300)


def runs_from(bit: int, length: int, behind: int) -> np.ndarray:
    """Return two runs: one with its first bit there, and another whose bits are so far behind."""
    return np.array([[3, 3 + length, bit], [350, 350 + length, bit + behind]], dtype=np.int64)


@pytest.mark.parametrize("bit", BITS)
def test_each_bit_is_its_own_descriptors(kernels: ModuleType, bit: int) -> None:
    rng = np.random.default_rng(bit)
    entries = np.where(rng.random(N) < 0.4, np.uint64(MATCH.value), np.uint64(pte.dirty(3).value & ~pte.S2AP_W))
    asked = rng.integers(0, 1 << 64, WORDS, dtype=np.uint64)
    asked[::3] = 0
    for length, within in product(LENGTHS, (False, True)):
        # Anywhere, as far as the descriptors are, and as far as these are from the end of the others.
        behind = (length + bit % 67, 347, max(347 - length, length))[(bit + length) % 3]
        runs, pages = runs_from(bit, length, behind), entries.copy()
        pages[3 + length : 350] &= ~np.uint64(pte.VALID)  # what is between runs isn't there
        before = pages.copy()
        places = [(start + i, at + i) for start, stop, at in runs.tolist() for i in range(stop - start)]
        found = [
            (page, at) for page, at in places
            if MATCH(int(entries[page])) and (not within or int(asked[at // 64]) >> at % 64 & 1)
        ]  # fmt: skip
        expected = np.zeros(WORDS * 64, dtype=np.uint8)
        expected[[at for _, at in found]] = 1
        bitmap = np.packbits(expected, bitorder="little").view(np.uint64)
        out, also, scanned = (np.zeros(WORDS, dtype=np.uint64) for _ in range(3))
        if within:
            tally = kernels.rewrite_within(pages, runs, RULE, asked, out, also)
        else:
            kernels.scan(pages, runs, MATCH, scanned)
            assert np.array_equal(scanned, bitmap)
            tally = kernels.rewrite(pages, runs, RULE, out, also)
        assert np.array_equal(out, bitmap)
        assert np.array_equal(also, bitmap)
        before[[page for page, _ in found]] &= ~np.uint64(pte.S2AP_W)
        assert np.array_equal(pages, before)
        assert tally.changed == len(found)


@pytest.mark.parametrize(("first", "size"), [(0, 1), (0, 16), (-5, 16), (-511, 512), (0, 512), (-1, 2)])
def test_pages_of_entries_are_inside_or_kept(kernels: ModuleType, first: int, size: int) -> None:
    """Pages of a leaf that aren't asked for are kept apart, from the slot's first page to its last."""
    count = 6
    end = first + count * size
    for lo, hi in {(0, end), (end // 3, end // 2), (1, max(end - 1, 1)), (end // 2, end), (end, end)}:
        entries = np.array([MATCH.value] * count, dtype=np.uint64)
        out, also, kept = (np.zeros(-(-end // 64), dtype=np.uint64) for _ in range(3))
        index = np.array([0, 1, 4, 5])
        kernels.rewrite_at(entries, index, RULE, Place(first, size, lo, hi, end), out, also, kept)
        pages = [page for at in index for page in range(max(first + at * size, 0), first + (at + 1) * size)]
        inside = [page for page in pages if lo <= page < hi]
        for words, expected in ((out, inside), (also, inside), (kept, [page for page in pages if page not in inside])):
            bits = np.unpackbits(words.view(np.uint8), bitorder="little")
            assert bits.nonzero()[0].tolist() == expected, f"[{lo}, {hi}) of {end}"
        assert np.flatnonzero(entries & np.uint64(pte.S2AP_W)).tolist() == [2, 3]
