"""Routes: how a checked batch reaches one client.

* A `TcpClient` is a route itself: it takes blocks of rows.
* `OtherClientRoute` passes one sample at a time to any other client.
* `NoRoute` stands for a connection that is not open yet, or to a learner that could not be reached.
"""

from __future__ import annotations

import threading
import time
from typing import Protocol

from echo_torch.client.tcp_client import Client
from echo_torch.errors import ConnectionClosedError, DeliveryTimeoutError
from echo_torch.metrics.stats import Counts, Outage, PeerCounts
from echo_torch.metrics.timing import Times
from echo_torch.samples.spec import Match, SampleSpec
from echo_torch.support.deadline import NEVER, Deadline
from echo_torch.support.interrupts import owned_by_this_thread


class Route(Protocol):
    """One or several open clients, as `EchoSink` uses them."""

    def counts(self) -> Counts:
        """Return the numbers of samples sent, un-acked, sent again, and so on."""

    def progress(self) -> tuple[int, int]:
        """Return how many samples were sent, and how many of them are known to be acked; cheaper than `counts`."""

    def poll_or_raise(self) -> None:
        """Look for acks; raise ConnectionClosedError if the connection has ended with samples un-acked."""

    def times(self) -> Times:
        """Return where the time went.

        A client that does not measure this counts all time in ``send`` as blocked by the learner.
        """

    def peer_counts(self) -> list[PeerCounts]:
        """Return the counts of each learner."""

    @property
    def closed(self) -> bool:
        """Whether nothing more can be sent, as far as is known."""

    @property
    def reconnecting(self) -> bool:
        """Whether the connection is lost and is being opened again, so that room comes only after that."""

    def outage(self) -> Outage | None:
        """Return how long no learner has been connected that a batch could go to; None while one is."""

    def send_match(self, match: Match, *, timeout: Deadline, whole: bool = False) -> None:
        """Send the samples of a batch; raises ConnectionClosedError or DeliveryTimeoutError.

        With ``whole``, raise DeliveryTimeoutError at once, and send nothing, if there is no room for all of them.
        """

    def wait(self, deadline: Deadline, /) -> None:
        """Block until everything sent is acked; raises ConnectionClosedError or DeliveryTimeoutError."""

    def close(self, deadline: Deadline, /) -> None:
        """Deliver what was sent and close; raises ConnectionClosedError or DeliveryTimeoutError."""


