"""The errors that hwdbm raises: few, each a builtin's subclass too, with the number that was wrong in the text."""

from collections.abc import Sequence

__all__ = [
    "BitmapError",
    "CancelledMigrationError",
    "ClosedError",
    "ConvergenceError",
    "DigestError",
    "GfnError",
    "GuestExitError",
    "HandoverError",
    "HwdbmError",
    "ImageError",
    "InvariantError",
    "KernelsError",
    "KvmUnavailableError",
    "LayoutError",
    "PatternError",
    "PeerError",
    "PlanError",
    "SampleError",
    "SnapshotError",
    "StaleLeaseError",
    "StreamError",
    "TraceError",
    "UnreadError",
    "printable",
]

_MOST_SHOWN = 60  # characters of a value
_MOST_LISTED = 20  # of several values


class HwdbmError(Exception):
    """The base of all errors that are hwdbm's own.

    Examples
    --------
    >>> import hwdbm
    >>> try:
    ...     hwdbm.Stage2(64).unmap(64, 1)
    ... except hwdbm.errors.HwdbmError as error:
    ...     print(error)
    gfn 0x40..0x40 is not inside the slot's 0x0..0x3f
    """


class BitmapError(HwdbmError, ValueError):
    """A bitmap's size, alignment or tail is wrong.

    Examples
    --------
    >>> import hwdbm
    >>> hwdbm.DirtyBitmap.from_bytes(bytes(8), 65)
    Traceback (most recent call last):
    hwdbm.errors.BitmapError: a bitmap of 65 pages has 16 bytes, got 8
    """


class ClosedError(HwdbmError, ValueError):
    """A VM was closed, or belongs to the process that this one was forked from.

    Examples
    --------
    >>> from hwdbm.memslot import Memslot
    >>> from hwdbm.vm import MemoryMap, PlainGuest
    >>> guest = PlainGuest(MemoryMap(4096, (Memslot(0, 0, 0x40000, 16, 0),)))
    >>> guest.close()
    >>> guest.digest()
    Traceback (most recent call last):
    hwdbm.errors.ClosedError: the PlainGuest is closed
    """


class GfnError(HwdbmError, ValueError):
    """A range of guest frames is outside of its memslot, misaligned, or not in the state it needs.

    Examples
    --------
    >>> import hwdbm
    >>> hwdbm.Stage2(64, base_gfn=0x100).unmap(0xFF, 1)
    Traceback (most recent call last):
    hwdbm.errors.GfnError: gfn 0xff..0xff is not inside the slot's 0x100..0x13f
    """


class ImageError(HwdbmError, ValueError):
    """A memory image, its registers or its tables can't be what they claim to be."""


class InvariantError(HwdbmError, AssertionError):
    """``verify()`` found a state that must never be; see the model page of the documentation."""


class GuestExitError(HwdbmError, OSError):
    """A vCPU of a real VM stopped for good: its guest did what nothing here handles, or KVM failed (EIO)."""


class KernelsError(HwdbmError, ValueError):
    """There are no such kernels here: numba is missing, or can't compile them; the text says why."""


class KvmUnavailableError(HwdbmError, OSError):
    """There is no ``/dev/kvm`` here that can be used; the text says why.

    Examples
    --------
    >>> from hwdbm.kvm import Kvm
    >>> Kvm("/nowhere/kvm")
    Traceback (most recent call last):
    hwdbm.errors.KvmUnavailableError: [Errno 2] /nowhere/kvm: there is no such file: this kernel has no KVM
    """


class PatternError(HwdbmError, AssertionError):
    """A guest's memory isn't what its code can have written: a page was lost, or torn.

    Examples
    --------
    >>> from hwdbm.kvm.guest import check_counting
    >>> import numpy as np
    >>> check_counting(np.array([4, 4, 2, 3], dtype=np.uint8), page_size=1)
    Traceback (most recent call last):
    hwdbm.errors.PatternError: page 2 counts 2 after page 1's 4: going up the pages, the count falls once, by 1
    """


class SampleError(HwdbmError, ValueError):
    """Samples of a migration can't be what they must be: cut short, going backwards, not numbers; it names the line.

    Examples
    --------
    >>> from hwdbm.forecast import read_samples
    >>> read_samples(['{"memory_total": 1024, "memory_remaining": -1, "time_elapsed": 10}'])
    Traceback (most recent call last):
    hwdbm.errors.SampleError: line 1: memory_remaining is a number of 0 or more, not -1
    """


