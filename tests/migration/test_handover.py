"""One guest: the link ends and processes die at every message, and never do two copies run.

Where none runs, the source says how to go on, and that works. The light version of the matrix runs with the other
tests, all of it with ``make handover``.
"""

import os
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import forked
import handovertools
import pytest
from handovertools import (
    SETTINGS,
    TRANSPORTS,
    DestinationVm,
    Disk,
    Link,
    SourceVm,
    connect,
    listen,
    trap,
)

from hwdbm.errors import HandoverError, PeerError, StreamError
from hwdbm.migration import CancelledMigrationError, Channel, Precopy, Settings, channel, migrate, precopy, receive
from hwdbm.migration.wire import Kind

ALL = os.environ.get("HWDBM_HANDOVER") == "all"


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    """What waits for a peer that says nothing waits for a moment only."""
    monkeypatch.setattr(channel, "_DRAIN_SECONDS", 0.2)
    monkeypatch.setattr(precopy, "_DYING", 200)


@pytest.fixture(scope="module", autouse=True)
def _forks():
    """Have processes begin at once, as a receiver waits for them."""
    forked.ready()


class Destination:
    """A receiver in a thread, which waits for a source only for a moment where `nobody` comes."""

    def __init__(
        self, listener, disk: Path, *, timeout: float = 1.0, broken: bool = False, nobody: bool = False
    ) -> None:
        self.made, self.received, self.error = [], None, None
        self._listener, self._disk, self._timeout, self._broken = listener, disk, timeout, broken
        self.channel, self._patience = None, 0.2 if nobody else 60
        self.prepare = lambda channel: channel
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _build(self, layout):
        self.made.append(DestinationVm(layout, self._disk, broken=self._broken))
        return self.made[0]

    def _run(self) -> None:
        try:
            with self._listener.accept(self._patience) as self.channel:
                self.channel.timeout = self._timeout
                self.received = receive(self.prepare(self.channel), self._build)
        except Exception as error:  # noqa: BLE001  # for the test to look at
            self.error = error

    def join(self) -> "Destination":
        self._thread.join(90)
        assert not self._thread.is_alive()
        return self

    @property
    def running(self) -> bool:
        return any(vm.running for vm in self.made)

    def close(self) -> None:
        self._thread.join(90)
        for vm in self.made:
            vm.close()


@pytest.fixture
def disk(tmp_path):
    return tmp_path / "disk"


@pytest.fixture
def vm(disk):
    vm = SourceVm(disk)
    vm.resume()
    vm.start_log()
    yield vm
    vm.pause()
    vm.close()


def check_goes_on(vm: SourceVm, folder: Path) -> None:
    """Assert that the source's guest runs, with all its dirty bits, and that its next migration arrives."""
    assert vm.running
    vm.pause()
    for slot in vm.slots:
        lease = vm.dirty(slot.id)
        assert not [page for id_, page in vm.written if id_ == slot.id and page not in lease.bitmap]
        lease.rollback()
    vm.resume()
    folder.mkdir()
    with listen("tcp", folder) as listener:
        other = Destination(listener, vm.disk._path, timeout=10)
        with connect("tcp", listener.address, 10) as channel:
            report = migrate(vm, channel, SETTINGS)
        other.join()
        assert (other.error, other.running, vm.running) == (None, True, False)
        assert other.made[0].digest() == report.source_sha256
        other.close()


# Messages of the source: before which the link ends, or whose answer is lost.
LOST = [Kind.HELLO, Kind.PASS, Kind.STATE, Kind.VERIFY, Kind.GO]
UNANSWERED = [Kind.HELLO, Kind.PASS, Kind.VERIFY, Kind.GO]
POINTS = [(kind, 1, "lost") for kind in LOST] + [(kind, 1, "unanswered") for kind in UNANSWERED]
POINTS += [(Kind.PASS, 2, "lost"), (Kind.PASS, 2, "unanswered")]  # the last pass, with the guest paused
HOWS = ["fin", "rst", "silence"]
CASES = [(name, how, point) for name in TRANSPORTS for how in HOWS for point in POINTS]
if not ALL:  # all that decides, and for the rest that the tools work; where no HELLO comes the receiver waits on
    CASES = [
        (*each, point)
        for *each, point in CASES
        if point[0] is Kind.GO or (each == ["tcp", "rst"] and point != (Kind.HELLO, 1, "lost"))
    ]


