"""Memslots: the runs of guest memory that a VM is made of, and KVM's rules for changing them.

The checks and their order are those of ``kvm_vm_ioctl_set_memory_region``, ``kvm_set_memory_region`` and
``kvm_arch_prepare_memory_region`` (Linux 6.x, virt/kvm/kvm_main.c and arch/arm64/kvm/mmu.c). Errors are `OSError` with
KVM's errno, and a text that names the number that was wrong.
"""

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, replace
from enum import Enum
from errno import EEXIST, EFAULT, EINVAL, ENOENT
from itertools import islice
from operator import attrgetter

from hwdbm.check import instance, integer
from hwdbm.granule import Granule

__all__ = ["KVM_MEM_LOG_DIRTY_PAGES", "KVM_MEM_READONLY", "Change", "Memslot", "Memslots", "Plan", "slot_name"]

KVM_MEM_LOG_DIRTY_PAGES = 1 << 0
KVM_MEM_READONLY = 1 << 1
KVM_MEM_MAX_NR_PAGES = (1 << 31) - 1
KVM_USER_MEM_SLOTS = 32767
"""arm64 takes the generic limit, SHRT_MAX, and keeps none for itself (include/linux/kvm_host.h)."""

KVM_PHYS_SHIFT = 40
"""The guest's address bits where a VM is created with type 0."""

# access_ok: no process has addresses beyond. x86 has 56 bits with five levels, and on arm64 a tag begins there. Most
# kernels end earlier, at 47, 48 or 52 bits; which one it would be, a model doesn't know.
_USER_BITS = 56
_U64 = 1 << 64
_BASE = attrgetter("base_gfn")


def slot_name(slot: int) -> str:
    """Return a slot's name for a text. Any integer has one, since errors about ids out of range need it.

    Examples
    --------
    >>> slot_name(3), slot_name(0x1_0003)
    ('slot 3', 'slot 3 of address space 1')
    """
    slot = integer(slot, "a slot's id", low=None)
    return f"slot {slot & 0xFFFF}" + (f" of address space {slot >> 16}" if slot >> 16 else "")


class Change(Enum):
    """The kind of a ``KVM_SET_USER_MEMORY_REGION`` call: ``enum kvm_mr_change``, with a value for no change."""

    NOTHING = "nothing"
    CREATE = "create"
    DELETE = "delete"
    MOVE = "move"
    FLAGS_ONLY = "flags-only"


@dataclass(frozen=True, slots=True)
class Memslot:
    """One run of guest memory.

    Parameters
    ----------
    id : int
        ``as_id << 16 | id``: the address space and the number in it, as ``struct kvm_dirty_log`` has them.
    flags : int
        ``KVM_MEM_LOG_DIRTY_PAGES`` (1), ``KVM_MEM_READONLY`` (2).
    base_gfn : int
        The guest frame of page 0, in pages.
    npages : int
        Pages of one granule; 1 or more.
    userspace_addr : int
        The address of the backing in the VMM, in bytes: its identity, never followed.
    generation : int
        The table's, when the slot came to be as it is: another value, another version of the slot.

    Examples
    --------
    >>> slot = Memslot(0x1_0003, KVM_MEM_LOG_DIRTY_PAGES, 0x8_0000, 0x1000, 1 << 30)
    >>> slot.as_id, slot.number, slot.logging, hex(slot.end_gfn)
    (1, 3, True, '0x81000')
    """

    id: int
    flags: int
    base_gfn: int
    npages: int
    userspace_addr: int
    generation: int = 0

    def __post_init__(self) -> None:
        for name in ("id", "flags", "base_gfn", "userspace_addr", "generation"):
            object.__setattr__(self, name, integer(getattr(self, name), f"a slot's {name}", high=_U64 - 1))
        object.__setattr__(self, "npages", integer(self.npages, "a slot's npages", low=1, high=_U64 - 1))

    @property
    def as_id(self) -> int:
        """The address space."""
        return self.id >> 16

    @property
    def number(self) -> int:
        """The number within the address space."""
        return self.id & 0xFFFF

    @property
    def end_gfn(self) -> int:
        """The guest frame after the last one."""
        return self.base_gfn + self.npages

    @property
    def logging(self) -> bool:
        """Whether the slot's dirty pages are logged."""
        return bool(self.flags & KVM_MEM_LOG_DIRTY_PAGES)

    @property
    def readonly(self) -> bool:
        """Whether the guest may only read."""
        return bool(self.flags & KVM_MEM_READONLY)


@dataclass(frozen=True, slots=True)
class Plan:
    """A change of the memslots that passed every check, and is not made yet.

    Parameters
    ----------
    change : Change
        The kind of change.
    old, new : Memslot or None
        The slot before and after; None where there is none.
    """

    change: Change
    old: Memslot | None
    new: Memslot | None

    @property
    def id(self) -> int:
        """The slot's id."""
        slot = self.old if self.new is None else self.new
        assert slot is not None  # noqa: S101 - no change is of nothing
        return slot.id


