"""Lost connections: what is sent again on the next one, what is counted, and when there is none.

Each peer is a list of scripts, one for each connection; the last one serves all that follow.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from calls import HANG_TIMEOUT_S, Gate, eventually
from leaks import assert_threads_end, our_threads
from peers import Peer, PeerConnection, Script, Scripts
from torch.utils.data import DataLoader

from echo_torch import (
    ConnectionClosedError,
    DeliveryTimeoutError,
    EchoSink,
    HandshakeError,
    ProtocolError,
    SpecMismatchError,
    TcpClient,
)
from echo_torch.client import io_thread, reconnect
from echo_torch.client.connection import Connection
from echo_torch.client.resend import ClosingTail
from echo_torch.ring.ring import Ring

SAMPLE = {"id": np.zeros((), np.int64)}
SIZE = 8
SHORT_S = 0.3


def sample(number: int) -> dict[str, Any]:
    return {"id": np.array(number, np.int64)}


def numbers(conn: PeerConnection) -> list[int]:
    """The ids of the whole payloads that a connection carried."""
    whole = len(conn.received) // SIZE * SIZE
    return np.frombuffer(bytes(conn.received[:whole]), np.int64).tolist()


def hears(count: int, acked: int = 0, more_bytes: int = 0, end: Script = PeerConnection.close) -> Script:
    """Hears so many samples and bytes, acks some, and goes."""

    def script(conn: PeerConnection) -> None:
        conn.send_handshake(SAMPLE)
        conn.receive(count * SIZE + more_bytes)
        conn.ack(acked)
        end(conn)

    return script


def leaves_at(go: Gate) -> Script:
    """Stays until it is told to go."""

    def end(conn: PeerConnection) -> None:
        go.wait()
        conn.close()

    return end


def acks_all(conn: PeerConnection) -> None:
    conn.send_handshake(SAMPLE)
    conn.receive_all(ack_every=SIZE)


def silent(conn: PeerConnection) -> None:
    conn.send_handshake(SAMPLE)
    conn.receive_all()


def goes_at_once(conn: PeerConnection) -> None:
    conn.send_handshake(SAMPLE)
    conn.close()


def peer_of(*scripts: Script) -> Peer:
    return Peer(Scripts(*scripts))


def connect(peer: Peer, *args: Any, reconnect: float = HANG_TIMEOUT_S, **options: Any) -> TcpClient:
    return TcpClient("127.0.0.1", peer.port, SAMPLE, *args, reconnect=reconnect, **options)


def send(client: TcpClient, *ids: int) -> None:
    client.send_rows([np.array(ids, np.int64)])


def causes(error: BaseException) -> list[BaseException]:
    """What an error was raised from, the next one first; none may have frames, which would keep memory."""
    found = []
    while error.__cause__ is not None:
        error = error.__cause__
        assert error.__traceback__ is None
        assert error.__context__ is None
        found.append(error)
    return found


@contextmanager
def ends_within(seconds: float) -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds


# What is sent again.


@pytest.mark.parametrize("end", [PeerConnection.close, PeerConnection.reset], ids=["FIN", "RST"])
@pytest.mark.parametrize("more_bytes", [0, 3])
@pytest.mark.parametrize(("resend_acked", "acked"), [(0, 0), (0, 4), (2, 0), (2, 1), (2, 4), (8, 4), (8, 6)])
def test_the_last_acked_and_all_unacked_are_sent_again_in_order(
    resend_acked: int, acked: int, more_bytes: int, end: Script
) -> None:
    """And what was written of a payload by half is written whole."""
    heard = threading.Event()

    def first(conn: PeerConnection) -> None:
        conn.send_handshake(SAMPLE)
        conn.receive(6 * SIZE + more_bytes)
        conn.ack(acked)
        heard.wait(HANG_TIMEOUT_S)
        end(conn)

    with peer_of(first, acks_all) as peer:
        with connect(peer, buffer_bytes=100 * SIZE, resend_acked=resend_acked) as client:
            send(client, *range(7))
            eventually(lambda: client.in_flight == 7 - acked)
            heard.set()
            client.wait(HANG_TIMEOUT_S)
            counts = client.counts()
        again = numbers(peer.connections[1])
    first_again = max(0, acked - resend_acked)
    assert again == list(range(first_again, 7))
    assert (counts.sent, counts.unacked, counts.reconnects, counts.maybe_lost) == (7, 0, 1, 0)
    assert counts.resent == counts.maybe_duplicated == 7 - first_again


def test_acks_of_what_was_acked_before_settle_nothing_new() -> None:
    go = threading.Event()

    def second(conn: PeerConnection) -> None:
        conn.send_handshake(SAMPLE)
        conn.receive(10 * SIZE)
        conn.ack(8)  # of which 6 had been acked before
        assert go.wait(HANG_TIMEOUT_S)
        conn.ack(2)
        conn.receive_all(ack_every=SIZE)

    with peer_of(hears(10, acked=6), second) as peer, connect(peer, resend_acked=8) as client:
        send(client, *range(10))
        eventually(lambda: client.in_flight == 2)
        with pytest.raises(DeliveryTimeoutError) as caught:
            client.wait(0.1)
        assert caught.value.unacked == 2
        go.set()
        client.wait(HANG_TIMEOUT_S)
        assert client.in_flight == 0


def test_a_second_cut_in_the_middle_of_the_first_ones_repetition_loses_nothing() -> None:
    """The rows that the second connection acked may still be in that one's queue."""
    with peer_of(hears(10, acked=10), hears(5, acked=5), hears(3), acks_all) as peer:
        with connect(peer, resend_acked=8) as client:
            send(client, *range(10))
            client.wait(HANG_TIMEOUT_S)
            eventually(lambda: len(peer.connections) == 4 and len(peer.connections[3].received) == 8 * SIZE)
            counts = client.counts()
        carried = [numbers(conn)[:8] for conn in peer.connections]
    assert carried == [list(range(8)), [2, 3, 4, 5, 6], [2, 3, 4], list(range(2, 10))]
    assert counts.reconnects == 3
    assert counts.sent == 10
    assert 8 + 5 + 3 <= counts.resent <= 3 * 8


