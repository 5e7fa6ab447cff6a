"""Draining hosts: where each VM goes, when, and with what share of the links.

The model is one of fluids. While a migration has a bandwidth of b it does 1 / T(b) of its work a second, T being its
curve of total time. Links are shared fairly, about as TCP does: each migration has what is guaranteed to it, and what
is left raises the least shares first. A plan is an order, what each migration is guaranteed, and how many may go on at
a time: the first that wait and whose guarantee fits into what is free of the links of their way begin. The naive
orders are such plans too, so that the best plan can't be worse than they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import inf, isfinite, isinf

import numpy as np
from numpy.typing import NDArray

from hwdbm import check
from hwdbm.errors import PlanError, some
from hwdbm.fleet.curves import Curves, Floats
from hwdbm.fleet.plan import Fleet, FleetVm

Ints = NDArray[np.intp]

_NEVER_FULL = 1e300  # the bandwidth of what stands for a link where a way has fewer than others
_WAY = 4  # links of a way at most: the host's, its rack's, the other rack's, the other host's
_AT_ONCE = (1, 2, 3, 4, 6, 8, 12, 16)
_MIB = 1 << 20
_UNKNOWN, _BEGUN = -1, -2  # in place of a link
_SOME = 256  # of what waits that are looked at together, and twice as many where none of them can begin
_CLOSE = 1e-9  # a part of a link that is lost in rounding


# --- values ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Move:
    """A VM's migration in a plan.

    Parameters
    ----------
    guest : str
        The VM's name.
    source, destination : str
        Its host, and that to which it goes.
    start, end : float
        Seconds from the drain's beginning.
    downtime : float
        Seconds.
    least, mean : float
        Its share of its way: bytes a second, at no time less, and on average.
    guaranteed : float
        Bytes a second that it has whatever else goes on. It begins when so much is free.
    """

    guest: str
    source: str
    destination: str
    start: float
    end: float
    downtime: float
    least: float
    mean: float
    guaranteed: float


@dataclass(frozen=True, slots=True)
class Left:
    """A VM that stays where it is.

    Parameters
    ----------
    guest, host : str
        Its name and its host's.
    why : str
        The reason.
    max_downtime : float, optional
        The limit in seconds at which it could be moved, if that is what keeps it.
    """

    guest: str
    host: str
    why: str
    max_downtime: float | None = None


@dataclass(frozen=True, slots=True)
class Shift:
    """What changes at a moment of a plan.

    Parameters
    ----------
    time : float
        Seconds from the drain's beginning.
    shares : tuple of (str, float)
        The VMs whose share is another from here on, and bytes a second; 0 where one has arrived.
    """

    time: float
    shares: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class Ending:
    """How a way to drain ends.

    Parameters
    ----------
    name : str
        The way's name.
    makespan : float
        Seconds to the end of the last migration.
    completions : float
        The sum of all migrations' ends, seconds.
    moved : int
        VMs that arrive.
    stuck : tuple of str
        VMs whose migrations never end, for want of bandwidth.
    """

    name: str
    makespan: float
    completions: float
    moved: int
    stuck: tuple[str, ...] = ()

    @property
    def worth(self) -> tuple[int, float, float]:
        """Less is better: more VMs first, then an earlier end, then earlier ends of each. Rounding is no difference."""
        return -self.moved, float(f"{self.makespan:.9g}"), float(f"{self.completions:.9g}")


@dataclass(frozen=True, slots=True)
class Drained:
    """A plan to drain hosts.

    Parameters
    ----------
    hosts : tuple of str
        The hosts.
    moves : tuple of Move
        In their order: at each moment, the first of those that wait begin whose guarantee fits into what the
        guarantees of those that go on leave free.
    at_once : int, optional
        How many may go on at a time besides; None for any number.
    left : tuple of Left
        What isn't moved.
    steps : tuple of Shift
        The shares as they change.
    ending : Ending
        How the plan ends; its name says which it is.
    naive : tuple of Ending
        How the naive ones end: one by one as listed, and all at once.
    bound : float
        Seconds that no plan of these moves can be quicker than.
    tried : int
        Plans that were compared.
    """

    hosts: tuple[str, ...]
    moves: tuple[Move, ...]
    at_once: int | None
    left: tuple[Left, ...]
    steps: tuple[Shift, ...]
    ending: Ending
    naive: tuple[Ending, ...]
    bound: float
    tried: int


# --- the fleet as arrays -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Network:
    """The links of a fleet by number, and which of them the way between two hosts has.

    Parameters
    ----------
    capacity : (links + 1,) float64 array
        Bytes a second. The last is never full.
    link, rack, uplink : (hosts,) intp array
        Each host's link, its rack and that rack's uplink, by number; of hosts of none, the one that is never full.
    """

    capacity: Floats
    link: Ints
    rack: Ints
    uplink: Ints

    def way(self, source: int, destination: int) -> tuple[int, ...]:
        """Return the links between two hosts, each once, padded with the one that is never full."""
        found = [int(self.link[source]), int(self.link[destination])]
        if self.rack[source] != self.rack[destination]:
            found += [int(self.uplink[source]), int(self.uplink[destination])]
        once = dict.fromkeys(found)
        return (*once, *[self.capacity.size - 1] * (_WAY - len(once)))

    def bandwidth(self, source: int, destination: int) -> float:
        """Return what one migration between two hosts can have, bytes a second."""
        return float(self.capacity[list(self.way(source, destination))].min())


def _network(fleet: Fleet) -> Network:
    """Return a fleet's links."""
    number = {link.name: at for at, link in enumerate(fleet.links)}
    free, uplinks = len(fleet.links), dict(fleet.uplinks)
    racks = {name: at for at, name in enumerate(("", *fleet.racks))}
    return Network(
        np.array([*(link.bandwidth for link in fleet.links), _NEVER_FULL], dtype=np.float64),
        np.array([number[host.link] for host in fleet.hosts], dtype=np.intp),
        np.array([racks[host.rack] for host in fleet.hosts], dtype=np.intp),
        np.array([number.get(uplinks.get(host.rack, ""), free) for host in fleet.hosts], dtype=np.intp),
    )


