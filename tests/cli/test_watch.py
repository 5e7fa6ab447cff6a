"""``hwdbm watch``: a monitor that is only read, and a real QEMU that migrates."""

import contextlib
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
from clocks import Clock
from qmptools import ANSWERS, MIB, Monitor, active
from seen import as_seen

from hwdbm.cli import watch

READS = {"qmp_capabilities", "query-migrate", "query-migrate-parameters", "query-status"}


@pytest.fixture
def monitor(tmp_path: Path):
    made = []

    def make(answers, **more) -> Monitor:
        made.append(Monitor(tmp_path / "qmp", answers, **more))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_a_migration_is_watched_to_its_end(run, monitor) -> None:
    server = monitor([*ANSWERS])
    result = run("watch", "--qmp", server.path, "--interval", "0.001", "--json")
    assert (result.status, result.err) == (0, "")
    *forecasts, end = (json.loads(line) for line in result.out.splitlines())
    assert [each["pass"] for each in forecasts] == [2, 3]  # one a pass, and not one a look
    assert forecasts[1]["forecast"]["converges"]
    assert 11_600 < forecasts[1]["forecast"]["total-time"]["value"] < 12_500
    assert end == {"status": "completed", "total-time": 11_900, "downtime": 170}
    assert set(server.asked) <= READS


def test_as_text(run, monitor, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    result = run("watch", "--qmp", monitor([*ANSWERS]).path, "--interval", "0.001")
    first, second, end = result.out.splitlines()
    assert first.startswith("pass 2 after 10.8 s, 80.0 MiB left: ")
    assert " s in all, downtime " in second
    assert end == "completed: total-time 11,900 ms, downtime 170 ms"


@pytest.mark.parametrize("status", ["failed", "cancelled"])
def test_one_that_fails(run, monitor, status: str) -> None:
    end = {"status": status, "error-desc": "no route"}
    result = run("watch", "--qmp", monitor([*ANSWERS[:4], end]).path, "--interval", "0.001")
    assert result.status == 1
    assert result.err == f"hwdbm: the migration {status}: no route\n"


def test_one_that_does_not_converge_is_explained(run, monitor) -> None:
    flat = [active(10_000 + 2000 * i, i + 1, 200 * MIB) for i in range(5)]
    end = {"status": "completed", "total-time": 21_000, "downtime": 2000}
    result = run("watch", "--qmp", monitor([*flat, end]).path, "--interval", "0.001", "--max-downtime", "100")
    assert "it doesn't converge" in result.out
    assert "It would converge with" in " ".join(result.out.split())


def test_another_migration_begins(run, monitor) -> None:
    answers = [*ANSWERS[2:6], active(50, 1, 1 << 30), *ANSWERS[4:]]
    result = run("watch", "--qmp", monitor(answers).path, "--interval", "0.001", "--json")
    assert [json.loads(line).get("pass") for line in result.out.splitlines()] == [2, 2, 3, None]


@pytest.mark.parametrize(
    ("answers", "more", "said"),
    [
        ([{}], {}, "no migration began within 0 s"),
        ([None], {}, "QEMU closed its monitor"),
        (["nonsense"], {}, "b'nonsense' is no JSON object"),
        (['{"error": {"desc": "no"}}'], {}, "query-migrate: {'desc': 'no'}"),
        ([{}], {"greeting": "{}"}, "it doesn't greet as a QMP monitor does"),
        ([active(5, 1, -4096)], {}, "remaining is a number of 0 or more, not -4096"),
    ],
)
def test_what_goes_wrong(run, monitor, answers, more, said: str) -> None:
    result = run("watch", "--qmp", monitor(answers, **more).path, "--wait", "0", "--interval", "0.001")
    assert (result.status, result.out) == (1, "")
    assert said in result.err


QMP = '{"QMP": {}}'
RAM = {"total": 1 << 30, "remaining": 5, "dirty-sync-count": 2}


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"status": ["active"]}, "status is a text, not ['active']"),
        ({"status": "active", "total-time": 5, "ram": "much"}, 'ram is an object, not "much"'),
        ({"status": "active", "total-time": 5, "ram": [1]}, "ram is an object, not [1]"),
        ({"status": "active", "total-time": "5", "ram": RAM}, 'total-time is a number, not "5"'),
        ({"status": "active", "total-time": 5, "ram": RAM | {"mbps": float("nan")}}, "mbps is a number of 0 or more"),
        ({"status": "active", "total-time": 5, "ram": RAM | {"total": 10**400}}, "total is a number of 0 or more"),
        ('{"return": ' + "[" * 100_000, 'b\'{"return": ' + "[" * 44 + "... is no JSON object"),
        ('{"error": "' + "x" * 100_000 + '"}', "query-migrate: xxx"),
        ("x" * (2 << 20), "a line of it has more than 1048576 bytes"),
    ],
)
def test_a_monitor_that_lies(run, monitor, answer, said: str) -> None:
    result = run("watch", "--qmp", monitor([answer]).path, "--wait", "0", "--interval", "0.001", "--json")
    assert (result.status, result.out) == (1, "")
    assert said in result.err
    assert "/qmp: " in result.err
    assert result.err.count("\n") == 1
    assert len(result.err) < 1000
    assert "Traceback" not in result.err
    assert "an error in hwdbm" not in result.err


