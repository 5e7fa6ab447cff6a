"""The protocol that production runs, as actors of a `Protocol`: its own generators, on a real slot.

`RealSlot` has a real `SlotLog` with its real `Stage2`. To take a step it puts the slot into the state in question,
starts the generator anew, brings it to where it was by the states that it saw then, and lets it run to its next point.
Nothing of the protocol is written a second time. Two things are the explorer's own: pages that a run holds are a note
here, as there are no threads; and a flush takes its time, TLBI and DSB by themselves, before the code after it goes on.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hwdbm.bitmap import DirtyBitmap
from hwdbm.dirtylog import faults
from hwdbm.dirtylog.client import Epoch, Feed
from hwdbm.dirtylog.lease import Lease
from hwdbm.dirtylog.mechanism import MECHANISMS
from hwdbm.dirtylog.slot import LogParts, Point, SlotLog, Steps
from hwdbm.errors import HwdbmError, InvariantError
from hwdbm.granule import Granule
from hwdbm.memslot import Memslot
from hwdbm.races.program import Scene
from hwdbm.stage2 import Stage2

if TYPE_CHECKING:
    from hwdbm.races.protocol import Actor, Label, Local, Protocol, Run, Situation

_FRAMES: Final = 512  # where the slot's frames begin
_LOGS: Final = 1  # KVM_MEM_LOG_DIRTY_PAGES

Due = tuple[int, int, bool, tuple[Any, ...]]


class World(NamedTuple):
    """What a real slot has beside the descriptors that the machine has as cells.

    Parameters
    ----------
    live : int or None
        The bits of the live bitmap, if the slot logs.
    lease : int
        What its consumer has taken and not settled.
    shown : int
        What its consumer was shown by a GET under manual protection.
    host, saved : int
        The host's dirty flags, and what replaced leaves had recorded.
    span : tuple of int
        Where the latter may be.
    due : tuple
        The flushes that are due.
    rest : tuple of bytes
        The other descriptors, by level.
    mechanism : str
        How writes are learnt of.
    generation : int
        Counts the bitmaps that are gone.
    taken : int
        The host's flags that write-back took last.
    fresh : int
        What was published, and isn't in the clients' bitmaps yet.
    feeds : tuple
        The bits of each client that has joined, and why its epoch is broken.
    """

    live: int | None
    lease: int
    shown: int
    host: int
    saved: int
    span: tuple[int, int]
    due: tuple[Due, ...]
    rest: tuple[bytes, ...]
    mechanism: str
    generation: int
    taken: int = 0
    fresh: int = 0
    feeds: tuple[tuple[int, str], ...] = ()


class Outer(NamedTuple):
    """The world of a `Situation`: the slot's, and what the explorer notes of the runs.

    Parameters
    ----------
    inner : World
        The slot's.
    held : tuple
        The pages that are held, as (actor, lo, hi).
    leases : tuple
        For each actor what it has taken and not settled, and what it was shown.
    error : str
        What went wrong in the production code, if anything did.
    """

    inner: World
    leases: tuple[tuple[int, int], ...]
    held: tuple[tuple[int, int, int], ...] = ()
    error: str = ""

    def of(self, number: int) -> World:
        """Return the slot's world as one of the actors has it."""
        lease, shown = self.leases[number]
        return self.inner._replace(lease=lease, shown=shown)

    def having(self, number: int, world: World) -> "Outer":
        """Return what there is after a step of one of the actors."""
        leases = (*self.leases[:number], (world.lease, world.shown), *self.leases[number + 1 :])
        return self._replace(inner=world._replace(lease=0, shown=0), leases=leases)


class Running(NamedTuple):
    """A generator in the middle.

    Parameters
    ----------
    verb : str
        Which one.
    lo, hi : int
        Its pages.
    history : int
        The states that it saw, by the number that `RealSlot` gave them.
    point : Point or None
        The point that it is at.
    todo : tuple
        What is left of its flush: ("dsb",) or ("tlbi", stage, lo, hi).
    fails : int
        How many of its flushes may still fail.
    """

    verb: str
    lo: int
    hi: int
    history: int
    point: Point | None
    todo: tuple[tuple[Any, ...], ...] = ()
    fails: int = 0


class _CaughtError(HwdbmError, RuntimeError):
    def __init__(self, steps: Steps) -> None:
        self.steps = steps


