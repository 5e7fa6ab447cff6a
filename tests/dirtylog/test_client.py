"""Clients of a DirtyLog: each sees every write since its own last epoch, whatever the others do."""

import gc
import os
from errno import EBUSY, ENOENT
from functools import partial

import numpy as np
import pytest
from logtools import live, make, pages_of, states, write

from hwdbm import DirtyBitmap, DirtyLog, pte
from hwdbm.dirtylog import ClientLease, LogClient
from hwdbm.dirtylog.client import Clients, Feeds
from hwdbm.dirtylog.slot import Point, SlotLog
from hwdbm.errors import InvariantError, StaleLeaseError

MODES = {
    "hardware": {},
    "hardware, manual": {"manual_protect": True},
    "hardware, full": {"manual_protect": True, "initially_set": True},
    "software": {"hw_dbm": False},
    "software, manual": {"hw_dbm": False, "manual_protect": True},
    "software, full": {"hw_dbm": False, "manual_protect": True, "initially_set": True},
}


def mapped(mode: str) -> DirtyLog:
    made = make(200, flags=0, **MODES[mode])
    made.map(0, 0x40, 200, 0)
    made.set_memory_region(0, 1, 0x40000, 200 << 12, 0)
    return made


@pytest.fixture(params=MODES)
def log(request) -> DirtyLog:
    return mapped(request.param)


def taken(client: LogClient, slot: int = 0) -> list[int]:
    with client.take(slot) as lease:
        return pages_of(lease.bitmap)


# --- what each sees ----------------------------------------------------------------------------------------


def test_each_sees_every_write_since_its_own_last_epoch(log: DirtyLog) -> None:
    write(log, 3)
    with log.client("backup") as one, log.client("statistics") as two:
        write(log, 5, 64, 199)
        log.mark_dirty(0, 7)
        assert taken(one) == [5, 7, 64, 199]
        write(log, 5)
        log.verify()
        assert taken(one) == [5]
        assert taken(two) == [5, 7, 64, 199]
        assert taken(one) == taken(two) == []
        with log.lend(0) as lease:
            got = pages_of(lease.bitmap)
        assert set(got) >= {3, 5, 7, 64, 199}
        assert len(got) in (5, 200)  # all of them, where the log began so
        write(log, 9)
        assert taken(two) == [9]
        with log.lend(0) as lease:
            assert pages_of(lease.bitmap) == [9]
        assert taken(one) == [9]
        log.verify()


def test_a_page_is_protected_once_and_not_once_a_client(log: DirtyLog) -> None:
    clients = [log.client(name) for name in "abcd"]
    write(log, *range(0, 200, 3))
    before = log.stats.leaves_changed
    for client in clients:
        assert len(taken(client)) == 67
    log.lend(0).commit()
    assert log.stats.leaves_changed == before + 67
    for client in clients:
        client.close()


def test_get_and_clear_answer_as_without_clients() -> None:
    """What GET has shown is cleared by CLEAR, and what was written in between stays; nothing else is cleared."""
    log = make(200, manual_protect=True)
    log.map(0, 0x40, 200, 0)
    with log.client("backup") as backup:
        write(log, 1, 2, 130)
        assert pages_of(log.get_dirty_log(0)) == [1, 2, 130]
        write(log, 3)
        before = log.stage2(0).level(3).copy()
        with log.clear_dirty_log(0, 0, 64, DirtyBitmap.from_pages([1, 3], 64), lease=True) as lease:
            assert pages_of(lease.bitmap) == [1]  # page 3 was never shown
        (changed,) = (log.stage2(0).level(3) != before).nonzero()
        assert changed.tolist() == [1]
        assert pages_of(log.get_dirty_log(0)) == [2, 3, 130]
        assert taken(backup) == [1, 2, 3, 130]
        write(log, 2)
        log.clear_dirty_log(0, 0, 64, DirtyBitmap.from_pages([2], 64))  # dirty in the log still, since it was shown
        assert taken(backup) == [2], "what CLEAR drops of the leaf is news for the client"


def test_what_was_shown_and_not_cleared_is_harvested_again(log: DirtyLog) -> None:
    with log.client("backup") as backup:
        write(log, 8)
        log.get_dirty_log(0)  # under manual protection page 8 stays writable
        assert taken(backup) == [8]
        assert not pte.writable(3)(int(log.stage2(0).level(3)[8]))
        write(log, 8)
        assert taken(backup) == [8]


