"""The reference: what every verb of `hwdbm.Stage2` must do, one descriptor at a time, with Python ints.

It is slow on purpose. It walks from level 1 down as the MMU does, decides on one descriptor that it read once, and
knows nothing of kernels, words, runs or spans: of the package it uses only the state table in `hwdbm.pte`. Each
function here is the specification of the method of the same name, has the same arguments after the Stage2, returns
the same, and leaves the same descriptors, saved pages and host flags behind.

`guest_write` and `guest_read` are what the hardware does to a descriptor (Arm ARM DDI0487, D8.5).
"""

from collections.abc import Iterator
from enum import Enum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hwdbm import pte
from hwdbm.bitmap import DirtyBitmap
from hwdbm.check import flag, instance, integer, integers, separate, uint64s
from hwdbm.errors import BitmapError, GfnError
from hwdbm.pte import State
from hwdbm.stage2 import Stage2

__all__ = [
    "Access",
    "clean",
    "clear_dbm",
    "collapse",
    "dirty",
    "disable_dbm",
    "enable_dbm",
    "guest_read",
    "guest_write",
    "harvest",
    "map",
    "mkold",
    "mkyoung",
    "set_dbm",
    "split",
    "test_clear_young",
    "unmap",
    "writable",
    "wrprotect",
    "young",
]


class Leaf(NamedTuple):
    """A leaf as a walk found it: its place, the descriptor as it was read, its state and its pages in the slot."""

    level: int
    entry: int
    desc: int
    state: State
    pages: range


TRACKED = (State.WRITABLE_CLEAN, State.WRITABLE_DIRTY)
LEAVES = (State.READ_ONLY, State.UNTRACKED, *TRACKED)


# --- walking --------------------------------------------------------------------------------------------------


def _index(s2: Stage2, level: int, page: int) -> int:
    size = s2.granule.pages_per_entry(level)
    return (s2.base_gfn + page) // size - s2.base_gfn // size


