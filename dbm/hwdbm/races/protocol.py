"""Protocols: software beside vCPUs, explored in every order, and what must hold of each.

A protocol is vCPUs (programs of `hwdbm.races.program`) and actors. An actor is a generator function that yields an
`Act` at every access to what others see too, and is sent what the act returned. It must be deterministic: it is started
anew, and told the same again, wherever the search comes back to it. What it decides on, it has read by an act.

What must hold: nothing is wrong with any state, nor with any end; an end can be reached from every state; no fault is
taken twice on a descriptor that nobody changed in between; no actor that is said to be bounded goes round for ever.

Examples
--------
The vCPU writes once while another processor cleans the descriptor, flushes and copies the page:

>>> from hwdbm.races.program import Scene
>>> def harvest():
...     old = yield fetch_clear("pte:x", pte.S2AP_W)
...     yield from flush("x")
...     if old & pte.S2AP_W:
...         yield copy("x")
>>> scene = Scene({"x": "clean"}, ["store x 1"], {"copy:x": 0})
>>> check(Protocol("harvest", scene, [Actor("S", harvest)], kept("x"))).proved
True
"""

from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from hwdbm import check as check_types
from hwdbm import pte
from hwdbm.errors import HwdbmError
from hwdbm.races.machine import Did, Moment, User
from hwdbm.races.program import Scene, state_name
from hwdbm.races.search import Graph, search

_NOBODY: Final[frozenset[User]] = frozenset()
_LOOKED_AT = 20_000  # states, from one step of a counterexample, for an end that is right


class BlockedError(HwdbmError, RuntimeError):
    """The word can't be written at this moment: a mark of the hardware is under way there."""


class View:
    """Memory as an act sees and changes it; an act is one moment, so nothing comes in between.

    ``view[name]`` is what a cell holds, and ``view[name] = value`` writes it.
    """

    def __init__(self, protocol: "Protocol", state: Moment, world: Hashable = None, number: int = 0) -> None:
        self.protocol, self.state, self.world, self.number = protocol, state, world, number

    def __getitem__(self, name: str) -> int:
        return self.state.mem[self.protocol.scene.cell(name)]

    def __setitem__(self, name: str, value: int) -> None:
        cell, machine = self.protocol.scene.cell(name), self.protocol.scene.machine
        if cell in machine.descriptors and machine.locked(self.state, cell):
            raise BlockedError
        self.state = machine.write(self.state, cell, value)

    def exchange(self, name: str, value: int) -> int:
        """Write a cell, and return what it held."""
        old = self[name]
        self[name] = value
        return old

    def lets_write(self, page: str, *, stale: bool = False) -> bool:
        """Return whether the descriptor of a page lets the guest write; with `stale` also whether a TLB's may."""
        machine = self.protocol.scene.machine
        walks = [desc for desc, _ in machine.walks(self.state, machine.pages[page])]
        return any(desc & pte.VALID and desc & (pte.S2AP_W | pte.DBM) for desc in (walks if stale else walks[:1]))


@dataclass(frozen=True, slots=True)
class Act:
    """One access of an actor to what others see too.

    Parameters
    ----------
    text : str
        What it does, as a timeline says it.
    do : callable
        Given the `View`, changes it, and returns what the actor is sent: something hashable.
    when : callable, optional
        Given the `View`, whether it can be done yet. Until then the actor waits.
    kind : str
        "act"; "dsb" also waits for the users of translations that were flushed; "tlbi" flushes; "again" starts anew.
    pages : tuple of str
        What a TLBI flushes.
    stage : str
        Of which stage: "s2", "s1" or "all".
    level : str or None
        The cell of the only descriptor whose entries a TLBI takes away, if it says which (a level hint).
    quiet : bool
        Whether nobody else's step has to do with it, so that it is tried in one order only.
    """

    text: str
    do: Callable[[View], Hashable] = lambda _: None
    when: Callable[[View], bool] | None = None
    kind: str = "act"
    pages: tuple[str, ...] = ()
    stage: str = "all"
    level: str | None = None
    quiet: bool = False


@dataclass(frozen=True, slots=True)
class Run:
    """Run one of the production generators of a slot (`hwdbm.races.production`), a step of the actor at each point.

    Parameters
    ----------
    verb : str
        Which one.
    pages : tuple of int
        The pages [lo, hi) of the slot.
    fails : int
        How many of its flushes may fail.
    """

    verb: str
    pages: tuple[int, int]
    fails: int = 0


