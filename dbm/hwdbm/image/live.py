"""Live: the stage-2 tables of a machine that runs, tracked where they lie in a file of RAM that others write too.

`open_live` maps the file and copies nothing. ``live.stage2(...)`` is a shared `hwdbm.Stage2` over the table pages
themselves: what its verbs change, the machine's MMU walks over next, and what the MMU marks they find. So two rules of
a hypervisor are the caller's. No page is copied before the guest's TLB was flushed for what a verb re-protected. And
while a verb runs, nothing else links or unlinks tables; hardware may mark leaves at any time.
"""

import mmap
import sys
import weakref
from collections.abc import Callable, Iterator
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwdbm import kernels as kernels_
from hwdbm import pte
from hwdbm.bitmap import DirtyBitmap
from hwdbm.check import flag, instance, integer, uint64s
from hwdbm.check import path as check_path
from hwdbm.errors import GfnError, ImageError
from hwdbm.files import open_regular
from hwdbm.granule import LEAF_LEVELS, Granule
from hwdbm.image.memory import NOWHERE, Array
from hwdbm.image.raw import HEAD, check_raw
from hwdbm.image.registers import Registers
from hwdbm.image.walk import Batch, table_address, walk
from hwdbm.kernels import Notes, Tally
from hwdbm.stage2 import Stage2
from hwdbm.stage2.layout import Layout, any_in
from hwdbm.stage2.leaves import Asks, LeafAt, Leaves, Record

Index = NDArray[np.int64]
Spans = NDArray[np.int64]

_ABOVE_1 = (-1, 0)  # start levels
_ALL = (1 << 64) - 1


class NoTablesError(ImageError):
    """A verb needs a table for what it splits or maps, and `Live.stage2` was given none."""


class LiveTables:
    """RAM that others write, as memory for a walk: a `TableMemory` that reads each descriptor once.

    Parameters
    ----------
    words : (n,) uint64 array
        The RAM.
    ram_base : int
        The physical address of its first byte, a multiple of 4 KiB.
    granule : Granule
        The size of a table.
    """

    def __init__(self, words: Array, ram_base: int, granule: Granule) -> None:
        skipped = -ram_base % granule.page_size
        count = (words.size * 8 - skipped) // granule.page_size
        if count < 1:
            raise ImageError(f"{words.size * 8} bytes of RAM: not one {granule} table fits in")
        first = skipped // 8
        self._rows = words[first : first + count * granule.entries].reshape(count, granule.entries)
        self._first, self._shift = ram_base + skipped, granule.page_shift
        self._base, self._size = ram_base, words.size * 8

    @property
    def capacity(self) -> int:
        """Tables that fit into the RAM."""
        return len(self._rows)

    @property
    def extent(self) -> str:
        """Which memory it is."""
        return f"the RAM's {self._base:#018x}..{self._base + self._size - 1:#018x}"

    def find(self, pa: Array) -> NDArray[np.intp]:
        """Return the number of each table, -1 where it isn't wholly inside."""
        row = (pa - np.uint64(self._first)) >> np.uint64(self._shift)
        return np.where(row < len(self._rows), row.astype(np.intp), NOWHERE)

    def read(self, where: NDArray[np.intp], out: Array) -> Array:
        """Return a copy of the tables `where`: what is checked is what is used."""
        return np.take(self._rows, where, axis=0, out=out[: where.size], mode="clip")


