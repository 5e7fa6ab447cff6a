"""Stage-2 leaf descriptors of VMSAv8-64: their bits, their states, and the changes that may be made to them.

This is the only module that knows bit numbers (Arm ARM DDI0487, D8.3, stage-2 block and page descriptors with
direct permissions). Two forms of each rule live here. `state` is the scalar form: the state table read out in
ifs, which the walker follows. `Match` and `Update` are the bulk form: a rule as masks, which the kernels apply to
whole arrays. The tests prove for all 2^64 descriptors that they say the same.

=====  ========  ===========  ==============  =====================================
V      DBM (51)  S2AP[1] (7)  state           on a guest write
=====  ========  ===========  ==============  =====================================
0      any       any          absent          translation fault
1      0         0            read-only       permission fault
1      0         1            untracked       nothing is recorded
1      1         0            writable-clean  hardware sets S2AP[1] (HA and HD on)
1      1         1            writable-dirty  no change
=====  ========  ===========  ==============  =====================================
"""

from dataclasses import dataclass
from enum import Enum, IntEnum
from functools import cache
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "ADDRESS",
    "AF",
    "CONTIGUOUS",
    "DBM",
    "MUTABLE",
    "S2AP_R",
    "S2AP_W",
    "TABLE",
    "AddressBits",
    "Match",
    "State",
    "Update",
    "allow",
    "allow_dbm",
    "arm",
    "clean",
    "clear_dbm",
    "describe",
    "dirty",
    "disarm",
    "leaf",
    "make_leaf",
    "make_table",
    "mkold",
    "mkyoung",
    "output_address",
    "read_only",
    "relax",
    "relax_dirty",
    "set_dbm",
    "state",
    "table",
    "track",
    "tracked",
    "untracked",
    "writable",
    "writable_clean",
    "wrprotect",
    "young",
]

VALID = 1 << 0
TYPE = 1 << 1  # table (levels below 3) or page (level 3), where VALID
MEMATTR = 0b1111 << 2
MEMATTR_NORMAL = 0b1111 << 2  # write-back, inner and outer
S2AP_R = 1 << 6
S2AP_W = 1 << 7  # S2AP[1]: write permitted; with DBM, the dirty bit
SH_INNER = 0b11 << 8  # OA[51:50] instead, where VTCR_EL2.DS = 1
AF = 1 << 10
NT = 1 << 16  # blocks, FEAT_BBML1
DBM = 1 << 51
CONTIGUOUS = 1 << 52
TABLE = VALID | TYPE
ADDRESS = ((1 << 48) - 1) & ~0xFFF
"""Bits 47:12; a larger granule has its page's offset, and a block its own, masked off as well."""

MUTABLE = S2AP_W | AF | DBM
"""The only bits of a leaf that dirty tracking may change."""

NORMAL = MEMATTR_NORMAL | SH_INNER | S2AP_R | AF


class State(IntEnum):
    """What a descriptor means for dirty tracking.

    ``RESERVED`` is the encoding ``01`` at a level without blocks, which hardware takes as a translation fault.
    """

    ABSENT = 0
    TABLE = 1
    READ_ONLY = 2
    UNTRACKED = 3
    WRITABLE_CLEAN = 4
    WRITABLE_DIRTY = 5
    RESERVED = 6

    @property
    def label(self) -> str:
        """The name as people write it: ``writable-clean``."""
        return self.name.lower().replace("_", "-")


@overload
def state(desc: int, level: int) -> State: ...
@overload
def state(desc: NDArray[np.uint64], level: int) -> NDArray[np.uint8]: ...
def state(desc: int | NDArray[np.uint64], level: int) -> State | NDArray[np.uint8]:
    """Return the state of a descriptor, or of each descriptor of an array.

    Parameters
    ----------
    desc : int or (n,) uint64 array
        Descriptors as they lie in a table of `level`.
    level : int
        1 to 3. At levels 1 and 2 ``01`` is taken as a block: whether the granule has blocks there is for the
        reader of the table to say.

    Returns
    -------
    State or (n,) uint8 array
        An array's elements are the values of `State`. Equal to ``[state(int(d), level) for d in desc]``.

    Examples
    --------
    >>> state(make_leaf(0x8000_0000, 3, dbm=True), 3)
    <State.WRITABLE_CLEAN: 4>
    """
    if isinstance(desc, np.ndarray):
        return _states(desc, level)
    if not desc & VALID:
        return State.ABSENT
    if level == 3:
        if not desc & TYPE:
            return State.RESERVED
    elif desc & TYPE:
        return State.TABLE
    if desc & DBM:
        return State.WRITABLE_DIRTY if desc & S2AP_W else State.WRITABLE_CLEAN
    return State.UNTRACKED if desc & S2AP_W else State.READ_ONLY


