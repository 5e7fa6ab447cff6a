"""Processes that are killed, or stand still, and disks that are full, while a real guest is moved.

The source's guest runs on and its next migration is right; or the destination says plainly that it has nothing.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
from effort import EFFORT

from hwdbm import snapshot
from hwdbm.cli.guest import KvmLog, build_kvm, kvm_for
from hwdbm.dirtylog import Lease
from hwdbm.kvm import Kvm
from hwdbm.migration import (
    Channel,
    HandoverError,
    Precopy,
    Received,
    Report,
    Settings,
    StreamError,
    migrate,
    receive,
    transport,
)
from hwdbm.migration.wire import Kind

MEMORY = 32 << 20
# Pages a second. A page that is lost can be told until the guest has been at all 8,192, and is there again.
RATE, SLOW = 10_000, 3_000
PASSES = Settings(max_downtime=0, max_iterations=4, bandwidth=200e6, on_limit="pause")  # some 40 MiB, in 0.3 s

# One interpreter has imported everything, and is forked for each command: they begin at once. Processes that lose
# their parent are given to it. A request is a line: a command to start, with where its output goes and the frame at
# which it kills itself; or one to wait for.
SERVER = """
import ctypes, json, os, signal, sys, time
import forked
from hwdbm import process
from hwdbm.cli import main
from hwdbm.migration import Channel
from hwdbm.migration.wire import Kind

def command(args, out, err, trap):
    for fd, path in ((0, os.devnull), (1, out), (2, err)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), fd)
    sys.argv = ["hwdbm", *args]
    if trap:
        real, left = Channel.send, trap[1]
        def send(channel, kind, *rest, **options):
            nonlocal left
            left -= kind is Kind[trap[0]]
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            real(channel, kind, *rest, **options)
        Channel.send = send
    try:
        main()
    except SystemExit as end:  # to take down an interpreter that was forked costs more than most tests
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code or 0)

def wait(pid, seconds):
    until = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            return None
        time.sleep(0.002)

forked.import_everything(compiled=True)
process.subprocess = forked.NESTED
ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
print("ready", flush=True)
for line in sys.stdin:
    what, *rest = json.loads(line)
    if what == "wait":
        answer = wait(*rest)
    else:
        answer = os.fork()
        if not answer:
            break
    print(json.dumps(answer), flush=True)
else:
    sys.exit()
command(*rest)
"""


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


MIGRATE = ("migrate", "--source", "kvm", "--memory", "32M", "--rate", RATE, "--json")
MIGRATE += ("--bandwidth", "100M", "--max-iterations", "2", "--on-limit", "pause")  # some 0.7 s


class Command:
    """A command that runs in a process of its own."""

    def __init__(self, ask: Callable[..., Any], folder: Path, args: tuple[object, ...], trap: object) -> None:
        self._ask, self._out, self._err = ask, folder / "out", folder / "err"
        folder.mkdir()
        self.status: int | None = None
        self.pid: int = ask("start", [*map(str, args)], str(self._out), str(self._err), trap)

    def send(self, number: int) -> None:
        if self.status is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it, and return when it is gone."""
        self.send(signal.SIGKILL)
        self.wait()

    def wait(self, seconds: float = 20) -> int:
        if self.status is None:
            self.status = self._ask("wait", self.pid, seconds)
            assert self.status is not None, f"it runs still after {seconds} s, and said {self.err!r}"
        return self.status

    @property
    def err(self) -> str:
        return self._err.read_text() if self._err.exists() else ""

    def said(self) -> dict[str, Any]:
        """Return its JSON, when it ended well."""
        assert self.wait() == 0, self.err
        found: dict[str, Any] = json.loads(self._out.read_text())
        return found


