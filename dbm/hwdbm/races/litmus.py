"""herd's litmus tests about page tables, read and run on the machine of `hwdbm.races`.

What is read is the subset of herd's AArch64 format that straight-line tests with fatal faults need: loads, stores,
atomics, barriers, broadcast TLBI, register arithmetic; page-table entries as initial values and in conditions. Anything
else raises `UnreadError`, with what it was, and is counted and named by whoever compares.
"""

import operator
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

from hwdbm import pte
from hwdbm.errors import UnreadError, shown
from hwdbm.races.machine import STAGE1, Fault, Moment, Op, OpKind, Page, Value, WeakMachine
from hwdbm.races.search import explore

_AP2: Final = 1 << 7
_READ_ONLY: Final = _AP2
_BITS: Final = {"valid": pte.VALID, "af": pte.AF, "db": _AP2, "dbm": pte.DBM}
_DEFAULT: Final = pte.VALID | pte.TYPE | pte.AF
_FAULTS: Final = {"translation": Fault.TRANSLATION, "accessflag": Fault.ACCESS_FLAG, "permission": Fault.PERMISSION}
_ALU: Final[dict[str, Callable[[int, int], int]]] = {
    "ADD": operator.add,
    "SUB": operator.sub,
    "EOR": operator.xor,
    "AND": operator.and_,
    "ORR": operator.or_,
    "BIC": lambda a, b: a & ~b,
    "LSL": operator.lshift,
    "LSR": operator.rshift,
}
_ATOMICS: Final[dict[str, Callable[[int, int], int]]] = {
    "SWP": lambda _, new: new,
    "LDADD": operator.add,
    "LDSET": operator.or_,
    "LDCLR": lambda old, mask: old & ~mask,
    "LDEOR": operator.xor,
}


class Operand(NamedTuple):
    """A register's value: how it is computed, and from which instructions' values."""

    compute: Callable[[Sequence[Value]], Value]
    sources: frozenset[int] = frozenset()


def _constant(value: Value) -> Operand:
    return Operand(lambda _: value)


