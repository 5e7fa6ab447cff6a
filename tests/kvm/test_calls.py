"""What the kernel is asked, byte for byte, by each verb of the thin layer, to the edges of its fields; without KVM."""

import os
from collections.abc import Callable

import numpy as np
import pytest
from seen import as_seen

from hwdbm.kvm import VmFd, device
from hwdbm.kvm.abi import Cap, Ioctl
from hwdbm.kvm.ioctl import KvmFile

U32, U64 = (1 << 32) - 1, (1 << 64) - 1
VM: dict[str, Callable[[VmFd], object]] = {
    "no arguments": lambda vm: vm.enable_cap(Cap.DIRTY_LOG_RING),
    "four arguments": lambda vm: vm.enable_cap(Cap.MANUAL_DIRTY_LOG_PROTECT2, 1, 2, 3, U64),
    "five arguments": lambda vm: vm.enable_cap(Cap.MANUAL_DIRTY_LOG_PROTECT2, 1, 2, 3, 4, 5),
    "a wide capability": lambda vm: vm.enable_cap(U32 + 1),
    "a slot": lambda vm: vm.set_memory_region(
        slot=U32, flags=3, guest_phys_addr=U64, memory_size=4096 * 65, userspace_addr=U64
    ),
    "no slot": lambda vm: vm.set_memory_region(
        slot=-1, flags=0, guest_phys_addr=0, memory_size=0, userspace_addr=0
    ),
    "a bitmap": lambda vm: vm.get_dirty_log(U32, np.zeros(2, dtype=np.uint64)),
    "a small bitmap": lambda vm: vm.get_dirty_log(U32, np.zeros(1, dtype=np.uint64)),
    "an unknown slot's bitmap": lambda vm: vm.get_dirty_log(0, np.zeros(0, dtype=np.uint64)),
    "a read-only bitmap": lambda vm: vm.get_dirty_log(U32, np.frombuffer(bytes(16), dtype=np.uint64)),
    "clear": lambda vm: vm.clear_dirty_log(U32, 0, 65, np.zeros(2, dtype=np.uint64)),
    "clear from a read-only bitmap": lambda vm: vm.clear_dirty_log(U32, 64, U32, np.frombuffer(bytes(8), np.uint64)),
    "clear by a small bitmap": lambda vm: vm.clear_dirty_log(U32, 0, 65, np.zeros(1, dtype=np.uint64)),
    "clear beyond": lambda vm: vm.clear_dirty_log(U32, U64, U32, np.zeros(0, dtype=np.uint64)),
    "reset": lambda vm: vm.reset_dirty_rings(),
    "does it have": lambda vm: vm.check_extension(U32),
}  # fmt: skip


def test_what_the_kernel_is_asked_was_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []

    def called(self: KvmFile, request: Ioctl, arg: int | bytearray = 0, about: str = "") -> int:
        told = hex(arg) if isinstance(arg, int) else f"{len(arg)} bytes {arg.rstrip(bytes(1)).hex()}"
        lines.append(f"  {request.name} {told} for {about!r}")
        return 7

    found = device._address
    monkeypatch.setattr(device, "_address", lambda *given, **how: found(*given, **how) and 0x1234)
    monkeypatch.setattr(KvmFile, "_call", called)
    with VmFd(os.open("/dev/null", os.O_RDWR), 4096) as vm:
        for name, call in VM.items():
            lines.append(name)
            try:
                lines.append(f"  {call(vm)}")
            except (TypeError, ValueError) as error:
                lines.append(f"  {error}")
    as_seen("asked/kvm.txt", "\n".join(lines) + "\n")
