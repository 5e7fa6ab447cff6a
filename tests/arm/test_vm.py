"""The Arm machine as a VM: its log misses nothing, whatever writes, and it goes on where it was migrated to."""

import threading
import time
from errno import EBUSY, ENOENT

import numpy as np
import pytest
from armjudge import CERTAIN, Judge

from hwdbm.arm import ArmVm, GuestMemoryError
from hwdbm.arm.abi import GuestKind
from hwdbm.arm.guest import PRIVATE, private_size
from hwdbm.errors import StaleLeaseError
from hwdbm.granule import Granule
from hwdbm.memslot import Memslot
from hwdbm.snapshot import rebase_all, write_diff, write_full
from hwdbm.vm import Durable, Provable, Shareable, Source

MEMORY = 4 << 20


def collector(vm, slot=0):
    def collect(copy):
        with vm.dirty(slot) as lease:
            copy(lease.bitmap)
            return lease.bitmap

    return collect


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) for kind in (*CERTAIN, "atomics")] + ["stage1"]
)
def test_each_kind_of_guest_is_tracked_while_it_writes(kind):
    with ArmVm(MEMORY, vcpus=2, guest=kind, window=64) as vm:
        vm.start_log()
        judge = Judge(vm.board, vm.guests, vm.memory(0), collector(vm))
        for _ in range(4):
            missed, spurious, stale = judge.round()
            assert (missed, stale) == (0, 0)
            if kind in CERTAIN:
                assert spurious == 0
        assert judge.stores >= 8000
        assert all(vm.board.vcpu(number).faults == 0 for number in range(2))
        if kind == "stage1":
            assert all(task.walked > 100 for task in vm.guests.tasks), "no hardware update of stage 1 was seen"


def test_the_pair_of_invalidations_is_a_flush_too():
    """IPAS2E1IS for the pages that are dirty, DSB, VMALLE1IS, DSB: also of a guest with a stage 1 of its own."""
    with ArmVm(MEMORY, guest=["window", "stage1"], window=16) as vm:
        vm.start_log()
        s2, base = vm.stage2(0), vm.slots[0].base_gfn

        def collect(copy):
            found = s2.harvest()
            for first, count in found.ranges().tolist():
                vm.board.flush_range(base + first << 12, count << 12)
            copy(found)
            return found

        judge = Judge(vm.board, vm.guests, vm.memory(0), collect)
        for _ in range(3):
            missed, _, stale = judge.round(harvests=2)
            assert (missed, stale) == (0, 0)


def test_without_the_flush_pages_are_missed():
    """The judge can say no: a board whose flush does nothing."""
    with ArmVm(MEMORY, guest="window", window=8) as vm:
        vm.start_log()
        vm.board.flush = lambda: None
        judge = Judge(vm.board, vm.guests, vm.memory(0), collector(vm))
        until = time.monotonic() + 30
        while not sum(judge.round()[:1]) and time.monotonic() < until:
            pass
        assert time.monotonic() < until


@pytest.mark.slow
def test_splits_collapses_and_unmaps_while_it_writes():
    """Break-before-make over the doorbell; a guest that meets a gap tries again until it is closed."""
    with ArmVm(8 << 20, vcpus=3, guest="mixed", blocks=True) as vm:
        s2, base = vm.stage2(0), vm.slots[0].base_gfn
        assert s2.block_spans().tolist() == [[0, 2048]]
        s2.enable_dbm()
        vm.board.flush()

        def collect(copy):
            found = s2.harvest()
            vm.board.flush()
            copy(found)
            return found

        judge = Judge(vm.board, vm.guests, vm.memory(0), collect)
        rng, stop, done = np.random.default_rng(1), threading.Event(), []

        def change():
            while not stop.is_set():
                what, page = rng.integers(3), int(rng.integers(2000))
                if what == 0:
                    done.append(s2.split(base + page, 48))
                elif what == 1:
                    done.append(s2.collapse(base, 2048))
                else:
                    pages = 1 + int(rng.integers(40))
                    leaves = s2.leaf_at(np.arange(page, page + pages))
                    if (leaves.level == 3).all():
                        s2.unmap(base + page, pages)
                        vm.board.flush()
                        s2.map(base + page, pages, leaves.desc.astype(np.int64) >> 12 & (1 << 36) - 1, dbm=True)

        thread = threading.Thread(target=change)
        thread.start()
        try:
            for _ in range(6):
                missed, _, stale = judge.round(stores=3000)
                assert (missed, stale) == (0, 0)
        finally:
            stop.set()
            thread.join()
        assert sum(done) > 10
        assert sum(vm.board.vcpu(number).faults for number in range(3)) > 0
        s2.verify()


