"""Reading tables from a raw image."""

from pathlib import Path

from hwdbm.bench import suite
from hwdbm.image import open_image


class Read:
    """A slot of 64 GiB: 128 MiB of level-3 tables."""

    number, repeat, warmup_time = 1, 3, 0
    timeout = 120

    def setup_cache(self):
        return suite.raw_image(Path.cwd(), 1 << 24)  # asv runs in a folder that it removes

    def setup(self, cache):
        path, slot, vttbr, vtcr = cache
        self.image = open_image(path, ram_base=0, vttbr=vttbr, vtcr=vtcr, slots=[slot])
        self.slot = slot

    def time_stage2(self, cache):
        self.image.stage2(self.slot.id)
