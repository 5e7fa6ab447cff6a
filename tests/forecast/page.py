"""docs/forecast.md, made from the runs: ``python -P tests/forecast/page.py``; ``--check`` says whether it is."""

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
RUNS = ROOT / "tests" / "data" / "forecast" / "runs.jsonl"
PAGE = ROOT / "docs" / "forecast.md"
TEXT = Path(__file__).with_name("page.md")

Run = dict[str, Any]
KINDS = {
    "pattern": "QEMU, guests that write by patterns",
    "linux": "QEMU, Linux that does real work",
    "own": "this project's own, on /dev/kvm",
}
GOALS = {"total-time": (0.10, 0.25), "downtime": (0.20, 0.50)}
SEEN = 20  # ms: a downtime that isn't mostly luck
WAYS = {
    "forecast": "replay of a trace",
    "remaining/bandwidth": "remaining / bandwidth",
    "geometric": "geometric series",
}


def read(path: Path = RUNS) -> list[Run]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def said(run: Run, way: str, what: str) -> float:
    value = run[way][what]
    return float(value["value"] if isinstance(value, dict) else value)


def completed(run: Run) -> bool:
    return bool(run["happened"]["status"] == "completed")


def error(run: Run, way: str, what: str) -> float | None:
    """Return the relative error of a forecast; None if the migration didn't end, or wasn't said to.

    A downtime of less than a millisecond counts as one.
    """
    if not (completed(run) and run[way]["converges"]):
        return None
    was = run["happened"][what]
    return abs(said(run, way, what) - was) / max(was, 1.0)


def errors(runs: Iterable[Run], way: str, what: str) -> np.ndarray:
    return np.array([found for run in runs if (found := error(run, way, what)) is not None])


def right(runs: Iterable[Run], way: str) -> float:
    """Return in what part of the runs it was right whether the migration converges."""
    return float(np.mean([run[way]["converges"] == completed(run) for run in runs]))


def percent(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.0%}".replace("%", " %") if value < 10 else f"{value:.0f}-fold"


def both(found: np.ndarray) -> str:
    if not found.size:
        return "- | -"
    return f"{percent(float(np.median(found)))} | {percent(float(np.quantile(found, 0.9)))}"


