"""When and how often to reconnect after a loss, and when to give up.

* A connection is useful if it gets a new ack, or has nothing to send. The allowed time starts when a useful connection
  is lost. The loss of any other connection does not start it again. Otherwise the client would try forever if a server
  accepts every connection and serves none.
* The first try comes at once, the next ones after growing pauses. If a new connection is lost soon, and without a new
  ack, the pauses keep growing.
* Only an error that may pass leads to another try. A peer that is no echo server, or that expects other samples, ends
  the tries. Files of `TLS` that are just being replaced do not.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

from echo_torch.errors import LearnerGoneError
from echo_torch.support.backoff import Backoff
from echo_torch.support.deadline import POLL_INTERVAL_S, Deadline, RevocableDeadline
from echo_torch.wire.connect import is_transient
from echo_torch.wire.tls import TLSFileError

# Seconds between tries: the first pause and the longest. After a hiccup, nobody notices the first. With the longest, a
# learner's host that starts again after it lost a thousand actors can bear all their tries.
BACKOFF_S = (0.05, 5.0)
# How many tries must at least fit into the allowed time.
MIN_TRIES = 4

Dial = Callable[[Deadline], socket.socket]
"""Opens a connection that is ready for samples, before the deadline; raises as `TcpClient` does."""


class Reconnector:
    """Reconnects with ``dial`` after a loss.

    Args:
        dial: opens one connection.
        give_up_after_s: seconds to keep trying after each loss.
        try_timeout: most seconds for one try; None for no limit.
    """

    def __init__(self, dial: Dial, give_up_after_s: float, try_timeout: float | None) -> None:
        # Seconds to keep trying after each loss.
        self.give_up_after_s = give_up_after_s
        # Tries since the connection was lost.
        self.tries = 0
        # Opens one connection.
        self._dial = dial
        # Most seconds for one try; None for no limit.
        self._try_timeout = try_timeout
        # When the last useful connection was lost: the allowed time starts here.
        self._lost_at = 0.0
        # When the current connection was opened.
        self._opened_at = time.monotonic()
        # Seconds between tries, the first pause and the longest: BACKOFF_S, or less if the allowed time is short, so
        # that MIN_TRIES fit into it.
        self._backoff_range = (
            min(BACKOFF_S[0], give_up_after_s / MIN_TRIES),
            min(BACKOFF_S[1], give_up_after_s / MIN_TRIES),
        )
        # The pauses between tries; None until the first try after a good connection.
        self._backoff: Backoff | None = None

    def connection_lost(self, was_useful: bool, made_progress: bool) -> None:
        """Record that the connection was lost.

        Args:
            was_useful: whether a new row was acked on it, or it had no rows to send.
            made_progress: whether a row was acked on it that was not acked before.
        """
        self.tries = 0
        now = time.monotonic()
        # A good connection made progress, or lasted longer than the longest pause. After one, begin without a pause.
        if made_progress or now - self._opened_at > self._backoff_range[1]:
            self._backoff = None
        if was_useful or self._backoff is None:
            self._lost_at = now

    @property
    def seconds_lost(self) -> float:
        """Seconds since the last useful connection was lost."""
        return time.monotonic() - self._lost_at

    def connect(self, should_give_up: Callable[[], bool], gone_after: float | None = None) -> socket.socket:
        """Try until a connection is open, the allowed time has passed, or ``should_give_up()`` returns True.

        Args:
            should_give_up: called often.
            gone_after: seconds of refused tries after which the peer counts as gone, also if the allowed time is
                shorter; None for never.

        Raises:
            LearnerGoneError: the peer is gone.
            OSError, TLSFileError: the error of the last try, or one that does not pass.
            HandshakeError, SpecMismatchError: another peer is there now, or it refuses our certificate.
        """
        # Another thread may have found the loss some time ago. The time until now does not count.
        if self._backoff is None:
            self._lost_at = time.monotonic()
        deadline = RevocableDeadline(max(0.0, self._lost_at + self.give_up_after_s - time.monotonic()), should_give_up)
        last_error: OSError | TLSFileError = TimeoutError("no time was left to connect")
        refused_since: float | None = None
        while self._wait_for_next_try(deadline):
            self.tries += 1
            try:
                sock = self._dial(deadline.within(self._try_timeout))
            except (OSError, TLSFileError) as error:
                if isinstance(error, OSError) and not is_transient(error, was_connected=True):
                    raise
                last_error = error
                # A server that is closing may still accept a connection and end it. So refusals count from the first of
                # the latest ones.
                if not isinstance(error, ConnectionRefusedError):
                    refused_since = None
                elif gone_after is not None:
                    refused_since = refused_since or time.monotonic()
                    if time.monotonic() - refused_since >= gone_after:
                        break
            else:
                self._opened_at = time.monotonic()
                return sock
        if refused_since is not None and not should_give_up():
            raise LearnerGoneError(f"it closed the connection {self.seconds_lost:.1f} s ago")
        try:
            raise last_error
        finally:
            # The error's traceback refers to this frame, and this frame to the error. Break the cycle, because it would
            # keep the frame and all that it refers to alive.
            del last_error

    def _wait_for_next_try(self, deadline: Deadline) -> bool:
        """Pause before the next try. Return False if the deadline passes first: a try could then only time out."""
        pause = Deadline(0.0 if self._backoff is None else self._backoff.next_delay())
        self._backoff = self._backoff or Backoff(*self._backoff_range)
        while not pause.expired and not deadline.expired:
            time.sleep(min(pause.remaining(), deadline.remaining(), POLL_INTERVAL_S))
        return not deadline.expired
