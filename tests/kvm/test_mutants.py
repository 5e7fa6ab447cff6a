"""Deliberately wrong models, each of which the recorded answers tell from the kernel: what they are there for."""

from errno import EEXIST, EINVAL
from pathlib import Path

import numpy as np
import pytest
from kvm_calls import PAGE
from kvm_record import MODES, load
from kvm_sides import BACKINGS, ModelSide

from hwdbm import DirtyBitmap, DirtyLog
from hwdbm.dirtylog import MECHANISMS, faults, log
from hwdbm.dirtylog.slot import SlotLog
from hwdbm.kernels import Tally
from hwdbm.memslot import Change, Memslot, Memslots, Plan
from hwdbm.stage2 import Stage2

RECORDINGS = [load(mode) for mode in MODES]


def compare():
    """Ask the models what the kernel was asked, in all modes in turn, up to the first answer that differs."""
    for sequences in zip(*(recording.sequences for recording in RECORDINGS), strict=True):
        for recording, sequence in zip(RECORDINGS, sequences, strict=True):
            models = {backing: ModelSide(recording.limits, recording.mode, backing) for backing in BACKINGS}
            for call, answer in sequence:
                for backing, model in models.items():
                    got = model.answer(call)
                    assert got == answer, f"the kernel answered {call} with {answer}, and not {got}, as {backing}"


def always(patch, method, **arguments):
    """Have a method of SlotLog called with other arguments."""
    real = getattr(SlotLog, method)
    patch.setattr(SlotLog, method, lambda self, *args, **given: real(self, *args, **given | arguments))


# --- GET and CLEAR --------------------------------------------------------------------------------------------


def get_does_not_clear(patch):
    """GET only shows, without manual protection too."""
    always(patch, "get", take=False)


def get_clears_under_manual_protection(patch):
    """GET takes the bits that only a CLEAR may."""
    always(patch, "get", take=True)


def _asking(patch, change):
    """CLEAR is asked for other pages than it was."""
    clear = SlotLog.clear

    def changed(self, steps, first, npages, mask, **options):
        return clear(self, steps, first, npages, change(mask, npages), **options)

    patch.setattr(SlotLog, "clear", changed)


def clear_goes_beyond_its_mask(patch):
    """All pages of the range are cleared."""
    _asking(patch, lambda mask, npages: np.full_like(mask, ~np.uint64(0)))


def clear_takes_the_mask_for_a_range(patch):
    """From the first page that is asked for to the last, as KVM may re-protect, but never clear."""

    def change(mask, npages):
        pages = DirtyBitmap.from_words(mask, 64 * mask.size).pages()
        if pages.size:
            mask = DirtyBitmap.from_pages(range(pages[0], pages[-1] + 1), 64 * mask.size).words
        return mask

    _asking(patch, change)


def clear_forgets_the_last_page(patch):
    """The page that ends the range stays dirty."""

    def change(mask, npages):
        if npages:
            mask = mask.copy()
            mask[npages - 1 >> 6] &= ~np.uint64(1 << (npages - 1 & 63))
        return mask

    _asking(patch, change)


