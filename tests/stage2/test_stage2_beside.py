"""Verbs on parts beside another thread that moves leaves between the levels, stepped through: nothing escapes them.

The other thread's verb begins at each step of this one's, stops before some step of its own, in the middle of a
replacement too, and goes on when this thread wants the lock: then it must wait for the other.
"""

import inspect
from threading import Event, Lock, Thread, get_ident

import numpy as np
import pytest
from steppedkernel import SteppedKernel

from hwdbm import DirtyBitmap, Stage2, pte
from hwdbm.kernels import vector
from hwdbm.pte import State
from hwdbm.stage2 import stage2 as module

LIMIT = 60.0
STRIPE = 512
MASK = [3, 70, 511, STRIPE + 5, STRIPE + 300, 2 * STRIPE + 6, 2 * STRIPE + 200]
STOPS = [0, 1, 100, 10**9]  # the last is at the end

VERBS = {
    "split": lambda s2: s2.split(0, s2.npages),
    "collapse": lambda s2: s2.collapse(0, s2.npages),
    "unmap": lambda s2: s2.unmap(STRIPE - 12, 100),
    "split, collapse": lambda s2: (s2.split(0, s2.npages), s2.collapse(0, s2.npages)),
    "collapse, split": lambda s2: (s2.collapse(0, s2.npages), s2.split(0, s2.npages)),
}
PARTS = {
    "track_part": (Stage2.track_part, {State.WRITABLE_CLEAN, State.READ_ONLY, State.ABSENT}),
    "wrprotect_part": (Stage2.wrprotect_part, {State.READ_ONLY, State.ABSENT}),
}


class Kernel(SteppedKernel):
    """A pass over pages also ends with a step."""

    def rewrite_within(self, *arguments, **options):
        tally = super().rewrite_within(*arguments, **options)
        self.hook()
        return tally


class Beside:
    """A verb of another thread, and the lock of the Stage2 that both work on.

    Parameters
    ----------
    begin : int
        The step of this thread's at which it begins; -1 is before all.
    stop : int
        The step of its own before which it stops.
    """

    def __init__(self, s2, verb, begin, stop):
        self.begin, self.stop = begin, stop
        self.lock, self.held, self.steps, self.others = Lock(), False, 0, 0
        self.stopped, self.go, self.error = Event(), Event(), []
        self.here, self.thread = get_ident(), Thread(target=self.work, args=(verb, s2), daemon=True)
        s2._lock, s2._leaves._kernels = self, Kernel(self.step)
        if begin < 0:
            self.start()

    def work(self, verb, s2):
        try:
            verb(s2)
        except BaseException as error:  # noqa: BLE001 - the test raises it
            self.error.append(error)
        finally:
            self.stopped.set()

    def start(self):
        self.thread.start()
        assert self.stopped.wait(LIMIT)

    def step(self):
        if get_ident() == self.here:
            if self.steps == self.begin and not self.held:
                self.start()
            self.steps += 1
        else:
            if self.others == self.stop:
                self.stopped.set()
                assert self.go.wait(LIMIT)
            self.others += 1

    def __enter__(self):
        if get_ident() == self.here:
            self.finish()
            self.held = True
        self.lock.acquire()

    def __exit__(self, *_):
        self.held = self.held and get_ident() != self.here
        self.lock.release()

    def finish(self):
        """Let the other verb come to its end, if it has begun."""
        self.go.set()
        if self.thread.ident is not None:
            self.thread.join(LIMIT)
            assert not self.thread.is_alive()
        if self.error:
            raise self.error[0]


def a_slot():
    """A stripe of untracked pages that make up a block, an untracked block, and tracked pages, some of them dirty."""
    s2 = Stage2(3 * STRIPE)
    s2.map(0, STRIPE, pfn=0)
    s2.map(STRIPE, STRIPE, pfn=STRIPE, level=2)
    s2.map(2 * STRIPE, STRIPE, pfn=2 * STRIPE, dbm=True)
    s2.level(3)[[2 * STRIPE + 6, 2 * STRIPE + 7, 3 * STRIPE - 1]] |= np.uint64(pte.S2AP_W)
    return s2


def check(part, verb, begin, stop):
    """Check what a verb on a part leaves beside another verb; return how many steps it took."""
    s2, mask = a_slot(), DirtyBitmap.from_pages(MASK, 3 * STRIPE)
    dirty, written = s2.dirty(), s2.dirty() | s2.writable()
    beside = Beside(s2, VERBS[verb], begin, stop)
    call, allowed = PARTS[part]
    call(s2, mask)
    beside.finish()
    s2._lock, s2._leaves._kernels = Lock(), vector
    found = s2.leaf_at(MASK)
    states = {pte.state(d, level or 3) for level, d in zip(found.level.tolist(), found.desc.tolist(), strict=True)}
    assert states <= allowed, f"escaped: {states - allowed}"
    lost = dirty - (mask | s2.dirty())
    assert not lost.any(), f"lost: {lost.ranges().tolist()}"
    untold = written - (s2.host_dirty | s2.dirty() | s2.writable())
    assert not untold.any(), f"the host doesn't know of {untold.ranges().tolist()[:3]}"
    s2.verify()
    return beside.steps


def check_all(part):
    for verb in VERBS:
        for stop in STOPS:
            begin, steps = -1, 0
            while begin < steps:
                steps = check(part, verb, begin, stop)
                begin += 1


@pytest.mark.parametrize("part", PARTS)
def test_leaves_that_move_between_the_passes_of_a_part(part):
    check_all(part)


MUTANTS = {
    "the pages are passed once": {"if self._splits != splits:": "if splits is None:"},
    "splits are counted from after the pages": {
        "tally = pages()": "tally, splits = pages(), self._splits",
    },
    "the count is read in the middle of a split": {
        "with self._lock:\n                splits": "if True:\n                splits"
    },
    "the pages are passed after the blocks, without the lock": {
        "tally = pages()": "splits = self._splits",
        "if self._splits != splits:": "if splits is None:",
        "sinks)\n        return tally": "sinks)\n        return tally + pages()",
    },
    "the blocks are passed without the lock": {
        "with self._lock:\n            tally +=": "if True:\n            tally +="
    },
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("mutant", MUTANTS)
def test_what_steps_between_finds_mistakes(monkeypatch, mutant, part):
    source = inspect.getsource(Stage2._protect_part)
    for old, new in MUTANTS[mutant].items():
        assert source.count(old) == 1
        source = source.replace(old, new)
    names = dict(vars(module))
    exec("if True:\n" + source, names)
    monkeypatch.setattr(Stage2, "_protect_part", names["_protect_part"])
    with pytest.raises(AssertionError, match=r"escaped|lost|know"):
        check_all(part)
