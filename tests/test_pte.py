"""Descriptors on concrete numbers: every combination of the bits that matter, with all sorts of bits that don't."""

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwdbm import pte
from hwdbm.granule import Granule
from hwdbm.pte import AddressBits, Match, State, Update

ALL = (1 << 64) - 1
LEVELS = (1, 2, 3)
BITS = {"V": 0, "TYPE": 1, "S2AP[0]": 6, "S2AP[1]": 7, "AF": 10, "DBM": 51, "CONTIGUOUS": 52}

# What the two low bits are: (V, TYPE), at the levels with blocks and at level 3.
KINDS = {
    (0, 0): ("absent", "absent"),
    (0, 1): ("absent", "absent"),
    (1, 0): ("leaf", "reserved"),
    (1, 1): ("table", "leaf"),
}
# The state of a leaf by (DBM, S2AP[1]).
STATES = {
    (0, 0): "read-only",
    (0, 1): "untracked",
    (1, 0): "writable-clean",
    (1, 1): "writable-dirty",
}
# What an update makes of each state, "-" for nothing.
AFTER = {
    #                 read-only     untracked         writable-clean    writable-dirty
    pte.clean:     ("-",           "-",              "-",              "writable-clean"),
    pte.arm:       ("-",           "writable-clean", "-",              "-"),
    pte.disarm:    ("-",           "-",              "untracked",      "untracked"),
    pte.set_dbm:   ("-",           "writable-dirty", "-",              "-"),
    pte.clear_dbm: ("-",           "-",              "read-only",      "read-only"),
    pte.wrprotect: ("-",           "read-only",      "-",              "read-only"),
    pte.track:     ("-",           "writable-clean", "-",              "writable-clean"),
    pte.relax:     ("untracked",   "-",              "untracked",      "untracked"),
    pte.relax_dirty: ("writable-dirty", "writable-dirty", "writable-dirty", "-"),
    pte.allow:     ("untracked",   "-",              "-",              "-"),
    pte.allow_dbm: ("writable-clean", "-",           "-",              "-"),
}  # fmt: skip
UPDATES = [*AFTER, pte.mkold, pte.mkyoung]
GRANTS = (pte.relax, pte.relax_dirty, pte.allow, pte.allow_dbm)  # of what the host allows
PREDICATES = {
    pte.leaf: {"read-only", "untracked", "writable-clean", "writable-dirty"},
    pte.read_only: {"read-only"},
    pte.untracked: {"untracked"},
    pte.writable_clean: {"writable-clean"},
    pte.dirty: {"writable-dirty"},
    pte.writable: {"untracked", "writable-dirty"},
    pte.tracked: {"writable-clean", "writable-dirty"},
}

# The lowest bit of the output address by granule and level (Arm ARM, D8.3).
LOWEST = {
    Granule.K4: {1: 30, 2: 21, 3: 12},
    Granule.K16: {1: 36, 2: 25, 3: 14},
    Granule.K64: {1: 42, 2: 29, 3: 16},
}
IGNORED = ALL & ~sum(1 << bit for bit in BITS.values())

Fields = dict[str, int]


def descriptors(level: int) -> list[tuple[Fields, int]]:
    """Return each combination of the bits that matter, over each granule's address field and junk elsewhere."""
    addresses = [(1 << 48) - (1 << lowest[level]) for lowest in LOWEST.values()]
    junk = [0, *addresses, IGNORED, 0xAAAA_AAAA_AAAA_AAAA & IGNORED, 0x5555_5555_5555_5555 & IGNORED]
    combinations = [dict(zip(BITS, values, strict=True)) for values in product((0, 1), repeat=len(BITS))]
    return [
        (fields, sum(value << BITS[name] for name, value in fields.items()) | bits)
        for fields in combinations
        for bits in junk
    ]


def expected(fields: Fields, level: int) -> str:
    kind = KINDS[fields["V"], fields["TYPE"]][level == 3]
    return STATES[fields["DBM"], fields["S2AP[1]"]] if kind == "leaf" else kind


level = pytest.mark.parametrize("level", LEVELS)
change = pytest.mark.parametrize("change", UPDATES, ids=lambda rule: rule.__name__)
predicate = pytest.mark.parametrize("predicate", [*PREDICATES, pte.young], ids=lambda rule: rule.__name__)


def as_array(descs: list[int]) -> np.ndarray:
    return np.array(descs, dtype=np.uint64)


def test_no_rule_is_left_out() -> None:
    rules = {name: getattr(pte, name)(2) for name in pte.__all__ if isinstance(getattr(pte, name), pte.Rule)}
    updates = {name for name, rule in rules.items() if isinstance(rule, Update)}
    assert updates == {rule.__name__ for rule in UPDATES}
    assert rules.keys() - updates == {rule.__name__ for rule in (*PREDICATES, pte.young, pte.old, pte.table)}


