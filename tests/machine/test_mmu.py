"""The walk of many pages is the scalar one, page after page, in whatever states the leaves are."""

from itertools import combinations, product

import numpy as np
import pytest

from hwdbm import Stage2, pte, walker
from hwdbm.machine import mmu
from hwdbm.machine.tlb import CLEAN, READ_ONLY, WRITABLE, Distinct
from hwdbm.pte import State
from hwdbm.walker import Access

BITS = (0b01, 0b10, pte.S2AP_R, pte.S2AP_W, pte.AF, pte.DBM)
LEAVES = [sum(bit for bit, on in zip(BITS, which, strict=True) if on) for which in product((0, 1), repeat=len(BITS))]
LEAVES = [leaf for leaf in LEAVES if leaf & 0b11 in (0, 0b11)]  # the others aren't left behind by anybody
KINDS = {State.READ_ONLY: READ_ONLY, State.UNTRACKED: WRITABLE, State.WRITABLE_DIRTY: WRITABLE}
FRAMES = np.arange(1, 6, dtype=np.uint64) << np.uint64(12)
PAGES = np.array([3, 1, 1, 0, 4, 3, 1])

options = pytest.mark.parametrize(
    ("write", "ha", "hd"), [(write, ha, hd) for write in (True, False) for ha, hd in ((1, 1), (1, 0), (0, 0), (0, 1))]
)


def leaves(*states):
    """A slot of five pages whose leaves take turns in some states."""
    s2 = Stage2(5)
    s2.map(0, 5, pfn=1)
    s2.level(3)[:] = np.resize(np.array(states, dtype=np.uint64), 5)
    s2.level(3)[s2.level(3) != 0] |= FRAMES[s2.level(3) != 0]
    return s2


def check(s2, write, ha, hd):
    twin, before = s2.copy(), s2.level(3).copy()
    found = mmu.walk(s2, PAGES, write=write, ha=bool(ha), hd=bool(hd), distinct=Distinct(5))
    want, kinds = [], []
    for page in PAGES.tolist():
        if write:
            want.append(walker.guest_write(twin, page, ha=bool(ha), hd=bool(hd)))
        else:
            want.append(walker.guest_read(twin, page, ha=bool(ha)))
        state = pte.state(int(twin.level(3)[page]), 3)
        kinds.append(KINDS.get(state, CLEAN if ha and hd else READ_ONLY))
    access, kind, level = (np.broadcast_to(each, PAGES.shape).tolist() for each in found[:3])
    assert [tuple(Access)[code] for code in access] == want
    assert (s2.level(3) == twin.level(3)).all()
    assert found.updated == np.count_nonzero(before != twin.level(3))
    done = [each is Access.DONE for each in want]
    assert [each for each, ok in zip(kind, done, strict=True) if ok] == [
        each for each, ok in zip(kinds, done, strict=True) if ok
    ]
    assert level == [3] * PAGES.size


@options
def test_alike_in_every_state(write, ha, hd):
    for state in LEAVES:
        check(leaves(state), write, ha, hd)


@options
@pytest.mark.alike(2)
def test_any_two_states_side_by_side(write, ha, hd):
    for one, other in combinations(LEAVES, 2):  # the pages are in no order: each of the two is before the other
        check(leaves(one, other), write, ha, hd)


def test_alike_is_one_element():
    s2 = leaves(pte.TABLE | pte.S2AP_R | pte.AF | pte.DBM)
    assert mmu.walk(s2, PAGES, write=True)[:] == (0, WRITABLE, 3, 4)
    assert mmu.walk(s2, np.zeros(0, dtype=np.int64), write=True).access.size == 0


@pytest.mark.parametrize("bit", [pte.S2AP_W, pte.AF, pte.DBM])
def test_every_bit_that_decides_is_compared(bit, monkeypatch):
    """Leaves that differ in a bit that isn't compared would be taken for alike."""
    monkeypatch.setattr(mmu, "_DECISIVE", mmu._DECISIVE & ~bit)

    def every_pair():
        for write, ha, one in product((True, False), (1, 0), LEAVES):
            check(leaves(one, one ^ bit), write, ha, ha)

    with pytest.raises(AssertionError):
        every_pair()
