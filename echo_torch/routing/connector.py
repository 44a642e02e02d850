"""Opens a sink's connections, in the training process and in DataLoader workers.

* One learner gets a plain route, several get a `Balancer` over one route each.
* Without failover, every learner must be reachable. With failover one is enough, and each unreachable learner gets a
  `NoRoute`, so that indices stay valid.
* A worker gets less memory and less time to reconnect than the training process, because there may be many workers and
  the loader waits for them.
"""

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
from .route import NoRoute, OtherClientRoute, Route

_log = logging.getLogger(__name__)

Address = tuple[str, int]

# Seconds for the first try to connect to each learner with failover, where not all are needed.
FIRST_ATTEMPT_S = 1.0
# Most payload bytes un-acked at a time: more than a fast network's bandwidth-delay product, and few enough that a lost
# connection duplicates few samples.
WINDOW_BYTES = 8 * 1024 * 1024
# Bytes of host memory for samples by default, and in each DataLoader worker, of which there may be many.
BUFFER_BYTES = 64 * 1024 * 1024
WORKER_BUFFER_BYTES = 16 * 1024 * 1024
# Without the closing tail, seconds that `close` waits for the server to empty its queue. A server that was not busy
# took a fifth of this.
CLOSE_LINGER_S = 0.1
# Most seconds that a DataLoader worker tries to reconnect: the loader waits only 5 s for a worker to end.
WORKER_RECONNECT_S = 2.0


