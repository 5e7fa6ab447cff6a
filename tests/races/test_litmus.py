"""The machine against verdicts, the broken machines against the tests, and the reader of herd's format."""

from contextlib import suppress
from errno import ENOENT

import pytest
from seen import as_seen

from hwdbm.errors import UnreadError
from hwdbm.races.litmus import Litmus, compare, read_folder, read_kinds
from hwdbm.races.machine import BROKEN
from hwdbm.races.program import Scene
from hwdbm.races.search import explore
from hwdbm.races.twenty import TWENTY

STORE_AND_SWAP = r"""AArch64 STRx+SWPptex
(* a store, and an unmap by exchange *)
TTHM=HA HD
{
 [PTE(x)]=(oa:PA(x), db:0, dbm:1);
 0:X2=x; 1:X4=PTE(x);
 1:X6=(oa:PA(x), valid:0);
}
 P0          | P1             ;
 MOV W1,#1   | SWP X6,X8,[X4] ;
 L0:         |                ;
 STR W1,[X2] |                ;
"""
CONDITIONS = {
    r"exists (1:X8=(oa:PA(x), db:0, dbm:1) /\ x=1)": (False, False),
    r"exists (1:X8=(oa:PA(x), dbm:1) /\ x=1 /\ ~Fault(P0:L0,x))": (True, False),
    r"exists (Fault(P0:L0,x,MMU:Translation) /\ x=0)": (True, False),
    r"exists Fault(P0:L0,x,MMU:Permission)": (False, False),
    r"forall (x=1 \/ Fault(P0,x))": (True, True),
    "locations [x;]\nforall pte_x=(valid:0, db:0, dbm:0) \\/ pte_x=(valid:0)": (True, True),
}


@pytest.mark.parametrize("test", TWENTY, ids=lambda test: test.name)
def test_the_machine_agrees_with_the_verdict(test):
    assert test.agrees()


@pytest.mark.parametrize("rule", BROKEN)
def test_a_machine_without_the_rule_is_noticed(rule):
    guards = [test for test in TWENTY if rule in test.guards]
    assert guards
    assert not any(test.agrees(frozenset({rule})) for test in guards)


@pytest.mark.parametrize(("condition", "expected"), CONDITIONS.items())
def test_reads_herds_format(condition, expected):
    yes, no, states = Litmus.read(STORE_AND_SWAP + condition).outcomes()
    assert (yes > 0, no == 0) == expected
    assert states > yes + no > 0


def test_compares_and_names_what_it_did_not_read(tmp_path):
    good = STORE_AND_SWAP + "exists x=1"
    (tmp_path / "a.litmus").write_text(good)
    (tmp_path / "b.litmus").write_text(good.replace("SWPptex", "wrong"))
    (tmp_path / "c.litmus").write_text(good.replace("SWPptex", "branch").replace("MOV W1,#1", "CBZ W1,L0"))
    (tmp_path / "d.litmus").write_text(good.replace("SWPptex", "unjudged"))
    kinds = read_kinds("STRx+SWPptex Allowed\nSTRx+wrong\tHD\tForbidden\nSTRx+branch   Allow \nnoise\n")
    assert kinds == {"STRx+SWPptex": "Allowed", "STRx+wrong": "Forbidden", "STRx+branch": "Allowed"}
    found = compare(list(read_folder(tmp_path)), kinds)
    assert (found.agree, found.differ, found.unjudged) == (["STRx+SWPptex"], ["STRx+wrong"], ["STRx+unjudged"])
    assert found.unread == {"STRx+branch": "the instruction 'CBZ W1,L0'"}


@pytest.mark.parametrize(
    ("condition", "verdicts"),
    [
        ("exists x=2", {"Forbidden"}),
        ("exists x=1", {"Allowed"}),
        (r"exists (x=0 \/ x=1)", {"Allowed", "Required"}),
    ],
)
def test_a_verdict_is_of_never_sometimes_and_always(condition, verdicts):
    test = Litmus.read(STORE_AND_SWAP + condition)
    states = test.outcomes()[2]
    found = {kind: test.verdict(kind) for kind in ("Allowed", "Forbidden", "Required")}
    assert found == {kind: (kind in verdicts, states) for kind in found}


