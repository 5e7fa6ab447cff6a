"""What commands print with --json is what docs/schemas says, key by key, and a schema says nothing else."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import forked
import jsonschema
import numpy as np
import pytest
import typer
from qmptools import ANSWERS, Monitor
from synthetic import DBM, S2AP_W, Geometry, Tables

from hwdbm import races
from hwdbm.cli.app import app
from hwdbm.forecast import geometric
from hwdbm.machine import Machine
from hwdbm.memslot import Memslot
from hwdbm.migration.report import Pass, Report
from hwdbm.snapshot import write_diff, write_full
from hwdbm.trace import Writer

SCHEMAS = Path(__file__).parents[2] / "docs" / "schemas"
CAPTURE = Path(__file__).parents[1] / "data" / "captures" / "4k_ipa40" / "round1.npz"
# JSON Schema takes 3.0 for an integer; a program in another language may not.
INTEGERS = jsonschema.Draft202012Validator.TYPE_CHECKER.redefine("integer", lambda _, value: type(value) is int)
VALIDATOR = jsonschema.validators.extend(jsonschema.Draft202012Validator, type_checker=INTEGERS)
MAIN = [sys.executable, "-P", "-c", "from hwdbm.cli import main; main()"]


def schema_of(name: str) -> dict[str, Any]:
    return json.loads((SCHEMAS / f"{name}.json").read_text(encoding="utf-8"))


def check(name: str, *texts: str) -> None:
    """Hold outputs against a schema; together they show each of its keys."""
    schema = schema_of(name)
    validator = VALIDATOR(schema)
    shown: set[str] = set()
    for text in texts:
        value = json.loads(text)
        validator.validate(value)
        collect(value, shown)
    missing = set(keys(schema)) - shown
    assert not missing, f"no output of `{name}` has {sorted(missing)}"


def collect(value: object, into: set[str]) -> None:
    if isinstance(value, dict):
        into.update(value)
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        collect(each, into)


def objects(schema: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        part for part in (schema, schema.get("items", {}), *schema.get("$defs", {}).values()) if "properties" in part
    ]


def keys(schema: dict[str, Any]) -> list[str]:
    return [key for part in objects(schema) for key in part["properties"]]


@pytest.mark.parametrize("path", sorted(SCHEMAS.glob("*.json")), ids=lambda path: path.stem)
def test_a_schema_is_one(path: Path) -> None:
    schema = schema_of(path.stem)
    jsonschema.Draft202012Validator.check_schema(schema)
    for part in objects(schema):
        assert part["additionalProperties"] is False
        for key, value in part["properties"].items():
            assert value["description"].endswith("."), key


@pytest.mark.parametrize("wrong", [{"images": [{"image": 1}]}, {"images": [{"image": "a", "sum": 1}]}, {}])
def test_a_schema_refuses_what_is_wrong(wrong: object) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, schema_of("harvest"))


def test_harvest(run, tmp_path: Path) -> None:
    found = run("harvest", CAPTURE, "--check", "--output", tmp_path / "out", "--json")
    failed = run("harvest", CAPTURE, tmp_path / "nowhere.npz", "--json")
    tables = Tables(Geometry(12, 1, 36))
    tables.leaf(0, 3, DBM | S2AP_W)
    base, ram = tables.raw()
    (tmp_path / "ram").write_bytes(ram)
    registers = ["--vttbr", hex(tables.g.vttbr(tables.root)), "--vtcr", hex(tables.g.vtcr)]
    live = run(
        *("harvest", tmp_path / "ram", "--live", "--ram-base", hex(base), *registers, "--slot", "0:0:2M", "--json")
    )
    assert (found.status, failed.status, live.status) == (0, 1, 0)
    check("harvest", found.out, failed.out, live.out)


def test_inspect(run) -> None:
    check("inspect", run("inspect", CAPTURE, "--json").out)


def test_doctor(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    check("doctor", run("doctor", "--json").out)


def test_bench(run) -> None:
    check("bench", run("bench", "enable", "unmapped", "--memory", "2M", "--repeat", "1", "--json").out)


def test_migrate_and_receive(run) -> None:
    with tempfile.TemporaryDirectory() as folder:
        receiver = forked.Popen(
            [*MAIN, "receive", "--unix", f"{folder}/s", "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert receiver.stderr is not None
            assert "listening" in receiver.stderr.readline()
            migrated = run("migrate", "--memory", "1M", "--max-downtime", "9000", "--to", f"unix:{folder}/s", "--json")
            received, _ = receiver.communicate(timeout=30)
        finally:
            receiver.kill()
    assert migrated.status == 0
    # What a migration of this kind can't show: a failure, a throttled guest, a real one.
    rare = Report(4096, 1 << 20, 0.3, status="failed", error="gone", handover_unknown=True, guest_resumed=False)
    rare.passes = [Pass(1, 256, 1 << 20, expected_downtime=0.4, throttle=20, paused=0.5)]
    rare.passes[0].forecast = geometric(1000, 50, 100, 2)
    check("migrate", migrated.out, json.dumps(rare.to_dict()))
    check("receive", received, json.dumps(json.loads(received) | {"guest-resumed": True}))


def test_plan(run, tmp_path: Path) -> None:
    with Writer(tmp_path / "trace", [Memslot(0, 0, 0, 640, 0)], 4096) as writer:
        for i in range(6):
            words = np.zeros(10, dtype=np.uint64)
            words[i] = 255
            writer.append((i + 1) * 100_000_000, words)
    found = run("plan", tmp_path / "trace", "--bandwidth", "1M", "--rules", "--json")
    assert found.status == 0
    check("plan", found.out)


def test_watch(run, tmp_path: Path) -> None:
    monitor = Monitor(tmp_path / "qmp", [*ANSWERS])
    check("watch", *run("watch", "--qmp", monitor.path, "--interval", "0.001", "--json").out.splitlines())
    monitor.close()


def test_rebase(run, tmp_path: Path) -> None:
    with Machine() as machine:
        machine.add_memslot(1 << 20, 0)
        machine.start_log()
        write_full(machine, tmp_path / "base")
        machine.vcpus[0].store(np.array([4096]), np.array([1], dtype=np.uint64))
        write_diff(machine, tmp_path / "diff")
    base, diff = tmp_path / "base", tmp_path / "diff"
    lone = run("snapshot", "rebase", base, diff, "--json").out
    chain, ram = tmp_path / "chain", ["--ram-base", "0"]
    full = run("snapshot", "save", chain, base, *ram, "--json").out
    base.write_bytes(bytes(1 << 20))
    check("snapshot-diff", run("snapshot", "diff", chain, base, *ram, "--json").out)
    check("snapshot-list", run("snapshot", "list", chain, "--json").out)
    how = ["--source", "machine", "--memory", "1M", "--every", "1", "--count", "1", "--json"]
    moved = {"migration": {"status": "failed", "total-time": 1, "downtime": 2, "sha256": "", "error": ""}}
    guest = json.loads(run("snapshot", "save", tmp_path / "guest", *how).out)
    check("snapshot-save", full, json.dumps(guest | moved))
    out = ["--output", tmp_path / "out", "--state", tmp_path / "state", "--source", "machine", "--seconds", "0"]
    check("snapshot-restore", run("snapshot", "restore", tmp_path / "guest", *out, "--json").out)
    next(chain.glob("000000-*.mem")).unlink()
    check("snapshot-check", run("snapshot", "check", chain, "--json").out)
    check("snapshot-rebase", lone, run("snapshot", "rebase", tmp_path / "guest", "--json").out)
    check("snapshot-prune", run("snapshot", "prune", tmp_path / "guest", "--keep", "1", "--json").out)


def test_bitmaps(run, tmp_path: Path) -> None:
    one, two, out = tmp_path / "one", tmp_path / "two", ["--output", tmp_path / "out", "--json"]
    one.write_bytes(bytes([7] * 8))
    two.write_bytes(bytes([9] * 8))
    check("bitmap-show", run("bitmap", "show", one, "--json").out)
    for verb in ("diff", "or", "and", "minus"):
        check(f"bitmap-{verb}", run("bitmap", verb, one, two, *out).out)
    check("bitmap-rescale", run("bitmap", "rescale", one, "--from", "4K", "--to", "64K", *out).out)
    check("bitmap-convert", run("bitmap", "convert", one, "--to", "criu", *out).out)


def test_record_and_trace(run, tmp_path: Path) -> None:
    how = ["--memory", "1M", "--duration", "50ms", "--interval", "10ms", "--json"]
    check("record", run("record", "--output", tmp_path / "trace", *how).out)
    check("trace-show", run("trace", "show", tmp_path / "trace", "--json").out)


def test_races(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(races, "MISTAKES", {"no-flush": races.MISTAKES["no-flush"]})
    monkeypatch.setattr(races, "PRODUCTION", {"device": races.PRODUCTION["device"]})
    init = "AArch64 {}\n{{ 0:X1=x; }}\nP0 ;\n{} ;\nexists x=1"
    for name, code in (("one", "STR W0,[X1]"), ("two", "LDXR W0,[X1]"), ("three", "NOP")):
        (tmp_path / f"{name}.litmus").write_text(init.format(name, code))
    (tmp_path / "kinds.txt").write_text("one Allowed\ntwo Allowed\n")
    every, one = run("races", "--json"), run("races", "no-flush", "--json")
    litmus = run("races", "--litmus", tmp_path, "--json")
    assert (every.status, one.status, litmus.status) == (0, 0, 3)
    check("races", every.out, one.out, litmus.out)


def test_fleet(run) -> None:
    found = run("fleet", SCHEMAS.parent / "examples" / "fleet" / "plan.json", "--drain", "h0", "--json").out
    check("fleet", found, json.dumps(json.loads(found) | {"at-once": 1}))


def test_each_command_has_one() -> None:
    """A command that takes --json has a schema, and a schema a command."""

    def leaves(group: Any, prefix: str = "") -> set[str]:
        found: set[str] = set()
        for name in group.list_commands(None):
            command = group.get_command(None, name)
            if hasattr(command, "list_commands"):
                found |= leaves(command, f"{prefix}{name}-")
            elif any("--json" in parameter.opts for parameter in command.params):
                found.add(f"{prefix}{name}")
        return found

    assert leaves(typer.main.get_command(app)) == {path.stem for path in SCHEMAS.glob("*.json")}
