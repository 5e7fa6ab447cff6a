"""What `hwdbm.testing` is for: each of its checks notices a table that is wrong in its way, and nothing else."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import numpy as np
import pytest
from seen import as_seen

from hwdbm import DirtyBitmap, Granule, Stage2, pte, testing
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


def test_leaves_have_each_state_that_tables_can_have():
    """Each bit that isn't the address is set in some and clear in others; what isn't asked to be absent is there."""
    rng, addresses = np.random.default_rng(1), np.arange(4000, dtype=np.uint64) << np.uint64(12)
    free = pte.S2AP_W | pte.DBM | pte.AF | pte.CONTIGUOUS | testing.JUNK & (1 << 63) - 1
    some = testing._leaves(rng, 3, addresses) ^ pte.make_leaf(addresses, 3)
    assert int(np.bitwise_or.reduce(some)) == free
    assert int(np.bitwise_and.reduce(some)) == 0
    assert 0.4 < (some & np.uint64(pte.DBM) != 0).mean() < 0.6
    valid = testing._leaves(rng, 3, addresses, absent=True) & np.uint64(pte.VALID)
    assert 0.75 < valid.mean() < 0.85


def test_leaves_that_are_alike_differ_in_what_a_collapse_allows_and_at_times_in_one_that_it_does_not():
    addresses = np.arange(512, dtype=np.uint64) << np.uint64(12)
    kinds, others = [], []
    for seed in range(300):
        leaves = testing._alike(np.random.default_rng(seed), addresses) ^ addresses
        dbm = np.median(leaves & np.uint64(pte.DBM))
        allowed = np.uint64(pte.AF | (pte.S2AP_W if dbm else 0))
        kinds.append((bool(dbm), bool(np.median(leaves & np.uint64(pte.S2AP_W))) or bool(dbm)))
        plain = leaves & ~allowed
        usual = np.sort(plain)[256]
        others += [int(each ^ usual) for each in plain[plain != usual]]
        assert int(np.bitwise_or.reduce(leaves) & ~np.bitwise_and.reduce(leaves)) & int(allowed) == allowed
    assert set(kinds) == {(True, True), (False, True), (False, False)}
    assert 0.4 < sum(dbm for dbm, _ in kinds) / 300 < 0.6
    assert 60 < len(others) < 140
    assert set(others) == {1, 1 << 12, 1 << 55, 1 << 51}


# --- what is drawn ----------------------------------------------------------------------------------------------


def made_of(strategy, *choices: object) -> tuple[list[str], object]:
    """Return from what a composite strategy draws, in order, and what it makes of some choices."""
    asked, left = [], list(choices)

    def draw(each):
        asked.append(repr(each))
        return left.pop(0)

    made = strategy.wrapped_strategy
    return asked, made.definition(draw, *made.args, **made.kwargs)


def drawn() -> Iterator[str]:
    """Yield a line for each strategy of a rule, and for each that slots and tables are drawn from."""
    for name, call in vars(Stage2Machine).items():
        for mark, rule in getattr(call, "__dict__", {}).items():
            if mark.endswith("stateful_rule"):
                yield from (f"{name} {argument}: {strategy!r}" for argument, strategy in rule.arguments.items())
    for most in (1, 64, 511, 1600):
        yield f"ragged({most}): {testing.ragged(most)!r}"
    for granule in Granule:
        asked, slot = made_of(testing.slots(granule), 2, 291, 65)
        yield f"slots({granule.name}): {asked}, of 2, 291 and 65 {slot.npages} pages from {slot.base_gfn}"
        asked, slot = made_of(testing.stage2s(granule), Stage2(600, 291, granule), 7, *granule_choices(granule))
        yield f"stage2s({granule.name}): {asked[1:]}"


def granule_choices(granule: Granule, mix: int = 0, whole: int = 1) -> list[object]:
    """Return what `stage2s` is told beside the slot and the seed: whether one block is all, and the shares of kinds."""
    return [*([whole] if 1 in granule.block_levels() else []), testing.MIXES[mix]]


def test_what_is_drawn_from_was_looked_at() -> None:
    as_seen("strategies/drawn.txt", "\n".join(drawn()) + "\n")


def tables() -> Iterator[str]:
    """Yield the entries of tables that are made, but for level 3's within a stripe: a slot for each mix of kinds."""
    for mix, base in enumerate((0, 291, 511, 64)):
        _, slot = made_of(testing.stage2s(), Stage2(2600, base), mix, *granule_choices(Granule.K4, mix))
        edges = {page + beside for page in range(-base % 512, 2600, 512) for beside in (-2, -1, 0, 1)}
        for level, entries in ((1, range(1)), (2, range(slot.level(2).size)), (3, sorted(edges & set(range(2600))))):
            for entry in entries:
                if desc := int(slot.level(level)[entry]):
                    yield f"{base} {level}[{entry}]: {pte.describe(desc, level)}"
    _, slot = made_of(testing.stage2s(), Stage2(2600, 291), 5, *granule_choices(Granule.K4, whole=0))
    yield f"whole: {pte.describe(int(slot.level(1)[0]), 1)}, {int(slot.level(2).any())}, {int(slot.level(3).any())}"


