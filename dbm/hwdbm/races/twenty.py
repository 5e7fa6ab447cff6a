"""The litmus tests that matter most to a harvest, in this project's own form, with the verdicts of herd's catalogue.

Each says which shape of herd's it is; pages are stage 2's here, and conditions plain Python. They are chosen so that
they notice each broken machine of `hwdbm.races.machine.BROKEN`. A few are this project's own, for rules that no test
of herd's with hardware updates asks about; these have no judge but the Arm ARM, and their `herd` is empty.
"""

from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

from hwdbm import pte
from hwdbm.races.program import End, Scene
from hwdbm.races.search import explore


class Test(NamedTuple):
    """A program of a few threads, and whether an outcome may be.

    Parameters
    ----------
    name : str
        What it asks.
    herd : str
        The test of herd's catalogue that has this shape; empty if there is none.
    verdict : str
        "Allowed", "Forbidden", or "Required" of every outcome.
    pages : mapping
        The pages, and the states of their descriptors.
    programs : tuple of str
        The threads, as `hwdbm.races.program` reads them.
    outcome : callable
        Whether an end is the outcome in question.
    options : mapping
        Of the `WeakMachine`.
    frames : tuple of str
        Further frames.
    guards : tuple of str
        The rules (`BROKEN`) of which this is the quickest test.
    """

    name: str
    herd: str
    verdict: str
    pages: Mapping[str, str]
    programs: tuple[str, ...]
    outcome: Callable[[End], bool]
    options: Mapping[str, object] = {}
    frames: tuple[str, ...] = ()
    guards: tuple[str, ...] = ()

    def agrees(self, broken: frozenset[str] = frozenset()) -> bool:
        """Return whether the machine's outcomes are as the verdict says."""
        options = {**self.options, "broken": broken}
        scene = Scene(self.pages, self.programs, frames=self.frames, options=options)
        machine = scene.machine
        ends = [self.outcome(End(scene, s)) for s in explore(scene.start(), machine.steps) if machine.ended(s)]
        if self.verdict == "Allowed":
            return any(ends)
        return not any(ends) if self.verdict == "Forbidden" else bool(ends) and all(ends)


_ONCE = "dsb; tlbi x; dsb"

