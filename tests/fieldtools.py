"""Records, as JSON has them, with one of their fields changed."""

import copy
from collections.abc import Iterator
from typing import Any

VALUES = (None, 0, 1, 1.5, -1, 3e7, 1e300, True, "x", [])


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield where each field of a record is."""
    for key, each in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(each, (*path, key))


def changed(record: Any, values: tuple[object, ...] = VALUES) -> Iterator[tuple[str, str, Any]]:
    """Yield the record without each of its fields, and with each value in its place: where, what, and the record."""
    for path in places(record):
        for value in ("missing", *values):
            made = copy.deepcopy(record)
            inner = made
            for key in path[:-1]:
                inner = inner[key]
            if value == "missing":
                del inner[path[-1]]
            else:
                inner[path[-1]] = copy.deepcopy(value)
            yield ".".join(map(str, path)), repr(value) if value != "missing" else "missing", made
