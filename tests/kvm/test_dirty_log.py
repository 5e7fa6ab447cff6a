"""The invariants of the kernel's own dirty_log_test, on its dirty log, with a guest that runs.

The guest writes the number of the iteration to random pages, for ever; the host sets the number, lets the guest run,
collects, and looks at every page. It does so in two ways. ``stopped`` is how the kernel's test goes today: the guest
is paused for the second of two collections, and all is exact. ``running`` is how it went at first: nothing is ever
paused, and what was written about the time of a collection must be in the next one.
"""

import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from effort import EFFORT
from numpy.typing import NDArray

from hwdbm.errors import GuestExitError
from hwdbm.kvm import KvmVm, guest, guest_x86
from hwdbm.kvm.task import CODE_GPA

ITERATIONS = 16 * EFFORT  # the kernel's test makes 32 by default
INTERVAL = 0.01  # seconds
LEAST = 1024  # pages that the guest writes in an iteration, some of them twice
PATIENCE = 30.0  # seconds that it has for them
PAGE = 4096
NPAGES = (1 << 18) + 3  # a little more than 1 GiB, as in the kernel's test: the last word of the bitmap is ragged
SMALL = (64 << 20) // PAGE + 3

MODES: dict[str, dict[str, Any]] = {
    "bitmap": {},
    "clear": {"manual_protect": "on"},
    "clear-ragged": {"manual_protect": "initially-set"},
    "ring": {"ring": 4096},
    "small-ring": {"ring": 512, "vcpus": 2},
}
STORE = CODE_GPA + guest_x86.CODE["random"].index(b"\x89\x04\x13")  # movl %eax, (%ebx,%edx)

Make = Callable[..., KvmVm]
Flags = NDArray[np.bool_]
Collect = Callable[[KvmVm], Flags]


def collect(vm: KvmVm) -> Flags:
    """Return which pages are dirty, (npages,), and have them clean."""
    with vm.dirty(0) as lease:
        octets = lease.bitmap.words.view(np.uint8)
        return np.unpackbits(octets, bitorder="little")[: lease.bitmap.npages].view(np.bool_)


