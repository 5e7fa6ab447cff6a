"""``hwdbm harvest``: which pages are dirty, as bitmaps and as a summary."""

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from hwdbm import files
from hwdbm.cli import options, pages, parse
from hwdbm.cli.example import label
from hwdbm.cli.output import columns, hexadecimal, progress, warn
from hwdbm.cli.streams import json_text, note, result
from hwdbm.errors import HwdbmError
from hwdbm.granule import size_name
from hwdbm.image import Image, Live
from hwdbm.image.harvest import Ask, Found, clean_slot, harvest_slots
from hwdbm.image.slots import SLOT_UNIT

_MISMATCH = 3  # the exit status

EPILOG = """Examples:

  Compare a capture's dirty pages with the truth that it carries:

\b
    hwdbm harvest example:4k_ipa40 --check

  Its slots, as KVM would return them, one file each:

\b
    hwdbm harvest example:4k_ipa40 --output dirty

  A report with pictures, and the numbers behind them:

\b
    hwdbm harvest example:4k_blocks --check --report harvest.html

  Tables that Linux keeps without hardware DBM; there, writable is dirty:

\b
    hwdbm harvest example:kvm-6.1 --policy writable

  Raw RAM whose first byte is at 0x41000000, and one slot of 192 MiB:

\b
    hwdbm harvest example:ram --ram-base 0x41000000 --vttbr 0x41000000
        --vtcr 0x806a3558 --slot 0:0x80000000:192M --json

  The same as RAM of a machine that runs (docs: howto/track-arm):

\b
    hwdbm harvest example:ram --live --ram-base 0x41000000
        --vttbr 0x41000000 --vtcr 0x806a3558 --slot 0:0x80000000:192M
"""


class _Policy(StrEnum):
    DBM = "dbm"
    WRITABLE = "writable"


def harvest(
    images: Annotated[
        list[Path],
        typer.Argument(
            parser=options.parser(parse.image),
            metavar="IMAGE",
            autocompletion=options.examples,
            help="Captures (.npz), raw images of RAM, or examples that hwdbm brings (example:4k_ipa40).",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            parser=options.parser(parse.path),
            metavar="DIR",
            help="Write each slot's bitmap to DIR/slot<ID>.bitmap: little-endian 64-bit words, the slot's first page "
            "in bit 0. Other slot<ID>.bitmap there are removed. With several images: to DIR/<IMAGE>/slot<ID>.bitmap.",
        ),
    ] = None,
    page_size: Annotated[
        int | None,
        typer.Option(
            parser=options.parser(parse.page_size),
            metavar="SIZE",
            help="The page that a bit stands for; the granule by default.",
        ),
    ] = None,
    policy: Annotated[
        _Policy,
        typer.Option(
            parser=options.parser(parse.choice(_Policy)),
            metavar="dbm|writable",
            help="Which leaves are dirty. dbm: those that hardware marked (DBM = 1 and "
            "S2AP[1] = 1). writable: all with S2AP[1] = 1, for tables kept without DBM.",
        ),
    ] = _Policy.DBM,
    contiguous: Annotated[
        bool,
        typer.Option(
            "--contiguous/--no-contiguous",
            help="A dirty entry of a contiguous run (bit 52) makes the whole run dirty: hardware "
            "may mark any one of it. Or each entry speaks for itself.",
        ),
    ] = True,
    check: Annotated[bool, typer.Option("--check", help="Compare with the truth that a capture carries.")] = False,
    live: Annotated[
        bool,
        typer.Option(
            "--live",
            help="The image is the RAM of a machine that runs, such as the file of QEMU's memory-backend-file with "
            "share=on. It is read while it is written, and not changed.",
        ),
    ] = False,
    clean: Annotated[
        bool,
        typer.Option(
            "--clean",
            help="With --live, re-protect the dirty pages in the machine's tables, each by one atomic operation. Flush "
            "the guest's TLB before you copy a page.",
        ),
    ] = False,
    report: options.Report = None,
    slot: options.Slots = None,
    ram_base: options.RamBase = None,
    block: options.Block = None,
    vttbr: options.Vttbr = None,
    vtcr: options.Vtcr = None,
    as_json: options.Json = False,
) -> None:
    """Find the dirty pages of each memslot of an image.

    All tables are read and checked. A table outside of the image, a loop, a reserved encoding are
    errors that name the entry, and then nothing is written for that image.
    """
    ask = Ask(policy.value, page_size, contiguous=contiguous, check=check)
    options.check_slots(slot)
    _check_live(live=live, clean=clean, output=output, ask=ask)
    if report is not None and len(images) > 1:
        raise typer.BadParameter("--report is of one image: harvest them one by one")
    options.check_report(report)
    folders = _folders(images, output)
    reports: list[dict[str, Any]] = []
    for path in images:
        try:
            image = options.open_for(path, ram_base, vttbr, vtcr, slot, block)
            if check and image.capture is None:
                raise typer.BadParameter(f"--check: {label(path)} is a raw image, which carries no truth")
            if live:
                machine = options.live_of(path, image, readonly=not clean)
                image = Image(machine.memory, machine.registers, image.slots)
                reports.append(_harvested(path, image, ask, folders.get(path), machine if clean else None, report))
                reports[-1]["cleaned"] = clean
            else:
                reports.append(_harvested(path, image, ask, folders.get(path), report=report))
        except (HwdbmError, OSError) as error:
            what = str(error) if isinstance(error, HwdbmError) else f"{error.filename or path}: {error.strerror}"
            note((what if str(path) in what else f"{label(path)}: {what}") + pages.see(error))
            reports.append({"image": label(path), "error": what})
        if not as_json and "error" not in reports[-1]:
            result(_text(reports[-1]), "" if output is None else "the bitmaps were written")
    if as_json:
        result(json_text({"images": reports}), "" if output is None else "the bitmaps were written")
    if any("error" in report for report in reports):
        raise typer.Exit(1)
    if any(slot.get("differs") for report in reports for slot in report["slots"]):
        raise typer.Exit(_MISMATCH)


