"""`TcpClient` against scripted peers and real servers: the contract, and what it does when things go wrong."""

from __future__ import annotations

import gc
import signal
import socket
import threading
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from calls import HANG_TIMEOUT_S, Gate, alarms, check_error, eventually, running, until
from leaks import assert_threads_end
from learner_process import Learner
from peers import Peer, PeerConnection

from echo_torch import (
    ConnectionClosedError,
    DeliveryTimeoutError,
    HandshakeError,
    ProtocolError,
    SpecMismatchError,
    TcpClient,
)
from echo_torch.client.resend import ClosingTail

SAMPLE = {"id": np.zeros((), np.int64), "x": np.zeros(3, np.float32)}
SIZE = 20


def sample(number: int) -> dict[str, Any]:
    return {"id": np.array(number, np.int64), "x": np.full(3, number, np.float32)}


def numbers(payloads: bytes) -> list[int]:
    """The ids of payloads, all of which must be whole and right."""
    assert len(payloads) % SIZE == 0
    rows = np.frombuffer(payloads, np.dtype([("id", "<i8"), ("x", "<f4", 3)]))
    np.testing.assert_array_equal(rows["x"], np.repeat(rows["id"], 3).reshape(-1, 3).astype("f4"))
    return [int(number) for number in rows["id"]]


def acking(conn: PeerConnection) -> None:
    conn.send_handshake(SAMPLE)
    conn.receive_all(ack_every=SIZE)


def silent(conn: PeerConnection) -> None:
    """Reads everything and acks nothing."""
    conn.send_handshake(SAMPLE)
    conn.receive_all()


def connect(peer: Peer | Learner, *args: Any, **options: Any) -> TcpClient:
    return TcpClient("127.0.0.1", peer.port, SAMPLE, *args, **options)


# The contract.


def test_sends_payloads_in_order_and_waits_for_their_acks() -> None:
    with Peer(acking) as peer:
        with connect(peer) as client:
            for number in range(100):
                client.send(sample(number))
            client.wait()
            assert client.in_flight == 0
            assert client.counts().sent == 100
        assert numbers(peer.connections[0].received) == list(range(100))


def test_data_may_be_changed_when_send_returns() -> None:
    gate = Gate()

    def late_reader(conn: PeerConnection) -> None:
        conn.send_handshake(SAMPLE)
        gate.wait()
        conn.receive_all(ack_every=SIZE)

    with Peer(late_reader) as peer:
        with connect(peer) as client:
            data = sample(0)
            for number in range(10):
                data["id"][()] = number
                data["x"][:] = number
                client.send(data)
            data["x"][:] = -1
            gate.open()
        assert numbers(peer.connections[0].received) == list(range(10))


@pytest.mark.parametrize("window", [1, 2, 7, 32])
def test_send_blocks_at_the_window_and_goes_on_with_the_next_ack(window: int) -> None:
    gate = Gate()

    def ack_one_then_all(conn: PeerConnection) -> None:
        conn.send_handshake(SAMPLE)
        conn.receive(window * SIZE)
        gate.wait()
        conn.ack()
        conn.receive(SIZE)
        conn.ack(window)
        conn.receive_all(ack_every=SIZE)

    with Peer(ack_one_then_all) as peer, connect(peer, window) as client:
        for number in range(window):
            client.send(sample(number))
        with pytest.raises(DeliveryTimeoutError) as caught:
            client.send(sample(99), timeout=0.05)
        check_error(caught.value, DeliveryTimeoutError, client.peer, window)
        assert caught.value.rows_accepted == 0
        gate.open()
        client.send(sample(window), timeout=HANG_TIMEOUT_S)
        client.wait(HANG_TIMEOUT_S)


def test_wait_returns_only_when_everything_is_acked() -> None:
    gate = Gate()

    def ack_late(conn: PeerConnection) -> None:
        conn.send_handshake(SAMPLE)
        conn.receive(3 * SIZE)
        conn.ack(2)
        gate.wait()
        conn.ack()
        conn.receive_all(ack_every=SIZE)

    with Peer(ack_late) as peer, connect(peer) as client:
        with until(lambda: client.in_flight == 1):
            for number in range(3):
                client.send(sample(number))
        with pytest.raises(DeliveryTimeoutError) as caught:
            client.wait(0.05)
        check_error(caught.value, DeliveryTimeoutError, client.peer, 1)
        gate.open()
        client.wait(HANG_TIMEOUT_S)
        assert client.in_flight == 0


