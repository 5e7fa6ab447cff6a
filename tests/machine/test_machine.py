"""The machine by hand: what is mapped, what faults, what splits, what is dirty, what it costs."""

import hashlib
import json

import numpy as np
import pytest

from hwdbm import Granule, pte
from hwdbm.machine import Blocks, Bursty, Costs, HotSet, Machine, ReferenceVCpu, Replay, Sequential, Uniform
from hwdbm.machine.frames import FramePool
from hwdbm.machine.reference import Cached
from hwdbm.pte import State

GPA = 0x4000_0000
PAGE = 4096


@pytest.fixture
def make():
    made = []

    def one(size=4 << 20, gpa=GPA, *, slot_options=None, **options):
        machine = Machine(**options)
        made.append(machine)
        machine.add_memslot(size, gpa, **(slot_options or {}))
        return machine

    yield one
    for machine in made:
        machine.close()


def store(machine, *pages, value=1):
    gpas = np.array(pages, dtype=np.int64) * PAGE + GPA
    machine.vcpus[0].store(gpas, np.full(gpas.size, value, dtype=np.uint64))


def load(machine, *pages):
    return machine.vcpus[0].load(np.array(pages, dtype=np.int64) * PAGE + GPA).tolist()


def dirty(machine, slot=0):
    with machine.dirty(slot) as lease:
        return lease.bitmap.pages().tolist()


def state(machine, page, level=3):
    s2 = machine.log.stage2(0)
    return pte.state(int(s2.level(level)[s2.layout.index(level, page)]), level)


def counts(machine):
    return {name: count for name, count in machine.clock.read().counts.items() if count}


# --- mapping --------------------------------------------------------------------------------------------------


def test_a_touch_maps_a_block_where_one_fits(make):
    machine = make(gpa=GPA, size=3 << 20)  # a block, and half of one
    assert load(machine, 5, 512, 600) == [0, 0, 0]
    assert state(machine, 5, level=2) is State.UNTRACKED
    assert state(machine, 512, level=2) is State.TABLE
    assert [state(machine, page) for page in (512, 513, 600)] == [State.UNTRACKED, State.ABSENT, State.UNTRACKED]
    assert counts(machine)["translation_faults"] == 3


@pytest.mark.parametrize(
    ("slot_options", "options"),
    [({}, {"thp": False}), ({"hva": (1 << 40) + PAGE}, {}), ({"shared": True}, {})],
    ids=["no huge pages", "not congruent", "shared"],
)
def test_a_touch_maps_a_page_elsewhere(make, slot_options, options):
    machine = make(slot_options=slot_options, **options)
    load(machine, 5)
    assert state(machine, 5, level=2) is State.TABLE
    assert state(machine, 5) in (State.UNTRACKED, State.READ_ONLY)
    assert state(machine, 6) is State.ABSENT


def test_blocks_of_other_granules(make):
    machine = make(size=64 << 20, granule=Granule.K16)
    machine.vcpus[0].store(np.array([GPA + 5 * 16384]), np.array([1], dtype=np.uint64))
    assert state(machine, 5, level=2) is State.UNTRACKED
    machine.start_log()
    machine.vcpus[0].store(np.array([GPA + 5 * 16384]), np.array([1], dtype=np.uint64))
    assert dirty(machine) == [5]


def test_while_it_logs_only_pages_are_mapped(make):
    machine = make()
    machine.start_log()
    load(machine, 5)
    store(machine, 6)
    assert [state(machine, page) for page in (5, 6)] == [State.WRITABLE_CLEAN, State.WRITABLE_DIRTY]
    assert dirty(machine) == [6]


def test_a_write_fault_under_write_protection(make):
    machine = make(hw_dbm=False)
    machine.start_log()
    load(machine, 5)
    store(machine, 6)
    assert [state(machine, page) for page in (5, 6)] == [State.READ_ONLY, State.UNTRACKED]
    store(machine, 5)
    assert dirty(machine) == [5, 6]
    assert [state(machine, page) for page in (5, 6)] == [State.READ_ONLY, State.READ_ONLY]
    assert counts(machine)["permission_faults"] == 1
    assert machine.log.stats.write_faults == 1
    assert dirty(machine) == []


# --- the TLB --------------------------------------------------------------------------------------------------