def test_all_of_a_folder_is_compared_whatever_comes_first():
    """States are those of all that were read; the machine is the one that was asked for."""
    one, two = (
        STORE_AND_SWAP.replace("SWPptex", name) + end for name, end in (("1", "exists x=1"), ("2", "exists x=2"))
    )
    unread, unjudged = one.replace("+1", "+3").replace("STR W1", "STXR W1"), one.replace("+1", "+4")
    kinds = {f"STRx+{number}": "Allowed" for number in (1, 2, 3)}
    states = [Litmus.read(text).outcomes()[2] for text in (one, two)]
    for texts in ([unjudged, unread, one, two], [two, one, unread, unjudged], ["", unread, two, unjudged, one]):
        found = compare(texts, kinds)
        assert (found.agree, found.differ, list(found.unread)) == (["STRx+1"], ["STRx+2"], ["STRx+3"])
        assert found.unjudged == ["?"] * texts.count("") + ["STRx+4"]
        assert found.states == sum(states)
    assert compare([], kinds).states == 0
    assert compare([one], kinds, frozenset({"H1"})).states != states[0]


def test_what_the_caller_says_of_ets2_counts_more_than_the_test():
    """The mark of a store isn't behind a DSB ST: it may come before the store that this orders, but with FEAT_ETS2."""
    text = """AArch64 MP
TTHM=HA HD
{ [PTE(y)]=(oa:PA(y), db:0, dbm:1); 0:X1=x; 0:X2=y; 0:X3=1; 1:X1=x; 1:X2=PTE(y); }
 P0 | P1;
 STR X3,[X1] | LDR X6,[X2];
 DSB ST | DMB LD;
 STR X3,[X2] | LDR X7,[X1];
exists (1:X6=(oa:PA(y), db:1, dbm:1) /\\ 1:X7=0)
"""
    with_it = text.replace("TTHM", "Variant=ets2\nTTHM")
    for kind, ets2, some in (
        ("Allowed", None, text),
        ("Forbidden", None, with_it),
        ("Allowed", False, with_it),
        ("Forbidden", True, text),
    ):
        assert compare([some], {"MP": kind}, ets2=ets2).agree == ["MP"]
        assert not compare([some], {"MP": kind}, ets2=ets2).differ


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("AArch64", "X86_64"),
        ("SWP X6,X8,[X4]", "LDXR X6,[X4]"),
        ("[PTE(x)]=(oa:PA(x)", "[PTE(x)]=(oa:PA(x), el0:0"),
        ("TTHM=HA HD", "TTHM=HA HD\nVariant=imprecise"),
        ("exists", "probably"),
        ("x=1", "x=1 => x=2"),
        ("P0  ", "P1.F"),
        ("[X2]", "[X9]"),
    ],
)
def test_what_is_not_read_is_an_error_that_says_so(old, new):
    text = (STORE_AND_SWAP + "exists x=1").replace(old, new)
    with pytest.raises(UnreadError):
        Litmus.read(text).outcomes()


def test_a_folder_without_tests_is_an_error(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match="no folder with") as raised:
            list(read_folder(folder))
        assert (raised.value.errno, raised.value.filename) == (ENOENT, str(folder))


@pytest.mark.parametrize("text", ["fly x", "store x", "store q 1", "load x@r -> a", "store x blue", "tlbi q"])
def test_a_program_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match=r"."):
        Scene({"x": "clean"}, [text])


def test_each_end_is_counted_once():
    """The ends are those of the program, whichever of them a condition asks for."""
    counts = {condition: Litmus.read(STORE_AND_SWAP + condition).outcomes() for condition in CONDITIONS}
    assert len({(yes + no, states) for yes, no, states in counts.values()}) == 1
    assert len({yes for yes, _, _ in counts.values()}) > 2


