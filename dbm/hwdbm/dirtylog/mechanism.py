"""Mechanisms: how a log learns of a guest's writes.

A mechanism decides how a page is mapped, a write fault granted, a mask protected and a harvest made. No other module
asks which one it is. To add one is to write its class here, and to name it in `MECHANISMS`.

One thing must hold under each, so that no write is lost: a page whose bit is clear, in the log's bitmap or a client's,
has no leaf that lets the guest write without the mechanism's learning of it.
"""

from typing import Final, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from hwdbm import pte
from hwdbm.bitmap import DirtyBitmap
from hwdbm.kernels import Tally
from hwdbm.stage2 import LeafAt, Stage2


class NewLeaf(NamedTuple):
    """How a page that the host lets the guest write is mapped.

    Parameters
    ----------
    writable, dbm : bool
        Whether S2AP[1] or DBM let the guest write.
    marked : bool
        Whether the page is to be marked in the log, since nothing else will.
    """

    writable: bool
    dbm: bool
    marked: bool


UNLOGGED: Final = NewLeaf(writable=True, dbm=False, marked=False)
"""The leaf of a page while its slot doesn't log."""


class Mechanism(Protocol):
    """How a log learns of writes. ``live`` is the bitmap that is published in: the slot's, or what others get it from.

    A part is of whole words, or ends with the slot.
    """

    name: str
    """What it is called in `MECHANISMS` and in texts."""
    hd: bool
    """Whether it needs VTCR_EL2.HD."""

    # --- harvests ------------------------------------------------------------------------------------------

    def start(self, s2: Stage2) -> Tally:
        """Have every write from now on recorded. What was recorded before stays for the host alone."""

    def peek(self, s2: Stage2, live: DirtyBitmap, first: int, npages: int) -> Tally:
        """Publish what was recorded in a part, and change no leaf."""

    def sync(self, s2: Stage2, live: DirtyBitmap, first: int, npages: int) -> Tally:
        """Publish what was recorded in a part, and clean what recorded it."""

    def rearm(self, s2: Stage2, mask: DirtyBitmap, first: int, out: DirtyBitmap | None) -> Tally:
        """Do what is left to do of `protect` after a `sync` of these pages: a GET takes those of the mask."""

    def protect(self, s2: Stage2, mask: DirtyBitmap, first: int, out: DirtyBitmap | None) -> Tally:
        """Have writes to the pages of a mask recorded anew, and touch no other leaf.

        Whoever asks for it has their bits; what they have recorded is published in `out`, if there is one, for others.
        """

    def leave(self, s2: Stage2, live: DirtyBitmap | None) -> Tally:
        """Make the leaves safe under any mechanism: publish in `live`, if there is one, what they recorded."""

    def enter(self, s2: Stage2, live: DirtyBitmap) -> Tally:
        """Take over leaves that another mechanism left, while the slot logs."""

    def unrecorded(self, s2: Stage2) -> DirtyBitmap:
        """Return the pages whose leaf lets the guest write so that this mechanism doesn't learn of it."""

    # --- faults --------------------------------------------------------------------------------------------

    def leaf(self, *, write: bool) -> NewLeaf:
        """Return how a page is mapped while its slot logs, as it is being written or only read."""

    def grant(self, s2: Stage2, leaves: LeafAt) -> None:
        """Let the guest write pages that it faulted on, while their slot logs. They are marked besides."""

    def open(self, s2: Stage2, pages: NDArray[np.int64]) -> None:
        """Spare the pages of a block that was split further faults, if that's possible: the host allows writes."""

    def deny_blocks(self, s2: Stage2, gfn: int, npages: int) -> int:
        """Have the first write to each block of a range fault, so that it can be split. Return how many changed."""


