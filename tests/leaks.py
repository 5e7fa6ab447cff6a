"""What a test may not leave behind."""

import gc
import os
import threading


def descriptors() -> int:
    """Return how many file descriptors are open, those of garbage that an earlier test left not among them."""
    gc.collect()
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


def vcpu_threads() -> int:
    return sum(thread.name.startswith("kvm-vcpu") for thread in threading.enumerate())
