"""Reports: one file without links, whose pictures and tables have the same numbers, whatever the names in it."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from seen import as_seen

import hwdbm
from hwdbm import report
from hwdbm.bitmap import DirtyBitmap
from hwdbm.cli import example
from hwdbm.forecast import Estimate, Forecast, Needs, Sample
from hwdbm.forecast.sweep import Sweep, sweep
from hwdbm.image import Slot, open_image
from hwdbm.image.harvest import Ask, harvest_slots
from hwdbm.migration.report import Pass, Report
from hwdbm.trace import analyse, open_trace

HOSTILE = "<script>alert('x')</script> & $title \x1b[2J \u202e"
VOID = {"meta", "!doctype", "input"}


class Page(HTMLParser):
    """What is in a report: its tags, which must nest, its attributes, and its tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.tables: list[list[list[str]]] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in {"td", "th"}:
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attrs) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        if self.open and self.open[-1] in {"td", "th"}:
            self.tables[-1][-1][-1] += data


def alone(text: str, *, dial: bool = False) -> Page:
    """Check that a report needs nothing but itself, and runs nothing but what moves a dial."""
    page = Page(text)
    assert page.tags.count("script") == dial
    assert not {"link", "img", "iframe", "object", "a"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name in {"href", "src", "srcset"} or name.startswith("on")]
    assert not re.search(r"@import|url\(|https?:", text)
    assert text.count("<title>") == text.count("<h1>") == 1
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    for name, value in page.attributes:
        if name == "aria-labelledby":
            assert set(str(value).split()) <= set(ids)
    assert all("nan" not in str(value) and "inf" not in str(value) for _, value in page.attributes)
    return page


def migration(passes: int, error: str = "") -> Report:
    done = Report(4096, 1 << 30, 0.3, status="completed", total_time=3.0, downtime=0.1, error=error)
    for number in range(1, passes + 1):
        cells = np.linspace(0, 1 / number, 512, dtype=np.float32)
        expected = None if number == 1 else 3.0 / number
        done.passes.append(
            Pass(
                number, 1000, (1 << 30) // number, dirty_rate=1e6 * number, expected_downtime=expected,
                normal=900, duplicate=number, transferred=900 * 4096, time=0.5, cells=cells,
            )
        )  # fmt: skip
    return done


@pytest.mark.parametrize("passes", [0, 1, 2, 40])
def test_a_migration(passes: int) -> None:
    done = migration(passes, "it was " + HOSTILE)
    page = alone(report.of_migration(done).html())
    assert len(page.tables) == (5 if passes else 0)
    if passes:
        sent, *_, raw = page.tables
        assert [row[0] for row in sent[1:]] == [str(number + 1) for number in range(passes)]
        assert raw[0] == list(dict.fromkeys(key for one in done.passes for key in one.to_dict()))
        for row, one in zip(raw[1:], done.passes, strict=True):
            said = {key: json.loads(cell) for key, cell in zip(raw[0], row, strict=True) if cell}
            assert said == one.to_dict()


def test_a_harvest() -> None:
    for name in ("4k_ipa40", "16k_ipa40", "4k_blocks"):
        path = example.find(f"example:{name}")
        found = harvest_slots(open_image(path), Ask("dbm", check=True))
        page = alone(report.of_harvest(f"{name} {HOSTILE}", found).html())
        slots, memory, _, ranges = page.tables
        assert [int(row[5].replace(",", "")) for row in slots[1:]] == [one.dirty for one in found.slots]
        assert len(memory) == len(found.slots) + 1
        number = [int(row[1].replace(",", "")) for row in ranges[1:]]
        pages = [int(row[2].replace(",", "")) for row in ranges[1:]]
        assert (sum(number), sum(pages)) == (sum(s.ranges for s in found.slots), sum(s.dirty for s in found.slots))


