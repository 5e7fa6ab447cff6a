"""Runs of descriptors whose bits begin anywhere in their words: each implementation against a loop."""

from itertools import product
from types import ModuleType

import numpy as np
import pytest

from hwdbm import pte

N, WORDS = 700, 80
MATCH, RULE = pte.dirty(3), pte.clean(3)
BITS = (0, 1, 2, 62, 63, 64, 65, 126, 127, 128, 191, 1023, 4031, 4032, 4033, 4095)
LENGTHS = (0, 1, 2, 63, 64, 65, 127, 128, 129, 300)


def runs_from(bit: int, length: int) -> np.ndarray:
    """Return two runs: one with its first bit there, and another behind it, a bit or a word further on than it was."""
    first = [3, 3 + length, bit]
    return np.array([first, [350, 350 + length, bit + length + bit % 67]], dtype=np.int64)


@pytest.mark.parametrize("bit", BITS)
def test_each_bit_is_its_own_descriptors(kernels: ModuleType, bit: int) -> None:
    rng = np.random.default_rng(bit)
    entries = np.where(rng.random(N) < 0.4, np.uint64(MATCH.value), np.uint64(pte.dirty(3).value & ~pte.S2AP_W))
    asked = rng.integers(0, 1 << 64, WORDS, dtype=np.uint64)
    asked[::3] = 0
    for length, within in product(LENGTHS, (False, True)):
        runs, pages = runs_from(bit, length), entries.copy()
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
        entries_after = entries.copy()
        entries_after[[page for page, _ in found]] &= ~np.uint64(pte.S2AP_W)
        assert np.array_equal(pages, entries_after)
        assert tally.changed == len(found)