def test_tables_that_are_made_were_looked_at() -> None:
    as_seen("strategies/tables.txt", "\n".join(tables()) + "\n")


def test_bitmaps_are_of_pages_at_random_with_runs_between_edges() -> None:
    made = testing.bitmaps(200).wrapped_strategy.pack
    assert not made((3, 0.0, [])).any()
    assert made((3, 1.0, [])).weight() == 200
    assert made((3, 0.0, [200, 190, 7, 9, 50])).ranges().tolist() == [[7, 2], [190, 10]]
    assert 80 < made((3, 0.5, [])).weight() < 120
    assert made((4, 0.5, [])) != made((3, 0.5, []))


# --- what the rules do ------------------------------------------------------------------------------------------

STEPS = {
    "map": lambda made: (made.map((2, 5), 9, 2, 1), made.map((2, 5), 1, 3, 2), made.map((3, 4), 0, 3, 0)),
    "map nothing": lambda made: made.map((7, 7), 1, 3, 0),
    "unmap": lambda made: made.unmap((3, 1)),
    "wrprotect": lambda made: made.wrprotect((12, 11)),
    "split": lambda made: made.change((0, 1), "split"),
    "switch": lambda made: (made.switch(False), made.switch(True)),
    "write": lambda made: made.write([0, 599, 600, 1201, 65536]),
    "write twice": lambda made: (made.write([7, 7]), made.tlb.clear(), made.write([7])),
    "write_run": lambda made: (made.write_run((1, 2)), made.write_run((12, 12)), made.write_run((4, 9))),
    "write untracked": lambda made: (made.map((4, 5), 1, 3, 1), made.write([199, 200, 249, 250])),
    "read": lambda made: (made.s2.mkold(BASE, 600), made.read(65000)),
    "migrate": lambda made: (made.write([1, 55, 330]), made.migrate((1, 9), [55, 66, 1], False)),
    "migrate nothing": lambda made: (made.write([1, 55, 330]), made.migrate((1, 9), [], True)),
    "clear": lambda made: (made.write([1, 55, 330]), made.clear(drawing([55, 56]), [55, 1])),
    "host_takes": lambda made: (made.write([1, 55]), made.migrate((0, 1), [], False), made.host_takes()),
}  # fmt: skip


def drawing(pages: list[int]) -> SimpleNamespace:
    return SimpleNamespace(draw=lambda *_, **__: DirtyBitmap.from_pages(pages, NPAGES))


def after(made: Stage2Machine) -> Iterator[str]:
    """Yield what a machine holds that isn't as it was when everything was mapped."""
    for name in ("memory", "copied"):
        versions = getattr(made, name)
        each = {int(v): DirtyBitmap.from_pages(np.flatnonzero(versions == v), NPAGES) for v in np.unique(versions)}
        yield f"  {name}: { {v: pages.ranges().tolist() for v, pages in each.items() if v} }"
    for name in ("log", "allowed", "host_written"):
        yield f"  {name}: {getattr(made, name).ranges().tolist()}"
    dirty, young = made.s2.dirty(), made.s2.scan(pte.young)
    cached = DirtyBitmap.from_pages(np.array(sorted(made.tlb), dtype=np.int64), NPAGES)
    yield f"  tlb: {cached.ranges().tolist()}, dirty: {dirty.ranges().tolist()}, young: {young.ranges().tolist()}"
    yield f"  writable: {made.s2.writable().ranges().tolist()}, saved: {made.s2.saved.bitmap.ranges().tolist()}"


def test_what_each_rule_does_was_looked_at() -> None:
    lines = []
    for name, steps in STEPS.items():
        made = machine(Plain, compare=False)
        steps(made)
        lines += [f"{name}:", *after(made)]
    as_seen("strategies/rules.txt", "\n".join(lines) + "\n")


@pytest.mark.parametrize("base", [512, 513, 1000, 1023])
def test_parts_of_a_slot_end_where_leaves_do(base: int) -> None:
    """Outward to whole leaves, and inward where these reach beyond the slot."""
    made = Stage2Machine()
    made.s2 = Stage2(2400, base)
    every = range(13)
    for low in every:
        for high in every:
            for size in (1, 512):
                start, npages = made.pages((low, high), size)
                lo, hi = (base + 2400 * each // 12 for each in sorted((low, high)))
                leaves = [leaf for leaf in range(0, base + 3000, size) if leaf + size > lo and leaf < hi]
                inside = [leaf for leaf in leaves if leaf >= base and leaf + size <= base + 2400]
                assert npages == len(inside) * size
                assert not inside or start == inside[0]
