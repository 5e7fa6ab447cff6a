"""Proofs for all 2**64 descriptors: each vector form says what the scalar form says, and each scalar form the table.

What runs is the package's own code (see `symbolic`): the ifs of `pte.state`, the masks of `Match` and `Update` in
both of their branches, what the vector kernels flip, and the functions that numba compiles. Bits
are written out as numbers here, so that a constant wrong in `pte` is found as well.
"""

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest
from numba import njit
from symbolic import Word, counterexample, prove

from hwdbm import pte
from hwdbm.kernels import BOTH, atomic, fused, vector
from hwdbm.pte import AddressBits, Match, State, Update

LEVELS = (1, 2, 3)
B7, B10, B51 = 1 << 7, 1 << 10, 1 << 51
ALL = (1 << 64) - 1

READ_ONLY, UNTRACKED = State.READ_ONLY, State.UNTRACKED
CLEAN, DIRTY = State.WRITABLE_CLEAN, State.WRITABLE_DIRTY
LEAF = {READ_ONLY, UNTRACKED, CLEAN, DIRTY}

PREDICATES = {  # the states in which each is true
    pte.leaf: LEAF,
    pte.read_only: {READ_ONLY},
    pte.untracked: {UNTRACKED},
    pte.writable_clean: {CLEAN},
    pte.dirty: {DIRTY},
    pte.writable: {UNTRACKED, DIRTY},
    pte.tracked: {CLEAN, DIRTY},
}

UPDATES = {  # from which state to which, with the bits set and cleared; all other states stay as they are
    pte.clean: {DIRTY: (CLEAN, 0, B7)},
    pte.arm: {UNTRACKED: (CLEAN, B51, B7)},
    pte.disarm: {CLEAN: (UNTRACKED, B7, B51), DIRTY: (UNTRACKED, 0, B51)},
    pte.set_dbm: {UNTRACKED: (DIRTY, B51, 0)},
    pte.clear_dbm: {CLEAN: (READ_ONLY, 0, B51), DIRTY: (READ_ONLY, 0, B7 | B51)},
    pte.wrprotect: {UNTRACKED: (READ_ONLY, 0, B7), DIRTY: (READ_ONLY, 0, B7 | B51)},
    pte.track: {UNTRACKED: (CLEAN, B51, B7), DIRTY: (CLEAN, 0, B7)},
    pte.relax: {READ_ONLY: (UNTRACKED, B7, 0), CLEAN: (UNTRACKED, B7, B51), DIRTY: (UNTRACKED, 0, B51)},
    pte.relax_dirty: {READ_ONLY: (DIRTY, B51 | B7, 0), UNTRACKED: (DIRTY, B51, 0), CLEAN: (DIRTY, B7, 0)},
    pte.allow: {READ_ONLY: (UNTRACKED, B7, 0)},
    pte.allow_dbm: {READ_ONLY: (CLEAN, B51, 0)},
    pte.mkold: {state: (state, 0, B10) for state in LEAF},
    pte.mkyoung: {state: (state, B10, 0) for state in LEAF},
}

Predicate = Callable[[int], Match]
Change = Callable[[int], Update]
Claim = Callable[[Any], Any]

level = pytest.mark.parametrize("level", LEVELS)
predicate = pytest.mark.parametrize("predicate", [*PREDICATES, pte.young], ids=lambda rule: rule.__name__)
change = pytest.mark.parametrize("change", UPDATES, ids=lambda rule: rule.__name__)
# What the host allows is granted: a write that faulted, and what the log alone had write-protected.
GRANTS = (pte.relax, pte.relax_dirty, pte.allow, pte.allow_dbm)
tracking = pytest.mark.parametrize(
    "change", [rule for rule in UPDATES if rule not in GRANTS], ids=lambda rule: rule.__name__
)


def array(desc: Any) -> Any:
    """Return an array of one element that numpy's operators hand on to `Word`."""
    return np.array([desc], dtype=object)


# --- states -------------------------------------------------------------------------------------------------


