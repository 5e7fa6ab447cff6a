"""Compiled code with a page behind, or before, each of its arrays that nobody may touch: a process of its own.

`python tests/guards.py SEED ROUNDS [NOTES]` gives every kernel, and every verb of a Stage2 and a DirtyLog that reaches
one, arguments at random, good and bad. What reads or writes outside of an array ends the process with a SIGSEGV.
Arguments that are refused must have changed nothing. The file NOTES has the last call.
"""

import ctypes
import faulthandler
import mmap
import os
import sys
from typing import Any

import numpy as np

from hwdbm import DirtyBitmap, DirtyLog, Granule, Stage2, kernels, pte
from hwdbm.bitmap import word_count
from hwdbm.kernels import BOTH, Notes, Place
from hwdbm.stage2 import Layout

PAGE = mmap.PAGESIZE
ODD = (-1, 0, 1, 63, 64, 1 << 31, (1 << 62) + 1, (1 << 63) - 64, (1 << 63) - 1, -(1 << 63), -64)
SIZES = (0, 1, 63, 64, 65, 127, 128, 129, 500, 512, 513, 1025)
RULES = (pte.clean, pte.track, pte.wrprotect, pte.arm, pte.mkold)
MATCHES = (pte.dirty, pte.writable, pte.leaf)
_mprotect = ctypes.CDLL(None, use_errno=True).mprotect
_mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_notes = os.memfd_create("notes")  # of the last call, or a file's descriptor


