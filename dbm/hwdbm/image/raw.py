"""Raw images: a file that holds physical memory from some address on, byte for byte."""

import mmap
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hwdbm.check import integer
from hwdbm.errors import ImageError
from hwdbm.files import open_regular
from hwdbm.granule import Granule
from hwdbm.image.memory import NOWHERE, Array, gather

HEAD = 512
"""Bytes of a file that say what it is."""

_DUMP = "write the guest's RAM as it is, as QEMU's pmemsave does"
_PACKED = "unpack it first"
_DISK = "it is no memory"

# Where, which bytes, what such a file is, what to do. None of them is how a guest's RAM begins.
_MAGICS = (
    (0, b"\x7fELF", "an ELF file, as dump-guest-memory and kdump write it", _DUMP),
    (0, b"QEVM", "a migration stream of QEMU", _DUMP),
    (0, b"LibvirtQemudSave", "a VM saved by libvirt", _DUMP),
    (0, b"LibvirtQemudPart", "a VM saved by libvirt, and not completely", _DUMP),
    (0, b"KDUMP   ", "a dump of makedumpfile (kdump)", _DUMP),
    (0, b"DISKDUMP", "a dump of diskdump", _DUMP),
    (0, b"makedumpfile\0", "a flattened dump of makedumpfile", _DUMP),
    (0, b"EMiL", "a dump of LiME", "dump it with format=raw, or " + _DUMP),
    (0, b"AVML", "a dump of AVML", "avml-convert writes it as a raw one, or " + _DUMP),
    (0, b"PAGEDUMP", "a crash dump of Windows", _DUMP),
    (0, b"PAGEDU64", "a crash dump of Windows", _DUMP),
    (0, b"hibr", "a hibernation file of Windows", _DUMP),
    (0, b"HIBR", "a hibernation file of Windows", _DUMP),
    (0, b"\xd0\xbe\xd2\xbe", "a VM suspended by VMware", _DUMP),
    (0, b"\xd1\xba\xd1\xba", "a VM suspended by VMware", _DUMP),
    (0, b"\xd2\xbe\xd2\xbe", "a VM suspended by VMware", _DUMP),
    (0, b"\xd3\xbe\xd3\xbe", "a VM suspended by VMware", _DUMP),
    (0, b"\x7fVirtualBox SavedState", "a VM saved by VirtualBox", _DUMP),
    (0, b"LinuxGuestRecord", "a VM saved by Xen", _DUMP),
    (0, b"Xen saved domain", "a VM saved by Xen", _DUMP),
    (0, b"\x1f\x8b\x08", "compressed by gzip", _PACKED),
    (0, b"\xfd7zXZ\0", "compressed by xz", _PACKED),
    (0, b"\x28\xb5\x2f\xfd", "compressed by zstd", _PACKED),
    (0, b"BZh", "compressed by bzip2", _PACKED),
    (0, b"\x04\x22\x4d\x18", "compressed by lz4", _PACKED),
    (0, b"\x02\x21\x4c\x18", "compressed by lz4", _PACKED),
    (0, b"\x89LZO\0\r\n\x1a\n", "compressed by lzop", _PACKED),
    (0, b"\xff\x06\0\0sNaPpY", "compressed by snappy", _PACKED),
    (0, b"LZIP", "compressed by lzip", _PACKED),
    (0, b"7z\xbc\xaf\x27\x1c", "an archive of 7-Zip", _PACKED),
    (0, b"Rar!\x1a\x07", "an archive of RAR", _PACKED),
    (0, b"PK\x03\x04", "a zip archive", _PACKED),
    (0, b"PK\x05\x06", "an empty zip archive", _PACKED),
    (257, b"ustar", "a tar archive", _PACKED),
    (0, b"\x93NUMPY", "a NumPy array", "a capture is an archive of arrays, .npz"),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file", "a capture is an archive of arrays, .npz"),
    (0, b"QFI\xfb", "a qcow2 image of a disk", _DISK),
    (0, b"QED\0", "a QED image of a disk", _DISK),
    (0, b"WithoutFreeSpace", "a Parallels image of a disk", _DISK),
    (0, b"WithouFreSpacExt", "a Parallels image of a disk", _DISK),
    (0, b"hsqs", "a squashfs file system", _DISK),
    (0, b"KDMV", "a VMDK image of a disk", _DISK),
    (0, b"COWD", "a VMDK image of a disk", _DISK),
    (0, b"vhdxfile", "a VHDX image of a disk", _DISK),
    (0, b"conectix", "a VHD image of a disk", _DISK),
    (0x40, b"\x7f\x10\xda\xbe", "a VDI image of a disk", _DISK),
)


def check_raw(path: Path, head: bytes) -> None:
    """Raise `ImageError` if a file's first bytes say that it is no RAM as it lies in a machine.

    Parameters
    ----------
    path : Path
        The file, for the error's text.
    head : bytes
        Its first `HEAD` bytes, or all of them.
    """
    for at, magic, what, then in _MAGICS:
        if head.startswith(magic, at):
            raise ImageError(f"{path} is {what}, and no raw image of RAM: {then}")


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

    Attributes
    ----------
    base : int
        The physical address of the file's first byte.

    Raises
    ------
    OSError
        If the file can't be read or mapped.
    ImageError
        If the file is known to be something else, the base is misaligned, or not even one table fits in.
    """

    def __init__(self, path: Path, ram_base: int, granule: Granule) -> None:
        ram_base = integer(ram_base, "the RAM's base", high=(1 << 64) - 1, error=ImageError)
        if ram_base % 4096:
            raise ImageError(f"the RAM's base {ram_base:#x} isn't a multiple of 4 KiB")
        with open_regular(path) as file:
            check_raw(path, file.read(HEAD))
            size = file.seek(0, 2)
            skipped = -ram_base % granule.page_size
            count = (size - skipped) // granule.page_size
            if count < 1:
                raise ImageError(f"{path} has {size} bytes: not one {granule} table fits in")
            if ram_base + size > 1 << 64:
                raise ImageError(f"{path} has {size} bytes, which reach beyond 2^64 from {ram_base:#x} on")
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        words = np.frombuffer(mapping, dtype="<u8", count=count * granule.entries, offset=skipped)
        self._rows = words.reshape(count, granule.entries)
        self._first, self._granule = ram_base + skipped, granule
        self._path, self.base, self._size = path, ram_base, size

    @property
    def capacity(self) -> int:
        """Tables that fit into the image."""
        return len(self._rows)

    @property
    def extent(self) -> str:
        """Which memory it is."""
        return f"the image's {self.base:#018x}..{self.base + self._size - 1:#018x}"

    def find(self, pa: Array) -> NDArray[np.intp]:
        """Return the number of each table, -1 where it isn't wholly inside."""
        # What is below the base wraps around to a huge number, and so is outside too.
        row = (pa - np.uint64(self._first)) >> np.uint64(self._granule.page_shift)
        return np.where(row < len(self._rows), row.astype(np.intp), NOWHERE)

    def read(self, where: NDArray[np.intp], out: Array) -> Array:
        """Return the tables `where`."""
        return gather(self._rows, where, out)