def test_wait_with_timeout_zero_only_looks() -> None:
    with Peer(acking) as peer, connect(peer) as client:
        client.wait(0)
        client.send(sample(1))
        client.wait(HANG_TIMEOUT_S)
        client.wait(0)


def test_properties() -> None:
    with Peer(acking) as peer:
        client = connect(peer)
        assert client.peer == f"127.0.0.1:{peer.port}"
        assert not client.closed
        assert "open" in repr(client)
        client.close()
        assert client.closed
        assert "closed" in repr(client)


def test_one_thread_per_connection_and_none_after_close(descriptors: None) -> None:
    before = set(threading.enumerate())
    with Peer(acking) as peer:
        listening = set(threading.enumerate())
        client = connect(peer)
        client.send(sample(0))
        client.wait()
        ours = [t for t in set(threading.enumerate()) - listening if t.name.startswith("echo_torch")]
        assert len(ours) == 1
        assert str(peer.port) in ours[0].name
        client.close()
        client.close()
        assert not ours[0].is_alive()
    assert set(threading.enumerate()) <= before


def test_rejects_what_does_not_match_and_goes_on() -> None:
    with Peer(acking) as peer:
        with connect(peer) as client:
            with pytest.raises(SpecMismatchError, match=r"Payload size 16 != expected 20.*data\['x'\].*\[2\].*\[3\]"):
                client.send({"id": np.array(1, np.int64), "x": np.zeros(2, np.float32)})
            with pytest.raises(SpecMismatchError, match=r"data\['x'\]: got torch.int32 \[3\].*astype\('float32'\)"):
                client.send({"id": np.array(1, np.int64), "x": np.zeros(3, np.int32)})
            with pytest.raises(SpecMismatchError, match=r"data\['y'\]"):
                client.send({"id": np.array(1, np.int64), "y": np.zeros(3, np.float32)})
            with pytest.raises(SpecMismatchError, match="Payload size"):
                client.send({k: np.stack([v, v]) for k, v in sample(1).items()})
            with pytest.raises(TypeError, match=r"data\['x'\]: got str"):
                client.send({"id": np.array(1, np.int64), "x": "abc"})
            client.send(sample(5))
        assert numbers(peer.connections[0].received) == [5]


def test_send_rows_checks_every_column() -> None:
    ids, xs = np.arange(4, dtype=np.int64), np.zeros((4, 3), np.float32)
    with Peer(acking) as peer:
        with connect(peer) as client:
            with pytest.raises(ValueError, match=r"\['x'\]: got float32 \[3, 3\], expected float32 \[4, 3\]"):
                client.send_rows([ids, xs[:3]])
            with pytest.raises(ValueError, match=r"\['x'\]: got float64"):
                client.send_rows([ids, xs.astype(np.float64)])
            with pytest.raises(ValueError, match="got 1, expected one for each of 2 leaves"):
                client.send_rows([ids])
            client.send_rows([ids, np.repeat(ids, 3).reshape(4, 3).astype(np.float32)])
            client.send_rows([ids[:0], xs[:0]])
        assert numbers(peer.connections[0].received) == [0, 1, 2, 3]


# Construction that fails.


@pytest.mark.parametrize(
    ("greeting", "error", "match"),
    [
        (b"HTTP/1.1 400 Bad Request", HandshakeError, "magic"),
        (b"ECHO\x02\x00\x00\x00\x00", HandshakeError, "wire version 2"),
        (b"ECHO\x01\xff\xff\xff\xff", HandshakeError, "num_arrays"),
        (b"ECHO\x01\x01\x00\x00\x00\x04\x00\x00\x00\xff\xff\xff\xff", HandshakeError, "num_dims"),
        (b"ECHO\x01\x00\x00\x00\x00", SpecMismatchError, "Server spec mismatch"),
        (
            b"ECHO\x01\x01\x00\x00\x00\x04\x00\x00\x00\x00\x00\x00\x00",
            SpecMismatchError,
            r"(?s)leaf 0.*4-byte.*\['id'\]",
        ),
        (b"ECHO", ConnectionClosedError, "after 4 bytes"),
    ],
)
def test_wrong_greetings_raise_value_errors(
    greeting: bytes, error: type[Exception], match: str, descriptors: None
) -> None:
    def greet(conn: PeerConnection) -> None:
        conn.send(greeting)
        conn.close()

    with Peer(greet) as peer, pytest.raises(error, match=match) as caught:
        connect(peer)
    assert str(peer.port) in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"data_sample": {"x": [1.0, 2.0]}}, TypeError),
        ({"data_sample": {"x": np.array([None])}}, TypeError),
        ({"data_sample": {"x": np.zeros(0)}}, ValueError),
        ({"data_sample": {}}, ValueError),
        ({"max_inflight_msgs": 0}, ValueError),
        ({"max_inflight_msgs": -1}, ValueError),
        ({"max_inflight_msgs": 1.5}, TypeError),
        ({"max_inflight_msgs": True}, TypeError),
        ({"connect_timeout": -1}, ValueError),
        ({"connect_timeout": "1"}, TypeError),
        ({"stall_timeout": float("nan")}, ValueError),
        ({"resend_acked": -1}, ValueError),
        ({"buffer_bytes": SIZE}, ValueError),
        ({"port": 0}, ValueError),
        ({"port": "80"}, TypeError),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], descriptors: None) -> None:
    with Peer(acking) as peer:
        good: dict[str, Any] = {"host": "127.0.0.1", "port": peer.port, "data_sample": SAMPLE}
        with pytest.raises(error, match=r"example|sample|0-d|" + next(iter(arguments))):
            TcpClient(**{**good, **arguments})


