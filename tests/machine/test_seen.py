"""A machine of each kind at work: what its clock counts, what it maps and by what leaves, and what is dirty.

Three slots: not aligned to a block, not whole blocks, one of them read-only; a TLB that is full, and two vCPUs.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from seen import as_seen

from hwdbm import Granule, pte
from hwdbm.machine import Bursty, HotSet, Machine, Sequential, Uniform, Zipf

KINDS = {
    "hardware DBM": {},
    "write-protection": {"hw_dbm": False},
    "write-protection without AF": {"hw_dbm": False, "ha": False, "thp": False},
    "blocks that are split at once": {"blocks": "eager", "chunk_pages": 1024},
    "blocks that are tracked": {"blocks": "track"},
    "blocks that are write-protected whole": {"blocks": "track", "hw_dbm": False},
    "all set at first, and cleared by hand": {"manual_protect": True, "initially_set": True, "step_pages": 64},
    "a small TLB": {"tlb_entries": 40, "seed": 5},
    "16 KiB": {"granule": Granule.K16},
}


def leaves(machine: Machine, slot: int) -> str:
    """Return how many descriptors of each state a slot has, by level, and a digest of where they are."""
    s2, found = machine.log.stage2(slot), Counter[str]()
    digest = hashlib.sha256()
    for level in (1, 2, 3):
        descs = s2.level(level)
        digest.update(descs.tobytes())
        values, numbers = np.unique(descs, return_counts=True)
        for desc, number in zip(values.tolist(), numbers.tolist(), strict=True):
            found[f"{level} {pte.state(desc, level).name}"] += number
    states = ", ".join(f"{number} at level {name}" for name, number in sorted(found.items()))
    return f"  slot {slot}: {states}; {digest.hexdigest()[:8]}"


def said(machine: Machine, what: str) -> Iterator[str]:
    """Yield what there is after a step of a machine's life."""
    reading = machine.clock.read()
    counts = ", ".join(f"{name} {count}" for name, count in reading.counts.items() if count)
    yield f"{what}: {counts}"
    yield f"  {reading.guest * 1e6:.6f} us of the guest's, {reading.collector * 1e6:.6f} us of the log's"
    yield from (leaves(machine, slot.id) for slot in machine.slots)


def dirty(machine: Machine) -> Iterator[str]:
    for slot in machine.slots:
        with machine.dirty(slot.id) as lease:
            words = lease.bitmap.words.tobytes()
            yield f"  slot {slot.id}: {lease.bitmap.weight()} dirty, {hashlib.sha256(words).hexdigest()[:8]}"
            lease.commit()


def life(options: dict[str, object]) -> Iterator[str]:
    """Yield what comes of stores by each workload, before a log, while there is one, and after it."""
    with Machine(vcpus=2, **options) as machine:
        page = machine.page_size
        machine.add_memslot(1100 * page, 0x4000_0000 + 100 * page, hva=(1 << 40) + 100 * page)
        machine.add_memslot(3 * page, slot=7, readonly=True)
        machine.add_memslot(700 * page, 0x9000_0000, slot=4, shared=True)
        yield from said(machine, "at first")
        machine.run(Uniform(seed=1), Sequential(stores_per_page=3))
        machine.step(30)
        gpas = np.array([0x9000_0000 + 5 * page, machine.space.find(7).gpa + 8])
        yield f"  loads {machine.vcpus[1].load(gpas).tolist()}"
        yield from said(machine, "mapped")
        machine.start_log()
        yield from said(machine, "logging")
        machine.step(2000, vcpu=1)
        machine.run(HotSet(seed=2, share=0.01), Zipf(seed=3))
        machine.step(50)
        machine.step(50, vcpu=1)
        yield from said(machine, "written")
        yield from dirty(machine)
        machine.run(Bursty(seed=4), Uniform(seed=6))
        machine.step(300)
        machine.write(0x9000_0000 + 8 * page - 2, b"four")
        machine.set_hw_dirty_log(not machine.log.hw_dbm and machine.vcpus[0].ha)
        machine.step(30, vcpu=1)
        yield from said(machine, "switched")
        yield from dirty(machine)
        yield f"  splits {machine.split(0, 900, 2)}, {machine.split(0)}"
        machine.stop_log(collapse=False)
        yield from said(machine, "stopped, as it was")
        machine.start_log()
        machine.step(20)
        machine.stop_log()
        yield from said(machine, "stopped")


@pytest.mark.parametrize("kind", KINDS)
def test_a_life_is_the_one_that_was_looked_at(kind):
    as_seen(f"machine/{kind.replace(', ', '-').replace(' ', '-')}.txt", "\n".join(life(KINDS[kind])) + "\n")
