"""The protocols that are proved: production's own generators, and rules of the hardware and of other software."""

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, Final

from hwdbm import pte
from hwdbm.races.production import VERBS, Outer, RealSlot
from hwdbm.races.program import End, Scene
from hwdbm.races.protocol import Act, Actor, Protocol, Run, View, store

_NPAGES: Final = 128
_PAGES: Final = {"x": 0, "y": 64}  # in two words of the bitmap, so that two steps may go on at once
Steps = Generator[Act | Run, Any, None]


def _scene(
    programs: Sequence[str],
    pages: Mapping[str, int],
    *,
    block: bool = False,
    disk: bool = False,
    clients: str = "",
    **options: Any,
) -> Scene:
    """Return a machine whose pages are those of a real slot: frames at 512, those for copy-on-write at 1024."""
    others = [f"new:{name}" for name in pages]
    numbers = {name: 512 + number for name, number in pages.items()}
    numbers |= {f"new:{name}": 1024 + number for name, number in pages.items()}
    cells = {f"{what}:{name}": 0 for name in pages for what in (("copy", "disk") if disk else ("copy",))}
    cells |= {f"{client}:{name}": 0 for client in clients for name in pages}
    cells |= {"given": 0, "content": 0}
    return Scene(
        dict.fromkeys(pages, "clean"), programs, cells, others,
        {"numbers": numbers, **({"block": dict(pages)} if block else {}), **options},
    )  # fmt: skip


def _frame(view: View, name: str) -> str:
    """Return the cell of the frame that a page has, by its descriptor; the host has it mapped there too."""
    desc = view[f"pte:{name}"]
    if "pte:block" in view.protocol.scene.cells and view["pte:block"] & pte.TABLE != pte.TABLE:
        return f"frame:{name}"
    frame = (desc & pte.ADDRESS) >> 12
    named = next((each for each, number in view.protocol.scene.frame.items() if number == frame), name)
    return f"frame:{named}"


def _copy(name: str, to: str = "copy") -> Act:
    return Act(f"copies {name}", lambda view: view.__setitem__(f"{to}:{name}", view[_frame(view, name)]))


def _commit() -> Act:
    def do(view: View) -> None:
        assert isinstance(view.world, Outer)  # noqa: S101 - the protocol has a slot
        view.world = view.world.having(view.number, view.world.of(view.number)._replace(lease=0))

    return Act("commits the lease", do, quiet=True)


def _consume(bits: int, pages: Mapping[str, int], to: str = "copy") -> Steps:
    for name, number in pages.items():
        if bits >> number & 1:
            yield _copy(name, to)
    yield _commit()


def _same(view: View) -> str | None:
    """Say what is wrong at an end: the last pass is over, and nobody will look again."""
    slot, world = view.protocol.slot, view.world
    assert isinstance(world, Outer)  # noqa: S101 - as above
    cells = view.protocol.scene.cells
    for name in slot.pages:
        frame = view[_frame(view, name)]
        if view[f"copy:{name}"] != frame:
            return f"a write to page {name} is lost: the last copy is old"
        for client in "AB":
            if f"{client}:{name}" in cells and view[f"{client}:{name}"] != frame:
                return f"a write to page {name} is lost for client {client}: its last copy is old"
        if f"disk:{name}" in cells and view[f"disk:{name}"] != frame:
            return f"the host drops page {name}, which the guest has written: the disk is old, and its flag clear"
    if view["given"] and view["frame:x"] != view["content"]:
        return "the guest wrote a frame that isn't its own any more"
    if (
        world.inner.live
        or world.inner.fresh
        or any(bits for bits, _ in world.inner.feeds)
        or any(lease for lease, _ in world.leases)
    ):
        return "a page is still dirty, after a pass with nobody left who writes"
    return None


