"""The picture of a drain shows its migrations and links, where and in the units that it says."""

import figures
import pytest
from fleettools import GIB, MIB, guest, pair
from seen import as_seen

from hwdbm.fleet import Drained, Fleet
from hwdbm.fleet.picture import draw
from hwdbm.fleet.planner import Ending, Left, Move, Shift


def plan(moves: list[Move], steps: list[Shift], *left: Left) -> Drained:
    hosts = tuple(dict.fromkeys(move.source for move in moves)) or ("h0",)
    ending = Ending("spread", max((move.end for move in moves), default=0.0), 0.0, len(moves))
    return Drained(hosts, tuple(moves), None, left, tuple(steps), ending, (), 1.0, 1)


def move(name: str, source: str, destination: str, start: float, end: float) -> Move:
    return Move(name, source, destination, start, end, 0.1, GIB, GIB, GIB)


def few() -> tuple[Fleet, Drained]:
    """Return three guests of two hosts, two of which share a link, and one that stays."""
    fleet = pair(*(guest(name) for name in "abc"), guest("d", host="h4"), bandwidth=8 * MIB, hosts=6)
    moves = [move("a", "h0", "h1", 0, 10), move("b", "h0", "h2", 2.5, 7.5), move("d", "h4", "h1", 0, 7.5)]
    steps = [
        Shift(0, (("a", 6 * MIB), ("d", 2.0 * MIB))),
        Shift(2.5, (("a", 4 * MIB), ("b", 3 * MIB))),
        Shift(7.5, (("a", 8 * MIB), ("b", 0), ("d", 0))),
        Shift(10, (("a", 0),)),
    ]
    return fleet, plan(moves, steps, Left("c", "h0", "no room"))


def many() -> tuple[Fleet, Drained]:
    """Return more guests, destinations and links than are shown; the shortest of the guests are left out."""
    fleet = pair(*(guest(f"v{at}") for at in range(64)), bandwidth=64 * MIB, hosts=20)
    moves = [move(f"v{at}", "h0", f"h{1 + at % 19}", at, 2 * at + 1) for at in range(64)]
    steps = [Shift(at, ((f"v{at}", MIB * (at + 1)), (f"v{at - 1}", 0.0))[: 1 + bool(at)]) for at in range(4)]
    steps += [
        Shift(9, tuple((f"v{at}", MIB) for at in range(4, 23))),
        Shift(10, tuple((f"v{at}", 0) for at in range(23))),
    ]
    return fleet, plan(moves, steps)


def none() -> tuple[Fleet, Drained]:
    return pair(guest("a")), plan([], [], Left("a", "h0", "no room"))


@pytest.mark.parametrize("case", [few, many, none])
def test_a_picture_shows_what_the_one_that_was_looked_at_shows(case, monkeypatch, tmp_path):
    found = figures.drawn(monkeypatch)
    draw(tmp_path / "a.png", *case())
    as_seen(f"pictures/drain-{case.__name__}.txt", *found)
