"""The format of traces: what is written is read, part by part; and what anybody may have written is refused."""

import atexit
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from datetime import UTC, datetime
from errno import EEXIST, EIO, ELOOP, ENOSPC
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from effort import EFFORT
from hypothesis import given, settings
from hypothesis import strategies as st

from hwdbm.bitmap import word_count
from hwdbm.errors import ClosedError, LayoutError, TraceError
from hwdbm.memslot import Memslot
from hwdbm.trace import Writer, group, metadata, open_trace

SIZES = (1, 63, 64, 65, 511, 512, 513)


def slots_of(*sizes: int) -> list[Memslot]:
    """Return slots of some pages, with a gap between each two, the ids falling."""
    found, base = [], 0x100
    for number, npages in enumerate(sizes):
        found.append(Memslot(len(sizes) - number, 0, base, npages, 0))
        base += npages + 7
    return found


def random_words(rng: np.random.Generator, slots: list[Memslot], intervals: int) -> np.ndarray:
    parts = []
    for slot in slots:
        bits = rng.random((intervals, 64 * word_count(slot.npages))) < 0.1
        bits[:, slot.npages :] = False
        parts.append(np.packbits(bits, axis=1, bitorder="little").view(np.uint64))
    return np.concatenate(parts, axis=1)


def written(path: Path, words: np.ndarray, slots: list[Memslot], zeros: np.ndarray | None = None, **options) -> Path:
    with Writer(path, slots, 4096, **options) as writer:
        for row, each in enumerate(words):
            writer.append((row + 1) * 10**8, each, None if zeros is None else zeros[row])
    return path


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    slots = slots_of(65, 512)
    words = random_words(np.random.default_rng(1), slots, 3)
    return written(tmp_path_factory.mktemp("once") / "trace", words, slots, words & words >> np.uint64(1))


@pytest.fixture
def small(once: Path, tmp_path: Path) -> Path:
    """A trace of three intervals of two slots, with zeros."""
    return shutil.copytree(once, tmp_path / "trace")


