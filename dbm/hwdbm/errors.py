"""The errors that hwdbm raises: few, each a builtin's subclass too, with the number that was wrong in the text."""

__all__ = [
    "BitmapError",
    "GfnError",
    "HwdbmError",
    "ImageError",
    "InvariantError",
    "LayoutError",
    "StaleLeaseError",
    "StreamError",
]


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


class StaleLeaseError(HwdbmError, OSError):
    """A lease's bitmap is gone: its slot was deleted, or its log was switched off, since."""


class StreamError(HwdbmError, ConnectionError):
    """A migration stream isn't what it must be: cut short, damaged, out of order, too large, of another version."""


class LayoutError(StreamError):
    """A VM's memory can't be as it is described, or isn't that of the other side of a migration."""
