"""Which leaves a block takes together: a bit of the descriptor that differs in one of them, or is set in all."""

import numpy as np
import pytest

from hwdbm import Stage2, pte, walker

ADDRESS = 1 << 39
LEAVES = pte.make_leaf(ADDRESS + (np.arange(512, dtype=np.uint64) << np.uint64(12)), 3, dbm=True)
BITS = (0, 1, 2, 5, 6, 7, 8, 10, 11, 12, 13, 20, 21, 47, 51, 52, 53, 55, 58, 63)  # each field's first or last


def is_block(bit: int, *, in_all: bool) -> bool:
    """Return whether tracked leaves make up a block after a bit was turned over, in one of them or in all."""
    if 1 << bit in (pte.AF, pte.CONTIGUOUS, pte.S2AP_W):  # a block's own; which pages were written is saved
        return True
    if bit in (0, 1) or 12 <= bit < 21:  # no leaf of level 3, or one that has the address of another page
        return False
    return in_all


@pytest.mark.parametrize("page", [0, 511, None], ids=["first", "last", "all"])
@pytest.mark.parametrize("bit", BITS)
def test_bits_by_which_the_leaves_of_a_block_may_differ(bit: int, page: int | None) -> None:
    made = LEAVES.copy()
    if page is None:  # set, or clear, in all: below a block's size each has address bits of its own
        made = made & ~np.uint64(1 << bit) | ~LEAVES[0] & np.uint64(1 << bit)
    else:
        made[page] ^= np.uint64(1 << bit)
    expected, blocks = is_block(bit, in_all=page is None), []
    for collapse in (Stage2.collapse, walker.collapse):
        slot = Stage2(512)
        slot.level(1)[:], slot.level(2)[:], slot.level(3)[:] = pte.TABLE, pte.make_table(1 << 12), made
        assert collapse(slot, 0, 512) == expected, collapse.__module__
        assert np.array_equal(slot.level(3), np.zeros(512) if expected else made)
        blocks.append(int(slot.level(2)[0]))
    assert blocks[0] == blocks[1]
    if expected:
        given = int(np.bitwise_or.reduce(made)) & pte.AF | int(made[0]) & ~(pte.AF | pte.CONTIGUOUS | pte.S2AP_W | 3)
        assert blocks[0] == given | (int(made[0]) & pte.S2AP_W if 1 << bit == pte.DBM else 0) | pte.VALID


@pytest.mark.parametrize("bit", [12, 20, 21, 29, 30])
def test_blocks_that_have_an_address_of_their_own_are_no_larger_one(bit: int) -> None:
    """The bits below a small block's size are no address, and those above a large one's are the large one's."""
    made = pte.make_leaf(ADDRESS + (np.arange(512, dtype=np.uint64) << np.uint64(21)), 2) | np.uint64(1 << bit)
    for collapse in (Stage2.collapse, walker.collapse):
        slot = Stage2(512 * 512)
        slot.level(1)[:], slot.level(2)[:] = pte.TABLE, made
        assert collapse(slot, 0, 512 * 512, 1) == (bit not in (21, 29)), collapse.__module__


@pytest.mark.parametrize(
    ("first", "count", "blocks"), [(5, 2043, [1, 2, 3]), (512, 1023, [1]), (511, 1026, [1, 2]), (1, 1022, [])]
)
def test_a_range_takes_the_blocks_that_are_all_in_it(first: int, count: int, blocks: list[int]) -> None:
    """It begins and ends anywhere, in a slot that doesn't begin with a block."""
    slots = []
    for collapse in (Stage2.collapse, walker.collapse):
        slot = Stage2(2048 + 7, base_gfn=1024 - 7)
        slot.map(1024, 2048, pfn=1024, dbm=True)
        slot.map(1017, 7, pfn=1017)
        assert collapse(slot, 1024 + first, count) == len(blocks), collapse.__module__
        assert [
            i - 1 for i, each in enumerate(slot.level(2)) if pte.state(int(each), 2) is not pte.State.TABLE
        ] == blocks
        slots.append(slot)
    assert all(np.array_equal(slots[0].level(level), slots[1].level(level)) for level in (1, 2, 3))
