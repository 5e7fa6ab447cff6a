"""The picture of a trace: the curve, the working set, and the map of what was written when."""

from io import BytesIO
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from hwdbm import files
from hwdbm.trace.analysis import Analysis

# Okabe and Ito's palette, which can be told apart whatever one's colour vision.
_MEAN, _RANGE, _ALL = "#0072b2", "#56b4e9", "#d55e00"
_MIB = 1 << 20
_PLAIN = FuncFormatter(lambda value, _: f"{value:g}")
_POINTS = 2000  # of a line: more can't be told apart


def draw(path: Path, found: Analysis) -> None:
    """Draw a trace into a file.

    Parameters
    ----------
    path : Path
        A ``.png`` or ``.svg``, which is replaced.
    found : Analysis
        The trace's.

    Raises
    ------
    OSError
        If the file can't be written.
    """
    with mpl.rc_context({"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(12, 8.2), dpi=110)
        FigureCanvasAgg(figure)
        figure.set_layout_engine("constrained", h_pad=0.08, w_pad=0.08)
        grid = figure.add_gridspec(2, 2, height_ratios=(1, 1.3))
        _curve(figure.add_subplot(grid[0, 0]), found)
        _sets(figure.add_subplot(grid[0, 1]), found)
        _map(figure, figure.add_subplot(grid[1, :]), found)
        total = found.npages * found.page_size / _MIB
        figure.suptitle(f"{total:,.1f} MiB of guest memory, {found.pages.size} intervals in {found.seconds:.4g} s")
        out = BytesIO()
        figure.savefig(out, format=path.suffix.removeprefix("."))
    files.write(path, out.getvalue())


def _curve(axes: Axes, found: Analysis) -> None:
    axes.set_title("distinct memory written in a period", loc="left", pad=22)
    axes.set_xlabel("period (s)")
    axes.set_ylabel("MiB")
    if not found.periods:
        return
    scale = found.page_size / _MIB
    x = [each.seconds for each in found.periods]
    axes.fill_between(x, [each.low * scale for each in found.periods], [each.high * scale for each in found.periods],
                      color=_RANGE, alpha=0.4, linewidth=0, label="least to most")  # fmt: skip
    axes.plot(x, [each.pages * scale for each in found.periods], "o-", color=_MEAN, label="mean")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(_PLAIN)
    axes.set_ylim(0, 1.08 * axes.dataLim.ymax or 1)
    axes.grid(color="#dddddd", linewidth=0.6)
    _legend(axes)


def _legend(axes: Axes) -> None:
    """Put the legend where no line can be."""
    axes.legend(frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(-0.02, 0.99), borderaxespad=0)


def _sets(axes: Axes, found: Analysis) -> None:
    axes.set_title("working set", loc="left", pad=22)
    axes.set_xlabel("time (s)")
    axes.set_ylabel("MiB")
    if found.working is None:
        return
    scale, each = found.page_size / _MIB, found.working
    edges = np.linspace(0, each.seconds * each.windows.size, each.windows.size + 1)
    axes.stairs(each.windows * scale, edges, color=_MEAN, label=f"of {each.seconds:.3g} s")
    some = np.unique(np.linspace(0, found.touched.size - 1, min(found.touched.size, _POINTS)).astype(np.int64))
    times = (some + 1) * (found.seconds / found.touched.size)
    axes.plot(times, found.touched[some] * scale, color=_ALL, linestyle="--", label="since the start")
    axes.set_ylim(0, 1.08 * axes.dataLim.ymax or 1)
    axes.grid(color="#dddddd", linewidth=0.6)
    _legend(axes)


def _map(figure: Figure, axes: Axes, found: Analysis) -> None:
    axes.set_title("which memory was written when (grey: not at all)", loc="left")
    axes.set_xlabel("guest memory, slot after slot (MiB)")
    axes.set_ylabel("time (s)")
    axes.set_facecolor("#eeeeee")
    if not found.map.size:
        return
    picture = axes.pcolormesh(
        np.linspace(0, found.npages * found.page_size / _MIB, found.map.shape[1] + 1),
        found.map_times,
        np.ma.masked_equal(found.map, 0),
        cmap="viridis_r",
        vmin=0,
        vmax=1,
        rasterized=True,
    )
    axes.invert_yaxis()
    figure.colorbar(picture, ax=axes, label="part written in an interval", pad=0.01)
