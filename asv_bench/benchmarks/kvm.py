"""A real kernel's dirty log: the bare ioctls, and the same through `KvmVm.dirty`, which costs 1.2 times at most."""

from statistics import median
from time import perf_counter

import numpy as np

from hwdbm.kvm import KvmUnavailableError, KvmVm, abi

BASE = 1 << 32
WRITES = 500  # pages that are dirty at each harvest


class Harvest:
    """One harvest of a large slot, by GET, and by GET and CLEAR under manual protection."""

    params = ([16, 64], ["get", "clear"])
    param_names = ("GiB", "how")
    number, repeat, warmup_time = 1, 15, 0

    def setup(self, gib, how):
        if not hasattr(self, "vm"):
            manual = "off" if how == "get" else "on"
            try:
                self.vm = KvmVm(gib << 30, guest="idle", base=BASE, manual_protect=manual)
            except KvmUnavailableError as error:
                raise NotImplementedError(str(error)) from None  # asv's word for a case that doesn't apply
            self.vm.start_log()
            self.npages = self.vm.slots[0].npages
        self.write()

    def write(self):
        for number in range(WRITES):
            page = number * 7919 % self.npages
            self.vm.vcpus[0].set_msr(abi.MSR_KVM_WALL_CLOCK_NEW, BASE + page * 4096)

    def time_bare(self, gib, how):
        words = np.empty(self.npages // 64, dtype=np.uint64)  # as in `dirty`: where it lies makes a difference of 30 %
        self.vm.kernel.get_dirty_log(0, words)
        if how == "clear":
            self.vm.kernel.clear_dirty_log(0, 0, self.npages, words)

    def time_dirty(self, gib, how):
        self.vm.dirty(0)

    def track_times_bare(self, gib, how):
        """Return how many times as long the harvest takes as the ioctls, the two in turn."""
        took = {self.time_bare: [], self.time_dirty: []}
        for turn in range(41):
            for what in sorted(took, key=lambda f: f.__name__, reverse=turn % 2 == 1):
                self.write()
                start = perf_counter()
                what(gib, how)
                took[what].append(perf_counter() - start)
        return median(took[self.time_dirty]) / median(took[self.time_bare])

    track_times_bare.unit = "times"
