"""Every public verb of the library, with every wrong kind of argument: refused means unchanged."""

import dataclasses
import gc
import inspect
import os
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from errno import EBADF, ENOMEM
from functools import cache, partial
from itertools import islice
from math import inf, nan, nextafter
from typing import Any

import doors
import numpy as np
import pytest
from doors import Recipe, Scene, Wrong
from effort import EFFORT
from seen import DATA, as_seen, writing

from hwdbm import DirtyBitmap, DirtyLog, Granule, Memslot, Stage2, forecast, kernels, pte
from hwdbm.bench import Setup
from hwdbm.dirtylog import LogClient, Stats
from hwdbm.errors import ClosedError
from hwdbm.fleet import Fleet, FleetVm, Host, Link, Taken, tabulate
from hwdbm.forecast import MemoryWrites
from hwdbm.image import Registers, Slot, open_image
from hwdbm.kvm import Kvm, KvmVm, VcpuFd, VmFd
from hwdbm.machine import (
    Bursty,
    Clock,
    Costs,
    GuestMemory,
    HotSet,
    Idle,
    Machine,
    ReferenceVCpu,
    Replay,
    Sequential,
    Uniform,
    Workload,
    Zipf,
)
from hwdbm.memslot import Memslots
from hwdbm.migration import Channel, Settings
from hwdbm.stage2 import Layout
from hwdbm.vm import MemoryMap, PlainGuest
from hwdbm.vtcr import Vtcr, Vttbr

GPA = 0x4000_0000
NPAGES = 1200  # no multiple of 64, two whole stripes and two parts from gfn 0x40100 on
BASE = 0x40100


def slot_stage2() -> Stage2:
    """Return a slot with pages and a block, in every state, and with pages saved."""
    s2 = Stage2(NPAGES, BASE)
    s2.map(BASE, NPAGES, pfn=0x8_0100)
    s2.map(BASE + 700, 50, pfn=0x9_0000, writable=False)
    s2.map(BASE + 256, 512, pfn=0xA_0000, level=2)
    s2.enable_dbm()
    s2.level(3)[5:200:3] |= pte.S2AP_W
    s2.level(2)[1] |= pte.S2AP_W
    s2.unmap(BASE + 1000, 20)
    s2.level(3)[900:930] |= pte.S2AP_W
    s2.map(BASE + 900, 30, pfn=0xB_0000)
    return s2


def some_pages(npages: int = NPAGES) -> DirtyBitmap:
    return DirtyBitmap.from_pages(np.arange(0, npages, 3), npages)


def three_slots() -> Memslots:
    slots = Memslots(address_spaces=2)
    slots.set_memory_region(0, 1, GPA, 0x10_0000, 1 << 30)
    slots.set_memory_region(1, 0, GPA + 0x10_0000, 0x10_0000, 2 << 30)
    slots.set_memory_region(0x1_0001, 0, GPA, 0x10_0000, 2 << 30)
    return slots


def memory_map() -> MemoryMap:
    return MemoryMap(4096, (Memslot(0, 0, GPA >> 12, 200, 0), Memslot(1, 0, 1 << 20, 65, 0)))


def plain_guest() -> PlainGuest:
    guest = PlainGuest(memory_map())
    guest.start_log()
    guest.write(GPA + 5000, bytes(range(200)))
    return guest


def small_fleet() -> Fleet:
    hosts = Host("a", 1 << 40, "lan"), Host("b", 1 << 40, "lan", "r")
    return Fleet((Link("lan", 1e9),), hosts, (FleetVm("db", "a", 1 << 30, 0.3),), (("r", "lan"),))


def vars_of(value: Any) -> dict[str, Any]:
    return {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}


def nothing(*_: object) -> None:
    pass


def logging() -> DirtyLog:
    """Return a log with a slot that is dirty, in the log and in its leaves, and one that doesn't log."""
    log = DirtyLog(address_spaces=2, slot_limit=64)
    log.set_memory_region(0, 1, BASE << 12, NPAGES << 12, 1 << 30)
    log.map(0, BASE, NPAGES, pfn=0x8_0000)
    log.stage2(0).level(3)[5:900:7] |= pte.S2AP_W
    log.sync(0, 0, 640)
    log.set_memory_region(1, 0, 1 << 32, 1 << 20, 2 << 30)
    return log


def client() -> LogClient:
    """Return a client of a log in which there is something for it; who forgets it isn't told."""
    log = logging()
    made = log.client("backup")
    made._owner = 0
    log.mark_dirty(0, 70, 9)
    return made


class Behind:
    """What is behind a slot's pages: a frame each, of nobody else."""

    shared = np.zeros(NPAGES, dtype=np.bool_)

    def of(self, pages: np.ndarray) -> np.ndarray:
        return pages + 0x1000

    def blockable(self, stripes: np.ndarray) -> np.ndarray:
        return np.zeros(stripes.size, dtype=np.bool_)


def machine() -> Machine:
    """Return a machine that logs, whose memory was written to by its vCPUs and by the VMM."""
    made = Machine(vcpus=2, tlb_entries=64)
    made.add_memslot(0x24_0000, GPA)
    made.start_log()
    made.vcpus[0].store(GPA + np.arange(0, 1 << 20, 8192), np.arange(128, dtype=np.uint64))
    made.write(GPA + 3000, bytes(3000))
    return made


STAGE2 = {
    "gfn": BASE + 256,
    "npages": 512,
    "pfn": 0x600,
    "split.level": 3,
    "collapse.level": 2,
    "level": 3,
    "writable": True,
    "dbm": True,
    "first": 64,
    "match": pte.dirty,
    "shared": False,
    "contiguous": True,
    "kernels": None,
    "page": 700,
    "pages": np.array([3, 700, 1100]),
    "mapped.npages": 640,
    "map_at.pfn": np.array([5, 6, 7]),
    "index": np.array([3, 4]),
    "bits": np.array([1 << 10, 1 << 10], dtype=np.uint64),
    "ha": True,
    "hd": True,
}

