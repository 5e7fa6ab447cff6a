"""Kernels for shared arrays: proved with somebody else's write between any two operations, and run beside one."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from effort import EFFORT
from numba import njit
from symbolic import prove

import hwdbm
from hwdbm import Stage2, pte
from hwdbm.bitmap import word_count
from hwdbm.kernels import BOTH, Place, atomic
from hwdbm.pte import Update

ALL = (1 << 64) - 1
PAGES = 1 << 22
CHANGES = [pte.clean, pte.arm, pte.disarm, pte.set_dbm, pte.track, pte.clear_dbm, pte.wrprotect, pte.mkold]
CHANGES += [pte.mkyoung, pte.relax, pte.relax_dirty, pte.allow, pte.allow_dbm]
change = pytest.mark.parametrize("change", CHANGES, ids=lambda rule: rule.__name__)


# --- proofs: the functions run as the Python that they were written in, on all descriptors ---------------------


class Memory:
    """Atomic operations on arrays of Python's, with somebody else's write before one of them."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.steps: list[Any] = []
        for name in ("load", "swap", "or", "and", "cas"):
            patch.setattr(atomic, f"_{name}", getattr(self, f"{name}_"))

    def _step(self, array: Any, i: Any) -> Any:
        if array.dtype == object and self.steps:  # bitmaps are of numbers
            value = self.steps.pop(0)
            if value is not None:
                array[i] = value
        return array[i]

    def load_(self, array: Any, i: Any) -> Any:
        return self._step(array, i)

    def swap_(self, array: Any, i: Any, new: Any) -> Any:
        old, array[i] = self._step(array, i), new
        return old

    def or_(self, array: Any, i: Any, bits: Any) -> Any:
        old = self._step(array, i)
        array[i] = old | bits
        return old

    def and_(self, array: Any, i: Any, bits: Any) -> Any:
        old = self._step(array, i)
        array[i] = old & bits
        return old

    def cas_(self, array: Any, i: Any, old: Any, new: Any) -> Any:
        found = self._step(array, i)
        if found == old:
            array[i] = new
        return found


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Memory]:
    for name, function in list(vars(atomic).items()):
        if hasattr(function, "py_func"):
            monkeypatch.setattr(atomic, name, function.py_func)
    with np.errstate(over="ignore"):
        yield Memory(monkeypatch)


@change
def test_a_change_is_of_what_it_replaced(change: Any, memory: Memory) -> None:
    """Whatever was written between the read and the swap: what is there then is changed if it matches, and returned."""
    update = change(3)

    def claim(first: Any, second: Any) -> bool:
        entries = np.array([first], dtype=object)
        memory.steps[:] = [None, second]  # between the load and the compare-and-swap
        old = atomic._change(entries, 0, *atomic._masks(update))
        interfered = not memory.steps  # where nothing matched there was no second operation
        last = second if interfered else first
        return bool(old == last) and bool(entries[0] == update(last))

    prove(claim, words=2)


@change
def test_a_pass_sets_the_bits_of_what_it_changed(change: Any, memory: Memory) -> None:
    update, runs = change(3), np.array([[0, 70, 5]])

    def claim(first: Any, second: Any) -> bool:
        pages = np.zeros(70, dtype=object)
        pages[66] = first
        out, also = np.zeros((2, 2), dtype=np.uint64)
        matched = bool(update.where(first))
        memory.steps[:] = [second] if matched else []  # after the plain read, before the atomic one
        _, changed, words = atomic._rewrite(pages, runs, *atomic._masks(update), *atomic._noted(BOTH), out, also)
        last = second if matched else first
        hit = matched and bool(update.where(last))
        assert out.tolist() == also.tolist() == [0, hit << 7]
        assert (changed, words) == (hit, hit)
        return bool(pages[66] == (update(last) if matched else first))

    prove(claim, words=2)


@change
@pytest.mark.parametrize("asked", [1, 20])
def test_a_pass_within_a_mask(change: Any, asked: int, memory: Memory) -> None:
    update, runs = change(3), np.array([[0, 64, 0]])
    within = np.array([(1 << asked) - 1 << 9], dtype=np.uint64)

    def claim(desc: Any) -> bool:
        pages = np.zeros(64, dtype=object)
        pages[9] = pages[40] = desc
        out, also = np.zeros((2, 1), dtype=np.uint64)
        masks, notes = atomic._masks(update), atomic._noted(BOTH)
        read, changed, _ = atomic._rewrite_within(pages, runs, *masks, *notes, within, out, also)
        hit = bool(update.where(desc))
        assert (read, changed) == (64, hit)
        assert out.tolist() == also.tolist() == [hit << 9]
        return bool(pages[9] == update(desc)) and bool(pages[40] == desc)

    prove(claim)


