"""Forecasts beside real migrations: ``python -P tests/forecast/judge.py --output RUNS.jsonl`` (`make judge`).

Guests write by patterns, or are Linux with real work, in QEMU; or they are this project's own, on /dev/kvm. Before each
migration a trace of some seconds is recorded, and the forecast is made from it, the bandwidth and the downtime limit.
Then the guest is migrated over TCP on loopback, and a line of JSON has both. What a migration costs beside its bytes is
measured first, with guests that aren't judged. ``--quick`` does a few in two minutes and says whether the errors are
within bounds; the exit status says so, too.

As root the processes go before others, and a link is made that is as slow as it is said to be: a network namespace
whose loopback has a token bucket. Without that the bandwidth is QEMU's limit alone, which it lifts when the guest is
paused; runs that need a link are then named as left out.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import content
import guests
import numpy as np
import page
import qemu

from hwdbm import forecast, kernels
from hwdbm.cli.guest import KvmLog, build_kvm, kvm_for
from hwdbm.errors import ConvergenceError, SampleError
from hwdbm.kvm import Kvm, KvmUnavailableError, KvmVm
from hwdbm.migration import Precopy, Report, Settings, receive, transport
from hwdbm.trace import record

MB, MIB, PAGE = 1_000_000, 1 << 20, 4096
READY = 0x600DBEEF  # what pattern.c writes when it has filled its memory
BASE = 16 << 20  # and where its memory begins
NETNS = f"hwdbm-judge-{os.getpid()}"
FLAT = 15  # passes without progress after which our own migrations give up
WRITTEN = 150  # MB/s of a guest that writes when terms are measured
PAUSE = 1e-3  # seconds until the guest stands still
CALIBRATION = 80  # MB/s of the link when its terms are measured
REST = 6.0  # seconds before: memory that has rested is slower to look at, and that of guests that are judged has
BUFFERS = 0.02  # seconds of the link that a socket's buffer holds
BUCKET = 0.004  # and its bucket: a tick of the kernel's; at least two of loopback's packets
TRACE = (3.0, 10.0)  # seconds that are recorded before each, at least and at most: as long as a first pass


# --- what is judged ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """A migration: MB/s, ms, whether the link itself is that slow, and the seconds after which it is given up."""

    bandwidth: float
    limit: int
    link: bool = False
    patience: float = 12


@dataclass(frozen=True)
class Case:
    """A guest, and how it is migrated, again and again."""

    kind: str
    name: str
    what: str
    settings: tuple[Setting, ...]
    memory: int = 256  # MiB
    trace: float = TRACE[0]
    accel: str = "tcg"


def _(bandwidth: float, limit: int, patience: float = 12) -> Setting:
    return Setting(bandwidth, limit, patience=patience)


def link(bandwidth: float, limit: int, patience: float = 12) -> Setting:
    return Setting(bandwidth, limit, link=True, patience=patience)


CASES = (
    Case("pattern", "idle", "fill=48", (link(8, 300, 20), link(40, 30), _(200, 300), _(800, 30))),
    Case(
        "pattern", "hot set", "fill=64 uniform:0:16:4000",
        (link(50, 500), link(100, 60), _(24, 300), link(12, 200, 15)),
    ),
    Case(
        "pattern", "hot set, wide", "fill=96 uniform:0:96:3000",
        (link(60, 300), link(100, 200), link(20, 60), _(200, 30)),
    ),
    Case(
        "pattern", "zipf", "fill=96 zipf:0:64:8000",
        (link(50, 300), link(50, 300), link(100, 100), link(100, 100), link(30, 1000), link(24, 60)),
    ),
    Case(
        "pattern", "stream", "fill=128 stream:0:128:5000",
        (link(60, 500), link(60, 500), link(100, 100), link(16, 300), _(200, 50)),
    ),
    Case(
        "pattern", "hot and cold", "fill=96 uniform:0:4:8000 uniform:8:88:800",
        (link(40, 300), link(100, 60), link(30, 30), _(100, 300)),
    ),
    Case(
        "pattern", "phases", "fill=96 uniform:0:8:6000:2000:0:1000 stream:16:64:6000:2000:1000:2000",
        (link(60, 300), link(100, 150), link(30, 60), _(200, 100)), trace=4.0,
    ),
    Case("pattern", "zeros", "fill=64 zero:0:64:6000", (link(50, 300), link(150, 50), _(400, 300)), trace=6.0),
    Case("pattern", "large", "fill=320 uniform:0:24:2000", (link(200, 100), _(800, 300)), memory=512),
    Case("linux", "idle", "idle", (link(50, 300), link(100, 30), _(400, 300)), memory=320),
    Case("linux", "gzip", "gzip", (link(60, 300), link(200, 100), link(30, 1000)), memory=320),
    Case("linux", "zstd", "zstd", (link(100, 300), link(200, 300), link(50, 100)), memory=320),
    Case("linux", "xz", "xz", (link(60, 500), link(200, 200), link(40, 60)), memory=320),
    Case("linux", "sqlite", "sqlite", (link(100, 300), link(100, 300), link(200, 100), link(30, 100)), memory=320),
    Case("linux", "redis", "redis", (link(100, 300), link(100, 300), link(300, 100), link(30, 60)), memory=320),
    Case(
        "linux", "build", "build",
        (link(100, 300), link(100, 300), link(300, 100), link(30, 100), link(50, 1000)), memory=320,
    ),
    Case("own", "random", "random", (_(50, 300), _(100, 100), _(30, 300), _(12, 30)), memory=128),
    Case("own", "counting", "counting", (_(50, 500), _(100, 100), _(20, 100), _(200, 50)), memory=128),
    Case("own", "idle", "idle", (_(30, 300), _(100, 30), _(400, 100)), memory=128),
)  # fmt: skip
"""More than 60 migrations, a few of them twice: how far two of them lie apart is what can't be foreseen."""

