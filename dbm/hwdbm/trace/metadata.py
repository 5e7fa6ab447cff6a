"""The metadata of a trace, read as something that anybody may have written, before zarr sees any of it."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from errno import ENOENT, ENOTDIR
from itertools import product
from pathlib import Path
from typing import Any, Never

from hwdbm.bitmap import word_count
from hwdbm.errors import LayoutError, TraceError, shown
from hwdbm.files import open_regular
from hwdbm.memslot import Memslot
from hwdbm.vm import MemoryMap

KEY, VERSION = "hwdbm-trace", 1
NOT_YET = -1
"""The time of an interval that isn't there yet."""
SECOND = 10**9
"""Nanoseconds: times are in them."""
MOST_TEXT = 200
"""Letters of a text for people."""

_MOST = 4 << 20  # bytes of a zarr.json: that of 32,767 slots has 2 MiB
_MOST_CHUNK = 64 << 20  # bytes of a chunk
_END = 1 << 53  # no address and no number reaches it
_GROWTH = 1 << 10  # what can't be compressed grows by a byte or so in a block of 128 KiB
_ZSTD = b"\x28\xb5\x2f\xfd"
_FRAME_HEAD = 18  # bytes of the head of a zstd frame, at most


@dataclass(frozen=True, slots=True)
class Header:
    """What a trace says of itself.

    Parameters
    ----------
    layout : MemoryMap
        The page size and the slots.
    source, mechanism : str
        What was traced, and how its writes were learnt of.
    interval : float or None
        Milliseconds that each interval was to take.
    started : str
        When it began, as ISO 8601 has it.
    intervals : int or None
        How many there are; None in one that is being written, or whose writer was killed.
    """

    layout: MemoryMap
    source: str
    mechanism: str
    interval: float | None
    started: str
    intervals: int | None = None

    @property
    def nwords(self) -> int:
        """Words of an interval: each slot begins at a word of its own."""
        return sum(word_count(slot.npages) for slot in self.layout.slots)

    def to_json(self) -> dict[str, Any]:
        """Return the attributes of the group."""
        page = self.layout.page_size
        return {
            KEY: VERSION,
            "page-size": page,
            "slots": [
                {"id": slot.id, "gpa": slot.base_gfn * page, "npages": slot.npages} for slot in self.layout.slots
            ],
            "source": self.source,
            "mechanism": self.mechanism,
            "interval": self.interval,
            "started": self.started,
            "intervals": self.intervals,
        }


@dataclass(frozen=True, slots=True)
class Grid:
    """The shape of an array, and the chunks that its files have.

    Parameters
    ----------
    folder : Path
        Where the array is.
    shape, chunk : tuple of int
        Its extent and that of a chunk, of one dimension or two.
    """

    folder: Path
    shape: tuple[int, ...]
    chunk: tuple[int, ...]

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk when it is decompressed."""
        return 8 * math.prod(self.chunk)

    def check_files(self, rows: int) -> None:
        """Raise `TraceError` unless each chunk of the first `rows` has a file; zarr takes what is missing for zeros."""
        folder = self.folder / "c"
        count, *across = (-(-n // chunk) for n, chunk in zip((rows, *self.shape[1:]), self.chunk, strict=True))
        if not across:
            self._check_names(folder, count)
            return
        for band in range(count):  # ends at the first that isn't there, whatever is claimed
            self._check_names(folder / str(band), *across)

    def _check_names(self, folder: Path, count: int) -> None:
        try:
            with os.scandir(folder) as entries:
                names = {entry.name for entry in entries}
        except OSError as error:
            if count and error.errno not in (ENOENT, ENOTDIR):
                raise
            names = set()
        missing = next((each for each in range(count) if str(each) not in names), None)
        if missing is not None:
            raise TraceError(f"{folder / str(missing)}: the trace is cut short: this chunk is missing")

    def check_chunks(self, *ranges: range) -> None:
        """Raise `TraceError` unless the files of some chunks are there, and give what a chunk has."""
        for place in product(*ranges):
            _check_frame(self.folder.joinpath("c", *map(str, place)), self.chunk_bytes)


def _check_frame(path: Path, size: int) -> None:
    """Raise `TraceError` unless a file is a zstd frame of so many bytes when decompressed; the head says that."""
    try:
        with open_regular(path) as file:
            length = os.fstat(file.fileno()).st_size
            head = file.read(_FRAME_HEAD)
    except FileNotFoundError:
        raise TraceError(f"{path}: the trace is cut short: this chunk is missing") from None
    if length > size + size // _GROWTH + _GROWTH:
        raise TraceError(f"{path}: a chunk of {size} bytes doesn't take {length}")
    found = _content_size(head)
    if found != size:
        said = "it is no zstd frame that says its size" if found is None else f"it has {found} bytes"
        raise TraceError(f"{path}: a chunk of {size} bytes is damaged: {said}")


def _content_size(head: bytes) -> int | None:
    """Return the bytes that a zstd frame has when decompressed (RFC 8878, 3.1.1.1); None if it doesn't say."""
    if not head.startswith(_ZSTD) or len(head) == len(_ZSTD):
        return None
    kind = head[len(_ZSTD)]
    flag, single, dictionary = kind >> 6, kind >> 5 & 1, kind & 3
    width = (single, 2, 4, 8)[flag]
    at = len(_ZSTD) + 1 + (not single) + (0, 1, 2, 4)[dictionary]
    if not width or len(head) < at + width:
        return None
    return int.from_bytes(head[at : at + width], "little") + (256 if width == 2 else 0)