RECIPES: dict[str, Recipe] = {
    "bitmap.DirtyBitmap": Recipe(
        some_pages,
        lambda _: {
            "npages": 640,
            "words": np.zeros(10, dtype=np.uint64),
            "raw": bytes(80),
            "pages": [3, 70, 639],
            "from_ranges.ranges": np.array([[3, 70], [100, 1]]),
            "from_ranges.npages": 640,
            "part.npages": 130,
            "part.first": 65,
            "base": 7,
            "unit": 4096,
            "first": 3,
            "set_range.npages": 130,
            "count.npages": 130,
            "rescale.page_size": 4096,
            "to": 65536,
            "value": True,
            "other": DirtyBitmap(NPAGES),
            "factor": 4,
            "page": 6,
        },
        skip={"load": "it reads a file; tests/test_bitmap.py", "save": "it writes a file; tests/test_bitmap.py"},
    ),
    "granule.size_name": Recipe(given=lambda _: {"size": 4096}),
    "granule.Granule": Recipe(lambda: Granule.K4, lambda _: {"text": "4K", "level": 2, "large": True}),
    "memslot.Memslots": Recipe(
        three_slots,
        lambda slots: {
            "granule": Granule.K16,
            "address_spaces": 2,
            "slot_limit": 8,
            "ipa_bits": 36,
            "gfn": 0x40080,
            "as_id": 0,
            "slot": 3,
            "flags": 1,
            "guest_phys_addr": 0x10_0000,
            "memory_size": 1 << 20,
            "userspace_addr": 1 << 30,
            "find.slot": 1,
            "commit.plan": slots and slots.plan(3, 1, 1 << 20, 1 << 20, 1 << 30),
        },
        fields=frozenset({"slot"}),
    ),
    "memslot.slot_name": Recipe(given=lambda _: {"slot": 0x1_0003}),
    "vtcr.Vtcr": Recipe(
        lambda: Vtcr.decode(0x806A_3558),
        lambda _: {
            "granule": Granule.K4,
            "t0sz": 24,
            "sl0": 1,
            "ps": 5,
            "other": 0x8000_3500,
            "value": 0x806A_3558,
            "ipa_bits": 40,
            "mmfr1": 0x0000_0110_1021_1122,
            "pa_bits": 48,
            **dict.fromkeys(("hw_dbm", "on", "ha", "hd"), True),
            **dict.fromkeys(("ds", "vs", "sl2", "haft", "hdbss"), False),
        },
        fields=frozenset({"value", "mmfr1"}),
    ),
    "vtcr.Vttbr": Recipe(
        lambda: Vttbr(0x4838_0000),
        lambda _: {
            "baddr": 0x4838_0000,
            "vmid": 2,
            "cnp": True,
            "value": 0x0002_0000_4838_0001,
            "vtcr": Vtcr.decode(0x802D_3558),
        },
        fields=frozenset({"value"}),
    ),
    "vtcr": Recipe(
        given=lambda _: {"mmfr0": 0x0000_0323_1020_1126, "mmfr1": 0x0000_0110_1021_1122},
        fields=frozenset({"mmfr0", "mmfr1"}),
    ),
    "memslot.Memslot": Recipe(
        given=lambda _: {
            "id": 3,
            "flags": 1,
            "base_gfn": 0x100,
            "npages": 100,
            "userspace_addr": 1 << 30,
            "generation": 2,
        }
    ),
}


