"""Clean, publish, flush, then copy: what the hook sees, what nobody sees before it, and what a failure leaves."""

from itertools import product
from threading import Event, Thread

import numpy as np
import pytest
from logtools import frozen, live, make, pages_of, take, write

from hwdbm import DirtyBitmap, pte
from hwdbm.dirtylog import faults
from hwdbm.dirtylog.slot import SlotLog

LIMIT = 10.0
ALL = b"\xff" * 32  # a mask of 200 pages
VERBS = {
    "get": lambda log: take(log.get_dirty_log(0, lease=True)),
    "clear": lambda log: take(log.clear_dirty_log(0, 0, 200, ALL, lease=True)),
    "sync": lambda log: log.sync(0),
}
CASES = [(verb, hw) for verb, hw in product(VERBS, (True, False)) if verb != "sync" or hw]
cases = pytest.mark.parametrize(("verb", "hw"), CASES)


def ready(hw, flush, **kwargs):
    """A log whose pages 3 and 130 are dirty, in leaves and (for CLEAR) in the bitmap."""
    log = make(200, hw_dbm=hw, **kwargs)
    log.map(0, 0x40, 200, 0)
    log.mark_dirty(0, 3)
    log.mark_dirty(0, 130)
    write(log, 3, 130)
    log._shared.flush = flush
    return log


def unprotected(log):
    """The pages that the guest can write without anybody's being told, if its TLB holds what the leaves say."""
    return pages_of(log.stage2(0).writable())


@cases
def test_leaves_are_clean_and_bits_published_before_the_flush(verb, hw):
    seen = []

    def hook(slot, first, npages):
        assert (slot.id, first, npages) == (0, 0, 200)
        seen.append((unprotected(log), pages_of(live(log))))

    log = ready(hw, hook)
    VERBS[verb](log)
    assert seen == [([], [3, 130])]


@cases
def test_nothing_can_be_read_before_the_flush_has_returned(verb, hw):
    """While the hook runs in one thread, every other thread that asks for these pages waits."""
    inside, leave = Event(), Event()

    def hook(*_):
        inside.set()
        assert leave.wait(LIMIT)

    log, results = ready(hw, hook), {}

    def run(name, call):
        results[name] = call()

    first = Thread(target=run, args=("first", lambda: VERBS[verb](log)), daemon=True)
    first.start()
    assert inside.wait(LIMIT)
    others = {
        "get": lambda: log.get_dirty_log(0),
        "clear": lambda: take(log.clear_dirty_log(0, 0, 64, b"\xff" * 8, lease=True)),
        "host": lambda: log.take_host_dirty(0),
        "fault": lambda: log.write_fault(0, 0x45),
        "mark": lambda: log.mark_dirty(0, 4),
        "unmap": lambda: log.unmap(0, 0x41, 1),
        "verify": log.verify,
    }
    threads = [Thread(target=run, args=item, daemon=True) for item in others.items()]
    for thread in threads:
        thread.start()
    first.join(0.05)
    assert results == {}
    leave.set()
    for thread in [first, *threads]:
        thread.join(LIMIT)
        assert not thread.is_alive()
    assert set(results) == {"first", *others}


@cases
@pytest.mark.parametrize("step", [None, 64, 128])
@pytest.mark.parametrize("fails_at", [0, 1])
def test_a_hook_that_raises_loses_nothing(verb, hw, step, fails_at):
    calls = []

    def hook(*_):
        calls.append(1)
        if len(calls) > fails_at:
            raise ConnectionResetError("the vCPU is gone")

    log = ready(hw, hook, step_pages=step)
    steps_with_pages = 1 if step is None else 2
    if fails_at >= steps_with_pages:
        return
    with pytest.raises(ConnectionResetError, match="the vCPU is gone"):
        VERBS[verb](log)
    assert pages_of(live(log) | log.stage2(0).dirty()) == [3, 130]
    log.verify()
    calls[:] = [-1] * -99
    log._shared.flush = None
    assert pages_of(log.get_dirty_log(0)) == [3, 130]


@cases
def test_after_a_flush_that_failed_the_bits_do_not_leave_without_one(verb, hw):
    """The leaves are clean already, so nothing changes any more; and yet a TLB may still hold what they were."""
    calls = []

    def hook(*_):
        calls.append(pages_of(live(log)))
        if len(calls) == 1:
            raise ConnectionResetError

    log = ready(hw, hook)
    with pytest.raises(ConnectionResetError):
        VERBS[verb](log)
    assert pages_of(log.get_dirty_log(0)) == [3, 130]
    assert calls == [[3, 130], [3, 130]]


def test_the_hook_may_not_use_the_log():
    log = ready(hw=True, flush=lambda *_: log.get_dirty_log(0))
    with pytest.raises(RuntimeError, match="this thread holds already"):
        log.get_dirty_log(0)
    assert pages_of(live(log)) == [3, 130]


# --- a block that reaches into two parts ----------------------------------------------------------------------


def straddled(manual):
    """A block of pages 0..511 that the guest has written and holds in its TLB; GET works in steps of 64."""
    log = make(512, base=0x200, flags=0, manual_protect=manual)
    log.map(0, 0x200, 512, 0, level=2)
    log.set_memory_region(0, 1, 0x200 << 12, 512 << 12, 0)
    write(log, 300)
    return log


