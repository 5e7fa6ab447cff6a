"""Every page's examples run: `make docs`. A page's Python has one namespace, its commands one folder.

A block ``{doctest}`` is compared as doctest does, with ``...`` for what differs from run to run. A block ``console``
has commands behind ``$``, which bash runs in a folder with the clone's ``tests`` and ``docs`` in it. A command behind
another prompt, as in ``destination$``, is one that waits for something: it starts, says its first line, and the rest of
its output is compared when the page has ended. What a command prints is compared as doctest compares, but for what
differs from run to run (`alike`), so that a page shows what was printed once; ``# exit status N`` behind a command says
that it fails. ``HWDBM_PAGES=write`` puts what is printed now into the pages.
"""

import doctest
import gzip
import json
import os
import platform
import re
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from clitools import examples

import hwdbm

DOCS = Path(__file__).parent
MADE = {"api", "commands", "json", "_build", "schemas", "_ext"}
PAGES = sorted(path for path in DOCS.rglob("*.md") if path.relative_to(DOCS).parts[0] not in MADE)
PAGES.append(DOCS.parent / "README.md")
BLOCK = re.compile(
    r"^(?:```|:::)(\{doctest\}|console)[ ]*\n((?::[a-z]+:.*\n)*)(.*?)^(?:```|:::)$", re.DOTALL | re.MULTILINE
)
PROMPT = re.compile(r"^([a-z]*)\$ ((?:.*\\\n)*.*)$", re.MULTILINE)
# What commands say each ten seconds: a slow machine has them say it.
PROGRESS = re.compile(
    r"^hwdbm: ((setup|active|device) for |(measured|forecasting:|reading|recording:) .*\d|\d+ snapshots, ).*\n",
    re.MULTILINE,
)
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
SECONDS = 300
EXAMPLES = examples()
KVM = platform.machine() == "x86_64" and os.access("/dev/kvm", os.R_OK | os.W_OK)
WRITE = os.environ.get("HWDBM_PAGES") == "write"


def blocks(text: str) -> list[tuple[str, str, str, int]]:
    """Return each block's kind, options, body, and the line it begins in."""
    return [(m[1], m[2], m[3], text.count("\n", 0, m.start(3))) for m in BLOCK.finditer(text)]


def alike(command: str, text: str) -> str:
    """Return what a command prints without what differs from run to run: times, and of what moves any number."""
    if not command.startswith("hwdbm fleet"):  # a plan's times are computed
        text = re.sub(r"\b[\d.,]+ ms", "# ms", text)
    text = re.sub(r"( passed in [\d.]+s) \([\d:]+\)", r"\1", text)  # of more than a minute, pytest says it twice
    if re.search(r"hwdbm (migrate|receive|snapshot|record|plan)|--live|examples/|pytest", command):
        text = re.sub(r"\b[0-9a-f]{64}\b|\b[0-9]{6}-[0-9a-f]{8}\b", "#", text)
        text = re.sub(r"\b\d[\d.,]*", "#", text)
        text = re.sub(r"^(write map:).*", r"\1", text, flags=re.MULTILINE)
        # How many passes a migration takes, and whether it takes a second, is a matter of speed.
        text = re.sub(r"^(pass #:.*\n)+", "passes\n", text, flags=re.MULTILINE)
        text = re.sub(r"^(# +#.*\n)+", "passes\n", text, flags=re.MULTILINE)
    return text