RECIPES |= {
    "forecast.MemoryWrites": Recipe(
        lambda: MemoryWrites(np.ones((4, 2), dtype=np.uint64), 0.5),
        lambda _: {
            "new.words": np.ones((4, 2), dtype=np.uint64),
            "interval": 0.5,
            "npages": 100,
            "page_size": 4096,
            "new.zeros": np.ones((4, 2), dtype=np.uint64),
            "initial_zeros": np.zeros(2, dtype=np.uint64),
            "lo": 1,
            "hi": 3,
        },
    ),
    "forecast.Sample": Recipe(
        given=lambda _: {
            **dict.fromkeys(("time", "remaining", "total", "transferred", "bandwidth", "dirty_rate"), 1.5),
            **dict.fromkeys(("iteration", "zero_pages", "throttle"), 3),
            "downtime_limit": 0.5,
            "page_size": 4096,
            "status": "active",
            "source": "qemu",
        },
    ),
    "forecast.Terms": Recipe(
        lambda: forecast.OWN,
        lambda _: {
            **{each.name: 0.5 for each in dataclasses.fields(forecast.Terms)},
            "structure": "qemu",
            "last_bandwidth": 1e6,
            "size": 1e9,
        },
    ),
    "forecast.Estimate": Recipe(
        lambda: forecast.Estimate(2, 1, 3),
        lambda _: {"value": 2.0, "low": 1.0, "high": 3.0, "scale": 10.0, "digits": 3},
    ),
    "forecast.Needs": Recipe(given=lambda _: {"bandwidth": 1e6, "max_downtime": 0.5, "throttle": 20}),
    "forecast.Forecast": Recipe(
        lambda: forecast.geometric(1000, 50, 100, 2),
        lambda _: {
            "converges": True,
            "flat_from": 3,
            **dict.fromkeys(("passes", "total_time", "downtime", "transferred"), forecast.Estimate(2, 1, 3)),
            "needs": forecast.Needs(),
            "why": "so",
        },
    ),
    "forecast.Verdict": Recipe(
        given=lambda _: {"action": "switch", "why": "so", "limit": 0.5, "throttle": 20},
    ),
    "forecast.RuleOutcome": Recipe(
        lambda: forecast.RuleOutcome("ours", "switch", 1, 2, 3, 4),
        lambda _: {
            **dict.fromkeys(("time", "downtime", "transferred"), 1.5),
            "rule": "ours",
            "action": "abort",
            "passes": 3,
            "why": "so",
        },
    ),
    "forecast": Recipe(
        given=lambda _: {
            "writes": MemoryWrites(np.ones((4, 2), dtype=np.uint64), 0.5),
            "samples": [
                forecast.Sample(0, 1, 1e6, 1e6, bandwidth=1e6),
                forecast.Sample(1, 2, 1e5, 1e6, bandwidth=1e6),
            ],
            "lines": ['{"memory_total": 1024, "memory_remaining": 12, "time_elapsed": 10}'],
            **dict.fromkeys(("bandwidth", "dirty_rate", "total", "remaining"), 1e6),
            "max_downtime": 0.5,
            "terms": forecast.OWN,
            "start_ns": 10,
            "now": False,
            "starts": 2,
            "compare_rules.bandwidth": 1e4,
            "timeout": 60.0,
            "max_iterations": 3,
            "on_limit": "abort",
            "auto_converge": False,
            "throttle": 10.0,
            "needs": True,
            "progress_timeout": 10.0,
            "timeout_per_gib": 10.0,
            "ewma_alpha": 0.5,
            "stall_margin": 0.5,
            "decay": 0.5,
            "possible_factor": 1.5,
            "search_local_minima": True,
            "on_timeout": "ignore",
        },
        amounts=frozenset({"max_iterations", "starts"}),
    ),
    "bitmap.word_count": Recipe(given=lambda _: {"npages": 640}),
    "pte.Match": Recipe(
        lambda: pte.dirty(3), lambda _: {"mask": 0xFF, "value": 0x81, "desc": 0x6C3, "ones": 1 << 55, "zeros": 1 << 56}
    ),
    "pte.Update": Recipe(
        lambda: pte.clean(3), lambda _: {"where": pte.dirty(3), "sets": 1 << 10, "clears": 1 << 7, "desc": 0x6C3}
    ),
    "pte": Recipe(
        lambda: pte.dirty,
        given=lambda _: {
            "level": 2,
            "desc": 0x0008_0000_8000_04C1,
            "name": "some",
            "make": pte.dirty,
            "levels": [1, 2],
            "pa": 0x8000_0000,
            "shift": 21,
            "writable": True,
            "dbm": True,
            "dirty": True,
            "bits": pte.AddressBits.PA48,
        },
    ),
    "stage2.Layout": Recipe(
        lambda: Layout(1000, 0x1F0, Granule.K4),
        lambda _: {
            "npages": 1000,
            "base_gfn": 0x1F0,
            "granule": Granule.K4,
            "level": 2,
            "page": 700,
            "index": 1,
            "lo": 3,
            "hi": 900,
            "spans.index": np.array([0, 1]),
            "runs": np.array([[0, 1]]),
        },
    ),
    "stage2.Stage2": Recipe(
        slot_stage2,
        lambda s2: {
            **STAGE2,
            "new.npages": NPAGES,
            "new.base_gfn": BASE,
            "new.granule": Granule.K4,
            "arrays": {n: np.zeros(Layout(NPAGES, BASE, Granule.K4).count(n), dtype=np.uint64) for n in (1, 2, 3)},
            "harvest.npages": 640,
            "harvest_into.npages": 640,
            "out": DirtyBitmap(NPAGES),
            "track_part.mask": some_pages(640),
            "wrprotect_part.mask": some_pages(640),
            "load.first": np.array([-1, 7]),
            "rows": np.full((2, 8), 0x6C3, dtype=np.uint64),
            "mask": some_pages(),
        },
    ),
    "walker": Recipe(
        given=lambda _: {
            **STAGE2,
            "s2": slot_stage2(),
            "harvest.npages": 640,
            "out": DirtyBitmap(NPAGES),
            "mask": some_pages(),
        }
    ),
    "dirtylog.DirtyLog": Recipe(
        logging,
        lambda _: {
            "granule": Granule.K4,
            "hw_dbm": True,
            "manual_protect": True,
            "initially_set": True,
            "ipa_bits": 36,
            "flush": nothing,
            "step_pages": 128,
            "workers": 2,
            "address_spaces": 2,
            "slot_limit": 64,
            "slot": 0,
            "lease": False,
            "first_page": 64,
            "num_pages": 128,
            "npages": 512,
            "bitmap": some_pages(128),
            "enable": False,
            "gfn": BASE + 256,
            "pfn": 0x600,
            "level": 3,
            "writable": True,
            "gpa": (BASE << 12) + 5000,
            "length": 5000,
            "flags": 0,
            "guest_phys_addr": BASE << 12,
            "memory_size": NPAGES << 12,
            "userspace_addr": 1 << 30,
            "set_mechanism.name": "write-protection",
            "name": "backup",
            "mechanism": "hardware DBM",
            "verb": lambda s2, first, npages: s2.wrprotect(s2.base_gfn + first, npages),
            "pages": np.array([600, 601, 700]),
            "write_faults.pfn": np.array([0x600, 0x601, 0x602]),
            "backing": Behind(),
            "write": True,
            "blocks": False,
            "split": True,
            "whole": False,
        },
        fields=frozenset({"slot"}),
    ),
    "dirtylog.LogClient": Recipe(
        client, lambda _: {"slot": 0}, skip={"new": "a log makes it"}, fields=frozenset({"slot"})
    ),
    "machine.Machine": Recipe(
        machine,
        lambda made: {
            "granule": Granule.K4,
            "hw_dbm": True,
            "manual_protect": False,
            "initially_set": False,
            "step_pages": 128,
            "thp": True,
            "blocks": "write",
            "chunk_pages": 1024,
            "vcpus": 2,
            "tlb_entries": 64,
            "ha": True,
            "seed": 5,
            "costs": Costs(),
            "size": 1 << 20,
            "read.gpa": GPA + 5000,
            "write.gpa": GPA + 5000,
            "gpa": 1 << 32,
            "add_memslot.slot": 5,
            "slot": 0,
            "readonly": False,
            "hva": 1 << 32,
            "memory_image": IMAGE,
            "shared": False,
            "slot_id": 0,
            "length": 5000,
            "data": b"some bytes",
            "flush.slot": made and made.log.slot(0),
            "first_page": 64,
            "npages": 512,
            "collapse": True,
            "enable": False,
            "percent": 40,
            "state": made.state() if made else b"",
            "workload": Uniform(seed=3),
            "vcpu": 0,
            "count": 100,
            "stores": 100,
            "name": "backup",
            "workloads": Uniform(seed=3),
        },
        fields=frozenset({"slot", "slot_id"}),
        amounts=frozenset({"stores"}),
    ),
    "fleet.Taken": Recipe(given=lambda _: {"total": 3.0, "downtime": 0.5, "converges": True}),
    "machine.GuestMemory": Recipe(
        lambda: GuestMemory(1 << 20),
        lambda _: {
            "size": 1 << 20,
            "name": "memory",
            "path": IMAGE,
            "offset": 0,
            "fd": None,
            "private": True,
        },
    ),
    "machine.Clock": Recipe(
        lambda: Clock(Costs()), lambda _: {"costs": Costs(), "log": Stats, "add.**": {"stores": 3}}
    ),
    "machine.Costs": Recipe(given=lambda _: {field.name: 0.5 for field in dataclasses.fields(Costs)}),
    "machine.ReferenceVCpu": Recipe(
        lambda: ReferenceVCpu(machine()),
        lambda _: {
            "machine": machine(),
            "split_blocks": True,
            "thp": True,
            "ha": True,
            "gpa": GPA + 4096,
            "value": 7,
            "slot": 0,
            "first_page": 64,
            "npages": 512,
        },
        fields=frozenset({"slot"}),
    ),
    "machine.VCpu": Recipe(
        lambda: machine().vcpus[0],
        lambda _: {
            "gpas": np.array([GPA, GPA + 4096]),
            "values": np.array([1, 2], dtype=np.uint64),
            "slot": 0,
            "first_page": 64,
            "npages": 512,
        },
        skip={"new": "the machine makes its vCPUs"} | dict.fromkeys(("attach", "detach"), "the machine does it"),
        fields=frozenset({"slot"}),
    ),
    **{
        f"machine.{kind.__name__}": Recipe(
            kind if kind is not Replay else lambda: Replay(bitmaps=[some_pages(64)]),
            lambda _: {
                "seed": 3,
                "rate": 1e6,
                "on": 0.5,
                "off": 0.25,
                "share": 0.5,
                "weight": 0.5,
                "exponent": 0.5,
                "stores_per_page": 2,
                "bitmaps": [some_pages(64)],
                "interval": 0.5,
                "position": 5,
                "count": 10,
                "size": 1 << 20,
                "page_size": 4096,
                "numbers": np.arange(5, dtype=np.uint64),
                "npages": 100,
                "seconds": 0.5,
            },
            skip={"to_dict": "it takes nothing"}
            if kind is not Workload
            else {"pages": "abstract", "offsets": "abstract"},
            amounts=frozenset({"count"}),
        )
        for kind in (Bursty, HotSet, Idle, Replay, Sequential, Uniform, Workload, Zipf)
    },
    "machine.parse": Recipe(given=lambda _: {"text": "hot,rate=5M", "seed": 3}),
    "image.Slot": Recipe(
        lambda: Slot(0, 0x1000, 0x4000), lambda _: {"id": 0, "gpa": 0x1000, "size": 0x4000, "granule": Granule.K16}
    ),
    "image.Registers": Recipe(
        lambda: Registers(*REGISTERS),
        lambda _: {
            "vttbr": REGISTERS[0],
            "vtcr": REGISTERS[1],
            "hcr": 1,
            "mmfr0": 5,
            "mmfr1": 2,
            "large_blocks.vtcr": Vtcr.decode(REGISTERS[1]),
        },
    ),
    "image.Image": Recipe(
        lambda: open_image(CAPTURE),
        lambda image: {
            "memory": open_image(CAPTURE).memory,
            "registers": Registers(*REGISTERS),
            "slots": [Slot(0, 0x8000_0000, 0xC00_0000)],
            "capture": None,
            "number": 0,
            "stage2.slot": 0,
            "dirty.slot": 0,
            "empty_stage2.kernels": "vector",
            "slot": image and image.slots[0],
            "bitmap.stage2": image and image.stage2(0),
            "policy": "dbm",
            "page_size": 4096,
            "runs": None,
            "contiguous": False,
            "visitors": nothing,
        },
        fields=frozenset({"page_size"}),  # in KiB
    ),
    "image.open_image": Recipe(
        given=lambda _: {
            "path": CAPTURE,
            "ram_base": None,
            "vttbr": None,
            "vtcr": None,
            "slots": [Slot(0, 0x8000_0000, 0xC00_0000)],
            "block": None,
        }
    ),
    "vm.MemoryMap": Recipe(
        memory_map,
        lambda _: {
            "page_size": 4096,
            "slots": memory_map().slots,
            "raw": memory_map().to_bytes(),
            "source": PlainGuest(memory_map()),
            "other": memory_map(),
            "find.gpa": np.array([GPA, GPA + 0x4000], dtype=np.uint64),
            "find.length": np.array([0x2000, 4096], dtype=np.uint64),
            "gpa": GPA + 5000,
            "length": 5000,
            "gpas": np.array([GPA, GPA + 4096]),
        },
    ),
    "vm.PlainGuest": Recipe(
        plain_guest,
        lambda _: {
            "layout": memory_map(),
            "memory_map": memory_map(),
            "file": None,
            "slot": 0,
            "slot_id": 0,
            "first_page": 64,
            "npages": 100,
            "state": b"state",
            "percent": 40,
            "gpa": GPA + 5000,
            "data": b"some bytes",
            "name": "backup",
            "length": 5000,
        },
        fields=frozenset({"slot", "slot_id"}),
    ),
    "vm": Recipe(given=lambda _: {"source": plain_guest(), "name": "backup"}),
    "fleet.Link": Recipe(given=lambda _: {"name": "lan", "bandwidth": 1e9}),
    "fleet.Host": Recipe(given=lambda _: {"name": "a", "memory": 1 << 30, "link": "lan", "rack": "r"}),
    "fleet.FleetVm": Recipe(
        given=lambda _: {
            "name": "db",
            "host": "a",
            "memory": 1 << 30,
            "max_downtime": 0.25,
            "trace": "a.zarr",
            "samples": "a.jsonl",
            "start": 1.0,
            "rate": 2.0,
            "pinned": "has a GPU",
        }
    ),
    "fleet.Fleet": Recipe(given=lambda _: {**vars_of(small_fleet()), "engine": "hwdbm"}),
    "fleet.drain": Recipe(
        given=lambda _: {
            "fleet": small_fleet(),
            "hosts": ["a"],
            "seed": 3,
            "curves": tabulate(small_fleet(), ["a"], lambda _: lambda width: Taken(1e9 / width, 0.1, converges=True)),
        }
    ),
    "migration.Settings": Recipe(
        given=lambda _: {
            "max_downtime": 0.25,
            "max_iterations": 10,
            "on_limit": "abort",
            "rule": "ours",
            "bandwidth": 1e6,
            "auto_converge": True,
            "verify": True,
        }
    ),
    "migration": Recipe(
        given=lambda _: {
            "source": plain_guest(),
            "channel": Channel(socket.socketpair()[0]),
            "settings": Settings(),
            "cancel": threading.Event(),
            "on_progress": nothing,
            "build": PlainGuest,
            "most_memory": 1 << 30,
            "populated": False,
        },
        dry=frozenset({"migrate", "receive"}),
    ),
    "bench.Setup": Recipe(given=lambda _: {"npages": 640, "repeat": 2}),
    "bench.smallest": Recipe(
        given=lambda _: {"work": {"nothing": nothing}, "before": nothing, "repeat": 2, "clock": time.thread_time},
        amounts=frozenset({"repeat"}),
        measured=frozenset({"smallest"}),
    ),
    "bench.run": Recipe(given=lambda _: {"setup": Setup(640, 1), "names": ["harvest"]}, dry=frozenset({"run"})),
    "kernels": Recipe(given=lambda _: {"name": kernels.current()}),
}


