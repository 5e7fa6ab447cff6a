"""Leases: dirty pages that a log lends, and takes back if their consumer fails or forgets them.

A log lends pages once the TLB was flushed for what it cleaned. Until the lease is settled the pages belong to neither
side alone: the lender keeps a `Loans` of them, and puts back those of a lease that the consumer dropped open.
"""

import sys
import warnings
from collections import deque
from collections.abc import Callable
from errno import ENOENT
from threading import Lock
from types import TracebackType
from typing import Protocol, Self
from weakref import ref

import numpy as np
from numpy.typing import NDArray

from hwdbm import check
from hwdbm.bitmap import DirtyBitmap, word_count
from hwdbm.errors import BitmapError, StaleLeaseError

PutBack = Callable[[DirtyBitmap, int, int], bool]


class Lender(Protocol):
    """A log that lends pages and takes them back: one slot's."""

    @property
    def name(self) -> str:
        """The lender's name in an error's text."""

    @property
    def generation(self) -> int:
        """Which bitmap this is: another one when the slot was deleted or its log switched off."""

    @property
    def loans(self) -> "Loans":
        """The leases that are open. Every verb that lends calls its `Loans.take_back` first."""

    def put_back(self, pages: DirtyBitmap, first_page: int, generation: int) -> bool:
        """Set the bits again; return False, and set none, if the bitmap isn't that of `generation`."""


class Loans:
    """The open leases of one lender, and the pages of those that were forgotten.

    A lease may be forgotten in any thread, and at any moment of a lender's own verbs, so its pages are only noted
    then, by a call that no signal can cut in two. The lender's next verb puts them back.
    """

    def __init__(self) -> None:
        self._open: dict[_Loan, None] = {}  # a set in the order of arrival
        self._forgotten: deque[_Loan] = deque()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._open)

    def take_back(self) -> None:
        """Put the pages of forgotten leases back. To be called with no page held."""
        if not self._forgotten:
            return
        with self._lock:  # a thread that finds it held must not lend before the pages are back
            while self._forgotten:
                loan = self._forgotten[0]
                if loan.pages is not None:
                    loan.put_back(loan.left(), loan.first_page, loan.generation)
                self._forgotten.popleft()
                self._open.pop(loan, None)

    def _lend(self, lease: "Lease", pages: DirtyBitmap, generation: int) -> "_Loan":
        # The callback is a method of a deque and no Python function: a signal's handler can't raise in its place.
        loan = _Loan(lease, self._forgotten.append)
        loan.pages, loan.npages, loan.first_page, loan.generation = pages, pages.npages, lease.first_page, generation
        loan.put_back = lease._lender.put_back
        self._open[loan] = None
        return loan

    def _settle(self, loan: "_Loan") -> None:
        loan.pages = None  # the lease has it still, so that its callback will be called
        self._open.pop(loan, None)


class _Loan(ref["Lease"]):
    """The state of a lease that outlives it."""

    __slots__ = ("first_page", "generation", "npages", "pages", "put_back")

    pages: DirtyBitmap | None
    npages: int
    first_page: int
    generation: int
    put_back: PutBack

    def left(self) -> DirtyBitmap:
        """Return what is to be put back: nothing once it is settled, all pages if no bitmap of them is left."""
        if self.pages is None:
            return DirtyBitmap(self.npages)
        try:
            return _sound(self.pages, self.npages)
        except (TypeError, BitmapError):
            return ~DirtyBitmap(self.npages)


