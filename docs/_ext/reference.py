"""Pages made from the program: its commands, the workloads, and the JSON that commands print.

They are Markdown, written into docs/commands and docs/json before Sphinx reads the sources.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields
from importlib import import_module
from pathlib import Path
from typing import Any

import typer
from numpydoc.docscrape import ClassDoc

import hwdbm.cli
from hwdbm.cli.app import app
from hwdbm.cli.example import EXAMPLES
from hwdbm.machine import workload
from hwdbm.machine.workload import WORKLOADS

DOCS = Path(__file__).parents[1]
SCHEMAS = DOCS / "schemas"

# What a value is, by the word that stands for it.
VALUES = {
    "SIZE": "bytes; `K`, `M`, `G`, `T` are powers of 1024, as in `4K` or `1.5G`",
    "ADDRESS": "a guest-physical address in bytes, decimal or with `0x`",
    "VALUE": "the register, decimal or with `0x`",
    "ID:GPA:SIZE": "a number, an address in bytes, a size in bytes, as in `0:0x80000000:1G`",
    "MS": "milliseconds",
    "SECONDS": "seconds",
    "PERCENT": "percent, 0 to 100",
    "NUMBER": "a number",
    "NAME": "a name of the list",
    "NAME[,OPTION=NUMBER]...": "[a workload](workloads.md)",
    "HOST:PORT": "as in `localhost:4444` or `[::1]:4444`",
    "HOST:PORT|unix:PATH": "as in `localhost:4444`, `[::1]:4444` or `unix:/run/guest`",
    "ID:FILE": "a number and a file, as in `0:slot0.bitmap`",
    "KIND": "a word of the list",
    "MODULE:PROTOCOL": "a Python module, and a name in it",
    "DIR": "a folder",
    "PATH": "a path",
    "IMAGE": "a file",
    "BASE": "a file or a folder",
    "A": "a file",
    "B": "a file",
    "DIFF": "a file",
}


def offered() -> dict[str, list[str]]:
    """Return the names that each module of api.md offers: by its ``__all__``, or because it defines them, and once."""
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    listed = re.findall(r"^ +(hwdbm[.\w]*)$", text, re.MULTILINE)
    found: dict[str, list[str]] = {}
    for name in listed:
        module = import_module(name)
        names = getattr(module, "__all__", None)
        if names is None:
            names = [each for each, value in vars(module).items() if getattr(value, "__module__", None) == name]
        package = name.rpartition(".")[0]
        found[name] = [each for each in names if each not in found.get(package, ())]
    return found


def forget(*_: object) -> None:
    """Remove the pages that autosummary made of what isn't there, or isn't listed, any more."""
    names = offered()
    for old in (DOCS / "api").glob("*.rst"):
        module, _, name = old.stem.rpartition(".")
        if old.stem in names:  # a module, whose list is read before it is made anew
            listed = re.findall(r"^   (\w+)$", old.read_text(encoding="utf-8"), re.MULTILINE)
            gone = bool(set(listed) - set(names[old.stem]))
        else:
            gone = name not in names.get(module, ())
        if gone:
            old.unlink()


def write(*_: object) -> None:
    """Write all of the pages; one that is as it was keeps its date, so that Sphinx builds nothing again."""
    pages = dict(_commands()) | {"commands/workloads.md": _workloads()} | dict(_jsons())
    for folder in ("commands", "json"):
        for old in (DOCS / folder).glob("*.md"):
            if f"{folder}/{old.name}" not in pages:
                old.unlink()
    for name, text in pages.items():
        path = DOCS / name
        path.parent.mkdir(exist_ok=True)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


# --- commands ----------------------------------------------------------------------------------------------


def leaves(group: Any, prefix: str = "hwdbm") -> Iterator[tuple[str, Any]]:
    """Yield each command with its whole name."""
    for name in group.list_commands(None):
        command = group.get_command(None, name)
        if command.hidden:
            continue
        if hasattr(command, "list_commands"):
            yield from leaves(command, f"{prefix} {name}")
        else:
            yield f"{prefix} {name}", command


def statuses() -> dict[int, str]:
    """Return what each exit status means, as the command's own text has it."""
    text = " ".join((hwdbm.cli.__doc__ or "").split()).partition("Exit status: ")[2].rstrip(".")
    found = dict(re.fullmatch(r"(\d+) (.*)", each).groups() for each in text.split(", "))  # type: ignore[union-attr]
    return {int(status): meaning for status, meaning in found.items()}


def slug(name: str) -> str:
    """Return the name of a command's page, ``snapshot-rebase`` for ``hwdbm snapshot rebase``."""
    return "-".join(name.split()[1:])


