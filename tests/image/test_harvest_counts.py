"""The counts of a harvest, where what is counted goes on from one chunk to the next."""

import numpy as np
import pytest

from hwdbm import DirtyBitmap, Granule, Stage2, pte
from hwdbm.image import harvest


@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.98, 1.0])
def test_a_run_that_goes_on_after_a_chunk_is_one(chunk, share, monkeypatch):
    monkeypatch.setattr(harvest, "_CHUNK", chunk)
    for npages in (63, 64, 65, 513):
        pages = np.flatnonzero(np.random.default_rng(npages).random(npages) < share)
        bitmap = DirtyBitmap.from_pages(pages, npages)
        assert harvest._range_count(bitmap) == len(bitmap.ranges())


@pytest.mark.parametrize("granule", Granule)
@pytest.mark.parametrize("policy", ["dbm", "writable"])
@pytest.mark.parametrize("chunk", [100, 1 << 20])
def test_leaves_are_counted_where_a_walk_comes(granule, policy, chunk, monkeypatch):
    """Each dirty leaf once, by its size; what an old table has below a block, or below nothing, is no leaf."""
    monkeypatch.setattr(harvest, "_CHUNK", chunk)
    rule = pte.writable if policy == "writable" else pte.dirty
    size = granule.pages_per_entry(2)
    rng = np.random.default_rng(size)
    for base in (0, 1, size - 1):
        s2 = Stage2(3 * size + 5, base, granule)
        bits = [pte.AF, pte.S2AP_W, pte.DBM, pte.DBM | pte.S2AP_W]
        for level in (2, 3):
            entries = s2.level(level)
            entries[:] = pte.make_leaf(0, level, writable=False) | rng.choice(np.array(bits, np.uint64), entries.size)
        tables = rng.random(s2.level(2).size) < 0.5
        tables[:2] = True, False
        s2.level(2)[tables] = pte.make_table(1 << granule.page_shift)
        spans = [s2.layout.span(2, at) for at in np.flatnonzero(tables)]
        walked = np.concatenate([s2.level(3)[max(start, 0) : stop] for start, stop in spans])
        found = harvest._dirty_leaves(s2, policy)
        assert found[granule.page_size] == np.count_nonzero(rule(3)(walked))
        assert found[1 << granule.shift(2)] == np.count_nonzero(rule(2)(s2.level(2)))
