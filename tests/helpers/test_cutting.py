"""The cutting proxy, with plain sockets on both sides."""

from __future__ import annotations

import contextlib
import itertools
import random
import socket
import struct
import threading
from collections.abc import Iterator

import pytest
from cutting import FIN_TIMEOUT_S, KINDS, Cutter

PATIENCE_S = 20.0


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(PATIENCE_S)
        yield listener


def port_of(sock: socket.socket) -> int:
    return sock.getsockname()[1]


def connect(cutter: Cutter) -> socket.socket:
    return socket.create_connection(("127.0.0.1", cutter.port), PATIENCE_S)


def accept(listener: socket.socket) -> socket.socket:
    sock, _ = listener.accept()
    sock.settimeout(PATIENCE_S)
    return sock


@contextlib.contextmanager
def pair(cutter: Cutter, listener: socket.socket) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Yield a client's and a server's socket, joined by the proxy."""
    with connect(cutter) as client, accept(listener) as server:
        yield client, server


def rest(sock: socket.socket, say: bytes = b"") -> tuple[bytes, str]:
    """Send ``say``, if any, and read until the end. Return the data and how it ended, as `KINDS` names it."""
    data, end = bytearray(), "FIN"
    try:
        if say:
            sock.sendall(say)
    except ConnectionResetError:
        # The system reports a reset only once, so note it here.
        end = "RST"
    try:
        while piece := sock.recv(1 << 20):
            data += piece
    except ConnectionResetError:
        end = "RST"
    return bytes(data), end


def end_of(kind: str) -> tuple[str, ...]:
    return tuple("FIN" if how == "silence" else how for how in KINDS[kind])


def test_passes_everything_on_and_ends_as_its_peers_do(listener: socket.socket) -> None:
    there, back = random.Random(1).randbytes(3_000_000), random.Random(2).randbytes(2_000_000)
    with Cutter(port_of(listener)) as cutter, pair(cutter, listener) as (client, server):
        arrived: list[tuple[bytes, str]] = []
        reader = threading.Thread(target=lambda: arrived.append(rest(server)))
        reader.start()
        writer = threading.Thread(target=server.sendall, args=(back,))
        writer.start()
        client.sendall(there)
        client.shutdown(socket.SHUT_WR)
        writer.join(PATIENCE_S)
        reader.join(PATIENCE_S)
        assert arrived == [(there, "FIN")]
        server.close()
        assert rest(client) == (back, "FIN")
        assert cutter.counts() == {"connections": 1}


def test_a_reset_is_passed_on(listener: socket.socket) -> None:
    with Cutter(port_of(listener)) as cutter, pair(cutter, listener) as (client, server):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        assert rest(server) == (b"", "RST")


@pytest.mark.parametrize("kind", KINDS)
def test_cuts_as_told(listener: socket.socket, kind: str) -> None:
    with Cutter(port_of(listener)) as cutter, pair(cutter, listener) as (client, server):
        client.sendall(b"there")
        server.sendall(b"back")
        assert (client.recv(4, socket.MSG_WAITALL), server.recv(5, socket.MSG_WAITALL)) == (b"back", b"there")
        assert cutter.cut(kind) == 1
        assert (rest(client)[1], rest(server)[1]) == end_of(kind)
        assert cutter.cut(kind) == 0
        assert cutter.counts() == {"connections": 1, "cuts": 1, kind: 1}


@pytest.mark.parametrize("kind", KINDS)
def test_cuts_at_a_byte_offset(listener: socket.socket, kind: str) -> None:
    """What arrives is a prefix of what was sent. About every other cut counts the server's bytes."""
    said = random.Random(3).randbytes(10_000)
    cuts, offsets = 8, set()
    with Cutter(port_of(listener), most_bytes=9_000, most_acks=9_000, kinds=(kind,)) as cutter:
        cutter.cut_at_random(cuts)
        for number in range(cuts):
            with pair(cutter, listener) as (client, server):
                client.sendall(said)
                ends = rest(server, say=said), rest(client)
                assert [how for _, how in ends] == [*reversed(end_of(kind))]
                for data, _ in ends:
                    assert said.startswith(data)
                    offsets.add(len(data))
            assert cutter.counts()["cuts"] == number + 1
        with pair(cutter, listener) as (client, server):  # no more cuts are due
            client.sendall(said)
            client.shutdown(socket.SHUT_WR)
            assert rest(server) == (said, "FIN")
    assert len(offsets) > cuts // 2


def test_holds_little_of_what_nobody_takes(listener: socket.socket) -> None:
    with Cutter(port_of(listener)) as cutter, pair(cutter, listener) as (client, server):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        client.settimeout(0.2)
        with contextlib.suppress(TimeoutError):
            for taken in itertools.accumulate(client.send(bytes(1 << 20)) for _ in range(256)):
                assert taken < 1 << 24
        client.shutdown(socket.SHUT_WR)
        assert len(rest(server)[0]) == taken


def test_refuses_and_listens_again_on_the_same_port(listener: socket.socket) -> None:
    with Cutter(port_of(listener)) as cutter, pair(cutter, listener) as (client, server):
        cutter.stop_listening()
        with pytest.raises(ConnectionRefusedError):
            connect(cutter)
        client.sendall(b"open all the same")
        assert server.recv(17, socket.MSG_WAITALL) == b"open all the same"
        cutter.listen_again()
        with pair(cutter, listener):
            assert cutter.counts()["connections"] == 2


def test_freezes_and_thaws(listener: socket.socket) -> None:
    with Cutter(port_of(listener)) as cutter, pair(cutter, listener) as (client, server):
        cutter.freeze()
        client.sendall(b"late")
        server.settimeout(0.1)
        with pytest.raises(TimeoutError):
            server.recv(1)
        server.settimeout(PATIENCE_S)
        cutter.thaw()
        assert server.recv(4, socket.MSG_WAITALL) == b"late"


def test_is_cut_while_frozen(listener: socket.socket) -> None:
    with Cutter(port_of(listener)) as cutter, pair(cutter, listener) as (client, server):
        cutter.freeze()
        client.sendall(b"never")
        assert cutter.cut("reset") == 1
        assert rest(client) == rest(server) == (b"", "RST")


def test_a_server_that_is_gone_looks_like_a_reset(listener: socket.socket) -> None:
    with Cutter(port_of(listener)) as cutter:
        listener.close()
        # The reset may come while it connects.
        with pytest.raises(ConnectionResetError):
            knock(cutter)


def knock(cutter: Cutter) -> None:
    with connect(cutter) as client:
        client.recv(1)


def test_leads_to_another_server(listener: socket.socket) -> None:
    with Cutter(1) as cutter:
        cutter.redirect_to(port_of(listener))
        with pair(cutter, listener) as (client, server):
            client.sendall(b"there")
            assert server.recv(5, socket.MSG_WAITALL) == b"there"


def test_gives_up_on_peers_that_do_not_end_their_side(listener: socket.socket) -> None:
    """The proxy does not keep its end open forever: it then refuses what the client writes."""
    with Cutter(port_of(listener)) as cutter, pair(cutter, listener) as (client, _):
        cutter.cut("fin")
        assert rest(client) == (b"", "FIN")
        client.settimeout(FIN_TIMEOUT_S + PATIENCE_S)
        with pytest.raises(ConnectionError):
            write_for_ever(client)


def write_for_ever(sock: socket.socket) -> None:
    while True:
        sock.sendall(bytes(1 << 16))