def case(value) -> str:
    if isinstance(value, str):
        return value
    kind, turn, what = value
    return f"{kind.name}{turn if turn > 1 else ''}-{what}"


@pytest.mark.parametrize(("name", "how", "point"), CASES, ids=case)
@pytest.mark.alike(5)
def test_the_link_ends(vm, disk, tmp_path, name, how, point):
    kind, turn, what = point
    with listen(name, tmp_path) as listener:
        destination = Destination(listener, disk, nobody=(kind, what) == (Kind.HELLO, "lost"))
        link = Link(listener, tmp_path)
        with connect(name, link.address, 1.0) as source:
            act = (lambda: link.cut(how)) if what == "lost" else (lambda: link.swallow(how))
            attempt = Precopy(vm, trap(source, kind, act, turn), SETTINGS)
            with pytest.raises(StreamError) as raised:
                attempt.run()
        destination.join() if kind is not Kind.HELLO or what != "lost" else None
        link.close()
    assert link.ended.is_set()
    assert not disk.with_name("disk").read_bytes()
    assert not (vm.running and destination.running), "two run"
    unknown = isinstance(raised.value, HandoverError)
    assert attempt.report.status == "failed"
    assert attempt.report.handover_unknown is unknown
    if kind is not Kind.GO:
        assert (vm.running, destination.running, unknown) == (True, False, False)
    elif what == "unanswered":  # GO arrived: it runs there
        assert link.swallowed.is_set()
        assert (vm.running, destination.running, unknown) == (False, True, True)
        assert destination.received.destination.digest() == attempt.report.source_sha256
    elif not vm.running:  # GO was lost after the socket took it
        assert (destination.running, unknown) == (False, True)
        assert "resume the source by hand" in str(raised.value)
        vm.resume()
    if not destination.running:
        check_goes_on(vm, tmp_path / "next")
    destination.close()


@pytest.mark.parametrize("name", TRANSPORTS)
def test_a_destination_that_cannot_run_says_so(vm, disk, tmp_path, name):
    """It is the one thing that lets a source go on after GO: an ERROR of the destination itself."""
    with listen(name, tmp_path) as listener:
        destination = Destination(listener, disk, broken=True, timeout=5)
        with connect(name, listener.address, 5) as source, pytest.raises(PeerError, match="the vCPU doesn't start"):
            migrate(vm, source, SETTINGS)
        destination.join()
    assert str(destination.error).endswith("the vCPU doesn't start")
    check_goes_on(vm, tmp_path / "next")


def test_a_destination_that_may_have_run_says_nothing(vm, disk, tmp_path):
    """Where it can't be sure that what it started stands, it must not say that it does."""

    class Stuck(DestinationVm):
        def pause(self):
            if not self.closed:
                raise OSError(5, "the vCPU doesn't stop")

        closed = False

        def resume(self):
            super().resume()
            raise OSError(5, "half of it runs")

    with listen("unix", tmp_path) as listener:
        destination = Destination(listener, disk, timeout=5)
        destination._build = lambda layout: destination.made.append(Stuck(layout, disk)) or destination.made[0]
        with connect("unix", listener.address, 5) as source, pytest.raises(HandoverError):
            migrate(vm, source, SETTINGS)
        destination.join()
    assert (vm.running, destination.running) == (False, True)
    destination.made[0].closed = True
    destination.close()
    assert not disk.read_bytes()