def table(runs: list[Run], ways: dict[str, str], kinds: dict[str, Callable[[Run], bool]]) -> str:
    lines = [
        "| guests | runs | forecast by | converges: right | total time: median | 90 % | downtime: median | 90 % |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, chosen in kinds.items():
        some = [run for run in runs if chosen(run)]
        for number, (way, text) in enumerate(ways.items()):
            known = [run for run in some if way in run]
            if not known:
                continue
            head = f"{name} | {len(known)}" if not number or len(known) != len(some) else f" | {len(known)}"
            total, down = (both(errors(known, way, what)) for what in GOALS)
            lines.append(f"| {head} | {text} | {percent(right(known, way))} | {total} | {down} |")
    return "\n".join(lines)


def by_kind(runs: list[Run]) -> str:
    kinds: dict[str, Callable[[Run], bool]] = {"**all**": lambda run: True}
    for kind, name in KINDS.items():
        kinds[name] = lambda run, kind=kind: run["kind"] == kind
    return table(runs, WAYS, kinds)


def by_guest(runs: list[Run]) -> str:
    names = dict.fromkeys((run["kind"], run["guest"]) for run in runs)
    lines = [
        "| guest | what it does | runs | MB/s | limit, ms | converged | total time | downtime |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for kind, guest in names:
        some = [run for run in runs if (run["kind"], run["guest"]) == (kind, guest)]
        rates, limits = ([run[name] for run in some] for name in ("bandwidth", "max-downtime"))
        total, down = (errors(some, "forecast", what) for what in GOALS)
        medians = " | ".join(percent(float(np.median(each))) if each.size else "-" for each in (total, down))
        lines.append(
            f"| {kind}, {guest} | `{some[0]['what']}` | {len(some)} | {min(rates) / 1e6:g} to {max(rates) / 1e6:g} "
            f"| {min(limits)} to {max(limits)} | {sum(map(completed, some))} of {len(some)} | {medians} |"
        )
    return "\n".join(lines)


def during(runs: list[Run]) -> str:
    """Return the table of what was said from samples; the same runs beside it by replay."""
    flat = [{**run, **run["after"]} for run in runs]
    lines = []
    for stage in ("after pass 1", "after pass 2"):
        some = [run for run in flat if stage in run]
        if some:
            lines.append(
                table(
                    some, {stage: f"samples, {stage}", "forecast": "replay, before it began"}, {stage: lambda run: True}
                )
            )
    if len(lines) == 2:
        lines[1] = "\n".join(lines[1].splitlines()[2:])
    return "\n".join(lines) or "There were no samples."


def luck(runs: list[Run]) -> str:
    """Return a sentence about how far two runs of one guest with one setting lie from each other."""
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        if completed(run):
            names = ("kind", "guest", "bandwidth", "max-downtime", "link")
            groups.setdefault(tuple(run[name] for name in names), []).append(run)
    pairs = [group for group in groups.values() if len(group) > 1]
    if not pairs:
        return "No migration was done twice."
    apart = {}
    for what in GOALS:
        apart[what] = np.array(
            [abs(a["happened"][what] - b["happened"][what]) / max(b["happened"][what], 1.0)
             for group in pairs for i, a in enumerate(group) for b in group[i + 1 :]]
        )  # fmt: skip
    total, down = apart["total-time"], apart["downtime"]
    return (
        f"{len(pairs)} migrations were done more than once, with one guest and one setting. Two of them lie this far\n"
        f"apart, in the median and at the 90th percentile: in total time {percent(float(np.median(total)))} and "
        f"{percent(float(np.quantile(total, 0.9)))},\nin downtime {percent(float(np.median(down)))} and "
        f"{percent(float(np.quantile(down, 0.9)))}. No forecast that says one number for both can do better than\n"
        "about half of that."
    )


def reached(runs: list[Run]) -> str:
    """Return a line for each goal: what it was, and what was reached."""
    lines = ["| goal | asked | reached | |", "| --- | --- | --- | --- |"]

    def add(what: str, asked: float, found: float, good: bool) -> None:
        sign = "at least" if what.startswith("converges") else "at most"
        lines.append(
            f"| {what} | {sign} {percent(asked)} | {percent(found)} | {'reached' if good else '**not reached**'} |"
        )

    rows = [(what.replace("-", " "), what, runs) for what in GOALS]
    seen = [run for run in runs if completed(run) and run["happened"]["downtime"] >= SEEN]
    rows.append((f"downtime of {SEEN} ms or more ({len(seen)} runs)", "downtime", seen))
    for name, what, some in rows:
        found, (middle, high) = errors(some, "forecast", what), GOALS[what]
        m, h = float(np.median(found)), float(np.quantile(found, 0.9))
        add(f"{name}, median error", middle, m, m <= middle)
        add(f"{name}, error at the 90th percentile", high, h, h <= high)
    share = right(runs, "forecast")
    add("converges or not: right", 0.95, share, share >= 0.95)
    return "\n".join(lines)


def inside(runs: list[Run]) -> str:
    """Return how often what happened lay within the interval that was said."""
    parts = []
    for what in GOALS:
        some = [run for run in runs if completed(run) and run["forecast"]["converges"]]
        hits = [run["forecast"][what]["low"] <= run["happened"][what] <= run["forecast"][what]["high"] for run in some]
        parts.append(f"the {what.replace('-', ' ')} in {percent(float(np.mean(hits)))}")
    return f"What happened lay within the interval that was said: {' and '.join(parts)} of those runs."


def clock(runs: list[Run]) -> str:
    """Return a sentence about what QEMU's own clock says of the same forecasts."""
    theirs = [run for run in runs if run["happened"].get("qemu")]
    there = [run | {"happened": run["happened"] | run["happened"]["qemu"]} for run in theirs]
    if not there:
        return ""
    found = errors(there, "forecast", "downtime")
    return (
        f"Beside that one the errors of the downtime would be {percent(float(np.median(found)))} and "
        f"{percent(float(np.quantile(found, 0.9)))}."
    )


def page(runs: list[Run]) -> str:
    loads = [run["load"][0] for run in runs]
    rates, limits = ([run[name] for run in runs] for name in ("bandwidth", "max-downtime"))
    done = [run for run in runs if completed(run) and run["forecast"]["converges"]]
    values = {
        "runs": str(len(runs)),
        "qemu": str(sum(run["kind"] != "own" for run in runs)),
        "own": str(sum(run["kind"] == "own" for run in runs)),
        "converged": str(sum(map(completed, runs))),
        "judged": str(len(done)),
        "load": f"{min(loads):.1f} to {max(loads):.1f}",
        "rates": f"{min(rates) / 1e6:g} to {max(rates) / 1e6:g} MB/s",
        "limits": f"{min(limits)} to {max(limits)} ms",
        "linked": str(sum(run["link"] for run in runs)),
        "took": f"{np.median([run['took'] for run in runs]):.0f} ms",
        "reached": reached(runs),
        "by-kind": by_kind(runs),
        "by-guest": by_guest(runs),
        "during": during(runs),
        "luck": luck(runs),
        "inside": inside(runs),
        "clock": clock(runs),
    }
    text = TEXT.read_text(encoding="utf-8")
    for name, value in values.items():
        text = text.replace("{" + name + "}", value)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=RUNS)
    parser.add_argument("--output", type=Path, default=PAGE)
    parser.add_argument("--check", action="store_true")
    asked = parser.parse_args()
    made = page(read(asked.runs))
    if asked.check:
        if asked.output.read_text(encoding="utf-8") != made:
            sys.exit(f"{asked.output} isn't what the runs say: make it again")
        return
    asked.output.write_text(made, encoding="utf-8")
    print(asked.output)


if __name__ == "__main__":
    main()