# --- states and predicates ----------------------------------------------------------------------------------


@level
def test_state(level: int) -> None:
    for fields, desc in descriptors(level):
        assert pte.state(desc, level).label == expected(fields, level), f"{desc:#018x}"


@level
def test_states_of_an_array(level: int) -> None:
    rows = descriptors(level)
    states = pte.state(as_array([desc for _, desc in rows]), level)
    assert states.dtype == np.uint8
    assert [State(value).label for value in states.tolist()] == [expected(fields, level) for fields, _ in rows]


def check_predicate(match: Match, states: set[str], level: int) -> None:
    for fields, desc in descriptors(level):
        assert match(desc) is (expected(fields, level) in states), f"{desc:#018x}"


@level
@pytest.mark.parametrize("predicate", PREDICATES, ids=lambda rule: rule.__name__)
def test_predicate(predicate: Callable[[int], Match], level: int) -> None:
    check_predicate(predicate(level), PREDICATES[predicate], level)


@level
def test_young(level: int) -> None:
    for fields, desc in descriptors(level):
        young = expected(fields, level) in STATES.values() and fields["AF"] == 1
        assert pte.young(level)(desc) is young, f"{desc:#018x}"


@pytest.mark.parametrize(
    ("mutant", "level"),
    [
        (Match(pte.dirty(3).mask & ~1, pte.dirty(3).value & ~1), 3),
        (Match(pte.dirty(2).mask & ~2, pte.dirty(2).value), 2),
        (pte.dirty(3), 2),
        (pte.writable(3), 3),
        (pte.dirty(3).also(ones=pte.AF), 3),
    ],
    ids=["no V", "no type", "another level's type", "no DBM", "AF too"],
)
def test_check_predicate_catches(mutant: Match, level: int) -> None:
    with pytest.raises(AssertionError):
        check_predicate(mutant, {"writable-dirty"}, level)


@pytest.mark.parametrize("level", [1, 2])
def test_table(level: int) -> None:
    for fields, desc in descriptors(level):
        assert pte.table(level)(desc) is (expected(fields, level) == "table"), f"{desc:#018x}"


def test_level_3_has_no_tables() -> None:
    with pytest.raises(ValueError, match=r"a level of pte\.table is -1 to 2, not 3"):
        pte.table(3)


@level
@predicate
def test_predicate_of_an_array(predicate: Callable[[int], Match], level: int) -> None:
    descs = [desc for _, desc in descriptors(level)]
    found = predicate(level)(as_array(descs))
    assert found.dtype == np.bool_
    assert found.tolist() == [predicate(level)(desc) for desc in descs]


def test_match_rejects_a_value_outside_of_its_mask() -> None:
    with pytest.raises(ValueError, match=r"value 0x0{14}80 .* mask 0x0{15}3"):
        Match(mask=3, value=0x80)


@pytest.mark.parametrize("bits", [{"zeros": 1 << 51}, {"ones": 1 << 2}, {"ones": 1 << 10, "zeros": 1 << 10}], ids=str)
def test_match_rejects_a_bit_that_is_both(bits: dict[str, int]) -> None:
    match = Match(mask=1 << 51 | 1 << 2, value=1 << 51)
    with pytest.raises(ValueError, match=f"bits {max(bits.values()):#018x} can't be set and clear"):
        match.also(**bits)


# --- updates ------------------------------------------------------------------------------------------------


def check_moves(update: Update, row: tuple[str, ...], level: int) -> None:
    """Check that each state becomes what a row of `AFTER` says."""
    after = dict(zip(STATES.values(), row, strict=True))
    for fields, desc in descriptors(level):
        before = expected(fields, level)
        moved = after.get(before, "-")
        new = update(desc)
        assert (new == desc) == (moved == "-"), f"{desc:#018x}"
        assert pte.state(new, level).label == (before if moved == "-" else moved), f"{desc:#018x}"


@level
@pytest.mark.parametrize("change", AFTER, ids=lambda rule: rule.__name__)
def test_update_moves_between_states(change: Callable[[int], Update], level: int) -> None:
    check_moves(change(level), AFTER[change], level)


@level
@pytest.mark.parametrize(("change", "value"), [(pte.mkold, 0), (pte.mkyoung, 1)])
def test_age_changes_the_access_flag_of_leaves_only(change: Callable[[int], Update], value: int, level: int) -> None:
    for fields, desc in descriptors(level):
        leaf = expected(fields, level) in STATES.values()
        aged = desc & ~(1 << 10) | value << 10
        assert change(level)(desc) == (aged if leaf else desc), f"{desc:#018x}"


