"""Leases: commit, rollback, staleness, what consumers do to the bitmap, and leases that are forgotten."""

import subprocess
import sys
from errno import ENOENT

import numpy as np
import pytest
from logtools import live, make, pages_of, write

from hwdbm import DirtyBitmap, DirtyLog, Lease
from hwdbm.errors import BitmapError, StaleLeaseError


def fail(after):
    after()
    raise ConnectionError


def leased(**kwargs):
    log = make(200, **kwargs)
    log.map(0, 0x40, 200, 0)
    write(log, 3, 100)
    return log, log.get_dirty_log(0, lease=True)


# --- commit and rollback --------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [None, 64])
@pytest.mark.parametrize("hw", [True, False])
def test_rollback_puts_every_bit_back(hw, step):
    log, lease = leased(hw_dbm=hw, step_pages=step)
    assert pages_of(lease.bitmap) == [3, 100]
    assert not live(log).any()
    write(log, 4)  # meanwhile
    lease.rollback()
    assert pages_of(log.get_dirty_log(0)) == [3, 4, 100]
    log.verify()


def test_commit_is_for_good():
    log, lease = leased()
    lease.commit()
    assert not log.get_dirty_log(0).any()


@pytest.mark.parametrize("hw", [True, False])
def test_what_was_cleared_can_be_put_back(hw):
    log = make(200, hw_dbm=hw, manual_protect=True, step_pages=64)
    log.map(0, 0x40, 200, 0)
    write(log, 3, 64, 130, 199)
    assert pages_of(log.get_dirty_log(0)) == [3, 64, 130, 199]
    lease = log.clear_dirty_log(0, 64, 136, b"\xff" * 24, lease=True)
    assert (lease.first_page, len(lease.bitmap), pages_of(lease.bitmap)) == (64, 136, [0, 66, 135])
    assert pages_of(log.get_dirty_log(0)) == [3]
    lease.rollback()
    assert pages_of(log.get_dirty_log(0)) == [3, 64, 130, 199]
    log.verify()


def test_a_partly_successful_consumer_puts_back_the_rest():
    log, lease = leased()
    lease.bitmap.set_range(3, 1, False)  # that one was copied
    lease.rollback()
    assert pages_of(log.get_dirty_log(0)) == [100]


def test_a_lease_of_what_was_only_shown_is_a_legal_no_op():
    log, lease = leased(manual_protect=True)
    assert pages_of(lease.bitmap) == [3, 100]
    log.clear_dirty_log(0, 0, 200, ~DirtyBitmap(200))
    lease.rollback()  # it took nothing, so nothing is back
    assert not log.get_dirty_log(0).any()
    log.get_dirty_log(0, lease=True).commit()
    log.clear_dirty_log(0, 64, 0, b"", lease=True).rollback()
    log.clear_dirty_log(0, 64, 0, b"", lease=True).commit()


def test_several_leases_at_once():
    log, one = leased()
    write(log, 3, 5)
    two = log.get_dirty_log(0, lease=True)
    two.commit()
    one.rollback()
    assert pages_of(log.get_dirty_log(0)) == [3, 100]


# --- the context manager --------------------------------------------------------------------------------------


def test_a_block_that_ends_commits():
    log, lease = leased()
    with lease as same:
        assert same is lease
    assert repr(lease) == "<Lease of slot 0: <DirtyBitmap: 2 of 200 pages dirty>, committed>"
    assert not log.get_dirty_log(0).any()


@pytest.mark.parametrize("error", [ConnectionError, KeyboardInterrupt, SystemExit])
def test_a_block_that_raises_rolls_back(error):
    log, lease = leased()
    with pytest.raises(error), lease:
        raise error
    assert "rolled back" in repr(lease)
    assert pages_of(log.get_dirty_log(0)) == [3, 100]


def test_what_was_settled_inside_of_the_block_stays():
    log, lease = leased()
    with lease:
        lease.rollback()
    assert pages_of(log.get_dirty_log(0)) == [3, 100]
    write(log, 7)
    lease = log.get_dirty_log(0, lease=True)
    with pytest.raises(ConnectionError), lease:
        fail(lease.commit)
    assert not log.get_dirty_log(0).any()


def test_a_lease_is_settled_once():
    for first in ("commit", "rollback"):
        log, lease = leased()
        getattr(lease, first)()
        before = live(log).copy()
        for again in ("commit", "rollback", "__enter__"):
            with pytest.raises(ValueError, match=r"the lease of slot 0 was .* before"):
                getattr(lease, again)()
        assert live(log) == before


# --- stale leases ---------------------------------------------------------------------------------------------


def delete(log):
    log.set_memory_region(0, 0, 0, 0, 0)


def delete_and_create(log):
    delete(log)
    switch(log, 1)


def switch(log, flags, base=0x40):
    log.set_memory_region(0, flags, base << 12, 200 << 12, 0)


def off_and_on(log):
    switch(log, 0)
    switch(log, 1)


def off_with_a_move(log):
    switch(log, 0, 0x4000)


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("settle", [Lease.commit, Lease.rollback])
@pytest.mark.parametrize(
    "end", [delete, delete_and_create, lambda log: switch(log, 0), off_and_on, off_with_a_move], ids=range(5)
)
def test_a_lease_ends_with_its_bitmap(end, settle, manual):
    log, lease = leased(manual_protect=manual)
    end(log)
    for _ in range(2):
        with pytest.raises(StaleLeaseError, match="slot 0 was deleted or its log switched off") as caught:
            settle(lease)
        assert caught.value.errno == ENOENT
    if log.memslots and log.slot(0).logging:
        assert not log.get_dirty_log(0).any()