@pytest.mark.parametrize("time_", ["long", [1], None, True, float("nan"), -1, 10**400])
def test_an_end_whose_times_are_none(run, monitor, time_: object) -> None:
    end = {"status": "completed", "total-time": time_, "downtime": 3}
    result = run("watch", "--qmp", monitor([end]).path, "--json")
    assert (result.status, result.err) == (0, "")
    assert json.loads(result.out) == {"status": "completed", "downtime": 3}


@pytest.mark.parametrize("limit", ["long", True, float("nan"), -1, 10**400])
def test_a_limit_that_is_none(run, monitor, limit: object) -> None:
    result = run("watch", "--qmp", monitor([{}], limit=limit).path, "--wait", "0")
    assert (result.status, result.out) == (1, "")
    assert "its downtime-limit is a number of 0 or more, not" in result.err


@pytest.mark.parametrize("greeting", ["", QMP])
def test_an_interrupt_ends_the_wait_for_a_silent_monitor(tmp_path: Path, greeting: str) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "qmp"))
        server.listen()
        command = [sys.executable, "-P", "-m", "hwdbm", "watch", "--qmp", str(tmp_path / "qmp")]
        with forked.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            client, _ = server.accept()
            with client:
                if greeting:
                    client.sendall(greeting.encode() + b"\n")
                    client.recv(100)
                process.send_signal(signal.SIGINT)
                out, err = process.communicate(timeout=60)
                assert (process.returncode, out, err) == (130, "", "hwdbm: interrupted\n")


@pytest.mark.parametrize("said", [b"", b" "])
def test_a_monitor_that_never_ends_a_line(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: bytes) -> None:
    """Each byte that comes is no answer: the time for one isn't begun anew."""
    monkeypatch.setattr("hwdbm.cli.watch._PATIENCE", 0.3)
    over = threading.Event()

    def trickle() -> None:
        client, _ = server.accept()
        with client, contextlib.suppress(OSError):
            while not over.wait(0.05):
                client.sendall(said)

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "qmp"))
        server.listen()
        thread = threading.Thread(target=trickle, daemon=True)
        thread.start()
        result = run("watch", "--qmp", tmp_path / "qmp")
        over.set()
        thread.join(5)
    assert (result.status, result.out) == (1, "")
    assert "it says nothing: has it another client?" in result.err


def test_there_is_no_monitor(run, tmp_path: Path) -> None:
    result = run("watch", "--qmp", tmp_path / "none")
    assert (result.status, result.out) == (1, "")
    assert "none: No such socket: QEMU makes it if it is started with -qmp" in result.err
    assert run("watch", "--qmp", tmp_path / "none", "--interval", "0").status == 2
    (tmp_path / "file").touch()
    assert run("watch", "--qmp", tmp_path / "file").err == (
        f"hwdbm: {tmp_path}/file: nobody listens at it: it is no monitor of a QEMU that runs\n"
    )


@pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="there is no qemu-system-x86_64")
def test_a_real_qemu(run, tmp_path: Path) -> None:
    """It sends its memory to nowhere, at 8 MiB/s; nothing runs in it, so the first pass is nearly all."""
    command = ["qemu-system-x86_64", "-S", "-m", "32", "-display", "none", "-nodefaults", "-accel", "tcg"]
    command += [each for name in ("watch", "own") for each in ("-qmp", f"unix:{tmp_path / name},server=on,wait=off")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as qemu:
        try:
            until = time.monotonic() + 20
            while not (tmp_path / "own").exists() or not (tmp_path / "watch").exists():
                assert qemu.poll() is None
                assert time.monotonic() < until
                time.sleep(0.02)
            with socket.socket(socket.AF_UNIX) as own, own.makefile("rw") as file:
                own.connect(str(tmp_path / "own"))
                for name, arguments in (
                    ("qmp_capabilities", {}),
                    ("migrate-set-parameters", {"max-bandwidth": 8 * MIB}),
                    ("migrate", {"uri": "exec:cat >/dev/null"}),
                ):
                    print(json.dumps({"execute": name, "arguments": arguments}), file=file, flush=True)
                    while "return" not in json.loads(file.readline()):
                        pass
                result = run("watch", "--qmp", tmp_path / "watch", "--interval", "0.05", "--json")
        finally:
            qemu.kill()
    assert (result.status, result.err) == (0, "")
    end = json.loads(result.out.splitlines()[-1])
    assert end["status"] == "completed"
    assert end["total-time"] > 0


def test_a_silent_monitor_is_waited_for_some_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Events don't end the wait, and don't prolong it."""
    ours, theirs = socket.socketpair()
    one = watch._Monitor(tmp_path / "qmp", threading.Event())
    one._socket.close()
    one._socket = ours
    clock = Clock()

    def select(*waits) -> tuple[list[object], ...]:
        clock.sleep(waits[-1])
        said = round(clock.passed / watch._TURN) % 5 == 0
        if said:
            theirs.sendall(b'{"event": "MIGRATION_PASS"}\n')
        return ([ours] if said else [], [], [])

    monkeypatch.setattr(watch, "time", clock)
    monkeypatch.setattr(watch, "select", SimpleNamespace(select=select))
    with ours, theirs:
        with pytest.raises(OSError, match=f"no answer to query-migrate within {watch._PATIENCE:g} s"):
            one.ask("query-migrate")
        assert clock.passed == pytest.approx(watch._PATIENCE, abs=2 * watch._TURN)
        assert theirs.recv(99) == b'{"execute": "query-migrate"}\r\n'


def test_what_is_said_was_looked_at(run, monitor, monkeypatch, tmp_path) -> None:
    flat = [active(10_000 + 2000 * i, i + 1, 200 * MIB) for i in range(4)]
    monkeypatch.setenv("COLUMNS", "70")
    said = []
    for at, answers in enumerate(
        ([*ANSWERS], [*flat, {"status": "completed", "total-time": 21_000, "downtime": 2000}])
    ):
        for how in ([], ["--json"]):
            folder = tmp_path / f"{at}{len(how)}"
            folder.mkdir()
            server = Monitor(folder / "qmp", [*answers])
            said.append(run("watch", "--qmp", server.path, "--interval", "0.001", *how).out)
            server.close()
    as_seen("texts/watched.txt", re.sub(r'(?<="forecast": ){.*(?=})', "...", "\n".join(said)))


@pytest.mark.parametrize(
    ("said", "limit"), [({}, 0.3), ({"downtime-limit": 0}, 0.0), ({"downtime-limit": 1}, 0.001),
                        ({"downtime-limit": 999_999_999_999_999}, 999_999_999_999.999),
                        ({"downtime-limit": 1e15}, None)]
)  # fmt: skip
def test_the_limit_that_a_monitor_says(said, limit, tmp_path, monkeypatch) -> None:
    """An old QEMU doesn't name it, and has 300 ms."""
    one = watch._Monitor(tmp_path, threading.Event())
    one._socket.close()
    monkeypatch.setattr(one, "ask", lambda _: said)
    if limit is None:
        with pytest.raises(OSError, match="its downtime-limit is a number of 0 or more, not 1000000000000000"):
            one.limit()
    else:
        assert one.limit() == limit


def test_two_samples_of_a_pass_are_kept_and_of_the_last_passes(monkeypatch) -> None:
    """The first look at a pass and the last one; and there is a forecast when a pass begins, from the second on."""
    seen = watch._Watched(0.3, {}, as_json=True)
    foreseen = []
    monkeypatch.setattr(seen, "_foresee", foreseen.append)
    for look in range(4 * 600):
        seen.see(active(1000 + look, 1 + look // 4, 1 << 20))
        if look == 21:
            assert [one.iteration for one in seen.samples[-4:]] == [5, 5, 6, 6]
            assert [one.time for one in seen.samples[-4:]] == pytest.approx([1.016, 1.019, 1.020, 1.021])
    assert [one.iteration for one in seen.samples] == [one for one in range(601 - watch._PASSES, 601) for _ in "12"]
    assert [one.iteration for one in foreseen] == list(range(2, 601))
    seen.see(active(10, 2, 1 << 20))  # another one
    assert len(seen.samples) == 1
    assert foreseen[-1].time == pytest.approx(0.01)
