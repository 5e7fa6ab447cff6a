"""A mechanism of a test's own: this file and a name in a table are all that it takes."""

import ast
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hwdbm
from hwdbm import DirtyBitmap, DirtyLog, pte
from hwdbm.dirtylog import MECHANISMS
from hwdbm.dirtylog.mechanism import NewLeaf
from hwdbm.kernels import Tally
from hwdbm.machine import Machine, Uniform

NPAGES = 200


class Journal:
    """Clean pages are read-only. What is granted is noted in a journal, as HDBSS would, and not in the bitmap."""

    name = "journal"
    hd = False

    def __init__(self):
        self.pages = {}

    def start(self, s2):
        protected = s2.wrprotect()
        self.pages.pop(id(s2), None)
        return s2.take_saved_into(DirtyBitmap(s2.npages)) + Tally(changed=protected)

    def peek(self, s2, live, first, npages):
        noted = self.pages.setdefault(id(s2), set())
        part = {page for page in noted if first <= page < first + npages}
        for page in part:
            live.set_range(page, 1)
        noted -= part
        return s2.take_saved_into(live, first, npages) + Tally(words=len(part))

    sync = peek

    def protect(self, s2, mask, first, out):
        # A page that was noted since it was published is dirty still, so its leaf is to stay as it is.
        noted = [page - first for page in self.pages.get(id(s2), ()) if first <= page < first + mask.npages]
        return s2.wrprotect_part(mask - DirtyBitmap.from_pages(noted, mask.npages), first, out)

    rearm = protect

    def leave(self, s2, live):
        if live is None:
            return Tally()
        return self.peek(s2, live, 0, s2.npages) + Tally(changed=s2.wrprotect())

    def enter(self, s2, live):
        return Tally()

    def unrecorded(self, s2):
        noted = DirtyBitmap.from_pages(sorted(self.pages.get(id(s2), ())), s2.npages)
        return (s2.scan(pte.untracked) | s2.scan(pte.tracked)) - noted

    def leaf(self, *, write):
        return NewLeaf(writable=False, dbm=False, marked=False)

    def grant(self, s2, leaves):
        for level, index in zip(leaves.level.tolist(), leaves.index.tolist(), strict=True):
            start, stop = s2.layout.span(level, index)
            self.pages.setdefault(id(s2), set()).update(range(max(start, 0), min(stop, s2.npages)))
        s2.relax_at(leaves)

    def open(self, s2, pages):
        pass

    def deny_blocks(self, s2, gfn, npages):
        return 0


@pytest.fixture
def journal(monkeypatch):
    monkeypatch.setitem(MECHANISMS, Journal.name, Journal)
    return Journal.name


VERBS = st.sampled_from(["write", "device", "get", "clear", "sync", "journal", "other"])
STEPS = st.lists(st.tuples(VERBS, st.integers(0, NPAGES - 1)), max_size=40)


@settings(max_examples=60)
@given(steps=STEPS, manual=st.booleans())
def test_no_write_is_lost_under_it(steps, manual):
    MECHANISMS[Journal.name] = Journal
    try:
        play(steps, manual)
    finally:
        del MECHANISMS[Journal.name]


def play(steps, manual):
    log = DirtyLog(mechanism="journal", manual_protect=manual)
    log.set_memory_region(0, 0, 0, NPAGES << 12, 1 << 30)
    log.map(0, 0, NPAGES, 5)
    log.set_memory_region(0, 1, 0, NPAGES << 12, 1 << 30)
    written = set()
    for verb, page in steps:
        if verb == "write":
            guest_writes(log, page)
            written.add(page)
        elif verb == "device":
            log.mark_dirty(0, page, 1)
            written.add(page)
        elif verb == "get":
            got = set(log.get_dirty_log(0).pages().tolist())
            assert written <= got
            written = written if manual else set()
        elif verb == "clear" and manual:
            mask = DirtyBitmap.from_pages([page], NPAGES)
            shown = page in log.get_dirty_log(0).pages()
            log.clear_dirty_log(0, 0, NPAGES, mask)
            written -= {page}
            assert shown or page not in written
        elif verb == "sync":
            log.sync(0)
        else:
            log.set_mechanism("journal" if verb == "journal" else "write-protection")
        log.verify()
    assert written <= set(log.get_dirty_log(0).pages().tolist())


def guest_writes(log, page):
    if not pte.writable(3)(int(log.stage2(0).level(3)[page])):
        log.write_fault(0, page)
    assert pte.writable(3)(int(log.stage2(0).level(3)[page]))


def test_a_machine_runs_under_it(journal):
    """Passes of a migration: what the log says is copied, and in the end all memory is the same."""
    with Machine(hw_dbm=False, thp=True) as machine:
        slot = machine.add_memslot(4 << 20, gpa=0x4000_0000)
        machine.run(Uniform(seed=3))
        machine.step(500)
        machine.log.set_mechanism(journal)
        copy = machine.memory(slot.id).copy()
        machine.start_log()
        for _ in range(4):
            machine.step(700)
            machine.write(0x4000_1000, b"device")
            with machine.dirty(slot.id) as lease:
                assert lease.bitmap.any()
                for first, npages in lease.bitmap.ranges().tolist():
                    part = slice(first << 12, first + npages << 12)
                    copy[part] = machine.memory(slot.id)[part]
        assert np.array_equal(copy, machine.memory(slot.id))
        machine.verify()


def test_nobody_else_names_one():
    """Which mechanisms there are is said in one file. Nowhere is asked which one it is."""
    root = Path(hwdbm.__file__).parent
    kinds = {kind.__name__ for kind in MECHANISMS.values()}
    for path in root.rglob("*.py"):
        if path.name == "mechanism.py" or "races" in path.parts:
            continue
        names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
        assert not names & kinds, path
