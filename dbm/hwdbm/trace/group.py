"""The format of a trace: a Zarr group, written an interval at a time and read a part at a time.

``words`` has a row an interval, as KVM's bitmaps have the pages: slot after slot, each at a word of its own. An
interval is there when its time is, which is written last. So what fails, or is killed, leaves the intervals before it.
"""

import atexit
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from errno import EEXIST, EIO
from functools import cache
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from hwdbm import check
from hwdbm.bitmap import word_count
from hwdbm.errors import ClosedError, TraceError, has_no_thread, printable
from hwdbm.memslot import Memslot, slot_name
from hwdbm.trace.metadata import MOST_TEXT, NOT_YET, SECOND, Grid, Header, read_grid, read_header
from hwdbm.vm import MemoryMap

Words = NDArray[np.uint64]

_CHUNK = 1 << 17  # words of a chunk: 1 MiB
_TIMES = 1 << 10  # times of a chunk
_KEPT = 1 << 21  # words of a band that a reader keeps for its next call
_LEVEL = 3  # zstd's own
_PATIENCE = 30.0  # seconds
_MOST_TIME = (1 << 63) - 1
_ALL = (1 << 64) - 1


def _zarr() -> Any:
    """Return zarr. It takes a second to import, which only those pay who have a trace."""
    try:
        import zarr  # noqa: PLC0415
    except ModuleNotFoundError as error:
        if error.name != "zarr":
            raise
        raise ModuleNotFoundError("a trace needs zarr: pip install 'hwdbm[trace]'", name="zarr") from None
    _end_patiently()
    return zarr


def check_free(path: Path) -> None:
    """Refuse a path where a trace can't begin: it is there, and isn't an empty folder."""
    if os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(EEXIST, "there is something already: remove it, or choose another name", str(path))


@cache
def _end_patiently() -> None:
    """Have zarr's thread end before the process does, however slow the machine is: zarr waits 0.2 s, and complains."""
    from zarr.core import sync  # noqa: PLC0415  # as _zarr

    def end() -> None:
        with suppress(AttributeError, IndexError, TypeError):  # another zarr may have other names for them
            loop, thread = sync.loop[0], sync.iothread[0]
            if loop is not None and thread is not None and not loop.is_closed():
                loop.call_soon_threadsafe(loop.stop)
                thread.join(_PATIENCE)

    atexit.register(end)  # it is called before zarr's own, which was registered earlier


# --- writing -----------------------------------------------------------------------------------------------


