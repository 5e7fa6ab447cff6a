"""Migrating, receiving, and snapshots, by command."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import forked
import pytest
import typer
from clocks import Clock

from hwdbm import DirtyBitmap, snapshot
from hwdbm.cli.guest import Endpoint, endpoint
from hwdbm.errors import StreamError
from hwdbm.memslot import Memslot
from hwdbm.vm import MemoryMap, PlainGuest

pytest.importorskip("hwdbm.machine")
MAIN = [sys.executable, "-P", "-W", "error", "-c", "from hwdbm.cli import main; main()"]
TLS = Path(__file__).parents[1] / "data" / "tls"
SMALL = ["--memory", "16M", "--rate", "5000", "--max-downtime", "5000"]


def start(*args: object, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    return forked.Popen(
        [*MAIN, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True,
        env=os.environ | (environment or {}),
    )  # fmt: skip


@pytest.fixture
def folder() -> Iterator[Path]:
    """Return a folder whose name is short enough for a socket's path."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@pytest.mark.parametrize("options", [[], ["--thp", "--mode", "write-protect", "--workload", "uniform"]])
def test_migrate(run, options) -> None:
    result = run("migrate", *SMALL, "--json", *options)
    assert (result.status, result.err) == (0, "")
    said = json.loads(result.out)
    assert said["status"] == "completed"
    assert said["source-sha256"] == said["destination-sha256"]
    assert len(said["source-sha256"]) == 64
    assert said["ram"]["total"] == 16 << 20
    assert said["converged"] is True
    assert said["downtime"] <= said["total-time"]
    first = said["passes"][0]  # of zeros are those that the guest hasn't written since it began
    assert first["duplicate"] + first["normal"] == (16 << 20) // 4096


def test_migrate_as_text_and_with_pictures(run, tmp_path: Path) -> None:
    result = run("migrate", *SMALL, "--report", tmp_path / "report.png")
    assert result.status == 0
    assert "completed in" in result.out
    assert "\x1b" not in result.out + result.err
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    result = run("migrate", *SMALL, "--report", tmp_path / "report.html", "--bandwidth", "100M", "--auto-converge")
    page = (tmp_path / "report.html").read_text()
    rows = result.out.partition("\n\n")[0].splitlines()
    assert page.count("<tr>") == 5 * (len(rows) - 1)  # one head, not two; the same passes in each table
    assert page.count("<svg ") == 4


def test_an_image(run, tmp_path: Path) -> None:
    image = tmp_path / "ram"
    image.write_bytes(b"guest" * 100_000)
    result = run("migrate", "--memory", "2M", "--workload", "idle", "--memory-image", image, "--json")
    said = json.loads(result.out)
    from hashlib import sha256

    assert said["source-sha256"] == sha256(image.read_bytes().ljust(2 << 20, b"\0")).hexdigest()