Label = tuple[Any, ...]
"""A step: an actor and what it does, or what `WeakMachine.steps` says of one."""
Proc = Callable[..., Generator[Act | Run, Any, None]]


@dataclass(frozen=True, slots=True)
class Actor:
    """Software.

    Parameters
    ----------
    name : str
        What it is called in a timeline.
    proc : callable
        The generator function: without parameters, or with the page's name for a handler.
    handles : int or None
        The vCPU whose faults it handles, if it does.
    bounded : bool
        Whether it must come to an end whatever others do.
    last : bool
        Whether it begins when all others, and the vCPUs, are done.
    """

    name: str
    proc: Proc
    handles: int | None = None
    bounded: bool = False
    last: bool = False


class Local(NamedTuple):
    """How far an actor has come.

    Parameters
    ----------
    results : tuple
        What its acts have returned.
    noted, before : frozenset
        The users of the translations that its last TLBI flushed, and those before.
    run : tuple or None
        The generator that it runs, as `hwdbm.races.production` has it.
    idle : bool
        Whether it is a handler without a fault.
    """

    results: tuple[Hashable, ...] = ()
    noted: frozenset[User] = _NOBODY
    before: frozenset[User] = _NOBODY
    run: Hashable = None
    idle: bool = False


class Situation(NamedTuple):
    """All that there is at a moment: the machine's, the actors', and what a real slot has beside its descriptors."""

    state: Moment
    locals: tuple[Local, ...]
    world: Hashable = None
    faults: tuple[tuple[int, int, int] | None, ...] = ()
    livelock: bool = False


class Step(NamedTuple):
    """One step of a way.

    Parameters
    ----------
    actor : str
        Who takes it.
    text : str
        What is done.
    changed : tuple of str
        Which shared state is another afterwards, and what it is then.
    """

    actor: str
    text: str
    changed: tuple[str, ...] = ()


