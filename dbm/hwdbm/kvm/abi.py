"""The kernel's interface at ``/dev/kvm``: numbers and layouts, as in ``linux/kvm.h`` and ``asm/kvm.h``.

Nothing here does anything. Everything is little-endian with the kernel's own padding written out; a test compares each
number and each size with what a C compiler makes of the headers.
"""

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from struct import Struct
from types import MappingProxyType

API_VERSION = 12
"""What ``KVM_GET_API_VERSION`` answers, for ever."""

DIRTY_LOG_MANUAL_PROTECT_ENABLE = 1 << 0
DIRTY_LOG_INITIALLY_SET = 1 << 1
DIRTY_GFN_F_DIRTY = 1 << 0
DIRTY_GFN_F_RESET = 1 << 1

MSR_KVM_WALL_CLOCK_NEW = 0x4B564D00
"""Set to an address, it has KVM write 12 bytes there (``kvm_write_wall_clock``): a guest's write without a guest."""

STRUCTS: Mapping[str, Struct] = MappingProxyType(
    {
        # --- both architectures
        "kvm_userspace_memory_region": Struct("<IIQQQ"),  # slot, flags, guest_phys_addr, memory_size, userspace_addr
        "kvm_dirty_log": Struct("<I4xQ"),  # slot, dirty_bitmap
        "kvm_clear_dirty_log": Struct("<IIQQ"),  # slot, num_pages, first_page, dirty_bitmap
        "kvm_dirty_gfn": Struct("<IIQ"),  # flags, slot, offset
        "kvm_enable_cap": Struct("<II4Q64x"),  # cap, flags, args
        "kvm_signal_mask": Struct("<I"),  # len; the mask follows
        "kvm_mp_state": Struct("<I"),
        "kvm_vcpu_events": Struct("<64s"),
        "kvm_one_reg": Struct("<QQ"),  # id, address
        "kvm_reg_list": Struct("<Q"),  # n; the ids follow
        # --- x86_64
        "kvm_regs": Struct("<18Q"),  # rax rbx rcx rdx rsi rdi rsp rbp r8-r15 rip rflags
        "kvm_segment": Struct("<QIH10B"),  # base, limit, selector, type present dpl db s l g avl unusable padding
        "kvm_dtable": Struct("<QH6x"),  # base, limit
        "kvm_sregs": Struct("<192s32s7Q32s"),  # cs ds es fs gs ss tr ldt; gdt idt; cr0 cr2 cr3 cr4 cr8 efer apic_base
        "kvm_fpu": Struct("<416s"),
        "kvm_xsave": Struct("<4096s"),
        "kvm_xcrs": Struct("<II384s"),
        "kvm_debugregs": Struct("<16Q"),
        "kvm_msrs": Struct("<I4x"),  # nmsrs; the entries follow
        "kvm_msr_entry": Struct("<I4xQ"),  # index, data
        "kvm_msr_list": Struct("<I"),  # nmsrs; the indices follow
        # --- arm64
        "kvm_vcpu_init": Struct("<I28s"),  # target, features
    }
)
"""Structures by the kernel's name, each with its fields in order."""

RUN: Mapping[str, tuple[int, Struct]] = MappingProxyType(
    {
        "immediate_exit": (1, Struct("<B")),
        "exit_reason": (8, Struct("<I")),
        "io": (32, Struct("<BBHIQ")),  # direction, size, port, count, data_offset
        "mmio": (32, Struct("<Q8sIB")),  # phys_addr, data, len, is_write
        "fail_entry": (32, Struct("<QI")),  # hardware_entry_failure_reason, cpu
        "internal": (32, Struct("<II")),  # suberror, ndata
        "system_event": (32, Struct("<II")),  # type, ndata
    }
)
"""Fields of ``struct kvm_run``, which is mapped from a vCPU: where each begins, and its layout."""


def _io(number: int) -> int:
    return 0xAE << 8 | number


def _iow(number: int, struct: str) -> int:
    return 1 << 30 | STRUCTS[struct].size << 16 | _io(number)


def _ior(number: int, struct: str) -> int:
    return 2 << 30 | STRUCTS[struct].size << 16 | _io(number)


def _iowr(number: int, struct: str) -> int:
    return _iow(number, struct) | _ior(number, struct)


