"""The modelled machine: stores and loads a batch of 64 Ki, through the TLB and past it.

`time_numpy` is the floor: the same stores into the same memory, with no machine around it. Divide `ACCESSES` by the
time for accesses a second. Over 4 GiB in small pages the floor itself is what page walks allow the host: some 25 to 40
million a second.
"""

import numpy as np

from hwdbm.machine import Machine

SIZE = 1 << 30
NPAGES = SIZE // 4096
GPA = 1 << 32
ACCESSES = 1 << 20


class Accesses:
    """A random word of each page of 4 GiB, in an order of its own, while the log is on.

    ``hit`` finds all translations cached; ``half`` every other one; ``miss`` none, and leaves that a harvest has
    cleaned; ``flushed`` none, and leaves that are dirty.
    """

    params = ("hit", "half", "miss", "flushed")
    param_names = ("tlb",)
    number, repeat, warmup_time = 1, 9, 0  # what a harvest makes clean is touched once

    def setup(self, tlb):
        if not hasattr(self, "machine"):
            self.machine = Machine(thp=False)
            self.machine.add_memslot(4 * SIZE, GPA)
            self.memory = self.machine.space.find(0).memory
            self.memory.populate()
            self.vcpu = self.machine.vcpus[0]
            rng = np.random.default_rng(1)
            self.words = rng.permutation(ACCESSES) * 512 + rng.integers(0, 512, ACCESSES)
            self.gpas = GPA + self.words * 8
            self.values = self.gpas.astype(np.uint64)
            self.vcpu.store(self.gpas, self.values)
            self.machine.start_log()
        self.machine.dirty(0).commit()
        if tlb != "miss":
            part = slice(None, None, 2 if tlb == "half" else 1)
            self.vcpu.store(self.gpas[part].copy(), self.values[part].copy())  # it takes contiguous arrays
        if tlb == "flushed":
            slot = self.machine.log.slot(0)
            self.machine.flush(slot, 0, slot.npages)

    def time_store(self, tlb):
        self.vcpu.store(self.gpas, self.values)

    def time_load(self, tlb):
        self.vcpu.load(self.gpas)

    def time_numpy(self, tlb):
        memory = self.memory.words
        for start in range(0, ACCESSES, 1 << 16):
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
