"""The machine that the races are run on: vCPUs whose accesses have separate moments, over memory and a TLB.

A memory instruction has up to three moments. Its *walk* reads the descriptor, from memory or from what a TLB may have
kept since the last TLBI. Its *mark* sets AF and the dirty state by compare-and-swap, if the walk found that needed. Its
*access* binds the value of a load, makes a store visible, or takes the fault. Which moment waits for which is a table
(`_Waits`), an operational reading of Arm's memory model with page tables: walks run early, past DMB and DSB; a mark may
come after its store is visible; barriers order accesses; an ISB orders walks too.

The litmus tests and the protocols run these same functions. What they agree with is a number of herd's verdicts
(`hwdbm races --litmus`), and stage 1's only: no proof for Arm.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Final, NamedTuple

from hwdbm import pte

Value = int | str
"""What a register holds: a number, a descriptor (a number too), or the name of a place."""
Expr = Callable[[Sequence[Value]], Value]
"""Computes an operand from the values that the thread's instructions have bound."""

_DIRTY: Final = 1 << 7


class Format(NamedTuple):
    """What bit 7 of a leaf says when it lets the guest write, or is dirty: set at stage 2, clear at stage 1."""

    dirty: int

    def is_dirty(self, desc: int) -> bool:
        """Return whether a store needs no mark."""
        return desc & _DIRTY == self.dirty

    def mark(self, desc: int, bits: int) -> int:
        """Return a descriptor with AF set, or the dirty state, or both."""
        if bits & _DIRTY:
            desc = desc & ~_DIRTY | self.dirty
        return desc | bits & pte.AF


STAGE1: Final = Format(0)
STAGE2: Final = Format(_DIRTY)


class Fault(Enum):
    """Why an access isn't allowed."""

    TRANSLATION = "translation"
    ACCESS_FLAG = "access flag"
    PERMISSION = "permission"


class OpKind(Enum):
    """What an instruction does."""

    LOAD = "load"
    STORE = "store"
    RMW = "atomic"
    TLBI = "tlbi"
    DMB = "dmb"
    DSB = "dsb"
    ISB = "isb"


_READS, _WRITES = (OpKind.LOAD, OpKind.RMW), (OpKind.STORE, OpKind.RMW)
_BARRIERS = (OpKind.DMB, OpKind.DSB, OpKind.ISB)


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """One instruction.

    Parameters
    ----------
    kind : OpKind
        What it does.
    place : callable or None
        Where, as the name of a place; None for a TLBI of everything.
    value : callable
        What is stored, or the operand of an atomic.
    apply : callable
        An atomic's result of (old value, operand).
    place_from, value_from : frozenset of int
        The instructions whose values the operands need.
    scope : str
        Which accesses a barrier orders: "full", "ld" or "st".
    acquire, release, returns : bool
        Of a load and of a store; whether an atomic's old value is returned.
    label : str
        What it is called.
    """

    kind: OpKind
    place: Expr | None = None
    value: Expr = lambda _: 0
    apply: Callable[[int, int], int] = lambda _, new: new
    place_from: frozenset[int] = frozenset()
    value_from: frozenset[int] = frozenset()
    scope: str = "full"
    acquire: bool = False
    release: bool = False
    returns: bool = True
    label: str = ""


class Page(NamedTuple):
    """How the pages of a name are translated.

    Parameters
    ----------
    cell : int
        The memory cell of the level-3 descriptor.
    table : int or None
        The cell of the level-2 descriptor, a table or a block, if there is one.
    run : tuple of int
        The cells of the contiguous run that it is in: a TLB may use any member's entry for all of them.
    number : int
        The page's number in a block or run, by which its frame lies from the first one's.
    """

    cell: int
    table: int | None = None
    run: tuple[int, ...] = ()
    number: int = 0


class Translation(NamedTuple):
    """What a walk found: the descriptor, the cell that it is in, and the frame."""

    desc: int
    cell: int
    frame: int


