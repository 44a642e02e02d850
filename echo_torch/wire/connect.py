"""From a host name to a socket that has completed the handshake, under one deadline.

* We try every address that the name resolves to, in order, IPv6 included. An address may not use up the time of the
  addresses after it.
* A name lookup cannot be interrupted. So it runs on a daemon thread, which we leave behind when the deadline passes.
* Everything else waits in short pieces (`wait_ready`), so that it soon notices when a `RevocableDeadline` is revoked.
* The deadline limits the whole handshake. Bytes that trickle in do not extend it.
* A function that raises, for whatever reason, closes the sockets that it made. Sockets that you pass in stay open.
* Every message names the peer as ``host:port``.
"""

from __future__ import annotations

# Import this now. Otherwise the first lookup of a name imports it on its thread, and a child that is forked meanwhile
# cannot import it.
import encodings.idna  # noqa: F401
import errno
import ipaddress
import logging
import os
import queue
import select
import socket
import sys
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

_log = logging.getLogger(__name__)

# Seconds between tries while a server is not listening yet: the first pause, and the longest.
_RETRY_DELAYS_S = (0.05, 1.0)
# Seconds of tries after which the log says that the server is not there yet.
_WARN_AFTER_S = 1.0
# Seconds to try again while nobody knows the name. A container's name exists only once the container runs, so waiting
# may help. But most unknown names are mistyped, so we do not wait longer.
UNKNOWN_NAME_RETRY_S = 2.0
# What the resolver says of a name that nobody knows.
_UNKNOWN_NAME = {socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)}
# Errors of the resolver that may pass: an unknown name, a name server that does not answer yet, or no resources.
_PASSING_LOOKUPS = _UNKNOWN_NAME | {socket.EAI_AGAIN, socket.EAI_FAIL, socket.EAI_MEMORY, socket.EAI_SYSTEM}
# Errors of the system that may pass: the server, its host, or the network between is not there yet, a firewall is being
# set up, or this process or system is short of something.
_PASSING_ERRNOS = {
    errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ENETUNREACH, errno.ENETDOWN, errno.ENETRESET, errno.ETIMEDOUT,
    errno.EACCES, errno.EPERM,
    errno.EADDRNOTAVAIL, errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EAGAIN,
}  # fmt: skip
# The share of the remaining time that one address may use. The rest is for the addresses after it.
_ADDRESS_TIME_SHARE = 0.5

ResolvedAddress = tuple[socket.AddressFamily, Any]
"""A resolved address: its family, and the argument of ``socket.connect``."""
Addresses = tuple[tuple[str, int], ...]
"""Host and port of each learner."""