def test_a_cached_dirty_entry_is_not_checked_again(make):
    machine = make()
    machine.start_log()
    store(machine, 5)
    with machine.log.locked(0) as s2:
        s2.harvest()  # and no flush: this is what a harvest must never do
    store(machine, 5, value=2)
    assert state(machine, 5) is State.WRITABLE_CLEAN
    machine.flush(machine.log.slot(0), 5, 1)
    store(machine, 5, value=3)
    assert state(machine, 5) is State.WRITABLE_DIRTY


def test_a_cached_clean_entry_is_checked(make):
    machine = make()
    machine.start_log()
    load(machine, 5)
    assert machine.vcpus[0].tlb[0].page[5] == 2
    with machine.log.locked(0) as s2:
        s2.unmap(s2.base_gfn + 5, 1)  # and no flush
    assert load(machine, 5) == [0]  # a stale entry is good for reading
    store(machine, 5)
    assert counts(machine)["rechecks"] == 1
    assert dirty(machine) == [5]


def test_af_and_dirty_are_one_update(make):
    machine = make()
    machine.start_log()
    load(machine, 5)
    with machine.log.locked(0) as s2:
        s2.mkold()
    before = counts(machine).get("hardware_updates", 0)
    store(machine, 5)
    assert counts(machine)["hardware_updates"] == before + 1
    assert int(machine.log.stage2(0).level(3)[5]) & pte.AF


def test_an_access_flag_fault_without_ha(make):
    machine = make(hw_dbm=False, ha=False)
    load(machine, 5, 700)
    with machine.log.locked(0) as s2:
        s2.mkold()
    machine.flush(machine.log.slot(0), 0, 1024)
    load(machine, 5, 6, 700)
    assert counts(machine)["access_flag_faults"] == 2  # one a block


# --- blocks while logging -------------------------------------------------------------------------------------


@pytest.mark.parametrize("hw", [True, False], ids=["hw-dbm", "write-protect"])
def test_a_block_is_split_at_its_first_write(make, hw):
    machine = make(hw_dbm=hw)
    store(machine, 5, 600)
    machine.start_log()
    assert state(machine, 5, level=2) is State.READ_ONLY
    assert load(machine, 5) == [1]
    store(machine, 7, 8)
    assert state(machine, 7, level=2) is State.TABLE
    assert state(machine, 600, level=2) is State.READ_ONLY
    assert dirty(machine) == [7, 8]
    assert counts(machine)["splits"] == 1
    assert counts(machine)["permission_faults"] == (1 if hw else 2)  # hardware needs no fault a page


@pytest.mark.parametrize("hw", [True, False], ids=["hw-dbm", "write-protect"])
def test_eager_split(make, hw):
    machine = make(hw_dbm=hw, blocks="eager")
    store(machine, 5, 600)
    machine.start_log()
    assert counts(machine)["splits"] == 2
    assert state(machine, 5) is (State.WRITABLE_CLEAN if hw else State.READ_ONLY)
    store(machine, 7, 8)
    assert dirty(machine) == [7, 8]
    assert counts(machine).get("permission_faults", 0) == (0 if hw else 2)


@pytest.mark.parametrize("hw", [True, False], ids=["hw-dbm", "write-protect"])
def test_blocks_are_tracked_as_a_whole(make, hw):
    machine = make(hw_dbm=hw, blocks=Blocks.TRACK)
    store(machine, 5, 600)
    machine.start_log()
    store(machine, 7, 8)
    assert dirty(machine) == list(range(512))
    assert dirty(machine) == []
    store(machine, 8)
    assert dirty(machine) == list(range(512))
    assert "splits" not in counts(machine)


@pytest.mark.parametrize("blocks", ["write", "eager"])
@pytest.mark.parametrize("hw", [True, False], ids=["hw-dbm", "write-protect"])
def test_after_the_log_pages_are_blocks_again(make, hw, blocks):
    machine = make(hw_dbm=hw, blocks=blocks)
    store(machine, 5, 600)
    machine.start_log()
    store(machine, 7, 8)
    machine.stop_log()
    assert [state(machine, page, level=2) for page in (5, 600)] == [State.UNTRACKED, State.UNTRACKED]
    assert load(machine, 5, 7, 8) == [1, 1, 1]
    machine.start_log()
    store(machine, 9)
    assert dirty(machine) == [9]


def test_stop_without_collapse_leaves_the_leaves(make):
    machine = make()
    store(machine, 5)
    machine.start_log()
    store(machine, 7)
    machine.stop_log(collapse=False)
    assert state(machine, 5, level=2) is State.TABLE
    store(machine, 8)


