"""``hwdbm inspect``: registers, tables, leaves and slots of an image."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from textwrap import wrap
from typing import Annotated, Any

import numpy as np
import typer

from hwdbm.cli import options, parse
from hwdbm.cli.example import label
from hwdbm.cli.output import columns, hexadecimal, progress
from hwdbm.cli.streams import json_text, result, width
from hwdbm.files import NewFile
from hwdbm.granule import size_name
from hwdbm.image import Image
from hwdbm.image.census import Census, page_states
from hwdbm.image.fill import Filler
from hwdbm.pte import State
from hwdbm.stage2 import Stage2
from hwdbm.vtcr import hafdbs

EPILOG = """Examples:

  What a capture holds:

\b
    hwdbm inspect example:4k_ipa40

  A picture of its slots (needs the extra 'plot'):

\b
    hwdbm inspect example:4k_ipa40 --plot map.png

  A raw image, and only how its tables are:

\b
    hwdbm inspect example:ram --ram-base 0x41000000 --vttbr 0x41000000
        --vtcr 0x806a3558 --json
"""

_LEAVES = (State.READ_ONLY, State.UNTRACKED, State.WRITABLE_CLEAN, State.WRITABLE_DIRTY)
_PAGES = (State.ABSENT, *_LEAVES)
_HAFDBS = ("none", "access flag", "dirty state", "access flag of tables", "log of dirty pages")


def inspect(
    path: Annotated[
        Path,
        typer.Argument(
            parser=options.parser(parse.image),
            metavar="IMAGE",
            autocompletion=options.examples,
            help="A capture (.npz), a raw image of RAM, or an example that hwdbm brings (example:4k_ipa40).",
        ),
    ],
    plot: Annotated[
        Path | None,
        typer.Option(
            parser=options.parser(parse.path),
            metavar="FILE.png|.svg",
            help="Draw a map of the slots' pages by state. Needs the extra 'plot'.",
        ),
    ] = None,
    slot: options.Slots = None,
    ram_base: options.RamBase = None,
    block: options.Block = None,
    vttbr: options.Vttbr = None,
    vtcr: options.Vtcr = None,
    as_json: options.Json = False,
) -> None:
    """Show an image's registers, tables, leaves and slots.

    All tables are read and checked, as harvest does it.
    """
    draw = None if plot is None else _painter(plot)
    image = options.open_for(path, ram_base, vttbr, vtcr, slot, block)
    census = Census()
    stage2s = [image.empty_stage2(slot) for slot in image.slots]
    with progress(label(path)) as visitors:
        image.read(*visitors, census, *(Filler(stage2, image.vtcr) for stage2 in stage2s))
    report = {
        "image": label(path),
        "registers": _registers(image),
        "levels": _levels(image, census),
        "slots": _slots(image, stage2s),
    }
    result(json_text(report) if as_json else _text(report))
    if draw is not None:
        draw(label(path), image, stage2s)


def _painter(plot: Path) -> Callable[[str, Image, Sequence[Stage2]], None]:
    """Return what draws an image; that it can't is found out before the image is read."""
    if plot.suffix not in {".png", ".svg"}:
        raise typer.BadParameter(f"--plot {plot}: .png or .svg")
    if not plot.parent.is_dir():
        raise typer.BadParameter(f"--plot {plot}: there is no folder {plot.parent}")
    from hwdbm.image.picture import draw  # noqa: PLC0415  # matplotlib is an extra of its own

    NewFile(plot).close()
    return partial(draw, plot)


