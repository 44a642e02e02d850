"""One moment on the monotonic clock that all steps of an operation share."""

from __future__ import annotations

import math
import threading
import time

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


def check_timeout(name: str, timeout: float | None) -> float | None:
    """Give ``timeout`` back if it is ``None`` or a number of seconds that is not negative."""
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
        raise TypeError(f"{name}: got {timeout!r}, expected seconds as a number, or None for no limit")
    if not timeout >= 0:
        raise ValueError(f"{name}: got {timeout!r}, expected seconds >= 0, or None for no limit")
    return timeout


def bounded_wait(seconds: float) -> float:
    """Cut a wait, which may be infinite, to what the operating system takes."""
    return min(seconds, _LONGEST_WAIT_S)
