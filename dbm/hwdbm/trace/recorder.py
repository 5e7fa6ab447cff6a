"""Recording: a trace of a VM, as a client of its log; of a RAM file, by its content; of bitmaps that were kept."""

import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from errno import EINVAL, EIO, ENOENT
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hwdbm import check
from hwdbm.bitmap import DirtyBitmap, word_count
from hwdbm.errors import BitmapError, StaleLeaseError, TraceError
from hwdbm.files import open_regular
from hwdbm.memslot import Memslot, slot_name
from hwdbm.trace.content import compare
from hwdbm.trace.group import Trace, Words, Writer, open_trace
from hwdbm.trace.metadata import SECOND
from hwdbm.vm import Client, MemoryMap, Pages, Source, client_of
from hwdbm.vm.source import mechanism_of, roll_back

_WINDOW = 1 << 16  # pages whose numbers are listed together
_LOOK = 1 << 20  # bytes of pages that are looked at together
_PART = 4 << 20  # bytes of a RAM file that are compared together
_GLANCE = (0, 256, -1)  # words of a page that are looked at first
_MOST_TIME = (1 << 63) - 1
_SHORTEST, _LONGEST = 1e-6, 1e9  # seconds
_FAR = 1 << 62  # beyond any file
_SOON = 1e-3  # seconds: a last interval of less isn't begun
_TIME = re.compile(r"(\d{1,18})(ns|us|ms|s)(?![0-9A-Za-z])")
_UNITS = {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9}

Tell = Callable[[int, float, int], object]


def record(
    source: Source,
    path: str | os.PathLike[str],
    *,
    interval: float = 0.1,
    duration: float | None = None,
    zeros: bool = True,
    name: str = "trace",
    cancel: threading.Event | None = None,
    on_interval: Tell | None = None,
) -> Trace:
    """Record which pages a VM writes, interval by interval, as a client of its log.

    The pages of an interval are the VM's again until they are on the disk: one that can't be written is rolled back,
    and the trace has the intervals before it.

    Parameters
    ----------
    source : Source
        The VM. It runs on; its log is switched on if it isn't.
    path : path-like
        The folder of the trace; see `Writer`.
    interval : float
        Seconds of an interval. One that is late is ended at once.
    duration : float, optional
        Seconds after which it ends; by default when `cancel` is set.
    zeros : bool
        Whether pages of zeros are looked for: in all memory at the start, and in what was written in each interval.
    name : str
        The name of the client.
    cancel : threading.Event, optional
        Set by another thread, or a signal handler, to end it; the interval that goes on is the last.
    on_interval : callable
        Called after each interval with how many there are, the seconds since the start, and the pages of this one.

    Returns
    -------
    Trace
        The trace.

    Raises
    ------
    OSError
        If it can't be written, or the log can't be used: EBUSY if it has a client of this name.
    TraceError
        If a slot was changed meanwhile.
    ValueError
        If the interval isn't above 0, or there is neither a duration nor a `cancel`.

    Examples
    --------
    >>> import tempfile, threading
    >>> from hwdbm.memslot import Memslot
    >>> from hwdbm.trace import record
    >>> from hwdbm.vm import MemoryMap, PlainGuest
    >>> guest, folder = PlainGuest(MemoryMap(4096, (Memslot(0, 0, 0x40000, 16, 0),))), tempfile.TemporaryDirectory()
    >>> guest.start_log()
    >>> trace = record(guest, f"{folder.name}/trace", interval=0.05, duration=0.1,
    ...                on_interval=lambda *_: guest.write(0x4000_3000, b"a"))
    >>> int(trace.words(0, 1)[0, 0]), int(trace.words(1, 2)[0, 0])
    (0, 8)
    >>> guest.close(); folder.cleanup()
    """
    check.instance(source, Source, "source")
    zeros, ticks = check.flag(zeros, "zeros"), _Ticks(interval, duration, cancel, on_interval)
    layout = MemoryMap.of(source)
    with ExitStack() as stack:
        if not all(slot.logging for slot in source.slots):
            source.start_log()
        client = stack.enter_context(client_of(source, name))
        kind = str(getattr(source, "kind", "memory"))
        writer = stack.enter_context(Writer(path, layout.slots, layout.page_size, source=kind,
                                            mechanism=mechanism_of(source), interval=ticks.interval * 1e3))  # fmt: skip
        initial = _zeros_of(source, layout, _all(layout)) if zeros else None
        with _taken(client, layout) as words:  # what was written until here is of no interval
            if initial is not None:
                initial &= ~words
            ticks.start()
        writer.begin(initial, ticks.started)
        for _ in ticks:
            with _taken(client, layout) as words:
                ended = ticks.now()
                writer.append(ended, words, _zeros_of(source, layout, words) if zeros else None)
            ticks.tell(writer.intervals, ended, words)
    return open_trace(path)