def links_between(fleet: Fleet, source: str, destination: str) -> list[str]:
    """Return the names of the links of the way between two hosts."""
    at = {host.name: number for number, host in enumerate(fleet.hosts)}
    way = _network(fleet).way(at[source], at[destination])
    return [fleet.links[each].name for each in way if each < len(fleet.links)]


def drained_guests(fleet: Fleet, hosts: Sequence[str]) -> list[FleetVm]:
    """Return the VMs of hosts that aren't pinned, as listed; raises `PlanError` if there is no such host."""
    known = {host.name for host in fleet.hosts}
    for host in hosts:
        if host not in known:
            raise PlanError(f"there is no host {host!r}; there is {some(sorted(known))}")
    return [guest for guest in fleet.guests if guest.host in set(hosts) and not guest.pinned]


def highest(fleet: Fleet, hosts: Sequence[str]) -> list[float]:
    """Return the highest bandwidth that each of `drained_guests` can have, bytes a second; 0 if it can go nowhere."""
    net, at = _network(fleet), {host.name: number for number, host in enumerate(fleet.hosts)}
    others = [at[host.name] for host in fleet.hosts if host.name not in set(hosts)]
    best = {host: max((net.bandwidth(at[host], each) for each in others), default=0.0) for host in hosts}
    return [best[guest.host] for guest in drained_guests(fleet, hosts)]


# --- where to ----------------------------------------------------------------------------------------------


def _place(
    fleet: Fleet, net: Network, hosts: Sequence[str], guests: Sequence[FleetVm], least: Floats, how: str
) -> list[int]:
    """Return the number of the host that each VM goes to, or -1.

    "first fit": in the order of the lists. "spread": the largest first, each to where the links will be done the
    soonest. "tight": the largest first, each to the host that has the least room.
    """
    leaving, at = set(hosts), {host.name: number for number, host in enumerate(fleet.hosts)}
    room = np.array([0 if host.name in leaving else host.memory for host in fleet.hosts], dtype=np.int64)
    for guest in fleet.guests:
        if guest.host not in leaving:
            room[at[guest.host]] -= guest.memory
    ways: dict[int, tuple[Ints, Floats]] = {}
    for source in {at[guest.host] for guest in guests}:
        links = np.array([net.way(source, each) for each in range(len(fleet.hosts))], dtype=np.intp)
        ways[source] = links, net.capacity[links].min(axis=1)
    order = list(range(len(guests)))
    if how != "first fit":
        order.sort(key=lambda each: -guests[each].memory)
    places, load = [-1] * len(guests), np.zeros(net.capacity.size)
    for each in order:
        guest = guests[each]
        links, bandwidth = ways[at[guest.host]]
        fits = np.flatnonzero((room >= guest.memory) & (bandwidth >= least[each]))
        if not fits.size:
            continue
        if how == "first fit":
            best = int(fits[0])
        elif how == "tight":
            best = int(fits[np.argmin(room[fits])])
        else:
            ends = ((load[links[fits]] + guest.memory) / net.capacity[links[fits]]).max(axis=1)
            best = int(fits[np.lexsort((-room[fits], ends))[0]])
        places[each] = best
        room[best] -= guest.memory
        load[list(set(links[best].tolist()))] += guest.memory
    return places


