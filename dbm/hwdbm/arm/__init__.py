"""An emulated Arm machine that runs: QEMU, with our firmware at EL2, and its stage-2 tables in RAM that we have too."""

from hwdbm.arm.board import Board, GuestCrashError, TablePlan
from hwdbm.arm.build import ArmUnavailableError
from hwdbm.arm.vm import ArmVm, GuestMemoryError

__all__ = ["ArmUnavailableError", "ArmVm", "Board", "GuestCrashError", "GuestMemoryError", "TablePlan"]
