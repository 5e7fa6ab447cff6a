"""Clients: consumers of one log that don't steal each other's pages.

KVM's GET and CLEAR are the default client, whose bitmap is the log's own. Every other client has a bitmap and an epoch
a slot (`Feed`). A harvest is made once, for all: what it publishes is poured into the bitmap of each (`Feeds`).

The protocol:

* While a slot has clients, what publishes sets its bits in one more bitmap, `fresh`, in the pass that cleans; then
  they are poured: set in each client's bitmap and in the log's, and taken out of `fresh` last. An interrupt in between
  leaves them in `fresh`, and the next step that holds these pages pours them before it takes anything. So the bits of
  a harvest reach every client or, until then, none.
* A page of which some client's bit is clear has no leaf that lets the guest write unrecorded. Whoever takes a bit
  re-protects its page, if nobody has done that since the harvest that published it; what re-protection drops of a
  leaf's dirty state is poured into the bitmaps of all others.
* A commit ends an epoch; a rollback gives the pages back, and the epoch goes on.
* What changes a slot (it is moved, or deleted, or its log is switched off) breaks the epochs of its clients: leases
  that are open are stale, and the next take says why, with every page dirty.
"""

import os
import warnings
import weakref
from collections.abc import Callable, Iterator
from errno import EBUSY
from threading import Lock
from types import TracebackType
from typing import Protocol, Self

import numpy as np

from hwdbm import check
from hwdbm.bitmap import DirtyBitmap
from hwdbm.dirtylog.lease import Lease, Loans


class FedSlot(Protocol):
    """A slot with clients: it knows when a feed's bitmap may be written."""

    @property
    def name(self) -> str:
        """The slot's name in an error's text."""

    def give_back(self, epoch: "Epoch", pages: DirtyBitmap, first_page: int, generation: int) -> bool:
        """Do as `Feed.give_back` while nobody else uses these pages of the bitmap; False if the slot is gone."""


class Feed:
    """What one client has of one slot: the pages that were dirtied in its epoch.

    Parameters
    ----------
    slot : FedSlot
        The slot.
    client : str
        The client's name.
    npages : int
        Pages of the slot.
    broken : str
        Why there is no epoch yet; empty if one begins.

    Attributes
    ----------
    bitmap : DirtyBitmap
        The pages. It is written as the log's own bitmap is: with its pages held.
    epoch : int
        How many epochs have ended.
    broken : str
        Why the epoch that goes on is broken, so that all pages are dirty; empty if it isn't.
    generation : int
        Another one when the epoch was broken, or the client closed: leases from before are stale.
    loans : Loans
        The leases that are open.
    closed : bool
        Whether nobody will take from it any more.
    """

    def __init__(self, slot: FedSlot, client: str, npages: int, broken: str = "") -> None:
        self.slot, self.client, self.broken = slot, client, broken
        self.bitmap = ~DirtyBitmap(npages) if broken else DirtyBitmap(npages)
        self.epoch = self.generation = 0
        self.loans, self.closed = Loans(), False

    @property
    def name(self) -> str:
        """What leases of it are of, in an error's text."""
        return f"{self.slot.name} for client {self.client!r}"

    def break_off(self, why: str) -> None:
        """Have all pages dirty, since what was recorded says nothing any more; all pages are held."""
        self.bitmap |= ~DirtyBitmap(self.bitmap.npages)  # first: a change that was interrupted here wasn't made
        self.generation += 1
        self.broken = why

    def give_back(self, epoch: "Epoch", pages: DirtyBitmap, first_page: int, generation: int) -> bool:
        """Set the bits of a lease again, unless it is stale; the pages are held."""
        if self.closed or generation != self.generation:
            return False
        words = self.bitmap.words[first_page >> 6 : (first_page >> 6) + pages.words.size]
        np.bitwise_or(words, pages.words, out=words)
        self.broken = self.broken or epoch.broken
        return True

    def close(self) -> None:
        """Take no more, and have no lease give anything back."""
        self.closed = True
        self.generation += 1