def _check_live(*, live: bool, clean: bool, output: Path | None, ask: Ask) -> None:
    if clean and not live:
        raise typer.BadParameter("--clean has no effect without --live: an image isn't changed")
    if live and ask.check:
        raise typer.BadParameter("--check: a machine that runs carries no truth")
    if clean and output is None:
        raise typer.BadParameter("--clean without --output DIR would forget which pages were dirty")
    if clean and ask.policy != "dbm":
        raise typer.BadParameter("--clean is of leaves with DBM, and not of --policy writable")


def _harvested(
    path: Path, image: Image, ask: Ask, folder: Path | None, clean: Live | None = None, report: Path | None = None
) -> dict[str, Any]:
    """Harvest an image, write its bitmaps, and return what is to be said of it. The tables of `clean` are cleaned."""
    if not image.slots:
        raise typer.BadParameter(f"{label(path)} names no slots: give --slot ID:GPA:SIZE")
    if ask.policy == "dbm" and not image.vtcr.hw_dbm:
        warn(
            f"{label(path)}: VTCR_EL2 = {hexadecimal(image.registers.vtcr)} has hardware DBM off, so "
            "leaves with DBM record nothing; see --policy writable"
        )
    with progress(label(path)) as visitors:
        found = harvest_slots(image, ask, visitors)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        # Reported first, and cleaned then: whatever ends the command, each page is in a bitmap or in the tables.
        cleanings = [clean_slot(clean, one, contiguous=ask.contiguous) for one in found.slots] if clean else []
        for one in found.slots:
            one.file = folder / f"slot{one.slot.id}.bitmap"
        files.write_together({one.file: one.bitmap.to_bytes() for one in found.slots if one.file is not None})
        for each in cleanings:
            each()
        if clean is not None:
            note(f"{label(path)}: these pages are clean now: flush the guest's TLB before one of them is copied")
        # Those of an earlier run, which had other slots, would be taken for this one's.
        for old in folder.glob("slot*.bitmap"):
            if old.stem[4:].isdecimal() and old not in {one.file for one in found.slots}:
                old.unlink()
    for one in found.slots:
        if not one.mapped:
            warn(f"{label(path)}: no page of slot {one.slot.id} is mapped: is it where the guest has its memory?")
    _say_differences(path, found)
    if report is not None:
        from hwdbm import report as documents  # noqa: PLC0415  # no other harvest waits for it

        documents.write(report, documents.of_harvest(label(path), found))
    return _report(path, image, found)


