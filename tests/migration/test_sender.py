"""The frames that pages are sent in: as few as they fit into."""

from types import SimpleNamespace

import numpy as np
import pytest
from clocks import Clock

from hwdbm.bitmap import DirtyBitmap
from hwdbm.memslot import Memslot
from hwdbm.migration import Pass, sender
from hwdbm.migration.precopy import Precopy
from hwdbm.migration.sender import Limiter, PageSender, runs_of
from hwdbm.migration.wire import ZERO_RUNS, Kind
from hwdbm.vm import MemoryMap, PlainGuest

PAGE = 4096


class Frames:
    """A sender whose channel keeps the runs of each frame, in pages."""

    def __init__(self) -> None:
        self.sent: list[list[list[int]]] = []
        limiter = SimpleNamespace(wait=lambda *_: None)
        self.sender = PageSender(SimpleNamespace(page_size=PAGE), self, None, limiter, lambda: None)

    def send(self, kind: Kind, table: bytes, runs: int) -> None:
        assert kind is Kind.ZERO
        rows = np.frombuffer(table, dtype=np.uint64).reshape(-1, 2)
        assert len(rows) == runs <= ZERO_RUNS
        self.sent.append((rows // PAGE).tolist())

    def of(self, *batches: np.ndarray) -> list[list[list[int]]]:
        for batch in batches:
            self.sender._add_zeros(7 * PAGE, batch)
        self.sender._flush_zeros()
        assert self.sender.duplicate == sum(batch.size for batch in batches)
        return self.sent


@pytest.mark.parametrize(
    ("batches", "frames"),
    [([1024] * 4, [4096]), ([1000] * 5, [4000, 1000]), ([1024] * 5, [4096, 1024]), ([1, 4096], [1, 4096]), ([], [])],
)
def test_zeros_are_kept_until_a_frame_is_full(batches, frames):
    starts = np.cumsum([0, *batches])
    every_other = [np.arange(start, start + count) * 2 for start, count in zip(starts, batches, strict=False)]
    assert [len(frame) for frame in Frames().of(*every_other)] == frames


def test_a_run_goes_on_in_the_next_batch():
    batches = np.arange(10), np.arange(10, 15), np.array([15, 17]), np.array([18])
    assert Frames().of(*batches) == [[[7, 16], [24, 2]]]


def by_hand(pages: list[int]) -> list[list[int]]:
    """Return runs of ascending pages, one page after the other."""
    runs: list[list[int]] = []
    for page in pages:
        if runs and page == sum(runs[-1]):
            runs[-1][1] += 1
        else:
            runs.append([page, 1])
    return runs


SETS = [[page for page in range(9) if chosen >> page & 1] for chosen in range(1, 1 << 9)]


def test_runs_are_those_that_are_found_page_by_page():
    for pages in SETS:
        assert runs_of(np.array(pages)).tolist() == by_hand(pages)


@pytest.mark.parametrize("cut", [1, 2, 4])
def test_however_zeros_are_cut_into_batches_their_runs_are_the_same(cut):
    for pages in SETS[::3]:
        batches = [np.array(pages[start : start + cut]) for start in range(0, len(pages), cut)]
        assert Frames().of(*batches) == [[[first + 7, count] for first, count in by_hand(pages)]]


@pytest.mark.parametrize("most", [1, 7, 64, 1000])
@pytest.mark.parametrize("window", [64, 192, 1 << 18])
def test_batches_have_all_pages_in_order_and_each_is_full_but_the_last(most, window, monkeypatch):
    monkeypatch.setattr(sender, "_WINDOW", window)
    random = np.random.default_rng(most)
    for npages in (1, 63, 64, 65, 511, 513):
        for share in (0.0, 0.02, 0.5, 0.98, 1.0):
            pages = np.flatnonzero(random.random(npages) < share)
            batches = list(sender._batches(npages, DirtyBitmap.from_pages(pages, npages), most))
            listed = [range(npages)[each] if isinstance(each, slice) else each.tolist() for each in batches]
            assert [page for each in listed for page in each] == pages.tolist()
            assert all(len(each) == most for each in listed[:-1])
            assert [isinstance(each, slice) for each in batches] == [len(by_hand(each)) == 1 for each in listed]
        whole = [(each.start, each.stop) for each in sender._batches(npages, None, most)]
        assert whole == [(first, min(first + most, npages)) for first in range(0, npages, most)]


@pytest.mark.parametrize(
    ("bandwidth", "pages"),
    [(None, (512, 32)), (1e9, (512, 32)), (1 << 23, (512, 32)), (1e6, (61, 3)), (8 * PAGE, (2, 1)), (1.0, (1, 1))],
)
def test_a_frame_takes_a_quarter_of_a_second_or_is_one_page(bandwidth, pages):
    limiter = Limiter(bandwidth)
    assert (limiter.pages(PAGE), limiter.pages(16 * PAGE)) == pages


def test_zeros_take_their_share_of_the_time_that_a_batch_takes(monkeypatch):
    """Pages are of zeros whatever byte of them isn't; those that are left go together, as one run or several."""
    guest = PlainGuest(MemoryMap(PAGE, (Memslot(0, 0, 7, 8, 0),)))
    times, sent, frames, buffer = iter((10.0, 14.0)), [], Frames(), np.ones(1 << 21, dtype=np.uint8)
    for at in (PAGE, 3 * PAGE - 1, 5 * PAGE + 2000):  # the first byte of page 1, the last of 2, and one of 5
        guest.memory(0)[at] = 9
    monkeypatch.setattr(sender, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    staging = SimpleNamespace(
        buffer=lambda: buffer, send=lambda table, runs, payload: sent.append((table, runs, payload.copy()))
    )
    made = PageSender(guest, frames, staging, Limiter(), lambda: None)
    (slot,) = guest.slots
    made.send(slot)
    assert (made.normal, made.duplicate, made.zero_time) == (3, 5, 4.0 * 5 / 8)
    ((table, runs, payload),) = sent
    assert (np.frombuffer(table, dtype=np.uint64).reshape(-1, 2) // PAGE).tolist() == [[8, 2], [12, 1]]
    assert (runs, payload.shape) == (2, (3, PAGE))
    assert (payload == guest.memory(0).reshape(8, PAGE)[[1, 2, 5]]).all()
    assert frames.sent == [[[7, 1], [10, 2], [13, 2]]]
    assert next(times, None) is None


def test_what_remains_of_a_pass_is_what_was_not_sent():
    sender = SimpleNamespace(normal=30, duplicate=20, zero_time=0.5)
    report = SimpleNamespace(transferred=0, remaining=0)
    going = SimpleNamespace(
        _one=Pass(1, 100, 100 * PAGE), _sender=sender, _channel=SimpleNamespace(sent=5000), _pass_start=0.0,
        _pass_sent=1000, _source=SimpleNamespace(page_size=PAGE), report=report,
    )  # fmt: skip
    Precopy._count(going)
    assert (report.remaining, report.transferred, going._one.transferred) == (50 * PAGE, 5000, 4000)
    sender.normal = 90  # a page may be sent twice
    Precopy._count(going)
    assert report.remaining == 0


@pytest.mark.parametrize(
    ("bandwidth", "frame"), [(1e5, 40), (1e6, 4_096), (1e6, 1 << 21), (5e7, 70_000), (5e7, 1 << 21), (2e8, 1 << 21)]
)
def test_a_pass_takes_what_its_bytes_take(monkeypatch: pytest.MonkeyPatch, bandwidth: float, frame: int) -> None:
    """Each frame goes as early as it may: what a guest that stands still waits for hangs on nothing that was before.

    20 ms of the bandwidth may be ahead, and 20 may be made up for. A nap is a millisecond, or the clock's grain.
    """
    clock = Clock()
    monkeypatch.setattr(sender, "time", clock)
    limiter, ahead, looked = Limiter(bandwidth), 0.04, [0.0]

    def look() -> None:
        assert clock.passed - looked[-1] <= 0.05 + 1e-6
        looked.append(clock.passed)

    for number, gap in enumerate((0.0, 0.0, 0.003, 0.015, 0.5)):
        clock.passed += gap
        ahead = min(ahead + gap, 0.04)
        begun, sent = clock.passed, 0
        while sent < bandwidth * 0.3:
            looked[-1] = clock.passed
            limiter.wait(frame, look)
            sent += frame
            due = max(sent / bandwidth - ahead, 0.0)
            assert due - 1e-6 <= clock.passed - begun <= due + 1e-3 + 1e-6, (number, sent)
        ahead -= sent / bandwidth - (clock.passed - begun)
    assert 1 < len(looked) <= 1 + clock.passed / 1e-3  # it isn't awake for each few bytes


def test_no_bandwidth_no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender, "time", clock := Clock())
    Limiter(None).wait(1 << 40, pytest.fail)
    assert not clock.passed