class Did(NamedTuple):
    """How far an instruction has come.

    Parameters
    ----------
    walk : Translation or None
        Its translation.
    need : int
        The bits (AF, S2AP[1]) that its mark has still to set. While there are any, nobody else can write the cell.
    fault : Fault or None
        What the walk will fault on.
    done : bool
        Whether it has had its access, or its fault was taken.
    value : int or str
        What a load or an atomic returned.
    read : bool
        Whether an atomic that is none (`BROKEN`, S1) has had its load.
    """

    walk: Translation | None = None
    need: int = 0
    fault: Fault | None = None
    done: bool = False
    value: Value = 0
    read: bool = False


User = tuple[int, int, bool]
"""A thread, an instruction of it, and whether its access is waited for, or its walk only."""


class Moment(NamedTuple):
    """All that there is at a moment.

    Parameters
    ----------
    mem : tuple of int
        The cells of memory.
    tlb : tuple of frozenset of int
        For each cell the descriptors that it held since the last TLBI, and that a TLB may have kept. Those of combined
        entries (stage 1 and 2 together) are negative.
    threads : tuple
        For each thread how far its instructions have come.
    noted : tuple
        For each TLBI that was done, as (thread, instruction): who used the old translations.
    """

    mem: tuple[int, ...]
    tlb: tuple[frozenset[int], ...]
    threads: tuple[tuple[Did, ...], ...]
    noted: tuple[tuple[tuple[int, int], frozenset[User]], ...] = ()


BROKEN: Final = {
    "H1": "a mark sets bits in whatever is there, with no compare",
    "H2": "a mark writes back what the walk had read",
    "H3": "a stale clean TLB entry is not checked again before a store",
    "H4": "a store never marks",
    "H5": "a load marks",
    "H6": "the dirty state is set before AF",
    "H7": "DBM is taken as set: read-only becomes writable",
    "H8": "an invalid descriptor is marked",
    "H9": "a store that may never happen is marked",
    "O1": "DSB doesn't wait for marks",
    "O2": "DSB waits for nothing",
    "O3": "DSB ST and LD wait for nothing",
    "O4": "ISB holds nothing",
    "O5": "DMB LD holds nothing",
    "O6": "DMB ST holds nothing",
    "O7": "DMB holds nothing",
    "O8": "a mark passes an earlier walk",
    "O9": "a store passes an earlier walk",
    "O10": "address dependencies hold nothing",
    "T1": "TLBI forgets nothing",
    "T2": "DSB after TLBI doesn't wait for the users of old translations",
    "T3": "DSB after TLBI doesn't wait for faults",
    "T4": "walks of a page pass a TLBI out of order",
    "T5": "translation faults come from the TLB",
    "C1": "loads of a place go backwards",
    "C2": "a store passes an earlier access to its place",
    "S1": "software's atomics are a load and a store",
}
"""Broken machines, by the rule that each lacks: the tests must notice them."""

_LACKING: Final = {
    (OpKind.DMB, "full"): {"O7"},
    (OpKind.DMB, "ld"): {"O5"},
    (OpKind.DMB, "st"): {"O6"},
    (OpKind.DSB, "full"): {"O2"},
    (OpKind.DSB, "ld"): {"O2", "O3"},
    (OpKind.DSB, "st"): {"O2", "O3"},
    (OpKind.ISB, "full"): {"O4"},
}
_START = Did()
_UNCACHEABLE = (Fault.TRANSLATION, Fault.ACCESS_FLAG)


