"""The errors that hwdbm raises: few, each a builtin's subclass, with the number that was wrong in the text."""

__all__ = ["BitmapError", "GfnError", "ImageError", "InvariantError", "StaleLeaseError"]


class BitmapError(ValueError):
    """A bitmap's size, alignment or tail is wrong.

    Examples
    --------
    >>> import hwdbm
    >>> hwdbm.DirtyBitmap.from_bytes(bytes(8), 65)
    Traceback (most recent call last):
    hwdbm.errors.BitmapError: a bitmap of 65 pages has 16 bytes, got 8
    """


class GfnError(ValueError):
    """A range of guest frames is outside of its memslot, misaligned, or not in the state it needs.

    Examples
    --------
    >>> import hwdbm
    >>> hwdbm.Stage2(64, base_gfn=0x100).unmap(0xFF, 1)
    Traceback (most recent call last):
    hwdbm.errors.GfnError: gfn 0xff..0xff is not inside the slot's 0x100..0x13f
    """


class ImageError(ValueError):
    """A memory image, its registers or its tables can't be what they claim to be."""


class InvariantError(AssertionError):
    """``verify()`` found a state that must never be; see the model page of the documentation."""


class StaleLeaseError(OSError):
    """A lease's bitmap is gone: its slot was deleted, or its log was switched off, since."""
