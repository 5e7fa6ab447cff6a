"""The picture of an image's slots shows their pages' states, where it says."""

from pathlib import Path

import figures
import numpy as np
import pytest
from seen import as_seen

from hwdbm import Granule, Stage2, pte
from hwdbm.image import Slot, census, open_image
from hwdbm.image.census import page_states
from hwdbm.image.picture import draw, map_of
from hwdbm.pte import State

ODD = Path(__file__).parents[1] / "data" / "captures" / "4k_ipa40" / "round1.npz"
CASES = {
    "slots": {},
    "folded": {"slots": [Slot(0, 2 << 30, 32 << 30)]},
    "many-slots": {"slots": [Slot(n, (2 << 30) + (n << 21), 33 << 12) for n in range(18)]},
}


def slot_states(stage2, slot, page_size):
    """Return the state of each page of a slot, one at a time."""
    for at in range(slot.gpa, slot.end, page_size):
        page = (at >> stage2.granule.page_shift) - stage2.base_gfn
        level = stage2.leaf_level(page)
        yield State.ABSENT if level is None else pte.state(int(stage2.leaf_at([page]).desc.item()), level)


@pytest.mark.parametrize("chunk", [5, 512, 1 << 18])
@pytest.mark.parametrize("granule", [Granule.K4, Granule.K16])
def test_a_cell_is_the_dirtiest_of_its_pages(granule, chunk, monkeypatch):
    """Of slots that begin and end inside of a granule or a block, whatever the parts that are looked at."""
    monkeypatch.setattr(census, "_CHUNK", chunk)
    size, odd = granule.page_size, 0 if granule is Granule.K4 else 4096
    slot = Slot(1, 0x7F_F000 // size * size + odd, 700 * 4096 + 3 * odd)
    first, npages = slot.frames(granule)
    stage2, rng = Stage2(npages, first, granule), np.random.default_rng(7)
    stage2.map(first, npages, 0x5000)
    leaf, bits = pte.make_leaf(0x5000 << 16, 3, writable=False), [0, pte.S2AP_W, pte.DBM, pte.DBM | pte.S2AP_W]
    stage2.level(3)[:] = rng.choice(np.array([0, *(leaf | each for each in bits)], dtype=np.uint64), npages)
    if granule is Granule.K4:
        stage2.level(3)[1:513] = 0
        stage2.level(2)[1] = pte.make_leaf(0x4000 << 21, 2, dbm=True)
    page_size = slot.finest(granule)
    states = list(slot_states(stage2, slot, page_size))
    assert np.concatenate(list(page_states(stage2, slot))).tolist() == states
    for most in (1, 5, 256, 1 << 16):
        found, per = map_of(stage2, slot, most), 1
        while per * most < len(states):
            per *= 2
        cells = [max(states[at : at + per]) for at in range(0, len(states), per)]
        assert (found.pages_per_cell, found.page_size) == (per, page_size)
        assert found.cells.ravel().tolist() == cells + [-1] * (found.cells.size - len(cells))
        assert found.counts.tolist() == [states.count(state) for state in State]
    assert len(set(states)) > 3


@pytest.mark.parametrize(
    ("cells", "rows", "width"),
    [
        (1, 1, 32),
        (32, 1, 32),
        (33, 2, 32),
        (256, 8, 32),
        (257, 5, 64),
        (1024, 16, 64),
        (1025, 9, 128),
        (65536, 128, 512),
    ],
)
def test_a_map_is_about_four_times_as_wide_as_high(cells, rows, width):
    assert map_of(Stage2(cells), Slot(0, 0, cells << 12)).cells.shape == (rows, width)


@pytest.mark.parametrize("case", CASES)
def test_a_picture_shows_what_the_one_that_was_looked_at_shows(case, monkeypatch, tmp_path):
    found = figures.drawn(monkeypatch)
    image = open_image(ODD, **CASES[case])
    draw(tmp_path / "a.png", "round1", image, [image.stage2(slot.id) for slot in image.slots])
    as_seen(f"pictures/{case}.txt", *found)
