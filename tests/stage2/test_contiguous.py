"""Contiguous runs as one leaf: every verb against the walker, and literals."""

import inspect
from itertools import pairwise, product

import numpy as np
import pytest
from effort import EFFORT
from hypothesis import given, settings
from hypothesis import strategies as st
from steppedkernel import SteppedKernel

from hwdbm import DirtyBitmap, Granule, Stage2, pte, walker
from hwdbm.errors import GfnError
from hwdbm.kernels import vector
from hwdbm.pte import State
from hwdbm.stage2.leaves import Leaves
from hwdbm.testing import bitmaps, differences, stage2s

CONT = np.uint64(pte.CONTIGUOUS)
DIRTY = np.uint64(pte.S2AP_W)
RANGE_VERBS = ("unmap", "split", "collapse", "wrprotect", "set_dbm", "clear_dbm", "mkold", "test_clear_young")
WHOLE_VERBS = ("dirty", "enable_dbm", "disable_dbm", "harvest")


def compare(s2, verb, *args):
    twin = s2.copy()
    assert twin.contiguous
    got, want = getattr(s2, verb)(*args), getattr(walker, verb)(twin, *args)
    assert got == want
    assert differences(s2, twin) == []
    s2.verify()
    return got


@st.composite
def runs(draw, granule=Granule.K4, most=1600):
    """Draw tables in any state, with fewer dirty leaves, so that a run is dirty for one of them."""
    s2 = draw(stage2s(granule, most))
    s2.contiguous = True
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    for level in (1, 2, 3):
        entries = s2.level(level)
        clean = pte.dirty(level)(entries) & (rng.random(entries.size) < draw(st.sampled_from([0, 0.9])))
        entries[clean] &= ~DIRTY
    return s2


@pytest.mark.parametrize("verb", [*RANGE_VERBS, *WHOLE_VERBS, "clean", "enable_dbm in a mask", "parts"])
@pytest.mark.alike(3)
def test_verb_equals_the_walkers(kernels, verb):
    @settings(max_examples=6 * EFFORT)
    @given(runs(), st.data())
    def check(s2, data):
        if verb in WHOLE_VERBS:
            compare(s2, verb)
        elif verb == "clean":
            compare(s2, "clean", data.draw(bitmaps(s2.npages)))
            compare(s2, "harvest")
        elif verb == "enable_dbm in a mask":
            compare(s2, "enable_dbm", data.draw(bitmaps(s2.npages)))
        elif verb == "parts":
            cuts = [0, *sorted(data.draw(st.lists(st.integers(0, s2.npages), max_size=3))), s2.npages]
            whole, parts = s2.copy().harvest(), DirtyBitmap(s2.npages)
            for first, stop in pairwise(cuts):
                parts |= compare(s2, "harvest", None, first, stop - first)
            parts |= s2.harvest()  # what a part kept for one before it
            assert parts == whole
            assert not s2.harvest().any()
        else:
            first = data.draw(st.integers(0, s2.npages))
            compare(s2, verb, s2.base_gfn + first, data.draw(st.integers(0, s2.npages - first)))

    check()


@pytest.mark.parametrize("granule", [Granule.K16, Granule.K64], ids=str)
@pytest.mark.parametrize("verb", ["harvest", "dirty", "unmap"])
def test_other_granules(granule, verb):
    @settings(max_examples=3 * EFFORT)
    @given(runs(granule, 9000), st.integers(0, 9000))
    def check(s2, first):
        first = min(first, s2.npages)
        compare(s2, verb, *([s2.base_gfn + first, s2.npages - first] if verb == "unmap" else []))

    check()


def slot(level=3, **options):
    size = Granule.K4.pages_per_entry(level)
    s2 = Stage2(64 * size, contiguous=True, **options)
    s2.map(0, 64 * size, pfn=0, level=level, dbm=True)
    s2.level(level)[16:48] |= CONT
    return s2, size


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("level", [2, 3])
def test_a_write_marks_any_one_of_a_run(level, shared):
    s2, size = slot(level, shared=shared)
    s2.level(level)[20] |= DIRTY
    s2.level(level)[5] |= DIRTY
    wide = [[5 * size, size], [16 * size, 16 * size]]
    assert s2.dirty().ranges().tolist() == wide
    out = DirtyBitmap(s2.npages)
    s2.peek_into(out)
    assert out.ranges().tolist() == wide
    assert s2.harvest().ranges().tolist() == wide
    assert s2.host_dirty.ranges().tolist() == wide
    assert not s2.harvest().any()


