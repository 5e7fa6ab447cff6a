"""Stage-2 tables built one entry at a time, and read back one page at a time.

What the reader of images is compared with. It shares nothing with the package: bits, addresses, levels and
registers are written out here once more, from the Arm ARM.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np

VALID, TYPE, S2AP_W, AF, DBM, CONT = 1 << 0, 1 << 1, 1 << 7, 1 << 10, 1 << 51, 1 << 52
TG0 = {12: 0, 14: 2, 16: 1}
PS = {32: 0, 36: 1, 40: 2, 42: 3, 44: 4, 48: 5, 52: 6}
SL0 = {12: {2: 0, 1: 1, 0: 2, 3: 3, -1: 0}, 14: {3: 0, 2: 1, 1: 2, 0: 3}, 16: {3: 0, 2: 1, 1: 2}}
RUN = {12: {1: 16, 2: 16, 3: 16}, 14: {2: 32, 3: 128}, 16: {2: 32, 3: 32}}


@dataclass(frozen=True)
class Geometry:
    """A shape that the architecture allows. Shifts and levels are as in the Arm ARM, sizes in bits."""

    page: int  # 12, 14 or 16
    start: int
    ipa: int
    pa: int = 48
    ds: bool = False

    def __str__(self) -> str:
        ds = "-ds" if self.ds else ""
        return f"{1 << self.page - 10}K-level{self.start}-ipa{self.ipa}-pa{self.pa}{ds}"

    @property
    def entries(self) -> int:
        return 1 << self.page - 3

    def shift(self, level: int) -> int:
        return self.page + (self.page - 3) * (3 - level)

    @property
    def roots(self) -> int:
        return max(1, 1 << self.ipa - self.shift(self.start) >> self.page - 3)

    @property
    def block_levels(self) -> tuple[int, ...]:
        if self.page == 12:
            return (0, 1, 2) if self.ds else (1, 2)
        return (1, 2) if self.ds or (self.page == 16 and self.pa == 52) else (2,)

    @property
    def vtcr(self) -> int:
        value = 64 - self.ipa | SL0[self.page][self.start] << 6 | 0x3500 | TG0[self.page] << 14
        value |= PS[self.pa] << 16 | 1 << 19 | 1 << 21 | 1 << 22 | 1 << 31
        return value | self.ds << 32 | (self.start == -1) << 33

    def vttbr(self, root: int) -> int:
        if self.pa == 52:
            return root & (1 << 48) - 64 | root >> 48 << 2 | 0x2A << 48
        return root | 0x2A << 48 | 1

    def address(self, pa: int) -> int:
        """Return the bits of a descriptor that hold an address."""
        if self.ds:
            return pa & (1 << 50) - 1 & ~0xFFF | (pa >> 50) << 8
        if self.page == 16 and self.pa == 52:
            return pa & (1 << 48) - (1 << 16) | pa >> 48 << 12
        return pa

    def ignored(self, level: int, *, table: bool) -> int:
        """Return the bits that hardware ignores in a descriptor of these tables."""
        high = (1 << 64) - (1 << 53) | 1 << 50
        middle = 0 if self.ds else 0b11 << 48
        wide = self.page == 16 and self.pa == 52
        if table:
            low = (1 << (12 if wide else self.page)) - (1 << 10) | 0b1111_1100
            return high | middle | CONT | DBM | low | (0 if self.ds else 0b11 << 8)
        return high | middle | 1 << 11 | (1 << self.shift(level)) - (1 << (16 if wide else 12))


def geometries() -> list[Geometry]:
    """Return every combination of granule, start level, IPA size and DS that a VTCR_EL2 can have."""
    found = []
    for page, levels in SL0.items():
        for ds, pa in ((False, 48), (True, 52)) if page < 16 else ((False, 48), (False, 52)):
            for start in levels:
                if (start == -1 or (page == 14 and start == 0)) and not ds:
                    continue
                for ipa in range(17 if page == 16 else 16, pa + 1):
                    g = Geometry(page, start, ipa, pa, ds)
                    if 1 <= ipa - g.shift(start) <= page - 3 + 4:
                        found.append(g)
    return found


@dataclass
class Tables:
    """Tables under construction: physical pages from `base` on, in an order of their own."""

    g: Geometry
    base: int = 0x4000_0000
    seed: int = 0
    junk: bool = True
    data: dict[int, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.rng = np.random.default_rng(self.seed)
        self.runs: dict[tuple[int, int, int], bool] = {}
        self.next = self.base
        size = 8 << self.g.ipa - self.g.shift(self.g.start)
        align = max(size, 1 << self.g.page)
        self.next = -(-self.next // align) * align
        self.root = self.next
        for _ in range(self.g.roots):
            self.new_table()
        if size < 1 << self.g.page and self.junk:  # part of a page: around it is something else
            self.root += self.random.randrange(0, (1 << self.g.page) // max(size, 64)) * max(size, 64)
            page = next(iter(self.data.values()))
            at = self.root % (1 << self.g.page) // 8
            inside = page[at : at + size // 8].copy()
            page[:] = self.rng.integers(0, 1 << 64, page.size, dtype=np.uint64)
            page[at : at + size // 8] = inside

    def new_table(self) -> int:
        pa = self.next
        self.next += 1 << self.g.page
        if self.junk:  # invalid, and looking dirty
            self.data[pa] = self.rng.integers(0, 1 << 64, self.g.entries, dtype=np.uint64) & np.uint64(
                ~1 & (1 << 64) - 1
            )
        else:
            self.data[pa] = np.zeros(self.g.entries, dtype=np.uint64)
        return pa

    def with_junk(self, desc: int, level: int, *, table: bool) -> int:
        return desc | (self.random.getrandbits(64) & self.g.ignored(level, table=table) if self.junk else 0)

    def get(self, pa: int) -> int:
        page = pa >> self.g.page << self.g.page
        return int(self.data[page][(pa - page) // 8])

    def put(self, pa: int, desc: int) -> None:
        page = pa >> self.g.page << self.g.page
        self.data[page][(pa - page) // 8] = desc

    def entry(self, ipa: int, level: int, *, make: bool = True) -> int | None:
        """Return the physical address of the entry of `level` for an IPA; None if a block is in the way."""
        at = self.root + 8 * (ipa >> self.g.shift(self.g.start))
        for above in range(self.g.start, level):
            desc = self.get(at)
            if not desc & VALID:
                if not make:
                    return None
                desc = self.with_junk(self.g.address(self.new_table()) | 3, above, table=True)
                self.put(at, desc)
            elif not desc & TYPE:
                return None
            index = ipa >> self.g.shift(above + 1) & self.g.entries - 1
            at = self.output(desc, self.g.page) + 8 * index
        return at

    def output(self, desc: int, shift: int) -> int:
        """Return the address in a descriptor."""
        low = (desc & (1 << 48) - 1) >> shift << shift
        if self.g.ds and self.g.pa == 52:
            low |= desc & 0b11 << 48 | (desc >> 8 & 0b11) << 50
        elif self.g.page == 16 and self.g.pa == 52:
            low |= (desc >> 12 & 0xF) << 48
        return low

    def leaf(self, ipa: int, level: int, flags: int, pa: int | None = None) -> bool:
        """Put a leaf, unless something is there already."""
        at = self.entry(ipa, level)
        if at is None or self.get(at) & VALID:
            return False
        shift = self.g.shift(level)
        if pa is None:
            pa = self.random.randrange(1 << self.g.pa) >> shift << shift
        desc = self.g.address(pa) | flags | 0b1111 << 2 | VALID | (TYPE if level == 3 else 0)
        if not self.g.ds:
            desc |= 0b11 << 8
        self.put(at, self.with_junk(desc, level, table=False))
        return True

    # --- reading, one page at a time: semantics of a stage-2 walk -------------------------------------------

    def walk(self, ipa: int) -> tuple[int, int] | None:
        """Return level and descriptor of the leaf that translates an IPA; None for a translation fault."""
        if ipa >> self.g.ipa:
            return None
        at = self.root + 8 * (ipa >> self.g.shift(self.g.start))
        for level in range(self.g.start, 4):
            desc = self.get(at)
            if not desc & VALID:
                return None
            if level == 3:
                return (3, desc) if desc & TYPE else None
            if not desc & TYPE:
                return (level, desc) if level in self.g.block_levels else None
            at = self.output(desc, self.g.page) + 8 * (ipa >> self.g.shift(level + 1) & self.g.entries - 1)
        raise AssertionError

    def dirty(self, ipa: int, *, writable: bool = False, contiguous: bool = False) -> bool:
        """Return whether the page at an IPA is dirty."""
        found = self.walk(ipa)
        wanted = VALID | S2AP_W | (0 if writable else DBM)
        if found is not None and found[1] & wanted == wanted:
            return True
        return contiguous and self._run_is_dirty(ipa, wanted)

    def _run_is_dirty(self, ipa: int, wanted: int) -> bool:
        for level, run in RUN[self.g.page].items():
            size = run << self.g.shift(level)
            first = ipa // size * size
            key = (level, first, wanted)
            if key not in self.runs:
                self.runs[key] = any(
                    found is not None and found[0] == level and found[1] & (wanted | CONT) == wanted | CONT
                    for found in map(self.walk, range(first, first + size, size // run))
                )
            if self.runs[key]:
                return True
        return False

    # --- files ------------------------------------------------------------------------------------------------

    def arrays(self, slots: list[tuple[int, int, int]]) -> dict[str, np.ndarray]:
        """Return the arrays of a capture; a slot is (id, gfn, pages), in 4 KiB."""
        pages = sorted(self.data)
        regs = [self.g.vttbr(self.root), self.g.vtcr, 0x8000_1001, 0x323_1020_1126, 0x110_1021_1122]
        return {
            "table_pa": np.array(pages, dtype=np.uint64),
            "table_data": np.array([self.data[pa] for pa in pages], dtype=np.uint64),
            "regs": np.array(regs, dtype=np.uint64),
            "memslots": np.array(slots, dtype=np.uint64).reshape(-1, 3),
        }

    def raw(self) -> tuple[int, bytes]:
        """Return the first address of an image of RAM, and the image."""
        first, last = min(self.data), max(self.data)
        image = bytearray(last - first + (1 << self.g.page))
        for pa, page in self.data.items():
            image[pa - first : pa - first + page.nbytes] = page.tobytes()
        return first, bytes(image)


def flags_of(kind: random.Random) -> int:
    """Return the flags of some leaf: every state, readable or not, young or old."""
    flags = kind.choice([0, DBM, S2AP_W, DBM | S2AP_W, DBM | S2AP_W])
    return flags | kind.choice([0, AF]) | kind.choice([0, 1 << 6]) | kind.choice([0, 0, CONT])


def populate(tables: Tables, slots: list[tuple[int, int, int]]) -> None:
    """Put leaves of all kinds in and around slots: pages, blocks, contiguous runs, holes."""
    g, kind = tables.g, tables.random
    for _, gfn, npages in slots:
        lo, hi = gfn << 12, gfn + npages << 12
        page = 1 << g.page
        pages = list(range(lo // page * page, hi, page))
        if kind.random() < 0.7:  # so that the blocks don't take it all
            for at in kind.sample(pages, kind.randrange(len(pages) + 1)):
                tables.leaf(at, 3, flags_of(kind))
        for level in g.block_levels:
            size = 1 << g.shift(level)
            for at in {kind.randrange(lo, hi) // size * size for _ in range(3)}:
                for block in (at, at + size):
                    if level >= g.start and block < 1 << g.ipa and kind.random() < 0.4:
                        tables.leaf(block, level, flags_of(kind))
        for at in pages:
            if kind.random() < 0.4:
                tables.leaf(at, 3, flags_of(kind))
