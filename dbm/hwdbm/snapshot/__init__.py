"""Snapshots of guest memory in files: full ones, differential ones, and how they are laid over each other."""

from hwdbm.snapshot.files import Written, rebase, rebase_all, write_diff, write_full

__all__ = ["Written", "rebase", "rebase_all", "write_diff", "write_full"]
