"""Tests for other projects: Hypothesis strategies for leaf arrays, and a state machine that uses them.

Needs the extra ``testing``. The machine is meant to be subclassed: give it another `Stage2Machine.stage2_type`, or
override a rule, and it says whether the invariants of the model still hold.
"""

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from numpy.typing import NDArray

from hwdbm import pte, walker
from hwdbm.bitmap import DirtyBitmap
from hwdbm.granule import Granule
from hwdbm.stage2 import Stage2
from hwdbm.walker import Access

__all__ = ["Stage2Machine", "bitmaps", "differences", "ragged", "slots", "stage2s"]

JUNK = 0b11111 << 58 | 0b1111 << 55 | 0b1111 << 2  # ignored by hardware, software's, and the memory attributes
RAGGED = (1, 63, 64, 65, 511, 512, 513)


def ragged(most: int) -> st.SearchStrategy[int]:
    """Return a strategy for sizes of 1 to `most` pages that likes the ragged ones, around 64 and 512."""
    return st.sampled_from([n for n in RAGGED if n <= most]) | st.integers(1, most)


@st.composite
def slots(draw: st.DrawFn, granule: Granule = Granule.K4, most: int = 1600) -> Stage2:
    """Return a strategy for empty slots of `granule`: ragged sizes, bases in any alignment."""
    stripe = granule.pages_per_entry(2)
    base = draw(st.integers(0, 3)) * stripe + draw(st.sampled_from([0, 1, 63, 64, 291, stripe - 1]))
    return Stage2(draw(ragged(most)), base, granule)


@st.composite
def stage2s(draw: st.DrawFn, granule: Granule = Granule.K4, most: int = 1600) -> Stage2:
    """Return a strategy for slots in any state that tables can be in.

    Stripes are holes, blocks or tables, or the whole lies in a level-1 block; leaves are in each of the four states,
    young and old, contiguous or not, with junk in the bits that hardware ignores, and among them are invalid entries
    that look dirty.
    """
    s2 = draw(slots(granule, most))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shift = granule.page_shift
    if 1 in granule.block_levels() and draw(st.integers(0, 9)) == 0:
        s2.level(1)[:] = _leaves(rng, 1, np.zeros(s2.level(1).size, dtype=np.uint64))
        return s2
    kinds = rng.choice(["hole", "block", "table", "alike"], s2.level(2).size, p=draw(st.sampled_from(MIXES)))
    s2.level(1)[:] = pte.TABLE
    for index, kind in enumerate(kinds):
        start, stop = s2.layout.span(2, index)
        frames = np.arange(max(start, 0), min(stop, s2.npages))
        address = (frames - start + granule.pages_per_entry(2) * (index + 1)).astype(np.uint64) << np.uint64(shift)
        if kind == "block":
            s2.level(2)[index] = _leaves(
                rng, 2, address[:1] >> np.uint64(granule.shift(2)) << np.uint64(granule.shift(2))
            )[0]
        elif kind in ("table", "alike"):
            s2.level(2)[index] = pte.make_table(int(rng.integers(1, 1 << 20)) << shift)
            s2.level(3)[frames] = _alike(rng, address) if kind == "alike" else _leaves(rng, 3, address, absent=True)
    return s2


MIXES = ([0.25, 0.25, 0.25, 0.25], [0.1, 0.1, 0.8, 0.0], [0.1, 0.8, 0.1, 0.0], [0.0, 0.1, 0.0, 0.9])
_DENSITIES = (0.0, 0.01, 0.5, 1.0)  # of the pages of a bitmap


def bitmaps(npages: int) -> st.SearchStrategy[DirtyBitmap]:
    """Return a strategy for bitmaps of `npages` pages: none, all, runs, and any."""

    def some(parts: tuple[int, float, list[int]]) -> DirtyBitmap:
        seed, density, edges = parts
        pages = np.flatnonzero(np.random.default_rng(seed).random(npages) < density)
        bitmap = DirtyBitmap.from_pages(pages, npages)
        for a, b in zip(edges[::2], edges[1::2], strict=False):
            bitmap.set_range(min(a, b), abs(a - b))
        return bitmap

    return st.tuples(
        st.integers(0, 999), st.sampled_from(_DENSITIES), st.lists(st.integers(0, npages), max_size=4)
    ).map(some)


