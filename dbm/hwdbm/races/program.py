"""Programs for the machine, written as text: what a vCPU does, and software whose order is that of its barriers.

An instruction is one of these, and they are separated by semicolons:

=================================  =======================================================
``load PLACE -> REGISTER``         a load
``store PLACE VALUE``              a store
``swap PLACE VALUE -> REGISTER``   an atomic exchange; ``set`` and ``clear`` set and clear bits
``dmb``, ``dsb``, ``isb``          barriers; ``dmb ld``, ``dmb st``, ``dsb ld``, ``dsb st``
``tlbi PLACE``, ``tlbi``           a broadcast TLBI of a page, or of all
=================================  =======================================================

The place ``x`` is a page, by its address in the guest; ``frame:x`` is the memory behind it, as the host has it, and
``pte:x`` its descriptor. ``x@a`` is x, at an address computed from register a. A value is a number, a register, or a
descriptor: ``clean``, ``dirty``, ``readonly``, ``untracked``, ``absent`` (``clean:y`` for the frame of y), or a bit of
one: ``W``, ``V``, ``AF``, ``DBM``.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from hwdbm import pte
from hwdbm.races.machine import STAGE2, Moment, Op, OpKind, Page, Value, WeakMachine

_LEAF: Final = pte.VALID | pte.TYPE | pte.NORMAL
_STATES: Final = {
    "absent": pte.TYPE | pte.NORMAL,
    "readonly": _LEAF,
    "untracked": _LEAF | pte.S2AP_W,
    "clean": _LEAF | pte.DBM,
    "dirty": _LEAF | pte.DBM | pte.S2AP_W,
}
_BARRIERS: Final = [[name, *of] for name in ("dmb", "dsb") for of in ([], ["ld"], ["st"])] + [["isb"]]
_BITS: Final = {"W": pte.S2AP_W, "V": pte.VALID, "AF": pte.AF, "DBM": pte.DBM}
_APPLY: Final[dict[str, Callable[[int, int], int]]] = {
    "swap": lambda _, new: new,
    "set": lambda old, bits: old | bits,
    "clear": lambda old, bits: old & ~bits,
}


def descriptor(state: str, frame: int) -> int:
    """Return the page descriptor of a frame in a state; ``old`` before the state's name leaves AF clear."""
    old, state = state.startswith("old "), state.removeprefix("old ")
    return (_STATES[state] | frame << 12) & ~(pte.AF if old else 0)


def state_name(desc: int) -> str:
    """Return what the state of a leaf is called."""
    if not desc & pte.VALID:
        return "absent"
    name = next(name for name, bits in _STATES.items() if (desc ^ bits) & (pte.VALID | pte.DBM | pte.S2AP_W) == 0)
    return name if desc & pte.AF else f"old {name}"


