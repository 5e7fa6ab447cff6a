"""What commands say of what they did, to each unit and plural, was looked at: at 80 and at 40 columns, and as JSON.

What they did is made up here, so that numbers differ where they can, and lie where their rounding turns.
"""

import json
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from clocks import Clock
from seen import as_seen

from hwdbm.bench import Row
from hwdbm.bitmap import DirtyBitmap
from hwdbm.cli import bench, bitmap, example, harvest, inspect, migrate, races, record, snapshot, trace, watch
from hwdbm.forecast import Estimate, Forecast, Needs
from hwdbm.image import open_image
from hwdbm.image.harvest import Ask, harvest_slots
from hwdbm.memslot import Memslot
from hwdbm.migration import Report

MIB = 1 << 20


def both(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, say: Any, *widths: int) -> str:
    """Return what is said on so many columns, and as JSON."""
    said = []
    for columns in widths or (80, 40):
        monkeypatch.setenv("COLUMNS", str(columns))
        say(as_json=False)
        said += [f"--- {columns} columns", capsys.readouterr().out]
    say(as_json=True)
    return "\n".join([*said, "--- JSON", capsys.readouterr().out])


ROWS = [
    Row("harvest, fused, clean", 0.0004567, "sum()", 0.0004151, 1.1),
    Row("harvest, vector, 1 % of stripes", 0.9999996, "sum()", 0.25),
    Row("1 s", 1.0, "AND in place", 0.5, 1.9999),
    Row("2 MiB blocks", 1234.5678, "4 KiB pages", 1000.0, 1.25),
    Row("resident", 3.5 * MIB, "400 MiB", 400 << 20, 1.0, "byte"),
]


def test_a_bench(capsys, monkeypatch) -> None:
    def say(*, as_json: bool) -> None:
        bench.bench(None, 2 << 20, 1, as_json=as_json)

    monkeypatch.setattr(bench, "run", lambda setup, names: iter(ROWS) if (setup.npages, names) == (512, None) else None)
    monkeypatch.setattr(bench, "busy", lambda _: nullcontext(print))
    as_seen("said/bench.txt", both(capsys, monkeypatch, say))


@pytest.mark.parametrize(
    ("memory", "says"),
    [(2 * MIB, None), (1 << 52, None), (0, "multiple of 2M"), (MIB, "multiple of 2M"), (3 * MIB, "multiple of 2M"),
     (2 * MIB + 1, "multiple of 2M"), ((1 << 52) + 2 * MIB, "4096T at most")],
)  # fmt: skip
def test_the_memory_of_a_bench(memory, says, monkeypatch, capsys) -> None:
    asked = []
    monkeypatch.setattr(bench, "run", lambda setup, _: asked.append(setup.npages) or iter(ROWS))
    with pytest.raises(bench.typer.BadParameter, match=says) if says else nullcontext():
        bench.bench(None, memory, 3)
    assert asked == ([] if says else [memory >> 12])


@pytest.mark.parametrize("runs", [0, 1, 10, 11, 23])
def test_ten_runs_of_a_bitmap_are_shown(runs, capsys) -> None:
    found = DirtyBitmap.from_ranges([(3 * at, 2) for at in range(runs)], 100)
    bitmap._say(found, as_json=False, page_size=4096)
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == f"{2 * runs} of 100 pages dirty, in {runs} runs"
    shown = [f"  {3 * 4096 * at:#018x}  8192 bytes" for at in range(min(runs, 10))]
    assert rest == shown + ([f"  and {runs - 10} more"] if runs > 10 else [])


@pytest.mark.parametrize("form", ["ranges", "criu"])
def test_how_large_a_table_of_ranges_may_be(form, run, tmp_path, monkeypatch) -> None:
    bits, table = tmp_path / "bits", tmp_path / "table"
    bits.write_bytes(bytes([5, *7 * [0]]))
    assert run("bitmap", "convert", bits, "--to", form, "--output", table).status == 0
    for most, status in ((table.stat().st_size, 0), (table.stat().st_size - 1, 1)):
        monkeypatch.setattr(bitmap, "_MOST_FILE", most)
        back = run("bitmap", "convert", table, "--from", form, "--pages", 64, "--output", tmp_path / "back")
        assert (back.status, f"table has more than {most} bytes" in back.err) == (status, bool(status))
    assert (tmp_path / "back").read_bytes() == bits.read_bytes()


def test_the_time_of_a_harvest_is_in_ms() -> None:
    path = example.find("example:4k_blocks")
    image = open_image(path)
    found = replace(harvest_slots(image, Ask("dbm")), seconds=0.0123456)
    report = harvest._report(path, image, found)
    assert report["total"]["time"] == 12.346
    assert harvest._text(report).endswith("read in 12.3 ms")