class HardwareDbm:
    """The MMU marks what is written in the leaf (Arm ARM, D8.5)."""

    name = "hardware DBM"
    hd = True

    def start(self, s2: Stage2) -> Tally:
        armed = s2.enable_dbm()
        return s2.harvest_into(DirtyBitmap(s2.npages)) + Tally(changed=armed)

    def peek(self, s2: Stage2, live: DirtyBitmap, first: int, npages: int) -> Tally:
        return s2.peek_into(live, first, npages)

    def sync(self, s2: Stage2, live: DirtyBitmap, first: int, npages: int) -> Tally:
        return s2.harvest_into(live, first, npages)

    def rearm(self, s2: Stage2, mask: DirtyBitmap, first: int, out: DirtyBitmap | None) -> Tally:  # noqa: ARG002
        # Untracked leaves stay as they are only where the log began with all bits set and without clients, and there
        # GET takes none: CLEAR does, by `protect`.
        return Tally()

    def protect(self, s2: Stage2, mask: DirtyBitmap, first: int, out: DirtyBitmap | None) -> Tally:
        return s2.track_part(mask, first, out)

    def leave(self, s2: Stage2, live: DirtyBitmap | None) -> Tally:
        if live is None:
            return Tally(changed=s2.disable_dbm())
        tally = s2.harvest_into(live)
        # What is written from here on, clear_dbm saves; the next sync publishes it.
        return tally + Tally(changed=s2.clear_dbm())

    def enter(self, s2: Stage2, live: DirtyBitmap) -> Tally:
        return s2.harvest_into(live)

    def unrecorded(self, s2: Stage2) -> DirtyBitmap:
        return s2.scan(pte.untracked)

    def leaf(self, *, write: bool) -> NewLeaf:  # noqa: ARG002 - the MMU marks the write when it is tried again
        return NewLeaf(writable=True, dbm=True, marked=False)

    def grant(self, s2: Stage2, leaves: LeafAt) -> None:
        s2.relax_at(leaves, dbm=True)

    def open(self, s2: Stage2, pages: NDArray[np.int64]) -> None:
        s2.allow_at(pages, dbm=True)

    def deny_blocks(self, s2: Stage2, gfn: int, npages: int) -> int:
        return s2.clear_dbm(gfn, npages)


class WriteProtect:
    """Clean pages are read-only, and the handler of the write fault marks them."""

    name = "write-protection"
    hd = False

    def start(self, s2: Stage2) -> Tally:
        protected = s2.wrprotect()
        return s2.take_saved_into(DirtyBitmap(s2.npages)) + Tally(changed=protected)

    def peek(self, s2: Stage2, live: DirtyBitmap, first: int, npages: int) -> Tally:
        # Faults have marked what was written. Only leaves that hardware had tracked can have left something.
        return s2.take_saved_into(live, first, npages)

    sync = peek

    def protect(self, s2: Stage2, mask: DirtyBitmap, first: int, out: DirtyBitmap | None) -> Tally:
        return s2.wrprotect_part(mask, first, out) if mask.any() else Tally()

    rearm = protect

    def leave(self, s2: Stage2, live: DirtyBitmap | None) -> Tally:
        # The bits of untracked pages are set. With DBM alone they may be written as before, so that until another
        # mechanism takes over they are still this one's. Read-only leaves go on faulting, in case the host means it.
        return Tally(changed=s2.set_dbm() if live is not None else 0)

    def enter(self, s2: Stage2, live: DirtyBitmap) -> Tally:  # noqa: ARG002 - what may be written is dirty in the log
        return Tally()

    def unrecorded(self, s2: Stage2) -> DirtyBitmap:
        return s2.scan(pte.untracked) | s2.scan(pte.tracked)

    def leaf(self, *, write: bool) -> NewLeaf:
        return NewLeaf(writable=write, dbm=False, marked=write)

    def grant(self, s2: Stage2, leaves: LeafAt) -> None:
        s2.relax_at(leaves)

    def open(self, s2: Stage2, pages: NDArray[np.int64]) -> None:
        """Leave them read-only: each page's first write is to fault."""

    def deny_blocks(self, s2: Stage2, gfn: int, npages: int) -> int:  # noqa: ARG002 - they fault as they are
        return 0


MECHANISMS: Final[dict[str, type[Mechanism]]] = {each.name: each for each in (HardwareDbm, WriteProtect)}


def named(hw_dbm: bool) -> str:
    """Return the name of the mechanism that a log has by default, with hardware DBM or without."""
    return HardwareDbm.name if hw_dbm else WriteProtect.name
