"""vCPUs in compiled code beside harvesters, and threads that change the tables: nothing is lost, mistakes are found.

`make stress` runs the same for minutes: HWDBM_STRESS is how many seconds the run of what is right takes.
"""

import os

import numpy as np
import pytest
from hardware import CONTROL, RUN, STOP, Stress, StressError, join, vcpu

SECONDS = float(os.environ.get("HWDBM_STRESS", "1.5"))
CAUGHT = 60  # seconds: in which each mistake must be found


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """Compile the vCPU, off the clock."""
    words, control = np.zeros(64, dtype=np.uint64), np.zeros(CONTROL, dtype=np.uint64)
    control[STOP] = 1
    vcpu(0, words, words, words, 0, words, control, 1, 1)


def test_nothing_is_lost():
    stress = Stress()
    stress.run(SECONDS)
    print(stress)
    assert min(stress.rounds) > 2


class Runs(Stress):
    """The host makes contiguous runs too: any one of a run's entries then records the writes to all."""

    def __init__(self, seed=1, dwell=300, **options):
        super().__init__(seed, dwell, shared=True, **{"contiguous": True, **options})
        self.run_up(self.base, self.npages)

    def verbs(self):
        return self.run_up, self.protect, self.run_up, self.split, self.run_up, self.unmap, self.collapse

    def run_up(self, gfn, npages):
        level3 = self.s2.level(3)
        for start in range(-(-gfn // RUN) * RUN, (gfn + npages) // RUN * RUN, RUN):
            join(level3, start - self.base)


def test_nothing_is_lost_of_contiguous_runs():
    stress = Runs()
    stress.run(SECONDS)
    print(stress)
    assert min(stress.rounds) > 2


class RunsAllTheWhile(Runs):
    """The host does nothing but make runs, of what the harvesters take apart."""

    def verbs(self):
        return (self.run_up,)


def test_nothing_is_lost_while_runs_are_made():
    stress = RunsAllTheWhile()
    stress.run(SECONDS / 2)
    print(stress)
    assert min(stress.rounds) > 2


def test_runs_taken_for_leaves_are_found_out():
    hunt(Runs, contiguous=False)


class NeverFlushes(Stress):
    def flush(self):
        pass


class FlushesFirst(Stress):
    """The flush comes before what it is for."""

    def send(self, out, lo, hi, turn):
        self.flush()
        self.take(out, lo, hi, turn)
        self.copy_out(out)


class CopiesFirst(Stress):
    """The copy comes before the flush."""

    def send(self, out, lo, hi, turn):
        self.take(out, lo, hi, turn)
        self.copy_out(out)
        self.flush()


# `make stress` has all of them.
@pytest.mark.parametrize(
    "mistake", [NeverFlushes, *(pytest.param(each, marks=pytest.mark.slow) for each in (FlushesFirst, CopiesFirst))]
)
def test_a_mistake_is_found(mistake):
    hunt(mistake)


def test_private_kernels_are_found_out():
    hunt(Stress, kernels="vector")


def hunt(kind, **options):
    stress = kind(**options)
    with pytest.raises(StressError):
        stress.run(CAUGHT)
    print(stress)