TRACE = SimpleNamespace(
    path=Path("a.trace"), source="kvm x86_64", mechanism="ring", page_size=16384, npages=1000, intervals=2,
    complete=True, started=7, interval=0.1, slots=[Memslot(3, 0, 64, 1000, 0)],
)  # fmt: skip


@pytest.mark.parametrize("times", ["clock", "names", "interval"])
def test_a_recording(times, capsys, monkeypatch) -> None:
    found = SimpleNamespace(seconds=1.2345678, pages=np.array([300, 40]), touched=np.array([300, 320]))
    monkeypatch.setattr(record, "analyse", lambda _trace, rows, cells: found if rows == cells == 1 else None)

    def say(*, as_json: bool) -> None:
        record._say(TRACE, times, as_json=as_json)  # type: ignore[arg-type]
        TRACE.intervals = 0
        try:
            record._say(TRACE, times, as_json=as_json)  # type: ignore[arg-type]
        finally:
            TRACE.intervals = 2

    as_seen(f"said/recorded-{times}.txt", both(capsys, monkeypatch, say))


def test_a_recording_that_goes_on() -> None:
    said: list[str] = []
    record._telling(said.append, 20.5)(12, 3.14159, 12345)
    assert said == ["recording: 3.1 of 20.5 s, 12 intervals, 12,345 pages in the last"]


def test_slots_of_bitmaps_are_whole_pages() -> None:
    given = [SimpleNamespace(id=1, gpa=1 << 16, size=3 << 16), SimpleNamespace(id=2, gpa=5 << 16, size=1 << 16)]
    assert record._slots(given, 1 << 16) == [Memslot(1, 0, 1, 3, 0), Memslot(2, 0, 5, 1, 0)]
    assert record._slots([], 4096) is record._slots(None, 4096) is None
    for wrong in ({"gpa": 4096}, {"size": 4096}):
        each = SimpleNamespace(**{"id": 1, "gpa": 1 << 16, "size": 1 << 16} | wrong)
        with pytest.raises(record.typer.BadParameter, match="not whole pages of 65536 bytes"):
            record._slots([each], 1 << 16)


