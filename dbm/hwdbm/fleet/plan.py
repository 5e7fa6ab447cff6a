"""A plan of a fleet: its hosts, links and VMs, read from JSON that anybody may have written."""

import os
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Never, TypeVar, get_args

from hwdbm import check, files
from hwdbm.errors import PlanError, shown

FORMAT, VERSION = "hwdbm-fleet", 1

Engine = Literal["hwdbm", "qemu"]

_MOST = 64 << 20  # bytes of a plan: that of 100,000 VMs has some 20 MiB
_END = 1 << 53  # no size, bandwidth or time reaches it
_SLOWEST = 1e-6  # of a trace's writes

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Link:
    """A link of the network, or what else several migrations share: a switch, an encryptor.

    Parameters
    ----------
    name : str
        Its name, of no other link.
    bandwidth : float
        Bytes a second that it carries each way.
    """

    name: str
    bandwidth: float

    def __post_init__(self) -> None:
        check.instance(self.name, str, "name")
        object.__setattr__(self, "bandwidth", check.real(self.bandwidth, "bandwidth", 1, _END))


@dataclass(frozen=True, slots=True)
class Host:
    """A host of VMs.

    Parameters
    ----------
    name : str
        Its name, of no other host.
    memory : int
        Bytes that its VMs may have together.
    link : str
        The name of the link by which it is reached.
    rack : str
        The rack that it stands in; empty for none.
    """

    name: str
    memory: int
    link: str
    rack: str = ""

    def __post_init__(self) -> None:
        for name in ("name", "link", "rack"):
            check.instance(getattr(self, name), str, name)
        object.__setattr__(self, "memory", check.integer(self.memory, "memory", 0, _END))


@dataclass(frozen=True, slots=True)
class FleetVm:
    """A VM of a fleet.

    Parameters
    ----------
    name : str
        Its name, of no other VM.
    host : str
        The name of the host that it runs on.
    memory : int
        Bytes.
    max_downtime : float
        Seconds that it may stand still.
    trace : Path, optional
        The trace of its writes. A VM has a trace or samples.
    samples : Path, optional
        The samples of it, as JSON lines.
    start : float, optional
        Seconds of the trace, whatever the rate, after which its migration begins: less than the trace has. By default
        it is forecast from three moments, and the worst of them counts.
    rate : float
        How fast it writes, the trace being 1: the trace's times are divided by it.
    pinned : str
        Why it must stay where it is; empty if it may be moved.
    """

    name: str
    host: str
    memory: int
    max_downtime: float
    trace: Path | None = None
    samples: Path | None = None
    start: float | None = None
    rate: float = 1.0
    pinned: str = ""

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        for name in ("name", "host", "pinned"):
            check.instance(getattr(self, name), str, name)
        put("memory", check.integer(self.memory, "memory", 1, _END))
        put("max_downtime", check.real(self.max_downtime, "max_downtime", 0))
        for name in ("trace", "samples"):
            if getattr(self, name) is not None:
                put(name, check.path(getattr(self, name), name))
        if self.start is not None:
            put("start", check.real(self.start, "start", 0, _END))
        put("rate", check.real(self.rate, "rate", _SLOWEST))


@dataclass(frozen=True, slots=True)
class Fleet:
    """Hosts, the links between them, and the VMs that run on them.

    Parameters
    ----------
    links : tuple of Link
        All of them.
    hosts : tuple of Host
        In the order in which a naive plan fills them.
    guests : tuple of FleetVm
        In the order in which a naive plan moves them.
    uplinks : tuple of (str, str)
        A rack and the link by which it is reached from other racks. A rack that isn't named has one that is never full.
    engine : {"qemu", "hwdbm"}
        Whose migration it is, for its costs.
    """

    links: tuple[Link, ...]
    hosts: tuple[Host, ...]
    guests: tuple[FleetVm, ...]
    uplinks: tuple[tuple[str, str], ...] = ()
    engine: Engine = "qemu"

    def __post_init__(self) -> None:
        def put(name: str, kind: type) -> set[str]:
            several: tuple[Any, ...] = check.instances(getattr(self, name), kind, name)
            object.__setattr__(self, name, several)
            names = [each[0] if isinstance(each, tuple) else each.name for each in several]
            twice = [name for name, count in Counter(names).items() if count > 1]
            if twice:
                raise PlanError(f"{name} has {twice[0]!r} twice")
            return set(names)

        links, hosts = put("links", Link), put("hosts", Host)
        put("guests", FleetVm)
        put("uplinks", tuple)
        check.one_of(self.engine, get_args(Engine), "engine")
        asked = [(host.link, links, "link") for host in self.hosts] + [
            (link, links, "link") for _, link in self.uplinks
        ]
        for name, known, what in [*asked, *((guest.host, hosts, "host") for guest in self.guests)]:
            if name not in known:
                raise PlanError(f"there is no {what} {name!r}")

    @property
    def racks(self) -> tuple[str, ...]:
        """The names of the racks, in order of their first host."""
        return tuple(dict.fromkeys(host.rack for host in self.hosts if host.rack))


