"""Running the command in this process."""

from clitools import run

__all__ = ["run"]
