"""What can be migrated: the interface that `migration` needs of a VM, and no more of it."""

import hashlib
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from hwdbm.bitmap import DirtyBitmap
from hwdbm.memslot import Memslot

__all__ = ["Pages", "Provable", "Source", "memory_digest"]


class Pages(Protocol):
    """Dirty pages on terms, as `hwdbm.Lease` has them: committed when copied, rolled back when not."""

    bitmap: DirtyBitmap

    def commit(self) -> None:
        """Say that the pages were copied."""

    def rollback(self) -> None:
        """Give the pages back: they are dirty again."""


@runtime_checkable
class Source(Protocol):
    """A VM that can be migrated, or that a migration can arrive in.

    The source of a migration may be written to while its pages are read, by threads of its own. A write is in the
    memory, and dirty in the log, before the `dirty` that follows it returns.
    """

    @property
    def page_size(self) -> int:
        """Bytes of a page of the log."""

    @property
    def slots(self) -> tuple[Memslot, ...]:
        """The memslots, which don't overlap."""

    @property
    def running(self) -> bool:
        """Whether vCPUs may write."""

    def memory(self, slot_id: int) -> NDArray[np.uint8]:
        """Return the bytes of a slot, ``(npages * page_size,)``: a writable view, not a copy."""

    def start_log(self) -> None:
        """Have writes recorded from now on."""

    def stop_log(self) -> None:
        """Stop recording; what was recorded is forgotten."""

    def dirty(self, slot_id: int) -> Pages:
        """Collect the pages dirtied since the last time, and clean them; the TLB is flushed when it returns."""

    def pause(self) -> None:
        """Stop the vCPUs; no write happens after it returns."""

    def resume(self) -> None:
        """Let the vCPUs run."""

    def throttle(self, percent: int) -> None:
        """Take this part of their time from the vCPUs, 0 to 99 %."""

    def mark_imported(self, slot_id: int, first_page: int, npages: int) -> None:
        """Mark pages, counted from the slot's first, that a migration wrote: they are dirty here."""

    def state(self) -> bytes:
        """Return what is no memory: registers and devices."""

    def set_state(self, state: bytes) -> None:
        """Take over what `state` returned elsewhere."""

    def digest(self) -> str:
        """Return the SHA-256 of all memory, in hexadecimal. Equal to `memory_digest(self)`."""

    def close(self) -> None:
        """Give everything back."""


@runtime_checkable
class Provable(Protocol):
    """A VM whose guest can be asked whether it goes on as it should."""

    def prove(self) -> None:
        """Return when the guest, which runs, has gone on for a moment and is right; it runs on.

        Raises
        ------
        OSError, AssertionError
            If it isn't right; the text says what is wrong.
        """


def memory_digest(source: Source) -> str:
    """Return the SHA-256 of the bytes of all slots, in the order of their addresses, in hexadecimal."""
    digest = hashlib.sha256()
    for slot in sorted(source.slots, key=lambda slot: slot.base_gfn):
        digest.update(source.memory(slot.id).data)
    return digest.hexdigest()
