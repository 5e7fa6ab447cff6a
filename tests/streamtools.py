"""Frames made by hand, for the tests of the stream."""

import struct
import zlib

from hwdbm.memslot import Memslot
from hwdbm.migration.wire import VERSION, Kind
from hwdbm.vm import MemoryMap

SMALL = MemoryMap(4096, (Memslot(0, 0, 16, 8, 0), Memslot(1, 0, 64, 3, 0)))


def frame(kind: int, sequence: int, body: bytes = b"", *, runs: int = 0, **wrong: int) -> bytes:
    """Return a frame; `wrong` replaces fields of its head, whose checksum is right all the same."""
    fields = {
        "kind": kind,
        "flags": 0,
        "sequence": sequence,
        "runs": runs,
        "length": len(body),
        "crc": zlib.crc32(body),
    }
    head = struct.pack("<4sHHIIQI", b"hDBM", *(fields | wrong).values())
    return head + struct.pack("<I", zlib.crc32(head)) + body


def hello(layout: MemoryMap = SMALL, *, version: int = VERSION, flags: int = 0) -> bytes:
    return frame(Kind.HELLO, 0, struct.pack("<II16s", version, flags, b"") + layout.to_bytes())


def pages(sequence: int, *runs: tuple[int, int], payload: bytes | None = None) -> bytes:
    table = b"".join(struct.pack("<QQ", *run) for run in runs)
    size = sum(length for _, length in runs)
    return frame(Kind.PAGES, sequence, table + (bytes(range(256)) * (size // 256) if payload is None else payload),
                 runs=len(runs))  # fmt: skip


def zeros(sequence: int, *runs: tuple[int, int]) -> bytes:
    return frame(Kind.ZERO, sequence, b"".join(struct.pack("<QQ", *run) for run in runs), runs=len(runs))
