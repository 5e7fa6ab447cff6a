"""Kernels against a loop over the scalar forms, one descriptor at a time.

The checks take the implementation (anything with the functions of `hwdbm.kernels.Kernels`), so that both are held
to the same, and so that each check can be shown to catch a broken one.
"""

import operator
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import combinations_with_replacement, cycle, pairwise, product
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from effort import EFFORT
from hypothesis import given, settings
from hypothesis import strategies as st

import hwdbm
from hwdbm import pte
from hwdbm.bitmap import DirtyBitmap, word_count
from hwdbm.kernels import BOTH, Notes, Place, Tally, fused, vector
from hwdbm.pte import Match, Update
from hwdbm.stage2.layout import runs_of

ALL = (1 << 64) - 1
UPDATES = (pte.clean, pte.arm, pte.disarm, pte.wrprotect, pte.mkold, pte.mkyoung, pte.track, pte.relax)
MATCHES = (pte.dirty, pte.writable, pte.read_only, pte.young)

FUNCTIONS = [name for name in vars(hwdbm.kernels.Kernels) if not name.startswith("_")]

Runs = list[tuple[int, int]]

# The bits of dirty's predicate, and what differs from a dirty page in one of them or more.
DIRTY = pte.dirty(3).value
OTHERS = np.array(
    [0, DIRTY & ~1, DIRTY & ~2, DIRTY & ~pte.DBM, DIRTY & ~pte.S2AP_W, DIRTY & ~(pte.DBM | pte.S2AP_W)],
    dtype=np.uint64,
)
JUNK = np.uint64(ALL & ~DIRTY)

SINGLE = [(n, [(0, n)]) for n in (1, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 513, 1089)]
MUTATED = (500, [(64, 128), (192, 500)])  # two runs, and a ragged end
GAP = vector._GAP
LAYOUTS: list[tuple[int, Runs]] = [
    *SINGLE,
    MUTATED,
    (0, []),
    (200, []),
    (500, [(64, 448)]),
    (500, [(64, 128), (448, 500)]),
    (300, [(0, 64), (128, 128), (192, 300)]),
    (64 * 40 + 9, [(128 * i, 128 * i + 64) for i in range(20)] + [(64 * 40, 64 * 40 + 9)]),
    (2 * GAP + 500, [(64, 128), (128 + GAP, 192 + GAP), (320 + 2 * GAP, 2 * GAP + 500)]),  # bridged, and not
]
SHARES = (0, 0.01, 0.5, 1)

layouts = pytest.mark.parametrize(("n", "runs"), LAYOUTS, ids=lambda value: str(value)[:30])
shares = pytest.mark.parametrize("share", SHARES)


# --- data, and what must come of it -------------------------------------------------------------------------


def descriptors(n: int, runs: Runs, share: float) -> np.ndarray:
    """Return pages of which `share` is dirty, with junk in all ignored bits. Gaps hold what looks dirty but for V."""
    return drawn_descriptors(n, tuple(runs), share).copy()


@cache  # what is drawn is asked for dozens of times, and to seed a generator takes longer than a kernel
def drawn_descriptors(n: int, runs: tuple[tuple[int, int], ...], share: float) -> np.ndarray:
    rng = np.random.default_rng([n, len(runs), int(share * 100)])
    kinds = np.where(rng.random(n) < share, np.uint64(DIRTY), rng.choice(OTHERS, n))
    pages = kinds | rng.integers(0, ALL, n, dtype=np.uint64, endpoint=True) & JUNK
    for (_, stop), (start, _) in pairwise(runs):
        pages[stop:start] = ALL & ~1
    return pages


def words_of(n: int, seed: int) -> np.ndarray:
    """Return words with some bits set, for what was in a bitmap before."""
    return drawn_words(n, seed).copy()


@cache
def drawn_words(n: int, seed: int) -> np.ndarray:
    words = np.random.default_rng([n, seed]).integers(0, ALL, word_count(n), dtype=np.uint64, endpoint=True)
    words[::3] = 0
    return words


def as_rows(runs: Runs) -> np.ndarray:
    return np.array(runs, dtype=np.int64).reshape(-1, 2)


