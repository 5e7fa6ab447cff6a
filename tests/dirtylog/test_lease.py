"""Leases: commit, rollback, staleness, and the types that put the flush before the copy."""

import subprocess
import sys
from errno import ENOENT
from pathlib import Path

import pytest
from logtools import live, make, pages_of, write

from hwdbm import DirtyBitmap, DirtyLog, Lease
from hwdbm.dirtylog import Flushed, Unflushed
from hwdbm.errors import StaleLeaseError


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


# --- the order, by types --------------------------------------------------------------------------------------


def test_what_is_not_flushed_shows_no_pages():
    unflushed = Unflushed(DirtyBitmap(64), 0, DirtyBitmap.from_pages([1], 64))
    assert [name for name in dir(unflushed) if not name.startswith("_")] == ["flush"]
    assert not hasattr(unflushed, "__dict__")
    with pytest.raises(TypeError, match="receipts of flushes"):
        Lease(DirtyLog(), [unflushed], first_page=0, npages=64, generation=0)


def test_only_a_flush_makes_a_receipt():
    for key in (None, "flushed", object()):
        with pytest.raises(TypeError, match=r"made by Unflushed\.flush"):
            Flushed(key, 0, DirtyBitmap(64), taken=True)


def test_the_bits_leave_when_the_flush_has_returned():
    live_bits = DirtyBitmap.from_pages([1, 70], 128)
    seen = []
    receipt = Unflushed(live_bits, 64, live_bits.part(64, 64)).flush(lambda: seen.append(live_bits.copy()))
    assert (pages_of(seen[0]), pages_of(live_bits)) == ([1, 70], [1])
    assert (receipt.first_page, pages_of(receipt.pages), receipt.taken) == (64, [6], True)


def test_a_flush_that_fails_gives_no_receipt_and_takes_nothing():
    live_bits = DirtyBitmap.from_pages([1], 64)
    unflushed = Unflushed(live_bits, 0, live_bits.copy())
    with pytest.raises(ZeroDivisionError):
        unflushed.flush(lambda: 1 / 0)
    assert pages_of(live_bits) == [1]
    with pytest.raises(ValueError, match="flushed before"):
        unflushed.flush(lambda: None)  # bits that were set since would go
    assert pages_of(live_bits) == [1]


def test_nothing_is_flushed_for_nothing():
    called = []
    empty = Unflushed(DirtyBitmap(64), 0, DirtyBitmap(64)).flush(lambda: called.append(1))
    assert empty.taken
    full = DirtyBitmap.from_pages([1], 64)
    shown = Unflushed(full, 0, full.copy(), take=False).flush(lambda: called.append(1))
    assert not shown.taken
    assert (called, pages_of(full)) == ([], [1])


WRONG = """
from hwdbm import DirtyBitmap, DirtyLog, Lease
from hwdbm.dirtylog import Unflushed
from hwdbm.dirtylog.slot import SlotLog

def early(lender: SlotLog, live: DirtyBitmap) -> DirtyBitmap:
    unflushed = Unflushed(live, 0, live)
    unflushed.pages                                                              # no-attr
    Lease(lender, [unflushed], first_page=0, npages=1, generation=0)             # no-receipt
    return DirtyLog().get_dirty_log(0, lease=True)                               # no-bitmap
"""


def test_mypy_says_so_too(tmp_path):
    pytest.importorskip("mypy")
    root = Path(__file__).parents[2]
    wrong = tmp_path / "wrong.py"
    wrong.write_text(WRONG)
    mypy = [sys.executable, "-P", "-m", "mypy", "--strict"]
    command = [*mypy, "--config-file", str(root / "pyproject.toml"), str(wrong)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    found = [line for line in done.stdout.splitlines() if "wrong.py" in line and "error" in line]
    lines = [number for number, line in enumerate(WRONG.splitlines(), 1) if "# no-" in line]
    assert [int(line.split(":")[1]) for line in found] == lines, done.stdout + done.stderr