@dataclass(frozen=True, slots=True)
class Match:
    """A predicate on descriptors as a pair of masks: true where ``desc & mask == value``.

    Parameters
    ----------
    mask : int
        The bits that are looked at.
    value : int
        What they must be; 0 outside of `mask`.

    Examples
    --------
    >>> dirty(3)(0x0008_0000_8000_04C3)
    True
    >>> dirty(3)(np.array([0x0008_0000_8000_04C3, 0], dtype=np.uint64))
    array([ True, False])
    """

    mask: int
    value: int

    def __post_init__(self) -> None:
        if self.value & ~self.mask:
            raise ValueError(f"value {self.value:#018x} has bits outside of mask {self.mask:#018x}")

    @overload
    def __call__(self, desc: int) -> bool: ...
    @overload
    def __call__(self, desc: NDArray[np.uint64]) -> NDArray[np.bool_]: ...
    def __call__(self, desc: int | NDArray[np.uint64]) -> bool | NDArray[np.bool_]:
        """Return whether `desc` matches; elementwise for an array."""
        return (desc & self.mask) == self.value

    def also(self, ones: int = 0, zeros: int = 0) -> "Match":
        """Return this predicate with `ones` required to be set and `zeros` to be clear as well.

        Raises
        ------
        ValueError
            If a bit would have to be both.
        """
        both = (self.value | ones) & (self.mask & ~self.value | zeros)
        if both:
            raise ValueError(f"bits {both:#018x} can't be set and clear at once")
        return Match(self.mask | ones | zeros, self.value | ones)


@dataclass(frozen=True, slots=True)
class Update:
    """A change to descriptors as masks: where `where` matches, clear `clears`, then set `sets`.

    Parameters
    ----------
    where : Match
        Which descriptors are changed.
    sets, clears : int
        The bits to set and to clear.

    Examples
    --------
    >>> hex(clean(3)(0x0008_0000_8000_04C3))
    '0x8000080000443'
    """

    where: Match
    sets: int = 0
    clears: int = 0

    @overload
    def __call__(self, desc: int) -> int: ...
    @overload
    def __call__(self, desc: NDArray[np.uint64]) -> NDArray[np.uint64]: ...
    def __call__(self, desc: int | NDArray[np.uint64]) -> int | NDArray[np.uint64]:
        """Return what `desc` becomes; elementwise, in a new array, for an array."""
        if isinstance(desc, np.ndarray):
            return np.where(self.where(desc), desc & np.uint64(~self.clears & (1 << 64) - 1) | self.sets, desc)
        return desc & ~self.clears | self.sets if self.where(desc) else desc


# --- predicates -----------------------------------------------------------------------------------------------


@cache
def leaf(level: int) -> Match:
    """Return the predicate "is a page (level 3) or a block (levels 1 and 2)"."""
    return Match(VALID | TYPE, VALID | TYPE if level == 3 else VALID)


@cache
def table(level: int) -> Match:
    """Return the predicate "points to a table of the next level".

    Raises
    ------
    ValueError
        For level 3, where ``11`` is a page.
    """
    if level == 3:
        raise ValueError("a level-3 entry never points to a table")
    return Match(VALID | TYPE, TABLE)


@cache
def dirty(level: int) -> Match:
    """Return the predicate "writable-dirty": a leaf with DBM and S2AP[1] set (R_BRFGY)."""
    return leaf(level).also(ones=DBM | S2AP_W)


@cache
def writable_clean(level: int) -> Match:
    """Return the predicate "writable-clean": a leaf with DBM set and S2AP[1] clear (R_XZFQH)."""
    return leaf(level).also(ones=DBM, zeros=S2AP_W)


@cache
def untracked(level: int) -> Match:
    """Return the predicate "untracked": a leaf that may be written, and records nothing."""
    return leaf(level).also(ones=S2AP_W, zeros=DBM)


@cache
def read_only(level: int) -> Match:
    """Return the predicate "read-only": a leaf with neither DBM nor S2AP[1]."""
    return leaf(level).also(zeros=DBM | S2AP_W)


@cache
def writable(level: int) -> Match:
    """Return the predicate "a leaf with S2AP[1] set", whatever DBM says: untracked or writable-dirty.

    In a table kept without DBM this is what the software's write faults have made dirty.
    """
    return leaf(level).also(ones=S2AP_W)


@cache
def tracked(level: int) -> Match:
    """Return the predicate "a leaf with DBM set": writable-clean or writable-dirty."""
    return leaf(level).also(ones=DBM)


@cache
def young(level: int) -> Match:
    """Return the predicate "a leaf with AF set". AF may be set speculatively (R_LHQRX): no proof of access."""
    return leaf(level).also(ones=AF)


# --- updates --------------------------------------------------------------------------------------------------


