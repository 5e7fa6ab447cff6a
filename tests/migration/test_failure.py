"""Migrations that fail: the source runs on, every bit is back, and the next attempt arrives."""

import os
import socket
import subprocess
import threading
import time
from dataclasses import replace
from errno import EBUSY, EIO, ENOSPC

import pytest
from migrationvm import LAYOUT, FakeVm

from hwdbm.memslot import Memslot
from hwdbm.migration import (
    CancelledMigrationError,
    Channel,
    DigestError,
    HandoverError,
    LayoutError,
    PeerError,
    Precopy,
    Settings,
    StreamError,
    migrate,
)
from hwdbm.migration.wire import Kind
from hwdbm.vm import MemoryMap, PlainGuest

SOON = Settings(max_downtime=0.01, max_iterations=4, on_limit="pause")


class TrappedChannel(Channel):
    """Does something when a frame is about to be sent."""

    at, action, count = -1, None, 0

    def send(self, kind, *args, **options):
        if self.at == (kind if isinstance(self.at, Kind) else self.count):
            self.at = -1
            self.action()
        self.count += 1
        super().send(kind, *args, **options)


def trap(channel: Channel, at: int | Kind, action) -> Channel:
    channel.__class__ = TrappedChannel
    channel.at, channel.action = at, action
    return channel


def check_back(vm: FakeVm) -> None:
    """Assert that the VM goes on, with every page dirty that was written since its log is on."""
    assert vm.running
    assert vm.throttled == 0
    before, until = vm.writes, time.monotonic() + 5
    while vm.writes == before and time.monotonic() < until:
        time.sleep(0.001)
    assert vm.writes > before
    vm.pause()
    for slot in vm.slots:
        lease = vm.dirty(slot.id)
        missing = [page for id_, page in vm.written if id_ == slot.id and page not in lease.bitmap]
        assert not missing
        lease.rollback()
    vm.resume()


def check_again(vm: FakeVm, inside) -> None:
    """Assert that a second attempt arrives."""
    other = inside()
    report = migrate(vm, other.channel, SOON)
    assert report.source_sha256 == report.destination_sha256 == vm.digest()
    assert other.join().received.destination.digest() == vm.digest()


CUTS = [0, 1, 2, 4, 6, 9, Kind.PASS, Kind.STATE, Kind.VERIFY, Kind.GO]  # STATE is the eleventh or later


@pytest.mark.parametrize(
    "at", [pytest.param(at, marks=pytest.mark.slow) if at in (2, 6) else at for at in CUTS], ids=repr
)
@pytest.mark.parametrize("how", ["cut", "half"])
@pytest.mark.alike(3)
def test_link_cut(vm, inside, at, how):
    vm.resume()
    vm.start_log()
    other = inside()

    def cut():
        if how == "half":  # a part of a frame goes, then nothing
            other.channel.sock.send(b"hDBM\3\0")
        other.channel.sock.shutdown(socket.SHUT_RDWR)

    precopy = Precopy(vm, trap(other.channel, at, cut), SOON)
    with pytest.raises(StreamError, match=r"link broke|stream ends"):
        precopy.run()
    assert precopy.report.status == "failed"
    assert precopy.report.to_dict()["error-desc"]
    check_back(vm)
    assert isinstance(other.join().error, StreamError)
    check_again(vm, inside)


@pytest.mark.parametrize("at", [1, 3, 9, Kind.PASS, Kind.STATE, Kind.GO], ids=repr)
@pytest.mark.alike(2)
def test_receiver_killed(vm, inside, process, at):
    vm.resume()
    vm.start_log()
    receiver = process()
    with receiver.connect() as channel:

        def kill():
            receiver.kill()
            receiver.process.wait()

        with pytest.raises(StreamError):
            migrate(vm, trap(channel, at, kill), SOON)
    check_back(vm)
    if at in {3, Kind.GO}:
        check_again(vm, inside)


def test_receiver_killed_whenever(vm, inside, process):
    """At a moment that no frame boundary names."""
    vm.resume()
    vm.start_log()
    receiver = process()
    with receiver.connect() as channel:
        timer = threading.Timer(0.05, receiver.kill)
        timer.start()
        with pytest.raises(StreamError):
            migrate(vm, channel, Settings(max_downtime=0, max_iterations=1000, bandwidth=30e6))
    check_back(vm)
    check_again(vm, inside)


def test_another_process(vm, process):
    vm.resume()
    receiver = process()
    with receiver.connect() as channel:
        report = migrate(vm, channel, SOON)
    assert receiver.done() == (0, report.source_sha256, "")
    assert report.source_sha256 == vm.digest()


