"""``hwdbm receive``: the destination of a migration."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from hwdbm import kernels
from hwdbm.cli import guest, interrupt, options, parse
from hwdbm.cli.guest import Endpoint, Insecure, KvmLog, KvmLogOption, Mode, ModeOption, Thp, TlsFolder, Vm
from hwdbm.cli.output import busy, warn
from hwdbm.cli.streams import json_text, note, result
from hwdbm.files import NewFile
from hwdbm.migration import Channel, Received, StreamError, transport
from hwdbm.migration import receive as receive_vm
from hwdbm.migration.report import mebibytes
from hwdbm.vm import MemoryMap, PlainGuest, Source
from hwdbm.vm.memory import populate

_REFUSALS = 20  # of connections, that are said one by one
_NOW_AND_THEN = 10.0  # seconds between two lines on further ones

EPILOG = """Sizes in JSON are in bytes; normal and duplicate are numbers of pages.

Examples:

  For a source on this machine, in another terminal:

\b
    hwdbm receive --unix guest.sock
    hwdbm migrate --to unix:guest.sock --memory 64M

  Into a file, which is the memory then:

\b
    hwdbm receive --listen 127.0.0.1:4445 --insecure --file guest.ram
    hwdbm migrate --to 127.0.0.1:4445 --insecure --memory 64M

  Over TLS, with certificates on both sides (docs: howto/migrate-tls):

\b
    sh docs/examples/make_certificates.sh localhost
    hwdbm receive --listen 0.0.0.0:4446 --tls-dir certificates
    hwdbm migrate --to localhost:4446 --tls-dir certificates --memory 64M
