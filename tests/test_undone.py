"""What is made or changed in steps is undone where any of them ends in an exception: one comes at each line, once."""

import ast
import inspect
import os
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from leaks import descriptors

from hwdbm.files import NewFile
from hwdbm.machine import Machine, parse
from hwdbm.memslot import Memslot
from hwdbm.migration.staging import SharedStaging
from hwdbm.vm import MemoryMap, PlainGuest
from hwdbm.vm.base import LoggedVm
from hwdbm.vm.memory import GuestMemory


class Case(NamedTuple):
    """Something that is done in steps, by a function that undoes them."""

    function: Any
    make: Callable[[Path], Any]
    do: Callable[[Any], Any]
    state: Callable[[Any], Any]


def machine(_: Path) -> Machine:
    made = Machine()
    made.add_memslot(1 << 16, 0)
    made.run(parse("uniform,rate=1", 1))
    return made


def slots(made: Any) -> Any:
    return made.log.memslots, made.slots, made.space.end, made.space.next_id, [7 in vcpu.tlb for vcpu in made.vcpus]


def logging(_: Path) -> PlainGuest:
    made = PlainGuest(MemoryMap(4096, (Memslot(0, 0, 16, 16, 0), Memslot(1, 0, 64, 16, 0))))
    made.start_log()
    return made


def may_join(made: PlainGuest) -> None:
    made.client("b").close()


def nothing(_: object = None) -> None:
    return None


CASES = {
    "NewFile": Case(NewFile.__init__, lambda folder: folder, lambda folder: NewFile(folder / "a"), os.listdir),
    "GuestMemory": Case(GuestMemory.__init__, nothing, lambda _: GuestMemory(1 << 16), nothing),
    "SharedStaging": Case(SharedStaging.__init__, nothing, lambda _: SharedStaging(SimpleNamespace()), nothing),
    "add_memslot": Case(
        Machine.add_memslot, machine, lambda made: made.add_memslot(1 << 16, 1 << 21, slot=7, shared=True), slots
    ),
    "resume": Case(Machine.resume, machine, lambda made: made.resume(), lambda made: made.running),
    "client": Case(LoggedVm.client, logging, lambda made: made.client("b").close(), may_join),
}  # fmt: skip


def lines(function: Any) -> list[int]:
    """Return the lines of what a function undoes after any exception."""
    source, first = inspect.getsourcelines(function)
    found: list[int] = []
    for node in ast.walk(ast.parse(textwrap.dedent("".join(source)))):
        tries = isinstance(node, ast.Try) and any("BaseException" in ast.unparse(each) for each in node.handlers)
        if tries or (isinstance(node, ast.With) and "ExitStack" in ast.unparse(node.items[0])):
            found += [
                each.lineno + first - 1 for inner in node.body for each in ast.walk(inner) if isinstance(each, ast.stmt)
            ]
    return sorted(set(found))


@contextmanager
def interrupted(function: Any, line: int) -> Iterator[list[bool]]:
    """Raise KeyboardInterrupt before a function runs a line for the first time; tell whether it came there."""
    code, came, before = function.__code__, list[bool](), sys.gettrace()

    def trace(frame: Any, event: str, _: object) -> Any:
        if frame.f_code is not code:
            return None
        if event == "line" and frame.f_lineno == line and not came:
            came.append(True)
            raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        yield came
    finally:
        sys.settrace(before)


@pytest.mark.usefixtures("few_objects")
@pytest.mark.parametrize("name", CASES)
def test_what_was_done_is_undone(name: str, tmp_path: Path) -> None:
    function, make, do, state = CASES[name]
    places = lines(function)
    assert places
    reached = 0
    for line in places:
        made = make(tmp_path)
        before, opened = state(made), descriptors()
        with interrupted(function, line) as came, suppress(KeyboardInterrupt):
            do(made)
        if came:
            assert state(made) == before, f"{name} was interrupted before line {line}"
            assert descriptors() == opened, f"{name} was interrupted before line {line}"
        reached += bool(came)
        if hasattr(made, "close"):
            made.close()
    assert reached > len(places) // 2