def differences(one: Stage2, other: Stage2) -> list[str]:
    """Return in what the leaves, saved pages or host flags of two Stage2 differ: a line a kind, none if equal."""
    lines = []
    for level in (1, 2, 3):
        (wrong,) = (one.level(level) != other.level(level)).nonzero()
        if wrong.size:
            pair = [pte.describe(int(s2.level(level)[wrong[0]]), level) for s2 in (one, other)]
            lines.append(f"level {level}[{wrong[0]}] and {wrong.size - 1} more: {pair[0]} is not {pair[1]}")
    for name, a, b in (
        ("saved", one.saved.bitmap, other.saved.bitmap),
        ("host_dirty", one.host_dirty, other.host_dirty),
    ):
        if a != b:
            lines.append(f"{name} differs at {(a ^ b).ranges().tolist()[:3]}")
    return lines


def _leaves(
    rng: np.random.Generator, level: int, address: NDArray[np.uint64], *, absent: bool = False
) -> NDArray[np.uint64]:
    """Return a leaf for each address, each in a state of its own."""
    size = address.size
    desc = pte.make_leaf(address, level)
    for bit in (pte.S2AP_W, pte.DBM, pte.AF, pte.CONTIGUOUS):
        desc ^= rng.integers(0, 2, size, dtype=np.uint64) * np.uint64(bit)
    desc ^= rng.integers(0, 1 << 63, size, dtype=np.uint64) & np.uint64(JUNK & (1 << 63) - 1)
    if absent:
        desc &= ~(rng.random(size) < 0.2).astype(np.uint64)  # invalid, whatever the other bits look like
    return desc


