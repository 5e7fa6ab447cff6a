"""Do the tests bite? Random mutants of the package, each against the tests that cover it; `make mutants` runs this.

The mutations are cosmic-ray's. Its runner isn't used: it changes the sources in place, and runs one command for every
mutant, which here would be all the tests, five minutes each. mutmut knows which tests cover a function, but leaves out
whatever has a decorator, and so all kernels, properties and class methods.

So: the package and its tests are copied to a work folder with an environment of its own. There all tests run once,
with coverage's contexts, which say the tests that ran each line; Hypothesis's tests try a few examples only. A mutant
is a copy of one module with one change; the tests of its line run, those of its room first and the fastest first, until
one fails, in a fork of a process that has imported everything but the package. What numba compiles leaves no trace, nor
does what runs in another process or at an import: so the other tests of the room run as well, where none has failed.

What no test can tell by its kind isn't drawn: a change of a type or of a protocol's class, of a zip's ``strict``, of
``is`` to ``==`` where members of enumerations or types are compared, of one length below 0 to another in a reshape, of
the star among a private function's parameters, of where a slice of one word ends in compiled code, and what Python
refuses.

The sample goes by a hash of each line's text, so that it stays, but for the lines that changed, as the package grows.
Results are appended to build/mutants/results-SEED.jsonl, and a run goes on where the one before it ended. What
survives is looked for in harmless.toml, which argues for each mutant there why no test can catch it.
"""

import argparse
import ast
import concurrent.futures
import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import tomllib
import venv
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import cosmic_ray.plugins
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from coverage.numbits import numbits_to_nums

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
BUILD = ROOT / "build" / "mutants"
COPIED = (
    "dbm", "tests", "docs", "asv_bench", "bin", ".ci", "pyproject.toml", "Makefile", "LICENSE", "README.md",
    "CHANGELOG.md", "CONTRIBUTING.md",
)  # fmt: skip

MOST_SECONDS = 45.0
"""Seconds of tests for one mutant at most, as they took without one: the core's lines are covered by thousands.

As many again are for the other tests of its room."""

NOT_ASKED = ("--ignore-glob=*/test_mutants.py", "--ignore-glob=*/test_stepmutants.py")
"""The tests of the tests: they take minutes, and say nothing about the package that the tests which they try don't."""

PATIENCE = 20.0
"""Seconds that tests may take beside four times what they took without a mutant: some mutants wait for ever."""

QUICK = 0.2
"""Seconds under which a test that failed is believed: it passed where the tests were measured."""

FIRST = 6
"""Tests of a mutant that run alone at first: to import the files of all of them takes longer than to run these."""

IMPORTED = ("tests/test_house.py::test_dataclasses_are_values", "tests/test_defaults.py", "tests/test_numbers.py")
"""The tests of what an import makes, constants, defaults and classes: who imported first covers that, says coverage."""

