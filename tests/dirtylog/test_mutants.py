"""Deliberately broken logs, each of which the machine catches: what it is there for.

The machine's model is off where the invariants alone must do: a log that says too much is legal, one that says too
little loses a write, and that the guest's memory shows.
"""

import numpy as np
import pytest
from hunting import hunt
from hypothesis import HealthCheck, Phase, settings
from logmachine import LogMachine

from hwdbm import DirtyBitmap
from hwdbm.dirtylog import Lease, faults, mechanism
from hwdbm.dirtylog.slot import Point, SlotLog
from hwdbm.kernels import Tally
from hwdbm.stage2 import Stage2

# A machine that is caught ends where it is, with whatever lease it has.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning")]

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

    def clear_steps(self, lease, lo, hi, mask):
        yield Point.CLEAN
        due = self.changing(lo, hi)
        asked = DirtyBitmap(hi - lo)
        asked.fill()
        asked.words[:] &= mask[lo - lease.first_page >> 6 : hi - lease.first_page + 63 >> 6]
        self.mechanism.protect(self.stage2, asked, lo, None)
        words, taken = self.live.words[lo >> 6 : hi + 63 >> 6], lease.words(lo, hi)
        np.bitwise_and(asked.words, words, out=taken)
        yield from self._take(due, words, taken)

    patch.setattr(SlotLog, "clear_steps", clear_steps)


def copies_before_the_flush(patch):
    """A bitmap is handed out, and the TLB flushed some time later."""

    def late(self, due, words, taken):
        yield Point.TAKE
        words &= ~taken
        self.flush(due, needed=False)

    patch.setattr(SlotLog, "_take", late)


def takes_before_the_flush(patch):
    """The bits leave the log, then the flush fails, and nobody puts them back."""

    def early(self, due, words, taken):
        yield Point.TAKE
        words &= ~taken
        yield Point.FLUSH
        self.flush(due, needed=bool(taken.any()))

    patch.setattr(SlotLog, "_take", early)
    patch.setattr(Lease, "abandon", Lease.commit)


def forgets_the_steps_before_a_failure(patch):
    """A GET that failed at its second step keeps what the first had taken."""
    patch.setattr(Lease, "abandon", Lease.commit)


def omits_the_rollback(patch):
    """A consumer that failed gives its pages back, and they go nowhere."""
    patch.setattr(SlotLog, "put_back", lambda self, pages, first_page, generation: True)


def protects_a_range(patch):
    """Every page from the mask's first to its last is cleaned, as KVM may under write-protection (RFC patch 4)."""
    protect = Stage2.track_part

    def track_part(self, mask, first=0, out=None):
        index = mask.pages()
        if index.size:
            mask = mask.copy()
            mask.set_range(int(index[0]), int(index[-1] - index[0]) + 1)
        return protect(self, mask, first, out)

    patch.setattr(Stage2, "track_part", track_part)


def moves_without_its_bits(patch):
    """A slot that moves gets a new bitmap."""
    move = SlotLog.move_steps

    def moved(self, memslot, *, full):
        yield from move(self, memslot, full=full)
        if self.live is not None:
            self.live.clear()

    patch.setattr(SlotLog, "move_steps", moved)


def moves_without_its_leaves(patch):
    """A slot that moves keeps its bitmap, and forgets what its leaves had recorded."""

    def unmap_all(self):
        yield Point.CLEAN
        due = self.changing(0, self.npages)
        self.stage2.unmap(self.memslot.base_gfn, self.npages)
        self.stage2.take_saved_into(DirtyBitmap(self.npages))
        self.flush(due, needed=True)

    patch.setattr(SlotLog, "_unmap_steps", unmap_all)


def starts_unarmed(patch):
    """A log begins, and leaves go on letting the guest write unrecorded."""
    patch.setattr(Stage2, "enable_dbm", lambda self, mask=None: 0)


def starts_without_a_flush(patch):
    """A log begins, and the TLB still has the leaves from before."""

    def start(self, memslot, *, full):
        yield Point.CLEAN
        live = DirtyBitmap(self.npages)
        if full:
            live.fill()
        else:
            self.mechanism.start(self.stage2)
        self.live, self.memslot = live, memslot

    patch.setattr(SlotLog, "start_steps", start)


def switches_without_a_harvest(patch):
    """Hardware DBM is switched off, and what it had recorded with it."""

    def leave(self, s2, bitmap):
        s2.disable_dbm() if bitmap is None else s2.wrprotect()
        s2.take_saved_into(DirtyBitmap(s2.npages))
        return Tally()

    patch.setattr(mechanism.HardwareDbm, "leave", leave)


def switches_without_arming(patch):
    """Hardware DBM is switched on, and what write faults had granted stays as it is."""
    patch.setattr(mechanism.WriteProtect, "leave", lambda self, s2, bitmap: Tally())


def grants_without_a_mark(patch):
    """A write fault is resolved, and the log isn't told."""
    patch.setattr(faults, "mark", lambda live, pages: None)


def maps_untracked(patch):
    """While hardware keeps the log, a page is mapped for writing, without DBM."""
    put = Stage2.map

    def mapped(self, gfn, npages, pfn, level=3, writable=True, *, dbm=False):
        return put(self, gfn, npages, pfn, level, writable)

    patch.setattr(Stage2, "map", mapped)


def forgets_saved(patch):
    """What replaced leaves had recorded doesn't reach the log."""
    patch.setattr(Stage2, "take_saved_into", lambda self, out, first=0, npages=None: Tally())


def lets_the_host_take_unflushed(patch):
    """The host takes its flags, writes the pages back, and the TLB still lets the guest write them unrecorded."""

    patch.setattr(SlotLog, "take_host_dirty", lambda self: self.stage2.take_host_dirty())


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
RULES = {lets_the_host_take_unflushed: {"write", "host_takes", "flush_fails"}}
"""What a rare one is hunted with: among all rules it takes thousands of examples."""


@pytest.mark.parametrize(("machine", "mutate"), MUTANTS, ids=[f"{m.__name__}-{f.__name__}" for m, f in MUTANTS])
def test_caught(machine, mutate, monkeypatch):
    mutate(monkeypatch)
    with pytest.raises(AssertionError, match=r"lost|know|outside|unrecorded|GET"):
        hunt(machine, HUNT, RULES.get(mutate))


def test_the_text_of_every_mutant_is_its_reason():
    assert all(mutate.__doc__ for _, mutate in MUTANTS)
    assert np.all([mutate.__name__.count("_") for _, mutate in MUTANTS])
