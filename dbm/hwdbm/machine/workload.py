"""Workloads: which words a guest stores, and when. Seeded, and the same on every run.

A workload is a function from a store's number to its place and its value, so it has no state but the number of the
next one. The value of each store differs from that of every other, so that a page that a migration misses shows in
a digest. Places are in the guest's writable memory, laid end to end.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import gcd, isfinite, nan
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from hwdbm.check import instance, integer, real, uint64s

Numbers = NDArray[np.uint64]
Offsets = NDArray[np.int64]

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
_MOST_RATE = 1e15  # stores a second
_MOST_SECONDS = 1e9

WORKLOADS: dict[str, type["Workload"]] = {}
"""The workloads by name."""


@dataclass(frozen=True)
class Workload:
    """A sequence of stores.

    Parameters
    ----------
    seed : int
        Another seed, other places and values.
    rate : float, optional
        Stores of 8 bytes a second. Unlimited by default.
    """

    name: ClassVar[str] = ""

    seed: int = 0
    rate: float | None = None

    def __init_subclass__(cls) -> None:
        WORKLOADS[cls.name] = cls

    def __post_init__(self) -> None:
        self._set("seed", integer(self.seed, "seed", low=-(1 << 63), high=_MASK))
        if self.rate is not None:
            self._set("rate", real(self.rate, "rate", 0.0, _MOST_RATE))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def pages(self, numbers: Numbers, npages: int) -> Offsets:
        """Return the page, below `npages`, that each store goes to.

        Parameters
        ----------
        numbers : (n,) uint64 array
            The numbers of stores.
        npages : int
            Pages of the guest's writable memory, below 2 ** 32.
        """
        return self._pages(uint64s(numbers, "numbers"), integer(npages, "npages", low=1, high=(1 << 32) - 1))

    def _pages(self, numbers: Numbers, npages: int) -> Offsets:
        raise NotImplementedError

    def offsets(self, position: int, count: int, size: int, page_size: int = 4096) -> Offsets:
        """Return where the `count` stores from number `position` on go.

        Parameters
        ----------
        position, count : int
            The first store's number, and how many.
        size, page_size : int
            Bytes of the memory and of a page; a page is a power of two.

        Returns
        -------
        (count,) int64 array
            Offsets in bytes, multiples of 8.

        Raises
        ------
        ValueError
            If a store has a number of more than 64 bits, a page isn't one, or the memory is less than a page.
        """
        position, count = _numbered(position, count)
        page_size = integer(page_size, "page_size", low=8)
        if page_size & page_size - 1:
            raise ValueError(f"page_size is a power of two, not {page_size}")
        size = integer(size, "size", low=page_size, high=(1 << 32) * page_size - 1)
        numbers = np.arange(position, position + count, dtype=np.uint64)
        pages = self._pages(numbers, size // page_size)
        words = self._hash(numbers, 1) & np.uint64(page_size // 8 - 1)
        return pages * page_size + (words << np.uint64(3)).astype(np.int64)

    def values(self, position: int, count: int) -> Numbers:
        """Return what the stores store: each value differs from every other."""
        position, count = _numbered(position, count)
        numbers = np.arange(position + 1, position + 1 + count, dtype=np.uint64)
        return numbers * np.uint64(_GOLDEN) ^ np.uint64(self.seed & _MASK)

    def quota(self, seconds: float) -> int | None:
        """Return how many stores are due when the guest has run for some seconds; None where it is unlimited."""
        seconds = real(seconds, "seconds", 0.0, _MOST_SECONDS)
        return None if self.rate is None else int(self.rate * seconds)

    def to_dict(self) -> dict[str, Any]:
        """Return what `from_dict` makes an equal workload of; JSON can hold it."""
        return {"name": self.name, **{each.name: getattr(self, each.name) for each in fields(self)}}

    @classmethod
    def _from(cls, given: Mapping[str, Any]) -> "Workload":
        return cls(**given)

    def _hash(self, numbers: Numbers, stream: int) -> Numbers:
        """Return a hash of each number (splitmix64), another for each stream."""
        x = numbers + np.uint64((self.seed * 2 + stream) * _GOLDEN & _MASK)
        x *= np.uint64(0xD1342543DE82EF95)
        x ^= x >> np.uint64(30)
        x *= np.uint64(0xBF58476D1CE4E5B9)
        x ^= x >> np.uint64(27)
        x *= np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
        return x

    def _below(self, numbers: Numbers, limit: int, stream: int) -> Offsets:
        """Return a number in [0, limit) for each; the limit is below 2**32."""
        return ((self._hash(numbers, stream) >> np.uint64(32)) * np.uint64(limit) >> np.uint64(32)).astype(np.int64)

    def _uniform(self, numbers: Numbers, stream: int) -> NDArray[np.float64]:
        """Return a number in [0, 1) for each."""
        return (self._hash(numbers, stream) >> np.uint64(11)).astype(np.float64) * 2.0**-53


@dataclass(frozen=True)
class Sequential(Workload):
    """One page after the other, from the first to the last and again.

    Parameters
    ----------
    stores_per_page : int
        How many go to a page before the next has its turn.
    """

    name = "sequential"
    stores_per_page: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("stores_per_page", integer(self.stores_per_page, "stores_per_page", low=1, high=_MASK))

    def _pages(self, numbers: Numbers, npages: int) -> Offsets:
        return (numbers // np.uint64(self.stores_per_page) % np.uint64(npages)).astype(np.int64)


@dataclass(frozen=True)
class Uniform(Workload):
    """Any page, each as likely as any other."""

    name = "uniform"

    def _pages(self, numbers: Numbers, npages: int) -> Offsets:
        return self._below(numbers, npages, 2)


@dataclass(frozen=True)
class HotSet(Workload):
    """A run of hot pages that most stores go to; the others go anywhere.

    Parameters
    ----------
    share : float
        The share of pages that are hot.
    weight : float
        The share of stores that go to hot pages.
    """

    name = "hot"
    share: float = 0.1
    weight: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("share", real(self.share, "share", 0.0, 1.0))
        self._set("weight", real(self.weight, "weight", 0.0, 1.0))

    def _pages(self, numbers: Numbers, npages: int) -> Offsets:
        hot = max(1, int(npages * self.share))
        first = int(self._below(np.zeros(1, dtype=np.uint64), npages, 4)[0])
        near = (first + self._below(numbers, hot, 2)) % npages
        return np.where(self._uniform(numbers, 3) < self.weight, near, self._below(numbers, npages, 5))


@dataclass(frozen=True)
class Zipf(Workload):
    """The r-th most written page has a share that falls as ``r ** -exponent``; the pages lie scattered.

    Parameters
    ----------
    exponent : float
        0 to 16: 0 is uniform, 0.99 what caches see (YCSB).
    """

    name = "zipf"
    exponent: float = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("exponent", real(self.exponent, "exponent", 0.0, 16.0))

    def _pages(self, numbers: Numbers, npages: int) -> Offsets:
        u, rest = self._uniform(numbers, 2), 1.0 - self.exponent
        top = float(npages + 1)  # the inverse of the distribution of a continuous rank in [1, npages + 1)
        rank = top**u if abs(rest) < 1e-9 else (1.0 + u * (top**rest - 1.0)) ** (1.0 / rest)
        ranks = np.minimum(rank.astype(np.int64) - 1, npages - 1)
        step = _coprime(npages)
        return (ranks * step + self.seed % npages) % npages


@dataclass(frozen=True)
class Bursty(Uniform):
    """Any page, by bursts: some seconds at the rate, some of nothing.

    Parameters
    ----------
    on, off : float
        Seconds.
    """

    name = "bursty"
    rate: float | None = 1e7
    on: float = 0.5
    off: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("on", real(self.on, "on", 1e-9, _MOST_SECONDS))
        self._set("off", real(self.off, "off", 0.0, _MOST_SECONDS))

    def quota(self, seconds: float) -> int | None:
        """Return how many stores are due when the guest has run for some seconds."""
        seconds = real(seconds, "seconds", 0.0, _MOST_SECONDS)
        whole, part = divmod(seconds, self.on + self.off)
        return int((self.rate or 0.0) * (whole * self.on + min(part, self.on)))


@dataclass(frozen=True)
class Idle(Workload):
    """No store at all."""

    name = "idle"

    def _pages(self, numbers: Numbers, npages: int) -> Offsets:  # noqa: ARG002 - no store is due, unless it is asked for
        return np.zeros(numbers.size, dtype=np.int64)

    def quota(self, seconds: float) -> int | None:
        """Return 0."""
        real(seconds, "seconds", 0.0, _MOST_SECONDS)
        return 0


def _numbered(position: int, count: int) -> tuple[int, int]:
    """Return the number of the first of some stores, and how many there are, all within 64 bits."""
    count = integer(count, "count", high=_MASK)
    return integer(position, "position", high=_MASK - count), count


def from_dict(given: Mapping[str, Any]) -> Workload:
    """Return the workload that `Workload.to_dict` described.

    Raises
    ------
    ValueError
        If it describes none.
    """
    options = dict(given)
    name = str(options.pop("name", None))
    if name not in WORKLOADS:
        raise ValueError(f"no workload {name!r}: there are {', '.join(WORKLOADS)}")
    known = [each.name for each in fields(WORKLOADS[name]) if each.init]
    unknown = [each for each in options if each not in known]
    if unknown:
        raise ValueError(f"workload {name} has no option {unknown[0]!r}: it has {', '.join(known)}")
    try:
        return WORKLOADS[name]._from(options)
    except TypeError as error:
        raise ValueError(f"workload {name}: {error}") from None


def parse(text: str, seed: int = 0) -> Workload:
    """Return the workload that a text of the form ``name,option=number,...`` names.

    Parameters
    ----------
    text : str
        A number may end in k, M or G: 1000, 1000 ** 2 and 1000 ** 3.
    seed : int
        Its seed, where the text has none.

    Raises
    ------
    ValueError
        If it names none, or has an option that the workload doesn't know, or one twice.

    Examples
    --------
    >>> parse("hot,rate=5M,share=0.01", seed=3)
    HotSet(seed=3, rate=5000000.0, share=0.01, weight=0.9)
    """
    instance(text, str, "a workload")
    seed = integer(seed, "seed", low=-(1 << 63), high=_MASK)
    name, *options = text.split(",")
    given: dict[str, Any] = {"name": name.strip()}
    for option in options:
        key, equals, number = (each.strip() for each in option.partition("="))
        if not equals or not key:
            raise ValueError(f"workload {text!r}: {option!r} is not of the form option=number")
        if key in given:
            raise ValueError(f"workload {text!r} says {key} twice")
        given[key] = _number(number)
    return from_dict({"seed": seed} | given)


def _number(text: str) -> float | int:
    scale = {"k": 1e3, "M": 1e6, "G": 1e9}.get(text[-1:], 1)
    try:
        value = float(text[:-1] if scale != 1 else text) * scale
    except ValueError:
        value = nan
    if not isfinite(value):
        raise ValueError(f"a number of a workload is like 5, 0.5 or 5M, not {text!r}")
    return int(value) if scale == 1 and value == int(value) and "." not in text else value


def _coprime(npages: int) -> int:
    """Return a step of about the golden section that visits every page."""
    step = max(1, int(npages * 0.6180339887))
    while gcd(step, npages) != 1:
        step += 1
    return step
