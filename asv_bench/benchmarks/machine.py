"""The modelled machine: stores and loads a batch of 64 Ki, through the TLB and past it.

`time_numpy` is the floor: the same stores into the same memory, with no machine around it. Divide the 262,144 accesses
by the time for accesses a second.
"""

import numpy as np

from hwdbm.machine import Machine

SIZE = 1 << 30
NPAGES = SIZE // 4096
GPA = 1 << 30


class Accesses:
    """One access to each page of 1 GiB, in an order of its own, while the log is on."""

    params = ("hit", "half", "miss")
    param_names = ("tlb",)
    number, repeat, warmup_time = 1, 9, 0  # what a harvest makes clean is touched once

    def setup(self, tlb):
        if not hasattr(self, "machine"):
            self.machine = Machine(thp=False)
            self.machine.add_memslot(SIZE, GPA)
            self.vcpu = self.machine.vcpus[0]
            pages = np.random.default_rng(1).permutation(NPAGES)
            self.gpas = GPA + pages * 4096
            self.words = (self.gpas - GPA) // 8
            self.values = self.gpas.astype(np.uint64)
            self.vcpu.store(self.gpas, self.values)
            self.machine.start_log()
        self.machine.dirty(0).commit()
        if tlb != "miss":
            self.vcpu.store(*((self.gpas, self.values) if tlb == "hit" else (self.gpas[::2], self.values[::2])))

    def time_store(self, tlb):
        self.vcpu.store(self.gpas, self.values)

    def time_load(self, tlb):
        self.vcpu.load(self.gpas)

    def time_numpy(self, tlb):
        memory = self.machine.space.find(0).memory.words
        for start in range(0, NPAGES, 1 << 16):
            part = slice(start, start + (1 << 16))
            memory[self.words[part]] = self.values[part]


class Faults:
    """A first write to each page of 1 GiB under write-protection, 64 Ki faults at once."""

    number, repeat, warmup_time = 1, 5, 0

    def setup(self):
        if not hasattr(self, "machine"):
            self.machine = Machine(hw_dbm=False, thp=False)
            self.machine.add_memslot(SIZE, GPA)
            self.gpas = GPA + np.arange(NPAGES) * 4096
            self.values = self.gpas.astype(np.uint64)
            self.machine.vcpus[0].store(self.gpas, self.values)
            self.machine.start_log()
        self.machine.dirty(0).commit()

    def time_store(self):
        self.machine.vcpus[0].store(self.gpas, self.values)
