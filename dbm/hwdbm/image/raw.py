"""Raw images: a file that holds physical memory from some address on, byte for byte."""

import mmap
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hwdbm.check import integer
from hwdbm.errors import ImageError
from hwdbm.granule import Granule
from hwdbm.image.memory import Array, gather

__all__ = ["RawTables"]


class RawTables:
    """The tables of a raw image, read straight from a mapping of the file.

    Parameters
    ----------
    path : Path
        The file. A file that is written meanwhile is read as it happens to be; one must not be
        truncated meanwhile.
    ram_base : int
        The physical address of the file's first byte: a multiple of 4 KiB.
    granule : Granule
        The size of a table.

    Raises
    ------
    OSError
        If the file can't be read or mapped.
    ImageError
        If the base is misaligned, or not even one table fits in.
    """

    def __init__(self, path: Path, ram_base: int, granule: Granule) -> None:
        ram_base = integer(ram_base, "the RAM's base", high=(1 << 64) - 1, error=ImageError)
        if ram_base % 4096:
            raise ImageError(f"the RAM's base {ram_base:#x} isn't a multiple of 4 KiB")
        with path.open("rb") as file:
            size = file.seek(0, 2)
            skipped = -ram_base % granule.page_size
            count = max(0, size - skipped) // granule.page_size
            if not count:
                raise ImageError(f"{path} has {size} bytes: not one {granule} table fits in")
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        words = np.frombuffer(mapping, dtype="<u8", count=count * granule.entries, offset=skipped)
        self._rows = words.reshape(count, granule.entries)
        self._first, self._granule = ram_base + skipped, granule
        self._path, self._base, self._size = path, ram_base, size

    @property
    def capacity(self) -> int:
        """Tables that fit into the image."""
        return len(self._rows)

    @property
    def extent(self) -> str:
        """Which memory it is."""
        return f"the image's {self._base:#018x}..{self._base + self._size - 1:#018x}"

    def find(self, pa: Array) -> NDArray[np.intp]:
        """Return the number of each table, -1 where it isn't wholly inside."""
        # What is below the base wraps around to a huge number, and so is outside too.
        row = (pa - np.uint64(self._first)) >> np.uint64(self._granule.page_shift)
        return np.where(row < len(self._rows), row.astype(np.intp), -1)

    def read(self, where: NDArray[np.intp], out: Array) -> Array:
        """Return the tables `where`."""
        return gather(self._rows, where, out)
