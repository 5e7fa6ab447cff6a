"""No input makes a compiled kernel read or write outside of its arrays: see `guards`."""

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from effort import EFFORT
from seen import as_seen

from hwdbm import kernels, pte

GUARDS = Path(__file__).parents[1] / "guards.py"


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-P", *args], capture_output=True, text=True, timeout=600, check=False)


def test_nothing_is_touched_outside_of_an_array(tmp_path: Path) -> None:
    notes = tmp_path / "last"
    done = run(str(GUARDS), "1", str(6 * EFFORT), str(notes))
    assert done.returncode == 0, f"{notes.read_text().strip() if notes.exists() else ''}\n{done.stderr}"
    taken = {name: int(count) for name, _, count in (each.partition(":") for each in done.stdout.split())}
    assert set(taken) >= set(kernels.available())
    assert min(taken.values()) > 100 * EFFORT  # most calls are good ones


@pytest.mark.parametrize("behind", [True, False])
def test_the_guards_bite(behind: bool) -> None:
    touch = "array.size" if behind else "-1"
    done = run(
        "-c",
        f"import sys; sys.path.insert(0, {str(GUARDS.parent)!r}); import guards, numpy as np\n"
        f"array = guards.guarded(np.arange(5, dtype=np.uint64), behind={behind})\n"
        "assert array.tolist() == [0, 1, 2, 3, 4]\n"
        f"print(np.lib.stride_tricks.as_strided(array[:1], (3,), (8 * ({touch}),))[1])",
    )
    assert done.returncode == -signal.SIGSEGV, done.stderr


def implementations() -> list[Callable[[], kernels.Kernels]]:
    found = [lambda name=name: kernels.named(name) for name in kernels.available()]
    return [*found, kernels.shared] if len(found) > 1 else found


@pytest.mark.parametrize("implementation", implementations())
@pytest.mark.parametrize(
    "runs",
    [
        [[0, 64, 0], [64, 128, (1 << 63) - 64]], [[0, 64, 0], [64, 128, -64]], [[0, 64, 0], [1, -(1 << 63), 0]],
        [[0, 64, 0], [64, 257, 64]], [[0, 64, 0], [64, 128, 193]], [[64, 128, 64], [0, 64, 0]],
        [[0, 128, 0], [64, 192, 64]], [[0, 64, 0], [128, 127, 0]], [[0, 64, (1 << 63) - 64]], [[-64, 0, 0]],
    ],
)  # fmt: skip
def test_runs_that_are_none(implementation: Callable[[], kernels.Kernels], runs: list[list[int]]) -> None:
    entries, words = np.full(256, pte.dirty(3).value, dtype=np.uint64), np.zeros(4, dtype=np.uint64)
    before, rows = entries.copy(), np.array(runs, dtype=np.int64)
    chosen = implementation()
    for call in (
        lambda: chosen.rewrite(entries, rows, pte.clean(3), words, words),
        lambda: chosen.rewrite_within(entries, rows, pte.clean(3), ~words, words, words),
        lambda: chosen.scan(entries, rows, pte.dirty(3), words),
    ):
        with pytest.raises(ValueError, match="runs aren't sorted by bit, disjoint, and inside of 256"):
            call()
    assert np.array_equal(entries, before)
    assert not words.any()


@pytest.mark.parametrize(
    ("place", "fits"),
    [
        ((0, 1, 0, 64, 64), True), ((0, 1, 0, 0, 0), True), ((0, 1, 64, 64, 0), True), ((-3, 1, 0, 1, 64), True),
        ((1 << 52, 1 << 40, 0, 1, 64), True), ((-(1 << 52), 1, 0, 1, 64), True),
        ((0, 0, 0, 1, 1), False), ((0, (1 << 40) + 1, 0, 1, 1), False), (((1 << 52) + 1, 1, 0, 1, 1), False),
        ((0, 1, -1, 1, 1), False), ((0, 1, 2, 1, 1), False), ((0, 1, 0, 65, 64), False),
        ((0, 1, 0, 1, -1), False), ((0, 1, 0, 1, 129), False),
    ],
)  # fmt: skip
def test_places(place: tuple[int, ...], fits: bool) -> None:
    """`out` has 64 pages, `also` and `kept` have 128; the ends of a range are in it."""
    entries, index = np.zeros(4, dtype=np.uint64), np.array([1], dtype=np.int64)
    out, also, kept = (np.zeros(count, dtype=np.uint64) for count in (1, 2, 2))
    for words in ((out, also, kept), (also, out, kept)):
        if fits:
            assert kernels.check_at(entries, index, kernels.Place(*place), *words) is index
        else:
            with pytest.raises(ValueError, match=r"isn't in a slot|aren't inside of the words"):
                kernels.check_at(entries, index, kernels.Place(*place), *words)


def test_without_words_to_keep_pages_in_there_is_no_end_to_them() -> None:
    entries, index = np.zeros(4, dtype=np.uint64), np.array([1], dtype=np.int64)
    words = np.zeros(1, dtype=np.uint64), np.zeros(1, dtype=np.uint64), np.zeros(0, dtype=np.uint64)
    for end, fits in ((1 << 52, True), ((1 << 52) + 1, False)):
        place = kernels.Place(0, 1, 0, 1, end)
        if fits:
            kernels.check_at(entries, index, place, *words)
        else:
            with pytest.raises(ValueError, match="aren't inside"):
                kernels.check_at(entries, index, place, *words)


