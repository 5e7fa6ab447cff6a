"""The VMs that the commands of a migration start, modelled or real, and the options that both commands have."""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from errno import ENOENT
from pathlib import Path
from typing import Annotated, TypedDict

import numpy as np
import typer
from numpy.typing import NDArray

from hwdbm.arm import ArmUnavailableError, ArmVm
from hwdbm.arm.vm import memory_slots
from hwdbm.bitmap import DirtyBitmap, word_count
from hwdbm.cli import parse as sizes
from hwdbm.cli.options import parser, words
from hwdbm.errors import BitmapError, KernelsError
from hwdbm.files import open_regular
from hwdbm.granule import Granule
from hwdbm.kvm import KvmUnavailableError, KvmVm
from hwdbm.machine import Machine, Replay, Workload, parse
from hwdbm.memslot import KVM_MEM_MAX_NR_PAGES, Memslot
from hwdbm.migration import LayoutError, transport
from hwdbm.migration.report import mebibytes
from hwdbm.migration.transport import TlsDir
from hwdbm.vm import MemoryMap
from hwdbm.vm.memory import load

_GPA = 0x4000_0000
"""Where the guest's memory begins, as on QEMU's machine ``virt``."""

PAGE = Granule.K4.page_size
"""Bytes of a page of what the commands start."""
MEMORY = 256 << 20
"""Bytes of its memory, where no others are asked for."""
FILLED = 75
"""Percent of that which isn't zero, likewise."""

WORKLOADS = (
    *("sequential", "uniform", "hot", "zipf", "bursty", "idle"),
    *("counting", "random"),
    *("window", "atomics", "pairs", "zero", "stage1", "mixed"),
)
"""What guests do meanwhile: those of the model, what others KVM has, and what others an Arm machine has."""

_WORKLOAD, _RATE = "hot,share=0.02", 200_000
_KVM_RATE = 50_000  # pages a second: what a guest without hardware virtualisation below it can keep up
_ARM_RATE = 20_000  # stores a second: what an emulated CPU can make beside a migration on a small machine
_RING = 4096  # entries of each vCPU's ring
_STEP = 1 << 26  # bytes filled or touched together
_BLOCK = 1 << 21
_SWITCH = 2e-4  # seconds: vCPUs, and who takes their log, are threads of one interpreter, and each waits for the other


class Mode(StrEnum):
    """How the log learns of writes."""

    HW_DBM = "hw-dbm"
    WRITE_PROTECT = "write-protect"


class Vm(StrEnum):
    """The kind of VM."""

    MACHINE = "machine"
    KVM = "kvm"
    ARM = "arm"


class KvmLog(StrEnum):
    """How the kernel's dirty log is collected."""

    BITMAP = "bitmap"
    CLEAR = "clear"
    INITIALLY_SET = "initially-set"
    RING = "ring"


class OnLimit(StrEnum):
    """The action if the rest doesn't fit into the downtime."""

    ABORT = "abort"
    WAIT = "wait"
    PAUSE = "pause"


# None where an option wasn't given: one that has no effect on the VM is refused.
Thp = Annotated[
    bool | None,
    typer.Option(
        "--thp/--no-thp",
        help="Map a modelled guest by 2M blocks where they fit, or by pages of 4K alone (the default).",
    ),
]


def memory_size(text: str) -> int:
    """Return a guest's memory in bytes: pages of 4 KiB, one or more, and no more than a memslot has.

    Examples
    --------
    >>> memory_size("1G")
    1073741824
    """
    size = sizes.size(text)
    if size % PAGE or not size:
        raise ValueError(f"memory is whole pages of {PAGE} bytes, one or more, not {size} bytes")
    if size // PAGE > KVM_MEM_MAX_NR_PAGES:
        raise ValueError(
            f"a memslot has {KVM_MEM_MAX_NR_PAGES} pages of {PAGE} bytes at most, not the {text} asked for"
        )
    return size


