"""The process of the command: ``hwdbm``, and ``python -m hwdbm``."""

import sys

# For -m Python puts the current folder first, where any file could take the place of a library.
if __name__ == "__main__" and not sys.flags.safe_path:
    del sys.path[0]

from hwdbm.cli import interrupt

# From here on an interrupt is answered, also during the imports that follow.
interrupt.install()

from hwdbm.cli import main  # noqa: E402

__all__ = ["main"]

if __name__ == "__main__":
    main()
