"""What no map is made of: by the fast form and by the walker, each wrong in one way alone, and nothing is changed."""

import numpy as np
import pytest

from hwdbm import Granule, Stage2, pte, walker
from hwdbm.errors import GfnError

TOP = 1 << 36  # frames of 4 KiB in 48 bits
CASES = {
    "gfn": (3, 512, 0, 2),
    "npages": (512, 511, 0, 2),
    "frame": (512, 512, 3, 2),
    "a frame of an array": (512, 1024, np.array([512, 3]), 2),
    "a frame below": (512, 512, -512, 2),
    "a frame of an array below": (512, 1024, np.array([512, -512]), 2),
    "a frame beyond": (512, 512, TOP, 2),
    "the last frame beyond": (512, 1024, TOP - 512, 2),
    "a frame of an array beyond": (512, 1024, np.array([TOP, 512]), 2),
    "a page beyond": (512, 2, np.array([0, TOP]), 3),
    "a page below": (512, 2, np.array([0, -1]), 3),
    "fewer frames": (512, 3, np.array([0, 1]), 3),
    "the slot's start": (511, 1, 0, 3),
    "the slot's end": (512, 2049, 0, 3),
    "less than none": (512, -1, 0, 3),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("of", [Stage2.map, walker.map], ids=["fast", "walker"])
def test_wrong_in_one_way(case, of):
    gfn, npages, pfn, level = CASES[case]
    s2 = Stage2(2048, base_gfn=512, granule=Granule.K4)
    s2.map(512, 2048, pfn=0, dbm=True)
    before = s2.copy()
    with pytest.raises(GfnError):
        of(s2, gfn, npages, pfn, level)
    assert all(np.array_equal(s2.level(each), before.level(each)) for each in (1, 2, 3))
    assert s2.scan(pte.tracked).weight() == 2048


@pytest.mark.parametrize("of", [Stage2.map, walker.map], ids=["fast", "walker"])
def test_the_last_frames_there_are(of):
    s2 = Stage2(2048, base_gfn=512)
    of(s2, 512, 1024, np.array([TOP - 512, 0]), 2)
    of(s2, 1536, 1, TOP - 1, 3)
    assert pte.output_address(int(s2.level(2)[0]), 21) == TOP - 512 << 12
    assert pte.output_address(int(s2.level(3)[1024]), 12) == TOP - 1 << 12
