"""From a name to a socket that has shaken hands: real sockets on loopback, one deadline, nothing left behind."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from peers import PATIENCE_S, TCP_REPAIR, Peer, PeerConnection, Script, Scripts, full_queue, greeting

from echo_torch import EchoSink, TcpClient
from echo_torch.errors import ConnectionClosedError, HandshakeError
from echo_torch.support.deadline import Deadline
from echo_torch.wire import keepalive
from echo_torch.wire.connect import (
    connect_and_handshake,
    is_transient,
    pair_hosts_and_ports,
    peer_name,
    shutdown_and_close,
)
from echo_torch.wire.protocol import ACK, WireLeaf

pytestmark = pytest.mark.usefixtures("descriptors")

GREETING = greeting([np.zeros((2, 3), np.uint8), np.zeros((), np.float32)])
LEAVES = (WireLeaf(1, (2, 3)), WireLeaf(4, ()))

SHORT_TIMEOUT_S = 0.15
"""A deadline that is meant to pass."""
LONG_TIMEOUT_S = 30.0
"""A deadline that is not."""
SLACK_S = 10.0
"""Seconds that a loaded machine may take to notice that a deadline has passed."""
CLOCK_TOLERANCE_S = 0.02
"""Seconds by which clocks may disagree."""


def script_sending(data: bytes) -> Script:
    """A peer that says this much, and then nothing."""

    def script(conn: PeerConnection) -> None:
        conn.send(data)
        conn.receive_all()

    return script


send_greeting = script_sending(GREETING)


@contextlib.contextmanager
def times_out(seconds: float, match: str) -> Iterator[Deadline]:
    """The block ends in a plain TimeoutError: not before its deadline, and not long after."""
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=match) as caught:
        yield Deadline(seconds)
    assert type(caught.value) is TimeoutError
    assert seconds - CLOCK_TOLERANCE_S <= time.monotonic() - began < seconds + SLACK_S


@pytest.fixture
def refusing() -> Iterator[socket.socket]:
    """Bound to a loopback address and not listening: it is refused there for as long as that lasts."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock


@pytest.fixture
def unresponsive() -> Iterator[socket.socket]:
    with full_queue() as listener:
        yield listener


def local_port(sock: socket.socket) -> int:
    return sock.getsockname()[1]


def getaddrinfo_result(*addresses: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """What `socket.getaddrinfo` says of a name with these addresses."""
    families = {2: socket.AF_INET, 4: socket.AF_INET6}
    return [(families[len(address)], socket.SOCK_STREAM, 6, "", address) for address in addresses]


@pytest.fixture
def resolve_to(monkeypatch):
    """Makes every name resolve to the given addresses."""

    def patch(*addresses: tuple[Any, ...]) -> None:
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: getaddrinfo_result(*addresses))

    return patch


def can_repair_tcp() -> bool:
    """Whether `PeerConnection.drop_silently` can be had; root on Linux always can, so that nothing is skipped there."""
    if sys.platform != "linux" or not os.geteuid():
        return sys.platform == "linux"
    with socket.socket() as sock:
        try:
            sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
        except OSError:
            return False
    return True


# Connecting.


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("timeout", [LONG_TIMEOUT_S, None])
def test_connects_to_a_literal_address(host: str, timeout: float | None) -> None:
    with Peer(send_greeting, host) as peer:
        sock, leaves = connect_and_handshake(host, peer.port, Deadline(timeout))
        with sock:
            assert leaves == LEAVES
            assert sock.getpeername()[:2] == (host, peer.port)
            assert sock.gettimeout() == 0.0
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_connects_to_localhost_whichever_family_listens() -> None:
    hosts = {address[0] for *_, address in socket.getaddrinfo("localhost", 80, type=socket.SOCK_STREAM)}
    assert hosts
    for host in hosts:
        with Peer(send_greeting, host) as peer:
            sock, leaves = connect_and_handshake("localhost", peer.port, Deadline(LONG_TIMEOUT_S))
            with sock:
                assert leaves == LEAVES
                assert sock.getpeername()[0] == host


UNREACHABLE = ("127.255.255.255", 50051)
"""TCP connects to no broadcast address: the system says so at once, and does not call it a refusal."""


