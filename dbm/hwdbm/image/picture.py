"""A map of memslots: every page, or run of pages, in the colour of its state."""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from hwdbm import files
from hwdbm.errors import ImageError
from hwdbm.granule import size_name
from hwdbm.image import Image, Slot
from hwdbm.image.census import page_states
from hwdbm.pte import State
from hwdbm.stage2 import Stage2

# Okabe and Ito's palette, which can be told apart whatever one's colour vision.
_COLOURS = {
    State.ABSENT: "#e8e8e8",
    State.READ_ONLY: "#56b4e9",
    State.UNTRACKED: "#f0e442",
    State.WRITABLE_CLEAN: "#009e73",
    State.WRITABLE_DIRTY: "#d55e00",
}
_MOST_CELLS = 1 << 16  # of a panel; of more no eye has anything
_MOST_PANELS = 16


@dataclass(frozen=True, slots=True)
class Map:
    """The states of a slot's pages, folded into rows of cells.

    Parameters
    ----------
    cells : (rows, columns) int16 array
        Values of `hwdbm.pte.State`, -1 after the last page.
    pages_per_cell : int
        A cell has the state of its dirtiest page: writable-dirty before writable-clean before
        untracked before read-only before absent.
    page_size : int
        Bytes.
    counts : (7,) int64 array
        Pages by `hwdbm.pte.State`.
    """

    cells: NDArray[np.int16]
    pages_per_cell: int
    page_size: int
    counts: NDArray[np.int64]


def map_of(stage2: Stage2, slot: Slot, most_cells: int = _MOST_CELLS) -> Map:
    """Return the map of a slot, of `most_cells` cells or fewer.

    Examples
    --------
    >>> m = map_of(Stage2(1000), Slot(0, 0, 1000 * 4096), most_cells=256)
    >>> m.cells.shape, m.pages_per_cell, m.counts.tolist()
    ((8, 32), 4, [1000, 0, 0, 0, 0, 0, 0])
    """
    page_size = slot.finest(stage2.granule)
    npages = slot.size // page_size
    per_cell = 1
    while npages > per_cell * most_cells:
        per_cell *= 2
    count = -(-npages // per_cell)
    cells, counts = np.zeros(count, dtype=np.int16), np.zeros(len(State), dtype=np.int64)
    at = 0
    for states in page_states(stage2, slot):
        counts += np.bincount(states, minlength=len(State))
        first, lead = divmod(at, per_cell)
        starts = np.arange(-lead, states.size, per_cell).clip(0)
        dirtiest = np.maximum.reduceat(states, starts)  # the states are in that order
        part = cells[first : first + dirtiest.size]
        np.maximum(part, dirtiest, out=part)
        at += states.size
    width = 32
    while width * width < 4 * count and width < 512:
        width *= 2
    rows = -(-count // width)
    folded = np.full(rows * width, -1, dtype=np.int16)
    folded[:count] = cells
    return Map(folded.reshape(rows, width), per_cell, page_size, counts)


def draw(path: Path, title: str, image: Image, stage2s: Sequence[Stage2]) -> None:
    """Draw the slots of an image into a PNG or SVG file, by its ending.

    Parameters
    ----------
    path : Path
        The file, which is replaced.
    title : str
        The title of the picture.
    image : Image
        The image that the slots are part of.
    stage2s : sequence of Stage2
        The leaves of each slot, in the order of ``image.slots``.

    Raises
    ------
    ImageError
        If there are no slots.
    OSError
        If the file can't be written.
    """
    if not image.slots:
        raise ImageError("there are no slots to draw")
    pairs = list(zip(image.slots, stage2s, strict=True))[:_MOST_PANELS]
    maps = [(slot, map_of(stage2, slot)) for slot, stage2 in pairs]
    # Inches: rows of cells are as high as they are wide, but for a least and a most.
    heights = [min(max(9 * m.cells.shape[0] / m.cells.shape[1], 0.5), 5.0) for _, m in maps]
    with mpl.rc_context({"font.size": 9, "axes.titlesize": 9.5}):
        figure = Figure(figsize=(11, sum(heights) + 0.95 * len(heights) + 1.1), dpi=110)
        FigureCanvasAgg(figure)
        figure.set_layout_engine("constrained", h_pad=0.08)
        panels = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
        for panel, (slot, of) in zip(panels, maps, strict=False):
            _panel(panel, slot, of)
        what = f"{title}: {image.granule} granule, {image.vtcr.ipa_bits}-bit IPA"
        if len(maps) < len(image.slots):
            what += f" (the first {len(maps)} of {len(image.slots)} slots)"
        figure.suptitle(what, fontsize=11)
        total = sum((of.counts for _, of in maps), np.zeros(len(State), dtype=np.int64))
        figure.legend(
            handles=[
                Patch(facecolor=colour, edgecolor="#555555", linewidth=0.5, label=f"{state.label} ({total[state]:,})")
                for state, colour in _COLOURS.items()
            ],
            loc="outside lower center",
            ncols=len(_COLOURS),
            frameon=False,
        )
        picture = BytesIO()
        figure.savefig(picture, format=path.suffix[1:])
    files.write(path, picture.getvalue())


def _panel(panel: Axes, slot: Slot, of: Map) -> None:
    rows, width = of.cells.shape
    colours = ["#ffffff", *(_COLOURS.get(State(i), "#ffffff") for i in range(len(State)))]
    panel.imshow(
        of.cells + 1,
        cmap=ListedColormap(colours),
        vmin=-0.5,
        vmax=len(colours) - 0.5,
        interpolation="nearest",
        aspect="auto",
    )
    per_row = of.pages_per_cell * width * of.page_size
    pages = slot.size // of.page_size
    cell = f"{of.pages_per_cell} pages" if of.pages_per_cell > 1 else "1 page"
    if of.pages_per_cell > 1:
        cell += ", the dirtiest shows"
    counts = ", ".join(f"{of.counts[state]:,} {state.label}" for state in _COLOURS if of.counts[state])
    panel.set_title(
        f"slot {slot.id}: {pages:,} x {size_name(of.page_size)} pages, a cell is {cell}\n{counts}",
        loc="left",
    )
    panel.set_ylabel("gpa")
    panel.set_xlabel("pages from the row's gpa", labelpad=1)
    step = 1
    while rows > 8 * step:
        step *= 2
    panel.set_yticks(list(range(0, rows, step)))
    panel.yaxis.set_major_formatter(lambda y, _: f"{slot.gpa + int(y) * per_row:#x}")
    panel.set_xticks([i * width // 8 for i in range(8)])
    panel.xaxis.set_major_formatter(lambda x, _: f"{int(x) * of.pages_per_cell:#x}")
    panel.tick_params(length=2.5)
