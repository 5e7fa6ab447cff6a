"""The dirty log: KVM's GET and CLEAR over memslots, with hardware DBM or write-protection behind it.

`DirtyLog` is what programs use, `Lease` what it hands out on request. The modules of this package are its parts: the
log with KVM's calls (`log`), a memslot's protocol (`slot`) and the ranges of it that are held (`rangelock`), what
changes leaves (`faults`), how writes are learnt of (`mechanism`), pages that are lent (`lease`) and to whom (`client`),
and the counts (`stats`).
"""

from hwdbm.dirtylog.client import LogClient, Turn
from hwdbm.dirtylog.faults import Backing
from hwdbm.dirtylog.lease import Lease, Lender, Loans
from hwdbm.dirtylog.log import DirtyLog
from hwdbm.dirtylog.mechanism import MECHANISMS, Mechanism
from hwdbm.dirtylog.slot import FlushHook, Point
from hwdbm.dirtylog.stats import Stats

__all__ = [
    "MECHANISMS",
    "Backing",
    "DirtyLog",
    "FlushHook",
    "Lease",
    "Lender",
    "Loans",
    "LogClient",
    "Mechanism",
    "Point",
    "Stats",
    "Turn",
]
