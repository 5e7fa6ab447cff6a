"""The last page, the last frame, the last byte of a mask, the pages that a flush is for: and what is one beyond."""

import threading
from errno import EFAULT

import numpy as np
import pytest
from logtools import live, make, pages_of, take, write

from hwdbm import DirtyBitmap, Granule, pte
from hwdbm.dirtylog import log as logs
from hwdbm.dirtylog.faults import _runs
from hwdbm.dirtylog.slot import in_threads
from hwdbm.errors import GfnError

# --- pages that are held ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("npages", [1, 64, 130, 513])
def test_a_claim_goes_out_to_whole_words(npages):
    slot = make(npages).slot_log(0)
    for lo in range(0, npages, 21):
        for hi in range(lo, npages + 1, 16):
            claim = slot._claim(lo, hi)
            assert (claim.lo, claim.hi) == (lo // 64 * 64, min(-(-hi // 64) * 64, npages))


@pytest.mark.parametrize("base", [0x40000, 0x40011])
@pytest.mark.parametrize("granule", Granule, ids=str)
def test_leaves_end_where_blocks_do(granule, base):
    """Where nothing is mapped, or pages, a block of level 2 could be there; and where one of level 1 is, it is."""
    npages, block = 3 * granule.pages_per_entry(2) + 5, granule.pages_per_entry(2)
    slot = make(npages, base=base, granule=granule, ipa_bits=48).slot_log(0)
    for lo in range(0, npages, block // 3):
        for hi in (lo, lo + 1, lo + 2, lo + block + 1, npages):
            if lo < hi <= npages:
                start, stop = (base + lo) // block * block, -(-(base + hi) // block) * block
                assert slot.leaf_span(lo, hi) == (max(start - base, 0), min(stop - base, npages))
    assert slot.leaf_span(7, 7) == (7, 7)


def test_a_block_of_a_gibibyte_is_a_leaf():
    slot = make(2 << 18, base=1 << 18, flags=0, ipa_bits=48).slot_log(0)
    slot.stage2.level(1)[1] = pte.make_leaf(0, 1)
    assert slot.leaf_span(5, 6) == (0, 512)
    assert slot.leaf_span((1 << 18) + 5, (1 << 18) + 6) == (1 << 18, 2 << 18)
    assert slot.leaf_span(1000, (1 << 18) + 1) == (512, 2 << 18)


@pytest.mark.parametrize(
    ("first", "npages", "inside"),
    [(0, 0, True), (0, 200, True), (200, 0, True), (199, 1, True), (-1, 1, False), (0, -1, False), (0, 201, False),
     (200, 1, False), (199, 2, False)],
)  # fmt: skip
def test_which_pages_are_in_a_slot(first, npages, inside):
    log = make(200, base=0x40)
    verbs = (
        (lambda: log.mark_dirty(0, first, npages), rf"{npages:#x} pages from {first:#x} are not inside of its 200"),
        (
            lambda: log.unmap(0, 0x40 + first, npages),
            rf"gfn {0x40 + first:#x}\.\.{0x3F + first + npages:#x} is not inside of its 0x40\.\.0x107",
        ),
    )
    for verb, said in verbs:
        if inside:
            verb()
        else:
            with pytest.raises(GfnError, match=f"^slot 0: {said}$"):
                verb()
    assert pages_of(live(log)) == (list(range(first, first + npages)) if inside else [])


def test_bytes_are_marked_by_the_pages_that_they_touch():
    for gpa in range(0x40000, 0x43001, 0x400):
        for length in (0, 1, 0x3FF, 0x400, 0x401, 0xFFF, 0x1000, 0x1001, 0x2000):
            log = make(8, base=0x40)
            log.mark_dirty_range(0, gpa, length)
            assert pages_of(live(log)) == sorted({(gpa + at >> 12) - 0x40 for at in range(length)}), (gpa, length)
    with pytest.raises(GfnError, match=r"\(gpa 0x40000, -1 bytes\)$"):
        log.mark_dirty_range(0, 0x40000, -1)


# --- frames -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granule", Granule, ids=str)
def test_frames_are_of_48_address_bits(granule):
    log, last = make(4, granule=granule), (1 << 48) // granule.page_size - 1
    log.write_fault(0, 0x40, last)
    assert log.write_faults(0, [1], np.array([last])) == 0
    assert log.write_faults(0, [], np.array([], dtype=np.int64)) == 0
    log.map(0, 0x42, 2, last - 1)
    log.map(0, 0x42, 0, last)
    log.map(0, 0x42, 2, np.array([last, 0]))
    for frame in (-1, last + 1):
        for verb in (
            lambda frame=frame: log.write_fault(0, 0x40, frame),
            lambda frame=frame: log.write_faults(0, [1], np.array([frame])),
            lambda frame=frame: log.map(0, 0x42, 1, frame),
            lambda frame=frame: log.map(0, 0x42, 0, frame),
            lambda frame=frame: log.map(0, 0x42, 2, np.array([0, frame])),
        ):
            with pytest.raises(GfnError):
                verb()
    with pytest.raises(GfnError, match=r"and the 2 pages from there aren't inside of 48 address bits$"):
        log.map(0, 0x42, 2, last)


@pytest.mark.parametrize(
    ("gfn", "npages", "pfn", "level", "said"),
    [
        (0x200, 512, 0, 0, "level 0 of a 4K granule has no leaves"),
        (0x200, 512, 0, 4, "level 4 of a 4K granule has no leaves"),
        (0x201, 512, 0, 2, "gfn 0x201 and 512 pages aren't multiples of a level-2 leaf's 0x200"),
        (0x200, 511, 0, 2, "gfn 0x200 and 511 pages aren't multiples of a level-2 leaf's 0x200"),
        (0x200, 512, 0x201, 2, "pfn 0x201 isn't a multiple of a leaf's 0x200 pages"),
        (0x200, 1024, [0x200, 0x3FF, 0x401], 2, "2 leaves need 2 frames, got 3"),
        (0x200, 1024, [0x200, 0x401], 2, "pfn 0x401 isn't a multiple of a leaf's 0x200 pages"),
        (0x200, 1536, [0x200, 0x403, 0x405], 2, "pfn 0x403 isn't a multiple of a leaf's 0x200 pages"),
        (
            0x200,
            512,
            (1 << 36) - 511,
            2,
            "pfn 0xffffffe01 and the 512 pages from there aren't inside of 48 address bits",
        ),
    ],
)
def test_what_is_not_mapped(gfn, npages, pfn, level, said):
    log = make(2048, base=0x200)
    with pytest.raises(GfnError, match=f"^{said}$"):
        log.map(0, gfn, npages, np.array(pfn) if isinstance(pfn, list) else pfn, level)
    assert not log.stage2(0).mapped(0, 2048)


def test_runs_are_those_that_are_found_page_by_page():
    for chosen in range(1 << 8):
        pages = [page for page in range(8) if chosen >> page & 1]
        runs = [[first, first + 1] for first in pages if first - 1 not in pages]
        for run in runs:
            while run[1] in pages:
                run[1] += 1
        assert _runs(np.array(pages, dtype=np.int64)) == [tuple(run) for run in runs]


# --- masks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", range(26))
def test_a_mask_has_all_words_of_its_pages(size):
    """What lies beyond them isn't looked at, not even a part of a word."""
    for npages, needed in ((1, 8), (64, 8), (65, 16), (128, 16), (129, 24)):
        log = make(npages)
        log.mark_dirty(0, 0, npages)
        for mask in (b"\xff" * size, bytearray(b"\xff" * size)):
            if size < needed:
                with pytest.raises(OSError, match=rf"of {npages} pages has {needed} bytes, got {size}$") as raised:
                    log.clear_dirty_log(0, 0, npages, mask)
                assert raised.value.errno == EFAULT
            else:
                assert take(log.clear_dirty_log(0, 0, npages, mask, lease=True)).weight() in {0, npages}
                assert not live(log).any()
        assert live(log).any() is (size < needed)


# --- the pages that a flush is for ------------------------------------------------------------------------------


def test_what_concerns_a_slot_flushes_all_of_it_once():
    flushed = []
    log = make(200, flags=0, flush=lambda slot, first, npages: flushed.append((slot.id, first, npages)))
    everything = [(0, 0, 200)]

    def flushes(act) -> list:
        flushed.clear()
        act()
        return list(flushed)

    def region(flags: int, base: int, size: int):
        return lambda: log.set_memory_region(0, flags, base << 12, size << 12, 0)

    assert flushes(region(1, 0x40, 200)) == []  # nothing is mapped
    log.map(0, 0x40, 200, 0)
    assert flushes(region(0, 0x40, 200)) == []
    assert flushes(region(1, 0x40, 200)) == everything
    assert flushes(lambda: log.client("early").close()) == []  # nothing was written
    write(log, 3, 199)
    assert flushes(lambda: log.client("late").close()) == everything
    assert flushes(lambda: log.take_host_dirty(0)) == everything
    assert flushes(lambda: log.take_host_dirty(0)) == []
    assert flushes(lambda: log.set_hw_dirty_log(False)) == everything * 2  # before, and after
    assert flushes(region(1, 0x1000, 200)) == everything  # moved
    log.map(0, 0x1000, 1, 0)
    assert flushes(region(0, 0, 0)) == everything


def test_what_changes_a_part_of_blocks_flushes_all_of_them():
    flushed = []
    log = make(5 * 512, base=0x200, flags=0, flush=lambda _, first, npages: flushed.append((first, npages)))
    log.map(0, 0x400, 3 * 512, 0x400, level=2)
    for first, npages, reach in (
        (512 + 7, 1, (512, 512)),
        (512 + 7, 1024, (512, 1536)),
        (100, 3 * 512, (100, 1436 + 512)),
        (4 * 512 - 1, 500, (3 * 512, 1011)),
        (0, 1, (0, 1)),
        (4 * 512, 512, (2048, 512)),
    ):
        flushed.clear()
        assert log.change(0, first, npages, lambda *_: 1) == 1
        assert flushed == [reach]
        assert log.change(0, first, npages, lambda *_: 0) == 0
        assert flushed == [reach]


# --- workers ----------------------------------------------------------------------------------------------------


def test_as_many_threads_as_workers_or_parts():
    for workers, parts in ((2, 5), (3, 3), (4, 2), (7, 3)):
        most, threads = min(workers, parts), set()
        together = threading.Barrier(most)

        def step(lo, _, together=together, threads=threads, most=most):
            threads.add(threading.get_ident())
            if lo < most:
                together.wait(10)

        in_threads([(each, each + 1) for each in range(parts)], step, workers, lambda: None)
        assert len(threads) == most


@pytest.mark.parametrize(
    ("workers", "npages", "sizes"),
    [(1, 1000, [1000]), (2, 1000, [512, 488]), (3, 1000, [384, 384, 232]), (3, 384, [128] * 3), (3, 385, [256, 129]),
     (8, 1000, [128] * 7 + [104]), (4, 100, [100]), (1, 0, []), (4, 0, []), (4, 1, [1])],
)  # fmt: skip
def test_shares_of_the_workers_are_equal_and_worth_it(workers, npages, sizes, monkeypatch):
    monkeypatch.setattr(logs, "_SHARE", 128)
    parts = make(1024, workers=workers)._parts(64, 64 + npages)
    assert [hi - lo for lo, hi in parts] == sizes
    assert [lo for lo, _ in parts] == [64 + sum(sizes[:number]) for number in range(len(sizes))]


def test_numbers_of_workers_and_steps_at_their_ends():
    for workers, step in ((1, 64), (1024, 128)):
        log = make(200, workers=workers, step_pages=step)
        log.mark_dirty(0, 0, 200)
        assert log.get_dirty_log(0) == ~DirtyBitmap(200)
    for step in (0, -64, 63, 65):
        with pytest.raises(ValueError, match=rf"^a step is a positive multiple of 64 pages, not {step}$"):
            make(200, step_pages=step)
    with pytest.raises(ValueError, match="workers"):
        make(200, workers=1025)