@pytest.mark.parametrize("hw", [True, False], ids=["hw-dbm", "write-protect"])
@pytest.mark.parametrize("blocks", Blocks)
def test_initially_set(make, hw, blocks):
    machine = make(hw_dbm=hw, manual_protect=True, initially_set=True, blocks=blocks)
    store(machine, 5)
    machine.start_log()
    assert state(machine, 5, level=2) is State.UNTRACKED
    assert len(dirty(machine)) == 1024
    store(machine, 5)
    assert dirty(machine) == (list(range(512)) if blocks is Blocks.TRACK else [5])


# --- who else writes ------------------------------------------------------------------------------------------


def test_a_shared_page_faults_until_it_is_written(make):
    machine = make(slot_options={"shared": True})
    assert load(machine, 5) == [0]
    frames = machine.space.find(0).frames
    before = frames.one(5)
    assert state(machine, 5) is State.READ_ONLY
    machine.start_log()
    assert dirty(machine) == []
    store(machine, 5)
    assert state(machine, 5) is State.WRITABLE_DIRTY
    assert frames.one(5) != before
    assert pte.output_address(int(machine.log.stage2(0).level(3)[5]), 12) >> 12 == frames.one(5)
    assert dirty(machine) == [5]
    assert counts(machine)["copies"] == 1


@pytest.mark.parametrize("verb", ["share", "reclaim"])
def test_what_a_leaf_recorded_is_saved_before_it_goes(make, verb):
    machine = make()
    store(machine, 600)
    machine.start_log()
    store(machine, 5, 6)
    getattr(machine, verb)(0, 5, 1)
    assert state(machine, 5) is (State.READ_ONLY if verb == "share" else State.ABSENT)
    assert dirty(machine) == [5, 6]
    store(machine, 5)
    assert dirty(machine) == [5]


def test_devices_and_imports_mark(make):
    machine = make()
    machine.start_log()
    machine.write(GPA + 2 * PAGE - 1, b"ab")
    machine.mark_imported(0, 100, 3)
    assert machine.read(GPA + 2 * PAGE - 1, 2) == b"ab"
    assert dirty(machine) == [1, 2, 100, 101, 102]


def test_a_device_unshares_what_it_writes(make):
    machine = make(slot_options={"shared": True})
    load(machine, 5)
    machine.start_log()
    machine.write(GPA + 5 * PAGE, b"x")
    assert state(machine, 5) is State.ABSENT
    assert not machine.space.find(0).frames.shared[5]
    store(machine, 5)
    assert dirty(machine) == [5]


def test_memory_across_slots(make):
    machine = make(size=2 * PAGE)
    machine.add_memslot(PAGE, GPA + 2 * PAGE, slot=7)
    machine.write(GPA + 2 * PAGE - 2, b"abcd")
    assert machine.memory(7)[:2].tobytes() == b"cd"
    assert machine.read(GPA + 2 * PAGE - 3, 5) == b"\0abcd"
    with pytest.raises(OSError, match="no slot is at 0x40003000") as caught:
        machine.write(GPA + 3 * PAGE - 1, b"ab")
    assert caught.value.errno == 14
    assert machine.read(GPA + 3 * PAGE - 1, 1) == b"\0"
    gpas = np.array([GPA + 2 * PAGE, GPA, GPA + 2 * PAGE + 8, GPA])
    machine.vcpus[0].store(gpas, np.array([1, 2, 3, 4], dtype=np.uint64))
    assert machine.vcpus[0].load(gpas).tolist() == [1, 4, 3, 4]


def test_a_read_only_slot(make):
    machine = make()
    slot = machine.add_memslot(PAGE, GPA + (8 << 20), readonly=True)
    gpa = np.array([GPA + (8 << 20)])
    machine.write(int(gpa[0]), bytes([9] * 8))
    assert machine.vcpus[0].load(gpa).tolist() == [0x0909090909090909]
    with pytest.raises(OSError, match="write of gpa 0x40800000 can't be handled: its slot is read-only") as caught:
        machine.vcpus[0].store(gpa, np.array([1], dtype=np.uint64))
    assert caught.value.errno == 14
    machine.start_log()
    machine.write(int(gpa[0]), b"x")
    assert dirty(machine, slot.id) == [0]
    machine.verify()


