"""Mutants of production's steps, made by rule: each statement of a protocol left out, doubled, swapped with the next.

A statement that only computes locals is no step, nor is a yield, a check of arguments or a return.
"""

import ast
import copy
import inspect
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from hwdbm.dirtylog import faults
from hwdbm.dirtylog.client import Feed, Feeds
from hwdbm.dirtylog.slot import SlotLog
from hwdbm.races.protocol import check
from hwdbm.races.protocols import PRODUCTION

# The protocols that each is tried with, the quickest first.
WHERE = {
    (SlotLog, "sync_steps"): ("sync-get", "device"),
    (SlotLog, "_publish"): ("sync-get", "clients-get", "clients"),
    (SlotLog, "_take_steps"): ("get-twice", "get-failing", "clients-write-protect", "write-protect"),
    (SlotLog, "_rearm"): ("clients-write-protect", "write-protect"),
    (SlotLog, "peek_steps"): ("write-protect-clear", "clear", "clients-clear"),
    (SlotLog, "clear_steps"): ("write-protect-clear", "clear", "clients-clear"),
    (SlotLog, "feed_steps"): ("clients-off-on", "clients-rollback"),
    (SlotLog, "join_steps"): ("clients-join",),
    (SlotLog, "give_back"): ("clients-rollback", "clients-failing"),
    (Feed, "give_back"): ("clients-rollback", "clients-failing"),
    (Feed, "break_off"): ("clients-off-on",),
    (Feeds, "pour"): ("clients-get", "clients-clear", "clients-off-on"),
    (SlotLog, "_take"): ("get-twice", "get-failing", "write-protect", "split"),
    (SlotLog, "put_back"): ("get-failing", "rollback"),
    (SlotLog, "mark_steps"): ("device", "device-host", "clients-device"),
    (SlotLog, "take_host_dirty"): ("write-back", "write-back-unmap", "write-back-failing"),
    (SlotLog, "start_steps"): ("start", "stop-start", "start-full", "clients-off-on"),
    (SlotLog, "stop_steps"): ("stop-start", "clients-off-on"),
    (SlotLog, "switch_steps"): ("switch-off", "switch-on", "clients-switch"),
    (faults, "map_steps"): ("replace-give", "unmap", "write-back-unmap"),
    (faults, "unmap_steps"): ("unmap-give", "write-back-unmap", "unmap"),
    (faults, "populate_steps"): ("populate",),
    (SlotLog, "spread"): ("clients-write-protect",),
    (faults, "write_fault_steps"): (
        "clients-write-protect",
        "write-protect-clear",
        "split-fault",
        "copy-on-write",
        "copy-on-write-read",
    ),
    (faults, "change_steps"): ("protect-share", "age", "split", "collapse"),
}

PURE = {
    "_blocks", "_reach", "_runs", "_mapped", "any", "append", "arange", "bool", "checked_frames", "leaf", "leaf_at",
    "logging", "mapped", "max", "min", "ravel", "words", "DirtyBitmap", "pages_per_entry", "from_words",
    "run", "steps", "count_nonzero", "int", "list", "add",
}  # fmt: skip


class Mutant(NamedTuple):
    """One change of one step, by its place: in which block, and where in it, as is the step that it is swapped with."""

    name: str
    owner: object
    function: str
    kind: str
    block: int
    at: int
    other: int

    def tree(self) -> ast.Module:
        tree = source(self.owner, self.function)
        block = list(blocks(tree))[self.block]
        if self.kind == "left out":
            block[self.at] = ast.Pass()
        elif self.kind == "doubled":
            block.insert(self.at, copy.deepcopy(block[self.at]))
        else:
            block[self.at], block[self.other] = block[self.other], block[self.at]
        return ast.fix_missing_locations(tree)


def source(owner: object, name: str) -> ast.Module:
    return ast.parse(textwrap.dedent(inspect.getsource(getattr(owner, name))))


def is_step(node: ast.stmt) -> bool:
    if isinstance(node, ast.FunctionDef | ast.Return | ast.Raise | ast.Try | ast.While | ast.Continue):
        return False
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Yield | ast.YieldFrom | ast.Constant):
        return False
    if isinstance(node, ast.If | ast.For):
        return False  # what is in them is
    calls = [each.func for each in ast.walk(node) if isinstance(each, ast.Call)]
    named = {call.attr if isinstance(call, ast.Attribute) else getattr(call, "id", "") for call in calls}
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    local = all(isinstance(leaf, ast.Name | ast.Tuple) for leaf in targets if leaf is not None)
    writes = isinstance(node, ast.Assign | ast.AugAssign) and not local
    return writes or bool(named - PURE)


def step_name(node: ast.stmt) -> str:
    """Return what a step calls first that isn't pure, or what it writes: its arguments may change."""
    for each in ast.walk(node):
        if isinstance(each, ast.Call):
            name = ast.unparse(each.func)
            if name.rpartition(".")[2] not in PURE:
                return name
    return ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node)


def blocks(tree: ast.AST) -> Iterator[list[ast.stmt]]:
    for node in ast.walk(tree):
        for field in ("body", "orelse", "finalbody"):
            found = getattr(node, field, None)
            if (
                isinstance(found, list)
                and found
                and isinstance(found[0], ast.stmt)
                and not isinstance(node, ast.Module)
            ):
                yield found


def mutants() -> Iterator[Mutant]:
    """Yield each mutant of each protocol."""
    for owner, function in WHERE:
        tree = source(owner, function)
        seen: set[str] = set()
        for b, block in enumerate(blocks(tree)):
            steps = [at for at, node in enumerate(block) if is_step(node)]
            for n, at in enumerate(steps):
                kinds = ["left out", "doubled", *(["swapped with the next"] if n + 1 < len(steps) else [])]
                other = steps[n + 1] if n + 1 < len(steps) else at
                for kind in kinds:
                    name = f"{function}: {step_name(block[at])}: {kind}"
                    while name in seen:
                        name = f"{function}: {step_name(block[at])} (again): {kind}"
                        assert name not in seen
                    seen.add(name)
                    yield Mutant(name, owner, function, kind, b, at, other)


@contextmanager
def in_place(mutant: Mutant) -> Iterator[None]:
    original = getattr(mutant.owner, mutant.function)
    names = dict(original.__globals__)
    exec(compile(mutant.tree(), mutant.name, "exec"), names)
    setattr(mutant.owner, mutant.function, names[mutant.function])
    try:
        yield
    finally:
        setattr(mutant.owner, mutant.function, original)


def found_by(mutant: Mutant) -> str:
    """Return the protocol that finds a mutant, or "" if none does."""
    with in_place(mutant):
        for name in WHERE[mutant.owner, mutant.function]:
            try:
                if not check(PRODUCTION[name](), 60_000).proved:
                    return name
            except (NameError, AttributeError, IndexError, TypeError, RuntimeError):
                return name  # it can't even run
    return ""
