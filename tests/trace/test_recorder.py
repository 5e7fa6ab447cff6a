"""Recording: every page that was written is in its interval or the next; what fails gives its pages back."""

import os
import threading
import time
from errno import EBUSY, EIO, ENOSPC

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwdbm import DirtyBitmap
from hwdbm.bitmap import word_count
from hwdbm.errors import BitmapError, TraceError
from hwdbm.kvm import KvmVm
from hwdbm.machine import Machine, Uniform
from hwdbm.memslot import Memslot
from hwdbm.trace import Writer, from_bitmaps, open_trace, record, record_file, recorder
from hwdbm.vm import MemoryMap, PlainGuest

NEEDS_KVM = pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="no /dev/kvm that may be opened")

SLOTS = (Memslot(3, 0, 0x40000, 130, 0), Memslot(1, 0, 0x100, 64, 0))
GPAS = {slot.id: slot.base_gfn * 4096 for slot in SLOTS}


class Alone:
    """A VM without clients: what `dirty` takes, nobody else sees."""

    def __init__(self, guest: PlainGuest) -> None:
        for name in ("page_size", "slots", "running", "memory", "start_log", "stop_log", "dirty", "pause", "resume",
                     "throttle", "mark_imported", "state", "set_state", "digest", "close"):  # fmt: skip
            setattr(self, name, getattr(guest, name))


@pytest.fixture
def guest():
    with PlainGuest(MemoryMap(4096, SLOTS)) as made:
        made.start_log()
        yield made


def until(count: int, listen=lambda *_: None) -> dict[str, object]:
    """Return the arguments that end a recording after so many intervals, however slow the machine is."""
    cancel = threading.Event()

    def tell(intervals: int, seconds: float, pages: int) -> None:
        listen(intervals)
        if intervals == count - 1:
            cancel.set()

    return {"cancel": cancel, "on_interval": tell, "interval": 0.005}


def pages_of(words: np.ndarray) -> list[int]:
    return DirtyBitmap.from_words(words.copy(), 64 * words.size).pages().tolist()


def test_each_interval_has_what_was_written_in_it(guest, tmp_path):
    guest.write(GPAS[3], b"before")

    def write(intervals):
        guest.write(GPAS[3] + 4096 * intervals, b"x")
        guest.write(GPAS[1] + 4096 * 63, bytes(4))

    with guest.client("other") as other:
        trace = record(guest, tmp_path / "trace", **until(5, write))
        with other.take(3) as lease:
            assert lease.bitmap.pages().tolist() == [1, 2, 3, 4, 5]
    # 130 pages are three words; page 63 of the second slot is bit 255.
    assert [pages_of(row) for row in trace.words(0, 5)] == [[], *([page, 255] for page in (1, 2, 3, 4))]
    assert [pages_of(row) for row in trace.zeros(0, 5)] == [[], *([255],) * 4]
    assert pages_of(trace.initial_zeros) == [*range(1, 130), *range(192, 256)]
    assert trace.slots == tuple(Memslot(slot.id, 0, slot.base_gfn, slot.npages, 0) for slot in SLOTS)
    assert (trace.source, trace.mechanism, trace.interval, trace.complete) == ("memory", "dirty log", 5.0, True)
    assert trace.intervals == 5


def test_it_ends_after_a_duration(guest, tmp_path):
    assert 0.1 <= record(guest, tmp_path / "trace", interval=0.03, duration=0.1).times[-1] / 1e9 < 30
    assert record(guest, tmp_path / "one", interval=60, duration=0.01).intervals == 1


def test_pages_written_while_zeros_are_looked_for_are_none(guest, tmp_path, monkeypatch):
    look, first = recorder._zeros_of, []

    def looking(*arguments):
        found = look(*arguments)
        if not first:
            first.append(guest.write(GPAS[3] + 4096, b"y"))
        return found

    monkeypatch.setattr(recorder, "_zeros_of", looking)
    trace = record(guest, tmp_path / "trace", interval=0.01, duration=0.02)
    assert 1 not in pages_of(trace.initial_zeros)
    assert not trace.words(0, trace.intervals).any()


