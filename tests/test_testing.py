"""What `hwdbm.testing` is for: each of its checks notices a table that is wrong in its way, and nothing else."""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest

from hwdbm import DirtyBitmap, Stage2, pte
from hwdbm.testing import Stage2Machine

NPAGES, BASE = 600, 512
ALL, SOME = (0, 12), (3, 4)  # in twelfths


def machine(stage2: type[Stage2], *, compare: bool) -> Stage2Machine:
    """Return a machine whose pages are mapped and may be written."""

    class Machine(Stage2Machine):
        stage2_type = stage2

    Machine.compare = compare
    made = Machine()
    made.create(SimpleNamespace(draw=lambda *_, **__: Stage2(NPAGES, BASE)))
    made.map(ALL, 1, 3, 2)
    return made


def checked(made: Stage2Machine, steps: Callable[[Stage2Machine], object]) -> None:
    steps(made)
    for check in (made.no_lost_write, made.read_only_stays, made.two_consumers, made.sound):
        check()


class Plain(Stage2):
    pass


class KeepsLeaves(Stage2):
    def unmap(self, gfn: int, npages: int) -> None:
        pass

    def wrprotect(self, gfn: int, npages: int) -> int:
        return 0


class GrantsAll(Stage2):
    def map(self, gfn, npages, pfn, level=3, writable=True, *, dbm=True):
        return super().map(gfn, npages, pfn, level, True, dbm=dbm)


class ForgetsWrites(Stage2):
    def harvest(self, match=None, first=0, npages=None):
        super().harvest(match, first, npages)
        return DirtyBitmap(self.npages)


class ForgetsHost(Stage2):
    def take_host_dirty(self):
        super().take_host_dirty()
        return DirtyBitmap(self.npages)


class CleansOthers(Stage2):
    def clean(self, mask):
        return super().clean(DirtyBitmap.from_ranges([(0, self.npages)], self.npages))


class CleansMore(Stage2):
    def clean(self, mask):
        done = super().clean(mask)
        self.level(3)[mask.pages()] ^= np.uint64(pte.AF)
        return done


def read_only(made: Stage2Machine) -> None:
    made.map(SOME, 2, 3, 0)


def migrated(made: Stage2Machine) -> None:
    made.write([5, 170, 599])
    made.migrate(ALL, [], fails=False)


def taken(made: Stage2Machine) -> None:
    made.write([5, 170, 599])
    made.migrate(ALL, [170], fails=False)
    made.host_takes()


def cleaned(made: Stage2Machine) -> None:
    made.write([5, 170, 599])
    mask = DirtyBitmap.from_pages([170], NPAGES)
    made.clear(SimpleNamespace(draw=lambda *_, **__: mask), [])


def other_twin(made: Stage2Machine) -> None:
    made.twin.level(3)[7] ^= np.uint64(pte.AF)


CASES = [
    (KeepsLeaves, lambda made: made.unmap(SOME), r"pages \[\[150, 50\]\] can be written"),
    (KeepsLeaves, lambda made: made.wrprotect(SOME), r"pages \[\[150, 50\]\] can be written"),
    (GrantsAll, read_only, r"pages \[\[150, 50\]\] can be written"),
    (ForgetsWrites, migrated, r"lost writes to pages \[\[5, 1\], \[170, 1\], \[599, 1\]\]"),
    (ForgetsHost, taken, r"the host doesn't know of pages \[\[5, 1\], \[170, 1\], \[599, 1\]\]"),
    (CleansOthers, cleaned, r"level 3\[5\] is outside of the mask"),
    (CleansMore, cleaned, "cleaning changed other bits"),
]


@pytest.mark.parametrize(("stage2", "steps", "said"), CASES)
def test_tables_that_are_wrong_are_noticed(stage2, steps, said):
    with pytest.raises(AssertionError, match=said):
        checked(machine(stage2, compare=False), steps)


@pytest.mark.parametrize("compare", [False, True])
@pytest.mark.parametrize(("_stage2", "steps", "_said"), CASES)
def test_those_that_are_right_are_not(_stage2, steps, _said, compare):
    checked(machine(Plain, compare=compare), steps)


def test_a_twin_that_differs_is_noticed():
    with pytest.raises(AssertionError, match=r"level 3\[7\]"):
        checked(machine(Plain, compare=True), other_twin)


def test_tables_that_are_not_sound_are_noticed():
    made = machine(Plain, compare=False)
    made.s2.host_dirty.words[-1] |= np.uint64(1 << 63)
    with pytest.raises(Exception, match="bits at or beyond page 600"):
        made.sound()


def marked(what: str) -> set[str]:
    """Return the methods that Hypothesis knows as rules, or as invariants."""
    found = {name: getattr(call, "__dict__", {}) for name, call in vars(Stage2Machine).items()}
    return {name for name, marks in found.items() if any(mark.endswith(what) for mark in marks)}


def test_the_machine_takes_each_of_its_steps_and_checks_after_each():
    changes = {"map", "unmap", "wrprotect", "change", "switch"}
    assert marked("stateful_rule") == changes | {"write", "write_run", "read", "migrate", "clear", "host_takes"}
    assert marked("stateful_invariant") == {"no_lost_write", "read_only_stays", "two_consumers", "sound"}
