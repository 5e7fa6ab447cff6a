"""A drain, event by event: written apart from the planner, with which it shares nothing but the plan.

Migrations are objects, time is a heap of what could happen next, and links are shared by filling them drop by drop.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf, isinf

from hwdbm.fleet import Fleet

Total = Callable[[float], tuple[float, float]]  # bytes a second -> seconds in all, and of the pause


@dataclass
class Flow:
    name: str
    links: frozenset[str]
    floor: float
    total: Total
    left: float = 1.0  # of the work
    rate: float = 0.0
    start: float = inf
    end: float = inf
    downtime: float = inf
    shares: list[tuple[float, float]] = field(default_factory=list)  # from when on, and how much


@dataclass(frozen=True)
class Order:
    """What a plan says of a VM."""

    guest: str
    destination: str
    floor: float


def way(fleet: Fleet, source: str, destination: str) -> frozenset[str]:
    hosts = {host.name: host for host in fleet.hosts}
    one, other = hosts[source], hosts[destination]
    links = {one.link, other.link}
    if not one.rack or one.rack != other.rack:
        links |= {link for rack, link in fleet.uplinks if rack in (one.rack, other.rack)}
    return frozenset(links)


def water(flows: Sequence[Flow], capacity: dict[str, float]) -> dict[str, float]:
    """Return the fair rates: of those that can still rise, the lowest rise together until a link is full."""
    rates = {flow.name: flow.floor for flow in flows}
    rising = set(rates)
    by_name = {flow.name: flow for flow in flows}
    while rising:
        lowest = min(rates[name] for name in rising)
        group = {name for name in rising if rates[name] <= lowest * (1 + 1e-12)}
        above = min((rates[name] for name in rising - group), default=inf)
        step, full = above - lowest, set()
        for link, size in capacity.items():
            here = [flow.name for flow in flows if link in flow.links]
            mine = [name for name in here if name in group]
            if mine:
                room = max(size - sum(rates[name] for name in here), 0.0) / len(mine)
                if room < step * (1 - 1e-12):
                    step, full = room, {link}
                elif room <= step * (1 + 1e-12):
                    full.add(link)
        for name in group:
            rates[name] = lowest + step
        rising -= {name for name in rising if by_name[name].links & full and name in group}
        # What rises from above the group on a full link has no room either, and is found so in its turn.
    return rates


def simulate(fleet: Fleet, orders: Sequence[Order], totals: dict[str, Total], at_once: float = inf) -> dict[str, Flow]:
    """Return what becomes of each VM; one that never ends has an infinite end."""
    capacity = {link.name: link.bandwidth for link in fleet.links}
    sources = {guest.name: guest.host for guest in fleet.guests}
    flows = {
        each.guest: Flow(each.guest, way(fleet, sources[each.guest], each.destination), each.floor, totals[each.guest])
        for each in orders
    }
    waiting, active, now = list(flows.values()), [], 0.0
    while waiting or active:
        for flow in list(waiting):
            reserved = {link: sum(each.floor for each in active if link in each.links) for link in flow.links}
            fits = all(reserved[link] + flow.floor <= capacity[link] * (1 + 1e-9) for link in flow.links)
            if len(active) < at_once and fits:
                flow.start = now
                waiting.remove(flow)
                active.append(flow)
        rates = water(active, capacity)
        events = []
        for flow in active:
            flow.rate = rates[flow.name]
            flow.shares.append((now, flow.rate))
            seconds, _ = flow.total(flow.rate)
            events.append((flow.left * seconds, flow))
        soonest = min((after for after, _ in events), default=inf)
        if isinf(soonest):
            return flows
        for after, flow in events:
            seconds, pause = flow.total(flow.rate)
            if after <= soonest * (1 + 1e-9):
                flow.left, flow.end, flow.downtime = 0.0, now + soonest, pause
                active.remove(flow)
            elif not isinf(seconds):
                flow.left -= soonest / seconds
        now += soonest
    return flows


def tabulated(rows: Sequence[tuple[float, float, float]], least: float) -> Total:
    """Return a curve through points (bandwidth, total, downtime), straight over the time that a byte takes."""
    points = sorted(set(rows))
    widths = [each[0] for each in points]

    def at(bandwidth: float) -> tuple[float, float]:
        if bandwidth < least or not points or bandwidth <= 0:
            return inf, inf
        place = bisect_left(widths, bandwidth)
        if place == 0:
            slower = widths[0] / bandwidth
            return points[0][1] * slower, points[0][2] * slower
        if place == len(points):
            return points[-1][1:]
        (b0, *low), (b1, *high) = points[place - 1], points[place]
        part = (1 / bandwidth - 1 / b0) / (1 / b1 - 1 / b0)
        return low[0] + part * (high[0] - low[0]), low[1] + part * (high[1] - low[1])

    return at
