"""Drains: what holds for every plan, and that a simulation written apart comes to the same times."""

from collections import Counter
from math import inf, isfinite
from typing import Any

import numpy as np
import pytest
from effort import EFFORT
from fleetsim import Order, simulate, tabulated, way
from fleettools import GIB, MIB, fleets, geometric, guest, pair, steady
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hwdbm.errors import PlanError
from hwdbm.fleet import Fleet, FleetVm, Host, Link, Taken, drain, planner, tabulate
from hwdbm.fleet.curves import points
from hwdbm.fleet.planner import drained_guests, fair_shares

LOOSE = 0.03
"""How far a plan's times may be from those of the forecasts themselves: it reads them off between a few bandwidths."""


def planned(fleet: Fleet, *hosts: str, model=geometric, seed: int = 0):
    return drain(fleet, hosts, tabulate(fleet, hosts, model), seed=seed)


# --- by hand -----------------------------------------------------------------------------------------------


def test_one_vm_has_the_whole_way() -> None:
    plan = planned(pair(guest("a", 8 * GIB)), "h0", model=steady(1.0))
    (move,) = plan.moves
    assert (move.guest, move.source, move.destination) == ("a", "h0", "h1")
    assert (move.start, move.end) == (0, pytest.approx(9))
    assert move.least == move.mean == GIB
    assert plan.ending.makespan == plan.bound == pytest.approx(9)
    assert plan.left == ()


def test_where_bytes_are_all_one_by_one_is_best_and_the_shortest_are_first() -> None:
    plan = planned(pair(guest("a", 8 * GIB), guest("b", 2 * GIB), guest("c", 4 * GIB)), "h0", model=steady())
    assert [(move.guest, pytest.approx(move.end)) for move in plan.moves] == [("b", 2), ("c", 6), ("a", 14)]
    one_by_one, all_at_once = plan.naive
    assert (one_by_one.makespan, one_by_one.completions) == (pytest.approx(14), pytest.approx(8 + 10 + 14))
    # All share until b is there, after 6 s; a and c until c is, after 10 s.
    assert all_at_once.completions == pytest.approx(6 + 10 + 14)


def test_what_waits_for_no_link_goes_on_at_once() -> None:
    """Each takes 10 s whatever its share: eight that go on together take little more than one."""
    plan = planned(pair(*(guest(f"v{at}", MIB) for at in range(8))), "h0", model=steady(10.0))
    assert plan.ending.makespan == pytest.approx(10 + 8 / 1024, rel=LOOSE)
    assert plan.naive[0].makespan == pytest.approx(80, rel=LOOSE)


def test_what_needs_bandwidth_has_it() -> None:
    """One that converges from 600 MiB/s on leaves room for others, and never has less."""
    needy, others = guest("needy", 8 * GIB), [guest(f"v{at}", 4 * GIB) for at in range(4)]

    def model(each: FleetVm):
        return steady(5.0, 600 * MIB if each.name == "needy" else 0)(each)

    plan = planned(pair(*others, needy), "h0", model=model)
    move = next(move for move in plan.moves if move.guest == "needy")
    assert move.least >= 600 * MIB
    assert len(plan.moves) == 5
    assert plan.naive[1].stuck == ()  # it waits until the others are done
    assert plan.ending.makespan < min(each.makespan for each in plan.naive)


@pytest.mark.parametrize("wide", [1, 3])
def test_the_largest_go_to_where_the_links_are_done_the_soonest(wide: int) -> None:
    """Beside it, a link that is three times as wide is done as soon with three times as much."""
    links = (Link("from", 100 * GIB), Link("narrow", GIB), Link("wide", wide * GIB))
    hosts = (Host("h0", 0, "from"), Host("h1", 64 * GIB, "narrow"), Host("h2", 64 * GIB, "wide"))
    fleet = Fleet(links, hosts, tuple(guest(f"v{at}", size * GIB) for at, size in enumerate((1, 2, 4, 3, 5, 6))))
    net = planner._network(fleet)
    places = planner._place(fleet, net, ["h0"], fleet.guests, np.zeros(6), "spread")
    ends, room, expected = {1: 0.0, 2: 0.0}, {1: 64, 2: 64}, [0] * 6
    for at in (5, 4, 2, 3, 1, 0):
        size = fleet.guests[at].memory >> 30
        after = {1: ends[1] + size, 2: ends[2] + size / wide}
        chosen = min(after, key=lambda each: (after[each], -room[each]))
        ends[chosen], expected[at] = after[chosen], chosen
        room[chosen] -= size
    assert places == expected