@pytest.mark.parametrize("at", [0, 1, 4, Kind.PASS, Kind.STATE, Kind.GO], ids=repr)
def test_cancelled(vm, inside, at):
    vm.resume()
    vm.start_log()
    cancel, other = threading.Event(), inside()
    settings = Settings(max_downtime=0.0, max_iterations=2, bandwidth=200e6, on_limit="pause")
    precopy = Precopy(vm, trap(other.channel, at, cancel.set), settings, cancel=cancel)
    if at is Kind.GO:  # too late
        precopy.run()
        assert other.join().received.destination.digest() == vm.digest()
        return
    with pytest.raises(CancelledMigrationError, match="was cancelled"):
        precopy.run()
    assert precopy.report.to_dict()["status"] == "cancelled"
    check_back(vm)
    error = other.join().error
    assert isinstance(error, PeerError)
    assert "the other side gave up: the migration was cancelled" in str(error)
    check_again(vm, inside)


def test_keyboard_interrupt(vm, inside):
    vm.resume()
    vm.start_log()

    def interrupt():
        raise KeyboardInterrupt

    other = inside()
    with pytest.raises(KeyboardInterrupt):
        migrate(vm, trap(other.channel, 6, interrupt), SOON)
    check_back(vm)
    assert isinstance(other.join().error, PeerError)


