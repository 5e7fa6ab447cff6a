"""Board: an emulated Arm machine that runs our firmware, and its doorbell."""

import ctypes
import fcntl
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from errno import EIO, ENODEV, ENOMEM, ETIMEDOUT
from threading import RLock
from types import TracebackType
from typing import Self, TypeVar

import numpy as np

from hwdbm import check
from hwdbm.arm.abi import (
    MAGIC,
    MAILBOX,
    RAM,
    SHARED,
    VCPUS,
    Command,
    GuestTask,
    Mailbox,
    Mapping,
    Shared,
    Vcpu,
    VcpuState,
)
from hwdbm.arm.build import ArmUnavailableError, firmware, tool
from hwdbm.errors import HwdbmError
from hwdbm.process import child
from hwdbm.vm.memory import GuestMemory
from hwdbm.vtcr import Vtcr, hafdbs

POOL, POOL_END = 0x4080_0000, 0x4480_0000
"""Where tables may lie."""

Structure = TypeVar("Structure", bound=ctypes.Structure)

_PLAN = 0x4042_0000
_BOOT = 60.0  # seconds that the machine has to come up
_ANSWER = 30.0  # seconds that it has for whatever it is asked
_SPIN = 2e-3  # seconds of looking without a pause, while an answer is most likely to come
_LOOK = 2e-4

# The shell ends QEMU when its own stdin does, which is our end of a pipe: however this process ends, QEMU ends too. A
# parent-death signal would come already when the thread ends that started it.
_GUARD = """exec 3<&0
"$@" </dev/null 3<&- &
qemu=$!
{ read -r _ <&3; kill -KILL $qemu; } 2>/dev/null &
guard=$!
wait $qemu
status=$?
kill $guard 2>/dev/null
exit $status"""


class GuestCrashError(HwdbmError, OSError):
    """A vCPU of the Arm machine took an exception that its guest has no handler for."""


@dataclass(frozen=True, slots=True)
class TablePlan:
    """The stage-2 tables that the firmware builds.

    Parameters
    ----------
    vtcr : Vtcr
        Their shape.
    mappings : tuple of Mapping
        What they map; a later one replaces entries of an earlier one.
    vmid : int
        The tag in the TLB.
    root : int
        Where the start level's tables are.
    tables : (n,) uint64 array, optional
        Where other tables go, in the order of their use; by default one after the other, behind the root.
    junk : int
        Invalid entries hold odd multiples of it, with bit 0 clear.
    table_bits : int
        Bits of table descriptors beside the address and the type.
    """

    vtcr: Vtcr
    mappings: tuple[Mapping, ...]
    vmid: int = 1
    root: int = POOL
    tables: np.ndarray[tuple[int], np.dtype[np.uint64]] | None = None
    junk: int = 0
    table_bits: int = 0

    @property
    def root_end(self) -> int:
        """Where the start level's tables end."""
        return self.root + self.vtcr.root_tables * self.vtcr.granule.page_size

    def places(self) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
        """Return where the tables below the start level go."""
        if self.tables is not None:
            return self.tables
        return np.arange(self.root_end, POOL_END, self.vtcr.granule.page_size, dtype=np.uint64)