class Epoch:
    """An epoch of a client as the lender of one lease: what a rollback restores, and a commit ends.

    Parameters
    ----------
    feed : Feed
        Whose it is.
    """

    def __init__(self, feed: Feed) -> None:
        # First: if the epoch is broken off meanwhile, the lease is stale, rather than silent about it.
        self.began = feed.generation
        self.feed, self.number, self.broken = feed, feed.epoch, feed.broken

    @property
    def name(self) -> str:
        """The lender's name in an error's text."""
        return self.feed.name

    @property
    def generation(self) -> int:
        """The feed's."""
        return self.feed.generation

    @property
    def loans(self) -> Loans:
        """The feed's."""
        return self.feed.loans

    def put_back(self, pages: DirtyBitmap, first_page: int, generation: int) -> bool:
        """Set the bits again, and have the epoch as broken as it was; False if the lease is stale."""
        return self.feed.slot.give_back(self, pages, first_page, generation)


class ClientLease(Lease):
    """A lease that a client took: its commit ends the client's epoch, its rollback doesn't.

    The first lease of an epoch that is broken has all pages. A client that closes, or whose slot changes, leaves its
    open leases stale: there is nothing that their pages could be given back to.

    Examples
    --------
    >>> from hwdbm import DirtyLog
    >>> log = DirtyLog()
    >>> log.set_memory_region(0, 1, 0, 0x4000, 0)
    <Change.CREATE: 'create'>
    >>> backup = log.client("backup")
    >>> log.mark_dirty(0, 3)
    >>> lease = backup.take(0)
    >>> lease.bitmap.pages(), lease.epoch, lease.broken
    (array([3]), 0, '')
    >>> lease.commit()
    >>> log.set_memory_region(0, 1, 0x10000, 0x4000, 0)  # moved: what a copy has of the slot isn't there any more
    <Change.MOVE: 'move'>
    >>> with backup.take(0) as lease:
    ...     lease.bitmap.weight(), lease.epoch, lease.broken
    (4, 1, 'the slot was moved from gfn 0x0 to gfn 0x10')
    >>> backup.close()
    """

    _stale_since = "was moved or deleted, its log switched off, or the client closed"

    def __init__(self, epoch: Epoch, bitmap: DirtyBitmap) -> None:
        super().__init__(epoch, bitmap, generation=epoch.began)
        self._epoch = epoch

    @property
    def epoch(self) -> int:
        """Which epoch of the client in this slot the pages are of: how many have ended before."""
        return self._epoch.number

    @property
    def broken(self) -> str:
        """Why the epoch is broken, so that all pages are dirty, whatever was copied before; empty if it isn't."""
        return self._epoch.broken

    def commit(self) -> None:
        """Say that the pages were copied: the epoch ends, and the next has begun when they were taken.

        Raises
        ------
        ValueError
            If the lease was settled before.
        StaleLeaseError
            If the slot has changed since, or the client was closed.
        """
        super().commit()
        self._epoch.feed.epoch += 1


class Feeds:
    """The clients of one slot, and what they are fed by: its harvests.

    Methods that pour or join are called with the pages held, as `SlotLog` and the VMs hold them.

    Attributes
    ----------
    fresh : DirtyBitmap or None
        Bits that were published and not poured yet; None while there are no clients.
    """

    def __init__(self) -> None:
        self.fresh: DirtyBitmap | None = None
        self._refs: tuple[weakref.ref[Feed], ...] = ()  # weak: a client that was forgotten is fed no more

    def __iter__(self) -> Iterator[Feed]:
        return (feed for each in self._refs if (feed := each()) is not None and not feed.closed)

    def __bool__(self) -> bool:
        return bool(self._refs) and any(True for _ in self)

    def sink(self, live: DirtyBitmap) -> DirtyBitmap:
        """Return where bits are to be published: in the log's own bitmap, or in `fresh` if others are to have them."""
        return live if self.fresh is None or not self else self.fresh

    def dropped(self) -> DirtyBitmap | None:
        """Return where re-protection is to put the dirty state that its caller has no use for: None if nobody has."""
        return self.fresh if self else None

    def pour(self, live: DirtyBitmap, lo: int = 0, hi: int | None = None, *, default: bool = True) -> None:
        """Move the bits of the pages [lo, hi) from `fresh` to all clients, and to `live` if they are for `default`."""
        hi = live.npages if hi is None else hi
        if self.fresh is None:
            return
        part = slice(lo >> 6, hi + 63 >> 6)
        fresh, feeds = self.fresh.words[part], [*self]
        if np.count_nonzero(fresh):
            for bitmap in (*(feed.bitmap for feed in feeds), *((live,) if default else ())):
                np.bitwise_or(bitmap.words[part], fresh, out=bitmap.words[part])
            fresh.fill(0)  # last: an interrupt before leaves them for the next step
        if not feeds and hi - lo == live.npages:  # the last client has gone
            self.fresh, self._refs = None, ()

    def join(self, feed: Feed) -> None:
        """Feed one more client from now on; all pages are held."""
        if self.fresh is None:
            self.fresh = DirtyBitmap(feed.bitmap.npages)
        self._refs = (*(each for each in self._refs if each() is not None), weakref.ref(feed))

    def break_off(self, why: str) -> None:
        """Break the epoch of each client; all pages are held."""
        for feed in self:
            feed.break_off(why)