# Where the tests of a module are that isn't covered by itself: it is compiled, imported, or runs in another process.
ROOMS = {
    "kernels": ("tests/kernels", "tests/stage2/test_stage2.py", "tests/stage2/test_stage2_parts.py"),
    "bench": ("tests/test_bench.py", "tests/migration/test_bench.py", "tests/cli"),
    "errors": ("tests/test_doors.py",),
    "__main__": ("tests/cli/test_frame.py", "tests/cli/test_main.py"),
    "walker": ("tests/stage2/",),
    "testing": ("tests/stage2/test_stage2_machine.py", "tests/test_doors.py"),
}


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change of one module."""

    module: str
    operator: str
    occurrence: int
    line: int
    before: str
    after: str


_NODES = {"ReplaceBinaryOperator": "operator", "ReplaceComparisonOperator": "comparison", "NumberReplacer": "number"}
"""The nodes that a kind changes, where it is many operators: to show all of them to each takes a minute."""


# --- what there is to change --------------------------------------------------------------------------------------


def mutants_of(path: Path) -> dict[tuple[int, int, str], list[tuple[str, int]]]:
    """Return the mutations of a module by place and kind: binary operators alone have eleven others each."""
    source = path.read_text()
    tree, dead = get_ast(source), set(_dead_places(ast.parse(source)))
    if "@compiled" in source:
        dead |= set(_end_places(ast.parse(source)))
    members = set(_member_places(ast.parse(source)))
    places: dict[tuple[int, int, str], list[tuple[str, int]]] = defaultdict(list)
    by_type = defaultdict(list)
    for node in ast_nodes(tree):
        by_type[node.type].append(node)
        by_type[""].append(node)
    for name in sorted(cosmic_ray.plugins.operator_names()):
        if "Variable" in name:  # they need to be told a variable
            continue
        operator = cosmic_ray.plugins.get_operator(name)()
        kind, count = name.partition("/")[2].partition("_")[0], 0
        for node in by_type[_NODES.get(kind, "")]:
            for start, _ in operator.mutation_positions(node):
                if start not in dead and not (name.endswith(_SAME) and start in members):
                    places[*start, kind].append((name, count))
                count += 1
    return places


def _dead_places(tree: ast.Module) -> Iterator[tuple[int, int]]:
    """Yield the places where a change says nothing about the tests.

    Those are types, which only mypy reads, and the classes of a protocol, whose methods are never run; and the strict
    of a zip: as an assertion, it says what holds for any input, so without it nothing is different.
    """
    for node in ast.walk(tree):
        dead: list[ast.AST | None] = []
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = node.args
            every = (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg)
            dead = [node.returns, *(each.annotation for each in every if each)]
            if any("overload" in ast.unparse(each) for each in node.decorator_list):
                dead = [node, *node.decorator_list]
            elif node.name.startswith("_") and arguments.kwonlyargs and arguments.vararg is None:
                yield from _star_places(node)
        elif isinstance(node, ast.ClassDef) and any(ast.unparse(each) == "Protocol" for each in node.bases):
            dead = [node, *node.decorator_list]
        elif isinstance(node, ast.AnnAssign):
            dead = [node.annotation]
        elif isinstance(node, ast.Assign) and _is_type(node.value):
            dead = [node.value]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("cast", "TypeVar"):
            dead = [node]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "zip":  # strict asserts what holds anyway
            dead = [each.value for each in node.keywords]
        for each in dead:
            if each is None:
                continue
            for line in range(each.lineno, each.end_lineno + 1):  # type: ignore[attr-defined]
                first = each.col_offset if line == each.lineno else 0  # type: ignore[attr-defined]
                last = each.end_col_offset if line == each.end_lineno else 200  # type: ignore[attr-defined]
                yield from ((line, column) for column in range(max(first - 1, 0), last + 1))


def _end_places(tree: ast.Module) -> Iterator[tuple[int, int]]:
    """Yield the places of the ends of slices of one word, in compiled code.

    The word that such a slice begins with is all that is read and written, and nothing there looks at where it ends.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Slice) and node.lower and node.upper:
            end = node.upper
            if ast.unparse(end) == f"{ast.unparse(node.lower)} + 1":
                yield from ((end.lineno, column) for column in range(end.col_offset, end.end_col_offset or 0))


