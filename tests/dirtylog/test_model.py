"""The dirty log against a model of KVM's rules, with a guest, a TLB, a host, and a consumer that fails."""

import pytest
from effort import EFFORT
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test
from logmachine import BlockMachine, ClientMachine, LogMachine

LONG = settings(
    max_examples=15 * EFFORT, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.parametrize("machine", [LogMachine, BlockMachine])
@pytest.mark.alike(2)
def test_machine(machine, kernels):
    run_state_machine_as_test(machine, settings=LONG)


@pytest.mark.filterwarnings("default::ResourceWarning")
def test_clients(kernels):
    run_state_machine_as_test(ClientMachine, settings=settings(LONG, max_examples=10 * EFFORT))
