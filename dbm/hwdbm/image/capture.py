"""Captures: NumPy archives (``.npz``) of a machine's stage-2 tables, its registers and its memslots.

============================================  ==================================================================
``table_pa`` (n,), ``table_data`` (n, m)      tables of one granule each, and their physical addresses
``table_level`` (n,)                          the level of each, compared with where a walk finds it; optional
``regs`` (5,)                                 VTTBR_EL2, VTCR_EL2, HCR_EL2, ID_AA64MMFR0_EL1, ID_AA64MMFR1_EL1
``memslots`` (k, 3)                           id, base gfn, pages: in 4 KiB whatever the granule
``<name>_slot<id>``                           bitmaps, a bit for ``page_size`` bytes, or for 4 KiB without that
============================================  ==================================================================

The bitmaps are the truth, as far as the machine that was captured knew it: ``expected_dirty`` and, widened to whole
contiguous runs, ``expected_dirty_cont``; ``nodbm_writable`` and ``s2w`` for writable leaves.
"""

import math
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EINVAL
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwdbm.bitmap import DirtyBitmap, word_count
from hwdbm.errors import BitmapError, ImageError
from hwdbm.files import open_regular
from hwdbm.granule import Granule
from hwdbm.image.memory import NOWHERE, Array, gather
from hwdbm.image.slots import SLOT_UNIT, Slot
from hwdbm.image.walk import Batch

_ZIP = (b"PK\x03\x04", b"PK\x05\x06")  # an .npz is a zip archive; the second is of an empty one
_MOST_SLOTS = 32767  # as many as KVM has
_HEADER = 1 << 16  # bytes that an array's header has at most


def is_capture(path: Path) -> bool:
    """Return whether the file looks like a capture, by its first bytes or by its name.

    Raises
    ------
    OSError
        If it can't be read.
    """
    with open_regular(path) as file:
        return file.read(4) in _ZIP or path.suffix.lower() == ".npz"


