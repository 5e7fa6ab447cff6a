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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum
from functools import cache
from typing import Any, Generic, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from hwdbm.check import flag, instance, integer, integers

__all__ = [
    "ADDRESS",
    "AF",
    "ANY",
    "CONTIGUOUS",
    "DBM",
    "MUTABLE",
    "S2AP_R",
    "S2AP_W",
    "TABLE",
    "AddressBits",
    "Match",
    "Rule",
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
    "old",
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

_WORD = (1 << 64) - 1

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


def _descriptors(value: Any, name: str) -> Any:
    """Return an integer of 64 bits as an `int`, or an array of them as it is.

    Values of other libraries pass: the proofs run this code on symbols.
    """
    if type(value) is int and 0 <= value <= _WORD:
        return value
    if isinstance(value, np.ndarray) and value.ndim:
        if value.dtype not in (np.uint64, object) or isinstance(value, np.ma.MaskedArray):
            raise TypeError(f"{name} is an array of uint64, not of {value.dtype.str}")
        return value
    if isinstance(value, int | np.generic | np.ndarray) or not hasattr(value, "__and__"):
        return integer(value, name, 0, _WORD)
    return value


def _level(value: Any) -> int:
    return integer(value, "level", -1, 3)


def _masks(rule: Any, *names: str) -> None:
    """Have the fields of a frozen rule be `int` of 64 bits."""
    for name in names:
        object.__setattr__(rule, name, integer(getattr(rule, name), name, 0, _WORD))


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
        -1 to 3. Above level 3 ``01`` is taken as a block: whether the granule has blocks there is for the reader of
        the table to say.

    Returns
    -------
    State or (n,) uint8 array
        An array's elements are the values of `State`. Equal to ``[state(int(d), level) for d in desc]``.

    Examples
    --------
    >>> state(make_leaf(0x8000_0000, 3, dbm=True), 3)
    <State.WRITABLE_CLEAN: 4>
    """
    desc, level = _descriptors(desc, "desc"), _level(level)
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
        The values of those bits; 0 outside of `mask`.

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
        _masks(self, "mask", "value")
        if self.value & ~self.mask:
            raise ValueError(f"value {self.value:#018x} has bits outside of mask {self.mask:#018x}")

    @overload
    def __call__(self, desc: int) -> bool: ...
    @overload
    def __call__(self, desc: NDArray[np.uint64]) -> NDArray[np.bool_]: ...
    def __call__(self, desc: int | NDArray[np.uint64]) -> bool | NDArray[np.bool_]:
        """Return whether `desc` matches; elementwise for an array."""
        if type(desc) is not int or not 0 <= desc <= _WORD:
            desc = _descriptors(desc, "desc")
        return (desc & self.mask) == self.value

    def also(self, ones: int = 0, zeros: int = 0) -> "Match":
        """Return this predicate with `ones` required to be set and `zeros` to be clear as well.

        Raises
        ------
        ValueError
            If a bit would have to be both.
        """
        ones, zeros = integer(ones, "ones", 0, _WORD), integer(zeros, "zeros", 0, _WORD)
        both = (self.value | ones) & (self.mask & ~self.value | zeros)
        if both:
            raise ValueError(
                f"bits {both:#018x} can't be set and clear at once: {ones:#018x} are to be 1, {zeros:#018x} 0"
            )
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

    def __post_init__(self) -> None:
        instance(self.where, Match, "where")
        _masks(self, "sets", "clears")

    @overload
    def __call__(self, desc: int) -> int: ...
    @overload
    def __call__(self, desc: NDArray[np.uint64]) -> NDArray[np.uint64]: ...
    def __call__(self, desc: int | NDArray[np.uint64]) -> int | NDArray[np.uint64]:
        """Return what `desc` becomes; elementwise, in a new array, for an array."""
        desc = _descriptors(desc, "desc")
        if isinstance(desc, np.ndarray):
            return np.where(self.where(desc), desc & np.uint64(~self.clears & _WORD) | self.sets, desc)
        return desc & ~self.clears | self.sets if self.where(desc) else desc


T = TypeVar("T", Match, Update)

# --- rules ----------------------------------------------------------------------------------------------------


class Rule(Generic[T]):
    """A rule for the leaves of all levels: called with a level, it returns the masks that hold there.

    Parameters
    ----------
    name : str
        Its name in this module.
    make : callable
        From a level to a `Match` or an `Update`.
    levels : sequence of int
        The levels at which the rule means something.

    Raises
    ------
    TypeError
        If `make` returns something else.
    ValueError
        For a level that isn't -1 to 3.
    """

    __slots__ = ("__name__", "_levels")

    def __init__(self, name: str, make: Callable[[int], T], levels: Sequence[int] = range(-1, 4)) -> None:
        instance(name, str, "name")
        instance(make, Callable, "make")
        self.__name__ = name
        self._levels: dict[int, T] = {level: make(level) for level in integers(levels, "levels", -1, 3).tolist()}
        for rule in self._levels.values():
            instance(rule, (Match, Update), "what make returns")

    def __repr__(self) -> str:
        return f"<pte.{self.__name__}>"

    def __call__(self, level: int) -> T:
        """Return what the rule is for descriptors of `level`.

        Raises
        ------
        ValueError
            For a level at which it means nothing.
        """
        try:
            return self._levels[level if type(level) is int else integer(level, "level", None)]
        except KeyError:
            integer(
                level, f"a level of pte.{self.__name__}", min(self._levels, default=0), max(self._levels, default=0)
            )
            raise ValueError(f"pte.{self.__name__} is of levels {sorted(self._levels)}, not {level}") from None


def _masks_of_a_leaf(level: int) -> Match:
    return Match(VALID | TYPE, VALID | TYPE if level == 3 else VALID)


def _leaf(name: str, ones: int = 0, zeros: int = 0) -> Rule[Match]:
    return Rule(name, lambda level: _masks_of_a_leaf(level).also(ones, zeros))


def _change(name: str, where: Rule[Match], sets: int = 0, clears: int = 0) -> Rule[Update]:
    return Rule(name, lambda level: Update(where(level), sets, clears))


ANY = Match(0, 0)
"""The predicate that is true of every descriptor, valid or not."""

table = Rule("table", lambda _level: Match(VALID | TYPE, TABLE), levels=range(-1, 3))
"""Points to a table of the next level. At level 3 there is none: there ``11`` is a page."""

# fmt: off
# Predicates on leaves, that is pages (level 3) and blocks (above it).
#                        name               bits that are 1        bits that are 0
leaf = _leaf(           "leaf")
read_only = _leaf(      "read_only",                               zeros=DBM | S2AP_W)
untracked = _leaf(      "untracked",        ones=S2AP_W,           zeros=DBM)
writable_clean = _leaf( "writable_clean",   ones=DBM,              zeros=S2AP_W)  # R_XZFQH
dirty = _leaf(          "dirty",            ones=DBM | S2AP_W)  # writable-dirty (R_BRFGY)
writable = _leaf(       "writable",         ones=S2AP_W)  # without DBM: what the write faults have made dirty
tracked = _leaf(        "tracked",          ones=DBM)
young = _leaf(          "young",            ones=AF)  # AF may be set speculatively (R_LHQRX): no proof of access
old = _leaf(            "old",                                     zeros=AF)

# Changes of the leaves for which a predicate is true.
#                        name               of                     bits set               bits cleared
clean = _change(        "clean",            dirty,                                        clears=S2AP_W)
arm = _change(          "arm",              untracked,             sets=DBM,              clears=S2AP_W)
disarm = _change(       "disarm",           tracked,               sets=S2AP_W,           clears=DBM)
set_dbm = _change(      "set_dbm",          untracked,             sets=DBM)
track = _change(        "track",            writable,              sets=DBM,              clears=S2AP_W)
clear_dbm = _change(    "clear_dbm",        tracked,                                      clears=DBM | S2AP_W)
wrprotect = _change(    "wrprotect",        writable,                                     clears=DBM | S2AP_W)
mkold = _change(        "mkold",            young,                                        clears=AF)
mkyoung = _change(      "mkyoung",          old,                   sets=AF)

# The only changes by which a leaf that wasn't writable becomes so. The host must allow the write: a write fault is
# resolved by relax where software keeps the log, and by relax_dirty where hardware does; allow and allow_dbm take
# back a write-protection that was the log's alone.
relax = _change(        "relax",            leaf,                  sets=S2AP_W,           clears=DBM)
relax_dirty = _change(  "relax_dirty",      leaf,                  sets=DBM | S2AP_W)
allow = _change(        "allow",            read_only,             sets=S2AP_W)
allow_dbm = _change(    "allow_dbm",        read_only,             sets=DBM)
# fmt: on


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
    desc, shift = _descriptors(desc, "desc"), integer(shift, "shift", 12, 51)
    instance(bits, AddressBits, "bits")
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
    pa = _descriptors(pa, "pa")
    instance(bits, AddressBits, "bits")
    writable, dbm, dirty = flag(writable, "writable"), flag(dbm, "dbm"), flag(dirty, "dirty")
    level = integer(level, "level", 0, 3)
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
    pa = _descriptors(pa, "pa")
    instance(bits, AddressBits, "bits")
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
    desc, level = integer(desc, "desc", 0, _WORD), _level(level)
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
    rows = (kind | written | dbm for dbm in (0, DBM) for written in (0, S2AP_W) for kind in range(TABLE + 1))
    return np.array([state(desc, level) for desc in rows], dtype=np.uint8)