class Scene:
    """Pages, memory and threads, from which a machine is made.

    Parameters
    ----------
    pages : mapping
        The state of each page's descriptor, by the page's name: ``{"x": "clean"}``.
    programs : sequence of str
        The threads.
    cells : mapping, optional
        Further cells of memory, and what they hold; they are places of the same names.
    frames : sequence of str
        Frames that no page begins with.
    options : mapping, optional
        ``values``, what cells hold at first, by name; ``numbers``, those of frames; ``block``, each page's number in a
        level-2 block with a descriptor ``pte:block``; ``run``, the pages of a contiguous run; and parameters of
        `WeakMachine`: hd, ha, speculate, combined, broken, ets2.

    Raises
    ------
    ValueError
        If a program isn't one, or names a place that isn't there.
    """

    def __init__(
        self,
        pages: Mapping[str, str],
        programs: Sequence[str] = (),
        cells: Mapping[str, int] | None = None,
        frames: Sequence[str] = (),
        options: Mapping[str, Any] = {},
    ) -> None:
        options = {"ha": True, "hd": True, "speculate": False, **options}
        named = [*pages, *(name for name in frames if name not in pages)]
        self.frame = {name: number for number, name in enumerate(named, 1)} | options.pop("numbers", {})
        block, run = options.pop("block", {}), options.pop("run", ())
        entries = [f"pte:{name}" for name in pages] + (["pte:block"] if block else [])
        self.cells = [*entries, *(f"frame:{name}" for name in named), *(cells or {})]
        self.mem = [descriptor(state, self.frame[name]) for name, state in pages.items()]
        self.mem += [0] if block else []
        self.mem += [0 for _ in named] + list((cells or {}).values())
        for name, value in options.pop("values", {}).items():
            self.mem[self.cells.index(name)] = value
        members = tuple(self.cell(f"pte:{name}") for name in run)
        self.pages = {
            name: Page(
                cell, self.cell("pte:block") if block else None, members if name in run else (), block.get(name, 0)
            )
            for cell, name in enumerate(pages)
        }
        for number, name in enumerate(run):
            self.mem[self.cell(f"pte:{name}")] |= pte.CONTIGUOUS
            self.pages[name] = self.pages[name]._replace(number=number)
        self.registers = [dict[str, int]() for _ in programs]
        ops = [[*self._read(text, registers)] for text, registers in zip(programs, self.registers, strict=True)]
        for each in ("ha", "hd"):
            options[each] = (bool(options[each]),) * len(ops)
        self.machine = WeakMachine(
            ops,
            self.cells,
            self.pages,
            {number: self.cells.index(f"frame:{name}") for name, number in self.frame.items()},
            frozenset(range(len(entries))),
            STAGE2,
            **options,
        )

    def start(self) -> Moment:
        """Return the state that the machine begins in."""
        return self.machine.start(self.mem)

    def cell(self, name: str) -> int:
        """Return the number of a cell.

        Raises
        ------
        ValueError
            If there is none of that name.
        """
        try:
            return self.cells.index(name)
        except ValueError:
            raise ValueError(f"there is no cell {name!r}; there are {', '.join(self.cells)}") from None

    def _read(self, text: str, registers: dict[str, int]) -> list[Op]:
        ops: list[Op] = []
        for each in filter(None, (part.strip() for part in text.split(";"))):
            head, _, result = (part.strip() for part in each.partition("->"))
            words = head.split()
            name = words[0]
            if words in _BARRIERS:
                ops.append(Op(kind=OpKind[name.upper()], scope=words[1] if words[1:] else "full", label=each))
                continue
            kind = {"load": OpKind.LOAD, "store": OpKind.STORE, "tlbi": OpKind.TLBI}.get(name, OpKind.RMW)
            most = {OpKind.LOAD: 2, OpKind.TLBI: 2}.get(kind, 3)
            if (kind is OpKind.RMW and name not in _APPLY) or not (most == len(words) or words == ["tlbi"]):
                raise ValueError(f"{each!r} is no instruction of a program")
            place, place_from = self._place(words[1], registers, each) if words[1:] else (None, frozenset[int]())
            value, value_from = self._value(words[2], registers, each) if words[2:] else (_zero, frozenset[int]())
            ops.append(
                Op(
                    kind=kind, place=place, place_from=place_from, value=value, value_from=value_from,
                    apply=_APPLY.get(name, _APPLY["swap"]), returns=bool(result), label=each,
                )
            )  # fmt: skip
            if result:
                registers[result] = len(ops) - 1
        return ops

    def _place(self, word: str, registers: dict[str, int], each: str) -> tuple[Callable[..., Value], frozenset[int]]:
        name, _, register = word.partition("@")
        if (name not in self.pages and name not in self.cells) or (register and register not in registers):
            raise ValueError(f"{each!r}: there is no place {word!r}")
        return lambda _: name, frozenset({registers[register]} if register else ())

    def _value(self, word: str, registers: dict[str, int], each: str) -> tuple[Callable[..., Value], frozenset[int]]:
        if word in registers:
            at = registers[word]
            return lambda values: values[at], frozenset({at})
        name, _, frame = word.partition(":")
        if not frame and (own := re.search(r"pte:(\w+)", each)):
            frame = own[1]
        if re.fullmatch(r"\d+", word):
            number = int(word)
        elif word in _BITS:
            number = _BITS[word]
        elif name in _STATES and frame in self.frame:
            number = descriptor(name, self.frame[frame])
        else:
            raise ValueError(f"{each!r}: {word!r} is no value")
        return lambda _: number, frozenset()


def _zero(_: Sequence[Value]) -> Value:
    return 0


@dataclass(frozen=True, slots=True)
class End:
    """How it ended: what a condition is asked about.

    Parameters
    ----------
    scene : Scene
        What it began as.
    state : Moment
        The final state.
    """

    scene: Scene
    state: Moment

    def __getitem__(self, name: str) -> int:
        """Return what a register or a cell holds."""
        for registers, thread in zip(self.scene.registers, self.state.threads, strict=True):
            if name in registers:
                return int(thread[registers[name]].value)
        return self.state.mem[self.scene.cell(name)]

    def is_state(self, name: str, *states: str) -> bool:
        """Return whether a register or a cell holds a descriptor in one of some states."""
        return state_name(self[name]) in states

    def faulted(self, thread: int) -> bool:
        """Return whether a thread ended with a fault."""
        return self.scene.machine.faulted(self.state.threads[thread]) is not None