@contextmanager
def _taken(client: Client, layout: MemoryMap) -> Iterator[Words]:
    """Yield the words of what a client takes: committed at the end of the block, rolled back where that raises."""
    lent: list[Pages] = []
    try:
        lent.extend(client.take(slot.id) for slot in layout.slots)
        _check_slots(lent, layout)
        yield np.concatenate([lease.bitmap.words for lease in lent])
    except BaseException:
        roll_back(lent)
        raise
    for lease in lent:
        with suppress(StaleLeaseError):  # then the next interval would have all pages of that slot, and is refused
            lease.commit()


def _check_slots(lent: list[Pages], layout: MemoryMap) -> None:
    for lease, slot in zip(lent, layout.slots, strict=True):
        if broken := getattr(lease, "broken", ""):
            raise TraceError(f"{slot_name(slot.id)} was changed meanwhile: {broken}")
        if lease.bitmap.npages != slot.npages:
            raise TraceError(f"{slot_name(slot.id)} had {slot.npages} pages, and has {lease.bitmap.npages}")


class _Ticks:
    """The ends of intervals, from `start` on; iterating over them waits for each."""

    def __init__(
        self, interval: float, duration: float | None, cancel: threading.Event | None, tell: Tell | None
    ) -> None:
        self.interval = check.real(interval, "interval", _SHORTEST, _LONGEST)
        self._duration = None if duration is None else check.real(duration, "duration", _SHORTEST, _LONGEST)
        if cancel is not None:
            check.instance(cancel, threading.Event, "cancel")
        elif duration is None:
            raise ValueError("a recording ends after a duration, or by a cancel, and there is neither")
        if tell is not None:
            check.instance(tell, Callable, "on_interval")
        self._cancel, self._tell = cancel or threading.Event(), tell

    def start(self) -> None:
        """Have the first interval begin now."""
        self._began, self.started = time.monotonic_ns(), datetime.now(UTC)

    def now(self) -> int:
        """Return the nanoseconds since the start, 1 or more."""
        return max(time.monotonic_ns() - self._began, 1)

    def __iter__(self) -> Iterator[None]:
        due, last = 0.0, False
        while not last:
            due = max(due + self.interval, self.now() / SECOND)
            if self._duration is not None and due >= self._duration - _SOON:
                due, last = max(self._duration, self.now() / SECOND), True
            if self._cancel.wait(due - self.now() / SECOND):
                last = True
            yield

    def tell(self, intervals: int, ended: int, words: Words) -> None:
        """Say that there is one more."""
        if self._tell is not None:
            self._tell(intervals, ended / SECOND, int(np.bitwise_count(words).sum(dtype=np.int64)))


# --- pages of zeros ----------------------------------------------------------------------------------------


def _all(layout: MemoryMap) -> Words:
    """Return the words of all pages."""
    return np.concatenate([(~DirtyBitmap(slot.npages)).words for slot in layout.slots])


def _zeros_of(source: Source, layout: MemoryMap, words: Words) -> Words:
    found, start = [], 0
    for slot in layout.slots:
        end = start + word_count(slot.npages)
        found.append(zero_pages(source.memory(slot.id), words[start:end], layout.page_size))
        start = end
    return np.concatenate(found)