class Lease:
    """Dirty pages on loan: the consumer commits pages that it copied, and rolls back pages that it failed to copy.

    As a context manager it commits at the end of the block, and rolls back where the block raises. A lease that was
    settled inside of the block stays as it is. If it must roll back and the bitmap is gone, the block's own exception
    is raised, with a note. The pages of a lease that is dropped open are dirty again, with a `ResourceWarning`.

    Parameters
    ----------
    lender : Lender
        The log that lends.
    bitmap : DirtyBitmap
        The pages; bit 0 is `first_page`.
    first_page : int
        The page of bit 0, counted from the slot's first; a multiple of 64.
    generation : int
        The lender's, before the first page was taken.
    taken : bool
        Whether the pages leave the log, rather than being shown only.

    Notes
    -----
    A lender makes the lease first, and moves bits from its log to the lease's bitmap while it flushes: so that at any
    moment each is in one of them, whatever interrupts it.

    A slot that was moved keeps its bitmap, and a lease its terms. When the slot was deleted, or its log was switched
    off, be it on again or not, the bitmap that the bits are from is gone: `commit` and `rollback` raise
    `StaleLeaseError`.

    Examples
    --------
    >>> from hwdbm import DirtyLog
    >>> log = DirtyLog()
    >>> log.set_memory_region(0, 1, 0, 0x10000, 0)
    <Change.CREATE: 'create'>
    >>> log.mark_dirty(0, 7)
    >>> with log.get_dirty_log(0, lease=True) as lease:
    ...     lease.bitmap.pages()
    array([7])
    >>> lease
    <Lease of slot 0: <DirtyBitmap: 1 of 16 pages dirty>, committed>
    """

    _stale_since = "was deleted or its log switched off"
    _settled: str | None = None
    _loan: _Loan | None = None

    def __init__(
        self, lender: Lender, bitmap: DirtyBitmap, first_page: int = 0, *, generation: int, taken: bool = True
    ) -> None:
        self._lender, self._generation = lender, generation
        self._bitmap, self._npages, self._first_page = bitmap, bitmap.npages, first_page
        if taken:
            self._loan = lender.loans._lend(self, bitmap, generation)

    def __repr__(self) -> str:
        return f"<Lease of {self._lender.name}: {self.bitmap!r}, {self._settled or 'open'}>"

    @property
    def first_page(self) -> int:
        """The page of bit 0, counted from the slot's first."""
        return self._first_page

    @property
    def bitmap(self) -> DirtyBitmap:
        """The pages; bit 0 is `first_page`. Writing to it changes what a rollback puts back.

        Another bitmap may be put in its place, of the same number of pages.
        """
        return self._bitmap

    @bitmap.setter
    def bitmap(self, bitmap: DirtyBitmap) -> None:
        _words(bitmap, self._npages)
        if self._loan is not None:
            self._loan.pages = bitmap
        self._bitmap = bitmap

    @property
    def generation(self) -> int:
        """The lender's generation when the pages were taken."""
        return self._generation

    def words(self, lo: int, hi: int) -> NDArray[np.uint64]:
        """Return the words of the pages [lo, hi), counted from the slot's first, for the lender to fill."""
        return self._bitmap.words[lo - self._first_page >> 6 : hi - self._first_page + 63 >> 6]

    def commit(self) -> None:
        """Say that the pages were copied: they are the consumer's for good.

        Raises
        ------
        ValueError
            If the lease was settled before.
        StaleLeaseError
            If the bitmap is gone.
        """
        self._check_open()
        if self._lender.generation != self._generation:
            raise self._stale()
        self._settle("committed")

    def rollback(self) -> None:
        """Give the pages back: each is dirty again, together with what was dirtied since.

        Pages that were only shown (GET under manual protection) never left, and none is put back.

        Raises
        ------
        ValueError
            If the lease was settled before.
        BitmapError
            If `bitmap` isn't one of the lease's pages any more. The lease stays open.
        StaleLeaseError
            If the bitmap of the log is gone.
        """
        self._check_open()
        back = DirtyBitmap(0) if self._loan is None else _sound(self._bitmap, self._npages)
        if not self._lender.put_back(back, self._first_page, self._generation):
            raise self._stale()
        self._settle("rolled back")

    def abandon(self) -> None:
        """Put back what the lender had filled in when it failed to go on: the lease never reached a consumer."""
        try:
            self.rollback()
        except StaleLeaseError:
            self._settled = "abandoned"

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._settled:
            return
        if error is None:
            self.commit()
            return
        try:
            self.rollback()
        except StaleLeaseError as stale:
            error.add_note(stale.strerror or str(stale))

    def __del__(self) -> None:
        # The loan's own callback notes the pages; all that is left to do here is to say so.
        if self._loan is None or self._settled or self._lender.generation != self._generation:
            return
        if sys.is_finalizing():  # the interpreter ends: no consumer is left, and numpy is half gone
            return
        if self._bitmap.any():
            warnings.warn(
                f"a lease of {self._lender.name} was neither committed nor rolled back: "
                f"its {self._loan.left().weight()} pages are dirty again",
                ResourceWarning,
                stacklevel=2,
            )

    def _settle(self, how: str) -> None:
        self._settled = how
        if self._loan is not None:
            self._lender.loans._settle(self._loan)

    def _check_open(self) -> None:
        if self._settled:
            raise ValueError(f"the lease of {self._lender.name} was {self._settled} before")

    def _stale(self) -> StaleLeaseError:
        # It can be settled no more, and there is nothing that its pages could be put back into.
        if self._loan is not None:
            self._lender.loans._settle(self._loan)
        return StaleLeaseError(ENOENT, f"{self._lender.name} {self._stale_since}, and the lease's bitmap is gone")


def kept(lease: Lease) -> DirtyBitmap:
    """Return the pages of a lease, which is settled: for a caller that asked for a bitmap alone."""
    bitmap, loan = lease._bitmap, lease._loan
    lease._settled = "kept"
    if loan is not None:
        loan.pages = None
    # Between here and the caller's own assignment Python handles no signal: the pages are either side's throughout.
    return bitmap


def _words(bitmap: DirtyBitmap, npages: int) -> NDArray[np.uint64]:
    """Return the words of a bitmap that is one of `npages` pages."""
    if not isinstance(bitmap, DirtyBitmap):
        raise TypeError(f"a lease's bitmap is a DirtyBitmap, not {type(bitmap).__name__}")
    if bitmap.npages != npages:
        raise BitmapError(f"the lease is of {npages} pages, its bitmap of {bitmap.npages}")
    return check.uint64s(bitmap.words, "a lease's words", word_count(npages), error=BitmapError)


def _sound(bitmap: DirtyBitmap, npages: int) -> DirtyBitmap:
    """Return a bitmap of its own with the same pages and a clean tail, whatever a consumer did to it."""
    words = _words(bitmap, npages).copy()
    if npages & 63:
        words[-1] &= np.uint64((1 << (npages & 63)) - 1)
    return DirtyBitmap.from_words(words, npages)