QUICK = (
    Case("pattern", "hot set", "fill=64 uniform:0:16:4000", (link(50, 500), _(100, 300)), memory=128),
    Case("pattern", "stream", "fill=64 stream:0:64:5000", (link(12, 300, 8), link(60, 300)), memory=128),
    Case("own", "random", "random", (_(50, 300),), memory=96),
)
BOUND = {"total-time": 1.4, "downtime": 1.9}
"""How many times too long or too short the median of the quick runs may be: less than a factor of two."""

OWN_RATE = 1500  # pages a second that our own guests write


# --- the link ----------------------------------------------------------------------------------------------


class Link:
    """A network namespace whose loopback is as slow as it is asked to be; nothing is there for those who may not."""

    def __init__(self, stack: ExitStack) -> None:
        self.there = False
        made = subprocess.run(["ip", "netns", "add", NETNS], capture_output=True, text=True, check=False)
        if made.returncode:
            self.why = made.stderr.strip() or "ip can't make a network namespace"
            return
        stack.callback(subprocess.run, ["ip", "netns", "del", NETNS], check=False)
        self.there, self.prefix = True, ("ip", "netns", "exec", NETNS)
        subprocess.run(["ip", "-n", NETNS, "link", "set", "lo", "up"], check=True)

    def be(self, rate: float | None) -> None:
        """Carry so many bytes a second from now on; None for as many as it can."""
        if not self.there:
            return
        subprocess.run([*self.prefix, "tc", "qdisc", "del", "dev", "lo", "root"], capture_output=True, check=False)
        # What waits in a socket's buffer has left QEMU, and isn't there yet: some ms, as on a well tuned network.
        size = 4 << 20 if rate is None else max(round(rate * BUFFERS), 1 << 16)
        for what in ("tcp_wmem", "tcp_rmem"):
            command = ["sysctl", "-qw", f"net.ipv4.{what}=4096 {size} {size}"]
            subprocess.run([*self.prefix, *command], check=True)
        if rate is not None:
            burst = max(round(rate * BUCKET), 1 << 17)
            bucket = ["tbf", "rate", f"{round(rate)}bps", "burst", f"{burst}b", "limit", "16mb"]
            subprocess.run([*self.prefix, "tc", "qdisc", "add", "dev", "lo", "root", *bucket], check=True)


# --- QEMU's guests -----------------------------------------------------------------------------------------


def machine_of(case: Case, prefix: tuple[str, ...]) -> qemu.Machine:
    if case.kind == "linux":
        kernel, initrd = guests.linux()
        return qemu.Machine(
            case.memory << 20,
            kernel,
            f"console=ttyS0 quiet panic=-1 work={case.what}",
            initrd,
            case.accel,
            prefix=prefix,
        )
    polls = " poll=1" if case.accel == "kvm" else ""
    return qemu.Machine(case.memory << 20, guests.pattern(), case.what + polls, None, case.accel, prefix=prefix)