def _pages(s2: Stage2, level: int, index: int) -> range:
    """Return the pages under an entry, those outside of the slot among them."""
    size = s2.granule.pages_per_entry(level)
    start = (s2.base_gfn // size + index) * size - s2.base_gfn
    return range(start, start + size)


def _inside(s2: Stage2, pages: range) -> range:
    return range(max(pages.start, 0), min(pages.stop, s2.npages))


def _read(s2: Stage2, level: int, index: int) -> int:
    return int(s2.level(level)[index])


def _write(s2: Stage2, level: int, index: int, desc: int) -> None:
    s2.level(level)[index] = desc


def _walk(s2: Stage2, page: int) -> Leaf | None:
    """Return the leaf that maps `page`, or None."""
    for level in (1, 2, 3):
        index = _index(s2, level, page)
        desc = _read(s2, level, index)
        state = pte.state(desc, level)
        if state in LEAVES:
            return Leaf(level, index, desc, state, _inside(s2, _pages(s2, level, index)))
        if state is not State.TABLE:
            return None
    return None


def _leaves(s2: Stage2, lo: int, hi: int) -> Iterator[Leaf]:
    """Yield each leaf that maps a page of [lo, hi), once. The leaf yielded may be changed, but not its table."""
    page = lo
    while page < hi:
        leaf = _walk(s2, page)
        if leaf:
            yield leaf
        page = leaf.pages.stop if leaf else page + 1


def _range(s2: Stage2, gfn: int | None, npages: int | None) -> tuple[int, int]:
    """Return a range of guest frames as pages [lo, hi) of the slot."""
    instance(s2, Stage2, "s2")
    gfn = s2.base_gfn if gfn is None else integer(gfn, "gfn", low=None)
    npages = s2.base_gfn + s2.npages - gfn if npages is None else integer(npages, "npages", low=None)
    lo = gfn - s2.base_gfn
    if lo < 0 or npages < 0 or lo + npages > s2.npages:
        last = s2.base_gfn + s2.npages - 1
        raise GfnError(f"gfn {gfn:#x}..{gfn + npages - 1:#x} is not inside the slot's {s2.base_gfn:#x}..{last:#x}")
    return lo, lo + npages


def _given(gfn: int, npages: int) -> tuple[int, int]:
    """Return a range that can't be left out."""
    return integer(gfn, "gfn", low=None), integer(npages, "npages", low=None)


def _check_bitmap(s2: Stage2, bitmap: DirtyBitmap, name: str, *, written: bool = False) -> None:
    instance(s2, Stage2, "s2")
    instance(bitmap, DirtyBitmap, name)
    if bitmap.npages != s2.npages:
        raise BitmapError(f"the slot has {s2.npages} pages, the bitmap {bitmap.npages}")
    if written:
        uint64s(bitmap.words, name, writable=True, error=BitmapError)
    for own, what in ((s2.host_dirty, "the host's flags"), (s2.saved.bitmap, "the saved pages")):
        separate(own.words, bitmap.words, f"{name} and {what}", BitmapError)


# --- consumers ------------------------------------------------------------------------------------------------


def _tell_host(s2: Stage2, page: int) -> None:
    s2.host_dirty.set_range(page, 1)


def _keep(s2: Stage2, page: int) -> None:
    s2.saved.bitmap.set_range(page, 1)
    s2.saved.widen(page, page + 1)


def _save(s2: Stage2, leaf: Leaf) -> int:
    """Return the descriptor of a leaf about to be replaced, cleaned, after both consumers heard what it recorded."""
    if leaf.state is not State.WRITABLE_DIRTY:
        return leaf.desc
    for page in leaf.pages:
        _keep(s2, page)
        _tell_host(s2, page)
    return leaf.desc & ~pte.S2AP_W


# --- contiguous runs ------------------------------------------------------------------------------------------


def _group(s2: Stage2, level: int, entry: int) -> range:
    """Return the pages of the slot under the aligned group of entries that a contiguous run would be."""
    size, entries = s2.granule.pages_per_entry(level), s2.granule.contiguous_entries(level)
    first = (s2.base_gfn // size + entry) // entries * entries
    start = first * size - s2.base_gfn
    return _inside(s2, range(start, start + entries * size))


def _runs(s2: Stage2, lo: int, hi: int) -> Iterator[Leaf]:
    """Yield each leaf with the contiguous bit in a group that touches [lo, hi)."""
    for leaf in _leaves(s2, 0, s2.npages) if s2.contiguous else ():
        group = _group(s2, leaf.level, leaf.entry)
        if leaf.desc & pte.CONTIGUOUS and group.start < hi and lo < group.stop:
            yield leaf


def _widened(s2: Stage2, pages: set[int]) -> set[int]:
    """Return the pages, and of each with a contiguous leaf the whole run."""
    wide = set(pages)
    for page in pages if s2.contiguous else ():
        leaf = _walk(s2, page)
        if leaf and leaf.desc & pte.CONTIGUOUS:
            wide |= set(_group(s2, leaf.level, leaf.entry))
    return wide


def _take_apart(s2: Stage2, lo: int, hi: int, lowest: int = 3) -> None:
    """Clear the contiguous bit in the runs that touch a range, after both consumers heard what they recorded."""
    for leaf in list(_runs(s2, lo, hi) if lo < hi else ()):
        if leaf.level <= lowest:
            if leaf.state is State.WRITABLE_DIRTY:
                for page in _group(s2, leaf.level, leaf.entry):
                    _keep(s2, page)
                    _tell_host(s2, page)
            tracked = pte.S2AP_W if leaf.state in TRACKED else 0
            _write(s2, leaf.level, leaf.entry, leaf.desc & ~(pte.CONTIGUOUS | tracked))


# --- dirty state ----------------------------------------------------------------------------------------------


def harvest(s2: Stage2, out: DirtyBitmap | None = None, first: int = 0, npages: int | None = None) -> DirtyBitmap:
    """Collect the dirty pages of [first, first + npages) and make their leaves writable-clean.

    Examples
    --------
    >>> s2 = Stage2(3)
    >>> s2.map(0, 3, pfn=8, dbm=True)
    >>> guest_write(s2, 1)
    <Access.DONE: 'done'>
    >>> harvest(s2).pages()
    array([1])
    """
    instance(s2, Stage2, "s2")
    first = integer(first, "first", low=None)
    npages = s2.npages - first if npages is None else integer(npages, "npages", low=None)
    lo, hi = first, first + npages
    if first < 0 or npages < 0 or hi > s2.npages:
        raise GfnError(f"pages {first}..{hi - 1} are not inside of the slot's {s2.npages}")
    if out is None:
        out = DirtyBitmap(s2.npages)
    _check_bitmap(s2, out, "out", written=True)
    found: set[int] = set()
    for leaf in [*_leaves(s2, lo, hi), *(_runs(s2, lo, hi) if lo < hi else ())]:
        if leaf.state is State.WRITABLE_DIRTY:
            _write(s2, leaf.level, leaf.entry, leaf.desc & ~pte.S2AP_W)
            found |= set(leaf.pages)
    for page in _widened(s2, found):
        if lo <= page < hi:
            out.set_range(page, 1)
            _tell_host(s2, page)
        else:
            _keep(s2, page)
    for page in range(lo, hi):
        if page in s2.saved.bitmap:
            s2.saved.bitmap.set_range(page, 1, False)
            out.set_range(page, 1)
            _tell_host(s2, page)
    return out


def dirty(s2: Stage2) -> DirtyBitmap:
    """Return the pages that `harvest` would, and change nothing."""
    instance(s2, Stage2, "s2")
    found = _scan(s2, State.WRITABLE_DIRTY)
    out = DirtyBitmap.from_pages(sorted(_widened(s2, {page for page in range(s2.npages) if page in found})), s2.npages)
    for page in range(s2.npages):
        if page in s2.saved.bitmap:
            out.set_range(page, 1)
    return out


def writable(s2: Stage2) -> DirtyBitmap:
    """Return the pages whose leaf has S2AP[1] set."""
    instance(s2, Stage2, "s2")
    return _scan(s2, State.UNTRACKED, State.WRITABLE_DIRTY)


def young(s2: Stage2) -> DirtyBitmap:
    """Return the pages whose leaf has AF set."""
    instance(s2, Stage2, "s2")
    out = DirtyBitmap(s2.npages)
    for leaf in _leaves(s2, 0, s2.npages):
        if leaf.desc & pte.AF:
            for page in leaf.pages:
                out.set_range(page, 1)
    return out


def _scan(s2: Stage2, *states: State) -> DirtyBitmap:
    out = DirtyBitmap(s2.npages)
    for leaf in _leaves(s2, 0, s2.npages):
        if leaf.state in states:
            for page in leaf.pages:
                out.set_range(page, 1)
    return out


def clean(s2: Stage2, mask: DirtyBitmap) -> int:
    """Re-protect the dirty leaves of the pages in `mask`, keeping what blocks recorded for other pages."""
    _check_bitmap(s2, mask, "mask")
    count, found = 0, set[int]()
    wide = _widened(s2, {page for page in range(s2.npages) if page in mask})
    for leaf in _leaves(s2, 0, s2.npages):
        if leaf.state is State.WRITABLE_DIRTY and any(page in wide for page in leaf.pages):
            _write(s2, leaf.level, leaf.entry, leaf.desc & ~pte.S2AP_W)
            count += 1
            found |= set(leaf.pages)
    for page in _widened(s2, found):
        _tell_host(s2, page)
        if page not in mask:
            _keep(s2, page)
    for page in range(s2.npages):
        if page in mask and page in s2.saved.bitmap:
            s2.saved.bitmap.set_range(page, 1, False)
            _tell_host(s2, page)
    return count


# --- tracking and protection ----------------------------------------------------------------------------------


def enable_dbm(s2: Stage2, mask: DirtyBitmap | None = None) -> int:
    """Make untracked leaves writable-clean; the host is told of them."""
    instance(s2, Stage2, "s2")
    if mask is not None:
        _check_bitmap(s2, mask, "mask")
        _take_apart(s2, 0, s2.npages)
    count = 0
    for leaf in _leaves(s2, 0, s2.npages):
        if leaf.state is not State.UNTRACKED:
            continue
        if mask is None or any(page in mask for page in leaf.pages):
            _write(s2, leaf.level, leaf.entry, leaf.desc & ~pte.S2AP_W | pte.DBM)
            count += 1
            for page in leaf.pages:
                _tell_host(s2, page)
    return count


def disable_dbm(s2: Stage2) -> int:
    """Make tracked leaves untracked, saving what they recorded; the host is told of them all."""
    instance(s2, Stage2, "s2")
    _take_apart(s2, 0, s2.npages)
    count = 0
    for leaf in _leaves(s2, 0, s2.npages):
        if leaf.state in TRACKED:
            _write(s2, leaf.level, leaf.entry, _save(s2, leaf) & ~pte.DBM | pte.S2AP_W)
            count += 1
            for page in leaf.pages:
                _tell_host(s2, page)
    return count


def set_dbm(s2: Stage2, gfn: int | None = None, npages: int | None = None) -> int:
    """Set DBM on untracked leaves, which become writable-dirty."""
    lo, hi = _range(s2, gfn, npages)
    _take_apart(s2, lo, hi)
    _isolate(s2, lo, hi)
    count = 0
    for leaf in _leaves(s2, lo, hi):
        if leaf.state is State.UNTRACKED:
            _write(s2, leaf.level, leaf.entry, leaf.desc | pte.DBM)
            count += 1
    return count


def clear_dbm(s2: Stage2, gfn: int | None = None, npages: int | None = None) -> int:
    """Clear DBM, saving what was recorded: tracked leaves become read-only."""
    lo, hi = _range(s2, gfn, npages)
    _take_apart(s2, lo, hi)
    _isolate(s2, lo, hi)
    count = 0
    for leaf in _leaves(s2, lo, hi):
        if leaf.state in TRACKED:
            _write(s2, leaf.level, leaf.entry, _save(s2, leaf) & ~pte.DBM)
            count += 1
    return count


def wrprotect(s2: Stage2, gfn: int | None = None, npages: int | None = None) -> int:
    """Make leaves read-only, saving what they recorded; the host is told of untracked ones."""
    lo, hi = _range(s2, gfn, npages)
    _take_apart(s2, lo, hi)
    _isolate(s2, lo, hi)
    count = 0
    for leaf in _leaves(s2, lo, hi):
        if leaf.state is State.READ_ONLY:
            continue
        _write(s2, leaf.level, leaf.entry, _save(s2, leaf) & ~(pte.DBM | pte.S2AP_W))
        count += 1
        if leaf.state is State.UNTRACKED:
            for page in leaf.pages:
                _tell_host(s2, page)
    return count


def mkold(s2: Stage2, gfn: int | None = None, npages: int | None = None) -> int:
    """Clear the access flag."""
    return _age(s2, *_range(s2, gfn, npages))[0]


def test_clear_young(s2: Stage2, gfn: int | None = None, npages: int | None = None) -> DirtyBitmap:
    """Clear the access flag and return the pages of the range that had it."""
    return _age(s2, *_range(s2, gfn, npages))[1]


def _age(s2: Stage2, lo: int, hi: int) -> tuple[int, DirtyBitmap]:
    count, out = 0, DirtyBitmap(s2.npages)
    for leaf in _leaves(s2, lo, hi):
        if leaf.desc & pte.AF:
            _write(s2, leaf.level, leaf.entry, leaf.desc & ~pte.AF)
            count += 1
            for page in leaf.pages:
                if lo <= page < hi:
                    out.set_range(page, 1)
    return count, out


def mkyoung(s2: Stage2, gfn: int | None = None, npages: int | None = None) -> int:
    """Set the access flag."""
    count = 0
    for leaf in _leaves(s2, *_range(s2, gfn, npages)):
        if not leaf.desc & pte.AF:
            _write(s2, leaf.level, leaf.entry, leaf.desc | pte.AF)
            count += 1
    return count


# --- mapping --------------------------------------------------------------------------------------------------


def map(  # noqa: A001 - the verb's name
    s2: Stage2,
    gfn: int,
    npages: int,
    pfn: int | NDArray[np.integer],
    level: int = 3,
    writable: bool = True,
    *,
    dbm: bool = False,
) -> None:
    """Map guest frames to physical ones, in place of whatever was there."""
    lo, hi = _range(s2, *_given(gfn, npages))
    level = _check_level(s2, level, page=True)
    frames = _frames(s2, lo, hi, pfn, level)
    writable, dbm = flag(writable, "writable"), flag(dbm, "dbm")
    if dbm and not writable:
        raise ValueError("DBM on a leaf that isn't writable would grant the write")
    unmap(s2, gfn, npages)
    size = s2.granule.pages_per_entry(level)
    for page, frame in zip(range(lo, hi, size), frames, strict=True):
        for above in range(1, level):
            if not _read(s2, above, _index(s2, above, page)):
                _write(s2, above, _index(s2, above, page), pte.TABLE)
        desc = pte.make_leaf(frame << s2.granule.page_shift, level, writable=writable, dbm=dbm)
        _write(s2, level, _index(s2, level, page), desc)


def _check_level(s2: Stage2, level: int, *, page: bool) -> int:
    """Return a level that has blocks, or with `page` the level of pages."""
    level = integer(level, "level", low=None)
    if not (page and level == 3) and (level not in (1, 2) or level not in s2.granule.block_levels(large=True)):
        raise GfnError(f"level {level} of a {s2.granule} granule has no {'leaves' if page else 'blocks'}")
    return level


def _frames(s2: Stage2, lo: int, hi: int, pfn: int | NDArray[np.integer], level: int) -> list[int]:
    """Return the frame of each leaf of `level` that maps pages [lo, hi), checked."""
    size = s2.granule.pages_per_entry(level)
    if (s2.base_gfn + lo) % size or (hi - lo) % size:
        raise GfnError(
            f"gfn {s2.base_gfn + lo:#x} and {hi - lo} pages aren't multiples of a level-{level} leaf's {size:#x}"
        )
    count, top = (hi - lo) // size, (1 << (48 - s2.granule.page_shift)) - size
    if isinstance(pfn, np.ndarray) and pfn.ndim:
        frames = [int(frame) for frame in integers(pfn, "pfn", 0, top, GfnError)]
    else:
        first = integer(pfn, "pfn", 0, top, GfnError)
        frames = [first + i * size for i in range(count)]
    if len(frames) != count:
        raise GfnError(f"{count} leaves need {count} frames, got {len(frames)}")
    for frame in frames:
        if frame % size or frame > top:
            raise GfnError(f"pfn {frame:#x} isn't a multiple of the leaf's {size:#x} pages, inside of 48 address bits")
    return frames


def unmap(s2: Stage2, gfn: int, npages: int) -> None:
    """Remove the leaves of a range, saving what they recorded; the host is told of untracked ones."""
    lo, hi = _range(s2, *_given(gfn, npages))
    _take_apart(s2, lo, hi)
    _isolate(s2, lo, hi)
    for leaf in _leaves(s2, lo, hi):
        _save(s2, leaf)
        if leaf.state is State.UNTRACKED:
            for page in leaf.pages:
                _tell_host(s2, page)
        _write(s2, leaf.level, leaf.entry, 0)
    for level in (3, 2, 1):  # invalid entries may hold something, and tables are left over
        for index in range(_index(s2, level, lo), _index(s2, level, hi - 1) + 1):
            pages = _inside(s2, _pages(s2, level, index))
            if lo <= pages.start and pages.stop <= hi:
                _write(s2, level, index, 0)


def split(s2: Stage2, gfn: int, npages: int, level: int = 3) -> int:
    """Replace the blocks that touch a range by tables of leaves of `level`."""
    lo, hi = _range(s2, *_given(gfn, npages))
    level = integer(level, "level", 2, 3, GfnError)
    _take_apart(s2, lo, hi, level - 1)
    count = 0
    while blocks := [leaf for leaf in _leaves(s2, lo, hi) if leaf.level < level]:  # and then the pieces of large ones
        for leaf in blocks:
            _split(s2, leaf)
            count += 1
    return count


def _split(s2: Stage2, leaf: Leaf) -> None:
    desc = _save(s2, leaf)
    granule, child = s2.granule, leaf.level + 1
    for shift in range(granule.page_shift, granule.shift(leaf.level)):  # the child's address bits
        desc &= ~(1 << shift)
    desc = desc & ~(pte.CONTIGUOUS | pte.TABLE) | (0b11 if child == 3 else 0b01)
    pages = _pages(s2, leaf.level, leaf.entry)
    for i in range(granule.entries):
        page = pages.start + i * granule.pages_per_entry(child)
        if _inside(s2, range(page, page + granule.pages_per_entry(child))):
            _write(s2, child, _index(s2, child, page), desc | i << granule.shift(child))
    _write(s2, leaf.level, leaf.entry, pte.TABLE)


def _isolate(s2: Stage2, lo: int, hi: int) -> None:
    """Split the blocks that are partly in [lo, hi) and partly not."""
    for page in (lo, hi) if lo < hi else ():
        while page < s2.npages and (leaf := _walk(s2, page)) and leaf.pages.start < page:
            _split(s2, leaf)


def collapse(s2: Stage2, gfn: int, npages: int, level: int = 2) -> int:
    """Replace the tables whose leaves make up a block by that block."""
    lo, hi = _range(s2, *_given(gfn, npages))
    level = _check_level(s2, level, page=False)
    _take_apart(s2, lo, hi)
    size = s2.granule.pages_per_entry(level)
    start = lo + -(s2.base_gfn + lo) % size
    return sum(_collapse(s2, level, page) for page in range(start, hi - size + 1, size))


def _collapse(s2: Stage2, level: int, page: int) -> bool:
    granule = s2.granule
    index = _index(s2, level, page)
    if pte.state(_read(s2, level, index), level) is not State.TABLE:
        return False
    step = granule.pages_per_entry(level + 1)
    leaves = [_walk(s2, page + i * step) for i in range(granule.entries)]
    first = leaves[0]
    place = (1 << granule.shift(level)) - (1 << granule.shift(level + 1))  # address bits that tell children apart
    if first is None or first.desc & place:
        return False
    for i, leaf in enumerate(leaves):
        if leaf is None or leaf.level != level + 1:
            return False
        if (leaf.state in TRACKED) != (first.state in TRACKED):
            return False
        ignored = pte.AF | pte.CONTIGUOUS | (pte.S2AP_W if leaf.state in TRACKED else 0)
        if (leaf.desc ^ (first.desc | i << granule.shift(level + 1))) & ~ignored:
            return False
    block = first.desc & ~(pte.TABLE | pte.CONTIGUOUS | pte.AF) | 0b01
    if first.state in TRACKED:
        block &= ~pte.S2AP_W
    for leaf in (leaf for leaf in leaves if leaf):  # all are there
        _save(s2, leaf)
        block |= leaf.desc & pte.AF
        _write(s2, leaf.level, leaf.entry, 0)
    _write(s2, level, index, block)
    return True


# --- hardware -------------------------------------------------------------------------------------------------


class Access(Enum):
    """How a guest's access ended: done, or the stage-2 fault that it took."""

    DONE = "done"
    TRANSLATION = "translation fault"
    ACCESS_FLAG = "access-flag fault"
    PERMISSION = "permission fault"


def guest_write(s2: Stage2, gfn: int, *, ha: bool = True, hd: bool = True) -> Access:
    """Do to the leaf of `gfn` what the MMU does at a guest's write, with nothing cached in a TLB.

    Parameters
    ----------
    s2 : Stage2
        The tables.
    gfn : int
        The guest frame.
    ha, hd : bool
        VTCR_EL2.HA and HD; HD is without effect where HA is off.

    Returns
    -------
    Access
        The outcome of the access. AF is never set without the dirty state where both are due (R_PRHKD, I_DSHLJ).
    """
    return _access(s2, gfn, write=True, ha=flag(ha, "ha"), hd=flag(hd, "hd") and ha)


def guest_read(s2: Stage2, gfn: int, *, ha: bool = True) -> Access:
    """Do to the leaf of `gfn` what the MMU does at a guest's read. As `guest_write`."""
    return _access(s2, gfn, write=False, ha=flag(ha, "ha"), hd=False)


def _access(s2: Stage2, gfn: int, *, write: bool, ha: bool, hd: bool) -> Access:
    page, _ = _range(s2, *_given(gfn, 1))
    leaf = _walk(s2, page)
    if leaf is None:
        return Access.TRANSLATION
    new = leaf.desc
    if not leaf.desc & pte.AF:
        if not ha:
            return Access.ACCESS_FLAG
        new |= pte.AF
    if write and not leaf.desc & pte.S2AP_W:
        if not (hd and leaf.desc & pte.DBM):
            return Access.PERMISSION
        new |= pte.S2AP_W
    if not write and not leaf.desc & pte.S2AP_R:
        return Access.PERMISSION
    _write(s2, leaf.level, leaf.entry, new)
    return Access.DONE
