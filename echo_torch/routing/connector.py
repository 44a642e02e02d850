"""How a sink's connections are opened, in the process that trains and in a DataLoader's workers."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable
from typing import Any

from torch.utils.data import get_worker_info

from echo_torch.client.tcp_client import Client, TcpClient
from echo_torch.ring.ring import min_buffer_bytes, rows_in_buffer
from echo_torch.samples.spec import SampleSpec
from echo_torch.support.deadline import Deadline
from echo_torch.wire.connect import Addresses, peer_name
from echo_torch.wire.tls import TLS

from .balancer import Balancer
from .failover import Learner
from .route import OtherClientRoute, Route, TcpClientRoute, UnreachableRoute

_log = logging.getLogger(__name__)

Address = tuple[str, int]

# Seconds to connect to all of several learners, at first, where not all are needed.
FIRST_ATTEMPT_S = 1.0
# Most payload bytes un-acked at a time: more than a fast network's bandwidth-delay product, and few enough that what
# a cut may duplicate stays small.
WINDOW_BYTES = 8 * 1024 * 1024
# Host memory by default, and in each of a loader's workers, of which there may be many.
BUFFER_BYTES = 64 * 1024 * 1024
WORKER_BUFFER_BYTES = 16 * 1024 * 1024
# Seconds that `close` gives the server where it does not send the tail once more: five times as long as one took that
# was not busy.
CLOSE_LINGER_S = 0.1
# Seconds that a DataLoader's worker may try to open a lost connection again: the loader grants 5 s at its end.
WORKER_RECONNECT_S = 2.0


@dataclasses.dataclass(frozen=True)
class Connector:
    """The arguments of an `EchoSink` that its connections depend on, checked."""

    addresses: Addresses
    least_inflight: bool
    failover: bool
    make_client: Callable[..., Client]
    max_inflight_msgs: int
    buffer_bytes: int | None
    connect_timeout: float | None
    stall_timeout: float | None
    reconnect: float
    resend_acked: int
    resend_at_close: bool
    tls: TLS | None

    def check(self, spec: SampleSpec) -> None:
        """ValueError if the buffer holds too few samples, or the client cannot do what is wanted."""
        if self.tls is not None and not self._makes_tcp_client:
            raise ValueError("tls: only TcpClient has it; give the client that you have in its place its own")
        if self._makes_tcp_client:
            rows_in_buffer(spec.payload_size, self.buffer_bytes or BUFFER_BYTES, self.resend_acked)
        elif len(self.addresses) > 1 and (self.least_inflight or self.failover):
            what = "failover" if self.failover else "route='least_inflight'"
            raise ValueError(f"{what}: got client={self.make_client!r}, expected echo_torch.TcpClient")

    @property
    def acked_at_risk(self) -> int:
        """How many samples that the server acked it may discard if a connection breaks off."""
        return self.resend_acked * len(self.addresses) if self._makes_tcp_client else 0

    @property
    def learner_names(self) -> list[str]:
        """How messages name them."""
        return [peer_name(*address) for address in self.addresses]

    def open_route(self, spec: SampleSpec, timeout: float | None) -> Route:
        """Connect, in ``timeout`` seconds at the most; raises as the client does."""
        limits = [limit for limit in (self.connect_timeout, timeout) if limit is not None]
        deadline = Deadline(min(limits, default=None))
        if len(self.addresses) == 1:
            return self._open_one(spec, self.addresses[0], deadline.timeout)
        routes: dict[Address, Route] = {}
        try:
            self._open_all(spec, deadline, routes)
            learners = [Learner(routes[address]) for address in self.addresses]
            return Balancer(
                ", ".join(self.learner_names), learners, self.least_inflight, self.failover, self.stall_timeout
            )
        except BaseException:
            for route in routes.values():
                with contextlib.suppress(Exception):  # that of a client which is not ours; the others come next
                    route.close(0)
            raise

    def _open_all(self, spec: SampleSpec, deadline: Deadline, routes: dict[Address, Route]) -> None:
        """All of them; with failover, at least one."""
        problem = None
        for attempt_timeout in (FIRST_ATTEMPT_S, None) if self.failover else (None,):
            missing = [address for address in self.addresses if address not in routes]
            for number, address in enumerate(missing):
                limit = deadline.within(attempt_timeout)
                if self.failover:  # the others shall have their share of the time
                    limit = limit.within(limit.remaining() / (len(missing) - number))
                try:
                    routes[address] = self._open_one(spec, address, limit.timeout_left)
                except OSError as error:
                    if not self.failover:
                        raise
                    problem = error
        if not routes and problem is not None:
            raise problem
        for address in self.addresses:
            if address not in routes:
                _log.warning("%s: could not be connected to; the others get its share", peer_name(*address))
                routes[address] = UnreachableRoute(peer_name(*address))

    def _open_one(self, spec: SampleSpec, address: Address, timeout: float | None) -> Route:
        window = max(1, min(self.max_inflight_msgs, WINDOW_BYTES // spec.payload_size))
        arguments = (*address, spec.numpy_sample(), window)
        client = self.make_client(*arguments, **(self._client_options(spec, timeout) if self._makes_tcp_client else {}))
        if isinstance(client, TcpClient):
            return TcpClientRoute(client)
        return OtherClientRoute(client, spec, peer_name(*address))

    def _client_options(self, spec: SampleSpec, timeout: float | None) -> dict[str, Any]:
        in_worker = get_worker_info() is not None
        default = BUFFER_BYTES
        if in_worker:
            default = max(WORKER_BUFFER_BYTES, min_buffer_bytes(spec.payload_size, self.resend_acked))
        return {
            "connect_timeout": timeout,
            "stall_timeout": self.stall_timeout,
            "buffer_bytes": default if self.buffer_bytes is None else self.buffer_bytes,
            "reconnect": min(self.reconnect, WORKER_RECONNECT_S) if in_worker else self.reconnect,
            "resend_acked": self.resend_acked,
            "resend_at_close": self.resend_at_close,
            "linger": 0.0 if self.resend_at_close else CLOSE_LINGER_S,
            "retry_refused": True,
            "tls": self.tls,
        }

    @property
    def _makes_tcp_client(self) -> bool:
        """Whether the client takes our options; a function that returns a `TcpClient` has seen to them itself."""
        return isinstance(self.make_client, type) and issubclass(self.make_client, TcpClient)
