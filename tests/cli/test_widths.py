"""What every command prints fits the columns of stdout: 80 where nothing says how many there are, and 40."""

import json
from pathlib import Path

import numpy as np
import pytest

from hwdbm.cli import receive, streams
from hwdbm.cli.app import TASKS
from hwdbm.migration.receiver import Received
from hwdbm.races import MISTAKES

PLAN = Path(__file__).parents[2] / "docs" / "examples" / "fleet" / "plan.json"
SMALL = "--memory 1M --workload idle"
COMMANDS = {
    "": "",
    "bench": "bench clients --memory 2M --repeat 1",
    "bitmap and": "bitmap and a b --output and",
    "bitmap convert": "bitmap convert a --to criu --base 0x7f0000000000 --output pages",
    "bitmap diff": "bitmap diff a b",
    "bitmap minus": "bitmap minus a b --output minus",
    "bitmap or": "bitmap or a b --output or",
    "bitmap rescale": "bitmap rescale a --from 4K --to 64K --output rescaled",
    "bitmap show": "bitmap show a",
    "doctor": "doctor",
    "fleet": f"fleet {PLAN} --drain h0",
    "harvest": "harvest example:kvm-6.1 --policy writable --output dirty",
    "inspect": "inspect example:4k_blocks",
    "migrate": f"migrate {SMALL} --max-downtime 20000",
    "plan": "plan example:machine-hot --bandwidth 50M --rules",
    "races": "races device-marks-first",
    "record": f"record {SMALL} --duration 50ms --interval 20ms --output recorded",
    "snapshot check": "snapshot check chain",
    "snapshot diff": "snapshot diff chain ram --ram-base 0x4000_0000",
    "snapshot list": "snapshot list chain",
    "snapshot prune": "snapshot prune chain --keep 1",
    "snapshot rebase": "snapshot rebase chain",
    "snapshot restore": "snapshot restore chain --output restored",
    "snapshot save": f"snapshot save saved --source machine {SMALL} --count 1 --every 1",
    "trace show": "trace show example:machine-bursty",
}
ELSEWHERE = {
    "completion": "scripts to be run",
    "receive": "a process that waits for another: test_what_came",
    "watch": "a QEMU: test_watch.py",
}


def too_wide(text: str, columns: int) -> list[str]:
    """Return the lines that are wider than the screen and needn't be."""
    return [line for line in text.splitlines() if len(line) > columns and len(line.split()) > 1]


def test_no_command_is_left_out() -> None:
    names = []
    for name, entry in (each for entries in TASKS.values() for each in entries.items()):
        command = entry.load(name)
        verbs = command.list_commands(None) if hasattr(command, "list_commands") else []
        names += [f"{name} {verb}" for verb in verbs] or [name]
    assert sorted(["", *names]) == sorted([*COMMANDS, *ELSEWHERE])


@pytest.mark.parametrize("columns", ["", pytest.param("80", marks=pytest.mark.slow), "40"])
@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.alike(2)
def test_what_a_command_prints_fits(run, name: str, columns: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)
    words = np.arange(64, dtype=np.uint64) * np.uint64(0x0123_4567_89AB_CDEF)
    for file, content in (("a", words), ("b", words[::-1]), ("ram", np.ones(1 << 20, dtype=np.uint8))):
        Path(file).write_bytes(content.tobytes())
    if "chain" in COMMANDS[name]:
        for verb in ("save", "diff"):
            assert run("snapshot", verb, "chain", "ram", "--ram-base", "0x4000_0000").status == 0
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
    found = run(*COMMANDS[name].split())
    assert found.status == (3 if name == "fleet" else 0), found.err
    assert found.out
    assert not too_wide(found.out.partition("Examples:")[0], int(columns or 80))


@pytest.mark.parametrize("columns", [80, 60, 59, 40, 20])
@pytest.mark.parametrize("name", [*MISTAKES][::7])
@pytest.mark.alike(2)
def test_what_races_print_fits(run, name: str, columns: int, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    found = run("races", name)
    assert found.status == 0
    assert not too_wide(found.out, columns)


def test_what_came_fits(capsys, monkeypatch) -> None:
    came = Received(None, 500 << 20, 3, 123456, 789, "ab" * 32)  # type: ignore[arg-type]
    for columns in (80, 40):
        monkeypatch.setenv("COLUMNS", str(columns))
        streams.result(receive._text(came))
        assert not too_wide(capsys.readouterr().out, columns)


def test_what_is_wrapped_is_all_there(capsys, monkeypatch) -> None:
    """A line that goes on is indented further than it began; what programs read stays as it is."""
    monkeypatch.setenv("COLUMNS", "20")
    long = f"one two three four five six {'x' * 30} seven"
    streams.result(f"{long}\n    {long}\n\nshort   line")
    out = capsys.readouterr().out
    assert out.splitlines()[:4] == ["one two three four", "  five six", f"  {'x' * 30}", "  seven"]
    assert out.splitlines()[-2:] == ["", "short   line"]
    assert " ".join(out.split()) == f"{long} {long} short line"
    streams.result(streams.json_text({"a": long}))
    assert json.loads(capsys.readouterr().out.replace("\n", "")) == {"a": long}
