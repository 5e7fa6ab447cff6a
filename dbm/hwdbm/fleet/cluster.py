"""Curves of many VMs: in this process while they are few, else on Dask, whose workers read the traces themselves.

A cluster of our own listens on the loopback interface alone, speaks TLS with a key that nobody else has, and has no
dashboard: to reach a scheduler is to run code as its user.
"""

import asyncio
import json
import logging
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import ExitStack, contextmanager, suppress
from math import inf
from typing import Any

from hwdbm import __version__, check, files, process
from hwdbm.errors import brief
from hwdbm.fleet.curves import Curves, Found, Model, points, stack
from hwdbm.fleet.plan import Fleet, FleetVm
from hwdbm.fleet.planner import drained_guests, highest

FEW = 256
"""VMs whose curves are made in this process, if nothing else is asked for."""

_TOGETHER = 16  # VMs of a task at most
_LOOK = 0.5  # seconds between two looks at the workers
_ANSWER = 10.0  # seconds that a scheduler has to answer
_DEATHS = 3  # of workers, for each that there are to be, after which there is no point in more

Told = Callable[[int, int], object]


def tabulate(
    fleet: Fleet,
    hosts: Sequence[str],
    model: Model,
    *,
    workers: int | None = None,
    scheduler: str | None = None,
    told: Told | None = None,
) -> Curves:
    """Return what the migration of each VM of some hosts takes at each bandwidth.

    Parameters
    ----------
    fleet : Fleet
        The fleet.
    hosts : sequence of str
        The names of the hosts to be drained.
    model : callable
        Called with a `FleetVm`, returns its forecast: called with bytes a second, that returns a `Taken`.
    workers : int, optional
        Processes of a Dask cluster of our own; 0 to do all in this process. By default that is done for up to 256 VMs,
        and for more there is a worker for each CPU.
    scheduler : str, optional
        The address of another Dask cluster's scheduler, ``tcp://host:8786``. Its workers need hwdbm, and the traces
        under the same paths.
    told : callable, optional
        Called now and then with how many VMs are done, and of how many.

    Returns
    -------
    Curves
        A row for each VM of the hosts that isn't pinned, as listed.

    Raises
    ------
    PlanError
        If there is no such host.
    ModuleNotFoundError
        If Dask is needed and isn't installed: the extra `fleet`.
    OSError
        If the scheduler doesn't answer, or workers keep dying.
    """
    check.instance(fleet, Fleet, "fleet")
    hosts = check.instances(hosts, str, "hosts")
    if workers is not None:
        workers = check.integer(workers, "workers", 0, 4096)
    if scheduler is not None:
        check.instance(scheduler, str, "scheduler")
    jobs = list(zip(drained_guests(fleet, hosts), highest(fleet, hosts), strict=True))
    told = told or (lambda _done, _of: None)
    # VMs of a trace stand together: who forecasts one has what it has read of its trace for the next.
    order = sorted(range(len(jobs)), key=lambda at: str(jobs[at][0].trace))
    jobs = [jobs[at] for at in order]
    if scheduler is None and (workers == 0 or (workers is None and len(jobs) <= FEW)):
        found = []
        for guest, top in jobs:
            found.append(_curve(model, guest, top))
            told(len(found), len(jobs))
    else:
        found = _on_dask(model, jobs, workers or os.cpu_count() or 1, scheduler, told)
    places = sorted(range(len(jobs)), key=order.__getitem__)
    return stack([found[at] for at in places])


def _curve(model: Model, guest: FleetVm, top: float) -> Found:
    return points(model(guest), top, guest.max_downtime) if top else ([], 0.0, inf)


def _some(model: Model, jobs: Sequence[tuple[FleetVm, float]]) -> list[Found]:
    """Return the curves of some VMs: a task of a worker."""
    return [_curve(model, guest, top) for guest, top in jobs]


