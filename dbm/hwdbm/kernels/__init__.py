"""The hot loops over flat descriptor arrays, in three implementations with one signature each.

``vector`` is numpy, always there. ``fused`` is numba: one pass that tests, packs and re-protects; it needs the extra
``jit``. Both are for private arrays, which have one owner. ``atomic``, of numba too, is for shared arrays, which
hardware, other threads and other processes write at the same time. An array has its kernels
(`hwdbm.stage2.leaves.Leaves`): `use` says which of the first two a private one gets, by default ``fused`` where numba
is installed.

Functions on runs take ``pte``, an (n,) uint64 array of level-3 descriptors; ``runs``, a (k, 3) int64 array of rows
(start, stop, bit), sorted by bit and disjoint: the descriptors ``pte[start:stop]`` are those of the bitmap's bits from
``bit`` on; and bitmap words. So descriptors may lie where they like, in table pages too. Between runs whose bits are as
far apart as they are, nothing matches, and a kernel may read there too.

Functions at an index take the entries of any level, ``index``, an (n,) int64 array of entries, each once, and a
`Place`, which says which pages they stand for. ``rewrite_all`` takes no index: it is for all the entries of an array.

What was there decides which bits are set (`Notes`), and bits are only ever set. From its first run to its last a call
of ``vector`` or ``fused`` owns descriptors and words: no other thread may write them meanwhile. Calls that own disjoint
ranges may run in parallel threads, and those of ``atomic`` on any ranges. A signal handler that raises during a call
leaves each descriptor as it was, or changed with its bits set.

====================  ==========================================================================
``scan``              set the bit of each descriptor that matches, change nothing
``rewrite``           change each descriptor that matches, set its bit
``rewrite_within``    the same, for descriptors whose bit is set in ``within`` only
``exchange``          put values in place of descriptors, set bits, return what was there
``rewrite_all``       change each entry that matches, set the bits of its pages
``rewrite_at``        the same, for the entries of an index only
``exchange_at``       put values in place of entries, set the bits of their pages, return what was there
``change_at``         change entries that match, and no bitmap
``set_at``            set bits in entries
``fill``              set all bits of the given ranges
``merge``             set in words the bits of others
``remove``            clear in words the bits of others
``find``              return the runs of entries that match
====================  ==========================================================================

Wrong arguments raise `TypeError` or `ValueError` before anything is changed: no argument makes compiled code read or
write outside of its arrays.
"""

import logging
from importlib import import_module
from importlib.util import find_spec
from textwrap import shorten
from typing import Any, Literal, NamedTuple, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from hwdbm.check import array, inside, instance, uint64s
from hwdbm.errors import KernelsError
from hwdbm.kernels._numba import ready
from hwdbm.pte import ANY, Match, Update, clean, dirty

__all__ = ["BOTH", "Kernels", "Notes", "Place", "Tally", "active", "available", "current", "use", "warm_up"]

Name = Literal["vector", "fused"]
Array = NDArray[np.uint64]
Runs = NDArray[np.int64]


class Tally(NamedTuple):
    """The counts of a rewrite: they repeat exactly, for benchmarks and for deciding on a flush.

    Parameters
    ----------
    read : int
        Descriptors read.
    changed : int
        Descriptors that matched, and were rewritten.
    words : int
        64-page groups with at least one of them: bitmap words written.
    """

    read: int = 0
    changed: int = 0
    words: int = 0

    def __add__(self, other: object) -> "Tally":
        if not isinstance(other, Tally):
            return NotImplemented
        return Tally(self.read + other.read, self.changed + other.changed, self.words + other.words)


class Notes(NamedTuple):
    """Predicates on the old value of a changed descriptor that decide whether its bit is set.

    Parameters
    ----------
    out, also : Match or None
        For the first and the second bitmap; None for no bits at all.
    """

    out: Match | None
    also: Match | None


BOTH = Notes(ANY, ANY)
"""The bits of all that were changed."""


class Place(NamedTuple):
    """Which pages the entries of a level stand for, and which of those are meant.

    Parameters
    ----------
    first : int
        The first page of entry 0; negative where it begins before the slot.
    size : int
        Pages of an entry.
    lo, hi : int
        Pages [lo, hi) have their bits set in ``out`` and ``also``.
    end : int
        Other pages of [0, end) have theirs set in ``kept``, where ``out`` is asked for.
    """

    first: int
    size: int
    lo: int
    hi: int
    end: int


