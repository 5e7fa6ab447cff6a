"""What recorded dirty bitmaps say of a guest: how fast it dirties memory, its working set, and where it writes.

Run it: python docs/examples/analyse_bitmaps.py [FOLDER INTERVAL]. The folder has a bitmap in KVM's layout for each
interval, of so many seconds, as `hwdbm migrate --replay` reads them; without one, a modelled guest is recorded first.
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from hwdbm import DirtyBitmap
from hwdbm.machine import HotSet, Machine

PAGE = 4096
CELLS = 64  # of the map


def record(folder: Path, intervals: int = 12, interval: float = 0.05) -> None:
    """Write what a modelled guest dirtied in each interval, a file each."""
    with Machine(thp=False) as machine:
        slot = machine.add_memslot(16 << 20)
        machine.run(HotSet(seed=7, share=0.1, weight=0.9, rate=20_000))
        machine.start_log()
        machine.resume()
        for number in range(intervals):
            time.sleep(interval)
            with machine.dirty(slot.id) as lease:
                (folder / f"{number:04}.bitmap").write_bytes(lease.bitmap.to_bytes())


def analyse(bitmaps: list[DirtyBitmap], interval: float) -> None:
    """Print the dirty rate, the working set as it grows, and a map of what was written most."""
    weights = np.array([bitmap.weight() for bitmap in bitmaps])
    print(f"{len(bitmaps)} intervals of {interval:g} s, {bitmaps[0].npages} pages of {PAGE} bytes")
    mib = weights.mean() * PAGE / interval / (1 << 20)
    print(f"dirty rate: {mib:.1f} MiB/s, {weights.max()} pages at most")
    union, sizes = DirtyBitmap(bitmaps[0].npages), []
    for bitmap in bitmaps:
        union |= bitmap
        sizes.append(union.weight())
    print("working set after 1, half and all of them:", *(sizes[i] for i in (0, len(sizes) // 2, -1)), "pages")
    # How often each page was dirty; words are summed bit by bit only here, where the pages matter.
    often = sum(np.unpackbits(bitmap.words.view(np.uint8), bitorder="little").astype(int) for bitmap in bitmaps)
    cells = [part.mean() / len(bitmaps) for part in np.array_split(often[: union.npages], CELLS)]
    print("write map:", "".join(" .:-=+*#%@"[min(int(cell * 10), 9)] for cell in cells))


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="bitmaps-") as scratch:
        if len(sys.argv) == 3:
            folder, interval = Path(sys.argv[1]), float(sys.argv[2])
        else:
            folder, interval = Path(scratch), 0.05
            record(folder, interval=interval)
        raws = [path.read_bytes() for path in sorted(folder.iterdir())]
    analyse([DirtyBitmap.from_bytes(raw, len(raw) * 8) for raw in raws], interval)


if __name__ == "__main__":
    main()
