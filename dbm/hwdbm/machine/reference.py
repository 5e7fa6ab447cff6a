"""ReferenceVCpu: one access at a time, on `hwdbm.walker`, to compare the fast one with.

It keeps its TLB in a dict, walks with `walker.guest_write` and `guest_read`, and resolves faults with the dirty log's
public verbs, one page each. It shares no code with `VCpu`, `Tlb`, the bulk walk or the bulk fault handler.
"""

from enum import Enum

from hwdbm import check, pte, walker
from hwdbm.machine.machine import Machine
from hwdbm.machine.space import Region
from hwdbm.pte import State
from hwdbm.stage2 import Stage2
from hwdbm.walker import Access


class Cached(Enum):
    """The accesses that a cached leaf allows without a walk."""

    READ_ONLY = 1
    CLEAN = 2
    WRITABLE = 3


class ReferenceVCpu:
    """A vCPU of a machine, beside its own: nothing flushes it but its `flush`.

    Parameters
    ----------
    machine : Machine
        The machine. Its vCPUs aren't used meanwhile.
    split_blocks, thp : bool
        The machine's options.
    ha : bool
        VTCR_EL2.HA. HD is on if the log uses hardware DBM.

    Attributes
    ----------
    tlb : dict
        From (slot, level, entry) to what is cached of that leaf.
    faults : dict
        How many faults of each kind were taken.
    """

    def __init__(self, machine: Machine, *, split_blocks: bool = True, thp: bool = True, ha: bool = True) -> None:
        check.instance(machine, Machine, "machine")
        self._machine, self._log = machine, machine.log
        self._split, self._thp = check.flag(split_blocks, "split_blocks"), check.flag(thp, "thp")
        self._ha = check.flag(ha, "ha")
        self.tlb: dict[tuple[int, int, int], Cached] = {}
        self.faults = {"translation": 0, "access_flag": 0, "permission": 0, "spurious": 0}

    def store(self, gpa: int, value: int) -> None:
        """Store a word. Errors are `VCpu.store`'s."""
        gpa, value = _gpa(gpa), check.integer(value, "value", 0, (1 << 64) - 1)
        region, word = self._reach(gpa, write=True)
        region.memory.words[word] = value

    def load(self, gpa: int) -> int:
        """Load a word."""
        region, word = self._reach(_gpa(gpa), write=False)
        return int(region.memory.words[word])

    def flush(self, slot: int, first_page: int, npages: int) -> None:
        """Forget every entry that translates any of some pages."""
        slot = check.integer(slot, "slot")
        first_page, npages = check.integer(first_page, "first_page"), check.integer(npages, "npages")
        layout = self._log.stage2(slot).layout
        for key in list(self.tlb) if npages else ():
            start, stop = layout.span(key[1], key[2])
            if key[0] == slot and start < first_page + npages and first_page < stop:
                del self.tlb[key]

    # --- one access ----------------------------------------------------------------------------------------

    def _reach(self, gpa: int, *, write: bool) -> tuple[Region, int]:
        for region in self._machine.space.regions:
            if region.gpa <= gpa < region.end and not (write and region.readonly):
                break
        else:
            raise self._machine.space.fault(gpa, write=write)
        offset = gpa - region.gpa
        self._translate(region, offset // self._machine.page_size, write=write)
        return region, offset // 8

    def _translate(self, region: Region, page: int, *, write: bool) -> None:
        s2 = self._log.stage2(region.id)
        keys = [(region.id, level, s2.layout.index(level, page)) for level in (2, 3)]
        cached = {self.tlb[key] for key in keys if key in self.tlb}
        if Cached.WRITABLE in cached or (cached and not write):
            return
        spurious = cached == {Cached.READ_ONLY}
        for key in keys:  # what takes its place is what the walk finds
            self.tlb.pop(key, None)
        for _ in range(4):
            access = self._walk(s2, page, write=write)
            if access is Access.DONE:
                self.faults["spurious"] += spurious
                level, _, desc = _leaf(s2, page)
                key = (region.id, max(level, 2), s2.layout.index(max(level, 2), page))
                self.tlb[key] = self._kind(desc, level)
                return
            spurious = False
            self._resolve(region, s2, page, access, write=write)
        raise AssertionError(f"page {page} of slot {region.id} still faults")

    def _walk(self, s2: Stage2, page: int, *, write: bool) -> Access:
        gfn = s2.base_gfn + page
        if write:
            return walker.guest_write(s2, gfn, ha=self._ha, hd=self._log.hw_dbm)
        return walker.guest_read(s2, gfn, ha=self._ha)

    def _kind(self, desc: int, level: int) -> Cached:
        state = pte.state(desc, level)
        if state in (State.UNTRACKED, State.WRITABLE_DIRTY):
            return Cached.WRITABLE
        return Cached.CLEAN if state is State.WRITABLE_CLEAN and self._log.hw_dbm else Cached.READ_ONLY

    # --- faults --------------------------------------------------------------------------------------------

    def _resolve(self, region: Region, s2: Stage2, page: int, access: Access, *, write: bool) -> None:
        gfn = s2.base_gfn + page
        if access is Access.TRANSLATION:
            self.faults["translation"] += 1
            self._map(region, s2, page, write=write)
        elif access is Access.ACCESS_FLAG:
            self.faults["access_flag"] += 1
            walker.mkyoung(s2, gfn, 1)
        else:
            self.faults["permission"] += 1
            self._grant(region, s2, page)

    def _map(self, region: Region, s2: Stage2, page: int, *, write: bool) -> None:
        slot, frames, gfn = self._log.slot(region.id), region.frames, s2.base_gfn + page
        shared = bool(frames.shared[page])
        if shared and write:
            region.frames.renew_one(page)
            shared = False
        start, stop = s2.layout.span(2, s2.layout.index(2, page))
        whole = 0 <= start and stop <= s2.npages
        if self._thp and not slot.logging and whole and not int(s2.level(2)[s2.layout.index(2, page)]):
            numbers = [region.frames.one(each) for each in range(start, stop)]
            private = not any(bool(frames.shared[each]) for each in range(start, stop))
            aligned = (
                numbers[0] % len(numbers) == 0
                and (region.hva - region.gpa) % (len(numbers) * self._machine.page_size) == 0
            )
            if private and aligned and numbers == list(range(numbers[0], numbers[0] + len(numbers))):
                self._log.map(region.id, s2.base_gfn + start, stop - start, numbers[0], 2)
                return
        if slot.logging and write and not self._log.hw_dbm:
            self._log.write_fault(region.id, gfn, region.frames.one(page))
        else:
            self._log.map(region.id, gfn, 1, region.frames.one(page), writable=not shared)

    def _grant(self, region: Region, s2: Stage2, page: int) -> None:
        gfn, logs = s2.base_gfn + page, self._log.slot(region.id).logging
        if bool(region.frames.shared[page]):
            region.frames.renew_one(page)
            self._log.write_fault(region.id, gfn, region.frames.one(page))
            return
        level, _, desc = _leaf(s2, page)
        if level == 3 or not logs or self._split:
            self._log.write_fault(region.id, gfn)
            if level < 3 and logs and self._log.hw_dbm:
                start, stop = s2.layout.span(2, s2.layout.index(2, page))
                for each in range(max(start, 0), min(stop, s2.npages)):
                    child = int(s2.level(3)[each])
                    if pte.state(child, 3) is State.READ_ONLY:
                        s2.level(3)[each] = child | pte.DBM
            return
        start, stop = s2.layout.span(level, s2.layout.index(level, page))
        s2.level(level)[s2.layout.index(level, page)] = desc | pte.S2AP_W | (pte.DBM if self._log.hw_dbm else 0)
        self._log.mark_dirty(region.id, max(start, 0), min(stop, s2.npages) - max(start, 0))


def _gpa(gpa: int) -> int:
    gpa = check.integer(gpa, "gpa", 0, (1 << 63) - 1)
    if gpa % 8:
        raise ValueError(f"gpa {gpa:#x} isn't a multiple of a word's 8 bytes")
    return gpa


def _leaf(s2: Stage2, page: int) -> tuple[int, int, int]:
    for level in (3, 2, 1):
        entry = s2.layout.index(level, page)
        desc = int(s2.level(level)[entry])
        if pte.leaf(level)(desc):
            return level, entry, desc
    raise AssertionError(f"page {page} has no leaf")