def test_what_never_ends_at_once_is_said() -> None:
    """Two that need more than half of a way get nowhere together."""
    plan = planned(pair(guest("a"), guest("b")), "h0", model=steady(0, 0.6 * GIB))
    assert plan.naive[1].stuck == ("a", "b")
    assert plan.naive[1].makespan == inf
    assert plan.naive[1].moved == 0
    assert plan.ending.moved == 2
    assert plan.ending.makespan == pytest.approx(2)


def test_what_stays_says_why() -> None:
    never = Taken(9.0, 0.5, converges=False)
    fleet = pair(
        guest("pinned", pinned="has a GPU"), guest("busy"), guest("large", 64 * GIB), guest("small"), room=32 * GIB
    )

    def model(each: FleetVm):
        return (lambda _: never) if each.name == "busy" else steady()(each)

    plan = planned(fleet, "h0", model=model)
    assert {each.guest: each.why for each in plan.left} == {
        "pinned": "it is pinned: has a GPU",
        "busy": "it doesn't converge even at 1,024.0 MiB/s, the most that a way of it has: it would stand still for "
        "500 ms, and 300 ms are allowed",
        "large": "no host has 65,536.0 MiB free for it",
    }
    assert {each.guest: each.max_downtime for each in plan.left} == {"pinned": None, "busy": 0.5, "large": None}
    assert [move.guest for move in plan.moves] == ["small"]
    alone = planned(pair(guest("a"), hosts=1), "h0", model=steady())
    assert [each.why for each in alone.left] == ["there is no other host"]
    assert (alone.ending.makespan, alone.moves, alone.bound) == (0, (), 0)


def test_a_vm_goes_where_it_converges() -> None:
    links = (Link("l0", GIB), Link("slow", GIB / 8), Link("fast", GIB))
    hosts = (Host("h0", 0, "l0"), Host("h1", 4 * GIB, "slow"), Host("h2", 2 * GIB, "fast"))
    fleet = Fleet(links, hosts, (guest("a"), guest("b"), guest("needy")))

    def model(each: FleetVm):
        return steady(0, GIB / 2 if each.name == "needy" else 0)(each)

    plan = planned(fleet, "h0", model=model)
    assert {move.guest: move.destination for move in plan.moves}["needy"] == "h2"
    assert plan.ending.moved == 3
    none = planned(Fleet(links, (hosts[0], hosts[1], Host("h2", GIB - 1, "fast")), fleet.guests), "h0", model=model)
    assert [each.why for each in none.left] == [
        "no host at a way of 512.0 MiB/s or more, which it needs to converge, has 1,024.0 MiB free for it"
    ]


def test_within_a_rack_no_uplink_is_used() -> None:
    links = (Link("a", GIB), Link("up", GIB / 100))
    hosts = tuple(Host(f"h{at}", 1 << 50, "a", rack) for at, rack in enumerate(("r0", "r0", "r1")))
    fleet = Fleet(links, hosts, (guest("v"),), (("r0", "up"), ("r1", "up")))
    assert planned(fleet, "h0", model=steady()).moves[0].destination == "h1"
    assert planned(fleet, "h0", "h1", model=steady()).ending.makespan == pytest.approx(100)


def test_fair_shares() -> None:
    capacity = np.array([10.0, 4.0, 1e300])
    ways = np.array([[0, 2, 2, 2], [0, 1, 2, 2], [1, 2, 2, 2]])
    assert fair_shares(ways, np.zeros(3), capacity).tolist() == [8, 2, 2]
    assert fair_shares(ways, np.array([0, 3.0, 0]), capacity).tolist() == [7, 3, 1]
    assert fair_shares(ways, np.array([0, 4.0, 0]), capacity).tolist() == [6, 4, 0]
    assert fair_shares(ways[:0], np.zeros(0), capacity).tolist() == []


def test_the_seed_alone_decides() -> None:
    fleet = pair(*(guest(f"v{at}", (at + 1) * GIB) for at in range(6)), hosts=4)
    assert planned(fleet, "h0", seed=3) == planned(fleet, "h0", seed=3)


