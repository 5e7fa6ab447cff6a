"""Samples of a migration that goes on, and reading them from what QEMU, libvirt and Cloud Hypervisor print."""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from hwdbm import check, files
from hwdbm.errors import SampleError, brief, shown, some

_MIB = float(1 << 20)
_ROUNDED = 1.01  # ratio by which sizes in texts may be off
_LONGEST = 1 << 20  # characters of a line
_END = 10**30  # no number reaches it
MOST = 64 << 20
"""Bytes of a file of samples."""

_REALS = ("time", "remaining", "total", "transferred", "bandwidth", "dirty_rate", "downtime_limit")
_NEEDED = {"time", "remaining"}
_WHOLES = (("iteration", 0, None), ("zero_pages", 0, None), ("page_size", 1, None), ("throttle", 0, 100))


@dataclass(frozen=True, slots=True)
class Sample:
    """How far a migration was at a moment. Times are in seconds, sizes in bytes, rates in bytes a second.

    Parameters
    ----------
    time : float
        Since the migration began.
    iteration : int
        The pass that goes on: 1 is the one that sends everything.
    remaining : float
        Bytes that are known to be dirty, and weren't sent.
    total : float, optional
        Bytes of memory.
    transferred : float, optional
        Bytes sent.
    bandwidth : float, optional
        At which bytes were sent lately.
    dirty_rate : float, optional
        At which the guest dirtied memory lately.
    zero_pages : int, optional
        Pages sent as zero.
    page_size : int
        Bytes.
    downtime_limit : float, optional
        Seconds that the guest may stand still.
    throttle : int
        Percent of their time that the vCPUs are without.
    status : str
        QEMU's ``MigrationStatus``.
    source : str
        Where it is from: "qemu", "libvirt", "cloud-hypervisor" or "hwdbm"; empty if unknown.
    """

    time: float
    iteration: int
    remaining: float
    total: float | None = None
    transferred: float | None = None
    bandwidth: float | None = None
    dirty_rate: float | None = None
    zero_pages: int | None = None
    page_size: int = 4096
    downtime_limit: float | None = None
    throttle: int = 0
    status: str = "active"
    source: str = ""

    def __post_init__(self) -> None:
        # There may be hundreds of thousands: what is a float or an int already isn't put again.
        for name in _REALS:
            if (real := getattr(self, name)) is not None or name in _NEEDED:
                number = check.real(real, name, 0)
                if number is not real:
                    object.__setattr__(self, name, number)
        for name, low, high in _WHOLES:
            if (whole := getattr(self, name)) is not None or name != "zero_pages":
                integer = check.integer(whole, name, low, high)
                if integer is not whole:
                    object.__setattr__(self, name, integer)
        check.instance(self.status, str, "status")
        check.instance(self.source, str, "source")


def read_samples(lines: Iterable[str]) -> list[Sample]:
    """Read the samples of one migration, in order.

    Each line is a JSON object: the answer to QMP's ``query-migrate``, alone or in its ``return``; what libvirt's
    ``virDomainGetJobStats`` returns; Cloud Hypervisor's migration progress; or a pass, or the whole report, of
    ``hwdbm migrate --json``, which may go over several lines. The texts of ``virsh domjobinfo``, one after the other,
    and the lines that Cloud Hypervisor logs for each iteration, are read too. The keys say which it is.

    Parameters
    ----------
    lines : iterable of str
        The lines of a file, say.

    Returns
    -------
    list of Sample
        One or more. An answer from before the migration, without memory to tell of, is left out.

    Raises
    ------
    SampleError
        If a line can't be read, a number is none, or negative, more remains than there is memory, or time or the
        iteration goes backwards; and if there is no sample.

    Examples
    --------
    >>> line = '{"status": "active", "total-time": 1500, "ram": {"total": 8192, "remaining": 4096, "mbps": 8}}'
    >>> read_samples([line])[0].bandwidth
    1000000.0
    """
    if isinstance(lines, str) or not isinstance(lines, Iterable):
        raise TypeError(f"lines is an iterable of lines, not {shown(lines)}")
    samples: list[Sample] = []
    passes: list[_Numbers] = []
    kinds: set[str] = set()
    text = ""
    for number, item in _items(lines):
        kind = _kind(item, number)
        if not kind:
            continue
        kinds.add(kind)
        if len(kinds) > 1:
            raise SampleError(f"line {number}: a sample of another kind than those before it")
        if isinstance(item, str):
            numbers, text = _Numbers({"text": item, "before": text}, number), item
        else:
            numbers = _Numbers(item.get("return", item), number)
        if kind == "pass":
            passes.append(numbers)
        else:
            _add(samples, number, _READERS[kind], numbers)
    if passes:
        _add(samples, number, _of_passes, passes)
    if not samples:
        raise SampleError("there are no samples of a migration in that")
    return samples


