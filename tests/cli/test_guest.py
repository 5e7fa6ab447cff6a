"""The guests that the commands make, where a command's output doesn't show them."""

import numpy as np
import pytest

from hwdbm.cli import guest


@pytest.mark.parametrize("content", [0, 8, 8 * 99, 8 * 100, 8 * 101, 8 * 350])
def test_memory_is_filled_from_its_start_and_by_its_seed(content, monkeypatch):
    monkeypatch.setattr(guest, "_STEP", 800)
    memory = np.zeros(8 * 350, dtype=np.uint8)
    guest.fill(memory, content, seed=5)
    words = np.random.default_rng(5).integers(0, 1 << 64, content // 8, dtype=np.uint64)
    assert memory[:content].tobytes() == words.tobytes()
    assert not memory[content:].any()
