"""GET and CLEAR: every row of KVM's tables, in the order of its checks; and a failed call changes nothing."""

from errno import EFAULT, EINVAL, ENOENT

import numpy as np
import pytest
from logtools import frozen, live, take

from hwdbm import DirtyBitmap, DirtyLog, Memslot, walker
from hwdbm.errors import GfnError
from hwdbm.memslot import Change

NPAGES, GFN = 1000, 0x123


def make(**kwargs):
    """Slot 0 logs, with dirty pages in the log and in the leaves; slot 1 doesn't; slot 2 is absent."""
    log = DirtyLog(**kwargs)
    log.set_memory_region(slot=0, flags=1, guest_phys_addr=GFN << 12, memory_size=NPAGES << 12, userspace_addr=1 << 30)
    log.set_memory_region(slot=1, flags=0, guest_phys_addr=0x8000 << 12, memory_size=64 << 12, userspace_addr=2 << 30)
    log.map(0, GFN, NPAGES, 0x8000)
    log.mark_dirty(0, 3, 200)
    for page in (0, 70, 999):
        if log.hw_dbm:
            walker.guest_write(log.stage2(0), GFN + page)
        else:
            log.write_fault(0, GFN + page)
    return log


MODES = [{"hw_dbm": hw, "manual_protect": manual} for hw in (True, False) for manual in (True, False)]
modes = pytest.mark.parametrize("mode", MODES, ids=str)


def errno_of(call, text=None):
    with pytest.raises(OSError, match=text) as caught:
        call()
    return caught.value.errno


# --- GET ------------------------------------------------------------------------------------------------------


@modes
@pytest.mark.parametrize(
    ("slot", "number", "text"),
    [
        (32767, EINVAL, "32767"),
        (0xFFFF, EINVAL, "65535"),
        (1 << 16, EINVAL, "address space 1"),
        (-1, EINVAL, "address space -1"),
        (1 << 40, EINVAL, "address space"),
        (2, ENOENT, "slot 2"),
        (32766, ENOENT, "slot 32766"),
        (1, ENOENT, "slot 1 has no dirty bitmap"),
    ],
)
@pytest.mark.parametrize("lease", [False, True])
def test_get(mode, slot, number, text, lease):
    log = make(**mode)
    before = frozen(log)
    assert errno_of(lambda: log.get_dirty_log(slot, lease=lease), text) == number
    assert frozen(log) == before


# --- CLEAR ----------------------------------------------------------------------------------------------------

CLEAR = [
    # slot, first_page, num_pages, errno, text
    (32767, 0, 64, EINVAL, "number 32767"),
    (1 << 16, 0, 64, EINVAL, "address space"),
    (0, 1, 64, EINVAL, "first_page 1 "),
    (0, 63, 64, EINVAL, "first_page 63"),
    (0, -1, 64, EINVAL, "first_page -1"),
    (0, 65, 0, EINVAL, "first_page 65"),
    (2, 0, 64, ENOENT, "slot 2"),
    (1, 0, 64, ENOENT, "slot 1 has no"),
    (0, 1024, 0, EINVAL, "first_page 1024"),
    (0, 1 << 60, 0, EINVAL, "first_page"),
    (0, -64, 64, EINVAL, "first_page -64"),
    (0, 0, 1001, EINVAL, "num_pages 1001"),
    (0, 0, 1024, EINVAL, "num_pages 1024"),
    (0, 960, 64, EINVAL, "num_pages 64 from 960"),
    (0, 960, 41, EINVAL, "num_pages 41"),
    (0, 0, 1, EINVAL, "neither a multiple of 64"),
    (0, 0, 63, EINVAL, "num_pages 63"),
    (0, 0, 65, EINVAL, "num_pages 65"),
    (0, 0, 999, EINVAL, "num_pages 999"),
    (0, 960, 39, EINVAL, "num_pages 39"),
    (0, 0, -64, EINVAL, "num_pages -64"),
]


