"""The benchmarks of the engine, each a function from a set-up to rows."""

import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hwdbm import files, kernels, pte
from hwdbm.bench import visitor
from hwdbm.bench.measure import Row, smallest
from hwdbm.bench.stream import StreamSetup, rows
from hwdbm.bitmap import DirtyBitmap
from hwdbm.check import instance, instances, integer, one_of
from hwdbm.dirtylog import DirtyLog, LogClient
from hwdbm.image import Slot, open_image
from hwdbm.process import child, python
from hwdbm.stage2 import Stage2

_FRACTIONS = {"clean": 0.0, "1 % dirty": 0.01, "50 % dirty": 0.5, "100 % dirty": 1.0}
_SHARED_FRACTIONS = {"clean": 0.0, "0.1 % dirty": 0.001, "1 % dirty": 0.01, "50 % dirty": 0.5, "100 % dirty": 1.0}
_DENSITIES = {
    "clean": (0.0, 1), "0.01 % dirty": (1e-4, 1), "1 % dirty": (0.01, 1), "10 % dirty": (0.1, 1),
    "50 % dirty": (0.5, 1), "100 % dirty": (1.0, 1),
    "1 % of stripes": (0.01, 512), "10 % of stripes": (0.1, 512), "50 % of stripes": (0.5, 512),
}  # fmt: skip
"""The share that is dirty, and how many pages in a row are."""
LIMITS = {
    **{("vector", label): ("sum()", 5.0) for label in _DENSITIES},
    ("fused", "clean"): ("sum()", 1.1),
    ("fused", "50 % dirty"): ("AND in place", 1.25),
    ("fused", "100 % dirty"): ("AND in place", 1.25),
}
"""What a harvest may take: times a read of the descriptors, or the read and write of a pass that must change them."""


Work = dict[str, Callable[[], object]]


@dataclass(frozen=True, slots=True)
class Setup:
    """The sizes that the benchmarks run with.

    Parameters
    ----------
    npages : int
        Pages of 4 KiB in the slot; 16,777,216 are 64 GiB, and 128 MiB of descriptors.
    repeat : int
        How often each is measured; the smallest time counts.
    """

    npages: int = 1 << 24
    repeat: int = 9

    def __post_init__(self) -> None:
        for name in ("npages", "repeat"):
            object.__setattr__(self, name, integer(getattr(self, name), name, 1))


_SHARED_LIMITS = {"clean": 1.15, "1 % dirty": 3.0}
"""What a harvest of shared leaves may take: times that of private ones."""


def mapped(
    npages: int, level: int = 3, *, dbm: bool = True, name: kernels.Name | None = None, shared: bool = False
) -> Stage2:
    """Return a slot mapped whole, its descriptors and bitmaps written and so backed by memory."""
    s2 = Stage2(npages, kernels=name, shared=shared)
    s2.map(0, npages, pfn=0, level=level, dbm=dbm)
    s2.host_dirty.fill()
    return s2