@pytest.mark.parametrize(
    ("first", "host", "timeout"),
    [
        ("refusing", "127.0.0.1", LONG_TIMEOUT_S),
        ("refusing", "::1", LONG_TIMEOUT_S),
        ("unreachable", "127.0.0.1", LONG_TIMEOUT_S),
        ("unresponsive", "::1", 3.0),
    ],
)
def test_connects_to_the_first_address_that_answers(first, host, timeout, refusing, unresponsive, resolve_to) -> None:
    """Of a name with three; one that is silent uses up only a share of the time."""
    firsts = {
        "refusing": refusing.getsockname(),
        "unreachable": UNREACHABLE,
        "unresponsive": unresponsive.getsockname(),
    }
    with Peer(send_greeting, host) as peer:
        listening = (host, peer.port) if host == "127.0.0.1" else (host, peer.port, 0, 0)
        resolve_to(firsts[first], listening, refusing.getsockname())
        sock, leaves = connect_and_handshake("learner", 50051, Deadline(timeout))
        with sock:
            assert leaves == LEAVES
            assert sock.getpeername() == listening


@pytest.mark.parametrize("timeout", [1e7, math.inf])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_deadline_may_exceed_the_longest_socket_timeout(host: str, timeout: float) -> None:
    with Peer(send_greeting) as peer:
        sock, leaves = connect_and_handshake(host, peer.port, Deadline(timeout))
        with sock:
            assert leaves == LEAVES


def test_what_follows_the_greeting_stays_in_the_socket() -> None:
    def greet_and_ack(conn: PeerConnection) -> None:
        conn.send(GREETING + ACK * 3)
        conn.close()

    with Peer(greet_and_ack) as peer:
        sock, leaves = connect_and_handshake("127.0.0.1", peer.port, Deadline(LONG_TIMEOUT_S))
        with sock:
            sock.settimeout(PATIENCE_S)
            assert leaves == LEAVES
            assert b"".join(iter(lambda: sock.recv(99), b"")) == ACK * 3


@pytest.mark.parametrize("default", [0.0, 0.001])
def test_the_default_socket_timeout_is_ignored(default: float, monkeypatch) -> None:
    """Neither on connecting, nor on waiting for the greeting, nor on the socket that is given."""
    before = socket.getdefaulttimeout()
    with Peer(send_greeting) as friendly, Peer(script_sending(GREETING[:5])) as stalling:
        socket.setdefaulttimeout(default)
        try:
            for timeout in (None, LONG_TIMEOUT_S):
                with connect_and_handshake("127.0.0.1", friendly.port, Deadline(timeout))[0] as sock:
                    assert sock.gettimeout() == 0.0
            with times_out(SHORT_TIMEOUT_S, "got 5 bytes") as deadline:
                connect_and_handshake("127.0.0.1", stalling.port, deadline)
        finally:
            socket.setdefaulttimeout(before)


# Failing to connect.


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_refused_connection_names_the_peer(host: str, refusing: socket.socket) -> None:
    with pytest.raises(ConnectionRefusedError, match=f"{host}:{local_port(refusing)}"):
        connect_and_handshake(host, local_port(refusing), Deadline(LONG_TIMEOUT_S))


def test_a_refused_ipv6_connection_names_the_peer_in_brackets() -> None:
    with socket.socket(socket.AF_INET6) as refusing:
        refusing.bind(("::1", 0))
        with pytest.raises(ConnectionRefusedError, match=rf"\[::1\]:{local_port(refusing)}"):
            connect_and_handshake("::1", local_port(refusing), Deadline(LONG_TIMEOUT_S))


@pytest.mark.parametrize("unresponsive_first", [True, False])
def test_a_refused_address_outranks_one_that_times_out(
    unresponsive_first: bool, refusing, unresponsive, resolve_to
) -> None:
    resolve_to(*[unresponsive.getsockname(), refusing.getsockname()][:: 1 if unresponsive_first else -1])
    with pytest.raises(ConnectionRefusedError, match="learner:50051"):
        connect_and_handshake("learner", 50051, Deadline(2 * SHORT_TIMEOUT_S))


