"""The command `hwdbm`: one module a command. See ``hwdbm --help``.

Results go to stdout, in JSON with ``--json``; everything else goes to stderr. Exit status: 0 all is
well, 1 failure, 2 wrong usage, 3 a check found a mismatch.
"""

import sys

__all__ = ["main"]

_EXTRAS = {"typer": "cli", "rich": "cli", "click": "cli", "matplotlib": "plot"}


def main() -> None:
    """Run the command line of this process, and exit with its status.

    What goes wrong is one line on stderr, and never a traceback.
    """
    try:
        # Here, so that the message below can be given where the extra isn't installed.
        from hwdbm.cli.app import app  # noqa: PLC0415

        app(prog_name="hwdbm")
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        _fail(f"this needs {error.name}, which isn't installed: pip install 'hwdbm[{extra}]'")
    except MemoryError as error:
        _fail(f"out of memory: {error}")
    except OSError as error:
        what = error.strerror or str(error)
        _fail(f"{error.filename}: {what}" if error.filename is not None else what)
    except ValueError as error:  # what the library raises for bad input
        _fail(str(error))


def _fail(message: str) -> None:
    sys.stderr.write(f"hwdbm: {' '.join(message.split())}\n")
    sys.exit(1)