class Ioctl(IntEnum):
    """The requests that are used, by the kernel's names.

    Examples
    --------
    >>> hex(Ioctl.KVM_GET_DIRTY_LOG), hex(Ioctl.KVM_CLEAR_DIRTY_LOG)
    ('0x4010ae42', '0xc018aec0')
    """

    # --- /dev/kvm
    KVM_GET_API_VERSION = _io(0x00)
    KVM_CREATE_VM = _io(0x01)
    KVM_GET_MSR_INDEX_LIST = _iowr(0x02, "kvm_msr_list")  # x86_64
    KVM_CHECK_EXTENSION = _io(0x03)  # a VM's, too
    KVM_GET_VCPU_MMAP_SIZE = _io(0x04)
    # --- a VM
    KVM_CREATE_VCPU = _io(0x41)
    KVM_GET_DIRTY_LOG = _iow(0x42, "kvm_dirty_log")
    KVM_SET_USER_MEMORY_REGION = _iow(0x46, "kvm_userspace_memory_region")
    KVM_ENABLE_CAP = _iow(0xA3, "kvm_enable_cap")
    KVM_ARM_PREFERRED_TARGET = _ior(0xAF, "kvm_vcpu_init")  # arm64
    KVM_CLEAR_DIRTY_LOG = _iowr(0xC0, "kvm_clear_dirty_log")
    KVM_RESET_DIRTY_RINGS = _io(0xC7)
    # --- a vCPU
    KVM_RUN = _io(0x80)
    KVM_SET_SIGNAL_MASK = _iow(0x8B, "kvm_signal_mask")
    KVM_GET_MP_STATE = _ior(0x98, "kvm_mp_state")
    KVM_SET_MP_STATE = _iow(0x99, "kvm_mp_state")
    KVM_GET_VCPU_EVENTS = _ior(0x9F, "kvm_vcpu_events")
    KVM_SET_VCPU_EVENTS = _iow(0xA0, "kvm_vcpu_events")
    # --- a vCPU of x86_64
    KVM_GET_REGS = _ior(0x81, "kvm_regs")
    KVM_SET_REGS = _iow(0x82, "kvm_regs")
    KVM_GET_SREGS = _ior(0x83, "kvm_sregs")
    KVM_SET_SREGS = _iow(0x84, "kvm_sregs")
    KVM_GET_MSRS = _iowr(0x88, "kvm_msrs")
    KVM_SET_MSRS = _iow(0x89, "kvm_msrs")
    KVM_GET_FPU = _ior(0x8C, "kvm_fpu")
    KVM_SET_FPU = _iow(0x8D, "kvm_fpu")
    KVM_GET_DEBUGREGS = _ior(0xA1, "kvm_debugregs")
    KVM_SET_DEBUGREGS = _iow(0xA2, "kvm_debugregs")
    KVM_GET_XSAVE = _ior(0xA4, "kvm_xsave")
    KVM_SET_XSAVE = _iow(0xA5, "kvm_xsave")
    KVM_GET_XCRS = _ior(0xA6, "kvm_xcrs")
    KVM_SET_XCRS = _iow(0xA7, "kvm_xcrs")
    # --- a vCPU of arm64
    KVM_GET_ONE_REG = _iow(0xAB, "kvm_one_reg")
    KVM_SET_ONE_REG = _iow(0xAC, "kvm_one_reg")
    KVM_ARM_VCPU_INIT = _iow(0xAE, "kvm_vcpu_init")
    KVM_GET_REG_LIST = _iowr(0xB0, "kvm_reg_list")


REGISTERS: Mapping[str, tuple[Ioctl, Ioctl, str]] = MappingProxyType(
    {
        "mp_state": (Ioctl.KVM_GET_MP_STATE, Ioctl.KVM_SET_MP_STATE, "kvm_mp_state"),
        "vcpu_events": (Ioctl.KVM_GET_VCPU_EVENTS, Ioctl.KVM_SET_VCPU_EVENTS, "kvm_vcpu_events"),
        "regs": (Ioctl.KVM_GET_REGS, Ioctl.KVM_SET_REGS, "kvm_regs"),
        "sregs": (Ioctl.KVM_GET_SREGS, Ioctl.KVM_SET_SREGS, "kvm_sregs"),
        "fpu": (Ioctl.KVM_GET_FPU, Ioctl.KVM_SET_FPU, "kvm_fpu"),
        "xsave": (Ioctl.KVM_GET_XSAVE, Ioctl.KVM_SET_XSAVE, "kvm_xsave"),
        "xcrs": (Ioctl.KVM_GET_XCRS, Ioctl.KVM_SET_XCRS, "kvm_xcrs"),
        "debugregs": (Ioctl.KVM_GET_DEBUGREGS, Ioctl.KVM_SET_DEBUGREGS, "kvm_debugregs"),
    }
)
"""A vCPU's state that is one structure: what gets it, what sets it, and its layout."""


