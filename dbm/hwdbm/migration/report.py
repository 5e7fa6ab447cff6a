"""The report of a migration, in QEMU's names. Times are in ms, sizes in bytes, rates in bytes a second."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwdbm.bitmap import DirtyBitmap
from hwdbm.forecast import Forecast

_CELLS = 512
"""Cells that all memory is folded into, at most, for the map of a pass."""


@dataclass(slots=True)
class Pass:
    """One pass over the dirty pages.

    Parameters
    ----------
    number : int
        From 1; the first sends everything.
    dirty : int
        Pages that it was to send.
    remaining : int
        Bytes that it was to send.
    dirty_rate : float
        Bytes a second that were dirtied before it, since the pass before it began.
    collect_time : float
        Seconds that harvest and clear took.
    throttle : int
        Percent of their time that the vCPUs were without, before it.
    expected_downtime : float, optional
        Seconds that sending it with the guest paused would take, at the bandwidth of the pass before.
    normal, duplicate : int
        Pages sent with their bytes, and pages of zeros.
    transferred : int
        Bytes sent.
    time : float
        Seconds until the receiver acknowledged it.
    zero_time : float
        The part of it that pages of zeros took at the source, when the link wasn't used.
    paused : float
        Seconds that the guest stood still in it, and then went on because that took too long.
    cells : (n,) float32 array
        The dirty part of each cell of memory, 0 to 1.
    forecast : Forecast, optional
        What the whole migration takes, as far as its passes say when this one begins: from the second one on, where a
        pass takes so long that it is worth it.
    """

    number: int
    dirty: int
    remaining: int
    dirty_rate: float = 0.0
    collect_time: float = 0.0
    throttle: int = 0
    expected_downtime: float | None = None
    normal: int = 0
    duplicate: int = 0
    transferred: int = 0
    time: float = 0.0
    zero_time: float = 0.0
    paused: float = 0.0
    cells: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, dtype=np.float32), repr=False)
    forecast: Forecast | None = field(default=None, repr=False)

    @property
    def bandwidth(self) -> float:
        """Bytes a second while the link was used."""
        seconds = self.time - self.zero_time
        return self.transferred / seconds if seconds > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return it in ms, bytes, bytes a second, and numbers of pages."""
        record: dict[str, Any] = {
            "pass": self.number,
            "dirty-pages": self.dirty,
            "remaining": self.remaining,
            "dirty-rate": round(self.dirty_rate),
            "collect-time": _ms(self.collect_time),
        }
        if self.expected_downtime is not None:
            record["expected-downtime"] = _ms(self.expected_downtime)
        if self.throttle:
            record["cpu-throttle-percentage"] = self.throttle
        if self.paused:
            record["paused-time"] = _ms(self.paused)
        if self.forecast is not None:
            record["forecast"] = self.forecast.to_dict()
        return record | {
            "normal": self.normal,
            "duplicate": self.duplicate,
            "transferred": self.transferred,
            "time": _ms(self.time),
            "bandwidth": round(self.bandwidth),
        }