def wait_ready(case: Case, side: qemu.Side) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if case.kind == "linux":
            if "READY" in side.serial.read_text(errors="replace"):
                time.sleep(2)  # it has just begun
                return
        else:
            filled = int(case.what.partition("fill=")[2].split()[0]) << 20
            if int(side.memory()[(BASE + filled) // PAGE, 0]) & 0xFFFF_FFFF == READY:
                return
        time.sleep(0.02)
    raise SystemExit(f"{case.kind} guest {case.name!r} isn't ready after a minute")


def long_enough(case: Case, memory: np.ndarray, setting: Setting) -> float:
    """Return the seconds to record: as long as the first pass, and a little more."""
    filled = int(np.count_nonzero(memory[:, 0] | memory[:, 256])) * PAGE
    return min(max(1.2 * filled / (setting.bandwidth * MB), case.trace), TRACE[1])


def trace_of(case: Case, setting: Setting, side: qemu.Side, firmware: tuple[int, int]) -> content.Content:
    memory = side.memory()
    trace = content.record(memory, long_enough(case, memory, setting), interval=0.1)
    return content.beside(trace, *firmware)


# --- the terms ---------------------------------------------------------------------------------------------


def calibrate(net: Link, folder: Path) -> tuple[forecast.Terms, forecast.Terms, tuple[int, int]]:
    """Return QEMU's terms here, and those of a slow link, measured with guests that aren't judged.

    One is of zeros, one is full, and one writes: while it stands still, QEMU sends slower than before. Also return how
    many pages QEMU has beside the guest's memory, its firmware's, and how many of them aren't zero.
    """
    more: list[tuple[int, int]] = []

    def runs_of(name: str, memory: int, what: str, *settings: Setting) -> list[list[qemu.Run]]:
        """Return four runs of a guest at each setting."""
        case, found = Case("pattern", name, what, (), memory=memory), []
        with qemu.guest(machine_of(case, net.prefix if net.there else ()), folder) as pair:
            wait_ready(case, pair.side)
            for each in settings:
                net.be(each.bandwidth * MB if each.link else None)
                runs = []
                for _ in range(4):
                    time.sleep(0 if each.link else REST)
                    runs.append(pair.migrate(bandwidth=each.bandwidth * MB, downtime_limit=each.limit, timeout=20))
                assert all(run.status == "completed" for run in runs), runs
                found.append(runs)
                memory = pair.side.memory()
                pages = runs[0].samples[-1]["ram"]["total"] // PAGE - len(memory)
                filled = min(run.normal for run in runs) - int(np.count_nonzero(memory.any(axis=1)))
                more.append((pages, min(max(filled, 0), pages)))
        net.be(None)
        return found

    fast = _(100_000, 1)
    (of_zeros,) = runs_of("zeros", 512, "fill=1", fast)
    of_full, *slowly = runs_of("full", 256, "fill=232", fast, *([link(CALIBRATION, 300)] if net.there else []))
    (of_written,) = runs_of("written", 256, "fill=128 uniform:0:48:3000", _(WRITTEN, 300))

    # What else went on here is none of QEMU's terms; how fast memory is, is.
    zeros, full = (sorted(runs, key=lambda run: run.total_time) for runs in (of_zeros, of_full))
    zero, whole = zeros[len(zeros) // 2], full[0]
    setup = statistics.median(run.setup_time for run in of_zeros + of_full) / 1e3
    zero_page = max((zero.total_time - zero.downtime) / 1e3 - setup, 0) / zero.duplicate
    seconds = max((whole.total_time - whole.downtime) / 1e3 - whole.duplicate * zero_page, 1e-3)
    handover = max(statistics.median(run.stopped for run in of_zeros + of_full) / 1e3 - PAUSE, 0.0)
    last = statistics.median(last_pass(run, handover) for run in of_written)
    terms = replace(
        forecast.QEMU,
        setup=setup,
        zero_page=zero_page,
        pause=PAUSE,
        handover=handover,
        last_bandwidth=min(last, whole.transferred / seconds),
        spread=spread_of([each["ram"]["mbps"] for run in of_written for each in turns(run)]),
    )
    quick, *slow = (statistics.median(map(after_the_last, runs)) for runs in (of_full, *slowly))
    burst = max(slow[0] - quick, 0.0) if slow else 0.0
    return terms, replace(terms, last_bandwidth=None, burst=burst, spread=forecast.QEMU.spread), min(more)


def turns(run: qemu.Run) -> list[dict[str, Any]]:
    """Return the samples that say what QEMU sent in one of its turns: it has a share of the bandwidth for each."""
    return [each for each in run.samples if each["status"] == "active" and each["ram"]["mbps"]]


def spread_of(rates: list[float]) -> float:
    """Return the standard deviation of rates, as a part of them: limits are kept better than networks are."""
    return statistics.pstdev(rates) / statistics.mean(rates)


def last_pass(run: qemu.Run, handover: float) -> float:
    """Return the bytes a second that were sent while the guest stood still."""
    assert run.stopped is not None, run
    sent: int = run.samples[-1]["ram"]["downtime-bytes"]
    return sent / max(run.stopped / 1e3 - handover - PAUSE, 1e-3)


def after_the_last(run: qemu.Run) -> float:
    """Return the seconds from the last byte's being with the socket until the guest ran on."""
    assert run.stopped is not None, run
    assert run.downtime is not None, run
    return (run.stopped - run.downtime) / 1e3


# --- forecasts ---------------------------------------------------------------------------------------------


def dirty_rate(trace: Any, period: float = 1.0) -> float:
    """Return the bytes a second that tools measure: distinct pages of a second."""
    times, rates = np.asarray(trace.times) / 1e9, []
    for begin in np.arange(0, times[-1] - period + 0.05, period):
        lo, hi = (min(int(each), len(times) - 1) for each in np.searchsorted(times, [begin, begin + period]))
        if lo < hi:
            union = np.bitwise_or.reduce(trace.words(lo, hi), axis=0)
            rates.append(int(np.bitwise_count(union).sum()) * trace.page_size / (times[hi] - times[lo]))
    return float(np.median(rates)) if rates else 0.0


def used(trace: Any) -> int:
    """Return the bytes of memory that aren't zero."""
    zeros = 0 if trace.initial_zeros is None else int(np.bitwise_count(trace.initial_zeros).sum())
    return (trace.npages - zeros) * trace.page_size


def before(trace: Any, setting: Setting, terms: forecast.Terms, **more: Any) -> dict[str, Any]:
    """Return the forecasts that are made before a migration."""
    rate, size = setting.bandwidth * MB, used(trace)
    limit = setting.limit / 1e3
    begun = time.monotonic()
    given = {"terms": terms, "timeout": setting.patience, "now": True, "needs": False} | more
    found = forecast.replay(trace, bandwidth=rate, max_downtime=limit, **given).to_dict()
    took = time.monotonic() - begun
    series = forecast.geometric(size, dirty_rate(trace), rate, limit)
    return {
        "forecast": found,
        "took": round(took * 1e3, 1),
        "geometric": {
            "converges": series.converges,
            "total-time": series.total_time.value * 1e3,
            "downtime": series.downtime.value * 1e3,
        },
        "remaining/bandwidth": {
            "converges": True,
            "total-time": forecast.remaining_over_bandwidth(size, rate) * 1e3,
            "downtime": setting.limit,
        },
        "used": size,
        "dirty-rate": round(dirty_rate(trace)),
        "trace": {"intervals": len(trace.times) - 1, "seconds": round(float(trace.times[-1]) / 1e9, 3)},
    }


def during(samples: list[dict[str, Any]], setting: Setting, terms: forecast.Terms) -> dict[str, Any]:
    """Return what the samples say that were there when the second pass and the third had begun."""
    found: dict[str, Any] = {}
    for number in (2, 3):
        known, begun = [], False
        for sample in samples:
            if sample.get("status") != "active" or "ram" not in sample:
                continue
            if sample["ram"].get("downtime-bytes"):
                break  # the guest is paused
            known.append(sample)
            begun = sample["ram"]["dirty-sync-count"] >= number
            if begun:
                break
        if not begun:
            continue
        lines = [json.dumps(sample) for sample in known]
        with suppress(SampleError):
            said = forecast.from_samples(
                forecast.read_samples(lines), bandwidth=setting.bandwidth * MB, max_downtime=setting.limit / 1e3,
                terms=terms, timeout=setting.patience, needs=False,
            )  # fmt: skip
            found[f"after pass {number - 1}"] = said.to_dict()
    return found


def compact(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what is needed of QEMU's samples to make the forecasts again, as QEMU names it."""
    names = (
        *("remaining", "transferred", "total", "dirty-sync-count", "dirty-pages-rate", "mbps", "duplicate"),
        *("page-size", "downtime-bytes"),
    )
    return [
        {"time": each["time"], "status": each["status"], "total-time": each.get("total-time", 0)}
        | {name: each[name] for name in ("expected-downtime", "downtime") if name in each}
        | {"ram": {name: each["ram"][name] for name in names}}
        for each in samples
        if "ram" in each
    ]


# --- the runs ----------------------------------------------------------------------------------------------


def judged_qemu(
    case: Case, net: Link, folder: Path, terms: forecast.Terms, slow: forecast.Terms, firmware: tuple[int, int]
) -> Iterator[dict[str, Any]]:
    settings = [setting for setting in case.settings if net.there or not setting.link]
    tries = 2 * len(settings)  # a QEMU that is gone is started again, which is told
    while settings and tries:
        with qemu.guest(machine_of(case, net.prefix if net.there else ()), folder) as pair:
            wait_ready(case, pair.side)
            while settings and tries:
                tries -= 1
                try:
                    yield judged_once(case, settings[0], pair, net, terms, slow, firmware)
                except qemu.QmpError as error:
                    print(f"{case.kind}, {case.name}, {settings[0].bandwidth:g} MB/s: {error}", flush=True)
                    break
                del settings[0]


def judged_once(
    case: Case, setting: Setting, pair: Any, net: Link, terms: forecast.Terms, slow: forecast.Terms,
    firmware: tuple[int, int],
) -> dict[str, Any]:  # fmt: skip
    """Record a guest of QEMU's, forecast, and migrate it."""
    time.sleep(0.7)  # a QEMU that is new translates the guest's code first
    trace = trace_of(case, setting, pair.side, firmware)
    own = slow if setting.link else terms
    capped = replace(setting, bandwidth=min(setting.bandwidth, (terms.last_bandwidth or 1e12) / MB))
    said = before(trace, capped, own)
    net.be(setting.bandwidth * MB if setting.link else None)
    try:
        run = pair.migrate(
            bandwidth=int(setting.bandwidth * MB), downtime_limit=setting.limit, timeout=setting.patience, flat=10_000
        )
    finally:
        net.be(None)
    happened = {name.replace("_", "-"): value for name, value in asdict(run).items()}
    samples, stopped = happened.pop("samples"), happened.pop("stopped")
    if run.status == "completed":
        # QEMU's own clock ends when the sockets have the last byte, and not when the guest runs again.
        happened["qemu"] = {name: happened[name] for name in ("total-time", "downtime")}
        happened["total-time"] = round(run.total_time - run.downtime + stopped, 3)
        happened["downtime"] = stopped
    return (
        said
        | {"after": during(samples, capped, own)}
        | {"happened": happened}
        | {"samples": compact(samples), "setting": setting, "record": trace}
    )


def migrate_own(vm: KvmVm, setting: Setting, port: int) -> Report:
    settings = Settings(
        max_downtime=setting.limit / 1e3, bandwidth=setting.bandwidth * MB, max_iterations=FLAT, on_limit="abort"
    )
    with transport.connect_tcp("127.0.0.1", port, None, insecure=True) as channel:
        precopy = Precopy(vm, channel, settings)
        with suppress(ConvergenceError):
            precopy.run()
    return precopy.report


def calibrate_own(folder: Path) -> forecast.Terms:
    """Return the terms of our own migrations here, measured with a guest that isn't judged.

    It is recorded first, as those are that are judged: a log that was read is slower to read.
    """
    size, reports = 160 * MIB, []
    for number in range(5):
        with build_kvm(size, log=KvmLog.BITMAP, workload="idle", rate=None, seed=number, image=None, percent=90) as vm:
            vm.resume()
            record(vm, folder / f"calibration-{number}", interval=0.1, duration=1.0)
            with peer() as port:
                reports.append(migrate_own(vm, Setting(300, 300), port))
    known = forecast.OWN.pause + forecast.OWN.pass_time + forecast.OWN.sync(size)
    return replace(
        forecast.OWN,
        setup=statistics.median(each.setup_time for each in reports),
        setup_gib=0.0,
        verify_gib=statistics.median(each.verify_time for each in reports) / (size / 2**30),
        handover=max(statistics.median(each.downtime for each in reports) - known, 0.0),
        spread=spread_of([each.transferred / each.total_time for each in reports]),
    )


def judged_own(case: Case, folder: Path, terms: forecast.Terms) -> Iterator[dict[str, Any]]:
    """Migrate guests of our own over TCP to another process."""
    for number, setting in enumerate(case.settings):
        rate = None if case.what == "idle" else OWN_RATE
        vm = build_kvm(
            case.memory << 20, log=KvmLog.BITMAP, workload=case.what, rate=rate, seed=number, image=None, percent=100
        )
        with vm, peer() as port:
            vm.resume()
            time.sleep(0.3)
            seconds = long_enough(case, vm.memory(0).view(np.uint64).reshape(-1, PAGE // 8), setting)
            trace = record(vm, folder / f"{case.what}-{number}", interval=0.1, duration=seconds)
            said = before(trace, setting, terms, max_iterations=FLAT, on_limit="abort", timeout=None)
            report = migrate_own(vm, setting, port)
            done = report.status == "completed"
            run = {
                "status": "completed" if done else "flat",
                "total-time": report.total_time * 1e3,
                "downtime": report.downtime * 1e3 if done else None,
                "transferred": report.transferred,
                "syncs": len(report.passes),
            }
            yield said | {"after": {}, "happened": run, "samples": [], "setting": setting, "record": trace}


@contextmanager
def peer() -> Iterator[int]:
    """Start a process that a guest can go to, and give its port."""
    command = [sys.executable, "-P", __file__, "--peer"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdin
            assert process.stdout
            yield int(process.stdout.readline())
            process.stdin.close()
            process.wait(20)
        finally:
            process.kill()


def serve() -> None:
    kernels.warm_up()  # as `hwdbm receive` does
    with transport.listen_tcp("127.0.0.1", 0, None, insecure=True) as listener:
        print(listener.address.rpartition(":")[2], flush=True)
        channel = listener.accept(60)
    with channel, suppress(OSError):  # a migration that is given up
        received = receive(channel, lambda layout: kvm_for(layout, log=KvmLog.BITMAP))
        sys.stdin.read()
        received.destination.close()


def kept(folder: Path | None, number: int, trace: Any) -> None:
    """Keep a trace, for who looks for what a forecast leaves out."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        n = len(trace.times) - 1
        np.savez_compressed(
            folder / f"{number:03}", times=trace.times, words=trace.words(0, n), zeros=trace.zeros(0, n),
            initial_zeros=trace.initial_zeros, npages=trace.npages,
        )  # fmt: skip


def judge(cases: tuple[Case, ...], output: Path | None, repeat: int, keep: Path | None) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hwdbm-", dir="/dev/shm")))
        net = Link(stack)
        if not net.there:
            left = sum(setting.link for case in cases for setting in case.settings)
            print(f"no link of its own ({net.why}): {left * repeat} runs that need it are left out", flush=True)
        out = stack.enter_context(output.open("w")) if output else None
        warm_up()
        terms, slow, firmware = calibrate(net, folder)
        own = calibrate_own(folder) if any(case.kind == "own" for case in cases) else forecast.OWN
        print(f"QEMU's terms here: {told(terms)}\non a link: {told(slow)}\nour own: {told(own)}")
        print(f"beside a guest's memory QEMU has {firmware[0]} pages, of which {firmware[1]} aren't zero")
        print(HEAD, flush=True)
        for case in cases * repeat:
            runs = (
                judged_own(case, folder, own)
                if case.kind == "own"
                else judged_qemu(case, net, folder, terms, slow, firmware)
            )
            for found in runs:
                setting = found.pop("setting")
                kept(keep, len(lines), found.pop("record"))
                line = {
                    "kind": case.kind, "guest": case.name, "what": case.what, "memory": case.memory << 20,
                    "accel": "kvm" if case.kind == "own" else case.accel, "bandwidth": setting.bandwidth * MB,
                    "max-downtime": setting.limit, "link": setting.link, "patience": setting.patience,
                    "load": [round(each, 2) for each in os.getloadavg()],
                    "terms": set_of(own if case.kind == "own" else slow if setting.link else terms),
                } | found  # fmt: skip
                lines.append(line)
                print(row(line), flush=True)
                if out:
                    out.write(json.dumps(line) + "\n")
                    out.flush()
    return lines


def set_of(terms: forecast.Terms) -> dict[str, Any]:
    return {name: value for name, value in asdict(terms).items() if value}


def told(terms: forecast.Terms) -> str:
    return ", ".join(
        f"{name} {value if isinstance(value, str) else f'{value:.3g}'}" for name, value in set_of(terms).items()
    )


def warm_up() -> None:
    """Compile what is compiled, before anything is timed."""
    kernels.warm_up()
    small = np.zeros((64, PAGE // 8), dtype=np.uint64)
    content.record(small, 0.01, 0.01)


# --- what is said of them ----------------------------------------------------------------------------------

HEAD = (
    f"{'guest':24} {'MB/s':>6} {'limit':>6}  {'':10} {'total ms: said':>15} {'was':>8}  {'down ms: said':>14} "
    f"{'was':>7}  {'load':>5}"
)


def row(line: dict[str, Any]) -> str:
    said, was = line["forecast"], line["happened"]
    verdict = "completed" if was["status"] == "completed" else was["status"]
    if said["converges"] != (was["status"] == "completed"):
        verdict = f"!{verdict}"
    name = f"{line['kind']}, {line['guest']}"
    down = "-" if was["downtime"] is None else f"{was['downtime']:.0f}"
    return (
        f"{name:24} {line['bandwidth'] / MB:6g} {line['max-downtime']:5}{'L' if line['link'] else ' '}  {verdict:10} "
        f"{said['total-time']['value']:15.0f} {was['total-time']:8.0f}  {said['downtime']['value']:14.0f} {down:>7}  "
        f"{line['load'][0]:5.1f}"
    )


def factors(lines: list[dict[str, Any]], what: str) -> np.ndarray:
    """Return by how many times the forecasts were too long or too short; of times below 5 ms nothing is asked."""
    pairs = [
        (max(line["forecast"][what]["value"], 5), max(line["happened"][what], 5))
        for line in lines
        if page.error(line, "forecast", what) is not None
    ]
    return np.array([max(said / was, was / said) for said, was in pairs])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, help="where the lines go")
    parser.add_argument("--quick", action="store_true", help="a few runs, whose errors must be within bounds")
    parser.add_argument("--repeat", type=int, default=1, help="how often each is done")
    parser.add_argument("--only", default="", metavar="WORD", help="guests whose kind and name have this word")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where the traces go")
    parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.peer:
        serve()
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, -15)
    cases = QUICK if asked.quick else CASES
    cases = tuple(case for case in cases if asked.only in f"{case.kind} {case.name}")
    try:
        Kvm().close()
    except KvmUnavailableError as error:
        print(f"our own guests are left out: {error}", flush=True)
        cases = tuple(case for case in cases if case.kind != "own")
    begun = time.monotonic()
    wrong = report(judge(cases, asked.output, asked.repeat, asked.keep), begun)
    if asked.quick and wrong:  # what else ran here may have been why; a forecast that is wrong is wrong again
        print("; ".join(wrong) + ": once more", flush=True)
        begun = time.monotonic()
        wrong = report(judge(cases, asked.output, asked.repeat, asked.keep), begun)
    if asked.quick and wrong:
        sys.exit("; ".join(wrong))


def report(lines: list[dict[str, Any]], begun: float) -> list[str]:
    """Print how far the forecasts were off, and return what is beyond bounds."""
    share = page.right(lines, "forecast")
    print(f"{len(lines)} migrations in {time.monotonic() - begun:.0f} s; converges or not, right in {share:.0%}")
    wrong = []
    for what, bound in BOUND.items():
        found = page.errors(lines, "forecast", what)
        middle, high = (np.median(found), np.quantile(found, 0.9)) if found.size else (np.nan, np.nan)
        factor = float(np.median(factors(lines, what))) if found.size else np.nan
        name = what.replace("-", " ")
        print(f"{name}: median error {middle:.0%}, 90th percentile {high:.0%}; off by a factor of {factor:.2f}")
        if not factor <= bound:
            wrong.append(f"the {name} is off by a factor of {factor:.2f} in the median, and may be by {bound:g}")
    if share < 0.75:
        wrong.append("converges or not is wrong in more than a quarter")
    return wrong


if __name__ == "__main__":
    main()