def test_a_harvest_that_found_nothing() -> None:
    image = open_image(example.find("example:4k_blocks"), slots=[Slot(0, 0x8C00_0000, 4096)])
    document = report.of_harvest("nothing", harvest_slots(image, Ask("dbm")))
    assert len(alone(document.html()).tables) == 3
    assert not document.failure


def test_a_harvest_that_is_wrong() -> None:
    found = harvest_slots(open_image(example.find("example:4k_blocks")), Ask("dbm", check=True))
    found.slots[0].wrong = DirtyBitmap.from_ranges([(0, 2)], 49152)
    document = report.of_harvest("wrong", found)
    assert document.failure == "2 pages differ from the truth in the image"
    assert document.facts["compared with the truth"] == "2 pages of 4K are wrong"


def test_snapshots() -> None:
    chain = [report.SnapshotFile(f"{HOSTILE}{n}", "full", 1 << 30, 4096 >> n, n, n or None) for n in range(3)]
    page = alone(report.of_snapshots("A chain", chain, "it failed").html())
    assert page.tables[-1][1][2:5] == ["1,073,741,824", "4,096", "0"]
    assert "SHA-256 of the memory" not in page.tables[-1][0]  # which nobody knows
    with pytest.raises(ValueError, match="one file or more"):
        report.of_snapshots("none", [])


def sweep_of(numbers: float = 1.0) -> Sweep:
    def forecast(bandwidth: float, limit: float) -> Forecast:
        pause = numbers * 1e7 / bandwidth
        return Forecast(
            pause <= limit, None, Estimate(3, 2, 4), Estimate(1e9 / bandwidth, 1, 1e9), Estimate(pause, 0, pause),
            Estimate(1e9, 1e9, 2e9), Needs(4e7, 0.2), "Because & why.",
        )  # fmt: skip

    return sweep(forecast, 4e7, 0.25)


def forecast_report(**more) -> report.Document:
    samples = [
        Sample(at / 2, at + 1, 1e9 / (at + 1), 1e9, dirty_rate=1e6 * at if at != 2 else None)
        for at in range(more.pop("passes", 4))
        for _ in range(2)
    ]
    found = sweep_of().forecasts[3][8]
    return report.of_forecast(
        f"a trace {more.pop('name', '')}", found, sweep_of(), samples, {"limit": "250 ms"}, **more
    )


def test_a_forecast() -> None:
    page = alone(forecast_report(name=HOSTILE).html(), dial=True)
    downtimes, totals, left, passes = page.tables
    assert downtimes[0] == [
        "bandwidth (MiB/s)",
        *(f"{n} ms allowed" for n in ("31.2", "62.5", "125", "250", "500", "1,000", "2,000")),
    ]
    assert len(downtimes) == len(totals) == 18
    for row, bandwidth in zip(downtimes[1:], sweep_of().bandwidths, strict=True):
        assert row[0] == report._number(bandwidth / (1 << 20))
        for cell, limit in zip(row[1:], sweep_of().limits, strict=True):
            assert cell.endswith("\N{MULTIPLICATION SIGN}") == (1e7 / bandwidth > limit)
    assert [row[1] for row in left[1:]] == [f"{1e9 / n / (1 << 20):.3g}" for n in (1, 2, 3, 4)]
    assert [row[0] for row in passes[1:]] == ["1", "2", "3", "4"]  # samples within a pass are none


def test_a_dial_shows_one_place_and_says_what_it_is() -> None:
    html = forecast_report().html()
    for tag in ("g", "p", "output"):
        shown = re.findall(rf'<{tag} data-at="(\d)"(?: hidden)?>', html)
        assert shown == [str(place) for place in range(7)]
        assert re.findall(rf'<{tag} data-at="(\d)">', html) == ["3"]
    assert "With 250 ms allowed, it converges from 38.1 MiB/s on, of the bandwidths tried." in html
    assert '<div class="dial" hidden>' in html  # nothing can be moved where nothing runs
    assert 'min="0" max="6" step="1" value="3" aria-valuetext="250 ms"' in html


