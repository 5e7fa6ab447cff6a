"""``hwdbm bitmap``: dirty bitmaps in files, compared, combined, and in the forms of other programs."""

from collections.abc import Callable
from enum import StrEnum
from functools import reduce
from pathlib import Path
from typing import Annotated, Any

import typer

from hwdbm import files
from hwdbm.bitmap import DirtyBitmap
from hwdbm.cli import guest, options, parse
from hwdbm.cli.output import busy, hexadecimal
from hwdbm.cli.streams import json_text, result
from hwdbm.errors import BitmapError, ImageError
from hwdbm.files import open_regular
from hwdbm.image import exchange
from hwdbm.image.compare import differing
from hwdbm.image.ram import kind_of_ram, open_ram

_MOST_FILE = 1 << 30  # bytes of a table of ranges, or of a pagemap
_SHOWN = 10  # runs that are printed


class Form(StrEnum):
    """How a bitmap is written."""

    KVM = "kvm"
    RANGES = "ranges"
    CRIU = "criu"


_File = Annotated[
    Path,
    typer.Argument(
        parser=options.parser(parse.path), metavar="FILE", help="A bitmap: little-endian 64-bit words, page 0 in bit 0."
    ),
]
_Files = Annotated[
    list[Path],
    typer.Argument(parser=options.parser(parse.path), metavar="FILE", help="Bitmaps of the same number of pages."),
]
_Pages = Annotated[
    int | None,
    typer.Option(
        "--pages",
        parser=options.parser(parse.whole(0, 1 << 40)),
        metavar="NUMBER",
        help="Pages that the bitmap stands for; by default 64 for each word, since a file doesn't say it.",
    ),
]
_Output = Annotated[
    Path,
    typer.Option(
        "--output", parser=options.parser(parse.path), metavar="FILE", help="Write the result, in KVM's layout."
    ),
]
_PageSize = Annotated[
    int, typer.Option(parser=options.parser(parse.page_size), metavar="SIZE", help="The page that a bit stands for.")
]
_Base = Annotated[
    int,
    typer.Option(
        "--base",
        parser=options.parser(parse.address),
        metavar="ADDRESS",
        help="The address of page 0: of the guest for ranges, of the process for CRIU.",
    ),
]

_SHOW = """Examples:

\b
    hwdbm bitmap show dirty/slot0.bitmap --pages 262144
        --base 0x40000000
"""
_DIFF = """Examples:

  The pages in which two files of guest memory differ:

\b
    hwdbm bitmap diff --memory before.ram after.ram --output slot0.bitmap

  The same of two migration files of QEMU with mapped-ram:

\b
    hwdbm bitmap diff --memory one.mig two.mig --block pc.ram

  The pages that one of two bitmaps has, and the other has not:

\b
    hwdbm bitmap diff one.bitmap two.bitmap
"""
_RESCALE = """Examples:

  A log of pages of 64K, for a consumer that counts in 4K:

\b
    hwdbm bitmap rescale slot0.bitmap --from 64K --to 4K --output fine.bitmap
"""
_CONVERT = """Examples:

  Cloud Hypervisor's table of memory ranges, and back:

\b
    hwdbm bitmap convert slot0.bitmap --to ranges --base 0x40000000
        --output slot0.ranges
    hwdbm bitmap convert slot0.ranges --from ranges --base 0x40000000
        --pages 262144 --output slot0.bitmap
"""


def _combined(name: str) -> str:
    return f"Examples:\n\n\b\n    hwdbm bitmap {name} one.bitmap two.bitmap --output result.bitmap\n"


def show(
    file: _File,
    pages: _Pages = None,
    base: _Base = 0,
    page_size: _PageSize = "4K",  # type: ignore[assignment]  # typer parses it
    as_json: options.Json = False,
) -> None:
    """Say how many pages are dirty, and in which runs."""
    _say(DirtyBitmap.load(file, pages), as_json=as_json, base=base, page_size=page_size)


