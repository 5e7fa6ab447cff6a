"""What the small functions of the package make of plain numbers and texts, at their edges, was looked at.

Each function of numbers and texts alone is called with some of them, or named below as one that does more than to
return something. Units, rounding, comparisons, defaults and what is refused are seen there, wherever they are used.
"""

import ast
import importlib
import re
from collections.abc import Iterator
from functools import cache
from inspect import signature
from itertools import islice, product
from pathlib import Path
from types import GeneratorType
from typing import Any

import numpy as np
import pytest
from seen import DATA, as_seen, writing
from sources import parsed

import hwdbm
from hwdbm.granule import Granule

ROOT = Path(hwdbm.__file__).parent

# Functions that start, write, wait for or look at something, by their modules; what only calls such; and those that
# take as much time or memory as a number is large.
EFFECTS = {
    "bench.stream": {"serve"},
    "bench.suite": {"_log", "backed", "resident"},
    "cli.app": {"_command", "_group", "_version"},
    "cli.doctor": {"_distribution"},
    "cli.example": {"find", "find_trace"},
    "cli.guest": {"check_room", "kvm_layout"},
    "cli.output": {"warn"},
    "cli.parse": {"image", "trace", "whole"},
    "cli.races": {"_all", "_checked", "_own", "_refuse"},
    "cli.streams": {"width", "result", "note", "error_line", "wrapped"},
    "files": {"_place", "_sync"},
    "kernels.__init__": {"_imported"},
    "kernels._cache": {"_say_once"},
    "kernels._numba": {"_said"},
    "forecast.predict": {"_places"},
    "forecast.writes": {"_sample"},
    "kvm.guest": {"shares"},
    "kvm.ioctl": {"_membarrier"},
    "kvm.thread": {"_kick"},
    "migration.staging": {"_mapped"},
    "migration.transport": {"_resolve"},
    "races.litmus": {"_on_places"},
    "races.mistakes": {"_take", "_harvest", "_children"},
    "races.production": {"_flush"},
    "races.protocols": {"run", "_handler", "_populate", "_mapper", "_fault_or_populate", "_give", "_cow", "_take"},
    "snapshot.files": {"extents", "_copy"},
    "stage2.leaves": {"_unbacked", "every"},
    "testing": {"ragged", "bitmaps"},
    "trace.recorder": {"_next_data"},
    "vm.memory": {"_next_data", "_is_hole"},
}

NUMBERS = (
    -1,
    0,
    1,
    2,
    3,
    7,
    8,
    63,
    64,
    65,
    511,
    512,
    4095,
    4096,
    65536,
    1 << 21,
    1 << 30,
    (1 << 40) + 1,
    (1 << 64) - 1,
)
FEW = (-1, 0, 1, 3, 64, 511, 4096, 1 << 21, 1 << 40)
REALS = (
    *(
        -1.0,
        0.0,
        1e-9,
        4.9e-4,
        5.1e-4,
        0.02,
        0.05,
        0.5,
        0.9,
        0.9949,
        0.9995,
        1.0,
        1.5,
        2.0,
        3.0,
        9.949,
        9.951,
        10.0,
        59.9,
    ),
    *(60.0, 99.94, 99.96, 100.0, 119.0, 999.4, 999.6, 1e3, 1023.0, 4096.0, 9999.0, 99999.0, 1e6, 1.5e6, 3e7, 1e9, 1e15),
    *(float("inf"), float("nan")),
)
TEXTS = (
    *(
        "",
        "x",
        "0",
        "1",
        "-1",
        "12",
        "1.5",
        "0x40",
        "4K",
        "1G",
        "a,b",
        "a b",
        "a=1",
        "a&b<c>",
        "0:1",
        "0:0:4K",
        "'",
        "\x1b[1m",
        "é",
    ),
    *(
        "idle",
        "hot,share=0.5",
        "uniform,rate=2",
        "clean",
        "dirty",
        "x1",
        "w3",
        "X3",
        "W30",
        "XZR",
        "pte(x)",
        "PTE",
        "Int",
        "or",
    ),
    *(
        "ours",
        "qemu",
        "100ms",
        "h:1",
        "unix:s",
        "1e400",
        "nan",
        "5M",
        "NaN",
        "slot0",
        "000001-0123456789ab.json",
        "file",
    ),
)
BYTES = (
    b"",
    b"\0",
    b"\1",
    b"\x08\1",
    b"\x08\x80\1",
    b"\x80",
    b"\x0a\2\x08\1",
    b"\x12\0",
    b"\xff" * 10,
    bytes(16),
    b"HWDBM",
    b"{}",
)
VALUES: dict[str, tuple[Any, ...]] = {
    "int": NUMBERS, "float": REALS, "str": TEXTS, "bytes": BYTES, "bool": (False, True), "Granule": tuple(Granule),
    "int | None": (None, *NUMBERS), "float | None": (None, *REALS), "str | None": (None, *TEXTS),
    "object": (None, True, *NUMBERS, 0.5, *TEXTS[:8], [], {}, {"x": 1}),
}  # fmt: skip


