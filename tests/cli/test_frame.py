"""What holds for every command as a process: interrupts, streams that are gone, and where its code comes from."""

import ast
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest

import hwdbm
from hwdbm import kernels
from hwdbm.cli import interrupt, migrate, record, snapshot
from hwdbm.trace import content

ROOT = Path(__file__).parents[2]
ODD = Path(__file__).parents[1] / "data" / "captures" / "4k_ipa40" / "round1.npz"
COMMAND = [sys.executable, "-P", "-W", "error", "-m", "hwdbm"]
NOW_AND_THEN = re.compile(r"hwdbm: (active for|measured) ")  # what a command says each ten seconds
MIGRATE = ["migrate", "--memory", "4M", "--workload", "idle"]
LONG = [["migrate", "--memory", "64M", "--bandwidth", "1M"], ["bench", "--memory", "4G"]]
HEEDED = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


def start(*args: object, **options) -> "subprocess.Popen[str]":
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return forked.Popen([*COMMAND, *map(str, args)], text=True, **pipes)


def descendants(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except FileNotFoundError:
        return []
    return [each for child in map(int, children) for each in (child, *descendants(child))]


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


class TestInterrupt:
    def test_during_imports(self) -> None:
        """Ctrl-C, and what is answered as that, as the process begins to import each of some modules."""
        modules = ["hwdbm.cli", "signal", "contextlib", "hwdbm.cli.interrupt", "hwdbm.process", "hwdbm.cli.app",
                   "typer", "numpy", "numpy.linalg", "rich", "hwdbm.machine", "llvmlite", "numba"]  # fmt: skip
        numbers = [int(number) for number in HEEDED]
        code = (
            "import os, sys\n"
            f"left = {modules}\n"
            "def told(event, args):\n"
            "    if event != 'import' or args[0] not in left: return\n"
            "    left.remove(args[0])\n"
            f"    for number in {numbers}:\n"
            "        if pid := os.fork():\n"
            "            print(args[0], number, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)\n"
            "        else:\n"
            "            left.clear()\n"
            "            os.kill(os.getpid(), number)\n"
            "            return\n"
            "    left or os._exit(0)\n"
            "sys.addaudithook(told)\n"
            "from hwdbm.__main__ import main; main()"
        )
        of_threads = "ignore:This process:DeprecationWarning"
        command = [sys.executable, "-P", "-W", "error", "-W", of_threads, "-c", code, *MIGRATE]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
        ended = [line.split() for line in done.stdout.splitlines()]
        assert sorted(ended) == sorted([module, str(number), "130"] for module in modules for number in numbers)
        assert done.stderr == len(ended) * "hwdbm: interrupted\n"

    def test_signals_that_are_ignored_during_imports(self) -> None:
        """As by nohup."""
        numbers = [int(signal.SIGTERM), int(signal.SIGHUP)]
        code = (
            "import os, signal, sys\n"
            f"for number in {numbers}: signal.signal(number, signal.SIG_IGN)\n"
            "def told(event, args):\n"
            "    if event == 'import' and args[0] in ('hwdbm.cli', 'hwdbm.process', 'numpy'):\n"
            f"        for number in {numbers}: os.kill(os.getpid(), number)\n"
            "sys.addaudithook(told)\n"
            "from hwdbm.__main__ import main; main()"
        )
        command = [sys.executable, "-P", "-W", "error", "-c", code, "harvest", str(ODD), "--json"]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")

    def test_nothing_is_imported_before_an_interrupt_is_answered(self) -> None:
        """The script's own imports, up to the first that takes longer than a builtin's."""
        hook = (
            "import sys, signal; old = set(sys.modules)\n"
            "def told(event, args):\n"
            "    if event == 'import' and signal.getsignal(2) is signal.default_int_handler: print(args[0])\n"
            "sys.addaudithook(told)\n"
        )
        code = hook + (ROOT / "bin" / "hwdbm").read_text()
        command = [sys.executable, "-P", "-c", code, "--version"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        before, version = done.stdout.splitlines()[:-1], done.stdout.splitlines()[-1]
        assert version == f"hwdbm {hwdbm.__version__}"
        assert before == ["hwdbm.__main__", "hwdbm"]

    def test_a_signal_is_followed_by_a_few_nudges_and_no_more(self) -> None:
        """A nudge is no signal that is to be followed by others."""
        code = (
            "import signal, time; from hwdbm.cli import interrupt\n"
            "interrupt._NUDGES = (0.01, 0.01, 0.01); interrupt.nudge(); nudges = []\n"
            "signal.signal(interrupt._NUDGE, lambda *_: nudges.append(1))\n"
            "signal.signal(signal.SIGTERM, lambda *_: None); signal.raise_signal(signal.SIGTERM)\n"
            "end = time.monotonic() + 0.6\n"
            "while time.monotonic() < end: time.sleep(0.01)\n"
            "print(len(nudges))"
        )
        done = subprocess.run([sys.executable, "-P", "-c", code], check=True, capture_output=True, timeout=20)
        assert done.stdout == b"3\n"

    def test_no_system_call_keeps_it_waiting(self) -> None:
        """A signal just before a call that waits, here one to another thread, doesn't end that call."""
        code = (
            "import select, signal, threading; from hwdbm.cli import interrupt\n"
            "interrupt.install(); interrupt.nudge()\n"
            "signals = threading.Timer(0.2, lambda: signal.pthread_kill(threading.get_ident(), signal.SIGINT))\n"
            "signals.start(); select.poll().poll()"
        )
        done = subprocess.run([sys.executable, "-P", "-c", code], check=False, capture_output=True, timeout=20)
        assert (done.returncode, done.stderr) == (130, b"hwdbm: interrupted\n")

    @pytest.mark.parametrize(
        ("module", "args"),
        [
            (migrate, MIGRATE),
            (record, ["record", "--memory", "1M", "--workload", "idle", "--output", "trace"]),
            (snapshot, ["snapshot", "save", "new", "--source", "machine", "--memory", "1M"]),
            (snapshot, ["snapshot", "restore", "chain", "--source", "machine"]),
            (record, ["record", "--ram-file", "ram", "--output", "trace"]),
        ],
        ids=lambda each: " ".join(each[:2]) if isinstance(each, list) else "",
    )
    def test_a_command_that_ends_early_says_so(self, run, module, args, tmp_path: Path, monkeypatch) -> None:
        """It asked for an event, which is set already; what it did until then it has told.

        Nothing is left to be compiled by then, which would keep an interrupt waiting.
        """
        monkeypatch.chdir(tmp_path)
        (tmp_path / "ram").write_bytes(bytes(4096))
        made = run("snapshot", "save", "chain", "--source", "machine", "--memory", "1M", "--count", "0")
        assert made.status == 0
        loaded = []
        monkeypatch.setattr(kernels, "warm_up", lambda: loaded.append("kernels"))
        monkeypatch.setattr(content, "warm_up", lambda: loaded.append("comparison"))
        event = threading.Event()
        event.set()

        def as_event() -> AbstractContextManager:
            assert loaded == ["comparison" if "--ram-file" in args else "kernels"]
            return nullcontext(event)

        monkeypatch.setattr(module, "as_event", as_event)
        found = run(*args)
        assert (found.status, found.err) == (130, "hwdbm: interrupted\n")

    def test_while_a_name_is_looked_up(self, run, monkeypatch) -> None:
        """No signal ends that wait, nor one for a peer, so it is another thread's."""
        event, end, threads = threading.Event(), threading.Event(), []

        def resolve(*_: object, **__: object) -> None:
            threads.append(threading.current_thread())
            if args[0] == "migrate":
                event.set()
                end.wait(60)
            raise socket.gaierror(socket.EAI_AGAIN, "no answer")

        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        monkeypatch.setattr(migrate, "as_event", lambda: nullcontext(event))
        try:
            for args, status, said in (
                (["receive", "--memory", "1M", "--listen"], 1, "hwdbm: nowhere:1: no answer"),
                ([*MIGRATE, "--to"], 130, "hwdbm: interrupted\n"),
            ):
                found = run(*args, "nowhere:1", "--tls-dir", ROOT / "tests" / "data" / "tls")
                assert (found.status, found.err[: len(said)]) == (status, said)
        finally:
            end.set()
        assert len(threads) == 2
        assert threading.main_thread() not in threads
        assert all(thread.daemon for thread in threads)  # nobody waits for them at the end

    def test_what_comes_when_nobody_waits_any_more(self) -> None:
        """It is closed."""
        cancel, end, closed = threading.Event(), threading.Event(), threading.Event()

        class Late:
            close = closed.set

        cancel.set()
        with pytest.raises(InterruptedError):
            interrupt.elsewhere(lambda: end.wait(20) and Late(), cancel)
        end.set()
        assert closed.wait(20)
        late = Late()
        assert interrupt.elsewhere(lambda: late) is late

    def test_what_comes_late_and_is_waited_for(self) -> None:
        """It is looked several times whether there was an interrupt, and there was none."""
        for cancel in (None, threading.Event()):
            late = SimpleNamespace(close=None)
            assert interrupt.elsewhere(lambda late=late: time.sleep(3 * interrupt._LOOK) or late, cancel) is late
            with pytest.raises(ZeroDivisionError):
                interrupt.elsewhere(lambda: 1 // 0, cancel)

    def test_what_never_comes_keeps_no_process(self) -> None:
        code = (
            "import threading, time; from hwdbm.cli import interrupt\n"
            "cancel = threading.Event(); cancel.set()\n"
            "try: interrupt.elsewhere(lambda: time.sleep(60), cancel)\n"
            "except InterruptedError: print('ended')"
        )
        done = subprocess.run([sys.executable, "-P", "-c", code], check=True, capture_output=True, timeout=30)
        assert done.stdout == b"ended\n"

    def test_an_event_is_for_a_while(self) -> None:
        """Who answered before answers again afterwards; and at once when there was one interrupt."""
        before = [signal.getsignal(number) for number in HEEDED]
        with interrupt.as_event() as event:
            assert not {signal.getsignal(number) for number in HEEDED} & {*before, interrupt._leave}
            signal.raise_signal(signal.SIGTERM)
            assert event.wait(20)
            assert {signal.getsignal(number) for number in HEEDED} == {interrupt._leave}
        assert [signal.getsignal(number) for number in HEEDED] == before

    def test_an_answer_on_its_way_is_not_interrupted(self) -> None:
        code = (
            "import signal; from hwdbm.cli import interrupt\n"
            "interrupt.install(); interrupt.ignore()\n"
            f"for number in {[int(number) for number in HEEDED]}: signal.raise_signal(number)\n"
            "print('done')"
        )
        done = subprocess.run([sys.executable, "-P", "-c", code], check=True, capture_output=True, timeout=30)
        assert (done.stdout, done.stderr) == (b"done\n", b"")

    def test_while_its_locks_are_held(self) -> None:
        """The handler runs in the thread that has them."""
        code = (
            "import signal, subprocess, sys; from hwdbm import process; from hwdbm.cli import interrupt\n"
            "with process.child([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE) as child:\n"
            "    interrupt.install(process.kill_children)\n"
            "    with interrupt.as_event() as event:\n"
            "        with event._cond: signal.raise_signal(signal.SIGINT)\n"
            "        print(event.wait(10), flush=True)\n"
            "        with child._waitpid_lock: signal.raise_signal(signal.SIGINT)"
        )
        done = subprocess.run([sys.executable, "-P", "-c", code], check=False, capture_output=True, timeout=20)
        assert (done.returncode, done.stdout, done.stderr) == (130, b"True\n", b"hwdbm: interrupted\n")

    @pytest.mark.parametrize("library", ["numpy", pytest.param("llvmlite", marks=pytest.mark.slow)])
    @pytest.mark.parametrize("args", LONG, ids=lambda args: args[0])
    def test_while_it_imports(self, args: list[str], library: str) -> None:
        """As soon as it has mapped a library."""
        process = subprocess.Popen([*COMMAND, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        maps, until = Path(f"/proc/{process.pid}/maps"), time.monotonic() + 60
        while library not in maps.read_text():
            assert time.monotonic() < until
            time.sleep(0.01)
        self.is_interrupted(process)

    @pytest.mark.parametrize("args", LONG, ids=lambda args: args[0])
    def test_while_it_works(self, args: list[str]) -> None:
        process = start(*args)
        time.sleep(0.5)
        self.is_interrupted(process)

    @staticmethod
    def is_interrupted(process: "subprocess.Popen[str]") -> None:
        began = descendants(process.pid)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 130, err
        *before, last = err.splitlines()
        assert last.startswith("hwdbm: "), err
        assert all(NOW_AND_THEN.match(line) for line in before), err
        assert "Traceback" not in out + err
        assert not [pid for pid in began if lives(pid)]

    def test_twice(self) -> None:
        process = start("migrate", "--memory", "64M", "--bandwidth", "1M")
        while not descendants(process.pid):
            time.sleep(0.01)
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(0.02)
        _, err = process.communicate(timeout=20)
        assert process.returncode == 130
        assert "Traceback" not in err

    def test_a_terminal_is_left_as_it_was(self) -> None:
        """The line is gone that showed what goes on, and the cursor is there."""
        code = (
            "import os, time; from hwdbm.cli import interrupt, output; interrupt.install()\n"
            "with output.busy('a [b] c'): time.sleep(0.5); os.kill(os.getpid(), 2); time.sleep(20)"
        )
        ours, theirs = os.openpty()
        environment = os.environ | {"TERM": "xterm"}
        with subprocess.Popen([sys.executable, "-P", "-c", code], stderr=theirs, env=environment) as process:
            os.close(theirs)
            shown = b""
            with suppress(OSError):  # the other end is closed
                while part := os.read(ours, 1 << 16):
                    shown += part
            os.close(ours)
        assert process.returncode == 130
        assert b"a [b] c" in shown
        assert shown.endswith(b"\r\x1b[2K\x1b[?25hhwdbm: interrupted\r\n")

    @pytest.mark.parametrize("number", HEEDED)
    def test_again_while_it_is_answered(self, number: int) -> None:
        code = (
            "import signal, time; from hwdbm.cli import interrupt\n"
            f"interrupt.install(lambda: (signal.raise_signal({int(number)}), time.sleep(20)))\n"
            f"signal.raise_signal({int(number)})"
        )
        done = subprocess.run([sys.executable, "-P", "-c", code], check=False, capture_output=True, timeout=10)
        assert (done.returncode, done.stderr) == (130, b"hwdbm: interrupted\n")

    def test_nothing_is_said_after_it(self) -> None:
        """By a thread that misses what was cleaned up, such as a library's that logs."""
        code = (
            "import os, signal, threading, logging, sys; from hwdbm.cli import interrupt\n"
            "def cleanup():\n"
            "    thread = threading.Thread(target=lambda: (logging.error('it is gone'), os.write(2, b'gone')))\n"
            "    thread.start(); thread.join()\n"
            "interrupt.install(cleanup)\n"
            "signal.raise_signal(signal.SIGINT)"
        )
        done = subprocess.run([sys.executable, "-P", "-c", code], check=False, capture_output=True, timeout=30)
        assert (done.returncode, done.stderr) == (130, b"hwdbm: interrupted\n")

    def test_leaves_no_files(self, tmp_path: Path) -> None:
        """A draft and a temporary folder are removed by the process that is interrupted."""
        code = (
            "import os, sys, time; from pathlib import Path; from hwdbm import files; from hwdbm.cli import interrupt\n"
            "def named(path, flags, *args, **options):\n"
            "    if flags & os.O_TMPFILE == os.O_TMPFILE: raise OSError(95, 'no unnamed files here')\n"
            "    return real(path, flags, *args, **options)\n"
            "interrupt.install(files.abandon)\n"
            "real = os.open; os.open = named; file = files.NewFile('a')\n"
            "scratch = files.scratch(); Path(scratch.__enter__(), 'b').write_text('')\n"
            "print('ready', flush=True); time.sleep(20)"
        )
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", code],
            cwd=tmp_path, env=os.environ | {"TMPDIR": str(tmp_path)}, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdout.readline() == "ready\n"
        assert len(list(tmp_path.iterdir())) == 2
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=10)
        assert process.returncode == 130
        assert not list(tmp_path.iterdir())

    def test_leaves_nothing_that_it_has_just_made(self, tmp_path: Path) -> None:
        """The signal comes as soon as there is a file or a folder: before the call that made it has returned."""
        code = (
            "import os, signal, tempfile; from hwdbm import files; from hwdbm.cli import interrupt\n"
            "tempfile.gettempdir()  # Python's own, which tries once whether a file can be made\n"
            "def signalled(call):\n"
            "    def made(path, flags=0, *args, **options):\n"
            "        global left\n"
            "        if call is open and flags & os.O_TMPFILE == os.O_TMPFILE: raise OSError(95, 'no unnamed files')\n"
            "        answer, left = call(path, flags, *args, **options), left - 1\n"
            "        if left == -1: signal.raise_signal(signal.SIGINT)\n"
            "        return answer\n"
            "    return made\n"
            "open = os.open\n"
            "for left in range(20):\n"
            "    if (pid := os.fork()) == 0:\n"
            "        interrupt.install(files.abandon)\n"
            "        os.open, os.mkdir = signalled(os.open), signalled(os.mkdir)\n"
            "        with files.scratch() as folder, files.NewFile(folder / 'c'), files.NewFile('a'): pass\n"
            "        os._exit(0)\n"
            "    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])\n"
            "    print(status, *os.listdir('.'), flush=True)\n"
            "    if status == 0: break\n"
        )
        command, environment = [sys.executable, "-P", "-c", code], os.environ | {"TMPDIR": str(tmp_path)}
        done = subprocess.run(command, check=True, cwd=tmp_path, env=environment, capture_output=True, timeout=60)
        *cut, whole = done.stdout.decode().splitlines()
        assert whole == "0 a"
        assert len(cut) >= 5  # the folder, two that hold files, and the files
        assert set(cut) == {"130", "130 a"}  # the latter while the folder is removed, when all is done


class TestStreams:
    """A result that stdout can't take is a failure, but not that of what was done."""

    KINDS = ("full", "closed", "all but stderr closed", "no reader")

    @pytest.fixture(params=KINDS)
    def stdout(self, request) -> Iterator[dict]:
        if request.param == "full":
            with Path("/dev/full").open("w") as full:
                yield {"stdout": full}
        elif "closed" in request.param:
            yield {"stdout": None, "closed": (1,) if request.param == "closed" else (0, 1)}
        else:
            reader, writer = os.pipe()
            os.close(reader)
            yield {"stdout": writer}
            os.close(writer)

    @pytest.mark.parametrize("args", [["harvest", ODD], ["inspect", ODD, "--json"], ["--help"], ["--version"]])
    def test_a_result(self, stdout, args) -> None:
        process = start(*args, **stdout)
        _, err = process.communicate(timeout=60)
        self.is_lost(process.returncode, err)

    @staticmethod
    def is_lost(status: int, err: str) -> None:
        assert status == 1
        assert err.startswith("hwdbm: stdout can't be written: ")
        assert err.count("\n") == 1

    def test_an_interpreter_without_streams(self, stdout) -> None:
        """What Python itself does about them, as it begins and as it ends."""
        closed = stdout.pop("closed", ())
        command = [*COMMAND, "--version"]
        stdout["preexec_fn"] = lambda: [os.close(number) for number in closed]
        done = subprocess.run(command, check=False, stderr=subprocess.PIPE, text=True, timeout=60, **stdout)
        self.is_lost(done.returncode, done.stderr)

    def test_a_migration_that_completed(self, stdout) -> None:
        process = start(*MIGRATE, **stdout)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert err.startswith("hwdbm: the migration completed, but stdout can't be written: ")
        assert err.count("\n") == 1

    def test_files_that_were_written(self, stdout, tmp_path: Path) -> None:
        process = start("harvest", ODD, "--output", tmp_path / "dirty", **stdout)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0
        assert "but stdout can't be written" in err
        # With stdout closed, number 1 wasn't taken by one of the files.
        one = hwdbm.DirtyBitmap.from_bytes((tmp_path / "dirty" / "slot0.bitmap").read_bytes(), 8192)
        assert one.weight()

    @pytest.mark.parametrize("args", [["harvest", ODD.parent], ["harvest", "--no-such-option"], ["harvest", ODD]])
    def test_stderr_is_gone(self, args, tmp_path: Path) -> None:
        """It can't be told, and changes nothing: not the status, not what is on stdout."""
        want = start(*args)
        out, _ = want.communicate(timeout=60)
        with Path("/dev/full").open("w") as full:
            for stderr in ({"stderr": full}, {"stderr": None, "closed": (2,)}):
                process = start(*args, **stderr)
                got, _ = process.communicate(timeout=60)
                assert process.returncode == want.returncode
                assert got.rpartition(" in ")[0] == out.rpartition(" in ")[0]  # but for the time that it took


class TestOnlyTheInstalledPackage:
    """No process runs what lies in the current folder."""

    @pytest.fixture
    def traps(self, tmp_path: Path) -> Path:
        folder = tmp_path / "traps"
        (folder / "hwdbm").mkdir(parents=True)
        sprung = f"from pathlib import Path; Path({str(folder / 'sprung')!r}).touch(); raise SystemExit(99)\n"
        for name in ("typer", "rich", "numpy", "numba", "numexpr", "matplotlib", "ctypes", "json", "socket", "re"):
            (folder / f"{name}.py").write_text(sprung)
        for name in ("sitecustomize.py", "usercustomize.py", "hwdbm/__init__.py", "hwdbm/__main__.py"):
            (folder / name).write_text(sprung)
        return folder

    @pytest.mark.parametrize(
        "args",
        [
            pytest.param(["harvest", ODD, "--output", "out"], marks=pytest.mark.slow),
            pytest.param(["inspect", ODD, "--plot", "map.png"], marks=pytest.mark.slow),
            [*MIGRATE, "--report", "passes.png"],  # it draws too, and starts a process
            pytest.param(["bench", "--memory", "16M", "--repeat", "1"], marks=pytest.mark.slow),
        ],
        ids=lambda args: args[0],
    )
    def test_commands(self, traps: Path, args) -> None:
        command = [Path(sys.executable).with_name("hwdbm"), *args]
        done = subprocess.run(command, check=False, cwd=traps, capture_output=True, text=True, timeout=120)
        said = [line for line in done.stderr.splitlines() if not line.startswith("hwdbm: measured ")]  # now and then
        assert (done.returncode, said) == (0, [])
        assert not (traps / "sprung").exists()

    def test_as_a_module(self, traps: Path) -> None:
        """Without -P Python itself finds the folder's `hwdbm`; where it doesn't, nothing else is taken from there."""
        (traps / "hwdbm" / "__init__.py").unlink()
        (traps / "hwdbm" / "__main__.py").unlink()
        (traps / "hwdbm").rmdir()
        command = [sys.executable, "-m", "hwdbm", "inspect", ODD]
        done = subprocess.run(command, check=False, cwd=traps, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
        assert not (traps / "sprung").exists()

    @pytest.mark.parametrize("folder", ["dbm", "tests", "asv_bench"])
    def test_every_start_of_python(self, folder: str) -> None:
        """A list or tuple that begins with `sys.executable` goes on with -P or -I."""
        for path in sorted((ROOT / folder).rglob("*.py")):
            if ROOT / "asv_bench" / "env" in path.parents:  # what asv installs there is none of ours
                continue
            text = path.read_text()
            for node in ast.walk(ast.parse(text)) if "sys.executable" in text else ():
                if isinstance(node, ast.List | ast.Tuple) and path != Path(__file__).resolve():
                    texts = [ast.unparse(each) for each in node.elts[:2]]
                    if texts[:1] == ["sys.executable"]:
                        assert texts[1] in {"'-P'", "'-I'"}, f"{path}:{node.lineno}"

    def test_no_other_way_to_start_python(self) -> None:
        """The package starts processes through `subprocess` alone, and Python through `hwdbm.process` alone."""
        other = {"os.system", "os.popen", "os.fork", "runpy", "multiprocessing", "concurrent.futures.process"}
        word = re.compile(
            r"\.system|popen|fork|runpy|multiprocessing|futures|exec|spawn"
        )  # one is in each name that is looked for
        for path in sorted((ROOT / "dbm").rglob("*.py")):
            source = path.read_text()
            for node in ast.walk(ast.parse(source)) if word.search(source) else ():
                text = ast.unparse(node) if isinstance(node, ast.Attribute | ast.Name | ast.alias) else ""
                assert text not in other, f"{path}: {text}"
                assert not text.startswith(("os.exec", "os.spawn", "os.posix_spawn")), f"{path}: {text}"
                assert text != "sys.executable" or path.name == "process.py", f"{path}: {text}"


def test_names_are_imported_at_their_first_use() -> None:
    """Importing the package costs next to nothing; all that it names is there."""
    code = (
        "import sys, hwdbm; assert 'numpy' not in sys.modules\n"
        "assert all(getattr(hwdbm, name) is not None for name in hwdbm.__all__)\n"
        "assert set(hwdbm.__all__) <= set(dir(hwdbm)); hwdbm.nothing"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], check=False, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "AttributeError: module 'hwdbm' has no attribute 'nothing'"


@pytest.mark.parametrize(
    ("args", "not_needed"),
    [
        ([], ["numpy", "rich", "hwdbm.cli.harvest"]),
        (["--version"], ["numpy", "rich"]),
        (["harvest", "example:4k_blocks"], ["numba", "llvmlite", "matplotlib", "ssl", "hypothesis", "hwdbm.migration"]),
        (["doctor", "kernels"], ["numba", "llvmlite", "matplotlib", "hwdbm.kvm"]),
        (["completion", "bash"], ["numba", "matplotlib"]),
    ],
)
def test_a_command_imports_what_it_needs(args: list[str], not_needed: list[str]) -> None:
    """What takes a while to import is left out where nothing uses it."""
    code = (
        f"import sys; sys.argv = ['hwdbm', *{args!r}]\n"
        "from hwdbm.__main__ import main\n"
        "try: main()\n"
        f"finally: print([name for name in {not_needed!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "[]\n")