@cache
def clean(level: int) -> Update:
    """Return the update writable-dirty to writable-clean: re-protect what hardware marked."""
    return Update(dirty(level), clears=S2AP_W)


@cache
def arm(level: int) -> Update:
    """Return the update untracked to writable-clean: DBM only ever goes to a leaf that was writable."""
    return Update(untracked(level), sets=DBM, clears=S2AP_W)


@cache
def disarm(level: int) -> Update:
    """Return the update writable-clean or writable-dirty to untracked."""
    return Update(tracked(level), sets=S2AP_W, clears=DBM)


@cache
def set_dbm(level: int) -> Update:
    """Return the update untracked to writable-dirty: DBM alone is set, and what was written stays written."""
    return Update(untracked(level), sets=DBM)


@cache
def clear_dbm(level: int) -> Update:
    """Return the update writable-clean to read-only and writable-dirty to untracked: DBM alone is cleared."""
    return Update(tracked(level), clears=DBM)


@cache
def wrprotect(level: int) -> Update:
    """Return the update of a leaf with S2AP[1] to read-only.

    DBM goes too: left alone it would grant the write. A writable-clean leaf takes `clear_dbm`.
    """
    return Update(writable(level), clears=DBM | S2AP_W)


@cache
def track(level: int) -> Update:
    """Return the update untracked or writable-dirty to writable-clean: `arm` and `clean` in one pass."""
    return Update(writable(level), sets=DBM, clears=S2AP_W)


@cache
def relax(level: int) -> Update:
    """Return the update of any leaf to untracked: how a write fault is resolved where software keeps the log."""
    return Update(leaf(level), sets=S2AP_W, clears=DBM)


@cache
def relax_dirty(level: int) -> Update:
    """Return the update of any leaf to writable-dirty: how a write fault is resolved where hardware keeps the log.

    With `relax` the one place where a leaf that wasn't writable becomes so: only for a write that the host allows.
    """
    return Update(leaf(level), sets=DBM | S2AP_W)


@cache
def allow(level: int) -> Update:
    """Return the update read-only to untracked: only for a leaf that the log alone had write-protected."""
    return Update(read_only(level), sets=S2AP_W)


@cache
def allow_dbm(level: int) -> Update:
    """Return the update read-only to writable-clean: only for a leaf that the log alone had write-protected."""
    return Update(read_only(level), sets=DBM)


@cache
def mkold(level: int) -> Update:
    """Return the update that clears AF of a young leaf, and touches neither DBM nor S2AP[1]."""
    return Update(young(level), clears=AF)


@cache
def mkyoung(level: int) -> Update:
    """Return the update that sets AF of an old leaf, and touches neither DBM nor S2AP[1]."""
    return Update(leaf(level).also(zeros=AF), sets=AF)


# --- addresses and constructors -------------------------------------------------------------------------------


class AddressBits(Enum):
    """Where a descriptor keeps the address bits above 47."""

    PA48 = "none"
    LPA = "51:48 in 15:12"  # 64K granule, FEAT_LPA
    LPA2 = "49:48 in place, 51:50 in 9:8"  # 4K and 16K, VTCR_EL2.DS = 1


@overload
def output_address(desc: int, shift: int, bits: AddressBits = AddressBits.PA48) -> int: ...
@overload
def output_address(
    desc: NDArray[np.uint64], shift: int, bits: AddressBits = AddressBits.PA48
) -> NDArray[np.uint64]: ...
def output_address(
    desc: int | NDArray[np.uint64], shift: int, bits: AddressBits = AddressBits.PA48
) -> int | NDArray[np.uint64]:
    """Return the physical address in a leaf or table descriptor.

    Parameters
    ----------
    desc : int or (n,) uint64 array
        Valid descriptors.
    shift : int
        The address bits that the descriptor doesn't hold: `hwdbm.Granule.shift` of the leaf's level, or the page
        shift for a table. Whatever stands below is ignored.
    bits : AddressBits
        Where bits 51:48 are.

    Examples
    --------
    >>> hex(output_address(0x0008_0000_8000_04C3, 12))
    '0x80000000'
    """
    pa: Any = desc & (ADDRESS >> shift << shift)
    if bits is AddressBits.LPA:
        pa = pa | (desc & 0xF000) << 36
    elif bits is AddressBits.LPA2:
        pa = pa | desc & 0x0003_0000_0000_0000 | (desc & 0x300) << 42
    found: int | NDArray[np.uint64] = pa
    return found


