"""Kernels belong to the array: the choice for the process is only what a new array of one owner gets."""

from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import numpy as np
import pytest

import hwdbm
from hwdbm import DirtyBitmap, DirtyLog, Stage2, pte
from hwdbm.kernels import Kernels, atomic, fused, vector
from hwdbm.testing import differences

MODULES = {"vector": vector, "fused": fused, "shared": atomic}
FUNCTIONS = [name for name in vars(Kernels) if not name.startswith("_")]
NPAGES = 3 * 512 + 77


def made(name: str) -> Stage2:
    return Stage2(NPAGES, base_gfn=300, shared=True) if name == "shared" else Stage2(NPAGES, base_gfn=300, kernels=name)  # type: ignore[arg-type]


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the implementations whose functions leaves call, as they do."""
    names: list[str] = []

    def recorded(name: str, module: ModuleType) -> Kernels:
        def recorder(function: str):
            def call(*arguments, **options):
                names.append(name)
                return getattr(module, function)(*arguments, **options)

            return call

        functions = {function: staticmethod(recorder(function)) for function in FUNCTIONS}
        return type("Recorded", (), functions | {"__name__": module.__name__})()

    kinds = {name: recorded(name, module) for name, module in MODULES.items()}
    monkeypatch.setattr("hwdbm.stage2.stage2.named", kinds.__getitem__)
    monkeypatch.setattr("hwdbm.stage2.stage2.shared_kernels", lambda: kinds["shared"])
    return names


def some_of_everything(s2: Stage2, seed: int) -> list[object]:
    """Call each kind of verb, and return what came back."""
    rng = np.random.default_rng(seed)
    first = s2.base_gfn
    s2.map(first + 212, 512, pfn=512, level=2, dbm=True)
    s2.map(first, 200, pfn=7)
    s2.map(first + 724, 400, pfn=np.arange(400), dbm=True)
    answers: list[object] = [s2.enable_dbm()]
    pages = rng.choice(NPAGES, 90, replace=False)
    found = s2.leaf_at(pages)
    for level in (2, 3):
        index = np.unique(found.index[found.level == level])
        s2.mmu_update(level, index, np.full(index.size, pte.S2AP_W, dtype=np.uint64))
    mask = DirtyBitmap.from_pages(rng.choice(NPAGES, 300, replace=False), NPAGES)
    answers += [s2.clean(mask), s2.split(first + 300, 1), s2.wrprotect(first + 100, 50), s2.harvest().pages().tolist()]
    answers += [s2.relax_at(pages, dbm=True), s2.dirty().pages().tolist(), s2.disable_dbm(), s2.mkold()]
    answers += [s2.collapse(first, NPAGES), s2.take_host_dirty().pages().tolist()]
    s2.unmap(first + 30, 60)
    s2.verify()
    return answers


@pytest.mark.parametrize("name", MODULES)
def test_each_array_is_worked_on_by_its_own_kernels(name: str, called: list[str]) -> None:
    some_of_everything(made(name), 1)
    # Bitmaps of one owner are merged by `vector`, whatever the leaves have.
    assert set(called) == {name}


def test_arrays_with_different_kernels_side_by_side() -> None:
    several = [made(name) for name in MODULES for _ in range(2)]
    expected = [some_of_everything(made("vector"), seed) for seed in range(4)]
    for seed in range(4):  # a verb of one, a verb of the next
        assert [some_of_everything(s2, seed) for s2 in several] == [expected[seed]] * len(several)
        assert all(differences(several[0], s2) == [] for s2 in several)
        for s2 in several:
            s2.unmap(s2.base_gfn, NPAGES)
            s2.harvest()
            s2.take_host_dirty()
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda s2: some_of_everything(s2, 2), several)) == [expected[2]] * len(several)


def test_use_is_for_arrays_that_none_has_worked_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hwdbm.kernels, "_active", [])
    hwdbm.kernels.use("vector")
    old = Stage2(100)
    old.map(0, 100, pfn=0)
    given, twin, log = Stage2(100, kernels="vector"), old.copy(), DirtyLog()
    log.set_memory_region(0, 1, 0, 1 << 20, 0)
    hwdbm.kernels.use("fused")
    new = Stage2(100)
    for s2, kernels in ((old, vector), (twin, vector), (given, vector), (new, fused), (made("shared"), atomic)):
        assert s2._leaves.kernels is kernels
        assert s2.copy()._leaves.kernels is kernels
    assert hwdbm.kernels.current() == "fused"
