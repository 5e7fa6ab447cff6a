"""Where memory is: the map of slots, compared with a list of every page's address."""

import struct
from errno import EFAULT, EINVAL
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwdbm.errors import LayoutError
from hwdbm.memslot import KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, Memslot
from hwdbm.vm import MemoryMap, PlainGuest

PAGE = 4096
FIRST = 0x4_0000
MAP = MemoryMap(PAGE, (Memslot(7, 0, FIRST + 8, 5, 0), Memslot(3, 0, FIRST, 4, 0), Memslot(5, 0, FIRST + 4, 2, 0)))
"""Slots 3 and 5 are neighbours, a gap of two pages comes before slot 7."""


@st.composite
def maps(draw: st.DrawFn) -> MemoryMap:
    page, gfn, slots = draw(st.sampled_from([4096, 16384, 65536])), draw(st.integers(0, 5)), []
    for number in draw(st.permutations(range(draw(st.integers(1, 4))))):
        npages = draw(st.integers(1, 9))
        slots.append(Memslot(number, 0, gfn, npages, 0))
        gfn += npages + draw(st.integers(0, 3))
    return MemoryMap(page, tuple(draw(st.permutations(slots))))


def owners(layout: MemoryMap) -> dict[int, tuple[Memslot, int]]:
    """Return for each frame its slot, and which page of that it is."""
    return {slot.base_gfn + page: (slot, page) for slot in layout.slots for page in range(slot.npages)}