@pytest.mark.parametrize("blocks", Blocks)
def test_a_read_only_slot_is_that_after_a_log(make, blocks):
    """What makes blocks again lets the guest write what the host lets it write."""
    machine = make(blocks=blocks)
    size = 4 << 20
    slot = machine.add_memslot(size, GPA + (8 << 20), readonly=True)
    gpas = np.arange(GPA + (8 << 20), GPA + (8 << 20) + size, PAGE)
    machine.vcpus[0].load(gpas)
    for _ in range(2):
        machine.start_log()
        machine.vcpus[0].load(gpas)
        machine.stop_log()
        with machine.log.locked(slot.id) as s2:
            assert not s2.writable().any()


def test_an_access_is_aligned(make):
    machine = make()
    with pytest.raises(ValueError, match="0x40000004 is not a multiple of 8"):
        machine.vcpus[0].load(np.array([GPA, GPA + 4]))


def test_an_image_is_loaded(make, tmp_path):
    image = tmp_path / "image"
    image.write_bytes(bytes(range(256)) * 64)
    machine = make(size=1 << 20, slot_options={"memory_image": image})
    assert machine.digest() == hashlib.sha256(image.read_bytes() + bytes((1 << 20) - 16384)).hexdigest()
    with pytest.raises(FileNotFoundError):
        machine.add_memslot(PAGE, memory_image=tmp_path / "none")
    assert [slot.id for slot in machine.slots] == [0]


def test_slots_are_placed_and_numbered(make):
    machine = make(size=3 << 20)
    assert machine.add_memslot(PAGE).base_gfn == (GPA >> 12) + 1024
    with pytest.raises(OSError, match="slot 1 is there already"):
        machine.add_memslot(PAGE, slot=1)
    with pytest.raises(OSError, match="overlaps"):
        machine.add_memslot(PAGE, GPA)
    with pytest.raises(OSError, match="not positive"):
        machine.add_memslot(0)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"chunk_pages": 100}, "multiple of a block's 512 pages, not 100"),
        ({"vcpus": 0}, "1 vCPU or more, 512 at most, not 0"),
        ({"ha": False}, "needs the hardware's access flag"),
        ({"blocks": "never"}, "blocks is write or eager or track, not 'never'"),
    ],
)
def test_options_are_checked(options, why):
    with pytest.raises(ValueError, match=why):
        Machine(**options)


# --- the state, and the clock ---------------------------------------------------------------------------------


def test_a_state_goes_on_elsewhere(make):
    one, two = make(thp=False), make(hw_dbm=False)
    one.run(Uniform(seed=3))
    one.step(1000)
    two.memory(0)[:] = one.memory(0)
    two.set_state(one.state())
    for machine in (one, two):
        machine.step(1000)
    assert one.digest() == two.digest()
    assert one.state() == two.state()


def test_a_replay_is_carried_in_the_state(make):
    one, two = make(), make()
    one.start_log()
    store(one, 3, 5, 900)
    with one.dirty(0) as lease:
        one.run(Replay(bitmaps=[lease.bitmap]))
    one.step(2)
    two.set_state(one.state())
    two.start_log()
    two.step(1)
    assert dirty(two) == [900]


@pytest.mark.parametrize("raw", [b"", b"{}", b"[]", b"\xff", b'{"format":1,"vcpus":[{}]}', b'{"format":1,"vcpus":3}'])
def test_a_bad_state_changes_nothing(make, raw):
    machine = make()
    before = machine.state()
    with pytest.raises(ValueError, match="state"):
        machine.set_state(raw)
    assert machine.state() == before


def test_a_state_of_another_format(make):
    machine = make()
    state = json.loads(machine.state())
    for change, why in (
        ({"format": 2}, "format is 1, not 2"),
        ({"vcpus": state["vcpus"] * 2}, "2 vCPUs, and here are 1"),
    ):
        with pytest.raises(ValueError, match=why):
            machine.set_state(json.dumps(state | change).encode())