def test_what_is_sent_again_counts_against_the_window() -> None:
    """No more than the window is un-acked on the new connection either."""
    most = 0

    def counting(conn: PeerConnection) -> None:
        nonlocal most
        conn.send_handshake(SAMPLE)
        conn.sock.setblocking(False)
        unacked, left = 0, 0
        deadline = time.monotonic() + HANG_TIMEOUT_S
        while time.monotonic() < deadline:
            time.sleep(0.01)  # for whatever the window lets through to come
            try:
                data = conn.sock.recv(1 << 16)
            except BlockingIOError:
                data = b""
            else:
                if not data:
                    return
            conn.received += data
            left += len(data)
            unacked += left // SIZE
            left %= SIZE
            most = max(most, unacked)
            if unacked:
                conn.ack()
                unacked -= 1

    with peer_of(hears(4, acked=1), counting) as peer:
        with connect(peer, 4, buffer_bytes=100 * SIZE, resend_acked=8) as client:
            send(client, *range(30))
            client.wait(HANG_TIMEOUT_S)
        assert numbers(peer.connections[1]) == list(range(30))
    assert most == 4


def test_an_idle_connection_that_dies_is_opened_again_and_its_tail_sent_again() -> None:
    go = threading.Event()

    def first(conn: PeerConnection) -> None:
        conn.send_handshake(SAMPLE)
        conn.receive(20 * SIZE)
        conn.ack(20)
        assert go.wait(HANG_TIMEOUT_S)
        conn.close()

    with peer_of(first, acks_all) as peer, connect(peer, resend_acked=8) as client:
        send(client, *range(20))
        client.wait(HANG_TIMEOUT_S)
        go.set()
        eventually(lambda: len(peer.connections) == 2 and len(peer.connections[1].received) == 8 * SIZE)
        assert numbers(peer.connections[1]) == list(range(12, 20))
        assert client.counts() == client.counts()._replace(sent=20, unacked=0, resent=8, maybe_duplicated=8)


