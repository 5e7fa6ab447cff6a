"""Machines that are broken in one place each; the state machine says so. It shows what the tests are able to see."""

import numpy as np
import pytest
from hunting import hunt
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from vmmachine import GuestMachine, TwinMachine

from hwdbm import pte
from hwdbm.dirtylog import DirtyLog, faults
from hwdbm.machine import Blocks, Machine, mmu
from hwdbm.machine.frames import Frames
from hwdbm.machine.tlb import CLEAN, Tlb
from hwdbm.stage2 import Stage2

# A machine that is caught ends where it is, with whatever lease it has.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning")]

HUNT = settings(
    max_examples=800,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],
    derandomize=True,
    database=None,
    print_blob=False,
)

DECIDE = mmu._decide


class Hardware(GuestMachine):
    hw, manual, capacity = True, False, 10_000
    policy = Blocks.WRITE
    check_verify = False


class Software(Hardware):
    hw = False


class Tracked(Hardware):
    policy, thp, sizes = Blocks.TRACK, True, (1024, 1536)


class TrackedSoftware(Tracked):
    hw = False


class Checked(Hardware):
    check_verify = True


def never_flushes(patch):
    """Cached writable-dirty entries outlive the harvest."""
    patch.setattr(Tlb, "flush", lambda self, first, npages: None)


def flushes_pages_alone(patch):
    """A block that reaches into the pages stays cached."""

    def flush(self, first, npages):
        self.page[first : first + npages] = 0

    patch.setattr(Tlb, "flush", flush)


def trusts_clean_entries(patch):
    """A cached writable-clean entry isn't checked against memory at a write (R_SGJBL)."""
    patch.setattr(Tlb, "writes", CLEAN)


def forgets_what_it_replaces(patch):
    """Leaves that are shared, moved or split go without their dirty state."""
    patch.setattr(Stage2, "_save_record", lambda self, saved=None, told=None: self._silent)


def sets_af_alone(patch):
    """The MMU lets the write through, and sets AF but not the dirty state."""

    def af_alone(descs, *, write, ha, hd):
        access, kind, new = DECIDE(descs, write=write, ha=ha, hd=hd)
        lost = pte.writable_clean(3)(descs) | pte.writable_clean(2)(descs)
        return access, kind, np.where(lost, descs | np.uint64(pte.AF), new)

    patch.setattr(mmu, "_decide", af_alone)


def grants_without_marking(patch):
    """A write fault is resolved, and the log doesn't hear of it."""
    patch.setattr(faults, "mark", lambda live, pages: None)


def marks_the_page_of_a_block(patch):
    """A block that is logged as a whole has a write to it, and one page is marked."""
    blocks = faults._blocks

    def one_page(s2, found):
        return [(start, start + 1) for start, _ in blocks(s2, found)]

    patch.setattr(faults, "_blocks", one_page)


def tells_nobody_of_devices(patch):
    """The VMM writes, and doesn't mark (cloud-hypervisor #2458)."""

    def write(self, slot_id, start, raw, first_page, npages):
        self.memory(slot_id)[start : start + raw.size] = raw

    patch.setattr(Machine, "_write", write)


def shares_without_protecting(patch):
    """A page becomes shared, and its leaf stays writable: copy on write is broken."""

    def share(self, slot, first_page, npages):
        self.space.find(slot).frames.share(first_page, npages)

    patch.setattr(Machine, "share", share)


def maps_shared_pages_writable(patch):
    """The handler maps what is there without asking whether others have it too."""
    populate = DirtyLog.populate

    def careless(self, slot, pages, frames, *, write, blocks):
        shared, frames.shared = frames.shared, np.zeros_like(frames.shared)
        populate(self, slot, pages, frames, write=write, blocks=blocks)
        frames.shared = shared

    patch.setattr(DirtyLog, "populate", careless)


def copies_to_no_new_frame(patch):
    """A copy on write leaves the page where it was."""
    patch.setattr(Frames, "renew_one", lambda self, page: self.one(page))
    patch.setattr(Frames, "renew", lambda self, pages: self.of(pages))


CASES = [
    (Hardware, never_flushes),
    (Software, never_flushes),
    (Tracked, flushes_pages_alone),
    (Hardware, trusts_clean_entries),
    (Hardware, forgets_what_it_replaces),
    (Hardware, sets_af_alone),
    (Software, grants_without_marking),
    (TrackedSoftware, marks_the_page_of_a_block),
    (Hardware, tells_nobody_of_devices),
    (Checked, shares_without_protecting),
    (Checked, maps_shared_pages_writable),
    (Checked, copies_to_no_new_frame),
]
RULES = {marks_the_page_of_a_block: {"store", "start", "collect"}}
"""What a rare one is hunted with: among all rules it takes hundreds of examples."""


@pytest.mark.parametrize(("machine", "break_it"), CASES, ids=lambda case: case.__name__)
def test_a_broken_machine_is_caught(machine, break_it, monkeypatch):
    break_it(monkeypatch)
    with pytest.raises(AssertionError):
        hunt(machine, HUNT, RULES.get(break_it))


@pytest.mark.parametrize("machine", [Hardware, Software, Tracked, TrackedSoftware, Checked])
def test_one_that_is_not_broken_passes(machine):
    run_state_machine_as_test(machine, settings=settings(HUNT, max_examples=15))


def caches_what_was_there_before(patch):
    """A TLB keeps the leaf as it was before the update: writable-clean, though it was written."""

    def stale(descs, *, write, ha, hd):
        access, kind, new = DECIDE(descs, write=write, ha=ha, hd=hd)
        return access, np.where(pte.writable_clean(3)(descs), np.uint8(CLEAN), kind), new

    patch.setattr(mmu, "_decide", stale)


def decides_without_af(patch):
    """A walk that doesn't set AF."""
    patch.setattr(mmu, "_decide", lambda descs, *, write, ha, hd: DECIDE(descs, write=write, ha=False, hd=hd))


@pytest.mark.parametrize("break_it", [caches_what_was_there_before, decides_without_af], ids=lambda case: case.__name__)
def test_the_reference_catches_what_loses_nothing(break_it, monkeypatch):
    break_it(monkeypatch)
    with pytest.raises((AssertionError, OSError)):
        run_state_machine_as_test(TwinMachine, settings=settings(HUNT, max_examples=100))
