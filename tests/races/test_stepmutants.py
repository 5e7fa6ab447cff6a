"""Do the proofs bite? Each mutant of a production step is found, or argued harmless by name."""

import os
from pathlib import Path

import pytest
from stepmutants import found_by, mutants

HARMLESS = Path(__file__).with_name("harmless.txt")
MUTANTS = {mutant.name: mutant for mutant in mutants()}
ALL = os.environ.get("HWDBM_RACES") == "all"
# `make races` tries them all.
CHOSEN = (
    MUTANTS
    if ALL
    else [
        "mark_steps: self.feeds.sink(self.live).set_range: left out",
        "_take_steps: np.copyto: left out",
        "give_back: np.bitwise_or: left out",
        "pour: fresh.fill: doubled",
        "put_back: np.bitwise_or: left out",
        "unmap_steps: slot.flush: left out",
        "mark_steps: self.feeds.sink(self.live).set_range: doubled",
    ]
)


def harmless() -> dict[str, str]:
    lines = [line for line in HARMLESS.read_text().splitlines() if line and not line.startswith("#")]
    return dict(zip(lines[::2], (line.strip() for line in lines[1::2]), strict=True))


def test_only_mutants_are_called_harmless_and_each_for_a_reason():
    assert set(harmless()) <= set(MUTANTS)
    assert all(len(reason) > 5 for reason in harmless().values())


@pytest.mark.slow
@pytest.mark.parametrize("name", CHOSEN)
def test_a_mutant_is_found_or_harmless(name):
    found = found_by(MUTANTS[name])
    if name in harmless():
        assert not found, f"{name} is called harmless, and {found} finds it"
    else:
        assert found, f"{name} does harm that no protocol finds, or none: say why in {HARMLESS.name}"