class _Thread:
    """One thread as it is read, an instruction at a time."""

    def __init__(self, registers: dict[str, Value], frames: "_Frames") -> None:
        self.ops: list[Op] = []
        self.frames = frames
        self.registers = {name: _constant(value) for name, value in registers.items()}
        self.before: list[dict[str, Operand]] = []
        self.labels: dict[str, int] = {}
        self.flags: tuple[Operand, Operand] | None = None

    def read(self, text: str) -> None:
        """Read one cell of the table: labels and an instruction."""
        while found := re.match(r"\s*([A-Za-z_]\w*)\s*:", text):
            self.labels[found[1]] = len(self.ops)
            text = text[found.end() :]
        text = text.strip()
        if not text:
            return
        name, _, rest = text.partition(" ")
        name, arguments = name.upper(), [each.strip() for each in re.split(r",(?![^\[]*\])", rest) if each.strip()]
        if not self._alu(name, arguments, text) and not self._memory(name, arguments):
            self._barrier(name, arguments, text)

    def _alu(self, name: str, arguments: list[str], text: str) -> bool:
        if name == "NOP":
            return True
        if name == "MOV":
            self._set(arguments[0], self._operand(arguments[1]))
        elif name == "CMP":
            self.flags = self._operand(arguments[0]), self._operand(arguments[1])
        elif name == "CSET" and self.flags is not None and arguments[1].upper() in ("EQ", "NE"):
            equal = arguments[1].upper() == "EQ"
            self._set(arguments[0], _combine(lambda a, b: int((a == b) == equal), *self.flags))
        elif name in _ALU and len(arguments) >= 3:
            if len(arguments) > 3 and not re.fullmatch(r"[SU]XT[WX]", arguments[3].upper()):
                raise UnreadError(f"the instruction {text!r}")
            self._set(arguments[0], _combine(_on_places(name), *map(self._operand, arguments[1:3])))
        else:
            return False
        return True

    def _memory(self, name: str, arguments: list[str]) -> bool:
        if re.fullmatch(r"LDR|LDAR|STR|STLR", name):
            place = self._place(arguments[1])
            if name.startswith("LD"):
                self._add(OpKind.LOAD, place, result=arguments[0], acquire=name == "LDAR")
            else:
                self._add(OpKind.STORE, place, self._operand(arguments[0]), release=name == "STLR")
            return True
        found = re.fullmatch(r"(SWP|LDADD|LDSET|LDCLR|LDEOR|STADD|STSET|STCLR|STEOR)(A?)(L?)", name)
        if found is None:
            return False
        returns = not name.startswith("ST")
        apply = _ATOMICS["LD" + found[1][2:] if not returns else found[1]]
        result = arguments[1] if returns else "XZR"
        returns = returns and result.upper() not in ("XZR", "WZR")
        operand, place = self._operand(arguments[0]), self._place(arguments[-1])
        self._add(
            OpKind.RMW, place, operand, result=result, apply=apply,
            acquire=bool(found[2]), release=bool(found[3]), returns=returns,
        )  # fmt: skip
        return True

    def _barrier(self, name: str, arguments: list[str], text: str) -> None:
        if name in ("DMB", "DSB", "ISB"):
            option = arguments[0].upper() if arguments else "SY"
            scope = "ld" if option.endswith("LD") else "st" if option.endswith("ST") else "full"
            self._append(Op(kind=OpKind[name], scope=scope, label=text))
        elif name == "TLBI" and arguments[0].upper() in ("VMALLE1IS", "VMALLE1OS"):
            self._append(Op(kind=OpKind.TLBI, label=text))
        elif name == "TLBI" and re.fullmatch(r"VA?A?L?E1(IS|OS)", arguments[0].upper()):
            self._add(OpKind.TLBI, self._operand(arguments[1]))
        else:
            raise UnreadError(f"the instruction {text!r}")

    def _add(
        self,
        kind: OpKind,
        place: Operand,
        value: Operand = Operand(lambda _: 0),  # noqa: B008
        *,
        result: str = "",
        apply: Callable[[int, int], int] = lambda _, new: new,
        acquire: bool = False,
        release: bool = False,
        returns: bool = True,
    ) -> None:
        at = len(self.ops)
        op = Op(
            kind=kind, place=place.compute, place_from=place.sources,
            value=value.compute, value_from=value.sources,
            apply=apply, acquire=acquire, release=release, returns=returns,
        )  # fmt: skip
        self._append(op)
        if result:
            self._set(result, Operand(lambda values: values[at], frozenset({at})))

    def _append(self, op: Op) -> None:
        self.before.append(dict(self.registers))
        self.ops.append(op)

    def _set(self, name: str, operand: Operand) -> None:
        if name.upper() not in ("XZR", "WZR"):
            self.registers[_register(name)] = operand

    def _operand(self, text: str) -> Operand:
        text = text.strip()
        if found := re.fullmatch(r"#?(-?(?:0x[0-9a-fA-F]+|\d+))", text):
            return _constant(int(found[1], 0))
        if text.upper() in ("XZR", "WZR"):
            return _constant(0)
        return self.registers.get(_register(text), _constant(0))

    def _place(self, text: str) -> Operand:
        found = re.fullmatch(r"\[\s*(\w+)\s*(?:,\s*([#\w]+)\s*(?:,\s*[SU]XTW)?)?\s*\]", text)
        if found is None:
            raise UnreadError(f"the address {text!r}")
        base = self._operand(found[1])
        return base if found[2] is None else _combine(_on_places("ADD"), base, self._operand(found[2]))


def _register(name: str) -> str:
    if not re.fullmatch(r"[XWxw]\d+", name):
        raise UnreadError(f"the operand {name!r}")
    return "X" + name[1:]


def _combine(apply: Callable[..., Value], one: Operand, two: Operand) -> Operand:
    return Operand(lambda values: apply(one.compute(values), two.compute(values)), one.sources | two.sources)


def _on_places(name: str) -> Callable[[Value, Value], Value]:
    """Return an operation of the ALU that also takes the name of a place, shifted, or with nothing added."""
    apply = _ALU[name]

    def act(one: Value, two: Value) -> Value:
        if isinstance(one, int) and isinstance(two, int):
            return apply(one, two)
        if one == two and name == "EOR":
            return 0
        place, other = (one, two) if isinstance(one, str) else (two, one)
        if name in ("LSR", "LSL") or other == 0:
            return place  # a TLBI's operand is the page's number: it names the same page
        raise UnreadError(f"arithmetic on the address of {place}")

    return act