def kvm_vm() -> KvmVm:
    """Return a paused VM that logs and was written to."""
    vm = KvmVm(0x4_1000)  # 65 pages
    vm.start_log()
    vm.write(GPA + 5000, bytes(range(200)))
    return vm


@cache
def kvm_state() -> bytes:
    return kvm_vm().state()


def vm_fd() -> VmFd:
    """Return a VM with a slot that logs."""
    vm = Kvm().create_vm()
    memory = GuestMemory(0x4_1000)
    vm.memory = memory.view  # as long as the VM
    vm.set_memory_region(
        slot=0, flags=1, guest_phys_addr=GPA, memory_size=memory.size, userspace_addr=memory.view.ctypes.data
    )
    return vm


def vcpu_fd() -> VcpuFd:
    """Return a vCPU of a VM of its own."""
    vm = Kvm().create_vm()
    vcpu = vm.create_vcpu(0)
    vcpu.vm = vm
    return vcpu


KVM_FD = {
    "path": "/dev/kvm",
    "kind": 0,
    "cap": 168,  # KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2
    "args": 1,
    "slot": 0,
    "flags": 1,
    "guest_phys_addr": GPA,
    "memory_size": 0,
    "userspace_addr": 0,
    "out": np.zeros(2, dtype=np.uint64),
    "bitmap": np.zeros(2, dtype=np.uint64),
    "first_page": 0,
    "num_pages": 65,
    "vcpu_id": 1,
    "name": "exit_reason",
    "what": "regs",
    "blocked": [10, 12],
    "indices": [0x174, 0x175],
    "index": 0x174,
    "value": 7,
    "register": 0x6030_0000_0010_0000,
}
NEEDS_KVM = pytest.mark.skipif(
    not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="there is no /dev/kvm that this user may open"
)
RECIPES |= {
    "kvm.Kvm": Recipe(Kvm, lambda _: KVM_FD),
    "kvm.VmFd": Recipe(
        vm_fd,
        lambda _: KVM_FD,
        skip={"new": "Kvm.create_vm makes them"},
        fields=frozenset({"slot"}),
        dry=frozenset({"reset_dirty_rings"}),
    ),
    "kvm.VcpuFd": Recipe(
        vcpu_fd,
        lambda vcpu: {**KVM_FD, "set.data": vcpu and vcpu.get("regs"), "data": bytes(8)},
        skip={"new": "VmFd.create_vcpu makes them"},
        dry=frozenset({"run", "get_one_reg", "set_one_reg", "check_extension"}),  # arm64's, or of no use without memory
    ),
    "kvm.KvmVm": Recipe(
        kvm_vm,
        lambda vm: {
            "memory": 0x4_1000,
            "vcpus": 1,
            "guest": "counting",
            "ring": None,
            "manual_protect": "on",
            "rate": 1e6,
            "seed": 3,
            "base": GPA,
            "path": "/dev/kvm",
            "page_size": 4096,
            "slots": memory_map().slots,
            "slot_id": 0,
            "first_page": 3,
            "npages": 60,
            "name": "backup",
            "gpa": GPA + 5000,
            "length": 5000,
            "data": b"some bytes",
            "percent": 40,
            "state": kvm_state(),
        },
        fields=frozenset({"slot_id"}),
        dry=frozenset({"prove"}),  # the guest would have to run
        unlike=frozenset({"userspace_addr"}),
    ),
}
IMAGE = "LICENSE"  # any file
CAPTURE = "tests/data/captures/4k_blocks/round1.npz"
REGISTERS = 0x0002_0000_4838_0000, 0x802D_3558