@pytest.mark.parametrize("level", [2, 3])
def test_a_part_of_a_run(level):
    """A harvest of a part reports its pages of the run, and keeps the others: the run is clean as a whole."""
    s2, size = slot(level)
    s2.level(level)[20] |= DIRTY
    out = DirtyBitmap(s2.npages)
    assert s2.peek_into(out, 24 * size, size).changed == 0
    assert out.ranges().tolist() == [[24 * size, size]]
    assert s2.harvest(None, 24 * size, size).ranges().tolist() == [[24 * size, size]]
    assert not pte.dirty(level)(s2.level(level)).any()
    assert s2.harvest().ranges().tolist() == [[16 * size, 8 * size], [25 * size, 7 * size]]


def test_clean_of_a_page_cleans_its_run():
    s2, _ = slot()
    s2.level(3)[[20, 33]] |= DIRTY
    assert s2.clean(DirtyBitmap.from_pages([17], 64)) == 1
    assert s2.harvest().ranges().tolist() == [[16, 1], [18, 30]]


def test_a_replacement_takes_the_run_apart():
    s2, _ = slot()
    s2.level(3)[20] |= DIRTY
    s2.unmap(30, 1)
    assert (s2.level(3) & CONT != 0).nonzero()[0].tolist() == list(range(32, 48))
    assert s2.harvest().ranges().tolist() == [[16, 16]]
    s2.level(3)[20] |= DIRTY
    assert s2.harvest().ranges().tolist() == [[20, 1]]


@pytest.mark.parametrize("verb", ["track_part", "wrprotect_part"])
def test_a_part_takes_apart_the_runs_that_it_touches_and_no_others(verb):
    """A part that doesn't begin with the slot: what a run recorded by one leaf is saved for all of its pages."""
    s2 = Stage2(192, contiguous=True)
    s2.map(0, 192, pfn=0, dbm=True)
    for start in (16, 80, 144):
        s2.level(3)[start : start + 16] |= np.uint64(pte.CONTIGUOUS)
    s2.level(3)[84] |= np.uint64(pte.S2AP_W)
    out = DirtyBitmap(192)
    getattr(s2, verb)(DirtyBitmap.from_pages([21], 64), first=64, out=out)
    kept = np.flatnonzero(s2.level(3) & np.uint64(pte.CONTIGUOUS))
    assert kept.tolist() == [*range(16, 32), *range(144, 160)]
    assert (s2.dirty() | s2.host_dirty | out).pages().tolist() == list(range(80, 96))


@pytest.mark.parametrize("level", [2, 3])
@pytest.mark.parametrize("shared", [False, True])
def test_what_a_part_keeps_of_a_run_is_there_for_each_page(shared, level):
    """Whichever part of a run is harvested first, each of its other leaves is harvested by itself after it."""
    size = Granule.K4.pages_per_entry(level)
    for first, count in ((0, 1), (3, 5), (15, 1), (1, 15), (8, 8)):
        s2 = Stage2(16 * size, contiguous=True, shared=shared)
        s2.map(0, 16 * size, pfn=0, level=level, dbm=True)
        s2.level(level)[:] |= CONT
        s2.harvest()  # what was saved before is taken
        s2.level(level)[7] |= DIRTY
        assert s2.harvest(None, first * size, count * size).ranges().tolist() == [[first * size, count * size]]
        for each in {*range(16)} - {*range(first, first + count)}:
            assert s2.copy().harvest(None, each * size, 1).pages().tolist() == [each * size]
        assert s2.harvest().weight() == (16 - count) * size


