"""The stream's frames: their kinds, their limits, their checksums.

A frame is a head of 32 bytes and a body. All numbers are little-endian::

    offset  bytes
    0       4      b"hDBM"
    4       2      kind
    6       2      zero
    8       4      sequence: frames sent before this one in the same direction
    12      4      runs at the start of the body, 16 bytes each: gpa and length in bytes
    16      8      bytes of the body, its runs included
    24      4      CRC-32 of the body, and of what lies beside the stream
    28      4      CRC-32 of the 28 bytes before

The source says HELLO and waits for READY. Then it sends PAGES and ZERO; a PASS ends them, and the destination answers
ACK. After the PASS that is flagged as the last come STATE, VERIFY (answered by DIGEST) if the source wants it, and GO
(answered by RESUMED once the guest runs, and then by PROVED if it was wanted, with what is wrong with the guest as a
text). Either side may send ERROR instead of anything, with a text, and hang up; a destination never does so once its
guest has run. ALIVE may come at any time, from a side that is busy. The documentation's page on migration says
what each side does where an answer is lost.

On a Unix socket, HELLO can bring memory that both sides map (`staging`). SHARED frames then stand for PAGES: their body
has the runs only, their CRC goes on over the pages, which lie in that memory. READY brings a pidfd of the receiver's
process there, by which the source learns that it is gone.

The CRC is zlib's. zlib-ng, if it is there, folds with carry-less multiplication, and is some ten
times as fast as zlib 1.2 (50 and 3 GiB/s were measured, on data in the cache).
"""

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from importlib import import_module
from typing import Any, Final, Self, cast

from hwdbm.errors import StreamError, printable
from hwdbm.vm import MemoryMap

VERSION: Final = 2

PAYLOAD: Final = 1 << 21
"""Bytes of guest memory in a frame, at most."""

_RUNS: Final = PAYLOAD >> 12
"""Runs in a PAGES frame, at most: that many pages of 4 KiB, each alone."""

ZERO_RUNS: Final = 1 << 12
"""Runs in a ZERO frame, at most."""

RUN_SIZE: Final = 16

PASS: Final = struct.Struct("<IIQQ")
"""The body of PASS: its number from 1, 1 if it is the last, pages sent with bytes, pages sent as zero."""

ACK: Final = struct.Struct("<I")
"""The body of ACK: the number of the pass."""

READY: Final = struct.Struct("<I")
"""The body of READY: `SHARING` if the memory that HELLO offered is used."""

VERIFIED: Final = 1
"""A flag of HELLO: the source wants the destination's digest."""

RUNNING: Final = 2
"""A flag of HELLO: the VM ran, and is to run."""

SHARING: Final = 4
"""A flag of HELLO: descriptors come with it, of memory for SHARED frames and of the count of what was taken of it."""

PROVING: Final = 8
"""A flag of HELLO: when the guest has run there for a moment, the destination checks it, and says so with PROVED."""

_HEAD = struct.Struct("<4sHHIIQI")  # and its own CRC
_MAGIC: Final = b"hDBM"
HEAD_SIZE: Final = _HEAD.size + 4


def _crc32() -> Callable[..., int]:
    try:
        module = import_module("zlib_ng.zlib_ng")
    except Exception:  # noqa: BLE001  # it isn't there, or doesn't work here: it is only faster
        return zlib.crc32
    return cast("Callable[..., int]", module.crc32)


crc32: Final = _crc32()
"""``crc32(data, value=0)``: zlib's, whoever computes it."""


class Kind(IntEnum):
    """The kind of a frame."""

    HELLO = 1
    READY = 2
    PAGES = 3
    ZERO = 4
    PASS = 5
    ACK = 6
    STATE = 7
    VERIFY = 8
    DIGEST = 9
    GO = 10
    RESUMED = 11
    ERROR = 12
    SHARED = 13
    PROVED = 14
    ALIVE = 15


LIMITS: Final[dict[Kind, int]] = {
    Kind.HELLO: 1 << 20,
    Kind.READY: 4,
    Kind.PAGES: PAYLOAD + _RUNS * RUN_SIZE,
    Kind.ZERO: ZERO_RUNS * RUN_SIZE,
    Kind.PASS: 32,
    Kind.ACK: 4,
    Kind.STATE: 1 << 24,
    Kind.VERIFY: 0,
    Kind.DIGEST: 32,
    Kind.GO: 32,
    Kind.RESUMED: 0,
    Kind.ERROR: 4096,
    Kind.SHARED: _RUNS * RUN_SIZE,
    Kind.PROVED: 4096,
    Kind.ALIVE: 0,
}
"""Bytes of a body, at most."""

