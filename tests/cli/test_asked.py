"""What commands ask the library for: each kind of VM with its options, the other side, the migration, in order.

The library is replaced at the command's edge by what notes how it is called, so that no guest is started.
"""

import threading
from collections.abc import Callable
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import numpy as np
import pytest
from seen import as_seen

from hwdbm import kernels
from hwdbm.cli import guest, migrate, plan, receive, record, snapshot
from hwdbm.errors import StreamError
from hwdbm.memslot import Memslot
from hwdbm.migration import Report
from hwdbm.migration.receiver import Received
from hwdbm.migration.transport import TlsDir
from hwdbm.vm import MemoryMap

SIZE = 4 << 20
LAYOUT = MemoryMap(4096, (Memslot(0, 0, 16, 32, 0), Memslot(3, 0, 64, 8, 0)))


class Asked:
    """Notes calls, a line each, of what it stands for."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.memory: dict[str, Any] = {}
        self.fails: dict[str, BaseException] = {}

    def note(self, name: str, *args: object, **options: object) -> None:
        """Note a call, several of the same in a row once, and raise what it is to raise."""
        given = [*map(shown, args), *(f"{key}={shown(value)}" for key, value in options.items())]
        line = f"{name}({', '.join(given)})"
        if line not in self.calls[-1:]:
            self.calls.append(line)
        if name in self.fails:
            raise self.fails[name]

    def stands_for(self, name: str, answer: Callable[..., Any] = lambda *_, **__: None) -> Callable[..., Any]:
        """Return a function that notes its calls and returns an answer."""

        def call(*args: object, **options: object) -> Any:
            self.note(name, *args, **options)
            return answer(*args, **options)

        return call

    def vm(self, name: str) -> type:
        """Return a class of VMs that note what is done with them."""
        asked = self

        class Vm:
            page_size = 4096

            def __init__(self, *args: object, **options: object) -> None:
                asked.note(name, *args, **options)
                self.slots, self.vcpus = LAYOUT.slots, [SimpleNamespace(store=self.store)]

            @classmethod
            def from_slots(cls, *args: object, **options: object) -> "Vm":
                asked.note(f"{name}.from_slots", *args, **options)
                made = object.__new__(cls)
                made.slots = args[1]
                return made

            def add_memslot(self, *args: object, **options: object) -> SimpleNamespace:
                asked.note(f"{name}.add_memslot", *args, **options)
                return SimpleNamespace(id=7)

            def memory(self, slot: int) -> Any:
                asked.note(f"{name}.memory", slot)
                return asked.memory.setdefault(f"{name} {slot}", np.full(SIZE, 1, dtype=np.uint8))

            def store(self, addresses: Any, words: Any) -> None:
                same = np.array_equal(words, self.memory(7).view(np.uint64)[(addresses - addresses[0]) // 8])
                asked.note(f"{name}.store", ends(addresses), as_it_is=same)

            def __getattr__(self, verb: str) -> Callable[..., Any]:
                if verb.startswith("__"):
                    raise AttributeError(verb)
                return asked.stands_for(f"{name}.{verb}")

            def __enter__(self) -> Self:
                return self

            def __exit__(self, *_: object) -> None:
                asked.note(f"{name}.close")

            def __repr__(self) -> str:
                return name

        return Vm


def ends(numbers: Any) -> str:
    return f"{numbers.size} of {int(numbers[0]):#x}..{int(numbers[-1]):#x}"


def shown(value: object) -> str:
    """Return a value as a line shows it, the same in each run."""
    if isinstance(value, Path):
        return value.name
    if isinstance(value, np.ndarray):
        return f"{value.size} {value.dtype}"
    if isinstance(value, threading.Event | TlsDir) or callable(value):
        return type(value).__name__
    if isinstance(value, Memslot):
        return f"{value.id}:{value.base_gfn:#x}+{value.npages}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(shown, value)) + "]"
    return repr(value)


def told(asked: Asked) -> list[str]:
    """Return what there is in each memory: where pages of random numbers end, and what a page begins with."""
    lines = []
    for name, memory in asked.memory.items():
        rows = memory.reshape(-1, 4096)
        random = np.flatnonzero((rows[:, 8:] != 1).any(axis=1))
        heads = [int(rows[:, at].any()) for at in (0, 3, 4)]
        digest = int(memory.view(np.uint64)[513:1024].sum()) if random.size else 0
        lines.append(f"{name}: {random.size} pages written, {digest:#x}, heads {heads}")
    return lines


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """Put what notes calls in place of VMs, links, migrations and recordings."""
    asked = Asked()
    for name in ("Machine", "KvmVm", "ArmVm"):
        monkeypatch.setattr(guest, name, asked.vm(name))
    channel = SimpleNamespace(close=asked.stands_for("channel.close"))

    @contextmanager
    def link(*args: object, **options: object) -> Any:
        with closing(channel):
            yield "channel"

    def migration(vm: Any, *_: object, **__: object) -> SimpleNamespace:
        return SimpleNamespace(run=asked.stands_for("run"), report=Report(4096, SIZE, 0.3, "completed"), failure=None)

    def child(command: list[str], **options: object) -> Any:
        asked.note("child", command[command.index("hwdbm") + 1 :], **options)
        stdin = SimpleNamespace(close=asked.stands_for("child.stdin.close"))
        return nullcontext(SimpleNamespace(stdin=stdin, poll=lambda: None))

    for where, name, answer in (
        (migrate.transport, "connect_tcp", link), (migrate.transport, "connect_unix", link),
        (migrate, "Precopy", migration), (migrate, "record_vm", None), (kernels, "warm_up", None),
        (plan, "record", None), (record, "record_vm", None), (migrate.reports, "write", None),
        (snapshot, "_record", lambda *_, **__: SimpleNamespace(snapshots=[], paused=[], migration=None)),
    ):  # fmt: skip
        monkeypatch.setattr(where, name, asked.stands_for(name, answer or (lambda *_, **__: None)))
    monkeypatch.setattr(migrate, "child", child)
    monkeypatch.setattr(migrate.transport, "private_socket", lambda: nullcontext(Path("socket")))
    monkeypatch.setattr(record, "_say", asked.stands_for("say"))
    monkeypatch.setattr(snapshot, "_say_taken", lambda *_, **__: None)
    return asked


COMMANDS = {
    "migrate": [
        "",
        "--workload uniform --rate 7 --seed 9 --filled 60 --mode write-protect --thp",
        "--workload idle --no-thp --filled 0 --to unix:/tmp/s",
        "--workload hot,rate=3 --filled 100 --to localhost:4444 --insecure",
        "--to 127.0.0.1:1 --tls-dir certificates",
        "--memory-image {image}",
        "--replay {bitmaps}",
        "--replay {bitmaps} --interval 0.5",
        "--record trace",
        "--report {report}",
        "--max-downtime 77 --max-iterations 3 --bandwidth 2M --auto-converge --no-verify --on-limit pause",
        "--rule qemu",
        "--source kvm",
        "--source kvm --workload random --rate 0 --kvm-log ring",
        "--source kvm --workload idle --kvm-log clear --filled 50",
        "--source kvm --kvm-log initially-set --memory-image {image} --rate 5",
        "--source arm",
        "--source arm --workload window,zero --rate 0 --thp",
        "--source arm --workload idle --memory-image {image} --no-thp",
    ],
    "record": [
        "--output trace --duration 2 --interval 0.5 --no-zeros --mode write-protect --thp --seed 3",
        "--output trace --source kvm --kvm-log ring",
        "--output trace --source arm --thp --rate 3",
    ],
    "plan": [
        "--source machine --bandwidth 1G --duration 3 --workload uniform,rate=5 --seed 4",
        "--source kvm --bandwidth 1G --duration 0.05",
        "--source arm --bandwidth 1G --rate 3",
    ],
    "snapshot save chain": [
        "--source machine --every 250 --count 3 --digest --migrate",
        "--source kvm --kvm-log clear",
        "--source arm --rate 3 --migrate",
    ],
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_what_a_command_asks_for_was_looked_at(command: str, run, asked, tmp_path, monkeypatch) -> None:
    (tmp_path / "image").write_bytes(b"an image" * 600)
    (tmp_path / "bitmaps").mkdir()
    for name in ("a", "b"):
        (tmp_path / "bitmaps" / name).write_bytes(b"\1" * 128)
    files = {"image": tmp_path / "image", "bitmaps": tmp_path / "bitmaps", "report": tmp_path / "report.html"}
    monkeypatch.chdir(tmp_path)
    lines = []
    asked.fails["record"] = OSError(5, "no guest ran")
    for given in COMMANDS[command]:
        asked.calls.clear()
        asked.memory.clear()
        result = run(*command.split(), *given.format(**files).split(), "--memory", "4M")
        lines += [f"$ {command} {given}", *asked.calls, *told(asked), f"status {result.status} {result.err}", ""]
    as_seen(f"asked/{command.partition(' ')[0]}.txt", "\n".join(lines))


RECEIVED = [
    "",
    "--mode write-protect --thp --run 0.25",
    "--memory 4M --no-thp",
    "--memory-limit 1M",
    "--memory-limit 4096",
    "--memory-limit 4095",
    "--memory 8K --memory-limit 8K",
    "--memory 8K --memory-limit 8191",
    "--vm kvm",
    "--vm kvm --kvm-log ring --memory 4M",
    "--vm arm --thp",
    "--vm arm --memory 4M",
    "--vm machine",
    "--file ram",
    "--file ram --memory 4M",
]


def test_what_a_receiver_asks_for_was_looked_at(run, asked, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(guest, "physical", lambda: 1 << 30)
    monkeypatch.setattr(receive.time, "sleep", asked.stands_for("sleep"))
    monkeypatch.setattr(receive, "populate", asked.stands_for("populate"))
    monkeypatch.setattr(receive, "_accepted", lambda *_, **__: nullcontext("channel"))
    monkeypatch.setattr(receive, "PlainGuest", asked.vm("PlainGuest"))

    def arrives(channel: str, build: Callable[[MemoryMap], Any], **_: object) -> Received:
        return Received(build(LAYOUT), 1, 2, 3, 4, "", told=True, proved=None)

    monkeypatch.setattr(receive, "receive_vm", asked.stands_for("receive_vm", arrives))
    lines = []
    for given in RECEIVED:
        asked.calls.clear()
        result = run("receive", "--unix", "s", *given.split())
        lines += [f"$ receive {given}", *asked.calls, f"status {result.status} {result.err}", ""]
    as_seen("asked/receive.txt", "\n".join(lines))


@pytest.mark.parametrize("kind", ["machine", "kvm", "arm"])
def test_a_guest_that_is_restored_runs_and_is_checked(kind: str, run, asked, monkeypatch) -> None:
    found = SimpleNamespace(id="it", name="it", layout=LAYOUT, source=f"{kind} of some kind", digest="0")
    chain = SimpleNamespace(find=lambda _: found, restore=asked.stands_for("restore", lambda *_: found))
    monkeypatch.setattr(snapshot, "Chain", lambda _: chain)
    monkeypatch.setattr(snapshot, "_entry", lambda *_: {})
    result = run("snapshot", "restore", "chain", "--source", kind, "--seconds", 0)
    name = {"machine": "Machine", "kvm": "KvmVm", "arm": "ArmVm"}[kind]
    assert (result.status, result.err) == (0, "")
    made, ran = asked.calls[:-6], asked.calls[-6:]
    assert ran == [
        "warm_up()",
        f"restore({name}, 'it')",
        *(f"{name}.{verb}()" for verb in ("resume", "prove", "pause", "close")),
    ]
    slots = "[0:0x10+32, 3:0x40+8]"
    assert (
        made
        == {
            "machine": [
                "Machine(granule=<Granule.K4: 12>, hw_dbm=True, thp=False, vcpus=1)",
                "Machine.add_memslot(131072, 65536, slot=0, readonly=False)",
                "Machine.add_memslot(32768, 262144, slot=3, readonly=False)",
            ],
            "kvm": [f"KvmVm.from_slots(4096, {slots}, ring=None, manual_protect='off')"],
            "arm": [f"ArmVm.from_slots(4096, {slots}, blocks=False)"],
        }[kind]
    )


BUILDERS = {
    "Machine": lambda: guest.build(SIZE, mode=guest.Mode.HW_DBM, thp=False, seed=0, image=None, percent=75),
    "KvmVm": lambda: guest.build_kvm(SIZE, log=guest.KvmLog.CLEAR, workload=None, rate=None, seed=0, image=None,
                                     percent=75),
    "ArmVm": lambda: guest.build_arm(SIZE, workload=None, rate=None, seed=0, blocks=False, image=None, percent=75),
}  # fmt: skip


@pytest.mark.parametrize("name", BUILDERS)
def test_a_guest_whose_memory_cannot_be_filled_is_closed(asked: Asked, name: str) -> None:
    asked.fails[f"{name}.memory"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        BUILDERS[name]()
    assert asked.calls[-1] == f"{name}.close()"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(12, "no room"), MemoryError()])
def test_a_machine_that_cannot_have_its_memory_is_closed(asked: Asked, error: BaseException) -> None:
    asked.fails["Machine.add_memslot"] = error
    with pytest.raises(StreamError if isinstance(error, OSError) else type(error)):
        guest.machine_for(LAYOUT, mode=guest.Mode.HW_DBM, thp=False)
    assert asked.calls[-1] == "Machine.close()"
