"""The machine against verdicts, the broken machines against the tests, and the reader of herd's format."""

import pytest

from hwdbm.errors import UnreadError
from hwdbm.races.litmus import Litmus, compare, read_folder, read_kinds
from hwdbm.races.machine import BROKEN
from hwdbm.races.program import Scene
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
    with pytest.raises(FileNotFoundError):
        list(read_folder(tmp_path))


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