@pytest.mark.parametrize("frozen", ["pte", "out", "also", "within", "values"])
def test_what_is_written_may_be(frozen: str) -> None:
    arrays = {name: np.zeros(4, dtype=np.uint64) for name in ("out", "also", "within")}
    arrays |= {name: np.zeros(256, dtype=np.uint64) for name in ("pte", "values")}
    arrays[frozen].flags.writeable = False
    runs = np.array([[0, 256, 0]], dtype=np.int64)

    def check(*, change: bool) -> np.ndarray:
        more = {name: arrays[name] for name in ("within", "values")}
        return kernels.check_runs(arrays["pte"], runs, arrays["out"], arrays["also"], change=change, **more)

    if frozen in ("out", "also", "values"):
        for change in (True, False):
            with pytest.raises(ValueError, match="read-only"):
                check(change=change)
    elif frozen == "pte":
        with pytest.raises(ValueError, match="read-only"):
            check(change=True)
        assert check(change=False).tolist() == runs.tolist()
    else:  # it is only read
        assert check(change=True).tolist() == runs.tolist()


RULE, MATCH, PLACE = pte.clean(3), pte.dirty(3), kernels.Place(0, 1, 0, 256, 256)
CALLS: dict[str, tuple[Any, ...]] = {  # a name is the array's of that name
    "scan": ("pte", "runs", MATCH, "out"),
    "rewrite": ("pte", "runs", RULE, "out", "also"),
    "rewrite_within": ("pte", "runs", RULE, "within", "out", "also"),
    "exchange": ("pte", "runs", "values", "out", "also"),
    "rewrite_all": ("pte", RULE, PLACE, "out", "also", "kept"),
    "rewrite_at": ("pte", "index", RULE, PLACE, "out", "also", "kept"),
    "exchange_at": ("pte", "index", "few", PLACE, "out", "also", "kept"),
    "change_at": ("pte", "index", RULE),
    "set_at": ("pte", "index", "few"),
    "fill": ("out", "ranges"),
    "find": ("pte", MATCH),
    "merge": ("out", "also"),
    "remove": ("out", "also"),
}


def read_only(implementation: kernels.Kernels) -> Iterator[str]:
    """Yield of each function what it says of each of its arrays that can't be written."""
    for name, arguments in CALLS.items():
        for frozen in (each for each in arguments if isinstance(each, str)):
            arrays = {each: np.zeros(4, dtype=np.uint64) for each in ("out", "also", "within", "kept")}
            arrays |= {each: np.full(256, MATCH.value, dtype=np.uint64) for each in ("pte", "values")}
            arrays |= {"few": np.zeros(2, dtype=np.uint64), "index": np.array([3, 64])}
            arrays |= {"runs": np.array([[0, 256, 0]]), "ranges": np.array([[3, 70]])}
            arrays[frozen].flags.writeable = False
            try:
                given = (arrays[each] if isinstance(each, str) else each for each in arguments)
                getattr(implementation, name)(*given)
                answer = "is only read"
            except ValueError as error:
                answer = str(error)
            yield f"{name} {frozen}: {answer}\n"


@pytest.mark.parametrize("implementation", implementations())
def test_which_arrays_may_be_read_only_was_looked_at(implementation: Callable[[], kernels.Kernels]) -> None:
    """All implementations say the same."""
    as_seen("limits/kernels.txt", "".join(read_only(implementation())))


WRONG: dict[str, Callable[[np.ndarray], Any]] = {
    "of int32": lambda array: array.astype(np.int32),
    "of float": lambda array: array.astype(np.float64),
    "big-endian": lambda array: array.astype(array.dtype.newbyteorder(">")),
    "with one more axis": lambda array: array[None],
    "of two columns": lambda array: np.stack([array.ravel(), array.ravel()], axis=1),
    "every second": lambda array: np.repeat(array, 2, axis=0)[::2],
    "without its last": lambda array: array[:-1].copy(),
    "of nothing": lambda array: array[:0].copy(),
    "one more": lambda array: array + array.dtype.type(1),
    "one less": lambda array: array - array.dtype.type(1),
    "far beyond": lambda array: array + array.dtype.type((1 << 62) - 1),
    "a list": lambda array: array.tolist(),
}


def refused(implementation: kernels.Kernels) -> Iterator[str]:
    """Yield of each function what it says of each of its arrays that is wrong in some way."""
    for name, arguments in CALLS.items():
        for wrong in (each for each in arguments if isinstance(each, str)):
            for way, change in WRONG.items():
                arrays: dict[str, Any] = {
                    each: np.zeros(4, dtype=np.uint64) for each in ("out", "also", "within", "kept")
                }
                arrays |= {each: np.full(256, MATCH.value, dtype=np.uint64) for each in ("pte", "values")}
                arrays |= {"few": np.zeros(2, dtype=np.uint64), "index": np.array([3, 254])}
                arrays |= {"runs": np.array([[0, 64, 0], [128, 256, 128]]), "ranges": np.array([[3, 255]])}
                arrays["values"] = arrays["values"][:192].copy()
                arrays[wrong] = change(arrays[wrong])
                given = (arrays[each] if isinstance(each, str) else each for each in arguments)
                try:
                    getattr(implementation, name)(*given)
                except (TypeError, ValueError) as error:
                    yield f"{name} {wrong} {way}: {str(error)[:160]}\n"


def test_what_is_said_of_arrays_that_are_wrong_was_looked_at() -> None:
    """The implementations say the same: they check by the same functions."""
    said = {name: "".join(refused(kernels.named(name))) for name in kernels.available()}
    for text in said.values():
        as_seen("limits/arrays.txt", text)
