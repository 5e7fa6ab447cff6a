"""A VM of one's own that can be migrated: what `hwdbm.vm.Source` asks for, and nothing else.

Here the "VM" is a thread that writes to a block of memory and marks what it wrote, as a device model would.

Run it: python docs/examples/custom_source.py
"""

import socket
import threading

from hwdbm.memslot import Memslot
from hwdbm.migration import Channel, migrate, receive
from hwdbm.vm import MemoryMap, PlainGuest, Source, memory_digest


class Counter(PlainGuest):
    """A guest that counts. `PlainGuest` brings memory, a log whose leases roll back, and a digest.

    What a VM adds is how it runs: `pause` and `resume`, what it writes and marks, and what is no memory: its state.
    """

    def __init__(self, memory_map: MemoryMap) -> None:
        super().__init__(memory_map)
        self.kind = "counter"  # only a counter can receive a counter
        self.count, self._thread, self._stop = 0, None, threading.Event()

    def resume(self) -> None:
        super().resume()
        self._stop.clear()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def pause(self) -> None:
        self._stop.set()
        if self._thread is not None:  # no write happens after this returned: that is the contract
            self._thread.join()
            self._thread = None
        super().pause()

    def _run(self) -> None:
        base = self.slots[0].base_gfn * self.page_size
        while not self._stop.wait(0.001):
            self.count += 1
            gpa = base + self.count * 7919 * self.page_size % (self.slots[0].npages * self.page_size)
            self.write(gpa, self.count.to_bytes(8, "little"))  # in memory, and dirty in the log, in one step

    def state(self) -> bytes:
        return self.count.to_bytes(8, "little")

    def set_state(self, state: bytes) -> None:
        self.count = int.from_bytes(state, "little")


def main() -> None:
    layout = MemoryMap(4096, (Memslot(0, 0, 0x40000, 1024, 0),))
    source = Counter(layout)
    assert isinstance(source, Source)
    here, there = map(Channel, socket.socketpair())
    received = []
    taker = threading.Thread(target=lambda: received.append(receive(there, Counter)))
    taker.start()
    source.resume()
    with here, there:
        report = migrate(source, here)
        taker.join()
    arrived = received[0].destination
    print(f"{report.status} in {len(report.passes)} passes; equal when it stood still:", end=" ")
    print(report.source_sha256 == report.destination_sha256 == memory_digest(source))
    arrived.pause()
    print("it counted on at the destination:", arrived.count >= source.count, "and stands here:", not source.running)
    for vm in (source, arrived):
        vm.close()


if __name__ == "__main__":
    main()