def test_bad_arguments() -> None:
    fleet = pair(guest("a"))
    curves = tabulate(fleet, ["h0"], geometric)
    with pytest.raises(PlanError, match="there is no host 'h9'; there is h0, h1"):
        tabulate(fleet, ["h9"], geometric)
    with pytest.raises(PlanError, match="there is no host 'h9'"):
        drain(fleet, ["h9"], curves)
    with pytest.raises(ValueError, match="0 VMs of the hosts may be moved, and there are 1 curves"):
        drain(fleet, ["h1"], curves)
    with pytest.raises(ValueError, match="seed is 0 or more, not -1"):
        drain(fleet, ["h0"], curves, seed=-1)
    with pytest.raises(ValueError, match="workers"):
        tabulate(fleet, ["h0"], geometric, workers=-1)


# --- for any fleet -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def _few_shuffles():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hwdbm.fleet.planner._SHUFFLES", 4)
        yield


ANY = settings(max_examples=100 * EFFORT, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@ANY
@given(fleets(), st.data())
def test_any_fleet(fleet: Fleet, data: st.DataObject) -> None:
    names = [host.name for host in fleet.hosts]
    hosts = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True))
    curves = tabulate(fleet, hosts, geometric)
    plan = drain(fleet, hosts, curves)

    # Each VM of the hosts once: moved, or left with a reason.
    of_hosts = [each.name for each in fleet.guests if each.host in hosts]
    assert Counter(of_hosts) == Counter([m.guest for m in plan.moves] + [each.guest for each in plan.left])
    assert all(each.why for each in plan.left)
    guests = {each.name: each for each in fleet.guests}

    # No host over its memory; what was over it before gets nothing.
    for host in fleet.hosts:
        gets = sum(guests[move.guest].memory for move in plan.moves if move.destination == host.name)
        has = sum(each.memory for each in fleet.guests if each.host == host.name)
        assert not gets or gets + has <= host.memory
        assert not gets or host.name not in hosts

    # No link over its bandwidth, and each VM's limit kept.
    ways = {move.guest: way(fleet, move.source, move.destination) for move in plan.moves}
    shares: dict[str, float] = {}
    for step in plan.steps:
        shares.update(step.shares)
        for link in fleet.links:
            carried = sum(share for name, share in shares.items() if link.name in ways[name])
            assert carried <= link.bandwidth * (1 + 1e-6)
    assert not any(shares.values())
    for move in plan.moves:
        assert move.downtime <= guests[move.guest].max_downtime * (1 + 1e-9)
        assert move.least >= move.guaranteed * (1 - 1e-9)

    # Never worse than the naive orders, and never better than can be.
    for each in plan.naive:
        assert plan.ending.worth <= each.worth
        assert each.moved < len(plan.moves) or plan.ending.makespan <= each.makespan * (1 + 1e-8)
    assert plan.bound <= plan.ending.makespan * (1 + 1e-6)

    # The simulation reads the same points, and comes to the same times.
    totals = {}
    for row, each in enumerate(drained_guests(fleet, hosts)):
        if isfinite(curves.least[row]):
            points = zip(curves.bandwidth[row], curves.total[row], curves.downtime[row], strict=True)
            totals[each.name] = tabulated([tuple(map(float, point)) for point in points], float(curves.least[row]))
    orders = [Order(move.guest, move.destination, move.guaranteed) for move in plan.moves]
    flows = simulate(fleet, orders, totals, plan.at_once or inf)
    for move in plan.moves:
        flow = flows[move.guest]
        assert (flow.start, flow.end) == (pytest.approx(move.start, rel=1e-6), pytest.approx(move.end, rel=1e-6))
        assert flow.downtime == pytest.approx(move.downtime, rel=1e-6)