def clear_forgets_what_is_not_a_word(patch):
    """The pages behind the last whole word are left out."""
    _asking(patch, lambda mask, npages: np.where(np.arange(mask.size) < npages // 64, mask, np.uint64(0)))


def clear_counts_from_the_slots_start(patch):
    """Bit 0 is page 0, and not `first_page`."""
    clear = SlotLog.clear

    def changed(self, steps, first, npages, mask, **options):
        if npages & 63:  # it ends with the slot, and couldn't anywhere else
            return clear(self, steps, first, npages, mask, **options)
        return clear(self, [(lo - first, hi - first) for lo, hi in steps], 0, npages, mask, **options)

    patch.setattr(SlotLog, "clear", changed)


def _range(patch, check):
    patch.setattr(log, "_check_range", check)


def clear_wants_whole_words(patch):
    """A range that ends with the slot must be of whole words too."""
    real = log._check_range

    def check(found, first_page, num_pages):
        if num_pages & 63:
            raise OSError(EINVAL, "ragged")
        return real(found, first_page, num_pages)

    _range(patch, check)


def clear_takes_any_number_of_pages(patch):
    """A ragged range may end anywhere."""

    def check(found, first_page, num_pages):
        if not 0 <= num_pages <= found.npages - first_page:
            raise OSError(EINVAL, "beyond")
        return first_page + num_pages

    _range(patch, check)


def clear_cuts_off_what_is_beyond_the_slot(patch):
    """A range that reaches beyond the slot is shortened, and not refused."""
    real = log._check_range
    _range(patch, lambda found, first, pages: real(found, first, min(pages, max(found.npages - first, 0))))


def clear_refuses_the_slots_end(patch):
    """No pages, from the first page that there isn't: the kernel lets that pass."""
    real = log._check_range

    def check(found, first_page, num_pages):
        if first_page >= found.npages:
            raise OSError(EINVAL, "beyond")
        return real(found, first_page, num_pages)

    _range(patch, check)


def clear_begins_anywhere(patch):
    """`first_page` is rounded down."""
    real = DirtyLog.clear_dirty_log
    patch.setattr(DirtyLog, "clear_dirty_log", lambda self, slot, first, *args: real(self, slot, first & ~63, *args))


def clear_looks_for_the_slot_first(patch):
    """A slot that there isn't is ENOENT, whatever `first_page` is."""
    real = DirtyLog.clear_dirty_log

    def clear(self, slot, first, *args):
        self._find(slot).logging()
        return real(self, slot, first, *args)

    patch.setattr(DirtyLog, "clear_dirty_log", clear)


def clear_pads_its_mask(patch):
    """A mask that is too short is taken to end with zeros."""
    real = log._words
    patch.setattr(log, "_words", lambda bitmap, pages: real(bitmap.tobytes() + bytes(8 * (pages + 63 >> 6)), pages))


# --- the bitmap's life ----------------------------------------------------------------------------------------


def never_starts_full(patch):
    """INITIALLY_SET is ignored."""
    always(patch, "start_steps", full=False)


def always_starts_full(patch):
    """Every log begins with all bits set."""
    always(patch, "start_steps", full=True)


def a_move_forgets_the_bits(patch):
    """A slot that moves gets a new bitmap."""
    move = SlotLog.move_steps

    def moved(self, memslot, *, full):
        yield from move(self, memslot, full=full)
        if self.live is not None:
            self.live.clear()

    patch.setattr(SlotLog, "move_steps", moved)


def a_move_forgets_the_leaves(patch):
    """What the leaves had recorded isn't put into the bitmap that moves."""
    patch.setattr(Stage2, "take_saved_into", lambda self, out, first=0, npages=None: Tally())


def stopping_keeps_the_bits(patch):
    """The bitmap of a log that ended is there again when it is switched on."""
    stop, start = SlotLog.stop_steps, SlotLog.start_steps

    def stopped(self, memslot):
        self.kept = self.live
        yield from stop(self, memslot)

    def started(self, memslot, *, full):
        yield from start(self, memslot, full=full)
        if getattr(self, "kept", None) is not None:
            self.live.words[:] |= self.kept.words

    patch.setattr(SlotLog, "stop_steps", stopped)
    patch.setattr(SlotLog, "start_steps", started)


# --- writes ---------------------------------------------------------------------------------------------------


def a_write_marks_its_first_page(patch):
    """A write across two pages is one to the first."""
    patch.setattr(ModelSide, "access", lambda self, gpa, length, how: how(gpa // PAGE))


def a_write_faults_unmarked(patch):
    """A write fault is resolved, and the log isn't told."""
    patch.setattr(faults, "mark", lambda live, pages: None)


def a_log_starts_unarmed(patch):
    """Leaves go on letting the guest write unrecorded when a log begins."""
    patch.setattr(Stage2, "enable_dbm", lambda self, mask=None: 0)


def nothing_is_protected_again(patch):
    """A CLEAR takes the bits, and the leaves stay writable."""
    for kind in MECHANISMS.values():
        patch.setattr(kind, "protect", lambda self, s2, mask, first, out: Tally())


def the_tlb_is_not_flushed(patch):
    """The vCPU goes on with the leaves that it has cached."""
    patch.setattr(SlotLog, "flush", lambda self, *_, **__: None)


# --- memslots -------------------------------------------------------------------------------------------------


def overlaps_are_allowed(patch):
    """Two slots may have a page in common."""
    patch.setattr(Memslots, "_check_overlap", lambda self, new: None)


def an_overlap_is_invalid(patch):
    """EINVAL, and not EEXIST."""
    check = Memslots._check_overlap

    def checked(self, new):
        try:
            check(self, new)
        except FileExistsError as error:
            raise OSError(EINVAL, error.strerror) from error

    patch.setattr(Memslots, "_check_overlap", checked)


def neighbours_overlap(patch):
    """A slot may not begin where another ends."""
    check = Memslots._check_overlap

    def checked(self, new):
        if any(new.base_gfn == other.end_gfn for other in self.all() if other.id != new.id):
            raise OSError(EEXIST, "it touches another")
        check(self, new)

    patch.setattr(Memslots, "_check_overlap", checked)


def slots_can_be_resized(patch):
    """A slot may be given another size while it is there."""
    _modified(patch, lambda old, flags, base, npages, hva: (flags, base, old.npages, hva))


def backings_can_be_changed(patch):
    """A slot may be given another address."""
    _modified(patch, lambda old, flags, base, npages, hva: (flags, base, npages, old.userspace_addr))


def readonly_can_be_changed(patch):
    """A slot may become read-only, or cease to be."""
    _modified(patch, lambda old, flags, base, npages, hva: (flags & 1 | old.flags & 2, base, npages, hva))


def _modified(patch, change):
    real = Memslots._modified
    patch.setattr(Memslots, "_modified", lambda self, old, *asked: real(self, old, *change(old, *asked)))


def there_is_always_a_slot_to_delete(patch):
    """Deleting what isn't there succeeds."""
    plan = Memslots.plan

    def planned(self, slot, flags, guest_phys_addr, memory_size, userspace_addr):
        if memory_size == 0 and slot not in self._slots:
            memory_size = self.granule.page_size
            there = plan(self, slot, flags, guest_phys_addr, memory_size, userspace_addr).new
            return Plan(Change.NOTHING, there, there)
        return plan(self, slot, flags, guest_phys_addr, memory_size, userspace_addr)

    patch.setattr(Memslots, "plan", planned)


def other_flags_are_no_change_of_a_move(patch):
    """A slot that moves keeps its flags."""
    real = Memslots._modified

    def modified(self, old, flags, base, npages, hva):
        change, new = real(self, old, flags, base, npages, hva)
        if change is Change.MOVE:
            new = Memslot(new.id, old.flags, new.base_gfn, new.npages, new.userspace_addr, new.generation)
        return change, new

    patch.setattr(Memslots, "_modified", modified)


def _limits(patch, **limits):
    init = Memslots.__init__
    patch.setattr(Memslots, "__init__", lambda self, granule, **given: init(self, granule, **given | limits))


def slots_are_as_many_as_on_arm64(patch):
    """32767, and x86 keeps the last three for itself."""
    _limits(patch, slot_limit=32767)


def there_are_two_address_spaces(patch):
    """The kernel that answered was built without SMM."""
    _limits(patch, address_spaces=2)


def the_guests_end_is_one_bit_earlier(patch):
    """Slots between there and the kernel's own end are refused."""
    _limits(patch, ipa_bits=51)


def any_address_is_a_process_s(patch):
    """`userspace_addr` isn't asked about: what was wrong here before the kernel said so."""
    patch.setattr("hwdbm.memslot._USER_BITS", 65)


MUTANTS = [
    get_does_not_clear,
    get_clears_under_manual_protection,
    clear_goes_beyond_its_mask,
    clear_takes_the_mask_for_a_range,
    clear_forgets_the_last_page,
    clear_forgets_what_is_not_a_word,
    clear_counts_from_the_slots_start,
    clear_wants_whole_words,
    clear_takes_any_number_of_pages,
    clear_cuts_off_what_is_beyond_the_slot,
    clear_refuses_the_slots_end,
    clear_begins_anywhere,
    clear_looks_for_the_slot_first,
    clear_pads_its_mask,
    never_starts_full,
    always_starts_full,
    a_move_forgets_the_bits,
    a_move_forgets_the_leaves,
    stopping_keeps_the_bits,
    a_write_marks_its_first_page,
    a_write_faults_unmarked,
    a_log_starts_unarmed,
    nothing_is_protected_again,
    the_tlb_is_not_flushed,
    overlaps_are_allowed,
    an_overlap_is_invalid,
    neighbours_overlap,
    slots_can_be_resized,
    backings_can_be_changed,
    readonly_can_be_changed,
    there_is_always_a_slot_to_delete,
    other_flags_are_no_change_of_a_move,
    slots_are_as_many_as_on_arm64,
    there_are_two_address_spaces,
    the_guests_end_is_one_bit_earlier,
    any_address_is_a_process_s,
]


@pytest.mark.slow
@pytest.mark.parametrize("mutate", MUTANTS, ids=lambda mutate: mutate.__name__)
def test_caught(mutate, monkeypatch):
    mutate(monkeypatch)
    with pytest.raises(AssertionError, match="the kernel answered"):
        compare()


def test_the_page_has_their_number():
    page = Path(__file__).parents[2] / "docs" / "conformance.md"
    assert f"has {len(MUTANTS)} models" in page.read_text()
    assert all(mutate.__doc__ for mutate in MUTANTS)
