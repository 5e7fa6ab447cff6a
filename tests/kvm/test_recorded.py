"""The same calls without a kernel: what one answered was written down, and the model must answer alike."""

from errno import EINVAL
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from effort import EFFORT
from kvm_calls import Clear, Drawing, Get, Limits, Protect2, Region, Tally, Write, from_json, to_json, to_runs, to_words
from kvm_record import CALLS, MODES, calls, count, load
from kvm_sides import BACKINGS, ModelSide

RECORDINGS = {mode.name: load(mode) for mode in MODES}

modes = pytest.mark.parametrize("recording", RECORDINGS.values(), ids=RECORDINGS)


@modes
@pytest.mark.parametrize("backing", BACKINGS)
@pytest.mark.alike(2)
def test_the_model_answers_what_the_kernel_did(recording, backing):
    """Each sequence by one backing, and by all of them in `make thorough`."""
    for number, sequence in enumerate(recording.sequences):
        if EFFORT == 1 and number % len(BACKINGS) != list(BACKINGS).index(backing):
            continue
        model = ModelSide(recording.limits, recording.mode, backing)
        for call, answer in sequence:
            got = model.answer(call)
            assert got == answer, f"VM {number}, {call}: the kernel answered {answer}, and the model {got}"
        model.log.verify()


@modes
def test_a_clear_without_a_sync_only_leaves_more_dirty(recording):
    """As the model's own CLEAR does with hardware DBM: what no GET has shown stays dirty."""
    more = 0
    for sequence in recording.sequences[:20]:
        model = ModelSide(recording.limits, recording.mode, "hardware", syncs=False)
        for call, answer in sequence:
            got = model.answer(call)
            if isinstance(call, Get) and not isinstance(answer, int):
                missed = to_words(answer, 64) & ~to_words(got, 64)
                assert not missed.any(), f"{call}: the model lacks {to_runs(missed)}"
                more += got != answer
            else:
                assert got == answer
    assert more, "no sequence tells the two from each other"


# --- the data itself ------------------------------------------------------------------------------------------


@modes
def test_the_seed_makes_these_calls(recording):
    assert "Linux" in recording.kernel
    for number, sequence in enumerate(recording.sequences):
        asked = calls(recording.limits, recording.mode, recording.seed, number)
        for (drawing, call), (recorded, answer) in zip(asked, sequence, strict=True):
            assert call == recorded
            drawing.learn(call, answer)


def test_every_kind_of_call_and_answer_is_there():
    tally = count(list(RECORDINGS.values()))
    assert tally.sequences == sum(len(recording.sequences) for recording in RECORDINGS.values())
    assert tally.counts.total() >= CALLS * tally.sequences
    few = {kind: times for kind, times in tally.counts.items() if times < 5}
    assert not few
    assert {name: {answer for kind, answer in tally.counts if kind == name} for name, _ in tally.counts} == {
        "region": {
            *("created", "deleted", "moved", "other flags", "moved, other flags", "as it was"),
            *("EINVAL", "EEXIST"),
        },
        "write": {
            *("one page", "nowhere"),
            *(f"across a page's end, {where}" for where in ("two pages", "one page", "nowhere")),
        },
        "get": {"pages", "no pages", "ENOENT", "EINVAL"},
        "clear": {"to the slot's end", "whole words", "no pages", "ENOENT", "EINVAL", "EFAULT"},
        "protect2": {"done", "EINVAL"},
    }


def test_the_page_has_these_counts():
    page = Path(__file__).parents[2] / "docs" / "conformance.md"
    assert count(list(RECORDINGS.values())).table() in page.read_text()


@pytest.mark.parametrize(
    ("call", "answer"),
    [
        (Region(1, 3, 1 << 40, 0x2000, 0), EINVAL),
        (Write((1 << 64) - 4), 0),
        (Get(2), ()),
        (Get(2), (0, 64, 66, 1)),
        (Clear(3, 64, 65, 2, (0, 1, 127, 1)), 0),
        (Protect2(3), 0),
    ],
    ids=str,
)
def test_calls_are_read_as_they_were_written(call, answer):
    line = to_json(call, answer)
    assert from_json([list(value) if isinstance(value, tuple) else value for value in line]) == (call, answer)


@pytest.mark.parametrize("pages", [[], [0], [63, 64], [0, 2, 127], list(range(128)), [65, 66, 126]])
def test_runs_are_the_pages(pages):
    words = np.zeros(2, dtype=np.uint64)
    for page in pages:
        words[page >> 6] |= np.uint64(1 << (page & 63))
    runs = to_runs(words)
    pairs = list(zip(runs[::2], runs[1::2], strict=True))
    assert [page for start, length in pairs for page in range(start, start + length)] == pages
    assert all(start + length < after for (start, length), (after, _) in pairwise(pairs))
    np.testing.assert_array_equal(to_words(runs, 2), words)


def test_the_table_counts():
    limits = Limits("x86_64", 32764, 1, 52)
    tally = Tally(limits)
    tally.begin()
    for call, answer in [
        (Region(0, 1, 0x1000, 0x2000, 0), 0),
        (Write(0x1FF8), 0),
        (Write(0x2FF8), 0),
        (Write(0), 0),
        (Get(0), (0, 2)),
        (Get(1), 2),
    ]:
        tally.add(call, answer)
    assert tally.table().splitlines()[2:] == [
        "| get | ENOENT | 1 |",
        "| get | pages | 1 |",
        "| region | created | 1 |",
        "| write | across a page's end, one page | 1 |",
        "| write | across a page's end, two pages | 1 |",
        "| write | nowhere | 1 |",
        "| all, in 1 VMs | | 6 |",
    ]


def test_a_drawing_knows_what_there_is():
    drawing = Drawing(Limits("x86_64", 32764, 1, 52))
    made = Region(0, 1, 0x1000, 0x2000, 0)
    for call, answer, slots in [
        (made, EINVAL, {}),
        (made, 0, {0: made}),
        (Region(0, 1, 0, 0, 0), 0, {}),
    ]:
        drawing.learn(call, answer)
        assert drawing.slots == slots
