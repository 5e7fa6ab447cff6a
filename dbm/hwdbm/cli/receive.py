"""``hwdbm receive``: the destination of a migration."""

import json
import os
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Annotated, Any

import typer

from hwdbm import kernels
from hwdbm.cli import options, parse
from hwdbm.cli.guest import Endpoint, Insecure, Mode, Thp, TlsFolder, endpoint, layout_of, machine_for
from hwdbm.cli.kvm import KvmLog, KvmLogOption, Vm, kvm_for, kvm_layout
from hwdbm.cli.live import megabytes
from hwdbm.cli.streams import note, result
from hwdbm.migration import Channel, Received, StreamError, transport
from hwdbm.migration import receive as receive_vm
from hwdbm.vm import MemoryMap, PlainGuest, Source
from hwdbm.vm.memory import populate

__all__ = ["EPILOG", "receive"]

EPILOG = """Examples:

\b
  For a source on another machine, with certificates on both sides:
    hwdbm receive --listen 0.0.0.0:4444 --tls-dir certificates

\b
  Into a file, which is the memory then:
    hwdbm receive --listen 127.0.0.1:4444 --insecure --file guest.ram
"""


def receive(
    listen: Annotated[
        Endpoint | None,
        typer.Option("--listen", parser=options.parser(endpoint), metavar="HOST:PORT", help="Listen on TCP."),
    ] = None,
    unix: Annotated[
        Path | None, typer.Option("--unix", metavar="PATH", help="Listen on a Unix socket, which is only its owner's.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Have the memory in a file, without a machine that would run in it."),
    ] = None,
    vm: Annotated[Vm, typer.Option("--vm", help="A modelled machine, or a real VM on /dev/kvm.")] = Vm.MACHINE,
    kvm_log: KvmLogOption = KvmLog.BITMAP,
    thp: Thp = False,
    mode: Annotated[Mode, typer.Option(help="How the log learns of writes, from here on.")] = Mode.HW_DBM,
    memory: Annotated[
        int | None,
        typer.Option(
            parser=options.parser(parse.size),
            metavar="SIZE",
            help="Have so much memory ready before listening, as the source must have then. By default it is "
            "allocated when the source has said how much it has.",
        ),
    ] = None,
    memory_limit: Annotated[
        int | None,
        typer.Option(
            parser=options.parser(parse.size),
            metavar="SIZE",
            help="Refuse a guest with more memory. By default: than this machine has.",
        ),
    ] = None,
    run: Annotated[float, typer.Option(min=0, metavar="SECONDS", help="Let the guest run for so long here.")] = 0,
    tls_dir: TlsFolder = None,
    insecure: Insecure = False,
    as_json: options.Json = False,
) -> None:
    """Wait for one migration, take the VM over, and let it run.

    With port 0, the port that it listens on is said on stderr.
    """
    if (listen is None) == (unix is None):
        raise typer.BadParameter("give --listen HOST:PORT or --unix PATH")

    def build(layout: MemoryMap) -> Source:
        if file is not None:
            return PlainGuest(layout, file)
        return kvm_for(layout, log=kvm_log) if vm is Vm.KVM else machine_for(layout, mode=mode, thp=thp)

    kernels.warm_up()
    limit = _physical() if memory_limit is None else memory_limit
    with ExitStack() as stack:
        if memory is not None:
            ready = stack.enter_context(closing(build(kvm_layout(memory) if vm is Vm.KVM else layout_of(memory))))
            for slot in ready.slots:
                populate(ready.memory(slot.id))
        with _accepted(listen, unix, tls_dir, insecure=insecure) as channel:
            try:
                if memory is None:
                    received = receive_vm(channel, build, most_memory=limit)
                else:
                    received = receive_vm(channel, lambda _: ready, most_memory=limit, populated=True)
            except StreamError as error:
                raise StreamError(f"{error}; there is no guest here") from error
        there = stack.enter_context(closing(received.destination))
        time.sleep(run)
        there.pause()
    result(json.dumps(_report(received), indent=2) if as_json else _text(received), done="the guest arrived")


def _accepted(listen: Endpoint | None, unix: Path | None, tls_dir: Path | None, *, insecure: bool) -> Channel:
    if unix is not None:
        with transport.listen_unix(unix) as listener:
            return listener.accept()
    assert listen is not None  # noqa: S101  # one of the two was given
    tls = None if tls_dir is None else transport.TlsDir(tls_dir)
    with transport.listen_tcp(listen.host, listen.port, tls, insecure=insecure) as listener:
        if listen.port == 0:
            note(f"listening on {listener.address}")
        return listener.accept()


def _physical() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _report(received: Received) -> dict[str, Any]:
    return {
        "status": "completed",
        "ram": {"transferred": received.transferred, "normal": received.normal, "duplicate": received.duplicate},
        "passes": received.passes,
        "destination-sha256": received.sha256,
    } | ({"guest-resumed": received.proved} if received.proved is not None else {})


def _text(received: Received) -> str:
    return (
        f"received {megabytes(received.transferred)} in {received.passes} passes: {received.normal:,} pages, "
        f"and {received.duplicate:,} of zeros\nsha256 {received.sha256}"
    )
