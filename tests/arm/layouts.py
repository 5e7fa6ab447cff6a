"""Stage-2 layouts of all shapes, with guests that write all of it: what the MMU of QEMU makes of them is the truth.

The firmware builds the tables, entry by entry, in C; the walk, the geometry and the verbs are the library's.
"""

import random
import time
from dataclasses import dataclass

import numpy as np
from synthetic import AF, CONT, DBM, RUN, S2AP_W, Geometry, geometries

from hwdbm import DirtyBitmap, pte
from hwdbm.arm.abi import RAM, GuestKind, Mapping
from hwdbm.arm.board import POOL, POOL_END, Board, TablePlan
from hwdbm.arm.guest import PRIVATE, PRIVATE_PA, Guests, Work, private_size, system_mappings
from hwdbm.image import Live, Registers
from hwdbm.vtcr import Vtcr

HA, HD = 1 << 21, 1 << 22
DATA = 0x8000_0000


@dataclass(frozen=True)
class Part:
    """Leaves of one kind: `count` of them, at a level, in runs of `run` that are one leaf each."""

    name: str
    level: int
    count: int
    flags: int = DBM
    run: int = 1


@dataclass(frozen=True)
class Case:
    """A geometry, with what is mapped in it."""

    g: Geometry
    parts: tuple[Part, ...]
    seed: int
    junk: bool = False
    scattered: bool = False
    off: int = 0  # bits of VTCR_EL2 that are clear: HA, HD

    def __str__(self):
        names = "+".join(part.name for part in self.parts)
        how = ("-junk" if self.junk else "") + ("-scattered" if self.scattered else "")
        off = {0: "", HA: "-ha-off", HD: "-hd-off"}[self.off]
        return f"{self.g}-{names}{how}{off}"


def parts_of(g):
    """Return the parts that a geometry can have, small ones first."""
    run = RUN[g.page][3]
    yield Part("pages", 3, 67)
    yield Part("old", 3, 9, flags=DBM | 1 << 63)  # bit 63 stands for: without AF
    yield Part("contiguous", 3, 3 * run, flags=DBM | CONT, run=run)
    yield Part("untracked", 3, 21, flags=S2AP_W)
    yield Part("read-only", 3, 5, flags=0)
    for level in g.block_levels:
        # A block lies in RAM as a whole, of which there are some GiB.
        if level >= g.start and level > 0 and g.shift(level) <= 30:
            yield Part(f"{(1 << g.shift(level)) >> 20}M", level, 2 if g.shift(level) < 29 else 1)
            runs = RUN[g.page].get(level, 1)
            # A run of the largest is 16 GiB, of which the guests touch some pages.
            if runs > 1 and g.shift(level) + runs.bit_length() - 1 <= min(34, g.ipa - 2):
                yield Part(f"{runs}x{(1 << g.shift(level)) >> 20}M", level, runs, flags=DBM | CONT, run=runs)


def cases():
    """Return every geometry that a machine with its guests fits into, each with some of the parts and variations."""
    found = []
    for g in geometries():
        if g.page == 14 and g.start == 0:  # QEMU 7.2 knows no 16K tables that start at level 0
            continue
        wanted = g.ipa in (32, 36, 39, 40, 42, 44) or (g.ds and g.ipa in (48, 52))
        if not wanted or g.ipa < 32:
            continue
        rng = random.Random(str(g))
        parts = list(parts_of(g))
        blocks = [part for part in parts if part.level < 3]
        some = rng.sample(parts[:5], 2) + (rng.sample(blocks, min(len(blocks), 2)) if blocks else [])
        if sum(part.count << g.shift(part.level) for part in some) > 3 << 29 and g.ipa == 32:
            some.pop()
        found.append(Case(g, tuple(some), len(found), junk=rng.random() < 0.5, scattered=rng.random() < 0.5))
    whole = Geometry(12, 1, 40)
    for off in (HA, HD):
        found.append(Case(whole, tuple(parts_of(whole))[:5], len(found), off=off))
    return found


QUICK = (
    Case(Geometry(12, 1, 36), (Part("pages", 3, 67), Part("2M", 2, 2), Part("1024M", 1, 1)), 1),
    Case(
        Geometry(14, 2, 40, ds=True, pa=52), (Part("contiguous", 3, 384, DBM | CONT, 128), Part("32M", 2, 2)), 2,
        junk=True,
    ),
    Case(Geometry(16, 2, 44), (Part("pages", 3, 67), Part("512M", 2, 1)), 3, scattered=True, junk=True),
    Case(
        Geometry(12, 0, 44), (Part("16x2M", 2, 16, DBM | CONT, 16), Part("old", 3, 9, DBM | 1 << 63),
        Part("untracked", 3, 21, S2AP_W), Part("read-only", 3, 5, 0)), 4, scattered=True,
    ),
    Case(Geometry(12, 1, 40), (Part("pages", 3, 67), Part("untracked", 3, 21, S2AP_W)), 5, off=HD),
)  # fmt: skip


