"""The search for cycles and ways in a graph of states, beside what each is by its definition."""

import random

import pytest

from hwdbm.races.search import Graph, search


def reached(edges, start):
    found, todo = {start}, [start]
    while todo:
        for _, to in edges[todo.pop()]:
            if to not in found:
                found.add(to)
                todo.append(to)
    return found


@pytest.mark.parametrize("seed", range(100))
def test_any_small_graph(seed):
    rng = random.Random(seed)
    size = rng.randrange(1, 9)
    edges = [[("", rng.randrange(size)) for _ in range(rng.choice([0, 1, 1, 2]))] for _ in range(size)]
    graph, ways = Graph(list(range(size)), edges, []), [reached(edges, at) for at in range(size)]
    component = graph.on_cycles()
    for a in range(size):
        assert graph.reaching([a]) == {b for b in range(size) if a in ways[b]}
        for b in range(size):
            assert (component[a] == component[b]) == (a in ways[b] and b in ways[a])


def test_a_way_is_a_shortest_one_and_the_limit_is_the_last_state():
    """States are numbers, of which each is doubled or raised by one."""

    def steps(state):
        return [("double", 2 * state), ("raise", state + 1)]

    graph = search(1, steps, lambda state, _: state == 10)
    assert graph.path(graph.states.index(10)) == [("double", 2), ("double", 4), ("raise", 5), ("double", 10)]
    wheel = [("", 0), ("", 1), ("", 2)]
    assert len(search(0, lambda _: wheel, lambda *_: False, limit=3).states) == 3
    with pytest.raises(ValueError, match="more than 2 states"):
        search(0, lambda _: wheel, lambda *_: False, limit=2)
