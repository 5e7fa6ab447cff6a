"""Live migration over the dirty log: pre-copy, the stream, the receiver, and snapshots.

`migrate` sends a `Source` over a `Channel`, `receive` takes it at the other end. `hwdbm.vm` says what a VM must be able
to do, `wire` what the stream is made of, `transport` how two sides meet. `snapshot` writes memory to files instead.
"""

from hwdbm.errors import (
    CancelledMigrationError,
    ConvergenceError,
    DigestError,
    HandoverError,
    LayoutError,
    PeerError,
    StreamError,
)
from hwdbm.migration.channel import Channel
from hwdbm.migration.converge import Settings
from hwdbm.migration.precopy import Precopy, migrate
from hwdbm.migration.receiver import Received, receive
from hwdbm.migration.report import Pass, Report

# What a VM is has its own room, and is at hand here too, where programs look for it.
from hwdbm.vm import MemoryMap as Layout  # noqa: F401
from hwdbm.vm import PlainGuest, Source, memory_digest  # noqa: F401

__all__ = [
    "CancelledMigrationError",
    "Channel",
    "ConvergenceError",
    "DigestError",
    "HandoverError",
    "LayoutError",
    "Pass",
    "PeerError",
    "Precopy",
    "Received",
    "Report",
    "Settings",
    "StreamError",
    "migrate",
    "receive",
]
