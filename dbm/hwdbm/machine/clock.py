"""The machine's clock: what was done, and what it would have cost, so that two mechanisms compare on the same run.

Counts are exact, and don't jitter. Seconds are counts times a table of costs; most of the table are parameters,
those that someone has published say so.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from threading import Lock

from hwdbm.check import instance, integer, real
from hwdbm.dirtylog import Stats


@dataclass(frozen=True, slots=True)
class Costs:
    """The cost of one event of each kind, in seconds.

    Parameters
    ----------
    stores, loads : float
        An access that the TLB lets through.
    tlb_misses : float
        A walk. Four levels of which the last is in memory: a parameter.
    rechecks : float
        A write through a writable-clean entry, which is checked against memory. A parameter.
    hardware_updates : float
        An update of a descriptor by the MMU: a compare-and-swap. A parameter.
    translation_faults, access_flag_faults, permission_faults : float
        A fault with its handler. A parameter: 1 to 2 us is what exits and handlers of that length take.
    spurious_faults : float
        A permission fault, from a stale entry, on a page whose leaf allows the write by now.
    copies : float
        A copy on write of a page. A parameter.
    splits, collapses : float
        A block into pages, and back: a table written or read. A parameter.
    flushes : float
        A TLB invalidation of a range on all CPUs. A parameter.
    leaves_read : float
        40 ms for the 16.7 M leaves of 64 GB (the RFC's cover letter, its open problem 3).
    leaves_changed : float
        650 ms for the 33.5 M leaves of 128 GB that a log's start write-protects (Linux commit c862626e19ef).
    """

    stores: float = 1e-9
    loads: float = 1e-9
    tlb_misses: float = 50e-9
    rechecks: float = 50e-9
    hardware_updates: float = 20e-9
    translation_faults: float = 1.5e-6
    access_flag_faults: float = 1.5e-6
    permission_faults: float = 1.5e-6
    spurious_faults: float = 1e-6
    copies: float = 1e-6
    splits: float = 5e-6
    collapses: float = 5e-6
    flushes: float = 5e-6
    leaves_read: float = 40e-3 / (1 << 24)
    leaves_changed: float = 650e-3 / (1 << 25)

    def __post_init__(self) -> None:
        for cost in fields(self):
            object.__setattr__(self, cost.name, real(getattr(self, cost.name), cost.name, low=0.0))


_NAMES = tuple(cost.name for cost in fields(Costs))
_COLLECTOR = ("flushes", "leaves_read", "leaves_changed", "collapses")
"""What whoever reads the log waits for."""
_GUEST = tuple(name for name in _NAMES if name not in _COLLECTOR)
"""What the guest waits for."""


@dataclass(frozen=True, slots=True)
class Reading:
    """A reading of the clock.

    Parameters
    ----------
    counts : dict
        How often each thing of `Costs` was done.
    costs : Costs
        The cost of each count.
    """

    counts: dict[str, int]
    costs: Costs = field(default_factory=Costs)

    @property
    def guest(self) -> float:
        """Seconds that the guest's side took."""
        return self._seconds(_GUEST)

    @property
    def collector(self) -> float:
        """Seconds that the log's side took."""
        return self._seconds(_COLLECTOR)

    def _seconds(self, names: tuple[str, ...]) -> float:
        return sum(self.counts[name] * float(getattr(self.costs, name)) for name in names)

    def __sub__(self, before: "Reading") -> "Reading":
        """Return what was done between two readings."""
        return Reading({name: self.counts[name] - before.counts[name] for name in self.counts}, self.costs)


class Clock:
    """Counts of several threads.

    Parameters
    ----------
    costs : Costs
        The cost of each event.
    log : callable
        Returns the log's own counts, of which the leaves are.

    Examples
    --------
    >>> clock = Clock(Costs(stores=1.0, permission_faults=10.0))
    >>> clock.add(stores=3, permission_faults=1)
    >>> clock.read().guest
    13.0
    """

    def __init__(self, costs: Costs, log: Callable[[], Stats] = Stats) -> None:
        instance(costs, Costs, "costs")
        instance(log, Callable, "log")
        self._costs, self._log = costs, log
        self._counts = dict.fromkeys(_NAMES, 0)
        self._lock = Lock()

    def add(self, **counts: int) -> None:
        """Count what was done, by the names of `Costs`.

        Raises
        ------
        TypeError
            If there is no such name, or a count is no integer.
        """
        for name, count in counts.items():
            if name not in self._counts:
                raise TypeError(f"there is no cost {name!r}: there are {', '.join(self._counts)}")
            counts[name] = integer(count, name)
        with self._lock:
            for name, count in counts.items():
                self._counts[name] += count

    def read(self) -> Reading:
        """Return what the clock shows now."""
        stats = self._log()
        with self._lock:
            counts = dict(self._counts)
        counts["leaves_read"] += stats.leaves_read
        counts["leaves_changed"] += stats.leaves_changed
        return Reading(counts, self._costs)
