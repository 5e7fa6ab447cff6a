"""Many VMs on Dask: the same curves, whatever dies, on the loopback interface alone, and nothing is left behind."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from fleettools import geometric, guest, missing, pair, slow

import hwdbm.fleet.cluster
from hwdbm.fleet import Fleet, tabulate
from hwdbm.fleet.curves import Curves

pytest.importorskip("distributed")
TESTS = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have workers find the forecasts, which a test's module has."""
    monkeypatch.setenv("PYTHONPATH", str(TESTS))


def many(count: int) -> Fleet:
    return pair(*(guest(f"v{at}") for at in range(count)), bandwidth=1.25e9)


def children() -> set[int]:
    return set(map(int, Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split())) | {
        int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()
    }


def same(one: Curves, other: Curves) -> bool:
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in Curves.__slots__)


def test_few_need_no_dask() -> None:
    code = (
        "import sys; from fleettools import *; from hwdbm.fleet import drain, tabulate\n"
        "fleet = pair(*(guest(f'v{at}') for at in range(256)))\n"
        "assert tabulate(fleet, ['h0'], steady()).pause.size == 256\n"
        "print([name for name in sys.modules if name.partition('.')[0] in ('dask', 'distributed', 'zarr')])"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], check=True, capture_output=True, text=True, env=os.environ
    )
    assert done.stdout == "[]\n"


def test_a_worker_that_dies_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is killed in the midst of it; and meanwhile all that listens does so on the loopback interface."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    fleet, before, threads = many(60), children(), threading.active_count()
    killed, listening, counts = [], [], []

    def told(done: int, of: int) -> None:
        counts.append((done, of))
        workers = sorted(children() - before)
        if 0 < done < of and not killed and workers:
            os.kill(workers[0], signal.SIGKILL)
            killed.append(workers[0])
        listening.extend(sockets(os.getpid()))
        for pid in workers:
            listening.extend(sockets(pid))

    found = tabulate(fleet, ["h0"], slow, workers=2, told=told)
    assert killed
    assert counts[-1] == (60, 60)
    assert set(listening) == {"0100007F"}
    assert same(found, tabulate(fleet, ["h0"], geometric, workers=0))
    assert children() == before
    assert list(tmp_path.iterdir()) == []
    assert threading.active_count() <= threads + 2  # Dask keeps its loop's threads


def sockets(pid: int) -> set[str]:
    """Return the addresses on which a process listens, as /proc has them."""
    try:
        mine = {str(each.readlink()) for each in Path(f"/proc/{pid}/fd").iterdir()}
        tables = [Path(f"/proc/{pid}/net/{name}").read_text() for name in ("tcp", "tcp6")]
    except OSError:
        return set()
    rows = [row.split() for table in tables for row in table.splitlines()]
    return {row[1].partition(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in mine}


def test_workers_that_keep_dying(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        hwdbm.fleet.cluster.process, "python", lambda *_: [sys.executable, "-P", "-c", "raise SystemExit('no')"]
    )
    with pytest.raises(OSError, match="workers died, the last with status 1: no"):
        tabulate(many(3), ["h0"], geometric, workers=1)


def test_what_a_forecast_raises_is_raised() -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        tabulate(many(3), ["h0"], missing, workers=1)


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "nonsense://", ""])
def test_no_scheduler(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hwdbm.fleet.cluster, "_ANSWER", 0.5)
    with pytest.raises(OSError, match="no Dask scheduler answers at"):
        tabulate(many(1), ["h0"], geometric, scheduler=address)


def test_another_cluster(tmp_path: Path) -> None:
    """One that is there already, and stays."""
    import dask
    from distributed import LocalCluster

    fleet = many(5)
    with (
        dask.config.set({"temporary-directory": str(tmp_path)}),
        LocalCluster(
            n_workers=1, threads_per_worker=1, processes=False, protocol="tcp", host="127.0.0.1",
            dashboard_address=None, silence_logs=50,
        ) as cluster,
    ):  # fmt: skip
        found = tabulate(fleet, ["h0"], geometric, scheduler=cluster.scheduler_address)
        assert same(found, tabulate(fleet, ["h0"], geometric, workers=0))
        assert len(cluster.scheduler.workers) == 1
