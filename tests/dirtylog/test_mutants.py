"""Deliberately broken logs, each of which the machine catches: what it is there for.

The machine's model is off where the invariants alone must do: a log that says too much is legal, one that says too
little loses a write, and that the guest's memory shows.
"""

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from logmachine import LogMachine

from hwdbm import DirtyBitmap
from hwdbm.dirtylog import lease, modes, slot
from hwdbm.dirtylog.lease import Unflushed
from hwdbm.dirtylog.slot import SlotLog
from hwdbm.stage2 import Stage2

HUNT = settings(
    max_examples=400,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],
    derandomize=True,
    database=None,
    print_blob=False,
)


class Blind(LogMachine):
    check_model = False


class Hardware(Blind):
    hw, manual = True, False


class Manual(Blind):
    hw, manual, initially = True, True, False


class Software(Blind):
    hw, manual = False, False


def clears_what_it_is_asked_to(patch):
    """CLEAR without ``mask &= bitmap``: pages that were never shown are cleaned (QEMU 9f4bf4ba)."""

    def clear(self, steps, first, npages, mask):
        def step(lo, hi, generation):
            with self.hold(lo, hi):
                asked = DirtyBitmap(hi - lo)
                asked.fill()
                asked.words[:] &= mask[lo - first >> 6 : hi - first + 63 >> 6]
                self.mode.protect(self.stage2, asked, lo)
                shown = asked & self.logging(generation).part(lo, hi - lo)
                return Unflushed(self.logging(generation), lo, shown).flush(lambda: self._flush(lo, hi))

        return self._lend(steps, step, first, npages)

    patch.setattr(SlotLog, "clear", clear)


def copies_before_the_flush(patch):
    """A bitmap is handed out, and the TLB flushed some time later."""
    patch.setattr(Unflushed, "flush", late_flush)


def late_flush(self, flush):
    words = self._mask.words
    if self._take:
        self._live.words[self._first_page >> 6 : (self._first_page >> 6) + words.size] &= ~words
    return lease.Flushed(lease._Key.FLUSHED, self._first_page, self._mask, taken=self._take)


def takes_before_the_flush(patch):
    """The bits leave the log, then the flush fails, and nobody puts them back."""

    def flush(self, flush):
        receipt = late_flush(self, flush)
        if self._take and self._mask.any():
            flush()
        return receipt

    patch.setattr(Unflushed, "flush", flush)


def forgets_the_steps_before_a_failure(patch):
    """A GET that failed at its second step keeps what the first had taken."""

    def lend(self, steps, step, first, npages):
        generation = self.generation
        receipts = [step(lo, hi, generation) for lo, hi in steps]
        return lease.Lease(self, receipts, first_page=first, npages=npages, generation=generation)

    patch.setattr(SlotLog, "_lend", lend)


def omits_the_rollback(patch):
    """A consumer that failed gives its pages back, and they go nowhere."""
    patch.setattr(SlotLog, "put_back", lambda self, pages, first_page, generation: True)


def protects_a_range(patch):
    """Every page from the mask's first to its last is cleaned, as KVM may under write-protection (RFC patch 4)."""
    protect = Stage2.track_part

    def track_part(self, mask, first=0):
        index = mask.pages()
        if index.size:
            mask = mask.copy()
            mask.set_range(int(index[0]), int(index[-1] - index[0]) + 1)
        return protect(self, mask, first)

    patch.setattr(Stage2, "track_part", track_part)


def moves_without_its_bits(patch):
    """A slot that moves gets a new bitmap."""
    move = SlotLog.move

    def moved(self, memslot, *, full):
        move(self, memslot, full=full)
        if self.live is not None:
            self.live.clear()

    patch.setattr(SlotLog, "move", moved)


def moves_without_its_leaves(patch):
    """A slot that moves keeps its bitmap, and forgets what its leaves had recorded."""

    def unmap_all(self):
        self.stage2.unmap(self.memslot.base_gfn, self.npages)
        self.stage2.take_saved_into(DirtyBitmap(self.npages))
        self._flush(0, self.npages)

    patch.setattr(SlotLog, "_unmap_all", unmap_all)