_KINDS: Final = frozenset(int(kind) for kind in Kind)
_MOST_RUNS: Final = {Kind.PAGES: _RUNS, Kind.ZERO: ZERO_RUNS, Kind.SHARED: _RUNS}


@dataclass(frozen=True, slots=True)
class Head:
    """The head of a frame.

    Parameters
    ----------
    kind : Kind
        The kind of the frame.
    sequence : int
        Frames before it in its direction, modulo 2**32.
    runs : int
        Runs at the start of the body.
    length : int
        Bytes of the body.
    crc : int
        CRC-32 of the body.
    """

    kind: Kind
    sequence: int
    runs: int
    length: int
    crc: int

    def to_bytes(self) -> bytes:
        """Return the 32 bytes."""
        head = _HEAD.pack(_MAGIC, self.kind, 0, self.sequence, self.runs, self.length, self.crc)
        return head + zlib.crc32(head).to_bytes(4, "little")

    @classmethod
    def from_bytes(cls, raw: bytes | bytearray | memoryview, sequence: int) -> "Head":
        """Return the head that 32 bytes are; none of its numbers exceeds its limit.

        Parameters
        ----------
        raw : bytes-like
            32 bytes.
        sequence : int
            The expected sequence number.

        Raises
        ------
        StreamError
            If it is no head, is damaged, out of order or too large.
        """
        fields: tuple[Any, ...] = _HEAD.unpack_from(raw)
        magic, kind, zero, number, runs, length, crc = fields
        check = int.from_bytes(raw[_HEAD.size :], "little")
        if magic != _MAGIC:
            raise StreamError(f"frame {sequence} begins with {bytes(magic).hex()}, and not with {_MAGIC.hex()}")
        if check != zlib.crc32(raw[: _HEAD.size]):
            raise StreamError(f"frame {sequence}: its head is damaged (CRC {check:#010x})")
        if zero or kind not in _KINDS:
            raise StreamError(f"frame {sequence} is of unknown kind {kind} (flags {zero:#x})")
        head = cls(Kind(kind), number, runs, length, crc)
        head.check(sequence)
        return head

    def check(self, sequence: int) -> None:
        """Raise `StreamError` if the frame is out of order or too large."""
        name = f"frame {sequence}, {self.kind.name}"
        if self.sequence != sequence:
            raise StreamError(f"{name}: out of order, it says that it is number {self.sequence}")
        if self.length > LIMITS[self.kind]:
            raise StreamError(f"{name}: {self.length} bytes are more than {LIMITS[self.kind]}")
        if self.runs > _MOST_RUNS.get(self.kind, 0) or self.runs * RUN_SIZE > self.length:
            raise StreamError(f"{name}: {self.runs} runs in {self.length} bytes are too many")


_HELLO = struct.Struct("<II16s")  # version, flags, kind of VM in ASCII; the memory map follows


@dataclass(frozen=True, slots=True)
class Hello:
    """The body of HELLO.

    Parameters
    ----------
    flags : int
        `VERIFIED`, `RUNNING`, `SHARING` and `PROVING`, added.
    vm : str
        The kind of VM, which only fits into one of the same kind; empty for one that fits into any.
    layout : MemoryMap
        Its memory.
    """

    flags: int
    vm: str
    layout: MemoryMap

    def to_bytes(self) -> bytes:
        """Return the body."""
        return _HELLO.pack(VERSION, self.flags, self.vm.encode("ascii")) + self.layout.to_bytes()

    @classmethod
    def from_bytes(cls, raw: bytes) -> Self:
        """Return what a body says.

        Raises
        ------
        StreamError
            If it is of another version, or no HELLO.
        """
        if len(raw) < 4:
            raise StreamError(f"a HELLO of {len(raw)} bytes has no version")
        (version,) = struct.unpack_from("<I", raw)
        if version != VERSION:
            raise StreamError(f"the stream is of version {version}, and this side knows {VERSION}")
        if len(raw) < _HELLO.size:
            raise StreamError(f"a HELLO of {len(raw)} bytes is cut short")
        _, flags, vm = _HELLO.unpack_from(raw)
        name = printable(vm.rstrip(b"\0").decode("ascii", "replace"))
        return cls(flags, name, MemoryMap.from_bytes(raw[_HELLO.size :]))
