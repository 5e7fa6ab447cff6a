"""The parts of every VM: the `Source` protocol, a memory map, guest memory; and `PlainGuest`, which has no more."""

from hwdbm.vm.memorymap import MemoryMap
from hwdbm.vm.plain import PlainGuest
from hwdbm.vm.source import Client, Durable, Pages, Provable, Shareable, Source, client_of, memory_digest

__all__ = [
    "Client",
    "Durable",
    "MemoryMap",
    "Pages",
    "PlainGuest",
    "Provable",
    "Shareable",
    "Source",
    "client_of",
    "memory_digest",
]
