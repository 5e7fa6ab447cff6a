"""``hwdbm races``: the protocols, explored in every order, and the known mistakes, each with its way to a lost page."""

import difflib
import importlib
import importlib.util
import sys
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from hwdbm import files
from hwdbm.cli import options, parse
from hwdbm.cli.output import columns
from hwdbm.cli.streams import json_text, note, result, width

if TYPE_CHECKING:
    from hwdbm.races import Finding, Protocol
    from hwdbm.races.litmus import Agreement

_MISMATCH = 3  # the exit status

EPILOG = """Examples:

  How a harvest without its flush loses a page:

\b
    hwdbm races no-flush --diagram no-flush.svg

  Prove the protocols, and find each known mistake:

\b
    hwdbm races

  A protocol of your own: here a clone's example, which loses a page.

\b
    hwdbm races --check docs/examples/own_harvest.py:protocol # exit status 3
"""


def _names(incomplete: str) -> list[str]:
    """Return the protocols and mistakes that a word may become."""
    from hwdbm import races as room  # noqa: PLC0415 - no other command waits for it

    return [name for name in (*room.MISTAKES, *room.PRODUCTION) if name.startswith(incomplete)]


def races(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME",
            autocompletion=_names,
            help="Only this protocol or mistake, with its counterexample.",
            show_default=False,
        ),
    ] = None,
    own: Annotated[
        str | None,
        typer.Option(
            "--check",
            metavar="MODULE:PROTOCOL",
            help="Explore a protocol of your own: an attribute of a module, or of a file that ends with .py.",
        ),
    ] = None,
    svg: Annotated[
        Path | None,
        typer.Option(
            "--diagram", parser=options.parser(parse.path), metavar="FILE.svg", help="Draw the counterexample too."
        ),
    ] = None,
    litmus: Annotated[
        Path | None,
        typer.Option(
            parser=options.parser(parse.path),
            metavar="DIR",
            help="Run herd's litmus tests in DIR and its subfolders on the modelled machine.",
        ),
    ] = None,
    kinds: Annotated[
        Path | None,
        typer.Option(
            parser=options.parser(parse.path),
            metavar="FILE",
            help="The verdicts, a test and its verdict on each line; DIR/kinds.txt by default.",
        ),
    ] = None,
    ets2: Annotated[
        bool | None,
        typer.Option(
            "--ets2/--no-ets2",
            help="Whether the processors have FEAT_ETS2, for all tests; by default, where a test says so.",
            show_default=False,
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Explore every order in which vCPUs, harvests and failures can interleave.

    The protocols of this package must be proved over all their states. Of each known mistake a
    shortest way to a lost page must be found. Exit status 3 says that one wasn't.
    """
    if sum(each is not None for each in (name, own, litmus)) > 1:
        raise typer.BadParameter("give one of NAME, --check and --litmus")
    for option, given in (("--kinds", kinds), ("--ets2", ets2)):
        if given is not None and litmus is None:
            raise typer.BadParameter(f"{option} is for --litmus")
    if svg is not None and name is None and own is None:
        raise typer.BadParameter("--diagram is for NAME or --check")
    if litmus is not None:
        _litmus(litmus, kinds, ets2=ets2, as_json=as_json)
    elif own is not None:
        report = _checked(own)
        _one(report, svg, as_json=as_json)
        if not report.proved:
            raise typer.Exit(_MISMATCH)
    elif name is not None:
        _named(name, svg, as_json=as_json)
    else:
        _all(as_json=as_json)


def _all(*, as_json: bool) -> None:
    from hwdbm import races as room  # noqa: PLC0415 - no other command waits for it
    from hwdbm.races.twenty import TWENTY  # noqa: PLC0415

    began = time.monotonic()
    protocols = [_timed(make()) for make in room.PRODUCTION.values()]
    protocols += [_timed(mistake.make(False)) for mistake in room.MISTAKES.values()]
    mistakes = [_timed(mistake.make(True)) for mistake in room.MISTAKES.values()]
    agree = sum(test.agrees() for test in TWENTY)
    if as_json:
        report: dict[str, Any] = {
            "protocols": [{"name": r.name, "states": r.states, "proved": r.proved} for r, _ in protocols],
            "mistakes": [{"name": r.name, "found": not r.proved, "steps": len(r.steps)} for r, _ in mistakes],
            "litmus": {"agree": agree, "of": len(TWENTY)},
        }
        result(json_text(report))
    else:
        rows: list[list[object]] = [["protocol", "states", "ms", ""]]
        rows += [[r.name, r.states, f"{t:.0f}", "proved" if r.proved else "NOT PROVED"] for r, t in protocols]
        result(columns(rows, left=(0, 3)) + "\n")
        rows = [["mistake", "steps", "states", "ms", ""]]
        rows += [
            [r.name, len(r.steps), r.states, f"{t:.0f}", "NOT FOUND" if r.proved else "found"] for r, t in mistakes
        ]
        result(columns(rows, left=(0, 4)) + "\n")
        states = sum(r.states for r, _ in protocols)
        result(
            f"{sum(r.proved for r, _ in protocols)} of {len(protocols)} protocols proved, over {states} states\n"
            f"{sum(not r.proved for r, _ in mistakes)} of {len(mistakes)} known mistakes found\n"
            f"the machine agrees with {agree} of {len(TWENTY)} litmus tests\n"
            f"{time.monotonic() - began:.0f} s"
        )
    if not all(r.proved for r, _ in protocols) or any(r.proved for r, _ in mistakes) or agree < len(TWENTY):
        raise typer.Exit(_MISMATCH)


def _timed(protocol: "Protocol") -> tuple["Finding", float]:
    from hwdbm.races import check  # noqa: PLC0415

    began = time.monotonic()
    return check(protocol), 1e3 * (time.monotonic() - began)


def _named(name: str, svg: Path | None, *, as_json: bool) -> None:
    from hwdbm import races as room  # noqa: PLC0415

    if name in room.MISTAKES:
        mistake = room.MISTAKES[name]
        _one(
            room.check(mistake.make(True)),
            svg,
            as_json=as_json,
            about=f"{mistake.summary} [{', '.join(mistake.cites)}]",
        )
    elif name in room.PRODUCTION:
        protocol = room.PRODUCTION[name]()
        report = room.check(protocol)
        _one(report, svg, as_json=as_json, about=protocol.summary)
        if not report.proved:
            raise typer.Exit(_MISMATCH)
    else:
        near = difflib.get_close_matches(name, [*room.MISTAKES, *room.PRODUCTION], 3)
        raise typer.BadParameter(
            f"there is no protocol or mistake {name!r}" + (f"; there is {', '.join(near)}" if near else "")
        )


def _one(report: "Finding", svg: Path | None, *, as_json: bool, about: str = "") -> None:
    from hwdbm.races import diagram, timeline  # noqa: PLC0415

    drawn = ""
    if svg is not None:
        if report.proved:
            note(f"{svg}: not written, as {report.name} has no counterexample")
        else:
            files.write(svg, diagram(report).encode())
            drawn = f"{svg} was written"
    if as_json:
        steps = [{"actor": s.actor, "text": s.text, "changed": list(s.changed)} for s in report.steps]
        found = {
            "name": report.name, "states": report.states, "proved": report.proved, "wrong": report.wrong,
            "lost-at": report.lost_at, "steps": steps,
        }  # fmt: skip
        result(json_text(found), drawn)
        return
    head = report.name + (f": {about}" if about else "")
    if report.proved:
        result(f"{head}\nproved: nothing is wrong in any of its {report.states} states")
    else:
        wide = min(width(), 100)
        wrapped = "\n".join(textwrap.wrap(head, wide))
        result(f"{wrapped}\n\n{timeline(report, wide)}", drawn)


def _checked(where: str) -> "Finding":
    """Explore a user's protocol; what its own code raises is its own error."""
    from hwdbm.races import check  # noqa: PLC0415

    protocol = _own(where)
    try:
        return check(protocol)
    except Exception as error:  # noqa: BLE001 - whatever an actor does
        _refuse(f"{where}: {type(error).__name__}: {error}")


def _own(where: str) -> "Protocol":
    """Return a user's protocol, by MODULE:PROTOCOL."""
    from hwdbm.races import Protocol  # noqa: PLC0415

    module_name, colon, attribute = where.rpartition(":")
    if not colon or not module_name or not attribute.isidentifier():
        raise typer.BadParameter(f"--check takes MODULE:PROTOCOL, not {where!r}")
    try:
        module = _from_file(Path(module_name)) if module_name.endswith(".py") else importlib.import_module(module_name)
        found = getattr(module, attribute, None)
        if callable(found):
            found = found()
    except Exception as error:  # noqa: BLE001 - whatever the user's module does
        _refuse(f"{where}: {type(error).__name__}: {error}")
    if not isinstance(found, Protocol):
        raise typer.BadParameter(
            f"{where} is {'not there' if found is None else repr(type(found).__name__)}, "
            "and has to be a hwdbm.races.Protocol, or a function that returns one"
        )
    return found


def _from_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no module")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module


def _refuse(message: str) -> NoReturn:
    note(message)
    raise typer.Exit(1)


def _litmus(folder: Path, kinds: Path | None, *, ets2: bool | None, as_json: bool) -> None:
    from hwdbm.races.litmus import compare, read_folder, read_kinds  # noqa: PLC0415

    verdicts = read_kinds((kinds or folder / "kinds.txt").read_text(encoding="utf-8"))
    if not verdicts:
        raise typer.BadParameter(f"{kinds or folder / 'kinds.txt'} has no verdict")
    found = compare(list(read_folder(folder)), verdicts, ets2=ets2)
    of = len(found.agree) + len(found.differ)
    if as_json:
        report = {
            "litmus": {"agree": len(found.agree), "of": of}, "states": found.states, "differ": found.differ,
            "unread": [{"name": name, "why": why} for name, why in found.unread.items()], "unjudged": found.unjudged,
        }  # fmt: skip
        result(json_text(report))
    else:
        result(_agreement(found, of))
    if found.differ:
        raise typer.Exit(_MISMATCH)


def _agreement(found: "Agreement", of: int) -> str:
    lines = [f"the machine agrees with {len(found.agree)} of {of} verdicts ({found.states} states)"]
    lines += [f"differs: {name}" for name in found.differ]
    if found.unread:
        lines.append(f"{len(found.unread)} tests were not read:")
        lines += [f"  {name}: {why}" for name, why in found.unread.items()]
    if found.unjudged:
        lines.append(f"{len(found.unjudged)} tests have no verdict: {', '.join(found.unjudged)}")
    return "\n".join(lines)