@pytest.mark.parametrize(
    ("page", "level", "apart"), [(20, 3, (16, 32)), (40, 3, (32, 48)), (16 * 512 + 20, 2, (16, 32)), (60, 3, ())]
)
@pytest.mark.parametrize("verb", ["relax_at", "allow_at", "mkyoung_at"])
def test_pages_take_apart_the_runs_of_their_own_leaves(verb, page, level, apart):
    """Runs of leaves and of blocks beside each other: an entry's number at one level is none at another."""
    s2 = Stage2(64 * 512, contiguous=True)
    s2.map(0, 16 * 512, pfn=0)
    s2.map(16 * 512, 48 * 512, pfn=16 * 512, level=2)
    for each in (2, 3):
        s2.level(each)[16:48] |= CONT
    before = {each: s2.level(each) & CONT for each in (2, 3)}
    if verb != "mkyoung_at":
        before[level][slice(*apart) if apart else slice(0)] = 0
    getattr(s2, verb)(np.array([page]))
    for each in (2, 3):
        assert np.array_equal(s2.level(each) & CONT, before[each])


# --- whoever sets the bit, beside a verb ----------------------------------------------------------------------

RUN = range(16, 32)
JOINED = {
    "harvest": lambda s2, mask: s2.harvest(),
    "a part's harvest": lambda s2, mask: s2.harvest(None, 0, 20),
    "peek": lambda s2, mask: peek(s2),
    "clean": lambda s2, mask: s2.clean(mask),
    "track_part": lambda s2, mask: s2.track_part(mask),
    "wrprotect_part": lambda s2, mask: s2.wrprotect_part(mask),
    "enable_dbm": lambda s2, mask: s2.enable_dbm(mask),
    "disable_dbm": lambda s2, mask: s2.disable_dbm(),
    "wrprotect": lambda s2, mask: s2.wrprotect(3, 20),
    "clear_dbm": lambda s2, mask: s2.clear_dbm(20, 1),
    "set_dbm": lambda s2, mask: s2.set_dbm(20, 1),
    "mkold": lambda s2, mask: s2.mkold(),
}
SETTLED = {  # the states of the leaves that were to be changed; those that are tracked may be written at once
    "track_part": {State.WRITABLE_CLEAN, State.WRITABLE_DIRTY},
    "enable_dbm": {State.WRITABLE_CLEAN, State.WRITABLE_DIRTY},
    "disable_dbm": {State.UNTRACKED},
    "wrprotect_part": {State.READ_ONLY},
    "wrprotect": {State.READ_ONLY},
    "clear_dbm": {State.READ_ONLY},
}


def peek(s2):
    out = DirtyBitmap(s2.npages)
    s2.peek_into(out, 0, 20)
    return out


class Kernel(SteppedKernel):
    """Each pass ends with a step, too: one that finds nothing has no other."""

    def __init__(self, hook):
        super().__init__(hook)
        self.find = self.then(vector.find)
        self.rewrite_at, self.rewrite_within = self.then(super().rewrite_at), self.then(super().rewrite_within)

    def then(self, work):
        def both(*arguments, **options):
            got = work(*arguments, **options)
            self.hook()
            return got

        return both


class Host:
    """At some steps of a verb, the host makes leaves a run, from `first` on, and the guest writes by one `entry`.

    By an entry that has the bit it writes the whole run. An entry that isn't tracked records nothing, and without the
    permission nothing is written.
    """

    def __init__(self, s2, steps, entry, first):
        self.s2, self.steps, self.entry, self.first = s2, steps, entry, first
        self.written, self.recorded, self.step = set(), set(), 0

    def __call__(self):
        if self.step in self.steps:
            self.join()
        self.step += 1

    def join(self):
        entries = self.s2.level(3)
        entries[self.first : RUN.stop] |= CONT
        desc = int(entries[self.entry])
        pages = RUN if desc & pte.CONTIGUOUS else [self.entry]
        if desc & pte.DBM:
            entries[self.entry] |= DIRTY
            self.recorded.update(pages)
        if desc & (pte.DBM | pte.S2AP_W):
            self.written.update(pages if desc & pte.DBM else [self.entry])