def production(
    name: str,
    summary: str,
    programs: Sequence[str],
    actors: Sequence[Actor],
    *,
    pages: Mapping[str, int] = _PAGES,
    npages: int = _NPAGES,
    mechanism: str = "hardware DBM",
    block: bool = False,
    logs: bool = True,
    host: bool = False,
    hd: bool = True,
    symmetric: tuple[int, ...] = (),
    readonly: Sequence[str] = (),
    shared: bool = False,
    clients: str = "",
    joined: int | None = None,
    end: Callable[[View], str | None] = lambda _: None,
    verbs: Mapping[str, Any] = VERBS,
    options: Mapping[str, Any] = {},
) -> Protocol:
    """Return a protocol of a real slot, with a last pass when all is over: of each client, and of the host's flags.

    Of the `clients`, by name, the first `joined` are there from the start: all of them by default.
    """
    scene = _scene(programs, pages, block=block, disk=host, clients=clients, hd=hd, **options)
    slot = RealSlot(
        scene, pages, npages, mechanism, block=block, logs=logs, readonly=readonly, shared=shared,
        clients=len(clients) if joined is None else joined, verbs=verbs,
    )  # fmt: skip

    def last() -> Steps:
        for client in clients:
            yield from _consume((yield Run(f"take {client}", (0, npages))), pages, client)
        yield from _consume((yield Run("get", (0, npages))), pages)
        if host:
            yield from _write_back()

    actors = [*actors, Actor("last pass", last, last=True)]
    return Protocol(
        name, scene, actors, lambda view: _same(view) or end(view), summary=summary, slot=slot, symmetric=symmetric
    )


# --- what the actors do -----------------------------------------------------------------------------------------


def _get(lo: int = 0, hi: int = _NPAGES, pages: Mapping[str, int] = _PAGES) -> Callable[[], Steps]:
    def consumer() -> Steps:
        yield from _consume((yield Run("get", (lo, hi))), pages)

    return consumer


def _sync_get() -> Steps:
    yield Run("sync", (0, _NPAGES))
    yield from _consume((yield Run("get", (0, _NPAGES))), _PAGES)


def _peek_clear() -> Steps:
    yield Run("peek", (0, _NPAGES))
    yield from _consume((yield Run("clear", (0, _NPAGES))), _PAGES)


def _get_failing() -> Steps:
    for fails in (1, 0):
        bits = yield Run("get", (0, _NPAGES), fails=fails)
        if bits != "failed":
            yield from _consume(bits, _PAGES)
            return
        yield Run("rollback", (0, _NPAGES))


def _get_rolled_back() -> Steps:
    bits = yield Run("get", (0, _NPAGES))
    if bits:
        yield _copy("x")  # the consumer fails when it has some of them
        yield Run("rollback", (0, _NPAGES))
    yield from _consume((yield Run("get", (0, _NPAGES))), _PAGES)


def run(verb: str, page: int, npages: int = 1) -> Callable[[], Steps]:
    """Return an actor that runs one verb."""

    def actor() -> Steps:
        yield Run(verb, (page, page + npages))

    return actor


def _handler(verb: str = "write fault") -> Callable[[str], Steps]:
    def handle(page: str) -> Steps:
        number = _PAGES[page]
        yield Run(verb, (number, number + 1))

    return handle


def _populate(page: str) -> Steps:
    number = _PAGES[page]
    yield Run("populate", (number, number + 1))


def _mapper(page: str) -> Steps:
    number = _PAGES[page]
    yield Run("map", (number, number + 1))


def _fault_or_populate(page: str) -> Steps:
    if (yield Act("looks whether it is mapped", lambda view: view[f"pte:{page}"] & pte.VALID)):
        yield from _handler()(page)
    else:
        yield from _populate(page)


def _device() -> Steps:
    yield store("frame:x", 7, "the device writes x")
    yield Run("mark", (0, 1))


def _write_back() -> Steps:
    yield Run("take host flags", (0, _NPAGES))
    bits = yield Act("has the flags", lambda view: view.world.inner.taken)  # type: ignore[attr-defined]
    for name, number in _PAGES.items():
        if bits >> number & 1:
            yield _copy(name, "disk")


def _give(verb: str) -> Callable[[], Steps]:
    """Return an actor that takes a page from the guest by a verb, and relies on its frame being still then."""

    def actor() -> Steps:
        yield Run(verb, (0, 1))
        yield _still()

    return actor


def _still() -> Act:
    def do(view: View) -> None:
        view["content"] = view["frame:x"]
        view["given"] = 1

    return Act("relies on the frame of x", do)


def _cow(page: str) -> Steps:
    number = _PAGES[page]
    yield Act(
        f"copies {page} to its new frame", lambda view: view.__setitem__(f"frame:new:{page}", view[f"frame:{page}"])
    )
    yield Run("copy-on-write", (number, number + 1))


def _twice() -> Steps:
    for _ in range(2):
        yield from _consume((yield Run("get", (0, _NPAGES))), _PAGES)