@dataclass(eq=False, slots=True)
class Protocol:
    """What is explored.

    Parameters
    ----------
    name : str
        What it is called.
    scene : Scene
        The vCPUs and the memory.
    actors : sequence of Actor
        Software.
    end : callable
        Given the `View` of an end, what is wrong with it in words, or None.
    always : callable
        The same of every state.
    summary : str
        What it shows, in a sentence.
    slot : optional
        The real slot that `Run` runs generators of (`hwdbm.races.production.RealSlot`).
    erratum : bool
        Whether the first DSB after a TLBI may end too early (Arm erratum 4118414).
    symmetric : tuple of int
        vCPUs that are the same but for their names.
    names : tuple of str
        What the programs are called in a timeline; vCPU0, vCPU1 and so on by default.
    """

    name: str
    scene: Scene
    actors: Sequence[Actor] = ()
    end: Callable[[View], str | None] = lambda _: None
    always: Callable[[View], str | None] = lambda _: None
    summary: str = ""
    slot: Any = None
    erratum: bool = False
    symmetric: tuple[int, ...] = ()
    names: tuple[str, ...] = ()
    _acts: dict[tuple[int, tuple[Hashable, ...]], Act | Run | None] = field(default_factory=dict)

    def start(self) -> Situation:
        """Return the situation that it begins in."""
        world = None if self.slot is None else self.slot.start(len(self.actors))  # which has the descriptors
        self.scene.machine.precise = True
        state = self.scene.start()
        locals_ = tuple(Local(idle=actor.handles is not None) for actor in self.actors)
        return Situation(state, locals_, world, (None,) * len(state.threads))

    # --- steps -----------------------------------------------------------------------------------------------

    def steps(self, at: Situation) -> Iterator[tuple[Label, Situation]]:
        """Yield each step that can be taken, as `said` knows it, and the situation after it."""
        machine = self.scene.machine
        for number, (actor, local) in enumerate(zip(self.actors, at.locals, strict=True)):
            if not local.idle and self._alone(at, number, actor, local):
                for step, after in self._act(at, number, actor, local):
                    yield step, self._canonical(self._noticed(at, after))
                return
        for label, state in machine.steps(at.state):
            after = at._replace(state=state)
            if label[0] != "hardware" and label[2] == "fault":
                after = self._faulted(at, after, int(label[0]), int(label[1]))  # type: ignore[call-overload]
            yield label, self._canonical(self._noticed(at, after))
        for number, (actor, local) in enumerate(zip(self.actors, at.locals, strict=True)):
            if not local.idle:
                for step, after in self._act(at, number, actor, local):
                    yield step, self._canonical(self._noticed(at, after))

    def _alone(self, at: Situation, number: int, actor: Actor, local: Local) -> bool:
        """Return whether an actor's next step needn't be tried in any other order: it commutes with all others'."""
        if local.run is not None:
            return bool(self.slot.alone(local.run))
        act = self.next_act(number, local.results, self._fault_page(at, actor))
        return isinstance(act, Act) and act.quiet

    def next_act(self, number: int, results: tuple[Hashable, ...], page: str | None = None) -> Act | Run | None:
        """Return what an actor does after it was sent `results`; None when it has ended."""
        key = number, (page, *results)
        if key not in self._acts:
            proc = self.actors[number].proc
            running = proc() if page is None else proc(page)
            try:
                act = next(running)
                for result in results:
                    act = running.send(result)
            except StopIteration:
                self._acts[key] = None
            else:
                if not isinstance(act, Act | Run):
                    raise TypeError(f"actor {self.actors[number].name} yields acts, not {act!r}")
                self._acts[key] = act
            running.close()
        return self._acts[key]

    def _act(self, at: Situation, number: int, actor: Actor, local: Local) -> Iterator[tuple[Label, Situation]]:
        if local.run is not None:
            yield from self.slot.steps(self, at, number, actor, local)
            return
        act = self.next_act(number, local.results, self._fault_page(at, actor))
        if act is None or (actor.last and not self.ended(at, but=number)):
            return
        if isinstance(act, Run):
            yield from self.slot.begin(self, at, number, actor, local, act)
            return
        view = View(self, at.state, at.world, number)
        if act.when is not None and not act.when(view):
            return
        after = self._flushed(at, number, local, act)
        if after is None:
            return
        view.state = after.state
        try:
            result = act.do(view)
        except BlockedError:
            return
        local = after.locals[number]
        local = local._replace(results=() if act.kind == "again" else (*local.results, result))
        after = after._replace(state=view.state, world=view.world)
        yield (actor.name, act.text), self.moved(after, number, local)

    def _flushed(self, at: Situation, number: int, local: Local, act: Act) -> Situation | None:
        """Return what a barrier or a TLBI leaves behind; None if a barrier has still to wait."""
        machine = self.scene.machine
        if act.kind == "dsb":
            waited = local.before if self.erratum else local.noted | local.before
            if not machine.complete(at.state, waited):
                return None
            if not self.erratum:
                local = local._replace(noted=_NOBODY, before=_NOBODY)
        elif act.kind == "tlbi":
            cells = self.cells_of(act.pages) if act.level is None else frozenset({self.scene.cell(act.level)})
            users = _NOBODY if act.stage == "s2" and machine.combined else machine.users(at.state, cells)
            local = local._replace(noted=users, before=local.noted | local.before)
            at = at._replace(state=machine.forget(at.state, cells, act.stage))
        return _with_local(at, number, local)

    def cells_of(self, pages: Sequence[str]) -> frozenset[int]:
        """Return the cells of the descriptors that may translate some pages."""
        found = set[int]()
        for name in pages:
            page = self.scene.pages[name]
            found |= {page.cell, *page.run, *(() if page.table is None else (page.table,))}
        return frozenset(found)

    def moved(self, after: Situation, number: int, local: Local) -> Situation:
        """Return the situation with an actor where it is now; a handler that has ended lets its vCPU go on."""
        actor = self.actors[number]
        after = _with_local(after, number, local)
        if actor.handles is None or local.run is not None:
            return after
        if self.next_act(number, local.results, self._fault_page(after, actor)) is not None:
            return after
        thread = after.state.threads[actor.handles]
        k = self.scene.machine.faulted(thread)
        fresh = tuple(did if i < (k or 0) or (did.done and i != k) else Did() for i, did in enumerate(thread))
        threads = after.state.threads
        threads = (*threads[: actor.handles], fresh, *threads[actor.handles + 1 :])
        return _with_local(after._replace(state=after.state._replace(threads=threads)), number, Local(idle=True))

    def _fault_page(self, at: Situation, actor: Actor) -> str | None:
        if actor.handles is None:
            return None
        k = self.scene.machine.faulted(at.state.threads[actor.handles])
        op = self.scene.machine.programs[actor.handles][k or 0]
        return str(op.place([did.value for did in at.state.threads[actor.handles]])) if op.place else None

    def _faulted(self, before: Situation, after: Situation, t: int, k: int) -> Situation:
        """Return the situation with a vCPU's handler begun, and the fault noted if it would come again."""
        number = next((n for n, actor in enumerate(self.actors) if actor.handles == t), None)
        if number is None:
            return after
        walk = after.state.threads[t][k].walk
        assert walk is not None  # noqa: S101 - what faulted was translated
        noted = (k, walk.cell, walk.desc) if before.state.mem[walk.cell] == walk.desc else None
        faults = (*after.faults[:t], noted, *after.faults[t + 1 :])
        return _with_local(after._replace(faults=faults), number, Local())

    def _noticed(self, before: Situation, after: Situation) -> Situation:
        """Return the situation without the notes of faults on descriptors that were changed since."""
        if before.state.mem is after.state.mem or not any(after.faults):
            return after
        faults = tuple(
            None if fault is not None and after.state.mem[fault[1]] != before.state.mem[fault[1]] else fault
            for fault in after.faults
        )
        return after._replace(faults=faults)

    def _canonical(self, at: Situation) -> Situation:
        """Return the situation, or that with two vCPUs that are the same in each other's place."""
        if not self.symmetric:
            return at
        one, two = self.symmetric
        if _order(at.state.threads[one]) <= _order(at.state.threads[two]):
            return at
        return self._swapped(at, one, two)

    def _swapped(self, at: Situation, one: int, two: int) -> Situation:
        def other(t: int) -> int:
            return two if t == one else one if t == two else t

        def users(some: frozenset[User]) -> frozenset[User]:
            return frozenset((other(t), k, access) for t, k, access in some)

        threads = tuple(at.state.threads[other(t)] for t in range(len(at.state.threads)))
        faults = tuple(at.faults[other(t)] for t in range(len(at.faults)))
        order = list(range(len(self.actors)))
        for n, actor in enumerate(self.actors):
            if actor.handles is not None:
                order[n] = next(m for m, each in enumerate(self.actors) if each.handles == other(actor.handles))
        moved = tuple(
            at.locals[n]._replace(noted=users(at.locals[n].noted), before=users(at.locals[n].before)) for n in order
        )
        return at._replace(state=at.state._replace(threads=threads), faults=faults, locals=moved)

    # --- ends and violations -----------------------------------------------------------------------------------

    def ended(self, at: Situation, but: int | None = None) -> bool:
        """Return whether everybody is done, but for one of the actors."""
        return self.scene.machine.ended(at.state) and all(
            n == but
            or local.idle
            or (local.run is None and self.next_act(n, local.results, self._fault_page(at, actor)) is None)
            for n, (actor, local) in enumerate(zip(self.actors, at.locals, strict=True))
        )

    def wrong(self, at: Situation) -> str | None:
        """Return what is wrong with a situation, in words."""
        view = View(self, at.state, at.world)
        found = self.always(view)
        if found is None and self.slot is not None:
            found = self.slot.failed(at)
        if found is None and self.ended(at):
            found = self.end(view)
        return found

    def faults_again(self, before: Situation, after: Situation) -> bool:
        """Return whether a step takes a fault that the vCPU took before, on a descriptor that nobody has changed."""
        for t, fault in enumerate(before.faults):
            if fault is None or after.faults[t] != fault:
                continue
            k = self.scene.machine.faulted(after.state.threads[t])
            if k == fault[0] and self.scene.machine.faulted(before.state.threads[t]) is None:
                return True
        return False

    # --- words -------------------------------------------------------------------------------------------------

    def said(self, label: Label, before: Situation, after: Situation) -> Step:
        """Return a step in words."""
        scene, changed = self.scene, self.changes(before, after)
        if len(label) == 2:
            return Step(*label, changed)
        if label[0] == "hardware":
            return Step("MMU", f"sets AF in {scene.cells[label[1]]}", changed)
        t, k, moment = label[:3]
        what = scene.machine.programs[t][k].label.split("->")[0].strip()
        texts: dict[str, Callable[[], str]] = {
            "walk": lambda: (
                f"translates for {what}: {state_name(label[3])}"
                + ("" if before.state.mem[label[4]] == label[3] else " (by its TLB)")
            ),
            "mark": lambda: f"marks {scene.cells[label[4]]}",
            "fault": lambda: f"faults on {what}",
            "store": lambda: f"{what} is visible",
            "load": lambda: f"{what} reads {label[3]}",
            "retry": lambda: f"will translate again for {what}",
        }
        return Step(self.names[t] if self.names else f"vCPU{t}", texts.get(moment, lambda: what)(), changed)

    def changes(self, before: Situation, after: Situation) -> tuple[str, ...]:
        """Return which cells are others, and what they hold."""
        names, descriptors = self.scene.cells, self.scene.machine.descriptors
        found = [
            f"{names[cell]} {state_name(new) if cell in descriptors else new}"
            for cell, (old, new) in enumerate(zip(before.state.mem, after.state.mem, strict=True))
            if old != new
        ]
        if self.slot is not None:
            found += self.slot.changes(before.world, after.world)
        return tuple(found)