def test_full_disk_at_the_receiver(vm, inside, monkeypatch, tmp_path):
    def full(*_):
        raise OSError(ENOSPC, os.strerror(ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    vm.resume()
    vm.start_log()
    other = inside(lambda layout: PlainGuest(layout, tmp_path / "ram"))
    with pytest.raises(PeerError, match=r"the other side gave up: .*No space left on device"):
        migrate(vm, other.channel, SOON)
    check_back(vm)
    assert other.join().error.errno == ENOSPC
    monkeypatch.undo()
    check_again(vm, inside)


def test_really_full_disk_at_the_receiver(vm, inside, process, tmp_path):
    """A file system of 4 MiB, where this user may mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("mount is not allowed")
    try:
        vm.resume()
        vm.start_log()
        receiver = process(folder / "ram")
        with receiver.connect() as channel, pytest.raises(PeerError, match="No space left on device"):
            migrate(vm, channel, SOON)
        status, _, err = receiver.done()
        assert status == 1
        assert "No space left on device" in err
        check_back(vm)
        check_again(vm, inside)
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_receiver_with_other_memory(vm, inside):
    mine = MemoryMap(4096, (Memslot(0, 0, 0x40000, 2048, 0), Memslot(3, 0, 0x80000, 778, 0)))
    other = inside(lambda _: PlainGuest(mine))
    vm.resume()
    vm.start_log()
    with pytest.raises(PeerError, match=r"slot 3 .*777 pages.* doesn't fit into slot 3 .*778 pages"):
        migrate(vm, other.channel, SOON)
    assert isinstance(other.join().error, LayoutError)
    check_back(vm)


def test_receiver_fails_inside_of_a_pass(vm, inside, monkeypatch):
    """The source hears of it between two frames, and says why."""
    vm.resume()
    vm.start_log()
    other = inside()

    def spoil():
        monkeypatch.setattr("hwdbm.migration.receiver._place", lambda *_: 1 / 0)
        monkeypatch.setattr("hwdbm.migration.receiver._DIRECT_RUNS", -1)

    with pytest.raises(PeerError, match="gave up: division by zero"):
        migrate(vm, trap(other.channel, 3, spoil), SOON)
    monkeypatch.undo()
    check_back(vm)
    check_again(vm, inside)


def test_digests_that_differ(vm, inside):
    def build(layout):
        guest = PlainGuest(layout)
        digest = guest.digest
        guest.digest = lambda: (guest.memory(0).__setitem__(77, guest.memory(0)[77] ^ 1), digest())[1]
        return guest

    vm.resume()
    vm.start_log()
    other = inside(build)
    precopy = Precopy(vm, other.channel, SOON)
    with pytest.raises(DigestError, match="at the destination"):
        precopy.run()
    said = precopy.report.to_dict()
    assert said["source-sha256"] != said["destination-sha256"]
    assert said["status"] == "failed"
    assert not isinstance(other.join().error, DigestError)  # the source told it
    check_back(vm)
    check_again(vm, inside)


def test_a_source_that_fails(vm, inside):
    vm.resume()
    vm.start_log()
    real, calls = vm._take, []

    def take(client, slot_id):
        calls.append(slot_id)
        if len(calls) == 4:
            raise OSError(5, "the log is broken")
        return real(client, slot_id)

    vm._take = take
    other = inside()
    with pytest.raises(OSError, match="the log is broken"):
        migrate(vm, other.channel, SOON)
    del vm._take
    assert "the log is broken" in str(other.join().error)
    check_back(vm)
    check_again(vm, inside)


def test_a_log_that_is_gone(vm, inside):
    """Bits die with their log; there is nothing to put back, and the rest goes on. (`stop_log` would be refused.)"""
    vm.resume()
    other = inside()
    with pytest.raises(StreamError):
        migrate(vm, trap(other.channel, 5, lambda: (vm._switch(on=False), other.channel.sock.shutdown(2))), SOON)
    assert vm.running


@pytest.fixture
def impatient(monkeypatch):
    """Have whoever gives up wait for what a peer still sends for a moment only, as there is none that sends."""
    monkeypatch.setattr("hwdbm.migration.channel._DRAIN_SECONDS", 0.1)


def test_silence(vm, impatient):
    """A receiver that never says a word."""
    here, there = socket.socketpair()
    vm.resume()
    vm.start_log()
    with Channel(here, timeout=0.3) as channel, there, pytest.raises(StreamError, match=r"nothing came for \d+\.\d s"):
        migrate(vm, channel, SOON)
    check_back(vm)


@pytest.mark.slow
def test_silence_after_go_leaves_the_source_paused(vm, inside, monkeypatch, impatient):
    """Whether the destination runs is unknown. Two that run would be worse than none."""
    vm.resume()
    vm.start_log()
    other = inside()
    wait = threading.Event()
    real = Channel.send

    def send(self, kind, *args, **options):
        if kind is Kind.RESUMED:
            wait.wait(60)
        real(self, kind, *args, **options)

    monkeypatch.setattr(Channel, "send", send)

    def hurry():
        other.channel.timeout = 0.3

    precopy = Precopy(vm, trap(other.channel, Kind.GO, hurry), SOON)
    with pytest.raises(HandoverError, match="whether the guest runs at the destination is unknown"):
        precopy.run()
    wait.set()
    assert not vm.running
    for slot in LAYOUT.slots:
        with vm.dirty(slot.id) as lease:
            assert all(page in lease.bitmap for id_, page in vm.written if id_ == slot.id)


def test_a_source_that_cannot_run_again(vm, inside):
    """What is raised is why the migration failed; that the source is dead, too, is said beside it."""

    def dies():
        raise OSError(EIO, "vCPU 0 stopped")

    vm.resume()
    other = inside()

    def cut():
        vm.resume = dies
        other.channel.sock.shutdown(socket.SHUT_RDWR)

    with pytest.raises(StreamError) as raised:
        migrate(vm, trap(other.channel, Kind.STATE, cut), SOON)
    assert raised.value.__notes__ == ["and the source doesn't run: [Errno 5] vCPU 0 stopped"]
    del vm.resume
    vm.resume()
    check_back(vm)


def test_another_kind_of_vm_is_refused_at_hello(inside):
    """Before its memory goes over, and not by its state, which comes last."""
    from hwdbm.machine import Machine

    def build(layout):
        machine = Machine()
        for slot in layout.slots:
            machine.add_memslot(slot.npages * 4096, slot.base_gfn * 4096, slot=slot.id)
        return machine

    vm = FakeVm()
    vm.kind = "kvm x86_64"
    vm.resume()
    vm.start_log()
    other = inside(build)
    with pytest.raises(PeerError, match="of kind 'kvm x86_64', which doesn't fit into one of 'machine'"):
        migrate(vm, other.channel, SOON)
    assert other.channel.sent < 4096
    check_back(vm)
    vm.close()


def test_two_migrations_at_once(vm, inside):
    """The second one is refused, and leaves the guest to the first: it may have paused it."""
    vm.resume()
    vm.start_log()
    other, refused = inside(), []

    def second():
        vm.throttle(5)  # which the first one has asked for, say
        assert not vm.running
        channel = inside().channel
        precopy = Precopy(vm, channel, SOON)
        precopy._ran = True  # it was made when the guest ran
        with pytest.raises(OSError, match="has a client 'migration' already") as raised:
            precopy.run()
        refused.append(raised.value.errno)
        assert not vm.running
        assert vm.throttled == 5

    report = migrate(vm, trap(other.channel, Kind.STATE, second), SOON)
    assert refused == [EBUSY]
    assert other.join().received.destination.digest() == vm.digest() == report.destination_sha256


def test_others_use_the_log_meanwhile(vm, inside, tmp_path):
    """A GET, a diff and a client of somebody else take nothing from the migration; and what they take is right."""
    vm.resume()
    vm.start_log()
    other, took = inside(), []

    def intrude():
        for slot in vm.slots:
            vm.dirty(slot.id).commit()
        with vm.client("backup") as client:
            took.append(client.take(0).epoch)

    report = migrate(vm, trap(other.channel, Kind.STATE, intrude), SOON)
    assert took == [0]
    assert other.join().received.destination.digest() == vm.digest() == report.destination_sha256


@pytest.mark.parametrize("off", [True, False])
def test_a_log_that_is_switched_off_meanwhile(vm, inside, off):
    """H13: off and on between two passes, without the digest at the end that would find it."""
    vm.resume()
    vm.start_log()
    other = inside()

    def switch():
        vm.stop_log()
        if not off:
            vm.start_log()

    with pytest.raises(OSError, match="the log was lost while it was used"):
        migrate(vm, trap(other.channel, Kind.STATE, switch), replace(SOON, verify=False))
    assert vm.running
    vm.start_log()
    check_again(vm, inside)


def test_nothing_is_left_of_a_migrations_client(vm, inside):
    vm.resume()
    other = inside()
    migrate(vm, other.channel, SOON)
    other.join()
    vm.client("migration").close()
    vm.dirty(0).commit()  # and the log is anybody's again
