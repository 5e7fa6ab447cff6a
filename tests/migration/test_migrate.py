"""Migrations that arrive."""

import math
import socket
import time

import numpy as np
import pytest
from migrationvm import LAYOUT, FakeVm

from hwdbm.bitmap import DirtyBitmap
from hwdbm.forecast.rules import Throttle
from hwdbm.memslot import Memslot
from hwdbm.migration import LayoutError, Settings, migrate
from hwdbm.migration.channel import Channel
from hwdbm.migration.precopy import Precopy
from hwdbm.migration.report import Pass, Report, folded
from hwdbm.vm import MemoryMap, PlainGuest, memory_digest

SOON = Settings(max_downtime=0.02, on_limit="pause")


def arrived(vm, inside, settings=SOON, build=PlainGuest, **options):
    other = inside(build)
    report = migrate(vm, other.channel, settings, **options)
    other.join()
    assert other.error is None, other.error
    return report, other.received


def test_a_guest_that_writes_throughout(vm, inside):
    vm.set_state(b"registers")
    vm.resume()
    told = []
    report, received = arrived(vm, inside, on_progress=lambda report: told.append(report.status))
    assert not vm.running
    there = received.destination
    assert vm.writes > 0
    assert there.digest() == memory_digest(there) == vm.digest() == report.source_sha256 == received.sha256
    assert report.destination_sha256 == report.source_sha256
    assert (there.state(), there.running) == (b"registers", True)
    assert told[-1] == "completed"
    assert {"active", "device"} <= set(told)
    for slot in LAYOUT.slots:  # what the migration took is the default client's all the same
        with vm.dirty(slot.id) as lease:
            assert {page for slot_id, page in vm.written if slot_id == slot.id} <= set(lease.bitmap.pages().tolist())


def test_the_report_is_query_migrates(vm, inside):
    zeros = {
        (slot.id, page)
        for slot in LAYOUT.slots
        for page in np.flatnonzero(~vm.memory(slot.id).reshape(-1, 4096).any(axis=1)).tolist()
    }
    assert len(zeros) > 400  # a sixth of the pages
    vm.start_log()  # so that all that is written is counted
    vm.resume()
    report, _ = arrived(vm, inside)
    said = report.to_dict()
    assert said["status"] == "completed"
    assert set(said) == {
        "status", "total-time", "setup-time", "downtime", "verify-time", "downtime-limit", "converged", "ram",
        "source-sha256",
        "destination-sha256", "passes",
    }  # fmt: skip
    ram, passes = said["ram"], said["passes"]
    assert set(ram) == {
        "transferred", "remaining", "total", "duplicate", "normal", "normal-bytes", "dirty-rate", "bandwidth",
        "dirty-sync-count", "page-size", "precopy-bytes", "downtime-bytes",
    }  # fmt: skip
    assert ram["total"] == LAYOUT.total == passes[0]["remaining"]
    assert ram["remaining"] == 0
    assert ram["normal-bytes"] == ram["normal"] * 4096
    assert ram["dirty-sync-count"] == len(passes) >= 2
    assert [one["pass"] for one in passes] == list(range(1, len(passes) + 1))
    for one in passes:
        assert one["normal"] + one["duplicate"] == one["dirty-pages"]
    assert sum(one["transferred"] for one in passes) <= ram["transferred"]
    assert 0 < said["downtime"] < said["total-time"]
    assert len(zeros - set(vm.written)) <= passes[0]["duplicate"] <= len(zeros)


def test_zero_pages_have_no_payload(inside):
    guest = PlainGuest(LAYOUT)
    report, received = arrived(guest, inside)
    assert report.transferred < 4096
    assert (report.normal, report.duplicate) == (0, 2825)
    assert 0 < report.passes[0].zero_time < report.passes[0].time
    assert (report.passes[1].dirty, report.passes[1].zero_time) == (0, 0.0)
    assert 0 <= report.downtime < report.total_time
    assert received.destination.digest() == guest.digest()


def test_zero_pages_overwrite_what_was_there(inside):
    def build(layout):
        guest = PlainGuest(layout)
        guest.memory(0)[:] = 1
        return guest

    _, received = arrived(PlainGuest(LAYOUT), inside, build=build)
    assert not received.destination.memory(0).any()


def test_a_to_b_to_c(vm, inside):
    """What B imported is dirty there, so C gets it, whether B's log was on or is only switched on then."""
    vm.resume()
    _, at_b = arrived(vm, inside)
    b = at_b.destination
    b.start_log()
    for slot in b.slots:
        with b.dirty(slot.id) as lease:
            assert lease.bitmap.weight() == slot.npages
            lease.rollback()
    b.write(0x4000_5000, b"written at B")
    report, at_c = arrived(b, inside)
    assert at_c.destination.digest() == b.digest() == report.source_sha256 != vm.digest()


def test_a_paused_guest_stays_paused(vm, inside):
    report, received = arrived(vm, inside)
    assert not received.destination.running
    assert report.status == "completed"
    assert len(report.passes) == 2


