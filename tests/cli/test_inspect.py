"""``hwdbm inspect``: registers, counts, and the picture."""

import json
from pathlib import Path

import numpy as np
import pytest
from synthetic import Geometry, Tables

from hwdbm import Granule, Stage2, pte
from hwdbm.image import Slot, open_image
from hwdbm.image.picture import map_of
from hwdbm.pte import State

CAPTURES = Path(__file__).parents[1] / "data" / "captures"
ODD = CAPTURES / "4k_ipa40" / "round1.npz"
KVM = CAPTURES / "kvm-6.1" / "manual-4-get.npz"
EVERY = sorted(CAPTURES.glob("*/*.npz"))
LEAVES = ("read-only", "untracked", "writable-clean", "writable-dirty")


def test_registers(run) -> None:
    result = run("inspect", ODD, "--json")
    assert (result.status, result.err) == (0, "")
    registers = json.loads(result.out)["registers"]
    assert registers["VTTBR_EL2"] == {
        "value": "0x002a000041000000",
        "BADDR": "0x0000000041000000",
        "VMID": 42,
        "CnP": 0,
    }
    vtcr = registers["VTCR_EL2"]
    assert (vtcr["value"], vtcr["granule"], vtcr["IPA-bits"]) == ("0x00000000806a3558", "4K", 40)
    assert (vtcr["start-level"], vtcr["root-tables"], vtcr["hardware-DBM"]) == (1, 2, "on")
    assert registers["HCR_EL2"]["VM"] == 1
    assert registers["ID_AA64MMFR1_EL1"]["hardware-updates"] == "dirty state"