class _Frames:
    """The physical pages, by name: each has a number, and a cell for its data."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def number(self, name: str) -> int:
        """Return the number of a variable's own page, or of one that only has a physical name."""
        return self.numbers.setdefault(name, len(self.numbers) + 1)


@dataclass(eq=False, slots=True)
class Litmus:
    """One test, read.

    Attributes
    ----------
    name : str
        What it is called.
    machine : WeakMachine
        Its threads.
    mem : list of int
        The memory that they begin with.
    condition : callable
        Given a final `Moment`, whether it satisfies the condition.
    quantifier : str
        "exists", "~exists" or "forall".
    """

    name: str
    machine: WeakMachine
    mem: list[int]
    condition: Callable[[Moment], bool]
    quantifier: str
    threads: list[_Thread] = field(default_factory=list)

    @classmethod
    def read(cls, text: str, broken: frozenset[str] = frozenset(), *, ets2: bool | None = None) -> "Litmus":
        """Read a test.

        Parameters
        ----------
        text : str
            The file.
        broken : frozenset of str
            Rules that the machine is to lack.
        ets2 : bool, optional
            Whether FEAT_ETS2 is there, by default what the test says.

        Raises
        ------
        UnreadError
            If the test has anything that isn't read here.
        """
        return _Reader(text).build(broken, ets2=ets2)

    def outcomes(self) -> tuple[int, int, int]:
        """Return how many final states satisfy the condition, how many don't, and how many states there are."""
        yes = no = states = 0
        try:
            for state in explore(self.machine.start(self.mem), self.machine.steps):
                states += 1
                if self.machine.ended(state):
                    if self.condition(state):
                        yes += 1
                    else:
                        no += 1
        except KeyError as error:
            raise UnreadError(f"an access to {error.args[0]!r}, which is no place of this test") from error
        return yes, no, states

    def verdict(self, kind: str) -> tuple[bool, int]:
        """Return whether the outcomes are as a verdict of herd's says, and how many states there are."""
        yes, no, states = self.outcomes()
        if kind == "Allowed":
            return yes > 0, states
        if kind == "Forbidden":
            return yes == 0, states
        return yes > 0 and no == 0, states

    def register(self, state: Moment, thread: int, name: str) -> Value:
        """Return what a register holds at the end."""
        dids, read = state.threads[thread], self.threads[thread]
        end = self.machine.faulted(dids)
        registers = read.registers if end is None else read.before[end]
        return registers.get(_register(name), _constant(0)).compute([did.value for did in dids])