class Writer:
    """A trace that is being written. As a context manager it is closed at the end of the block.

    Each `append` is on the disk when it returns, and readers see it. One that fails leaves the trace as it was. Where
    the block of a context manager fails before the first one, nothing is left of the trace.

    Parameters
    ----------
    path : path-like
        The folder of the trace. It is made, for its owner alone; an empty one may be there.
    slots : iterable of Memslot
        The memslots. Their words follow each other in this order.
    page_size : int
        Bytes of a page: 4096, 16384 or 65536.
    source, mechanism : str
        What is traced, and how its writes are learnt of: texts for people, of 200 letters at most.
    interval : float, optional
        Milliseconds that each interval is to take.
    initial_zeros : (nwords,) uint64 array, optional
        The pages that hold nothing but zeros at the start.
    started : datetime, optional
        When the trace began; now, by default.

    Attributes
    ----------
    path : Path
        The folder.
    nwords : int
        Words of an interval.
    intervals : int
        How many have been written.

    Raises
    ------
    OSError
        EEXIST if there is something at `path`; else the system's.
    LayoutError
        If no VM has these slots.
    ModuleNotFoundError
        If zarr isn't installed: the extra ``trace`` brings it.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from hwdbm.memslot import Memslot
    >>> from hwdbm.trace import Writer, open_trace
    >>> folder = tempfile.TemporaryDirectory()
    >>> with Writer(f"{folder.name}/trace", [Memslot(0, 0, 0x40000, 65, 0)], 4096, interval=100) as writer:
    ...     writer.append(100_000_000, np.array([0b101, 1], dtype=np.uint64))
    ...     writer.append(200_000_000, np.array([0b001, 0], dtype=np.uint64))
    >>> trace = open_trace(f"{folder.name}/trace")
    >>> trace
    <Trace of 2 intervals of 65 pages of 4096 bytes, 0.2 s>
    >>> trace.words(0, 2).tolist(), trace.times.tolist()
    ([[5, 1], [1, 0]], [0, 100000000, 200000000])
    >>> folder.cleanup()
    """

    _open = _made = False  # until it is made

    def __init__(
        self,
        path: str | os.PathLike[str],
        slots: Iterable[Memslot],
        page_size: int,
        *,
        source: str = "",
        mechanism: str = "",
        interval: float | None = None,
        initial_zeros: Words | None = None,
        started: datetime | None = None,
    ) -> None:
        self.path = check.path(path, "path")
        layout = MemoryMap(page_size, check.instances(slots, Memslot, "slots"))
        for text, name in ((source, "source"), (mechanism, "mechanism")):
            check.instance(text, str, name)
        if interval is not None:
            interval = check.real(interval, "interval", 1e-6, 1e15)
        if started is not None:
            check.instance(started, datetime, "started")
        moment = (started or datetime.now(UTC)).isoformat(timespec="milliseconds")
        header = Header(layout, printable(source)[:MOST_TEXT], printable(mechanism)[:MOST_TEXT], interval, moment)
        self._tails = _tails(layout)
        self.nwords, self.intervals, self._last = header.nwords, 0, 0
        if initial_zeros is not None:
            initial_zeros = self._checked(initial_zeros, "initial_zeros")
        self._make(header)
        self._owner, self._open = os.getpid(), True
        self.begin(initial_zeros)

    def _make(self, header: Header) -> None:
        zarr = _zarr()
        try:
            self.path.mkdir(mode=0o700)
            self._made = True
        except FileExistsError:
            check_free(self.path)
        with _failures(self.path):
            self._group = zarr.create_group(zarr.storage.LocalStore(self.path), attributes=header.to_json(),
                                            zarr_format=3)  # fmt: skip
            self._wide = min(self.nwords, _CHUNK)
            self._band = _CHUNK // self._wide
            self._words = self._create("words", (self._band, self.nwords), (self._band, self._wide), "uint64")
            self._zeros: Any = None
            self._times = self._create("times", (_TIMES,), (_TIMES,), "int64", fill=NOT_YET)
            self._times[0] = 0

    def _create(self, name: str, shape: tuple[int, ...], chunk: tuple[int, ...], kind: str, fill: int = 0) -> Any:
        from zarr.codecs import ZstdCodec  # noqa: PLC0415  # as _zarr

        return self._group.create_array(
            name,
            shape=shape,
            chunks=chunk,
            dtype=kind,
            fill_value=fill,
            compressors=ZstdCodec(level=_LEVEL, checksum=True),
            dimension_names=("interval", "word")[2 - len(shape) :] if name != "times" else ("moment",),
            overwrite=True,  # what is left of an attempt that failed
            config={"write_empty_chunks": True},  # a chunk without a file is one that was lost
        )

    def __repr__(self) -> str:
        return f"<Writer of {self.intervals} intervals to {str(self.path)!r}, {'open' if self._open else 'closed'}>"

    def begin(self, initial_zeros: Words | None = None, started: datetime | None = None) -> None:
        """Say what the memory was at the start, and when that was, where it isn't known before. It comes first.

        Parameters
        ----------
        initial_zeros : (nwords,) uint64 array, optional
            The pages that hold nothing but zeros.
        started : datetime, optional
            When it is.

        Raises
        ------
        ClosedError, OSError
            As for `append`.
        ValueError
            If there is an interval already, or the words aren't such.
        """
        self._check_open()
        if self.intervals:
            raise ValueError(f"{self!r} has begun")
        if started is not None:
            check.instance(started, datetime, "started")
        if initial_zeros is not None:
            initial_zeros = self._checked(initial_zeros, "initial_zeros")
        with _failures(self.path):
            if started is not None:
                self._group.attrs["started"] = started.isoformat(timespec="milliseconds")
            if initial_zeros is not None:
                self._create("initial-zeros", (self.nwords,), (self._wide,), "uint64")[:] = initial_zeros

    def append(self, time_ns: int, words: Words, zeros: Words | None = None) -> None:
        """Write an interval.

        Parameters
        ----------
        time_ns : int
            Its end, in nanoseconds since the start: more than the last one's.
        words : (nwords,) uint64 array
            The pages that were written in it. Bits beyond a slot's last page are zero.
        zeros : (nwords,) uint64 array, optional
            Those of them that held nothing but zeros when they were looked at. Either each interval has it, or none.

        Raises
        ------
        ClosedError
            If the writer was closed, or belongs to the process that this one was forked from.
        ValueError
            If the time isn't later, the words aren't such, or a page is in `zeros` alone.
        OSError
            If it can't be written. The trace is as it was, and the interval may be written again.
        """
        self._check_open()
        time_ns = check.integer(time_ns, "time_ns", None)
        if not self._last < time_ns <= _MOST_TIME:
            raise ValueError(f"an interval ends after the last one's {self._last} ns, not at {time_ns}")
        words = self._checked(words, "words")
        if self.intervals and (zeros is None) != (self._zeros is None):
            raise ValueError(f"interval {self.intervals} has {'no ' if zeros is None else ''}zeros, unlike the first")
        if zeros is not None:
            zeros = self._checked(zeros, "zeros")
            if np.bitwise_and(zeros, ~words).any():
                raise ValueError("zeros are pages that were written, and one isn't in words")
        row, after = self.intervals, self.intervals + 1
        with _failures(self.path):
            if zeros is not None and self._zeros is None:
                self._zeros = self._create("zeros", self._words.shape, self._words.chunks, "uint64")
            for array, values in ((self._words, words), (self._zeros, zeros)):
                if values is not None:
                    if row >= array.shape[0]:
                        array.resize((row + self._band, self.nwords))
                    array[row] = values
            if after >= self._times.size:
                self._times.resize((after + _TIMES,))
            self._times[after] = time_ns  # last: now the interval is there
        self.intervals, self._last = after, time_ns

    def _checked(self, words: Words, name: str) -> Words:
        words = check.uint64s(words, name, self.nwords)
        at = _beyond(words, self._tails)
        if at is not None:
            raise ValueError(f"{name}: {slot_name(at)} has bits beyond its last page")
        return words

    def _check_open(self) -> None:
        if not self._open:
            raise ClosedError(f"{self!r} takes nothing any more")
        if os.getpid() != self._owner:
            raise ClosedError(f"{self!r} is of process {self._owner}, which this one was forked from")

    def close(self) -> None:
        """Cut the arrays to the intervals that there are; a second time does nothing.

        Raises
        ------
        OSError
            If it can't be done. The trace can be read all the same.
        """
        if not self._open or os.getpid() != self._owner:
            return
        self._open = False
        with _failures(self.path):
            for array in (self._words, self._zeros):
                if array is not None:
                    array.resize((self.intervals, self.nwords))
            self._times.resize((self.intervals + 1,))
            self._group.attrs["intervals"] = self.intervals

    def discard(self) -> None:
        """Remove the trace, as if it had never been begun, and nothing else that is in its folder.

        It does nothing in a process that was forked.
        """
        if os.getpid() != self._owner:
            return
        self._open = False
        for name in ("words", "zeros", "times", "initial-zeros"):
            if (self.path / name).is_dir():
                shutil.rmtree(self.path / name)
        (self.path / "zarr.json").unlink(missing_ok=True)
        if self._made:
            with suppress(OSError):  # somebody else's files are there
                self.path.rmdir()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is not None and not self.intervals:
                self.discard()
            self.close()
        except OSError:
            if error is None:  # else that says more
                raise


