"""The conditions of the litmus tests, by all that satisfies them, whether an end is like that or not.

A test that is forbidden passes whatever a part of its condition says, as long as no end satisfies all of them.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from seen import as_seen

from hwdbm.races import twenty
from hwdbm.races.program import End, Scene, descriptor
from hwdbm.races.twenty import TWENTY

STATES = {f"{old}{state}": descriptor(f"{old}{state}", 1) for state in
          ("absent", "readonly", "untracked", "clean", "dirty") for old in ("", "old ")}  # fmt: skip
NUMBERS = {str(number): number for number in range(3)}
FAULTS = {"goes on": 0, "faults": 1}


class AskedError(Exception):
    """A condition asks for what isn't known yet."""


@dataclass(frozen=True, slots=True)
class Partly(End):
    """An end of which as much is known as was asked for: what places hold, and which threads have faulted."""

    known: dict[str, int] = field(default_factory=dict)

    def __getitem__(self, name: str) -> int:
        if name not in self.known:
            raise AskedError(name)
        return self.known[name]

    def faulted(self, thread: int) -> bool:
        return bool(self[f"thread {thread}"])


def values(programs: tuple[str, ...], name: str) -> dict[str, int]:
    """Return what a place may hold: a descriptor if it is one's, or a register that one is read into."""
    if name.startswith("thread "):
        return FAULTS
    read = any(re.search(rf"pte:[^;]*-> {name}\b", program) for program in programs)
    return STATES if name.startswith("pte:") or read else NUMBERS


def satisfying(test: twenty.Test, scene: Scene, said: dict[str, str]) -> Iterator[str]:
    """Yield what satisfies a condition, with no more of it than the condition asks for."""
    known = {name: values(test.programs, name)[value] for name, value in said.items()}
    try:
        if test.outcome(Partly(scene, scene.start(), known)):
            yield ", ".join(f"{name} {value}" for name, value in said.items())
    except AskedError as asked:
        (name,) = asked.args
        for value in values(test.programs, name):
            yield from satisfying(test, scene, {**said, name: value})


def test_conditions_are_those_that_were_looked_at():
    lines = []
    for test in TWENTY:
        scene = Scene(test.pages, test.programs, frames=test.frames, options=test.options)
        lines += [f"{test.verdict}: {test.name}", *(f"  {each}" for each in satisfying(test, scene, {}))]
    as_seen("races/conditions.txt", "\n".join(lines) + "\n")