def check_a_part_waits_for_its_own_flush(manual):
    """One thread cleans the block for pages 0..63, and hasn't flushed. Another takes pages 256..319: it must flush.

    For it no leaf is dirty any more, the block being clean: what it takes was put aside by the first.
    """
    log = straddled(manual)
    inside, leave, flushed = Event(), Event(), []

    def hook(_slot, first, npages):
        flushed.append((first, npages))
        if first == 0:
            inside.set()
            assert leave.wait(LIMIT)

    log._shared.flush = hook
    thread = Thread(target=log.sync, args=(0, 0, 64), daemon=True)
    thread.start()
    assert inside.wait(LIMIT)
    try:
        assert not pte.dirty(2)(int(log.stage2(0).level(2)[0]))
        if manual:
            log._slots[0].get([(256, 320)], take=False)
            lent = take(log.clear_dirty_log(0, 256, 64, b"\xff" * 8, lease=True))
        else:
            lent = take(log._slots[0].get([(256, 320)], take=True)).part(256, 64)
        assert lent.weight() == 64
        assert flushed == [(0, 64), (256, 64)], "lost: pages were lent that a TLB lets the guest write"
    finally:
        leave.set()
        thread.join(LIMIT)
    assert not thread.is_alive()


@pytest.mark.parametrize("manual", [False, True])
def test_a_part_waits_for_its_own_flush(manual):
    check_a_part_waits_for_its_own_flush(manual)


@pytest.mark.parametrize("manual", [False, True])
def test_the_mutant_that_flushes_for_what_it_changed_itself(manual, monkeypatch):
    """ "Flush if anything was cleaned" is one thread's rule: with several it hands pages out too early."""
    changed = []
    for name in ("sync", "protect"):
        mode = type(straddled(manual)._mechanism)
        verb = getattr(mode, name)

        def counted(self, *args, verb=verb):
            tally = verb(self, *args)
            changed.append(tally.changed)
            return tally

        monkeypatch.setattr(mode, name, counted)
    flush = SlotLog.flush

    def hasty(self, due, *, needed):
        flush(self, due, needed=needed and bool(not changed or changed[-1]))

    monkeypatch.setattr(SlotLog, "flush", hasty)
    with pytest.raises(AssertionError, match="lost"):
        check_a_part_waits_for_its_own_flush(manual)


# --- the host -------------------------------------------------------------------------------------------------


def test_the_host_takes_its_flags_after_a_flush():
    seen = []
    log = ready(hw=True, flush=lambda *_: seen.append(pages_of(log.stage2(0).host_dirty)))
    log.get_dirty_log(0)
    assert pages_of(log.take_host_dirty(0)) == [3, 130]
    assert seen == [[3, 130], [3, 130]]
    assert pages_of(log.take_host_dirty(0)) == []
    assert len(seen) == 2


def test_a_flush_that_fails_leaves_the_host_its_flags():
    log = ready(hw=True, flush=lambda *_: 1 / 0)
    before = frozen(log)
    with pytest.raises(ZeroDivisionError):
        log.take_host_dirty(0)
    assert frozen(log) == before


def test_saved_pages_are_the_hosts_too():
    """A part of a block was harvested, the rest was put aside: for the host alone, once it is cleared."""
    log = straddled(manual=True)
    log.sync(0, 0, 64)
    log.mark_dirty(0, 256, 64)
    log.take_host_dirty(0)
    write(log, 300)
    log.sync(0, 0, 64)
    log.clear_dirty_log(0, 256, 64, b"\xff" * 8)
    assert pages_of(log.take_host_dirty(0)) == list(range(512))


# --- faults ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hw", [True, False])
def test_a_page_that_faults_is_marked_before_the_flush_and_granted_before_that(hw):
    log = make(512, base=0x200, flags=0, hw_dbm=False)
    log.map(0, 0x200, 512, 0, level=2)
    log.set_memory_region(0, 1, 0x200 << 12, 512 << 12, 0)
    log.set_hw_dirty_log(hw)

    def hook(*_):
        assert unprotected(log) == [5]
        assert pages_of(live(log)) == [5]
        raise ConnectionResetError

    log._shared.flush = hook
    with pytest.raises(ConnectionResetError):
        log.write_fault(0, 0x205)
    assert pages_of(live(log)) == [5]
    log.verify()


def test_mutant_a_page_is_marked_though_nothing_was_granted(monkeypatch):
    """KVM marks only where the map or the relaxing succeeded (commit 509552e6)."""

    def check():
        log = make(64)
        with pytest.raises(OSError, match="no leaf"):
            log.write_fault(0, 0x45)
        assert not live(log).any(), "a page is dirty that nobody could write"

    check()
    steps = faults.write_fault_steps

    def early(slot, pages, *args, **options):
        faults.mark(slot.live, pages)
        return steps(slot, pages, *args, **options)

    monkeypatch.setattr(faults, "write_fault_steps", early)
    with pytest.raises(AssertionError, match="nobody could write"):
        check()


def test_masks_are_exact_over_every_subset_of_a_few_pages():
    """Each mask of 6 pages against each set of dirty ones: the leaf changes where both say so, and nowhere else."""
    for hw, dirty, mask in product((True, False), range(64), (0, 1, 0b101, 0b110010, 63)):
        log = make(6, hw_dbm=hw)
        log.map(0, 0x40, 6, 0)
        write(log, *(page for page in range(6) if dirty >> page & 1))
        log.sync(0)
        if hw:
            write(log, *range(6))
        before = log.stage2(0).level(3).copy()
        words = np.array([mask], np.uint64)
        cleared = take(log.clear_dirty_log(0, 0, 6, DirtyBitmap.from_words(words, 6), lease=True))
        changed = (before != log.stage2(0).level(3)).nonzero()[0].tolist()
        both = [page for page in range(6) if dirty & mask & 1 << page]
        assert changed == both
        assert pages_of(cleared) == both
        assert pages_of(live(log)) == [page for page in range(6) if dirty & ~mask & 1 << page]
