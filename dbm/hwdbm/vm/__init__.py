"""What every VM is: the `Source` protocol, its memory map, its memory, and `PlainGuest`, which is no more than that."""

from hwdbm.vm.memorymap import MemoryMap
from hwdbm.vm.plain import PlainGuest
from hwdbm.vm.source import Client, Durable, Exclusive, Pages, Provable, Source, client_of, memory_digest

__all__ = [
    "Client",
    "Durable",
    "Exclusive",
    "MemoryMap",
    "Pages",
    "PlainGuest",
    "Provable",
    "Source",
    "client_of",
    "memory_digest",
]