class Board:
    """A machine: QEMU, RAM that this process has too, and the firmware at EL2.

    Parameters
    ----------
    ram : int
        Bytes of RAM. Nothing is backed until it is touched.
    plan : TablePlan
        The tables.
    vcpus : int
        vCPUs that run guests, 1 to 7; one more serves the doorbell.

    Attributes
    ----------
    ram : GuestMemory
        All of RAM, from `hwdbm.arm.abi.RAM` on.
    mailbox, shared : Mailbox, Shared
        Where the host and the machine meet. What is written there, the machine sees.

    Raises
    ------
    ArmUnavailableError
        If QEMU or the cross compiler isn't here.
    OSError
        If the machine doesn't come up.
    """

    def __init__(self, ram: int, plan: TablePlan, *, vcpus: int = 1) -> None:
        self.vcpus = check.integer(vcpus, "vcpus", 1, VCPUS)
        self.plan, self._lock = plan, RLock()
        self._files = ExitStack()
        try:
            qemu = tool(("qemu-system-aarch64",), "qemu-system-arm", "emulates the Arm machine")
            image = self._in_memory(firmware())
            self.ram = GuestMemory(check.integer(ram, "ram", POOL_END - RAM), "hwdbm-arm")
            self._files.callback(self.ram.close)
            self.mailbox = self.at(MAILBOX, Mailbox)
            self.shared = self.at(SHARED, Shared)
            self._lay()
            fd = self._inherited(self.ram.fd)
            self._log = self._files.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
            self._pipe = list(os.pipe())
            self._files.callback(self._unplug)
            machine = "virt,virtualization=on,gic-version=2,memory-backend=ram"
            backend = f"memory-backend-file,id=ram,size={ram},mem-path=/proc/self/fd/{fd},share=on"
            command = [
                *(qemu, "-M", machine, "-cpu", "max", "-accel", "tcg,thread=multi", "-smp", str(vcpus + 1)),
                *("-m", f"{ram >> 20}M", "-object", backend, "-kernel", f"/proc/self/fd/{image}"),
                *("-nodefaults", "-display", "none", "-no-reboot"),
            ]
            self._process = self._files.enter_context(
                child(
                    ["/bin/sh", "-c", _GUARD, "sh", *command],
                    grace=5.0,
                    stdin=self._pipe[0],
                    stdout=self._log,
                    stderr=self._log,
                    pass_fds=(fd, image),
                )
            )
            self._files.callback(self._unplug)  # before it is waited for
            self._boot()
        except BaseException:
            self.close()
            raise

    def _inherited(self, fd: int) -> int:
        """Return a descriptor for QEMU, of what another is of, until the board is closed."""
        fd = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10)  # the shell uses the numbers below
        self._files.callback(os.close, fd)
        return fd

    def _in_memory(self, data: bytes) -> int:
        """Return a descriptor for QEMU, of a file in memory."""
        with os.fdopen(os.memfd_create("hwdbm-firmware"), "wb") as file:
            file.write(data)
            file.flush()
            return self._inherited(file.fileno())

    def _boot(self) -> None:
        """Wait for the firmware, and have it build the tables."""
        self._wait("come up", lambda: self.mailbox.magic == MAGIC, _BOOT)
        sizes = ctypes.sizeof(Mailbox), ctypes.sizeof(GuestTask)
        if tuple(self.mailbox.sizes) != sizes:
            raise OSError(EIO, f"the firmware's structures have {tuple(self.mailbox.sizes)} bytes, not {sizes}")
        if hafdbs(self.mailbox.mmfr1) < 2:
            raise ArmUnavailableError(ENODEV, "QEMU's CPU has no hardware DBM: QEMU 7.2 or newer has it")
        self._ring(Command.BUILD)
        if self.mailbox.failed:
            raise OSError(
                ENOMEM, f"there are {self.mailbox.tables} tables, too few for ipa {self.mailbox.failed - 1:#x}"
            )

    def _lay(self) -> None:
        """Write the plan into RAM."""
        vtcr, box, plan = self.plan.vtcr, self.mailbox, self.plan
        if not plan.mappings:
            raise ValueError("a plan maps something")
        box.vcpus, box.vtcr, box.vttbr = self.vcpus, vtcr.encode(), plan.root | plan.vmid << 48
        box.root, box.root_tables, box.page_shift = plan.root, vtcr.root_tables, vtcr.granule.page_shift
        box.start_level = vtcr.start_level  # -1, too, in 64 bits
        box.junk, box.table_bits = plan.junk, plan.table_bits
        lines = (Mapping * len(plan.mappings))(*plan.mappings)
        self.write(_PLAN, bytes(lines))
        box.mappings, box.mappings_pa = len(lines), _PLAN
        places = plan.places()
        box.tables, box.tables_pa = places.size, _PLAN + len(bytes(lines))
        if box.tables_pa + 8 * places.size > POOL:
            raise ValueError(f"{len(lines)} mappings and {places.size} tables are too many for a plan")
        self.write(box.tables_pa, places.tobytes())
        self.shared.stop = 1

    # --- memory --------------------------------------------------------------------------------------------

    def write(self, pa: int, data: bytes) -> None:
        """Write to RAM."""
        self.ram.view[pa - RAM : pa - RAM + len(data)] = np.frombuffer(data, dtype=np.uint8)

    def at(self, pa: int, kind: type[Structure]) -> Structure:
        """Return the structure at an address of RAM: what is written to it is in RAM."""
        return kind.from_buffer(self.ram.view.data, pa - RAM)

    def vcpu(self, number: int) -> Vcpu:
        """Return a vCPU's registers, which may be written while it is paused."""
        found: Vcpu = self.mailbox.vcpu[number]
        return found

    @property
    def spare_tables(self) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
        """Where further tables may go."""
        return self.plan.places()[self.mailbox.used :]

    # --- the doorbell --------------------------------------------------------------------------------------

    def _ring(self, command: Command) -> None:
        with self._lock:  # whose release orders what was written before, also on a host that reorders stores
            self.mailbox.command = command
        with self._lock:
            rung = self.mailbox.doorbell + 1
            self.mailbox.doorbell = rung
            self._wait(command.name, lambda: self.mailbox.answered == rung, _ANSWER)

    def _wait(self, what: str, done: Callable[[], bool], seconds: float) -> None:
        start = time.monotonic()
        while not done():
            waited = time.monotonic() - start
            if waited > _SPIN:
                if self._process.poll() is not None:
                    raise OSError(EIO, f"the Arm machine ended (status {self._process.returncode}): {self._said()}")
                if waited > seconds:
                    raise OSError(ETIMEDOUT, f"the Arm machine didn't do this in {seconds:g} s: {what}; {self._said()}")
                time.sleep(_LOOK)

    def _said(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace").strip()[-500:] or "QEMU said nothing"

    def start(self) -> None:
        """Start the vCPUs: each goes to its guest's first instruction, and waits there."""
        with self._lock:
            self._ring(Command.START)
            self._wait("start its vCPUs", lambda: self._all(VcpuState.PAUSED), _BOOT)

    def flush(self) -> None:
        """Invalidate all of the guest's TLB entries, on all CPUs (TLBI VMALLS12E1IS).

        Raises
        ------
        OSError
            If the machine doesn't answer; nothing may be copied then.
        """
        self._ring(Command.FLUSH)

    def flush_range(self, ipa: int, size: int) -> None:
        """Do the same for a range: TLBI IPAS2E1IS for each page, DSB, TLBI VMALLE1IS, DSB."""
        with self._lock:
            self.mailbox.flush_ipa, self.mailbox.flush_size = ipa, size
            self._ring(Command.FLUSH_PAIR)

    # --- guests --------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Stop the vCPUs: none is inside of a store when this returns.

        Raises
        ------
        GuestCrashError
            If one has crashed. The others have stopped.
        OSError
            If they don't stop.
        """
        with self._lock:
            self.shared.stop = 1
            self._wait("stop its vCPUs", lambda: self._all(VcpuState.PAUSED, VcpuState.CRASHED), _ANSWER)
            self.check()

    def run(self) -> None:
        """Let the vCPUs run."""
        with self._lock:
            self.check()
            self.shared.stop = 0
            self._wait("run its vCPUs", lambda: self._all(VcpuState.RUNNING, VcpuState.CRASHED), _ANSWER)

    def _all(self, *states: VcpuState) -> bool:
        return all(self.mailbox.vcpu[number].state in states for number in range(self.vcpus))

    def check(self) -> None:
        """Raise `GuestCrashError` if a vCPU has crashed, and `OSError` if the machine has ended."""
        if self._process.poll() is not None:
            raise OSError(EIO, f"the Arm machine ended (status {self._process.returncode}): {self._said()}")
        for number in range(self.vcpus):
            vcpu = self.vcpu(number)
            if vcpu.state == VcpuState.CRASHED:
                raise GuestCrashError(
                    EIO, f"vCPU {number} crashed at {vcpu.pc:#x} (ESR_EL2 {vcpu.fault_esr:#x}, ELR_EL1 {vcpu.elr:#x})"
                )

    def faults(self) -> str:
        """Return what is to be said of stage-2 faults that the vCPUs took, nothing if there were none."""
        text = ""
        for number in range(self.vcpus):
            vcpu = self.vcpu(number)
            if vcpu.faults:
                text += (
                    f"; vCPU {number} faulted {vcpu.faults} times, last at ipa {vcpu.fault_ipa:#x} "
                    f"(ESR_EL2 {vcpu.fault_esr:#x})"
                )
        return text

    # --- the end -------------------------------------------------------------------------------------------

    def _unplug(self) -> None:
        while self._pipe:
            os.close(self._pipe.pop())

    def close(self) -> None:
        """End the machine. Views of its RAM that others hold stay valid."""
        self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
