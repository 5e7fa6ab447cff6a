"""Runs: descriptors that lie anywhere, in table pages of a RAM image, each run with the bit where it begins.

What a kernel does to them is what a loop over scalars does to the same descriptors in a row.
"""

from itertools import pairwise, product
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from effort import EFFORT
from hypothesis import given, settings
from hypothesis import strategies as st

from hwdbm import pte
from hwdbm.bitmap import word_count
from hwdbm.kernels import BOTH, Notes, vector
from hwdbm.pte import Match, Update

ALL = (1 << 64) - 1
KINDS = np.array([0, 1, 3, *(3 | bits for bits in (pte.DBM, pte.S2AP_W, pte.DBM | pte.S2AP_W))], dtype=np.uint64)
RULES = (pte.clean, pte.track, pte.wrprotect, pte.mkold)
NOTES = (BOTH, Notes(pte.writable(3), None), Notes(pte.dirty(3), pte.writable(3)), Notes(None, None))


class Ram:
    """Tables of `width` descriptors in a memory that is full of what looks dirty, and which bits they stand for.

    Parameters
    ----------
    rng : Generator
        What chooses them.
    tables : int
        How many tables there are, in an order of their own.
    width : int
        Descriptors of a table.
    lead : int
        The bit of the first table's first descriptor.
    holes : bool
        Whether bits are left out between tables.
    """

    def __init__(self, rng: np.random.Generator, tables: int, width: int, lead: int, holes: bool) -> None:
        places = np.sort(rng.choice(3 * tables, tables, replace=False)) * width
        if tables and rng.random() < 0.7:
            rng.shuffle(places)
        first = lead + width * (np.arange(tables) + (np.cumsum(rng.integers(0, 3, tables)) if holes else 0))
        for number in np.flatnonzero(np.diff(places) == np.diff(first)).tolist():
            if ((places > places[number]) & (places < places[number + 1])).any():
                places.sort()  # another table must not lie where a kernel may read through
                break
        self.runs = np.array([places, places + width, first], dtype=np.int64).T.copy()
        if tables:  # the slot begins and ends inside of a table
            self.runs[0, [0, 2]] += min(width - 1, int(rng.integers(0, 70)))
            self.runs[-1, 1] -= min(int(self.runs[-1, 1] - self.runs[-1, 0]), int(rng.integers(0, 70)))
        # As a kernel may read between runs that are as far apart as their bits are, nothing matches there.
        self.memory = np.full((3 * tables + 1) * width, 0x7_0000 | pte.AF | pte.dirty(3).value, dtype=np.uint64)
        rows = self.runs.tolist()
        for (begin, stop, bit), (start, _, after) in pairwise(rows):
            if start - begin == after - bit:
                self.memory[stop:start] = 0
        none = np.empty(0, dtype=np.int64)
        self.where = np.concatenate([none, *(np.arange(start, stop) for start, stop, _ in rows)])
        self.bits = np.concatenate([none, *(np.arange(bit, bit + stop - start) for start, stop, bit in rows)])
        junk = rng.integers(0, ALL, self.where.size, np.uint64, endpoint=True) & np.uint64(ALL & ~pte.dirty(3).mask)
        self.memory[self.where] = rng.choice(KINDS, self.where.size) | junk
        self.size = max((bit + stop - start for start, stop, bit in rows), default=0)

    def words(self, rng: np.random.Generator) -> np.ndarray:
        return rng.integers(0, ALL, word_count(self.size), np.uint64) & rng.integers(0, ALL, 1, np.uint64)

    def marked(self, words: np.ndarray, chosen: np.ndarray) -> list[int]:
        numbers = words.tolist()
        for bit in self.bits[chosen].tolist():
            numbers[bit // 64] |= 1 << bit % 64
        return numbers


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vector, "_BLOCK", 128)
    monkeypatch.setattr(vector, "_GAP", 600)


CASES = given(
    seed=st.integers(0, 1 << 32),
    tables=st.integers(0, 6),
    width=st.sampled_from([64, 512]),
    lead=st.integers(0, 200),
    holes=st.booleans(),
)


@settings(max_examples=25 * EFFORT)
@CASES
def test_runs_anywhere(
    kernels: ModuleType, small_blocks: None, seed: int, tables: int, width: int, lead: int, holes: bool
) -> None:
    rng = np.random.default_rng(seed)
    ram = Ram(rng, tables, width, lead, holes)
    for rule, notes, asked in product(RULES, NOTES, (False, True)):
        check_rewrite(kernels, ram, rng, rule(3), notes, asked)
    for match in (pte.dirty(3), pte.leaf(3)):
        check_scan(kernels, ram, rng, match)
    for notes in NOTES:
        check_exchange(kernels, ram, rng, notes)


def check_scan(kernels: Any, ram: Ram, rng: np.random.Generator, match: Match) -> None:
    memory, out = ram.memory.copy(), ram.words(rng)
    expected = ram.marked(out, match(memory[ram.where]))
    kernels.scan(memory, ram.runs, match, out)
    assert out.tolist() == expected
    assert np.array_equal(memory, ram.memory)


def check_rewrite(kernels: Any, ram: Ram, rng: np.random.Generator, update: Update, notes: Notes, asked: bool) -> None:
    memory, out, also, mask = ram.memory.copy(), ram.words(rng), ram.words(rng), ram.words(rng)
    old = memory[ram.where]
    hit = update.where(old)
    if asked:
        hit &= (mask[ram.bits >> 6] >> (ram.bits & 63).astype(np.uint64) & np.uint64(1)).astype(bool)
    noted = [
        ram.marked(words, hit & match(old) if match else hit & False)
        for words, match in zip((out, also), notes, strict=True)
    ]
    expected = memory.copy()
    expected[ram.where[hit]] = update(old[hit])
    if asked:
        tally = kernels.rewrite_within(memory, ram.runs, update, mask, out, also, notes)
    else:
        tally = kernels.rewrite(memory, ram.runs, update, out, also, notes)
    assert np.array_equal(memory, expected)
    assert [out.tolist(), also.tolist()] == noted
    assert tally.changed == np.count_nonzero(hit)


def check_exchange(kernels: Any, ram: Ram, rng: np.random.Generator, notes: Notes) -> None:
    memory, out, also = ram.memory.copy(), ram.words(rng), ram.words(rng)
    old, new = memory[ram.where], rng.integers(0, ALL, ram.where.size, np.uint64)
    noted = [
        ram.marked(words, match(old) if match else np.zeros(old.size, dtype=np.bool_))
        for words, match in zip((out, also), notes, strict=True)
    ]
    expected, values = memory.copy(), new.copy()
    expected[ram.where] = new
    kernels.exchange(memory, ram.runs, values, out, also, notes)
    assert np.array_equal(memory, expected)
    assert values.tolist() == old.tolist()
    assert [out.tolist(), also.tolist()] == noted
