"""Migrating a real guest by command."""

import json
import os
import platform
import subprocess
import sys
from functools import partial
from pathlib import Path

import forked
import pytest

from hwdbm.kvm import KvmVm

MAIN = [sys.executable, "-P", "-W", "error", "-c", "from hwdbm.cli import main; main()"]
SMALL = ["--source", "kvm", "--memory", "16M", "--max-downtime", "5000"]

real = pytest.mark.skipif(
    not (os.access("/dev/kvm", os.R_OK | os.W_OK) and platform.machine() == "x86_64"),
    reason="there is no /dev/kvm of x86_64 that this user may open",
)


@real
@pytest.mark.parametrize(
    "options",
    [[], ["--kvm-log", "clear"], ["--kvm-log", "initially-set", "--workload", "random"], ["--kvm-log", "ring"]],
)
def test_migrate(run, options) -> None:
    result = run("migrate", *SMALL, "--json", *options)
    assert (result.status, result.err) == (0, "")
    said = json.loads(result.out)
    assert said["status"] == "completed"
    assert said["guest-resumed"] is True
    assert said["source-sha256"] == said["destination-sha256"]
    assert said["ram"]["total"] == (16 << 20) + 8192


@real
def test_as_text(run, tmp_path: Path) -> None:
    result = run("migrate", *SMALL, "--report", tmp_path / "report.png")
    assert (result.status, result.err) == (0, "")
    assert "the guest runs at the destination, and its memory is right there" in result.out
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


@real
def test_memory_that_is_ready(tmp_path: Path) -> None:
    """A receiver that has its memory before it listens takes a guest with as much, and no other."""
    for size, status in (("16M", 0), ("32M", 1)):
        command = [*MAIN, "receive", "--vm", "kvm", "--memory", size, "--listen", "127.0.0.1:0", "--insecure", "--json"]
        receiver = forked.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        where = receiver.stderr.readline().split()[-1]
        source = forked.run([*MAIN, "migrate", *SMALL, "--to", where, "--insecure", "--json"])
        out, err = receiver.communicate(timeout=30)
        assert (source.returncode, receiver.returncode) == (status, status), source.stderr + err
        if status:
            assert "doesn't fit into slot 0" in source.stderr
        else:
            assert json.loads(out)["guest-resumed"] is True
            assert json.loads(source.stdout)["guest-resumed"] is True


@real
def test_an_image(run, tmp_path: Path) -> None:
    image = tmp_path / "ram"
    image.write_bytes(b"guest" * 10_000)
    result = run("migrate", *SMALL, "--memory-image", image, "--workload", "idle", "--json")
    assert result.status == 0
    assert json.loads(result.out)["guest-resumed"] is True
    image.write_bytes(b"")
    os.truncate(image, 17 << 20)
    result = run("migrate", *SMALL, "--memory-image", image)
    assert (result.status, result.out) == (1, "")
    assert result.err == f"hwdbm: {image}: {17 << 20} bytes don't fit into {16 << 20}\n"


def test_no_kvm(run, monkeypatch) -> None:
    monkeypatch.setattr("hwdbm.cli.guest.KvmVm", partial(KvmVm, path="/dev/no-kvm"))
    result = run("migrate", *SMALL)
    assert (result.status, result.out) == (1, "")
    assert result.err.startswith("hwdbm: /dev/no-kvm: ")


@real
def test_what_it_cannot_do(run) -> None:
    for options, said in (
        (["--workload", "hot"], "hot"),
        (["--memory", "100"], "whole pages"),
        (["--memory", "1M", "--rate", "-1"], "rate"),
    ):
        result = run("migrate", *SMALL, *options)
        assert result.status in (1, 2)
        assert said in result.err


@real
def test_a_guest_that_does_not_run_there(tmp_path: Path) -> None:
    """Where only its memory can arrive, the command says so, and doesn't call it well."""
    command = [*MAIN, "receive", "--file", str(tmp_path / "ram"), "--listen", "127.0.0.1:0", "--insecure"]
    receiver = forked.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    where = receiver.stderr.readline().split()[-1]
    source = forked.run([*MAIN, "migrate", *SMALL, "--to", where, "--insecure", "--json"])
    receiver.communicate(timeout=30)
    assert (source.returncode, receiver.returncode) == (1, 0)
    assert source.stderr == "hwdbm: the guest at the destination: it is memory, and doesn't run\n"
    said = json.loads(source.stdout)
    assert (said["status"], said["guest-resumed"]) == ("completed", False)