def recipe_of(name: str) -> Recipe | None:
    return RECIPES.get(name) or RECIPES.get(name.partition(".")[0])


def all_doors() -> Iterator[tuple[str, Any, str | None]]:
    for name, item in doors.surface().items():
        if not inspect.isclass(item):
            yield name, item, None
            continue
        if doors.made(item):
            yield name, item, None
        for verb in doors.verbs(item):
            yield f"{name}.{verb}", item, verb


# What isn't walked over, and why.
NOT_WALKED = {
    "image.Live": "each call walks over a machine's tables; tests/image/test_live.py",
    "image.open_live": "tests/image/test_live.py",
    "arm": "each is a machine that boots; tests/arm",
    "check": "the checks themselves; tests/test_check.py",
    "files": "below the doors; tests/test_files.py",
    "process": "below the doors: the command and the benchmarks call it",
    "report": "pages that the command makes of results; tests/test_report.py",
    "errors": "errors are made where they are raised",
    "testing": "strategies and a state machine of Hypothesis, which calls them",
    "memslot.Plan": "a result",
    "kernels.Tally": "a result",
    "kernels.Notes": "what Leaves tells a kernel",
    "kernels.Place": "what Leaves tells a kernel",
    "dirtylog.SlotLog": "the protocol: DirtyLog and the machine call it with what they have checked",
    "dirtylog.RangeLock": "below the doors",
    "bench.Row": "a result",
    "dirtylog.Stats": "a result",
    "dirtylog.Lease": "a log makes it; what consumers do to it is tests/dirtylog/test_lease.py",
    "dirtylog.Loans": "a lender's, who is called by leases",
    "dirtylog.ClientLease": "a client makes it; tests/dirtylog/test_client.py",
    "machine.Reading": "a result",
    "migration.Pass": "a result",
    "migration.Report": "a result",
    "migration.Received": "a result",
    "stage2.LeafAt": "a result",
    "snapshot.Written": "a result",
    "snapshot.Snapshot": "a result: what a manifest says; tests/snapshot/test_chain.py reads hostile ones",
    "snapshot.Flaw": "a result",
    "snapshot.Chain": "it reads and writes files; tests/snapshot/test_chain.py",
    "snapshot.Recorder": "it writes files; tests/snapshot/test_chain.py",
    "snapshot.write_full": "it writes a file; tests/snapshot",
    "snapshot.write_diff": "it writes a file; tests/snapshot",
    "snapshot.rebase": "it writes a file; tests/snapshot",
    "snapshot.rebase_all": "it writes a file; tests/snapshot",
    "trace.Trace": "it reads files; tests/trace/test_format.py reads hostile ones",
    "trace.Writer": "it writes files; tests/trace/test_format.py",
    "trace.open_trace": "it reads files; tests/trace/test_format.py",
    "trace.Amount": "a result",
    "trace.Analysis": "a result",
    "trace.Period": "a result",
    "trace.analyse": "it reads a trace; tests/trace/test_analysis.py",
    "trace.record": "it writes files; tests/trace/test_recorder.py",
    "trace.record_file": "it writes files; tests/trace/test_recorder.py",
    "trace.from_bitmaps": "it writes files; tests/trace/test_recorder.py",
    "migration.Channel": "the two sides of a migration call it; a peer's frames are tests/migration's",
    "migration.Precopy": "`migrate` makes and runs it",
    "fleet.Curves": "a result",
    "fleet.Drained": "a result",
    "fleet.Ending": "a result",
    "fleet.Left": "a result",
    "fleet.Move": "a result",
    "fleet.Shift": "a result",
    "fleet.read_plan": "it reads a file; tests/fleet/test_plan.py",
    "fleet.tabulate": "it starts processes; tests/fleet/test_cluster.py",
}


