import shutil

import pytest
from clitools import run

__all__ = ["run"]


def pytest_collection_modifyitems(items):
    """An emulated machine needs QEMU and a cross compiler; where they are, nothing here is skipped."""
    missing = [name for name in ("qemu-system-aarch64", "aarch64-linux-gnu-gcc") if shutil.which(name) is None]
    for item in items:
        if missing and "arm" in item.path.parent.name:
            item.add_marker(pytest.mark.skip(reason=f"the Arm machine needs {' and '.join(missing)}"))
