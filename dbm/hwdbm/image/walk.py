"""The walk: stage-2 tables level by level, a batch of tables at a time.

One walk serves everything: filling a `hwdbm.Stage2`, counting, finding contiguous runs are small
visitors of its batches. All of the tree is walked and checked, whatever slots are asked for: tables
that are corrupt in one place aren't to be trusted in another.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from hwdbm import pte
from hwdbm.errors import ImageError
from hwdbm.image.memory import Array, TableMemory
from hwdbm.vtcr import Vtcr

_BATCH = 1 << 20  # bytes of tables looked at together, so that they stay in the cache
_SPARE = 1 << 26  # bytes of tables that may be read over again, where an image is small
_AGAIN = 4  # times that each table of a full image may be read
_BELOW_SH = (1 << 50) - 1


@dataclass(frozen=True, slots=True)
class Batch:
    """Some tables of one level, in the order of the addresses that they translate.

    Parameters
    ----------
    level : int
        -1 to 3.
    pa : (n,) uint64 array
        The physical address of each table, in bytes.
    ipa : (n,) uint64 array
        The guest physical address that each table's first entry translates, in bytes.
    entries : (n, entries) uint64 array
        The descriptors: not to be written, and to be used before the next batch is asked for. What
        a start level of less than a table doesn't have is zero.
    """

    level: int
    pa: Array
    ipa: Array
    entries: Array


@dataclass(frozen=True, slots=True)
class _Frontier:
    """The tables of one level: as in a batch, and where the memory has them."""

    pa: Array
    ipa: Array
    where: NDArray[np.intp]


def walk(memory: TableMemory, vtcr: Vtcr, root: int, *, large_blocks: bool = False) -> Iterator[Batch]:
    """Yield all tables that can be reached, from the start level down to level 3.

    Parameters
    ----------
    memory : TableMemory
        The memory that holds the tables.
    vtcr : Vtcr
        The shape of the tables.
    root : int
        The physical address of the start level: `hwdbm.vtcr.Vttbr.baddr`.
    large_blocks : bool
        Whether there are blocks at the levels that 52-bit addresses add
        (`hwdbm.Granule.block_levels`).

    Raises
    ------
    ImageError
        At the first entry that can't be: with a reserved encoding, with an address beyond
        VTCR_EL2.PS or outside of the image, or leading back to a table of a level above. Two
        entries of a level may point to the same table, but not so many that the walk would come
        to more than four times the tables that the image can hold. Invalid entries may hold
        anything.

    Notes
    -----
    Temporaries are a few times 1 MiB; for each table of a level 24 bytes come on top.
    """
    return _Walk(memory, vtcr, root, large_blocks).batches()


@overload
def table_address(vtcr: Vtcr, desc: int) -> int: ...
@overload
def table_address(vtcr: Vtcr, desc: Array) -> Array: ...
def table_address(vtcr: Vtcr, desc: int | Array) -> int | Array:
    """Return the physical address in a table descriptor, or in each of some."""
    found: Any = pte.output_address(desc, vtcr.granule.page_shift, vtcr.address_bits)
    # With DS set, bits 51:50 lie where SH was. Where addresses have fewer bits, emulators
    # don't look there, and software may have left SH in place: it isn't taken for an address.
    address: int | Array = found if vtcr.pa_bits == 52 else found & _BELOW_SH
    return address


class _Walk:
    def __init__(self, memory: TableMemory, vtcr: Vtcr, root: int, large_blocks: bool) -> None:
        self.memory, self.vtcr, self.root = memory, vtcr, root
        self.granule = vtcr.granule
        self.block_levels = self.granule.block_levels(large=large_blocks)
        self.planned = 0  # tables visited, and to be visited
        self.limit = _AGAIN * memory.capacity + (_SPARE >> self.granule.page_shift)
        self.above = np.array([], dtype=np.uint64)  # the tables of the levels so far, sorted

    def batches(self) -> Iterator[Batch]:
        frontier = self._start()
        for level in range(self.vtcr.start_level, 4):
            if not frontier.pa.size:
                return
            below = []
            if level < 3:
                self.above = np.union1d(self.above, frontier.pa)
            for batch in self._read(frontier, level):
                self._check(batch)
                if level < 3:
                    below.append(self._children(batch))
                yield batch
            if level < 3:
                frontier = _Frontier(
                    *(np.concatenate([getattr(part, name) for part in below]) for name in ("pa", "ipa", "where"))
                )

    # --- reading ------------------------------------------------------------------------------

    def _start(self) -> _Frontier:
        page, index = self.granule.page_size, np.arange(self.vtcr.root_tables, dtype=np.uint64)
        pa = np.uint64(self.root & -page) + index * np.uint64(page)
        where = self.memory.find(pa)
        if (where < 0).any():
            missing = int(np.argmax(where < 0))
            raise ImageError(
                f"VTTBR_EL2.BADDR = {self.root:#018x}: table {missing + 1} of the {pa.size} of "
                f"level {self.vtcr.start_level}, at {int(pa[missing]):#018x}, is not in "
                f"{self.memory.extent}"
            )
        self.planned = pa.size
        span = self.granule.entries << self.granule.shift(self.vtcr.start_level)
        ipa = np.array([i * span for i in range(pa.size)], dtype=np.uint64)
        return _Frontier(pa, ipa, where)

    def _read(self, frontier: _Frontier, level: int) -> Iterator[Batch]:
        step = _BATCH >> self.granule.page_shift
        out = np.empty((min(step, frontier.pa.size), self.granule.entries), dtype=np.uint64)
        for start in range(0, frontier.pa.size, step):
            part = slice(start, start + step)
            pa = frontier.pa[part]
            entries = self.memory.read(frontier.where[part], out)
            if level == self.vtcr.start_level and self.vtcr.root_entries < self.granule.entries:
                first = (self.root - pa.item()) // 8
                pa = np.array([self.root], dtype=np.uint64)
                few = entries[:, first : first + self.vtcr.root_entries]
                entries = np.zeros_like(entries)
                entries[:, : self.vtcr.root_entries] = few
            yield Batch(level, pa, frontier.ipa[part], entries)

    # --- checking -----------------------------------------------------------------------------

    def _check(self, batch: Batch) -> None:
        if batch.level not in (*self.block_levels, 3):
            self._check_reserved(batch, "this level has no blocks")
        elif batch.level == 3:
            self._check_reserved(batch, "01 is reserved at level 3")
        # Addresses are made of bits: if all entries' bits together aren't too high, none is.
        if table_address(self.vtcr, int(np.bitwise_or.reduce(batch.entries, axis=None))) >> self.vtcr.pa_bits:
            high = table_address(self.vtcr, batch.entries) >> np.uint64(self.vtcr.pa_bits) != 0
            high &= batch.entries & pte.VALID != 0
            if high.any():
                at = int(np.argmax(high))
                pa = table_address(self.vtcr, int(batch.entries.flat[at]))
                raise self._error(batch, at, f"its address {pa:#x} is beyond the {self.vtcr.pa_bits} bits of PS")

    def _check_reserved(self, batch: Batch, why: str) -> None:
        reserved = (batch.entries & pte.TABLE) == pte.VALID
        if reserved.any():
            if batch.level in self.granule.block_levels(large=True):
                why += " without 52-bit addresses"
            raise self._error(batch, int(np.argmax(reserved)), f"{why} ({self.granule} granule)")

    def _children(self, batch: Batch) -> _Frontier:
        at = np.flatnonzero((batch.entries & pte.TABLE) == pte.TABLE)
        pa = table_address(self.vtcr, batch.entries.ravel()[at])
        where = self.memory.find(pa)
        outside = where < 0
        if outside.any():
            i = int(np.argmax(outside))
            raise self._error(batch, int(at[i]), f"no table at {int(pa[i]):#018x} in {self.memory.extent}")
        nearest = np.minimum(np.searchsorted(self.above, pa), self.above.size - 1)
        loop = self.above[nearest] == pa
        if loop.any():
            i = int(np.argmax(loop))
            raise self._error(
                batch,
                int(at[i]),
                f"a loop: the table at {int(pa[i]):#018x} is one of level {batch.level} or above",
            )
        self.planned += at.size
        if self.planned > self.limit:
            raise self._error(
                batch,
                int(at[-1]),
                f"by here the tables lead to {self.planned} others, and to the same ones again and "
                f"again: there is room for {self.memory.capacity} in {self.memory.extent}",
            )
        row, column = np.divmod(at, self.granule.entries)
        shift = np.uint64(self.granule.shift(batch.level))
        return _Frontier(pa, batch.ipa[row] + (column.astype(np.uint64) << shift), where)

    def _error(self, batch: Batch, at: int, what: str) -> ImageError:
        """Return the error that names entry `at` of the batch, counted over all of its tables."""
        row, column = divmod(at, self.granule.entries)
        pa = int(batch.pa[row]) + 8 * column
        ipa = int(batch.ipa[row]) + (column << self.granule.shift(batch.level))
        desc = pte.describe(int(batch.entries[row, column]), batch.level)
        return ImageError(f"level-{batch.level} entry at {pa:#018x}, for IPA {ipa:#018x}, is {desc}: {what}")