@overload
def _address_field(pa: int, bits: AddressBits) -> int: ...
@overload
def _address_field(pa: NDArray[np.uint64], bits: AddressBits) -> NDArray[np.uint64]: ...
def _address_field(pa: int | NDArray[np.uint64], bits: AddressBits) -> int | NDArray[np.uint64]:
    field: Any = pa & ADDRESS
    if bits is AddressBits.LPA:
        field = field | pa >> 36 & 0xF000
    elif bits is AddressBits.LPA2:
        field = field | pa & 0x0003_0000_0000_0000 | pa >> 42 & 0x300
    placed: int | NDArray[np.uint64] = field
    return placed


@overload
def make_leaf(
    pa: int,
    level: int,
    *,
    writable: bool = True,
    dbm: bool = False,
    dirty: bool = False,
    bits: AddressBits = AddressBits.PA48,
) -> int: ...
@overload
def make_leaf(
    pa: NDArray[np.uint64],
    level: int,
    *,
    writable: bool = True,
    dbm: bool = False,
    dirty: bool = False,
    bits: AddressBits = AddressBits.PA48,
) -> NDArray[np.uint64]: ...
def make_leaf(
    pa: int | NDArray[np.uint64],
    level: int,
    *,
    writable: bool = True,
    dbm: bool = False,
    dirty: bool = False,
    bits: AddressBits = AddressBits.PA48,
) -> int | NDArray[np.uint64]:
    """Return a leaf of normal, write-back, inner-shareable memory that may be read, with AF set.

    Parameters
    ----------
    pa : int or (n,) uint64 array
        Physical addresses in bytes, aligned to the leaf's size.
    level : int
        3 makes pages, 1 and 2 blocks.
    writable : bool
        False makes it read-only, and then `dbm` must be False too: DBM on a leaf that may not be written grants
        the write, and breaks copy-on-write.
    dbm, dirty : bool
        Whether hardware records writes, and whether it has recorded one.
    bits : AddressBits
        Where address bits 51:48 go. With LPA2 they take the place of the shareability.

    Raises
    ------
    ValueError
        For `dbm` without `writable`, or `dirty` without `dbm`.

    Examples
    --------
    >>> f"{make_leaf(0x8000_0000, 3):#018x} {make_leaf(0x8000_0000, 2, dbm=True):#018x}"
    '0x00000000800007ff 0x000800008000077d'
    """
    if dbm and not writable:
        raise ValueError("DBM on a leaf that isn't writable would grant the write")
    if dirty and not dbm:
        raise ValueError("a leaf without DBM has no dirty state")
    flags = NORMAL | (TABLE if level == 3 else VALID) | (DBM if dbm else 0)
    if writable and (dirty or not dbm):
        flags |= S2AP_W
    if bits is AddressBits.LPA2:
        flags &= ~SH_INNER
    desc: Any = _address_field(pa, bits) | flags
    made: int | NDArray[np.uint64] = desc
    return made


@overload
def make_table(pa: int, bits: AddressBits = AddressBits.PA48) -> int: ...
@overload
def make_table(pa: NDArray[np.uint64], bits: AddressBits = AddressBits.PA48) -> NDArray[np.uint64]: ...
def make_table(pa: int | NDArray[np.uint64], bits: AddressBits = AddressBits.PA48) -> int | NDArray[np.uint64]:
    """Return a table descriptor for the table at `pa` (bytes, aligned to the granule).

    Examples
    --------
    >>> hex(make_table(0x4100_0000))
    '0x41000003'
    """
    desc: Any = _address_field(pa, bits) | TABLE
    made: int | NDArray[np.uint64] = desc
    return made


def describe(desc: int, level: int) -> str:
    """Return one line that a person can check: the descriptor in hex, its state, and the bits that matter.

    Examples
    --------
    >>> describe(0x0008_0000_8000_04C3, 3)
    '0x00080000800004c3 (level 3 writable-dirty: AF DBM S2AP=rw)'
    """
    what = state(desc, level)
    if what in (State.ABSENT, State.TABLE, State.RESERVED):
        return f"{desc:#018x} (level {level} {what.label})"
    access = ("r" if desc & S2AP_R else "-") + ("w" if desc & S2AP_W else "-")
    flags = [name for name, bit in (("AF", AF), ("DBM", DBM), ("CONT", CONTIGUOUS)) if desc & bit]
    return f"{desc:#018x} (level {level} {what.label}: {' '.join([*flags, f'S2AP={access}'])})"


def _states(desc: NDArray[np.uint64], level: int) -> NDArray[np.uint8]:
    """Return the values of `State` by looking four bits up in a table that the scalar form filled."""
    index = desc & TABLE | desc >> 5 & 0b100 | desc >> 48 & 0b1000
    return _lookup(level)[index.astype(np.intp)]


@cache
def _lookup(level: int) -> NDArray[np.uint8]:
    rows = ((i & TABLE) | (i >> 2 & 1) * S2AP_W | (i >> 3 & 1) * DBM for i in range(16))
    return np.array([state(desc, level) for desc in rows], dtype=np.uint8)