def test_clients_where_a_log_begins_with_all_bits_set(kernels) -> None:
    log = make(200, flags=0, manual_protect=True, initially_set=True)
    log.map(0, 0x40, 200, 0)
    log.set_memory_region(0, 1, 0x40000, 200 << 12, 0)
    assert set(states(log, 0, 199)) == {pte.State.UNTRACKED}
    with log.client("backup") as backup:
        assert set(states(log, 0, 199)) == {pte.State.WRITABLE_CLEAN}
        assert live(log).weight() == 200
        write(log, 4)
        assert taken(backup) == [4]
        log.set_memory_region(0, 0, 0x40000, 200 << 12, 0)
        log.set_memory_region(0, 1, 0x40000, 200 << 12, 0)
        log.verify()
        assert len(taken(backup)) == 200
        write(log, 4)
        assert taken(backup) == [4]


# --- epochs ------------------------------------------------------------------------------------------------


def test_a_commit_ends_the_epoch_and_a_rollback_does_not(log: DirtyLog) -> None:
    with log.client("backup") as backup, log.client("other") as other:
        write(log, 6)
        for _ in range(2):
            lease = backup.take(0)
            assert (pages_of(lease.bitmap), lease.epoch, lease.broken) == ([6], 0, "")
            lease.rollback()
        with pytest.raises(ZeroDivisionError), backup.take(0):
            _ = 1 // 0
        assert taken(other) == [6]
        write(log, 7)
        lease = backup.take(0)
        assert (pages_of(lease.bitmap), lease.epoch) == ([6, 7], 0)
        lease.commit()
        assert backup.take(0).epoch == 1
        assert taken(other) == [7]
        assert pages_of(log.get_dirty_log(0))[-2:] in ([6, 7], [198, 199])


def test_a_lease_that_is_forgotten_gives_back_to_its_client_alone(log: DirtyLog) -> None:
    with log.client("backup") as backup, log.client("other") as other:
        write(log, 6)
        with pytest.warns(ResourceWarning, match="slot 0 for client 'backup' .* 1 pages are dirty again"):
            backup.take(0)
        log.lend(0).commit()
        assert taken(other) == [6]
        assert taken(other) == []
        assert taken(backup) == [6]


def test_a_take_that_fails_ends_nothing() -> None:
    fails: list[int] = []

    def flush(*_: object) -> None:
        if fails:
            raise ConnectionError

    log = make(200, step_pages=64, flush=flush)
    log.map(0, 0x40, 200, 0)
    with log.client("backup") as backup, log.client("other") as other:
        write(log, 6, 70)
        fails.append(1)
        with pytest.raises(ConnectionError):
            backup.take(0)
        fails.clear()
        lease = backup.take(0)
        assert (pages_of(lease.bitmap), lease.epoch, lease.broken) == ([6, 70], 0, "")
        lease.commit()
        assert taken(other) == [6, 70]


# --- what changes a slot -----------------------------------------------------------------------------------


def region(log: DirtyLog, flags: int, base: int = 0x40, npages: int = 200, hva: int = 0) -> None:
    log.set_memory_region(0, flags, base << 12, npages << 12, hva)


def moved(log: DirtyLog) -> None:
    region(log, 1, 0x80)


def off_and_on(log: DirtyLog) -> None:
    region(log, 0)
    region(log, 1)


def deleted(log: DirtyLog) -> None:
    region(log, 0, npages=0)
    region(log, 1)