def test_a_name_that_does_not_resolve_is_a_gaierror() -> None:
    with pytest.raises(socket.gaierror):
        connect_and_handshake("nobody.invalid", 50051, Deadline(LONG_TIMEOUT_S))


def test_a_name_that_does_not_resolve_is_named_in_the_message() -> None:
    with pytest.raises(socket.gaierror, match=r"nobody\.invalid"):
        connect_and_handshake("nobody.invalid", 50051, Deadline(LONG_TIMEOUT_S))


@pytest.mark.parametrize("addresses", [1, 3])
def test_unresponsive_addresses_time_out_at_the_deadline(
    addresses: int, unresponsive: socket.socket, resolve_to
) -> None:
    resolve_to(*[unresponsive.getsockname()] * addresses)
    with times_out(2 * SHORT_TIMEOUT_S, "learner:50051") as deadline:
        connect_and_handshake("learner", 50051, deadline)


@pytest.mark.parametrize("seconds", [LONG_TIMEOUT_S, None])
@pytest.mark.parametrize("addresses", [1, 2])
def test_a_timeout_of_the_system_is_raised_as_it_is(
    seconds: float | None, addresses: int, refusing: socket.socket, resolve_to, monkeypatch
) -> None:
    """Whether or not there is a deadline to name."""

    def connect(*_: object) -> None:
        raise TimeoutError(errno.ETIMEDOUT, "Connection timed out")

    resolve_to(*[refusing.getsockname()] * addresses)
    monkeypatch.setattr(socket.socket, "connect", connect)
    with pytest.raises(TimeoutError, match=r"Connection timed out.*learner:50051") as caught:
        connect_and_handshake("learner", 50051, Deadline(seconds))
    assert caught.value.errno == errno.ETIMEDOUT


@pytest.mark.parametrize("seconds", [SHORT_TIMEOUT_S, 0.0])
def test_a_peer_that_never_accepts_times_out(seconds: float) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, times_out(seconds, "handshake|connection") as deadline:
        connect_and_handshake("127.0.0.1", local_port(listener), deadline)


def test_a_slow_resolver_times_out(monkeypatch) -> None:
    """And its answer, which comes when nobody waits for it any more, goes nowhere."""
    answer, answered = threading.Event(), threading.Event()

    def slow(*_: object, **__: object) -> list[tuple[Any, ...]]:
        answer.wait(PATIENCE_S)
        answered.set()
        return getaddrinfo_result(("127.0.0.1", 50051))

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    try:
        with times_out(SHORT_TIMEOUT_S, "learner:50051: name not resolved") as deadline:
            connect_and_handshake("learner", 50051, deadline)
        assert not answered.is_set()
    finally:
        answer.set()
    assert answered.wait(PATIENCE_S)


def test_a_self_connection_counts_as_refused(monkeypatch) -> None:
    """Loopback may pick the very port that nobody listens on as the source, and then the two ends are one."""

    class SelfConnected(socket.socket):
        def connect(self, _: Any) -> None:
            self.bind(("127.0.0.1", 0))
            super().connect(self.getsockname())

    monkeypatch.setattr(socket, "socket", SelfConnected)
    with pytest.raises(ConnectionRefusedError, match=r"127\.0\.0\.1:50051"):
        connect_and_handshake("127.0.0.1", 50051, Deadline(LONG_TIMEOUT_S))


@pytest.mark.parametrize("port", [True, None, "50051", 50051.0, b"50051"])
def test_a_port_of_another_type_is_refused(port: Any) -> None:
    with pytest.raises(TypeError, match="port"):
        connect_and_handshake("127.0.0.1", port, Deadline(LONG_TIMEOUT_S))


@pytest.mark.parametrize("port", [0, -1, 65536, 2**40])
def test_a_port_out_of_range_is_refused(port: int) -> None:
    with pytest.raises(ValueError, match=f"port.*{port}"):
        connect_and_handshake("127.0.0.1", port, Deadline(LONG_TIMEOUT_S))


# Trying again.


