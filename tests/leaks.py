"""What a test may not leave behind."""

import gc
import os
import threading
import warnings


def descriptors() -> int:
    """Return how many file descriptors are open, those of garbage that an earlier test left not among them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # of what is no test's of the caller
        gc.collect()
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


def vcpu_threads() -> int:
    return sum(thread.name.startswith("kvm-vcpu") for thread in threading.enumerate())