def test_a_write_that_fails_gives_the_pages_back(guest, tmp_path, monkeypatch):
    append = Writer.append

    def failing(self, time_ns, words, zeros=None):
        if self.intervals == 2:
            raise OSError(ENOSPC, os.strerror(ENOSPC), "chunk")
        append(self, time_ns, words, zeros)

    monkeypatch.setattr(Writer, "append", failing)
    with pytest.raises(OSError, match="No space left"):
        record(Alone(guest), tmp_path / "trace", interval=0.01, duration=60,
               on_interval=lambda intervals, *_: guest.write(GPAS[3] + 4096 * intervals, b"x"))  # fmt: skip
    with guest.dirty(3) as lease:
        assert lease.bitmap.pages().tolist() == [2]
    trace = open_trace(tmp_path / "trace")
    assert [pages_of(row) for row in trace.words(0, 2)] == [[], [1]]
    assert trace.complete


def test_who_listens_may_end_it(guest, tmp_path):
    def listen(intervals, *_):
        if intervals == 3:
            raise KeyError("enough")

    with pytest.raises(KeyError):
        record(guest, tmp_path / "trace", interval=0.01, duration=60, on_interval=listen)
    assert open_trace(tmp_path / "trace").intervals == 3
    with guest.client("trace"):  # the name is free again
        pass


def test_a_cancel_ends_it_with_the_interval_that_goes_on(guest, tmp_path):
    cancel = threading.Event()
    timer = threading.Timer(0.2, lambda: (guest.write(GPAS[3] + 5 * 4096, b"x"), cancel.set()))
    timer.start()
    trace = record(guest, tmp_path / "trace", interval=60, cancel=cancel)
    timer.join()
    assert trace.intervals == 1
    assert pages_of(trace.words(0, 1)[0]) == [5]
    assert trace.times[-1] < 30e9


def test_a_slot_that_changes_is_refused(tmp_path):
    with Machine() as machine:
        slot = machine.add_memslot(1 << 20, 0x4000_0000)
        machine.start_log()
        with pytest.raises(TraceError, match="slot 0 was changed meanwhile: the slot's log was switched off"):
            record(machine, tmp_path / "trace", interval=0.01, duration=60,
                   on_interval=lambda *_: (machine.stop_log(), machine.start_log()))  # fmt: skip
        assert slot.id == 0
    assert open_trace(tmp_path / "trace").intervals == 1


def test_a_bitmap_of_another_size_is_refused(guest, tmp_path):
    class Lease:
        bitmap, given_back = DirtyBitmap(64), 0

        def rollback(self):
            Lease.given_back += 1

    alone = Alone(guest)
    alone.dirty = lambda slot: Lease()
    with pytest.raises(TraceError, match="slot 3 had 130 pages, and has 64"):
        record(alone, tmp_path / "trace", duration=1)
    assert Lease.given_back == 2
    assert not (tmp_path / "trace").exists()


def test_wrong_arguments_make_no_trace(guest, tmp_path):
    for options, error, text in (
        ({"interval": 0, "duration": 1}, ValueError, "interval is a number"),
        ({"interval": float("nan"), "duration": 1}, ValueError, "interval is a number"),
        ({"duration": -1}, ValueError, "duration is a number"),
        ({}, ValueError, "there is neither"),
        ({"duration": 1, "cancel": 3}, TypeError, "cancel is of type Event"),
        ({"duration": 1, "on_interval": 3}, TypeError, "on_interval is of type Callable"),
        ({"duration": 1, "zeros": 1}, TypeError, "zeros is True or False"),
    ):
        with pytest.raises(error, match=text):
            record(guest, tmp_path / "trace", **options)
    with guest.client("trace"), pytest.raises(OSError, match="already") as caught:
        record(guest, tmp_path / "trace", duration=1)
    assert caught.value.errno == EBUSY
    with pytest.raises(TypeError, match="source"):
        record(7, tmp_path / "trace", duration=1)
    assert not (tmp_path / "trace").exists()


