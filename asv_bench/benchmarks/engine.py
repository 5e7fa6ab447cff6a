"""The engine on 64 GiB of guest memory: 16,777,216 pages of 4 KiB, 128 MiB of descriptors."""

import numpy as np

import hwdbm  # asv takes a class in its name space with a method `track_...` for a benchmark: no Stage2 there
from hwdbm import DirtyBitmap, kernels
from hwdbm.bench import suite, visitor

NPAGES = 1 << 24


class Harvest:
    """`Stage2.harvest`, re-protecting; `time_sum` is its floor, `time_c_walker` a call a descriptor in C."""

    params = ([0.0, 0.0001, 0.01, 0.1, 0.5, 1.0], ["fused", "vector"])
    param_names = ("dirty", "kernels")
    number, repeat, warmup_time = 1, 9, 0  # the descriptors are put back before each call

    def setup(self, dirty, name):
        kernels.use(name)
        if not hasattr(self, "s2"):
            self.s2, self.out = suite.mapped(NPAGES), suite.backed(NPAGES)
            self.start = suite.dirtied(self.s2.level(3), dirty)
            self.walk = visitor.load()
            self.s2.harvest(self.out)  # compiles
        np.copyto(self.s2.level(3), self.start)

    def time_harvest(self, dirty, name):
        self.s2.harvest(self.out)

    def time_sum(self, dirty, name):
        self.s2.level(3).sum()

    def time_c_walker(self, dirty, name):
        if self.walk is None:
            raise NotImplementedError("there is no C compiler")
        self.walk(self.s2.level(3), self.out.words)

    def track_leaves_read(self, dirty, name):
        return self.s2.harvest_into(self.out).read

    def track_words_written(self, dirty, name):
        return self.s2.harvest_into(self.out).words

    def track_leaves_changed(self, dirty, name):
        return self.s2.harvest_into(self.out).changed


class Shared:
    """`Stage2.harvest` of shared leaves, with nobody beside; `Harvest` with `fused` kernels is its floor."""

    params = (0.0, 0.001, 0.01, 0.5, 1.0)
    param_names = ("dirty",)
    number, repeat, warmup_time = 1, 9, 0

    def setup(self, dirty):
        if not hasattr(self, "s2"):
            self.s2, self.out = suite.mapped(NPAGES, shared=True), suite.backed(NPAGES)
            self.start = suite.dirtied(self.s2.level(3), dirty)
            self.s2.harvest(self.out)
        np.copyto(self.s2.level(3), self.start)

    def time_harvest(self, dirty):
        self.s2.harvest(self.out)

    def track_leaves_changed(self, dirty):
        return self.s2.harvest_into(self.out).changed


class Enable:
    """`Stage2.enable_dbm` of every page; `time_copy` is its floor."""

    number, repeat, warmup_time = 1, 9, 0

    def setup(self):
        if not hasattr(self, "s2"):
            self.s2 = suite.mapped(NPAGES, dbm=False)
            self.start = self.s2.level(3).copy()
            self.target = self.start.copy()
        np.copyto(self.s2.level(3), self.start)

    def time_enable_dbm(self):
        self.s2.enable_dbm()

    def time_copy(self):
        np.copyto(self.target, self.start)


class Blocks:
    """The same memory as 2 MiB blocks."""

    params = (0.0, 0.01, 0.5, 1.0)
    param_names = ("dirty",)
    number, repeat, warmup_time = 1, 20, 0

    def setup(self, dirty):
        if not hasattr(self, "s2"):
            self.s2, self.out = suite.mapped(NPAGES, level=2), suite.backed(NPAGES)
            self.start = suite.dirtied(self.s2.level(2), dirty)
            self.s2.harvest(self.out)
        np.copyto(self.s2.level(2), self.start)

    def time_harvest(self, dirty):
        self.s2.harvest(self.out)

    def track_leaves_read(self, dirty):
        return self.s2.harvest_into(self.out).read


class Sparse:
    """One stripe in 64 mapped, and a slot of 1 TiB that never was."""

    def setup(self):
        self.s2, self.out = hwdbm.Stage2(NPAGES), suite.backed(NPAGES)
        for first in range(0, NPAGES, 512 * 64):
            self.s2.map(first, 512, pfn=first, dbm=True)
        self.s2.harvest(self.out)

    def time_harvest(self):
        self.s2.harvest(self.out)

    def track_leaves_read(self):
        return self.s2.harvest_into(self.out).read

    def track_resident_tebibyte(self):
        return suite.resident(1 << 28)

    track_resident_tebibyte.unit = "bytes"


class Bitmap:
    """What consumers do with a bitmap of 64 GiB, 1 % dirty."""

    def setup(self):
        rng = np.random.default_rng(1)
        self.bitmap = DirtyBitmap.from_pages(np.flatnonzero(rng.random(NPAGES) < 0.01), NPAGES)

    def time_weight(self):
        self.bitmap.weight()

    def time_ranges(self):
        self.bitmap.ranges()

    def time_pages(self):
        self.bitmap.pages()


class Limits:
    """The limits of `hwdbm bench`: 1 or less, and each row of a benchmark is within its own."""

    params = (["harvest", "shared", "enable", "map", "lists", "workers", "blocks"],)
    param_names = ("benchmark",)
    timeout = 600

    def track_part_of_the_limit(self, benchmark):
        rows = suite.run(suite.Setup(NPAGES), [benchmark])
        return max(row.ratio / row.limit for row in rows if row.limit)

    track_part_of_the_limit.unit = "times the limit"