ARITHMETIC = r"""AArch64 ALU
{
 0:X0=2; 0:X1=3; 0:X3=3;
}
 P0             ;
 CMP X0,X1      ;
 CSET X4,EQ     ;
 CSET X5,NE     ;
 CMP X3,X1      ;
 CSET X6,EQ     ;
 CSET X7,NE     ;
 ADD X8,X0,X1   ;
 SUB X9,X1,X0   ;
 AND X10,X0,X1  ;
 ORR X11,X0,#1  ;
 EOR X12,X0,X1  ;
 BIC X13,X1,X0  ;
 LSL X14,X0,X1  ;
 LSR X15,X14,X0 ;
"""


VALUES = {4: 0, 5: 1, 6: 1, 7: 0, 8: 5, 9: 1, 10: 2, 11: 3, 12: 1, 13: 1, 14: 16, 15: 4}


@pytest.mark.parametrize(("register", "value"), VALUES.items())
def test_arithmetic(register, value):
    for other in range(17):
        yes, no, _ = Litmus.read(f"{ARITHMETIC}exists (0:X{register}={other})").outcomes()
        assert (yes, no) == ((1, 0) if other == value else (0, 1))


INIT = "0:X1=x; 0:X2=PTE(x); 0:X3=3; 0:X4=(oa:PA(x), valid:0); 1:X1=x; 1:X3=PTE(x); 1:X5=y; y=4; x=6"
INSTRUCTIONS = (
    "LDR X6,[X1]", "LDAR X6,[X1]", "STR X3,[X1]", "STLR X3,[X1]", "STR X3,[X1,#0]", "STR X3,[X1,W9,SXTW]",
    "LDR X6,[X1,#8]",
    "SWP X3,X6,[X1]", "SWPAL X4,X6,[X2]", "LDADDA X3,X6,[X1]", "LDSETL X3,XZR,[X1]", "LDCLR X3,X6,[X1]",
    "STADD X3,[X1]",
    "STSETL X3,[X1]", "STCLR X3,[X1]", "LDEOR X3,X6,[X1]", "STEOR X3,[X1]", "CAS X3,X6,[X1]", "LDR X6,X1",
    "LDR X6,[Q1]",
    "NOP", "MOV X6,#-0x10", "MOV XZR,#1", "MOV X6,SP", "CMP X3,#1", "CSET X6,EQ", "CSET X6,LT", "ADD X6,X3,X3,SXTW",
    "ADD X6,X3,X3,LSL", "EOR X6,X1,X1", "LSR X6,X1,#12", "AND X6,X1,X3", "ORR X6,XZR,X1", "FOO X1",
    "DMB", "DMB SY", "DMB ISHLD", "DMB ISHST", "DSB", "DSB ISH", "DSB LD", "DSB ST", "ISB",
    "TLBI VMALLE1IS", "TLBI VAE1IS,X1", "TLBI VAALE1OS,X1", "TLBI VALE1,X1", "TLBI ALLE2,X1",
)  # fmt: skip
ENDS = (
    "exists x=3", "~ exists x=3", "forall x=3", "exists [x]=1", "exists 1:X6=1", "exists P1:X6=1", "exists y=4",
    "exists 0:X6=4",
    r"exists (x=3 /\ 1:X6=0)", r"exists (x=3 \/ y=4) /\ ~(1:X6=0)", "exists not x=3", "exists pte_x=(oa:PA(x), af:0)",
    "exists PTE(x)=(valid:0)", "exists pte_x=(oa:PA(y))", "exists [PTE(x)]=(dbm:1)", "exists pte_x=0",
    "exists 0:X2=pte_x",
    "exists Fault(P0)", "exists Fault(P0:L0,x)", "exists fault(P0:L0,y)", "exists Fault(P1,x,MMU:Translation)",
    "exists Fault(P1,MMU:AccessFlag)", "exists Fault(P0:L9)", "locations [x; 1:X6;]\nexists x=3",
    "exists", "exists x", "exists x=", "exists (x=3", "exists x=3)", "exists x=3 y=2", "exists Fault(x)",
    "exists Fault(P0,MMU:So)",
    "exists Fault(P0,x,y)", "exists x=3 => y=2", "exists 0:Q1=1", "exists pte_x=(oa:x)", "exists pte_x=(el0:1)",
    "filter x=3",
)  # fmt: skip
BEGINNINGS = (
    "uint64_t x=3;", "int y;", "xs;", "pteval_t 0:X6;", "x=0x10;", "[x]=2;", "[PTE(x)]=(oa:PA(y), af:0);",
    "PTE(x)=(valid:0);",
    "[PTE(x)]=(db:0, dbm:0);", "TTD(x)=(oa:PA(x), dbm:1, db:1);", "0:X6=(valid:0);", "0:X6=-1;", "0:X6=PTE(y);",
    "[PTE(y)]=(dbm:1);", "x=one;", "x.a=1;", "0:Q1=1;", "pte_9=(valid:0);", "[PTE(x)]=(valid:2);", "0:X6=9a;",
)  # fmt: skip
HEADS = (
    "TTHM=HA",
    "TTHM=HD",
    "TTHM=P0:HD P1:HA",
    "TTHM=P1:HA,P1:HD",
    "",
    "Variant=vmsa,ets2",
    "variant=precise",
    "Variant=kvm",
)