def test_a_cut_in_the_repeated_tail_of_close() -> None:
    """Whatever its connection had acked of it, the last one acks the tail of everything."""

    def first(conn: PeerConnection) -> None:
        conn.send_handshake(SAMPLE)
        conn.receive(10 * SIZE)
        conn.ack(10)
        conn.receive(4 * SIZE)
        conn.ack(3)
        conn.close()

    with peer_of(first, acks_all) as peer:
        client = connect(peer, resend_acked=8, resend_at_close=True)
        send(client, *range(10))
        client.close(HANG_TIMEOUT_S)
        counts = client.counts()
        assert numbers(peer.connections[0]) == [*range(10), 2, 3, 4, 5]
        assert numbers(peer.connections[1]) == [5, 6, 7, 8, 9, 2, 3, 4, 5, 6, 7, 8, 9]
    assert counts == (10, 0, 1, counts.resent, counts.resent + 8, 0)
    assert counts.resent >= 9


@pytest.mark.parametrize("options", [{"max_inflight_msgs": 4, "buffer_bytes": 12 * SIZE}, {}])
def test_many_cuts_at_any_byte(options: dict[str, Any]) -> None:
    """Every sample arrives, each connection carries them in order, and no more are repeated than is counted."""
    chance = np.random.default_rng(0)
    seen: list[list[int]] = []

    def cut(conn: PeerConnection) -> None:
        conn.send_handshake(SAMPLE)
        left = int(chance.integers(1, 40 * SIZE))
        received = 0
        try:
            while left and (data := conn.sock.recv(left)):
                conn.received += data
                left -= len(data)
                conn.ack(len(conn.received) // SIZE - received)
                received = len(conn.received) // SIZE
        finally:
            seen.append(numbers(conn))
        (conn.close if chance.integers(2) else conn.reset)()

    with peer_of(*[cut] * 150, acks_all) as peer:
        client = connect(peer, **options, resend_acked=3, resend_at_close=True)
        sent = 0
        while len(seen) < 150:
            client.send(sample(sent), timeout=HANG_TIMEOUT_S)
            sent += 1
        client.close(HANG_TIMEOUT_S)
        seen.append(numbers(peer.connections[-1]))
        counts = client.counts()
    arrived = [number for part in seen for number in part]
    assert set(arrived) == set(range(sent))
    for part in seen[:-1]:
        assert part == list(range(part[0], part[0] + len(part))) if part else True
    assert len(arrived) - sent <= counts.maybe_duplicated
    assert counts._replace(resent=0, maybe_duplicated=0) == (sent, 0, 150, 0, 0, 0)


def test_send_blocks_at_the_window_although_more_rows_are_kept() -> None:
    with peer_of(silent) as peer:
        client = connect(peer, 4, resend_acked=8)
        send(client, 0, 1, 2, 3)
        with pytest.raises(DeliveryTimeoutError, match="4 samples un-acked"):
            client.send(sample(4), timeout=0)
        with pytest.raises(DeliveryTimeoutError):
            client.close(0)


# What is said.


def test_a_loss_and_its_end_are_one_warning_each_with_cause_and_counts(caplog: pytest.LogCaptureFixture) -> None:
    """Python's default logging shows warnings: a loss must not stay unseen for as long as it lasts."""
    with peer_of(hears(10, acked=6), acks_all) as peer, connect(peer, resend_acked=2) as client:
        send(client, *range(10))
        client.wait(HANG_TIMEOUT_S)
        lost, again = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    name = f"127.0.0.1:{peer.port}"
    how = f"{name}: connection lost (the peer closed the connection)"
    assert lost == f"{how}; trying for up to 10 s to reconnect, 4 samples un-acked"
    assert again.startswith(f"{how} and open again after 0.")
    assert "; 6 samples are sent again" in again


def test_a_loss_that_is_kept_keeps_no_memory() -> None:
    """In a log, or by whoever caught it: no error refers to the frames of the loss, and by them to the buffer."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ring = Ring(memoryview(bytearray(8)), 8)
        connection = Connection(ours, "peer", ring, 1, ClosingTail(ring, False), None)
        with connection.io_lock:
            connection.mark_lost(error_while_another_is_handled())
        error: BaseException | None = connection.failure
        assert error is not None
        while error is not None:
            assert error.__traceback__ is None
            error = error.__cause__ or error.__context__


def error_while_another_is_handled() -> OSError:
    try:
        try:
            raise ConnectionResetError("while writing")
        except OSError:
            raise ConnectionClosedError("while reading")  # noqa: B904
    except OSError as error:
        return error


def test_a_timeout_says_that_the_connection_is_lost() -> None:
    """And delivery goes on."""
    with peer_of(hears(3), acks_all) as peer, connect(peer) as client:
        peer.refuse()
        send(client, 0, 1, 2)
        with pytest.raises(DeliveryTimeoutError, match=r"3 samples un-acked; the connection was lost 0\.\d s ago"):
            client.wait(SHORT_S)
        peer.listen()
        client.wait(HANG_TIMEOUT_S)
        assert client.counts().reconnects == 1


# When there is no other connection.


@pytest.mark.parametrize("call", ["send", "wait", "close"])
def test_when_the_time_is_up_who_waits_is_told(call: str, descriptors: None) -> None:
    with peer_of(hears(3, acked=1)) as peer:
        client = connect(peer, 4, resend_acked=8, reconnect=SHORT_S)
        peer.refuse()
        send(client, 0, 1, 2)
        calls = {
            "send": lambda: send(client, *range(3, 100)),
            "wait": client.wait,
            "close": lambda: client.close(HANG_TIMEOUT_S),
        }
        with ends_within(HANG_TIMEOUT_S), pytest.raises(ConnectionClosedError) as caught:
            calls[call]()
        text = str(caught.value)
        cause = "connection lost: the peer closed the connection"
        assert text.startswith(f"127.0.0.1:{peer.port}: {cause}; not open again after 0.")
        assert "refused" in text
        assert [type(cause) for cause in causes(caught.value)] == [ConnectionClosedError, ConnectionRefusedError]
        assert f"{call}() with {caught.value.unacked} samples un-acked" in text
        counts = client.counts()
        assert counts.unacked == caught.value.unacked
        assert counts.maybe_lost == counts.sent  # the one that was acked may have been in the server's queue
        client.close()


def test_a_server_that_serves_nobody_does_not_renew_the_time() -> None:
    """It accepts everybody, shakes hands, and goes: nothing comes of that."""
    with peer_of(hears(1), goes_at_once) as peer:
        client = connect(peer, reconnect=SHORT_S)
        send(client, 0)
        with ends_within(HANG_TIMEOUT_S), pytest.raises(ConnectionClosedError, match="1 samples un-acked"):
            client.wait()
        assert 1 <= client.counts().reconnects < 10
        client.close()


RENEWED_S, ONE_OF_12_S = 1.0, 0.1
"""Seconds in which one connection must be made, and that each of 12 lasts: all of them longer than that."""


def test_progress_renews_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each connection acks one more sample, and all together take longer than one may."""

    def one_more(conn: PeerConnection) -> None:
        conn.send_handshake(SAMPLE)
        conn.receive(2 * SIZE)
        time.sleep(ONE_OF_12_S)
        conn.ack()
        conn.close()

    with peer_of(*[one_more] * 12, acks_all) as peer, connect(peer, resend_acked=0, reconnect=RENEWED_S) as client:
        send(client, *range(20))
        client.wait(HANG_TIMEOUT_S)
        assert client.counts().reconnects == 12


@pytest.mark.parametrize("end", [PeerConnection.close, PeerConnection.reset], ids=["FIN", "RST"])
def test_an_idle_connection_may_be_cut_as_often_as_it_likes(end: Script) -> None:
    """What was sent is acked again each time, for which nobody has to wait; so no time is running out."""
    served = threading.Semaphore(0)

    def serves_and_goes(conn: PeerConnection) -> None:
        conn.send_handshake(SAMPLE)
        conn.receive(3 * SIZE)
        conn.ack(3)
        time.sleep(ONE_OF_12_S)
        end(conn)
        served.release()

    with peer_of(*[serves_and_goes] * 12, acks_all) as peer, connect(peer, reconnect=RENEWED_S) as client:
        send(client, 0, 1, 2)
        for _ in range(12):
            assert served.acquire(timeout=HANG_TIMEOUT_S)
        send(client, 3)
        client.wait(HANG_TIMEOUT_S)
        assert client.counts().reconnects == 12


def greets_with(other: Any) -> Script:
    def script(conn: PeerConnection) -> None:
        conn.send_handshake(other)
        conn.receive_all()

    return script


@pytest.mark.parametrize(
    ("other", "kind", "says"),
    [
        (greets_with({"id": np.zeros(2, np.int32)}), SpecMismatchError, "Server spec mismatch"),
        (lambda conn: conn.send(b"HTTP/1.1 503 Service Unavailable\r\n"), HandshakeError, "magic"),
    ],
    ids=["another spec", "another service"],
)
def test_another_server_is_the_end_at_once(other: Script, kind: type[Exception], says: str, descriptors: None) -> None:
    with peer_of(hears(3, acked=1), other) as peer:
        client = connect(peer, reconnect=60.0)
        send(client, 0, 1, 2)
        with (
            ends_within(HANG_TIMEOUT_S),
            pytest.raises(ConnectionClosedError, match=f"{says}.*2 samples un-acked") as caught,
        ):
            client.wait()
        assert caught.value.unacked == 2
        assert [type(cause) for cause in causes(caught.value)] == [ConnectionClosedError, kind]
        client.close()
        assert len(peer.connections) == 2


@pytest.mark.parametrize("said", [b"\x01" * 4, b"\x02"])
def test_a_peer_that_breaks_the_protocol_is_not_called_again(said: bytes) -> None:
    def breaks(conn: PeerConnection) -> None:
        conn.send_handshake(SAMPLE)
        conn.receive(3 * SIZE)
        conn.send(said)
        conn.receive_all()

    with peer_of(breaks) as peer:
        client = connect(peer)
        send(client, 0, 1, 2)
        with pytest.raises(ProtocolError, match="3 samples un-acked"):
            client.wait(HANG_TIMEOUT_S)
        client.close()
        assert len(peer.connections) == 1


def test_a_stall_is_no_reason_to_reconnect() -> None:
    """A server that hangs acks what fits into its queue on every new connection, and stores nothing."""
    with peer_of(silent) as peer:
        client = connect(peer, stall_timeout=SHORT_S)
        send(client, 0)
        for _ in range(2):
            with pytest.raises(DeliveryTimeoutError, match="stall_timeout"):
                client.wait()
        with pytest.raises(DeliveryTimeoutError):
            client.close(SHORT_S)
        assert len(peer.connections) == 1


def test_connections_that_come_and_go_without_an_ack_are_a_stall(monkeypatch: pytest.MonkeyPatch) -> None:
    """As behind a balancer that ends idle connections to a server that hangs: nobody would ever be told."""
    monkeypatch.setattr(reconnect, "BACKOFF_S", (0.001, 0.02))

    def hangs(conn: PeerConnection) -> None:
        conn.send_handshake(SAMPLE)
        conn.receive(SIZE)
        time.sleep(SHORT_S / 4)
        conn.close()

    with peer_of(hangs) as peer:
        client = connect(peer, stall_timeout=SHORT_S)
        send(client, 0)
        for _ in range(2):
            with (
                ends_within(HANG_TIMEOUT_S),
                pytest.raises(DeliveryTimeoutError, match=r"stall_timeout.*1 samples un-acked"),
            ):
                client.wait()
        assert client.counts().reconnects >= 1
        # Which one it is depends on whether the connection is open at this moment.
        with pytest.raises((DeliveryTimeoutError, ConnectionClosedError), match="1 samples un-acked"):
            client.close(0)


def test_the_time_without_a_connection_is_no_stall() -> None:
    with peer_of(hears(1), acks_all) as peer, connect(peer, stall_timeout=SHORT_S) as client:
        peer.refuse()
        send(client, 0)
        with pytest.raises(DeliveryTimeoutError, match=r"wait\(\) not done within 0\.9 s"):
            client.wait(3 * SHORT_S)
        peer.listen()
        client.wait()


def test_without_reconnect_a_loss_is_final() -> None:
    with peer_of(hears(3), acks_all) as peer:
        client = connect(peer, reconnect=0.0)
        send(client, 0, 1, 2)
        with pytest.raises(ConnectionClosedError, match="3 samples un-acked"):
            client.wait(HANG_TIMEOUT_S)
        client.close()
        assert len(peer.connections) == 1


# Ends while there is no connection.


def lost(peer: Peer, client: TcpClient, *ids: int) -> None:
    """Send to a peer that then leaves and refuses."""
    peer.refuse()
    send(client, *ids)
    with pytest.raises(DeliveryTimeoutError, match="being opened again"):
        client.send_rows([np.zeros(1000, np.int64)], timeout=SHORT_S)


def test_close_gives_up_at_its_timeout(descriptors: None) -> None:
    with peer_of(hears(3)) as peer:
        client = connect(peer, 4)
        lost(peer, client, 0, 1, 2)
        with ends_within(SHORT_S + 1), pytest.raises(ConnectionClosedError, match=r"close\(\) not done") as caught:
            client.close(SHORT_S)
        assert caught.value.unacked == client.counts().unacked >= 3
        with pytest.raises(ConnectionClosedError):
            client.wait()


def test_close_waits_for_the_connection_to_come_back() -> None:
    with peer_of(hears(3), acks_all) as peer:
        client = connect(peer, resend_at_close=True)
        peer.refuse()
        send(client, 0, 1, 2)
        threading.Timer(SHORT_S, peer.listen).start()
        client.close(HANG_TIMEOUT_S)
        assert numbers(peer.connections[1])[:3] == [0, 1, 2]
        assert client.counts().maybe_lost == 0


def test_close_does_not_wait_long_for_nothing_but_the_tail(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A learner that ended first: all was acked."""
    monkeypatch.setattr(io_thread, "TAIL_RECONNECT_S", SHORT_S)
    with peer_of(hears(3, acked=3)) as peer:
        client = connect(peer, reconnect=60.0, resend_at_close=True)
        peer.refuse()
        send(client, 0, 1, 2)
        client.wait(HANG_TIMEOUT_S)
        with ends_within(SHORT_S + 2):
            client.close()
        assert client.counts().maybe_lost == 3
    _, said = caplog.messages
    assert "with 0 samples un-acked, but up to 3 that were acked last may be lost" in said


@pytest.mark.parametrize("reconnect", [0.0, SHORT_S])
def test_a_loss_that_nobody_waits_for_is_logged(reconnect: float, caplog: pytest.LogCaptureFixture) -> None:
    """There may be no call any more: the program may end, or drop the client, without a word."""
    go = Gate()
    with peer_of(hears(3, end=leaves_at(go))) as peer:
        client = connect(peer, reconnect=reconnect)
        peer.refuse()
        send(client, 0, 1, 2)
        go.open()
        assert_threads_end()
        assert "3 samples un-acked" in caplog.messages[-1]
        with pytest.raises(ConnectionClosedError, match="3 samples un-acked"):  # and the next call says so all the same
            client.close(0)
        assert len(caplog.messages) == (2 if reconnect else 1)


class CallingHandler(logging.Handler):
    """Calls something for every record: to raise, or to call the client that logs."""

    def __init__(self, call: Callable[[], object]) -> None:
        super().__init__()
        self._call = call
        self.outcomes: list[BaseException | None] = []

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._call()
        except BaseException as error:
            self.outcomes.append(error)
            raise
        self.outcomes.append(None)


@contextmanager
def handling(handler: logging.Handler) -> Iterator[None]:
    logger = logging.getLogger("echo_torch")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@pytest.mark.parametrize("call", ["raises", "send", "wait"])
def test_a_logging_handler_cannot_stop_the_thread(call: str, descriptors: None) -> None:
    """Neither by raising nor by calling the client from inside; a call that could only wait for itself is refused."""

    def act() -> None:
        if call == "raises":
            raise OSError("disk full")
        if call == "send":
            client.send(sample(9))
        client.wait()

    handler = CallingHandler(act)
    with handling(handler), peer_of(hears(3), acks_all) as peer:
        client = connect(peer, 4)
        send(client, 0, 1, 2)
        client.wait(HANG_TIMEOUT_S)
        client.close(HANG_TIMEOUT_S)
        assert client.counts().reconnects == 1
    kind = OSError if call == "raises" else RuntimeError
    assert type(handler.outcomes[0]) is kind
    assert {type(error) for error in handler.outcomes} <= {
        kind,
        type(None),
    }  # later on there may be nothing to wait for


def test_a_logging_handler_may_close() -> None:
    """The thread then delivers what is there, and ends."""
    handler = CallingHandler(lambda: client.close())
    with handling(handler), peer_of(hears(3), acks_all) as peer:
        client = connect(peer, resend_at_close=True, resend_acked=2)
        send(client, 0, 1, 2)
        assert_threads_end()
        assert numbers(peer.connections[1]) == [0, 1, 2, 1, 2]
        assert client.closed
        client.close()
    assert set(handler.outcomes) == {None}


def test_a_client_dropped_without_a_connection_ends_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, descriptors: None
) -> None:
    monkeypatch.setattr(io_thread.shutdown, "DELIVER_AT_EXIT_S", SHORT_S)
    with peer_of(hears(3)) as peer:
        client = connect(peer, reconnect=60.0)
        peer.refuse()
        send(client, 0, 1, 2)
        del client
        with ends_within(HANG_TIMEOUT_S):
            assert_threads_end()
    said = caplog.messages[-1]
    assert said.startswith(f"127.0.0.1:{peer.port}: connection lost: the peer closed the connection; not open again")
    assert said.endswith("; ended with 3 samples un-acked")


def test_a_client_dropped_without_a_connection_delivers_when_there_is_one() -> None:
    with peer_of(hears(3), acks_all) as peer:
        client = connect(peer, resend_at_close=True, resend_acked=2)
        peer.refuse()
        send(client, 0, 1, 2)
        del client
        time.sleep(0.1)
        peer.listen()
        assert_threads_end()
        assert numbers(peer.connections[1]) == [0, 1, 2, 1, 2]


def test_there_is_one_thread_before_and_after() -> None:
    with peer_of(hears(3), acks_all) as peer, connect(peer) as client:
        before = our_threads()
        send(client, 0, 1, 2)
        client.wait(HANG_TIMEOUT_S)
        assert our_threads() == before
        assert len(before) == 1


def test_a_forked_child_holds_no_copy_of_a_connection_that_is_being_opened() -> None:
    """The peer sees the end of the parent's connection although a child lives on."""
    accepted, left = threading.Event(), threading.Event()

    def slow(conn: PeerConnection) -> None:
        accepted.set()
        assert conn.sock.recv(1) == b""  # the client gave up, in the middle of the handshake
        left.set()

    with peer_of(hears(3), slow) as peer:
        client = connect(peer)
        send(client, 0, 1, 2)
        assert accepted.wait(HANG_TIMEOUT_S)
        child = os.fork()
        if not child:
            stay()
        try:
            with pytest.raises(ConnectionClosedError):
                client.close(0)
            assert left.wait(HANG_TIMEOUT_S)
        finally:
            os.kill(child, 9)
            os.waitpid(child, 0)


def stay() -> None:
    """In a child: nothing, until it is ended."""
    time.sleep(60)
    os._exit(0)


# The sink.


def test_a_sink_reconnects_by_default_and_counts() -> None:
    with peer_of(hears(300, acked=290), acks_all) as peer:
        sink = EchoSink("127.0.0.1", peer.port, SAMPLE).connect()
        sink.send({"id": np.arange(300)})
        sink.wait(HANG_TIMEOUT_S)
        stats = sink.stats()
        assert (stats.reconnects, stats.resent, stats.maybe_duplicated, stats.maybe_lost) == (1, 18, 18, 0)
        sink.close()
        stats = sink.stats()
        assert (stats.samples_sent, stats.maybe_duplicated, stats.maybe_lost) == (300, 26, 0)
        assert numbers(peer.connections[1]) == [*range(282, 300), *range(292, 300)]


def test_a_sink_without_a_tail_lingers_and_says_how_many_may_be_lost() -> None:
    with peer_of(acks_all) as peer:
        sink = EchoSink("127.0.0.1", peer.port, SAMPLE, resend_at_close=False).connect()
        sink.send({"id": np.arange(300)})
        sink.wait(HANG_TIMEOUT_S)
        began = time.monotonic()
        sink.close()
        assert time.monotonic() - began >= 0.1
        assert sink.stats().maybe_lost == 8
        assert numbers(peer.connections[0]) == list(range(300))


class SendingCollate:
    """Sends what it collates, in a DataLoader's worker, and waits for it."""

    def __init__(self, sink: EchoSink) -> None:
        self._sink = sink

    def __call__(self, items: list[Any]) -> Any:
        batch = {"id": np.stack(items)}
        self._sink.send(batch)
        self._sink.wait()
        return batch


def test_a_worker_of_a_loader_gives_up_before_the_loader_does() -> None:
    """The loader waits for 5 s at its end; and what the worker raised is raised in the loop."""
    go = Gate()
    with peer_of(hears(4, end=leaves_at(go))) as peer:
        sink = EchoSink("127.0.0.1", peer.port, SAMPLE)
        loader = DataLoader(list(np.arange(8)), batch_size=4, num_workers=1, collate_fn=SendingCollate(sink))
        batches = iter(loader)
        eventually(lambda: len(peer.connections) == 1)
        peer.refuse()
        go.open()
        with (
            ends_within(2 + HANG_TIMEOUT_S),
            pytest.raises(ConnectionClosedError, match=r"not open again after 2\.\d s.*4 samp"),
        ):
            next(batches)
        del batches


@pytest.mark.parametrize("reconnect", [-1.0, float("nan"), "1", None, True])
def test_bad_seconds_are_refused(reconnect: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="reconnect: got"):
        EchoSink("nowhere", 1, SAMPLE, reconnect=reconnect)


def test_a_learner_that_ends_before_its_actors_ends_no_run(caplog: pytest.LogCaptureFixture) -> None:
    """With ``on_error="warn"``: said once, and the rest is dropped and counted."""
    go = threading.Event()

    def ends(conn: PeerConnection) -> None:
        conn.send_handshake(SAMPLE)
        conn.receive(10 * SIZE)
        conn.ack(10)
        assert go.wait(HANG_TIMEOUT_S)
        conn.close()

    with peer_of(ends) as peer:
        with EchoSink("127.0.0.1", peer.port, SAMPLE, on_error="warn", reconnect=SHORT_S) as sink:
            sink.send({"id": np.arange(10)})
            sink.wait()
            peer.refuse()
            go.set()
            for _ in range(20):
                sink.send({"id": np.arange(10)})
                sink.wait()
        stats = sink.stats()
    assert stats.samples_acked == 10
    assert stats.dropped + stats.in_flight == 200
    assert stats.maybe_lost == stats.in_flight + 8
    gone = [text for text in caplog.messages if "the learner is gone" in text]
    assert len(gone) == 1


@pytest.mark.parametrize("call", ["send", "wait"])
def test_a_blocked_send_is_said_sooner_than_a_wait(
    call: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A `send` holds up the training. A `wait` may have to sit out an evaluation."""
    monkeypatch.setattr(io_thread, "SEND_STALL_WARNING_S", 0.1)
    with peer_of(silent) as peer:
        client = connect(peer, 4)
        send(client, 0, 1, 2, 3)
        with pytest.raises(DeliveryTimeoutError):
            client.send(sample(4), timeout=2.5) if call == "send" else client.wait(2.5)
        warnings = [text for text in caplog.messages if "nothing acked for" in text and "4 samples un-acked" in text]
        assert bool(warnings) == (call == "send")
        with pytest.raises(DeliveryTimeoutError):
            client.close(0)


def test_a_close_that_gives_up_while_the_connection_is_lost_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    """As after Ctrl-C: the error of `close` names the loss, and the I/O thread does not log it once more."""
    with Peer(hears(1, 0)) as peer:
        client = TcpClient("127.0.0.1", peer.port, SAMPLE, reconnect=60)
    # Nobody listens there any more.
    client.send(sample(1))
    eventually(lambda: client.reconnecting)
    with pytest.raises(ConnectionClosedError, match=r"close\(\) not done within 0.2 s; 1 samples un-acked; .* lost"):
        client.close(0.2)
    (line,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "trying for up to 60 s to reconnect" in line