class Kernels(Protocol):
    """The interface of an implementation, which is a module; the package's docstring explains the arguments."""

    __name__: str

    def scan(self, pte: Array, runs: Runs, match: Match, out: Array) -> None:
        """Set in `out` the bit of each descriptor that matches."""

    def rewrite(self, pte: Array, runs: Runs, update: Update, out: Array, also: Array, notes: Notes = BOTH) -> Tally:
        """Apply `update`, and set in `out` and `also` the bits of the descriptors that it changed."""

    def rewrite_within(
        self, pte: Array, runs: Runs, update: Update, within: Array, out: Array, also: Array, notes: Notes = BOTH
    ) -> Tally:
        """Apply `update` where the bit in `within` is set; otherwise as `rewrite`."""

    def exchange(self, pte: Array, runs: Runs, values: Array, out: Array, also: Array, notes: Notes = BOTH) -> None:
        """Swap descriptors, in the runs' order, with `values`; set the bits that `notes` asks of what was there."""

    def rewrite_all(
        self, entries: Array, update: Update, place: Place, out: Array, also: Array, kept: Array, notes: Notes = BOTH
    ) -> Tally:
        """Apply `update` to the entries that match, and set the bits of their pages.

        With an empty `kept` only the pages [lo, hi) of the place have bits set. The `words` are those of each entry's
        pages in [lo, hi), part of one counting as one.
        """

    def rewrite_at(
        self,
        entries: Array,
        index: Runs,
        update: Update,
        place: Place,
        out: Array,
        also: Array,
        kept: Array,
        notes: Notes = BOTH,
    ) -> int:
        """Do as `rewrite_all` for the entries `index`, and return how many it changed."""

    def exchange_at(
        self,
        entries: Array,
        index: Runs,
        values: Array,
        place: Place,
        out: Array,
        also: Array,
        kept: Array,
        notes: Notes = BOTH,
    ) -> None:
        """Swap the entries `index` with `values`; set the bits of their pages that `notes` asks of what was there."""

    def change_at(self, entries: Array, index: Runs, update: Update) -> int:
        """Apply `update` to the entries `index`, and return how many it changed."""

    def set_at(self, entries: Array, index: Runs, bits: Array) -> None:
        """Set `bits` in the entries `index`, which may repeat."""

    def fill(self, words: Array, ranges: Runs) -> None:
        """Set the bits of each row [start, stop) of `ranges`: disjoint, in any alignment."""

    def merge(self, words: Array, bits: Array) -> None:
        """Set in `words` the bits that are set in `bits`."""

    def remove(self, words: Array, bits: Array) -> None:
        """Clear in `words` the bits that are set in `bits`."""

    def find(self, entries: Array, match: Match) -> Runs:
        """Return the runs [start, stop) of entries that match."""


# --- which implementation -------------------------------------------------------------------------------------

_active: list[Kernels] = []  # one, once it is chosen


def available() -> tuple[Name, ...]:
    """Return the implementations that can be used here, the preferred one first.

    Examples
    --------
    >>> "vector" in available()
    True
    """
    return ("fused", "vector") if find_spec("numba") else ("vector",)


def use(name: Name) -> None:
    """Use the implementation `name` for arrays that none has worked on yet.

    Arrays keep the implementation that worked on them first, or that they were made with: several work side by side.

    Parameters
    ----------
    name : {"vector", "fused"}

    Raises
    ------
    KernelsError
        If there is no such implementation, or it can't be used here.
    """
    _active[:] = [named(name)]


def named(name: Name) -> Kernels:
    """Return an implementation for private arrays, imported and so compiled; `use` says what it raises."""
    instance(name, str, "name")
    if name not in available():
        hint = "; the extra 'jit' brings numba" if name == "fused" else ""
        raise KernelsError(f"no kernels {name!r} here: there are {', '.join(available())}{hint}")
    return _imported(name)


def shared() -> Kernels:
    """Return the implementation for shared arrays.

    Raises
    ------
    KernelsError
        If there is no numba, or it can't compile here.
    """
    if "fused" not in available():
        raise KernelsError("shared arrays need atomic operations, and so numba: the extra 'jit' brings it")
    return _imported("atomic")


def _imported(name: str) -> Kernels:
    try:
        if name != "vector":
            ready()
        return cast(Kernels, import_module(f"hwdbm.kernels.{name}"))
    except Exception as error:  # whatever numba or LLVM raises where they don't work
        why = str(error) or type(error).__name__
        raise KernelsError(f"the kernels {name!r} can't be compiled here: {why}") from error


def active() -> Kernels:
    """Return the implementation that new arrays get, choosing one at the first call.

    Where ``fused`` is there but can't be compiled, ``vector`` takes over, and the log says so once.
    """
    if not _active:
        for name in available():
            try:
                use(name)
                break
            except ValueError as error:
                _log.warning("hwdbm: %s; 'vector' takes over", shorten(str(error), 200, placeholder=" ..."))
    return _active[0]


def current() -> Name:
    """Return the name of the implementation that new arrays get."""
    return "fused" if active().__name__.endswith("fused") else "vector"