def _order(thread: tuple[Did, ...]) -> list[tuple[Hashable, ...]]:
    return [(did.walk or (), did.need, str(did.fault), did.done, str(did.value)) for did in thread]


def _with_local(at: Situation, number: int, local: Local) -> Situation:
    return at._replace(locals=(*at.locals[:number], local, *at.locals[number + 1 :]))


# --- checking -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Finding:
    """What a search found.

    Attributes
    ----------
    name : str
        The protocol's.
    states : int
        How many were explored.
    proved : bool
        Whether all were, and nothing was wrong.
    wrong : str
        What was wrong, in words.
    steps : tuple of Step
        A shortest way there.
    lost_at : int or None
        The step after which every end is wrong.
    """

    name: str
    states: int
    proved: bool
    wrong: str = ""
    steps: tuple[Step, ...] = ()
    lost_at: int | None = None


def check(protocol: Protocol, limit: int | None = 500_000) -> Finding:
    """Explore a protocol until something is wrong, or to its end.

    Parameters
    ----------
    protocol : Protocol
        What is explored.
    limit : int, optional
        States after which it is given up.

    Returns
    -------
    Finding
        A proof, or a shortest counterexample.

    Raises
    ------
    ValueError
        If there are more states than `limit`, or an act names a cell that isn't there.
    TypeError
        If `protocol` is none, or an actor yields something else than acts.
    """
    check_types.instance(protocol, Protocol, "protocol")
    found: list[str] = []

    def stop(at: Situation, edges: Sequence[object]) -> bool:
        wrong = protocol.wrong(at)
        if at.livelock:
            wrong = "the vCPU faults again on a descriptor that nobody has changed: it never goes on"
        if wrong is None and not edges and not protocol.ended(at):
            wrong = "nobody can go on"
        if wrong is not None:
            found.append(wrong)
        return wrong is not None

    def steps(at: Situation) -> Iterator[tuple[Label, Situation]]:
        for step, after in protocol.steps(at):
            yield step, after._replace(livelock=True) if protocol.faults_again(at, after) else after

    graph = search(protocol.start(), steps, stop, limit)
    if found:
        at = len(graph.edges) - 1
        return _report(protocol, graph, at, found[0])
    ends = [at for at, situation in enumerate(graph.states) if protocol.ended(situation)]
    stuck = set(range(len(graph.states))) - graph.reaching(ends)
    if stuck:
        return _report(protocol, graph, min(stuck), "from here no end can be reached")
    bounded = {actor.name for actor in protocol.actors if actor.bounded}
    if bounded:
        component = graph.on_cycles()
        for at, edges in enumerate(graph.edges):
            for label, to in edges:
                if component[at] == component[to] and isinstance(label, tuple) and label[0] in bounded:
                    return _report(protocol, graph, to, f"{label[0]} may go round for ever")
    return Finding(protocol.name, len(graph.states), proved=True)