def _registers(image: Image) -> dict[str, Any]:
    values, v = image.registers, image.vtcr
    registers: dict[str, Any] = {
        "VTTBR_EL2": {
            "value": hexadecimal(values.vttbr),
            "BADDR": hexadecimal(image.vttbr.baddr),
            "VMID": image.vttbr.vmid,
            "CnP": int(image.vttbr.cnp),
        },
        "VTCR_EL2": {
            "value": hexadecimal(values.vtcr),
            "granule": str(v.granule),
            "T0SZ": v.t0sz,
            "IPA-bits": v.ipa_bits,
            "SL0": v.sl0,
            "start-level": v.start_level,
            "root-tables": v.root_tables,
            "PA-bits": v.pa_bits,
            "VS": int(v.vs),
            "HA": int(v.ha),
            "HD": int(v.hd),
            "DS": int(v.ds),
            "HAFT": int(v.haft),
            "HDBSS": int(v.hdbss),
            "hardware-DBM": "on" if v.hw_dbm else "off",
        },
    }
    if values.hcr is not None:
        registers["HCR_EL2"] = {"value": hexadecimal(values.hcr), "VM": values.hcr & 1}
    if values.mmfr0 is not None:
        registers["ID_AA64MMFR0_EL1"] = {
            "value": hexadecimal(values.mmfr0),
            "PARange": values.mmfr0 & 0xF,
        }
    if values.mmfr1 is not None:
        level = hafdbs(values.mmfr1)
        registers["ID_AA64MMFR1_EL1"] = {
            "value": hexadecimal(values.mmfr1),
            "HAFDBS": level,
            "hardware-updates": _HAFDBS[level] if level < len(_HAFDBS) else "unknown",
        }
    return registers


def _levels(image: Image, census: Census) -> list[dict[str, Any]]:
    levels = []
    for level, count in census.levels.items():
        leaves = {state.label: int(count.states[state]) for state in _LEAVES}
        levels.append(
            {
                "level": level,
                "tables": count.tables,
                "table-bytes": count.tables * image.granule.page_size,
                "entry-size": size_name(1 << image.granule.shift(level)),
                "absent": int(count.states[State.ABSENT]),
                "table-entries": int(count.states[State.TABLE]),
                "leaves": sum(leaves.values()),
                **leaves,
                "contiguous": count.contiguous,
                "old": count.old,
            }
        )
    return levels


def _slots(image: Image, stage2s: list[Stage2]) -> list[dict[str, Any]]:
    slots = []
    for slot, stage2 in zip(image.slots, stage2s, strict=True):
        states = np.zeros(len(State), dtype=np.int64)
        for chunk in page_states(stage2, slot):
            states += np.bincount(chunk, minlength=len(State))
        page_size = slot.finest(image.granule)
        slots.append(
            {
                "id": slot.id,
                "gpa": hexadecimal(slot.gpa),
                "size": slot.size,
                "page-size": page_size,
                "pages": slot.size // page_size,
                **{state.label: int(states[state]) for state in _PAGES},
            }
        )
    return slots


def _text(report: dict[str, Any]) -> str:
    lines = [report["image"], ""]
    for name, fields in report["registers"].items():
        rest = "  ".join(f"{key}={value}" for key, value in fields.items() if key != "value")
        lines.append(f"{name:<17}{fields['value']}")
        indent = " " * (17 if width() >= 60 else 2)
        lines += wrap(rest, min(width(), 80), break_on_hyphens=False, initial_indent=indent, subsequent_indent=indent)
    lines.append("")
    heads = ["level", "tables", "bytes", "leaf", "leaves", *(s.label for s in _LEAVES)]
    rows: list[list[object]] = [[*heads, "contiguous", "old", "to tables", "absent"]]
    for at in report["levels"]:
        row = [at["level"], at["tables"], at["table-bytes"], at["entry-size"], at["leaves"]]
        row += [at[state.label] for state in _LEAVES]
        rows.append([*row, at["contiguous"], at["old"], at["table-entries"], at["absent"]])
    lines.append(columns(rows))
    if report["slots"]:
        rows = [["slot", "gpa", "page", "pages", *(state.label for state in _PAGES)]]
        for slot in report["slots"]:
            row = [slot["id"], slot["gpa"], size_name(slot["page-size"]), slot["pages"]]
            rows.append(row + [slot[state.label] for state in _PAGES])
        lines += ["", columns(rows, left=(0, 1, 2))]
    return "\n".join(lines)
