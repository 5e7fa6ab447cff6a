"""Plans of small fleets in all their numbers, as they were looked at, and what they are chosen by."""

from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest
from fleetsim import Flow, water
from fleettools import GIB, MIB, geometric, guest, pair, steady
from seen import as_seen

from hwdbm.errors import PlanError
from hwdbm.fleet import Drained, Fleet, FleetVm, Host, Link, Taken, drain, planner, tabulate
from hwdbm.fleet.curves import Curve, Model, points, stack
from hwdbm.fleet.planner import Ending, drained_guests, fair_shares, highest, links_between


def racks() -> Fleet:
    """Return hosts of three racks, one of which has no uplink and another a narrow one, and one host of none."""
    links = [Link(f"l{at}", (10 + at) * 100 * MIB) for at in range(5)] + [
        Link("up", 1500 * MIB),
        Link("narrow", 300 * MIB),
    ]
    places = (("l0", "r0"), ("l1", "r0"), ("l2", "r1"), ("l3", "r2"), ("l4", ""), ("l3", "r2"))
    hosts = tuple(Host(f"h{at}", (12 + at) * GIB, link, rack) for at, (link, rack) in enumerate(places))
    vms = [guest(f"v{at}", (1 + at * 5 % 7) * GIB, f"h{at % 2}", 0.1 * (1 + at % 4)) for at in range(9)]
    vms += [guest("stays", 5 * GIB, "h2"), guest("pinned", GIB, "h1", pinned="has a GPU"), guest("huge", 64 * GIB)]
    return Fleet(tuple(links), hosts, tuple(vms), (("r0", "up"), ("r1", "narrow")))


def choosy(vm: FleetVm) -> Curve:
    """Return what a VM takes that needs a bandwidth by its name, or converges nowhere."""
    if vm.name == "never":
        return lambda bandwidth: Taken(9.0, GIB / bandwidth, converges=False)
    model: Model = steady(2.0, 500 * MIB if vm.name.startswith("n") else 0.0)  # type: ignore[assignment]
    return model(vm)


FLEETS: dict[str, tuple[Fleet, tuple[str, ...], Model]] = {
    "bytes alone": (pair(guest("a", 8 * GIB), guest("b", 2 * GIB), guest("c", 4 * GIB)), ("h0",), steady()),  # type: ignore[dict-item]
    "bytes, and time": (
        pair(*(guest(f"v{at}", (at % 3 + 1) * GIB) for at in range(5)), bandwidth=GIB / 2, hosts=3),
        ("h0",), steady(3.0),
    ),  # type: ignore[dict-item]
    "some need much": (
        pair(*(guest(name, 3 * GIB) for name in ("a", "n1", "b", "n2", "never")), hosts=3, room=7 * GIB),
        ("h0",), choosy,
    ),
    "racks": (racks(), ("h0", "h1"), geometric),
    "many": (
        pair(*(guest(f"v{at}", (at * 7 % 11 + 1) * GIB, f"h{at % 3}") for at in range(11)), bandwidth=1.25e9, hosts=6),
        ("h0", "h1"), geometric,
    ),
    "none": (pair(guest("a", host="h1")), ("h0",), geometric),
}  # fmt: skip


def ended(each: Ending) -> str:
    return f"{each.name}: {each.moved} after {each.makespan:.9g} s, in all {each.completions:.9g} s; stuck {each.stuck}"


def shown(plan: Drained) -> Iterator[str]:
    yield f"  {ended(plan.ending)}; {plan.at_once} at once; not before {plan.bound:.9g} s; {plan.tried} tried"
    yield from (f"  naive {ended(each)}" for each in plan.naive)
    for move in plan.moves:
        rates = " ".join(f"{rate / MIB:.9g}" for rate in (move.least, move.mean, move.guaranteed))
        yield (
            f"  {move.guest} from {move.source} to {move.destination}: {move.start:.9g} to {move.end:.9g} s, "
            f"{move.downtime:.9g} s, {rates} MiB/s"
        )
    for left in plan.left:
        yield f"  {left.guest} stays at {left.host}: {left.why}; {left.max_downtime}"
    for step in plan.steps:
        shares = ", ".join(f"{name} {share / MIB:.9g}" for name, share in step.shares)
        yield f"  {step.time:.9g} s: {shares}"