def joined(verb, steps, entry, first, dbm, dirty):
    """Check what a verb leaves, at some steps of which a run is made; return how many steps it has."""
    s2 = Stage2(40, contiguous=True)
    s2.map(0, 40, pfn=0, dbm=dbm)
    s2.level(3)[RUN.start : RUN.stop] |= CONT
    s2.level(3)[dirty] |= DIRTY
    host = Host(s2, steps, entry, first)
    s2._leaves._kernels = Kernel(host)
    mask = DirtyBitmap.from_pages([3, 18, 20, 21], 40)
    got = JOINED[verb](s2, mask)
    s2._leaves._kernels = vector
    copied = (
        got if isinstance(got, DirtyBitmap) else mask if verb in ("clean", "track_part", "wrprotect_part") else None
    )
    known = s2.dirty() if copied is None else s2.dirty() | copied
    host_knows = s2.host_dirty | s2.dirty() | s2.writable()
    lost = host.recorded - set(known.pages().tolist())
    assert not lost, f"lost: {sorted(lost)}"
    untold = host.written - set(host_knows.pages().tolist())
    assert not untold, f"the host doesn't know of {sorted(untold)}"
    if verb in SETTLED:
        asked = {"wrprotect": range(3, 23), "clear_dbm": [20], "disable_dbm": range(40)}.get(
            verb, mask.pages().tolist()
        )
        states = {pte.state(int(s2.level(3)[page]), 3) for page in asked}
        assert states <= (SETTLED[verb] if dbm or verb != "clear_dbm" else {State.UNTRACKED}), f"escaped: {states}"
    return host.step


# The entry of a run that the guest writes by (its first, one in it, its last), and how far apart the steps are: each of
# them once, and each with each in `make thorough`.
PLACES = [*product((16, 20, 31), (0, 1, 7))] if EFFORT > 1 else [(16, 0), (20, 1), (31, 7)]


@pytest.mark.parametrize("verb", JOINED)
@pytest.mark.alike(3)
def test_a_run_that_is_made_beside_a_verb(verb):
    for entry, apart, dbm, dirty in (
        (20, 0, True, 20),
        (20, 0, False, 2),
        *((*place, True, 2) for place in PLACES),
    ):
        step, count = 0, 1
        while step < count:
            count = joined(verb, {step, step + apart}, entry, 16 + apart % 4, dbm, dirty)
            step += 1


@pytest.mark.parametrize("verb", SETTLED)
def test_a_run_that_is_made_all_the_while(verb):
    """The verb ends, and nothing that was recorded is lost."""
    s2 = Stage2(40, contiguous=True)
    s2.map(0, 40, pfn=0, dbm=True)
    host = Host(s2, range(10**6), 20, 16)
    s2._leaves._kernels = Kernel(host)
    with pytest.raises(GfnError, match=r"gfn 0x\w+\.\.0x\w+: others make runs"):
        JOINED[verb](s2, DirtyBitmap.from_pages([20], 40))
    s2._leaves._kernels = vector
    assert host.recorded == set(RUN) <= set(s2.dirty().pages().tolist())


SILENT = "record if update is tracked else Record(record.out, record.also, out_of=None, also_of=None)"
MUTANTS = {
    "what is made a run again loses the bit, and nobody hears": (
        Leaves,
        "take_apart",
        "update, record",
        f"update, {SILENT}",
    ),
    "rules are for leaves of runs, too": (Stage2, "_in_no_run", "change(_alone)", "change(lambda rule: rule)"),
    "nobody looks again": (Stage2, "_in_no_run", "if not self._in_runs(lo, hi):", "if True:"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_making_runs_beside_verbs_finds_mistakes(monkeypatch, mutant):
    owner, name, old, new = MUTANTS[mutant]
    source = inspect.getsource(getattr(owner, name))
    assert source.count(old) == 1
    names = dict(vars(inspect.getmodule(owner)))
    exec("if True:\n" + source.replace(old, new), names)
    monkeypatch.setattr(owner, name, names[name])
    with pytest.raises(AssertionError, match=r"lost|escaped"):
        test_a_run_that_is_made_beside_a_verb("wrprotect_part")