class _Waits:
    """What the moments of one instruction wait for, as far as its program says.

    Attributes
    ----------
    between : list of (int, frozenset of str)
        For each earlier access or TLBI the barriers that lie between.
    whole : frozenset of int
        Instructions whose values every moment waits for: address dependencies, its own or those before an ISB.
    values : frozenset of int
        Instructions whose values a store and its mark wait for: address dependencies of earlier accesses.
    """

    def __init__(self, ops: Sequence[Op], at: int, broken: frozenset[str]) -> None:
        def barriers(first: int) -> frozenset[str]:
            found = set[str]()
            for op in ops[first + 1 : at]:
                if op.kind in _BARRIERS and not broken & _LACKING[op.kind, op.scope]:
                    if op.kind is OpKind.ISB:
                        found |= {"isb", *(f"{each} isb" for each in found if each.startswith("dsb"))}
                    else:
                        found.add(f"{op.kind.value} {op.scope}")
            return frozenset(found)

        self.between = [(i, barriers(i)) for i, op in enumerate(ops[:at]) if op.kind not in _BARRIERS]
        self.whole = ops[at].place_from
        self.values = frozenset[int]()
        if "O10" in broken:
            self.whole = frozenset()
            return
        for i, found in self.between:
            self.values |= ops[i].place_from
            if "isb" in found:
                self.whole |= ops[i].place_from
        self.values |= self.whole


