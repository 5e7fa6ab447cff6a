"""The pictures of the site, drawn from real data: what the verbs do, what a TLB does, the imports, a migration.

Each function returns an SVG as text. Colours are variables of the page's style sheet, so that they follow its theme; a
picture that stands alone (`standalone`) brings its own.
"""

import ast
import json
import tomllib
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

import hwdbm
from hwdbm import DirtyBitmap, Stage2, pte, walker
from hwdbm.machine import Machine

ROOT = Path(__file__).parents[2]
STYLE = """
svg.picture {
  --ink: #1f2328; --line: #57606a; --paper: #fff; --box: #eef1f4; --clean: #d4e7f8; --dirty: #fbd8c4; --bad: #b3261e;
}
@media (prefers-color-scheme: dark) {
  svg.picture {
    --ink: #e6edf3; --line: #9aa7b4; --paper: #0d1117; --box: #262d36; --clean: #123a5c; --dirty: #6a3310;
    --bad: #ff9a8f;
  }
}
"""
RULES = """
svg.picture text { font: 13px system-ui, sans-serif; fill: var(--ink); }
svg.picture text.small { font-size: 12px; }
svg.picture text.strong { font-weight: 600; }
svg.picture text.bad { fill: var(--bad); font-weight: 600; }
svg.picture .box { fill: var(--box); stroke: var(--line); }
svg.picture .clean { fill: var(--clean); stroke: var(--line); }
svg.picture .dirty { fill: var(--dirty); stroke: var(--line); }
svg.picture .paper { fill: var(--paper); stroke: none; }
svg.picture .line { fill: none; stroke: var(--line); stroke-width: 1.3; }
svg.picture .grid { fill: none; stroke: var(--line); stroke-width: 0.5; stroke-dasharray: 2 4; }
svg.picture .hardware { fill: none; stroke: var(--bad); stroke-width: 2.2; }
svg.picture .head { fill: var(--line); stroke: none; }
svg.picture .hot { fill: var(--bad); stroke: none; }
"""


