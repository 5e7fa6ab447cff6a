"""Explicit-state search: every state that can be reached, each once, the nearest first."""

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import TypeVar

__all__ = ["explore"]

S = TypeVar("S", bound=Hashable)


def explore(start: S, steps: Callable[[S], Iterable[tuple[object, S]]]) -> Iterator[S]:
    """Yield each state that can be reached, once."""
    seen, queue = {start}, deque([start])
    while queue:
        state = queue.popleft()
        yield state
        for _, after in steps(state):
            if after not in seen:
                seen.add(after)
                queue.append(after)