KILLED = [Kind.READY, Kind.ACK, Kind.DIGEST, Kind.RESUMED]
RECEIVER = """
import os, sys
from pathlib import Path
from handovertools import DestinationVm, listen, trap
from hwdbm.migration import receive
from hwdbm.migration.wire import Kind
name, folder, disk, kind, when = sys.argv[1:]
with listen(name, Path(folder)) as listener:
    print(listener.address, flush=True)
    channel = listener.accept()
trap(channel, Kind[kind], lambda: os.kill(os.getpid(), 9), after=when == "after")
receive(channel, lambda layout: DestinationVm(layout, Path(disk)))
"""


def process(*args: object) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(Path(handovertools.__file__).parent)}
    return forked.Popen([sys.executable, "-P", *map(str, args)], stdout=subprocess.PIPE, text=True, env=environment)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", KILLED if ALL else [Kind.DIGEST, Kind.RESUMED], ids=lambda kind: kind.name)
@pytest.mark.parametrize("name", TRANSPORTS if ALL else ["unix", "tls"])
@pytest.mark.alike(2)
def test_the_destination_is_killed(vm, disk, tmp_path, name, kind, when):
    receiver = process("-c", RECEIVER, name, tmp_path, disk, kind.name, when)
    attempt = None
    with receiver, connect(name, receiver.stdout.readline().strip(), 5) as source:
        attempt = Precopy(vm, source, SETTINGS)
        if (kind, when) == (Kind.RESUMED, "after"):  # it had it, and the source knows
            attempt.run()
            assert not vm.running
            return
        with pytest.raises(StreamError) as raised:
            attempt.run()
    assert not disk.read_bytes()
    # A source on the same machine sees that the process is gone. From afar nobody can tell.
    unknown = isinstance(raised.value, HandoverError)
    if kind is Kind.RESUMED or name == "unix":
        assert unknown is (name != "unix")
    elif (kind, when) != (Kind.DIGEST, "after"):  # the source may have said GO to a process that was gone
        assert not unknown
    assert vm.running is not unknown
    if unknown:
        vm.resume()
    check_goes_on(vm, tmp_path / "next")


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", [*LOST, Kind.PASS] if ALL else [Kind.STATE, Kind.GO], ids=lambda kind: kind.name)
@pytest.mark.parametrize("name", TRANSPORTS if ALL else ["tcp"])
def test_the_source_is_killed(disk, tmp_path, name, kind, when):
    with listen(name, tmp_path) as listener:
        destination = Destination(listener, disk, timeout=30)
        source = process("-m", "handovertools", name, listener.address, disk, kind.name, 1, when)
        with source:
            if (kind, when) == (Kind.HELLO, "before"):
                return  # it never was a source
            destination.join()
    assert source.wait() == -9
    # It runs if it was told to: GO went whole before its sender died.
    assert destination.running is ((kind, when) == (Kind.GO, "after"))
    assert not disk.read_bytes()
    if not destination.running:
        assert isinstance(destination.error, StreamError)
        assert not Disk(disk).taken
    destination.close()


def test_a_cancel_is_heard_while_the_answer_is_awaited(vm, disk, tmp_path):
    """After GO it can't undo anything: what it ends is the wait, and the source stays paused."""
    cancel = threading.Event()
    with listen("tcp", tmp_path) as listener:
        destination = Destination(listener, disk, timeout=20)
        link = Link(listener, tmp_path)
        with connect("tcp", link.address, 20) as source:

            def swallow() -> None:
                link.swallow("silence")
                threading.Thread(target=lambda: (link.swallowed.wait(10), cancel.set())).start()

            with pytest.raises(HandoverError, match="was cancelled: whether the guest runs"):
                migrate(vm, trap(source, Kind.GO, swallow), SETTINGS, cancel=cancel)
        destination.join()
        link.close()
    assert (vm.running, destination.running) == (False, True)
    destination.close()


