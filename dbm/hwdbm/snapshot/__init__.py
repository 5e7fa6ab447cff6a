"""Snapshots of guest memory in files: full ones, differential ones, and the chains that they form."""

from hwdbm.snapshot.chain import Chain, Flaw
from hwdbm.snapshot.files import Written, rebase, rebase_all, write_diff, write_full
from hwdbm.snapshot.manifest import Snapshot
from hwdbm.snapshot.record import Recorder

__all__ = ["Chain", "Flaw", "Recorder", "Snapshot", "Written", "rebase", "rebase_all", "write_diff", "write_full"]
