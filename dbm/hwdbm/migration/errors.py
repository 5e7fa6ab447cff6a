"""What can go wrong between two sides of a migration. All are `OSError`, as what a socket raises is."""

from hwdbm.errors import LayoutError, StreamError

__all__ = ["CancelledMigrationError", "DigestError", "HandoverError", "LayoutError", "PeerError", "StreamError"]


class PeerError(StreamError):
    """The other side gave up, and said why."""


class DigestError(StreamError):
    """The memory differs after the last pass. The source goes on; the destination never ran."""


class HandoverError(StreamError):
    """The destination was told to run, and the link fell silent before it said that it does.

    Nobody can know whether it runs, so the source stays paused: two running copies of a VM ruin its disks.
    """


class CancelledMigrationError(InterruptedError):
    """The migration was cancelled from this side."""