@pytest.mark.parametrize(("numbers", "says"), [(1e9, "it converges at none of"), (0, "it converges at all of")])
def test_a_dial_of_extremes(numbers: float, says: str) -> None:
    found = sweep_of(numbers)
    html = report.of_forecast("x", found.forecasts[0][0], found, [], {}).html()
    alone(html, dial=True)
    assert html.count("<p data-at") == html.count(says) - 1 == 7


def test_a_dial_that_does_not_fit() -> None:
    place = report.DialPlace("a", "b", 1.0, (1.0,), (True,))
    for chosen in (1, -1):
        with pytest.raises(ValueError, match=f"place {chosen} of 1"):
            report.Dial("a", "ms", "x", "d", "good", "bad", (1.0,), (place,), chosen)
    with pytest.raises(ValueError, match="'a' has 1 numbers for 2 of x"):
        report.Dial("a", "ms", "x", "d", "good", "bad", (1.0, 2.0), (place,), 0)


def large() -> tuple[report.Document, report.Document]:
    """Return a forecast and a migration of which each number has five digits, in whatever unit it is shown."""
    wide = Estimate(45.6789, 34.5678, 56.7891)
    found = Forecast(
        True, None, Estimate(12345, 11111, 22222), Estimate(34567.8, 23456.7, 45678.9), wide,
        Estimate(4.56789e10, 3.45678e10, 5.67891e10), Needs(6.78912e10, 12.3456), "Because.",
    )  # fmt: skip
    samples = [Sample(12345.6 * at, at, 4.56789e10 / at, 5e10, dirty_rate=3.45678e10) for at in (1, 2, 3)]
    one = report.of_forecast("large", found, sweep(lambda *_: found, 4.56789e10, 12.3456), samples, {})
    done = Report(4096, 1 << 36, 12.3456, status="completed", total_time=34567.8, downtime=23.4567)
    done.transferred, done.downtime_bytes, done.setup_time = 1 << 37, 12345678912, 34.5678
    done.passes = [
        Pass(
            number, 12345678, 45678912345, dirty_rate=3.45678e10 * number, expected_downtime=45.6789 * number,
            normal=9876543, duplicate=1234567, transferred=56789123456, time=12345.6,
        )
        for number in (1, 2)
    ]  # fmt: skip
    return one, report.of_migration(done)


def documents() -> dict[str, report.Document]:
    """Return reports with charts of all kinds; of 21 passes the labels take all the room that there is for labels."""
    chain = [report.SnapshotFile(f"file {n}", "full", 1 << 30, 4096 >> n, n, n or None) for n in range(3)]
    found = replace(harvest_slots(open_image(example.find("example:4k_blocks")), Ask("dbm")), seconds=1.23456)
    written = analyse(open_trace(example.find_trace("example:machine-bursty")), rows=3, cells=8)
    return {
        "forecast-trace": forecast_report(analysis=written, passes=31),
        "forecast": forecast_report(),
        "forecast-large": large()[0],
        "migration-large": large()[1],
        "migration-1": report.of_migration(migration(1)),
        "migration-21": report.of_migration(migration(21, "it was lost")),
        "harvest": report.of_harvest("blocks", found),
        "snapshots": report.of_snapshots("A chain", chain, "it failed"),
    }


@pytest.mark.parametrize(
    "name",
    [
        "forecast",
        "forecast-trace",
        "forecast-large",
        "migration-1",
        "migration-21",
        "migration-large",
        "harvest",
        "snapshots",
    ],
)
def test_it_looks_as_the_one_that_was_looked_at(name: str) -> None:
    as_seen(f"reports/{name}.html", documents()[name].html().replace(hwdbm.__version__, "VERSION"))


