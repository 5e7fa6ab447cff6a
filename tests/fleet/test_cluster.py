"""Many VMs on Dask: the same curves, whatever dies, on the loopback interface alone, and nothing is left behind."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fleettools import GIB, geometric, guest, missing, pair, slow

import hwdbm.fleet.cluster
from hwdbm.fleet import Fleet, tabulate
from hwdbm.fleet.curves import Curves, points, stack

distributed = pytest.importorskip("distributed")
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


def test_curves_are_in_the_order_of_the_list() -> None:
    """However their traces lie among them, and whether it is said from where on."""
    traces = [Path("b"), None, Path("a"), Path("b"), Path("c"), Path("a")]
    vms = [
        guest(f"v{at}", trace=trace, samples=None if trace else Path("s"), start=at % 2 * 1.0 if at % 3 else None)
        for at, trace in enumerate(traces)
    ]
    found = tabulate(pair(*vms), ["h0"], geometric)
    assert same(found, stack([points(geometric(each), float(GIB), each.max_downtime) for each in vms]))


def test_a_worker_that_dies_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is killed in the midst of it; and meanwhile all that listens does so on the loopback interface."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    fleet, before, threads = many(30), children(), threading.active_count()
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
    assert counts[-1] == (30, 30)
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


def test_a_scheduler_is_a_text() -> None:
    with pytest.raises(TypeError, match=r"^scheduler is of type str, not 5$"):
        tabulate(many(3), ["h0"], geometric, scheduler=5)  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [-1, 4097])
def test_there_are_only_so_many_workers(workers: int) -> None:
    with pytest.raises(ValueError, match=f"^workers is 0 to 4096, not {workers}$"):
        tabulate(many(3), ["h0"], geometric, workers=workers)


@pytest.mark.parametrize("sooner", [False, True])
@pytest.mark.slow
def test_workers_that_keep_dying(sooner: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before they are told where the scheduler is, or later."""
    child = hwdbm.fleet.cluster.process.child

    @contextlib.contextmanager
    def ended(*args, **more) -> Iterator[subprocess.Popen[str]]:
        with child(*args, **more) as worker:
            worker.wait()
            yield worker

    if sooner:
        monkeypatch.setattr(hwdbm.fleet.cluster.process, "child", ended)
    monkeypatch.setattr(
        hwdbm.fleet.cluster.process, "python", lambda *_: [sys.executable, "-P", "-c", "raise SystemExit('no')"]
    )
    with pytest.raises(OSError, match="workers died, the last with status 1: no"):
        tabulate(many(3), ["h0"], geometric, workers=1)


def test_a_scheduler_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dask has one error for whatever the system refuses it; that isn't a fault of ours."""

    def refused(**_: object) -> None:
        raise RuntimeError("Cluster failed to start: no room") from OSError("no room")

    monkeypatch.setattr(distributed, "SpecCluster", refused)
    with pytest.raises(OSError, match="no Dask scheduler can be started here: no room"):
        tabulate(many(3), ["h0"], geometric, workers=1)


def test_what_a_forecast_raises_is_raised() -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        tabulate(many(3), ["h0"], missing, workers=1)


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "nonsense://", ""])
def test_no_scheduler(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hwdbm.fleet.cluster, "_ANSWER", 0.5)
    with pytest.raises(OSError, match="no Dask scheduler answers at"):
        tabulate(many(1), ["h0"], geometric, scheduler=address)


@contextlib.contextmanager
def serving(said: bytes, *, stays: bool) -> Iterator[str]:
    """Yield the address of a server that says something to whoever calls, and stays on the line or doesn't."""
    calls = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    call, _ = server.accept()
                    calls.append(call)
                    with contextlib.suppress(OSError):
                        call.sendall(said)
                    if not stays:
                        call.close()

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"tcp://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
    for each in calls:
        each.close()


@pytest.mark.parametrize(
    ("said", "stays"),
    [
        (b"", True),
        (b"", False),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", True),
        (b"\xff" * 64, True),
        (bytes(range(256)) * 64, True),
        (bytes(64), False),
    ],
)
@pytest.mark.alike(3)
def test_what_is_no_scheduler(said: bytes, stays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be silent, hang up, or say what Dask takes for the length of a message."""
    monkeypatch.setattr(hwdbm.fleet.cluster, "_ANSWER", 2.0)
    with serving(said, stays=stays) as address, pytest.raises(OSError, match="no Dask scheduler answers at") as raised:
        tabulate(many(1), ["h0"], geometric, scheduler=address)
    assert type(raised.value) is OSError


SERVER = """
import asyncio, sys, distributed
async def main(kind, *args):
    more = {"nthreads": 1} if args else {"dashboard": False}
    async with getattr(distributed, kind)(*args, host="127.0.0.1", **more) as server:
        print(server.address, flush=True)
        await server.finished()
asyncio.run(main(*sys.argv[1:]))
"""


@contextlib.contextmanager
def dask_server(*args: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Yield a scheduler's process, or a worker's, and its address."""
    command = [sys.executable, "-P", "-c", SERVER, *args]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            assert server.stdout is not None
            yield server, server.stdout.readline().strip()
        finally:
            server.kill()


@pytest.mark.slow
def test_a_scheduler_that_goes_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hwdbm.fleet.cluster, "_ANSWER", 60.0)
    with dask_server("Scheduler") as (scheduler, address), dask_server("Worker", address) as (_, worker):
        with pytest.raises(OSError, match=r"no Dask scheduler answers at .*: a Worker does"):
            tabulate(many(1), ["h0"], geometric, scheduler=worker)
        told = []

        def tell(done: int, of: int) -> None:
            told.append((done, of))
            if 0 < done < of:
                scheduler.kill()

        with pytest.raises(OSError, match=r"the Dask scheduler went away, and [0-9]+ of 200 VMs with it"):
            tabulate(many(200), ["h0"], slow, scheduler=address, told=tell)
        assert told


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
