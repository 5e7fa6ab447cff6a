"""The defaults of what users call are part of the interface: what was published stays, or is changed here too."""

import dataclasses
import enum
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from seen import as_seen

import hwdbm

INSIDE = ("__main__", "cli", "bench", "check", "files", "process")
PUBLISHED = Path(__file__).parent / "data" / "defaults.txt"


def defaults(call: Any) -> dict[str, str]:
    """Return the parameters of a callable that have defaults, and these."""
    parameters = inspect.signature(call).parameters.values()
    given = {each.name: each.default for each in parameters if each.default is not inspect.Parameter.empty}
    shown = {name: str(value) if isinstance(value, enum.Enum) else repr(value) for name, value in given.items()}
    return {name: value for name, value in shown.items() if "0x" not in value and "object" not in value}


def callables(module: ModuleType) -> Iterator[tuple[str, Any]]:
    for name in getattr(module, "__all__", ()):
        value = getattr(module, name)
        where = f"{module.__name__}.{name}"
        if inspect.isclass(value) and not issubclass(value, enum.Enum | BaseException):
            yield where, value
            for method in vars(value):
                if not method.startswith("_") and callable(getattr(value, method)):
                    yield f"{where}.{method}", getattr(value, method)
        elif inspect.isfunction(value):
            yield where, value


def called(call: Any) -> str:
    """Return how a callable may be called: its parameters by their names, with a star where names are needed."""
    parameters = inspect.signature(call).parameters.values()
    bare = [each.replace(annotation=inspect.Parameter.empty, default=inspect.Parameter.empty) for each in parameters]
    return str(inspect.Signature(bare, __validate_parameters__=False))


def records(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """Yield the dataclasses of a module, whoever makes them."""
    for name, value in vars(module).items():
        if dataclasses.is_dataclass(value) and isinstance(value, type) and value.__module__ == module.__name__:
            yield f"{module.__name__}.{name}", value


def published() -> Iterator[str]:
    """Yield a line for each default: to be kept in the file, after a change that is wanted."""
    for info in pkgutil.walk_packages(hwdbm.__path__, "hwdbm."):
        if info.name.split(".")[1] != "__main__":
            module = importlib.import_module(info.name)
            users = callables(module) if info.name.split(".")[1] not in INSIDE else ()
            for where, call in dict([*users, *records(module)]).items():
                try:
                    given = defaults(call)
                except (ValueError, TypeError):  # a signature that Python can't tell
                    continue
                yield from (f"{where} {name}: {value}" for name, value in given.items())


def test_defaults_stay() -> None:
    now = dict(line.split(": ", 1) for line in published())
    kept = dict(line.split(": ", 1) for line in PUBLISHED.read_text().splitlines())
    both = kept.keys() & now.keys()
    assert {where: now[where] for where in both} == {where: kept[where] for where in both}
    assert len(both) > 600


def test_what_is_given_by_name_stays() -> None:
    """Of what users call: whoever gives an argument by its place, or by its name, may go on to do so."""
    lines = []
    for info in pkgutil.walk_packages(hwdbm.__path__, "hwdbm."):
        if info.name.split(".")[1] not in INSIDE:
            for where, call in callables(importlib.import_module(info.name)):
                try:
                    lines.append(f"{where}{called(call)}")
                except (ValueError, TypeError):  # a signature that Python can't tell
                    continue
    as_seen("parameters.txt", "".join(f"{line}\n" for line in sorted(set(lines))))
