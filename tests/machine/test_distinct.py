"""Numbers are counted as a set counts them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwdbm.machine.tlb import Distinct

LIMIT = 600_000  # more than is compared at once


@given(
    st.lists(
        st.lists(st.one_of(st.integers(0, 70), st.integers(LIMIT - 300_000, LIMIT - 1)), max_size=3000),
        max_size=6,
    )
)
def test_it_is_the_size_of_the_set(lists):
    distinct = Distinct(LIMIT)
    for numbers in lists:
        assert distinct.count(np.array(numbers, dtype=np.int64)) == len(set(numbers))


@pytest.mark.parametrize("size", [1, 63, 65, 2047, 2048, 4096])
def test_numbers_near_and_far(size):
    """Those that lie dense are marked, those that don't are sorted: from 2344 on these are dense."""
    distinct, rng = Distinct(LIMIT), np.random.default_rng(size)
    for _ in range(3):
        numbers = np.append(rng.integers(0, LIMIT, size), LIMIT - 1)
        assert distinct.count(np.concatenate([numbers, numbers[::-1]])) == len(set(numbers.tolist()))


def test_marks_do_not_outlive_their_turn():
    """A byte tells 255 counts apart; what an earlier one left must not pass for this one's."""
    distinct, ends = Distinct(100), np.array([0, 99])
    for _ in range(3):
        assert distinct.count(np.arange(100)) == 100
        for _ in range(256):
            assert distinct.count(ends) == 2
