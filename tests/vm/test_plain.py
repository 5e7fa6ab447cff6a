"""PlainGuest, and with it what every VM shares: files, clients of the log, arguments, the end, a fork."""

import hashlib
import os
from collections.abc import Callable
from errno import EBUSY, EINVAL, ENOENT, ENOSPC
from pathlib import Path

import numpy as np
import pytest

from hwdbm.bitmap import DirtyBitmap
from hwdbm.errors import BitmapError, ClosedError, StaleLeaseError
from hwdbm.memslot import Memslot
from hwdbm.vm import Durable, MemoryMap, PlainGuest, Shareable, Source, client_of, memory_digest

# The order of the ids, of the slots and of the addresses are three different ones; the sizes are ragged.
MAP = MemoryMap(4096, (Memslot(2, 0, 600, 65, 0), Memslot(0, 0, 1000, 513, 0), Memslot(7, 0, 5, 1, 0)))
Verb = Callable[[PlainGuest], object]

VERBS: dict[str, Verb] = {
    "memory": lambda guest: guest.memory(0),
    "slots": lambda guest: guest.slots,
    "read": lambda guest: guest.read(5 * 4096, 1),
    "write": lambda guest: guest.write(5 * 4096, b"a"),
    "start_log": PlainGuest.start_log,
    "stop_log": PlainGuest.stop_log,
    "dirty": lambda guest: guest.dirty(0),
    "client": lambda guest: guest.client("a"),
    "mark_imported": lambda guest: guest.mark_imported(0, 0, 1),
    "resume": PlainGuest.resume,
    "pause": PlainGuest.pause,
    "throttle": lambda guest: guest.throttle(1),
    "state": PlainGuest.state,
    "set_state": lambda guest: guest.set_state(b""),
    "digest": PlainGuest.digest,
    "commit": PlainGuest.commit,
}


@pytest.fixture
def guest() -> PlainGuest:
    made = PlainGuest(MAP)
    made.start_log()
    return made


def state(guest: PlainGuest) -> object:
    """Return all that a refused call may not change; what is dirty stays dirty."""
    dirty = {}
    for slot in guest.slots:
        lease = guest.dirty(slot.id)
        dirty[slot.id] = lease.bitmap.to_bytes()
        lease.rollback()
    return guest.digest(), dirty, guest.slots, guest.running, guest.throttled, guest.state()


def filled(guest: PlainGuest) -> PlainGuest:
    rng = np.random.default_rng(3)
    for slot in guest.slots:
        guest.memory(slot.id)[:] = rng.integers(0, 256, slot.npages * 4096, dtype=np.uint8)
    return guest


# --- the log -----------------------------------------------------------------------------------------------


def test_it_is_all_that_a_vm_may_be(guest: PlainGuest) -> None:
    assert isinstance(guest, Source)
    assert isinstance(guest, Shareable)
    assert isinstance(guest, Durable)


def test_a_write_is_where_it_belongs_and_dirty(guest: PlainGuest) -> None:
    guest.write((1000 + 63) * 4096 + 4095, b"ab")
    guest.write((1000 + 512) * 4096, memoryview(b"c"))
    guest.write((600 + 64) * 4096 + 4094, bytearray(b"de"))
    guest.write(5 * 4096, b"")  # nothing is nothing
    assert guest.read((1000 + 63) * 4096 + 4095, 2) == b"ab"
    for slot_id, pages in ((0, [63, 64, 512]), (2, [64]), (7, [])):
        with guest.dirty(slot_id) as lease:
            assert lease.bitmap.pages().tolist() == pages
        with guest.dirty(slot_id) as lease:
            assert not lease.bitmap.any()
    with pytest.raises(OSError, match="is not inside of one slot") as raised:
        guest.write(5 * 4096 + 4095, b"ab")
    assert raised.value.errno == EINVAL


def test_a_log_that_is_off_says_so(guest: PlainGuest) -> None:
    guest.write(5 * 4096, b"a")
    lease = guest.dirty(7)
    guest.stop_log()
    assert not guest.logging
    for ask in (lambda: guest.dirty(7), lambda: guest.client("a")):
        with pytest.raises(OSError, match="doesn't log") as raised:
            ask()
        assert raised.value.errno == ENOENT
    with pytest.raises(StaleLeaseError):
        lease.rollback()
    guest.mark_imported(7, 0, 1)
    guest.start_log()
    assert [slot.logging for slot in guest.slots] == [True] * 3
    with guest.dirty(7) as lease:
        assert lease.bitmap.pages().tolist() == [0]


