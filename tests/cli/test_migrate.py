"""Migrating, receiving, and snapshots, by command."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hwdbm import DirtyBitmap
from hwdbm.cli.guest import Endpoint, endpoint
from hwdbm.memslot import Memslot
from hwdbm.migration import snapshot
from hwdbm.vm import MemoryMap, PlainGuest

pytest.importorskip("hwdbm.machine")
MAIN = [sys.executable, "-P", "-W", "error", "-c", "from hwdbm.cli import main; main()"]
TLS = Path(__file__).parents[1] / "data" / "tls"
SMALL = ["--memory", "16M", "--rate", "5000"]


def start(*args: object) -> subprocess.Popen[str]:
    return subprocess.Popen([*MAIN, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("options", [[], ["--thp", "--mode", "write-protect", "--workload", "uniform"]])
def test_migrate(run, options) -> None:
    result = run("migrate", *SMALL, "--json", *options)
    assert (result.status, result.err) == (0, "")
    said = json.loads(result.out)
    assert said["status"] == "completed"
    assert said["source-sha256"] == said["destination-sha256"]
    assert len(said["source-sha256"]) == 64
    assert said["ram"]["total"] == 16 << 20
    assert said["downtime"] <= 1000
    assert said["passes"][0]["duplicate"] > 0


def test_migrate_as_text_and_with_pictures(run, tmp_path: Path) -> None:
    result = run("migrate", *SMALL, "--report", tmp_path / "report.png")
    assert result.status == 0
    assert "completed in" in result.out
    assert "\x1b" not in result.out + result.err
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    result = run("migrate", *SMALL, "--report", tmp_path / "report.html", "--bandwidth", "100M", "--auto-converge")
    page = (tmp_path / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert page.count("<tr>") == result.out.count("MiB/s") + 1


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
        (["--report", "x.pdf"], ".png or .html"),
        (["--insecure"], "go with --to"),
        (["--to", "localhost"], "is not HOST:PORT"),
        (["--memory", "x"], "is not a size"),
        (["--max-iterations", "0"], "max-iterations"),
    ],
)
def test_wrong_usage(run, args, match) -> None:
    result = run("migrate", *args)
    assert result.status == 2
    assert match in " ".join(result.err.split())


def test_an_unknown_workload(run) -> None:
    result = run("migrate", "--memory", "2M", "--workload", "knitting")
    assert result.status == 1
    assert "no workload 'knitting'" in result.err


def test_without_certificates(run) -> None:
    result = run("migrate", *SMALL, "--to", "127.0.0.1:1")
    assert (result.status, result.out) == (1, "")
    assert "needs certificates (--tls-dir), or --insecure on a loopback address" in result.err


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
    assert there["passes"] == said["ram"]["dirty-sync-count"]
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


def test_receive_wants_one_place(run) -> None:
    assert run("receive").status == 2
    assert run("receive", "--unix", "x", "--listen", "localhost:1").status == 2


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


def test_interrupt() -> None:
    """SIGINT cancels, and says so; the receiver goes too, and so does its folder."""
    source = start("migrate", *SMALL, "--bandwidth", "200K", "--json")
    children: list[str] = []
    while not children:
        time.sleep(0.1)
        children = Path(f"/proc/{source.pid}/task/{source.pid}/children").read_text().split()
    time.sleep(0.5)
    source.send_signal(signal.SIGINT)
    out, err = source.communicate(timeout=20)
    assert (source.returncode, err) == (130, "hwdbm: the migration was cancelled\n")
    assert json.loads(out)["status"] == "cancelled"
    assert len(children) == 1
    assert not Path(f"/proc/{children[0]}").exists()


def test_on_a_terminal() -> None:
    """There, stderr shows the passes, and stdout has the JSON alone."""
    import pty

    ours, theirs = pty.openpty()
    done = subprocess.Popen(
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
    assert b"expected downtime" in shown
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
    result = run("snapshot", "rebase", tmp_path / "base", tmp_path / "diff0")
    assert result.out == f"{tmp_path}/diff0: 4096 bytes copied to {tmp_path}/base\n"


def test_rebase_of_another_size(run, tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(b"1")
    (tmp_path / "diff").write_bytes(b"12")
    result = run("snapshot", "rebase", tmp_path / "base", tmp_path / "diff")
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
    ]
    result = run("migrate", *options, "--json")
    assert (result.status, result.err) == (0, "")
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