def _commands() -> Iterator[tuple[str, str]]:
    commands = list(leaves(typer.main.get_command(app)))
    lines = [
        "# Commands",
        "",
        "Made from the program itself, so it is what `--help` says, with the units beside it.",
        "",
        _table([("command", "what it does"), *((f"[`{n}`]({slug(n)}.md)", _summary(c)) for n, c in commands)]),
        "## What all have in common",
        "",
        (
            "The result goes to standard output, everything else to standard error. With `--json` the result is one "
            "object, whose [schema](../json.md) the tests check. `-h` and `--help` print a command's options, "
            "`hwdbm --version` the version."
        ),
        "",
        _table([("exit status", "meaning"), *((f"`{status}`", meaning) for status, meaning in statuses().items())]),
        "A failure is one line on standard error, never a traceback: [errors, with what to do](../errors.md).",
        "",
        "## Images by name",
        "",
        (
            "Where a command takes an image, `example:NAME` is one that hwdbm brings. What the guests wrote was "
            "recorded while they ran, so `hwdbm harvest --check` says whether the answer is right."
        ),
        "",
        _table([("name", "what it is"), *((f"`example:{n}`", _escaped(what)) for n, (_, what) in EXAMPLES.items())]),
        *_toctree([slug(name) for name, _ in commands] + ["workloads"]),
    ]
    yield "commands/index.md", "\n".join(lines)
    for name, command in commands:
        yield f"commands/{slug(name)}.md", _command(name, command)


def _summary(command: Any) -> str:
    return _plain(command.help).partition("\n\n")[0].replace("\n", " ")


def _plain(text: str | None) -> str:
    return (text or "").replace("\b", "").strip()


def _command(name: str, command: Any) -> str:
    parameters = [each for each in command.params if not getattr(each, "hidden", False) and each.name != "help"]
    arguments = [each for each in parameters if each.param_type_name == "argument"]
    options = [each for each in parameters if each.param_type_name == "option"]
    usage = " ".join([name, *(["[OPTIONS]"] if options else []), *map(_argument, arguments)])
    lines = [f"# {name}", "", _escaped(_plain(command.help)), "", "```text", usage, "```", ""]
    if arguments:
        rows = [(f"`{each.metavar.strip('[]')}`", _value(each), _escaped(_help(each))) for each in arguments]
        lines += ["## Arguments", "", _table([("argument", "value", "what it is"), *rows])]
    if options:
        lines += ["## Options", "", *(line for each in options for line in _option(each))]
    lines += [_epilog(command.epilog)]
    lines += ["## Exit status", "", "; ".join(f"`{s}` {m}" for s, m in statuses().items()) + ".", ""]
    if (SCHEMAS / f"{slug(name)}.json").exists():
        lines += [f"What `--json` prints: [its keys and units](../json/{slug(name)}.md).", ""]
    return "\n".join(lines)


def _argument(argument: Any) -> str:
    text = f"{argument.metavar.strip('[]')}{'...' if argument.nargs == -1 else ''}"
    return text if argument.required else f"[{text}]"


def _option(option: Any) -> list[str]:
    """Return an option as an entry of a definition list."""
    value, default = _value(option), _default(option)
    facts = [f"*Value:* {value}." if value else "", f"*Default:* {default}." if default else ""]
    return [
        _spelt(option),
        f": {_escaped(_help(option))}",
        "",
        *(["  " + " ".join(filter(None, facts)), ""] if any(facts) else []),
    ]


def _spelt(option: Any) -> str:
    names = [*option.opts, *option.secondary_opts]
    value = "" if option.is_flag or not option.metavar else f" {option.metavar}"
    return ", ".join(f"`{name}{value}`" for name in sorted(names, key=lambda each: not each.startswith("--")))


def _value(parameter: Any) -> str:
    metavar = parameter.metavar.strip("[]") if parameter.param_type_name == "argument" else parameter.metavar
    if getattr(parameter, "is_flag", False):
        return ""
    if metavar.startswith("FILE"):
        kinds = metavar.removeprefix("FILE").split("|")
        return "a file" + (f", {' or '.join(f'`{kind}`' for kind in kinds)}" if kinds != [""] else "")
    if metavar not in VALUES and re.fullmatch(r"[a-z0-9-]+(\|[a-z0-9-]+)+", metavar):
        return " or ".join(f"`{word}`" for word in metavar.split("|"))
    many = "; may be given more than once" if getattr(parameter, "multiple", False) else ""
    return VALUES.get(metavar, "see the text") + many


def _default(option: Any) -> str:
    default = option.default
    if option.is_flag:
        on, off = option.opts[0], (option.secondary_opts or [None])[0]
        return f"`{on if default else off}`" if off and default is not None else ""
    return "" if default is None or not isinstance(default, str | int | float) else f"`{default}`"


def _help(parameter: Any) -> str:
    return " ".join(_plain(parameter.help).split())


