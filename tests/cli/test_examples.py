"""The examples at the end of each help, in a fresh folder: those that are quick here, all of them by `make docs`."""

import shlex
from pathlib import Path

import pytest
from clitools import examples

ROOT = Path(__file__).parents[2]
EXAMPLES = examples()
QUICK = ("harvest", "inspect", "doctor", "completion", "races no-flush", "trace")


def test_each_command_has_examples() -> None:
    assert all(blocks for blocks in EXAMPLES.values())
    assert len(EXAMPLES) > 8


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name.startswith(QUICK)] + ["hwdbm"])
def test_examples_that_are_quick(run, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for block in EXAMPLES[name]:
        for line in block:
            command = shlex.split(line.removeprefix('eval "$(').removesuffix(')"').partition(" | ")[0])
            if command[0] == "hwdbm" and command[1] != "migrate":
                assert run(*command[1:]).status == 0, line
    assert name != "inspect" or (tmp_path / "map.png").exists()
    assert name != "harvest" or (tmp_path / "dirty" / "slot2.bitmap").exists()


def test_there_is_no_such_example(run) -> None:
    result = run("harvest", "example:none")
    assert (result.status, result.out) == (2, "")
    assert "there is no example 'none'; there is 4k_ipa40," in " ".join(result.err.split())
    assert (
        run("harvest", "example:4k_ipa40", "--ram-base", "0")
        .err.split("Error: ")[1]
        .startswith("Invalid value: example:4k_ipa40 is a capture")
    )


def test_the_raw_example_holds_what_its_capture_holds(run) -> None:
    registers = ["--ram-base", "0x41000000", "--vttbr", "0x41000000", "--vtcr", "0x806a3558"]
    raw = run("harvest", "example:ram", *registers, "--slot", "0:0x80000000:192M").out.splitlines()
    assert raw[1:-1] == run("harvest", "example:4k_blocks").out.splitlines()[1:-1]