class _Reader:
    """Reads a test's text: its header, the initial state, the table of instructions, the condition."""

    def __init__(self, text: str) -> None:
        text = re.sub(r"\(\*.*?\*\)", "", text, flags=re.DOTALL)
        head, brace, rest = text.partition("{")
        init, close, body = rest.partition("}")
        if not brace or not close or not head.split()[:1] == ["AArch64"]:
            raise UnreadError("a file that is no AArch64 test")
        self.name = _name(text)
        variants = dict(re.findall(r"^\s*(\w+)\s*=\s*(.*?)\s*$", head, re.MULTILINE))
        self.hardware = variants.get("TTHM", "").replace(",", " ").split()
        variant = str(variants.get("Variant", variants.get("variant", "")))
        self.variant = [each.strip() for each in variant.split(",")]
        for each in self.variant:
            if each not in ("", "vmsa", "fatal", "precise", "ets2", "ETS2"):
                raise UnreadError(f"the variant {each!r}")
        found = re.search(r"(^|\n|;)\s*(locations|filter|exists|~\s*exists|forall)\b", body)
        if found is None:
            raise UnreadError("a test without a condition")
        self.table = body[: found.start(2)]
        self.final = re.sub(r"\blocations\s*\[[^\]]*\]", "", body[found.start(2) :]).strip()
        self.frames = _Frames()
        self.registers: dict[int, dict[str, Value]] = {}
        self.values: dict[str, int] = {}
        self.entries: dict[str, str] = {}
        self.variables: dict[str, None] = {}
        self._init(init)

    def _init(self, text: str) -> None:
        late: list[tuple[int, str, str]] = []
        for each in re.split(r";", text):
            item = re.sub(r"^(u?int\d*_t|int|pteval_t|\w+_t)\b\s*\*?\s*", "", each.strip())
            if not item or item == "xs":
                continue
            left, equals, right = (part.strip() for part in item.partition("="))
            left = _entry_name(left)
            if found := re.fullmatch(r"(\d+)\s*:\s*(\w+)", left):
                if equals:
                    late.append((int(found[1]), found[2], right))
            elif left.strip("[]").startswith("pte_"):
                self.entries[self._variable(left.strip("[]")[4:])] = right
            elif re.fullmatch(r"\[?\w+\]?", left):
                self._variable(left.strip("[]"))
                if equals:
                    self.values[left.strip("[]")] = _number(right)
            else:
                raise UnreadError(f"the initial value {item!r}")
        for thread, name, right in late:
            self.registers.setdefault(thread, {})[_register(name)] = self._value(right)

    def _variable(self, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise UnreadError(f"the place {name!r}")
        self.variables.setdefault(name)
        self.frames.number(name)
        return name

    def _value(self, text: str) -> Value:
        text = _entry_name(text.strip())
        if text.startswith("("):
            return self.descriptor(text, _DEFAULT)
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)", text):
            return int(text, 0)
        if text.startswith("pte_"):
            return "pte_" + self._variable(text[4:])
        return self._variable(text)

    def descriptor(self, text: str, base: int) -> int:
        """Return a page-table entry, with the fields that aren't named as in `base`."""
        for each in text.strip().strip("()").split(","):
            name, _, value = (part.strip() for part in each.partition(":"))
            if name == "oa":
                frame = _entry_name(value)
                if not frame.startswith("phy_"):
                    raise UnreadError(f"the field {each.strip()!r}")
                base = base & ~pte.ADDRESS | self.frames.number(frame[4:]) << 12
            elif name in _BITS and value in ("0", "1"):
                on = int(value) ^ (name == "db")  # AP[2] is set where the page is clean
                base = base | _BITS[name] if on else base & ~_BITS[name]
            else:
                raise UnreadError(f"the field {each.strip()!r}")
        return base

    def build(self, broken: frozenset[str], *, ets2: bool | None) -> Litmus:
        """Put the test together."""
        rows = [[cell.strip() for cell in row.split("|")] for row in self.table.split(";") if row.strip()]
        heads, rows = rows[0], rows[1:]
        if any(re.fullmatch(r"P\d+", head) is None for head in heads):
            raise UnreadError(f"the thread {' | '.join(heads)!r}")
        threads = [_Thread(self.registers.get(t, {}), self.frames) for t in range(len(heads))]
        for row in rows:
            for thread, cell in zip(threads, row, strict=False):
                thread.read(cell)
        condition = _Condition(self)
        quantifier, holds = condition.read(self.final)
        return self._machine(threads, broken, quantifier, holds, ets2=ets2)

    def _machine(
        self, threads: list[_Thread], broken: frozenset[str], quantifier: str,
        holds: Callable[[Litmus, Moment], bool], *, ets2: bool | None,
    ) -> Litmus:  # fmt: skip
        entries = {
            name: self.descriptor(self.entries.get(name, ""), _DEFAULT | self.frames.number(name) << 12)
            if name in self.entries
            else _DEFAULT | self.frames.number(name) << 12
            for name in self.variables
        }
        frames = list(self.frames.numbers)
        cells = [f"pte_{name}" for name in entries] + [f"phy_{name}" for name in frames]
        mem = [*entries.values(), *(self.values.get(name, 0) for name in frames)]
        pages = {name: Page(cell) for cell, name in enumerate(entries)}
        descriptors = frozenset(range(len(entries)))
        on = [_hardware(self.hardware, t) for t in range(len(threads))]
        machine = WeakMachine(
            programs=[thread.ops for thread in threads],
            cells=cells,
            pages=pages,
            frames={number: len(entries) + at for at, number in enumerate(self.frames.numbers.values())},
            descriptors=descriptors,
            fmt=STAGE1,
            ha=tuple(bool(each & {"HA", "HD"}) for each in on),
            hd=tuple("HD" in each for each in on),
            ets2=("ets2" in self.variant or "ETS2" in self.variant) if ets2 is None else ets2,
            broken=broken,
        )
        stores = [op for thread in threads for op in thread.ops if op.kind in (OpKind.STORE, OpKind.RMW) and op.place]
        places = {None if op.place_from else str(op.place(())) for op in stores if op.place}
        flushed = {op.place and str(op.place(())) for thread in threads for op in thread.ops if op.kind is OpKind.TLBI}
        machine.quiet(
            frozenset(
                cell
                for cell, name in enumerate(entries)
                if not flushed & {None, name}
                and not places & {None, cells[cell]}
                and mem[cell] & (pte.VALID | pte.AF | _AP2) == pte.VALID | pte.AF
            )
        )
        test = Litmus(self.name, machine, mem, lambda state: holds(test, state), quantifier, threads)
        return test


