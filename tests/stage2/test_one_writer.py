"""`Leaves` is the only writer of descriptors: all tests run under `onewriter`, and here it is shown to bite."""

import ast
import re
from pathlib import Path
from types import FunctionType

import numpy as np
import pytest

import hwdbm
from hwdbm import Stage2, pte
from hwdbm.dirtylog import faults, mechanism
from hwdbm.image import fill
from hwdbm.machine import Machine, Uniform, blocks, mmu
from hwdbm.stage2 import stage2
from hwdbm.stage2.leaves import Leaves

# What numpy.ufunc.at writes: bitmaps, in the kernels, which Leaves calls, what they were given, and levels of links.
BITMAPS = {
    ("bitmap.py", "octets"),
    ("bitmap.py", "self.words"),
    ("dirtylog/faults.py", "live.words"),
    ("fleet/planner.py", "others"),
    ("kernels/vector.py", "entries"),
    ("kernels/vector.py", "words"),
    ("kvm/log.py", "octets"),
}


def made():
    s2 = Stage2(1024)
    s2.map(0, 1024, pfn=0, dbm=True)
    return s2


def by_level(s2):
    s2.level(3)[7] |= np.uint64(pte.S2AP_W)


def by_leaves(s2):
    s2._leaves.level[3][7] |= np.uint64(pte.S2AP_W)


def by_copyto(s2):
    np.copyto(s2.level(2), 0)


def by_out(s2):
    entries = s2.level(3)
    np.bitwise_or(entries, np.uint64(pte.AF), out=entries)


def by_kernel(s2):
    s2._leaves.kernels.set_at(s2.level(3), np.array([7]), np.array([pte.AF], dtype=np.uint64))


@pytest.mark.parametrize("module", [blocks, faults, fill, mechanism, mmu, stage2], ids=lambda module: module.__name__)
@pytest.mark.parametrize("write", [by_level, by_leaves, by_copyto, by_out, by_kernel])
def test_a_write_by_hand_is_caught(module, write, kernels):
    """The same function as if `module` had it."""
    names = {**vars(module), "np": np, "pte": pte}
    s2 = made()
    before = s2.level(3).copy()
    with pytest.raises(Exception, match=r"(?i)read-?only|writ|layout|readonly"):
        FunctionType(write.__code__, names)(s2)
    assert (s2.level(3) == before).all()
    write(s2)  # a test's own is let through


def test_a_machine_writes_through_leaves_alone():
    """Stores, faults, copies, splits, collapses, harvests and switches: each under a writer that is looked after."""
    found = Leaves.__dict__["level"]
    with Machine(thp=True, blocks="write") as machine:
        slot = machine.add_memslot(8 << 20, gpa=0x4000_0000, shared=True)
        machine.run(Uniform(seed=1))
        before = found.handed
        for mode in (False, True, False):
            machine.start_log()
            machine.step(2000)
            machine.dirty(slot.id).commit()
            machine.share(slot.id, 0, 100)
            machine.reclaim(slot.id, 100, 100)
            machine.write(0x4000_0000, b"device")
            machine.set_hw_dirty_log(mode)
            machine.step(2000)
            machine.stop_log()
        machine.verify()
        assert found.handed > before + 100


def test_a_hand_in_the_mmu_is_caught(monkeypatch):
    """A mutant: the machine's MMU sets the dirty state itself, as it once did."""

    def mmu_update(self, level, index, bits):
        self.level(level)[index] |= bits

    monkeypatch.setattr(Stage2, "mmu_update", FunctionType(mmu_update.__code__, vars(stage2)))
    with Machine() as machine:
        machine.add_memslot(1 << 20, gpa=0)
        machine.start_log()
        with pytest.raises(ValueError, match="read-only"):
            machine.vcpus[0].store(np.array([0]), np.array([1], dtype=np.uint64))


@pytest.mark.slow
def test_what_asks_no_flag_is_only_used_on_bitmaps():
    """`numpy.ufunc.at` writes arrays that are read-only, too."""
    root = Path(hwdbm.__file__).parent
    calls = [
        (path.relative_to(root).as_posix(), ast.unparse(node.args[0]))
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and re.fullmatch(r"np\.\w+\.at", ast.unparse(node.func))
    ]
    assert set(calls) == BITMAPS
