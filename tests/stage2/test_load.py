"""Tables that a Stage2 takes over, entry by entry."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwdbm import Stage2


@st.composite
def tables(draw):
    """Draw the pages of a slot, a width, and where rows of it begin."""
    npages, width = draw(st.integers(1, 300)), draw(st.sampled_from([1, 2, 8, 64, 512]))
    lead = draw(st.integers(-width, width))
    places = draw(st.lists(st.integers(-3, npages // width + 3), max_size=8, unique=True))
    return npages, width, np.array(sorted(places), dtype=np.int64) * width + lead


@given(tables(), st.integers(0, 999))
def test_each_entry_is_where_it_belongs(case, seed):
    npages, width, first = case
    rows = np.random.default_rng(seed).integers(1, 1 << 63, (first.size, width), dtype=np.uint64)
    s2, expected = Stage2(npages), [0] * npages
    for start, row in zip(first.tolist(), rows.tolist(), strict=True):
        for i, desc in enumerate(row):
            if 0 <= start + i < npages:
                expected[start + i] = desc
    s2.load(3, first, rows)
    assert s2.level(3).tolist() == expected
    assert not s2.saved
    assert not s2.host_dirty.any()


@pytest.mark.parametrize(
    ("first", "rows", "text"),
    [
        ([0, 4], np.zeros((2, 8), np.uint64), "ascending"),
        ([8, 0], np.zeros((2, 8), np.uint64), "ascending"),
        ([0, 12], np.zeros((2, 8), np.uint64), "ascending"),
        ([0], np.zeros((2, 8), np.uint64), r"1 rows .* shape \(2, 8\)"),
        ([0], np.zeros(8, np.uint64), r"shape \(8,\)"),
        ([0], np.zeros((1, 0), np.uint64), r"shape \(1, 0\)"),
    ],
)
def test_rows_that_are_no_tables(first, rows, text):
    s2 = Stage2(64)
    with pytest.raises(ValueError, match=text):
        s2.load(3, first, rows)
    assert not s2.level(3).any()