def _report(protocol: Protocol, graph: Graph[Situation], at: int, wrong: str) -> Finding:
    way = graph.path(at)
    passed = [graph.states[0], *(situation for _, situation in way)]
    pairs = zip(way, passed, strict=False)
    steps = tuple(protocol.said(label, before, after) for (label, after), before in pairs)  # type: ignore[arg-type]
    lost = _lost_at(protocol, passed, wrong)
    return Finding(protocol.name, len(graph.states), proved=False, wrong=wrong, steps=steps, lost_at=lost)


def _lost_at(protocol: Protocol, way: Sequence[Situation], wrong: str) -> int | None:
    """Return the first step of a way after which nothing can be saved any more: every end is wrong."""
    if not protocol.ended(way[-1]) or protocol.end(View(protocol, way[-1].state, way[-1].world)) != wrong:
        return None
    lost = len(way) - 1
    for at in range(len(way) - 2, -1, -1):
        try:
            graph = search(
                way[at],
                protocol.steps,
                lambda here, _: protocol.ended(here) and protocol.wrong(here) is None,
                _LOOKED_AT,
            )
        except ValueError:
            break
        last = graph.states[len(graph.edges) - 1]
        if protocol.ended(last) and protocol.wrong(last) is None:
            break
        lost = at
    return lost - 1 if lost else None


