"""The real VM that the commands of a migration start, on ``/dev/kvm``, and its options."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, TypedDict

import numpy as np
import typer

from hwdbm.cli.guest import fill, filled
from hwdbm.kvm import KvmUnavailableError, KvmVm
from hwdbm.migration import LayoutError
from hwdbm.vm import MemoryMap
from hwdbm.vm.memory import load

__all__ = ["KvmLog", "KvmLogOption", "Vm", "build_kvm", "kvm_for", "kvm_layout"]

_RATE = 50_000  # pages a second: what a guest without hardware virtualisation below it can keep up
_RING = 4096  # entries of each vCPU's ring


class Vm(StrEnum):
    """What is migrated."""

    MACHINE = "machine"
    KVM = "kvm"


class KvmLog(StrEnum):
    """How the kernel's dirty log is collected."""

    BITMAP = "bitmap"
    CLEAR = "clear"
    INITIALLY_SET = "initially-set"
    RING = "ring"


KvmLogOption = Annotated[
    KvmLog,
    typer.Option(
        "--kvm-log",
        help="With KVM: the kernel's log by GET, by GET and CLEAR, so with all pages dirty at first, or by rings.",
    ),
]

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
    workload = workload or "counting"
    vm = KvmVm(memory, guest=workload, rate=_RATE if rate is None else rate or None, seed=seed, **_log(log))
    try:
        bytes_ = vm.memory(0)
        if image is None:
            fill(bytes_, filled(memory, percent), seed)
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