def warm_up() -> None:
    """Load the implementation that new arrays get, compiling it if it never was, and call each function once.

    Examples
    --------
    >>> warm_up()
    """
    kernels, runs, index = active(), np.array([[0, 64, 0]], dtype=np.int64), np.zeros(1, dtype=np.int64)
    pte, words, place = np.zeros(64, dtype=np.uint64), np.zeros(1, dtype=np.uint64), Place(0, 1, 0, 64, 64)
    mask = words.copy()
    mask.flags.writeable = False
    kernels.scan(pte, runs, dirty(3), words)
    kernels.rewrite(pte, runs, clean(3), words, words)
    for within in (words, mask):
        kernels.rewrite_within(pte, runs, clean(3), within, words, words)
    kernels.exchange(pte, runs, pte.copy(), words, words)
    kernels.rewrite_all(pte, clean(2), place, words, words, words)
    kernels.rewrite_at(pte, index, clean(2), place, words, words, words)
    kernels.exchange_at(pte, index, words.copy(), place, words, words, words)
    kernels.change_at(pte, index, clean(2))
    kernels.set_at(pte, index, words)
    kernels.merge(words, mask)
    kernels.remove(words, mask)
    kernels.find(pte, dirty(2))
    kernels.fill(words, runs[:, :2])


# --- the doors ------------------------------------------------------------------------------------------------


def check_runs(
    pte: Array,
    runs: Runs,
    *written: Array,
    within: Array | None = None,
    values: Array | None = None,
    change: bool = False,
) -> Runs:
    """Return `runs`, contiguous, after checking that they lie in the arrays; its cost is that of the runs."""
    uint64s(pte, "pte", writable=change)
    runs = _indices(runs, "runs", 3)
    words = min([uint64s(array, "words", writable=True).size for array in written])
    if within is not None:
        words = min(words, uint64s(within, "within").size)
    if len(runs) == 1:  # nearly always
        ((start, stop, bit),) = runs.tolist()
        fits, total = 0 <= start <= stop <= pte.size and 0 <= bit <= words * 64 - (stop - start), stop - start
    elif len(runs):
        starts, stops, bits = runs.T
        # Each by itself first: sums of numbers that are far out of range wrap around.
        fits = inside(starts, 0, pte.size) and inside(stops, 0, pte.size) and inside(bits, 0, words * 64)
        sizes = stops - starts
        fits = fits and int(sizes.min()) >= 0 and int((bits + sizes).max()) <= words * 64
        fits = fits and bool((bits[1:] >= (bits + sizes)[:-1]).all())  # the descriptors may lie where they like
        total = int(sizes.sum())
    else:
        fits, total = True, 0
    if not fits:
        raise ValueError(f"runs aren't sorted by bit, disjoint, and inside of {pte.size} descriptors and {words} words")
    if values is not None:
        uint64s(values, "values", total, writable=True)
    return runs


def check_at(
    entries: Array, index: Runs | None = None, place: Place | None = None, *words: Array, values: Array | None = None
) -> Runs:
    """Return `index`, contiguous, after checking that it lies in `entries`, and the pages of `place` in the words."""
    uint64s(entries, "entries", writable=not (index is None and place is None))
    index = _NO_INDEX if index is None else _indices(index, "index", 1)
    if not inside(index, 0, entries.size - 1):
        raise ValueError(f"index isn't inside of {entries.size} entries")
    if place is not None:
        out, also, kept = [uint64s(array, "words", writable=True).size * 64 for array in words]
        first, size, lo, hi, end = place
        if not (0 < size <= 1 << 40 and abs(first) <= 1 << 52):
            raise ValueError(f"an entry at page {first} of {size} pages isn't in a slot")
        if not (0 <= lo <= hi <= min(out, also) and 0 <= end <= (kept or end) <= 1 << 52):
            raise ValueError(f"pages {lo}..{hi} and 0..{end} aren't inside of the words")
    if values is not None:
        uint64s(values, "values", index.size, writable=place is not None)
    return index


def check_words(words: Array, bits: Array) -> None:
    """Raise if two arrays of words aren't of one size, or the first isn't to be written."""
    uint64s(bits, "bits", uint64s(words, "words", writable=True).size)


def check_ranges(words: Array, ranges: Runs) -> Runs:
    """Return `ranges`, contiguous, after checking that they lie in the words."""
    size = uint64s(words, "words", writable=True).size * 64
    ranges = _indices(ranges, "ranges", 2)
    if not inside(ranges, 0, size):
        raise ValueError(f"ranges aren't inside of {size} bits")
    return ranges


def _indices(value: Any, name: str, columns: int) -> Runs:
    array(value, np.int64, name)
    if value.ndim != min(columns, 2) or (columns > 1 and value.shape[1] != columns):
        raise ValueError(f"{name} have shape (n,{f' {columns}' if columns > 1 else ''}), not {value.shape}")
    return np.ascontiguousarray(value) if not (value.flags.c_contiguous and value.flags.aligned) else value


_NO_INDEX = np.array([], dtype=np.int64)
_log = logging.getLogger("hwdbm")