def in_flight(vm: KvmVm) -> dict[int, int]:
    """Return the pages that a paused guest is about to write, each with the number that it has read already.

    Such a page may be dirty: it was marked when the write faulted, and the guest was stopped before it was made anew.
    """
    pages = {}
    for vcpu in vm.vcpus:
        if guest.at(vcpu) == STORE:
            rax, _, _, rdx = struct.unpack_from("<4Q", vcpu.get("regs"))  # rax, rbx, rcx, rdx
            pages[(rdx & 0xFFFF_FFFF) // PAGE] = rax & 0xFFFF_FFFF
    return pages


@dataclass
class Judge:
    """dirty_log_test, with no loop over pages.

    It knows more than the kernel's: which pages the guest had in hand when it was stopped, rather than that they are
    the ring's last; and, running, what each page held when it was last looked at.
    """

    vm: KvmVm
    collect: Collect = collect
    number: int = 0
    dirty: int = 0
    clean: int = 0
    tracked: int = 0
    _before: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.memory = self.vm.memory(0).view(np.uint32)[:: PAGE // 4]
        self.seen: NDArray[np.uint32] = self.memory.copy()
        self.due: Flags = np.zeros(self.memory.size, dtype=np.bool_)  # pages that the next collection must have
        self.fresh = not self.seen.any()

    def stopped(self, iterations: int) -> None:
        """Collect from the running guest, then from the paused one, and look at every page."""
        for _ in range(iterations):
            self._next()
            written = self.vm.pages
            self.vm.resume()
            time.sleep(INTERVAL)
            running = self.collect(self.vm)
            self._await(written)
            self.vm.pause()
            paused = self.collect(self.vm)
            self._judge_stopped(running, running | paused)
        self.seen[:] = self.memory

    def _judge_stopped(self, running: Flags, dirty: Flags) -> None:
        number, values = self.number, self.memory.copy()
        now, before = in_flight(self.vm), self._before
        late = np.flatnonzero(~dirty & (values >= number))
        assert not late.size, self._says(late, values, "is clean, and was written in this iteration")
        old = dirty & (values != number)
        if self.fresh:  # a log may begin with all ones, and only the first collection can have them
            old &= ~(running & (values == 0))
        old[[page for page in now if values[page] < number]] = False
        old[[page for page, given in before.items() if values[page] == given]] = False
        wrong = np.flatnonzero(old)
        assert not wrong.size, self._says(wrong, values, f"is dirty, and was not written ({now=}, {before=})")
        self._before, self.fresh = now, False
        self._count(dirty)

    def running(self, iterations: int) -> None:
        """Collect from the running guest, and look at every page while it runs on."""
        self._next()
        self.vm.resume()
        for _ in range(iterations):
            written = self.vm.pages
            time.sleep(INTERVAL)
            self._await(written)
            dirty = self.collect(self.vm)
            self._judge_running(dirty, self.memory.copy())
            self._next()
        self.vm.pause()
        self._judge_running(self.collect(self.vm), self.memory.copy())
        assert not self.due.any(), self._says(np.flatnonzero(self.due), self.memory, "is clean, and changed; all stood")

    def _judge_running(self, dirty: Flags, values: NDArray[np.uint32]) -> None:
        number, due = self.number, self.due
        lost = np.flatnonzero(due & ~dirty)
        assert not lost.size, self._says(lost, values, "changed after the last collection, and this one hasn't it")
        garbage = np.flatnonzero(values > number)
        assert not garbage.size, self._says(garbage, values, "is of an iteration to come")
        # A vCPU may be between the fault that marked a page and the write, and stay there for as long as it likes.
        old = np.flatnonzero(dirty & (values != number) & (values != number - 1))
        assert old.size <= len(self.vm.vcpus), self._says(old, values, "is dirty, and is older")
        self.due = ~dirty & (values != self.seen)
        self.seen = values
        self.tracked += int(np.count_nonzero(self.due))
        self._count(dirty)

    def _next(self) -> None:
        self.number += 1
        self.vm.iteration = self.number

    def _await(self, written: int) -> None:
        until = time.monotonic() + PATIENCE
        while self.vm.pages - written < LEAST:
            assert time.monotonic() < until, f"the guest wrote {self.vm.pages - written} pages in {PATIENCE:g} s"
            time.sleep(0.001)

    def _count(self, dirty: Flags) -> None:
        marked = int(np.count_nonzero(dirty))
        self.dirty += marked
        self.clean += dirty.size - marked

    def _says(self, pages: NDArray[np.intp], values: NDArray[np.uint32], what: str) -> str:
        first = pages[0]
        return f"iteration {self.number}: page {first} has {values[first]} and {what}; {pages.size} such pages"


def raggedly(clear: Callable[..., None]) -> Callable[..., None]:
    """Return a CLEAR that goes in ragged pieces: words, and what is beyond the last whole one; of each, one page,
    and then the rest.
    """

    def clear_(slot: int, first: int, npages: int, bitmap: NDArray[np.uint64]) -> None:
        assert first == 0
        whole = npages // 64
        for start, stop in ((0, 1), (1, 3), (3, whole // 2), (whole // 2, whole), (whole, -(-npages // 64))):
            if start == stop:
                continue
            count = min(npages, stop * 64) - start * 64
            rest = bitmap[start:stop].copy()
            one = np.zeros_like(rest)
            if rest.any():
                word = int(rest.nonzero()[0][0])
                one[word] = rest[word] & (~rest[word] + np.uint64(1))  # its lowest bit
            rest ^= one
            clear(slot, start * 64, count, one)
            clear(slot, start * 64, count, rest)

    return clear_


def build(make: Make, mode: str, npages: int) -> KvmVm:
    """Return a VM whose memory ends where the guest's addresses do."""
    vm = make(npages * PAGE, guest="random", base=guest.top() - npages * PAGE, seed=7, **MODES[mode])
    if mode == "clear-ragged":
        vm.kernel.clear_dirty_log = raggedly(vm.kernel.clear_dirty_log)  # type: ignore[method-assign]
    return vm


@pytest.mark.parametrize(
    "mode", [pytest.param(mode, marks=() if mode in ("clear-ragged", "ring") else pytest.mark.slow) for mode in MODES]
)
@pytest.mark.alike(2)
def test_the_kernels_own_test(make: Make, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vm, full = build(make, mode, NPAGES), []
    for thread in vm._threads if "ring" in mode else ():
        empty = thread._when_full
        assert empty is not None
        monkeypatch.setattr(thread, "_when_full", lambda empty=empty: full.append(empty()) or full[-1])
    judge = Judge(vm)
    vm.start_log()
    judge.stopped(ITERATIONS)
    judge.running(ITERATIONS)
    print(f"{mode}: {judge.dirty} dirty, {judge.clean} clean, {judge.tracked} tracked, {len(full)} full rings")
    assert judge.dirty > ITERATIONS * LEAST
    assert judge.clean > ITERATIONS * NPAGES
    assert judge.tracked
    assert full or mode != "small-ring"
    vm.check()


def test_a_ring_that_is_full_and_empty_again_and_again_ends_its_vcpu(make: Make) -> None:
    """A hundred times another thread may have emptied it; one that had something in it begins to count anew."""
    vm = build(make, "ring", SMALL)
    thread, taken = vm._threads[0], 0
    thread._when_full = lambda: taken
    for _ in range(2):
        for _ in range(100):
            thread._make_room()
        taken = 1
        thread._make_room()
        taken = 0
    for _ in range(100):
        thread._make_room()
    with pytest.raises(GuestExitError):
        thread._make_room()


# --- mutants -----------------------------------------------------------------------------------------------


def losing(vm: KvmVm) -> Flags:
    """Mutant: of each answer, one page is lost."""
    dirty = collect(vm)
    if dirty.any():
        dirty[np.random.default_rng().choice(np.flatnonzero(dirty))] = False
    return dirty


def early(vm: KvmVm) -> Flags:
    """Mutant: the answer is from before the flush, and what was written until then is in none."""
    dirty = collect(vm)
    if vm.running:
        time.sleep(0.002)
    collect(vm)
    return dirty


def generous(vm: KvmVm) -> Flags:
    """Mutant: pages that were not written are dirty."""
    dirty = collect(vm)
    dirty[-3:] = True
    return dirty


def too_much(clear: Callable[..., None]) -> Callable[..., None]:
    """Mutant: CLEAR clears pages that it wasn't told to, which were written since the GET."""

    def clear_(slot: int, first: int, npages: int, bitmap: NDArray[np.uint64]) -> None:
        time.sleep(0.002)
        clear(slot, first, npages, np.full_like(bitmap, ~np.uint64(0)))

    return clear_


def too_little(clear: Callable[..., None]) -> Callable[..., None]:
    """Mutant: CLEAR leaves the second half as it is."""
    return lambda slot, first, npages, bitmap: clear(slot, first, npages // 128 * 64, bitmap)


CLEAN = "is clean, and was written in this iteration|changed after the last collection, and this one hasn't it"
DIRTY = "is dirty, and was not written|is dirty, and is older"


@pytest.mark.parametrize("way", ["stopped", "running"])
@pytest.mark.parametrize("mode", ["bitmap", "clear", "ring"])
@pytest.mark.parametrize(("mutant", "says"), [(losing, CLEAN), (early, CLEAN), (generous, DIRTY)])
@pytest.mark.alike(3)
def test_answers_that_are_wrong_are_found(make: Make, mutant: Collect, says: str, mode: str, way: str) -> None:
    vm = build(make, mode, SMALL)
    vm.start_log()
    with pytest.raises(AssertionError, match=says):
        getattr(Judge(vm, mutant), way)(100)


@pytest.mark.parametrize("way", ["stopped", "running"])
@pytest.mark.parametrize(("mutant", "says"), [(too_much, CLEAN), (too_little, DIRTY)])
def test_a_clear_that_is_wrong_is_found(
    make: Make, mutant: Callable[..., Any], says: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = build(make, "clear", SMALL)
    monkeypatch.setattr(vm.kernel, "clear_dirty_log", mutant(vm.kernel.clear_dirty_log))
    vm.start_log()
    with pytest.raises(AssertionError, match=says):
        getattr(Judge(vm), way)(100)


@pytest.mark.parametrize("number", [0, 1])
def test_a_number_that_is_wrong_is_found(make: Make, number: int) -> None:
    """Mutant: a page is of an iteration that never was, or holds an older one than was written to it."""
    vm = build(make, "bitmap", SMALL)
    vm.start_log()
    judge = Judge(vm)
    judge.stopped(3)

    written = np.zeros(SMALL, dtype=np.bool_)

    def torn(vm: KvmVm) -> Flags:
        dirty = collect(vm)
        np.logical_or(written, dirty, out=written)
        if not vm.running:
            # Of both collections: a busy machine may pause the guest before it has written anything after the first.
            in_hand = {*in_flight(vm), *judge._before}
            page = next(page for page in np.flatnonzero(written).tolist() if page not in in_hand)
            judge.memory[page] = 77 if number else 0
        return dirty

    judge.collect = torn
    with pytest.raises(AssertionError, match="is dirty, and was not written"):
        judge.stopped(1)