@level
@change
def test_update_changes_three_bits_at_most(change: Callable[[int], Update], level: int) -> None:
    assert pte.MUTABLE == 1 << 7 | 1 << 10 | 1 << 51
    for _, desc in descriptors(level):
        assert (change(level)(desc) ^ desc) & ~pte.MUTABLE == 0, f"{desc:#018x}"


def check_update(update: Update, level: int) -> None:
    """Check the rules for whatever keeps track of writes, and doesn't resolve a fault."""
    for fields, desc in descriptors(level):
        new = update(desc)
        changed = new ^ desc
        text = f"{desc:#018x} became {new:#018x}"
        assert changed & ~(1 << 7 | 1 << 10 | 1 << 51) == 0, f"{text}: a bit that may not change"
        assert bool(changed) == update.where(desc), f"{text}: not what its predicate says"
        if changed & new & 1 << 51:
            assert expected(fields, level) == "untracked", f"{text}: DBM granted the write"


@level
@pytest.mark.parametrize("change", [rule for rule in UPDATES if rule not in GRANTS], ids=lambda rule: rule.__name__)
def test_update_keeps_the_rules(change: Callable[[int], Update], level: int) -> None:
    check_update(change(level), level)


@pytest.mark.parametrize(
    "mutant",
    [
        Update(pte.leaf(3), sets=pte.DBM, clears=pte.S2AP_W),  # the RFC's, which broke copy-on-write
        Update(pte.dirty(3), clears=pte.S2AP_W | pte.CONTIGUOUS),
        Update(Match(0, 0), clears=pte.AF),
    ],
    ids=["DBM on read-only", "a bit too many", "more than it changes"],
)
def test_check_update_catches(mutant: Update) -> None:
    with pytest.raises(AssertionError):
        check_update(mutant, 3)


@pytest.mark.parametrize(
    "mutant",
    [
        Update(Match(0, 0), clears=pte.S2AP_W),
        Update(pte.dirty(2), clears=pte.S2AP_W),
        Update(pte.dirty(3), clears=pte.S2AP_W | pte.DBM),
        Update(pte.dirty(3), clears=pte.S2AP_R),
    ],
    ids=["everywhere", "another level", "DBM too", "the wrong bit"],
)
def test_check_moves_catches(mutant: Update) -> None:
    with pytest.raises(AssertionError):
        check_moves(mutant, AFTER[pte.clean], 3)


@level
@change
def test_update_of_an_array(change: Callable[[int], Update], level: int) -> None:
    descs = [desc for _, desc in descriptors(level)]
    before = as_array(descs)
    after = change(level)(before)
    assert after.dtype == np.uint64
    assert after.tolist() == [change(level)(desc) for desc in descs]
    assert before.tolist() == descs, "an update makes a new array"


@given(desc=st.integers(0, ALL), junk=st.integers(0, ALL), level=st.sampled_from(LEVELS))
def test_ignored_bits_change_nothing(desc: int, junk: int, level: int) -> None:
    junk &= IGNORED
    assert pte.state(desc ^ junk, level) is pte.state(desc, level)
    for change in UPDATES:
        assert change(level)(desc ^ junk) == change(level)(desc) ^ junk


# --- constructors and addresses -----------------------------------------------------------------------------

MADE = [
    ({"writable": False}, "read-only"),
    ({"writable": True}, "untracked"),
    ({"dbm": True}, "writable-clean"),
    ({"dbm": True, "dirty": True}, "writable-dirty"),
]
# Where the address bits above 47 are, and the granules that have them there.
HIGH = {
    AddressBits.PA48: ({}, set(Granule)),
    AddressBits.LPA: ({48: 12, 49: 13, 50: 14, 51: 15}, {Granule.K64}),
    AddressBits.LPA2: ({48: 48, 49: 49, 50: 8, 51: 9}, {Granule.K4, Granule.K16}),
}
FORMATS = [
    (bits, granule, level)
    for bits, (_, granules) in HIGH.items()
    for granule, level in product(sorted(granules, key=str), LEVELS)
]
formats = pytest.mark.parametrize(("bits", "granule", "level"), FORMATS)


def address_places(bits: AddressBits, granule: Granule, level: int) -> dict[int, int]:
    """Return for each bit of the address the bit of the descriptor."""
    return {bit: bit for bit in range(LOWEST[granule][level], 48)} | HIGH[bits][0]


@formats
def test_each_address_bit_has_its_place(bits: AddressBits, granule: Granule, level: int) -> None:
    empty = pte.make_leaf(0, level, bits=bits)
    for bit, place in address_places(bits, granule, level).items():
        assert pte.make_leaf(1 << bit, level, bits=bits) == empty | 1 << place
        assert pte.make_table(1 << bit, bits) == 1 << place | 0b11
        assert pte.output_address(empty | 1 << place, granule.shift(level), bits) == 1 << bit