@pytest.mark.parametrize("path", EVERY, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_counts(run, path: Path) -> None:
    """Levels and slots are those of the arrays: of the tables, and of the bitmaps that say what is dirty."""
    report = json.loads(run("inspect", path, "--json").out)
    with np.load(path) as arrays:
        levels, entries = np.unique(arrays["table_level"], return_counts=True)
        assert [at["level"] for at in report["levels"]] == levels.tolist()
        assert [at["tables"] for at in report["levels"]] == entries.tolist()
        for at in report["levels"]:
            data = arrays["table_data"][arrays["table_level"] == at["level"]]
            kinds = [at["absent"], at["table-entries"], *(at[state] for state in LEAVES)]
            assert sum(kinds) == data.size
            assert sum(at[state] for state in LEAVES) == at["leaves"]
            assert at["absent"] == np.count_nonzero(data & np.uint64(1) == 0)
            leaf = data[data & np.uint64(3) == (3 if at["level"] == 3 else 1)]
            assert at["old"] == np.count_nonzero(leaf & np.uint64(pte.AF) == 0)
            assert at["contiguous"] == np.count_nonzero(leaf & np.uint64(pte.CONTIGUOUS))
        image = open_image(path)
        for slot in report["slots"]:
            assert slot["absent"] + sum(slot[state] for state in LEAVES) == slot["pages"]
            assert slot["writable-dirty"] == image.dirty(slot["id"]).weight()
            writable = image.dirty(slot["id"], "writable").weight()
            assert slot["untracked"] == writable - slot["writable-dirty"]
            mapped = arrays.get(f"mapped_slot{slot['id']}")
            if mapped is not None:
                assert slot["pages"] - slot["absent"] == np.bitwise_count(mapped).sum()


def test_text(run) -> None:
    result = run("inspect", KVM)
    assert (result.status, result.err) == (0, "")
    for text in ("VTTBR_EL2        0x0002000048380001", "hardware-DBM=off", "writable-dirty", "0x00000000c0400000"):
        assert text in result.out
    assert "\x1b" not in result.out
    assert max(map(len, result.out.splitlines())) < 140


def test_raw_image_needs_no_slots(run, tmp_path: Path) -> None:
    g = Geometry(16, 2, 40)
    tables = Tables(g)
    tables.leaf(0, 2, 1 << 51)
    ram_base, image = tables.raw()
    (tmp_path / "ram.img").write_bytes(image)
    args = [tmp_path / "ram.img", "--ram-base", ram_base, "--vttbr", g.vttbr(tables.root), "--vtcr", g.vtcr]
    result = run("inspect", *args)
    assert result.status == 0
    assert "512M" in result.out
    assert "ID_AA64MMFR1_EL1" not in result.out
    result = run("inspect", *args, "--plot", tmp_path / "a.png")
    assert result.status == 1
    assert "no slots to draw" in result.err


class TestPlot:
    @pytest.mark.parametrize("path", [ODD, CAPTURES / "16k_ipa40" / "round1.npz"], ids=lambda p: p.parent.name)
    def test_is_a_picture(self, run, path: Path, tmp_path: Path) -> None:
        from matplotlib.image import imread

        result = run("inspect", path, "--plot", tmp_path / "a.png")
        assert (result.status, result.err) == (0, "")
        picture = (imread(tmp_path / "a.png")[:, :, :3] * 255).round().astype(int)
        for colour in ("e8e8e8", "56b4e9", "f0e442", "009e73", "d55e00"):
            rgb = np.array(list(bytes.fromhex(colour)))
            assert (picture == rgb).all(axis=2).sum() > 500, colour

    def test_the_ending_says_what_is_drawn(self, run, tmp_path: Path) -> None:
        assert run("inspect", ODD, "--plot", tmp_path / "a.svg").status == 0
        assert (tmp_path / "a.svg").read_text().startswith("<?xml")
        for name in ("a.pdf", "a", "no/a.png"):
            result = run("inspect", ODD, "--plot", tmp_path / name)
            assert (result.status, result.out) == (2, ""), name
        assert [path.name for path in tmp_path.iterdir()] == ["a.svg"]

    def test_cannot_be_written(self, run, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        result = run("inspect", ODD, "--plot", tmp_path / "file" / "a.png")
        assert result.status == 2
        assert "Traceback" not in result.err

    def test_huge_slot(self, run, tmp_path: Path) -> None:
        """Of 32 GiB, mostly not mapped, a cell stands for many pages."""
        assert run("inspect", ODD, "--slot", "0:0x80000000:32G", "--plot", tmp_path / "a.png").status == 0
        assert (
            map_of(
                open_image(ODD, slots=[Slot(0, 2 << 30, 32 << 30)]).stage2(0), Slot(0, 2 << 30, 32 << 30)
            ).pages_per_cell
            == 128
        )

    @pytest.mark.slow
    def test_many_slots(self, run, tmp_path: Path) -> None:
        slots = [arg for i in range(40) for arg in ("--slot", f"{i}:{(2 << 20) + i * 64}K:64K")]
        assert run("inspect", ODD, *slots, "--plot", tmp_path / "a.png").status == 0


class TestMap:
    @pytest.mark.parametrize("granule", Granule, ids=str)
    @pytest.mark.parametrize("npages", [1, 31, 1000, 5000])
    def test_dirtiest_wins(self, granule: Granule, npages: int) -> None:
        rng = np.random.default_rng(npages)
        stage2 = Stage2(npages, base_gfn=3, granule=granule)
        stage2.map(3, npages, 0)
        states = rng.choice([0, pte.S2AP_W, pte.DBM, pte.DBM | pte.S2AP_W], npages, p=[0.9, 0.05, 0.04, 0.01])
        stage2.level(3)[:] = 3 | states.astype(np.uint64)
        slot = Slot(0, 3 * granule.page_size, npages * granule.page_size)
        wanted = [int(pte.state(int(entry), 3)) for entry in stage2.level(3)]
        for most in (1 << 16, 100, 1):
            of = map_of(stage2, slot, most)
            cells = of.cells.reshape(-1)
            per = of.pages_per_cell
            expected = [max(wanted[i : i + per]) for i in range(0, npages, per)]
            assert len(expected) <= most
            assert cells[: len(expected)].tolist() == expected
            assert (cells[len(expected) :] == -1).all()
            assert of.counts.tolist() == np.bincount(wanted, minlength=len(State)).tolist()

    def test_blocks_and_odd_edges(self) -> None:
        """Of a slot that isn't made of whole granules, pages are of 4 KiB."""
        stage2 = Stage2(2048 + 4, base_gfn=2046, granule=Granule.K16)
        stage2.map(2048, 2048, 0, level=2, dbm=True)
        of = map_of(stage2, Slot(0, (2046 << 14) + 4096, (2050 << 14)))
        cells = of.cells.reshape(-1)
        assert of.page_size == 4096
        assert cells[:7].tolist() == [State.ABSENT] * 7
        assert (cells[7 : 7 + 8192] == State.WRITABLE_CLEAN).all()
        assert of.counts[State.WRITABLE_CLEAN] == 8192
        assert of.counts.sum() == 2050 * 4

    def test_states_come_in_chunks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("hwdbm.image.census._CHUNK", 96)
        self.test_blocks_and_odd_edges()
        self.test_dirtiest_wins(Granule.K4, 1000)
