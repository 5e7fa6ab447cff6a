"""The state machine of `hwdbm.testing`, on both kernels and all granules, and the mutants that it must catch."""

from types import SimpleNamespace

import numpy as np
import pytest
from effort import EFFORT
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import run_state_machine_as_test

from hwdbm import DirtyBitmap, Granule, Stage2, kernels, pte
from hwdbm.errors import BitmapError
from hwdbm.stage2.leaves import Record
from hwdbm.testing import Stage2Machine, stage2s

LONG = settings(stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck))
HUNT = settings(LONG, print_blob=False, database=None, phases=[Phase.generate])


@pytest.mark.parametrize("name", kernels.available())
@pytest.mark.parametrize(
    "granule",
    [Granule.K4, *(pytest.param(each, marks=pytest.mark.slow) for each in (Granule.K16, Granule.K64))],
    ids=str,
)
def test_machine(name, granule, monkeypatch):
    class Machine(Stage2Machine):
        pass

    Machine.granule = granule
    Machine.most = {Granule.K4: 1600, Granule.K16: 4200, Granule.K64: 9000}[granule]
    monkeypatch.setattr(kernels, "_active", [])
    kernels.use(name)
    few = {Granule.K4: 15, Granule.K16: 8, Granule.K64: 4}[granule]
    run_state_machine_as_test(Machine, settings=settings(LONG, max_examples=few * EFFORT))


class Shared(Stage2):
    """With the leaves, bitmaps and kernels of one that others write too."""

    def __init__(self, npages, base_gfn=0, granule=Granule.K4):
        super().__init__(npages, base_gfn, granule, shared=True)


def test_machine_of_shared_leaves():
    class Machine(Stage2Machine):
        stage2_type = Shared

    run_state_machine_as_test(Machine, settings=settings(LONG, max_examples=8 * EFFORT))


# --- mutants: each breaks one invariant of the model, and the machine alone, without the walker, finds it ----------


class ForgetsSaved(Stage2):
    """No lost write: a harvest that doesn't take what replaced leaves had recorded."""

    def harvest(self, out=None, first=0, npages=None):
        kept = self.saved.bitmap.copy()
        got = super().harvest(out, first, npages)
        got -= kept
        return got


class ForgetsOnReplace(Stage2):
    """Saved on replace: leaves go without a word."""

    def _save_record(self, saved=pte.dirty, told=pte.writable):
        return self._silent


class SnapshotsThenSplits(Stage2):
    """Saved on replace: a split that installs clean children of a block that was dirty."""

    def _split(self, level, index):
        entries = self.level(level)
        entries[index] = pte.clean(level)(entries[index])
        return super()._split(level, index)


class ArmsReadOnly(Stage2):
    """Read-only stays: the RFC's patch 2, DBM on every leaf."""

    def enable_dbm(self, mask=None):
        return self._change(
            lambda level: pte.Update(pte.leaf(level).also(zeros=pte.DBM), pte.DBM, pte.S2AP_W), None, None
        )


class ProtectsByHalf(Stage2):
    """Read-only stays: S2AP[1] cleared and DBM left, which lets the guest write."""

    def wrprotect(self, gfn=None, npages=None):
        return self._change(lambda level: pte.Update(pte.writable(level), clears=pte.S2AP_W), gfn, npages)


class CleansTheRange(Stage2):
    """Mask-exact: re-protects from the first bit of the mask to the last, as KVM did before the RFC's patch 4."""

    def clean(self, mask):
        wide = DirtyBitmap(self.npages)
        pages = mask.pages()
        if pages.size:
            wide.set_range(int(pages[0]), int(pages[-1] - pages[0] + 1))
        return super().clean(wide)


class ForgetsTheBlock(Stage2):
    """Mask-exact: a block with one page in the mask is cleaned, and its other pages are forgotten."""

    def clean(self, mask):
        self.saved.drop(mask)
        return self._update_part(pte.clean, mask, Record(self.host_dirty, self.host_dirty, out_of=None))


class MarksTheHead(Stage2):
    """Stripe = pages: a dirty block marks its first page only, as IOMMUFD once did."""

    def harvest(self, out=None, first=0, npages=None):
        heads = DirtyBitmap(self.npages)
        for level in (1, 2):
            index = np.flatnonzero(pte.dirty(level)(self.level(level)))
            for start, stop in np.clip(self.layout.span(level, index), 0, self.npages).tolist():
                heads.set_range(start + 1, stop - start - 1)
        got = super().harvest(out, first, npages)
        got -= heads
        return got


