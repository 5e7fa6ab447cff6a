"""What a figure shows, as text: the numbers of its bars, lines and images, its limits, ticks, labels and colours."""

import hashlib
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import Collection, PathCollection, QuadMesh
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch
from matplotlib.ticker import FixedFormatter, FuncFormatter


def drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that gets the text of each figure which is saved; none is drawn."""
    found: list[str] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: found.append("\n".join(_figure(self)) + "\n"))
    return found


def looks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that gets, of each figure which is saved, what it looks like beside that."""
    found: list[str] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: found.append("\n".join(_looks(self)) + "\n"))
    return found


def _figure(figure: Figure) -> Iterator[str]:
    yield f"figure of {_numbers(figure.get_size_inches())} inches, {figure.dpi:g} dpi: {figure.get_suptitle()}"
    for legend in figure.legends:
        yield f"  legend {[text.get_text() for text in legend.get_texts()]}"
        yield f"  of {[to_hex(each.get_facecolor()) for each in legend.get_patches()]}"
    for axes in figure.axes:
        yield from _axes(axes)


def _axes(axes: Axes) -> Iterator[str]:
    grid, spines = axes.get_gridspec(), [name for name, spine in axes.spines.items() if spine.get_visible()]
    if grid is not None:
        yield f"{grid.nrows} by {grid.ncols} of {grid.get_height_ratios()} by {grid.get_width_ratios()}, {spines}"
    yield f"panel {axes.get_title('left') or axes.get_title()!r}, x {axes.get_xlabel()!r}, y {axes.get_ylabel()!r}"
    yield f"  {axes.title.get_size():g} points, {axes.get_xscale()}, {axes.margins()}"
    linear = getattr(axes.yaxis.get_transform(), "linthresh", "")
    yield f"  {axes.get_yscale()}{linear}, {_numbers(axes.get_xlim())} by {_numbers(axes.get_ylim())}"
    for label, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
        ticks, texts = axis.get_majorticklocs(), axis.get_major_formatter()
        length = axis.get_tick_params().get("length", "")
        if isinstance(texts, FixedFormatter):
            yield f"  {label} at {list(texts.seq)}, which are {_numbers(ticks)}"
        if isinstance(texts, FuncFormatter):  # others are matplotlib's choice
            yield f"  {label} at {[texts(tick, 0) for tick in ticks]}, which are {_numbers(ticks)} {length}".rstrip()
    for bar in axes.patches:
        box: Any = bar
        if isinstance(bar, StepPatch):
            values, edges, _ = bar.get_data()
            yield f"  steps {_numbers(values)} at {_numbers(edges)} {to_hex(bar.get_edgecolor())} {bar.get_label()}"
            continue
        yield f"  bar {_numbers([*box.get_xy(), box.get_width(), box.get_height()])} {to_hex(bar.get_facecolor())}"
    for line in axes.lines:
        look = f"{line.get_label()} {to_hex(line.get_color())} {line.get_linestyle()} {line.get_marker()}"
        yield f"  line {_numbers(line.get_xdata())}, {_numbers(line.get_ydata())} {look}"
    for image in axes.images:
        cells: Any = image.get_array()
        if cells.ndim == 3:  # of colours
            yield f"  image over {_numbers(image.get_extent())}"
            for row in cells.tolist():
                yield f"  {' '.join(f'{to_hex(each)}*{len(list(same))}' for each, same in groupby(row))}"
            continue
        colours = [to_hex(image.cmap(image.norm(value))) for value in np.unique(np.ma.compressed(cells))]
        yield f"  image {cells.shape} over {_numbers(image.get_extent())}, limits {_numbers(image.get_clim())}"
        what = _numbers(cells.ravel().tolist()) if cells.size < 64 else hashlib.sha256(cells.tobytes()).hexdigest()
        yield f"  {what} in {colours}"
    for several in axes.collections if axes.get_label() != "<colorbar>" else ():
        yield from _collection(several)
    for text in axes.texts:
        yield f"  {text.get_text()!r} at {_numbers(text.get_position())}, {text.get_size():g} points"
    legend = axes.get_legend()
    if legend:
        place = legend.get_bbox_to_anchor().transformed(axes.transAxes.inverted()).p0.round(4)
        yield f"  legend {[text.get_text() for text in legend.get_texts()]}, {legend._ncols} abreast at {place}"


def _collection(several: Collection) -> Iterator[str]:
    """Yield points, or the corners of areas, or cells by their numbers."""
    label, colours = several.get_label(), several.get_facecolor()
    name = f"{'' if label.startswith('_') else label} {[to_hex(each, keep_alpha=True) for each in colours]}"
    if isinstance(several, QuadMesh):
        cells, corners = np.ma.filled(several.get_array(), -1), several.get_coordinates()
        yield f"  cells {cells.shape}, {_numbers(corners[0, :, 0])} by {_numbers(corners[:, 0, 1])}"
        yield f"  {_numbers(cells.ravel())} {several.get_cmap().name} {_numbers(several.get_clim())}"
    elif isinstance(several, PathCollection):
        mark = len(several.get_paths()[0].vertices), several.get_sizes().tolist(), several.get_zorder()
        yield f"  points {name} {mark}: {_numbers(several.get_offsets().ravel())}"
    else:
        corners = [_numbers(np.unique(path.vertices, axis=0).ravel()) for path in several.get_paths()]
        yield f"  areas {name}: {'; '.join(corners)}"


def _numbers(values: Any) -> str:
    return "[" + " ".join("-" if each is None else f"{each:.6g}" for each in values) + "]"


def _looks(figure: Figure) -> Iterator[str]:
    layout, title = figure.get_layout_engine(), figure._suptitle
    yield f"figure {layout.get() if layout else {}}, title {title.get_size() if title else 0:g} points"
    yield from (f"  legend {each._ncols} abreast, {each.get_frame_on()}" for each in figure.legends)
    for axes in figure.axes:
        place, pad = axes.get_subplotspec(), axes.titleOffsetTrans.get_matrix()[1, 2] * 72 / figure.dpi
        where = "" if place is None else f" in rows {[*place.rowspan]}, columns {[*place.colspan]}"
        yield f"panel {axes.get_title('left') or axes.get_title()!r}{where}, title {pad:g} points above"
        if axes.get_label() == "<colorbar>":
            yield f"  colours beside it, {axes._colorbar_info['pad']:g} away"
        for label, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
            line, size = axis.get_gridlines()[:1], axis.label.get_size()
            grid = [f"{each.get_color()} {each.get_linewidth():g}" for each in line if each.get_visible()]
            ticks = {name: value for name, value in vars(axis.get_major_locator()).items() if _is_plain(value)}
            minor = {name: value for name, value in vars(axis.get_minor_locator()).items() if name == "_subs"}
            yield f"  {label} {size:g} points, grid {grid} {axes.get_axisbelow()}, {ticks} {minor}"
        for each in axes.lines:
            yield f"  line {each.get_label()}: {each.get_linewidth():g}, marks of {each.get_markersize():g}"
        legend = axes.get_legend()
        if legend:
            frame = legend.get_frame_on(), legend.get_in_layout(), legend.borderaxespad
            yield f"  legend {frame}"


def _is_plain(value: Any) -> bool:
    return isinstance(value, bool | int | float)