# --- when, and how fast ------------------------------------------------------------------------------------


def fair_shares(ways: Ints, floor: Floats, capacity: Floats) -> Floats:
    """Return fair shares of links that keep what is guaranteed to each.

    A level rises until a link is full; then all on that link keep what they have, which is the level or their floor,
    whichever is more. The others go on.

    Parameters
    ----------
    ways : (n, 4) intp array
        The links of each; the last link, which is never full, stands for none.
    floor : (n,) float64 array
        What each has at least, bytes a second; together no more than the links have.
    capacity : (links + 1,) float64 array
        Bytes a second.

    Returns
    -------
    (n,) float64 array
        Bytes a second.
    """
    n, links = ways.shape[0], capacity.size
    shares, rising = floor.copy(), np.ones(n, dtype=np.bool_)
    while rising.any():
        level = _levels(ways[rising], floor[rising], capacity - _carried(ways, np.where(rising, 0.0, shares), links))
        lowest = level[ways[rising]].min(axis=1)
        # A link is full if its level is the lowest for all that rise on it: what they have is known then.
        others = np.full(links, inf)
        np.minimum.at(others, ways[rising], lowest[:, None])
        stops = (others == level)[ways[rising]].any(axis=1)
        index = np.flatnonzero(rising)[stops]
        shares[index] = np.maximum(floor[index], lowest[stops])
        rising[index] = False
    return shares


def _levels(ways: Ints, floor: Floats, free: Floats) -> Floats:
    """Return for each link the level at which it is full; infinite for one that nobody uses."""
    links = free.size
    flat, floors = ways.ravel(), np.repeat(floor, ways.shape[1])
    held = np.zeros(flat.size, dtype=np.bool_)  # has a floor above the level
    while True:
        count = np.bincount(flat, ~held, links)
        rest = np.maximum(free - np.bincount(flat, np.where(held, floors, 0.0), links), 0.0)
        # Where all are held, rounding left no room: each has its floor.
        level = np.divide(rest, count, out=np.zeros(links), where=count > 0)
        level[-1] = inf
        more = ~held & (floors > level[flat])
        if not more.any():
            return level
        held |= more


def _carried(ways: Ints, shares: Floats, links: int) -> Floats:
    """Return what each link carries."""
    return np.bincount(ways.ravel(), np.repeat(shares, ways.shape[1]), links).astype(np.float64)


@dataclass(frozen=True, slots=True)
class _Job:
    """The migrations of a placement, an element of each array for each."""

    guest: Ints  # its number among the drained, which is its row in the curves
    place: Ints  # the number of the host that each goes to
    ways: Ints
    wide: Floats  # bytes a second that each way has
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Way:
    """A way to drain: the order of a job's migrations, what each is guaranteed, and how many go on at a time."""

    name: str
    order: Ints
    floor: Floats
    most: float = inf


@dataclass(frozen=True, slots=True)
class _Run:
    """What came of it: an array of seconds or bytes a second for each migration."""

    start: Floats
    end: Floats
    downtime: Floats
    least: Floats
    mean: Floats
    steps: tuple[tuple[float, Ints, Floats], ...]


