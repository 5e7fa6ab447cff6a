"""Explicit-state search: every state that can be reached, each once, the nearest first."""

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

S = TypeVar("S", bound=Hashable)
Steps = Callable[[S], Iterable[tuple[object, S]]]


def explore(start: S, steps: Steps[S]) -> Iterator[S]:
    """Yield each state that can be reached, once."""
    seen, queue = {start}, deque([start])
    while queue:
        state = queue.popleft()
        yield state
        for _, after in steps(state):
            if after not in seen:
                seen.add(after)
                queue.append(after)


@dataclass(eq=False, slots=True)
class Graph(Generic[S]):
    """The states that were reached, in the order of their distance, and the steps between them.

    Attributes
    ----------
    states : list
        The states; that at 0 is the start.
    edges : list of list of (label, int)
        For each state its steps, and the states that they lead to.
    parents : list of (int, label)
        For each state the one that it was reached from first, and by which step.
    """

    states: list[S] = field(default_factory=list)
    edges: list[list[tuple[object, int]]] = field(default_factory=list)
    parents: list[tuple[int, object]] = field(default_factory=list)

    def path(self, at: int) -> list[tuple[object, S]]:
        """Return the steps of a shortest way to a state, each with the state after it."""
        way: list[tuple[object, S]] = []
        while at:
            before, label = self.parents[at]
            way.append((label, self.states[at]))
            at = before
        return way[::-1]

    def reaching(self, targets: Iterable[int]) -> set[int]:
        """Return the states from which one of `targets` can be reached."""
        before: list[list[int]] = [[] for _ in self.states]
        for at, steps in enumerate(self.edges):
            for _, to in steps:
                before[to].append(at)
        found, todo = set(targets), list(targets)
        while todo:
            for at in before[todo.pop()]:
                if at not in found:
                    found.add(at)
                    todo.append(at)
        return found

    def on_cycles(self) -> list[int]:
        """Return for each state the number of its strongly connected component, as Tarjan's algorithm finds them."""
        index, low, component = ([-1] * len(self.states) for _ in range(3))
        stack: list[int] = []
        count = 0
        for root in range(len(self.states)):
            if index[root] >= 0:
                continue
            work = [(root, iter(self.edges[root]))]
            index[root] = low[root] = count
            count += 1
            stack.append(root)
            while work:
                at, rest = work[-1]
                for _, to in rest:
                    if index[to] < 0:
                        index[to] = low[to] = count
                        count += 1
                        stack.append(to)
                        work.append((to, iter(self.edges[to])))
                        break
                    if component[to] < 0:
                        low[at] = min(low[at], index[to])
                else:
                    work.pop()
                    if work:
                        low[work[-1][0]] = min(low[work[-1][0]], low[at])
                    if low[at] == index[at]:
                        while component[at] < 0:
                            component[stack.pop()] = at
        return component


def search(
    start: S, steps: Steps[S], stop: Callable[[S, Sequence[object]], bool], limit: int | None = None
) -> Graph[S]:
    """Explore breadth first, until `stop` is true of a state and the labels of its steps, or all is explored.

    Raises
    ------
    ValueError
        If there are more than `limit` states.
    """
    graph: Graph[S] = Graph([start], [], [(0, None)])
    seen = {start: 0}
    at = 0
    while at < len(graph.states):
        edges: list[tuple[object, int]] = []
        for label, after in steps(graph.states[at]):
            to = seen.get(after)
            if to is None:
                to = seen[after] = len(graph.states)
                if limit is not None and to >= limit:
                    raise ValueError(f"there are more than {limit} states")
                graph.states.append(after)
                graph.parents.append((at, label))
            edges.append((label, to))
        graph.edges.append(edges)
        if stop(graph.states[at], edges):
            break
        at += 1
    return graph
