"""`TcpClient` in the place of the stock client: every outcome that a caller of the stock client can see.

A case runs the same code with both clients. Where they differ, the table says how, and why that is on purpose.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import struct
from collections.abc import Callable, Iterator
from typing import Any

import echo
import numpy as np
import pytest
from calls import eventually
from peers import Peer, PeerConnection

import echo_torch

SAMPLE = {"x": np.arange(4, dtype=np.float32), "n": np.zeros((), np.int64)}
PATIENCE_S = 30.0
CLIENTS = {"stock": echo.TcpClient, "ours": echo_torch.TcpClient}
CLOSED = {"stock": echo.ConnectionClosedError, "ours": echo_torch.ConnectionClosedError}


@pytest.fixture(params=CLIENTS)
def which(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def connect(which: str) -> Callable[..., Any]:
    return CLIENTS[which]


@contextlib.contextmanager
def draining_server() -> Iterator[echo.Server]:
    server = echo.Server(SAMPLE, batch_size=32, transport=echo.TcpTransport(port=0))
    server.start()
    try:
        yield server
    finally:
        server.close()


def greets(conn: PeerConnection) -> None:
    conn.send_handshake(SAMPLE)
    conn.receive_all()


def acks(conn: PeerConnection) -> None:
    conn.send_handshake(SAMPLE)
    conn.receive_all(ack_every=24)


def leaves(conn: PeerConnection) -> None:
    conn.send_handshake(SAMPLE)
    conn.receive(24)
    conn.ack()
    conn.close()


def speaks(data: bytes) -> Callable[[PeerConnection], None]:
    def script(conn: PeerConnection) -> None:
        conn.send(data)
        conn.close()

    return script


# What connecting raises.


@pytest.mark.parametrize(
    ("script", "error", "text"),
    [
        (speaks(b"HTTP/1.1 400 Bad Request"), ValueError, "magic"),
        (speaks(b"ECHO" + bytes([2])), ValueError, "wire version 2"),
        (speaks(b"EC"), ConnectionError, None),
        (speaks(b"ECHO" + bytes([1]) + struct.pack("<I", 2)), ConnectionError, None),
        (speaks(b"ECHO" + bytes([1]) + struct.pack("<I", 0)), ValueError, "Server spec mismatch"),
    ],
    ids=["another protocol", "another version", "no magic", "half a handshake", "no leaves"],
)
def test_a_peer_that_is_no_such_server(
    script: Callable[[PeerConnection], None], error: type[Exception], text: str | None, connect: Callable[..., Any]
) -> None:
    with Peer(script) as peer, pytest.raises(error, match=text):
        connect(peer.host, peer.port, SAMPLE)


@pytest.mark.parametrize(
    "other",
    [{"x": np.zeros(5, np.float32), "n": np.zeros((), np.int64)}, {"x": np.zeros(4), "n": np.zeros((), np.int64)}, {}],
    ids=["another shape", "another item size", "no leaves"],
)
def test_a_server_for_other_samples(other: dict[str, Any], connect: Callable[..., Any], which: str) -> None:
    """Ours refuses an example without bytes before it connects: the server would flood it with acks."""
    text = "Server spec mismatch" if other or which == "stock" else "no bytes"
    with draining_server() as server, pytest.raises(ValueError, match=text):
        connect("127.0.0.1", server.port, other)


def test_nobody_listens(connect: Callable[..., Any]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(ConnectionRefusedError):
            connect("127.0.0.1", taken.getsockname()[1], SAMPLE)


def test_an_unknown_host(connect: Callable[..., Any]) -> None:
    with pytest.raises(socket.gaierror):
        connect("no-such-host.invalid", 1, SAMPLE)


def test_an_example_of_something_else_than_arrays(connect: Callable[..., Any]) -> None:
    with draining_server() as server, pytest.raises(TypeError, match="numpy array"):
        connect("127.0.0.1", server.port, {"x": [1.0, 2.0, 3.0, 4.0], "n": 3})


# What calls return and raise.


def test_a_client_that_delivers(connect: Callable[..., Any]) -> None:
    """All calls return None. A closed client may wait and close again."""
    with draining_server() as server:
        client = connect("127.0.0.1", server.port, SAMPLE, max_inflight_msgs=16)
        for number in range(32):
            assert client.send({**SAMPLE, "n": np.array(number)}) is None
        batch = server.sample().batch
        assert client.wait() is None
        np.testing.assert_array_equal(batch["n"], np.arange(32))
        np.testing.assert_array_equal(batch["x"], np.tile(SAMPLE["x"], (32, 1)))
        assert client.close() is None
        assert client.wait() is None
        assert client.close() is None


def test_send_after_close(connect: Callable[..., Any], which: str) -> None:
    with Peer(acks) as peer:
        client = connect(peer.host, peer.port, SAMPLE)
        client.close()
        with pytest.raises(CLOSED[which], match=f"127.0.0.1:{peer.port}.* closed") as caught:
            client.send(SAMPLE)
        assert isinstance(caught.value, ConnectionError)


def test_send_to_a_server_that_left(connect: Callable[..., Any], which: str) -> None:
    """The stock client must have noticed that it left: otherwise its `send` may never return."""
    with Peer(leaves) as peer:
        client = connect(peer.host, peer.port, SAMPLE)
        client.send(SAMPLE)
        client.wait()
        eventually(lambda: client._closed.is_set() if which == "stock" else client.closed)
        with pytest.raises(CLOSED[which], match=f"127.0.0.1:{peer.port}"):
            client.send(SAMPLE)
        assert client.close() is None
        if which == "stock":
            client._sock.close()  # which its own `close` leaves open if the server left first


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ({**SAMPLE, "x": np.zeros(3, np.float32)}, "Payload size 20 != expected 24"),
        ({"x": SAMPLE["x"]}, "Payload size 16 != expected 24"),
        ({**SAMPLE, "more": np.zeros(1, np.uint8)}, "Payload size 25 != expected 24"),
    ],
    ids=["a short leaf", "a missing leaf", "one leaf more"],
)
def test_a_sample_of_another_size(data: Any, text: str, connect: Callable[..., Any]) -> None:
    """The client goes on."""
    with Peer(acks) as peer:
        client = connect(peer.host, peer.port, SAMPLE)
        with pytest.raises(ValueError, match=text):
            client.send(data)
        client.send(SAMPLE)
        client.wait()
        client.close()


@pytest.mark.parametrize(
    "data",
    [
        {**SAMPLE, "x": np.zeros((2, 2), np.float32)},
        {**SAMPLE, "x": np.zeros(4, np.int32)},
        {"a": SAMPLE["n"], "b": SAMPLE["x"]},
    ],
    ids=["another shape", "another dtype", "other keys"],
)
def test_a_sample_of_the_same_size(data: Any, connect: Callable[..., Any], which: str) -> None:
    """The stock client sends it, and the learner gets other numbers. Ours refuses it."""
    with Peer(acks) as peer:
        client = connect(peer.host, peer.port, SAMPLE)
        if which == "stock":
            client.send(data)
        else:
            with pytest.raises(ValueError, match=r"expected"):
                client.send(data)
        client.close()


@pytest.mark.parametrize("script", [greets, leaves], ids=["acks nothing", "left"])
def test_close_with_samples_un_acked(
    script: Callable[[PeerConnection], None],
    connect: Callable[..., Any],
    which: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It returns. Ours waits for the acks first, and logs how many did not come."""
    monkeypatch.setattr("echo_torch.client.sender.CLOSE_TIMEOUT_S", 0.2)
    with Peer(script) as peer, caplog.at_level(logging.WARNING, "echo_torch"):
        client = connect(peer.host, peer.port, SAMPLE)
        for _ in range(2):
            with contextlib.suppress(ConnectionError):
                client.send(SAMPLE)
        assert client.close() is None
        assert client.close() is None
        if which == "stock":
            client._sock.close()
    if which == "ours":
        assert any(f"127.0.0.1:{peer.port}" in text and "samples un-acked" in text for text in caplog.messages)


def test_a_timeout_for_close_is_ours_alone_and_raises() -> None:
    with Peer(greets) as peer:
        client = echo_torch.TcpClient(peer.host, peer.port, SAMPLE)
        client.send(SAMPLE)
        with pytest.raises(echo_torch.DeliveryTimeoutError, match="1 samples un-acked"):
            client.close(0.1)


@pytest.mark.parametrize("window", [0, -1])
def test_a_window_without_room(window: int, connect: Callable[..., Any], which: str) -> None:
    """With 0, the stock client connects, and then its first `send` never returns. Ours refuses it."""
    with Peer(greets) as peer:
        if which == "stock" and window == 0:
            connect(peer.host, peer.port, SAMPLE, window).close()
            return
        with pytest.raises(ValueError, match=r"max_inflight_msgs|>= 0"):
            connect(peer.host, peer.port, SAMPLE, window)