def _alike(rng: np.random.Generator, address: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return leaves that a collapse may take together, at times but for one."""
    dbm = bool(rng.integers(2))
    desc = pte.make_leaf(address, 3, writable=dbm or bool(rng.integers(2)), dbm=dbm)
    if dbm:
        desc |= rng.integers(0, 2, desc.size, dtype=np.uint64) * np.uint64(pte.S2AP_W)
    desc ^= rng.integers(0, 2, desc.size, dtype=np.uint64) * np.uint64(pte.AF)
    if rng.integers(3) == 0:
        desc[rng.integers(desc.size)] ^= rng.choice(np.array([1, 1 << 12, 1 << 55, 1 << 51], dtype=np.uint64))
    return desc


# --- the state machine ----------------------------------------------------------------------------------------

PART = st.tuples(st.integers(0, 12), st.integers(0, 12))  # twelfths of the slot, scaled to it when a rule runs
PLACES = st.lists(st.integers(0, 2**16), max_size=6)  # pages, modulo the slot's


class Stage2Machine(RuleBasedStateMachine):
    """A guest that writes through a TLB, a migration that copies, a host that takes its flags, and every verb.

    The rules drive a Stage2 and, in step, the walker on a twin of it. Guest memory is a version a page; a copy of it
    is made as a migration would make one. The invariants are those of the model: what the guest wrote and the copy
    hasn't got is dirty somewhere (no lost write, saved on replace, consumer failure is safe), only pages that the host
    let be written can be (read-only stays), a written page reaches the host's flag (two consumers), a verb changes
    the leaves it was given and their three bits (mask-exact), the twin agrees in every descriptor (stripe = pages),
    and ``verify()`` passes (clean tail).

    Attributes
    ----------
    stage2_type : type
        The implementation under test.
    granule : Granule
        The size of a page.
    most : int
        Pages of the largest slot.
    compare : bool
        Whether the walker's twin is kept. Without it the other invariants stand alone.

    Examples
    --------
    >>> class MyStage2(Stage2):
    ...     pass
    >>> class MyMachine(Stage2Machine):
    ...     stage2_type = MyStage2
    >>> TestMine = MyMachine.TestCase  # for pytest or unittest to collect
    """

    stage2_type: type[Stage2] = Stage2
    granule: Granule = Granule.K4
    most: int = 1600
    compare: bool = True

    @initialize(data=st.data())
    def create(self, data: st.DataObject) -> None:
        """Start with tables in any state; what they let the guest write is what the host lets it write."""
        start = data.draw(stage2s(self.granule, self.most), label="slot")
        size = start.npages
        self.s2 = self.stage2_type(size, start.base_gfn, self.granule)
        self.twin = start
        for level in (1, 2, 3):
            self.s2.level(level)[:] = start.level(level)
        self.memory = np.zeros(size, dtype=np.int64)  # a version a page
        self.copied = np.zeros(size, dtype=np.int64)  # what the migration has sent
        self.log = DirtyBitmap(size)  # the migration's bitmap: harvested, and not sent yet
        self.allowed = self.s2.scan(pte.tracked) | self.s2.writable()  # pages that the host lets the guest write
        self.host_written = DirtyBitmap(size)  # written, and not yet taken by the host
        self.tlb: set[int] = set()  # pages whose leaf is cached as one that may be written: not rechecked

    # --- helpers -------------------------------------------------------------------------------------------

    def pages(self, part: tuple[int, int], size: int = 1) -> tuple[int, int]:
        """Return a drawn part of the slot as (gfn, npages), outward to leaves of `size` pages where they fit."""
        low, high = (self.s2.npages * twelfth // 12 + self.s2.base_gfn for twelfth in sorted(part))
        start, stop = low // size * size, -(-high // size) * size
        end = self.s2.base_gfn + self.s2.npages
        start += size if start < self.s2.base_gfn else 0
        stop -= size if stop > end else 0
        return start, max(0, stop - start)

    def page(self, place: int) -> int:
        """Return a drawn page of the slot."""
        return place % self.s2.npages

    def both(self, verb: str, *args: object, **kwargs: object) -> None:
        """Run a verb on the Stage2, and the walker's on the twin; compare what they return; flush the TLB."""
        got = getattr(self.s2, verb)(*args, **kwargs)
        if self.compare:
            want = getattr(walker, verb)(self.twin, *args, **kwargs)
            assert got == want, f"{verb}{args} returned {got}, the walker {want}"
        self.tlb.clear()

    def copy_out(self, pages: DirtyBitmap) -> None:
        """Send pages: the destination has their content, and they are no longer waiting."""
        index = pages.pages()
        self.copied[index] = self.memory[index]

    # --- mapping -------------------------------------------------------------------------------------------

    @rule(part=PART, frame=st.integers(0, 9), level=st.sampled_from([2, 3]), kind=st.sampled_from([0, 1, 2, 2]))
    def map(self, part: tuple[int, int], frame: int, level: int, kind: int) -> None:
        """Map pages or blocks: read-only, untracked or writable-clean."""
        size = self.granule.pages_per_entry(level)
        gfn, npages = self.pages(part, size)
        lo = gfn - self.s2.base_gfn
        if npages:
            aligned = self.granule.pages_per_entry(2)
            self.both("map", gfn, npages, frame * aligned + gfn % aligned, level, kind > 0, dbm=kind == 2)
            self.allowed.set_range(lo, npages, kind > 0)

    @rule(part=PART)
    def unmap(self, part: tuple[int, int]) -> None:
        """Unmap a range."""
        gfn, npages = self.pages(part)
        self.both("unmap", gfn, npages)
        self.allowed.set_range(gfn - self.s2.base_gfn, npages, False)

    @rule(part=PART)
    def wrprotect(self, part: tuple[int, int]) -> None:
        """Make a range read-only."""
        gfn, npages = self.pages(part)
        self.both("wrprotect", gfn, npages)
        self.allowed.set_range(gfn - self.s2.base_gfn, npages, False)

    @rule(part=PART, verb=st.sampled_from(["split", "collapse", "mkold", "mkyoung", "set_dbm", "clear_dbm"]))
    def change(self, part: tuple[int, int], verb: str) -> None:
        """Split, collapse, age, or change DBM in a range."""
        self.both(verb, *self.pages(part))

    @rule(enable=st.booleans())
    def switch(self, enable: bool) -> None:
        """Switch the recording of writes on or off for the whole slot."""
        self.both("enable_dbm" if enable else "disable_dbm")

    # --- the guest -----------------------------------------------------------------------------------------

    @rule(places=PLACES)
    def write(self, places: list[int]) -> None:
        """Write a few pages."""
        for place in places:
            self.store(self.page(place))

    @rule(part=PART)
    def write_run(self, part: tuple[int, int]) -> None:
        """Write up to 70 pages in a row, the last ones of a range."""
        gfn, npages = self.pages(part)
        stop = gfn - self.s2.base_gfn + npages
        for page in range(stop - min(npages, 70), stop):
            self.store(page)

    @rule(place=st.integers(0, 2**16))
    def read(self, place: int) -> None:
        """Read a page, which may set its access flag and nothing else."""
        gfn = self.s2.base_gfn + self.page(place)
        walker.guest_read(self.s2, gfn)
        walker.guest_read(self.twin, gfn)

    def store(self, page: int) -> None:
        """Write a page as a vCPU does: through the TLB if the leaf is cached as dirty, else through the tables."""
        gfn = self.s2.base_gfn + page
        if page not in self.tlb:
            if walker.guest_write(self.s2, gfn) is not Access.DONE:
                return
            walker.guest_write(self.twin, gfn)
            self.tlb.add(page)
        self.memory[page] += 1
        self.host_written.set_range(page, 1)
        if page in self.s2.scan(pte.untracked):
            self.copied[page] = self.memory[page]  # nothing records it: the log has no duty here

    # --- the consumers -------------------------------------------------------------------------------------

    @rule(part=PART, during=PLACES, fails=st.booleans())
    def migrate(self, part: tuple[int, int], during: list[int], fails: bool) -> None:
        """Harvest a range, flush, copy; the guest writes before the flush, and the sending may fail."""
        gfn, npages = self.pages(part)
        first = gfn - self.s2.base_gfn
        before = {level: self.s2.level(level).copy() for level in (1, 2, 3)}
        self.log |= self.s2.harvest(None, first, npages)
        if self.compare:
            walker.harvest(self.twin, None, first, npages)
        inside = DirtyBitmap(self.s2.npages)
        inside.set_range(first, npages)
        self.only_changed(before, inside)
        self.finish(self.log.copy(), during, fails)

    @rule(mask=st.data(), during=PLACES)
    def clear(self, mask: st.DataObject, during: list[int]) -> None:
        """Re-protect the pages of a mask, as KVM_CLEAR_DIRTY_LOG does, flush, and copy them."""
        pages = mask.draw(bitmaps(self.s2.npages), label="mask")
        before = {level: self.s2.level(level).copy() for level in (1, 2, 3)}
        got = self.s2.clean(pages)
        if self.compare:
            assert got == walker.clean(self.twin, pages)
        self.only_changed(before, pages)
        self.finish(pages, during, fails=False)

    def finish(self, pages: DirtyBitmap, during: list[int], fails: bool) -> None:
        """Flush what was re-protected, then copy `pages`; where the sending fails they keep waiting."""
        for place in during:
            if self.page(place) in self.tlb:  # a stale entry: the write is recorded nowhere
                self.store(self.page(place))
        for page in sorted(self.tlb)[:2]:
            self.store(page)
        self.tlb.clear()
        if not fails:
            self.copy_out(pages)
            self.log -= pages

    @rule()
    def host_takes(self) -> None:
        """Let the host take its dirty flags and write the pages back."""
        self.host_written -= self.s2.take_host_dirty()
        if self.compare:
            self.twin.take_host_dirty()

    # --- invariants ----------------------------------------------------------------------------------------

    def only_changed(self, before: dict[int, NDArray[np.uint64]], mask: DirtyBitmap) -> None:
        """Check that cleaning a mask changed S2AP[1] alone, and in no leaf without a page in the mask."""
        for level, old in before.items():
            changed = old ^ self.s2.level(level)
            assert not (changed & np.uint64(~pte.S2AP_W & (1 << 64) - 1)).any(), "cleaning changed other bits"
            for index in changed.nonzero()[0].tolist():
                start, stop = self.s2.layout.span(level, index)
                inside = range(max(start, 0), min(stop, self.s2.npages))
                assert any(page in mask for page in inside), f"level {level}[{index}] is outside of the mask"

    @precondition(lambda self: hasattr(self, "s2"))
    @invariant()
    def no_lost_write(self) -> None:
        """Check that what the guest wrote and the copy hasn't got is dirty, saved, or waiting to be sent."""
        stale = DirtyBitmap.from_pages(np.flatnonzero(self.memory != self.copied), self.s2.npages)
        lost = stale - (self.log | self.s2.dirty())
        assert not lost.any(), f"lost writes to pages {lost.ranges().tolist()}"

    @precondition(lambda self: hasattr(self, "s2"))
    @invariant()
    def read_only_stays(self) -> None:
        """No leaf lets the guest write a page that the host doesn't."""
        granted = (self.s2.scan(pte.tracked) | self.s2.writable()) - self.allowed
        assert not granted.any(), f"pages {granted.ranges().tolist()} can be written, and may not"

    @precondition(lambda self: hasattr(self, "s2"))
    @invariant()
    def two_consumers(self) -> None:
        """Check that a written page is flagged for the host, or that its leaf still says so."""
        told = self.s2.host_dirty | self.s2.dirty() | self.s2.scan(pte.untracked)
        missed = self.host_written - told
        assert not missed.any(), f"the host doesn't know of pages {missed.ranges().tolist()}"

    @precondition(lambda self: hasattr(self, "s2"))
    @invariant()
    def sound(self) -> None:
        """Check that the arrays are well-formed, tails clean, and the walker's twin the same in every descriptor."""
        self.s2.verify()
        if self.compare:
            found = differences(self.s2, self.twin)
            assert not found, "; ".join(found)
