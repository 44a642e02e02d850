"""How a sink's connections are opened, in the process that trains and in a DataLoader's workers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch.utils.data import get_worker_info

from .client import Client, TcpClient, least_buffer, ring_rows
from .dial import peer_name
from .routes import RingRoute, Route, RowRoute
from .spec import SampleSpec

# Most payload bytes un-acked at a time: more than a fast network's bandwidth-delay product, and few enough that what
# a cut may duplicate stays small.
WINDOW_BYTES = 8 * 1024 * 1024
# Host memory by default, and in each of a loader's workers, of which there may be many.
BUFFER_BYTES = 64 * 1024 * 1024
WORKER_BUFFER_BYTES = 16 * 1024 * 1024
# Seconds that `close` gives the server where it does not send the tail once more: five times as long as one took that
# was not busy.
LINGER_S = 0.1
# Seconds that a DataLoader's worker may try to open a lost connection again: the loader grants 5 s at its end.
WORKER_RECONNECT_S = 2.0


@dataclasses.dataclass(frozen=True)
class Opener:
    """The arguments of an `EchoSink` that its connections depend on, checked."""

    host: str
    port: int
    make_client: Callable[..., Client]
    max_inflight_msgs: int
    buffer_bytes: int | None
    connect_timeout: float | None
    stall_timeout: float | None
    reconnect: float
    replay_acked: int
    replay_tail: bool

    def check(self, spec: SampleSpec) -> None:
        """ValueError if the buffer holds too few samples."""
        if self._ours:
            ring_rows(spec.payload_size, self.buffer_bytes or BUFFER_BYTES, self.replay_acked)

    @property
    def at_risk(self) -> int:
        """How many samples that the server acked it may discard if a connection breaks off."""
        return self.replay_acked if self._ours else 0

    def open(self, spec: SampleSpec, timeout: float | None) -> Route:
        """Connect, in ``timeout`` seconds at the most; raises as the client does."""
        window = max(1, min(self.max_inflight_msgs, WINDOW_BYTES // spec.payload_size))
        arguments = (self.host, self.port, spec.numpy_sample(), window)
        client = self.make_client(*arguments, **(self._options(spec, timeout) if self._ours else {}))
        if isinstance(client, TcpClient):
            return RingRoute(client)
        return RowRoute(client, spec, peer_name(self.host, self.port))

    def _options(self, spec: SampleSpec, timeout: float | None) -> dict[str, Any]:
        in_worker = get_worker_info() is not None
        limits = [limit for limit in (self.connect_timeout, timeout) if limit is not None]
        default = BUFFER_BYTES
        if in_worker:
            default = max(WORKER_BUFFER_BYTES, least_buffer(spec.payload_size, self.replay_acked))
        return {
            "connect_timeout": min(limits, default=None),
            "stall_timeout": self.stall_timeout,
            "buffer_bytes": default if self.buffer_bytes is None else self.buffer_bytes,
            "reconnect": min(self.reconnect, WORKER_RECONNECT_S) if in_worker else self.reconnect,
            "replay_acked": self.replay_acked,
            "replay_tail": self.replay_tail,
            "linger": 0.0 if self.replay_tail else LINGER_S,
            "retry_refused": True,
        }

    @property
    def _ours(self) -> bool:
        """Whether the client takes our options; a function that returns a `TcpClient` has seen to them itself."""
        return isinstance(self.make_client, type) and issubclass(self.make_client, TcpClient)