class Capture:
    """The arrays of a capture, each read and checked when it is asked for, and no other.

    Parameters
    ----------
    path : Path
        The ``.npz`` file.

    Raises
    ------
    OSError
        If the file can't be read.
    ImageError
        If it isn't an archive of arrays, or is truncated.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_regular(path) as file, self._undamaged(), zipfile.ZipFile(file) as archive:
            # One that is no .npy is still found by its name, so that it can be said what is wrong with it.
            self._members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def shape(self, name: str, ndim: int) -> tuple[int, ...]:
        """Return the shape of an array of integers, without reading its elements.

        Raises
        ------
        ImageError
            If there is none of that name, or its type or number of dimensions is another.
        """
        return self._read(name, ndim)[0]

    def integers(self, name: str, ndim: int, most: int) -> Array:
        """Return an array of integers as uint64.

        Parameters
        ----------
        name : str
            Its name.
        ndim : int
            Its number of dimensions.
        most : int
            As many elements may be unpacked.

        Raises
        ------
        ImageError
            If there is none of that name, its type or number of dimensions is another, it has more elements, or
            something in it is negative.
        """
        array = self._read(name, ndim, most)[1]
        if np.issubdtype(array.dtype, np.signedinteger) and array.size and int(array.min()) < 0:
            raise ImageError(f"{self.path}: {name!r} has negative elements")
        return np.asarray(array, dtype=np.uint64, order="C")

    def _read(self, name: str, ndim: int, most: int | None = None) -> tuple[tuple[int, ...], NDArray[np.integer[Any]]]:
        """Return an array's shape, and the array; an empty one without `most`."""
        member = self._members.get(name)
        if member is None:
            raise ImageError(f"{self.path} has no array {name!r}")
        with (
            open_regular(self.path) as file,
            self._undamaged(name),
            zipfile.ZipFile(file) as archive,
            archive.open(member) as stream,
        ):
            version = np.lib.format.read_magic(stream)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(stream, max_header_size=_HEADER)
            if len(shape) != ndim or not np.issubdtype(dtype, np.integer):
                raise ImageError(
                    f"{self.path}: {name!r} is a {ndim}-dimensional array of integers, not {dtype} of shape {shape}"
                )
            # Before anything is unpacked: a few bytes of an archive may stand for gigabytes.
            size = math.prod(shape)
            if most is None:
                return shape, np.empty(0, dtype)
            if size > most:
                raise ImageError(f"{self.path}: {name!r} has {size} elements, and may have {most} at most")
            raw = stream.read(size * dtype.itemsize)
            if len(raw) != size * dtype.itemsize or stream.read(1):
                raise ImageError(f"{self.path}: {name!r} is damaged: it isn't of the size that its header says")
        array = np.frombuffer(raw, dtype).reshape(shape, order="F" if fortran else "C")
        return shape, array

    @contextmanager
    def _undamaged(self, name: str = "") -> Iterator[None]:
        """Report an archive that can't be read as damaged, in place of the libraries' errors."""
        where = f"{self.path}: {name!r}" if name else str(self.path)
        try:
            yield
        except ImageError:
            raise
        except zipfile.BadZipFile as error:
            raise ImageError(f"{where} is not a capture, or is damaged: no zip archive, or not whole") from error
        except Exception as error:  # zlib, zipfile and numpy have a dozen kinds between them
            if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno not in {None, EINVAL}):
                raise
            raise ImageError(f"{where} is not a capture, or is damaged") from error

    def registers(self) -> list[int]:
        """Return VTTBR_EL2, VTCR_EL2, HCR_EL2, ID_AA64MMFR0_EL1 and ID_AA64MMFR1_EL1."""
        (count,) = self.shape("regs", 1)
        if count != 5:
            raise ImageError(f"{self.path}: 'regs' has 5 registers, not {count}")
        values: list[int] = self.integers("regs", 1, count).tolist()
        return values

    def slots(self) -> list[Slot]:
        """Return the memslots, unchecked against each other."""
        _, columns = self.shape("memslots", 2)
        if columns != 3:
            raise ImageError(f"{self.path}: 'memslots' has rows (id, base gfn, pages), not {columns} columns")
        rows = self.integers("memslots", 2, 3 * _MOST_SLOTS)
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
            unit = int(self.integers("page_size", 0, 1))
        if unit < SLOT_UNIT or unit & unit - 1 or slot.size % unit:
            raise ImageError(f"{self.path}: {unit} bytes can't be the page size of slot {slot.id}")
        npages = slot.size // unit
        size = 8 * word_count(npages)
        (found,) = self.shape(key, 1)
        if found != size:
            raise ImageError(f"{self.path}: {key!r} has {found} bytes, and a bitmap of {npages} pages has {size}")
        raw = self.integers(key, 1, size)
        if raw.size and int(raw.max()) > 0xFF:
            raise ImageError(f"{self.path}: {key!r} is made of bytes, and has the element {int(raw.max()):#x}")
        try:
            return DirtyBitmap.from_bytes(raw.astype(np.uint8).tobytes(), npages).refine(unit // SLOT_UNIT)
        except BitmapError as error:
            raise ImageError(f"{self.path}: {key!r}: {error}") from error


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
        (count,), shape = capture.shape("table_pa", 1), capture.shape("table_data", 2)
        if shape != (count, granule.entries):
            raise ImageError(
                f"{capture.path}: 'table_data' of {count} tables with a {granule} granule has "
                f"the shape {(count, granule.entries)}, not {shape}"
            )
        physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        most = physical // 2 // granule.page_size
        if count > most:
            raise ImageError(f"{capture.path}: {count} tables are more than half of this machine's memory")
        pa, rows = capture.integers("table_pa", 1, count), capture.integers("table_data", 2, count * granule.entries)
        unaligned = pa % np.uint64(granule.page_size) != 0
        if unaligned.any():
            raise ImageError(
                f"{capture.path}: table {int(pa[np.argmax(unaligned)]):#018x} isn't aligned to its {granule} granule"
            )
        self._size = granule.page_size
        order = np.argsort(pa, kind="stable")
        self._pa, self._row, self._rows = pa[order], order, rows
        twice = self._pa[1:] == self._pa[:-1]
        if twice.any():
            raise ImageError(f"{capture.path}: table {int(self._pa[np.argmax(twice)]):#018x} is there twice")
        self._capture, self._levels = capture, None
        if "table_level" in capture:
            if capture.shape("table_level", 1) != (count,):
                raise ImageError(f"{capture.path}: 'table_level' has one level for each of the {count} tables")
            self._levels = capture.integers("table_level", 1, count)

    def check_level(self, batch: Batch) -> None:
        """Compare the level at which a walk found tables with what the capture says; a visitor of `Image.read`."""
        if self._levels is None:
            return
        levels = self._levels[self.find(batch.pa & ~np.uint64(self._size - 1))]
        wrong = levels != np.uint64(batch.level & 0xFF)
        if wrong.any():
            at = int(np.argmax(wrong))
            raise ImageError(
                f"{self._capture.path}: table {int(batch.pa[at]):#018x} is found at level {batch.level}, and "
                f"'table_level' says {int(levels[at])}"
            )

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
            return np.full(pa.size, NOWHERE, dtype=np.intp)
        nearest = np.minimum(np.searchsorted(self._pa, pa), self._pa.size - 1)
        return np.where(self._pa[nearest] == pa, self._row[nearest], NOWHERE)

    def read(self, where: NDArray[np.intp], out: Array) -> Array:
        """Return the rows `where`."""
        return gather(self._rows, where, out)
