"""A pre-copy loop of one's own: passes over the dirty pages of a running guest, then a pause and the rest.

Run it: python docs/examples/precopy_loop.py
"""

import time

import numpy as np

from hwdbm.machine import HotSet, Machine
from hwdbm.vm import MemoryMap, PlainGuest, Source

MAX_DOWNTIME = 0.050  # seconds that the guest may stand still
MOST_PASSES = 20


def send(source: Source, there: PlainGuest, slot_id: int, pages: np.ndarray) -> int:
    """Copy runs of pages (start and length, in bytes) to the destination; return how many bytes that was."""
    here = source.memory(slot_id)
    for start, length in pages.tolist():
        there.memory(slot_id)[start : start + length] = here[start : start + length]
    return int(pages[:, 1].sum())


def one_pass(source: Source, there: PlainGuest) -> tuple[int, float]:
    """Send what is dirty now. An exception in the block rolls the lease back, and no page is lost."""
    began, sent = time.perf_counter(), 0
    for slot in source.slots:
        with source.dirty(slot.id) as lease:  # the TLB was flushed when this returned: copy as much as you like
            sent += send(source, there, slot.id, lease.bitmap.ranges(unit=source.page_size))
    return sent, max(time.perf_counter() - began, 1e-9)


def migrate(source: Source, there: PlainGuest) -> None:
    """Move a running guest's memory; the guest is paused when it returns, and equal on both sides."""
    source.start_log()  # first, so that the first pass may miss nothing that is written behind it
    began = time.perf_counter()
    sent = sum(send(source, there, slot.id, np.array([[0, slot.npages * source.page_size]])) for slot in source.slots)
    seconds = max(time.perf_counter() - began, 1e-9)
    for number in range(1, MOST_PASSES + 1):
        print(f"pass {number}: {sent >> 10} KiB in {seconds * 1e3:.1f} ms")
        # The rest is what the guest dirtied meanwhile. If it dirties no faster than this loop sends, the pause
        # is no longer than the pass was.
        if seconds < MAX_DOWNTIME:
            break
        sent, seconds = one_pass(source, there)
    source.pause()  # no write happens after this returned
    sent, seconds = one_pass(source, there)
    print(f"paused: {sent >> 10} KiB in {seconds * 1e3:.1f} ms")
    source.stop_log()


def main() -> None:
    with Machine(thp=False) as source:
        source.add_memslot(32 << 20, gpa=0x4000_0000)
        source.run(HotSet(share=0.05, rate=100_000))
        source.resume()
        with PlainGuest(MemoryMap.of(source)) as there:
            migrate(source, there)
            print("equal on both sides:", source.digest() == there.digest())


if __name__ == "__main__":
    main()