def _star_places(function: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[tuple[int, int]]:
    """Yield the places of the star in the parameters of a private function: a slash there changes no call."""
    arguments = function.args
    before = [*arguments.posonlyargs, *arguments.args, *(each.annotation for each in arguments.args if each.annotation)]
    before += [each for each in arguments.defaults if isinstance(each, ast.expr)]
    first = arguments.kwonlyargs[0]
    begin = max(((each.end_lineno or 0, each.end_col_offset or 0) for each in before), default=(function.lineno, 0))
    for line in range(begin[0], first.lineno + 1):
        low = begin[1] if line == begin[0] else 0
        high = first.col_offset if line == first.lineno else 200
        yield from ((line, column) for column in range(low, high))


_SAME = ("_Is_Eq", "_IsNot_NotEq")
_MEMBER = re.compile(r"[A-Z]\w*[a-z]\w*\.[A-Z][A-Z0-9_]*|type\(\w+\)").fullmatch


def _member_places(tree: ast.Module) -> Iterator[tuple[int, int]]:
    """Yield the places where something is compared with a member of an enumeration, as ``Granule.K64``, or a type.

    None but itself is equal to a member or to a type, so that ``is`` and ``==`` are the same there.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            left = node.left
            for right in node.comparators:
                if left.end_lineno == right.lineno and any(map(_MEMBER, map(ast.unparse, (left, right)))):
                    yield from ((right.lineno, column) for column in range(left.end_col_offset or 0, right.col_offset))
                left = right


def _is_type(value: ast.expr) -> bool:
    return isinstance(value, ast.Subscript | ast.BinOp) and any(
        name in ast.unparse(value) for name in ("NDArray[", "Callable[", "Literal[", "DirtyBitmap |", "tuple[", "list[")
    )


def drawn(modules: list[str], count: int, seed: int) -> list[Mutant]:
    """Return a sample of the mutants of some modules: a place and a kind at random, then one of its changes.

    What is drawn goes by a hash of the line's text: a change elsewhere in the package leaves the sample what it was.
    """
    sources = [(module, (ROOT / module).read_text()) for module in modules]
    kept = BUILD / f"drawn-{hashlib.sha256(repr((sources, count, seed)).encode()).hexdigest()[:16]}.json"
    if kept.exists():
        return [Mutant(**each) for each in json.loads(kept.read_text())]
    places = []
    for module in modules:
        lines, before = (ROOT / module).read_text().splitlines(), Counter[tuple[str, int, str]]()
        for line, column, kind in sorted(mutations(module)):
            text = lines[line - 1]
            same = text.strip(), column - len(text) + len(text.lstrip()), kind
            before[same] += 1
            key = hashlib.sha256(repr((seed, module, *same, before[same])).encode()).digest()
            places.append((key, module, line, column, kind))
    found: list[Mutant] = []
    for key, module, line, column, kind in sorted(places):
        operator, occurrence = random.Random(key).choice(mutations(module)[line, column, kind])
        text = mutated(module, operator, occurrence)
        if _is_program(text) and not _is_the_same(text, (ROOT / module).read_text()):
            found.append(_mutant(module, operator, occurrence, line, text))
        if len(found) == count:
            break
    kept.write_text(json.dumps([asdict(each) for each in found]))
    return found


def _is_program(source: str) -> bool:
    """Return whether Python takes a source without an error or a warning: what it refuses needs no test."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            compile(source, "mutant", "exec")
        except (SyntaxError, SyntaxWarning):
            return False
    return True


def _is_the_same(changed: str, source: str) -> bool:
    """Return whether a change is none: of a length to be found, for which NumPy takes any number below 0."""
    return changed.replace("reshape(- 2", "reshape(-1") == source


@cache
def mutations(module: str) -> dict[tuple[int, int, str], list[tuple[str, int]]]:
    """Return `mutants_of` a module."""
    return mutants_of(ROOT / module)


def mutated(module: str, operator: str, occurrence: int) -> str:
    """Return a module's source with one change."""
    made = mutate_code((ROOT / module).read_text(), cosmic_ray.plugins.get_operator(operator)(), occurrence)
    if made is None:
        raise LookupError(f"{module} has no mutation {occurrence} of {operator}")
    return str(made)


def _mutant(module: str, operator: str, occurrence: int, line: int, text: str) -> Mutant:
    before, after = (ROOT / module).read_text().splitlines(), text.splitlines()
    # A change may take lines away, a decorator's; from the first that differs on one line of each is shown.
    at = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), line - 1)
    return Mutant(module, operator, occurrence, at + 1, before[at].strip(), after[at].strip())


# --- where it is tried ------------------------------------------------------------------------------------------


