"""Memory images: real stage-2 tables, from captures and from raw images of RAM.

`open_image` opens a file; an `Image` fills a `hwdbm.Stage2` for each memslot, or says at once which
pages are dirty. Input that can't be is an `hwdbm.errors.ImageError` that names the entry: never a
guess, and never a walk without an end.
"""

from hwdbm.image.live import Live, NoTablesError, open_live
from hwdbm.image.reader import Image, Policy, open_image
from hwdbm.image.registers import Registers
from hwdbm.image.slots import Slot

__all__ = ["Image", "Live", "NoTablesError", "Policy", "Registers", "Slot", "open_image", "open_live"]
