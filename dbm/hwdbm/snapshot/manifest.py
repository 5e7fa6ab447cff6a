"""The manifest of a snapshot: JSON beside its memory file, read as something that anybody may have written."""

import json
import os
import re
import stat
from dataclasses import dataclass
from errno import EINVAL
from itertools import pairwise
from pathlib import Path
from typing import Any, Never

from hwdbm import check
from hwdbm.bitmap import word_count
from hwdbm.errors import LayoutError, SnapshotError, shown
from hwdbm.files import naming
from hwdbm.memslot import Memslot
from hwdbm.vm import MemoryMap

FORMAT, VERSION = "hwdbm-snapshot", 1

_MOST = 4 << 20  # bytes of a manifest: that of 32,767 slots has 3 MiB
_END = 1 << 53  # no address, size, time or number of a manifest reaches it
_ID = re.compile(r"[0-9a-f]{32}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a manifest says of a snapshot.

    Parameters
    ----------
    id : str
        32 hexadecimal digits, chosen at random.
    parent : str or None
        The id of the snapshot that this one is the difference to; None for a full one.
    time : int
        When the guest stood still, in ms since 1970 (UTC). No earlier than its parent's.
    epoch : int
        0 for one that was taken full; of a difference, the parent's, and how many epochs of the log's client have ended
        since: 1. If it is more, pages were taken that are in no snapshot.
    layout : MemoryMap
        The size of a page, and the slots.
    offsets : tuple of int
        Where each of `layout.slots` begins in the memory file, in bytes: a multiple of the page.
    size : int
        Bytes of the memory file.
    memory, bitmap : str
        The names of the memory file and of the file of the bitmap, both beside the manifest.
    bitmap_digest, pages_digest : str
        SHA-256 of the bitmap's file, and of the pages that the memory file holds, in the order in which they lie there.
    digest : str or None
        SHA-256 of all memory at the moment, by address, where it was asked for. A full snapshot always has it.
    state, state_digest : str or None
        The name and SHA-256 of the file of the registers and devices, if there is one.
    source, mechanism : str
        What it was made of, and how the pages were known.
    merged : tuple of str
        The ids of snapshots that a rebase put into this one, and that may be removed.
    name : str
        The manifest's own name without ``.json``.
    """

    id: str
    parent: str | None
    time: int
    epoch: int
    layout: MemoryMap
    offsets: tuple[int, ...]
    size: int
    memory: str
    bitmap: str
    bitmap_digest: str
    pages_digest: str
    digest: str | None
    state: str | None
    state_digest: str | None
    source: str
    mechanism: str
    merged: tuple[str, ...]
    name: str

    @property
    def full(self) -> bool:
        """Whether it needs no other."""
        return self.parent is None

    @property
    def files(self) -> tuple[str, ...]:
        """The names of the files beside the manifest."""
        return (self.memory, self.bitmap, *([] if self.state is None else [self.state]))

    def to_bytes(self) -> bytes:
        """Return the manifest."""
        slots = [
            {"id": slot.id, "flags": slot.flags, "gpa": _address(slot.base_gfn * self.layout.page_size),
             "size": slot.npages * self.layout.page_size, "offset": offset}
            for slot, offset in zip(self.layout.slots, self.offsets, strict=True)
        ]  # fmt: skip
        found: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "id": self.id,
            "parent": self.parent,
            "time": self.time,
            "epoch": self.epoch,
            "source": self.source,
            "mechanism": self.mechanism,
            "page-size": self.layout.page_size,
            "slots": slots,
            "memory": {"file": self.memory, "size": self.size, "pages-sha256": self.pages_digest},
            "bitmap": {"file": self.bitmap, "sha256": self.bitmap_digest},
        }
        if self.digest is not None:
            found["memory"]["sha256"] = self.digest
        if self.state is not None:
            found["state"] = {"file": self.state, "sha256": self.state_digest}
        if self.merged:
            found["merged"] = list(self.merged)
        return (json.dumps(found, indent=1, ensure_ascii=False) + "\n").encode()


def _address(value: int) -> str:
    return f"{value:#018x}"


def open_beside(folder: int, name: str, what: Path, flags: int = os.O_RDONLY) -> int:
    """Open a regular file of a folder, given as a descriptor, by its own name: no link is followed out of it.

    Raises
    ------
    OSError
        The system's, with the whole path; EINVAL for what is no regular file.
    """
    try:
        # O_NONBLOCK: a pipe in its place keeps nobody waiting.
        fd = os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(what / name)) from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(EINVAL, "is no regular file", str(what / name))
    return fd


def read_manifest(folder: int, where: Path, name: str) -> Snapshot:
    """Read a manifest of a folder, which is given as a descriptor and for texts as a path.

    Raises
    ------
    SnapshotError
        If it isn't one; the text says which of its keys is wrong.
    OSError
        If it can't be read.
    """
    path = where / f"{name}.json"
    with naming(path), os.fdopen(open_beside(folder, path.name, where), "rb") as file:
        raw = file.read(_MOST + 1)
    return parse(raw, path)


def parse(raw: bytes, path: Path) -> Snapshot:
    """Return what a manifest says that was read from a path."""
    read = _Reader(path)
    if len(raw) > _MOST:
        read.refuse(f"it has more than {_MOST} bytes")
    try:
        found = check.strict_json(raw)
    except ValueError as error:
        read.refuse(f"it is no JSON: {error}")
    top = read.mapping(found, "the manifest", _KEYS, optional=_OPTIONAL)
    if top["format"] != FORMAT:
        read.refuse(f"its format is {shown(top['format'])}, not {FORMAT}")
    if type(top["version"]) is not int or top["version"] != VERSION:
        read.refuse(f"it is of version {shown(top['version'])}, and this reads version {VERSION}")
    memory = read.mapping(
        top["memory"], "memory", {"file", "size", "pages-sha256"} | ({"sha256"} & _keys(top["memory"]))
    )
    bitmap = read.mapping(top["bitmap"], "bitmap", {"file", "sha256"})
    state = read.mapping(top["state"], "state", {"file", "sha256"}) if "state" in top else None
    parent = None if top["parent"] is None else read.text(top["parent"], "parent", _ID)
    size = read.number(memory["size"], "memory's size")
    layout, offsets = read.slots(top["slots"], read.number(top["page-size"], "page-size"), size)
    snapshot = Snapshot(
        id=read.text(top["id"], "id", _ID),
        parent=parent,
        time=read.number(top["time"], "time"),
        epoch=read.number(top["epoch"], "epoch"),
        layout=layout,
        offsets=offsets,
        size=size,
        memory=read.name(memory["file"], "memory's file"),
        bitmap=read.name(bitmap["file"], "bitmap's file"),
        bitmap_digest=read.text(bitmap["sha256"], "bitmap's sha256", _DIGEST),
        pages_digest=read.text(memory["pages-sha256"], "memory's pages-sha256", _DIGEST),
        digest=read.text(memory["sha256"], "memory's sha256", _DIGEST) if "sha256" in memory else None,
        state=None if state is None else read.name(state["file"], "state's file"),
        state_digest=None if state is None else read.text(state["sha256"], "state's sha256", _DIGEST),
        source=read.words(top["source"], "source"),
        mechanism=read.words(top["mechanism"], "mechanism"),
        merged=tuple(read.text(each, "one of merged", _ID) for each in read.many(top.get("merged", []), "merged")),
        name=path.stem,
    )
    if len(set(snapshot.files)) < len(snapshot.files) or path.name in snapshot.files:
        read.refuse(f"it names one file twice: {', '.join((path.name, *snapshot.files))}")
    if snapshot.id in (snapshot.parent, *snapshot.merged):
        read.refuse("it is its own parent")
    return snapshot


_KEYS = {
    "format", "version", "id", "parent", "time", "epoch", "source", "mechanism", "page-size", "slots",
    "memory", "bitmap",
}  # fmt: skip
_OPTIONAL = {"state", "merged"}


class _Reader:
    """Checks of a manifest's values; each error names the file and the key."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def refuse(self, why: str) -> Never:
        raise SnapshotError(f"{self._path}: {why}") from None

    def mapping(self, value: Any, what: str, keys: set[str], optional: set[str] = frozenset()) -> dict[str, Any]:  # type: ignore[assignment]
        if not isinstance(value, dict):
            self.refuse(f"{what} is an object, not {shown(value)}")
        for missing in sorted(keys - value.keys()):
            self.refuse(f"{what} has no {missing}")
        for more in sorted(value.keys() - keys - optional):
            self.refuse(f"{what} has {shown(more)}, which version {VERSION} doesn't know")
        return value

    def many(self, value: Any, what: str) -> list[Any]:
        if not isinstance(value, list):
            self.refuse(f"{what} is a list, not {shown(value)}")
        return value

    def number(self, value: Any, what: str) -> int:
        if type(value) is not int or not 0 <= value < _END:
            self.refuse(f"{what} is a whole number of 0 to 2^53 - 1, not {shown(value)}")
        return value

    def text(self, value: Any, what: str, pattern: re.Pattern[str]) -> str:
        if not isinstance(value, str) or not pattern.fullmatch(value):
            self.refuse(f"{what} is {'32' if pattern is _ID else '64'} hexadecimal digits, not {shown(value)}")
        return value

    def words(self, value: Any, what: str) -> str:
        if not isinstance(value, str) or not value.isprintable() or len(value) > 200:
            self.refuse(f"{what} is a printable text of 200 letters at most, not {shown(value)}")
        return value

    def name(self, value: Any, what: str) -> str:
        fine = isinstance(value, str) and value.isprintable() and "/" not in value and value not in ("", ".", "..")
        if not fine or len(value.encode()) > 255:
            self.refuse(f"{what} is the name of a file beside it, not {shown(value)}")
        return str(value)

    def address(self, value: Any, what: str) -> int:
        if not isinstance(value, str) or not re.fullmatch(r"0x[0-9a-f]{1,16}", value):
            self.refuse(f"{what} is an address as 0x0000000040000000, not {shown(value)}")
        return int(value, 16)

    def slots(self, value: Any, page_size: int, size: int) -> tuple[MemoryMap, tuple[int, ...]]:
        slots, offsets, taken = [], [], []
        for found in self.many(value, "slots"):
            slot = self.mapping(found, "a slot", {"id", "flags", "gpa", "size", "offset"})
            number = self.number(slot["id"], "a slot's id")
            gpa, length = self.address(slot["gpa"], "a slot's gpa"), self.number(slot["size"], "a slot's size")
            flags, offset = self.number(slot["flags"], "a slot's flags"), self.number(slot["offset"], "a slot's offset")
            if not page_size or not length or gpa % page_size or length % page_size or offset % page_size:
                self.refuse(f"slot {number} isn't whole pages of {page_size} bytes: {shown(slot)}")
            if offset + length > size:
                self.refuse(f"slot {number} ends at {offset + length:#x}, beyond the memory file's {size:#x}")
            slots.append(Memslot(number, flags, gpa // page_size, length // page_size, 0))
            offsets.append(offset)
            taken.append((offset, offset + length, number))
        taken.sort()
        for (_, end, before), (start, _, after) in pairwise(taken):
            if start < end:
                self.refuse(f"slots {before} and {after} overlap in the memory file")
        try:
            return MemoryMap(page_size, tuple(slots)), tuple(offsets)
        except LayoutError as error:
            self.refuse(str(error))


def bitmap_size(layout: MemoryMap) -> int:
    """Return the bytes of a snapshot's bitmap: each slot's words in turn."""
    return 8 * sum(word_count(slot.npages) for slot in layout.slots)


def _keys(value: Any) -> set[str]:
    return set(value) if isinstance(value, dict) else set()