class LateServer:
    """Turns a socket that refuses into one that listens at the ``at``-th look-up of its address, and greets once."""

    def __init__(self, sock: socket.socket, monkeypatch: pytest.MonkeyPatch, at: float, first: Any = None) -> None:
        self.lookups = 0
        self._sock = sock
        self._at = at
        self._addresses = [sock.getsockname()] if first is None else [first, sock.getsockname()]
        self._thread = threading.Thread(target=self._serve, daemon=True)
        monkeypatch.setattr(socket, "getaddrinfo", self._look_up)

    def _look_up(self, *_: object, **__: object) -> list[tuple[Any, ...]]:
        self.lookups += 1
        if self.lookups == self._at:
            self._sock.listen()
            self._sock.settimeout(PATIENCE_S)
            self._thread.start()
        return getaddrinfo_result(*self._addresses)

    def _serve(self) -> None:
        line, _ = self._sock.accept()
        with line:
            line.sendall(GREETING)
            line.recv(1)

    def join(self) -> None:
        self._thread.join(PATIENCE_S)


@pytest.mark.parametrize("host", ["127.0.0.1", "learner"])
@pytest.mark.parametrize("first", [None, UNREACHABLE], ids=["alone", "after an unreachable address"])
def test_a_server_that_listens_later_is_found(host: str, first: Any, refusing: socket.socket, monkeypatch) -> None:
    server = LateServer(refusing, monkeypatch, at=3, first=first)
    sock, leaves = connect_and_handshake(host, 50051, Deadline(LONG_TIMEOUT_S), retry_refused=True)
    sock.close()
    server.join()
    assert (leaves, server.lookups) == (LEAVES, 3)


@pytest.mark.parametrize("host", ["127.0.0.1", "learner"])
def test_a_server_that_never_listens_is_given_up_at_the_deadline(host: str, refusing, monkeypatch) -> None:
    server = LateServer(refusing, monkeypatch, at=math.inf)
    began = time.monotonic()
    with pytest.raises(ConnectionRefusedError, match=f"{host}:50051"):
        connect_and_handshake(host, 50051, Deadline(4 * SHORT_TIMEOUT_S), retry_refused=True)
    assert time.monotonic() - began < 4 * SHORT_TIMEOUT_S + SLACK_S
    assert server.lookups > 1


@pytest.mark.parametrize("host", ["127.0.0.1", "learner"])
@pytest.mark.parametrize("share", [0.1, 0.8, 0.97])
def test_a_server_that_listens_just_before_the_deadline_is_found(
    host: str, share: float, refusing, monkeypatch
) -> None:
    """On a clock of its own, that only sleeping moves: a refusal costs no time."""
    began = now = time.monotonic()

    def sleep(seconds: float) -> None:
        nonlocal now
        assert seconds > 0
        now += seconds

    with Peer(send_greeting) as peer, monkeypatch.context() as patch:

        def look_up(*_: object, **__: object) -> list[tuple[Any, ...]]:
            listens = now - began >= share * LONG_TIMEOUT_S
            return getaddrinfo_result(("127.0.0.1", peer.port) if listens else refusing.getsockname())

        patch.setattr(socket, "getaddrinfo", look_up)
        patch.setattr(time, "monotonic", lambda: now)
        patch.setattr(time, "sleep", sleep)
        sock, leaves = connect_and_handshake(host, 50051, Deadline(LONG_TIMEOUT_S), retry_refused=True)
        sock.close()
        patch.undo()
    assert leaves == LEAVES
    assert now - began >= share * LONG_TIMEOUT_S


PASSES = {
    "no name server answers": socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"),
    "nobody knows the name yet": socket.gaierror(socket.EAI_NONAME, "Name or service not known"),
    "no route": OSError(errno.EHOSTUNREACH, "No route to host"),
    "no network": OSError(errno.ENETUNREACH, "Network is unreachable"),
    "network down": OSError(errno.ENETDOWN, "Network is down"),
    "host down": OSError(errno.EHOSTDOWN, "Host is down"),
    "the system gave up": TimeoutError(errno.ETIMEDOUT, "Connection timed out"),
    "a firewall": PermissionError(errno.EPERM, "Operation not permitted"),
    "no descriptor": OSError(errno.EMFILE, "Too many open files"),
    "no port": OSError(errno.EADDRNOTAVAIL, "Cannot assign requested address"),
}
FINAL = {
    "no such family": OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol"),
    "the resolver wants another family": socket.gaierror(socket.EAI_FAMILY, "ai_family not supported"),
}


