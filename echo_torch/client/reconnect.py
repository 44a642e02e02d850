"""When and how often a lost connection is opened again, and when that is given up.

* The time that is allowed counts from the loss. A connection that is lost again before it did what there was to do does
  not begin it anew: a server that accepts everybody and serves nobody would be called for ever.
* The first try is made at once, the next ones after pauses that grow, and go on growing over connections that are lost
  soon and settled nothing new.
* Only what may pass is tried again: a peer that is no echo server, or expects other samples, is the end.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

from echo_torch.support.backoff import Backoff
from echo_torch.support.deadline import POLL_INTERVAL_S, Deadline, RevocableDeadline

# Seconds between tries, at first and at the most: not to be felt after a hiccup, and no burden for a learner's host
# that starts again and has lost a thousand actors.
BACKOFF_S = (0.05, 5.0)
# How many tries there must be time for at the least.
MIN_TRIES = 4

Dial = Callable[[Deadline], socket.socket]
"""Opens a connection that is ready for samples, before the deadline; raises as `TcpClient` does."""


class Reconnector:
    """Opens connections with ``dial``, for ``give_up_after_s`` after each loss; each try takes ``try_timeout`` at the most."""

    def __init__(self, dial: Dial, give_up_after_s: float, try_timeout: float | None) -> None:
        self.give_up_after_s = give_up_after_s
        self.tries = 0
        """Made since the connection was lost."""
        self._dial = dial
        self._try_timeout = try_timeout
        self._lost_at = 0.0
        self._opened_at = time.monotonic()
        self._backoff_range = (
            min(BACKOFF_S[0], give_up_after_s / MIN_TRIES),
            min(BACKOFF_S[1], give_up_after_s / MIN_TRIES),
        )
        self._backoff: Backoff | None = None  # None while all is well

    def connection_lost(self, was_useful: bool, made_progress: bool) -> None:
        """The connection is lost.

        Args:
            was_useful: whether it did what there was to do.
            made_progress: whether it settled anything new.
        """
        self.tries = 0
        now = time.monotonic()
        if made_progress or now - self._opened_at > self._backoff_range[1]:
            self._backoff = None
        if was_useful or self._backoff is None:
            self._lost_at = now

    @property
    def seconds_lost(self) -> float:
        """Seconds since the connection was lost from which something had come."""
        return time.monotonic() - self._lost_at

    def connect(self, should_give_up: Callable[[], bool]) -> socket.socket:
        """Try until there is a connection, the time has passed, or ``should_give_up()``, which is asked often.

        Raises:
            OSError: why the last try failed.
            HandshakeError, SpecMismatchError: the peer is another one now.
        """
        if self._backoff is None:  # the loss may have been found some time ago, by another thread
            self._lost_at = time.monotonic()
        deadline = RevocableDeadline(max(0.0, self._lost_at + self.give_up_after_s - time.monotonic()), should_give_up)
        last: OSError = TimeoutError("no time was left")
        while self._wait_for_next_try(deadline):
            self.tries += 1
            try:
                sock = self._dial(deadline.within(self._try_timeout))
            except OSError as error:
                last = error
            else:
                self._opened_at = time.monotonic()
                return sock
        try:
            raise last
        finally:
            del last  # which would keep this frame, and all that it refers to, alive

    def _wait_for_next_try(self, deadline: Deadline) -> bool:
        """Wait for the next try; gives whether there is time for it, without which it could only say so."""
        pause = Deadline(0.0 if self._backoff is None else self._backoff.next_delay())
        self._backoff = self._backoff or Backoff(*self._backoff_range)
        while not pause.expired and not deadline.expired:
            time.sleep(min(pause.remaining(), deadline.remaining(), POLL_INTERVAL_S))
        return not deadline.expired