class Drawing:
    """An SVG that grows."""

    def __init__(self, name: str, width: int, height: int, title: str, description: str) -> None:
        self.name, self.width, self.height = name, width, height
        self.parts = [
            f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-desc">{escape(description)}</desc>'
        ]
        for kind in ("head", "hot"):
            self.parts.append(
                f'<marker id="{name}-{kind}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
                f'markerUnits="userSpaceOnUse" orient="auto"><path class="{kind}" d="M0 0 8 4 0 8z"/></marker>'
            )

    def box(self, x: float, y: float, width: float, height: float, kind: str = "box", corner: float = 4) -> None:
        self.parts.append(
            f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{corner:g}"/>'
        )

    def text(self, x: float, y: float, text: str, kind: str = "", anchor: str = "middle") -> None:
        self.parts.append(f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>')

    def label(self, x: float, y: float, text: str) -> None:
        """Write a text with paper behind it, so that a line may pass there."""
        self.box(x - 3.5 * len(text) - 3, y - 12, 7 * len(text) + 6, 16, "paper", 0)
        self.text(x, y, text, "small")

    def path(self, path: str, kind: str = "line", *, arrow: bool = True) -> None:
        head = f' marker-end="url(#{self.name}-{"hot" if kind == "hardware" else "head"})"' if arrow else ""
        self.parts.append(f'<path class="{kind}" d="{path}"{head}/>')

    def svg(self) -> str:
        """Return it, for a page that has the style."""
        return (
            f'<svg class="picture" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            f'width="{self.width}" height="{self.height}" role="img" '
            f'aria-labelledby="{self.name}-title {self.name}-desc">' + "".join(self.parts) + "</svg>"
        )


def standalone(svg: str) -> str:
    """Return a picture that brings its colours, and paper, for where no page does."""
    first, rest = svg.split(">", 1)
    return f'{first}>\n<style>{STYLE}{RULES}</style>\n<rect class="paper" width="100%" height="100%"/>\n{rest}\n'


# --- the states of a leaf ----------------------------------------------------------------------------------

_STATES = {
    "absent": 0,
    "read-only": pte.make_leaf(0x4000_0000, 3, writable=False),
    "untracked": pte.make_leaf(0x4000_0000, 3, writable=True),
    "writable-clean": pte.make_leaf(0x4000_0000, 3, dbm=True),
    "writable-dirty": pte.make_leaf(0x4000_0000, 3, dbm=True) | pte.S2AP_W,
}
_VERBS: dict[str, Callable[[Stage2], object]] = {
    "guest write": lambda s2: walker.guest_write(s2, 0),
    "enable_dbm": Stage2.enable_dbm,
    "harvest": Stage2.harvest,
    "clean": lambda s2: s2.clean(~DirtyBitmap(1)),
    "disable_dbm": Stage2.disable_dbm,
    "wrprotect": lambda s2: s2.wrprotect(0, 1),
    "write fault": lambda s2: s2.allow_at(np.array([0])),
    "map": lambda s2: s2.map(0, 1, pfn=0x40000),
    "map, dbm": lambda s2: s2.map(0, 1, pfn=0x40000, dbm=True),
    "unmap": lambda s2: s2.unmap(0, 1),
}


def transitions() -> dict[tuple[str, str], list[str]]:
    """Return which verbs take a leaf from one state to another, by doing it."""
    found: dict[tuple[str, str], list[str]] = {}
    for verb, run in _VERBS.items():
        for state, descriptor in _STATES.items():
            if verb.startswith("map") and state != "absent":
                continue  # it replaces what is there, as unmap and map do
            s2 = Stage2(1)
            s2.map(0, 1, pfn=0x40000, level=3, writable=True)
            s2.level(3)[0] = descriptor
            if not descriptor:
                s2 = Stage2(1)
            run(s2)
            after = pte.state(int(s2.level(3)[0]), 3).label
            if after != state:
                found.setdefault((state, after), []).append(verb)
    return found


def leaf_states() -> str:
    """Draw the states of a leaf, and who takes it from one to the next."""
    moves = transitions()
    at = {
        "absent": (10, 150),
        "untracked": (226, 150),
        "writable-clean": (442, 150),
        "writable-dirty": (658, 150),
        "read-only": (442, 16),
    }
    wide, high = 128, 52
    bits = {
        "absent": "V=0",
        "read-only": "DBM=0 S2AP[1]=0",
        "untracked": "DBM=0 S2AP[1]=1",
        "writable-clean": "DBM=1 S2AP[1]=0",
        "writable-dirty": "DBM=1 S2AP[1]=1",
    }
    # How each move is drawn, and where its name goes. A move that isn't here, or isn't made, stops the build.
    ways = {
        ("absent", "untracked"): ("M138 176H224", (182, 170)),
        ("untracked", "writable-clean"): ("M354 168H440", (397, 160)),
        ("writable-clean", "untracked"): ("M442 186H356", (399, 204)),
        ("writable-clean", "writable-dirty"): ("M570 168H656", (613, 158)),
        ("writable-dirty", "writable-clean"): ("M658 186H572", (615, 204)),
        ("writable-dirty", "untracked"): ("M736 202V244H274V204", (400, 248)),
        ("absent", "writable-clean"): ("M74 202V280H506V204", (182, 284)),
        ("untracked", "read-only"): ("M274 150V32H440", (274, 84)),
        ("read-only", "untracked"): ("M442 54H322V148", (380, 58)),
        ("writable-clean", "read-only"): ("M506 150V70", (506, 116)),
        ("writable-dirty", "read-only"): ("M722 150V42H572", (722, 100)),
    }
    gone = {move for move, verbs in moves.items() if verbs == ["unmap"]}
    drawn = {move: verbs for move, verbs in moves.items() if move not in gone}
    if set(drawn) != set(ways) or {state for state, _ in gone} != set(_STATES) - {"absent"}:
        raise ValueError(f"the verbs make other moves than are drawn: {set(drawn) ^ set(ways)}, {gone}")
    said = "; ".join(f"from {a} to {b} by {' or '.join(verbs)}" for (a, b), verbs in drawn.items())
    d = Drawing(
        "leaf-states",
        796,
        300,
        "The five states of a leaf, and who takes it from one to the next",
        f"The MMU alone takes a leaf from writable-clean to writable-dirty, when the guest writes. Software: {said}; "
        "from any state to absent by unmap, which saves what the leaf recorded.",
    )
    for move, (path, (x, y)) in ways.items():
        verbs = drawn[move]
        hardware = verbs == ["guest write"]
        d.path(path, "hardware" if hardware else "line")
        name = ", ".join(verbs)
        if hardware:
            d.text(x, y - 14, "guest write:", "bad")
            d.text(x, y + 1, "the MMU", "bad")
        else:
            d.label(x, y, name)
    for state, (x, y) in at.items():
        kind = {"writable-clean": "clean", "writable-dirty": "dirty"}.get(state, "box")
        d.box(x, y, wide, high, kind)
        d.text(x + wide / 2, y + 22, state, "strong")
        d.text(x + wide / 2, y + 40, bits[state], "small")
    d.text(20, 40, "unmap: from any state to absent", "small", "start")
    return d.svg()


# --- the stale entry ---------------------------------------------------------------------------------------


def _story(*, flush: bool) -> list[tuple[str, str, str, int, str]]:
    """Return what a machine says after each step: the step, the TLB's entry, the leaf, memory's value, the copy's."""
    page, gpa, steps = 7, 7 * 4096, []
    with Machine(thp=False) as machine:
        slot = machine.add_memslot(1 << 20, gpa=0)
        machine.start_log()
        cpu, leaves, memory = machine.vcpus[0], machine.log.stage2(slot.id), machine.memory(slot.id)
        cached = ("none", "read-only", "clean", "dirty")
        copied = ""

        def note(step: str) -> None:
            entry = cached[int(cpu.tlb[slot.id].lookup(np.array([page]))[0])]
            leaf = pte.state(int(leaves.level(3)[page]), 3).label
            steps.append((step, entry, leaf, int(memory[gpa]), copied))

        def store(value: int) -> None:
            cpu.store(np.array([gpa]), np.array([value], dtype=np.uint64))

        def harvest() -> str:
            nonlocal copied
            found = leaves.harvest()
            return "finds the page" if page in found else "finds nothing"

        store(1)
        note("guest writes 1")
        note(f"harvest {harvest()}")
        steps[-1] = (steps[-1][0], steps[-1][1], pte.state(int(leaves.level(3)[page]), 3).label, *steps[-1][3:])
        if flush:
            machine.flush(slot, 0, slot.npages)
            note("flush")
        else:
            note("no flush")
        copied = str(memory[gpa])
        note("copy the page")
        store(2)
        note("guest writes 2")
        found = harvest()
        if found == "finds the page":
            copied = str(memory[gpa])
        note(f"harvest {found}" + (", copied" if copied == "2" else ""))
    return steps


def stale_entry() -> str:
    """Draw harvest, flush and copy on a timeline, and the stale entry that loses a page where the flush is missing."""
    stories = {"harvest, flush, copy": _story(flush=True), "the flush is missing": _story(flush=False)}
    lost = stories["the flush is missing"][-1]
    kept = stories["harvest, flush, copy"][-1]
    if (kept[3], kept[4], lost[3], lost[4]) != (2, "2", 2, "1"):
        raise ValueError(f"the machine tells another story: {stories}")
    d = Drawing(
        "stale-entry",
        760,
        400,
        "Harvest, flush, copy: and a page that is lost where the flush is missing",
        "Six steps of a modelled machine, twice. With the flush, the second write finds a clean leaf, is recorded, and "
        "is copied: the copy is 2. Without it, the TLB still has the leaf as dirty, so the second write goes through "
        "it unrecorded, the next harvest finds nothing, and the copy stays 1 while memory is 2.",
    )
    for row, (name, steps) in enumerate(stories.items()):
        top = 22 + row * 196
        d.text(8, top, name, "strong", "start")
        for line, label in enumerate(("the vCPU's TLB", "the leaf", "memory", "the copy")):
            d.text(8, top + 66 + line * 28, label, "small", "start")
        for column, (step, entry, leaf, value, copy) in enumerate(steps):
            x, wide = 112 + column * 108, 102
            first, _, second = step.partition(" finds ")
            if second:
                first, second = f"{first} finds", second.removeprefix("the ").replace("page, copied", "page: copied")
            d.text(x + wide / 2, top + 20 if second else top + 28, first, "small")
            if second:
                d.text(x + wide / 2, top + 36, second, "bad" if second == "nothing" and column == 5 else "small")
            wrong = row == 1 and column >= 4
            cells = ((entry, entry), (leaf.removeprefix("writable-"), leaf), (str(value), "box"), (copy or "-", "box"))
            for line, (text, kind) in enumerate(cells):
                y = top + 48 + line * 28
                shade = {"dirty": "dirty", "writable-dirty": "dirty", "clean": "clean", "writable-clean": "clean"}
                d.box(x, y, wide, 25, shade.get(kind, "box"))
                bad = wrong and ((line == 0 and column == 4) or (line == 3 and column == 5))
                stale = wrong and line == 0 and column == 4
                d.text(x + wide / 2, y + 17, "dirty: stale" if stale else text, "strong" if bad else "small")
    d.text(112 + 5 * 108 + 51, 22 + 196 + 176, "lost: 1 is not 2", "bad")
    return d.svg()


# --- the house ---------------------------------------------------------------------------------------------


def _imports() -> dict[str, set[str]]:
    """Return which rooms each room imports, from the sources."""
    package = Path(hwdbm.__file__).parent
    rooms: dict[str, set[str]] = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package).with_suffix("").parts
        room = parts[0]
        if room == "__init__":
            continue
        into = rooms.setdefault(room, set())
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                names = [f"{node.module}.{each.name}" for each in node.names]
            elif isinstance(node, ast.Import):
                names = [each.name for each in node.names]
            for name in names:
                pieces = name.split(".")
                if pieces[0] == "hwdbm" and len(pieces) > 1:
                    into.add(pieces[1])
    known = set(rooms)
    homes = {"DirtyBitmap": "bitmap", "DirtyLog": "dirtylog", "Granule": "granule", "Lease": "dirtylog"}
    homes |= {"Memslot": "memslot", "Stage2": "stage2"}
    return {room: {homes.get(each, each) for each in into} & known - {room} for room, into in rooms.items()}


