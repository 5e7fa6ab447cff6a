"""What a figure shows, as text: the numbers of its bars, lines and images, its limits, ticks, labels and colours."""

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter


def drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that gets the text of each figure which is saved; none is drawn."""
    found: list[str] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: found.append("\n".join(_figure(self)) + "\n"))
    return found


def _figure(figure: Figure) -> Iterator[str]:
    yield f"figure of {_numbers(figure.get_size_inches())} inches, {figure.dpi:g} dpi: {figure.get_suptitle()}"
    for legend in figure.legends:
        yield f"  legend {[text.get_text() for text in legend.get_texts()]}"
        yield f"  of {[to_hex(each.get_facecolor()) for each in legend.get_patches()]}"
    for axes in figure.axes:
        yield from _axes(axes)


def _axes(axes: Axes) -> Iterator[str]:
    yield f"panel {axes.get_title('left')!r}, x {axes.get_xlabel()!r}, y {axes.get_ylabel()!r}"
    linear = getattr(axes.yaxis.get_transform(), "linthresh", "")
    yield f"  {axes.get_yscale()}{linear}, {_numbers(axes.get_xlim())} by {_numbers(axes.get_ylim())}"
    for label, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
        ticks, texts = axis.get_majorticklocs(), axis.get_major_formatter()
        length = axis.get_tick_params().get("length", "")
        if isinstance(texts, FuncFormatter):  # others are matplotlib's choice
            yield f"  {label} at {[texts(tick, 0) for tick in ticks]}, which are {_numbers(ticks)} {length}".rstrip()
    for bar in axes.patches:
        box: Any = bar
        yield f"  bar {_numbers([*box.get_xy(), box.get_width(), box.get_height()])} {to_hex(bar.get_facecolor())}"
    for line in axes.lines:
        look = f"{line.get_label()} {to_hex(line.get_color())} {line.get_linestyle()} {line.get_marker()}"
        yield f"  line {_numbers(line.get_xdata())}, {_numbers(line.get_ydata())} {look}"
    for image in axes.images:
        cells: Any = image.get_array()
        colours = [to_hex(image.cmap(image.norm(value))) for value in np.unique(np.ma.compressed(cells))]
        yield f"  image {cells.shape} over {_numbers(image.get_extent())}, limits {_numbers(image.get_clim())}"
        what = _numbers(cells.ravel().tolist()) if cells.size < 64 else hashlib.sha256(cells.tobytes()).hexdigest()
        yield f"  {what} in {colours}"
    legend = axes.get_legend()
    if legend:
        yield f"  legend {[text.get_text() for text in legend.get_texts()]}"


def _numbers(values: Any) -> str:
    return "[" + " ".join("-" if each is None else f"{each:.6g}" for each in values) + "]"
