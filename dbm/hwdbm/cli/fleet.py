"""``hwdbm fleet``: drain a host or a rack by forecast, against the naive orders."""

from collections.abc import Callable
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Annotated, Any

import typer

from hwdbm.cli import options, parse
from hwdbm.cli.output import busy, columns, milliseconds
from hwdbm.cli.streams import json_text, result
from hwdbm.errors import some
from hwdbm.files import NewFile
from hwdbm.fleet import Drained, Ending, Fleet, drain, read_plan, tabulate
from hwdbm.fleet.forecasts import Forecasts

_MISMATCH = 3  # the exit status
_MIB = 1 << 20

EPILOG = """Examples:

  Drain a host of the example in a clone: in which order, with which shares, and what stays:

\b
    hwdbm fleet docs/examples/fleet/plan.json --drain h0 # exit status 3

  A rack, with a picture:

\b
    hwdbm fleet docs/examples/fleet/plan.json --drain-rack r0
        --plot drain.svg # exit status 3
"""


def fleet(
    plan: Annotated[
        Path,
        typer.Argument(parser=options.parser(parse.path), metavar="FILE", help="The fleet: hosts, links and VMs."),
    ],
    hosts: Annotated[
        list[str] | None,
        typer.Option("--drain", metavar="NAME", help="A host to be drained. Give the option once for each host."),
    ] = None,
    rack: Annotated[str | None, typer.Option("--drain-rack", metavar="NAME", help="Drain all hosts of a rack.")] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            parser=options.parser(parse.whole(0, 4096)),
            metavar="NUMBER",
            help="Processes that make the forecasts, on Dask (extra 'fleet'); 0 for none but this one. By default none "
            "for up to 256 VMs, and for more one for each processor.",
            show_default=False,
        ),
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="The scheduler of another Dask cluster, whose workers find hwdbm and the traces where they are here.",
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            parser=options.parser(parse.whole(0, (1 << 64) - 1)),
            metavar="NUMBER",
            help="Seed of the orders that are tried at random.",
        ),
    ] = 0,
    plot: Annotated[
        Path | None,
        typer.Option(
            parser=options.parser(parse.path),
            metavar="FILE.png",
            help="Draw the migrations over time, and what the links carry; .png or .svg. Needs the extra 'plot'.",
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Drain a host or a rack: order, concurrency and shares of the links, by forecast.

    Each VM is forecast at many bandwidths, by its trace or its samples. The best plan found is
    shown against the naive ones: one by one as listed, and all at once. What can't be moved within
    its limit of downtime stays, and the reason is given. Exit status 3 says that a VM stays.
    """
    if not hosts and rack is None:
        raise typer.BadParameter("give --drain or --drain-rack")
    if scheduler is not None and workers is not None:
        raise typer.BadParameter("--workers is for a cluster of our own, and --scheduler for another")
    draw = None if plot is None else _painter(plot)
    found = read_plan(plan)
    leaving = list(dict.fromkeys([*(hosts or []), *_of_rack(found, rack)]))
    model = Forecasts(found.engine)
    with busy("forecasting") as update:
        curves = tabulate(
            found, leaving, model, workers=workers, scheduler=scheduler,
            told=lambda done, of: update(f"forecasting: {done} of {of} VMs"),
        )  # fmt: skip
        update("comparing plans")
        drained = drain(found, leaving, curves, seed=seed)
    written = ""
    if draw is not None:
        draw(found, drained)
        written = f"{plot} was written"
    limits = {each.name: (each.max_downtime, model.limit(each)) for each in found.guests}
    if as_json:
        result(json_text(_as_json(str(plan), drained, limits)), written)
    else:
        result(_text(drained, limits), written)
    if drained.left:
        raise typer.Exit(_MISMATCH)


def _of_rack(found: Fleet, rack: str | None) -> list[str]:
    if rack is None:
        return []
    hosts = [host.name for host in found.hosts if host.rack == rack]
    if not hosts:
        there = f"there is {some(found.racks)}" if found.racks else "the plan has none"
        raise typer.BadParameter(f"--drain-rack: no host stands in rack {rack!r}; {there}")
    return hosts


def _painter(plot: Path) -> Callable[[Fleet, Drained], None]:
    if plot.suffix not in {".png", ".svg"}:
        raise typer.BadParameter(f"--plot {plot}: .png or .svg")
    from hwdbm.fleet.picture import draw  # noqa: PLC0415  # matplotlib is an extra of its own

    NewFile(plot).close()
    return partial(draw, plot)


Limits = dict[str, tuple[float, float]]
"""By VM, the limit of the plan, and that which its engine is to be given; seconds."""


def _as_json(name: str, drained: Drained, limits: Limits) -> dict[str, Any]:
    moves = [
        {
            "vm": move.guest, "from": move.source, "to": move.destination, "start": _ms(move.start),
            "end": _ms(move.end), "downtime": _ms(move.downtime), "limit": _ms(limits[move.guest][0]),
            "max-downtime": _ms(limits[move.guest][1]), "guaranteed": round(move.guaranteed),
            "least-share": round(move.least), "mean-share": round(move.mean),
        }
        for move in drained.moves
    ]  # fmt: skip
    left = [
        {"vm": each.guest, "host": each.host, "why": each.why}
        | ({} if each.max_downtime is None else {"needs": {"max-downtime": _ms(each.max_downtime)}})
        for each in drained.left
    ]
    steps = [
        {"time": _ms(each.time), "shares": [{"vm": vm, "bandwidth": round(share)} for vm, share in each.shares]}
        for each in drained.steps
    ]
    return {
        "plan": name,
        "hosts": list(drained.hosts),
        "moves": moves,
        **({} if drained.at_once is None else {"at-once": drained.at_once}),
        "left": left,
        "steps": steps,
        "chosen": _ending(drained.ending),
        "naive": [_ending(each) for each in drained.naive],
        "bound": _ms(drained.bound),
        "tried": drained.tried,
    }


def _ending(ending: Ending) -> dict[str, Any]:
    times = {"makespan": _ms(ending.makespan), "sum-of-ends": _ms(ending.completions)}
    return {"name": ending.name, "moved": ending.moved, "stuck": list(ending.stuck)} | (
        times if isfinite(ending.makespan) else {}
    )


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)


def _text(drained: Drained, limits: Limits) -> str:
    parts = []
    if drained.moves:
        rows: list[list[object]] = [["vm", "from", "to", "start", "end", "guaranteed", "mean", "downtime", "limit"]]
        rows += [
            [
                move.guest, move.source, move.destination, f"{move.start:.1f}", f"{move.end:.1f}",
                f"{move.guaranteed / _MIB:,.1f}", f"{move.mean / _MIB:,.1f}", f"{move.downtime * 1e3:,.0f}",
                milliseconds(limits[move.guest][0]),
            ]
            for move in drained.moves
        ]  # fmt: skip
        units = ("", "", "", "s", "s", "MiB/s", "MiB/s", "ms", "ms")
        parts.append(columns(rows, left=(0, 1, 2), units=units))
    if drained.left:
        parts.append("\n".join(f"{each.guest} stays on {each.host}: {each.why}" for each in drained.left))
    endings = [["plan", "moved", "ends after s", "mean end s", "never end"]]
    for at, each in enumerate((drained.ending, *drained.naive)):  # the best may be a naive one
        ends = isfinite(each.makespan)
        mean = each.completions / each.moved if ends and each.moved else 0.0
        name = each.name if at else f"best: {each.name}"
        endings.append(
            [
                name, str(each.moved), f"{each.makespan:,.1f}" if ends else "", f"{mean:,.1f}" if ends else "",
                str(len(each.stuck)),
            ]
        )  # fmt: skip
    parts.append(columns(endings))
    if drained.moves:
        parts.append(f"{drained.tried} plans were compared. None can end before {drained.bound:,.1f} s.")
    return "\n\n".join(parts)
