"""Fleets and forecasts for tests. The forecasts are simple enough to be worked out by hand."""

import zlib

import numpy as np
from hypothesis import strategies as st

from hwdbm.fleet import Fleet, FleetVm, Host, Link, Taken
from hwdbm.fleet.curves import Curve

GIB = 1 << 30
MIB = 1 << 20


def geometric(guest: FleetVm) -> Curve:
    """Pre-copy of a hot set that is rewritten at a rate, both drawn by the VM's name; nothing else changes."""
    random = np.random.default_rng(zlib.crc32(guest.name.encode()))
    hot = guest.memory * float(random.uniform(0, 0.2))
    rate = 10 ** float(random.uniform(5, 9))
    fixed = float(random.uniform(0.01, 2))

    def curve(bandwidth: float) -> Taken:
        remaining, total = float(guest.memory), fixed
        for _ in range(30):
            total += remaining / bandwidth
            remaining = min(rate * remaining / bandwidth, hot)
            if remaining / bandwidth <= guest.max_downtime:
                return Taken(total + remaining / bandwidth, remaining / bandwidth, converges=True)
        return Taken(total, remaining / bandwidth, converges=False)

    return curve


def slow(guest: FleetVm) -> Curve:
    """As `geometric`, and each point is 10 ms of work."""
    curve = geometric(guest)

    def at(bandwidth: float) -> Taken:
        total = 0
        for number in range(100_000):
            total += number
        return curve(bandwidth)

    return at


def missing(guest: FleetVm) -> Curve:
    raise FileNotFoundError(f"{guest.name}: nowhere.zarr")


def steady(seconds: float = 0.0, least: float = 0.0) -> object:
    """Return a model: bytes over bandwidth and some seconds, a pause of 10 ms, and a bandwidth that it needs."""

    def model(guest: FleetVm) -> Curve:
        return lambda bandwidth: Taken(seconds + guest.memory / bandwidth, 0.01, converges=bandwidth >= least)

    return model


def pair(*guests: FleetVm, bandwidth: float = GIB, room: int = 1 << 50, hosts: int = 2) -> Fleet:
    """Return hosts h0, h1, ... with a link each of the same bandwidth."""
    links = tuple(Link(f"l{at}", bandwidth) for at in range(hosts))
    return Fleet(links, tuple(Host(f"h{at}", room, f"l{at}") for at in range(hosts)), guests)


def guest(name: str, memory: int = GIB, host: str = "h0", limit: float = 0.3, **more: object) -> FleetVm:
    return FleetVm(name, host, memory, limit, **more)  # type: ignore[arg-type]


@st.composite
def fleets(draw: st.DrawFn) -> Fleet:
    """Small fleets: hosts with links of their own or shared, racks with and without uplinks, VMs that fit or don't."""
    links = [Link(f"l{at}", float(draw(st.sampled_from([1e6, 1e8, 3e8, 1.25e9, 1e10])))) for at in range(4)]
    racks = [f"r{at}" for at in range(draw(st.integers(1, 3)))]
    hosts = [
        Host(
            f"h{at}",
            draw(st.sampled_from([GIB, 20 * GIB, 200 * GIB])),
            draw(st.sampled_from(links)).name,
            draw(st.sampled_from(["", *racks])),
        )
        for at in range(draw(st.integers(1, 5)))
    ]
    guests = [
        FleetVm(
            f"v{draw(st.integers(0, 30))}-{at}",
            draw(st.sampled_from(hosts)).name,
            draw(st.integers(1, 30)) * GIB,
            draw(st.sampled_from([0.001, 0.03, 0.3, 3.0])),
            pinned=draw(st.sampled_from(["", "", "", "", "a GPU"])),
        )
        for at in range(draw(st.integers(0, 8)))
    ]
    used = dict.fromkeys(host.rack for host in hosts if host.rack)
    uplinks = tuple((rack, draw(st.sampled_from(links)).name) for rack in used if draw(st.booleans()))
    return Fleet(tuple(links), tuple(hosts), tuple(guests), uplinks)
