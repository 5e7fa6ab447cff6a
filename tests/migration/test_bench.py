"""The benchmark of the stream runs; what it finds is no matter of a test."""

import pytest

from hwdbm.bench.stream import StreamSetup, rows


@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_rows(transport):
    first, scattered = rows(StreamSetup(memory=8 << 20, fraction=0.1, passes=1, transport=transport))
    assert "first" in first.what
    assert "scattered" in scattered.what
    assert 0 < first.ratio < 1000
    assert first.cost > 0 < scattered.floor_cost
