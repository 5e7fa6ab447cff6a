"""The picture of a forecast: the downtime and the total time against the bandwidth."""

from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from hwdbm import files
from hwdbm.forecast.outcome import Forecast
from hwdbm.forecast.predict import replay
from hwdbm.forecast.writes import Writes

_DOES, _NOT, _LIMIT, _LINE = "#0072b2", "#d55e00", "#009e73", "#444444"  # Okabe and Ito's palette
_MIB = 1 << 20
_POINTS, _EACH_WAY = 21, 8.0  # bandwidths that are tried, up to that many times as much and as little
_PLAIN = FuncFormatter(lambda value, _: f"{value:g}")


def draw(path: Path, writes: Writes, *, bandwidth: float, found: Forecast, max_downtime: float, **how: Any) -> None:
    """Draw a forecast, and what it would be at other bandwidths, into a ``.png``. It is replaced."""
    rates = bandwidth * np.geomspace(1 / _EACH_WAY, _EACH_WAY, _POINTS)
    how |= {"max_downtime": max_downtime, "needs": False, "starts": 3}
    curve = [replay(writes, bandwidth=max(float(rate), 1.0), **how) for rate in rates]
    files.write(path, _picture(rates / _MIB, curve, bandwidth / _MIB, found, max_downtime))


def _picture(x: Any, curve: list[Forecast], at: float, found: Forecast, limit: float) -> bytes:
    with mpl.rc_context({"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(10, 4.2), dpi=110)
        FigureCanvasAgg(figure)
        figure.set_layout_engine("constrained")
        down, total = figure.subplots(1, 2)
        _curve(down, x, curve, "downtime", at, found)
        down.axhline(limit * 1e3, color=_LIMIT, linestyle="--", label="limit")
        down.set_title("how long the guest stands still")
        _curve(total, x, curve, "total_time", at, found)
        total.set_title("how long it takes")
        for axes in (down, total):
            axes.legend(frameon=False)
        figure.suptitle("it converges" if found.converges else "it doesn't converge", fontsize=11)
        out = BytesIO()
        figure.savefig(out, format="png")
        return out.getvalue()


def _curve(axes: Axes, x: Any, curve: list[Forecast], name: str, at: float, found: Forecast) -> None:
    value, low, high = (np.array([getattr(getattr(each, name), part) for each in curve]) * 1e3 for part in _PARTS)
    does = np.array([each.converges for each in curve])
    axes.plot(x, value, color=_LINE, linewidth=0.8)
    axes.fill_between(x, low, high, color=_LINE, alpha=0.15, linewidth=0)
    for chosen, color, mark, label in ((does, _DOES, "o", "converges"), (~does, _NOT, "x", "doesn't")):
        if chosen.any():
            axes.scatter(x[chosen], value[chosen], color=color, marker=mark, s=18, label=label, zorder=3)
    axes.axvline(at, color=_LINE, linestyle=":", label="--bandwidth")
    axes.scatter([at], [getattr(found, name).value * 1e3], color=_LINE, s=40, facecolors="none", zorder=4)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("bandwidth, MiB/s")
    axes.set_ylabel("ms")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(_PLAIN)


_PARTS = ("value", "low", "high")