def read_sample_file(path: str | os.PathLike[str]) -> list[Sample]:
    """Read the samples of one migration from a file, as `read_samples` does from its lines.

    Raises
    ------
    SampleError
        As `read_samples` says, and if the file is longer than samples are; the text names the file.
    OSError
        If it can't be read, or is no regular file.
    """
    with files.open_regular(path) as file:
        raw = file.read(MOST + 1)
    if len(raw) > MOST:
        raise SampleError(f"{os.fspath(path)}: {MOST} bytes of samples are the most")
    try:
        return read_samples(raw.decode("utf-8", "replace").splitlines())
    except SampleError as error:
        raise SampleError(f"{os.fspath(path)}: {error}") from error


def _add(samples: list[Sample], number: int, read: Callable[[Any, list[Sample]], list[Sample]], item: Any) -> None:
    """Append what an item says, if it goes on where the samples ended."""
    try:
        more = read(item, samples)
    except SampleError:
        raise
    except (TypeError, ValueError) as error:
        raise SampleError(f"line {number}: {error}") from error
    for sample in more:
        if sample.total and sample.remaining > sample.total * _ROUNDED:
            raise SampleError(
                f"line {number}: {sample.remaining:.0f} bytes are said to remain of {sample.total:.0f} bytes of memory"
            )
        if samples:
            _check_order(samples[-1], sample, number)
        samples.append(sample)


def _check_order(before: Sample, sample: Sample, number: int) -> None:
    if sample.time < before.time:
        raise SampleError(f"line {number}: time goes backwards, from {before.time * 1e3:g} to {sample.time * 1e3:g} ms")
    if sample.iteration < before.iteration:
        raise SampleError(f"line {number}: the iteration goes backwards, from {before.iteration} to {sample.iteration}")
    if before.total and sample.total and sample.total != before.total:
        raise SampleError(f"line {number}: the memory changes, from {before.total:.0f} to {sample.total:.0f} bytes")


# --- what the lines hold ----------------------------------------------------------------------------------------


def _items(lines: Iterable[str]) -> Iterator[tuple[int, Any]]:
    """Yield JSON values, blocks of ``virsh domjobinfo`` as dictionaries, and lines of a log; with their line."""
    parts: list[str] = []  # of a JSON object that goes over several lines
    block: dict[str, str] = {}
    begin = 0
    for number, raw in enumerate(lines, 1):
        line = _text(raw, number).rstrip()
        if parts and not line.startswith("{"):
            parts.append(line)
            if line.startswith(("}", "]")):
                yield begin, _json("\n".join(parts), begin)
                parts = []
        elif parts:
            raise SampleError(f"line {begin}: the JSON object is cut short at line {number}")
        elif line.startswith(("{", "[")):
            begin = number
            if line.endswith(("{", "[", ",")):
                parts = [line]
            else:
                yield begin, _json(line, begin)
        elif "iter=" in line and "curr=" in line:
            yield number, line
        elif not line or line.startswith("Job type:"):
            if block:
                yield begin, block
            block, begin = ({"Job type": line.partition(":")[2].strip()}, number) if line else ({}, number)
        elif ":" in line and block:
            name, _, value = line.partition(":")
            block[name.strip()] = value.strip()
        else:
            raise SampleError(f"line {number}: {shown(line)} is no JSON object, and nothing else known")
    if parts:
        raise SampleError(f"line {begin}: the JSON object is cut short at line {number}")
    if block:
        yield begin, block


def _text(raw: object, number: int) -> str:
    if not isinstance(raw, str):
        raise TypeError(f"lines are of type str, not {shown(raw)}")
    if len(raw) > _LONGEST:
        raise SampleError(f"line {number}: it has {len(raw)} characters, and {_LONGEST} is the most")
    return raw


