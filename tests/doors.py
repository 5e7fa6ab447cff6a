"""What test_doors.py is made of: the library's public verbs, wrong arguments of every kind, and states to compare."""

import dis
import importlib
import inspect
import os
import pkgutil
import re
import resource
import signal
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from enum import Enum
from fractions import Fraction
from functools import cache
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
from bitarray import bitarray
from effort import EFFORT

import hwdbm
from hwdbm import DirtyBitmap

# --- the surface ------------------------------------------------------------------------------------------------

_SECONDS = 30.0  # that a call may take, which does next to nothing, on a machine that does other things too
_ROOM = 200 << 20  # bytes of addresses that it may take
_NO_STATE = {"fd", "_scratch"}  # a number that the system chose, and room to work in
_LARGE = 1 << 16  # bytes
_OPERATORS = ("__call__", "__contains__", "__getitem__", "__matmul__")


@cache
def surface() -> dict[str, Any]:
    """Return all that is public, by a name like ``stage2.Stage2``: what the modules of the first floor export.

    Of a package that is what its ``__init__`` exports: the modules in it are its own affair. The command line isn't
    part of the library.
    """
    found: dict[str, Any] = {}
    named: dict[int, str] = {}
    for info in pkgutil.iter_modules(hwdbm.__path__):
        if info.name.startswith("_") or info.name == "cli":
            continue
        module = importlib.import_module(f"hwdbm.{info.name}")
        for name in getattr(module, "__all__", ()):
            item = getattr(module, name)
            if not (inspect.isclass(item) or _is_function(item)) or getattr(item, "_is_protocol", False):
                continue
            if item.__module__.split(".")[1:2] == [info.name]:  # another room may pass it on
                found.pop(named.get(id(item), ""), None)
            elif id(item) in named:
                continue
            named[id(item)] = f"{info.name}.{name}"
            found[f"{info.name}.{name}"] = item
    return found


def _is_function(item: object) -> bool:
    return inspect.isfunction(item) or inspect.isfunction(getattr(item, "__wrapped__", None))


def verbs(item: type) -> list[str]:
    """Return the public methods of a class that the library itself defines, its own or a base's."""
    names = []
    for name in sorted({name for base in item.__mro__ for name in vars(base)}):
        found = inspect.getattr_static(item, name)
        function = getattr(found, "__func__", found)
        if isinstance(function, property) or not _is_function(function):
            continue
        module = inspect.unwrap(function).__module__ or ""
        if module.startswith("hwdbm") and (not name.startswith("_") or name in _OPERATORS):
            names.append(name)
    return names


def made(item: type) -> bool:
    """Return whether a class is one that programs make: no enumeration or error."""
    return not issubclass(item, Enum | BaseException)


# --- wrong arguments --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wrong:
    """An argument in place of a good one.

    `value` is it. Where `twin` is given, the outcome must be the one that the twin has. Where `refused`, it must be a
    TypeError; otherwise it may do something, and if it is refused then as documented.
    """

    label: str
    value: Any
    twin: Any = field(default=None)
    has_twin: bool = False
    refused: bool = False


def _same(label: str, value: Any, twin: Any) -> Wrong:
    return Wrong(label, value, twin, has_twin=True)


def _refused(*values: Any) -> Iterator[Wrong]:
    for value in values:
        yield Wrong(f"{type(value).__name__} {str(value)[:20]}", value, refused=True)


# The narrowest, in which anything overflows, and those of 64 bits, which become floats beside each other; all of them
# in `make thorough`.
_INTEGERS = (
    (np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64)
    if EFFORT > 1
    else (np.int8, np.int64, np.uint8, np.uint64)
)
_NUMBERS = (-1, -64, -(1 << 63), (1 << 63) - 1, 1 << 63, (1 << 64) - 64, (1 << 64) - 1, 1 << 64, 10**23, 1 << 600)