@formats
def test_address_ignores_all_other_bits(bits: AddressBits, granule: Granule, level: int) -> None:
    places = address_places(bits, granule, level)
    other = ALL & ~sum(1 << place for place in places.values())
    assert pte.output_address(other, granule.shift(level), bits) == 0
    assert pte.output_address(ALL, granule.shift(level), bits) == sum(1 << bit for bit in places)


@formats
def test_addresses_come_back(bits: AddressBits, granule: Granule, level: int) -> None:
    places = address_places(bits, granule, level)
    mask = sum(1 << bit for bit in places)
    addresses = np.random.default_rng(level).integers(0, ALL, 200, dtype=np.uint64, endpoint=True) & np.uint64(mask)
    shift = granule.shift(level)
    for options, state in MADE:
        leaves = pte.make_leaf(addresses, level, bits=bits, **options)
        assert leaves.dtype == np.uint64
        assert leaves.tolist() == [pte.make_leaf(pa, level, bits=bits, **options) for pa in addresses.tolist()]
        assert {State(value).label for value in pte.state(leaves, level).tolist()} == {state}
        assert np.array_equal(pte.output_address(leaves, shift, bits), addresses)
    tables = pte.make_table(addresses, bits)
    assert tables.tolist() == [pte.make_table(pa, bits) for pa in addresses.tolist()]
    assert np.array_equal(pte.output_address(tables, shift, bits), addresses)


def test_made_leaves_are_young_normal_readable_memory() -> None:
    # MemAttr 1111, S2AP, SH 11, AF; with LPA2 the shareability is the address's.
    assert pte.make_leaf(0, 3) == 0b1_11_11_1111_11
    assert pte.make_leaf(0, 2) == 0b1_11_11_1111_01
    assert pte.make_leaf(0, 2, writable=False) == 0b1_11_01_1111_01
    assert pte.make_leaf(0, 3, dbm=True) == 1 << 51 | 0b1_11_01_1111_11
    assert pte.make_leaf(0, 3, dbm=True, dirty=True) == 1 << 51 | 0b1_11_11_1111_11
    assert pte.make_leaf(0, 3, bits=AddressBits.LPA2) == 0b1_00_11_1111_11


@pytest.mark.parametrize(
    ("options", "text"),
    [({"writable": False, "dbm": True}, "would grant the write"), ({"dirty": True}, "no dirty state")],
)
def test_leaf_rejects(options: dict[str, bool], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        pte.make_leaf(0x8000_0000, 3, **options)


# --- text ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("desc", "level", "text"),
    [
        (0xAB00, 3, "0x000000000000ab00 (level 3 absent)"),
        (0x4100_0003, 2, "0x0000000041000003 (level 2 table)"),
        (0x4100_0001, 3, "0x0000000041000001 (level 3 reserved)"),
        (0x4100_0003, 3, "0x0000000041000003 (level 3 read-only: S2AP=--)"),
        (0x4100_0443, 3, "0x0000000041000443 (level 3 read-only: AF S2AP=r-)"),
        (0x4120_0481, 2, "0x0000000041200481 (level 2 untracked: AF S2AP=-w)"),
        (0x0018_0000_4120_0441, 2, "0x0018000041200441 (level 2 writable-clean: AF DBM CONT S2AP=r-)"),
        (0x0008_0000_8000_04C3, 3, "0x00080000800004c3 (level 3 writable-dirty: AF DBM S2AP=rw)"),
    ],
)
def test_describe(desc: int, level: int, text: str) -> None:
    assert pte.describe(desc, level) == text


@pytest.mark.parametrize("bits", [(0b0001, 0), (0, 0b0010), (0b0100, 0b1000), (0b0101, 0b1010), (0, 0)])
def test_what_is_asked_for_already_may_be_asked_for_again(bits: tuple[int, int]) -> None:
    """Asked for bit by bit or together, once or twice."""
    match, (ones, zeros) = pte.Match(0b0011, 0b0001), bits
    again = match.also(ones=ones, zeros=zeros)
    assert again == pte.Match(0b0011 | ones | zeros, 0b0001 | ones)
    assert again.also(ones=ones, zeros=zeros) == again
    for desc in range(16):
        assert again(desc) == (match(desc) and desc & ones == ones and not desc & zeros)


def test_a_rule_of_no_level_means_nothing_at_any() -> None:
    rule = pte.Rule("never", lambda level: pte.ANY, levels=[])
    for level, said in ((0, r"^pte\.never is of levels \[\], not 0$"), (1, "0 to 0, not 1$"), (-1, "0 to 0, not -1$")):
        with pytest.raises(ValueError, match=said):
            rule(level)
