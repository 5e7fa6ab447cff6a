"""The guests' code for x86: 32-bit protected mode, flat segments, paging off, no interrupts and no stack.

The listings are what GNU as (``as --32``) makes the bytes of; a test compares the two. All that a guest needs is in
its registers, so that its state is small: the code's page and `iteration` are the only memory beside what it writes.
"""

from hwdbm.kvm import abi
from hwdbm.kvm.task import CODE_GPA, Task
from hwdbm.kvm.vcpu import VcpuFd

PORT = 0xF1
"""The guest writes to this port when it has done a chunk. Nothing is there."""

TOP = 0xFEE0_0000
"""Where the addresses end that a guest may write to: above are the APICs and KVM's own pages (``KVM_SET_TSS_ADDR``)."""

LISTING = {
    # ebx: the first page; edi: the end; esi: the page that is next; ecx: pages to the end of the chunk, of edx.
    "counting": """
        again:  incb    (%esi)
                addl    $4096, %esi
                cmpl    %edi, %esi
                jne     1f
                movl    %ebx, %esi
        1:      decl    %ecx
                jnz     again
                outb    %al, $0xf1
                movl    %edx, %ecx
                jmp     again
    """,
    # ebp: the random number, x = x * 1664525 + 1013904223 mod 2**32 (Numerical Recipes' ranqd1), whose upper bits
    # choose: page = x * ecx >> 32, of ecx pages from ebx on; esi: pages to the end of the chunk, of edi.
    "random": """
        again:  imull   $1664525, %ebp, %ebp
                addl    $1013904223, %ebp
                movl    %ebp, %eax
                mull    %ecx
                shll    $12, %edx
                movl    0x11000, %eax
                movl    %eax, (%ebx,%edx)
                decl    %esi
                jnz     again
                outb    %al, $0xf1
                movl    %edi, %esi
                jmp     again
    """,
}
"""The guests in assembler."""

CODE = {
    "counting": bytes.fromhex("fe06 81c600100000 39fe 7502 89de 49 75ef e6f1 89d1 ebe9"),
    "random": bytes.fromhex(
        "69ed0d661900 81c55ff36e3c 89e8 f7e1 c1e20c a100100100 890413 4e 75e2 e6f1 89fe ebdc",
    ),
}
"""The same in bytes. `random` has the address of the iteration in it."""

_CODE_SEGMENT = (0, 0xFFFF_FFFF, 0x08, 11, 1, 0, 1, 1, 0, 1, 0, 0, 0)  # all of 4 GiB, readable, 32 bits, in pages
_DATA_SEGMENT = (0, 0xFFFF_FFFF, 0x10, 3, 1, 0, 1, 1, 0, 1, 0, 0, 0)
_PROTECTED, _EXTENSION_TYPE = 1 << 0, 1 << 4  # of CR0


def boot(vcpu: VcpuFd, task: Task) -> None:
    """Set a new vCPU's registers so that it begins with a task, and exits after each page.

    Raises
    ------
    ValueError
        If the memory reaches beyond `TOP`.
    """
    if task.end > TOP:
        raise ValueError(f"the guest's code is of 32 bits: its memory ends at {task.end:#x}, and not beyond {TOP:#x}")
    _, tables, _, cr2, cr3, _, cr8, _, apic_base, pending = abi.STRUCTS["kvm_sregs"].unpack(vcpu.get("sregs"))
    segment = abi.STRUCTS["kvm_segment"]
    code, data = segment.pack(*_CODE_SEGMENT), segment.pack(*_DATA_SEGMENT)
    task_state = segment.pack(0, 0xFFFF, 0, 11, 1, 0, 0, 0, 0, 0, 0, 0, 0)  # busy, as VMX asks for
    local_table = segment.pack(0, 0xFFFF, 0, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0)
    segments = code + 5 * data + task_state + local_table
    cr0 = _PROTECTED | _EXTENSION_TYPE
    sregs = abi.STRUCTS["kvm_sregs"].pack(segments, tables, cr0, cr2, cr3, 0, cr8, 0, apic_base, pending)
    vcpu.set("sregs", sregs)
    npages = (task.end - task.start) // task.page_size
    if task.kind == "counting":
        given = {"rbx": task.start, "rdi": task.end, "rsi": task.start, "rcx": 1, "rdx": 1}
    else:
        given = {"rbx": task.start, "rcx": npages, "rbp": task.seed, "rsi": 1, "rdi": 1}
    given |= {"rip": CODE_GPA, "rflags": 2}  # bit 1 is always set
    vcpu.set("regs", abi.STRUCTS["kvm_regs"].pack(*(given.get(name, 0) for name in _REGS)))


_REGS = (
    *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp"),
    *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"),
    *("rip", "rflags"),
)


_CHUNK = {"counting": ("rdx", "rcx"), "random": ("rdi", "rsi")}  # the registers with it, and with what is left of it


def set_chunk(vcpu: VcpuFd, kind: str, chunk: int) -> None:
    """Have a guest exit after every `chunk` pages from now on."""
    layout = abi.STRUCTS["kvm_regs"]
    found = dict(zip(_REGS, layout.unpack(vcpu.get("regs")), strict=True))
    whole, left = _CHUNK[kind]
    found[whole], found[left] = chunk, min(found[left], chunk)
    vcpu.set("regs", layout.pack(*found.values()))


def at(vcpu: VcpuFd) -> int:
    """Return the address of the instruction that a vCPU is at."""
    *_, rip, _ = abi.STRUCTS["kvm_regs"].unpack(vcpu.get("regs"))
    return int(rip)
