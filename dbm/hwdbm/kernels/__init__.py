"""The hot loops over flat descriptor arrays, in two implementations with one signature each.

``vector`` is numpy and numexpr, always there. ``fused`` is numba: one pass that tests, packs and re-protects; it
needs the extra ``jit``. The first use picks ``fused`` where numba is installed; `use` overrides that.

Every function takes ``pte``, an (n,) uint64 array of level-3 descriptors; ``runs``, a (k, 2) int64 array of
[start, stop) indices into it, sorted, disjoint, each start a multiple of 64 and each stop one too or n; and bitmap
words of which bit i stands for ``pte[i]``. Between the runs of one call nothing matches, so a kernel may read there
too. Bits are only ever set in ``out`` and ``also``. From its first run to its last a call owns descriptors and
words: nobody else may write them meanwhile. Calls that own disjoint ranges may run in parallel threads.

====================  ==========================================================================
``scan``              set the bit of each descriptor that matches, change nothing
``rewrite``           change each descriptor that matches, set its bit
``rewrite_within``    the same, for descriptors whose bit is set in ``within`` only
``fill``              set all bits of the given ranges
``rewrite_runs``      change each entry that matches, and return the runs of them: for blocks, which are few
====================  ==========================================================================
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Literal, NamedTuple, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from hwdbm.pte import Match, Update, clean, dirty

__all__ = ["Kernels", "Tally", "active", "available", "current", "use", "warm_up"]

Name = Literal["vector", "fused"]
Array = NDArray[np.uint64]
Runs = NDArray[np.int64]


class Tally(NamedTuple):
    """What a rewrite did: counts that don't jitter, for benchmarks and for deciding on a flush.

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


class Kernels(Protocol):
    """What an implementation, a module, provides; the package's docstring says what the arguments are."""

    __name__: str

    def scan(self, pte: Array, runs: Runs, match: Match, out: Array) -> None:
        """Set in `out` the bit of each descriptor that matches."""

    def rewrite(self, pte: Array, runs: Runs, update: Update, out: Array, also: Array) -> Tally:
        """Apply `update`, and set in `out` and `also` the bit of each descriptor that it changed."""

    def rewrite_within(self, pte: Array, runs: Runs, update: Update, within: Array, out: Array, also: Array) -> Tally:
        """Apply `update` where the bit in `within` is set; otherwise as `rewrite`."""

    def fill(self, words: Array, ranges: Runs) -> None:
        """Set the bits of each row [start, stop) of `ranges`: disjoint, in any alignment."""

    def rewrite_runs(self, entries: Array, update: Update) -> Runs:
        """Apply `update` to any entries, and return the runs [start, stop) of those that it was applied to."""


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
    """Use the implementation `name` from now on, in every thread.

    Parameters
    ----------
    name : {"vector", "fused"}

    Raises
    ------
    ValueError
        If there is no such implementation, or it can't be used here.
    """
    if name not in available():
        hint = "; the extra 'jit' brings numba" if name == "fused" else ""
        raise ValueError(f"no kernels {name!r} here: there are {', '.join(available())}{hint}")
    _active[:] = [cast(Kernels, import_module(f"hwdbm.kernels.{name}"))]


def active() -> Kernels:
    """Return the implementation in use, choosing one at the first call."""
    if not _active:
        use(available()[0])
    return _active[0]


def current() -> Name:
    """Return the name of the implementation in use."""
    return "fused" if active().__name__.endswith("fused") else "vector"


def warm_up() -> None:
    """Load the implementation in use, and compile it if it never was: half a second that a first call takes otherwise.

    Examples
    --------
    >>> warm_up()
    """
    kernels, runs = active(), np.array([[0, 64]], dtype=np.int64)
    pte, words = np.zeros(64, dtype=np.uint64), np.zeros(1, dtype=np.uint64)
    kernels.scan(pte, runs, dirty(3), words)
    kernels.rewrite(pte, runs, clean(3), words, words)
    kernels.rewrite_within(pte, runs, clean(3), words, words, words)
    kernels.rewrite_runs(pte, clean(2))
    kernels.fill(words, runs)