def _hardware(words: list[str], thread: int) -> set[str]:
    found = set[str]()
    for word in words:
        where, _, what = word.rpartition(":")
        if not where or where == f"P{thread}":
            found.add(what)
    return found


def _entry_name(text: str) -> str:
    """Return ``PTE(x)`` and ``PA(x)`` as ``pte_x`` and ``phy_x``."""
    text = re.sub(r"\b(?:PTE|TTD)\s*\(\s*(\w+)\s*\)", r"pte_\1", text)
    return re.sub(r"\bPA\s*\(\s*(\w+)\s*\)", r"phy_\1", text)


def _number(text: str) -> int:
    try:
        return int(text, 0)
    except ValueError:
        raise UnreadError(f"the initial value {text!r}") from None


Holds = Callable[[Litmus, Moment], bool]


class _Condition:
    """Reads a condition: atoms, and, or, not, parentheses."""

    def __init__(self, reader: _Reader) -> None:
        self.reader = reader
        self.tokens: list[str] = []

    def read(self, text: str) -> tuple[str, Holds]:
        text = re.sub(r"\bP(\d+)\s*:\s*([XW]\d)", r"\1:\2", text)
        found = re.match(r"exists|~\s*exists|forall", text)
        if found is None:
            raise UnreadError(f"the condition {shown(text)}")
        rest = _entry_name(text[found.end() :])
        pattern = (
            r"/\\|\\/|~|not\b|[fF]ault\s*\([^)]*\)|\(\s*(?:oa|valid|af|db|dbm|el0)\s*:[^()]*\)|\(|\)"
            r"|(?:\d+\s*:\s*)?\[?\w+\]?\s*=|[-\w]+"
        )
        self.tokens = re.findall(pattern, rest)
        if re.sub(r"\s", "", rest) != re.sub(r"\s", "", "".join(self.tokens)):
            raise UnreadError(f"the condition {' '.join(rest.split())!r}")
        holds = self._either()
        if self.tokens:
            raise UnreadError(f"the condition's {self.tokens[0]!r}")
        return re.sub(r"\s", "", found[0]), holds

    def _next(self) -> str:
        if not self.tokens:
            raise UnreadError("a condition that ends early")
        return self.tokens.pop(0)

    def _either(self) -> Holds:
        parts = [self._all()]
        while self.tokens[:1] == ["\\/"]:
            self._next()
            parts.append(self._all())
        return lambda test, state: any(part(test, state) for part in parts)

    def _all(self) -> Holds:
        parts = [self._atom()]
        while self.tokens[:1] == ["/\\"]:
            self._next()
            parts.append(self._atom())
        return lambda test, state: all(part(test, state) for part in parts)

    def _atom(self) -> Holds:
        token = self._next()
        if token in ("~", "not"):
            inner = self._atom()
            return lambda test, state: not inner(test, state)
        if token == "(":  # noqa: S105
            inner = self._either()
            if self._next() != ")":
                raise UnreadError("a condition without its parenthesis")
            return inner
        if token.lower().startswith("fault"):
            return self._fault(token)
        if not token.endswith("="):
            raise UnreadError(f"the condition's {token!r}")
        left, right = token[:-1].strip(), self._next()
        if found := re.fullmatch(r"(\d+)\s*:\s*(\w+)", left):
            value, thread, name = self.reader._value(right), int(found[1]), _register(found[2])
            return lambda test, state: test.register(state, thread, name) == value
        left = left.strip("[]")
        if left.startswith("pte_"):
            name = self.reader._variable(left[4:])
            own = _DEFAULT | self.reader.frames.number(name) << 12
            cell, wanted = left, self.reader.descriptor(right, own) if right[0] == "(" else self.reader._value(right)
        else:
            cell, wanted = "phy_" + self.reader._variable(left), self.reader._value(right)
        return lambda test, state: state.mem[test.machine.cells.index(cell)] == wanted

    def _fault(self, token: str) -> Holds:
        inside = token[token.index("(") + 1 : -1].split(",")
        found = re.fullmatch(r"\s*P(\d+)(?::(\w+))?\s*", inside[0])
        if found is None:
            raise UnreadError(f"the condition's {token!r}")
        thread, label = int(found[1]), found[2]
        place, why = None, None
        for each in (part.strip() for part in inside[1:]):
            if each.lower().startswith("mmu:"):
                why = _FAULTS.get(each[4:].lower())
                if why is None:
                    raise UnreadError(f"the fault {each!r}")
            elif place is None and re.fullmatch(r"\w+", each):
                place = each
            else:
                raise UnreadError(f"the condition's {token!r}")

        def holds(test: Litmus, state: Moment) -> bool:
            dids = state.threads[thread]
            at = test.machine.faulted(dids)
            if at is None or (label is not None and test.threads[thread].labels.get(label) != at):
                return False
            op = test.machine.programs[thread][at]
            where = op.place([did.value for did in dids]) if op.place is not None else None
            return (place is None or where == place) and why in (None, dids[at].fault)

        return holds


