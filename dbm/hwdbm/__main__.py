"""The process of the command: ``hwdbm``, and ``python -m hwdbm``."""

import _signal  # type: ignore[import-not-found]  # it is built in; `signal` would take 4 ms
import os
import sys


def _interrupted(*_: object) -> None:
    try:
        os.write(2, b"hwdbm: interrupted\n")
    finally:
        os._exit(130)


# From here on an interrupt is answered, also during the imports that follow; nohup ignores some.
for _number in (_signal.SIGINT, _signal.SIGTERM, _signal.SIGHUP):
    if _number == _signal.SIGINT or _signal.getsignal(_number) != _signal.SIG_IGN:
        _signal.signal(_number, _interrupted)

# For -m Python puts the current folder first, where any file could take the place of a library.
if __name__ == "__main__" and not sys.flags.safe_path:
    del sys.path[0]

from hwdbm.cli import interrupt  # noqa: E402

interrupt.install()

from hwdbm.cli import main  # noqa: E402

__all__ = ["main"]

if __name__ == "__main__":
    main()