@pytest.mark.parametrize(
    ("low", "high", "log", "ticks"),
    [
        (1, 100, True, [1, 2, 5, 10, 20, 50, 100]), (3, 99, True, [5, 10, 20, 50]), (0.1, 1, True, [0.1, 0.2, 0.5, 1]),
        (1, 200, True, [1, 10, 100]), (0, 4, False, [0, 1, 2, 3, 4]), (0, 3.9, False, [0, 1, 2, 3]),
        (0, 7, False, [0, 2, 4, 6]), (0, 24, False, [0, 5, 10, 15, 20]),
        (0, 0.6, False, [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]), (0, 30, False, [0, 5, 10, 15, 20, 25, 30]),
        (0, 35, False, [0, 10, 20, 30]), (0, 1, False, [0, 0.2, 0.4, 0.6, 0.8, 1]),
    ],
)  # fmt: skip
def test_ticks_are_round(low: float, high: float, log: bool, ticks: list[float]) -> None:
    assert report._ticks(low, high, log=log) == pytest.approx(ticks)


@pytest.mark.parametrize("values", [(0.0,), (0.0, 0.0), (1e-9, 1e12), (5.0,), (None,), (), (1e300, 1.0)])
@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("lines", [False, True])
def test_any_numbers(values, log: bool, lines: bool) -> None:
    labels = tuple(f"label {at}" for at in range(len(values)))
    chart = report.Chart("a", "b", "c", labels, {"d": values}, ("limit", 3.0), lines=lines, log=log)
    page = alone(report.Document("x", {}, (chart,)).html())
    assert [len(row) for row in page.tables[0]] == [2] * (1 + len(values))


def texts(part: report.Part) -> list[str]:
    """Return the texts of a part's picture."""
    return re.findall(r"<text [^>]*>([^<]*)</text>", report.Document("x", {}, (part,)).html())


@pytest.mark.parametrize("values", [(), (None,), (0.0,), (0.0, None)])
@pytest.mark.parametrize("log", [False, True])
def test_a_chart_of_nothing_goes_from_0_to_1(values: tuple[float | None, ...], log: bool) -> None:
    labels = tuple("ab"[: len(values)])
    chart = report.Chart("a", "MiB", "pass", labels, {"sent": values}, lines=True, log=log)
    assert texts(chart) == ["0", "0.2", "0.4", "0.6", "0.8", "1", *labels, "pass (up: MiB)"]


def test_a_dial_of_nothing_has_ticks() -> None:
    """What is 0, or has no end, stands at the edge of the picture."""
    for values, ticks in (((0.0, float("inf")), ["1"]), ((0.4, -1.0), ["0.5"]), ((0.4, 500.0), ["1", "10", "100"])):
        place = report.DialPlace("a", "b", 0.0, values, (True, False))
        dial = report.Dial("a", "ms", "x", "d", "good", "bad", (1.0, 2.0), (place,), 0)
        assert texts(dial) == [*ticks, "1", "2", "x (up: ms)"]


@pytest.mark.parametrize(
    ("labels", "shown"),
    [
        (tuple("a" * 42), ["a"] * 42), (tuple("a" * 43), ["a"] * 22), (("ab",) * 21, ["ab"] * 21),
        (("ab",) * 22, ["ab"] * 11), (("",) * 3, [""] * 3), (("a" * 23,), ["a" * 23]), (("a" * 24,), ["a" * 22 + "…"]),
        (tuple("abcdefghi") * 10, ["a", "d", "g"] * 10), ((), []),
    ],
)  # fmt: skip
def test_labels_are_left_out_where_there_is_no_room(labels: tuple[str, ...], shown: list[str]) -> None:
    """In a row there are 42 letters of them, and 23 of one."""
    chart = report.Chart("a", "MiB", "pass", labels, {"sent": (1.0,) * len(labels)})
    assert texts(chart)[len(["0", "0.2", "0.4", "0.6", "0.8", "1"]) : -1] == shown