def test_a_move_and_a_switch_of_the_mode_keep_it():
    log, lease = leased()
    switch(log, 1, 0x4000)
    log.set_hw_dirty_log(False)
    switch(log, 1, 0x40)
    lease.rollback()
    assert pages_of(log.get_dirty_log(0)) == [3, 100]
    log, lease = leased()
    switch(log, 1)
    lease.commit()


def test_a_stale_lease_does_not_hide_the_consumers_error():
    log, lease = leased()
    with pytest.raises(ConnectionError) as caught, lease:
        fail(lambda: delete(log))
    assert caught.value.__notes__ == ["slot 0 was deleted or its log switched off, and the lease's bitmap is gone"]
    log, lease = leased()
    with pytest.raises(StaleLeaseError), lease:
        delete(log)


# --- what consumers do to the bitmap --------------------------------------------------------------------------


@pytest.mark.parametrize("npages", [1, 63, 64, 65, 100, 511, 512, 513])
def test_bits_beyond_the_end_never_reach_the_log(npages):
    log = make(npages)
    log.mark_dirty(0, 0)
    for spoil in (
        lambda lease: lease.bitmap.bits.setall(True),
        lambda lease: lease.bitmap.words.fill(np.uint64((1 << 64) - 1)),
    ):
        lease = log.get_dirty_log(0, lease=True)
        spoil(lease)
        lease.rollback()
        assert log.get_dirty_log(0).weight() == npages
        log.mark_dirty(0, npages - 1)
        assert pages_of(log.get_dirty_log(0)) == [npages - 1]
        log.verify()


def test_a_lease_keeps_its_size():
    log, lease = leased()
    for wrong, error in ((DirtyBitmap(64), BitmapError), (DirtyBitmap(201), BitmapError), (b"", TypeError)):
        with pytest.raises(error):
            lease.bitmap = wrong
    assert pages_of(lease.bitmap) == [3, 100]
    with pytest.raises(AttributeError):
        lease.first_page = 64
    lease.bitmap = DirtyBitmap.from_pages([7], 200)
    lease.rollback()
    assert pages_of(log.get_dirty_log(0)) == [7]


def test_a_bitmap_that_was_spoilt_is_refused_and_the_lease_stays_open():
    log, lease = leased()
    words, npages = lease.bitmap.words, lease.bitmap.npages
    lease.bitmap._npages = 64
    with pytest.raises(BitmapError):
        lease.rollback()
    assert "open" in repr(lease)
    lease.bitmap._npages = npages
    assert lease.bitmap.words is words
    lease.rollback()
    assert pages_of(log.get_dirty_log(0)) == [3, 100]


# --- leases that are forgotten --------------------------------------------------------------------------------


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("hw", [True, False])
def test_a_forgotten_lease_gives_its_pages_back(hw, manual):
    log = make(200, hw_dbm=hw, manual_protect=manual)
    log.map(0, 0x40, 200, 0)
    write(log, 3, 100)
    lease = log.lend(0)
    write(log, 4)
    with pytest.warns(ResourceWarning, match="a lease of slot 0 was neither committed nor rolled back: its 2 pages"):
        del lease
    assert pages_of(log.get_dirty_log(0)) == [3, 4, 100]
    log.verify()


def test_what_a_forgetful_consumer_left_of_the_bitmap_counts():
    for spoil, want in (
        (lambda lease: lease.bitmap.set_range(3, 1, False), [100]),
        (lambda lease: lease.bitmap.bits.setall(True), list(range(200))),
        (lambda lease: setattr(lease, "bitmap", DirtyBitmap.from_pages([7], 200)), [7]),
        (lambda lease: setattr(lease.bitmap, "_npages", 64), list(range(200))),  # no bitmap of them: all are dirty
    ):
        log, lease = leased()
        spoil(lease)
        with pytest.warns(ResourceWarning):
            del lease
        assert pages_of(log.get_dirty_log(0)) == want


def test_a_lease_that_is_forgotten_while_its_pages_are_held():
    """The garbage collector runs where it likes: also where the pages are held by the very thread."""
    kept, log = [], make(200, flush=lambda *_: kept.clear())
    log.map(0, 0x40, 200, 0)
    write(log, 3)
    kept.append(log.get_dirty_log(0, lease=True))
    write(log, 4)
    with pytest.warns(ResourceWarning):
        assert pages_of(log.get_dirty_log(0)) == [4]
    assert pages_of(log.get_dirty_log(0)) == [3]


def test_what_needs_no_giving_back_is_forgotten_in_silence():
    log, lease = leased()
    lease.commit()
    del lease
    lease = log.get_dirty_log(0, lease=True)  # of no pages
    del lease
    log, lease = leased(manual_protect=True)  # shown only
    del lease
    log, lease = leased()
    delete(log)
    del lease
    assert len(DirtyLog().memslots) == 0


def test_a_lease_of_a_bitmap_that_is_gone_is_put_back_nowhere():
    log, lease = leased()
    off_and_on(log)
    del lease
    assert not log.get_dirty_log(0).any()


def test_many_get_and_none_is_kept():
    """A GET without a lease leaves nothing behind: neither pages nor the bitmap."""
    log = make(200)
    for page in range(150):
        log.mark_dirty(0, page)
        assert pages_of(log.get_dirty_log(0)) == [page]
    loans = log._slots[0].loans
    log.get_dirty_log(0, lease=True).commit()
    assert len(loans) <= 1
    assert not log.get_dirty_log(0).any()


def test_a_lease_that_is_open_at_the_end_of_the_process_is_no_noise() -> None:
    code = (
        "from hwdbm import DirtyLog\n"
        "log = DirtyLog(); log.set_memory_region(0, 1, 0, 100 << 12, 0); log.mark_dirty(0, 7)\n"
        "lease = log.get_dirty_log(0, lease=True); lease.again = lease\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