CHANGES = {
    moved: "the slot was moved from gfn 0x40 to gfn 0x80",
    off_and_on: "the slot's log was switched off",
    deleted: "the slot was deleted and made again",
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("first", [True, False])
def test_a_change_of_the_slot_breaks_the_epoch_and_says_so(log: DirtyLog, change, first: bool) -> None:
    with log.client("backup") as backup, log.client("other") as other:
        write(log, 6)
        old = backup.take(0)
        change(log)
        log.verify()
        with pytest.raises(StaleLeaseError):
            old.commit() if first else old.rollback()
        for _ in range(2):  # until it is committed
            lease = backup.take(0)
            assert (lease.bitmap.weight(), lease.broken) == (200, CHANGES[change])
            lease.rollback()
        lease = backup.take(0)
        later = backup.take(0)  # with the first one open: it has what came after
        assert (later.bitmap.any(), later.broken) == (False, "")
        later.commit()
        lease.rollback()
        with backup.take(0) as lease:
            assert lease.broken
        with backup.take(0) as lease:
            assert (lease.bitmap.any(), lease.broken) == (False, "")
        assert len(taken(other)) == 200
        log.verify()


def test_a_resized_slot_is_another(log: DirtyLog) -> None:
    with log.client("backup") as backup:
        region(log, 0, npages=0)
        with pytest.raises(OSError, match="there is no slot 0") as raised:
            backup.take(0)
        assert raised.value.errno == ENOENT
        region(log, 1, npages=300)
        with backup.take(0) as lease:
            assert (lease.bitmap.npages, lease.bitmap.weight(), bool(lease.broken)) == (300, 300, True)


def test_a_slot_that_began_to_log_later(log: DirtyLog) -> None:
    with log.client("backup") as backup:
        log.set_memory_region(1, 0, 1 << 30, 65 << 12, 1 << 40)
        with pytest.raises(OSError, match="slot 1 has no dirty bitmap"):
            backup.take(1)
        log.set_memory_region(1, 1, 1 << 30, 65 << 12, 1 << 40)
        with backup.take(1) as lease:
            assert (lease.bitmap.weight(), lease.broken) == (65, "the slot began to log after the client")
        assert taken(backup, 1) == []


def test_the_default_client_keeps_its_bitmap_over_a_move(log: DirtyLog) -> None:
    with log.client("backup"):
        write(log, 6)
        moved(log)
        assert 6 in pages_of(log.get_dirty_log(0))


@pytest.mark.parametrize("hw", [True, False])
def test_the_switch_of_the_mechanism_is_no_break(hw: bool) -> None:
    log = make(200, hw_dbm=hw)
    log.map(0, 0x40, 200, 0)
    with log.client("backup") as backup, log.client("other") as other:
        write(log, 6)
        log.set_hw_dirty_log(not hw)
        log.verify()
        write(log, 8)
        assert taken(backup) == taken(other) == [6, 8]
        write(log, 6)
        log.set_hw_dirty_log(hw)
        assert taken(backup) == taken(other) == [6]


# --- the client itself -------------------------------------------------------------------------------------


def test_one_of_a_name(log: DirtyLog) -> None:
    with log.client("migration") as first:
        with pytest.raises(OSError, match="has a client 'migration' already, until that closes") as raised:
            log.client("migration")
        assert raised.value.errno == EBUSY
        first.close()
        with log.client("migration") as second:
            first.close()  # a second time, which is none of the other's
            assert not second.closed
    with pytest.raises(ValueError, match="'migration', closed> takes nothing"):
        first.take(0)


def test_a_name_is_a_text() -> None:
    clients = Clients()
    with pytest.raises(ValueError, match="empty"):
        clients.add("", lambda *_: None)
    for name in (None, 1, b"backup"):
        with pytest.raises(TypeError, match="a client's name is a text"):
            clients.add(name, lambda *_: None)


def test_without_a_log_there_is_no_client() -> None:
    log = make(200, flags=0)
    with pytest.raises(OSError, match="no slot logs") as raised:
        log.client("backup")
    assert raised.value.errno == ENOENT
    region(log, 1)
    log.client("backup").close()  # the name is free


@pytest.mark.parametrize("wrong", [1.0, "0", None, True, np.zeros(1)])
def test_odd_slots_are_refused_and_nothing_changes(log: DirtyLog, wrong: object) -> None:
    with log.client("backup") as backup:
        write(log, 6)
        with pytest.raises(TypeError, match="slot is an integer"):
            backup.take(wrong)
        for slot in (-1, 1, 1 << 40):
            with pytest.raises(OSError, match="slot"):
                backup.take(slot)
        assert taken(backup, np.int64(0)) == [6]


def test_one_that_was_closed_or_forgotten_costs_nothing_more(log: DirtyLog) -> None:
    def forget() -> None:
        log.client("forgotten")
        gc.collect()

    feeds = log.slot_log(0).feeds
    closed = log.client("closed")
    lease = closed.take(0)
    closed.close()
    with pytest.raises(StaleLeaseError):
        lease.rollback()
    with pytest.warns(ResourceWarning, match="<LogClient 'forgotten', open> was never closed"):
        forget()
    assert not feeds
    write(log, 6)
    log.lend(0).commit()
    assert feeds.fresh is None
    log.verify()


def test_a_child_closes_no_client_of_its_parent(log: DirtyLog) -> None:
    with log.client("backup") as client:
        child = os.fork()
        if child == 0:
            client.close()
            os._exit(client.closed)
        assert os.waitpid(child, 0)[1] == 0
        write(log, 6)
        assert taken(client) == [6]


@pytest.mark.parametrize("settle", ["commit", "rollback"])
def test_leases_of_one_that_was_closed_are_stale(log: DirtyLog, settle: str) -> None:
    client = log.client("closed")
    lease = client.take(0)
    client.close()
    with pytest.raises(StaleLeaseError):
        getattr(lease, settle)()


def test_it_is_shown(log: DirtyLog, recwarn: pytest.WarningsRecorder) -> None:
    client = log.client("a")
    assert repr(client) == "<LogClient 'a', open>"
    client.close()
    assert repr(client) == "<LogClient 'a', closed>"
    assert not recwarn


# --- do these tests bite? ----------------------------------------------------------------------------------


def steals_from_another(patch):
    """All clients take from the first one's bitmap, as two users of KVM's log do."""
    take = SlotLog.feed_steps

    def feed_steps(self, feed, lease, lo, hi):
        first = next(iter(self.feeds))
        words = feed.bitmap
        feed.bitmap = first.bitmap
        try:
            yield from take(self, feed, lease, lo, hi)
        finally:
            feed.bitmap = words

    patch.setattr(SlotLog, "feed_steps", feed_steps)


def publishes_to_the_first_alone(patch):
    """A harvest is poured into the bitmap of one client, and the log's."""
    patch.setattr(Feeds, "__iter__", lambda self: (feed for each in self._refs[:1] if (feed := each()) is not None))


def publishes_to_the_log_alone(patch):
    """What is marked without a harvest goes to the default client."""
    patch.setattr(Feeds, "sink", lambda self, live: live)


def drops_what_a_clear_cleans(patch):
    """CLEAR drops what the leaf has recorded: the default client copies the page, and no other hears of it."""
    patch.setattr(Feeds, "dropped", lambda self: None)


def ends_the_epochs_of_all(patch):
    """A commit of one client's empties the bitmaps of all."""
    commit = ClientLease.commit

    def committed(self):
        commit(self)
        for feed in self._epoch.feed.slot.feeds:
            feed.bitmap.clear()

    patch.setattr(ClientLease, "commit", committed)


def sees_no_change_of_its_slot(patch):
    """The log is switched off and on, and the client takes what came after, as if nothing had been."""
    patch.setattr(Feeds, "break_off", lambda self, why: None)


def advances_when_it_fails(patch):
    """A take of which the second step fails keeps what the first had taken."""
    patch.setattr(ClientLease, "abandon", ClientLease.commit)


def gives_back_to_the_log(patch):
    """A rollback gives the pages to the default client."""
    patch.setattr(
        SlotLog,
        "give_back",
        lambda self, epoch, pages, first, generation: self.put_back(pages, first, self.generation),
    )


def joins_as_it_is(patch):
    """A client comes, and what others were shown and have not cleared stays writable."""

    def join_steps(self, feed):
        yield Point.TAKE
        self.feeds.join(feed)

    patch.setattr(SlotLog, "join_steps", join_steps)


def takes_without_protecting(patch):
    """A client's take leaves what it took writable: that is the default client's business."""
    patch.setattr(SlotLog, "_rearm", lambda self, *_: None)


MUTANTS = {
    steals_from_another: ("hardware", test_each_sees_every_write_since_its_own_last_epoch),
    publishes_to_the_first_alone: ("hardware", test_each_sees_every_write_since_its_own_last_epoch),
    publishes_to_the_log_alone: ("hardware", test_each_sees_every_write_since_its_own_last_epoch),
    drops_what_a_clear_cleans: (None, test_get_and_clear_answer_as_without_clients),
    ends_the_epochs_of_all: ("software", test_a_commit_ends_the_epoch_and_a_rollback_does_not),
    sees_no_change_of_its_slot: (
        "hardware",
        partial(test_a_change_of_the_slot_breaks_the_epoch_and_says_so, change=off_and_on, first=True),
    ),
    advances_when_it_fails: (None, test_a_take_that_fails_ends_nothing),
    gives_back_to_the_log: ("hardware", test_a_commit_ends_the_epoch_and_a_rollback_does_not),
    joins_as_it_is: ("software, manual", test_each_sees_every_write_since_its_own_last_epoch),
    takes_without_protecting: ("software, manual", test_what_was_shown_and_not_cleared_is_harvested_again),
}


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.slow
@pytest.mark.parametrize("mutate", MUTANTS)
def test_a_mutant_is_caught(mutate, monkeypatch: pytest.MonkeyPatch) -> None:
    assert mutate.__doc__
    mode, check = MUTANTS[mutate]
    check(*(() if mode is None else (mapped(mode),)))
    arguments = () if mode is None else (mapped(mode),)
    with monkeypatch.context() as patch:
        mutate(patch)
        with pytest.raises((AssertionError, InvariantError, pytest.fail.Exception)):
            check(*arguments)
    gc.collect()
