"""The picture of an image's slots shows their pages' states, where it says."""

from pathlib import Path

import figures
import pytest
from seen import as_seen

from hwdbm.image import Slot, open_image
from hwdbm.image.picture import draw

ODD = Path(__file__).parents[1] / "data" / "captures" / "4k_ipa40" / "round1.npz"
CASES = {
    "slots": {},
    "folded": {"slots": [Slot(0, 2 << 30, 32 << 30)]},
    "many-slots": {"slots": [Slot(n, (2 << 30) + (n << 21), 33 << 12) for n in range(18)]},
}


@pytest.mark.parametrize("case", CASES)
def test_a_picture_shows_what_the_one_that_was_looked_at_shows(case, monkeypatch, tmp_path):
    found = figures.drawn(monkeypatch)
    image = open_image(ODD, **CASES[case])
    draw(tmp_path / "a.png", "round1", image, [image.stage2(slot.id) for slot in image.slots])
    as_seen(f"pictures/{case}.txt", *found)