def _folders(images: list[Path], output: Path | None) -> dict[Path, Path]:
    """Return where each image's bitmaps go: what its path adds to what all paths have in common."""
    if output is None:
        return {}
    if len(images) == 1:
        return {images[0]: output}
    whole = [Path(os.path.abspath(path)) for path in images]  # noqa: PTH100  # keeps symlinks
    common = os.path.commonpath([path.parent for path in whole])
    folders = {
        image: output / path.relative_to(common).with_suffix("") for image, path in zip(images, whole, strict=True)
    }
    if len(set(folders.values())) < len(images):
        raise typer.BadParameter("several images would write to the same folder: harvest them one by one")
    return folders


def _say_differences(path: Path, found: Found) -> None:
    for one in found.slots:
        if one.wrong is None or not one.wrong.any():
            continue
        page = int(one.wrong.pages()[0])
        gfn = one.slot.gpa // SLOT_UNIT + page
        now, then = ("dirty", "clean") if one.found_dirty(page) else ("clean", "dirty")
        note(
            f"{label(path)}: slot {one.slot.id} differs from the truth in {one.wrong.weight()} "
            f"pages of 4K, the first is gfn {gfn:#x}: found {now}, in truth {then}"
        )


def _report(path: Path, image: Image, found: Found) -> dict[str, Any]:
    slots = []
    for one in found.slots:
        slot: dict[str, Any] = {
            "id": one.slot.id,
            "gpa": hexadecimal(one.slot.gpa),
            "size": one.slot.size,
            "page-size": one.page_size,
            "pages": one.bitmap.npages,
            "mapped": one.mapped,
            "dirty": one.dirty,
            "ranges": one.ranges,
            "dirty-leaves": {size_name(size): count for size, count in one.leaves.items()},
        }
        if one.wrong is not None:
            slot["differs"] = one.wrong.weight()
        if one.file is not None:
            slot["file"] = str(one.file)
        slots.append(slot)
    return {
        "image": label(path),
        "granule": str(image.granule),
        "ipa-bits": image.vtcr.ipa_bits,
        "hw-dbm": image.vtcr.hw_dbm,
        "policy": found.ask.policy,
        "contiguous": found.ask.contiguous,
        "slots": slots,
        "total": {
            "pages": sum(slot["pages"] for slot in slots),
            "dirty": sum(slot["dirty"] for slot in slots),
            "dirty-bytes": sum(slot["dirty"] * slot["page-size"] for slot in slots),
            "tables": found.tables,
            "table-bytes": found.tables * image.granule.page_size,
            "time": round(1e3 * found.seconds, 3),
        },
    }


def _text(report: dict[str, Any]) -> str:
    dbm = "hardware DBM on" if report["hw-dbm"] else "hardware DBM off"
    heads: list[object] = ["slot", "gpa", "page", "pages", "dirty", "ranges", "dirty leaves"]
    rows = [heads]
    for slot in report["slots"]:
        leaves = ", ".join(f"{n} of {size}" for size, n in slot["dirty-leaves"].items() if n)
        row = [slot["id"], slot["gpa"], size_name(slot["page-size"])]
        rows.append([*row, slot["pages"], slot["dirty"], slot["ranges"], leaves or "-"])
        if "differs" in slot:
            rows[-1].append(f"{slot['differs']} wrong" if slot["differs"] else "as expected")
        if "file" in slot:
            rows[-1].append(slot["file"])
    for key, head in (("differs", "check"), ("file", "file")):
        if any(key in slot for slot in report["slots"]):
            heads.append(head)
    total = report["total"]
    head = f"{report['image']}: {report['granule']} granule, {report['ipa-bits']}-bit IPA, {dbm}"
    summary = (
        f"{total['dirty']} of {total['pages']} pages dirty ({total['dirty-bytes']} bytes)",
        f"{total['tables']} tables ({total['table-bytes']} bytes) read in {total['time']:.1f} ms",
    )
    table = columns(rows, left=(0, 1, 2, *range(6, len(heads))))
    return "\n".join([head, table, *summary])
