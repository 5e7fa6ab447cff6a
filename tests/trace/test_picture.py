"""The picture of a trace shows its numbers, where and in the units that it says."""

import figures
import numpy as np
import pytest
from seen import as_seen

from hwdbm.memslot import Memslot
from hwdbm.trace import analyse, picture


class Written:
    """A guest of 1,024 pages that writes 16 to 18 others in each interval."""

    page_size, slots, initial_zeros = 16384, (Memslot(0, 0, 0, 1024, 0),), None

    def __init__(self, intervals: int) -> None:
        bits = np.zeros((intervals, 1024), dtype=bool)
        for number in range(intervals):
            bits[number, 16 * number % 1024 :][: 16 + number % 3] = True
        self.times = np.arange(intervals + 1) * 250_000_000
        self._words = np.packbits(bits, axis=1, bitorder="little").view(np.uint64)

    def words(self, lo, hi, first=0, stop=None):
        return self._words[lo:hi, first:stop].copy()

    def zeros(self, lo, hi, first=0, stop=None):
        return None


@pytest.mark.parametrize(("intervals", "points"), [(0, 2000), (1, 2000), (24, 2000), (24, 5)])
def test_a_picture_shows_what_the_one_that_was_looked_at_shows(intervals, points, monkeypatch, tmp_path):
    found = figures.drawn(monkeypatch)
    monkeypatch.setattr(picture, "_POINTS", points)
    picture.draw(tmp_path / "a.png", analyse(Written(intervals), rows=5, cells=8))
    as_seen(f"pictures/trace-{intervals}-{points}.txt", *found)