@dataclass(slots=True)
class Report:
    """A migration, while it goes on and after it.

    Times are in seconds here, and in milliseconds in `to_dict`.

    Parameters
    ----------
    page_size : int
        Bytes.
    total : int
        Bytes of guest memory.
    limit : float
        The downtime limit.
    status : str
        QEMU's ``MigrationStatus``: setup, active, device, completed, failed, cancelled.
    setup_time : float
        Until the receiver was ready: its memory allocated and populated.
    total_time : float
        The whole migration's.
    converged : bool
        Whether the guest was paused because the rest fitted into the limit.
    downtime : float, optional
        From the pause at the source to the start at the destination, without `verify_time`.
    verify_time : float, optional
        How long the digests took, with the guest paused. A migration that wants no proof hasn't got it.
    remaining : int
        Bytes that weren't sent.
    transferred, downtime_bytes : int
        Bytes sent; and sent with the guest paused.
    passes : list of Pass
        In order.
    source_sha256, destination_sha256 : str
        The digests, in hexadecimal; empty where there is none.
    handover_unknown : bool
        Whether the destination was told to run without a confirmation: the source stays paused.
    guest_resumed : bool, optional
        Whether the guest was found to run correctly at the destination; None where that is unknown.
    error : str
        Why it failed; programs should not attempt to parse it.
    """

    page_size: int
    total: int
    limit: float
    status: str = "none"
    setup_time: float = 0.0
    total_time: float = 0.0
    converged: bool = False
    downtime: float | None = None
    verify_time: float | None = None
    remaining: int = 0
    transferred: int = 0
    downtime_bytes: int = 0
    passes: list[Pass] = field(default_factory=list)
    source_sha256: str = ""
    destination_sha256: str = ""
    handover_unknown: bool = False
    guest_resumed: bool | None = None
    error: str = ""

    @property
    def normal(self) -> int:
        """Pages sent with their bytes."""
        return sum(one.normal for one in self.passes)

    @property
    def duplicate(self) -> int:
        """Pages sent as zero."""
        return sum(one.duplicate for one in self.passes)

    @property
    def bandwidth(self) -> float:
        """Bytes a second over all passes while the link was used; 0 before the first has ended."""
        seconds = sum(one.time - one.zero_time for one in self.passes)
        return sum(one.transferred for one in self.passes) / seconds if seconds > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return it as ``query-migrate`` does, with the digests and a record a pass; what isn't known is absent.

        Times are in milliseconds, sizes in bytes, rates in bytes a second; ``normal``, ``duplicate`` and
        ``dirty-pages`` are numbers of pages.
        """
        last = self.passes[-1] if self.passes else Pass(0, 0, 0)
        record: dict[str, Any] = {"status": self.status, "total-time": _ms(self.total_time)}
        record["setup-time"] = _ms(self.setup_time)
        if self.downtime is not None:
            record["downtime"] = _ms(self.downtime)
        elif last.expected_downtime is not None:
            record["expected-downtime"] = _ms(last.expected_downtime)
        if self.verify_time is not None:
            record["verify-time"] = _ms(self.verify_time)
        record["downtime-limit"] = _ms(self.limit)
        record["converged"] = self.converged
        if last.throttle:
            record["cpu-throttle-percentage"] = last.throttle
        record["ram"] = self._ram(last)
        if self.source_sha256:
            record["source-sha256"] = self.source_sha256
        if self.destination_sha256:
            record["destination-sha256"] = self.destination_sha256
        if self.handover_unknown:
            record["handover-unknown"] = True
        if self.guest_resumed is not None:
            record["guest-resumed"] = self.guest_resumed
        if self.error:
            record["error-desc"] = self.error
        return record | {"passes": [one.to_dict() for one in self.passes]}

    def _ram(self, last: Pass) -> dict[str, Any]:
        return {
            "transferred": self.transferred,
            "remaining": self.remaining,
            "total": self.total,
            "duplicate": self.duplicate,
            "normal": self.normal,
            "normal-bytes": self.normal * self.page_size,
            "dirty-rate": round(last.dirty_rate),
            "bandwidth": round(self.bandwidth),
            "dirty-sync-count": len(self.passes),
            "page-size": self.page_size,
            "precopy-bytes": self.transferred - self.downtime_bytes,
            "downtime-bytes": self.downtime_bytes,
        }


def folded(bitmaps: list[DirtyBitmap], most: int = _CELLS) -> NDArray[np.float32]:
    """Return the dirty part of each cell of memory, `most` cells or fewer over all slots.

    A cell is a whole number of words of 64 pages, of one slot.

    Examples
    --------
    >>> folded([DirtyBitmap.from_ranges([(0, 96)], 128)]).tolist()
    [1.0, 0.5]
    """
    words = np.array([bitmap.words.size for bitmap in bitmaps])
    per_cell = -(-int(words.sum()) // max(most - len(bitmaps), 1))
    cells = -(-words // per_cell)

    def of_each(values: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.repeat(values, cells)

    # The number of each cell in its slot, and where its words begin.
    number = np.arange(int(cells.sum())) - of_each(cells.cumsum() - cells)
    starts = of_each(words.cumsum() - words) + number * per_cell
    pages = np.minimum((number + 1) * per_cell * 64, of_each(np.array([bitmap.npages for bitmap in bitmaps])))
    counts = np.bitwise_count(np.concatenate([bitmap.words for bitmap in bitmaps])).astype(np.int64)
    parts: NDArray[np.float32] = (np.add.reduceat(counts, starts) / (pages - number * per_cell * 64)).astype(np.float32)
    return parts


def mib(size: float) -> str:
    """Return bytes as a number of MiB, for people: with one decimal, or as many as it takes to be more than 0.

    Examples
    --------
    >>> mib(3 << 20), mib(5 << 30), mib(50 << 10), mib(0)
    ('3.0', '5,120.0', '0.049', '0.0')
    """
    value = size / (1 << 20)
    return f"{value:,.1f}" if value >= 0.05 or not value else f"{value:.2g}"


def mebibytes(size: float) -> str:
    """Return `mib` with its unit.

    Examples
    --------
    >>> mebibytes(3 << 20)
    '3.0 MiB'
    """
    return f"{mib(size)} MiB"


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)
