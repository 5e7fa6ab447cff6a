"""Memslots: every row of KVM's rules, their order, and the table against a naive one."""

from errno import EEXIST, EFAULT, EINVAL, ENOENT

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwdbm import Granule, Memslot
from hwdbm.memslot import KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_MAX_NR_PAGES, KVM_MEM_READONLY, Change, Memslots

P = 0x1000
GOOD = {"slot": 0, "flags": 0, "guest_phys_addr": 0x10 * P, "memory_size": 0x10 * P, "userspace_addr": 1 << 30}
TOP = 1 << 64


def table(**kwargs):
    """A table with slot 0 at pages 0x10..0x1f, and slot 5 right behind it, which logs and is read-only."""
    slots = Memslots(**kwargs)
    slots.set_memory_region(**GOOD)
    slots.set_memory_region(5, 3, 0x20 * P, 4 * P, 2 << 30)
    return slots


def test_constants_are_the_kernels():
    assert (KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY) == (1, 2)
    assert KVM_MEM_MAX_NR_PAGES == 0x7FFF_FFFF
    assert Memslots().slot_limit == 32767
    assert Memslots().ipa_bits == 40


# --- errors: one row of the rules each ------------------------------------------------------------------------

ROWS = [
    # (what differs from GOOD, errno, what the text must name)
    ({"flags": 4}, EINVAL, "flags 0x4"),
    ({"flags": 1 << 31}, EINVAL, "flags 0x80000000"),
    ({"flags": -1}, EINVAL, "flags"),
    ({"memory_size": P + 1}, EINVAL, "memory_size 0x1001"),
    ({"memory_size": P // 2}, EINVAL, "memory_size 0x800"),
    ({"memory_size": -P}, EINVAL, "memory_size"),
    ({"memory_size": TOP}, EINVAL, "memory_size"),
    ({"guest_phys_addr": 8}, EINVAL, "guest_phys_addr 0x8"),
    ({"guest_phys_addr": -P}, EINVAL, "guest_phys_addr"),
    ({"userspace_addr": 1}, EINVAL, "userspace_addr 0x1"),
    ({"userspace_addr": TOP}, EINVAL, "userspace_addr"),
    ({"userspace_addr": TOP - 0x10 * P}, EINVAL, "beyond any process"),
    ({"userspace_addr": (1 << 56) - 0xF * P}, EINVAL, "beyond any process"),
    # before the overlap, which is EEXIST
    ({"slot": 1, "userspace_addr": 1 << 63}, EINVAL, "userspace_addr 0x8000000000000000 plus 0x10000"),
    ({"slot": 1 << 16}, EINVAL, "address space 1"),
    ({"slot": 32767}, EINVAL, "32767"),
    ({"slot": 0xFFFF}, EINVAL, "65535"),
    ({"slot": -1}, EINVAL, "slot"),
    ({"guest_phys_addr": TOP - 8 * P}, EINVAL, "wraps"),
    ({"guest_phys_addr": TOP - 0x10 * P}, EINVAL, "wraps"),  # the end is 2**64 exactly
    ({"slot": 1, "guest_phys_addr": 0, "memory_size": (1 << 31) * P}, EINVAL, "2147483647 pages"),
    ({"slot": 1, "memory_size": 0}, EINVAL, "memory_size 0"),
    ({"userspace_addr": 3 << 30}, EINVAL, "userspace_addr 0xc0000000"),
    ({"memory_size": 0x11 * P}, EINVAL, "17 pages"),
    ({"memory_size": 0xF * P}, EINVAL, "15 pages"),
    ({"flags": KVM_MEM_READONLY}, EINVAL, "READONLY"),
    ({"slot": 1}, EEXIST, "slot 0"),
    ({"slot": 1, "guest_phys_addr": 0, "memory_size": 0x11 * P}, EEXIST, "0x0..0x10 overlaps slot 0"),
    ({"slot": 1, "guest_phys_addr": 0x1F * P, "memory_size": P}, EEXIST, "slot 0"),
    ({"slot": 1, "guest_phys_addr": 0x23 * P}, EEXIST, "slot 5"),
    ({"slot": 1, "guest_phys_addr": 0, "memory_size": 0x100 * P}, EEXIST, "slot 0"),
    ({"guest_phys_addr": 0x11 * P}, EEXIST, "slot 5"),  # a move over its neighbour
    ({"slot": 1, "guest_phys_addr": (1 << 40) - P, "memory_size": 2 * P}, EFAULT, "0x10000001000"),
    ({"slot": 1, "guest_phys_addr": 1 << 40, "memory_size": P}, EFAULT, "40 bits"),
    ({"guest_phys_addr": (1 << 40) - 8 * P}, EFAULT, "40 bits"),  # a move beyond it
]


@pytest.mark.parametrize(("change", "number", "text"), ROWS, ids=str)
def test_rule(change, number, text):
    slots = table()
    before = slots.all(), slots.generation
    with pytest.raises(OSError, match="slot") as caught:
        slots.set_memory_region(**{**GOOD, **change})
    assert caught.value.errno == number
    assert text in str(caught.value)
    assert (slots.all(), slots.generation) == before


# Each has all the faults of those after it too: whatever is checked first is named. `kvm_set_memory_region`'s order.
ORDER = [
    ("number 40000", {"slot": 40000}),
    ("flags", {"flags": 8}),
    ("memory_size", {"memory_size": P + 1}),
    ("guest_phys_addr", {"guest_phys_addr": TOP - P + 1}),
    ("userspace_addr", {"userspace_addr": 1}),
    ("beyond any process", {"userspace_addr": 1 << 63}),
    ("address space", {"slot": 9 << 16}),
    ("wraps", {"guest_phys_addr": TOP - P, "memory_size": (1 << 33) * P}),
    ("2147483647 pages", {"guest_phys_addr": 0, "memory_size": (1 << 33) * P}),
]


@pytest.mark.parametrize("first", range(len(ORDER)), ids=[text for text, _ in ORDER])
def test_order_of_the_checks_of_numbers(first):
    call = dict(GOOD)
    for _, wrong in reversed(ORDER[first:]):
        call |= wrong
    with pytest.raises(OSError, match=ORDER[first][0]) as caught:
        table().set_memory_region(**call)
    assert caught.value.errno == EINVAL


def test_a_differing_slot_is_refused_before_an_overlap():
    slots = table()
    with pytest.raises(OSError, match="userspace_addr") as caught:
        slots.set_memory_region(0, 2, 0x11 * P, 0x11 * P, 3 << 30)
    assert caught.value.errno == EINVAL
    with pytest.raises(OSError, match="17 pages"):
        slots.set_memory_region(0, 2, 0x11 * P, 0x11 * P, 1 << 30)
    with pytest.raises(OSError, match="READONLY"):
        slots.set_memory_region(0, 2, 0x11 * P, 0x10 * P, 1 << 30)
    with pytest.raises(FileExistsError):
        slots.set_memory_region(0, 1, 0x11 * P, 0x10 * P, 1 << 30)


def test_an_overlap_is_refused_before_the_end_of_the_address_space():
    slots = Memslots(ipa_bits=20)  # 256 pages
    slots.set_memory_region(0, 0, 0xF0 * P, 0x10 * P, 0)  # up to the last byte
    with pytest.raises(FileExistsError):
        slots.set_memory_region(1, 0, 0xFF * P, 2 * P, 0)
    with pytest.raises(OSError, match="20 bits") as caught:
        slots.set_memory_region(1, 0, 0x100 * P, P, 0)
    assert caught.value.errno == EFAULT


def test_deleting_asks_for_nothing_but_sound_numbers():
    slots = table()
    assert slots.set_memory_region(0, 1, 0x7000 * P, 0, 9 << 30).change is Change.DELETE
    with pytest.raises(OSError, match="memory_size 0"):
        slots.set_memory_region(0, 0, 0, 0, 0)
    for wrong in ({"flags": 4}, {"guest_phys_addr": 1}, {"userspace_addr": 1}):
        with pytest.raises(OSError, match=next(iter(wrong))):
            slots.set_memory_region(**{**GOOD, "slot": 5, "memory_size": 0, **wrong})
    assert [slot.id for slot in slots.all()] == [5]


# --- what is done ---------------------------------------------------------------------------------------------


def test_create_move_flags_delete_and_nothing():
    slots = Memslots()
    call = {**GOOD, "flags": 0}
    plan = slots.set_memory_region(**call)
    assert (plan.change, plan.old) == (Change.CREATE, None)
    assert plan.new == Memslot(0, 0, 0x10, 0x10, 1 << 30, generation=1)
    assert slots.set_memory_region(**call).change is Change.NOTHING
    assert slots.generation == 1
    plan = slots.set_memory_region(**{**call, "flags": 1})
    assert (plan.change, plan.new.logging, plan.new.generation) == (Change.FLAGS_ONLY, True, 2)
    plan = slots.set_memory_region(**{**call, "flags": 1, "guest_phys_addr": 0x18 * P})  # over where it was
    assert (plan.change, plan.old.base_gfn, plan.new.base_gfn) == (Change.MOVE, 0x10, 0x18)
    plan = slots.set_memory_region(**{**call, "flags": 0, "guest_phys_addr": 0})  # the base wins over the flags
    assert (plan.change, plan.new.flags) == (Change.MOVE, 0)
    plan = slots.set_memory_region(**{**call, "memory_size": 0})
    assert (plan.change, plan.new) == (Change.DELETE, None)
    assert slots.all() == ()


def test_a_plan_changes_nothing_until_it_is_committed():
    slots = table()
    before = slots.all()
    plan = slots.plan(**{**GOOD, "guest_phys_addr": 0})
    assert slots.all() == before
    slots.commit(plan)
    assert slots.find(0).base_gfn == 0


def test_neighbours_may_touch_and_other_address_spaces_overlap():
    slots = table(address_spaces=2)
    slots.set_memory_region(**{**GOOD, "slot": 1, "guest_phys_addr": 0})
    slots.set_memory_region(**{**GOOD, "slot": 0x1_0000})
    assert [slot.id for slot in slots.all()] == [0, 1, 5, 0x1_0000]
    with pytest.raises(FileExistsError, match=r"slot 7 of address space 1: .* overlaps slot 0 of address space 1"):
        slots.set_memory_region(**{**GOOD, "slot": 0x1_0007})
    with pytest.raises(OSError, match="address space 2"):
        slots.set_memory_region(**{**GOOD, "slot": 0x2_0000})


def test_limits_themselves_are_allowed():
    slots = Memslots(ipa_bits=52, slot_limit=4)
    size = KVM_MEM_MAX_NR_PAGES * P
    assert slots.set_memory_region(3, 0, 0, size, 0).new.npages == KVM_MEM_MAX_NR_PAGES
    with pytest.raises(OSError, match="number 4 is not below 4"):
        slots.set_memory_region(4, 0, 0, P, 0)


@pytest.mark.parametrize("granule", Granule, ids=str)
def test_the_page_is_the_granule(granule):
    slots, size = Memslots(granule), granule.page_size
    assert slots.set_memory_region(0, 0, size, 3 * size, 5 * size).new == Memslot(0, 0, 1, 3, 5 * size, 1)
    for half in ((size // 2, size, size), (size, size // 2, size), (size, size, size // 2)):
        with pytest.raises(OSError, match=str(granule)):
            slots.set_memory_region(1, 0, *half)


def test_numbers_may_be_numpys():
    slots = Memslots()
    call = {name: np.uint64(value) for name, value in GOOD.items()}
    plan = slots.set_memory_region(**call)
    assert plan.new == Memslot(0, 0, 0x10, 0x10, 1 << 30, 1)
    assert type(plan.new.base_gfn) is int


def test_finding():
    slots = table()
    assert slots.find(5).readonly
    for wrong, number in ((1, ENOENT), (32767, EINVAL), (1 << 16, EINVAL), (-1, EINVAL)):
        with pytest.raises(OSError, match="slot") as caught:
            slots.find(wrong)
        assert caught.value.errno == number
    found = [slots.at(gfn) for gfn in (0xF, 0x10, 0x1F, 0x20, 0x23, 0x24)]
    assert [slot and slot.id for slot in found] == [None, 0, 0, 5, 5, None]


def test_a_memslot_says_what_it_is():
    slot = Memslot(0x2_0007, 3, 0x100, 0x40, 0)
    assert (slot.as_id, slot.number, slot.end_gfn, slot.logging, slot.readonly) == (2, 7, 0x140, True, True)
    with pytest.raises(AttributeError):
        slot.flags = 0
    with pytest.raises(ValueError, match=r"npages is 1 to .*, not 0"):
        Memslot(0, 0, 0, 0, 0)


@pytest.mark.parametrize(
    "wrong", [{"address_spaces": 0}, {"slot_limit": 0}, {"ipa_bits": 53}, {"ipa_bits": 11}], ids=str
)
def test_a_table_is_sound(wrong):
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        Memslots(**wrong)


# --- the table against a naive one ----------------------------------------------------------------------------

REGIONS = st.lists(
    st.tuples(st.integers(0, 6), st.integers(0, 3), st.integers(0, 24), st.integers(0, 6), st.integers(0, 1)),
    max_size=40,
)


@given(regions=REGIONS)
def test_the_table_says_what_a_list_of_pages_says(regions):
    slots, naive = Memslots(ipa_bits=16 + 1), {}  # 32 pages; slot -> (flags, gfn, npages, hva)
    for slot, flags, gfn, npages, hva in regions:
        old = naive.get(slot)
        taken = {page for other, (_, base, n, _) in naive.items() if other != slot for page in range(base, base + n)}
        if npages == 0:
            want = "delete" if old else EINVAL
        elif old and (old[3] != hva or old[2] != npages or (old[0] ^ flags) & 2):
            want = EINVAL
        elif old == (flags, gfn, npages, hva):
            want = "nothing"
        elif (not old or old[1] != gfn) and taken & set(range(gfn, gfn + npages)):
            want = EEXIST
        elif gfn + npages > 32:
            want = EFAULT
        else:
            want = "create" if not old else "move" if old[1] != gfn else "flags-only"
        try:
            got = slots.set_memory_region(slot, flags, gfn * P, npages * P, hva * P).change.value
        except OSError as error:
            got = error.errno
        assert got == want
        if got == "delete":
            del naive[slot]
        elif isinstance(got, str):
            naive[slot] = (flags, gfn, npages, hva)
        assert [(s.id, s.flags, s.base_gfn, s.npages) for s in slots.all()] == [
            (slot, *naive[slot][:3]) for slot in sorted(naive)
        ]
    for page in range(40):
        owner = [slot for slot, (_, base, n, _) in naive.items() if base <= page < base + n]
        assert [slots.at(page).id] == owner if owner else slots.at(page) is None


@pytest.mark.parametrize("slot", [11, 12, 0xFFFF])
def test_a_slot_beyond_the_limit_is_named(slot: int) -> None:
    slots = Memslots(slot_limit=11)
    with pytest.raises(OSError, match=f"number {slot} is not below 11"):
        slots.check_id(slot)
    slots.check_id(10)