class Workshop:
    """A copy of the package and its tests, with an environment in which the copy is what is installed."""

    def __init__(self, number: int) -> None:
        self.folder = BUILD / f"work{number}"
        self._known: dict[tuple[str, ...], bool] = {}
        self._server: subprocess.Popen[str] | None = None
        self._written = 0
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, self.folder / name, ignore=shutil.ignore_patterns("__pycache__"))
            elif source.exists():
                shutil.copy2(source, self.folder / name)
        home = self.folder / ".venv"
        venv.create(home, symlinks=True)
        self.python = home / "bin" / "python"
        site = next(home.glob("lib/python*/site-packages"))
        packages = next(path for path in sys.path if path.endswith("site-packages"))
        # The copy comes before the packages, and an editable install's .pth among those isn't read a second time.
        (site / "hwdbm.pth").write_text(f"{self.folder / 'dbm'}\n{packages}\n")
        script = home / "bin" / "hwdbm"
        script.write_text(f"#!{self.python}\nfrom hwdbm.cli import main\nmain()\n")
        script.chmod(0o755)
        self.environ = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL"))},
            "PATH": f"{home / 'bin'}:{os.environ['PATH']}",
            "NUMBA_CACHE_DIR": str(self.folder / "numba"),
            "HYPOTHESIS_PROFILE": "ci",
        }
        where = self.run(["-c", "import hwdbm; print(hwdbm.__file__)"], 60)[1].strip()
        if not Path(where).is_relative_to(self.folder):
            raise RuntimeError(f"hwdbm would come from {where}, not from {self.folder}")

    def run(self, arguments: list[str], seconds: float, **environ: str) -> tuple[int | None, str]:
        """Run Python in the workshop; return its status, None where it took too long, and what it wrote."""
        with subprocess.Popen(
            [self.python, *arguments],
            cwd=self.folder,
            env={**self.environ, **environ},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        ) as process:
            try:
                output, _ = process.communicate(timeout=seconds)
                status: int | None = process.returncode
            except subprocess.TimeoutExpired:
                output, status = "", None
            finally:  # whatever a broken migration left running goes with it, and all of it where this run is stopped
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        return status, output

    def try_mutant(self, mutant: Mutant, tests: dict[str, float]) -> dict[str, Any]:
        """Return what came of a mutant: caught, or not; `tests` are given with the seconds that each took."""
        started, rest, by, judged = time.monotonic(), list(tests), "", True
        compiled = "/kernels/" in mutant.module  # each time, which takes longer than to import any file
        patience = PATIENCE * 6 if compiled else PATIENCE
        while rest and not by:
            part = rest[:FIRST] if len(rest) == len(tests) and not compiled else rest
            with self._changed(mutant):
                status, failed = self._pytest(part, patience + 4 * sum(tests[each] for each in part))
            # A test that takes time may fail by itself where others work too: it has to pass without the mutant now.
            suspects = [failed] if failed in part else part
            seconds = sum(tests[each] for each in suspects)
            quick = status is not None and seconds < QUICK
            if status == 0:
                rest = rest[len(part) :]
            elif quick or self._passes(suspects, patience + 4 * seconds):
                by = failed or ("it took too long" if status is None else f"pytest's status {status}")
            elif failed in part:
                rest = rest[rest.index(failed) + 1 :]
            else:  # they don't even pass without it: that says nothing
                rest, judged = rest[len(part) :], False
        took = round(time.monotonic() - started, 1)
        return {
            **asdict(mutant),
            "caught": bool(by),
            "by": by,
            "judged": judged or bool(by),
            "tests": len(tests),
            "seconds": took,
        }

    @contextlib.contextmanager
    def _changed(self, mutant: Mutant) -> Iterator[None]:
        """Put a mutant in its module's place; each has its own time, which bytecode and compiled kernels go by."""
        target, compiled, kept = self.folder / mutant.module, self.folder / "numba", self.folder / "numba-kept"
        original, times = target.read_bytes(), target.stat()
        if "/kernels/" in mutant.module and compiled.exists():
            shutil.copytree(compiled, kept)
        try:
            target.write_text(mutated(mutant.module, mutant.operator, mutant.occurrence))
            self._written += 1
            os.utime(target, (1e9 + self._written,) * 2)
            yield
        finally:
            target.write_bytes(original)
            os.utime(target, ns=(times.st_atime_ns, times.st_mtime_ns))
            if kept.exists():
                shutil.rmtree(compiled, ignore_errors=True)
                kept.rename(compiled)

    def _passes(self, tests: list[str], seconds: float) -> bool:
        """Return whether some tests pass without a mutant."""
        key = tuple(tests)
        if key not in self._known:
            self._known[key] = self._pytest(tests, seconds)[0] == 0
        return self._known[key]

    def _pytest(self, tests: list[str], seconds: float) -> tuple[int | None, str]:
        """Return pytest's status, None where it took too long, and the first test that failed."""
        listed = self.folder / "selected"
        listed.write_text("\n".join(tests))
        arguments = ["-x", "-v", "-p", "_hypothesis_pytestplugin", "-p", "no:cacheprovider", "--no-header", "--tb=no"]
        if self._server is None:
            self._server = subprocess.Popen(
                [self.python, "-P", self.folder / "tests" / "mutants" / "forkserver.py"],
                cwd=self.folder,
                env={**self.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        assert self._server.stdin
        assert self._server.stdout
        print(json.dumps([[*arguments, f"@{listed}"], seconds]), file=self._server.stdin, flush=True)
        status, output = json.loads(self._server.stdout.readline())
        failed = [line for line in output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
        if failed:
            return status, failed[0].partition(" ")[2].partition(" - ")[0]
        if status is not None and status >= 0:
            return status, ""
        # It hung, or the process died: the last name that pytest wrote is the test's that ran.
        last = [line for line in output.splitlines() if "::" in line and not line.startswith(" ")][-1:]
        return status, max((test for test in tests if last and last[0].startswith(test)), key=len, default="")

    def close(self) -> None:
        """End the process that forks."""
        if self._server is not None:
            self._server.communicate()


# --- which tests ------------------------------------------------------------------------------------------------


class Coverage:
    """Which tests ran which line, and how long they took.

    A module that changed since it was measured goes by the tests of its room.
    """

    def __init__(self, folder: Path, workshop: Workshop) -> None:
        measured: dict[str, float] = json.loads((folder / "times.json").read_text())
        known = json.loads((folder / "digests.json").read_text())
        arguments = ["-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *NOT_ASKED]
        status, output = workshop.run(arguments, 600)
        if status != 0:
            raise RuntimeError(f"the tests can't be collected: {output[-4000:]}")
        there = [line for line in output.splitlines() if "::" in line and not line.startswith(" ")]
        failed = {test for test, seconds in measured.items() if seconds < 0}
        self.seconds = {test: measured.get(test, 0.5) for test in there if test not in failed}
        self._fresh = {test for test in there if test not in measured}
        now = digests(workshop.folder)
        self._tests: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
        self._imported: dict[str, set[int]] = {}
        with sqlite3.connect(folder / "coverage") as data:
            files = dict(data.execute("SELECT id, path FROM file"))
            names = dict(data.execute("SELECT id, context FROM context"))
            lines = [
                (file, context, line)
                for file, context, bits in data.execute("SELECT file_id, context_id, numbits FROM line_bits")
                for line in numbits_to_nums(bits)
            ]
        for file, context, line in lines:
            test = names[context].partition("|")[0]
            module = "dbm/" + files[file].rpartition("/dbm/")[2]
            if test in self.seconds and known.get(module) == now.get(module):
                self._tests[module][line].add(test)

    def select(self, mutant: Mutant) -> dict[str, float]:
        """Return the tests for a mutant in the order to run them, and the seconds that each took."""
        covering = self._tests[mutant.module].get(mutant.line, set())
        own = rooms_of(mutant.module)
        if mutant.module not in self._imported:
            self._imported[mutant.module] = imported((ROOT / mutant.module).read_text())
        first = IMPORTED if mutant.line in self._imported[mutant.module] else ()
        if not covering or first or "/kernels/" in mutant.module:
            covering = covering | {test for test in self.seconds if test.startswith((*own, *IMPORTED))}
        covering = covering | {test for test in self._fresh if test.startswith(own)}
        order = sorted(covering, key=lambda test: (not test.startswith(own), self.seconds[test]))
        # The room's own come first, unless they are slow: most mutants are caught by the first tests that run.
        order.sort(key=lambda test: (not test.startswith(first), self.seconds[test] > 1.0))
        # The room's others may run the line in another process, where nothing is traced: they come last.
        others = sorted((test for test in self.seconds if test.startswith(own)), key=self.seconds.__getitem__)
        chosen: dict[str, float] = {}
        total = 0.0
        for tests, most in ((order, MOST_SECONDS), (others, 2 * MOST_SECONDS)):
            for test in tests:
                if test not in chosen and total + self.seconds[test] <= most:
                    chosen[test] = self.seconds[test]
                    total += self.seconds[test]
        return chosen


def imported(source: str) -> set[int]:
    """Return the lines of a module that an import runs: those of no function, and of each what is before its body."""
    every, functions = set(range(1, len(source.splitlines()) + 1)), ast.FunctionDef | ast.AsyncFunctionDef
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, functions):
            every -= set(range(node.body[0].lineno, (node.end_lineno or 0) + 1))
    return every


def rooms_of(module: str) -> tuple[str, ...]:
    """Return where a module's own tests are, as the beginnings of their names."""
    parts = Path(module).relative_to("dbm/hwdbm").with_suffix("").parts
    room = parts[0]
    return (f"tests/{room}/", f"tests/test_{room}", *ROOMS.get(room, ()), module)


def own_tests(module: str) -> list[str]:
    """Return the paths of a module's own tests, the module's examples among them."""
    found = [ROOT / module] + [
        path for each in rooms_of(module)[:-1] for path in sorted(ROOT.glob(f"{each.rstrip('/')}*"))
    ]
    return [str(path.relative_to(ROOT)) for path in found if path.suffix == ".py" or path.is_dir()]


def covered(workshop: Workshop, jobs: int, *, measure: bool, own: tuple[str, ...] = ()) -> Coverage:
    """Return what a run of all tests covers, or of those of some rooms: one now, or the one that was measured last."""
    folder = BUILD / ("coverage" if not own else f"coverage-{hashlib.sha256(repr(own).encode()).hexdigest()[:8]}")
    if measure or not (folder / "digests.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        print(f"{', '.join(own) or 'all tests'} once, to see what they cover", flush=True)
        arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "clock", f"--numprocesses={jobs}"]
        settings = workshop.folder / "coveragerc"
        settings.write_text("[run]\nsource_pkgs = hwdbm\n")
        arguments += ["--cov", f"--cov-config={settings}", "--cov-context=test", "--cov-report="]
        arguments += [*NOT_ASKED, *own]
        status, output = workshop.run(
            arguments,
            7200,
            PYTHONPATH=str(workshop.folder / "tests" / "mutants"),
            COVERAGE_FILE=str(folder / "coverage"),
            HWDBM_MUTANTS_TIMES=str(folder / "times.json"),
        )
        if status not in (0, 1):  # a test that fails without a mutant catches none, and isn't run
            raise RuntimeError(f"the tests ended with status {status}: {output[-4000:]}")
        if status:
            (folder / "failed.txt").write_text(output)
            failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
            print(f"{len(failed)} tests fail without a mutant, and catch none (failed.txt): {', '.join(failed)[:400]}")
        (folder / "digests.json").write_text(json.dumps(digests(workshop.folder)))
    return Coverage(folder, workshop)


def digests(folder: Path) -> dict[str, str]:
    """Return a digest of each module under a folder."""
    paths = sorted((folder / "dbm").rglob("*.py"))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


# --- the run ----------------------------------------------------------------------------------------------------


def argued() -> dict[tuple[str, str, str], str]:
    """Return why a mutant is harmless, by its module and its line before and after."""
    path = HERE / "harmless.toml"
    entries = tomllib.loads(path.read_text()).get("mutant", []) if path.exists() else []
    return {(entry["module"], entry["before"], entry["after"]): entry["why"] for entry in entries}


def tried(
    mutants: list[Mutant],
    results: Path,
    jobs: int,
    seconds: float,
    *,
    measure: bool,
    again: bool = False,
    own: tuple[str, ...] = (),
) -> list[dict[str, Any]]:
    """Return what came of each mutant, those of runs before among them; `seconds` bounds when one may begin."""
    known = {}
    if results.exists():
        for line in results.read_text().splitlines():
            result = json.loads(line)
            known[result["module"], result["line"], result["before"], result["after"]] = result
    todo = [
        mutant
        for mutant in mutants
        for result in [known.get((mutant.module, mutant.line, mutant.before, mutant.after))]
        if result is None or (again and not result["caught"])
    ]
    if todo:
        workshops = [Workshop(number) for number in range(jobs)]
        coverage = covered(workshops[0], jobs, measure=measure, own=own)
        lock, free, end = threading.Lock(), list(workshops), time.monotonic() + seconds

        def attempt(mutant: Mutant) -> None:
            if time.monotonic() > end:
                return
            with lock:  # Python 3.11 mustn't read programs in two threads at once (gh-106905)
                workshop, tests = free.pop(), coverage.select(mutant)
            try:
                result = workshop.try_mutant(mutant, tests) if tests else {
                    **asdict(mutant), "caught": False, "by": "", "judged": True, "tests": 0, "seconds": 0.0,
                }  # fmt: skip
            finally:
                with lock:
                    free.append(workshop)
            with lock, results.open("a") as file:
                file.write(json.dumps(result) + "\n")
                known[mutant.module, mutant.line, mutant.before, mutant.after] = result
                mark = "caught  " if result["caught"] else "SURVIVED" if result["judged"] else "UNCLEAR "
                print(f"{mark} {mutant.module}:{mutant.line}  {mutant.before}  ->  {mutant.after}", flush=True)

        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            list(pool.map(attempt, todo))
        for workshop in workshops:
            workshop.close()
    keys = [(m.module, m.line, m.before, m.after) for m in mutants]
    return [known[key] for key in dict.fromkeys(keys) if key in known]


def report(results: list[dict[str, Any]]) -> float:
    """Print what survived, by module, and return the share that was caught."""
    unjudged = [result for result in results if not result["judged"]]
    results = [result for result in results if result["judged"]]
    reasons, by_module = argued(), Counter(result["module"] for result in results)
    caught = Counter(result["module"] for result in results if result["caught"])
    for module in sorted(by_module):
        print(f"{caught[module]:4} of {by_module[module]:4}  {module}")
        for result in results:
            if result["module"] == module and not result["caught"]:
                why = reasons.get((module, result["before"], result["after"]))
                print(f"      line {result['line']}: {result['before']}\n        ->  {result['after']}")
                print(f"        {'argued: ' + why if why else 'not argued'}")
    survived = [result for result in results if not result["caught"]]
    open_ones = [r for r in survived if (r["module"], r["before"], r["after"]) not in reasons]
    total, share = len(results), 1 - len(survived) / max(len(results), 1)
    print(f"{total - len(survived)} of {total} caught ({share:.1%}), {len(survived) - len(open_ones)} argued, "
          f"{len(open_ones)} neither")  # fmt: skip
    if unjudged:
        print(f"{len(unjudged)} more weren't judged: their tests don't pass without them either")
    return share


def main() -> None:
    """Run a sample."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=300, help="how many mutants")
    parser.add_argument("--seed", type=int, default=1, help="another seed, another sample")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="how many at once")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no mutant after so long")
    parser.add_argument("--least", type=float, default=0.0, help="the share that must be caught or argued, 0 to 1")
    parser.add_argument("--again", action="store_true", help="try again what survived in the run before")
    parser.add_argument("--measure", action="store_true", help="run all tests again to see what they cover")
    parser.add_argument(
        "--own", action="store_true", help="the tests of the modules' own rooms only: sooner, says less"
    )
    parser.add_argument("modules", nargs="*", help="paths of modules or rooms; by default the whole package")
    options = parser.parse_args()
    paths = [Path(each).resolve() for each in options.modules] or [ROOT / "dbm" / "hwdbm"]
    files = sorted({file for path in paths for file in (path.rglob("*.py") if path.is_dir() else [path])})
    modules = [str(file.relative_to(ROOT)) for file in files]
    BUILD.mkdir(parents=True, exist_ok=True)
    mutants = drawn(modules, options.sample, options.seed)
    rooms = {path for module in modules for path in own_tests(module)} if options.own else set()
    results = tried(
        mutants,
        BUILD / f"results-{options.seed}{'-own' if rooms else ''}.jsonl",
        options.jobs,
        options.seconds,
        measure=options.measure,
        again=options.again,
        own=tuple(sorted(rooms)),
    )
    report(results)
    reasons = argued()
    results = [result for result in results if result["judged"]]
    held = sum(r["caught"] or (r["module"], r["before"], r["after"]) in reasons for r in results)
    if held < options.least * len(results):
        sys.exit(f"{held} of {len(results)} were caught or argued: fewer than {options.least:.0%}")


if __name__ == "__main__":
    main()
