"""One moment on the monotonic clock that all steps of an operation share.

* A public call makes one deadline from its timeout and passes it down. A step that made its own timeout would start the
  count anew. The timeout travels with the deadline, so that messages quote what the user passed.
* A wait may end early. Code that waits checks the deadline again and continues, so waits can be cut to any length.
* Python and the system calls reject waits that are infinite or too long. `clamp_timeout` cuts them.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

from .validation import check_timeout

# The longest wait in seconds that ``lock.acquire`` and ``poll`` accept. Code that waits longer starts another wait.
_LONGEST_WAIT_S = min(threading.TIMEOUT_MAX, 86_400.0)


class Deadline:
    """A moment that lies ``timeout`` seconds from now, or never comes if ``timeout`` is None.

    Raises:
        TypeError: ``timeout`` is not a number.
        ValueError: ``timeout`` is negative.
    """

    __slots__ = ("at", "timeout")

    def __init__(self, timeout: float | None) -> None:
        # The timeout that this was made from, in seconds, for messages; None for no limit.
        self.timeout = check_timeout("timeout", timeout)
        # The moment in seconds of ``time.monotonic``; infinite for never.
        self.at = math.inf if timeout is None else time.monotonic() + timeout

    def remaining(self) -> float:
        """Return how many seconds are left: at least 0, infinite for never."""
        return max(0.0, self.at - time.monotonic())

    @property
    def expired(self) -> bool:
        return time.monotonic() >= self.at

    def within(self, timeout: float | None) -> Deadline:
        """Return a deadline for one step: ``timeout`` seconds from now, or this one if that comes first.

        It is of the same kind, so a step of a revocable deadline can be revoked, too.
        """
        return self if timeout is None or self.remaining() <= timeout else Deadline(timeout)


class RevocableDeadline(Deadline):
    """A deadline that also expires as soon as ``revoked()`` returns True.

    Revoking wakes nobody. So code that waits under such a deadline waits in pieces of `POLL_INTERVAL_S`.
    """

    __slots__ = ("_revoked",)

    def __init__(self, timeout: float | None, revoked: Callable[[], bool]) -> None:
        super().__init__(timeout)
        # Returns whether the operation has become useless.
        self._revoked = revoked

    def remaining(self) -> float:
        return 0.0 if self._revoked() else super().remaining()

    @property
    def expired(self) -> bool:
        return self._revoked() or super().expired

    def within(self, timeout: float | None) -> Deadline:
        return self if timeout is None or self.remaining() <= timeout else RevocableDeadline(timeout, self._revoked)


# Seconds after which a wait that nobody can wake checks its deadline again.
POLL_INTERVAL_S = 0.05

# The deadline that does not come.
NEVER = Deadline(None)

Timeout = float | Deadline | None
"""Seconds, None for no limit, or the deadline of the outer call that this call is a step of."""


def as_deadline(timeout: Timeout) -> Deadline:
    """Return the deadline that ``timeout`` stands for; raises as `Deadline`."""
    if timeout is None:
        return NEVER
    return timeout if isinstance(timeout, Deadline) else Deadline(timeout)


def clamp_timeout(seconds: float) -> float:
    """Cut ``seconds``, which may be infinite or negative, to a wait that the operating system accepts.

    A negative wait becomes 0, because ``poll`` would wait forever.
    """
    return min(max(seconds, 0.0), _LONGEST_WAIT_S)