class Failing:
    """Looking up a name fails the first ``times`` times, or for ``seconds``; then it gives ``address``."""

    def __init__(self, monkeypatch: Any, error: OSError, address: Any, times: float = math.inf) -> None:
        self.lookups = 0
        self._error, self._address, self._times = error, address, times
        monkeypatch.setattr(socket, "getaddrinfo", self._look_up)

    def _look_up(self, *_: object, **__: object) -> list[tuple[Any, ...]]:
        self.lookups += 1
        if self.lookups <= self._times:
            raise self._error
        return getaddrinfo_result(self._address)


@pytest.mark.parametrize("error", PASSES.values(), ids=PASSES)
def test_what_may_pass_is_tried_again(error: OSError, monkeypatch) -> None:
    """A container that comes up, a network that is being set up; at the first connect as at any later one."""
    assert is_transient(error)
    assert is_transient(error, was_connected=True)
    with Peer(send_greeting) as peer:
        failing = Failing(monkeypatch, error, (peer.host, peer.port), times=2)
        sock, leaves = connect_and_handshake("learner", 7, Deadline(LONG_TIMEOUT_S), retry_refused=True)
        sock.close()
    assert (leaves, failing.lookups) == (LEAVES, 3)


@pytest.mark.parametrize("error", PASSES.values(), ids=PASSES)
def test_what_does_not_pass_in_time_is_raised_as_it_is(error: OSError, refusing: socket.socket, monkeypatch) -> None:
    failing = Failing(monkeypatch, error, refusing.getsockname())
    with pytest.raises(type(error), match=rf"{error.strerror}.*\(learner:7\)") as caught:
        connect_and_handshake("learner", 7, Deadline(2 * SHORT_TIMEOUT_S), retry_refused=True)
    assert isinstance(caught.value, OSError)
    assert caught.value.errno == error.errno
    assert failing.lookups > 1


@pytest.mark.parametrize("error", FINAL.values(), ids=FINAL)
def test_what_cannot_pass_is_raised_at_once(error: OSError, refusing: socket.socket, monkeypatch) -> None:
    assert not is_transient(error)
    failing = Failing(monkeypatch, error, refusing.getsockname())
    with pytest.raises(type(error)):
        connect_and_handshake("learner", 7, Deadline(LONG_TIMEOUT_S), retry_refused=True)
    assert failing.lookups == 1


def test_a_name_that_nobody_knows_is_tried_for_2_seconds(refusing: socket.socket, monkeypatch) -> None:
    """On a clock of its own, that only sleeping moves."""
    now = time.monotonic()
    began = now

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    error = PASSES["nobody knows the name yet"]
    with monkeypatch.context() as patch:
        Failing(patch, error, refusing.getsockname())
        patch.setattr(time, "monotonic", lambda: now)
        patch.setattr(time, "sleep", sleep)
        with pytest.raises(socket.gaierror, match=r"not known \(learner:7\); tried for [23]\.\d s"):
            connect_and_handshake("learner", 7, Deadline(LONG_TIMEOUT_S), retry_refused=True)
    assert 2.0 <= now - began <= 4.0