def test_without_proof(vm, inside):
    vm.resume()
    report, received = arrived(vm, inside, Settings(max_downtime=0.02, verify=False))
    assert received.sha256 == report.source_sha256 == ""
    assert "verify-time" not in report.to_dict()
    assert 0 < report.downtime < report.total_time
    assert received.destination.digest() == vm.digest()


def test_bandwidth_is_kept(vm, inside):
    start = time.perf_counter()
    report, _ = arrived(vm, inside, Settings(bandwidth=20e6))
    taken = time.perf_counter() - start
    assert report.transferred / 20e6 < taken + 0.1


class Busy(FakeVm):
    """A guest that writes all of its pages between two looks, however fast this machine is."""

    def _take(self, client, slot_id):
        if self.running:
            self.mark_imported(slot_id, 0, self.memory(slot_id).size // self.page_size)
        return super()._take(client, slot_id)


def test_most_iterations(inside):
    vm = Busy(MemoryMap(4096, (Memslot(0, 0, 0x40000, 513, 0),)), pause_every=0)
    vm.resume()
    report, received = arrived(vm, inside, Settings(0, 3, 200e6, on_limit="pause"))
    assert [each.dirty for each in report.passes] == [513] * 5  # the first, the best so far, and three no better
    assert not report.converged
    assert received.destination.digest() == vm.digest()
    vm.close()


def test_auto_converge(inside, monkeypatch):
    """A guest that dirties nearly all that is sent is slowed down, more and more."""
    vm = Busy(pause_every=0)
    percents = []
    monkeypatch.setattr(vm, "throttle", percents.append)
    vm.resume()
    report, received = arrived(vm, inside, Settings(0, 8, auto_converge=True, bandwidth=100e6, on_limit="pause"))
    assert percents[:2] == [20, 30]
    assert percents[-1] == 0
    assert received.destination.digest() == vm.digest()
    assert report.to_dict()["cpu-throttle-percentage"] >= 30
    vm.close()


def test_throttle_is_qemus():
    throttle = Throttle()
    steps = [throttle.next(dirtied=100, sent=100) for _ in range(22)]
    assert sorted(set(steps)) == [0, 20, 30, 40, 50, 60, 70, 80, 90, 99]
    assert steps[-1] == 99
    assert Throttle().next(dirtied=0, sent=0) == 0


@pytest.mark.parametrize(
    "numbers", [{"max_downtime": -1}, {"max_downtime": float("nan")}, {"max_iterations": 0}, {"bandwidth": 0}]
)
def test_settings_out_of_range(numbers):
    with pytest.raises(ValueError, match="not "):
        Settings(**numbers)


def test_settings_at_the_ends_of_their_ranges():
    least = Settings(max_downtime=0, max_iterations=1, bandwidth=1)
    assert (least.max_downtime, least.max_iterations, least.bandwidth) == (0.0, 1, 1.0)
    with pytest.raises(ValueError, match="bandwidth"):
        Settings(bandwidth=0.99)


@pytest.mark.parametrize("page_size", [4096, 16384, 65536])
@pytest.mark.parametrize("npages", [1, 63, 64, 65, 511, 513])
@pytest.mark.alike(2)
def test_sizes(inside, page_size, npages):
    layout = MemoryMap(page_size, (Memslot(0, 0, 7, npages, 0), Memslot(1, 2, 5000, 1, 0)))
    guest = PlainGuest(layout)
    guest.memory(0)[:: page_size * 2] = 1
    guest.memory(1)[-1] = 1
    report, received = arrived(guest, inside)
    assert received.destination.digest() == guest.digest()
    assert report.passes[0].normal == (npages + 1) // 2 + 1


def test_scattered_pages_of_a_running_guest(inside):
    """Every second page, so that no frame has few runs, and pages of zeros among them."""
    guest = PlainGuest(LAYOUT)
    guest.running = True
    rows = guest.memory(0).reshape(-1, 4096)
    rows[::2, 9] = 1
    _, received = arrived(guest, inside)
    assert received.destination.digest() == guest.digest()


def test_a_slot_that_is_all_dirty_but_one_page(inside):
    guest = PlainGuest(LAYOUT)
    guest.memory(0)[:] = 5
    guest.start_log()
    other = inside()
    real = guest._take
    calls = []

    def take(client, slot_id):
        calls.append(slot_id)
        if len(calls) == 3:  # between the first pass and the last
            guest.write(0x4000_0000, b"x" * (2047 << 12))
        return real(client, slot_id)

    guest._take = take
    report = migrate(guest, other.channel, SOON)
    assert report.passes[-1].normal == 2047
    assert other.join().received.destination.digest() == guest.digest()


@pytest.mark.parametrize("most", [1, 3, 4, 6, 9, 512])
def test_folded_is_the_dirty_part_of_each_cell(most):
    """Against one page after the other: slots of several sizes, and a cell that is of one slot."""
    random = np.random.default_rng(most)
    for sizes in ((1,), (64, 65), (640, 63, 130), (1000, 1, 64, 500)):
        dirty = [random.random(size) < share for size, share in zip(sizes, (0.3, 1.0, 0.0, 0.6), strict=False)]
        words = sum((size + 63) // 64 for size in sizes)
        cell = math.ceil(words / max(most - len(sizes), 1)) * 64
        expected = [part[at : at + cell].mean() for part in dirty for at in range(0, part.size, cell)]
        found = folded([DirtyBitmap.from_pages(np.flatnonzero(part), part.size) for part in dirty], most)
        assert found.dtype == np.float32
        assert found.tolist() == np.array(expected, dtype=np.float32).tolist()
        assert len(found) <= max(most, len(sizes))


def test_what_is_not_known_yet_is_said_as_such():
    one = Pass(1, 2, 8192)
    assert one.cells.size == 0
    assert repr(one).startswith("Pass(number=1, dirty=2, remaining=8192, ")
    assert not {"cells", "forecast"} & set(repr(one).replace("=", " ").split())
    assert one.bandwidth == Report(4096, 8192, 0.3).bandwidth == 0.0
    one.transferred, one.time, one.zero_time = 300, 1.0, 0.25
    assert one.bandwidth == Report(4096, 8192, 0.3, passes=[one]).bandwidth == 400.0
    one.zero_time = 1.0
    assert one.bandwidth == Report(4096, 8192, 0.3, passes=[one]).bandwidth == 0.0


def test_folded():
    one = DirtyBitmap(65)
    one.fill()
    assert folded([one]).tolist() == [1.0, 1.0]
    big = DirtyBitmap(1 << 20)
    big.set_range(0, 1 << 19)
    cells = folded([big, one], most=64)
    assert cells.size <= 64
    assert cells[0] == 1
    assert cells[-2] == 0
    assert np.isclose(cells[:-1].mean(), 0.5, atol=0.02)


def test_layouts():
    slot = Memslot(0, 1, 16, 64, 1 << 30)
    layout = MemoryMap(4096, (slot, Memslot(9, 2, 100, 1, 0)))
    again = MemoryMap.from_bytes(layout.to_bytes())
    layout.require(again)
    assert again.total == 65 * 4096
    with pytest.raises(LayoutError, match=r"slot 0 overlaps slot 9|slot 9 overlaps slot 0"):
        MemoryMap(4096, (slot, Memslot(9, 0, 79, 1, 0)))
    with pytest.raises(LayoutError, match="4096, 16384 or 65536 bytes, not 512"):
        MemoryMap(512, (slot,))
    with pytest.raises(LayoutError, match="1 to 32767 slots"):
        MemoryMap(4096, ())
    with pytest.raises(LayoutError, match="comes twice"):
        MemoryMap(4096, (slot, Memslot(0, 0, 1000, 1, 0)))
    with pytest.raises(LayoutError, match="beyond 52 bits"):
        MemoryMap(4096, (Memslot(0, 0, 1 << 40, 1, 0),))
    with pytest.raises(LayoutError, match="16384 bytes don't fit"):
        layout.require(MemoryMap(16384, layout.slots))
    with pytest.raises(LayoutError, match="1 slots don't fit"):
        layout.require(MemoryMap(4096, (slot,)))
    with pytest.raises(LayoutError, match=r"slot 9 \(gfn 0x65"):
        layout.require(MemoryMap(4096, (slot, Memslot(9, 2, 101, 1, 0))))


def test_the_real_machine(inside):
    """The modelled machine, at both ends, with blocks and while its vCPU writes."""
    machine = pytest.importorskip("hwdbm.machine")

    def build(layout=None):
        made = machine.Machine(thp=True)
        made.add_memslot(8 << 20, 0x4000_0000)
        return made

    source = build()
    source.run(machine.parse("uniform,rate=20k", 3))
    source.resume()
    time.sleep(0.05)
    other = inside(build)
    report = migrate(source, other.channel, SOON)
    got = other.join().received
    got.destination.pause()
    assert report.source_sha256 == report.destination_sha256 == source.digest()
    got.destination.start_log()
    source.close()
    got.destination.close()


def test_the_bandwidth_of_a_guest_of_zeros_is_that_of_looking_at_pages() -> None:
    """Not that of the few bytes by which they go; and no pass that took no time has one."""
    source, destination = socket.socketpair()
    with source, destination, Channel(source) as channel:
        one = Precopy(FakeVm(LAYOUT), channel, Settings(bandwidth=1e7))
        one.report.passes = [Pass(1, 1000, 0, duplicate=1000, transferred=9000, time=0.1, zero_time=0.1)]
        one.report.transferred = 9000
        assert one._bandwidth() == 1e7  # 1,000 pages a tenth of a second: the link has to carry them, too
        one.report.passes[0].duplicate = 100
        assert one._bandwidth() == pytest.approx(100 * FakeVm(LAYOUT).page_size / 0.1)
    assert Pass(1, 1, 0, transferred=5).bandwidth == 0
    assert Report(4096, 1 << 20, 0.3).bandwidth == 0
