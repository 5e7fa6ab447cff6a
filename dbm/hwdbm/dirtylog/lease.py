"""Leases: dirty pages that the log hands out, and takes back if their consumer fails.

The order "clean, publish, flush, then copy" is a chain of types. Who cleaned leaves and published what they had
recorded has an `Unflushed`, which shows no bitmap. Its only way on is `Unflushed.flush`, and that gives a `Flushed`
once the TLB was flushed, and the bits leave the log in the same moment. Only of such receipts is a `Lease` made. If
the flush fails there is no receipt, and every bit is where it was.
"""

from collections.abc import Callable, Sequence
from enum import Enum
from errno import ENOENT
from types import TracebackType
from typing import Protocol, Self

from hwdbm.bitmap import DirtyBitmap
from hwdbm.errors import StaleLeaseError

__all__ = ["Flushed", "Lease", "Lender", "Unflushed"]


class _Key(Enum):
    """What a receipt is made with. Nothing but `Unflushed.flush` has a reason to hold it."""

    FLUSHED = "flushed"


class Flushed:
    """The receipt of a flush: pages that may be copied now.

    Parameters
    ----------
    key : object
        Nobody's: `Unflushed.flush` makes receipts.
    first_page : int
        The page of bit 0, counted from the slot's first.
    pages : DirtyBitmap
        The pages.
    taken : bool
        Whether they left the log, rather than being shown only.

    Raises
    ------
    TypeError
        If anything else makes one.
    """

    __slots__ = ("first_page", "pages", "taken")

    def __init__(self, key: _Key, first_page: int, pages: DirtyBitmap, *, taken: bool) -> None:
        if key is not _Key.FLUSHED:
            raise TypeError("the receipt of a flush is made by Unflushed.flush")
        self.first_page, self.pages, self.taken = first_page, pages, taken


class Unflushed:
    """Pages whose leaves are re-protected and whose bits are published, before the TLB flush for them.

    It may be flushed once, under the lock that it was made under.

    Parameters
    ----------
    live : DirtyBitmap
        The slot's bitmap, in which the bits are set.
    first_page : int
        The page of bit 0 of `mask`, counted from the slot's first; a multiple of 64.
    mask : DirtyBitmap
        The pages, a part of `live` from there.
    take : bool
        False where nothing was re-protected, since the pages are only shown: no flush is needed, and no bit goes.

    Examples
    --------
    >>> live = DirtyBitmap.from_pages([3, 70], 128)
    >>> unflushed = Unflushed(live, 64, live.part(64, 64))
    >>> unflushed
    <Unflushed: 64 pages from 64>
    >>> unflushed.flush(lambda: print("TLB")).pages.pages(), live.pages()
    TLB
    (array([6]), array([3]))
    """

    __slots__ = ("_first_page", "_live", "_mask", "_spent", "_take")

    def __init__(self, live: DirtyBitmap, first_page: int, mask: DirtyBitmap, *, take: bool = True) -> None:
        self._live, self._first_page, self._mask, self._take = live, first_page, mask, take
        self._spent = False

    def __repr__(self) -> str:
        return f"<Unflushed: {self._mask.npages} pages from {self._first_page}>"

    def flush(self, flush: Callable[[], object]) -> Flushed:
        """Flush the TLB, then let the bits leave the log.

        Parameters
        ----------
        flush : callable
            Returns when no vCPU has a translation of these pages from before. Called if there are any pages: also
            where no leaf of theirs was changed just now, since whoever cleaned a block that reaches into this part
            may not have flushed yet.

        Returns
        -------
        Flushed
            The receipt, with the pages.

        Raises
        ------
        ValueError
            If it was called before: bits set since would be lost.
        Exception
            What `flush` raises. No bit has left the log then.
        """
        if self._spent:
            raise ValueError(f"{self!r} was flushed before")
        self._spent = True
        if self._take and self._mask.any():
            flush()
            words = self._mask.words
            start = self._first_page >> 6
            self._live.words[start : start + words.size] &= ~words
        return Flushed(_Key.FLUSHED, self._first_page, self._mask, taken=self._take)


class Lender(Protocol):
    """Whoever lends pages and takes them back: one slot's log."""

    @property
    def name(self) -> str:
        """What the lender is called in an error's text."""

    @property
    def generation(self) -> int:
        """Which bitmap this is: another one when the slot was deleted or its log switched off."""

    def put_back(self, pages: DirtyBitmap, first_page: int, generation: int) -> bool:
        """Set the bits again; return False, and set none, if the bitmap isn't that of `generation`."""


class Lease:
    """Dirty pages that a consumer has on terms: it commits what it copied, or rolls back what it failed to.

    As a context manager it commits at the end of the block, and rolls back where the block raises. Whatever was settled
    inside of the block stays. If it must roll back and the bitmap is gone, the block's own exception is raised, with
    a note.

    Parameters
    ----------
    lender : Lender
        The log that it is from.
    receipts : sequence of Flushed
        One for each part, in order; together they cover the range.
    first_page, npages : int
        The range, in pages counted from the slot's first.
    generation : int
        The lender's, when the first part was taken.

    Attributes
    ----------
    bitmap : DirtyBitmap
        The pages; bit 0 is `first_page`. Writing to it changes what a rollback puts back.
    first_page : int
        The page of bit 0.

    Raises
    ------
    TypeError
        If a receipt isn't one.

    Notes
    -----
    A slot that was moved keeps its bitmap, and a lease its terms. When the slot was deleted, or its log was switched
    off, be it on again or not, the bitmap that the bits are from is gone: `commit` and `rollback` raise
    `StaleLeaseError`.
    """

    def __init__(
        self, lender: Lender, receipts: Sequence[Flushed], *, first_page: int, npages: int, generation: int
    ) -> None:
        for receipt in receipts:
            if not isinstance(receipt, Flushed):
                raise TypeError(f"a lease is made of receipts of flushes, not of {receipt!r}")
        self._lender, self._generation = lender, generation
        self._settled: str | None = None
        self._takes = any(receipt.taken for receipt in receipts)
        self.first_page = first_page
        self.bitmap = _joined(receipts, first_page, npages)

    def __repr__(self) -> str:
        return f"<Lease of {self._lender.name}: {self.bitmap!r}, {self._settled or 'open'}>"

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
        self._settled = "committed"

    def rollback(self) -> None:
        """Give the pages back: each is dirty again, together with whatever was dirtied since.

        Pages that were only shown (GET under manual protection) never left, and nothing is put back.

        Raises
        ------
        ValueError
            If the lease was settled before.
        StaleLeaseError
            If the bitmap is gone.
        """
        self._check_open()
        back = self.bitmap if self._takes else DirtyBitmap(0)
        if not self._lender.put_back(back, self.first_page, self._generation):
            raise self._stale()
        self._settled = "rolled back"

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

    def _check_open(self) -> None:
        if self._settled:
            raise ValueError(f"the lease of {self._lender.name} was {self._settled} before")

    def _stale(self) -> StaleLeaseError:
        return StaleLeaseError(
            ENOENT, f"{self._lender.name} was deleted or its log switched off, and the lease's bitmap is gone"
        )


def _joined(receipts: Sequence[Flushed], first_page: int, npages: int) -> DirtyBitmap:
    """Return the receipts' pages as one bitmap of the range; a single one's is not copied."""
    if len(receipts) == 1 and receipts[0].pages.npages == npages:
        return receipts[0].pages
    joined = DirtyBitmap(npages)
    for receipt in receipts:
        start, words = receipt.first_page - first_page >> 6, receipt.pages.words
        joined.words[start : start + words.size] = words
    return joined
