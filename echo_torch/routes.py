"""How a batch that was checked reaches a client: as a block into our own ring, or row by row through another's."""

from __future__ import annotations

import threading
import time
from typing import Protocol

from .client import Client, TcpClient
from .deadline import Deadline
from .errors import ConnectionClosedError, DeliveryTimeoutError
from .spec import Match, SampleSpec


class Route(Protocol):
    """One open client, as `EchoSink` uses it. Timeouts are seconds, None for no limit."""

    @property
    def sent(self) -> int:
        """Samples accepted."""

    @property
    def unacked(self) -> int:
        """Samples accepted and not known to be acked."""

    @property
    def blocked_seconds(self) -> float:
        """Seconds that `send` waited for the client to take samples."""

    def send(self, match: Match, timeout: float | None) -> None: ...

    def wait(self, timeout: float | None) -> None: ...

    def close(self, timeout: float | None) -> None: ...


class RingRoute:
    """Blocks of rows into a `TcpClient`."""

    def __init__(self, client: TcpClient) -> None:
        self._client = client

    @property
    def sent(self) -> int:
        return self._client.sent

    @property
    def unacked(self) -> int:
        return self._client.in_flight

    @property
    def blocked_seconds(self) -> float:
        return self._client.blocked_seconds

    def send(self, match: Match, timeout: float | None) -> None:
        arrays = match.arrays if match.batched else [array[None] for array in match.arrays]
        self._client.send_rows(arrays, timeout=timeout)

    def wait(self, timeout: float | None) -> None:
        self._client.wait(timeout)

    def close(self, timeout: float | None) -> None:
        self._client.close(timeout)


class RowRoute:
    """Sample after sample into any `Client`, by one thread at a time: the stock client mixes the bytes of two.

    Such a client knows no timeouts: they are looked at between samples, and `wait` and `close` take as long as the
    client's do. What is delivered is what that client delivers.
    """

    def __init__(self, client: Client, spec: SampleSpec, peer: str) -> None:
        self._client = client
        self._spec = spec
        self._peer = peer
        self._turn = threading.Lock()
        self._closed = False
        self.sent = 0
        self.unacked = 0
        self.blocked_seconds = 0.0

    def send(self, match: Match, timeout: float | None) -> None:
        deadline = Deadline(timeout)
        began = time.monotonic()
        done = 0
        try:
            with self._turn:
                for done in range(match.rows):
                    if deadline.expired and done:
                        raise DeliveryTimeoutError(f"{self._peer}: send() not done within {timeout:g} s")
                    leaves = [array[done, ...] for array in match.arrays] if match.batched else match.arrays
                    self._client.send(self._spec.unflatten(leaves))
                    self.sent += 1
                    self.unacked += 1
        except (ConnectionError, DeliveryTimeoutError) as error:
            raise self._translated(error, done) from error
        finally:
            self.blocked_seconds += time.monotonic() - began

    def wait(self, timeout: float | None) -> None:
        asked = self.sent
        try:
            self._client.wait()
        except ConnectionError as error:
            raise self._translated(error, 0) from error
        self.unacked = self.sent - asked

    def close(self, timeout: float | None) -> None:
        if self._closed:  # not every client's `wait` returns after its `close`
            return
        self._closed = True
        try:
            self.wait(timeout)
        finally:
            self._client.close()

    def _translated(self, error: Exception, done: int) -> ConnectionClosedError | DeliveryTimeoutError:
        """The client's error as one of ours, with the counts."""
        text = f"{self._peer}: {error}; {self.unacked} samples un-acked"
        late = isinstance(error, DeliveryTimeoutError)
        ours = DeliveryTimeoutError(text) if late else ConnectionClosedError(text)
        ours.unacked = self.unacked
        ours.rows_accepted = done
        return ours
