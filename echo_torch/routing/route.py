"""How a batch that was checked reaches a client: as a block into our own ring, or row by row through another's."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Protocol

from echo_torch.client.tcp_client import Client, TcpClient
from echo_torch.errors import ConnectionClosedError, DeliveryTimeoutError
from echo_torch.metrics.stats import Counts, PeerCounts
from echo_torch.metrics.timing import Times
from echo_torch.samples.spec import Match, SampleSpec
from echo_torch.support.deadline import Deadline
from echo_torch.support.interrupts import owned_by_this_thread


class Route(Protocol):
    """One open client, as `EchoSink` uses it. Timeouts are seconds, None for no limit."""

    def counts(self) -> Counts:
        """What became of the samples."""

    def progress(self) -> tuple[int, int]:
        """How many samples were sent, and how many of them are acked as far as was noted."""

    def check(self) -> None:
        """Take note of acks; raises ConnectionClosedError if the connection has ended with samples un-acked."""

    def times(self) -> Times:
        """Where the time went; with a client that does not tell, ``send`` was blocked by the learner all along."""

    def peer_counts(self) -> list[PeerCounts]:
        """Of each learner."""

    @property
    def closed(self) -> bool:
        """Whether nothing more can be sent, as far as is known."""

    def send(self, match: Match, timeout: float | None) -> None: ...

    def wait(self, timeout: float | None) -> None: ...

    def close(self, timeout: float | None) -> None: ...


class TcpClientRoute:
    """Blocks of rows into a `TcpClient`."""

    def __init__(self, client: TcpClient) -> None:
        self.client = client
        self.progress = client.progress
        self._closing = self._lost = False

    def counts(self) -> Counts:
        return self.client.counts()

    def peer_counts(self) -> list[PeerCounts]:
        return [PeerCounts.from_counts(self.counts(), self._lost if self._closing else self.closed)]

    def send_packed(self, rows: memoryview, most: int) -> int:
        """At the most so many samples that are packed already, without waiting; gives how many were accepted."""
        try:
            return self.client.send_packed(rows, most=most, timeout=0.0)
        except (ConnectionClosedError, DeliveryTimeoutError) as error:
            return error.rows_accepted

    def check(self) -> None:
        if self.client.closed:
            with contextlib.suppress(DeliveryTimeoutError):  # being closed just now
                self.client.wait(0.0)

    def times(self) -> Times:
        return self.client.times()

    @property
    def closed(self) -> bool:
        return self.client.closed

    def send(self, match: Match, timeout: float | None) -> None:
        self.client.send_match(match, timeout=timeout)

    def wait(self, timeout: float | None) -> None:
        self.client.wait(timeout)

    def close(self, timeout: float | None) -> None:
        if not self._closing:
            self._lost = self.closed
            self._closing = True
        self.client.close(timeout)


class OtherClientRoute:
    """Sample after sample into any `Client`, by one thread at a time: the stock client mixes the bytes of two.

    Such a client knows no timeouts: they are looked at between samples, and `wait` and `close` take as long as the
    client's do. What is delivered is what that client delivers.
    """

    def __init__(self, client: Client, spec: SampleSpec, peer: str) -> None:
        self._client = client
        self._spec = spec
        self._peer = peer
        self._send_lock = threading.RLock()
        self._close_lock = threading.RLock()
        self._acked = 0
        self._sent = 0
        self._lost = False
        self._closed = False
        self._started_at = time.monotonic()
        self._ended_at: float | None = None
        self._send_seconds = 0.0

    def times(self) -> Times:
        connected = (self._ended_at or time.monotonic()) - self._started_at if self._sent else 0.0
        return Times(connected=connected, sending=self._send_seconds, blocked=(self._send_seconds, 0.0, 0.0, 0.0))

    def peer_counts(self) -> list[PeerCounts]:
        return [PeerCounts.from_counts(self.counts(), self._lost)]

    @property
    def closed(self) -> bool:
        return self._closed or self._lost

    def counts(self) -> Counts:
        """Such a client tells nothing of what comes after ``wait``."""
        unacked = self._sent - self._acked
        return Counts(sent=self._sent, unacked=unacked, maybe_lost=unacked if self.closed else 0)

    def progress(self) -> tuple[int, int]:
        return self._sent, self._acked

    def check(self) -> None:
        """Such a client tells of acks only by waiting for all of them."""
        if self._sent > self._acked and not self._closed:
            self.wait(None)

    def send(self, match: Match, timeout: float | None) -> None:
        deadline = Deadline(timeout)
        started_at = time.monotonic()
        done = 0
        if owned_by_this_thread(self._send_lock):
            raise RuntimeError("send() was called by a signal handler that interrupted send() in the same thread")
        try:
            with self._send_lock:
                arrays = self._spec.to_host(match)
                for done in range(match.rows):
                    if deadline.expired and done:
                        raise DeliveryTimeoutError(f"{self._peer}: send() not done within {timeout:g} s")
                    leaves = [array[done, ...] for array in arrays] if match.batched else arrays
                    self._client.send(self._spec.unflatten(leaves))
                    self._sent += 1
        except (ConnectionError, DeliveryTimeoutError) as error:
            raise self._translate(error, done) from error
        finally:
            self._send_seconds += time.monotonic() - started_at

    def wait(self, timeout: float | None) -> None:
        sent_before = self._sent
        try:
            self._client.wait()
        except ConnectionError as error:
            raise self._translate(error, 0) from error
        self._acked = max(self._acked, sent_before)

    def close(self, timeout: float | None) -> None:
        with self._close_lock:  # who closes it at the same time waits for the end as well
            if self._closed:  # not every client's `wait` returns after its `close`
                return
            self._closed = True
            try:
                self.wait(timeout)
            finally:
                self._client.close()
                self._set_ended()

    def _set_ended(self) -> None:
        self._ended_at = self._ended_at or time.monotonic()

    def _translate(self, error: Exception, done: int) -> ConnectionClosedError | DeliveryTimeoutError:
        """The client's error as one of ours, with the counts."""
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


class UnreachableRoute:
    """To a learner that could not be connected to, where others take its share."""

    closed = True

    def __init__(self, peer: str) -> None:
        self._peer = peer

    def peer_counts(self) -> list[PeerCounts]:
        return [PeerCounts(lost=1)]

    def counts(self) -> Counts:
        return Counts()

    def progress(self) -> tuple[int, int]:
        return 0, 0

    def times(self) -> Times:
        return Times()

    def check(self) -> None:
        """Nothing was sent."""

    def send(self, match: Match, timeout: float | None) -> None:
        raise ConnectionClosedError(f"{self._peer}: could not be connected to")

    def wait(self, timeout: float | None) -> None:
        """For nothing."""

    def close(self, timeout: float | None) -> None:
        """Nothing is open."""
