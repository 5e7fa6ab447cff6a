"""The dirty ring: the kernel names each page that is written, in a queue of the vCPU's that is mapped here.

An entry's flags are 0, then `DIRTY` when the kernel has filled it, then `RESET` when it was read here, and 0 again when
``KVM_RESET_DIRTY_RINGS`` has protected the page anew. The kernel writes slot and offset and then, as a release, the
flags; so a reader must see the flags first. What is read here is first the flags of many entries, by one call, and
the rest by another, so that neither the interpreter nor a compiler reorders them. The processor may: x86 keeps loads in
order, and each before the stores that follow it (TSO), arm64 doesn't. There `fence` has the kernel do a full barrier
in this thread, since Python has none. The other direction, from `RESET` to the kernel, needs nothing: the request
is made by the same thread after it.
"""

import mmap
from collections.abc import Iterator, Sequence
from errno import EINTR, EINVAL, EIO, ENOTSUP, EOVERFLOW
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from hwdbm.kvm import abi
from hwdbm.kvm.abi import DIRTY_GFN_F_DIRTY, DIRTY_GFN_F_RESET, Cap
from hwdbm.kvm.device import VmFd
from hwdbm.kvm.ioctl import fence
from hwdbm.kvm.vcpu import VcpuFd

GFN = np.dtype([("flags", "<u4"), ("slot", "<u4"), ("offset", "<u8")])
"""``struct kvm_dirty_gfn``: the slot's id, and the page, counted from the slot's first."""


def enable_ring(vm: VmFd, entries: int) -> bool:
    """Have a VM's vCPUs log to rings, those that are created from now on.

    Parameters
    ----------
    vm : VmFd
        A VM without vCPUs.
    entries : int
        Entries of each ring: a power of two, a page at least, and more than the kernel reserves (64, or 576 where the
        processor has a buffer of its own).

    Returns
    -------
    bool
        Whether there is a bitmap beside the rings, for writes that no vCPU made
        (``KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP``). There are no such writes where the kernel doesn't offer it.

    Raises
    ------
    OSError
        ENOTSUP if the kernel has no rings, EINVAL or E2BIG if it takes no such size.
    """
    least = mmap.PAGESIZE // GFN.itemsize
    if entries < least or entries.bit_count() > 1:
        raise OSError(EINVAL, f"a ring has a power of two of entries, {least} or more, not {entries}")
    for cap in abi.arch().ring_caps:
        if vm.check_extension(cap):
            vm.enable_cap(cap, entries * GFN.itemsize)
            break
    else:
        raise OSError(ENOTSUP, "this kernel has no dirty ring")
    with_bitmap = bool(vm.check_extension(Cap.DIRTY_LOG_RING_WITH_BITMAP))
    if with_bitmap:
        vm.enable_cap(Cap.DIRTY_LOG_RING_WITH_BITMAP)
    return with_bitmap


class DirtyRing:
    """One vCPU's ring.

    Parameters
    ----------
    vcpu : VcpuFd
        Of a VM with rings.
    entries : int
        As `enable_ring` was given.

    Notes
    -----
    Only one thread may use it at a time.
    """

    def __init__(self, vcpu: VcpuFd, entries: int) -> None:
        where = abi.arch().ring_page_offset * mmap.PAGESIZE
        self._map = mmap.mmap(vcpu.fd, entries * GFN.itemsize, offset=where)
        self._entries: NDArray[np.void] = np.frombuffer(self._map, dtype=GFN)
        self._next = 0

    def take(self) -> NDArray[np.void]:
        """Return the entries that are dirty, in their order, and mark them as read.

        Returns
        -------
        (n,) array of GFN
            A copy. The pages are logged again after `VmFd.reset_dirty_rings`, and may be copied only then.

        Raises
        ------
        OSError
            EOVERFLOW if there is no entry that isn't dirty. The kernel has the vCPU exit well before that; where it
            doesn't, it overwrites entries that were not read, and nothing in the ring can be trusted any more.
        """
        parts = []
        for part in (self._entries[self._next :], self._entries[: self._next]):
            waiting = part["flags"] == DIRTY_GFN_F_DIRTY
            count = part.size if waiting.all() else int(waiting.argmin())
            fence()
            parts.append(part[:count].copy())
            fence()  # the kernel may fill an entry again once it is reset
            part["flags"][:count] = DIRTY_GFN_F_RESET
            if count < part.size:
                break
        taken = np.concatenate(parts)
        if taken.size == self._entries.size:
            raise OSError(EOVERFLOW, f"all {taken.size} entries of a dirty ring are full: the kernel let it overflow")
        self._next = (self._next + taken.size) % self._entries.size
        return taken

    def find(self) -> None:
        """Go on behind what was marked as read: an interrupt may have cut `take` in two."""
        order = np.r_[self._next : self._entries.size, : self._next]
        marked = self._entries["flags"][order] == DIRTY_GFN_F_RESET
        self._next = int(order[marked.argmin()])  # where all are, it is behind itself

    def close(self) -> None:
        """Unmap it."""
        del self._entries
        self._map.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def harvest(vm: VmFd, rings: Sequence[DirtyRing]) -> Iterator[tuple[int, NDArray[np.uint64]]]:
    """Yield what is in the rings, as a slot's id and pages in it, and in the end have all of it logged anew.

    Pages may come twice. A caller that stops early loses the rest, and calls `recover` next.

    Raises
    ------
    OSError
        EIO if the kernel resets fewer entries than were taken, EOVERFLOW if a ring overflowed.
    """
    total = 0
    for ring in rings:
        taken = ring.take()
        total += taken.size
        for slot in set(taken["slot"].tolist()):
            yield slot, taken["offset"][taken["slot"] == slot]
    while total > 0:
        done = _reset(vm)
        if not done:
            raise OSError(EIO, f"KVM_RESET_DIRTY_RINGS: {total} entries were taken, and are not reset")
        total -= done


def recover(vm: VmFd, rings: Sequence[DirtyRing]) -> None:
    """Bring the rings back to where they can be harvested, after one that didn't come to its end.

    Entries read before are lost: all pages may be dirty.
    """
    for ring in rings:
        ring.find()
    while _reset(vm):
        pass


def _reset(vm: VmFd) -> int:
    """Have the kernel reset what is marked as read, and return how many entries those were."""
    while True:
        try:
            return vm.reset_dirty_rings()
        except OSError as error:
            if error.errno != EINTR:  # since Linux 6.16 a signal ends it early
                raise