def read_plan(path: str | os.PathLike[str]) -> Fleet:
    """Read a plan.

    Parameters
    ----------
    path : path
        A JSON file; the paths in it are relative to its folder.

    Returns
    -------
    Fleet
        What it says.

    Raises
    ------
    PlanError
        If it is no plan. The text has the place in the file, as ``vms[3].memory``, and the value.
    OSError
        If it can't be read.

    Examples
    --------
    >>> import json, tempfile
    >>> plan = {
    ...     "format": "hwdbm-fleet", "version": 1,
    ...     "links": [{"name": "lan", "bandwidth": "1G"}],
    ...     "hosts": [{"name": "a", "memory": "64G", "link": "lan"}, {"name": "b", "memory": "64G", "link": "lan"}],
    ...     "vms": [{"name": "db", "host": "a", "memory": "8G", "max-downtime": 300, "trace": "db.zarr"}],
    ... }
    >>> with tempfile.NamedTemporaryFile("w+") as file:
    ...     json.dump(plan, file)
    ...     file.flush()
    ...     fleet = read_plan(file.name)
    >>> fleet.guests[0].max_downtime, fleet.links[0].bandwidth == 1 << 30
    (0.3, True)
    """
    where = Path(path)
    with files.open_regular(where) as file:
        raw = file.read(_MOST + 1)
    read = _Reader(where)
    if len(raw) > _MOST:
        read.refuse("", f"the file has more than {_MOST} bytes")
    try:
        found = check.strict_json(raw)
    except ValueError as error:
        read.refuse("", f"it is no JSON: {error}")
    return read.fleet(found)


