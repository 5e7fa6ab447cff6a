"""Captures of running machines: what is read is what the machine, the kernel, and the guest's memory say."""

from pathlib import Path

import numpy as np
import pytest

from hwdbm import DirtyBitmap, Granule, Stage2, pte
from hwdbm.image import Image, open_image
from hwdbm.image.runs import widen

CAPTURES = Path(__file__).parents[1] / "data" / "captures"
DBM = sorted(CAPTURES.glob("*/round*.npz"))
KVM = sorted(CAPTURES.glob("kvm-*/*.npz"))
MANUAL = {path.stem: path for path in KVM}


def bitmap(arrays: np.lib.npyio.NpzFile, name: str, npages: int) -> DirtyBitmap:
    return DirtyBitmap.from_bytes(arrays[name].tobytes(), npages)


def gfns_in(arrays: np.lib.npyio.NpzFile, name: str, gfn: int, npages: int) -> DirtyBitmap:
    gfns = arrays[name]
    inside = gfns[(gfns >= gfn) & (gfns < gfn + npages)].astype(np.int64)
    return DirtyBitmap.from_pages(inside - gfn, npages)


def slots_of(path: Path) -> list[tuple[int, int, int]]:
    with np.load(path) as arrays:
        return [(int(i), int(gfn), int(n)) for i, gfn, n in arrays["memslots"]]


def test_all_are_here() -> None:
    assert len(DBM) == 3
    assert [name.partition("-")[2] for name in sorted(MANUAL)] == [
        "1-nolog",
        "2-logon",
        "3-ran",
        "4-get",
        "5-clear",
        "6-ran",
    ]


