"""A symbolic executor: ordinary Python, run once for each path that a 64-bit value can take through it.

`Word` stands for all values of a 64-bit word at once. Its operators build z3 terms; only when the code asks for a
truth value (an ``if``, an ``is``, an index) does the run fork. So the functions of the package are proved as they
are, whether they are ifs, masks, or numpy code over object arrays, and no copy of them has to be kept true.
"""

import operator
from collections.abc import Callable
from itertools import count
from typing import Any

import z3


def _binary(operation: Callable[[Any, Any], Any]) -> Callable[["Word", Any], "Word"]:
    def method(self: "Word", other: Any) -> "Word":
        return Word(operation(self.term, term(other)), self._path)

    return method


class Word:
    """A z3 term, 64 bits or a truth value, on one path."""

    def __init__(self, term: Any, path: "_Path") -> None:
        self.term, self._path = term, path

    def __bool__(self) -> bool:
        return self._path.decide(self.term if z3.is_bool(self.term) else self.term != 0)

    def __index__(self) -> int:
        if z3.is_bool(self.term):
            return int(bool(self))
        return next(value for value in count() if self == value)

    def __invert__(self) -> "Word":
        return Word(~self.term, self._path)

    __and__ = __rand__ = _binary(operator.and_)
    __or__ = __ror__ = _binary(operator.or_)
    __xor__ = __rxor__ = _binary(operator.xor)
    __add__ = _binary(operator.add)
    __sub__ = _binary(operator.sub)
    __mul__ = _binary(operator.mul)
    __lshift__ = _binary(operator.lshift)
    __rshift__ = _binary(z3.LShR)  # descriptors are unsigned
    __eq__ = _binary(operator.eq)
    __hash__ = None


def term(value: Any) -> Any:
    """Return the z3 term of a `Word`, or of anything that is an integer to Python, modulo 2**64."""
    return value.term if isinstance(value, Word) else z3.BitVecVal(int(value), 64)


class _Path:
    """One run: the decisions to take first, those that were taken, and what is known by them."""

    def __init__(self, first: list[bool], pending: list[list[bool]]) -> None:
        self._first, self._pending, self._taken = first, pending, list[bool]()
        self._known: list[Any] = []

    def decide(self, condition: Any) -> bool:
        if len(self._taken) < len(self._first):
            choice = self._first[len(self._taken)]
        else:
            can_fail = self.model(z3.Not(condition)) is not None
            choice = not can_fail or self.model(condition) is not None
            if choice and can_fail:
                self._pending.append([*self._taken, False])
        self._taken.append(choice)
        self._known.append(condition if choice else z3.Not(condition))
        return choice

    def model(self, *conditions: Any) -> Any:
        """Return values for which `conditions` and all that is known hold; None if there are none."""
        solver = z3.SolverFor("QF_BV")  # a new one each time: asked twice, it is five times slower
        solver.add(*self._known, *conditions)
        answer = solver.check()
        assert answer != z3.unknown, solver.reason_unknown()
        return solver.model() if answer == z3.sat else None


def counterexample(claim: Callable[..., Any], words: int = 1) -> tuple[int, ...] | None:
    """Return values for which `claim`, a function of `words` 64-bit words, is false; None if there are none."""
    pending: list[list[bool]] = [[]]
    names = [z3.BitVec(f"word{i}", 64) for i in range(words)]
    while pending:
        path = _Path(pending.pop(), pending)
        if not claim(*(Word(name, path) for name in names)):
            model = path.model()
            return tuple(model.eval(name, model_completion=True).as_long() for name in names)
    return None


def prove(claim: Callable[..., Any], words: int = 1) -> None:
    """Fail if `claim` is false for any values, and name them."""
    found = counterexample(claim, words)
    assert found is None, f"false for {', '.join(f'{value:#018x}' for value in found or ())}"