def among(name: str, listed: Iterable[str]) -> bool:
    return any(name == each or name.startswith(f"{each}.") for each in listed)


DOORS = {name: (item, verb) for name, item, verb in all_doors() if not among(name, NOT_WALKED)}

NAMES = [pytest.param(name, marks=NEEDS_KVM) if name.startswith("kvm.") else name for name in DOORS]


def walked(name: str, half: int) -> Iterator[str]:
    """Walk over a door's parameters with half of all wrong arguments, and yield what is wrong with what came of it."""
    item, verb = DOORS[name]
    recipe = recipe_of(name.rpartition(".")[0] if verb else name)
    if recipe is None:
        yield "there is no recipe: give it one in RECIPES"
        return

    def new() -> Scene:
        return doors.scene(recipe, item, verb)

    twins: dict[tuple[str, object], doors.Outcome] = {}

    def twin(parameter: str, wrong: Wrong) -> doors.Outcome:
        key = parameter, doors.plain(wrong.twin)  # one plain argument is the twin of many others
        if key[1] is None:
            return new().run(parameter, wrong.twin)
        if key not in twins:
            twins[key] = new().run(parameter, wrong.twin)
        return twins[key]

    own = (verb or name.rpartition(".")[2]) in recipe.dry
    if verb in recipe.skip or (verb is None and "new" in recipe.skip):
        return
    good = None if own else new().run()
    if good is not None and good.error is not None:
        yield f"its own arguments are refused: {good.error!r}"
        return
    if not own and half == 0:
        yield from aliased(new)
    scene = new()
    before = scene.state()
    if good is not None:
        values = scene.arguments.items()
        twins |= {(own, doors.plain(each)): good for own, each in values if type(each) in (bool, int, float, bytes)}
    for place, (parameter, value) in enumerate(scene.arguments.items()):
        key = f"{verb or 'new'}.{parameter}"
        if key in recipe.skip:
            continue
        every = doors.wrong(value, parameter in scene.optional, parameter in scene.several)
        for wrong in islice(every, (place + half) % 2, None, 2):
            if own and not wrong.refused:
                continue
            if parameter in recipe.amounts and large(wrong.value):
                continue
            outcome = scene.run(parameter, wrong.value)
            if name.rpartition(".")[2] in recipe.measured and outcome.error is None:
                if wrong.refused:
                    yield f"{parameter} = {wrong.label}: is taken"
                continue
            named = is_number(value) and parameter not in recipe.fields
            for complaint in judged(wrong, outcome, before, partial(twin, parameter, wrong), named=named):
                yield f"{parameter} = {wrong.label}: {complaint}"
            if outcome.error is None or outcome.after != before:
                scene = new()  # whose state is the one before: twins are compared, too