def test_a_system_without_threads_does_not_outlast_the_deadline(monkeypatch) -> None:
    """The lookup needs one. It must not be made without a limit instead."""

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    def look_up(*_: object, **__: object) -> None:
        raise AssertionError("looked up on the caller's thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    began = time.monotonic()
    with pytest.raises(OSError, match=r"no thread left to look up the name \(learner:7\)"):
        connect_and_handshake("learner", 7, Deadline(2 * SHORT_TIMEOUT_S), retry_refused=True)
    assert time.monotonic() - began < SLACK_S


NO_HOSTS = {
    "": "'localhost'",
    "learner:50051": "give the port by itself: 'learner', 50051",
    "10.0.0.7:50051": "give the port by itself: '10.0.0.7', 50051",
    "[::1]:50051": "leave out the brackets: '::1'",
    "[::1]": "leave out the brackets: '::1'",
    "tcp://learner": "leave out what a URL has",
    "http://learner:50051/": "leave out what a URL has",
    "learner/": "leave out what a URL has",
    " learner": "leave out the blanks",
    "learner\n": "leave out the blanks",
    "the learner": "leave out the blanks",
    64 * "x" + ".example": "1 to 63 characters",
    "learner..example": "1 to 63 characters",
    "learner:": "no such characters",
    "user@learner": "no such characters",
}


@pytest.mark.parametrize(("host", "remedy"), NO_HOSTS.items())
@pytest.mark.parametrize("make", [EchoSink, TcpClient])
def test_a_host_that_can_be_none_is_refused_with_the_right_form(make: Any, host: str, remedy: str) -> None:
    with pytest.raises(ValueError, match=f"host: got .*{re.escape(repr(host)[1:-1])}.*{re.escape(remedy)}") as caught:
        make(host, 50051, {"x": np.zeros(3)})
    assert type(caught.value) is ValueError


@pytest.mark.parametrize(
    "host", ["learner", "learner.example.", "a_b-c", "10.0.0.7", "::1", "fe80::1%eth0", "bücher.example"]
)
def test_a_host_that_can_be_one_is_taken(host: str) -> None:
    assert pair_hosts_and_ports(host, 50051) == ((host, 50051),)


def test_a_refused_connection_is_not_retried_by_default(refusing: socket.socket, monkeypatch) -> None:
    server = LateServer(refusing, monkeypatch, at=2)
    with pytest.raises(ConnectionRefusedError):
        connect_and_handshake("learner", 50051, Deadline(LONG_TIMEOUT_S))
    assert server.lookups == 1


def test_a_peer_that_closes_is_not_retried() -> None:
    with Peer(PeerConnection.close) as peer:
        with pytest.raises(ConnectionClosedError):
            connect_and_handshake("127.0.0.1", peer.port, Deadline(LONG_TIMEOUT_S), retry_refused=True)
        assert len(peer.connections) == 1


def test_a_reset_connection_is_retried_with_retry_refused() -> None:
    """As a proxy does whose backend is not there yet."""

    def begin(conn: PeerConnection) -> None:
        conn.send(GREETING[:9])
        conn.reset()

    with Peer(Scripts(PeerConnection.reset, begin, send_greeting)) as peer:
        with pytest.raises(ConnectionClosedError):
            connect_and_handshake("127.0.0.1", peer.port, Deadline(LONG_TIMEOUT_S))
        sock, leaves = connect_and_handshake("127.0.0.1", peer.port, Deadline(LONG_TIMEOUT_S), retry_refused=True)
        with sock:
            assert leaves == LEAVES


def test_a_peer_that_always_resets_is_given_up_at_the_deadline() -> None:
    with Peer(PeerConnection.reset) as peer:
        began = time.monotonic()
        with pytest.raises(ConnectionClosedError, match=f"127.0.0.1:{peer.port} broke the connection off"):
            connect_and_handshake("127.0.0.1", peer.port, Deadline(SHORT_TIMEOUT_S), retry_refused=True)
        assert time.monotonic() - began < SLACK_S
    assert len(peer.connections) > 1


@pytest.mark.skipif(not can_repair_tcp(), reason="takes Linux, and root")
def test_a_peer_that_forgot_the_connection_is_retried() -> None:
    """As Linux does where more call at once than its queue takes: the peer was to speak first, and never would."""
    with Peer(Scripts(PeerConnection.drop_silently, send_greeting)) as peer:
        began = time.monotonic()
        sock, leaves = connect_and_handshake("127.0.0.1", peer.port, Deadline(LONG_TIMEOUT_S), retry_refused=True)
        with sock:
            assert leaves == LEAVES
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == keepalive.KEEPALIVE_IDLE_S
        assert time.monotonic() - began < keepalive.GREETING_IDLE_S + SLACK_S
    assert len(peer.connections) == 2


# Shaking hands.


@pytest.mark.parametrize("count", [0, 1, 4, 5, 8, 9, 12, 17, 25, len(GREETING) - 1])
def test_a_greeting_that_stalls_anywhere_times_out(count: int) -> None:
    with (
        Peer(script_sending(GREETING[:count])) as peer,
        times_out(4 * SHORT_TIMEOUT_S, f"127.0.0.1:{peer.port}.* got {count} bytes") as deadline,
    ):
        connect_and_handshake("127.0.0.1", peer.port, deadline)


def test_slow_bytes_do_not_extend_the_deadline() -> None:
    """They keep coming, and the whole greeting takes at least 3 s."""
    left = threading.Event()

    def send_slowly(conn: PeerConnection) -> None:
        for byte in greeting([np.zeros((1,) * 60, np.uint8)] * 30):
            conn.send(bytes([byte]))
            left.wait(0.0005)

    with Peer(send_slowly) as peer:
        with times_out(2 * SHORT_TIMEOUT_S, "handshake not complete") as deadline:
            connect_and_handshake("127.0.0.1", peer.port, deadline)
        left.set()


def test_a_greeting_in_single_bytes_is_read() -> None:
    def send_slowly(conn: PeerConnection) -> None:
        for byte in GREETING:
            conn.send(bytes([byte]))
        conn.receive_all()

    with Peer(send_slowly) as peer:
        sock, leaves = connect_and_handshake("127.0.0.1", peer.port, Deadline(LONG_TIMEOUT_S))
        with sock:
            assert leaves == LEAVES


@pytest.mark.parametrize("end", [PeerConnection.close, PeerConnection.reset], ids=["closes", "resets"])
@pytest.mark.parametrize("count", [0, 1, 4, 9, 17, len(GREETING) - 1])
def test_a_peer_that_disconnects_during_its_greeting(count: int, end: Script) -> None:
    def leave(conn: PeerConnection) -> None:
        conn.send(GREETING[:count])
        end(conn)

    with Peer(leave) as peer, pytest.raises(ConnectionClosedError, match=f"127.0.0.1:{peer.port}"):
        connect_and_handshake("127.0.0.1", peer.port, Deadline(LONG_TIMEOUT_S))


@pytest.mark.parametrize("end", [PeerConnection.close, PeerConnection.reset], ids=["closes", "resets"])
def test_a_peer_that_disconnects_while_we_connect(end: Script, monkeypatch) -> None:
    """As a proxy does whose backend is gone: here always before the client looks at its new connection."""
    gone = threading.Event()

    class SlowToConnect(socket.socket):
        def connect(self, address: Any) -> None:
            with contextlib.suppress(BlockingIOError):
                super().connect(address)
            assert gone.wait(PATIENCE_S)

    def leave(conn: PeerConnection) -> None:
        end(conn)
        gone.set()

    with Peer(leave) as peer:
        monkeypatch.setattr(socket, "socket", SlowToConnect)
        with pytest.raises(ConnectionClosedError, match=f"127.0.0.1:{peer.port}"):
            connect_and_handshake("127.0.0.1", peer.port, Deadline(LONG_TIMEOUT_S))


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n", "magic"),
        (b"x", "magic"),
        (GREETING[:4] + b"\x02", "wire version 2"),
        (GREETING[:5] + b"\xff" * 4, "num_arrays"),
        (GREETING[:9] + b"\xff" * 8, "num_dims"),
    ],
)
def test_an_answer_that_is_no_greeting_names_the_peer_and_what_is_wrong(answer: bytes, match: str) -> None:
    with Peer(script_sending(answer)) as peer, pytest.raises(HandshakeError, match=f"127.0.0.1:{peer.port}: .*{match}"):
        connect_and_handshake("127.0.0.1", peer.port, Deadline(LONG_TIMEOUT_S))


