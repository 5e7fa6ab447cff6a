"""The interface that migration and snapshots need of a VM, and no more of it.

Every VM is a `Source`. What it may be beyond that has a protocol of its own: `Shareable` if its log has clients that
don't take each other's pages, `Provable` if its guest can be asked how it does, `Durable` if its memory is a file in
the end.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from hwdbm.bitmap import DirtyBitmap
from hwdbm.check import instance
from hwdbm.errors import StaleLeaseError
from hwdbm.memslot import Memslot
from hwdbm.vm.memory import digest


class Pages(Protocol):
    """Dirty pages on terms, as `hwdbm.Lease` has them: committed when copied, rolled back when not."""

    bitmap: DirtyBitmap

    def commit(self) -> None:
        """Say that the pages were copied."""

    def rollback(self) -> None:
        """Give the pages back: they are dirty again."""


class Client(Protocol):
    """A consumer of a VM's log, until it is closed."""

    def take(self, slot: int) -> Pages:
        """Collect the pages of a slot dirtied since the last time, and clean them: as `Source.dirty` does."""

    def close(self) -> None:
        """Take no more."""


@runtime_checkable
class Source(Protocol):
    """A VM that can be migrated, or that a migration can arrive in.

    What `dirty` takes nobody else sees. A VM should be `Shareable`, so that a migration has pages of its own; for a VM
    that isn't, the caller makes sure that nobody else calls `dirty` meanwhile.

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
class Shareable(Protocol):
    """A VM whose log has clients, each with a bitmap and an epoch a slot of its own."""

    def client(self, name: str) -> Client:
        """Return a new consumer of the log, which has been started: what it takes, others see all the same.

        Its first `take` has the pages written since it was made. A slot that was changed since, so that what was copied
        of it says nothing any more, has all of its pages dirty then, and the lease says why in `broken`, a text that is
        empty else.

        Raises
        ------
        OSError
            EBUSY if there is a client of this name, ENOENT if the log isn't on.
        """


@runtime_checkable
class Durable(Protocol):
    """A VM whose memory becomes a file, which appears when it is complete."""

    def commit(self) -> None:
        """Put the file in its place: all memory has arrived and is right.

        Raises
        ------
        OSError
            If it can't be: the migration has failed then.
        """


@runtime_checkable
class Provable(Protocol):
    """A VM that can check that its guest runs correctly."""

    def prove(self) -> None:
        """Return when the guest, which runs, has gone on for a moment and is right; it runs on.

        Raises
        ------
        OSError, AssertionError
            If it isn't right; the text says what is wrong.
        """


@contextmanager
def client_of(source: Source, name: str) -> Iterator[Client]:
    """Be a consumer of a log that has been started: a client of it if the VM is `Shareable`, else by `dirty`.

    Yields
    ------
    Client
        It is closed when the block ends.

    Raises
    ------
    OSError
        As `Shareable.client` has them.
    """
    instance(name, str, "name")
    if not callable(getattr(source, "dirty", None)):
        raise TypeError(f"source is a VM with a log, not {source!r:.60}")
    client = source.client(name) if isinstance(source, Shareable) else _Alone(source)
    try:
        yield client
    finally:
        client.close()


class _Alone:
    """A consumer that must be the only one: the VM can't see to it."""

    def __init__(self, source: Source) -> None:
        self.take, self.close = source.dirty, lambda: None


def memory_digest(source: Source) -> str:
    """Return the SHA-256 of the bytes of all slots, in the order of their addresses, in hexadecimal."""
    instance(source, Source, "source")
    return digest(source.memory(slot.id) for slot in sorted(source.slots, key=lambda slot: slot.base_gfn))


def roll_back(lent: Iterable[Pages]) -> None:
    """Give the pages of some leases back, but of those that were settled, or are stale."""
    for lease in lent:
        with suppress(StaleLeaseError, ValueError):  # the latter: it was settled
            lease.rollback()


def mechanism_of(source: Source) -> str:
    """Return how a VM's log learns of writes, as far as the VM says so: a text of 200 letters at most."""
    log = getattr(source, "log", None)
    return str(getattr(log, "mechanism", None) or "dirty log")[:200]