@pytest.mark.parametrize(("granule", "entries"), [(Granule.K4, 16), (Granule.K16, 128), (Granule.K64, 32)], ids=str)
def test_a_contiguous_run_is_widened(granule: Granule, entries: int) -> None:
    """Of a slot that begins and ends in the middle of a run; leaves without the bit speak for themselves."""
    s2 = Stage2(3 * entries, entries // 2, granule)
    s2.map(s2.base_gfn, s2.npages, pfn=s2.base_gfn, dbm=True)
    s2.level(3)[: entries // 2 + entries] |= np.uint64(pte.CONTIGUOUS)
    bitmap = DirtyBitmap.from_pages([1, entries, 2 * entries], s2.npages)
    widen(bitmap, s2)
    assert bitmap.ranges().tolist() == [[0, entries // 2 + entries], [2 * entries, 1]]
    blocks = Stage2(granule.pages_per_entry(2) * 64, 0, granule)
    blocks.map(0, blocks.npages, pfn=0, level=2, dbm=True)
    blocks.level(2)[:] |= np.uint64(pte.CONTIGUOUS)
    bitmap = DirtyBitmap.from_pages([blocks.npages - 1], blocks.npages)
    widen(bitmap, blocks)
    run = granule.contiguous_entries(2) * granule.pages_per_entry(2)
    assert bitmap.ranges().tolist() == [[blocks.npages - run, run]]


@pytest.mark.parametrize("path", DBM, ids=lambda path: path.parent.name)
class TestHardwareDbm:
    def test_dirty_is_what_was_expected(self, path: Path) -> None:
        image = open_image(path)
        with np.load(path) as arrays:
            for slot, _, npages in slots_of(path):
                expected = bitmap(arrays, f"expected_dirty_slot{slot}", npages)
                assert image.dirty(slot, page_size=4096, contiguous=False) == expected
                assert image.truth(image.slot(slot)) == expected
                wide = bitmap(arrays, f"expected_dirty_cont_slot{slot}", npages)
                assert image.dirty(slot, page_size=4096) == wide
                assert image.truth(image.slot(slot), contiguous=True) == wide
                untracked = bitmap(arrays, f"nodbm_writable_slot{slot}", npages)
                writable = image.dirty(slot, "writable", 4096, contiguous=False)
                assert writable == expected | untracked
                assert image.truth(image.slot(slot), "writable") == writable

    def test_no_write_was_lost(self, path: Path) -> None:
        """What the guest wrote is dirty, or was never tracked."""
        image = open_image(path)
        with np.load(path) as arrays:
            for slot, gfn, npages in slots_of(path):
                written = gfns_in(arrays, "written_gfn", gfn, npages)
                untracked = bitmap(arrays, f"nodbm_writable_slot{slot}", npages)
                assert written.any()
                assert (written - untracked).issubset(image.dirty(slot, page_size=4096))

    def test_no_changed_memory_was_lost(self, path: Path) -> None:
        """Physical pages that changed, found without the tables, are mapped by dirty or untracked leaves."""
        image = open_image(path)
        with np.load(path) as arrays:
            changed = arrays["changed_backing_pfn"]
        mapped = []
        for stage2 in image.stage2s().values():
            for level in (1, 2, 3):
                entries = stage2.level(level)
                leaves = entries[pte.writable(level)(entries)]
                first = pte.output_address(leaves, image.granule.shift(level)) >> np.uint64(12)
                pages = np.arange((1 << image.granule.shift(level)) >> 12, dtype=np.uint64)
                mapped.append((first[:, None] + pages).ravel())
        assert changed.size
        assert np.isin(changed, np.concatenate(mapped)).all()

    def test_undoing_the_diff_gives_the_round_before(self, path: Path, tmp_path: Path) -> None:
        with np.load(path) as loaded:
            arrays = dict(loaded)
        for entry, before, after in arrays["diff"].tolist():
            (table,) = np.flatnonzero(
                (arrays["table_pa"] <= entry) & (entry < arrays["table_pa"] + 8 * arrays["table_data"].shape[1])
            )
            index = (entry - int(arrays["table_pa"][table])) // 8
            assert int(arrays["table_data"][table, index]) == after
            arrays["table_data"][table, index] = before
        np.savez(tmp_path / "before.npz", **arrays)
        now, then = open_image(path), open_image(tmp_path / "before.npz")
        for slot, _, npages in slots_of(path):
            new = bitmap(arrays, f"new_dirty_slot{slot}", npages)
            earlier = then.dirty(slot, page_size=4096)
            assert earlier.issubset(now.dirty(slot, page_size=4096))
            assert now.dirty(slot, page_size=4096) - earlier == new

    def test_stage2s_hold_and_are_harvested_once(self, path: Path) -> None:
        image = open_image(path)
        for slot, stage2 in image.stage2s().items():
            stage2.verify()
            assert stage2.harvest() == image.dirty(slot)
            assert not stage2.harvest().any()

    def test_every_leaf_of_the_layout(self, path: Path) -> None:
        image = open_image(path)
        stage2s = image.stage2s()
        with np.load(path) as arrays:
            names = arrays["kind_names"].tolist()
            layout = [arrays[f"leaf_{what}"].tolist() for what in ("ipa", "size", "kind", "dirty")]
        seen = 0
        for ipa, size, kind, dirty in zip(*layout, strict=True):
            for slot in image.slots:
                if slot.gpa <= ipa < slot.end:
                    level = next(n for n in (1, 2, 3) if 1 << image.granule.shift(n) == size)
                    entry = stage2s[slot.id].level(level)[
                        (ipa >> image.granule.shift(level)) - (slot.gpa >> image.granule.shift(level))
                    ]
                    hole = names[kind].startswith("hole")
                    assert pte.leaf(level)(int(entry)) is not hole
                    assert pte.dirty(level)(int(entry)) is bool(dirty)
                    seen += 1
        assert seen > 90


@pytest.mark.parametrize("path", KVM, ids=lambda path: path.stem)
def test_kvm_writable_and_mapped(path: Path) -> None:
    image = open_image(path)
    assert not image.vtcr.hw_dbm
    stage2s = image.stage2s()
    with np.load(path) as arrays:
        assert int(arrays["page_size"]) == image.granule.page_size
        for slot, _, npages in slots_of(path):
            writable = bitmap(arrays, f"s2w_slot{slot}", npages)
            assert image.dirty(slot, "writable") == writable
            assert image.truth(image.slot(slot), "writable") == writable
            mapped = stage2s[slot].scan(pte.leaf)
            assert mapped == bitmap(arrays, f"mapped_slot{slot}", npages)
            assert not image.dirty(slot).any()
            stage2s[slot].verify()


@pytest.mark.parametrize("slot", [0, 4])
@pytest.mark.parametrize("phase", ["manual-4-get", "manual-6-ran"])
def test_kvm_log_is_what_is_writable(phase: str, slot: int) -> None:
    """Without DBM, while a slot is logged, a leaf is writable exactly if the kernel's log says dirty."""
    image = open_image(MANUAL[phase])
    npages = image.slot(slot).size // 4096
    with np.load(MANUAL[phase]) as arrays:
        log = bitmap(arrays, f"kvm_bitmap_slot{slot}", npages)
    assert log.any()
    assert image.dirty(slot, "writable") == log


@pytest.mark.parametrize("slot", [0, 4])
def test_kvm_clears_are_mask_exact(slot: int) -> None:
    """What CLEAR_DIRTY_LOG was asked to clean is clean afterwards, and nothing else is."""
    before, after = (open_image(MANUAL[f"manual-{phase}"]) for phase in ("4-get", "5-clear"))
    with np.load(MANUAL["manual-5-clear"]) as arrays:
        clears = [(int(a), int(n)) for i, a, n in arrays["clears"] if i == slot]
    expected = before.dirty(slot, "writable")
    for first, npages in clears:
        expected.set_range(first, npages, False)
    assert clears
    assert after.dirty(slot, "writable") == expected


@pytest.mark.parametrize("path", [path for path in KVM if path.stem.endswith("ran")], ids=lambda path: path.stem)
def test_kvm_no_write_was_lost(path: Path) -> None:
    image = open_image(path)
    with np.load(path) as arrays:
        for slot, _, npages in slots_of(path):
            written = bitmap(arrays, f"written_slot{slot}", npages)
            assert written.issubset(image.dirty(slot, "writable"))


def test_page_sizes() -> None:
    image: Image = open_image(CAPTURES / "16k_ipa40" / "round1.npz")
    fine, own, coarse = (image.dirty(1, page_size=size) for size in (4096, 16384, 1 << 21))
    assert (fine.npages, own.npages, coarse.npages) == (4096, 1024, 8)
    assert own == image.dirty(1)
    assert own.refine(4) == fine
    assert own.coarsen(128) == coarse