@pytest.mark.parametrize(
    ("args", "match"),
    [
        (["--report", "x.pdf"], ".html or .png"),
        (["--insecure"], "--insecure has no effect without --to HOST:PORT"),
        (["--tls-dir", "x"], "--tls-dir has no effect without --to HOST:PORT"),
        (["--to", "localhost"], "is not HOST:PORT"),
        (["--to", "guest.sock"], "nor unix:PATH"),
        (["--rule", "vmware"], "'vmware' is no rule: there are ours, qemu"),
        (["--to", "unix:"], "has no path"),
        (["--to", "unix:x", "--insecure"], "--insecure has no effect over a Unix socket"),
        (["--to", "localhost:1"], "TCP needs certificates (--tls-dir), or --insecure on a loopback address"),
        (["--to", "localhost:1", "--insecure", "--tls-dir", "x"], "--tls-dir for one with it"),
        (["--memory", "x"], "is not a size"),
        (["--memory", "0"], "one or more, not 0 bytes"),
        (["--memory", "3K"], "not 3072 bytes"),
        (["--memory", "100T"], "a memslot has 2147483647 pages of 4096 bytes at most, not the 100T asked for"),
        (["--max-iterations", "0"], "'--max-iterations': '0' is no whole number of 1 or more"),
        (["--attempts", "x"], "'--attempts': 'x' is no whole number of 1 or more"),
        (["--filled", "101"], "'101' is no whole number of 0 to 100"),
        (["--seed", "-1"], "'-1' is no whole number of 0 to 18446744073709551615"),
        (["--seed", 5000 * "9"], "is no whole number of 0 to"),
        (["--source", "KVM"], "'KVM' is none of machine, kvm"),
        (["--mode", ""], "'' is none of hw-dbm, write-protect"),
        (["--on-limit", "x"], "'x' is none of abort, wait, pause"),
        (["--memory-image", ""], "'--memory-image': the path is empty"),
        (["--replay", ""], "'--replay': the path is empty"),
        (["--report", ""], "'--report': the path is empty"),
        (["--tls-dir", ""], "'--tls-dir': the path is empty"),
        (["--to", "192.0.2.1:1", "--insecure", "--memory", "4K"], "--insecure is for loopback addresses"),
        (["--workload", "hot,nope=1"], "workload hot has no option 'nope'"),
        (["--workload", "hot,share=nan"], "not 'nan'"),
        (["--workload", "hot,"], "workload 'hot,': '' is not of the form option=number"),
        (["--to", "unix:" + 108 * "x"], "the path of a Unix socket has 107 bytes at most"),
        (["--workload", "idle", "--rate", "5"], "a rate has no effect with a workload that is idle"),
        (["--workload", "idle,rate=5"], "a rate has no effect with a workload that is idle"),
        (["--max-iterations", "3", "--on-limit", "wait"], "--max-iterations has no effect with --on-limit wait"),
        (["--max-downtime", "nan"], "'nan' is not a number of 0 or more"),
        (["--max-downtime", "-1"], "'-1' is not a number of 0 or more"),
        (["--rate", "x"], "'x' is not a number"),
        (["--bandwidth", "0"], "more than 0"),
        (["--workload", "replay"], "needs its bitmaps: hwdbm migrate --replay FOLDER"),
        (["--workload", "knitting"], "no workload 'knitting'"),
        (["--workload", "hot,share=7"], "share is a number of 0 to 1, not 7"),
        (["--workload", "uniform,rate=5", "--rate", "6"], "both give a rate"),
        (["--interval", "1"], "--interval has no effect without --replay"),
        (["--replay", "x", "--workload", "idle"], "--workload has no effect with --replay"),
        (["--replay", "x", "--rate", "3"], "--rate has no effect with --replay"),
        (["--memory-image", "x", "--filled", "5"], "--filled has no effect with --memory-image"),
        (["--kvm-log", "ring"], "--kvm-log has no effect without --source kvm"),
        (["--source", "kvm", "--thp"], "--thp has no effect with --source kvm"),
        (["--source", "kvm", "--no-thp"], "--thp has no effect with --source kvm"),
        (["--source", "kvm", "--mode", "hw-dbm"], "--mode has no effect with --source kvm"),
        (["--source", "kvm", "--replay", "x"], "--replay has no effect with --source kvm"),
    ],
)
def test_wrong_usage(run, args, match) -> None:
    result = run("migrate", *args)
    assert result.status == 2
    assert match in " ".join(result.err.split())


@pytest.mark.parametrize(
    ("args", "match"),
    [
        ([], "give --listen HOST:PORT or --unix PATH"),
        (["--unix", "x", "--listen", "localhost:1"], "give --listen HOST:PORT or --unix PATH"),
        (["--unix", "x", "--tls-dir", "x"], "--tls-dir has no effect over a Unix socket"),
        (["--listen", "localhost:1"], "TCP needs certificates"),
        (["--unix", "x", "--file", "y", "--thp"], "--thp has no effect with --file"),
        (["--unix", "x", "--file", "y", "--run", "1"], "--run has no effect with --file"),
        (["--unix", "x", "--file", "y", "--vm", "machine"], "--vm has no effect with --file"),
        (["--unix", "x", "--vm", "kvm", "--mode", "hw-dbm"], "--mode has no effect with --vm kvm"),
        (["--unix", "x", "--kvm-log", "ring"], "--kvm-log has no effect without --vm kvm"),
        (["--unix", "x", "--run", "inf"], "'inf' is not a number"),
        (["--unix", ""], "'--unix': the path is empty"),
        (["--unix", 54 * "\u00e9"], "the path of a Unix socket has 107 bytes at most"),
        (["--listen", "unix:" + 108 * "x"], "the path of a Unix socket has 107 bytes at most"),
        (["--unix", "x", "--file", ""], "'--file': the path is empty"),
        (["--unix", "x", "--vm", "qemu"], "'qemu' is none of machine, kvm"),
        (["--unix", "x", "--memory-limit", "0"], "no guest would be taken"),
        (["--unix", "x", "--memory", "2M", "--memory-limit", "1M"], "no guest would be taken"),
        (["--listen", "0.0.0.0:0", "--insecure"], "--insecure is for loopback addresses"),
    ],
)
def test_wrong_usage_of_receive(run, args, match) -> None:
    result = run("receive", *args)
    assert result.status == 2
    assert match in " ".join(result.err.split())


