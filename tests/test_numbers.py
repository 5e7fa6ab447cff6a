"""Numbers don't change unseen: those that others know too, and those that were chosen or measured once.

The peer, the kernel, the firmware and the hardware know the first, of which each is held. Of the others, constants and
defaults inside of the package, those are held that the file has and that still exist.
"""

import ast
import dataclasses
import enum
import importlib
import inspect
import pkgutil
import struct
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import pytest
from seen import DATA, as_seen, writing

import hwdbm

OF_THIS_MACHINE = {"hwdbm.kvm.ioctl._SYS_MEMBARRIER"}


def numbers(module: str) -> Iterator[str]:
    """Yield a line for each constant of a module, and for each member of its enumerations."""
    for name, value in sorted(vars(importlib.import_module(f"hwdbm.{module}")).items()):
        if isinstance(value, enum.EnumType) and value.__module__ == f"hwdbm.{module}":
            yield from (f"{name}.{each.name} = {each.value!r}" for each in value)
        elif name.strip("_").isupper():
            yield from (f"{name} = {each}" for each in _shown(value))


def _shown(value: object) -> Iterator[str]:
    if isinstance(value, struct.Struct):
        yield f"{value.format!r}, {value.size} bytes"
    elif isinstance(value, int) and not isinstance(value, enum.Enum):
        yield hex(value)
    elif isinstance(value, str | bytes | tuple | float | dict):
        text = repr(value)
        if " at 0x" not in text:
            yield text


@pytest.mark.parametrize(
    "module", ["migration.wire", "arm.abi", "kvm.abi", "pte", "vtcr", "memslot", "snapshot.manifest"]
)
def test_numbers_are_the_ones_that_were_looked_at(module: str) -> None:
    as_seen(f"numbers/{module}.txt", "\n".join(numbers(module)) + "\n")


# --- inside -----------------------------------------------------------------------------------------------------


def modules() -> Iterator[ModuleType]:
    for info in pkgutil.walk_packages(hwdbm.__path__, "hwdbm."):
        if not info.name.endswith("__main__"):
            yield importlib.import_module(info.name)


def own_constants(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """Yield the constants that a module itself assigns, but for texts, and the members of its enumerations."""
    for node in ast.parse(Path(str(module.__file__)).read_text()).body:
        if not isinstance(node, ast.Assign | ast.AnnAssign):
            continue
        stored = [each for each in ast.walk(node) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)]
        for name in (each.id for each in stored):
            value = getattr(module, name, None)
            if name.strip("_").isupper() and _is_plain(value) and not isinstance(value, str):
                yield name, value
    for name, value in vars(module).items():
        if isinstance(value, enum.EnumType) and value.__module__ == module.__name__:
            yield from ((f"{name}.{each.name}", each.value) for each in value)


def own_defaults(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """Yield the defaults of the functions and methods that a module defines, fields of dataclasses among them."""
    for name, value in vars(module).items():
        if getattr(value, "__module__", "") != module.__name__:
            continue
        calls = {name: value} if inspect.isfunction(value) else {}
        if inspect.isclass(value) and not issubclass(value, enum.Enum):
            calls = {f"{name}.{each}": getattr(call, "__func__", call) for each, call in vars(value).items()}
        for where, call in calls.items():
            if isinstance(call, FunctionType):
                for each in inspect.signature(call).parameters.values():
                    if each.default is not each.empty and _is_plain(each.default):
                        yield f"{where}({each.name})", each.default


def _is_plain(value: Any) -> bool:
    """Return whether a value says all that it is: a number, or what is made of such."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return all(_is_plain(getattr(value, each.name)) for each in dataclasses.fields(value))
    if isinstance(value, dict):
        return all(map(_is_plain, (*value.keys(), *value.values())))
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return isinstance(value, int | float | str | bytes | np.generic | enum.Enum)


def inside() -> dict[str, str]:
    found = {}
    for module in modules():
        for name, value in (*own_constants(module), *own_defaults(module)):
            where = f"{module.__name__}.{name}"
            if where not in OF_THIS_MACHINE:
                found[where] = ascii(value)
    return found


def test_what_was_chosen_inside_stays() -> None:
    now, path = inside(), DATA / "numbers" / "inside.txt"
    if writing():
        path.write_text("".join(f"{where} = {value}\n" for where, value in now.items()))
    kept = dict(line.split(" = ", 1) for line in path.read_text().splitlines())
    both = kept.keys() & now.keys()
    assert {where: now[where] for where in both} == {where: kept[where] for where in both}
    assert len(both) > 0.95 * len(now), "HWDBM_SEEN=write keeps what there is now; then look at it"
