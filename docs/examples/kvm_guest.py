"""What a VMM does, on /dev/kvm: a guest runs, its dirty log is read now and then, and a page is watched.

Run it: python docs/examples/kvm_guest.py
"""

import sys
import time

from hwdbm.kvm import KvmUnavailableError, KvmVm

MEMORY = 16 << 20
ROUNDS = 4


def main() -> int:
    try:
        # The guest's code is a loop of a few instructions, which adds 1 to the first byte of each page in turn.
        vm = KvmVm(MEMORY, guest="counting", rate=20_000, manual_protect="on")
    except KvmUnavailableError as error:
        print(f"no KVM here: {error}")
        return 1
    with vm:
        slot = vm.slots[0]
        vm.start_log()
        vm.resume()
        for number in range(1, ROUNDS + 1):
            began = time.perf_counter()
            time.sleep(0.05)
            with vm.dirty(slot.id) as lease:  # KVM_GET_DIRTY_LOG, then KVM_CLEAR_DIRTY_LOG of what that showed
                seconds = time.perf_counter() - began
                pages = lease.bitmap.weight()
                runs = len(lease.bitmap.ranges())
            print(f"round {number}: {pages} pages in {runs} runs, {pages / seconds:.0f} pages a second")
        vm.pause()  # KVM_RUN has returned on every vCPU
        vm.check()  # raises if the counts in memory are none that the guest can have written
        print("the guest's memory is what its code wrote:", vm.memory(slot.id)[:: vm.page_size][:3].tolist())
    return 0


if __name__ == "__main__":
    sys.exit(main())