def test_an_exchange_returns_what_it_replaced(memory: Memory) -> None:
    def claim(first: Any, second: Any) -> bool:
        new = 0x1234
        entries, values = np.array([first], dtype=object), [new]
        memory.steps[:] = [None, second]
        out = np.zeros(1, dtype=np.uint64)
        place, notes = Place(0, 1, 0, 64, 64), atomic._noted(hwdbm.kernels.Notes(pte.dirty(3), None))
        atomic._exchange_at(entries, np.array([0]), values, *notes, *place, out, out, out[:0])
        last = first if memory.steps else second  # what was there already needs no exchange
        assert out.tolist() == [bool(pte.dirty(3)(last))]
        return bool(values[0] == last) and bool(entries[0] == new)

    prove(claim, words=2)


def stores_what_it_read(entries: Any, i: int, mask: Any, value: Any, keep: Any, sets: Any) -> Any:
    d = atomic._load(entries, i)
    if atomic._hit(d, mask, value):
        atomic._swap(entries, i, d & keep | sets)
    return d


def returns_what_it_read(entries: Any, i: int, mask: Any, value: Any, keep: Any, sets: Any) -> Any:
    d = atomic._load(entries, i)
    if atomic._hit(d, mask, value):
        atomic._cas(entries, i, d, d & keep | sets)
    return d


@pytest.mark.parametrize(
    ("name", "mutant"),
    [
        ("_change", stores_what_it_read),
        ("_change", returns_what_it_read),
        ("_hit", lambda d, mask, value: (d & value) == value),
    ],
)
def test_the_proof_finds(name: str, mutant: Any, memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, name, mutant)
    with pytest.raises(AssertionError):
        test_a_change_is_of_what_it_replaced(pte.arm, memory)


# --- what is compiled ------------------------------------------------------------------------------------------


@njit
def _operations(words, values):  # what each returned, one after the other
    values[0] = atomic._load(words, 1)
    values[1] = atomic._swap(words, 1, np.uint64(0xF0))
    values[2] = atomic._or(words, 1, np.uint64(0x0F))
    values[3] = atomic._and(words, 1, np.uint64(0x3C))
    values[4] = atomic._cas(words, 1, np.uint64(0x3C), np.uint64(1 << 63))
    values[5] = atomic._cas(words, 1, np.uint64(0x3C), np.uint64(5))
    values[6] = atomic._load(words, 1)


def test_operations() -> None:
    words, values = np.array([1, ALL, 3], dtype=np.uint64), np.zeros(7, dtype=np.uint64)
    _operations(words, values)
    assert values.tolist() == [ALL, ALL, 0xF0, 0xFF, 0x3C, 1 << 63, 1 << 63]
    assert words.tolist() == [1, 1 << 63, 3]


def test_operations_are_atomic() -> None:
    test_operations()  # compiles
    (code,) = _operations.inspect_llvm().values()
    for name in ("load atomic", "atomicrmw xchg", "cmpxchg"):  # which the others become where the result is used
        assert name in code


@njit(nogil=True)
def _mmu(entries, stop):
    """Dirty what is writable-clean, at random, by compare-and-swap; return how often."""
    k, written = np.uint64(88172645463325252), 0
    while not atomic._load(stop, 0):
        k ^= k << np.uint64(13)
        k ^= k >> np.uint64(7)
        k ^= k << np.uint64(17)
        i = np.int64(k % np.uint64(entries.size))
        d = atomic._load(entries, i)
        written += not d & np.uint64(1 << 7) and atomic._cas(entries, i, d, d | np.uint64(1 << 7)) == d
    return written


def dirtied_and_cleaned(clean: Callable[[np.ndarray], int], passes: int = 10) -> tuple[int, int]:
    """Return how often a thread found descriptors clean and dirtied them, and how often `clean` says it cleaned them.

    A pass is so long that it is interrupted where both have but one processor, and most pages are clean then.
    """
    pages = pte.make_leaf(np.arange(PAGES, dtype=np.uint64) << np.uint64(12), 3, dbm=True)
    stop = np.zeros(1, dtype=np.uint64)
    _mmu(pages, np.ones(1, dtype=np.uint64))  # compiles
    with ThreadPoolExecutor(1) as pool:
        mmu = pool.submit(_mmu, pages, stop)
        try:
            found = sum(clean(pages) for _ in range(passes))
        finally:
            stop[0] = 1
        return mmu.result(), found + clean(pages)