def _split_collapse() -> Steps:
    yield Run("split", (0, 512))
    yield Run("collapse", (0, 512))


def _start() -> Steps:
    yield Run("start", (0, _NPAGES))
    yield _copy("x")
    yield _copy("y")
    yield from _consume((yield Run("get", (0, _NPAGES))), _PAGES)


def _start_full() -> Steps:
    yield Run("start full", (0, _NPAGES))
    yield from _peek_clear()


def _cow_only() -> Steps:
    yield Run("write-protect", (0, 1))


def _reads_new(view: View) -> str | None:
    found = End(view.protocol.scene, view.state)
    if found["a"] == 1 and found["b"] == 0:
        return "a vCPU still reads the frame that the page had before its copy"
    return None


def _stop_start() -> Steps:
    yield Run("stop", (0, _NPAGES))
    yield from _start()


def _cow_get() -> Steps:
    yield Run("write-protect", (0, 1))
    yield _still()  # it is shared now
    yield from _consume((yield Run("get", (0, _NPAGES))), _PAGES)


def _take(client: str, *, times: int = 1) -> Callable[[], Steps]:
    def consumer() -> Steps:
        for _ in range(times):
            yield from _consume((yield Run(f"take {client}", (0, 64))), _ONE, client)

    return consumer


def _take_failing() -> Steps:
    bits = yield Run("take A", (0, 64), fails=1)
    if bits == "failed":
        yield Run("rollback A", (0, 64))
        bits = yield Run("take A", (0, 64))
    yield from _consume(bits, _ONE, "A")


def _take_rolled_back() -> Steps:
    if (yield Run("take A", (0, 64))):
        yield Run("rollback A", (0, 64))  # the consumer fails before it has copied any


def _join() -> Steps:
    yield Run("join A", (0, 64))
    yield _copy("x", "A")
    yield from _take("A")()


def _default(*verbs: str) -> Callable[[], Steps]:
    def consumer() -> Steps:
        for verb in verbs[:-1]:
            yield Run(verb, (0, 64))
        yield from _consume((yield Run(verbs[-1], (0, 64))), _ONE)

    return consumer


def _off_on() -> Steps:
    yield Run("stop", (0, 64))
    yield Run("start", (0, 64))
    yield _copy("x")


def _clients(name: str, summary: str, actors: Sequence[Actor], **options: Any) -> Callable[..., Protocol]:
    """Return a protocol of one page that a vCPU writes twice, and of clients that take it."""

    def make(**how: Any) -> Protocol:
        given: dict[str, Any] = {"clients": "AB", "pages": _ONE, "npages": 64} | options | how
        return production(name, summary, ["store x 1; store x 2"], actors, **given)

    return make


_ONE: Final = {"x": 0}
S, H = "S", "H"
_WP: Final[dict[str, Any]] = {"mechanism": "write-protection", "hd": False}

