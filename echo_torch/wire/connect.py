"""From a host name to a socket that has shaken hands, under one deadline.

Every address that the name resolves to is tried in turn (IPv6 literals and v6-only names included). A resolver cannot
be interrupted, so a name is looked up on a daemon thread that is left behind when the deadline passes. All else waits
in pieces (`wait_ready`), so that a deadline that can be revoked is looked at often enough.
"""

from __future__ import annotations

import encodings.idna  # noqa: F401  # or the first lookup would, and a child forked meanwhile could not
import errno
import ipaddress
import os
import queue
import select
import socket
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, cast

from echo_torch.errors import ConnectionClosedError, HandshakeError
from echo_torch.support.backoff import Backoff
from echo_torch.support.deadline import POLL_INTERVAL_S, Deadline
from echo_torch.support.validation import check_count

from .keepalive import enable_keepalive
from .poll import wait_ready
from .protocol import Handshake, WireLeaves
from .tls import TLS
from .tls_socket import TlsSocket, do_tls_handshake

# Seconds between tries while a server is not listening yet: at first and at the most.
_RETRY_DELAYS_S = (0.05, 1.0)
# An address must leave this share of what is left of the deadline to the addresses after it.
_ADDRESS_TIME_SHARE = 0.5

ResolvedAddress = tuple[socket.AddressFamily, Any]
"""A resolved address: its family, and what ``connect`` takes."""
Addresses = tuple[tuple[str, int], ...]
"""Host and port of each learner."""

