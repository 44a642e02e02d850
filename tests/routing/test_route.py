"""How a sink uses a client: the counts of one that knows no timeouts, and which route is taken."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from calls import running
from peers import Peer, PeerConnection

from echo_torch import ConnectionClosedError, DeliveryTimeoutError, EchoSink, TcpClient
from echo_torch.routing.route import OtherClientRoute
from echo_torch.samples.spec import SampleSpec
from echo_torch.support.deadline import NEVER

EXAMPLE = {"index": 0}
SIZE = 8
SHORT_S = 0.2
PATIENCE_S = 30.0


class Scripted:
    """A client whose waits end when the test says so, in the order that it says."""

    def __init__(self, waits: int = 0) -> None:
        self.began = [threading.Event() for _ in range(waits)]
        self.go_on = [threading.Event() for _ in range(waits)]
        self.waits = 0
        self.closes = 0

    def send(self, data: Any, /) -> None:
        pass

    def wait(self) -> None:
        number, self.waits = self.waits, self.waits + 1
        if number < len(self.began):
            self.began[number].set()
            assert self.go_on[number].wait(PATIENCE_S)

    def close(self) -> None:
        self.closes += 1


def route_to(client: Any) -> OtherClientRoute:
    return OtherClientRoute(client, SampleSpec(EXAMPLE), "learner:7")


def send(route: OtherClientRoute, *indexes: int) -> None:
    spec = SampleSpec(EXAMPLE)
    route.send_match(spec.match({"index": np.array(indexes, np.int64)}), timeout=NEVER)


def test_a_concurrent_close_waits_for_the_first_one() -> None:
    client = Scripted(waits=1)
    route = route_to(client)
    send(route, 1)
    with running(lambda: route.close(NEVER)):
        assert client.began[0].wait(PATIENCE_S)
        with running(lambda: route.close(NEVER)) as outcomes:
            threading.Timer(SHORT_S, client.go_on[0].set).start()
        assert route.counts().unacked == 0
    assert outcomes == [None]
    assert (client.waits, client.closes) == (1, 1)


def test_overlapping_waits_never_lower_the_acked_count() -> None:
    client = Scripted(waits=2)
    route = route_to(client)
    send(route, 1)
    threads = [threading.Thread(target=route.wait, args=(NEVER,), daemon=True) for _ in range(2)]
    threads[0].start()
    assert client.began[0].wait(PATIENCE_S)
    send(route, 2, 3)
    threads[1].start()
    assert client.began[1].wait(PATIENCE_S)
    for number, unacked in ((1, 0), (0, 0)):  # the later one is the first to end
        client.go_on[number].set()
        threads[number].join(PATIENCE_S)
        assert route.counts().unacked == unacked
    assert route.counts().sent == 3


def test_a_wait_acks_only_what_was_sent_before_it() -> None:
    client = Scripted(waits=1)
    route = route_to(client)
    send(route, 1)
    thread = threading.Thread(target=route.wait, args=(NEVER,), daemon=True)
    thread.start()
    assert client.began[0].wait(PATIENCE_S)
    send(route, 2)
    client.go_on[0].set()
    thread.join(PATIENCE_S)
    assert route.counts().unacked == 1


def test_connected_time_stops_at_close() -> None:
    route = route_to(Scripted())
    send(route, 1)
    route.close(NEVER)
    connected = route.times().connected
    assert connected > 0
    assert route.times().connected == connected


def test_close_is_idempotent() -> None:
    client = Scripted()
    route = route_to(client)
    send(route, 1)
    route.close(NEVER)
    assert (client.waits, client.closes, route.closed, route.counts().unacked) == (1, 1, True, 0)
    route.close(NEVER)
    assert (client.waits, client.closes) == (1, 1)


def test_a_second_close_of_the_sink_does_not_touch_the_stock_client() -> None:
    client = Scripted()
    sink = EchoSink("learner", 7, EXAMPLE, client=lambda *_: client)
    sink.send(EXAMPLE)
    sink.close()
    sink.close()
    assert (client.waits, client.closes) == (1, 1)


def test_a_client_whose_wait_fails_is_still_closed() -> None:
    class Fails(Scripted):
        def wait(self) -> None:
            raise BrokenPipeError("gone")

    client = Fails()
    route = route_to(client)
    send(route, 1)
    with pytest.raises(ConnectionClosedError, match=r"learner:7: gone; 1 samples un-acked") as caught:
        route.close(NEVER)
    assert caught.value.unacked == 1
    route.close(NEVER)
    assert client.closes == 1


def made_by_function(host: str, port: int, data_sample: Any, max_inflight_msgs: int) -> TcpClient:
    options: dict[str, Any] = {"resend_acked": 2, "resend_at_close": True, "stall_timeout": PATIENCE_S / 3}
    return TcpClient(host, port, data_sample, min(max_inflight_msgs, 4), **options)


FACTORIES: dict[str, Callable[..., Any]] = {
    "function": made_by_function,
    "partial": functools.partial(TcpClient, resend_acked=2, resend_at_close=True, stall_timeout=PATIENCE_S / 3),
}


@pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)
@pytest.mark.usefixtures("descriptors")
def test_a_client_factory_keeps_its_timeouts_and_resend_at_close(factory: Callable[..., Any]) -> None:
    go_on = threading.Event()

    def late(conn: PeerConnection) -> None:
        conn.send_handshake({"index": np.zeros((), np.int64)})
        conn.receive(3 * SIZE)
        assert go_on.wait(PATIENCE_S)
        conn.ack(3)
        conn.receive_all(ack_every=SIZE)

    with Peer(late) as peer:
        sink = EchoSink(peer.host, peer.port, EXAMPLE, client=factory)
        sink.send({"index": np.arange(3)})
        with pytest.raises(DeliveryTimeoutError, match=r"not done within 0\.2 s"):
            sink.wait(SHORT_S)
        go_on.set()
        sink.send({"index": np.arange(3, 9)})
        sink.wait(PATIENCE_S)
        assert sink.stats().samples_acked == 9
        sink.close()
    heard = np.frombuffer(bytes(peer.connections[0].received), np.int64).tolist()
    assert heard == [*range(9), 7, 8]