def starts_unarmed(patch):
    """A log begins, and leaves go on letting the guest write unrecorded."""
    patch.setattr(Stage2, "enable_dbm", lambda self, mask=None: 0)


def starts_without_a_flush(patch):
    """A log begins, and the TLB still has the leaves from before."""

    def start(self, *, full):
        self.live = DirtyBitmap(self.npages)
        if full:
            self.live.fill()
        else:
            self.mode.start(self.stage2)

    patch.setattr(SlotLog, "_start", start)


def switches_without_a_harvest(patch):
    """Hardware DBM is switched off, and what it had recorded with it."""

    def leave(self, s2, bitmap):
        s2.disable_dbm() if bitmap is None else s2.wrprotect()
        s2.take_saved_into(DirtyBitmap(s2.npages))
        return modes.Tally()

    patch.setattr(modes._Hardware, "leave", leave)


def switches_without_arming(patch):
    """Hardware DBM is switched on, and what write faults had granted stays as it is."""
    patch.setattr(modes._Software, "leave", lambda self, s2, bitmap: modes.Tally())


def grants_without_a_mark(patch):
    """A write fault is resolved, and the log isn't told."""
    relax = Stage2.relax

    def relaxed(self, gfn, *, dbm=False):
        return relax(self, gfn, dbm=False)

    patch.setattr(Stage2, "relax", relaxed)
    patch.setattr(slot.Meter, "fault", lambda self: None)
    write_fault = SlotLog.write_fault

    def fault(self, gfn, pfn):
        bitmap, page = self.live, gfn - self.memslot.base_gfn
        was = bitmap is not None and page in bitmap
        write_fault(self, gfn, pfn)
        if bitmap is not None and not was:
            bitmap.set_range(page, 1, False)

    patch.setattr(SlotLog, "write_fault", fault)


def maps_untracked(patch):
    """While hardware keeps the log, a page is mapped for writing, without DBM."""
    put = Stage2.map

    def mapped(self, gfn, npages, pfn, level=3, writable=True, *, dbm=False):
        return put(self, gfn, npages, pfn, level, writable)

    patch.setattr(Stage2, "map", mapped)


def forgets_saved(patch):
    """What replaced leaves had recorded doesn't reach the log."""
    patch.setattr(Stage2, "take_saved_into", lambda self, out, first=0, npages=None: modes.Tally())


def lets_the_host_take_unflushed(patch):
    """The host takes its flags, writes the pages back, and the TLB still lets the guest write them unrecorded."""

    def take(self):
        with self.hold():
            return self.stage2.take_host_dirty()

    patch.setattr(SlotLog, "take_host_dirty", take)


MUTANTS = [
    (Manual, clears_what_it_is_asked_to),
    (Hardware, copies_before_the_flush),
    (Software, copies_before_the_flush),
    (Hardware, takes_before_the_flush),
    (Hardware, forgets_the_steps_before_a_failure),
    (Hardware, omits_the_rollback),
    (LogMachine, omits_the_rollback),
    (Manual, protects_a_range),
    (Hardware, moves_without_its_bits),
    (Hardware, moves_without_its_leaves),
    (Hardware, starts_unarmed),
    (Software, starts_without_a_flush),
    (Hardware, switches_without_a_harvest),
    (Software, switches_without_arming),
    (Software, grants_without_a_mark),
    (Hardware, maps_untracked),
    (Hardware, forgets_saved),
    (Hardware, lets_the_host_take_unflushed),
]


@pytest.mark.parametrize(("machine", "mutate"), MUTANTS, ids=[f"{m.__name__}-{f.__name__}" for m, f in MUTANTS])
def test_caught(machine, mutate, monkeypatch):
    mutate(monkeypatch)
    with pytest.raises(AssertionError, match=r"lost|know|outside|unrecorded|GET"):
        run_state_machine_as_test(machine, settings=HUNT)


def test_the_text_of_every_mutant_is_its_reason():
    assert all(mutate.__doc__ for _, mutate in MUTANTS)
    assert np.all([mutate.__name__.count("_") for _, mutate in MUTANTS])
