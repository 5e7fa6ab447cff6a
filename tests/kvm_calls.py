"""Calls that the kernel and the model are both asked, and how random ones are drawn.

A call is a value: it is written down with its answer, and asked again later. The same drawing serves Hypothesis, whose
`randoms` shrink, and the recording, which has a seed. It leans towards edges: of words, pages, slots and limits.
"""

from collections import Counter
from dataclasses import astuple, dataclass, fields
from errno import errorcode
from random import Random

import numpy as np

PAGE = 4096
U64 = 1 << 64
ARENA = 64 << 20
"""Bytes of backing. A `hva` below is an offset into it, and any other an address."""

NPAGES = (1, 2, 63, 64, 65, 127, 128, 129, 200, 511, 512, 513, 1100)
OFFSETS = (0, 0, 4, 2048, 4084, 4085, 4088, 4091, 4092, 4093, 4095)
"""Where in a page a write begins: 4084 is the last at which 12 bytes fit, 4092 the last at which 4 do."""

ANY_FLAGS = (0, 1, 1, 1, 1, 1, 1, 1, 3, 2)


@dataclass(frozen=True, slots=True)
class Limits:
    """What differs between kernels: the numbers that a rule holds up to."""

    arch: str
    nr_memslots: int
    address_spaces: int
    gpa_bits: int


@dataclass(frozen=True, slots=True)
class Region:
    """KVM_SET_USER_MEMORY_REGION."""

    slot: int
    flags: int
    gpa: int
    size: int
    hva: int


@dataclass(frozen=True, slots=True)
class Write:
    """Set the wall clock's MSR, so that KVM writes 12 bytes at a guest physical address."""

    gpa: int


@dataclass(frozen=True, slots=True)
class Get:
    """KVM_GET_DIRTY_LOG. Its answer is a bitmap, as runs."""

    slot: int


@dataclass(frozen=True, slots=True)
class Clear:
    """KVM_CLEAR_DIRTY_LOG with a mask of so many words, given as runs; behind its last word nothing can be read."""

    slot: int
    first: int
    pages: int
    words: int
    mask: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Protect2:
    """KVM_ENABLE_CAP of KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2."""

    bits: int


Call = Region | Write | Get | Clear | Protect2
Answer = int | tuple[int, ...]
"""0, or an errno; for a GET that succeeds the runs of its bitmap."""

KINDS = {"region": Region, "write": Write, "get": Get, "clear": Clear, "protect2": Protect2}
NAMES = {kind: name for name, kind in KINDS.items()}


def to_json(call: Call, answer: Answer) -> list:
    return [NAMES[type(call)], *astuple(call), answer]


def from_json(line: list) -> tuple[Call, Answer]:
    name, *values, answer = (tuple(value) if isinstance(value, list) else value for value in line)
    return KINDS[name](*values), answer


def to_runs(words: np.ndarray) -> tuple[int, ...]:
    """Return the runs of set bits, flat: start, length, start, length. It shares nothing with `DirtyBitmap`."""
    bits = np.unpackbits(words.astype("<u8").view(np.uint8), bitorder="little")
    edges = np.flatnonzero(np.diff(bits, prepend=0, append=0))
    edges[1::2] -= edges[::2]
    return tuple(edges.tolist())


def to_words(runs: tuple[int, ...], nwords: int) -> np.ndarray:
    bits = np.zeros(64 * nwords, dtype=np.uint8)
    for start, length in zip(runs[::2], runs[1::2], strict=True):
        bits[start : start + length] = 1
    return np.packbits(bits, bitorder="little").view("<u8").astype(np.uint64)


