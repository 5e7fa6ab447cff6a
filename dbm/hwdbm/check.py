"""The doors: what a public verb asks of its arguments before it changes anything.

Each function returns the argument in the one form that the inside works with (a plain `int`, a `bool`, a contiguous
array) or raises. A wrong type is a `TypeError`; a wrong value is the error that the caller names, with the value in its
text.
"""

import json
import operator
import os
import re
from collections.abc import Collection, Iterable, Mapping
from itertools import islice
from math import inf, isfinite
from pathlib import Path
from typing import Any, Never, TypeVar

import numpy as np
from numpy.typing import NDArray

from hwdbm.errors import shown

__all__ = [
    "array", "flag", "inside", "instance", "instances", "integer", "integers", "octets", "one_of", "path", "real",
    "separate", "size", "strict_json", "uint64s", "zeros",
]  # fmt: skip

_CHUNK = 1 << 16  # numbers of an iterable that are looked at together


T = TypeVar("T")

_UINT64 = np.dtype(np.uint64)
_SIZE = re.compile(r"(\d{1,20}(?:\.\d{1,20})?)([KMGT]?)(?:i?B)?", re.IGNORECASE | re.ASCII)
_POWERS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


def size(text: str) -> int:
    """Return the bytes that a text means: a number, or one with K, M, G or T for powers of 1024.

    A part of a byte is dropped.

    Raises
    ------
    ValueError
        If it is none of these.

    Examples
    --------
    >>> size("4K"), size("2MiB"), size("1.2G")
    (4096, 2097152, 1288490188)
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a size like 4096, 4K, 2M or 1G")
    unit = 1 << _POWERS[match[2].upper()]
    return int(float(match[1]) * unit) if "." in match[1] else int(match[1]) * unit


def integer(
    value: Any, name: str, low: int | None = 0, high: int | None = None, error: type[Exception] = ValueError
) -> int:
    """Return an integer of any type as an `int` of [low, high].

    Parameters
    ----------
    value : int or numpy integer
        Whatever has ``__index__``, but no bool: ``True`` is a slip more often than a 1.
    name : str
        The value's name in the error's text.
    low, high : int or None
        The smallest and the largest value allowed; None for no bound.
    error : type
        The error for a value out of range.

    Raises
    ------
    TypeError
        For what is no integer: floats, strings and bools among it.

    Examples
    --------
    >>> integer(np.uint64(7), "gfn")
    7
    >>> integer(7.0, "gfn")
    Traceback (most recent call last):
    TypeError: gfn is an integer, not 7.0
    >>> integer(-1, "gfn")
    Traceback (most recent call last):
    ValueError: gfn is 0 or more, not -1
    """
    if type(value) is not int:
        if isinstance(value, bool | np.bool_) or (isinstance(value, np.ndarray) and value.ndim):
            raise TypeError(f"{name} is an integer, not {shown(value)}")
        try:
            value = operator.index(value)
        except TypeError:
            raise TypeError(f"{name} is an integer, not {shown(value)}") from None
    number: int = value
    if (low is not None and number < low) or (high is not None and number > high):
        raise error(f"{name} is {_bounds(low, high)}, not {_number(number)}")
    return number


def flag(value: Any, name: str) -> bool:
    """Return a bool, Python's or numpy's, as a `bool`.

    Raises
    ------
    TypeError
        For anything else: 0, 1 and strings among it.

    Examples
    --------
    >>> flag(np.bool_(True), "writable")
    True
    >>> flag("no", "writable")
    Traceback (most recent call last):
    TypeError: writable is True or False, not 'no'
    """
    if value is True or value is False:  # nearly each one is
        return value is True
    if isinstance(value, np.bool_):
        return bool(value)
    raise TypeError(f"{name} is True or False, not {shown(value)}")


def real(value: Any, name: str, low: float = -inf, high: float = inf, error: type[Exception] = ValueError) -> float:
    """Return a finite number, a float or an integer of any type, as a `float` of [low, high].

    Raises
    ------
    TypeError
        For anything else: strings, bools and complex numbers among it.

    Examples
    --------
    >>> real(np.float32(0.5), "seconds", low=0)
    0.5
    >>> real(float("nan"), "seconds", low=0)
    Traceback (most recent call last):
    ValueError: seconds is a number of 0 or more, not nan
    """
    if type(value) is float and low <= value <= high and isfinite(value):  # nearly each one is
        return value
    if isinstance(value, float | np.floating):
        number = float(value)
        text = str(number)
    else:
        try:
            whole = integer(value, name, low=None)
            text = _number(whole)
            number = float(whole)
        except TypeError:
            raise TypeError(f"{name} is a number, not {shown(value)}") from None
        except OverflowError:
            number = inf if value > 0 else -inf
    if not (isfinite(number) and low <= number <= high):
        bounds = (
            "" if (low, high) == (-inf, inf) else f" of {low:g} or more" if high == inf else f" of {low:g} to {high:g}"
        )
        raise error(f"{name} is a {'finite ' if not bounds else ''}number{bounds}, not {text}")
    return number


def instance(value: Any, kind: Any, name: str) -> None:
    """Raise `TypeError` if an argument isn't of a class, an abstract one among them, or of one of a tuple of classes.

    Examples
    --------
    >>> instance("4K", int, "granule")
    Traceback (most recent call last):
    TypeError: granule is of type int, not '4K'
    """
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        raise TypeError(f"{name} is of type {' or '.join(each.__name__ for each in kinds)}, not {shown(value)}")


def instances(value: Any, kind: type[T], name: str) -> tuple[T, ...]:
    """Return the elements of an iterable, all of one class, as a tuple.

    Raises
    ------
    TypeError
        If it is no iterable, or one of them is of another class.

    Examples
    --------
    >>> instances([1, "2"], int, "numbers")
    Traceback (most recent call last):
    TypeError: numbers are of type int, not '2'
    """
    if not isinstance(value, Iterable):
        raise TypeError(f"{name} are several, not {shown(value)}")
    elements = tuple(value)
    for each in elements:
        if not isinstance(each, kind):
            raise TypeError(f"{name} are of type {kind.__name__}, not {shown(each)}")
    return elements


def one_of(value: Any, names: Collection[str], name: str, error: type[Exception] = ValueError) -> None:
    """Raise if a text isn't one of some: `TypeError` if it is no text.

    Examples
    --------
    >>> one_of("dbn", ("dbm", "writable"), "policy")
    Traceback (most recent call last):
    ValueError: policy is dbm or writable, not 'dbn'
    """
    instance(value, str, name)
    if value not in names:
        raise error(f"{name} is {' or '.join(names)}, not {shown(value)}")


def path(value: Any, name: str) -> Path:
    r"""Return a path that a file can have.

    Raises
    ------
    TypeError
        If it is neither a text nor path-like.
    ValueError
        If no file's name can have a character of it.

    Examples
    --------
    >>> path("a\0b", "image")
    Traceback (most recent call last):
    ValueError: image is a path, and 'a\x00b' can't be one
    """
    instance(value, (str, os.PathLike), name)
    try:
        possible = b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        possible = False
    if not possible:
        raise ValueError(f"{name} is a path, and {shown(value)} can't be one")
    return Path(value)


def integers(value: Any, name: str, low: int, high: int, error: type[Exception] = ValueError) -> NDArray[np.int64]:
    """Return integers of any type as a one-dimensional int64 array of values of [low, high], both within 63 bits.

    Raises
    ------
    TypeError
        If one of them is no integer, or the array isn't of integers.

    Examples
    --------
    >>> integers(np.array([3, 1], dtype=np.uint8), "pages", 0, 9)
    array([3, 1])
    >>> integers([0.9], "pages", 0, 9)
    Traceback (most recent call last):
    TypeError: pages are integers, not 0.9
    """
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "iu" or isinstance(value, np.ma.MaskedArray):
            raise TypeError(f"{name} are integers, not {_kind(value)}")
        if value.ndim != 1:
            raise error(f"{name} are an array of one dimension, not of shape {value.shape}")
        if not inside(value, low, high):
            raise error(
                f"{name} are {_bounds(low, high)}, not {_number(int(value.min()))}..{_number(int(value.max()))}"
            )
        return np.array(value, dtype=np.int64)
    if not isinstance(value, Iterable) or isinstance(value, str | bytes | bytearray | Mapping):
        raise TypeError(f"{name} are integers, not {shown(value)}")
    if isinstance(value, range):  # it is known before it is counted
        for end in (value[0], value[-1]) if value else ():
            integer(end, name, low, high, error)
        return _arange(value, name)
    # One that has no end is found out by what is in it, not by the memory that it takes.
    elements, found = iter(value), []
    while chunk := list(islice(elements, _CHUNK)):
        if set(map(type, chunk)) != {int} or not (low <= min(chunk) and max(chunk) <= high):
            chunk = [_one(each, name, low, high, error) for each in chunk]
        found.append(np.array(chunk, dtype=np.int64))
    return np.concatenate(found) if found else np.empty(0, dtype=np.int64)


def _one(value: Any, name: str, low: int, high: int, error: type[Exception]) -> int:
    try:
        return integer(value, name, low, high, error)
    except TypeError:
        raise TypeError(f"{name} are integers, not {shown(value)}") from None


def _arange(value: range, name: str) -> NDArray[np.int64]:
    try:
        return np.arange(value.start, value.stop, value.step, dtype=np.int64)
    except (MemoryError, ValueError):  # the latter beyond what addresses reach
        raise MemoryError(f"{name}: {len(value)} numbers take more memory than there is") from None


def array(value: Any, dtype: Any, name: str) -> None:
    """Raise `TypeError` if an argument isn't an array of a type, in the machine's byte order, or if it is masked.

    Examples
    --------
    >>> array([1, 2], np.int64, "pages")
    Traceback (most recent call last):
    TypeError: pages: an array of int64 is needed, not [1, 2]
    """
    kind = np.dtype(dtype)
    if type(value) is np.ndarray and value.dtype is kind:  # nearly always; such a type is the machine's own
        return
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{name}: an array of {kind} is needed, not {shown(value)}")
    if value.dtype != kind or not value.dtype.isnative or isinstance(value, np.ma.MaskedArray):
        held = _kind(value) if value.dtype.isnative else value.dtype.str
        raise TypeError(f"{name}: an array of {kind} is needed, not of {held}")


def octets(value: Any, name: str) -> memoryview:
    """Return what is bytes-like as a contiguous view of its bytes: it is copied only where its bytes lie apart.

    Raises
    ------
    TypeError
        If it isn't bytes-like.

    Examples
    --------
    >>> bytes(octets(bytearray(b"abc"), "data"))
    b'abc'
    >>> octets("abc", "data")
    Traceback (most recent call last):
    TypeError: data is bytes-like, not 'abc'
    """
    try:
        view = memoryview(value)
    except (TypeError, ValueError, BufferError):
        raise TypeError(f"{name} is bytes-like, not {shown(value)}") from None
    if view.format == "O" or isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name} is bytes-like, not {shown(value)}")
    return view.cast("B") if view.c_contiguous and view.nbytes else memoryview(view.tobytes())


def zeros(count: int, what: str) -> NDArray[np.uint64]:
    """Return words that are all zero, and that nothing backs before they are written.

    Raises
    ------
    MemoryError
        If there is no room for them; the error names the number, and `what` they are.

    Examples
    --------
    >>> zeros(2, "words of a bitmap")
    array([0, 0], dtype=uint64)
    """
    try:
        return np.zeros(count, dtype=np.uint64)
    except (MemoryError, ValueError):  # as above
        raise MemoryError(f"{what}: {count} words take more memory than there is") from None


def inside(numbers: NDArray[Any], low: int, high: int) -> bool:
    """Return whether all elements of an integer array are of [low, high]; of one alone at the cost of a comparison."""
    if numbers.size == 1:
        return low <= int(numbers.item()) <= high
    return not numbers.size or (low <= int(numbers.min()) and int(numbers.max()) <= high)


def uint64s(
    value: Any, name: str, size: int | None = None, *, writable: bool = False, error: type[Exception] = ValueError
) -> NDArray[np.uint64]:
    """Return an array that compiled code may work on: of native uint64, one-dimensional, contiguous, aligned.

    Parameters
    ----------
    value : (n,) uint64 array
        It is returned as it is, and never copied.
    name : str
        The array's name in the error's text.
    size : int, optional
        The elements that it must have.
    writable : bool
        Whether it will be written to.
    error : type
        The error for a wrong shape or size, or a read-only array.

    Raises
    ------
    TypeError
        If it is no array of native uint64.

    Examples
    --------
    >>> uint64s(np.arange(3), "words")
    Traceback (most recent call last):
    TypeError: words: an array of uint64 is needed, not of int64
    """
    if type(value) is np.ndarray and value.dtype is _UINT64 and value.ndim == 1 and size in (None, value.size):
        flags = value.flags  # nearly always all is well, and a call of a kernel asks it of each of its arrays
        if flags.carray or (flags.c_contiguous and flags.aligned and not writable):
            return value
    array(value, np.uint64, name)
    words: NDArray[np.uint64] = value
    if value.ndim != 1 or not value.flags.c_contiguous or not value.flags.aligned:
        raise error(
            f"{name} are a contiguous array of one dimension, not of shape {value.shape}, strides {value.strides}"
        )
    if size is not None and value.size != size:
        raise error(f"{name} are {size} words, not {value.size}")
    if writable and not value.flags.writeable:
        raise error(f"{name} are to be written, and the array is read-only")
    return words


def strict_json(raw: str | bytes) -> Any:
    """Return what JSON says, in which no key comes twice and each number is one.

    Raises
    ------
    ValueError
        If it is no JSON, or is nested deeper than Python reads.

    Examples
    --------
    >>> strict_json('{"page": 1, "page": 2}')
    Traceback (most recent call last):
    ValueError: the key 'page' comes twice
    """
    try:
        return json.loads(raw, object_pairs_hook=_once, parse_constant=_no_number)
    except RecursionError as error:
        raise ValueError(f"it is nested too deep: {error}") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [key for key, _ in pairs]
        raise ValueError(f"the key {shown(next(key for key in names if names.count(key) > 1))} comes twice")
    return found


def _no_number(name: str) -> Never:
    raise ValueError(f"{name} is no number")


def separate(written: NDArray[Any], read: NDArray[Any], what: str, error: type[Exception] = ValueError) -> None:
    """Raise `error` if two arrays share memory, where what is written to one would change the other.

    Examples
    --------
    >>> a = np.zeros(4, dtype=np.uint64)
    >>> separate(a[:2], a[1:], "the mask and the host's flags")
    Traceback (most recent call last):
    ValueError: the mask and the host's flags share memory: pass a copy
    """
    # Both are contiguous, so that their bounds say it all.
    if np.may_share_memory(written, read):
        raise error(f"{what} share memory: pass a copy")


def _bounds(low: int | None, high: int | None) -> str:
    if high is None:
        return f"{low} or more"
    return f"at most {_number(high)}" if low is None else f"{low} to {_number(high)}"


def _kind(array: NDArray[Any]) -> str:
    return f"{'masked ' if isinstance(array, np.ma.MaskedArray) else ''}{array.dtype}"


def _number(number: int) -> str:
    return (
        str(number)
        if -(1 << 20) < number < 1 << 20
        else hex(number)
        if number.bit_length() <= 512
        else "a number of many digits"
    )
