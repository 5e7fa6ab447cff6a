"""The guests' code for arm64. It is assembled, and compared with the assembler; nothing has run it.

It is written for an MMU that is off, and so it must not be run as it is: a guest's accesses go around the caches then,
unless the processor has FEAT_S2FWB, and the host would read old bytes. `boot` refuses, therefore.
"""

from typing import NoReturn

from hwdbm.kvm.task import Task
from hwdbm.kvm.vcpu import VcpuFd

TOP = 1 << 40
"""Where a VM of type 0 ends."""

LISTING = {
    # x0: the first page; x1: the end; x2: the page that is next; x3: pages to the end of the chunk, of x4;
    # x5: an address without memory, at which a store exits; x7: the size of a page.
    "counting": """
        again:  ldrb    w6, [x2]
                add     w6, w6, #1
                strb    w6, [x2]
                add     x2, x2, x7
                cmp     x2, x1
                b.ne    1f
                mov     x2, x0
        1:      subs    x3, x3, #1
                b.ne    again
                str     wzr, [x5]
                mov     x3, x4
                b       again
    """,
    # w8: the random number, w9 and w10 its factor and term; w1: the number of pages; x12: where the iteration is.
    "random": """
        again:  madd    w8, w8, w9, w10
                umull   x11, w8, w1
                lsr     x11, x11, #32
                madd    x11, x11, x7, x0
                ldr     w13, [x12]
                str     w13, [x11]
                subs    x3, x3, #1
                b.ne    again
                str     wzr, [x5]
                mov     x3, x4
                b       again
    """,
}
"""The guests in assembler."""

CODE = {
    "counting": bytes.fromhex(
        "46004039 c6040011 46000039 4200078b 5f0001eb 41000054 e20300aa 630400f1 01ffff54 bf0000b9 e30304aa f5ffff17"
    ),
    "random": bytes.fromhex(
        "0829091b 0b7da19b 6bfd60d3 6b01079b 8d0140b9 6d0100b9 630400f1 21ffff54 bf0000b9 e30304aa f6ffff17"
    ),
}
"""The same in bytes."""


def boot(vcpu: VcpuFd, task: Task) -> NoReturn:
    """Refuse.

    Raises
    ------
    NotImplementedError
        Always: see above.
    """
    raise NotImplementedError(
        f"the {task.kind} guest can't run on arm64 yet: with its MMU off it writes around the caches, and the page "
        "tables that it needs are not written; guest='idle' works"
    )


def set_chunk(vcpu: VcpuFd, _kind: str, chunk: int) -> None:
    """Have a guest exit after every `chunk` pages from now on."""
    core = 0x6030_0000_0010_0000  # KVM_REG_ARM_CORE_REG(regs.regs[0]), in units of 32 bits
    left = int.from_bytes(vcpu.get_one_reg(core + 2 * 3), "little")
    vcpu.set_one_reg(core + 2 * 3, min(left, chunk).to_bytes(8, "little"))
    vcpu.set_one_reg(core + 2 * 4, chunk.to_bytes(8, "little"))


def at(vcpu: VcpuFd) -> int:
    """Return the address of the instruction that a vCPU is at."""
    pc = 0x6030_0000_0010_0040  # KVM_REG_ARM_CORE_REG(regs.pc)
    return int.from_bytes(vcpu.get_one_reg(pc), "little")