# --- reading -----------------------------------------------------------------------------------------------


class Trace:
    """A write trace, to be read; `open_trace` opens it. It can be pickled: the other process opens it again.

    Attributes
    ----------
    path : Path
        The folder.
    page_size : int
        Bytes of a page.
    slots : tuple of Memslot
        The memslots, in the order of their words.
    starts : tuple of int
        The word of an interval that each slot begins at.
    npages : int
        Pages of all slots.
    nwords : int
        Words of an interval.
    times : (intervals + 1,) int64 array
        Nanoseconds: 0, and when each interval ended. Read-only.
    source, mechanism : str
        What was traced, and how its writes were learnt of.
    interval : float or None
        Milliseconds that each interval was to take.
    started : str
        When it began, as ISO 8601 has it.
    complete : bool
        Whether its writer closed it.
    has_zeros : bool
        Whether it is known which of the pages that were written were zero.

    Examples
    --------
    See `Writer`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = check.path(path, "path")
        header = read_header(self.path)
        self.page_size, self.slots = header.layout.page_size, header.layout.slots
        self.npages, self.nwords = sum(slot.npages for slot in self.slots), header.nwords
        self.starts = tuple(accumulate((word_count(slot.npages) for slot in self.slots[:-1]), initial=0))
        self.source, self.mechanism = header.source, header.mechanism
        self.interval, self.started = header.interval, header.started
        self._tails = _tails(header.layout)
        self._arrays: dict[str, tuple[Grid, Any]] = {}
        self._kept: tuple[object, Words] = None, np.array([], dtype=np.uint64)
        self.times = self._read_times(header.intervals)
        self.complete = header.intervals is not None
        for name in ("words", "zeros"):
            if name == "words" or any((self.path / name / each).exists() for each in ("zarr.json", "c")):
                self._arrays[name] = self._opened(name, self.intervals)
        self.has_zeros = "zeros" in self._arrays

    def __repr__(self) -> str:
        seconds = int(self.times[-1]) / SECOND
        return (
            f"<Trace of {self.intervals} intervals of {self.npages} pages of {self.page_size} bytes, {seconds:.3g} s>"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return open_trace, (str(self.path.absolute()),)

    @property
    def intervals(self) -> int:
        """How many intervals there are."""
        return int(self.times.size) - 1

    def _opened(self, name: str, rows: int) -> tuple[Grid, Any]:
        grid = read_grid(self.path / name, "uint64", 2)
        if grid.shape[0] < rows or grid.shape[1] != self.nwords:
            raise TraceError(
                f"{self.path / name}: {rows} intervals of {self.nwords} words are there by its times and slots, and it "
                f"has {grid.shape[0]} of {grid.shape[1]}"
            )
        grid.check_files(rows)
        return grid, _open_array(grid)

    def _read_times(self, intervals: int | None) -> NDArray[np.int64]:
        where = self.path / "times"
        grid = read_grid(where, "int64", 1)
        (size,), (chunk,) = grid.shape, grid.chunk
        count = size if intervals is None else intervals + 1
        if not 0 < count <= size:
            raise TraceError(f"{where}: the trace is cut short: there are {size} times of {max(count, 1)}")
        last = (count - 1) // chunk
        if intervals is None and last and not (where / "c" / str(last)).exists():
            count = last * chunk  # what it ended in had just been begun
        grid.check_files(count)
        grid.check_chunks(range(-(-count // chunk)))
        with _failures(where):
            times: NDArray[np.int64] = np.ascontiguousarray(_open_array(grid)[:count], dtype=np.int64)
        if times[0] != 0:
            raise TraceError(f"{where}: the first time is 0, not {'to come' if times[0] == NOT_YET else int(times[0])}")
        if intervals is None:  # it is being written, or its writer was killed
            times = times[: int(np.flatnonzero(times != NOT_YET)[-1]) + 1]
        backwards = np.flatnonzero(times[1:] <= times[:-1])
        if backwards.size:
            at = int(backwards[0])
            begin, end = times[at : at + 2].tolist()
            raise TraceError(f"{where}: times are out of order: interval {at} begins at {begin} ns and ends at {end}")
        times.flags.writeable = False
        return times

    def words(self, lo: int, hi: int, first: int = 0, stop: int | None = None) -> Words:
        """Return the pages that were written in the intervals [lo, hi).

        Parameters
        ----------
        lo, hi : int
            Intervals.
        first, stop : int
            Words of each: all of them by default.

        Returns
        -------
        (hi - lo, stop - first) uint64 array
            Bit i of word j of a slot is its page 64 j + i.

        Raises
        ------
        TraceError
            If a chunk is missing, damaged, or has pages that no slot has.
        OSError
            If it can't be read.
        ValueError
            If there are no such intervals or words.
        """
        return self._read("words", lo, hi, first, stop)

    def zeros(self, lo: int, hi: int, first: int = 0, stop: int | None = None) -> Words | None:
        """Return those pages of `words` that held nothing but zeros when they were looked at; None if nobody looked.

        Arguments and errors are those of `words`.
        """
        return self._read("zeros", lo, hi, first, stop) if self.has_zeros else None

    @property
    def initial_zeros(self) -> Words | None:
        """The pages that were zero at the start, ``(nwords,) uint64``; None if nobody looked."""
        where = self.path / "initial-zeros"
        if not where.exists():
            return None
        grid = read_grid(where, "uint64", 1)
        (size,), (chunk,) = grid.shape, grid.chunk
        if size != self.nwords:
            raise TraceError(f"{where}: an interval has {self.nwords} words, and it has {size}")
        grid.check_files(self.nwords)
        grid.check_chunks(range(-(-self.nwords // chunk)))
        with _failures(where):
            found: Words = np.ascontiguousarray(_open_array(grid)[:], dtype=np.uint64)
        self._check_tails(where, found[None], 0)
        return found

    def _read(self, name: str, lo: int, hi: int, first: int, stop: int | None) -> Words:
        lo, hi = check.integer(lo, "lo", 0, self.intervals), check.integer(hi, "hi", 0, self.intervals)
        stop = self.nwords if stop is None else check.integer(stop, "stop", 0, self.nwords)
        first = check.integer(first, "first", 0, stop)
        if lo >= hi or first == stop:
            return np.empty((max(hi - lo, 0), stop - first), dtype=np.uint64)
        grid, _ = self._arrays[name]
        high, _ = grid.chunk
        # Of a small guest many intervals are in a chunk, which isn't decompressed for each of them.
        if (hi - 1) // high == lo // high and min(high, self.intervals) * self.nwords <= _KEPT:
            band = self._band(name, lo // high)
            return band[lo % high : lo % high + hi - lo, first:stop].copy()
        return self._chunks(name, lo, hi, first, stop)

    def _band(self, name: str, number: int) -> Words:
        """Return the intervals of a row of chunks, which may be the last one that was asked for."""
        kept, band = self._kept
        if kept != (name, number):
            grid, _ = self._arrays[name]
            high, _ = grid.chunk
            band = self._chunks(name, number * high, min((number + 1) * high, self.intervals), 0, self.nwords)
            self._kept = (name, number), band
        return band

    def _chunks(self, name: str, lo: int, hi: int, first: int, stop: int) -> Words:
        """Read from the files, which are looked at first: zarr takes one that isn't there for zeros."""
        grid, array = self._arrays[name]
        high, wide = grid.chunk
        grid.check_chunks(range(lo // high, -(-hi // high)), range(first // wide, -(-stop // wide)))
        with _failures(grid.folder):
            found: Words = np.ascontiguousarray(array[lo:hi, first:stop], dtype=np.uint64)
        self._check_tails(grid.folder, found, first)
        return found

    def _check_tails(self, where: object, found: Words, first: int) -> None:
        at = _beyond(found, self._tails, first)
        if at is not None:
            raise TraceError(f"{where}: {slot_name(at)} has bits beyond its last page")


def open_trace(path: str | os.PathLike[str]) -> Trace:
    """Open a trace to read it. One that is being written, or whose writer was killed, has its whole intervals.

    Parameters
    ----------
    path : path-like
        The folder.

    Returns
    -------
    Trace
        What it says of itself is read and checked, and so are its times; the words are read when they are asked for.

    Raises
    ------
    OSError
        If it can't be read.
    TraceError
        If it is no trace, is cut short, or isn't what it must be; the text names the file.
    ModuleNotFoundError
        If zarr isn't installed: the extra ``trace`` brings it.

    Examples
    --------
    See `Writer`.
    """
    return Trace(path)


def _open_array(grid: Grid) -> Any:
    zarr = _zarr()
    with _failures(grid.folder):
        return zarr.open_array(zarr.storage.LocalStore(grid.folder, read_only=True), mode="r", zarr_format=3)


@contextmanager
def _failures(path: os.PathLike[str]) -> Iterator[None]:
    """Have what zarr and its codecs raise of a damaged chunk be a `TraceError`, and the system's errors named."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno or EIO, error.strerror or str(error), str(error.filename or path)) from error
    except (MemoryError, ModuleNotFoundError, TraceError):
        raise
    except Exception as error:
        if has_no_thread(error):
            raise
        raise TraceError(f"{os.fspath(path)}: it is damaged: {type(error).__name__}: {error}") from error


class _Tails(NamedTuple):
    """Of each slot: its id, the last word of an interval that is its, and the bits in that beyond its last page."""

    slots: list[int]
    at: NDArray[np.int64]
    bits: Words


def _tails(layout: MemoryMap) -> _Tails:
    at = np.cumsum([word_count(slot.npages) for slot in layout.slots]) - 1
    bits = [_ALL ^ _ALL >> -slot.npages % 64 for slot in layout.slots]
    return _Tails([slot.id for slot in layout.slots], at, np.array(bits, dtype=np.uint64))


def _beyond(words: Words, tails: _Tails, first: int = 0) -> int | None:
    """Return the id of a slot with bits beyond its last page, in words of which the first is `first`; else None."""
    lo, hi = np.searchsorted(tails.at, (first, first + words.shape[-1])).tolist()
    beyond = words[..., tails.at[lo:hi] - first] & tails.bits[lo:hi]
    wrong = np.flatnonzero(beyond.any(axis=tuple(range(beyond.ndim - 1))))
    return tails.slots[lo + int(wrong[0])] if wrong.size else None