@pytest.mark.parametrize("name", FLEETS)
def test_plans_were_looked_at(name: str) -> None:
    fleet, hosts, model = FLEETS[name]
    curves, lines = tabulate(fleet, hosts, model), []
    for seed in (0,) if name != "bytes alone" else (0, 1):
        lines += [f"seed {seed}", *shown(drain(fleet, hosts, curves, seed=seed))]
    for row, (vm, top) in enumerate(zip(drained_guests(fleet, hosts), highest(fleet, hosts), strict=True)):
        needs, pause = curves.least[row] / MIB, curves.pause[row]
        lines.append(f"{vm.name}: at most {top / MIB:.9g} MiB/s, needs {needs:.9g}; {pause:.9g} s")
        points_ = zip(curves.bandwidth[row] / MIB, curves.total[row], curves.downtime[row], strict=True)
        lines += dict.fromkeys("  " + " ".join(f"{number:.9g}" for number in point) for point in points_)
    as_seen(f"fleets/{name.replace(',', '').replace(' ', '-')}.txt", "\n".join(lines) + "\n")


def test_the_links_of_a_way() -> None:
    """Each once; the uplinks of racks between racks, and not within one; a host of no rack is in none with another."""
    fleet = racks()
    assert links_between(fleet, "h0", "h1") == ["l0", "l1"]
    assert links_between(fleet, "h0", "h2") == ["l0", "l2", "up", "narrow"]
    assert links_between(fleet, "h2", "h3") == ["l2", "l3", "narrow"]
    assert links_between(fleet, "h3", "h5") == ["l3"]
    assert links_between(fleet, "h4", "h4") == ["l4"]
    assert links_between(fleet, "h4", "h0") == ["l4", "l0", "up"]
    assert highest(fleet, ["h0", "h1", "h4", "h5"])[:2] == [1000 * MIB, 1100 * MIB]
    assert highest(pair(guest("a"), hosts=1), ["h0"]) == [0.0]


def test_no_vm_goes_to_a_host_that_is_drained_nor_to_one_without_room() -> None:
    """However small it is."""
    fleet = pair(guest("a", 1), room=0)
    plan = drain(fleet, ["h0"], tabulate(fleet, ["h0"], steady()))  # type: ignore[arg-type]
    assert [(each.guest, each.why) for each in plan.left] == [("a", "no host has 0.0 MiB free for it")]
    fleet = pair(guest("a", 2), guest("b", 3, "h1"), room=5)
    plan = drain(fleet, ["h0"], tabulate(fleet, ["h0"], steady()))  # type: ignore[arg-type]
    assert [(move.guest, move.destination) for move in plan.moves] == [("a", "h1")]
    plan = drain(fleet, ["h1"], tabulate(fleet, ["h1"], steady()))  # type: ignore[arg-type]
    assert [(move.guest, move.destination) for move in plan.moves] == [("b", "h0")]


def test_hosts_that_are_there_are_told_but_not_all() -> None:
    fleet = pair(hosts=25)
    names = sorted(host.name for host in fleet.hosts)
    with pytest.raises(PlanError) as raised:
        drained_guests(fleet, ["h0", "h77"])
    assert str(raised.value) == f"there is no host 'h77'; there is {', '.join(names[:20])} and 5 more"