class Index:
    """An object that is an integer to Python."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __index__(self) -> int:
        return self.number


class Sub(int):
    """An integer that says something else when it is compared."""

    def __lt__(self, other: object) -> bool:
        return False

    __le__ = __gt__ = __ge__ = __lt__


def wrong(value: Any, optional: bool, several: bool) -> Iterator[Wrong]:
    """Yield what is to be given in place of a good argument, which may be None, or many of its kind."""
    for each in _wrong(value, optional):
        some = several and isinstance(each.value, list | tuple | np.ndarray)
        yield replace(each, refused=False) if some else each


def _wrong(value: Any, optional: bool) -> Iterator[Wrong]:
    if not optional and value is not None:
        yield from _refused(None)
    if isinstance(value, bool):
        yield _same("numpy's bool", np.bool_(value), value)
        yield from _refused(0, 1, "no", 1.0, np.int64(1), [])
    elif isinstance(value, Enum):
        yield from _refused(b"K4", 4.5, object())
    elif isinstance(value, int):
        yield from _wrong_integers(value)
    elif isinstance(value, float):
        yield from _wrong_floats(value)
    elif isinstance(value, str):
        yield from _refused(5, b"x", True, 1.5, ["x"])
        yield from (Wrong(f"text {each[:5]!r}", each) for each in ("", "nonsense", "a\0b", "x" * 5000, "\ud800"))
    elif isinstance(value, bytes):
        yield from _refused("text", 1.5)
        yield _same("a bytearray", bytearray(value), value)
        yield _same("a memoryview", memoryview(value), value)
        yield _same("strided bytes", memoryview(bytes(2 * len(value)))[::2], bytes(len(value)))
        yield from (Wrong("other bytes", each) for each in (b"", value[:-1], value + b"\0", b"\xff" * len(value)))
    elif isinstance(value, DirtyBitmap):
        yield from _wrong_bitmaps(value)
    elif isinstance(value, np.ndarray):
        yield from _wrong_arrays(value)
    elif isinstance(value, list | tuple):
        yield from _refused(5, 1.5)
        if value and all(type(each) is int for each in value):
            yield _same("an array", np.array(value), list(value))
            yield _same("numpy integers", [np.uint16(each) for each in value], list(value))
            yield from (Wrong(f"a list of {each!r}", [each], refused=True) for each in (1.9, "7", True, None))
            yield from (Wrong(f"a list of {each:#x}", [each]) for each in (-1, 1 << 63, 1 << 64, 1 << 600))
        else:
            texts = bool(value) and isinstance(value[0], str)
            yield from (Wrong(f"a list of {each!r}", [each], refused=True) for each in (1.9, None))
            yield Wrong("a list of '7'", ["7"], refused=not texts)
    elif isinstance(value, Mapping):
        yield from _refused(5, "x", [1])
        yield Wrong("an empty mapping", {})
        for key, kept in value.items():
            yield Wrong(f"nothing for {key!r}", {each: value[each] for each in value if each != key})
            if isinstance(kept, np.ndarray):
                for each in _wrong_arrays(kept):
                    twin = {**value, key: each.twin} if each.has_twin else None
                    yield replace(each, value={**value, key: each.value}, twin=twin)
    elif callable(value):
        yield from _refused(5, "x")
    elif value is not None:
        yield from _refused(5, "x", object())


def _wrong_integers(value: int) -> Iterator[Wrong]:
    for kind in _INTEGERS:
        if np.iinfo(kind).min <= value <= np.iinfo(kind).max:
            yield _same(f"{kind.__name__} {value:#x}", kind(value), value)
    yield _same("what has an index", Index(value), value)
    yield _same("a class of integers of its own", Sub(value), value)
    yield _same("an array of no dimension", np.array(value, dtype=object if value >> 64 else None), value)
    yield from (Wrong(f"number {number:#x}"[:40], number) for number in _NUMBERS)
    for kind in _INTEGERS:
        for number in {np.iinfo(kind).min, np.iinfo(kind).max} - {0}:
            yield _same(f"{kind.__name__} {number:#x}", kind(number), number)
        if np.iinfo(kind).min:
            yield _same(f"{kind.__name__} -1", kind(-1), -1)
    yield _same("uint64 2**64 - 64", np.uint64((1 << 64) - 64), (1 << 64) - 64)
    yield from _refused(
        1.9, float(value) if abs(value) < 1 << 1000 else 1.0, np.float64(1.0), "7", b"7", True, False, np.True_, 1j,
        [1], (1,), np.array([1]), np.array([1, 2]), Fraction(1), object(), {},
    )  # fmt: skip


def _wrong_floats(value: float) -> Iterator[Wrong]:
    yield _same("float64", np.float64(value), value)
    if np.float32(value) == value:
        yield _same("float32", np.float32(value), value)
    if value == int(value):
        yield _same("an integer", int(value), value)
        yield _same("int64", np.int64(int(value)), value)
    numbers = (float("nan"), float("inf"), -float("inf"), -1.0, 1e308, 5e-324, 10**400, -(10**400))
    yield from (Wrong(f"number {number}"[:40], number) for number in numbers)
    yield from _refused("1", b"1", 1j, [1.0], np.array([1.0, 2.0]), object(), True, np.True_)


def _wrong_bitmaps(value: DirtyBitmap) -> Iterator[Wrong]:
    yield from _refused(5, "x", 1.5, [1], {1})
    n = value.npages
    yield from (Wrong(f"a bitmap of {m}", DirtyBitmap(m)) for m in {0, 1, n - 1, n + 1, n + 64, 2 * n} if m >= 0)
    if n & 63:
        tail = value.copy()
        tail.words[-1] |= np.uint64(1 << 63)
        yield Wrong("a tail that is set", tail)
    frozen = value.copy()
    frozen.words.setflags(write=False)
    yield Wrong("read-only words", frozen)
    yield _same("an array of words", value.words.copy(), value)
    yield _same("its bytes", value.to_bytes(), value)
    for kind in (">u8", "i8", "i4", "f8", "?", "u1", "O"):
        yield Wrong(f"an array of {kind}", np.ones(max(n, 1), dtype=kind))
    yield Wrong("a strided array", np.zeros(2 * value.words.size, dtype=np.uint64)[::2])


def _wrong_arrays(value: np.ndarray) -> Iterator[Wrong]:
    yield from _refused("x", object(), 1.5)
    yield _same("big-endian", value.astype(value.dtype.newbyteorder(">")), value)
    yield _same("strided", np.repeat(value, 2, axis=0)[::2], value)
    yield _same("backwards", np.ascontiguousarray(value[::-1])[::-1], value)
    yield _same("Fortran's order", np.asfortranarray(value), value)
    still = value.copy()
    still.setflags(write=False)
    yield Wrong("read-only", still)
    raw = np.zeros(value.nbytes + 1, dtype=np.uint8)
    odd = raw[1:].view(value.dtype).reshape(value.shape)
    odd[...] = value
    yield _same("misaligned", odd, value)
    for kind in ("i8", "i4", "u1", "f8", "f4", "?", "O", "U5", "c16", "M8[s]"):
        if np.dtype(kind) != value.dtype:
            yield Wrong(f"of {kind}", np.ones(value.shape, dtype=kind))
    yield Wrong("masked", np.ma.array(value, mask=np.ones(value.shape, dtype=np.bool_)))
    yield Wrong("empty", value[:0])
    yield Wrong("shorter", value[:-1].copy())
    yield Wrong("longer", np.concatenate([value, value]))
    yield Wrong("of two dimensions more", value[None, None].copy())
    yield Wrong("of no dimension", value.reshape(-1)[0])
    if value.dtype.kind in "iu":
        info = np.iinfo(value.dtype)
        for number in {info.min, -1 if info.min else 1, info.max, info.max - 63}:
            yield Wrong(f"of {number:#x}", np.full_like(value, number))


# --- states -----------------------------------------------------------------------------------------------------

_OPAQUE = (threading.Thread, ModuleType, FunctionType, MethodType, type)
_ITSELF = {type(None), bool, int, str, bytes}

Seen = dict[int | str, int]
Form = Callable[[Any, Seen], object]


def state(item: Any, without: frozenset[str] = frozenset()) -> object:
    """Return all that an object holds, deeply, but for some attributes, as something to compare."""
    return _state(item, dict.fromkeys(without, 0))


def _state(item: Any, seen: Seen) -> object:
    kind = type(item)
    if kind in _ITSELF:
        return kind, item
    simple, form = _form(kind)
    if not simple:
        if id(item) in seen:
            return "again", seen[id(item)]
        seen[id(item)] = len(seen)
    return kind, form(item, seen)


@cache
def _form(kind: type) -> tuple[bool, Form]:
    """Return whether what is of a type is told by its value alone, and how: states have millions of items."""

    def known(*types: type) -> bool:
        return issubclass(kind, types)

    if known(float, complex, np.generic, Enum, range, slice):
        return True, lambda item, _: repr(item)
    if known(*_OPAQUE) or (any("__call__" in vars(base) for base in kind.__mro__) and not kind.__dictoffset__):
        return True, lambda item, _: getattr(item, "__qualname__", None)
    if known(np.ndarray):
        return False, _array
    if known(bitarray):
        return False, lambda item, _: item.tobytes()
    if known(DirtyBitmap):
        return False, lambda item, seen: (item.npages, _state(item.words, seen))
    if known(bytearray, memoryview):
        return False, lambda item, _: bytes(item)
    if known(Mapping):
        return False, lambda item, seen: [(_state(key, seen), _state(value, seen)) for key, value in item.items()]
    if known(list, tuple, deque):
        return False, _sequence
    if known(set, frozenset):
        return False, lambda item, seen: sorted(repr(_state(each, seen)) for each in item)
    if known(weakref.ref):
        return False, lambda *_: None
    if kind.__name__ == "RangeLock":  # those of its claims that have ended go with the next
        return False, lambda item, _: len(item)
    if kind.__module__ == "_thread" and hasattr(kind, "locked"):
        return False, lambda item, _: item.locked()
    if kind.__module__.partition(".")[0] != "hwdbm":
        return False, lambda item, _: getattr(item, "closed", None)
    return False, lambda item, seen: [
        (name, _state(value, seen)) for name, value in _attributes(item) if name not in _NO_STATE and name not in seen
    ]


def _array(item: np.ndarray, seen: Seen) -> object:
    if item.nbytes > _LARGE:
        place = f"{item.ctypes.data} {item.nbytes}"  # two views of guest memory say the same
        if place in seen:
            return "again", item.dtype.str, item.shape
        seen[place] = 0
    return item.dtype.str, item.shape, item.tobytes() if item.dtype != object else repr(item)


def _sequence(item: list[Any] | tuple[Any, ...] | deque[Any], seen: Seen) -> object:
    kinds = list(map(type, item))
    return (kinds, list(item)) if _ITSELF.issuperset(kinds) else [_state(each, seen) for each in item]


def plain(item: Any) -> object:
    """Return what tells two plain arguments apart, to be the key of a dictionary; None for what isn't plain."""
    if isinstance(item, DirtyBitmap):
        return DirtyBitmap, item.npages, item.to_bytes()
    if isinstance(item, np.ndarray):
        return (item.dtype.str, item.shape, item.tobytes()) if item.dtype != object else None
    return (type(item), repr(item)) if type(item) in (bool, int, float, bytes) else None