def as_runs(runs: Runs, shift: int = 0) -> np.ndarray:
    """Return runs for a kernel: descriptor i is bit i + `shift`."""
    return np.array([(start, stop, start + shift) for start, stop in runs], dtype=np.int64).reshape(-1, 3)


def chosen(pages: list[int], runs: Runs, match: Match, within: list[int] | None = None) -> Iterator[int]:
    """Yield the indices that match: a loop over the runs, one descriptor at a time."""
    for start, stop in runs:
        for i in range(start, stop):
            if (within is None or within[i // 64] >> i % 64 & 1) and match(pages[i]):
                yield i


def marked(words: list[int], index: list[int]) -> list[int]:
    words = list(words)
    for i in index:
        words[i // 64] |= 1 << i % 64
    return words


def groups(runs: Runs, within: list[int]) -> int:
    """Return how many descriptors of the runs are in 64-page groups with a bit in `within`."""
    return sum(min(64, stop - i) for start, stop in runs for i in range(start, stop, 64) if within[i // 64])


def gaps(runs: Runs) -> Runs:
    return [(stop, start) for (_, stop), (start, _) in pairwise(runs)]


# --- the checks ---------------------------------------------------------------------------------------------


def check_scan(kernels: Any, n: int, runs: Runs, share: float) -> None:
    for rule in MATCHES:
        match = rule(3)
        pages, out = descriptors(n, runs, share), words_of(n, 1)
        before, words = pages.tolist(), out.tolist()
        assert kernels.scan(pages, as_runs(runs), match, out) is None
        assert out.tolist() == marked(words, list(chosen(before, runs, match)))
        assert pages.tolist() == before, "a scan changes nothing"


def check_rewrite(kernels: Any, n: int, runs: Runs, share: float) -> None:
    for rule, same in product(UPDATES, (False, True)):
        check_one_rewrite(kernels.rewrite, rule(3), n, runs, share, same)


def check_rewrite_within(kernels: Any, n: int, runs: Runs, share: float) -> None:
    for rule, same, seed in product(UPDATES, (False, True), (3, 4)):
        check_one_rewrite(kernels.rewrite_within, rule(3), n, runs, share, same, words_of(n, seed))


def check_densities(kernels: Any) -> None:
    """Check groups of 64 with each number of dirty pages: a kernel may treat few and many in different ways."""
    order = np.random.default_rng(0).permuted(np.tile(np.arange(64), (66, 1)), axis=1)
    pages = np.where(order < np.arange(66)[:, None], np.uint64(DIRTY), np.uint64(0)).ravel()
    expected = np.where(pages, np.uint64(DIRTY & ~pte.S2AP_W), pages)
    words = np.packbits(pages != 0, bitorder="little").view(np.uint64)
    out, also = np.zeros((2, 66), dtype=np.uint64)
    tally = kernels.rewrite(pages, as_runs([(0, pages.size)]), pte.clean(3), out, also)
    assert tally == Tally(pages.size, sum(range(65)) + 64, 65)
    assert np.array_equal(pages, expected)
    assert out.tolist() == also.tolist() == words.tolist()


def check_one_rewrite(
    rewrite: Callable[..., Tally],
    update: Update,
    n: int,
    runs: Runs,
    share: float,
    same: bool,
    within: np.ndarray | None = None,
) -> None:
    """Check a rewrite: with its mask if there is one, and with one array for both bitmaps if they are the `same`."""
    pages, out = descriptors(n, runs, share), words_of(n, 1)
    also = out if same else words_of(n, 2)
    before, words, also_words = pages.tolist(), out.tolist(), also.tolist()
    mask = None if within is None else within.tolist()
    index = list(chosen(before, runs, update.where, mask))
    arguments = (as_runs(runs), update) if within is None else (as_runs(runs), update, within)
    tally = rewrite(pages, *arguments, out, also)

    for i in index:
        before[i] = update(before[i])
    assert pages.tolist() == before
    assert out.tolist() == marked(words, index)
    assert also.tolist() == marked(also_words, index)
    assert mask is None or within.tolist() == mask
    check_tally(tally, index, runs, mask if mask is not None else [1] * word_count(n))


def check_tally(tally: Tally, index: list[int], runs: Runs, within: list[int]) -> None:
    """Check the counts: exactly, but that a kernel may have read in the gaps."""
    assert all(type(value) is int for value in tally), "plain numbers, that json can write"
    assert tally.changed == len(index)
    assert tally.words == len({i // 64 for i in index})
    least = groups(runs, within)
    assert least <= tally.read <= least + groups(gaps(runs), within)


def check_fill(kernels: Any) -> None:
    """Check ranges that share words or span some, then each range of two words, over bits that were set."""
    for size, step in product((1, 3, 64, 65), (1, 2, 63, 64, 70)):
        check_one_fill(kernels, 704, [(lo, lo + size) for lo in range(5, 704 - size, size + step)])
    check_one_fill(kernels, 192, [])
    check_one_fill(kernels, 192, [(0, 0), (3, 60), (60, 60), (60, 61), (62, 64), (64, 190), (191, 180), (192, 192)])
    for lo, hi in combinations_with_replacement(range(129), 2):
        check_one_fill(kernels, 128, [(lo, hi)])


def check_one_fill(kernels: Any, n: int, ranges: Runs) -> None:
    words = words_of(n, 1)
    expected = DirtyBitmap.from_words(words.copy(), n)
    kernels.fill(words, as_rows(ranges))
    for lo, hi in ranges:
        expected.set_range(lo, max(0, hi - lo))
    assert words.tolist() == expected.words.tolist(), f"filling {ranges[:9]}"


def check_find(kernels: Any) -> None:
    """Check all patterns of up to 7 entries, at each level."""
    for level, rule, n in product((1, 2, 3), MATCHES, range(8)):
        match = rule(level)
        for number in range(1 << n):
            before = [match.value | 0x12_3456_7000 if number >> i & 1 else 0 for i in range(n)]
            entries = np.array(before, dtype=np.uint64)
            found = kernels.find(entries, match)
            assert found.dtype == np.int64
            assert found.tolist() == runs_of(np.array([number >> i & 1 for i in range(n)], dtype=np.bool_)).tolist()
            assert entries.tolist() == before


PASSES = [check_scan, check_rewrite, check_rewrite_within]


# --- both implementations -----------------------------------------------------------------------------------


@layouts
@shares
@pytest.mark.alike(3)
def test_scan(kernels: ModuleType, n: int, runs: Runs, share: float) -> None:
    check_scan(kernels, n, runs, share)


@layouts
@shares
@pytest.mark.alike(3)
def test_rewrite(kernels: ModuleType, n: int, runs: Runs, share: float) -> None:
    check_rewrite(kernels, n, runs, share)


@layouts
@shares
@pytest.mark.alike(3)
def test_rewrite_within(kernels: ModuleType, n: int, runs: Runs, share: float) -> None:
    check_rewrite_within(kernels, n, runs, share)


def test_densities(kernels: ModuleType) -> None:
    check_densities(kernels)


def test_fill(kernels: ModuleType) -> None:
    check_fill(kernels)


def test_find(kernels: ModuleType) -> None:
    check_find(kernels)


@pytest.mark.parametrize("share", [0.01, 0.5])
def test_more_than_a_block(kernels: ModuleType, share: float) -> None:
    n = vector._BLOCK + 64 * 3 + 5
    runs = [(64, vector._BLOCK - 64), (vector._BLOCK, n)]
    check_one_rewrite(kernels.rewrite, pte.clean(3), n, runs, share, same=False)
    check_one_rewrite(kernels.rewrite_within, pte.clean(3), n, runs, share, False, words_of(n, 3))


@st.composite
def layouts_with_runs(draw: st.DrawFn) -> tuple[int, Runs]:
    """Draw a size and any runs in it: starts at whole words, stops too but for the last."""
    n = draw(st.integers(1, 1500))
    borders = draw(st.lists(st.integers(0, word_count(n)), unique=True, max_size=10).map(sorted))
    flat = [min(64 * border, n) for border in borders[: len(borders) // 2 * 2]]
    return n, [(lo, hi) for lo, hi in zip(flat[::2], flat[1::2], strict=True)]


@pytest.mark.parametrize("seed", range(30))
def test_any_masks(kernels: Any, seed: int) -> None:
    """Predicates of any bits, and changes of bits that these don't ask for."""
    rng = np.random.default_rng(seed)
    bits = [1 << int(bit) for bit in rng.permutation(64)[:4]]
    mask, sets, clears, value = (sum(bit for bit in bits if rng.random() < 0.5) for _ in range(4))
    pages = np.array([sum(bit for bit in bits if i >> bits.index(bit) & 1) for i in range(16)] * 13, dtype=np.uint64)
    update = Update(Match(mask, value & mask), sets, clears & ~sets)
    out, also = np.zeros((2, 4), dtype=np.uint64)
    index = list(chosen(pages.tolist(), [(0, 208)], update.where))
    expected = [update(page) for page in pages.tolist()]
    kernels.rewrite(pages, as_runs([(0, 208)]), update, out, also)
    assert pages.tolist() == expected
    assert out.tolist() == also.tolist() == marked([0] * 4, index)


@settings(max_examples=40 * EFFORT)
@given(layouts_with_runs(), st.floats(0, 1), st.sampled_from([64, 128, 1 << 17]), st.sampled_from([0, 64, 1 << 13]))
def test_any_layout(kernels: ModuleType, layout: tuple[int, Runs], share: float, block: int, gap: int) -> None:
    # With small blocks, the vector kernels' block borders and gaps come everywhere.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vector, "_BLOCK", block)
        patch.setattr(vector, "_GAP", gap)
        for check in PASSES:
            check(kernels, *layout, share)


@given(st.lists(st.integers(0, 640), unique=True, max_size=40).map(sorted))
def test_any_ranges(kernels: ModuleType, borders: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vector, "_BLOCK", 16)  # two ranges at a time
        check_one_fill(kernels, 640, list(zip(borders[::2], borders[1::2], strict=False)))


def test_implementations_count_alike() -> None:
    # `read` may differ where there are gaps, and only there.
    for (n, runs), share in product(LAYOUTS, SHARES):
        tallies = []
        for kernels in (fused, vector):
            pages, out = descriptors(n, runs, share), words_of(n, 1)
            tallies.append(kernels.rewrite(pages, as_runs(runs), pte.clean(3), out, out))
        assert tallies[0][1:] == tallies[1][1:]
        if not gaps(runs):
            assert tallies[0] == tallies[1]


def test_tallies_add_up() -> None:
    assert sum([Tally(1, 2, 3), Tally(10, 20, 30)], Tally()) == Tally(11, 22, 33)
    with pytest.raises(TypeError):
        operator.add(Tally(), (1, 2, 3))


# --- all entries of a level ---------------------------------------------------------------------------------

ENTRIES = (0, 1, 63, 64, 65, 130)
PLACES = [  # the first page, pages of an entry, and how many pages before and after are not asked for
    (0, 512, 0, 0), (-200, 512, 300, 200), (0, 1, 0, 0), (0, 1, 70, 3), (-15, 16, 40, 0), (-7, 100, 1, 2),
    (0, 128, 150, 300), (0, 64, 1 << 60, 0), (0, 64, 64, 64), (3, 64, 64, 64), (-63, 128, 1000, 130),
]  # fmt: skip
TOLD = (BOTH, Notes(None, None), Notes(pte.dirty(2), pte.young(2)), Notes(pte.writable(2), None))


def blocks(n: int, share: float) -> np.ndarray:
    """Return entries of level 2: blocks of all kinds, tables, and nothing; `share` of them dirty."""
    return drawn_blocks(n, share).copy()


@cache
def drawn_blocks(n: int, share: float) -> np.ndarray:
    rng = np.random.default_rng([n, int(share * 100)])
    dirty = pte.dirty(2).value
    kinds = [0, pte.TABLE, dirty & ~pte.DBM, dirty & ~pte.S2AP_W, dirty | pte.TABLE]
    made = np.where(rng.random(n) < share, np.uint64(dirty), rng.choice(np.array(kinds, dtype=np.uint64), n))
    return made | rng.integers(0, ALL, n, dtype=np.uint64, endpoint=True) & np.uint64(ALL & ~pte.dirty(2).mask)


def check_all(kernels: Any, n: int, share: float) -> None:
    sinks = [(False, False), (True, False), (True, True)]
    ways = cycle(product((pte.clean, pte.track, pte.mkold), sinks))
    for (first, size, before, after), notes in product(PLACES, TOLD):
        npages = max(first + n * size, 0)
        lo, hi = min(before, npages), max(npages - after, min(before, npages))
        place = Place(first, size, lo, hi, npages)
        rule, sink = next(ways)
        check_one_all(kernels, rule(2), blocks(n, share), place, notes, *sink)


def check_one_all(
    kernels: Any, update: Update, entries: np.ndarray, place: Place, notes: Notes, kept: bool, same: bool
) -> None:
    """Check a rewrite of all entries against a loop over them; with `same`, other pages are kept in `out`."""
    first, size, lo, hi, end = place
    out, also = words_of(end, 1), words_of(end, 2)
    rest = (out if same else words_of(end, 3)) if kept else words_of(0, 3)
    arrays = (out, also, rest)
    expected = [as_number(array) for array in arrays]
    if same:
        expected[2] = expected[0]
    before, words, changed = entries.tolist(), 0, 0
    for i, desc in enumerate(before):
        if not update.where(desc):
            continue
        before[i], changed = update(desc), changed + 1
        start, stop = max(first + i * size, 0), min(first + (i + 1) * size, end)
        inside = span(max(start, lo), min(stop, hi))
        words += -(-inside.bit_count() // 64)
        if notes.out is not None and notes.out(desc):
            expected[0] |= inside
            if kept:
                expected[2] |= span(start, min(stop, lo)) | span(max(start, hi), stop)
        if notes.also is not None and notes.also(desc):
            expected[1] |= inside
    if same:
        expected[0] = expected[2] = expected[0] | expected[2]
    assert kernels.rewrite_all(entries, update, place, *arrays, notes) == Tally(entries.size, changed, words)
    assert entries.tolist() == before
    assert [as_number(array) for array in arrays] == expected


def as_number(words: np.ndarray) -> int:
    return int.from_bytes(words.astype("<u8").tobytes(), "little")


def span(lo: int, hi: int) -> int:
    """Return a number with the bits [lo, hi) set."""
    return (1 << hi) - (1 << lo) if lo < hi else 0


def check_change_at(kernels: Any, n: int, share: float) -> None:
    rng = np.random.default_rng(n)
    for rule, part in product((pte.clean, pte.relax, pte.relax_dirty, pte.mkold), (0, 0.3, 1)):
        entries, update = blocks(n, share), rule(2)
        index = rng.permutation(np.flatnonzero(rng.random(n) < part))
        before = entries.tolist()
        changed = [i for i in index.tolist() if update.where(before[i])]
        for i in changed:
            before[i] = update(before[i])
        assert kernels.change_at(entries, index, update) == len(changed)
        assert entries.tolist() == before


@pytest.mark.parametrize("n", ENTRIES)
@shares
def test_change_at(kernels: ModuleType, n: int, share: float) -> None:
    check_change_at(kernels, n, share)


@pytest.mark.parametrize("n", ENTRIES)
@shares
@pytest.mark.alike(2)
def test_rewrite_all(kernels: ModuleType, n: int, share: float) -> None:
    check_all(kernels, n, share)


@pytest.mark.parametrize("runs", [[(0, 323)], [(0, 64)], [(64, 128)], [(63, 65), (128, 192)], [(1, 320)], [(322, 323)]])
def test_rewrite_all_of_runs(kernels: ModuleType, runs: Runs) -> None:
    """Runs that begin and end with groups of 64 entries, and go on in the next."""
    entries = pte.make_leaf(np.arange(323, dtype=np.uint64) << np.uint64(21), 2, dbm=True)
    for start, stop in runs:
        entries[start:stop] |= np.uint64(pte.S2AP_W)
    for first, notes in product((0, -300), (BOTH, Notes(pte.dirty(2), pte.dirty(2)))):
        npages = first + 323 * 512
        place = Place(first, 512, 512, npages - 700, npages)
        check_one_all(kernels, pte.clean(2), entries.copy(), place, notes, kept=True, same=False)


def test_rewrite_all_in_small_blocks(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vector, "_BLOCK", 64)
    check_all(kernels, 150, 0.5)


# --- threads, and memory ------------------------------------------------------------------------------------


def test_disjoint_ranges_in_parallel(kernels: ModuleType) -> None:
    n = (1 << 17) + 64 * 7 + 3
    cuts = [0, *sorted(64 * np.random.default_rng(0).choice(n // 64, 30, replace=False)), n]
    parts = [as_runs([(lo, hi)]) for lo, hi in pairwise(cuts)]
    within = words_of(n, 3)
    for share in SHARES:

        def work(part: np.ndarray, pages: np.ndarray, out: np.ndarray, also: np.ndarray) -> Tally:
            first = kernels.rewrite_within(pages, part, pte.clean(3), within, out, also)
            return first + kernels.rewrite(pages, part, pte.clean(3), out, also)

        serial, parallel = ([descriptors(n, [(0, n)], share), words_of(n, 1), words_of(n, 2)] for _ in range(2))
        expected = [work(part, *serial) for part in parts]
        with ThreadPoolExecutor(4) as pool:
            tallies = list(pool.map(lambda part, arrays=parallel: work(part, *arrays), parts))
        assert tallies == expected
        assert all(np.array_equal(a, b) for a, b in zip(serial, parallel, strict=True))


LIMIT = 4 << 20


def peak(function: Callable[[], Any]) -> int:
    """Return the most bytes that `function` held at one time; numpy reports its arrays to tracemalloc."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def slot(n: int) -> SimpleNamespace:
    """Return a slot's descriptors: clean, dirty in few pages, and dirty in many; and its bitmaps."""
    few = np.zeros(n, dtype=np.uint64)
    few[::100] = DIRTY
    half = np.full(n, DIRTY, dtype=np.uint64)
    half[::2] = 0
    return SimpleNamespace(
        n=n,
        clean=np.full(n, DIRTY & ~pte.S2AP_W, dtype=np.uint64),
        few=few,
        half=half,
        out=np.zeros(word_count(n), dtype=np.uint64),
        within=np.full(word_count(n), 0x0F0F_0F0F_0F0F_0F0F, dtype=np.uint64),
    )


@pytest.fixture(scope="module")
def large() -> SimpleNamespace:
    return slot((1 << 23) + 77)  # 64 MiB of descriptors: a boolean for each is twice what is allowed


def peaks(kernels: Any, slot: SimpleNamespace) -> dict[str, int]:
    """Return the peak of each pass over a slot, in one run and in runs of every other stripe."""
    one = as_runs([(0, slot.n)])
    stripes = as_runs([(lo, lo + 512) for lo in range(0, slot.n - 512, 1024)])
    match, update, out = pte.dirty(3), pte.clean(3), slot.out
    calls = {
        "fill": lambda: kernels.fill(out, stripes[:, :2]),
        "scan stripes": lambda: kernels.scan(slot.few, stripes, match, out),
    }
    for name in ("clean", "few", "half"):
        pages, copy = vars(slot)[name], vars(slot)[name].copy()
        calls |= {
            f"scan {name}": lambda pages=pages: kernels.scan(pages, one, match, out),
            f"within {name}": lambda copy=copy: kernels.rewrite_within(copy, one, update, slot.within, out, out),
            f"rewrite {name}": lambda copy=copy: kernels.rewrite(copy, one, update, out, out),
        }
    return {name: peak(call) for name, call in calls.items()}


@pytest.mark.alike(3)
def test_no_large_temporaries(kernels: ModuleType, large: SimpleNamespace) -> None:
    peaks(kernels, slot(2000))  # what it takes to import and to compile doesn't count
    found = peaks(kernels, large)
    assert not {name: size for name, size in found.items() if size > LIMIT}


def test_large_temporaries_would_be_seen(large: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vector, "_BLOCK", 1 << 40)
    found = peaks(vector, large)
    assert {name for name, size in found.items() if size <= LIMIT} <= {"fill", "scan clean", "rewrite clean"}


# --- which implementation -----------------------------------------------------------------------------------


@pytest.fixture
def unchosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hwdbm.kernels, "_active", [])


def test_first_use_chooses_the_preferred(unchosen: None) -> None:
    assert hwdbm.kernels.current() == hwdbm.kernels.available()[0] == "fused"


def test_use_overrides(unchosen: None) -> None:
    for name in ("vector", "fused", "vector"):
        hwdbm.kernels.use(name)
        assert hwdbm.kernels.current() == name
        assert hwdbm.kernels.active().__name__ == f"hwdbm.kernels.{name}"


def test_without_numba(unchosen: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hwdbm.kernels, "find_spec", lambda name: None)
    assert hwdbm.kernels.available() == ("vector",)
    assert hwdbm.kernels.current() == "vector"
    with pytest.raises(ValueError, match="no kernels 'fused' here: there are vector; the extra 'jit' brings numba"):
        hwdbm.kernels.use("fused")
    assert hwdbm.kernels.current() == "vector"


def test_unknown_name(unchosen: None) -> None:
    with pytest.raises(ValueError, match=r"no kernels 'cuda' here: there are fused, vector$"):
        hwdbm.kernels.use("cuda")


def test_implementations_have_the_same_functions() -> None:
    for module in (*map(hwdbm.kernels.named, hwdbm.kernels.available()), hwdbm.kernels.shared()):
        assert all(callable(getattr(module, name)) for name in FUNCTIONS)


# --- what the checks catch ----------------------------------------------------------------------------------


def broken(**functions: Callable[..., Any]) -> SimpleNamespace:
    return SimpleNamespace(**{name: getattr(vector, name) for name in FUNCTIONS} | functions)


def whole_words(pages: Any, runs: Any, update: Any, out: Any, also: Any, notes: Any = BOTH) -> Tally:
    return vector.rewrite(pages, runs & ~63, update, out, also)


def assigned(pages: Any, runs: Any, match: Any, out: Any) -> None:
    out[:] = 0
    vector.scan(pages, runs, match, out)


def one_consumer(pages: Any, runs: Any, update: Any, out: Any, also: Any, notes: Any = BOTH) -> Tally:
    return vector.rewrite(pages, runs, update, out, out)


def reported_only(pages: Any, runs: Any, update: Any, out: Any, also: Any, notes: Any = BOTH) -> Tally:
    return vector.rewrite(pages.copy(), runs, update, out, also)


def everywhere(pages: Any, runs: Any, update: Any, out: Any, also: Any, notes: Any = BOTH) -> Tally:
    tally = vector.rewrite(pages, runs, update, out, also)
    for lo, hi, _ in runs.tolist():
        pages[lo:hi] &= np.uint64(ALL & ~update.clears)
    return tally


def beyond_the_runs(pages: Any, runs: Any, update: Any, out: Any, also: Any, notes: Any = BOTH) -> Tally:
    return vector.rewrite(pages, as_runs([(0, pages.size)]), update, out, also)


def counted_words(pages: Any, runs: Any, update: Any, out: Any, also: Any, notes: Any = BOTH) -> Tally:
    tally = vector.rewrite(pages, runs, update, out, also)
    return tally._replace(changed=tally.words)


def without_mask(pages: Any, runs: Any, update: Any, within: Any, out: Any, also: Any, notes: Any = BOTH) -> Tally:
    return vector.rewrite(pages, runs, update, out, also)


def first_to_last(pages: Any, runs: Any, update: Any, within: Any, out: Any, also: Any, notes: Any = BOTH) -> Tally:
    """Clean from the first to the last bit of each word of the mask, as KVM's mask once was taken."""
    filled = within.copy()
    for i, word in enumerate(within.tolist()):
        filled[i] = (1 << word.bit_length()) - (word & -word) if word else 0
    return vector.rewrite_within(pages, runs, update, filled, out, also)


def told_what_was_asked(
    pages: Any, runs: Any, update: Any, within: Any, out: Any, also: Any, notes: Any = BOTH
) -> Tally:
    tally = vector.rewrite_within(pages, runs, update, within, out, also)
    out |= within
    return tally


def last_in_word_wins(words: Any, ranges: Any) -> None:
    one = ranges[(ranges[:, 0] < ranges[:, 1]) & (ranges[:, 0] >> 6 == ranges[:, 1] - 1 >> 6)]
    vector.fill(words, ranges[ranges[:, 0] >> 6 != ranges[:, 1] - 1 >> 6])
    masks = [(1 << hi) - (1 << lo) for lo, hi in (one & 63 | (one & 63 == 0) * (0, 64)).tolist()]
    words[one[:, 0] >> 6] |= np.array(masks, dtype=np.uint64)


def rounded_out(words: Any, ranges: Any) -> None:
    vector.fill(words, np.stack([ranges[:, 0] & ~63, ranges[:, 1] + 63 & ~63], axis=1))


def unjoined(entries: Any, match: Any) -> Any:
    (index,) = match(entries).nonzero()
    return np.stack([index, index + 1], axis=1)


def beyond_the_range(entries: Any, update: Any, place: Any, *bitmaps: Any) -> Tally:
    return vector.rewrite_all(entries, update, place._replace(hi=min(place.hi + 1, place.end)), *bitmaps)


def kept_by_nobody(entries: Any, update: Any, place: Any, out: Any, also: Any, kept: Any, notes: Any = BOTH) -> Tally:
    return vector.rewrite_all(entries, update, place, out, also, kept[:0], notes)


def told_alike(entries: Any, update: Any, place: Any, out: Any, also: Any, kept: Any, notes: Any = BOTH) -> Tally:
    return vector.rewrite_all(entries, update, place, out, also, kept, Notes(notes.out, notes.out))


def counted_asked(entries: Any, index: Any, update: Any) -> int:
    vector.change_at(entries, index, update)
    return int(index.size)


def changed_all(entries: Any, index: Any, update: Any) -> int:
    return vector.change_at(entries, np.arange(entries.size), update)


MUTANTS = [
    (check_scan, "scan", assigned),
    (check_rewrite, "rewrite", whole_words),
    (check_rewrite, "rewrite", one_consumer),
    (check_rewrite, "rewrite", reported_only),
    (check_rewrite, "rewrite", everywhere),
    (check_rewrite, "rewrite", beyond_the_runs),
    (check_rewrite, "rewrite", counted_words),
    (check_densities, "rewrite", reported_only),
    (check_rewrite_within, "rewrite_within", without_mask),
    (check_rewrite_within, "rewrite_within", first_to_last),
    (check_rewrite_within, "rewrite_within", told_what_was_asked),
    (check_fill, "fill", last_in_word_wins),
    (check_fill, "fill", rounded_out),
    (check_find, "find", unjoined),
    (check_change_at, "change_at", counted_asked),
    (check_change_at, "change_at", changed_all),
    (check_all, "rewrite_all", beyond_the_range),
    (check_all, "rewrite_all", kept_by_nobody),
    (check_all, "rewrite_all", told_alike),
]


@pytest.mark.parametrize(("check", "name", "mutant"), MUTANTS, ids=lambda value: getattr(value, "__name__", value))
def test_check_catches(check: Callable[..., None], name: str, mutant: Callable[..., Any]) -> None:
    case = (*MUTATED, 0.5) if check in PASSES else (65, 0.5) if check in (check_all, check_change_at) else ()
    with pytest.raises(AssertionError):
        check(broken(**{name: mutant}), *case)


@pytest.mark.parametrize(
    "ends", [(64, 128), (0, 64), (64, 256), (0, 323), (256, 323), (60, 200), (128, 129), (127, 320)]
)
def test_runs_that_begin_and_end_with_groups(kernels, ends):
    """Groups of 64 entries are passed over whole: a run that ends with one must not be carried on, nor missed."""
    entries = pte.make_leaf(np.arange(323, dtype=np.uint64) << np.uint64(21), 2, dbm=True)
    entries[slice(*ends)] |= np.uint64(pte.S2AP_W)
    assert kernels.find(entries, pte.dirty(2)).tolist() == [list(ends)]