# The peer goes away.


def test_wait_raises_with_the_count_when_the_peer_hangs_up() -> None:
    def leave(conn: PeerConnection) -> None:
        conn.send_handshake(SAMPLE)
        conn.receive(5 * SIZE)
        conn.ack(2)
        conn.close()

    with Peer(leave) as peer:
        client = connect(peer)
        for number in range(5):
            client.send(sample(number))
        for call in (lambda: client.wait(HANG_TIMEOUT_S), lambda: client.send(sample(5))):
            with pytest.raises(ConnectionClosedError) as caught:
                call()
            check_error(caught.value, ConnectionClosedError, client.peer, 3)
        client.close()


def test_wait_raises_when_the_peer_resets() -> None:
    def reset(conn: PeerConnection) -> None:
        conn.send_handshake(SAMPLE)
        conn.receive(SIZE)
        conn.reset()

    with Peer(reset) as peer:
        client = connect(peer)
        client.send(sample(0))
        with pytest.raises(ConnectionClosedError) as caught:
            client.wait(HANG_TIMEOUT_S)
        check_error(caught.value, ConnectionClosedError, client.peer, 1)
        client.close()


@pytest.mark.parametrize("how", ["kill", "stop_server"])
def test_calls_blocked_on_a_real_server_that_ends_are_woken(how: str) -> None:
    """`send` on a full window and `wait`; the server holds no more than its queue while its learner is paused."""
    with Learner(SAMPLE, producer_queue_size=8, num_buffers=2) as learner:
        client = connect(learner, 4, buffer_bytes=64 * SIZE)
        learner.pause()

        def send_until_it_fails() -> None:
            for number in range(100_000):
                client.send(sample(number))

        with running(send_until_it_fails) as outcomes:
            with until(lambda: client.blocked_seconds > 0 or client.in_flight >= 64):
                pass
            with running(client.wait) as waited:
                getattr(learner, how)()
        assert client.in_flight > 0
        for error in (*outcomes, *waited):
            check_error(error, ConnectionClosedError, client.peer, client.in_flight)
        client.close()


def test_blocked_send_is_woken_when_the_peer_hangs_up() -> None:
    def leave(conn: PeerConnection) -> None:
        conn.send_handshake(SAMPLE)
        conn.receive(4 * SIZE)
        gate.wait()
        conn.close()

    gate = Gate()
    with Peer(leave) as peer:
        client = connect(peer, 4)
        for number in range(4):
            client.send(sample(number))
        with running(lambda: client.send(sample(4)), client.wait) as outcomes:
            gate.open()
        for error in outcomes:
            check_error(error, ConnectionClosedError, client.peer, 4)
        client.close()


def test_the_first_failure_is_the_cause_of_all_later_ones() -> None:
    def leave(conn: PeerConnection) -> None:
        conn.send_handshake(SAMPLE)
        conn.close()

    with Peer(leave) as peer:
        client = connect(peer)
        with until(lambda: client.closed):
            pass
        causes = []
        for call in (lambda: client.send(sample(0)), lambda: client.send(sample(1))):
            with pytest.raises(ConnectionClosedError) as caught:
                call()
            causes.append(caught.value.__cause__)
        assert causes[0] is causes[1] is not None
        client.close()


