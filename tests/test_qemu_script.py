"""What the comparison with QEMU reads and reckons; the migrations themselves need a QEMU."""

import json
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

PATH = Path(__file__).parents[1] / "asv_bench" / "qemu_migration.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = spec_from_file_location("qemu_migration", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def record(total: float, verify: float | None = None, normal: int = 512) -> dict[str, object]:
    """Return what `query-migrate` answers, as far as it is read."""
    made: dict[str, object] = {"status": "completed", "total-time": total, "setup-time": 3, "downtime": 20}
    made["ram"] = {"transferred": 2_100_000, "normal": normal, "mbps": 8000.5, "total": 2 << 20}
    return made if verify is None else made | {"verify-time": verify}


def test_arguments(script: ModuleType) -> None:
    given = script.arguments([])
    assert (given.memory, given.runs, given.json) == (2 << 30, 3, False)
    given = script.arguments(["--memory", "64M", "--runs", "1", "--json"])
    assert (given.memory, given.runs, given.json) == (64 << 20, 1, True)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--memory", "lots"], "'lots' is not a size"),
        (["--memory", "1M"], "1M is not a whole number of blocks of 2M"),
        (["--memory", "0"], "0 is not a whole number of blocks of 2M"),
        (["--runs", "0"], "'0' is not a number of runs"),
        (["--runs", "-1"], "'-1' is not a number of runs"),
    ],
)
def test_wrong_usage(script: ModuleType, capsys: pytest.CaptureFixture[str], given: list[str], said: str) -> None:
    with pytest.raises(SystemExit) as caught:
        script.main(given)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


def test_without_qemu(
    script: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert script.main(["--memory", "2M"]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert "there is no qemu-system-x86_64: Debian has it in the package qemu-system-x86" in err


def test_digests_do_not_count(script: ModuleType) -> None:
    one = script.Migration.from_record(record(500, verify=200), 2 << 20)
    assert one.total_time == 0.5
    assert one.compared == pytest.approx(0.3)
    other = script.Migration.from_record(record(500), 2 << 20)
    assert other.compared == other.total_time == 0.5


def test_what_did_not_send_it_all_does_not_count(script: ModuleType) -> None:
    with pytest.raises(script.ComparisonError, match="511 pages were sent with their bytes, and not 512"):
        script.Migration.from_record(record(500, normal=511), 2 << 20)
    failed = record(500) | {"status": "failed", "error-desc": "no route"}
    with pytest.raises(script.ComparisonError, match="'failed': no route"):
        script.Migration.from_record(failed, 2 << 20)


@pytest.mark.parametrize(("total", "ratio", "met"), [(266, 0.66, True), (268, 0.68, False)])
def test_ratio_of_medians(script: ModuleType, total: float, ratio: float, met: bool) -> None:
    def of(*records: dict[str, object]) -> tuple[object, ...]:
        return tuple(script.Migration.from_record(one, 2 << 20) for one in records)

    qemu = of(record(100), record(900), record(100))
    ours = of(record(900, 800), record(total, 200), record(50, 10))
    done = script.Comparison(2 << 20, "QEMU 7.2", qemu, {"TCP": ours, "Unix socket": of(*[record(10)] * 3)})
    assert done.ratio("TCP") == pytest.approx(ratio)
    assert done.ratio("TCP", verified=True) == pytest.approx(total / 100)

    answer = json.loads(json.dumps(done.to_dict()))
    assert (answer["hwdbm"]["TCP"]["ratio"], answer["hwdbm"]["TCP"]["met"]) == (ratio, met)
    assert answer["hwdbm"]["Unix socket"]["ratio"] == 0.1
    assert [one["total-time"] for one in answer["qemu"]] == [100, 900, 100]
    assert "verify-time" not in answer["qemu"][0]
    assert answer["hwdbm"]["TCP"]["runs"][1]["verify-time"] == 200

    text = done.to_text()
    assert f"hwdbm, TCP: {ratio:.3f} without the digests, which QEMU doesn't have" in text
    assert text.count("at most 0.667: yes") == 1 + met
    assert "2M of random memory" in text


def test_rom_halts_at_the_reset_vector(script: ModuleType) -> None:
    rom = script.halting_rom()
    assert len(rom) == 1 << 16
    assert rom[0xFFF0:0xFFF4] == bytes((0xFA, 0xF4, 0xEB, 0xFD))  # the jump is from its own end to hlt, 3 before
