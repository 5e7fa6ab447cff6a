"""One bit a page, laid out as KVM lays it out.

Little-endian 64-bit words; bit 0 of word 0 is the slot's first page; ``ceil(npages / 64)`` words; the bits at and
beyond `npages` are zero (``KVM_GET_DIRTY_LOG``, Documentation/virt/kvm/api.rst 4.8).
"""

import os
from collections.abc import Iterable
from typing import Any, Self

import numpy as np
import numpy.ma  # which np.unique imports when it is first called: an interrupt would leave it half imported
from bitarray import bitarray
from numpy.typing import ArrayLike, NDArray

from hwdbm.check import flag, integer, integers, octets, zeros
from hwdbm.check import path as checked_path
from hwdbm.errors import BitmapError
from hwdbm.files import open_regular, write

__all__ = ["DirtyBitmap", "word_count"]

Words = NDArray[np.uint64]

_ALL = (1 << 64) - 1
_MOST = 1 << 40  # pages: 52 address bits of pages of 4 KiB
_SPARSE = 16  # where one page in so many is dirty, or fewer, runs are made of pages
_FEW = 12  # bits a word: with fewer, to take them off one by one is faster than to unpack all 64
_CHUNK = 1 << 15  # words looked at together where a listing needs temporaries: 256 KiB


def word_count(npages: int) -> int:
    """Return the 64-bit words of a bitmap of `npages` pages.

    Raises
    ------
    BitmapError
        If `npages` is negative.

    Examples
    --------
    >>> [word_count(n) for n in (0, 1, 64, 65)]
    [0, 1, 1, 2]
    """
    npages = integer(npages, "npages", None, _MOST, BitmapError)
    if npages < 0:
        raise BitmapError(f"a bitmap has 0 pages or more, not {npages}")
    return (npages + 63) // 64