@pytest.mark.parametrize("call", ["connect", "recv"])
def test_an_interrupt_leaves_no_socket_open(call: str, monkeypatch) -> None:
    made: list[socket.socket] = []  # the client's first, then perhaps the peer's

    class Interrupted(socket.socket):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            made.append(self)

        def connect(self, address: Any) -> None:
            if call == "connect":
                raise KeyboardInterrupt
            super().connect(address)

        def recv(self, *args: Any) -> bytes:
            if call == "recv" and self is made[0]:
                raise KeyboardInterrupt
            return super().recv(*args)

    with Peer(send_greeting) as peer:
        monkeypatch.setattr(socket, "socket", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            connect_and_handshake("127.0.0.1", peer.port, Deadline(LONG_TIMEOUT_S))
        assert made[0].fileno() == -1


# Names and ends.


@pytest.mark.parametrize(
    ("host", "name"),
    [("learner", "learner:50051"), ("127.0.0.1", "127.0.0.1:50051"), ("::1", "[::1]:50051")],
)
def test_peer_name(host: str, name: str) -> None:
    assert peer_name(host, 50051) == name


@pytest.mark.parametrize("state", ["connected", "new", "left by the peer", "reset by the peer", "closed"])
def test_close_socket_frees_the_socket_in_any_state(state: str) -> None:
    gone = threading.Event()

    def leave(conn: PeerConnection) -> None:
        {"left by the peer": PeerConnection.close, "reset by the peer": PeerConnection.reset}.get(
            state, PeerConnection.receive_all
        )(conn)
        gone.set()

    with Peer(leave) as peer:
        sock = socket.socket()
        if state != "new":
            sock.connect((peer.host, peer.port))
        if state.endswith("by the peer"):
            assert gone.wait(PATIENCE_S)
        if state == "closed":
            sock.close()
        shutdown_and_close(sock)
        assert sock.fileno() == -1
        shutdown_and_close(sock)


def test_close_socket_is_seen_by_the_peer_although_a_copy_is_open() -> None:
    """In a forked child, say: the connection is shut down, and not only this descriptor closed."""
    saw_eof = threading.Event()

    def listen(conn: PeerConnection) -> None:
        conn.receive_all()
        saw_eof.set()

    with Peer(listen) as peer:
        sock = socket.create_connection((peer.host, peer.port))
        with sock.dup():
            shutdown_and_close(sock)
            assert saw_eof.wait(PATIENCE_S)


# Addresses of several learners.


@pytest.mark.parametrize(
    ("host", "port", "expected"),
    [
        ("a", 1, (("a", 1),)),
        ("a", [1, 2], (("a", 1), ("a", 2))),
        (["a", "b"], 1, (("a", 1), ("b", 1))),
        (("a", "b"), range(1, 3), (("a", 1), ("b", 2))),
        (["a"], [1], (("a", 1),)),
        (["a", "a"], [1, 2], (("a", 1), ("a", 2))),
    ],
)
def test_a_single_host_or_port_goes_with_all_of_the_other(host: Any, port: Any, expected: Any) -> None:
    assert pair_hosts_and_ports(host, port) == expected


@pytest.mark.parametrize(
    ("host", "port", "kind", "message"),
    [
        (["a", "b", "c"], [1, 2], ValueError, "got 3 hosts and 2 ports"),
        ([], 1, ValueError, "host: got [], expected at least one"),
        ("a", [], ValueError, "port: got [], expected at least one"),
        ("a", [1, 1], ValueError, "got a:1 twice"),
        (["a", 7], 1, TypeError, "host: got 7"),
        ({"a": 1}, 1, TypeError, "host: got {'a': 1}"),
        (None, 1, TypeError, "host: got None"),
        ("a", [1, 65536], ValueError, "port: got 65536"),
        ("a", [1, 2.0], TypeError, "port: got 2.0"),
    ],
)
def test_bad_addresses_are_named(host: Any, port: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as caught:
        pair_hosts_and_ports(host, port)
    assert message in str(caught.value)


def test_a_server_that_is_not_there_is_said_after_a_second_and_at_the_end(
    refusing: socket.socket, monkeypatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Once, and what to do about it; as one error without others behind it. On a clock that only sleeping moves."""
    now = time.monotonic()

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    with monkeypatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: now)
        patch.setattr(time, "sleep", sleep)
        with pytest.raises(ConnectionRefusedError) as caught:
            connect_and_handshake("127.0.0.1", local_port(refusing), Deadline(10.0), retry_refused=True)
    peer = f"127.0.0.1:{local_port(refusing)}"
    (said,) = caplog.messages
    assert re.fullmatch(rf"{peer}: Connection refused \({peer}\); trying for up to [89] s more", said)
    remedy = "nobody listens there: start the learner first, or check the port"
    assert re.search(rf"\({peer}\); {remedy}; tried for (9\.\d|10\.0) s \(connect_timeout\)$", str(caught.value))
    assert caught.value.errno == errno.ECONNREFUSED
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
