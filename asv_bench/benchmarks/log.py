"""The dirty log over 64 GiB: what GET and CLEAR add to the harvest below them, and what they ask the TLBs for."""

import numpy as np

from hwdbm import DirtyBitmap, DirtyLog
from hwdbm.bench import suite
from hwdbm.machine import Machine

NPAGES = 1 << 24
STEP = 1 << 17  # 512 MiB, as v2 of the series


class Get:
    """KVM_GET_DIRTY_LOG, with and without manual protection, whole and in steps of 512 MiB."""

    params = ([0.0, 0.01, 0.5], ["whole", "steps", "manual"])
    param_names = ("dirty", "how")
    number, repeat, warmup_time = 1, 7, 0

    def setup(self, dirty, how):
        if not hasattr(self, "log"):
            self.log = DirtyLog(step_pages=STEP if how == "steps" else None, manual_protect=how == "manual")
            size = NPAGES << 12
            self.log.set_memory_region(slot=0, flags=1, guest_phys_addr=0, memory_size=size, userspace_addr=1 << 40)
            self.log.map(0, gfn=0, npages=NPAGES, pfn=0)
            self.entries = self.log.stage2(0).level(3)
            self.start = suite.dirtied(self.entries, dirty)
            self.log.get_dirty_log(0)
        np.copyto(self.entries, self.start)

    def time_get(self, dirty, how):
        self.log.get_dirty_log(0)

    def track_flushes(self, dirty, how):
        before = self.log.stats.flushes
        self.log.get_dirty_log(0)
        return self.log.stats.flushes - before


class Clients:
    """A harvest that feeds so many clients, and the take of one."""

    params = (1, 4, 16)
    param_names = ("clients",)
    number, repeat, warmup_time = 1, 7, 0

    def setup(self, clients):
        if not hasattr(self, "log"):
            self.log = DirtyLog()
            size = NPAGES << 12
            self.log.set_memory_region(slot=0, flags=1, guest_phys_addr=0, memory_size=size, userspace_addr=1 << 40)
            self.log.map(0, gfn=0, npages=NPAGES, pfn=0)
            self.clients = [self.log.client(str(number)) for number in range(clients)]
            self.start = suite.dirtied(self.log.stage2(0).level(3), 0.01)
        np.copyto(self.log.stage2(0).level(3), self.start)
        for client in self.clients:
            client.feeds[0].bitmap.clear()

    def time_take(self, clients):
        self.clients[0].take(0).commit()


class Clear:
    """KVM_CLEAR_DIRTY_LOG of 64 pages, and of the slot."""

    params = (64, NPAGES)
    param_names = ("pages",)
    number, repeat, warmup_time = 1, 7, 0

    def setup(self, pages):
        if not hasattr(self, "log"):
            self.log = DirtyLog(manual_protect=True)
            size = NPAGES << 12
            self.log.set_memory_region(slot=0, flags=1, guest_phys_addr=0, memory_size=size, userspace_addr=1 << 40)
            self.log.map(0, gfn=0, npages=NPAGES, pfn=0)
            self.start = suite.dirtied(self.log.stage2(0).level(3), 0.01)
            self.mask = DirtyBitmap(pages)
            self.mask.fill()
        np.copyto(self.log.stage2(0).level(3), self.start)
        self.log.get_dirty_log(0)

    def time_clear(self, pages):
        self.log.clear_dirty_log(0, 0, pages, self.mask)


class Pass:
    """A pass over 64 GiB as a migration makes it, with a machine's flush: GET, and with manual protection CLEAR.

    `time_sum` is the floor: one reading of the leaves.
    """

    params = ([0.0, 0.01], ["whole", "manual", "manual steps"])
    param_names = ("dirty", "how")
    number, repeat, warmup_time = 1, 9, 0

    def setup(self, dirty, how):
        if not hasattr(self, "machine"):
            steps = STEP if how == "manual steps" else None
            self.machine = Machine(manual_protect=how != "whole", step_pages=steps, thp=False)
            self.log = self.machine.log
            self.log.set_memory_region(slot=0, flags=1, guest_phys_addr=0, memory_size=NPAGES << 12, userspace_addr=0)
            self.log.map(0, gfn=0, npages=NPAGES, pfn=0)
            self.entries = self.log.stage2(0).level(3)
            self.start = suite.dirtied(self.entries, dirty)
            for vcpu in self.machine.vcpus:
                vcpu.attach(0, self.log.stage2(0).layout)
                vcpu.tlb[0].page[:] = 1  # backed, as that of a guest that has used its memory
            self.time_pass(dirty, how)
        np.copyto(self.entries, self.start)

    def time_pass(self, dirty, how):
        shown = self.log.get_dirty_log(0)
        if how != "whole":
            self.log.clear_dirty_log(0, 0, NPAGES, shown)

    def time_sum(self, dirty, how):
        self.entries.sum()
