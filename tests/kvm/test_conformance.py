"""The kernel judges the model: random calls to both, and every answer must be equal."""

import ctypes
from contextlib import closing
from errno import EFAULT
from pathlib import Path

import numpy as np
import pytest
from effort import EFFORT
from hypothesis import HealthCheck, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from kvm_calls import PAGE, Drawing, Get, Region, Tally, Write
from kvm_record import MODES, load
from kvm_sides import BACKINGS, KernelSide, Memory, ModelSide, limits_of

from hwdbm.kvm import abi

EXAMPLES = 15 * EFFORT  # VMs, in each mode
RANDOM = st.randoms(use_true_random=False)


@pytest.fixture
def judge(kvm):
    """KVM, where it can be made to write the guest's memory."""
    if not kvm.arch.msrs:
        pytest.skip(f"{kvm.arch.machine} has no MSR that makes KVM write the guest's memory")
    return kvm


@pytest.fixture(scope="module")
def memory():
    return Memory()


class Conformance(RuleBasedStateMachine):
    """The rules draw calls; what both have answered so far shapes the next ones."""

    mode = kvm = memory = limits = tally = None

    def __init__(self):
        super().__init__()
        self.drawing = Drawing(self.limits)
        self.kernel = KernelSide(self.kvm, self.mode, self.memory)
        self.models = {backing: ModelSide(self.limits, self.mode, backing) for backing in BACKINGS}
        self.tally.begin()

    def ask(self, call):
        answer = self.kernel.answer(call)
        note(f"{call} -> {answer}")
        for backing, model in self.models.items():
            got = model.answer(call)
            assert got == answer, f"{call}: the kernel answers {answer}, and the model with {backing} {got}"
        self.tally.add(call, answer)
        self.drawing.learn(call, answer)

    @initialize(random=RANDOM, times=st.integers(1, 4))
    def begin(self, random, times):
        for _ in range(times):
            self.ask(self.drawing.new(random))

    @rule(random=RANDOM)
    def new(self, random):
        self.ask(self.drawing.new(random))

    @precondition(lambda self: self.drawing.slots)
    @rule(random=RANDOM)
    def change(self, random):
        self.ask(self.drawing.change(random))

    @rule(random=RANDOM)
    def odd(self, random):
        self.ask(self.drawing.odd(random))

    @precondition(lambda self: self.drawing.slots)
    @rule(random=RANDOM, times=st.integers(1, 6))
    def write(self, random, times):
        for _ in range(times):
            self.ask(self.drawing.write(random))

    @precondition(lambda self: self.drawing.slots)
    @rule(random=RANDOM)
    def get(self, random):
        self.ask(self.drawing.get(random))

    @precondition(lambda self: self.drawing.slots)
    @rule(random=RANDOM)
    def clear(self, random):
        self.ask(self.drawing.clear(random))

    @precondition(lambda self: self.drawing.slots)
    @rule(random=RANDOM)
    def write_get_clear(self, random):
        """What a migration does, in one go."""
        self.write(random, 3)
        self.ask(self.drawing.get(random))
        self.ask(self.drawing.clear(random))
        self.ask(self.drawing.get(random))

    def teardown(self):
        try:
            for slot in sorted(self.drawing.slots):
                self.ask(Get(slot))
            for model in self.models.values():
                model.log.verify()
        finally:
            self.kernel.close()


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
@pytest.mark.alike(2)
def test_the_kernel_and_the_model_answer_alike(judge, memory, mode):
    limits = limits_of(judge)
    tally = Tally(limits)
    drawn = {"mode": mode, "kvm": judge, "memory": memory, "limits": limits, "tally": tally}
    machine = type("Conformance", (Conformance,), drawn)
    often = settings(
        max_examples=EXAMPLES, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
    )
    run_state_machine_as_test(machine, settings=often)
    print(f"PROTECT2 {mode.name}\n{tally.table()}")


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_the_recording_is_what_this_kernel_answers(judge, memory, mode):
    """With other limits some answers are others; there the model, told of them, is compared with instead."""
    recording, limits = load(mode), limits_of(judge)
    for number, sequence in enumerate(recording.sequences):
        model = ModelSide(limits, mode, "hardware")
        with closing(KernelSide(judge, mode, memory)) as kernel:
            for call, recorded in sequence:
                want = recorded if limits == recording.limits else model.answer(call)
                got = kernel.answer(call)
                assert got == want, f"VM {number}, {call}: expected {want}, and this kernel answers {got}"


def test_limits_are_the_architectures(judge):
    limits = limits_of(judge)
    assert limits.arch == abi.arch().machine
    assert limits.nr_memslots == 32764  # SHRT_MAX, but three that x86 keeps for itself
    assert 36 <= limits.gpa_bits <= 52


def test_memory_ends_where_it_says(memory):
    """Otherwise a word that the kernel read or wrote too much would go unnoticed."""
    beyond = (ctypes.c_char * 16).from_address(memory.end - 8)
    with Path("/dev/zero").open("rb", buffering=0) as zeros:
        assert zeros.readinto(beyond) == 8


def test_a_get_whose_copy_fails_has_taken_the_bits(judge, memory):
    """Why the model has leases. It has no address to copy to, so that this can't be asked of both."""
    with closing(KernelSide(judge, MODES[0], memory)) as kernel:
        for call in (Region(0, 1, 0x10000, 64 * PAGE, 0), Write(0x10000), Write(0x13000)):
            assert kernel.answer(call) == 0
        nowhere = np.frombuffer((ctypes.c_char * 8).from_address(memory.end), np.uint64)
        with pytest.raises(OSError, match="KVM_GET_DIRTY_LOG") as caught:
            kernel._vm.get_dirty_log(0, nowhere)
        assert caught.value.errno == EFAULT
        assert kernel.answer(Get(0)) == ()
