"""Reach a server step by step, read which samples it expects, and explain in words why a step failed.

Apart from the TLS handshake, this sends not a single byte. A learner that is only stopped would read such a byte as
part of a sample when it continues.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Callable
from contextlib import closing
from time import perf_counter
from typing import cast

from echo_torch.errors import ConnectionClosedError, HandshakeError
from echo_torch.support.deadline import Deadline, clamp_timeout
from echo_torch.wire.connect import connect, do_handshake, peer_name, resolve
from echo_torch.wire.protocol import MAGIC, VERSION, WireLeaves
from echo_torch.wire.tls import TLS
from echo_torch.wire.tls_socket import TlsSocket, certificate_names, do_tls_handshake

from .errors import CommandError

# Seconds to reach a server. Even one on another continent answers faster.
REACH_TIMEOUT_S = 5.0
# Seconds that a silent peer has to react after we end our side of the connection; see `_describe_silence`.
_EOF_REPLY_TIMEOUT_S = 1.0

ReportStep = Callable[[str, float, str], object]
"""Called when a step is done, with its name, its duration in seconds, and what was found."""


def reach(
    host: str, port: int, timeout: float, report_step: ReportStep = lambda *_: None, tls: TLS | None = None
) -> WireLeaves:
    """Return the leaves of a sample that the server at ``host:port`` expects. Closes the connection.

    Raises:
        CommandError: the address does not lead to an echo server of this wire version, or its samples are empty.
    """
    peer = peer_name(host, port)
    deadline = Deadline(timeout)
    began = perf_counter()
    try:
        addresses = resolve(host, port, deadline)
    except (OSError, UnicodeError) as error:
        why = _reason_without_peer(error, peer)
        raise CommandError(f"{peer}: the name does not resolve ({why}); check it, or give an IP address") from error
    known = perf_counter()
    report_step("resolve", known - began, ", ".join(dict.fromkeys(address[0] for _, address in addresses)))
    try:
        sock = connect(addresses, peer, deadline, socket.socket if tls is None else TlsSocket)
    except OSError as error:
        raise CommandError(_describe_connect_error(error, peer)) from error
    connected = perf_counter()
    with closing(sock):
        report_step("connect", connected - known, _remote_address(sock) or peer)
        if tls is not None:
            _start_tls(cast(TlsSocket, sock), tls, host, peer, deadline)
            secured = perf_counter()
            report_step("TLS", secured - connected, _describe_certificate(cast(TlsSocket, sock)))
            connected = secured
        leaves = _read_handshake(sock, peer, deadline)
    payload = sum(leaf.nbytes for leaf in leaves)
    arrays = f"{len(leaves):,} array{'s' * (len(leaves) != 1)}"
    what = f"an echo server, wire version {VERSION}, {arrays} and {payload:,} bytes per sample"
    report_step("handshake", perf_counter() - connected, what)
    if payload == 0:
        raise CommandError(f"{peer}: samples of no bytes are nothing to send; give the server another example")
    return leaves


def _reason_without_peer(error: Exception, peer: str) -> str:
    """Return the text of an error without the peer's name."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text.removeprefix(f"{peer}: ").removesuffix(f" ({peer})")


def _describe_connect_error(error: OSError, peer: str) -> str:
    why = _reason_without_peer(error, peer)
    if isinstance(error, ConnectionRefusedError):
        return f"{peer}: nobody listens there ({why}); start the learner first, or check the port"
    if isinstance(error, TimeoutError):
        return f"{peer}: nothing answers there ({why}); check the address, and whether a firewall drops what is sent"
    if isinstance(error, ConnectionClosedError):
        return _describe_disconnect(error)
    return f"{peer}: no way there ({why}); check the address and the network"


def _remote_address(sock: socket.socket) -> str | None:
    """Return the address that answered; None if it has already closed the connection."""
    try:
        return peer_name(*sock.getpeername()[:2])
    except OSError:
        return None


def _start_tls(sock: TlsSocket, tls: TLS, host: str, peer: str, deadline: Deadline) -> None:
    try:
        do_tls_handshake(sock, tls, host, peer, deadline)
    except ConnectionClosedError as error:
        raise CommandError(_describe_disconnect(error)) from error
    except (HandshakeError, TimeoutError) as error:
        raise CommandError(str(error)) from error


def _describe_certificate(sock: TlsSocket) -> str:
    """Describe the TLS version and the proxy's certificate."""
    return (
        f"{sock.ssl_object.version()}, with a certificate for {certificate_names(sock.ssl_object) or 'nobody by name'}"
    )


def _read_handshake(sock: socket.socket, peer: str, deadline: Deadline) -> WireLeaves:
    if not isinstance(sock, TlsSocket) and not select.select([sock], [], [], clamp_timeout(deadline.remaining()))[0]:
        raise CommandError(_describe_silence(sock, peer, deadline))
    try:
        return do_handshake(sock, peer, deadline)
    except HandshakeError as error:
        remedy = "check the port: something else listens there"
        if "wire version" in str(error):
            remedy = "install an echo-torch and an id-echo that speak the same"
        raise CommandError(f"{error}; {remedy}") from error
    except ConnectionClosedError as error:
        raise CommandError(_describe_disconnect(error)) from error
    except TimeoutError as error:
        raise CommandError(f"{error}; check the network, and whether that is an echo server") from error


def _describe_disconnect(error: ConnectionClosedError) -> str:
    return f"{error}; a proxy or a forwarded port with nothing behind it does so: check that the learner runs"


def _describe_silence(sock: socket.socket, peer: str, deadline: Deadline) -> str:
    """Describe a peer that accepts and sends no greeting: either it hangs, or it waits for us to speak first.

    To find out, end our side of the connection. A peer that waits for us then closes its side.
    """
    try:
        sock.shutdown(socket.SHUT_WR)
        sock.settimeout(_EOF_REPLY_TIMEOUT_S)
        waits = sock.recv(1) != MAGIC[:1]
    except TimeoutError:
        waits = False
    except OSError:
        waits = True
    if waits:
        what = "no echo server: it waits for its client to speak first, as HTTP servers do, and proxies with TLS"
        return f"{peer}: {what}; check the port, or give --tls-ca"
    what = f"accepts connections, but sends nothing and does not notice that we closed (waited {deadline.timeout:g} s)"
    return f"{peer}: {what}; its process is stopped or hangs, or it is a forwarded port: look at the learner's process"
