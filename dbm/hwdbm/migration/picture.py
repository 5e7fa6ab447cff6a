"""The picture of a migration: its passes, its bandwidth, its expected downtime, and which memory was dirty when."""

from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator
from numpy.typing import NDArray

from hwdbm import files
from hwdbm.migration.report import Report, mebibytes

# Okabe and Ito's palette, which can be told apart whatever one's colour vision.
_DIRTY, _SENT, _ZERO, _LIMIT, _LINE = "#d55e00", "#0072b2", "#56b4e9", "#009e73", "#444444"
_MIB = 1 << 20
_PLAIN = FuncFormatter(lambda value, _: f"{value:g}")


def draw(path: Path, report: Report) -> None:
    """Draw a migration into a file.

    Parameters
    ----------
    path : Path
        A ``.png``. It is replaced.
    report : Report
        With one pass or more.

    Raises
    ------
    OSError
        If the file can't be written.
    """
    files.write(path, _picture(report))


def _picture(report: Report) -> bytes:
    with mpl.rc_context({"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(12, 8.2), dpi=110)
        FigureCanvasAgg(figure)
        figure.set_layout_engine("constrained", h_pad=0.08, w_pad=0.08)
        grid = figure.add_gridspec(2, 3, height_ratios=(1, 1.15))
        panels: list[Callable[[Axes, Report], None]] = [_amounts, _rates, _downtimes]
        for column, panel in enumerate(panels):
            panel(figure.add_subplot(grid[0, column]), report)
        _map(figure, figure.add_subplot(grid[1, :]), report)
        figure.suptitle(_title(report), fontsize=11)
        out = BytesIO()
        figure.savefig(out, format="png")
        return out.getvalue()


def _title(report: Report) -> str:
    title = f"{mebibytes(report.total)} of guest memory: {report.status} in {report.total_time:.2f} s"
    if report.downtime is not None:
        title += f", downtime {report.downtime * 1e3:,.1f} ms (limit {report.limit * 1e3:g} ms)"
    return title


def _amounts(axes: Axes, report: Report) -> None:
    x = np.array([one.number for one in report.passes])
    page = report.page_size / _MIB
    normal = np.array([one.normal for one in report.passes]) * page
    zero = np.array([one.duplicate for one in report.passes]) * page
    axes.bar(x - 0.2, [one.remaining / _MIB for one in report.passes], 0.4, color=_DIRTY, label="dirty")
    axes.bar(x + 0.2, normal, 0.4, color=_SENT, label="sent")
    if zero.any():
        axes.bar(x + 0.2, zero, 0.4, bottom=normal, color=_ZERO, label="zero")
    if max(one.remaining for one in report.passes) > 50 * report.passes[-1].remaining:
        axes.set_yscale("symlog", linthresh=1)
        axes.yaxis.set_major_formatter(_PLAIN)
    _finish(axes, x, "memory of each pass (MiB)")


def _rates(axes: Axes, report: Report) -> None:
    x = np.array([one.number for one in report.passes])
    axes.plot(x, [one.bandwidth / _MIB for one in report.passes], "o-", color=_SENT, label="bandwidth")
    rates = [(one.number, one.dirty_rate / _MIB) for one in report.passes if one.number > 1]
    if rates:
        axes.plot(*zip(*rates, strict=True), "s-", color=_DIRTY, label="dirtied")
    axes.set_ylim(0, 1.08 * axes.dataLim.ymax or 1)
    throttled = [(one.number, one.throttle) for one in report.passes]
    if any(percent for _, percent in throttled):
        side = axes.twinx()
        side.step(*zip(*throttled, strict=True), where="mid", color=_LINE, linestyle=":", label="throttle (%)")
        side.set_ylim(0, 100)
        side.set_ylabel("throttle (%)")
        side.spines["right"].set_visible(True)
        axes.plot([], [], color=_LINE, linestyle=":", label="throttle (%)")
    _finish(axes, x, "rates (MiB/s)")


def _downtimes(axes: Axes, report: Report) -> None:
    points = [(one.number, one.expected_downtime * 1e3) for one in report.passes if one.expected_downtime is not None]
    if points:
        axes.plot(*zip(*points, strict=True), "o-", color=_SENT, label="expected")
    if report.limit:
        axes.axhline(report.limit * 1e3, color=_LIMIT, linestyle="--", label="limit")
    if report.downtime is not None:
        last = report.passes[-1].number
        axes.plot([last], [report.downtime * 1e3], "*", color=_DIRTY, markersize=12, label="measured")
    values = [value for value in (*(y for _, y in points), report.limit * 1e3, (report.downtime or 0) * 1e3) if value]
    if values:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(_PLAIN)
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axes.yaxis.set_minor_formatter(_PLAIN)
        axes.set_ylim(min(values) / 1.6, max(values) * 1.6)
    _finish(axes, np.array([one.number for one in report.passes]), "downtime (ms)")


def _finish(axes: Axes, x: NDArray[np.int64], title: str) -> None:
    """Give a panel its title, its legend, where no line can be, and its passes."""
    axes.set_title(title, loc="left", pad=20)
    handles, _ = axes.get_legend_handles_labels()
    if handles:
        legend = axes.legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(-0.02, 0.99), borderaxespad=0)
        legend.set_in_layout(False)  # its width is not the panel's
    axes.set_xlabel("pass")
    axes.set_xlim(x[0] - 0.6, x[-1] + 0.6)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12, min_n_ticks=1))
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def _map(figure: Figure, axes: Axes, report: Report) -> None:
    """Draw a row a pass, in which each cell of memory has the colour of how much of it was dirty."""
    passes = report.passes
    cells = np.stack([one.cells for one in passes])
    picture = axes.imshow(
        np.ma.masked_equal(cells, 0),
        aspect="auto",
        interpolation="nearest",
        cmap="viridis_r",
        vmin=0,
        vmax=1,
        extent=(0, report.total / _MIB, passes[-1].number + 0.5, passes[0].number - 0.5),
    )
    axes.set_facecolor("#eeeeee")
    axes.set_title(
        f"which memory was dirty in which pass (a cell is {mebibytes(report.total / cells.shape[1])}; grey: clean)",
        loc="left",
    )
    axes.set_xlabel("guest memory, slot after slot (MiB)")
    axes.set_ylabel("pass")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=12, min_n_ticks=1))
    figure.colorbar(picture, ax=axes, label="dirty part of a cell", pad=0.01)