@settings(max_examples=12 * EFFORT)
@given(
    sizes=st.lists(st.sampled_from(SIZES), min_size=1, max_size=3),
    intervals=st.integers(0, 20),
    chunk=st.sampled_from([1, 8, 64, 1 << 17]),
    zeros=st.booleans(),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_what_is_written_is_read_part_by_part(tmp_path_factory, sizes, intervals, chunk, zeros, seed, data):
    rng, slots = np.random.default_rng(seed), slots_of(*sizes)
    words = random_words(rng, slots, intervals)
    zero = words & random_words(rng, slots, intervals)
    first = random_words(rng, slots, 1)[0]
    path = tmp_path_factory.mktemp("traces") / "trace"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(group, "_CHUNK", chunk)
        patch.setattr(group, "_TIMES", 8)
        written(path, words, slots, zero if zeros else None, initial_zeros=first if zeros else None)
    trace = open_trace(path)
    assert (trace.intervals, trace.nwords, trace.npages) == (*words.shape, sum(sizes))
    assert [(slot.id, slot.base_gfn, slot.npages) for slot in trace.slots] == [
        (slot.id, slot.base_gfn, slot.npages) for slot in slots
    ]
    assert trace.times.tolist() == [row * 10**8 for row in range(intervals + 1)]
    assert np.array_equal(trace.words(0, intervals), words)
    assert trace.has_zeros == bool(zeros and intervals)
    for start, slot in zip(trace.starts, trace.slots, strict=True):
        end = start + word_count(slot.npages)
        assert np.array_equal(trace.words(0, intervals, start, end), words[:, start:end])
    for _ in range(4):
        lo, hi = sorted(data.draw(st.tuples(st.integers(0, intervals), st.integers(0, intervals))))
        a, b = sorted(data.draw(st.tuples(st.integers(0, trace.nwords), st.integers(0, trace.nwords))))
        assert np.array_equal(trace.words(lo, hi, a, b), words[lo:hi, a:b])
        if trace.has_zeros:
            assert np.array_equal(trace.zeros(lo, hi, a, b), zero[lo:hi, a:b])
    if zeros:
        assert np.array_equal(trace.initial_zeros, first)
    else:
        assert trace.initial_zeros is None


def test_it_is_a_zarr_group_like_any_other(small):
    import zarr

    found = zarr.open_group(small, mode="r")
    trace = open_trace(small)
    assert found.attrs["hwdbm-trace"] == 1
    assert found.attrs["slots"] == [
        {"id": 2, "gpa": 0x100 * 4096, "npages": 65},
        {"id": 1, "gpa": (0x100 + 65 + 7) * 4096, "npages": 512},
    ]
    assert found["words"].shape == (3, 10)
    assert found["times"].shape == (4,)
    assert np.array_equal(found["words"][:], trace.words(0, 3))
    assert np.array_equal(found["zeros"][:], trace.zeros(0, 3))


def test_a_copy_that_was_asked_for_is_the_callers(small):
    trace = open_trace(small)
    before = trace.words(0, 3).copy()
    trace.words(0, 3)[:] = 0
    assert np.array_equal(trace.words(0, 3), before)
    with pytest.raises(ValueError, match="read-only"):
        trace.times[0] = 1


def test_what_it_says_of_itself(tmp_path):
    started = datetime(2026, 11, 29, 12, 0, tzinfo=UTC)
    slots = slots_of(3)
    Writer(tmp_path / "trace", slots, 16384, source="kvm", mechanism="a\x1b[2J" + "x" * 300, interval=100,
           started=started).close()  # fmt: skip
    trace = open_trace(tmp_path / "trace")
    assert (trace.page_size, trace.source, trace.interval, trace.intervals) == (16384, "kvm", 100.0, 0)
    assert trace.mechanism.startswith("a\\x1b[2Jxx")
    assert len(trace.mechanism) == 200
    assert datetime.fromisoformat(trace.started) == started
    assert repr(trace) == "<Trace of 0 intervals of 3 pages of 16384 bytes, 0 s>"
    assert trace.words(0, 0).shape == (0, 1)


# --- writing that fails ------------------------------------------------------------------------------------


def test_each_interval_is_there_at_once(tmp_path):
    slots = slots_of(70)
    words = random_words(np.random.default_rng(0), slots, 5)
    with Writer(tmp_path / "trace", slots, 4096) as writer:
        for row in range(5):
            writer.append(row + 1, words[row])
            trace = open_trace(tmp_path / "trace")
            assert np.array_equal(trace.words(0, trace.intervals), words[: row + 1])


@pytest.mark.parametrize("chunk", [1, 1 << 17])
def test_a_write_that_fails_leaves_the_intervals_before_it(tmp_path, monkeypatch, chunk):
    """At every single write of a file: the trace is as it was, and the interval can be written again."""
    from zarr.storage import _local

    monkeypatch.setattr(group, "_CHUNK", chunk)
    monkeypatch.setattr(group, "_TIMES", 2)
    slots = slots_of(70, 3)
    words = random_words(np.random.default_rng(0), slots, 5)
    put, left = _local._put, []

    def failing(*arguments, **options):
        if left:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(ENOSPC, os.strerror(ENOSPC), "chunk")
        return put(*arguments, **options)

    monkeypatch.setattr(_local, "_put", failing)
    failures = 0
    with Writer(tmp_path / "trace", slots, 4096) as writer:
        for row in range(5):
            budget = 0
            while True:
                left[:] = [budget]
                try:
                    writer.append(row + 1, words[row], words[row])
                except OSError as error:
                    assert error.errno == ENOSPC  # noqa: PT017
                    failures += 1
                    budget += 1
                    left.clear()
                    trace = open_trace(tmp_path / "trace")
                    assert trace.intervals == row
                    assert np.array_equal(trace.words(0, row), words[:row])
                else:
                    left.clear()
                    break
    assert failures >= 15
    trace = open_trace(tmp_path / "trace")
    assert np.array_equal(trace.words(0, 5), words)
    assert np.array_equal(trace.zeros(0, 5), words)


def test_a_writer_that_was_killed_leaves_whole_intervals(tmp_path):
    script = (
        "import os, sys, numpy as np\n"
        "from hwdbm.memslot import Memslot\n"
        "from hwdbm.trace import Writer\n"
        "writer = Writer(sys.argv[1], [Memslot(0, 0, 0, 65, 0)], 4096)\n"
        "for row in range(7): writer.append(row + 1, np.array([row, 1], dtype=np.uint64))\n"
        "os.kill(os.getpid(), 9)\n"
    )
    path = tmp_path / "trace"
    done = subprocess.run([sys.executable, "-P", "-W", "error", "-c", script, path], check=False, timeout=60)
    assert done.returncode == -9
    assert open_trace(path).words(0, 7)[:, 0].tolist() == list(range(7))
    assert (open_trace(path).intervals, open_trace(path).complete) == (7, False)


def test_a_trace_is_as_large_as_what_is_in_it(tmp_path):
    """Once it is closed; while it is written it ends where its times do."""
    import zarr

    with Writer(tmp_path / "trace", slots_of(3), 4096) as writer:
        assert open_trace(tmp_path / "trace").times.tolist() == [0]
        with pytest.raises(ValueError, match="an interval ends after the last one's 0 ns, not at 0"):
            writer.append(0, np.array([7], dtype=np.uint64))
        writer.append(1, np.array([7], dtype=np.uint64), np.array([5], dtype=np.uint64))
        assert open_trace(tmp_path / "trace").words(0, 1).tolist() == [[7]]
    found = zarr.open_group(tmp_path / "trace", mode="r")
    assert [found[name].shape for name in ("words", "zeros", "times")] == [(1, 1), (1, 1), (2,)]
    assert found["times"][:].tolist() == [0, 1]
    trace = open_trace(tmp_path / "trace")
    assert trace.words(1, 0).shape == (0, 1)
    assert trace.words(0, 1, 1).shape == (1, 0)


@pytest.mark.parametrize("interval", [1e-6, 1e15])
def test_the_shortest_and_the_longest_interval(interval, tmp_path):
    Writer(tmp_path / "trace", slots_of(3), 4096, interval=interval).close()
    assert open_trace(tmp_path / "trace").interval == interval
    for wrong in (0, 1e15 + 1, -1):
        with pytest.raises(ValueError, match="interval is a number"):
            Writer(tmp_path / "wrong", slots_of(3), 4096, interval=wrong)


@pytest.mark.parametrize("fails", [None, KeyError])
def test_a_close_that_fails_is_told_unless_the_block_failed(fails, tmp_path, monkeypatch):
    """An error without a number, or a text, or a file, has the trace's folder, and what there is of them."""

    def failing(*_, **__):
        raise OSError("odd")

    path = tmp_path / "trace"
    with pytest.raises(fails or OSError) as caught, Writer(path, slots_of(3), 4096) as writer:  # noqa: PT012
        writer.append(1, np.array([7], dtype=np.uint64))
        monkeypatch.setattr(group._zarr().Array, "resize", failing)
        if fails:
            raise fails
    if not fails:
        assert (caught.value.errno, caught.value.strerror, caught.value.filename) == (EIO, "odd", str(path))
    monkeypatch.undo()
    assert open_trace(path).intervals == 1


def test_a_trace_is_written_over_by_no_later_one(tmp_path):
    """A path that was free is looked at again, by a writer and by who asks for it."""
    path = tmp_path / "trace"
    path.mkdir()
    group.check_free(path)
    Writer(path, slots_of(3), 4096).close()
    for again in (lambda: Writer(path, slots_of(3), 4096), lambda: group.check_free(path)):
        with pytest.raises(FileExistsError, match="there is something already"):
            again()
    assert open_trace(path).intervals == 0


def test_traces_leave_one_thing_to_do_at_the_end(small):
    open_trace(small)
    before = atexit._ncallbacks()
    open_trace(small)
    assert atexit._ncallbacks() == before


def test_wrong_arguments_change_nothing(tmp_path):
    slots = slots_of(65)
    good = np.array([1, 1], dtype=np.uint64)
    with Writer(tmp_path / "trace", slots, 4096) as writer:
        writer.append(5, good)
        for time, words, zeros, error, text in (
            (5, good, None, ValueError, "after the last one's 5 ns, not at 5"),
            (1 << 63, good, None, ValueError, "not at 9223372036854775808"),
            (6, good[:1], None, ValueError, "words are 2 words, not 1"),
            (6, good.astype(np.int64), None, TypeError, "uint64"),
            (6, np.array([1, 2], dtype=np.uint64), None, ValueError, "words: slot 1 has bits beyond its last page"),
            (6, good, good, ValueError, "interval 1 has zeros, unlike the first"),
            (6.5, good, None, TypeError, "time_ns is an integer"),
        ):
            with pytest.raises(error, match=text):
                writer.append(time, words, zeros)
        writer.append(6, good)
    assert open_trace(tmp_path / "trace").times.tolist() == [0, 5, 6]
    with pytest.raises(ClosedError, match="takes nothing"):
        writer.append(7, good)
    writer.close()


def test_zeros_are_pages_that_were_written(tmp_path):
    with Writer(tmp_path / "trace", slots_of(3), 4096) as writer:
        with pytest.raises(ValueError, match="zeros are pages that were written"):
            writer.append(1, np.array([1], dtype=np.uint64), np.array([3], dtype=np.uint64))
        writer.append(1, np.array([1], dtype=np.uint64), np.array([1], dtype=np.uint64))
        with pytest.raises(ValueError, match="interval 1 has no zeros, unlike the first"):
            writer.append(2, np.array([1], dtype=np.uint64))


def test_nothing_is_written_over(small, tmp_path):
    before = sorted(small.rglob("*"))
    with pytest.raises(FileExistsError) as caught:
        Writer(small, slots_of(3), 4096)
    assert caught.value.errno == EEXIST
    assert sorted(small.rglob("*")) == before
    for wrong in (slots_of(), [slots_of(3)[0]] * 2):
        with pytest.raises(LayoutError):
            Writer(tmp_path / "new", wrong, 4096)
    assert not (tmp_path / "new").exists()
    (tmp_path / "empty").mkdir()
    Writer(tmp_path / "empty", slots_of(3), 4096).close()
    assert (tmp_path / "empty" / "zarr.json").exists()


def test_a_trace_is_its_owners_alone(small):
    assert small.stat().st_mode & 0o777 == 0o700


def test_a_fork_neither_writes_nor_hangs(small, tmp_path):
    """zarr's thread isn't in the child: reading there starts another one."""
    trace, writer = open_trace(small), Writer(tmp_path / "more", slots_of(3), 4096)
    whole = trace.words(0, 3)
    child = os.fork()
    if not child:
        status = 1
        try:
            with pytest.raises(ClosedError, match="was forked from"):
                writer.append(1, np.array([1], dtype=np.uint64))
            writer.close()
            status = 0 if np.array_equal(open_trace(small).words(0, 3), whole) else 2
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    writer.append(1, np.array([1], dtype=np.uint64))
    writer.close()
    assert open_trace(tmp_path / "more").intervals == 1


def test_a_trace_goes_to_another_process_by_its_path(small, monkeypatch):
    monkeypatch.chdir(small.parent)
    raw = pickle.dumps(open_trace(small.name))
    monkeypatch.chdir("/")
    trace = pickle.loads(raw)
    assert np.array_equal(trace.words(0, 3), open_trace(small).words(0, 3))


def test_threads_read_one_trace(small):
    trace, found = open_trace(small), []
    whole = trace.words(0, 3)
    read = threading.Barrier(4)

    def look():
        read.wait()
        found.extend(np.array_equal(trace.words(row, row + 1)[0], whole[row]) for row in (0, 2, 1) * 5)

    threads = [threading.Thread(target=look) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(60)
    assert found == [True] * 60


# --- reading what anybody wrote ----------------------------------------------------------------------------


def change(path: Path, **values) -> None:
    found = json.loads(path.read_text())
    found.update(values)
    path.write_text(json.dumps(found))


def attributes(path: Path, **values) -> None:
    found = json.loads((path / "zarr.json").read_text())
    change(path / "zarr.json", attributes=found["attributes"] | values)


def read_all(path: Path) -> None:
    trace = open_trace(path)
    trace.words(0, trace.intervals)
    trace.zeros(0, trace.intervals)
    assert trace.initial_zeros is None


@pytest.mark.parametrize(
    "gone", ["words/c/0/0", "zeros/c/0/0", "times/c/0", "times/zarr.json", "words/zarr.json", "words", "zeros/c"]
)
def test_a_trace_that_was_cut_short_is_refused(small, gone):
    shutil.rmtree(small / gone) if (small / gone).is_dir() else (small / gone).unlink()
    with pytest.raises(TraceError, match=gone.partition("/")[0]):
        open_trace(small)


@pytest.mark.parametrize("name", ["words/c/0/0", "zeros/c/0/0", "times/c/0"])
def test_a_chunk_that_was_cut_short_or_changed_is_refused(small, name):
    raw = (small / name).read_bytes()
    middle = len(raw) // 2
    for wrong in (b"", raw[:5], raw[:-1], raw[:middle], raw + raw, raw[:middle] + bytes([raw[middle] ^ 4])
                  + raw[middle + 1 :], bytes(len(raw)), raw[:4] + b"\xa0" + raw[5:], b"x" * (3 << 20)):  # fmt: skip
        (small / name).write_bytes(wrong)
        with pytest.raises(TraceError, match=name.partition("/")[0]):
            read_all(small)
    (small / name).write_bytes(raw)
    read_all(small)


def test_a_chunk_of_more_bytes_than_it_can_have_is_not_read(small):
    with (small / "words/c/0/0").open("ab") as file:
        file.truncate(2 << 20)
    with pytest.raises(TraceError, match="a chunk of 1048560 bytes doesn't take 2097152"):
        open_trace(small).words(0, 1)


def test_a_chunk_that_is_lost_while_the_trace_is_open_is_missed(small):
    trace = open_trace(small)
    (small / "words/c/0/0").unlink()
    with pytest.raises(TraceError, match="cut short"):
        trace.words(0, 1)


def test_a_chunk_that_would_grow_is_not_decompressed(small):
    """A frame that says it has 16 EiB, or a GiB: nothing of that size is allocated."""
    raw = (small / "words/c/0/0").read_bytes()
    for size in ((1 << 64) - 1, 1 << 30):
        (small / "words/c/0/0").write_bytes(raw[:4] + b"\xe0" + size.to_bytes(8, "little") + raw[10:])
        with pytest.raises(TraceError, match=f"it has {size} bytes"):
            open_trace(small).words(0, 1)


@pytest.mark.parametrize(
    ("times", "text"),
    [
        ([0, 3, 2, 4], "out of order: interval 1 begins at 3 ns and ends at 2"),
        ([0, 3, 3, 4], "out of order: interval 1 begins at 3 ns and ends at 3"),
        ([1, 2, 3, 4], "the first time is 0, not 1"),
        ([-1, -1, -1, -1], "the first time is 0, not to come|cut short"),  # zarr writes no fill values
        ([0, -1, 2, 3], "out of order: interval 0 begins at 0 ns and ends at -1"),
        ([0, 5, 4, 3], "out of order: interval 1 begins at 5 ns and ends at 4"),
    ],
)
def test_times_out_of_order_are_refused(small, times, text):
    import zarr

    zarr.open_group(small, mode="r+")["times"][:] = times
    with pytest.raises(TraceError, match=text):
        open_trace(small)


def test_bits_of_no_page_are_refused(small):
    import zarr

    zarr.open_group(small, mode="r+")["words"][1, 1] = 2
    with pytest.raises(TraceError, match="words: slot 2 has bits beyond its last page"):
        open_trace(small).words(0, 3)


@pytest.mark.parametrize("npages", SIZES)
def test_each_bit_beyond_a_slots_last_page_is_refused(npages, tmp_path):
    """In a word of its own, and between others; where several slots have some, the first of them is named."""
    slots = slots_of(64, npages, 1)
    at = 1 + word_count(npages) - 1
    with Writer(tmp_path / "trace", slots, 4096) as writer:
        for bit in range(npages % 64 or 64, 64):
            words = np.zeros(writer.nwords, dtype=np.uint64)
            words[at] = 1 << bit
            with pytest.raises(ValueError, match=r"^words: slot 2 has bits beyond its last page$"):
                writer.append(1, words)
            words[-1] = 2
            with pytest.raises(ValueError, match=r"^words: slot 2 has bits beyond its last page$"):
                writer.append(1, words)
        words = np.zeros(writer.nwords, dtype=np.uint64)
        words[-1] = 2
        with pytest.raises(ValueError, match=r"^words: slot 1 has bits beyond its last page$"):
            writer.append(1, words)
        words[-1], words[at] = 1, 1 << (npages - 1) % 64
        writer.append(1, words)
    assert np.array_equal(open_trace(tmp_path / "trace").words(0, 1)[0], words)


def test_a_part_is_looked_at_for_bits_of_no_page(small, monkeypatch):
    """The words that are read, where those of a large guest are read by parts."""
    import zarr

    monkeypatch.setattr(group, "_KEPT", 0)
    attributes(small, slots=[{"id": 5, "gpa": 0, "npages": 3}, {"id": 7, "gpa": 1 << 30, "npages": 9 * 64 - 1}])
    zarr.open_group(small, mode="r+")["words"][:] = 0
    zarr.open_group(small, mode="r+")["words"][2, 9] = 1 << 63
    trace = open_trace(small)
    assert not trace.words(0, 3, 0, 9).any()
    assert not trace.words(0, 2, 9, 10).any()
    for first in (0, 1, 9):
        with pytest.raises(TraceError, match="words: slot 7 has bits beyond its last page"):
            trace.words(0, 3, first, 10)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"hwdbm-trace": 2}, "of version 2, and this reads version 1"),
        ({"hwdbm-trace": True}, "of version True"),
        ({"hwdbm-trace": "x" * 58}, f"of version '{'x' * 58}', and"),
        ({"hwdbm-trace": "x" * 59}, f"of version '{'x' * 56}\\.\\.\\., and"),
        ({"hwdbm-trace": (1 << 64) - 1}, "of version 18446744073709551615, and"),
        ({"hwdbm-trace": 1 << 64}, "of version a number beyond 64 bits, and"),
        ({"hwdbm-trace": -1 << 64}, "of version a number beyond 64 bits, and"),
        ({"interval": 0}, "interval is a number of milliseconds above 0, or null, not 0$"),
        ({"interval": True}, "interval is a number of milliseconds above 0, or null, not True"),
        ({"interval": 1 << 53}, "interval is a number of milliseconds above 0"),
        ({"slots": [{"id": 0, "gpa": 1 << 53, "npages": 1}]}, "a slot's gpa is a whole number of 0 to 2\\^53 - 1"),
        ({"slots": [{"id": 0, "gpa": 2048, "npages": 1}]}, "slot 0 isn't one or more whole pages of 4096 bytes"),
        ({"source": "x" * 201}, "source is a printable text of 200 letters at most"),
        ({"intervals": (1 << 53) - 1}, "cut short: there are 4 times of 9007199254740992$"),
        ({"intervals": 1 << 53}, "intervals is a whole number"),
        ({"page-size": 4097}, "isn't one or more whole pages of 4097 bytes"),
        ({"page-size": 8192}, "a page has 4096, 16384 or 65536 bytes, not 8192"),
        ({"page-size": None}, "page-size is a whole number"),
        ({"slots": []}, "1 to 32767 slots, not 0"),
        ({"slots": [{"id": 0, "gpa": 0, "npages": 0}]}, "one or more whole pages"),
        ({"slots": [{"id": 0, "gpa": 0, "npages": 1}] * 2}, "a slot's id comes twice"),
        ({"slots": [{"id": 0, "gpa": 0, "npages": 641}]}, "3 intervals of 11 words are there .* has 3 of 10"),
        ({"slots": [{"id": 0, "gpa": 0, "npages": 1 << 39}]}, "3 intervals of 8589934592 words"),
        ({"slots": [{"id": 0, "gpa": 0, "npages": 1 << 60}]}, "2\\^53"),
        ({"slots": {"id": 0}}, "slots is a list"),
        ({"interval": float("nan")}, "interval is a number of milliseconds above 0"),
        ({"interval": "100"}, "interval is a number of milliseconds above 0"),
        ({"source": "\x1b[2J"}, "source is a printable text"),
        ({"intervals": 4}, "cut short: there are 4 times of 5"),
        ({"intervals": 1 << 50}, "cut short: there are 4 times of"),
        ({"intervals": -1}, "intervals is a whole number"),
        ({"started": "yesterday"}, "started is a time"),
        ({"started": None}, "started is a printable text"),
    ],
)
def test_attributes_that_no_trace_has_are_refused(small, values, text):
    attributes(small, **values)
    with pytest.raises(TraceError, match=text):
        open_trace(small)