def guarded(array: np.ndarray, *, behind: bool) -> np.ndarray:
    """Return a copy that ends, or begins, where a page begins, or ends, that can be neither read nor written."""
    size = -(-array.nbytes // PAGE) * PAGE
    room = mmap.mmap(-1, size + 2 * PAGE)
    whole = np.frombuffer(room, dtype=np.uint8)
    for start in (0, size + PAGE):
        if _mprotect(whole.ctypes.data + start, PAGE, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    start = size + PAGE - array.nbytes if behind else PAGE
    copy = whole[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


class Draw:
    """Arguments at random."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def one(self, several: Any) -> Any:
        """Return one of several."""
        return several[int(self.rng.integers(len(several)))]

    def often(self, share: float = 0.85) -> bool:
        """Return True for this share of the calls."""
        return bool(self.rng.random() < share)

    def array(self, array: np.ndarray) -> np.ndarray:
        """Return a guarded copy."""
        return guarded(array, behind=self.often(0.5))

    def number(self, high: int) -> int:
        """Return a number of [0, high], or now and then another one."""
        return int(self.rng.integers(high + 1)) if self.often(0.95) else self.one((*ODD, high + 1, high + 64))

    def words(self, count: int) -> np.ndarray:
        """Return words for a bitmap, now and then of the wrong size."""
        count = count if self.often(0.9) else max(0, count + self.one((-2, -1, 1)))
        return self.array(self.rng.integers(0, 1 << 64, count, dtype=np.uint64) * np.uint64(self.often(0.5)))

    def descriptors(self, count: int, level: int) -> np.ndarray:
        """Return descriptors of all kinds."""
        kinds = [0, pte.TABLE]
        kinds += [pte.make_leaf(1 << 21, level, dbm=True, dirty=dirty) for dirty in (False, True)]
        kinds += [pte.make_leaf(1 << 21, level, writable=writable) for writable in (False, True)]
        return self.array(np.array(kinds, dtype=np.uint64)[self.rng.integers(len(kinds), size=count)])

    def runs(self, size: int, bits: int) -> np.ndarray:
        """Return rows (start, stop, bit), mostly sorted, disjoint and inside."""
        number = self.one((0, 1, 1, 2, 3, 7))
        edges = np.sort(self.rng.integers(0, size + 1, 2 * number)).reshape(-1, 2)
        rows = np.concatenate([edges, edges[:, :1]], axis=1).astype(np.int64)
        if self.often(0.5):
            rows[:, 2] = np.minimum(rows[:, 2] & ~63, max(bits, 0))
        if rows.size and not self.often(0.7):
            rows[self.rng.integers(number), self.rng.integers(3)] = self.number(max(size, bits))
        if not self.often(0.95):
            self.rng.shuffle(rows)
        return self.array(rows)

    def index(self, size: int) -> np.ndarray:
        """Return entries, each once, mostly inside."""
        found = np.flatnonzero(self.rng.random(size) < self.one((0.0, 0.1, 1.0))).astype(np.int64)
        if found.size and not self.often(0.8):
            found[self.rng.integers(found.size)] = self.one((*ODD, size, size + 1))
        return self.array(found)

    def notes(self) -> Notes:
        """Return what to note."""
        return self.one((BOTH, Notes(None, None), Notes(pte.dirty(3), pte.writable(3))))


def attempt(call: Any, *args: Any, **options: Any) -> bool:
    """Make a call, and return whether it was taken; if not, what it was given must be as it was."""
    given = [each for each in args if isinstance(each, np.ndarray)]
    before = [each.copy() for each in given]
    shown = [each.shape if isinstance(each, np.ndarray) else each for each in args]
    rows = [each.tolist() for each in given if each.dtype == np.int64]
    said = f"{getattr(call, '__qualname__', call)} {shown} {rows} {options}"
    os.pwrite(_notes, said[:2000].ljust(2000).encode(), 0)
    try:
        call(*args, **options)
    except (TypeError, ValueError, OSError, MemoryError):
        if any(not np.array_equal(each, was) for each, was in zip(given, before, strict=True)):
            raise AssertionError("what it was given has changed") from None
        return False
    return True


def kernel_calls(draw: Draw, implementation: Any) -> int:
    """Call each function of an implementation; return how many calls were taken."""
    size, level = draw.one(SIZES), 3
    entries, count = draw.descriptors(size, level), word_count(size)
    out, also, within = draw.words(count), draw.words(count), draw.words(count)
    runs = draw.runs(size, size)
    total = int((runs[:, 1] - runs[:, 0]).sum()) if runs.size and abs(runs).max() < 1 << 20 else 3
    values = draw.descriptors(max(total, 0) if draw.often(0.9) else draw.one(SIZES), level)
    index, spread = draw.index(size), draw.one((1, 16, 512))
    pages = min(size * spread, 1 << 20)
    first = -int(draw.rng.integers(spread)) if draw.often(0.8) else draw.one((0, -5, 1 << 52, 1 << 60, -(1 << 63)))
    place = Place(
        first, spread if draw.often(0.95) else draw.one((0, -1, 1 << 40, 1 << 62)),
        draw.number(pages // 2), pages - draw.number(pages // 3), pages if draw.often() else draw.number(pages + 1),
    )  # fmt: skip
    wide = [draw.words(word_count(pages)) for _ in range(3)]
    if draw.often(0.2):
        wide[2] = draw.words(0)
    at = draw.descriptors(index.size if draw.often(0.9) else draw.one(SIZES), 2)
    blocks = draw.descriptors(size, 2)
    ranges = draw.runs(count * 64, 0)[:, :2].copy()
    calls = [
        ("scan", entries, runs, draw.one(MATCHES)(3), out),
        ("rewrite", entries, runs, draw.one(RULES)(3), out, also, draw.notes()),
        ("rewrite_within", entries, runs, draw.one(RULES)(3), within, out, also, draw.notes()),
        ("exchange", entries, runs, values, out, also, draw.notes()),
        ("rewrite_all", draw.array(blocks), draw.one(RULES)(2), place, *wide, draw.notes()),
        ("rewrite_at", blocks, index, draw.one(RULES)(2), place, *wide, draw.notes()),
        ("exchange_at", blocks, index, at, place, *wide, draw.notes()),
        ("change_at", blocks, index, draw.one(RULES)(2)),
        ("set_at", blocks, index, at),
        ("fill", out, draw.array(ranges)),
        ("find", blocks, draw.one(MATCHES)(2)),
        ("merge", out, also),
        ("remove", out, within),
    ]
    return sum(attempt(getattr(implementation, name), *args) for name, *args in calls if hasattr(implementation, name))


def stage2_calls(draw: Draw, name: str) -> int:
    """Call each verb of a Stage2 over guarded arrays, with guarded bitmaps; return how many calls were taken."""
    npages, base = draw.one([size for size in SIZES if size]), draw.one((0, 7, 0x100, 512))
    layout = Layout(npages, base, Granule.K4)
    arrays = {level: draw.array(np.zeros(layout.count(level), dtype=np.uint64)) for level in (1, 2, 3)}
    own = {"shared": True} if name == "atomic" else {"kernels": name}
    s2 = Stage2(npages, base, arrays=arrays, **own)
    s2.host_dirty = DirtyBitmap.from_words(draw.array(np.zeros(word_count(npages), dtype=np.uint64)), npages)
    s2.map(base, npages, pfn=0x1000, dbm=draw.often(0.5))
    start = -base % 512
    if start + 512 <= npages and draw.often(0.6):
        s2.map(base + start, 512, pfn=0x2000, level=2, dbm=True)
        s2.level(2)[layout.index(2, start)] |= np.uint64(pte.S2AP_W)
    s2.level(3)[:: draw.one((1, 3, 70))] |= s2.level(3)[::1][0] & np.uint64(pte.S2AP_W)

    def bitmap(count: int = npages) -> DirtyBitmap:
        count = count if draw.often(0.9) else max(0, count + draw.one((-64, -1, 1, 64)))
        made = DirtyBitmap.from_pages(np.flatnonzero(draw.rng.random(count) < draw.one((0, 0.1, 1.0))), count)
        return DirtyBitmap.from_words(draw.array(made.words), count)

    first, count = draw.number(npages) & ~63, draw.number(npages)
    gfn, rest = base + draw.number(npages), draw.number(npages)
    pages = [draw.number(npages - 1) for _ in range(draw.one((0, 1, 5, 70)))]
    frames = np.arange(len(pages) if draw.often(0.9) else 3) + 0x4000
    taken = 0
    for call in (
        lambda: s2.harvest(bitmap(), first, count), lambda: s2.harvest_into(bitmap(), first, count),
        lambda: s2.peek_into(bitmap(), first, count), lambda: s2.take_saved_into(bitmap(), first, count),
        lambda: s2.clean(bitmap()), lambda: s2.enable_dbm(bitmap()), lambda: s2.track_part(bitmap(count), first),
        lambda: s2.wrprotect_part(bitmap(count), first), lambda: s2.unmap(gfn, rest), lambda: s2.split(gfn, rest),
        lambda: s2.collapse(gfn, rest), lambda: s2.map(gfn, rest, 0x7000), lambda: s2.set_dbm(gfn, rest),
        lambda: s2.clear_dbm(gfn, rest), lambda: s2.wrprotect(gfn, rest), lambda: s2.mkold(gfn, rest),
        lambda: s2.test_clear_young(gfn, rest), lambda: s2.leaf_at(pages), lambda: s2.map_at(pages, frames),
        lambda: s2.relax_at(pages, dbm=True), lambda: s2.allow_at(pages), lambda: s2.mkyoung_at(pages),
        lambda: s2.mmu_update(3, np.array(pages, dtype=np.int64), bits_at(pages)),
        lambda: s2.mmu_update(3, np.array(pages, dtype=np.int64), bits_at(pages)[:1]),
        lambda: s2.block_spans(first, count), lambda: s2.mapped(first, count), s2.dirty, s2.take_host_dirty, s2.verify,
    ):  # fmt: skip
        taken += attempt(call)
    return taken


def bits_at(pages: list[int]) -> np.ndarray:
    """Return what an MMU would set at some pages."""
    return np.full(len(pages), pte.AF | pte.S2AP_W, dtype=np.uint64)


def log_calls(draw: Draw, name: str) -> int:
    """Call the verbs of a log that take arrays; return how many calls were taken."""
    kernels.use(name)
    npages = draw.one([size for size in SIZES if size])
    log = DirtyLog(manual_protect=draw.often(0.5), step_pages=draw.one((None, 64, 128)))
    log.set_memory_region(0, 1, 0, npages << 12, 1 << 30)
    log.map(0, 0, npages, 0x1000)
    log.stage2(0).level(3)[::3] |= np.uint64(pte.S2AP_W)
    first, count = draw.number(npages) & ~63, draw.number(npages)
    mask = draw.words(word_count(min(max(count, 0), 1 << 20)))
    pages = draw.index(npages)
    frames = draw.array(np.arange(pages.size, dtype=np.int64))
    calls = [
        (log.clear_dirty_log, 0, first, count, mask), (log.write_faults, 0, pages),
        (log.write_faults, 0, pages, frames), (log.mark_dirty, 0, first, count), (log.sync, 0, first, count),
    ]  # fmt: skip
    taken = sum(attempt(call, *args) for call, *args in calls)
    return taken + attempt(log.get_dirty_log, 0) + attempt(log.verify)


def main(seed: int, rounds: int) -> None:
    """Do so many rounds, and say how much was taken of what was tried."""
    faulthandler.enable()
    names = [name for name in ("vector", "fused", "atomic") if name == "vector" or "fused" in kernels.available()]
    taken = dict.fromkeys(names, 0)
    for number in range(rounds):
        for name in names:
            draw = Draw(seed + number)
            implementation = kernels.shared() if name == "atomic" else kernels.named(name)
            taken[name] += kernel_calls(draw, implementation) + stage2_calls(draw, name)
            if name != "atomic":
                taken[name] += log_calls(draw, name)
    print(" ".join(f"{name}:{count}" for name, count in taken.items()))


if __name__ == "__main__":
    if len(sys.argv) > 3:
        _notes = os.open(sys.argv[3], os.O_RDWR | os.O_CREAT)
    main(int(sys.argv[1]), int(sys.argv[2]))
