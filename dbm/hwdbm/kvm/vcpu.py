"""A vCPU's file descriptor: running it, and its registers."""

import mmap
import struct
from collections.abc import Iterable, Sequence
from errno import E2BIG, EBADF, EINTR, EINVAL
from typing import Any

import numpy as np

from hwdbm import check
from hwdbm.kvm import abi
from hwdbm.kvm.abi import Exit, Ioctl
from hwdbm.kvm.ioctl import U32, U64, KvmFile, packed

_MOST_MSRS = 256  # MSR_ENTRIES, of one KVM_GET_MSRS or KVM_SET_MSRS
_IMMEDIATE_EXIT, _ = abi.RUN["immediate_exit"]
_EXITS = frozenset(Exit)


class VcpuFd(KvmFile):
    """A vCPU: `VmFd.create_vcpu` makes them.

    Parameters
    ----------
    fd : int
        The file descriptor.
    run_size : int
        Bytes of its ``struct kvm_run``, which is mapped.
    """

    def __init__(self, fd: int, run_size: int) -> None:
        super().__init__(fd)
        try:
            self._run = mmap.mmap(self.fd, check.integer(run_size, "run_size", 1, U32))
        except BaseException:
            self.close()
            raise

    def run(self) -> int:
        """Run the guest until it exits (``KVM_RUN``).

        Returns
        -------
        int
            The exit reason, an `Exit` where it is a known one. A signal, or `immediate_exit`, is `Exit.INTR`.

        Raises
        ------
        OSError
            The kernel's, but EINTR.
        """
        try:
            self._call(Ioctl.KVM_RUN)
        except OSError as error:
            if error.errno != EINTR:
                raise
            return Exit.INTR
        (reason,) = self.field("exit_reason")
        return Exit(reason) if reason in _EXITS else int(reason)

    def field(self, name: str) -> tuple[Any, ...]:
        """Return a field of the mapped ``struct kvm_run``, unpacked; the names are `abi.RUN`'s."""
        check.one_of(name, abi.RUN, "a field")
        offset, layout = abi.RUN[name]
        return layout.unpack_from(self._mapped, offset)

    @property
    def _mapped(self) -> mmap.mmap:
        if self.fd < 0:
            raise OSError(EBADF, "the vCPU is closed")
        return self._run

    @property
    def immediate_exit(self) -> bool:
        """Whether `run` returns before the guest is entered. Any thread may set it."""
        return bool(self._mapped[_IMMEDIATE_EXIT])

    @immediate_exit.setter
    def immediate_exit(self, value: bool) -> None:
        self._mapped[_IMMEDIATE_EXIT] = check.flag(value, "immediate_exit")

    def set_signal_mask(self, blocked: Iterable[int]) -> None:
        """Set which signals are blocked while the guest runs, in place of the thread's own mask.

        One that the thread blocks, and this mask doesn't, ends `run` and stays pending: no handler is called.
        """
        numbers = set(check.integers(blocked, "signals", 1, 64).tolist())
        mask = sum(1 << (number - 1) for number in numbers)
        self._call(Ioctl.KVM_SET_SIGNAL_MASK, bytearray(struct.pack("<IQ", 8, mask)))

    # --- registers -----------------------------------------------------------------------------------------

    def get(self, what: str) -> bytes:
        """Return a part of the vCPU's state, as the kernel lays it out; the names are `abi.REGISTERS`'."""
        check.one_of(what, abi.REGISTERS, "a part of the state")
        request, _, name = abi.REGISTERS[what]
        buffer = bytearray(abi.STRUCTS[name].size)
        self._call(request, buffer)
        return bytes(buffer)

    def set(self, what: str, data: bytes) -> None:
        """Set a part of the vCPU's state.

        Raises
        ------
        OSError
            The kernel's, mostly EINVAL where values contradict each other.
        ValueError
            If the data hasn't the structure's size.
        """
        check.one_of(what, abi.REGISTERS, "a part of the state")
        data = bytes(check.octets(data, "data"))
        _, request, name = abi.REGISTERS[what]
        size = abi.STRUCTS[name].size
        if len(data) != size:
            raise ValueError(f"{what}: struct {name} has {size} bytes, got {len(data)}")
        self._call(request, bytearray(data))

    def get_msrs(self, indices: Sequence[int]) -> dict[int, int]:
        """Return MSRs by their index. Those that can't be read are left out."""
        found: dict[int, int] = {}
        rest = check.integers(indices, "indices", 0, U32).tolist()
        while rest:
            part = rest[:_MOST_MSRS]
            buffer = _msrs([(index, 0) for index in part])
            read = self._call(Ioctl.KVM_GET_MSRS, buffer)  # it ends at the first that can't be
            entries = abi.STRUCTS["kvm_msr_entry"].iter_unpack(memoryview(buffer)[8 : 8 + 16 * read])
            found.update(entries)
            rest = rest[read + (read < len(part)) :]
        return found

    def set_msr(self, index: int, value: int) -> None:
        """Set an MSR.

        Raises
        ------
        OSError
            EINVAL if the kernel refuses it: there the guest would take a fault.
        """
        index, value = check.integer(index, "index", 0, U32), check.integer(value, "value", 0, U64)
        if self._call(Ioctl.KVM_SET_MSRS, _msrs([(index, value)])) != 1:
            raise OSError(EINVAL, f"KVM_SET_MSRS: MSR {index:#x} can't be set to {value:#x}")

    def reg_list(self) -> list[int]:
        """Return the ids of the registers that make up a vCPU's state (``KVM_GET_REG_LIST``); arm64 only."""
        buffer = bytearray(8)
        try:
            self._call(Ioctl.KVM_GET_REG_LIST, buffer)
        except OSError as error:
            if error.errno != E2BIG:
                raise
        (count,) = struct.unpack_from("<Q", buffer)
        buffer.extend(bytes(8 * count))
        self._call(Ioctl.KVM_GET_REG_LIST, buffer)
        return list(struct.unpack_from(f"<{count}Q", buffer, 8))

    def get_one_reg(self, register: int) -> bytes:
        """Return a register by its id, which has its size in it; arm64 only."""
        register = check.integer(register, "register", 0, U64)
        value = np.zeros(reg_size(register), dtype=np.uint8)
        asked = packed("kvm_one_reg", register, value.ctypes.data)
        self._call(Ioctl.KVM_GET_ONE_REG, asked, f"register {register:#x}")
        return value.tobytes()

    def set_one_reg(self, register: int, data: bytes) -> None:
        """Set a register by its id; arm64 only.

        Raises
        ------
        ValueError
            If the data hasn't the register's size.
        """
        register, data = check.integer(register, "register", 0, U64), bytes(check.octets(data, "data"))
        if len(data) != reg_size(register):
            raise ValueError(f"register {register:#x} has {reg_size(register)} bytes, got {len(data)}")
        value = np.frombuffer(data, dtype=np.uint8)
        asked = packed("kvm_one_reg", register, value.ctypes.data)
        self._call(Ioctl.KVM_SET_ONE_REG, asked, f"register {register:#x}")

    def close(self) -> None:
        """Unmap and close it. No thread may be in `run`."""
        if self.fd >= 0 and hasattr(self, "_run"):
            self._run.close()
        super().close()


def _msrs(entries: Sequence[tuple[int, int]]) -> bytearray:
    return packed("kvm_msrs", len(entries)) + b"".join(packed("kvm_msr_entry", *each) for each in entries)


def reg_size(register: int) -> int:
    """``KVM_REG_SIZE``: the id has the size's power of two in bits 52 to 55."""
    return 1 << (register >> 52 & 0xF)
