"""vCPUs in compiled code that do what the MMU does, beside threads that track, change and copy what they write.

A vCPU is a thread that holds no interpreter lock. It walks the slot's tables, sets AF and the dirty bit by
compare-and-swap, caches what it found in a TLB, and stores: through a cached entry that may be written without looking
at the tables again, as hardware does. What it stores is the iteration that its page's harvester is in, and a number
of its own that never repeats, so that no two stores look alike.

`Stress` runs them beside two harvesters on halves of the slot, which copy what they found dirty; a host that writes
back; a thread that splits, collapses, unmaps and protects; and one that ages. It checks what KVM's dirty_log_test does:

* after each harvest, flush and copy, every page whose content differs from the copy is dirty (the last write before
  the look at least), and the next harvest reports it;
* no page holds an iteration that hasn't begun;
* what is unmapped or read-only doesn't change once the TLB was flushed;
* when all is stopped, one more harvest and copy makes the copy equal to the memory, and the host's copy too.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from numba import njit

from hwdbm import DirtyBitmap, Stage2, pte
from hwdbm.kernels import atomic

VCPUS = 2
STRIPE = 512
PAGE = 4  # words: the iteration, a number from each vCPU, and one that stays
RUN = 16  # entries of a contiguous run
WINDOW = 64  # pages that a vCPU works in before it goes on

# What threads and vCPUs tell each other: a word each, a cache line apart.
STOP, FLUSH, ACK, STORES, FAULTS, ITERATION = 0, 8, 16, 32, 48, 64
CONTROL = 80

DBM, WRITE, AF, CONT = np.uint64(pte.DBM), np.uint64(pte.S2AP_W), np.uint64(pte.AF), np.uint64(pte.CONTIGUOUS)

IN_RUN = 4  # what a walk returns for a level-3 leaf of a contiguous run


@njit(nogil=True)
def _walk(level1, level2, level3, first, page):
    """Do a write's walk for `page`: return the level of the leaf that may be written now, IN_RUN, or 0 for a fault."""
    one, two, three = np.uint64(1), np.uint64(2), np.uint64(3)
    while True:
        if atomic._load(level1, (first + page) // (STRIPE * STRIPE) - first // (STRIPE * STRIPE)) & three != three:
            return 0
        index = (first + page) // STRIPE - first // STRIPE
        d = atomic._load(level2, index)
        level = 2
        if d & three == three:
            level, index = 3, page
            d = atomic._load(level3, index)
            if d & three != three:
                return 0
        elif d & one == 0 or d & two != 0:
            return 0
        new = d | AF
        if d & WRITE == 0:
            if d & DBM == 0:
                return 0
            new |= WRITE
        if level == 2:
            if new == d or atomic._cas(level2, index, d, new) == d:
                return level
        elif new == d or atomic._cas(level3, index, d, new) == d:
            return IN_RUN if d & CONT else level
        # The descriptor isn't what was read: the walk begins anew.


@njit(nogil=True)
def vcpu(number, level1, level2, level3, first, memory, control, seed, dwell):
    """Store until told to stop, in one window of pages after the other."""
    npages = level3.size
    tlb3 = np.full(64, -1, np.int64)  # pages, and stripes, that may be written by what is cached
    tlb2 = np.full(8, -1, np.int64)
    runs = np.full(16, -1, np.int64)  # one entry of a run lets all of its pages be written
    x, value, seen = np.uint64(seed), np.uint64(0), np.uint64(0)
    window, left = 0, 0
    while not atomic._load(control, STOP):
        asked = atomic._load(control, FLUSH)
        if asked != seen:
            tlb3[:] = -1
            tlb2[:] = -1
            runs[:] = -1
            seen = asked
            atomic._swap(control, ACK + 8 * number, seen)  # all stores by what was cached are done
        x ^= x << np.uint64(13)
        x ^= x >> np.uint64(7)
        x ^= x << np.uint64(17)
        if left == 0:
            window = np.int64((x >> np.uint64(20)) % np.uint64(npages))
            left = dwell
        left -= 1
        page = (window + np.int64(x >> np.uint64(40)) % WINDOW) % npages
        stripe, run = (first + page) // STRIPE, (first + page) // RUN
        if tlb3[page % 64] != page and tlb2[stripe % 8] != stripe and runs[run % 16] != run:
            level = _walk(level1, level2, level3, first, page)
            if level == 0:
                atomic._swap(control, FAULTS + 8 * number, atomic._load(control, FAULTS + 8 * number) + np.uint64(1))
                left = 0
                continue
            if level == IN_RUN:
                runs[run % 16] = run
            elif level == 3:
                tlb3[page % 64] = page
            else:
                tlb2[stripe % 8] = stripe
        value += np.uint64(1)
        half = np.int64(page >= npages // 2 // 64 * 64)
        iteration = atomic._load(control, ITERATION + 8 * half)
        memory[page * PAGE] = iteration
        memory[page * PAGE + 1 + number] = value
        atomic._swap(control, STORES + 8 * number, value)
    atomic._swap(control, ACK + 8 * number, ~np.uint64(0))


@njit(nogil=True)
def join(level3, start):
    """Give a run of leaves the contiguous bit if all are mapped; each by an atomic exchange, as others write them."""
    for index in range(start, start + RUN):
        if atomic._load(level3, index) & np.uint64(3) != np.uint64(3):
            return
    for index in range(start, start + RUN):
        while True:
            d = atomic._load(level3, index)
            if d & np.uint64(3) != np.uint64(3) or atomic._cas(level3, index, d, d | CONT) == d:
                break


class StressError(AssertionError):
    """What a stress found."""


class Stress:
    """A slot with its threads; the hooks are what mutants override."""

    base, stripes, tail = 512 * 3 - 200, 60, 77

    def __init__(self, seed: int = 1, dwell: int = 300, **options: object) -> None:
        self.npages = self.stripes * STRIPE + self.tail
        self.s2 = Stage2(self.npages, self.base, **(options or {"shared": True}))
        self.s2.map(self.base, self.npages, pfn=self.base, dbm=True)
        self.memory = np.zeros(self.npages * PAGE, dtype=np.uint64)
        self.pages = self.memory.reshape(-1, PAGE)
        self.control = np.zeros(CONTROL, dtype=np.uint64)
        self.copy, self.disk = self.pages.copy(), self.pages.copy()
        self.seed, self.dwell, self.rounds = seed, dwell, [0, 0]
        self.error: list[BaseException] = []
        self.ends = 0.0
        self.flushing, self.host_lock = threading.Lock(), threading.Lock()
        self.counts: dict[str, int] = {}
        half = self.npages // 2 // 64 * 64
        self.halves = (0, half), (half, self.npages)

    def __repr__(self) -> str:
        stores = int(self.control[STORES:FAULTS:8].sum())
        return f"<{type(self).__name__}: {stores:,} stores, rounds {self.rounds}, {self.counts}>"

    # --- what mutants change -------------------------------------------------------------------------------

    def take(self, out: DirtyBitmap, lo: int, hi: int, turn: int) -> None:
        """Clean the part and report what was dirty, in one of the ways that a consumer has."""
        if turn % 3 == 0:
            self.s2.harvest_into(out, lo, hi - lo)
            return
        self.s2.peek_into(out, lo, hi - lo)
        if turn % 3 == 1:
            self.s2.clean(out)
        else:
            self.s2.track_part(out.part(lo, hi - lo), lo)

    def send(self, out: DirtyBitmap, lo: int, hi: int, turn: int) -> None:
        """Take the dirty pages, flush, and copy them."""
        self.take(out, lo, hi, turn)
        self.flush()
        self.copy_out(out)

    def flush(self) -> None:
        """Have every vCPU forget what it cached; the stores that it let through are done when this returns."""
        with self.flushing:
            number = int(self.control[FLUSH]) + 1
            self.control[FLUSH] = number
            while any(int(self.control[ACK + 8 * i]) < number for i in range(VCPUS)):
                time.sleep(0)
                if self.error:
                    return

    def copy_out(self, out: DirtyBitmap) -> None:
        index = out.pages()
        self.copy[index] = self.pages[index]

    # --- the threads ---------------------------------------------------------------------------------------

    def harvester(self, half: int) -> None:
        lo, hi = self.halves[half]
        expected = DirtyBitmap(self.npages)
        for turn in self.turns():
            stores = self.control[STORES:FAULTS:8].sum()
            out = DirtyBitmap(self.npages)
            before = int(self.control[ITERATION + 8 * half])
            self.send(out, lo, hi, turn)
            copied = self.copy[out.pages(), 0]
            missed = expected - out
            self.check(not missed.any(), f"pages {missed.ranges().tolist()[:3]} were written, and not reported")
            self.check(not copied.size or int(copied.max()) <= before, "a page holds an iteration that hasn't begun")
            (differ,) = (self.pages[lo:hi] != self.copy[lo:hi]).any(axis=1).nonzero()
            expected = DirtyBitmap.from_pages(differ + lo, self.npages)
            lost = expected - self.s2.dirty()
            self.check(not lost.any(), f"pages {lost.ranges().tolist()[:3]} differ from the copy, and are clean")
            self.control[ITERATION + 8 * half] = before + 1
            self.rounds[half] += 1
            while self.control[STORES:FAULTS:8].sum() < stores + 100 and not self.error and not self.over():
                time.sleep(0)  # enough writes for a round to mean something

    def host(self) -> None:
        """Write back what the host's flags say."""
        for _ in self.turns():
            self.write_back()
            time.sleep(0.002)

    def write_back(self) -> None:
        taken = self.s2.take_host_dirty()
        self.flush()
        index = taken.pages()
        self.disk[index] = self.pages[index]

    def structure(self) -> None:
        """Split, collapse, unmap, protect and age, all over the slot."""
        rng = np.random.default_rng(self.seed)
        verbs = self.verbs()
        for turn in self.turns():
            size = 2 * STRIPE if turn % 8 < 4 else self.npages + 1
            npages = int(rng.integers(1, size))
            first = int(rng.integers(self.npages - npages + 1))
            verb = verbs[turn % len(verbs)]
            verb(self.base + first, npages)
            self.counts[verb.__name__] = self.counts.get(verb.__name__, 0) + 1

    def verbs(self) -> tuple[Callable[[int, int], None], ...]:
        return self.protect, self.split, self.unmap, self.collapse

    def split(self, gfn: int, npages: int) -> None:
        self.s2.split(gfn, npages)
        self.flush()

    def collapse(self, gfn: int, npages: int) -> None:
        gfn = max(self.base, gfn // STRIPE * STRIPE)
        self.s2.collapse(gfn, min(npages + STRIPE, self.base + self.npages - gfn))
        self.flush()

    def unmap(self, gfn: int, npages: int) -> None:
        self.s2.unmap(gfn, npages)
        self.flush()
        with self.unchanged(gfn, npages, "unmapped"):
            self.wait()
        self.s2.map(gfn, npages, pfn=gfn, dbm=True)

    def protect(self, gfn: int, npages: int) -> None:
        self.s2.wrprotect(gfn, npages)
        self.flush()
        with self.unchanged(gfn, npages, "read-only"):
            self.wait()
        self.s2.allow_at(np.arange(gfn - self.base, gfn - self.base + npages), dbm=True)

    def wait(self) -> None:
        """Wait until both harvesters had a look: what a replacement forgot is found before it is written again."""
        rounds = [number + 2 for number in self.rounds]
        while any(number < least for number, least in zip(self.rounds, rounds, strict=True)):
            if self.error or self.over():
                return
            time.sleep(1e-4)

    def ages(self) -> None:
        """Age all, as the host does now and then, and without a flush."""
        for _ in self.turns():
            self.s2.mkold()
            self.s2.test_clear_young(self.base, self.npages // 2)
            time.sleep(1e-4)

    @contextmanager
    def unchanged(self, gfn: int, npages: int, what: str) -> Iterator[None]:
        part = self.pages[gfn - self.base : gfn - self.base + npages]
        before = part.copy()
        yield
        self.check(bool((part == before).all()), f"gfn {gfn:#x}: {what}, and written")

    # --- running -------------------------------------------------------------------------------------------

    def check(self, holds: bool, text: str) -> None:
        if not holds and not self.error:
            raise StressError(f"round {self.rounds}: {text}")

    def over(self) -> bool:
        """Whether time is up; a machine that is busy with other things has a minute more for three rounds."""
        late = time.monotonic() - self.ends
        return late > (0 if min(self.rounds) > 2 else 60)

    def turns(self) -> Iterator[int]:
        turn = 0
        while not self.error and not self.over():
            yield turn
            turn += 1

    def guarded(self, work: Callable[..., None], *arguments: object) -> threading.Thread:
        processors = sorted(os.sched_getaffinity(0))
        half = processors[len(processors) // 2 :] if work is vcpu else processors[: -(-len(processors) // 2)]

        def run() -> None:
            try:
                os.sched_setaffinity(0, half)  # else all may take turns on one, and nothing happens at the same time
                work(*arguments)
            except BaseException as error:  # noqa: BLE001 - the others stop, and the test raises it
                self.error.append(error)

        return threading.Thread(target=run, name=work.__name__)

    def run(self, seconds: float) -> None:
        """Run all for so long, stop the vCPUs, and check what is left; raise what any thread found."""
        tables = [self.s2.level(level) for level in (1, 2, 3)]
        vcpus = [
            self.guarded(vcpu, i, *tables, self.base, self.memory, self.control, 77 * self.seed + i, self.dwell)
            for i in range(VCPUS)
        ]
        self.control[ITERATION:CONTROL:8] = 1
        self.ends = time.monotonic() + seconds
        others = [self.guarded(self.harvester, i) for i in range(2)]
        others += [self.guarded(self.structure), self.guarded(self.ages), self.guarded(self.host)]
        for thread in (*vcpus, *others):
            thread.start()
        for thread in others:
            thread.join()
        self.control[STOP] = 1
        for thread in vcpus:
            thread.join()
        if self.error:
            raise self.error[0]
        self.finish()

    def finish(self) -> None:
        """With the vCPUs stopped: one more harvest and copy, one more look of the host, and nothing differs."""
        self.s2.verify()
        self.copy_out(self.s2.harvest())
        self.write_back()
        for copy, whose in ((self.copy, "copy"), (self.disk, "host's copy")):
            (differ,) = (self.pages != copy).any(axis=1).nonzero()
            self.check(not differ.size, f"pages {differ[:3].tolist()} of the {whose} aren't those of the memory")