def _simulate(job: _Job, way: _Way, capacity: Floats, curves: Curves, *, steps: bool = False) -> _Run:
    n = job.guest.size
    start, end, downtime = np.full((3, n), inf)
    least, carried, done = np.full(n, inf), np.zeros(n), np.zeros(n)
    told: list[tuple[float, Ints, Floats]] = []
    waiting, running, before = _Waiting(job, way, capacity.size), np.zeros(0, dtype=np.intp), np.zeros(n)
    time, free = 0.0, capacity.copy()
    while waiting.count or running.size:
        begun = waiting.begin(free, int(min(way.most - running.size, n)))
        if begun.size:
            start[begun] = time
            free = free - _carried(job.ways[begun], way.floor[begun], free.size)
            running = np.concatenate([running, begun])
        shares = fair_shares(job.ways[running], way.floor[running], capacity)
        total, pause = curves.at(job.guest[running], shares)
        left = (1 - done[running]) * total
        after = float(left.min(initial=inf))
        if steps:
            changed = shares != before[running]
            told.append((time, running[changed], shares[changed]))
            before[running] = shares
        if not isfinite(after):
            break  # none that goes on has the bandwidth that it needs, and nothing will change that
        time += after
        with np.errstate(invalid="ignore"):  # inf / inf
            done[running] += np.where(np.isfinite(total), after / total, 0.0)
        least[running] = np.minimum(least[running], shares)
        carried[running] += shares * after
        ends = left <= after * (1 + _CLOSE)
        gone = running[ends]
        end[gone], downtime[gone] = time, pause[ends]
        free = free + _carried(job.ways[gone], way.floor[gone], free.size)
        waiting.look_again(job.ways[gone])
        if steps:
            told.append((time, gone, np.zeros(gone.size)))
        running = running[~ends]
    with np.errstate(invalid="ignore"):
        mean = carried / (end - start)
    return _Run(start, end, downtime, least, mean, tuple(told))


class _Waiting:
    """What waits, in order; and of each that was found not to fit, a link of its way that is too full for it.

    Until a migration ends that has this link in its way, too, it can't begin, and isn't looked at again.
    """

    def __init__(self, job: _Job, way: _Way, links: int) -> None:
        self._order, self._links, self.count = way.order, links, way.order.size
        self._ways, self._floor = job.ways[way.order], way.floor[way.order]
        self._needs = self._floor - _CLOSE * job.wide[way.order]
        self._full = np.full(self.count, _UNKNOWN, dtype=np.intp)

    def look_again(self, ways: Ints) -> None:
        """Take note that links have more room."""
        freed = np.zeros(self._links + 2, dtype=np.bool_)  # two more, for the two that are no links
        freed[ways] = True
        self._full[freed[self._full]] = _UNKNOWN

    def begin(self, free: Floats, room: int) -> Ints:
        """Return which begin: in order, each whose guarantee fits into what is free of its way."""
        free, begun = free.copy(), list[int]()
        looked = np.flatnonzero(self._full == _UNKNOWN)
        at, some = 0, _SOME
        while at < looked.size and len(begun) < room:
            part = looked[at : at + some]
            ways = self._ways[part]
            full = ways[np.arange(part.size), free[ways].argmin(axis=1)]
            fits = np.flatnonzero(free[full] >= self._needs[part])
            before = int(fits[0]) if fits.size else part.size
            self._full[part[:before]] = full[:before]
            at, some = at + before, some * 2
            if fits.size:
                each = int(part[before])
                begun.append(each)
                free[list(set(self._ways[each].tolist()))] -= self._floor[each]
                self._full[each] = _BEGUN
                at, some = at + 1, _SOME
        self.count -= len(begun)
        return self._order[np.array(begun, dtype=np.intp)]


# --- the plan ----------------------------------------------------------------------------------------------

_PLACES = ("spread", "tight", "first fit")
_ORDERS = ("longest first", "shortest first", "neediest first", "as listed")
_WORTH_IT = 1e-3  # part of the time that a random order has to save
_SHUFFLES, _SHUFFLED = 60, 3000  # random orders at most, and migrations in them together
_COMPARED = 30_000  # migrations in the plans of one kind that are compared: of very many, fewer plans are