@pytest.mark.parametrize("seed", range(40))
def test_fair_shares_are_those_of_links_that_are_filled_drop_by_drop(seed: int) -> None:
    random = np.random.default_rng(seed)
    links, n = int(random.integers(1, 6)), int(random.integers(1, 9))
    capacity = np.array([*random.choice([1.0, 2.0, 3.0, 5.0, 8.0], links), 1e300])
    ways = np.full((n, 4), links)
    for way in ways:
        some = random.permutation(links)[: int(random.integers(1, min(links, 4) + 1))]
        way[: some.size] = some
    floor, free = np.zeros(n), capacity.copy()
    for at in random.permutation(n)[: int(random.integers(0, n + 1))]:
        mine = sorted(set(ways[at].tolist()))
        floor[at] = free[mine].min() * random.choice([0.0, 0.25, 0.5, 1.0])
        free[mine] -= floor[at]
    flows = [
        Flow(str(at), frozenset(str(link) for link in ways[at] if link < links), floor[at], lambda _: (0.0, 0.0))
        for at in range(n)
    ]
    rates = water(flows, {str(link): capacity[link] for link in range(links)})
    assert fair_shares(ways, floor, capacity) == pytest.approx([rates[str(at)] for at in range(n)])


@pytest.mark.parametrize(
    ("count", "compared", "shuffled", "tried"),
    [
        (0, 30_000, 3000, 2),
        (1, 30_000, 3000, 2 + 18 + 7),
        (2, 30_000, 3000, 2 + 18 + 7),
        (3, 30_000, 3000, 2 + 18 + 7 + 60),
        (5, 30_000, 35, 2 + 18 + 7 + 7),
        (5, 44, 4, 2 + 8 + 7),  # of more migrations fewer plans are compared
        (5, 35, 4, 2 + 7 + 7),
        (5, 34, 4, 2 + 6),
        (5, 5, 4, 2 + 3),
    ],
)
def test_how_many_plans_are_compared(count: int, compared: int, shuffled: int, tried: int, monkeypatch) -> None:
    monkeypatch.setattr(planner, "_COMPARED", compared)
    monkeypatch.setattr(planner, "_SHUFFLED", shuffled)
    fleet = pair(*(guest(f"v{at}") for at in range(count)))
    assert drain(fleet, ["h0"], tabulate(fleet, ["h0"], steady())).tried == tried  # type: ignore[arg-type]


def test_orders() -> None:
    """Of 2, 8 and 4 GiB, of which the first needs a quarter of its way and the last half of it."""
    fleet = pair(guest("a", 2 * GIB), guest("b", 8 * GIB), guest("c", 4 * GIB), guest("d", 8 * GIB))
    needs = {"a": GIB / 4, "c": GIB / 2}
    curves = tabulate(fleet, ["h0"], lambda vm: steady(0.0, needs.get(vm.name, 0.0))(vm))  # type: ignore[operator]
    net = planner._network(fleet)
    job = planner._job(fleet, net, fleet.guests, [1, -1, 1, 1])
    assert (job.names, job.guest.tolist(), job.place.tolist()) == (("a", "c", "d"), [0, 2, 3], [1, 1, 1])
    assert job.ways.tolist() == [[0, 1, 2, 2]] * 3
    assert job.wide.tolist() == [GIB] * 3
    found = {how: "".join(job.names[at] for at in planner._order(job, curves, how)) for how in planner._ORDERS}
    assert found == {"longest first": "dca", "shortest first": "acd", "neediest first": "cad", "as listed": "acd"}


@pytest.mark.parametrize("margin", [0.0, 0.125])
def test_the_better_of_two_ends(margin: float) -> None:
    """More VMs, then an earlier end, then earlier ends of each; if asked for, by a part of the time at least."""
    part = 1 - margin
    for moved, last, ends in product((3, 4, 5), (7.0, 8.0 * part, 8.0, 9.0), (15.0, 16.0 * part, 16.0, 17.0)):
        better = planner._Tried._better(Ending("new", last, ends, moved), Ending("old", 8.0, 16.0, 4), part)
        sooner = last < 8.0 * part
        no_later = moved > 4 or (moved == 4 and last <= 8.0)
        assert better == (moved > 4 or (moved == 4 and sooner) or (no_later and ends < 16.0 * part)), (
            moved,
            last,
            ends,
        )


