"""A counterexample to read: as a table with a column for each actor, and as a diagram."""

import textwrap
from collections.abc import Iterator, Sequence
from html import escape

from hwdbm.races.protocol import Finding

_LEAST = 12  # characters of a column


def _actors(report: Finding) -> list[str]:
    return list(dict.fromkeys(step.actor for step in report.steps))


def _lost(report: Finding) -> str:
    return "" if report.lost_at is None else "the page is lost here: whatever comes next, no end is right"


def timeline(report: Finding, width: int = 80) -> str:
    """Return a counterexample as text: a column for each actor, and one for the shared state that changed.

    Where the columns don't fit, each step is a line with its actor's name.

    Parameters
    ----------
    report : Finding
        What a search found.
    width : int
        Columns of the text.

    Returns
    -------
    str
        Its lines.

    Examples
    --------
    >>> from hwdbm.races import MISTAKES, check
    >>> print(timeline(check(MISTAKES["device-marks-first"].make(True))))
         D                        S                        what changed
      1  sets the page's bit in                            log 1
         log
      2                           takes the bits of log    log 0
      3                           copies x
         ------- the page is lost here: whatever comes next, no end is right -------
      4  the device writes x                               frame:x 7
    <BLANKLINE>
    a write to page x is lost: the copy is old, and nothing says that it is dirty
    """
    actors = _actors(report)
    wide = (width - 5) // (len(actors) + 1) - 2
    if wide < _LEAST:
        return "\n".join(_listed(report, width))

    def row(number: str, cells: Sequence[str]) -> list[str]:
        parts = [textwrap.wrap(cell, wide) or [""] for cell in cells]
        lines = []
        for at in range(max(map(len, parts))):
            texts = (part[at] if at < len(part) else "" for part in parts)
            lines.append(f"{number if at == 0 else '':>3}  " + "  ".join(f"{text:<{wide}}" for text in texts))
        return [line.rstrip() for line in lines]

    lines = row("", [*actors, "what changed"])
    for at, step in enumerate(report.steps):
        cells = [step.text if actor == step.actor else "" for actor in actors]
        lines += row(str(at + 1), [*cells, ", ".join(step.changed)])
        if at == report.lost_at:
            lines += _loss(report, width)
    return "\n".join([*lines, "", *textwrap.wrap(report.wrong, width)])


def _listed(report: Finding, width: int) -> Iterator[str]:
    """Yield the lines of a counterexample on a narrow screen."""
    for at, step in enumerate(report.steps):
        changed = f" [{', '.join(step.changed)}]" if step.changed else ""
        yield from textwrap.wrap(f"{at + 1:>3}  {step.actor}: {step.text}{changed}", width, subsequent_indent="     ")
        if at == report.lost_at:
            yield from _loss(report, width)
    yield ""
    yield from textwrap.wrap(report.wrong, width)


def _loss(report: Finding, width: int) -> list[str]:
    line = f" {_lost(report)} ".center(width - 5, "-")
    if len(line) <= width - 5:
        return ["     " + line]
    return textwrap.wrap(_lost(report), width, initial_indent="---- ", subsequent_indent="---- ")


_STYLE = """
  svg { --ink: #1b1f24; --faint: #8a939d; --box: #eef2f6; --loss: #b3261e; --paper: #ffffff; }
  @media (prefers-color-scheme: dark) {
    svg { --ink: #e6e9ec; --faint: #8a939d; --box: #2a3138; --loss: #ff8a80; --paper: #14181c; }
  }
  text { font: 12px sans-serif; fill: var(--ink); } .head { font-weight: bold; } .loss { fill: var(--loss); }
  .change { font-family: monospace; font-size: 11px; } .paper { fill: var(--paper); }
  .box { fill: var(--box); stroke: var(--faint); } .life { stroke: var(--faint); stroke-dasharray: 3 3; }
  .line { stroke: var(--loss); stroke-width: 2; }
"""


def diagram(report: Finding, title: str = "") -> str:
    """Return a counterexample as an SVG image, which is readable on light and on dark paper.

    Parameters
    ----------
    report : Finding
        What a search found.
    title : str
        What stands above it; the protocol's name by default.

    Returns
    -------
    str
        The image.
    """
    actors = _actors(report)
    column, left, line = 200, 40, 15
    wide = left + column * (len(actors) + 1)
    parts: list[str] = []
    top = 64
    for at, step in enumerate(report.steps):
        texts = textwrap.wrap(step.text, 28)
        changes = textwrap.wrap(", ".join(step.changed), 27)
        tall = line * max(len(texts), len(changes), 1) + 12
        x = left + column * actors.index(step.actor)
        parts.append(_text(left - 10, top + 18, str(at + 1), anchor="end"))
        parts.append(f'<rect class="box" x="{x}" y="{top}" width="{column - 14}" height="{tall - 4}" rx="4"/>')
        parts += [_text(x + 8, top + 16 + line * n, text) for n, text in enumerate(texts)]
        changed = left + column * len(actors)
        parts += [_text(changed, top + 16 + line * n, text, kind="change") for n, text in enumerate(changes)]
        top += tall + 4
        if at == report.lost_at:
            parts.append(f'<line class="line" x1="8" x2="{wide - 8}" y1="{top + 4}" y2="{top + 4}"/>')
            parts.append(_text(left, top + 20, _lost(report), kind="loss"))
            top += 30
    lives = [
        f'<line class="life" x1="{left + column * n + 90}" x2="{left + column * n + 90}" y1="54" y2="{top}"/>'
        for n in range(len(actors))
    ]
    heads = [_text(left + column * n + 8, 48, name, kind="head") for n, name in enumerate([*actors, "what changed"])]
    ending = [
        _text(left, top + 20 + 16 * n, text, kind="loss")
        for n, text in enumerate(textwrap.wrap(report.wrong, wide // 7))
    ]
    tall = top + 28 + 16 * len(ending)
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {tall}" width="{wide}" height="{tall}" '
        f'role="img" aria-label="{escape(report.wrong)}">'
    )
    return "\n".join(
        [
            opening,
            f"<title>{escape(title or report.name)}</title>",
            f"<style>{_STYLE}</style>",
            '<rect class="paper" width="100%" height="100%"/>',
            _text(left, 22, title or report.name, kind="head"),
            *heads,
            *lives,
            *parts,
            *ending,
            "</svg>\n",
        ]
    )


def _text(x: int, y: int, text: str, *, kind: str = "", anchor: str = "") -> str:
    classes = f' class="{kind}"' if kind else ""
    side = f' text-anchor="{anchor}"' if anchor else ""
    return f'<text{classes}{side} x="{x}" y="{y}">{escape(text)}</text>'
