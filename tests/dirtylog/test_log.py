"""The dirty log by example: sizes and tails, modes, faults, blocks, switching, and what it counts."""

import resource
from itertools import product

import numpy as np
import pytest
from logtools import live, make, pages_of, states, take, write

from hwdbm import DirtyBitmap, Granule, pte
from hwdbm.dirtylog import Stats
from hwdbm.errors import GfnError, InvariantError
from hwdbm.pte import State
from hwdbm.stage2 import Stage2

GIB = 1 << 30
RAGGED = (1, 63, 64, 65, 511, 512, 513, (GIB >> 12) + 16)
WAYS = [
    pytest.param({"hw_dbm": hw, "manual_protect": manual, "initially_set": full}, id=f"{hw:d}{manual:d}{full:d}")
    for hw, manual, full in product((True, False), (True, False), (True, False))
    if manual or not full
]


# --- sizes, tails, ways ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("npages", RAGGED)
def test_every_size_in_every_way(npages, way):
    log = make(npages, base=0x1001, ipa_bits=48, **way)
    written = sorted({0, npages // 2, npages - 1} | ({62, 63, 64} if npages > 64 else set()))
    if npages < 1 << 12:
        log.map(0, 0x1001, npages, 0x8000)
    write(log, *written)
    first = log.get_dirty_log(0)
    assert len(first) == npages
    assert first.words.size == -(-npages // 64)
    first.verify()
    assert pages_of(first) == (list(range(npages)) if way["initially_set"] else written)
    if way["manual_protect"]:
        assert log.get_dirty_log(0) == first  # shown, and not cleared
        log.clear_dirty_log(0, 0, npages, b"\xff" * (8 * first.words.size))
    assert not log.get_dirty_log(0).any()
    log.verify()
    write(log, npages - 1)
    assert pages_of(log.get_dirty_log(0)) == [npages - 1]
    log.verify()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("step", [None, 64, 1 << 17])
def test_steps_make_no_difference(way, step):
    log = make(1000, step_pages=step, **way)
    log.map(0, 0x40, 1000, 0)
    write(log, 1, 64, 640, 999)
    if way["initially_set"]:
        log.clear_dirty_log(0, 0, 1000, ~DirtyBitmap(1000))
        write(log, 1, 64, 640, 999)
    assert pages_of(log.get_dirty_log(0)) == [1, 64, 640, 999]
    if way["manual_protect"]:
        log.clear_dirty_log(0, 0, 640, ~DirtyBitmap(640))
        assert pages_of(log.get_dirty_log(0)) == [640, 999]


@pytest.mark.parametrize("granule", Granule, ids=str)
@pytest.mark.parametrize("hw", [True, False])
def test_granules(granule, hw):
    log = make(9000, base=3, granule=granule, hw_dbm=hw, ipa_bits=48)
    log.map(0, 3, 9000, 7)
    write(log, 0, 8999)
    log.mark_dirty_range(0, 4 << granule.page_shift, granule.page_size + 1)
    assert pages_of(log.get_dirty_log(0)) == [0, 1, 2, 8999]
    log.verify()


def test_a_tebibyte_that_is_never_mapped_costs_little():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    log = make((1 << 40) // 4096, base=0, step_pages=1 << 17)
    log.map(0, 1 << 27, 64, 0)
    write(log, (1 << 27) + 5)
    assert pages_of(log.get_dirty_log(0)) == [(1 << 27) + 5]
    log.clear_dirty_log(0, 1 << 27, 64, b"\xff" * 8)
    log.set_hw_dirty_log(False)
    log.set_memory_region(0, 1, 0, 0, 0)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 << 10


# --- GET, CLEAR, sync -----------------------------------------------------------------------------------------


def test_get_shows_a_write_once():
    log = make()
    log.map(0, 0x40, 200, 0x8000)
    write(log, 7)
    assert pages_of(log.get_dirty_log(slot=0)) == [7]
    assert pages_of(log.get_dirty_log(0)) == []
    write(log, 7, 8)
    assert pages_of(log.get_dirty_log(0)) == [7, 8]


@pytest.mark.parametrize("hw", [True, False])
def test_a_bitmap_that_was_given_is_the_callers(hw):
    log = make(hw_dbm=hw, manual_protect=True)
    log.map(0, 0x40, 200, 0)
    write(log, 7)
    log.get_dirty_log(0).clear()
    got = log.get_dirty_log(0)
    assert pages_of(got) == [7]
    write(log, 9)
    assert pages_of(got) == [7]


def test_clear_touches_only_what_was_shown():
    log = make(manual_protect=True)
    log.map(0, 0x40, 200, 0)
    write(log, 3)
    assert pages_of(log.get_dirty_log(0)) == [3]
    write(log, 4)  # not shown yet
    assert pages_of(take(log.clear_dirty_log(0, 0, 64, b"\xff" * 8, lease=True))) == [3]
    assert states(log, 3, 4) == [State.WRITABLE_CLEAN, State.WRITABLE_DIRTY]
    assert pages_of(log.get_dirty_log(0)) == [4]


@pytest.mark.parametrize("manual", [True, False])
@pytest.mark.parametrize("hw", [True, False])
def test_clear_works_with_and_without_manual_protection(hw, manual):
    log = make(hw_dbm=hw, manual_protect=manual)
    log.map(0, 0x40, 200, 0)
    log.mark_dirty(0, 0, 200)
    log.clear_dirty_log(0, first_page=64, num_pages=64, bitmap=DirtyBitmap.from_pages([0, 63], 64))
    assert pages_of(log.get_dirty_log(0)) == sorted(set(range(200)) - {64, 127})


@pytest.mark.parametrize("hw", [True, False])
def test_a_manual_get_changes_no_leaf_and_flushes_nothing(hw):
    log = make(hw_dbm=hw, manual_protect=True)
    log.map(0, 0x40, 200, 0)
    write(log, 3, 100)
    before, flushes = log.stage2(0).level(3).copy(), log.stats.flushes
    assert pages_of(log.get_dirty_log(0)) == [3, 100]
    assert np.array_equal(log.stage2(0).level(3), before)
    assert log.stats.flushes == flushes


def test_sync_publishes_and_cleans():
    log = make(manual_protect=True)
    log.map(0, 0x40, 200, 0)
    write(log, 3, 100, 199)
    log.sync(0, 64, 64)
    assert pages_of(live(log)) == [100]
    assert states(log, 3, 100, 199) == [State.WRITABLE_DIRTY, State.WRITABLE_CLEAN, State.WRITABLE_DIRTY]
    log.sync(0, 64)
    assert pages_of(live(log)) == [100, 199]
    log.sync(0)
    assert pages_of(live(log)) == [3, 100, 199]
    assert not log.stage2(0).dirty().any()


def test_harvest_steps_are_complete_each():
    log = make(200, step_pages=64)
    log.map(0, 0x40, 200, 0)
    write(log, 3, 70, 199)
    seen = [(step, pages_of(live(log)), log.stats.flushes) for step in log.harvest_steps(0)]
    assert seen == [((0, 64), [3], 1), ((64, 64), [3, 70], 2), ((128, 64), [3, 70], 2), ((192, 8), [3, 70, 199], 3)]


def test_what_replaced_leaves_had_recorded_is_shown():
    log = make()
    log.map(0, 0x40, 200, 0)
    write(log, 5, 6)
    log.unmap(0, 0x45, 1)
    log.map(0, 0x46, 1, 0x999)
    assert pages_of(log.get_dirty_log(0)) == [5, 6]
    assert states(log, 5, 6) == [State.ABSENT, State.WRITABLE_CLEAN]


# --- the log's life -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hw", [True, False])
def test_a_log_that_begins_finds_all_clean(hw):
    log = make(flags=0, hw_dbm=hw)
    log.map(0, 0x40, 200, 0)
    assert set(states(log, *range(200))) == {State.UNTRACKED}
    write(log, 5)
    log.mark_dirty(0, 6)
    log.set_memory_region(0, 1, 0x40 << 12, 200 << 12, 0)
    want = State.WRITABLE_CLEAN if hw else State.READ_ONLY
    assert set(states(log, *range(200))) == {want}
    assert log.stats.flushes == 1
    assert not log.get_dirty_log(0).any()
    write(log, 9)
    assert pages_of(log.get_dirty_log(0)) == [9]
    assert {5, 6, 9} <= set(pages_of(log.take_host_dirty(0)))  # the host heard of all


@pytest.mark.parametrize("hw", [True, False])
def test_a_log_that_ends_leaves_the_leaves(hw):
    log = make(hw_dbm=hw)
    log.map(0, 0x40, 200, 0)
    write(log, 5)
    before = log.stage2(0).level(3).copy()
    log.set_memory_region(0, 0, 0x40 << 12, 200 << 12, 0)
    assert np.array_equal(log.stage2(0).level(3), before)
    with pytest.raises(FileNotFoundError, match="slot 0 has no dirty bitmap"):
        log.get_dirty_log(0)
    log.unmap(0, 0x45, 1)  # saved, but for no log
    log.set_memory_region(0, 1, 0x40 << 12, 200 << 12, 0)
    assert not log.get_dirty_log(0).any()
    log.verify()


@pytest.mark.parametrize("hw", [True, False])
def test_initially_set_leaves_the_leaves_to_the_clears(hw):
    log = make(flags=0, hw_dbm=hw, manual_protect=True, initially_set=True)
    log.map(0, 0x40, 200, 0)
    before = log.stage2(0).level(3).copy()
    log.set_memory_region(0, 1, 0x40 << 12, 200 << 12, 0)
    assert np.array_equal(log.stage2(0).level(3), before)
    assert log.stats == Stats()
    log.clear_dirty_log(0, 64, 64, DirtyBitmap.from_pages([1, 2], 64))
    want = State.WRITABLE_CLEAN if hw else State.READ_ONLY
    assert states(log, 64, 65, 66, 67) == [State.UNTRACKED, want, want, State.UNTRACKED]
    assert log.stats.flushes == 1
    write(log, 64, 65)
    assert pages_of(log.get_dirty_log(0)) == [page for page in range(200) if page != 66]
    log.verify()


@pytest.mark.parametrize("hw", [True, False])
def test_a_move_keeps_the_bits_and_drops_the_leaves(hw):
    log = make(hw_dbm=hw)
    log.map(0, 0x40, 200, 0)
    log.mark_dirty(0, 1)
    write(log, 5)
    old = log.stage2(0)
    log.set_memory_region(0, 1, 0x4001 << 12, 200 << 12, 0)
    assert not old.level(3).any()
    assert log.stage2(0) is not old
    assert (log.stage2(0).base_gfn, log.stage2(0).level(1).any()) == (0x4001, False)
    assert pages_of(live(log)) == [1, 5]
    assert log.stage2(0).host_dirty is old.host_dirty
    assert pages_of(log.get_dirty_log(0)) == [1, 5]
    log.map(0, 0x4001, 200, 0)
    write(log, 7)
    assert pages_of(log.get_dirty_log(0)) == [7]


def test_a_slot_that_is_deleted_tells_the_host():
    log = make()
    log.map(0, 0x40, 200, 0)
    write(log, 5)
    s2 = log.stage2(0)
    log.set_memory_region(0, 0, 0, 0, 0)
    assert pages_of(s2.take_host_dirty()) == [5]
    make_again = log.set_memory_region(0, 1, 0x40 << 12, 200 << 12, 0)
    assert make_again.value == "create"
    assert not log.get_dirty_log(0).any()


# --- who writes -----------------------------------------------------------------------------------------------


def test_how_pages_are_mapped():
    want = {
        (True, 1): State.WRITABLE_CLEAN,
        (False, 1): State.READ_ONLY,
        (True, 0): State.UNTRACKED,
        (False, 0): State.UNTRACKED,
        (True, 3): State.READ_ONLY,
        (False, 2): State.READ_ONLY,
    }
    for (hw, flags), state in want.items():
        log = make(flags=flags, hw_dbm=hw)
        log.map(0, 0x40, 10, 0x8000)
        assert set(states(log, *range(10))) == {state}
        log.map(0, 0x40, 10, 0x8000, writable=False)
        assert set(states(log, *range(10))) == {State.READ_ONLY}


def test_blocks_are_mapped_as_pages_while_the_slot_logs():
    for pfn in (0x800, np.array([0x800, 0x200])):
        log = make(1024, base=0x200)
        log.map(0, 0x200, 1024, pfn, level=2)
        assert not pte.leaf(2)(log.stage2(0).level(2)).any()
        frames = pte.output_address(log.stage2(0).level(3), 12) >> np.uint64(12)
        second = 0xA00 if isinstance(pfn, int) else 0x200
        assert frames.tolist() == [*range(0x800, 0xA00), *range(second, second + 0x200)]
        log = make(1024, base=0x200, flags=0)
        log.map(0, 0x200, 1024, pfn, level=2)
        assert pte.leaf(2)(log.stage2(0).level(2)).all()
    with pytest.raises(GfnError):
        make(1024, base=0x200, flags=0).map(0, 0x201, 512, 0x800, level=2)


@pytest.mark.parametrize("flags", [0, 1])
@pytest.mark.parametrize("hw", [True, False])
def test_a_write_fault(hw, flags):
    log = make(hw_dbm=hw, flags=flags)
    log.map(0, 0x40, 10, 0x8000, writable=False)
    log.write_fault(0, 0x45)  # the host lets the guest write
    want = State.WRITABLE_DIRTY if hw and flags else State.UNTRACKED
    assert states(log, 4, 5, 6) == [State.READ_ONLY, want, State.READ_ONLY]
    log.write_fault(0, 0x46, 0x1234)  # a copy on write
    assert states(log, 6) == [want]
    assert pte.output_address(int(log.stage2(0).level(3)[6]), 12) == 0x1234 << 12
    log.write_fault(0, 0x50, 0x4321)  # where nothing was
    assert states(log, 16) == [want]
    assert log.stats.write_faults == 3
    if flags:
        assert pages_of(live(log)) == [5, 6, 16]
        assert pages_of(log.get_dirty_log(0)) == [5, 6, 16]
        assert set(states(log, 5, 6, 16)) == {State.WRITABLE_CLEAN if hw else State.READ_ONLY}
    log.verify()


@pytest.mark.parametrize("hw", [True, False])
@pytest.mark.parametrize("level", [1, 2])
def test_a_write_fault_on_a_block_splits_it(hw, level):
    size = 512 ** (3 - level)
    log = make(size, base=size, flags=0, hw_dbm=False)
    log.map(0, size, size, 0, level=level)
    log.set_memory_region(0, 1, size << 12, size << 12, 0)
    log.set_hw_dirty_log(hw)
    flushes = log.stats.flushes
    log.write_fault(0, size + 5)
    assert log.stats.flushes == flushes + 1  # the block may be in a TLB
    assert pages_of(log.get_dirty_log(0)) == [5]
    assert pte.state(int(log.stage2(0).level(3)[6]), 3) is State.READ_ONLY
    assert np.count_nonzero(pte.leaf(3)(log.stage2(0).level(3))) == 512
    log.verify()


def test_a_dirty_block_gives_its_pages_bits():
    log = make(1024, base=0x200, flags=0)
    log.map(0, 0x200, 1024, 0, level=2)
    log.set_memory_region(0, 1, 0x200 << 12, 1024 << 12, 0)
    assert pte.writable_clean(2)(log.stage2(0).level(2)).all()
    write(log, 600)
    assert pages_of(log.get_dirty_log(0)) == list(range(512, 1024))
    write(log, 600)
    log.write_fault(0, 0x200 + 700)  # splits it: what it had recorded stays
    assert pages_of(log.get_dirty_log(0)) == list(range(512, 1024))
    write(log, 600)
    assert pages_of(log.get_dirty_log(0)) == [600]


def check_clearing_a_part_of_a_block():
    """Mask-exact: what a block recorded for the pages outside of the mask is kept."""
    log = make(512, base=0x200, flags=0, manual_protect=True, initially_set=True)
    log.map(0, 0x200, 512, 0, level=2)
    log.set_memory_region(0, 1, 0x200 << 12, 512 << 12, 0)
    log.clear_dirty_log(0, 0, 512, ~DirtyBitmap(512))
    assert not log.get_dirty_log(0).any()
    log.mark_dirty(0, 3)
    write(log, 100)  # the block is dirty now, and only page 3 is in the log
    assert pages_of(take(log.clear_dirty_log(0, 0, 64, b"\xff" * 8, lease=True))) == [3]
    assert pages_of(log.get_dirty_log(0)) == [page for page in range(512) if page != 3], "lost writes"
    log.verify()


def test_clearing_a_part_of_a_block(kernels):
    check_clearing_a_part_of_a_block()


def test_mutant_the_blocks_other_pages_are_forgotten(monkeypatch):
    update = Stage2._update_blocks

    def blocks(self, rule, mask, first, record):
        kept = self.saved.bitmap.copy()
        tally = update(self, rule, mask, first, record)
        self.saved.bitmap.words[:] &= kept.words
        return tally

    monkeypatch.setattr(Stage2, "_update_blocks", blocks)
    with pytest.raises(AssertionError, match="lost writes"):
        check_clearing_a_part_of_a_block()


def test_write_protecting_a_part_of_a_block_protects_all_of_it():
    """A block is one leaf. Its other pages' bits are set still, and their next writes fault."""
    log = make(512, base=0x200, flags=0, hw_dbm=False, manual_protect=True, initially_set=True)
    log.map(0, 0x200, 512, 0, level=2)
    log.set_memory_region(0, 1, 0x200 << 12, 512 << 12, 0)
    log.clear_dirty_log(0, 0, 64, DirtyBitmap.from_pages([5], 64))
    assert pte.state(int(log.stage2(0).level(2)[0]), 2) is State.READ_ONLY
    assert pages_of(log.get_dirty_log(0)) == [page for page in range(512) if page != 5]
    write(log, 5)
    assert log.get_dirty_log(0).weight() == 512
    log.verify()


def test_other_writers():
    log = make(200, base=0x40)
    log.mark_dirty(0, 3)
    log.mark_dirty(0, 62, 4)
    log.mark_dirty(0, 199, 1)
    log.mark_dirty(0, 100, 0)
    log.mark_dirty_range(0, (0x40 << 12) + 128 * 4096 + 1025, 1025 * 8)  # crosses pages
    log.mark_dirty_range(0, (0x40 << 12) + 150 * 4096, 4096)  # exactly one
    log.mark_dirty_range(0, (0x40 << 12) + 160 * 4096 + 5, 0)
    want = [3, 62, 63, 64, 65, 128, 129, 130, 150, 199]
    assert pages_of(log.stage2(0).host_dirty) == want
    assert pages_of(log.get_dirty_log(0)) == want
    log.set_memory_region(0, 0, 0x40 << 12, 200 << 12, 0)
    log.take_host_dirty(0)
    log.mark_dirty(0, 9)  # nobody logs, and the host still hears of it
    assert pages_of(log.take_host_dirty(0)) == [9]
    assert pages_of(log.take_host_dirty(0)) == []


def test_leaves_may_be_changed_under_the_lock():
    log = make(200)
    with log.locked(0, 64, 64) as s2:
        s2.map(0x40 + 64, 64, 0, dbm=True)
    write(log, 70)
    assert pages_of(log.get_dirty_log(0)) == [70]
    with pytest.raises(RuntimeError, match="this thread holds already"), log.locked(0):
        log.get_dirty_log(0)
    log.verify()


# --- switching ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("manual", [True, False])
def test_switching_under_writes(manual):
    flushed = []
    log = make(200, manual_protect=manual, flush=lambda slot, first, npages: flushed.append((slot.id, first, npages)))
    log.set_memory_region(1, 0, 0x1000 << 12, 100 << 12, 0)  # doesn't log
    log.map(0, 0x40, 200, 0)
    log.map(1, 0x1000, 100, 0)
    log.stage2(1).enable_dbm()
    write(log, 3)
    write(log, 7, slot=1)
    log.set_hw_dirty_log(False)
    assert log.hw_dbm is False
    assert flushed == [(0, 0, 200), (0, 0, 200), (1, 0, 100), (1, 0, 100)]
    assert pages_of(live(log)) == [3]
    assert set(states(log, *range(200))) == {State.READ_ONLY}
    assert set(pte.state(log.stage2(1).level(3), 3)) == {State.UNTRACKED}
    assert 7 in log.take_host_dirty(1)
    write(log, 4)
    assert states(log, 3, 4) == [State.READ_ONLY, State.UNTRACKED]
    log.verify()
    log.set_hw_dirty_log(True)
    assert states(log, 3, 4) == [State.READ_ONLY, State.WRITABLE_CLEAN]  # read-only ones go on faulting
    write(log, 5, 6)
    log.verify()
    assert pages_of(log.get_dirty_log(0)) == [3, 4, 5, 6]
    count = len(flushed)
    log.set_hw_dirty_log(True)
    assert len(flushed) == count  # nothing to do


def test_a_switch_whose_flush_fails_can_be_repeated():
    log = make(200, flush=lambda *_: next(answers))
    for slot in (1, 2):
        log.set_memory_region(slot, 1, slot << 24, 100 << 12, 0)
    for slot in (0, 1, 2):
        log.map(slot, log.slot(slot).base_gfn, 100, 0)
        write(log, slot, slot=slot)

    def answer(fail_at):
        for count in range(99):
            if count == fail_at:
                raise ConnectionError
            yield

    for fail_at in range(6):
        answers = answer(fail_at)
        with pytest.raises(ConnectionError):
            log.set_hw_dirty_log(False)
        log.verify()
        answers = answer(None)
        log.set_hw_dirty_log(False)
        assert not log.hw_dbm
        log.verify()
        for slot in (0, 1, 2):
            assert pages_of(log.get_dirty_log(slot)) == [slot]
            write(log, slot, slot=slot)
        log.set_hw_dirty_log(True)
        for slot in (0, 1, 2):
            log.map(slot, log.slot(slot).base_gfn, 100, 0)
        log.verify()


def test_a_failed_start_is_no_start():
    def fails(*_):
        raise ConnectionError

    log = make(200, flags=0, flush=fails)
    log.map(0, 0x40, 200, 0)
    with pytest.raises(ConnectionError):
        log.set_memory_region(0, 1, 0x40 << 12, 200 << 12, 0)
    assert not log.slot(0).logging
    with pytest.raises(FileNotFoundError):
        log.get_dirty_log(0)
    log.verify()


def test_a_failed_move_or_delete_keeps_the_slot_and_its_bits():
    def fails(*_):
        raise ConnectionError

    for size in (200 << 12, 0):
        log = make(200, flush=fails)
        log.map(0, 0x40, 200, 0)
        write(log, 5)
        with pytest.raises(ConnectionError):
            log.set_memory_region(0, 1, 0x4000 << 12, size, 0)
        assert log.slot(0).base_gfn == 0x40
        assert pages_of(live(log)) == [5]
        log.verify()


# --- counts and checks ----------------------------------------------------------------------------------------


def test_counts():
    log = make(200)
    log.map(0, 0x40, 200, 0)
    assert log.stats == Stats()
    write(log, 3, 4, 100)
    log.get_dirty_log(0)
    assert log.stats == Stats(flushes=1, leaves_read=202, leaves_changed=3, words_written=2)
    log.get_dirty_log(0)
    assert log.stats == Stats(flushes=1, leaves_read=404, leaves_changed=3, words_written=2)
    with pytest.raises(AttributeError):
        log.stats.flushes = 0


def test_a_step_flushes_once_and_only_if_there_is_something():
    flushed = []
    log = make(1000, step_pages=128, flush=lambda slot, first, npages: flushed.append((first, npages)))
    log.map(0, 0x40, 1000, 0)
    write(log, 0, 1, 127, 256, 999)
    log.get_dirty_log(0)
    assert flushed == [(0, 128), (256, 128), (896, 104)]
    log.get_dirty_log(0)
    log.sync(0)
    log.clear_dirty_log(0, 0, 1000, ~DirtyBitmap(1000))
    assert len(flushed) == 3


def test_the_hook_learns_where_the_slot_is():
    seen = []
    log = make(200, flush=lambda slot, first, npages: seen.append((slot.base_gfn, first, npages)))
    log.map(0, 0x40, 200, 0)
    log.map(0, 0x41, 2, 0x100)  # replaces
    log.unmap(0, 0x50, 3)
    log.unmap(0, 0x50, 3)  # nothing there
    log.set_memory_region(0, 1, 0x4000 << 12, 200 << 12, 0)
    log.map(0, 0x4000, 1, 0)
    log.set_memory_region(0, 0, 0, 0, 0)
    assert seen == [(0x40, 1, 2), (0x40, 16, 3), (0x40, 0, 200), (0x4000, 0, 200)]


def test_verify_sees_what_must_not_be():
    for hw, spoil, text in (
        (True, lambda s2: s2.map(0x45, 1, 0), "gfn 0x45 may be written unrecorded"),
        (False, lambda s2: s2.map(0x46, 1, 0), "gfn 0x46 may be written unrecorded"),
        (False, lambda s2: s2.map(0x46, 1, 0, dbm=True), "gfn 0x46 may be written unrecorded"),
        (True, lambda s2: s2.level(3).__setitem__(3, 1), "reserved"),
    ):
        log = make(hw_dbm=hw)
        log.map(0, 0x40, 200, 0)
        log.verify()
        spoil(log.stage2(0))
        with pytest.raises(InvariantError, match=text):
            log.verify()
    log = make(flags=3)
    log.stage2(0).map(0x40, 1, 0, dbm=True)
    with pytest.raises(InvariantError, match="read-only slot"):
        log.verify()
    log = make(65)
    live(log).words[-1] = 4
    with pytest.raises(ValueError, match="beyond page 65"):
        log.verify()
    log = make(flags=0)
    log._slots[0].live = DirtyBitmap(200)
    with pytest.raises(InvariantError, match="flags 0x0"):
        log.verify()
    log = make()
    log._slots[0].stage2 = type(log.stage2(0))(200, 0x41)
    with pytest.raises(InvariantError, match="isn't where the slot is"):
        log.verify()


# --- pages that are held ----------------------------------------------------------------------------------------


def run_leaves(slot, place):
    ran = []
    slot.run_leaves(place, lambda lo, hi: iter([ran.append((lo, hi))]))
    return ran


def hold_leaves(slot, place):
    with slot.hold_leaves(place) as held:
        return [held]


@pytest.mark.parametrize("hold", [run_leaves, hold_leaves])
@pytest.mark.parametrize(
    ("changes", "claimed"),
    [
        ([], [(0, 512)]),
        (["block"], [(0, 512), (0, 600)]),
        (["block", "table"], [(0, 512), (0, 600), (0, 512)]),
        (["page"], [(0, 512), (512, 600)]),
        (["page", "block"], [(0, 512), (512, 600), (0, 600)]),
    ],
)
def test_what_changes_before_pages_are_held_is_looked_at_again(hold, changes, claimed, monkeypatch):
    """Leaves that end elsewhere, and other pages, while others hold them: each time anew, and once as it stays."""
    slot, at, left, claims = make(600, base=0)._slots[0], 5, list(changes), []
    kinds = {"block": pte.make_leaf(0, 1), "table": pte.TABLE}
    slot.stage2.level(1)[:] = pte.TABLE

    def wait(claim):
        nonlocal at
        assert claim.held.locked()
        assert claim.mine.locked()
        claims.append((claim.lo, claim.hi))
        change = left.pop(0) if left else None
        if change == "page":
            at += 512
        elif change:
            slot.stage2.level(1)[:] = kinds[change]

    monkeypatch.setattr(slot, "_wait", wait)
    assert hold(slot, lambda: (at, at + 1)) == [(at, at + 1)]
    assert claims == claimed