@pytest.mark.parametrize(
    ("name", "values", "text"),
    [
        ("words", {"data_type": "int64"}, "it is of uint64, not 'int64'"),
        ("words", {"data_type": "float64"}, "it is of uint64"),
        ("times", {"data_type": "uint64"}, "it is of int64"),
        ("words", {"shape": [3, 11]}, "has 3 of 11"),
        ("words", {"shape": [2, 10]}, "has 2 of 10"),
        ("words", {"shape": [30]}, "2 dimensions, not shape \\[30\\]"),
        ("words", {"shape": [3, -1]}, "whole number"),
        ("times", {"shape": [0]}, "cut short"),
        ("times", {"shape": [3]}, "there are 3 times of 4"),
        ("words", {"chunk_grid": {"name": "rectilinear"}}, "regular"),
        ("words", {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [0, 10]}}}, "a chunk has"),
        ("words", {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [1 << 40, 10]}}}, "a chunk has"),
        ("words", {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [1, 10]}}}, "cut short"),
        ("words", {"codecs": [{"name": "bytes"}]}, "codecs"),
        ("words", {"codecs": [{"name": "bytes", "configuration": {"endian": "big"}}, {"name": "zstd"}]}, "codecs"),
        ("words", {"codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "gzip"}]}, "codecs"),
        ("words", {"codecs": [{"name": []}, {"name": "zstd"}]}, "codecs"),
        ("words", {"codecs": [7, "zstd"]}, "codecs"),
        ("words", {"storage_transformers": [{"name": "x"}]}, "transforms"),
        ("words", {"chunk_key_encoding": {"name": "v2"}}, "files c/0"),
        ("words", {"chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}}}, "files c/0"),
        ("words", {"chunk_key_encoding": {"name": "default", "configuration": [1]}}, "files c/0"),
        ("words", {"chunk_key_encoding": 3}, "files c/0"),
        ("words", {"zarr_format": 2}, "no Zarr array of version 3"),
        ("words", {"node_type": "group"}, "no Zarr array"),
    ],
)
def test_arrays_that_no_trace_has_are_refused(small, name, values, text):
    change(small / name / "zarr.json", **values)
    with pytest.raises(TraceError, match=text):
        open_trace(small)


def test_what_is_read_at_the_edge_of_what_a_trace_may_say(small):
    attributes(small, interval=0.5, source="x" * 200, mechanism="", intervals=3)
    trace = open_trace(small)
    assert (trace.interval, trace.source, trace.mechanism) == (0.5, "x" * 200, "")
    attributes(small, interval=(1 << 53) - 1, started="2026-11-29")
    assert (open_trace(small).interval, open_trace(small).started) == ((1 << 53) - 1, "2026-11-29T00:00:00")
    for chunk, text in ([1 << 20, 8], "it has 80 bytes"), ([(1 << 20) + 1, 8], "8 to 67108864 bytes, not 67108928"):
        grid = {"name": "regular", "configuration": {"chunk_shape": chunk}}
        change(small / "words" / "zarr.json", chunk_grid=grid)
        (small / "words" / "c" / "0" / "1").write_bytes((small / "words" / "c" / "0" / "0").read_bytes())
        with pytest.raises(TraceError, match="a chunk"):
            open_trace(small).words(0, 1)
        with pytest.raises(TraceError) as caught:
            open_trace(small).words(0, 1)
        assert (text in str(caught.value)) == (chunk[0] > 1 << 20)


@pytest.mark.parametrize("encoding", [{"name": "default"}, {"name": "default", "configuration": {}}])
def test_chunks_lie_in_folders_where_nothing_else_is_said(encoding, small):
    change(small / "words" / "zarr.json", chunk_key_encoding=encoding)
    assert open_trace(small).intervals == 3


@pytest.mark.parametrize("where", range(3))
def test_each_chunk_is_missed_before_any_is_read(where, tmp_path, monkeypatch):
    """Of two rows of three chunks, and of what is known of zeros at the start."""
    monkeypatch.setattr(group, "_CHUNK", 16)
    slots = slots_of(40 * 64)
    words = random_words(np.random.default_rng(2), slots, 2)
    path = written(tmp_path / "trace", words, slots, initial_zeros=words[0])
    assert np.array_equal(open_trace(path).words(0, 2), words)
    for row in range(2):
        file = path / "words" / "c" / str(row) / str(where)
        raw = file.read_bytes()
        file.unlink()
        with pytest.raises(TraceError, match=f"words/c/{row}/{where}: the trace is cut short: this chunk is missing$"):
            open_trace(path)
        file.write_bytes(raw)
    (path / "initial-zeros" / "c" / str(where)).unlink()
    with pytest.raises(TraceError, match=f"initial-zeros/c/{where}: the trace is cut short"):
        _ = open_trace(path).initial_zeros
    change(path / "initial-zeros" / "zarr.json", shape=[39])
    with pytest.raises(TraceError, match=r"initial-zeros: an interval has 40 words, and it has 39$"):
        _ = open_trace(path).initial_zeros


def test_a_folder_of_chunks_that_cannot_be_read_is_no_trace_that_was_cut_short(small):
    shutil.rmtree(small / "words" / "c")
    (small / "words" / "c").symlink_to("c")
    with pytest.raises(OSError, match="symbolic links") as caught:
        open_trace(small)
    assert caught.value.errno == ELOOP


@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_writer_that_was_killed_as_it_began_a_chunk_of_times(times, small):
    """The chunk isn't there, and the trace ends before it; without the first one there is no trace."""
    raw = (small / "times" / "c" / "0").read_bytes()
    attributes(small, intervals=None)
    change(small / "times" / "zarr.json", shape=[4 * times])
    grid = json.loads((small / "times" / "zarr.json").read_text())["chunk_grid"]
    assert grid["configuration"]["chunk_shape"] == [1024]
    change(small / "times" / "zarr.json", shape=[1024 + 4 * times])
    assert open_trace(small).times.tolist() == [0, 10**8, 2 * 10**8, 3 * 10**8]
    assert not open_trace(small).complete
    (small / "times" / "c" / "0").unlink()
    for shape in (4 * times, 1024 + 4 * times):
        change(small / "times" / "zarr.json", shape=[shape])
        with pytest.raises(TraceError, match="times/c/0: the trace is cut short: this chunk is missing"):
            open_trace(small)
    (small / "times" / "c" / "0").write_bytes(raw)


def test_what_is_no_trace_is_refused(tmp_path):
    import zarr

    with pytest.raises(FileNotFoundError, match="no such trace"):
        open_trace(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="a trace is a folder"):
        open_trace(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(TraceError, match=r"zarr\.json: there is no such file, and so no trace"):
        open_trace(tmp_path / "empty")
    zarr.create_group(tmp_path / "group")
    with pytest.raises(TraceError, match="a Zarr group, but no trace"):
        open_trace(tmp_path / "group")
    zarr.create_array(tmp_path / "array", shape=(3,), dtype="uint64")
    with pytest.raises(TraceError, match="no Zarr group of version 3"):
        open_trace(tmp_path / "array")
    for raw, text in ((b"{", "no JSON"), (b"[" * 100_000, "no JSON"), (b"\xff", "no JSON"), (b"[]", "is an object"),
                      (b" " * (5 << 20), "more than 4194304 bytes")):  # fmt: skip
        (tmp_path / "empty" / "zarr.json").write_bytes(raw)
        with pytest.raises(TraceError, match=text):
            open_trace(tmp_path / "empty")
    (tmp_path / "empty" / "zarr.json").unlink()
    os.mkfifo(tmp_path / "empty" / "zarr.json")
    with pytest.raises(OSError, match="regular file"):
        open_trace(tmp_path / "empty")


def test_claims_that_no_file_bears_out_cost_nothing(small):
    """A trace that nobody closed, of 2^50 times, and one of 2^45 words: neither is allocated, nor counted through."""
    attributes(small, intervals=None)
    change(small / "times" / "zarr.json", shape=[1 << 50])
    with pytest.raises(TraceError, match="cut short"):
        open_trace(small)
    change(small / "times" / "zarr.json", shape=[4])
    attributes(small, slots=[{"id": 0, "gpa": 0, "npages": 1 << 39}])
    change(small / "words" / "zarr.json", shape=[3, 1 << 33])
    with pytest.raises(TraceError, match="cut short"):
        open_trace(small)


@pytest.mark.parametrize(("lo", "hi", "first", "stop"), [(-1, 1, 0, 1), (0, 4, 0, 1), (0, 1, 2, 1), (0, 1, 0, 11)])
def test_intervals_and_words_that_there_are_not_are_refused(small, lo, hi, first, stop):
    with pytest.raises(ValueError, match="0 to"):
        open_trace(small).words(lo, hi, first, stop)


def test_zarr_is_imported_by_who_has_a_trace_alone():
    script = (
        "import sys, hwdbm, hwdbm.trace\n"
        "import hwdbm.cli.app\n"
        "assert not {'zarr', 'asyncio', 'numcodecs'} & set(sys.modules), 'imported'\n"
    )
    subprocess.run([sys.executable, "-P", "-W", "error", "-c", script], check=True, timeout=60)


def test_without_zarr_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'hwdbm\[trace\]'"):
        Writer(tmp_path / "trace", slots_of(3), 4096)
    assert not (tmp_path / "trace").exists()


def test_a_process_that_read_and_wrote_ends_without_a_word(small, tmp_path):
    script = (
        "import sys\n"
        "from hwdbm.trace import Writer, open_trace\n"
        "trace = open_trace(sys.argv[1])\n"
        "with Writer(sys.argv[2], trace.slots, 4096) as writer: writer.append(1, trace.words(0, 1)[0])\n"
        "import time, zarr.core.sync\n"
        "zarr.core.sync.loop[0].call_soon_threadsafe(time.sleep, 0.5)  # as if the machine were slow\n"
    )
    done = subprocess.run([sys.executable, "-P", "-W", "error", "-c", script, small, tmp_path / "new"],
                          check=False, capture_output=True, timeout=60)  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.mark.parametrize("there", [True, False])
def test_a_trace_that_fails_before_its_first_interval_leaves_nothing(tmp_path, there):
    """A folder that was there stays, empty; of a trace with an interval everything stays, unless it is discarded."""
    path = tmp_path / "trace"
    if there:
        path.mkdir()
    with pytest.raises(KeyError), Writer(path, [Memslot(0, 0, 0, 64, 0)], 4096):
        raise KeyError
    assert [*tmp_path.rglob("*")] == [path] * there
    with pytest.raises(ValueError, match="not at 1"), Writer(path, [Memslot(0, 0, 0, 64, 0)], 4096) as writer:  # noqa: PT012
        writer.append(1, np.zeros(1, dtype=np.uint64))
        writer.append(1, np.zeros(1, dtype=np.uint64))
    assert open_trace(path).intervals == 1
    (path / "mine").touch()
    writer.discard()
    assert [*tmp_path.rglob("*")] == [path, path / "mine"]  # what somebody put there stays
    with pytest.raises(ClosedError):
        writer.append(2, np.zeros(1, dtype=np.uint64))


def test_a_system_without_room_for_a_thread_is_no_damage(tmp_path, monkeypatch):
    def failing(*_, **__):
        raise RuntimeError("can't start new thread")

    with Writer(tmp_path / "trace", [Memslot(0, 0, 0, 64, 0)], 4096) as writer:
        monkeypatch.setattr(group._zarr().Array, "__setitem__", failing)
        with pytest.raises(RuntimeError, match=r"^can't start new thread$"):
            writer.append(1, np.zeros(1, dtype=np.uint64))
        monkeypatch.undo()


@pytest.mark.parametrize("head", [b"", b"\x28\xb5\x2f\xfd", b"\x28\xb5\x2f\xfd\x20", b"\x28\xb5\x2f\xfe\x20\x07\x00"])
def test_what_is_no_zstd_frame_says_no_size(head: bytes) -> None:
    """Too short, or of another kind; of a frame of one segment a byte says the size."""
    assert metadata._content_size(head) is None
    assert metadata._content_size(b"\x28\xb5\x2f\xfd\x20\x07\x00") == 7


def test_the_size_that_a_zstd_frame_says() -> None:
    """Field by field of RFC 8878, 3.1.1.1: with a window, a dictionary, sizes of each width; and not cut short."""
    for flag, single, dictionary in product(range(4), range(2), range(4)):
        window, size = b"" if single else b"\x58", (b"\x09" * single, b"\x09\x01", b"\x09" * 4, b"\x09" * 8)[flag]
        head = b"\x28\xb5\x2f\xfd" + bytes([flag << 6 | single << 5 | dictionary]) + window
        head += b"\x77" * (0, 1, 2, 4)[dictionary]
        said = int.from_bytes(size, "little") + 256 * (flag == 1) if size else None
        assert metadata._content_size(head + size) == said
        assert metadata._content_size(head + size + b"\x77") == said
        assert metadata._content_size((head + size)[:-1]) is None
