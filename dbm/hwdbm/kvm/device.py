"""``/dev/kvm`` and VMs: the kernel's file descriptors, with one method a request and no policy.

Every error of a request is an `OSError` with the kernel's errno, and names the request.
"""

import mmap
import os
import struct
from errno import E2BIG, EACCES, ENODEV, ENOENT, ENOTSUP, ENXIO, EPERM

import numpy as np
from numpy.typing import NDArray

from hwdbm import check
from hwdbm.bitmap import word_count
from hwdbm.errors import KvmUnavailableError
from hwdbm.kvm import abi
from hwdbm.kvm.abi import Cap, Ioctl
from hwdbm.kvm.ioctl import U32, U64, KvmFile, packed
from hwdbm.kvm.vcpu import VcpuFd
from hwdbm.memslot import slot_name

_MOST_ARGS = 4


class Kvm(KvmFile):
    """KVM itself.

    Parameters
    ----------
    path : str
        The device.

    Attributes
    ----------
    fd : int
        The file descriptor; -1 once it is closed.

    Raises
    ------
    KvmUnavailableError
        If there is no such file, no permission, another version of the interface than 12, no ``immediate_exit``, or
        this is a machine that there are no layouts for.
    """

    def __init__(self, path: str = "/dev/kvm") -> None:
        path = str(check.path(path, "path"))
        try:
            self.arch = abi.arch()
        except NotImplementedError as error:
            raise KvmUnavailableError(ENOTSUP, f"{path}: {error}") from None
        try:
            super().__init__(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        except OSError as error:
            raise KvmUnavailableError(error.errno, f"{path}: {_why(error)}") from error
        try:
            self._check(path)
            self.run_size = self._call(Ioctl.KVM_GET_VCPU_MMAP_SIZE)
        except BaseException:
            self.close()
            raise

    def _check(self, path: str) -> None:
        try:
            version = self._call(Ioctl.KVM_GET_API_VERSION)
        except OSError as error:
            raise KvmUnavailableError(error.errno, f"{path}: it is not KVM: {error.strerror}") from error
        if version != abi.API_VERSION:
            raise KvmUnavailableError(ENOTSUP, f"{path}: API version {version}, not {abi.API_VERSION}")
        if not self.check_extension(Cap.IMMEDIATE_EXIT):
            raise KvmUnavailableError(ENOTSUP, f"{path}: no KVM_CAP_IMMEDIATE_EXIT, as from Linux 4.13 on")

    def create_vm(self, kind: int = 0) -> "VmFd":
        """Create a VM.

        Parameters
        ----------
        kind : int
            The type. On arm64 it is the number of the guest's address bits, 0 for 40.

        Returns
        -------
        VmFd
            The VM, without memory and vCPUs.
        """
        kind = check.integer(kind, "kind", 0, U64)
        return VmFd(self._call(Ioctl.KVM_CREATE_VM, kind, f"type {kind:#x}"), self.run_size)

    def msr_indices(self) -> list[int]:
        """Return the indices of the MSRs that a guest's state has (``KVM_GET_MSR_INDEX_LIST``); x86_64 only."""
        buffer = bytearray(4)
        try:
            self._call(Ioctl.KVM_GET_MSR_INDEX_LIST, buffer)
        except OSError as error:
            if error.errno != E2BIG:  # which comes with how many there are
                raise
        (count,) = struct.unpack_from("<I", buffer)
        buffer.extend(bytes(4 * count))
        self._call(Ioctl.KVM_GET_MSR_INDEX_LIST, buffer)
        return list(struct.unpack_from(f"<{count}I", buffer, 4))


class VmFd(KvmFile):
    """A VM: `Kvm.create_vm` makes them.

    Parameters
    ----------
    fd : int
        The file descriptor.
    run_size : int
        ``KVM_GET_VCPU_MMAP_SIZE``, in bytes.
    """

    def __init__(self, fd: int, run_size: int) -> None:
        super().__init__(fd)
        self._run_size = check.integer(run_size, "run_size", 1, U32)
        self._pages: dict[int, int] = {}  # of each slot: what the kernel would write of its bitmap

    def enable_cap(self, cap: int, *args: int) -> None:
        """Enable a capability, with up to four arguments.

        Raises
        ------
        OSError
            The kernel's.
        ValueError
            For more than four arguments.
        """
        cap = check.integer(cap, "cap", 0, U32)
        if len(args) > _MOST_ARGS:
            raise ValueError(f"a capability has up to {_MOST_ARGS} arguments, not {len(args)}")
        numbers = (*(check.integer(each, "an argument", 0, U64) for each in args), 0, 0, 0, 0)[:_MOST_ARGS]
        self._call(
            Ioctl.KVM_ENABLE_CAP,
            packed("kvm_enable_cap", cap, 0, *numbers),
            f"{_cap_name(cap)} with {', '.join(map(hex, numbers))}",
        )

    def set_memory_region(
        self, *, slot: int, flags: int, guest_phys_addr: int, memory_size: int, userspace_addr: int
    ) -> None:
        """Create, delete, move or change a memslot (``KVM_SET_USER_MEMORY_REGION``).

        Parameters
        ----------
        slot : int
            ``as_id << 16 | id``.
        flags : int
            ``KVM_MEM_LOG_DIRTY_PAGES`` (1), ``KVM_MEM_READONLY`` (2).
        guest_phys_addr, memory_size, userspace_addr : int
            Bytes. The backing must stay mapped until the slot is gone: the kernel writes to it.

        Raises
        ------
        OSError
            The kernel's, as `hwdbm.DirtyLog` has them.
        ValueError
            If a number doesn't fit in its field.
        """
        slot, flags = check.integer(slot, "slot", 0, U32), check.integer(flags, "flags", 0, U32)
        guest_phys_addr = check.integer(guest_phys_addr, "guest_phys_addr", 0, U64)
        memory_size = check.integer(memory_size, "memory_size", 0, U64)
        userspace_addr = check.integer(userspace_addr, "userspace_addr", 0, U64)
        fields = (slot, flags, guest_phys_addr, memory_size, userspace_addr)
        region = packed("kvm_userspace_memory_region", *fields)
        about = f"{slot_name(slot)}, flags {flags:#x}, {memory_size:#x} bytes at gpa {guest_phys_addr:#x}"
        self._call(Ioctl.KVM_SET_USER_MEMORY_REGION, region, f"{about}, backed at {userspace_addr:#x}")
        self._pages[slot] = memory_size // mmap.PAGESIZE

    def get_dirty_log(self, slot: int, out: NDArray[np.uint64]) -> None:
        """Write a slot's dirty bitmap to `out` (``KVM_GET_DIRTY_LOG``).

        Parameters
        ----------
        slot : int
            ``as_id << 16 | id``.
        out : (nwords,) uint64 array
            At least ``ceil(npages / 64)`` words, contiguous; those beyond stay as they are.

        Raises
        ------
        OSError
            EINVAL if the id is out of range, ENOENT if there is no such slot or it doesn't log, ENXIO with a ring.
        TypeError, ValueError
            If `out` is smaller than the slot's bitmap, or isn't such an array: the kernel would write beyond it.
        """
        slot = check.integer(slot, "slot", 0, U32)
        address = _address(out, word_count(self._pages.get(slot, 0)), slot, writable=True)
        self._call(Ioctl.KVM_GET_DIRTY_LOG, packed("kvm_dirty_log", slot, address), slot_name(slot))

    def clear_dirty_log(self, slot: int, first_page: int, num_pages: int, bitmap: NDArray[np.uint64]) -> None:
        """Clear pages in a slot's dirty log, and protect them again (``KVM_CLEAR_DIRTY_LOG``).

        Parameters
        ----------
        slot : int
            ``as_id << 16 | id``.
        first_page, num_pages : int
            The range: multiples of 64, but that the last may end with the slot.
        bitmap : (nwords,) uint64 array
            The pages, bit 0 being `first_page`: at least ``ceil(num_pages / 64)`` words, contiguous.

        Raises
        ------
        OSError
            The kernel's, as `hwdbm.DirtyLog.clear_dirty_log` has them.
        TypeError, ValueError
            If the slot has such pages and `bitmap` is smaller, or isn't such an array, or a number doesn't fit.
        """
        slot, first_page = check.integer(slot, "slot", 0, U32), check.integer(first_page, "first_page", 0, U64)
        num_pages = check.integer(num_pages, "num_pages", 0, U32)
        pages = min(num_pages, max(self._pages.get(slot, 0) - first_page, 0))
        address = _address(bitmap, word_count(pages), slot)
        about = f"{slot_name(slot)}, pages {first_page}+{num_pages}"
        asked = packed("kvm_clear_dirty_log", slot, num_pages, first_page, address)
        self._call(Ioctl.KVM_CLEAR_DIRTY_LOG, asked, about)

    def reset_dirty_rings(self) -> int:
        """Have all entries that are harvested protected and free again (``KVM_RESET_DIRTY_RINGS``); return how many."""
        return self._call(Ioctl.KVM_RESET_DIRTY_RINGS)

    def create_vcpu(self, vcpu_id: int) -> "VcpuFd":
        """Create a vCPU, and on arm64 initialise it as the host's own kind."""
        vcpu_id = check.integer(vcpu_id, "vcpu_id", 0, U32)
        fd = self._call(Ioctl.KVM_CREATE_VCPU, vcpu_id, f"vCPU {vcpu_id}")
        vcpu = VcpuFd(fd, self._run_size)
        try:
            if not abi.arch().msrs:
                init = bytearray(abi.STRUCTS["kvm_vcpu_init"].size)
                self._call(Ioctl.KVM_ARM_PREFERRED_TARGET, init)
                vcpu._call(Ioctl.KVM_ARM_VCPU_INIT, init)
        except BaseException:
            vcpu.close()
            raise
        return vcpu


def _why(error: OSError) -> str:
    if error.errno == ENOENT:
        return "there is no such file: this kernel has no KVM"
    if error.errno in (EACCES, EPERM):
        return "no permission: it needs root, or the group that owns the file"
    if error.errno in (ENODEV, ENXIO):
        return "there is nothing behind the file: KVM isn't loaded, or the processor has no virtualisation"
    return str(error.strerror)


def _cap_name(cap: int) -> str:
    return f"KVM_CAP_{Cap(cap).name}" if cap in frozenset(Cap) else f"capability {cap}"


def _address(words: NDArray[np.uint64], least: int, slot: int, *, writable: bool = False) -> int:
    """Return the address of an array that the kernel may use `least` words of."""
    check.uint64s(words, f"{slot_name(slot)}: its bitmap's words", writable=writable)
    if words.size < least:
        raise ValueError(f"{slot_name(slot)}: its bitmap has {least} words, got an array of {words.size}")
    return words.ctypes.data