class Machine:
    """A board with a case's tables, its guests, and the slot that they write."""

    def __init__(self, case):
        g, rng = case.g, random.Random(case.seed)
        self.case = case
        vtcr = Vtcr.decode(g.vtcr & ~case.off)
        top, pa, page = 1 << g.ipa, DATA, 1 << g.page
        self.places, mappings = [], []
        for part in sorted(case.parts, key=lambda part: part.level):
            size, align = part.count << g.shift(part.level), part.run << g.shift(part.level)
            top = (top - size) // align * align
            pa = -(-pa // align) * align
            junk = g.ignored(part.level, table=False) & rng.getrandbits(64) if case.junk else 0
            if part.run > 1:
                junk &= ~CONT
            mappings.append(Mapping(top, pa, size, part.level, self.leaf(part, junk)))
            self.places.append((part, top, size))
            pa += size
        self.base = self.places[-1][1]
        self.npages = (1 << g.ipa) - self.base >> g.page
        # Not the first page of it: a slot may begin anywhere.
        vcpus = len(self.places)
        bits = vtcr.address_bits
        mappings += system_mappings(vtcr.granule, bits)
        private = private_size(self.npages, vcpus)
        mappings.append(Mapping(PRIVATE, PRIVATE_PA, private, 3, pte.make_leaf(0, 3, bits=bits)))
        plan = TablePlan(vtcr, tuple(mappings))
        if case.scattered:
            places = np.arange(plan.root_end, POOL_END, page, dtype=np.uint64)
            plan = TablePlan(
                vtcr, tuple(mappings), tables=np.random.default_rng(case.seed).permutation(places), root=POOL
            )
        if case.junk:
            table = g.ignored(2, table=True) & rng.getrandbits(64)
            plan = TablePlan(vtcr, plan.mappings, tables=plan.tables, junk=rng.getrandbits(64), table_bits=table)
        self.board = Board((pa - RAM + (1 << 20) - 1) >> 20 << 20, plan, vcpus=vcpus)
        self.guests = Guests(self.board, self.base, self.npages, g.page)
        kinds = [GuestKind.RANDOM, GuestKind.SEQUENTIAL, GuestKind.WINDOW]
        self.guests.give(
            tuple(
                Work(kinds[number % 3], start, size, seed=case.seed, skip=True, window=16)
                for number, (_, start, size) in enumerate(self.places)
            )
        )
        box = self.board.mailbox
        self.live = Live(self.board.ram.words, RAM, Registers(box.vttbr, box.vtcr))
        self.s2 = self.live.stage2(self.base >> g.page, self.npages)

    def leaf(self, part, junk):
        """All of a leaf but its address."""
        bits = part.flags & ~(1 << 63) | 0b1111 << 2 | 1 << 6 | (0 if part.flags >> 63 else AF)
        shareable = 0 if self.case.g.ds else 0b11 << 8
        return bits | shareable | junk | (3 if part.level == 3 else 1)

    def widened(self, pages):
        """Return the pages of the leaves, contiguous runs among them, that some pages are of."""
        wide = pages.copy()
        for part, start, size in self.places:
            first, count = start - self.base >> self.case.g.page, size >> self.case.g.page
            leaf = part.run << self.case.g.shift(part.level) - self.case.g.page
            some = pages[first : first + count].reshape(-1, leaf)
            wide[first : first + count] = np.repeat(some.any(axis=1), leaf)
        return wide

    def of(self, flags):
        """Return a mask of the pages whose part has all of some flags."""
        mask = np.zeros(self.npages, dtype=bool)
        for part, start, size in self.places:
            if part.flags & flags == flags and part.flags & (DBM | S2AP_W):
                first = start - self.base >> self.case.g.page
                mask[first : first + (size >> self.case.g.page)] = True
        return mask

    def round(self, harvests=2, stores=1500):
        """Run, harvest meanwhile and at the end; return what was written, and what was found, as masks."""
        before, start = self.guests.counts(), self.guests.stores
        found = DirtyBitmap(self.npages)
        self.board.run()
        until = time.monotonic() + 1.0  # all may be faults
        for number in range(harvests):
            while self.guests.stores - start < stores * (number + 1) and time.monotonic() < until:
                time.sleep(0.0005)
            found |= self.s2.harvest()
            self.board.flush()
        self.board.stop()
        found |= self.s2.harvest()
        self.board.flush()
        marked = np.unpackbits(found.words.view(np.uint8), bitorder="little")[: self.npages].astype(bool)
        return self.guests.counts() != before, marked


def judge(case):
    """Run a case, and raise AssertionError if a harvest and the truth differ; return stores."""
    machine = Machine(case)
    with machine.board:
        s2 = machine.s2
        tracked, untracked, read_only = machine.of(DBM), machine.of(S2AP_W), s2.scan(pte.read_only)
        assert s2.scan(pte.tracked).weight() == tracked.sum()
        assert s2.scan(pte.untracked).weight() == untracked.sum()
        machine.board.start()
        for armed in (False, True):
            if armed:
                s2.enable_dbm()
                machine.board.flush()
                tracked, untracked = tracked | untracked, np.zeros_like(untracked)
            for _ in range(2):
                written, marked = machine.round()
                if case.off:  # no leaf with DBM is ever written, and nothing is recorded
                    assert not marked.any()
                    assert not (written & tracked).any()
                    assert written.any() or armed
                    continue
                assert not (written & tracked & ~marked).any(), "a page was missed"
                assert not (marked & ~machine.widened(written & tracked)).any(), "a page was marked that wasn't written"
                assert not (written & ~tracked & ~untracked).any()
                # All of what could be written was, if it is small; some of the rest.
                for part, start, size in machine.places:
                    first, count = start - machine.base >> case.g.page, size >> case.g.page
                    if part.flags & (DBM | S2AP_W):
                        assert written[first : first + count].any(), part
        assert s2.scan(pte.read_only) == read_only
        s2.verify()
        machine.live.refresh()
        assert not s2.dirty().any()
        return machine.guests.stores
