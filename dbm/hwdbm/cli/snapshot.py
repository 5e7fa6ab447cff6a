"""``hwdbm snapshot``: chains of snapshots of guest memory."""

import threading
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from math import inf
from pathlib import Path
from typing import Annotated, Any

import typer

from hwdbm import kernels
from hwdbm import snapshot as files
from hwdbm.arm import ArmVm
from hwdbm.bitmap import DirtyBitmap
from hwdbm.cli import guest, options, parse
from hwdbm.cli.guest import KvmLog, KvmLogOption, MemoryOption, Mode, RateOption, SeedOption, Vm, WorkloadOption
from hwdbm.cli.interrupt import as_event
from hwdbm.cli.output import busy, columns, hexadecimal, leave, warn
from hwdbm.cli.streams import json_text, note, result
from hwdbm.errors import ImageError, LayoutError, SnapshotError
from hwdbm.files import NewFile
from hwdbm.image import Slot
from hwdbm.image.ram import open_ram
from hwdbm.kvm import KvmVm
from hwdbm.machine import Machine
from hwdbm.memslot import Memslot
from hwdbm.migration.report import mib
from hwdbm.snapshot import Chain, Recorder, Snapshot
from hwdbm.vm import MemoryMap, Provable

_MISMATCH = 3  # the exit status
_EVERY = 1000.0  # ms from one snapshot to the next
_COUNT = 10  # snapshots
_RUN = 1.0  # seconds that a guest runs which was restored

Folder = Annotated[
    Path, typer.Argument(parser=options.parser(parse.path), metavar="DIR", help="The folder of the chain.")
]
MemoryFile = Annotated[
    Path,
    typer.Argument(
        parser=options.parser(parse.path),
        metavar="FILE",
        help="Guest memory: raw, as Firecracker writes it, an ELF core, or QEMU's migration file with mapped-ram.",
    ),
]
PageSize = Annotated[
    int,
    typer.Option(parser=options.parser(parse.page_size), metavar="SIZE", help="The page that a bit stands for."),
]
Which = Annotated[
    str | None,
    typer.Option(
        "--snapshot",
        metavar="NAME",
        help="The first digits of a snapshot's name or id. By default the newest.",
    ),
]

_SAVE = """Examples:

  Begin a chain with a file of guest memory, whose first byte is at 1 GiB:

\b
    hwdbm snapshot save chain guest.ram --ram-base 0x40000000

  A real guest that runs, ten times a second, each snapshot with the SHA-256 of all memory:

\b
    hwdbm snapshot save chain --source kvm --memory 256M --every 100 --digest

  The same while the guest migrates to another process:

\b
    hwdbm snapshot save chain --source kvm --every 50 --migrate
"""
_DIFF = """Examples:

  What the memory in a file has that the newest snapshot hasn't:

\b
    hwdbm snapshot diff chain guest.ram --ram-base 0x40000000

  The pages that a dirty log, or 'hwdbm harvest --output', says:

\b
    hwdbm snapshot diff chain guest.ram --ram-base 0x40000000
        --bitmap 0:dirty/slot0.bitmap
"""
_LIST = """Examples:

\b
    hwdbm snapshot list chain
    hwdbm snapshot list chain --plot chain.png
    hwdbm snapshot list chain --report chain.html
"""
_CHECK = """Examples:

\b
    hwdbm snapshot check chain
    hwdbm snapshot check chain --whole --json
"""
_REBASE = """Examples:

  Merge a chain up to its newest snapshot:

\b
    hwdbm snapshot rebase chain

  The same without room for another file of all memory:

\b
    hwdbm snapshot rebase chain --in-place

  Lay a difference of Firecracker's, which has no manifest, over its base:

\b
    hwdbm snapshot rebase --holes guest.ram guest.diff
"""
_RESTORE = """Examples:

\b
    hwdbm snapshot restore chain --output guest.ram --state guest.state
    hwdbm snapshot restore chain --snapshot 000003 --source kvm
"""
_PRUNE = """Examples:

\b
    hwdbm snapshot prune chain --keep 10
"""


# --- save and diff -----------------------------------------------------------------------------------------


