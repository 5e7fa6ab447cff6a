"""Every public verb of the library, with every wrong kind of argument: refused means unchanged."""

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import doors
import numpy as np
import pytest
from doors import Recipe, Scene, Wrong

from hwdbm import DirtyBitmap, Granule, Stage2, pte
from hwdbm.memslot import Memslots
from hwdbm.vtcr import Vtcr, Vttbr

GPA = 0x4000_0000
NPAGES = 1200  # no multiple of 64, two whole stripes and two parts from gfn 0x40100 on
BASE = 0x40100


def slot_stage2() -> Stage2:
    """Return a slot with pages and a block, in every state, and with pages saved."""
    s2 = Stage2(NPAGES, BASE)
    s2.map(BASE, NPAGES, pfn=0x8_0100)
    s2.map(BASE + 700, 50, pfn=0x9_0000, writable=False)
    s2.map(BASE + 256, 512, pfn=0xA_0000, level=2)
    s2.enable_dbm()
    s2.level(3)[5:200:3] |= pte.S2AP_W
    s2.level(2)[1] |= pte.S2AP_W
    s2.unmap(BASE + 1000, 20)
    s2.level(3)[900:930] |= pte.S2AP_W
    s2.map(BASE + 900, 30, pfn=0xB_0000)
    return s2


def some_pages(npages: int = NPAGES) -> DirtyBitmap:
    return DirtyBitmap.from_pages(np.arange(0, npages, 3), npages)


def three_slots() -> Memslots:
    slots = Memslots(address_spaces=2)
    slots.set_memory_region(0, 1, GPA, 0x10_0000, 1 << 30)
    slots.set_memory_region(1, 0, GPA + 0x10_0000, 0x10_0000, 2 << 30)
    slots.set_memory_region(0x1_0001, 0, GPA, 0x10_0000, 2 << 30)
    return slots


STAGE2 = {
    "gfn": BASE + 256,
    "npages": 512,
    "pfn": 0x600,
    "split.level": 3,
    "collapse.level": 2,
    "level": 3,
    "writable": True,
    "dbm": True,
    "first": 64,
    "match": pte.dirty,
    "shared": False,
    "ha": True,
    "hd": True,
}

RECIPES: dict[str, Recipe] = {
    "bitmap.DirtyBitmap": Recipe(
        some_pages,
        lambda _: {
            "npages": 640,
            "words": np.zeros(10, dtype=np.uint64),
            "raw": bytes(80),
            "pages": [3, 70, 639],
            "from_ranges.ranges": np.array([[3, 70], [100, 1]]),
            "from_ranges.npages": 640,
            "part.npages": 130,
            "part.first": 65,
            "base": 7,
            "unit": 4096,
            "first": 3,
            "set_range.npages": 130,
            "value": True,
            "other": DirtyBitmap(NPAGES),
            "factor": 4,
            "page": 6,
        },
    ),
    "granule.Granule": Recipe(lambda: Granule.K4, lambda _: {"text": "4K", "level": 2, "large": True}),
    "memslot.Memslots": Recipe(
        three_slots,
        lambda slots: {
            "granule": Granule.K16,
            "address_spaces": 2,
            "slot_limit": 8,
            "ipa_bits": 36,
            "gfn": 0x40080,
            "as_id": 0,
            "slot": 3,
            "flags": 1,
            "guest_phys_addr": 0x10_0000,
            "memory_size": 1 << 20,
            "userspace_addr": 1 << 30,
            "find.slot": 1,
            "commit.plan": slots and slots.plan(3, 1, 1 << 20, 1 << 20, 1 << 30),
        },
        fields=frozenset({"slot"}),
    ),
    "memslot.slot_name": Recipe(given=lambda _: {"slot": 0x1_0003}),
    "vtcr.Vtcr": Recipe(
        lambda: Vtcr.decode(0x806A_3558),
        lambda _: {
            "granule": Granule.K4,
            "t0sz": 24,
            "sl0": 1,
            "ps": 5,
            "other": 0x8000_3500,
            "value": 0x806A_3558,
            "ipa_bits": 40,
            "mmfr1": 0x0000_0110_1021_1122,
            "pa_bits": 48,
            **dict.fromkeys(("hw_dbm", "on", "ha", "hd"), True),
            **dict.fromkeys(("ds", "vs", "sl2", "haft", "hdbss"), False),
        },
        fields=frozenset({"value", "mmfr1"}),
    ),
    "vtcr.Vttbr": Recipe(
        lambda: Vttbr(0x4838_0000),
        lambda _: {
            "baddr": 0x4838_0000,
            "vmid": 2,
            "cnp": True,
            "value": 0x0002_0000_4838_0001,
            "vtcr": Vtcr.decode(0x802D_3558),
        },
        fields=frozenset({"value"}),
    ),
    "vtcr": Recipe(
        given=lambda _: {"mmfr0": 0x0000_0323_1020_1126, "mmfr1": 0x0000_0110_1021_1122},
        fields=frozenset({"mmfr0", "mmfr1"}),
    ),
    "memslot.Memslot": Recipe(
        given=lambda _: {
            "id": 3,
            "flags": 1,
            "base_gfn": 0x100,
            "npages": 100,
            "userspace_addr": 1 << 30,
            "generation": 2,
        }
    ),
}


