"""A guest, a migration and a host around a DirtyLog; and a model of KVM's log in sets of page numbers.

The model shares nothing with the log: what a GET must say follows from who wrote which page, and from the words of
Documentation/virt/kvm/api.rst. Guest memory is a version a page; a TLB holds the leaves that it let the guest write,
and isn't asked again until a flush throws them out. What the guest writes that way is recorded nowhere.
"""

from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from logtools import live

from hwdbm import DirtyBitmap, DirtyLog, pte, walker
from hwdbm.errors import StaleLeaseError
from hwdbm.walker import Access

RAGGED = (1, 63, 64, 65, 127, 200, 511, 512, 513)
PAGES = st.lists(st.sampled_from([0, 1, 2, 63, 64, 65, 128]) | st.integers(0, 1 << 16), max_size=8)
PART = st.tuples(st.integers(0, 8), st.integers(0, 8))
SIZE = 0x1000
FRAMES = 0x4000


@dataclass
class Model:
    """KVM's log of one slot: the pages that are dirty in it, and those that leaves have recorded and it not yet."""

    npages: int
    hw: bool
    manual: bool
    initially_set: bool
    logs: bool = False
    published: set[int] = field(default_factory=set)
    recorded: set[int] = field(default_factory=set)

    def start(self):
        self.logs = True
        self.published = set(range(self.npages)) if self.initially_set else set()
        self.recorded = set()

    def stop(self):
        self.logs, self.published, self.recorded = False, set(), set()

    def write(self, page, faulted):
        if self.logs and (faulted or not self.hw):
            self.published.add(page)
        if self.logs and self.hw:
            self.recorded.add(page)

    def mark(self, pages):
        if self.logs:
            self.published |= set(pages)

    def sync(self, pages):
        self.published |= self.recorded & set(pages)
        self.recorded -= set(pages)

    def get(self):
        self.published |= self.recorded
        shown = set(self.published)
        if not self.manual:
            self.published, self.recorded = set(), set()
        return shown

    def clear(self, mask):
        cleared = self.published & mask
        self.published -= cleared
        self.recorded -= cleared
        return cleared

    def put_back(self, pages):
        self.published |= pages

    def switch(self, hw):
        if self.hw and not hw:
            self.sync(range(self.npages))
        self.hw = hw

    def move(self):
        self.sync(range(self.npages))