# --- zarr.json ---------------------------------------------------------------------------------------------


def read_header(path: Path) -> Header:
    """Return what a trace says of itself.

    Raises
    ------
    OSError
        If it can't be read.
    TraceError
        If it is no trace, or one of another version.
    """
    read = _Json(path)
    if not path.is_dir():
        raise OSError(ENOTDIR if path.exists() else ENOENT, "a trace is a folder" if path.exists() else "no such trace",
                      str(path))  # fmt: skip
    found = read.mapping(read.load(), "zarr.json")
    if found.get("zarr_format") != 3 or found.get("node_type") != "group":
        read.refuse("it is no Zarr group of version 3, and so no trace")
    attributes = read.mapping(found.get("attributes", {}), "its attributes")
    if KEY not in attributes:
        read.refuse(f"it is a Zarr group, but no trace: it has no attribute {KEY}")
    if type(attributes[KEY]) is not int or attributes[KEY] != VERSION:
        read.refuse(f"it is of version {shown(attributes[KEY])}, and this reads version {VERSION}")
    page = read.number(attributes.get("page-size"), "page-size")
    slots = []
    for each in read.many(attributes.get("slots"), "slots"):
        slot = read.mapping(each, "a slot")
        number, gpa, npages = (read.number(slot.get(key), f"a slot's {key}") for key in ("id", "gpa", "npages"))
        if not page or gpa % page or not npages:
            read.refuse(f"slot {number} isn't one or more whole pages of {page} bytes: {shown(each)}")
        slots.append(Memslot(number, 0, gpa // page, npages, 0))
    interval = attributes.get("interval")
    if interval is not None and (type(interval) not in (int, float) or not 0 < interval < _END):
        read.refuse(f"interval is a number of milliseconds above 0, or null, not {shown(interval)}")
    try:
        layout = MemoryMap(page, tuple(slots))
    except LayoutError as error:
        read.refuse(str(error))
    intervals = attributes.get("intervals")
    return Header(
        layout,
        read.text(attributes.get("source", ""), "source"),
        read.text(attributes.get("mechanism", ""), "mechanism"),
        None if interval is None else float(interval),
        read.moment(attributes.get("started")),
        None if intervals is None else read.number(intervals, "intervals"),
    )


def read_grid(path: Path, kind: str, dimensions: int) -> Grid:
    """Return the shape of an array of a trace, whose elements are `kind`.

    Raises
    ------
    OSError, TraceError
        If it can't be read, or isn't what a trace has.
    """
    read = _Json(path)
    found = read.mapping(read.load(), "zarr.json")
    if found.get("zarr_format") != 3 or found.get("node_type") != "array":
        read.refuse("it is no Zarr array of version 3")
    if found.get("data_type") != kind:
        read.refuse(f"it is of {kind}, not {shown(found.get('data_type'))}")
    shape = [read.number(each, "its shape") for each in read.many(found.get("shape"), "its shape")]
    chunks = read.mapping(found.get("chunk_grid"), "its chunk grid")
    if chunks.get("name") != "regular":
        read.refuse(f"its chunk grid is regular, not {shown(chunks.get('name'))}")
    settings = read.mapping(chunks.get("configuration"), "its chunk grid")
    chunk = [read.number(each, "its chunks") for each in read.many(settings.get("chunk_shape"), "its chunks")]
    if len(shape) != dimensions or len(chunk) != dimensions:
        read.refuse(f"it has {dimensions} dimensions, not shape {shown(shape)} in chunks {shown(chunk)}")
    grid = Grid(path, tuple(shape), tuple(chunk))
    if not 0 < grid.chunk_bytes <= _MOST_CHUNK:
        read.refuse(f"a chunk has 8 to {_MOST_CHUNK} bytes, not {grid.chunk_bytes}")
    if [_codec(each) for each in read.many(found.get("codecs"), "its codecs")] != ["bytes", "zstd"]:
        read.refuse(f"its codecs are little-endian bytes and zstd, not {shown(found.get('codecs'))}")
    if found.get("storage_transformers") or _codec(found.get("chunk_key_encoding")) != "default":
        read.refuse("its chunks lie in files c/0, c/1 and so on, and nothing transforms them")
    return grid


# By name the setting that counts, what it is where it isn't given, and what it is to be.
_SETTINGS = {"bytes": ("endian", None, "little"), "default": ("separator", "/", "/")}


def _codec(value: Any) -> str:
    """Return the name of a codec, or of an encoding of keys, that is as a trace has it; empty for another."""
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, dict):
        return ""
    name, settings = value.get("name"), value.get("configuration") or {}
    if not isinstance(name, str) or not isinstance(settings, dict):
        return ""
    key, otherwise, wanted = _SETTINGS.get(name, ("", None, None))
    return name if settings.get(key, otherwise) == wanted else ""


class _Json:
    """A ``zarr.json`` and checks of its values; each error names the file."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "zarr.json"

    def refuse(self, why: str) -> Never:
        raise TraceError(f"{self._path}: {why}") from None

    def load(self) -> Any:
        try:
            with open_regular(self._path) as file:
                raw = file.read(_MOST + 1)
        except FileNotFoundError:
            self.refuse("there is no such file, and so no trace")
        if len(raw) > _MOST:
            self.refuse(f"it has more than {_MOST} bytes")
        try:
            return json.loads(raw)
        except (ValueError, RecursionError) as error:
            self.refuse(f"it is no JSON: {error}")

    def mapping(self, value: Any, what: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            self.refuse(f"{what} is an object, not {shown(value)}")
        return value

    def many(self, value: Any, what: str) -> Sequence[Any]:
        if not isinstance(value, list):
            self.refuse(f"{what} is a list, not {shown(value)}")
        return value

    def number(self, value: Any, what: str) -> int:
        if type(value) is not int or not 0 <= value < _END:
            self.refuse(f"{what} is a whole number of 0 to 2^53 - 1, not {shown(value)}")
        return value

    def text(self, value: Any, what: str) -> str:
        if not isinstance(value, str) or not value.isprintable() or len(value) > MOST_TEXT:
            self.refuse(f"{what} is a printable text of {MOST_TEXT} letters at most, not {shown(value)}")
        return value

    def moment(self, value: Any) -> str:
        try:
            return datetime.fromisoformat(self.text(value, "started")).isoformat()
        except ValueError as error:
            if isinstance(error, TraceError):
                raise
            self.refuse(f"started is a time as ISO 8601 has it, not {shown(value)}")