@pytest.mark.parametrize("hosts", [2, 5])
def test_against_the_forecasts_themselves(hosts: int) -> None:
    """The simulation asks the forecast at each bandwidth, where the plan reads between the points of a table."""
    guests = [guest(f"v{at}", (1 + at * 7 % 13) * GIB) for at in range(12)]
    fleet = pair(*guests, bandwidth=1.25e9, hosts=hosts)
    plan = planned(fleet, "h0")

    def exact(each: FleetVm):
        curve = geometric(each)

        def at(bandwidth: float) -> tuple[float, float]:
            point = curve(bandwidth)
            return (point.total, point.downtime) if point.converges else (inf, inf)

        return at

    totals = {each.name: exact(each) for each in guests}
    orders = [Order(move.guest, move.destination, move.guaranteed) for move in plan.moves]
    flows = simulate(fleet, orders, totals, plan.at_once or inf)
    assert len(orders) > 8
    assert max(flow.end for flow in flows.values()) == pytest.approx(plan.ending.makespan, rel=LOOSE)
    # The naive orders too, in which no share is guaranteed.
    names = {move.guest for move in plan.moves}
    naive = [Order(each.name, "h1", 0.0) for each in guests if each.name in names]
    if hosts == 2:
        for outcome, at_once in zip(plan.naive, (1, inf), strict=True):
            flows = simulate(fleet, naive, totals, at_once)
            stuck = {name for name, flow in flows.items() if not isfinite(flow.end)}
            assert stuck == set(outcome.stuck)
            if not stuck:
                assert max(flow.end for flow in flows.values()) == pytest.approx(outcome.makespan, rel=LOOSE)


@pytest.mark.parametrize("together", [1, 3, 256])
@given(data=st.data())
def test_what_waits_begins_as_if_all_were_looked_at(together: int, data: st.DataObject) -> None:
    """In order, at each moment, those that fit into what is free of their way: one after the other, by hand."""
    rng, n, links = np.random.default_rng(data.draw(st.integers(0, 9999))), data.draw(st.integers(1, 40)), 5
    capacity = np.array([*rng.choice([1.0, 2.0, 5.0], links), 1e300])
    ways = np.stack([np.append(rng.permutation(links)[:2], rng.choice([4, links], 2)) for _ in range(n)])
    wide = capacity[ways].min(axis=1)
    floor = wide / rng.choice([1, 2, 3], n) * rng.choice([0.0, 1.0], n, p=[0.1, 0.9])
    job = planner._Job(np.arange(n), np.zeros(n, dtype=np.intp), ways, wide, tuple(map(str, range(n))))
    way = planner._Way("some", rng.permutation(n), floor)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner, "_SOME", together)
        waiting, free, left, running = planner._Waiting(job, way, links + 1), capacity.copy(), list(way.order), []
        while left:
            room = int(rng.choice([0, 1, 2, n]))
            expected, rest = [], free.copy()
            for each in left:
                mine = sorted(set(ways[each]))
                if len(expected) < room and (rest[mine] >= floor[each] - 1e-9).all():
                    expected.append(each)
                    rest[mine] -= floor[each]
            assert waiting.begin(free, room).tolist() == expected
            free, running = rest, [*running, *expected]
            left = [each for each in left if each not in expected]
            assert waiting.count == len(left)
            done = [each for each in running if rng.random() < 0.5]
            running = [each for each in running if each not in done]
            for each in done:
                free[sorted(set(ways[each]))] += floor[each]
            waiting.look_again(ways[np.array(done, dtype=np.intp)])


@pytest.mark.parametrize(
    ("taken", "error"),
    [
        (None, TypeError),
        (5, TypeError),
        ((-1, 0.1), ValueError),
        (("3", 1), TypeError),
        ((1.0, float("nan")), ValueError),
    ],
)
def test_a_forecast_that_cannot_be_is_refused(taken: object, error: type[Exception]) -> None:
    """A caller's own: what it says of each bandwidth is looked at where it is made, and that it is said at all."""
    made = (lambda: Taken(*taken, converges=True)) if isinstance(taken, tuple) else lambda: taken  # type: ignore[arg-type]
    with pytest.raises(error, match=r"a forecast is of type Taken|total is|downtime is"):
        points(lambda _: made(), 1e9, 0.3)  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize("wrong", [np.array([1.0, 2.0]), "inf", None, -1.0, float("nan"), float("-inf")])
def test_nor_can_one_that_does_not_converge_take_anything(wrong: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="total is a number"):
        Taken(wrong, 0.1, converges=False)
    with pytest.raises((TypeError, ValueError), match="downtime is a number"):
        Taken(0.1, wrong, converges=False)


def test_one_that_never_ends_has_no_end() -> None:
    never = Taken(float("inf"), float("inf"), converges=False)
    assert points(lambda _: never, 1e9, 0.3)[0] == []
