"""Protocols are proved, mistakes found; and what a search says is so."""

import os

import pytest
from seen import as_seen

from hwdbm import pte
from hwdbm.races import timeline
from hwdbm.races.mistakes import MISTAKES
from hwdbm.races.production import VERBS
from hwdbm.races.program import Scene
from hwdbm.races.protocol import Act, Actor, Protocol, Run, again, check, copy, fetch_clear, flush, kept, load, store
from hwdbm.races.protocols import PRODUCTION

# The others take longer than a second: `make races` has them all.
ALL = os.environ.get("HWDBM_RACES") == "all"
QUICK = ("sync-get", "write-protect-clear", "split-fault", "start", "device", "copy-on-write")


def steps(actor, answer):
    """Yield what an actor does first, where all that it asks is answered in one way."""
    proc = actor.proc() if actor.handles is None else actor.proc("x")
    try:
        act = next(proc)
        for _ in range(8):
            yield str(act) if isinstance(act, Run) else act.text
            act = proc.send(answer)
        yield "..."
    except (StopIteration, KeyError, TypeError) as end:  # no page x, or no flush that may fail
        yield type(end).__name__


def test_protocols_are_the_ones_that_were_looked_at():
    """Those that are explored by `make races` alone among them."""
    lines = []
    for name, make in PRODUCTION.items():
        protocol = make()
        lines += [f"{name}: {protocol.summary}", "  memory " + " ".join(map(hex, protocol.scene.mem))]
        slot = protocol.slot
        if slot is not None:  # of its own log
            log, s2 = slot.log, slot.log.stage2
            what = "shared" if s2.shared else "private", "logs" if log.live is not None else "doesn't log"
            leaves = " ".join(f"{number}:{s2.leaf_level(number)}" for number in slot.pages.values())
            lines.append(f"  {slot.npages} pages, {log.mechanism.name}, {', '.join(what)}; levels {leaves}")
        for actor in protocol.actors:
            what = [word for word in ("bounded", "last") if getattr(actor, word)]
            lines.append(f"  {actor.name} {'' if actor.handles is None else actor.handles} {' '.join(what)}".rstrip())
            lines += [f"    {answer}: {'; '.join(steps(actor, answer))}" for answer in (0, 1, "failed")]
    as_seen("protocols.txt", "\n".join(lines) + "\n")


def explored(protocol):
    """Return the report of a search, and a line for each cell: what it holds in any of the states."""
    moments, always = set(), protocol.always

    def noted(view):
        moments.add(view.state.mem)
        return always(view)

    protocol.always = noted
    report = check(protocol)
    columns = zip(protocol.scene.cells, zip(*moments, strict=True), strict=True)
    return report, [f"  {name}: {' '.join(map(hex, sorted(set(values))))}" for name, values in columns]


@pytest.mark.parametrize("name", PRODUCTION if ALL else QUICK)
def test_production_is_proved(name):
    report, held = explored(PRODUCTION[name]())
    assert report.proved, report
    assert report.states > 100
    if name in QUICK:
        as_seen(f"protocols/{name}.txt", "\n".join([f"{report.states} states", *held]) + "\n")


@pytest.mark.parametrize("name", MISTAKES)
@pytest.mark.alike(2)
def test_a_mistake_is_found_and_without_it_there_is_none(name):
    (wrong, held_by_wrong), (right, held) = (explored(MISTAKES[name].make(each)) for each in (True, False))
    assert not wrong.proved
    assert wrong.wrong
    assert wrong.steps
    assert right.proved, right
    lines = [MISTAKES[name].summary, f"{wrong.states} states, and {right.states} without it", ""]
    lines += [timeline(wrong, 100), "", "what memory holds:", *held_by_wrong, "and without the mistake:", *held]
    as_seen(f"mistakes/{name}.txt", "\n".join(lines) + "\n")


def test_the_catalogue_is_covered():
    cited = {cite for mistake in MISTAKES.values() for cite in mistake.cites}
    bugs = {f"R{number}" for number in range(1, 38)}
    assert bugs - cited == {"R32"}  # a matter of the page's size
    assert {"RFC patch 2", "RFC patch 4", "RFC patch 5", "RFC patch 6", "RFC problem 1", "v2 3/8", "v2 4/8"} <= cited
    paragraphs = {f"5.{number}" for number in range(1, 25)}
    # 5.21 says what a dirty bit doesn't prove; 5.25 is a list of CPUs.
    assert paragraphs - cited == {"5.21"}


def harvest():
    old = yield fetch_clear("pte:x", pte.S2AP_W)
    yield from flush("x")
    if old & pte.S2AP_W:
        yield copy("x")


def test_counterexample_is_as_short_as_can_be_and_says_where_the_page_is_lost():
    report = check(MISTAKES["no-flush"].make(True))
    assert [(step.actor, step.text) for step in report.steps] == [
        ("vCPU0", "translates for store x 1: dirty"),
        ("S", "cleans x"),
        ("S", "copies x"),
        ("vCPU0", "store x 1 is visible"),
    ] or len(report.steps) <= 6
    assert report.lost_at is not None
    assert report.steps[report.lost_at].text == "copies x"


def test_a_deadlock_is_found():
    def wait():
        yield Act("waits for nothing", when=lambda view: view["never"] == 1)

    report = check(Protocol("stuck", Scene({}, [], {"never": 0}), [Actor("S", wait)]))
    assert report.wrong == "nobody can go on"


def test_an_endless_loop_is_found_and_one_that_others_end_is_not():
    def loop():
        if not (yield load("stop")):
            yield again()

    def stop():
        yield store("stop", 1)

    scene = Scene({}, [], {"stop": 0})
    assert check(Protocol("ended", scene, [Actor("S", loop), Actor("T", stop)])).proved
    report = check(Protocol("endless", scene, [Actor("S", loop, bounded=True), Actor("T", stop)]))
    assert report.wrong == "S may go round for ever"
    assert check(Protocol("alone", scene, [Actor("S", loop)])).wrong == "from here no end can be reached"


def test_a_fault_that_its_handler_leaves_is_found():
    def handle(page):
        yield load(f"pte:{page}")

    report = check(Protocol("again", Scene({"x": "readonly"}, ["store x 1"]), [Actor("H", handle, handles=0)]))
    assert "never goes on" in report.wrong


def test_symmetric_vcpus_are_explored_once():
    def make(symmetric):
        scene = Scene({"x": "clean"}, ["store x 1", "store x 1"], {"copy:x": 0})
        return Protocol("two", scene, [Actor("S", harvest)], kept("x"), symmetric=symmetric)

    whole, half = check(make(())), check(make((0, 1)))
    assert whole.proved
    assert half.proved
    assert half.states < 0.6 * whole.states


def test_more_states_than_allowed_is_an_error():
    with pytest.raises(ValueError, match="more than 10 states"):
        check(MISTAKES["no-flush"].make(False), limit=10)


def unflushed(slot, lo, hi):
    """Take the steps of a GET, but for its flush."""
    lease, log = slot.lease, slot.log

    def steps():
        for point in log.get_steps(lease, lo, hi):
            log.shared.flush = None
            yield point

    return steps()


def test_production_without_its_flush_is_found():
    report = check(PRODUCTION["get-twice"](verbs={**VERBS, "get": unflushed}))
    assert not report.proved
    assert "a write to page x is lost" in report.wrong
