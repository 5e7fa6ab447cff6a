"""The command as a process: help, version, missing extras, what goes where."""

import re
import resource
import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import Annotated, Any

import forked
import pytest
import typer
from seen import as_seen

import hwdbm
from hwdbm import errors
from hwdbm.cli import app, output, pages, parse, streams
from hwdbm.cli.output import columns
from hwdbm.machine.workload import WORKLOADS

ODD = Path(__file__).parents[1] / "data" / "captures" / "4k_ipa40" / "round1.npz"
MAIN = "from hwdbm.cli import main; main()"


def process(code: str, *args: object, anew: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a process that imports everything `anew`, or that has already what all commands import: no numba, no zarr."""
    command = [sys.executable, "-P", "-W", "error", "-c", code, *map(str, args)]
    if not anew:
        return forked.run(command, compiled=False)
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)


def test_version(run) -> None:
    result = run("--version")
    assert (result.status, result.out) == (0, f"hwdbm {hwdbm.__version__}\n")


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["bench", "--repeat", "x"], "'--repeat': 'x' is no whole number of 1 or more"),
        (["bench", "--memory", "8192T"], "--memory is 4096T at most"),
        (["bench", ""], "there is no benchmark ''"),
        (["inspect", ""], "'IMAGE': the path is empty"),
        (["inspect", ODD, "--plot", ""], "'--plot': the path is empty"),
        (["snapshot", "rebase", "", "x"], "'BASE': the path is empty"),
        (["snapshot", "rebase", "x", ""], "'DIFF': the path is empty"),
    ],
)
def test_wrong_usage(run, args, why) -> None:
    result = run(*args)
    assert (result.status, result.out) == (2, "")
    assert why in " ".join(result.err.split())


COMMANDS = [
    [],
    ["harvest"],
    ["inspect"],
    ["bench"],
    ["migrate"],
    ["plan"],
    ["watch"],
    ["receive"],
    ["fleet"],
    ["races"],
    ["doctor"],
    ["completion"],
]
COMMANDS += [
    ["bitmap"],
    *(["bitmap", verb] for verb in ["show", "diff", "or", "and", "minus", "rescale", "convert"]),
    ["record"],
    *(["trace", *verb] for verb in ([], ["show"])),
    ["snapshot"],
    *(["snapshot", verb] for verb in ["save", "diff", "list", "check", "rebase", "restore", "prune"]),
]


@pytest.mark.parametrize("args", [["--help"], ["-h"], ["harvest", "--help"], ["inspect", "-h"]])
def test_help(run, args: list[str]) -> None:
    result = run(*args)
    assert (result.status, result.err) == (0, "")
    assert "Usage: hwdbm" in result.out
    assert "\x1b" not in result.out
    if len(args) == 2:
        assert f"    hwdbm {args[0]} " in result.out.partition("Examples:")[2]


def test_the_list_says_what_each_command_says_itself() -> None:
    """The list of commands imports none of them; what it says of one is the first sentence of that one's help."""
    for name, entry in app._TASK.items():
        command = entry.load(name)
        assert command.name == name
        assert " ".join(command.help.partition("\n\n")[0].split()) == entry.summary
    assert set(app._TASK) == {args[0] for args in COMMANDS if args}


@pytest.mark.parametrize("columns", [40, 59, 80, 200])
def test_help_fits(run, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is cut, nothing is a type of Python; only commands to copy are longer than a narrow screen."""
    monkeypatch.setenv("COLUMNS", str(columns))
    for args in COMMANDS:
        out = run(*args, "--help").out
        text, _, examples = out.partition("Examples:")
        for line in [*text.splitlines(), *(each for each in examples.splitlines() if each[:6].strip())]:
            assert len(line) <= columns, args
        assert columns < 80 or max(map(len, examples.splitlines()), default=0) <= columns, args
        assert "..." not in out.partition("Commands:")[2]
        assert not re.search(r"<(?!ID|IMAGE)", out), args


def term(size: int) -> Any:
    """Return an option whose term in the help has so many letters."""
    how = {"metavar": "WORD", "show_default": False, "help": f"Of {size} letters, in words."}
    return Annotated[str, typer.Option(f"--{'x' * (size - 7)}", **how)]


def it(a: term(28) = "", b: term(29) = "", c: term(30) = "", d: term(31) = "", e: term(32) = "") -> None:  # type: ignore[valid-type]
    """Do it.

    A paragraph that is longer than a line of a terminal that is as narrow as some are,
      with lines of its own.
    """


def helped(columns: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the help of a command on so many columns."""
    made = app._typer()
    made.command("it", cls=app._Command, epilog="\b\n  a\n    b\n", context_settings=app._HELP)(it)
    command = typer.main.get_command(made)
    monkeypatch.setenv("COLUMNS", str(columns))
    with command.make_context("it", []) as context:
        return f"--- {columns} columns\n{command.get_help(context)}\n"


def test_help_was_looked_at_at_the_edges_of_its_forms(monkeypatch) -> None:
    """At 98 columns at most, and 20 at least; a definition stands beside its term where there is room, and it is 30."""
    texts = [helped(columns, monkeypatch) for columns in (300, 101, 100, 99, 62, 61, 23, 22, 21, 5)]
    assert texts[0].partition("\n")[2] == texts[1].partition("\n")[2] == texts[2].partition("\n")[2]
    as_seen("texts/help.txt", "\n".join(texts))


def test_no_command(run) -> None:
    """The command alone shows what one can do, by task."""
    result = run()
    assert (result.status, result.err) == (0, "")
    assert result.out == run("--help").out
    for task, entries in app.TASKS.items():
        assert f"\n{task}:\n" in result.out
        assert all(f"\n  {name} " in result.out for name in entries)


def test_a_slip_of_the_pen(run) -> None:
    assert "Did you mean 'harvest'?" in run("harves").err


def test_errors_name_a_page_that_is_there(run, tmp_path: Path) -> None:
    docs = Path(__file__).parents[2] / "docs"
    for page, _, heading in (each.partition("#") for each in filter(None, pages.PAGES.values())):
        text = (docs / f"{page}.md").read_text(encoding="utf-8")
        slugs = re.findall(r"^\(([a-z-]+)\)=$", text, re.MULTILINE)
        for line in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
            slugs.append(re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-"))
        assert not heading or heading in slugs, f"{page}#{heading}"
    (tmp_path / "ram").write_bytes(bytes(8192))
    image = ["harvest", tmp_path / "ram", "--ram-base", "0", "--vttbr", "0", "--vtcr", "0x806a3558", "--slot", "0:0:2M"]
    assert run(*image).err.endswith(" (docs: formats#memory-images)\n")
    assert run("inspect", tmp_path / "s").err.count("docs: ") == 0  # no such file
    nobody = run("migrate", "--memory", "1M", "--to", f"unix:{tmp_path}/s").err
    assert nobody.endswith("/s: No such socket: nobody listens there (docs: howto/migrate-tls#when-it-fails)\n")
    for name in errors.__all__:
        kind = getattr(errors, name)
        if isinstance(kind, type) and name != "CancelledMigrationError":  # which the user asked for
            assert pages.see(kind("x")), name


def test_words_of_workloads_are_those_that_there_are() -> None:
    from hwdbm.arm.abi import GuestKind
    from hwdbm.cli.guest import WORKLOADS as WORDS
    from hwdbm.kvm.task import KINDS as KVM

    texts = {name for name, kind in WORKLOADS.items() if kind.__module__ == "hwdbm.machine.workload"}
    assert set(WORDS) == {*texts, *KVM, *(kind.name.lower() for kind in GuestKind), "mixed"}


def test_process() -> None:
    done = process(MAIN, "harvest", ODD, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    done = process(MAIN, "harvest", ODD.parent)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"hwdbm: {ODD.parent}: Is a directory\n"


@pytest.mark.parametrize(
    ("missing", "extra", "args"),
    [
        ("typer", "cli", ["--help"]),
        ("rich", "cli", ["harvest", ODD]),
        ("matplotlib", "plot", ["inspect", ODD, "--plot", "x.png"]),
    ],
)
def test_missing_extra(missing: str, extra: str, args: list[object], tmp_path: Path) -> None:
    hide = f"import os, sys; os.chdir({str(tmp_path)!r}); sys.modules[{missing!r}] = None; "
    done = process(hide + MAIN, *args)
    assert done.returncode == 1
    assert f"isn't installed: pip install 'hwdbm[{extra}]'" in done.stderr
    assert missing in done.stderr
    assert "Traceback" not in done.stderr


NOW_AND_THEN = ("hwdbm: recording: ", "hwdbm: active for ")  # what a slow machine is told each ten seconds
SMALL = ["migrate", "--memory", "1M", "--workload", "idle", "--max-downtime", "20000"]
SAVE = ["snapshot", "save", "new", "--source", "machine", "--memory", "1M", "--count", "0"]  # which loads kernels, too
FAKE = "import sys, warnings; sys.path.insert(0, 'fake'); warnings.simplefilter('default'); "


@pytest.mark.parametrize(
    ("module", "code", "args", "status", "said"),
    [
        ("numba", "raise ImportError('numba needs\\nanother numpy')", SAVE, 0, "'vector' takes over"),
        ("numba", "", SMALL, 0, "'vector' takes over"),
        ("llvmlite", "raise OSError('no libllvmlite.so')", SMALL, 0, "no libllvmlite.so; 'vector'"),
        ("llvmlite", "raise MemoryError", SMALL, 0, "here: MemoryError; 'vector' takes over"),
        ("llvmlite", "raise MemoryError", ["migrate", "--source", "arm"], 1, "'atomic' can't be compiled here"),
        ("zlib_ng", "raise ImportError('wrong ELF class')", ["migrate", "--help"], 0, ""),
        ("typer", "raise ImportError('wrong ELF class')", ["--help"], 1, "a library that this needs can't be imported"),
        ("rich", "import no_such_library", ["harvest", ODD], 1, "this needs no_such_library, which isn't installed"),
        ("typer", "raise SystemExit(7)", ["--help"], 1, "please report it: SystemExit: 7"),
        ("typer", "raise RuntimeError(\"can't start new thread\")", ["--help"], 1, "no room for another thread"),
        ("rich", "import warnings; warnings.warn('one\\ntwo'); raise OSError('three')", ["harvest", ODD], 1, "three"),
    ],
)  # fmt: skip
@pytest.mark.alike(3)
def test_a_library_that_is_broken(module: str, code: str, args, status: int, said: str, tmp_path: Path) -> None:
    """What can do without it does, with one line; the others fail with one line, and blame the library."""
    (tmp_path / "fake" / module).mkdir(parents=True)
    (tmp_path / "fake" / module / "__init__.py").write_text(code)
    anew = module not in {"numba", "llvmlite"}
    done = process(f"import os; os.chdir({str(tmp_path)!r}); {FAKE}{MAIN}", *args, anew=anew)
    assert (done.returncode, done.stdout != "") == (status, status == 0), done.stderr
    lines = done.stderr.splitlines()
    if "warnings" in code:
        assert lines.pop(0) == "hwdbm: warning: one"
    assert len(lines) == (said != ""), done.stderr
    assert said in done.stderr


@pytest.mark.parametrize(
    ("told", "args", "said"),
    [
        ({"NUMBA_DISABLE_JIT": "1"}, SAVE, "numba is switched off (NUMBA_DISABLE_JIT); 'vector' takes over"),
        ({"NUMBA_CPU_NAME": "nope"}, SAVE, "'nope' is not a recognized processor"),
        pytest.param(
            {"NUMBA_CPU_FEATURES": "+nope"}, SAVE, "'+nope' is not a recognized feature", marks=pytest.mark.slow
        ),
        ({"NUMBA_NUM_THREADS": "many"}, SAVE, "warning: Environment variable 'NUMBA_NUM_THREADS'"),
        ({"MPLBACKEND": "none", "MPLCONFIGDIR": "/proc/none"}, ["inspect", ODD, "--plot", "a.svg"], ""),
    ],
)
@pytest.mark.alike(2)
def test_a_library_that_is_told_something_odd(told: dict[str, str], args, said: str, tmp_path: Path) -> None:
    done = process(f"import os; os.chdir({str(tmp_path)!r}); {FAKE}os.environ |= {told!r}; {MAIN}", *args, anew=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == (said != ""), done.stderr
    assert said in done.stderr


@pytest.mark.parametrize(
    "args",
    [["harvest", "example:4k_ipa40"], SMALL, ["trace", "show", "example:machine-hot"],
     ["record", "--ram-file", ODD, "--duration", "10ms", "--interval", "5ms", "--page-size", "4K"]],
    ids=lambda args: args[0],
)  # fmt: skip
@pytest.mark.alike(2)
def test_a_current_folder_that_was_deleted(args, tmp_path: Path) -> None:
    """What names no file in it works as elsewhere; the libraries that numba imports where they are there don't."""
    if args[0] == "record":
        (tmp_path / "ram").write_bytes(bytes(1 << 16))
        args = ["record", "--ram-file", tmp_path / "ram", *args[3:], "--output", tmp_path / "trace"]
    gone = "import os, tempfile; name = tempfile.mkdtemp(); os.chdir(name); os.rmdir(name); "
    done = process(gone + MAIN, *args, anew=args[0] == "migrate")  # which begins another process there
    said = [line for line in done.stderr.splitlines() if not line.startswith(NOW_AND_THEN)]
    assert (done.returncode, said) == (0, [])
    assert done.stdout


LIMITS = [files if files in (6, 9, 12) else pytest.param(files, marks=pytest.mark.slow) for files in range(6, 14)]


@pytest.mark.parametrize("files", LIMITS)
@pytest.mark.parametrize(
    ("args", "anew"),
    [
        (["harvest", ODD], True),
        pytest.param(SMALL, True, marks=pytest.mark.slow),
        (SMALL, False),
        (["trace", "show", "example:machine-hot"], False),
    ],
    ids=lambda each: each[0] if isinstance(each, list) else ("imported", "anew")[each],
)
@pytest.mark.alike(3)
def test_a_limit_is_named(args, anew: bool, files: int) -> None:
    """With ever fewer files that may be open, a command works, or says which limit it met and how to raise it."""
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({files}, {files})); "
    done = process(limit + MAIN, *args, anew=anew)
    assert "Traceback" not in done.stderr
    assert done.returncode in (0, 1), done.stderr
    said = f"Too many open files (the limit is {files} open files: ulimit -n raises it)\n"
    assert done.returncode == 0 or said in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("error", "limit", "said"),
    [
        (OSError(24, "x"), resource.RLIMIT_NOFILE, " (the limit is 8192 open files: ulimit -n raises it)"),
        (OSError(27, "x"), resource.RLIMIT_FSIZE, " (the limit is 8 KiB in a file: ulimit -f raises it)"),
        (MemoryError(), resource.RLIMIT_AS, " (the limit is 8 KiB of address space: ulimit -v raises it)"),
        (OSError(12, "x"), resource.RLIMIT_AS, " (the limit is 8 KiB of address space: ulimit -v raises it)"),
        (OSError(2, "x"), None, ""),
        (ValueError("x"), None, ""),
    ],
)
def test_limits(error: Exception, limit: int | None, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(resource, "getrlimit", lambda number: asked.append(number) or (8192, -1))
    assert pages.see(error) == said
    assert asked == ([] if limit is None else [limit])
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert pages.see(error) == ""


@pytest.mark.parametrize("where", ["del_", "thread"])
def test_what_fails_where_nobody_can_catch_it_is_one_line(where: str, tmp_path: Path) -> None:
    """A finalizer, a thread."""
    code = (
        "class Odd:\n    def __del__(self): raise ValueError('one\\ntwo')\n"
        "def del_(): Odd()\n"
        "def thread():\n"
        "    import threading; one = threading.Thread(target=lambda: int('x')); one.start(); one.join()\n"
        f"from hwdbm.cli import doctor; doctor.CHECKS = {{'it': ('it', {where})}}\n"
    )
    broken = process(code + MAIN, "doctor", "it")
    assert len(broken.stderr.splitlines()) == 2, broken.stderr  # and that None is no finding
    assert broken.stderr.startswith("hwdbm: warning: ValueError: ")


def test_a_thread_that_ends_itself_says_nothing() -> None:
    code = (
        "def leaves():\n    import sys, threading; one = threading.Thread(target=sys.exit); one.start(); one.join()\n"
        "from hwdbm.cli import doctor; doctor.CHECKS = {'it': ('it', leaves)}\n"
    )
    assert "SystemExit" not in process(code + MAIN, "doctor", "it").stderr


@pytest.mark.parametrize("columns", ["", "x", "-3", "0", "1", "19", "40", "\u0664\u0660", "9" * 30, "9" * 5000])
def test_any_width_will_do(run, columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("LINES", columns)
    migrate = ["migrate", "--memory", "1M", "--workload", "idle"]
    for args in (["--help"], ["harvest", ODD], ["inspect", ODD], *([migrate] if columns == "1" else [])):
        assert run(*args).status == 0, args
    assert run("harvest", "no").status == 1


def test_a_missing_module_of_our_own_is_no_missing_extra() -> None:
    done = process("import sys; sys.modules['hwdbm.cli.app'] = None; " + MAIN)
    assert "ModuleNotFoundError" in done.stderr


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4096", 4096),
        ("4k", 4096),
        ("4KiB", 4096),
        ("2MB", 2 << 20),
        ("0.5G", 1 << 29),
        ("1.2G", 1288490188),
        ("1.0001K", 1024),
        ("1T", 1 << 40),
        (" 8K ", 8192),
        ("0x10", 16),
    ],
)
def test_size(text: str, size: int) -> None:
    assert parse.size(text) == size


@pytest.mark.parametrize("text", ["", "K", "4X", "4 K", "-4K", "0x4K", "1e3"])
def test_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="is not a"):
        parse.size(text)


def test_columns() -> None:
    assert columns([["a", "n"], ["long", 1], ["b", 20]]) == "a      n\nlong   1\nb     20"


def test_columns_that_are_too_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a column for each row where that fits, and otherwise a line for each cell that isn't empty."""
    a, b, c = (letter * 20 for letter in "abc")
    table = [["slot", "of", "at", "by"], [0, a, b, c], [1, "", "d", 2]]
    monkeypatch.setenv("COLUMNS", "70")
    assert columns(table).splitlines()[1] == f"0     {a}  {b}  {c}"
    monkeypatch.setenv("COLUMNS", "69")
    turned = [f"slot  {0:>20}  1", f"of    {a}", f"at    {b}  d", f"by    {c}  2"]
    assert columns(table).splitlines() == turned
    monkeypatch.setenv("COLUMNS", "29")
    assert columns(table).splitlines() == turned
    monkeypatch.setenv("COLUMNS", "28")
    first, second = ["slot  0", f"of    {a}", f"at    {b}", f"by    {c}"], ["slot  1", "at    d", "by    2"]
    assert columns(table).splitlines() == [*first, "", *second]


def test_columns_with_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Below the heads, and behind them where the table is turned."""
    table, units = [["vm", "start", "sent"], ["database", "1.5", "20"]], ("", "s", "MiB")
    monkeypatch.setenv("COLUMNS", "21")
    assert columns(table, units=units).splitlines() == [
        "vm        start  sent", "              s   MiB", "database    1.5    20",
    ]  # fmt: skip
    monkeypatch.setenv("COLUMNS", "20")
    assert columns(table, units=units).splitlines() == [
        "vm        database",
        "start s        1.5",
        "sent MiB        20",
    ]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_message_fits_a_terminal_and_is_one_line_elsewhere(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    said = StringIO()
    monkeypatch.setattr(said, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stderr", said)
    monkeypatch.setenv("COLUMNS", "30")
    streams.note("guest.sock: No such socket: nobody listens there")
    lines = ["hwdbm: guest.sock: No such", "  socket: nobody listens there"]
    assert said.getvalue().splitlines() == (lines if terminal else [" ".join(map(str.strip, lines))])


def test_wrong_usage_fits_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    said = StringIO()
    monkeypatch.setattr(said, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", said)
    monkeypatch.setattr(sys, "argv", ["hwdbm", "migrate", "--to", "guest.sock"])
    monkeypatch.setenv("COLUMNS", "60")
    assert app.run() == 2
    lines = said.getvalue().splitlines()
    assert max(map(len, lines)) <= 60
    assert "'guest.sock' is not HOST:PORT" in " ".join(map(str.strip, lines))
    assert "nor unix:PATH" in " ".join(map(str.strip, lines))


def test_a_log_is_told_now_and_then(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for every, said in ((1e9, ""), (0, "hwdbm: half of it\n")):
        monkeypatch.setattr(output, "_EVERY", every)
        with output.busy("all of it") as tell:
            tell("half of it")
        assert capsys.readouterr() == ("", said)
