"""10,000 VMs of some traces, resampled: how long their curves take on Dask, and what plan comes of them.

Each VM has a trace of the corpus from another moment on, at another rate, and with another amount of memory, so that no
two forecasts are the same work. Run by ``make fleet``; FLEET_ARGS="--vms 1000 --workers 4" changes what is asked for.
"""

import argparse
import resource
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np

from hwdbm.fleet import Fleet, FleetVm, Host, Link, drain, tabulate
from hwdbm.fleet.forecasts import Forecasts
from hwdbm.memslot import Memslot
from hwdbm.trace import Writer, open_trace

MIB, GIB = 1 << 20, 1 << 30
PAGES = 65_536  # of a trace that is made here
HOSTS, RACKS = 200, 10


def make(path: Path, random: np.random.Generator) -> None:
    """Write a trace of 20 s: a hot set, and a run of pages that moves on, some of which become zero."""
    hot, run = int(random.integers(50, 8000)), int(random.integers(1, 600))
    zeros = np.zeros(PAGES // 64, dtype=np.uint64)
    zeros[-int(random.integers(1, 800)) :] = ~np.uint64(0)
    slots = [Memslot(0, 0, 0x40000, PAGES, 0)]
    with Writer(path, slots, 4096, source="synthetic", interval=100, initial_zeros=zeros) as writer:
        for interval in range(200):
            bits = np.zeros(PAGES, dtype=np.bool_)
            bits[random.integers(0, hot, hot // 3)] = True
            at = int(random.integers(0, PAGES - run))
            bits[at : at + run] = True
            words = np.packbits(bits, bitorder="little").view(np.uint64)
            some = words & random.integers(0, 1 << 63, words.size, dtype=np.uint64)
            writer.append((interval + 1) * 100_000_000, words, zeros=some)


def fleet_of(traces: list[Path], vms: int, random: np.random.Generator) -> Fleet:
    """Return racks of hosts, of which the first rack has all of the VMs."""
    links = [Link(f"nic{at}", 25e9 / 8) for at in range(HOSTS)] + [Link(f"up{at}", 400e9 / 8) for at in range(RACKS)]
    hosts = [Host(f"h{at}", 64 << 40, f"nic{at}", f"r{at % RACKS}") for at in range(HOSTS)]
    first = [host.name for host in hosts if host.rack == "r0"]
    opened = {path: open_trace(path) for path in traces}
    sizes = {path: (each.npages * each.page_size, float(each.times[-1]) / 1e9) for path, each in opened.items()}
    guests = []
    for at in range(vms):
        path = traces[int(random.integers(len(traces)))]
        size, seconds = sizes[path]
        guests.append(
            FleetVm(
                f"vm{at}", first[at % len(first)], size + int(random.integers(64)) * 256 * MIB,
                float(random.choice([0.1, 0.3, 1.0])), trace=path, start=float(random.uniform(0, seconds)),
                rate=float(random.uniform(0.5, 3)),
            )
        )  # fmt: skip
    return Fleet(tuple(links), tuple(hosts), tuple(guests), tuple((f"r{at}", f"up{at}") for at in range(RACKS)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vms", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--traces", type=Path, nargs="*", help="traces; some are made by default")
    parser.add_argument("--most", type=float, default=120, help="seconds that the curves may take")
    given = parser.parse_args()
    random = np.random.default_rng(1)
    folder = Path(tempfile.mkdtemp(prefix="hwdbm-fleet-"))
    try:
        traces = given.traces or [folder / f"trace{at}" for at in range(12)]
        for path in [] if given.traces else traces:
            make(path, random)
        fleet = fleet_of(traces, given.vms, random)
        hosts = [host.name for host in fleet.hosts if host.rack == "r0"]
        began = time.monotonic()
        curves = tabulate(fleet, hosts, Forecasts("qemu"), workers=given.workers)
        took = time.monotonic() - began
        moving = int(np.isfinite(curves.least).sum())
        spent = resource.getrusage(resource.RUSAGE_CHILDREN)
        busy = spent.ru_utime + spent.ru_stime
        print(f"{given.vms} VMs of {len(traces)} traces, {given.workers} workers: {took:.1f} s, {busy:.1f} s of CPU")
        print(f"{moving} converge within their limits, {given.vms - moving} don't")
        began = time.monotonic()
        plan = drain(fleet, hosts, curves)
        print(f"{plan.tried} plans compared in {time.monotonic() - began:.1f} s; the best: {plan.ending.name}")
        for each in (plan.ending, *plan.naive):
            print(f"{each.name}: {each.moved} moved, the last after {each.makespan:,.0f} s")
        print(f"no plan of these moves ends before {plan.bound:,.0f} s")
        assert took <= given.most, f"{took:.1f} s are more than {given.most:g}"
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