FAR = 1 << 65  # beyond any number that is taken for what it is
FLOATS = (-inf, -5e-324, 0.0, 5e-324, 1.0, nextafter(1.0, 2.0), inf, nan)  # ends of most ranges, and what is beside


def limits(name: str, kept: Mapping[str, list[int]]) -> Iterator[str]:
    """Yield what a door says to numbers at the edges of what it takes, beside them, and far from them.

    Of an array of numbers it is the first that is another.

    Those numbers are the ones `kept` by parameter; where none are, the edges are looked for.
    """
    item, verb = DOORS[name]
    recipe = recipe_of(name.rpartition(".")[0] if verb else name)
    own = {verb or name.rpartition(".")[2], verb or "new"}
    if recipe is None or own & {*recipe.dry, *recipe.skip, *recipe.measured}:
        return
    scene = doors.scene(recipe, item, verb)
    before = scene.state()

    def error(parameter: str, number: float) -> Exception | None:
        nonlocal scene
        value: Any = scene.arguments[parameter]
        outcome = scene.run(parameter, with_number(value, int(number)) if isinstance(value, np.ndarray) else number)
        if outcome.after != before:
            scene = doors.scene(recipe, item, verb)
        return outcome.error

    for parameter, value in scene.arguments.items():
        several = isinstance(value, np.ndarray) and value.dtype == np.int64 and value.ndim == 1 and value.size > 0
        number = is_number(value) or isinstance(value, float)
        if f"{verb or 'new'}.{parameter}" in recipe.skip or not (number or several):
            continue
        numbers: Iterable[float] = FLOATS
        if not isinstance(value, float):
            good, far = (value[0].item(), FAR >> 2) if several else (value, FAR)
            ways = (-far,) if parameter in recipe.amounts else (-far, far * 2 - 1 if several else far)
            where = f"{name} {parameter}"
            numbers = kept[where] if where in kept else edges(good, ways, partial(error, parameter))
        for number in numbers:
            if parameter in recipe.amounts and number > 1 << 20:
                continue
            said = error(parameter, number)
            yield f"{name} {parameter} = {number}: {'is taken' if said is None else said}"


def with_number(value: np.ndarray, number: int) -> np.ndarray:
    """Return an array with another first element, which may need 64 bits without a sign."""
    return np.array([number, *value[1:].tolist()], dtype=np.uint64 if number >> 63 > 0 else np.int64)


def edges(good: int, ways: Iterable[int], error: Callable[[int], Exception | None]) -> list[int]:
    """Return far numbers, on the way to each the last that is taken and the first that is not, and what is beside.

    The way is in steps of 1, or of what numbers must be multiples of. What is only too much for the memory that there
    is counts as taken.
    """

    def taken(number: int) -> bool:
        said = error(number)
        short = isinstance(said, OSError) and said.errno == ENOMEM
        return said is None or short or isinstance(said.__cause__ or said.__context__, MemoryError)

    step = next((size for size in (1, 64, 1 << 12, 1 << 20) if taken(good - size) or taken(good + size)), 1)
    found = {good - 1, good + 1} if step > 1 else set()
    for far in ways:
        inside, outside = good, far
        if taken(far):
            inside = far
        while abs(outside - inside) > step:
            middle = inside + (outside - inside) // (2 * step) * step
            if middle == inside:
                break
            if taken(middle):
                inside = middle
            else:
                outside = middle
        found |= {far, inside, outside}
    return sorted(found)


def aliased(new: Callable[[], Scene]) -> Iterator[str]:
    """Give a verb the object's own arrays and bitmaps: it is refused, or does as with a copy of them."""
    for parameter, value in new().arguments.items():
        if not isinstance(value, DirtyBitmap | np.ndarray):
            continue
        others = {name: each for name, each in new().arguments.items() if name != parameter}
        for number in range(len(doors.owned((new().subject, others), value))):
            scene, twin = new(), new()
            rest = {name: each for name, each in scene.arguments.items() if name != parameter}
            own = doors.owned((scene.subject, rest), value)[number]
            before = scene.state()
            outcome, plain = scene.run(parameter, own), twin.run(parameter, own.copy())
            wrong = Wrong("its own", own, own.copy(), has_twin=True)
            for complaint in judged(wrong, outcome, before, lambda plain=plain: plain, named=False):
                yield f"{parameter} = its own, number {number}: {complaint}"


def judged(
    wrong: Wrong, outcome: doors.Outcome, before: object, twin: Callable[[], doors.Outcome], *, named: bool
) -> Iterator[str]:
    """Yield what is wrong with an outcome; `twin` gives the one of the argument that it is to be like."""
    error = outcome.error
    if error is None:
        if wrong.refused:
            yield "is taken"
        elif wrong.has_twin and outcome != twin():
            yield "does something else than a plain argument"
        return
    if outcome.after != before:
        yield f"is refused, and something changed: {error!r}"
    if not doors.documented(error):
        yield f"raises {error!r}, which isn't documented"
    elif not isinstance(error, OSError) and not doors.on_purpose(error):
        yield f"fails somewhere inside: {error!r}"
    elif wrong.refused and not isinstance(error, TypeError) and not isinstance(wrong.value, np.ndarray):
        yield f"is refused with {error!r}, and not with a TypeError"
    elif named and is_number(wrong.value) and not wrong.refused and not doors.names(error, int(wrong.value)):
        yield f"isn't named in {error!r}"
    elif wrong.has_twin and not isinstance(wrong.twin, np.ndarray | DirtyBitmap | bytes | list | dict):
        plain = twin()
        if type(plain.error) is not type(error):
            yield f"is refused with {error!r}, a plain argument has {plain.error!r}"


