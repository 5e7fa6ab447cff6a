"""Small programs of every kind have the states and the ends that they had: no path of the machine goes unseen.

The programs are kept with what came of them. They were drawn at random; `HWDBM_SEEN=write` draws others.
"""

import hashlib
import json
import random
from itertools import islice
from typing import Any

from seen import DATA, as_seen, writing

from hwdbm.races.machine import BROKEN
from hwdbm.races.program import Scene
from hwdbm.races.search import explore

FILE, COUNT, STATES = "races/programs.jsonl", 250, 300
PATHS = "races/paths.jsonl"
STATES_OF_PAGES = ("clean", "dirty", "readonly", "untracked", "absent", "old clean", "old untracked")


def drawn(rng: random.Random) -> dict[str, Any]:
    """Return a program of two or three short threads, on a page or two, on a machine with some of its options."""
    names = ["x", "y"][: rng.choice([1, 1, 2])]
    options: dict[str, Any] = {
        name: rng.random() < 0.5 for name in ("ha", "hd", "speculate", "combined", "ets2") if rng.random() < 0.3
    }
    if rng.random() < 0.2:
        options["broken"] = [rng.choice(list(BROKEN))]
    if len(names) == 2 and rng.random() < 0.4:
        options |= {"run": names} if rng.random() < 0.5 else {"block": {"x": 0, "y": 1}}
    entries = [f"pte:{name}" for name in names] + (["pte:block"] if "block" in options else [])

    def instruction(known: list[str]) -> str:
        name, entry, register = rng.choice(names), rng.choice(entries), rng.choice("abcd")
        kind = rng.choice(["use", "use", "use", "frame", "entry", "entry", "order", "order"])
        if kind == "order":
            some = ["dmb", "dsb", "dsb", "isb", "dmb ld", "dmb st", "dsb ld", "dsb st"]
            return rng.choice([*some, f"tlbi {name}", f"tlbi {name}", "tlbi"])
        if kind == "entry":
            place, bit = entry, rng.choice(["W", "W", "AF", "V", "DBM"])
            value = f"{rng.choice(STATES_OF_PAGES[:5])}:{rng.choice(names)}"
        else:
            place, bit, value = name if kind == "use" else f"frame:{name}", "1", rng.choice(["1", "2", *known])
            if known and rng.random() < 0.3:
                place += f"@{rng.choice(known)}"
        plain = [f"store {place} {value}", f"load {place} -> {register}"]
        atomic = [f"swap {place} {value} -> {register}", f"set {place} {bit}", f"clear {place} {bit} -> {register}"]
        text = rng.choice([*plain, *plain, *atomic])
        if "->" in text:
            known.append(register)
        return text

    threads = []
    for _ in range(rng.choice([2, 2, 3])):
        known: list[str] = []
        threads.append("; ".join(instruction(known) for _ in range(rng.choice([1, 2, 2, 3, 4]))))
    return {"pages": {name: rng.choice(STATES_OF_PAGES) for name in names}, "programs": threads, "options": options}


def explored(program: dict[str, Any], most: int | None = None) -> dict[str, Any]:
    """Return how many states and ends there are, and a digest of these; nothing if there are too many states."""
    options = {**program["options"], "broken": frozenset(program["options"].get("broken", ()))}
    scene = Scene(program["pages"], program["programs"], options=options)
    states = list(islice(explore(scene.start(), scene.machine.steps), most))
    if most is not None and len(states) == most:
        return {}
    ends = {
        (state.mem, tuple((did.value, did.fault and did.fault.value) for thread in state.threads for did in thread))
        for state in states
        if scene.machine.ended(state)
    }
    held = hashlib.sha256("\n".join(sorted(map(repr, ends))).encode()).hexdigest()[:16]
    return {"states": len(states), "ends": len(ends), "held": held}


def kept() -> list[dict[str, Any]]:
    if not writing():
        return [json.loads(line) for line in (DATA / FILE).read_text().splitlines()]
    rng, some = random.Random(1), list[dict[str, Any]]()
    while len(some) < COUNT:
        program = drawn(rng)
        found = explored(program, STATES)
        if found.get("states", 0) > 20:
            some.append(program | found)
    return some


def test_programs_have_the_states_and_ends_that_they_had() -> None:
    programs = kept()
    assert len(programs) == COUNT
    now = [{**each, **explored(each)} for each in programs]
    as_seen(FILE, "".join(json.dumps(each) + "\n" for each in now))


def test_programs_that_go_on_where_one_way_ends() -> None:
    """A machine that looks no further at one of the places where it should has other states on one of these.

    Those are walks that were found already, and earlier accesses that have faulted, for example.
    """
    programs = [json.loads(line) for line in (DATA / PATHS).read_text().splitlines()]
    as_seen(PATHS, "".join(json.dumps({**each, **explored(each)}) + "\n" for each in programs))