class KeepsItFromTheHost(Stage2):
    """Two consumers: the migration is told, the host isn't."""

    def harvest_into(self, out, first=0, npages=None):
        before = self.host_dirty.copy()
        tally = super().harvest_into(out, first, npages)
        self.host_dirty.words[:] = before.words
        return tally


class SetsTheTail(Stage2):
    """Clean tail: whole words are written where the slot ends in the middle of one."""

    def harvest_into(self, out, first=0, npages=None):
        tally = super().harvest_into(out, first, npages)
        if self.npages & 63 and out.words[-1]:
            self.host_dirty.words[-1] = ~np.uint64(0)
        return tally


class AgesPlainly(Stage2):
    """No lost write: aging that stores what it read without the dirty bit (the RFC's patch 5)."""

    def mkold(self, gfn=None, npages=None):
        return self._age(lambda level: pte.Update(pte.young(level), clears=pte.AF | pte.S2AP_W), gfn, npages, None)


class CopiesBeforeTheFlush(Stage2Machine):
    """Flush before copy: pages are sent while a TLB may still hold a writable-dirty entry."""

    def finish(self, pages, during, fails):
        if not fails:
            self.copy_out(pages)
            self.log -= pages
        super().finish(DirtyBitmap(self.s2.npages), during, fails=True)


class DropsOnFailure(Stage2Machine):
    """Consumer failure is safe: what a failed sending had taken isn't put back."""

    def finish(self, pages, during, fails):
        super().finish(pages, during, fails)
        if fails:
            self.log -= pages


WRITES = {"write", "write_run"}
RULES = WRITES | {"map", "unmap", "wrprotect", "change", "switch", "read", "migrate", "clear", "host_takes"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage2", "rules"),
    [
        (ForgetsSaved, WRITES | {"unmap", "migrate"}),
        (ForgetsOnReplace, WRITES | {"unmap"}),
        (SnapshotsThenSplits, WRITES | {"change"}),
        (ArmsReadOnly, {"switch"}),
        (ProtectsByHalf, {"wrprotect"}),
        (CleansTheRange, WRITES | {"clear"}),
        (ForgetsTheBlock, WRITES | {"clear"}),
        (MarksTheHead, WRITES | {"migrate"}),
        (KeepsItFromTheHost, WRITES | {"migrate", "host_takes"}),
        (SetsTheTail, WRITES | {"migrate"}),
        (AgesPlainly, WRITES | {"change"}),
    ],
)
def test_machine_catches_a_broken_stage2(stage2, rules):
    with pytest.raises((AssertionError, BitmapError)):
        hunt(Stage2Machine, rules, stage2)


@pytest.mark.slow
@pytest.mark.parametrize("machine", [CopiesBeforeTheFlush, DropsOnFailure])
def test_machine_catches_a_broken_consumer(machine):
    with pytest.raises(AssertionError):
        hunt(machine, WRITES | {"migrate", "clear"})


@pytest.mark.parametrize("machine", [Stage2Machine])
def test_machine_spares_what_is_not_broken(machine):
    """The hunts' own counterpart: with the same rules and the true Stage2 nothing is found."""
    for rules in (WRITES | {"clear"}, WRITES | {"change", "unmap"}, WRITES | {"migrate", "host_takes"}):
        hunt(machine, rules, examples=4 * EFFORT)


def hunt(machine, rules, stage2=Stage2, examples=1000):
    """Run a machine with some of its rules only, so that what they can break is found soon, and without the walker."""
    dropped = dict.fromkeys(RULES - rules)
    hunted = type("Machine", (machine,), {"stage2_type": stage2, "compare": False, **dropped})
    run_state_machine_as_test(hunted, settings=settings(HUNT, max_examples=examples))


def test_machine_without_the_walker():
    class Machine(Stage2Machine):
        compare = False

    run_state_machine_as_test(Machine, settings=settings(LONG, max_examples=12 * EFFORT))


def test_a_short_story():
    """A few steps reach every line of the shipped machine's rules, and nothing is wrong."""
    few = settings(LONG, max_examples=4, stateful_step_count=12, phases=[Phase.generate], database=None)
    run_state_machine_as_test(Stage2Machine, settings=few)


@given(stage2s(), st.data())
def test_a_part_is_of_whole_leaves_and_all_twelve_are_the_slot(s2, data):
    machine = SimpleNamespace(s2=s2)
    assert Stage2Machine.pages(machine, (12, 0)) == (s2.base_gfn, s2.npages)
    part, size = data.draw(st.tuples(*[st.integers(0, 12)] * 2)), s2.granule.pages_per_entry(2)
    start, npages = Stage2Machine.pages(machine, part, size)
    assert start % size == npages % size == 0
    assert not npages or s2.base_gfn <= start < start + npages <= s2.base_gfn + s2.npages
