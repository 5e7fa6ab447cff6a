"""Keeping to a bandwidth."""

import time
from collections.abc import Callable

__all__ = ["Limiter"]

_SLICE = 0.05  # seconds of sleep between two looks at whether to go on
_BURST = 0.02  # seconds of the bandwidth that may be made up for at once


class Limiter:
    """Lets so many bytes through in a second.

    Parameters
    ----------
    bandwidth : float, optional
        Bytes a second; None for no limit.
    """

    def __init__(self, bandwidth: float | None = None) -> None:
        if bandwidth is not None and bandwidth <= 0:
            raise ValueError(f"a bandwidth is more than 0 bytes a second, not {bandwidth}")
        self.bandwidth, self._due = bandwidth, 0.0

    def wait(self, nbytes: int, check: Callable[[], object]) -> None:
        """Return when `nbytes` may be sent; `check` is called while waiting, and ends it by raising."""
        if self.bandwidth is None:
            return
        now = time.monotonic()
        self._due = max(self._due, now - _BURST) + nbytes / self.bandwidth
        while (left := self._due - time.monotonic()) > _BURST:
            time.sleep(min(left, _SLICE))
            check()
