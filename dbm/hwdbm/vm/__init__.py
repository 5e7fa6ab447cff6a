"""What every VM is: the `Source` protocol, its memory map, its memory, and `PlainGuest`, which is no more than that."""

from hwdbm.vm.memorymap import MemoryMap
from hwdbm.vm.plain import PlainGuest
from hwdbm.vm.source import Pages, Provable, Source, memory_digest

__all__ = ["MemoryMap", "Pages", "PlainGuest", "Provable", "Source", "memory_digest"]