# All sockets that were made here and still exist. A forked child closes its copies. Otherwise the connection
# would stay open after this process has ended, until the child ends, too.
_sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def peer_name(host: str, port: int) -> str:
    """Return ``host:port`` for messages, with brackets around an IPv6 literal."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def check_address(host: str, port: int) -> None:
    """Check that a host can be a name or an address, and that a port is in range. Resolves nothing.

    Raises:
        TypeError: ``host`` is not a string, or ``port`` is not a whole number.
        ValueError: ``host`` can be no name and no address, or ``port`` is not in 1 to 65535.
    """
    if not isinstance(host, str):
        raise TypeError(f"host: got {host!r}, expected a name or an address")
    remedy = "" if _is_literal(host) else _why_no_host(host)
    if remedy:
        raise ValueError(
            f"host: got {host!r}, expected a name or an address, such as 'learner' or '10.0.0.7'; {remedy}"
        )
    if check_count("port", port, least=1) > 65535:
        raise ValueError(f"port: got {port}, expected 1 to 65535")


def _why_no_host(host: str) -> str:
    """Return the remedy for a host that cannot be a name; empty if it can be one."""
    inner, bracket, _ = host.removeprefix("[").partition("]")
    name, colon, rest = host.rpartition(":")
    if not host:
        return "give the learner's machine, or 'localhost'"
    if "://" in host or "/" in host:
        return "leave out what a URL has before and after the name"
    if host.startswith("[") and bracket and _is_literal(inner):
        return f"leave out the brackets: {inner!r}"
    if colon and name and rest.isdecimal():
        return f"give the port by itself: {name!r}, {rest}"
    if host.split() != [host]:
        return "leave out the blanks"
    try:
        host.encode("idna")
    except UnicodeError as error:
        return f"the parts between its dots have 1 to 63 characters ({error})"
    return "a name has no such characters" if set(host) & set("[]:@,;") else ""


def pair_hosts_and_ports(host: Any, port: Any) -> Addresses:
    """Pair hosts with ports, one address for each learner.

    Args:
        host: a name or address, or a list of them.
        port: a number, or a list or range of them. One host is paired with every port, one port with every host.

    Raises:
        TypeError: a host is not a string, or a port is not a whole number.
        ValueError: a port is out of range, a list is empty, the numbers of hosts and ports differ and neither is 1, or
            an address comes twice.
    """
    hosts = [host] if isinstance(host, str) else _checked_list("host", host)
    ports = _checked_list("port", port) if isinstance(port, (list, tuple, range)) else [port]
    if 1 not in (len(hosts), len(ports)) and len(hosts) != len(ports):
        raise ValueError(
            f"host, port: got {len(hosts)} hosts and {len(ports)} ports, expected the same number, or one of either"
        )
    count = max(len(hosts), len(ports))
    pairs = list(zip(hosts * (count // len(hosts)), ports * (count // len(ports)), strict=True))
    for pair in pairs:
        check_address(*pair)
        if pairs.count(pair) > 1:
            raise ValueError(f"host, port: got {peer_name(*pair)} twice, expected a different address for each learner")
    return tuple(pairs)


def _checked_list(name: str, values: Any) -> list[Any]:
    if not isinstance(values, (list, tuple, range)):
        raise TypeError(f"{name}: got {values!r}, expected one, or a list of them")
    if not values:
        raise ValueError(f"{name}: got {values!r}, expected at least one")
    return list(values)


def connect_and_handshake(
    host: str, port: int, deadline: Deadline, *, retry_refused: bool = False, tls: TLS | None = None
) -> tuple[socket.socket, WireLeaves]:
    """Connect to an echo server and read its greeting.

    Args:
        host: name, IPv4 or IPv6 address.
        port: 1 to 65535.
        deadline: covers resolving, connecting and all handshakes.
        retry_refused: keep trying until the deadline while errors are transient (`is_transient`), for example because
            the server is not there yet. If nobody knows the name, give up after `UNKNOWN_NAME_RETRY_S`.
        tls: settings for TLS; None for a plain connection.

    Returns:
        A non-blocking socket, a `TlsSocket` if ``tls`` is given, and the leaves that the server expects.

    Raises:
        OSError: the system's error (``ConnectionRefusedError``, ``socket.gaierror``, ...).
        TimeoutError: the deadline passed.
        ConnectionClosedError: the peer hung up before its greeting was complete.
        HandshakeError: the peer is not an echo server of wire version 1, or does not speak TLS although ``tls`` is
            given.
        CertificateError: one side refuses the other's certificate, or a file of ``tls`` is not usable.
    """
    check_address(host, port)
    peer = peer_name(host, port)
    backoff, began, warned = Backoff(*_RETRY_DELAYS_S), time.monotonic(), False
    while True:
        try:
            return _attempt(host, port, peer, deadline, tls)
        except OSError as error:
            left, spent = deadline.remaining(), time.monotonic() - began
            if not (retry_refused and is_transient(error, tls=tls)):
                raise
            unknown = isinstance(error, socket.gaierror) and error.errno in _UNKNOWN_NAME
            # With so little time left, another try would only time out. This error says more.
            if left <= _RETRY_DELAYS_S[0] or (unknown and spent >= UNKNOWN_NAME_RETRY_S):
                raise _tried_in_vain(error, spent) from error.__cause__
            if spent >= _WARN_AFTER_S and not warned:
                warned = True
                _log.warning("%s: %s; trying for up to %.0f s more", peer, error.strerror or str(error), left)
        # Leave at least half of the remaining time for the next try.
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


def _tried_in_vain(error: OSError, spent: float) -> OSError:
    """Return the error to raise after several tries: the same, with the remedy and how long they took."""
    if error.errno is None:
        return error
    remedy = "; nobody listens there: start the learner first, or check the port"
    what = f"{error.strerror}{remedy if isinstance(error, ConnectionRefusedError) else ''}"
    return type(error)(error.errno, f"{what}; tried for {spent:.1f} s (connect_timeout)")


def is_transient(error: OSError, *, was_connected: bool = False, tls: TLS | None = None) -> bool:
    """Whether an error of connecting may pass, so that another try may succeed.

    Args:
        error: what `connect_and_handshake` raised.
        was_connected: whether the server was there before.
        tls: settings for TLS; None for a plain connection.
    """
    if isinstance(error, ConnectionClosedError):
        # The peer hung up before its greeting was complete. Three kinds of peer do so for a while: a server that starts
        # again, a TLS proxy with no server behind it, and a host to which too many clients connect at once, which
        # resets the connection. Any other peer is no echo server.
        return was_connected or tls is not None or isinstance(error.__cause__, ConnectionResetError)
    if isinstance(error, socket.gaierror):
        return error.errno in _PASSING_LOOKUPS
    return isinstance(error, (TimeoutError, ConnectionError)) or error.errno in _PASSING_ERRNOS


def resolve(host: str, port: int, deadline: Deadline) -> Sequence[ResolvedAddress]:
    """Look up a host, and return its addresses in the order in which to try them.

    Raises:
        OSError: the name is unknown or the resolver fails (``socket.gaierror``).
        TimeoutError: the deadline passed.
    """
    # An address needs no resolver, and so no thread.
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
    except RuntimeError as error:
        # An interpreter that is exiting starts no more threads: look up on this thread, without a limit. In any other
        # case the system has no thread left. That may pass, so raise a transient error.
        if "shutdown" not in str(error) and not sys.is_finalizing():
            what = f"no thread left to look up the name ({peer_name(host, port)})"
            raise OSError(errno.EAGAIN, what) from None
        look_up()
    answer = None
    # Wait in short pieces: the deadline may be revoked.
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
    """Connect to the first address that answers.

    Args:
        addresses: at least one, from `resolve`.
        peer: the peer's name, for messages.
        deadline: covers all addresses together.
        kind: the class of the socket to make.

    Returns:
        A connected, non-blocking socket.

    Raises:
        OSError: no address answered. If they failed differently, this is the error that tells you most.
        TimeoutError: the deadline passed.
        ConnectionClosedError: the peer reset the connection as soon as it was made.
    """
    failures: list[OSError] = []
    for index, (family, address) in enumerate(addresses):
        # The last address may use all the time that is left.
        share = None if index == len(addresses) - 1 else deadline.remaining() * _ADDRESS_TIME_SHARE
        try:
            return _connect_one(kind, family, address, deadline.within(share))
        except OSError as error:
            failures.append(error)
    # There is at least one failure, because getaddrinfo returns at least one address or raises.
    failure = max(failures, key=_failure_rank)
    try:
        if isinstance(failure, TimeoutError) and deadline.expired:
            raise TimeoutError(f"{peer}: no connection within {deadline.timeout:g} s") from failure
        if isinstance(failure, ConnectionResetError):  # the connection was made, and then reset
            raise ConnectionClosedError(f"{peer} broke the connection off before the handshake: {failure}") from failure
        raise _with_peer_name(failure, peer)
    finally:
        failures.clear()  # their tracebacks hold this frame, and this frame holds them
        del failure


def _failure_rank(failure: OSError) -> int:
    """Rank how much an error tells you.

    A refusal ranks highest: the host is there and may listen later. A timeout ranks lowest: it tells you nothing.
    """
    return 2 if isinstance(failure, ConnectionRefusedError) else 0 if isinstance(failure, TimeoutError) else 1


def _connect_one(
    kind: type[socket.socket], family: socket.AddressFamily, address: Any, deadline: Deadline
) -> socket.socket:
    sock = kind(family, socket.SOCK_STREAM)
    _sockets.add(sock)
    try:
        sock.setblocking(False)
        # Send small writes at once, instead of holding them back until the peer has acknowledged earlier ones.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        enable_keepalive(sock, greeted=False)
        try:
            sock.connect(address)
        except BlockingIOError:
            if not wait_ready(sock, select.POLLOUT, deadline):
                raise TimeoutError("timed out") from None
            # The socket becomes ready whether connecting succeeds or fails. Only SO_ERROR tells which.
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
    """Whether the socket is its own peer.

    On loopback, the kernel may pick the port that we connect to as our own port. If nobody listens on it, TCP then
    connects the socket to itself.
    """
    try:
        return bool(sock.getsockname() == sock.getpeername())
    except OSError:  # the peer has hung up already; the handshake will find that out
        return False


def _with_peer_name(failure: OSError, peer: str) -> OSError:
    """Return the same error, with the peer's name in its text."""
    if failure.errno is None:
        return failure
    return type(failure)(failure.errno, f"{failure.strerror} ({peer})")


