"""What a scene and its programs are made into: each instruction and each option, as it was looked at."""

import pytest
from seen import as_seen

from hwdbm import pte
from hwdbm.races.program import Scene, descriptor, state_name

INSTRUCTIONS = (
    "dmb", "dsb", "isb", "dmb ld", "dmb st", "dsb ld", "dsb st", "dsb sy", "dsb ld st", "tlbi", "tlbi x", "tlbi x y",
    "tlbi ld", "tlbi y@r", "load x -> a", "load x", "load y@r -> a", "load frame:z -> a", "load pte:y -> a", "load c",
    "load", "load x 1", "load q", "load ld", "store x 1", "store x 12", "store y r", "store y@r r", "store x s",
    "store pte:y clean", "store pte:y old clean", "store pte:x dirty:y", "store pte:y readonly:z", "store x clean",
    "store pte:x clean:q",
    "store frame:y untracked:x", "store c W", "store x", "store x 1 2", "store x blue", "store x@a 1", "store x st",
    "swap x 3 -> a", "swap pte:x absent -> a", "set pte:x W", "clear pte:x AF -> a", "clear pte:x V", "set c DBM",
    "swap x", "set ld", "fly x 1", "isb st", "isb ld", "st", "; load x -> a ;; ",
)  # fmt: skip
SCENES = {
    "two pages": {"pages": {"x": "clean", "y": "old dirty"}},
    "cells and frames": {"pages": {"x": "absent"}, "cells": {"c": 3, "d": 4}, "frames": ("z", "x")},
    "numbers": {"pages": {"x": "readonly", "y": "clean"}, "frames": ("z",), "options": {"numbers": {"y": 9}}},
    "values": {"pages": {"x": "clean", "y": "clean"}, "options": {"values": {"frame:y": 5, "pte:x": 7}}},
    "a block": {"pages": {"x": "clean", "y": "clean", "z": "clean"}, "options": {"block": {"x": 2, "z": 5}}},
    "a run": {"pages": {"x": "clean", "y": "clean", "z": "clean"}, "options": {"run": ("z", "y")}},
    "the rest": {"pages": {"x": "clean"}, "options": {"ha": False, "hd": 1, "speculate": True, "ets2": True}},
}


def read(text):
    """Yield what the operations of a program are, or why it is none; r and s are what it loaded before."""
    try:
        scene = Scene({"x": "clean", "y": "dirty"}, [f"load x -> s; load y -> r; {text}"], {"c": 0}, ("z",))
    except ValueError as error:
        yield f"  {error}"
        return
    for op in scene.machine.programs[0][2:]:
        values = [101, 102, 103]
        what = [f"{op.kind.name} {op.scope}, by {op.label!r}", f"of {op.place and op.place(values)!r}"]
        what += [f"at {sorted(op.place_from)}", f"{op.value(values):#x}", f"from {sorted(op.value_from)}"]
        what += [f"{op.apply(0b1100, 0b1010):#b}", "returns" if op.returns else "returns nothing"]
        yield "  " + ", ".join(what)
    yield f"  registers {scene.registers[0]}"


def test_programs_are_read_as_it_was_looked_at():
    lines = [line for text in INSTRUCTIONS for line in (text, *read(text))]
    as_seen("races/instructions.txt", "\n".join(lines) + "\n")


def test_scenes_are_made_as_it_was_looked_at():
    lines = []
    for name, made in SCENES.items():
        scene = Scene(**made, programs=["load x -> a", "isb"])
        machine = scene.machine
        lines += [name, *(f"  {cell} {held:#x}" for cell, held in zip(scene.cells, scene.mem, strict=True))]
        lines += [f"  {page}: {which}" for page, which in scene.pages.items()]
        lines += [f"  frames {machine.frames}, numbers {scene.frame}, descriptors {sorted(machine.descriptors)}"]
        lines += [f"  ha {machine.ha}, hd {machine.hd}, speculate {machine.speculate}, ets2 {machine.ets2}"]
    as_seen("races/scenes.txt", "\n".join(lines) + "\n")


def test_a_state_goes_by_four_bits():
    """The others don't matter: a descriptor has the name that it was made by, whatever its frame."""
    for name in ("readonly", "untracked", "clean", "dirty"):
        for frame in (0, 1, (1 << 36) - 1):
            for old in ("", "old "):
                assert state_name(descriptor(old + name, frame) ^ pte.CONTIGUOUS) == old + name
                assert state_name(descriptor(old + name, frame) & ~pte.VALID) == "absent"
                assert (descriptor(old + name, frame) & pte.ADDRESS) >> 12 == frame
    assert state_name(descriptor("absent", 5)) == "absent"
    assert descriptor("absent", 5) & pte.AF
    assert not descriptor("old absent", 5) & pte.AF


def test_a_cell_that_is_none_is_named_beside_those_there_are():
    with pytest.raises(ValueError, match=r"^there is no cell 'pte:y'; there are pte:x, frame:x, c$"):
        Scene({"x": "clean"}, cells={"c": 0}).cell("pte:y")


def test_a_descriptor_is_of_its_own_page_whatever_another_is_called():
    scene = Scene({"x": "clean", "x2": "clean"}, ["store pte:x2 dirty"])
    (op,) = scene.machine.programs[0]
    assert op.value(()) == descriptor("dirty", 2)
