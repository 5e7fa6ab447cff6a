"""A real guest: ``/dev/kvm`` driven from Python, as a source of migrations and as the judge of the dirty log.

`KvmVm` is what programs use. The modules of this package are its parts: `abi`, the kernel's interface in one table;
`ioctl`, `device` and `vcpu`, its file descriptors with one method a request; `ring` and `log`, the dirty log in its
three forms; the `guest`s with their machine code (`guest_x86`, `guest_arm64`) and what a
`task` is; the `thread` that a vCPU runs in; and the `state` that a migration carries.
"""

from hwdbm.errors import GuestExitError, KvmUnavailableError, PatternError
from hwdbm.kvm.device import Kvm, VmFd
from hwdbm.kvm.vcpu import VcpuFd
from hwdbm.kvm.vm import KvmVm

__all__ = ["GuestExitError", "Kvm", "KvmUnavailableError", "KvmVm", "PatternError", "VcpuFd", "VmFd"]
