"""What the tests of KVM share: whether there is one."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from hwdbm.kvm import Kvm, KvmUnavailableError, KvmVm


@pytest.fixture
def kvm() -> Iterator[Kvm]:
    """Return KVM, or skip with the reason why there is none. Where the file may be opened it must work."""
    try:
        kvm = Kvm()
    except KvmUnavailableError as error:
        if os.access("/dev/kvm", os.R_OK | os.W_OK):
            pytest.fail(f"/dev/kvm is there, and can't be used: {error}")
        pytest.skip(str(error))
    with kvm:
        yield kvm


@pytest.fixture
def make(kvm: Kvm) -> Iterator[Callable[..., KvmVm]]:
    """Return a function that makes VMs; they are closed after the test."""
    made: list[KvmVm] = []

    def make_(*args: Any, **options: Any) -> KvmVm:
        made.append(KvmVm(*args, **options))
        return made[-1]

    yield make_
    for vm in made:
        vm.close()
