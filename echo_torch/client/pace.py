"""How long acks may lie unread: to be woken for every few of them costs more than the samples did.

The kernel cannot be told to wake us for more than some ten: the server has no more under way before we read or send
(`pump`). What it sends meanwhile it sends at once then. So while rows wait for nothing but the window, the I/O thread
sleeps for a time in which, as fast as acks came in last, only a share of the window will be acked.
"""

from __future__ import annotations

import time

# At most this share of the window may be acked while the I/O thread sleeps, so that the server does not run dry.
SHARE = 4
# Seconds: below the first, sleeping costs more than it saves; above the second, it would save hardly more.
LEAST_S = 0.0001
MOST_S = 0.002


class Pace:
    """How fast acks come in, for a window of ``window`` rows."""

    def __init__(self, window: int) -> None:
        self._window = window
        self._acked = 0
        self._at = time.monotonic()

    def nap(self, acked: int) -> float:
        """Seconds that may pass before the next look, if only acks matter; to be asked after every look."""
        now = time.monotonic()
        came, took = acked - self._acked, now - self._at
        if not came:  # too early to tell, or nothing to hurry for: the next one that comes shall wake us
            return 0.0
        self._acked, self._at = acked, now
        seconds = min(MOST_S, took * self._window / (SHARE * came))
        return seconds if seconds >= LEAST_S else 0.0
