"""``hwdbm snapshot``: files of guest memory, and differences between them."""

import json
from pathlib import Path
from typing import Annotated

import typer

from hwdbm import snapshot as files
from hwdbm.cli import options, parse
from hwdbm.cli.streams import result

EPILOG = """Examples:

  Lay a difference over the snapshot that it is to:

\b
    hwdbm snapshot rebase guest.ram guest.diff
"""


def rebase(
    base: Annotated[
        Path,
        typer.Argument(
            parser=options.parser(parse.path), metavar="BASE", help="The file of all memory, which is changed."
        ),
    ],
    diffs: Annotated[
        list[Path],
        typer.Argument(parser=options.parser(parse.path), metavar="DIFF", help="Sparse files, the oldest first."),
    ],
    as_json: options.Json = False,
) -> None:
    """Lay differential snapshots over their base.

    Equal to what Firecracker's snapshot-editor does.

    What is data in a difference is copied; a hole leaves the base as it is. If it is
    interrupted, the base is what it was. Refused is what can't be trusted: a link, the same file twice, a diff without
    holes, and one that is older than what it would change.
    """
    sizes = files.rebase_all(base, diffs)
    copied = {str(diff): size for diff, size in zip(diffs, sizes, strict=True)}
    done = f"{base} was changed"
    if as_json:
        result(json.dumps({"base": str(base), "copied": copied}, indent=2), done)
        return
    result("\n".join(f"{diff}: {size} bytes copied to {base}" for diff, size in copied.items()), done)
