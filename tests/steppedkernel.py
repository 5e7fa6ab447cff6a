"""Kernels that change one descriptor at a time, with a hook before each: where hardware may step in.

Each operation is what a shared array would need: a plain read that selects, and one read-modify-write that returns
what was there and alone decides whether anything is changed, and which bits are set.
"""

from collections.abc import Callable

import numpy as np

from hwdbm.kernels import BOTH, Tally, vector

ALL = (1 << 64) - 1


class SteppedKernel:
    """An implementation of `hwdbm.kernels.Kernels`, for private and for shared arrays."""

    __name__ = "stepped"

    def __init__(self, hook: Callable[[], None]) -> None:
        self.hook = hook
        self.fill, self.find = vector.fill, vector.find
        self.merge, self.remove = vector.merge, vector.remove

    def _and_or(self, pte, i, keep, sets):
        self.hook()
        old = int(pte[i])
        pte[i] = old & keep | sets
        return old

    def _update(self, pte, i, update):
        """Apply `update` to a descriptor that matches; return what was there, or None if it doesn't match."""
        if not update.where(int(pte[i])):
            return None
        self.hook()
        old = int(pte[i])  # what is there now decides
        if not update.where(old):
            return None
        pte[i] = old & ~update.clears & ALL | update.sets
        return old

    @staticmethod
    def _note(old, bit, notes, *bitmaps):
        for match, words in zip(notes, bitmaps, strict=True):
            if match is not None and match(old):
                words[bit >> 6] |= np.uint64(1 << (bit & 63))

    def scan(self, pte, runs, match, out):
        for start, stop, bit in runs.tolist():
            for i in range(start, stop):
                self.hook()
                if match(int(pte[i])):
                    out[bit + i - start >> 6] |= np.uint64(1 << (bit + i - start & 63))

    def rewrite(self, pte, runs, update, out, also, notes=BOTH):
        every = np.full(out.size, ALL, dtype=np.uint64)
        return self.rewrite_within(pte, runs, update, every, out, also, notes)

    def rewrite_within(self, pte, runs, update, within, out, also, notes=BOTH):
        read, changed, words = 0, 0, set()
        for start, stop, bit in runs.tolist():
            for i in range(start, stop):
                at = bit + i - start
                if int(within[at >> 6]) >> (at & 63) & 1:
                    read += 1
                    old = self._update(pte, i, update)
                    if old is not None:
                        self._note(old, at, notes, out, also)
                        changed += 1
                        words.add(at >> 6)
        return Tally(read, changed, len(words))

    def exchange(self, pte, runs, values, out, also, notes=BOTH):
        at = 0
        for start, stop, bit in runs.tolist():
            for i in range(start, stop):
                old = self._and_or(pte, i, 0, int(values[at]))
                values[at] = old
                self._note(old, bit + i - start, notes, out, also)
                at += 1

    def rewrite_all(self, entries, update, place, out, also, kept, notes=BOTH):
        _, size, lo, hi, _ = place
        changed, words = 0, 0
        for i in range(entries.size):
            old = self._update(entries, i, update)
            if old is not None:
                self._note_at(old, i, place, out, also, kept, notes)
                changed += 1
                start = place.first + i * size
                words += max(0, min(start + size, hi) - max(start, lo) + 63 >> 6)
        return Tally(entries.size, changed, words)

    def rewrite_at(self, entries, index, update, place, out, also, kept, notes=BOTH):
        changed = 0
        for i in index.tolist():
            old = self._update(entries, i, update)
            if old is not None:
                self._note_at(old, i, place, out, also, kept, notes)
                changed += 1
        return changed

    def change_at(self, entries, index, update):
        return sum(self._update(entries, i, update) is not None for i in index.tolist())

    def exchange_at(self, entries, index, values, place, out, also, kept, notes=BOTH):
        for k, i in enumerate(index.tolist()):
            old = self._and_or(entries, i, 0, int(values[k]))
            values[k] = old
            self._note_at(old, i, place, out, also, kept, notes)

    def set_at(self, entries, index, bits):
        for k, i in enumerate(index.tolist()):
            self._and_or(entries, i, ALL, int(bits[k]))

    @staticmethod
    def _note_at(old, i, place, out, also, kept, notes):
        if not any(match is not None and match(old) for match in notes):
            return
        array = np.array([old], dtype=np.uint64)
        vector._note_at(array, np.array([i]), notes, place, out, also, kept)