def test_a_machine_that_runs_misses_nothing(tmp_path):
    with Machine() as machine:
        slot = machine.add_memslot(8 << 20, 0x4000_0000)
        machine.run(Uniform(rate=20_000))
        machine.start_log()
        before = machine.memory(slot.id).copy()
        machine.resume()
        trace = record(machine, tmp_path / "trace", interval=0.02, duration=0.3)
        machine.pause()
        with machine.dirty(slot.id) as lease:  # the default client has all of it
            rows = (machine.memory(slot.id) != before).reshape(-1, 4096).any(axis=1)
            assert lease.bitmap.pages()[np.isin(lease.bitmap.pages(), np.flatnonzero(rows))].size == rows.sum()
            found = np.bitwise_or.reduce(trace.words(0, trace.intervals), axis=0)
            assert not (found & ~lease.bitmap.words).any()
    assert trace.mechanism == "hardware DBM"
    assert found.any()


@NEEDS_KVM
@pytest.mark.parametrize("ring", [None, 4096])
def test_a_real_guest_misses_nothing(tmp_path, ring):
    with KvmVm(8 << 20, guest="counting", rate=20_000, ring=ring) as vm:
        vm.start_log()
        vm.resume()
        cancel = threading.Event()
        begun, kept = [], {}

        def tell(intervals, *_):
            if intervals == 1:  # what is written from here on is in a later interval
                vm.pause()
                kept.update({slot.id: vm.memory(slot.id).copy() for slot in vm.slots})
                begun.append(intervals)
                vm.resume()
            elif intervals == 8:
                vm.pause()
            elif intervals == 9:
                cancel.set()

        trace = record(vm, tmp_path / "trace", interval=0.02, cancel=cancel, on_interval=tell)
        found = np.bitwise_or.reduce(trace.words(1, trace.intervals), axis=0)
        wrote = 0
        for start, slot in zip(trace.starts, trace.slots, strict=True):
            words = found[start : start + word_count(slot.npages)]
            rows = (vm.memory(slot.id) != kept[slot.id]).reshape(-1, 4096).any(axis=1)
            wrote += rows.sum()
            assert set(np.flatnonzero(rows)) <= set(pages_of(words))
        assert wrote > 100
    assert trace.source.startswith("kvm ")


class Clock(threading.Event):
    """A clock, and the event that is waited for, which is set after some time: to wait takes as long as it is to."""

    def __init__(self, monkeypatch, ends=1 << 62) -> None:
        super().__init__()
        self.now, self._ends = 7 * 10**9, 7 * 10**9 + ends
        monkeypatch.setattr(recorder.time, "monotonic_ns", lambda: self.now)

    def wait(self, timeout=None):
        self.now = max(self.now, min(self.now + round(timeout * 1e9), self._ends))
        return self.now >= self._ends


@pytest.mark.parametrize(
    ("interval", "duration", "work", "ends"),
    [
        (0.1, 0.35, 0, [100, 200, 300, 350]),
        (0.1, 0.3, 0, [100, 200, 300]),
        (0.1, 0.3009, 0, [100, 200, 300.9]),  # the rest is too short for an interval
        (0.1, 0.302, 0, [100, 200, 300, 302]),
        (0.1, 0.05, 0, [50]),
        (0.1, 0.5, 30, [100, 200, 300, 400, 500]),
        (0.1, 0.5, 150, [100, 250, 400, 550]),  # one that is late is ended at once
        (2, 5.5, 0, [2000, 4000, 5500]),
        (0.1, None, 0, [100, 200, 250]),  # by a cancel
    ],
)
def test_when_intervals_end(interval, duration, work, ends, monkeypatch):
    """At multiples of the interval, and after the duration; all in milliseconds since the start."""
    clock, told, found = Clock(monkeypatch, 1 << 62 if duration else 250 * 10**6), [], []
    ticks = recorder._Ticks(interval, duration, clock, lambda *what: told.append(what))
    ticks.start()
    for number, _ in enumerate(ticks):
        found.append(ticks.now())
        ticks.tell(number + 1, found[-1], np.array([5, 1 << 63], dtype=np.uint64))
        clock.now += work * 10**6
    assert found == pytest.approx([each * 1e6 for each in ends], abs=2)  # nanoseconds
    assert told == [(number + 1, each / 1e9, 3) for number, each in enumerate(found)]


