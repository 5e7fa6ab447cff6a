"""A process that works for `hwdbm.fleet.cluster`: what it needs comes through its stdin, keys too."""

import asyncio
import json
import logging
import sys
from typing import Any

_PATIENCE = 30.0  # seconds without a scheduler, after which it ends


async def _work(address: str, folder: str, security: dict[str, str]) -> None:
    import dask  # noqa: PLC0415  # an extra
    from distributed import Security, Worker  # noqa: PLC0415

    dask.config.set({"distributed.worker.http.routes": [], "distributed.admin.system-monitor.disk": False})
    made: Any = Worker(
        address,
        nthreads=1,
        host="127.0.0.1",
        dashboard=False,
        dashboard_address="127.0.0.1:0",
        local_directory=folder,
        memory_limit=0,
        death_timeout=_PATIENCE,
        security=Security(require_encryption=True, **security),
    )
    async with made as worker:
        await worker.finished()


if __name__ == "__main__":
    logging.getLogger("distributed").setLevel(logging.ERROR)
    given = json.loads(sys.stdin.readline())
    asyncio.run(_work(given["address"], given["folder"], given["security"]))