def do_handshake(sock: socket.socket, peer: str, deadline: Deadline) -> WireLeaves:
    """Read the greeting from a socket of `connect`, and return the leaves that the server expects.

    Never closes the socket.

    Raises:
        TimeoutError: the deadline passed.
        ConnectionClosedError: the peer hung up before its greeting was complete.
        HandshakeError: the peer is not an echo server of wire version 1.
        CertificateError: the TLS proxy refuses our certificate, which TLS 1.3 tells us only now.
    """
    handshake = Handshake()
    while handshake.leaves is None:
        # Read first and wait only if nothing is there: a `TlsSocket` may hold bytes in memory that no poll can see.
        try:
            data = sock.recv(handshake.missing)
        except BlockingIOError:
            # Check the deadline even if bytes came: over TLS, they may be no part of the greeting.
            if not wait_ready(sock, select.POLLIN, deadline) or deadline.expired:
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
        # Bytes that trickle in do not extend the deadline.
        if handshake.leaves is None and deadline.expired:
            raise _handshake_timeout(sock, handshake, peer, deadline)
    # The peer has greeted us, so probe less often from now on.
    enable_keepalive(sock)
    return handshake.leaves


def _handshake_timeout(sock: socket.socket, handshake: Handshake, peer: str, deadline: Deadline) -> TimeoutError:
    got = handshake.received
    # A TLS server waits for us to speak first, so it sends nothing at all.
    hint = "" if got or isinstance(sock, TlsSocket) else "; if that server expects TLS, give tls="
    what = f"{peer}: handshake not complete within {deadline.timeout:g} s; got {got} bytes of it"
    return TimeoutError(f"{what}{hint}")


def shutdown_and_close(sock: socket.socket) -> None:
    """End the connection and free the descriptor, in whatever state the socket is.

    Not for a forked child: ``shutdown`` would end its parent's connection.
    """
    # A copy of the descriptor in another process would keep the connection open; this ends it for all copies.
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()


def _close_all_after_fork() -> None:
    # Only ``close``: ``shutdown`` would end the parent's connections.
    for sock in _sockets:
        sock.close()


os.register_at_fork(after_in_child=_close_all_after_fork)