def test_the_descriptor_is_freed_when_the_peer_left(descriptors: None) -> None:
    def leave(conn: PeerConnection) -> None:
        conn.send_handshake(SAMPLE)
        conn.close()

    with Peer(leave) as peer:
        client = connect(peer)
        with until(lambda: client.closed):
            pass
        client.close()


@pytest.mark.parametrize(
    ("said", "match"),
    [(b"\x01\x01\x01", "got 3 acks while 2"), (b"\x01\x00", "0x00"), (b"E", "0x45")],
)
def test_a_peer_that_breaks_the_protocol_is_dropped(said: bytes, match: str) -> None:
    dropped = Gate()

    def misbehave(conn: PeerConnection) -> None:
        conn.send_handshake(SAMPLE)
        conn.receive(2 * SIZE)
        conn.send(said)
        conn.receive_all()
        dropped.open()

    with Peer(misbehave) as peer:
        client = connect(peer)
        client.send(sample(0))
        client.send(sample(1))
        with pytest.raises(ProtocolError, match=match) as caught:
            client.wait(HANG_TIMEOUT_S)
        check_error(caught.value, ProtocolError, client.peer, 2)
        dropped.wait()
        client.close()


def test_an_ack_before_any_send_drops_the_connection() -> None:
    def eager(conn: PeerConnection) -> None:
        conn.send_handshake(SAMPLE)
        conn.ack()
        conn.receive_all()

    with Peer(eager) as peer:
        client = connect(peer)
        with until(lambda: client.closed):
            pass
        with pytest.raises(ProtocolError, match="1 acks while 0") as caught:
            client.send(sample(0))
        check_error(caught.value, ProtocolError, client.peer, 0)
        client.close()


# Slow peers.


def test_a_peer_that_never_acks_is_a_timeout_and_not_the_end() -> None:
    """Nor a reason to connect again."""
    gate = Gate()

    def stall(conn: PeerConnection) -> None:
        conn.send_handshake(SAMPLE)
        conn.receive(2 * SIZE)
        gate.wait()
        conn.ack(2)
        conn.receive_all(ack_every=SIZE)

    with Peer(stall) as peer, connect(peer, 2, stall_timeout=0.1) as client:
        client.send(sample(0))
        client.send(sample(1))
        for call in (client.wait, lambda: client.send(sample(2))):
            with pytest.raises(DeliveryTimeoutError, match=r"nothing was acked for 0\.1 s") as caught:
                call()
            check_error(caught.value, DeliveryTimeoutError, client.peer, 2)
        with until(lambda: client.in_flight == 0):
            gate.open()
        client.send(sample(2))
        client.wait(HANG_TIMEOUT_S)
        assert len(peer.connections) == 1


def test_a_slow_but_steady_peer_never_stalls() -> None:
    """Each ack comes well inside `stall_timeout`, all of them together take several times as long."""

    def dribble(conn: PeerConnection) -> None:
        conn.send_handshake(SAMPLE)
        for _ in range(12):
            conn.receive(SIZE)
            time.sleep(0.05)
            conn.ack()
        conn.receive_all()

    with Peer(dribble) as peer, connect(peer, 4, stall_timeout=0.4) as client:
        for number in range(12):
            client.send(sample(number))
        client.wait()


def test_an_idle_time_does_not_count_as_a_stall() -> None:
    with Peer(acking) as peer, connect(peer, stall_timeout=0.15) as client:
        client.send(sample(0))
        client.wait()
        time.sleep(0.3)
        client.send(sample(1))
        client.wait()


def test_many_waits_at_once_after_an_idle_time_are_no_stall() -> None:
    """While nobody waits, acks pile up unread: each waiter has to look before it says that nothing was acked."""
    rows = 40
    idle = Gate()

    def every_20_ms(conn: PeerConnection) -> None:
        conn.send_handshake(SAMPLE)
        conn.receive(rows * SIZE)
        for number in range(rows):
            time.sleep(0.02)
            conn.ack()
            if number == rows // 2:
                idle.open()
        conn.receive_all()

    with Peer(every_20_ms) as peer, connect(peer, 64, stall_timeout=0.3) as client:
        for number in range(rows):
            client.send(sample(number))
        idle.wait()
        start = threading.Barrier(8)

        def wait() -> None:
            start.wait(HANG_TIMEOUT_S)
            client.wait()

        with running(*[wait] * 8) as outcomes:
            pass
        assert outcomes == [None] * 8