def drain(fleet: Fleet, hosts: Sequence[str], curves: Curves, *, seed: int = 0) -> Drained:
    """Plan how to move all VMs away from hosts.

    The plans that are compared differ in where each VM goes, in their order, and in how many migrations share a way: if
    k do, each has 1/k of its way guaranteed, and never less than it needs to converge. Numbers come first, with the
    longest and with the shortest in front; then other orders, other places, and orders at random. The naive ones are
    compared too.

    Parameters
    ----------
    fleet : Fleet
        The fleet.
    hosts : sequence of str
        The names of the hosts to be drained.
    curves : Curves
        What `tabulate` returned for them.
    seed : int
        Of the random orders, 0 or more.

    Returns
    -------
    Drained
        The plan that moves the most VMs; of those, the one that ends first; of those, the one with the least sum of
        the ends of its migrations.

    Raises
    ------
    PlanError
        If there is no such host.
    ValueError
        If the curves are of another number of VMs.
    """
    check.instance(fleet, Fleet, "fleet")
    check.instance(curves, Curves, "curves")
    hosts = check.instances(hosts, str, "hosts")
    guests = drained_guests(fleet, hosts)
    if len(guests) != curves.pause.size:
        raise ValueError(f"{len(guests)} VMs of the hosts may be moved, and there are {curves.pause.size} curves")
    net, seed = _network(fleet), check.integer(seed, "seed", 0)
    jobs = {}
    for how in _PLACES:
        jobs[how] = _job(fleet, net, guests, _place(fleet, net, hosts, guests, curves.least, how))
    tried = _Tried(net.capacity, curves)
    listed = jobs["first fit"]
    nothing, each = np.zeros(listed.guest.size), np.arange(listed.guest.size)
    naive = (
        tried.consider(listed, _Way("one by one", each, nothing, most=1)),
        tried.consider(listed, _Way("all at once", each, nothing)),
    )
    _search(jobs, tried, np.random.default_rng(seed))
    job, way, ending = tried.best
    run = _simulate(job, way, net.capacity, curves, steps=True)
    moves = [
        Move(
            guests[job.guest[at]].name, guests[job.guest[at]].host, fleet.hosts[job.place[at]].name,
            *(float(values[at]) for values in (run.start, run.end, run.downtime, run.least, run.mean, way.floor)),
        )
        for at in way.order.tolist() if isfinite(run.end[at])
    ]  # fmt: skip
    names = [guests[at].name for at in job.guest.tolist()]
    at_times: dict[float, dict[str, float]] = {}
    for time, which, shares in run.steps:
        at_times.setdefault(time, {}).update((names[at], float(share)) for at, share in zip(which, shares, strict=True))
    steps = [Shift(time, tuple(changed.items())) for time, changed in at_times.items() if changed]
    left = _left(fleet, hosts, guests, curves, job)
    most = None if isinf(way.most) else int(way.most)
    bound = _bound(job, net.capacity, curves)
    return Drained(tuple(hosts), tuple(moves), most, left, tuple(steps), ending, naive, bound, tried.count)


class _Tried:
    """The best of what was tried, and how much that was."""

    def __init__(self, capacity: Floats, curves: Curves) -> None:
        self._capacity, self.curves = capacity, curves
        self._best: tuple[_Job, _Way, Ending] | None = None
        self.count = 0

    @property
    def best(self) -> tuple[_Job, _Way, Ending]:
        if self._best is None:
            raise RuntimeError("nothing was tried")
        return self._best

    def consider(self, job: _Job, way: _Way, margin: float = 0.0) -> Ending:
        """Try a way; it is the best from now on if it is better, by a part of the time at least."""
        run = _simulate(job, way, self._capacity, self.curves)
        self.count += 1
        stuck = tuple(job.names[at] for at in np.flatnonzero(~np.isfinite(run.end)))
        last, ends = float(run.end.max(initial=0.0)), float(run.end.sum())
        ending = Ending(way.name, last, ends, run.end.size - len(stuck), stuck)
        if self._best is None or self._better(ending, self._best[2], 1 - margin):
            self._best = job, way, ending
        return ending

    @staticmethod
    def _better(ending: Ending, best: Ending, part: float) -> bool:
        moved, makespan, completions = best.worth
        sooner = ending.worth[:2] < (moved, makespan * part)
        return sooner or (ending.worth[:2] <= (moved, makespan) and ending.worth[2] < completions * part)


