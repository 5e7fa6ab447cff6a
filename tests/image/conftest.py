"""What the tests of images share."""

from clitools import run

__all__ = ["run"]