def save(
    folder: Folder,
    file: Annotated[
        Path | None,
        typer.Argument(
            parser=options.parser(parse.path),
            metavar="FILE",
            help="Guest memory: raw, as Firecracker writes it, an ELF core, or QEMU's migration file with mapped-ram.",
        ),
    ] = None,
    source: Annotated[
        Vm | None,
        typer.Option(
            parser=options.parser(parse.choice(Vm)),
            metavar="machine|kvm|arm",
            help="In place of a file, a guest that runs here meanwhile: a modelled machine, a real one on /dev/kvm, or "
            "an emulated Arm machine.",
        ),
    ] = None,
    memory: MemoryOption = None,
    workload: WorkloadOption = None,
    rate: RateOption = None,
    kvm_log: KvmLogOption = None,
    seed: SeedOption = 0,
    every: Annotated[
        float | None,
        typer.Option(
            parser=options.parser(parse.number),
            metavar="MS",
            help="Take a difference so often; 1000 by default. One that is late is taken at once.",
        ),
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(
            parser=options.parser(parse.whole(0)),
            metavar="NUMBER",
            help="How many differences follow the full snapshot; 10 by default, and with --migrate as many as there "
            "are until the guest is elsewhere.",
        ),
    ] = None,
    digest: Annotated[
        bool,
        typer.Option(
            "--digest", help="Give each difference the SHA-256 of all memory: the guest stands still meanwhile."
        ),
    ] = False,
    migrate: Annotated[
        bool,
        typer.Option("--migrate", help="Migrate the guest to another process meanwhile; both use its log."),
    ] = False,
    slot: options.Slots = None,
    ram_base: options.RamBase = None,
    block: options.Block = None,
    page_size: PageSize = "4K",  # type: ignore[assignment]  # typer parses it
    as_json: options.Json = False,
) -> None:
    """Begin a chain with a full snapshot, of a file or of a guest that runs.

    Of a guest, differences follow, each with its registers. A snapshot is its memory file, the bitmap of the pages
    that this holds, and a manifest, which comes last: a snapshot that failed, at any byte, isn't there, and what it
    would have had is in the next.
    """
    if (file is None) == (source is None):
        raise typer.BadParameter("give either FILE or --source")
    if source is None:
        guest.refuse("without --source", {
            "--memory": memory is not None, "--workload": workload is not None, "--rate": rate is not None,
            "--kvm-log": kvm_log is not None, "--every": every is not None, "--count": count is not None,
            "--digest": digest, "--migrate": migrate,
        })  # fmt: skip
        layout, parts = _memory_of(file, slot, ram_base, block, page_size)
        folder.mkdir(parents=True, exist_ok=True)
        chain = Chain(folder)
        _say_taken(chain, [chain.add(layout, parts, full=True, source="file")], as_json=as_json)
        return
    guest.refuse("with --source", {
        "--slot": slot is not None, "--ram-base": ram_base is not None, "--block": block is not None,
    })  # fmt: skip
    size = guest.MEMORY if memory is None else memory
    guest.check_room(size)
    with busy("the guest is made ready"), ExitStack() as made:
        vm = guest.paused(source, size, workload, rate, seed, log=kvm_log)
        made.enter_context(vm)
        kernels.warm_up()
        made.pop_all()
    with vm, as_event() as cancel:
        vm.resume()
        pause = (_EVERY if every is None else every) / 1e3
        receiver = ["--memory", str(size), "--vm", source.value] if migrate else None
        taken = _record(vm, folder, pause, count, cancel, digest=digest, receiver=receiver)
        _say_taken(Chain(folder), taken.snapshots, paused=taken.paused, migration=taken.migration, as_json=as_json)
        if cancel.is_set():
            leave()


class _Taken:
    """The snapshots of a guest that ran, how long each kept it paused, and what became of its migration."""

    def __init__(self) -> None:
        self.snapshots: list[Snapshot] = []
        self.paused: list[float] = []
        self.migration: dict[str, Any] | None = None


def _record(
    vm: Machine | KvmVm | ArmVm,
    folder: Path,
    every: float,
    count: int | None,
    cancel: threading.Event,
    *,
    digest: bool,
    receiver: list[str] | None,
) -> _Taken:
    taken, moved = _Taken(), threading.Event()
    most: float = count if count is not None else _COUNT if receiver is None else inf
    with ExitStack() as stack:
        recorder = stack.enter_context(Recorder(vm, folder, digest=digest))
        tell = stack.enter_context(busy("a full snapshot"))

        def take(one: Callable[[], Snapshot]) -> None:
            taken.snapshots.append(one())
            taken.paused.append(recorder.paused)
            tell(f"{len(taken.snapshots)} snapshots, the last kept the guest paused for {recorder.paused * 1e3:.1f} ms")

        take(recorder.save)
        if receiver is not None:
            stack.enter_context(_migrating(vm, receiver, cancel, moved, taken))
        begun = time.monotonic()
        while len(taken.snapshots) <= most and not cancel.is_set() and not moved.is_set():
            begun = max(begun + every, time.monotonic())
            cancel.wait(begun - time.monotonic())
            if not cancel.is_set() and not moved.is_set():
                take(recorder.diff)
    return taken


