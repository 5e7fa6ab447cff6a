"""The dirty log: KVM's GET and CLEAR over memslots, with hardware DBM or write-protection behind it.

`DirtyLog` is what programs use, `Lease` what it hands out on request. The modules of this package are its parts: a
memslot's protocol (`slot`) and the ranges of it that are held (`held`, `rangelock`), the two modes (`modes`), the order
of flush and copy as types (`lease`), and the counts (`stats`).
"""

from hwdbm.dirtylog.client import LogClient, Turn
from hwdbm.dirtylog.lease import Flushed, Lease, Unflushed
from hwdbm.dirtylog.log import DirtyLog
from hwdbm.dirtylog.memory import LoggedMemory
from hwdbm.dirtylog.rangelock import RangeLock
from hwdbm.dirtylog.stats import FlushHook, Stats

__all__ = [
    "DirtyLog",
    "FlushHook",
    "Flushed",
    "Lease",
    "LogClient",
    "LoggedMemory",
    "RangeLock",
    "Stats",
    "Turn",
    "Unflushed",
]