def test_clients_take_nothing_from_each_other(guest: PlainGuest) -> None:
    guest.write(5 * 4096, b"a")
    with guest.client("migration") as client, guest.client("snapshot") as other:
        with pytest.raises(OSError, match="has a client 'migration' already") as raised:
            guest.client("migration")
        assert raised.value.errno == EBUSY
        assert not client.take(7).bitmap.any()  # what was written before is the default client's
        guest.write(600 * 4096, b"a")
        lease = client.take(2)
        assert lease.bitmap.pages().tolist() == [0]
        lease.rollback()
        for take in (client.take, other.take, guest.dirty):
            with take(2) as lease:
                assert lease.bitmap.pages().tolist() == [0]
            with take(2) as lease:
                assert not lease.bitmap.any()
        with pytest.raises(OSError, match="there is no slot 9"):
            client.take(9)
    with guest.dirty(7) as lease:
        assert lease.bitmap.pages().tolist() == [0]
    guest.client("migration").close()


def test_a_log_that_was_off_breaks_the_epochs_of_clients(guest: PlainGuest) -> None:
    with guest.client("backup") as client:
        client.take(7).commit()
        old = client.take(7)
        guest.stop_log()
        with pytest.raises(OSError, match="doesn't log"):
            client.take(7)
        guest.start_log()
        with pytest.raises(StaleLeaseError):
            old.commit()
        for _ in range(2):
            lease = client.take(7)
            assert (lease.broken, lease.bitmap.weight()) == ("the slot's log was switched off", 1)
            lease.rollback()
        with client.take(7) as lease:
            assert lease.broken
        with client.take(7) as lease:
            assert (lease.broken, lease.bitmap.any(), lease.epoch) == ("", False, 2)
        with client.take(0) as lease:
            assert lease.bitmap.weight() == 513


def test_a_client_that_closes_leaves_stale_leases_and_costs_nothing(guest: PlainGuest) -> None:
    client = guest.client("backup")
    lease = client.take(7)
    client.close()
    with pytest.raises(StaleLeaseError):
        lease.rollback()
    guest.dirty(7).commit()
    assert guest._pages[7].feeds.fresh is None


def test_client_of_takes_what_there_is(guest: PlainGuest) -> None:
    class Other:
        """A VM without clients."""

        dirty = guest.dirty

    for source in (guest, Other()):
        with client_of(source, "backup") as client:
            guest.write(5 * 4096, b"a")
            with client.take(7) as lease:
                assert lease.bitmap.pages().tolist() == [0]
    with pytest.raises(ZeroDivisionError), client_of(guest, "backup"):
        _ = 1 // 0
    guest.dirty(7).commit()


def test_an_interrupt_on_the_way_into_a_lease_loses_nothing(guest: PlainGuest, monkeypatch: pytest.MonkeyPatch) -> None:
    guest.write(5 * 4096, b"a")
    guest.write((1000 + 100) * 4096, b"a")

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("hwdbm.vm.base.Lease", interrupted)
        with pytest.raises(KeyboardInterrupt):
            guest.dirty(0)
    for slot_id, weight in ((0, 513), (0, 0), (7, 1)):
        with guest.dirty(slot_id) as lease:
            assert lease.bitmap.weight() == weight


# --- arguments ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [1.0, "1", True, None, np.float64(1), np.bool_(1), np.zeros(1, dtype=np.int64)])
def test_other_types_are_refused_and_nothing_changes(guest: PlainGuest, wrong: object) -> None:
    filled(guest).mark_imported(0, 5, 70)
    before = state(guest)
    for call in (
        lambda: guest.memory(wrong),
        lambda: guest.dirty(wrong),
        lambda: guest.write(wrong, b"a"),
        lambda: guest.read(wrong, 1),
        lambda: guest.read(0, wrong),
        lambda: guest.mark_imported(wrong, 0, 1),
        lambda: guest.mark_imported(0, wrong, 1),
        lambda: guest.mark_imported(0, 0, wrong),
        lambda: guest.throttle(wrong),
    ):
        with pytest.raises(TypeError, match="is an integer, not"):
            call()
    with pytest.raises(TypeError):
        guest.write(5 * 4096, "text")
    with pytest.raises(TypeError):
        guest.set_state("text")
    with pytest.raises(TypeError):
        guest.client(7)
    assert state(guest) == before


