"""How commands end where something went wrong: what is tried again, what is held, and what is said of it."""

import json
import os
import signal
import threading
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from clocks import Clock
from seen import as_seen

from hwdbm.cli import migrate, races, snapshot
from hwdbm.errors import HandoverError, StreamError
from hwdbm.races.litmus import Agreement


def held(
    monkeypatch: pytest.MonkeyPatch, *, hold: float | None, terminal: bool, answer: Callable[[int], object]
) -> str:
    """Return what became of a guest that may run elsewhere, and what was said; `answer` is asked at each look."""
    clock, resumed, looks = Clock(), list[bool](), 0

    def look(*_: object) -> None:
        nonlocal looks
        looks += 1
        clock.sleep(0.1)
        answer(looks)

    before = signal.getsignal(signal.SIGUSR1)
    monkeypatch.setattr(migrate, "time", clock)
    monkeypatch.setattr(migrate, "select", SimpleNamespace(select=look))
    monkeypatch.setattr(migrate.sys, "stdin", SimpleNamespace(isatty=lambda: terminal))
    vm: Any = SimpleNamespace(resume=lambda: resumed.append(True))
    cancel = SimpleNamespace(is_set=lambda: looks >= 900)
    decided = migrate._decided(vm, HandoverError("no confirmation came"), cancel, hold)  # type: ignore[arg-type]
    assert signal.getsignal(signal.SIGUSR1) == before
    assert decided == bool(resumed)
    return f"{'resumed' if decided else 'given up'} after {looks} looks, {clock.passed:.1f} s"


def usr1_at(look: int) -> Callable[[int], object]:
    return lambda now: now == look and signal.raise_signal(signal.SIGUSR1)


HELD = {
    "no terminal": {"hold": None, "terminal": False, "answer": usr1_at(0)},
    "a terminal": {"hold": None, "terminal": True, "answer": usr1_at(0)},
    "for a time": {"hold": 2.5, "terminal": True, "answer": usr1_at(0)},
    "not at all": {"hold": 0.0, "terminal": False, "answer": usr1_at(0)},
    "resumed": {"hold": None, "terminal": True, "answer": usr1_at(3)},
    "resumed in time": {"hold": 2.5, "terminal": False, "answer": usr1_at(24)},
}


def test_how_long_a_guest_is_held_that_may_run_elsewhere(monkeypatch, capsys) -> None:
    lines = []
    for name, how in HELD.items():
        with monkeypatch.context() as patch:
            lines += [name, f"  {held(patch, **how)}", f"  {capsys.readouterr().err}"]
    as_seen("asked/held.txt", "\n".join(lines).replace(f"-USR1 {os.getpid()}", "-USR1 PID"))


@pytest.mark.parametrize(
    ("failures", "attempts", "cancelled", "decided", "tried"),
    [
        ([None], 3, False, None, 1),
        ([StreamError("it broke"), None], 3, False, None, 2),
        ([StreamError("it broke")] * 3, 3, False, None, 3),
        ([StreamError("it broke")], 1, False, None, 1),
        ([StreamError("it broke")] * 2, 3, True, None, 1),
        ([HandoverError("who knows")], 3, False, False, 1),
        ([HandoverError("who knows"), None], 3, False, True, 2),
        ([HandoverError("who knows")] * 2, 2, False, True, 2),
    ],
)
def test_what_is_tried_again(failures, attempts, cancelled, decided, tried, monkeypatch, capsys) -> None:
    cancel, made = threading.Event(), []
    if cancelled:
        cancel.set()
    monkeypatch.setattr(migrate, "_decided", lambda *_: decided)
    monkeypatch.setattr(migrate, "_display", nullcontext)

    def attempt(_tell: object) -> Any:
        made.append(SimpleNamespace(failure=failures[len(made)]))
        return made[-1]

    done = migrate._attempts(SimpleNamespace(), attempts, attempt, cancel, None)  # type: ignore[arg-type]
    assert (len(made), done) == (tried, made[-1])
    said = [f"hwdbm: {failure}; trying again" for failure in failures[: tried - 1]]
    assert capsys.readouterr().err.splitlines() == said


AGREED = [
    Agreement(["a", "b"], states=1234),
    Agreement(["a"], ["b", "c"], {"d": "it has a loop", "e": "no condition"}, ["f", "g"], 5),
]


@pytest.mark.parametrize("found", AGREED)
def test_what_is_said_of_verdicts(found: Agreement) -> None:
    as_seen(f"texts/litmus-{len(found.differ)}.txt", races._agreement(found, 3))


@pytest.mark.parametrize("as_json", [True, False])
@pytest.mark.parametrize(
    "migration", [None, {"status": "completed"}, {"status": "failed", "error": "it broke"}, {"status": "cancelled"}]
)
def test_what_is_said_of_snapshots_and_a_migration_beside_them(migration, as_json, monkeypatch, capsys) -> None:
    chain: Any = SimpleNamespace(folder="chain", snapshots=list)
    monkeypatch.setattr(snapshot, "_entry", lambda _chain, each: {"id": each})
    monkeypatch.setattr(snapshot, "_table", lambda entries, _known: repr(entries))
    fails = migration is not None and migration["status"] != "completed"
    with pytest.raises(snapshot.typer.Exit) if fails else nullcontext():
        snapshot._say_taken(chain, ["a", "b"], paused=[0.0125, 1.5], migration=migration, as_json=as_json)  # type: ignore[list-item]
    out, err = capsys.readouterr()
    entries = [{"id": "a", "paused": 12.5}, {"id": "b", "paused": 1500.0}]
    if as_json:
        report = {"folder": "chain", "snapshots": entries}
        assert json.loads(out) == report | ({} if migration is None else {"migration": migration})
    else:
        said = [] if migration is None else [f"the migration {migration['status']}"]
        assert out.splitlines() == [repr(entries), *said]
    why = f"hwdbm: the migration {migration['status']}: {migration.get('error', '')}\n" if fails else ""
    assert err.split() == why.split()