def cleaned(pages: np.ndarray) -> int:
    out, runs = np.zeros(PAGES // 64, dtype=np.uint64), np.array([[0, PAGES, 0]])
    return atomic.rewrite(pages, runs, pte.clean(3), out, out).changed


@njit(nogil=True)
def _cleaned_plainly(pages):
    """Clean groups of 64, after counting what is dirty in them: between the two hardware may step in."""
    found, bit = 0, np.uint64(1 << 7)
    for w in range(pages.size // 64):
        some = 0
        for j in range(64):
            some += (pages[w * 64 + j] & bit) != 0
        if some:
            for j in range(64):
                pages[w * 64 + j] &= ~bit
        found += some
    return found


def test_each_dirty_bit_is_found_once() -> None:
    for _ in range(EFFORT):
        written, found = dirtied_and_cleaned(cleaned)
        assert found == written > 0


def test_a_plain_pass_would_be_caught() -> None:
    for _ in range(100):
        written, found = dirtied_and_cleaned(_cleaned_plainly)
        if found != written:
            return
    raise AssertionError("a hundred runs, and no dirty bit was lost")


# --- shared Stage2s --------------------------------------------------------------------------------------------


def slot(**options: Any) -> Stage2:
    s2 = Stage2(1000, **options)
    s2.map(0, 1000, pfn=0, dbm=True)
    return s2


def test_arrays_that_lie_elsewhere() -> None:
    layout = Stage2(1000, base_gfn=77).layout
    memory = np.zeros(2000, dtype=np.uint64)
    arrays = {1: memory[:1], 2: memory[8 : 8 + layout.count(2)], 3: memory[500:1500]}
    s2 = Stage2(1000, base_gfn=77, shared=True, arrays=arrays)
    s2.map(77, 1000, pfn=0, dbm=True)
    memory[500 + 9] |= np.uint64(pte.S2AP_W)
    assert s2.harvest().pages().tolist() == [9]
    assert s2.level(3).ctypes.data == memory[500:].ctypes.data


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({3: np.zeros(999, dtype=np.uint64)}, ValueError, "the entries of level 3 are 1000 words, not 999"),
        ({2: np.zeros(2, dtype=np.int64)}, TypeError, "uint64"),
        ({4: np.zeros(2, dtype=np.uint64)}, ValueError, "levels 1, 2 and 3, not"),
        ({1: np.frombuffer(bytes(8), dtype=np.uint64)}, ValueError, "read-only"),
    ],
)
def test_wrong_arrays(change: Any, error: type[Exception], text: str) -> None:
    arrays = {1: np.zeros(1, np.uint64), 2: np.zeros(2, np.uint64), 3: np.zeros(1000, np.uint64)}
    with pytest.raises(error, match=text):
        Stage2(1000, shared=True, arrays=arrays | change)


def test_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hwdbm.kernels, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="shared arrays need atomic operations, and so numba: the extra 'jit'"):
        Stage2(8, shared=True)
    assert not Stage2(8).shared


def test_kernels_of_private_leaves_are_refused() -> None:
    with pytest.raises(ValueError, match="kernels 'fused' are for private leaves"):
        Stage2(8, shared=True, kernels="fused")


def test_a_copy_is_shared_too() -> None:
    s2 = slot(shared=True)
    twin = s2.copy()
    assert twin.shared
    assert twin._leaves.kernels is atomic
    assert twin.level(3).tolist() == s2.level(3).tolist()
    assert not np.may_share_memory(twin.level(3), s2.level(3))


def test_merge_and_remove() -> None:
    rng = np.random.default_rng(1)
    words, bits = rng.integers(0, ALL, (2, word_count(700)), dtype=np.uint64)
    bits[3:6] = 0
    both, rest = words | bits, words & ~bits
    merged, left = words.copy(), words.copy()
    atomic.merge(merged, bits)
    atomic.remove(left, bits)
    assert merged.tolist() == both.tolist()
    assert left.tolist() == rest.tolist()
    with pytest.raises(ValueError, match="bits are 11 words, not 10"):
        atomic.merge(words, bits[:10])


def test_an_update_that_changes_nothing_counts() -> None:
    """As the private kernels do: what matches is counted, whether or not it becomes another."""
    pages, out = np.array([pte.AF, 0], dtype=np.uint64), np.zeros(1, dtype=np.uint64)
    tally = atomic.rewrite(pages, np.array([[0, 2, 0]]), Update(pte.ANY, sets=pte.AF), out, out)
    assert (tally.changed, out.tolist(), pages.tolist()) == (2, [3], [pte.AF, pte.AF])