def analysis(periods: int) -> Any:
    """Return what was made up of a trace: as many periods, and pages of four sizes."""
    return SimpleNamespace(
        page_size=16384, npages=1000, seconds=12.3456,
        periods=tuple(
            SimpleNamespace(seconds=0.0005 * 3 ** (at // 10), pages=at + 7, low=at + 3, high=at + 9, rate=99 / (at + 1))
            for at in range(0, 10 * periods, 10)
        ),
        amounts=[
            SimpleNamespace(page_size=size, nbytes=nbytes)
            for size, nbytes in ((16384, 5 * MIB), (1 << 19, 7 * MIB), (1 << 20, 9 * MIB), (2 << 20, 16 * MIB))
        ],
        working=SimpleNamespace(windows=np.array([30, 20, 50, 40]), seconds=0.9996), touched=np.array([10, 200, 345]),
        pages=np.array([100, 300]), zeros=33, initial_zeros=250,
    )  # fmt: skip


def test_what_a_trace_says() -> None:
    """All periods up to twelve, and of more the first, the last and ten between; rates beside the finest pages'."""
    texts = [trace._text(Path("t"), TRACE, analysis(periods)) for periods in (1, 12, 13)]  # type: ignore[arg-type]
    less = analysis(1)
    less.working = less.zeros = less.initial_zeros = None
    for each in less.amounts:
        each.nbytes = 0
    unknown = SimpleNamespace(**vars(TRACE) | {"source": "", "mechanism": "", "complete": False})
    texts.append(trace._text(Path("t"), unknown, less))  # type: ignore[arg-type]
    unknown.intervals = 0
    texts.append(trace._text(Path("t"), unknown, less))  # type: ignore[arg-type]
    as_seen("said/traced.txt", "\n\n".join(texts) + "\n")
    assert trace._some(tuple(range(23))) == list(range(0, 23, 2))


def foreseen(*, converges: bool) -> Forecast:
    return Forecast(
        converges, None, Estimate(3, 2, 4), Estimate(1234.56, 10.04, 1500.55), Estimate(1.2345, 0.0115, 1.5),
        Estimate(5e9, 4e9, 6e9), Needs(4e7, 0.2), "Because it is so " * 12,
    )  # fmt: skip


def test_a_migration_that_is_watched(capsys, monkeypatch) -> None:
    """A forecast once a pass from the second on; an end that is older than what was seen isn't one."""
    monkeypatch.setattr(
        watch.forecasts, "from_samples", lambda samples, **_: foreseen(converges=samples[-1].iteration != 3)
    )

    def active(ms: int, number: int, left: int) -> dict[str, Any]:
        ram = {"total": 1 << 30, "remaining": left, "transferred": 9 << 20, "dirty-sync-count": number, "mbps": 0.0,
               "dirty-pages-rate": 0, "page-size": 4096}  # fmt: skip
        return {"status": "active", "total-time": ms, "expected-downtime": 30, "ram": ram}

    def say(*, as_json: bool) -> None:
        one = watch._Watched(0.3, {}, as_json=as_json)
        kept = []
        for answer in (
            {}, {"status": "failed"}, {"status": "setup"}, {"status": "active", "total-time": 3, "ram": {"total": 0}},
            active(100, 1, 99 * MIB), active(1240, 2, 7 * MIB + 60000), active(1250, 2, MIB), active(1260, 2, 5),
            active(1999, 3, 12345), active(2960, 4, 1 << 29),
        ):  # fmt: skip
            assert not one.see(answer)
            kept.append(len(one.samples))
        assert kept == [0, 0, 0, 0, 1, 2, 3, 3, 4, 5]
        assert [each.time for each in one.samples] == [0.1, 1.24, 1.26, 1.999, 2.96]
        one._told = 0
        one.see(active(3000, 3, 5))  # another one began
        assert [each.time for each in one.samples] == [3.0]
        assert one.see({"status": "completed", "total-time": 12345, "downtime": 0.5})
        assert one.see({"status": "cancelled", "total-time": -1, "downtime": True})

    as_seen("said/watched.txt", both(capsys, monkeypatch, say))


def test_as_many_samples_of_a_migration_are_kept_as_are_needed(monkeypatch) -> None:
    monkeypatch.setattr(watch, "_PASSES", 3)
    one = watch._Watched(0.3, {}, as_json=False)
    monkeypatch.setattr(one, "_foresee", lambda _: None)
    monkeypatch.setattr(
        watch.forecasts, "read_samples", lambda lines: [SimpleNamespace(**json.loads(lines[0])["total-time"])]
    )
    for at in range(1, 11):
        one.see({"status": "active", "ram": {"total": 1}, "total-time": {"time": at, "iteration": at}})
    assert [each.time for each in one.samples] == [5, 6, 7, 8, 9, 10]


@pytest.mark.parametrize("flaws", [0, 1, 2])
def test_the_flaws_of_a_chain(flaws, capsys, monkeypatch) -> None:
    found = [SimpleNamespace(kind="leftover", text="a.tmp", snapshot="", pages=0)]
    found += [SimpleNamespace(kind="missing", text=f"text {at}", snapshot=f"id{at}", pages=at) for at in range(flaws)]
    chain = SimpleNamespace(check=lambda *, whole: found if whole else None, snapshots=lambda: [1])
    monkeypatch.setattr(snapshot, "Chain", lambda _: chain)

    def say(*, as_json: bool) -> None:
        with pytest.raises(snapshot.typer.Exit) if flaws else nullcontext() as ended:
            snapshot.check(Path("chain"), whole=True, as_json=as_json)
        assert ended is None or ended.value.exit_code == 3

    as_seen(f"said/flaws-{flaws}.txt", both(capsys, monkeypatch, say, 80))


def test_a_table_of_snapshots(monkeypatch) -> None:
    """Times to the millisecond, a parent by its number, or by what it is called where it isn't in the list."""
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    first: dict[str, Any] = {"id": "1" * 32, "name": "000001-0123", "full": True, "time": 1_700_000_000_007}
    first |= {"pages": 1234, "page-size": 16384, "disk": 5 * MIB // 2}
    second = first | {"id": "2" * 32, "name": "000002-4567", "full": False, "time": 1_700_000_059_999}
    second |= {"parent": "1" * 32, "pages": 0, "disk": 12345 * MIB}
    third = second | {"name": "000003-89ab", "parent": "0123456789abcdef", "overlap": 7, "paused": 12.349}
    texts = []
    for columns in (80, 40):
        monkeypatch.setenv("COLUMNS", str(columns))
        texts += [snapshot._table([first, second]), snapshot._table([third, second | {"overlap": 70, "paused": 0.05}])]
        texts += [snapshot._table([second], [SimpleNamespace(id="1" * 32, name="left-over")]), snapshot._table([])]  # type: ignore[list-item]
    as_seen("said/snapshots.txt", "\n\n".join(texts) + "\n")
    monkeypatch.delenv("TZ")
    time.tzset()


def test_pages_that_one_of_the_children_has_anew() -> None:
    """The most of any child, over all slots; a grandchild is none."""

    def pages(*of: tuple[int, ...]) -> dict[int, DirtyBitmap]:
        return {slot: DirtyBitmap.from_pages(each, 70) for slot, each in enumerate(of)}

    snapshots = tuple(SimpleNamespace(id=id_, parent=parent) for id_, parent in ("a ", "ba", "ca", "db"))
    held = [pages((1, 2, 3, 69), (5,)), pages((1, 69), (6,)), pages((2, 3), (5,)), pages((1, 2, 3), (5, 6))]
    assert snapshot._overlaps(snapshots, held) == [3, 2, 0, 0]  # type: ignore[arg-type]


@pytest.mark.parametrize("source", ["machine", "kvm"])
def test_a_guest_that_was_restored(source, capsys, monkeypatch) -> None:
    found = SimpleNamespace(id="it", digest="ab" * 32)
    monkeypatch.setattr(snapshot, "Chain", lambda _: SimpleNamespace(find=lambda _: found))
    monkeypatch.setattr(snapshot, "_entry", lambda *_: {"id": "it"})
    monkeypatch.setattr(snapshot, "_started", lambda _chain, found, _source, seconds: (found, seconds * 1.2345678))

    def say(*, as_json: bool) -> None:
        for seconds in (None, 2.0):
            snapshot.restore(Path("chain"), source=snapshot.Vm(source), seconds=seconds, as_json=as_json)

    as_seen(f"said/restored-{source}.txt", both(capsys, monkeypatch, say))


def test_a_downtime_that_is_longer_than_its_limit_is_warned_of(capsys, monkeypatch) -> None:
    monkeypatch.setattr(migrate, "_text", lambda _: "it")
    for downtime, said in ((0.3, ""), (0.3001, "warning: the guest stood still for 300 ms, longer than 300 ms"),
                           (1.2345, "warning: the guest stood still for 1,234 ms, longer than 300 ms")):  # fmt: skip
        done: Any = SimpleNamespace(report=Report(4096, MIB, 0.3, downtime=downtime), failure=None)
        migrate._say(done, None, as_json=False)
        assert capsys.readouterr().err == (f"hwdbm: {said}\n" if said else "")


@pytest.mark.parametrize("width", range(20, 120))
def test_a_digest_is_cut_into_groups_of_sixteen(width: int) -> None:
    """Each line is shorter than the columns, and no line could take one group more."""
    digest = "0123456789abcdef" * 4
    for name in ("sha256", "sha256 there"):
        lines = migrate._digest(name, digest, width)
        if len(lines) == 1:
            assert lines == [f"{name} {digest}"]
            assert len(lines[0]) < width
            continue
        assert len(f"{name} {digest}") >= width
        assert (lines[0], "".join(line.strip() for line in lines[1:])) == (name, digest)
        groups = {len(line) - 2 for line in lines[1:-1]} or {len(lines[1]) - 2}
        (step,) = groups
        assert step % 16 == 0
        assert max(map(len, lines)) < width
        assert step == 64 or 2 + step + 16 >= width


def test_what_becomes_of_a_migration_beside_snapshots(monkeypatch) -> None:
    report = Report(4096, MIB, 0.3, "completed", total_time=1.2345678, downtime=0.0123456, source_sha256="ab")
    for failure in (None, OSError("it broke")):
        made = SimpleNamespace(report=report, failure=failure, run=lambda: None)
        monkeypatch.setattr(migrate, "_connected", lambda *_, **__: nullcontext("channel"))
        monkeypatch.setattr(migrate, "Precopy", lambda *_, made=made, **__: made)
        told: list[dict[str, object]] = []
        with migrate.beside(None, [], None, told.append):  # type: ignore[arg-type]
            pass
        want = {"status": "completed", "total-time": 1234.568, "downtime": 12.346, "sha256": "ab"}
        assert told == [want | ({"error": "it broke"} if failure else {})]


def test_registers_by_their_fields() -> None:
    """HCR_EL2.VM and PARange are parts of their registers; a kind of hardware updates that nobody knows is said so."""
    image = open_image(example.find("example:4k_ipa40"))
    for hcr, mmfr0, mmfr1, vm, parange, hafdbs, says in (
        (0xFFFE, 0xFFF5, 0xFF2, 0, 5, 2, "dirty state"),
        (0x8001, 0xFF, 4, 1, 15, 4, "log of dirty pages"),
        (1, 6, 5, 1, 6, 5, "unknown"),
        (3, 0, 0, 1, 0, 0, "none"),
    ):
        registers = SimpleNamespace(vttbr=1, vtcr=2, hcr=hcr, mmfr0=mmfr0, mmfr1=mmfr1)
        found = inspect._registers(SimpleNamespace(registers=registers, vtcr=image.vtcr, vttbr=image.vttbr))  # type: ignore[arg-type]
        assert found["HCR_EL2"]["VM"] == vm
        assert found["ID_AA64MMFR0_EL1"]["PARange"] == parange
        assert found["ID_AA64MMFR1_EL1"]["HAFDBS"] == hafdbs
        assert found["ID_AA64MMFR1_EL1"]["hardware-updates"] == says


@pytest.mark.parametrize("columns", [61, 60, 59])
def test_registers_are_beside_their_names_where_there_is_room(columns, run, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = run("inspect", "example:4k_ipa40").out.splitlines()
    indents = {len(line) - len(line.lstrip()) for line in lines[2 : lines.index("", 2)]}
    assert indents == {0, 17 if columns >= 60 else 2}


def test_all_races(capsys, monkeypatch) -> None:
    """What is proved and what is found, and how long each took."""
    now = iter(np.cumsum([0.0, 0.25, 0.1234, 1.0, 2.0, 0.5, 0.0016, 7.0, 3.0, 8.1]).tolist())
    monkeypatch.setattr(races.time, "monotonic", lambda: next(now))
    kinds = {"one": 1000, "two": 5}

    def finding(name: str) -> Any:
        return SimpleNamespace(
            name=name, states=kinds[name.rpartition(" ")[2]], proved="wrong" not in name, steps=[1, 2, 3]
        )

    monkeypatch.setattr("hwdbm.races.check", finding)
    monkeypatch.setattr("hwdbm.races.PRODUCTION", {name: lambda name=name: name for name in kinds})
    one = SimpleNamespace(make=lambda broken: "wrong one" if broken else "right one")
    monkeypatch.setattr("hwdbm.races.MISTAKES", {"one": one})
    monkeypatch.setattr("hwdbm.races.twenty.TWENTY", [SimpleNamespace(agrees=lambda: True)] * 2)
    monkeypatch.setenv("COLUMNS", "80")
    races._all(as_json=False)
    as_seen("said/all-races.txt", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("count", "moves", "times"),
    [
        (0, None, [0.0]),
        (3, None, [0.0, 3.0, 6.5, 7.5]),
        (None, None, [0.0, 3.0, 6.5, 7.5, 8.5, 9.5]),
        (None, 7.0, [0.0, 3.0, 6.5]),
        (3, 100.0, [0.0, 3.0, 6.5, 7.5]),
        (None, 8.5, [0.0, 3.0, 6.5, 7.5]),
    ],
)
def test_when_snapshots_are_taken(count, moves, times, capsys, monkeypatch) -> None:
    """One a second from when the first was done, or when the one before is; as many as are asked for, or until moved.

    The first takes two seconds here, the second two and a half.
    """
    clock, taken, took = Clock(), [], iter([2.0, 3.5, *9 * [0.25]])
    monkeypatch.setattr(snapshot, "time", clock)
    monkeypatch.setattr(snapshot, "_COUNT", 5)
    monkeypatch.setattr(snapshot, "busy", lambda _: nullcontext(print))

    class Recorder:
        def __init__(self, *_: object, **__: object) -> None:
            self.paused = 0.0

        def save(self) -> str:
            taken.append(clock.passed)
            self.paused = next(took)
            clock.sleep(self.paused)
            return "it"

        diff = save

    def wait(seconds: float) -> None:
        clock.sleep(seconds)
        if moves is not None and clock.passed >= moves:
            moved[0].set()

    moved: list[Any] = []
    monkeypatch.setattr(snapshot, "Recorder", lambda *_, **__: nullcontext(Recorder()))
    monkeypatch.setattr(snapshot, "_migrating", lambda _vm, _to, _cancel, gone, _taken: nullcontext(moved.append(gone)))
    cancel: Any = SimpleNamespace(is_set=lambda: False, wait=wait)
    receiver = None if moves is None else ["--vm"]
    found = snapshot._record(None, Path("c"), 1.0, count, cancel, digest=False, receiver=receiver)  # type: ignore[arg-type]
    assert taken == times
    assert (len(found.snapshots), found.paused) == (len(times), [2.0, 3.5, *9 * [0.25]][: len(times)])
    assert capsys.readouterr().out.splitlines()[0] == "1 snapshots, the last kept the guest paused for 2000.0 ms"
