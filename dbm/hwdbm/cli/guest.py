"""The modelled machine that the commands of a migration start, and its options."""

from dataclasses import dataclass
from enum import StrEnum
from errno import ENOENT
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray

from hwdbm.bitmap import DirtyBitmap
from hwdbm.errors import BitmapError
from hwdbm.granule import Granule
from hwdbm.machine import Machine, Replay, parse
from hwdbm.memslot import Memslot
from hwdbm.migration import LayoutError
from hwdbm.vm import MemoryMap

__all__ = [
    "GPA",
    "Endpoint",
    "Insecure",
    "Mode",
    "Thp",
    "TlsFolder",
    "build",
    "endpoint",
    "fill",
    "filled",
    "layout_of",
    "machine_for",
    "workload_for",
]

GPA = 0x4000_0000
"""Where the guest's memory begins, as on QEMU's machine ``virt``."""

_WORKLOAD, _RATE = "hot,share=0.02", 200_000
_STEP = 1 << 26  # bytes filled or touched together
_BLOCK = 1 << 21


class Mode(StrEnum):
    """How the log learns of writes."""

    HW_DBM = "hw-dbm"
    WRITE_PROTECT = "write-protect"


Thp = Annotated[
    bool,
    typer.Option("--thp/--no-thp", help="Map the guest by 2M blocks where they fit, or by pages of 4K alone."),
]
TlsFolder = Annotated[
    Path | None,
    typer.Option(
        "--tls-dir",
        metavar="DIR",
        help="Certificates, laid out as QEMU's tls-creds-x509: ca-cert.pem, client-cert.pem, client-key.pem, "
        "server-cert.pem, server-key.pem. Both sides show theirs.",
    ),
]
Insecure = Annotated[bool, typer.Option("--insecure", help="TCP without TLS, on a loopback address only.")]


def build(memory: int, *, mode: Mode, thp: bool, seed: int, image: Path | None, percent: int) -> Machine:
    """Return a paused machine with memory that is filled, and mapped as far as it is."""
    machine = Machine(hw_dbm=mode is Mode.HW_DBM, thp=thp, seed=seed)
    try:
        slot = machine.add_memslot(memory, GPA, memory_image=image)
        content = memory if image else filled(memory, percent)
        if image is None:
            fill(machine.memory(slot.id), content, seed)
        _boot(machine, slot.id, content)
    except BaseException:
        machine.close()
        raise
    return machine


def filled(memory: int, percent: int) -> int:
    """Return how many bytes of memory hold something: a whole number of blocks."""
    return min(memory * percent // 100 // _BLOCK * _BLOCK, memory)


def fill(memory: NDArray[np.uint8], content: int, seed: int) -> None:
    """Fill the first `content` bytes with random data."""
    rng, words = np.random.default_rng(seed), memory.view(np.uint64)
    for start in range(0, content // 8, _STEP // 8):
        part = words[start : min(start + _STEP // 8, content // 8)]
        part[:] = rng.integers(0, 1 << 64, part.size, dtype=np.uint64)


def _boot(machine: Machine, slot: int, content: int) -> None:
    """Have a vCPU write each page that holds something, as it is: its leaf is there then, as in a guest that runs."""
    page = machine.page_size
    words = machine.memory(slot).view(np.uint64)
    for start in range(0, content // page * page, _STEP):
        offsets = np.arange(start, min(start + _STEP, content // page * page), page)
        machine.vcpus[0].store(offsets + GPA, words[offsets // 8])


def layout_of(memory: int) -> MemoryMap:
    """Return the layout of what `build` makes: one slot.

    Raises
    ------
    ValueError
        If it isn't whole pages.
    """
    page = Granule.K4.page_size
    if memory % page or not memory:
        raise ValueError(f"memory is whole pages of {page} bytes, not {memory} bytes")
    return MemoryMap(page, (Memslot(0, 0, GPA // page, memory // page, 0),))


def machine_for(layout: MemoryMap, *, mode: Mode, thp: bool, vcpus: int = 1) -> Machine:
    """Return a paused machine with the memory that a source describes.

    Raises
    ------
    LayoutError
        If no machine can have it.
    """
    granules = {granule.page_size: granule for granule in Granule}
    machine = Machine(granule=granules[layout.page_size], hw_dbm=mode is Mode.HW_DBM, thp=thp, vcpus=vcpus)
    try:
        for slot in layout.slots:
            machine.add_memslot(
                slot.npages * layout.page_size, slot.base_gfn * layout.page_size, slot=slot.id, readonly=slot.readonly
            )
    except OSError as error:
        machine.close()
        raise LayoutError(f"no machine has this memory: {error.strerror}") from error
    except BaseException:
        machine.close()
        raise
    return machine


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where somebody listens on TCP.

    Parameters
    ----------
    host : str
        A name or an address.
    port : int
        0 to 65535.
    """

    host: str
    port: int


def endpoint(text: str) -> Endpoint:
    """Return the host and the port of ``HOST:PORT``; an IPv6 address stands in brackets.

    Examples
    --------
    >>> endpoint("[::1]:4444")
    Endpoint(host='::1', port=4444)
    """
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""
    if not colon or not host or not port.isdecimal() or int(port) > 0xFFFF:
        raise ValueError(f"{text!r} is not HOST:PORT, as in localhost:4444 or [::1]:4444")
    return Endpoint(host, int(port))


def workload_for(
    machine: Machine,
    text: str | None,
    *,
    seed: int,
    rate: float | None,
    replay: Path | None = None,
    interval: float = 0.1,
) -> None:
    """Give the machine's vCPU the workload that a text names, or a recorded one, or the default one."""
    if replay is not None:
        machine.run(Replay(bitmaps=_recorded(replay, machine.slots[0].npages), interval=interval))
        return
    text = _WORKLOAD if text is None else text
    if rate is None and "rate=" not in text and not text.startswith("idle"):
        rate = _RATE
    machine.run(parse(text if rate is None else f"{text},rate={rate}", seed))


def _recorded(folder: Path, npages: int) -> list[DirtyBitmap]:
    """Return the bitmaps in a folder, in the order of their names.

    Raises
    ------
    OSError
        If there are none, or one can't be read.
    ValueError
        If one isn't of so many pages; the text names it.
    """
    bitmaps = []
    for file in sorted(folder.iterdir()):
        try:
            bitmaps.append(DirtyBitmap.from_bytes(file.read_bytes(), npages))
        except BitmapError as error:
            raise ValueError(f"{file}: {error}") from error
    if not bitmaps:
        raise OSError(ENOENT, "there are no bitmaps", str(folder))
    return bitmaps
