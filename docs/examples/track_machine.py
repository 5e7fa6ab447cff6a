"""Track a machine that runs by its stage-2 tables, in its RAM: harvest, flush, copy, for a second.

The machine is hwdbm's own, an Arm machine that QEMU emulates. Of another one you need the file of its RAM, the address
that this begins at, VTTBR_EL2 and VTCR_EL2, a way to flush its TLBs, and one to stop its vCPUs.
"""

import sys
import time

from hwdbm.arm import ArmUnavailableError, ArmVm
from hwdbm.image import open_live

MEMORY = 16 << 20


def track(path: str, vttbr: int, vtcr: int, machine: ArmVm) -> bytearray:
    """Return a copy of slot 0's memory, made while its guests wrote."""
    page, memory = machine.page_size, machine.memory(0)
    live = open_live(path, ram_base=0x4000_0000, vttbr=vttbr, vtcr=vtcr)
    s2 = live.stage2(base_gfn=0x8000_0000 // page, npages=MEMORY // page)
    s2.enable_dbm()  # leaves that may be written become writable-clean: from the flush on, writes are recorded
    machine.board.flush()
    copy = bytearray(memory)
    machine.resume()
    end, rounds, copied = time.monotonic() + 1, 0, 0
    while True:
        last = time.monotonic() >= end
        if last:
            machine.pause()
        dirty = s2.harvest()  # one atomic operation for each leaf that is dirty
        machine.board.flush()  # before it, a vCPU may write without a mark; so nothing is copied before
        for first, size in (dirty.ranges() * page).tolist():
            copy[first : first + size] = memory[first : first + size].tobytes()
        rounds, copied = rounds + 1, copied + dirty.weight()
        if last:
            print(f"{rounds} harvests, {copied} pages copied, {machine.pages} stores of the guests")
            return copy


def main() -> int:
    """Track a machine, and compare."""
    try:
        machine = ArmVm(MEMORY, vcpus=2, guest="window", rate=200_000)
    except (ArmUnavailableError, ValueError) as error:
        print(f"no Arm machine here: {error}")
        return 1
    with machine:
        box = machine.board.mailbox
        copy = track(f"/proc/self/fd/{machine.board.ram.fd}", box.vttbr, box.vtcr, machine)
        equal = copy == machine.memory(0).tobytes()
    print("the copy is equal" if equal else "the copy differs")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
