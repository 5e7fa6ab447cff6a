"""An emulated Arm machine that runs: QEMU, with our firmware at EL2, and its stage-2 tables in RAM that we have too."""

from hwdbm.arm.board import Board, GuestCrashError, Plan
from hwdbm.arm.build import ArmUnavailableError

__all__ = ["ArmUnavailableError", "Board", "GuestCrashError", "Plan"]