class LogMachine(RuleBasedStateMachine):
    """Rules drive a log of one slot and the model in step; invariants say what must never be.

    `blocks` maps blocks too: the log may then say more than the model. Without `check_model` the invariants stand
    alone, and the guest's pages say whether the log says enough. `hw`, `manual` and `initially` fix what is else drawn.
    """

    blocks = False
    hw = manual = initially = mapped = None
    check_model = True
    sizes, between = RAGGED, (1, 600)

    @initialize(data=st.data())
    def create(self, data):
        draw = data.draw
        self.npages = draw(st.sampled_from(self.sizes) | st.integers(*self.between), label="npages")
        self.base = draw(st.sampled_from([512, 513, 448, 511, 803]), label="base")
        manual = draw(st.booleans(), label="manual") if self.manual is None else self.manual
        initially = draw(st.booleans(), label="initially_set") if self.initially is None else self.initially
        hw = draw(st.booleans(), label="hw") if self.hw is None else self.hw
        initially = manual and initially
        step = draw(st.sampled_from([None, 64, 128]), label="step")
        self.memory = np.zeros(self.npages, dtype=np.int64)
        self.copied = np.zeros(self.npages, dtype=np.int64)
        self.host_written = set()
        self.tlb = set()  # the (start, stop) of leaves that let the guest write, and are not asked again
        self.during, self.fails = [], None
        self.model = Model(self.npages, hw, manual, initially)
        self.log = DirtyLog(
            hw_dbm=hw, manual_protect=manual, initially_set=initially, step_pages=step, flush=self.flush
        )
        self.region(flags=0)
        if self.blocks and (self.mapped or draw(st.booleans(), label="blocks")):
            self.map((0, 8), "block", writable=True)  # while it logs there are no new ones
        self.region(flags=draw(st.sampled_from([1, 1, 0]), label="flags"))
        self.lease = None

    def teardown(self):
        if getattr(self, "lease", None):
            with suppress(StaleLeaseError):
                self.lease[0].commit()

    # --- helpers -----------------------------------------------------------------------------------------

    @property
    def s2(self):
        return self.log.stage2(0)

    def region(self, flags=None, base=None):
        """Change the slot, and the model with it."""
        self.base = self.base if base is None else base
        logs = self.model.logs if flags is None else bool(flags)
        self.log.set_memory_region(0, int(logs), self.base * SIZE, self.npages * SIZE, 1 << 30)
        if logs and not self.model.logs:
            self.model.start()
            self.copied[:] = self.memory  # a migration that begins with the log sends everything after that
        elif not logs and self.model.logs:
            self.model.stop()

    def flush(self, slot, first, npages):
        """The hook. Until it has thrown entries out, the guest writes through them."""
        assert slot.npages == self.npages
        for place in self.during:
            self.store_cached(place % self.npages)
        if self.fails is not None:
            self.fails -= 1
            if self.fails < 0:
                raise ConnectionError("the flush failed")
        self.tlb = {(a, b) for a, b in self.tlb if not (a < first + npages and first < b)}

    def store_cached(self, page):
        """Write through the TLB, if it lets the guest; return whether it did."""
        if not any(a <= page < b for a, b in self.tlb):
            return False
        self.memory[page] += 1
        self.host_written.add(page)
        return True

    def cache(self, page):
        for level in (3, 2, 1):
            index = self.s2.layout.index(level, page)
            if pte.leaf(level)(int(self.s2.level(level)[index])):
                assert pte.writable(level)(int(self.s2.level(level)[index]))
                self.tlb.add(self.s2.layout.span(level, index))

    def store(self, page):
        """Write a page as a vCPU does, the faults included. The host lets it write everything."""
        if self.store_cached(page):
            return
        faulted, gfn = False, self.base + page
        for _ in range(4):
            access = walker.guest_write(self.s2, gfn, hd=self.log.hw_dbm)
            if access is Access.DONE:
                break
            if access is Access.TRANSLATION:
                self.log.map(0, gfn, 1, FRAMES + page)
            else:
                faulted = True
                self.log.write_fault(0, gfn)
        else:
            raise AssertionError(f"page {page} faults for ever: {access}")
        self.cache(page)
        self.memory[page] += 1
        self.host_written.add(page)
        self.model.write(page, faulted)

    def copy_out(self, pages):
        index = [page for page in pages if page < self.npages]
        self.copied[index] = self.memory[index]

    def same(self, got, want, what):
        got = set(got.pages().tolist())
        if self.check_model and not self.blocks:
            assert got == want, f"{what}: {sorted(got)[:9]} is not {sorted(want)[:9]}"
        else:
            assert not self.check_model or want <= got, f"{what} lacks {sorted(want - got)[:9]}"
        return got

    def part(self, part):
        low, high = (self.npages * eighth // 8 for eighth in sorted(part))
        return low, high - low

    def only_changed(self, before, pages):
        """Check that nothing but the dirty state changed, and in no leaf without a page of `pages`."""
        allowed = np.uint64(~pte.MUTABLE & (1 << 64) - 1)
        for level, old in before.items():
            changed = old ^ self.s2.level(level)
            assert not (changed & allowed).any(), "more changed than the dirty state"
            for index in changed.nonzero()[0].tolist():
                start, stop = self.s2.layout.span(level, index)
                assert pages & set(range(start, stop)), f"level {level}[{index}] is outside of the mask"

    def leaves(self):
        return {level: self.s2.level(level).copy() for level in (1, 2, 3)}

    # --- the guest and the host --------------------------------------------------------------------------

    @rule(places=PAGES, part=PART, run=st.booleans())
    def write(self, places, part=(0, 0), run=False):
        first, count = self.part(part)
        for page in range(first, first + min(count, 70) * run):
            self.store(page)
        for place in places:
            self.store(place % self.npages)

    @rule(place=st.integers(0, 1 << 16))
    def drop_tlb(self, place):
        self.tlb = {(a, b) for a, b in self.tlb if not a <= place % self.npages < b}

    @rule(part=PART, kind=st.sampled_from(["unmap", "page", "block", "block"]), writable=st.booleans())
    def map(self, part, kind, writable):
        first, count = self.part(part)
        gfn, level, block = self.base + first, 3, kind == "block"
        if kind == "unmap":
            self.log.unmap(0, gfn, count)
            return
        if block and self.blocks:
            start, stop = -(-gfn // 512) * 512, (gfn + count) // 512 * 512
            if start < stop:
                gfn, count, level = start, stop - start, 2
        self.log.map(0, gfn, count, 0x8000 + gfn % 512, level, writable)

    @rule(place=st.integers(0, 1 << 16))
    def break_cow(self, place):
        """The host gives a page another frame, for a write."""
        page = place % self.npages
        self.log.write_fault(0, self.base + page, FRAMES + page)
        self.memory[page] += 1
        self.host_written.add(page)
        self.model.write(page, faulted=True)

    @rule(part=PART)
    def device_writes(self, part):
        first, count = self.part(part)
        self.memory[first : first + count] += 1
        self.host_written |= set(range(first, first + count))
        self.log.mark_dirty(0, first, count)
        self.model.mark(range(first, first + count))

    @rule(places=PAGES)
    def host_takes(self, places):
        self.during = places
        taken = self.log.take_host_dirty(0)
        self.during = []
        self.host_written -= set(taken.pages().tolist())

    # --- the migration -----------------------------------------------------------------------------------

    def logging(self):
        return self.model.logs

    @precondition(logging)
    @rule(written=PAGES, during=PAGES, then=st.sampled_from(["take", "lease", "fail"]))
    def get(self, written, during, then):
        self.write(written)
        before = self.leaves()
        self.during = during
        lease = self.log.get_dirty_log(0, lease=True)
        self.during = []
        got = self.same(lease.bitmap, self.model.get(), "GET")
        self.only_changed(before, got)
        self.settle(lease, got, then, taken=not self.model.manual)

    @precondition(logging)
    @rule(
        part=PART,
        written=PAGES,
        places=PAGES,
        during=PAGES,
        every=st.booleans(),
        then=st.sampled_from(["take", "lease", "fail"]),
    )
    def clear(self, part, written, places, during, every, then):
        self.write(written)
        first, count = self.part(part)
        first, stop = first & ~63, first + count
        stop = self.npages if stop > self.npages - 64 else stop & ~63
        count = max(stop - first, 0)
        mask = {first + place % count for place in places} if count else set()
        mask |= set(range(first, first + count)) if every else set()
        words = DirtyBitmap.from_pages([page - first for page in mask], count)
        if count & 63:
            words.words[-1] |= np.uint64((1 << 64) - (1 << (count & 63)))  # beyond the slot's end: harmless
        before, clean = self.leaves(), mask - set(live(self.log).pages().tolist())
        self.during = during
        lease = self.log.clear_dirty_log(0, first, count, words, lease=True)
        self.during = []
        got = {first + page for page in self.same_at(lease.bitmap, self.model.clear(mask), first)}
        assert got <= mask - clean
        self.only_changed(before, got)
        self.settle(lease, got, then, taken=True)

    def same_at(self, bitmap, want, first):
        return self.same(bitmap, {page - first for page in want}, "CLEAR")

    def settle(self, lease, got, then, taken):
        if then == "take":
            self.copy_out(got if taken else ())
            lease.commit()
        elif then == "fail":
            lease.rollback()
            self.model.put_back(got if taken else set())
        elif self.lease is None:
            self.lease = (lease, got, taken)
        else:
            lease.rollback()
            self.model.put_back(got if taken else set())

    @precondition(lambda self: self.lease)
    @rule(commit=st.booleans())
    def settle_later(self, commit):
        """The consumer had the pages for a while; it copies them now, or gives up."""
        (lease, got, taken), self.lease = self.lease, None
        if commit:
            self.copy_out(got if taken else ())
            lease.commit()
        else:
            lease.rollback()
            self.model.put_back(got if taken else set())

    @precondition(logging)
    @rule(part=PART, during=PAGES)
    def sync(self, part, during):
        first, count = self.part(part)
        first, stop = first & ~63, first + count
        stop = self.npages if stop > self.npages - 64 else stop & ~63
        self.during = during
        self.log.sync(0, first, max(stop - first, 0))
        self.during = []
        self.model.sync(range(first, stop))

    @precondition(logging)
    @rule(verb=st.sampled_from(["get", "clear", "sync"]), written=PAGES, during=PAGES, step=st.integers(0, 2))
    def flush_fails(self, verb, written, during, step):
        """The hook raises: the error is the caller's, and nothing is lost."""
        self.write(written)
        self.fails, self.during = step, during
        try:
            if verb == "get":
                self.log.get_dirty_log(0, lease=True).rollback()
            elif verb == "clear":
                self.log.clear_dirty_log(0, 0, self.npages, ~DirtyBitmap(self.npages), lease=True).rollback()
            else:
                self.log.sync(0)
        except ConnectionError:
            pass
        self.fails, self.during = None, []
        # A flush that fails comes after the publishing, of as many steps as there were: the model takes that over.
        now = set(live(self.log).pages().tolist())
        known = self.model.published | self.model.recorded
        assert self.blocks or not self.check_model or now <= known, "a failed call invented pages"
        assert not self.check_model or self.model.published <= now, "a failed call lost pages"
        self.model.recorded -= now
        self.model.published |= now

    @rule(logs=st.integers(0, 1))
    def set_flags(self, logs):
        ends = not logs or not self.model.logs
        self.region(flags=logs)
        self.lease = None if ends else self.lease  # with the log, it is stale

    @rule(by=st.sampled_from([-64, -1, 1, 7, 600]), written=PAGES)
    def move(self, by, written):
        if self.base + by >= 0:
            self.write(written)
            if self.model.logs:
                self.model.move()
            self.region(base=self.base + by)

    @rule(written=PAGES, during=PAGES)
    def switch(self, written, during):
        hw = not self.model.hw
        self.write(written)
        self.during = during
        self.log.set_hw_dirty_log(hw)
        self.during = []
        self.model.switch(hw)

    # --- what must never be ------------------------------------------------------------------------------

    @precondition(lambda self: hasattr(self, "lease"))
    @invariant()
    def no_lost_write(self):
        """A page that the copy lacks is dirty in the log, in its leaf, saved, or in the consumer's hands."""
        if self.model.logs:
            known = set((live(self.log) | self.s2.dirty()).pages().tolist())
            known |= self.lease[1] if self.lease else set()
            lost = set(np.flatnonzero(self.memory != self.copied).tolist()) - known
            assert not lost, f"lost writes to pages {sorted(lost)[:9]}"

    @precondition(lambda self: hasattr(self, "lease"))
    @invariant()
    def two_consumers(self):
        """A written page is flagged for the host, or its leaf, or what it left, still says so."""
        told = self.s2.host_dirty | self.s2.dirty() | self.s2.scan(pte.untracked)
        missed = self.host_written - set(told.pages().tolist())
        assert not missed, f"the host doesn't know of pages {sorted(missed)[:9]}"

    @precondition(lambda self: hasattr(self, "lease"))
    @invariant()
    def sound(self):
        self.log.verify()


class BlockMachine(LogMachine):
    """With blocks, and slots that have room for one or two."""

    blocks = True
    sizes, between = (1024, 1025, 1088, 1535), (1024, 1700)


class ClientMachine(LogMachine):
    """And clients beside KVM's own verbs, each with a copy of the guest's pages and a set of those it lacks.

    The model of GET and CLEAR is what it was: for it, a client's harvest is a `sync`.
    """

    names = ("A", "B", "C")

    def __init__(self):
        super().__init__()
        self.clients, self.sets, self.broken, self.copies, self.lent = {}, {}, {}, {}, {}

    def teardown(self):
        for lease, *_ in self.lent.values():
            with suppress(StaleLeaseError):
                lease.commit()
        for client in self.clients.values():
            client.close()
        super().teardown()

    # --- what the model of the clients learns of ----------------------------------------------------------

    def news(self, pages):
        if self.model.logs:
            for missing in self.sets.values():
                missing |= set(pages)

    def break_off(self):
        for name in self.sets:
            self.sets[name], self.broken[name] = set(range(self.npages)), True
        self.lent.clear()  # they are stale

    def store(self, page):
        before = self.memory[page]
        super().store(page)
        assert self.memory[page] != before
        self.news([page])

    def break_cow(self, place):
        super().break_cow(place)
        self.news([place % self.npages])

    def device_writes(self, part):
        super().device_writes(part)
        first, count = self.part(part)
        self.news(range(first, first + count))

    def region(self, flags=None, base=None):
        logs, moves = self.model.logs, base not in (None, self.base)
        super().region(flags, base)
        if moves or (logs and not self.model.logs):
            self.break_off()

    # --- their verbs ---------------------------------------------------------------------------------------

    @precondition(lambda self: self.model.logs and len(self.clients) < 3)
    @rule(written=PAGES, during=PAGES)
    def join(self, written, during):
        self.write(written)
        name = next(each for each in self.names if each not in self.clients)
        self.during = during
        self.clients[name] = self.log.client(name)
        self.during = []
        self.model.sync(range(self.npages))
        self.sets[name], self.broken[name], self.copies[name] = set(), False, self.memory.copy()

    @precondition(lambda self: self.clients)
    @rule(number=st.integers(0, 2), forget=st.booleans())
    def leave(self, number, forget):
        name = sorted(self.clients)[number % len(self.clients)]
        client = self.clients.pop(name)
        lent = self.lent.pop(name, None)
        if forget:
            with pytest.warns(ResourceWarning, match="was never closed"):
                del client
        else:
            client.close()
        del self.sets[name], self.broken[name], self.copies[name]
        if lent is not None:
            with pytest.raises(StaleLeaseError):
                lent[0].rollback()

    @precondition(lambda self: self.model.logs and self.clients)
    @rule(
        number=st.integers(0, 2),
        written=PAGES,
        during=PAGES,
        then=st.sampled_from(["commit", "commit", "fail", "forget", "keep"]),
    )
    def take(self, number, written, during, then):
        self.write(written)
        name = sorted(self.clients)[number % len(self.clients)]
        epoch = self.clients[name].feeds[0].epoch
        self.during = during
        lease = self.clients[name].take(0)
        self.during = []
        self.model.sync(range(self.npages))
        got = self.same(lease.bitmap, self.sets[name], f"the take of {name}: GET")
        broken = self.broken[name]
        assert (bool(lease.broken), lease.epoch) == (broken, epoch), "what a take knows of its epoch"
        assert not broken or got == set(range(self.npages))
        self.sets[name], self.broken[name] = set(), False
        if then == "keep" and name not in self.lent:
            self.lent[name] = lease, got, broken
        elif then == "forget" and got:
            with pytest.warns(ResourceWarning, match="was neither committed nor rolled back"):
                del lease
            self.clients[name].feeds[0].loans.take_back()  # as its next take does
            self.back(name, got, broken)
        else:
            self.end(name, lease, got, broken, commit=then == "commit")

    @precondition(lambda self: self.lent)
    @rule(number=st.integers(0, 2), commit=st.booleans())
    def end_later(self, number, commit):
        name = sorted(self.lent)[number % len(self.lent)]
        self.end(name, *self.lent.pop(name), commit=commit)

    def end(self, name, lease, got, broken, *, commit):
        epoch = self.clients[name].feeds[0].epoch
        if commit:
            index = sorted(got)
            self.copies[name][index] = self.memory[index]
            lease.commit()
        else:
            lease.rollback()
            self.back(name, got, broken)
        assert self.clients[name].feeds[0].epoch == epoch + commit

    def back(self, name, got, broken):
        self.sets[name] |= got
        self.broken[name] |= broken

    @precondition(lambda self: self.model.logs and self.clients)
    @rule(number=st.integers(0, 2), written=PAGES, during=PAGES, step=st.integers(0, 2))
    def take_fails(self, number, written, during, step):
        self.write(written)
        name = sorted(self.clients)[number % len(self.clients)]
        epoch, generation = self.clients[name].feeds[0].epoch, self.clients[name].feeds[0].generation
        self.fails, self.during = step, during
        with suppress(ConnectionError):
            self.clients[name].take(0).rollback()
        self.fails, self.during = None, []
        feed = self.clients[name].feeds[0]
        assert (feed.epoch, feed.generation) == (epoch, generation), "what a failed take knows of its epoch"
        now = set(live(self.log).pages().tolist())
        self.model.recorded -= now
        self.model.published |= now

    @precondition(lambda self: hasattr(self, "lease"))
    @invariant()
    def no_client_loses_a_write(self):
        if not self.model.logs:
            return
        fresh = self.log.slot_log(0).feeds.fresh
        for name, client in self.clients.items():
            feed = client.feeds[0]
            known = feed.bitmap | self.s2.dirty() | (DirtyBitmap(self.npages) if fresh is None else fresh)
            pages = set(known.pages().tolist()) | (self.lent[name][1] if name in self.lent else set())
            lacking = np.flatnonzero(self.memory != self.copies[name]).tolist()
            lost = set(lacking) - pages
            assert not lost, f"lost writes to pages {sorted(lost)[:9]} for client {name}"