@pytest.mark.parametrize("kind", [Kind.READY, Kind.ACK, Kind.DIGEST], ids=lambda kind: kind.name)
def test_a_cancel_is_heard_before(vm, disk, tmp_path, kind):
    """A peer that never answers doesn't hold it, nor does one that says that it is busy."""
    cancel, stop = threading.Event(), threading.Event()
    with listen("tcp", tmp_path) as listener:
        destination = Destination(listener, disk, timeout=1.2)

        def dawdle() -> None:
            cancel.set()
            with destination.channel.alive():
                stop.wait(10)

        destination.prepare = lambda channel: trap(channel, kind, dawdle)
        with connect("tcp", listener.address, 20) as source:
            with pytest.raises(CancelledMigrationError):
                migrate(vm, source, SETTINGS, cancel=cancel)
            stop.set()
        destination.join()
    check_goes_on(vm, tmp_path / "next")


@pytest.mark.parametrize("turn", [2, 1])
@pytest.mark.alike(2)
def test_a_trickle_ends(vm, disk, tmp_path, monkeypatch, turn):
    """Deadlines are of whole exchanges: a byte now and then, or a sign of life, doesn't prolong them."""
    stop = threading.Event()
    with listen("tcp", tmp_path) as listener:
        destination = Destination(listener, disk, timeout=5)

        def trickle() -> None:
            with suppress(OSError):
                while not stop.wait(0.1):
                    if turn == 1:
                        destination.channel.sock.send(b"h")
                    else:
                        destination.channel.send(Kind.ALIVE)

        destination.prepare = lambda channel: trap(channel, Kind.DIGEST, trickle)
        with connect("tcp", listener.address, 1.0) as source:
            with pytest.raises(StreamError, match=r"longer than|begins with|nothing came"):
                migrate(vm, source, SETTINGS)
            stop.set()
        destination.join()
    check_goes_on(vm, tmp_path / "next")


def test_progress_that_raises_after_the_handover(vm, disk, tmp_path, caplog):
    """It is no failure of the migration: a caller that tried again would have two."""

    def tell(report) -> None:
        if report.status == "completed":
            raise RuntimeError("no room for the log")

    with listen("tcp", tmp_path) as listener:
        destination = Destination(listener, disk, timeout=5)
        with connect("tcp", listener.address, 5) as source:
            report = migrate(vm, source, SETTINGS, on_progress=tell)
        destination.join()
    assert (report.status, vm.running, destination.running) == ("completed", False, True)
    assert "no room for the log" in caplog.text
    destination.close()


def test_a_source_that_can_not_be_put_away_after_the_handover(vm, disk, tmp_path, caplog, monkeypatch):
    throttle = vm.throttle
    monkeypatch.setattr(vm, "throttle", lambda percent: throttle(percent) if percent else 1 // 0)
    with listen("tcp", tmp_path) as listener:
        destination = Destination(listener, disk, timeout=5)
        with connect("tcp", listener.address, 5) as source:
            report = migrate(vm, source, SETTINGS)
        destination.join()
    assert (report.status, vm.running, destination.running) == ("completed", False, True)
    assert "the source couldn't be put away after the handover" in caplog.text
    assert "ZeroDivisionError" in caplog.text
    destination.close()


def test_a_lease_that_went_stale(vm, disk, tmp_path):
    """A log that was lost on the way isn't found out by a digest that nobody asked for; so it is looked at."""

    class Lost(SourceVm):
        client = None  # a source whose log anybody may use

    vm.__class__ = Lost
    with listen("tcp", tmp_path) as listener:
        destination = Destination(listener, disk, timeout=5)
        with connect("tcp", listener.address, 5) as source:

            def lose() -> None:
                vm.stop_log()
                vm.start_log()

            attempt = Precopy(vm, trap(source, Kind.PASS, lose, 2), Settings(max_downtime=10, verify=False))
            with pytest.raises(StreamError, match="log was lost"):
                attempt.run()
        destination.join()
    assert (vm.running, destination.running) == (True, False)
    assert attempt.report.status == "failed"


def test_an_attempt_runs_once(vm):
    with connect_nowhere() as source:
        attempt = Precopy(vm, source, SETTINGS)
        with suppress(StreamError):
            attempt.run()
        with pytest.raises(ValueError, match="runs once"):
            attempt.run()


def connect_nowhere() -> Channel:
    import socket

    here, there = socket.socketpair()
    there.close()
    return Channel(here)
