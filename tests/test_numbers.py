"""Numbers that others know too, the peer, the kernel, the firmware, the hardware, don't change unseen."""

import enum
import importlib
import struct
from collections.abc import Iterator

import pytest
from seen import as_seen


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
