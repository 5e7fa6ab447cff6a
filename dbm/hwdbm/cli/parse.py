"""Reading what people type: sizes, addresses, slots."""

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from math import inf, nan
from pathlib import Path
from typing import TypeVar

from hwdbm import check
from hwdbm.cli import example
from hwdbm.errors import ImageError
from hwdbm.image import Slot

Kind = TypeVar("Kind", bound=StrEnum)


def path(text: str) -> Path:
    """Return the path that `text` is; an empty one, which `Path` takes for the current folder, is a slip.

    Raises
    ------
    ValueError
        If it is empty.
    """
    if not text:
        raise ValueError("the path is empty")
    return Path(text)


def image(text: str) -> Path:
    """Return the path of an image: a file's, or that of an example, as in ``example:4k_ipa40``.

    Raises
    ------
    ValueError
        If the path is empty, or there is no such example.
    """
    return example.find(text) or path(text)


def trace(text: str) -> Path:
    """Return the path of a trace: a folder's, or that of an example, as in ``example:kvm-counting``.

    Raises
    ------
    ValueError
        If the path is empty, or there is no such example.
    """
    return example.find_trace(text) or path(text)


@dataclass(frozen=True, slots=True)
class Numbered:
    """A file that belongs to a slot.

    Parameters
    ----------
    slot : int
        The slot's id.
    path : Path
        The file.
    """

    slot: int
    path: Path


def numbered_path(text: str) -> Numbered:
    """Return what ``ID:FILE`` names.

    Raises
    ------
    ValueError
        If it isn't of that form.

    Examples
    --------
    >>> numbered_path("0:dirty/slot0.bitmap")
    Numbered(slot=0, path=PosixPath('dirty/slot0.bitmap'))
    """
    number, colon, file = text.partition(":")
    if not colon or not re.fullmatch(r"[0-9]{1,10}", number):
        raise ValueError(f"{text!r} is not ID:FILE, as in 0:slot0.bitmap")
    return Numbered(int(number), path(file))


def choice(kinds: type[Kind]) -> Callable[[str], Kind]:
    """Return a reader of one of some words."""

    def read(text: str) -> Kind:
        try:
            return kinds(text)
        except ValueError:
            raise ValueError(f"{text!r} is none of {', '.join(kinds)}") from None

    return read


def whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """Return a reader of whole numbers from `low` to `high`.

    Examples
    --------
    >>> whole(1)("12")
    12
    """

    def read(text: str) -> int:
        value = int(text) if re.fullmatch(r"-?[0-9]{1,30}", text) else low - 1
        if value < low or (high is not None and value > high):
            raise ValueError(f"{text!r} is no whole number of {low} {'or more' if high is None else f'to {high}'}")
        return value

    return read


def address(text: str) -> int:
    """Return the number that `text` is: decimal, or hexadecimal with ``0x``.

    Raises
    ------
    ValueError
        If it is neither, or doesn't fit into 64 bits.

    Examples
    --------
    >>> address("0x4000_0000"), address("4096")
    (1073741824, 4096)
    """
    try:
        value = int(text, 0)
    except ValueError:
        raise ValueError(f"{text!r} is not a number like 4096 or 0x1000") from None
    if not 0 <= value < 1 << 64:
        raise ValueError(f"{text!r} doesn't fit into 64 bits")
    return value


def number(text: str) -> float:
    """Return the number of 0 or more that `text` is.

    Raises
    ------
    ValueError
        If it is none.

    Examples
    --------
    >>> number("0.5"), number("1e3")
    (0.5, 1000.0)
    """
    try:
        value = float(text)
    except ValueError:
        value = nan
    if not 0 <= value < inf:
        raise ValueError(f"{text!r} is not a number of 0 or more")
    return value


def seconds(text: str) -> float:
    """Return the seconds above 0 that `text` means: a number, or one with us, ms, s or min.

    Raises
    ------
    ValueError
        If it is none of these.

    Examples
    --------
    >>> seconds("100ms"), seconds("1.5"), seconds("2min")
    (0.1, 1.5, 120.0)
    """
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)\s*(us|ms|s|min|)", text.strip(), re.ASCII)
    value = float(match[1]) * {"us": 1e-6, "ms": 1e-3, "min": 60}.get(match[2], 1) if match else 0
    if not 1e-6 <= value <= 1e9:
        raise ValueError(f"{text!r} is not a time above 0, like 100ms, 20s or 2min")
    return value


def size(text: str) -> int:
    """Return the bytes that `text` means: as `hwdbm.check.size`, or in hexadecimal as an address.

    Examples
    --------
    >>> size(" 4K"), size("0x1000")
    (4096, 4096)
    """
    with suppress(ValueError):
        return address(text)
    return check.size(text.strip())


def page_size(text: str) -> int:
    """Return the bytes of a page: a power of two of 4 KiB or more.

    Raises
    ------
    ValueError
        If it is none.

    Examples
    --------
    >>> page_size("64K")
    65536
    """
    value = size(text)
    if value < 4096 or value & value - 1:
        raise ValueError(f"a page is a power of two of 4K or more, not {text!r}")
    return value


def slot(text: str) -> Slot:
    """Return the memslot that ``ID:GPA:SIZE`` describes.

    Raises
    ------
    ValueError
        If it isn't of that form, or can't be a memslot.

    Examples
    --------
    >>> slot("0:0x80000000:1G")
    Slot(id=0, gpa=2147483648, size=1073741824)
    """
    parts = text.split(":")
    if len(parts) != 3:
        raise ValueError(f"{text!r} is not ID:GPA:SIZE, as in 0:0x80000000:1G")
    try:
        return Slot(address(parts[0]), size(parts[1]), size(parts[2]))
    except ImageError as error:
        raise ValueError(str(error)) from error