def _migrating(vm: Any, receiver: list[str], cancel: threading.Event, moved: threading.Event, taken: _Taken) -> Any:
    from hwdbm.cli.migrate import beside  # noqa: PLC0415  # it is large, and needed here alone

    def done(report: dict[str, Any]) -> None:
        taken.migration = report
        moved.set()

    return beside(vm, receiver, cancel, done)


def diff(
    folder: Folder,
    file: MemoryFile,
    bitmap: Annotated[
        list[parse.Numbered] | None,
        typer.Option(
            "--bitmap",
            parser=options.parser(parse.numbered_path),
            metavar="ID:FILE",
            help="The pages of a slot that were dirtied since the newest snapshot, in KVM's layout; one for each "
            "slot. A page that it misses is lost. By default the memory is compared.",
        ),
    ] = None,
    slot: options.Slots = None,
    ram_base: options.RamBase = None,
    block: options.Block = None,
    page_size: PageSize = "4K",  # type: ignore[assignment]  # typer parses it
    as_json: options.Json = False,
) -> None:
    """Add what a file of guest memory has that the newest snapshot hasn't."""
    layout, parts = _memory_of(file, slot, ram_base, block, page_size)
    pages = None
    if bitmap:
        npages = {slot.id: slot.npages for slot in layout.slots}
        pages = {}
        for each in bitmap:
            if each.slot not in npages or each.slot in pages:
                raise typer.BadParameter(f"--bitmap {each.slot}:{each.path}: there is no such slot, or it comes twice")
            pages[each.slot] = DirtyBitmap.load(each.path, npages[each.slot])
    chain = Chain(folder)
    _say_taken(chain, [chain.add(layout, parts, pages=pages, source="file")], as_json=as_json)


