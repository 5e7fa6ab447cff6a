"""The picture of a drain: the migrations over time, and how full the links are."""

from io import BytesIO
from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hwdbm import files
from hwdbm.fleet.plan import Fleet
from hwdbm.fleet.planner import Drained, links_between

# Okabe and Ito's palette, which can be told apart whatever one's colour vision.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_GREY, _LINK = "#999999", "#08519c"
_MOST_ROWS, _MOST_LINKS = 60, 12


def draw(path: Path, fleet: Fleet, drained: Drained) -> None:
    """Draw a drain into a file.

    Parameters
    ----------
    path : Path
        A ``.png`` or ``.svg``, which is replaced.
    fleet : Fleet
        The fleet.
    drained : Drained
        The plan; of very many migrations, the longest are drawn.

    Raises
    ------
    OSError
        If the file can't be written.
    """
    moves = sorted(drained.moves, key=lambda move: move.start - move.end)[:_MOST_ROWS]
    moves.sort(key=lambda move: (move.start, move.end))
    height = 3.6 + 0.22 * len(moves)
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(11, height), dpi=110)
        FigureCanvasAgg(figure)
        figure.set_layout_engine("constrained")
        bars, links = figure.subplots(2, 1, sharex=True, height_ratios=(max(0.22 * len(moves), 0.5), 2))
        places = {host: at for at, host in enumerate(dict.fromkeys(move.destination for move in moves))}
        named = set()
        for row, move in enumerate(moves):
            at = places[move.destination]
            label = f"to {move.destination}" if at < len(_COLOURS) else "to others"
            bars.barh(
                row, move.end - move.start, left=move.start, height=0.7,
                color=_COLOURS[at] if at < len(_COLOURS) else _GREY, label=None if label in named else label,
            )  # fmt: skip
            named.add(label)
        bars.set_yticks(range(len(moves)), [move.guest for move in moves])
        bars.invert_yaxis()
        title = f"{', '.join(drained.hosts[:6])}: {len(drained.moves)} VMs in {drained.ending.makespan:,.1f} s"
        bars.set_title(title if not drained.left else f"{title}; {len(drained.left)} stay")
        _links(links, fleet, drained)
        if moves:
            bars.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
        out = BytesIO()
        figure.savefig(out, format=path.suffix.removeprefix("."))
    files.write(path, out.getvalue())


def _links(axes: Axes, fleet: Fleet, drained: Drained) -> None:
    """Draw what part of each link is used, those that carry the most alone."""
    ways = {move.guest: links_between(fleet, move.source, move.destination) for move in drained.moves}
    width = {link.name: link.bandwidth for link in fleet.links}
    times, used = [], {name: list[float]() for name in width}
    shares: dict[str, float] = {}
    carried = dict.fromkeys(width, 0.0)
    for step in drained.steps:
        for vm, share in step.shares:
            for link in ways[vm]:
                carried[link] += share - shares.get(vm, 0.0)
            shares[vm] = share
        times.append(step.time)
        for name, values in used.items():
            values.append(min(max(carried[name], 0.0) / width[name], 1.0))
    busiest = sorted((name for name in used if any(used[name])), key=lambda name: -sum(used[name]))[:_MOST_LINKS]
    spans = [(start, end - start) for start, end in pairwise(times)]
    for row, name in enumerate(busiest):
        shades = [(*mpl.colors.to_rgb(_LINK), part) for part in used[name][:-1]]
        axes.broken_barh(spans, (row - 0.35, 0.7), facecolors=shades)
    axes.set_yticks(range(len(busiest)), busiest)
    axes.invert_yaxis()
    axes.set_title("how full the busiest links are: white is empty", fontsize=9)
    axes.set_xlabel("seconds")
