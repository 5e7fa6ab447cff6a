"""Run an emulated Arm machine with its RAM as the file `ram` here, until that is removed: for `harvest ram --live`."""

import os
import sys
import time
from pathlib import Path

from hwdbm.arm import ArmUnavailableError, ArmVm

MEMORY = 16 << 20


def main(seconds: float = 300) -> int:
    """Say how the machine's tables are read, and let its guests write."""
    try:
        machine = ArmVm(MEMORY, vcpus=2, guest="window", rate=20_000)
    except (ArmUnavailableError, ValueError) as error:
        print(f"no Arm machine here: {error}")
        return 1
    link = Path("ram")
    with machine:
        link.unlink(missing_ok=True)
        link.symlink_to(f"/proc/{os.getpid()}/fd/{machine.board.ram.fd}")
        machine.start_log()  # its leaves are writable-clean, and hardware marks what is written
        machine.resume()
        box = machine.board.mailbox
        slot = f"0:{machine.slots[0].base_gfn * machine.page_size:#x}:{MEMORY >> 20}M"
        print(f"--ram-base 0x40000000 --vttbr {box.vttbr:#x} --vtcr {box.vtcr:#x} --slot {slot}", flush=True)
        end = time.monotonic() + seconds
        while link.is_symlink() and time.monotonic() < end:
            time.sleep(0.1)
    link.unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
