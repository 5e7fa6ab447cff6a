"""A small VM for tests: memory with a log, and a thread that writes to it until it is paused."""

import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import forked
import numpy as np

from hwdbm.memslot import Memslot
from hwdbm.migration import Channel, transport
from hwdbm.vm import MemoryMap, PlainGuest

LAYOUT = MemoryMap(4096, (Memslot(0, 0, 0x40000, 2048, 0), Memslot(3, 0, 0x80000, 777, 0)))


class FakeVm(PlainGuest):
    """Like a VM: pages with random content and some of zeros, and a writer that counts what it wrote."""

    def __init__(self, layout: MemoryMap = LAYOUT, *, seed: int = 1, pause_every: float = 1e-4) -> None:
        super().__init__(layout)
        rng = np.random.default_rng(seed)
        for slot in layout.slots:
            memory = self.memory(slot.id)
            memory[:] = rng.integers(0, 256, memory.size, dtype=np.uint8)
            memory.reshape(-1, layout.page_size)[slot.npages // 3 : slot.npages // 2] = 0
        self.writes, self.written = 0, set[tuple[int, int]]()
        self._random, self._every = random.Random(seed), pause_every
        self._go, self._closing = threading.Event(), False
        self._idle = threading.Event()
        self._idle.set()
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    def _loop(self) -> None:
        while not self._closing:
            if not self._go.wait(0.05):
                continue
            self._idle.clear()
            while self._go.is_set():
                slot = self._random.choice(self.slots)
                page = self._random.randrange(slot.npages)
                offset = self._random.randrange(self.page_size - 8)
                gpa = (slot.base_gfn + page) * self.page_size + offset
                self.write(gpa, self._random.randbytes(8) if self._random.random() < 0.9 else bytes(8))
                self.writes += 1
                if self.logging:
                    self.written.add((slot.id, page))
                threading.Event().wait(self._every)
            self._idle.set()

    def resume(self) -> None:
        self._idle.clear()
        super().resume()
        self._go.set()

    def pause(self) -> None:
        self._go.clear()
        if self.running:
            self._idle.wait(5)
        super().pause()

    def close(self) -> None:
        self._closing = True
        self._go.set()
        self._go.clear()
        self._thread.join(5)
        super().close()


RECEIVER = """
import sys
from pathlib import Path
from hwdbm.migration import receive, transport
from hwdbm.vm import PlainGuest
with transport.listen_unix(Path(sys.argv[1])) as listener:
    channel = listener.accept()
try:
    with channel:
        print(receive(channel, lambda layout: PlainGuest(layout, Path(sys.argv[2]) if sys.argv[2:] else None)).sha256)
except OSError as error:
    sys.exit(f"receiver: {error}")
"""


class ReceiverProcess:
    """A receiver that is a process of its own."""

    def __init__(self, folder: Path, *args: object) -> None:
        self._path = folder / f"{random.randrange(1 << 30):x}.sock"
        command = [sys.executable, "-P", "-c", RECEIVER, str(self._path), *map(str, args)]
        self.process = forked.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def connect(self) -> Channel:
        while True:
            try:
                return transport.connect_unix(self._path)
            except (FileNotFoundError, ConnectionRefusedError):
                assert self.process.poll() is None, self.process.communicate()
                threading.Event().wait(0.01)

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)

    def done(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=20)
        return self.process.returncode, out.strip(), err.strip()