def diff(
    one: Annotated[Path, typer.Argument(parser=options.parser(parse.path), metavar="A", help="A bitmap or memory.")],
    two: Annotated[Path, typer.Argument(parser=options.parser(parse.path), metavar="B", help="Another one.")],
    memory: Annotated[
        bool,
        typer.Option(
            "--memory",
            help="They are files of guest memory: raw, ELF cores, or QEMU's migration files with mapped-ram.",
        ),
    ] = False,
    block: options.Block = None,
    slot: Annotated[
        Any,
        typer.Option(
            "--slot",
            parser=options.parser(parse.slot),
            metavar="ID:GPA:SIZE",
            help="Of memory whose file says where it is: the part to compare. By default all of it, if it is in one "
            "piece.",
        ),
    ] = None,
    page_size: _PageSize = "4K",  # type: ignore[assignment]  # typer parses it
    pages: _Pages = None,
    output: Annotated[
        Path | None,
        typer.Option(parser=options.parser(parse.path), metavar="FILE", help="Write the result, in KVM's layout."),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Find the pages in which two bitmaps, or two files of guest memory, differ."""
    if memory:
        guest.refuse("with --memory", {"--pages": pages is not None})
        with busy(f"comparing {one} and {two}"):
            found = differing(_ram(one, block, slot), _ram(two, block, slot), page_size)
    else:
        guest.refuse("without --memory", {"--block": block is not None, "--slot": slot is not None})
        found = DirtyBitmap.load(one, pages) ^ DirtyBitmap.load(two, pages)
    _done(found, output, as_json=as_json, page_size=page_size)


def _ram(path: Path, block: str | None, slot: Any) -> Any:
    if slot is not None:
        return open_ram(path, block=block, slots=(slot,))[slot]
    # Of a file that doesn't say where its memory is, the place is no matter.
    parts = open_ram(path, block=block, ram_base=None if kind_of_ram(path) == "elf" else 0)
    if len(parts) > 1:
        raise ImageError(f"{path} has memory in {len(parts)} pieces: say which part (--slot ID:GPA:SIZE)")
    return next(iter(parts.values()))


def _or(first: _File, others: _Files, output: _Output, pages: _Pages = None, as_json: options.Json = False) -> None:
    """Write the pages that are dirty in any of some bitmaps."""
    _combine(lambda a, b: a | b, first, others, output, pages, as_json=as_json)


def _and(first: _File, others: _Files, output: _Output, pages: _Pages = None, as_json: options.Json = False) -> None:
    """Write the pages that are dirty in each of some bitmaps."""
    _combine(lambda a, b: a & b, first, others, output, pages, as_json=as_json)


def minus(first: _File, others: _Files, output: _Output, pages: _Pages = None, as_json: options.Json = False) -> None:
    """Write the pages that are dirty in the first bitmap and in none of the others."""
    _combine(lambda a, b: a - b, first, others, output, pages, as_json=as_json)


def _combine(
    how: Callable[[DirtyBitmap, DirtyBitmap], DirtyBitmap],
    first: Path,
    others: list[Path],
    output: Path,
    pages: int | None,
    *,
    as_json: bool,
) -> None:
    _done(reduce(how, (DirtyBitmap.load(path, pages) for path in (first, *others))), output, as_json=as_json)


def rescale(
    file: _File,
    output: _Output,
    from_: Annotated[
        int,
        typer.Option(
            "--from", parser=options.parser(parse.page_size), metavar="SIZE", help="The page that a bit stands for."
        ),
    ],
    to: Annotated[
        int,
        typer.Option(
            "--to", parser=options.parser(parse.page_size), metavar="SIZE", help="The page that a bit is to stand for."
        ),
    ],
    pages: _Pages = None,
    as_json: options.Json = False,
) -> None:
    """Write a bitmap of pages of another size, in which each byte that was dirty is dirty still."""
    _done(DirtyBitmap.load(file, pages).rescale(from_, to), output, as_json=as_json, page_size=to)


def convert(
    file: Annotated[
        Path, typer.Argument(parser=options.parser(parse.path), metavar="FILE", help="A bitmap, in the form of --from.")
    ],
    output: Annotated[
        Path,
        typer.Option("--output", parser=options.parser(parse.path), metavar="FILE", help="Write it, as --to says."),
    ],
    from_: Annotated[
        Form,
        typer.Option(
            "--from",
            parser=options.parser(parse.choice(Form)),
            metavar="kvm|ranges|criu",
            help="KVM's words; Cloud Hypervisor's table of (address, length) in bytes; or CRIU's pagemap image.",
        ),
    ] = Form.KVM,
    to: Annotated[
        Form,
        typer.Option(
            "--to", parser=options.parser(parse.choice(Form)), metavar="kvm|ranges|criu", help="The form to write."
        ),
    ] = Form.KVM,
    base: _Base = 0,
    page_size: _PageSize = "4K",  # type: ignore[assignment]  # typer parses it
    pages: _Pages = None,
    as_json: options.Json = False,
) -> None:
    """Write a bitmap in the form of another program.

    Ranges that aren't whole pages mark each page that they touch. In CRIU's form dirty pages are present, and the
    others are in the parent.
    """
    if from_ is Form.KVM:
        found = DirtyBitmap.load(file, pages)
    elif pages is None:
        raise typer.BadParameter(f"--from {from_} doesn't say how many pages there are: give --pages")
    else:
        with open_regular(file) as opened:
            raw = opened.read(_MOST_FILE + 1)
        if len(raw) > _MOST_FILE:
            raise BitmapError(f"{file} has more than {_MOST_FILE} bytes")
        read = exchange.from_ranges if from_ is Form.RANGES else exchange.from_pagemap
        try:
            found = read(raw, pages, base, page_size)
        except BitmapError as error:
            raise BitmapError(f"{file}: {error}") from error
    forms: dict[Form, Callable[[], bytes]] = {
        Form.KVM: found.to_bytes,
        Form.RANGES: lambda: exchange.to_ranges(found, base, page_size),
        Form.CRIU: lambda: exchange.to_pagemap(found, base, page_size),
    }
    files.write(output, forms[to]())
    _say(found, as_json=as_json, base=base, page_size=page_size, output=output)


def _done(found: DirtyBitmap, output: Path | None, *, as_json: bool, page_size: int = guest.PAGE) -> None:
    if output is not None:
        found.save(output)
    _say(found, as_json=as_json, page_size=page_size, output=output)


def _say(found: DirtyBitmap, *, as_json: bool, page_size: int, base: int = 0, output: Path | None = None) -> None:
    runs = found.ranges(base=base, unit=page_size)
    shown = [{"gpa": hexadecimal(start), "size": size} for start, size in runs[:_SHOWN].tolist()]
    report: dict[str, Any] = {
        "pages": found.npages,
        "dirty": found.weight(),
        "page-size": page_size,
        "runs": len(runs),
        "first": shown,
    }
    if output is not None:
        report["file"] = str(output)
    done = "" if output is None else f"{output} was written"
    if as_json:
        result(json_text(report), done)
        return
    lines = [f"{report['dirty']} of {found.npages} pages dirty, in {len(runs)} runs"]
    lines += [f"  {run['gpa']}  {run['size']} bytes" for run in shown]
    if len(runs) > _SHOWN:
        lines.append(f"  and {len(runs) - _SHOWN} more")
    result("\n".join(lines), done)


COMMANDS: dict[str, tuple[Callable[..., None], str]] = {
    "show": (show, _SHOW),
    "diff": (diff, _DIFF),
    "or": (_or, _combined("or")),
    "and": (_and, _combined("and")),
    "minus": (minus, _combined("minus")),
    "rescale": (rescale, _RESCALE),
    "convert": (convert, _CONVERT),
}
"""The commands of the group, with their examples."""
