"""The two that are asked: a VM of this machine's KVM, and the model. Each answers a call with 0, an errno, or runs."""

import ctypes
import mmap
import os
import platform
from contextlib import suppress
from dataclasses import dataclass
from errno import EFAULT, EINVAL

import numpy as np
from kvm_calls import ARENA, PAGE, Answer, Call, Clear, Get, Limits, Protect2, Region, Write, to_runs, to_words

from hwdbm import DirtyLog, Memslot, walker
from hwdbm.kvm import Kvm
from hwdbm.kvm.abi import MSR_KVM_WALL_CLOCK_NEW, STRUCTS, Cap, Ioctl
from hwdbm.walker import Access


@dataclass(frozen=True, slots=True)
class Mode:
    """PROTECT2 when the VM begins."""

    name: str
    bits: int

    @property
    def manual(self) -> bool:
        return bool(self.bits & 1)

    @property
    def initially_set(self) -> bool:
        return bool(self.bits & 2)


MODES = (Mode("off", 0), Mode("manual", 1), Mode("initially-set", 3))


class Side:
    """Whoever answers calls."""

    def answer(self, call: Call) -> Answer:
        try:
            match call:
                case Region():
                    self.region(call)
                case Write():
                    self.write(call.gpa)
                case Get():
                    return self.get(call.slot)
                case Clear():
                    self.clear(call)
                case Protect2():
                    self.protect2(call.bits)
        except OSError as error:
            return error.errno
        return 0

    def close(self) -> None:
        pass


class Memory:
    """What this process gives the kernel: the backing of slots, and words behind which nothing is mapped.

    Who reads or writes a byte too many there gets EFAULT.
    """

    SIZE = 4 * mmap.PAGESIZE

    def __init__(self) -> None:
        self._arena, self._words = mmap.mmap(-1, ARENA), mmap.mmap(-1, self.SIZE + mmap.PAGESIZE)
        self.arena = ctypes.addressof(ctypes.c_char.from_buffer(self._arena))
        self.end = end = ctypes.addressof(ctypes.c_char.from_buffer(self._words)) + self.SIZE
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mprotect(ctypes.c_void_p(end), ctypes.c_size_t(mmap.PAGESIZE), 0):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def words(self, count: int) -> np.ndarray:
        """The last words before the end."""
        return np.frombuffer(self._words, np.uint64, count, self.SIZE - 8 * count) if count else np.zeros(0, np.uint64)


class KernelSide(Side):
    """A VM of the kernel, with one vCPU that never runs."""

    def __init__(self, kvm: Kvm, mode: Mode, memory: Memory) -> None:
        self._memory, self._npages = memory, dict[int, int]()
        self._vm = kvm.create_vm()
        self._vcpu = self._vm.create_vcpu(0)
        if mode.bits:
            self.protect2(mode.bits)

    def close(self) -> None:
        self._vcpu.close()
        self._vm.close()

    def region(self, call: Region) -> None:
        hva = call.hva + self._memory.arena if call.hva < ARENA else call.hva
        self._vm.set_memory_region(
            slot=call.slot,
            flags=call.flags,
            guest_phys_addr=call.gpa,
            memory_size=call.size,
            userspace_addr=hva,
        )
        self._npages[call.slot] = call.size // PAGE

    def write(self, gpa: int) -> None:
        self._vcpu.set_msr(MSR_KVM_WALL_CLOCK_NEW, gpa)

    def get(self, slot: int) -> tuple[int, ...]:
        # As many words as there must be, and ones in them: a word too few would show, and one too many be EFAULT.
        words = self._memory.words(self._npages.get(slot, 0) + 63 >> 6)
        words[:] = ~np.uint64(0)
        self._vm.get_dirty_log(slot, words)
        return to_runs(words)

    def clear(self, call: Clear) -> None:
        words = self._memory.words(call.words)
        words[:] = to_words(call.mask, call.words)
        if call.words >= call.pages + 63 >> 6:
            self._vm.clear_dirty_log(call.slot, call.first, call.pages, words)
        else:  # the method would refuse
            address = self._memory.end - words.nbytes
            asked = STRUCTS["kvm_clear_dirty_log"].pack(call.slot, call.pages, call.first, address)
            self._vm._call(Ioctl.KVM_CLEAR_DIRTY_LOG, bytearray(asked))

    def protect2(self, bits: int) -> None:
        self._vm.enable_cap(Cap.MANUAL_DIRTY_LOG_PROTECT2, bits)


def limits_of(kvm: Kvm) -> Limits:
    """Return this kernel's limits. How far addresses go, x86 has no capability to say: slots are tried at each end."""
    with kvm.create_vm() as vm:
        found = 0
        for bits in range(36, 53):
            last = {"slot": 0, "flags": 0, "guest_phys_addr": (1 << bits) - PAGE, "userspace_addr": PAGE}
            try:
                vm.set_memory_region(memory_size=PAGE, **last)
                vm.set_memory_region(memory_size=0, **last)
            except OSError:
                break
            found = bits
        return Limits(
            arch=platform.machine(),
            nr_memslots=vm.check_extension(Cap.NR_MEMSLOTS),
            address_spaces=max(vm.check_extension(Cap.MULTI_ADDRESS_SPACE), 1),  # 0: it has never heard of several
            gpa_bits=found,
        )