def is_number(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def large(value: object) -> bool:
    return is_number(value) and value > 1 << 20


EMPTY = inspect.Parameter.empty


def called(name: str) -> Recipe | None:
    """Return the recipe of a door that is called with good arguments; None for the others."""
    _, verb = DOORS[name]
    recipe, own = recipe_of(name.rpartition(".")[0] if verb else name), verb or name.rpartition(".")[2]
    return None if own in {*recipe.skip, *recipe.dry} or (verb is None and "new" in recipe.skip) else recipe


LENDERS = {"get_dirty_log", "clear_dirty_log", "dirty", "take", "client"}


# What a call lends or opens is let go of here.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("few_objects")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("half", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_refused_means_unchanged(name: str, half: int) -> None:
    complaints = list(walked(name, half))
    assert not complaints, f"{name}:\n  " + "\n  ".join(complaints)
    if name.rpartition(".")[2] in LENDERS:  # a lease that is garbage warns: here, and not in another test
        gc.collect()


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("few_objects")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.alike(3)
def test_refused_where_the_others_are_left_out(name: str) -> None:
    """An argument of a wrong type, beside no more than what must be given: defaults lead other ways."""
    item, verb = DOORS[name]
    recipe = called(name)
    if recipe is None:
        return
    scene = doors.scene(recipe, item, verb)
    known = scene.parameters.signature.parameters
    left = {each: known[each].default for each in scene.arguments if each in known and known[each].default is not EMPTY}
    before, complaints = scene.state(), []
    for parameter, value in scene.arguments.items():
        if f"{verb or 'new'}.{parameter}" in recipe.skip or not left.keys() - {parameter}:
            continue
        for wrong in doors.wrong(value, parameter in scene.optional, parameter in scene.several):
            if not wrong.refused:
                continue
            outcome = scene.run_with({**left, parameter: wrong.value})
            found = list(judged(wrong, outcome, before, lambda same=outcome: same, named=False))
            if found and repr(doors.scene(recipe, item, verb).run_with(left).error) == repr(outcome.error):
                continue  # it is the defaults that are refused
            complaints += [f"{parameter} = {wrong.label}, and no others: {each}" for each in found]
            if outcome.error is None or outcome.after != before:
                scene = doors.scene(recipe, item, verb)
    assert not complaints, f"{name}:\n  " + "\n  ".join(complaints)
    if name.rpartition(".")[2] in LENDERS:
        gc.collect()


# Some need more than this package, and kernels take no numbers.
ROOMS = sorted({name.partition(".")[0] for name in DOORS} - {"kvm", "arm", "kernels"})


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("room", ROOMS)
def test_limits_are_the_ones_that_were_looked_at(room: str) -> None:
    file, kept = f"limits/{room}.txt", defaultdict[str, list[int]](list)
    for line in () if writing() else (DATA / file).read_text().splitlines():
        where, _, number = line.partition(": ")[0].rpartition(" = ")
        if number.removeprefix("-").isdigit():
            kept[where].append(int(number))
    lines = [line for name in DOORS if name.partition(".")[0] == room for line in limits(name, kept)]
    as_seen(file, "".join(f"{line}\n" for line in lines))


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", NAMES if EFFORT > 1 else NAMES[::25])  # all of them in `make thorough`
def test_several_wrong_arguments_at_once(name: str) -> None:
    item, verb = DOORS[name]
    recipe = called(name)
    if recipe is None:
        return
    rng, scene = np.random.default_rng(len(name)), doors.scene(recipe, item, verb)
    before, names = scene.state(), [each for each in scene.arguments if f"{verb or 'new'}.{each}" not in recipe.skip]
    for _ in range(5 * EFFORT if len(names) > 1 else 0):
        chosen = {}
        for each in rng.permutation(names)[: rng.integers(2, len(names) + 1)].tolist():
            several = [
                one
                for one in doors.wrong(scene.arguments[each], each in scene.optional, each in scene.several)
                if not (each in recipe.amounts and large(one.value))
            ]
            if several:
                chosen[each] = several[int(rng.integers(len(several)))]
        outcome = scene.run_with({each: one.value for each, one in chosen.items()})
        labels = {each: one.label for each, one in chosen.items()}
        if outcome.error is None:
            assert not any(one.refused for one in chosen.values()), labels
        else:
            assert doors.documented(outcome.error), (labels, outcome.error)
            assert isinstance(outcome.error, OSError) or doors.on_purpose(outcome.error), (labels, outcome.error)
            assert outcome.after == before, (labels, outcome.error)
        if outcome.error is None or outcome.after != before:
            scene = doors.scene(recipe, item, verb)


# Verbs of a closed object: its end again, and what vCPUs that come to theirs may still call.
AFTER_CLOSE = {"close", "flush"}
CLOSED = ("machine.Machine", "machine.GuestMemory", "vm.PlainGuest", "kvm.KvmVm", "kvm.Kvm", "kvm.VmFd", "kvm.VcpuFd")


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=NEEDS_KVM) if name.startswith("kvm.") else name
        for name, (_, verb) in DOORS.items()
        if verb and name.rpartition(".")[0] in CLOSED and verb not in AFTER_CLOSE
    ],
)
def test_a_closed_object_says_so(name: str) -> None:
    item, verb = DOORS[name]
    recipe = recipe_of(name.rpartition(".")[0])
    if isinstance(inspect.getattr_static(item, verb), classmethod) or verb in recipe.skip:
        return
    scene = doors.scene(recipe, item, verb)
    scene.subject.close()
    scene.subject.close()
    error = scene.run().error
    assert isinstance(error, ClosedError) or (isinstance(error, OSError) and error.errno == EBADF), repr(error)