@dataclass(eq=False, slots=True)
class WeakMachine:
    """Threads of instructions over memory.

    Parameters
    ----------
    programs : sequence of sequences of Op
        The threads.
    cells : sequence of str
        What the cells of memory are called.
    pages : dict
        The `Page` by the name of a place that is translated; other names are those of cells.
    frames : dict
        The cell that holds the data of a frame, by the frame's number.
    descriptors : frozenset of int
        The cells that hold descriptors.
    fmt : Format
        Whether these are of stage 1 or 2.
    ha, hd : tuple of bool
        Whether the hardware sets AF, and the dirty state, by thread.
    ets2 : bool
        Whether FEAT_ETS2 is there.
    speculate : bool
        Whether the hardware may set AF at any time.
    combined : bool
        Whether a TLB keeps entries of stage 1 and 2 combined.
    precise : bool
        Whether faults are handled, so that one is taken when no access before it can fault. A mark that has to wait may
        be given up then, to walk again: it leads to no other end, and out of dead ones.
    broken : frozenset of str
        Rules that the machine lacks: of `BROKEN`.
    """

    programs: Sequence[Sequence[Op]]
    cells: Sequence[str]
    pages: dict[str, Page]
    frames: dict[int, int]
    descriptors: frozenset[int]
    fmt: Format = STAGE2
    ha: tuple[bool, ...] = ()
    hd: tuple[bool, ...] = ()
    ets2: bool = False
    speculate: bool = True
    combined: bool = False
    precise: bool = False
    broken: frozenset[str] = frozenset()
    _waits: list[list[_Waits]] = field(default_factory=list)
    _names: dict[str, int] = field(default_factory=dict)
    _still: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        self._names = {name: cell for cell, name in enumerate(self.cells)}
        self._waits = [[_Waits(ops, at, self.broken) for at in range(len(ops))] for ops in self.programs]

    def start(self, mem: Sequence[int]) -> Moment:
        """Return the state in which nothing was done yet."""
        threads = tuple(tuple(_START for _ in ops) for ops in self.programs)
        return Moment(tuple(mem), tuple(frozenset[int]() for _ in mem), threads)

    # --- memory and TLB ------------------------------------------------------------------------------------

    def locked(self, state: Moment, cell: int) -> bool:
        """Return whether a mark is under way there."""
        if self.broken & {"H1", "H2"}:
            return False
        return any(
            did.need and did.walk is not None and did.walk.cell == cell
            for thread in state.threads
            for did in _live(thread)
        )

    def write(self, state: Moment, cell: int, value: int) -> Moment:
        """Write a cell; what it held stays in TLBs that have it."""
        old, tlb = state.mem[cell], state.tlb
        if old == value:
            return state
        if cell in self.descriptors and (self._cacheable(old) or "T5" in self.broken):
            kept = {old, ~old} if self.combined else {old}
            if not kept <= tlb[cell]:
                tlb = (*tlb[:cell], tlb[cell] | kept, *tlb[cell + 1 :])
        return state._replace(mem=(*state.mem[:cell], value, *state.mem[cell + 1 :]), tlb=tlb)

    def _cacheable(self, desc: int) -> bool:
        return desc & (pte.VALID | pte.AF) == pte.VALID | pte.AF

    def walks(self, state: Moment, page: Page) -> Iterator[tuple[int, int]]:
        """Yield each (descriptor, cell) that a walk may find for a page, that in memory first."""
        if page.table is not None:
            block = state.mem[page.table]
            if block & pte.TABLE != pte.TABLE:
                yield block, page.table
            else:
                yield state.mem[page.cell], page.cell
            for desc in _kept(state.tlb[page.table]):
                if desc & pte.TABLE != pte.TABLE:
                    yield desc, page.table
        else:
            yield state.mem[page.cell], page.cell
        for desc in _kept(state.tlb[page.cell]):
            yield desc, page.cell
        for other in page.run:
            if other != page.cell:
                for desc in (state.mem[other], *_kept(state.tlb[other])):
                    if desc & pte.CONTIGUOUS and self._cacheable(desc):
                        yield desc, other

    def forget(self, state: Moment, cells: frozenset[int], stage: str = "all") -> Moment:
        """Invalidate TLB entries: of stage 2 alone ("s2"), of combined ones alone ("s1"), or of both ("all").

        After "s1" a combined entry may be made again at once from an entry of stage 2 that is still there.
        """
        if "T1" in self.broken:
            return state
        tlb = list(state.tlb)
        for cell in cells:
            if stage == "all":
                tlb[cell] = frozenset()
            elif stage == "s2":
                tlb[cell] = frozenset(desc for desc in tlb[cell] if desc < 0)
            else:
                tlb[cell] = frozenset(each for desc in tlb[cell] if desc >= 0 for each in (desc, ~desc))
        return state._replace(tlb=tuple(tlb))

    def users(self, state: Moment, cells: frozenset[int], but: int | None = None) -> frozenset[User]:
        """Return who is translated by these cells and not done; a DSB after the TLBI waits for them."""
        found = set[User]()
        if "T2" in self.broken:
            return frozenset()
        for t, thread in enumerate(state.threads):
            if t == but:
                continue
            for k, did in enumerate(_live(thread)):
                if did.walk is None or did.walk.cell not in cells:
                    continue
                if not did.done and not (did.fault and "T3" in self.broken):
                    found.add((t, k, True))
                if did.fault is None and "T4" not in self.broken:
                    for i, earlier in enumerate(thread[:k]):
                        if earlier.walk is None and self._page(t, i, thread) == self._page(t, k, thread):
                            found.add((t, i, False))
        return frozenset(found)

    def _known(self, op: Op, thread: tuple[Did, ...]) -> bool:
        """Return whether an instruction's place is known yet."""
        return all(thread[i].done for i in op.place_from) or "O10" in self.broken

    def _where(self, op: Op, thread: tuple[Did, ...]) -> str:
        return "" if op.place is None else str(op.place([did.value for did in thread]))

    def _page(self, t: int, k: int, thread: tuple[Did, ...]) -> Page | None:
        op = self.programs[t][k]
        if op.kind is OpKind.TLBI or not self._known(op, thread):
            return None
        return self.pages.get(self._where(op, thread))

    def complete(self, state: Moment, users: frozenset[User]) -> bool:
        """Return whether all of them are done."""
        for t, k, access in users:
            thread = state.threads[t]
            if k >= len(_live(thread)):
                continue  # it comes after a fault, and never was
            did = thread[k]
            if not did.done if access else did.walk is None:
                return False
        return True

    # --- the moments ---------------------------------------------------------------------------------------

    def translate(self, desc: int, *, write: bool, ha: bool, hd: bool) -> tuple[int, Fault | None]:
        """Return which bits a mark has to set before an access is complete, or why it faults (D8.5)."""
        broken, need = self.broken, 0
        if not desc & pte.VALID and "H8" not in broken:
            return 0, Fault.TRANSLATION
        if not desc & pte.AF:
            if not ha:
                return 0, Fault.ACCESS_FLAG if desc & pte.VALID else Fault.TRANSLATION
            need |= pte.AF
        if not self.fmt.is_dirty(desc):
            trackable = hd and (desc & pte.DBM or "H7" in broken)
            if write and not trackable:
                return 0, Fault.PERMISSION
            if (write and "H4" not in broken) or ("H5" in broken and trackable):
                need |= _DIRTY
        return need, None if desc & pte.VALID else Fault.TRANSLATION

    def steps(self, state: Moment) -> Iterator[tuple[tuple[object, ...], Moment]]:
        """Yield each step that can be taken next, as (thread, instruction, moment, ...), and the state after it."""
        first = self._walk_first(state)
        if first is not None:
            yield first
            return
        for t, thread in enumerate(state.threads):
            for k in range(len(_live(thread))):
                yield from self._thread_steps(state, t, k, thread)
        yield from self._speculation(state)

    def _walk_first(self, state: Moment) -> tuple[tuple[object, ...], Moment] | None:
        """Return a walk that finds the same whenever it comes, and that nothing waits for: others needn't be tried.

        That is one of a descriptor that nothing changes (`quiet`), and of which no TLB has another value.
        """
        if not self._still:
            return None
        for t, thread in enumerate(state.threads):
            for k, did in enumerate(_live(thread)):
                if did.walk is None and not did.done:
                    page = self._page(t, k, thread)
                    if page is not None and page.cell in self._still:
                        found = next(self._walk(state, t, k, thread, page), None)
                        if found is not None:
                            return found
        return None

    def quiet(self, cells: frozenset[int]) -> None:
        """Say that nothing ever writes these descriptors, and that no mark is needed of them."""
        self._still = cells

    def _speculation(self, state: Moment) -> Iterator[tuple[tuple[object, ...], Moment]]:
        for cell in self.descriptors:
            desc = state.mem[cell]
            if not desc & pte.VALID or self.locked(state, cell):
                continue
            if self.speculate and any(self.ha) and not desc & pte.AF:
                yield ("hardware", cell, "af"), self.write(state, cell, desc | pte.AF)
            if "H9" in self.broken and any(self.hd) and desc & pte.DBM and not self.fmt.is_dirty(desc):
                yield ("hardware", cell, "dirty"), self.write(state, cell, self.fmt.mark(desc, _DIRTY))

    def _thread_steps(
        self, state: Moment, t: int, k: int, thread: tuple[Did, ...]
    ) -> Iterator[tuple[tuple[object, ...], Moment]]:
        op, did = self.programs[t][k], thread[k]
        if op.kind in _BARRIERS:
            return
        if did.need:
            yield from self._mark(state, t, k, thread)
            if self.precise and not did.done and not self._certain(t, k, thread):
                yield (t, k, "retry"), _with(state, t, k, _START)
        if did.done:
            return
        if op.kind is OpKind.TLBI:
            yield from self._tlbi(state, t, k, thread)
            return
        if not self._known(op, thread):
            return
        page = self._page(t, k, thread)
        if page is not None and did.walk is None:
            yield from self._walk(state, t, k, thread, page)
        else:
            yield from self._access(state, t, k, thread)

    def _walk(
        self, state: Moment, t: int, k: int, thread: tuple[Did, ...], page: Page
    ) -> Iterator[tuple[tuple[object, ...], Moment]]:
        if not self._whole(state, t, k, thread):
            return
        op, before = self.programs[t][k], self._waits[t][k].between
        if self.ets2 and not all(self._behind(thread[i], self.programs[t][i], found) for i, found in before):
            return
        settled = all(thread[i].done for i, _ in before if self.programs[t][i].kind is not OpKind.TLBI)
        seen = set[tuple[int, int]]()
        for at, (desc, cell) in enumerate(self.walks(state, page)):
            if (desc, cell) in seen:
                continue
            seen.add((desc, cell))
            need, fault = self.translate(desc, write=op.kind in _WRITES, ha=self.ha[t], hd=self.hd[t])
            stale = at > 0
            if need and stale and desc != state.mem[cell]:
                if "H3" not in self.broken:
                    continue  # it is checked against memory, and walked again
                need = 0
            if need and self.locked(state, cell):
                continue
            if fault in _UNCACHEABLE and ((stale and "T5" not in self.broken) or (self.ets2 and not settled)):
                continue
            frame = (desc & pte.ADDRESS) >> 12
            if cell != page.cell:
                frame += page.number - (page.run.index(cell) if cell in page.run else 0)
            if fault is None and self._overtaken(t, k, thread, self.frames.get(frame)):
                continue
            done = thread[k]._replace(walk=Translation(desc, cell, frame), need=need, fault=fault)
            yield (t, k, "walk", desc, cell), _with(state, t, k, done)

    def _overtaken(self, t: int, k: int, thread: tuple[Did, ...], cell: int | None) -> bool:
        """Return whether a later load read the place of this store already: it would have to be done again.

        That is another path, which is tried too.
        """
        return self.programs[t][k].kind is not OpKind.LOAD and any(
            self._cell(t, j, thread) == cell for j in self._loaded(t, k, thread)
        )

    def _backwards(self, t: int, k: int, thread: tuple[Did, ...], cell: int, value: Value) -> bool:
        """Return whether a later load of the place has another value than this one would: an older one."""
        return "C1" not in self.broken and any(
            self._cell(t, j, thread) == cell and thread[j].value != value for j in self._loaded(t, k, thread)
        )

    def _loaded(self, t: int, k: int, thread: tuple[Did, ...]) -> Iterator[int]:
        for j in range(k + 1, len(thread)):
            if self.programs[t][j].kind is OpKind.LOAD and thread[j].done and not thread[j].fault:
                yield j

    def _mark(
        self, state: Moment, t: int, k: int, thread: tuple[Did, ...]
    ) -> Iterator[tuple[tuple[object, ...], Moment]]:
        did, broken = thread[k], self.broken
        if did.walk is None or ("O8" not in broken and not self._certain(t, k, thread)):
            return
        if not all(thread[i].done for i in self._waits[t][k].values):
            return
        bits: tuple[int, ...] = (did.need,)
        if did.need == pte.AF | _DIRTY:
            bits = (did.need, _DIRTY if "H6" in broken else pte.AF)
        old = state.mem[did.walk.cell]
        for each in bits:
            desc = self.fmt.mark(did.walk.desc if "H2" in broken else old, each)
            after = self.write(state, did.walk.cell, desc)
            yield (t, k, "mark", desc, did.walk.cell), _with(after, t, k, did._replace(need=did.need & ~each))

    def _access(
        self, state: Moment, t: int, k: int, thread: tuple[Did, ...]
    ) -> Iterator[tuple[tuple[object, ...], Moment]]:
        op, did, ops = self.programs[t][k], thread[k], self.programs[t]
        if not self._whole(state, t, k, thread):
            return
        if did.fault is None and not all(thread[i].done for i in op.value_from):
            return
        writes = op.kind in _WRITES and did.fault is None
        for i, found in self._waits[t][k].between:
            if not self._allows(state, t, i, thread, found, op, faults=did.fault is not None):
                return
        if did.fault is not None:
            if self.precise and not self._certain(t, k, thread):
                return
            yield (t, k, "fault", did.fault), _with(state, t, k, did._replace(done=True))
            return
        if writes and not all(thread[i].done for i in self._waits[t][k].values):
            return
        cell = self._cell(t, k, thread)
        forwarded: Value | None = None
        for i, earlier in enumerate(thread[:k]):
            if ops[i].kind in (*_BARRIERS, OpKind.TLBI) or not self._known(ops[i], thread):
                continue
            if self._translated(t, i, thread) and earlier.walk is None:
                if writes and "O9" not in self.broken:
                    return  # it may fault yet
                continue
            if earlier.fault is not None:
                if writes:
                    return
                continue
            if self._cell(t, i, thread) != cell:
                continue
            if ops[i].kind is OpKind.STORE and op.kind is OpKind.LOAD and not op.acquire:
                if earlier.done:
                    forwarded = None
                elif all(thread[j].done for j in ops[i].value_from):
                    forwarded = ops[i].value([each.value for each in thread])
                else:
                    return
            elif ops[i].kind is OpKind.LOAD and op.kind is OpKind.LOAD:
                continue
            elif not earlier.done and "C2" not in self.broken:
                return
        if writes and cell in self.descriptors and self.locked(state, cell):
            return
        values = [each.value for each in thread]
        if op.kind is OpKind.LOAD:
            value: Value = state.mem[cell] if forwarded is None else forwarded
            if self._backwards(t, k, thread, cell, value):
                return
            yield (t, k, "load", value, cell), _with(state, t, k, did._replace(done=True, value=value))
            return
        operand = op.value(values)
        if op.kind is OpKind.STORE:
            after = self.write(state, cell, int(operand))
            yield (t, k, "store", operand, cell), _with(after, t, k, did._replace(done=True))
            return
        old = state.mem[cell]
        if "S1" in self.broken:
            if not did.read:
                yield (t, k, "read", old, cell), _with(state, t, k, did._replace(read=True, value=old))
                return
            old = int(did.value)
        after = self.write(state, cell, op.apply(old, int(operand)))
        yield (t, k, "atomic", old, cell), _with(after, t, k, did._replace(done=True, value=old))

    def _tlbi(
        self, state: Moment, t: int, k: int, thread: tuple[Did, ...]
    ) -> Iterator[tuple[tuple[object, ...], Moment]]:
        op = self.programs[t][k]
        if not self._known(op, thread) or not self._whole(state, t, k, thread):
            return
        for i, found in self._waits[t][k].between:
            if not self._allows(state, t, i, thread, found, op, faults=False):
                return
        if not self._certain(t, k, thread):
            return
        cells = self.descriptors
        if op.place is not None:
            page = self.pages[self._where(op, thread)]
            cells = frozenset({page.cell, *page.run, *(() if page.table is None else (page.table,))})
        noted = (*state.noted, ((t, k), self.users(state, cells, t)))
        yield (t, k, "tlbi"), _with(self.forget(state, cells)._replace(noted=noted), t, k, Did(done=True))

    # --- what waits for what -------------------------------------------------------------------------------

    def _whole(self, state: Moment, t: int, k: int, thread: tuple[Did, ...]) -> bool:
        """Return whether what every moment of an instruction waits for is done: what an ISB holds."""
        waits = self._waits[t][k]
        if not all(thread[i].done for i in waits.whole):
            return False
        for i, found in waits.between:
            if "isb" not in found:
                continue
            if thread[i].walk is None and self._translated(t, i, thread):
                return False
            for scope in ("full", "ld", "st"):
                if f"dsb {scope} isb" in found and not self._passed(state, t, i, thread, scope):
                    return False
        return True

    def _allows(
        self, state: Moment, t: int, i: int, thread: tuple[Did, ...], found: frozenset[str], op: Op, *, faults: bool
    ) -> bool:
        """Return whether an earlier instruction lets this one have its access (or its fault)."""
        earlier, did = self.programs[t][i], thread[i]
        for scope in ("full", "ld", "st"):
            if f"dsb {scope}" in found and not self._passed(state, t, i, thread, scope):
                return False
        if op.kind is OpKind.TLBI or earlier.kind is OpKind.TLBI or did.done:
            return True
        reads = earlier.kind in _READS and earlier.returns
        if "dmb full" in found or (earlier.acquire and earlier.kind in _READS):
            return False
        if "dmb ld" in found and reads:
            return False
        if "dmb st" in found and earlier.kind in _WRITES and (faults or op.kind in _WRITES):
            return False
        if op.release and not faults:
            return False
        return not (op.acquire and earlier.release and earlier.kind in _WRITES)

    def _behind(self, did: Did, op: Op, found: frozenset[str]) -> bool:
        """Return whether a DSB lets a walk pass, with FEAT_ETS2."""
        if "dsb full" in found:
            return did.done and not did.need
        if "dsb ld" in found and op.kind in _READS and op.returns:
            return did.done
        return not ("dsb st" in found and op.kind in _WRITES) or did.done

    def _passed(self, state: Moment, t: int, i: int, thread: tuple[Did, ...], scope: str) -> bool:
        """Return whether a DSB has nothing to wait for of an earlier instruction."""
        op, did = self.programs[t][i], thread[i]
        if scope == "full":
            if op.kind is OpKind.TLBI:
                return did.done and self.complete(state, dict(state.noted)[t, i])
            return did.done and (not did.need or "O1" in self.broken)
        if op.kind not in (_WRITES if scope == "st" else _READS):
            return True
        return did.done or (scope == "ld" and not op.returns)

    def _certain(self, t: int, k: int, thread: tuple[Did, ...]) -> bool:
        """Return whether no earlier access can fault any more."""
        return not any(
            thread[i].fault or (thread[i].walk is None and self._translated(t, i, thread))
            for i, op in enumerate(self.programs[t][:k])
            if op.kind not in (*_BARRIERS, OpKind.TLBI)
        )

    def _translated(self, t: int, k: int, thread: tuple[Did, ...]) -> bool:
        """Return whether an instruction is translated, or may be: its place isn't known yet."""
        op = self.programs[t][k]
        if op.place is None or op.kind is OpKind.TLBI:
            return False
        return not self._known(op, thread) or self._page(t, k, thread) is not None

    def _cell(self, t: int, k: int, thread: tuple[Did, ...]) -> int:
        did, op = thread[k], self.programs[t][k]
        if did.walk is not None:
            return self.frames[did.walk.frame]
        return self._names[self._where(op, thread)]

    # --- ends ----------------------------------------------------------------------------------------------

    def ended(self, state: Moment) -> bool:
        """Return whether every thread is done, or has ended with a fault."""
        for ops, thread in zip(self.programs, state.threads, strict=True):
            for op, did in zip(ops, _live(thread), strict=False):
                if op.kind not in _BARRIERS and (not did.done or did.need):
                    return False
        return True

    def faulted(self, thread: tuple[Did, ...]) -> int | None:
        """Return the instruction that ended a thread by its fault."""
        return next((k for k, did in enumerate(thread) if did.done and did.fault), None)


def _live(thread: tuple[Did, ...]) -> tuple[Did, ...]:
    """Return the instructions up to the first fault that was taken: no other is ever executed."""
    for k, did in enumerate(thread):
        if did.fault is not None and did.done:
            return thread[: k + 1]
    return thread


def _kept(descs: frozenset[int]) -> Iterator[int]:
    return (desc if desc >= 0 else ~desc for desc in sorted(descs))


def _with(state: Moment, t: int, k: int, did: Did) -> Moment:
    thread = state.threads[t]
    thread = (*thread[:k], did, *thread[k + 1 :])
    return state._replace(threads=(*state.threads[:t], thread, *state.threads[t + 1 :]))