def test_a_huge_sample_that_is_taken_steadily_is_no_stall() -> None:
    """Its only ack comes long after `stall_timeout`; what says that the peer is alive is that it reads."""
    big = {"x": np.zeros(20_000_000, np.uint8)}
    piece = 100_000
    reading = 0.0

    def slow(conn: PeerConnection) -> None:
        nonlocal reading
        conn.send_handshake(big)
        began = time.monotonic()
        for number in range(20_000_000 // piece):
            conn.receive(piece)
            conn.received.clear()
            # The last part, which the client's system holds and the client cannot see being read, goes fast.
            if number < 130:
                time.sleep(0.015)
        conn.ack()
        reading = time.monotonic() - began
        conn.receive_all()

    stall_timeout = 1.0
    with (
        Peer(slow, receive_buffer=64 * 1024) as peer,
        TcpClient("127.0.0.1", peer.port, big, 1, stall_timeout=stall_timeout) as client,
    ):
        client.send(big)
        client.wait()
        client.send(big, timeout=HANG_TIMEOUT_S)
        with pytest.raises(DeliveryTimeoutError):
            client.close(0)
    assert reading > 1.5 * stall_timeout


def test_a_window_larger_than_the_buffer_is_the_buffer() -> None:
    with Peer(acking) as peer:
        with connect(peer, 2**40, buffer_bytes=100 * SIZE) as client:
            for number in range(1000):
                client.send(sample(number))
            client.wait(HANG_TIMEOUT_S)
        assert numbers(peer.connections[0].received) == list(range(1000))


@pytest.mark.parametrize("poller_leaves", [False, True], ids=["all stay", "the first ones give up"])
def test_all_who_wait_return_soon_after_the_last_ack(poller_leaves: bool) -> None:
    """Only one of them polls: when it is done, or gives up, another takes over, and the last ack reaches all."""
    rows, waiters = 60, 12
    ended: list[float] = []
    last = 0.0
    go = Gate()

    def dribble(conn: PeerConnection) -> None:
        nonlocal last
        conn.send_handshake(SAMPLE)
        conn.receive(rows * SIZE)
        go.wait()
        for _ in range(rows):
            time.sleep(0.01)
            conn.ack()
        last = time.monotonic()
        conn.receive_all(ack_every=SIZE)

    with Peer(dribble) as peer, connect(peer, rows) as client:
        for number in range(rows):
            client.send(sample(number))

        def wait() -> None:
            client.wait()
            ended.append(time.monotonic())

        def give_up() -> None:
            with pytest.raises(DeliveryTimeoutError):
                client.wait(0.2)

        with running(*[give_up] * 3 * poller_leaves), running(*[wait] * waiters) as outcomes:
            go.open()
        assert outcomes == [None] * waiters
        assert client.in_flight == 0
    assert max(ended) - last < 0.9


def test_threads_that_send_and_wait_by_turns_hand_over_to_each_other() -> None:
    with Peer(acking) as peer, connect(peer, 16) as client:

        def send_and_wait(thread: int) -> Callable[[], None]:
            def run() -> None:
                for number in range(100):
                    client.send(sample(thread * 100 + number))
                    client.wait(HANG_TIMEOUT_S)

            return run

        with running(*map(send_and_wait, range(6))) as outcomes:
            pass
        assert outcomes == [None] * 6
        assert client.in_flight == 0


def test_acks_in_a_clump_settle_everything() -> None:
    def clump(conn: PeerConnection) -> None:
        conn.send_handshake(SAMPLE)
        conn.receive(32 * SIZE)
        conn.ack(32)
        conn.receive_all(ack_every=SIZE)

    with Peer(clump) as peer, connect(peer) as client:
        for number in range(32):
            client.send(sample(number))
        client.wait(HANG_TIMEOUT_S)
        assert client.in_flight == 0


def test_sockets_default_timeout_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    with Peer(acking) as peer:
        before = socket.getdefaulttimeout()
        socket.setdefaulttimeout(0.05)
        try:
            with connect(peer) as client:
                client.send(sample(0))
                client.wait()
                time.sleep(0.2)
                client.send(sample(1))
                client.wait()
        finally:
            socket.setdefaulttimeout(before)


# Closing.


def test_close_delivers_what_is_in_flight() -> None:
    def slow(conn: PeerConnection) -> None:
        conn.send_handshake(SAMPLE)
        for _ in range(8):
            conn.receive(SIZE)
            time.sleep(0.01)
            conn.ack()
        conn.receive_all()

    with Peer(slow) as peer:
        client = connect(peer)
        for number in range(8):
            client.send(sample(number))
        client.close()
        with pytest.raises(ConnectionClosedError, match="closed"):
            client.send(sample(8))
        client.wait()
        assert numbers(peer.connections[0].received) == list(range(8))


def test_close_raises_with_the_count_when_nothing_is_acked(descriptors: None) -> None:
    with Peer(silent) as peer:
        client = connect(peer)
        client.send(sample(0))
        with pytest.raises(DeliveryTimeoutError) as late:
            client.close(timeout=0.05)
        check_error(late.value, DeliveryTimeoutError, client.peer, 1)
        with pytest.raises(ConnectionClosedError) as closed:
            client.wait(HANG_TIMEOUT_S)
        check_error(closed.value, ConnectionClosedError, client.peer, 1)
        client.close()


def test_close_tells_a_loss_that_nobody_was_told_of() -> None:
    def leave(conn: PeerConnection) -> None:
        conn.send_handshake(SAMPLE)
        conn.receive(SIZE)
        conn.close()

    with Peer(leave) as peer:
        client = connect(peer)
        client.send(sample(0))
        with until(lambda: client.closed):
            pass
        with pytest.raises(ConnectionClosedError) as caught:
            client.close(0)
        check_error(caught.value, ConnectionClosedError, client.peer, 1)
        client.close(0)


def acks_all_but_the_tail(conn: PeerConnection, rows: int = 3) -> None:
    conn.send_handshake(SAMPLE)
    conn.receive(rows * SIZE)
    conn.ack(rows)


def test_two_closes_at_once_both_end_when_the_tail_is_acked(descriptors: None) -> None:
    """One tail is sent, of two samples, and neither returns before it is acked."""
    gate = Gate()
    heard, returned = threading.Event(), threading.Event()

    def late(conn: PeerConnection) -> None:
        acks_all_but_the_tail(conn)
        conn.receive(2 * SIZE)
        heard.set()
        gate.wait()
        conn.ack(2)
        conn.receive_all()

    with Peer(late) as peer:
        client = connect(peer, resend_acked=2, resend_at_close=True)
        for number in range(3):
            client.send(sample(number))

        def close() -> None:
            try:
                client.close()
            finally:
                returned.set()

        with running(close, close, close) as outcomes:
            assert heard.wait(HANG_TIMEOUT_S)
            early = returned.wait(0.2)
            gate.open()
        assert outcomes == [None] * 3
        assert not early
        client.close()
        assert client.counts().sent == 3
        assert numbers(peer.connections[0].received) == [0, 1, 2, 1, 2]


def test_close_says_that_only_the_tail_may_be_lost(caplog: pytest.LogCaptureFixture) -> None:
    """In the log: a learner that ends before its actors is no error of theirs."""

    def leave(conn: PeerConnection) -> None:
        acks_all_but_the_tail(conn)
        conn.receive(2 * SIZE)
        conn.close()

    with Peer(leave) as peer:
        client = connect(peer, resend_acked=2, resend_at_close=True)
        for number in range(3):
            client.send(sample(number))
        client.close()
        client.close()
        assert client.counts().maybe_lost == 2
    said = f"127.0.0.1:{peer.port}: the peer closed the connection; close() with 0 samples un-acked, but up to 2 "
    assert caplog.messages == [said + "that were acked last may be lost"]


def test_close_ends_when_the_peer_leaves_just_before_the_tail_is_packed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With everything acked: nothing is left to wait for, and no row is packed any more."""
    closing = Gate()
    pack = ClosingTail.pack

    def leave(conn: PeerConnection) -> None:
        acks_all_but_the_tail(conn)
        closing.wait()
        conn.close()

    def pack_late(tail: ClosingTail) -> int:
        closing.open()
        assert_threads_end()
        return pack(tail)

    with Peer(leave) as peer:
        client = connect(peer, resend_acked=2, resend_at_close=True)
        for number in range(3):
            client.send(sample(number))
        client.wait(HANG_TIMEOUT_S)
        monkeypatch.setattr(ClosingTail, "pack", pack_late)
        client.close()
        assert client.counts().maybe_lost == 2
    assert "up to 2 that were acked last may be lost" in caplog.text


def test_close_that_was_interrupted_still_tells_of_the_loss(descriptors: None) -> None:
    """By the second `close`, once; meanwhile the thread goes on delivering."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with alarms(interrupt), Peer(silent) as peer:
        client = connect(peer)
        client.send(sample(0))
        client.send(sample(1))
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            client.close(HANG_TIMEOUT_S)
        with pytest.raises(DeliveryTimeoutError, match="2 samples un-acked") as caught:
            client.close(0.2)
        assert caught.value.unacked == 2
        client.close()


def test_where_no_thread_can_be_had_nothing_stays_open(monkeypatch: pytest.MonkeyPatch, descriptors: None) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    with Peer(acking) as peer:
        monkeypatch.setattr("echo_torch.client.io_thread._thread.start_new_thread", refuse)
        with pytest.raises(RuntimeError, match="can't start") as caught:
            connect(peer)
        monkeypatch.undo()
        while peer.connections and peer.connections[0].sock.recv(1):
            pass  # the peer sees the end although the error, and so the client, is still there
        assert caught


@pytest.mark.parametrize(
    ("how", "reconnect"), [("closed", 0.0), ("lost", 0.0), ("lost", 0.2), ("closed after that", HANG_TIMEOUT_S)]
)
def test_the_memory_of_a_dead_client_is_freed_without_the_garbage_collector(how: str, reconnect: float) -> None:
    def leave(conn: PeerConnection) -> None:
        conn.send_handshake(SAMPLE)
        if how == "lost" or (how != "closed" and len(peer.connections) < 3):
            conn.receive(SIZE)
            conn.reset()
        conn.receive_all(ack_every=SIZE)

    buffer_bytes = 32 * 1024 * 1024
    with Peer(leave) as peer:
        gc.collect()
        gc.disable()
        tracemalloc.start()
        try:
            client = connect(peer, buffer_bytes=buffer_bytes, reconnect=reconnect)
            assert tracemalloc.get_traced_memory()[0] > buffer_bytes // 2
            client.send(sample(0))
            if how == "lost":
                with pytest.raises(ConnectionClosedError):
                    client.wait(HANG_TIMEOUT_S)
            else:
                client.wait(HANG_TIMEOUT_S)
            client.close()
            del client
            with until(lambda: tracemalloc.get_traced_memory()[0] < buffer_bytes // 2):
                pass
        finally:
            tracemalloc.stop()
            gc.enable()


def test_close_wakes_calls_that_block() -> None:
    """Both `send` on a full window and `wait`; the peer never acks."""
    with Peer(silent) as peer:
        client = connect(peer, 2)
        client.send(sample(0))
        client.send(sample(1))
        began = threading.Barrier(3)

        def blocked(call: Callable[[], None]) -> Callable[[], None]:
            def run() -> None:
                began.wait(HANG_TIMEOUT_S)
                call()

            return run

        with running(blocked(lambda: client.send(sample(2))), blocked(client.wait)) as outcomes:
            began.wait(HANG_TIMEOUT_S)
            with pytest.raises(DeliveryTimeoutError) as caught:
                client.close(timeout=0.2)
        check_error(caught.value, DeliveryTimeoutError, client.peer, 2)
        for error in outcomes:
            check_error(error, ConnectionClosedError, client.peer, 2)


def test_with_never_masks_the_error_that_ended_it(caplog: pytest.LogCaptureFixture) -> None:
    def leave(conn: PeerConnection) -> None:
        conn.send_handshake(SAMPLE)
        conn.receive(SIZE)
        conn.close()

    def fail() -> None:
        with connect(peer) as client:
            client.send(sample(0))
            with until(lambda: client.closed):
                pass
            raise KeyError("mine")

    with Peer(leave) as peer, pytest.raises(KeyError, match="mine"):
        fail()
    assert "while closing after KeyError" in caplog.text


def test_a_dropped_client_delivers_and_ends(descriptors: None) -> None:
    with Peer(acking) as peer:
        client = connect(peer)
        for number in range(20):
            client.send(sample(number))
        (thread,) = (t for t in threading.enumerate() if t.name.startswith("echo_torch"))
        del client
        gc.collect()
        thread.join(HANG_TIMEOUT_S)
        assert not thread.is_alive()
        assert numbers(peer.connections[0].received) == list(range(20))


# Threads and signals.


def test_many_threads_sending_never_mix_their_samples() -> None:
    """Payloads of 1 MiB, far larger than one write, each made of one number; each thread's stay in order."""
    big = {"x": np.zeros(1 << 17, np.int64)}
    size = 1 << 20
    seen: list[int] = []

    def check(conn: PeerConnection) -> None:
        conn.send_handshake(big)
        while True:
            payload = np.frombuffer(conn.receive(size), np.int64)
            conn.received.clear()
            assert (payload == payload[0]).all()
            seen.append(int(payload[0]))
            conn.ack()

    with Peer(check) as peer, TcpClient("127.0.0.1", peer.port, big, 4) as client:

        def send(thread: int) -> Callable[[], None]:
            def run() -> None:
                for number in range(12):
                    client.send({"x": np.full(1 << 17, thread * 100 + number)})

            return run

        with running(*(send(thread) for thread in range(4))) as outcomes:
            pass
        assert outcomes == [None] * 4
        client.wait(HANG_TIMEOUT_S)
    for thread in range(4):
        assert [n for n in seen if n // 100 == thread] == [thread * 100 + number for number in range(12)]
    assert len(seen) == 48


def test_threads_may_send_wait_and_close_at_once() -> None:
    for _ in range(20):
        with Peer(acking) as peer:
            client = connect(peer, 4)
            start = threading.Barrier(4)

            def send(client: TcpClient = client, start: threading.Barrier = start) -> None:
                start.wait(HANG_TIMEOUT_S)
                for number in range(200):
                    client.send(sample(number))

            def wait(client: TcpClient = client, start: threading.Barrier = start) -> None:
                start.wait(HANG_TIMEOUT_S)
                client.wait()

            with running(send, send, wait) as outcomes:
                start.wait(HANG_TIMEOUT_S)
                client.close()
            assert all(outcome is None or isinstance(outcome, ConnectionClosedError) for outcome in outcomes)
            assert client.in_flight == 0
            received = numbers(peer.connections[0].received)
            assert len(received) == client.counts().sent


def test_a_signal_handler_inside_a_call_is_turned_away() -> None:
    """Handlers that call into the client in the middle of `send` get an error and never a deadlock."""
    answers: list[str] = []

    def handler(*_: object) -> None:
        for call in (client.wait, lambda: client.send(sample(-1)), client.close):
            try:
                call()
                answers.append("done")
            except RuntimeError as error:
                answers.append(str(error))

    class Interrupting(np.ndarray[Any, Any]):
        """An array that runs a signal handler when a part of it is copied."""

        def __getitem__(self, key: Any) -> Any:
            signal.raise_signal(signal.SIGUSR1)
            return super().__getitem__(key)

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        with Peer(acking) as peer, connect(peer, buffer_bytes=2 * SIZE) as client:
            ids = np.arange(3, dtype=np.int64)
            xs = np.repeat(ids, 3).reshape(3, 3).astype(np.float32).view(Interrupting)
            client.send_rows([ids, xs])  # in two parts
            assert len(answers) >= 3
            assert all("signal handler" in answer for answer in answers)
            client.send(sample(3))
            client.wait(HANG_TIMEOUT_S)
            assert client.counts().sent == 4
    finally:
        signal.signal(signal.SIGUSR1, before)


class Overriding(TcpClient):
    """As users write them: ``close`` without a timeout, as the stock client has it."""

    closes = 0

    def close(self) -> None:  # type: ignore[override]
        type(self).closes += 1
        super().close()


def test_a_subclass_may_override_close_without_a_timeout() -> None:
    """It is called once for each close, by a ``with`` block too."""
    with Peer(acking) as peer:
        with Overriding(peer.host, peer.port, sample(0)) as client:
            client.send(sample(1))
        assert Overriding.closes == 1
        client.close()
        assert Overriding.closes == 2


def test_a_with_block_raises_what_close_alone_would_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("echo_torch.client.sender.CLOSE_TIMEOUT_S", 0.1)
    with Peer(lambda conn: (conn.send_handshake(sample(0)), conn.receive_all())) as peer:
        client = connect(peer)
        with pytest.raises(DeliveryTimeoutError, match="1 samples un-acked"), client:
            client.send(sample(0))


def test_an_abandoned_client_says_once_what_is_un_acked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("echo_torch.support.shutdown.DELIVER_AT_EXIT_S", 0.1)
    with Peer(lambda conn: (conn.send_handshake(sample(0)), conn.receive_all())) as peer:
        client = connect(peer)
        client.send(sample(0))
        client.abandon()
        eventually(lambda: client.has_ended)
        with pytest.raises(ConnectionClosedError, match="1 samples un-acked"):
            client.close(HANG_TIMEOUT_S)
        client.close(HANG_TIMEOUT_S)
        assert client.failure is None
