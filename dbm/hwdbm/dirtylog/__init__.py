"""The dirty log: KVM's GET and CLEAR over memslots, with hardware DBM or write-protection behind it.

`DirtyLog` is what programs use, `Lease` what it hands out on request. The modules of this package are its parts: KVM's
calls (`log`), the protocol of one memslot (`slot`), claims on ranges of it (`rangelock`), the bulk verbs that change
leaves (`faults`), how the log learns of writes (`mechanism`), pages on loan (`lease`), consumers with a bitmap and an
epoch of their own (`client`), and counts (`stats`).
"""

from hwdbm.dirtylog.client import ClientLease, LogClient
from hwdbm.dirtylog.faults import Backing
from hwdbm.dirtylog.lease import Lease, Lender, Loans
from hwdbm.dirtylog.log import DirtyLog
from hwdbm.dirtylog.mechanism import MECHANISMS, Mechanism
from hwdbm.dirtylog.slot import FlushHook, Point
from hwdbm.dirtylog.stats import Stats

__all__ = [
    "MECHANISMS",
    "Backing",
    "ClientLease",
    "DirtyLog",
    "FlushHook",
    "Lease",
    "Lender",
    "Loans",
    "LogClient",
    "Mechanism",
    "Point",
    "Stats",
]