@pytest.mark.parametrize("args", [["receive", "--unix", "s", "--file"], ["migrate", *SMALL, "--report"]])
def test_a_file_that_cannot_be_written_is_found_out_before(run, tmp_path: Path, monkeypatch, args) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    os.mkfifo("pipe.png")
    for place in ("nowhere/x.png", "folder.png", "pipe.png", "pipe.png/x.png"):
        result = run(*args, place)
        assert (result.status, result.out) == (1, "")
        assert result.err.startswith(f"hwdbm: {place}: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.png", "pipe.png"]


@pytest.mark.parametrize("args", [["migrate"], ["receive", "--unix", "s"]])
def test_more_memory_than_there_is(run, args) -> None:
    result = run(*args, "--memory", "7T")
    assert result.status == 1
    assert result.err.startswith("hwdbm: out of memory: a guest of 7,340,032.0 MiB on a machine that has ")


def test_files_that_are_none(run, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for args in (["--memory-image", tmp_path / "pipe"], ["--memory-image", "/dev/zero"], ["--replay", tmp_path]):
        result = run("migrate", "--memory", "1M", *args)
        assert (result.status, result.out) == (1, "")
        assert "is no regular file" in result.err
    for number, (head, what) in enumerate([(b"\x7fELF", "an ELF file"), (b"\x1f\x8b\x08", "compressed by gzip")]):
        (tmp_path / f"image{number}").write_bytes(head.ljust(4096, b"\0"))
        result = run("migrate", "--memory", "1M", "--memory-image", tmp_path / f"image{number}")
        assert (result.status, result.out) == (1, "")
        assert f"is {what}" in result.err


def test_endpoints() -> None:
    assert endpoint("[fe80::1%eth0]:12") == Endpoint("fe80::1%eth0", 12)
    for text in ("host", ":1", "host:", "host:65536", "::1:1", "host:x"):
        with pytest.raises(ValueError, match="is not HOST:PORT"):
            endpoint(text)


@pytest.mark.parametrize("tls", [["--insecure"], ["--tls-dir", TLS]])
def test_over_tcp_into_a_file(run, tmp_path: Path, tls) -> None:
    receiver = start("receive", "--listen", "127.0.0.1:0", "--file", tmp_path / "ram", "--json", *tls)
    where = receiver.stderr.readline().split()[-1]
    result = run("migrate", *SMALL, "--to", where, "--json", *tls)
    out, err = receiver.communicate(timeout=20)
    assert (result.status, receiver.returncode, err) == (0, 0, ""), result.err
    said, there = json.loads(result.out), json.loads(out)
    assert there["destination-sha256"] == said["source-sha256"]
    assert there["ram"]["dirty-sync-count"] == said["ram"]["dirty-sync-count"]
    assert (tmp_path / "ram").stat().st_size == 16 << 20
    assert (tmp_path / "ram").stat().st_mode & 0o777 == 0o600


def test_receive_refuses_what_is_too_large(run) -> None:
    receiver = start("receive", "--listen", "127.0.0.1:0", "--insecure", "--memory-limit", "8M")
    where = receiver.stderr.readline().split()[-1]
    result = run("migrate", *SMALL, "--to", where, "--insecure", "--json")
    out, err = receiver.communicate(timeout=20)
    text = "16777216 bytes of guest memory are more than the 8388608 allowed here"
    assert (result.status, receiver.returncode, out) == (1, 1, "")
    assert text in err
    assert f"the other side gave up: {text}" in result.err
    assert json.loads(result.out)["status"] == "failed"


def test_over_a_unix_socket(run, folder: Path) -> None:
    """The receiver says where it listens, in the form that --to takes, and takes over what a killed one left."""
    path = folder / "s"
    killed = start("receive", "--unix", path)
    assert killed.stderr.readline() == f"hwdbm: listening on unix:{path}\n"
    killed.kill()
    killed.communicate()
    assert path.exists()
    receiver = start("receive", "--unix", path, "--json")
    where = receiver.stderr.readline().split()[-1]
    result = run("migrate", *SMALL, "--to", where, "--json")
    out, err = receiver.communicate(timeout=20)
    assert (result.status, receiver.returncode, err) == (0, 0, ""), result.err
    assert json.loads(out)["destination-sha256"] == json.loads(result.out)["source-sha256"]
    assert not path.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_receiver_that_is_ended_leaves_nothing(folder: Path, number: int) -> None:
    receiver = start("receive", "--unix", folder / "s", "--file", folder / "ram")
    receiver.stderr.readline()
    receiver.send_signal(number)
    out, err = receiver.communicate(timeout=20)
    assert (receiver.returncode, out, err) == (130, "", "hwdbm: interrupted\n")
    assert not list(folder.iterdir())


@pytest.mark.parametrize("kill", ["at once", "when it listens", "while it migrates"])
def test_the_receiver_goes_with_its_source(folder: Path, kill: str) -> None:
    """Killed, the source can end nothing any more: its receiver sees that it is gone, and leaves nothing behind."""
    source = start("migrate", *SMALL, "--bandwidth", "1M", environment={"TMPDIR": str(folder)})
    children: list[str] = []
    while not children:
        time.sleep(0.01)
        children = Path(f"/proc/{source.pid}/task/{source.pid}/children").read_text().split()
    if kill != "at once":
        while not list(folder.glob("*/migrate.sock")):
            time.sleep(0.01)
    if kill == "while it migrates":
        time.sleep(1)
    source.kill()
    source.communicate()
    until = time.monotonic() + 20
    while Path(f"/proc/{children[0]}").exists() and "Z" not in Path(f"/proc/{children[0]}/stat").read_text().split():
        assert time.monotonic() < until, "the receiver is left behind"
        time.sleep(0.05)
    assert not list(folder.glob("*/migrate.sock"))


@pytest.mark.parametrize(
    "answer", ["resume", *(pytest.param(each, marks=pytest.mark.slow) for each in ("give up", "time"))]
)
def test_nobody_knows_whether_it_runs_there(folder: Path, answer: str) -> None:
    """GO arrived, and the answer was lost: the source is held until somebody has looked."""
    from handovertools import Link

    class Swallowing(Link):
        """Loses what comes back after a frame of GO went."""

        def seen(self, part: bytes) -> None:
            if b"hDBM\x0a\x00" in part:
                self.swallow("fin")

    receiver = start("receive", "--unix", folder / "r", "--json")
    receiver.stderr.readline()
    link = Swallowing(folder / "r", folder)
    hold = ["--hold", "0.5"] if answer == "time" else ["--hold", "60"]
    source = start("migrate", *SMALL, "--to", link.address, "--json", *hold)
    assert "whether the guest runs at the destination is unknown" in source.stderr.readline()
    way_on = source.stderr.readline()
    assert f"'kill -USR1 {source.pid}' resumes it here (two that run ruin their disks)" in way_on
    out, err = receiver.communicate(timeout=20)
    assert receiver.returncode == 0
    assert json.loads(out)["source-told"] in {True, False}
    if answer == "resume":
        source.send_signal(signal.SIGUSR1)
    elif answer == "give up":
        source.send_signal(signal.SIGINT)
    out, err = source.communicate(timeout=20)
    link.close()
    assert source.returncode == (130 if answer == "give up" else 1)
    assert ("the guest runs here again" in err) is (answer == "resume")
    assert json.loads(out)["handover-unknown"] is True
    assert "trying again" not in err


def test_a_guest_that_dirties_too_much(run) -> None:
    options = ["--memory", "4M", "--workload", "uniform", "--bandwidth", "20M", "--max-downtime", "1"]
    result = run("migrate", *options, "--max-iterations", "2", "--json")
    said = json.loads(result.out)
    assert (result.status, said["status"], said["converged"]) == (1, "failed", False)
    assert "no pass after pass" in result.err
    assert "MiB/s (in " in result.err
    assert "destination-sha256" not in said
    result = run("migrate", *options, "--max-iterations", "2", "--on-limit", "pause")
    assert result.status == 0
    assert "the guest was paused though the rest didn't fit into that" in result.out
    assert "warning: the guest stood still for " in result.err


def test_a_little_bandwidth(run) -> None:
    """A frame takes longer than a peer waits for one, unless it is told that the other is alive."""
    result = run("migrate", "--memory", "64K", "--filled", "100", "--workload", "idle", "--bandwidth", "20K", "--json")
    assert (result.status, result.err) == (0, "")


@pytest.mark.parametrize("width", [pytest.param(80, marks=pytest.mark.slow), 40])
def test_widths(run, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    result = run("migrate", *SMALL)
    assert result.status == 0
    assert max(map(len, result.out.splitlines())) <= width
    digest = "".join(result.out.partition("sha256")[2].split())
    assert len(digest) == 64


def test_a_line_now_and_then(run, monkeypatch: pytest.MonkeyPatch) -> None:
    from hwdbm.cli import migrate

    monkeypatch.setattr(migrate, "_NOW_AND_THEN", 0.05)
    result = run("migrate", *SMALL, "--bandwidth", "30M")
    assert "hwdbm: active for " in result.err
    assert " MiB dirty, " in result.err


def test_digests_that_differ(run, monkeypatch: pytest.MonkeyPatch) -> None:
    from hwdbm.machine import Machine

    real = Machine.digest
    monkeypatch.setattr(Machine, "digest", lambda machine: real(machine)[::-1])
    result = run("migrate", *SMALL, "--json")
    said = json.loads(result.out)
    assert (result.status, said["status"]) == (3, "failed")
    assert said["source-sha256"][::-1] == said["destination-sha256"]


def test_another_attempt(run, monkeypatch: pytest.MonkeyPatch) -> None:
    from hwdbm.machine import Machine

    real, calls = Machine.digest, []
    monkeypatch.setattr(
        Machine, "digest", lambda machine: real(machine)[:: -1 if not calls.append(1) and len(calls) < 2 else 1]
    )
    result = run("migrate", *SMALL, "--json", "--attempts", "2")
    assert (result.status, json.loads(result.out)["status"]) == (0, "completed")
    assert "trying again" in result.err


def test_interrupt(folder: Path) -> None:
    """SIGINT cancels, and says so; the receiver goes too, and so does its folder."""
    source = start("migrate", *SMALL, "--bandwidth", "200K", "--json", environment={"TMPDIR": str(folder)})
    while not list(folder.glob("*/migrate.sock")):
        time.sleep(0.01)
    children = Path(f"/proc/{source.pid}/task/{source.pid}/children").read_text().split()
    while list(folder.glob("*/migrate.sock")):  # nobody listens any more: it is connected
        time.sleep(0.01)
    source.send_signal(signal.SIGINT)
    out, err = source.communicate(timeout=20)
    assert (source.returncode, err) == (130, "hwdbm: the migration was cancelled\n")
    assert json.loads(out)["status"] == "cancelled"
    assert len(children) == 1
    assert not Path(f"/proc/{children[0]}").exists()
    assert not list(folder.iterdir())


def test_on_a_terminal() -> None:
    """There, stderr shows the passes, and stdout has the JSON alone."""
    import pty

    ours, theirs = pty.openpty()
    done = forked.Popen(
        [*MAIN, "migrate", *SMALL, "--bandwidth", "20M", "--json"],
        stdout=subprocess.PIPE, stderr=theirs, text=True, env=os.environ | {"TERM": "xterm", "COLUMNS": "120"},
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 1 << 16):
            shown += part
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    out, _ = done.communicate(timeout=20)
    assert json.loads(out)["status"] == "completed"
    assert b"downtime" in shown
    assert b"active" in shown


def test_rebase(run, tmp_path: Path) -> None:
    guest = PlainGuest(MemoryMap(4096, (Memslot(0, 0, 0, 64, 0),)))
    guest.memory(0)[:] = 1
    snapshot.write_full(guest, tmp_path / "base")
    for turn in range(2):
        guest.write(turn * 4096, bytes(4096))
        snapshot.write_diff(guest, tmp_path / f"diff{turn}")
    result = run("snapshot", "rebase", tmp_path / "base", tmp_path / "diff0", tmp_path / "diff1", "--json")
    assert result.status == 0
    assert list(json.loads(result.out)["copied"].values()) == [4096, 4096]
    assert (tmp_path / "base").read_bytes() == guest.memory(0).tobytes()
    before = (tmp_path / "base").read_bytes()
    result = run("snapshot", "rebase", tmp_path / "base", tmp_path / "diff0")
    assert result.status == 1
    assert "diff0: it is older than" in result.err
    assert (tmp_path / "base").read_bytes() == before
    result = run("snapshot", "rebase", tmp_path / "base", tmp_path / "diff1")
    assert " ".join(result.out.split()) == f"{tmp_path}/diff1: 4096 bytes copied to {tmp_path}/base"


def test_rebase_of_another_size(run, tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(b"1")
    (tmp_path / "diff").write_bytes(b"12")
    result = run("snapshot", "rebase", "--holes", tmp_path / "base", tmp_path / "diff")
    assert (result.status, result.err) == (1, f"hwdbm: {tmp_path}/diff: a diff of 2 bytes is not of a base of 1\n")


def test_a_recording_is_replayed(run, tmp_path: Path) -> None:
    folder = tmp_path / "recorded"
    folder.mkdir()
    for number, pages in enumerate([[1, 2, 3], [4], [511]]):
        (folder / f"{number}.bitmap").write_bytes(DirtyBitmap.from_pages(pages, 512).to_bytes())
    options = [
        "--memory",
        "2M",
        "--replay",
        folder,
        "--interval",
        "0.01",
        "--max-downtime",
        "0",
        "--max-iterations",
        "3",
        "--on-limit",  # passes of a slow machine are never without a write
        "pause",
    ]
    result = run("migrate", *options, "--json")
    assert result.status == 0
    passes = json.loads(result.out)["passes"]
    assert all(one["dirty-pages"] <= 5 for one in passes[1:])
    (folder / "9.bitmap").write_bytes(bytes(7))
    result = run("migrate", *options)
    assert result.status == 1
    assert "9.bitmap: a bitmap of 512 pages has 64 bytes, got 7" in result.err
    assert run("migrate", *options, "--workload", "idle").status == 2


def test_without_proof(run) -> None:
    result = run("migrate", "--memory", "2M", "--no-verify", "--json")
    said = json.loads(result.out)
    assert (result.status, said["status"]) == (0, "completed")
    assert not {"source-sha256", "destination-sha256", "verify-time"} & set(said)


def test_refusals_do_not_fill_a_log(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    from hwdbm.cli import receive

    clock = Clock()
    monkeypatch.setattr(receive, "time", clock)
    tell = receive._refusals()
    for number in range(1000):
        tell(f"stranger {number}")
    said = capsys.readouterr().err.splitlines()
    assert said == [f"hwdbm: refused a connection: stranger {number}" for number in range(20)]
    clock.sleep(receive._NOW_AND_THEN - 1)
    tell("too soon")
    clock.sleep(1)
    tell("the last")
    clock.sleep(receive._NOW_AND_THEN)
    tell("alone")
    assert capsys.readouterr().err.splitlines() == [
        "hwdbm: refused 982 connections, the last one: the last",
        "hwdbm: refused a connection: alone",
    ]


def test_an_interrupt_while_the_destination_is_called_is_one() -> None:
    """Of a destination that answers later what there is then is closed."""
    from hwdbm.cli import migrate

    cancel, answers, closed = threading.Event(), threading.Event(), threading.Event()

    class Late:
        def close(self) -> None:
            closed.set()

    def connect() -> Late:
        answers.wait(60)
        return Late()

    cancel.set()
    with pytest.raises(typer.Exit) as ended:
        migrate._reached(connect, cancel)  # type: ignore[arg-type]
    assert ended.value.exit_code == 130
    answers.set()
    assert closed.wait(60)


def test_a_receiver_that_does_not_come_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hwdbm.cli import migrate

    with subprocess.Popen(["sleep", "60"], stderr=subprocess.PIPE) as receiver:
        try:
            clock = Clock()
            monkeypatch.setattr(migrate, "time", clock)
            with pytest.raises(StreamError, match=rf"the receiver didn't come up in {migrate._START:g} s"):
                migrate._connect(receiver, folder / "socket", clock)  # type: ignore[arg-type]
            assert clock.passed == pytest.approx(migrate._START, abs=0.05)
            listener = socket.socket(socket.AF_UNIX)
            clock = Clock(migrate._START - 1, lambda: (listener.bind(str(folder / "socket")), listener.listen()))
            monkeypatch.setattr(migrate, "time", clock)
            migrate._connect(receiver, folder / "socket", clock).close()  # type: ignore[arg-type]
            listener.close()
            interrupted = threading.Event()
            interrupted.set()
            with pytest.raises(typer.Exit) as ended:
                migrate._connect(receiver, folder / "socket", interrupted)
            assert ended.value.exit_code == 130
        finally:
            receiver.kill()
    with subprocess.Popen("echo hwdbm: no room >&2", shell=True, stderr=subprocess.PIPE) as receiver:
        receiver.wait()
        with pytest.raises(StreamError, match=r"the receiver didn't come up: no room$"):
            migrate._connect(receiver, folder / "socket", threading.Event())
