"""A clock that goes only while something waits: what waits for seconds is tried without any, and to the edge."""

import time
from collections.abc import Callable
from typing import Any


class Clock:
    """It stands in for a module's `time`; after some seconds of waiting, something is done."""

    def __init__(self, after: float = 0.0, done: Callable[[], object] | None = None) -> None:
        self.passed, self._after, self._done = 0.0, after, done

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def monotonic(self) -> float:
        return 1000.0 + self.passed

    def sleep(self, seconds: float) -> None:
        self.passed += seconds
        if self._done and self.passed >= self._after:
            self._done, done = None, self._done
            done()

    def wait(self, seconds: float) -> bool:
        """As an event's that isn't set."""
        self.sleep(seconds)
        return False