def spelled_out(desc: Any, level: int) -> State:
    """Return the state by the table of the design notes, in which each row is a line."""
    low = desc & 0b11
    kinds = {0b00: False, 0b10: False, 0b01: level < 3, 0b11: level == 3}
    (is_leaf,) = (kinds[bits] for bits in kinds if low == bits)
    if not is_leaf:
        if low & 1 == 0:
            return State.ABSENT
        return State.RESERVED if level == 3 else State.TABLE
    rows = {(0, 0): READ_ONLY, (0, 1): UNTRACKED, (1, 0): CLEAN, (1, 1): DIRTY}
    return next(rows[dbm, write] for dbm, write in rows if desc >> 51 & 1 == dbm and desc >> 7 & 1 == write)


@level
def test_state_is_the_table(level: int) -> None:
    prove(lambda d: pte.state(d, level) is spelled_out(d, level))


@level
def test_state_of_an_array_is_that_of_its_elements(level: int) -> None:
    prove(lambda d: pte.state(array(d), level)[0] == pte.state(d, level))


@level
def test_only_four_bits_decide_the_state(level: int) -> None:
    ignored = ALL & ~(0b11 | B7 | B51)
    prove(lambda d, junk: pte.state(d ^ (junk & ignored), level) is pte.state(d, level), words=2)


# --- predicates ---------------------------------------------------------------------------------------------


@level
@pytest.mark.parametrize("predicate", PREDICATES, ids=lambda rule: rule.__name__)
def test_predicate_is_its_states(predicate: Predicate, level: int) -> None:
    prove(lambda d: bool(predicate(level)(d)) is (pte.state(d, level) in PREDICATES[predicate]))


@level
def test_young_is_a_leaf_with_bit_10(level: int) -> None:
    prove(lambda d: bool(pte.young(level)(d)) is (pte.state(d, level) in LEAF and bool(d >> 10 & 1)))


@pytest.mark.parametrize("level", [1, 2])
def test_table_is_the_state_table(level: int) -> None:
    prove(lambda d: bool(pte.table(level)(d)) is (pte.state(d, level) is State.TABLE))


@level
@predicate
def test_predicate_of_an_array(predicate: Predicate, level: int) -> None:
    prove(lambda d: predicate(level)(array(d))[0] == bool(predicate(level)(d)))


@level
@predicate
def test_predicate_in_numba(predicate: Predicate, level: int) -> None:
    match = predicate(level)
    mask, value = np.uint64(match.mask), np.uint64(match.value)
    prove(lambda d: bool(fused._hit.py_func(d, mask, value)) is bool(match(d)))


# --- updates ------------------------------------------------------------------------------------------------


def is_its_states(update: Update, rows: Any, level: int) -> Claim:
    """Return the claim that `update` does what `rows` say, to the states they name, and nothing to others."""

    def claim(desc: Any) -> Any:
        before = pte.state(desc, level)
        if before not in rows:
            return update(desc) == desc
        after, sets, clears = rows[before]
        new = update(desc)
        return new == (desc & (ALL & ~clears) | sets) and pte.state(new, level) is after

    return claim


@level
@change
@pytest.mark.alike(3)
def test_update_is_its_states(change: Change, level: int) -> None:
    prove(is_its_states(change(level), UPDATES[change], level))


@level
@tracking
def test_update_matches_what_it_changes(change: Change, level: int) -> None:
    # The tally's `changed`, and the bits of a rewrite, count matches.
    update = change(level)
    prove(lambda d: bool(update.where(d)) is not bool(update(d) == d))


@level
@change
def test_update_changes_only_mutable_bits(change: Change, level: int) -> None:
    assert pte.MUTABLE == B7 | B10 | B51
    prove(lambda d: (change(level)(d) ^ d) & (ALL & ~pte.MUTABLE) == 0)


def adds_dbm_to_writable_only(update: Update, level: int) -> Claim:
    return lambda d: not update(d) & (~d & B51) or (pte.state(d, level) is UNTRACKED and bool(d & B7))


@level
@tracking
def test_dbm_is_only_added_to_a_writable_leaf(change: Change, level: int) -> None:
    prove(adds_dbm_to_writable_only(change(level), level))


@level
@change
def test_update_of_an_array(change: Change, level: int) -> None:
    update = change(level)
    prove(lambda d: update(array(d))[0] == update(d))


def flips_are_the_update(update: Update, flips: int | None) -> Claim:
    """Return the claim that a descriptor that matches becomes what it is with some bits flipped."""
    return lambda d: not update.where(d) or d ^ flips == update(d)