class SnapshotError(HwdbmError, ValueError):
    """A snapshot, its manifest or its chain isn't what it must be; the text names the file."""


class StaleLeaseError(HwdbmError, OSError):
    """A lease's bitmap is gone: its slot was deleted, or its log was switched off, since."""


class StreamError(HwdbmError, ConnectionError):
    """A migration stream isn't what it must be: cut short, damaged, out of order, too large, of another version."""


class LayoutError(StreamError):
    """A VM's memory can't be as it is described, or isn't that of the other side of a migration."""


class PeerError(StreamError):
    """The other side of a migration gave up, and said why. No guest of this migration runs there, or ever will."""


class DigestError(StreamError):
    """The memory differs after the last pass. The source goes on; the destination never ran."""


class HandoverError(StreamError):
    """The destination was told to run, and nothing that came since says whether it does. The source stays paused.

    Two running copies of a guest ruin its disks, so neither side decides this alone. Find out whether the guest runs at
    the destination. If it doesn't, and its receiver has ended so that it never will, `resume` of the source that was
    migrated lets the guest go on there; all of its dirty pages were put back into the log. Don't migrate it before.
    """


class CancelledMigrationError(HwdbmError, InterruptedError):
    """The migration was cancelled from this side. The source goes on."""


class ConvergenceError(HwdbmError, OSError):
    """The guest dirties memory too fast for the downtime that is allowed. The source goes on."""


def printable(text: str) -> str:
    r"""Return a foreign text with control and unprintable characters escaped.

    Examples
    --------
    >>> printable("no\x1b[2J room")
    'no\\x1b[2J room'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def brief(text: str) -> str:
    r"""Return as much of a foreign text as an error shows, printable: 60 characters at most.

    Examples
    --------
    >>> brief("no\x1b[2J room"), brief("x" * 60) == "x" * 60, brief("x" * 61) == "x" * 57 + "..."
    ('no\\x1b[2J room', True, True)
    """
    text = printable(text[: _MOST_SHOWN + 1])
    return text if len(text) <= _MOST_SHOWN else f"{text[: _MOST_SHOWN - 3]}..."


def shown(value: object) -> str:
    """Return what an error shows of a value, whatever it is: of what has no repr, the name of its type.

    Examples
    --------
    >>> shown("it"), shown(1 << 64), shown([12345] * 100)
    ("'it'", 'a number beyond 64 bits', '[12345, 12345, 12345, 12345, 12345, 12345, 12345, 12345, ...')
    """
    if isinstance(value, int) and value.bit_length() > 64:
        return "a number beyond 64 bits"
    try:
        return brief(repr(value))
    except Exception:  # noqa: BLE001 - it may be anything
        return type(value).__name__


def some(values: Sequence[object]) -> str:
    """Return the first few of several for an error's text, and how many more there are.

    Examples
    --------
    >>> some(["a", "b"]), some([[0, 1], [2, 3]]), some(range(20)) == ", ".join(map(str, range(20)))
    ('a, b', '[0, 1], [2, 3]', True)
    >>> some(range(21)) == some(range(20)) + " and 1 more"
    True
    """
    first = ", ".join(brief(str(each)) for each in values[:_MOST_LISTED])
    more = len(values) - _MOST_LISTED
    return f"{first} and {more} more" if more > 0 else first


def in_words(error: BaseException) -> str:
    """Return what an error says to people: of the system's errors the file and the reason, without a number.

    Examples
    --------
    >>> in_words(OSError(28, "No space left on device", "guest.ram")), in_words(KeyError())
    ('guest.ram: No space left on device', 'KeyError')
    """
    if not isinstance(error, OSError):
        return str(error) or type(error).__name__
    what = error.strerror or (str(error) if error.errno is None and error.args else type(error).__name__)
    return what if error.filename is None else f"{error.filename}: {what}"


def has_no_thread(error: BaseException) -> bool:
    """Return whether an error says that the system has no room for another thread, or doesn't allow one."""
    return isinstance(error, RuntimeError) and "start new thread" in str(error)


class PlanError(HwdbmError, ValueError):
    """A plan of a fleet is wrong, or doesn't fit together; the text has the place in the file, and the value there."""


class TraceError(HwdbmError, ValueError):
    """A write trace isn't what it must be: it is cut short, damaged, out of order, no trace, or of another version."""


class UnreadError(HwdbmError, ValueError):
    """A litmus test asks for more than `hwdbm races --litmus` reads; the text says for what."""