def test_values_out_of_range_are_refused_and_nothing_changes(guest: PlainGuest) -> None:
    filled(guest).mark_imported(0, 5, 70)
    before = state(guest)
    for slot, first, npages in ((0, 513, 1), (0, -1, 1), (0, 0, 514), (0, 512, 2), (0, 5, -1), (0, 1 << 64, 1)):
        with pytest.raises(BitmapError):
            guest.mark_imported(slot, first, npages)
    for slot in (-1, 1, 1 << 32, 1 << 64):
        for call in (guest.memory, guest.dirty, lambda slot: guest.mark_imported(slot, 0, 1)):
            with pytest.raises(OSError, match="there is no") as raised:
                call(slot)
            assert raised.value.errno == ENOENT
    for gpa in (-1, 1 << 63, 1 << 64, 6 * 4096):
        for call in (lambda gpa: guest.read(gpa, 1), lambda gpa: guest.write(gpa, b"a")):
            with pytest.raises(OSError, match="not inside of one slot"):
                call(gpa)
    for percent in (-1, 100, 1 << 64):
        with pytest.raises(ValueError, match="percent is 0 to 99"):
            guest.throttle(percent)
    assert state(guest) == before


@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.uint16, np.int32, np.uint64, np.int64])
def test_numpy_integers_are_as_good(guest: PlainGuest, kind: type) -> None:
    guest.mark_imported(kind(0), kind(64), kind(3))
    guest.throttle(kind(9))
    with guest.dirty(kind(0)) as lease:
        assert lease.bitmap.pages().tolist() == [64, 65, 66]
    if kind(0).itemsize > 2:
        guest.write(kind(5 * 4096), b"x")
        assert guest.read(kind(5 * 4096), kind(1)) == b"x"
    assert guest.throttled == 9


def test_a_guest_is_made_of_a_map() -> None:
    with pytest.raises(TypeError, match="of a MemoryMap, not of tuple"):
        PlainGuest((4096, ()))


# --- files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [None, b"what is there, and isn't ours"])
def test_a_file_has_the_digest_of_its_guest(tmp_path: Path, before: bytes | None) -> None:
    place = tmp_path / "ram"
    if before is not None:
        place.write_bytes(before)
        place.chmod(0o666)
    guest = filled(PlainGuest(MAP, place))
    assert (place.read_bytes() if place.exists() else None) == before
    guest.commit()
    assert place.stat().st_mode & 0o777 == 0o600
    assert hashlib.sha256(place.read_bytes()).hexdigest() == guest.digest() == memory_digest(guest)
    guest.write(600 * 4096, b"later")
    assert hashlib.sha256(place.read_bytes()).hexdigest() == guest.digest()
    assert place.read_bytes()[4096:][:5] == b"later"  # after the page of slot 7
    with pytest.raises(ValueError, match="before"):
        guest.commit()
    guest.close()
    assert [*tmp_path.iterdir()] == [place]


def test_nothing_is_left_of_one_that_was_not_committed(tmp_path: Path) -> None:
    place = tmp_path / "ram"
    place.write_bytes(b"precious")
    filled(PlainGuest(MAP, place)).close()
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == {place: b"precious"}


def test_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/ram'"):
        PlainGuest(MAP, tmp_path / "ram")
    assert not [*tmp_path.iterdir()]


# --- the end -----------------------------------------------------------------------------------------------


def test_every_verb_is_in_the_table() -> None:
    public = {name for name in dir(PlainGuest) if not name.startswith("_")}
    assert public - VERBS.keys() == {"close", "logging"}


@pytest.mark.parametrize("name", VERBS)
def test_a_closed_guest_says_so(guest: PlainGuest, name: str) -> None:
    view = guest.memory(0)
    client = guest.client("a")
    guest.close()
    guest.close()
    with pytest.raises(ClosedError, match="the PlainGuest is closed"):
        VERBS[name](guest)
    with pytest.raises(ClosedError):
        client.take(0)
    client.close()
    view[:] = 1  # a view that somebody holds stays valid
    assert not guest.running


def test_a_child_says_whose_it_is_and_touches_nothing(tmp_path: Path) -> None:
    guest = filled(PlainGuest(MAP, tmp_path / "ram"))
    guest.start_log()
    digest = guest.digest()
    child = os.fork()
    if child == 0:
        refused = 0
        for verb in VERBS.values():
            try:
                verb(guest)
            except ClosedError:
                refused += 1
        guest.close()
        os._exit(0 if refused == len(VERBS) else 1)
    assert os.waitpid(child, 0)[1] == 0
    guest.commit()
    assert hashlib.sha256((tmp_path / "ram").read_bytes()).hexdigest() == digest == guest.digest()
    with guest.dirty(0) as lease:
        assert lease.bitmap == DirtyBitmap(513)