@dataclass
class Waiting:
    """A command that runs while others do."""

    command: str
    expected: str
    process: subprocess.Popen[str]
    said: list[str] = field(default_factory=list)
    first: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self.listen, daemon=True)
        self.thread.start()

    def listen(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as said:
            for line in said:
                self.said.append(line)
                self.first.set()
        self.first.set()

    def end(self, seconds: float) -> None:
        try:
            self.process.wait(seconds)
        finally:
            self.process.kill()
            self.thread.join()


class Shell:
    """The commands of a page."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("tests", "docs"):
            (folder / name).symlink_to(DOCS.parent / name)
        self.environment = {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(folder),
            "COLUMNS": "100",
        }
        self.waiting: list[Waiting] = []
        self.printed: list[tuple[str, str]] = []

    def start(self, command: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", "-euc", command],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, prompt: str, command: str, expected: str) -> None:
        if prompt:
            waiting = Waiting(command, expected, self.start(command))
            self.waiting.append(waiting)
            assert waiting.first.wait(SECONDS), f"{command!r} says nothing"
            return
        process = self.start(command)
        try:
            out, _ = process.communicate(timeout=SECONDS)
        finally:
            process.kill()
        self.check(command, expected, out, process.returncode)

    def check(self, command: str, expected: str, out: str, status: int) -> None:
        failure = re.search(r"# exit status (\d+)", command)
        assert status == (int(failure[1]) if failure else 0), f"{command!r}: exit status {status}\n{out}"
        out = PROGRESS.sub("", out)
        self.printed.append((expected, out))
        if WRITE:
            return
        checker = doctest.OutputChecker()
        if not checker.check_output(alike(command, expected), alike(command, out), FLAGS):
            example = doctest.Example(command, expected)
            raise AssertionError(f"{command}\n{checker.output_difference(example, out, FLAGS)}")

    def close(self) -> None:
        for each in self.waiting:
            each.end(SECONDS)
            self.check(each.command, each.expected, "".join(each.said), each.process.returncode)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS.parent)))
def test_the_examples_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shell, kernel = Shell(tmp_path), hwdbm.kernels.active().__name__.rpartition(".")[2]
    names: dict[str, object] = {"__name__": "__main__"}  # what a reader has who types the lines: they import the rest
    runner = doctest.DocTestRunner(verbose=False, optionflags=FLAGS)
    try:
        for kind, options, body, line in blocks(page.read_text(encoding="utf-8")):
            if "skipif" in options and not KVM:
                continue
            if kind == "console":
                parts = PROMPT.split(body)
                assert not parts[0].strip(), f"line {line}: output before a command"
                for prompt, command, expected in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
                    shell.run(prompt, command, expected.lstrip("\n"))
            else:
                example = doctest.DocTestParser().get_doctest(body, names, page.name, str(page), line)
                out: list[str] = []
                runner.run(example, clear_globs=False, out=out.append)
                assert not out, "".join(out)
                names = example.globs
    finally:
        hwdbm.kernels.use(kernel)  # a page may choose another
        for each in shell.waiting if sys.exc_info()[0] else ():
            each.process.kill()
            each.end(SECONDS)
    shell.close()
    if WRITE:
        text = page.read_text(encoding="utf-8")
        for expected, out in shell.printed:  # two that are alike: look at what comes of it
            if "..." in expected:
                text = text.replace(expected, out, 1)
        page.write_text(text, encoding="utf-8")


def test_the_example_of_a_guest_runs(tmp_path: Path) -> None:
    """The one that no `console` block has: it fails where there is no KVM, and says why."""
    command = [sys.executable, "-W", "error", str(DOCS / "examples" / "kvm_guest.py")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.stderr == ""
    assert ("what its code wrote" in done.stdout) == (done.returncode == 0)
    assert done.returncode == 0 or "no KVM here" in done.stdout


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_of_a_help_run(name: str, tmp_path: Path) -> None:
    """Each as it stands, in a fresh folder with a clone's tests and docs; those of other shells without their words."""
    shell = Shell(tmp_path)
    prepare(name, shell)
    for block in EXAMPLES[name]:
        if any("--source kvm" in line for line in block) and not KVM:
            continue
        receivers = []
        for line in block:
            if line.startswith("hwdbm receive"):
                receivers.append(Waiting(line, "", shell.start(line)))
                assert receivers[-1].first.wait(SECONDS), f"{line!r} says nothing"
                continue
            process = shell.start(re.sub(r'^eval "\$\((.* zsh)\)"$|^(.* fish) \| source$', r"\1\2", line))
            try:
                out, _ = process.communicate(timeout=2 * SECONDS)
            finally:
                process.kill()
            wanted = re.search(r"# exit status (\d+)", line)
            assert process.returncode == (int(wanted[1]) if wanted else 0), f"{line}\n{out}"
        for receiver in receivers:
            receiver.end(SECONDS)
            assert receiver.process.returncode == 0, "".join(receiver.said)


def prepare(name: str, shell: Shell) -> None:
    """Write the files that the help of `hwdbm snapshot`, of `hwdbm bitmap` and of their commands speaks of."""
    if name.startswith("bitmap "):
        some_bitmaps(shell.folder)
    if not name.startswith("snapshot "):
        return
    memory = np.random.default_rng(1).bytes(1 << 20)
    (shell.folder / "guest.ram").write_bytes(memory)
    if name == "snapshot rebase":
        with (shell.folder / "guest.diff").open("wb") as file:
            file.truncate(1 << 20)
            os.pwrite(file.fileno(), bytes(4096), 8192)
    (shell.folder / "dirty").mkdir()
    (shell.folder / "dirty" / "slot0.bitmap").write_bytes(hwdbm.DirtyBitmap.from_pages([3], 256).to_bytes())
    if name == "snapshot diff":
        begin = "hwdbm snapshot save chain guest.ram --ram-base 0x40000000"
    elif name != "snapshot save":
        begin = "hwdbm snapshot save chain --source {} --memory 1M --every 1 --count 12".format(
            "kvm" if KVM else "machine"
        )
    else:
        return
    process = shell.start(begin)
    said, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, said


def some_bitmaps(folder: Path) -> None:
    """Write the files that the help of `hwdbm bitmap` speaks of."""
    (folder / "dirty").mkdir()
    for number, name in enumerate(("dirty/slot0.bitmap", "slot0.bitmap", "one.bitmap", "two.bitmap")):
        hwdbm.DirtyBitmap.from_pages([number, 5], 262144).save(folder / name)
    for name in ("before.ram", "after.ram"):
        (folder / name).write_bytes(name.encode().ljust(8192))
    migrated = gzip.decompress((DOCS.parent / "tests" / "data" / "mapped-ram.bin.gz").read_bytes())
    for name in ("one.mig", "two.mig"):
        (folder / name).write_bytes(migrated)


def test_the_picture_of_the_readme_is_what_the_verbs_do() -> None:
    sys.path.insert(0, str(DOCS / "_ext"))
    import pictures

    picture, drawn = DOCS / "pictures" / "leaf-states.svg", pictures.standalone(pictures.leaf_states())
    if WRITE:
        picture.write_text(drawn, encoding="utf-8")
    assert picture.read_text(encoding="utf-8") == drawn, "HWDBM_PAGES=write draws it anew"


def test_a_history_is_drawn_with_its_gaps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sys.path.insert(0, str(DOCS / "_ext"))
    import pictures

    rows = [
        {"commit": "1234567", "what": "the first", "ratios": {"harvest": 1.25}},
        {"commit": "89abcde", "what": "the second", "ratios": {"harvest": 1.5, "a pass": 2.75}},
    ]
    monkeypatch.setattr(pictures, "HISTORY", tmp_path / "history.json")
    for nothing in (None, [], [{"commit": "1234567", "what": "the first", "ratios": {}}]):
        if nothing is not None:
            pictures.HISTORY.write_text(json.dumps(nothing), encoding="utf-8")
        assert "asv-history" in pictures.history()
    pictures.HISTORY.write_text(json.dumps(rows), encoding="utf-8")
    drawn = pictures.history()
    assert all(text in drawn for text in (">1.25<", ">1.50<", ">2.75<", ">-<", "89abcde the second"))


def test_examples_are_short_and_shown() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for example in (DOCS / "examples").iterdir():
        if example.is_file():
            assert len(example.read_text(encoding="utf-8").splitlines()) < 80
            assert f"examples/{example.name}" in pages


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS.parent)))
def test_a_block_of_shell_with_output_is_one_that_runs(page: Path) -> None:
    """A prompt outside of `console` would be an example that nothing checks."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    assert not re.search(r"^(\$|>>>) ", text, re.MULTILINE)
