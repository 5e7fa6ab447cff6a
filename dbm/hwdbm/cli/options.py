"""The arguments and options that commands share, and opening the image that they name."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from hwdbm.cli import parse
from hwdbm.cli.example import EXAMPLES, TRACES, label
from hwdbm.errors import ImageError
from hwdbm.files import NewFile
from hwdbm.image import Image, Live, Registers, Slot, open_image, open_live
from hwdbm.image.capture import is_capture
from hwdbm.image.ram import kind_of_ram
from hwdbm.image.raw import RawTables
from hwdbm.image.slots import check_slots as slots_together
from hwdbm.vtcr import Vtcr as VtcrFields

T = TypeVar("T")


def parser(read: Callable[[str], T]) -> Callable[[object], T]:
    """Return `read` for typer: what it can't read is wrong usage."""

    def wrapped(value: object) -> T:
        try:
            return read(str(value))
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error

    return wrapped


def words(kinds: Iterable[str]) -> Callable[[str], list[str]]:
    """Return what completes one of some words in a shell."""
    offered = [str(kind) for kind in kinds]
    return lambda incomplete: [word for word in offered if word.startswith(incomplete)]


def examples(incomplete: str) -> list[tuple[str, str]]:
    """Return the examples that a word may become, with what they are; none before its first letter, as for files."""
    offered = ((f"example:{name}", what) for name, (_, what) in EXAMPLES.items())
    return [(word, what) for word, what in offered if incomplete and word.startswith(incomplete)]


def traces(incomplete: str) -> list[tuple[str, str]]:
    """Return the examples of traces that a word may become; none before its first letter, as for files."""
    offered = ((f"example:{name}", what) for name, what in TRACES.items())
    return [(word, what) for word, what in offered if incomplete and word.startswith(incomplete)]


RamBase = Annotated[
    int | None,
    typer.Option(
        parser=parser(parse.address),
        metavar="ADDRESS",
        help="The physical address of the first byte of a raw image, or of --block. An ELF core has it.",
    ),
]
Vttbr = Annotated[
    int | None,
    typer.Option(
        parser=parser(parse.address),
        metavar="VALUE",
        help="VTTBR_EL2, which says where the tables are. A capture has it.",
    ),
]
Vtcr = Annotated[
    int | None,
    typer.Option(
        parser=parser(parse.address),
        metavar="VALUE",
        help="VTCR_EL2, which says what shape the tables have. A capture has it.",
    ),
]
Slots = Annotated[
    list[Slot] | None,
    typer.Option(
        "--slot",
        parser=parser(parse.slot),
        metavar="ID:GPA:SIZE",
        help="A memslot, instead of those that a capture names. Give the option once for each slot.",
    ),
]
Block = Annotated[
    str | None,
    typer.Option("--block", metavar="NAME", help="The block of a QEMU migration file that is the guest's RAM."),
]
Report = Annotated[
    Path | None,
    typer.Option(
        "--report",
        parser=parser(parse.path),
        metavar="FILE.html",
        help="Report what was found: pictures, and the numbers behind them, in one HTML file without links that one "
        "can print.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, and nothing else on stdout.")]


def check_report(path: Path | None) -> None:
    """Find out that a report can't be written before there is one."""
    if path is None:
        return
    if path.suffix != ".html":
        raise typer.BadParameter(f"--report {path}: .html")
    NewFile(path).close()


def check_slots(slots: list[Slot] | None) -> None:
    """Raise `typer.BadParameter` if two ``--slot`` can't be there together."""
    try:
        slots_together(slots or (), 64)
    except ImageError as error:
        raise typer.BadParameter(f"--slot: {error}") from error


def open_for(
    path: Path,
    ram_base: int | None,
    vttbr: int | None,
    vtcr: int | None,
    slots: list[Slot] | None,
    block: str | None = None,
) -> Image:
    """Open an image as the options say; a raw one without its registers is wrong usage."""
    check_slots(slots)
    capture = is_capture(path)
    if capture and ram_base is not None:
        raise typer.BadParameter(f"{label(path)} is a capture: --ram-base is for raw images")
    if ram_base is not None and ram_base % 4096:
        raise typer.BadParameter(f"--ram-base {ram_base:#x} isn't a multiple of 4K")
    if not capture:
        kind = kind_of_ram(path)
        if kind == "elf" and ram_base is not None:
            raise typer.BadParameter(f"{label(path)} is an ELF core, which says where its memory is: no --ram-base")
        missing = [
            option
            for option, value in (("--ram-base", ram_base), ("--vttbr", vttbr), ("--vtcr", vtcr))
            if value is None and (option, kind) != ("--ram-base", "elf")
        ]
        if missing:
            raise typer.BadParameter(f"{label(path)} is no capture, and a raw image needs {', '.join(missing)}")
    if vtcr is not None:
        try:
            VtcrFields.decode(vtcr)
        except ValueError as error:
            raise typer.BadParameter(f"--vtcr {vtcr:#x}: {error}") from error
        if vttbr is not None:
            try:
                Registers(vttbr, vtcr).decode()
            except ValueError as error:
                raise typer.BadParameter(f"--vttbr {vttbr:#x}: {error}") from error
    return open_image(path, ram_base=ram_base, vttbr=vttbr, vtcr=vtcr, slots=slots or None, block=block)


def live_of(path: Path, image: Image, *, readonly: bool) -> Live:
    """Map the RAM of a machine that runs, as an image that was opened says; a capture is wrong usage."""
    if not isinstance(image.memory, RawTables):
        raise typer.BadParameter(f"--live: {label(path)} is a capture or a dump, and no RAM that a machine uses")
    registers = image.registers
    return open_live(path, ram_base=image.memory.base, vttbr=registers.vttbr, vtcr=registers.vtcr, readonly=readonly)
