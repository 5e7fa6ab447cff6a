"""The stream of a migration beside plain sends, a migration's downtime, and what a pass costs the log."""

import socket
import threading
import time

import hwdbm
from hwdbm.bench.stream import StreamSetup, rows
from hwdbm.machine import Machine, parse
from hwdbm.migration import Channel, Settings, migrate, receive


class Stream:
    """Times the floor: 1.25 or less is the aim. asv has no other way to keep a ratio."""

    params = (["unix", "tcp"],)
    param_names = ("socket",)
    timeout = 300

    def track_first_pass(self, transport):
        return next(iter(rows(StreamSetup(memory=1 << 28, passes=3, transport=transport)))).ratio

    def track_scattered(self, transport):
        return list(rows(StreamSetup(memory=1 << 28, passes=3, transport=transport)))[1].ratio

    track_first_pass.unit = track_scattered.unit = "times the floor"


class Migration:
    """A machine of 64 MiB that writes throughout, to a receiver in a thread."""

    timeout = 120

    def setup(self):
        self.source = self._machine()
        self.source.run(parse("hot,rate=100k", 1))
        self.source.step(100_000)

    @staticmethod
    def _machine(*_):
        machine = Machine()
        machine.add_memslot(64 << 20, 0x4000_0000)
        return machine

    def _migrate(self):
        here, there = socket.socketpair()
        got = []
        with Channel(here) as ours, Channel(there) as theirs:
            thread = threading.Thread(target=lambda: got.append(receive(theirs, self._machine)))
            thread.start()
            self.source.resume()
            report = migrate(self.source, ours, Settings(max_downtime=0.02))
            thread.join()
        got[0].destination.close()
        return report

    def track_downtime(self):
        return self._migrate().downtime * 1e3

    def track_throughput(self):
        report = self._migrate()
        return report.bandwidth / (1 << 20)

    track_downtime.unit = "ms"
    track_throughput.unit = "MiB/s"

    def teardown(self):
        self.source.close()


class Collect:
    """Harvest and clear of a 64 GiB slot, one page in a hundred dirty, leased and settled: the aim is 10 ms or less."""

    number, repeat, warmup_time = 1, 5, 0
    timeout = 120

    def setup(self):
        self.log = hwdbm.DirtyLog(flush=lambda slot, first_page, npages: None)
        self.log.set_memory_region(0, 1, 0, 64 << 30, 1 << 40)
        self.log.map(0, 0, 16 << 20, 0)
        self.log.get_dirty_log(0)
        self.log.stage2(0).level(3)[::100] |= hwdbm.pte.S2AP_W

    def time_collect(self):
        with self.log.get_dirty_log(0, lease=True):
            pass

    def track_milliseconds(self):
        start = time.perf_counter()
        self.time_collect()
        return (time.perf_counter() - start) * 1e3

    track_milliseconds.unit = "ms"
