"""A signal's handler that raises at any moment: no bit is lost, no page stays held, no flush is forgotten.

An interval timer interrupts the verbs of a log, of its leases and of the machine, thousands of times, wherever Python
happens to be. A guest's memory says afterwards whether the log says enough.
"""

import gc
import random
import signal
import sys
import time
from contextlib import contextmanager, suppress
from itertools import product

import numpy as np
import pytest
from effort import EFFORT
from logtools import make

from hwdbm import pte, walker
from hwdbm.errors import StaleLeaseError
from hwdbm.machine import Machine

pytestmark = [
    pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no interval timer"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

BASE, NPAGES = 0x200, 1100


@pytest.fixture(autouse=True)
def no_lease_is_left():
    """Have what was forgotten in a cycle warn here, where that is ignored."""
    yield
    gc.collect()


class Interrupted(BaseException):
    pass


@contextmanager
def interrupts():
    """Yield a function that calls another with a signal on its way, and returns whether that came."""

    armed = []

    def raises(*_):
        if armed:  # another thread may have got the signal, and this one hear of it late
            armed.clear()
            raise Interrupted

    def call(verb, seconds):
        try:
            try:
                armed.append(True)
                signal.setitimer(signal.ITIMER_REAL, seconds)
                verb()
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
                armed.clear()
        except Interrupted:
            return True
        return False

    # pytest's own hook would keep what a finalizer raised, and with it the lease.
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    before = signal.signal(signal.SIGALRM, raises)
    try:
        yield call
    finally:
        sys.unraisablehook = hook
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Guest:
    """A log, a guest that writes through a TLB, and a consumer whose copies are compared with the guest's memory."""

    def __init__(self, hw, manual, step, workers, seed):
        self.choose, self.fails, self.owed = random.Random(seed), False, None
        self.tlb = np.zeros(NPAGES, dtype=bool)
        self.memory, self.copied = np.zeros(NPAGES, np.int64), np.zeros(NPAGES, np.int64)
        self.log = make(
            NPAGES, base=BASE, flags=0, hw_dbm=hw, manual_protect=manual, step_pages=step, workers=workers,
            flush=self.flush, ipa_bits=40,
        )  # fmt: skip
        self.log.map(0, BASE, 512, 0, level=2)
        self.log.map(0, BASE + 512, NPAGES - 512, 512)
        self.region(1)
        self.backup, self.backed = self.log.client("backup"), self.memory.copy()

    def region(self, flags, base=BASE):
        self.log.set_memory_region(0, flags, base << 12, NPAGES << 12, 0)

    def flush(self, _slot, first, npages):
        if self.fails and self.choose.random() < 0.3:
            raise ConnectionError
        self.tlb[first : first + npages] = False

    def write(self, page):
        """Write a page as a vCPU does. A block in the TLB is there as its pages."""
        if not self.tlb[page]:
            s2 = self.log.stage2(0)
            gfn = s2.base_gfn + page
            for _ in range(4):
                access = walker.guest_write(s2, gfn, hd=self.log.hw_dbm)
                if access is walker.Access.DONE:
                    break
                if access is walker.Access.TRANSLATION:
                    self.log.map(0, gfn, 1, page)
                else:
                    self.log.write_fault(0, gfn)
            else:
                raise AssertionError(f"page {page} faults for ever")
            self.tlb[page] = True
        self.memory[page] += 1

    def writes(self, count=6):
        for _ in range(count):
            self.write(self.choose.randrange(NPAGES))

    def copy(self, pages):
        self.copied[pages] = self.memory[pages]

    def get(self):
        if self.log.manual_protect:
            got = self.log.get_dirty_log(0)
            with self.log.clear_dirty_log(0, 0, NPAGES, got, lease=True) as lease:
                self.copy(lease.bitmap.pages())
        else:
            # Only where the bitmap has arrived are its pages the consumer's.
            got = self.log.get_dirty_log(0)
            self.owed = got

    def settle(self):
        """Copy what a GET without a lease has given, now that nothing interrupts."""
        if self.owed is not None:
            self.copy(self.owed.pages())
            self.owed = None

    def lease(self):
        with self.log.lend(0) as lease:
            self.copy(lease.bitmap.pages())

    def forget(self):
        self.log.lend(0)

    def fail(self):
        with suppress(ZeroDivisionError), self.log.lend(0):
            1 / 0  # noqa: B018 - the copy fails

    def client(self):
        with self.log.client("test") as client, client.take(0) as lease:
            self.copy(lease.bitmap.pages())

    def take(self):
        with self.backup.take(0) as lease:
            pages = lease.bitmap.pages()
            self.backed[pages] = self.memory[pages]

    def take_and_forget(self):
        self.backup.take(0)

    def take_and_fail(self):
        with suppress(ZeroDivisionError), self.backup.take(0):
            1 / 0  # noqa: B018 - the copy fails

    def unmap(self):
        slot = self.log.slot(0)
        self.log.unmap(0, slot.base_gfn + self.choose.randrange(NPAGES - 40), 40)

    def move(self):
        self.region(1, BASE + self.choose.choice([0, 7, 512]))

    def switch(self):
        self.log.set_hw_dirty_log(not self.log.hw_dbm)

    def fault(self):
        slot = self.log.slot(0)
        page = self.choose.randrange(NPAGES)
        self.log.write_fault(0, slot.base_gfn + page, page)

    def mark(self):
        self.log.mark_dirty(0, self.choose.randrange(NPAGES), 1)

    def sync(self):
        self.log.sync(0)

    def host(self):
        self.log.take_host_dirty(0)

    def verbs(self):
        return [
            self.get, self.lease, self.forget, self.fail, self.client, self.unmap, self.move, self.switch, self.fault,
            self.mark, self.sync, self.host, self.writes, self.log.verify, self.take, self.take_and_forget,
            self.take_and_fail,
        ]  # fmt: skip

    def warm(self):
        """Have each kernel loaded: numba must not be interrupted in that."""
        for _ in range(2):
            for verb in self.verbs():
                self.writes()
                verb()
                self.settle()
        self.check()
        return self.verbs()

    def check(self):
        """Nothing is held, and a GET of what is left makes the copy whole."""
        found = self.log._slots[0]
        assert len(found._lock) == 0, "a range is held"
        self.settle()
        slot = self.log.slot(0)
        assert self.log.memslots == (slot,)
        self.log.verify()
        for _ in range(200):
            with self.log.lend(0) as lease:
                self.copy(lease.bitmap.pages())
            left = np.flatnonzero(self.copied != self.memory)
            if not left.size:
                break
            time.sleep(0.001)  # a worker's last reference to a lease goes a moment after its last step
        assert not left.size, f"lost writes to pages {left[:9].tolist()}"
        for _ in range(200):
            self.take()
            left = np.flatnonzero(self.backed != self.memory)
            if not left.size:
                break
            time.sleep(0.001)
        assert not left.size, f"the client lost writes to pages {left[:9].tolist()}"
        assert not self.tlb[self.clean()].any(), "a TLB lets the guest write clean pages: a flush was forgotten"
        assert not found.flush_is_due

    def clean(self):
        s2 = self.log.stage2(0)
        return (~(s2.scan(pte.writable))).pages()


# Of each pair of options each combination; all of three, and threads, are among the slow ones.
PAIRS = {(True, False, None, 1), (True, True, 64, 1), (False, False, 64, 1), (False, True, None, 1)}


@pytest.mark.parametrize(
    ("hw", "manual", "step", "workers"),
    [
        pytest.param(*each, marks=() if each in PAIRS else pytest.mark.slow)
        for each in product((True, False), (False, True), (None, 64), (1, 2))
    ],
)
def test_signals_at_random(kernels, hw, manual, step, workers):
    guest = Guest(hw, manual, step, workers, seed=1)
    came, verbs = 0, guest.warm()
    with interrupts() as call:
        for turn in range(12 * EFFORT):
            for _ in range(4):
                guest.writes(3)
                verb = guest.choose.choice(verbs)
                came += call(verb, guest.choose.expovariate(1 / 2e-4) + 1e-6)
                guest.settle()
            guest.check()
            assert turn < 10 or came, "no signal came: the test tests nothing"


def test_signals_and_flushes_that_fail(kernels):
    guest = Guest(hw=True, manual=False, step=None, workers=1, seed=2)
    verbs = guest.warm()
    with interrupts() as call:
        for _ in range(40 * EFFORT):
            guest.fails = True
            for _ in range(3):
                try:
                    guest.writes(3)
                    call(guest.choose.choice(verbs), guest.choose.expovariate(1 / 2e-4) + 1e-6)
                except (ConnectionError, StaleLeaseError):
                    pass
                guest.settle()
            guest.fails = False
            guest.check()


@pytest.mark.parametrize("hw", [True, False])
@pytest.mark.alike(2)
def test_signals_in_the_machine(hw):
    choose = random.Random(3)
    with Machine(hw_dbm=hw, tlb_entries=300) as machine, interrupts() as call:
        machine.add_memslot(NPAGES << 12, BASE << 12)
        machine.start_log()
        copied = machine.memory(0).copy()

        def store():
            gpas = (BASE << 12) + np.array([choose.randrange(NPAGES) for _ in range(9)]) * 4096
            machine.vcpus[0].store(gpas, np.array([choose.getrandbits(60) for _ in gpas], dtype=np.uint64))

        def take():
            with machine.dirty(0) as lease:
                pages = lease.bitmap.pages()
                copied.reshape(-1, 4096)[pages] = machine.memory(0).reshape(-1, 4096)[pages]

        def part():
            return choose.randrange(NPAGES - 30), 30

        verbs = [
            store, take, store, take,
            lambda: machine.share(0, *part()),
            lambda: machine.reclaim(0, *part()),
            lambda: machine.split(0),
            lambda: machine.write((BASE + choose.randrange(NPAGES - 1) << 12) + 4000, choose.randbytes(99)),
            lambda: machine.set_hw_dirty_log(not machine.log.hw_dbm),
        ]  # fmt: skip
        for verb in verbs * 2:
            verb()
        for _ in range(60 * EFFORT):
            for _ in range(4):
                store()
                call(choose.choice(verbs), choose.expovariate(1 / 3e-4) + 1e-6)
            machine.set_hw_dirty_log(machine.log.hw_dbm)
            take()
            assert (copied == machine.memory(0)).all(), "lost writes"
            machine.verify()


def test_a_bitmap_that_arrived_is_all_there_is_of_it():
    """GET without a lease: the pages are the caller's, or the log's still."""
    log = make(200)
    with interrupts() as call:
        for turn in range(150 * EFFORT):
            log.mark_dirty(0, 7)
            got = []

            def get(got=got):
                got.append(log.get_dirty_log(0))

            call(get, turn % 100 * 1e-6 + 1e-6)
            rest = log.get_dirty_log(0)
            assert 7 in rest or 7 in got[0], "the page is nobody's"
            assert len(log._slots[0]._lock) == 0
