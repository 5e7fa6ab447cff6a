"""Translation granules: shifts, levels, entries a table, pages a block, contiguous runs.

Arm ARM DDI0487, D8.2 (translation process) and D8.3 (descriptor formats). Nothing here knows a bit of a
descriptor; that is `hwdbm.pte`'s.
"""

from enum import Enum

from hwdbm.check import flag, instance, integer

__all__ = ["LEAF_LEVELS", "Granule", "size_name"]

LEAF_LEVELS = (1, 2, 3)
"""The levels that `hwdbm.Stage2` keeps arrays for, from the largest leaf to the page."""


class Granule(Enum):
    """The size of a page and of a table: 4, 16 or 64 KiB. The value is the page's shift.

    Examples
    --------
    >>> Granule.K4.page_size, Granule.K4.pages_per_entry(2)
    (4096, 512)
    >>> Granule.parse("16K")
    <Granule.K16: 14>
    """

    K4 = 12
    K16 = 14
    K64 = 16

    @classmethod
    def parse(cls, text: str) -> "Granule":
        """Return the granule that `text` names: ``4K``, ``16K`` or ``64K``, in either case.

        Raises
        ------
        ValueError
            If it names none of them.
        """
        instance(text, str, "a granule")
        for granule in cls:
            if str(granule) == text.strip().upper().removesuffix("IB").removesuffix("B"):
                return granule
        raise ValueError(f"a granule is 4K, 16K or 64K, not {text!r}")

    def __str__(self) -> str:
        return f"{self.page_size >> 10}K"

    @property
    def page_shift(self) -> int:
        """Bits of an address below the page number."""
        return self._value_  # `value` costs several times as much, and the walker asks for each page and level

    @property
    def page_size(self) -> int:
        """Bytes in a page, and in a table."""
        return 1 << self._value_

    @property
    def bits_per_level(self) -> int:
        """Bits of an address that one level resolves: 9, 11 or 13."""
        return self._value_ - 3

    @property
    def entries(self) -> int:
        """Descriptors in a table of one granule: 512, 2048 or 8192."""
        return 1 << self.bits_per_level

    def shift(self, level: int) -> int:
        """Return the address bits below the index of `level` (-1 to 3): an entry maps ``1 << shift`` bytes.

        Raises
        ------
        ValueError
            For another level.
        """
        level = integer(level, "a translation level", low=-1, high=3)
        return self._value_ + (self._value_ - 3) * (3 - level)

    def pages_per_entry(self, level: int) -> int:
        """Return the pages under one entry of `level`: 1 at level 3, a stripe's at level 2.

        Examples
        --------
        >>> [g.pages_per_entry(2) for g in Granule]
        [512, 2048, 8192]
        """
        return 1 << self.shift(level) - self._value_

    def block_levels(self, *, large: bool = False) -> tuple[int, ...]:
        """Return the levels at which the architecture has blocks, the largest first.

        Parameters
        ----------
        large : bool
            Whether 52-bit descriptors are in use: VTCR_EL2.DS = 1 for 4K and 16K, FEAT_LPA for 64K. They add
            level 0 for 4K, and level 1 for 16K and 64K.
        """
        usual, added = {
            Granule.K4: ((1, 2), (0,)),
            Granule.K16: ((2,), (1,)),
            Granule.K64: ((2,), (1,)),
        }[self]
        return added + usual if flag(large, "large") else usual

    def contiguous_entries(self, level: int) -> int:
        """Return the entries in a contiguous run of `level` (Arm ARM, D8.7.1): 1 where there are none.

        Examples
        --------
        >>> [(g.contiguous_entries(3), g.contiguous_entries(2)) for g in Granule]
        [(16, 16), (128, 32), (32, 32)]
        """
        level = integer(level, "a translation level", low=-1, high=3)
        if level == 3:
            return {Granule.K4: 16, Granule.K16: 128, Granule.K64: 32}[self]
        if level in (1, 2):
            return {Granule.K4: 16, Granule.K16: 32, Granule.K64: 32}[self] if level in self.block_levels() else 1
        return 1


def size_name(size: int) -> str:
    """Return bytes as people write them, where that is exact: ``4K``, ``2M``.

    Examples
    --------
    >>> size_name(4096), size_name(1 << 30), size_name(0x1800), size_name(100)
    ('4K', '1G', '6K', '100')
    """
    size = integer(size, "size")
    for shift, suffix in ((40, "T"), (30, "G"), (20, "M"), (10, "K")):
        if size and size % (1 << shift) == 0:
            return f"{size >> shift}{suffix}"
    return str(size)
