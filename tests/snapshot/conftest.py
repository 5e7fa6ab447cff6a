"""What the tests of snapshots share."""

from collections.abc import Iterator

import pytest
from migrationvm import FakeVm


@pytest.fixture
def vm() -> Iterator[FakeVm]:
    """Return a VM that writes."""
    vm = FakeVm()
    yield vm
    vm.close()