def dirtied(entries: NDArray[np.uint64], fraction: float, together: int = 1) -> NDArray[np.uint64]:
    """Return a copy of clean descriptors with a random fraction of them dirty, so many `together`."""
    copy = entries.copy()
    rng = np.random.default_rng(1)
    for start in range(0, copy.size, 1 << 20):
        part = copy[start : start + (1 << 20)]
        chosen = rng.random(-(-part.size // together)) < fraction
        part[np.repeat(chosen, together)[: part.size]] |= np.uint64(pte.S2AP_W)
    return copy


def harvest(setup: Setup) -> Iterator[Row]:
    """Harvest with re-protect, 4 KiB pages: each kernel, and a C loop with a call a descriptor, over their floor.

    All work on the same array.
    """
    first, *others = kernels.available()
    s2 = mapped(setup.npages, name=first)
    entries = s2.level(3)
    arrays = {level: s2.level(level) for level in (1, 2, 3)}
    slots = {first: s2, **{name: Stage2(setup.npages, kernels=name, arrays=arrays) for name in others}}
    for slot in slots.values():
        slot.host_dirty.fill()
    out, walk = backed(setup.npages), visitor.load()
    clean, keep = entries.copy(), np.uint64(~pte.S2AP_W & (1 << 64) - 1)
    for label, density in _DENSITIES.items():
        start = dirtied(clean, *density)
        work: Work = {"sum()": entries.sum, "AND in place": lambda: np.bitwise_and(entries, keep, out=entries)}
        work |= {name: lambda slot=slot: slot.harvest(out) for name, slot in slots.items()}  # type: ignore[misc]
        if walk:
            work["C loop"] = lambda: walk(entries, out.words)
        times = smallest(work, lambda start=start: np.copyto(entries, start), setup.repeat)  # type: ignore[misc]
        for name in list(work)[2:]:
            floor, limit = LIMITS.get((name, label), ("sum()", None))
            yield Row(f"harvest, {name}, {label}", times[name], floor, times[floor], limit)


def shared(setup: Setup) -> Iterator[Row]:
    """Harvest shared leaves with nobody beside, over private ones. There is nothing to measure without numba."""
    if "fused" not in kernels.available():
        return
    slots = {"private": mapped(setup.npages, name="fused"), "shared": mapped(setup.npages, shared=True)}
    out, clean = backed(setup.npages), slots["private"].level(3).copy()
    for label, fraction in _SHARED_FRACTIONS.items():
        start = dirtied(clean, fraction)

        def before(start: NDArray[np.uint64] = start) -> None:
            for s2 in slots.values():
                np.copyto(s2.level(3), start)

        work: Work = {name: lambda s2=s2: s2.harvest(out) for name, s2 in slots.items()}  # type: ignore[misc]
        times = smallest(work, before, setup.repeat)
        limit = _SHARED_LIMITS.get(label)
        yield Row(f"harvest, shared, {label}", times["shared"], "private", times["private"], limit)


def enable(setup: Setup) -> Iterator[Row]:
    """Enable DBM on every page, over one copy of the array."""
    s2 = mapped(setup.npages, dbm=False)
    entries = s2.level(3)
    start, target = entries.copy(), entries.copy()
    work: Work = {"copy": lambda: np.copyto(target, start), "enable_dbm": s2.enable_dbm}
    times = smallest(work, lambda: np.copyto(entries, start), setup.repeat)
    yield Row("enable_dbm", times["enable_dbm"], "one copy", times["copy"], 2.0)


def replace(setup: Setup) -> Iterator[Row]:
    """Map every page again, over one copy of the array."""
    s2 = mapped(setup.npages)
    start, target = s2.level(3).copy(), s2.level(3).copy()
    work: Work = {"copy": lambda: np.copyto(target, start), "map": lambda: s2.map(0, setup.npages, pfn=0, dbm=True)}
    times = smallest(work, repeat=setup.repeat)
    yield Row("map", times["map"], "one copy", times["copy"], 5.0)


def listing(setup: Setup) -> Iterator[Row]:
    """List the pages, and the ranges, that a harvest of 1 % found, over that harvest."""
    s2, out = mapped(setup.npages), backed(setup.npages)
    entries = s2.level(3)
    start = dirtied(entries, 0.01)
    np.copyto(entries, start)
    found = s2.harvest()
    work: Work = {"harvest": lambda: s2.harvest(out), "pages()": found.pages, "ranges()": found.ranges}
    times = smallest(work, lambda: np.copyto(entries, start), setup.repeat)
    for name in ("pages()", "ranges()"):
        yield Row(f"{name}, 1 % dirty", times[name], "the harvest", times["harvest"], 1.0)


def workers(setup: Setup) -> Iterator[Row]:
    """Take the steps of GET, CLEAR and sync, 1 % dirty, in two threads, over one. It takes two processors."""
    full = DirtyBitmap(setup.npages)
    full.fill()
    verbs: dict[str, Callable[[DirtyLog], object]] = {
        "GET": lambda log: log.get_dirty_log(0),
        "CLEAR": lambda log: log.clear_dirty_log(0, 0, setup.npages, full),
        "sync": lambda log: log.sync(0),
    }
    for name, verb in verbs.items():
        logs = [_log(setup.npages, threads, manual=name == "CLEAR") for threads in (1, 2)]
        start = dirtied(logs[0].stage2(0).level(3), 0.01)

        def before(name: str = name, logs: list[DirtyLog] = logs, start: NDArray[np.uint64] = start) -> None:
            for log in logs:
                np.copyto(log.stage2(0).level(3), start)
                if name == "CLEAR":
                    log.get_dirty_log(0)

        one, two = (partial(verb, log) for log in logs)
        times = smallest({"one": one, "two": two}, before, setup.repeat, clock=time.perf_counter)
        yield Row(f"{name} with two workers", times["two"], "one worker", times["one"], 0.7)


def clients(setup: Setup) -> Iterator[Row]:
    """Harvest for several clients of a log, 1 % dirty, each with the take of one, over the same for one client."""
    logs = {count: _log(setup.npages, 1, manual=False) for count in (1, 4, 16)}
    there = {count: [log.client(f"client {number}") for number in range(count)] for count, log in logs.items()}
    start = dirtied(logs[1].stage2(0).level(3), 0.01)

    def before() -> None:
        for count, log in logs.items():
            np.copyto(log.stage2(0).level(3), start)
            for client in there[count]:
                client.feeds[0].bitmap.clear()

    def take(client: LogClient) -> None:
        client.take(0).commit()

    work: Work = {str(count): partial(take, some[0]) for count, some in there.items()}
    times = smallest(work, before, setup.repeat)
    for count, limit in ((4, 1.3), (16, None)):
        yield Row(f"harvest for {count} clients", times[str(count)], "one client", times["1"], limit)
    for some in there.values():
        for client in some:
            client.close()


def _log(npages: int, threads: int, *, manual: bool) -> DirtyLog:
    """Return a log of a slot mapped whole, its memory backed."""
    log = DirtyLog(workers=threads, manual_protect=manual)
    log.set_memory_region(slot=0, flags=1, guest_phys_addr=0, memory_size=npages << 12, userspace_addr=1 << 40)
    log.map(0, gfn=0, npages=npages, pfn=0)
    log.mark_dirty(0, 0, npages)
    log.clear_dirty_log(0, 0, npages, log.get_dirty_log(0))
    return log


def blocks(setup: Setup) -> Iterator[Row]:
    """Harvest the same memory as 2 MiB blocks, over its harvest as pages."""
    pages, s2, out = mapped(setup.npages), mapped(setup.npages, level=2), backed(setup.npages)
    for label, fraction in _FRACTIONS.items():
        seconds = []
        for slot, level in ((pages, 3), (s2, 2)):
            entries = slot.level(level)
            start = dirtied(pte.clean(level)(entries), fraction)
            times = smallest(
                {"": lambda slot=slot: slot.harvest(out)},  # type: ignore[misc]
                lambda entries=entries, start=start: np.copyto(entries, start),  # type: ignore[misc]
                setup.repeat,
            )
            seconds.append(times[""])
        yield Row(f"2 MiB blocks, {label}", seconds[1], "4 KiB pages", seconds[0], 0.02 if fraction == 0 else None)


def sparse(setup: Setup) -> Iterator[Row]:
    """Harvest a slot with one stripe in 64 mapped, over a full slot of as many stripes."""
    stripes = range(0, setup.npages - 511, 512 * 64)
    few = 512 * len(stripes)
    thin, full = Stage2(setup.npages), mapped(few)
    for first in stripes:
        thin.map(first, 512, pfn=first, dbm=True)
    out, small = backed(setup.npages), backed(few)
    work = {"sparse": lambda: thin.harvest(out), "full": lambda: full.harvest(small)}
    evict = np.ones(1 << 23, dtype=np.uint64)  # so that both are read from memory and not from a cache
    times = smallest(work, evict.sum, setup.repeat)
    yield Row("1 stripe in 64, else unmapped", times["sparse"], "full stripes", times["full"])


def tables(setup: Setup) -> Iterator[Row]:
    """Read a raw image's tables into a slot's arrays, at 0.5 GB/s of table bytes or more."""
    with files.scratch() as folder:
        path, slot, vttbr, vtcr = raw_image(folder, setup.npages)
        image = open_image(path, ram_base=0, vttbr=vttbr, vtcr=vtcr, slots=[slot])
        data = np.fromfile(path, dtype=np.uint64)
        read: Work = {"read": lambda: image.stage2(slot.id)}
        times = smallest(read, repeat=max(2, setup.repeat // 3), clock=time.perf_counter)
        speed = data.nbytes / times["read"] / 1e9
        yield Row(f"tables of an image, {speed:.2f} GB/s", times["read"], "0.5 GB/s", data.nbytes / 0.5e9, 1.0)


def unmapped(_: Setup) -> Iterator[Row]:
    """Harvest a slot of 1 TiB that was never mapped: its resident bytes over 400 MiB."""
    yield Row("1 TiB never mapped, resident", resident(1 << 28), "400 MiB", 400 << 20, 1.0, "byte")


def stream(setup: Setup) -> Iterator[Row]:
    """Yield what a migration's stream takes beside plain sends, over a Unix socket and over loopback TCP."""
    memory = min(setup.npages << 12, StreamSetup().memory)
    yield from rows(StreamSetup(memory=memory, rounds=setup.repeat, transport="unix"))
    yield from rows(StreamSetup(memory=memory, rounds=setup.repeat, transport="tcp"))


BENCHMARKS: dict[str, Callable[[Setup], Iterator[Row]]] = {
    "harvest": harvest,
    "shared": shared,
    "enable": enable,
    "map": replace,
    "lists": listing,
    "workers": workers,
    "clients": clients,
    "blocks": blocks,
    "sparse": sparse,
    "tables": tables,
    "unmapped": unmapped,
    "stream": stream,
}


def run(setup: Setup, names: list[str] | None = None) -> Iterator[Row]:
    """Yield the rows of the benchmarks `names`, by default all, as they are measured.

    Raises
    ------
    ValueError
        If there is no such benchmark; none is run then.
    """
    instance(setup, Setup, "setup")
    chosen = tuple(BENCHMARKS) if names is None else instances(names, str, "names")
    for name in chosen:
        one_of(name, BENCHMARKS, "a benchmark")
    return _run(setup, chosen)


def _run(setup: Setup, names: Iterable[str]) -> Iterator[Row]:
    for name in names:
        yield from BENCHMARKS[name](setup)


def backed(npages: int) -> DirtyBitmap:
    """Return a bitmap with memory behind it, as one that is used from pass to pass has."""
    bitmap = DirtyBitmap(npages)
    bitmap.fill()
    return bitmap


def resident(npages: int) -> int:
    """Return the bytes that a process with a slot that was never mapped keeps resident after a harvest."""
    code = (
        "import hwdbm, re, pathlib\n"
        f"s2 = hwdbm.Stage2({npages})\n"
        "s2.harvest()\n"
        "print(re.search(r'VmHWM:\\s+(\\d+) kB', pathlib.Path('/proc/self/status').read_text())[1])"
    )
    with child(python("-c", code), stdout=subprocess.PIPE, text=True) as process:
        out, _ = process.communicate()
    return int(out) << 10


def raw_image(folder: Path, npages: int) -> tuple[Path, Slot, int, int]:
    """Write a raw image that holds the tables of one slot of 4 KiB pages, and nothing else.

    Returns
    -------
    path : Path
        The image, its first byte at physical address 0: concatenated roots, level-2 tables, level-3 tables.
    slot : Slot
        Slot 0, from guest address 0.
    vttbr, vtcr : int
        The registers: 4 KiB granule, 40 bits, start level 1, HA and HD on.
    """
    stripes = -(-npages // 512)
    seconds = -(-stripes // 512)
    roots = 2
    first_second, first_third = roots, roots + seconds
    path = folder / "ram.img"
    tables = np.zeros((roots + seconds + stripes, 512), dtype=np.uint64)
    addresses = np.arange(len(tables), dtype=np.uint64) << np.uint64(12)
    tables.reshape(-1)[:seconds] = pte.make_table(addresses[first_second:first_third])
    tables[first_second:first_third].reshape(-1)[:stripes] = pte.make_table(addresses[first_third:])
    leaves = pte.make_leaf(np.arange(npages, dtype=np.uint64) << np.uint64(12), 3, dbm=True)
    tables[first_third:].reshape(-1)[:npages] = leaves
    tables.tofile(path)
    return path, Slot(0, 0, npages << 12), 0, 0x806A_3558