class Memslots:
    """The memslots of a VM.

    Parameters
    ----------
    granule : Granule
        The size of a page, to which addresses and sizes are aligned.
    address_spaces : int
        KVM has 1 on arm64; 2 on x86, for SMM.
    slot_limit : int
        Slots in an address space: ``KVM_CAP_NR_MEMSLOTS``.
    ipa_bits : int
        The guest's physical address space ends at ``1 << ipa_bits`` bytes.

    Examples
    --------
    >>> slots = Memslots()
    >>> slots.set_memory_region(0, 1, 0x4000_0000, 0x10_0000, 1 << 30).change
    <Change.CREATE: 'create'>
    >>> slots.set_memory_region(1, 0, 0x4008_0000, 0x10_0000, 2 << 30)
    Traceback (most recent call last):
    FileExistsError: [Errno 17] slot 1: gfn 0x40080..0x4017f overlaps slot 0's 0x40000..0x400ff
    """

    def __init__(
        self,
        granule: Granule = Granule.K4,
        *,
        address_spaces: int = 1,
        slot_limit: int = KVM_USER_MEM_SLOTS,
        ipa_bits: int = KVM_PHYS_SHIFT,
    ) -> None:
        instance(granule, Granule, "granule")
        self.granule = granule
        self.ipa_bits = integer(ipa_bits, "ipa_bits", low=granule.page_shift, high=52)
        self.address_spaces = integer(address_spaces, "address_spaces", low=1, high=1 << 16)
        self.slot_limit = integer(slot_limit, "slot_limit", low=1, high=1 << 16)
        self.generation = 0
        self._slots: dict[int, Memslot] = {}
        # The slots of each address space in the order of their bases, and so, as they don't overlap, of their ends.
        self._by_base: list[list[Memslot]] = [[] for _ in range(self.address_spaces)]

    # --- reading -------------------------------------------------------------------------------------------

    def all(self) -> tuple[Memslot, ...]:
        """Return the slots in the order of their ids."""
        return tuple(self._slots[slot] for slot in sorted(self._slots))

    def check_id(self, slot: int) -> int:
        """Return a slot's id as an `int`; raise EINVAL if the address space or the number in it is out of range."""
        slot = integer(slot, "slot", low=None)
        if slot < 0 or slot >> 16 >= self.address_spaces:
            raise OSError(EINVAL, f"{slot_name(slot)}: there is no address space {slot >> 16} of {self.address_spaces}")
        if slot & 0xFFFF >= self.slot_limit:
            raise OSError(EINVAL, f"{slot_name(slot)}: number {slot & 0xFFFF} is not below {self.slot_limit}")
        return slot

    def find(self, slot: int) -> Memslot:
        """Return a slot by its id.

        Raises
        ------
        OSError
            EINVAL if the id is out of range, ENOENT if there is no such slot.
        """
        found = self._slots.get(self.check_id(slot))
        if found is None:
            raise OSError(ENOENT, f"there is no {slot_name(slot)}")
        return found

    def at(self, gfn: int, as_id: int = 0) -> Memslot | None:
        """Return the slot that a guest frame lies in, or None.

        Raises
        ------
        ValueError
            If there is no such address space.
        """
        gfn, as_id = integer(gfn, "gfn", low=None), integer(as_id, "as_id", high=self.address_spaces - 1)
        before = bisect_right(self._by_base[as_id], gfn, key=_BASE)
        found = self._by_base[as_id][before - 1] if before else None
        return found if found and gfn < found.end_gfn else None

    # --- changing ------------------------------------------------------------------------------------------

    def set_memory_region(
        self, slot: int, flags: int, guest_phys_addr: int, memory_size: int, userspace_addr: int
    ) -> Plan:
        """Create, delete, move or change a slot. The arguments and errors are `plan`'s.

        Returns
        -------
        Plan
            The kind of change.
        """
        plan = self.plan(slot, flags, guest_phys_addr, memory_size, userspace_addr)
        self.commit(plan)
        return plan

    def plan(self, slot: int, flags: int, guest_phys_addr: int, memory_size: int, userspace_addr: int) -> Plan:
        """Check a change with KVM's rules, in KVM's order, and make none.

        Parameters
        ----------
        slot : int
            ``as_id << 16 | id``.
        flags : int
            ``KVM_MEM_LOG_DIRTY_PAGES`` (1) and ``KVM_MEM_READONLY`` (2).
        guest_phys_addr, memory_size, userspace_addr : int
            Bytes, multiples of the page. A size of 0 deletes the slot.

        Raises
        ------
        OSError
            EINVAL, EEXIST where it would overlap another slot, EFAULT where it ends beyond the guest's address
            space.
        """
        slot, flags = integer(slot, "slot", low=None), integer(flags, "flags", low=None)
        guest_phys_addr = integer(guest_phys_addr, "guest_phys_addr", low=None)
        memory_size, userspace_addr = (
            integer(memory_size, "memory_size", low=None),
            integer(userspace_addr, "userspace_addr", low=None),
        )
        self._check_numbers(slot, flags, guest_phys_addr, memory_size, userspace_addr)
        old, shift = self._slots.get(slot), self.granule.page_shift
        if memory_size == 0:
            if old is None:
                raise OSError(EINVAL, f"{slot_name(slot)}: memory_size 0 deletes a slot, and there is none")
            return Plan(Change.DELETE, old, None)
        generation = self.generation + 1
        base, npages = guest_phys_addr >> shift, memory_size >> shift
        if old is None:
            change, new = Change.CREATE, Memslot(slot, flags, base, npages, userspace_addr, generation)
        else:
            change, new = self._modified(old, flags, base, npages, userspace_addr)
        if change is Change.NOTHING:
            return Plan(change, old, old)
        if change in (Change.CREATE, Change.MOVE):
            self._check_overlap(new)
        if new.end_gfn > 1 << (self.ipa_bits - shift):
            raise OSError(
                EFAULT,
                f"{slot_name(slot)}: it ends at {new.end_gfn << shift:#x}, and the guest has {self.ipa_bits} bits",
            )
        return Plan(change, old, new)

    def commit(self, plan: Plan) -> None:
        """Make a change that `plan` checked, and that nothing changed since.

        One that was interrupted is made whole by a further call.
        """
        instance(plan, Plan, "plan")
        if plan.change is Change.NOTHING:
            return
        for slot in (each for each in (plan.old, plan.new) if each is not None):
            by_base = self._by_base[slot.as_id]
            at = bisect_left(by_base, slot.base_gfn, key=_BASE)
            if at < len(by_base) and by_base[at].id == slot.id:
                del by_base[at]
        if plan.new is None:
            self._slots.pop(plan.id, None)
        else:
            by_base = self._by_base[plan.new.as_id]
            by_base.insert(bisect_left(by_base, plan.new.base_gfn, key=_BASE), plan.new)
            self._slots[plan.id] = plan.new
        generation = self.generation + 1
        self.generation = generation if plan.new is None else max(generation, plan.new.generation)

    def _check_numbers(self, slot: int, flags: int, gpa: int, size: int, hva: int) -> None:
        if slot & 0xFFFF >= self.slot_limit:  # the ioctl's own check, before all others
            self.check_id(slot)
        if flags & ~(KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY):
            raise OSError(EINVAL, f"{slot_name(slot)}: flags {flags:#x} are not all known")
        for name, value in (("memory_size", size), ("guest_phys_addr", gpa), ("userspace_addr", hva)):
            if not 0 <= value < _U64 or value % self.granule.page_size:
                raise OSError(
                    EINVAL, f"{slot_name(slot)}: {name} {value:#x} is not a multiple of {self.granule} in 64 bits"
                )
        if hva + size > 1 << _USER_BITS:
            raise OSError(EINVAL, f"{slot_name(slot)}: userspace_addr {hva:#x} plus {size:#x} is beyond any process")
        self.check_id(slot)
        if gpa + size >= _U64:  # at 2**64 exactly the sum is 0 in KVM's 64 bits, and so below the address
            raise OSError(EINVAL, f"{slot_name(slot)}: guest_phys_addr {gpa:#x} plus memory_size {size:#x} wraps")
        if size >> self.granule.page_shift > KVM_MEM_MAX_NR_PAGES:
            raise OSError(EINVAL, f"{slot_name(slot)}: memory_size {size:#x} is more than {KVM_MEM_MAX_NR_PAGES} pages")

    def _modified(self, old: Memslot, flags: int, base: int, npages: int, hva: int) -> tuple[Change, Memslot]:
        if hva != old.userspace_addr:
            raise OSError(EINVAL, f"{slot_name(old.id)}: userspace_addr {hva:#x} is not its {old.userspace_addr:#x}")
        if npages != old.npages:
            raise OSError(EINVAL, f"{slot_name(old.id)}: {npages} pages are not its {old.npages}")
        if (flags ^ old.flags) & KVM_MEM_READONLY:
            raise OSError(EINVAL, f"{slot_name(old.id)}: flags {flags:#x} would change READONLY in its {old.flags:#x}")
        if base != old.base_gfn:
            change = Change.MOVE
        elif flags != old.flags:
            change = Change.FLAGS_ONLY
        else:
            return Change.NOTHING, old
        return change, replace(old, flags=flags, base_gfn=base, generation=self.generation + 1)

    def _check_overlap(self, new: Memslot) -> None:
        by_base = self._by_base[new.as_id]
        # Only the slot before it, those that begin inside of it, and among them itself before a move, can overlap.
        first = max(bisect_right(by_base, new.base_gfn, key=_BASE) - 1, 0)
        for other in islice(by_base, first, bisect_left(by_base, new.end_gfn, key=_BASE)):
            if other.id != new.id and other.end_gfn > new.base_gfn:
                raise OSError(
                    EEXIST,
                    f"{slot_name(new.id)}: gfn {new.base_gfn:#x}..{new.end_gfn - 1:#x} overlaps "
                    f"{slot_name(other.id)}'s {other.base_gfn:#x}..{other.end_gfn - 1:#x}",
                )