@pytest.mark.parametrize("what", ["interval", "duration"])
def test_the_longest_times(what, tmp_path):
    for seconds in (1e9, 1e-6):
        recorder._Ticks(**{"interval": 1, "duration": 1, "cancel": None, "tell": None} | {what: seconds})
    for seconds in (1e9 + 1, 0, -1):
        with pytest.raises(ValueError, match=f"{what} is a number"):
            recorder._Ticks(**{"interval": 1, "duration": 1, "cancel": None, "tell": None} | {what: seconds})


@given(
    npages=st.sampled_from([1, 63, 64, 65, 500]),
    page_size=st.sampled_from([4096, 65536]),
    seed=st.integers(0, 999),
    many=st.booleans(),
)
def test_zero_pages_are_those_of_zeros(npages, page_size, seed, many):
    rng = np.random.default_rng(seed)
    memory = np.zeros(npages * page_size, dtype=np.uint8)
    places = rng.integers(0, memory.size, npages // 2)
    memory[places] = 1
    bits = rng.random(npages) < (0.9 if many else 0.05)
    words = DirtyBitmap.from_pages(np.flatnonzero(bits), npages).words
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recorder, "_WINDOW", 128)
        patch.setattr(recorder, "_LOOK", 3 * page_size)
        found = recorder.zero_pages(memory, words, page_size)
    truth = bits & ~memory.reshape(npages, page_size).any(axis=1)
    assert pages_of(found) == np.flatnonzero(truth).tolist()


# --- a file of RAM -----------------------------------------------------------------------------------------


def test_a_ram_file_is_compared_with_what_it_was(tmp_path, monkeypatch):
    """With parts of 3 pages, holes, a hole that is punched, and a write of the same bytes, which isn't seen."""
    monkeypatch.setattr(recorder, "_PART", 3 * 4096)
    ram, npages = tmp_path / "ram", 130
    os.truncate(os.open(ram, os.O_CREAT | os.O_RDWR), npages * 4096)
    file = os.open(ram, os.O_RDWR)
    os.pwrite(file, b"a" * 4096 * 3, 9 * 4096)
    os.pwrite(file, b"tail", 130 * 4096 - 4)

    def change(intervals):
        if intervals == 1:
            os.pwrite(file, b"b", 10 * 4096 + 5)
            os.pwrite(file, b"a", 9 * 4096)  # the same bytes
            os.pwrite(file, b"c", 64 * 4096)
        elif intervals == 2:
            os.pwrite(file, bytes(4096), 11 * 4096)
            os.pwrite(file, bytes(1), 64 * 4096)
        elif intervals == 3:
            os.pwrite(file, b"d", 129 * 4096)
            os.pwrite(file, b"c", 64 * 4096)

    trace = record_file(ram, tmp_path / "trace", gpa=0x4000_0000, **until(6, change))
    assert [pages_of(row) for row in trace.words(0, 6)] == [[], [10, 64], [11, 64], [64, 129], [], []]
    assert [pages_of(row) for row in trace.zeros(0, 4)] == [[], [], [11, 64], []]
    assert pages_of(trace.initial_zeros) == [*range(9), *range(12, 129)]
    assert (trace.slots[0].base_gfn, trace.npages, trace.mechanism) == (0x40000, 130, "content")
    assert (trace.source, trace.interval, trace.slots[0].id) == ("ram file", 5.0, 0)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["ram", "trace"]
    os.close(file)


def test_memory_that_was_given_back_is_zero(tmp_path, monkeypatch):
    """A balloon leaves a hole in the file, where the copy has data."""
    monkeypatch.setattr(recorder, "_PART", 4 * 4096)
    ram = tmp_path / "ram"
    ram.write_bytes(b"a" * 4096 * 16)

    def deflate(intervals):
        if intervals == 1:
            os.truncate(ram, 4096)
            os.truncate(ram, 4096 * 16)

    trace = record_file(ram, tmp_path / "trace", **until(4, deflate))
    assert [pages_of(row) for row in trace.words(0, 4)] == [[], list(range(1, 16)), [], []]
    assert np.array_equal(trace.zeros(0, 4), trace.words(0, 4))