# All that were made here, and are not gone yet: a forked child closes its copies, or the peer would not learn of the
# end of this process before that of the child.
_sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def peer_name(host: str, port: int) -> str:
    """``host:port`` as messages name it, IPv6 literals in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def check_address(host: str, port: int) -> None:
    """Raise TypeError or ValueError unless these could be a host and a port."""
    if not isinstance(host, str):
        raise TypeError(f"host: got {host!r}, expected a name or an address")
    if check_count("port", port, least=1) > 65535:
        raise ValueError(f"port: got {port}, expected 1 to 65535")


def expand_addresses(host: Any, port: Any) -> Addresses:
    """One address for each of several hosts or ports; a single one of either goes with all of the other.

    Raises:
        TypeError, ValueError: some could be no address, there are none, as many hosts as ports, or one comes twice.
    """
    hosts = [host] if isinstance(host, str) else _as_list("host", host)
    ports = _as_list("port", port) if isinstance(port, (list, tuple, range)) else [port]
    if 1 not in (len(hosts), len(ports)) and len(hosts) != len(ports):
        raise ValueError(
            f"host, port: got {len(hosts)} hosts and {len(ports)} ports, expected as many, or one of either"
        )
    count = max(len(hosts), len(ports))
    pairs = list(zip(hosts * (count // len(hosts)), ports * (count // len(ports)), strict=True))
    for one in pairs:
        check_address(*one)
        if pairs.count(one) > 1:
            raise ValueError(f"host, port: got {peer_name(*one)} twice, expected a learner each")
    return tuple(pairs)


def _as_list(name: str, values: Any) -> list[Any]:
    if not isinstance(values, (list, tuple, range)):
        raise TypeError(f"{name}: got {values!r}, expected one, or a list of them")
    if not values:
        raise ValueError(f"{name}: got {values!r}, expected at least one")
    return list(values)


def connect_and_handshake(
    host: str, port: int, deadline: Deadline, *, retry_refused: bool = False, tls: TLS | None = None
) -> tuple[socket.socket, WireLeaves]:
    """Connect and read the server's greeting; gives a non-blocking socket and the leaves that the server expects.

    Args:
        host: name, IPv4 or IPv6 address.
        port: 1 to 65535.
        deadline: covers resolving, connecting and the handshakes.
        retry_refused: try again until the deadline while nobody listens there, or behind the proxy there, with TLS; or
            the connection is reset before the greeting is complete, as by a host that is called by too many at once.
        tls: None for a socket without; else it is a `TlsSocket`.

    Raises:
        OSError: as the system reports it (``ConnectionRefusedError``, ``socket.gaierror``, ...).
        TimeoutError: the deadline passed.
        ConnectionClosedError: the peer hung up before its greeting was complete.
        HandshakeError: the peer is no echo server of wire version 1, or speaks no TLS and was to.
        CertificateError: a certificate will not do.
    """
    check_address(host, port)
    peer = peer_name(host, port)
    backoff = Backoff(*_RETRY_DELAYS_S)
    while True:
        try:
            return _attempt(host, port, peer, deadline, tls)
        except (ConnectionRefusedError, ConnectionClosedError) as error:
            left = deadline.remaining()
            # The last one if there is no time for another that could do more than run out of it.
            if not (retry_refused and _is_transient(error, tls)) or left <= _RETRY_DELAYS_S[0]:
                raise
        time.sleep(min(backoff.next_delay(), left / 2))


def _attempt(host: str, port: int, peer: str, deadline: Deadline, tls: TLS | None) -> tuple[socket.socket, WireLeaves]:
    sock = connect(resolve(host, port, deadline), peer, deadline, socket.socket if tls is None else TlsSocket)
    try:
        if tls is not None:
            do_tls_handshake(cast(TlsSocket, sock), tls, host, peer, deadline)
        return sock, do_handshake(sock, peer, deadline)
    except BaseException:
        sock.close()
        raise


def _is_transient(error: OSError, tls: TLS | None) -> bool:
    """Whether the peer may yet become a server that takes us: it was not there, or did not know of the connection.

    A proxy, which is there, hangs up when it finds nobody behind it.
    """
    return isinstance(error, ConnectionRefusedError) or isinstance(error.__cause__, ConnectionResetError) or bool(tls)


def resolve(host: str, port: int, deadline: Deadline) -> Sequence[ResolvedAddress]:
    """The addresses of a name, in the order in which to try them, or the one that it is; raises as `connect_and_handshake`.

    Of a name that cannot be one, ``UnicodeError``.
    """
    if _is_literal(host):
        return _getaddrinfo(host, port)
    answers: queue.SimpleQueue[Sequence[ResolvedAddress] | Exception] = queue.SimpleQueue()

    def look_up() -> None:
        try:
            answers.put(_getaddrinfo(host, port))
        except Exception as error:
            answers.put(error)

    try:
        threading.Thread(target=look_up, name=f"echo_torch resolve {host}", daemon=True).start()
    except RuntimeError:  # the interpreter is ending, and starts none any more
        look_up()
    answer = None
    while answer is None:
        try:
            answer = answers.get(timeout=min(deadline.remaining(), POLL_INTERVAL_S))
        except queue.Empty:
            if deadline.expired:
                message = f"{peer_name(host, port)}: name not resolved within {deadline.timeout:g} s"
                raise TimeoutError(message) from None
    if isinstance(answer, OSError):
        raise _with_peer_name(answer, peer_name(host, port))
    if isinstance(answer, Exception):
        raise answer
    return answer


def _is_literal(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def _getaddrinfo(host: str, port: int) -> Sequence[ResolvedAddress]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [(family, address) for family, _, _, _, address in found]


def connect(
    addresses: Sequence[ResolvedAddress], peer: str, deadline: Deadline, kind: type[socket.socket] = socket.socket
) -> socket.socket:
    """Connect to the first address that answers; of several failures the one that says most is raised, as by `connect_and_handshake`."""
    failures: list[OSError] = []
    for index, (family, address) in enumerate(addresses):
        share = None if index == len(addresses) - 1 else deadline.remaining() * _ADDRESS_TIME_SHARE
        try:
            return _connect_one(kind, family, address, deadline.within(share))
        except OSError as error:
            failures.append(error)
    failure = max(failures, key=_failure_rank)  # getaddrinfo gives at least one address or raises
    if isinstance(failure, TimeoutError) and deadline.expired:
        raise TimeoutError(f"{peer}: no connection within {deadline.timeout:g} s") from failure
    if isinstance(failure, ConnectionResetError):  # just after it was made
        raise ConnectionClosedError(f"{peer} broke the connection off before the handshake: {failure}") from failure
    raise _with_peer_name(failure, peer)


def _failure_rank(failure: OSError) -> int:
    """A refusal says that the host is there and may listen later, silence says nothing."""
    return 2 if isinstance(failure, ConnectionRefusedError) else 0 if isinstance(failure, TimeoutError) else 1


def _connect_one(
    kind: type[socket.socket], family: socket.AddressFamily, address: Any, deadline: Deadline
) -> socket.socket:
    sock = kind(family, socket.SOCK_STREAM)
    _sockets.add(sock)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        enable_keepalive(sock, greeted=False)
        try:
            sock.connect(address)
        except BlockingIOError:
            if not wait_ready(sock, select.POLLOUT, deadline):
                raise TimeoutError("timed out") from None
            problem = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if problem:
                raise OSError(problem, os.strerror(problem)) from None
        if _is_self_connected(sock):
            raise ConnectionRefusedError(errno.ECONNREFUSED, "connected to itself: nobody listens there")
        return sock
    except BaseException:
        sock.close()
        raise


def _is_self_connected(sock: socket.socket) -> bool:
    """Loopback joins a port that nobody listens on to itself when it happens to be picked as the source."""
    try:
        return bool(sock.getsockname() == sock.getpeername())
    except OSError:  # hung up on already, as the handshake will find
        return False


def _with_peer_name(failure: OSError, peer: str) -> OSError:
    """The same failure, its text naming the peer."""
    if failure.errno is None:
        return failure
    return type(failure)(failure.errno, f"{failure.strerror} ({peer})")


def do_handshake(sock: socket.socket, peer: str, deadline: Deadline) -> WireLeaves:
    """Read the greeting from a socket of `connect`, which stays open whatever comes; raises as `connect_and_handshake`."""
    handshake = Handshake()
    while handshake.leaves is None:
        try:
            data = sock.recv(handshake.missing)
        except BlockingIOError:  # first of all, for a record of TLS may have held more than was read of it
            if (
                not wait_ready(sock, select.POLLIN, deadline) or deadline.expired
            ):  # what is no greeting does not extend it
                raise _handshake_timeout(sock, handshake, peer, deadline) from None
            continue
        except HandshakeError as error:
            raise type(error)(f"{peer}: {error}") from error.__cause__
        except OSError as error:
            raise ConnectionClosedError(f"{peer} broke the connection off during the handshake: {error}") from error
        if not data:
            got = handshake.received
            raise ConnectionClosedError(f"{peer} closed the connection during the handshake, after {got} bytes")
        try:
            handshake.feed(data)
        except HandshakeError as error:
            raise HandshakeError(f"{peer}: {error}") from None
        if handshake.leaves is None and deadline.expired:  # bytes that dribble in do not extend the deadline
            raise _handshake_timeout(sock, handshake, peer, deadline)
    enable_keepalive(sock)
    return handshake.leaves


def _handshake_timeout(sock: socket.socket, handshake: Handshake, peer: str, deadline: Deadline) -> TimeoutError:
    got = handshake.received
    hint = "" if got or isinstance(sock, TlsSocket) else "; if that server expects TLS, give tls="
    what = f"{peer}: handshake not complete within {deadline.timeout:g} s; got {got} bytes of it"
    return TimeoutError(f"{what}{hint}")


def close_socket(sock: socket.socket) -> None:
    """End the connection and free the descriptor, whatever state it is in."""
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()


def _close_all_after_fork() -> None:
    for sock in _sockets:
        sock.close()


os.register_at_fork(after_in_child=_close_all_after_fork)
