"""Numbers over commits, by asv: `make asv-history` and `make asv-compare`.

``publish`` runs the suite at the landmarks, each built in its own environment, has asv make its site in build/asv, and
writes the main ratios to docs/pictures/history.json, from which the page on performance draws.

``compare`` runs the suites of the harvest, the log and the stream at HEAD and at the last landmark, interleaved, in one
run, and prints what moved by more than 1.3. It fails where a value that `track_` counts got worse, which doesn't
jitter, unless ``accepted`` has a line that says why.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from math import isfinite
from pathlib import Path

from asv.config import Config
from asv.results import Results, iter_results

HERE = Path(__file__).parent
PICTURE = HERE.parent / "docs" / "pictures" / "history.json"
FACTOR = 1.3
SUITES = [  # those of the harvest, the log and the stream, as far as minutes go
    r"--bench=^engine\.Harvest\.(time_harvest|time_sum|track_\w+)\((0\.0|0\.01|0\.5), 'fused'\)",
    r"--bench=^log\.(Get|Pass)\.\w+\(0\.01, ",
    r"--bench=^migration\.Stream\.track_first_pass",
]
COUNTS = {"unit", "leaves", "words", "flushes", "bytes"}  # of which there are as many each time
RATIOS = {  # what the picture shows: a time over the floor's, in the same run
    "harvest, clean": ("engine.Harvest.time_harvest", "engine.Harvest.time_sum", ("0.0", "'fused'")),
    "harvest, 1 % dirty": ("engine.Harvest.time_harvest", "engine.Harvest.time_sum", ("0.01", "'fused'")),
    "a pass of GET, 1 % dirty": ("log.Pass.time_pass", "log.Pass.time_sum", ("0.01", "'whole'")),
    "stream over a Unix socket": ("migration.Stream.track_first_pass", None, ("'unix'",)),
}


def landmarks() -> list[tuple[str, str]]:
    """Return the commits and what each is."""
    lines = (HERE / "landmarks").read_text(encoding="utf-8").splitlines()
    return [(line[:40], line[41:]) for line in lines if line and not line.startswith("#")]


def accepted() -> dict[str, str]:
    """Return why a value may be worse, by its name."""
    lines = (HERE / "accepted").read_text(encoding="utf-8").splitlines()
    pairs = (line.partition(":") for line in lines if line and not line.startswith("#"))
    return {name.strip(): why.strip() for name, _, why in pairs}


def git(*arguments: str) -> str:
    """Return what git says."""
    return subprocess.run(["git", *arguments], cwd=HERE, check=True, capture_output=True, text=True).stdout.strip()


def asv(*arguments: str) -> int:
    """Run asv here, and nothing from the current folder."""
    return subprocess.run([sys.executable, "-P", "-m", "asv", *arguments], cwd=HERE, check=False).returncode


def of_commit(commit: str) -> Results | None:
    """Return the results at a commit, if there are any."""
    folder = HERE / Config.load(str(HERE / "asv.conf.json")).results_dir
    found = [each for each in iter_results(str(folder)) if each.commit_hash == commit]
    return max(found, key=lambda each: len(each.get_all_result_keys()), default=None)


def values(results: Results, name: str) -> Iterator[tuple[tuple[str, ...], float]]:
    """Yield the parameters and the value of each case of a benchmark that gave a number."""
    if name not in results.get_all_result_keys():
        return
    params = results.get_result_params(name)
    for case, value in zip(product(*params), results.get_result_value(name, params), strict=True):
        if isinstance(value, int | float) and isfinite(value):
            yield case, float(value)


def least(results: Results, name: str) -> dict[tuple[str, ...], float]:
    """Return the least time of each case: other work on the machine only ever adds to it."""
    params = results.get_result_params(name) if name in results.get_all_result_keys() else []
    samples = results.get_result_samples(name, params) if params else []
    return {case: min(each) for case, each in zip(product(*params), samples, strict=False) if each}


def ratio(results: Results, above: str, below: str | None, case: tuple[str, ...]) -> float | None:
    """Return a time over its floor's, or what a benchmark has as a ratio."""
    if below is None:
        return dict(values(results, above)).get(case)
    top, bottom = least(results, above).get(case), least(results, below).get(case)
    return None if top is None or not bottom else top / bottom


def publish() -> int:
    """Measure the landmarks that weren't measured here yet, and publish."""
    asv("machine", "--yes")
    for commit, _ in landmarks():
        # Benchmarks of what a commit hasn't got fail there, and say so in the site: the others count.
        asv("run", "--skip-existing-successful", "--record-samples", *SUITES, f"{commit}^!")
    rows = []
    for commit, what in landmarks():
        results = of_commit(commit)
        found = {name: ratio(results, *parts) if results else None for name, parts in RATIOS.items()}
        rows.append({"commit": commit[:7], "what": what, "ratios": {k: round(v, 3) for k, v in found.items() if v}})
    PICTURE.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return asv("publish")


def worse(before: Results, after: Results, units: dict[str, str]) -> Iterator[tuple[str, float, float]]:
    """Yield the counted values that rose."""
    for name in sorted(after.get_all_result_keys()):
        if ".track_" not in name or units.get(name, "unit") not in COUNTS:
            continue
        old = dict(values(before, name))
        for case, value in values(after, name):
            if case in old and value > old[case]:
                yield f"{name}({', '.join(case)})", old[case], value


def compare() -> int:
    """Compare HEAD with the last landmark.

    What can't be measured here fails nothing: `make asv` has run each benchmark of HEAD.
    """
    last = landmarks()[-1][0]
    if subprocess.run(["git", "cat-file", "-e", f"{last}^{{commit}}"], cwd=HERE, check=False).returncode:
        print(f"nothing is compared: this clone hasn't got the landmark {last[:7]}", file=sys.stderr)
        return 0
    asv("machine", "--yes")
    head = git("rev-parse", "HEAD")
    # Its exit status says that something moved, which a noisy machine does by itself: that is printed, and no more.
    asv("continuous", "--interleave-rounds", "--factor", str(FACTOR), *SUITES, last, head)
    before, after = of_commit(last), of_commit(head)
    if before is None or after is None:
        print("nothing is compared: asv has no results, and says above why", file=sys.stderr)
        return 0
    known = json.loads((HERE / "results" / "benchmarks.json").read_text(encoding="utf-8"))
    units = {name: each.get("unit", "unit") for name, each in known.items() if isinstance(each, dict)}
    failed = 0
    for name, old, new in worse(before, after, units):
        why = accepted().get(name)
        print(f"{name}: {old:g} became {new:g}" + (f" ({why})" if why else ""))
        failed += not why
    if failed:
        print(f"{failed} values got worse, and asv_bench/accepted doesn't say why", file=sys.stderr)
    return min(failed, 1)


def main() -> int:
    """Run the command that the argument names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("publish", "compare"))
    return {"publish": publish, "compare": compare}[parser.parse_args().what]()


if __name__ == "__main__":
    sys.exit(main())
