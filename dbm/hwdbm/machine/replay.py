"""Replay: a workload that dirties what someone recorded, a bitmap an interval."""

from base64 import b64decode, b64encode
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from zlib import compress, decompressobj, error

import numpy as np
from numpy.typing import NDArray

from hwdbm.bitmap import DirtyBitmap, word_count
from hwdbm.check import instances, real
from hwdbm.machine.workload import Workload

Numbers = NDArray[np.uint64]

_LEAST = 1e-9  # seconds of an interval
_MOST = 1 << 28  # bytes of bitmaps that a state may carry: 8 TiB of 4 KiB pages, recorded once


@dataclass(frozen=True)
class Replay(Workload):
    """A recorded sequence of dirty bitmaps: in each interval a store to each page of its bitmap, then from the first.

    Parameters
    ----------
    bitmaps : tuple of DirtyBitmap
        Bitmaps of the writable memory's pages, or of fewer; at least one page is dirty in all.
    interval : float
        Seconds that each bitmap covers.

    Examples
    --------
    >>> replay = Replay(bitmaps=[DirtyBitmap.from_pages([1, 5], 8), DirtyBitmap.from_pages([7], 8)], interval=2.0)
    >>> replay.offsets(0, 4, 8 * 4096) // 4096
    array([1, 5, 7, 1])
    >>> [replay.quota(seconds) for seconds in (1.0, 2.0, 4.0)]
    [1, 2, 3]
    """

    name = "replay"
    bitmaps: Iterable[DirtyBitmap] = ()
    interval: float = 1.0
    _recorded: NDArray[np.int64] = field(init=False, repr=False, compare=False)
    _ends: NDArray[np.int64] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        bitmaps = instances(self.bitmaps, DirtyBitmap, "bitmaps")
        pages = [bitmap.pages() for bitmap in bitmaps]
        if not sum(each.size for each in pages):
            raise ValueError(f"there is nothing to replay: no page is dirty in {len(bitmaps)} bitmaps")
        self._set("interval", real(self.interval, "interval", _LEAST, 1e9))
        object.__setattr__(self, "bitmaps", bitmaps)
        object.__setattr__(self, "_recorded", np.concatenate(pages))
        object.__setattr__(self, "_ends", np.cumsum([0, *(each.size for each in pages)]))

    def _pages(self, numbers: Numbers, npages: int) -> NDArray[np.int64]:
        if int(self._recorded.max()) >= npages:
            raise ValueError(f"page {int(self._recorded.max())} was recorded, and the guest has {npages}")
        return self._recorded[(numbers % np.uint64(self._recorded.size)).astype(np.int64)]

    def quota(self, seconds: float) -> int | None:
        """Return how many stores are due when the guest has run for some seconds."""
        seconds = real(seconds, "seconds", 0.0, 1e9)
        rounds, rest = divmod(seconds / self.interval, self._ends.size - 1)
        at, part = divmod(rest, 1.0)
        start, stop = self._ends[int(at)], self._ends[int(at) + 1]
        return int(rounds) * self._recorded.size + int(start + part * (stop - start))

    def to_dict(self) -> dict[str, Any]:
        """Return what `from_dict` makes an equal workload of; JSON can hold it."""
        packed = [[each.npages, b64encode(compress(each.to_bytes())).decode()] for each in self.bitmaps]
        return {"name": self.name, "seed": self.seed, "interval": self.interval, "bitmaps": packed}

    @classmethod
    def _from(cls, given: Mapping[str, Any]) -> "Replay":
        options = dict(given)
        packed = options.pop("bitmaps", ())
        if sum(8 * word_count(int(npages)) for npages, _ in packed) > _MOST:
            raise ValueError(f"a recording has {_MOST} bytes of bitmaps at most")
        bitmaps = tuple(DirtyBitmap.from_bytes(_unpacked(raw, npages), npages) for npages, raw in packed)
        return cls(**options, bitmaps=bitmaps)


def _unpacked(raw: str, npages: int) -> bytes:
    """Return the bytes of a bitmap, and no more of what was compressed: it may come from anywhere."""
    try:
        return decompressobj().decompress(b64decode(raw), 8 * word_count(npages))
    except error as reason:
        raise ValueError(f"not a recorded bitmap: {reason}") from None