def recipe_of(name: str) -> Recipe | None:
    return RECIPES.get(name) or RECIPES.get(name.partition(".")[0])


def all_doors() -> Iterator[tuple[str, Any, str | None]]:
    for name, item in doors.surface().items():
        if not inspect.isclass(item):
            yield name, item, None
            continue
        if doors.made(item):
            yield name, item, None
        for verb in doors.verbs(item):
            yield f"{name}.{verb}", item, verb


# What only the library itself makes: results that come out, and never in.
RESULTS = {"memslot.Plan"}

# The rooms that are walked over.
ROOMS = {"granule", "memslot", "vtcr"}

DOORS = {
    name: (item, verb) for name, item, verb in all_doors() if name not in RESULTS and name.partition(".")[0] in ROOMS
}


def walked(name: str) -> Iterator[str]:
    """Walk over a door's parameters with every wrong argument, and yield what is wrong with what came of it."""
    item, verb = DOORS[name]
    recipe = recipe_of(name.rpartition(".")[0] if verb else name)
    if recipe is None:
        yield "there is no recipe: give it one in RECIPES"
        return

    def new() -> Scene:
        return doors.scene(recipe, item, verb)

    def twin(parameter: str, wrong: Wrong) -> doors.Outcome:
        return new().run(parameter, wrong.twin)

    good = new().run()
    if good.error is not None:
        yield f"its own arguments are refused: {good.error!r}"
        return
    scene = new()
    before = scene.state()
    for parameter, value in scene.arguments.items():
        key = f"{verb or 'new'}.{parameter}"
        if key in recipe.skip:
            continue
        for wrong in doors.wrong(value, parameter in scene.optional):
            outcome = scene.run(parameter, wrong.value)
            named = parameter not in recipe.fields
            for complaint in judged(wrong, outcome, before, partial(twin, parameter, wrong), named=named):
                yield f"{parameter} = {wrong.label}: {complaint}"
            if outcome.error is None or outcome.after != before:
                scene = new()
                before = scene.state()


def judged(
    wrong: Wrong, outcome: doors.Outcome, before: object, twin: Callable[[], doors.Outcome], *, named: bool
) -> Iterator[str]:
    """Yield what is wrong with an outcome; `twin` gives the one of the argument that it is to be like."""
    error = outcome.error
    if error is None:
        if wrong.refused:
            yield "is taken"
        elif wrong.has_twin and outcome != twin():
            yield "does something else than a plain argument"
        return
    if outcome.after != before:
        yield f"is refused, and something changed: {error!r}"
    if not doors.documented(error):
        yield f"raises {error!r}, which isn't documented"
    elif not isinstance(error, OSError) and not doors.on_purpose(error):
        yield f"fails somewhere inside: {error!r}"
    elif wrong.refused and not isinstance(error, TypeError):
        yield f"is refused with {error!r}, and not with a TypeError"
    elif named and is_number(wrong.value) and not wrong.refused and not doors.names(error, int(wrong.value)):
        yield f"isn't named in {error!r}"
    elif wrong.has_twin and not isinstance(wrong.twin, np.ndarray | DirtyBitmap | bytes | list):
        plain = twin()
        if type(plain.error) is not type(error):
            yield f"is refused with {error!r}, a plain argument has {plain.error!r}"


def is_number(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


@pytest.mark.parametrize("name", DOORS)
def test_refused_means_unchanged(name: str) -> None:
    complaints = list(walked(name))
    assert not complaints, f"{name}:\n  " + "\n  ".join(complaints)
