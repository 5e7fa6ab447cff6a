"""Layouts judged by an emulated MMU: some of them here, all of them where HWDBM_LAYOUTS is set (`make layouts`)."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from layouts import QUICK, cases, judge


@pytest.mark.parametrize("case", cases() if os.environ.get("HWDBM_LAYOUTS") else QUICK, ids=str)
@pytest.mark.alike(2)
def test_every_page_that_is_written_is_found_and_no_other(case):
    assert judge(case) > 0
