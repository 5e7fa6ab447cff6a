"""The picture of a chain: what each snapshot holds, how much that is, and what later ones have anew."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from hwdbm import files
from hwdbm.bitmap import DirtyBitmap
from hwdbm.snapshot.manifest import Snapshot

# Okabe and Ito's palette, which can be told apart whatever one's colour vision.
_HELD, _ANEW, _NONE = "#0072b2", "#e69f00", "#eeeeee"
_COLUMNS, _MOST_ROWS = 512, 60


def draw(
    path: Path, snapshots: Sequence[Snapshot], pages: Sequence[dict[int, DirtyBitmap]], disk: Sequence[int]
) -> None:
    """Draw a chain into a file.

    Parameters
    ----------
    path : Path
        A ``.png`` or ``.svg``, which is replaced.
    snapshots : sequence of Snapshot
        The oldest first; of very many, the newest are drawn.
    pages : sequence of dict
        What each holds, by slot.
    disk : sequence of int
        Bytes that each takes.

    Raises
    ------
    OSError
        If the file can't be written.
    """
    snapshots, pages, disk = snapshots[-_MOST_ROWS:], pages[-_MOST_ROWS:], disk[-_MOST_ROWS:]
    height = 1.6 + 0.3 * max(len(snapshots), 1)
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(12, height), dpi=110)
        FigureCanvasAgg(figure)
        figure.set_layout_engine("constrained")
        where, sizes = figure.subplots(1, 2, width_ratios=(3, 1), sharey=True)
        rows = range(len(snapshots))
        image = np.ones((max(len(snapshots), 1), _COLUMNS, 3))
        for row in rows:
            image[row] = _row(snapshots, pages, row)
        where.imshow(image, aspect="auto", interpolation="nearest", extent=(0, 1, len(image) - 0.5, -0.5))
        names = {each.id: each.name.partition("-")[0] for each in snapshots}
        labels = [f"{names[each.id]} {_kind(each, names)}" for each in snapshots]
        where.set_yticks(list(rows), labels)
        where.set_xticks([])
        where.set_xlabel("memory, by address")
        where.set_title("pages held")
        held = [sum(each.weight() for each in one.values()) for one in pages]
        mebibytes = [count * each.layout.page_size / (1 << 20) for count, each in zip(held, snapshots, strict=True)]
        anew = [_anew(snapshots, pages, row) * each.layout.page_size / (1 << 20) for row, each in enumerate(snapshots)]
        sizes.barh(list(rows), mebibytes, color=_HELD)
        sizes.barh(list(rows), anew, color=_ANEW)
        for row in rows:
            sizes.text(mebibytes[row], row, f" {disk[row] / (1 << 20):.1f} on disk", va="center", fontsize=7)
        sizes.margins(x=0.3)
        sizes.set_xlabel("MiB")
        sizes.set_title("sizes")
        legend = [Patch(color=_HELD, label="held"), Patch(color=_ANEW, label="held, and anew in a difference to it")]
        figure.legend(handles=legend, loc="outside lower center", ncols=2, frameon=False)
        out = BytesIO()
        figure.savefig(out, format=path.suffix.removeprefix("."))
    files.write(path, out.getvalue())


def _kind(snapshot: Snapshot, names: dict[str, str]) -> str:
    return "full" if snapshot.parent is None else f"to {names.get(snapshot.parent, '?')}"


def _children(snapshots: Sequence[Snapshot], row: int) -> list[int]:
    return [other for other, each in enumerate(snapshots) if each.parent == snapshots[row].id]


def _anew(snapshots: Sequence[Snapshot], pages: Sequence[dict[int, DirtyBitmap]], row: int) -> int:
    counts = [sum((pages[row][slot] & pages[other][slot]).weight() for slot in pages[row]) for other in
              _children(snapshots, row)]  # fmt: skip
    return max(counts, default=0)


def _row(snapshots: Sequence[Snapshot], pages: Sequence[dict[int, DirtyBitmap]], row: int) -> NDArray[np.float64]:
    """Return the colours of a snapshot's cells: how much of each it holds, and how much of that is held anew."""
    held = _cells(snapshots[row], pages[row])
    anew = np.zeros_like(held)
    for other in _children(snapshots, row):
        both = {slot: pages[row][slot] & pages[other][slot] for slot in pages[row]}
        anew = np.maximum(anew, _cells(snapshots[row], both))
    none, blue, orange = (np.array(mpl.colors.to_rgb(colour)) for colour in (_NONE, _HELD, _ANEW))
    strength = np.sqrt(held)[:, None]  # one page of many is to be seen
    share = np.divide(anew, held, out=np.zeros_like(held), where=held > 0)[:, None]
    return np.asarray(none * (1 - strength) + strength * (blue * (1 - share) + orange * share))


def _cells(snapshot: Snapshot, pages: dict[int, DirtyBitmap]) -> NDArray[np.float64]:
    """Return how much of each of `_COLUMNS` parts of memory is set, 0 to 1."""
    edges = np.linspace(0, sum(slot.npages for slot in snapshot.layout.slots), _COLUMNS + 1).astype(np.int64)
    set_, first = np.zeros(_COLUMNS), 0
    for slot in snapshot.layout.by_address:
        ends = np.clip(edges - first, 0, slot.npages)
        for column in np.flatnonzero(np.diff(ends)).tolist():
            set_[column] += pages[slot.id].count(int(ends[column]), int(ends[column + 1] - ends[column]))
        first += slot.npages
    widths = np.maximum(np.diff(edges), 1)
    return np.asarray(np.minimum(set_ / widths, 1))