def test_the_clock_compares_two_mechanisms_on_one_run(make):
    readings = []
    for hw in (True, False):
        machine = make(size=16 << 20, hw_dbm=hw, thp=False)
        machine.run(Sequential())
        machine.step(4096)
        machine.start_log()
        before = machine.clock.read()
        machine.run(HotSet(seed=1, share=0.1, weight=1.0))
        for _ in range(5):
            machine.step(2000)
            dirty(machine)
        readings.append((machine.clock.read() - before, machine.digest()))
    (hardware, one), (software, two) = readings
    assert one == two  # the same stores
    assert hardware.counts["stores"] == software.counts["stores"] == 10_000
    assert hardware.counts["permission_faults"] == 0
    assert software.counts["permission_faults"] == hardware.counts["hardware_updates"] > 1900
    assert hardware.counts["leaves_read"] > 5 * 4096 > software.counts["leaves_read"]
    assert hardware.guest < software.guest  # the guest gains, and the collector pays
    assert hardware.collector - software.collector == pytest.approx(
        (hardware.counts["leaves_read"] - software.counts["leaves_read"]) * Costs().leaves_read
    )


def test_bursty_and_bad_rates():
    with pytest.raises(ValueError, match=r"rate is a number of 0 to 1e\+15, not -1"):
        Bursty(rate=-1)


def test_hardware_dbm_needs_ha(make):
    machine = make(hw_dbm=False, ha=False)
    with pytest.raises(ValueError, match="needs the hardware's access flag"):
        machine.set_hw_dirty_log(True)
    machine.set_hw_dirty_log(False)


def test_what_faults_for_ever_says_so(make, monkeypatch):
    machine = make()
    monkeypatch.setattr(machine.log, "populate", lambda *_, **__: None)
    with pytest.raises(OSError, match=r"a write of gpa 0x40005000 can.t be handled: .* translation fault") as caught:
        store(machine, 5)
    assert caught.value.errno == 14


@pytest.mark.parametrize("hw", [True, False], ids=["hw-dbm", "write-protect"])
def test_the_reference_by_hand_on_blocks_that_are_tracked(make, hw):
    machine = make(hw_dbm=hw, blocks="track")
    reference = ReferenceVCpu(machine, split_blocks=False)
    reference.store(GPA + 5 * PAGE, 1)
    machine.start_log()
    reference.flush(0, 0, 1024)
    assert reference.load(GPA + 5 * PAGE) == 1
    reference.store(GPA + 7 * PAGE, 2)
    assert reference.tlb == {(0, 2, 0): Cached.WRITABLE}
    assert state(machine, 7, level=2) is (State.WRITABLE_DIRTY if hw else State.UNTRACKED)
    assert dirty(machine) == list(range(512))
    assert reference.faults["permission"] == (0 if hw else 1)
    with pytest.raises(OSError, match=r"0x50000000 can.t be handled: no slot is there"):
        reference.load(0x5000_0000)


@pytest.mark.parametrize("thp", [False, True])
def test_the_reference_keeps_what_was_not_flushed(make, thp):
    """A write goes by what is cached of a leaf, whatever the leaf says by now: that is why there is a flush."""
    machine = make(thp=thp)
    reference, s2 = ReferenceVCpu(machine, thp=thp), machine.log.stage2(0)
    machine.start_log()
    reference.store(GPA + 5 * PAGE, 1)
    s2.clean(s2.dirty())
    reference.store(GPA + 5 * PAGE, 2)  # writable, as it was
    assert not s2.dirty().any()
    reference.flush(0, 5, 1)
    reference.store(GPA + 5 * PAGE, 3)
    assert 5 in s2.dirty().pages()


def test_a_context_ends_the_machine():
    with Machine() as machine:
        machine.add_memslot(PAGE)
        machine.run(Sequential())
        machine.resume()
        assert repr(machine).startswith("<Machine: 1 vCPUs, 0 MiB in 1 slots")
        machine.add_memslot(5 << 20)
        assert repr(machine).startswith("<Machine: 1 vCPUs, 5 MiB in 2 slots")
    assert not machine.running
    assert machine.space.regions == ()


def test_frames_run_out():
    with pytest.raises(MemoryError, match="5 frames from 0x1 on"):
        FramePool(1, 5).take(5)


def test_which_entries_a_tlb_evicts_goes_by_the_seed_the_vcpu_and_the_slot(make):
    machine = make(vcpus=2, seed=3, tlb_entries=4)
    machine.add_memslot(4 << 20, GPA + (1 << 30), slot=5)
    for number, vcpu in enumerate(machine.vcpus):
        for slot, tlb in vcpu.tlb.items():
            expected = np.random.default_rng(3 + (number << 16) + slot).bit_generator.state
            assert tlb._rng.bit_generator.state == expected, (number, slot)