@cache
def functions() -> list[tuple[str, str, list[str]]]:
    """Return each function of plain numbers and texts: its module, its name, and its parameters' types."""
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for node in parsed(path).body:
            if isinstance(node, ast.FunctionDef) and not (node.decorator_list or node.args.vararg or node.args.kwarg):
                given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                kinds = [ast.unparse(each.annotation) if each.annotation else "" for each in given]
                if kinds and all(kind in VALUES for kind in kinds):
                    found.append((module, node.name, kinds))
    return found


def arguments(kinds: list[str]) -> Iterator[tuple[Any, ...]]:
    """Yield what a function is called with: each value of one parameter, beside a few of the others."""
    if len(kinds) == 1:
        yield from ((value,) for value in VALUES[kinds[0]])
        return
    few = [FEW if kind == "int" else VALUES[kind][:: max(len(VALUES[kind]) // 8, 1)] for kind in kinds]
    every = list(product(*few))
    yield from every[:: len(every) // 60 + 1]


def shown(value: object) -> str:
    """Return what a function returned, the same on each machine."""
    if isinstance(value, GeneratorType):
        return shown(list(islice(value, 6)))
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape} {shown(value.ravel()[:6].tolist())}"
    if isinstance(value, float):
        return f"{value:.9g}"
    if isinstance(value, list | tuple):
        parts = [shown(each) for each in value]
        return f"[{', '.join(parts)}]"
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def answers(module: str, name: str, kinds: list[str]) -> Iterator[str]:
    function = getattr(importlib.import_module(f"hwdbm.{module.removesuffix('.__init__')}"), name)
    parameters = signature(function).parameters.values()
    for given in arguments(kinds):
        positional = [
            value for value, each in zip(given, parameters, strict=True) if each.kind is not each.KEYWORD_ONLY
        ]
        named = {
            each.name: value for value, each in zip(given, parameters, strict=True) if each.kind is each.KEYWORD_ONLY
        }
        try:
            answer = shown(function(*positional, **named))
        except Exception as error:  # noqa: BLE001 - what is refused, and how, is an answer too
            answer = f"{type(error).__name__}: {error}"
        yield f"  {', '.join(map(shown, given))}: {answer[:200]}"


@cache
def called() -> dict[str, list[tuple[str, str, list[str]]]]:
    """Return the functions that are called, by their rooms."""
    found: dict[str, list[tuple[str, str, list[str]]]] = {}
    for module, name, kinds in functions():
        if name not in EFFECTS.get(module, ()):
            found.setdefault(module.partition(".")[0], []).append((module, name, kinds))
    return found


# To read all modules takes a second.
ROOMS = sorted(called()) if writing() else sorted(path.stem for path in (DATA / "small").glob("*.txt"))


def test_each_room_has_its_file() -> None:
    assert sorted(called()) == ROOMS


@pytest.mark.parametrize("room", ROOMS)
def test_what_small_functions_return_was_looked_at(room: str) -> None:
    kept, lines = DATA / "small" / f"{room}.txt", []
    seen = kept.read_text() if kept.exists() else ""
    for module, name, kinds in called()[room]:
        head = f"{module}.{name}({', '.join(kinds)})"
        assert writing() or head in seen, f"{head} is new: look at what it returns, or add it to EFFECTS"
        lines += [head, *answers(module, name, kinds), ""]
    as_seen(f"small/{room}.txt", "\n".join(lines))


@pytest.mark.parametrize("module", EFFECTS)
def test_functions_that_do_more_are_there(module: str) -> None:
    there = vars(importlib.import_module(f"hwdbm.{module.removesuffix('.__init__')}"))
    assert EFFECTS[module] <= there.keys()
