"""One moment on the monotonic clock that all steps of an operation share."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

from .validation import check_timeout

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
    def timeout_left(self) -> float | None:
        """What is left as a timeout, to the millisecond, for messages have it; None for no limit."""
        return None if self.at == math.inf else round(self.remaining(), 3)

    @property
    def expired(self) -> bool:
        return time.monotonic() >= self.at

    def within(self, timeout: float | None) -> Deadline:
        """The same kind of deadline, for a step that may take ``timeout`` seconds at the most."""
        left = self.remaining()
        return Deadline(left if timeout is None else min(timeout, left))


class RevocableDeadline(Deadline):
    """A deadline that has also passed as soon as ``revoked()`` says so.

    Nobody who waits is woken by that: a wait for it is cut into pieces of `POLL_INTERVAL_S`.
    """

    __slots__ = ("_revoked",)

    def __init__(self, timeout: float | None, revoked: Callable[[], bool]) -> None:
        super().__init__(timeout)
        self._revoked = revoked

    def remaining(self) -> float:
        return 0.0 if self._revoked() else super().remaining()

    @property
    def expired(self) -> bool:
        return self._revoked() or super().expired

    def within(self, timeout: float | None) -> Deadline:
        left = self.remaining()
        return RevocableDeadline(left if timeout is None else min(timeout, left), self._revoked)


# Seconds after which a wait that nobody can wake looks at its deadline again.
POLL_INTERVAL_S = 0.05

NEVER = Deadline(None)


def clamp_timeout(seconds: float) -> float:
    """Cut a wait, which may be infinite, to what the operating system takes.

    Time that is over is none: ``poll`` would take less than none for ever.
    """
    return min(max(seconds, 0.0), _LONGEST_WAIT_S)
