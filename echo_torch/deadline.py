"""One moment on the monotonic clock that all steps of an operation share."""

from __future__ import annotations

import math
import threading
import time

from .checks import check_timeout

# What `lock.acquire` and `poll` take at the most; a longer wait is cut here and begun again by whoever waits.
_LONGEST_WAIT_S = min(threading.TIMEOUT_MAX, 86_400.0)


class Deadline:
    """A point in time, made from a timeout in seconds (``None`` for never)."""

    __slots__ = ("at", "timeout")

    def __init__(self, timeout: float | None) -> None:
        self.timeout = check_timeout("timeout", timeout)
        self.at = math.inf if timeout is None else time.monotonic() + timeout

    def remaining(self) -> float:
        """Seconds that are left, never below 0."""
        return max(0.0, self.at - time.monotonic())

    @property
    def expired(self) -> bool:
        return time.monotonic() >= self.at


NEVER = Deadline(None)


def bounded_wait(seconds: float) -> float:
    """Cut a wait, which may be infinite, to what the operating system takes."""
    return min(seconds, _LONGEST_WAIT_S)