class _Reader:
    """Checks of a plan's values. Each error names the file, the place in it, and the value."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def refuse(self, place: str, why: str) -> Never:
        raise PlanError(f"{self._path}: {place}: {why}" if place else f"{self._path}: {why}") from None

    def fleet(self, found: Any) -> Fleet:
        top = self.mapping(found, "", {"format", "version", "links", "hosts", "vms"}, {"racks", "engine"})
        if top["format"] != FORMAT:
            self.refuse("format", f"a plan's is {FORMAT!r}, not {shown(top['format'])}")
        if type(top["version"]) is not int or top["version"] != VERSION:
            self.refuse("version", f"this reads version {VERSION}, not {shown(top['version'])}")
        engine = top.get("engine", "qemu")
        if engine not in get_args(Engine):
            self.refuse("engine", f"is one of {', '.join(get_args(Engine))}, not {shown(engine)}")
        links = self.named(top["links"], "links", self.link)
        known = {link.name for link in links}
        uplinks = self.named(top.get("racks", []), "racks", lambda each, place: self.rack(each, place, known))
        hosts = self.named(top["hosts"], "hosts", lambda each, place: self.host(each, place, known))
        names = {host.name for host in hosts}
        guests = self.named(top["vms"], "vms", lambda each, place: self.guest(each, place, names))
        racks = {host.rack for host in hosts}
        for at, (rack, _) in enumerate(uplinks):
            if rack not in racks:
                self.refuse(f"racks[{at}].name", f"no host stands in rack {shown(rack)}")
        return Fleet(links, hosts, guests, tuple(each for each in uplinks if each[1]), engine)

    def link(self, found: Any, place: str) -> Link:
        link = self.mapping(found, place, {"name", "bandwidth"})
        return Link(self.name(link["name"], f"{place}.name"), self.size(link["bandwidth"], f"{place}.bandwidth"))

    def rack(self, found: Any, place: str, links: set[str]) -> tuple[str, str]:
        rack = self.mapping(found, place, {"name"}, {"uplink"})
        uplink = self.known(rack["uplink"], f"{place}.uplink", links, "link") if "uplink" in rack else ""
        return self.name(rack["name"], f"{place}.name"), uplink

    def host(self, found: Any, place: str, links: set[str]) -> Host:
        host = self.mapping(found, place, {"name", "memory", "link"}, {"rack"})
        return Host(
            self.name(host["name"], f"{place}.name"),
            self.size(host["memory"], f"{place}.memory"),
            self.known(host["link"], f"{place}.link", links, "link"),
            self.name(host["rack"], f"{place}.rack") if "rack" in host else "",
        )

    def guest(self, found: Any, place: str, hosts: set[str]) -> FleetVm:
        optional = {"trace", "samples", "start", "rate", "pinned"}
        guest = self.mapping(found, place, {"name", "host", "memory", "max-downtime"}, optional)
        given = {"trace", "samples"} & guest.keys()
        if len(given) != 1:
            has = "both" if given else "neither"
            self.refuse(place, f"a VM has a trace or samples, and {shown(guest['name'])} has {has}")
        for key in ("start", "rate"):
            if key in guest and "samples" in guest:
                self.refuse(f"{place}.{key}", "is for a VM with a trace")
        return FleetVm(
            name=self.name(guest["name"], f"{place}.name"),
            host=self.known(guest["host"], f"{place}.host", hosts, "host"),
            memory=self.size(guest["memory"], f"{place}.memory"),
            max_downtime=self.number(guest["max-downtime"], f"{place}.max-downtime", "ms") / 1e3,
            trace=self.path(guest["trace"], f"{place}.trace") if "trace" in guest else None,
            samples=self.path(guest["samples"], f"{place}.samples") if "samples" in guest else None,
            start=self.number(guest["start"], f"{place}.start", "ms") / 1e3 if "start" in guest else None,
            rate=self.number(guest.get("rate", 1), f"{place}.rate", least=_SLOWEST),
            pinned=self.text(guest["pinned"], f"{place}.pinned") if "pinned" in guest else "",
        )

    def named(self, found: Any, place: str, read: Callable[[Any, str], T]) -> tuple[T, ...]:
        """Return the elements of a list, whose names differ."""
        if not isinstance(found, list):
            self.refuse(place, f"is a list, not {shown(found)}")
        read_ones, first = [], dict[str, int]()
        for at, each in enumerate(found):
            read_ones.append(read(each, f"{place}[{at}]"))
            if (before := first.setdefault(each["name"], at)) != at:
                self.refuse(f"{place}[{at}].name", f"{place}[{before}] is {shown(each['name'])} already")
        return tuple(read_ones)

    def mapping(self, found: Any, place: str, keys: set[str], optional: set[str] | None = None) -> dict[str, Any]:
        if not isinstance(found, dict):
            self.refuse(place, f"is an object, not {shown(found)}")
        for missing in sorted(keys - found.keys()):
            self.refuse(place, f"there is no {missing!r}")
        for more in sorted(found.keys() - keys - (optional or set())):
            self.refuse(f"{place}.{more}".lstrip("."), f"version {VERSION} doesn't know it")
        return found

    def name(self, found: Any, place: str) -> str:
        if not isinstance(found, str) or not found or not found.isprintable() or len(found) > 200:
            self.refuse(place, f"is a printable name of 1 to 200 letters, not {shown(found)}")
        return found

    def text(self, found: Any, place: str) -> str:
        return self.name(found, place)

    def known(self, found: Any, place: str, names: set[str], what: str) -> str:
        if not isinstance(found, str) or found not in names:
            self.refuse(place, f"there is no {what} {shown(found)}")
        return found

    def path(self, found: Any, place: str) -> Path:
        if not isinstance(found, str) or not found:
            self.refuse(place, f"is a path, not {shown(found)}")
        try:
            return check.path(self._path.parent / found, place)
        except ValueError:  # it has a null, or half of a surrogate pair
            self.refuse(place, f"is a path, and {shown(found)} can't be one")

    def size(self, found: Any, place: str) -> int:
        """Return a number of bytes, of 1 or more."""
        value = found
        if isinstance(found, str):
            with suppress(ValueError):
                value = check.size(found)
        if type(value) is not int or not 1 <= value < _END:
            self.refuse(place, f"is bytes, as 4096 or '1.5G', of 1 to 2^53 - 1, not {shown(found)}")
        return value

    def number(self, found: Any, place: str, unit: str = "", least: float = 0) -> float:
        """Return a number of `least` or more."""
        if type(found) not in (int, float) or not least <= found < _END:  # NaN isn't either
            self.refuse(place, f"is a number {f'of {unit} ' if unit else ''}of {least:g} or more, not {shown(found)}")
        return float(found)