def _on_dask(
    model: Model, jobs: list[tuple[FleetVm, float]], workers: int, scheduler: str | None, told: Told
) -> list[Found]:
    from distributed import Client, wait  # noqa: PLC0415  # an extra, and half a second

    size = max(1, min(_TOGETHER, len(jobs) // (4 * workers)))
    parts = [range(at, min(at + size, len(jobs))) for at in range(0, len(jobs), size)]
    found: list[Found | None] = [None] * len(jobs)
    with ExitStack() as stack_:
        stack_.enter_context(_quiet())
        look: Callable[[], object] = lambda: None  # noqa: E731
        if scheduler is None:
            cluster, look = stack_.enter_context(_cluster(workers))
            client = stack_.enter_context(Client(cluster, set_as_default=False))
        else:
            client = stack_.enter_context(_client(scheduler))
        stack_.enter_context(client.as_current())
        futures = client.map(_some, [model] * len(parts), [[jobs[at] for at in part] for part in parts], pure=False)
        waiting, done = dict(zip(futures, parts, strict=True)), 0
        while waiting:
            try:
                ready = wait(list(waiting), timeout=_LOOK, return_when="FIRST_COMPLETED").done
                results = [(waiting.pop(future), _result(future)) for future in ready]
            except TimeoutError:
                results = []
            except CancelledError:  # Dask's word for what it lost with its scheduler; it names each task
                raise OSError(
                    f"the Dask scheduler went away, and {len(jobs) - done} of {len(jobs)} VMs with it"
                ) from None
            for part, curves in results:
                for at, curve in zip(part, curves, strict=True):
                    found[at] = curve
                done += len(part)
            told(done, len(jobs))
            look()
    return [curve for curve in found if curve is not None]


def _result(future: Any) -> list[Found]:
    from distributed import KilledWorker  # noqa: PLC0415

    try:
        found: list[Found] = future.result()
    except KilledWorker as error:
        raise OSError(f"workers died of it, or can't import hwdbm {__version__}: {error}") from None
    return found


@contextmanager
def _client(address: str) -> Iterator[Any]:
    from distributed import Client  # noqa: PLC0415

    try:
        # Dask's client waits for ever for what takes its call and is silent, and takes room for what junk seems to say.
        asyncio.run(asyncio.wait_for(_check_kind(address), _ANSWER))
        client = Client(address, timeout=_ANSWER, set_as_default=False)
    except Exception as error:  # noqa: BLE001  # junk in Dask's place has it raise anything
        said = f"within {_ANSWER:g} s" if isinstance(error, TimeoutError) and not str(error) else f"{error}"
        raise OSError(f"no Dask scheduler answers at {address!r}: {said}") from None
    with client:
        if not client.scheduler_info()["workers"]:
            raise OSError(f"the Dask scheduler at {address!r} has no workers")
        yield client


async def _check_kind(address: str) -> None:
    """Raise an error unless what answers at an address says that it is a scheduler."""
    from distributed import Security  # noqa: PLC0415
    from distributed.comm.core import connect  # noqa: PLC0415
    from distributed.core import send_recv  # noqa: PLC0415

    comm = await connect(address, timeout=_ANSWER, **Security().get_connection_args("client"))
    try:
        kind = str((await send_recv(comm, op="identity"))["type"])
    finally:
        comm.abort()
    if kind != "Scheduler":
        raise ValueError(f"a {brief(kind)} does")


@contextmanager
def _cluster(workers: int) -> Iterator[tuple[Any, Callable[[], None]]]:
    """Yield a scheduler of our own, and what sees to its workers: one that died has a successor."""
    import dask  # noqa: PLC0415
    from distributed import Scheduler, Security, SpecCluster  # noqa: PLC0415

    security = Security.temporary()
    options = {
        "host": "127.0.0.1",
        "dashboard": False,
        "dashboard_address": "127.0.0.1:0",
        "security": security,
    }
    with ExitStack() as stack_:
        folder = stack_.enter_context(files.scratch())
        settings = {"distributed.scheduler.http.routes": [], "temporary-directory": str(folder)}
        stack_.enter_context(dask.config.set(settings))
        try:
            cluster = stack_.enter_context(
                SpecCluster(
                    workers={}, scheduler={"cls": Scheduler, "options": options}, security=security, silence_logs=False
                )
            )
        except RuntimeError as error:  # Dask's word for whatever the system refuses it
            raise OSError(f"no Dask scheduler can be started here: {error.__cause__ or error}") from error
        keys = {
            "tls_ca_file": security.tls_ca_file,
            "tls_worker_key": security.tls_worker_key,
            "tls_worker_cert": security.tls_worker_cert,
        }
        given = json.dumps({"address": cluster.scheduler_address, "folder": str(folder), "security": keys})
        live: list[subprocess.Popen[str]] = []
        deaths = 0

        def start() -> None:
            with (folder / "said").open("w") as said:
                child = process.child(
                    process.python("-m", "hwdbm.fleet.worker"), grace=0, text=True, stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL, stderr=said,
                )  # fmt: skip
                live.append(stack_.enter_context(child))
            pipe = live[-1].stdin
            if pipe is not None:
                with suppress(BrokenPipeError), pipe:  # of one that has died by now, as will be seen
                    pipe.write(given + "\n")

        def look() -> None:
            nonlocal deaths
            for worker in [each for each in live if each.poll() is not None]:
                live.remove(worker)
                deaths += 1
                if deaths > _DEATHS * workers:
                    said = (folder / "said").read_text(errors="replace").strip().rpartition("\n")[2]
                    raise OSError(f"{deaths} workers died, the last with status {worker.returncode}: {said}")
                start()

        for _ in range(workers):
            start()
        yield cluster, look


@contextmanager
def _quiet() -> Iterator[None]:
    """Have Dask say nothing but what is fatal: that a worker is gone is no news here."""
    logger = logging.getLogger("distributed")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