class Cap(IntEnum):
    """Capabilities, by the kernel's names without ``KVM_CAP_``."""

    USER_MEMORY = 3
    NR_VCPUS = 9
    NR_MEMSLOTS = 10
    XSAVE = 55
    XCRS = 56
    ONE_REG = 70
    MULTI_ADDRESS_SPACE = 118
    IMMEDIATE_EXIT = 136
    ARM_VM_IPA_SIZE = 165
    MANUAL_DIRTY_LOG_PROTECT2 = 168
    DIRTY_LOG_RING = 192
    DIRTY_LOG_RING_ACQ_REL = 223
    DIRTY_LOG_RING_WITH_BITMAP = 225


class Exit(IntEnum):
    """Why ``KVM_RUN`` returned, by the kernel's names without ``KVM_EXIT_``."""

    UNKNOWN = 0
    EXCEPTION = 1
    IO = 2
    HYPERCALL = 3
    DEBUG = 4
    HLT = 5
    MMIO = 6
    IRQ_WINDOW_OPEN = 7
    SHUTDOWN = 8
    FAIL_ENTRY = 9
    INTR = 10
    NMI = 16
    INTERNAL_ERROR = 17
    SYSTEM_EVENT = 24
    ARM_NISV = 28
    X86_RDMSR = 29
    X86_WRMSR = 30
    DIRTY_RING_FULL = 31
    X86_BUS_LOCK = 33
    NOTIFY = 37
    MEMORY_FAULT = 39


@dataclass(frozen=True, slots=True)
class _Arch:
    """The differences between architectures.

    Parameters
    ----------
    machine : str
        As `platform.machine` has it.
    ring_page_offset : int
        ``KVM_DIRTY_LOG_PAGE_OFFSET``: where a vCPU's dirty ring is mapped from, in the host's pages.
    ring_caps : tuple of Cap
        The capabilities that the ring may be enabled by, the best first.
    registers : tuple of str
        The keys of `REGISTERS` that a vCPU has, in the order in which they are set. On arm64 most are single
        registers, ``KVM_GET_REG_LIST``.
    msrs : bool
        Whether there are MSRs.
    total_store_order : bool
        Whether loads stay in the order of the program, and stores after loads before them.
    """

    machine: str
    ring_page_offset: int
    ring_caps: tuple[Cap, ...]
    registers: tuple[str, ...]
    msrs: bool
    total_store_order: bool


ARCHES: Mapping[str, _Arch] = MappingProxyType(
    {
        "x86_64": _Arch(
            machine="x86_64",
            ring_page_offset=64,
            ring_caps=(Cap.DIRTY_LOG_RING_ACQ_REL, Cap.DIRTY_LOG_RING),
            # xsave contains what fpu does, and xcrs say how much of it; events come last, as in QEMU.
            registers=("sregs", "regs", "xcrs", "fpu", "xsave", "debugregs", "mp_state", "vcpu_events"),
            msrs=True,
            total_store_order=True,
        ),
        "aarch64": _Arch(
            machine="aarch64",
            ring_page_offset=64,
            ring_caps=(Cap.DIRTY_LOG_RING_ACQ_REL,),
            registers=("mp_state", "vcpu_events"),
            msrs=False,
            total_store_order=False,
        ),
    }
)
"""The architectures, by `platform.machine`'s name."""


def arch() -> _Arch:
    """Return what this machine is.

    Raises
    ------
    NotImplementedError
        If it is none of `ARCHES`.
    """
    machine = platform.machine()
    if machine not in ARCHES:
        raise NotImplementedError(f"there are layouts for {' and '.join(ARCHES)}, and this machine is {machine}")
    return ARCHES[machine]