class Commands:
    """Starts commands, and sees that none is left."""

    def __init__(self, folder: str) -> None:
        # Threads and fork() don't go together; and who is killed leaves what was temporary.
        environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "TMPDIR": folder}
        environment["PYTHONPATH"] = str(Path(forked.__file__).parent)
        self._server = subprocess.Popen(
            [sys.executable, "-P", "-W", "error", "-c", SERVER],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        assert self._server.stdout
        assert self._server.stdout.readline() == "ready\n"

    def ask(self, *request: object) -> Any:
        assert self._server.stdin
        assert self._server.stdout
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def wait(self, pid: int, seconds: float = 20) -> int:
        """Return the exit status of a process that lost its parent."""
        status: int | None = self.ask("wait", pid, seconds)
        assert status is not None, f"process {pid} is left behind"
        return status

    def left(self) -> list[int]:
        return children(self._server.pid)

    def close(self) -> None:
        self._server.communicate()


@pytest.fixture(scope="module")
def commands() -> Iterator[Commands]:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own would be too long for a socket's path
        commands = Commands(folder)
        yield commands
        commands.close()


Start = Callable[..., Command]


@pytest.fixture
def start(kvm: Kvm, commands: Commands, tmp_path: Path) -> Iterator[Start]:
    """Return a function that starts a command. In the end none may run."""
    made: list[Command] = []

    def start_(*args: object, trap: tuple[str, int] | None = None) -> Command:
        made.append(Command(commands.ask, tmp_path / f"command{len(made)}", args, trap))
        return made[-1]

    yield start_
    left = [each.pid for each in made if each.status is None]
    for each in made:
        each.kill()
    orphans = commands.left()
    for pid in orphans:
        os.kill(pid, signal.SIGKILL)
        commands.wait(pid)
    assert not left + orphans, "they are left behind, or nobody waited for them"


class Receiver:
    """``hwdbm receive --vm kvm``, and a way to it."""

    def __init__(self, start: Start, folder: Path, log: KvmLog, *, tcp: bool, trap: tuple[str, int] | None) -> None:
        self._path = None if tcp else folder / f"{time.monotonic_ns():x}.sock"
        place = ("--listen", "127.0.0.1:0", "--insecure") if self._path is None else ("--unix", self._path)
        self.command = start("receive", "--vm", "kvm", "--kvm-log", log.value, "--json", *place, trap=trap)

    def connect(self, timeout: float = 20) -> Channel:
        while True:
            with suppress(FileNotFoundError, ConnectionRefusedError):
                if self._path is not None:
                    return transport.connect_unix(self._path, timeout)
                return transport.connect_tcp("127.0.0.1", self.port(), None, insecure=True, timeout=timeout)
            time.sleep(0.005)

    def port(self) -> int:
        until = time.monotonic() + 20
        while not self.command.err.endswith("\n"):
            assert time.monotonic() < until
            time.sleep(0.005)
        return int(self.command.err.rpartition(":")[2])


@pytest.fixture
def receiver(start: Start, tmp_path: Path) -> Callable[..., Receiver]:
    def receiver_(log: KvmLog = KvmLog.BITMAP, *, tcp: bool = False, trap: tuple[str, int] | None = None) -> Receiver:
        return Receiver(start, tmp_path, log, tcp=tcp, trap=trap)

    return receiver_


class Running:
    """A guest that runs and logs, and a copy of its memory that the log alone can bring up to date."""

    def __init__(self, log: KvmLog, rate: float = RATE) -> None:
        self.vm = build_kvm(MEMORY, log=log, workload=None, rate=rate, seed=5, image=None, percent=100)
        self.vm.start_log()
        self._copy = [np.empty(0, dtype=np.uint8)] * len(self.vm.slots)
        self.vm.resume()
        self.take_copy()

    def take_copy(self) -> None:
        self.vm.pause()
        for slot in self.vm.slots:
            self.vm.dirty(slot.id).commit()
            self._copy[slot.id] = self.vm.memory(slot.id).copy()
        self.vm.resume()

    def check_back(self) -> None:
        """Assert that the guest runs on, and that no page which it wrote since the copy is clean."""
        assert self.vm.running
        self.vm.prove()  # it progresses, and its pattern is right
        self.vm.pause()
        for slot in self.vm.slots:
            rows = self.vm.memory(slot.id).reshape(slot.npages, -1)
            differ = np.flatnonzero((rows != self._copy[slot.id].reshape(slot.npages, -1)).any(axis=1))
            lease = self.vm.dirty(slot.id)
            dirty = lease.bitmap.pages()
            lease.rollback()
            lost = np.setdiff1d(differ, dirty)
            assert not lost.size, f"slot {slot.id}: page {lost[0]} was written, and is clean; {lost.size} such pages"
            assert differ.size or slot.id, "the guest wrote nothing"
        self.vm.resume()

    def check_next(self, receiver: Receiver) -> None:
        """Assert that the next migration arrives, in another process, and that its guest goes on there."""
        with receiver.connect() as channel:
            report = migrate(self.vm, channel, Settings(max_downtime=0.1))
        check(report, receiver.command.said())
        assert report.source_sha256 == self.vm.digest()
        assert not self.vm.running


def check(report: Report, there: dict[str, Any]) -> None:
    assert report.status == "completed"
    assert report.source_sha256 == report.destination_sha256 == there["destination-sha256"]
    assert report.guest_resumed is there["guest-resumed"] is True


@pytest.fixture
def running(kvm: Kvm) -> Iterator[Callable[..., Running]]:
    made: list[Running] = []

    def running_(log: KvmLog = KvmLog.BITMAP, rate: float = RATE) -> Running:
        made.append(Running(log, rate))
        return made[-1]

    yield running_
    for each in made:
        each.vm.close()


class TrappedChannel(Channel):
    """Does something when a frame is about to be sent: when so many bytes went, or before the first of a kind."""

    at: int | Kind | None = None
    action: Callable[[], object]
    given_up: Callable[[], object] | None = None  # what is done before the other side is told

    def send(self, kind: Kind, *args: Any, **options: Any) -> None:
        if self.at is not None and (kind is self.at if isinstance(self.at, Kind) else self.sent >= self.at):
            self.at = None
            self.action()
        super().send(kind, *args, **options)

    def fail(self, reason: str) -> None:
        if self.given_up is not None:
            self.given_up()
        super().fail(reason)


@contextmanager
def trapped(
    channel: Channel, at: int | Kind | None, action: Callable[[], object], given_up: Callable[[], object] | None = None
) -> Iterator[Channel]:
    channel.__class__ = TrappedChannel
    assert isinstance(channel, TrappedChannel)
    channel.at, channel.action, channel.given_up = at, action, given_up
    with channel:
        yield channel


# --- the receiver is killed --------------------------------------------------------------------------------

BYTES: list[int | Kind | str] = [mib << 20 for mib in (0, 1, 3, 6, 10, 14, 18, 22, 26, 31, 34, 37)]
KINDS = [Kind.PASS, Kind.STATE, Kind.VERIFY, Kind.GO]  # the source is about to say it
ITSELF = ["READY", "ACK", "DIGEST", "RESUMED"]  # the destination is
POINTS = [*BYTES, *KINDS, *ITSELF]
CHOSEN = [
    (number, at) for number, at in enumerate(POINTS) if EFFORT > 1 or number >= len(BYTES) or number in (0, 1, 4, 7, 10)
]
"""With their numbers, by which each has its log and its link; all of the bytes in `make thorough`."""
LOGS = list(KvmLog)


def named(point: object) -> str:
    if isinstance(point, Kind):
        return point.name
    return f"{point >> 20}MiB" if isinstance(point, int) else str(point)


@pytest.mark.parametrize(("number", "at"), CHOSEN, ids=[named(at) for _, at in CHOSEN])
@pytest.mark.alike(5)
def test_the_receiver_is_killed(
    running: Callable[..., Running], receiver: Callable[..., Receiver], number: int, at: int | Kind | str
) -> None:
    """At twenty points; over both links, and with each of the logs."""
    log, tcp = LOGS[number % 4], number % 3 == 1
    itself = (at, 2 if at == "ACK" else 1) if isinstance(at, str) else None
    ours = None if isinstance(at, str) else at
    source, victim = running(log), receiver(log, tcp=tcp, trap=itself)
    with (
        trapped(victim.connect(), ours, victim.command.kill) as channel,
        pytest.raises(StreamError, match=r"the link broke|the stream ends") as raised,
    ):
        migrate(source.vm, channel, PASSES)
    assert victim.command.wait() == -signal.SIGKILL
    if tcp and isinstance(raised.value, HandoverError):  # it had had GO, and over TCP nobody sees that it is gone
        assert at in {"RESUMED", "DIGEST"}
        assert not source.vm.running
        source.vm.resume()
    source.check_back()
    source.check_next(receiver(log, tcp=not tcp))


def test_bits_that_are_not_put_back_are_found(
    running: Callable[..., Running], receiver: Callable[..., Receiver], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mutant: a migration that is no client of its own, and forgets what it was lent when it fails."""
    source, victim = running(rate=SLOW), receiver()
    with monkeypatch.context() as patch, trapped(victim.connect(), 33 << 20, victim.command.kill) as channel:
        patch.setattr("hwdbm.vm.source.Shareable", type("Nobody", (), {}))
        patch.setattr(Lease, "rollback", Lease.commit)
        with pytest.raises(StreamError):
            migrate(source.vm, channel, PASSES)
    with pytest.raises(AssertionError, match=r"slot 0: page \d+ was written, and is clean"):
        source.check_back()


def test_the_receiver_is_killed_when_it_runs(
    running: Callable[..., Running], receiver: Callable[..., Receiver], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was told to run, and said that it does; then it is gone. The source says so, and doesn't run, too."""
    source, victim = running(), receiver()
    with victim.connect() as channel:
        precopy = Precopy(source.vm, channel, PASSES)
        settle = precopy._settle
        monkeypatch.setattr(precopy, "_settle", lambda: (victim.command.kill(), settle()))
        report = precopy.run()
    assert report.guest_resumed is False
    assert report.error.startswith("the guest at the destination: the")
    assert not source.vm.running
    source.vm.resume()  # whoever knows that nobody else has it
    source.take_copy()
    source.check_next(receiver())


def test_the_command_tries_again(start: Start) -> None:
    """The receiver that it started is killed; it starts another one."""
    source = start(*MIGRATE, "--attempts", "2")
    until = time.monotonic() + 20
    while not children(source.pid) and time.monotonic() < until:
        time.sleep(0.01)
    (victim,) = children(source.pid)
    while not _shares_memory(victim) and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(victim, signal.SIGKILL)
    said = source.said()
    assert "trying again" in source.err
    assert said["status"] == "completed"
    assert said["source-sha256"] == said["destination-sha256"]
    assert said["guest-resumed"] is True


def _shares_memory(pid: int) -> bool:
    """Return whether a receiver has mapped what the source shares with it: the pages are coming."""
    with suppress(FileNotFoundError):
        return "hwdbm-staging" in Path(f"/proc/{pid}/maps").read_text()
    return False


# --- the source is killed ----------------------------------------------------------------------------------


CUTS = [("HELLO", 1), ("PAGES", 1), ("PAGES", 6), ("PASS", 1), ("PASS", 2), ("STATE", 1), ("VERIFY", 1), ("GO", 1)]


@pytest.mark.parametrize("trap", CUTS, ids=lambda trap: f"{trap[0]}{trap[1]}")
def test_the_source_is_killed(start: Start, receiver: Callable[..., Receiver], trap: tuple[str, int]) -> None:
    """The destination says plainly that it has nothing: the guest was the source's until it would have said GO."""
    there = receiver(tcp=True)
    to = ("--to", f"127.0.0.1:{there.port()}", "--insecure")
    source = start("migrate", "--source", "kvm", "--memory", "32M", "--rate", RATE, *to, trap=trap)
    assert source.wait() == -signal.SIGKILL
    if trap == ("HELLO", 1):  # it never was a source, and the next one is waited for
        there.command.send(signal.SIGTERM)
        assert there.command.wait() == 130
        return
    assert there.command.wait() == 1
    last = there.command.err.splitlines()[-1]
    assert last.startswith(("hwdbm: the stream ends inside of frame", "hwdbm: the link broke"))
    assert not (there.command._out.exists() and there.command._out.read_text())


@pytest.mark.parametrize("trap", [("SHARED", 4), ("GO", 1)], ids=lambda trap: f"{trap[0]}{trap[1]}")
def test_the_source_is_killed_and_its_receiver_goes_too(
    commands: Commands, start: Start, trap: tuple[str, int]
) -> None:
    """The one that the command started itself: it isn't left behind, though nobody hears what it says."""
    source = start("migrate", "--source", "kvm", "--memory", "32M", "--rate", RATE, trap=trap)
    assert source.wait() == -signal.SIGKILL
    (orphan,) = commands.left()  # it was given to the server
    assert commands.wait(orphan) in {1, 130}  # it saw the link end, or its parent


# --- one of them stands still ------------------------------------------------------------------------------


def later(seconds: float, action: Callable[..., object], *args: object) -> threading.Timer:
    timer = threading.Timer(seconds, action, args)
    timer.start()
    return timer


@pytest.mark.parametrize("at", [12 << 20, 34 << 20, Kind.GO], ids=named)
@pytest.mark.alike(3)
def test_the_receiver_stands_still_and_goes_on(
    running: Callable[..., Running], receiver: Callable[..., Receiver], at: int | Kind
) -> None:
    source, there = running(), receiver(KvmLog.CLEAR)
    timers: list[threading.Timer] = []

    def stop() -> None:
        there.command.send(signal.SIGSTOP)
        timers.append(later(0.4, there.command.send, signal.SIGCONT))

    with trapped(there.connect(), at, stop) as channel:
        start = time.monotonic()
        report = migrate(source.vm, channel, PASSES)
        assert time.monotonic() - start > 0.4
    timers[0].join()
    check(report, there.command.said())


@pytest.mark.parametrize(
    ("at", "tcp"),
    [(12 << 20, False), (12 << 20, True), (33 << 20, False), (Kind.VERIFY, True)],
    ids=["12MiB-unix", "12MiB-tcp", "33MiB-unix", "VERIFY-tcp"],
)
@pytest.mark.alike(5)
def test_the_receiver_stands_still_for_too_long(
    running: Callable[..., Running], receiver: Callable[..., Receiver], at: int | Kind, tcp: bool
) -> None:
    source, there = running(KvmLog.RING, SLOW), receiver(tcp=tcp)
    stop, go_on = (partial(there.command.send, number) for number in (signal.SIGSTOP, signal.SIGCONT))
    with (
        trapped(there.connect(0.3), at, stop, go_on) as channel,
        pytest.raises(StreamError, match=r"(the other side took nothing|nothing came) for \d+\.\d s"),
    ):
        migrate(source.vm, channel, PASSES)
    assert there.command.wait() == 1
    assert "hwdbm: the other side gave up" in there.command.err or "hwdbm: the stream ends" in there.command.err
    source.check_back()
    source.check_next(receiver())


@pytest.mark.slow
def test_the_receiver_stands_still_when_it_is_to_run(
    running: Callable[..., Running], receiver: Callable[..., Receiver], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody can know whether it runs, so that the source doesn't. When it goes on, GO is there: it does."""
    monkeypatch.setattr("hwdbm.migration.channel._DRAIN_SECONDS", 0.1)  # it sends nothing that could be taken
    source, there = running(), receiver()
    with (
        trapped(there.connect(0.3), Kind.GO, lambda: there.command.send(signal.SIGSTOP)) as channel,
        pytest.raises(HandoverError, match="whether the guest runs at the destination is unknown"),
    ):
        migrate(source.vm, channel, PASSES)
    assert not source.vm.running
    there.command.send(signal.SIGCONT)
    said = there.command.said()
    assert (said["source-told"], said["guest-resumed"]) == (False, True)
    assert not source.vm.running


def test_the_source_stands_still_and_goes_on(start: Start, receiver: Callable[..., Receiver]) -> None:
    there = receiver(KvmLog.RING, tcp=True)
    source = start(*MIGRATE, "--to", f"127.0.0.1:{there.port()}", "--insecure")
    for _ in range(4):
        time.sleep(0.1)
        source.send(signal.SIGSTOP)
        time.sleep(0.2)
        source.send(signal.SIGCONT)
    said = source.said()
    assert said["status"] == "completed"
    assert said["guest-resumed"] is True
    assert said["source-sha256"] == said["destination-sha256"] == there.command.said()["destination-sha256"]


def test_the_source_stands_still_for_too_long(start: Start) -> None:
    """The destination says so. The source, when it goes on, sees that it was given up, and tries again."""
    with transport.listen_tcp("127.0.0.1", 0, None, insecure=True) as listener:
        to = f"127.0.0.1:{listener.sock.getsockname()[1]}"
        source = start(*MIGRATE, "--to", to, "--insecure", "--attempts", "2")
        first, go_on = listener.accept(20), partial(source.send, signal.SIGCONT)
        first.timeout = 0.3
        timer = later(0.2, source.send, signal.SIGSTOP)
        with (
            trapped(first, None, go_on, given_up=go_on) as channel,
            pytest.raises(StreamError, match=r"^nothing came for \d+\.\d s$"),
        ):
            arrive(channel)
        timer.join()
        with listener.accept(20) as channel:
            received = arrive(channel)
            with received.destination as vm:
                vm.prove()
    said = source.said()
    assert "hwdbm: the other side gave up: nothing came for " in source.err
    assert "trying again" in source.err
    assert said["status"] == "completed"
    assert said["guest-resumed"] is received.proved is True
    assert said["source-sha256"] == received.sha256


def arrive(channel: Channel) -> Received:
    return receive(channel, lambda layout: kvm_for(layout, log=KvmLog.BITMAP))


def test_a_receiver_that_is_stopped_for_good_can_be_cancelled(
    running: Callable[..., Running], receiver: Callable[..., Receiver]
) -> None:
    source, there = running(), receiver()
    with trapped(there.connect(), 8 << 20, lambda: there.command.send(signal.SIGSTOP)) as channel:
        later(0.3, there.command.send, signal.SIGKILL)
        with pytest.raises(StreamError, match=r"the link broke|the stream ends"):
            migrate(source.vm, channel, PASSES)
    there.command.kill()
    source.check_back()
    source.check_next(receiver())


# --- a full disk -------------------------------------------------------------------------------------------


@contextmanager
def full_disk(folder: Path) -> Iterator[Path]:
    """Yield a folder with room for 1 MiB; or where this user may not mount one, room for as much in each file."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]
    if shutil.which("mount") and not subprocess.run(command, check=False, capture_output=True).returncode:
        try:
            yield folder
        finally:
            subprocess.run(["umount", folder], check=True)
        return
    with small_files(folder):
        yield folder


@contextmanager
def small_files(folder: Path) -> Iterator[Path]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))  # SIGXFSZ is ignored by Python
    try:
        yield folder
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(("log", "how"), [*((log, "disk") for log in LOGS), (KvmLog.BITMAP, "limit")])
@pytest.mark.alike(2)
def test_no_room_for_a_snapshot(running: Callable[..., Running], tmp_path: Path, log: KvmLog, how: str) -> None:
    """Twice, of the running guest. The one after them has all that these would have had."""
    source = running(log)
    vm, base = source.vm, tmp_path / "base"
    snapshot.write_full(vm, base)
    time.sleep(0.1)
    for turn in range(2):
        with full_disk(tmp_path / f"small{turn}") if how == "disk" else small_files(tmp_path) as folder:
            with pytest.raises(OSError, match=r"No space left on device|File too large") as raised:
                snapshot.write_diff(vm, folder / "diff")
            assert raised.value.filename == str(folder / "diff")
            assert not (folder / "diff").exists()
        assert vm.running
        vm.prove()
    vm.pause()
    diff = snapshot.write_diff(vm, tmp_path / "diff")
    assert diff.dirty > 0
    assert snapshot.rebase(base, diff.path) == diff.data
    assert base.read_bytes() == b"".join(vm.memory(slot.id).tobytes() for slot in vm.slots)
    vm.resume()
    vm.prove()


@pytest.mark.slow
def test_bits_that_a_snapshot_loses_are_found(
    running: Callable[..., Running], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mutant: what was lent for the snapshot that failed is forgotten."""
    vm, base = running(rate=SLOW).vm, tmp_path / "base"
    snapshot.write_full(vm, base)
    time.sleep(0.1)
    with small_files(tmp_path), monkeypatch.context() as patch:
        patch.setattr(Lease, "rollback", Lease.commit)
        with pytest.raises(OSError, match="File too large"):
            snapshot.write_diff(vm, tmp_path / "diff")
    vm.pause()
    snapshot.rebase(base, snapshot.write_diff(vm, tmp_path / "diff").path)
    assert base.read_bytes() != b"".join(vm.memory(slot.id).tobytes() for slot in vm.slots)
