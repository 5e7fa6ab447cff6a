"""The counts of a harvest, where what is counted goes on from one chunk to the next."""

import numpy as np
import pytest

from hwdbm import DirtyBitmap
from hwdbm.image import harvest


@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.98, 1.0])
def test_a_run_that_goes_on_after_a_chunk_is_one(chunk, share, monkeypatch):
    monkeypatch.setattr(harvest, "_CHUNK", chunk)
    for npages in (63, 64, 65, 513):
        pages = np.flatnonzero(np.random.default_rng(npages).random(npages) < share)
        bitmap = DirtyBitmap.from_pages(pages, npages)
        assert harvest._range_count(bitmap) == len(bitmap.ranges())