class _CaughtLog(SlotLog):
    """A slot whose verbs hand out their steps rather than run them."""

    def run(self, steps: Steps, lo: int = 0, hi: int | None = None) -> None:  # noqa: ARG002
        """Hand the steps out, by an exception: the verb goes no further."""
        raise _CaughtError(steps)


def _caught(call: Callable[[], object]) -> Steps:
    try:
        call()
    except _CaughtError as caught:
        return caught.steps
    raise AssertionError("a verb without steps")


def _pages(lo: int, hi: int) -> NDArray[np.int64]:
    return np.arange(lo, hi)


class _Backed:
    """Pages of memory that nobody else has, one frame each, of which no block is made."""

    def __init__(self, npages: int) -> None:
        self.shared = np.zeros(npages, dtype=np.bool_)

    def of(self, pages: NDArray[np.int64]) -> NDArray[np.int64]:
        return pages + _FRAMES

    def blockable(self, stripes: NDArray[np.intp]) -> NDArray[np.bool_]:
        return np.zeros(stripes.size, dtype=np.bool_)


def _change(verb: Callable[..., Any]) -> Callable[["RealSlot", int, int], Steps]:
    def steps(slot: "RealSlot", lo: int, hi: int) -> Steps:
        return faults.change_steps(slot.log, lo, hi, verb, [])

    return steps


def _of_client(
    verb: Callable[["RealSlot", Feed, int, int], Steps], number: int
) -> Callable[["RealSlot", int, int], Steps]:
    return lambda slot, lo, hi: verb(slot, slot.feeds[number], lo, hi)


VERBS: Final[Mapping[str, Callable[["RealSlot", int, int], Steps]]] = {
    "sync": lambda slot, lo, hi: slot.log.sync_steps(lo, hi),
    "get": lambda slot, lo, hi: slot.log.get_steps(slot.lease, lo, hi),
    "peek": lambda slot, lo, hi: slot.log.peek_steps(slot.lease, lo, hi),
    "clear": lambda slot, lo, hi: slot.log.clear_steps(slot.lease, lo, hi, slot.mask),
    "rollback": lambda slot, _lo, _hi: _caught(
        lambda: slot.log.put_back(slot.lease.bitmap.copy(), 0, slot.log.generation)
    ),
    **{
        f"{verb} {'AB'[number]}": _of_client(steps, number)
        for number in range(2)
        for verb, steps in {
            "join": lambda slot, feed, _lo, _hi: slot.log.join_steps(feed),
            "take": lambda slot, feed, lo, hi: slot.log.feed_steps(feed, slot.lease, lo, hi),
            "rollback": lambda slot, feed, _lo, _hi: _caught(
                lambda: slot.log.give_back(Epoch(feed), slot.lease.bitmap.copy(), 0, feed.generation)
            ),
        }.items()
    },
    "mark": lambda slot, lo, hi: slot.log.mark_steps(lo, hi),
    "take host flags": lambda slot, _lo, _hi: _caught(slot.log.take_host_dirty),
    "switch": lambda slot, _lo, _hi: slot.log.switch_steps(slot.other()),
    "start full": lambda slot, _lo, _hi: slot.log.start_steps(slot.memslot(logs=True), full=True),
    "start": lambda slot, _lo, _hi: slot.log.start_steps(slot.memslot(logs=True), full=False),
    "stop": lambda slot, _lo, _hi: slot.log.stop_steps(slot.memslot(logs=False)),
    "map": lambda slot, lo, hi: faults.map_steps(slot.log, lo, hi, _FRAMES + lo, 3, writable=True),
    "replace": lambda slot, lo, hi: faults.map_steps(slot.log, lo, hi, 2 * _FRAMES + lo, 3, writable=True),
    "populate": lambda slot, lo, hi: faults.populate_steps(
        slot.log, _pages(lo, hi), _Backed(slot.npages), write=True, blocks=False
    ),
    "unmap": lambda slot, lo, hi: faults.unmap_steps(slot.log, lo, hi),
    "write fault": lambda slot, lo, hi: faults.write_fault_steps(
        slot.log, _pages(lo, hi), None, faults.Granted(), split=True, whole=False
    ),
    "copy-on-write": lambda slot, lo, hi: faults.write_fault_steps(
        slot.log, _pages(lo, hi), 2 * _FRAMES + _pages(lo, hi), faults.Granted(), split=True, whole=False
    ),
    "split": _change(lambda s2, first, npages: s2.split(s2.base_gfn + first, npages)),
    "collapse": _change(lambda s2, first, npages: s2.collapse(s2.base_gfn + first, npages)),
    "write-protect": _change(lambda s2, first, npages: s2.wrprotect(s2.base_gfn + first, npages)),
    "age": _change(lambda s2, first, npages: s2.mkold(s2.base_gfn + first, npages)),
}
"""The steps of production by what they are called, given the slot and the pages [lo, hi)."""