def _json(text: str, begin: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        said = "the JSON object is cut short" if error.pos >= len(text) else f"no JSON object: {error.msg}"
        if error.msg.startswith("Unterminated string"):
            said = "the JSON object is cut short"
        raise SampleError(f"line {begin + error.lineno - 1}: {said}") from error
    except (RecursionError, ValueError) as error:
        raise SampleError(f"line {begin}: the JSON can't be read: {error}") from error


def _kind(item: Any, number: int) -> str:
    """Return the key that says what an item is; an empty one if it says that no migration goes on."""
    if isinstance(item, str):
        return "text"
    if not isinstance(item, dict):
        raise SampleError(f"line {number}: a sample is a JSON object, not {brief(json.dumps(item))}")
    if isinstance(item.get("return"), dict):
        item = item["return"]
    for key in _KEYS:
        if key in item and not (key == "Job type" and item[key] == "None"):
            return key
    if item.get("Job type") == "None" or not item or str(item.get("status")) in _NOTHING_YET:
        return ""
    if "QMP" in item or "event" in item:  # what else a QMP monitor says
        return ""
    keys = some(list(item))
    raise SampleError(f"line {number}: an object with the keys {keys} is no sample of a migration that is known here")


@dataclass(frozen=True, slots=True)
class _Numbers:
    """The numbers of an object, by their keys."""

    values: dict[str, Any]
    line: int

    def get(self, key: str, scale: float = 1.0) -> float | None:
        """Return a number of 0 or more, times `scale`; None if it isn't there."""
        value = self.values.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise SampleError(f"line {self.line}: {key} is a number, not {brief(json.dumps(value))}")
        if not 0 <= value < _END:  # NaN isn't either
            raise SampleError(f"line {self.line}: {key} is a number of 0 or more, not {_shown(value)}")
        return value * scale

    def need(self, key: str, scale: float = 1.0) -> float:
        value = self.get(key, scale)
        if value is None:
            raise SampleError(f"line {self.line}: there is no {key}")
        return value

    def whole(self, key: str) -> int | None:
        value = self.get(key)
        if value is not None and value != int(value):
            raise SampleError(f"line {self.line}: {key} is a whole number, not {value}")
        return None if value is None else int(value)

    def inner(self, key: str) -> "_Numbers":
        value = self.values.get(key)
        if not isinstance(value, dict):
            raise SampleError(f"line {self.line}: {key} is an object, not {brief(json.dumps(value))}")
        return _Numbers(value, self.line)


def _shown(value: float) -> str:
    return f"a number of {len(str(value))} digits" if isinstance(value, int) and abs(value) >= _END else str(value)


def _measured(rate: float | None) -> float | None:
    """Return a bandwidth, or None: where nothing was measured yet, the tools say 0, or next to it."""
    return rate if rate is not None and rate >= 1 else None


def _of_qemu(item: _Numbers, before: list[Sample]) -> list[Sample]:
    """Read ``query-migrate``, or a whole report of ours: its passes say more."""
    ram = item.inner("ram")
    page = ram.whole("page-size") or 4096
    limit = item.get("downtime-limit", 1e-3)
    passes = item.values.get("passes")
    if passes is not None:
        if not isinstance(passes, list) or not all(isinstance(each, dict) for each in passes):
            raise SampleError(f"line {item.line}: passes is a list of objects")
        ours = [_Numbers(each, item.line) for each in passes]
        return _of_passes(ours, before, item.get("setup-time", 1e-3) or 0.0, ram.get("total"), limit, page)
    return [
        Sample(
            item.need("total-time", 1e-3),
            ram.whole("dirty-sync-count") or (before[-1].iteration if before else 1),
            ram.need("remaining"),
            ram.get("total"),
            ram.get("transferred"),
            _measured(ram.get("mbps", 1e6 / 8)),
            ram.get("dirty-pages-rate", page),
            ram.whole("duplicate"),
            page,
            limit,
            item.whole("cpu-throttle-percentage") or 0,
            str(item.values.get("status", "active")),
            "qemu",
        )
    ]


def _of_passes(
    passes: list[_Numbers],
    before: list[Sample],
    now: float = 0.0,
    total: float | None = None,
    limit: float | None = None,
    page: int = 4096,
) -> list[Sample]:
    """Return a sample at the beginning of each pass of ours, with what was known then."""
    del before
    samples: list[Sample] = []
    sent, bandwidth, zero = 0.0, None, 0
    for each in passes:
        number, remaining = each.whole("pass"), each.need("remaining")
        if number is None:
            raise SampleError(f"line {each.line}: pass is a number, not null")
        if samples and number <= samples[-1].iteration:
            raise SampleError(f"line {each.line}: pass {number} comes after pass {samples[-1].iteration}")
        total = remaining if total is None and number == 1 else total
        rate = each.get("dirty-rate") if number > 1 else None
        throttle = each.whole("cpu-throttle-percentage") or 0
        now += each.get("collect-time", 1e-3) or 0.0
        samples.append(
            Sample(now, number, remaining, total, sent, bandwidth, rate, zero, page, limit, throttle, source="hwdbm")
        )
        now += each.get("time", 1e-3) or 0.0
        sent, zero = sent + (each.get("transferred") or 0.0), zero + (each.whole("duplicate") or 0)
        bandwidth = _measured(each.get("bandwidth")) or bandwidth
    return samples


def _of_libvirt(item: _Numbers, before: list[Sample]) -> list[Sample]:
    page = item.whole("memory_page_size") or 4096
    return [
        Sample(
            item.need("time_elapsed", 1e-3),
            item.whole("memory_iteration") or (before[-1].iteration if before else 1),
            item.need("memory_remaining"),
            item.get("memory_total"),
            item.get("memory_processed"),
            _measured(item.get("memory_bps")),
            item.get("memory_dirty_rate", page),
            item.whole("memory_constant"),
            page,
            throttle=item.whole("auto_converge_throttle") or 0,
            source="libvirt",
        )
    ]


_UNITS = {"B": 1, "bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40, "ms": 1e-3, "pages": 1}


def _of_virsh(item: _Numbers, before: list[Sample]) -> list[Sample]:
    def amount(name: str) -> float | None:
        text = item.values.get(name)
        if text is None:
            return None
        match = re.match(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)", text)
        if match is None:
            raise SampleError(f"line {item.line}: {name} is a number with a unit, not {shown(text)}")
        return float(match[1]) * _UNITS.get(match[2], 1)

    remaining, elapsed = amount("Memory remaining"), amount("Time elapsed")
    if remaining is None or elapsed is None:
        missing = "Memory remaining" if remaining is None else "Time elapsed"
        raise SampleError(f"line {item.line}: there is no {missing} in the job's text, or it is cut short")
    rate, zero, page = amount("Dirty rate"), amount("Constant pages"), int(amount("Page size") or 4096)
    return [
        Sample(
            elapsed,
            int(amount("Iteration") or (before[-1].iteration if before else 1)),
            remaining,
            amount("Memory total"),
            amount("Memory processed"),
            _measured(amount("Memory bandwidth")),
            None if rate is None else rate * page,
            None if zero is None else int(zero),
            page,
            throttle=int(amount("Auto converge throttle") or 0),
            source="libvirt",
        )
    ]


def _of_cloud_hypervisor(item: _Numbers, before: list[Sample]) -> list[Sample]:
    """Read the snapshot of its migration progress; its iterations count from 0."""
    del before
    ongoing = item.values.get("memory_transmission_info")
    if ongoing is None:
        return []
    info = item.inner("memory_transmission_info")
    begin, now = item.need("timestamp_begin_ms", 1e-3), _cloud_time(item)
    if now < begin:
        raise SampleError(
            f"line {item.line}: the snapshot's time {now * 1e3:.0f} ms is before the begin, {begin * 1e3:.0f}"
        )
    return [
        Sample(
            now - begin,
            int(info.need("memory_iteration")) + 1,
            info.need("memory_bytes_remaining_iteration"),
            info.get("memory_bytes_total"),
            info.get("memory_bytes_transmitted"),
            _measured(info.get("memory_transmission_bps")),
            info.get("memory_dirty_rate_pps", 4096),
            info.whole("memory_pages_constant_count"),
            downtime_limit=item.get("downtime_configured_ms", 1e-3),
            throttle=item.whole("vcpu_throttle_percent") or 0,
            source="cloud-hypervisor",
        )
    ]


def _cloud_time(item: _Numbers) -> float:
    for key in ("timestamp_snapshot_ms", "timestamp_current_ms"):
        if (value := item.get(key, 1e-3)) is not None:
            return value
    raise SampleError(f"line {item.line}: there is no timestamp_snapshot_ms")


def _of_cloud_log(item: _Numbers, before: list[Sample]) -> list[Sample]:
    """Read a line that Cloud Hypervisor logs after an iteration: what it sent, in all, and how long it took."""
    found, last = (dict(re.findall(r"(\w+)=([0-9.]+)", item.values[key])) for key in ("text", "before"))
    try:
        number, size, sent = int(found["iter"]) + 1, float(found["curr"]), float(found["total"])
        elapsed, bandwidth = float(found["elapsed"]), float(found["bw"])
        # The time is that after the sending; what was to be sent was known before it.
        began = elapsed - float(found["transfer"])
    except (KeyError, ValueError) as error:
        raise SampleError(f"line {item.line}: the line of a log is cut short: there is no {error}") from error
    total = size * _MIB if number == 1 else before[-1].total if before else None
    # What was known then is what the last iteration with any bytes had.
    known = float(last.get("bw", 0)) * _MIB or (before[-1].bandwidth if before else None) or bandwidth * _MIB
    before_it = (sent - size) * _MIB
    return [Sample(max(began, 0.0), number, size * _MIB, total, before_it, known, source="cloud-hypervisor")]


_NOTHING_YET = {"none", "setup", "wait-unplug", "cancelled", "cancelling", "failed", "completed"}
_READERS: dict[str, Callable[[_Numbers, list[Sample]], list[Sample]]] = {
    "ram": _of_qemu,
    "memory_remaining": _of_libvirt,
    "memory_total": _of_libvirt,
    "Job type": _of_virsh,
    "timestamp_begin_ms": _of_cloud_hypervisor,
    "text": _of_cloud_log,
}
"""Who reads an object, by a key that it has."""
_KEYS = ("pass", *_READERS)
