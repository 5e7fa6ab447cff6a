"""What a harvest is compared with: what the guests say that they wrote, and which bytes have changed.

Shared by the tests of this folder, by the layouts, and by `make live`.
"""

import time

import numpy as np

from hwdbm import DirtyBitmap

CERTAIN = ("sequential", "random", "window", "zero", "pairs")
"""Kinds of guests whose writes are all counted: no page may be marked that they didn't write."""


class Judge:
    """Rounds in which guests write and harvests race them; each ends with the guests paused.

    Parameters
    ----------
    board, guests, memory
        The machine, its guests, and the bytes of what they write, ``(npages * page,)``.
    collect : callable
        Returns the DirtyBitmap of one harvest, which it has given to its argument, the copy, after the flush.
    """

    def __init__(self, board, guests, memory, collect):
        self.board, self.guests, self.collect = board, guests, collect
        self.pages = memory.reshape(guests.npages, -1)
        self.copy, self.copying = self.pages.copy(), True
        self.counts = guests.counts()
        self.stores = self.harvests = 0

    def round(self, harvests=3, stores=2000, seconds=20.0, content=True):
        """Let the guests run while harvests race them; return (missed, spurious, stale): numbers of pages.

        *missed* were written or have other bytes, and no harvest since the last round has them. *spurious* are in a
        harvest, and weren't written. *stale* differ from the copy that was made page by page after each harvest.
        Without `content` no bytes are looked at, nor copied, and a round takes some milliseconds.
        """
        found = DirtyBitmap(self.guests.npages)
        before, self.copying = self.guests.stores, content
        if content:  # the guests stand still, and all that they wrote is in a harvest: this is the copy so far
            start = self.pages.copy()
            self.copy[:] = start
        self.board.run()
        for number in range(harvests):
            until = time.monotonic() + seconds
            while self.guests.stores < before + stores * (number + 1) / harvests and time.monotonic() < until:
                time.sleep(0.0005)
            found |= self.take()
        self.board.stop()
        found |= self.take()
        counts = self.guests.counts()
        written, stale = counts != self.counts, 0
        if content:
            written |= (self.pages != start).any(axis=1)
            stale = int((self.pages != self.copy).any(axis=1).sum())
        marked = np.unpackbits(found.words.view(np.uint8), bitorder="little")[: self.guests.npages].astype(bool)
        self.counts, self.stores = counts, self.stores + self.guests.stores - before
        return int((written & ~marked).sum()), int((marked & ~written).sum()), stale

    def take(self):
        """Harvest, and copy what is dirty, as a migration does."""
        self.harvests += 1
        return self.collect(self.transfer)

    def transfer(self, dirty):
        """Copy the pages that are dirty."""
        for first, count in dirty.ranges().tolist() if self.copying else ():
            self.copy[first : first + count] = self.pages[first : first + count]