class OtherClientRoute:
    """Passes one sample at a time to any `Client`; delivers what that client delivers.

    * One thread at a time sends, because the stock client would mix the bytes of two.
    * Such a client has no timeouts. `send` checks its timeout between samples. `wait` and `close` take as long as the
      client does.

    Args:
        client: the client.
        spec: what a sample is.
        peer: how messages name the learner.
    """

    # Such a client does not open its connection again.
    reconnecting = False

    def __init__(self, client: Client, spec: SampleSpec, peer: str) -> None:
        # The client.
        self._client = client
        # What a sample is.
        self._spec = spec
        # How messages name the learner.
        self._peer = peer
        # Held in `send`, so that one thread at a time sends.
        self._send_lock = threading.RLock()
        # Held in `close`, so that a second caller waits for the first.
        self._close_lock = threading.RLock()
        # Samples that the client's ``wait`` has confirmed.
        self._acked = 0
        # Samples that the client's ``send`` has accepted.
        self._sent = 0
        # Whether the client has raised a ConnectionError.
        self._lost = False
        # Whether `close` was called.
        self._closed = False
        # When this route was made, by ``time.monotonic``.
        self._started_at = time.monotonic()
        # When the connection was closed or lost; None before.
        self._ended_at: float | None = None
        # Seconds that callers spent in `send`.
        self._send_seconds = 0.0

    def times(self) -> Times:
        connected = (self._ended_at or time.monotonic()) - self._started_at if self._sent else 0.0
        return Times(connected=connected, sending=self._send_seconds, blocked=(self._send_seconds, 0.0, 0.0, 0.0))

    def peer_counts(self) -> list[PeerCounts]:
        return [PeerCounts.from_counts(self.counts(), self._lost)]

    @property
    def closed(self) -> bool:
        return self._closed or self._lost

    def outage(self) -> Outage | None:
        lost_at = self._ended_at if self._lost else None
        return None if lost_at is None else Outage(time.monotonic() - lost_at, tries=0)

    def counts(self) -> Counts:
        """Return the counts; what was sent since the last ``wait`` counts as un-acked."""
        unacked = self._sent - self._acked
        return Counts(sent=self._sent, unacked=unacked, maybe_lost=unacked if self.closed else 0)

    def progress(self) -> tuple[int, int]:
        return self._sent, self._acked

    def poll_or_raise(self) -> None:
        """Wait for all acks: there is no other way to learn of them from such a client."""
        if self._sent > self._acked and not self._closed:
            self.wait(NEVER)

    def send_match(self, match: Match, *, timeout: Deadline, whole: bool = False) -> None:
        """Send the samples; ``whole`` changes nothing, because nobody knows what room such a client has."""
        started_at = time.monotonic()
        done = 0
        if owned_by_this_thread(self._send_lock):
            raise RuntimeError("send() was called by a signal handler that interrupted send() in the same thread")
        try:
            with self._send_lock:
                arrays = self._spec.to_host(match)
                for done in range(match.rows):
                    # Not before the first sample: a send whose timeout is 0 makes progress too.
                    if timeout.expired and done:
                        raise DeliveryTimeoutError(f"{self._peer}: send() not done within {timeout.timeout:g} s")
                    leaves = [array[done, ...] for array in arrays] if match.batched else arrays
                    self._client.send(self._spec.unflatten(leaves))
                    self._sent += 1
        except (ConnectionError, DeliveryTimeoutError) as error:
            raise self._translate(error, done) from error
        finally:
            self._send_seconds += time.monotonic() - started_at

    def wait(self, deadline: Deadline) -> None:
        sent_before = self._sent
        try:
            self._client.wait()
        except ConnectionError as error:
            raise self._translate(error, 0) from error
        self._acked = max(self._acked, sent_before)

    def close(self, deadline: Deadline) -> None:
        with self._close_lock:  # another thread that closes at the same time waits for the end, too
            if self._closed:  # call no client's `wait` after its `close`: not every one returns
                return
            self._closed = True
            try:
                self.wait(deadline)
            finally:
                self._client.close()
                self._set_ended()

    def _set_ended(self) -> None:
        self._ended_at = self._ended_at or time.monotonic()

    def _translate(self, error: Exception, done: int) -> ConnectionClosedError | DeliveryTimeoutError:
        """Return the client's error as one of this package's, with the counts; record a lost connection."""
        kind = DeliveryTimeoutError if isinstance(error, DeliveryTimeoutError) else ConnectionClosedError
        if kind is ConnectionClosedError:
            self._lost = True
            self._set_ended()
        ours: ConnectionClosedError | DeliveryTimeoutError
        unacked = self.counts().unacked
        ours = kind(f"{self._peer}: {error}; {unacked} samples un-acked")
        ours.unacked = unacked
        ours.rows_accepted = done
        return ours


class NoRoute:
    """A route to nowhere: that of a sink before it connects, or of a learner that could not be reached.

    Args:
        peer: how messages name the learner.
        lost: whether it counts as a lost connection.
    """

    # Nothing can be sent.
    closed = True
    reconnecting = False

    def __init__(self, peer: str = "", lost: bool = False) -> None:
        # How messages name the learner.
        self._peer = peer
        # Whether it counts as a lost connection.
        self._lost = lost
        # When this route was made, by ``time.monotonic``.
        self._made_at = time.monotonic()

    def outage(self) -> Outage | None:
        return Outage(time.monotonic() - self._made_at, tries=0) if self._lost else None

    def peer_counts(self) -> list[PeerCounts]:
        return [PeerCounts(lost=int(self._lost))]

    def counts(self) -> Counts:
        return Counts()

    def progress(self) -> tuple[int, int]:
        return 0, 0

    def times(self) -> Times:
        return Times()

    def poll_or_raise(self) -> None:
        """Do nothing: nothing was sent."""

    def send_match(self, match: Match, *, timeout: Deadline, whole: bool = False) -> None:
        raise ConnectionClosedError(f"{self._peer}: could not be connected to")

    def wait(self, deadline: Deadline) -> None:
        """Return at once: nothing was sent."""

    def close(self, deadline: Deadline) -> None:
        """Do nothing: no connection is open."""


NOT_CONNECTED: Route = NoRoute()
"""The route of a sink that has not connected yet."""