@dataclasses.dataclass(frozen=True)
class Connector:
    """The checked arguments of an `EchoSink` that concern its connections."""

    # Host and port of each learner.
    addresses: Addresses
    # Whether a batch goes to the learner with the fewest un-acked samples.
    least_inflight: bool
    # Whether the other learners get the share of a lost one.
    failover: bool
    # The client's class, or a function that returns a client.
    make_client: Callable[..., Client]
    # Most samples un-acked at a time, at each learner.
    max_inflight_msgs: int
    # Bytes of host memory for samples, at each learner; None for the default.
    buffer_bytes: int | None
    # Most samples accepted and not acked, at each learner; None for as many as the buffer holds.
    max_unacked: int | None
    # Whether a batch for which there is no room is dropped.
    drops_when_full: bool
    # Most seconds to connect; None for no limit.
    connect_timeout: float | None
    # Seconds without an ack after which waiting calls raise; None for no limit.
    stall_timeout: float | None
    # Seconds to try to reconnect after a loss; 0 to fail at once.
    reconnect: float
    # How many acked samples each client keeps, to send them again.
    resend_acked: int
    # Whether `close` sends these once more.
    resend_at_close: bool
    # Seconds after which a learner that ended the connection in order counts as gone; None for never.
    gone_after: float | None
    # How to speak TLS; None for plain connections.
    tls: TLS | None

    def check(self, spec: SampleSpec) -> None:
        """Check the arguments against the samples' size and the client.

        Raises:
            ValueError: the buffer is too small, or the client does not support an argument.
        """
        if self.tls is not None and not self._makes_tcp_client:
            raise ValueError("tls: only TcpClient has it; configure TLS in your own client instead")
        if self.gone_after is not None and not self._makes_tcp_client:
            raise ValueError(f"on_learner_gone='stop': got client={self.make_client!r}, expected echo_torch.TcpClient")
        if self.drops_when_full and not self._makes_tcp_client:
            raise ValueError(f"on_full='drop': got client={self.make_client!r}, expected echo_torch.TcpClient")
        if self._makes_tcp_client:
            if self.buffer_bytes is not None:
                rows_in_buffer(spec.payload_size, self.buffer_bytes, self.resend_acked)
        elif len(self.addresses) > 1 and (self.least_inflight or self.failover):
            what = "failover" if self.failover else "route='least_inflight'"
            raise ValueError(f"{what}: got client={self.make_client!r}, expected echo_torch.TcpClient")

    @property
    def acked_at_risk(self) -> int:
        """Number of acked samples that the servers may discard if their connections are lost."""
        return self.resend_acked * len(self.addresses) if self._makes_tcp_client else 0

    @property
    def learner_names(self) -> list[str]:
        """Each learner as ``host:port``, for messages."""
        return [peer_name(*address) for address in self.addresses]

    def open_route(self, spec: SampleSpec, deadline: Deadline) -> Route:
        """Connect to the learners before ``deadline`` and within ``connect_timeout``; raises as the client does."""
        deadline = deadline.within(self.connect_timeout)
        if len(self.addresses) == 1:
            return self._open_one(spec, self.addresses[0], deadline)
        routes: dict[Address, Route] = {}
        try:
            self._open_all(spec, deadline, routes)
            learners = [Learner(routes[address]) for address in self.addresses]
            return Balancer(
                ", ".join(self.learner_names), learners, self.least_inflight, self.failover, self.stall_timeout
            )
        except BaseException:
            for route in routes.values():
                # An error in a custom client's `close` must not keep the other routes open.
                with contextlib.suppress(Exception):
                    route.close(Deadline(0))
            raise

    def _open_all(self, spec: SampleSpec, deadline: Deadline, routes: dict[Address, Route]) -> None:
        """Open a route to every address; with failover, to at least one.

        Args:
            spec: what a sample is.
            deadline: when to give up.
            routes: filled one by one, so that the caller can close what is open if this raises.
        """
        problem = None
        # With failover: a short try for each, then a second round with the rest of the time for those that failed.
        for attempt_timeout in (FIRST_ATTEMPT_S, None) if self.failover else (None,):
            missing = [address for address in self.addresses if address not in routes]
            for number, address in enumerate(missing):
                limit = deadline.within(attempt_timeout)
                if self.failover:  # leave the others their share of the time
                    limit = limit.within(limit.remaining() / (len(missing) - number))
                try:
                    routes[address] = self._open_one(spec, address, limit)
                except OSError as error:
                    if not self.failover:
                        raise
                    problem = error
        if not routes and problem is not None:
            raise problem
        for address in self.addresses:
            if address not in routes:
                _log.warning("%s: could not be connected to; the others get its share", peer_name(*address))
                routes[address] = NoRoute(peer_name(*address), lost=True)

    def _open_one(self, spec: SampleSpec, address: Address, deadline: Deadline) -> Route:
        """Connect to one learner and wrap the client in the route that fits it."""
        window = max(1, min(self.max_inflight_msgs, WINDOW_BYTES // spec.payload_size))
        arguments = (*address, spec.zeroed_numpy_sample(), window)
        client = self.make_client(
            *arguments, **(self._client_options(spec, deadline) if self._makes_tcp_client else {})
        )
        if isinstance(client, TcpClient):
            return client
        return OtherClientRoute(client, spec, peer_name(*address))

    def _client_options(self, spec: SampleSpec, deadline: Deadline) -> dict[str, Any]:
        """Return the keyword arguments that only `TcpClient` takes."""
        in_worker = get_worker_info() is not None
        least = min_buffer_bytes(spec.payload_size, self.resend_acked)
        default = max(WORKER_BUFFER_BYTES if in_worker else BUFFER_BYTES, least)
        return {
            # Pass seconds and not the deadline, because a subclass of `TcpClient` may read them. Round them, because
            # messages quote them.
            "connect_timeout": None if deadline.timeout is None else round(deadline.remaining(), 3),
            "stall_timeout": self.stall_timeout,
            "buffer_bytes": default if self.buffer_bytes is None else self.buffer_bytes,
            "max_unacked": self.max_unacked,
            "reconnect": min(self.reconnect, WORKER_RECONNECT_S) if in_worker else self.reconnect,
            "resend_acked": self.resend_acked,
            "resend_at_close": self.resend_at_close,
            "gone_after": self.gone_after,
            "linger": 0.0 if self.resend_at_close else CLOSE_LINGER_S,
            "retry_refused": True,
            "tls": self.tls,
        }

    @property
    def _makes_tcp_client(self) -> bool:
        """Whether ``make_client`` is `TcpClient` or a subclass, and so takes its options.

        A function that returns a `TcpClient` does not get them: it has chosen its own.
        """
        return isinstance(self.make_client, type) and issubclass(self.make_client, TcpClient)