BACKINGS = ("hardware", "write-protect", "switching")
"""How the model learns of writes: hardware DBM, faults, and each for a few calls in turn."""


class ModelSide(Side):
    """The model, and a vCPU with a TLB that writes through its leaves."""

    def __init__(self, limits: Limits, mode: Mode, backing: str, *, syncs: bool = True) -> None:
        self._limits, self._syncs = limits, syncs
        self._switching, self._calls = backing == "switching", 0
        self._tlb: set[int] = set()  # guest frames that the vCPU may write without asking again
        self.log = DirtyLog(
            hw_dbm=backing != "write-protect",
            manual_protect=mode.manual,
            initially_set=mode.initially_set,
            step_pages=64 if self._switching else None,
            ipa_bits=limits.gpa_bits,
            address_spaces=limits.address_spaces,
            slot_limit=limits.nr_memslots,
            flush=self._flush,
        )

    def answer(self, call: Call) -> Answer:
        self._calls += 1
        if self._switching and self._calls % 5 == 0:
            self.log.set_hw_dirty_log(not self.log.hw_dbm)
        return super().answer(call)

    def region(self, call: Region) -> None:
        hva = call.hva + (1 << 40) if call.hva < ARENA else call.hva
        try:
            self.log.set_memory_region(call.slot, call.flags, call.gpa, call.size, hva)
        except OSError as error:
            # The model is arm64's. x86 has the other errno, in its own kvm_arch_prepare_memory_region.
            if error.errno == EFAULT and self._limits.arch == "x86_64":
                raise OSError(EINVAL, error.strerror) from error
            raise

    def get(self, slot: int) -> tuple[int, ...]:
        return to_runs(self.log.get_dirty_log(slot).words)

    def clear(self, call: Clear) -> None:
        # KVM syncs what hardware recorded before it clears (kvm_arch_sync_dirty_log); the model leaves that to callers.
        if self._syncs:
            with suppress(OSError):
                self.log.sync(call.slot)
        self.log.clear_dirty_log(call.slot, call.first, call.pages, to_words(call.mask, call.words))

    def protect2(self, bits: int) -> None:
        if bits & 1:
            self.log.enable_manual_protect(initially_set=bool(bits & 2))
        else:  # the model has no way to say INITIALLY_SET alone, but when it is made
            DirtyLog(initially_set=bool(bits & 2))

    # --- what the guest does -----------------------------------------------------------------------------

    def write(self, gpa: int) -> None:
        """What kvm_write_wall_clock does: it reads 4 bytes, writes 4, all 12, and 4 again, as far as it gets."""
        if gpa and self.access(gpa, 4, self.load) and self.access(gpa, 4, self.store):
            self.access(gpa, 12, self.store)
            self.access(gpa, 4, self.store)

    def access(self, gpa: int, length: int, how) -> bool:
        """Go from page to page until one can't be reached, as kvm_read_guest and kvm_write_guest do."""
        return all(how(gfn) for gfn in range(gpa // PAGE, (gpa + length - 1) // PAGE + 1))

    def load(self, gfn: int) -> bool:
        slot = self._at(gfn)
        if slot is None:
            return False
        if walker.guest_read(self.log.stage2(slot.id), gfn) is Access.TRANSLATION:
            self._map(slot, gfn)
        return True

    def store(self, gfn: int) -> bool:
        slot = self._at(gfn)
        if slot is None or slot.readonly:
            return False
        for _ in range(4):
            if gfn in self._tlb:
                return True
            access = walker.guest_write(self.log.stage2(slot.id), gfn, hd=self.log.hw_dbm)
            if access is Access.DONE:
                self._tlb.add(gfn)
            elif access is Access.TRANSLATION:
                self._map(slot, gfn)
            else:
                self.log.write_fault(slot.id, gfn)
        raise AssertionError(f"gfn {gfn:#x} faults for ever: {access}")

    def _at(self, gfn: int) -> Memslot | None:
        slots = (slot for slot in self.log.memslots if not slot.as_id)  # vCPUs in SMM use the other
        return next((slot for slot in slots if slot.base_gfn <= gfn < slot.end_gfn), None)

    def _map(self, slot: Memslot, gfn: int) -> None:
        self.log.map(slot.id, gfn, 1, 0x1000 + gfn - slot.base_gfn)

    def _flush(self, slot: Memslot, first_page: int, npages: int) -> None:
        first = slot.base_gfn + first_page
        self._tlb = {gfn for gfn in self._tlb if not first <= gfn < first + npages}