class Live:
    """RAM with stage-2 tables in it, which a machine uses meanwhile. `open_live` makes one of a file.

    Parameters
    ----------
    words : (n,) uint64 array
        The RAM itself: it is changed in place.
    ram_base : int
        The physical address of its first byte.
    registers : Registers
        VTTBR_EL2 and VTCR_EL2: where the tables are, and their shape.

    Raises
    ------
    ImageError
        If the registers can't be.
    """

    def __init__(self, words: Array, ram_base: int, registers: Registers) -> None:
        instance(registers, Registers, "registers")
        uint64s(words, "words")
        if sys.byteorder != "little":
            raise ImageError("descriptors are little-endian, and this machine isn't: it can't change them in place")
        self.words, self.registers = words, registers
        self.ram_base = integer(ram_base, "the RAM's base", high=(1 << 52) - 1, error=ImageError)
        if self.ram_base % 4096:
            raise ImageError(f"the RAM's base {ram_base:#x} isn't a multiple of 4 KiB")
        self.vtcr, self.vttbr = registers.decode()
        self.granule = self.vtcr.granule
        self.memory = LiveTables(words, self.ram_base, self.granule)
        self._given: weakref.WeakSet[LiveStage2] = weakref.WeakSet()

    def __repr__(self) -> str:
        return f"<Live: {self.memory.extent}, {self.granule} tables at {self.vttbr.baddr:#x}>"

    def stage2(
        self,
        base_gfn: int,
        npages: int,
        *,
        kernels: kernels_.Name | None = None,
        tables: Callable[[], int | None] | None = None,
        free: Callable[[int], object] | None = None,
        flush: Callable[[], object] | None = None,
    ) -> "LiveStage2":
        """Return the leaves of a memslot, in place.

        Parameters
        ----------
        base_gfn, npages : int
            The slot, in granules.
        kernels : {"vector", "fused"}, optional
            Kernels for a machine that stands still, with no other writer. The atomic ones by default.
        tables : callable, optional
            Returns the physical address of a page for a table, for verbs that split or map; None in place of an
            address is none that is free.
        free : callable, optional
            Takes back the address of one that isn't used any more.
        flush : callable, optional
            Flushes the guest's TLB: between the break and the make of an entry.

        Raises
        ------
        GfnError
            If the slot has no page, or doesn't fit into 52 address bits.
        ImageError
            If the tables are corrupt, or one is used for two places.
        ValueError
            If there are no such kernels here: without numba there are no atomic ones.
        """
        made = LiveStage2(self, base_gfn, npages, kernels=kernels, tables=tables, free=free, flush=flush)
        self._given.add(made)
        return made

    def refresh(self) -> None:
        """Walk again, for tables that came or went; the Stage2s that `stage2` returned know them then.

        Raises
        ------
        ImageError
            If the tables are corrupt. The Stage2s are as they were.
        """
        given = list(self._given)
        found = [stage2._walked() for stage2 in given]
        for stage2, tables in zip(given, found, strict=True):
            stage2._adopt(tables)

    def dirty(self, base_gfn: int, npages: int) -> DirtyBitmap:
        """Return the dirty pages of a slot, and change nothing. Errors are `stage2`'s."""
        return LiveStage2(self, base_gfn, npages, kernels="vector").dirty()


