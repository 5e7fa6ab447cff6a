"""What the host and the firmware say to each other through RAM: `firmware/abi.h` says the same in C."""

import ctypes
from enum import IntEnum

RAM = 0x4000_0000
"""Where RAM begins on QEMU's machine ``virt``: the physical address of the file's first byte."""

FIRMWARE, MAILBOX, SHARED = 0x4020_0000, 0x4040_0000, 0x4041_0000
MAGIC = 0x314D_5241_4244_5748
VCPUS = 7  # GICv2 has eight CPUs, and the first is the firmware's

_U64 = ctypes.c_uint64


class Command(IntEnum):
    """What the doorbell is rung for."""

    BUILD = 1
    START = 2
    FLUSH = 3
    FLUSH_PAIR = 4


class VcpuState(IntEnum):
    """What a vCPU does, as it says itself."""

    OFF = 0
    PAUSED = 1
    RUNNING = 2
    CRASHED = 3


class GuestKind(IntEnum):
    """The kinds of guests."""

    IDLE = 0
    SEQUENTIAL = 1
    RANDOM = 2
    WINDOW = 3
    ATOMICS = 4
    PAIRS = 5
    ZERO = 6
    STAGE1 = 7


def _words(*names: str) -> tuple[tuple[str, type[ctypes.c_uint64]], ...]:
    return tuple((name, _U64) for name in names)


_SYSTEM = ("sp", "pc", "pstate", "sctlr", "tcr", "ttbr0", "mair", "vbar", "elr", "spsr", "hcr")


class Vcpu(ctypes.Structure):
    """A vCPU's registers, and what it says of itself."""

    _fields_ = (
        ("x", _U64 * 31),
        *_words(*_SYSTEM),
        *_words("skip", "state", "faults", "fault_ipa", "fault_esr"),
        ("spare", _U64 * 8),
    )


class Mapping(ctypes.Structure):
    """A run of leaves of one level: a line of the plan that the firmware builds tables from."""

    _fields_ = _words("ipa", "pa", "size", "level", "bits")


class Mailbox(ctypes.Structure):
    """What the host and EL2 share."""

    _fields_ = (
        *_words("magic"),
        ("sizes", _U64 * 2),
        *_words("mmfr1"),
        *_words("doorbell", "answered", "command", "failed", "guest", "vectors", "vcpus", "vtcr", "vttbr"),
        *_words("root", "page_shift", "start_level", "root_tables", "mappings", "mappings_pa", "tables", "tables_pa"),
        *_words("used", "junk", "table_bits", "flush_ipa", "flush_size"),
        ("vcpu", Vcpu * VCPUS),
    )


class Shared(ctypes.Structure):
    """What guests may read."""

    _fields_ = (*_words("stop", "percent"), ("rate", _U64 * VCPUS))


class GuestTask(ctypes.Structure):
    """What a guest does: it lies in the guest's own memory."""

    _fields_ = _words(
        *("kind", "vcpu", "base", "size", "page_shift", "counts", "origin", "window", "random", "number", "stores"),
        *("limit", "done", "walked"),
    )