@level
@change
def test_update_in_vector(change: Change, level: int) -> None:
    flips = vector._flips(change(level))
    if flips is None:
        assert change in (pte.relax, pte.relax_dirty, pte.disarm, pte.clear_dbm, pte.wrprotect, pte.track)
    else:
        prove(flips_are_the_update(change(level), flips))


@level
@change
def test_update_in_numba(change: Change, level: int) -> None:
    update = change(level)
    mask, value, keep, sets = fused._masks(update)
    prove(lambda d: (d & keep | sets if fused._hit.py_func(d, mask, value) else d) == update(d))


def word64(pages: Any, at: int, mask: Any, value: Any) -> np.uint64:
    """Do as `fused._word64`."""
    return np.uint64(sum(bool(fused._hit(pages[at + i], mask, value)) << i for i in range(64)))


def change64(pages: Any, at: int, word: np.uint64, keep: Any, sets: Any) -> None:
    """Do as `fused._change64`."""
    for i in range(64):
        if int(word) >> i & 1:
            pages[at + i] = pages[at + i] & keep | sets


def popcount(word: np.uint64) -> np.uint64:
    """Do as `fused._popcount`."""
    return np.uint64(int(word).bit_count())


def lowest(word: np.uint64) -> np.uint64:
    """Do as `fused._lowest`."""
    return np.uint64((int(word) & -int(word)).bit_length() - 1)


@njit
def compiled_word64(pages: Any, at: int, mask: Any, value: Any) -> np.uint64:
    return fused._word64(pages, at, mask, value)


@njit
def compiled_change64(pages: Any, at: int, word: np.uint64, keep: Any, sets: Any) -> None:
    fused._change64(pages, at, word, keep, sets)


@njit
def compiled_counts(word: np.uint64) -> Any:
    return fused._popcount(word), fused._lowest(word)


@change
def test_what_llvm_makes_is_what_the_proofs_take_it_for(change: Change) -> None:
    update, rng = change(3), np.random.default_rng(5)
    mask, value, keep, sets = fused._masks(update)
    one = np.uint64(1)
    words = [
        *(one << np.arange(64, dtype=np.uint64)),
        np.uint64(0),
        np.uint64(ALL),
        *rng.integers(0, ALL, 20, np.uint64),
    ]
    for number, word in enumerate(words):
        at = number % 9  # any alignment
        chosen = np.unpackbits(word.reshape(1).view(np.uint8), bitorder="little").view(np.bool_)
        pages = rng.integers(0, ALL, 80, np.uint64)
        pages[at : at + 64] = np.where(chosen, pages[at : at + 64] & ~mask | value, value ^ mask)
        assert compiled_word64(pages, at, mask, value) == word64(pages, at, mask, value) == word
        expected = pages.copy()
        change64(expected, at, word, keep, sets)
        compiled_change64(pages, at, word, keep, sets)
        assert pages.tolist() == expected.tolist()
        assert word == 0 or compiled_counts(word) == (popcount(word), lowest(word))


INSTRUCTIONS = {"_word64": word64, "_change64": change64, "_popcount": popcount, "_lowest": lowest}


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let numba's functions run as the Python that they were written in, and what LLVM makes as Python that says so."""
    for name, function in list(vars(fused).items()):
        if hasattr(function, "py_func"):
            monkeypatch.setattr(fused, name, function.py_func)
    for name, function in INSTRUCTIONS.items():
        monkeypatch.setattr(fused, name, function)
    with np.errstate(over="ignore"):  # where machine words wrap around, numpy's scalars warn
        yield


# A last group that is a part, one group, a group and a part, and four groups together: where few descriptors of a
# group match they are rewritten one by one, and where many do all together.
PASSES = [(0, 1, []), (5, 64, []), (64, 66, [65]), (70, 256, []), (70, 256, [66, 69, 71, 100, 101, 127])]