def herd(
    instruction: str = "STR X3,[X1]",
    end: str = "exists x=3",
    more: str = "",
    head: str = "TTHM=HA HD",
    threads: str = "P0|P1",
) -> str:
    """Return a test of two threads: the instruction, where the page is clean, beside an unmap and a load."""
    return (
        f"AArch64 T\n{head}\n{{\n [PTE(x)]=(oa:PA(x), db:0, dbm:1); {INIT}; {more}\n}}\n{threads};\n"
        f"L0: {instruction} | SWP XZR,X4,[X3];\n | LDR X6,[X5];\n{end}\n"
    )


def test_what_is_read_was_looked_at():
    """Each instruction, condition, initial value and option has its ends, or is refused, as it was looked at."""
    texts = {each: herd(each) for each in INSTRUCTIONS} | {each: herd(end=each) for each in ENDS}
    texts |= {f"{{{each}}}": herd(more=each) for each in BEGINNINGS} | {
        f"with {each}": herd(head=each) for each in HEADS
    }
    texts["an entry that is only read"] = herd("LDR X6,[X7]", more="0:X7=PTE(y);")
    texts |= {"three threads": herd(threads="P0|P1|P2"), "P0|Q1": herd(threads="P0|Q1"), "no end": herd(end="")}
    texts |= {
        "no brace": herd().replace("{", "("),
        "no body": "AArch64 T\n{\n",
        "another": herd().replace("AArch64", "X86_64"),
    }
    lines = []
    for name, text in texts.items():
        try:
            test = Litmus.read(text)
            yes, no, states = test.outcomes()
            ended = filter(test.machine.ended, explore(test.machine.start(test.mem), test.machine.steps))
            ends = {f"  memory {' '.join(map(hex, state.mem))}, X6 {test.register(state, 0, 'X6')}" for state in ended}
            lines += [
                f"{name!r}: {yes} yes, {no} no, {states} states",
                *(sorted(ends) if text.endswith("x=3\n") else ()),
            ]
        except UnreadError as error:
            lines.append(f"{name!r}: {error}")
    as_seen("races/read.txt", "\n".join(lines) + "\n")


def operation(op):
    """Return what an operation is, what its place and value come from, and what it orders."""
    marks = [name for name in ("acquire", "release", "returns") if getattr(op, name)]
    sources = f"{sorted(op.place_from)} and {sorted(op.value_from)}"
    return f"  {op.kind.name} {' '.join(marks)}, {op.scope}, from {sources} {op.label}".rstrip()


def test_what_instructions_become_was_looked_at():
    """Those that are read: an atomic operation whose result nobody keeps returns none, for one."""
    atomics = ("SWP", "LDADD", "LDSETA", "LDCLRL", "LDEORAL")
    more = [
        f"{name} {register}3,{result},[X1]" for name in atomics for register, result in (("X", "XZR"), ("W", "WZR"))
    ]
    lines = []
    for each in (*INSTRUCTIONS, *more):
        with suppress(UnreadError):
            (ops, *_) = Litmus.read(herd(each)).machine.programs
            lines += [each, *map(operation, ops)]
    as_seen("races/operations.txt", "\n".join(lines) + "\n")
