"""`hwdbm fleet`: what is printed, drawn and refused; and nothing of it is left when it is interrupted."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hwdbm.cli.example import find_trace

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "fleet" / "plan.json"
COMMAND = [sys.executable, "-P", "-W", "error", "-m", "hwdbm"]


def test_a_host(run, tmp_path: Path) -> None:
    for suffix in ("png", "svg"):
        plot = tmp_path / f"drain.{suffix}"
        done = run("fleet", EXAMPLE, "--drain", "h0", "--plot", plot)
        assert (done.status, done.err) == (3, "")
        assert plot.stat().st_size > 5000
    assert "gpu-1 stays on h0: it is pinned: a GPU is passed through to it" in done.out
    assert "cache-1 stays on h0: it doesn't converge even at 1,200.0 MiB/s" in done.out
    assert "one by one" in done.out


def test_one_plan_is_the_best(run, tmp_path: Path) -> None:
    """Also where that is one of the naive ones, which stands in the table once more."""
    plan = json.loads(EXAMPLE.read_text())
    plan["vms"] = []
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    for path, host in ((tmp_path / "plan.json", "h0"), (EXAMPLE, "h0"), (EXAMPLE, "h1")):
        assert run("fleet", path, "--drain", host).out.count("\nbest: ") == 1


def test_json_says_what_the_text_says(run) -> None:
    found = json.loads(run("fleet", EXAMPLE, "--drain", "h0", "--seed", "5", "--json").out)
    assert {move["vm"] for move in found["moves"]} == {"web-1", "web-2", "mail-1", "database-1", "build-1"}
    assert {each["vm"] for each in found["left"]} == {"gpu-1", "cache-1"}
    for move in found["moves"]:
        assert 0 <= move["start"] < move["end"] <= found["chosen"]["makespan"]
        assert move["downtime"] <= move["limit"]
        assert move["max-downtime"] < move["limit"]
    assert found["chosen"]["makespan"] <= min(each["makespan"] for each in found["naive"])
    assert found["bound"] <= found["chosen"]["makespan"]


def test_all_arrive(run) -> None:
    assert run("fleet", EXAMPLE, "--drain", "h3").status == 0
    assert "h1" not in {m["to"] for m in json.loads(run("fleet", EXAMPLE, "--drain-rack", "r0", "--json").out)["moves"]}
    both = json.loads(run("fleet", EXAMPLE, "--drain-rack", "r1", "--drain", "h3", "--json").out)
    assert both["hosts"] == ["h3", "h2"]


@pytest.mark.parametrize(
    ("args", "status", "says"),
    [
        ([EXAMPLE], 2, "give --drain or --drain-rack"),
        ([EXAMPLE, "--drain-rack", "r7"], 2, "no host stands in rack 'r7'; there is r0, r1"),
        ([EXAMPLE, "--drain", "h9"], 1, "there is no host 'h9'; there is h0, h1, h2, h3"),
        ([EXAMPLE, "--drain", "h0", "--plot", "a.pdf"], 2, "--plot a.pdf: .png or .svg"),
        ([EXAMPLE, "--drain", "h0", "--workers", "-1"], 2, "'-1' is no whole number of 0 to 4096"),
        (
            [EXAMPLE, "--drain", "h0", "--workers", "1", "--scheduler", "a:1"],
            2,
            "--workers is for a cluster of our own",
        ),
        ([EXAMPLE.parent / "web.jsonl", "--drain", "h0"], 1, "it is no JSON"),
        (["nowhere.json", "--drain", "h0"], 1, "nowhere.json: No such file"),
    ],
)
def test_what_is_wrong(run, args: list, status: int, says: str) -> None:
    done = run("fleet", *args)
    assert (done.status, done.out) == (status, "")
    assert says in " ".join(done.err.replace("│", " ").split())


def test_a_trace_that_is_not_there_is_named(run, tmp_path: Path) -> None:
    plan = json.loads(EXAMPLE.read_text())
    plan["vms"] = [{"name": "v", "host": "h0", "memory": "1G", "max-downtime": 300, "trace": "nowhere.zarr"}]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    done = run("fleet", tmp_path / "plan.json", "--drain", "h0")
    assert (done.status, done.out) == (1, "")
    assert "nowhere.zarr" in done.err


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    """Neither the workers of a cluster nor their folders."""
    pytest.importorskip("distributed")
    plan = json.loads(EXAMPLE.read_text())
    for vm in plan["vms"]:
        vm["samples"] = str(EXAMPLE.parent / vm["samples"])
    plan["vms"] = [{**plan["vms"][0], "name": f"v{at}", "memory": "16M"} for at in range(4000)]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    command = [*COMMAND, "fleet", str(tmp_path / "plan.json"), "--drain", "h0", "--workers", "2"]
    with subprocess.Popen(
        command, env=os.environ | {"TMPDIR": str(scratch)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        until = time.monotonic() + 30
        workers: list[int] = []
        while len(workers) < 2 and time.monotonic() < until:
            tasks = Path(f"/proc/{process.pid}/task").glob("*/children")
            workers = [int(pid) for task in tasks for pid in task.read_text().split()]
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    *before, last = err.splitlines()  # a slow machine is told now and then what goes on
    assert (process.returncode, out, last) == (130, "", "hwdbm: interrupted")
    assert all(line.startswith("hwdbm: forecasting: ") for line in before)
    assert len(workers) >= 2  # a child that starts them may be among these
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]
    assert list(scratch.iterdir()) == []


def test_what_a_vm_names_is_checked(run, tmp_path: Path) -> None:
    """Samples are read from regular files alone, the file is named, and a rate leaves the trace times."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "bad").write_text("{}\n{\n")
    vm = {"name": "v", "host": "a", "memory": "128M", "max-downtime": 300}
    trace = {"trace": str(find_trace("example:machine-hot"))}
    for more, says in (
        ({"samples": "fifo"}, "fifo: is no regular file"),
        ({"samples": "/dev/zero"}, "/dev/zero: is no regular file"),
        ({"samples": "bad"}, "bad: line 2: the JSON object is cut short"),
        (trace | {"rate": 1e15}, "the VM 'v' writes at a rate of 1e+15, at which its trace"),
    ):
        plan = {
            "format": "hwdbm-fleet", "version": 1, "links": [{"name": "lan", "bandwidth": "1G"}],
            "hosts": [{"name": name, "memory": "1G", "link": "lan"} for name in "ab"], "vms": [vm | more],
        }  # fmt: skip
        (tmp_path / "plan.json").write_text(json.dumps(plan))
        result = run("fleet", tmp_path / "plan.json", "--drain", "a")
        assert (result.status, result.out) == (1, "")
        assert says in result.err