ModeOption = Annotated[
    Mode | None,
    typer.Option(
        "--mode",
        parser=parser(sizes.choice(Mode)),
        metavar="hw-dbm|write-protect",
        help="How a modelled machine's log learns of writes; hw-dbm by default.",
    ),
]
KvmLogOption = Annotated[
    KvmLog | None,
    typer.Option(
        "--kvm-log",
        parser=parser(sizes.choice(KvmLog)),
        autocompletion=words(KvmLog),
        metavar="KIND",
        help="How the log of a real VM is collected: by GET (bitmap, the default), by GET and CLEAR (clear), the same "
        "with all pages dirty at first (initially-set), or by rings (ring).",
    ),
]
MemoryOption = Annotated[
    int | None,
    typer.Option("--memory", parser=parser(memory_size), metavar="SIZE", help="The guest's memory; 256M by default."),
]
WorkloadOption = Annotated[
    str | None,
    typer.Option(
        "--workload",
        metavar="NAME[,OPTION=NUMBER]...",
        autocompletion=words(WORKLOADS),
        help="What the guest does; as for 'hwdbm migrate'.",
    ),
]
RateOption = Annotated[
    float | None,
    typer.Option(
        "--rate", parser=parser(sizes.number), metavar="NUMBER", help="Stores a second; as for 'hwdbm migrate'."
    ),
]
SeedOption = Annotated[
    int,
    typer.Option(
        "--seed",
        parser=parser(sizes.whole(0, (1 << 64) - 1)),
        metavar="NUMBER",
        help="Seed of the memory and the workload.",
    ),
]
TlsFolder = Annotated[
    Path | None,
    typer.Option(
        "--tls-dir",
        parser=parser(sizes.path),
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
        slot = machine.add_memslot(memory, _GPA, memory_image=image)
        content = memory if image else _filled(memory, percent)
        if image is None:
            fill(machine.memory(slot.id), content, seed)
        _boot(machine, slot.id, content)
    except BaseException:
        machine.close()
        raise
    return machine


def _filled(memory: int, percent: int) -> int:
    """Return how many bytes of memory hold something: a whole number of blocks."""
    return min(memory * percent // 100 // _BLOCK * _BLOCK, memory)


def fill(memory: NDArray[np.uint8], content: int, seed: int) -> None:
    """Fill the first `content` bytes with random data."""
    rng, words = np.random.default_rng(seed), memory[:content].view(np.uint64)
    for start in range(0, words.size, _STEP // 8):
        part = words[start : start + _STEP // 8]
        part[:] = rng.integers(0, 1 << 64, part.size, dtype=np.uint64)


def _boot(machine: Machine, slot: int, content: int) -> None:
    """Have a vCPU write each page that holds something, as it is: its leaf is there then, as in a guest that runs."""
    page = machine.page_size
    words = machine.memory(slot).view(np.uint64)
    for start in range(0, content // page * page, _STEP):
        offsets = np.arange(start, min(start + _STEP, content // page * page), page)
        machine.vcpus[0].store(offsets + _GPA, words[offsets // 8])


def physical() -> int:
    """Return the bytes of memory that this machine has."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_room(memory: int) -> None:
    """Raise `MemoryError` if this machine can't have a guest of so much memory."""
    if memory > physical():
        raise MemoryError(f"a guest of {mebibytes(memory)} on a machine that has {mebibytes(physical())}")


def layout_of(memory: int) -> MemoryMap:
    """Return the layout of what `build` makes: one slot."""
    return MemoryMap(PAGE, (Memslot(0, 0, _GPA // PAGE, memory // PAGE, 0),))


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
    """The address that a receiver listens on: TCP, or a Unix socket.

    Parameters
    ----------
    host : str
        A name or an address.
    port : int
        0 to 65535.
    path : Path, optional
        The Unix socket.
    """

    host: str = ""
    port: int = 0
    path: Path | None = None


def endpoint(text: str) -> Endpoint:
    """Return the host and the port of ``HOST:PORT``; an IPv6 address stands in brackets.

    Examples
    --------
    >>> endpoint("[::1]:4444")
    Endpoint(host='::1', port=4444, path=None)
    """
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""
    if not colon or not host or not port.isdecimal() or int(port) > 0xFFFF:
        raise ValueError(f"{text!r} is not HOST:PORT, as in localhost:4444 or [::1]:4444")
    return Endpoint(host, int(port))


def place(text: str) -> Endpoint:
    """Return what ``HOST:PORT`` or ``unix:PATH`` names.

    Examples
    --------
    >>> place("localhost:4444")
    Endpoint(host='localhost', port=4444, path=None)
    """
    if not text.startswith("unix:"):
        try:
            return endpoint(text)
        except ValueError as error:
            raise ValueError(f"{error}, nor unix:PATH") from None
    if text == "unix:":
        raise ValueError("'unix:' has no path, as in unix:/run/guest")
    return Endpoint(path=socket_path(text[5:]))


def socket_path(text: str) -> Path:
    """Return the path of a Unix socket."""
    path = sizes.path(text)
    try:
        transport.check_socket(path)
    except OSError as error:
        raise ValueError(error.strerror) from error
    return path


def tls_of(where: Endpoint | None, folder: Path | None, *, insecure: bool) -> TlsDir | None:
    """Return the certificates that two options name; options that make no sense are wrong usage."""
    if where is None or where.path is None:
        if folder is not None and insecure:
            raise typer.BadParameter("--insecure is for a link without TLS, and --tls-dir for one with it")
        if where is not None and folder is None and not insecure:
            raise typer.BadParameter("TCP needs certificates (--tls-dir), or --insecure on a loopback address")
        return None if folder is None else TlsDir(folder)
    refuse("over a Unix socket", {"--tls-dir": folder is not None, "--insecure": insecure})
    return None


@contextmanager
def usage() -> Iterator[None]:
    """Have what the library calls a wrong value be wrong usage: it was given on the command line."""
    try:
        yield
    except KernelsError:  # not what was given is wrong
        raise
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def refuse(where: str, given: Mapping[str, bool]) -> None:
    """Refuse options that were given and have no effect."""
    for option, is_given in given.items():
        if is_given:
            raise typer.BadParameter(f"{option} has no effect {where}")


def workload_of(text: str | None, *, seed: int, rate: float | None) -> Workload:
    """Return the modelled machine's workload of that name, or the default."""
    text = _WORKLOAD if text is None else text
    if text.partition(",")[0].strip() == "replay":
        raise typer.BadParameter("a workload that is replayed needs its bitmaps: hwdbm migrate --replay FOLDER")
    has_rate, is_idle = "rate=" in text, text.partition(",")[0].strip() == "idle"
    refuse("with a workload that is idle", {"a rate": is_idle and (has_rate or rate is not None)})
    if rate is not None and has_rate:
        raise typer.BadParameter(f"--rate and --workload {text} both give a rate")
    if rate is None and not has_rate and not is_idle:
        rate = _RATE
    with usage():
        workload = parse(text, seed)  # first as it was given: an error is to quote that
        return workload if rate is None else parse(f"{text},rate={rate}", seed)


def recorded(folder: Path, npages: int, interval: float) -> Replay:
    """Return the workload that was recorded in a folder. Errors are `_recorded`'s."""
    return Replay(bitmaps=_recorded(folder, npages), interval=interval)


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
    size = 8 * word_count(npages)
    for file in sorted(folder.iterdir()):
        with open_regular(file) as opened:
            raw = opened.read(size + 1)
        try:
            bitmaps.append(DirtyBitmap.from_bytes(raw, npages))
        except BitmapError as error:
            raise ValueError(f"{file}: {error}") from error
    if not bitmaps:
        raise OSError(ENOENT, "there are no bitmaps", str(folder))
    return bitmaps


def paused(
    source: Vm,
    memory: int,
    workload: str | None,
    rate: float | None,
    seed: int,
    *,
    log: KvmLog | None = None,
    mode: Mode | None = None,
    thp: bool | None = None,
    image: Path | None = None,
    percent: int = FILLED,
) -> Machine | KvmVm | ArmVm:
    """Return a paused VM of a kind, about to run; options that have no effect on it are wrong usage."""
    if source is not Vm.KVM:
        refuse("without --source kvm", {"--kvm-log": log is not None})
    if source is not Vm.MACHINE:
        refuse(f"with --source {source.value}", {"--mode": mode is not None})
    if source is Vm.KVM:
        refuse("with --source kvm", {"--thp": thp is not None})
        with usage():
            return build_kvm(memory, log=log or KvmLog.BITMAP, workload=workload, rate=rate, seed=seed, image=image,
                             percent=percent)  # fmt: skip
    if source is Vm.ARM:
        with usage():
            return build_arm(memory, workload=workload, rate=rate, seed=seed, blocks=bool(thp), image=image,
                             percent=percent)  # fmt: skip
    work = workload_of(workload, seed=seed, rate=rate)
    vm = build(memory, mode=mode or Mode.HW_DBM, thp=bool(thp), seed=seed, image=image, percent=percent)
    vm.run(work)
    return vm


@contextmanager
def switching_often() -> Iterator[None]:
    """Have the threads of this interpreter take turns more often meanwhile."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


# --- a real VM ---------------------------------------------------------------------------------------------


_PROTECT = {KvmLog.CLEAR: "on", KvmLog.INITIALLY_SET: "initially-set"}


class _LogOptions(TypedDict):
    ring: int | None
    manual_protect: str


def _log(log: KvmLog) -> _LogOptions:
    return {"ring": _RING if log is KvmLog.RING else None, "manual_protect": _PROTECT.get(log, "off")}


def build_kvm(
    memory: int, *, log: KvmLog, workload: str | None, rate: float | None, seed: int, image: Path | None, percent: int
) -> KvmVm:
    """Return a paused VM on ``/dev/kvm`` with memory that is filled; where its guest counts, each page has a 0 there.

    Raises
    ------
    OSError
        If there is no usable KVM, or the image can't be read or is larger.
    """
    workload = "counting" if workload is None else workload
    refuse("with a guest that is idle", {"--rate": workload == "idle" and rate is not None})
    vm = KvmVm(memory, guest=workload, rate=_KVM_RATE if rate is None else rate or None, seed=seed, **_log(log))
    try:
        bytes_ = vm.memory(0)
        if image is None:
            fill(bytes_, _filled(memory, percent), seed)
        else:
            load(bytes_, image)
        if workload == "counting":
            bytes_[:: vm.page_size] = 0
        elif workload == "random":
            bytes_.view(np.uint32)[:: vm.page_size // 4] = 0
    except BaseException:
        vm.close()
        raise
    return vm


def kvm_layout(memory: int) -> MemoryMap:
    """Return the layout of what `build_kvm` makes: the memory, and the guest's code."""
    with KvmVm(memory, guest="idle") as vm:
        return MemoryMap.of(vm)


def kvm_for(layout: MemoryMap, *, log: KvmLog) -> KvmVm:
    """Return a paused VM on ``/dev/kvm`` with the memory that a source describes.

    Raises
    ------
    LayoutError
        If it can't have it.
    """
    try:
        return KvmVm.from_slots(layout.page_size, layout.slots, **_log(log))
    except KvmUnavailableError:
        raise
    except (OSError, ValueError) as error:
        raise LayoutError(f"no VM has this memory: {getattr(error, 'strerror', None) or error}") from error


# --- an emulated Arm machine -------------------------------------------------------------------------------


def build_arm(
    memory: int, *, workload: str | None, rate: float | None, seed: int, blocks: bool, image: Path | None, percent: int
) -> ArmVm:
    """Return a paused Arm machine with memory that is filled.

    Raises
    ------
    OSError
        If there is no QEMU or compiler, or the image can't be read or is larger.
    """
    workload = "window" if workload is None else workload
    refuse("with a guest that is idle", {"--rate": workload == "idle" and rate is not None})
    kinds = [kind.strip() for kind in workload.split(",")]
    vm = ArmVm(memory, guest=kinds, rate=_ARM_RATE if rate is None else rate or None, seed=seed, blocks=blocks)
    try:
        if image is None:
            fill(vm.memory(0), _filled(memory, percent), seed)
        else:
            load(vm.memory(0), image)
    except BaseException:
        vm.close()
        raise
    return vm


def arm_layout(memory: int) -> MemoryMap:
    """Return the layout of what `build_arm` makes: the memory, and the guests' own."""
    return MemoryMap(PAGE, memory_slots(memory))


def arm_for(layout: MemoryMap, *, blocks: bool) -> ArmVm:
    """Return a paused Arm machine with the memory that a source describes.

    Raises
    ------
    LayoutError
        If it can't have it.
    """
    try:
        return ArmVm.from_slots(layout.page_size, layout.slots, blocks=blocks)
    except (ArmUnavailableError, KernelsError):
        raise
    except ValueError as error:
        raise LayoutError(f"no Arm machine has this memory: {error}") from error
