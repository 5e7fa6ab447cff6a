"""Two machines in step: one whose guest uses the bulk vCPU, one the scalar reference; and a migration's copy of both.

`GuestMachine` runs the first alone, with a consumer that copies bytes: what it must never lose. `TwinMachine` runs both
and compares descriptors, memory, TLBs, faults and marks after each step.
"""

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hwdbm import DirtyBitmap, pte
from hwdbm.machine import Blocks, Machine, ReferenceVCpu
from hwdbm.machine.reference import Cached

PAGE = 4096
GPA = 0x4000_0000
SIZES = (1, 63, 65, 511, 513, 1024, 1100, 1536, 1600)
PLACES = st.lists(st.integers(0, 1 << 16), max_size=24)
PART = st.tuples(st.integers(0, 8), st.integers(0, 8))


class WithReference(Machine):
    """A machine whose flush reaches the reference too."""

    reference = None

    def flush(self, slot, first_page, npages):
        super().flush(slot, first_page, npages)
        if self.reference is not None:
            self.reference.flush(slot.id, first_page, npages)


def live(machine, slot=0):
    return machine.log._slots[slot].live


class GuestMachine(RuleBasedStateMachine):
    """A guest that stores bytes, a host that moves, shares and splits, and a migration that copies.

    Attributes that are None are drawn.
    """

    hw = manual = initially = policy = thp = capacity = None
    sizes = SIZES
    check_verify = True

    def make(self, kind=Machine, **options):
        machine = kind(**self.options, **options)
        machine.add_memslot(self.npages * PAGE, self.gpa, shared=self.shared, hva=self.hva)
        machine.add_memslot(3 * PAGE, self.gpa + self.npages * PAGE + 0x20_0000, readonly=True)
        return machine

    @initialize(data=st.data())
    def create(self, data):
        def draw(name, strategy):
            fixed = getattr(self, name)
            return data.draw(strategy, label=name) if fixed is None else fixed

        self.npages = data.draw(st.sampled_from(self.sizes), label="npages")
        base = data.draw(st.sampled_from([0, 0, 0, 1, 511, 448]), label="base")
        self.gpa = GPA + base * PAGE
        skew = data.draw(st.sampled_from([0, 0, 0, 1]), label="skew")
        self.hva = (1 << 46) + (base + skew) * PAGE
        self.shared = data.draw(st.sampled_from([False, False, True]), label="shared")
        hw = draw("hw", st.booleans())
        manual = draw("manual", st.booleans())
        initially = manual and draw("initially", st.booleans())
        ha = hw or data.draw(st.booleans(), label="ha")
        self.options = {
            "hw_dbm": hw,
            "ha": ha,
            "manual_protect": manual,
            "initially_set": initially,
            "thp": draw("thp", st.sampled_from([True, True, False])),
            "blocks": draw("policy", st.sampled_from(Blocks)),
            "chunk_pages": data.draw(st.sampled_from([512, 1024]), label="chunk"),
            "step_pages": data.draw(st.sampled_from([None, 64, 512]), label="step"),
            "tlb_entries": draw("capacity", st.sampled_from([None, None, 1, 7])),
        }
        self.machine = self.make()
        self.machines = [self.machine]
        self.copied = np.zeros(self.npages * PAGE, dtype=np.uint8)
        self.logs, self.value, self.waiting = False, 0, DirtyBitmap(self.npages)
        self.during = []

    def teardown(self):
        for machine in getattr(self, "machines", ()):
            machine.close()

    # --- helpers -----------------------------------------------------------------------------------------

    def part(self, part):
        low, high = (self.npages * eighth // 8 for eighth in sorted(part))
        return low, high - low

    def gpas(self, places, part=(0, 0), every=False):
        first, count = self.part(part)
        run = np.arange(first, first + min(count, 70) * every)
        pages = np.append(np.array(places, dtype=np.int64) % self.npages, run)
        words = np.arange(pages.size) * 7 % 3 + np.array([0, 511])[np.arange(pages.size) % 2] // 2
        return self.gpa + pages * PAGE + words * 8

    def fresh(self, count):
        self.value += count
        return np.arange(self.value - count + 1, self.value + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)

    def guest_stores(self, gpas, values):
        self.machine.vcpus[0].store(gpas, values)

    def guest_loads(self, gpas):
        return self.machine.vcpus[0].load(gpas)

    def each(self, act):
        return [act(machine) for machine in self.machines]

    @property
    def memory(self):
        return self.machine.memory(0)

    def copy_out(self, pages):
        index = pages.pages()
        self.copied.reshape(-1, PAGE)[index] = self.memory.reshape(-1, PAGE)[index]

    # --- the guest ---------------------------------------------------------------------------------------

    @rule(places=PLACES, part=PART, every=st.booleans())
    def store(self, places, part, every):
        gpas = self.gpas(places, part, every)
        self.guest_stores(gpas, self.fresh(gpas.size))

    @rule(places=PLACES, part=PART, every=st.booleans())
    def load(self, places, part, every):
        gpas = self.gpas(places, part, every)
        want = self.memory.view(np.uint64)[gpas - self.gpa >> 3]
        assert (self.guest_loads(gpas) == want).all()

    @rule(places=PLACES, bad=st.sampled_from(["hole", "readonly"]))
    def bad_store(self, places, bad):
        """Stores before the bad one are done, those after it aren't."""
        end = self.gpa + self.npages * PAGE
        wrong = end + (0x20_0000 if bad == "readonly" else 8)
        gpas = self.gpas(places)
        at = gpas.size // 2
        gpas = np.insert(gpas, at, wrong)
        values = self.fresh(gpas.size)
        before = self.memory.view(np.uint64).copy()
        for store in self.stores():
            with pytest.raises(OSError, match=f"{wrong:#x}") as caught:
                store(gpas, values)
            assert caught.value.errno == 14
        before[gpas[:at] - self.gpa >> 3] = values[:at]
        assert (self.memory.view(np.uint64) == before).all()

    def stores(self):
        return [self.machine.vcpus[0].store]

    # --- the host ----------------------------------------------------------------------------------------

    @rule(place=st.integers(0, 1 << 16), size=st.sampled_from([1, 2, 4096, 5000]))
    def device_writes(self, place, size):
        at = place * 37 % (self.npages * PAGE)
        data = self.fresh(size // 8 + 1).tobytes()[: min(size, self.npages * PAGE - at)]
        self.each(lambda machine: machine.write(self.gpa + at, data))
        assert self.machine.read(self.gpa + at, len(data)) == data

    @rule(part=PART, verb=st.sampled_from(["share", "reclaim", "split"]))
    def host(self, part, verb):
        first, count = self.part(part)
        if count:
            self.each(lambda machine: getattr(machine, verb)(0, first, count))

    @rule(part=PART)
    def age(self, part):
        first, count = self.part(part)
        for machine in self.machines:
            with machine.log.locked(0, first, count) as s2:
                s2.mkold(s2.base_gfn + first, count)
            machine.flush(machine.log.slot(0), first, count)

    @rule()
    def switch(self):
        enable = not self.machine.log.hw_dbm
        if self.options["ha"]:
            self.each(lambda machine: machine.set_hw_dirty_log(enable))

    # --- the migration -----------------------------------------------------------------------------------

    @precondition(lambda self: not self.logs)
    @rule()
    def start(self):
        self.each(lambda machine: machine.start_log())
        self.logs = True
        self.waiting = DirtyBitmap(self.npages)
        self.copied[:] = self.memory  # the first pass: everything, after the start

    @precondition(lambda self: self.logs)
    @rule(collapse=st.booleans())
    def stop(self, collapse):
        self.each(lambda machine: machine.stop_log(collapse=collapse))
        self.logs = False

    @precondition(lambda self: self.logs)
    @rule(fails=st.booleans(), places=PLACES)
    def collect(self, fails, places):
        leases = self.each(lambda machine: machine.dirty(0))
        if fails:
            for lease in leases:
                lease.rollback()
            return
        gpas = self.gpas(places)
        self.guest_stores(gpas, self.fresh(gpas.size))  # written between the harvest and the copy
        for lease in leases:
            lease.commit()
        self.copy_out(leases[0].bitmap)

    @precondition(lambda self: self.logs)
    @rule(part=PART)
    def sync(self, part):
        first, count = self.part(part)
        first, stop = first & ~63, first + count
        stop = self.npages if stop > self.npages - 64 else stop & ~63
        self.each(lambda machine: machine.log.sync(0, first, max(stop - first, 0)))

    # --- what must never be ------------------------------------------------------------------------------

    @precondition(lambda self: hasattr(self, "machine"))
    @invariant()
    def no_lost_write(self):
        if not self.logs:
            return
        differs = (self.copied.reshape(-1, PAGE) != self.memory.reshape(-1, PAGE)).any(axis=1)
        known = live(self.machine) | self.machine.log.stage2(0).dirty()
        lost = DirtyBitmap.from_pages(np.flatnonzero(differs), self.npages) - known
        assert not lost.any(), f"lost writes to pages {lost.ranges().tolist()[:3]}"

    @precondition(lambda self: hasattr(self, "machine") and self.check_verify)
    @invariant()
    def sound(self):
        self.each(lambda machine: machine.verify())
        s2 = self.machine.log.stage2(0)
        granted = s2.scan(pte.writable) | s2.scan(pte.tracked)
        frames = self.machine.space.find(0).frames
        shared = DirtyBitmap.from_pages(np.flatnonzero(frames.shared), self.npages)
        assert not (granted & shared).any(), "the guest may write a shared page"


class TwinMachine(GuestMachine):
    """Both vCPUs: no limit of the TLB, so that what is evicted doesn't matter."""

    capacity = 1  # not drawn; `create` makes it none

    @initialize(data=st.data())
    def create(self, data):
        super().create(data)
        self.machine.close()
        self.options["tlb_entries"] = None
        self.machine = self.make()
        self.twin = self.make(WithReference)
        self.twin.reference = self.reference = ReferenceVCpu(
            self.twin,
            split_blocks=self.options["blocks"] is not Blocks.TRACK,
            thp=self.options["thp"],
            ha=self.options["ha"],
        )
        self.machines = [self.machine, self.twin]

    def reference_stores(self, gpas, values):
        for gpa, value in zip(gpas.tolist(), values.tolist(), strict=True):
            self.reference.store(gpa, value)

    def guest_stores(self, gpas, values):
        super().guest_stores(gpas, values)
        self.reference_stores(gpas, values)

    def guest_loads(self, gpas):
        got = super().guest_loads(gpas)
        assert got.tolist() == [self.reference.load(gpa) for gpa in gpas.tolist()]
        return got

    def stores(self):
        return [self.machine.vcpus[0].store, self.reference_stores]

    @precondition(lambda self: hasattr(self, "reference"))
    @invariant()
    def same(self):
        one, two = (machine.log.stage2(0) for machine in self.machines)
        for level in (1, 2, 3):
            ours, theirs = (_without_frames(machine, level) for machine in self.machines)
            (wrong,) = (ours != theirs).nonzero()
            assert not wrong.size, (
                f"level {level}[{wrong[0]}] and {wrong.size - 1} more: "
                f"{pte.describe(int(one.level(level)[wrong[0]]), level)} is not "
                f"{pte.describe(int(two.level(level)[wrong[0]]), level)}"
            )
        assert one.saved.bitmap == two.saved.bitmap
        assert one.host_dirty == two.host_dirty
        assert live(self.machine) == live(self.twin)
        assert (self.machine.memory(0) == self.twin.memory(0)).all()
        assert _tlb(self.machine.vcpus[0].tlb[0]) == {key[1:]: kind for key, kind in self.reference.tlb.items()}
        counts = self.machine.clock.read().counts
        for kind, count in self.reference.faults.items():
            if kind == "spurious":
                continue  # of pages that one stale entry of a block denied, who comes first depends on the order
            assert counts[f"{kind}_faults"] == count, kind


def _tlb(tlb):
    cached = {(3, page): Cached(int(tlb.page[page])) for page in tlb.page.nonzero()[0].tolist()}
    return cached | {(2, entry): Cached(int(tlb.stripe[entry])) for entry in tlb.stripe.nonzero()[0].tolist()}


def _without_frames(machine, level):
    """The entries with the frame of each leaf checked, and left out: the order in which frames are given may differ."""
    s2, frames = machine.log.stage2(0), machine.space.find(0).frames
    entries = s2.level(level).copy()
    (index,) = pte.leaf(level)(entries).nonzero()
    pages = s2.layout.span(level, index)[:, 0]
    assert (pages >= 0).all()
    found = pte.output_address(entries[index], 12) >> np.uint64(12)
    assert (found.astype(np.int64) == frames.of(pages)).all(), "a leaf maps a frame that isn't the page's"
    entries[index] &= np.uint64(~pte.ADDRESS & (1 << 64) - 1)
    return entries