@pytest.mark.parametrize(
    ("lengths", "labels", "ranges", "pages"),
    [
        ([1], ["1"], (1,), (1,)),
        ([1, 2, 3, 4, 7, 8], ["1", "2 to 3", "4 to 7", "8 to 15"], (1, 2, 2, 1), (1, 5, 11, 8)),
        ([1023, 1024, 2047], 10, (0,) * 9 + (1, 2), (0,) * 9 + (1023, 3071)),
        ([2048, 4095, 4096, 9000], 11, (0,) * 11 + (4,), (0,) * 11 + (19239,)),
    ],
)
def test_ranges_are_counted_by_powers_of_two(lengths, labels, ranges, pages) -> None:
    """From 2048 pages on they are all one class."""
    starts = np.cumsum([1, *(length + 1 for length in lengths)])
    one = DirtyBitmap.from_ranges(list(zip(starts[:-1].tolist(), lengths, strict=True)), int(starts[-1]))
    for bitmaps in ([one], [DirtyBitmap(100), one]):
        chart = report._ranges(bitmaps)
        if isinstance(labels, list):
            assert list(chart.labels) == labels
        else:
            last = {10: "1024 to 2047", 11: "2048 or more"}[labels]
            assert chart.labels[9:] == ("512 to 1023", *["1024 to 2047"][: labels - 10], last)
        assert chart.series == {"ranges": ranges, "pages in them": pages}


def test_a_forecast_of_a_trace() -> None:
    """It has a map of what is written when, the periods, and the first thirty passes."""
    samples = [Sample(at / 2, at, 1e9 / at, 1e9) for at in range(1, 33)]
    analysis = analyse(open_trace(example.find_trace("example:kvm-random")), rows=3, cells=4)
    document = report.of_forecast("x", sweep_of().forecasts[3][8], sweep_of(), samples, {}, analysis)
    _, _, left, drawn, periods, passes = document.parts
    assert left.title == "What is left at the beginning of each pass, the first 30 of 32"
    assert left.labels == tuple(map(str, range(1, 31)))
    assert [row[0] for row in passes.rows] == [*left.labels]
    times = analysis.map_times.tolist()
    assert list(drawn.rows) == [f"{start:.3g} s" for start in times[:-1]]
    for cells, row in zip(drawn.rows.values(), analysis.map, strict=True):
        assert cells == pytest.approx(row)
    assert set(drawn.extents.values()) == {analysis.npages * analysis.page_size}
    wanted = tuple(each.pages * analysis.page_size / (1 << 20) for each in analysis.periods)
    assert periods.series == {"written": pytest.approx(wanted)}
    exactly = report.of_forecast("x", sweep_of().forecasts[3][8], sweep_of(), samples[:30], {}).parts
    assert [each.title for each in exactly[2:]] == ["What is left at the beginning of each pass", "The passes"]


def test_a_chart_says_in_words_what_it_shows() -> None:
    chart = report.Chart("a", "MiB", "pass", ("1", "2"), {"sent": (3.0, None)})
    assert "MiB over pass. sent: 1 3." in report.Document("x", {}, (chart,)).html()