@settings(max_examples=60)
@given(maps(), st.data())
def test_where_a_run_of_bytes_is(layout: MemoryMap, data: st.DataObject) -> None:
    page, known = layout.page_size, owners(layout)
    end = (max(known) + 3) * page
    gpa = data.draw(st.integers(0, end) | st.sampled_from([frame * page for frame in known]))
    length = data.draw(st.integers(0, 4 * page) | st.integers(0, 9).map(lambda count: count * page))
    frames = range(gpa // page, max((gpa + length - 1) // page, gpa // page) + 1)
    inside = [known.get(frame, (None, 0))[0] for frame in frames]
    if None not in inside and len(set(inside)) == 1:
        slot, start = layout.at(gpa, length)
        assert (slot, start) == (inside[0], known[frames[0]][1] * page + gpa % page)
    else:
        with pytest.raises(OSError, match="is not inside of one slot") as raised:
            layout.at(gpa, length)
        assert raised.value.errno == EINVAL
    if not length or None not in inside:
        parts = layout.parts(gpa, length)
        assert sum(count for *_, count in parts) == length
        assert len({slot.id for slot, *_ in parts}) == len(parts)
        assert all(count > 0 for *_, count in parts)
        at = gpa
        for slot, start, count in parts:
            assert slot.base_gfn * page + start == at
            assert start + count <= slot.npages * page
            at += count
    else:
        missing = frames[inside.index(None)] * page
        with pytest.raises(OSError, match=f"no slot is at {max(missing, gpa):#x}") as raised:
            layout.parts(gpa, length)
        assert raised.value.errno == EFAULT


@settings(max_examples=40)
@given(maps(), st.data())
def test_where_addresses_are(layout: MemoryMap, data: st.DataObject) -> None:
    known = owners(layout)
    frames = data.draw(st.lists(st.integers(0, max(known) + 2), max_size=9))
    gpas = np.array([frame * layout.page_size + 17 for frame in frames], dtype=np.int64)
    found = layout.locate(gpas).tolist()
    assert [None if i < 0 else layout.by_address[i] for i in found] == [known.get(f, (None, 0))[0] for f in frames]


@settings(max_examples=60)
@given(maps(), st.data())
def test_runs_of_whole_pages(layout: MemoryMap, data: st.DataObject) -> None:
    page, known = layout.page_size, owners(layout)
    first = data.draw(st.integers(0, max(known) + 1))
    gaps = data.draw(st.lists(st.tuples(st.integers(1, 3), st.integers(-1, 3)), min_size=1, max_size=4))
    runs, at = [], first
    for length, gap in gaps:
        runs.append((at, length))
        at = max(at + length + gap, 0)
    gpa, size = (np.array(column, dtype=np.uint64) * np.uint64(page) for column in zip(*runs, strict=True))
    ascending = all(a + n <= b for (a, n), (b, _) in pairwise(runs))
    frames = {frame for a, n in runs for frame in range(a, a + n)}
    slots = {known.get(frame, (None, 0))[0] for frame in frames}
    if ascending and len(slots) == 1 and None not in slots:
        slot, found = layout.find(gpa, size)
        assert slot in slots
        assert found.tolist() == [[known[a][1], n] for a, n in runs]
    elif not ascending:
        with pytest.raises(LayoutError, match="overlap or descend"):
            layout.find(gpa, size)
    else:
        whole = f"gpa {gpa[0]:#x}..{gpa[-1] + size[-1] - 1:#x} is not inside of one slot"
        with pytest.raises(LayoutError, match=whole):
            layout.find(gpa, size)


@pytest.mark.parametrize(
    ("gpas", "lengths", "match"),
    [
        ([], [], "one or more"),
        ([[FIRST * PAGE]], [[PAGE]], "one or more"),
        ([FIRST * PAGE], [PAGE, PAGE], r"not \(1,\) addresses and \(2,\) lengths"),
        ([FIRST * PAGE + 8], [PAGE], "no whole number of pages"),
        ([FIRST * PAGE], [PAGE + 8], "no whole number of pages"),
        ([FIRST * PAGE, (FIRST + 2) * PAGE], [PAGE, 0], "no whole number of pages"),
        ([FIRST * PAGE, 1 << 62], [PAGE, PAGE], "beyond 52 bits"),
        ([FIRST * PAGE], [1 << 63], "beyond 52 bits"),
        ([FIRST * PAGE, FIRST * PAGE], [PAGE, PAGE], "overlap or descend"),
        ([(FIRST + 1) * PAGE, FIRST * PAGE], [PAGE, PAGE], "overlap or descend"),
        ([FIRST * PAGE, (FIRST + 1) * PAGE], [2 * PAGE, PAGE], "overlap or descend"),
        ([FIRST * PAGE, (FIRST + 2) * PAGE, (FIRST + 1) * PAGE], [PAGE, PAGE, PAGE], "overlap or descend"),
    ],
)
def test_runs_that_are_none(gpas: list[int], lengths: list[int], match: str) -> None:
    with pytest.raises(LayoutError, match=match):
        MAP.find(np.array(gpas, dtype=np.uint64), np.array(lengths, dtype=np.uint64))


@settings(max_examples=30)
@given(maps())
def test_bytes_and_back(layout: MemoryMap) -> None:
    raw = layout.to_bytes()
    again = MemoryMap.from_bytes(raw)
    layout.require(again)
    assert again.to_bytes() == raw
    assert [(s.id, s.base_gfn, s.npages) for s in again.slots] == [(s.id, s.base_gfn, s.npages) for s in layout.slots]
    assert again.total == sum(slot.npages for slot in layout.slots) * layout.page_size


def test_bytes_that_are_no_layout() -> None:
    raw = MAP.to_bytes()
    head = len(raw) - 3 * ((len(raw) - 8) // 3)
    for size in range(len(raw)):
        with pytest.raises(LayoutError, match="has no head" if size < head else "a layout of 3 slots has"):
            MemoryMap.from_bytes(raw[:size])
    with pytest.raises(LayoutError, match=f"got {len(raw) + 1}"):
        MemoryMap.from_bytes(raw + b"\0")
    one = MemoryMap(PAGE, (Memslot(0, 0, 0, 1, 0),)).to_bytes()
    with pytest.raises(LayoutError, match="has no pages"):
        MemoryMap.from_bytes(one[:-8] + struct.pack("<Q", 0))


def test_the_first_difference_is_named() -> None:
    MAP.require(
        MemoryMap(PAGE, tuple(Memslot(s.id, KVM_MEM_LOG_DIRTY_PAGES, s.base_gfn, s.npages, 64) for s in MAP.slots))
    )
    slots = MAP.slots
    for other, match in (
        (MemoryMap(4 * PAGE, slots), "pages of 16384 bytes don't fit into a VM with pages of 4096"),
        (MemoryMap(PAGE, slots[:2]), "2 slots don't fit into a VM with 3"),
        (MemoryMap(PAGE, (*slots, Memslot(9, 0, 0, 1, 0))), "4 slots don't fit into a VM with 3"),
        (MemoryMap(PAGE, (slots[1], slots[0], slots[2])), "doesn't fit into"),
        (
            MemoryMap(PAGE, (Memslot(7, 0, FIRST + 8, 6, 0), *slots[1:])),
            "6 pages.* doesn't fit into .*5 pages",
        ),
        (MemoryMap(PAGE, (Memslot(7, 0, FIRST + 9, 5, 0), *slots[1:])), "0x40009.* doesn't fit into .*0x40008"),
        (MemoryMap(PAGE, (Memslot(7, KVM_MEM_READONLY, FIRST + 8, 5, 0), *slots[1:])), "flags 0x2"),
    ):
        with pytest.raises(LayoutError, match=match):
            MAP.require(other)


@pytest.mark.parametrize(
    ("page", "slots", "match"),
    [
        (PAGE, [(0, 0, 4), (0, 9, 4)], "id comes twice"),
        (PAGE, [(0, 0, 4), (1, 3, 4)], "overlaps"),
        (PAGE, [(0, 3, 4), (1, 0, 4)], "overlaps"),
        (PAGE, [(0, (1 << 40) - 1, 2)], "ends beyond 52 bits"),
        (65536, [(0, (1 << 36) - 1, 2)], "ends beyond 52 bits"),
    ],
)
def test_slots_that_are_no_map(page: int, slots: list[tuple[int, int, int]], match: str) -> None:
    with pytest.raises(LayoutError, match=match):
        MemoryMap(page, tuple(Memslot(number, 0, gfn, npages, 0) for number, gfn, npages in slots))


def test_the_last_pages_of_the_address_space() -> None:
    top = MemoryMap(PAGE, (Memslot(0, 0, (1 << 40) - 2, 2, 0),))
    slot, runs = top.find(np.array([(1 << 52) - PAGE], dtype=np.uint64), np.array([PAGE], dtype=np.uint64))
    assert (slot.id, runs.tolist()) == (0, [[1, 1]])


def test_a_new_guest_is_idle_and_unthrottled() -> None:
    guest = PlainGuest(MAP)
    assert (guest.running, guest.throttled, guest.logging) == (False, 0, False)
