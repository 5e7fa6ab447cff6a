"""What each option of each command takes, to its edge, and what it is where it isn't given."""

import inspect
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_origin

import typer
from seen import as_seen

from hwdbm.cli.app import app

EDGES = [0, 1, 2, 16, 100, 101, 4095, 4096, 4097, 1 << 31, 1 << 32, 1 << 43, 1 << 63, 1 << 64, 1 << 100]
WORDS = [
    *("", "x", "-1", *map(str, EDGES), *(f"{edge - 1}" for edge in EDGES[9:])),
    *("0.5", "1e3", "1e400", "inf", "-inf", "nan", "0x1000", "0x10000000000000000", "1_000", "٣"),
    *("1k", "4K", "64KiB", "1.2G", "2MB", "1T", "0.0001K", "8191G", "8T", "100T"),
    *("1us", "0.9us", "100ms", "1.5s", "2min", "1h", "1000000000s", "1000000001s"),
    *("0:0:4K", "5:0x40000000:1G", "32767:0:4K", "32768:0:4K", "-1:0:4K", "0:1:4K", "0:0:0", "0:0", "0:0:4K:0"),
    *("0:file", "4294967295:file", "99999999999:file", "0:", ":file", "example:4k_ipa40", "example:no"),
    *("localhost:0", "localhost:65535", "localhost:65536", "[::1]:1", "::1:1", "h:x", ":1", "unix:s", "unix:"),
    *("machine", "kvm", "arm", "hw-dbm", "ring", "abort", "ours", "qemu", "dbm", "kvm-counting", "qcow2", "zsh"),
]  # fmt: skip


def commands(command: Any = None, name: str = "hwdbm") -> Iterator[tuple[str, Any]]:
    command = typer.main.get_command(app) if command is None else command
    yield name, command
    for each in command.list_commands(None) if hasattr(command, "list_commands") else ():
        yield from commands(command.get_command(None, each), f"{name} {each}")


def read_as(parser: Any) -> tuple[str, ...]:
    """Return what an option makes of each word, and which it refuses, by the reason that it gives."""
    taken, same, refused = [], [], defaultdict[str, list[str]](list)
    for word in WORDS:
        try:
            value = parser(word)
        except typer.BadParameter as error:
            refused[error.message.replace(repr(word), "it").replace(f" {word} ", " it ")].append(word)
        else:
            if str(value) == word:
                same.append(word)
            else:
                taken.append(f"  {word!r}: {value.name if isinstance(value, Path) else repr(value)}")
    told = [f"  {why}: {' '.join(map(repr, words))}" for why, words in refused.items()]
    if len(told) == 1:
        told = [f"  others: {why}" for why in refused]
    return (f"  as they are: {' '.join(map(repr, same)) if told or taken else 'all'}", *taken, *told)


def options() -> Iterator[str]:
    readers: dict[tuple[str, ...], str] = {}
    for name, command in commands():
        yield f"{name}{' (hidden)' if command.hidden else ''}"
        for each in inspect.signature(command.callback).parameters.values() if command.callback else ():
            if get_origin(each.annotation) is not Annotated:
                continue
            (info,) = each.annotation.__metadata__
            how = "required" if each.default is inspect.Parameter.empty else f"{each.default!r} by default"
            if info.parser is not None:
                how += f", read as {readers.setdefault(read_as(info.parser), each.name)}"
            yield f"  {' '.join(info.param_decls or ()) or each.name}: {how}{', hidden' if info.hidden else ''}"
    for read, reader in readers.items():
        yield from ("", reader, *read)


def test_what_each_option_takes_was_looked_at() -> None:
    as_seen("asked/options.txt", "\n".join(options()) + "\n")