@pytest.mark.slow
@pytest.mark.parametrize(("granule", "blocks"), [(Granule.K4, False), (Granule.K16, False), (Granule.K4, True)])
def test_it_goes_on_where_it_arrives(granule, blocks):
    """What a migration does, by hand: the memory by the log, then the registers."""
    with ArmVm(MEMORY, guest=["sequential", "window"], granule=granule, blocks=blocks) as vm:
        vm.memory(0).view(np.uint64)[:] = np.random.default_rng(0).integers(1 << 63, size=MEMORY // 8)
        with ArmVm.from_slots(vm.page_size, vm.slots, blocks=blocks) as there:
            assert isinstance(vm, Source)
            assert isinstance(vm, Shareable)
            assert isinstance(vm, Provable)
            assert not isinstance(vm, Durable)
            vm.start_log()
            for slot in vm.slots:
                there.memory(slot.id)[:] = vm.memory(slot.id)
            vm.resume()
            for last in (False, False, False, True):
                time.sleep(0.02)
                if last:
                    vm.pause()
                for slot in vm.slots:
                    with vm.dirty(slot.id) as lease:
                        for first, count in (lease.bitmap.ranges() * vm.page_size).tolist():
                            there.memory(slot.id)[first : first + count] = vm.memory(slot.id)[first : first + count]
            assert there.digest() == vm.digest()
            there.set_state(vm.state())
            stores = there.guests.stores
            assert stores == vm.guests.stores > 0
            there.resume()
            there.prove()
            there.pause()
            assert there.guests.stores > stores
            there.check()
            lease = vm.dirty(0)
            vm.stop_log()
            with pytest.raises(StaleLeaseError):  # what a log lent isn't the next one's
                lease.commit()
            if blocks:
                assert vm.stage2(0).block_spans().tolist() == [[0, MEMORY // vm.page_size]]


def test_snapshots(tmp_path):
    """A full one, and what was written since, laid over it: that is the memory."""
    with ArmVm(MEMORY, guest="mixed", vcpus=3, granule=Granule.K16) as vm:
        write_full(vm, tmp_path / "full")
        for name in ("one", "two"):
            vm.resume()
            time.sleep(0.05)
            vm.pause()
            write_diff(vm, tmp_path / name)
        rebase_all(tmp_path / "full", [tmp_path / "one", tmp_path / "two"])
        found = (tmp_path / "full").read_bytes()
        assert found == b"".join(vm.memory(slot.id).tobytes() for slot in sorted(vm.slots, key=lambda slot: slot.id))


def test_a_guest_that_only_faults_is_said_so(monkeypatch):
    monkeypatch.setattr("hwdbm.vm.base._PROOF", 0.3)
    with ArmVm(MEMORY, guest="sequential", vcpus=1) as vm:
        vm.stage2(0).unmap(vm.slots[0].base_gfn, 1024)
        vm.board.flush()
        vm.resume()
        with pytest.raises(OSError, match=r"vCPU 0 faulted \d+ times, last at ipa 0x80000040 \(ESR_EL2 0x9"):
            vm.prove()
        vm.pause()


def test_a_guest_with_a_rate_goes_on_in_a_younger_machine():
    """Its clock is that of the machine: it doesn't wait for the one that it came from."""
    with ArmVm(MEMORY, guest="window", rate=500, vcpus=2) as vm:
        vm.board.shared.rate[1] = 700
        time.sleep(1.5)
        vm.resume()
        time.sleep(0.1)
        vm.pause()
        with ArmVm.from_slots(vm.page_size, vm.slots) as there:
            for slot in vm.slots:
                there.memory(slot.id)[:] = vm.memory(slot.id)
            there.set_state(vm.state())
            assert list(there.board.shared.rate)[:2] == [250, 700]
            before = there.guests.stores
            there.resume()
            until = time.monotonic() + 1
            while there.guests.stores < before + 20:
                assert time.monotonic() < until
                time.sleep(0.001)
            there.pause()


@pytest.mark.parametrize("page", [4096, 16384, 65536])
def test_memory_that_begins_within_a_block_has_blocks_all_the_same(page, monkeypatch):
    """It lies in memory as it does in the guest's space, as far as blocks go: or the hardware couldn't take any."""
    block, plans = page * page // 8, []
    gpa, size = 0x8000_0000 + block + 3 * page, 3 * block - 4 * page

    def board(ram, plan, *, vcpus):
        plans.extend((each.ipa, each.pa, each.size, each.level) for each in plan.mappings)
        raise ConnectionError

    monkeypatch.setattr("hwdbm.arm.vm.Board", board)
    data = Memslot(0, 0, gpa // page, size // page, 0)
    private = Memslot(1, 0, PRIVATE // page, private_size(data.npages, 1) // page, 0)
    with pytest.raises(ConnectionError):
        ArmVm.from_slots(page, [data, private], blocks=True)
    start, before, pa = gpa, block - 3 * page, 0x8000_0000 + 3 * page
    assert plans[-3:] == [
        (start, pa, before, 3),
        (start + before, pa + before, block, 2),
        (start + before + block, pa + before + block, size - before - block, 3),
    ]
    assert all(each[0] % block == each[1] % block for each in plans if each[3] == 2)


def test_the_rules_of_a_log():
    with ArmVm(MEMORY, guest="sequential", rate=50_000) as vm:
        with pytest.raises(OSError, match="doesn't log") as error:
            vm.dirty(0)
        assert error.value.errno == ENOENT
        vm.start_log()
        with vm.client("backup") as client:
            with pytest.raises(OSError, match="backup") as error:
                vm.client("backup")
            assert error.value.errno == EBUSY
            vm.write(0x8000_5000, b"device")
            lease = client.take(0)
            assert lease.bitmap.pages().tolist() == [5]
            lease.rollback()
            for take in (client.take, vm.dirty):
                with take(0) as lease:
                    assert lease.bitmap.pages().tolist() == [5]
            with client.take(0) as lease:
                assert not lease.bitmap.any()
        # A flush that fails is due still, and what was harvested isn't lost.
        vm.resume()
        while vm.guests.stores < 500:
            time.sleep(0.001)
        vm.pause()
        flush, vm.board.flush = vm.board.flush, _fail
        with pytest.raises(OSError, match="no answer"):
            vm.dirty(0)
        vm.board.flush = flush
        with vm.dirty(0) as lease:
            assert lease.bitmap.weight() >= 250
        vm.check()
        vm.memory(0).view(np.uint64)[8] = 0x8000
        with pytest.raises(GuestMemoryError, match="page 0: vCPU 0 wrote it"):
            vm.check()


def _fail():
    raise OSError(5, "no answer")


def test_rate_and_throttle_slow_the_guests_down():
    with ArmVm(MEMORY, guest="random", rate=20_000) as vm:

        def speed():
            before, start = vm.guests.stores, time.monotonic()
            time.sleep(0.2)
            return (vm.guests.stores - before) / (time.monotonic() - start)

        vm.resume()
        assert speed() < 40_000
        vm.set_rate(None)
        free = speed()
        vm.throttle(95)
        time.sleep(0.05)
        assert speed() < free / 2
        vm.pause()


def test_bad_arguments_and_states():
    for wrong in ({"guest": "nobody"}, {"guest": []}, {"vcpus": 8}, {"base": 0x1000}, {"base": 1 << 40}, {"rate": 0}):
        with pytest.raises(ValueError, match=r"\d|nobody|guest"):
            ArmVm(MEMORY, **wrong)
    with pytest.raises(ValueError, match="whole pages of 65536"):
        ArmVm(4096, granule=Granule.K64)
    with ArmVm(MEMORY, guest="idle", vcpus=1) as vm:
        state = vm.state()
        damaged = [state[:at] + bytes([state[at] ^ 1]) + state[at + 1 :] for at in (0, 20, 39)]
        for bad in (b"", state[:-1], *damaged):
            with pytest.raises(ValueError, match="state"):
                vm.set_state(bad)
        hcr = bytearray(state)
        at = state.rindex((1 << 31 | 0x39 | 1 << 12).to_bytes(8, "little"))
        hcr[at : at + 8] = (1 << 31).to_bytes(8, "little")  # no stage 2: all of the machine's memory
        with pytest.raises(ValueError, match="HCR_EL2 = 0x80000000"):
            vm.set_state(bytes(hcr))
        assert vm.state() == state
        vm.resume()
        with pytest.raises(RuntimeError, match="running"):
            vm.state()
        vm.pause()
        with pytest.raises(ValueError, match="slots 0 and 1"):
            ArmVm.from_slots(4096, vm.slots[:1])
        assert vm.guests.tasks[0].kind == GuestKind.IDLE
    vm.close()