def zero_pages(memory: NDArray[np.uint8], words: Words, page_size: int) -> Words:
    """Return which pages of some hold nothing but zeros: only these are looked at, and most of them at a few words.

    Parameters
    ----------
    memory : (npages * page_size,) uint8 array
        A slot's bytes.
    words : (n,) uint64 array
        Bit i stands for page i.
    page_size : int
        Bytes of a page.

    Returns
    -------
    (n,) uint64 array
        Of the pages of `words`, those of zeros.
    """
    rows, found = memory.view(np.uint64).reshape(-1, page_size // 8), np.zeros_like(words)
    for first in range(0, len(rows), _WINDOW):
        part = slice(first >> 6, first + _WINDOW >> 6)
        if not words[part].any():
            continue
        count = min(_WINDOW, len(rows) - first)
        pages = DirtyBitmap.from_words(words[part].copy(), count).pages() + first
        for column in _GLANCE:
            pages = pages[rows[pages, column] == 0]
        some = _LOOK // page_size
        zero = [each[~rows[each].any(axis=1)] for each in np.split(pages, range(some, pages.size, some))]
        found[part] = DirtyBitmap.from_pages(np.concatenate(zero) - first, count).words
    return found


# --- a file of RAM -----------------------------------------------------------------------------------------


def record_file(
    ram: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    page_size: int = 4096,
    gpa: int = 0,
    interval: float = 0.1,
    duration: float | None = None,
    cancel: threading.Event | None = None,
    on_interval: Tell | None = None,
) -> Trace:
    """Record which pages of a RAM file change, by their content: of a VM of any kind that shares its memory.

    At the end of each interval the file is compared with a copy of what it was, a part of 4 MiB at a time; the copy
    is a file without a name beside the trace, as large as what of the memory isn't zero. **A write that leaves a page
    as it was isn't seen**, nor are several that do: a trace of a dirty log has those pages, this one doesn't. The VM
    isn't paused, so what is written during a comparison is in this interval or the next.

    Parameters
    ----------
    ram : path-like
        The file: of QEMU's ``memory-backend-file`` with ``share=on``, for one.
    path : path-like
        The folder of the trace; see `Writer`.
    page_size : int
        Bytes of a page: 4096, 16384 or 65536.
    gpa : int
        The guest's physical address of the first byte.
    interval, duration, cancel, on_interval
        As for `record`. A comparison takes some tenths of a second for a GiB; an interval isn't shorter.

    Returns
    -------
    Trace
        The trace; pages of zeros are known in it.

    Raises
    ------
    OSError
        If the file can't be read, isn't whole pages (EINVAL) or gets shorter (EIO), or the trace can't be written.
    ValueError
        If the interval isn't above 0, or there is neither a duration nor a `cancel`.
    """
    ticks, ram = _Ticks(interval, duration, cancel, on_interval), check.path(ram, "ram")
    page_size, gpa = check.integer(page_size, "page_size", 1), check.integer(gpa, "gpa")
    path = check.path(path, "path")
    with open_regular(ram) as file, tempfile.TemporaryFile(dir=path.absolute().parent) as copy:
        size = os.lseek(file.fileno(), 0, os.SEEK_END)
        if not size or size % page_size or gpa % page_size:
            raise OSError(EINVAL, f"{size} bytes from gpa {gpa:#x} on are not whole pages of {page_size}", str(ram))
        slots = MemoryMap(page_size, (Memslot(0, 0, gpa // page_size, size // page_size, 0),)).slots
        os.truncate(copy.fileno(), size)
        compare = _Comparison(file.fileno(), copy.fileno(), size, page_size, ram)
        interval = ticks.interval * 1e3
        with Writer(path, slots, page_size, source="ram file", mechanism="content", interval=interval) as writer:
            filled, _ = compare.run()
            # The first one reads and writes all of memory; what the VM wrote meanwhile isn't the first interval's.
            changed, zero = compare.run()
            ticks.start()
            initial = ~(filled | changed) & _all(MemoryMap(page_size, slots)) | zero
            writer.begin(initial, ticks.started)
            for _ in ticks:
                words, zeros = compare.run()
                ended = ticks.now()
                writer.append(ended, words, zeros)
                ticks.tell(writer.intervals, ended, words)
    return open_trace(path)


class _Comparison:
    """A RAM file and the copy of what it was, compared by parts."""

    def __init__(self, file: int, copy: int, size: int, page_size: int, name: Path) -> None:
        self._file, self._copy, self._size, self._page, self._name = file, copy, size, page_size, name
        self._new, self._old = (np.empty(min(_PART, size), dtype=np.uint8) for _ in range(2))

    def run(self) -> tuple[Words, Words]:
        """Return which pages aren't what they were, and which of them are zero; and bring the copy up to date."""
        npages = self._size // self._page
        changed, zero = DirtyBitmap(npages), DirtyBitmap(npages)
        for start in range(0, self._size, _PART):
            length = min(_PART, self._size - start)
            if self._is_hole(start, length):
                continue
            new, old = self._new[:length], self._old[:length]
            self._read(self._file, new, start)
            self._read(self._copy, old, start)
            rows, before = (each.view(np.uint64).reshape(-1, self._page // 8) for each in (new, old))
            found, empty = (DirtyBitmap.from_words(each, len(rows)).pages() for each in compare(rows, before))
            if not found.size:
                continue
            first = start // self._page
            changed |= DirtyBitmap.from_pages(found + first, npages)
            zero |= DirtyBitmap.from_pages(empty + first, npages)
            for run in np.split(found, np.flatnonzero(np.diff(found) != 1) + 1):
                at, end = int(run[0]) * self._page, (int(run[-1]) + 1) * self._page
                self._write(new[at:end], start + at)
        return changed.words, zero.words

    def _is_hole(self, start: int, length: int) -> bool:
        """Return whether there is nothing in either file."""
        return all(_next_data(fd, start) >= start + length for fd in (self._file, self._copy))

    def _read(self, fd: int, into: NDArray[np.uint8], start: int) -> None:
        view, done = into.data, 0
        while done < into.size:
            got = os.preadv(fd, [view[done:]], start + done)
            if not got:
                raise OSError(EIO, f"it ends at byte {start + done}, and had {self._size}", str(self._name))
            done += got

    def _write(self, part: NDArray[np.uint8], start: int) -> None:
        done = 0
        while done < part.size:
            done += os.pwrite(self._copy, part.data[done:], start + done)


def _next_data(fd: int, start: int) -> int:
    """Return where the next bytes are that are no hole."""
    try:
        return os.lseek(fd, start, os.SEEK_DATA)
    except OSError as error:  # a file system that can't tell has data everywhere
        return start if error.errno == EINVAL else _FAR


# --- bitmaps -----------------------------------------------------------------------------------------------


def from_bitmaps(
    folder: str | os.PathLike[str],
    path: str | os.PathLike[str],
    slots: Iterable[Memslot] | None = None,
    *,
    page_size: int = 4096,
    interval: float = 0.1,
) -> tuple[Trace, bool]:
    """Make a trace of dirty bitmaps that were kept: a file an interval, in the order of their names.

    Parameters
    ----------
    folder : path-like
        The files: KVM's words of all slots, one slot after the other. Names that begin with a point are left out.
    path : path-like
        The folder of the trace; see `Writer`.
    slots : iterable of Memslot, optional
        The memslots; by default one at address 0 with a page for each bit of the first file.
    page_size : int
        Bytes of a page: 4096, 16384 or 65536.
    interval : float
        Seconds that each file stands for, where the names don't say when it ended. They do if each has a number with a
        unit, ns, us, ms or s, as in ``guest-000200ms.bitmap``: the time since the start.

    Returns
    -------
    Trace, bool
        The trace, and whether its times are those of the names.

    Raises
    ------
    OSError
        ENOENT if there are no bitmaps; what else reading and writing raise.
    BitmapError
        If one isn't of so many pages; the text names it.
    TraceError
        If two names have one time, or one has the time 0, or one beyond 2^63 ns.
    ValueError
        If the interval isn't above 0.
    """
    folder, seconds = check.path(folder, "folder"), check.real(interval, "interval", _SHORTEST, _LONGEST)
    files = sorted(each for each in folder.iterdir() if not each.name.startswith("."))
    if not files:
        raise OSError(ENOENT, "there are no bitmaps", str(folder))
    named = [_time_of(each.name) for each in files]
    by_name = all(each is not None for each in named)
    times = [each or 0 for each in named] if by_name else [round(seconds * SECOND * (i + 1)) for i in range(len(files))]
    order = sorted(range(len(files)), key=times.__getitem__)
    if slots is None:
        slots = [Memslot(0, 0, 0, max(files[0].stat().st_size // 8, 1) * 64, 0)]
    layout = MemoryMap(page_size, check.instances(slots, Memslot, "slots"))
    for earlier, later in zip([None, *order], order, strict=False):
        if times[later] <= (0 if earlier is None else times[earlier]):
            what = "the time 0" if earlier is None else f"the time of {files[earlier].name}"
            raise TraceError(f"{files[later]}: it has {what}, and an interval ends after it begins")
        if times[later] > _MOST_TIME:
            raise TraceError(f"{files[later]}: its time is beyond the {_MOST_TIME} ns that a trace can have")
    with Writer(path, layout.slots, layout.page_size, source="bitmaps", mechanism="dirty bitmaps",
                interval=None if by_name else seconds * 1e3) as writer:  # fmt: skip
        try:
            for each in order:
                writer.append(times[each], _words_of(files[each], layout))
        except BaseException:
            writer.discard()  # a part of them is no trace of these bitmaps
            raise
    return open_trace(path), by_name


def _time_of(name: str) -> int | None:
    """Return the nanoseconds that a name says; None if it doesn't.

    Examples
    --------
    >>> _time_of("guest-000200ms.bitmap"), _time_of("slot0.bitmap")
    (200000000, None)
    """
    found = _TIME.search(name)
    return int(found[1]) * _UNITS[found[2]] if found else None


def _words_of(file: Path, layout: MemoryMap) -> Words:
    size = 8 * sum(word_count(slot.npages) for slot in layout.slots)
    with open_regular(file) as opened:
        raw = opened.read(size + 1)
    if len(raw) != size:
        got = f"{len(raw)} or more" if len(raw) > size else f"{len(raw)}"
        raise BitmapError(f"{file}: bitmaps of these slots have {size} bytes, got {got}")
    at, found = 0, []
    for slot in layout.slots:
        length = 8 * word_count(slot.npages)
        try:
            found.append(DirtyBitmap.from_bytes(raw[at : at + length], slot.npages).words)
        except BitmapError as error:
            raise BitmapError(f"{file}: {slot_name(slot.id)}: {error}") from None
        at += length
    return np.concatenate(found)
