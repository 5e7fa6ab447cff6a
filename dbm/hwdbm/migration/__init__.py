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
from hwdbm.vm import MemoryMap as Layout
from hwdbm.vm import PlainGuest, Source, memory_digest

__all__ = [
    "CancelledMigrationError",
    "Channel",
    "ConvergenceError",
    "DigestError",
    "HandoverError",
    "Layout",
    "LayoutError",
    "Pass",
    "PeerError",
    "PlainGuest",
    "Precopy",
    "Received",
    "Report",
    "Settings",
    "Source",
    "StreamError",
    "memory_digest",
    "migrate",
    "receive",
]