def test_a_ram_file_that_gets_shorter_ends_the_trace(tmp_path):
    ram = tmp_path / "ram"
    ram.write_bytes(b"a" * 8192)
    with pytest.raises(OSError, match="it ends at byte 4096, and had 8192") as caught:
        record_file(ram, tmp_path / "trace", interval=0.01, duration=60,
                    on_interval=lambda *_: os.truncate(ram, 4096))  # fmt: skip
    assert caught.value.errno == EIO
    assert open_trace(tmp_path / "trace").intervals == 1


def test_what_is_no_ram_file_is_refused(tmp_path):
    (tmp_path / "odd").write_bytes(b"a" * 5000)
    (tmp_path / "empty").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe")
    for name, text in (("odd", "not whole pages"), ("empty", "not whole pages"), ("pipe", "regular"), ("no", "no")):
        with pytest.raises(OSError, match=f"(?i){text}"):
            record_file(tmp_path / name, tmp_path / "trace", duration=1)
    assert not (tmp_path / "trace").exists()


# --- bitmaps -----------------------------------------------------------------------------------------------


def kept(folder, bitmaps, name="{:03d}.bitmap"):
    folder.mkdir()
    for number, pages in enumerate(bitmaps):
        DirtyBitmap.from_pages(pages, 130).save(folder / name.format(number))


def test_bitmaps_become_a_trace_by_interval_or_by_their_names(tmp_path):
    kept(tmp_path / "kept", [[1], [2, 129], []])
    (tmp_path / "kept" / ".hidden").write_text("x")
    trace, named = from_bitmaps(tmp_path / "kept", tmp_path / "trace", [Memslot(0, 0, 0, 130, 0)], interval=0.5)
    assert not named
    assert [pages_of(row) for row in trace.words(0, 3)] == [[1], [2, 129], []]
    assert trace.times.tolist() == [0, 5 * 10**8, 10**9, 15 * 10**8]
    assert trace.interval == 500.0
    kept(tmp_path / "late", [[1], [2]], "at-{:d}5ms.bitmap")
    (tmp_path / "late" / "at-5ms.bitmap").write_bytes((tmp_path / "late" / "at-05ms.bitmap").read_bytes())
    (tmp_path / "late" / "at-05ms.bitmap").rename(tmp_path / "late" / "at-125ms.bitmap")
    trace, named = from_bitmaps(tmp_path / "late", tmp_path / "second")
    assert named
    assert trace.times.tolist() == [0, 5 * 10**6, 15 * 10**6, 125 * 10**6]
    assert [pages_of(row) for row in trace.words(0, 3)] == [[1], [2], [1]]
    assert (trace.npages, trace.interval) == (192, None)


def test_bitmaps_that_no_trace_can_be_made_of_are_refused(tmp_path):
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match="there are no bitmaps"):
        from_bitmaps(tmp_path / "none", tmp_path / "trace")
    kept(tmp_path / "kept", [[1], [2]])
    with pytest.raises(BitmapError, match=r"000\.bitmap: bitmaps of these slots have 16 bytes, got 17 or more"):
        from_bitmaps(tmp_path / "kept", tmp_path / "a", [Memslot(0, 0, 0, 128, 0)])
    with pytest.raises(BitmapError, match=r"have 32 bytes, got 24$"):
        from_bitmaps(tmp_path / "kept", tmp_path / "b", [Memslot(0, 0, 0, 256, 0)])
    (tmp_path / "kept" / "001.bitmap").write_bytes(b"\xff" * 24)
    with pytest.raises(BitmapError, match=r"001\.bitmap: slot 7"):
        from_bitmaps(tmp_path / "kept", tmp_path / "c", [Memslot(7, 0, 0, 130, 0)])
    assert not (tmp_path / "c").exists()  # though the first file was good
    kept(tmp_path / "zero", [[1]], "{:d}ms")
    with pytest.raises(TraceError, match="0ms: it has the time 0"):
        from_bitmaps(tmp_path / "zero", tmp_path / "d")
    for name in ("999999999999999999s", "9223372037s"):
        kept(tmp_path / name, [[1]], name)
        with pytest.raises(TraceError, match=f"{name}: its time is beyond"):
            from_bitmaps(tmp_path / name, tmp_path / "e")
    kept(tmp_path / "twice", [[1]], "a-1ms")
    kept(tmp_path / "other", [[1]], "x")
    (tmp_path / "other" / "x").rename(tmp_path / "twice" / "b-1000us")
    with pytest.raises(TraceError, match=r"b-1000us: it has the time of a-1ms"):
        from_bitmaps(tmp_path / "twice", tmp_path / "e")


