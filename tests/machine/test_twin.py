"""The bulk vCPU does what the scalar reference does, and neither loses a write."""

import pytest
from effort import EFFORT
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from vmmachine import GuestMachine, TwinMachine

from hwdbm.machine import Blocks

FEW = settings(
    max_examples=40,
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.reuse, Phase.generate],  # megabytes an example: to shrink one takes minutes
)


class BlockTwin(TwinMachine):
    thp, sizes = True, (1024, 1100)


class SplitTwin(BlockTwin):
    hw, policy = True, Blocks.WRITE


@pytest.mark.parametrize("machine", [TwinMachine, BlockTwin, SplitTwin])
@pytest.mark.alike(2)
def test_the_bulk_vcpu_is_the_reference_at_speed(machine):
    run_state_machine_as_test(machine, settings=settings(FEW, max_examples=6 * EFFORT))


def test_no_write_is_lost():
    run_state_machine_as_test(GuestMachine, settings=settings(FEW, max_examples=15 * EFFORT, stateful_step_count=25))