class DirtyBitmap:
    """The dirty pages of a memslot, or of a part of one.

    Parameters
    ----------
    npages : int
        Pages that the bitmap stands for; 0 or more. All start clean.

    Raises
    ------
    BitmapError
        For fewer pages than none, or more than 2^40: what 52 bits of address have.
    MemoryError
        If there is no room for them.

    Examples
    --------
    >>> b = DirtyBitmap(130)
    >>> b.set_range(62, 4)
    >>> b.weight(), b.ranges().tolist(), [hex(w) for w in b.words]
    (4, [[62, 4]], ['0xc000000000000000', '0x3', '0x0'])
    >>> b.bits[63], b.to_bytes().hex()
    (1, '00000000000000c003000000000000000000000000000000')
    """

    __slots__ = ("_bits", "_npages", "_words")

    _npages: int
    _words: Words

    def __init__(self, npages: int) -> None:
        self._npages = integer(npages, "npages", None, _MOST, BitmapError)
        self._words = zeros(word_count(self._npages), f"a bitmap of {self._npages} pages")
        self._bits: bitarray | None = None

    @property
    def npages(self) -> int:
        """Pages that the bitmap stands for."""
        return self._npages

    @property
    def words(self) -> Words:
        """The bits, as a uint64 array whose elements may be set. No other array can be put in its place."""
        return self._words

    @words.setter
    def words(self, words: Words) -> None:
        if words is not self._words:  # what `b.words |= other` puts back is the array itself
            raise AttributeError("a bitmap's words are its own: set words[:], or make one with from_words")

    # --- other forms ---------------------------------------------------------------------------------------

    @classmethod
    def from_words(cls, words: Words, npages: int) -> Self:
        """Return a bitmap over `words`, which it shares and doesn't copy.

        Parameters
        ----------
        words : (ceil(npages / 64),) uint64 array
            C-contiguous, in the machine's byte order, which is little-endian.
        npages : int
            Pages that the bitmap stands for.

        Raises
        ------
        BitmapError
            If the size or type differs, or a bit at or beyond `npages` is set.
        """
        npages = integer(npages, "npages", None, _MOST, BitmapError)
        given: Any = words
        if not isinstance(given, np.ndarray) or isinstance(given, np.ma.MaskedArray):
            raise TypeError(f"words are an array of uint64, not {type(words).__name__}")
        native = words.dtype == np.uint64 and words.dtype.isnative and words.flags.aligned
        if not native or words.ndim != 1 or not words.flags.c_contiguous:
            raise BitmapError(f"words are a contiguous 1-d uint64 array, not {words.dtype} of shape {words.shape}")
        if words.size != word_count(npages):
            raise BitmapError(f"a bitmap of {npages} pages has {word_count(npages)} words, got {words.size}")
        self = cls.__new__(cls)
        self._npages, self._words, self._bits = npages, words, None
        self.verify()
        return self

    @classmethod
    def from_bytes(cls, raw: bytes | bytearray | memoryview, npages: int) -> Self:
        """Return the bitmap that `raw`, in KVM's layout, holds. `raw` is copied.

        Parameters
        ----------
        raw : bytes-like
            Exactly ``8 * ceil(npages / 64)`` bytes, the bits at and beyond `npages` zero.
        npages : int
            Pages that the bitmap stands for.

        Raises
        ------
        BitmapError
            If the size differs or a tail bit is set.

        Examples
        --------
        >>> DirtyBitmap.from_bytes(bytes([5, 0, 0, 0, 0, 0, 0, 0]), 3).pages()
        array([0, 2])
        """
        size = 8 * word_count(npages)
        view = octets(raw, "raw")
        if view.nbytes != size:
            raise BitmapError(f"a bitmap of {npages} pages has {size} bytes, got {view.nbytes}")
        return cls.from_words(np.frombuffer(view.tobytes(), dtype="<u8").astype(np.uint64), npages)

    @classmethod
    def from_pages(cls, pages: Iterable[int] | NDArray[np.integer], npages: int) -> Self:
        """Return the bitmap in which just `pages` are dirty; they may repeat and come in any order.

        Raises
        ------
        BitmapError
            If a page is negative, or at or beyond `npages`.
        """
        self = cls(npages)
        index = integers(pages, "pages", 0, self.npages - 1, BitmapError)
        self._mark(index)
        return self

    def _mark(self, pages: NDArray[np.int64]) -> None:
        octets = self.words.view(np.uint8)
        np.bitwise_or.at(octets, pages >> 3, np.left_shift(1, pages & 7).astype(np.uint8))

    @classmethod
    def from_ranges(cls, ranges: ArrayLike, npages: int) -> Self:
        """Return the bitmap in which just the rows (first page, pages) of `ranges` are dirty.

        The inverse of `ranges` with its default base and unit.
        """
        self = cls(npages)
        rows = np.asarray(ranges)
        if rows.size and rows.dtype.kind not in "iu":
            raise TypeError(f"ranges are integers, not {rows.dtype}")
        if rows.size and (rows.ndim != 2 or rows.shape[1] != 2):
            raise BitmapError(f"ranges are rows of two, not of shape {rows.shape}")
        rows = integers(rows.ravel(), "ranges", 0, self.npages, BitmapError).reshape(-1, 2) if rows.size else rows
        rows = rows.reshape(-1, 2).astype(np.int64)
        first, stop = rows[:, 0], rows.sum(axis=1)
        if (stop > self.npages).any():
            wrong = int(np.argmax(stop > self.npages))
            raise BitmapError(f"pages {int(first[wrong])}..{int(stop[wrong]) - 1} are not inside of the {self.npages}")
        some = rows[:, 1] > 0
        first, last = first[some], stop[some] - 1
        head, tail, full = first >> 6, last >> 6, np.uint64(_ALL)
        begins = full << (first & 63).astype(np.uint64)
        ends = full >> (~last & 63).astype(np.uint64)
        one = head == tail
        np.bitwise_or.at(self.words, head[one], begins[one] & ends[one])
        np.bitwise_or.at(self.words, head[~one], begins[~one])
        np.bitwise_or.at(self.words, tail[~one], ends[~one])
        long = tail - head > 1
        for start, end in zip((head[long] + 1).tolist(), tail[long].tolist(), strict=True):
            self.words[start:end] = full
        return self

    def to_bytes(self) -> bytes:
        """Return the words in KVM's layout: ``8 * ceil(npages / 64)`` bytes."""
        return self.words.astype("<u8", copy=False).tobytes()

    @classmethod
    def load(cls, path: str | os.PathLike[str], npages: int | None = None) -> Self:
        """Return the bitmap that a file holds, in KVM's layout.

        Parameters
        ----------
        path : path-like
            The file.
        npages : int, optional
            Pages that the bitmap stands for; by default 64 for each word, since the file doesn't say it.

        Raises
        ------
        BitmapError
            If the size differs or a tail bit is set; the text names the file.
        OSError
            If it can't be read.
        """
        path = checked_path(path, "path")
        if npages is not None:
            npages = integer(npages, "npages", 0, _MOST, BitmapError)
        with open_regular(path) as file:
            size = file.seek(0, 2)
            wanted = size if npages is None else 8 * word_count(npages)
            if size != wanted or size % 8:
                raise BitmapError(
                    f"{path} has {size} bytes, no whole words"
                    if npages is None
                    else f"{path} has {size} bytes, and a bitmap of {npages} pages has {wanted}"
                )
            file.seek(0)
            raw = file.read(wanted)
        try:
            return cls.from_bytes(raw, wanted * 8 if npages is None else npages)
        except BitmapError as error:
            raise BitmapError(f"{path}: {error}") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the words to a file in KVM's layout, which appears when it is whole.

        Raises
        ------
        OSError
            If it can't be written. What was there is there still.
        """
        write(checked_path(path, "path"), self.to_bytes())

    @property
    def bits(self) -> bitarray:
        """The words as a little-endian `bitarray.bitarray` that shares their memory; the tail is in it too."""
        if self._bits is None:
            self._bits = bitarray(buffer=self.words, endian="little")
        return self._bits

    def copy(self) -> Self:
        """Return a bitmap of its own with the same pages dirty."""
        return self.from_words(self.words.copy(), self.npages)

    def __reduce__(self) -> tuple[object, ...]:
        return type(self).from_words, (self.words, self.npages)  # a copy's bits share the copy's words

    # --- reading -------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self.npages

    def __bool__(self) -> bool:
        raise TypeError("a bitmap's truth is ambiguous: use any(), weight() or len()")

    def __contains__(self, page: int) -> bool:
        page = integer(page, "page", None)
        return 0 <= page < self._npages and bool(int(self._words[page >> 6]) >> (page & 63) & 1)

    def __repr__(self) -> str:
        return f"<DirtyBitmap: {self.weight()} of {self.npages} pages dirty>"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DirtyBitmap):
            return NotImplemented
        return self.npages == other.npages and bool(np.array_equal(self.words, other.words))

    __hash__ = None  # type: ignore[assignment]  # mutable

    def any(self) -> bool:
        """Return whether any page is dirty."""
        return bool(np.count_nonzero(self.words))  # faster than `any`, of few words and of many

    def weight(self) -> int:
        """Return how many pages are dirty. Equal to ``sum(page in self for page in range(len(self)))``."""
        return _weight(self.words)

    def count(self, first: int, npages: int) -> int:
        """Return how many of `npages` pages from `first` are dirty. Equal to ``part(first, npages).weight()``.

        Raises
        ------
        BitmapError
            If the range isn't inside of the bitmap.

        Examples
        --------
        >>> DirtyBitmap.from_pages([1, 63, 64, 99], 100).count(60, 30)
        2
        """
        first, npages = integer(first, "first", None), integer(npages, "npages", None)
        stop = first + npages
        if first < 0 or npages < 0 or stop > self.npages:
            raise BitmapError(f"pages {first}..{stop - 1} are not inside of the {self.npages}")
        if npages == 0:
            return 0
        head, last = first >> 6, stop - 1 >> 6
        below = int(self.words[head]) & ((1 << (first & 63)) - 1)
        above = int(self.words[last]) >> ((stop - 1 & 63) + 1)
        return _weight(self.words[head : last + 1]) - below.bit_count() - above.bit_count()

    def pages(self) -> NDArray[np.int64]:
        """Return the dirty pages in order, as an int64 array: 8 bytes a dirty page, so ask when there are few."""
        return _positions(self.words)

    def ranges(self, base: int = 0, unit: int = 1) -> NDArray[np.uint64]:
        """Return the runs of dirty pages, sorted and merged.

        Parameters
        ----------
        base, unit : int
            A row is ``(base + first * unit, count * unit)``. By default it is in pages of this bitmap; with the
            slot's address and the page size in bytes, ``ranges(...).tobytes()`` is Cloud Hypervisor's table of
            memory ranges.

        Returns
        -------
        (n, 2) uint64 array

        Raises
        ------
        BitmapError
            If an end doesn't fit into 64 bits.

        Examples
        --------
        >>> DirtyBitmap.from_pages([0, 1, 2, 63, 64], 65).ranges(base=0x8000, unit=0x1000).tolist()
        [[32768, 12288], [290816, 8192]]
        """
        base, unit = integer(base, "base", None), integer(unit, "unit", None)
        if base < 0 or unit < 0 or base + self.npages * unit > 1 << 64:
            raise BitmapError(f"{self.npages} pages of {unit} from {base:#x} don't fit into 64 bits")
        if self.weight() * _SPARSE < self.npages:  # most runs are a page or two: to list those is the shorter way
            runs = _joined(self.pages())
        else:
            edges = _positions(_edges(self.words))
            if edges.size % 2:  # the run that ends with the last word has no falling edge
                edges = np.append(edges, self.words.size * 64)
            runs = edges.view(np.uint64).reshape(-1, 2)
            runs[:, 1] -= runs[:, 0]
        if (base, unit) != (0, 1):
            runs *= np.uint64(unit)
            runs[:, 0] += np.uint64(base)
        return runs

    def verify(self) -> None:
        """Raise `BitmapError` if a bit at or beyond `npages` is set."""
        tail = self.npages & 63
        if tail and int(self.words[-1]) >> tail:
            raise BitmapError(f"bits at or beyond page {self.npages} are set: last word {int(self.words[-1]):#018x}")

    # --- writing -------------------------------------------------------------------------------------------

    def set_range(self, first: int, npages: int, value: bool = True) -> None:
        """Mark `npages` pages from `first` dirty, or clean where `value` is False.

        Raises
        ------
        BitmapError
            If the range isn't inside of the bitmap; nothing is changed then.
        """
        first, npages = integer(first, "first", None), integer(npages, "npages", None)
        value = flag(value, "value")
        stop = first + npages
        if first < 0 or npages < 0 or stop > self.npages:
            raise BitmapError(f"pages {first}..{stop - 1} are not inside of the {self.npages}")
        if npages == 0:
            return
        head, last = first >> 6, stop - 1 >> 6
        head_mask, last_mask = _ALL << (first & 63) & _ALL, _ALL >> (-stop & 63)
        if head == last:
            self._write(head, head_mask & last_mask, value)
        else:
            self._write(head, head_mask, value)
            self.words[head + 1 : last] = _ALL if value else 0
            self._write(last, last_mask, value)

    def fill(self) -> None:
        """Mark every page dirty; the tail stays zero."""
        self.set_range(0, self.npages)

    def clear(self) -> None:
        """Mark every page clean."""
        self.words[:] = 0

    def _write(self, word: int, mask: int, value: bool) -> None:
        if value:
            self.words[word] |= np.uint64(mask)
        else:
            self.words[word] &= np.uint64(~mask & _ALL)

    # --- set algebra ---------------------------------------------------------------------------------------

    def _same(self, other: "DirtyBitmap") -> Words:
        if not isinstance(other, DirtyBitmap):
            raise TypeError(f"a bitmap combines with a bitmap, not {type(other).__name__}")
        if self.npages != other.npages:
            raise BitmapError(f"bitmaps of {self.npages} and {other.npages} pages don't combine")
        return other.words

    def __or__(self, other: "DirtyBitmap") -> Self:
        return self.from_words(self.words | self._same(other), self.npages)

    def __and__(self, other: "DirtyBitmap") -> Self:
        return self.from_words(self.words & self._same(other), self.npages)

    def __xor__(self, other: "DirtyBitmap") -> Self:
        return self.from_words(self.words ^ self._same(other), self.npages)

    def __sub__(self, other: "DirtyBitmap") -> Self:
        return self.from_words(self.words & ~self._same(other), self.npages)

    def __invert__(self) -> Self:
        full = type(self)(self.npages)
        full.fill()
        return full - self

    def __ior__(self, other: "DirtyBitmap") -> Self:
        self.words |= self._same(other)
        return self

    def __iand__(self, other: "DirtyBitmap") -> Self:
        self.words &= self._same(other)
        return self

    def __ixor__(self, other: "DirtyBitmap") -> Self:
        self.words ^= self._same(other)
        return self

    def __isub__(self, other: "DirtyBitmap") -> Self:
        self.words &= ~self._same(other)
        return self

    def issubset(self, other: "DirtyBitmap") -> bool:
        """Return whether every page dirty here is dirty in `other`."""
        return not (self.words & ~self._same(other)).any()

    # --- other sizes ---------------------------------------------------------------------------------------

    def part(self, first: int, npages: int) -> Self:
        """Return a bitmap of its own for `npages` pages from `first`, bit 0 being `first`.

        Raises
        ------
        BitmapError
            If the range isn't inside of the bitmap.
        """
        first, npages = integer(first, "first", None), integer(npages, "npages", None)
        if first < 0 or npages < 0 or first + npages > self.npages:
            raise BitmapError(f"pages {first}..{first + npages - 1} are not inside of the {self.npages}")
        cut = type(self)(npages)
        source, shift, n = self.words[first >> 6 :], np.uint64(first & 63), cut.words.size
        cut.words[:] = source[:n] >> shift
        if shift:
            rest = source[1 : n + 1]
            cut.words[: rest.size] |= rest << (np.uint64(64) - shift)
        if npages & 63:
            cut.words[-1] &= np.uint64((1 << (npages & 63)) - 1)
        return cut

    def refine(self, factor: int) -> Self:
        """Return the bitmap of pages `factor` times smaller: each dirty page dirties all of its parts.

        Examples
        --------
        >>> DirtyBitmap.from_pages([1], 3).refine(4).ranges().tolist()
        [[4, 4]]
        """
        factor = integer(factor, "factor", None)
        if factor < 1:
            raise BitmapError(f"a page is divided into 1 part or more, not {factor}")
        if self.npages * factor > _MOST:
            raise BitmapError(f"{self.npages} pages of {factor:#x} parts each are more than a bitmap has")
        fine = type(self)(self.npages * factor)
        if factor > _CHUNK:  # a page's parts alone are more than should be unpacked at once
            for first, count in self.ranges().tolist():
                fine.set_range(first * factor, count * factor)
            return fine
        step = _CHUNK // factor
        for start in range(0, self.words.size, step):
            octets = np.unpackbits(self.words[start : start + step].view(np.uint8), bitorder="little")
            words = np.packbits(np.repeat(octets, factor), bitorder="little").view(np.uint64)
            target = fine.words[start * factor : (start + step) * factor]
            target[:] = words[: target.size]  # what is cut off lies in the tail
        return fine

    def coarsen(self, factor: int) -> Self:
        """Return the bitmap of pages `factor` times larger: one is dirty if any of its parts is.

        The last page may cover fewer.

        Examples
        --------
        >>> DirtyBitmap.from_pages([1, 9], 10).coarsen(4).pages()
        array([0, 2])
        """
        factor = integer(factor, "factor", None)
        if factor < 1:
            raise BitmapError(f"a page is made of 1 part or more, not {factor}")
        if factor >= self.npages:
            return self.from_pages([0] if self.any() else [], min(self.npages, 1))
        coarse = type(self)((self.npages + factor - 1) // factor)
        if factor >= 64:  # a word is in one page, or in two that its first and its last bit are in
            for start in range(0, self.words.size, _CHUNK):
                chunk = self.words[start : start + _CHUNK]
                (index,) = chunk.nonzero()
                ends = np.concatenate(_ends(chunk[index])) + 64 * np.tile(index + start, 2)
                coarse._mark(np.unique(ends // factor))
            return coarse
        step = max(1, _CHUNK // factor)
        for start in range(0, coarse.words.size, step):
            source = self.words[start * factor : (start + step) * factor]
            size = -(-source.size // factor) * factor * 64  # zeros make the last word whole
            octets = np.unpackbits(source.view(np.uint8), count=size, bitorder="little")
            target = coarse.words[start : start + step]
            target[:] = np.packbits(octets.reshape(-1, factor).any(axis=1), bitorder="little").view(np.uint64)
        return coarse

    def rescale(self, page_size: int, to: int) -> Self:
        """Return the bitmap of pages of another size, in which every byte that was dirty is dirty still.

        Parameters
        ----------
        page_size : int
            Bytes of a page of this bitmap: a power of two.
        to : int
            Bytes of a page of the new one: a power of two. Pages that are larger are dirty if any part of them is, the
            last one may cover less; of one that is larger than the new ones each part is dirty.

        Raises
        ------
        BitmapError
            If one of the sizes is no power of two, or a bitmap hasn't so many pages.

        Examples
        --------
        >>> DirtyBitmap.from_pages([1], 2).rescale(65536, 4096).ranges().tolist()
        [[16, 16]]
        >>> DirtyBitmap.from_pages([17], 40).rescale(4096, 65536)
        <DirtyBitmap: 1 of 3 pages dirty>
        """
        page_size, to = integer(page_size, "page_size", None), integer(to, "to", None)
        for size in (page_size, to):
            if size < 1 or size & size - 1 or size >> 63:
                raise BitmapError(f"a page's size is a power of two below 2^63, not {size}")
        if to == page_size:
            return self.copy()
        return self.coarsen(to // page_size) if to > page_size else self.refine(page_size // to)


def _weight(words: Words) -> int:
    """Return how many bits are set."""
    chunks = (words[i : i + _CHUNK] for i in range(0, words.size, _CHUNK))
    return sum(int(np.bitwise_count(chunk).sum(dtype=np.int64)) for chunk in chunks)


def _ends(words: Words) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the positions of the lowest and of the highest bit of each word, none of which is zero."""
    low, below = words & -words, words.copy()
    for shift in (1, 2, 4, 8, 16, 32):
        below |= below >> np.uint64(shift)
    return np.bitwise_count(low - np.uint64(1)).astype(np.int64), np.bitwise_count(below).astype(np.int64) - 1