# --- verdicts -------------------------------------------------------------------------------------------------

_VERDICTS = {"Allow": "Allowed", "Forbid": "Forbidden", "Require": "Required"}
_VERDICTS |= {verdict: verdict for verdict in _VERDICTS.values()}


def read_kinds(text: str) -> dict[str, str]:
    """Return verdicts by the name of their test, from one of herd's ``kinds.txt`` or a table with one in each line.

    A file of herd's has them short: Allow, Forbid, Require.
    """
    kinds: dict[str, str] = {}
    for line in text.splitlines():
        words = [word.strip() for word in (line.split("\t") if "\t" in line else line.split())]
        verdict = next((_VERDICTS[word] for word in words[1:] if word in _VERDICTS), None)
        if verdict is not None:
            kinds[words[0]] = verdict
    return kinds


@dataclass(slots=True)
class Agreement:
    """How a folder of tests compares with its verdicts.

    Attributes
    ----------
    agree : list of str
        The tests whose outcomes are as their verdict says.
    differ : list of str
        Those whose aren't.
    unread : dict
        Why a test wasn't read, by its name.
    unjudged : list of str
        Tests without a verdict.
    states : int
        All states that were explored.
    """

    agree: list[str] = field(default_factory=list)
    differ: list[str] = field(default_factory=list)
    unread: dict[str, str] = field(default_factory=dict)
    unjudged: list[str] = field(default_factory=list)
    states: int = 0


def compare(
    texts: Sequence[str], kinds: dict[str, str], broken: frozenset[str] = frozenset(), *, ets2: bool | None = None
) -> Agreement:
    """Run tests, and compare each with its verdict."""
    found = Agreement()
    for text in texts:
        name = _name(text)
        kind = kinds.get(name)
        if kind is None:
            found.unjudged.append(name)
            continue
        try:
            test = Litmus.read(text, broken, ets2=ets2)
            agrees, states = test.verdict(kind)
        except UnreadError as error:
            found.unread[name] = str(error)
            continue
        found.states += states
        (found.agree if agrees else found.differ).append(name)
    return found


def _name(text: str) -> str:
    words = text.split(maxsplit=2)
    return words[1] if len(words) > 1 else "?"


def read_folder(folder: Path) -> Iterator[str]:
    """Yield the tests of a folder, and of those in it.

    Raises
    ------
    FileNotFoundError
        If there is none.
    """
    paths = sorted(folder.rglob("*.litmus"))
    if not folder.is_dir() or not paths:
        raise FileNotFoundError(2, "there is no folder with .litmus files", str(folder))
    for path in paths:
        yield path.read_text(encoding="utf-8", errors="replace")
