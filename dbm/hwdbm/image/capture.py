"""Captures: NumPy archives (``.npz``) of a machine's stage-2 tables, its registers and its memslots.

============================================  ==================================================================
``table_pa`` (n,), ``table_data`` (n, m)      tables of one granule each, and their physical addresses
``regs`` (5,)                                 VTTBR_EL2, VTCR_EL2, HCR_EL2, ID_AA64MMFR0_EL1, ID_AA64MMFR1_EL1
``memslots`` (k, 3)                           id, base gfn, pages: in 4 KiB whatever the granule
``<name>_slot<id>``                           bitmaps, a bit for ``page_size`` bytes, or for 4 KiB without that
============================================  ==================================================================

The bitmaps are the truth, as far as the machine that was captured knew it: ``expected_dirty`` and, widened to whole
contiguous runs, ``expected_dirty_cont``; ``nodbm_writable`` and ``s2w`` for writable leaves.
"""

from pathlib import Path
from textwrap import shorten

import numpy as np
from numpy.typing import NDArray

from hwdbm.bitmap import DirtyBitmap, word_count
from hwdbm.errors import ImageError
from hwdbm.granule import Granule
from hwdbm.image.memory import Array, gather
from hwdbm.image.slots import SLOT_UNIT, Slot

__all__ = ["Capture", "CapturedTables", "is_capture"]

_ZIP = b"PK"  # an .npz is a zip archive


def is_capture(path: Path) -> bool:
    """Return whether the file looks like a capture, by its first bytes or by its name.

    Raises
    ------
    OSError
        If it can't be read.
    """
    with path.open("rb") as file:
        return file.read(2) == _ZIP or path.suffix.lower() == ".npz"


class Capture:
    """The arrays of a capture, each checked when it is asked for.

    Parameters
    ----------
    path : Path
        The ``.npz`` file. It is read whole.

    Raises
    ------
    OSError
        If the file can't be read.
    ImageError
        If it isn't an archive of arrays, or is truncated or corrupt.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._arrays: dict[str, NDArray[np.generic]] = {}
        with path.open("rb") as file:
            try:
                with np.load(file, allow_pickle=False) as archive:
                    for name in archive.files:
                        self._arrays[name] = archive[name]
            except Exception as error:  # zlib, zipfile and numpy have a dozen kinds between them
                what = shorten(str(error) or type(error).__name__, 160, placeholder="...")
                raise ImageError(f"{path} is not a capture, or is damaged: {what}") from error

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def integers(self, name: str, ndim: int) -> Array:
        """Return an array of integers as uint64.

        Raises
        ------
        ImageError
            If there is none of that name, or its type or number of dimensions is another, or
            something in it is negative.
        """
        array = self._arrays.get(name)
        if array is None:
            raise ImageError(f"{self.path} has no array {name!r}")
        if array.ndim != ndim or not np.issubdtype(array.dtype, np.integer):
            raise ImageError(
                f"{self.path}: {name!r} is a {ndim}-dimensional array of integers, not "
                f"{array.dtype} of shape {array.shape}"
            )
        if np.issubdtype(array.dtype, np.signedinteger) and array.size and (array < 0).any():  # type: ignore[operator]
            raise ImageError(f"{self.path}: {name!r} has negative elements")
        return np.asarray(array, dtype=np.uint64, order="C")

    def registers(self) -> list[int]:
        """Return VTTBR_EL2, VTCR_EL2, HCR_EL2, ID_AA64MMFR0_EL1 and ID_AA64MMFR1_EL1."""
        values: list[int] = self.integers("regs", 1).tolist()
        if len(values) != 5:
            raise ImageError(f"{self.path}: 'regs' has 5 registers, not {len(values)}")
        return values

    def slots(self) -> list[Slot]:
        """Return the memslots, unchecked against each other."""
        rows = self.integers("memslots", 2)
        if rows.shape[1] != 3:
            raise ImageError(f"{self.path}: 'memslots' has rows (id, base gfn, pages), not {rows.shape[1]} columns")
        return [Slot(number, gfn * SLOT_UNIT, pages * SLOT_UNIT) for number, gfn, pages in rows.tolist()]

    def truth(self, name: str, slot: Slot) -> DirtyBitmap | None:
        """Return the bitmap ``<name>_slot<id>``, a bit for each 4 KiB; None if there is none.

        Raises
        ------
        ImageError
            If its size isn't the slot's.
        """
        key = f"{name}_slot{slot.id}"
        if key not in self:
            return None
        unit = SLOT_UNIT
        if "page_size" in self:
            unit = int(self.integers("page_size", 0))
        raw = self.integers(key, 1).astype(np.uint8)
        if unit < SLOT_UNIT or unit & unit - 1 or slot.size % unit:
            raise ImageError(f"{self.path}: {unit} bytes can't be the page size of slot {slot.id}")
        npages = slot.size // unit
        if raw.size != 8 * word_count(npages):
            raise ImageError(
                f"{self.path}: {key!r} has {raw.size} bytes, and a bitmap of {npages} pages has "
                f"{8 * word_count(npages)}"
            )
        return DirtyBitmap.from_bytes(raw.tobytes(), npages).refine(unit // SLOT_UNIT)


class CapturedTables:
    """The tables of a capture, as memory.

    Parameters
    ----------
    capture : Capture
        Where they are: ``table_pa`` and ``table_data``.
    granule : Granule
        The size of a table.

    Raises
    ------
    ImageError
        If the arrays are missing, of another shape, or name a table twice.
    """

    def __init__(self, capture: Capture, granule: Granule) -> None:
        pa, rows = capture.integers("table_pa", 1), capture.integers("table_data", 2)
        if rows.shape != (pa.size, granule.entries):
            raise ImageError(
                f"{capture.path}: 'table_data' of {pa.size} tables with a {granule} granule has "
                f"the shape {(pa.size, granule.entries)}, not {rows.shape}"
            )
        unaligned = pa % np.uint64(granule.page_size) != 0
        if unaligned.any():
            raise ImageError(
                f"{capture.path}: table {int(pa[np.argmax(unaligned)]):#018x} isn't aligned to its {granule} granule"
            )
        order = np.argsort(pa, kind="stable")
        self._pa, self._row, self._rows = pa[order], order, rows
        twice = self._pa[1:] == self._pa[:-1]
        if twice.any():
            raise ImageError(f"{capture.path}: table {int(self._pa[np.argmax(twice)]):#018x} is there twice")

    @property
    def capacity(self) -> int:
        """Tables in the capture."""
        return self._pa.size

    @property
    def extent(self) -> str:
        """Which memory it is."""
        return f"the capture's {self._pa.size} tables"

    def find(self, pa: Array) -> NDArray[np.intp]:
        """Return the row of each table, -1 where there is none."""
        if not self._pa.size:
            return np.full(pa.size, -1, dtype=np.intp)
        nearest = np.minimum(np.searchsorted(self._pa, pa), self._pa.size - 1)
        return np.where(self._pa[nearest] == pa, self._row[nearest], -1)

    def read(self, where: NDArray[np.intp], out: Array) -> Array:
        """Return the rows `where`."""
        return gather(self._rows, where, out)