@modes
@pytest.mark.parametrize(("slot", "first", "num", "number", "text"), CLEAR)
def test_clear(mode, slot, first, num, number, text):
    log = make(**mode)
    before = frozen(log)
    mask = b"\xff" * (8 * -(-max(num, 0) // 64))
    assert errno_of(lambda: log.clear_dirty_log(slot, first, num, mask), text) == number
    assert frozen(log) == before
    # The same goes for a sync of that range: its rules are the same.
    assert errno_of(lambda: log.sync(slot, first, num), text) == number
    assert frozen(log) == before


@modes
def test_the_order_of_clears_checks(mode):
    log = make(**mode)
    bad = b"short"
    calls = [
        (lambda: log.clear_dirty_log(32767, 1, 5000, bad), EINVAL, "number 32767"),  # the id before all else
        (lambda: log.clear_dirty_log(2, 1, 5000, bad), EINVAL, "first_page 1 is not"),  # alignment before existence
        (lambda: log.clear_dirty_log(1, 1, 5000, bad), EINVAL, "first_page 1 is not"),
        (lambda: log.clear_dirty_log(2, 64, 5000, bad), ENOENT, "slot 2"),  # existence before the range
        (lambda: log.clear_dirty_log(1, 64, 5000, bad), ENOENT, "slot 1"),
        (lambda: log.clear_dirty_log(0, 64, 5000, bad), EINVAL, "num_pages 5000"),  # the range before the copy
        (lambda: log.clear_dirty_log(0, 64, 64, bad), EFAULT, "8 bytes, got 5"),
    ]
    for call, number, text in calls:
        assert errno_of(call, text) == number


@modes
@pytest.mark.parametrize(("first", "num"), [(0, 0), (64, 0), (960, 40), (0, 1000), (0, 64), (896, 104), (0, 960)])
def test_ranges_that_are_allowed(mode, first, num):
    log = make(**mode)
    words = -(-num // 64)
    for mask in (b"\xff" * 8 * words, bytearray(8 * words), memoryview(bytes(8 * words)), np.zeros(words, np.uint64)):
        assert log.clear_dirty_log(0, first, num, mask) is None
    log.clear_dirty_log(0, first, num, DirtyBitmap(num))
    log.sync(0, first, num)
    log.verify()


def test_a_slot_of_whole_words_may_be_cleared_at_its_end():
    log = DirtyLog()
    log.set_memory_region(0, 1, 0, 128 << 12, 0)
    log.clear_dirty_log(0, 128, 0, b"")  # first_page == npages and num_pages == 0, measured
    log.sync(0, 128)
    assert errno_of(lambda: log.clear_dirty_log(0, 192, 0, b""), "first_page 192") == EINVAL


@pytest.mark.parametrize("mask", [b"", bytes(7), np.zeros(0, np.uint64), DirtyBitmap(0)])
def test_a_mask_has_the_size_that_kvm_would_copy(mask):
    log = make()
    before = frozen(log)
    assert errno_of(lambda: log.clear_dirty_log(0, 0, 64, mask), "a mask of 64 pages has 8 bytes") == EFAULT
    assert frozen(log) == before
    log.clear_dirty_log(0, 0, 0, mask)  # nothing is copied


def test_what_lies_beyond_the_words_of_a_mask_is_not_looked_at():
    log = make()
    log.mark_dirty(0, 0, 200)
    mask = DirtyBitmap(1000)
    mask.fill()
    log.clear_dirty_log(0, first_page=0, num_pages=64, bitmap=mask)
    log.clear_dirty_log(0, first_page=128, num_pages=64, bitmap=mask.to_bytes())
    assert log.get_dirty_log(0).ranges().tolist() == [[64, 64], [192, 11], [999, 1]]


def test_a_mask_is_bytes():
    log = make()
    for wrong in ([0], "abcdefgh", 8, None):
        with pytest.raises(TypeError):
            log.clear_dirty_log(0, 0, 64, wrong)


@modes
def test_bits_beyond_the_slots_end_are_harmless(mode):
    log = make(**mode)
    log.get_dirty_log(0, lease=True).rollback()  # published, and none cleared
    wanted = live(log).part(960, 40)
    assert take(log.clear_dirty_log(0, 960, 40, b"\xff" * 8, lease=True)) == wanted
    assert wanted.any()
    log.verify()


def test_a_clear_copies_its_mask():
    log, mask = make(), DirtyBitmap.from_pages([3], 64)
    cleared = take(log.clear_dirty_log(0, 0, 64, mask, lease=True))
    mask.clear()
    assert cleared.pages().tolist() == [3]


# --- memslots -------------------------------------------------------------------------------------------------


@modes
@pytest.mark.parametrize(
    ("change", "number"),
    [
        ({"flags": 5}, EINVAL),
        ({"memory_size": (NPAGES << 12) + 1}, EINVAL),
        ({"memory_size": (NPAGES + 1) << 12}, EINVAL),
        ({"userspace_addr": 3 << 30}, EINVAL),
        ({"flags": 3}, EINVAL),
        ({"slot": 2, "memory_size": 0}, EINVAL),
        ({"guest_phys_addr": 0x7FFF << 12}, 17),
        ({"guest_phys_addr": (1 << 40) - 4096}, EFAULT),
    ],
    ids=str,
)
def test_a_region_that_is_refused_changes_nothing(mode, change, number):
    log = make(**mode)
    before = frozen(log)
    call = {"slot": 0, "flags": 1, "guest_phys_addr": GFN << 12, "memory_size": NPAGES << 12, "userspace_addr": 1 << 30}
    assert errno_of(lambda: log.set_memory_region(**{**call, **change})) == number
    assert frozen(log) == before
    log.verify()


def test_what_set_memory_region_says_it_did():
    log = DirtyLog()
    call = {"slot": 7, "flags": 0, "guest_phys_addr": 0, "memory_size": 1 << 20, "userspace_addr": 0}
    assert log.set_memory_region(**call) is Change.CREATE
    assert log.set_memory_region(**call) is Change.NOTHING
    assert log.set_memory_region(**{**call, "flags": 1}) is Change.FLAGS_ONLY
    assert log.set_memory_region(**{**call, "flags": 1, "guest_phys_addr": 1 << 21}) is Change.MOVE
    assert log.memslots == (log.slot(7),)
    assert log.slot(7) == Memslot(7, 1, 0x200, 256, 0, generation=3)
    assert log.stage2(7).base_gfn == 0x200
    assert log.set_memory_region(**{**call, "memory_size": 0}) is Change.DELETE
    assert log.memslots == ()
    assert errno_of(lambda: log.slot(7)) == ENOENT
    assert errno_of(lambda: log.stage2(7)) == ENOENT
    assert errno_of(lambda: log.stage2(1 << 20)) == EINVAL


def test_moving_and_changing_the_flags_at_once():
    log = make()
    call = {"slot": 0, "guest_phys_addr": 0x4000 << 12, "memory_size": NPAGES << 12, "userspace_addr": 1 << 30}
    assert log.set_memory_region(flags=0, **call) is Change.MOVE
    assert errno_of(lambda: log.get_dirty_log(0)) == ENOENT
    log.map(0, 0x4000, 64, 0)
    call["guest_phys_addr"] = GFN << 12
    assert log.set_memory_region(flags=1, **call) is Change.MOVE
    assert not log.get_dirty_log(0).any()
    assert not log.stage2(0).level(1).any()
    log.verify()


def test_address_spaces_are_apart():
    log = DirtyLog(address_spaces=2)
    for slot in (0, 1 << 16):
        log.set_memory_region(slot, 1, 0, 64 << 12, slot << 12)
    log.mark_dirty(1 << 16, 5)
    assert not log.get_dirty_log(0).any()
    assert log.get_dirty_log(1 << 16).pages().tolist() == [5]


# --- the other verbs ------------------------------------------------------------------------------------------


@modes
def test_absent_slots_and_places(mode):
    log = make(**mode)
    for call in (
        lambda: log.map(2, 0, 1, 0),
        lambda: log.unmap(2, 0, 1),
        lambda: log.write_fault(2, 0),
        lambda: log.mark_dirty(2, 0),
        lambda: log.mark_dirty_range(2, 0, 1),
        lambda: log.sync(2),
        lambda: log.harvest_steps(2),
        lambda: log.take_host_dirty(2),
        lambda: log.locked(2).__enter__(),
    ):
        assert errno_of(call, "slot 2") == ENOENT
    before = frozen(log)
    for call in (
        lambda: log.map(0, GFN - 1, 1, 0),
        lambda: log.map(0, GFN, NPAGES + 1, 0),
        lambda: log.map(0, GFN, 1, 1 << 40),
        lambda: log.unmap(0, GFN + NPAGES, 1),
        lambda: log.write_fault(0, GFN + NPAGES),
        lambda: log.mark_dirty(0, NPAGES),
        lambda: log.mark_dirty(0, -1),
        lambda: log.mark_dirty(0, 0, -1),
        lambda: log.mark_dirty_range(0, (GFN << 12) - 1, 1),
        lambda: log.mark_dirty_range(0, GFN << 12, -5),
        lambda: log.mark_dirty_range(0, GFN << 12, (NPAGES << 12) + 1),
        lambda: log.locked(0, 0, NPAGES + 1).__enter__(),
    ):
        with pytest.raises(GfnError):
            call()
        assert frozen(log) == before


@pytest.mark.parametrize("hw", [True, False])
def test_a_fault_that_cannot_be_granted_is_not_marked(hw):
    log = DirtyLog(hw_dbm=hw)
    log.set_memory_region(0, 1, 0, 64 << 12, 0)
    log.set_memory_region(1, 3, 64 << 12, 64 << 12, 1 << 20)
    log.map(1, 64, 64, 0)
    before = frozen(log, 0), frozen(log, 1)
    assert errno_of(lambda: log.write_fault(0, 5), "gfn 0x5 has no leaf") == EFAULT
    assert errno_of(lambda: log.write_fault(1, 65), "slot 1 is read-only") == EFAULT
    assert errno_of(lambda: log.write_fault(1, 65, 3), "slot 1 is read-only") == EFAULT
    with pytest.raises(GfnError):
        log.write_fault(0, 5, 1 << 40)
    assert (frozen(log, 0), frozen(log, 1)) == before
    assert log.stats.write_faults == 0


def test_construction():
    assert errno_of(lambda: DirtyLog(initially_set=True), "INITIALLY_SET") == EINVAL
    for step in (0, 63, 65, -64):
        with pytest.raises(ValueError, match="step"):
            DirtyLog(step_pages=step)
    log = DirtyLog(hw_dbm=False, manual_protect=True, initially_set=True)
    assert (log.hw_dbm, log.manual_protect, log.initially_set) == (False, True, True)
    assert repr(log) == "<DirtyLog: 0 slots, write-protection, manual>"
    log = DirtyLog()
    log.enable_manual_protect()
    assert (log.manual_protect, log.initially_set) == (True, False)
    log.enable_manual_protect(initially_set=True)
    assert log.initially_set