class Drawing:
    """What is known of a VM from its answers, and calls that make sense, or barely don't, for it."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.slots: dict[int, Region] = {}

    def learn(self, call: Call, answer: Answer) -> None:
        if isinstance(call, Region) and answer == 0:
            if call.size:
                self.slots[call.slot] = call
            else:
                del self.slots[call.slot]

    # --- drawing -----------------------------------------------------------------------------------------

    def draw(self, random: Random) -> Call:
        if len(self.slots) < 2:
            return self.new(random)
        kinds = (self.write,) * 10 + (self.get,) * 4 + (self.clear,) * 5 + (self.change,) * 4
        return random.choice((*kinds, self.new, self.new, self.odd))(random)

    def slot(self, random: Random) -> int:
        """A slot's id: mostly one that logs."""
        logging = [slot for slot, region in sorted(self.slots.items()) if region.flags & 1]
        kind = random.randint(0, 19)
        if logging and kind < 16:
            return random.choice(logging)
        if self.slots and kind < 18:
            return random.choice(sorted(self.slots))
        return self.any_slot(random) if kind < 19 else self.no_slot(random)

    def any_slot(self, random: Random) -> int:
        if not random.randint(0, 9):
            return self.no_slot(random)
        return random.choice((0, 1, 2, 3, self.limits.nr_memslots - 1, (self.limits.address_spaces - 1 << 16) + 1))

    def no_slot(self, random: Random) -> int:
        """An id beyond the last, which the kernel may have for itself, or in no address space."""
        stop, spaces = self.limits.nr_memslots, self.limits.address_spaces << 16
        return random.choice((stop, stop + 2, stop + 3, 0x7FFF, 0xFFFF, spaces, spaces + 1, 0xFFFF_FFFF))

    def place(self, random: Random, npages: int) -> int:
        """A slot's first guest frame: anywhere low, next to or across another slot, or near the end of the guest's."""
        around = [
            gfn
            for region in self.slots.values()
            for base, stop in [(region.gpa // PAGE, (region.gpa + region.size) // PAGE)]
            for gfn in (base - npages, base - npages + 1, base, stop - 1, stop)
        ]
        end = 1 << self.limits.gpa_bits - 12
        kind = random.randint(0, 11)
        if kind < 5 and around:
            return max(random.choice(around), 0)
        if kind == 5:
            return random.choice((end - npages, end - npages + 1, end, (1 << 52) - npages, (1 << 52) - 1))
        return random.choice((0, 0x10, 0x100, 0x1000, 0x1001, 0x13FF, 0x2000, 0x2200))

    def new(self, random: Random) -> Region:
        """A region that may or may not be new, and may or may not fit."""
        npages = random.choice(NPAGES)
        hva = random.choice((0, 16 << 20, 32 << 20, 48 << 20)) + random.choice((0, 0, PAGE, 5 * PAGE))
        gpa, slot = self.place(random, npages) * PAGE, self.any_slot(random)
        if slot in self.slots and random.randint(0, 4):
            slot = next(free for free in (0, 1, 2, 3, 4, 5, 6, 7, *range(100, 200)) if free not in self.slots)
        return Region(slot, random.choice(ANY_FLAGS), gpa, npages * PAGE, hva)

    def change(self, random: Random) -> Region:
        """A slot that there is, moved, resized, deleted, with other flags or backing, or as it is; or two of that."""
        if not self.slots:
            return self.new(random)
        old = self.slots[random.choice(sorted(self.slots))]
        flags, gpa, size, hva = old.flags, old.gpa, old.size, old.hva
        what = random.choice(("move", "move", "move", "log", "log", "log", "delete", "all", "size", "hva", "ro", "no"))
        if what in ("move", "all"):
            gpa = random.choice((self.place(random, size // PAGE) * PAGE, gpa + PAGE, max(gpa - PAGE, 0)))
        if what in ("log", "all"):
            flags ^= 1
        if what == "delete":
            size = 0
        if what == "size":
            size = random.choice((size + PAGE, max(size - PAGE, PAGE), 2 * size))
        if what == "hva":
            hva ^= PAGE
        if what == "ro":
            flags ^= 2
        return Region(old.slot, flags, gpa % U64, size, hva)

    def odd(self, random: Random) -> Call:
        """Numbers that no slot has: misaligned, unknown, wrapping, beyond all limits; or the capability."""
        base = self.change(random) if random.randint(0, 1) else self.new(random)
        name, value = random.choice(
            (
                ("gpa", base.gpa + random.choice((1, 0x800))),
                ("gpa", U64 - random.choice((PAGE, base.size, base.size + PAGE, 1))),
                ("size", base.size + random.choice((1, 0x800))),
                ("size", 0),
                ("size", random.choice(((1 << 31) * PAGE, (1 << 52) * PAGE - PAGE, U64 - PAGE))),
                ("hva", base.hva + random.choice((1, 0x800))),
                ("hva", random.choice((1 << 63, U64 - PAGE))),
                ("flags", base.flags | random.choice((4, 8, 0x10, 1 << 31))),
                ("slot", self.any_slot(random)),
                ("bits", random.choice((1, 2, 3))),
            )
        )
        if name == "bits":
            return Protect2(value)
        values = {field.name: getattr(base, field.name) for field in fields(base)} | {name: value % U64}
        return Region(**values)

    def write(self, random: Random) -> Write:
        if not self.slots or not random.randint(0, 19):
            return Write(random.choice((0, 4, PAGE - 4, 0x1000_0000, (1 << 52) - 4, 1 << 63, U64 - 8)))
        region = self.slots[random.choice(sorted(self.slots))]
        npages = region.size // PAGE
        edges = (0, 1, 62, 63, 64, 127, 128, npages - 2, npages - 1, npages - 1)
        inside = [page for page in edges if 0 <= page < npages]
        page = random.choice((*inside, -1, npages)) if random.randint(0, 2) else random.randrange(npages)
        offset = random.choice(OFFSETS) if random.randint(0, 4) else random.randint(0, PAGE - 1)
        return Write((region.gpa + page * PAGE + offset) % U64)

    def get(self, random: Random) -> Get:
        return Get(self.slot(random))

    def clear(self, random: Random) -> Clear:
        slot = self.slot(random)
        npages = self.slots[slot].size // PAGE if slot in self.slots else 64
        if random.randint(0, 2):  # a range that there is
            first = 64 * random.randrange((npages + 63) // 64)
            rest = npages - first
            pages = random.choice((rest, rest, rest & ~63, min(rest, 64)))
        else:
            end = npages + 63 & ~63
            first = random.choice((0, 0, npages & ~63, npages, end, end + 64, 1, 63, npages - 1, 1 << 40))
            rest = max(npages - first, 0)
            counts = (rest, rest & ~63, rest + 63 & ~63, rest + 1, max(rest - 1, 0), rest + 64)
            pages = random.choice((*counts, 64, 128, 0, 1, 63, 65, 0xFFFF_FFFF, 0xFFFF_FFC0))
        words = max(min(pages + 63 >> 6, 64) + random.choice((0,) * 16 + (-1, 1)), 0)
        return Clear(slot, first, pages, words, _mask(random, words, min(pages, 64 * words)))


def _mask(random: Random, words: int, pages: int) -> tuple[int, ...]:
    """A mask's runs: all bits, those beyond the range too, none, one, every second, or a few runs."""
    bits = 64 * words
    if not bits:
        return ()
    kind = random.choice(("all", "all", "range", "none", "one", "one", "hole", "runs", "runs"))
    if kind == "all":
        return (0, bits)
    if kind == "range":
        return (0, pages) if pages else ()
    if kind == "one":
        return (random.choice((0, 1, 62, 63, max(pages - 1, 0), bits - 1, random.randrange(bits))), 1)
    if kind == "hole":
        at = random.choice((0, 63, max(pages - 1, 0), random.randrange(bits)))
        edges = [0, at, at + 1, bits]
    elif kind == "runs":
        edges = sorted({random.randrange(bits + 1) for _ in range(random.choice((2, 4, 6)))})
        edges = edges[: len(edges) & ~1]
    else:
        edges = []
    runs = zip(edges[::2], edges[1::2], strict=True)
    return tuple(number for start, stop in runs if start < stop for number in (start, stop - start))


class Tally:
    """How many calls of each kind had which answer."""

    def __init__(self, limits: Limits) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self.sequences = 0
        self.known = Drawing(limits)

    def begin(self) -> None:
        self.sequences += 1
        self.known = Drawing(self.known.limits)

    def add(self, call: Call, answer: Answer) -> None:
        failed = isinstance(answer, int) and answer != 0
        self.counts[NAMES[type(call)], errorcode[answer] if failed else self._success(call, answer)] += 1
        self.known.learn(call, answer)

    def _success(self, call: Call, answer: Answer) -> str:
        match call:
            case Region():
                return _change(self.known.slots.get(call.slot), call)
            case Get():
                return "pages" if answer else "no pages"
            case Write():
                slots = self.known.slots.values()
                reached = {
                    gpa // PAGE
                    for gpa in (call.gpa, call.gpa + 11)
                    if any(slot.gpa <= gpa < slot.gpa + slot.size and not slot.flags & 2 for slot in slots)
                }
                crosses = call.gpa // PAGE != (call.gpa + 11) // PAGE
                where = ("nowhere", "one page", "two pages")[len(reached) if call.gpa else 0]
                return f"across a page's end, {where}" if crosses else where
            case Clear():
                return "to the slot's end" if call.pages & 63 else "whole words" if call.pages else "no pages"
        return "done"

    def table(self) -> str:
        lines = ["| call | answered | times |", "| --- | --- | --- |"]
        lines += [f"| {kind} | {answer} | {times:,} |" for (kind, answer), times in sorted(self.counts.items())]
        return "\n".join([*lines, f"| all, in {self.sequences:,} VMs | | {self.counts.total():,} |"])


def _change(old: Region | None, new: Region) -> str:
    if old is None:
        return "created"
    if not new.size:
        return "deleted"
    moved, flagged = old.gpa != new.gpa, old.flags != new.flags
    if moved:
        return "moved, other flags" if flagged else "moved"
    return "other flags" if flagged else "as it was"