PRODUCTION: Final[dict[str, Callable[..., Protocol]]] = {
    "get": lambda **how: production(
        "get", "GET cleans, flushes and copies while two vCPUs write",
        ["store x 1; store y 1", "store x 2"], [Actor(S, _get())], **how,
    ),
    "two-vcpus": lambda **how: production(
        "two-vcpus", "GET, while two vCPUs that are the same write one page",
        ["store x 1; store x 2"] * 2, [Actor(S, _get())], symmetric=(0, 1), **how,
    ),
    "get-twice": lambda **how: production(
        "get-twice", "two GETs, one after the other", ["store x 1; store x 2"],
        [Actor(S, _twice)], **how,
    ),
    "sync-get": lambda **how: production(
        "sync-get", "a sync publishes, then GET takes", ["store x 1; store y 1"], [Actor(S, _sync_get)], **how,
    ),
    "clear": lambda **how: production(
        "clear", "GET shows and CLEAR takes, under manual protection",
        ["store x 1; store y 1", "store x 2"], [Actor(S, _peek_clear)], **how,
    ),
    "get-failing": lambda **how: production(
        "get-failing", "the flush of a GET fails, its pages go back, and it is tried again",
        ["store x 1; store y 1"], [Actor(S, _get_failing)], **how,
    ),
    "rollback": lambda **how: production(
        "rollback", "a consumer fails with a page half copied, and its lease is rolled back",
        ["store x 1; store y 1"], [Actor(S, _get_rolled_back)], **how,
    ),
    "two-parts": lambda **how: production(
        "two-parts", "two threads GET a part of the slot each",
        ["store x 1; store y 1"],
        [Actor(S, _get(0, 64, {"x": 0})), Actor("S2", _get(64, 128, {"y": 64}))], **how,
    ),
    "write-protect": lambda **how: production(
        "write-protect", "GET without hardware DBM: the fault's handler marks",
        ["store x 1; store y 1", "store x 2"],
        [Actor(S, _get()), Actor(H, _handler(), 0), Actor("H1", _handler(), 1)], **_WP, **how,
    ),
    "write-protect-clear": lambda **how: production(
        "write-protect-clear", "GET shows and CLEAR takes, without hardware DBM",
        ["store x 1; store x 2"], [Actor(S, _peek_clear), Actor(H, _handler(), 0)], **_WP, **how,
    ),
    "unmap": lambda **how: production(
        "unmap", "the host unmaps a page while it is harvested, and it is mapped again",
        ["store x 1; store x 2"], [Actor(S, _get()), Actor("host", run("unmap", 0)), Actor(H, _mapper, 0)],
        host=True, **how,
    ),
    "populate": lambda **how: production(
        "populate", "an unmapped page is written: it is populated, without hardware DBM", ["store x 1; store x 2"],
        [Actor(S, _get()), Actor("host", run("unmap", 0)), Actor(H, _fault_or_populate, 0)], host=True, **_WP, **how,
    ),
    "unmap-give": lambda **how: production(
        "unmap-give", "the host unmaps a page, and gives its frame away", ["store x 1; store x 2"],
        [Actor("host", _give("unmap"))], **how,
    ),
    "replace-give": lambda **how: production(
        "replace-give", "the host maps another frame, and gives the old one away", ["store x 1; store x 2"],
        [Actor("host", _give("replace"))], **how,
    ),
    "protect-share": lambda **how: production(
        "protect-share", "the host write-protects a page, and shares its frame", ["store x 1; store x 2"],
        [Actor("host", _give("write-protect"))], **how,
    ),
    "write-back-failing": lambda **how: production(
        "write-back-failing", "the host takes its flags when the flush of a GET has failed", ["store x 1; store x 2"],
        [Actor(S, _get_failing), Actor("host", _write_back)], host=True, **how,
    ),
    "write-back": lambda **how: production(
        "write-back", "the host takes its dirty flags, and writes pages back, beside a GET",
        ["store x 1; store x 2"], [Actor(S, _get()), Actor("host", _write_back)], host=True, **how,
    ),
    "write-back-unmap": lambda **how: production(
        "write-back-unmap", "the host takes its flags and unmaps the page",
        ["store x 1; store x 2"],
        [Actor("host", _write_back), Actor("S2", run("unmap", 0)), Actor(H, _mapper, 0)], host=True, **how,
    ),
    "split": lambda **how: production(
        "split", "a block is split while it is harvested", ["store x 1; store y 1"],
        [Actor(S, _get(0, 512)), Actor("S2", run("split", 0, 512))], npages=512, block=True, **how,
    ),
    "split-fault": lambda **how: production(
        "split-fault", "a write fault splits its block, without hardware DBM", ["store x 1; store y 1"],
        [Actor(S, _get(0, 512)), Actor(H, _handler(), 0)], npages=512, block=True, **_WP, **how,
    ),
    "collapse": lambda **how: production(
        "collapse", "a block is split, and put together again, while it is written", ["store x 1; store y 1"],
        [Actor(S, _get(0, 512)), Actor("S2", _split_collapse)], npages=512, block=True, **how,
    ),
    "switch-off": lambda **how: production(
        "switch-off", "the mechanism changes from hardware DBM to write-protection",
        ["store x 1; store x 2"], [Actor(S, _get()), Actor("S2", run("switch", 0)), Actor(H, _handler(), 0)], **how,
    ),
    "switch-on": lambda **how: production(
        "switch-on", "the mechanism changes from write-protection to hardware DBM, whose bit in VTCR is on before",
        ["store x 1; store x 2"], [Actor(S, _get()), Actor("S2", run("switch", 0)), Actor(H, _handler(), 0)],
        mechanism="write-protection", **how,
    ),
    "read-only": lambda **how: production(
        "read-only", "a page stays read-only, whatever GET and the switch of the mechanism do",
        ["store y 1", "store x 1"], [Actor(S, _get()), Actor("S2", run("switch", 0))], readonly=("y",), **how,
    ),
    "age": lambda **how: production(
        "age", "pages are made old beside a GET", ["store x 1; store x 2"],
        [Actor(S, _get()), Actor("S2", run("age", 0))], **how,
    ),
    "start": lambda **how: production(
        "start", "the log begins, and the first pass copies all, while the guest writes",
        ["store x 1; store x 2"], [Actor(S, _start)], logs=False, **how,
    ),
    "stop-start": lambda **how: production(
        "stop-start", "the log ends and begins anew, and all is copied again, while the guest writes",
        ["store x 1; store x 2"], [Actor(S, _stop_start)], **how,
    ),
    "start-full": lambda **how: production(
        "start-full", "the log begins with all bits set, and CLEARs protect what they take",
        ["store x 1; store x 2"], [Actor(S, _start_full)], logs=False, **how,
    ),
    "copy-on-write-read": lambda **how: production(
        "copy-on-write-read", "a shared page is written, and another vCPU that knows of it reads the page",
        ["store x 1; dsb; store y 1", "load y -> a; dsb; isb; load x -> b"],
        [Actor(S, _cow_only), Actor(H, _cow, 0)], end=_reads_new, **how,
    ),
    "device-host": lambda **how: production(
        "device-host", "a device writes and marks, and the host writes the page back", [],
        [Actor("device", _device), Actor("host", _write_back)], host=True, **how,
    ),
    "device": lambda **how: production(
        "device", "a device writes and marks, beside a GET", ["store y 1"],
        [Actor(S, _sync_get), Actor("device", _device)], **how,
    ),
    "copy-on-write": lambda **how: production(
        "copy-on-write", "a shared page is written: its copy takes its place, and a GET follows",
        ["store x 1"], [Actor(S, _cow_get), Actor(H, _cow, 0)], **how,
    ),
    "clients": _clients(
        "clients", "two clients take, each for itself", [Actor("A", _take("A", times=2)), Actor("B", _take("B"))],
    ),
    "clients-failing": _clients(
        "clients-failing", "two clients take, and the flush of one fails",
        [Actor("A", _take_failing), Actor("B", _take("B"))],
    ),
    "clients-rollback": _clients(
        "clients-rollback", "two clients take, and one gives its pages back",
        [Actor("A", _take_rolled_back), Actor("B", _take("B"))],
    ),
    "clients-get": _clients(
        "clients-get", "a client takes beside KVM's GET", [Actor("A", _take("A")), Actor(S, _default("get"))],
        clients="A",
    ),
    "clients-clear": _clients(
        "clients-clear", "a client takes beside KVM's GET and CLEAR, under manual protection",
        [Actor("A", _take("A")), Actor(S, _default("peek", "clear"))], clients="A",
    ),
    "clients-write-protect": _clients(
        "clients-write-protect", "two clients take, one of which fails, without hardware DBM",
        [Actor("A", _take_rolled_back), Actor("B", _take("B")), Actor(H, _handler(), 0)], **_WP,
    ),
    "clients-write-protect-clear": _clients(
        "clients-write-protect-clear", "a client takes beside KVM's GET and CLEAR, without hardware DBM",
        [Actor("A", _take("A")), Actor(S, _default("peek", "clear")), Actor(H, _handler(), 0)], clients="A", **_WP,
    ),
    "clients-unmap": _clients(
        "clients-unmap", "two clients take while the host unmaps the page, and it is mapped again",
        [Actor("A", _take("A")), Actor("B", _take("B")), Actor("host", run("unmap", 0)), Actor(H, _mapper, 0)],
    ),
    "clients-switch": _clients(
        "clients-switch", "a client takes while the mechanism changes",
        [Actor("A", _take("A")), Actor("S2", run("switch", 0)), Actor(H, _handler(), 0)], clients="A",
    ),
    "clients-join": _clients(
        "clients-join", "a client joins, copies all and takes, beside another's take",
        [Actor("B", _join), Actor("S", _default("get"))], clients="A", joined=0,
    ),
    "clients-off-on": _clients(
        "clients-off-on", "the log ends and begins anew: the client's next take has all", [Actor(S, _off_on)],
        clients="A",
    ),
    "clients-device": _clients(
        "clients-device", "a device writes and marks, beside two clients' takes",
        [Actor("A", _take("A")), Actor("B", _take("B")), Actor("device", _device)],
    ),
}  # fmt: skip
"""Production's protocols, by name: each a function of what is to be another way."""