"""


def receive(
    listen: Annotated[
        Endpoint | None,
        typer.Option(
            "--listen",
            parser=options.parser(guest.place),
            metavar="HOST:PORT|unix:PATH",
            help="Listen on this address. Port 0 takes any free port.",
        ),
    ] = None,
    unix: Annotated[
        Path | None,
        typer.Option(
            "--unix",
            parser=options.parser(guest.socket_path),
            metavar="PATH",
            help="Listen on a Unix socket, which only its owner can use.",
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            parser=options.parser(parse.path),
            metavar="FILE",
            help="Write the memory to FILE, instead of starting a VM.",
        ),
    ] = None,
    vm: Annotated[
        Vm | None,
        typer.Option(
            "--vm",
            parser=options.parser(parse.choice(Vm)),
            metavar="machine|kvm|arm",
            help="A modelled machine (the default), a real VM, or an emulated Arm machine.",
        ),
    ] = None,
    kvm_log: KvmLogOption = None,
    thp: Thp = None,
    mode: ModeOption = None,
    memory: Annotated[
        int | None,
        typer.Option(
            parser=options.parser(guest.memory_size),
            metavar="SIZE",
            help="Allocate this much memory before listening; the source must have as much then. By default memory is "
            "allocated when the source has said how much it has.",
        ),
    ] = None,
    memory_limit: Annotated[
        int | None,
        typer.Option(
            parser=options.parser(parse.size),
            metavar="SIZE",
            help="Refuse a guest with more memory than SIZE. By default, with more than this machine has.",
        ),
    ] = None,
    run: Annotated[
        float | None,
        typer.Option(
            parser=options.parser(parse.number),
            metavar="SECONDS",
            help="Let the guest run here for so long before the command ends; 0 by default.",
        ),
    ] = None,
    tls_dir: TlsFolder = None,
    insecure: Insecure = False,
    until_eof: Annotated[bool, typer.Option("--until-eof", hidden=True)] = False,
    as_json: options.Json = False,
) -> None:
    """Wait for one migration, take the VM over, and let it run.

    The address is printed on stderr. The command listens until a source has connected that is allowed to. SIGTERM and
    SIGHUP end it as Ctrl-C does.
    """
    if (listen is None) == (unix is None):
        raise typer.BadParameter("give --listen HOST:PORT or --unix PATH")
    where = listen if unix is None else Endpoint(path=unix)
    assert where is not None  # noqa: S101  # one of the two was given
    tls = guest.tls_of(where, tls_dir, insecure=insecure)
    given = {"--thp": thp is not None, "--mode": mode is not None}
    if file is not None:
        guest.refuse("with --file", given | {"--vm": vm is not None, "--run": run is not None})
    if vm is Vm.KVM:
        guest.refuse("with --vm kvm", given)
    elif vm is Vm.ARM:
        guest.refuse("with --vm arm", {"--mode": mode is not None, "--kvm-log": kvm_log is not None})
    else:
        guest.refuse("without --vm kvm", {"--kvm-log": kvm_log is not None})

    if memory_limit is not None and (memory or guest.PAGE) > memory_limit:
        raise typer.BadParameter(f"--memory-limit of {memory_limit} bytes: no guest would be taken")
    if file is not None:
        NewFile(file).close()  # that it can't be there is found out now, and not when the guest has come

    def build(layout: MemoryMap) -> Source:
        if file is not None:
            return PlainGuest(layout, file)
        if vm is Vm.KVM:
            return guest.kvm_for(layout, log=kvm_log or KvmLog.BITMAP)
        if vm is Vm.ARM:
            return guest.arm_for(layout, blocks=bool(thp))
        return guest.machine_for(layout, mode=mode or Mode.HW_DBM, thp=bool(thp))

    with ExitStack() as stack:
        arrived = stack.enter_context(_until_eof()) if until_eof else threading.Event()
        with busy("getting ready"):
            kernels.warm_up()
        limit = guest.physical() if memory_limit is None else memory_limit
        ready: Source | None = None
        if memory is not None:
            guest.check_room(memory)
            layouts = {Vm.KVM: guest.kvm_layout, Vm.ARM: guest.arm_layout}
            layout = layouts.get(vm or Vm.MACHINE, guest.layout_of)(memory)
            ready = stack.enter_context(closing(build(layout)))
            for slot in ready.slots:
                populate(ready.memory(slot.id))
        with _accepted(where, tls, insecure=insecure, quiet=until_eof) as channel:
            received = _receive(channel, ready, build, limit)
        arrived.set()
        there = stack.enter_context(closing(received.destination))
        if not received.told:
            warn("the source couldn't be told that the guest runs here; it stays paused there")
        if run is not None:
            time.sleep(run)
        there.pause()
        result(json_text(_report(received)) if as_json else _text(received), done="the guest arrived")


def _receive(channel: Channel, ready: Source | None, build: Callable[[MemoryMap], Source], limit: int) -> Received:
    try:
        if ready is None:
            return receive_vm(channel, build, most_memory=limit)
        return receive_vm(channel, lambda _: ready, most_memory=limit, populated=True)
    except StreamError as error:
        raise type(error)(f"{error}; the guest never ran here") from error


@contextmanager
def _accepted(where: Endpoint, tls: transport.TlsDir | None, *, insecure: bool, quiet: bool) -> Iterator[Channel]:
    if where.path is not None:
        listener = transport.listen_unix(where.path)
    else:
        with guest.usage():
            listen = partial(transport.listen_tcp, where.host, where.port, tls, insecure=insecure)
            listener = interrupt.elsewhere(listen)
    with listener, interrupt.on_interrupt(listener.close):
        if not quiet:
            note(f"listening on {listener.address}")
        channel = listener.accept(on_refused=_refusals())
    with channel:
        yield channel


def _refusals() -> Callable[[str], None]:
    """Return what says that a connection was refused, and why: a few at once, and then now and then how many."""
    said, more, last = 0, 0, 0.0

    def tell(why: str) -> None:
        nonlocal said, more, last
        more += 1
        if said >= _REFUSALS and time.monotonic() - last < _NOW_AND_THEN:
            return
        note(f"refused a connection: {why}" if more == 1 else f"refused {more} connections, the last one: {why}")
        said, more, last = said + 1, 0, time.monotonic()

    return tell


@contextmanager
def _until_eof() -> Iterator[threading.Event]:
    """End this process when its stdin does, which is its parent's; until the event is set."""
    arrived = threading.Event()

    def watch() -> None:
        while os.read(0, 1 << 12):
            pass
        if not arrived.is_set():
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="hwdbm-until-eof", daemon=True).start()
    yield arrived


def _report(received: Received) -> dict[str, Any]:
    record: dict[str, Any] = {
        "status": "completed",
        "ram": {
            "transferred": received.transferred,
            "normal": received.normal,
            "duplicate": received.duplicate,
            "dirty-sync-count": received.passes,
        },
        "source-told": received.told,
    }
    if received.sha256:
        record["destination-sha256"] = received.sha256
    if received.proved is not None:
        record["guest-resumed"] = received.proved
    return record


def _text(received: Received) -> str:
    text = (
        f"received {mebibytes(received.transferred)} in {received.passes} passes:\n"
        f"{received.normal:,} pages, and {received.duplicate:,} of zeros"
    )
    return text + (f"\nsha256 {received.sha256}" if received.sha256 else "")