def _search(jobs: dict[str, _Job], tried: _Tried, random: np.random.Generator) -> None:
    """Vary one thing at a time: how many share a way, the order, where to; then orders at random."""

    def ending(at_once: float, order: str, place: str) -> Ending:
        job = jobs[place]
        floor = np.maximum(job.wide / at_once, tried.curves.least[job.guest])
        name = f"{order}, {'any number' if isinf(at_once) else int(at_once)} at once"
        return tried.consider(job, _Way(name, _order(job, tried.curves, order), floor))

    if not any(job.guest.size for job in jobs.values()):
        return
    place, most = _PLACES[0], max(_COMPARED // max(job.guest.size for job in jobs.values()), 3)
    # The sum of the ends is the least for one, the last end for another. Large numbers come last.
    pairs = [*product((*_AT_ONCE, inf), _ORDERS[:2])][:most]
    at_once, order = min(pairs, key=lambda pair: ending(pair[0], pair[1], place).worth)
    if most >= len(_ORDERS) + len(_PLACES):
        order = min(_ORDERS, key=lambda each: ending(at_once, each, place).worth)
        place = min(_PLACES, key=lambda each: ending(at_once, order, each).worth)
    job, way, _ = tried.best
    for _ in range(min(_SHUFFLES, _SHUFFLED // job.guest.size) if job.guest.size > 2 else 0):
        tried.consider(job, replace(way, name=f"{way.name}, shuffled", order=random.permutation(way.order)), _WORTH_IT)


def _order(job: _Job, curves: Curves, how: str) -> Ints:
    if how == "as listed":
        return np.arange(job.guest.size)
    total, _ = curves.at(job.guest, job.wide)
    if how == "neediest first":
        return np.lexsort((-total, -curves.least[job.guest] / job.wide))
    return np.argsort(total if how == "shortest first" else -total, kind="stable")


def _job(fleet: Fleet, net: Network, guests: Sequence[FleetVm], places: Sequence[int]) -> _Job:
    at = {host.name: number for number, host in enumerate(fleet.hosts)}
    placed = [number for number, place in enumerate(places) if place >= 0]
    ways = np.array([net.way(at[guests[each].host], places[each]) for each in placed], dtype=np.intp).reshape(-1, _WAY)
    return _Job(
        np.array(placed, dtype=np.intp),
        np.array([places[each] for each in placed], dtype=np.intp),
        ways,
        net.capacity[ways].min(axis=1),
        tuple(guests[each].name for each in placed),
    )


def _left(fleet: Fleet, hosts: Sequence[str], guests: Sequence[FleetVm], curves: Curves, job: _Job) -> tuple[Left, ...]:
    """Return what the job doesn't move, and why."""
    left = [
        Left(guest.name, guest.host, f"it is pinned: {guest.pinned}")
        for guest in fleet.guests
        if guest.pinned and guest.host in set(hosts)
    ]
    net, at = _network(fleet), {host.name: number for number, host in enumerate(fleet.hosts)}
    placed, tops = set(job.guest.tolist()), highest(fleet, hosts)
    for number, guest in enumerate(guests):
        if number in placed:
            continue
        limit = None
        if not tops[number]:
            why = "there is no other host"
        elif not isfinite(curves.least[number]):
            pause = float(curves.pause[number])
            limit = pause if isfinite(pause) else None
            why = (
                f"it doesn't converge even at {tops[number] / _MIB:,.1f} MiB/s, the most that a way of it has: it "
                f"would stand still for {pause * 1e3:,.0f} ms, and {guest.max_downtime * 1e3:g} ms are allowed"
            )
        else:
            needs = float(curves.least[number])
            narrow = any(net.bandwidth(at[guest.host], at[host.name]) < needs for host in fleet.hosts)
            rate = f" at a way of {needs / _MIB:,.1f} MiB/s or more, which it needs to converge," if narrow else ""
            why = f"no host{rate} has {guest.memory / _MIB:,.1f} MiB free for it"
        left.append(Left(guest.name, guest.host, why, limit))
    return tuple(left)


def _bound(job: _Job, capacity: Floats, curves: Curves) -> float:
    """Return how long the moves take at least: the longest alone, and what each link has to carry at the least."""
    if not job.guest.size:
        return 0.0
    alone, _ = curves.at(job.guest, job.wide)
    known = np.minimum(curves.bandwidth[job.guest], job.wide[:, None])
    needed = np.full(job.guest.size, inf)
    for column in known.T:  # between two points, bytes are a power of the bandwidth: the least is at a point
        needed = np.minimum(needed, column * curves.at(job.guest, column)[0])
    carried = _carried(job.ways, needed, capacity.size)[:-1] / capacity[:-1]
    return max(float(alone.max()), float(carried.max()))
