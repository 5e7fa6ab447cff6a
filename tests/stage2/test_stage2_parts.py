"""The verbs on parts of a slot, each against one descriptor at a time on random tables, with both kernels."""

import pytest
from effort import EFFORT
from hypothesis import given, settings
from hypothesis import strategies as st

from hwdbm import DirtyBitmap, Stage2, pte
from hwdbm.errors import BitmapError, GfnError
from hwdbm.pte import State
from hwdbm.testing import bitmaps, differences, stage2s

FEW = settings(max_examples=25 * EFFORT)


def shared(s2):
    """The same tables, to be shared."""
    twin = Stage2(s2.npages, s2.base_gfn, s2.granule)
    for level in (1, 2, 3):
        twin.level(level)[:] = s2.level(level)
    return twin


def leaves(s2):
    """Yield (level, index, state, pages) of each leaf; pages that lie in the slot."""
    for level in (1, 2, 3):
        for index, desc in enumerate(s2.level(level).tolist()):
            state = pte.state(desc, level)
            if state not in (State.ABSENT, State.TABLE, State.RESERVED):
                start, stop = s2.layout.span(level, index)
                yield level, index, state, range(max(start, 0), min(stop, s2.npages))


@st.composite
def cases(draw):
    """A slot, a part of it in whole words or up to its end, a mask of the part, and pages that are saved already."""
    s2 = shared(draw(stage2s(most=1200)))
    words = s2.npages + 63 >> 6
    first, stop = sorted((draw(st.integers(0, words)), draw(st.integers(0, words))))
    first, stop = first * 64, min(stop * 64, s2.npages)
    first = min(first, s2.npages)
    first = first & ~63
    saved = draw(bitmaps(s2.npages))
    s2.saved.bitmap |= saved
    s2.saved.widen(0, s2.npages)
    return s2, first, draw(bitmaps(max(stop - first, 0)))


def by_hand(s2, first, mask, become):
    """Return a twin with each leaf of a page in the mask as `become` says, and what the consumers are told."""
    twin = shared(s2)
    twin.saved.bitmap |= s2.saved.bitmap
    pages = {first + page for page in mask.pages().tolist()}
    part = range(first, first + mask.npages)
    changed = 0
    for level, index, state, covered in leaves(s2):
        new = become.get(state)
        if new is None or not pages & set(covered):
            continue
        entries = twin.level(level)
        bits = {State.READ_ONLY: 0, State.WRITABLE_CLEAN: pte.DBM}[new]
        entries[index] = int(entries[index]) & ~(pte.DBM | pte.S2AP_W) | bits
        changed += 1
        if state in (State.UNTRACKED, State.WRITABLE_DIRTY):
            for page in covered:
                if page in part:
                    twin.host_dirty.set_range(page, 1)
                if page not in pages:
                    twin.saved.bitmap.set_range(page, 1)
    for page in sorted(pages):
        if page in twin.saved.bitmap:
            twin.host_dirty.set_range(page, 1)
            twin.saved.bitmap.set_range(page, 1, False)
    return twin, changed


@FEW
@given(case=cases())
def test_track_part(kernels, case):
    s2, first, mask = case
    want, changed = by_hand(
        s2,
        first,
        mask,
        {State.UNTRACKED: State.WRITABLE_CLEAN, State.WRITABLE_DIRTY: State.WRITABLE_CLEAN},
    )
    assert s2.track_part(mask, first).changed == changed
    assert differences(s2, want) == []
    s2.verify()


@FEW
@given(case=cases())
def test_wrprotect_part(kernels, case):
    s2, first, mask = case
    want, _ = by_hand(
        s2,
        first,
        mask,
        {
            State.UNTRACKED: State.READ_ONLY,
            State.WRITABLE_DIRTY: State.READ_ONLY,
            State.WRITABLE_CLEAN: State.READ_ONLY,
        },
    )
    s2.wrprotect_part(mask, first)
    assert differences(s2, want) == []
    s2.verify()


@FEW
@given(case=cases())
def test_peeking_and_taking_what_was_saved(kernels, case):
    s2, first, mask = case
    before, part = shared(s2), DirtyBitmap(s2.npages)
    part.set_range(first, mask.npages)
    dirty = {page for _, _, state, covered in leaves(s2) if state is State.WRITABLE_DIRTY for page in covered}
    saved = s2.saved.bitmap.copy()
    out = DirtyBitmap(s2.npages)
    s2.peek_into(out, first, mask.npages)
    assert out == (DirtyBitmap.from_pages(dirty, s2.npages) | saved) & part
    assert s2.saved.bitmap == saved - part
    assert s2.host_dirty == saved & part
    for level in (1, 2, 3):
        assert (s2.level(level) == before.level(level)).all()
    assert s2.take_saved_into(out, first, mask.npages).words == 0
    s2.verify()


@FEW
@given(s2=stage2s(most=1200), place=st.integers(0, 1 << 16), dbm=st.booleans())
def test_relaxing_a_leaf(s2, place, dbm):
    s2, page = shared(s2), place % s2.npages
    want = shared(s2)
    found = [(level, index, covered) for level, index, _, covered in leaves(s2) if page in covered]
    for level, index, covered in found:
        desc = int(want.level(level)[index])
        if level < 3 and not dbm and pte.dirty(level)(desc):  # the caller marks this page only
            want.saved.widen(covered.start, covered.stop)
            want.saved.bitmap.set_range(covered.start, len(covered))
        want.level(level)[index] = desc | pte.S2AP_W | pte.DBM if dbm else (desc | pte.S2AP_W) & ~pte.DBM
    assert s2.relax(s2.base_gfn + page, dbm=dbm) is bool(found)
    assert differences(s2, want) == []


@FEW
@given(case=cases())
def test_what_is_mapped(case):
    s2, first, mask = case
    part = set(range(first, first + mask.npages))
    if any(part & set(covered) for *_, covered in leaves(s2)):
        assert s2.mapped(first, mask.npages)
    s2.unmap(s2.base_gfn + first, mask.npages)
    assert not s2.mapped(first, mask.npages)


def test_parts_are_inside_of_the_slot():
    s2 = Stage2(200)
    for call in (
        lambda: s2.track_part(DirtyBitmap(64), 192),
        lambda: s2.wrprotect_part(DirtyBitmap(64), -64),
        lambda: s2.peek_into(DirtyBitmap(200), 0, 201),
        lambda: s2.take_saved_into(DirtyBitmap(200), 201),
        lambda: s2.relax(200),
        lambda: s2.mapped(0, 201),
    ):
        with pytest.raises(GfnError):
            call()
    with pytest.raises(BitmapError, match="200 pages, the bitmap 64"):
        s2.peek_into(DirtyBitmap(64), 0, 64)
