"""What a TLB keeps, forgets and lets through."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwdbm import Granule
from hwdbm.machine import Machine
from hwdbm.machine.tlb import CLEAN, NONE, READ_ONLY, WRITABLE, Tlb
from hwdbm.stage2.layout import Layout


def fill(tlb, pages, kind, level=3):
    pages = np.array(pages, dtype=np.int64)
    tlb.fill(pages, np.full(pages.size, kind, np.uint8), np.full(pages.size, level, np.uint8))


def kinds(tlb, *pages):
    return tlb.lookup(np.array(pages, dtype=np.int64)).tolist()


def test_entries_stay_until_they_are_flushed():
    tlb = Tlb(Layout(1100, 100, Granule.K4))
    fill(tlb, [0, 700], WRITABLE)
    fill(tlb, [0], CLEAN)
    assert kinds(tlb, 0, 1, 700) == [CLEAN, NONE, WRITABLE]
    tlb.flush(1, 699)
    assert kinds(tlb, 0, 700) == [CLEAN, WRITABLE]
    tlb.flush(0, 1100)
    assert len(tlb) == 0


def test_a_block_is_flushed_by_any_of_its_pages():
    tlb = Tlb(Layout(1100, 100, Granule.K4))  # stripes of pages 0..411, 412..923, 924..
    fill(tlb, [500], WRITABLE, level=2)
    assert kinds(tlb, 411, 412, 923, 924) == [NONE, WRITABLE, WRITABLE, NONE]
    tlb.flush(400, 12)
    assert kinds(tlb, 412) == [WRITABLE]
    tlb.flush(923, 1)
    assert kinds(tlb, 412, 500, 923) == [NONE, NONE, NONE]


def test_of_two_entries_the_more_permissive_counts():
    tlb = Tlb(Layout(512, 0, Granule.K4))
    fill(tlb, [3], READ_ONLY)
    fill(tlb, [9], WRITABLE, level=2)
    assert kinds(tlb, 3, 4) == [WRITABLE, WRITABLE]
    tlb.drop(np.array([3]))
    assert kinds(tlb, 3, 4) == [NONE, NONE]


@given(
    st.integers(1, 40),
    st.lists(st.tuples(st.lists(st.integers(0, 1099), max_size=60), st.booleans(), st.integers(0, 1099))),
)
def test_a_full_one_forgets_down_to_its_capacity(capacity, steps):
    tlb, all_of_it = (Tlb(Layout(1100, 100, Granule.K4), size, seed=1) for size in (capacity, None))
    for pages, large, flushed in steps:
        for each in (tlb, all_of_it):
            fill(each, pages, WRITABLE, 2 if large else 3)
            each.flush(flushed, 50)
            each.trim()
        assert len(tlb) <= capacity
        every = np.arange(1100)
        assert (tlb.lookup(every) <= all_of_it.lookup(every)).all()


def test_the_choice_is_seeded():
    def rest(seed):
        tlb = Tlb(Layout(1100, 0, Granule.K4), 10, seed=seed)
        fill(tlb, range(1100), CLEAN)
        tlb.trim()
        return tlb.page.nonzero()[0].tolist()

    assert len(rest(1)) == 10
    assert rest(1) == rest(1) != rest(2)


def test_a_capacity_is_positive():
    with pytest.raises(ValueError, match="1 entry or more, not 0"):
        Tlb(Layout(1, 0, Granule.K4), 0)


def test_what_a_vcpu_caches_stays_within_the_capacity():
    """Also when the arrays that it was filled from are used again: a TLB keeps copies."""
    with Machine(thp=False, tlb_entries=10) as machine:
        slot = machine.add_memslot(4 << 20, 0)
        vcpu, rng = machine.vcpus[0], np.random.default_rng(1)
        vcpu.store(np.arange(1024) * 4096, np.ones(1024, dtype=np.uint64))  # from here on nothing faults
        vcpu.flush(slot.id, 0, slot.npages)
        for size in (*[4] * 30, 300, 5, 200):
            vcpu.store(rng.choice(1024, size, replace=False) * 4096, np.ones(size, dtype=np.uint64))
            assert len(vcpu.tlb[slot.id]) <= 10