class Clients:
    """The clients of a log, by name."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._named: dict[str, weakref.ref[LogClient]] = {}

    def add(self, name: str, take: "Take") -> "LogClient":
        """Return a new client, which takes with `take`.

        Raises
        ------
        OSError
            EBUSY if there is one of this name.
        TypeError, ValueError
            If the name is no text, or empty.
        """
        if not isinstance(name, str):
            raise TypeError(f"a client's name is a text, not {name!r}")
        if not name:
            raise ValueError("a client's name is empty")
        with self._lock:
            named = {key: each for key, each in self._named.items() if (one := each()) is not None and not one.closed}
            if name in named:
                raise OSError(EBUSY, f"the dirty log has a client {name!r} already, until that closes")
            client = LogClient(name, take)
            named[name] = weakref.ref(client)
            self._named = named
            return client


class LogClient:
    """A consumer of a log with a bitmap and an epoch a slot of its own, from `client` of the log or VM until `close`.

    What others take it sees all the same, and so do they what it takes. As a context manager it closes at the end of
    the block. One that is forgotten open is closed, with a `ResourceWarning`. Leases of a closed client are stale.

    Attributes
    ----------
    name : str
        Its name, which no other client of the log has meanwhile.
    closed : bool
        Whether it was closed.
    feeds : dict of int to Feed
        What it has of each slot that it was fed from, by the slot's id.

    Examples
    --------
    >>> from hwdbm import DirtyLog
    >>> log = DirtyLog()
    >>> log.set_memory_region(0, 1, 0, 0x10000, 0)
    <Change.CREATE: 'create'>
    >>> with log.client("backup") as backup, log.client("statistics") as statistics:
    ...     log.mark_dirty(0, 7)
    ...     with backup.take(0) as lease:
    ...         lease.bitmap.pages()
    ...     log.mark_dirty(0, 9)
    ...     with statistics.take(0) as lease:
    ...         lease.bitmap.pages()
    ...     with backup.take(0) as lease:
    ...         lease.bitmap.pages(), lease.epoch
    array([7])
    array([7, 9])
    (array([9]), 1)
    >>> log.get_dirty_log(0).pages()
    array([7, 9])
    """

    def __init__(self, name: str, take: "Take") -> None:
        self.name, self.closed = name, False
        self.feeds: dict[int, Feed] = {}
        self._take, self._owner = take, os.getpid()

    def __repr__(self) -> str:
        return f"<LogClient {self.name!r}, {'closed' if self.closed else 'open'}>"

    def take(self, slot: int) -> ClientLease:
        """Take the pages of a slot that were dirtied since the last time, and clean them.

        The TLB is flushed when this returns: the pages may be copied. Where the slot was changed since (created,
        moved, deleted and made again, its log switched off) the lease is of all pages, and its `broken` says why.

        Parameters
        ----------
        slot : int
            The slot's id.

        Returns
        -------
        ClientLease
            ``commit()`` when its ``bitmap`` was copied, ``rollback()`` when that failed.

        Raises
        ------
        ValueError
            If the client is closed.
        OSError
            ENOENT if there is no such slot or it doesn't log, and what else the log has. Nothing is lost then, and no
            epoch has ended. `StaleLeaseError` if the slot was changed meanwhile.
        """
        if self.closed:
            raise ValueError(f"{self!r} takes nothing any more")
        return self._take(self, check.integer(slot, "slot", None))

    def close(self) -> None:
        """Take no more. A second time does nothing, and neither does it in a process forked off since."""
        if not self.closed and os.getpid() == self._owner:
            self.closed = True
            for feed in tuple(self.feeds.values()):
                feed.close()
            self.feeds.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not self.closed and os.getpid() == self._owner:
            # Without `source`: a recorder of warnings would keep the client alive, and its bitmaps.
            warnings.warn(f"{self!r} was never closed", ResourceWarning, stacklevel=2)
            self.close()


Take = Callable[[LogClient, int], ClientLease]
