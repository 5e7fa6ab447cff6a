"""What a migration that doesn't converge says would have helped."""

import pytest

from hwdbm.migration import Settings
from hwdbm.migration.converge import Progress

MIB = 1 << 20


@pytest.mark.parametrize(
    ("limit", "said"),
    [
        (0.3, "300 ms are allowed; a downtime of 550 ms would have done, or a bandwidth of 20 MiB/s"),
        (0.0, "0 ms are allowed; a downtime of 550 ms would have done"),
    ],
)
def test_what_would_have_done(limit, said):
    """A tenth more than the shortest pass takes, in tens of ms; and what the least of them fits into the limit by."""
    progress = Progress(Settings(limit))
    for number, (mib, expected) in enumerate([(100, None), (8, 0.6), (6, 0.5), (7, 0.55)], start=1):
        progress.add(number, mib * MIB, expected)
    assert progress.why() == (
        "the guest dirties memory as fast as it is sent: no pass after pass 3 left notably less than 6.0 MiB, "
        f"which takes 500 ms, and {said}"
    )
    assert (progress.best, progress.flat) == (3, 1)