def _attributes(item: object) -> Iterator[tuple[str, Any]]:
    for name in _slots(type(item)):
        if hasattr(item, name):
            yield name, getattr(item, name)
    yield from getattr(item, "__dict__", {}).items()


@cache
def _slots(kind: type) -> tuple[str, ...]:
    return tuple(name for base in kind.__mro__ for name in getattr(base, "__slots__", ()))


# --- bounds -----------------------------------------------------------------------------------------------------


class UnboundedError(Exception):
    """A call took too long."""


@cache
def _statm() -> int:
    return os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)


@contextmanager
def _bounded(name: str | None) -> Iterator[None]:
    """Bound what a call takes: nothing that a caller gives may make it go on for ever, or take all memory."""

    def stop(*_: object) -> None:
        raise UnboundedError(f"{name} makes it go on for ever")

    before, (soft, hard) = signal.signal(signal.SIGALRM, stop), resource.getrlimit(resource.RLIMIT_AS)
    used = int(os.pread(_statm(), 64, 0).split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _ROOM, hard))
    signal.setitimer(signal.ITIMER_REAL, _SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def owned(item: Any, like: Any) -> list[Any]:
    """Return the arrays and bitmaps that an object holds, of the type and size of another one."""
    found: list[Any] = []
    seen: set[int] = set()

    def look(at: Any) -> None:
        if id(at) in seen:
            return
        seen.add(id(at))
        if isinstance(like, DirtyBitmap):
            if isinstance(at, DirtyBitmap) and at.npages == like.npages:
                found.append(at)
        elif isinstance(at, np.ndarray) and (at.dtype, at.shape) == (like.dtype, like.shape):
            found.append(at)
        if isinstance(at, dict):
            at = list(at.values())
        if isinstance(at, list | tuple):
            for each in at:
                look(each)
        elif type(at).__module__.startswith("hwdbm") and not isinstance(at, _OPAQUE):
            for _, each in _attributes(at):
                look(each)

    look(item)
    return found


# --- scenes -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How to make one of a class, and good arguments.

    `make` returns a new one in an interesting state, None for what are functions. `given` returns good arguments by
    their names, for the object made; ``verb.name`` is for one verb alone. `skip` has verbs and parameters
    (``verb.name``) that aren't walked over, each with the reason. `dry` are verbs that are only given what must be
    refused, and aren't run otherwise. `amounts` are parameters that say how much is to be done, and so may take as long
    as they say. `fields` are parameters that are made of fields: an error names the field. `measured` are verbs
    whose result differs from call to call, `unlike` attributes that differ between two objects that are alike.
    """

    make: Callable[[], Any] = lambda: None
    given: Callable[[Any], Mapping[str, Any]] = lambda _: {}
    skip: Mapping[str, str] = field(default_factory=dict)
    fields: frozenset[str] = frozenset()
    dry: frozenset[str] = frozenset()
    amounts: frozenset[str] = frozenset()
    measured: frozenset[str] = frozenset()
    unlike: frozenset[str] = frozenset()


@dataclass
class Scene:
    """A call that is right, about to be made."""

    subject: Any
    call: Callable[..., Any]
    parameters: "Parameters"
    arguments: dict[str, Any]
    unlike: frozenset[str]

    @property
    def optional(self) -> frozenset[str]:
        return self.parameters.optional

    @property
    def several(self) -> frozenset[str]:
        return self.parameters.several

    def run(self, name: str | None = None, value: Any = None) -> "Outcome":
        """Make the call with one argument replaced."""
        return self.run_with({} if name is None else {name: value})

    def run_with(self, replaced: Mapping[str, Any]) -> "Outcome":
        """Make the call with some arguments replaced."""
        arguments, name = {**self.arguments, **replaced}, ", ".join(replaced)
        try:
            bound = self.parameters.signature.bind_partial()
            bound.arguments.update(self._grouped(arguments))
            with _bounded(name):
                returned = _used(self.call(*bound.args, **bound.kwargs))
            return Outcome(None, state(returned, self.unlike), self.state())  # copies, which aren't the call's to bound
        except Exception as error:  # noqa: BLE001 - which ones it may be is what is tested
            return Outcome(error, None, self.state())

    def state(self) -> object:
        """Return what the call may change: the object, and the arguments."""
        return state((self.subject, self.arguments), self.unlike)

    def _grouped(self, arguments: dict[str, Any]) -> dict[str, Any]:
        ordered: dict[str, Any] = {}
        for parameter in self.parameters.signature.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                ordered[parameter.name] = {
                    key.partition("**")[2]: value for key, value in arguments.items() if "**" in key
                }
            elif parameter.kind is parameter.VAR_POSITIONAL:
                ordered[parameter.name] = (arguments[parameter.name],)
            else:
                ordered[parameter.name] = arguments[parameter.name]
        return ordered


@dataclass(frozen=True)
class Outcome:
    """What came of a call."""

    error: Exception | None
    result: object
    after: object

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Outcome):
            return NotImplemented
        return type(self.error) is type(other.error) and (self.result, self.after) == (other.result, other.after)

    __hash__ = None


def _used(result: Any) -> Any:
    """Use up what a verb returned that does its work only then."""
    if isinstance(result, AbstractContextManager) and not type(result).__module__.startswith("hwdbm"):
        with result as entered:
            return state(entered)
    return list(result) if inspect.isgenerator(result) else result


@dataclass(frozen=True)
class Parameters:
    """Those of a verb, of the making of an object, or of a function: those that may be None, and those of many."""

    signature: inspect.Signature
    optional: frozenset[str]
    several: frozenset[str]  # those that may be one number, or many


_PARAMETERS: dict[tuple[Any, str | None], Parameters] = {}


def parameters(item: Any, verb: str | None, call: Callable[..., Any]) -> Parameters:
    if (item, verb) not in _PARAMETERS:
        signature = inspect.signature(call)
        named = signature.parameters.items()
        _PARAMETERS[item, verb] = Parameters(
            signature,
            frozenset(name for name, one in named if one.default is None or "None" in str(one.annotation)),
            frozenset(name for name, one in named if "ndarray" in str(one.annotation)),
        )
    return _PARAMETERS[item, verb]


def scene(recipe: Recipe, item: Any, verb: str | None) -> Scene:
    """Return a new scene of a verb, of the making of an object, or of a function."""
    subject = recipe.make() if verb is not None else None
    call = item if verb is None else getattr(subject, verb)
    given = recipe.given(subject)
    own = verb or ("new" if inspect.isclass(item) else item.__name__)
    arguments, known = {}, parameters(item, verb, call)
    given = {**given}
    for name, parameter in known.signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            for key, value in given[f"{own}.**"].items():
                arguments[f"**{key}"] = value
            continue
        key = f"{own}.{name}"
        if key not in given and name not in given:
            if f"{own}.{name}" in recipe.skip:
                if parameter.default is parameter.empty:
                    raise LookupError(f"{own} needs {name}")
                arguments[name] = parameter.default
                continue
            raise LookupError(f"there is no good argument for {own}'s parameter {name!r}: give its recipe one")
        arguments[name] = given[key] if key in given else given[name]
    return Scene(subject, call, known, arguments, recipe.unlike)


# --- errors -----------------------------------------------------------------------------------------------------


def on_purpose(error: BaseException) -> bool:
    """Return whether the library raised an error itself, and it didn't come from below."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or "/hwdbm/" not in trace.tb_frame.f_code.co_filename:
        return False
    return dis.opname[trace.tb_frame.f_code.co_code[trace.tb_lasti]] == "RAISE_VARARGS"


def documented(error: BaseException) -> bool:
    """Return whether an error is of a type that a public verb may raise on its arguments."""
    if isinstance(error, OSError):
        return error.errno is not None or type(error).__module__.startswith("hwdbm")
    if isinstance(error, MemoryError):
        return bool(str(error))
    if not isinstance(error, TypeError | ValueError) or isinstance(error, UnicodeError):
        return False
    return type(error) in (TypeError, ValueError) or type(error).__module__.startswith("hwdbm")


def names(error: BaseException, number: int) -> bool:
    """Return whether an error's text has a number in it, or says that it is too long for that.

    It may be given with what it was added to: as a range's end, or from the slot's base on.
    """
    text = str(error)
    written = [int(each, 0) for each in re.findall(r"-?0x[0-9a-f]+|-?0b[01]+", text)]
    written += [int(each) for each in re.findall(r"-?(?<!\w)[0-9]+", text)]
    return "many digits" in text or any(abs(each - number) < 1 << 33 for each in written)
