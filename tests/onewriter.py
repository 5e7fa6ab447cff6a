"""One writer of descriptors: while tests run, nobody in the package but `Leaves` is handed arrays that can be written.

Tests are handed them, since they write as the MMU does, and so are the references, which are slow writers on purpose.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from operator import index
from types import FrameType

import numpy as np
from numpy.typing import NDArray

from hwdbm.stage2 import Stage2
from hwdbm.stage2.leaves import Leaves

# The reference, its vCPU, what draws tables at random, and what puts the states of an exploration or a benchmark.
REFERENCES = {
    "hwdbm.walker",
    "hwdbm.machine.reference",
    "hwdbm.testing",
    "hwdbm.races.production",
    "hwdbm.bench.suite",
}

Arrays = dict[int, NDArray[np.uint64]]


class Looked(Arrays):
    """The arrays of leaves, with views that can only be read."""

    @cached_property
    def views(self) -> Arrays:
        return {level: read_only(array) for level, array in self.items()}


def may_write(frame: FrameType) -> bool:
    """Return whether a caller is a method of `Leaves`, one of the references, or outside of the package."""
    if module_may(frame.f_globals.get("__name__", "")):
        return True
    code = frame.f_code
    if code.co_filename.startswith("<doctest"):  # which is the MMU, too
        return True
    # All locals are copied to look at one, and this is asked millions of times.
    has_self = "self" in code.co_varnames or "self" in code.co_freevars
    return has_self and isinstance(frame.f_locals.get("self"), Leaves)


@cache
def module_may(module: str) -> bool:
    return module == "hwdbm.stage2.leaves" or module in REFERENCES or not module.startswith("hwdbm.")


class Level:
    """`Leaves.level`, which is another to everybody but its owner: the arrays there can only be read."""

    def __init__(self) -> None:
        self.handed = 0  # how often they were handed out to be written

    def __set__(self, leaves: Leaves, arrays: Arrays) -> None:
        leaves.__dict__["level"] = Looked(arrays)

    def __get__(self, leaves: Leaves | None, owner: type) -> "Arrays | Level":
        if leaves is None:
            return self
        arrays: Looked = leaves.__dict__["level"]
        if may_write(sys._getframe(1)):
            self.handed += 1
            return arrays
        return arrays.views


def read_only(array: NDArray[np.uint64]) -> NDArray[np.uint64]:
    if not isinstance(array, np.ndarray):  # of tables in place, which only their own leaves know how to write
        return array
    view = array.view()
    view.flags.writeable = False
    return view


@contextmanager
def enforced() -> Iterator[Level]:
    """Have all leaves looked after. Whoever else in the package writes one gets numpy's ValueError."""
    found, real = Level(), Stage2.level

    def level(self: Stage2, level: int) -> NDArray[np.uint64]:
        arrays: Looked = self._leaves.__dict__["level"]
        if type(level) is not int or level not in arrays:
            real(self, level)  # says what is wrong with it
        return (arrays if may_write(sys._getframe(1)) else arrays.views)[index(level)]

    level.__doc__, level.__wrapped__ = real.__doc__, real
    Leaves.level, Stage2.level = found, level
    try:
        yield found
    finally:
        del Leaves.level
        Stage2.level = real