def rewrites_one(update: Update, place: int, n: int, others: list[int], within: bool) -> Claim:
    """Return the claim that a fused pass does with a descriptor at `place` among `n` what `update` does with it.

    `others`, in the same group, match.
    """
    mask = np.zeros((n + 63) // 64, dtype=np.uint64)
    mask[place // 64] = sum(1 << i % 64 for i in (place, *others))
    arguments = np.array([[0, n, 0]]), *fused._masks(update), *fused._noted(BOTH), *([mask] if within else [])
    rewrite = fused._rewrite_within if within else fused._rewrite
    before = np.zeros(n, dtype=object)
    before[others] = update.where.value
    after = before.copy()
    after[others] = update(update.where.value)

    def claim(desc: Any) -> Any:
        pages, hit = before.copy(), bool(update.where(desc))
        pages[place] = desc
        out, also = np.zeros((2, mask.size), dtype=np.uint64)
        _, changed, words = rewrite(pages, *arguments, out, also)
        assert (changed, words) == (len(others) + hit, bool(others or hit))
        expected = mask & ~np.uint64(0 if hit else 1 << place % 64)
        assert out.tolist() == also.tolist() == expected.tolist()
        assert np.delete(pages, place).tolist() == np.delete(after, place).tolist()
        return pages[place] == update(desc)

    return claim


def prove_fused_passes(update: Update) -> None:
    for case, within in product(PASSES, (False, True)):
        prove(rewrites_one(update, *case, within))


# So many words of a mask are looked at together, and where less than four times as many pages are asked, each alone: of
# one word, that is three pages, and of 256 all that there are here.
@pytest.mark.parametrize("some", [1, 256])
@change
@pytest.mark.alike(3)
def test_update_in_a_fused_pass(change: Change, some: int, interpreted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_SOME", some)
    prove_fused_passes(change(3))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mutant"),
    [
        ("_hit", lambda d, mask, value: (d & value) == value),
        ("_hit", lambda d, mask, value: (d & mask) != value),
        ("_change64", lambda pages, at, word, keep, sets: change64(pages, at, np.uint64(ALL), keep, sets)),
        ("_change64", lambda pages, at, word, keep, sets: change64(pages, at, word, keep, sets & keep)),
        ("_rewrite_few", lambda *arguments: np.uint64(0)),
        ("_popcount", lambda word: word),
        ("_lowest", lambda word: np.uint64(0)),
    ],
)
def test_proof_of_a_fused_pass_finds(
    name: str, mutant: Any, interpreted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, name, mutant)
    update = Update(pte.untracked(3), sets=B10, clears=B7 | B10)  # with zeros, and what is set is cleared as well
    with pytest.raises(AssertionError):
        prove_fused_passes(update)


# --- arithmetic ---------------------------------------------------------------------------------------------


def counts_bits(popcount: Callable[[Any], Any]) -> Claim:
    """Return the claim that `popcount` is the sum of the bits.

    They are added up in pairs, as the code does it: a proof for another order takes z3 half a minute.
    """

    def claim(word: Any) -> Any:
        sums = [word >> bit & 1 for bit in range(64)]
        while len(sums) > 1:
            sums = [low + high for low, high in zip(sums[::2], sums[1::2], strict=True)]
        return popcount(word) == sums[0]

    return claim


@pytest.mark.slow  # several seconds of z3; all that count bits are compared with loops in tests/kernels
def test_popcount() -> None:
    prove(counts_bits(atomic._popcount.py_func))


def cleans_without_a_mask_array(level: int) -> Claim:
    """Return the claim that DBM, shifted right by 44, is the S2AP[1] that cleaning a leaf clears."""
    return lambda d: not pte.leaf(level)(d) or d & ~((d & pte.DBM) >> 44) == pte.clean(level)(d)


@level
def test_dbm_shifted_by_44_is_the_dirty_bit(level: int) -> None:
    prove(cleans_without_a_mask_array(level))


# --- constructors and addresses -----------------------------------------------------------------------------

FIELDS = [  # where 51:48 are, the level, the address bits that the descriptor doesn't hold, and the top one
    *((AddressBits.PA48, 3, shift, 48) for shift in (12, 14, 16)),
    *((AddressBits.PA48, 2, shift, 48) for shift in (21, 25, 29)),
    (AddressBits.PA48, 1, 30, 48),
    (AddressBits.LPA, 3, 16, 52),
    (AddressBits.LPA, 2, 29, 52),
    (AddressBits.LPA, 1, 42, 52),
    *((AddressBits.LPA2, 3, shift, 52) for shift in (12, 14)),
    *((AddressBits.LPA2, 2, shift, 52) for shift in (21, 25)),
    *((AddressBits.LPA2, 1, shift, 52) for shift in (30, 36)),
]
MADE = [
    ({"writable": False}, READ_ONLY),
    ({}, UNTRACKED),
    ({"dbm": True}, CLEAN),
    ({"dbm": True, "dirty": True}, DIRTY),
]


@pytest.mark.parametrize(("bits", "level", "shift", "top"), FIELDS)
def test_leaf_keeps_its_address_and_its_state(bits: AddressBits, level: int, shift: int, top: int) -> None:
    aligned = (1 << top) - (1 << shift)
    for options, state in MADE:

        def claim(pa: Any, options: Any = options, state: State = state) -> Any:
            desc = pte.make_leaf(pa & aligned, level, bits=bits, **options)
            same = pte.output_address(desc, shift, bits) == pa & aligned
            return same and pte.state(desc, level) is state

        prove(claim)


@pytest.mark.parametrize(
    ("bits", "shift", "top"), sorted({(b, s, t) for b, level, s, t in FIELDS if level == 3}, key=str)
)
def test_table_keeps_its_address(bits: AddressBits, shift: int, top: int) -> None:
    aligned = (1 << top) - (1 << shift)

    def claim(pa: Any) -> Any:
        desc = pte.make_table(pa & aligned, bits)
        same = pte.output_address(desc, shift, bits) == pa & aligned
        return same and all(pte.state(desc, level) is State.TABLE for level in (1, 2))

    prove(claim)


@change
@level
@pytest.mark.alike(2)
def test_update_leaves_the_address(change: Change, level: int) -> None:
    shift = {1: 30, 2: 21, 3: 12}[level]
    for bits in AddressBits:
        prove(
            lambda d, bits=bits: pte.output_address(change(level)(d), shift, bits) == pte.output_address(d, shift, bits)
        )


# --- the prover finds what is wrong -------------------------------------------------------------------------


def without(match: Match, bits: int) -> Match:
    return Match(match.mask & ~bits, match.value & ~bits)


def wrong_dirty(match: Match, level: int) -> Claim:
    return lambda d: bool(match(d)) is (pte.state(d, level) is DIRTY)


def wrong_popcount(word: Any) -> Any:
    word = word - ((word >> 1) & 0x5555555555555555)
    word = (word & 0x3333333333333333) + ((word >> 2) & 0x3333333333333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F0F0F0F07
    return (word * 0x0101010101010101) >> 56


EVERYWHERE = Match(0, 0)
MUTANTS: dict[str, Claim] = {
    "dirty without V": wrong_dirty(without(pte.dirty(3), 1), 3),
    "dirty without the type": wrong_dirty(without(pte.dirty(2), 2), 2),
    "dirty at level 2 with the type of level 3": wrong_dirty(pte.dirty(3), 2),
    "dirty without DBM": wrong_dirty(without(pte.dirty(3), B51), 3),
    "dirty, and young": wrong_dirty(pte.dirty(3).also(ones=B10), 3),
    "clean everywhere": is_its_states(Update(EVERYWHERE, clears=B7), UPDATES[pte.clean], 3),
    "clean what may be written": is_its_states(Update(pte.writable(3), clears=B7), UPDATES[pte.clean], 3),
    "wrprotect that leaves DBM": is_its_states(Update(pte.writable(3), clears=B7), UPDATES[pte.wrprotect], 3),
    "DBM on what is read-only, as the RFC set it": adds_dbm_to_writable_only(
        Update(pte.leaf(3), sets=B51, clears=B7), 3
    ),
    "a flip that the predicate doesn't ask for": flips_are_the_update(Update(pte.leaf(3), clears=B7), B7),
    "a flip too few": flips_are_the_update(pte.arm(3), B51),
    "popcount with a mask that lacks a bit": counts_bits(wrong_popcount),
    "the shift trick on what is no leaf": lambda d: d & ~((d & pte.DBM) >> 44) == pte.clean(3)(d),
    "one descriptor in 2**64": lambda d: d != 0xFEDC_BA98_7654_3210,
}


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS)
def test_prover_finds_a_counterexample(mutant: str) -> None:
    claim = MUTANTS[mutant]
    found = counterexample(claim)
    assert found is not None
    assert not claim(*found), "no counterexample when the same code runs on the number"


def test_every_path_is_run() -> None:
    seen = set()

    def claim(desc: Word) -> bool:
        seen.add(pte.state(desc, 3))
        return True

    prove(claim)
    assert seen == set(State) - {State.TABLE}