def house() -> str:
    """Draw the rooms of the package by layer, from the contract of the imports, and what each imports."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        contract = tomllib.load(file)["tool"]["importlinter"]["contracts"][0]
    rooms = _imports()
    layers = [
        [each for each in (name.strip(" ()") for name in layer.split("|")) if each in rooms]
        for layer in contract["layers"]
    ]
    layers = [layer for layer in layers if layer]
    order = {room: number for number, layer in enumerate(layers) for room in layer}
    for room, into in rooms.items():
        for other in into:
            if room in order and other in order and order[other] <= order[room]:
                raise ValueError(f"{room} imports {other}, which isn't below it")
    top, step, left, width = 14, 44, 232, 440
    d = Drawing(
        "house",
        760,
        top + step * len(layers) + 6,
        "The rooms of the package: each imports only from those below it",
        "From the top: " + "; ".join(", ".join(layer) for layer in layers) + ".",
    )
    says = {
        "cli": "the command",
        "bench": "measuring, and tools for tests",
        "races": "every interleaving",
        "migration": "what moves and keeps VMs",
        "arm": "an emulated Arm machine",
        "machine": "VMs: modelled, read, real",
        "vm": "what every VM is",
        "dirtylog": "KVM's calls, leases, protocol",
        "walker": "what the right answer is",
        "stage2": "leaves, and the verbs on them",
        "kernels": "passes over arrays",
        "pte": "the only one that knows bits",
        "memslot": "slots and their rules",
        "bitmap": "KVM's layout",
    }
    for number, layer in enumerate(layers):
        y = top + number * step
        wide = (width - 10 * (len(layer) - 1)) / len(layer)
        for place, room in enumerate(layer):
            x = left + place * (wide + 10)
            kind = (
                "dirty"
                if room in {"machine", "image", "kvm", "arm"}
                else "clean"
                if room in {"stage2", "kernels"}
                else "box"
            )
            d.box(x, y, wide, 32, kind)
            d.text(x + wide / 2, y + 20, room, "strong" if len(layer) < 4 else "small")
        below = {other for room in layer for other in rooms[room]}
        d.text(left - 12, y + 20, next((says[room] for room in layer if room in says), ""), "small", "end")
        if below:
            d.text(left + width + 12, y + 20, f"uses {len(below)}", "small", "start")
        if number + 1 < len(layers):
            d.path(f"M{left + width / 2} {y + 32}V{y + step - 1}")
    return d.svg()


# --- a migration -------------------------------------------------------------------------------------------


def passes() -> str:
    """Draw a migration's passes: what each had to send, and how long it took. The data are `hwdbm migrate --json`'s."""
    report = json.loads((ROOT / "docs" / "pictures" / "migration.json").read_text(encoding="utf-8"))
    rows, limit = report["passes"], report["downtime-limit"]
    total, mib = sum(row["time"] for row in rows), 1 << 20
    d = Drawing(
        "passes",
        760,
        330,
        "The passes of a migration",
        "; ".join(
            f"pass {row['pass']}: {row['remaining'] / mib:.1f} MiB in {row['time']:.0f} ms"
            + (f", expected downtime {row['expected-downtime']:.0f} ms" if "expected-downtime" in row else "")
            for row in rows
        )
        + f". The last is sent with the guest paused, since it fits into {limit:.0f} ms.",
    )
    left, right, base, high = 60, 744, 190, 160
    most = rows[0]["remaining"] / mib
    d.text(left - 8, base - high + 4, f"{most:.0f}", "small", "end")
    d.text(left - 8, base, "0", "small", "end")
    d.text(14, base - high / 2, "MiB", "small", "start")
    at = 0.0
    for row in rows:
        x = left + at / total * (right - left)
        wide = max(row["time"] / total * (right - left), 3)
        tall = max(row["remaining"] / mib / most * high, 2)
        last = row is rows[-1]
        d.box(x, base - tall, wide, tall, "dirty" if last else "clean", 0)
        at += row["time"]
    d.path(f"M{left} {base}H{right}", arrow=False)
    d.text(left, base + 18, "0 s", "small", "start")
    d.text(right, base + 18, f"{total / 1e3:.1f} s", "small", "end")
    d.text(
        (left + right) / 2,
        base + 18,
        "time: a bar is a pass, as wide as it took and as high as what it was to send",
        "small",
    )
    heads = ("pass", "to send MiB", "time ms", "expected downtime ms", "")
    columns = (90, 200, 310, 470, 570)
    for x, head in zip(columns, heads, strict=True):
        d.text(x, base + 48, head, "strong")
    for number, row in enumerate(rows):
        y = base + 68 + number * 17
        expected = f"{row['expected-downtime']:.0f}" if "expected-downtime" in row else "-"
        cells = (str(row["pass"]), f"{row['remaining'] / mib:.1f}", f"{row['time']:.0f}", expected)
        for x, cell in zip(columns, cells, strict=False):
            d.text(x, y, cell, "small")
        if row is rows[-1]:
            d.text(columns[4], y, f"fits into {limit:.0f}: guest paused", "small", "start")
    return d.svg()


# --- numbers over commits ----------------------------------------------------------------------------------


HISTORY = ROOT / "docs" / "pictures" / "history.json"


def history() -> str:
    """Draw the main ratios at the landmarks, from what `make asv-history` wrote; say so where it wrote none yet."""
    rows = json.loads(HISTORY.read_text(encoding="utf-8")) if HISTORY.exists() else []
    rows = [row for row in rows if row["ratios"]]
    if not rows:
        return (
            "<p>The landmarks were not measured yet, so there is no picture of their ratios: <code>make "
            "asv-history</code> measures them, on a machine that does nothing else, and <code>make docs</code> draws "
            "it here then.</p>"
        )
    names = list(dict.fromkeys(name for row in rows for name in row["ratios"]))
    most = max(value for row in rows for value in row["ratios"].values()) * 1.1
    left, right, top, base = 60, 744, 16, 186
    table = base + 44
    d = Drawing(
        "history",
        760,
        table + 48 + 17 * len(rows),
        "The main ratios at the landmarks of main",
        "; ".join(f"{row['what']}: " + ", ".join(f"{k} {v:.2f}" for k, v in row["ratios"].items()) for row in rows),
    )
    for line in range(int(most) + 1):
        y = base - line / most * (base - top)
        d.path(f"M{left} {y:.1f}H{right}", "grid", arrow=False)
        d.text(left - 8, y + 4, str(line), "small", "end")
    step = (right - left) / max(len(rows), 1)
    for number, row in enumerate(rows):
        middle = left + (number + 0.5) * step
        d.text(middle, base + 18, row["commit"], "small")
        for place, name in enumerate(names):
            value = row["ratios"].get(name)
            if value is not None:
                wide = step * 0.8 / len(names)
                tall = value / most * (base - top)
                x = middle - step * 0.4 + place * wide
                d.box(x, base - tall, wide - 3, tall, ("clean", "dirty", "box", "line")[place % 4], 0)
                d.text(x + wide / 2 - 1, base - tall - 4, "abcd"[place], "small")
    for place, name in enumerate(names):
        d.text(left + place * 170, table, f"{'abcd'[place]}: {name}", "small", "start")
    columns = [left + 400 + place * 90 for place in range(len(names))]
    d.text(left, table + 24, "times the floor", "strong", "start")
    for x, letter in zip(columns, "abcd", strict=False):
        d.text(x, table + 24, letter, "strong")
    for number, row in enumerate(rows):
        y = table + 44 + 17 * number
        what = row["what"] if len(row["what"]) <= 44 else f"{row['what'][:43]}…"
        d.text(left, y, f"{row['commit']} {what}", "small", "start")
        for x, name in zip(columns, names, strict=True):
            value = row["ratios"].get(name)
            d.text(x, y, "-" if value is None else f"{value:.2f}", "small")
    return d.svg()


# --- forecasts beside what happened ------------------------------------------------------------------------

_FORECASTS = ROOT / "tests" / "data" / "forecast" / "runs.jsonl"
_GUESTS = {"pattern": "guests of patterns", "linux": "Linux", "own": "our own"}


def forecasts() -> str:
    """Draw what was forecast against what was: a mark for each migration, on logarithmic axes."""
    runs = [json.loads(line) for line in _FORECASTS.read_text(encoding="utf-8").splitlines()]
    runs = [run for run in runs if run["happened"]["status"] == "completed" and run["forecast"]["converges"]]
    drawing = Drawing(
        "forecasts", 720, 400, "Forecast against measured",
        "Two squares with logarithmic axes, total time and downtime. Each migration is a mark, whose height is what "
        "was forecast. Most lie within a quarter of the diagonal, and in the second square within a half.",
    )  # fmt: skip
    for left, what, low, high, near in ((60, "total-time", 100, 20_000, 0.25), (415, "downtime", 1, 2_000, 0.5)):
        _scatter(drawing, left, runs, what, (low, high), near)
    for number, (kind, text) in enumerate(_GUESTS.items()):
        x = 120 + 200 * number
        _mark(drawing, x, 385, kind)
        drawing.text(x + 12, 389, text, anchor="start")
    return drawing.svg()


def _scatter(
    drawing: Drawing, left: int, runs: list[dict[str, Any]], what: str, ends: tuple[int, int], near: float
) -> None:
    side, top = 280, 30
    low, high = ends

    def at(value: float) -> float:
        return side * float(np.log(np.clip(value, low, high) / low) / np.log(high / low))

    drawing.text(left + side / 2, 20, f"{what.replace('-', ' ')}, ms", "strong")
    drawing.box(left, top, side, side, "box", 0)
    bottom = top + side
    for power in range(5):
        value = 10**power
        if low <= value <= high:
            drawing.path(f"M{left + at(value):.1f} {top}V{bottom}", "grid", arrow=False)
            drawing.path(f"M{left} {bottom - at(value):.1f}H{left + side}", "grid", arrow=False)
            drawing.text(left + at(value), bottom + 16, f"{value:,}", "small")
            drawing.text(left - 4, bottom - at(value) + 4, f"{value:,}", "small", "end")
    for factor in (1 - near, 1.0, 1 + near):
        points = [(at(value), at(value * factor)) for value in (low / min(factor, 1), high / max(factor, 1))]
        (a, b), (c, d) = points
        kind = "line" if factor == 1 else "grid"
        drawing.path(f"M{left + a:.1f} {bottom - b:.1f}L{left + c:.1f} {bottom - d:.1f}", kind, arrow=False)
    drawing.text(left + side / 2, bottom + 34, "was", "small")
    drawing.text(left + 8, top + 16, "forecast", "small", "start")
    for run in runs:
        _mark(drawing, left + at(run["happened"][what]), bottom - at(run["forecast"][what]["value"]), run["kind"])


def _mark(drawing: Drawing, x: float, y: float, kind: str) -> None:
    shapes = {
        "pattern": f"M{x - 4:.1f} {y:.1f}a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z",
        "linux": f"M{x - 4:.1f} {y - 4:.1f}h8v8h-8z",
        "own": f"M{x:.1f} {y - 5:.1f}l5 9h-10z",
    }
    drawing.path(shapes[kind], {"pattern": "clean", "linux": "dirty", "own": "box"}[kind], arrow=False)


DRAWN = {
    "forecasts": forecasts,
    "history": history,
    "leaf-states": leaf_states,
    "stale-entry": stale_entry,
    "house": house,
    "passes": passes,
}