def open_live(path: str | PathLike[str], *, ram_base: int, vttbr: int, vtcr: int, readonly: bool = False) -> Live:
    """Map a file of RAM that others write, as QEMU's ``memory-backend-file`` with ``share=on`` keeps it.

    Parameters
    ----------
    path : path-like
        The file. It mustn't be truncated while it is mapped.
    ram_base : int
        The physical address of its first byte.
    vttbr, vtcr : int
        The registers: where the tables are, and their shape.
    readonly : bool
        Whether the file is mapped to be read alone; verbs that change leaves raise ValueError then.

    Raises
    ------
    OSError
        If the file can't be opened and mapped.
    ImageError
        If it is known to be something else, or the registers can't be.

    Examples
    --------
    Of a machine that QEMU runs with ``-object memory-backend-file,id=ram,size=2G,mem-path=ram,share=on``::

        live = hwdbm.image.open_live("ram", ram_base=0x4000_0000, vttbr=0x4100_0000, vtcr=0x806A_3558)
        s2 = live.stage2(base_gfn=0x80000, npages=16384)
        dirty = s2.harvest()
        ...  # flush the guest's TLB; only then copy the pages that are dirty
    """
    path, readonly = check_path(path, "path"), flag(readonly, "readonly")
    with open_regular(path) as file:
        check_raw(path, file.read(HEAD))
    with Path(path).open("rb" if readonly else "r+b", buffering=0) as file:
        access = mmap.ACCESS_READ if readonly else mmap.ACCESS_WRITE
        try:
            mapping = mmap.mmap(file.fileno(), 0, access=access)
        except ValueError as error:
            raise ImageError(f"{path} can't be mapped: {error}") from error
    words = np.frombuffer(mapping, dtype=np.uint64, count=len(mapping) // 8)
    return Live(words, ram_base, Registers(vttbr, vtcr))


# --- where the tables are ----------------------------------------------------------------------------------


class _Tables:
    """The tables of one level that map pages of a slot: a visitor of a walk."""

    def __init__(self, layout: Layout, level: int, width: int) -> None:
        self.layout, self.level, self.width = layout, level, width
        self._parts: list[tuple[Index, Array]] = []
        # The slot's entry that each begins with, and where each is; and where those are that map no page of the slot.
        self.first, self.pa = np.array([], dtype=np.int64), np.array([], dtype=np.uint64)
        self.others = self.pa

    def take(self, batch: Batch) -> None:
        shift = np.uint64(self.layout.granule.shift(self.level))
        base = self.layout.base_gfn // self.layout.sizes[self.level]
        self._parts.append(((batch.ipa >> shift).astype(np.int64) - base, batch.pa.copy()))

    def done(self) -> None:
        if self._parts:
            first, pa = (np.concatenate(part) for part in zip(*self._parts, strict=True))
            inside = (first + self.width > 0) & (first < self.layout.count(self.level))
            self.first, self.pa, self.others = first[inside], pa[inside], pa[~inside]
            order = np.argsort(self.first, kind="stable")
            self.first, self.pa = self.first[order], self.pa[order]
            self._check_shared()
        self._parts.clear()

    def _check_shared(self) -> None:
        """Raise if a table of the slot is used in another place too: one bit would stand for two pages."""
        pa, counts = np.unique(self.pa, return_counts=True)
        twice = pa[(counts > 1) | np.isin(pa, self.others)]
        if twice.size:
            raise ImageError(
                f"the level-{self.level} table at {int(twice[0]):#018x} is used in two places: its leaves' dirty bits "
                "can't be told apart"
            )

    def put(self, index: int, pa: int) -> None:
        """Add the table that begins with entry `index`."""
        at = int(np.searchsorted(self.first, index))
        self.first, self.pa = np.insert(self.first, at, index), np.insert(self.pa, at, np.uint64(pa))

    def drop(self, index: int) -> int:
        """Forget the table that begins with entry `index`, and return where it is."""
        at = int(np.searchsorted(self.first, index))
        pa = int(self.pa[at])
        self.first, self.pa = np.delete(self.first, at), np.delete(self.pa, at)
        return pa


class _Entries:
    """A level's entries as an array would have them, gathered from the tables: each read once, and a copy.

    What isn't there is 0, and so is what isn't valid, above level 3.
    """

    def __init__(self, leaves: "_LiveLeaves", level: int) -> None:
        self._leaves, self._level = leaves, level
        self.size = leaves.layout.count(level)

    def __getitem__(self, at: Any) -> Any:
        index = np.arange(*at.indices(self.size), dtype=np.int64) if isinstance(at, slice) else np.asarray(at)
        return self._leaves.read(self._level, index.ravel()).reshape(index.shape)[()]


class _LiveLeaves(Leaves):
    """Leaves over table pages in RAM. Entries are numbered as a flat array of the slot's would have them."""

    def __init__(self, live: Live, layout: Layout, kernels: kernels_.Kernels, room: "_Room") -> None:
        super().__init__(Layout(1, 0, layout.granule), kernels)
        self.layout, self._live, self._room = layout, live, room
        self.level = {level: _Entries(self, level) for level in LEAF_LEVELS}  # type: ignore[misc]
        self.start, self._ram = live.vtcr.start_level, live.words
        self.tables: dict[int, _Tables] = {}

    # --- the tables ----------------------------------------------------------------------------------------

    def walked(self) -> dict[int, _Tables]:
        """Walk and check all tables, and return those of the slot by level."""
        vtcr, entries = self._live.vtcr, self.layout.granule.entries
        found = {}
        for level in range(max(self.start, 0), 4):
            found[level] = _Tables(
                self.layout, level, min(vtcr.root_entries, entries) if level == self.start else entries
            )
        large = self._live.registers.large_blocks(vtcr)
        for batch in walk(self._live.memory, vtcr, self._live.vttbr.baddr, large_blocks=large):
            if batch.level in found:
                found[batch.level].take(batch)
        for tables in found.values():
            tables.done()
        return found

    def _word(self, pa: Any) -> Any:
        return (pa.astype(np.int64) if isinstance(pa, np.ndarray) else pa) - self._live.ram_base >> 3

    def where(self, level: int, index: Index) -> Index:
        """Return the word of RAM in which each entry of `level` lies, `NOWHERE` where there is no table."""
        tables = self.tables.get(level)
        if tables is None or not tables.first.size:
            return np.full(index.size, NOWHERE, dtype=np.int64)
        at = np.searchsorted(tables.first, index, side="right") - 1  # before the first one it is the last, too far on
        offset = index - tables.first[at]
        there = (offset >= 0) & (offset < tables.width)
        return np.where(there, self._word(tables.pa[at]) + offset, NOWHERE)

    def read(self, level: int, index: Index) -> Array:
        """Return the entries `index` of `level`."""
        if level < self.start:  # there is nothing above the start level, and something below it
            return np.full(index.size, pte.TABLE, dtype=np.uint64)
        where = self.where(level, index)
        if level == 3:  # a table that isn't linked any more maps nothing
            where[~pte.table(2)(self.read(2, self.layout.index(2, index)))] = NOWHERE
        missing = where == NOWHERE
        found = np.where(missing, np.uint64(0), self._ram[where])
        if level < 3:
            found[found & pte.VALID == 0] = 0
        if level == 1 and self.start in _ABOVE_1:
            found[missing] = self._under_level_0(index[missing])
        return found

    def _under_level_0(self, index: Index) -> Array:
        """Return the level-1 blocks that a level-0 block is worth, 0 where there is none."""
        pages = self.layout.span(1, index)[:, 0]
        block = self.read(0, self.layout.index(0, pages))
        size = np.uint64((1 << self.layout.granule.shift(0)) - (1 << self.layout.granule.shift(1)))
        gpa = (pages + self.layout.base_gfn).astype(np.uint64) << np.uint64(self.layout.granule.page_shift)
        return np.where(pte.leaf(0)(block), block & ~size | gpa & size, np.uint64(0))

    def fresh(self, lo: int, hi: int) -> None:
        """Check that the tables of the pages [lo, hi) are those that are known.

        Raises
        ------
        ImageError
            If there are others: what they map would be missed.
        """
        for level in range(max(self.start, 0), 3):
            where = self.layout.entries(level, lo, hi)
            index = np.arange(where.start, where.stop, dtype=np.int64)
            (tables,) = pte.table(level)(entries := self.read(level, index)).nonzero()
            found = self._address(entries[tables])
            wrong = self.where(level + 1, self.layout.first_child(level, index[tables])) != self._word(found)
            if wrong.any():
                at = int(np.argmax(wrong))
                gfn = self.layout.base_gfn + max(int(self.layout.span(level, index[tables])[at, 0]), 0)
                raise ImageError(
                    f"gfn {gfn:#x}: the table at {int(found[at]):#018x} wasn't there when the tables were walked: "
                    "refresh() finds what has changed since"
                )

    def _address(self, desc: Array) -> Array:
        return table_address(self._live.vtcr, desc)

    # --- reading -------------------------------------------------------------------------------------------

    def scan(self, match: Asks, lo: int, hi: int, out: DirtyBitmap) -> int:
        read = self._scan_blocks(match, lo, hi, out)
        runs = self.table_runs(lo, hi)
        for part in _apart(runs):
            self.kernels.scan(self._ram, part, match(3), out.words)
        return read + int((runs[:, 1] - runs[:, 0]).sum())

    def find(self, level: int, match: pte.Match, lo: int, hi: int) -> Index:
        self.fresh(lo, hi)
        return super().find(level, match, lo, hi)

    def leaf_at(self, pages: Index) -> LeafAt:
        self.fresh(0, self.layout.npages)
        return super().leaf_at(pages)

    def tables_alone(self, lo: int, hi: int) -> int | None:
        self.fresh(lo, hi)
        return super().tables_alone(lo, hi)

    def table_runs(self, lo: int, hi: int) -> Spans:
        """Return the level-3 entries of [lo, hi) that are under tables, as rows (word, word after, page)."""
        self.fresh(lo, hi)
        tables = self.tables[3]
        first, last = np.searchsorted(tables.first, [lo - tables.width, hi])
        begins, word = tables.first[first:last], self._word(tables.pa[first:last])
        linked = pte.table(2)(self.read(2, self.layout.index(2, begins)))  # others map nothing any more
        begins, word = begins[linked], word[linked]
        start = np.maximum(begins, lo)
        stop = np.minimum(begins + tables.width, hi)
        runs = np.stack([word + start - begins, word + stop - begins, start], axis=1)[start < stop]
        if not len(runs):
            return runs
        # Tables that lie one after the other are one run.
        joins = (runs[1:, 0] == runs[:-1, 1]) & (runs[1:, 2] - runs[:-1, 2] == runs[1:, 0] - runs[:-1, 0])
        begins, ends = np.append(True, ~joins), np.append(~joins, True)
        return np.stack([runs[begins, 0], runs[ends, 1], runs[begins, 2]], axis=1)

    # --- changing ------------------------------------------------------------------------------------------

    def update_blocks(
        self, rule: Callable[[int], pte.Update], lo: int, hi: int, record: Record, mask: DirtyBitmap | None = None
    ) -> Tally:
        self.fresh(lo, hi)
        self._whole(rule, lo, hi, mask)
        return super().update_blocks(rule, lo, hi, record, mask)

    def _whole(self, rule: Callable[[int], pte.Update], lo: int, hi: int, mask: DirtyBitmap | None = None) -> None:
        """Raise if a rule would change a block that reaches beyond the slot: others' pages would be forgotten.

        Bit 0 of a mask is `lo`; a block of which it has no page isn't changed.
        """
        for level in range(max(self.start, 0), 3):
            for page in (lo, hi - 1):
                index = self.layout.index(level, page)
                start, stop = self.layout.span(level, index)
                if mask is not None:
                    inside = np.array([[max(start, lo), min(stop, hi)]]) - lo
                    if not any_in(mask.words, inside).any():
                        continue
                if start < 0 or stop > self.layout.npages:
                    desc = self.read(level, np.array([index])).item()
                    if pte.leaf(level)(desc) and rule(level).where(desc):
                        gfn = self.layout.base_gfn
                        raise ImageError(
                            f"gfn {gfn + start:#x}..{gfn + stop - 1:#x} is one block, {pte.describe(desc, level)}, and "
                            f"the slot is gfn {gfn:#x}..{gfn + self.layout.npages - 1:#x}: cleaning it would "
                            "forget what it says of the others"
                        )

    def update_pages(self, update: pte.Update, lo: int, hi: int, record: Record) -> Tally:
        tally, out, also = Tally(), record.out.words, record.also.words
        for part in _apart(self.table_runs(lo, hi)):
            tally += self.kernels.rewrite(self._ram, part, update, out, also, record.notes(3))
        return tally

    def update_within(self, update: pte.Update, mask: DirtyBitmap, first: int, record: Record) -> Tally:
        lo, hi = first, first + mask.npages
        runs, words, tally = self.table_runs(lo, hi), slice(lo >> 6, (lo >> 6) + mask.words.size), Tally()
        runs[:, 2] -= lo
        for part in _apart(runs):
            tally += self.kernels.rewrite_within(
                self._ram, part, update, mask.words, record.out.words[words], record.also.words[words], record.notes(3)
            )
        return tally

    update_all = Leaves.update_found

    def update_at(self, level: int, index: Index, update: pte.Update, record: Record, lo: int, hi: int) -> int:
        changed, words = 0, self._words(record)
        for entries, first, where in self._by_table(level, index):
            numbers, place = index[where] - first, self._place(level, lo, hi, first)
            changed += self.kernels.rewrite_at(entries, numbers, update, place, *words, record.notes(level))
        if level == 1 and self.start in _ABOVE_1:
            rest = index[self.where(1, index) == NOWHERE]
            above = np.unique(self.layout.index(0, self.layout.span(1, rest)[:, 0]))
            changed += self.update_at(0, above, update, record, lo, hi)
        return changed

    def set_bits(self, level: int, index: Index, bits: Array) -> None:
        for entries, first, where in self._by_table(level, index):
            self.kernels.set_at(entries, index[where] - first, bits[where])

    def _swap(self, level: int, index: Index, values: Array, record: Record) -> None:
        self._swap_noted(level, index, values, record, record.notes(level))

    def _swap_noted(self, level: int, index: Index, values: Array, record: Record, notes: Notes) -> None:
        for entries, first, where in self._by_table(level, index):
            place, some = self._place(level, 0, self.layout.npages, first), values[where]
            try:
                self.kernels.exchange_at(entries, index[where] - first, some, place, *self._words(record), notes)
            finally:
                values[where] = some

    def _by_table(self, level: int, index: Index) -> Iterator[tuple[Array, int, Index]]:
        """Yield for each table its entries, the number of the first, and which of `index` it has."""
        tables = self.tables.get(level)
        if tables is None or not index.size or not tables.first.size:
            return
        at = np.searchsorted(tables.first, index, side="right") - 1  # as in `where`
        offset = index - tables.first[at]
        there = (offset >= 0) & (offset < tables.width)
        for number in np.unique(at[there]).tolist():
            word = self._word(int(tables.pa[number]))
            (where,) = (there & (at == number)).nonzero()
            yield self._ram[word : word + tables.width], int(tables.first[number]), where

    # --- structure -----------------------------------------------------------------------------------------

    def remove(self, lo: int, hi: int, record: Record) -> None:
        """Clear the leaves of [lo, hi); tables stay, empty."""
        self.update(_gone, lo, hi, record)

    def split(self, level: int, index: Index, record: Record) -> None:
        """Break the blocks `index` of `level`, and make tables of leaves of the next level, which are clean."""
        if not index.size:
            return
        if (self.where(level, index) == NOWHERE).any():
            raise ImageError("a level-0 block isn't split in place")
        pages = self.extent(level, index)
        self._whole(_gone, int(pages.min()), int(pages.max()))
        room = self._room.take(index.size)
        values = np.zeros(index.size, dtype=np.uint64)
        try:
            self._swap(level, index, values, record)  # a break
            self._room.flush()
        except BaseException:
            self._swap(level, index, values, record)
            self._room.give(room)
            raise
        made = np.zeros(index.size, dtype=np.uint64)
        for at, (entry, block, page) in enumerate(zip(index.tolist(), values.tolist(), room, strict=True)):
            word = self._word(page)
            self._ram[word : word + self.layout.granule.entries] = self._children(level, block)
            made[at] = pte.make_table(page, self._live.vtcr.address_bits)
            self.tables[level + 1].put(self.layout.first_child(level, entry), page)
        self.exchange(level, index, made, record)  # and a make

    def _children(self, level: int, block: int) -> Array:
        granule = self.layout.granule
        drop = pte.TABLE | pte.CONTIGUOUS | ((1 << granule.shift(level)) - granule.page_size) & pte.ADDRESS
        parent = pte.clean(level)(block) & ~drop & _ALL | pte.leaf(level + 1).value
        number = np.arange(granule.entries, dtype=np.uint64)
        children: Array = number << np.uint64(granule.shift(level + 1)) | np.uint64(parent)
        return children

    def collapse(self, level: int, index: Index, record: Record) -> None:
        """Break the tables `index`, which are collapsible, and make clean blocks of them."""
        if not index.size:
            return
        tables = np.zeros(index.size, dtype=np.uint64)
        try:
            self.exchange_back(level, index, tables, record)
            self._room.flush()
        except BaseException:
            self.exchange_back(level, index, tables, record)
            raise
        rows = self._rows(level, index)
        values = np.zeros(rows.size, dtype=np.uint64)
        self._swap(level + 1, rows.ravel(), values, record)
        leaves = values.reshape(rows.shape)
        young = np.bitwise_or.reduce(leaves, axis=1) & np.uint64(pte.AF)
        first = pte.clean(level + 1)(leaves[:, 0]) & np.uint64(~(pte.TABLE | pte.CONTIGUOUS) & _ALL)
        self.exchange(level, index, first | np.uint64(pte.leaf(level).value) | young, record)
        self._room.give([self.tables[level + 1].drop(self.layout.first_child(level, i)) for i in index.tolist()])

    def take_apart(self, level: int, index: Index, record: Record) -> None:
        """Break the leaves `index`, and make them again, clean and without the contiguous bit."""
        values = np.zeros(index.size, dtype=np.uint64)
        try:
            self._swap(level, index, values, record)
            self._room.flush()
        finally:
            (gone,) = values.nonzero()
            made = pte.clean(level)(values[gone]) & np.uint64(~pte.CONTIGUOUS & _ALL)
            self.exchange(level, index[gone], made, record)

    def exchange_back(self, level: int, index: Index, values: Array, record: Record) -> None:
        """Swap entries with `values`, where they aren't leaves: nothing is noted of them."""
        self._swap_noted(level, index, values, record, Notes(None, None))

    def put(self, level: int, lo: int, hi: int, leaves: Callable[[int, int], Array], record: Record) -> None:
        """Break what maps [lo, hi), and make leaves of `level`. No block may straddle its ends."""
        self.remove(lo, hi, record)
        where = self.layout.entries(level, lo, hi)
        index = np.arange(where.start, where.stop, dtype=np.int64)
        self._drop_tables(level, index, record)
        self._room.flush()
        for above in range(max(self.start, 1), level):
            touched = self.layout.entries(above, lo, hi)
            entries = np.arange(touched.start, touched.stop, dtype=np.int64)
            self._link(above, entries[self.read(above, entries) & pte.VALID == 0], record)
        self.exchange(level, index, leaves(0, index.size), record)

    def put_at(self, level: int, index: Index, leaves: Array, record: Record) -> None:
        for above in range(max(self.start, 1), level):
            entries = np.unique(self.layout.index(above, self.layout.span(level, index)[:, 0]))
            self._link(above, entries[self.read(above, entries) & pte.VALID == 0], record)
        self.exchange(level, index, leaves, record)

    def _link(self, level: int, index: Index, record: Record) -> None:
        """Put empty tables under the entries `index`, which are invalid."""
        if not index.size:
            return
        pages = self._room.take(index.size)
        for entry, page in zip(index.tolist(), pages, strict=True):
            word = self._word(page)
            self._ram[word : word + self.layout.granule.entries] = 0
            self.tables[level + 1].put(self.layout.first_child(level, entry), page)
        tables = pte.make_table(np.array(pages, dtype=np.uint64), self._live.vtcr.address_bits)
        self.exchange(level, index, tables, record)

    def _drop_tables(self, level: int, index: Index, record: Record) -> None:
        """Unlink the empty tables under entries that are to be blocks: all of such an entry is the slot's."""
        if level == 3:
            return
        index = index[pte.table(level)(self.read(level, index))]
        self._drop_tables(level + 1, self._rows(level, index).ravel(), record)
        self.exchange_back(level, index, np.zeros(index.size, dtype=np.uint64), record)
        self._room.give([self.tables[level + 1].drop(self.layout.first_child(level, i)) for i in index.tolist()])

    # --- checking ------------------------------------------------------------------------------------------

    def verify(self) -> None:
        self.fresh(0, self.layout.npages)
        twin = Leaves(self.layout)
        for level, entries in twin.level.items():
            entries[:] = self.level[level][:]
        twin.verify()


def _gone(level: int) -> pte.Update:
    return pte.Update(pte.leaf(level), clears=_ALL)


def _apart(runs: Spans) -> "list[Spans]":
    """Return the runs in parts, cut where two are as far apart in RAM as they are in the bitmap.

    A kernel that reads what lies between would read memory that is no table.
    """
    if not len(runs):
        return []
    cut = np.flatnonzero(runs[1:, 0] - runs[:-1, 0] == runs[1:, 2] - runs[:-1, 2]) + 1
    return np.split(runs, cut)


class _Room:
    """Where tables come from and go to, and how the TLB is flushed between a break and a make."""

    def __init__(
        self,
        take: Callable[[], int | None] | None,
        give: Callable[[int], object] | None,
        flush: Callable[[], object] | None,
    ) -> None:
        self._take, self._give, self._flush = take, give, flush

    def take(self, count: int) -> list[int]:
        """Return the addresses of so many pages for tables, or raise `NoTablesError` and keep none."""
        if self._take is None or self._flush is None:
            raise NoTablesError(
                "a block is split, and a table linked, with a page for it and a flush of the guest's TLB: give "
                "stage2(..., tables=..., flush=...)"
            )
        pages: list[int] = []
        try:
            pages.extend(islice(iter(self._take, None), count))
        except BaseException:
            self.give(pages)
            raise
        if len(pages) < count:
            self.give(pages)
            raise NoTablesError(f"{count} tables are needed, and there are {len(pages)}")
        return pages

    def give(self, pages: list[int]) -> None:
        """Take pages back that aren't used any more."""
        if self._give is not None:
            for page in pages:
                self._give(page)

    def flush(self) -> None:
        """Flush the guest's TLB."""
        if self._flush is not None:
            self._flush()


class LiveStage2(Stage2):
    """The leaves of a memslot in the tables of a machine that runs; `Live.stage2` makes it.

    Its verbs are those of `hwdbm.Stage2` with ``shared=True``. What differs: `level` returns a copy that can't be
    written; `unmap` leaves empty tables where they are; `split`, `collapse` and `map` break and make, and need
    pages for tables and a flush. A block that reaches beyond the slot isn't changed: ImageError. Where tables came
    that weren't there when they were walked, every verb raises ImageError until `Live.refresh`: it misses nothing.
    """

    def __init__(
        self,
        live: Live,
        base_gfn: int,
        npages: int,
        *,
        kernels: kernels_.Name | None = None,
        tables: Callable[[], int | None] | None = None,
        free: Callable[[int], object] | None = None,
        flush: Callable[[], object] | None = None,
    ) -> None:
        base_gfn, npages = integer(base_gfn, "base_gfn", None), integer(npages, "npages", None)
        self.layout = Layout(npages, base_gfn, live.granule)
        if base_gfn + npages << live.granule.page_shift > 1 << live.vtcr.ipa_bits:
            raise GfnError(
                f"gfn {base_gfn:#x} and {npages} pages reach beyond the {live.vtcr.ipa_bits} bits of the IPA space"
            )
        for name, given in (("tables", tables), ("free", free), ("flush", flush)):
            if given is not None:
                instance(given, Callable, name)
        self.shared = kernels is None
        implementation = kernels_.shared() if kernels is None else kernels_.named(kernels)
        self._live = _LiveLeaves(live, self.layout, implementation, _Room(tables, free, flush))
        self._begin(self._live)
        self._live.tables = self._walked()
        self.contiguous = self._has_runs()

    def _has_runs(self) -> bool:
        return any(
            self._live.find(level, pte.leaf(level).also(ones=pte.CONTIGUOUS), 0, self.npages).size
            for level in LEAF_LEVELS
        )

    def _walked(self) -> dict[int, _Tables]:
        return self._live.walked()

    def _adopt(self, tables: dict[int, _Tables]) -> None:
        with self._lock:
            self._live.tables = tables
            self.contiguous = self._has_runs()

    def level(self, level: int) -> Array:
        """Return a copy of the entries of `level`, as a flat array of the slot's would have them; not to be written.

        Raises
        ------
        ValueError
            For another level than 1, 2 and 3.
        """
        level = integer(level, "level", None)
        if level not in LEAF_LEVELS:
            raise ValueError(f"leaves are at levels 1, 2 and 3, not {level}")
        entries: Array = self._leaves.level[level][:]
        entries.flags.writeable = False
        return entries

    def mapped(self, first: int, npages: int) -> bool:
        """Return whether any page of a part has a leaf."""
        lo, hi = self._pages(first, npages)
        leaves = DirtyBitmap(self.npages)
        self._leaves.scan(pte.leaf, lo, hi, leaves)
        return leaves.any()

    def copy(self) -> Stage2:  # type: ignore[override]
        """Return a Stage2 in memory of its own with the leaves as they are now, saved pages and host flags."""
        twin = Stage2(self.npages, self.base_gfn, self.granule, contiguous=self.contiguous)
        for level in LEAF_LEVELS:
            twin.load(level, [0], self.level(level)[None])
        twin.saved.span = self.saved.span
        twin.saved.bitmap.words[:] = self.saved.bitmap.words
        twin.host_dirty.words[:] = self.host_dirty.words
        return twin
