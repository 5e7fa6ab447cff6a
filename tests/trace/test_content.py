"""Comparing memory with what it was: compiled and in numpy, against a loop over bytes."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwdbm.trace import content

WAYS = ["numpy", *(["numba"] if importlib.util.find_spec("numba") else [])]


@pytest.fixture(params=WAYS, scope="module")
def compare(request: pytest.FixtureRequest):
    """Return the comparison in one of its two ways."""
    if request.param == "numpy":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(content, "_best", lambda: content.by_numpy)
            yield content.compare
    else:
        assert content._best() is not content.by_numpy
        yield content.compare


def slowly(memory: np.ndarray, copy: np.ndarray) -> tuple[list[int], list[int]]:
    """Return the pages that changed, and those of them that are zero, page by page."""
    changed = [at for at in range(len(memory)) if memory[at].tobytes() != copy[at].tobytes()]
    return changed, [at for at in changed if not any(memory[at].tobytes())]


def pages(words: np.ndarray) -> list[int]:
    return np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist()


@given(data=st.data(), npages=st.sampled_from([1, 2, 63, 64, 65, 127, 130]), words=st.sampled_from([1, 2, 7, 8, 512]))
def test_what_changed(compare, data: st.DataObject, npages: int, words: int) -> None:
    """Any word of any page, to any value, some of them back to zero; three times, on the same copy."""
    memory, copy = (np.zeros((npages, words), dtype=np.uint64) for _ in range(2))
    where = st.tuples(st.integers(0, npages - 1), st.integers(0, words - 1), st.sampled_from([0, 1, 1 << 63, 5]))
    for _ in range(3):
        for page, word, value in data.draw(st.lists(where, max_size=20)):
            memory[page, word] = value
        if data.draw(st.booleans()):
            memory[data.draw(st.integers(0, npages - 1))] = 0
        changed, zero = slowly(memory, copy)
        before = memory.copy()
        found, empty = compare(memory, copy)
        assert (found.size, empty.size) == (-(-npages // 64),) * 2
        assert (pages(found), pages(empty)) == (changed, zero)
        assert np.array_equal(copy, memory)
        assert np.array_equal(memory, before)


def test_memory_may_be_a_file_s(compare, tmp_path: Path) -> None:
    memory = np.memmap(tmp_path / "ram", np.uint64, "w+", shape=(65, 512))
    copy = np.zeros_like(memory)
    memory[64, 511] = 1
    assert [pages(each) for each in compare(memory, copy)] == [[64], []]
    seen = np.memmap(tmp_path / "ram", np.uint64, "r", shape=(65, 512))
    assert [pages(each) for each in compare(seen, np.zeros((65, 512), dtype=np.uint64))] == [[64], []]


def test_memory_may_be_read_only(compare) -> None:
    memory = np.ones((3, 512), dtype=np.uint64)
    memory.flags.writeable = False
    assert compare(memory, np.zeros_like(memory))[0].tolist() == [7]
    assert compare(np.zeros((0, 512), dtype=np.uint64), np.zeros((0, 512), dtype=np.uint64))[0].size == 0


def test_what_is_no_memory(compare) -> None:
    good = np.zeros((4, 8), dtype=np.uint64)
    for wrong in (good[:3], good[:, ::2], good.view(np.int64), good[0], np.zeros((8, 4), dtype=np.uint64).T):
        with pytest.raises(ValueError, match="whole pages"):
            compare(good, wrong)
        with pytest.raises(ValueError, match="whole pages"):
            compare(wrong, good)
    with pytest.raises(TypeError, match="memory is"):
        compare([[0]], good)


@pytest.mark.parametrize("word", ["x", "xx"])
def test_where_numba_cannot_compile_it_is_numpy_s(word, monkeypatch, caplog):
    """It says why, in 200 letters at most."""

    def failing():
        raise RuntimeError(word + " x" * 200)

    monkeypatch.setattr(content, "ready", failing)
    monkeypatch.setattr(content, "find_spec", lambda name: name)
    assert content._best.__wrapped__() is content.by_numpy
    why = word + " x" * 97 + " ..."
    assert caplog.messages == [f"hwdbm: the comparison of pages can't be compiled here: {why}; NumPy takes over"]


@pytest.mark.parametrize("missing", ["sys.modules['numba'] = None", "import os; os.environ['NUMBA_DISABLE_JIT'] = '1'"])
def test_without_numba_it_is_numpy_s(missing: str) -> None:
    code = f"""{missing}
import numpy as np
from hwdbm.trace import content
memory, copy = np.eye(3, dtype=np.uint64), np.zeros((3, 3), dtype=np.uint64)
assert content.compare(memory, copy)[0].tolist() == [7]
assert content._best() is content.by_numpy
"""
    subprocess.run([sys.executable, "-P", "-c", "import sys\n" + code], check=True)
