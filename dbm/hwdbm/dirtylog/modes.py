"""The two ways in which a log learns of a guest's writes: hardware DBM, and software write-protection.

A mode is a set of verbs on one slot's leaves, and keeps no state. What must hold while it logs, so that no write is
lost: a page whose bit is clear has no leaf that lets the guest write unrecorded.
"""

from typing import Final, Protocol

from hwdbm import pte
from hwdbm.bitmap import DirtyBitmap
from hwdbm.kernels import Tally
from hwdbm.stage2 import Stage2

__all__ = ["HARDWARE", "SOFTWARE", "LogMode"]


class LogMode(Protocol):
    """How a log learns of writes. ``live`` is the slot's bitmap; a part is of whole words, or ends with the slot."""

    @property
    def hardware(self) -> bool:
        """Whether the MMU records writes."""

    def start(self, s2: Stage2) -> Tally:
        """Have every write from now on recorded. What was recorded before stays for the host alone."""

    def peek(self, s2: Stage2, live: DirtyBitmap, first: int, npages: int) -> Tally:
        """Publish what was recorded in a part, and change no leaf."""

    def sync(self, s2: Stage2, live: DirtyBitmap, first: int, npages: int) -> Tally:
        """Publish what was recorded in a part, and clean what recorded it."""

    def renew(self, s2: Stage2, live: DirtyBitmap, first: int, npages: int) -> Tally:
        """Publish what was recorded in a part, and re-protect all pages that are dirty in `live` then."""

    def protect(self, s2: Stage2, mask: DirtyBitmap, first: int) -> Tally:
        """Have writes to the pages of a mask recorded anew, and touch no other leaf; their bits are set in `live`."""

    def leave(self, s2: Stage2, live: DirtyBitmap | None) -> Tally:
        """Give the leaves to the other mode: publish what they recorded where there is a `live`, and undo the rest."""

    def unrecorded(self, s2: Stage2) -> DirtyBitmap:
        """Return the pages whose leaf lets the guest write so that this mode doesn't learn of it."""


class _Hardware:
    hardware = True

    def start(self, s2: Stage2) -> Tally:
        armed = s2.enable_dbm()
        return s2.harvest_into(DirtyBitmap(s2.npages)) + Tally(changed=armed)

    def peek(self, s2: Stage2, live: DirtyBitmap, first: int, npages: int) -> Tally:
        return s2.peek_into(live, first, npages)

    def sync(self, s2: Stage2, live: DirtyBitmap, first: int, npages: int) -> Tally:
        return s2.harvest_into(live, first, npages)

    # An untracked leaf is left where the log began with all bits set, and there GET takes none (see `protect`).
    renew = sync

    def protect(self, s2: Stage2, mask: DirtyBitmap, first: int) -> Tally:
        return s2.track_part(mask, first)

    def leave(self, s2: Stage2, live: DirtyBitmap | None) -> Tally:
        if live is None:
            return Tally(changed=s2.disable_dbm())
        tally = s2.harvest_into(live)
        # What is written from here on, clear_dbm saves; the next sync publishes it.
        return tally + Tally(changed=s2.clear_dbm())

    def unrecorded(self, s2: Stage2) -> DirtyBitmap:
        return s2.scan(pte.untracked)


class _Software:
    hardware = False

    def start(self, s2: Stage2) -> Tally:
        protected = s2.wrprotect()
        return s2.take_saved_into(DirtyBitmap(s2.npages)) + Tally(changed=protected)

    def peek(self, s2: Stage2, live: DirtyBitmap, first: int, npages: int) -> Tally:
        # Faults have marked what was written. Only leaves that hardware had tracked can have left something.
        return s2.take_saved_into(live, first, npages)

    sync = peek

    def renew(self, s2: Stage2, live: DirtyBitmap, first: int, npages: int) -> Tally:
        tally = self.peek(s2, live, first, npages)
        dirty = live.part(first, npages)
        return tally + self.protect(s2, dirty, first) if dirty.any() else tally

    def protect(self, s2: Stage2, mask: DirtyBitmap, first: int) -> Tally:
        return s2.wrprotect_part(mask, first)

    def leave(self, s2: Stage2, live: DirtyBitmap | None) -> Tally:
        # The bits of untracked pages are set. Read-only leaves go on faulting: who wrote-protected one may mean it.
        return Tally(changed=s2.enable_dbm() if live is not None else 0)

    def unrecorded(self, s2: Stage2) -> DirtyBitmap:
        return s2.scan(pte.untracked) | s2.scan(pte.tracked)


HARDWARE: Final[LogMode] = _Hardware()
SOFTWARE: Final[LogMode] = _Software()