def _edges(words: Words) -> Words:
    """Return the words whose bits are set where a bit of `words` differs from the one below it."""
    edges = words << np.uint64(1)
    edges[1:] |= words[:-1] >> np.uint64(63)
    edges ^= words
    return edges


def _joined(pages: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return the runs of some pages, which are sorted, as rows (first page, pages)."""
    runs = np.empty((0, 2), dtype=np.uint64)
    if pages.size:
        ends = np.append(np.flatnonzero(np.diff(pages) != 1), pages.size - 1)
        runs = np.empty((ends.size, 2), dtype=np.uint64)
        runs[:, 1] = np.diff(ends, prepend=-1)
        runs[:, 0] = pages[ends] - runs[:, 1].view(np.int64) + 1
    return runs


def _positions(words: Words) -> NDArray[np.int64]:
    """Return the positions of the set bits, in order. Words that are zero cost next to nothing."""
    found = []
    for start in range(0, words.size, _CHUNK):
        chunk = words[start : start + _CHUNK]
        (index,) = chunk.nonzero()
        if index.size:
            some, first = chunk[index], (index + start) * 64
            counts = np.bitwise_count(some)
            size = int(counts.sum(dtype=np.int64))
            few = size < _FEW * index.size
            found.append(_peeled(some, first, counts, size) if few else _unpacked(some, first))
    return np.concatenate(found) if found else np.empty(0, dtype=np.int64)


def _unpacked(words: Words, first: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the positions of the bits of `words`, of which those of bit 0 are `first`."""
    at = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
    positions: NDArray[np.int64] = (first - np.arange(words.size) * 64)[at >> 6] + at
    return positions


def _peeled(words: Words, first: NDArray[np.int64], counts: NDArray[np.uint8], size: int) -> NDArray[np.int64]:
    """Do as `_unpacked` for words of few bits, `counts` of each and `size` of all: take the lowest off, and again."""
    positions, one = np.empty(size, dtype=np.int64), np.uint64(1)
    place = np.cumsum(counts, dtype=np.int64) - counts
    while words.size:
        below = words - one
        positions[place] = first + np.bitwise_count(~words & below)  # the zeros below the lowest
        words &= below
        (left,) = words.nonzero()
        words, first, place = words[left], first[left], place[left] + 1
    return positions