def test_ends_that_differ_by_rounding_are_equal() -> None:
    assert Ending("a", 1 / 3, 2 / 3, 5).worth == (-5, 0.333333333, 0.666666667)
    assert Ending("a", 1 / 3, 2 / 3, 5).worth == Ending("b", 1 / 3 + 1e-12, 2 / 3 - 1e-12, 5).worth


# --- curves -----------------------------------------------------------------------------------------------------


def asked_of(least: float, limit: float, pause: float = 8.0) -> tuple[list[float], tuple[list[float], float, float]]:
    """Return the bandwidths, from 256 down, that a VM was asked for, and what came of it: bytes over bandwidth."""
    seen = []

    def curve(bandwidth: float) -> Taken:
        seen.append(bandwidth)
        return Taken(64 / bandwidth, pause / bandwidth, converges=bandwidth >= least)

    found, at_most, needs = points(curve, 256.0, limit)
    assert found == sorted((rate, 64 / rate, pause / rate) for rate in seen if rate >= least)
    return seen, ([each[0] for each in found], at_most, needs)


def test_a_curve_is_asked_for_by_quarters_and_halved_where_it_begins() -> None:
    assert asked_of(0.0, 4.0) == ([256, 64, 16, 4], ([4, 16, 64, 256], 8 / 256, 2.0))  # where the pause would be 4 s
    assert asked_of(0.0, 1.0)[1][2] == 4.0  # no more than is known to do
    assert asked_of(0.0, 0.0)[1][2] == 4.0
    seen, (rates, pause, needs) = asked_of(9.0, 4.0)
    first = 128**0.5
    second = (8 * first) ** 0.5
    assert seen == pytest.approx([256, 64, 16, 4, 8, first, second, (8 * second) ** 0.5])
    assert rates == [seen[6], seen[5], 16, 64, 256]
    assert (pause, needs) == (8 / 256, seen[6])
    assert asked_of(257.0, 4.0) == ([256], ([], 8 / 256, float("inf")))


def test_a_curve_is_read_between_its_points() -> None:
    """A fixed part and bytes over the bandwidth; beyond the last point it stays, below the first it is slower."""
    table = [(1.0, 9.0, 3.0), (2.0, 5.0, 2.0), (4.0, 3.0, 1.5)]
    curves = stack([(table, 1.5, 0.5), ([], 7.0, float("inf")), ([(8.0, 2.0, 1.0)], 1.0, 8.0)])
    rates = [0.25, 0.5, 1.0, 4 / 3, 2.0, 8 / 3, 4.0, 99.0]
    total, pause = curves.at(np.zeros(8, dtype=np.intp), np.array(rates))
    assert total.tolist() == pytest.approx([np.inf, 18, 9, 7, 5, 4, 3, 3])
    assert pause.tolist() == pytest.approx([np.inf, 6, 3, 2.5, 2, 1.75, 1.5, 1.5])
    rows, others = np.array([2, 0, 2, 1, 2]), np.array([9.0, 4.0, 7.0, 9.0, 0.0])
    assert curves.at(rows, others)[0].tolist() == [2, 3, np.inf, np.inf, np.inf]
    assert curves.at(rows, others)[1].tolist() == [1, 1.5, np.inf, np.inf, np.inf]
    assert (curves.pause.tolist(), curves.least.tolist()) == ([1.5, 7, 1], [0.5, np.inf, 8])
    assert curves.bandwidth.shape == (3, 8)
    assert curves.bandwidth[0].tolist() == [1, 1, 1, 1, 1, 1, 2, 4]
    assert curves.bandwidth[1].tolist() == [1] * 8
    assert curves.total[0].tolist() == [9, 9, 9, 9, 9, 9, 5, 3]
    assert stack([([(1.0, 0.0, 0.0)], 0.0, 1.0)]).total.tolist() == [[1e-9] * 8]