def _memory_of(
    path: Path | None, slots: list[Slot] | None, ram_base: int | None, block: str | None, page_size: int
) -> tuple[MemoryMap, dict[int, Any]]:
    assert path is not None  # noqa: S101 - it was asked for
    options.check_slots(slots)
    found = open_ram(path, ram_base=ram_base, slots=slots or (), block=block)
    for slot in found:
        if (slot.gpa | slot.size) % page_size:
            raise ImageError(f"{path}: slot {slot.id} isn't whole pages of {page_size} bytes")
    try:
        layout = MemoryMap(
            page_size,
            tuple(Memslot(slot.id, 0, slot.gpa // page_size, slot.size // page_size, 0) for slot in found),
        )
    except LayoutError as error:
        raise ImageError(f"{path}: {error}") from error
    return layout, {slot.id: part for slot, part in found.items()}


def _say_taken(
    chain: Chain,
    taken: list[Snapshot],
    *,
    paused: list[float] | None = None,
    migration: dict[str, Any] | None = None,
    as_json: bool,
) -> None:
    entries = [_entry(chain, each) for each in taken]
    for entry, seconds in zip(entries, paused or (), strict=False):
        entry["paused"] = round(seconds * 1e3, 3)
    report: dict[str, Any] = {"folder": str(chain.folder), "snapshots": entries}
    if migration is not None:
        report["migration"] = migration
    done = f"{len(taken)} snapshots were taken"
    if as_json:
        result(json_text(report), done)
    else:
        lines = [_table(entries, chain.snapshots())]
        if migration is not None:
            lines.append(f"the migration {migration['status']}")
        result("\n".join(lines), done)
    if migration is not None and migration["status"] != "completed":
        note(f"the migration {migration['status']}: {migration.get('error', '')}")
        raise typer.Exit(1)


# --- the others --------------------------------------------------------------------------------------------


def _list(
    folder: Folder,
    plot: Annotated[
        Path | None,
        typer.Option(
            parser=options.parser(parse.path),
            metavar="FILE.png|.svg",
            help="Draw the chain: what each snapshot holds, how much, and what later ones have anew. Needs the extra "
            "'plot'.",
        ),
    ] = None,
    report: options.Report = None,
    as_json: options.Json = False,
) -> None:
    """List the snapshots of a chain, the oldest first, with the pages that the next one has anew."""
    draw = None if plot is None else _painter(plot)
    options.check_report(report)
    chain = Chain(folder)
    snapshots = chain.snapshots()
    pages = [chain.pages(each) for each in snapshots]
    entries = [_entry(chain, each) for each in snapshots]
    for entry, overlap in zip(entries, _overlaps(snapshots, pages), strict=True):
        entry["overlap"] = overlap
    text = _table(entries) if entries else f"{folder}: there is no snapshot in it"
    result(json_text({"folder": str(folder), "snapshots": entries}) if as_json else text)
    if draw is not None:
        draw(snapshots, pages, [entry["disk"] for entry in entries])
    if report is not None:
        _write_report(report, folder, entries)


def _write_report(path: Path, folder: Path, entries: list[dict[str, Any]]) -> None:
    from hwdbm import report  # noqa: PLC0415  # nothing else waits for it

    chain = [
        report.SnapshotFile(
            entry["name"], "full" if entry["full"] else "differential", sum(slot["size"] for slot in entry["slots"]),
            entry["disk"], entry["pages"], sha256=entry.get("sha256", ""),
        )
        for entry in entries
    ]  # fmt: skip
    report.write(path, report.of_snapshots(f"Snapshots in {folder}", chain))


def _painter(plot: Path) -> Callable[..., None]:
    """Return what draws a chain; that it can't is found out before it is read."""
    if plot.suffix not in {".png", ".svg"}:
        raise typer.BadParameter(f"--plot {plot}: .png or .svg")
    from hwdbm.snapshot.picture import draw  # noqa: PLC0415  # matplotlib is an extra of its own

    NewFile(plot).close()
    return partial(draw, plot)


def _overlaps(snapshots: tuple[Snapshot, ...], pages: list[dict[int, DirtyBitmap]]) -> list[int]:
    """Return how many pages of each snapshot one of its children has anew."""
    found = []
    for snapshot, mine in zip(snapshots, pages, strict=True):
        most = 0
        for other, theirs in zip(snapshots, pages, strict=True):
            if other.parent == snapshot.id:
                most = max(most, sum((mine[slot] & theirs[slot]).weight() for slot in mine))
        found.append(most)
    return found


def check(
    folder: Folder,
    whole: Annotated[
        bool,
        typer.Option(
            "--whole", help="Put the chain together for each snapshot that has a digest of all memory, and compare."
        ),
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Say which pages of a chain are missing since when, whose parent is wrong, what is damaged.

    All that the snapshots hold is read. Nothing is changed. Exit status 3 if something is wrong.
    """
    chain = Chain(folder)
    with busy(f"reading {folder}"):
        flaws = chain.check(whole=whole)
    wrong = [flaw for flaw in flaws if flaw.kind != "leftover"]
    if not wrong and not chain.snapshots():
        raise SnapshotError(f"{folder}: there is no snapshot in it")
    if as_json:
        found = [
            {"kind": flaw.kind, "text": flaw.text}
            | ({"snapshot": flaw.snapshot} if flaw.snapshot else {})
            | ({"pages": flaw.pages} if flaw.pages else {})
            for flaw in flaws
        ]
        result(json_text({"folder": str(folder), "sound": not wrong, "flaws": found}))
    else:
        lines = [f"{flaw.kind}: {flaw.text}" for flaw in flaws]
        many = f"{len(wrong)} flaw{'s' if len(wrong) > 1 else ''}"
        if not wrong:
            many = "sound"
        result("\n".join([*lines, f"{folder}: {many}"]))
    if wrong:
        raise typer.Exit(_MISMATCH)


def rebase(
    base: Annotated[
        Path,
        typer.Argument(
            parser=options.parser(parse.path),
            metavar="BASE",
            help="The folder of a chain; or a file of all memory without a manifest, which is changed.",
        ),
    ],
    diffs: Annotated[
        list[Path] | None,
        typer.Argument(
            parser=options.parser(parse.path), metavar="DIFF", help="Sparse files without manifests, the oldest first."
        ),
    ] = None,
    which: Which = None,
    in_place: Annotated[
        bool,
        typer.Option(
            "--in-place",
            help="Change the base's own file: no room for another is needed. A journal is kept, and the next call "
            "finishes what was cut short.",
        ),
    ] = False,
    holes: Annotated[
        bool,
        typer.Option(
            "--holes",
            help="The files have no manifests, as Firecracker's: what is a hole in a difference is unchanged, whatever "
            "copied it; nothing says of which base it is, or whether one is missing between them.",
        ),
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Merge a chain into a full snapshot, or lay differences without manifests over their base.

    In a chain the newest snapshot, or that of --snapshot, becomes a full one under its own id, and what it was the
    difference to is removed. All of it is verified before. The new file takes its place by rename.

    Of files without manifests, what is data in a difference is copied, and a hole leaves the base as it is, as
    Firecracker's snapshot-editor does it. If it is interrupted, the base is what it was. Refused is what can't be
    trusted: a link, the same file twice, a diff without holes, and one that is older than what it would change.
    """
    if not diffs:
        if holes or not base.is_dir():
            raise typer.BadParameter(f"{base}: give the folder of a chain, or a base and its differences")
        chain = Chain(base)
        before = {each.id for each in chain.snapshots()}
        with busy(f"merging {base}"):
            snapshot = chain.rebase(which, in_place=in_place)
        removed = sorted(before - {each.id for each in chain.snapshots()})
        entry = _entry(chain, snapshot)
        done = f"{base} was changed"
        if as_json:
            result(json_text({"folder": str(base), "snapshot": entry, "removed": removed}), done)
            return
        result(
            f"{snapshot.name} is a full snapshot; {len(removed)} others were merged into it\n{_table([entry])}", done
        )
        return
    guest.refuse("with files that have no manifests", {"--snapshot": which is not None, "--in-place": in_place})
    for path in (base, *diffs):
        if path.with_suffix(".json").exists():
            raise SnapshotError(
                f"{path} has a manifest: give the folder, {path.parent}, and its bitmap is used, not holes"
            )
    if not holes:
        warn("without manifests a hole means 'unchanged', whatever made it (--holes says that you know)")
    sizes = files.rebase_all(base, diffs)
    copied = {str(diff): size for diff, size in zip(diffs, sizes, strict=True)}
    done = f"{base} was changed"
    if as_json:
        result(json_text({"base": str(base), "copied": copied}), done)
        return
    result("\n".join(f"{diff}: {size} bytes copied to {base}" for diff, size in copied.items()), done)


def restore(
    folder: Folder,
    which: Which = None,
    output: Annotated[
        Path | None,
        typer.Option(
            parser=options.parser(parse.path),
            metavar="FILE",
            help="Write the memory: the slots by address, as a full snapshot of Firecracker.",
        ),
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option(parser=options.parser(parse.path), metavar="FILE", help="Write the registers and devices."),
    ] = None,
    source: Annotated[
        Vm | None,
        typer.Option(
            parser=options.parser(parse.choice(Vm)),
            metavar="machine|kvm|arm",
            help="Start a guest with the memory and the registers, and let it run.",
        ),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            "--seconds",
            parser=options.parser(parse.number),
            metavar="SECONDS",
            help="How long the guest runs; 1 by default.",
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Write the memory of a snapshot's moment, or start a guest with it.

    Each layer is compared with its digest, and the whole with that of its moment where the snapshot has it. A real
    guest, or an Arm machine, is checked when it has run on: it counts in its memory.
    """
    if output is None and source is None:
        raise typer.BadParameter("give --output FILE, or --source")
    guest.refuse("without --source", {"--seconds": seconds is not None and source is None})
    chain = Chain(folder)
    found = chain.find(which)
    if state is not None and found.state is None:
        raise SnapshotError(f"{folder / found.name}.json has no state")
    report: dict[str, Any] = {"folder": str(folder)}
    lines = []
    with ExitStack() as placed:  # the registers take their place when the memory has
        if state is not None:
            placed.enter_context(NewFile(state)).put(chain.state(found) or b"")
        if output is not None:
            with busy(f"writing {output}"):
                found = chain.restore(output, found.id)
            report["file"] = str(output)
            lines.append(f"{output}: {found.layout.total} bytes")
    if state is not None:
        report["state"] = str(state)
        lines.append(f"{state}: registers and devices")
    if source is not None:
        found, ran = _started(chain, found, source, _RUN if seconds is None else seconds)
        report["ran"] = round(ran * 1e3)
        lines.append(
            f"the guest went on for {ran:.1f} s" + (", and its memory is right" if source is not Vm.MACHINE else "")
        )
    report |= {"snapshot": _entry(chain, found), "sha256": found.digest}
    done = "the snapshot was restored"
    result(json_text(report) if as_json else "\n".join([*lines, f"sha256 {found.digest}"]), done)


def _started(chain: Chain, snapshot: Snapshot, source: Vm, seconds: float) -> tuple[Snapshot, float]:
    if snapshot.source.partition(" ")[0] != source.value:
        raise SnapshotError(
            f"{chain.folder / snapshot.name}.json is of {snapshot.source!r}, and not of --source {source.value}"
        )
    layout = snapshot.layout
    vm: Any
    with busy("the guest is made ready"), ExitStack() as made:
        if source is Vm.KVM:
            vm = guest.kvm_for(layout, log=KvmLog.BITMAP)
        elif source is Vm.ARM:
            vm = guest.arm_for(layout, blocks=False)
        else:
            vm = guest.machine_for(layout, mode=Mode.HW_DBM, thp=False)
        made.enter_context(vm)
        kernels.warm_up()
        found = chain.restore(vm, snapshot.id)
        made.pop_all()
    with vm, as_event() as cancel:
        begun = time.monotonic()
        vm.resume()
        cancel.wait(seconds)
        if isinstance(vm, Provable) and not cancel.is_set():
            vm.prove()
        vm.pause()
        if cancel.is_set():
            leave()
        return found, time.monotonic() - begun


def prune(
    folder: Folder,
    keep: Annotated[
        int,
        typer.Option(
            parser=options.parser(parse.whole(1)), metavar="NUMBER", help="How many of the newest snapshots stay."
        ),
    ],
    as_json: options.Json = False,
) -> None:
    """Remove all but the newest snapshots; one that stays and needs what goes becomes a full one."""
    chain = Chain(folder)
    with busy(f"pruning {folder}"):
        removed = chain.prune(keep)
    kept = [each.id for each in chain.snapshots()]
    done = f"{folder} was changed" if removed else ""
    if as_json:
        report = {"folder": str(folder), "kept": kept, "removed": [each.id for each in removed]}
        result(json_text(report), done)
        return
    result(f"{len(removed)} snapshots were removed, {len(kept)} stay", done)


# --- what is said ------------------------------------------------------------------------------------------


def _entry(chain: Chain, snapshot: Snapshot) -> dict[str, Any]:
    page = snapshot.layout.page_size
    entry: dict[str, Any] = {
        "id": snapshot.id,
        "name": snapshot.name,
        "full": snapshot.full,
        "time": snapshot.time,
        "epoch": snapshot.epoch,
        "source": snapshot.source,
        "mechanism": snapshot.mechanism,
        "page-size": page,
        "slots": [
            {"id": slot.id, "gpa": hexadecimal(slot.base_gfn * page), "size": slot.npages * page}
            for slot in snapshot.layout.slots
        ],
        "size": snapshot.size,
        "pages": sum(pages.weight() for pages in chain.pages(snapshot).values()),
        "disk": chain.size(snapshot),
    }
    if snapshot.parent is not None:
        entry["parent"] = snapshot.parent
    if snapshot.digest is not None:
        entry["sha256"] = snapshot.digest
    return entry


def _table(entries: list[dict[str, Any]], known: Iterable[Snapshot] = ()) -> str:
    heads: list[object] = ["name", "kind", "taken", "pages", "MiB", "on disk"]
    names = {entry["id"]: entry["name"] for entry in entries} | {each.id: each.name for each in known}
    rows = [heads]
    for entry in entries:
        taken = time.strftime("%H:%M:%S", time.localtime(entry["time"] / 1e3)) + f".{entry['time'] % 1000:03d}"
        parent = entry.get("parent", "")
        kind = "full" if entry["full"] else f"to {names.get(parent, parent[:8]).partition('-')[0]}"
        size = mib(entry["pages"] * entry["page-size"])
        row = [entry["name"], kind, taken, entry["pages"], size, mib(entry["disk"])]
        if "overlap" in entry:
            row.append(entry["overlap"])
        if "paused" in entry:
            row.append(f"{entry['paused']:.1f}")
        rows.append(row)
    if any("overlap" in entry for entry in entries):
        heads.append("anew")
    if any("paused" in entry for entry in entries):
        heads.append("paused ms")
    return columns(rows, left=(0, 1, 2))


COMMANDS: dict[str, tuple[Callable[..., None], str]] = {
    "save": (save, _SAVE),
    "diff": (diff, _DIFF),
    "list": (_list, _LIST),
    "check": (check, _CHECK),
    "rebase": (rebase, _REBASE),
    "restore": (restore, _RESTORE),
    "prune": (prune, _PRUNE),
}
"""The commands of the group, with their examples."""
