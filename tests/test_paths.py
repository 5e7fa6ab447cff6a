"""How far a call goes: the files of the package that it touches, which nobody adds to without noticing."""

import sys
from collections.abc import Callable
from types import FrameType, ModuleType

import numpy as np

from hwdbm import DirtyLog, Stage2, pte
from hwdbm.machine import Machine

KERNELS = {"kernels/__init__", "kernels/fused", "kernels/vector"}  # of bitmaps with one owner `vector` takes care
LEAVES = {"bitmap", "check", "pte", "stage2/layout", "stage2/leaves", "stage2/saved", "stage2/stage2"}
LOG = {f"dirtylog/{name}" for name in ("client", "lease", "log", "mechanism", "rangelock", "slot", "stats")}
FAULT = {f"dirtylog/{name}" for name in ("faults", "log", "mechanism", "rangelock", "slot")}
MACHINE = {f"machine/{name}" for name in ("clock", "faults", "frames", "mmu", "space", "tlb", "vcpu")}
SLOTS = {"granule", "memslot", "vm/memorymap"}


def touched(call: Callable[[], object]) -> set[str]:
    """Return the modules of the package of which a function is called."""
    names = set()

    def note(frame: FrameType, event: str, _: object) -> None:
        module = frame.f_globals.get("__name__", "")
        if event == "call" and module.startswith("hwdbm."):
            package = module == frame.f_globals.get("__package__")
            names.add(module.removeprefix("hwdbm.").replace(".", "/") + ("/__init__" if package else ""))

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
    return names


def test_a_harvest(kernels: ModuleType) -> None:
    s2 = Stage2(1024)
    s2.map(0, 1024, pfn=0, dbm=True)
    s2.level(3)[7] |= np.uint64(pte.S2AP_W)
    assert touched(s2.harvest) <= LEAVES | KERNELS


def test_a_get_with_a_lease(kernels: ModuleType) -> None:
    log = DirtyLog()
    log.set_memory_region(slot=0, flags=1, guest_phys_addr=0, memory_size=1 << 22, userspace_addr=0)
    log.map(0, gfn=0, npages=1024, pfn=0)
    log.stage2(0).level(3)[7] |= np.uint64(pte.S2AP_W)

    def get() -> None:
        with log.get_dirty_log(0, lease=True) as lease:
            assert lease.bitmap.pages().tolist() == [7]

    assert touched(get) <= LEAVES | KERNELS | LOG


def test_the_first_store_to_a_page(kernels: ModuleType) -> None:
    with Machine() as machine:
        machine.add_memslot(1 << 24, 1 << 30)
        machine.start_log()
        gpas, values = np.array([(1 << 30) + 4096]), np.array([7], dtype=np.uint64)
        assert touched(lambda: machine.vcpus[0].store(gpas, values)) <= LEAVES | KERNELS | FAULT | MACHINE | SLOTS