def test_a_first_bitmap_without_a_byte_is_refused(tmp_path):
    """By default it says of how many pages they are: of 64 or more."""
    kept(tmp_path / "kept", [[], [1]])
    (tmp_path / "kept" / "000.bitmap").write_bytes(b"")
    with pytest.raises(BitmapError, match=r"000\.bitmap: bitmaps of these slots have 8 bytes, got 0$"):
        from_bitmaps(tmp_path / "kept", tmp_path / "a")
    (tmp_path / "kept" / "000.bitmap").write_bytes(bytes(16))
    with pytest.raises(BitmapError, match=r"001\.bitmap: bitmaps of these slots have 16 bytes, got 17 or more$"):
        from_bitmaps(tmp_path / "kept", tmp_path / "a")


def test_bitmaps_of_several_slots_from_the_first_nanosecond_on(tmp_path):
    """At the shortest times that there are, or a long one each."""
    (tmp_path / "kept").mkdir()
    for name, row in (("b-1ns", [1, 2, 3]), ("a-2ns", [4, 1, 7])):
        (tmp_path / "kept" / name).write_bytes(np.array(row, dtype=np.uint64).tobytes())
    slots = [Memslot(1, 0, 0, 65, 0), Memslot(0, 0, 0x100, 3, 0)]
    (tmp_path / "kept" / "b-1ns").write_bytes(np.array([1, 0, 3], dtype=np.uint64).tobytes())
    trace, named = from_bitmaps(tmp_path / "kept", tmp_path / "a", slots)
    assert (named, trace.times.tolist(), trace.words(0, 2).tolist()) == (True, [0, 1, 2], [[1, 0, 3], [4, 1, 7]])
    for name in ("b-1ns", "a-2ns"):
        (tmp_path / "kept" / name).rename(tmp_path / "kept" / name[0])
    for seconds, end in ((1e-6, 1000), (1e9, 10**18)):
        trace, named = from_bitmaps(tmp_path / "kept", tmp_path / f"x{end}", slots, interval=seconds)
        assert (named, trace.times.tolist(), trace.interval) == (False, [0, end, 2 * end], seconds * 1e3)
        assert trace.words(0, 2).tolist() == [[4, 1, 7], [1, 0, 3]]
    with pytest.raises(ValueError, match="interval is a number"):
        from_bitmaps(tmp_path / "kept", tmp_path / "y", slots, interval=1e9 + 1)


def test_recording_leaves_no_thread_of_its_own(guest, tmp_path):
    record(guest, tmp_path / "trace", interval=0.01, duration=0.02)
    before = threading.active_count()
    for number in range(3):
        record(guest, tmp_path / f"trace{number}", interval=0.01, duration=0.02)
    time.sleep(0.01)
    assert threading.active_count() <= before + 4  # zarr's, which all share


def test_what_is_written_while_the_first_copy_is_made_is_in_no_interval(tmp_path, monkeypatch):
    """A page is filled then, and another one emptied: what is zero at the start is what it is after that."""
    ram = tmp_path / "ram"
    ram.write_bytes(bytes([1]) * 4096 + bytes(3 * 4096))
    runs, real = [], recorder._Comparison.run

    def run(self):
        found = real(self)
        runs.append(found)
        if len(runs) == 1:
            with ram.open("r+b") as file:
                file.write(bytes(4096) + b"x")
        return found

    monkeypatch.setattr(recorder._Comparison, "run", run)
    trace = record_file(ram, tmp_path / "trace", **until(3))
    assert not trace.words(0, trace.intervals).any()
    assert pages_of(trace.initial_zeros) == [0, 2, 3]