def _epilog(epilog: str | None) -> str:
    """Return an epilog, in which a line that is indented by four is a command."""
    lines, code = [], False
    for line in (epilog or "").replace("\b", "").splitlines():
        is_code = line.startswith("    ")
        if is_code != code and (line.strip() or not code):
            lines += ["```sh"] if is_code else ["```", ""]
            code = is_code
        if line.strip() == "Examples:":
            lines.append("## Examples")
        elif is_code:
            # Help has no room for a long line: what is indented further belongs to the one before.
            lines.append(line[4:])
        elif not code and (line.strip() or lines[-1:] not in ([""], ["```\n"])):
            lines.append(_escaped(line.strip()))
    if code:
        lines += ["```", ""]
    text = "\n".join(lines)
    return re.sub(r"\n(    +\S)", r" \\\n\1", text)


# --- workloads ---------------------------------------------------------------------------------------------


def _workloads() -> str:
    lines = [
        "# Workloads",
        "",
        (
            "What the guest of a [modelled machine](../migration.md) does, for "
            "[`hwdbm migrate --workload`](migrate.md): a name and its options, as in `hot,share=0.01,rate=5M`. "
            "A number may end in `k`, `M` or `G`, powers of 1000. "
            "Each store is of 8 bytes. The same seed gives the same stores."
        ),
        "",
        "Every workload has `rate`, in stores a second, and `seed`, a whole number.",
        "",
    ]
    for name, kind in WORKLOADS.items():
        if kind.__module__ != workload.__name__:  # a text can't name it
            continue
        said = ClassDoc(kind, config={"show_class_members": False})
        lines += [f"## {name}", "", _escaped(" ".join([*said["Summary"], *said["Extended Summary"]])), ""]
        meaning = {each.strip(): " ".join(p.desc) for p in said["Parameters"] for each in p.name.split(",")}
        rows = [
            (f"`{each.name}`", "" if each.default in (None, MISSING) else f"`{each.default:g}`", meaning[each.name])
            for each in fields(kind)
            if each.name in meaning and each.name not in {"seed", "rate"}
        ]
        if rows:
            lines += [_table([("option", "default", "what it is"), *rows])]
    return "\n".join(lines)


# --- JSON --------------------------------------------------------------------------------------------------


def schema_names() -> list[str]:
    """Return the names of the commands that have a schema."""
    return sorted(path.stem for path in SCHEMAS.glob("*.json"))


def _jsons() -> Iterator[tuple[str, str]]:
    for name in schema_names():
        schema = json.loads((SCHEMAS / f"{name}.json").read_text(encoding="utf-8"))
        lines = [
            f"# JSON of hwdbm {name.replace('-', ' ')}",
            "",
            schema["description"],
            "",
            (
                f"[The schema as a file](../schemas/{name}.json) (JSON Schema, 2020-12). "
                f"[The command](../commands/{name}.md)."
            ),
            "",
        ]
        for heading, part in _parts(schema):
            lines += [f"## {heading}", "", part.get("description", "") if heading != "The object" else "", ""]
            required = part.get("required", [])
            rows = [
                (f"`{key}`", _kind(value), value.get("unit", ""), _presence(key, value, required))
                for key, value in part["properties"].items()
            ]
            lines += [_table([("key", "type", "unit", "what it is"), *rows])]
        yield f"json/{name}.md", "\n".join(lines)


def _parts(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    top = schema["items"] if schema["type"] == "array" else schema
    yield ("Each element" if schema["type"] == "array" else "The object"), top
    for name, part in schema.get("$defs", {}).items():
        if "properties" in part:
            yield name, part


def _kind(value: dict[str, Any]) -> str:
    if "$ref" in value:
        return f"[object](#{value['$ref'].rpartition('/')[2].lower().replace(' ', '-')})"
    if value.get("type") == "array":
        return f"array of {_kind(value['items'])}"
    if "enum" in value:
        return "one of " + ", ".join(f"`{each}`" for each in value["enum"])
    return str(value["type"])


def _presence(key: str, value: dict[str, Any], required: list[str]) -> str:
    return value["description"] + ("" if key in required else " *May be absent.*")


# --- Markdown ----------------------------------------------------------------------------------------------


def _escaped(text: str) -> str:
    # `2 * 2`, `[1]` and `slot<ID>` are text; what a docstring or a text quotes, and an option, is code.
    parts = re.split(r"``([^`]*)``", text)
    parts[::2] = [re.sub(r"([\\*_\[\]<>|`])", r"\\\1", part) for part in parts[::2]]
    parts[::2] = [re.sub(r"(?<![\w`-])(--[a-z][a-z-]*[a-z])", r"`\1`", part) for part in parts[::2]]
    parts[1::2] = [f"`{part}`" for part in parts[1::2]]
    return "".join(parts)


def _table(rows: list[tuple[str, ...]]) -> str:
    head, *body = (" | ".join(cell.replace("|", "\\|").replace("\\\\|", "\\|") for cell in row) for row in rows)
    lines = [f"| {head} |", "| " + " | ".join(["---"] * len(rows[0])) + " |", *(f"| {row} |" for row in body)]
    return "\n".join([*lines, ""])


def _toctree(pages: list[str]) -> list[str]:
    return ["```{toctree}", ":hidden:", ":maxdepth: 1", "", *pages, "```", ""]
