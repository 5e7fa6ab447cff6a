"""The modelled machine: guest memory, vCPUs with TLBs, hardware updates, faults, and workloads.

`Machine` is what programs use. The modules of this package are its parts: `vcpu` with its `tlb` and the `mmu` that
walks for it, `faults` and what they are resolved with (`guestlog`, `frames`, `blocks`), memory behind `region`s of an
address `space`, the `workload`s that a `runner` runs, the `clock`, and `reference`, the slow vCPU that the fast one is
compared with.
"""

from hwdbm.machine.blocks import Blocks
from hwdbm.machine.clock import Clock, Costs, Reading
from hwdbm.machine.machine import Machine
from hwdbm.machine.reference import ReferenceVCpu
from hwdbm.machine.replay import Replay
from hwdbm.machine.vcpu import VCpu
from hwdbm.machine.workload import WORKLOADS, Bursty, HotSet, Idle, Sequential, Uniform, Workload, Zipf, parse
from hwdbm.vm.memory import GuestMemory

__all__ = [
    "WORKLOADS",
    "Blocks",
    "Bursty",
    "Clock",
    "Costs",
    "GuestMemory",
    "HotSet",
    "Idle",
    "Machine",
    "Reading",
    "ReferenceVCpu",
    "Replay",
    "Sequential",
    "Uniform",
    "VCpu",
    "Workload",
    "Zipf",
    "parse",
]
