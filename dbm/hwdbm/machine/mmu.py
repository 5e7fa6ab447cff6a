"""The MMU's part of many accesses at once: walk, check, and update AF and the dirty state in one store.

For each page the same as `hwdbm.walker.guest_write` and `guest_read`, one after the other.
"""

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hwdbm import pte
from hwdbm.machine.tlb import CLEAN, READ_ONLY, WRITABLE, Distinct
from hwdbm.stage2 import Stage2
from hwdbm.walker import Access

Pages = NDArray[np.int64]
Codes = NDArray[np.uint8]

DONE, TRANSLATION, ACCESS_FLAG, PERMISSION = (tuple(Access).index(access) for access in Access)

_LIFT: Final = np.uint64((pte.DBM // pte.S2AP_W).bit_length() - 1)  # DBM shifted down by this is S2AP[1]
_DECISIVE: Final = pte.MUTABLE  # an access also depends on bits that all leaves must have: their AND says so


class Walk(NamedTuple):
    """How some accesses ended.

    Parameters
    ----------
    access : (n,) or (1,) uint8 array
        `DONE`, or the fault: an index into ``tuple(walker.Access)``. One element is for all: they are done, at level
        3, and leave the same to cache.
    kind : (n,) or (1,) uint8 array
        The state of the leaf that a TLB caches, where the access was done.
    level : (n,) or (1,) uint8 array
        The leaf's level, 3 where there is none.
    updated : int
        Updates of descriptors by hardware.
    """

    access: Codes
    kind: Codes
    level: Codes
    updated: int


def walk(
    s2: Stage2,
    pages: Pages,
    *,
    write: bool,
    ha: bool = True,
    hd: bool = True,
    distinct: Distinct | None = None,
    out: NDArray[np.uint64] | None = None,
) -> Walk:
    """Do to the leaves of pages what the MMU does at an access to each, with nothing cached.

    Parameters
    ----------
    s2 : Stage2
        The leaves, whose pages the caller holds.
    pages : (n,) int64 array
        Counted from the slot's first; they may repeat.
    write : bool
        Whether they are written or read.
    ha, hd : bool
        VTCR_EL2.HA and HD; HD is without effect where HA is off.
    distinct : Distinct, optional
        A counter of pages, with which a walk of many is faster.
    out : (n,) uint64 array, optional
        Room for the descriptors.

    Returns
    -------
    Walk
        ``access`` is equal to ``[guest_write(s2, s2.base_gfn + page) for page in pages]``.

    Examples
    --------
    >>> s2 = Stage2(3)
    >>> s2.map(1, 2, pfn=8, dbm=True)
    >>> walk(s2, np.array([0, 1, 1]), write=True)[::3], s2.dirty().pages()
    ((array([1, 0, 0], dtype=uint8), 1), array([1]))
    >>> walk(s2, np.array([1, 2, 2]), write=False)[:3]  # writable-dirty, writable-clean
    (array([0, 0, 0], dtype=uint8), array([3, 2, 2], dtype=uint8), array([3, 3, 3], dtype=uint8))
    """
    hd = hd and ha
    # With a bound that is clipped, rather than checked, the descriptors need no copy on their way to `out`.
    descs = s2.level(3).take(pages, out=out, mode="clip")
    alike = _walk_alike(s2, pages, descs, write=write, ha=ha, hd=hd, distinct=distinct) if pages.size else None
    if alike is not None:
        return alike
    found = pte.leaf(3)(descs)
    if found.all():
        access, kind, new = _decide(descs, write=write, ha=ha, hd=hd)
        updated = _store(s2, 3, pages, descs, new, distinct)
        return Walk(access, kind, np.full(pages.size, 3, dtype=np.uint8), updated)
    access = np.full(pages.size, TRANSLATION, dtype=np.uint8)
    kind, level = np.zeros(pages.size, dtype=np.uint8), np.full(pages.size, 3, dtype=np.uint8)
    updated = 0
    (where,) = found.nonzero()
    (rest,) = (~found).nonzero()
    for at in (3, 2, 1):
        if at != 3:
            index = _index(s2, at, pages[rest])
            descs = s2.level(at)[index]
            found = pte.leaf(at)(descs)
            where, rest, index, descs = rest[found], rest[~found], index[found], descs[found]
        else:
            index, descs = pages[where], descs[where]
        access[where], kind[where], new = _decide(descs, write=write, ha=ha, hd=hd)
        level[where] = at
        updated += _store(s2, at, index, descs, new, distinct)
        if not rest.size:
            break
    return Walk(access, kind, level, updated)


def _walk_alike(
    s2: Stage2, pages: Pages, descs: NDArray[np.uint64], *, write: bool, ha: bool, hd: bool, distinct: Distinct | None
) -> Walk | None:
    """Walk where all leaves are at level 3 and in the same state: what one access does, all do. Otherwise None."""
    common = int(np.bitwise_and.reduce(descs))
    if not pte.leaf(3)(common) or (int(np.bitwise_or.reduce(descs)) ^ common) & _DECISIVE:
        return None
    one = np.array([common], dtype=np.uint64)
    access, kind, new = _decide(one, write=write, ha=ha, hd=hd)
    if access[0] != DONE:
        return None
    sets, updated = new ^ one, 0
    if sets[0]:
        descs.fill(sets[0])
        s2.mmu_update(3, pages, descs)
        updated = _count(pages, distinct)
    return Walk(access, kind, np.array([3], dtype=np.uint8), updated)


def _index(s2: Stage2, level: int, pages: Pages) -> Pages:
    size = s2.layout.sizes[level]
    return (pages + s2.base_gfn % size) // size


def _decide(descs: NDArray[np.uint64], *, write: bool, ha: bool, hd: bool) -> tuple[Codes, Codes, NDArray[np.uint64]]:
    """Return how the access to each leaf ends, what a TLB keeps of it, and the descriptor that it leaves behind."""
    new = descs | np.uint64(pte.AF) if ha else descs
    if write and hd:
        new = new | descs >> _LIFT & np.uint64(pte.S2AP_W)  # AF and the dirty state in one update (R_PRHKD)
    writable = (new & np.uint64(pte.S2AP_W)) != 0
    kind = np.where(writable, np.uint8(WRITABLE), np.uint8(READ_ONLY))
    if hd and not write:
        kind[(new & np.uint64(pte.DBM | pte.S2AP_W)) == np.uint64(pte.DBM)] = CLEAN
    allowed = writable if write else (descs & np.uint64(pte.S2AP_R)) != 0
    access = np.where(allowed, np.uint8(DONE), np.uint8(PERMISSION))
    if not ha:
        access[(descs & np.uint64(pte.AF)) == 0] = ACCESS_FLAG  # before the permission (I_DSHLJ)
    if not allowed.all() or not ha:
        new = np.where(access == DONE, new, descs)
    return access, kind, new


def _store(
    s2: Stage2, level: int, index: Pages, old: NDArray[np.uint64], new: NDArray[np.uint64], distinct: Distinct | None
) -> int:
    """Store the descriptors that changed, and return how many did: each counts once, however often it is named."""
    (changed,) = (new != old).nonzero()
    if not changed.size:
        return 0
    entries = index[changed]
    s2.mmu_update(level, entries, new[changed] ^ old[changed])
    return _count(entries, distinct)


def _count(entries: Pages, distinct: Distinct | None) -> int:
    return int(np.unique(entries).size) if distinct is None else distinct.count(entries)
