"""``hwdbm bench``: what the engine costs on this machine, beside floors measured in the same run."""

from typing import Annotated, Any

import typer

from hwdbm.bench import BENCHMARKS, Row, Setup, run
from hwdbm.cli import options, parse
from hwdbm.cli.output import busy, columns
from hwdbm.cli.streams import json_text, result

EPILOG = """Times are in ms, of the processor where one thread works alone. The C loop calls a function for each
descriptor, as a kernel's walker does.

Examples:

  A quick look at the kernels alone:

\b
    hwdbm bench harvest --memory 4G --repeat 3

  The whole table; with the defaults, two minutes or so:

\b
    hwdbm bench --memory 1G --repeat 1
"""


def bench(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME",
            autocompletion=options.words(BENCHMARKS),
            help=f"Which: {', '.join(BENCHMARKS)}; all by default.",
        ),
    ] = None,
    memory: Annotated[
        int,
        typer.Option(parser=options.parser(parse.size), metavar="SIZE", help="The guest memory."),
    ] = "64G",  # type: ignore[assignment]  # typer parses it
    repeat: Annotated[
        int,
        typer.Option(
            parser=options.parser(parse.whole(1)),
            metavar="NUMBER",
            help="How many times to measure each; the smallest time counts.",
        ),
    ] = 9,
    as_json: options.Json = False,
) -> None:
    """Measure the engine, and the stream of a migration, here and now.

    Each figure stands beside a floor, measured in turn with it: compare ratios, not times. A limit is what
    the project holds itself to for 64G on a quiet machine.
    """
    unknown = sorted(set(names or ()) - set(BENCHMARKS))
    if unknown:
        raise typer.BadParameter(
            f"there is no benchmark {', '.join(map(repr, unknown))}: there are {', '.join(BENCHMARKS)}"
        )
    if not memory or memory % (2 << 20):
        raise typer.BadParameter(f"--memory is a multiple of 2M, not {memory}")
    if memory > 1 << 52:
        raise typer.BadParameter(f"--memory is 4096T at most, what 52 bits of address have, not {memory}")
    rows = []
    with busy("measuring") as update:
        for row in run(Setup(memory >> 12, repeat), names or None):
            rows.append(row)
            update(f"measured {row.what}: {row.ratio:.2f} times {row.floor}")
    result(json_text([_record(row) for row in rows]) if as_json else _table(rows))


def _table(rows: list[Row]) -> str:
    heads = ("what", "ms", "times", "floor", "limit", "kept")
    return columns([heads, *(_cells(row) for row in rows)], left=(0, 3, 5))


def _cells(row: Row) -> tuple[str, ...]:
    if row.unit == "byte":
        amount = f"{row.cost / (1 << 20):.0f} MiB"
    else:
        amount = f"{row.cost * 1e3:.3f}" if row.cost < 1 else f"{row.cost * 1e3:,.0f}"
    limit = "" if row.limit is None else f"{row.limit:g}"
    verdict = {True: "yes", False: "no", None: ""}[row.met]
    return row.what, amount, f"{row.ratio:.3f}", row.floor, limit, verdict


def _record(row: Row) -> dict[str, Any]:
    cost, scale = ("time", 1e3) if row.unit == "s" else ("bytes", 1)
    record: dict[str, Any] = {"what": row.what, cost: row.cost * scale}
    record |= {"floor": row.floor, f"floor-{cost}": row.floor_cost * scale, "ratio": row.ratio}
    if row.limit is not None:
        record |= {"limit": row.limit, "met": row.met}
    return record
