"""The command `hwdbm`: one module a command. See ``hwdbm --help``.

Results go to stdout, in JSON with ``--json``; everything else goes to stderr. Exit status: 0 all is
well, 1 failure, 2 wrong usage, 3 a check found a mismatch, 130 interrupted.
"""

import sys

__all__ = ["main"]

_EXTRAS = {
    "typer": "cli",
    "rich": "cli",
    "click": "cli",
    "matplotlib": "plot",
    "elftools": "qemu",
    "distributed": "fleet",
    "zarr": "trace",
}


def main() -> None:
    """Run the command line of this process, and exit with its status.

    An error is one line on stderr, and never a traceback.
    """
    # Imports stand in functions, so that an interrupt is answered from the first one on.
    from hwdbm import files, process  # noqa: PLC0415
    from hwdbm.cli import interrupt, streams  # noqa: PLC0415

    interrupt.install(files.abandon, process.kill_children)
    streams.prepare()  # before any file is opened
    interrupt.nudge()
    status = _run()
    interrupt.ignore()
    streams.finish()
    sys.exit(status)


def _run() -> int:
    # What says what failed is here before it: where no file can be opened, it would be too late.
    from hwdbm.cli import pages, streams  # noqa: F401, PLC0415
    from hwdbm.errors import has_no_thread, in_words  # noqa: PLC0415

    try:
        streams.tame()
        from hwdbm.cli.app import run  # noqa: PLC0415

        return run()
    except streams.StdoutError as error:
        return _failed(str(error))
    except ImportError as error:
        return _not_imported(error)
    except MemoryError as error:
        return _failed(": ".join(filter(None, ("out of memory", str(error)))), error)
    except OSError as error:
        return _failed(in_words(error), error)
    except ValueError as error:  # what the library raises for bad input
        return _failed(str(error), error)
    except (Exception, SystemExit) as error:  # noqa: BLE001  # whatever it is, it ends in one line
        if has_no_thread(error):
            return _failed("the system has no room for another thread, or doesn't allow one")
        return _bug(error)


def _not_imported(error: ImportError) -> int:
    name = (error.name or "").partition(".")[0]
    if name == "hwdbm":
        return _bug(error)
    if not isinstance(error, ModuleNotFoundError):
        return _failed(f"a library that this needs can't be imported: {error}")
    extra = f": pip install 'hwdbm[{_EXTRAS[name]}]'" if name in _EXTRAS else ""
    return _failed(f"this needs {error.name}, which isn't installed{extra}", error)


def _failed(message: str, error: BaseException | None = None) -> int:
    """Say what failed, and what helps with such an error."""
    from hwdbm.cli import pages, streams  # noqa: PLC0415

    streams.note(message + ("" if error is None else pages.see(error)))
    return 1


def _bug(error: BaseException) -> int:
    if sys.flags.dev_mode:
        raise error
    return _failed(
        f"an error in hwdbm, please report it: {type(error).__name__}: {error} (PYTHONDEVMODE=1 shows its traceback)"
    )
