"""Numbers don't change unseen: those that the peer, the kernel, the firmware and the hardware know too, and those that
were chosen or measured once.
"""

import ast
import enum
import importlib
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from seen import as_seen

import hwdbm

PACKAGE = Path(hwdbm.__file__).parent


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
    "module", ["migration.wire", "arm.abi", "kvm.abi", "pte", "vtcr", "memslot", "snapshot.manifest", "image.raw"]
)
def test_numbers_are_the_ones_that_were_looked_at(module: str) -> None:
    as_seen(f"numbers/{module}.txt", "\n".join(numbers(module)) + "\n")


# --- inside -----------------------------------------------------------------------------------------------------


def chosen() -> Iterator[str]:
    """Yield a line for each constant of the package that is a number, or a table of some, as it is written."""
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None and _is_number(node.value):
                target = ast.unparse(node.target if isinstance(node, ast.AnnAssign) else node.targets[0]).strip("()")
                if target.isupper():
                    yield f"{module}.{target} = {ast.unparse(node.value)}\n"


def given() -> Iterator[str]:
    """Yield a line for each default of a function that only its module calls, and for how each dataclass is made."""
    functions = ast.FunctionDef | ast.AsyncFunctionDef
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, functions) and node.name.startswith("_") and node.name != "__init__":
                every = node.args.posonlyargs + node.args.args
                found = [*zip(every[len(every) - len(node.args.defaults) :], node.args.defaults, strict=True)]
                found += [each for each in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True) if each[1]]
                yield from (f"{module}.{node.name} {name.arg} = {ast.unparse(value)}\n" for name, value in found)
            elif isinstance(node, ast.ClassDef):
                made = [text for each in node.decorator_list if (text := ast.unparse(each)).startswith("dataclass")]
                yield from (f"@{text} {module}.{node.name}\n" for text in made)


def _is_number(value: ast.expr) -> bool:
    """Return whether an expression has numbers, and nothing else but their names."""
    parts = list(ast.walk(value))
    allowed = ast.Constant | ast.UnaryOp | ast.BinOp | ast.operator | ast.unaryop
    allowed |= ast.Tuple | ast.List | ast.Set | ast.Dict | ast.Load
    values = [type(each.value) for each in parts if isinstance(each, ast.Constant)]
    return all(isinstance(each, allowed) for each in parts) and bool({int, float} & set(values))


def test_numbers_that_were_chosen_or_measured_stay() -> None:
    """Sizes of chunks, patience, margins: they were measured once, and no other test says what is right."""
    as_seen("numbers/chosen.txt", "".join(chosen()))


def test_what_is_given_inside_stays() -> None:
    """What parameters are that no call names, and whether two of a class are the same: few tests see it."""
    as_seen("numbers/given.txt", "".join(given()))