# --- acts -------------------------------------------------------------------------------------------------------


def load(name: str) -> Act:
    """Read a cell; the actor is sent what it holds."""
    return Act(f"reads {name}", lambda view: view[name])


def store(name: str, value: int, text: str = "") -> Act:
    """Write a cell by a plain store."""
    return Act(text or f"stores {name}", lambda view: view.__setitem__(name, value))


def exchange(name: str, value: int, text: str = "") -> Act:
    """Write a cell; the actor is sent what it held."""
    return _atomic(text or f"exchanges {name}", name, lambda _: value)


def fetch_clear(name: str, bits: int, text: str = "") -> Act:
    """Clear bits atomically; the actor is sent what the cell held."""
    return _atomic(text or f"clears bits of {name}", name, lambda old: old & ~bits)


def fetch_set(name: str, bits: int, text: str = "") -> Act:
    """Set bits atomically; the actor is sent what the cell held."""
    return _atomic(text or f"sets bits of {name}", name, lambda old: old | bits)


def swap_if(name: str, old: int, new: int, text: str = "") -> Act:
    """Write a cell if it holds `old` (compare-and-swap); the actor is sent what it held."""
    return _atomic(text or f"compares and swaps {name}", name, lambda now: new if now == old else now)


def _atomic(text: str, name: str, apply: Callable[[int], int]) -> Act:
    def do(view: View) -> int:
        old = view[name]
        view[name] = apply(old)
        return old

    return Act(text, do)


def copy(page: str, to: str = "", frame: str = "") -> Act:
    """Copy a page's memory to its destination, the cell ``copy:PAGE``."""
    return Act(f"copies {page}", lambda view: view.__setitem__(to or f"copy:{page}", view[frame or f"frame:{page}"]))


def dsb() -> Act:
    """Wait until the TLBI before it is complete: until all that used the old translations is done."""
    return Act("dsb", kind="dsb")


def tlbi(*pages: str, stage: str = "all") -> Act:
    """Invalidate the translations of pages."""
    names = {"all": "tlbi", "s2": "tlbi stage 2", "s1": "tlbi stage 1"}
    return Act(f"{names[stage]} {' '.join(pages)}", kind="tlbi", pages=pages, stage=stage)


def again() -> Act:
    """Begin anew."""
    return Act("begins anew", kind="again")


def flush(*pages: str) -> Generator[Act, Any, None]:
    """Flush pages as KVM does: stage 2, DSB, stage 1, DSB."""
    yield tlbi(*pages, stage="s2")
    yield dsb()
    yield tlbi(*pages, stage="s1")
    yield dsb()


def kept(*pages: str, mark: str = "log") -> Callable[[View], str | None]:
    """Return the condition of an end that no write was lost.

    Each page's copy is what its memory holds, or the page is still dirty: in its descriptor, or in the bitmap, which is
    a cell of the name `mark` with bit i for the i-th of `pages`, if there is one.
    """

    def end(view: View) -> str | None:
        log = view[mark] if mark in view.protocol.scene.cells else 0
        for number, page in enumerate(pages):
            desc = view[f"pte:{page}"]
            dirty = desc & pte.VALID and desc & pte.DBM and desc & pte.S2AP_W
            if not dirty and not log >> number & 1 and view[f"copy:{page}"] != view[f"frame:{page}"]:
                return f"a write to page {page} is lost: the copy is old, and nothing says that it is dirty"
        return None

    return end