@pytest.mark.parametrize("size", [0, 1, 179, 180, 181, 512, 5000])
def test_a_map_hides_no_dirty_cell(size: int) -> None:
    for at in range(0, size, max(size // 50, 1)):
        cells = np.zeros(size, dtype=np.float32)
        cells[at] = 1e-3
        drawn = report.Document("x", {}, (report.DirtyMap("a", "b", {"c": cells}, {"c": 1 << 30}),)).html()
        assert drawn.partition("<figcaption>")[0].count('class="kshade1"') == 1


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="2 numbers for 1 labels"):
        report.Chart("a", "b", "c", ("1",), {"d": (1.0, 2.0)})
    with pytest.raises(ValueError, match="a row of 1 cells in a table of 2 columns"):
        report.Table("a", ("b", "c"), (("d",),))


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    report.write(tmp_path / "a.html", report.Document("a", {}, ()))
    assert (tmp_path / "a.html").read_text().startswith("<!doctype html>")
    with pytest.raises(OSError, match="No such file"):
        report.write(tmp_path / "none" / "a.html", report.Document("a", {}, ()))


@pytest.mark.parametrize("passes", [30, 31])
def test_the_first_thirty_passes_of_a_forecast_are_shown(passes: int) -> None:
    document = forecast_report(passes=passes)
    some = ", the first 30 of 31" if passes > 30 else ""
    *_, left, table = document.parts
    assert (left.title, table.title) == (f"What is left at the beginning of each pass{some}", f"The passes{some}")
    assert [row[0] for row in table.rows] == list(left.labels) == [str(number + 1) for number in range(30)]


def test_where_memory_is_dirty_is_told_in_mib() -> None:
    """From the first dirty cell's begin to the last one's end; of one cell, and of none, too."""
    mib = 1 << 20
    cells = np.array([0, 0.5, 0, 1, 0, 0, 0, 0], dtype=np.float32)
    rows = {"some": cells, "one": cells[1:2], "clean": cells[:1], "none": cells[:0], "ends": cells[1:4]}
    extents = {"some": 16 * mib, "one": 3 * mib, "clean": 5 * mib, "none": 2048, "ends": 6000 * mib}
    assert report.DirtyMap("a", "pass", rows, extents).table().rows == (
        ("some", "16.0", "2,048", "2 of 8", "2.0", "8.0"),
        ("one", "3.0", "3,072", "1 of 1", "0.0", "3.0"),
        ("clean", "5.0", "5,120", "0 of 1", "", ""),
        ("none", "0.0", "2", "0 of 0", "", ""),
        ("ends", "6,000.0", "2,048,000", "2 of 3", "0.0", "6,000.0"),
    )


def test_long_labels_of_a_chart_are_cut() -> None:
    """At 24 letters, so that what is cut is shorter than what isn't; and only so many have room."""
    for size, shown in ((23, "a" * 23), (24, "a" * 22 + "…"), (25, "a" * 22 + "…")):
        chart = report.Chart("a", "b", "c", ("a" * size,), {"d": (1.0,)})
        drawn = report.Document("x", {}, (chart,)).html().partition("<figcaption>")[0]
        assert f">{shown}</text>" in drawn
    for count, every in ((14, 1), (15, 2), (28, 2), (29, 3)):  # of three letters each
        labels = tuple(f"{at:03}" for at in range(count))
        chart = report.Chart("a", "b", "c", labels, {"d": (1.0,) * count})
        drawn = report.Document("x", {}, (chart,)).html().partition("<figcaption>")[0]
        assert re.findall(r">(\d{3})</text>", drawn) == list(labels[::every])


def test_a_dial_of_one_value_or_of_none_above_zero_is_drawn_in_the_middle() -> None:
    """A scale has room on both sides; what is below it or without an end lies at its edge."""
    place = report.DialPlace("a", "b", 0.0, (0.0, float("inf"), -5.0), (True, True, True))
    dial = report.Dial("t", "ms", "x", "d", "good", "bad", (1.0, 10.0, 100.0), (place,), 0)
    html = report.Document("x", {}, (dial,)).html()
    assert [float(y) for y in re.findall(r'<rect class="k1" x="[^"]*" y="([^"]*)"', html)] == [147.5, 7.5, 147.5]
    place = report.DialPlace("a", "b", 8.0, (8.0,), (True,))
    html = report.Document("x", {}, (report.Dial("t", "ms", "x", "d", "good", "bad", (7.0,), (place,), 0),)).html()
    assert '<rect class="k1" x="198.5" y="77.5" width="5.0" height="5.0"/>' in html


def test_a_map_of_many_cells_is_the_mean_of_those_that_it_shows() -> None:
    for size in (180, 181, 359, 360, 1000):
        cells = np.random.default_rng(size).random(size).astype(np.float32)
        edges = [at * size // 180 for at in range(181)]
        want = [cells[start:stop].mean() for start, stop in pairwise(edges)]
        assert report._fewer(cells).tolist() == pytest.approx(want, rel=1e-5)