TWENTY: Final = (
    Test(
        "one store isn't harvested twice, a flush between", "STRx+2SWPptex+db+TLBI", "Forbidden",
        {"x": "clean"}, ("store x 1", f"swap pte:x clean -> a; {_ONCE}; swap pte:x clean -> b"),
        lambda end: end.is_state("a", "dirty") and (end.is_state("b", "dirty") or end.is_state("pte:x", "dirty"))
        and not end.faulted(0),
    ),
    Test(
        "one store isn't harvested twice, cleaned by a bit", "STRx+2LDSETptex+db+TLBI", "Forbidden",
        {"x": "clean"}, ("store x 1", f"clear pte:x W -> a; {_ONCE}; clear pte:x W -> b"),
        lambda end: end.is_state("a", "dirty") and (end.is_state("b", "dirty") or end.is_state("pte:x", "dirty"))
        and not end.faulted(0),
    ),
    Test(
        "an unmap by exchange that says clean excludes a store that passed", "STRx+SWPptex+db5", "Forbidden",
        {"x": "clean"}, ("store x 1", "swap pte:x absent -> a"),
        lambda end: end.is_state("a", "clean") and end["frame:x"] == 1,
        guards=("H1", "H2", "H3", "S1"),
    ),
    Test(
        "load and store instead of an atomic: the outcomes there are", "STRx+LDR-STRptex+db", "Required",
        {"x": "clean"}, ("store x 1", "load pte:x -> a; store pte:x absent"),
        lambda end: end.is_state("pte:x", "absent")
        and ((end.is_state("a", "clean") and (end.faulted(0) == (end["frame:x"] == 0)))
             or (end.is_state("a", "dirty") and end["frame:x"] == 1)),
        guards=("C2",),
    ),
    Test(
        "data seen, then an exchange: it must say dirty", "coRRNExpNExpExp+DSB6+TER", "Forbidden",
        {"x": "clean"}, ("store x 1", "load x -> d; dsb; swap pte:x readonly -> a"),
        lambda end: end["d"] == 1 and end.is_state("a", "clean"),
    ),
    Test(
        "data seen, then a plain load: it may say clean", "coRRNExpNExpExp+DSB7", "Allowed",
        {"x": "clean"}, ("store x 1", "load x -> d; dsb; load pte:x -> a"),
        lambda end: end["d"] == 1 and end.is_state("a", "clean"),
    ),
    Test(
        "the copier's view, by an address of its own", "STRx-LDRx-ptex+db", "Allowed",
        {"x": "clean"}, ("store x 1", "load frame:x -> d; dsb; load pte:x -> a"),
        lambda end: end["d"] == 1 and end.is_state("a", "clean"),
    ),
    Test(
        "a vCPU that stopped with DSB shows what it dirtied", "MP+HD-DSB.ISH", "Forbidden",
        {"x": "clean", "f": "untracked"}, ("store x 1; dsb; store f 1", "load f -> s; dmb ld; load pte:x -> a"),
        lambda end: end["s"] == 1 and end.is_state("a", "clean"),
        guards=("O1",),
    ),
    Test(
        "a vCPU that stopped with DSB ST may not", "MP+HD-DSB.ST", "Allowed",
        {"x": "clean", "f": "untracked"}, ("store x 1; dsb st; store f 1", "load f -> s; dmb ld; load pte:x -> a"),
        lambda end: end["s"] == 1 and end.is_state("a", "clean"),
    ),
    Test(
        "a flush's end carries what was dirtied before it", "Artem2+TLBIx-HDy+dsb.ish", "Forbidden",
        {"x": "untracked", "y": "clean"},
        (f"store pte:x absent; {_ONCE}; load pte:y -> a", "store y 2; dsb; load x -> d"),
        lambda end: end.is_state("a", "clean") and not end.faulted(1),
    ),
    Test(
        "with DSB ST on the vCPU it doesn't", "Artem3+HDx-TLBIy+dsb.st+dmb.ld", "Allowed",
        {"x": "clean", "y": "untracked", "z": "untracked"},
        ("load pte:x -> a; dsb; tlbi y; dsb; store z 1", "store pte:y absent; dsb st; store x 2",
         "load z -> s; dmb ld; load y -> d"),
        lambda end: end.is_state("a", "dirty") and end["s"] == 1 and not end.faulted(2),
    ),
    Test(
        "no dirty for a store that may still not happen", "2+2WNExpExp+NExpNExp+DMBST+DMBST", "Forbidden",
        {"x": "clean", "y": "dirty"},
        ("store y 1; dmb st; store x 1", "store pte:x clean:z; dmb st; store pte:y clean"),
        lambda end: end["frame:x"] == 1 and end["frame:y"] == 1 and end.is_state("pte:x", "clean")
        and end.is_state("pte:y", "dirty"),
        frames=("z",),
        guards=("O6", "O8"),
    ),
    Test(
        "own marks run ahead of an own flush", "coRR+W-DSB-TLBI-DSB-HU+rfe-W", "Allowed",
        {"x": "untracked", "z": "clean", "y": "untracked"},
        ("load x -> p; load x -> q", f"store pte:x absent; {_ONCE}; store z 1",
         "load pte:z -> a; dmb; store pte:x untracked:y"),
        lambda end: end["p"] == 1 and end["q"] == 0 and not end.faulted(0) and end.is_state("a", "dirty"),
        options={"values": {"frame:y": 1}},
    ),
    Test(
        "an ISB ends that", "coRR+W-DSB-TLBI-DSB-ISB-HU+rfe-W", "Forbidden",
        {"x": "untracked", "z": "clean", "y": "untracked"},
        ("load x -> p; load x -> q", f"store pte:x absent; {_ONCE}; isb; store z 1",
         "load pte:z -> a; dmb; store pte:x untracked:y"),
        lambda end: end["p"] == 1 and end["q"] == 0 and not end.faulted(0) and end.is_state("a", "dirty"),
        options={"values": {"frame:y": 1}},
        guards=("T4",),
    ),
    Test(
        "write the descriptor, flush, store: by the old translation", "coWWExp-TLBI-NExp", "Allowed",
        {"x": "clean"}, (f"store pte:x clean:y; {_ONCE}; store x 1",),
        lambda end: end["frame:x"] == 1 and end.is_state("pte:x", "clean"),
        frames=("y",),
    ),
    Test(
        "remapped: the dirty state is of the frame that was written", "STRva-STRpte", "Required",
        {"x": "clean"}, ("store x 1", "store pte:x clean:y"),
        lambda end: (end.is_state("pte:x", "clean") and end["frame:x"] == 1)
        or (end.is_state("pte:x", "dirty") and end["frame:y"] == 1),
        frames=("y",),
    ),
    Test(
        "unmapped by an atomic that says clean: no store passes later", "LDCLRptex-STRx+db+BIS", "Forbidden",
        {"x": "old clean"}, ("clear pte:x V -> a; store x 1",),
        lambda end: end["a"] & (1 << 7) == 0 and end["frame:x"] == 1 and end["pte:x"] & (1 << 7) != 0
        and not end.faulted(0),
    ),
    Test(
        "an unmap by exchange sees the store that passed", "STRx+SWPptexForbid2", "Allowed",
        {"x": "clean"}, ("store x 1", "swap pte:x absent -> a"),
        lambda end: end.is_state("a", "dirty") and end["frame:x"] == 1 and not end.faulted(0),
        guards=("H4",),
    ),
    Test(
        "after DBM is taken away a store faults", "coWWWNexpExpNexp+DSB-DSB", "Allowed",
        {"x": "clean"}, ("store x 1; dsb; store pte:x readonly; dsb; store x 2",),
        lambda end: end.faulted(0),
        guards=("H7",),
    ),
    Test(
        "never dirty without AF", "STRx-LDRptex4", "Forbidden",
        {"x": "old clean"}, ("store x 1", "load pte:x -> a"),
        lambda end: end.is_state("a", "old dirty"),
        guards=("H6",),
    ),
    Test(
        "DSB ST and a store behind it, with FEAT_ETS2", "ETS2.MP+dsb.stpptehd+popteap", "Forbidden",
        {"x": "untracked", "y": "clean"}, ("store x 1; dsb st; store y 1", "load pte:y -> a; dmb ld; load x -> d"),
        lambda end: end.is_state("a", "dirty") and end["d"] == 0,
        options={"ets2": True},
        guards=("O2", "O3", "O5"),
    ),
    Test(
        "a mark waits for its store's address", "S+dmb.st+addr-HUdb", "Forbidden",
        {"y": "untracked", "z": "clean"}, ("store pte:z clean; dmb st; store y 1", "load y -> s; store z@s 1"),
        lambda end: end["s"] == 1 and end.is_state("pte:z", "clean"),
        guards=("O10",),
    ),
    Test(
        "a vCPU reads the clean descriptor, and then its own mark is not undone", "STRx-LDRptex2", "Forbidden",
        {"x": "clean"}, ("load x -> d; dsb", "load pte:x -> a"),
        lambda end: end.is_state("a", "dirty") or end.is_state("pte:x", "dirty"),
        guards=("H5", "H9"),
    ),
    Test(
        "a fault by an old translation is over when the flush is", "", "Forbidden",
        {"x": "readonly", "f": "untracked"},
        (f"store pte:x untracked; {_ONCE}; store f 1", "load f -> s; dmb ld; store x 1"),
        lambda end: end["s"] == 1 and end.faulted(1),
        guards=("T1", "T2", "T3"),
    ),
    Test(
        "an absent descriptor is never kept by a TLB", "", "Forbidden",
        {"x": "absent", "f": "untracked"},
        ("store pte:x untracked; dsb; store f 1", "load f -> s; dsb; isb; load x -> d"),
        lambda end: end["s"] == 1 and end.faulted(1),
        guards=("O4", "T5"),
    ),
    Test(
        "loads of a place don't go backwards", "", "Forbidden",
        {"x": "untracked"}, ("store x 1", "load x -> a; load x -> b"),
        lambda end: end["a"] == 1 and end["b"] == 0,
        guards=("C1",),
    ),
    Test(
        "a store that passed before a DMB is there after it", "", "Forbidden",
        {"x": "untracked", "y": "untracked"},
        ("store x 1; dmb; store y 1", "load y -> a; dmb; load x -> b"),
        lambda end: end["a"] == 1 and end["b"] == 0,
        guards=("O7",),
    ),
    Test(
        "a store waits until no access before it can fault", "", "Forbidden",
        {"x": "absent", "y": "untracked"}, ("store x 1; store y 1",),
        lambda end: end["frame:y"] == 1,
        guards=("O9",),
    ),
    Test(
        "an absent descriptor isn't marked", "", "Forbidden",
        {"x": "old absent"}, ("load x -> a",),
        lambda end: not end.is_state("pte:x", "absent") or end["pte:x"] & pte.AF != 0,
        guards=("H8",),
    ),
)  # fmt: skip
"""The twenty of `herd-model`'s ranking, and those beside them that the rules left over need."""