class RealSlot:
    """A real slot, which is put into any state, and takes steps from there.

    Parameters
    ----------
    scene : Scene
        The machine, whose descriptors are this slot's.
    pages : mapping
        The number of each of its pages in the slot, by name.
    npages : int
        Pages of the slot.
    mechanism : str
        How writes are learnt of: a name in `MECHANISMS`.
    block : bool
        Whether a block maps it all.
    logs : bool
        Whether it logs from the start.
    readonly : sequence of str
        The pages that the host lets nobody write.
    shared : bool
        Whether others may write its descriptors too, so that verbs change them by the atomic kernel.
    clients : int
        How many clients have joined from the start, of the two that there are.
    verbs : mapping
        The steps, by name.
    """

    npages: int
    log: SlotLog
    lease: Lease
    mask: NDArray[np.uint64]

    def __init__(
        self,
        scene: Scene,
        pages: Mapping[str, int],
        npages: int,
        mechanism: str = "hardware DBM",
        *,
        block: bool = False,
        logs: bool = True,
        readonly: Sequence[str] = (),
        shared: bool = False,
        clients: int = 0,
        verbs: Mapping[str, Callable[["RealSlot", int, int], Steps]] = VERBS,
    ) -> None:
        self.scene, self.pages, self.npages, self.verbs = scene, dict(pages), npages, verbs
        self.mechanisms = {name: make() for name, make in MECHANISMS.items()}
        self._hook: Callable[[int, int], None] = lambda _lo, _n: None
        parts = LogParts(lambda _slot, lo, n: self._hook(lo, n))
        self.log = _CaughtLog(self.memslot(logs=False), Granule.K4, self.mechanisms[mechanism], parts)
        if shared:
            self.log.stage2 = Stage2(npages, 0, Granule.K4, shared=True)
        self.cells = [(3, number, scene.cell(f"pte:{name}")) for name, number in self.pages.items()]
        if block:
            self.cells.append((2, 0, scene.cell("pte:block")))
            self.log.stage2.map(0, npages, _FRAMES, 2)
        else:
            for name, number in self.pages.items():
                self.log.stage2.map(number, 1, _FRAMES + number, writable=name not in readonly)
        if logs:
            for _ in self.log.start_steps(self.memslot(logs=True), full=False):
                pass
        self.feeds = [Feed(self.log, name, npages) for name in "AB"]
        for feed in self.feeds[:clients]:
            for _ in self.log.join_steps(feed):
                pass
        self._fresh = DirtyBitmap(npages) if self.log.feeds.fresh is None else self.log.feeds.fresh
        self._note = type(self.log.changing(0, npages))
        self.log._due.clear()
        self.lease, self.mask = self._lease(), np.zeros(self._words(), dtype=np.uint64)
        self._bitmap = DirtyBitmap(npages) if self.log.live is None else self.log.live
        self._histories: list[tuple[int, tuple[int, ...], World]] = [(-1, (), self._world())]
        self._numbers: dict[tuple[int, tuple[int, ...], World], int] = {}
        self._results: dict[tuple[Any, ...], Any] = {}

    def _words(self) -> int:
        return (self.npages + 63) >> 6

    def _lease(self) -> Lease:
        return Lease(self.log, DirtyBitmap(self.npages), 0, generation=self.log.generation, taken=False)

    def memslot(self, *, logs: bool) -> Memslot:
        """Return the slot's place."""
        return Memslot(0, _LOGS if logs else 0, 0, self.npages, 0)

    def other(self) -> Any:
        """Return the mechanism that this slot doesn't have."""
        return next(each for each in self.mechanisms.values() if each is not self.log.mechanism)

    def start(self, actors: int) -> Outer:
        """Put the real descriptors into the machine's memory, and return the rest."""
        for level, index, cell in self.cells:
            self.scene.mem[cell] = int(self.log.stage2.level(level)[index])
        return Outer(self._world(), ((0, 0),) * actors)

    # --- putting the slot into a state, and reading it back ------------------------------------------------------

    def _world(self) -> World:
        log, s2 = self.log, self.log.stage2
        rest = []
        for level in (1, 2, 3):
            array = s2.level(level).copy()
            for each, index, _ in self.cells:
                if each == level:
                    array[index] = 0
            rest.append(array.tobytes() if array.any() else b"")
        due = tuple(sorted((_due_key(each) for each in log._due), key=repr))
        live = None if log.live is None else _number(log.live)
        lease, shown = _number(self.lease.bitmap), int.from_bytes(self.mask.tobytes(), "little")
        host, saved = _number(s2.host_dirty), _number(s2.saved.bitmap)
        fresh = 0 if log.feeds.fresh is None else _number(log.feeds.fresh)
        feeds = tuple((_number(feed.bitmap), feed.broken) for feed in log.feeds)
        return World(
            live, lease, shown, host, saved, s2.saved.span, due, tuple(rest), log.mechanism.name, log.generation,
            fresh=fresh, feeds=feeds,
        )  # fmt: skip

    def _put(self, descs: tuple[int, ...], world: World, running: Any = None) -> None:
        log, s2 = self.log, self.log.stage2
        for level, raw in zip((1, 2, 3), world.rest, strict=True):
            s2.level(level)[:] = np.frombuffer(raw, dtype=np.uint64) if raw else 0
        for (level, index, _), desc in zip(self.cells, descs, strict=True):
            s2.level(level)[index] = desc
        _fill(s2.host_dirty, world.host)
        _fill(s2.saved.bitmap, world.saved)
        if self.lease.generation != world.generation:
            self.lease = Lease(log, DirtyBitmap(self.npages), generation=world.generation, taken=False)
        _fill(self.lease.bitmap, world.lease)
        self.mask[:] = np.frombuffer(world.shown.to_bytes(8 * self._words(), "little"), dtype=np.uint64)
        s2.saved.span = world.span
        log.mechanism, log.generation = self.mechanisms[world.mechanism], world.generation
        self._put_feeds(world)
        log.memslot = self.memslot(logs=world.live is not None)
        if world.live is None:
            log.live = None
        else:
            # The generator may have the bitmap as a local, so it stays the same object.
            if log.live is None:
                log.live = self._bitmap
            self._bitmap = log.live
            _fill(log.live, world.live)
        mine = None
        while running is not None and running.gi_frame is not None:  # steps may be those of others, in part
            mine, running = running.gi_frame.f_locals.get("due", mine), running.gi_yieldfrom
        notes = [mine if mine is not None and _due_key(mine) == key else self._due(key) for key in world.due]
        log._due = set(notes)

    def _put_feeds(self, world: World) -> None:
        feeds = self.log.feeds
        feeds.fresh, feeds._refs = None, ()
        for feed, (bits, broken) in zip(self.feeds, world.feeds, strict=False):
            _fill(feed.bitmap, bits)
            feed.broken = broken
            feeds.fresh = self._fresh  # the same object, which the generator may have as a local
            feeds.join(feed)
        for feed in self.feeds:
            feed.generation = world.generation  # both count the ends of a log, as nothing moves here
        _fill(self._fresh, world.fresh)

    def _due(self, key: Due) -> Any:
        lo, hi, missed, wider = key
        return self._note(lo, hi, tuple(self._due(each) for each in wider), missed)

    def _descs(self) -> tuple[int, ...]:
        return tuple(int(self.log.stage2.level(level)[index]) for level, index, _ in self.cells)

    def _number_of(self, parent: int, descs: tuple[int, ...], world: World) -> int:
        key = parent, descs, world
        if key not in self._numbers:
            self._numbers[key] = len(self._histories)
            self._histories.append(key)
        return self._numbers[key]

    # --- steps -----------------------------------------------------------------------------------------------------

    def _resume(self, verb: str, lo: int, hi: int, history: int, *, fail: bool) -> Any:
        """Take the step that a history ends with; return (what happened, descriptors, world, flushes asked for)."""
        key = verb, lo, hi, history, fail
        if key in self._results:
            return self._results[key]
        chain = []
        at = history
        while at > 0:
            at, descs, world = self._histories[at]
            chain.append((descs, world))
        asked: list[tuple[int, int]] = []
        self._hook = lambda _lo, _n: None
        descs, world = chain.pop()
        self._put(descs, world)
        steps: Any = None
        happened: Any = None
        try:
            steps = self.verbs[verb](self, lo, hi)
            while chain:
                next(steps)
                descs, world = chain.pop()
                self._put(descs, world, steps)

            def hook(first: int, npages: int) -> None:
                asked.append((first, first + npages))
                if fail:
                    raise OSError(5, "the flush failed")  # noqa: TRY301 - as the caller's own hook would

            self._hook = hook
            happened = next(steps)
        except StopIteration:
            happened = "ended"
        except OSError as error:
            happened = "failed" if error.errno == 5 and fail else f"production raised {error}"
        except InvariantError as error:
            happened = f"production raised {error}"
        after = self._world()._replace(taken=world.taken)
        if verb == "take host flags" and happened == "ended":
            after = after._replace(taken=world.host | world.saved)
        found = happened, self._descs(), after, tuple(asked)
        if steps is not None:
            steps.close()
        self._results[key] = found
        return found

    def begin(
        self, protocol: "Protocol", at: "Situation", number: int, actor: "Actor", local: "Local", act: "Run"
    ) -> Iterator[tuple["Label", "Situation"]]:
        """Hold the pages, if nobody else does, and come to the first point."""
        outer = at.world
        assert isinstance(outer, Outer)  # noqa: S101 - the situation is of a protocol with a slot
        self._put(self._cells_of(at), outer.of(number))
        lo, hi = act.pages
        first, stop = self.log.leaf_span(lo, hi) if act.verb in _LEAVES else (lo, hi)
        first, stop = first & ~63, stop + 63 & ~63
        if any(other < stop and first < end for _, other, end in outer.held):
            return
        outer = outer._replace(held=(*outer.held, (number, first, stop)))
        running = Running(act.verb, lo, hi, 0, None, (), act.fails)
        yield from self._step(protocol, at._replace(world=outer), number, actor, local, running)

    def steps(
        self, protocol: "Protocol", at: "Situation", number: int, actor: "Actor", local: "Local"
    ) -> Iterator[tuple["Label", "Situation"]]:
        """Take the next step of a run: a part of its flush, or on to its next point."""
        from hwdbm.races.protocol import dsb, tlbi  # noqa: PLC0415 - it imports this module's caller

        running = local.run
        assert isinstance(running, Running)  # noqa: S101 - the actor runs something
        if not running.todo:
            yield from self._step(protocol, at, number, actor, local, running)
            return
        if running.fails:
            yield from self._step(protocol, at, number, actor, local, running, fail=True)
        what, *rest = running.todo[0]
        if what == "dsb":
            act = dsb()
        else:
            stage, lo, hi = rest
            act = tlbi(*(name for name, page in self.pages.items() if lo <= page < hi), stage=stage)
        after = protocol._flushed(at, number, local, act)
        if after is not None:
            left = after.locals[number]._replace(run=running._replace(todo=running.todo[1:]))
            yield (actor.name, act.text), protocol.moved(after, number, left)

    def alone(self, running: object) -> bool:
        """Return whether the next step of a run reads no descriptor: its pages are held, and nobody sees it."""
        assert isinstance(running, Running)  # noqa: S101 - as below
        return running.point in (Point.FLUSH, Point.TAKE, Point.COPY) and not running.todo and not running.fails

    def _cells_of(self, at: "Situation") -> tuple[int, ...]:
        return tuple(at.state.mem[cell] for _, _, cell in self.cells)

    def _step(
        self, protocol: "Protocol", at: "Situation", number: int, actor: "Actor", local: "Local",
        running: Running, *, fail: bool = False,
    ) -> Iterator[tuple["Label", "Situation"]]:  # fmt: skip
        outer = at.world
        assert isinstance(outer, Outer)  # noqa: S101 - as above
        history = self._number_of(running.history, self._cells_of(at), outer.of(number))
        happened, descs, world, _ = self._resume(running.verb, running.lo, running.hi, history, fail=fail)
        machine, state = protocol.scene.machine, at.state
        for (_, _, cell), desc in zip(self.cells, descs, strict=True):
            if state.mem[cell] != desc:
                if machine.locked(state, cell):
                    return
                state = machine.write(state, cell, desc)
        text = f"{running.verb}: {_POINTS[running.point]}" if running.point else f"{running.verb}: holds its pages"
        if isinstance(happened, Point):
            running = running._replace(history=history, point=happened, todo=(), fails=running.fails - fail)
            if happened is Point.FLUSH:
                after_history = self._number_of(history, descs, world)
                asked = self._resume(running.verb, running.lo, running.hi, after_history, fail=False)[3]
                todo = [part for lo, hi in asked for part in _flush(lo, hi)]
                running = running._replace(todo=tuple(todo))
            local = local._replace(run=running)
        else:
            held = tuple(each for each in outer.held if each[0] != number)
            error = happened if happened.startswith("production") else ""
            outer = outer._replace(held=held, error=error or self._verified(descs, world, held))
            result: Any = "failed" if happened == "failed" else world.lease
            if running.verb.startswith("rollback"):
                world = world._replace(lease=0)
            elif running.verb == "peek":
                world = world._replace(lease=0, shown=world.lease)
            local = local._replace(run=None, results=(*local.results, result))
            text += ", the flush fails" if fail else ""
        after = at._replace(state=state, world=outer.having(number, world))
        yield (actor.name, text), protocol.moved(after, number, local)

    def _verified(self, descs: tuple[int, ...], world: World, held: Sequence[object]) -> str:
        """Return what is wrong with the slot once nothing is under way, by production's own check."""
        if held:
            return ""
        key = "verify", descs, world
        if key not in self._results:
            self._put(descs, world)
            try:
                for _ in self.log.verify_steps():
                    pass
                self._results[key] = ""
            except InvariantError as error:
                self._results[key] = f"verify: {error}"
        return str(self._results[key])

    # --- for protocols ----------------------------------------------------------------------------------------

    def failed(self, at: "Situation") -> str | None:
        """Return what went wrong in the production code."""
        return at.world.error or None if isinstance(at.world, Outer) else None

    def changes(self, before: object, after: object) -> list[str]:
        """Return which bitmaps are others, and which pages are in them."""
        if not isinstance(before, Outer) or not isinstance(after, Outer):
            return []
        names = {"live": "log", "fresh": "fresh", "host": "host flags", "saved": "saved"}
        found = [
            f"{name} {self._listed(new)}"
            for was, now in zip(before.leases, after.leases, strict=True)
            for name, old, new in zip(("lease", "shown"), was, now, strict=True)
            if old != new
        ]
        for field, name in names.items():
            old, new = getattr(before.inner, field), getattr(after.inner, field)
            if old != new:
                found.append(f"{name} {self._listed(new)}")
        for name, was, now in zip_longest("AB", before.inner.feeds, after.inner.feeds):
            if was != now and now is not None:
                found.append(f"{name} {self._listed(now[0])}{', broken' if now[1] else ''}")
        if before.inner.mechanism != after.inner.mechanism:
            found.append(f"mechanism {after.inner.mechanism}")
        return found

    def _listed(self, bits: int | None) -> str:
        if bits is None:
            return "off"
        return "{" + ",".join(name for name, page in self.pages.items() if bits >> page & 1) + "}"


_LEAVES: Final = frozenset(
    {"map", "replace", "populate", "unmap", "write fault", "copy-on-write", "split", "collapse", "write-protect", "age"}
)
_POINTS: Final = {
    Point.CLEAN: "changes leaves, publishes what they had",
    Point.PUBLISH: "sets bits in the log",
    Point.FLUSH: "the flush is done",
    Point.TAKE: "takes the bits out of the log",
    Point.COPY: "hands the pages out",
}


def _flush(lo: int, hi: int) -> tuple[tuple[Any, ...], ...]:
    return ("tlbi", "s2", lo, hi), ("dsb",), ("tlbi", "s1", lo, hi), ("dsb",)


def _number(bitmap: DirtyBitmap) -> int:
    return int.from_bytes(bitmap.words.tobytes(), "little")


def _fill(bitmap: DirtyBitmap, bits: int) -> None:
    bitmap.words[:] = np.frombuffer(bits.to_bytes(bitmap.words.nbytes, "little"), dtype=np.uint64)


def _due_key(due: Any) -> Due:
    return due.lo, due.hi, due.missed, tuple(_due_key(each) for each in due.wider)
